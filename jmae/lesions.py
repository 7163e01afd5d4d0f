"""Figures of the lesions in maps: free-response curves, and the overlap of map and mask; NumPy, on the host."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from jmae.metrics import CHUNK, bin_edges, check_finite, operating_points, score_bins, sort_classes

FROC_EXACT = 1 << 30  # pixels of all maps of a `Froc` (4 GiB); above, there is no curve
IOU_EXACT = 1 << 26  # distinct scores in a `Localisation` (768 MiB); above, scores are grouped in bins

Boxes = Sequence[Sequence[Sequence[float]]]


class MarkedMap(NamedTuple):
    """The map and the lesions of one image of a `Froc`, or of several images of one shape, stacked."""

    scores: NDArray[np.float32]  # ([images,] *axes); -inf outside the region
    boxes: NDArray[np.int64]  # (lesions, axes, 2), half-open
    pixels: NDArray[np.int64]  # flat indices of the pixels of lesions inside the region; empty without `overlap`
    owners: NDArray[np.int64]  # for each of these pixels, the number of its lesion
    images: NDArray[np.int64]  # for each lesion, the number of its image in the stack


def stacked(maps: list[MarkedMap]) -> Iterator[MarkedMap]:
    """Stack neighbours of one shape while they have up to CHUNK scores.

    An image above CHUNK / 16 stays alone, uncopied.
    """
    start = 0
    while start < len(maps):
        shape, size = maps[start].scores.shape, maps[start].scores.size
        part = maps[start : start + (CHUNK // size if 16 * size <= CHUNK else 1)]
        part = part[: next((k for k, image in enumerate(part) if image.scores.shape != shape), len(part))]
        start += len(part)
        lesions = np.array([len(image.boxes) for image in part])
        before = np.cumsum(lesions) - lesions
        yield MarkedMap(
            np.stack([image.scores for image in part]) if len(part) > 1 else part[0].scores[None],
            np.concatenate([image.boxes for image in part]),
            np.concatenate([image.pixels + k * size for k, image in enumerate(part)]),
            np.concatenate([image.owners + n for n, image in zip(before, part, strict=True)]),
            np.repeat(np.arange(len(part)), lesions),
        )


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the connected components 1..n, also across edges and corners (8 neighbours in 2D, 26 in 3D).

    Returns n too.
    """
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def lesion_pixels(lesions: Boxes | NDArray, shape: tuple[int, ...]) -> tuple[NDArray, NDArray, NDArray]:
    """The boxes (lesions, axes, 2) in whole pixels, the flat indices of all pixels of lesions, and the lesion of each
    pixel.

    Args:
      lesions: boxes or a mask, as `Froc.add`.
      shape: of the map.
    """
    array = np.asarray(lesions)
    if array.dtype == bool:
        if array.shape != shape:
            raise ValueError(f"the mask is {array.shape}, the map {shape}: resample them to one grid")
        labels = components(array)[0]
        ends = [[(s.start, s.stop) for s in slices] for slices in ndimage.find_objects(labels)]
        pixels = np.flatnonzero(labels)
        return np.array(ends, int).reshape(-1, len(shape), 2), pixels, labels.ravel()[pixels] - 1
    if array.size and array.shape[1:] != (len(shape), 2):
        raise ValueError(
            f"boxes are {array.shape}: give a pair (low, high) for each of {len(shape)} axes, or a bool mask"
        )
    low, high = np.moveaxis(np.floor(array.reshape(-1, len(shape), 2) + 0.5).astype(int), -1, 0)
    low = np.clip(low, 0, np.array(shape) - 1)
    boxes = np.stack([low, np.clip(high, low + 1, shape)], -1)
    cells = [np.ravel_multi_index(np.ix_(*(np.arange(*ends) for ends in box)), shape).ravel() for box in boxes]
    owners = np.repeat(np.arange(len(boxes)), [cell.size for cell in cells])
    return boxes, np.concatenate([np.empty(0, int), *cells]), owners


class Froc:
    """Free-response ROC: sensitivity for lesions against false positives per image. Images are added one by one.

    1. Thresholds t are evenly spread quantiles of the scores of all images inside their regions, without duplicates.
    2. At each t, the components (`components`) of {score >= t} with fewer than `least` pixels are dropped.
    3. A lesion is hit where the centroid of a component lies in its box, border included. With `overlap`, it is also
       hit where the intersection over union of a component and the lesion is at least `overlap`.
    4. A component that hits no lesion is a false positive. Their number is a mean over all images, normal ones
       included.
    5. The thresholds go down from the highest score. The sensitivity at `at` false positives is the largest one before
       their number first exceeds `at`, or the linear interpolation at that point if it is larger. Lower thresholds are
       ignored: components merge, so neither number is monotone.

    Müller et al. 2023 (probabilistic Poisson image interpolation) report the sensitivity at 10 and give no rule, so
    this rule is ours.

    ours: As many thresholds again lie in geometric progression from the highest score down. The highest 1/200 of a
    large, rough map can hold far more than `at` components. With quantiles alone the curve then passes `at` in its
    first step, and the interpolated value is far too low: 0.15 instead of 1.0 on 512 x 512 pixels of noise blurred by
    2 pixels.

    Maps stay in memory as float32, up to `FROC_EXACT` pixels in all. Above, there is no curve, and the sensitivity is
    nan.

    Args:
      at: false positives per image.
      thresholds: the number of quantiles.
      least: pixels of the smallest component that counts.
      overlap: intersection over union at which a component hits a lesion; None: only the centroid counts.
    """

    def __init__(self, at: float = 10.0, thresholds: int = 200, least: int = 5, overlap: float | None = None) -> None:
        self.at, self.thresholds, self.least, self.overlap = at, thresholds, least, overlap
        self.images = self.lesions = self.size = 0
        self.maps: list[MarkedMap] = []

    def add(self, lesions: Boxes | NDArray[np.bool_], scores: NDArray, region: NDArray | None = None) -> None:
        """Add one image.

        Args:
          lesions: a mask of the map's shape, whose connected components are the lesions; or boxes, none for a normal
            image. A box has one pair (low, high) for each axis of the map, rows first (a manifest has x0 y0 x1 y1). It
            is half-open and is rounded to at least one pixel. A lesion without a pixel inside the region is left out.
          scores: the map; higher is more abnormal.
          region: where the map counts, bool; None is everywhere.

        Raises ValueError where shapes differ, and InputError where scores inside the region are not finite. The image
        is then not added.
        """
        if region is not None and region.shape != scores.shape:
            raise ValueError(f"the region is {region.shape}, the map {scores.shape}: resample them to one grid")
        boxes, pixels, owners = lesion_pixels(lesions, scores.shape)
        with np.errstate(over="ignore"):
            scores = scores.astype(np.float32)  # a copy
        inside = np.ones(scores.shape, bool) if region is None else region.astype(bool, copy=False)
        check_finite(scores[inside], np.empty(0))
        scores[~inside] = -np.inf
        counted = inside.ravel()[pixels]
        used, owners = np.unique(owners[counted], return_inverse=True)
        pixels = pixels[counted] if self.overlap is not None else np.empty(0, int)
        self.images, self.lesions, self.size = self.images + 1, self.lesions + used.size, self.size + scores.size
        self.maps.append(MarkedMap(scores, boxes[used], pixels, owners[: pixels.size], np.zeros(used.size, int)))
        if self.size > FROC_EXACT:
            self.maps.clear()

    def _count_hits(self, part: MarkedMap, t: np.float32) -> tuple[int, int]:
        """How many lesions of stacked images are hit at the threshold `t`, and how many components hit none."""
        within = np.zeros((3,) * part.scores.ndim)
        within[1] = 1  # pixels are neighbours only within one image
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
        # Pair every lesion with all components of its image. Components are numbered image by image.
        ends = np.searchsorted(images[large], np.stack([part.images, part.images + 1]))
        numbers = ends[1] - ends[0]
        lesion = np.repeat(np.arange(len(numbers)), numbers)
        component = np.arange(lesion.size) + np.repeat(ends[0] - np.cumsum(numbers) + numbers, numbers)
        low, high = part.boxes[..., 0] - 0.5, part.boxes[..., 1] - 0.5  # outer borders of the pixels
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
        """The figures of the images so far; None where no image has a lesion.

        Returns: "sensitivity"; "at"; "lesions" and "images", their numbers; and "curve", points [false positives per
        image, sensitivity] from [0, 0] at an infinite threshold downwards. The last point may lie beyond `at`.
        """
        if not self.lesions:
            return None
        about = {"at": self.at, "lesions": self.lesions, "images": self.images}
        if not self.maps:
            return {"sensitivity": math.nan, **about, "curve": []}
        values = np.concatenate([image.scores[image.scores > -np.inf] for image in self.maps])
        last = values.size - 1
        evenly = np.linspace(0, last, min(values.size, self.thresholds))
        ranks = np.unique(np.concatenate([evenly, values.size - np.geomspace(1, values.size, evenly.size)]).astype(int))
        values.partition(ranks)
        parts = list(stacked(self.maps))
        curve = [(0.0, 0.0)]
        best = 0.0
        for t in np.unique(values[ranks])[::-1]:
            hits, false = np.sum([self._count_hits(part, t) for part in parts], 0)
            curve.append((float(false / self.images), float(hits / self.lesions)))
            if curve[-1][0] > self.at:
                (x0, y0), (x1, y1) = curve[-2:]
                best = max(best, y0 + (y1 - y0) * (self.at - x0) / (x1 - x0))
                break
            best = max(best, curve[-1][1])
        return {"sensitivity": best, **about, "curve": [list(point) for point in curve]}


def thinned(values: NDArray[np.float32], ious: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Of ascending scores and the IoU at each score, keep the lowest score of each bin, moved to the edge of the
    bin."""
    bins, first = np.unique(score_bins(values), return_index=True)
    return bin_edges(bins), ious[first]


class Localisation:
    """Intersection over union (IoU) of lesion masks and {score >= t}, a mean over images. Images are added one by one.

    Tian et al. 2022 (memory-augmented masked autoencoder) report the mean over five random groups of 100 abnormal
    images, and name no rule for the threshold t. ours: "oracle" uses the one threshold that is best on the images of
    the groups, so it is an upper bound; "normals" uses a threshold from held-out normal images, an argument of
    `result`.

    The oracle is exact. The IoU of an image is a step function of t, so the mean over images is found from all steps,
    sorted by score. An image needs 12 bytes for each of its distinct scores, and `result` about 40 more. Above
    `IOU_EXACT` distinct scores the thresholds are the edges of bins (`metrics.score_bins`), at most 2^-11 apart
    relative to the scores. The IoU at an edge is exact, a threshold is lowered to the next edge, and the oracle can be
    too low.
    """

    def __init__(self) -> None:
        self.size = 0  # distinct scores of all images so far
        self.exact = True
        self.curves: list[tuple[NDArray, NDArray]] = []  # of each image: ascending scores, and the IoU at each

    def add(self, mask: NDArray, scores: NDArray, region: NDArray | None = None) -> None:
        """Add one image: its lesion mask, its map, and the region where they count (None is everywhere), of one shape.

        An image without a lesion inside the region is left out. Raises ValueError where shapes differ, and InputError
        where scores inside the region are not finite. The image is then not added.
        """
        shapes = [a.shape for a in (mask, scores, region) if a is not None]
        if len(set(shapes)) != 1:
            raise ValueError(f"mask, map (and region) are {shapes}: resample them to one grid")
        inside = np.True_ if region is None else region.astype(bool, copy=False)
        lesion = mask.astype(bool, copy=False)
        with np.errstate(over="ignore"):
            ranked = sort_classes(*(scores[inside & part].astype(np.float32) for part in (~lesion, lesion)))
        if not ranked.positives.size:
            return
        t, tp, fp = operating_points(ranked, max(map(len, ranked)))
        self.curves.append((t[::-1], (tp / (ranked.positives.size + fp))[::-1]))
        self.size += t.size
        if self.exact and self.size > IOU_EXACT:
            self.exact, self.curves = False, [thinned(*each) for each in self.curves]
        elif not self.exact:
            self.curves[-1] = thinned(*self.curves[-1])

    def at(self, threshold: float) -> NDArray[np.float64]:
        """(n,) the IoU of each image so far at a threshold; 0 where no pixel reaches it."""
        return np.array([np.append(ious, 0.0)[np.searchsorted(values, threshold)] for values, ious in self.curves])

    def oracle(self, images: NDArray[np.integer] | None = None) -> float:
        """The threshold with the largest mean IoU over `images` (numbers of images; None is all), up to rounding."""
        used = self.curves if images is None else [self.curves[i] for i in images]
        values = np.concatenate([values for values, _ in used])
        jumps = np.concatenate([-np.diff(ious, append=0.0) for _, ious in used])
        order = np.argsort(values)[::-1]
        values, sums = values[order], np.cumsum(jumps[order])
        sums[:-1][values[1:] == values[:-1]] = -1.0  # equal scores are one threshold: only the last of them counts
        return float(values[sums.argmax()])

    def result(
        self, threshold: float | None = None, groups: int = 5, size: int = 100, seed: int = 0
    ) -> dict[str, Any] | None:
        """The figures of the images so far; None where no image has a lesion.

        Args:
          threshold: the threshold for "normals"; None or nan where it is not known.
          groups, size: number and size of random groups of images. No image is twice in a group, and groups are
            disjoint where there are enough images. Up to `size` images are one group.
          seed: the groups depend on the seed and on the number of images alone.

        Returns: "n", the number of images; "groups" and "size" of the groups; "overlap", whether an image can be in
        several groups (n < groups * size); "exact", False above `IOU_EXACT`. For NAME in "oracle" and "normals" (all
        None without a threshold): NAME, the mean over groups; NAME_deviation, the standard deviation between groups
        (ddof 1; nan for one group); NAME_groups, the mean of each group; NAME_threshold.
        """
        n, rng = len(self.curves), np.random.default_rng(seed)
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
