"""Two real processes over loopback: a run ends as one process's does, whatever happens to them on the way.

And what processes exchange and say, with one process that plays several.
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from patients import arguments, write_patients

from jmae import checkpoint, processes, recipe, train
from jmae.errors import InputError, exit_code
from jmae.run_folder import read_history

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
    losses = lambda history: [h["loss"] for h in history if "loss" in h]
    assert losses(b) == pytest.approx(losses(a), rel=1e-5)
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


@pytest.mark.long
def test_stopped_then_one_killed_then_alone_a_run_of_two_ends_as_one_does(patients, alone, tmp_path):
    run = tmp_path / "run"
    given = arguments(patients, run, *SETTINGS)
    # The second gets SIGTERM at its batch 2: both save the same step and stop.
    found = hit(given, 1, "SIGTERM", 2)
    for code, said, _ in found:
        assert code == 143, said
    saved = checkpoint.steps(run / "checkpoints" / "train")[-1]
    assert saved in (3, 4)
    for _, said, _ in found:
        assert any(line.startswith(f"stopped by SIGTERM: stage train, step {saved} saved in ") for line in said), said
    # The second is killed in the step after. The first ends within a heartbeat and the wait at the end: its collective
    # operation fails, which is one line, or JAX's runtime aborts it.
    (code, said, seconds), (killed, *_) = hit(given, 1, "SIGKILL", 1)
    assert killed == -signal.SIGKILL and code in (2, -signal.SIGABRT) and seconds < 120, said
    report = any(line.startswith(processes.LOST) for line in said) or any("JAX distributed service" in s for s in said)
    assert report and not any("Traceback" in line for line in said), said
    assert checkpoint.steps(run / "checkpoints" / "train")[-1] == saved
    # What two have saved one process restores, and it finishes.
    assert exit_code(train.main, given) == 0
    assert_alike(run, alone)


@pytest.mark.long
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


@pytest.fixture
def two(monkeypatch):
    """Gives a function that calls another in two processes, here threads: (results, the shapes that they gathered)."""
    slots, meet, shapes = [None, None], threading.Barrier(2), []
    mine = threading.local()

    def allgather(tree):
        slots[mine.number] = tree
        shapes.extend(leaf.shape for leaf in jax.tree.leaves(tree))
        meet.wait(20)
        out = jax.tree.map(lambda *leaves: np.stack(leaves), *slots)
        meet.wait(20)
        return out

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)

    def run(function):
        results = [None, None]

        def one(number):
            mine.number = number
            results[number] = function(number)

        threads = [threading.Thread(target=one, args=(number,)) for number in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        return results, shapes

    return run


def test_every_process_has_the_trees_of_all_whose_shapes_differ(two):
    trees = [
        {"map": np.arange(700, dtype=np.float32).reshape(70, 10), "fits": np.bool_(True)},
        {"map": np.ones((0, 3), np.float32), "fits": np.bool_(False)},
    ]
    results, shapes = two(lambda number: processes.gather(trees[number]))
    for result in results:
        for tree, expected in zip(result, trees, strict=True):
            assert {k: (v.dtype, v.shape) for k, v in tree.items()} == {
                k: (v.dtype, v.shape) for k, v in expected.items()
            }
            jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert (1024,) in shapes  # few lengths, so few programs


def test_numbers_of_64_bits_are_refused_and_not_rounded(two):
    with pytest.raises(TypeError, match="float64: convert it to 32 bits"):
        processes.gather_array(np.ones(3), [[3], [3]])


def test_a_lost_process_is_named_with_the_first_line_of_the_error(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setattr(processes, "join", lambda number: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError) as raised, processes.join_processes():
        raise RuntimeError("\nUNAVAILABLE: NCCL ran out of memory\nmore")
    assert str(raised.value) == f"{processes.LOST}: UNAVAILABLE: NCCL ran out of memory"
    with pytest.raises(InputError, match=r"^a line of its own$"), processes.join_processes():
        raise InputError("a line of its own")


def test_what_several_processes_cannot_evaluate_is_said_before_anything_is_read(monkeypatch, tmp_path):
    config, _ = recipe.parse(["--config=configs/maemi.py:smoke", "--config.evaluation.convergence=2"], "")
    config.evaluation.repeats = 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(train, "load_cases", lambda *args: pytest.fail("data were read"))
    with pytest.raises(InputError, match=r"evaluation\.convergence needs a single process: set it to 0"):
        train.run(config, tmp_path)
