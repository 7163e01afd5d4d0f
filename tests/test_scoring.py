"""Filters and pooling of anomaly maps against SciPy and NumPy; AUROC against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from jmae.errors import InputError
from jmae.scoring import auroc, minimum_filter, top_mean


@pytest.mark.parametrize("size", [(3, 3, 2), (2, 3, 1), (5, 4, 3), (3, 3)])
def test_the_minimum_filter_is_scipys(size):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *(7, 6, 5)[: len(size)], 3)).astype(np.float32)
    expected = np.stack(
        [np.stack([ndimage.minimum_filter(image[..., c], size) for c in range(3)], -1) for image in images]
    )
    np.testing.assert_array_equal(jax.jit(lambda x: minimum_filter(x, size))(images), expected)


def test_an_infinite_rim_is_as_if_it_were_not_there():
    image = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 5, 4, 1)), jnp.float32)
    rim = jnp.pad(image, [(0, 0), (0, 3), (0, 2), (0, 2), (0, 0)], constant_values=np.inf)
    np.testing.assert_array_equal(minimum_filter(rim, (3, 3, 2))[:, :6, :5, :4], minimum_filter(image, (3, 3, 2)))


def test_the_top_mean_is_over_the_highest_share_of_the_region():
    values = np.arange(100.0).reshape(10, 10)
    assert top_mean(values, None, 0.05) == np.mean([95, 96, 97, 98, 99])
    assert top_mean(values, values < 50, 0.05) == np.mean([48, 49])  # round(2.5) is 2
    assert top_mean(values, values == 7, 0.01) == 7


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_on_the_device_is_scikit_learn_s_with_ties_and_without_the_unlabelled(levels):
    rng, run = np.random.default_rng(levels), jax.jit(auroc)
    scores, labels = rng.integers(0, levels, 60).astype(np.float32), rng.integers(-1, 2, 60)
    known = labels >= 0
    expected = roc_auc_score(labels[known], scores[known])
    np.testing.assert_allclose(run(scores, labels), expected, 1e-6)
    np.testing.assert_allclose(run(scores, labels == 1), roc_auc_score(labels == 1, scores), 1e-6)  # a mask will do
    lost = lambda label: np.where(np.arange(60) == np.flatnonzero(labels == label)[0], np.nan, scores)
    np.testing.assert_allclose(run(lost(-1), labels), expected, 1e-6)
    assert np.isnan(run(lost(0), labels)) and np.isnan(run(-lost(1), labels))
    for one in (0, 1):
        assert np.isnan(run(scores, np.where(labels == one, one, -1)))


def test_auroc_on_the_device_counts_every_pair_of_many():
    n = 2**16 - 1
    scores, labels = np.arange(n, dtype=np.float32), np.arange(n) >= n // 2
    assert jax.jit(auroc)(scores, labels) == 1  # n^2 / 4 pairs, all won
    with pytest.raises(InputError, match="fewer than 65536"):
        auroc(jnp.zeros(n + 1), jnp.zeros(n + 1, int))
