"""Whether a case is of the kind that a run was trained on, by its size, channels, grey values and layout.

A score ranks cases of one kind. A blank film, a CT slice in a run of chest X-rays or a thumbnail can score low, and its
p-value then calms for no reason. trained_on.json of a run folder has the range of each trait over the images that the
run was trained on. A case outside a range gets a warning, and no p-value above the alarm rate (`without_calm_p_value`).
`jmae.predict` and `jmae.evaluate` share this rule.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmae.data.files import Image
from jmae.data.transforms import resize, to_unit
from jmae.errors import InputError
from jmae.run_folder import log, write_text
from jmae.sealed import seal, unseal

TRAINED_ON = "trained_on.json"
LIKENESS = "likeness to the mean image"
VALUES = 2**16  # values of an image, evenly spaced, from which the traits of grey values are computed
FACTOR = 2.0  # a size may be so many times smaller or larger than those of the training
WIDENING = 0.25  # share of a range of grey values that is added on either side; more for few training images
FEW = 20  # training images below which the range is widened more
LEAST = 0.05  # least width of a range of grey values
SIDE = 16  # of the small images whose mean is the layout of the training
SIZES = ("smallest axis", "largest axis", "ratio of the axes", "millimetres along the largest axis")
"""Traits that are compared by a factor; all others but the channels are compared by a distance."""


class Traits(NamedTuple):
    """What is kept of an image."""

    numbers: dict[str, float]  # by trait
    layout: np.ndarray  # float32 (SIDE, SIDE, ...): the image made small, with mean 0 and norm 1


def traits_of(stored: Image) -> Traits:
    """The traits of an image as stored.

    The grey values of an image go from 0 to 1 first. Those of a volume go from its 1st to its 99th percentile, as
    scanners differ in scale. "roughness" is the mean difference of neighbours along the first axis, in deviations.
    """
    array, size = stored.array, stored.size
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
    if len(size) == 3 and stored.spacing:
        numbers[SIZES[-1]] = max(n * mm for n, mm in zip(size, stored.spacing, strict=True))
    small = resize(values.mean(-1, keepdims=True), (SIDE,) * len(size))[..., 0]
    small = small - small.mean()
    return Traits(numbers, small / max(float(np.linalg.norm(small)), 1e-6))


def kind_of(traits: Sequence[Traits]) -> dict[str, Any]:
    """What images have in common: {"images": their number, "ranges": {trait: (least, greatest)}, "layout": their mean,
    of norm 1}. The trait "likeness to the mean image" is the product of an image's layout and that mean."""
    layout = np.mean([one.layout for one in traits], 0)
    layout /= max(float(np.linalg.norm(layout)), 1e-6)
    each = [one.numbers | {LIKENESS: float((one.layout * layout).sum())} for one in traits]
    names = [name for name in each[0] if all(name in one for one in each)]
    ranges = {}
    for name in names:
        low, high = min(one[name] for one in each), max(one[name] for one in each)
        widened = name not in (*SIZES, "channels")
        more = WIDENING * max(1, FEW / len(each)) * max(LEAST, high - low) if widened else 0.0
        ranges[name] = (low - more, high + more)
    return {"images": len(each), "ranges": ranges, "layout": layout}


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
        return {"images": int(kind["images"]), "ranges": ranges, "layout": layout}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is damaged ({error!r}): delete it; cases then get no warnings") from None


def without_calm_p_value(line: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """A line of scores.csv, {"p_value", "warning", ...}. Where it has a warning, a p-value above the alarm rate `rate`
    becomes None, as it would calm for no reason."""
    calm = line["warning"] and line["p_value"] is not None and line["p_value"] > rate
    return {**line, "p_value": None} if calm else dict(line)


def unlike(traits: Traits | None, kind: Mapping[str, Any] | None) -> str:
    """In what an image is unlike the images of a kind, in words; "" where in nothing, or where one of the two is not
    known."""
    if not traits or not kind:
        return ""
    numbers, layout = dict(traits.numbers), traits.layout
    if numbers["deviation"] == 0:
        return "all its values are equal"
    if layout.shape == kind["layout"].shape:
        numbers[LIKENESS] = float((layout * kind["layout"]).sum())
    found = []
    for name, (low, high) in kind["ranges"].items():
        factor = FACTOR if name in SIZES else 1.0
        if name in numbers and not low / factor <= numbers[name] <= high * factor:
            found.append(f"{name} {numbers[name]:.3g} (training images: {low:.3g} to {high:.3g})")
    return "; ".join(found)
