"""Overlapping windows over volumes: their places, and one compiled pass of a network over all of them.

The host computes places, in whole voxels. The pass on the device gets the true size of a volume as data, so that all
volumes of one bucket share a program. A bucket is a size to which volumes are padded.
"""

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jmae.errors import InputError


class Tiling(NamedTuple):
    """The windows of one volume, padded to a bucket."""

    pad: tuple[tuple[int, int], ...]  # zeros below and above each axis, up to the bucket
    size: tuple[int, ...]  # size of the volume, padded so that a window fits, without the padding up to the bucket
    origins: Int[np.ndarray, "w rank"]  # first voxel of every window in the padded volume; by piece, then in C order
    coverage: tuple[Float[np.ndarray, " n"], ...]  # number of windows over each index of an axis


def ends(size: int, window: int, stride: int) -> list[int]:
    """The ends of the windows along one axis: window, window + stride, ... below `size`, and `size` itself.

    The last window thus ends with the volume, as in the released code of MAEMI.
    """
    return [*range(window, size, stride), size]


def room(
    size: tuple[int, ...], window: tuple[int, ...], side: int | None = None, midline: int | None = None
) -> tuple[list[tuple[int, int]], int | None]:
    """(zeros below and above each axis that make a window fit, the midline in the padded volume).

    Both ends get half of the missing voxels. Along the axis `side` each of the two pieces grows outwards.
    """
    pad = []
    for axis, (n, w) in enumerate(zip(size, window, strict=True)):
        if axis == side and midline is not None:
            pad.append((max(0, w - midline), max(0, w - (n - midline))))
        else:
            missing = max(0, w - n)
            pad.append((missing // 2, missing - missing // 2))
    return pad, None if side is None or midline is None else midline + pad[side][0]


def released_room(
    size: tuple[int, ...], window: tuple[int, ...], side: int | None = None, midline: int | None = None
) -> tuple[list[tuple[int, int]], int | None]:
    """`room` as the released code of MAEMI has it, which knows one midline, the middle of the volume.

    It pads an axis to one voxel more than a window, and the axis `side` to one more than two windows; an odd voxel goes
    below. Then it halves the padded volume. The last voxel of an odd number belongs to neither half.

    Raises InputError for a midline that is not the middle.
    """
    if side is not None and midline not in (None, size[side] // 2):
        raise InputError(f"compat.averaging halves a volume: its midline is {size[side] // 2}, not {midline}")
    halved = side is not None and midline is not None
    least = [w * (1 + (halved and axis == side)) + 1 for axis, w in enumerate(window)]
    missing = [max(0, m - n) for m, n in zip(least, size, strict=True)]
    pad = [(m - m // 2, m // 2) for m in missing]
    return pad, (size[side] + missing[side]) // 2 if side is not None and halved else None


def tile(
    size: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    side: int | None = None,
    midline: int | None = None,
    bucket: tuple[int, ...] | None = None,
    released: bool = False,
) -> Tiling:
    """The windows that cover a volume of `size`. No window crosses `midline`, an index along the axis `side`.

    The size of the padded volume is a multiple of `bucket` (default: half a window), so that few shapes are compiled.

    Args:
        released: whether the volume is padded and halved as in the released code of MAEMI (`released_room`).
            ours: otherwise it is padded to a window, as one voxel more only adds a window over the padding.
    """
    pad, middle = (released_room if released else room)(size, window, side, midline)
    full = tuple(n + sum(p) for n, p in zip(size, pad, strict=True))
    bucket = bucket or tuple(max(1, w // 2) for w in window)
    rest = [-n % b for n, b in zip(full, bucket, strict=True)]
    starts, coverage = [], []
    for axis, (n, w, s) in enumerate(zip(full, window, stride, strict=True)):
        pieces = [(0, n)]
        if axis == side and middle is not None:
            pieces = [(0, middle), (middle, 2 * middle if released else n)]
        at = [[low + end - w for end in ends(high - low, w, s)] for low, high in pieces]
        count = np.zeros(n + rest[axis], np.float32)
        for start in (start for piece in at for start in piece):
            count[start : start + w] += 1
        starts.append(at)
        coverage.append(count)
    origins = []
    for piece in range(max(map(len, starts))):
        axes = [at[piece if len(at) > 1 else 0] for at in starts]
        origins.append(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(size)))
    return Tiling(
        tuple((low, high + more) for (low, high), more in zip(pad, rest, strict=True)),
        full,
        np.concatenate(origins).astype(np.int32),
        tuple(coverage),
    )


def places(
    size: Int[Array, " rank"], most: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[Int[Array, " rank"], Int[Array, "w rank"], Int[Array, ""], tuple[Float[Array, " _"], ...]]:
    """`tile` on the device, for a volume of one piece whose size is data and at most `most`.

    Returns (zeros below each axis, origins, how many of them count, coverage). The padded volume has the size
    max(most, window).
    """
    full = jnp.maximum(size, np.array(window))
    count = -(-(full - np.array(window)) // np.array(stride)) + 1
    most = tuple(max(m, w) for m, w in zip(most, window, strict=True))
    ways = [-(-(m - w) // s) + 1 for m, w, s in zip(most, window, stride, strict=True)]
    rank, coverage = len(window), []
    for axis in range(rank):
        start = jnp.minimum(jnp.arange(ways[axis]) * stride[axis], full[axis] - window[axis])
        behind = jnp.arange(most[axis])[None] - start[:, None]
        over = (behind >= 0) & (behind < window[axis])
        coverage.append(jnp.sum(over, 0, where=(jnp.arange(ways[axis]) < count[axis])[:, None]).astype(jnp.float32))
    numbers = jnp.unravel_index(jnp.arange(prod(ways)), tuple(count))
    at = [jnp.minimum(k * s, n - w) for k, s, n, w in zip(numbers, stride, full, window, strict=True)]
    return (full - size) // 2, jnp.stack(at, -1).astype(jnp.int32), jnp.prod(count), tuple(coverage)


def cut_windows(volume: Float[Array, "*size c"], origins: Int[Array, "b rank"], window: tuple[int, ...]) -> Array:
    """The windows (b, *window, c) of a volume at `origins`."""
    one = lambda origin: jax.lax.dynamic_slice(volume, (*origin, 0), (*window, volume.shape[-1]))
    return jax.vmap(one)(origins)


def average(
    score: Callable[[Array, Key[Array, " b"], Int[Array, " b"]], tuple[Array, Array]],
    volume: Float[Array, "*size c"],
    origins: Int[Array, "m rank"],
    number: Int[Array, ""],
    coverage: tuple[Float[Array, " _"], ...],
    key: Key[Array, ""],
    *,
    window: tuple[int, ...],
    repeats: int | Int[Array, ""],
    batch: int,
    groups: int = 1,
    weighted: bool = False,
    released: int = 0,
    place: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "*size k"]:
    """The mean of `score` over the windows that cover a voxel, and over `repeats` sweeps.

    All sweeps run as one stream of batches of windows, sweep by sweep. `groups` sweeps are a round. Each window of a
    round has its own key, made of `key`, the round's number and the window's number, and the sweeps of the round are
    its groups 0, 1, ... Windows that do not count fill the last batch.

    Args:
        score: (windows (b, *window, c), their keys, their groups) -> (values (b, *window, k), weights
            (b, *window, 1)).
        origins: first voxels of the windows; only the first `number` are used.
        coverage: number of windows over each index of an axis (`Tiling`); voxels without a window give 0.
        batch: number of windows in a batch.
        weighted: whether the mean is weighted; voxels without weight give 0.
        released: number of the first values that are averaged as in the released code of MAEMI. Its counters start at
            1. So it divides each sweep's sum by c + 1, where c windows cover the voxel, and the sum over the sweeps
            again by 1 + repeats * (c + 1).
        place: function that distributes windows over the devices.
    """
    cut = jax.ShapeDtypeStruct((batch, *window, volume.shape[-1]), volume.dtype)
    shapes = jax.eval_shape(score, cut, _keys(batch), jax.ShapeDtypeStruct((batch,), jnp.int32))
    k = shapes[0].shape[-1]
    total = number * repeats

    def add(sums: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        values, origin = one
        at = (*origin, 0)
        before = jax.lax.dynamic_slice(sums, at, values.shape)
        return jax.lax.dynamic_update_slice(sums, before + values, at), None

    def step(i: Int[Array, ""], sums: Array) -> Array:
        numbers = i * batch + jnp.arange(batch)
        sweep, window_number = jnp.divmod(numbers, number)
        turn, group = jnp.divmod(sweep, groups)
        keys = jax.vmap(lambda r, w: jax.random.fold_in(jax.random.fold_in(key, r), w))(turn, window_number)
        at = origins[window_number]
        values, weights = score(place(cut_windows(volume, at, window)), keys, group)
        both = jnp.concatenate([values * weights, weights], -1) if weighted else values
        both = jnp.where((numbers < total).reshape(-1, *[1] * (both.ndim - 1)), both, 0)
        return jax.lax.scan(add, sums, (both, at))[0]

    sums = jnp.zeros((*volume.shape[:-1], k + weighted), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-total // batch), step, sums)
    if weighted:
        return jnp.where(sums[..., k:] > 0, sums[..., :k] / jnp.where(sums[..., k:] > 0, sums[..., k:], 1), 0)
    count = reduce(jnp.multiply, jnp.ix_(*coverage))[..., None]
    mean = sums / (repeats * jnp.maximum(count, 1))
    if not released:
        return mean
    first = sums[..., :released] / ((count + 1) * (1 + repeats * (count + 1)))
    return jnp.concatenate([first, mean[..., released:]], -1)


def _keys(batch: int) -> jax.ShapeDtypeStruct:
    """The shape of `batch` keys."""
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))


def inside(shape: tuple[int, ...], size: Int[Array, " rank"]) -> Bool[Array, "*size"]:
    """bool `shape`: True for voxels below `size`, False for the padding up to the bucket."""
    axes = jnp.ix_(*(jnp.arange(n) for n in shape))
    return reduce(jnp.logical_and, [axis < n for axis, n in zip(axes, size, strict=True)])
