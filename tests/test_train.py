"""The loop: stages, resume, faults, signs of life. Runs of seconds on a small set (conftest.py); most of them equal."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import without_clock
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console
from test_loggers import events_of

from jmae import checkpoint, evaluate, programs, progress, recipe, seen, train, waiting
from jmae.data import loader, phantoms
from jmae.data.cases import load_rows
from jmae.errors import InputError, exit_code
from jmae.run_folder import CLOCK, add_history, cut_history, read_history
from jmae.seen import read_seen, write_seen
from jmae.system import Pretrained, load_system
from jmae.target import Target, tracing_for

ONE_STAGE = ("variant=mae", "evaluation.maps=false")


@pytest.fixture
def go(small_set, tools, capfd):
    """Runs a small training in this process: (exit code, standard error)."""

    def run(workdir: Path, *changes: str) -> tuple[int, str]:
        capfd.readouterr()
        code = exit_code(train.main, tools.arguments(small_set, workdir, *changes))
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def unevaluated(monkeypatch) -> list[tuple]:
    """Leaves out the evaluation after a training: the arguments of each one."""
    asked: list[tuple] = []
    monkeypatch.setattr(train, "evaluate", lambda *given, **_: asked.append(given))
    return asked


def count_calls(monkeypatch, module, name, act) -> None:
    """`act(number of the call)` before every call of module.name."""
    real, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        act(len(calls))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_smoke_recipe_trains_saves_scores_and_reports(tmp_path):
    run = tmp_path / "smoke"
    assert exit_code(train.main, ["--config=configs/amae.py:smoke", f"--workdir={run}"]) == 0
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "evaluation"} <= set(os.listdir(run))
    written = {"metrics.json", "scores.csv", "report.html", "maps", "cases.csv", "config.json"}
    assert set(os.listdir(run / "evaluation")) == written
    assert len(os.listdir(run / "evaluation" / "maps")) == 200
    with open(run / "labels.csv", newline="") as file:
        labels = {row["id"]: row["hidden_label"] for row in csv.DictReader(file)}
    assert labels == {case: str(label) for case, label in phantoms.unlabeled_labels("chest").items()}
    assert "Reconstruction of case chest-test-" in (run / "evaluation" / "report.html").read_text()


def test_a_run_folder_holds_what_the_design_promises(finished):
    config = recipe.read(finished)
    assert config.data.size == (64, 64) and config.evaluation.subsets == ("matched",)
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__ and environment["devices"]
    stages = ["pretrain", "proxy", "labels", "module_a", "module_b"]
    assert sorted(os.listdir(finished / "checkpoints")) == sorted(stages)
    assert checkpoint.steps(finished / "checkpoints" / "pretrain") == [16, 20]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "pretrain"] == [3, 6, 9, 12, 15, 18, 20]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == stages
    assert all(np.isfinite(line["loss"]) for line in lines if line["stage"] != "labels")


@pytest.mark.long
def test_a_line_is_the_mean_over_its_steps(finished, go, unevaluated, tmp_path):
    assert go(tmp_path / "run", *ONE_STAGE, "log_every=1")[0] == 0
    loss = {line["step"]: line["loss"] for line in read_history(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(loss) == list(range(1, 21))
    lines = [line for line in read_history(finished / "metrics.jsonl") if line["stage"] == "pretrain"]
    for last, line in zip([3, 6, 9, 12, 15, 18, 20], lines, strict=True):
        first = (last - 1) // 3 * 3 + 1
        assert line["step"] == last and line["loss"] == np.mean([loss[k] for k in range(first, last + 1)])


def test_a_training_film_upside_down_is_named_before_the_training(monkeypatch, tmp_path, capfd):
    lines = ["id,split,label,image"]
    for i in range(14):
        image = phantoms.draw("chest", "train", i).image[..., 0].astype(np.uint8)
        Image.fromarray(image[::-1] if i == 3 else image).save(tmp_path / f"{i}.png")
        lines.append(f"c{i},train,0,{i}.png")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    monkeypatch.setattr(train, "train", lambda *given: (_ for _ in ()).throw(InputError("the training begins")))
    words = [
        "--config=ppii:smoke",
        f"--config.data.manifest={tmp_path / 'manifest.csv'}",
        f"--workdir={tmp_path / 'r'}",
    ]
    assert exit_code(train.main, words) == 2
    *_, warning, steps, begins = capfd.readouterr().err.splitlines()
    assert steps.startswith("training: 1 stage, 20 steps in all") and begins == "the training begins"
    assert warning.startswith(f"warning: {tmp_path / '3.png'}: would be more like the other training images if it were")


@pytest.mark.long
def test_a_test_split_without_labels_is_not_evaluated(tools, tmp_path, capfd):
    manifest = tools.write_set(tmp_path / "set", {("train", 0): 4, ("test", None): 2})
    assert exit_code(train.main, tools.arguments(manifest, tmp_path / "run", *ONE_STAGE, "budget=0.5")) == 0
    said = capfd.readouterr().err
    assert said.count("short training: ") == 1
    assert "no test row has a label: not evaluated" in said
    assert "warning: pretrain: 4 images for a batch of 32: images repeat within it" in said
    assert said.index("no normal scan is kept from the training to give p-values") < said.index("pretrain: 4 images")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_rows_that_a_stage_lacks_are_an_error(tools, tmp_path, capfd):
    manifest = tools.write_set(tmp_path / "set", {("test", 0): 2, ("test", 1): 2})
    assert exit_code(train.main, tools.arguments(manifest, tmp_path / "run")) == 2
    assert "add some, or take --config.variant=stage1" in capfd.readouterr().err


# --- interruptions ----------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from jmae import checkpoint, train
from jmae.errors import exit_code
module, name, number = {"place": (train, "place_batch"), "digests": (checkpoint, "_digests")}[sys.argv[1]] + (
    int(sys.argv[2]),)
real, calls = getattr(module, name), []
def deadly(*args, **kwargs):
    if name == "place_batch" or str(args[0]).endswith(".tmp"):  # digests are also computed of steps that are read
        calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, deadly)
sys.exit(exit_code(train.main, sys.argv[3:]))
"""


@pytest.mark.long
def test_killed_three_times_a_run_ends_as_if_it_never_was(finished, small_set, tools, tmp_path, capfd):
    run = tmp_path / "run"
    arguments = tools.arguments(small_set, run)
    moments = {
        "Stage 0, at step 11": ("place", 11),
        # Continued from step 8: 12 steps of Stage 0, 10 of the proxy task, 1 of the labels, 10 of module A are left.
        "module B, at its step 9": ("place", 12 + 10 + 1 + 10 + 9),
        "inside a save": ("digests", 1),
    }
    for moment, (what, number) in moments.items():
        killed = subprocess.run(
            [sys.executable, "-c", KILLER, what, str(number), *arguments], capture_output=True, text=True
        )
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stderr}"
    assert list((run / "checkpoints").glob("*/*.tmp")), "the last kill fell inside a save"
    assert exit_code(train.main, arguments) == 0
    assert tools.content(run) == tools.content(finished)


def test_killed_then_stopped_stage_0_ends_as_if_it_never_was(
    finished, go, small_set, tools, unevaluated, tmp_path, monkeypatch
):
    """The short form of the tests around it: one stage, and no evaluation."""
    run = tmp_path / "run"
    killed = [sys.executable, "-c", KILLER, "place", "11", *tools.arguments(small_set, run, *ONE_STAGE)]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.steps(run / "checkpoints" / "pretrain") == [8] and not unevaluated
    with monkeypatch.context() as patch:
        count_calls(patch, train, "place_batch", lambda call: call == 5 and os.kill(os.getpid(), signal.SIGTERM))
        code, said = go(run, *ONE_STAGE)
    assert code == 143 and said.splitlines()[-1].startswith("stopped by SIGTERM: stage pretrain, step 13 saved in ")
    resume = f"jmae train --workdir {run}"
    assert said.splitlines()[-1].endswith(f": to go on: {resume}")
    with pytest.raises(InputError, match=f"pretrain: stopped at step 13 of 20: finish it: {resume}$"):
        evaluate.main([f"--workdir={run}"])
    assert exit_code(train.main, resume.split()[2:]) == 0 and len(unevaluated) == 1
    assert tools.last_states(run)["pretrain"] == tools.last_states(finished)["pretrain"]
    history = lambda folder: map(without_clock, read_history(folder / "metrics.jsonl"))
    lines = [[line for line in history(folder) if line["stage"] == "pretrain"] for folder in (run, finished)]
    assert lines[0] == lines[1]


@pytest.mark.long
def test_sigterm_and_ctrl_c_save_and_exit_143_and_130_and_the_run_goes_on(finished, go, tools, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    # Between two lines of metrics; at the last step of Stage 0, 18 later; in the proxy task.
    kinds = ((2, "pretrain", 2, "SIGTERM"), (18, "pretrain", 20, "SIGINT"), (3, "proxy", 3, "SIGTERM"))
    for calls, stage, step, name in kinds:
        number = signal.Signals[name]
        before = signal.getsignal(number)
        began = []

        def stop(call: int, calls=calls, began=began, number=number) -> None:
            if call == calls:
                began.append(time.monotonic())
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            count_calls(patch, train, "place_batch", stop)
            code, said = go(tmp_path / "run")
        assert code == 128 + number and time.monotonic() - began[0] < 120
        assert said.splitlines()[-1].startswith(f"stopped by {name}: stage {stage}, step {step} saved in ")
        assert checkpoint.steps(tmp_path / "run" / "checkpoints" / stage)[-1] == step
        assert signal.getsignal(number) == before
        if step == 2:  # half a Stage 0 is no start for another run
            code, said = go(tmp_path / "other", f"model.weights={tmp_path / 'run'}")
            assert code == 2 and f"stopped at step 2 of 20: finish it: jmae train --workdir {tmp_path / 'run'}" in said
    with pytest.raises(InputError, match=r"proxy: stopped at step 3 of 10: finish it: jmae train --workdir "):
        evaluate.main([f"--workdir={tmp_path / 'run'}"])
    assert go(tmp_path / "run")[0] == 0
    assert tools.content(tmp_path / "run") == tools.content(finished)


def test_a_refused_training_leaves_no_folder_that_it_made(tmp_path, capfd):
    (tmp_path / "there").mkdir()
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,split,image\na,train,nowhere.png\n")
    for file, said in ((manifest, "nowhere.png"), (tmp_path / "none.csv", "none.csv")):
        for run in ("runs/mine", "there"):
            words = ["--config=amae:smoke", f"--workdir={tmp_path / run}", f"--config.data.manifest={file}"]
            assert exit_code(train.main, words) == 2 and said in capfd.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"there", "manifest.csv"}


def test_a_second_run_on_a_folder_is_refused(finished, go, tmp_path):
    with checkpoint.workdir_lock(tmp_path / "run"):
        code, said = go(tmp_path / "run")
    assert code == 2 and said.count("\n") == 1
    assert f"{tmp_path / 'run'}: in use by process {os.getpid()}" in said


def test_another_configuration_is_refused_and_the_folder_stays_as_it_was(finished, go, unevaluated, tmp_path, tools):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    code, said = go(run, "adapt.mask_ratio=0.6", "model.width=24")
    assert code == 2 and "saved with other settings" in said
    assert "recipe.adapt.mask_ratio: checkpoint 0.75, recipe 0.6" in said
    assert "recipe.model.width: checkpoint 48, recipe 24" in said
    assert (run / "config.json").read_bytes() == before
    # What touches no state may change; a finished run is only evaluated again.
    code, said = go(run, "log_every=7", "evaluation.batch=8")
    assert code == 0 and said.count("done before") == 5 and len(unevaluated) == 1
    assert json.loads((run / "config.json").read_text())["evaluation"]["batch"] == 8
    again, first = tools.content(run), tools.content(finished)
    assert again["weights"] == first["weights"] and again["history"] == first["history"]


def test_other_rows_are_refused(finished, tools, tmp_path, capfd):
    counts = {("train", 0): 15, ("unlabeled", None): 16, ("test", 0): 2, ("test", 1): 2}
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = tools.arguments(tools.write_set(tmp_path / "set", counts), run)
    assert exit_code(train.main, arguments) == 2
    said = capfd.readouterr().err
    assert "saved with other data: " in said and "the rows to train on differ" in said and "or the same images" in said
    assert re.search(r"images to train on since this run began: 16 changed \(.*\); 1 removed \(train-0-15\)", said)


@pytest.mark.long
def test_a_flipped_bit_is_named_and_the_step_before_it_used(finished, go, tools, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "checkpoints" / "module_b" / "10"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    code, said = go(run)
    assert code == 0
    assert f"{newest}: step not used: '{file.relative_to(newest)}' is damaged" in said
    assert "images, steps 8 to 10, batch 16" in said
    assert tools.content(run) == tools.content(finished)


def test_lines_beyond_the_checkpoint_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    cut_history(file, "a", 3)
    assert not file.exists()
    for line in ({"stage": "a", "step": 3}, {"stage": "b", "step": 9}, {"stage": "a", "step": 6, "loss": 0.1}):
        add_history(file, line)
    with file.open("a") as torn:
        torn.write('{"stage": "a", "st')
    cut_history(file, "a", 3)
    assert file.read_text() == '{"stage": "a", "step": 3}\n{"stage": "b", "step": 9}\n'


# --- several steps a dispatch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "length", "period", "halts"), [(20, 4, 1, [8]), (37, 6, 2, [10, 15]), (50, 4, 2, [7]), (9, 16, 1, [100])]
)
def test_dispatches_cross_no_halt_and_depend_on_the_step_s_number_alone(steps, length, period, halts):
    def walk(done: int) -> list[tuple[int, int]]:
        out = []
        while done < steps:
            out.append((done, programs.next_dispatch(done, steps, length, period, halts)))
            done += out[-1][1]
        assert done == steps
        return out

    whole = walk(0)
    for done, count in whole:
        assert count in (1, length) and not any(
            k % every == 0 for k in range(done + 1, done + count) for every in halts
        )
        assert count == 1 or done % period == 0
        assert walk(done) == whole[[d for d, _ in whole].index(done) :]  # as a run that is continued from there
    stops = sorted({0, steps, *(k for every in halts for k in range(every, steps, every))})
    for a, b in pairwise(stops):  # between two halts as many whole dispatches as there is room for
        first = -(-a // period) * period
        assert sum(count > 1 for done, count in whole if a <= done < b) == max(0, b - first) // length


def test_the_loop_chooses_how_many_steps_a_program_has_by_the_size_of_a_batch():
    def chosen(name: str, platform: str, *changes: str, devices: int = 1) -> dict[str, int]:
        config, _ = recipe.parse([f"--config=configs/{name}", *(f"--config.{c}" for c in changes)], "")
        with tracing_for(Target(platform)):
            stages = load_system(config).stages
            return {stage.name: programs.steps_of_dispatch(config, stage, stage.batch / devices) for stage in stages}

    assert set(chosen("simsid.py:paper", "cpu").values()) == {1}
    # Images of 64 KiB in batches of 16; intervals of 5000 with 640 steps or none.
    expected = {"teacher": 10, "memory": 10, "student": 10, "discriminator": 10, "calibration": 10}
    assert chosen("simsid.py:paper", "tpu") == expected
    official = ("simsid.py:paper", "tpu", "variant=official", "checkpoint_every=36", "validation.every=72")
    assert chosen(*official) == {"joint": 12, "calibration": 12}
    assert chosen(*official, "joint.critic=4")["joint"] == 12 and chosen(*official, "joint.critic=5")["joint"] == 1
    # 2048 and 16 images of 224 x 224, four bytes a value: 392 and 3.06 MiB.
    amae = chosen("amae.py:paper", "tpu", "checkpoint_every=16", "replicates=1")
    assert amae == {"pretrain": 1, "proxy": 16, "labels": 16, "module_a": 16, "module_b": 16}
    assert chosen("amae.py:paper", "tpu", "checkpoint_every=16", "replicates=1", devices=16)["pretrain"] == 2
    assert set(chosen("simsid.py:paper", "tpu", "steps_per_dispatch=7").values()) == {7}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["steps_per_dispatch=-1"], "steps_per_dispatch is -1: 0 or more"),
        (
            ["steps_per_dispatch=3", "variant=official"],
            "steps_per_dispatch is 3: 0 (automatic), 1, or a multiple of the 2 phases of stage joint",
        ),
    ],
)
def test_a_wrong_number_of_steps_is_one_line_before_data_are_read(changes, line, tmp_path, capfd):
    given = ["--config=configs/simsid.py:smoke", "--config.data.manifest=nowhere.csv", f"--workdir={tmp_path / 'run'}"]
    assert exit_code(train.main, [*given, *(f"--config.{change}" for change in changes)]) == 2
    assert capfd.readouterr().err == f"{line}\n"


def same_training(run: Path, other: Path) -> None:
    """Lines equal to 1e-6 but for the clock, and checkpoints of the same steps. Of the proxy task to 1e-2: rounding
    grows from step to step in the batch norm of its head."""
    one, two = (read_history(folder / "metrics.jsonl") for folder in (run, other))
    lines = lambda history: [(h["stage"], h["step"], h.keys() - set(CLOCK)) for h in history]
    assert lines(one) == lines(two)
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"stage", "step", *CLOCK}:
            near = 1e-2 if a["stage"] == "proxy" else 1e-6
            assert b[name] == pytest.approx(a[name], rel=near, abs=near), (a["stage"], a["step"], name)
    for stage in (run / "checkpoints").iterdir():
        assert checkpoint.steps(stage) == checkpoint.steps(other / "checkpoints" / stage.name)


@pytest.mark.long
def test_four_steps_a_dispatch_are_the_steps_one_by_one_also_killed_and_stopped_within(
    finished, go, small_set, tools, tmp_path, monkeypatch
):
    four, seen, at = ("steps_per_dispatch=4",), [], train.place_batch
    with monkeypatch.context() as patch:
        patch.setattr(train, "place_batch", lambda batch, *a, **k: seen.append(batch) or at(batch, *a, **k))
        assert go(tmp_path / "whole", *four)[0] == 0
    same_training(finished, tmp_path / "whole")
    # Stage 0: 8, 8 and 4 steps in dispatches of 4; 8 and 2 of the proxy task; the labels' one; module A, module B.
    ten = [(4,), (4,), (), ()]
    assert [batch["index"].shape[:-1] for batch in seen] == [*[(4,)] * 5, *ten, (), *ten, *ten]
    # Killed at the dispatch of steps 13 to 16, continued from step 8; stopped within that of steps 9 to 12.
    run = tmp_path / "run"
    killed = [sys.executable, "-c", KILLER, "place", "4", *tools.arguments(small_set, run, *four)]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.steps(run / "checkpoints" / "pretrain") == [8]
    with monkeypatch.context() as patch:
        count_calls(patch, train, "place_batch", lambda call: call == 1 and os.kill(os.getpid(), signal.SIGTERM))
        code, said = go(run, *four)
    assert code == 143 and said.splitlines()[-1].startswith("stopped by SIGTERM: stage pretrain, step 12 saved in ")
    assert go(run, *four)[0] == 0
    assert tools.content(run) == tools.content(tmp_path / "whole")


@pytest.mark.long
def test_replicates_take_several_steps_a_dispatch_too(go, tmp_path):
    both = (*ONE_STAGE, "replicates=2")
    assert go(tmp_path / "one", *both)[0] == 0 and go(tmp_path / "four", *both, "steps_per_dispatch=4")[0] == 0
    same_training(tmp_path / "one", tmp_path / "four")


# --- losses that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_loss_that_is_not_finite_within_a_dispatch_is_told_by_its_step(go, tmp_path, monkeypatch):
    real, seen, at = loader.prepared_image, [], train.place_batch
    sick = lambda row, *args: real(row, *args) * (np.nan if row.id == "train-0-3" else 1)
    monkeypatch.setattr(loader, "prepared_image", sick)
    monkeypatch.setattr(train, "place_batch", lambda batch, *a, **k: seen.append(batch) or at(batch, *a, **k))
    changes = (*ONE_STAGE, "pretrain.batch=4", "checkpoint_every=4", "steps_per_dispatch=4", "skip_nonfinite=0")
    code, said = go(tmp_path / "run", *changes)
    healthy = np.isfinite(np.concatenate([batch["image"] for batch in seen])).all((1, 2, 3, 4))
    first = int(healthy.argmin()) + 1  # of each step one batch
    last = said.splitlines()[-1]
    assert code == 3 and last.startswith(f"stage pretrain, step {first}: ") and "not finite; batch: " in last
    words = np.concatenate([batch["case"] for batch in seen])[first - 1]
    named = last.partition("batch: ")[2].partition(";")[0].split(", ")
    np.testing.assert_array_equal([loader.case_words(name) for name in named], words)
    kept = (first - 1) // 4 * 4
    assert checkpoint.steps(tmp_path / "run" / "checkpoints" / "pretrain") == ([kept] if kept else [])
    assert (f"step {kept} is kept" if kept else "no step was saved yet") in last


@pytest.mark.parametrize("replicates", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(go, tmp_path, monkeypatch, replicates):
    real = loader.prepared_image
    sick = lambda row, *args: real(row, *args) * (np.nan if row.id == "train-0-3" else 1)
    monkeypatch.setattr(loader, "prepared_image", sick)
    seen, at = [], train.place_batch
    monkeypatch.setattr(train, "place_batch", lambda batch, *a, **k: seen.append(batch) or at(batch, *a, **k))
    code, said = go(tmp_path / "run", *ONE_STAGE, f"replicates={replicates}", "checkpoint_every=1", "skip_nonfinite=0")
    first = next(k for k, batch in enumerate(seen, 1) if not np.isfinite(batch["image"]).all())
    bad = np.isfinite(seen[first - 1]["image"]).reshape(replicates, -1).all(1).argmin()
    assert code == 3
    last = said.splitlines()[-1]
    assert last.startswith(f"stage pretrain, step {first}: ") and "loss" in last and "not finite; batch: " in last
    named = last.partition("batch: ")[2].partition(";")[0].split(", ")
    words = np.array([loader.case_words(name) for name in named])
    np.testing.assert_array_equal(words, seen[first - 1]["case"].reshape(replicates, 32, 2)[bad])
    assert "train-0-3" in named
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints" / "pretrain")
    assert (kept[-1] if kept else 0) == first - 1
    assert (f"step {first - 1} is kept" if kept else "no step was saved yet") in last


@pytest.mark.long
def test_weights_that_are_not_finite_are_never_saved(go, tmp_path, monkeypatch):
    real = train.compiled_step

    def broken(*arguments):
        one = real(*arguments)

        def poisoned(*given):
            state, metrics = one(*given)
            late = jnp.where(state.step > 6, jnp.nan, 0.0)
            return state.replace(params=jax.tree.map(lambda x: x + late, state.params)), metrics

        return poisoned

    monkeypatch.setattr(train, "compiled_step", broken)
    code, said = go(tmp_path / "run", *ONE_STAGE, "checkpoint_every=7")
    assert code == 3 and "stage pretrain, step 7: weights not finite; no step was saved yet" in said
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints" / "pretrain")
    assert programs.finite({"a": jnp.ones(3), "b": jnp.arange(2), "c": jnp.zeros(0)})
    assert not programs.finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])})


# --- weights of another run, replicates ------------------------------------------------------------------------------


def last_weights(run: Path, stage: str) -> dict[str, np.ndarray]:
    """The parameters of a stage's last step, by name."""
    folder = run / "checkpoints" / stage
    step = checkpoint.steps(folder)[-1]
    leaves = json.loads((folder / str(step) / "step.json").read_text())["leaves"]
    empty = lambda dtype, shape: np.zeros(json.loads(f"[{shape}"), dtype)
    target = {name: empty(*text.split("[")) for name, text in leaves.items()}
    arrays = checkpoint.restore(folder, target, config=None)[1]
    return {name: array for name, array in arrays.items() if name.startswith("params/")}


@pytest.mark.long
def test_stage_0_is_taken_over_from_another_run(finished, go, unevaluated, tmp_path):
    run = tmp_path / "run"
    changes = (*ONE_STAGE, f"model.weights={finished}", "replicates=2")
    code, said = go(run, *changes)
    assert code == 0 and f"pretrain: taken over from {finished / 'checkpoints' / 'pretrain'}, step 20" in said
    assert not read_history(run / "metrics.jsonl")
    twice = last_weights(run, "pretrain")
    for name, value in last_weights(finished, "pretrain").items():
        np.testing.assert_array_equal(twice[name], np.stack([value, value]))
    again, said = go(run, *changes)
    assert again == 0 and "pretrain: done before, 20 steps" in said


def test_what_another_run_has_seen_counts_as_seen_by_the_one_that_takes_over_its_weights(
    small_set, go, tmp_path, monkeypatch
):
    other, run = tmp_path / "other", tmp_path / "run"
    c, _ = recipe.parse(["--config=configs/amae.py:smoke", f"--config.data.manifest={small_set}"], "")
    write_seen(other, [row for row in load_rows(c, str) if row.split != "test"])
    rows = list(csv.DictReader(small_set.read_text().splitlines()))
    by = {row["id"]: row for row in rows}
    by["test-0-1"]["image"], by["train-0-1"]["image"] = by["train-0-1"]["image"], by["test-0-1"]["image"]
    manifest = small_set.with_name("swapped.csv")  # its own splits are apart
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    changes = (*ONE_STAGE, f"data.manifest={manifest}", f"model.weights={other}")
    code, said = go(run, *changes)
    assert code == 2 and not (run / "seen.csv").exists() and not (run / "checkpoints").exists()
    where = f"{manifest} (model.weights={other})"
    assert f"{where}: the image of test-0-1 is that of train-0-1, train of the run" in said
    assert "--config.data.allow_leaks=True marks the report" in said.splitlines()[-1]

    found = []
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(train, "evaluate", lambda config, system, rows, *_, **__: found.extend(rows))
    assert go(run, *changes, "data.allow_leaks=true")[0] == 0
    assert [row.id for row in found if row.leak] == ["test-0-1"]
    known = {(row.id, row.split, row.content) for row in read_seen(run)}
    assert known > {(row.id, row.split, row.content) for row in read_seen(other)}
    assert len([name for name, *_ in known if name == "train-0-1"]) == 2  # its own, and the other run's

    c.model.weights = str(other)
    own = [row._replace(leak="") for row in found]
    with pytest.raises(InputError, match="test-0-1 is that of train-0-1"):  # also when it is evaluated again
        seen.check_unseen_by_source(c, own, run)
    c.model.weights = ""
    assert seen.check_unseen_by_source(c, own, run) == (own, "")


@pytest.fixture
def official(tmp_path) -> tuple[Path, tuple[str, ...], dict[str, np.ndarray]]:
    """A state dict in the official names without a word on sizes, 64 x 64 in patches of 16 and three channels; the
    recipe's sizes for it; its tensors."""
    with np.load(Path(__file__).parent / "golden" / "mae2d.npz") as gold:
        state = {name: gold[name] for name in gold.files if name.startswith("state/")}
        sizes = {k: int(gold[k]) for k in ("depth", "decoder_depth")}
        sizes |= {"heads": int(gold["num_heads"]), "decoder_heads": int(gold["decoder_num_heads"])}
    np.savez(tmp_path / "official.npz", **state)
    sizes |= {"width": 48, "decoder_width": 32, "weights": tmp_path / "official.npz"}
    return tmp_path / "official.npz", tuple(f"model.{k}={v}" for k, v in sizes.items()), state


@pytest.mark.long
def test_an_official_checkpoint_stands_for_stage_0_and_is_resized_where_asked(official, go, unevaluated, tmp_path):
    file, sizes, state = official
    same = (*ONE_STAGE, *sizes, "model.channels=3", "data.size=64,64", "model.patch=16,16")
    assert go(tmp_path / "same", *same)[0] == 0
    assert not read_history(tmp_path / "same" / "metrics.jsonl")
    weights = last_weights(tmp_path / "same", "pretrain")
    np.testing.assert_array_equal(weights["params/decoder_embed/kernel"], state["state/decoder_embed.weight"].T)
    assert "resized" not in (tmp_path / "same" / "weights.txt").read_text()
    other = (*same, "data.size=32,32", "model.patch=8,8", "model.channels=1")
    code, said = go(tmp_path / "other", *other)
    assert code == 2 and str(file) in said.splitlines()[-1]
    assert go(tmp_path / "adapted", *other, "model.weights_adapt=true")[0] == 0
    assert "resized" in (tmp_path / "adapted" / "weights.txt").read_text()
    adapted = last_weights(tmp_path / "adapted", "pretrain")
    assert adapted["params/patch_embed/kernel"].shape == (64, 48)
    np.testing.assert_array_equal(adapted["params/decoder_embed/kernel"], state["state/decoder_embed.weight"].T)


@pytest.mark.long
def test_the_blocks_of_a_2d_checkpoint_start_volumes_and_nothing_else_of_it_does(official, tmp_path):
    _, sizes, state = official
    given = [
        f"--config.{c}" for c in (*sizes, "model.decoder_heads=1", "train.lr=1e-30", "train.steps=1", "train.batch=2")
    ]
    volumes = [
        "--config=configs/maemi.py:smoke",
        *given,
        "--config.evaluation.maps=false",
        "--config.evaluation.draws=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_, **__: None)
        assert exit_code(train.main, [*volumes, f"--workdir={tmp_path / 'run'}"]) == 0
    weights = last_weights(tmp_path / "run", "train")
    for i, block in enumerate(weights["params/encoder/stack/fc1/kernel"]):
        np.testing.assert_array_equal(block, state[f"state/blocks.{i}.mlp.fc1.weight"].T)
    assert not np.allclose(weights["params/class_token"], state["state/cls_token"])


@pytest.mark.long
def test_weights_that_are_not_there_or_do_not_fit_are_one_line(finished, go, tmp_path):
    code, said = go(tmp_path / "a", f"model.weights={tmp_path / 'nothing'}")
    assert code == 2 and f"model.weights: {tmp_path / 'nothing'} not found" in said
    code, said = go(tmp_path / "a", f"model.weights={tmp_path}")
    assert code == 2 and f"model.weights: {tmp_path}/checkpoints/pretrain has no checkpoint" in said
    code, said = go(tmp_path / "b", f"model.weights={finished}", "pretrain.batch=16", "model.width=24")
    assert code == 2 and "has model.width=48, the recipe 24: make them equal" in said.splitlines()[-1]
    assert not checkpoint.steps(tmp_path / "b" / "checkpoints" / "pretrain")


@pytest.mark.long
def test_replicates_are_the_runs_of_their_seeds(finished, go, tmp_path):
    assert go(tmp_path / "both", *ONE_STAGE, "replicates=2")[0] == 0
    assert go(tmp_path / "second", *ONE_STAGE, "seed=1")[0] == 0
    both = last_weights(tmp_path / "both", "pretrain")
    for r, run in enumerate((finished, tmp_path / "second")):
        for name, value in last_weights(run, "pretrain").items():
            # Not to the last digit: Adam turns the rounding of a gradient near zero into a step of either sign.
            assert np.linalg.norm(both[name][r] - value) < 0.02 * np.linalg.norm(value) + 1e-3, name
    metrics = json.loads((tmp_path / "both" / "evaluation" / "metrics.json").read_text())
    summary = metrics["replicates"]["auroc"]
    assert len(summary["values"]) == 2 and summary["mean"] == np.mean(summary["values"])
    assert summary["half_width"] == pytest.approx(1.96 * np.std(summary["values"], ddof=1))
    assert metrics["image"]["auroc"] == pytest.approx(summary["mean"]) and metrics["image"]["n_normal"] == 6


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_one_program_for_all_its_batches(programs):
    assert programs == [[0, 1], [1, 1], [2, 1], [3, 2]]  # modules A and B share the last, with other earlier results


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_replicates_on_a_cpu_have_no_convolution_with_a_kernel_for_each(platform):
    layouts = ("NHWC", "HWIO", "NHWC")
    value = lambda w, x: jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layouts) ** 2)
    slope = lambda w, x, shared: {"slope": jax.grad(value)(w, x) * shared["factor"]}
    keys = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(keys[0], (3, 3, 3, 2, 4)), jax.random.normal(keys[1], (3, 5, 8, 8, 2))
    shared, axes = {"factor": jnp.float32(2)}, (0, 0, None)
    with tracing_for(Target(platform)):
        whole = jax.jit(programs.side_by_side(slope, 3, axes)).lower(w, x, shared)
    grouped = set(re.findall(r"(?:feature|batch)_group_count = (\d+)", whole.as_text())) - {"1"}
    assert bool(grouped) == (platform == "cuda")
    expected = jax.vmap(slope, axes)(w, x, shared)["slope"]
    np.testing.assert_allclose(whole.compile()(w, x, shared)["slope"], expected, rtol=1e-4, atol=1e-4)
    assert programs.side_by_side(slope, 1, axes) is slope


@pytest.mark.long
def test_compiled_programs_are_kept_where_jax_was_told_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    code = (
        "import jax; from jmae import processes; processes.keep_compiled(); print(jax.config.jax_compilation_cache_dir)"
    )
    told = lambda **more: subprocess.run(
        [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, check=True
    )
    folder = told(XDG_CACHE_HOME=str(tmp_path)).stdout.strip()
    assert Path(folder).is_dir() and Path(folder).parent == tmp_path / "jmae"
    assert told(JAX_COMPILATION_CACHE_DIR="/elsewhere").stdout.strip() == "/elsewhere"
    assert told(JAX_ENABLE_COMPILATION_CACHE="false").stdout.strip() == "None"
    nowhere = told(XDG_CACHE_HOME="/proc/nowhere")
    assert nowhere.stdout.strip() == "None" and nowhere.stderr == ""


# --- signs of life ----------------------------------------------------------------------------------------------------

LINES = [{"step": 1}, {"step": 10, "loss": 0.5, "lr": 0.1}, {"step": 20, "loss": 0.25, "accuracy": 0.75}]


def test_a_terminal_shows_a_bar_with_pace_loss_and_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "PACE_AFTER", 0)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with progress.progress("pretrain", 0, 40) as show:
        for line in LINES:
            time.sleep(0.12)  # the bar is drawn ten times a second
            show(line)
    shown = screen.getvalue()
    assert "pretrain" in shown and "20/40" in shown and "loss 0.2500" in shown and "accuracy 0.7500" in shown
    assert "steps/s" in shown and "s left" in shown and "lr" not in shown


def test_a_narrow_terminal_shows_step_and_time_and_no_cut_figure(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "PACE_AFTER", 0)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with progress.progress("train", 0, 3000) as show:
        for step in (1, 10, 20):
            time.sleep(0.12)
            show({"step": step, "loss": 0.5, "dice": 0.4399, "best_dice": 0.44, "target": 0.1})
    last = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", screen.getvalue()).strip().splitlines()[-1]
    assert re.match(r"train 20/3000  \d+ s left .* loss 0\.5000  [\d.]+ steps/s\s*$", last) and "…" not in last


def test_a_long_time_left_is_in_minutes_and_later_stages_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PACE_AFTER", 0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.progress("teacher", 0, 10**6, later=2) as show:
        for step in (1, 20):
            time.sleep(0.05)
            show({"step": step, "loss": 0.5})
    assert re.search(r" steps/s  \d+ min left, then 2 stages$", capsys.readouterr().err.strip())
    assert [progress.time_left(seconds) for seconds in (119, 120)] == ["119 s left", "2 min left"]


def test_elsewhere_plain_lines_come_now_and_then_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PACE_AFTER", 0.5)  # of the first steps no pace is told
    with progress.progress("pretrain", 0, 20) as show:
        for line in [*LINES[:2], {"step": 15, "loss": 9.0}, LINES[2]]:
            time.sleep(0.6 if line["step"] == 20 else 0.01)
            show(line)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "\x1b" not in "".join(said)
    assert said[0] == "pretrain 10/20  loss 0.5000"
    assert said[1].startswith("pretrain 20/20  loss 0.2500  accuracy 0.7500  ") and "steps/s  0 s left" in said[1]


def test_a_line_names_its_figures_in_the_words_of_its_stage_or_else_by_their_names():
    words = {"dice": "Dice of drawn anomalies", "best_dice": "best Dice so far", "share": "share of pixels"}
    line = {"step": 1, "best_dice": 0.25, "dice": 0.125, "loss": 0.5, "lr": 1}
    said = ["loss 0.5000", "Dice of drawn anomalies 0.1250", "best Dice so far 0.2500"]
    assert progress.metrics_texts(line, words) == said
    assert progress.metrics_texts(line, {}) == ["loss 0.5000", "dice 0.1250", "best_dice 0.2500"]
    assert progress.plain_name("share_1", words) == "share of pixels, channel 1"
    assert progress.plain_name("own_1", words) == "own_1"


def test_the_systems_say_what_their_figures_are():
    stages = lambda name: load_system(recipe.parse([f"--config={name}:smoke"], "")[0]).stages
    stage = lambda name: stages(name)[-1]
    assert stage("ppii").words.keys() == {"target", "dice", "dice_of_constant", "best_dice"}
    assert stage("maemi").words.keys() == {"explained_variance"}
    assert all(
        {"accuracy", "fake", "check_mse"} <= one.words.keys() for one in stages("simsid") if one.name != "calibration"
    )


def test_a_stage_says_that_it_starts_from_random_weights(monkeypatch, capsys):
    monkeypatch.setattr(train, "compiled_init", lambda *_: lambda *_: "state")
    monkeypatch.setattr(checkpoint, "restore", lambda *_, **__: None)
    stage = SimpleNamespace(name="pretrain", pretrained=Pretrained(use="start"))
    config = ConfigDict({"replicates": 1, "model": {"weights": ""}})
    further = dict.fromkeys(("keys", "results", "folder", "identity", "mesh"))
    course = SimpleNamespace(config=config, stage=stage, tables=[[0]], **further)
    assert train.begin_stage(course, first=False) == ("state", 0, {})
    assert capsys.readouterr().err == "pretrain: starts from random weights, as model.weights names no file\n"


def test_a_first_step_that_is_shown_again_has_no_pace(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PACE_AFTER", 0)
    with progress.progress("pretrain", 0, 1) as show:
        for line in ({"step": 1}, {"step": 1, "loss": 0.5}):  # as where a stage of one step is checked
            show(line)
    assert capsys.readouterr().err == "pretrain 1/1  loss 0.5000\n"


def test_a_long_step_says_every_ten_seconds_that_it_is_still_at_work(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SILENCE", 0.05)
    done = []
    with waiting.at_work(lambda: f"{len(done)} of 2 cases read"):
        while "1 of 2" not in (said := capsys.readouterr().err):
            done[:] = ["a"]
            time.sleep(0.02)
    assert re.fullmatch(r"1 of 2 cases read, \d+ s so far", said.splitlines()[-1])
    with progress.progress("pretrain", 0, 20) as show:
        while not (said := capsys.readouterr().err):
            time.sleep(0.02)
        show({"step": 1})
        time.sleep(0.1)
        capsys.readouterr()
        time.sleep(0.2)
    assert re.match(r"pretrain: compiling, \d+ s so far", said) and capsys.readouterr().err == ""


@pytest.mark.long
def test_tensorboard_files_hold_the_lines_of_metrics_jsonl(go, unevaluated, tmp_path, monkeypatch):
    def stop(call):
        if call == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        count_calls(patch, train, "place_batch", stop)
        assert go(tmp_path / "run", *ONE_STAGE, "loggers=tensorboard")[0] == 143
    assert go(tmp_path / "run", *ONE_STAGE, "loggers=tensorboard")[0] == 0
    got = {}
    for file in sorted((tmp_path / "run" / "tensorboard" / "pretrain").iterdir()):
        for event in events_of(file):
            got |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    history = read_history(tmp_path / "run" / "metrics.jsonl")
    expected = {
        (h["step"], k): np.float32(v) for h in history for k, v in h.items() if k not in ("stage", "step", "time")
    }
    assert len(history) == 7 and got == expected
