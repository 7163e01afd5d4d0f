import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from jmae import baselines

RNG = np.random.default_rng(0)


def standardised(images):
    rows = images.reshape(len(images), -1).astype(np.float64)
    return (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)


def images(n, size, channels):
    """Images of a few smooth factors plus noise, float32 as the loader gives them."""
    factors = np.random.default_rng(7).normal(size=(40, *size, channels))
    mixed = np.tensordot(RNG.normal(size=(n, 40)) * np.linspace(3, 0.3, 40), factors, 1)
    return (mixed + 0.1 * RNG.normal(size=mixed.shape)).astype(np.float32)


SIZES = pytest.mark.parametrize(("size", "channels"), [((20, 24), 1), ((10, 12, 6), 2)])


@SIZES
def test_image_scores_agree_with_scikit_learn(size, channels):
    train, test = images(60, size, channels), images(9, size, channels)
    scores = baselines.image_scores(train, test)
    known, new = standardised(train), standardised(test)
    pca = PCA(30, svd_solver="full").fit(known)
    code = pca.transform(new)
    residual = ((new - pca.inverse_transform(code)) ** 2).mean(1)
    mahalanobis = EmpiricalCovariance().fit(pca.transform(known)).mahalanobis(code)
    nearest = NearestNeighbors(n_neighbors=5).fit(known).kneighbors(new)[0].mean(1)
    np.testing.assert_allclose(scores["mean intensity"], test.reshape(9, -1).mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores["low mean intensity"], -scores["mean intensity"])
    np.testing.assert_allclose(scores["standard deviation"], test.reshape(9, -1).std(1), rtol=1e-4)
    np.testing.assert_allclose(scores["low standard deviation"], -scores["standard deviation"])
    np.testing.assert_allclose(scores["PCA-30 error"], residual, rtol=1e-6)
    np.testing.assert_allclose(scores["Mahalanobis"], mahalanobis, rtol=1e-6)
    np.testing.assert_allclose(scores["5-NN"], nearest, rtol=1e-6)


@SIZES
def test_pixel_maps_hold_the_residual_where_it_is(size, channels):
    train, test = images(60, size, channels), images(3, size, channels)
    maps = baselines.pixel_maps(baselines.span_of(train), test)
    new = standardised(test)
    pca = PCA(30, svd_solver="full").fit(standardised(train))
    squared = (new - pca.inverse_transform(pca.transform(new))) ** 2
    np.testing.assert_allclose(maps["PCA-30 error"], squared.reshape(test.shape).mean(-1), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(maps["brightness"], test.mean(-1), rtol=1e-5, atol=1e-6)


def test_scores_but_brightness_ignore_exposure():
    train, test = images(40, (16, 16), 1), images(5, (16, 16), 1)
    before, after = baselines.image_scores(train, test), baselines.image_scores(train, 3 * test + 10)
    for name in ("PCA-30 error", "Mahalanobis", "5-NN"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-3)


def test_fewer_normals_than_components_still_score():
    scores = baselines.image_scores(images(6, (16, 16), 1), images(4, (16, 16), 1))
    assert all(np.isfinite(score).all() for score in scores.values())


def test_constant_images_score_finite():
    test = np.zeros((2, 16, 16, 1), np.float32)
    scores = baselines.image_scores(images(10, (16, 16), 1), test)
    assert all(np.isfinite(score).all() for score in scores.values())


def test_shrink_averages_whole_cells_and_keeps_the_mean_of_uneven_ones():
    image = RNG.random((2, 128, 96, 1)).astype(np.float32)
    small = baselines.shrink(image, 64)
    assert small.shape == (2, 64, 64, 1)
    rows = image.reshape(2, 64, 2, 96, 1).mean(2)
    np.testing.assert_allclose(small.mean(2), rows.mean(2), rtol=1e-5)
    np.testing.assert_allclose(small[:, :, 0], (rows[:, :, 0] + 0.5 * rows[:, :, 1]) / 1.5, rtol=1e-5)
    assert baselines.shrink(image[:, :32, :32], 64).shape == (2, 32, 32, 1)
