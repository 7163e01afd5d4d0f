"""Several runs, one answer: scores that are calibrated on the same held-out normals become one score, and one p-value.

The normal score of a run's score s is Phi^-1(F(s)), where F is the distribution of the run's held-out normals. The k-th
lowest of n normals has F = k / (n + 1). Between two of them the normal score is linear. Above the highest, by d
standard deviations, it is higher by log(1 + d), and likewise below the lowest. Where all normals have one score, it is
higher by 1. So one run hardly outweighs all others. The fused score is the mean of the runs' normal
scores. Its p-value is that of a conformal test in which the case and the n normals are treated alike: each of the n + 1
takes its rank among all of them in every run. So the promise of `p_values.Calibration` holds.

A warning of one run withholds a fused p-value above the alarm rate, as it does for a single run. No alarm is lost by
this, and the promise stays: fewer p-values are given, and none becomes smaller.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from jmae import metrics, recipe
from jmae.errors import InputError
from jmae.likeness import shown_line
from jmae.report.compare import Run, common_cases, labels_of, read_runs, scores_of
from jmae.run_folder import log, output_folder, write_csv, write_text
from jmae.sealed import unseal
from jmae.tables import counted, fraction

Scores = NDArray[np.float64]


def normal_scores(normals: Scores, scores: Scores) -> Scores:
    """The normal scores of scores (m,), by the held-out normals (n,) of one run."""
    known, ordered = np.unique(normals), np.sort(normals)
    rank = (
        np.searchsorted(ordered, known, "left") + 1 + np.searchsorted(ordered, known, "right")
    ) / 2  # ties: their middle
    level = ndtri(rank / (len(normals) + 1))
    deviation = float(normals.std()) if np.ptp(normals) else 0.0  # rounding gives equal numbers a deviation
    beyond = lambda distance: np.log1p(np.maximum(distance, 0) / deviation) if deviation else (distance > 0) * 1.0
    return np.interp(scores, known, level) + beyond(scores - known[-1]) - beyond(known[0] - scores)


def fused(normals: Scores, cases: Scores) -> tuple[Scores, Scores]:
    """The fused score and the p-value of each case, from scores with the digits of scores.csv: where a case and a
    normal are equal, they stay so.

    Args:
      normals: (r, n) scores of the same n held-out normals by r runs.
      cases: (r, m) scores of the cases.
    """
    from scipy.stats import rankdata  # it takes a second to import, and few commands fuse runs

    written = np.vectorize(lambda score: float(fraction(score)), otypes=[float])
    normals, cases = written(normals), written(cases)
    score = np.mean([normal_scores(own, of_cases) for own, of_cases in zip(normals, cases, strict=True)], 0)
    n, p = normals.shape[1], np.empty(cases.shape[1])
    for j in range(cases.shape[1]):
        together = np.concatenate([normals, cases[:, [j]]], 1)
        mean = ndtri(rankdata(together, axis=1) / (n + 2)).mean(0)
        p[j] = (1 + np.sum(mean[:n] >= mean[n] - 1e-12)) / (n + 1)
    return score, p


def common_normals(calibrations: Mapping[str, Mapping[str, float]]) -> tuple[list[str], Scores]:
    """(ids, scores (r, n)) of the held-out normals that all runs were calibrated on.

    Args:
      calibrations: score of each held-out normal by its id, of each run by its name.

    Raises:
      InputError: a run is not calibrated, or the runs share no held-out normal.
    """
    if without := [name for name, scores in calibrations.items() if not scores]:
        raise InputError(f"{without[0]}: is not calibrated: give its manifest val rows of label 0, and evaluate it")
    first, *others = calibrations.values()
    ids = [name for name in first if all(name in scores for scores in others)]
    if not ids:
        raise InputError("the runs share no held-out normal: train and evaluate them with one manifest")
    return ids, np.array([[scores[name] for name in ids] for scores in calibrations.values()])


def fused_line(
    line: Mapping[str, Any], of_runs: Sequence[Mapping[str, Any]], rate: float, normals: int
) -> dict[str, Any]:
    """A line of the fused scores.csv, with the warnings of the runs.

    It has no p-value where a run has none for the case, or where `likeness.shown_line` withholds it.

    Args:
      line: {"p_value", ...}, of a case.
      of_runs: its line in the scores.csv of each run, with the p-value that the run's warning withholds there.
      rate: the alarm rate.
      normals: how many were held out.
    """
    warning = "; ".join(dict.fromkeys(filter(None, (own.get("warning") for own in of_runs))))
    p_value = line["p_value"] if all(own.get("p_value") for own in of_runs) else None
    found = shown_line({**line, "p_value": p_value, "warning": warning}, rate, normals)
    return {key: "" if value is None else value for key, value in found.items()}


def whole_line(run: Run, name: str) -> dict[str, Any]:
    """A line of a run's scores.csv, with the p-value that the run's warning withholds there. An evaluation of an
    earlier version has not kept it."""
    line = run.table[name]
    return {**line, "p_value": line["p_value"] or run.metrics.get("withheld", {}).get(name)}


def fused_map(maps: Sequence[np.ndarray], scales: Sequence[tuple[float, float]]) -> np.ndarray:
    """The mean of the runs' maps, float32, each on its own colour scale: 0 is calm, 1 the high end of normals."""
    scaled = [(m - low) / (high - low) for m, (low, high) in zip(maps, scales, strict=True)]
    return np.asarray(np.mean(scaled, 0), np.float32)


def baselines_of(runs: Sequence[Run], ids: Sequence[str]) -> dict[str, Scores]:
    """The scores (n,) of the runs' baselines on the cases `ids`. A baseline that lacks one of them is left out.

    A rival of the network has other scores in each run. From the second run on its name is then "NAME of RUN".
    """
    found = dict[str, Scores]()
    for run in runs:
        lines = [(run.baselines or {}).get(name, {}) for name in ids]
        for name in lines[0]:
            if all(name in line for line in lines):
                scores = np.array([line[name] for line in lines])
                same = np.array_equal(found.setdefault(name, scores), scores)
                found |= {} if same else {f"{name} of {run.name}": scores}
    return found


def best_baseline(
    labels: NDArray[np.bool_], score: Scores, baselines: Mapping[str, Scores], patients: Sequence[str], draws: int
) -> dict[str, Any] | None:
    """How much higher the AUROC of a score is than that of the baseline with the highest one; None without any.

    Returns:
      {"name", "of" (number of baselines; "low NAME" is the other end of NAME), "auroc", "auroc_ci" (95 %, over
      patients)}.
    """
    if not baselines:
        return None
    name = max(sorted(baselines), key=lambda one: metrics.auroc(labels, baselines[one]))
    auroc, interval = metrics.paired_difference(metrics.auroc, labels, score, baselines[name], patients, draws=draws)
    number = len({one.removeprefix("low ") for one in baselines})
    return {"name": name, "of": number, "auroc": auroc, "auroc_ci": interval}


def scores_of_normals(workdir: Path) -> dict[str, float]:
    """The score of each held-out normal of a run folder, by id; {} where it is not calibrated."""
    return {str(name): float(score) for name, score in _calibration(workdir).get("scores", {}).items()}


def colours_of_file(workdir: Path) -> tuple[float, float] | None:
    """The ends of the colour scale of a run folder's maps; None without a scale."""
    ends = _calibration(workdir).get("colours", {})
    return None if ends.get("low") is None else (float(ends["low"]), float(ends["high"]))


def _calibration(workdir: Path) -> dict[str, Any]:
    file = workdir / "calibration.json"
    try:
        content = unseal(file.read_bytes(), file, None)  # `read_calibration` says where it is unchecked
        if not all(isinstance(content[key], dict) for key in ("scores", "colours")):
            raise ValueError("no scores")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is no calibration ({error!r}): delete it and run jmae.evaluate again") from None


def fused_evaluation(workdirs: Sequence[Path], out: Path, *, draws: int = 2000) -> dict[str, Any]:
    """Fuses the evaluations of several runs on the same cases. Writes scores.csv and metrics.json into `out`.

    The figures are those of the fused score and of each run. Beside them stand the paired differences of the fused
    score to each run, and to the best baseline of all runs. Intervals are of 95 %, over patients.

    Raises:
      InputError: a run is not evaluated or not calibrated, or the runs share no case or no held-out normal.
    """
    runs = read_runs(workdirs)
    ids = common_cases(runs)
    normals = common_normals({run.name: scores_of_normals(w) for run, w in zip(runs, workdirs, strict=True)})[1]
    each = np.array([scores_of(run, ids) for run in runs])
    score, p = fused(normals, each)
    labels, patients = labels_of(runs[0], ids), [runs[0].patients[name] for name in ids]
    found: dict[str, Any] = {"runs": [run.name for run in runs], "n": len(ids), "held_out_normals": normals.shape[1]}
    found["without_baselines"] = [run.name for run in runs if run.baselines is None]
    if labels.any() and not labels.all():
        figures = {"fused": score} | dict(zip(found["runs"], each, strict=True))
        found["scores"] = {name: metrics.image_metrics(labels, s, patients, draws=draws) for name, s in figures.items()}
        found["differences"] = {
            run: dict(
                zip(
                    ("auroc", "auroc_ci"),
                    metrics.paired_difference(metrics.auroc, labels, score, own, patients, draws=draws),
                    strict=True,
                )
            )
            for run, own in zip(found["runs"], each, strict=True)
        }
        found["best_baseline"] = best_baseline(labels, score, baselines_of(runs, ids), patients, draws)
    line = lambda k: {"id": ids[k], "label": int(labels[k]), "score": score[k], "p_value": p[k]}
    own = lambda k: {f"score of {run}": each[r, k] for r, run in enumerate(found["runs"])}
    rate = min(run.config["evaluation"].get("alarm_rate", 0.05) for run in runs)
    lines = [
        fused_line(line(k) | own(k), [whole_line(run, name) for run in runs], rate, normals.shape[1])
        for k, name in enumerate(ids)
    ]
    found["unlike"] = {"n": sum(bool(one["warning"]) for one in lines)}
    write_csv(out / "scores.csv", lines)
    write_text(out / "metrics.json", json.dumps(found, indent=1))
    return found


def evaluate_several(workdirs: Sequence[Path], argv: Sequence[str]) -> int:
    """Fuses the evaluations of several runs into --out, and logs the figures."""
    flags = recipe.arguments(argv, "", ["out"])
    if "out" not in flags:
        raise InputError("several runs go with --out=DIR")
    found = fused_evaluation(workdirs, output_folder(flags["out"], "evaluation"))
    for name, figures in found.get("scores", {}).items():
        log(f"  {name:<24} AUROC {figures['auroc']:.3f} [{figures['auroc_ci'][0]:.3f}, {figures['auroc_ci'][1]:.3f}]")
    for run, one in found.get("differences", {}).items():
        log(f"  fused less {run}: {one['auroc']:+.3f} [{one['auroc_ci'][0]:+.3f}, {one['auroc_ci'][1]:+.3f}]")
    if best := found.get("best_baseline"):
        ends = "[{:+.3f}, {:+.3f}]".format(*best["auroc_ci"])
        log(f"  fused less the best of {best['of']} baselines, {best['name']}: {best['auroc']:+.3f} {ends}")
    if "scores" in found and found["without_baselines"]:
        names = ", ".join(found["without_baselines"])
        log(f"  without baselines.csv: {names}: evaluate again to compare with the baselines")
    of = counted(found["n"], "cases"), counted(found["held_out_normals"], "held-out normals")
    log(f"{', '.join(of)}: {Path(flags['out']) / 'scores.csv'}")
    return 0
