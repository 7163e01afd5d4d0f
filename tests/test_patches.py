"""Patches and position codes, 2D and 3D."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmae.errors import InputError
from jmae.patches import grid_of, patchify, sincos_positions, unpatchify

CASES = [((12, 20), (4, 5), 3), ((8, 6, 10), (2, 3, 5), 2), ((15, 7), (5, 7), 1), ((4, 4, 4), (4, 2, 1), 1)]


@pytest.mark.parametrize("size, patch, channels", CASES)
def test_unpatchify_undoes_patchify(size, patch, channels):
    image = np.random.default_rng(0).normal(size=(2, *size, channels)).astype(np.float32)
    assert np.array_equal(unpatchify(patchify(jnp.asarray(image), patch), size, patch), image)


@pytest.mark.parametrize("size, patch, channels", CASES)
def test_tokens_follow_the_grid_and_values_the_patch_in_c_order(size, patch, channels):
    image = np.random.default_rng(0).normal(size=(1, *size, channels)).astype(np.float32)
    tokens = np.asarray(patchify(jnp.asarray(image), patch))[0]
    for number, place in enumerate(np.ndindex(*grid_of(size, patch))):
        cut = tuple(slice(g * p, (g + 1) * p) for g, p in zip(place, patch, strict=True))
        assert np.array_equal(tokens[number], image[0][cut].reshape(-1))


def test_a_size_that_the_patch_does_not_divide_is_refused_with_the_next_larger_one():
    with pytest.raises(InputError, match=r"\(97, 96, 32\) is not divisible by patch \(8, 8, 8\).*\(104, 96, 32\)"):
        grid_of((97, 96, 32), (8, 8, 8))
    with pytest.raises(InputError, match="one value an axis"):
        grid_of((96, 96), (8, 8, 8))


@pytest.mark.parametrize("grid, width", [((3, 5), 16), ((2, 3, 4), 36), ((4,), 6), ((2, 2, 2), 32)])
def test_position_codes_are_sines_then_cosines_of_each_axis_last_axis_first(grid, width):
    k = width // (2 * len(grid))
    expected = np.zeros((int(np.prod(grid)), width))
    for number, place in enumerate(np.ndindex(*grid)):
        for axis, coordinate in enumerate(reversed(place)):
            for i in range(k):
                angle = coordinate / 10000 ** (i / k)
                expected[number, 2 * k * axis + i] = np.sin(angle)
                expected[number, 2 * k * axis + k + i] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(grid, width), expected, atol=1e-6)


def test_a_width_too_small_for_the_axes_is_refused():
    with pytest.raises(InputError, match="at least 6"):
        sincos_positions((2, 2, 2), 4)
