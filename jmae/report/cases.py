"""The cases that a page shows: which ones, and which slices of a volume."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jmae.data.films import shrink

PER_GROUP = 2  # cases shown of each of the six groups of labelled cases
RANKED = "Without a label, the highest scores first"  # title of the group of cases without a label
WORST = ("Abnormal, worst scores", "Normal, worst scores", RANKED)  # groups that the first screen shows
SPARE = 500  # cases that wait in memory until it is known which are shown, beside those without a label
SLICES = 24  # slices of a volume that can be paged through, at most
SLIDE_SIDES = (192, 160, 128, 96, 64)  # pixels of a slice: the page uses the largest at which all slices fit into it
SLICE_BYTES = 500_000_000  # memory for the slices of all cases of a split, until the evaluator knows which are shown


class Slices(NamedTuple):
    """Some slices of a volume along its last axis, shrunk. k slices of h x w pixels."""

    numbers: tuple[int, ...]
    depth: int  # number of slices in the volume
    image: NDArray[np.uint8]  # (k, h, w), first channel, windowed to the 1st to 99th percentile of these slices
    map: NDArray[np.float32]  # (k, h, w)
    outlines: tuple[str, ...]  # (k,) outline of the mask as an SVG path, see `outline`; "" for a slice without lesion


class Case(NamedTuple):
    """One case with its score, as the report shows it. `size` is (h, w) for an image and (h, w, d) for a volume."""

    id: str
    label: int | None  # 0 normal, 1 abnormal, None unknown
    score: float
    image: NDArray[Any]  # (*size, c); the page shows the first channel, or the colours of a picture with three
    map: NDArray[Any]  # size, higher is more abnormal
    mask: NDArray[np.bool_] | None = None  # size, True = lesion
    reconstruction: NDArray[Any] | None = None  # (*size, c), shown in the grey window of the image
    slice: int | None = None  # number of the slice that `one_slice` took from a volume, on the last axis
    confidence: NDArray[Any] | None = None  # size, spread of the samples whose mean is the map
    pictures: Mapping[str, NDArray[Any]] = MappingProxyType({})  # (*size, c) in the image's unit, or size in another
    slices: Slices | None = None  # slices of the volume from which `one_slice` took one
    region: NDArray[np.bool_] | None = None  # size, where the map counts; None is everywhere
    called: NDArray[np.bool_] | None = None  # size, True in the mask that the run makes of the map
    film: bytes = b""  # the image as stored, a JPEG (`films.film_of`); b"" shows `image` in its place


def choose_cases(
    labels: Sequence[int | None], scores: Sequence[float], most: int, n: int = PER_GROUP
) -> dict[str, list[int]]:
    """Choose the cases to show: of each class the `n` cases with the worst, the best and the middle scores.

    The worst scores are the highest of the normal cases and the lowest of the abnormal ones. Of the cases without a
    label the `most` highest scores are one group. No case is in two groups. A small class fills the groups in the order
    worst, best, middle. Choosing again among the chosen cases gives the same groups.

    Args:
      labels, scores: one a case; a label is 0, 1 or None.

    Returns: {title of a group: indices of its cases}.
    """
    groups: dict[str, list[int]] = {}
    for label, sign in ((1, 1), (0, -1), (None, -1)):
        order = [i for _, i in sorted((sign * scores[i], i) for i in range(len(scores)) if labels[i] == label)]
        if label is None:
            groups[RANKED] = order[:most]
            continue
        worst, rest = order[:n], order[n:]
        best = rest[max(0, len(rest) - n) :][::-1]
        between = rest[: len(rest) - len(best)]
        middle = between[(start := (len(between) - n + 1) // 2 if len(between) > n else 0) : start + n]
        name = "Abnormal" if label else "Normal"
        groups |= {f"{name}, {k} scores": g for k, g in (("worst", worst), ("best", best), ("middle", middle))}
    return {title: group for title, group in groups.items() if group}


def worth_showing(cases: list[Case], most: int) -> list[Case]:
    """The cases that an evaluator keeps as it goes: up to `most + SPARE` all, of more 50 of each labelled group."""
    if len(cases) <= most + SPARE:
        return cases
    groups = choose_cases([case.label for case in cases], [case.score for case in cases], most, n=50)
    return [cases[i] for i in sorted(i for group in groups.values() for i in group)]


def one_slice(case: Case, side: int = SLIDE_SIDES[0]) -> Case:
    """Reduce a volume to one slice of its last axis, and drop a mask without lesion.

    The slice is that of `shown_voxel`. `slices` of the new case are for paging: at most `side` pixels wide and high. An
    image stays as it is.
    """
    mask = case.mask if case.mask is not None and case.mask.any() else None
    if case.map.ndim == 2:
        return case._replace(mask=mask)
    k = shown_voxel(case)[2]
    at_k = lambda array: None if array is None else np.array(array[:, :, k])
    arrays: dict[str, Any] = {
        name: at_k(getattr(case, name)) for name in ("image", "map", "reconstruction", "confidence", "region")
    }
    pictures = {name: np.array(picture[:, :, k]) for name, picture in case.pictures.items()}
    slices = some_slices(case.image[..., 0], case.map, mask, k, side)
    return case._replace(**arrays, pictures=pictures, mask=at_k(mask), called=at_k(case.called), slice=k, slices=slices)


def shown_voxel(case: Case) -> tuple[int, int, int]:
    """A voxel of a volume in the slice that is shown: within the lesion's extent, or where the map is highest.

    The slice is the one with the most lesion, or without a lesion the one with the highest value of the map.
    """
    mask = case.mask if case.mask is not None and case.mask.any() else None
    k = int((case.map.max((0, 1)) if mask is None else mask.sum((0, 1))).argmax())
    chosen = case.map[:, :, k] == case.map[:, :, k].max() if mask is None else mask[:, :, k]
    i, j = np.median(np.argwhere(chosen), 0).astype(int).tolist()
    return i, j, k


def some_slices(image: NDArray, heat: NDArray, mask: NDArray | None, k: int, side: int) -> Slices:
    """At most `SLICES` equally spaced slices of a volume (h, w, d), shrunk to `side` pixels. Slice `k` replaces its
    nearest neighbour among them."""
    depth = heat.shape[2]
    numbers = np.unique(np.linspace(0, depth - 1, min(SLICES, depth)).round().astype(int))
    numbers[np.abs(numbers - k).argmin()] = k
    shrunk = lambda array: np.stack([shrink(array[:, :, i], side) for i in numbers])
    greys = shrunk(image)
    dark, bright = np.percentile(greys, (1, 99))
    window = np.clip((greys - dark) / ((bright - dark) or 1), 0, 1)
    outlines = tuple("" if mask is None else outline(mask[:, :, i], side) for i in numbers)
    return Slices(tuple(numbers.tolist()), depth, (255 * window).round().astype(np.uint8), shrunk(heat), outlines)


def slice_side(n: int) -> int:
    """The side in pixels at which the slices of `n` volumes take at most `SLICE_BYTES` together (5 bytes a pixel)."""
    return min(SLIDE_SIDES[0], math.isqrt(SLICE_BYTES // (5 * SLICES * max(1, n))))


def outline(mask: NDArray, side: int) -> str:
    """The border of a mask (h, w) as an SVG path in its own pixels, simplified for a picture of `side` pixels."""
    from skimage import measure

    rings = measure.find_contours(np.pad(mask.astype(np.float32), 1), 0.5)
    polygons = [measure.approximate_polygon(ring, 0.4 * max(1, max(mask.shape) / side)) for ring in rings]
    points = lambda ring: "L".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in ring)
    return "".join(f"M{points(ring)}Z" for ring in polygons if len(ring) > 2)
