"""Pictures of cases as data URIs: images, maps on one colour scale, overlays, slices."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jmae.report.cases import SLIDE_SIDES, Case, Slices, one_slice, outline, shrink

PERCENTILES = (50.0, 99.9)  # of the normals' map values: the two ends of the colour scale
MAX_SIDE = 256  # pixels of a picture
SLIDE_BYTES = 3_000_000  # before base64


class Scale(NamedTuple):
    """The scale of all maps on a page: values at and below `low` are black, at and above `high` pale yellow; of all
    spreads: black and white."""

    low: float
    high: float
    source: str  # the words for where the two come from


def colour_scale(cases: Sequence[Case]) -> Scale:
    """One scale for all maps from the normals among the cases; from all of them where no case is normal."""
    normals = [case for case in cases if case.label == 0]
    values = np.concatenate([np.ravel(case.map) for case in normals or cases])
    low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    whose = f"the {len(normals)} normal maps" if normals else f"all {len(cases)} maps (none is known normal)"
    ends = " and ".join(f"{p:g}th" for p in PERCENTILES)
    return Scale(low, high if high > low else low + 1, f"{ends} percentile of the values of {whose} shown here")


def spread_scale(cases: Sequence[Case]) -> Scale | None:
    """One grey scale for the spreads of all cases, from the least value up; None where no case has one."""
    maps = [np.ravel(case.confidence) for case in cases if case.confidence is not None]
    if not maps:
        return None
    low, high = (float(v) for v in np.percentile(np.concatenate(maps), (0, PERCENTILES[1])))
    source = f"least value and {PERCENTILES[1]:g}th percentile of the spreads shown here"
    return Scale(low, high if high > low else low + 1, source)


def slides(cases: Sequence[Case], scale: Scale) -> list[list[dict[str, Any]]]:
    """Of each case its slices as {number, image, overlay, outline}; pictures are JPEG data URIs, of the largest of
    `SLIDE_SIDES` with which all take at most `SLIDE_BYTES`, or else the smallest."""
    out: list[list[dict[str, Any]]] = []
    for side in SLIDE_SIDES:
        out = [_slides(case.slices, scale, side) if case.slices else [] for case in cases]
        if sum(len(s["image"]) + len(s["overlay"]) for each in out for s in each) <= SLIDE_BYTES * 4 / 3:
            break
    return out


def _slides(slices: Slices, scale: Scale, side: int) -> list[dict[str, Any]]:
    out = []
    for number, image, heat, border in zip(slices.numbers, slices.image, slices.map, slices.outlines, strict=True):
        grey, heat = shrink(image / 255, side), shrink(heat, side)
        plain = Image.fromarray((255 * grey).round().astype(np.uint8))
        over = Image.fromarray(blend(grey, heat, scale))
        out.append({"number": number, "image": _jpeg(plain), "overlay": _jpeg(over), "outline": border})
    return out


def _png(picture: Image.Image) -> str:
    """A data URI."""
    return _uri(picture, "png", optimize=True)


def _jpeg(picture: Image.Image) -> str:
    """A data URI, with losses."""
    return _uri(picture, "jpeg", quality=82, optimize=True)


def _uri(picture: Image.Image, kind: str, **settings: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def unit_heat(heat: NDArray, scale: Scale) -> NDArray:
    """A map's values with the ends of the scale as 0 and 1."""
    return np.clip((heat - scale.low) / (scale.high - scale.low), 0, 1)


@lru_cache(1)
def palette() -> NDArray[np.uint8]:
    """The 256 colours of maps, (256, 3)."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def blend(grey: NDArray, heat: NDArray, scale: Scale) -> NDArray[np.uint8]:
    """A grey picture (h, w) in [0, 1] under its map (h, w), as opaque as the map is high: (h, w, 3)."""
    unit = unit_heat(heat, scale)
    opacity = 0.75 * unit[..., None]
    colours = palette()[(unit * 255).round().astype(np.uint8)]
    return (255 * grey[..., None] * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def case_pictures(case: Case, scale: Scale, side: int = MAX_SIDE, spreads: Scale | None = None) -> dict[str, Any]:
    """The case's image, reconstruction, map, overlay and spread of the samples as data URIs (None where it has none),
    its `further` pictures by name, its mask's outline, and the slice where it is a volume.

    Image, reconstruction and further pictures like them are windowed to the image's 1st to 99th percentile, further
    ones in another unit to that of them together; the map's colours and the spread's greys are the page's; the overlay
    is as opaque as the map is high.
    """
    case = one_slice(case)
    mask, image, heat = case.mask, shrink(case.image[..., 0], side), shrink(case.map, side)
    dark, bright = np.percentile(image, (1, 99))
    window = lambda array: np.clip((array - dark) / ((bright - dark) or 1), 0, 1)
    greys = lambda unit: _png(Image.fromarray((unit * 255).round().astype(np.uint8)))
    restored = None if case.reconstruction is None else greys(window(shrink(case.reconstruction[..., 0], side)))
    spread = None
    if case.confidence is not None and spreads:
        share = (shrink(case.confidence, side) - spreads.low) / (spreads.high - spreads.low)
        spread = greys(np.clip(share, 0, 1))
    coded = [picture for picture in case.pictures.values() if picture.ndim == 2]
    ends = np.percentile(np.concatenate([np.ravel(picture) for picture in coded]), (1, 99)) if coded else (0, 1)
    code = lambda array: np.clip((array - ends[0]) / ((ends[1] - ends[0]) or 1), 0, 1)
    further = {
        name: greys(code(shrink(array, side)) if array.ndim == 2 else window(shrink(array[..., 0], side)))
        for name, array in case.pictures.items()
    }
    grey = window(image)
    indices = (unit_heat(heat, scale) * 255).round().astype(np.uint8)
    coloured = Image.fromarray(indices).convert("P")
    coloured.putpalette(palette().tobytes())
    h, w = case.map.shape[:2]
    return {
        "image": greys(grey),
        "reconstruction": restored,
        "map": _png(coloured),
        "overlay": _png(Image.fromarray(blend(grey, heat, scale)).quantize(256, Image.Quantize.FASTOCTREE)),
        "spread": spread,
        "further": further,
        "outline": "" if mask is None else outline(mask, side),
        "width": w,
        "height": h,
        "slice": case.slice,
    }
