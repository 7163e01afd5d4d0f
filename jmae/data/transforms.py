"""Preparing images and augmenting them: arrays are `(*size, channels)`, any number of space axes.

The first half runs on the host (NumPy, float32), once an image. The second half runs on the device inside
the jitted step: pure functions of `(image, key)` that `jax.vmap` batches. A box or a coin depends on the key
and the size only, so that one key moves an image and its companion (mask, second sequence) alike.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import skimage.transform
from jaxtyping import Array, Bool, Float, PRNGKeyArray

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")
ATTEMPTS = 10  # torchvision's bound on the draws of a crop box


# ------------------------------------------------------------------------------------------ host


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


def resize_mask(mask: Bool[np.ndarray, "*old"], size: Sequence[int]) -> Bool[np.ndarray, "*size"]:
    """The nearest voxel of `mask` for each voxel of `size`: no new values, any dtype, further axes are kept.

    A structure thinner than the shrinking factor can vanish.
    """
    index = [((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, mask.shape, strict=False)]
    return mask[np.ix_(*index)]


def standardise(
    array: Float[np.ndarray, "*size c"], region: Bool[np.ndarray, "*size"] | None = None
) -> Float[np.ndarray, "*size c"]:
    """Zero mean and unit deviation of each channel over `region` (default: everywhere), applied everywhere.

    The moments are those of finite values; a value that is not finite becomes 0, the mean. A constant
    channel is not divided; an empty region counts as everywhere.
    """
    finite = np.isfinite(array)
    inside = finite & region[..., None] if region is not None and region.any() else finite
    axes = tuple(range(array.ndim - 1))
    count = np.maximum(inside.sum(axes), 1)
    mean = np.where(inside, array, 0).sum(axes, dtype=np.float64) / count
    centred = np.where(finite, array, mean) - mean
    deviation = np.sqrt(np.where(inside, centred**2, 0).sum(axes) / count)
    return (centred / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def central(array, share: float = 0.8):
    """The middle `share` of each axis of `(*size)`, as a view: for scores that leave the border out."""
    margins = [round(n * (1 - share) / 2) for n in array.shape]
    return array[tuple(slice(m, n - m) for m, n in zip(margins, array.shape, strict=True))]


# ---------------------------------------------------------------------------------------- device


def crop_box(
    key: PRNGKeyArray,
    size: tuple[int, ...],
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Draws the box of a random resized crop: `(origin, edges)` in voxels, whole numbers.

    torchvision's RandomResizedCrop for d axes: the box's share of the volume v ~ U(scale); the log aspect
    l_i ~ U(log aspect) of each axis i > 0 to axis 0, l_0 = 0; edge_i = round(n_i v^(1/d) exp(l_i - mean l));
    the origin is uniform over the whole-voxel positions where the box fits. Of 10 such draws the first whose
    edges fit is taken; beyond, the largest centred box whose log aspects are nearest to 0 (the whole image
    when `aspect` contains 1).
    ours: aspect is relative to the image's own shape, not in voxels: the same on square images, and boxes of
    a flat volume stay flat.
    """
    n, d = jnp.asarray(size, jnp.float32), len(size)
    low, high = np.log(aspect)
    u = jax.random.uniform(key, ((ATTEMPTS + 1) * d,)).reshape(-1, d)  # flat: compiles up to ten times faster
    volume = scale[0] + u[:-1, :1] * (scale[1] - scale[0])
    logs = jnp.pad(low + u[:-1, 1:] * (high - low), ((0, 0), (1, 0)))
    edges = jnp.round(n * volume ** (1 / d) * jnp.exp(logs - logs.mean(1, keepdims=True)))
    fits = jnp.all((edges >= 1) & (edges <= n), axis=1)

    nearest = np.pad(np.full(d - 1, np.clip(0.0, low, high)), (1, 0))
    largest = jnp.maximum(jnp.round(n * np.exp(nearest - nearest.max())), 1)
    edges = jnp.where(fits.any(), edges[jnp.argmax(fits)], largest)
    room = n - edges
    origin = jnp.floor(jnp.where(fits.any(), u[-1] * (room + 1), room / 2))
    return origin, edges


def crop_resized(
    image: Float[Array, "*size c"], origin: Float[Array, " d"], edges: Float[Array, " d"]
) -> Float[Array, "*size c"]:
    """The box `(origin, edges)` stretched to the image's own size, bicubic as Pillow's `resize(box=)`.

    The kernel (Keys, a = -1/2) reads beyond the box where the image goes on, as Pillow's does; its overshoot
    is clipped to the range of each channel, as 8-bit images clip theirs to 0 and 255.
    """
    axes = tuple(range(image.ndim - 1))
    stretch = jnp.asarray(image.shape[:-1], jnp.float32) / edges
    out = jax.image.scale_and_translate(image, image.shape, axes, stretch, -origin * stretch, "cubic")
    return jnp.clip(out, image.min(axes), image.max(axes))


def random_resized_crop(
    image: Float[Array, "*size c"],
    key: PRNGKeyArray,
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "*size c"]:
    """A random box (`crop_box`: share of the volume ~ U(scale), log-uniform aspect) of the image, stretched
    to the image's own size (`crop_resized`)."""
    return crop_resized(image, *crop_box(key, image.shape[:-1], scale, aspect))


def random_flip(image: Float[Array, "*size c"], key: PRNGKeyArray, axes: Sequence[int]) -> Float[Array, "*size c"]:
    """Mirrors each of the space `axes` (0 is the first) with probability 1/2, independently."""
    for axis, coin in zip(axes, jax.random.bernoulli(key, 0.5, (len(axes),)), strict=True):
        image = jnp.where(coin, jnp.flip(image, axis), image)
    return image
