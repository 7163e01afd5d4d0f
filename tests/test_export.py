"""An exported scoring function against the evaluator's own, read again without the recipe."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from drawn import drawn
from patients import AFFINE, SETTINGS
from PIL import Image
from trees import dicom_file

from jmae import checkpoint, export, recipe
from jmae.calibration import score_identity
from jmae.data.cases import load_rows
from jmae.errors import InputError, exit_code
from jmae.fitting import restore_results
from jmae.inference import Scorer
from jmae.p_values import Calibration
from jmae.predict import load
from jmae.run_folder import describe_run
from jmae.sealed import KEY, seal
from jmae.system import load_system, stage_keys

IMAGES = """--config=configs/memmc_mae.py:smoke data.size=16,16 model.patch=8,8 model.width=24 model.depth=2
model.decoder_width=16 model.memory=2 model.heads=2 model.decoder_heads=2 evaluation.masks=2 evaluation.batch=3
evaluation.window=3,3 evaluation.scales=0.5,0.5 replicates=2""".split()
VOLUMES = ["--config=configs/maemi.py:smoke", *SETTINGS]


def untrained(arguments: list[str], workdir: Path):
    """A run whose stages have drawn weights, and are saved as finished ones."""
    config, _ = recipe.parse([arguments[0], *(f"--config.{a}" for a in arguments[1:])], "")
    system, one = load_system(config), config.replicates == 1
    describe_run(config, workdir)
    for number, stage in enumerate(system.stages):
        init, keys = lambda key, stage=stage: stage.init(key, {}, 4), stage_keys(config, number)
        state = drawn(partial(init if one else jax.vmap(init), keys))
        folder = workdir / "checkpoints" / stage.name
        checkpoint.save(folder, 1, state, {"steps": 1}, config={})
    return config, system


@pytest.mark.long
def test_an_exported_function_of_images_gives_the_evaluators_scores_without_jmae(tmp_path, monkeypatch):
    config, system = untrained(IMAGES, tmp_path / "run")
    rows = load_rows(config, str)
    of = score_identity(config, system, restore_results(config, system, tmp_path / "run"))
    known = {"scores": {"a": 1.0, "b": 2.0}, "colours": {"low": 0, "high": 1}, "needs": [], "threshold": 2.0, "of": of}
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(known))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert exit_code(export.main, [f"--workdir={tmp_path / 'run'}", "--out=.", "--platforms=cpu,cuda,tpu"]) == 0
    assert sorted(os.listdir(".")) == sorted([export.STORED, export.FUNCTION, export.WEIGHTS, export.ABOUT])
    scorer = Scorer(config, system, restore_results(config, system, tmp_path / "run"))
    cases = [scorer.prepare(row) for row in rows if row.split == "test"][:3]
    expected = scorer.score(cases)

    given = {
        "image": np.stack([case.array for case in cases]),
        "case": np.stack([export.case_words(case.row.id) for case in cases]),
    }
    np.savez(tmp_path / "given.npz", **given)
    code = """
import sys, jax, numpy, safetensors.numpy
call = jax.jit(jax.export.deserialize(bytearray(open("out/function.bin", "rb").read())).call)
given = numpy.load("given.npz")
out = call(safetensors.numpy.load_file("out/weights.safetensors"), given["image"], given["case"])
assert not any(name.startswith("jmae") for name in sys.modules)
numpy.savez("found.npz", **{name.replace("/", "."): value for name, value in out.items()})
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with np.load(tmp_path / "found.npz") as kept:
        found = dict(kept)
    assert {name for name in found if name.startswith(("maps.", "scores."))} == {
        f"maps.{n}" for n in expected[0].maps
    } | {f"scores.{n}" for n in expected[0].scores}
    for k, result in enumerate(expected):
        for kind in ("maps", "scores"):
            for name, value in getattr(result, kind).items():
                np.testing.assert_allclose(found[f"{kind}.{name}"][:, k], value, atol=1e-5)
        np.testing.assert_allclose(found["reconstruction"][:, k], result.reconstruction, atol=1e-5)
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["image"] == ["batch", 16, 16, 1] and about["primary"] == "ms_ssim" and about["replicates"] == [0, 1]
    assert about["out"]["maps/ms_ssim"] == [2, "batch", 16, 16]
    assert about["calibration"]["scores"] == known["scores"] and about["calibration"]["threshold"] == 2
    assert about["evaluation"]["masks"] == 2

    for name in (export.WEIGHTS, export.FUNCTION, export.STORED, export.ABOUT):  # a flipped bit
        file = tmp_path / "out" / name
        content = bytearray(file.read_bytes())
        whole, content[len(content) // 2] = (
            bytes(content),
            content[len(content) // 2] ^ (1 if name != export.ABOUT else 128),
        )
        file.write_bytes(content)
        with pytest.raises(InputError, match="no whole export"):
            export.load(tmp_path / "out")
        file.write_bytes(whole)
    del about[KEY]
    about["sha256"] |= {"../run/calibration.json": export.sha256(tmp_path / "run" / "calibration.json")}
    (tmp_path / "out" / "export.json").write_text(seal(about))
    with pytest.raises(InputError, match=r"no whole export \(export\.json names other files\)"):
        export.load(tmp_path / "out")


def test_all_files_of_an_export_have_the_rights_of_any_other_file(tmp_path):
    export.write(tmp_path / "out", {export.FUNCTION: bytearray(b"x")}, {"w": np.zeros(3, np.float32)}, {})
    (tmp_path / "other").write_text("")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys((export.FUNCTION, export.WEIGHTS, export.ABOUT), (tmp_path / "other").stat().st_mode)


READERS = """
import sys, jax, numpy, safetensors.numpy, PIL.Image, pydicom, nibabel
call = jax.jit(jax.export.deserialize(bytearray(open("out/stored.bin", "rb").read())).call)
weights = safetensors.numpy.load_file("out/weights.safetensors")
read = {
    "film.png": lambda f: (numpy.asarray(PIL.Image.open(f)), 8),
    "deep.png": lambda f: (numpy.asarray(PIL.Image.open(f)), 16),
    "film.dcm": lambda f: (pydicom.dcmread(f).pixel_array * 2.0 - 100, 0),
    "film.nii": lambda f: (numpy.asarray(nibabel.load(f).dataobj).T, 0),
}
for name, reader in read.items():
    values, bits = reader(name)
    out = call(weights, numpy.float32(values)[..., None], numpy.int32(bits))
    numpy.savez(name + ".npz", **out)
    values = numpy.float32(values)[..., None]
    for wrong in (numpy.where(values == values.max(), numpy.nan, values), 0 * values + 7, 0 * values + numpy.inf):
        out = call(weights, wrong, numpy.int32(bits))
        assert all(numpy.isnan(value).all() for value in out.values())
assert not any(name.startswith("jmae") for name in sys.modules)
"""


def write_films(folder: Path) -> list[Path]:
    """One film in four formats and sizes: PNG of 8 and of 16 bits, DICOM with a rescale slope, NIfTI of 2 axes."""
    rng = np.random.default_rng(5)
    eight, sixteen = rng.integers(0, 256, (50, 41), np.uint8), rng.integers(300, 5000, (23, 30), np.uint16)
    Image.fromarray(eight).save(folder / "film.png")
    Image.fromarray(sixteen).save(folder / "deep.png")
    dicom_file(folder / "film.dcm", sixteen, RescaleSlope=2.0, RescaleIntercept=-100.0)
    nib.save(nib.Nifti1Image(rng.normal(40, 9, (37, 28)).astype(np.float32), np.eye(4)), folder / "film.nii")
    return [folder / name for name in ("film.png", "deep.png", "film.dcm", "film.nii")]


@pytest.mark.parametrize("change", ["data.equalise=false", "data.equalise=true", "data.window=-90,4000"])
@pytest.mark.long_but_first
def test_stored_values_get_the_scores_of_predict_without_jmae(change, tmp_path):
    config, system = untrained([*IMAGES, change], tmp_path / "run")
    of = score_identity(config, system, restore_results(config, system, tmp_path / "run"))
    films = write_films(tmp_path)
    predict = load(tmp_path / "run")
    middle = float(np.median([predict(film).score for film in films]))
    known = {"scores": {"a": middle, "b": 99.0, "c": -99.0}, "colours": {"low": 0, "high": 1}, "needs": [], "of": of}
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(known | {"threshold": 2.0}))
    assert exit_code(export.main, [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    subprocess.run([sys.executable, "-c", READERS], cwd=tmp_path, check=True)
    predict, p_values = load(tmp_path / "run"), set()
    for film in films:
        with np.load(f"{film}.npz") as file:
            expected, found = predict(film), dict(file)
        np.testing.assert_allclose(found["score"], expected.score, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["map"], expected.map, atol=1e-4)
        if expected.score < middle - 1e-5 or expected.score > middle + 1e-5:
            p = (1 + sum(s >= expected.score for s in known["scores"].values())) / 4
            assert found["p_value"] == pytest.approx(p)
            p_values.add(p)
    assert len(p_values) > 1


def test_an_exported_function_of_volumes_gives_the_evaluators_map(tmp_path, capfd):
    config, system = untrained(VOLUMES, tmp_path / "run")
    row = next(row for row in load_rows(config, str) if row.split == "test")
    scorer = Scorer(config, system, restore_results(config, system, tmp_path / "run"))
    case = scorer.prepare(row)
    case = replace(case, volume=case.volume._replace(midline=None))
    size = ",".join(map(str, case.array.shape[:-1]))
    arguments = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert exit_code(export.main, [*arguments, f"--size={size}", "--batch=2"]) == 2
    assert "--batch is for images" in capfd.readouterr().err
    assert exit_code(export.main, arguments) == 2
    assert "--size has 0 numbers: write the volume's voxels" in capfd.readouterr().err
    assert exit_code(export.main, [*arguments, f"--size={size}"]) == 0
    call, about = export.load(tmp_path / "out")
    found = call(case.array, export.case_words(row.id))
    for name, value in scorer.score([case])[0].maps.items():
        np.testing.assert_allclose(found[f"maps/{name}"], value[0], atol=1e-5)
    assert about["image"] == list(case.array.shape) and float(np.std(found["maps/" + about["map"]])) > 0
    assert exit_code(export.main, [*arguments, f"--size={size}"]) == 2
    assert "is there already and not an empty folder" in capfd.readouterr().err


SCANS = """
import sys, jax, numpy, safetensors.numpy, nibabel
call = jax.jit(jax.export.deserialize(bytearray(open("out/stored.bin", "rb").read())).call)
weights = safetensors.numpy.load_file("out/weights.safetensors")
for name in sys.argv[1:]:
    scan = nibabel.load(name + ".nii")
    values, affine = numpy.float32(scan.dataobj)[..., None], numpy.float32(scan.affine)
    region = numpy.asarray(nibabel.load(name + "-region.nii").dataobj) > 0
    numpy.savez(name + ".npz", **call(weights, values, affine, region))
    for wrong in (call(weights, 0 * values, affine, region), call(weights, values, affine * 1.1, region)):
        assert all(numpy.isnan(value).all() for value in wrong.values())
assert not any(name.startswith("jmae") for name in sys.modules)
"""


def write_scans(folder: Path) -> list[str]:
    """Three scans on one grid with a region each, the third of which marks nothing."""
    rng, names, size = np.random.default_rng(6), ["first", "second", "third"], (21, 9, 16)
    for i, name in enumerate(names):
        region = np.zeros(size, np.uint8)
        region[2 + i : 15 + i, 1:8, 3 : 12 - i] = i < 2
        moved = AFFINE.copy()
        moved[:3, 3] += 7 * i
        values = rng.gamma(2, 40, size).astype(np.float32)
        nib.save(nib.Nifti1Image(values, moved), folder / f"{name}.nii")
        nib.save(nib.Nifti1Image(region, moved), folder / f"{name}-region.nii")
    return names


@pytest.mark.parametrize("crop", ["region", "none"])
@pytest.mark.long_but_first
def test_stored_volumes_get_the_scores_of_predict_without_jmae(crop, tmp_path, capfd):
    changes = ["data.channels=1", "data.axes=PLS", "data.spacing=2.5,4,3", f"data.crop={crop}", "data.region=nonzero"]
    ends = ["data.crop_least=20,30,24", "data.crop_most=40,48,30", "data.normalise=region", "evaluation.top=0.03"]
    config, system = untrained([*VOLUMES, *changes, *ends], tmp_path / "run")
    of = score_identity(config, system, restore_results(config, system, tmp_path / "run"))
    needs = ["region"] if crop == "region" else []
    known = {
        "scores": {"a": 0.0, "b": 9.0},
        "colours": {"low": 0, "high": 1},
        "needs": needs,
        "threshold": 9.0,
        "of": of,
    }
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(known))
    names = write_scans(tmp_path)
    arguments = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", f"--like={tmp_path / 'first.nii'}"]
    assert exit_code(export.main, arguments) == 0, capfd.readouterr().err
    subprocess.run([sys.executable, "-c", SCANS, *names], cwd=tmp_path, check=True)
    predict = load(tmp_path / "run")
    for name in names:
        expected = predict(
            tmp_path / f"{name}.nii", region=None if name == "third" else tmp_path / f"{name}-region.nii"
        )
        with np.load(tmp_path / f"{name}.npz") as found:
            np.testing.assert_allclose(found["score"], expected.score, rtol=1e-4)
            np.testing.assert_allclose(found["map"], expected.map, atol=1e-4)
            assert (expected.p_value is None) == ((name == "third") == bool(needs))  # unlike the held-out normals
            np.testing.assert_allclose(found["p_value"], expected.p_value or np.nan)
            assert np.std(found["map"]) > 0


def test_volumes_are_compared_with_normals_of_the_same_region_alone():
    some, none = np.ones((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    for needs, expected in (((), (False, True)), (("region",), (True, False)), (("region", "half"), (False, False))):
        calibration = Calibration({"a": 0.0}, needs=needs)
        assert tuple(bool(export.like_normals(calibration, region)) for region in (some, none)) == expected


@pytest.mark.parametrize(
    ("arguments", "like", "why"),
    [
        (VOLUMES, (), "name one of them by --like"),
        ([*VOLUMES, "compat.averaging=true", "evaluation.error=all"], ("a.nii",), "compat.averaging"),
        ([*VOLUMES, "evaluation.masks_of=case"], ("a.nii",), "evaluation.masks_of=run"),
        ([*VOLUMES, "evaluation.residual=smoothed", "evaluation.case_score=part"], ("a.nii",), "case_score=part"),
        (IMAGES, (), ""),
        ([*IMAGES, "evaluation.masks_of=case"], (), "evaluation.masks_of=run"),
        ([*IMAGES, "evaluation.residual=smoothed", "evaluation.case_score=part"], (), "case_score=part"),
    ],
)
def test_a_way_that_cannot_be_exported_is_said(arguments, like, why):
    config, _ = recipe.parse([arguments[0], *(f"--config.{a}" for a in arguments[1:])], "")
    found = export.why_not_stored(config, load_system(config), like)
    assert (why in found) if why else (found == "")


def test_a_scan_that_no_export_can_be_like_is_refused_in_one_line(tmp_path, capfd):
    untrained([*VOLUMES, "data.join=resample"], tmp_path / "run")
    arguments = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    for name, size in (("a", (12, 9, 8)), ("b", (12, 9, 9))):
        values = np.random.default_rng(1).random(size).astype(np.float32)
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{name}.nii")
    for like, message in (
        ("a.nii;b.nii", "its sequences have several grids"),
        ("a.nii", "channels: 1 where the recipe has 2"),
        ("c.nii", "c.nii: "),
    ):
        word = ";".join(str(tmp_path / part) for part in like.split(";"))
        assert exit_code(export.main, [*arguments, f"--like={word}"]) == 2
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=o"], "no --workdir"),
        (["--workdir=w", "--out=o", "--batch=0"], "--batch=0: whole numbers above 0"),
        (["--workdir=w", "--out=o", "--batch=1,2"], "--batch=1,2: one number"),
        (["--workdir=w", "--out=o", "--platforms=cpu,abacus"], "--platforms: 'abacus' is none of cpu, cuda"),
        (["--workdir=w", "--out=o", "--size=8,x"], "--size=8,x: whole numbers"),
        (["--workdir=w", "--out=o", "--like=film.png"], "--like is for volumes"),
        (["--workdir=w", "--out=o", "--config.seed=3"], "--config.seed is fixed by the training"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, monkeypatch, capfd):
    config, _ = recipe.parse([IMAGES[0]], "")
    describe_run(config, tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    assert exit_code(export.main, flags) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "o").exists()
