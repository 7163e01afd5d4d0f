"""How well scores tell abnormal from normal: exact, with intervals, on images and on pixels; NumPy, on the host.

A higher score is more abnormal, and "called abnormal at t" means `score >= t` throughout. Everything follows
from two sorted arrays, the scores of the negatives and those of the positives: AUROC is the rank statistic, AP
the mean over positives of the precision at their own score; and as a threshold that is no positive's score only
adds negatives, the best Dice and the best Youden index lie at a positive's score too. So no pixels are argsorted,
ties need no special case, and 10^8 float32 pixels take about 1 GB beside the caller's own arrays. Only pools of
more than `EXACT` pixels are counted in bins, and then state how far off AUROC and AP can be (`Pooled`).

Where one class is missing a measure is nan, never a guess; `json_ready` turns nan into null.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, special

from jmae.errors import InputError

CHUNK = 1 << 20  # scores looked up or binned, and cases of draws counted, at a time: at most about 100 MB
EXACT = 1 << 27  # pixels that a pool keeps one by one (512 MiB of float32); more are counted in bins
FROC_EXACT = 1 << 30  # pixels of the maps that a free-response curve keeps (4 GiB)
IOU_EXACT = 1 << 26  # distinct scores that a `Localisation` keeps one by one (768 MiB); more are thinned
BINS = 1 << 20  # by the sign, the exponent and 11 bits of the mantissa: 2^-11 wide, relative to their scores


class Ranked(NamedTuple):
    """The scores of each class, ascending."""

    negatives: NDArray[Any]
    positives: NDArray[Any]


def _check_finite(negatives: NDArray[Any], positives: NDArray[Any]) -> None:
    """InputError where scores are not finite."""
    bad = sum(a.size - np.count_nonzero(np.isfinite(a)) for a in (negatives, positives))
    if bad:
        raise InputError(
            f"{bad} of {negatives.size + positives.size} scores are not finite: a metric over them would be "
            "silently wrong; look for empty or constant images, or for a training that diverged"
        )


def _sort(negatives: NDArray[Any], positives: NDArray[Any]) -> Ranked:
    """Sorts both in place (they must be nobody else's); InputError where scores are not finite."""
    _check_finite(negatives, positives)
    negatives.sort()
    positives.sort()
    return Ranked(negatives, positives)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Flat booleans and floats (float32 stays so); ValueError unless equally many, and labels 0 or 1."""
    labels, scores = np.asarray(labels).ravel(), np.asarray(scores).ravel()
    if labels.shape != scores.shape:
        raise ValueError(f"{labels.size} labels for {scores.size} scores: give one label a score")
    if labels.dtype != bool and not np.all((labels == 0) | (labels == 1)):
        raise ValueError("labels must be 0 (normal) or 1 (abnormal): leave out cases of unknown label")
    return labels.astype(bool, copy=False), scores.astype(np.result_type(scores, np.float32), copy=False)


def rank(labels: ArrayLike, scores: ArrayLike) -> Ranked:
    """Sorts each class once; the inputs stay as they are."""
    labels, scores = _checked(labels, scores)
    return _sort(scores[~labels], scores[labels])


def _one_class(ranked: Ranked) -> bool:
    return not (ranked.negatives.size and ranked.positives.size)


def _at_positives(ranked: Ranked) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Chunks (thresholds, true positives, false positives), one entry a positive, thresholds ascending."""
    for start in range(0, ranked.positives.size, CHUNK):
        t = ranked.positives[start : start + CHUNK]
        fp, tp = (a.size - np.searchsorted(a, t) for a in ranked)
        yield t, tp, fp


def _auroc(ranked: Ranked) -> float:
    if _one_class(ranked):
        return math.nan
    negatives, positives = ranked
    wins = 0  # in half pairs, a Python integer: exact beyond 2^53
    for start in range(0, positives.size, CHUNK):
        t = positives[start : start + CHUNK]
        wins += int(np.searchsorted(negatives, t).sum() + np.searchsorted(negatives, t, "right").sum())
    return wins / (2 * negatives.size * positives.size)


def _average_precision(ranked: Ranked) -> float:
    if _one_class(ranked):
        return math.nan
    return float(sum((tp / (tp + fp)).sum() for _, tp, fp in _at_positives(ranked)) / ranked.positives.size)


def _best(ranked: Ranked, measure: Callable[[NDArray, NDArray], NDArray]) -> tuple[float, float]:
    """The largest measure(tp, fp) over all thresholds, and the highest threshold that reaches it."""
    if _one_class(ranked):
        return math.nan, math.nan
    best, threshold = -math.inf, math.nan
    for t, tp, fp in _at_positives(ranked):
        values = measure(tp, fp)
        last = values.size - 1 - int(values[::-1].argmax())
        if values[last] >= best:
            best, threshold = float(values[last]), float(t[last])
    return best, threshold


def _best_dice(ranked: Ranked) -> tuple[float, float]:
    return _best(ranked, lambda tp, fp: 2 * tp / (tp + fp + ranked.positives.size))


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Flat arrays of any size; nan where one class is missing; InputError where scores are not finite.
    """
    return _auroc(rank(labels, scores))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """AP = sum over thresholds of (R_n - R_{n-1}) P_n, without interpolation; tied scores are one threshold.

    Flat arrays of any size; nan where one class is missing; InputError where scores are not finite.
    """
    return _average_precision(rank(labels, scores))


def best_dice(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The largest Dice over all thresholds, and the threshold (the highest, where several reach it).

    An oracle: the threshold is chosen on the very data that it is judged on, so this is an upper bound and is
    to be named so. (nan, nan) where one class is missing.
    """
    return _best_dice(rank(labels, scores))


def iou(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Intersection over union of the positives and `score >= threshold`; nan where both are empty."""
    labels, scores = _checked(labels, scores)
    called = scores >= threshold
    union = np.count_nonzero(labels | called)
    return np.count_nonzero(labels & called) / union if union else math.nan


def _operating_points(ranked: Ranked, points: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Thresholds (descending) at evenly spread ranks of both classes, or all where they are few; tp; fp."""
    some = [a[np.linspace(0, a.size - 1, min(a.size, points)).astype(int)] for a in ranked]
    t = np.unique(np.concatenate(some))[::-1]
    fp, tp = (a.size - np.searchsorted(a, t) for a in ranked)
    return t, tp, fp


def roc_curve(labels: ArrayLike, scores: ArrayLike, points: int = 200) -> tuple[NDArray, NDArray, NDArray]:
    """(false-positive rate, true-positive rate, threshold), from (0, 0, inf) up to (1, 1, lowest score).

    At most `2 * points + 1` exact points, evenly spread over the ranks of either class: the whole curve where
    no class has more than `points` scores. Empty where one class is missing.
    """
    ranked = rank(labels, scores)
    if _one_class(ranked):
        return np.empty(0), np.empty(0), np.empty(0)
    t, tp, fp = _operating_points(ranked, points)
    return np.r_[0, fp] / ranked.negatives.size, np.r_[0, tp] / ranked.positives.size, np.r_[np.inf, t]


def pr_curve(labels: ArrayLike, scores: ArrayLike, points: int = 200) -> tuple[NDArray, NDArray, NDArray]:
    """(recall, precision, threshold), at the thresholds of `roc_curve`; empty where one class is missing."""
    ranked = rank(labels, scores)
    if _one_class(ranked):
        return np.empty(0), np.empty(0), np.empty(0)
    t, tp, fp = _operating_points(ranked, points)
    return tp / ranked.positives.size, tp / (tp + fp), t


def threshold_on(labels_val: ArrayLike, scores_val: ArrayLike, largest: str = "youden") -> float:
    """The validation score at which Youden's J = sensitivity + specificity - 1, or with `largest="accuracy"` the
    accuracy, is largest, of those that call an abnormal case abnormal.

    Of equally good ones the highest is taken (the fewest false alarms). nan where a class is missing.
    """
    ranked = rank(labels_val, scores_val)
    n, p = (ranked.negatives.size, ranked.positives.size) if largest == "youden" else (1, 1)
    return _best(ranked, lambda tp, fp: tp * n - fp * p)[1]  # in integers, so that equal ones are equal


def at_threshold(labels: ArrayLike, scores: ArrayLike, threshold: float) -> dict[str, float]:
    """Accuracy; F1, precision and sensitivity (recall) of the abnormal; specificity of `score >= threshold`. nan where
    undefined."""
    labels, scores = _checked(labels, scores)
    called = scores >= threshold
    tp, fp = np.count_nonzero(called & labels), np.count_nonzero(called & ~labels)
    p, n = np.count_nonzero(labels), np.count_nonzero(~labels)
    ratio = lambda a, b: a / b if b and not math.isnan(threshold) else math.nan
    return {
        "accuracy": ratio(tp + n - fp, n + p),
        "f1": ratio(2 * tp, tp + fp + p),
        "precision": ratio(tp, tp + fp),
        "sensitivity": ratio(tp, p),
        "specificity": ratio(n - fp, n),
        "threshold": float(threshold),
    }


def _clusters(patients: Sequence[Any]) -> NDArray[np.int64]:
    """Patient numbers 0..k-1; a case without a patient ("" or None) is a patient of its own."""
    number: dict[Any, int] = {}
    keys = [("patient", p) if p not in ("", None) else ("case", i) for i, p in enumerate(patients)]
    return np.array([number.setdefault(key, len(number)) for key in keys], np.int64)


Measure = Callable[[ArrayLike, ArrayLike], float]


def bootstrap_interval(
    measure: Measure,
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[Any],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `auroc` or `average_precision`, resampling patients with all their images (clusters).

    As many patients as there are, with replacement, `draws` times; a draw that lacks a class is left out.
    (nan, nan) where no draw has both. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    labels, scores = _checked(labels, scores)
    each = _over_draws(measure, labels, scores)
    return _percentiles([each(counts) for counts in _drawn(labels, patients, draws, seed)], level)


def paired_difference(
    measure: Measure,
    labels: ArrayLike,
    scores: ArrayLike,
    others: ArrayLike,
    patients: Sequence[Any],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, tuple[float, float]]:
    """measure(labels, scores) - measure(labels, others) of the same cases, and its percentile interval over the same
    draws of patients for both (`bootstrap_interval`)."""
    (labels, scores), (_, others) = _checked(labels, scores), _checked(labels, others)
    a, b = (_over_draws(measure, labels, values) for values in (scores, others))
    each = [a(counts) - b(counts) for counts in _drawn(labels, patients, draws, seed)]
    return measure(labels, scores) - measure(labels, others), _percentiles(each, level)


def _drawn(labels: NDArray[np.bool_], patients: Sequence[Any], draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Some draws of patients at a time that have both classes: how often each case is in each, (k, cases)."""
    if len(patients) != labels.size:
        raise ValueError(f"{len(patients)} patients for {labels.size} scores: give one patient a score")
    if labels.all() or not labels.any():
        return
    clusters = _clusters(patients)
    n, rng = int(clusters.max()) + 1, np.random.default_rng(seed)
    rows = max(1, CHUNK // labels.size)
    for start in range(0, draws, rows):
        drawn = rng.integers(n, size=(min(rows, draws - start), n))
        places = drawn + n * np.arange(len(drawn))[:, None]
        counts = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)[:, clusters]
        yield counts[counts[:, labels].any(1) & counts[:, ~labels].any(1)]


def _over_draws(measure: Measure, labels: NDArray[np.bool_], scores: NDArray[Any]) -> Callable[[NDArray], NDArray]:
    """A function (k, cases) -> (k,): a measure of draws from how often each case is in them; scores are sorted once."""
    if measure not in (auroc, average_precision):
        raise ValueError("measure is auroc or average_precision")
    _check_finite(scores[~labels], scores[labels])
    order = np.argsort(scores)
    sorted_scores, sorted_labels = scores[order], labels[order]
    low, high = (np.searchsorted(sorted_scores, sorted_scores[sorted_labels], side) for side in ("left", "right"))

    def each(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        counts = counts[:, order]
        before = lambda own: np.pad(np.cumsum(counts * own, 1), ((0, 0), (1, 0)))  # cases of a class below each place
        negatives, positives, times = before(~sorted_labels), before(sorted_labels), counts[:, sorted_labels]
        n, p = negatives[:, -1], positives[:, -1]
        if measure is auroc:
            return np.sum(times * (negatives[:, low] + negatives[:, high]), 1) / (2 * n * p)
        tp, fp = p[:, None] - positives[:, low], n[:, None] - negatives[:, low]
        return np.sum(times * tp / np.maximum(tp + fp, 1), 1) / p

    return each


def _percentiles(parts: Sequence[NDArray], level: float) -> tuple[float, float]:
    values = np.concatenate([*parts, np.zeros(0)])
    if not values.size:
        return math.nan, math.nan
    lo, hi = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(lo), float(hi)


def chi2_distance(scores_normal: ArrayLike, scores_abnormal: ArrayLike, bins: int = 100) -> dict[str, float]:
    """1/2 sum_b (h_b - k_b)^2 / (h_b + k_b) over equal bins of the min-max scaled scores of both classes.

    `raw` on counts (it grows with the number of images), `normalised` on fractions (0 equal, 1 disjoint): AMAE
    (Bozorgtabar et al. 2023) says neither which of the two nor how many bins; 100 is our reading.
    """
    classes = [np.array(s, np.float64).ravel() for s in (scores_normal, scores_abnormal)]
    ranked = _sort(*classes)
    if _one_class(ranked):
        return {"raw": math.nan, "normalised": math.nan}
    low, high = min(a[0] for a in ranked), max(a[-1] for a in ranked)
    h, k = (np.histogram((a - low) / ((high - low) or 1), bins, (0, 1))[0] for a in ranked)
    half = lambda h, k: float(0.5 * ((h - k) ** 2 / np.where(h + k, h + k, 1)).sum())
    return {"raw": half(h, k), "normalised": half(h / h.sum(), k / k.sum())}


def replicate_summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over replicates (seeds) and 1.96 sample standard deviations (ddof 1; nan for one value)."""
    values = [float(v) for v in values]
    mean = float(np.mean(values)) if values else math.nan
    half_width = 1.96 * float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": mean, "half_width": half_width, "values": values}


def welch_test(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Two-sided t-test for unequal variances: t, Welch-Satterthwaite degrees of freedom, p.

    nan where a group has fewer than two values or neither varies.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(x.size, y.size) < 2 or not (np.ptp(x) or np.ptp(y)):
        return {"t": math.nan, "df": math.nan, "p": math.nan}
    vx, vy = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    t = (x.mean() - y.mean()) / math.sqrt(vx + vy)
    df = (vx + vy) ** 2 / (vx**2 / (x.size - 1) + vy**2 / (y.size - 1))
    return {"t": float(t), "df": float(df), "p": float(2 * special.stdtr(df, -abs(t)))}


def image_metrics(
    labels: ArrayLike, scores: ArrayLike, patients: Sequence[Any], *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """AUROC and AP of image scores with 95 % intervals over patients, and how many images of each class."""
    labels, scores = _checked(labels, scores)
    ranked = rank(labels, scores)
    interval = lambda f: list(bootstrap_interval(f, labels, scores, patients, draws=draws, seed=seed))
    return {
        "auroc": _auroc(ranked),
        "auroc_ci": interval(auroc),
        "ap": _average_precision(ranked),
        "ap_ci": interval(average_precision),
        "n_normal": ranked.negatives.size,
        "n_abnormal": ranked.positives.size,
    }


Masks = Sequence[NDArray[np.bool_]]
Maps = Sequence[NDArray[Any]]
Regions = Sequence[NDArray[np.bool_] | None] | None


def _bin(scores: NDArray[Any]) -> NDArray[Any]:
    """The bin of each score, in the order of the scores: equal scores (-0.0 and 0.0 too) are in one bin.

    The bits of a float32, read as an integer, rise with a positive number and fall with a negative one.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 goes to the outermost bin: still in order
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    return np.where(bits >> 31, ~bits, bits | 0x80000000) >> 12


def _edge(bins: NDArray[Any]) -> NDArray[np.float32]:
    """The lowest score of each bin: what is at or above it lies in that bin or a higher one."""
    bits = bins.astype(np.uint32) << 12
    return np.where(bits >> 31, bits ^ np.uint32(0x80000000), ~bits).view(np.float32)


def _binned(counts: NDArray[np.int64]) -> dict[str, float]:
    """Figures, with the bounds of `Pooled`, of negatives and positives counted in bins: (2, bins), ascending."""
    n, p = counts[:, ::-1]
    fp, tp = counts[:, ::-1].cumsum(1)
    negatives, positives = int(fp[-1]), int(tp[-1])
    if not (negatives and positives):
        return dict.fromkeys(("auroc", "ap", "dice_best", "auroc_error", "ap_error"), math.nan)
    n, p, fp, tp = (a.astype(float) for a in (n[p > 0], p[p > 0], fp[p > 0], tp[p > 0]))
    pairs = negatives * positives
    ap = (p * tp / (tp + fp)).sum() / positives
    highest = (p * tp / (tp + fp - n)).sum() / positives
    lowest = (p - fp * np.log1p(p / (tp - p + fp + 0.5))).sum() / positives
    return {
        "auroc": float((p * (negatives - fp + n / 2)).sum() / pairs),
        "ap": float(ap),
        "dice_best": float((2 * tp / (tp + fp + positives)).max()),
        "auroc_error": float((p * n).sum() / (2 * pairs)),
        "ap_error": float(max(highest - ap, ap - lowest)),
    }


class Pooled:
    """The pixels (voxels) of any number of images, inside their regions, pooled image by image.

    Exact up to `EXACT` pixels. Beyond, pixels are counted in `BINS` bins, all that share a bin count as tied, and
    figures have bounds on their distance to the exact ones, whatever the scores within the bins. With p_b positives
    and n_b negatives in bin b, P and N in all, TP_b and FP_b in b and above:

      auroc_error = 1/2 sum_b p_b n_b / (P N), as a pair within a bin counts 1/2 and is worth 0 to 1;
      ap_error = the larger distance of AP = 1/P sum_b p_b TP_b / (TP_b + FP_b) to the ends of what it can be:
        highest, a bin's positives tied and above its negatives: 1/P sum_b p_b TP_b / (TP_b + FP_b - n_b);
        lowest, below its negatives and one by one: with T = TP_b - p_b + FP_b,
          1/P sum_b sum_{j=1..p_b} (1 - FP_b / (T + j)) >= 1/P sum_b (p_b - FP_b log(1 + p_b / (T + 1/2))),
          as 1/x is convex, so that 1/(T + j) is at most its mean from T + j - 1/2 to T + j + 1/2.

    The best Dice (and its IoU) is then the best over the edges of bins, hence at most the exact one.
    """

    def __init__(self) -> None:
        self.images = 0
        self.sizes = [0, 0]  # pixels, negative and positive
        self.parts: tuple[list[NDArray], list[NDArray]] = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        self.counts: NDArray[np.int64] | None = None  # (2, BINS), once in bins; parts are empty then

    def add(self, mask: NDArray, scores: NDArray, region: NDArray | None = None) -> None:
        """Takes one image: its lesion mask, its map and where metrics count (None is everywhere), of one shape.

        ValueError where shapes differ, InputError where scores inside the region are not finite; neither is taken.
        """
        shapes = [a.shape for a in (mask, scores, region) if a is not None]
        if len(set(shapes)) != 1:
            raise ValueError(f"image {self.images}: mask, map (and region) are {shapes}: bring them to one grid")
        lesion = mask.astype(bool, copy=False)
        inside = np.True_ if region is None else region.astype(bool, copy=False)
        classes = scores[inside & ~lesion], scores[inside & lesion]
        _check_finite(*classes)
        self.images += 1
        self.sizes = [size + values.size for size, values in zip(self.sizes, classes, strict=True)]
        for parts, values in zip(self.parts, classes, strict=True):
            parts.append(values)
        if sum(self.sizes) > EXACT:
            self._count()

    def negated(self) -> "Pooled":
        """The same pixels with their scores negated."""
        other = Pooled()
        other.images, other.sizes = self.images, self.sizes
        other.parts = [-v for v in self.parts[0]], [-v for v in self.parts[1]]
        other.counts = None if self.counts is None else self.counts[:, ::-1]
        return other

    def _count(self) -> None:
        """Moves the scores kept one by one into bins."""
        self.counts = np.zeros((2, BINS), np.int64) if self.counts is None else self.counts
        for counts, parts in zip(self.counts, self.parts, strict=True):
            for values in parts:
                for start in range(0, values.size, CHUNK):
                    counts += np.bincount(_bin(values[start : start + CHUNK]), minlength=BINS)
            parts.clear()

    def percentile(self, q: float) -> float:
        """The q-th percentile, linear between ranks, of the negatives so far; in bins the lower edge of the bin that
        holds the rank at or below it. nan where there are none."""
        if not self.sizes[0]:
            return math.nan
        if self.counts is None:
            return float(np.percentile(np.concatenate(self.parts[0]), q))
        rank = math.floor((self.sizes[0] - 1) * q / 100)
        return float(_edge(np.searchsorted(self.counts[0].cumsum(), [rank], "right"))[0])

    def result(self) -> dict[str, float | None]:
        """The figures of `pixel_metrics` over the images so far; in bins also auroc_error and ap_error."""
        if self.counts is None:
            ranked = _sort(*(np.concatenate(parts) for parts in self.parts))
            found = {"auroc": _auroc(ranked), "ap": _average_precision(ranked), "dice_best": _best_dice(ranked)[0]}
        else:
            found = _binned(self.counts)
        dice, total = found["dice_best"], sum(self.sizes)
        return {
            **found,
            "prevalence": self.sizes[1] / total if total else math.nan,
            "iou": dice / (2 - dice),  # at one threshold IoU = D / (2 - D), which rises with D
            "froc": None,
        }


def pixel_metrics(masks: Masks, maps: Maps, regions: Regions = None) -> dict[str, float | None]:
    """Metrics over the pixels (voxels) of all images pooled, inside `regions` where given.

    Args:
      masks: one boolean array an image, True = lesion; all False for a normal image.
      maps: one array of scores an image, of the mask's shape.
      regions: where metrics count, one boolean array an image; None is everywhere, for one image or for all.

    Returns: auroc, ap, prevalence (the AP of a random map), dice_best and iou at the oracle threshold (upper
    bounds, see `best_dice`), froc None. nan where one class is missing. Beyond `EXACT` pixels also auroc_error
    and ap_error (see `Pooled`).
    """
    pool = Pooled()
    for mask, scores, region in zip(masks, maps, [None] * len(maps) if regions is None else regions, strict=True):
        pool.add(mask, scores, region)
    return pool.result()


Boxes = Sequence[Sequence[Sequence[float]]]


class _Marked(NamedTuple):
    """An image of a `Froc`, or several of one shape, stacked."""

    scores: NDArray[np.float32]  # ([images,] *axes); -inf outside the region
    boxes: NDArray[np.int64]  # (lesions, axes, 2), half-open
    pixels: NDArray[np.int64]  # flat indices of the lesions' pixels inside the region; empty without `overlap`
    owners: NDArray[np.int64]  # and the lesion of each
    images: NDArray[np.int64]  # of stacked ones the image of each lesion


def _stacked(kept: list[_Marked]) -> Iterator[_Marked]:
    """Small neighbours of one shape as a copy of up to CHUNK scores; an image above CHUNK / 16 alone, as a view."""
    start = 0
    while start < len(kept):
        shape, size = kept[start].scores.shape, kept[start].scores.size
        part = kept[start : start + (CHUNK // size if 16 * size <= CHUNK else 1)]
        part = part[: next((k for k, image in enumerate(part) if image.scores.shape != shape), len(part))]
        start += len(part)
        lesions = np.array([len(image.boxes) for image in part])
        before = np.cumsum(lesions) - lesions
        yield _Marked(
            np.stack([image.scores for image in part]) if len(part) > 1 else part[0].scores[None],
            np.concatenate([image.boxes for image in part]),
            np.concatenate([image.pixels + k * size for k, image in enumerate(part)]),
            np.concatenate([image.owners + n for n, image in zip(before, part, strict=True)]),
            np.repeat(np.arange(len(part)), lesions),
        )


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Components labelled 1..n, also over edges and corners (8 neighbours in 2D, 26 in 3D); n."""
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def _lesions(lesions: Boxes | NDArray, shape: tuple[int, ...]) -> tuple[NDArray, NDArray, NDArray]:
    """Boxes (lesions, axes, 2) in whole pixels; the flat indices of all lesions' pixels; the lesion of each."""
    given = np.asarray(lesions)
    if given.dtype == bool:
        if given.shape != shape:
            raise ValueError(f"the mask is {given.shape}, the map {shape}: bring them to one grid")
        labels = _components(given)[0]
        ends = [[(s.start, s.stop) for s in slices] for slices in ndimage.find_objects(labels)]
        pixels = np.flatnonzero(labels)
        return np.array(ends, int).reshape(-1, len(shape), 2), pixels, labels.ravel()[pixels] - 1
    if given.size and given.shape[1:] != (len(shape), 2):
        raise ValueError(
            f"boxes are {given.shape}: give a pair (low, high) for each of {len(shape)} axes, or a bool mask"
        )
    low, high = np.moveaxis(np.floor(given.reshape(-1, len(shape), 2) + 0.5).astype(int), -1, 0)
    low = np.clip(low, 0, np.array(shape) - 1)
    boxes = np.stack([low, np.clip(high, low + 1, shape)], -1)
    cells = [np.ravel_multi_index(np.ix_(*(np.arange(*ends) for ends in box)), shape).ravel() for box in boxes]
    owners = np.repeat(np.arange(len(boxes)), [cell.size for cell in cells])
    return boxes, np.concatenate([np.empty(0, int), *cells]), owners


class Froc:
    """Sensitivity for lesions against false positives an image, over images fed one by one (free-response ROC).

    The rule: thresholds t are quantiles of the scores of all images inside their regions, evenly spread, equal ones
    once. At each, the connected components (`_components`) of {score >= t} with fewer than `least` pixels are dropped.
    A lesion is hit where the centroid of a component lies in its box (borders included) or, given `overlap`, where the
    intersection over union of a component and the lesion is at least that. A component that hits no lesion is a false
    positive; their number is a mean over all images, normal ones too. The sensitivity at `at` false positives is
    interpolated linearly where their number first exceeds `at` going down from the highest score, or is the largest
    one reached before: components merge, so neither number is monotone, and thresholds below are not looked at. Where
    `at` is never exceeded it is the largest of all. P-PII (Müller et al. 2023) reports it at 10 and gives no rule:
    this one is ours.

    ours: to the evenly spread quantiles come as many in geometric progression from the highest score down. The highest
    1/200 of a large, rough map can hold far more than `at` components: the curve then passes `at` in its first step,
    and the value interpolated there is far too low (on 512 x 512 pixels of noise blurred by 2 pixels, 0.15 instead of
    1.0). `thresholds` is the number of either.

    Maps are kept in memory, as float32, up to `FROC_EXACT` pixels in all. Beyond, no curve is made and the sensitivity
    is nan.
    """

    def __init__(self, at: float = 10.0, thresholds: int = 200, least: int = 5, overlap: float | None = None) -> None:
        self.at, self.thresholds, self.least, self.overlap = at, thresholds, least, overlap
        self.images = self.lesions = self.size = 0
        self.kept: list[_Marked] = []

    def add(self, lesions: Boxes | NDArray[np.bool_], scores: NDArray, region: NDArray | None = None) -> None:
        """Takes one image.

        Args:
          lesions: a mask of the map's shape, whose connected components are the lesions; or boxes, each one pair (low,
            high) for each axis of the map (rows first; a manifest has x0 y0 x1 y1), half-open, rounded to pixels,
            of which each box keeps at least one; none for a normal image. A lesion without a pixel inside the region
            is left out.
          scores: the map; higher is more abnormal.
          region: where it counts, bool; None is everywhere.

        ValueError where shapes differ, InputError where scores inside the region are not finite; neither is taken.
        """
        if region is not None and region.shape != scores.shape:
            raise ValueError(f"the region is {region.shape}, the map {scores.shape}: bring them to one grid")
        boxes, pixels, owners = _lesions(lesions, scores.shape)
        with np.errstate(over="ignore"):
            scores = scores.astype(np.float32)  # a copy
        inside = np.ones(scores.shape, bool) if region is None else region.astype(bool, copy=False)
        _check_finite(scores[inside], np.empty(0))
        scores[~inside] = -np.inf
        counted = inside.ravel()[pixels]
        used, owners = np.unique(owners[counted], return_inverse=True)
        pixels = pixels[counted] if self.overlap is not None else np.empty(0, int)
        self.images, self.lesions, self.size = self.images + 1, self.lesions + used.size, self.size + scores.size
        self.kept.append(_Marked(scores, boxes[used], pixels, owners[: pixels.size], np.zeros(used.size, int)))
        if self.size > FROC_EXACT:
            self.kept.clear()

    def _found(self, part: _Marked, t: np.float32) -> tuple[int, int]:
        """How many lesions of stacked images are hit, and how many components hit none."""
        within = np.zeros((3,) * part.scores.ndim)
        within[1] = 1  # neighbours of one image
        labels, n = ndimage.label(part.scores >= t, within)
        flat, axes = labels.ravel(), part.scores.ndim - 1
        sizes, images, sums = np.zeros(n, int), np.zeros(n, int), np.zeros((axes, n))
        for start in range(0, flat.size, CHUNK):
            pixels = start + np.flatnonzero(flat[start : start + CHUNK])
            of = flat[pixels] - 1
            sizes += np.bincount(of, minlength=n)
            if len(part.boxes):
                images[of], *places = np.unravel_index(pixels, labels.shape)
                sums += [np.bincount(of, place, n) for place in places]
        large = np.flatnonzero(sizes >= self.least)
        if not (len(part.boxes) and large.size):
            return 0, large.size
        centre = (sums / sizes).T[large]
        # Every lesion with the components of its image, which are numbered image by image.
        ends = np.searchsorted(images[large], np.stack([part.images, part.images + 1]))
        numbers = ends[1] - ends[0]
        lesion = np.repeat(np.arange(len(numbers)), numbers)
        component = np.arange(lesion.size) + np.repeat(ends[0] - np.cumsum(numbers) + numbers, numbers)
        low, high = part.boxes[..., 0] - 0.5, part.boxes[..., 1] - 0.5  # the outer borders of their pixels
        hits = ((low[lesion] <= centre[component]) & (centre[component] <= high[lesion])).all(-1)
        if self.overlap is not None:
            k = len(part.boxes)
            found = labels.ravel()[part.pixels] - 1
            keys, counts = np.unique((found * k + part.owners)[found >= 0], return_counts=True)
            wanted = large[component] * k + lesion
            at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
            shared = np.where(keys[at] == wanted, counts[at], 0) if len(keys) else np.zeros(len(wanted), int)
            union = sizes[large][component] + np.bincount(part.owners, minlength=k)[lesion] - shared
            hits |= shared >= self.overlap * union
        return np.unique(lesion[hits]).size, large.size - np.unique(component[hits]).size

    def result(self) -> dict[str, Any] | None:
        """The images so far; None where none has a lesion.

        Returns: sensitivity, `at`, the numbers of lesions and of images, and curve: [false positives an image,
        sensitivity] from [0, 0] at an infinite threshold downwards, the last beyond `at` where it is exceeded.
        """
        if not self.lesions:
            return None
        about = {"at": self.at, "lesions": self.lesions, "images": self.images}
        if not self.kept:
            return {"sensitivity": math.nan, **about, "curve": []}
        values = np.concatenate([image.scores[image.scores > -np.inf] for image in self.kept])
        last = values.size - 1
        evenly = np.linspace(0, last, min(values.size, self.thresholds))
        ranks = np.unique(np.concatenate([evenly, values.size - np.geomspace(1, values.size, evenly.size)]).astype(int))
        values.partition(ranks)
        parts = list(_stacked(self.kept))
        curve = [(0.0, 0.0)]
        best = 0.0
        for t in np.unique(values[ranks])[::-1]:
            hits, false = np.sum([self._found(part, t) for part in parts], 0)
            curve.append((float(false / self.images), float(hits / self.lesions)))
            if curve[-1][0] > self.at:
                (x0, y0), (x1, y1) = curve[-2:]
                best = max(best, y0 + (y1 - y0) * (self.at - x0) / (x1 - x0))
                break
            best = max(best, curve[-1][1])
        return {"sensitivity": best, **about, "curve": [list(point) for point in curve]}


def _thinned(values: NDArray[np.float32], ious: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Of ascending scores and the IoU at each, the lowest score of each bin, moved to the bin's edge."""
    bins, first = np.unique(_bin(values), return_index=True)
    return _edge(bins), ious[first]


class Localisation:
    """Intersection over union of lesion masks and {score >= t}, a mean over images, fed one by one.

    MemMC-MAE (Tian et al. 2022) reports the mean over five random groups of 100 abnormal images, and names no rule for
    the threshold t. ours: `oracle` is the one threshold that is best on the images of the groups, so an upper bound;
    `normals` is given, a percentile of the pixels of held-out normals.

    The oracle is exact: an image's IoU is a step function of t, so the sum over images is that of its jumps, sorted by
    score. Kept are 12 bytes a distinct score (of each image); `result` takes about 40 more. Beyond `IOU_EXACT` of them
    thresholds are the edges of `Pooled`'s bins, at most 2^-11 apart relative to the scores: IoU is exact at each, `t`
    is lowered to the next one, and the oracle can be lower than the true one.
    """

    def __init__(self) -> None:
        self.size = 0  # distinct scores so far, of each image
        self.exact = True
        self.kept: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []  # scores, ascending; IoU at each

    def add(self, mask: NDArray, scores: NDArray, region: NDArray | None = None) -> None:
        """Takes one image: its lesion mask, its map and where it counts (None is everywhere), of one shape. An image
        without a lesion inside the region is left out.

        ValueError where shapes differ, InputError where scores inside the region are not finite; neither is taken.
        """
        shapes = [a.shape for a in (mask, scores, region) if a is not None]
        if len(set(shapes)) != 1:
            raise ValueError(f"mask, map (and region) are {shapes}: bring them to one grid")
        inside = np.True_ if region is None else region.astype(bool, copy=False)
        lesion = mask.astype(bool, copy=False)
        with np.errstate(over="ignore"):
            ranked = _sort(*(scores[inside & part].astype(np.float32) for part in (~lesion, lesion)))
        if not ranked.positives.size:
            return
        t, tp, fp = _operating_points(ranked, max(map(len, ranked)))
        self.kept.append((t[::-1], (tp / (ranked.positives.size + fp))[::-1]))
        self.size += t.size
        if self.exact and self.size > IOU_EXACT:
            self.exact, self.kept = False, [_thinned(*each) for each in self.kept]
        elif not self.exact:
            self.kept[-1] = _thinned(*self.kept[-1])

    def at(self, threshold: float) -> NDArray[np.float64]:
        """(n,) the IoU of each image so far; 0 where nothing is called abnormal."""
        return np.array([np.append(ious, 0.0)[np.searchsorted(values, threshold)] for values, ious in self.kept])

    def oracle(self, images: NDArray[np.integer] | None = None) -> float:
        """The threshold whose mean IoU over `images` (their numbers; None is all) is the largest, up to rounding."""
        used = self.kept if images is None else [self.kept[i] for i in images]
        values = np.concatenate([values for values, _ in used])
        jumps = np.concatenate([-np.diff(ious, append=0.0) for _, ious in used])
        order = np.argsort(values)[::-1]
        values, sums = values[order], np.cumsum(jumps[order])
        sums[:-1][values[1:] == values[:-1]] = -1.0  # ties fall together, at the last of them
        return float(values[sums.argmax()])

    def result(
        self, threshold: float | None = None, groups: int = 5, size: int = 100, seed: int = 0
    ) -> dict[str, Any] | None:
        """The images so far; None where none has a lesion.

        Args:
          threshold: of `normals`; None or nan: none is known.
          groups, size: random groups of images, without an image twice in one; disjoint where there are enough. Of no
            more images than `size` one group is all of them.
          seed: with the number of images it alone decides the groups.

        Returns: n, the number of images; groups, size: of the groups drawn, at most n; overlap: whether an image can be
        in several groups, as n < groups * size; exact: False beyond `IOU_EXACT`. For `oracle` and for `normals` (None
        without a threshold): the mean over groups, NAME_deviation between them (ddof 1; nan for one group), NAME_groups
        (the mean of each), NAME_threshold.
        """
        n, rng = len(self.kept), np.random.default_rng(seed)
        if not n:
            return None
        threshold = None if threshold is None or math.isnan(threshold) else threshold
        groups, size = (groups, size) if n > size else (1, n)
        overlap = n < groups * size
        if overlap:
            drawn = np.stack([rng.permutation(n)[:size] for _ in range(groups)])
        else:
            drawn = rng.permutation(n)[: groups * size].reshape(groups, size)
        if threshold is not None and not self.exact:
            threshold = float(_edge(_bin(np.array(threshold))))
        out: dict[str, Any] = {"n": n, "groups": groups, "size": size, "overlap": overlap, "exact": self.exact}
        for name, t in (("oracle", self.oracle(np.unique(drawn))), ("normals", threshold)):
            means = np.empty(0) if t is None else self.at(t)[drawn].mean(1)
            deviation = float(means.std(ddof=1)) if means.size > 1 else math.nan
            figures = (float(means.mean()), deviation, means.tolist(), t) if means.size else (None,) * 4
            out |= zip((name, f"{name}_deviation", f"{name}_groups", f"{name}_threshold"), figures, strict=True)
        return out


def patient_mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of rows {auroc, ap, prevalence}, one a patient, over those with a lesion inside the region; n; skipped.

    The figure that MAEMI (Lang et al. 2023) reports is this mean, not the pooled one. Rows may come from JSON.
    """
    used = [row for row in rows if row["auroc"] is not None and not math.isnan(row["auroc"])]
    mean = lambda name: float(np.mean([row[name] for row in used])) if used else math.nan
    means = {name: mean(name) for name in ("auroc", "ap", "prevalence")}
    return {**means, "n": len(used), "skipped": len(rows) - len(used)}


def json_ready(value: Any) -> Any:
    """The same in what JSON knows: arrays and tuples are lists, NumPy scalars Python's, nan and inf null."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
