"""The sentences and tables of a page, from the figures of an evaluation."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SYSTEM_FILES = Path(__file__).parents[1] / "systems"


class Row(NamedTuple):
    """A line of the comparison: its `kind` is primary, score, baseline or chance; None where not computed."""

    name: str
    kind: str
    image: Mapping[str, Any]
    pixel: Mapping[str, Any]


def comparison_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """The primary score, the system's further scores, the baselines from best to worst, and chance."""
    row = lambda name, kind, e: Row(name, kind, e.get("image") or {}, e.get("pixel") or {})
    primary = str(evaluation["primary"])
    further = {k: e for k, e in (evaluation.get("scores") or {}).items() if k != primary}
    baselines = [row(k, "baseline", e) for k, e in (evaluation.get("baselines") or {}).items()]
    baselines.sort(key=lambda r: -(r.image.get("auroc") or 0))
    rows = [row(primary, "primary", evaluation), *(row(k, "score", e) for k, e in further.items()), *baselines]
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    pixel = evaluation.get("pixel") or {}
    by_chance = {"auroc": 0.5, "ap": pixel["prevalence"]} if pixel.get("prevalence") is not None else {}
    if (n and k) or by_chance:
        rows.append(Row("chance", "chance", {"auroc": 0.5, "ap": k / (n + k)} if n and k else {}, by_chance))
    return rows


def named_patients(evaluation: Mapping[str, Any], most: int = 40) -> list[dict[str, Any]]:
    """The patients with a lesion, at most so many, each with its "best" baseline (name, AUROC) or None."""
    rows = [row for row in evaluation.get("per_patient") or () if row["auroc"] is not None][:most]
    rated = lambda row: [
        (b["auroc"], name) for name, b in (row.get("baselines") or {}).items() if b["auroc"] is not None
    ]
    best = lambda row: max(rated(row))[::-1] if rated(row) else None
    return [{**row, "best": best(row)} for row in rows]


def voxels(evaluation: Mapping[str, Any]) -> list[str]:
    """What the pixel figures mean, in a sentence; none without them."""
    pixel = evaluation.get("pixel") or {}
    if pixel.get("auroc") is None:
        return []
    rated = [r for r in comparison_rows(evaluation) if r.kind == "baseline" and r.pixel.get("auroc") is not None]
    best = max(rated, key=lambda r: r.pixel["auroc"], default=None)
    beside = f"; the best cheap baseline, “{best.name}”, does so {100 * best.pixel['auroc']:.0f} times" if best else ""
    return [
        "Inside the region, the map gives a point of a lesion a higher value than one outside "
        f"{100 * pixel['auroc']:.0f} times in 100{beside}."
    ]


def described(system: str) -> tuple[str, str]:
    """(what a system is in a sentence, its paper up to the arXiv number), as its file begins; empty what that lacks."""
    file = SYSTEM_FILES / f"{system}.py"
    if not system.isidentifier() or not file.is_file():
        return "", ""
    what, paper, *_ = *(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n"), ""
    found = re.match(r".*?arXiv [\d.]+\d", paper, re.S)
    return " ".join(what.split()), " ".join(found[0].split()) + "." if found else ""


def without_curves(evaluation: Mapping[str, Any]) -> str | None:
    """Why there are no AUROC, AP and curves; None where there are."""
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    if n and k:
        return None
    if not (n or k):
        return "No case of this split has a label, so there is nothing to measure the scores against."
    only = "normal" if n else "abnormal"
    return f"All labelled cases of this split are {only}: AUROC, AP and their curves need both classes."


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """What the result means, in sentences for a reader who knows radiology better than statistics."""
    if reason := without_curves(evaluation):
        ranks = "The scores below only rank the cases: higher is more abnormal to the model."
        return [reason, *(voxels(evaluation) or [ranks])]
    image, n = evaluation["image"], evaluation["n_normal"] + evaluation["n_abnormal"]
    auroc, ci = image["auroc"], image.get("auroc_ci")
    lo, hi = ci if ci and None not in ci else (math.nan, math.nan)
    between = "" if math.isnan(lo) else f" (95 % interval {100 * lo:.0f} to {100 * hi:.0f})"
    words = [
        "Shown one abnormal and one normal case at random, it gives the abnormal one the higher score "
        f"{100 * auroc:.0f} times in 100{between}; a coin gets 50."
    ]
    rated = [r for r in comparison_rows(evaluation) if r.kind == "baseline" and r.image.get("auroc") is not None]
    if lo <= 0.5 <= hi:
        words.append(f"On these {n} cases that cannot be told from chance.")
    elif auroc < 0.5:
        words.append("That is worse than chance: the scores point the wrong way.")
    if rated:
        name, value = rated[0].name, rated[0].image["auroc"]
        if value >= auroc:
            words.append(f"The cheap baseline “{name}” does as well or better, with {100 * value:.0f} in 100.")
        elif value >= lo:
            words.append(
                f"The best cheap baseline, “{name}”, gets {100 * value:.0f}, which lies inside that interval: "
                "these cases do not settle which of the two is better."
            )
        else:
            words.append(f"The best cheap baseline, “{name}”, gets {100 * value:.0f}.")
    return words + voxels(evaluation)


def convergence_words(found: Mapping[str, Any]) -> list[str]:
    """How many masks, samples or repeats are enough, in sentences."""
    what, steps, close = found["what"], found["steps"], found["close"]
    last = steps[-1]
    if all(step["deviation"] == 0 and step["auroc"] == last["auroc"] for step in steps):
        return [f"The score does not depend on the {what}."]
    at = f"AUROC {last['auroc']:.3f} ± {last['se']:.3f} with the recipe’s {last['number']} {what}"
    words = [f"{at} (mean and standard error of {last['draws']} repetitions with other random numbers)."]
    found_at = next((step for step in steps if step["number"] == found["enough"]), None)
    if not found_at:
        words.append(
            f"That is too few to fix the second digit: one evaluation varies by {2 * last['deviation']:.3f} (two "
            f"standard deviations), so raise evaluation.{what}."
        )
    elif found_at is last:
        words.append(f"No fewer give an evaluation within {close:g} of that.")
    else:
        words.append(
            f"From {found_at['number']} on, one evaluation lies within {close:g} of that (difference of the means and "
            f"two standard deviations, {2 * found_at['deviation']:.3f}): more cost time and change little."
        )
    if found["rising"]:
        words.append(f"From {steps[-2]['number']} to {last['number']} it still rose: more {what} may raise it further.")
    return words


def promise(evaluation: Mapping[str, Any]) -> list[str]:
    """What a p-value is, and how often cases of either label alarmed at the promised rate; or why there are none."""
    found, table = evaluation.get("alarms"), evaluation.get("table") or []
    if not found:
        why = evaluation.get("uncalibrated")
        return [f"{why[0].upper()}{why[1:]}."] if why else []
    n, rate, threshold = found["n"], found["rate"], found.get("threshold")
    words = [
        f"A case’s p-value is the share, of {n} held-out normals and itself, that scores at least as high: of normal "
        f"cases of the same kind at most {100 * rate:g} % get one of {rate:g} or less, on average."
    ]
    if threshold is None:
        return [*words, f"So few normals cannot give one so low: that takes {math.ceil(1 / rate) - 1}."]
    counts, chance = [], 1.0
    for label, kind in ((0, "normal"), (1, "abnormal"), (None, "unlabelled")):
        p = [row["p_value"] for row in table if row["label"] == label and row.get("p_value") is not None]
        called = sum(value <= rate for value in p)
        counts += [f"{called} of {len(p)} {kind} cases"] if p else []
        if label == 0 and p:
            from scipy import stats

            k = math.floor(round(rate * (n + 1), 9))  # the threshold is the k-th highest of the n
            chance = float(stats.betabinom.sf(called - 1, len(p), k, n + 1 - k))
    words.append(f"With that alarm, at scores above {threshold:.4g}, here {' and '.join(counts)} alarmed.")
    if chance < 0.01:
        words.append(
            "So many normal alarms have a chance below 1 in 100 if these normals are like those held out: take the "
            "p-values as too low, and calibrate on normals of this kind."
        )
    return words


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value) in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        rows += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", str(value))]
    return rows


def stage_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[NDArray, NDArray]]:
    """Steps and finite losses of each stage, in order of appearance; of a step logged twice the later counts."""
    stages: dict[str, dict[int, float]] = {}
    for line in history:
        loss = line.get("loss")
        if loss is not None and math.isfinite(loss):
            stages.setdefault(str(line.get("stage", "")), {})[int(line["step"])] = float(loss)
    ordered = {stage: sorted(losses.items()) for stage, losses in stages.items()}
    return {s: (np.array([k for k, _ in x]), np.array([v for _, v in x])) for s, x in ordered.items()}


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(pair: Sequence[float | None] | None, digits: int = 3) -> str:
    return "–".join(number(v, digits) for v in pair) if pair and None not in pair else ""
