"""Filters and pooling of anomaly maps against SciPy and NumPy."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jmae.scoring import minimum_filter, top_mean


@pytest.mark.parametrize("size", [(3, 3, 2), (2, 3, 1), (5, 4, 3), (3, 3)])
def test_the_minimum_filter_is_scipys(size):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *(7, 6, 5)[: len(size)], 3)).astype(np.float32)
    expected = np.stack(
        [np.stack([ndimage.minimum_filter(image[..., c], size) for c in range(3)], -1) for image in images]
    )
    np.testing.assert_array_equal(jax.jit(lambda x: minimum_filter(x, size))(images), expected)


def test_an_infinite_rim_is_as_if_it_were_not_there():
    image = np.random.default_rng(1).normal(size=(1, 6, 5, 4, 1)).astype(np.float32)
    rim = np.pad(image, [(0, 0), (0, 3), (0, 2), (0, 2), (0, 0)], constant_values=np.inf)
    np.testing.assert_array_equal(minimum_filter(rim, (3, 3, 2))[:, :6, :5, :4], minimum_filter(image, (3, 3, 2)))


def test_the_top_mean_is_over_the_highest_share_of_the_region():
    values = np.arange(100.0).reshape(10, 10)
    assert top_mean(values, None, 0.05) == np.mean([95, 96, 97, 98, 99])
    assert top_mean(values, values < 50, 0.05) == np.mean([48, 49])  # round(2.5) is 2
    assert top_mean(values, values == 7, 0.01) == 7
