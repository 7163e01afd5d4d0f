"""What a command says while its user waits."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jmae.run_folder import log

SILENCE = 10  # seconds after which a step says that it is still at work


@contextmanager
def at_work(what: str | Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Logs every `SILENCE` seconds what the block is doing and for how long.

    Yields a function that ends these lines early.
    """
    began, ended = time.monotonic(), threading.Event()

    def speak() -> None:
        while not ended.wait(SILENCE):
            log(f"{what() if callable(what) else what}, {time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield ended.set
    finally:
        ended.set()
        thread.join()
