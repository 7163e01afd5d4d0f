"""A system outside of the library: every file and every command of the tutorial, on few phantoms and few steps."""

import csv
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jmae import evaluate, export, recipe, train
from jmae.data.preparation import prepared_image, prepared_volume
from jmae.errors import exit_code
from jmae.inputs import row_of

PAGE = (Path(__file__).parents[1] / "docs" / "tutorials" / "sixth_system.md").read_text(encoding="utf-8")
FILES = {name: text for name, text in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.S)}
COMMANDS = [line.split() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
KINDS = {  # of a run: phantoms, size of an image or a window, phantom to predict, what the run needs to be small
    "denoising": ("chest", "32,32", "chest/test/150", ()),
    "volumes": ("breast", "32,24,8", "breast/test/20", ("data.least_region=0", "evaluation.stride=32,24,8")),
}
SMALL = "train.steps=8 train.batch=4 unet.widths=4,4 checkpoint_every=100 log_every=3 evaluation.draws=50".split()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The current folder, outside of the library, with the files of the page."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "denoising", raising=False)
    yield tmp_path
    sys.modules.pop("denoising", None)


def few_phantoms(file: Path, name: str, counts: dict[str, tuple[int, ...]]) -> None:
    """A manifest of the phantoms `counts` {split: numbers}; in `test` and `val` the second half is abnormal."""
    lines = ["id,patient,split,label,image,mask,region"]
    for split, numbers in counts.items():
        for i, number in enumerate(numbers):
            image, label = f"phantom:{name}/{split}/{number}", int(split != "train" and 2 * i >= len(numbers))
            lines.append(f"{split}{number},,{split},{label},{image},{image if label else ''},{image}")
    file.write_text("\n".join(lines))


def run(words: list[str], *more: str) -> int:
    """The exit code of a command of the page, in this process."""
    python, dash, module, *arguments = words
    assert (python, dash) == ("python", "-m")
    main = importlib.import_module({"jmae.report": "jmae.report.__main__"}.get(module, module)).main
    return exit_code(main, [*arguments, *more])


def stop_at_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Sends SIGTERM when training takes its batch of that number."""
    calls, real = [], train.place_batch

    def place(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(train, "place_batch", place)


def test_the_files_are_as_short_as_promised():
    assert set(FILES) == {"denoising.py", "denoising_recipe.py", "images.csv", "volumes.csv"}
    assert len(FILES["denoising.py"].splitlines()) <= 80 and len(FILES["denoising_recipe.py"].splitlines()) <= 10
    assert max(map(len, "".join(FILES.values()).splitlines())) <= 120


@pytest.mark.parametrize("kind", ["denoising", pytest.param("volumes", marks=pytest.mark.long)])
@pytest.mark.long
def test_the_page_runs_from_training_to_report(kind, folder, tools, monkeypatch):
    phantoms, size, new, more = KINDS[kind]
    number = int(new.split("/")[-1])
    counts = {"train": range(6), "test": (0, 1, number - 1, number)}
    counts |= {"val": (0, 1, 40, 41)} if phantoms == "chest" else {}
    few_phantoms(folder / "few.csv", phantoms, counts)
    changes = [f"--config.{c}" for c in (*SMALL, *more, f"data.size={size}", "data.manifest=few.csv")]
    first, *others = [words for words in COMMANDS if f"runs/{kind}" in words]
    assert first[2] == "jmae.train" and [words[2] for words in others] == [
        f"jmae.{name}" for name in ("evaluate", "predict", "export", "report")
    ]

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_, **__: {})
        assert run([*first, "--workdir", "unbroken"], *changes) == 0
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 3)
        assert run(first, *changes) == 143
    workdir = folder / "runs" / kind
    assert tools.last_states(workdir)["train"][0] == 3
    assert run(first, *changes) == 0
    assert tools.last_states(workdir) == tools.last_states(folder / "unbroken")
    assert tools.last_states(workdir)["train"][0] == 8

    for words in others:
        assert run(words) == 0, words
    metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    assert metrics["system"] == "denoising" and metrics["primary"] == "residual" and metrics["pixel"]
    for page in (workdir / "evaluation" / "report.html", workdir / "MODEL_CARD.md"):
        assert "a U-Net learns to take coarse noise off normal images" in page.read_text()
    words = "<b>residual</b> (the primary score): squared difference between the image and the restored image"
    assert words in (workdir / "evaluation" / "report.html").read_text()
    assert "residual" in (folder / f"{kind}.html").read_text()
    check_outputs(kind, new, workdir, folder)


def check_outputs(kind: str, new: str, workdir: Path, folder: Path) -> None:
    """Evaluation, prediction and export agree on one case, and the residual is what the page says."""
    lines_of = lambda file: {line["id"]: line for line in csv.DictReader(file.read_text().splitlines())}
    score_of = lambda file, case: float(lines_of(file)[case]["score"])
    predicted, exported = (folder / f"{name}{'-volumes' * (kind == 'volumes')}" for name in ("predicted", "exported"))
    evaluated = score_of(workdir / "evaluation" / "scores.csv", f"test{new.split('/')[-1]}")
    config, (call, about) = recipe.read(workdir), export.load(exported)
    row, words = row_of("new", (f"phantom:{new}",)), export.case_words("new")
    assert about["primary"] == "residual"
    if kind == "volumes":
        volume = prepared_volume(row, config.data)
        found = call(volume.array, words)
        saved = np.asarray(nib.load(predicted / "new_anomaly.nii.gz").dataobj)
        np.testing.assert_allclose(found["maps/residual"], saved, atol=1e-5)
        return
    assert score_of(predicted / "scores.csv", "new") == evaluated
    image = prepared_image(row, config.data)
    found = call(image[None], words[None])
    residual = np.mean((image - found["reconstruction"][0]) ** 2, -1)
    np.testing.assert_allclose(found["maps/residual"][0], residual, atol=1e-6)
    np.testing.assert_allclose([found["scores/residual"][0], residual.mean()], evaluated, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("train.nose=1", "--config.train.nose is unknown: did you mean --config.train.noise?"),
        ("train.noise=0", "train.noise is 0.0: above 0"),
        ("train.batch=0.5", "--config.train.batch: '0.5' is not a whole number"),
        ("data.size=30,30", "size (30, 30) does not halve 2 times for 3 levels"),
    ],
)
def test_the_keys_of_the_system_are_checked_like_all_others(change, line, folder, capsys):
    command = ["python", "-m", "jmae.train", "--config=denoising_recipe.py", f"--config.{change}"]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
    assert not list(folder.glob("runs/*/*.json"))


def test_a_recipe_with_a_key_that_is_not_declared_fails(folder, capsys):
    text = FILES["denoising_recipe.py"].replace('"data.phantom": "chest"', '"train.nose": 1')
    (folder / "other.py").write_text(text)
    assert run(["python", "-m", "jmae.train", "--config=other.py"]) == 2
    assert "train.nose is no key of denoising: train.noise?" in capsys.readouterr().err


def test_a_module_that_is_no_system_is_refused_in_one_line(folder, capsys, monkeypatch):
    (folder / "lacking.py").write_text("import a_package_that_is_not_there")
    (folder / "config.json").write_text(recipe.to_json(recipe.load("denoising_recipe.py")))
    for system, line in (
        ("nothing.here", f"system 'nothing.here' is unknown: one of {', '.join(recipe.SYSTEMS)}, or a module"),
        ("../denoising", "system '../denoising' is unknown"),
        ("lacking", "system 'lacking' imports a_package_that_is_not_there: install that"),
        ("json", "system 'json': json has no KEYS: see the contract in jmae.system"),
    ):
        config = json.loads((folder / "config.json").read_text()) | {"system": system}
        (folder / "config.json").write_text(json.dumps(config))
        assert exit_code(evaluate.main, [f"--workdir={folder}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(line) and said.count("\n") == 1
