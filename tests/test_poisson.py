"""Windows of the Poisson equation against a sparse direct solve and against pie-torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import diags, identity, kron
from scipy.sparse.linalg import spsolve

from jmae.anomalies import poisson

rng = np.random.default_rng(0)


def sparse_blend(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A blended window (*n) by mixed gradients: the discrete Poisson equation of its inner voxels, solved directly with
    the target's ring as boundary."""
    d, size = target.ndim, target.shape
    divergence = np.zeros(size)
    for axis in range(d):
        end = [(0, int(k == axis)) for k in range(d)]
        t, s = (np.pad(np.diff(a, axis=axis), end) for a in (target, source))
        g = np.where(mask, np.where(np.abs(t) >= np.abs(s), t, s), t)
        divergence += (
            g
            - np.pad(g, [(int(k == axis), 0) for k in range(d)])[
                tuple(slice(0, -1) if k == axis else slice(None) for k in range(d))
            ]
        )
    inner = (slice(1, -1),) * d
    laplacian, total = None, None
    counts = [n - 2 for n in size]
    for axis in range(d):
        parts = [identity(n) for n in counts]
        parts[axis] = diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(counts[axis],) * 2)
        total = parts[0]
        for part in parts[1:]:
            total = kron(total, part)
        laplacian = total if laplacian is None else laplacian + total
    edge = target.copy()
    edge[inner] = 0
    boundary = np.zeros(counts)
    for axis in range(d):
        for side in (slice(0, -2), slice(2, None)):
            boundary += edge[tuple(side if k == axis else slice(1, -1) for k in range(d))]
    out = target.copy()
    out[inner] = spsolve(laplacian.tocsc(), (divergence[inner] - boundary).ravel()).reshape(counts)
    return out


def drawn(size: tuple[int, ...], strength: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target, source and a mask that leaves the ring out."""
    mask = np.zeros(size, bool)
    mask[(slice(1, -1),) * len(size)] = rng.uniform(size=[n - 2 for n in size]) < 0.7
    return rng.uniform(size=size), strength * rng.uniform(size=size), mask


def blended(target: np.ndarray, source: np.ndarray, mask: np.ndarray, n: tuple[int, ...]) -> np.ndarray:
    """jmae's window in an array of the static size n, whose rest is noise that must not matter."""
    fill = lambda a, rest: np.asarray(rest, np.float32).copy()
    parts = []
    for a in (target, source, mask):
        whole = fill(a, rng.uniform(size=n))
        whole[tuple(map(slice, a.shape))] = a
        parts.append(whole)
    out = np.asarray(solve(parts[0][..., None], parts[1][..., None], parts[2], jnp.array(target.shape)))[..., 0]
    beyond = np.ones(n, bool)
    beyond[tuple(map(slice, target.shape))] = False
    np.testing.assert_array_equal(out[beyond], parts[0][beyond])
    return out[tuple(map(slice, target.shape))]


solve = jax.jit(poisson.blend)


@pytest.mark.long
def test_200_windows_of_any_size_agree_with_a_sparse_solve_in_one_compilation():
    before = solve._cache_size()
    for _ in range(200):
        target, source, mask = drawn(tuple(rng.integers(5, 103, 2)))
        reference = sparse_blend(target, source, mask)
        out = blended(target, source, mask, (102, 102))
        assert np.abs(out - reference).max() <= 1e-4 * np.ptp(reference), target.shape
        np.testing.assert_array_equal(out[0], target[0].astype(np.float32))
        np.testing.assert_array_equal(out[:, -1], target[:, -1].astype(np.float32))
    assert solve._cache_size() == before + 1


@pytest.mark.long
def test_windows_agree_with_pie_torch():
    pietorch = pytest.importorskip("pietorch", reason="pie-torch is in the extra 'bench'")
    for _ in range(200):
        target, source, mask = drawn(tuple(rng.integers(5, 103, 2)))
        reference = pietorch.blend_dst_numpy(target, source, mask.astype(float), np.array([0, 0]), True)
        assert np.abs(blended(target, source, mask, (102, 102)) - reference).max() <= 1e-4 * np.ptp(reference)


@pytest.mark.parametrize("size", [(5, 6, 7), (9, 4, 12), (3, 3, 3), (12, 12, 12)])
def test_volumes_agree_with_a_sparse_solve(size):
    target, source, mask = drawn(size)
    reference = sparse_blend(target, source, mask)
    out = blended(target, source, mask, (12, 12, 12))
    assert np.abs(out - reference).max() <= 1e-4 * np.ptp(reference)


@pytest.mark.parametrize("size", [(20, 17), (6, 9, 5)])
def test_equal_and_constant_sources_return_the_target(size):
    target, _, mask = drawn(size)
    for source in (target, np.full(size, 0.3)):
        np.testing.assert_array_equal(blended(target, source, mask, size), target.astype(np.float32))


@pytest.mark.long
def test_the_laplacian_of_a_solution_is_the_divergence_and_the_ring_is_zero():
    edges, n = jnp.array([7, 11]), (12, 12)
    fields = [jnp.asarray(rng.normal(size=(*n, 2)), jnp.float32) for _ in range(2)]
    u = np.array(poisson.change(fields, edges))
    lap = sum(np.roll(u, s, a) for a in (0, 1) for s in (1, -1)) - 4 * u
    np.testing.assert_allclose(lap[1:6, 1:10], np.asarray(poisson.divergence(fields))[1:6, 1:10], atol=2e-5)
    u[1:6, 1:10] = 0
    assert not u.any()


def test_a_solution_is_linear_in_the_guidance():
    edges, n = jnp.array([9, 8]), (10, 10)
    a, b = ([jnp.asarray(rng.normal(size=(*n, 1)), jnp.float32) for _ in range(2)] for _ in range(2))
    both = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    mean = (poisson.change(a, edges) + poisson.change(b, edges)) / 2
    np.testing.assert_allclose(poisson.change(both, edges), mean, atol=1e-5)


def test_edges_of_patches():
    least, most = poisson.edges_of((512, 512), (0.05, 0.2))
    assert (least.tolist(), most.tolist()) == ([26, 26], [101, 101])
    least, most = poisson.edges_of((32, 8), (0.05, 0.2))
    assert (least.tolist(), most.tolist()) == ([3, 3], [5, 3])
