"""The figures of a split: of its scores and maps, of its parts, and of the baselines (metrics.json)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jmae import metrics, recipe
from jmae.data.loader import lesion_mask, scored_region
from jmae.data.manifest import Row
from jmae.data.transforms import central
from jmae.errors import InputError
from jmae.inference import Result, own_maps
from jmae.lesions import Froc, Localisation
from jmae.report import Case
from jmae.run_folder import log
from jmae.system import System, rows_read

WHOLE = "whole"  # the part that is the split itself
CENTRAL = 0.8  # share of each axis that the central crop keeps


class Held(NamedTuple):
    """Rows of `val`, scored: they choose thresholds, and the normals among them say what a score means."""

    rows: Sequence[Row]
    scores: np.ndarray  # (r, m), the primary ones
    ends: np.ndarray  # (m, 2): the percentiles `PERCENTILES` of each row's map, nan without one


class Split(NamedTuple):
    """The rows that are scored."""

    name: str
    rows: list[Row]
    val: list[Row]  # labelled rows of `val` that choose the threshold; none where a class is missing
    normals: list[Row]  # the normal rows of `val`, held out; none where `val` itself is scored
    labels: np.ndarray  # (n,), -1 unknown
    marked: bool  # whether any row has a mask or a box

    @property
    def held(self) -> list[Row]:
        """The rows of `val` that are scored beside it."""
        return self.val or self.normals

    @property
    def known(self) -> np.ndarray:
        """(n,) which rows have a label."""
        return self.labels >= 0


class Gathered(NamedTuple):
    """What is kept of the results: the maps are written or counted, and gone."""

    scores: dict[str, np.ndarray]  # (r, n)
    inner: dict[str, np.ndarray]  # (r, n): the scores of the maps' central part
    cases: list[Case]
    seconds: float
    cheap: dict[str, np.ndarray]  # (1, n): scores of baselines that come case by case; of those that every row has
    digests: list[str]  # (n,) of the images' values


def split_of(rows: Sequence[Row], name: str) -> Split:
    """A split of a manifest; raises InputError where it is empty."""
    chosen = [row for row in rows if row.split == name]
    if not chosen:
        raise InputError(f"split {name!r} has no rows: one of {', '.join(sorted({row.split for row in rows}))}")
    val = [row for row in rows if row.split == "val" != name and row.label is not None]  # it chooses thresholds
    normals = [row for row in val if row.label == 0]
    val = val if 0 < len(normals) < len(val) else []
    labels = np.array([-1 if row.label is None else row.label for row in chosen])
    return Split(name, chosen, val, normals, labels, any(row.mask or row.boxes for row in chosen))


def read_truth(row: Row, result: Result, data: ConfigDict) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(lesion mask, region that was scored) of a row on its own grid. A normal row's mask is empty; None of an abnormal
    row without a mask or a box, and of an unlabelled one: it is left out of pixel figures."""
    empty = np.zeros(result.stored.array.shape[:-1], bool)
    mask = empty if row.label == 0 else lesion_mask(row, result.stored) if row.label == 1 else None
    if mask is None:
        return None
    region = scored_region(row, result.stored, data)
    both = [part for part in (region, result.seen) if part is not None]
    return mask, np.logical_and(*both) if len(both) == 2 else both[0] if both else None


class Pixels:
    """Pixel figures of every map of one part of a split, fed case by case: pooled, and of each patient. With `froc`
    also the sensitivity for lesions at so many false positives an image, with `iou` also how far masks and maps
    overlap image by image, both where no margin is cut off."""

    def __init__(self, rows: Sequence[Row], share: float = 1.0, froc: float = 0.0, iou: bool = False):
        self.share, self.lesions, self.froc, self.iou = share, False, froc, iou
        self.left = Counter(patient_of(row) for row in rows)
        self.pooled: dict[str, list[metrics.Pooled]] = {}
        self.found: dict[str, list[Froc]] = {}
        self.localised: dict[str, list[Localisation]] = {}
        self.own: dict[str, dict[str, metrics.Pooled]] = {}  # by patient, of the first replicate
        self.patients: list[dict[str, Any]] = []

    def add(self, row: Row, mask: np.ndarray, region: np.ndarray | None, maps: Mapping[str, Sequence[np.ndarray]]):
        """One case's maps {NAME: a map a replicate}, mask and region, on its own grid."""
        view = lambda x: x if x is None or self.share == 1 else central(x, self.share)
        mask, region, patient = view(mask), view(region), patient_of(row)
        self.lesions |= bool(mask.any())
        mine = self.own.setdefault(patient, {})
        for name, values in maps.items():
            pooled = self.pooled.setdefault(name, [metrics.Pooled() for _ in values])
            for one, value in zip(pooled, values, strict=True):
                one.add(mask, view(value), region)
            mine.setdefault(name, metrics.Pooled()).add(mask, view(values[0]), region)
            if self.froc and self.share == 1:
                lesions = boxes_of(row) if row.boxes and not row.mask else mask
                found = self.found.setdefault(name, [Froc(self.froc) for _ in values])
                for curve, value in zip(found, values, strict=True):
                    curve.add(lesions, value, region)
            if self.iou and self.share == 1 and row.mask:  # a box is no outline
                localised = self.localised.setdefault(name, [Localisation() for _ in values])
                for overlap, value in zip(localised, values, strict=True):
                    overlap.add(mask, value, region)

    def close(self, row: Row) -> None:
        """One more row of its patient is done; with the last one the patient's figures are computed."""
        patient = patient_of(row)
        self.left[patient] -= 1
        if not self.left[patient] and (mine := self.own.pop(patient, {})):
            figures = {name: pooled.result() for name, pooled in both_ends(mine).items()}
            self.patients.append({"patient": row.patient or row.id, "figures": figures})

    def result(self, name: str, thresholds: Sequence[float] = ()) -> dict[str, Any] | None:
        """The pooled figures of a map, or of its "low " end, the mean over replicates; None where no case has a lesion
        or there is no such map. `thresholds` are those of held-out normals, one a replicate, or none."""
        each = self.pooled.get(name.removeprefix("low "), ())
        if not self.lesions:
            return None
        mean = mean_of([(one.negated() if name.startswith("low ") else one).result() for one in each])
        curves = [found for one in self.found.get(name, ()) if (found := one.result())]
        if mean is not None and curves:
            sensitivity = float(np.mean([found["sensitivity"] for found in curves]))
            mean |= {"froc": curves[0] | {"sensitivity": sensitivity}}  # with the first replicate's curve
        localised = zip(self.localised.get(name, ()), thresholds or repeat(None), strict=False)
        overlaps = [found for one, t in localised if (found := one.result(t))]
        return mean | {"localisation": mean_of(overlaps)} if mean is not None and overlaps else mean

    def per_patient(self, primary: str, scores: Sequence[str]) -> list[dict[str, Any]]:
        """A row {patient, auroc, ap, prevalence, baselines} a patient, of the primary score's map; baselines are all
        that are none of the system's `scores`, either end of a brightness."""
        keys = ("auroc", "ap", "prevalence")
        return [
            {
                "patient": p["patient"],
                **{k: p["figures"][primary][k] for k in keys},
                "baselines": {b: {k: f[k] for k in keys[:2]} for b, f in p["figures"].items() if b not in scores},
            }
            for p in self.patients
        ]


class Part(NamedTuple):
    """A part of a split that gets figures of its own."""

    inside: np.ndarray  # (n,), which rows
    pixels: Pixels
    share: float = 1.0  # of each axis, in the middle


def parts_of(config: ConfigDict, split: Split, *, volumes: bool) -> dict[str, Part]:
    """The labelled rows, those of each subset column and, of images, their central crop."""
    rows, known = split.rows, split.known

    def part(inside: np.ndarray, share: float = 1.0) -> Part:
        used = [row for row, used in zip(rows, inside, strict=True) if used]
        further = config.evaluation.get("froc", 0.0), bool(config.evaluation.get("iou", 0.0))
        return Part(inside, Pixels(used, share, *further), share)

    parts = {WHOLE: part(known)}
    for column in config.evaluation.subsets:
        if column not in rows[0].extra:
            log(f"warning: no column {column!r} in the manifest: no figures of that subset")
            continue
        parts[column] = part(known & np.array([row.extra[column] not in ("", "0") for row in rows]))
    if not volumes:
        parts[f"central {CENTRAL:.0%}"] = part(known, CENTRAL)
    return parts


def boxes_of(row: Row) -> list[tuple[tuple[float, float], ...]]:
    """A row's boxes as (low, high) of each axis of the array: in 2D the manifest's x runs along the columns."""
    d = len(row.boxes[0]) // 2
    pairs = [tuple(zip(box[:d], box[d:], strict=True)) for box in row.boxes]
    return [pair[::-1] if d == 2 else pair for pair in pairs]


def both_ends(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Maps with the other end of each brightness: which of them is abnormal is not the library's to know."""
    lows = {f"low {name}": pooled.negated() for name, pooled in maps.items() if name.startswith("brightness")}
    return {**maps, **lows}


def patient_of(row: Row) -> str:
    """The patient, or the row itself where it names none."""
    return f"patient {row.patient}" if row.patient else f"case {row.id}"


def mean_of(each: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of equal dicts of numbers and lists of numbers, key by key; counts stay whole; None of none."""
    if len(each) < 2:
        return dict(each[0]) if each else None
    same = lambda value: value is None or isinstance(value, int)
    return {k: v if same(v) else np.mean([e[k] for e in each], axis=0) for k, v in each[0].items()}


def figures(
    scores: Mapping[str, np.ndarray],
    names: Sequence[str],
    pixels: Pixels,
    rows: Sequence[Row],
    draws: int,
    thresholds: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """{NAME: {"image", "pixel"}} of scores (r, n) of labelled rows and of the maps `names`; `draws` of the bootstrap,
    `thresholds` of maps by `held_out`.

    With replicates each figure is the mean over them, and "replicates" holds their means and 1.96 deviations.
    """
    labels, patients = np.array([row.label for row in rows], bool), [row.patient for row in rows]
    out: dict[str, dict[str, Any]] = {}
    for name in [*scores, *(name for name in names if name not in scores)]:
        image = [metrics.image_metrics(labels, v, patients, draws=draws) for v in scores.get(name, ())]
        out[name] = {"image": mean_of(image), "pixel": pixels.result(name, thresholds.get(name, ()))}
        if len(image) > 1:
            out[name]["replicates"] = {k: metrics.replicate_summary([e[k] for e in image]) for k in ("auroc", "ap")}
    return out


def better_ends(baseline: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a baseline "NAME" and its "low NAME" the better one."""
    worth = lambda entry: (entry["image"] or entry["pixel"] or {}).get("auroc", 0)
    lows = [name for name in baseline if name.startswith("low ") and name.removeprefix("low ") in baseline]
    dropped = {min((name, name.removeprefix("low ")), key=lambda n: worth(baseline[n])) for name in lows}
    return {name: entry for name, entry in baseline.items() if name not in dropped}


def part_figures(
    config: ConfigDict,
    system: System,
    split: Split,
    gathered: Gathered,
    part: Part,
    fitted: Mapping[str, np.ndarray] | None,
    thresholds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What metrics.json says of one part of the split: the primary score's figures at the top, then those of all
    scores, and of the baselines."""
    rows = [row for row, used in zip(split.rows, part.inside, strict=True) if used]
    of = lambda values: {name: value[:, part.inside] for name, value in values.items()}
    pooled, draws = part.pixels.pooled, config.evaluation.draws
    ours = gathered.scores if part.share == 1 else gathered.inner
    scores = figures(of(ours), [m for m in pooled if m in gathered.inner], part.pixels, rows, draws, thresholds)
    cheap = gathered.cheap if fitted is None else fitted
    others = [m for m in pooled if m not in gathered.inner]
    others += [f"low {m}" for m in others if m.startswith("brightness") and system.sweep]
    baseline = figures(of(cheap), others, part.pixels, rows, draws, thresholds)
    top = scores.get(system.primary, {"image": None, "pixel": None})
    top = top | {"pixel": scores.get(system.map, top)["pixel"]}
    return {"n": int(part.inside.sum()), **top, "scores": scores, "baselines": better_ends(baseline)}


def of_scores(config: ConfigDict, split: Split, values: np.ndarray, held: Held | None) -> dict[str, Any]:
    """The decision at the threshold chosen on `val`, and the distance of the classes, of primary scores (r, known).
    ours: by Youden's J, which does not depend on how many of `val` are abnormal, where a recipe names no rule."""
    labels = split.labels[split.known]
    decision = None
    if held and split.val:
        val, rule = np.array([row.label for row in split.val], int), config.evaluation.get("decision", "youden")
        thresholds = [metrics.threshold_on(val, v, rule) for v in held.scores]
        each = [metrics.at_threshold(labels, v, t) for v, t in zip(values, thresholds, strict=True)]
        decision = (mean_of(each) or {}) | {"chosen_by": rule}
    chi2 = mean_of([metrics.chi2_distance(v[labels == 0], v[labels == 1]) for v in values])
    return {"decision": decision, "chi2": chi2}


def held_out(config: ConfigDict, rows: Sequence[Row], results: Iterator[Result]) -> dict[str, list[float]]:
    """The percentile `evaluation.iou` of the pixels of the normal ones among `rows`, inside their regions and on their
    own grids: of each map, one a replicate."""
    pools: dict[str, list[metrics.Pooled]] = {}
    for row, result in zip(rows, results, strict=True):
        if row.label != 0 or not (truth := read_truth(row, result, config.data)):
            continue
        for name, maps in own_maps(result).items():
            for pool, m in zip(pools.setdefault(name, [metrics.Pooled() for _ in maps]), maps, strict=True):
                pool.add(truth[0], m, truth[1])
    return {name: [pool.percentile(config.evaluation.iou) for pool in each] for name, each in pools.items()}


def beside_printed(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """{stage, metric, epoch, printed, ours} for every value of a stage's metrics that the paper prints: ours is the
    mean over that epoch, None where the run did not get so far; nothing where other rows are scored than trained on."""
    printed = [stage for stage in system.stages if stage.published]
    if not printed or recipe.read(workdir).data.manifest != config.data.manifest:
        return []
    out = []
    for stage in printed:
        n = len(stage.rows(rows_read(system, rows), {}))
        length = max(1, n // stage.batch)
        for metric, values in stage.published.items():
            lines = [(h["step"], h[metric]) for h in history if h["stage"] == stage.name and metric in h]
            for epoch, value in values.items():
                end = epoch * length
                inside = [v for step, v in lines if end - length < step <= end]  # lines are means since the last one
                reached = bool(lines) and lines[-1][0] >= end
                ours = float(np.mean(inside)) if inside else next((v for step, v in lines if step > end), None)
                entry = {"stage": stage.name, "metric": metric, "epoch": epoch, "printed": value}
                out.append(entry | {"ours": ours if reached else None})
    return out
