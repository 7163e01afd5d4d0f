"""The preparation of stored values on the device against that of the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jmae.data import on_device
from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.preparation import prepared_image


def both(values, bits=0, **changes) -> tuple[np.ndarray, np.ndarray]:
    """The image as the host and as the device prepares it."""
    data = {"size": (12, 10), "channels": values.shape[-1], "window": (), "equalise": False, "equalise_exact": False}
    data = ConfigDict(data | changes)
    stored = Image(values.astype(np.float32), (1.0, 1.0), None, bits)
    row = Row("a", "", "test", None, tuple("abc"[: values.shape[-1]]))
    one = jax.jit(lambda image, bits: on_device.prepared(image, bits, data))
    return prepared_image(row, data, stored), np.asarray(one(jnp.asarray(stored.array), jnp.int32(bits)))


@pytest.mark.parametrize(
    ("value", "offset", "bits", "window"),
    [(255, 0, 8, ()), (103, 0, 8, ()), (-1000, 0, 0, (-1024, 3071)), (300, 30_000, 0, ())],
)
def test_an_even_area_stays_even_where_exact_values_are_ranked(value, offset, bits, window):
    values = np.random.default_rng(0).integers(0, 256, (71, 53, 1)).astype(np.float32)
    values[:40] = value
    expected, found = both(values + offset, bits, equalise=True, equalise_exact=True, window=window)
    assert np.unique(expected, return_counts=True)[1].max() > 0.4 * expected.size
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 31, 1), (31, 1, 3), (2, 3, 1)])
@pytest.mark.parametrize("equalise", [False, True])
def test_images_that_are_smaller_than_the_network_has_them(shape, equalise):
    expected, found = both(np.random.default_rng(1).integers(0, 4096, shape), equalise=equalise)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-6)
