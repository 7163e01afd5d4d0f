"""Augmentation of images on the device, inside the jitted step.

Arrays are `(*size, channels)`, with any number of space axes. The augmentations are pure functions of
`(image, key)` that `jax.vmap` batches. A random box or coin depends on the key and the size only, so that one key moves
an image and its companion (mask, second sequence) alike.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

ATTEMPTS = 10  # torchvision's bound on the draws of a crop box


def moments_of(image: Float[Array, "b *size c"], data: ConfigDict) -> tuple[Array, Array]:
    """Mean and deviation that images are standardised by: the recipe's `data.mean` and `data.std`, or with
    `data.normalise="image"` each image's own (`ours:` where exposure differs between images), at least 1e-3."""
    if data.normalise == "fixed":
        mean, std = jnp.asarray(data.mean, jnp.float32), jnp.asarray(data.std, jnp.float32)
        per_channel = lambda value: value.reshape(*[1] * (image.ndim - 1), -1) if value.ndim else value
        return per_channel(mean), per_channel(std)
    axes = tuple(range(1, image.ndim - 1))
    return jnp.mean(image, axes, keepdims=True), jnp.maximum(jnp.std(image, axes, keepdims=True), 1e-3)


def crop_box(
    key: PRNGKeyArray,
    size: tuple[int, ...],
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Draws the box of a random resized crop: `(origin, edges)` in voxels, whole numbers.

    torchvision's RandomResizedCrop for d axes:
      - v ~ U(scale) is the box's share of the volume;
      - l_i ~ U(log aspect) is the log aspect of each axis i > 0 to axis 0, and l_0 = 0;
      - edge_i = round(n_i v^(1/d) exp(l_i - mean l));
      - the origin is uniform over the whole-voxel positions where the box fits.

    Of 10 such draws the first whose edges fit is taken. If none fits, the box is the largest centred one whose log
    aspects are nearest to 0; it is the whole image when `aspect` contains 1.
    ours: aspect is relative to the image's own shape, not in voxels. It is the same on square images, and boxes of
    a flat volume stay flat.
    """
    n, d = jnp.asarray(size, jnp.float32), len(size)
    low, high = np.log(aspect)
    u = jax.random.uniform(key, ((ATTEMPTS + 1) * d,)).reshape(-1, d)  # flat: compiles up to ten times faster
    volume = scale[0] + u[:-1, :1] * (scale[1] - scale[0])
    logs = jnp.pad(low + u[:-1, 1:] * (high - low), ((0, 0), (1, 0)))
    edges = jnp.round(n[None] * volume ** (1 / d) * jnp.exp(logs - logs.mean(1, keepdims=True)))
    fits = jnp.all((edges >= 1) & (edges <= n[None]), axis=1)

    nearest = np.pad(np.full(d - 1, np.clip(0.0, low, high)), (1, 0))
    largest = jnp.maximum(jnp.round(n * np.exp(nearest - nearest.max())), 1)
    edges = jnp.where(fits.any(), edges[jnp.argmax(fits)], largest)
    room = n - edges
    origin = jnp.floor(jnp.where(fits.any(), u[-1] * (room + 1), room / 2))
    return origin, edges


def crop_resized(
    image: Float[Array, "*size c"],
    origin: Float[Array, " d"],
    edges: Float[Array, " d"],
    to: tuple[int, ...] | None = None,
) -> Float[Array, "*new c"]:
    """The box `(origin, edges)` resized to the size `to`, or to the image's own, bicubic as Pillow's `resize(box=)`.

    The kernel (Keys, a = -1/2) reads beyond the box where the image goes on, as Pillow's does. Its overshoot is
    clipped to the range of each channel; 8-bit images clip theirs to 0 and 255. On an NVIDIA GPU the products have a
    mantissa of ten bits (TF32): 8-bit grey values keep all digits, values of 12 or 16 bits lose their last ones.
    """
    axes = tuple(range(image.ndim - 1))
    to = to or image.shape[:-1]
    stretch = jnp.asarray(to, jnp.float32) / edges
    out = jax.image.scale_and_translate(
        image, (*to, image.shape[-1]), axes, stretch, -origin * stretch, "cubic", precision=jax.lax.Precision.HIGH
    )
    return jnp.clip(out, image.min(axes, keepdims=True), image.max(axes, keepdims=True))


def random_resized_crop(
    image: Float[Array, "*size c"],
    key: PRNGKeyArray,
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    to: tuple[int, ...] | None = None,
) -> Float[Array, "*new c"]:
    """A random box (`crop_box`: share of the volume ~ U(scale), log-uniform aspect) of the image, resized to the size
    `to`, or to the image's own (`crop_resized`)."""
    return crop_resized(image, *crop_box(key, image.shape[:-1], scale, aspect), to)


def random_flip(image: Float[Array, "*size c"], key: PRNGKeyArray, axes: Sequence[int]) -> Float[Array, "*size c"]:
    """Mirrors each of the space `axes` (0 is the first) with probability 1/2, independently."""
    for axis, coin in zip(axes, jax.random.bernoulli(key, 0.5, (len(axes),)), strict=True):
        image = jnp.where(coin, jnp.flip(image, axis), image)
    return image


def random_warp(
    image: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    offset: float = 0.0,
    degrees: float = 0.0,
    elastic: float = 0.0,
    grid: int = 3,
    p: float = 0.5,
) -> Float[Array, "*size c"]:
    """Rotation, a crop stretched back and an elastic deformation, in this order, each with probability `p`.

    The augmentations of P-PII's Table 2 (Müller et al. 2023) as PHiSeg's code has them (Baumgartner et al. 2019), in
    shares of the image's own edges n, so that they mean the same at any size. A strength of 0 leaves its step out; with
    all at 0 the result is exactly the image.
    - degrees: the angle ~ U(-degrees, degrees), about the centre, in the plane of the first two axes (a volume is
      turned about its third), in voxels of equal edges.
    - offset: a box of edges s n, s ~ U(1 - offset, 1) for all axes alike, at a uniform position; PHiSeg's 30 of 128
      pixels is 0.234.
    - elastic: displacements ~ N(0, elastic n) on a grid of `grid` points an axis, cubic between them.

    ours: the three are one map of coordinates and one linear interpolation, which blurs once, not three times; beyond
    the border the nearest voxel counts (PHiSeg: 0 after a rotation, mirrored after a deformation); each has a coin of
    its own (PHiSeg: one an image for all); a box need not lie on whole voxels.
    """
    if not (offset or degrees or elastic):
        return image
    size, d = image.shape[:-1], image.ndim - 1
    n = np.asarray(size, np.float32).reshape(*[1] * d, d)
    once, knots = jax.random.split(key)
    u = jax.random.uniform(once, (5 + d,))
    on = u[:3] < p
    x = jnp.stack(jnp.meshgrid(*(jnp.arange(edge, dtype=jnp.float32) for edge in size), indexing="ij"), -1)
    if elastic:
        coarse = jax.random.normal(knots, (grid**d * d,)).reshape(*(grid,) * d, d)
        x += on[0] * elastic * n * jax.image.resize(coarse, x.shape, "cubic")
    if offset:
        share = 1 - on[1] * offset * u[3]
        x = (x + 0.5) * share + u[5:].reshape(n.shape) * (1 - share) * n - 0.5
    if degrees:
        angle = on[2] * np.deg2rad(degrees) * (2 * u[4] - 1)
        middle = (n[..., :2] - 1) / 2
        a, b = jnp.moveaxis(x[..., :2] - middle, -1, 0)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        x = x.at[..., :2].set(jnp.stack([cos * a - sin * b, sin * a + cos * b], -1) + middle)
    places = list(jnp.moveaxis(x, -1, 0))
    return jax.vmap(lambda channel: map_coordinates(channel, places, 1, "nearest"), -1, -1)(image)
