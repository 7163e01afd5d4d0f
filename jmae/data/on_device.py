"""The preparation of a stored image as JAX functions of any size, so that an export has it
(`jmae.data.preparation.prepared_image` is the same in NumPy).

A resize is a matrix along each axis: (new, old). The lengths may be symbols (`jax.export.symbolic_shape`). Positions
are computed in whole numbers, as float32 has too few digits for them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

HIGHEST = jax.lax.Precision.HIGHEST
LEVELS = 255 * 1024  # of exact equalisation; each of the 256 levels is one of them


def smoothing(old: int, new: int) -> Float[Array, "old old"]:
    """The Gaussian against aliasing, of (old / new - 1) / 2 voxels, cut at 4 deviations, over a mirrored border."""
    sigma = jnp.maximum(jnp.float32(old - new) / jnp.float32(2 * new), 0)
    radius = jnp.floor(4 * sigma + 0.5)
    i, j = jnp.arange(old)[:, None], jnp.arange(old)[None]

    def at(distance: Array) -> Array:
        value = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-6)) ** 2)
        return jnp.where(jnp.abs(distance) <= radius, value, 0)

    weights = at(j - i) + jnp.where(j > 0, at(i + j), 0) + jnp.where(j < old - 1, at(2 * (old - 1) - i - j), 0)
    return weights / jnp.sum(weights, 1, keepdims=True)


def interpolation(old: int, new: int) -> Float[Array, "new old"]:
    """Linear interpolation between the middles of voxels, over a mirrored border."""
    place = (2 * jnp.arange(new) + 1) * old - new  # in units of 1 / (2 new) voxels
    low = jnp.floor_divide(place, 2 * new)
    share = (place - low * 2 * new).astype(jnp.float32) / jnp.float32(2 * new)
    mirrored = lambda k: jnp.maximum((old - 1) - jnp.abs((old - 1) - jnp.abs(k)), 0)  # an axis of one voxel has only 0
    at = lambda k: (mirrored(k)[:, None] == jnp.arange(old)[None]).astype(jnp.float32)
    return (1 - share)[:, None] * at(low) + share[:, None] * at(low + 1)


def areas(old: int, new: int) -> Float[Array, "new old"]:
    """The share of each new voxel that each old voxel covers."""
    o, j = jnp.arange(new)[:, None], jnp.arange(old)[None]
    both = jnp.minimum((o + 1) * old, (j + 1) * new) - jnp.maximum(o * old, j * new)
    return jnp.maximum(both, 0).astype(jnp.float32) / jnp.float32(old)


def along_axes(image: Float[Array, "h w c"], rows: Float[Array, "a h"], columns: Float[Array, "b w"]) -> Array:
    """The matrices' products with an image: (a, b, c)."""
    return jnp.einsum("ah,hwc,bw->abc", rows, image, columns, precision=HIGHEST)


def resize(image: Float[Array, "h w c"], size: tuple[int, int]) -> Float[Array, "a b c"]:
    """`jmae.data.transforms.resize`: linear interpolation, after a Gaussian on each axis that shrinks."""
    one = lambda old, new: jnp.matmul(interpolation(old, new), smoothing(old, new), precision=HIGHEST)
    return along_axes(image, *map(one, image.shape[:2], size))


def area_resize(image: Float[Array, "h w c"], size: tuple[int, int]) -> Float[Array, "a b c"]:
    """`jmae.data.transforms.area_resize`: means over areas on an axis that shrinks, else linear interpolation."""
    one = lambda old, new: jnp.where(jnp.int32(new) < jnp.int32(old), areas(old, new), interpolation(old, new))
    return along_axes(image, *map(one, image.shape[:2], size))


def to_unit(image: Float[Array, "h w c"], bits: Int[Array, ""]) -> Float[Array, "h w c"]:
    """`jmae.data.transforms.to_unit` of finite values."""
    low, high = jnp.where(bits == 8, 0.0, image.min()), jnp.where(bits == 8, 255.0, image.max())
    return (image - low) / jnp.where(high > low, high - low, 1)


def equalise(
    image: Float[Array, "*size c"], exact: bool, inside: Bool[Array, "*size"] | None = None
) -> Float[Array, "*size c"]:
    """`jmae.data.transforms.equalise` over all pixels or those `inside`, one at least. `exact` has `LEVELS`, as float32
    splits the ties of an even area."""
    levels = jnp.round((LEVELS if exact else 255) * jnp.clip(image, 0, 1))

    def one(values: Array) -> Array:
        counted = values if inside is None else jnp.where(inside, values, jnp.inf)  # infinite ones lie above each value
        ordered, n = jnp.sort(counted.reshape(-1)), counted.size if inside is None else jnp.sum(inside)
        upto = lambda v: jnp.searchsorted(ordered, v, side="right").astype(jnp.float32)
        least = upto(ordered[0])
        share = jnp.maximum(upto(values) - least, 0) / jnp.maximum(n - least, 1)
        return share if exact else jnp.round(255 * share) / 255

    return jax.vmap(one, -1, -1)(levels)


def usable(stored: Float[Array, "h w c"], data: ConfigDict) -> Bool[Array, ""]:
    """Whether all values are finite and those of a channel differ, within the window where there is one."""
    seen = jnp.clip(stored, *data.window) if data.window else stored
    return jnp.isfinite(stored).all() & (seen.max((0, 1)) > seen.min((0, 1))).any()


def prepared(stored: Float[Array, "h w c"], bits: Int[Array, ""], data: ConfigDict) -> Float[Array, "a b c"]:
    """`jmae.data.preparation.prepared_image` of stored values that are `usable`. `bits` is 8 where the
    values fill unsigned 8 bits: then 0 and 255 are black and white. Else the least and the greatest value are."""
    size = tuple(data.size)
    least = stored.min()  # its area stays even in float32
    image = least + area_resize(stored - least, size) if data.equalise else stored
    if data.window:
        low, high = data.window
        unit = (jnp.clip(image, low, high) - low) / (high - low)
    else:
        unit = to_unit(image, bits)
    return equalise(unit, data.equalise_exact) if data.equalise else resize(unit, size)
