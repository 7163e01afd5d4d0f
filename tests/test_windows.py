"""Windows over volumes: where they lie, and the compiled stream against plain loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmae.windows import average, cut_windows, ends, inside, room, tile

WINDOW, STRIDE = (6, 4, 4), (3, 2, 2)


def test_windows_end_at_every_stride_and_flush_with_the_end():
    assert ends(273, 240, 64) == [240, 273]
    assert ends(203, 168, 42) == [168, 203]
    assert ends(105, 8, 2) == [*range(8, 105, 2), 105]
    assert ends(240, 240, 64) == [240]


def test_the_papers_typical_breast_volume_takes_2_x_2_x_50_windows_a_half():
    tiling = tile((273, 406, 105), (240, 168, 8), (64, 42, 2), side=1, midline=203)
    assert len(tiling.origins) == 2 * 2 * 50 * 2


@pytest.mark.parametrize("side, midline", [(None, None), (0, 7), (1, 4), (1, 9), (2, 6)])
def test_every_voxel_is_covered_as_often_as_said_and_no_window_crosses_the_midline(side, midline):
    size = (13, 11, 9)
    tiling = tile(size, WINDOW, STRIDE, side=side, midline=midline)
    shape = tuple(n + low + high for n, (low, high) in zip(size, tiling.pad, strict=True))
    count = np.zeros(shape)
    for origin in tiling.origins:
        count[tuple(slice(o, o + w) for o, w in zip(origin, WINDOW, strict=True))] += 1
    assert (count[tuple(slice(n) for n in tiling.size)] >= 1).all()
    np.testing.assert_array_equal(count, np.einsum("i,j,k->ijk", *tiling.coverage))
    assert all(n % (w // 2) == 0 for n, w in zip(shape, WINDOW, strict=True))
    assert len(np.unique(tiling.origins, axis=0)) == len(tiling.origins)
    if side is not None:
        middle = midline + tiling.pad[side][0]
        starts = tiling.origins[:, side]
        assert ((starts + WINDOW[side] <= middle) | (starts >= middle)).all()


def test_a_piece_that_is_smaller_than_a_window_grows_outwards():
    pad, middle = room((5, 9, 3), WINDOW, 1, 2)
    assert pad == [(0, 1), (2, 0), (0, 1)] and middle == 4
    assert room((5, 3, 3), WINDOW) == ([(0, 1), (0, 1), (0, 1)], None)


def noisy(image, keys, groups):
    """What a network under a random mask stands for: values that depend on the window, its key and its group."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:]))(keys)
    weights = (noise[..., :1] > 0.3).astype(jnp.float32)
    return jnp.concatenate([image * noise, image + 1 + groups[:, None, None, None, None]], -1), weights


def plain(volume, tiling, key, repeats, rule, groups):
    """The same with a loop over sweeps and windows, one at a time."""
    shape = (*volume.shape[:-1], 2 * volume.shape[-1])
    total, weight, count = np.zeros(shape), np.zeros((*shape[:-1], 1)), np.zeros((*shape[:-1], 1))
    released = np.zeros(shape)
    for sweep in range(repeats):
        part = np.zeros(shape)
        for number, origin in enumerate(tiling.origins):
            at = tuple(slice(o, o + w) for o, w in zip(origin, WINDOW, strict=True))
            keys = jax.random.fold_in(jax.random.fold_in(key, sweep // groups), number)[None]
            values, weights = (np.asarray(x[0]) for x in noisy(volume[at][None], keys, jnp.array([sweep % groups])))
            part[at] += values * (weights if rule == "weighted" else 1)
            weight[at] += weights
            count[at] += 1
        total += part
        released += part / (count / (sweep + 1) + 1)
    if rule == "weighted":
        return np.where(weight > 0, total / np.maximum(weight, 1e-12), 0)
    if rule == "released":
        released /= 1 + repeats * (count / repeats + 1)
        return np.concatenate([released[..., :3], (total / np.maximum(count, 1))[..., 3:]], -1)
    return total / np.maximum(count, 1)


@pytest.mark.parametrize("rule", ["mean", "released", "weighted"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_stream_equals_a_loop_over_windows(rule, batch):
    size, repeats, key, groups = (9, 11, 5), 3, jax.random.key(3), 2 if rule == "mean" else 1
    tiling = tile(size, WINDOW, STRIDE, side=1, midline=5)
    volume = np.random.default_rng(0).normal(size=(*size, 2)).astype(np.float32)
    volume = np.pad(volume, [*tiling.pad, (0, 0)])
    origins = np.concatenate([tiling.origins, np.full((5, 3), 99, np.int32)])  # beyond `number`: not used
    run = jax.jit(
        partial(
            average,
            noisy,
            window=WINDOW,
            repeats=repeats,
            batch=batch,
            groups=groups,
            weighted=rule == "weighted",
            released=3 if rule == "released" else 0,
        )
    )
    found = run(volume, origins, len(tiling.origins), tiling.coverage, key)
    np.testing.assert_allclose(found, plain(volume, tiling, key, repeats, rule, groups), atol=1e-5)


def test_another_size_of_the_same_bucket_is_not_compiled_again():
    run = jax.jit(partial(average, noisy, window=WINDOW, repeats=2, batch=8))
    for size in [(10, 9, 7), (12, 10, 8), (11, 9, 8)]:
        tiling = tile(size, WINDOW, STRIDE)
        volume = np.pad(np.ones((*size, 1), np.float32), [*tiling.pad, (0, 0)])
        origins = np.zeros((64, 3), np.int32)
        origins[: len(tiling.origins)] = tiling.origins
        run(volume, origins, len(tiling.origins), tiling.coverage, jax.random.key(0))
    assert run._cache_size() == 1


def test_inside_leaves_out_the_rest_of_the_bucket_and_cut_gives_the_windows():
    assert inside((4, 4), jnp.array([3, 2])).sum() == 6
    volume = jnp.arange(5 * 4 * 3, dtype=jnp.float32).reshape(5, 4, 3, 1)
    out = cut_windows(volume, jnp.array([[1, 0, 2], [0, 2, 0]]), (2, 2, 1))
    np.testing.assert_array_equal(out, np.stack([volume[1:3, :2, 2:], volume[:2, 2:, :1]]))
