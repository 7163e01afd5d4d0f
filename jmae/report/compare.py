"""Several runs on the same cases as one HTML page: their figures side by side, paired differences, and what differs in
recipes, data and environments."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from jmae import metrics
from jmae.errors import InputError
from jmae.report.charts import FAINT, chart
from jmae.report.page import auroc_axis_start, settings_digest, templates, write_page
from jmae.report.words import flat_settings
from jmae.sealed import unseal
from jmae.tables import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # runs on a page

# --- runs and their differences ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One evaluation, read from its folder."""

    name: str
    metrics: Mapping[str, Any]  # the content of metrics.json
    cases: Mapping[str, tuple[int, float]]  # id -> (label, primary score), of the cases with a label
    patients: Mapping[str, str]  # id -> patient, "" where not known
    images: Mapping[str, str]  # id -> digest of the image
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    table: Mapping[str, Mapping[str, str]]  # id -> line of scores.csv
    baselines: Mapping[str, Mapping[str, float]] | None  # id -> score by name; None in an earlier version's evaluation


class Pair(NamedTuple):
    """How much higher a figure of the first run is than that of the second, on the same cases."""

    first: str
    second: str
    auroc: float
    auroc_ci: tuple[float, float]
    ap: float
    ap_ci: tuple[float, float]


def read_run(folder: Path) -> Run:
    """Read an evaluation from a run folder (its `evaluation/`), or from the folder of an evaluation.

    Raises InputError where the folder has no complete evaluation.
    """
    inner = folder / "evaluation" if (folder / "evaluation" / "metrics.json").exists() else folder
    try:
        figures = json.loads((inner / "metrics.json").read_text())
        with open(inner / "scores.csv", newline="") as file:
            table = {plain(row["id"]): row for row in csv.DictReader(file)}
        cases = {name: (int(row["label"]), float(row["score"])) for name, row in table.items() if row["label"]}
        baselines = read_baselines(inner / "baselines.csv") if (inner / "baselines.csv").exists() else None
        with open(inner / "cases.csv", newline="") as file:
            case_rows = list(csv.DictReader(file))
        patients = {plain(row["id"]): plain(row["patient"]) for row in case_rows}
        images = {plain(row["id"]): row["image"] for row in case_rows}
        config = unseal((inner / "config.json").read_bytes(), inner / "config.json", None)
        files = [path / "environment.json" for path in (folder, inner.parent)]
        environment = next((unseal(file.read_bytes(), file, None) for file in files if file.exists()), {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: no complete evaluation ({why}): run jmae evaluate --workdir DIR") from None
    return Run(folder.name or str(folder), figures, cases, patients, images, config, environment, table, baselines)


def read_baselines(path: Path) -> dict[str, dict[str, float]]:
    """The scores of baselines.csv, by the case's id and the baseline's name; an empty cell is left out."""
    with open(path, newline="") as file:
        return {
            plain(row["id"]): {name: float(score) for name, score in row.items() if name != "id" and score}
            for row in csv.DictReader(file)
        }


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of several folders, with a name of its own for each run.

    The name is the last part of the path. Where two runs would have the same name, it is the last two parts, or else
    the whole path. Raises InputError where a folder is named twice or has no complete evaluation.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("one run is named twice: name each run once")
    runs = [read_run(folder) for folder in folders]
    for longer_name in (lambda folder: "/".join(folder.absolute().parts[-2:]), str):
        if len({run.name for run in runs}) < len(runs):
            runs = [run._replace(name=longer_name(folder)) for run, folder in zip(runs, folders, strict=True)]
    return runs


def common_cases(runs: Sequence[Run]) -> list[str]:
    """The ids of the labelled cases that all runs have.

    Raises InputError where there is none, or where two runs have different labels or images under the same id.
    """
    ids = [name for name in runs[0].cases if all(name in run.cases for run in runs)]
    if not ids:
        raise InputError("the runs share no labelled case: evaluate them on one manifest (--manifest, --out)")
    for run in runs[1:]:
        for what, different in (
            ("labels", [name for name in ids if run.cases[name][0] != runs[0].cases[name][0]]),
            ("images", [name for name in ids if run.images[name] != runs[0].images[name]]),
        ):
            if different:
                raise InputError(
                    f"{run.name} and {runs[0].name} have different {what} for {len(different)} of their common cases, "
                    f"such as {different[0]}: evaluate them on one manifest"
                )
    return ids


def paired_differences(runs: Sequence[Run], ids: Sequence[str], *, draws: int = 2000) -> list[Pair]:
    """The differences of the primary scores of every pair of runs, on the cases `ids`.

    The 95 % intervals resample patients, or cases where the patients are not known; both runs of a pair have the same
    draws. There are no pairs where all cases are of one class.
    """
    labels, patients = labels_of(runs[0], ids), [runs[0].patients[name] for name in ids]
    if labels.all() or not labels.any():
        return []
    pairs = []
    for a, b in combinations(runs, 2):
        auroc, ap = (
            metrics.paired_difference(measure, labels, scores_of(a, ids), scores_of(b, ids), patients, draws=draws)
            for measure in (metrics.auroc, metrics.average_precision)
        )
        pairs.append(Pair(a.name, b.name, *auroc, *ap))
    return pairs


def labels_of(run: Run, ids: Sequence[str]) -> NDArray[np.bool_]:
    """(n,) True where a case is abnormal."""
    return np.array([run.cases[name][0] for name in ids], bool)


def scores_of(run: Run, ids: Sequence[str]) -> NDArray[np.float64]:
    """(n,) the primary scores of the run."""
    return np.array([run.cases[name][1] for name in ids])


def case_digest(run: Run, ids: Sequence[str]) -> str:
    """12 hexadecimal digits of ids and labels: equal where the same cases were compared."""
    text = "\n".join(f"{name},{run.cases[name][0]}" for name in sorted(ids))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_digests(run: Run) -> dict[str, str]:
    """The digests of the run's recipe, rows, images and environment, by name."""
    return {**(run.metrics.get("digests") or {}), "environment": settings_digest(run.environment)}


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The nested settings that are not the same everywhere: (dotted key, its value in each); "–" for a missing key."""
    flat = [dict(flat_settings(one)) for one in settings]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [one.get(key, "–") for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# --- the page ---------------------------------------------------------------------------------------------------------


def write_comparison(path: Path, folders: Sequence[Path], *, draws: int = 2000) -> str:
    """Write the page on the runs in `folders`, as a whole or not at all, and return its table as text.

    Raises InputError where a folder has no complete evaluation, or as `common_cases`.
    """
    runs = read_runs(folders)
    ids = common_cases(runs)
    pairs = paired_differences(runs, ids, draws=draws)
    rows = sorted((run_row(run, len(ids)) for run in runs), key=lambda row: -(row["image"].get("auroc") or 0))
    page = (
        templates()
        .get_template("comparison.html.j2")
        .render(
            runs=rows,
            results=comparison_sentences(rows, pairs),
            split=", ".join(sorted({run.metrics["split"] for run in runs})),
            shared=len(ids),
            n_abnormal=int(labels_of(runs[0], ids).sum()),
            by_patient=any(runs[0].patients[name] for name in ids),
            pairs=pairs,
            pixels=any(row["pixel"] for row in rows),
            centrals=any(row["central"] for row in rows),
            axis=auroc_axis_start([row["image"] for row in rows]),
            rocs=roc_curves(runs, ids),
            names=[run.name for run in runs],
            recipes=differing_settings([run.config for run in runs]),
            environments=differing_settings([run.environment for run in runs]),
            case_digest=case_digest(runs[0], ids),
            digests=[(run.name, run_digests(run)) for run in runs],
            draws=draws,
        )
    )
    write_page(path, page)
    return text_table(rows, pairs)


def run_row(run: Run, n_common: int) -> dict[str, Any]:
    """A run's row of the table of figures; "more" is the number of its cases that are not common to all runs."""
    e = run.metrics
    central: Mapping[str, Any] = next((s for name, s in e["subsets"].items() if name.startswith("central")), {})
    return {
        "name": run.name,
        "system": e["system"],
        "primary": e["primary"],
        "image": e["image"] or {},
        "pixel": e["pixel"] or {},
        "central": central.get("image") or {},
        "baseline": best_baseline(run),
        "difference": (e.get("best_rival") or {}).get("image"),
        "seconds": e.get("seconds_per_case"),
        "more": len(run.cases) - n_common,
        "replicates": len((e.get("replicates") or {}).get("auroc", {}).get("values", [])) or 1,
    }


def best_baseline(run: Run) -> tuple[str, float] | None:
    """(name, AUROC) of the best baseline or rival of images; None without one."""
    aurocs = {
        k: e["image"]["auroc"] for k, e in run.metrics["baselines"].items() if (e.get("image") or {}).get("auroc")
    }
    return max(aurocs.items(), key=lambda item: item[1]) if aurocs else None


def roc_curves(runs: Sequence[Run], ids: Sequence[str]) -> Markup | None:
    """The ROC curves of all runs in one chart; None where a class is missing."""
    labels = labels_of(runs[0], ids)
    if labels.all() or not labels.any():
        return None
    styles = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1))]
    colours = ["#1c1c1c", "#2f6690", "#b4491f", "#5b8c5a", "#8a5a9e"]

    def draw(ax: "Axes") -> None:
        ax.plot([0, 1], [0, 1], color=FAINT, lw=0.8, ls=(0, (4, 3)))
        for i, run in enumerate(runs):
            fpr, tpr, _ = metrics.roc_curve(labels, scores_of(run, ids))
            style: Any = styles[i // len(colours) % len(styles)]
            ax.plot(fpr, tpr, color=colours[i % len(colours)], ls=style, label=run.name, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.13), fontsize=8)

    names = ", ".join(run.name for run in runs)
    return chart("rocs", f"ROC curves of {names}.", draw, size=(5.2, 4.4 + 0.17 * len(runs)))


def comparison_sentences(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> list[str]:
    """The result: which run has the highest AUROC, how far it is from the next, and which do not beat all baselines.

    Args:
      rows: as `run_row`, the highest AUROC first.
    """
    with_auroc = [row for row in rows if row["image"].get("auroc") is not None]
    if not with_auroc:
        return ["No AUROC: the cases in common are of one class."]
    best = with_auroc[0]
    sentences = [f"{best['name']} ({best['system']}) has the highest AUROC, {best['image']['auroc']:.3f}."]
    if len(with_auroc) > 1:
        sentences.append(difference_sentence(best["name"], with_auroc[1]["name"], pairs))
    if behind := [row["name"] for row in with_auroc if not_better(row)]:
        sentences.append(f"Not better than the best baseline or rival: {', '.join(behind)}.")
    return sentences


def not_better(row: Mapping[str, Any]) -> bool:
    """Whether a run is not shown to be better than its best baseline or rival: by the interval of their paired
    difference, or without one by the figures alone."""
    if row["difference"]:
        low = row["difference"]["auroc_ci"][0]
        return low is None or low <= 0
    return bool(row["baseline"]) and row["baseline"][1] >= row["image"]["auroc"]


def difference_sentence(best: str, second: str, pairs: Sequence[Pair]) -> str:
    """How far the best run is from the second on the cases in common."""
    pair = next((p for p in pairs if {p.first, p.second} == {best, second}), None)
    if not pair:
        return f"The cases in common with the next run, {second}, are of one class and show no difference."
    sign = 1 if pair.first == best else -1
    low, high = sorted(sign * end for end in pair.auroc_ci)
    interval = "" if math.isnan(low) else f" (95 % interval {low:+.3f} to {high:+.3f})"
    conclusion = ""
    if low <= 0 <= high:
        conclusion = ", which does not show which of the two is better"
    elif high < 0:
        conclusion = f": on these cases {second} is better"
    return (
        f"On the cases in common, its AUROC differs by {sign * pair.auroc:+.3f} from the next run, {second}{interval}"
        f"{conclusion}."
    )


def text_table(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> str:
    """The figures of the runs and their differences as lines of text."""
    number = lambda value: "–" if value is None else f"{value:.3f}"
    interval = lambda pair: "" if not pair or pair[0] is None else f" [{pair[0]:.3f}, {pair[1]:.3f}]"
    lines = []
    for row in rows:
        image, pixel = row["image"], row["pixel"]
        line = f"  {row['name']:<24} AUROC {number(image.get('auroc'))}{interval(image.get('auroc_ci'))}"
        line += f"  AP {number(image.get('ap'))}"
        line += f"  pixels {number(pixel.get('auroc'))} / {number(pixel.get('ap'))}" if pixel else ""
        lines.append(line)
    lines += ["differences of AUROC on the same cases:"] if pairs else []
    lines += [f"  {p.first} - {p.second}: {p.auroc:+.3f}{interval(p.auroc_ci)}" for p in pairs]
    return "\n".join(lines)
