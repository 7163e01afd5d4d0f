"""From error maps to anomaly maps, on the device."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def minimum_filter(image: Float[Array, "b *size c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """The smallest value of a box of `size` voxels around each voxel: `scipy.ndimage.minimum_filter`, mirrored border.

    An even edge has its extra voxel below: 2 covers {s - 1, s}. What a mirrored border adds lies in the box already,
    so that voxels outside count as infinite; so may a caller mark voxels that are not there.
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
    """The mean of the highest `share` of a map's values in a region, at least one value."""
    values = values.ravel() if region is None else values[region]
    k = max(1, round(share * values.size))
    return float(np.partition(values, -k)[-k:].mean(dtype=np.float64))
