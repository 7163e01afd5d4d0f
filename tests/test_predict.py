"""Predicting new cases: what is written, that it is what `evaluate` writes, and what happens to files that are not
what they claim. Most use systems of a few lines instead of trained ones: the command knows only their functions."""

import csv
import gzip
import json
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import patients
import pytest
from PIL import Image
from rich.cells import cell_len
from test_files import dicom
from test_series import series

import jmae
from jmae import evaluate, fusion, inputs, passes, predict, recipe
from jmae.console import highest
from jmae.data import names
from jmae.data.cases import load_rows
from jmae.data.files import read_image
from jmae.data.transforms import resize, to_unit
from jmae.errors import InputError, exit_code
from jmae.likeness import remedy, traits_of, write_kind
from jmae.masking import case_keys
from jmae.report import Scale
from jmae.run_folder import log, write_csv
from jmae.seen import read_seen, write_seen
from jmae.system import Sweep, System

MASKS, SIZE, WINDOW = 4, (16, 12), (8, 8, 4)


def bright(results, batch, key, *, chunk=None):
    """Brightness with noise of the case's key, `chunk` masks at a time."""
    image, keys = batch["image"], case_keys(key, batch["case"])
    noise = lambda k, j: jax.random.uniform(jax.random.fold_in(k, j), image.shape[1:-1])
    each = jax.lax.map(lambda j: jax.vmap(noise, (0, None))(keys, j), jnp.arange(MASKS), batch_size=chunk)
    maps = image.mean(-1) + 0.1 * each.mean(0)
    scores = {"bright": maps.mean((1, 2)), "peak": image.max((1, 2, 3))}
    return {"maps": {"bright": maps}, "scores": scores, "confidence": each.std(0)}


def window_bright(results, image, keys, groups):
    noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:-1]))(keys)
    return jnp.concatenate([image, noise[..., None]], -1), jnp.ones((*image.shape[:-1], 1))


def fuse(results, averages, inside):
    maps = averages[..., :2].mean(-1) + 0.1 * averages[..., 2]
    return {"maps": {"bright": jnp.where(inside, maps, 0)}, "reconstruction": averages[..., :2]}


IMAGES = System(name="toy", stages=(), score=bright, uses=(), primary="bright", masks=MASKS)
SWEEP = Sweep(window=WINDOW, stride=(4, 4, 2), repeats=2, score=window_bright, fuse=fuse)
VOLUMES = System(name="toy", stages=(), uses=(), primary="bright", sweep=SWEEP)


def write_run(folder: Path, system: System, monkeypatch, **changes) -> Path:
    """A run folder whose system is `system`, without weights."""
    argv = ["--config=configs/amae.py:smoke"] if system.score else patients.arguments(Path("none"), folder)
    config, _ = recipe.parse([word for word in argv if not word.startswith("--workdir")], "")
    if system.score:
        config.data.size, config.evaluation.batch = SIZE, 3
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(recipe.to_json(config))
    for module in (predict, evaluate):
        monkeypatch.setattr(module, "load_system", lambda config: system)
    return folder


@pytest.fixture
def images_run(tmp_path, monkeypatch):
    return write_run(tmp_path / "run", IMAGES, monkeypatch)


@pytest.fixture
def volumes_run(tmp_path, monkeypatch):
    return write_run(tmp_path / "run", VOLUMES, monkeypatch)


def run(workdir: Path, out: Path, *words) -> int:
    return exit_code(predict.main, [f"--workdir={workdir}", f"--out={out}", *map(str, words)])


def table(file: Path) -> dict[str, dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as lines:
        return {line["id"]: line for line in csv.DictReader(lines)}


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(array).save(path, "PNG")
    return path


def volume(path: Path, seed: int = 0, size=(11, 9, 7), affine=patients.AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).normal(100, 20, size).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def left(out: Path) -> set[str]:
    """All files of a folder of predictions but its record of what is done."""
    return set(os.listdir(out)) - {predict.DONE} if out.exists() else set()


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_predict_repeats_evaluate(finished, small_set, tmp_path, capfd):
    """To the bit, in the same batches, in others and alone."""
    before = finished / "evaluation"
    seen = [(row.split, bool(row.content)) for row in read_seen(finished)]
    assert sorted(set(seen)) == [("train", True), ("unlabeled", True), ("val", True)] and len(seen) == 16 + 16 + 3
    evaluated = table(before / "scores.csv")
    file = {name: next(f for f in small_set.parent.glob(f"{name}.*")) for name in evaluated}
    assert run(finished, tmp_path / "all", *file.values()) == 0
    assert "no masks: 3 held-out normals, 19 are needed" in capfd.readouterr().err
    predicted = table(tmp_path / "all" / "scores.csv")
    assert predicted == {name: line | {"label": ""} for name, line in evaluated.items()}
    assert list(predicted) == list(evaluated) and all(0 < float(line["p_value"]) <= 1 for line in predicted.values())
    for written in (before / "maps").iterdir():
        assert written.read_bytes() == (tmp_path / "all" / written.name).read_bytes()

    some = sorted(evaluated)[::-1][:7]
    assert run(finished, tmp_path / "some", *(file[name] for name in some)) == 0
    assert list(table(tmp_path / "some" / "scores.csv").items()) == [(name, predicted[name]) for name in some]
    one = jmae.load(finished)(file[some[0]])
    line = predicted[some[0]]
    assert (one.score, one.p_value) == (float(line["score"]), float(line["p_value"]))
    np.testing.assert_array_equal(one.map, read_image(tmp_path / "all" / f"{some[0]}_anomaly.tif").array[..., 0])
    assert one.map.dtype == np.float32 and one.confidence is None


def test_a_case_unlike_the_training_has_a_warning_and_no_calm_p_value(finished, small_set, tmp_path, capfd):
    file = next(small_set.parent.glob("test-0-0.*"))
    usual = read_image(file).array[..., 0].astype(np.uint8)
    cases = {
        "usual": usual,
        "thumbnail": usual[::5, ::5],
        "noise": np.random.default_rng(0).integers(0, 256, usual.shape, np.uint8),
    }
    for name, array in cases.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    assert run(finished, tmp_path / "out", *(tmp_path / f"{name}.png" for name in cases)) == 0
    lines = table(tmp_path / "out" / "scores.csv")
    warned = {name: line["warning"].split(" (")[0] for name, line in lines.items()}
    faster = "grey values change faster from pixel to pixel"
    assert warned == {"usual": "", "thumbnail": "fewer pixels along the shortest side", "noise": faster}
    assert lines["usual"]["p_value"]
    for name in list(cases)[1:]:
        assert not lines[name]["p_value"] or float(lines[name]["p_value"]) <= 0.05
    one = jmae.load(finished)(tmp_path / "thumbnail.png")
    assert one.warning == lines["thumbnail"]["warning"] and "(smallest axis 8, expected " in one.warning
    said = capfd.readouterr().err
    assert "thumbnail: warning: unlike the images" in said
    asked = "2 of 3 cases are unlike the images that the run was trained on: is it the right run for them?\ncase "
    assert asked in said and "put some of them" not in said
    shown = {words[0]: words[1:] for line in said.splitlines() if (words := line.split()) and words[0] in cases}
    assert list(shown) == sorted(cases, key=lambda name: -float(lines[name]["score"]))
    for name, (score, p, *mark) in shown.items():
        line, alarm = lines[name], float(lines[name]["p_value"] or 1) <= 0.05
        assert (
            score == f"{float(line['score']):.4g}"
            and p == (f"{float(line['p_value'] or 2):.3g}", "none")[not line["p_value"]]
        )
        assert " ".join(mark) == ", ".join(["alarm"] * alarm + ["unlike"] * bool(line["warning"]))

    # `jmae evaluate` gives the same, and counts a p-value that is left out as no alarm.
    rows = [{"id": name, "image": f"{name}.png", "split": "test", "label": int(name == "noise")} for name in cases]
    write_csv(tmp_path / "cases.csv", rows)
    out = tmp_path / "evaluated"
    words = [f"--workdir={finished}", f"--manifest={tmp_path / 'cases.csv'}", f"--out={out}"]
    assert exit_code(evaluate.main, words) == 0
    evaluated = table(out / "scores.csv")
    assert {name: line | {"label": ""} for name, line in evaluated.items()} == lines
    withheld = sum(not line["p_value"] for line in lines.values())
    found = json.loads((out / "metrics.json").read_text())
    whole = {name: line["p_value"] for name, line in predict.scores_in(tmp_path / "out").items()}
    assert all(whole.values()) and found["withheld"] == {n: whole[n] for n in lines if not lines[n]["p_value"]}
    assert found["unlike"] == {"n": 2, "normal": 1, "abnormal": 1, "withheld": withheld}
    high = [name for name, line in lines.items() if line["p_value"] and float(line["p_value"]) <= 0.05]
    counts = {"normal": [len({"usual", "thumbnail"} & set(high)), 2], "abnormal": [int("noise" in high), 1]}
    assert found["alarms"]["counts"] == counts | {"unlabelled": [0, 0]}
    page = (out / "report.html").read_text()
    assert "2 of 3 cases are unlike the training images (1 normal, 1 abnormal)." in page
    assert "Unlike the training images:</strong> fewer pixels along" in page
    said = capfd.readouterr().err
    assert "warning: 2 of 3 cases are unlike the images that the run was trained on; p-values left out" in said
    assert f"for this reason: {withheld} (column warning" in said


@pytest.mark.long
def test_a_calibrated_run_gives_a_mask_at_the_alarm_rate(finished, small_set, tmp_path, capfd):
    content = json.loads((finished / "calibration.json").read_text())
    threshold = sorted(content["peaks"])[-2]  # of 3 normals, half of 4
    files = [next(small_set.parent.glob(f"test-{name}.*")) for name in ("0-0", "1-0", "1-1")]
    rate = "--config.evaluation.alarm_rate=0.5"
    assert run(finished, tmp_path / "out", *files, rate) == 0
    for file in files:
        heat = read_image(tmp_path / "out" / f"{file.stem.split('.')[0]}_anomaly.tif").array[..., 0]
        mask = read_image(tmp_path / "out" / f"{file.stem.split('.')[0]}_mask.tif")
        np.testing.assert_array_equal(mask.array[..., 0], heat > threshold)
        assert mask.bits == 8
    assert run(finished, tmp_path / "calm", files[0]) == 0 and not list((tmp_path / "calm").glob("*_mask*"))
    assert run(finished, tmp_path / "least", files[0], rate, "--config.evaluation.mask_least=4") == 2
    assert "the run is calibrated for 0" in capfd.readouterr().err
    out = f"--out={tmp_path / 'evaluated'}"
    assert exit_code(evaluate.main, [f"--workdir={finished}", out, rate]) == 0
    found = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["mask"]
    assert found["threshold"] == threshold and found["images"] == 11 and 0 < found["lesion_recall"] <= 1
    page = (tmp_path / "evaluated" / "report.html").read_text()
    assert "As a mask" in page and "at most 50 in 100" in page


@pytest.mark.long
def test_two_runs_give_one_answer(finished, small_set, tmp_path, capfd):
    """A run and its copy: the p-values stay, the map is the run's own on its colour scale."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    files = [next(small_set.parent.glob(f"test-{name}.*")) for name in ("0-0", "1-0", "1-1")]
    words = [f"--workdir={finished}", "--workdir", str(copy), f"--out={tmp_path / 'out'}", *map(str, files)]
    assert exit_code(predict.main, words) == 0
    alone, both = table(tmp_path / "out" / "1" / "scores.csv"), table(tmp_path / "out" / "scores.csv")
    assert alone == table(tmp_path / "out" / "2" / "scores.csv") and list(both) == list(alone)
    calibration = json.loads((finished / "calibration.json").read_text())
    normals, (low, high) = np.array(list(calibration["scores"].values())), calibration["colours"].values()
    for name, line in both.items():
        score = float(alone[name]["score"])
        expected = fusion.normal_scores(normals, np.array([score]))[0]
        assert float(line["score"]) == pytest.approx(expected) and line["p_value"] == alone[name]["p_value"]
        own, heat = (read_image(next((tmp_path / "out" / f).glob(f"{name}_anomaly.tif"))) for f in ("1", "."))
        np.testing.assert_allclose(heat.array, (own.array - low) / (high - low), rtol=1e-5, atol=1e-6)
    further = [*words, "--continue"]
    assert exit_code(predict.main, further) == 0 and table(tmp_path / "out" / "scores.csv") == both
    assert exit_code(evaluate.main, [*words[:3], f"--out={tmp_path / 'evaluated'}"]) == 0
    found = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    assert found["scores"]["fused"]["auroc"] == found["scores"][finished.name]["auroc"]
    assert all(one["auroc"] == 0 for one in found["differences"].values()) and len(found["differences"]) == 2
    together = table(tmp_path / "evaluated" / "scores.csv")
    assert {together[name]["p_value"] for name in both} == {line["p_value"] for line in both.values()}
    assert found["unlike"] == {"n": 0} and all(line["warning"] == "" for line in together.values())
    (copy / "calibration.json").unlink()
    assert exit_code(predict.main, words) == 2
    assert f"{copy}: is not calibrated" in capfd.readouterr().err


def test_images_of_any_name_from_folders_keep_their_grid(images_run, tmp_path, capfd):
    folder, out = tmp_path / "cases", tmp_path / "out"
    words = ["a b.PNG", "Zürich 影像.png", "../1.2.840", ".hidden.png", "sub/a b.png", "sub/x;y.png", "../" + "x" * 240]
    for i, name in enumerate(words):
        picture(folder / name, i)
    for name in ("notes.txt", "sub/more.TXT", "__MACOSX/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("Dr. X found nothing of note")
    dicom(folder / "sub" / "plain.dcm", np.arange(30 * 20, dtype=np.uint16).reshape(20, 30))
    named = [tmp_path / "1.2.840", tmp_path / ("x" * 240), picture(tmp_path / "one.png", 9)]
    assert run(images_run, out, folder, *named) == 0
    why = "not images, or of a format that is not read"
    assert f"left out: 2 .txt files ({why}), such as {folder / 'notes.txt'}" in capfd.readouterr().err.splitlines()
    ids = set(table(out / "scores.csv"))
    long = names.id_of("x" * 240)
    assert ids == {"cases_a b", "sub_a b", "Zürich 影像", "1.2.840", "x;y", long, "plain", "one"}
    assert len(long.encode()) == 200 and "hidden" not in " ".join(os.listdir(out))
    assert left(out) == {f"{i}_{end}" for i in ids for end in ("anomaly.tif", "confidence.tif", "overlay.png")} | {
        "scores.csv"
    }
    for name in ids:
        assert read_image(out / f"{name}_anomaly.tif").array.shape == (20, 30, 1)
        with Image.open(out / f"{name}_overlay.png") as overlay:
            assert overlay.size == (30, 20)
    lines = table(out / "scores.csv")
    assert list(lines["one"]) == ["id", "label", "score", "p_value", "alarm", "score_error", "peak", "warning"]
    assert lines["one"]["p_value"] == lines["one"]["score_error"] == ""
    array = read_image(tmp_path / "one.png").array[..., 0].astype(np.uint8)
    one = jmae.load(images_run)(array, id="one")
    expected = resize(to_unit(array[..., None], 8), SIZE)
    assert float(f"{one.score:.9g}") == float(lines["one"]["score"]) and abs(one.score - expected.mean() - 0.05) < 0.02
    np.testing.assert_array_equal(one.confidence, read_image(out / "one_confidence.tif").array[..., 0])
    assert run(images_run, out, "--continue", folder / "notes.txt") == 1  # the user names it, so it is tried
    said = capfd.readouterr().err
    assert f"failed: notes.txt: {folder / 'notes.txt'}: " in said and "no normal scan is kept from the training" in said


@pytest.mark.long
def test_volumes_of_several_sequences_and_series_keep_their_grid(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "run", VOLUMES, monkeypatch)
    pair = [volume(tmp_path / "in" / f"p1-{part}.nii.gz", i) for i, part in enumerate("ab")]
    same = [shutil.copy(file, tmp_path / f"copy {part}.nii.gz") for file, part in zip(pair, "ab", strict=True)]
    assert run(workdir, tmp_path / "out", f"{pair[0]};{pair[1]}", f"{same[0]}; {same[1]}") == 0
    assert set(table(tmp_path / "out" / "scores.csv")) == {"p1-a", "copy a"}
    for kind, shape in (("anomaly", (11, 9, 7)), ("recon", (11, 9, 7, 2))):
        written, stored = nib.load(tmp_path / "out" / f"p1-a_{kind}.nii.gz"), nib.load(pair[0])
        np.testing.assert_array_equal(written.affine, stored.affine)
        assert written.shape == shape and written.header["sform_code"] == stored.header["sform_code"]
    both = jmae.load(workdir)([str(file) for file in pair])
    np.testing.assert_array_equal(both.map, nib.load(tmp_path / "out" / "p1-a_anomaly.nii.gz").get_fdata())
    assert both.confidence is None and both.p_value is None
    stack = np.stack([nib.load(file).get_fdata() for file in pair], -1).astype(np.float32)
    array = jmae.load(workdir)(stack, affine=patients.AFFINE, id="p1-a")
    np.testing.assert_array_equal(array.map, both.map)

    single = write_run(tmp_path / "single", VOLUMES, monkeypatch, **{"data.channels": 1})
    one = lambda results, image, *random: window_bright(results, jnp.concatenate([image, image], -1), *random)
    system = replace(VOLUMES, sweep=replace(VOLUMES.sweep, score=one))
    for module in (predict, evaluate):
        monkeypatch.setattr(module, "load_system", lambda config: system)
    series(tmp_path / "scans" / "patient 1" / "T1")
    volume(tmp_path / "scans" / "patient 2.nii.gz")
    assert run(single, tmp_path / "out2", tmp_path / "scans") == 0
    assert set(table(tmp_path / "out2" / "scores.csv")) == {"T1", "patient 2"}
    assert nib.load(tmp_path / "out2" / "T1_anomaly.nii.gz").shape == (5, 7, 6)


@pytest.mark.long
def test_regions_and_midlines_are_taken_and_give_the_p_values_of_evaluate(tmp_path, monkeypatch, capfd):
    """Of a run that crops to the region, as MAEMI's paper does: from a list of cases, and from Python."""
    crop = {"data.crop": "region", "data.crop_least": (9.0, 9.0, 9.0), "data.crop_most": (40.0, 40.0, 40.0)}
    workdir = write_run(tmp_path / "run", VOLUMES, monkeypatch, **crop)
    config = recipe.read(workdir)
    config.data.manifest = str(patients.write_patients(tmp_path))
    rows = load_rows(config, str)
    evaluate.evaluate(config, VOLUMES, rows, workdir, split="test", out=workdir / "evaluation")
    evaluated = table(workdir / "evaluation" / "scores.csv")
    assert all(0 < float(line["p_value"]) <= 1 for line in evaluated.values())

    asked = [row for row in rows if row.id in evaluated]
    lines = [[row.id, ";".join(row.image), row.region, row.extra["midline"], row.label] for row in asked]
    write_csv(
        tmp_path / "cases.csv", [dict(zip("id image region midline label".split(), x, strict=True)) for x in lines]
    )
    assert run(workdir, tmp_path / "out", f"--manifest={tmp_path / 'cases.csv'}") == 0
    predicted = table(tmp_path / "out" / "scores.csv")
    assert predicted == {name: line | {"label": ""} for name, line in evaluated.items()}
    assert "only cases with a region and a midline get p-values" in capfd.readouterr().err
    of, row = jmae.load(workdir), asked[0]
    inside, middle = nib.load(row.region).get_fdata(), row.extra["midline"]
    for region in (row.region, inside):
        one = of(list(row.image), id=row.id, region=region, midline=middle)
        assert (str(one.score), str(one.p_value)) == (predicted[row.id]["score"], predicted[row.id]["p_value"])
    assert of(list(row.image), id=row.id, region=inside).p_value is None  # without the midline
    val = next(row for row in rows if row.split == "val")
    known = of(list(val.image), id="renamed", region=val.region, midline=val.extra["midline"])
    assert known.p_value is None and f"it is the image of {val.id} in val" in capfd.readouterr().err
    for words, problem in (
        ({}, "names no region to crop to"),
        ({"region": inside[1:]}, "its region has the shape"),
        ({"region": inside, "midline": "centre"}, "midline 'centre': write middle"),
        ({"region": inside, "half": "first"}, "write first or second beside a midline"),
        ({"region": tmp_path / "none.nii"}, "not found"),
    ):
        with pytest.raises(InputError, match=problem):
            of(list(row.image), **words)


def test_images_that_the_run_has_seen_have_no_p_value_under_any_name(tmp_path, monkeypatch, tools, capfd):
    workdir = write_run(tmp_path / "run", IMAGES, monkeypatch)
    config = recipe.read(workdir)
    config.data.manifest = str(tools.write_set(tmp_path / "set", {("train", 0): 2, ("val", 0): 4, ("test", 0): 1}))
    rows = load_rows(config, str)
    evaluate.evaluate(config, IMAGES, rows, workdir, split="test", out=workdir / "evaluation")
    write_seen(workdir, [row for row in rows if row.split == "train"])
    renamed = {}
    for row in rows:
        renamed[row.id] = shutil.copy(row.image[0], tmp_path / f"scan {row.id}{Path(row.image[0]).suffix}")
    capfd.readouterr()
    assert run(workdir, tmp_path / "out", *renamed.values()) == 0
    found = {name: line["p_value"] for name, line in table(tmp_path / "out" / "scores.csv").items()}
    assert [bool(p) for p in found.values()] == [False] * 6 + [True], found
    said = capfd.readouterr().err
    assert "the run was trained or calibrated on this image (val-0-3 in val)" in said
    assert "(train-0-0 in train)" in said
    with pytest.raises(InputError, match="only volumes have a region"):
        jmae.load(workdir)(renamed["test-0-0"], midline="middle")


def test_an_array_without_affine_has_the_runs_axes(tmp_path, monkeypatch):
    """Indices that grow to posterior, left, superior, at (2, 3, 4) mm: as a file that says so."""
    workdir = write_run(tmp_path / "run", VOLUMES, monkeypatch)
    affine = np.array([[0, -3, 0, 0], [-2, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    pair = [str(volume(tmp_path / f"{part}.nii.gz", i, affine=affine)) for i, part in enumerate("ab")]
    stack = np.stack([nib.load(file).get_fdata() for file in pair], -1)
    of = jmae.load(workdir)
    np.testing.assert_array_equal(of(stack, spacing=(2, 3, 4), id="other").map, of(pair).map)
    assert not np.array_equal(of(stack[::-1], spacing=(2, 3, 4)).map, of(pair).map)


def test_arrays_that_cannot_be_used_are_refused_in_one_line(images_run, tmp_path):
    of, good = jmae.load(images_run), np.random.default_rng(0).random((9, 8))
    bad = good.copy()
    bad[2, 3] = np.nan
    for array, words, problem in (
        (good[None, None], {}, r"array 0: has the shape \(1, 1, 9, 8\): give \(rows, columns\) or \(rows, columns, "),
        (good[None], {}, r"shape \(1, 9, 8\): give .*, channels\); one case a call; the run takes 1 channel$"),
        (np.zeros((30, 30, 30)), {}, r"shape \(30, 30, 30\): give \(rows, columns\) or"),
        (good[0], {}, r"shape \(8,\): give \(rows, columns\) or"),
        (np.zeros((0, 4)), {}, r"has the shape \(0, 4\) and no values: give"),
        (np.array([]), {}, r"has the shape \(0,\) and no values: give"),
        ([[]], {}, r"has the shape \(1, 0\) and no values: give"),
        ([], {}, "^an empty list is no case: give a path, a list of paths, or an array of numbers$"),
        ((), {}, "^an empty tuple is no case: give a path"),
        ({}, {}, "array [0-9]+: dict is no image: give a path"),
        ([[1, 2], [3]], {}, "array [0-9]+: list is no image: give a path"),
        (None, {}, "array [0-9]+: NoneType is no image: give a path, a list of paths, or an array of numbers"),
        (good.astype(complex), {}, "array [0-9]+: holds values of the type complex128: give real numbers"),
        (np.array([["a"]]), {}, "array [0-9]+: holds values of the type <U1: give real numbers"),
        (good[..., None].repeat(2, -1), {}, "channels: 2 where the recipe has 1"),
        (bad, {}, "1 values are not finite"),
        (good * 1e300, {}, "not finite"),
        (good, {"spacing": (1, 2, 3)}, "not 2 numbers above 0"),
        (good, {"spacing": (1, -2)}, "not 2 numbers above 0"),
        (good, {"affine": np.zeros((4, 4))}, "no invertible"),
        (tmp_path / "none.png", {}, "not found"),
        ("", {}, "is empty"),
    ):
        with pytest.raises(InputError, match=problem) as error:
            of(array, **words)
        assert "\n" not in str(error.value)


def test_an_array_of_a_run_of_volumes_has_three_axes_and_its_channels(volumes_run):
    of, volume = jmae.load(volumes_run), np.random.default_rng(0).random((11, 9, 7, 2))
    for array in (volume[None], volume[0, ..., 0], volume.transpose(3, 0, 1, 2)):
        with pytest.raises(InputError, match=r"give \(i, j, k, channels\); one case a call; the run takes 2 channels$"):
            of(array)


def test_an_array_of_equal_channels_is_taken_as_the_file_is(finished, small_set, tmp_path, capfd):
    file = next(small_set.parent.glob("test-0-0.*"))
    grey = read_image(file).array.astype(np.uint8)
    Image.fromarray(grey.repeat(3, -1)).save(tmp_path / "rgb.png")
    of = jmae.load(finished)
    as_file, as_array = of(tmp_path / "rgb.png"), of(grey.repeat(3, -1))
    assert (as_array.score, as_array.p_value, as_array.warning) == (as_file.score, as_file.p_value, as_file.warning)
    assert as_array.p_value is not None and as_array.warning == ""
    capfd.readouterr()
    of(grey[::5, ::5])
    of(grey[::5, ::5], id="mine")
    of(grey[::5, ::5])
    names = [line.split(": warning: ")[0] for line in capfd.readouterr().err.splitlines()]
    assert names == ["array 1", "mine", "array 2"]


def test_a_short_training_is_said_once(tmp_path, monkeypatch, capfd):
    workdir = write_run(tmp_path / "run", IMAGES, monkeypatch, budget=0.1)
    assert run(workdir, tmp_path / "out", *(picture(tmp_path / f"{i}.png", i) for i in range(2))) == 0
    assert capfd.readouterr().err.count("short training: ") == 1


def test_a_list_is_the_sequences_of_one_case(images_run, tmp_path):
    array, file = np.zeros((9, 8)), picture(tmp_path / "a.png")
    one = "a list has the paths of one case's sequences, and the run takes 1 sequence: score several cases one by one, "
    for images, what in (([array, array], "arrays"), ([array, array[1:]], "arrays"), ([file, file], "paths")):
        with pytest.raises(InputError) as error:
            jmae.load(images_run)(images)
        assert str(error.value) == f"a list of 2 {what}: {one}[run(case) for case in LIST]"


def test_the_help_of_load_names_what_works_after_it(images_run, tmp_path, capsys):
    text = jmae.load.__doc__
    assert "`help(run)`" in text and "`help(one)`" in text
    run = jmae.load(images_run)
    one = run(picture(tmp_path / "film.png"))
    for shown, said in ((run, "image: a path; or a list of the paths"), (one, "p_value: None where the run")):
        capsys.readouterr()
        help(shown)
        assert said in capsys.readouterr().out
    (fields,) = (line for line in text.splitlines() if "one.score" in line)
    assert all(hasattr(one, word.removeprefix("one.")) for word in fields.strip().split(", "))


def test_the_terminal_shows_the_highest_scores_in_80_columns():
    line = lambda name, score, p, warning="": {"id": name, "score": score, "p_value": p, "warning": warning}
    few = [line("a", 1.5, 0.4), line("影像", 12345.678, 0.05, "darker"), line("b", -2.0, None, "darker")]
    assert highest(few, 0.05) == [
        "case      score  p-value  alarm: p-value up to 0.05",
        "影像  1.235e+04     0.05  alarm, unlike",
        "a           1.5      0.4",
        "b            -2     none  unlike",
    ]
    many = [line(f"sub-{i:02d}{'_影' * 50}_ses-{i:02d}\n", i, 0.001, "x") for i in range(12)]
    shown = highest(many, 0.05)
    assert len(shown) == 11 and max(map(cell_len, shown)) <= 80 and len(set(map(cell_len, shown[1:]))) == 1
    assert shown[0].startswith("10 highest of 12 ") and shown[1].startswith("sub-11_影") and "ses-11?  " in shown[1]


def test_few_cases_unlike_the_training_have_the_remedy_of_training_with_them():
    assert remedy(1, 1) == "is it the right run for this case?" and "right run for them" in remedy(2, 4)
    assert remedy(2, 5).endswith("put some of them into the training set")


def test_a_calm_map_stays_dark_on_the_scale_of_normals():
    grey, rng = np.full((8, 8, 1), 0.5, np.float32), np.random.default_rng(0)
    stored = inputs.image_of_array(grey, recipe.load("configs/amae.py:smoke").data, None, None, "x")
    calm, lesion = rng.uniform(0, 0.9, (8, 8)), np.zeros((8, 8))
    lesion[3, 4] = 5
    shown = lambda heat: predict.overlay(stored, heat, Scale(1.0, 2.0, "")).astype(int)
    assert np.ptp(shown(calm)) == 0, "below the scale nothing is coloured"
    assert np.argwhere(np.ptp(shown(lesion), -1)).tolist() == [[3, 4]]


# --- files that are not what they claim -------------------------------------------------------------------------------


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def lying_png(path: Path) -> None:
    """A header, checksum and all, that claims twice as many rows."""
    data = bytearray(path.read_bytes())
    data[20:24] = struct.pack(">I", 40)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def lying_nifti(path: Path) -> None:
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = struct.pack("<3h", 32000, 32000, 32000)
    path.write_bytes(gzip.compress(bytes(data)))


def rows_at(path: Path) -> int:
    """Where a DICOM file of explicit value representations has its number of rows."""
    return path.read_bytes().index(b"\x28\x00\x10\x00US\x02\x00") + 8


def damaged_images(folder: Path) -> list[Path]:
    """Cut, flipped, empty and lying PNG and DICOM files. (DICOM pixels have no checksum: the bit is one of Rows.)"""
    made = []
    for kind in ("png", "dcm"):
        for name, harm in (
            ("cut", lambda path: cut(path, 0.7)),
            ("cut short", lambda path: cut(path, 0.02)),
            ("empty", lambda path: path.write_bytes(b"")),
            ("text", lambda path: path.write_text("id,label\n" * 50)),
            (
                "flipped",
                lambda path: flipped(path, path.stat().st_size // 2 if path.suffix == ".png" else rows_at(path)),
            ),
            ("lying", lambda path: lying_png(path) if path.suffix == ".png" else None),
        ):
            path = folder / f"{name} {kind}.{kind}"
            if kind == "png":
                picture(path)
            else:
                rows = {"Rows": 60000, "Columns": 60000} if name == "lying" else {}
                dicom(path, np.arange(600, dtype=np.uint16).reshape(20, 30), **rows)
            harm(path)
            made.append(path)
    return made


def named(lines: list[str]) -> int:
    """The number of cases that lines "failed: ..." stand for."""
    more = [re.fullmatch(r"failed: (\d+) more for the same reason as .*", line) for line in lines]
    return sum(int(found[1]) if found else 1 for found in more)


def check_damaged(workdir: Path, out: Path, good: Path, bad: list[Path], said) -> None:
    """Each bad file is refused in one line by its path, the good one is done, nothing else is left."""
    assert run(workdir, out, *bad[: len(bad) // 2], good, *bad[len(bad) // 2 :]) == 1
    lines = [line for line in said().err.splitlines() if line.startswith("failed: ")]
    failed = table(out / "failed.csv")
    assert named(lines) == len(bad) == len(failed) and "Traceback" not in "".join(lines)
    for path in bad:
        (line,) = (line for line in failed.values() if line["image"] == str(path))
        assert line["reason"].startswith(str(path)) and "\n" not in line["reason"]
    (name,) = table(out / "scores.csv")
    assert left(out) == {file.name for file in out.glob(f"{name}_*")} | {"scores.csv", "failed.csv"}


def test_damaged_images_are_refused_each_in_a_line_and_the_others_go_on(images_run, tmp_path, capfd):
    bad = damaged_images(tmp_path / "bad")
    check_damaged(images_run, tmp_path / "out", picture(tmp_path / "good.png"), bad, capfd.readouterr)
    cases = {line["id"]: line["reason"] for line in table(tmp_path / "out" / "failed.csv").values()}
    assert "is empty" in cases["empty dcm"]
    assert "is beyond the limit" in cases["lying dcm"] and "more pixels" in cases["flipped dcm"]
    assert "claims the size (40, 30), which does not fit its data" in cases["lying png"]


def test_damaged_volumes_are_refused_each_in_a_line_and_the_others_go_on(tmp_path, monkeypatch, capfd):
    workdir, folder = write_run(tmp_path / "run", VOLUMES, monkeypatch, **{"data.channels": 1}), tmp_path / "bad"
    one = lambda results, image, *random: window_bright(results, jnp.concatenate([image, image], -1), *random)
    system = replace(VOLUMES, sweep=replace(VOLUMES.sweep, score=one))
    for module in (predict, evaluate):
        monkeypatch.setattr(module, "load_system", lambda config: system)
    bad = []
    for name, harm in (
        ("cut", lambda path: cut(path, 0.5)),
        ("cut at its end", lambda path: cut(path, 0.999)),
        ("cut in its header", lambda path: cut(path, 0.01)),
        ("flipped", lambda path: flipped(path, path.stat().st_size // 2)),
        ("flipped checksum", lambda path: flipped(path, -6)),
        ("empty", lambda path: path.write_bytes(b"")),
        ("lying", lying_nifti),
    ):
        bad.append(volume(folder / f"{name}.nii.gz"))
        harm(bad[-1])
    bad.append(picture(folder / "2D.png"))
    for name, skip in (("a slice is missing", (3,)), ("one slice", (0, 1, 2, 3, 4))):
        bad.append(series(folder / name, skip=skip))
    bad.append(series(folder / "a cut slice"))
    cut(bad[-1] / "002.dcm", 0.9)
    out, good = tmp_path / "out", volume(tmp_path / "good.nii.gz")
    assert run(workdir, out, folder, good) == 1
    failed = {line["image"]: line["reason"] for line in table(out / "failed.csv").values()}
    assert set(failed) == set(map(str, bad)) and all("\n" not in reason for reason in failed.values())
    assert all(reason.startswith(path) for path, reason in failed.items())
    said = capfd.readouterr().err.splitlines()
    assert named([line for line in said if line.startswith("failed: ")]) == len(bad)
    step = "mend the other 10 cases, then the same command with --continue"
    assert said[-1] == f"next: score 1 image with a run of images (--workdir); {step}"
    assert left(out) == {"good_anomaly.nii.gz", "good_recon.nii.gz", "good_overlay.png", "scores.csv", "failed.csv"}


def test_films_for_a_run_of_volumes_fail_in_a_line_and_no_other_try_is_proposed(volumes_run, tmp_path, capfd):
    folder, out = tmp_path / "films", tmp_path / "out"
    files = [picture(folder / f"{i}.png", i) for i in range(6)]
    assert run(volumes_run, out, folder) == 1
    said = capfd.readouterr().err.splitlines()
    what = "is an image, where the recipe takes volumes (data.size has 3 axes): for images train one such as"
    assert said[-5].startswith(f"failed: 0: {files[0]}: {what}")
    assert said[-4:] == [
        "failed: 5 more for the same reason as 0",
        "no case was predicted",
        f"6 of 6 cases failed: {out / 'failed.csv'}",
        "next: score 6 images with a run of images (--workdir)",
    ]
    assert list(table(out / "failed.csv")) == list("012345")


def test_a_folder_without_an_image_is_refused_by_what_it_holds(images_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    assert run(images_run, tmp_path / "out", "new") == 2
    assert "new: is a folder without an image: name files, or a folder of scans\n" in capfd.readouterr().err
    (tmp_path / "new" / "notes.txt").write_text("Dr. X found nothing of note")
    assert run(images_run, tmp_path / "out", "new") == 2
    said = capfd.readouterr().err
    assert "new: is a folder without an image, but with 1 .txt file (not images, or of a format" in said
    assert said.endswith("notes.txt: name files, or a folder of scans\n") and not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_command_is_one_line(images_run, tmp_path, capfd):
    image, gone, cases = picture(tmp_path / "a.png"), tmp_path / "gone.png", tmp_path / "cases.csv"
    cases.write_text("image\na.png\ngone.png\n")
    copy = picture(tmp_path / "b" / "a.png")
    for words, problem in (
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}"], "no scans: name files or folders"),
        ([f"--workdir={images_run}", str(image)], "no --out: name a folder"),
        ([f"--out={tmp_path / 'out'}", str(image)], "no run folder"),
        ([f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'out'}", str(image)], "no config.json"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", "--config.data.siz=8,8", str(image)], "is unknown"),
        (
            [f"--workdir={images_run}", f"--out={tmp_path / 'out'}", "--config.data.size=8,8", str(image)],
            "--config.data.size is fixed by the training: only --config.evaluation.KEY=VALUE can change a run's",
        ),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", "--continu=1", str(image)], "--continue"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", str(image), str(image)], "name it once"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", f"{image};"], "empty name"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", str(image), str(gone)], f"{gone}: not found: check"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", f"{gone};{gone}"], "not found (and 1 more): check"),
        ([f"--workdir={images_run}", f"--out={tmp_path / 'out'}", f"--manifest={cases}"], f"{gone}: not found: check"),
        ([f"--workdir={images_run}", f"--out={image}", str(image), str(copy)], "is a file: name a folder"),
    ):
        assert exit_code(predict.main, words) == 2
        said = [
            line for line in capfd.readouterr().err.splitlines() if "calibrat" not in line and "held-out" not in line
        ]
        assert len(said) == 1 and problem in said[0], said
    assert not (tmp_path / "out").exists()


# --- interruptions, memory --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_interrupted_prediction_goes_on_where_it_stopped(images_run, tmp_path, monkeypatch, capfd):
    files, out, whole = [picture(tmp_path / f"{i}.png", i) for i in range(7)], tmp_path / "out", tmp_path / "whole"
    assert run(images_run, whole, *files) == 0
    real, written = predict.write_case, []

    def dying(run, result, *rest):
        if len(written) == 4:
            raise KeyboardInterrupt
        return counted(run, result, *rest)

    def counted(run, result, *rest):
        written.append(result.case.row.id)
        return real(run, result, *rest)

    monkeypatch.setattr(predict, "write_case", dying)
    assert run(images_run, out, *files) == 130
    assert "--continue" in capfd.readouterr().err and not (out / "scores.csv").exists()
    with open(out / predict.DONE, "a") as torn:
        torn.write('{"id": "4", "im')  # as a kill may leave it
    (out / "1_anomaly.tif").unlink()
    monkeypatch.setattr(predict, "write_case", counted)
    assert run(images_run, out, *files) == 2 and "add --continue to finish them or to add" in capfd.readouterr().err
    assert run(images_run, out, "--continue", *files) == 0
    assert written == ["0", "1", "2", "3", "1", "4", "5", "6"]
    assert (out / "scores.csv").read_text() == (whole / "scores.csv").read_text()
    assert {f: (out / f).read_bytes() for f in left(out)} == {f: (whole / f).read_bytes() for f in left(whole)}
    assert run(images_run, out, "--continue", *files) == 0 and len(written) == 8
    assert run(images_run, out, "--continue", "--config.evaluation.masks=9", *files) == 2
    assert "of another run, calibration or settings" in capfd.readouterr().err


def test_what_failed_is_done_once_it_is_mended(images_run, tmp_path):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(b"")
    assert run(images_run, tmp_path / "alone", bad) == 1 and left(tmp_path / "alone") == {"failed.csv"}
    assert run(images_run, tmp_path / "alone", good, "--config.evaluation.masks=9") == 0, "needs no --continue"
    assert run(images_run, tmp_path / "alone", good) == 2 and "failed.csv" not in left(tmp_path / "alone")
    assert run(images_run, tmp_path / "out", good, bad) == 1
    assert set(table(tmp_path / "out" / "scores.csv")) == {"good"}
    picture(bad, 3)
    assert run(images_run, tmp_path / "out", "--continue", good, bad) == 0
    assert list(table(tmp_path / "out" / "scores.csv")) == ["good", "bad"]
    assert "failed.csv" not in left(tmp_path / "out")
    bad.write_bytes(b"damaged again")
    assert run(images_run, tmp_path / "out", "--continue", good, bad) == 1
    assert list(table(tmp_path / "out" / "scores.csv")) == ["good"], "the score of the earlier file does not stay"
    assert run(images_run, tmp_path / "out", "--continue", good) == 0, "a failure of another file does not count"
    assert "failed.csv" not in left(tmp_path / "out")


def test_a_volume_of_another_size_is_named_before_it_is_scored(volumes_run, tmp_path, monkeypatch, capfd):
    usual = [volume(tmp_path / f"{part}.nii.gz", i) for i, part in enumerate("ab")]
    huge = [volume(tmp_path / f"huge {part}.nii.gz", i, size=(31, 29, 7)) for i, part in enumerate("ab")]
    write_kind(volumes_run, [traits_of(read_image(usual))])
    real = passes.SweepPass.dispatch

    def dispatch(self, cases, *rest):
        log(f"scoring {cases[0].row.image[0]}")
        return real(self, cases, *rest)

    monkeypatch.setattr(passes.SweepPass, "dispatch", dispatch)
    words = [f"{files[0]};{files[1]}" for files in (usual, huge)]
    assert run(volumes_run, tmp_path / "out", *words) == 0
    jmae.load(volumes_run)([str(file) for file in huge])
    said = [line for line in capfd.readouterr().err.splitlines() if "huge a: warning:" in line or "scoring /" in line]
    assert [line.split(" (")[0].removeprefix("huge a: warning: unlike the images that ") for line in said] == [
        f"scoring {usual[0]}",
        *["the run was trained on: more pixels along the longest side", f"scoring {huge[0]}"] * 2,
    ]


@pytest.mark.parametrize("volumes", [False, True])
def test_progress_says_that_a_program_is_compiled_only_while_it_is(tmp_path, monkeypatch, volumes):
    workdir = write_run(tmp_path / "run", VOLUMES if volumes else IMAGES, monkeypatch)
    said, real = list[str](), passes.fitting
    case = [str(volume(tmp_path / f"{part}.nii.gz", i)) for i, part in enumerate("ab")] if volumes else np.eye(9)
    monkeypatch.setattr(passes, "fitting", lambda *args, **words: said.append(of()) or real(*args, **words))
    of = lambda: run.scorer.progress("0 of 1 case scored") if run else ""
    run = None
    run = jmae.load(workdir)
    run(case)
    assert said == (["0 of 1 case scored (compiling)"] if volumes else [""]) and of() == "0 of 1 case scored"


class Full:
    """A compiled program on a device that has room for `room` at a time."""

    def __init__(self, compiled, chunk, room):
        self.compiled, self.chunk, self.room = compiled, chunk, room

    def __call__(self, *args):
        if self.chunk > self.room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return self.compiled(*args)

    def memory_analysis(self):
        return self.compiled.memory_analysis()


@pytest.mark.parametrize("volumes", [False, True])
@pytest.mark.long_but_first
def test_a_device_that_is_full_gets_less_at_a_time_with_the_same_map(tmp_path, monkeypatch, volumes, capfd):
    key = "evaluation.batch" if volumes else "evaluation.chunk"
    workdir = write_run(tmp_path / "run", VOLUMES if volumes else IMAGES, monkeypatch, **{key: 2})
    if volumes:
        case = [str(volume(tmp_path / f"{part}.nii.gz", i)) for i, part in enumerate("ab")]
    else:
        case = str(picture(tmp_path / "a.png"))
    whole, real = jmae.load(workdir)(case), passes.fitting

    def fitting(lower, most, **words):
        compiled, chunk = real(lower, most, **words)
        asked.append(chunk)
        return Full(compiled, chunk, room), chunk

    monkeypatch.setattr(passes, "fitting", fitting)
    for room in (1, 0):
        asked: list[int] = []
        if room:
            part = jmae.load(workdir)(case)
            np.testing.assert_allclose(part.map, whole.map, atol=1e-6)
            assert asked == [2, 1]
        else:
            with pytest.raises(InputError, match=r"needs \S+ GB of the \S+ GB of .*: crop or resample it, or take"):
                jmae.load(workdir)(case)
