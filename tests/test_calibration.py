"""What p-values promise, how a run gets them, and that `evaluate` and `predict` never take them from anything else."""

import csv
import json
import shutil
from dataclasses import replace
from math import floor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_evaluate import SYSTEM, config

from jmae import calibration as cal
from jmae import evaluate as ev
from jmae.data.cases import load_rows
from jmae.data.files.grids import Geometry
from jmae.data.manifest import Row, leaks
from jmae.data.preparation import Prepared
from jmae.data.rows import kept_apart
from jmae.errors import InputError
from jmae.inference import Scorer, score_rows
from jmae.p_values import Calibration, alarm_threshold, colour_ends, p_values
from jmae.system import System

# --- the guarantee ----------------------------------------------------------------------------------------------------


def test_false_alarms_are_as_promised_on_average_and_as_beta_says_for_one_set():
    """Continuous scores: exactly floor(a (n + 1)) / (n + 1) on average; tied ones: no more."""
    rng, n, draws, tests = np.random.default_rng(0), 60, 2000, 1000
    test, sets = rng.lognormal(size=tests), rng.lognormal(size=(draws, n))
    for rate in (0.05, 0.1, 0.2):
        k = floor(rate * (n + 1))
        each = np.array([(p_values(normals, test) <= rate).mean() for normals in sets])
        promised, variance = k / (n + 1), k * (n + 1 - k) / (n + 1) ** 2 / (n + 2)
        assert abs(each.mean() - promised) < 3 * np.sqrt(variance / draws + promised * (1 - promised) / tests)
        uniform = 1 - np.array(
            [alarm_threshold(normals, rate) for normals in rng.random((draws, n))]
        )  # each set's rate
        assert uniform.mean() == pytest.approx(promised, abs=4 * np.sqrt(variance / draws))
        assert uniform.std() == pytest.approx(np.sqrt(variance), rel=0.1)
        tied = [(p_values(np.round(normals), np.round(test)) <= rate).mean() for normals in sets]
        assert np.mean(tied) < promised


def test_a_p_value_is_the_share_of_cases_that_score_as_high():
    assert p_values([3, 1, 2], [0, 1, 1.5, 3, 4]).tolist() == [1, 1, 0.75, 0.5, 0.25]
    calibration = Calibration({"a": 3.0, "b": 1.0, "c": 2.0})
    assert calibration.p_value(2.5) == 0.5 and calibration.p_value(2.5, "b") is None


@pytest.mark.parametrize("n", [1, 9, 19, 60, 99])
def test_an_alarm_is_a_score_above_the_threshold(n):
    rng = np.random.default_rng(n)
    normals = rng.integers(0, 30, n).astype(float)  # ties among them
    for rate in (0.01, 0.05, 0.1, 0.29, 0.5, 0.9):
        threshold, p = alarm_threshold(normals, rate), p_values(normals, np.arange(-1, 32))
        if threshold is None:
            assert (p > rate).all() and n + 1 < 1 / rate
        else:
            assert ((p <= rate) == (np.arange(-1, 32) > threshold)).all()


def test_the_colour_scale_keeps_normal_maps_below_its_end():
    lows, highs = np.arange(100) / 100, 1 + np.arange(100) / 100
    low, high = colour_ends(lows, highs)
    assert low == 0.495 and (highs <= high).mean() >= 0.95 and high < 2
    assert colour_ends([0.0], [0.0]) == (0.0, 1.0), "a scale has two ends"


# --- held-out normals -------------------------------------------------------------------------------------------------


def row(name: str, patient: str = "", split: str = "train", label: int | None = 0) -> Row:
    return Row(name, patient, split, label, (f"/{name}.png",))


def test_a_share_of_whole_normal_patients_is_kept_apart():
    rows = [row(f"{i}-{k}", f"p{i}", label=None if i == 3 else 0) for i in range(20) for k in range(2)]
    sick = [row("sick", "p5", label=1), row("test", "q", "test", 1)]
    after = kept_apart([*rows, *sick], 0.2)
    apart = [r for r in after if r.split == "val"]
    assert len({r.patient for r in apart}) == 4 and len(apart) == 8 and all(r.label == 0 for r in apart)
    assert not {r.patient for r in apart} & {r.patient for r in after if r.split == "train"}
    assert "p5" not in {r.patient for r in apart} and [r.id for r in after] == [r.id for r in [*rows, *sick]]
    for share, these, problem in (
        (1.0, rows, "is no share"),
        (-0.1, rows, "is no share"),
        (0.1, rows[:9], "fewer than"),
    ):
        with pytest.raises(InputError, match=problem):
            kept_apart(these, share)


def test_a_recipe_keeps_train_patients_apart(tools, tmp_path):
    manifest = tools.write_set(tmp_path / "set", {("train", 0): 24, ("test", 0): 1, ("test", 1): 1})
    said: list[str] = []
    c = config(manifest, (16, 16), 1, **{"data.calibration": 0.25})
    rows = load_rows(c, said.append)
    assert sum(r.split == "val" for r in rows) == 6 and sum(r.split == "train" for r in rows) == 18
    assert said[-1] == "data.calibration: 6 train rows kept apart, as normals of val"
    assert sum(r.split == "val" for r in load_rows(config(manifest, (16, 16), 1), said.append)) == 0
    held, trained = (next(r for r in rows if r.kept is kept and r.label == 0) for kept in (True, False))
    shutil.copy(held.image[0], trained.image[0])  # no user wrote the split val, so the message names the setting
    with pytest.raises(InputError, match=r"are identical, and data\.calibration holds out one: delete the row of one"):
        load_rows(c, said.append)


def test_a_leak_names_the_splits_of_the_manifest():
    apart, other, test = row("a")._replace(split="val", kept=True), row("b"), row("t", split="test", label=1)
    same = {"image": ("/one.png",), "patient": ""}
    (one,) = leaks([apart._replace(**same), other._replace(**same)])
    assert one.what.startswith("image '/one.png' is twice in train, and data.calibration holds out one: list it once")
    (one,) = leaks([apart._replace(**same), test._replace(**same)])
    assert one.what == "image '/one.png' is in train and test: keep it in one split"


# --- in a run ---------------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as table:
        return list(csv.DictReader(table))


@pytest.fixture(scope="module")
def calibrated(tools, tmp_path_factory):
    """(recipe, rows, run folder) of a system of one line, evaluated on `test` with 12 normals in `val`."""
    folder = tmp_path_factory.mktemp("calibrated")
    counts = {("train", 0): 4, ("val", 0): 12, ("test", 0): 4, ("test", 1): 4}
    c = config(tools.write_set(folder / "set", counts), (16, 16), 1, **{"evaluation.alarm_rate": 0.2})
    rows = load_rows(c, lambda line: None)
    ev.evaluate(c, SYSTEM, rows, folder, split="test", out=folder / "evaluation")
    return c, rows, folder


def test_an_evaluation_calibrates_on_the_normals_of_val(calibrated):
    c, rows, folder = calibrated
    about = json.loads((folder / "calibration.json").read_text())
    normals = [r for r in rows if r.split == "val"]
    scores = np.array([result.scores["bright"][0] for result in score_rows(Scorer(c, SYSTEM, {}), normals)])
    assert about["scores"] == {r.id: float(s) for r, s in zip(normals, scores, strict=True)}
    assert (about["n"], about["alarm_rate"], about["threshold"]) == (12, 0.2, float(np.sort(scores)[-2]))
    table = lines(folder / "evaluation" / "scores.csv")
    for line in table:
        assert line["p_value"] == f"{(1 + np.sum(scores >= float(line['score']))) / 13:.9g}"
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    called = [float(line["p_value"]) <= 0.2 for line in table if line["label"] == "0"]
    assert metrics["alarms"]["normal"] == np.mean(called) and metrics["alarms"]["n"] == 12
    assert "held-out normals" in (folder / "evaluation" / "report.html").read_text()


def test_normals_that_calibrated_the_run_are_scored_again_only_where_something_changed(
    calibrated, tmp_path, monkeypatch
):
    c, rows, before = calibrated
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    scored = list[str]()

    def counted(scorer, chosen, **further):
        scored.extend(row.split for row in chosen)
        return score_rows(scorer, chosen, **further)

    monkeypatch.setattr(ev, "score_rows", counted)

    def again(rows=rows, **settings):
        """The numbers of test rows and of normals that an evaluation scores, and what it leaves in calibration.json."""
        scored.clear()
        changed = c.copy_and_resolve_references()
        changed.evaluation.update(settings)
        ev.evaluate(changed, SYSTEM, rows, folder, split="test", out=folder / "evaluation")
        return scored.count("test"), scored.count("val"), json.loads((folder / "calibration.json").read_text())

    about = json.loads((before / "calibration.json").read_text())
    assert again() == (8, 0, about)
    assert (folder / "evaluation/scores.csv").read_text() == (before / "evaluation/scores.csv").read_text()
    first, second, *_ = (row for row in rows if row.split == "val")
    without = [row for row in rows if row != first]
    assert again(without)[1:] == (11, again(without)[2]) and first.id not in again(without)[2]["scores"]
    assert again()[1:] == (12, about)
    leaking = [row._replace(leak="seen") if row == first else row for row in rows]
    assert again(leaking)[1] == 12 and again(leaking)[2]["n"] == 11
    assert again()[1:] == (12, about)
    other = [row._replace(image=second.image) if row == first else row for row in rows]
    assert again(other)[1] == 12 and again(other)[2]["scores"][first.id] != about["scores"][first.id]
    assert again(alarm_rate=0.5)[2]["threshold"] < about["threshold"] == again()[2]["threshold"]
    assert again(mask_least=3.0)[1] == 12, "a training that goes on may change it"
    assert again()[1:] == (12, about) and again()[1] == 0
    older = {key: value for key, value in about.items() if key not in ("inputs", "content_sha256")}
    (folder / "calibration.json").write_text(json.dumps(older))
    assert again()[1:] == (12, about)
    (folder / "calibration.json").unlink()
    assert again()[1:] == (12, about)


def test_a_run_whose_normals_have_all_left_val_keeps_no_old_p_values(calibrated, tmp_path, capfd):
    c, rows, before = calibrated
    folder, file = tmp_path / "run", tmp_path / "run" / "calibration.json"
    shutil.copytree(before, folder)
    evaluate = lambda rows: ev.evaluate(c, SYSTEM, rows, folder, split="test", out=folder / "evaluation")
    without = [r for r in rows if r.split != "val"]
    assert "uncalibrated" in evaluate(without) and not file.exists()
    said = capfd.readouterr().err
    assert f"warning: {file}: removed, as none of its normals is kept from the training any more\n" in said
    assert {line["p_value"] for line in lines(folder / "evaluation" / "scores.csv")} == {""}
    assert evaluate(rows)["alarms"]["n"] == 12 and file.exists(), "the normals are back"
    ev.evaluate(c, SYSTEM, rows, folder, split="val", out=tmp_path / "val")
    assert file.exists(), "the split val calibrates nothing"
    cal.calibrate_run(c, SYSTEM, without, folder)  # a training that goes on
    assert not file.exists() and "removed, as none" in capfd.readouterr().err


def test_whatever_changes_the_score_of_a_normal_changes_its_digest():
    values = np.zeros((4, 4, 1), np.float32)
    case = Prepared(row=row("a"), array=values, geometry=Geometry((4, 4), (1.0, 1.0), np.eye(4)), digest="stored")
    others = [
        {"row": row("b")},
        {"row": row("a")._replace(extra={"midline": "2"})},
        {"array": values + 1},
        {"digest": "other"},
        {"region": np.ones((4, 4), bool)},
        {"region": np.zeros((4, 4), bool)},
        {"geometry": Geometry((4, 4), (1.0, 2.0), np.eye(4))},
        {"geometry": Geometry((4, 4), (1.0, 1.0), 2 * np.eye(4))},
        {"geometry": Geometry((4, 4))},
    ]
    assert len({cal.inputs_digest(one) for one in [case, *(replace(case, **other) for other in others)]}) == 10
    renamed = replace(case, row=row("a", patient="p", label=None)._replace(image=("/moved.png",)))
    assert cal.inputs_digest(renamed) == cal.inputs_digest(case)


def test_the_normals_themselves_and_other_settings_or_weights_have_no_p_value(calibrated, tmp_path, capfd):
    c, rows, folder = calibrated
    p = lambda name: [line["p_value"] for line in lines(tmp_path / name / "scores.csv")]
    ev.evaluate(c, SYSTEM, rows, folder, split="val", out=tmp_path / "val")
    assert set(p("val")) == {""} and "kept from the training to give" not in capfd.readouterr().err
    ev.evaluate(c, SYSTEM, rows, folder, split="test", out=tmp_path / "other", of_run=False)
    assert p("other") == [line["p_value"] for line in lines(folder / "evaluation" / "scores.csv")]
    changed = c.copy_and_resolve_references()
    changed.evaluation.masks = 9
    capfd.readouterr()
    for weights in ({}, {"fitted": {"bank": np.ones(2)}}):  # other settings may need another fit: they are the reason
        assert cal.read_calibration(changed, SYSTEM, weights, folder) is None
        assert "belongs to another evaluation.masks: no p-values" in capfd.readouterr().err
    assert cal.read_calibration(c, SYSTEM, {"a": {"params": np.ones(2)}}, folder) is None
    assert "belongs to other weights" in capfd.readouterr().err
    changed.evaluation.masks, changed.evaluation.batch = c.evaluation.masks, 1
    assert cal.read_calibration(changed, SYSTEM, {}, folder).scores
    old = json.loads((folder / "calibration.json").read_text())
    del old["content_sha256"]
    old["of"]["settings"]["filter"] = [3, 3, 2]  # a key that had no effect, of an earlier version
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    assert cal.read_calibration(c, SYSTEM, {}, tmp_path).scores
    del old["of"]["settings"]["definition"]  # of a version whose scores were others
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    assert cal.read_calibration(c, SYSTEM, {}, tmp_path) is None
    assert "has the scores of another version of jmae: no p-values; run jmae.evaluate" in capfd.readouterr().err


def test_a_score_that_is_not_finite_is_refused_with_and_without_a_label():
    for label in (None, 0, 1):
        row, scores = Row("a", "", "test", label, ("a.png",)), {"bright": np.array([1.0, np.nan])}
        with pytest.raises(InputError, match=r"a\.png: its score bright is not finite"):
            cal.score_line(row, scores, SYSTEM, None)


def test_damaged_calibrations_and_rates_are_refused_in_one_line(calibrated, tmp_path):
    c, _, folder = calibrated
    whole = json.loads((folder / "calibration.json").read_text())
    del whole["content_sha256"]  # whose place is in test_trust.py
    for text in (
        "",
        "[]",
        "{}",
        json.dumps(whole)[:-9],
        json.dumps(whole | {"scores": {}}),
        json.dumps(whole | {"scores": {"a": float("nan")}}),
        json.dumps(whole | {"scores": [1, 2]}),
        json.dumps(whole | {"of": 3}),
    ):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(InputError, match="is no calibration") as error:
            cal.read_calibration(c, SYSTEM, {}, tmp_path)
        assert "\n" not in str(error.value)
    for rate in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="is no rate"):
            cal.alarm_rate(config(Path("none"), (8, 8), 1, **{"evaluation.alarm_rate": rate}))


def test_a_run_without_labels_to_test_is_calibrated_too_and_few_normals_are_said(calibrated, tmp_path, capfd):
    c, rows, folder = calibrated
    cal.calibrate_run(c, SYSTEM, rows, tmp_path)
    one, two = (json.loads((place / "calibration.json").read_text()) for place in (tmp_path, folder))
    assert one == two
    strict = c.copy_and_resolve_references()
    strict.evaluation.alarm_rate = 0.01
    cal.tell_p_values(strict, SYSTEM, rows)  # before the training
    remedy = "give 198 normal scans or more, and keep half of them from the training (data.calibration=0.5)"
    why = "12 normal scans kept from the training cannot give a p-value of 0.01 (smallest possible p-value 0.077)"
    assert f"warning: {why}: {remedy}\n" in capfd.readouterr().err
    cal.calibrate_run(strict, SYSTEM, rows, tmp_path)  # after the training
    said = capfd.readouterr().err
    anew = "(anew, as the weights, the settings or these normals have changed)"
    assert "calibrated on 12 held-out normals (smallest possible p-value 0.077): " in said and "give " not in said
    assert f"calibration.json {anew}\n" in said
    cal.calibrate_run(strict, SYSTEM, rows, tmp_path)
    assert "anew" not in capfd.readouterr().err
    assert json.loads((tmp_path / "calibration.json").read_text())["threshold"] is None
    (tmp_path / "calibration.json").unlink()
    cal.calibrate_run(c, SYSTEM, [r for r in rows if r.split != "val"], tmp_path)
    none = "no normal scan is kept from the training to give p-values"
    assert f"{none}\n" in capfd.readouterr().err and not (tmp_path / "calibration.json").exists()
    told: list[str] = []
    assert cal.read_calibration(c, SYSTEM, {}, tmp_path, told.append) is None
    assert "the evaluation did not finish: jmae evaluate --workdir" in told[0]  # it cannot tell which
    cal.tell_p_values(c, SYSTEM, [r for r in rows if r.split != "val"])
    assert f"warning: {none}: give 10 normal scans or more" in capfd.readouterr().err


def test_equal_highest_values_of_the_normals_and_too_few_normals_are_said():
    of = lambda peaks: cal.why_no_masks(Calibration({}, peaks=peaks), 0.05)
    spread = [0.5 + k / 100 for k in range(21)]
    assert of([*spread, 0.99998, 1.0]) == (
        "the highest values of several maps of 23 held-out normals are equal (1), so masks of new cases stay empty: "
        "train longer"
    )
    assert of(spread) == "" == of([])
    assert cal.why_no_masks(None, 0.05).startswith("no masks: without a calibration")
    assert of([cal.LOWEST] * 30) == "", "these maps have no component of the least size"
    assert of([1.0] * 8) == "no masks: 8 held-out normals, 19 are needed"


def test_only_normals_that_nothing_was_chosen_by_calibrate(capfd):
    row = lambda name, label, kept=False: Row(name, "", "val", label, ("x.png",), kept=kept)
    rows = [row("a", 0), row("b", 1), row("c", 0, kept=True)]
    plain = System(name="toy", stages=(), uses=(), primary="bright")
    c = ConfigDict({"select": "auroc"})
    assert cal.calibrating_rows(c, plain, rows) == [True, False, True]
    chosen = replace(plain, stages=(SimpleNamespace(name="judge", splits=("train", "val")),), uses=("judge",))
    assert cal.calibrating_rows(c, chosen, rows) == [False, False, True]
    assert "only train rows kept apart give p-values" in capfd.readouterr().err
    leaking = [rows[0]._replace(leak="patient 'p' is in train and val"), row("d", 0), rows[2]]
    assert cal.calibrating_rows(c, plain, leaking) == [False, True, True], "the run has seen that row"
    assert "1 normal of val in another split, too" in capfd.readouterr().err
    # Without an abnormal row of val nothing was chosen.
    assert cal.calibrating_rows(c, chosen, rows[::2]) == [True, True]


def test_alarms_leave_out_cases_without_a_p_value_and_needed_columns_are_asked_for(capfd):
    rows = [Row(name, "", "test", int(name > "b"), ("x.png",)) for name in "abcd"]
    labels = np.array([0, 0, 1, 1])
    calibration = Calibration({"a": 1.0, "n": 2.0, "m": 3.0})
    found = cal.alarms(labels, [None, 0.5, 0.25, 1.0], calibration, 0.25)
    assert (found["normal"], found["abnormal"]) == (0, 0.5)
    assert found["counts"] == {"normal": [0, 1], "abnormal": [1, 2], "unlabelled": [0, 0]}
    assert cal.alarms(labels, [None] * 4, calibration, 0.25) is None
    system = System(name="toy", stages=(), uses=(), primary="bright")
    line = lambda row, c: cal.score_line(row, {"bright": np.array([2.5])}, system, c)["p_value"]
    assert line(rows[1], calibration) == 0.5
    assert line(rows[0], calibration) is None and "a: no p-value: it has the name" in capfd.readouterr().err
    within = calibration._replace(needs=("region", "midline"))
    assert line(rows[1], within) is None
    located = rows[1]._replace(region="r.nii", extra={"midline": "middle"})
    assert line(located, within) == 0.5
    system = replace(system, sweep=SimpleNamespace())
    assert line(located, calibration) is None and line(located, within) == 0.5
    assert "b: no p-value: it has a region, which the held-out normals did not have" in capfd.readouterr().err
