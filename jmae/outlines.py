"""From a map to a mask of lesions, at a rate of false alarms that held-out normals promise.

The peak of a map is the highest threshold at which a component of the least size is left. Of n held-out normals the
threshold is the k-th highest peak, k = floor(rate (n + 1)). A normal case of the same kind then has a mask with any
component with probability at most `rate`, by the argument of conformal p-values (`p_values.Calibration`).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmae.lesions import SIZES, components, thirds

Region = NDArray[np.bool_] | None


def least_voxels(least: float, spacing: Sequence[float] | None) -> int:
    """The number of pixels or voxels of the smallest component that counts, at least 1.

    Args:
      least: in mm2 or mm3, or in pixels where the file tells no spacing.
      spacing: mm along each axis.
    """
    return max(1, math.ceil(round(least / (math.prod(spacing) if spacing else 1), 6)))


def peak(values: NDArray[np.floating], least: int, region: Region = None) -> float:
    """The highest value v of a map at which the voxels of at least v have a component of `least` voxels, inside a
    region; -inf where no component is that large at any value."""
    inside = values if region is None else np.where(region, values, -np.inf)
    ordered = np.unique(inside[np.isfinite(inside)])
    if least == 1:
        return float(ordered[-1]) if len(ordered) else -math.inf

    def large(value: float) -> bool:
        labels, n = components(inside >= value)
        return bool(n) and int(np.bincount(labels.ravel())[1:].max()) >= least

    low, high = -1, len(ordered)  # large at ordered[low], not at ordered[high]; neither end is looked at
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if large(ordered[middle]) else (low, middle)
    return float(ordered[low]) if low >= 0 else -math.inf


def outline(values: NDArray[np.floating], threshold: float, least: int, region: Region = None) -> NDArray[np.bool_]:
    """The components of at least `least` voxels above a threshold, inside a region."""
    above = values > threshold
    labels, n = components(above if region is None else above & region)
    keep = np.bincount(labels.ravel(), minlength=n + 1) >= least
    keep[0] = False
    return keep[labels]


class MaskFigures:
    """How well masks of lesions fit the lesions of a split, which is given its cases one by one.

    A lesion is found where a mask covers at least one of its voxels. A component of a mask is false where it covers no
    voxel of a lesion.

    Args:
      threshold: of the maps; None gives no figures.
      least: size of the smallest component, in mm2 or mm3, or in pixels where the file tells no spacing.
    """

    def __init__(self, threshold: float | None, least: float):
        self.threshold, self.least = threshold, least
        self.dice: list[float] = []
        self.everything: list[float] = []  # the Dice of each case with a lesion if every voxel were in its mask
        self.areas: list[NDArray] = []  # of the lesions of each case
        self.found: list[NDArray[np.bool_]] = []  # which of them are found
        self.false = self.images = self.normals = self.alarms = 0
        self.cases = self.masked = 0

    def mask_of(
        self, values: NDArray[np.floating], region: Region = None, spacing: Sequence[float] | None = None
    ) -> Region:
        """The mask of one case, which counts as masked where the mask is not empty; None without a threshold."""
        if self.threshold is None:
            return None
        mask = outline(values, self.threshold, least_voxels(self.least, spacing), region)
        self.cases, self.masked = self.cases + 1, self.masked + bool(mask.any())
        return mask

    def add(
        self, mask: NDArray[np.bool_], lesion: NDArray[np.bool_], region: Region = None, share: float = 1.0
    ) -> None:
        """Takes the mask and the lesions of one labelled case; voxels outside of the region do not count. `share` is
        the number of the map's voxels for one voxel of the grid that is scored."""
        lesion = lesion if region is None else region & lesion
        (own, n), (truth, lesions) = components(mask), components(lesion)
        self.images += 1
        self.areas.append(np.bincount(truth.ravel(), minlength=lesions + 1)[1:] / share)
        self.found.append(np.bincount(truth[mask & lesion], minlength=lesions + 1)[1:] > 0)
        self.false += n - len(np.unique(own[mask & lesion]))
        if lesions:
            size, n_counted = float(lesion.sum()), mask.size if region is None else int(region.sum())
            self.dice.append(2 * float((mask & lesion).sum()) / (float(mask.sum()) + size))
            self.everything.append(2 * size / (n_counted + size))
        else:
            self.normals += 1
            self.alarms += n > 0

    def counts(self) -> dict[str, Any] | None:
        """How many cases have a mask that is not empty; None without a threshold."""
        if self.threshold is None:
            return None
        return {"n": self.masked, "of": self.cases, "threshold": self.threshold}

    def result(self) -> dict[str, Any] | None:
        """The figures of the masks; None without a threshold or a lesion.

        "dice" is the mean of the cases with a lesion, and "dice_of_everything" what it would be if every voxel were in
        the masks. "lesion_recall" is the share of lesions that are found, "false_alarms" the share of cases without a
        lesion that have a mask. "sizes" has the share of lesions found among small, medium and large ones, a third
        each, by area on the grid that is scored. It is empty for fewer than three lesions.
        """
        areas, found = (np.concatenate([np.empty(0), *each]) for each in (self.areas, self.found))
        if not areas.size:
            return None
        third = thirds(areas)
        sizes = [
            {"size": name, "most": float(areas[of].max()), "lesions": int(of.sum()), "recall": float(found[of].mean())}
            for name, of in zip(SIZES, (third == i for i in range(3)), strict=True)
            if of.any()
        ]
        return {
            "threshold": self.threshold,
            "least": self.least,
            "dice": float(np.mean(self.dice)),
            "dice_of_everything": float(np.mean(self.everything)),
            "lesion_recall": float(found.mean()),
            "false_components": self.false / self.images,
            "false_alarms": self.alarms / self.normals if self.normals else None,
            "images": self.images,
            "lesions": areas.size,
            "sizes": sizes if areas.size >= 3 else [],
        }
