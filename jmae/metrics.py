"""How well scores separate abnormal from normal cases or pixels: exact figures with intervals; NumPy, on the host.

A higher score is more abnormal. "Called abnormal at t" always means `score >= t`.

All figures follow from two sorted arrays, the scores of the negatives and those of the positives. AUROC is the rank
statistic. AP is the mean over positives of the precision at their own score. A threshold that is not the score of a
positive only adds negatives, so the best Dice lies at the score of a positive. So do the best Youden index and the best
accuracy, unless it is best to call nothing. Ties need no special case, and no array of pixels is argsorted: 10^8
float32 pixels take about 1 GB beside the arrays of the caller. Pools of more than `EXACT` pixels are counted in bins
and give bounds for the error of AUROC and AP (`Pooled`).

A figure that needs both classes is nan where one is missing. `json_ready` turns nan into null.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmae.errors import InputError

CHUNK = 1 << 20  # scores, or cases of draws, that are processed at a time: at most about 100 MB
EXACT = 1 << 27  # pixels that a pool stores one by one (512 MiB of float32); above, it counts them in bins
PRO_LIMIT = 0.3  # false-positive rate up to which the area under the curve of per-region overlap is taken
BINS = 1 << 20  # sign, exponent and 11 bits of the mantissa of a float32: a bin is 2^-11 wide, relative to its scores


class Ranked(NamedTuple):
    """The scores of each class, ascending."""

    negatives: NDArray[Any]
    positives: NDArray[Any]


def check_finite(negatives: NDArray[Any], positives: NDArray[Any]) -> None:
    """Raise InputError where scores are not finite."""
    bad = sum(a.size - np.count_nonzero(np.isfinite(a)) for a in (negatives, positives))
    if bad:
        raise InputError(
            f"{bad} of {negatives.size + positives.size} scores are not finite: look for empty or constant images, or "
            "for a training that diverged"
        )


def sort_classes(negatives: NDArray[Any], positives: NDArray[Any]) -> Ranked:
    """Sort both arrays in place. Raises InputError where scores are not finite."""
    check_finite(negatives, positives)
    negatives.sort()
    positives.sort()
    return Ranked(negatives, positives)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Flat labels as booleans and flat scores as floats (float32 stays float32).

    Raises ValueError where their numbers differ or a label is not 0 or 1.
    """
    labels, scores = np.asarray(labels).ravel(), np.asarray(scores).ravel()
    if labels.shape != scores.shape:
        raise ValueError(f"{labels.size} labels for {scores.size} scores: give one label for each score")
    if labels.dtype != bool and not np.all((labels == 0) | (labels == 1)):
        raise ValueError("labels must be 0 (normal) or 1 (abnormal): leave out cases without a label")
    return labels.astype(bool, copy=False), scores.astype(np.result_type(scores, np.float32), copy=False)


def rank(labels: ArrayLike, scores: ArrayLike) -> Ranked:
    """The sorted scores of each class, as new arrays. Raises as `auroc`."""
    labels, scores = _checked(labels, scores)
    return sort_classes(scores[~labels], scores[labels])


def _one_class(ranked: Ranked) -> bool:
    return not (ranked.negatives.size and ranked.positives.size)


def _at_positives(ranked: Ranked) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Chunks of (thresholds, true positives, false positives), one entry for each positive, thresholds ascending."""
    for start in range(0, ranked.positives.size, CHUNK):
        t = ranked.positives[start : start + CHUNK]
        fp, tp = (a.size - np.searchsorted(a, t) for a in ranked)
        yield t, tp, fp


def _auroc(ranked: Ranked) -> float:
    if _one_class(ranked):
        return math.nan
    negatives, positives = ranked
    wins = 0  # counted in half pairs as a Python integer: exact beyond 2^53
    for start in range(0, positives.size, CHUNK):
        t = positives[start : start + CHUNK]
        wins += int(np.searchsorted(negatives, t).sum() + np.searchsorted(negatives, t, "right").sum())
    return wins / (2 * negatives.size * positives.size)


def _average_precision(ranked: Ranked) -> float:
    if _one_class(ranked):
        return math.nan
    return float(sum((tp / (tp + fp)).sum() for _, tp, fp in _at_positives(ranked)) / ranked.positives.size)


def _best(ranked: Ranked, measure: Callable[[NDArray, NDArray], NDArray]) -> tuple[float, float]:
    """The largest measure(tp, fp) over all thresholds, and the highest threshold with that value."""
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
    """Area under the ROC curve: the probability that a positive has a higher score than a negative. Ties count half.

    Args:
      labels, scores: arrays of the same size; a label is 0 or 1.

    Returns nan where one class is missing. Raises InputError where scores are not finite, and ValueError where sizes
    differ or a label is not 0 or 1.
    """
    return _auroc(rank(labels, scores))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """AP = sum_n (R_n - R_{n-1}) P_n over thresholds, with recall R and precision P, without interpolation.

    Equal scores are one threshold. Arguments, nan and errors are as for `auroc`.
    """
    return _average_precision(rank(labels, scores))


def best_dice(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The largest Dice over all thresholds, and its threshold (the highest, if several reach it).

    This is an upper bound, because the threshold is chosen on the same data. Name it so where you report it.
    (nan, nan) where one class is missing.
    """
    return _best_dice(rank(labels, scores))


def iou(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Intersection over union of the positives and {score >= threshold}; nan where both are empty."""
    labels, scores = _checked(labels, scores)
    called = scores >= threshold
    union = np.count_nonzero(labels | called)
    return np.count_nonzero(labels & called) / union if union else math.nan


def operating_points(ranked: Ranked, points: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Descending thresholds, true positives, false positives. At most `points` evenly spread ranks of each class."""
    some = [a[np.linspace(0, a.size - 1, min(a.size, points)).astype(int)] for a in ranked]
    t = np.unique(np.concatenate(some))[::-1]
    fp, tp = (a.size - np.searchsorted(a, t) for a in ranked)
    return t, tp, fp


def roc_curve(labels: ArrayLike, scores: ArrayLike, points: int = 200) -> tuple[NDArray, NDArray, NDArray]:
    """(false-positive rates, true-positive rates, thresholds), from (0, 0, inf) to (1, 1, lowest score).

    The curve has at most `2 * points + 1` points, evenly spread over the ranks of each class. It is complete where no
    class has more than `points` scores. Empty arrays where one class is missing.
    """
    ranked = rank(labels, scores)
    if _one_class(ranked):
        return np.empty(0), np.empty(0), np.empty(0)
    t, tp, fp = operating_points(ranked, points)
    return np.r_[0, fp] / ranked.negatives.size, np.r_[0, tp] / ranked.positives.size, np.r_[np.inf, t]


def pr_curve(labels: ArrayLike, scores: ArrayLike, points: int = 200) -> tuple[NDArray, NDArray, NDArray]:
    """(recalls, precisions, thresholds) at the thresholds of `roc_curve`; empty arrays where one class is missing."""
    ranked = rank(labels, scores)
    if _one_class(ranked):
        return np.empty(0), np.empty(0), np.empty(0)
    t, tp, fp = operating_points(ranked, points)
    return tp / ranked.positives.size, tp / (tp + fp), t


def threshold_on(labels_val: ArrayLike, scores_val: ArrayLike, largest: str = "youden") -> float:
    """The threshold with the largest Youden's J = sensitivity + specificity - 1 on validation data.

    With `largest="accuracy"`, the threshold with the largest accuracy. A threshold is the score of an abnormal case, or
    the next number above all scores, where no other is better than to call nothing. Of equally good thresholds the
    highest is returned, which has the fewest false alarms. nan where a class is missing.
    """
    ranked = rank(labels_val, scores_val)
    n, p = (ranked.negatives.size, ranked.positives.size) if largest == "youden" else (1, 1)
    best, threshold = _best(ranked, lambda tp, fp: tp * n - fp * p)  # in integers, so that ties are exact
    if best > 0 or math.isnan(threshold):
        return threshold
    return float(np.nextafter(max(scores[-1] for scores in ranked), np.inf))  # nothing is called: 0


def at_threshold(labels: ArrayLike, scores: ArrayLike, threshold: float) -> dict[str, float]:
    """Figures of the decision `score >= threshold`: accuracy, specificity, and F1, precision and sensitivity of the
    abnormal class. A figure with denominator 0 is nan; all are nan for a threshold that is nan."""
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
    """(n,) patient numbers 0..k-1. A case without a patient ("" or None) counts as one patient."""
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
    """Bootstrap percentile interval of `auroc` or `average_precision`. It resamples patients with all their images.

    Each of `draws` draws takes as many patients as there are, with replacement. A draw that lacks a class is left out.
    (nan, nan) where no draw has both classes. Scores of several seeds, (seeds, cases), have the interval of the mean of
    their measures. B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
      measure: `auroc` or `average_precision`; ValueError for another function.
      labels, scores, patients: one a case.
      level: the probability that the interval covers.
    """
    mean = _mean_over_draws(measure, labels, scores)
    labels = np.asarray(labels).ravel().astype(bool)
    return _percentiles([mean(counts) for counts in _drawn(labels, patients, draws, seed)], level)


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
    """(measure(labels, scores) - measure(labels, others), its percentile interval), for two scores of the same cases.

    Scores of several seeds, (seeds, cases), have the mean of their measures. Both sides have the same draws of
    patients, see `bootstrap_interval`.
    """
    first, second = (_mean_over_draws(measure, labels, side) for side in (scores, others))
    ours, theirs = (np.mean([measure(labels, one) for one in np.atleast_2d(side)]) for side in (scores, others))
    labels = np.asarray(labels).ravel().astype(bool)
    each = [first(counts) - second(counts) for counts in _drawn(labels, patients, draws, seed)]
    return float(ours - theirs), _percentiles(each, level)


def _drawn(labels: NDArray[np.bool_], patients: Sequence[Any], draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draws of patients with both classes, several at a time: (k, cases), how often each case is in each draw."""
    if len(patients) != labels.size:
        raise ValueError(f"{len(patients)} patients for {labels.size} scores: give one patient for each score")
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
    """A function from draws, (k, cases) counts of each case, to the measure of each draw, (k,).

    It sorts scores once.
    """
    if measure not in (auroc, average_precision):
        raise ValueError("measure is auroc or average_precision")
    check_finite(scores[~labels], scores[labels])
    order = np.argsort(scores)
    sorted_scores, sorted_labels = scores[order], labels[order]
    low, high = (np.searchsorted(sorted_scores, sorted_scores[sorted_labels], side) for side in ("left", "right"))

    def each(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        counts = counts[:, order]
        below = lambda members: np.pad(np.cumsum(counts * members, 1), ((0, 0), (1, 0)))  # cases below each rank
        negatives, positives, times = below(~sorted_labels), below(sorted_labels), counts[:, sorted_labels]
        n, p = negatives[:, -1], positives[:, -1]
        if measure is auroc:
            return np.sum(times * (negatives[:, low] + negatives[:, high]), 1) / (2 * n * p)
        tp, fp = p[:, None] - positives[:, low], n[:, None] - negatives[:, low]
        return np.sum(times * tp / np.maximum(tp + fp, 1), 1) / p

    return each


def _mean_over_draws(measure: Measure, labels: ArrayLike, scores: ArrayLike) -> Callable[[NDArray], NDArray]:
    """As `_over_draws`; of several seeds, (seeds, cases), the mean."""
    each = [_over_draws(measure, *_checked(labels, one)) for one in np.atleast_2d(scores)]
    return lambda counts: np.mean([one(counts) for one in each], 0)


def _percentiles(parts: Sequence[NDArray], level: float) -> tuple[float, float]:
    values = np.concatenate([*parts, np.zeros(0)])
    if not values.size:
        return math.nan, math.nan
    lo, hi = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(lo), float(hi)


def chi2_distance(scores_normal: ArrayLike, scores_abnormal: ArrayLike, bins: int = 100) -> dict[str, float]:
    """The chi-squared distance 1/2 sum_b (h_b - k_b)^2 / (h_b + k_b) of the histograms h, k of the two classes.

    The bins are equal parts of the range of all scores. "raw" uses counts, so it grows with the number of images;
    "normalised" uses fractions: 0 for equal, 1 for disjoint histograms. Bozorgtabar et al. 2023 name neither the
    variant nor the number of bins. ours: 100 bins.
    """
    classes = [np.array(s, np.float64).ravel() for s in (scores_normal, scores_abnormal)]
    ranked = sort_classes(*classes)
    if _one_class(ranked):
        return {"raw": math.nan, "normalised": math.nan}
    low, high = min(a[0] for a in ranked), max(a[-1] for a in ranked)
    h, k = (np.histogram((a - low) / ((high - low) or 1), bins, (0, 1))[0] for a in ranked)
    half = lambda h, k: float(0.5 * ((h - k) ** 2 / np.where(h + k, h + k, 1)).sum())
    return {"raw": half(h, k), "normalised": half(h / h.sum(), k / k.sum())}


def replicate_summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean over replicates (seeds), and "half_width", 1.96 sample standard deviations (nan for one value)."""
    values = [float(v) for v in values]
    mean = float(np.mean(values)) if values else math.nan
    half_width = 1.96 * float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": mean, "half_width": half_width, "values": values}


def image_metrics(
    labels: ArrayLike, scores: ArrayLike, patients: Sequence[Any], *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """AUROC and AP of image scores with 95 % intervals over patients, and the numbers of normal and abnormal images.

    Scores of several seeds, (seeds, cases), have the mean of their figures, and its interval.
    """
    ranked = [rank(labels, one) for one in np.atleast_2d(scores)]
    interval = lambda f: list(bootstrap_interval(f, labels, scores, patients, draws=draws, seed=seed))
    return {
        "auroc": float(np.mean([_auroc(one) for one in ranked])),
        "auroc_ci": interval(auroc),
        "ap": float(np.mean([_average_precision(one) for one in ranked])),
        "ap_ci": interval(average_precision),
        "n_normal": ranked[0].negatives.size,
        "n_abnormal": ranked[0].positives.size,
    }


Masks = Sequence[NDArray[np.bool_]]
Maps = Sequence[NDArray[Any]]
Regions = Sequence[NDArray[np.bool_] | None] | None


def score_bins(scores: NDArray[Any]) -> NDArray[Any]:
    """The number of the bin of each score. Bins have the order of the scores; -0.0 and 0.0 share one bin.

    The bits of a float32, read as an integer, rise with a positive number and fall with a negative one.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 goes to the outermost bin, which keeps the order
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    return np.where(bits >> 31, ~bits, bits | 0x80000000) >> 12


def bin_edges(bins: NDArray[Any]) -> NDArray[np.float32]:
    """The lowest score of each bin."""
    bits = bins.astype(np.uint32) << 12
    return np.where(bits >> 31, bits ^ np.uint32(0x80000000), ~bits).view(np.float32)


def overlap_areas(above: NDArray[Any], reached: NDArray[Any]) -> NDArray[np.float64]:
    """What each positive adds to the area under its lesion's overlap up to `PRO_LIMIT`, in units of its share of the
    lesion. At a positive the overlap rises by that share, from the false-positive rate `above` (scores that are higher)
    to `reached` (scores that are at least as high). Where negatives tie with the positive, it rises on a straight line.
    """
    slope = (PRO_LIMIT - above) ** 2 / (2 * np.maximum(reached - above, 1e-300))
    return np.where(reached <= PRO_LIMIT, PRO_LIMIT - (above + reached) / 2, np.where(above < PRO_LIMIT, slope, 0.0))


def _aupro(negatives: NDArray[Any], positives: NDArray[Any], weights: NDArray[Any]) -> float:
    """The area of `Pooled` from sorted negatives, and positives with their weights."""
    if not (negatives.size and positives.size):
        return math.nan
    area = 0.0
    for start in range(0, positives.size, CHUNK):
        t = positives[start : start + CHUNK]
        above, reached = (negatives.size - np.searchsorted(negatives, t, side) for side in ("right", "left"))
        added = overlap_areas(above / negatives.size, reached / negatives.size)
        area += float((weights[start : start + CHUNK] * added).sum())
    return area / (PRO_LIMIT * float(weights.sum(dtype=np.float64)))


def _binned(counts: NDArray[np.int64], weights: NDArray[np.float64] | None) -> dict[str, float | None]:
    """The figures and their error bounds (see `Pooled`), from counts (2, bins) of negatives and positives, and the
    weights of positives (bins,)."""
    n, p = counts[:, ::-1]
    fp, tp = counts[:, ::-1].cumsum(1)
    negatives, positives = int(fp[-1]), int(tp[-1])
    names = ("auroc", "ap", "dice_best", "aupro", "auroc_error", "ap_error", "aupro_error")
    if not (negatives and positives):
        return dict.fromkeys(names, math.nan)
    weight = None if weights is None else weights[::-1][p > 0]
    n, p, fp, tp = (a.astype(float) for a in (n[p > 0], p[p > 0], fp[p > 0], tp[p > 0]))
    pairs = negatives * positives
    ap = (p * tp / (tp + fp)).sum() / positives
    highest = (p * tp / (tp + fp - n)).sum() / positives
    lowest = (p - fp * np.log1p(p / (tp - p + fp + 0.5))).sum() / positives
    aupro: dict[str, float | None] = dict.fromkeys(("aupro", "aupro_error"))
    if weight is not None:
        ends = (fp - n) / negatives, fp / negatives
        area = overlap_areas(*ends)
        most, least = (PRO_LIMIT - np.minimum(end, PRO_LIMIT) for end in ends)
        share = weight / (PRO_LIMIT * weight.sum())
        error = np.maximum(most - area, area - least)
        aupro = {"aupro": float((share * area).sum()), "aupro_error": float((share * error).sum())}
    return {
        **aupro,
        "auroc": float((p * (negatives - fp + n / 2)).sum() / pairs),
        "ap": float(ap),
        "dice_best": float((2 * tp / (tp + fp + positives)).max()),
        "auroc_error": float((p * n).sum() / (2 * pairs)),
        "ap_error": float(max(highest - ap, ap - lowest)),
    }


class Pooled:
    """Pixel figures over the pooled pixels (voxels) of images, inside their regions. Images are added one by one.

    AUPRO@0.3 is the area under the curve of the per-region overlap, up to the false-positive rate `PRO_LIMIT`, divided
    by that rate (Bergmann et al., CVPR 2020). The overlap at t is a mean over lesions: the share of the lesion's pixels
    whose score is at least t. So each lesion counts alike, and a random map has PRO_LIMIT / 2. Here it is a sum over
    positives, which weigh 1 / (pixels of their lesion): see `overlap_areas`.

    Figures are exact up to `EXACT` pixels. Above, pixels are counted in `BINS` bins, and pixels of one bin count as
    ties. AUROC and AP then have error bounds that hold for any scores within the bins. Let p_b and n_b be the positives
    and negatives in bin b, P and N those of all bins, TP_b and FP_b those of bin b and above.

      auroc_error = 1/2 sum_b p_b n_b / (P N), because a pair within a bin counts 1/2 and its true value is 0 to 1.
      ap_error: AP = 1/P sum_b p_b TP_b / (TP_b + FP_b). The error is its larger distance to two ends.
        Highest: the positives of a bin are tied and above its negatives: 1/P sum_b p_b TP_b / (TP_b + FP_b - n_b).
        Lowest: they are below its negatives and have no ties. With T = TP_b - p_b + FP_b, this is
          1/P sum_b sum_{j=1..p_b} (1 - FP_b / (T + j)) >= 1/P sum_b (p_b - FP_b log(1 + p_b / (T + 1/2))).
          1/x is convex, so 1/(T + j) is at most the mean of 1/x from T + j - 1/2 to T + j + 1/2.
      aupro_error: the overlap rises for a positive anywhere between the false-positive rates at its bin's edges.

    The best Dice and its IoU are then the best at edges of bins, so at most the exact ones.
    """

    def __init__(self) -> None:
        self.images = 0
        self.sizes = [0, 0]  # pixels, negative and positive
        self.parts: tuple[list[NDArray], list[NDArray]] = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        self.counts: NDArray[np.int64] | None = None  # (2, BINS) above `EXACT` pixels; `parts` is empty then
        # 1 / (pixels of the lesion) of each positive in `parts`, and their sums in bins; None where not all are known.
        self.weights: list[NDArray] | None = [np.empty(0, np.float32)]
        self.weight_sums: NDArray[np.float64] | None = None

    def add(self, mask: NDArray, scores: NDArray, region: NDArray | None = None, sizes: NDArray | None = None) -> None:
        """Add one image: its lesion mask, its map, and the region where metrics count (None is everywhere), of one
        shape. `sizes` has for each pixel of a lesion the pixels of that lesion inside the region
        (`lesions.lesion_sizes`); without it there is no AUPRO.

        Raises ValueError where shapes differ, and InputError where scores inside the region are not finite. The image
        is then not added.
        """
        shapes = [a.shape for a in (mask, scores, region) if a is not None]
        if len(set(shapes)) != 1:
            raise ValueError(f"image {self.images}: mask, map (and region) are {shapes}: resample them to one grid")
        lesion = mask.astype(bool, copy=False)
        inside = np.True_ if region is None else region.astype(bool, copy=False)
        classes = scores[inside & ~lesion], scores[inside & lesion]
        check_finite(*classes)
        self.images += 1
        self.sizes = [size + values.size for size, values in zip(self.sizes, classes, strict=True)]
        for parts, values in zip(self.parts, classes, strict=True):
            parts.append(values)
        if sizes is None and classes[1].size:
            self.weights = None
        elif self.weights is not None:
            own = np.empty(0) if sizes is None else 1 / sizes[inside & lesion]
            self.weights.append(own.astype(np.float32))
        if sum(self.sizes) > EXACT:
            self._count()

    def negated(self) -> "Pooled":
        """The same pixels with their scores negated."""
        other = Pooled()
        other.images, other.sizes = self.images, self.sizes
        other.parts = [-v for v in self.parts[0]], [-v for v in self.parts[1]]
        other.counts = None if self.counts is None else self.counts[:, ::-1]
        other.weights = self.weights
        other.weight_sums = None if self.weight_sums is None else self.weight_sums[::-1]
        return other

    def _count(self) -> None:
        """Count the stored scores in bins, and drop them."""
        self.counts = np.zeros((2, BINS), np.int64) if self.counts is None else self.counts
        if self.weights is None:
            self.weight_sums = None
        else:
            sums = np.zeros(BINS) if self.weight_sums is None else self.weight_sums
            for values, weights in zip(self.parts[1], self.weights, strict=True):
                sums += np.bincount(score_bins(values), weights, BINS)
            self.weight_sums, self.weights = sums, []
        for counts, parts in zip(self.counts, self.parts, strict=True):
            for values in parts:
                for start in range(0, values.size, CHUNK):
                    counts += np.bincount(score_bins(values[start : start + CHUNK]), minlength=BINS)
            parts.clear()

    def percentile(self, q: float) -> float:
        """The q-th percentile of the negatives so far, linear between ranks; nan without negatives.

        Above `EXACT` pixels, the lower edge of the bin of the rank at or below it.
        """
        if not self.sizes[0]:
            return math.nan
        if self.counts is None:
            return float(np.percentile(np.concatenate(self.parts[0]), q))
        rank = math.floor((self.sizes[0] - 1) * q / 100)
        return float(bin_edges(np.searchsorted(self.counts[0].cumsum(), [rank], "right"))[0])

    def result(self) -> dict[str, float | None]:
        """The figures of `pixel_metrics` over the images so far; above `EXACT` pixels also errors (see above)."""
        if self.counts is None:
            negatives, positives = (np.concatenate(parts) for parts in self.parts)
            weights = None if self.weights is None else np.concatenate(self.weights)
            if weights is not None:
                order = np.argsort(positives)  # sorted ones are looked up nine times as fast
                positives, weights = positives[order], weights[order]
            ranked = sort_classes(negatives, positives)
            found = {
                "auroc": _auroc(ranked),
                "ap": _average_precision(ranked),
                "dice_best": _best_dice(ranked)[0],
                "aupro": None if weights is None else _aupro(*ranked, weights),
            }
        else:
            found = _binned(self.counts, self.weight_sums)
        dice, total = found["dice_best"], sum(self.sizes)
        assert dice is not None
        return {
            **found,
            "prevalence": self.sizes[1] / total if total else math.nan,
            "iou": dice / (2 - dice),  # at one threshold IoU = D / (2 - D), which rises with D
            "froc": None,
        }


def pixel_metrics(masks: Masks, maps: Maps, regions: Regions = None) -> dict[str, float | None]:
    """Figures over the pooled pixels (voxels) of all images, inside `regions`.

    Args:
      masks: one boolean array for each image, True = lesion; all False for a normal image.
      maps: one array of scores for each image, of the mask's shape.
      regions: where metrics count, one boolean array for each image; None is everywhere, for one image or for all.

    Returns: "auroc"; "ap"; "prevalence", which is the AP of a random map; "dice_best" and "iou" at the best threshold,
    upper bounds as `best_dice`; "aupro" and "froc", None. A figure is nan where one class is missing. Above `EXACT`
    pixels also "auroc_error" and "ap_error", see `Pooled`.
    """
    pool = Pooled()
    for mask, scores, region in zip(masks, maps, [None] * len(maps) if regions is None else regions, strict=True):
        pool.add(mask, scores, region)
    return pool.result()


def patient_mean(rows: Sequence[Mapping[str, Any]], draws: int = 0, seed: int = 0) -> dict[str, Any]:
    """The mean over patients with a lesion inside the region, of rows {auroc, ap, prevalence}, one for each patient.

    Returns the means, and "n" and "skipped", the numbers of patients with and without a lesion. With `draws`,
    "auroc_ci", "ap_ci" and "prevalence_ci" are 95 % percentile intervals of the mean over patients drawn with
    replacement. Equal seeds draw the same patients. Lang et al. 2023 report this mean, not the figure over pooled
    pixels. Rows may come from JSON.
    """
    used = [row for row in rows if row["auroc"] is not None and not math.isnan(row["auroc"])]
    names = ("auroc", "ap", "prevalence")
    values = np.array([[row[name] for name in names] for row in used], float).reshape(-1, len(names))
    found: dict[str, Any] = {k: float(values[:, i].mean()) if used else math.nan for i, k in enumerate(names)}
    if draws:
        ends = np.full((2, len(names)), math.nan)
        if used:
            drawn = np.random.default_rng(seed).integers(len(used), size=(draws, len(used)))
            ends = np.quantile(values[drawn].mean(1), (0.025, 0.975), axis=0)
        found |= {f"{name}_ci": ends[:, i].tolist() for i, name in enumerate(names)}
    return {**found, "n": len(used), "skipped": len(rows) - len(used)}


def json_ready(value: Any) -> Any:
    """The value in types of JSON: arrays and tuples become lists, NumPy scalars Python scalars, nan and inf null."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
