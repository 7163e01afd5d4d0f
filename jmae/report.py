"""python -m jmae.report DIR [DIR ...] --out FILE.html [--draws 2000] [--debug]

Puts the evaluations of several runs on one page: figures side by side, paired differences, what differs in recipes and
environments. DIR is a run folder, or an evaluation's own. Exit codes: 0 done; 2 a folder has no whole evaluation, or
the runs share no case.
"""

# Also the page that every evaluation writes: numbers beside cheap baselines, curves, cases on one colour scale, recipe.
# Small to large: choosing cases, pictures, charts, words, the page. Each part takes plain values, so that the page on
# several runs (`jmae.comparison`) is made of the same parts.
#
# A page holds everything itself and asks for nothing: no script, no font, no request (its content security policy
# forbids them), so it opens the same from a cluster's file share, a phone, or an archive in ten years; its slider is
# radio buttons and CSS. What comes from data (ids, names, configuration) is only ever written through Jinja's
# autoescape and never into a figure.

import ast
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from jmae import metrics, recipe
from jmae.errors import InputError, exit_code

if TYPE_CHECKING:  # what draws is imported where it is needed, as every command imports this module
    from matplotlib.axes import Axes

NORMAL, ABNORMAL, INK, FAINT = "#2f6690", "#b4491f", "#1c1c1c", "#8a8a8a"
PER_GROUP = 2  # cases shown of each of the six groups
RANKED = 100  # cases listed by their score, at most
PERCENTILES = (50.0, 99.9)  # of the normals' map values: the two ends of the colour scale
PICTURE_BYTES = 1_800_000  # for all pictures of a page, before base64 adds a third
MAX_SIDE = 256  # pixels of a picture
SLICES = 24  # of a volume that can be paged through, at most
SLIDE_SIDES = (192, 160, 128, 96, 64)  # pixels of a slice: the largest with which all slices of a page fit into
SLIDE_BYTES = 3_000_000  # before base64
HELD_BYTES = 500_000_000  # for the slices of all cases of a split, until those that are shown are known

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own face
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


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


class Scale(NamedTuple):
    """The scale of all maps on a page: values at and below `low` are black, at and above `high` pale yellow; of all
    spreads: black and white."""

    low: float
    high: float
    source: str  # the words for where the two come from


class Row(NamedTuple):
    """A line of the comparison: its `kind` is primary, score, baseline or chance; None where not computed."""

    name: str
    kind: str
    image: Mapping[str, Any]
    pixel: Mapping[str, Any]


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


# Pictures


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
    shrunk = lambda array: np.stack([_shrink(array[:, :, i], side) for i in numbers])
    greys = shrunk(image)
    dark, bright = np.percentile(greys, (1, 99))
    window = np.clip((greys - dark) / ((bright - dark) or 1), 0, 1)
    outlines = tuple("" if mask is None else _outline(mask[:, :, i], side) for i in numbers)
    return Slices(tuple(numbers.tolist()), depth, (255 * window).round().astype(np.uint8), shrunk(heat), outlines)


def held_side(n: int) -> int:
    """Pixels of the slices that are kept of each of `n` volumes, so that all take at most `HELD_BYTES`."""
    return min(SLIDE_SIDES[0], math.isqrt(HELD_BYTES // (5 * SLICES * max(1, n))))


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
    for number, image, heat, outline in zip(slices.numbers, slices.image, slices.map, slices.outlines, strict=True):
        grey, heat = _shrink(image / 255, side), _shrink(heat, side)
        plain = Image.fromarray((255 * grey).round().astype(np.uint8))
        over = Image.fromarray(blend(grey, heat, scale))
        out.append({"number": number, "image": _jpeg(plain), "overlay": _jpeg(over), "outline": outline})
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


def _shrink(array: NDArray, side: int) -> NDArray:
    """At most `side` pixels along the longer axis, by area means; never enlarged."""
    h, w = array.shape
    factor = min(1, side / max(h, w))
    size = max(1, round(w * factor)), max(1, round(h * factor))
    floats = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(floats if factor == 1 else floats.resize(size, Image.Resampling.BOX))


def _outline(mask: NDArray, side: int) -> str:
    """The mask's border as an SVG path in pixels of the whole slice."""
    from skimage import measure

    rings = measure.find_contours(np.pad(mask.astype(np.float32), 1), 0.5)
    keep = [measure.approximate_polygon(ring, 0.4 * max(1, max(mask.shape) / side)) for ring in rings]
    points = lambda ring: "L".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in ring)
    return "".join(f"M{points(ring)}Z" for ring in keep if len(ring) > 2)


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
    mask, image, heat = case.mask, _shrink(case.image[..., 0], side), _shrink(case.map, side)
    dark, bright = np.percentile(image, (1, 99))
    window = lambda array: np.clip((array - dark) / ((bright - dark) or 1), 0, 1)
    greys = lambda unit: _png(Image.fromarray((unit * 255).round().astype(np.uint8)))
    restored = None if case.reconstruction is None else greys(window(_shrink(case.reconstruction[..., 0], side)))
    spread = None
    if case.confidence is not None and spreads:
        share = (_shrink(case.confidence, side) - spreads.low) / (spreads.high - spreads.low)
        spread = greys(np.clip(share, 0, 1))
    coded = [picture for picture in case.pictures.values() if picture.ndim == 2]
    ends = np.percentile(np.concatenate([np.ravel(picture) for picture in coded]), (1, 99)) if coded else (0, 1)
    code = lambda array: np.clip((array - ends[0]) / ((ends[1] - ends[0]) or 1), 0, 1)
    further = {
        name: greys(code(_shrink(array, side)) if array.ndim == 2 else window(_shrink(array[..., 0], side)))
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
        "outline": "" if mask is None else _outline(mask, side),
        "width": w,
        "height": h,
        "slice": case.slice,
    }


# Charts


def chart(name: str, alt: str, draw: Callable[["Axes"], None], size: tuple[float, float] = (4.6, 3.7)) -> Markup:
    """An inline SVG drawn by `draw(axes)`, `size` in inches, described by `alt`; `name` keeps its ids unique."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    opening = Markup('<svg {} role="img" aria-label="{}" xmlns:xlink="http://www.w3.org/1999/xlink">')
    return opening.format(Markup(view[0]), alt) + Markup(svg[svg.index(">") + 1 :])


def roc_chart(labels: NDArray, scores: NDArray, threshold: float | None = None) -> Markup:
    """The ROC curve with chance and, where given, the point at the validation threshold."""
    fpr, tpr, _ = metrics.roc_curve(labels, scores)
    auroc = metrics.auroc(labels, scores)

    def draw(ax: "Axes") -> None:
        ax.plot([0, 1], [0, 1], color=FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.plot(fpr, tpr, color=INK, clip_on=False)
        if threshold is not None:
            at = metrics.at_threshold(labels, scores, threshold)
            ax.plot(1 - at["specificity"], at["sensitivity"], "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        ax.text(0.97, 0.06, f"AUROC {auroc:.3f}", ha="right", color=INK)

    return chart("roc", f"ROC curve; the area under it is {auroc:.3f}, chance is 0.5.", draw)


def pr_chart(labels: NDArray, scores: NDArray, threshold: float | None = None) -> Markup:
    """The precision-recall curve as the steps that AP sums, with chance (the share of abnormal cases)."""
    recall, precision, _ = metrics.pr_curve(labels, scores)
    ap, share = metrics.average_precision(labels, scores), float(np.mean(labels))

    def draw(ax: "Axes") -> None:
        ax.axhline(share, color=FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.plot(np.r_[0, recall], np.r_[precision[0], precision], color=INK, ds="steps-pre", clip_on=False)
        if threshold is not None and np.any(called := scores >= threshold):
            at = np.mean(called[labels]), np.mean(labels[called])
            ax.plot(*at, "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall (sensitivity)", ylabel="precision", aspect="equal")
        ax.text(0.03, 0.06, f"AP {ap:.3f}", color=INK)

    return chart("pr", f"Precision-recall curve; average precision {ap:.3f}, chance is {share:.3f}.", draw)


def froc_chart(froc: Mapping[str, Any]) -> Markup:
    """The curve of `metrics.Froc` up to its false positives `at`, with the point there where the curve gets so far."""
    fp, found = np.transpose(froc["curve"])
    at, value = froc["at"], froc["sensitivity"]

    def draw(ax: "Axes") -> None:
        ax.plot(fp, found, color=INK)
        if fp[-1] >= at:
            ax.plot(at, value, "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, min(at, 1.02 * fp.max()) or 1), ylim=(0, 1))
        ax.set(xlabel="false positives per image", ylabel="sensitivity for lesions")
        ax.text(0.97, 0.06, f"{value:.3f} at {at:g}", ha="right", color=INK, transform=ax.transAxes)

    return chart("froc", f"FROC curve; the sensitivity at {at:g} false positives per image is {value:.3f}.", draw)


def score_chart(labels: NDArray | None, scores: NDArray, threshold: float | None = None) -> Markup:
    """Histograms of the scores by class in common bins, as shares of their class; of all where labels is None."""
    bins = np.histogram_bin_edges(scores, min(40, 2 + int(2 * math.sqrt(scores.size))))
    parts: list[tuple[NDArray, str, str, Any]] = [(scores, INK, "all", "-")]
    if labels is not None:
        parts = [(scores[~labels], NORMAL, "normal", "-"), (scores[labels], ABNORMAL, "abnormal", (0, (5, 1.5)))]

    def draw(ax: "Axes") -> None:
        for values, colour, word, line in parts:
            if values.size:
                heights = np.histogram(values, bins)[0] / values.size
                ax.stairs(heights, bins, color=colour, fill=True, alpha=0.18)
                ax.stairs(heights, bins, color=colour, lw=1.4, ls=line, label=f"{word} ({values.size})")
        if threshold is not None:
            ax.axvline(threshold, color=INK, lw=1, label="threshold")
        ax.set(xlabel="score", ylabel="share of the cases" if labels is None else "share of the class", ylim=(0, None))
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, handlelength=1.6)

    middles = ", ".join(f"median {np.median(v):.3g} of {v.size} {w}" for v, _, w, _ in parts if v.size)
    return chart("scores", f"Histogram of the scores: {middles}.", draw, (6, 3.1))


def convergence_chart(found: Mapping[str, Any]) -> Markup:
    """The mean AUROC of `jmae.convergence` against the number of masks, with its standard errors."""
    steps, what = found["steps"], found["what"]
    x, y, se = ([step[name] for step in steps] for name in ("number", "auroc", "se"))

    def draw(ax: "Axes") -> None:
        ax.axhspan(y[-1] - found["close"], y[-1] + found["close"], color=NORMAL, alpha=0.1, lw=0)
        ax.errorbar(x, y, se, color=INK, fmt="o-", ms=4, lw=1.2, capsize=3)
        ax.set_xscale("log", base=2)
        ax.set(xlabel=what, ylabel="AUROC", xticks=x, xticklabels=map(str, x))
        ax.minorticks_off()

    points = ", ".join(f"{v:.3f} ± {e:.3f} at {n}" for n, v, e in zip(x, y, se, strict=True))
    return chart("convergence", f"AUROC and its standard error by the number of {what}: {points}.", draw, (6, 3.1))


def loss_chart(number: int, steps: NDArray, losses: NDArray) -> Markup:
    """A stage's training loss against the step, with a running mean over a fiftieth of the points."""
    thin = np.unique(np.linspace(0, steps.size - 1, min(steps.size, 500)).astype(int))
    width = max(1, steps.size // 50)
    total = np.cumsum(np.r_[0, losses])
    first = np.maximum(np.arange(steps.size) - width + 1, 0)
    running = (total[1:] - total[first]) / (np.arange(steps.size) - first + 1)

    def draw(ax: "Axes") -> None:
        ax.plot(steps[thin], losses[thin], color=NORMAL, lw=0.7, alpha=0.4)
        ax.plot(steps[thin], running[thin], color=NORMAL, marker="o" if steps.size == 1 else None)
        if losses.min() > 0 and losses.max() > 20 * losses.min():
            ax.set_yscale("log")
        ax.set(xlabel="step", ylabel="loss")

    alt = f"Training loss from {losses[0]:.4g} at step {steps[0]:.0f} to {running[-1]:.4g} at step {steps[-1]:.0f}."
    return chart(f"loss{number}", alt, draw, (4.6, 2.7))


# Words and tables


def comparison_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """The primary score, the system's further scores, the baselines from best to worst, and chance."""
    row = lambda name, kind, e: Row(name, kind, e.get("image") or {}, e.get("pixel") or {})
    primary = str(evaluation["primary"])
    further = {k: e for k, e in (evaluation.get("scores") or {}).items() if k != primary}
    baselines = [row(k, "baseline", e) for k, e in (evaluation.get("baselines") or {}).items()]
    baselines.sort(key=lambda r: -(r.image.get("auroc") or 0))
    rows = [row(primary, "primary", evaluation), *(row(k, "score", e) for k, e in further.items()), *baselines]
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    pixel = evaluation.get("pixel") or {}
    by_chance = {"auroc": 0.5, "ap": pixel["prevalence"]} if pixel.get("prevalence") is not None else {}
    if (n and k) or by_chance:
        rows.append(Row("chance", "chance", {"auroc": 0.5, "ap": k / (n + k)} if n and k else {}, by_chance))
    return rows


def named_patients(evaluation: Mapping[str, Any], most: int = 40) -> list[dict[str, Any]]:
    """The patients with a lesion, at most so many, each with its "best" baseline (name, AUROC) or None."""
    rows = [row for row in evaluation.get("per_patient") or () if row["auroc"] is not None][:most]
    rated = lambda row: [
        (b["auroc"], name) for name, b in (row.get("baselines") or {}).items() if b["auroc"] is not None
    ]
    best = lambda row: max(rated(row))[::-1] if rated(row) else None
    return [{**row, "best": best(row)} for row in rows]


def voxels(evaluation: Mapping[str, Any]) -> list[str]:
    """What the pixel figures mean, in a sentence; none without them."""
    pixel = evaluation.get("pixel") or {}
    if pixel.get("auroc") is None:
        return []
    rated = [r for r in comparison_rows(evaluation) if r.kind == "baseline" and r.pixel.get("auroc") is not None]
    best = max(rated, key=lambda r: r.pixel["auroc"], default=None)
    beside = f"; the best cheap baseline, “{best.name}”, does so {100 * best.pixel['auroc']:.0f} times" if best else ""
    return [
        "Inside the region, the map gives a point of a lesion a higher value than one outside "
        f"{100 * pixel['auroc']:.0f} times in 100{beside}."
    ]


def described(system: str) -> tuple[str, str]:
    """(what a system is in a sentence, its paper up to the arXiv number), as its file begins; empty what that lacks."""
    file = Path(__file__).parent / "systems" / f"{system}.py"
    if not system.isidentifier() or not file.is_file():
        return "", ""
    what, paper, *_ = *(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n"), ""
    found = re.match(r".*?arXiv [\d.]+\d", paper, re.S)
    return " ".join(what.split()), " ".join(found[0].split()) + "." if found else ""


def without_curves(evaluation: Mapping[str, Any]) -> str | None:
    """Why there are no AUROC, AP and curves; None where there are."""
    n, k = evaluation["n_normal"], evaluation["n_abnormal"]
    if n and k:
        return None
    if not (n or k):
        return "No case of this split has a label, so there is nothing to measure the scores against."
    only = "normal" if n else "abnormal"
    return f"All labelled cases of this split are {only}: AUROC, AP and their curves need both classes."


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """What the result means, in sentences for a reader who knows radiology better than statistics."""
    if reason := without_curves(evaluation):
        ranks = "The scores below only rank the cases: higher is more abnormal to the model."
        return [reason, *(voxels(evaluation) or [ranks])]
    image, n = evaluation["image"], evaluation["n_normal"] + evaluation["n_abnormal"]
    auroc, ci = image["auroc"], image.get("auroc_ci")
    lo, hi = ci if ci and None not in ci else (math.nan, math.nan)
    between = "" if math.isnan(lo) else f" (95 % interval {100 * lo:.0f} to {100 * hi:.0f})"
    words = [
        "Shown one abnormal and one normal case at random, it gives the abnormal one the higher score "
        f"{100 * auroc:.0f} times in 100{between}; a coin gets 50."
    ]
    rated = [r for r in comparison_rows(evaluation) if r.kind == "baseline" and r.image.get("auroc") is not None]
    if lo <= 0.5 <= hi:
        words.append(f"On these {n} cases that cannot be told from chance.")
    elif auroc < 0.5:
        words.append("That is worse than chance: the scores point the wrong way.")
    if rated:
        name, value = rated[0].name, rated[0].image["auroc"]
        if value >= auroc:
            words.append(f"The cheap baseline “{name}” does as well or better, with {100 * value:.0f} in 100.")
        elif value >= lo:
            words.append(
                f"The best cheap baseline, “{name}”, gets {100 * value:.0f}, which lies inside that interval: "
                "these cases do not settle which of the two is better."
            )
        else:
            words.append(f"The best cheap baseline, “{name}”, gets {100 * value:.0f}.")
    return words + voxels(evaluation)


def convergence_words(found: Mapping[str, Any]) -> list[str]:
    """How many masks, samples or repeats are enough, in sentences."""
    what, steps, close = found["what"], found["steps"], found["close"]
    last = steps[-1]
    if all(step["deviation"] == 0 and step["auroc"] == last["auroc"] for step in steps):
        return [f"The score does not depend on the {what}."]
    at = f"AUROC {last['auroc']:.3f} ± {last['se']:.3f} with the recipe’s {last['number']} {what}"
    words = [f"{at} (mean and standard error of {last['draws']} repetitions with other random numbers)."]
    found_at = next((step for step in steps if step["number"] == found["enough"]), None)
    if not found_at:
        words.append(
            f"That is too few to fix the second digit: one evaluation varies by {2 * last['deviation']:.3f} (two "
            f"standard deviations), so raise evaluation.{what}."
        )
    elif found_at is last:
        words.append(f"No fewer give an evaluation within {close:g} of that.")
    else:
        words.append(
            f"From {found_at['number']} on, one evaluation lies within {close:g} of that (difference of the means and "
            f"two standard deviations, {2 * found_at['deviation']:.3f}): more cost time and change little."
        )
    if found["rising"]:
        words.append(f"From {steps[-2]['number']} to {last['number']} it still rose: more {what} may raise it further.")
    return words


def promise(evaluation: Mapping[str, Any]) -> list[str]:
    """What a p-value is, and how often cases of either label alarmed at the promised rate; or why there are none."""
    found, table = evaluation.get("alarms"), evaluation.get("table") or []
    if not found:
        why = evaluation.get("uncalibrated")
        return [f"{why[0].upper()}{why[1:]}."] if why else []
    n, rate, threshold = found["n"], found["rate"], found.get("threshold")
    words = [
        f"A case’s p-value is the share, of {n} held-out normals and itself, that scores at least as high: of normal "
        f"cases of the same kind at most {100 * rate:g} % get one of {rate:g} or less, on average."
    ]
    if threshold is None:
        return [*words, f"So few normals cannot give one so low: that takes {math.ceil(1 / rate) - 1}."]
    counts, chance = [], 1.0
    for label, kind in ((0, "normal"), (1, "abnormal"), (None, "unlabelled")):
        p = [row["p_value"] for row in table if row["label"] == label and row.get("p_value") is not None]
        called = sum(value <= rate for value in p)
        counts += [f"{called} of {len(p)} {kind} cases"] if p else []
        if label == 0 and p:
            from scipy import stats

            k = math.floor(round(rate * (n + 1), 9))  # the threshold is the k-th highest of the n
            chance = float(stats.betabinom.sf(called - 1, len(p), k, n + 1 - k))
    words.append(f"With that alarm, at scores above {threshold:.4g}, here {' and '.join(counts)} alarmed.")
    if chance < 0.01:
        words.append(
            "So many normal alarms have a chance below 1 in 100 if these normals are like those held out: take the "
            "p-values as too low, and calibrate on normals of this kind."
        )
    return words


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value) in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        rows += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", str(value))]
    return rows


def stage_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[NDArray, NDArray]]:
    """Steps and finite losses of each stage, in order of appearance; of a step logged twice the later counts."""
    stages: dict[str, dict[int, float]] = {}
    for line in history:
        loss = line.get("loss")
        if loss is not None and math.isfinite(loss):
            stages.setdefault(str(line.get("stage", "")), {})[int(line["step"])] = float(loss)
    ordered = {stage: sorted(losses.items()) for stage, losses in stages.items()}
    return {s: (np.array([k for k, _ in x]), np.array([v for _, v in x])) for s, x in ordered.items()}


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(pair: Sequence[float | None] | None, digits: int = 3) -> str:
    return "–".join(_number(v, digits) for v in pair) if pair and None not in pair else ""


# The page


def _shown_cases(
    cases: Sequence[Case], normals: NDArray, colours: Scale | None, p_values: Mapping[str, float]
) -> tuple[Scale | None, Scale | None, list[dict[str, Any]]]:
    """The scales of maps and spreads, and the groups of cases with pictures and how many normals score lower."""
    groups = choose_cases([c.label for c in cases], [c.score for c in cases])
    shown = [i for group in groups.values() for i in group]
    if not shown:
        return None, None, []
    scale, spread = colours or colour_scale([cases[i] for i in shown]), spread_scale([cases[i] for i in shown])
    pictures = sum(4 + (spread is not None) + len(cases[i].pictures) for i in shown)
    side = min(MAX_SIDE, int(math.sqrt(PICTURE_BYTES / pictures)))  # palette PNG: at most a byte a pixel

    flat = {i: one_slice(cases[i]) for i in shown}
    paged = dict(zip(shown, slides([flat[i] for i in shown], scale), strict=True))

    def entry(i: int) -> dict[str, Any]:
        case = flat[i]
        below = f"above {np.sum(normals < case.score)} of {normals.size} normals" if normals.size else ""
        more = {
            "p": p_values.get(case.id),
            "slides": paged[i],
            "number": i,
            "depth": case.slices.depth if case.slices else None,
        }
        return {"case": case, "below": below, **case_pictures(case, scale, side, spread), **more}

    return scale, spread, [{"title": t, "cases": [entry(i) for i in group]} for t, group in groups.items()]


def write_report(
    path: str | Path,
    evaluation: Mapping[str, Any],
    cases: Sequence[Case],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    colours: Scale | None = None,
) -> None:
    """Writes the page in one piece: a reader sees the old file or the new one, never half of one.

    Args:
      path: the HTML file; its folder is made.
      evaluation: the content of `metrics.json`, with `table`, a row {id, label, score, ...} a case.
      cases: those worth showing, at least what `choose_cases` picks of the table.
      history: the lines of `metrics.jsonl`.
      config, environment: the content of `config.json` and `environment.json`.
      colours: the scale of maps; that of the normals among the shown cases where there is none.
    """
    evaluation = metrics.json_ready(evaluation)
    table = evaluation.get("table") or []
    known = [row for row in table if row.get("label") is not None and row.get("score") is not None]
    labels = np.array([row["label"] for row in known], bool)
    scores = np.array([row["score"] for row in known], float)
    every = np.array([row["score"] for row in table if row.get("score") is not None], float)
    threshold = (evaluation.get("decision") or {}).get("threshold")
    p_values = {row["id"]: row["p_value"] for row in table if row.get("p_value") is not None}
    reason = without_curves(evaluation)
    curves = bool(known) and labels.any() and not labels.all()
    scale, spread, groups = _shown_cases(cases, scores[~labels], colours, p_values)
    rows = comparison_rows(evaluation)
    frocs = [r.pixel["froc"] for r in rows if r.pixel.get("froc")]
    froc = (evaluation.get("pixel") or {}).get("froc")
    bounds = [v for r in rows for v in (r.image.get("auroc"), *(r.image.get("auroc_ci") or ())) if v is not None]
    stages = stage_losses(history)
    patients = evaluation.get("per_patient")
    converged = evaluation.get("convergence")
    source = config.get("data") or {}
    phantom = f"phantoms: {source['phantom']}" if source.get("phantom") else ""
    by_score = sorted(table, key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True)

    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            e=evaluation,
            data=source.get("manifest") or phantom,
            about=described(evaluation["system"])[0],
            headline=headline(evaluation),
            promise=promise(evaluation),
            reason=reason,
            rows=rows,
            axis=min(0.4, math.floor(10 * min(bounds)) / 10) if bounds else 0.4,
            pixels=any(r.pixel for r in rows),
            patient_mean=metrics.patient_mean(patients) if patients else None,
            named=named_patients(evaluation),
            roc=roc_chart(labels, scores, threshold) if curves else None,
            pr=pr_chart(labels, scores, threshold) if curves else None,
            froc_at=frocs[0]["at"] if frocs else None,
            ious=any(r.pixel.get("localisation") for r in rows),
            froc=froc_chart(froc) if froc and froc["curve"] else None,
            histogram=score_chart(labels if curves else None, scores if curves else every, threshold)
            if every.size
            else None,
            ranked=by_score[:RANKED],
            calibrated=bool(p_values),
            digests={**evaluation.get("digests", {}), "environment": digest(environment)},
            scale=scale,
            spread=spread,
            slides_most=SLICES,
            groups=groups,
            convergence=convergence_words(converged) if converged else [],
            convergence_chart=convergence_chart(converged) if converged else None,
            losses=[(stage, loss_chart(i, *xy)) for i, (stage, xy) in enumerate(stages.items())],
            printed=evaluation.get("printed") or [],
            config=flat(config),
            environment=flat(environment),
        )
    )
    write_page(Path(path), page)


def digest(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(1)
def templates() -> jinja2.Environment:
    """The pages' templates; what they write is escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": _number, "interval": _interval}
    gradient = ", ".join(f"rgb({r} {g} {b})" for r, g, b in palette()[np.linspace(0, 255, 9).round().astype(int)])
    found.globals |= {"normal": NORMAL, "abnormal": ABNORMAL, "gradient": gradient}
    return found


def write_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        half.write_text(page, encoding="utf-8", errors="backslashreplace")  # ids may hold undecodable bytes
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    from jmae.comparison import MOST, write_comparison  # which is made of this module's parts

    folders, flags = recipe.split(argv)
    given = recipe.arguments(flags, __doc__ or "", ["out", "draws"])
    out = Path(given.get("out", ""))
    if not 1 <= len(folders) <= MOST or out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"name 1 to {MOST} run folders and the page: python -m jmae.report DIR DIR --out=FILE.html")
    if not (draws := given.get("draws", "2000")).isdecimal() or not int(draws):
        raise InputError(f"--draws={draws}: a whole number above 0")
    print(write_comparison(out, [Path(folder) for folder in folders], draws=int(draws)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
