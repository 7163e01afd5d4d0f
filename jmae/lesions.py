"""Figures of the lesions in maps: free-response curves, and the overlap of map and mask; NumPy, on the host."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from jmae.metrics import CHUNK, bin_edges, check_finite, operating_points, score_bins, sort_classes

FROC_EXACT = 1 << 30  # pixels of the maps that a free-response curve keeps (4 GiB)
IOU_EXACT = 1 << 26  # distinct scores that a `Localisation` keeps one by one (768 MiB); more are thinned

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
        check_finite(scores[inside], np.empty(0))
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
    bins, first = np.unique(score_bins(values), return_index=True)
    return bin_edges(bins), ious[first]


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
            ranked = sort_classes(*(scores[inside & part].astype(np.float32) for part in (~lesion, lesion)))
        if not ranked.positives.size:
            return
        t, tp, fp = operating_points(ranked, max(map(len, ranked)))
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
            threshold = float(bin_edges(score_bins(np.array(threshold))))
        out: dict[str, Any] = {"n": n, "groups": groups, "size": size, "overlap": overlap, "exact": self.exact}
        for name, t in (("oracle", self.oracle(np.unique(drawn))), ("normals", threshold)):
            means = np.empty(0) if t is None else self.at(t)[drawn].mean(1)
            deviation = float(means.std(ddof=1)) if means.size > 1 else math.nan
            figures = (float(means.mean()), deviation, means.tolist(), t) if means.size else (None,) * 4
            out |= zip((name, f"{name}_deviation", f"{name}_groups", f"{name}_threshold"), figures, strict=True)
        return out
