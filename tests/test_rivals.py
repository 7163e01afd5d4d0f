"""Closed-form predictors against NumPy and SciPy, in 2D and 3D."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jmae import rivals
from jmae.masking import hidden, random_mask
from jmae.patches import patchify, unpatchify

SHAPES = pytest.mark.parametrize(
    ("size", "patch", "channels"), [((12, 16), (4, 4), 1), ((12, 8), (2, 4), 3), ((8, 6, 4), (4, 2, 2), 2)]
)
MASKS = 3


def smooth(rng, n, size, channels):
    """Images of some smooth factors plus noise, float32."""
    factors = np.random.default_rng(7).normal(size=(20, *size, channels))
    factors = np.stack([ndimage.gaussian_filter(f, (*[1.0] * len(size), 0)) for f in factors])
    mixed = np.tensordot(rng.normal(size=(n, 20)) * np.linspace(3, 0.3, 20), factors, 1)
    return (0.4 + mixed + 0.1 * rng.normal(size=mixed.shape)).astype(np.float32)


def case_of(size, patch, channels, normals=60, images=4):
    """(normals, new images) in patches, masks that show a third, and True where a mask hides."""
    rng = np.random.default_rng(1)
    known, new = (patchify(jnp.asarray(smooth(rng, n, size, channels)), patch) for n in (normals, images))
    n = new.shape[1]
    keep, restore = random_mask(jax.random.split(jax.random.key(0), MASKS), n, n // 3)
    return known, new, keep, restore, np.asarray(hidden(restore, n // 3))


@SHAPES
def test_masked_components_are_the_conditional_mean_of_the_gaussian(size, patch, channels):
    known, new, keep, restore, absent = case_of(size, patch, channels)
    q = 10
    predicted = np.asarray(jax.jit(rivals.conditional_mean)(rivals.components_of(known, q), new, keep, restore))
    x = np.asarray(known, np.float64).reshape(len(known), -1)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    rest = values[q:].sum() / (len(values) - q)
    covariance = (vectors[:, :q] * (values[:q] - rest)) @ vectors[:, :q].T + rest * np.eye(len(values))
    mean, flat = x.mean(0), np.asarray(new, np.float64).reshape(len(new), -1)
    for m in range(MASKS):
        h = np.repeat(absent[m], new.shape[2])
        gain = np.linalg.solve(covariance[np.ix_(~h, ~h)], covariance[np.ix_(~h, h)])
        expected = mean[h] + (flat[:, ~h] - mean[~h]) @ gain
        np.testing.assert_allclose(predicted[:, m].reshape(len(new), -1)[:, h], expected, atol=2e-4)
        assert expected.std() > 0.2


@pytest.mark.parametrize(("normals", "expected"), [(60, 8), (9, 4), (3, 1), (2, 0), (1, 0)])
def test_few_normals_give_few_components_or_none(normals, expected):
    known = case_of((12, 16), (4, 4), 1, normals=normals)[0]
    found = rivals.components_of(known, 8)
    assert (found.basis.shape[2] if found else 0) == expected


def test_equal_normals_have_no_components():
    assert rivals.components_of(jnp.ones((9, 4, 4))) is None


@SHAPES
def test_a_blur_is_scipys_of_the_visible_pixels_over_that_of_the_mask(size, patch, channels):
    _, new, keep, restore, absent = case_of(size, patch, channels)
    predicted = jax.jit(partial(rivals.blurred, size=size, patch=patch))(new, keep, restore)
    sigma = [n / 16 for n in size]
    filtered = lambda x: ndimage.gaussian_filter(x, sigma, mode="constant", truncate=30)
    images = np.asarray(unpatchify(new, size, patch), np.float64)
    for m in range(MASKS):
        ones = jnp.broadcast_to(jnp.float32(~absent[m])[None, :, None], (1, new.shape[1], np.prod(patch)))
        seen = np.asarray(unpatchify(ones, size, patch), np.float64)[0, ..., 0]
        own = np.asarray(unpatchify(predicted[:, m], size, patch))
        for b in range(len(new)):
            for c in range(channels):
                average = images[b, ..., c][seen > 0].mean()
                expected = (filtered(images[b, ..., c] * seen) + 1e-6 * average) / (filtered(seen) + 1e-6)
                np.testing.assert_allclose(own[b, ..., c], expected, atol=2e-3)


def test_where_no_visible_pixel_is_near_a_blur_is_their_mean():
    image = jnp.arange(64.0)[None, None].reshape(1, 64, 1)  # 64 patches of one pixel in a row
    keep, restore = jnp.array([[0, 1]]), jnp.arange(64)[None]
    predicted = rivals.blurred(image, keep, restore, size=(64, 1), patch=(1, 1))
    assert float(predicted[0, 0, -1, 0]) == pytest.approx(0.5)


@SHAPES
def test_the_nearest_normals_are_those_by_the_visible_patches(size, patch, channels):
    known, new, keep, restore, absent = case_of(size, patch, channels)
    predicted = np.asarray(jax.jit(rivals.nearest_mean)(known, new, keep, restore))
    x, y = np.asarray(new, np.float64), np.asarray(known, np.float64)
    for m in range(MASKS):
        for b in range(len(x)):
            away = ((y[:, ~absent[m]] - x[b, ~absent[m]]) ** 2).sum((1, 2))
            expected = y[np.argsort(away)[:5]].mean(0)
            np.testing.assert_allclose(predicted[b, m], expected, atol=1e-5)


def test_fewer_normals_than_neighbours_all_count():
    known, new, keep, restore, _ = case_of((12, 16), (4, 4), 1, normals=3)
    predicted = rivals.nearest_mean(known, new, keep, restore)
    expected = np.broadcast_to(np.asarray(known).mean(0), predicted.shape)
    np.testing.assert_allclose(predicted, expected, atol=1e-6)


@SHAPES
@pytest.mark.long_but_first
def test_one_predictor_holds_all_rivals_with_masks_shared_or_of_each_image(size, patch, channels):
    known, new, keep, restore, _ = case_of(size, patch, channels, images=3)
    found = rivals.rivals_of(rivals.KINDS, known, size, patch)
    assert found.names == ("29 components", "blur", "5 nearest normals")
    expected = [
        rivals.conditional_mean(rivals.components_of(known), new, keep, restore),
        rivals.blurred(new, keep, restore, size=size, patch=patch),
        rivals.nearest_mean(known, new, keep, restore),
    ]
    predict = jax.jit(found.predict)
    own = keep[:, None], restore[:, None]  # image i has mask i
    for name, values in zip(found.names, expected, strict=True):
        np.testing.assert_allclose(predict(found.parameters(name), new, keep, restore), values, atol=1e-5)
        each = predict(found.parameters(name), new, *own)[:, 0]
        np.testing.assert_allclose(each, np.asarray(values)[np.arange(3), np.arange(3)], atol=1e-4)
    assert predict._cache_size() == 2


def test_the_explained_share_is_that_of_the_variance_of_hidden_values():
    _, new, keep, restore, absent = case_of((12, 8), (2, 4), 3)
    prediction = new[:, None] + 0.1 * jax.random.normal(jax.random.key(2), (len(new), MASKS, *new.shape[1:]))
    sums = rivals.explained_sums(prediction, new, keep, restore)
    hide = np.broadcast_to(absent[None], prediction.shape[:3])
    truth = np.broadcast_to(np.asarray(new, np.float64)[:, None], prediction.shape)[hide].reshape(-1, 3)
    error = ((np.asarray(prediction, np.float64)[hide].reshape(-1, 3) - truth) ** 2).sum()
    expected = 1 - error / ((truth - truth.mean(0)) ** 2).sum()
    assert rivals.explained(np.asarray(sums), 3) == pytest.approx(expected, abs=1e-4)
    assert 0.5 < expected < 1
