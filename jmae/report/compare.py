"""Several runs on the same cases as one HTML page: figures side by side, paired differences, and what differs in their
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
from jmae.report.page import digest, templates, write_page
from jmae.report.words import flat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # runs on a page


class Run(NamedTuple):
    """One evaluation, read from its folder."""

    name: str
    metrics: Mapping[str, Any]
    cases: Mapping[str, tuple[int, float]]  # id -> label and primary score, of the labelled cases
    patients: Mapping[str, str]  # by id; "" where not known
    images: Mapping[str, str]  # digest of the image by id
    config: Mapping[str, Any]
    environment: Mapping[str, Any]


def read_run(folder: Path) -> Run:
    """The evaluation in a run folder (its `evaluation/`), or in an evaluation's own folder; raises InputError where
    there is none that is whole."""
    inner = folder / "evaluation" if (folder / "evaluation" / "metrics.json").exists() else folder
    try:
        found = json.loads((inner / "metrics.json").read_text())
        with open(inner / "scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        cases = {row["id"]: (int(row["label"]), float(row["score"])) for row in rows if row["label"] != ""}
        with open(inner / "cases.csv", newline="") as file:
            about = {row["id"]: row for row in csv.DictReader(file)}
        patients, images = ({name: row[key] for name, row in about.items()} for key in ("patient", "image"))
        config = json.loads((inner / "config.json").read_text())
        environment = next((p for p in (folder, inner.parent) if (p / "environment.json").exists()), None)
        found_there = json.loads((environment / "environment.json").read_text()) if environment else {}
    except (OSError, ValueError, KeyError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: no whole evaluation ({why}): run python -m jmae.evaluate --workdir=DIR") from None
    return Run(folder.name or str(folder), found, cases, patients, images, config, found_there)


class Pair(NamedTuple):
    """How much higher one run's figure is than another's on the same cases."""

    first: str
    second: str
    auroc: float
    auroc_ci: tuple[float, float]
    ap: float
    ap_ci: tuple[float, float]


def compare(runs: Sequence[Run], *, draws: int = 2000) -> tuple[list[str], bool, list[Pair]]:
    """(ids of the cases that all runs have, whether patients are known, differences of every pair of runs).

    Differences are of the primary scores, with 95 % intervals over the same draws of patients for both; of cases, where
    the patients are not known; none where the cases in common are of one class. Raises InputError where the runs share
    no case or contradict each other's labels.
    """
    shared = [name for name in runs[0].cases if all(name in run.cases for run in runs)]
    if not shared:
        raise InputError("the runs share no labelled case: evaluate them on one manifest (--manifest, --out)")
    for run in runs[1:]:
        if wrong := [name for name in shared if run.cases[name][0] != runs[0].cases[name][0]]:
            raise InputError(
                f"{run.name} and {runs[0].name} contradict each other on the labels of {len(wrong)} cases, as "
                f"{wrong[0]}: evaluate them on one manifest"
            )
        if wrong := [name for name in shared if run.images[name] != runs[0].images[name]]:
            raise InputError(
                f"{run.name} and {runs[0].name} have other images under the names of {len(wrong)} cases, as "
                f"{wrong[0]}: evaluate them on one manifest"
            )
    labels, patients = labels_of(runs[0], shared), [runs[0].patients[name] for name in shared]
    pairs = []
    for a, b in combinations(runs, 2) if 0 < labels.sum() < len(labels) else ():
        each: list[Any] = []
        for measure in (metrics.auroc, metrics.average_precision):
            each += metrics.paired_difference(
                measure, labels, scores_of(a, shared), scores_of(b, shared), patients, draws=draws
            )
        pairs.append(Pair(a.name, b.name, *each))
    return shared, any(patients), pairs


def labels_of(run: Run, ids: Sequence[str]) -> NDArray[np.bool_]:
    """(n,) which cases are abnormal."""
    return np.array([run.cases[name][0] for name in ids], bool)


def scores_of(run: Run, ids: Sequence[str]) -> NDArray[np.float64]:
    """(n,) the run's primary scores."""
    return np.array([run.cases[name][1] for name in ids])


def differing(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(dotted key, value of each) of nested settings that are not the same in all; "–" where one has no such key."""
    each = [dict(flat(one)) for one in settings]
    keys = list(dict.fromkeys(key for one in each for key in one))
    rows = [(key, [one.get(key, "–") for one in each]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def roc_curves(runs: Sequence[Run], ids: Sequence[str]) -> Markup | None:
    """The runs' ROC curves in one chart; None where a class is missing."""
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


def best_baseline(run: Run) -> tuple[str, float] | None:
    """(name, AUROC) of the best cheap baseline of images."""
    rated = {k: e["image"]["auroc"] for k, e in run.metrics["baselines"].items() if (e.get("image") or {}).get("auroc")}
    return max(rated.items(), key=lambda item: item[1]) if rated else None


def write_comparison(path: Path, folders: Sequence[Path], *, draws: int = 2000) -> str:
    """Writes the page on the runs in `folders`, whole or not at all; returns its table as text.

    Raises InputError for folders without an evaluation, runs without a case in common, or of contrary labels.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("one run is named twice: name each once")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # told apart by the folders above
        runs = [
            run._replace(name="/".join(folder.absolute().parts[-2:])) for run, folder in zip(runs, folders, strict=True)
        ]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    shared, by_patient, pairs = compare(runs, draws=draws)
    own = [len(run.cases) - len(shared) for run in runs]
    figures = []
    for run, more in zip(runs, own, strict=True):
        e = run.metrics
        central: Mapping[str, Any] = next((s for name, s in e["subsets"].items() if name.startswith("central")), {})
        figures.append(
            {
                "name": run.name,
                "system": e["system"],
                "primary": e["primary"],
                "image": e["image"] or {},
                "pixel": e["pixel"] or {},
                "central": central.get("image") or {},
                "baseline": best_baseline(run),
                "seconds": e.get("seconds_per_case"),
                "more": more,
                "replicates": len((e.get("replicates") or {}).get("auroc", {}).get("values", [])) or 1,
            }
        )
    figures.sort(key=lambda f: -(f["image"].get("auroc") or 0))
    write_page(
        path,
        templates()
        .get_template("comparison.html.j2")
        .render(
            runs=figures,
            lead=lead(figures, pairs),
            split=", ".join(sorted({run.metrics["split"] for run in runs})),
            shared=len(shared),
            n_abnormal=int(labels_of(runs[0], shared).sum()),
            by_patient=by_patient,
            pairs=pairs,
            pixels=any(f["pixel"] for f in figures),
            centrals=any(f["central"] for f in figures),
            axis=axis_of(figures),
            rocs=roc_curves(runs, shared),
            names=[run.name for run in runs],
            recipes=differing([run.config for run in runs]),
            environments=differing([run.environment for run in runs]),
            digest=case_digest(runs[0], shared),
            digests=[(run.name, digests_of(run)) for run in runs],
            draws=draws,
        ),
    )
    return as_text(figures, pairs)


def axis_of(figures: Sequence[Mapping[str, Any]]) -> float:
    """Where the bars' axis of AUROC begins."""
    bounds = [
        v for f in figures for v in (f["image"].get("auroc"), *(f["image"].get("auroc_ci") or ())) if v is not None
    ]
    return min(0.4, math.floor(10 * min(bounds)) / 10) if bounds else 0.4


def case_digest(run: Run, ids: Sequence[str]) -> str:
    """A digest of the compared cases' ids and labels: equal where the same cases were compared."""
    text = "\n".join(f"{name},{run.cases[name][0]}" for name in sorted(ids))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def lead(figures: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> list[str]:
    """The result in sentences: the run with the highest AUROC, how far the next is, which do not beat a baseline."""
    rated = [f for f in figures if f["image"].get("auroc") is not None]
    if not rated:
        return ["No AUROC: the cases in common are of one class."]
    best = rated[0]
    words = [f"{best['name']} ({best['system']}) has the highest AUROC, {best['image']['auroc']:.3f}."]
    if len(rated) > 1:
        second = rated[1]["name"]
        pair = next((p for p in pairs if {p.first, p.second} == {best["name"], second}), None)
        if not pair:
            words.append(f"The cases in common with the next, {second}, are of one class, so they tell no difference.")
        else:
            sign = 1 if pair.first == best["name"] else -1
            low, high = sorted(sign * end for end in pair.auroc_ci)
            between = "" if math.isnan(low) else f" (95 % interval {low:+.3f} to {high:+.3f})"
            settled = ""
            if low <= 0 <= high:
                settled = ", which does not settle which of the two is better"
            elif high < 0:
                settled = f": there {second} is the better one"
            words.append(
                f"On the cases in common it is {sign * pair.auroc:+.3f} against the next, {second}{between}{settled}."
            )
    behind = [f["name"] for f in rated if f["baseline"] and f["baseline"][1] >= f["image"]["auroc"]]
    if behind:
        words.append(f"A cheap baseline does as well as or better than {', '.join(behind)}.")
    return words


def digests_of(run: Run) -> dict[str, str]:
    """What the run's recipe, data and environment are told apart by."""
    return {**(run.metrics.get("digests") or {}), "environment": digest(run.environment)}


def as_text(figures: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> str:
    """The table and the differences as lines."""
    number = lambda value: "–" if value is None else f"{value:.3f}"
    interval = lambda pair: "" if not pair or pair[0] is None else f" [{pair[0]:.3f}, {pair[1]:.3f}]"
    lines = []
    for f in figures:
        image, pixel = f["image"], f["pixel"]
        line = f"  {f['name']:<24} AUROC {number(image.get('auroc'))}{interval(image.get('auroc_ci'))}"
        line += f"  AP {number(image.get('ap'))}"
        line += f"  pixels {number(pixel.get('auroc'))} / {number(pixel.get('ap'))}" if pixel else ""
        lines.append(line)
    lines += ["differences of AUROC, the same cases:"] if pairs else []
    lines += [f"  {p.first} - {p.second}: {p.auroc:+.3f}{interval(p.auroc_ci)}" for p in pairs]
    return "\n".join(lines)
