"""Losses; each returns one value a sample."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_mse(
    prediction: Float[Array, "b n v"], target: Float[Array, "b n v"], hidden: Bool[Array, "b n"]
) -> Float[Array, " b"]:
    """Mean squared error of a patch, averaged over the hidden patches of each sample (He et al. 2022, section 3;
    raw pixels, no normalisation of patches). Every sample hides equally many, so the mean over the batch is the
    official code's loss."""
    error = jnp.mean((prediction - target) ** 2, axis=-1)
    return jnp.sum(error * hidden, axis=-1) / jnp.sum(hidden, axis=-1)
