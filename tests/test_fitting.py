"""What a score learns from images after the training: computed once, kept with digests, and apart from p-values."""

import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import patients
import pytest

from benchmarks import coverage
from jmae import calibration as cal
from jmae import fitting, recipe
from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.data.volumes import Volume
from jmae.errors import InputError
from jmae.inference import Scorer
from jmae.p_values import Calibration
from jmae.predict import Run
from jmae.run_folder import write_text
from jmae.seen import read_seen
from jmae.system import Fit, Sweep, System, fitted_rows, fitting_normals, train_normals
from jmae.windows import tile

WEIGHTS = {"train": {"params": {"w": np.float32([2, 3])}, "stats": {}}}


def image_system(asked=None):
    """The score is the distance to the mean of the normals' images; the fit counts its tracings."""

    def measure(results, batch, key):
        if asked is not None:
            asked.append(1)
        return {"image": batch["image"] * results["train"]["params"]["w"][0]}

    def score(results, batch, key, *, chunk=None):
        away = jnp.mean((batch["image"] - results["level"]["mean"]["image"][None]) ** 2, -1)
        return {"maps": {"far": away}, "scores": {"far": jnp.mean(away, (1, 2))}}

    fit = Fit(
        name="level",
        rows=fitting_normals,
        measure=measure,
        finish=lambda arrays, key, rows: {"mean": {"image": arrays["image"].mean(0)}},
        settings=("masks",),
    )
    return System(name="toy", stages=(), uses=(), primary="far", score=score, fits=(fit,))


def rows_of_all(normals=7):
    rows = [Row(f"v{i}", f"p{i // 2}", "val", 0, (f"v{i}",)) for i in range(normals)]
    rows += [Row("leaking", "p90", "val", 0, ("l",), leak="is in train"), Row("sick", "p91", "val", 1, ("s",))]
    return [*rows, Row("t0", "p92", "train", 0, ("t",)), Row("t1", "p93", "train", 1, ("t",))]


def image_of(row):
    return np.random.default_rng([ord(c) for c in row.id]).random((6, 5, 1)).astype(np.float32)


CASES = SimpleNamespace(case=lambda row: Prepared(row=row, array=image_of(row), geometry=None, digest=""))


@pytest.fixture
def run(tmp_path, monkeypatch):
    config, _ = recipe.parse(["--config=configs/amae.py:smoke"], "")
    config.data.size, config.evaluation.batch = (6, 5), 4
    write_text(tmp_path / "config.json", recipe.to_json(config))
    monkeypatch.setattr(fitting, "restore_stages", lambda *_: WEIGHTS)
    return config, tmp_path


def test_half_of_the_held_out_patients_are_fitted_to_and_the_others_calibrate(run):
    config, _ = run
    rows, system = rows_of_all(), image_system()
    fitted = fitted_rows(system, rows)
    assert {row.patient for row in rows if row.id in fitted} < {"p0", "p1", "p2", "p3"}
    assert len({row.patient for row in rows if row.id in fitted}) == 2
    assert fitted == fitted_rows(system, rows[::-1])
    used = cal.calibrating_rows(config, system, rows, fitted=fitted)
    free = {row.id for row, use in zip(rows, used, strict=True) if use}
    held_out = {f"v{i}" for i in range(7)}
    assert free == (held_out | {"t0"}) - fitted  # the caller passes rows of val alone
    patient = {row.id: row.patient for row in rows}
    assert not {patient[name] for name in free} & {patient[name] for name in fitted}
    assert [rows[i].id for i in train_normals(rows)] == ["t0"]


def test_a_single_held_out_patient_is_fitted_to_and_none_calibrates(run):
    config, _ = run
    rows = [row for row in rows_of_all() if row.split != "val" or row.patient == "p0"]
    fitted = fitted_rows(image_system(), rows)
    assert fitted == {row.id for row in rows if row.split == "val" and row.label == 0} != set()
    held_out = [row for row in rows if row.split == "val"]
    said: list[str] = []
    assert not any(cal.calibrating_rows(config, image_system(), held_out, said.append, fitted=fitted))
    assert "fitted to all held-out normals, so there are no p-values" in said[-1]


def test_a_fit_is_that_of_its_rows_and_is_read_again(run):
    config, folder = run
    rows, asked = rows_of_all(), []
    system = image_system(asked)
    with pytest.raises(InputError, match=r"fitted/level-\w+\.npz: not there, the score needs it: run jmae\.evaluate"):
        fitting.restore_results(config, system, folder)
    results = fitting.fitted_results(config, system, rows, folder, CASES)
    chosen = [rows[i] for i in fitting_normals(rows)]
    expected = np.mean([2 * image_of(row) for row in chosen], 0)
    np.testing.assert_allclose(results["level"]["mean"]["image"], expected, rtol=1e-6)
    assert {row.id for row in read_seen(folder)} == {row.id for row in chosen}
    count = len(asked)
    for again in (
        fitting.restore_results(config, system, folder),
        fitting.fitted_results(config, system, rows, folder, CASES),
    ):
        np.testing.assert_array_equal(again["level"]["mean"]["image"], results["level"]["mean"]["image"])
    assert len(asked) == count > 0
    result = Scorer(config, system, results, CASES).score([CASES.case(rows[0])])[0]
    np.testing.assert_allclose(result.scores["far"][0], ((image_of(rows[0]) - expected) ** 2).mean(), rtol=1e-5)
    fitting.fitted_results(config, system, rows_of_all(9), folder, CASES)  # of other rows: anew
    assert len(asked) > count


def test_a_fit_belongs_to_its_weights_settings_and_rows(run, monkeypatch):
    config, folder = run
    rows, system = rows_of_all(), image_system()
    first = fitting.fitted_results(config, system, rows, folder, CASES)
    identity = cal.score_identity(config, system, first)["weights"]
    changed = {**first, "level": jax.tree.map(lambda x: x + 1, first["level"])}
    assert identity != cal.score_identity(config, system, changed)["weights"]
    (file,) = (folder / "fitted").iterdir()
    other = config.copy_and_resolve_references()
    other.evaluation.masks += 1
    with pytest.raises(InputError, match="not there"):
        fitting.restore_results(other, system, folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"level-\w+\.npz: damaged .*: delete it and run"):
        fitting.restore_results(config, system, folder)
    file.unlink()
    fitting.fitted_results(config, system, rows, folder, CASES)
    weights = {"train": {"params": {"w": np.float32([5, 3])}, "stats": {}}}
    monkeypatch.setattr(fitting, "restore_stages", lambda *_: weights)
    with pytest.raises(InputError, match=r"belongs to other weights: run jmae\.evaluate"):
        fitting.restore_results(config, system, folder)
    config.data.manifest = "another.csv"
    with pytest.raises(InputError, match="belongs to other weights"):  # other rows never make it anew
        fitting.fitted_results(config, system, rows, folder, CASES)


def test_each_calibration_set_of_the_coverage_has_an_expectation_of_its_own_normals(run, monkeypatch):
    """`benchmarks.coverage` against NumPy: none of the normals that an expectation comes from calibrates."""
    config, folder = run
    system, n, draws, tests = image_system(), 5, 3, 7
    image = lambda label, i: np.random.default_rng([label, i]).random((6, 5, 1)).astype(np.float32)

    def drawn(run, label, numbers):
        rows = {i: Row(f"{label}-{i}", "", "test", None, (f"{i}",)) for i in numbers}
        of = lambda array: {"array": array, "geometry": None, "digest": "", "stored": Image(array, None, None, None)}
        return [Prepared(row=row, **of(image(label, i))) for i, row in rows.items()]

    monkeypatch.setattr(coverage, "drawn", drawn)
    monkeypatch.setattr(coverage, "restore_stages", lambda *_: WEIGHTS)
    fit = {"level": {"mean": {"image": np.zeros((6, 5, 1), np.float32)}}}
    one = Run(config, system, Scorer(config, system, {**WEIGHTS, **fit}), None, {}, {}, None, count())
    found = coverage.judged(one, folder, n, draws, tests)
    for number in range(draws):
        start = number * (tests + 2 * n)
        test, own, fitted = np.split(np.arange(start, start + tests + 2 * n), [tests, tests + n])
        mean = np.mean([2 * image(0, i) for i in fitted], 0)
        far = lambda label, i: ((image(label, i) - mean) ** 2).mean()  # noqa: B023
        normals = np.array([far(0, i) for i in own])
        for label in (0, 1):
            expected = [(1 + (normals >= far(label, i)).sum()) / (n + 1) for i in test]
            np.testing.assert_allclose(found[label][number], expected, rtol=1e-6)


def test_too_few_normals_are_one_line(run):
    config, folder = run
    with pytest.raises(InputError, match="level: no row to fit it to: give the manifest more normals"):
        fitting.fitted_results(config, image_system(), rows_of_all(0), folder, CASES)


def test_cases_that_the_score_was_fitted_to_have_no_p_value():
    calibration = Calibration({"a": 1.0, "b": 3.0}, fitted={"c"})
    assert calibration.p_value(2.0, "c") is calibration.p_value(2.0, "a") is None
    assert calibration.p_value(2.0, "d") == 2 / 3


# --- volumes ----------------------------------------------------------------------------------------------------------


def volume_case(row):
    size = (10, 9, 7) if row.id == "v1" else (12, 8, 6)
    array = np.random.default_rng([ord(c) for c in row.id]).random((*size, 2)).astype(np.float32)
    volume = Volume(array, *[None] * (len(Volume._fields) - 1))
    return Prepared(row=row, array=array, geometry=None, digest="", volume=volume)


def volume_run(fit, replicates=1):
    config, _ = recipe.parse([*patients.arguments("none", "none")[:1], *patients.arguments("none", "none")[2:]], "")
    config.evaluation.batch, config.replicates = 4, replicates
    score = lambda results, image, keys, groups: (image, jnp.ones((*image.shape[:-1], 1)))
    fuse = lambda results, averages, inside: {"maps": {"m": averages[..., 0]}}
    sweep = Sweep(window=(8, 8, 4), stride=(4, 4, 2), score=score, fuse=fuse)
    system = System(name="toy", stages=(), uses=(), primary="m", sweep=sweep, fits=(fit,))
    rows = [row for row in rows_of_all(3) if row.id in ("v0", "v1", "v2")]
    cases = SimpleNamespace(case=volume_case)
    return fitting.computed(config, system, fit, {}, rows, cases), rows


def test_a_fit_to_whole_volumes_sees_their_averages_and_what_lies_inside():
    def measure(results, batch, key):
        axes = tuple(range(1, batch["inside"].ndim))
        return {"sum": jnp.sum(batch["average"], axes), "count": jnp.sum(batch["inside"], axes)}

    finish = lambda arrays, key, rows: {"mean": arrays["sum"].sum(0) / arrays["count"].sum()}
    fit = Fit(name="mean", rows=fitting_normals, measure=measure, finish=finish)
    found, rows = volume_run(fit)
    arrays = [volume_case(row).array.reshape(-1, 2) for row in rows]
    np.testing.assert_allclose(found["mean"], np.concatenate(arrays).mean(0), rtol=1e-5)


def test_a_fit_to_crops_sees_windows_spread_evenly_over_each_volume():
    measure = lambda results, batch, key: {"crops": batch["image"]}
    fit = Fit(name="crops", rows=fitting_normals, measure=measure, finish=lambda arrays, key, rows: arrays, crops=3)
    found, rows = volume_run(fit)
    expected = []
    for array in (volume_case(row).array for row in rows):
        tiling = tile(array.shape[:-1], (8, 8, 4), (4, 4, 2))
        padded, n = np.pad(array, [*tiling.pad, (0, 0)]), len(tiling.origins)
        cut = lambda o: tuple(slice(k, k + w) for k, w in zip(o, (8, 8, 4), strict=True))
        expected += [padded[cut(tiling.origins[k * n // 3])] for k in range(3)]
    np.testing.assert_array_equal(found["crops"], np.stack(expected))


def test_windows_that_touch_a_lesion_are_left_out(monkeypatch):
    measure = lambda results, batch, key: {"crops": batch["image"]}
    fit = Fit(name="crops", rows=fitting_normals, measure=measure, finish=lambda arrays, key, rows: arrays, crops=3)
    whole, _ = volume_run(fit)
    plain = volume_case

    def with_lesion(row):
        case, lesion = plain(row), np.zeros(plain(row).array.shape[:-1], bool)
        lesion[0, 0, 0] = row.id == "v1"  # in the first window alone
        return replace(case, volume=case.volume._replace(lesion=lesion))

    monkeypatch.setattr(sys.modules[__name__], "volume_case", with_lesion)
    found, rows = volume_run(fit)
    first = 3 * [row.id for row in rows].index("v1")
    np.testing.assert_array_equal(found["crops"], np.delete(whole["crops"], first, 0))


def test_each_replicate_has_a_fit_of_its_own(run):
    config, _ = run
    config.replicates = 2
    rows, system = rows_of_all(), image_system()
    weights = {"train": {"params": {"w": np.float32([[2, 0], [3, 0]])}, "stats": {}}}
    found = fitting.computed(config, system, system.fits[0], weights, rows[:2], CASES)["mean"]["image"]
    mean = np.mean([image_of(row) for row in rows[:2]], 0)
    np.testing.assert_allclose(found, np.stack([2 * mean, 3 * mean]), rtol=1e-6)
