"""The figures of a split: of its scores and maps, of its parts, and of the baselines (metrics.json)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jmae import metrics, recipe
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.data.rows import in_split
from jmae.data.transforms import central
from jmae.lesions import SIZES, Froc, Localisation, lesion_sizes, thirds
from jmae.results import map_name
from jmae.run_folder import log
from jmae.system import System, rows_read
from jmae.waiting import at_work

WHOLE = "whole"  # the part that is the split itself
CENTRAL = 0.8  # share of each axis that the central crop keeps

Thresholds = Mapping[str, Sequence[float]]  # of the normals, by the map's name: one of each replicate
Maps = Mapping[str, Sequence[np.ndarray]]  # by name: the map of each replicate, (*size) on the case's own grid


# --- what is evaluated ------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The rows that are scored."""

    name: str
    rows: list[Row]
    val: list[Row]  # labelled rows of `val` that choose the decision's threshold; empty where a class is missing
    normals: list[Row]  # the normal rows of `val`; empty where `val` itself is scored
    labels: np.ndarray  # (n,), -1 unknown
    marked: bool  # whether any row has a mask or a box

    @property
    def reference(self) -> list[Row]:
        """The rows of `val` that are scored beside the split."""
        return self.val or self.normals

    @property
    def labelled(self) -> np.ndarray:
        """(n,) which rows have a label."""
        return self.labels >= 0


def split_of(rows: Sequence[Row], name: str) -> Split:
    """A split of a manifest; raises InputError where it is empty."""
    chosen = in_split(rows, name)
    val = [row for row in rows if row.split == "val" != name and row.label is not None]
    normals = [row for row in val if row.label == 0]
    val = val if 0 < len(normals) < len(val) else []
    labels = np.array([-1 if row.label is None else row.label for row in chosen])
    return Split(name, chosen, val, normals, labels, any(row.mask or row.boxes for row in chosen))


class Truth(NamedTuple):
    """What a case's maps are compared with, on the case's own grid."""

    lesion: np.ndarray  # bool (*size)
    region: np.ndarray | None  # bool (*size): where pixels count; None is everywhere
    share: float  # own pixels for one pixel of the grid that is scored


def truth_of(case: Prepared) -> Truth | None:
    """The truth of a labelled case: the mask of a normal is empty. None for an abnormal case without a mask or a box,
    and for a case without a label: neither enters the pixel figures."""
    label = case.row.label
    mask = np.zeros(case.geometry.size, bool) if label == 0 else case.lesion if label == 1 else None
    if mask is None:
        return None
    scored = case.scored_voxels()
    share = (mask.size if scored is None else np.count_nonzero(scored)) / np.prod(case.array.shape[:-1])
    return Truth(mask, case.counted_voxels(), float(share))


# --- pixels -----------------------------------------------------------------------------------------------------------


class PixelFigures:
    """Pixel figures of every map of one part of a split, which is given its cases one by one.

    Args:
      rows: the rows of the part.
      share: central share of each axis that is used.
      froc: (chance) -> a new free-response curve, with or without its chance level; None leaves it out.
      chance: name of the map whose curve has its chance level.
      overlap: whether the overlap of masks and maps is given, image by image.

    `froc` and `overlap` need a share of 1.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        share: float = 1.0,
        froc: Callable[..., Froc] | None = None,
        overlap: bool = False,
        chance: str = "",
    ):
        self.share, self.froc, self.chance = share, froc if share == 1 else None, chance
        self.overlap, self.has_lesions = overlap and share == 1, False
        self.cases_left = Counter(patient_key(row) for row in rows)
        self.pooled: dict[str, list[metrics.Pooled]] = {}
        self.curves: dict[str, list[Froc]] = {}
        self.overlaps: dict[str, list[Localisation]] = {}
        self.patient_pools: dict[str, dict[str, list[metrics.Pooled]]] = {}
        self.patients: list[dict[str, Any]] = []
        self.areas: dict[str, float] = {}  # lesion pixels of each abnormal case, on the grid that is scored

    def add(self, row: Row, truth: Truth, maps: Maps) -> None:
        """Takes one case."""
        view = lambda x: x if x is None or self.share == 1 else central(x, self.share)
        lesion, region = view(truth.lesion), view(truth.region)
        counted = lesion if region is None else lesion & region
        sizes = lesion_sizes(counted) if lesion.any() else None
        self.has_lesions |= sizes is not None
        if counted.any():
            self.areas[row.id] = np.count_nonzero(counted) / truth.share
        of_patient = self.patient_pools.setdefault(patient_key(row), {})
        for name, replicates in maps.items():
            values = [view(value) for value in replicates]
            for pool, value in zip(self._each(self.pooled, name, metrics.Pooled, values), values, strict=True):
                pool.add(lesion, value, region, sizes)
            for pool, value in zip(self._each(of_patient, name, metrics.Pooled, values), values, strict=True):
                pool.add(lesion, value, region)
            if self.froc:
                lesions = box_ends(row) if row.boxes and not row.mask and not row.extra.get("boxes_on") else lesion
                first = name == self.chance and name not in self.curves
                curves = self._each(self.curves, name, partial(self.froc, chance=False), values)
                curves[0] = self.froc(chance=True) if first else curves[0]
                for curve, value in zip(curves, values, strict=True):
                    curve.add(lesions, value, region, share=truth.share)
            if self.overlap and row.mask:  # a box is no outline
                for one, value in zip(self._each(self.overlaps, name, Localisation, values), values, strict=True):
                    one.add(lesion, value, region)

    @staticmethod
    def _each(found: dict[str, list[Any]], name: str, make: Any, values: Sequence[np.ndarray]) -> list[Any]:
        """The pool of each replicate of a map, made at its first case."""
        return found.setdefault(name, [make() for _ in values])

    def close(self, row: Row) -> None:
        """Counts a row of its patient as done. With the patient's last row the patient's figures are computed."""
        patient = patient_key(row)
        self.cases_left[patient] -= 1
        if not self.cases_left[patient] and (pools := self.patient_pools.pop(patient, {})):
            computed = {
                name: mean_of([pool.result() for pool in of_map]) for name, of_map in with_low_ends(pools).items()
            }
            self.patients.append({"patient": row.patient or row.id, "figures": computed})

    def result(self, name: str, thresholds: Sequence[float] = ()) -> dict[str, Any] | None:
        """The pooled figures of a map, or of its "low " end, as means over replicates.

        Args:
          name: of the map.
          thresholds: the normals' threshold of each replicate; empty without normals.

        Returns:
          None where no case has a lesion, or no case has the map.
        """
        pools = self.pooled.get(name.removeprefix("low "), ())
        if not self.has_lesions:
            return None
        mean = mean_of([(pool.negated() if name.startswith("low ") else pool).result() for pool in pools])
        if mean is None:
            return None
        if curves := [found for one in self.curves.get(name, ()) if (found := one.result())]:
            of_all = {key: float(np.mean([found[key] for found in curves])) for key in ("sensitivity", "mean")}
            points = np.mean([found["points"] for found in curves], 0).tolist() if curves[0]["points"] else []
            mean["froc"] = curves[0] | of_all | {"points": points}  # with the first replicate's curve and chance level
        pairs = zip(self.overlaps.get(name, ()), thresholds or repeat(None), strict=False)
        if overlaps := [found for one, threshold in pairs if (found := one.result(threshold))]:
            mean["localisation"] = mean_of(overlaps)
        return mean

    def per_patient(self, map_name: str, scores: Sequence[str]) -> list[dict[str, Any]]:
        """A line {patient, auroc, ap, prevalence, baselines} of each patient, for one map.

        Baselines are all maps but those of the system's `scores`. A brightness counts with either end.
        """
        keys = ("auroc", "ap", "prevalence")
        return [
            {
                "patient": p["patient"],
                **{k: p["figures"][map_name][k] for k in keys},
                "baselines": {b: {k: f[k] for k in keys[:2]} for b, f in p["figures"].items() if b not in scores},
            }
            for p in self.patients
        ]


class NormalThresholds:
    """The percentile of the pixels of normal cases, of each map and replicate: a threshold for maps.

    Pixels count on the case's own grid, inside its region.
    """

    def __init__(self, percentile: float):
        self.percentile = percentile
        self.pools: dict[str, list[metrics.Pooled]] = {}

    def add(self, truth: Truth, maps: Maps) -> None:
        """Takes one normal case."""
        for name, values in maps.items():
            for pool, value in zip(
                self.pools.setdefault(name, [metrics.Pooled() for _ in values]), values, strict=True
            ):
                pool.add(truth.lesion, value, truth.region)

    def result(self) -> dict[str, list[float]]:
        """The threshold of each replicate, by the map's name."""
        return {name: [pool.percentile(self.percentile) for pool in pools] for name, pools in self.pools.items()}


def box_ends(row: Row) -> list[tuple[tuple[float, float], ...]]:
    """A row's boxes as (low, high) of each axis of the array: in 2D the manifest's x runs along the columns."""
    d = len(row.boxes[0]) // 2
    pairs = [tuple(zip(box[:d], box[d:], strict=True)) for box in row.boxes]
    return [pair[::-1] if d == 2 else pair for pair in pairs]


def with_low_ends(maps: Mapping[str, list[metrics.Pooled]]) -> dict[str, list[metrics.Pooled]]:
    """Maps with the other end of each brightness, as which end is abnormal is not known."""
    negated = lambda pools: [pool.negated() for pool in pools]
    return {**maps, **{f"low {name}": negated(pools) for name, pools in maps.items() if name.startswith("brightness")}}


def patient_key(row: Row) -> str:
    """The patient's name. A row without a patient is a patient of its own."""
    return f"patient {row.patient}" if row.patient else f"case {row.id}"


def mean_of(each: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of equal dicts of numbers and lists of numbers, key by key; counts stay whole; None without a dict."""
    if len(each) < 2:
        return dict(each[0]) if each else None
    same = lambda value: value is None or isinstance(value, int)
    return {k: v if same(v) else np.mean([e[k] for e in each], axis=0) for k, v in each[0].items()}


# --- parts of a split -------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a split that gets figures of its own."""

    inside: np.ndarray  # (n,), which rows
    pixels: PixelFigures
    share: float = 1.0  # of each axis, in the middle


def froc_of(evaluation: ConfigDict) -> Callable[..., Froc] | None:
    """(chance) -> a new free-response curve by the rule of the recipe; None where it asks for none."""
    if not evaluation.froc:
        return None
    rule, overlap = evaluation.froc_rule, evaluation.froc_overlap or None
    return partial(Froc, evaluation.froc, least=evaluation.froc_least, overlap=overlap, rule=rule)


def parts_of(config: ConfigDict, split: Split, *, volumes: bool, shown: str = "") -> dict[str, Part]:
    """The labelled rows, those of each subset column and, of images, their central crop. `shown` is the map that stands
    for the system."""
    rows, labelled = split.rows, split.labelled
    froc, overlap = froc_of(config.evaluation), bool(config.evaluation.iou)

    def part(inside: np.ndarray, share: float = 1.0) -> Part:
        used = [row for row, used in zip(rows, inside, strict=True) if used]
        return Part(inside, PixelFigures(used, share, froc, overlap, shown), share)

    parts = {WHOLE: part(labelled)}
    for column in config.evaluation.subsets:
        if column not in rows[0].extra:
            log(f"warning: no column {column!r} in the manifest: no figures of that subset")
            continue
        parts[column] = part(labelled & np.array([row.extra[column] not in ("", "0") for row in rows]))
    if not volumes:
        parts[f"central {CENTRAL:.0%}"] = part(labelled, CENTRAL)
    return parts


@dataclass
class SplitScores:
    """The scores of a split's rows, which are given in order.

    Attributes:
      whole: (r,) of each row, by the score's name.
      central: the same of the central part of each map: its mean.
    """

    whole: dict[str, list[np.ndarray]] = field(default_factory=dict)
    central: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, scores: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray]) -> None:
        """Takes the scores (r,) and maps (r, *size) of the next row."""
        for name, values in scores.items():
            self.whole.setdefault(name, []).append(values)
        for name in maps.keys() & scores.keys():
            middle = np.array([central(m, CENTRAL).mean() for m in maps[name]])
            self.central.setdefault(name, []).append(middle)

    def of(self, share: float) -> dict[str, np.ndarray]:
        """The scores (r, n) on the central `share` of each axis."""
        return {name: np.stack(each, 1) for name, each in (self.whole if share == 1 else self.central).items()}


def part_figures(
    config: ConfigDict,
    system: System,
    split: Split,
    part: Part,
    scores: SplitScores,
    baseline_scores: Mapping[str, np.ndarray],
    thresholds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What metrics.json says of one part of a split: figures of the primary score, of all scores, of the baselines.

    Args:
      baseline_scores: (1, n), on the part's share of each axis.
      thresholds: as `NormalThresholds.result` gives them.
    """
    rows = [row for row, used in zip(split.rows, part.inside, strict=True) if used]
    of_part = lambda values: {name: value[:, part.inside] for name, value in values.items()}
    pooled, draws = part.pixels.pooled, config.evaluation.draws
    of_scores = [name for name in pooled if name in scores.central]
    found = named_figures(of_part(scores.of(part.share)), of_scores, part.pixels, rows, draws, thresholds)
    others = [name for name in pooled if name not in scores.central]
    others += [f"low {name}" for name in others if name.startswith("brightness") and system.sweep]
    baselines = named_figures(of_part(baseline_scores), others, part.pixels, rows, draws, thresholds)
    top = found.get(system.primary, {"image": None, "pixel": None})
    top = top | {"pixel": found.get(system.map, top)["pixel"]}
    return {"n": int(part.inside.sum()), **top, "scores": found, "baselines": better_ends(baselines)}


def named_figures(
    scores: Mapping[str, np.ndarray],
    maps: Sequence[str],
    pixels: PixelFigures,
    rows: Sequence[Row],
    draws: int,
    thresholds: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """{name: {"image", "pixel"}} of scores and maps.

    With replicates each figure is the mean over them. "replicates" then holds their means and 1.96 deviations.

    Args:
      scores: (r, n) of labelled rows.
      maps: names of maps.
      draws: of the bootstrap.
      thresholds: as `NormalThresholds.result` gives them.
    """
    labels, patients = np.array([row.label for row in rows], bool), [row.patient for row in rows]
    out: dict[str, dict[str, Any]] = {}
    measures = {"auroc": metrics.auroc, "ap": metrics.average_precision}
    for name in [*scores, *(name for name in maps if name not in scores)]:
        values = scores.get(name)
        image = None if values is None else metrics.image_metrics(labels, values, patients, draws=draws)
        out[name] = {"image": image, "pixel": pixels.result(name, thresholds.get(name, ()))}
        if values is not None and len(values) > 1:
            each = {key: [measure(labels, one) for one in values] for key, measure in measures.items()}
            out[name]["replicates"] = {key: metrics.replicate_summary(of_all) for key, of_all in each.items()}
    return out


def better_ends(baselines: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The baselines, with the better one of each pair "NAME" and "low NAME"."""
    worth = lambda entry: (entry["image"] or entry["pixel"] or {}).get("auroc", 0)
    lows = [name for name in baselines if name.startswith("low ") and name.removeprefix("low ") in baselines]
    dropped = {min((name, name.removeprefix("low ")), key=lambda n: worth(baselines[n])) for name in lows}
    return {name: entry for name, entry in baselines.items() if name not in dropped}


def decision_figures(
    config: ConfigDict, split: Split, values: np.ndarray, reference: np.ndarray | None
) -> dict[str, Any]:
    """The decision at the threshold chosen on `val`, and the distance of the classes.

    ours: Youden's J is the default rule. It does not depend on how many of `val` are abnormal.

    Args:
      values: primary scores (r, n) of the labelled rows.
      reference: those of the labelled rows of `val`, (r, m); None gives no decision.
    """
    labels = split.labels[split.labelled]
    decision = None
    if reference is not None and split.val:
        val, rule = np.array([row.label for row in split.val], int), config.evaluation.decision
        thresholds = [metrics.threshold_on(val, v, rule) for v in reference]
        each = [metrics.at_threshold(labels, v, t) for v, t in zip(values, thresholds, strict=True)]
        decision = (mean_of(each) or {}) | {"chosen_by": rule}
    chi2 = mean_of([metrics.chi2_distance(v[labels == 0], v[labels == 1]) for v in values])
    return {"decision": decision, "chi2": chi2}


@at_work("computing the figures and their intervals")
def split_figures(
    config: ConfigDict,
    system: System,
    split: Split,
    parts: Mapping[str, Part],
    scores: SplitScores,
    baseline_scores: Callable[[float], Mapping[str, np.ndarray]],
    thresholds: Mapping[str, Sequence[float]],
    reference: np.ndarray | None,
) -> dict[str, Any]:
    """The figures of metrics.json; None, or {}, where no row has a label.

    Args:
      scores: of all rows of the split.
      baseline_scores: (share of each axis) -> those of the baselines, (1, n).
      thresholds: as `NormalThresholds.result` gives them.
      reference: primary scores (r, m) of the labelled rows of `val`, or None.
    """
    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split.name,
        "n": len(split.rows),
        "n_normal": int((split.labels == 0).sum()),
        "n_abnormal": int((split.labels == 1).sum()),
        "primary": system.primary,
        **dict.fromkeys(
            (
                *("image", "pixel", "per_patient", "patient_means", "best_rival", "decision", "chi2", "alarms", "mask"),
                "sizes",
            )
        ),
        **{"scores": {}, "subsets": {}, "baselines": {}},
    }
    if not split.labelled.any():
        return evaluation
    by_share = {share: baseline_scores(share) for share in {part.share for part in parts.values()}}
    found = {
        title: part_figures(config, system, split, part, scores, by_share[part.share], thresholds)
        for title, part in parts.items()
    }
    evaluation |= found.pop(WHOLE) | {"n": len(split.rows), "subsets": found}
    primary = scores.of(1)[system.primary][:, split.labelled]
    evaluation |= decision_figures(config, split, primary, reference)
    rows = [row for row, labelled in zip(split.rows, split.labelled, strict=True) if labelled]
    evaluation["sizes"] = size_figures(primary, rows, parts[WHOLE].pixels.areas, config.evaluation.draws)
    if (name := map_name(system)) in parts[WHOLE].pixels.pooled:
        evaluation["per_patient"] = parts[WHOLE].pixels.per_patient(name, list(evaluation["scores"]))
        evaluation["patient_means"] = patient_means(evaluation, name, config.evaluation.draws)
    baselines = {name: values[:, split.labelled] for name, values in by_share[1].items()}
    evaluation["best_rival"] = {
        "image": image_difference(primary, baselines, evaluation, rows, config.evaluation.draws),
        "pixel": pixel_difference(evaluation, config.evaluation.draws),
    }
    return evaluation


def size_figures(
    primary: np.ndarray, rows: Sequence[Row], areas: Mapping[str, float], draws: int
) -> list[dict[str, Any]] | None:
    """AUROC and AP of the cases with small, medium and large lesions: each third apart, with all normals.

    Args:
      primary: (r, n) of the labelled rows; figures are means over replicates.
      areas: lesion pixels of abnormal cases, by their id.
      draws: of patients, for the intervals.

    Returns:
      {"size", "least", "most"} (areas) and the figures of `metrics.image_metrics`, for each third. None without a
      normal case or with fewer than three areas.
    """
    normal = np.array([row.label == 0 for row in rows])
    numbers = np.array([i for i, row in enumerate(rows) if row.id in areas], int)
    if not normal.any() or numbers.size < 3:
        return None
    found, area = [], np.array([areas[rows[i].id] for i in numbers])
    third = thirds(area)
    for i, name in enumerate(SIZES):
        used = np.sort(np.concatenate([np.flatnonzero(normal), numbers[third == i]]))
        if used.size == normal.sum():
            continue
        labels, patients = ~normal[used], [rows[i].patient for i in used]
        ends = {"least": float(area[third == i].min()), "most": float(area[third == i].max())}
        found.append({"size": name, **ends, **metrics.image_metrics(labels, primary[:, used], patients, draws=draws)})
    return found


def image_difference(
    primary: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    evaluation: Mapping[str, Any],
    rows: Sequence[Row],
    draws: int,
) -> dict[str, Any] | None:
    """How much higher the figures of the primary score are than those of the baseline with the highest AUROC.

    Args:
      primary: (r, n) of labelled rows; figures are means over replicates.
      baselines: (1, n) of the same rows, by name.
      evaluation: has the figures of the baselines that count.
      draws: of patients, for the paired intervals; a cheap baseline and a rival of the network count alike.

    Returns:
      {"name", "of" (number of baselines), "auroc", "auroc_ci", "ap", "ap_ci"}; None without both classes or a baseline.
    """
    aurocs = {name: (e["image"] or {}).get("auroc", np.nan) for name, e in evaluation["baselines"].items()}
    aurocs = {name: value for name, value in aurocs.items() if np.isfinite(value)}
    if not aurocs:
        return None
    name = max(aurocs, key=aurocs.__getitem__)
    labels, patients = np.array([row.label for row in rows], bool), [row.patient for row in rows]
    paired = partial(metrics.paired_difference, labels=labels, scores=primary, others=baselines[name])
    auroc, auroc_ci = paired(metrics.auroc, patients=patients, draws=draws)
    ap, ap_ci = paired(metrics.average_precision, patients=patients, draws=draws)
    own = {"auroc": auroc, "auroc_ci": list(auroc_ci), "ap": ap, "ap_ci": list(ap_ci)}
    return {"name": name, "of": len(aurocs), **own}


def pixel_difference(evaluation: Mapping[str, Any], draws: int) -> dict[str, Any] | None:
    """How much higher the map's mean over patients is than that of the baseline with the highest mean AUROC.

    The interval is over the patients that have both. Keys are those of `image_difference`, and "n", the number of these
    patients. None where no patient has a lesion or there is no baseline.
    """
    means = {name: m["auroc"] for name, m in (evaluation["patient_means"] or {}).items()}
    means = {name: m for name, m in means.items() if name in evaluation["baselines"] and np.isfinite(m)}
    if not means:
        return None
    name = max(means, key=means.__getitem__)
    pairs = [(row, row["baselines"][name]) for row in evaluation["per_patient"] if name in row["baselines"]]
    rows = [{**row, **{k: row[k] - other[k] for k in ("auroc", "ap")}} for row, other in pairs]
    found = metrics.patient_mean(rows, draws)
    keys = ("auroc", "auroc_ci", "ap", "ap_ci", "n")
    return {"name": name, "of": len(means), **{k: found[k] for k in keys}}


def patient_means(evaluation: Mapping[str, Any], map_name: str, draws: int) -> dict[str, dict[str, Any]]:
    """The means over patients, with intervals, of the system's map and of each baseline's (Lang et al. 2023, Table 1).

    A baseline that some patients lack, such as the subtraction image, has the mean over the others.
    """
    rows = evaluation["per_patient"]
    each = {map_name: rows}
    for name in evaluation["baselines"]:
        each[name] = [{**row, **row["baselines"][name]} for row in rows if name in row["baselines"]]
    return {name: metrics.patient_mean(of_map, draws) for name, of_map in each.items() if of_map}


def beside_published(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each value of a stage's metrics that the paper prints, beside the run's own.

    Returns:
      {"stage", "metric", "epoch", "printed", "ours", "otherwise"}: "ours" is the mean over that epoch, None where the
      run ended before it. "otherwise" lists the settings in which the run differs from the paper. Empty where the
      scored rows come from another manifest than the run's.
    """
    stages = [stage for stage in system.stages if stage.published]
    if not stages or recipe.read(workdir).data.manifest != config.data.manifest:
        return []
    found = []
    for stage in stages:
        n = len(stage.rows(rows_read(system, rows), {}))
        length = max(1, n // stage.batch)
        settings = dict(recipe.keys_of(config))
        otherwise = [
            f"{k} {settings[k]} for {value}" for k, value in stage.published_with.items() if settings[k] != value
        ]
        for metric, values in stage.published.items():
            lines = [(h["step"], h[metric]) for h in history if h["stage"] == stage.name and metric in h]
            for epoch, value in values.items():
                end = epoch * length
                inside = [v for step, v in lines if end - length < step <= end]  # a line is the mean since the last
                reached = bool(lines) and lines[-1][0] >= end
                ours = float(np.mean(inside)) if inside else next((v for step, v in lines if step > end), None)
                entry = {"stage": stage.name, "metric": metric, "epoch": epoch, "printed": value}
                found.append(entry | {"ours": ours if reached else None, "otherwise": ", ".join(otherwise)})
    return found
