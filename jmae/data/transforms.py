"""Preparation of images on the host (NumPy, float32), once an image. Arrays are `(*size, channels)`, with any number of
space axes."""

from collections.abc import Sequence

import numpy as np
import skimage.transform
from jaxtyping import Bool, Float

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def to_unit(array: np.ndarray, bits: int) -> Float[np.ndarray, "..."]:
    """Values into [0, 1]: 8 bits are divided by 255; any other depth is stretched from minimum to maximum.

    Minimum and maximum are those of the image's finite values, all channels together. A constant image
    becomes zeros. NaN and -inf become 0, +inf becomes 1.
    """
    array = np.asarray(array, np.float64)  # the span of float32 values may exceed float32
    low, high = 0.0, 255.0
    if bits != 8:
        finite = array[np.isfinite(array)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    unit = (array - low) / ((high - low) or 1.0)
    return np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0).astype(np.float32)


def grey(array: Float[np.ndarray, "*size c"]) -> Float[np.ndarray, "*size 1"]:
    """The luma of red, green, blue (as Pillow's "L", not rounded); an image of one channel stays as it is."""
    if array.shape[-1] == 1:
        return array
    if array.shape[-1] != 3:
        raise ValueError(f"no grey value of {array.shape[-1]} channels: give 1, or 3 (red, green, blue)")
    return (array @ np.asarray(LUMA, np.float32))[..., None]


def resize(array: Float[np.ndarray, "*old c"], size: Sequence[int]) -> Float[np.ndarray, "*size c"]:
    """Linear interpolation to `size`, after a Gaussian against aliasing on each axis that shrinks.

    Its deviation is (old / new - 1) / 2 voxels, scikit-image's rule; beyond the border the image is mirrored.
    The same size returns the same values exactly. Values must be finite: one NaN would spread.
    """
    array = np.asarray(array, np.float32)
    if array.shape[:-1] == tuple(size):
        return array
    return skimage.transform.resize(array, (*size, array.shape[-1]), order=1, anti_aliasing=True)


def area_resize(array: Float[np.ndarray, "*old c"], size: Sequence[int]) -> Float[np.ndarray, "*size c"]:
    """Resizes to `size`: by the mean over each new voxel's area on an axis that shrinks, by linear interpolation
    (`resize`) on an axis that grows.

    A voxel that two new voxels share counts by its overlap with each, so that the mean of the image stays. The same
    size returns the same values exactly.
    """
    for axis, (new, old) in enumerate(zip(size, array.shape[:-1], strict=True)):
        if new < old:
            edges = np.linspace(0, old, new + 1)
            low, high = edges[:-1, None], edges[1:, None]
            cell = np.arange(old)
            overlap = np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, None) / (high - low)
            array = np.moveaxis(np.tensordot(overlap, array, (1, axis)), 0, axis)
    return resize(array, size)


def equalise(
    array: Float[np.ndarray, "*size c"], inside: Bool[np.ndarray, "*size"] | None = None, *, exact: bool = False
) -> Float[np.ndarray, "*size c"]:
    """Histogram equalisation of values in [0, 1] (others are clipped), channel by channel, in 8 bits.

    v = round(255 x) becomes round(255 (cdf(v) - cdf_min) / (n - cdf_min)) / 255 with the cumulative histogram cdf of
    the n pixels `inside` and its least value above 0, cdf_min. Without `inside`, or if it is empty, all pixels count.
    This is OpenCV's equalizeHist, by which MIMIC-CXR-JPG was made (Johnson et al. 2019). The map is applied everywhere:
    pixels darker than all inside become 0. A channel of one value inside becomes 0.

    With `exact` (ours) each value has its own cdf: 256 levels leave about six to the soft tissue of a CT slice.
    """
    if exact:
        return _ranked(np.clip(array, 0, 1), inside)
    levels = np.round(255 * np.clip(array, 0, 1)).astype(np.uint8)
    counted = levels[inside] if inside is not None and inside.any() else levels.reshape(-1, array.shape[-1])
    out = np.empty(array.shape, np.float32)
    for c in range(array.shape[-1]):
        cdf = np.bincount(counted[:, c], minlength=256).cumsum()
        least = cdf[counted[:, c].min()]
        table = np.round(255 * np.maximum(cdf - least, 0) / max(cdf[-1] - least, 1)) / 255
        out[..., c] = table[levels[..., c]]
    return out


def _ranked(
    array: Float[np.ndarray, "*size c"], inside: Bool[np.ndarray, "*size"] | None
) -> Float[np.ndarray, "*size c"]:
    """(cdf(v) - cdf_min) / (n - cdf_min) of exact values; 0 below all that count."""
    counted = np.sort(array[inside] if inside is not None and inside.any() else array.reshape(-1, array.shape[-1]), 0)
    out = np.empty(array.shape, np.float32)
    for c in range(array.shape[-1]):
        least = np.searchsorted(counted[:, c], counted[0, c], "right")
        cdf = np.searchsorted(counted[:, c], array[..., c], "right")
        out[..., c] = np.maximum(cdf - least, 0) / max(len(counted) - least, 1)
    return out


def resize_mask(mask: Bool[np.ndarray, "*old"], size: Sequence[int]) -> Bool[np.ndarray, "*size"]:
    """The nearest voxel of `mask` for each voxel of `size`: no new values, any dtype, further axes are kept.

    A structure thinner than the shrinking factor can vanish.
    """
    index = [((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, mask.shape, strict=False)]
    return mask[np.ix_(*index)]


def central(array, share: float = 0.8):
    """The middle `share` of each axis of `(*size)`, as a view: for scores that leave the border out."""
    margins = [round(n * (1 - share) / 2) for n in array.shape]
    return array[tuple(slice(m, n - m) for m, n in zip(margins, array.shape, strict=True))]
