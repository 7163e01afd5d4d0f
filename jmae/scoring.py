"""From error maps to anomaly maps and scores, on the device."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage

from jmae.errors import InputError


def minimum_filter(image: Float[Array, "b *size c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """The smallest value in a box of `size` voxels around each voxel: `scipy.ndimage.minimum_filter`, mirrored border.

    A box of an even edge has its extra voxel below: 2 covers {s - 1, s}. A mirrored border only repeats voxels of the
    box. So voxels outside the image are taken as infinite here, with the same result. A caller can mark missing voxels
    as infinite too.
    """
    for axis, edge in enumerate(size, 1):
        low, high, n = edge // 2, edge - 1 - edge // 2, image.shape[axis]
        widths = [(0, 0)] * image.ndim
        widths[axis] = (low, high)
        padded = jnp.pad(image, widths, constant_values=np.inf)
        at = [slice(None)] * image.ndim
        out = image
        for start in range(edge):
            if start != low:
                at[axis] = slice(start, start + n)
                out = jnp.minimum(out, padded[tuple(at)])
        image = out
    return image


def top_mean(values: np.ndarray, region: np.ndarray | None, share: float) -> float:
    """The mean of the highest values of a map inside a region (None: everywhere).

    It takes the share `share` of the values, but at least one.
    """
    values = values.ravel() if region is None else values[region]
    k = max(1, round(share * values.size))
    return float(np.partition(values, -k)[-k:].mean(dtype=np.float64))


def case_score(rule: str, values: np.ndarray, region: np.ndarray | None, *, share: float, above: float) -> float:
    """A case's score from its map inside a region (None: everywhere).

    Args:
        rule: "mean" of the values; "top", the mean of the highest (`top_mean`); or "part", the number of voxels of the
            largest connected part whose values lie above `above`. Voxels of a part share a side.
        share: of the values that "top" averages.
    """
    if rule == "part":
        labels, _ = ndimage.label((values > above) if region is None else (values > above) & region)
        return float(np.bincount(labels.ravel())[1:].max(initial=0))
    return top_mean(values, region, 1.0 if rule == "mean" else share)


def case_score_words(rule: str, *, share: float, above: float = 0.0) -> str:
    """How `case_score` makes a case's score from its map, in words."""
    if rule == "part":
        return f"number of voxels of the largest connected part of the map above {above:g}"
    return "mean of the map" if rule == "mean" else f"mean of the highest {100 * share:.3g} % of the map's values"


def auroc(scores: Float[Array, " n"], labels: Int[Array, " n"] | Bool[Array, " n"]) -> Float[Array, ""]:
    """`metrics.auroc` on the device: the probability that a positive (label 1) has a higher score than a negative (0).

    Ties count half, and other labels do not count. nan where a class is missing or a score is not finite. Pairs are
    counted exactly in 32 bits, so 2^16 or more scores raise InputError.
    """
    if len(scores) >= 2**16:
        raise InputError(f"AUROC of {len(scores)} scores on the device: use fewer than {2**16} images")
    negative, positive = labels == 0, labels == 1
    below, m = jnp.sort(jnp.where(negative, scores, jnp.inf)), jnp.sum(negative)
    halves = sum(jnp.searchsorted(below, scores, side) for side in ("left", "right"))
    value = jnp.sum(jnp.where(positive, halves, 0)) / (2.0 * m * jnp.sum(positive))
    return jnp.where(jnp.isfinite(scores).all(where=negative | positive), value, jnp.nan)
