"""Figures of the lesions in maps: free-response curves, and the overlap of map and mask; NumPy, on the host."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from jmae.growing import Growing, longer
from jmae.metrics import bin_edges, check_finite, operating_points, score_bins, sort_classes

STACK = 1 << 22  # pixels of maps that a `Froc` takes together; a pixel takes about 30 bytes while the curve is made
FROC_EXACT = 1 << 30  # pixels of all maps of a `Froc` (4 GiB); above, there is no curve
IOU_EXACT = 1 << 26  # distinct scores in a `Localisation` (768 MiB); above, scores are grouped in bins

RULES = ("centroid", "peak")
SIZES = ("small", "medium", "large")  # of `thirds`
POINTS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives an image at which `Froc` gives a sensitivity, beside `at`

Boxes = Sequence[Sequence[Sequence[float]]]


class MarkedMap(NamedTuple):
    """The map and the lesions of one image of a `Froc`, or of several images of one shape, stacked."""

    scores: NDArray[np.float32]  # ([images,] *axes); -inf outside the region
    boxes: NDArray[np.int64]  # (lesions, axes, 2), half-open
    pixels: NDArray[np.int64]  # flat indices of the pixels of lesions inside the region; empty where no rule needs them
    owners: NDArray[np.int64]  # for each of these pixels, the number of its lesion
    images: NDArray[np.int64]  # for each lesion, the number of its image in the stack
    least: NDArray[np.float64]  # for each image, the pixels of its smallest component that counts


def stacked(maps: list[MarkedMap]) -> Iterator[MarkedMap]:
    """Stack neighbours of one shape while they have up to STACK scores."""
    start = 0
    while start < len(maps):
        shape, size = maps[start].scores.shape, maps[start].scores.size
        part = maps[start : start + max(1, STACK // size)]
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
            np.concatenate([image.least for image in part]),
        )


class Owners:
    """The lesions of stacked images: for each image up to `most` of them, in their order."""

    def __init__(self, part: MarkedMap):
        starts = np.searchsorted(part.images, np.arange(len(part.least)))
        local = np.arange(len(part.images)) - starts[part.images]
        self.most, self.pixels_of_one = int(local.max(initial=-1)) + 1, part.scores[0].size
        shape = len(part.least), self.most
        self.low, self.high = np.full((2, *shape, part.boxes.shape[1]), np.nan)  # outer borders of the pixels
        self.low[part.images, local], self.high[part.images, local] = part.boxes[..., 0] - 0.5, part.boxes[..., 1] - 0.5
        self.area = np.zeros(shape, int)
        np.add.at(self.area, (part.images[part.owners], local[part.owners]), 1)
        order = np.argsort(part.pixels, kind="stable")
        self.pixels, self.lesions = part.pixels[order], local[part.owners[order]]

    def of(self, pixels: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """(numbers among the given pixels, their lesions). A pixel in several lesions appears once for each; a pixel in
        none does not appear."""
        first, last = (np.searchsorted(self.pixels, pixels, side) for side in ("left", "right"))
        times = last - first
        entries = np.arange(times.sum()) + np.repeat(first - np.cumsum(times) + times, times)
        return np.repeat(np.arange(len(pixels)), times), self.lesions[entries]


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the connected components 1..n, also across edges and corners (8 neighbours in 2D, 26 in 3D).

    Returns n too.
    """
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def lesion_sizes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each pixel of a mask the pixels of its lesion (`components`); 0 outside."""
    labels, _ = components(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes[labels]


def thirds(areas: NDArray) -> NDArray[np.int64]:
    """The third of each area, 0 small, 1 medium, 2 large: up to the first tercile, up to the second, above."""
    return np.searchsorted(np.quantile(areas, (1 / 3, 2 / 3)), areas)


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


def random_map_like(scores: NDArray, inside: NDArray[np.bool_], seed: int) -> NDArray[np.float32]:
    """A random map of the same values inside a region, and of about the same smoothness.

    Noise gets the amplitudes of the map's spectrum. The values of the map then take the places that the noise ranks.
    """
    values = scores[inside]
    filled = np.where(inside, scores, values.mean()) - values.mean()
    noise = np.fft.rfftn(np.random.default_rng(seed).normal(size=scores.shape))
    noise *= np.abs(np.fft.rfftn(filled)) / np.maximum(np.abs(noise), 1e-30)
    order = np.argsort(np.fft.irfftn(noise, scores.shape, range(scores.ndim))[inside])
    shuffled = np.empty(values.size, np.float32)
    shuffled[order] = np.sort(values)
    out = np.full(scores.shape, -np.inf, np.float32)
    out[inside] = shuffled
    return out


def sensitivity_at(curve: Sequence[Sequence[float]], limit: float) -> float:
    """Rule 5 of `Froc`: the sensitivity of a curve at `limit` false positives an image."""
    best = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x1 > limit:
            return max(best, y0 + (y1 - y0) * (limit - x0) / (x1 - x0))
        best = max(best, y1)
    return best


class Froc:
    """Free-response ROC: sensitivity for lesions against false positives per image. Images are added one by one.

    1. Thresholds t are evenly spread quantiles of the scores of all images inside their regions, without duplicates.
    2. At each t, the components (`components`) of {score >= t} with fewer than `least` pixels are dropped.
    3. With `rule="peak"` a lesion is hit where the highest pixel of a component lies in it; of equal pixels the first
       counts. With `rule="centroid"` it is hit where the centroid of a component lies in its box, border included. With
       `overlap`, it is also hit where the intersection over union of a component and the lesion is at least `overlap`.
    4. A component that hits no lesion is a false positive. Their number is a mean over all images, normal ones
       included.
    5. The thresholds go down from the highest score. The sensitivity at `at` false positives is the largest one before
       their number first exceeds `at`, or the linear interpolation at that point if it is larger. Lower thresholds are
       ignored: components merge, so neither number is monotone.

    Müller et al. 2023 (probabilistic Poisson image interpolation) report the sensitivity at 10 and give no rule, so
    both rules are ours. By the centroid's rule noise finds .57 to .77 of the lesions of real sets at 10 false
    positives: the centroid of a large, ragged component lies in many boxes. The peak's rule lacks this weakness.
    `chance` tells what chance finds: the figures of random maps with each map's values and smoothness.

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
      overlap: intersection over union at which a component hits a lesion; None: only rule 3 counts.
      rule: "peak" or "centroid".
      chance: whether the figures of random maps stand beside. They take the memory and the time of the maps again.
    """

    def __init__(
        self,
        at: float = 10.0,
        thresholds: int = 200,
        least: int = 5,
        overlap: float | None = None,
        rule: str = "centroid",
        chance: bool = False,
    ) -> None:
        self.at, self.thresholds, self.least, self.overlap, self.rule = at, thresholds, least, overlap, rule
        self.random = Froc(at, thresholds, least, overlap, rule) if chance else None
        self.images = self.lesions = self.size = 0
        self.maps: list[MarkedMap] = []

    def add(
        self,
        lesions: Boxes | NDArray[np.bool_],
        scores: NDArray,
        region: NDArray | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        """Add one image.

        Args:
          lesions: a mask of the map's shape, whose connected components are the lesions; or boxes, none for a normal
            image. A box has one pair (low, high) for each axis of the map, rows first (a manifest has x0 y0 x1 y1). It
            is half-open and is rounded to at least one pixel. A lesion without a pixel inside the region is left out.
          scores: the map; higher is more abnormal.
          region: where the map counts, bool; None is everywhere.
          share: pixels of the map for one pixel of the grid on which `least` counts; with `rule="peak"` alone.

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
        if self.random and inside.any():
            self.random.add(lesions, random_map_like(scores, inside, self.images), region, share=share)
        scores[~inside] = -np.inf
        counted = inside.ravel()[pixels]
        used, owners = np.unique(owners[counted], return_inverse=True)
        pixels = pixels[counted] if self.overlap is not None or self.rule == "peak" else np.empty(0, int)
        self.images, self.lesions, self.size = self.images + 1, self.lesions + used.size, self.size + scores.size
        least, image = np.array([self.least * (share if self.rule == "peak" else 1.0)]), np.zeros(used.size, int)
        self.maps.append(MarkedMap(scores, boxes[used], pixels, owners[: pixels.size], image, least))
        if self.size > FROC_EXACT:
            self.maps.clear()

    def _counts(self, part: MarkedMap, thresholds: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
        """How many lesions of stacked images are hit, and how many components hit none, as the threshold falls."""
        owners = Owners(part)
        grown = Growing(part.scores, thresholds, owners.most if self.overlap is not None else 0)
        none, hits = np.zeros(0, bool), np.zeros((0, owners.most), bool)  # of each component: hits none; what it hits
        false, times = 0, np.zeros((len(part.least), owners.most), int)  # sums over components

        def signed(sign: int, numbers: NDArray[np.int64]) -> int:
            np.add.at(times, grown.peak[numbers] // owners.pixels_of_one, sign * hits[numbers].astype(int))
            return sign * int(none[numbers].sum())

        for pieces in grown.fall():
            for pixels in pieces:
                changed, gone = grown.add(pixels)
                if self.overlap is not None:
                    which, lesions = owners.of(pixels)
                    grown.own(pixels[which], lesions)
                none, hits = longer(none, grown.n), longer(hits, grown.n)
                false += signed(-1, np.concatenate([changed, gone]))
                hits[changed], none[changed] = False, False
                large = changed[grown.size[changed] >= part.least[grown.peak[changed] // owners.pixels_of_one]]
                hits[large] = self._hit(grown, large, owners)
                none[large] = ~hits[large].any(1)
                false += signed(1, large)
            yield int((times > 0).sum()), false

    def _hit(self, grown: Growing, numbers: NDArray[np.int64], owners: "Owners") -> NDArray[np.bool_]:
        """Which of the lesions of its image each component hits."""
        image = grown.peak[numbers] // owners.pixels_of_one
        if self.rule == "centroid":
            centre = (grown.place[numbers] / grown.size[numbers, None])[:, None]
            hit = ((owners.low[image] <= centre) & (centre <= owners.high[image])).all(-1)
        else:
            hit = np.zeros((len(numbers), owners.most), bool)
            hit[owners.of(grown.peak[numbers])] = True
        if self.overlap is not None:
            shared, area = grown.owned[numbers], owners.area[image]
            hit |= (area > 0) & (shared >= self.overlap * (grown.size[numbers, None] + area - shared))
        return hit

    def result(self) -> dict[str, Any] | None:
        """The figures of the images so far; None where no image has a lesion.

        Returns: "sensitivity" at `at`; "at"; "points", [false positives, sensitivity] at `POINTS` up to `at` and at
        `at`, and their "mean"; "lesions" and "images", their numbers; "curve", points [false positives per image,
        sensitivity] from [0, 0] at an infinite threshold downwards, of which the last one may lie beyond `at`; and with
        `chance`, "chance", the "sensitivity", the "points" and the "mean" of random maps.
        """
        if not self.lesions:
            return None
        about = {"at": self.at, "lesions": self.lesions, "images": self.images}
        if not self.maps:
            return {"sensitivity": math.nan, **about, "points": [], "mean": math.nan, "curve": []}
        values = np.concatenate([image.scores[image.scores > -np.inf] for image in self.maps])
        last = values.size - 1
        evenly = np.linspace(0, last, min(values.size, self.thresholds))
        ranks = np.unique(np.concatenate([evenly, values.size - np.geomspace(1, values.size, evenly.size)]).astype(int))
        values.partition(ranks)
        thresholds = np.unique(values[ranks])
        totals = np.zeros((2, thresholds.size), int)  # lesions that are hit, and components that hit none
        for part in stacked(self.maps):
            for k, counts in enumerate(self._counts(part, thresholds)):
                totals[:, k] += counts
                if totals[1, k] / self.images > self.at:  # the curve ends here, whatever further images add
                    totals = totals[:, : k + 1]
                    break
                if k + 1 == totals.shape[1]:
                    break
        curve = [[0.0, 0.0], *([float(n / self.images), float(hits / self.lesions)] for hits, n in totals.T)]
        points = [[p, sensitivity_at(curve, p)] for p in (*(p for p in POINTS if p < self.at), self.at)]
        mean = float(np.mean([sensitivity for _, sensitivity in points]))
        out: dict[str, Any] = {"sensitivity": points[-1][1], **about, "points": points, "mean": mean, "curve": curve}
        if self.random and (random := self.random.result()):
            out["chance"] = {name: random[name] for name in ("sensitivity", "points", "mean")}
        return out


def thinned(values: NDArray[np.float32], ious: NDArray[np.float64], called: NDArray[np.float32]) -> tuple:
    """The lowest score of each bin, moved to the edge of the bin, with the IoU and the share of pixels called at that
    score. `values` are ascending scores."""
    bins, first = np.unique(score_bins(values), return_index=True)
    return bin_edges(bins), ious[first], called[first]


class Localisation:
    """Intersection over union (IoU) of lesion masks and {score >= t}, a mean over images. Images are added one by one.

    Tian et al. 2022 (memory-augmented masked autoencoder) report the mean over five random groups of 100 abnormal
    images, and name no rule for the threshold t. ours: "oracle" uses the one threshold that is best on the images of
    the groups, so it is an upper bound; "normals" uses a threshold from held-out normal images, an argument of
    `result`. Where lesions are large, a map that calls every pixel scores well. So its IoU, the share of the lesion,
    stands beside them, and the share of pixels that each threshold calls.

    The oracle is exact. The IoU of an image is a step function of t, so the mean over images is found from all steps,
    sorted by score. An image needs 16 bytes for each of its distinct scores, and `result` about 40 more. Above
    `IOU_EXACT` distinct scores the thresholds are the edges of bins (`metrics.score_bins`), at most 2^-11 apart
    relative to the scores. The IoU at an edge is exact, a threshold is lowered to the next edge, and the oracle can be
    too low.
    """

    def __init__(self) -> None:
        self.size = 0  # distinct scores of all images so far
        self.exact = True
        self.curves: list[tuple[NDArray, ...]] = []  # of each image: ascending scores, IoU and share called at each
        self.everything: list[float] = []  # of each image: the IoU where every pixel is called

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
        size = ranked.positives.size + ranked.negatives.size
        called = ((tp + fp) / size).astype(np.float32)
        self.curves.append((t[::-1], (tp / (ranked.positives.size + fp))[::-1], called[::-1]))
        self.everything.append(ranked.positives.size / size)
        self.size += t.size
        if self.exact and self.size > IOU_EXACT:
            self.exact, self.curves = False, [thinned(*each) for each in self.curves]
        elif not self.exact:
            self.curves[-1] = thinned(*self.curves[-1])

    def at(self, threshold: float) -> NDArray[np.float64]:
        """(n,) the IoU of each image so far at a threshold; 0 where no pixel reaches it."""
        return self._at(threshold, 1)

    def called_at(self, threshold: float) -> NDArray[np.float64]:
        """(n,) the share of each image's pixels that a threshold calls."""
        return self._at(threshold, 2)

    def _at(self, threshold: float, column: int) -> NDArray[np.float64]:
        return np.array([np.append(one[column], 0.0)[np.searchsorted(one[0], threshold)] for one in self.curves])

    def oracle(self, images: NDArray[np.integer] | None = None) -> float:
        """The threshold with the largest mean IoU over `images` (numbers of images; None is all), up to rounding."""
        used = self.curves if images is None else [self.curves[i] for i in images]
        values = np.concatenate([one[0] for one in used])
        jumps = np.concatenate([-np.diff(one[1], append=0.0) for one in used])
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
        several groups (n < groups * size); "exact", False above `IOU_EXACT`; "everything", the mean over groups of the
        IoU where every pixel is called. For NAME in "oracle" and "normals" (all None without a threshold): NAME, the
        mean over groups; NAME_deviation, the standard deviation between groups (ddof 1; nan for one group);
        NAME_groups, the mean of each group; NAME_threshold; NAME_called, the mean share of pixels called.
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
        out["everything"] = float(np.array(self.everything)[drawn].mean())
        for name, t in (("oracle", self.oracle(np.unique(drawn))), ("normals", threshold)):
            means = np.empty(0) if t is None else self.at(t)[drawn].mean(1)
            deviation = float(means.std(ddof=1)) if means.size > 1 else math.nan
            figures: tuple[Any, ...] = (None,) * 5
            if t is not None:
                figures = float(means.mean()), deviation, means.tolist(), t, float(self.called_at(t)[drawn].mean())
            names = (name, *(f"{name}_{what}" for what in ("deviation", "groups", "threshold", "called")))
            out |= zip(names, figures, strict=True)
        return out
