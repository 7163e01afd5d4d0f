"""FPI, PII and P-PII against NumPy versions on the same drawn numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from configs import ppii as recipe
from jmae.anomalies import interpolation as own
from jmae.anomalies.poisson import edges_of
from jmae.keys.ppii import SHAPES

SIZES = [(40, 32), (20, 24, 16)]
PATCH = (0.1, 0.35)


def images(size, n=2, c=1):
    rng = np.random.default_rng(len(size))
    return rng.uniform(0.1, 0.9, (n, *size, c)).astype(np.float32)


def poisson(target, guidance):
    """The window (*n) whose differences along axis k from i to i + 1 are nearest to guidance[k][i], its ring kept: the
    normal equations of Eq. 4, pair by pair."""
    size, d = target.shape, target.ndim
    inner = np.zeros(size, bool)
    inner[(slice(1, -1),) * d] = True
    number = np.cumsum(inner).reshape(size) - 1
    matrix, right = lil_matrix((inner.sum(),) * 2), np.zeros(inner.sum())
    for p in np.argwhere(inner):
        row = number[tuple(p)]
        for axis in range(d):
            for step in (-1, 1):
                q = p.copy()
                q[axis] += step
                v = guidance[axis][tuple(p)] if step == 1 else -guidance[axis][tuple(q)]  # f_q - f_p
                matrix[row, row] += 1
                right[row] -= v
                if inner[tuple(q)]:
                    matrix[row, number[tuple(q)]] -= 1
                else:
                    right[row] += target[tuple(q)]
    out = target.astype(float).copy()
    out[inner] = spsolve(matrix.tocsc(), right)
    return out


def steps(a):
    """Forward differences of each axis, as arrays of the window's size."""
    return [np.pad(np.diff(a, axis=k), [(0, int(k == j)) for j in range(a.ndim)]) for k in range(a.ndim)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", ["fpi", "pii"])
def test_fpi_and_pii_agree_with_numpy(size, task):
    image, source = images(size)
    for seed in range(3):
        out, target, extras = getattr(own, task)(image, source, jax.random.key(seed), half=PATCH)
        p = jax.tree.map(np.asarray, extras["parameters"])
        box = tuple(slice(c, c + e) for c, e in zip(p.corner, p.edges, strict=True))
        t, s, alpha = image[box][..., 0].astype(float), source[box][..., 0].astype(float), float(p.alpha)
        reference = image[..., 0].astype(float).copy()
        if task == "fpi":
            reference[box] = (1 - alpha) * t + alpha * s
        else:
            pairs = [((1 - alpha) * a, alpha * b) for a, b in zip(steps(t), steps(s), strict=True)]
            reference[box] = poisson(t, [np.where(np.abs(a) > np.abs(b), a, b) for a, b in pairs])
        reference = reference if task == "fpi" else np.clip(reference, image.min(), image.max())
        np.testing.assert_allclose(out[..., 0], reference, atol=2e-5)
        label = alpha * (np.floor(np.asarray(out)[..., 0] / 1e-3) != np.floor(image[..., 0] / 1e-3))
        np.testing.assert_allclose(target, label, atol=1e-6)
        outside = np.ones(size, bool)
        outside[box] = False
        np.testing.assert_array_equal(np.asarray(out)[outside], image[outside])


def composed(image, sources, p, preset, size):
    """P-PII of one-channel images (*size) by the steps of the specification's sections 2.2 and 11, rater by rater."""
    clean, made, variance = image.astype(float), [], np.zeros(size)
    out = clean.copy()
    for a in range(int(p.number)):
        place, cut = (tuple(slice(c, c + e) for c, e in zip(f[a], p.edges[a], strict=True)) for f in (p.corner, p.cut))
        base = out if preset.sequence else clean
        each = []
        for r in range(int(p.raters[a])):
            t, s = base[place], sources[p.which[a]][cut].astype(float) * float(p.strength[a, r])
            centre = p.centre[a, r]
            radius = min(min(p.radius[a, r][k], centre[k], p.edges[a][k] - 1 - centre[k]) for k in range(len(size)))
            radius = max(radius, 0)
            grid = np.stack(np.meshgrid(*map(np.arange, t.shape), indexing="ij"), -1)
            mask = ((grid - centre) ** 2).sum(-1) <= radius**2
            for k in range(t.ndim):
                mask[(slice(None),) * k + (0,)] = mask[(slice(None),) * k + (-1,)] = False
            pairs = zip(steps(t), steps(s), strict=True)
            guidance = [np.where(mask & (np.abs(b) > np.abs(g)), b, g) for g, b in pairs]
            whole = base.copy()
            whole[place] = poisson(t, guidance)
            each.append(whole)
        made += each
        if preset.sequence:
            variance += np.var(np.clip(each, 0, 1), 0)
            out = np.clip(np.mean(each, 0), 0, 1)
    if not preset.sequence:
        out, variance = np.clip(np.mean(made, 0), 0, 1), np.var(np.clip(made, 0, 1), 0)
    return out, np.minimum(preset.gain * np.abs(out - clean), 1), np.sqrt(np.minimum(variance, 0.25))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", own.PRESETS)
@pytest.mark.long_but_first
def test_ppii_agrees_with_numpy(size, preset):
    pool = images(size, 3)
    some = {"preset": preset, "anomalies": (2, 3), "raters": (1, 3), "patch": PATCH}
    run = jax.jit(partial(own.ppii, deviation=True, **some))
    for seed in range(2):
        out, target, extras = run(pool[0], pool, jax.random.key(seed), 0)
        p = jax.tree.map(np.asarray, extras["parameters"])
        chosen = own.PRESETS[preset]._replace(anomalies=(2, 3), raters=(1, 3))
        image, label, deviation = composed(pool[0, ..., 0], pool[..., 0], p, chosen, size)
        np.testing.assert_allclose(out[..., 0], image, atol=5e-5)
        np.testing.assert_allclose(target, label, atol=5e-4)
        np.testing.assert_allclose(extras["deviation"], deviation, atol=2e-3)
        plain = own.ppii(pool[0], pool, jax.random.key(seed), 0, **some)
        np.testing.assert_allclose(plain[0], out, atol=1e-6)
        assert (np.asarray(target) > 0).any() and "deviation" not in plain[2]


@pytest.mark.parametrize("task", ["fpi", "pii", "ppii"])
def test_an_image_that_is_its_own_source_in_place_is_not_changed(task):
    flat = np.full((32, 32, 1), 0.4, np.float32)
    other = images((32, 32))[0]
    if task == "ppii":  # a constant source has no larger gradient anywhere
        out, target, _ = own.ppii(other, flat, jax.random.key(0))
        np.testing.assert_array_equal(out, other)
        assert not np.asarray(target).any()
    else:
        out, target, _ = getattr(own, task)(flat, flat, jax.random.key(0))
        np.testing.assert_allclose(out, flat, atol=1e-6)
        assert not np.asarray(target).any()


def drawn(preset, size=(512, 512), n=400, **changes):
    chosen = own.PRESETS[preset]._replace(**changes)
    draw = partial(own.draw_patches, size=size, sources=4, image_number=1, preset=chosen, patch=(0.05, 0.2), core=0.8)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n)))


@pytest.mark.parametrize("preset", own.PRESETS)
def test_drawn_numbers_follow_the_docstring(preset):
    p, chosen = drawn(preset), own.PRESETS[preset]
    low, high = chosen.anomalies
    assert set(p.number) == set(range(low, high + 1))
    assert abs(p.number.mean() - (low + high) / 2) < 0.5
    assert set(p.raters.ravel()) == set(range(1, 10))
    assert p.edges.min() == 26 and p.edges.max() == 101
    np.testing.assert_allclose(p.edges.mean((0, 1)), 63.5, atol=1.5)
    assert set(p.which.ravel()) == {0, 2, 3}
    assert (p.cut >= 0).all() and (p.cut + p.edges <= 512).all()
    centre = p.cut + p.edges // 2
    assert centre.min() >= 51 and centre.max() <= 461
    if chosen.core:
        assert (p.corner >= p.edges).all() and (p.corner < 409 - p.edges).all()
    else:
        assert (p.corner >= 0).all() and (p.corner + p.edges <= 512).all()
        assert (p.corner == 0).any() and (p.corner + p.edges == 512).any()
    half = p.edges[:, :, None] / 2
    off = (p.centre + 0.5 - half) / half * 6  # truncated to whole voxels
    assert abs(off.std() - 1) < 0.05 and abs(off.mean()) < 0.1
    width = 2 * p.radius + 1 - half  # truncated twice
    assert abs(width.mean()) < 0.6 and 1 < width.std() < 1.5
    share = p.strength / p.number[:, None, None] if chosen.consistent else p.strength
    assert share.min() >= chosen.strength[0] - 1e-5
    if chosen.consistent:
        assert p.strength.min() >= 1
        assert share[p.number > 2].max() <= 1.9 + 1e-5 and abs(share[p.number > 2].mean() - 1.215) < 0.02
    else:
        assert set(share.ravel()) == set(range(int(chosen.strength[0]), int(chosen.strength[1]) + 1))


def test_squares_follow_the_docstring():
    draw = jax.vmap(lambda key: own.draw_square(key, (512, 512), (0.05, 0.2), 0.8))
    p = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 2000)))
    assert p.edges.max() == 202 and p.edges.min() >= 51
    uncut = (p.corner > 0).all(1) & (p.corner + p.edges < 512).all(1)
    assert (p.edges[uncut, 0] == p.edges[uncut, 1]).all() and uncut.mean() > 0.7
    assert (p.corner >= 0).all() and (p.corner + p.edges <= 512).all()
    assert p.alpha.min() > 0.05 and p.alpha.max() < 0.95 and abs(p.alpha.mean() - 0.5) < 0.02


def test_half_widths_of_a_flat_volume_follow_each_axis():
    draw = jax.vmap(lambda key: own.draw_square(key, (32, 40, 16), (0.1, 0.4), 1.0))
    p = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 500)))
    uncut = (p.corner > 0).all(1) & (p.corner + p.edges < (32, 40, 16)).all(1)
    edges = p.edges[uncut]
    assert (edges[:, 0] == edges[:, 1]).all() and edges[:, 0].max() > 16 and set(edges[:, 2]) == {4, 6, 8, 10}
    assert (np.diff(edges[np.lexsort((edges[:, 2], edges[:, 0])), 2]) >= 0).all(), "one quantile for all axes"
    image = jnp.asarray(images((32, 40, 16), 2))
    out, target, _ = own.pii(image[0], image[1], jax.random.key(1), half=(0.1, 0.4))
    assert np.isfinite(out).all() and (np.asarray(target) > 0).sum() > 50


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["small", "phantom", "small3d", "phantom3d"])
def test_presets_train_on_discs_of_more_than_a_few_pixels(preset, shape):
    c = recipe.get_config(preset)
    patch, chosen = tuple(c.anomaly.patch), own.PRESETS["paper"]
    n, size = tuple(int(m) for m in edges_of(c.data.size, patch)[1]), tuple(c.data.size)
    p = own.draw_patches(jax.random.key(0), size, 2, None, chosen._replace(anomalies=(99, 99)), patch=patch, core=0.8)
    sizes = np.asarray(own.discs(p, n, shape)).sum(tuple(range(2, 2 + len(size))))
    assert np.quantile(sizes, 0.05) >= 3 and np.median(sizes) >= 20


def test_places_of_the_released_file_are_left_where_no_place_fits_them():
    """An edge of 0.4 n or more leaves no first voxel in [edge, 0.8 n - edge): any place is taken."""
    keys = jax.random.split(jax.random.key(0), 200)
    small = jax.tree.map(
        np.asarray,
        jax.vmap(
            lambda key: own.draw_patches(key, (60, 60), 2, None, own.PRESETS["released"], patch=(0.1, 0.3), core=0.8)
        )(keys),
    )
    assert (small.corner >= small.edges).all() and (small.corner < 48 - small.edges).all()
    large = jax.tree.map(
        np.asarray,
        jax.vmap(
            lambda key: own.draw_patches(key, (60, 60), 2, None, own.PRESETS["released"], patch=(0.5, 0.8), core=1.0)
        )(keys),
    )
    whole = large.edges >= 30  # not cut off by the border
    room = (60 - large.edges)[whole]
    assert large.corner[whole].min() == 0 and (large.corner[whole] == room).any()
    assert abs((large.corner[whole] / room).mean() - 0.5) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.long_but_first
def test_discs_lie_in_their_patches_and_touch_the_edge_at_most(shape, size):
    n = tuple(int(m) for m in edges_of(size, (0.2, 0.5))[1])
    chosen = own.PRESETS["paper"]
    p = own.draw_patches(jax.random.key(1), size, 2, None, chosen, patch=(0.2, 0.5), core=0.8)
    masks, edges = np.asarray(own.discs(p, n, shape)), np.asarray(p.edges)
    assert masks.any(tuple(range(2, 2 + len(size)))).all()
    for mask, edge in zip(masks, edges, strict=True):
        beyond = np.ones(n, bool)
        beyond[tuple(map(slice, edge))] = False
        assert not mask[:, beyond].any()
    if shape == "circular":
        radius = np.sqrt(masks.sum(tuple(range(2, 2 + len(size)))) / np.pi) if len(size) == 2 else None
        assert radius is None or radius.max() <= (np.asarray(p.radius).min(-1).max() + 0.6)


@pytest.mark.long
def test_batches_equal_single_images_and_share_one_compilation():
    pool = images((32, 32), 4)
    keys = jax.random.split(jax.random.key(3), 4)
    run = jax.jit(jax.vmap(partial(own.ppii, preset="paper"), (0, None, 0, 0)))
    together = run(pool, pool, keys, jnp.arange(4))
    for i in range(4):
        alone = own.ppii(pool[i], pool, keys[i], i, preset="paper")
        np.testing.assert_allclose(together[0][i], alone[0], atol=1e-6)
    run(pool, pool, jax.random.split(jax.random.key(4), 4), jnp.arange(4))
    assert run._cache_size() == 1


@pytest.mark.long
def test_channels_share_place_and_mask():
    pool = jnp.asarray(images((32, 32), 2, 3))
    out, target, extras = own.ppii(pool[0], pool[1], jax.random.key(0))
    one = jnp.mean(jnp.abs(out - pool[0]), -1)
    np.testing.assert_allclose(target, jnp.minimum(one, 1), atol=1e-6)
    single = own.apply_ppii(
        pool[0][..., :1], pool[1][None, ..., :1], extras["parameters"], most=(5, 5), preset=own.PRESETS["paper"]
    )
    np.testing.assert_allclose(out[..., :1], single[0], atol=1e-6)
