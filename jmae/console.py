"""The lines that `jmae evaluate` and `jmae predict` print at their end: figures and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from jmae import metrics
from jmae.p_values import smallest_p_value, too_few_normals
from jmae.report import no_curves_reason
from jmae.report.words import dice_of_everything, hidden_sentences, mask_sentences, rival_sentences
from jmae.tables import counted

MOST = 10  # cases in a terminal
NAME = 32  # columns of a terminal for an id


def highest(lines: Sequence[Mapping[str, Any]], rate: float) -> list[str]:
    """The cases with the highest scores as a table of at most 80 columns.

    Args:
      lines: those of scores.csv.
      rate: the alarm rate. A case with a p-value up to the rate is marked.
    """
    shown = sorted(lines, key=lambda line: -line["score"])[:MOST]
    marks = [marks_of(line, rate) for line in shown]
    key = f"alarm: p-value up to {rate:g}" if any("alarm" in mark for mark in marks) else ""
    rows = [("case" if len(lines) <= MOST else f"{MOST} highest of {len(lines)}", "score", "p-value", key)]
    for line, mark in zip(shown, marks, strict=True):
        p = "none" if line["p_value"] in (None, "") else f"{line['p_value']:.3g}"
        rows.append((shortened(line["id"]), f"{line['score']:.4g}", p, mark))
    width = max(cell_len(name) for name, *_ in rows)
    return [f"{set_cell_size(name, width)} {score:>10} {p:>8}  {mark}".rstrip() for name, score, p, mark in rows]


def marks_of(line: Mapping[str, Any], rate: float) -> str:
    """What the terminal says beside a case: an alarm, and that it is unlike the training images."""
    alarm = line["p_value"] not in (None, "") and line["p_value"] <= rate
    return ", ".join(["alarm"] * alarm + ["unlike"] * bool(line.get("warning")))


def shortened(name: str) -> str:
    """An id as a terminal shows it. Of a long one the middle is left out."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if cell_len(name) <= NAME:
        return name
    start, end = set_cell_size(name, NAME // 2 - 2), set_cell_size(name[::-1], NAME // 2 - 1)[::-1]
    return f"{start.rstrip()}...{end.lstrip()}"


def region_words(pixel: Mapping[str, Any]) -> str:
    """AUPRO, and the best Dice, which is an upper bound."""
    aupro = "" if pixel.get("aupro") is None else f"  AUPRO@0.3 {pixel['aupro']:.3f}"
    return f"{aupro}  best Dice (upper bound) {pixel['dice_best']:.3f}"


def size_words(sizes: Sequence[Mapping[str, Any]]) -> str:
    """The AUROC of cases with small, medium and large lesions, in pixels of the grid that is scored."""
    each = (f"{one['size']} (up to {one['most']:.0f} pixels as scored) {one['auroc']:.3f}" for one in sizes)
    return f"AUROC by the size of the lesions: {', '.join(each)}"


def lesion_words(pixel: Mapping[str, Any]) -> str:
    """The sensitivity for lesions, where it was asked for."""
    froc = pixel.get("froc")
    if not froc:
        return ""
    chance = f", random maps {froc['chance']['sensitivity']:.3f}" if froc.get("chance") else ""
    return f"  lesions found {froc['sensitivity']:.3f} at up to {froc['at']:g} false positives an image{chance}"


def overlap_words(pixel: Mapping[str, Any]) -> str:
    """The IoU of maps and masks, where it was asked for, with the shares of pixels that count as lesion."""
    found = pixel.get("localisation")
    if not found:
        return ""
    normals = found["normals"]
    at_normals = "" if normals is None else f" {normals:.3f} calling {found['normals_called']:.0%}"
    oracle = f"oracle {found['oracle']:.3f} calling {found['oracle_called']:.0%}"
    return f"  IoU{at_normals} ({oracle}; calling all {found['everything']:.3f})"


def console_summary(evaluation: Mapping[str, Any]) -> str:
    """The lines that the command prints at its end."""

    def line(name: str, image: Mapping[str, Any]) -> str:
        low, high = image["auroc_ci"]
        return f"  {name:<24} AUROC {image['auroc']:.3f} [{low:.3f}, {high:.3f}]  AP {image['ap']:.3f}"

    unknown = evaluation["n"] - evaluation["n_normal"] - evaluation["n_abnormal"]
    counts = f"{evaluation['split']}: {evaluation['n_normal']} normal, {evaluation['n_abnormal']} abnormal"
    counts += f", {unknown} of unknown label" if unknown else ""
    if evaluation.get("leaks"):
        counts = f"NOT AN INDEPENDENT TEST: patients or images are in two splits (data.allow_leaks)\n{counts}"
    primary, reason = evaluation["primary"], no_curves_reason(evaluation)
    figures = metrics.json_ready(evaluation)  # nan becomes None, as in the report
    lines = [*rival_sentences(figures), counts, *hidden_sentences(figures), *([reason] if reason else [])]
    scores, cheap = evaluation["scores"], evaluation["baselines"]
    if not reason:
        lines += [line(name + " *" * (name == primary), s["image"]) for name, s in scores.items() if s["image"]]
        rated = [line(name, s["image"]) for name, s in cheap.items() if s["image"]]
        lines += ["baselines and rivals:", *rated] if rated else []
    if found := evaluation["alarms"]:
        shares = ", ".join(f"{found[word]:.1%} of {word}" for word in ("normal", "abnormal") if found[word] is not None)
        if too_few_normals(found["n"], found["rate"]):
            few = f"{smallest_p_value(found['n'])}, of {counted(found['n'], 'held-out normals')}"
            lines.append(f"no alarm is possible at {found['rate']:g}: {few}")
        elif shares:
            lines.append(f"p-value up to {found['rate']:g} (of {counted(found['n'], 'held-out normals')}): {shares}")
    lines += mask_sentences(evaluation)[:1]
    if mask := evaluation.get("mask"):
        lines.append(
            f"masks above {mask['threshold']:.4g}: Dice {mask['dice']:.3f} (calling all voxels gives "
            f"{mask['dice_of_everything']:.3f}), {mask['lesion_recall']:.1%} of lesions "
            f"found, {mask['false_components']:.2g} false components an image"
        )
    if evaluation.get("sizes"):
        lines.append(size_words(evaluation["sizes"]))
    if evaluation["pixel"]:
        share, everything = evaluation["pixel"]["prevalence"], dice_of_everything(evaluation["pixel"])
        lines.append(f"pixels, of which {share:.4f} are lesion (calling all of them gives a Dice of {everything:.3f}):")
        named = [(name + " *" * (name == primary), s) for name, s in [*scores.items(), *cheap.items()]]
        lines += [
            f"  {name:<24} AUROC {s['pixel']['auroc']:.3f}  AP {s['pixel']['ap']:.3f}{region_words(s['pixel'])}"
            f"{lesion_words(s['pixel'])}{overlap_words(s['pixel'])}"
            for name, s in named
            if s["pixel"]
        ]
        mean = metrics.patient_mean(evaluation["per_patient"])
        lines.append(f"  mean of {counted(mean['n'], 'patients'):<16} AUROC {mean['auroc']:.3f}  AP {mean['ap']:.3f}")
    return "\n".join(lines)
