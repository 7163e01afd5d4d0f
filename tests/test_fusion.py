"""Scores of several runs as one: normal scores, p-values and their promise, maps, and the commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from jmae import evaluate, fusion
from jmae.errors import InputError, exit_code
from jmae.run_folder import write_csv
from jmae.tables import csv_text


def test_a_normal_score_is_the_quantile_of_the_rank():
    normals = np.array([3.0, 1.0, 2.0, 10.0])
    expected = norm.ppf([0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(fusion.normal_scores(normals, np.array([1.0, 2, 3, 10])), expected)
    middle, low, high = fusion.normal_scores(normals, np.array([6.5, -1.0, 14.0]))
    assert middle == pytest.approx(expected[2:].mean())
    assert low == pytest.approx(expected[0] - np.log1p(2 / normals.std()))
    assert high == pytest.approx(expected[3] + np.log1p(4 / normals.std()))
    tied = fusion.normal_scores(np.array([1.0, 1.0, 2.0]), np.array([1.0]))
    assert tied == pytest.approx(norm.ppf(1.5 / 4))


def test_a_run_whose_normals_are_all_equal_does_not_decide_alone():
    normals = np.array([np.zeros(20), np.linspace(0, 1, 20)])
    score, p = fusion.fused(normals, np.array([[0.001, 0.0], [-0.1, 8.0]]))
    assert score[0] < score[1] and p[0] > p[1]
    assert fusion.normal_scores(normals[0], np.array([-3.0, 0.0, 3.0])).tolist() == [-1.0, 0.0, 1.0]


def test_fusing_one_run_keeps_its_order_and_its_p_values():
    rng = np.random.default_rng(0)
    normals, cases = rng.normal(size=(1, 30)), rng.normal(size=(1, 50)) * 3
    score, p = fusion.fused(normals, cases)
    assert (np.argsort(score) == np.argsort(cases[0])).all() and len(np.unique(score)) == 50
    np.testing.assert_allclose(p, [(1 + (normals >= s).sum()) / 31 for s in cases[0]])


@pytest.mark.long
def test_the_promise_holds_for_runs_that_agree_and_that_do_not():
    rng, p = np.random.default_rng(1), []
    for _ in range(300):
        common = rng.normal(size=40)
        both = np.stack([np.exp(common + 0.3 * rng.normal(size=40)), common + rng.normal(size=40)])
        p += list(fusion.fused(both[:, :19], both[:, 19:])[1])
    for rate in (0.05, 0.1, 0.5):
        assert np.mean(np.array(p) <= rate) == pytest.approx(rate, abs=0.012)  # 300 sets of 19: deviation about 0.003


def test_two_noisy_runs_are_better_fused():
    rng = np.random.default_rng(2)
    truth = np.repeat([0.0, 1.0], 400)
    each = np.stack([truth + rng.normal(size=800), 100 * (truth + rng.normal(size=800))])
    normals = np.stack([rng.normal(size=200), 100 * rng.normal(size=200)])
    score, _ = fusion.fused(normals, each)
    auroc = lambda s: np.mean(s[400:][:, None] > s[:400])
    assert auroc(score) > max(auroc(each[0]), auroc(each[1])) + 0.03


def test_maps_are_averaged_on_their_own_scales():
    a, b = np.array([[0.0, 2.0]]), np.array([[10.0, 30.0]])
    np.testing.assert_allclose(fusion.fused_map([a, b], [(0, 2), (10, 20)]), [[0, 1.5]])


def test_a_case_as_high_as_all_normals_has_p_value_1_though_scores_csv_has_fewer_digits():
    score = float(np.float32(0.7))  # 0.69999998807...
    read = float(csv_text([{"score": score}]).split()[1])
    p = fusion.fused(np.full((2, 19), score), np.full((2, 1), read))[1]
    assert read < score and p.tolist() == [1.0]


def test_runs_without_common_normals_are_one_line(tmp_path):
    with pytest.raises(InputError, match="b: is not calibrated"):
        fusion.common_normals({"a": {"x": 1.0}, "b": {}})
    with pytest.raises(InputError, match="share no held-out normal"):
        fusion.common_normals({"a": {"x": 1.0}, "b": {"y": 1.0}})
    ids, scores = fusion.common_normals({"a": {"x": 1.0, "z": 3.0}, "b": {"z": 5.0, "y": 2.0, "x": 4.0}})
    assert ids == ["x", "z"] and scores.tolist() == [[1, 3], [4, 5]]
    assert fusion.scores_of_normals(tmp_path) == {}
    (tmp_path / "calibration.json").write_text("[]")
    with pytest.raises(InputError, match="is no calibration"):
        fusion.scores_of_normals(tmp_path)


def test_a_fused_line_has_the_warnings_of_the_runs_and_no_calm_p_value_beside_one():
    line = lambda fused, *runs: fusion.fused_line(
        {"id": "a", "p_value": fused}, [{"p_value": p, "warning": warning} for p, warning in runs], 0.05, 100
    )
    assert line(0.3, ("0.2", ""), ("0.4", "")) == {"id": "a", "p_value": 0.3, "alarm": 0, "warning": ""}
    assert line(0.3, ("0.2", ""), ("", ""))["p_value"] == ""
    assert line(0.3, ("0.01", "mean 2"), ("0.4", "")) == {"id": "a", "p_value": "", "alarm": "", "warning": "mean 2"}
    alarm = {"id": "a", "p_value": 0.02, "alarm": 1, "warning": "mean 2"}
    assert line(0.02, ("0.01", "mean 2"), ("0.03", "mean 2")) == alarm
    assert line(0.02, (0.1, "mean 2"), (0.01, ""))["p_value"] == 0.02, "an alarm, though one run's own is none"
    assert fusion.fused_line({"p_value": 0.3}, [{"p_value": "0.2"}], 0.05, 100)["warning"] == "", "an older evaluation"


def evaluated(folder: Path, normals: np.ndarray, score: float, p_value: float, warning: str, kept: bool) -> Path:
    """A run folder with an evaluation of two cases: "odd" has the score, and "usual" that of the lowest normal. A
    p-value that a warning withholds is `kept` in metrics.json, or not, as earlier versions did."""
    (folder / "evaluation").mkdir(parents=True)
    calibration = {"scores": {f"n{i}": float(s) for i, s in enumerate(normals)}, "colours": {}}
    (folder / "calibration.json").write_text(json.dumps(calibration))
    withheld = warning and p_value > 0.05
    lines = [
        {"id": "odd", "label": 1, "score": score, "p_value": "" if withheld else p_value, "warning": warning},
        {"id": "usual", "label": 0, "score": float(normals.min()), "p_value": 1.0, "warning": ""},
    ]
    write_csv(folder / "evaluation" / "scores.csv", lines)
    write_csv(folder / "evaluation" / "cases.csv", [{"id": i, "patient": "", "image": i} for i in ("odd", "usual")])
    (folder / "evaluation" / "config.json").write_text(json.dumps({"evaluation": {"alarm_rate": 0.05}}))
    metrics = {"withheld": {"odd": p_value}} if withheld and kept else {}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("kept", [True, False])
def test_a_warning_of_one_run_costs_no_alarm_of_all_runs(tmp_path, kept):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 99))
    runs = [
        evaluated(tmp_path / "a", a, float(np.sort(a)[-7]), 0.08, "more pixels", kept),
        evaluated(tmp_path / "b", b, float(b.max() + 1), 0.01, "", kept),
    ]
    fusion.fused_evaluation(runs, tmp_path / "out", draws=10)
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        odd, usual = csv.DictReader(file)
    assert odd["warning"] == "more pixels" and float(usual["p_value"]) > 0.9
    assert (float(odd["p_value"]) <= 0.05) if kept else odd["p_value"] == ""


def test_the_fused_score_is_compared_with_the_best_baseline_of_all_runs(tmp_path, capsys):
    rng, n = np.random.default_rng(0), 40
    ids, labels = [f"c{i}" for i in range(n)], np.arange(n) % 2
    contrast, good = rng.normal(size=n), labels * 2 + rng.normal(size=n)
    others = {  # "raw" belongs to a run's network; one baseline lacks a case, and one is the other end of another
        "a": {"contrast": contrast, "low contrast": -contrast, "raw": rng.normal(size=n), "holes": ["", *labels[1:]]},
        "b": {"contrast": contrast, "raw": good, "holes": ["", *labels[1:]]},
    }
    runs, scores = [], labels + rng.normal(size=(2, n))
    for (name, columns), own in zip(others.items(), scores, strict=True):
        folder = tmp_path / name
        evaluated(folder, rng.normal(size=99), 0, 0.5, "", True)
        lines = [{"id": i, "label": labels[k], "score": own[k], "p_value": 0.5} for k, i in enumerate(ids)]
        write_csv(folder / "evaluation" / "scores.csv", lines)
        write_csv(folder / "evaluation" / "cases.csv", [{"id": i, "patient": i, "image": i} for i in ids])
        lines = [{"id": i} | {key: each[k] for key, each in columns.items()} for k, i in enumerate(ids)]
        write_csv(folder / "evaluation" / "baselines.csv", lines)
        runs.append(folder)
    command = [*(f"--workdir={run}" for run in runs), f"--out={tmp_path / 'out'}"]
    assert exit_code(evaluate.main, command) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    best = found["best_baseline"]
    assert (best["name"], best["of"]) == ("raw of b", 3)
    auroc = roc_auc_score(labels, good)
    assert best["auroc"] == pytest.approx(found["scores"]["fused"]["auroc"] - auroc)
    assert best["auroc_ci"][0] < best["auroc"] < best["auroc_ci"][1]
    assert f"  fused less the best of 3 baselines, raw of b: {best['auroc']:+.3f} [" in capsys.readouterr().err
    files = [run / "evaluation" / "baselines.csv" for run in runs]
    files[0].write_text(files[0].read_text().replace("c1,", "c1,x"))
    assert exit_code(evaluate.main, command) == 2
    assert f"{runs[0]}: no complete evaluation (could not convert" in capsys.readouterr().err
    for file in files:
        file.unlink()
    assert exit_code(evaluate.main, command) == 0
    assert "without baselines.csv: a, b: evaluate again to compare" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["best_baseline"] is None
