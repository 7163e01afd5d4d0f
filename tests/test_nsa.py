from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
import scipy.stats
from skimage.morphology import ball, disk

from jmae.anomalies import nsa as m


def textured(size, channels, seed=0):
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (*size, channels)), (2,) * len(size) + (0,))
    return (0.2 + 0.6 * (noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def numpy_clone(target, source, mixed):
    """Poisson's equation on the window by a sparse direct solve: (*n, c), the outer ring fixed."""
    n, d = target.shape[:-1], target.ndim - 1
    inside = np.zeros(n, bool)
    inside[(slice(1, -1),) * d] = True
    line = lambda k: scipy.sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], (k, k))
    laplacian = sum(
        scipy.sparse.kron(
            scipy.sparse.kron(scipy.sparse.eye(np.prod(n[:a])), line(n[a])), scipy.sparse.eye(np.prod(n[a + 1 :]))
        )
        for a in range(d)
    ).tocsr()
    inner, ring = np.flatnonzero(inside), np.flatnonzero(~inside)
    solve = scipy.sparse.linalg.factorized(laplacian[inner][:, inner].tocsc())
    out = target.copy()
    for c in range(target.shape[-1]):
        right = np.zeros(n)
        for a in range(d):
            t, s = (np.diff(x[..., c], axis=a, append=0) for x in (target, source))
            guidance = np.where(inside & ((np.abs(s) > np.abs(t)) if mixed else True), s, t)
            right += np.diff(guidance, axis=a, prepend=0)
        right = right.ravel()[inner] - laplacian[inner][:, ring] @ target[..., c].ravel()[ring]
        out[..., c].flat[inner] = solve(right)
    return out.clip(0, 1)


def numpy_nsa(image, source, objects, source_objects, p, mixed):
    """The image after the patches of `p`, and where changes count."""
    out, counted = image.astype(float), np.zeros(image.shape[:-1], bool)
    for used, cut, edges, resized, corner in zip(*p, strict=True):
        if not used:
            continue
        places = [c + (np.arange(r) + 0.5) * e / r - 0.5 for c, e, r in zip(cut, edges, resized, strict=True)]
        grid = np.meshgrid(*places, indexing="ij")
        at = partial(scipy.ndimage.map_coordinates, coordinates=grid, order=1, mode="nearest", output=float)
        patch = np.stack([at(source[..., c]) for c in range(source.shape[-1])], -1)
        where = tuple(slice(a, a + r) for a, r in zip(corner, resized, strict=True))
        out[where] = numpy_clone(out[where], patch, mixed)
        counted[where] = (at(source_objects) > 0.5) | (objects[where] > 0)
    return out, counted


def numpy_label(image, out, counted, labels, medians=(5, 5), k=1 / 2, x0=4, tolerance=1):
    d = counted.ndim
    levels = 255 * np.abs(out - image).mean(-1) * counted
    mask = scipy.ndimage.median_filter((levels > tolerance) * 1, (medians[0],) * d, mode="nearest")
    if labels == "binary":
        return mask
    levels = scipy.ndimage.median_filter(levels * mask, footprint={2: disk, 3: ball}[d](medians[1]), mode="nearest")
    return levels / 255 if labels == "intensity" else mask / (1 + np.exp(-k * (levels - x0)))


def all_of(p, i):
    return jax.tree.map(lambda values: np.asarray(values[i]), p)


SIZE = (48, 40)


@pytest.fixture(scope="module")
def clones():
    """30 results on one pair of images with a dark surround, and how often the function was traced."""
    image, source = textured(SIZE, 1), textured(SIZE, 1, seed=1)
    y, x = np.mgrid[:48, :40]
    for array, middle in ((image, (24, 20)), (source, (22, 18))):
        array[((y - middle[0]) / 20) ** 2 + ((x - middle[1]) / 16) ** 2 > 1] = 0
    traces = []

    @jax.jit
    def run(image, source, keys):
        traces.append(1)
        return jax.vmap(m.nsa, (None, None, 0))(image, source, keys)

    keys = jax.random.split(jax.random.key(0), 30)
    return image, source, keys, jax.tree.map(np.asarray, run(image, source, keys)), (run, traces)


@pytest.mark.long
def test_clones_equal_a_sparse_direct_solve(clones):
    image, source, _, (out, target, extras), _ = clones
    objects, source_objects = (np.asarray(m.foreground(jnp.asarray(x), (0, 20))) for x in (image, source))
    for i in range(8):
        expected, counted = numpy_nsa(image, source, objects, source_objects, all_of(extras["parameters"], i), True)
        np.testing.assert_allclose(out[i], expected, atol=1e-4)
        np.testing.assert_array_equal(target[i], numpy_label(image, out[i], counted, "binary"))


@pytest.mark.parametrize(
    ("size", "channels", "labels", "medians"),
    [((40, 32), 3, "logistic-intensity", (5, 5)), ((16, 14, 12), 1, "intensity", (3, 1))],
)
@pytest.mark.long_but_first
def test_colours_volumes_and_graded_labels_equal_the_reference(size, channels, labels, medians):
    image, source = textured(size, channels), textured(size, channels, seed=1)
    options = {"gradients": "normal", "labels": labels, "medians": medians, "background": None, "half": (0.1, 0.5)}
    options["gamma"] = (2, 0.1, 0.2)
    run = jax.vmap(lambda key: m.nsa(image, source, key, **options))
    out, target, extras = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(1), 3)))
    everywhere = np.ones(size)
    for i in range(3):
        p = all_of(extras["parameters"], i)
        expected, counted = numpy_nsa(image, source, everywhere, everywhere, p, False)
        np.testing.assert_allclose(out[i], expected, atol=1e-4)
        np.testing.assert_allclose(target[i], numpy_label(image, out[i], counted, labels, medians), atol=1e-5)
    assert target.max() > 0


def test_outside_the_patches_nothing_changes(clones):
    image, _, _, (out, target, extras), _ = clones
    assert out.min() >= 0 and out.max() <= 1 and set(np.unique(target)) == {0, 1}
    for i in range(len(out)):
        inside = np.zeros(SIZE, bool)
        for used, _, _, resized, corner in zip(*all_of(extras["parameters"], i), strict=True):
            inside[tuple(slice(a + 1, a + r - 1) for a, r in zip(corner, resized, strict=True))] |= used
        np.testing.assert_array_equal(out[i][~inside], image[~inside])
        assert not target[i][~scipy.ndimage.binary_dilation(inside, np.ones((5, 5)))].any()


@pytest.mark.parametrize("gradients", ["mixed", "normal"])
def test_a_patch_cloned_where_it_was_cut_changes_nothing(gradients):
    image, everywhere = jnp.asarray(textured((32, 32), 1)), jnp.ones((32, 32))
    place, edges = jnp.array([[5, 7]]), jnp.array([[12, 9]])
    p = m.Patches(jnp.array([True]), place, edges, edges, place)
    out, target, _ = jax.jit(
        lambda p: m.apply(image, image, everywhere, everywhere, p, most=(13, 13), gradients=gradients)
    )(p)
    np.testing.assert_allclose(out, image, atol=1e-6)
    assert not target.any()


def test_a_result_does_not_depend_on_its_batch_and_nothing_compiles_again(clones):
    image, source, keys, batch, (run, traces) = clones
    alone = m.nsa(image, source, keys[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[3], atol=1e-5), alone, batch)
    for _ in range(3):
        run(source, image, keys[::-1])
    assert len(traces) == 1


def simulated(rng, size, count):
    """Edges in the source, edges and first voxel in the image, as the docstring states them, in NumPy."""
    n = np.array(size)
    least, most = np.round(0.03 * n), np.round(0.4 * n)
    width = np.clip((0.05 + rng.gamma(2, 0.03, (count, 2))) * n, least, most).astype(int)
    centre = rng.integers(least, n - least, (count, 2))
    edges = np.minimum(centre + width, n) - np.maximum(centre - width, 0)
    factor = rng.normal(1, 0.5, count).clip(0.7, 1.3)
    factor = np.minimum(np.maximum(factor, (least / edges).max(1)), (most / edges).min(1))
    resized = np.clip(np.floor(factor[:, None] * edges + 1e-9), np.maximum(least, 3), most)
    return edges, resized, rng.integers(1, n - resized)


@pytest.mark.long
def test_patches_have_the_stated_distributions():
    size, everywhere = (200, 150), jnp.ones((200, 150))
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: m.draw(key, everywhere, everywhere), keys, batch_size=100))
    p = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(2), 300)))
    assert p.used[:, 0].all() and abs(p.used[:, 1:].mean() - 0.5) < 0.05
    flat = lambda values: values.reshape(-1, 2)
    assert (flat(p.cut) >= 0).all() and (flat(p.cut + p.edges) <= size).all()
    assert (flat(p.corner) >= 1).all() and (flat(p.corner + p.resized) <= np.array(size)).all()
    expected = simulated(np.random.default_rng(0), size, 20000)
    for drawn, stated in zip((p.edges, p.resized, p.corner), expected, strict=True):
        for axis in range(2):
            assert scipy.stats.ks_2samp(flat(drawn)[:, axis], stated[:, axis]).statistic < 0.05
    uniform = jax.vmap(lambda key: m.draw(key, everywhere, everywhere, gamma=None, resize=None, patches=1))
    q = jax.tree.map(np.asarray, jax.jit(uniform)(jax.random.split(jax.random.key(3), 100)))
    np.testing.assert_array_equal(q.resized, np.minimum(q.edges, (158, 118)))
    assert q.edges[:, 0, 0].max() > 120


def test_patches_show_objects_and_lie_on_them(clones):
    image, source, _, (_, _, extras), _ = clones
    objects, source_objects = (np.asarray(m.foreground(jnp.asarray(x), (0, 20))) for x in (image, source))
    p, good = extras["parameters"], []
    for cut, edges, resized, corner in zip(*(np.asarray(v).reshape(-1, 2) for v in p[1:]), strict=True):
        shown = source_objects[tuple(slice(a, a + e) for a, e in zip(cut, edges, strict=True))].mean()
        under = objects[tuple(slice(a, a + e) for a, e in zip(corner, resized, strict=True))].mean()
        good.append((shown > 0.7, under > 0.45))
    assert np.mean(good, 0)[0] > 0.95 and np.mean(good, 0)[1] > 0.95
    # without objects anywhere the patches are still drawn
    nothing = jax.jit(m.draw)(jax.random.key(4), jnp.zeros(SIZE), jnp.zeros(SIZE))
    assert (nothing.corner >= 1).all() and (nothing.corner + nothing.resized < np.array(SIZE)).all()


def test_medians_equal_scipys():
    rng = np.random.default_rng(0)
    values = rng.gamma(1, 1, (24, 19)).astype(np.float32) * (rng.random((24, 19)) < 0.7)
    expected = scipy.ndimage.median_filter(values, footprint=disk(3), mode="nearest")
    np.testing.assert_array_equal(m.ball_median(jnp.asarray(values), 3), expected)
    for size, width in (((24, 19), 7), ((10, 9, 8), 5)):
        mask = rng.random(size) < 0.5
        expected = scipy.ndimage.median_filter(mask * 1, (width,) * len(size), mode="nearest")
        np.testing.assert_array_equal(m.median(jnp.asarray(mask), width), expected)


def test_unknown_options_are_refused():
    image = jnp.asarray(textured((24, 24), 1))
    for option in ({"gradients": "mix"}, {"labels": "continuous"}):
        with pytest.raises(ValueError, match=r"'mix'|'continuous'"):
            m.nsa(image, image, jax.random.key(0), **option)
