"""The sentences and the table rows of a page, from the figures of an evaluation.

`evaluation` is always the content of `metrics.json`; some functions also need its `table` of cases (see
`page.write_report`).
"""

import ast
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jmae import recipe
from jmae.likeness import REMEDY, unlike_text
from jmae.p_values import few_to_learn, more_normals, too_few_normals
from jmae.tables import counted

FEW_LABELS = 10  # cases of a class; fewer get a notice
MINUTES = 15  # the longest training of a preset `small` with all steps, on two idle CPU cores
LEAST_SHARE = 0.1  # of the steps of `small`, below which a training is called short
SYSTEM_FILES = Path(__file__).parents[1] / "systems"

# --- rows of tables ---------------------------------------------------------------------------------------------------


class ScoreRow(NamedTuple):
    """A row of the table of scores and baselines."""

    name: str
    kind: str  # "primary", "score", "baseline" or "chance"
    image: Mapping[str, Any]  # figures of images, as in `metrics.json`; empty where not computed
    pixel: Mapping[str, Any]  # figures of pixels


def comparison_rows(evaluation: Mapping[str, Any]) -> list[ScoreRow]:
    """The primary score, the other scores of the system, the baselines from best to worst, and chance."""
    row = lambda name, kind, e: ScoreRow(name, kind, e.get("image") or {}, e.get("pixel") or {})
    primary = str(evaluation["primary"])
    others = {k: e for k, e in (evaluation.get("scores") or {}).items() if k != primary}
    baselines = [row(k, "baseline", e) for k, e in (evaluation.get("baselines") or {}).items()]
    baselines.sort(key=lambda r: -(r.image.get("auroc") or 0))
    rows = [row(primary, "primary", evaluation), *(row(k, "score", e) for k, e in others.items()), *baselines]
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    pixel = evaluation.get("pixel") or {}
    pixel_chance = {"auroc": 0.5, "ap": pixel["prevalence"]} if pixel.get("prevalence") is not None else {}
    if (n and k) or pixel_chance:
        image_chance = {"auroc": 0.5, "ap": k / (n + k)} if n and k else {}
        rows.append(ScoreRow("chance", "chance", image_chance, pixel_chance))
    return rows


def patient_rows(evaluation: Mapping[str, Any], most: int = 40) -> list[dict[str, Any]]:
    """The first `most` patients with a lesion; "best" is the best baseline of a patient, (name, AUROC) or None."""
    rows = [row for row in evaluation.get("per_patient") or () if row["auroc"] is not None][:most]
    baselines = lambda row: [
        (b["auroc"], name) for name, b in (row.get("baselines") or {}).items() if b["auroc"] is not None
    ]
    best = lambda row: max(baselines(row))[::-1] if baselines(row) else None
    return [{**row, "best": best(row)} for row in rows]


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value), in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        rows += flat_settings(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", str(value))]
    return rows


def stage_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[NDArray, NDArray]]:
    """Steps and finite losses of each stage, from the lines of `metrics.jsonl`, in order of appearance.

    Where a step was logged twice, the later line counts.
    """
    stages: dict[str, dict[int, float]] = {}
    for line in history:
        loss = line.get("loss")
        if loss is not None and math.isfinite(loss):
            stages.setdefault(str(line.get("stage", "")), {})[int(line["step"])] = float(loss)
    ordered = {stage: sorted(losses.items()) for stage, losses in stages.items()}
    return {s: (np.array([k for k, _ in x]), np.array([v for _, v in x])) for s, x in ordered.items()}


def explained_sentences(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of the variance of hidden voxels the last look at held-out normals explained; none without a look."""
    looks = [line for line in history if explained_shares(line)]
    if not looks:
        return []
    return [
        f"Of held-out normals, the network explained this share of the variance of hidden voxels at step "
        f"{looks[-1]['step']}: {explained_shares(looks[-1])}.",
        "A share of 1 would be perfect. At 0 or below the network predicts no better than their mean: a map is then "
        "little more than the squared distance to the mean.",
    ]


def learnt_sentence(history: Sequence[Mapping[str, Any]]) -> str:
    """How well the network has learnt its task, beside nothing and all; "" where the training did not look."""
    for line in reversed(history):
        if "best_dice" in line:
            constant = f"A constant map has {line['dice_of_constant']:.2f}. " if "dice_of_constant" in line else ""
            return (
                f"The training: on drawn anomalies the network reaches a Dice of {line['best_dice']:.2f}. {constant}1 "
                "is perfect. Whole trainings on chest X-rays and colonoscopy reached 0.55 to 0.75. Real anomalies look "
                "different."
            )
        if shares := explained_shares(line):
            reached = f"of held-out normals, the network explains this share of the variance of hidden voxels: {shares}"
            return f"The training: {reached} (0: no better than their mean, 1: perfect)."
    return ""


def explained_shares(line: Mapping[str, Any]) -> str:
    """The shares of the variance of hidden voxels in a line of `metrics.jsonl`, one a channel; "" without them."""
    shares = [f"{value:.2f}" for key, value in line.items() if key.startswith("explained_variance")]
    return " and ".join(shares) + (" (in the order of the channels)" if len(shares) > 1 else "")


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval_text(pair: Sequence[float | None] | None, digits: int = 3) -> str:
    """An interval as "0.812–0.934"; "" where it is not known."""
    return "–".join(number_text(v, digits) for v in pair) if pair and None not in pair else ""


# --- sentences --------------------------------------------------------------------------------------------------------


def system_description(system: str) -> tuple[str, str]:
    """(what a system is, in one sentence; its paper up to the arXiv number), both from the docstring of its file.

    A part that the docstring lacks is "". The file of a system outside of the library is that of its imported module.
    """
    file = SYSTEM_FILES / f"{system}.py"
    if not system.isidentifier() or not file.is_file():
        file = Path(getattr(sys.modules.get(system), "__file__", None) or "")
    if not file.is_file():
        return "", ""
    what, paper, *_ = *(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n"), ""
    citation = re.match(r".*?arXiv [\d.]+\d", paper, re.S)
    return " ".join(what.split()), " ".join(citation[0].split()) + "." if citation else ""


def no_curves_reason(evaluation: Mapping[str, Any]) -> str | None:
    """Why AUROC, AP and curves cannot be computed; None where they can."""
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    if n and k:
        return None
    if not (n or k):
        return "No case of this split has a label, so there is nothing to compare the scores with."
    return (
        f"All labelled cases of this split are {'normal' if n else 'abnormal'}. "
        "AUROC, AP and their curves need both classes."
    )


def result_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """What the result means, for a reader who knows radiology better than statistics."""
    first = [*rival_sentences(evaluation), *hidden_sentences(evaluation)]
    if reason := no_curves_reason(evaluation):
        ranks = [
            "The scores below only rank the cases: the model finds a case with a higher score more abnormal.",
            "Nothing here shows that this order is better than chance: labelled scans would show it. A second training "
            "with another --config.seed shows which alarms stay.",
        ]
        return [*first, reason, *(pixel_sentences(evaluation) or ranks)]
    image, n = evaluation["image"], evaluation["n_normal"] + evaluation["n_abnormal"]
    auroc, ci = image["auroc"], image.get("auroc_ci")
    lo, hi = ci if ci and None not in ci else (math.nan, math.nan)
    interval = "" if math.isnan(lo) else f" (95 % interval {100 * lo:.0f} to {100 * hi:.0f})"
    sentences = [
        "Take one abnormal and one normal case at random: the abnormal case has the higher score "
        f"{100 * auroc:.0f} times in 100{interval}. Chance gives 50."
    ]
    if lo <= 0.5 <= hi:
        sentences.append(f"{counted(n, 'cases')} cannot tell this result from chance.")
    elif auroc < 0.5:
        sentences.append("That is worse than chance: the scores point the wrong way.")
    return [*first, *sentences, *pixel_sentences(evaluation)]


def rival_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """Whether the primary score, and its map, are better than the best of all baselines and rivals.

    They are where the 95 % interval of the paired difference of AUROC lies above 0. No sentence without a baseline.
    """
    rivals, sentences = evaluation.get("best_rival") or {}, []
    image, pixel = rivals.get("image"), rivals.get("pixel")
    if image and image["auroc"] is not None:
        sentences.append(f"{evaluation['primary']} is {against(image)} (AUROC, 95 % interval).")
    if pixel and pixel["auroc"] is not None:
        of = f"pixel AUROC, mean over {counted(pixel['n'], evaluation.get('resampled', 'patients'))}, 95 % interval"
        sentences.append(f"Its map is {against(pixel)} ({of}).")
    return sentences


def against(best: Mapping[str, Any]) -> str:
    """ "better than X ... by D [LOW, HIGH]", or "not better than X ...: D [LOW, HIGH]"."""
    low, high = best["auroc_ci"] if None not in best["auroc_ci"] else (math.nan, math.nan)
    rival = f"“{best['name']}”" + (f", the best of {best['of']} baselines and rivals" if best["of"] > 1 else "")
    difference = f"{best['auroc']:+.3f}" + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")
    return f"better than {rival}, by {difference}" if low > 0 else f"not better than {rival}: {difference}"


def hidden_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """How much of the variance of hidden patches of held-out normals the network and its rivals explain."""
    shares = evaluation.get("explained") or {}
    if not shares:
        return []
    each = ", ".join(f"{name} {value:.2f}" for name, value in shares.items() if value is not None)
    return [f"Share of the variance of hidden patches that is explained (1 is perfect), of held-out normals: {each}."]


def pixel_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """What the figures of pixels mean; no sentence without them."""
    pixel = evaluation.get("pixel") or {}
    if pixel.get("auroc") is None:
        return []
    baselines = [r for r in comparison_rows(evaluation) if r.kind == "baseline" and r.pixel.get("auroc") is not None]
    best = max(baselines, key=lambda r: r.pixel["auroc"], default=None)
    return [
        "Take one point inside and one point outside the lesions at random: the map has the higher value inside "
        f"{100 * pixel['auroc']:.0f} times in 100.",
        *([f"The best baseline or rival, “{best.name}”, reaches {100 * best.pixel['auroc']:.0f}."] if best else []),
    ]


def convergence_sentences(study: Mapping[str, Any]) -> list[str]:
    """How many masks, samples or repeats are enough, from the result of `convergence.convergence`."""
    what, steps, close = study["what"], study["steps"], study["close"]
    last = steps[-1]
    if all(step["deviation"] == 0 and step["auroc"] == last["auroc"] for step in steps):
        return [f"The score does not depend on the number of {what}."]
    sentences = [
        f"With the recipe’s {last['number']} {what}, AUROC is {last['auroc']:.3f} ± {last['se']:.3f}: mean and "
        f"standard error of {last['draws']} evaluations with other random numbers."
    ]
    sufficient = next((step for step in steps if step["number"] == study["enough"]), None)
    if not sufficient:
        sentences.append(
            f"That is too few to fix the second digit: one evaluation varies by {2 * last['deviation']:.3f} (two "
            f"standard deviations). Raise evaluation.{what}."
        )
    elif sufficient is last:
        sentences.append(f"With fewer {what}, an evaluation can differ from that by more than {close:g}.")
    else:
        sentences.append(
            f"From {sufficient['number']} {what} on, an evaluation differs from that by at most {close:g}. This counts "
            f"the difference of the means and two standard deviations ({2 * sufficient['deviation']:.3f}). More {what} "
            "take longer and change little."
        )
    if study["rising"]:
        sentences.append(
            f"From {steps[-2]['number']} to {last['number']} {what} AUROC still rose: more {what} may raise it further."
        )
    return sentences


def p_value_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """What a p-value is, and how many cases of each label raised an alarm; or why there are no p-values.

    Reads `alarms` and `uncalibrated`.
    """
    alarms = evaluation.get("alarms")
    if not alarms:
        why = evaluation.get("uncalibrated")
        return [f"{why[0].upper()}{why[1:]}."] if why else []
    n, rate, threshold = alarms["n"], alarms["rate"], alarms.get("threshold")
    sentences = [
        f"The p-value of a case is a share: of {counted(n, 'held-out normal cases')} and the case itself, how many "
        "have a score at least as high."
    ]
    if threshold is None:
        return sentences
    of = "Of normal cases of the same kind"
    sentences.append(f"{of}, at most {100 * rate:g} % have a p-value of {rate:g} or less, on average.")
    counts = [f"{k} of {counted(of, f'{kind} cases')}" for kind, (k, of) in alarms["counts"].items() if of]
    sentences.append(f"An alarm at scores above {threshold:.4g} is raised here for {' and '.join(counts)}.")
    if (evaluation.get("unlike") or {}).get("withheld"):
        sentences.append("A case whose p-value is left out for a warning counts as no alarm here.")
    n_alarms, n_normal = alarms["counts"]["normal"]
    if n_normal and alarms_chance(n_alarms, n_normal, n, rate) < 0.01:
        sentences.append(
            "So many alarms among normal cases have a chance below 1 in 100 if these cases are like the held-out "
            "ones. Take the p-values as too low, and calibrate on normal cases of this kind."
        )
    return sentences


def score_meanings(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, what it is) of the evaluation's scores, the primary one first; those that have `words`."""
    names, words = [str(evaluation["primary"]), *(evaluation.get("scores") or {})], evaluation.get("words") or {}
    names += [name for row in (evaluation.get("table") or ())[:1] for name in row]
    return [(name, words[name]) for name in dict.fromkeys(names) if name in words]


def short_training(config: Mapping[str, Any]) -> str:
    """That a training had fewer steps than its recipe, or far fewer than the preset `small`, with the remedy; "" where
    it had enough."""
    budget = config.get("budget", 1)
    share, small = share_of_small(config), f"{config.get('system')}:small"
    if share < LEAST_SHARE:
        what = f"{100 * share:.1g} % of the steps of {small}, so scores and maps mean little"
        why = "small is the shortest preset that is meant to find anomalies"
        return f"{what} ({why}); for all steps: --config={small} and a new --workdir (quickstart: a new --out)"
    if budget >= 1:
        return ""
    return (
        f"{100 * budget:.3g} % of the recipe's steps, so scores and maps are a first impression; for "
        "all steps: --config.budget=1 and a new --workdir (jmae quickstart: --budget 1 and a new --out)"
    )


def share_of_small(config: Mapping[str, Any]) -> float:
    """The steps of a training over those of its system's preset `small`; 1 where the recipe counts epochs or is not
    known."""
    if config.get("system") not in recipe.SYSTEMS:
        return 1.0
    small = dict(recipe.keys_of(recipe.parse([f"--config={config['system']}:small"], "")[0]))
    own = dict(recipe.keys_of(ConfigDict(config)))
    counted_by = [key for key, steps in small.items() if key.endswith(".steps") and steps and own.get(key)]
    whole = sum(small[key] for key in counted_by)
    return config.get("budget", 1) * sum(own[key] for key in counted_by) / whole if whole else 1.0


def dice_of_everything(pixel: Mapping[str, Any]) -> float | None:
    """The Dice of calling every pixel a lesion, from the share of lesion pixels; None where it is not known."""
    share = pixel.get("prevalence")
    return None if share is None else 2 * share / (1 + share)


class Notice(NamedTuple):
    """What a reader of a page must know first."""

    title: str
    text: str
    ids: Sequence[str] = ()  # of the cases that it is about


def notices(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> list[Notice]:
    """The notices at the top of a page: a short or a doubtful training, few normals to learn from, cases unlike the
    training images, scans that could not be read, few held-out normals."""
    found = []
    if short := short_training(config):
        found.append(Notice("Short training.", f"{short}. {low_dice_sentence(evaluation)}".rstrip()))
    if why := evaluation.get("doubts"):
        text = f"{'; '.join(why)}. Train longer, or with another --config.seed."
        found.append(Notice("The training may have failed.", text[0].upper() + text[1:]))
    if few := few_to_learn(evaluation.get("training_normals") or 0):
        title, why, remedy = few
        found.append(Notice(f"{title.capitalize()}.", f"{why.capitalize()}. Remedy: {remedy}."))
    if sentences := unlike_sentences(evaluation):
        warned = [row for row in evaluation.get("table") or () if row.get("warning")]
        warned.sort(key=lambda row: -math.inf if row["score"] is None else -row["score"])
        found.append(Notice(sentences[0], " ".join(sentences[1:]), [row["id"] for row in warned]))
    if left := evaluation.get("left_out"):
        more = f"; and {len(left) - 5} more" if left[5:] else ""
        title = f"{counted(len(left), 'scans')} could not be read."
        found.append(Notice(title, f"This page has no score of: {'; '.join(left[:5])}{more}."))
    if text := few_labels_sentence(evaluation):
        found.append(Notice("Very few cases with a label.", text))
    if text := no_alarm_sentence(evaluation):
        found.append(Notice("No alarm is possible.", text))
    return found


def low_dice_sentence(evaluation: Mapping[str, Any]) -> str:
    """What the best Dice is beside that of calling every pixel a lesion; "" without figures of pixels."""
    pixel = evaluation.get("pixel") or {}
    best, everything = pixel.get("dice_best"), dice_of_everything(pixel)
    if best is None or everything is None:
        return ""
    return f"The best Dice of the map is {best:.3f} here. Calling every pixel a lesion gives {everything:.3f}."


def few_labels_sentence(evaluation: Mapping[str, Any]) -> str:
    """That the figures say little, where a class has fewer than `FEW_LABELS` cases; "" where it has more, or none."""
    n, k = evaluation.get("n_normal") or 0, evaluation.get("n_abnormal") or 0
    if not (n and k) or min(n, k) >= FEW_LABELS:
        return ""
    return (
        f"The figures are of {n} normal and {k} abnormal. So few say little, and the intervals are too narrow. Remedy: "
        f"label {FEW_LABELS} of each or more."
    )


def no_alarm_sentence(evaluation: Mapping[str, Any]) -> str:
    """Why no case can have an alarm, and the remedy; "" where the held-out normals are enough or there are none."""
    alarms = evaluation.get("alarms")
    if not alarms or not too_few_normals(alarms["n"], alarms["rate"]):
        return ""
    n, rate = alarms["n"], alarms["rate"]
    return (
        f"With {counted(n, 'held-out normals')}, the smallest p-value is 1/{n + 1} = {1 / (n + 1):.2g}. The alarm rate "
        f"is {rate:g}. Remedy: {more_normals(rate)}."
    )


def mask_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """How many cases have a mask, or why none has one. Reads `maskless`, `masked` and `alarms`."""
    if why := evaluation.get("maskless"):
        return [f"{why[0].upper()}{why[1:]}."]
    found = evaluation.get("masked")
    if not found:
        return []
    n, of, rate = found["n"], counted(found["of"], "cases"), (evaluation.get("alarms") or {}).get("rate")
    return [
        f"{n} of {of} {'has' if n == 1 else 'have'} a mask." if n else f"None of {of} has a mask.",
        f"A mask marks where the map lies above {found['threshold']:.4g}.",
        *([f"Of normal cases of the same kind, at most {100 * rate:.3g} % have a mask, on average."] if rate else []),
        *["The pictures of the cases show a mask as a dashed orange line."] * bool(n),
        "The evaluation writes no masks; jmae predict writes them as files, ID_mask.",
    ]


def unlike_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """How many cases are unlike the training images, and what that means; none where no case is.

    Reads `unlike`, `alarms` and `n`.
    """
    unlike, alarms = evaluation.get("unlike") or {}, evaluation.get("alarms")
    if not unlike.get("n"):
        return []
    labels = [f"{unlike[kind]} {kind}" for kind in ("normal", "abnormal") if unlike[kind]]
    sentences = [
        f"{unlike_text(unlike['n'], evaluation['n'])} the training images{' (' if labels else ''}"
        f"{', '.join(labels)}{')' if labels else ''}.",
        "The run did not learn what normal scans of such a kind look like, so such scores say little. The warning at "
        f"each case says what differs. Remedy: {REMEDY}.",
    ]
    if alarms:
        sentences.append(
            f"Such a case has no p-value above {alarms['rate']:g}: a high one would reassure for no reason."
        )
    return sentences


def alarms_chance(n_alarms: int, n_cases: int, n_held_out: int, rate: float) -> float:
    """The probability of at least `n_alarms` among `n_cases` normal cases that are like `n_held_out` held-out ones.

    The threshold is the k-th highest score of the held-out normals, k = floor(rate (n_held_out + 1)), so the number of
    alarms has a beta-binomial distribution.
    """
    from scipy import stats

    k = math.floor(round(rate * (n_held_out + 1), 9))
    return float(stats.betabinom.sf(n_alarms - 1, n_cases, k, n_held_out + 1 - k))
