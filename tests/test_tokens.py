"""Scores from an encoder's tokens, in 2D and 3D, against NumPy, SciPy and scikit-learn."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.covariance import ledoit_wolf

from jmae.errors import InputError
from jmae.nn.mae import MAE
from jmae.nn.memory import MultiLevelMAE
from jmae.patches import patchify
from jmae.tokens import (
    coresets,
    distances,
    gaussian,
    inner,
    learned,
    map_of,
    nearest,
    neighbours,
    score_of,
    subsets,
    token_features,
    window_weights,
)

GRIDS = {"2D": (5, 4), "3D": (4, 5, 3)}
PATCHES = {"2D": (3, 5), "3D": (3, 3, 1)}
rng = np.random.default_rng


def sizes(rank):
    return tuple(g * p for g, p in zip(GRIDS[rank], PATCHES[rank], strict=True))


def values(*shape, seed=0):
    return rng(seed).standard_normal(shape).astype(np.float32)


def network(rank, depth=5, make=MAE, **other):
    """A network with drawn weights, and three images as patches."""
    shape = dict(size=sizes(rank), patch=PATCHES[rank], channels=2, width=12, depth=depth, heads=2)
    shape |= dict(decoder_width=12, decoder_depth=1, decoder_heads=2)
    graph, params = nnx.split(nnx.eval_shape(lambda: make(**shape, **other, rngs=nnx.Rngs(0))))
    mae = nnx.merge(graph, drawn(lambda: params))
    return mae, patchify(values(3, *sizes(rank), 2), PATCHES[rank])


def one_by_one(mae, patches, positions, layer):
    """`token_features` by its words: each block by itself, long skips added, no norm at the end."""
    x, outputs = mae.with_class(mae.embed(patches)[:, positions]), []
    graph, stack = nnx.split(mae.encoder.stack)
    for i in range(layer):
        if i >= mae.encoder.depth - mae.encoder.skips:
            x = x + outputs[mae.encoder.depth - 1 - i]
        x = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stack))(x)
        outputs.append(x)
    return x[:, 1:]


@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize(
    "make, other", [(MAE, {}), (MAE, {"long_skips": True, "memory": 3}), (MultiLevelMAE, {"long_skips": True})]
)
@pytest.mark.long_but_first
def test_features_are_the_output_of_the_block_for_the_inner_tokens(rank, make, other):
    mae, patches = network(rank, make=make, **other)
    positions = inner(GRIDS[rank], 1)
    for layer, number in [(0, 3), (1, 1), (4, 4), (5, 5)]:
        found = token_features(mae, patches, positions, layer)
        np.testing.assert_allclose(found, one_by_one(mae, patches, positions, number), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_last_block_of_all_tokens_is_the_encoder_before_its_norm():
    mae, patches = network("2D")
    found = mae.encoder_norm(token_features(mae, patches, inner(GRIDS["2D"], 0), 5))
    np.testing.assert_allclose(found, mae.encode(mae.embed(patches))[:, 1:], rtol=1e-4, atol=1e-5)


def test_a_block_that_the_encoder_lacks_is_refused():
    mae, patches = network("2D")
    with pytest.raises(InputError, match="layer 6: the encoder has 5 blocks"):
        token_features(mae, patches, inner(GRIDS["2D"], 0), 6)


@pytest.mark.parametrize("rank", GRIDS)
def test_inner_positions_leave_out_the_rings(rank):
    grid = GRIDS[rank]
    for ring in (0, 1):
        inside = [all(ring <= c < g - ring for c, g in zip(at, grid, strict=True)) for at in np.ndindex(grid)]
        np.testing.assert_array_equal(inner(grid, ring), np.flatnonzero(inside))
    with pytest.raises(InputError, match="ring 2 leaves no token"):
        inner(grid, 2)


@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_neighbours_are_the_positions_within_the_tolerance(rank, tolerance):
    grid = GRIDS[rank]
    positions = rng(0).permutation(np.prod(grid))[:11]  # any subset, in any order
    at = np.stack(np.unravel_index(positions, grid), -1)
    for own, row in zip(at, neighbours(grid, positions, tolerance), strict=True):
        expected = [j for j, other in enumerate(at) if np.abs(other - own).max() <= tolerance]
        assert sorted(row[row >= 0]) == expected


def members(features, row):
    """The rows of a bank that one row of neighbours allows, as a set of tuples."""
    return {tuple(features[a, j]) for a in range(len(features)) for j in row[row >= 0]}


@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize("choose", [subsets, coresets])
def test_a_bank_holds_different_tokens_of_near_positions(rank, choose):
    grid = GRIDS[rank]
    positions = inner(grid, 1)
    features, near = values(4, len(positions), 3), neighbours(grid, positions)
    bank = choose(features, near, 7, 1)
    for tokens, row in zip(bank, near, strict=True):
        allowed, own = members(features, row), {tuple(t) for t in tokens}
        assert own <= allowed and len(own) == min(7, len(allowed))
    assert np.array_equal(bank, choose(features, near, 7, 1)) and not np.array_equal(bank, choose(features, near, 7, 2))
    whole = choose(features, near, 10**6, 1)  # more than there are
    for tokens, row in zip(whole, near, strict=True):
        assert {tuple(t) for t in tokens} == members(features, row)


def test_each_token_is_as_likely_in_a_random_bank_as_any_other():
    near = np.array([[0, 1, -1], [0, 1, 2]])
    features = np.arange(15, dtype=np.float32).reshape(5, 3, 1)
    drawn_ones = np.concatenate([subsets(features, near, 4, seed)[0].ravel() for seed in range(600)])
    count = np.bincount(drawn_ones.astype(int), minlength=15)
    assert not count[2::3].any()  # the third position is not near the first
    others = np.delete(count, np.s_[2::3])
    assert np.abs(others - 240).max() < 5 * (240 * 0.6) ** 0.5  # 2400 draws, 10 tokens, each with p = 0.4 a bank


def test_the_coreset_is_the_greedy_one():
    features, near = values(6, 4, 3), np.array([[0, 1, -1], [1, 2, 3]])
    for bank, row in zip(coresets(features, near, 9, 0), near, strict=True):
        tokens = features[:, row[row >= 0]].reshape(-1, 3).astype(np.float64)
        chosen = [int(cdist(bank[:1], tokens).argmin())]
        for _ in range(8):
            chosen.append(int(cdist(tokens[chosen], tokens).min(0).argmax()))
        np.testing.assert_array_equal(bank, tokens[chosen].astype(np.float32))


@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize("at_once", [10**6, 40, 1])
@pytest.mark.parametrize("way", ["position", "global"])
def test_the_distance_is_that_of_the_nearest_token_of_the_bank(rank, at_once, way):
    positions = inner(GRIDS[rank], 1)
    k, near = len(positions), neighbours(GRIDS[rank], positions)
    normal, new = values(5, k, 6), values(3, k, 6, seed=1)
    bank = learned(normal, near, way, size=10**6, coreset=False, seed=0)["bank"]
    found = nearest(jnp.asarray(new), jnp.asarray(bank), at_once)
    for i in range(k):
        tokens = normal[:, near[i][near[i] >= 0] if way == "position" else slice(None)].reshape(-1, 6)
        np.testing.assert_allclose(found[:, i], cdist(new[:, i], tokens).min(1), rtol=1e-5)


def test_a_token_of_the_bank_has_the_distance_0_whatever_the_size_of_its_values():
    bank = 1e3 + values(1, 50, 8)
    assert not np.any(nearest(jnp.asarray(bank[:, :7].swapaxes(0, 1)), jnp.asarray(bank)))


def test_a_bank_in_half_precision_gives_the_distance_to_what_it_holds(monkeypatch):
    normal, new = values(6, 2, 5), values(3, 2, 5, seed=1)
    monkeypatch.setattr("jmae.tokens.LARGE_BANK", 0)
    bank = learned(normal, np.array([[0], [1]]), "position", size=6, coreset=False, seed=0)["bank"]
    assert bank.dtype == np.float16
    for i in range(2):
        expected = cdist(new[:, i], normal[:, i].astype(np.float16)).min(1)
        np.testing.assert_allclose(nearest(jnp.asarray(new), jnp.asarray(bank))[:, i], expected, rtol=1e-5)


@pytest.mark.parametrize("way", ["gaussian", "mahalanobis"])
def test_gaussian_distances_are_those_of_scikit_learn_s_covariance(way):
    normal, new = values(30, 3, 4) * np.array([1, 2, 3], np.float32)[:, None], values(5, 3, 4, seed=1)
    kept = learned(normal, np.array([[0], [1], [2]]), way, size=1, coreset=False, seed=0)
    found = distances(jnp.asarray(new), jax.tree.map(jnp.asarray, kept))
    means = normal.mean(0, dtype=np.float64)
    rest = normal - means
    for i, j in product(range(5), range(3)):
        rows = rest.reshape(-1, 4) if way == "mahalanobis" else rest[:, j]
        covariance = ledoit_wolf(rows, assume_centered=True)[0]
        expected = mahalanobis(new[i, j], means[j], np.linalg.inv(covariance))
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-4)


def test_equal_normals_have_a_finite_distance():
    kept = gaussian(np.ones((4, 2, 3), np.float32), pooled=False)
    assert np.isfinite(distances(jnp.zeros((1, 2, 3)), jax.tree.map(jnp.asarray, kept))).all()


def test_the_score_is_the_mean_of_the_highest_distances():
    found = values(3, 10)
    np.testing.assert_allclose(score_of(found), found.mean(1), rtol=1e-5)
    np.testing.assert_allclose(score_of(found, 0.3), np.sort(found, 1)[:, -3:].mean(1), rtol=1e-5)
    np.testing.assert_allclose(score_of(found, 0.01), found.max(1), rtol=1e-5)


@pytest.mark.parametrize("rank", GRIDS)
def test_a_map_has_each_token_s_distance_at_its_patch_s_centre(rank):
    grid, patch = GRIDS[rank], PATCHES[rank]
    found = values(2, len(inner(grid, 1)))
    centres = np.asarray(map_of(jnp.asarray(found), grid, 1, sizes(rank)))[:, *(slice(p // 2, None, p) for p in patch)]
    cells = found.reshape(2, *(n - 2 for n in grid))
    nearest_inner = np.ix_(range(2), *(np.clip(np.arange(n) - 1, 0, n - 3) for n in grid))
    np.testing.assert_allclose(centres, cells[nearest_inner], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", GRIDS)
def test_weights_mark_the_voxels_of_inner_tokens(rank):
    grid, patch = GRIDS[rank], PATCHES[rank]
    found = window_weights(grid, 1, sizes(rank))
    for at in np.ndindex(found.shape):
        cell = [a // p for a, p in zip(at, patch, strict=True)]
        assert found[at] == (1 if all(1 <= c < g - 1 for c, g in zip(cell, grid, strict=True)) else np.float32(1e-6))
