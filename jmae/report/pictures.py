"""Pictures of cases as data URIs: images, maps on one colour scale, overlays, slices."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jmae.data.films import FILM_SIDE, shrink
from jmae.report.cases import SLIDE_SIDES, Case, Slices, one_slice, outline
from jmae.tables import counted

PERCENTILES = (50.0, 99.9)  # of the map values of normal cases: the two ends of the colour scale
MAX_SIDE = 256  # pixels of a picture
FILM_SIDES = (FILM_SIDE, 384, 256, 192, 128, 96)  # pixels of a film: the page uses the largest at which all films fit
SLIDE_BYTES = 3_000_000  # for all slices of a page, before base64 adds a third


class Scale(NamedTuple):
    """The scale of all maps, or of all spreads, of a page.

    A map is black at values up to `low` and pale yellow from `high` on. A spread is black and white there.
    """

    low: float
    high: float
    source: str  # where the two values come from, in sentences


def colour_scale(cases: Sequence[Case]) -> Scale:
    """One scale for all maps, from the normal cases. Without a normal case it comes from all cases."""
    normals = [case for case in cases if case.label == 0]
    values = np.concatenate([np.ravel(case.map) for case in normals or cases])
    low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    of = counted(len(normals or cases), "normal maps" if normals else "maps")
    source = (
        f"Of the values of {of} shown here{'' if normals else ' (no case is labelled normal)'}, "
        f"{round(1000 - 10 * PERCENTILES[1])} of 1,000 is higher than {high:.3g}, the bright end. The dark end "
        "is their middle value."
    )
    return Scale(low, high if high > low else low + 1, source)


def spread_scale(cases: Sequence[Case]) -> Scale | None:
    """One grey scale for the spreads of all cases, from the smallest value up. None where no case has a spread."""
    maps = [np.ravel(case.confidence) for case in cases if case.confidence is not None]
    if not maps:
        return None
    low, high = (float(v) for v in np.percentile(np.concatenate(maps), (0, PERCENTILES[1])))
    source = f"These are the smallest value and the {PERCENTILES[1]:g}th percentile of the spreads shown here."
    return Scale(low, high if high > low else low + 1, source)


def slides(cases: Sequence[Case], scale: Scale) -> list[list[dict[str, Any]]]:
    """The slices of each case as {number, image, overlay, outline}, with pictures as JPEG data URIs.

    All slices have the largest of `SLIDE_SIDES` at which the page stays below `SLIDE_BYTES`, or else the smallest.
    """
    slides_of_cases: list[list[dict[str, Any]]] = []
    for side in SLIDE_SIDES:
        slides_of_cases = [case_slides(case.slices, scale, side) if case.slices else [] for case in cases]
        if sum(len(s["image"]) + len(s["overlay"]) for each in slides_of_cases for s in each) <= SLIDE_BYTES * 4 / 3:
            break
    return slides_of_cases


def films(cases: Sequence[Case], scale: Scale, most: float) -> tuple[int, list[dict[str, Any]]]:
    """(the side in pixels, the `film_pictures` of each case; {} of a case without a film).

    All films have the largest of `FILM_SIDES` at which they take about `most` bytes or less, or else the smallest. Some
    of the cases stand for all.
    """
    n = sum(bool(case.film) for case in cases)
    some = [case for case in cases if case.film][:: max(1, n // 16)]
    side = FILM_SIDES[0]
    for side in FILM_SIDES:
        drawn = [film_pictures(case, scale, side) for case in some]
        if sum(len(one["image"]) + len(one["overlay"]) for one in drawn) * n <= most * 4 / 3 * len(some):
            break
    return side, [film_pictures(case, scale, side) if case.film else {} for case in cases]


def film_pictures(case: Case, scale: Scale, side: int) -> dict[str, Any]:
    """The film of a case, and the film under its map, at most `side` pixels wide and high: data URIs "image" and
    "overlay", and "aspect", width by height."""
    film = Image.open(io.BytesIO(case.film))
    film.thumbnail((side, side))
    heat = Image.fromarray(np.ascontiguousarray(case.map, np.float32)).resize(film.size, Image.Resampling.BILINEAR)
    overlay = Image.fromarray(blend(np.asarray(film) / 255, np.asarray(heat), scale))
    return {"image": _jpeg(film), "overlay": _jpeg(overlay), "aspect": "{} / {}".format(*film.size)}


def case_slides(slices: Slices, scale: Scale, side: int) -> list[dict[str, Any]]:
    """The slices of one case as {number, image, overlay, outline}, at most `side` pixels wide and high."""
    entries = []
    for number, image, heat, border in zip(slices.numbers, slices.image, slices.map, slices.outlines, strict=True):
        grey, heat = shrink(image / 255, side), shrink(heat, side)
        plain = Image.fromarray((255 * grey).round().astype(np.uint8))
        overlay = Image.fromarray(blend(grey, heat, scale))
        entries.append({"number": number, "image": _jpeg(plain), "overlay": _jpeg(overlay), "outline": border})
    return entries


def _png(picture: Image.Image) -> str:
    """A data URI."""
    return _uri(picture, "png", optimize=True)


def _jpeg(picture: Image.Image) -> str:
    """A data URI, compressed with loss."""
    return _uri(picture, "jpeg", quality=82, optimize=True)


def _uri(picture: Image.Image, kind: str, **settings: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plain(unit: NDArray) -> str:
    """A picture in [0, 1], (h, w) or (h, w, 3), as a grey or a coloured PNG."""
    picture = Image.fromarray((unit * 255).round().astype(np.uint8))
    return _png(picture if unit.ndim == 2 else picture.quantize(256, Image.Quantize.FASTOCTREE))


def colours_of(case: Case, picture: NDArray) -> list[NDArray]:
    """The channels of a picture (h, w, c) that are shown: red, green, blue, or the first alone.

    The three channels of an image are colours; those of a volume are sequences.
    """
    shown = 3 if picture.shape[-1] == 3 and case.slice is None else 1
    return [picture[..., channel] for channel in range(shown)]


def _picture(case: Case, picture: NDArray, side: int, dark: float, bright: float) -> NDArray:
    """The shown channels of a picture (h, w, c), shrunk and in one window of values: (h, w), or (h, w, 3)."""
    channels = [_windowed(shrink(channel, side), dark, bright) for channel in colours_of(case, picture)]
    return np.stack(channels, -1) if len(channels) > 1 else channels[0]


def _coloured(heat: NDArray, scale: Scale) -> str:
    """A map (h, w) as a PNG in the colours of maps."""
    coloured = Image.fromarray((unit_heat(heat, scale) * 255).round().astype(np.uint8)).convert("P")
    coloured.putpalette(palette().tobytes())
    return _png(coloured)


def _windowed(array: NDArray, dark: float, bright: float) -> NDArray:
    """The values with `dark` as 0 and `bright` as 1, clipped."""
    return np.clip((array - dark) / ((bright - dark) or 1), 0, 1)


def unit_heat(heat: NDArray, scale: Scale) -> NDArray:
    """The values of a map with the ends of the scale as 0 and 1, clipped."""
    return np.clip((heat - scale.low) / (scale.high - scale.low), 0, 1)


@lru_cache(1)
def palette() -> NDArray[np.uint8]:
    """The 256 colours of maps, (256, 3)."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def blend(picture: NDArray, heat: NDArray, scale: Scale) -> NDArray[np.uint8]:
    """Lay a map (h, w) over a picture (h, w) or (h, w, 3) in [0, 1]: colours (h, w, 3), more opaque where the map is
    higher."""
    unit = unit_heat(heat, scale)
    opacity = 0.75 * unit[..., None]
    colours = palette()[(unit * 255).round().astype(np.uint8)]
    below = picture.reshape(*heat.shape, -1)
    return (255 * below * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def case_pictures(case: Case, scale: Scale, side: int = MAX_SIDE, spreads: Scale | None = None) -> dict[str, Any]:
    """Draw a case; a volume in the slice that `one_slice` takes.

    The 1st to 99th percentile of the image is the window of the image, of the reconstruction, and of further pictures
    in the same unit. Further pictures in another unit share one window of their own.

    Args:
      scale, spreads: the scales of the page for maps and spreads.
      side: the largest side of a picture in pixels.

    Returns: data URIs "image", "reconstruction", "map", "inside" (the map within the region), "overlay" and "spread"
    (None where the case has none); "further", {name: data URI}; "outline" of the mask; "called", the outline of what
    the map calls abnormal; "width" and "height" of the map in pixels; "slice". With a film the "overlay" is None, and
    so is the "image" without a reconstruction: see `film_pictures`.
    """
    case = one_slice(case)
    heat = shrink(case.map, side)
    dark, bright = np.percentile([shrink(channel, side) for channel in colours_of(case, case.image)], (1, 99))
    picture = _picture(case, case.image, side, dark, bright)
    reconstruction = spread = None
    if case.reconstruction is not None:
        reconstruction = _plain(_picture(case, case.reconstruction, side, dark, bright))
    if case.confidence is not None and spreads:
        spread = _plain(_windowed(shrink(case.confidence, side), spreads.low, spreads.high))
    inside = None
    if case.region is not None and not case.region.all():
        inside = _coloured(heat * (shrink(case.region, side) > 0.5), scale)
    overlay = Image.fromarray(blend(picture, heat, scale))
    h, w = case.map.shape[:2]
    return {
        "image": _plain(picture) if reconstruction or not case.film else None,
        "reconstruction": reconstruction,
        "map": _coloured(heat, scale),
        "inside": inside,
        "overlay": None if case.film else _png(overlay.quantize(256, Image.Quantize.FASTOCTREE)),
        "spread": spread,
        "further": further_pictures(case, side, dark, bright),
        "outline": "" if case.mask is None else outline(case.mask, side),
        "called": "" if case.called is None else outline(case.called, side),
        "width": w,
        "height": h,
        "slice": case.slice,
    }


def further_pictures(case: Case, side: int, dark: float, bright: float) -> dict[str, str]:
    """The case's own pictures by name. Those with channels have the image's unit and its window `dark` to `bright`."""
    other_unit = [np.ravel(picture) for picture in case.pictures.values() if picture.ndim == 2]
    ends = np.percentile(np.concatenate(other_unit), (1, 99)) if other_unit else (0.0, 1.0)
    return {
        name: _plain(
            _windowed(shrink(picture, side), *ends)
            if picture.ndim == 2
            else _picture(case, picture, side, dark, bright)
        )
        for name, picture in case.pictures.items()
    }
