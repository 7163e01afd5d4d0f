"""What tests/test_processes.py runs as one of two processes: a training command that a signal hits at a batch.

    python on_2_processes.py PROCESS SIGNAL NUMBER ARGUMENT ...

sends the process with number PROCESS the signal SIGNAL when it places its batch NUMBER.
"""

import os
import signal
import sys

import jax

from jmae import train
from jmae.errors import exit_code

if __name__ == "__main__":
    process, name, number, *arguments = sys.argv[1:]
    place, calls = train.place_batch, []

    def hit(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(number) and jax.process_index() == int(process):
            os.kill(os.getpid(), signal.Signals[name])
        return place(*args, **kwargs)

    train.place_batch = hit
    sys.exit(exit_code(train.main, arguments))
