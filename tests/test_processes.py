"""Two real processes over loopback: a run ends as one process's does, whatever happens to them on the way."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from patients import arguments, write_patients

from jmae import checkpoint, train
from jmae.errors import exit_code
from jmae.run_folder import read_history
from jmae.sharding import ABORTED, LOST

# Wide enough that fsdp splits something.
SETTINGS = "model.width=96 train.batch=4 evaluation.batch=4 evaluation.draws=20 evaluation.repeats=1".split()
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    return write_patients(tmp_path_factory.mktemp("patients"))


@pytest.fixture(scope="module")
def alone(patients, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert exit_code(train.main, arguments(patients, run, *SETTINGS)) == 0
    return run


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def hit(given: list[str], process: int, name: str, number: int) -> list[tuple[int, list[str], float]]:
    """(exit code, lines of standard error, seconds that it ended after the first) of each of two processes, of which
    one gets the signal `name` at its batch `number`."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, str(Path(__file__).with_name("on_2_processes.py")), str(process), name, str(number)]
    both = [
        subprocess.Popen(
            [*command, *given],
            env=os.environ | QUICK | shared | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said, ended = [], dict[int, float]()
    try:
        while len(ended) < 2:
            ended |= {i: time.monotonic() for i, one in enumerate(both) if one.poll() is not None and i not in ended}
            time.sleep(0.1)
        said = [one.communicate()[1].splitlines() for one in both]
    finally:
        for one in both:
            one.kill()
    first = min(ended.values())
    return [(one.returncode, said[i], ended[i] - first) for i, one in enumerate(both)]


def assert_alike(run: Path, alone: Path) -> None:
    """The losses to 1e-5, the scores, the metrics and the maps of a run are those of one process."""
    a, b = (read_history(folder / "metrics.jsonl") for folder in (alone, run))
    assert [h["step"] for h in b] == [h["step"] for h in a]
    assert [h["loss"] for h in b] == pytest.approx([h["loss"] for h in a], rel=1e-5)
    lines = lambda folder: (folder / "evaluation" / "scores.csv").read_text().splitlines()
    a, b = (list(csv.DictReader(lines(folder))) for folder in (alone, run))
    assert [row["id"] for row in b] == [row["id"] for row in a]
    assert [float(row["score"]) for row in b] == pytest.approx([float(row["score"]) for row in a], rel=1e-4)
    a, b = (json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in (alone, run))
    assert b["image"]["auroc"] == a["image"]["auroc"] and b["pixel"]["auroc"] == pytest.approx(
        a["pixel"]["auroc"], rel=1e-4
    )
    names = sorted(os.listdir(alone / "evaluation" / "maps"))
    assert names and sorted(os.listdir(run / "evaluation" / "maps")) == names
    for name in names:
        one, other = (nib.load(folder / "evaluation" / "maps" / name).dataobj for folder in (alone, run))
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_stopped_then_one_killed_then_alone_a_run_of_two_ends_as_one_does(patients, alone, tmp_path):
    run = tmp_path / "run"
    given = arguments(patients, run, *SETTINGS)
    # The second gets SIGTERM at its batch 2: both save the same step and stop.
    found = hit(given, 1, "SIGTERM", 2)
    saved = checkpoint.steps(run / "checkpoints" / "train")[-1]
    assert saved in (3, 4)
    for code, said, _ in found:
        assert code == 143, said
        assert any(line.startswith(f"stopped by SIGTERM: stage train, step {saved} saved in ") for line in said), said
    # The second is killed in the step after: the first ends with one line within a minute.
    (code, said, seconds), (killed, *_) = hit(given, 1, "SIGKILL", 1)
    assert (code, killed) == (2, -signal.SIGKILL), said
    assert said[-1].startswith((LOST, ABORTED)) and not any("Traceback" in line for line in said) and seconds < 60
    assert checkpoint.steps(run / "checkpoints" / "train")[-1] == saved
    # What two have saved one process restores, and it finishes.
    assert exit_code(train.main, given) == 0
    assert_alike(run, alone)


def test_what_one_process_has_saved_two_restore_and_finish_with_the_parameters_split_over_both(
    patients, alone, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "train" / "6")
    shutil.rmtree(run / "evaluation")
    environment = os.environ | QUICK | {"JAX_NUM_CPU_DEVICES": "2", "PORT": str(free_port())}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [str(LOCAL), "2", *arguments(patients, run, *SETTINGS, "fsdp=4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "steps 4 to 6" in done.stderr
    assert_alike(run, alone)
