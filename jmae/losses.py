"""Losses. Each one states its mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmae.nn.phiseg import Normal, accumulated


def masked_mse(
    prediction: Float[Array, "*b n v"], target: Float[Array, "*#b n v"], hidden: Bool[Array, "*b n"]
) -> Float[Array, " *b"]:
    """The mean over each sample's hidden patches of the mean squared error of a patch (He et al. 2022, section 3).

    Pixels are raw: patches are not normalised. Every sample hides equally many patches, so that the mean over the batch
    is the loss of the official code.
    """
    error = jnp.mean((prediction - target) ** 2, axis=-1)
    return jnp.sum(error * hidden, axis=-1) / jnp.sum(hidden, axis=-1)


def soft_cross_entropy(logits: Float[Array, "b *size 2"], target: Float[Array, " b *size"]) -> Float[Array, " b *size"]:
    """Cross-entropy of each pixel with the soft target (1 - y, y), y from 0 to 1.

    It is log(1 + e^d) - y d, where d is the difference of the two logits: the binary cross-entropy of sigmoid(d).
    """
    margin = logits[..., 1] - logits[..., 0]
    return jax.nn.softplus(margin) - target * margin


def gaussian_kl(q: Normal, p: Normal) -> Float[Array, "b *_ z"]:
    """KL(q || p) = log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2 of each element of two diagonal normals.

    A normal is (mean, standard deviation). All variances are 1e-10 wider, so that the result is finite, and 0 for equal
    normals. PHiSeg's code widens those in the divisor and the logarithms only.
    """
    (mean_q, deviation_q), (mean_p, deviation_p) = q, p
    var_q, var_p = deviation_q**2 + 1e-10, deviation_p**2 + 1e-10
    return 0.5 * (jnp.log(var_p) - jnp.log(var_q) + (var_q + (mean_q - mean_p) ** 2) / var_p - 1)


def hierarchical_loss(
    logits: list[Float[Array, "b *size 2"]], q: list[Normal], p: list[Normal], y: Float[Array, " b *size"]
) -> Float[Array, ""]:
    """PHiSeg's loss (arXiv 1906.04045, section 2; weights as in its code), a mean over the batch.

    It is a sum over the latent levels i, finest first. Each level adds the cross-entropy of s_acc(i), summed over
    pixels, and 4^i KL(q_i || p_i), summed over cells.
    """
    entropies = [jnp.sum(soft_cross_entropy(s, y)) for s in accumulated(logits)]
    divergences = [4**i * jnp.sum(gaussian_kl(*pair)) for i, pair in enumerate(zip(q, p, strict=True))]
    return sum(entropies + divergences, jnp.float32(0)) / len(y)


def discriminator_loss(real: Float[Array, " b"], fake: Float[Array, " b"]) -> Float[Array, ""]:
    """-mean[log D(I) + log(1 - D(G(I)))] of logits (SimSID report, Alg. 4.11; D maximises its Eq. 5.6).

    It is the sum of two binary cross-entropies: of real images as 1, and of generated ones as 0.
    """
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def kl_divergence(p: Float[Array, "b n"], q: Float[Array, "b n"]) -> Float[Array, " b"]:
    """KL(P || Q) of each pair of rows, which are first scaled to sum to one (SimSID report, Eq. 5.2).

    Then 1e-10 is added to every mass, and the rows are scaled again. A row of zeros counts as equal masses. Results
    that rounding puts below 0 are 0.
    """
    masses = lambda x: x / jnp.maximum(jnp.sum(x, -1, keepdims=True), 1e-30)
    p, q = (masses(masses(x) + 1e-10) for x in (p, q))
    return jnp.maximum(jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1), 0)


def pixel_kl(image: Float[Array, " b *size"], made: Float[Array, " b *size"]) -> Float[Array, " b"]:
    """KL of images in [0, 1], clipped, whose pixels are the masses. It is near 1/2 MSE / mean^2."""
    return kl_divergence(*(jnp.clip(x, 0, 1).reshape(len(x), -1) for x in (image, made)))


def histogram_kl(image: Float[Array, " b *size"], made: Float[Array, " b *size"]) -> Float[Array, " b"]:
    """KL of the histograms of images in [0, 1], clipped, with 256 equal bins."""

    def histogram(x: Array) -> Array:
        bins = jnp.minimum(jnp.clip(x, 0, 1) * 256, 255).astype(jnp.int32)
        return jnp.zeros(256).at[bins.ravel()].add(1 / bins.size)

    return kl_divergence(jax.vmap(histogram)(image), jax.vmap(histogram)(made))
