"""The cases that a page shows: which ones, and of a volume which slices."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PER_GROUP = 2  # cases shown of each of the six groups
SLICES = 24  # of a volume that can be paged through, at most
SLIDE_SIDES = (192, 160, 128, 96, 64)  # pixels of a slice: the largest with which all slices of a page fit into
HELD_BYTES = 500_000_000  # for the slices of all cases of a split, until those that are shown are known


class Slices(NamedTuple):
    """Some of a volume's slices along its last axis, shrunk."""

    numbers: tuple[int, ...]
    depth: int  # how many the volume has
    image: NDArray[np.uint8]  # (k, h, w), the first channel, windowed to the 1st to 99th percentile of these slices
    map: NDArray[np.float32]  # (k, h, w)
    outlines: tuple[str, ...]  # (k,) of the mask, as `_outline`; "" where a slice has none


class Case(NamedTuple):
    """One scored case as the report shows it."""

    id: str
    label: int | None  # 0 normal, 1 abnormal, None unknown
    score: float
    image: NDArray[Any]  # (*size, c), 2D or 3D; the first channel is shown
    map: NDArray[Any]  # size, higher is more abnormal
    mask: NDArray[np.bool_] | None = None  # size, True = lesion
    reconstruction: NDArray[Any] | None = None  # as `image`, shown in its grey window
    slice: int | None = None  # where `one_slice` has cut a volume, on its last axis
    confidence: NDArray[Any] | None = None  # size, spread of the samples whose mean the map is
    pictures: Mapping[str, NDArray[Any]] = MappingProxyType({})  # (*size, c) as `image`, or (h, w) in another unit
    slices: Slices | None = None  # of the volume that `one_slice` has cut


def choose_cases(labels: Sequence[int | None], scores: Sequence[float], n: int = PER_GROUP) -> dict[str, list[int]]:
    """The indices worth looking at, by group: of either class the `n` scored worst, best and in the middle.

    Worst is most wrongly scored: the highest normals, the lowest abnormals. Cases of unknown label give the
    highest, the middle and the lowest. No index comes twice (small classes fill worst, then best, then middle),
    and choosing again among the chosen gives the same, so an evaluator needs to keep no other case.
    """
    groups: dict[str, list[int]] = {}
    for label, titles in (
        (1, ("Abnormal, most wrongly scored", "Abnormal, best scored", "Abnormal, in the middle")),
        (0, ("Normal, most wrongly scored", "Normal, best scored", "Normal, in the middle")),
        (None, ("Highest scores", "Lowest scores", "In the middle")),
    ):
        sign = 1 if label == 1 else -1
        worst_first = sorted((sign * scores[i], i) for i in range(len(scores)) if labels[i] == label)
        order = [i for _, i in worst_first]
        worst, rest = order[:n], order[n:]
        best = rest[max(0, len(rest) - n) :][::-1]
        between = rest[: len(rest) - len(best)]
        middle = between[(start := (len(between) - n + 1) // 2 if len(between) > n else 0) : start + n]
        groups.update({t: g for t, g in zip(titles, (worst, best, middle), strict=True) if g})
    return groups


def one_slice(case: Case, side: int = SLIDE_SIDES[0]) -> Case:
    """The case in two dimensions, as a page shows it: its mask only where it marks something, and of a volume the slice
    of the last axis with the most lesion, or else with the highest map, beside `slices` of at most `side` pixels."""
    mask = case.mask if case.mask is not None and case.mask.any() else None
    if case.map.ndim == 2:
        return case._replace(mask=mask)
    k = int((case.map.max((0, 1)) if mask is None else mask.sum((0, 1))).argmax())
    cut = lambda array: None if array is None else np.array(array[:, :, k])
    parts: dict[str, Any] = {
        name: cut(getattr(case, name)) for name in ("image", "map", "reconstruction", "confidence")
    }
    slices = some_slices(case.image[..., 0], case.map, mask, k, side)
    return case._replace(**parts, mask=cut(mask), slice=k, slices=slices)


def some_slices(image: NDArray, heat: NDArray, mask: NDArray | None, k: int, side: int) -> Slices:
    """At most `SLICES` of a volume's slices, equally spaced; the nearest of them to slice `k` is `k` itself."""
    depth = heat.shape[2]
    numbers = np.unique(np.linspace(0, depth - 1, min(SLICES, depth)).round().astype(int))
    numbers[np.abs(numbers - k).argmin()] = k
    shrunk = lambda array: np.stack([shrink(array[:, :, i], side) for i in numbers])
    greys = shrunk(image)
    dark, bright = np.percentile(greys, (1, 99))
    window = np.clip((greys - dark) / ((bright - dark) or 1), 0, 1)
    outlines = tuple("" if mask is None else outline(mask[:, :, i], side) for i in numbers)
    return Slices(tuple(numbers.tolist()), depth, (255 * window).round().astype(np.uint8), shrunk(heat), outlines)


def held_side(n: int) -> int:
    """Pixels of the slices that are kept of each of `n` volumes, so that all take at most `HELD_BYTES`."""
    return min(SLIDE_SIDES[0], math.isqrt(HELD_BYTES // (5 * SLICES * max(1, n))))


def shrink(array: NDArray, side: int) -> NDArray:
    """At most `side` pixels along the longer axis, by area means; never enlarged."""
    h, w = array.shape
    factor = min(1, side / max(h, w))
    size = max(1, round(w * factor)), max(1, round(h * factor))
    floats = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(floats if factor == 1 else floats.resize(size, Image.Resampling.BOX))


def outline(mask: NDArray, side: int) -> str:
    """The mask's border as an SVG path in pixels of the whole slice."""
    from skimage import measure

    rings = measure.find_contours(np.pad(mask.astype(np.float32), 1), 0.5)
    keep = [measure.approximate_polygon(ring, 0.4 * max(1, max(mask.shape) / side)) for ring in rings]
    points = lambda ring: "L".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in ring)
    return "".join(f"M{points(ring)}Z" for ring in keep if len(ring) > 2)
