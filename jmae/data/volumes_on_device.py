"""The way of a stored volume to the working grid and back as JAX functions, so that an export has it
(`jmae.data.volumes` is the same in NumPy).

All stored volumes of an export have one grid. So the resampling is a constant matrix along each axis. The crop to a
region differs between volumes. So its place is data, and arrays have room for the largest crop.
"""

from itertools import permutations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped
from ml_collections import ConfigDict

from jmae.data.on_device import HIGHEST, equalise
from jmae.data.volumes import KEPT_VOXELS, WORLD, Grid, spline_weights
from jmae.windows import inside


class Ready(NamedTuple):
    """A volume on its working grid, as the networks see it, at the start of arrays with room for the largest one."""

    array: Float[Array, "*most c"]  # normalised; 0 behind the volume
    region: Bool[Array, "*most"]  # where metrics count; all of the volume where it has no region
    origin: Int[Array, " rank"]  # of the crop
    size: Int[Array, " rank"]
    usable: Bool[Array, ""]  # False for a volume that `jmae.data.volumes.prepare` refuses


def room(grid: Grid, data: ConfigDict) -> tuple[int, ...]:
    """The size of the largest volume on the working grid."""
    if data.crop == "none":
        return grid.size
    assert grid.spacing is not None
    return tuple(round(most / mm) for most, mm in zip(data.crop_most, grid.spacing, strict=True))


def same_grid(affine: Float[Array, "4 4"], grid: Grid, data: ConfigDict) -> Bool[Array, ""]:
    """Whether a volume has the export's spacing and, where `data.axes` turns volumes, its axes and directions.

    Where the export's scan had no affine, the volume has none either: its affine is the identity.
    """
    if grid.own_affine is None:
        return (affine == jnp.eye(4)).all()
    spacing, known = jnp.linalg.norm(affine[:3, :3], axis=0), np.linalg.norm(grid.own_affine[:3, :3], axis=0)
    same = (jnp.abs(spacing / known - 1) * np.array(grid.own_size) / 2 <= KEPT_VOXELS).all()
    if not data.axes:
        return same
    cosines = affine[:3, :3] / spacing
    at = {WORLD[letter][0]: own for letter, own in zip(data.axes, grid.own_axes, strict=True)}
    fit = lambda axes: sum(jnp.abs(cosines[world, own]) for world, own in enumerate(axes))
    same &= fit([at[world] for world in range(3)]) >= jnp.stack([fit(axes) for axes in permutations(range(3))]).max()
    for letter, own, flipped in zip(data.axes, grid.own_axes, grid.flipped, strict=True):
        world, sign = WORLD[letter]
        same &= (cosines[world, own] * sign < 0) == flipped
    return same


def resampled(stored: Float[Array, "*own c"], grid: Grid) -> Float[Array, "*full c"]:
    """`Grid.forward` of order 3 for a grid without a crop."""
    array = grid.oriented(stored)
    for axis in sorted(range(len(grid.size)), key=lambda axis: -grid.step[axis]):
        if grid.step[axis] != 1:
            weights = spline_weights(array.shape[axis], tuple(grid.own(axis, np.arange(grid.full[axis])).tolist()), 3)
            array = jnp.moveaxis(jnp.tensordot(weights, array, (1, axis), precision=HIGHEST), 0, axis)
    return array


def nearest(mask: Bool[Array, "*own"], grid: Grid) -> Bool[Array, "*full"]:
    """`Grid.forward` of order 0 for a grid without a crop."""
    mask = grid.oriented(mask)
    for axis, n in enumerate(grid.full):
        if grid.step[axis] != 1:
            at = np.floor(grid.own(axis, np.arange(n)) + 0.5).astype(int)
            mask = mask.take(np.clip(at, 0, mask.shape[axis] - 1), axis)
    return mask


def box(region: Bool[Array, "*full"], grid: Grid, data: ConfigDict) -> tuple[Int[Array, " rank"], Int[Array, " rank"]]:
    """`jmae.data.volumes.chest_box` without a lesion: (origin, size)."""
    assert grid.spacing is not None
    origin, size = [], []
    for axis, mm in enumerate(grid.spacing):
        marked = region.any([other for other in range(region.ndim) if other != axis])
        low, high = jnp.argmax(marked), len(marked) - jnp.argmax(marked[::-1])
        extent = jnp.clip(high - low, round(data.crop_least[axis] / mm), round(data.crop_most[axis] / mm))
        letter = data.axes[axis] if data.axes else ""
        if letter == "A":
            low = high - extent
        elif letter != "P":
            low -= (extent - (high - low)) // 2
        origin.append(low)
        size.append(extent)
    return jnp.stack(origin).astype(jnp.int32), jnp.stack(size).astype(jnp.int32)


def cut(array: Shaped[Array, "*full"], origin: Int[Array, " rank"], size: tuple[int, ...]) -> Shaped[Array, "*size"]:
    """The box of `size` voxels at `origin`, with 0 outside the array."""
    for axis, n in enumerate(size):
        at = origin[axis] + jnp.arange(n)
        outside = array.shape[axis]  # as a negative index counts from the end
        array = array.take(jnp.where(at < 0, outside, at), axis, mode="fill", fill_value=0)
    return array


def prepared(stored: Float[Array, "*own c"], region: Bool[Array, "*own"], grid: Grid, data: ConfigDict) -> Ready:
    """`jmae.data.volumes.prepare` of stored values. A `region` that marks nothing is none."""
    most, rank = room(grid, data), len(grid.size)
    given = region.any()
    if data.region == "nonzero":
        region, given = jnp.where(given, region, (stored != 0).any(-1)), jnp.bool_(True)
    finite = jnp.isfinite(stored).all()
    array, region = resampled(jnp.where(finite, stored, 0), grid), nearest(region, grid)
    origin, size = jnp.zeros(rank, jnp.int32), jnp.array(grid.size, jnp.int32)
    if data.crop == "region":
        origin, size = box(region, grid, data)
        array, region = cut(array, origin, most), cut(region, origin, most)
    own = inside(most, size)
    region &= own
    usable = finite & (region.any() if "region" in (data.crop, data.normalise) else region.any() | ~given)
    counted = region if data.normalise == "region" else own
    if data.window:
        seen, here = jnp.clip(array, *data.window), own[..., None]
        usable &= jnp.max(seen, where=here, initial=-jnp.inf) > jnp.min(seen, where=here, initial=jnp.inf)
    array, varies = jax.vmap(lambda channel: normalised(channel, own, counted, data), -1, (-1, 0))(array)
    return Ready(array, jnp.where(given, region, own), origin, size, usable & varies.all())


def normalised(
    channel: Float[Array, "*most"], own: Bool[Array, "*most"], counted: Bool[Array, "*most"], data: ConfigDict
) -> tuple[Float[Array, "*most"], Bool[Array, ""]]:
    """(a channel as the networks see it, whether its values differ), for the voxels `own` of a volume, of which
    `counted` give the moments."""
    mean_of = lambda values: jnp.sum(values, where=counted) / jnp.sum(counted)
    mean = mean_of(channel)
    mean += mean_of(channel - mean)  # a sum of many float32 values is rough
    deviation = jnp.sqrt(mean_of((channel - mean) ** 2))
    varies = deviation > 1e-6 * jnp.max(jnp.abs(channel), where=counted, initial=0)
    out = (channel - mean) * (data.std / deviation) + data.mean
    if data.window or data.equalise:
        ends = lambda: (channel.min(where=own, initial=jnp.inf), channel.max(where=own, initial=-jnp.inf))
        low, high = data.window or ends()
        out = (jnp.clip(channel, low, high) - low) / (high - low)
    if data.equalise:
        out = equalise(out[..., None], data.equalise_exact, counted)[..., 0]
    return jnp.where(own, out, 0), varies


def back(found: Float[Array, "*most"], grid: Grid, origin: Int[Array, " rank"], size: Int[Array, " rank"]) -> Array:
    """`Grid.back` of a map of the crop: (*own_size)."""
    for axis in sorted(range(found.ndim), key=lambda axis: -grid.step[axis]):
        n, full = grid.own_size[grid.own_axes[axis]], grid.full[axis]
        along = [n if other == axis else 1 for other in range(found.ndim)]
        at = (np.arange(n) - (n - 1) / 2) / grid.step[axis] + (full - 1) / 2
        below = np.floor(at).astype(np.int32)
        share = (at - below).astype(np.float32).reshape(along)
        two = [jnp.clip(index - origin[axis], 0, size[axis] - 1) for index in (below, below + 1)]
        found = found.take(two[0], axis) * (1 - share) + found.take(two[1], axis) * share
        first = np.ceil(grid.own(axis, np.arange(full + 1) - 0.5)).clip(0, n).astype(np.int32)
        first[0], first[-1] = 0, n  # the image's ends belong to the outermost voxels
        low, high = (jnp.asarray(first)[jnp.clip(end, 0, full)] for end in (origin[axis], origin[axis] + size[axis]))
        covered = (np.arange(n) >= low) & (np.arange(n) < high)
        found = jnp.where(covered.reshape(along), found, 0)
    found = found[tuple(slice(None, None, -1 if flipped else 1) for flipped in grid.flipped)]
    return found.transpose(np.argsort(grid.own_axes).tolist())
