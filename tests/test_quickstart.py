"""From two folders to a report: what is chosen, what is run, and one run of all of it."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import draw
from PIL import Image

from jmae import quickstart, recipe
from jmae.calibration import tell_p_values
from jmae.checkpoint import refuse_difference
from jmae.data import prepare
from jmae.data.cases import load_cases
from jmae.data.manifest import Finding, Row
from jmae.data.names import names_of
from jmae.data.preparation import soft_masks
from jmae.data.prepare import folders
from jmae.data.prepare.overview import calibration_share, p_value_line
from jmae.data.rows import kept_apart
from jmae.errors import InputError, exit_code
from jmae.inputs import cases_of
from jmae.sealed import seal
from jmae.system import load_system
from jmae.tables import counted


def pictures(folder: Path, n: int, seed: int) -> Path:
    """A folder of n images of 40 x 36 pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(draw(rng, (40, 36), False)[0]).save(folder / f"{i}.png")
    return folder


def volumes(folder: Path, n: int, seed: int) -> Path:
    """A folder of n volumes."""
    folder.mkdir(parents=True)
    for i in range(n):
        noise = np.random.default_rng([seed, i]).integers(0, 255, (12, 10, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / f"{i}.nii.gz")
    return folder


def started(monkeypatch, *words: str | Path) -> tuple[int, list[list[str]]]:
    """(Exit code, the commands that would run) of `quickstart`."""
    ran: list[list[str]] = []
    stand_in = {name: lambda argv, name=name: ran.append([name, *argv]) or 0 for name in quickstart.RUN}
    monkeypatch.setattr(quickstart, "RUN", stand_in)
    return exit_code(quickstart.main, [*map(str, words)]), ran


@pytest.mark.parametrize(
    ("make", "recipe", "more"),
    [(pictures, "ppii:small", []), (volumes, "maemi:small", ["--config.data.channels=1"])],
)
def test_the_kind_of_scan_chooses_the_recipe(make, recipe, more, tmp_path, monkeypatch, capsys):
    normals, new, out = make(tmp_path / "my normals", 40, 1), make(tmp_path / "new", 2, 2), tmp_path / "out"
    code, ran = started(monkeypatch, normals, new, f"--out={out}", "--budget", "0.5", "--config.seed=3")
    manifest, run = f"{out}/data/manifest.csv", f"{out}/run"
    settings = [f"data.manifest={manifest}", "data.calibration=0.5", "budget=0.5"]
    train = [f"--config={recipe}", *(f"--config.{one}" for one in settings), *more, "--config.seed=3"]
    expected = [
        ["prepare", "folders", "--normal", str(normals), "--test", str(new), "--out", f"{out}/data"],
        ["train", *train, "--workdir", run],
        ["evaluate", "--workdir", run],
    ]
    assert code == 0 and ran == expected
    said = capsys.readouterr().err
    assert said.splitlines()[-1].endswith(f"--config.seed=3 --budget 1 --out {out}-longer")
    assert f"42 {'images' if make is pictures else 'volumes'}: {recipe} (" in said
    assert [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  jmae ")] == expected
    minutes = 10 if make is pictures else 15  # 15 of training times 0.5, then 2 or 5, and the scans
    assert f"time: up to about {minutes} minutes on two CPU cores; longer if other programs use them\n" in said


def test_a_new_scan_that_cannot_be_read_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    normals, new, out = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 3, 2), tmp_path / "out"
    (new / "none.png").touch()
    done = dict.fromkeys(quickstart.RUN, lambda argv: 0) | {"prepare": quickstart.prepare_data}
    monkeypatch.setattr(quickstart, "RUN", done)
    assert exit_code(quickstart.main, [str(normals), str(new), f"--out={out}"]) == 0
    caution = f"caution: 1 new scan cannot be read, and training and evaluation leave it out: {new / 'none.png'}\n"
    assert caution in capsys.readouterr().out
    for file in new.iterdir():
        file.write_bytes(b"")
    assert exit_code(quickstart.main, [str(normals), str(new), f"--out={tmp_path / 'other'}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4 and not (tmp_path / "other" / "data").exists()


def normals(patients: int, scans: int = 1) -> list[Row]:
    """The rows of some normal patients with as many scans each."""
    numbers = [(i, k) for i in range(patients) for k in range(scans)]
    return [Row(f"{i}-{k}", f"p{i}", "train", 0, (f"{i}-{k}",)) for i, k in numbers]


def test_a_twentieth_needs_nineteen_normals_where_there_are_enough():
    shares = {n: calibration_share(normals(n)) for n in (9, 10, 36, 38, 45, 50, 60, 66, 80, 100, 130, 1000)}
    third = {9: 0.0, 10: 0.35, 36: 0.35, 60: 0.35}
    assert shares == {**third, 38: 0.5, 45: 0.5, 50: 0.4, 66: 0.3, 80: 0.25, 100: 0.2, 130: 0.15, 1000: 0.1}
    for n in range(38, 300):  # tidy shares hold out a few more than needed
        held = sum(row.kept for row in kept_apart(normals(n), calibration_share(normals(n))))
        assert 19 <= held <= max(30, n / 10 + 1), n
    assert calibration_share(normals(20, 3)) == 0.35 and calibration_share(normals(60, 3)) == 0.35
    assert calibration_share(normals(14, 3)) == 0.5  # a third of them are 5 patients with 15 scans
    sick = [Row(f"s{i}", f"s{i}", "train", 1, (f"s{i}",)) for i in range(100)]
    assert calibration_share([*normals(40), *sick]) == 0.5  # only normals are held out


def test_which_p_value_is_the_smallest_is_said_before_the_training():
    few = "p-values: 11 normal scans kept from the training cannot give a p-value of 0.05 (smallest possible "
    few += "p-value 0.083): give 38 normal scans or more, and keep half of them from the training "
    few += "(data.calibration=0.5)"
    assert p_value_line(normals(30), 0.35) == few
    enough = "keeps from the training (at least 19 are needed for a p-value of 0.05)"
    assert p_value_line(normals(40), 0.5) == f"p-values: from 20 normals that data.calibration {enough}"
    assert p_value_line(normals(9), 0).startswith("p-values: no normal scan is kept from the training")
    val = [row._replace(split="val") for row in normals(19)]
    assert p_value_line([*normals(9), *val], 0) == "p-values: from 19 normals of val"
    assert p_value_line([*normals(9), *val[:11]], 0) == few


@pytest.mark.parametrize("kind", ["images", "unlabelled images", "volumes"])
def test_the_training_counts_the_normals_that_prepare_promises(kind, capfd):
    config = recipe.parse([f"--config={recipe.suggested(kind)[0]}:small"], "", [])[0]
    unlabeled = [Row("u", "u", "unlabeled", None, ("u",))]
    for n in (9, 22, 40):
        rows = normals(n)
        share = config.data.calibration = calibration_share(rows)
        tell_p_values(config, load_system(config), (kept_apart(rows, share) if share else rows) + unlabeled)
        promised, said = p_value_line(rows, share).removeprefix("p-values: "), capfd.readouterr().err
        assert said == f"warning: {promised}\n" if n < 38 else said == ""


def test_too_few_scans_to_learn_from_are_said_at_once_and_the_p_values_by_the_training_alone(
    tmp_path, monkeypatch, capsys
):
    scans, new = pictures(tmp_path / "normals", 14, 1), pictures(tmp_path / "new", 1, 2)
    started(monkeypatch, scans, new, f"--out={tmp_path / 'out'}")
    said = capsys.readouterr().err
    assert "warning: only 14 normal scans to learn from: " in said and "kept from the training" not in said


@pytest.mark.long
def test_two_folders_become_a_report(tmp_path, capsys, monkeypatch):
    normals, new, out = pictures(tmp_path / "normals", 20, 1), pictures(tmp_path / "new", 3, 2), tmp_path / "out"
    small = ["data.allow_leaks=True", "train.validation_samples=8", "train.steps=10", "checkpoint_every=10"]
    words = [str(normals), str(new), f"--out={out}", "--config=ppii:smoke", *(f"--config.{one}" for one in small)]
    assert exit_code(quickstart.main, [*words, "--budget=1"]) == 0
    said = capsys.readouterr().err
    assert "train: 11 images (2 more only check the training), steps 0 to" in said
    warned = "warning: 7 normal scans kept from the training cannot give a p-value of 0.05 (smallest possible p-value"
    assert said.count(warned) == said.count("normal scans or more") == said.count("data.calibration=0.5") == 1
    assert "calibrated on 7 held-out normals (smallest possible p-value 0.12): " in said
    page = (out / "run" / "evaluation" / "report.html").read_text()
    assert page.count("normal scans or more") == 1 and "to learn from" not in page
    found = json.loads((out / "run" / "evaluation" / "metrics.json").read_text())
    assert found["training_normals"] == 20  # 7 of them are kept apart
    assert (out / "run" / "evaluation" / "report.html").exists() and said.splitlines()[-1].startswith("next: open it")
    with (out / "run" / "evaluation" / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert {line["p_value"] for line in lines} <= {str(k / 8) for k in range(1, 9)}  # 7 of 20 normals are kept apart
    assert len([*(out / "run" / "evaluation" / "maps").glob("*_anomaly.tif")]) == 3
    pictures(tmp_path / "other", 3, 3)
    assert exit_code(quickstart.main, [str(normals), str(tmp_path / "other"), f"--out={out}"]) == 2
    assert f"{out}/data/manifest.csv: lists other scans than" in capsys.readouterr().err
    code, ran = started(monkeypatch, *words)
    assert code == 0 and [command[0] for command in ran] == ["train", "evaluate"]


def test_a_volume_among_images_and_a_damaged_file_are_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    normals, new = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 2, 2)
    odd = volumes(tmp_path / "other", 1, 3) / "0.nii.gz"
    odd.rename(normals / "a.nii.gz")
    code, ran = started(monkeypatch, normals, new, f"--out={tmp_path / 'out'}")
    line = "is a volume, where 14 of 15 scans are images: move it to a folder of its own kind"
    assert code == 2 and not ran and capsys.readouterr().err == f"{normals / 'a.nii.gz'}: {line}\n"
    words = ["folders", f"--normal={normals}", f"--test={new}", f"--out={tmp_path / 'data'}"]
    assert exit_code(prepare.main, words) == 2 and not (tmp_path / "data" / "manifest.csv").exists()
    assert capsys.readouterr().err == f"{normals / 'a.nii.gz'}: {line}\n"
    volumes(normals / "more", 2, 4)
    assert exit_code(prepare.main, words) == 2
    line = "is a volume, where 14 of 17 scans are images: move it to a folder of its own kind (and 2 more like it)"
    assert capsys.readouterr().err == f"{normals / 'a.nii.gz'}: {line}\n"
    shutil.rmtree(normals / "more"), (normals / "a.nii.gz").unlink()
    assert exit_code(prepare.main, [*words[:2], f"--test={normals}", words[3]]) == 2
    what = f"image '{normals}/0.png' is in train and test: keep it in one split (and 11 more like it)"
    assert capsys.readouterr().err == f"{what}\n"
    (normals / "z.png").write_bytes(b"")
    code, ran = started(monkeypatch, normals, new, f"--out={tmp_path / 'out'}")
    assert code == 2 and not ran and capsys.readouterr().err.startswith(f"{normals / 'z.png'}: is empty")


def test_the_report_and_the_predictions_have_the_same_ids(tmp_path):
    normals, new = pictures(tmp_path / "normals", 2, 1), tmp_path / "new"
    pictures(new / "a", 2, 2), pictures(new / "b", 1, 3)
    rows = folders.prepare(None, tmp_path, normal=str(normals), test=str(new), seed=0).rows
    ids = [row.id for row in rows if row.split == "test"]
    assert ids == names_of(cases_of(str(new), [], volumes=False)) == ["a_0", "1", "b_0"]
    Image.open(new / "b" / "0.png").save(new / "Train_1.png")  # the id of a training case, but for its letters
    rows = folders.prepare(None, tmp_path, normal=str(normals), test=str(new), seed=0).rows
    assert [row.id for row in rows][2:] == ["test_Train_1", "test_a_0", "test_a_1", "test_b_0"]


def test_a_manifest_of_other_scans_is_written_anew_until_something_is_trained(tmp_path, monkeypatch, capsys):
    normals, new, out = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 3, 2), tmp_path / "my out"
    words, made = [str(normals), str(new), f"--out={out}"], out / "data" / "manifest.csv"
    done = dict.fromkeys(quickstart.RUN, lambda argv: 0) | {"prepare": quickstart.prepare_data}
    monkeypatch.setattr(quickstart, "RUN", done)
    assert exit_code(quickstart.main, words) == 0 and "2.png" in made.read_text()
    (new / "2.png").unlink()
    assert exit_code(quickstart.main, words) == 0 and f"{new}/2.png" not in made.read_text()
    (out / "run" / "checkpoints" / "train" / "10").mkdir(parents=True)
    pictures(tmp_path / "one", 1, 3).joinpath("0.png").rename(new / "3.png")
    capsys.readouterr()
    assert exit_code(quickstart.main, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    what = f"{made}: lists other scans than {normals} and {new} hold: name another --out, or score further scans"
    assert line == f"{what}: jmae predict --workdir '{out}/run' --out DIR SCAN"


def test_the_report_is_named_unless_the_training_stopped(tmp_path, monkeypatch, capsys):
    normals, new, out = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 2, 2), tmp_path / "out"
    done = dict.fromkeys(quickstart.RUN, lambda argv: 0)
    monkeypatch.setattr(quickstart, "RUN", done)
    assert exit_code(quickstart.main, [str(normals), str(new), f"--out={out}"]) == 0
    *_, report, longer = capsys.readouterr().err.splitlines()
    assert report.startswith(f"{out}/run/evaluation/report.html: ") and longer.startswith("next: open it; a longer")
    (out / "run" / "evaluation").mkdir(parents=True), (out / "run" / "evaluation" / "report.html").touch()
    assert exit_code(quickstart.main, [str(normals), str(new), f"--out={out}"]) == 0
    finished = f"{out}/run: has a report: a finished training is not repeated, and the new scans are scored again"
    said = capsys.readouterr().err
    assert said.index(finished) < said.index("this stands for") and "time: " not in said
    (out / "run" / "evaluation" / "report.html").unlink()
    monkeypatch.setattr(quickstart, "RUN", done | {"train": lambda argv: 130})
    assert exit_code(quickstart.main, [str(normals), str(new), f"--out={out}"]) == 130
    assert "report.html" not in capsys.readouterr().err


def test_the_file_to_move_is_named_where_a_scan_lies_in_both_folders(tmp_path, monkeypatch, capsys):
    """A row that a user deletes from the manifest would come back from the folders."""
    normals, new, out = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 2, 2), tmp_path / "out"
    copy = Path(shutil.copy(normals / "3.png", new / "copy.png"))

    def read(argv: list[str]) -> int:
        load_cases(recipe.parse(argv, "", ["workdir"])[0], print)
        return 0

    steps = {"prepare": quickstart.prepare_data, "train": read, "evaluate": lambda argv: 0}
    monkeypatch.setattr(quickstart, "RUN", steps)
    words = [str(normals), str(new), f"--out={out}"]
    assert exit_code(quickstart.main, words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"train_3 in train ({normals / '3.png'}) and copy in test ({copy}) are identical: ")
    assert f": move {copy} to another folder, then give the same command again, or add --config.data.allow" in line
    (normals / "0.png").write_bytes((normals / "1.png").read_bytes()[:300])
    assert exit_code(quickstart.main, words) == 2
    damaged, moved = capsys.readouterr().err.splitlines()[-2:]
    assert damaged.startswith(f"train_0: {normals / '0.png'}: ") and f": move {copy} to another" in moved
    shutil.copy(normals / "2.png", normals / "0.png")
    copy.unlink()
    assert exit_code(quickstart.main, words) == 0


def test_all_new_scans_of_a_training_patient_are_named():
    rows = [Row(f"{i}", "p", "test" if i else "train", None, (f"{i}.png",)) for i in range(9)]
    line = quickstart.move_out(Finding("patient", tuple(rows[:3]), "patient 'p' is in train and test: keep it"))
    assert line.startswith("patient 'p' is in train and test: move 1.png, 2.png to another folder, then give the same")
    line = quickstart.move_out(Finding("patient", tuple(rows), "patient 'p' is in train and test: keep it"))
    assert ": move 1.png, 2.png, 3.png, 4.png, 5.png and 3 more to another folder, " in line


def test_another_budget_than_that_of_the_run_is_refused_at_once(tmp_path, monkeypatch, capsys):
    normals, new, out = pictures(tmp_path / "normals", 12, 1), pictures(tmp_path / "new", 2, 2), tmp_path / "out"
    words = [normals, new, f"--out={out}"]
    trained = next(argv for name, *argv in started(monkeypatch, *words)[1] if name == "train")
    config = recipe.parse(trained, "", ["workdir"])[0]
    assert config.budget == 0.25
    (out / "run").mkdir(parents=True)
    (out / "run" / "config.json").write_text(seal(json.loads(recipe.to_json(config))))
    assert started(monkeypatch, *words)[0] == 0
    for other in ("--config=ppii:smoke", "--config=simsid:small", "--config.seed=5"):
        capsys.readouterr()
        assert started(monkeypatch, *words, other) == (2, [])
        assert "run: began with other settings (system ppii): " in capsys.readouterr().err
    assert started(monkeypatch, *words, "--config.evaluation.pictures=3")[0] == 0
    capsys.readouterr()
    assert started(monkeypatch, *words, "--budget=0.5") == (2, [])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{out}/run: began with --budget=0.25: give this budget, or name another --out"
    )


def test_a_count_of_one_has_no_plural():
    assert [counted(n, "held-out normals") for n in (0, 1, 2)] == [
        *("0 held-out normals", "1 held-out normal", "2 held-out normals")
    ]
    assert counted(1, "masks of normal images") == "1 mask of normal images"
    assert counted(1, "further series of patients") == "1 further series of patients"
    assert counted(1, "cells") == "1 cell" and soft_masks(1, 0.5).startswith("masks of probabilities in 1 case: ")


def test_prepare_proposes_no_command_within_quickstart(tmp_path, capsys):
    words = ["folders", "--normal", str(pictures(tmp_path / "normals", 1, 1)), "--out", str(tmp_path / "data")]
    assert quickstart.prepare_data(words) == 0
    said = capsys.readouterr().out
    assert "train 1 normal" in said and "1 case;" in said and not {"next:", "p-values:", "recipe:"} & {*said.split()}
    assert "jmae" not in said.replace(str(tmp_path), "") and "only 1 normal scan" not in said


def test_the_remedy_for_another_recipe_names_the_flag_of_quickstart():
    with pytest.raises(InputError, match=r"remedy: another --workdir \(of quickstart another --out\) or the same"):
        refuse_difference(Path("10"), {"a": "1"}, {"a": "2"})


def test_what_is_missing_is_one_line(tmp_path, capsys):
    assert exit_code(quickstart.main, [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("name a folder of normal scans and one of new scans")
    assert exit_code(quickstart.main, [str(tmp_path), str(tmp_path), "--bugdet=1"]) == 2
    assert "did you mean --budget?" in capsys.readouterr().err
    for budget, line in (
        ("zero", "--budget: 'zero' is not a finite number"),
        ("-1", "--budget=-1 is not above 0: write 0.25"),
    ):
        assert exit_code(quickstart.main, [str(tmp_path), str(tmp_path), f"--budget={budget}"]) == 2
        assert capsys.readouterr().err.startswith(line)
