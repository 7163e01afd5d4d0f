"""Whether a case is of the kind that a run was trained on, by its size, channels, grey values and layout.

A score ranks cases of one kind. A blank film, a CT slice in a run of chest X-rays or a thumbnail can score low, and its
p-value then calms for no reason. trained_on.json of a run folder has the range of each trait over the images that the
run was trained on. A case outside a range gets a warning, and no p-value above the alarm rate (`shown_line`).
`jmae.predict` and `jmae.evaluate` share this rule.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.ndimage import gaussian_filter
from scipy.special import stdtrit

from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.transforms import resize, to_unit
from jmae.data.volumes import directions
from jmae.errors import InputError
from jmae.p_values import too_few_normals
from jmae.run_folder import log, write_text
from jmae.sealed import seal, unseal
from jmae.tables import counted

TRAINED_ON = "trained_on.json"
LIKENESS = "likeness to the mean image"
TURNED = "gain by turning"
VALUES = 2**16  # values of an image, evenly spaced, from which the traits of grey values are computed
FACTOR = 2.0  # a size may be so many times smaller or larger than those of the training
CHANCE = 0.01  # that a further image of a kind lies outside a range of grey values or layout, if these were Gaussian
LEAST = 0.01  # least standard deviation of a trait on its Gaussian scale
LEAST_IMAGES = 10  # fewer do not show which one is turned
LEAST_GAIN = 0.15  # by turning; symmetric images gain less, whichever way they lie
SPREADS = 6.0  # median deviations
SIDE = 16  # of the small images whose mean is the layout of the training
DETAIL_SIDES = {2: 64, 3: 32}  # of the small images and volumes whose detail is compared
AXES = "PLS"  # directions in which volumes with a position are compared, in whatever order a file stores them
PLACED = (LIKENESS, TURNED, "roughness")  # traits that depend on the directions
DETAIL = ("fine detail", "middle detail", "coarse detail")
SIZES = ("smallest axis", "largest axis", "ratio of the axes", "millimetres along the largest axis")
"""Traits that are compared by a factor."""
REMEDY = "if such scans are normal, put some of them into the training set"


class Scale(NamedTuple):
    """A scale on which a trait is about Gaussian. Its ends are those of what is possible."""

    of: Callable[[Any], Any]
    back: Callable[[Any], Any]
    ends: tuple[float, float]


SHARE = Scale(lambda x: np.arcsin(np.sqrt(np.clip(x, 0, 1))), lambda y: np.sin(y) ** 2, (0, math.pi / 2))
RATIO = Scale(lambda x: np.log(np.maximum(x, 1e-4)), np.exp, (-10, 10))
COSINE = Scale(lambda x: np.arctanh(np.clip(x, -0.999, 0.999)), np.tanh, (-math.inf, math.inf))
PLAIN = Scale(lambda x: x, lambda y: y, (-2, 2))
SCALES = {"mean": SHARE, "median": SHARE, "share of black": SHARE}
SCALES |= dict.fromkeys(("deviation", "roughness", *DETAIL), RATIO) | {LIKENESS: COSINE, TURNED: PLAIN}
WORDS = {
    "channels": ("fewer channels", "more channels"),
    "smallest axis": ("fewer pixels along the shortest side", "more pixels along the shortest side"),
    "largest axis": ("fewer pixels along the longest side", "more pixels along the longest side"),
    "ratio of the axes": ("sides of more equal length", "longer and narrower"),
    "millimetres along the largest axis": ("covers fewer millimetres", "covers more millimetres"),
    "mean": ("darker on the whole", "brighter on the whole"),
    "deviation": ("less contrast", "more contrast"),
    "median": ("a darker middle grey", "a brighter middle grey"),
    "share of black": ("less black", "more black"),
    "roughness": (
        "grey values change more slowly from pixel to pixel",
        "grey values change faster from pixel to pixel",
    ),
    **{name: (f"less {name}", f"more {name}") for name in DETAIL},
    LIKENESS: ("light and dark lie in other places", "hardly differs from the mean image"),
    TURNED: ("", "would be more like the training images if it were turned or mirrored"),
}
"""What it means that a trait lies below or above its range."""
POSSIBLE = dict.fromkeys(("mean", "median", "share of black"), (0, 1)) | {SIZES[2]: (1, math.inf)}
POSSIBLE |= {LIKENESS: (-1, 1), TURNED: (-2, 2)}
"""The least and the greatest value that a trait can have, where these are not 0 and infinity."""


class Traits(NamedTuple):
    """What is kept of an image."""

    numbers: dict[str, float]  # by trait
    layout: np.ndarray  # float32 (SIDE, SIDE, ...): the image made small, with mean 0 and norm 1
    axes: str = ""  # directions of `layout`; "": those of the file


def traits_of(stored: Image, axes: str = AXES) -> Traits:
    """The traits of an image as stored.

    A volume with a position is looked at in the directions `axes`, so that they don't depend on the order in which a
    file stores it. With "" it stays as it is stored.

    The grey values of an image go from 0 to 1 first. Those of a volume go from its 1st to its 99th percentile, as
    scanners differ in scale. "roughness" is the mean difference of neighbours along the first axis, in deviations.
    `details_of` gives three more traits.
    """
    array, spacing = stored.array, stored.spacing
    axes = axes if array.ndim == 4 and stored.affine is not None else ""
    if axes and stored.affine is not None:
        own, flipped = directions(stored.affine, axes)
        array = np.flip(array.transpose(*own, 3), tuple(axis for axis, flip in enumerate(flipped) if flip))
        spacing = spacing and tuple(spacing[axis] for axis in own)
    size = array.shape[:-1]
    step = max(1, math.ceil((array.size / VALUES) ** (1 / len(size))))
    thin = np.asarray(array[tuple(slice(None, None, step) for _ in size)], np.float32)
    thin = np.where(np.isfinite(thin), thin, 0)
    if len(size) == 2:
        values = to_unit(thin, stored.bits or 0)
    else:
        low, high = np.percentile(thin, (1, 99))
        values = np.clip((thin - low) / ((high - low) or 1), 0, 1)
    deviation = float(values.std()) if np.ptp(values) else 0.0  # rounding gives a constant image a deviation
    numbers = {
        "channels": float(array.shape[-1]),
        "smallest axis": float(min(size)),
        "largest axis": float(max(size)),
        "ratio of the axes": max(size) / min(size),
        "mean": float(values.mean()),
        "deviation": deviation,
        "median": float(np.median(values)),
        "share of black": float((values <= 0.02).mean()),
        "roughness": float(np.abs(np.diff(values, axis=0)).mean() / max(deviation, 1e-6)),
    }
    if len(size) == 3 and spacing:
        numbers[SIZES[-1]] = max(n * mm for n, mm in zip(size, spacing, strict=True))
    grey = values.mean(-1, keepdims=True)
    numbers |= details_of(resize(grey, (DETAIL_SIDES[len(size)],) * len(size))[..., 0])
    small = resize(grey, (SIDE,) * len(size))[..., 0]
    return Traits(numbers, _of_norm_1(small - small.mean()), axes)


def details_of(small: np.ndarray) -> dict[str, float]:
    """How strong fine, middle and coarse detail are in a small image (side, side, ...), each beside the next coarser.

    A detail is the difference of the image after two Gaussian filters, whose widths differ by a factor of 2. Its
    strength is its deviation.
    """
    blurred = [small, *(gaussian_filter(small, width) for width in (1, 2, 4, 8))]
    strength = [max(float((a - b).std()), 1e-5) for a, b in itertools.pairwise(blurred)]
    return {name: fine / coarse for name, (fine, coarse) in zip(DETAIL, itertools.pairwise(strength), strict=True)}


def kind_of(traits: Sequence[Traits]) -> dict[str, Any]:
    """What images have in common: {"images": their number, "ranges": {trait: (least, greatest)}, "layout": their mean,
    of norm 1, "axes": its directions}.

    For the ranges of the traits of `placed`, each image is compared with the mean of the others. Images that are
    `turned` are left out.
    """
    traits = [one for one, out in zip(traits, turned(traits), strict=True) if not out]
    each = [one.numbers | place for one, place in zip(traits, places(traits), strict=True)]
    names = [name for name in each[0] if all(name in one for one in each)]
    ranges = {name: range_of(name, np.array([one[name] for one in each])) for name in names}
    layout = _of_norm_1(np.sum([one.layout for one in traits], 0))
    return {"images": len(each), "ranges": ranges, "layout": layout, "axes": traits[0].axes}


def turned(traits: Sequence[Traits]) -> Bool[np.ndarray, " n"]:
    """Which images would be more like the others if they were turned or mirrored, and stand out by that.

    Their gain by turning is above `LEAST_GAIN`, and above the median gain by `SPREADS` median deviations. With medians,
    several turned images do not hide each other. None is found among fewer than `LEAST_IMAGES` images. All images must
    have as many axes.
    """
    if len(traits) < LEAST_IMAGES:
        return np.zeros(len(traits), bool)
    gains = np.array([place[TURNED] for place in places(traits)])
    middle = np.median(gains)
    return gains > max(LEAST_GAIN, middle + SPREADS * max(LEAST, np.median(np.abs(gains - middle))))


def places(traits: Sequence[Traits]) -> list[dict[str, float]]:
    """`placed` of each image beside the mean of the others."""
    total = np.sum([one.layout for one in traits], 0)
    return [placed(one.layout, _of_norm_1(total - one.layout)) for one in traits]


def turned_rows(rows: Sequence[Row], traits: Mapping[str, Traits]) -> list[Row]:
    """The rows of which `turned` is true, among those whose traits are known by id."""
    known = [row for row in rows if row.id in traits]
    usual, _ = Counter(traits[row.id].layout.ndim for row in known).most_common(1)[0] if known else (0, 0)
    known = [row for row in known if traits[row.id].layout.ndim == usual]
    if not known:
        return []
    return [row for row, one in zip(known, turned([traits[row.id] for row in known]), strict=True) if one]


def turned_text(row: Row) -> str:
    """What to do with one of `turned_rows`."""
    what = "would be more like the other training images if it were turned or mirrored"
    return f"{row.image[0]}: {what}: look at it, and mend it if it lies the wrong way"


def placed(layout: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """Two traits of an image by its layout and the mean one. "likeness to the mean image" is their product. "gain by
    turning" is how much larger the product becomes at best if the image is turned or mirrored. It is below 0 where an
    image lies as the others do, about 0 where these lie in many ways, and above 0 for an image upside down."""
    axes = range(layout.ndim)
    ways = [
        np.flip(layout.transpose(order), flips)
        for order in itertools.permutations(axes)
        for n in range(layout.ndim + 1)
        for flips in itertools.combinations(axes, n)
    ]
    own, *others = ((one * mean).sum() for one in ways)
    return {LIKENESS: min(1.0, float(own)), TURNED: float(max(others) - own)}  # rounding may exceed 1


def range_of(name: str, values: np.ndarray) -> tuple[float, float]:
    """The range of a trait, from its values (n,) in training images.

    Of sizes and channels the range is that of the values. Else it also holds Student's prediction interval for one more
    value, on the trait's `Scale`. `CHANCE` is divided by the number of such traits. So few images give a wide range,
    and one image gives all that is possible.
    """
    low, high = float(values.min()), float(values.max())
    if name not in SCALES:
        return low, high
    scale, n = SCALES[name], len(values)
    on_scale = scale.of(values)
    factor = float(stdtrit(n - 1, 1 - CHANCE / len(SCALES) / 2)) if n > 1 else math.inf
    reach = factor * math.sqrt(1 + 1 / n) * max(LEAST, float(on_scale.std(ddof=1)) if n > 1 else 0)
    ends = scale.back(np.clip(on_scale.mean() + np.array([-reach, reach]), *scale.ends))
    low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    if name == TURNED:
        return -2.0, max(high, LEAST_GAIN)  # and nothing is too upright
    return low, 1.0 if name == LIKENESS else high  # nothing is too alike


def _of_norm_1(layout: np.ndarray) -> np.ndarray:
    return layout / max(float(np.linalg.norm(layout)), 1e-6)


def write_kind(workdir: Path, traits: Sequence[Traits]) -> None:
    """Writes trained_on.json of a run folder; nothing where no image was read from a file."""
    if traits:
        kind = kind_of(traits)
        write_text(workdir / TRAINED_ON, seal(kind | {"layout": kind["layout"].tolist()}))


def read_kind(workdir: Path) -> dict[str, Any] | None:
    """`kind_of` the images that a run was trained on; None where it was trained before there was such a file, or on
    phantoms. Raises InputError where the file is damaged."""
    file = workdir / TRAINED_ON
    try:
        kind = unseal(file.read_bytes(), file, log)
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in kind["ranges"].items()}
        layout = np.array(kind["layout"], np.float32)
        if layout.shape not in ((SIDE,) * 2, (SIDE,) * 3):
            raise ValueError(f"a layout of {layout.shape}")
        axes = str(kind.get("axes", ""))  # an earlier version compared volumes as they were stored
        return {"images": int(kind["images"]), "ranges": ranges, "layout": layout, "axes": axes}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is damaged ({error!r}): delete it; cases then get no warnings") from None


def shown_line(line: Mapping[str, Any], rate: float, normals: int) -> dict[str, Any]:
    """A line of scores.csv, {"p_value", "warning", ...}, as the user sees it: with "alarm" behind "p_value".

    "alarm" is 1 for a p-value up to the alarm rate `rate`, else 0; None without a p-value, or where so few `normals`
    were held out that no p-value can be as low. A warning makes a p-value above the rate None, as it would calm for no
    reason.
    """
    p = line["p_value"]
    if p is not None and p > rate and line["warning"]:
        p = None
    alarm = None if p is None or too_few_normals(normals, rate) else int(p <= rate)
    first = {name: line[name] for name in ("id", "label", "score") if name in line}
    return (
        first
        | {"p_value": p, "alarm": alarm}
        | {name: v for name, v in line.items() if name not in (*first, "p_value")}
    )


def unlike_counts(lines: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many lines of scores.csv have a warning, and how many p-values `table` withholds of them; logs both."""
    warned = [line["label"] for line in lines if line["warning"]]
    withheld = sum(a["p_value"] != b["p_value"] for a, b in zip(lines, table, strict=True))
    if warned:
        log(
            f"warning: {unlike_text(len(warned), len(lines))} the images that the run was trained on; p-values left "
            f"out for this reason: {withheld} (column warning of scores.csv): {remedy(len(warned), len(lines))}"
        )
    return {"n": len(warned), "normal": warned.count(0), "abnormal": warned.count(1), "withheld": withheld}


def unlike_text(n: int, of: int) -> str:
    """ "1 of 20 cases is unlike", or "2 of 20 cases are unlike"."""
    return f"{n} of {counted(of, 'cases')} {'is' if n == 1 else 'are'} unlike"


def remedy(n: int, of: int) -> str:
    """What to do where `n` cases of so many have a warning."""
    if 2 * n >= of:
        return f"is it the right run for {'this case' if n == 1 else 'them'}?"
    return REMEDY


def unlike(traits: Traits | None, kind: Mapping[str, Any] | None) -> str:
    """In what an image is unlike the images of a kind, in words; "" where in nothing, or where one of the two is not
    known."""
    if not traits or not kind:
        return ""
    numbers, layout = dict(traits.numbers), traits.layout
    if numbers["deviation"] == 0:
        return "all its values are equal"
    if traits.axes != kind.get("axes", ""):
        numbers = {name: value for name, value in numbers.items() if name not in PLACED}
    elif layout.shape == kind["layout"].shape:
        numbers |= placed(layout, kind["layout"])
    found = []
    for name, (low, high) in kind["ranges"].items():
        if name in SIZES:
            low, high = low / FACTOR, high * FACTOR
        if name in numbers and not low <= numbers[name] <= high:
            words, (least, greatest) = WORDS[name][numbers[name] > high], POSSIBLE.get(name, (0, math.inf))
            value, low, high = (
                f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in (numbers[name], max(least, low), min(greatest, high))
            )
            usual = low if low == high else f"{low} to {high}"
            found.append(words if name == TURNED else f"{words} ({name} {value}, expected {usual})")
    return "; ".join(found)
