"""A masked autoencoder over patches of images with any number of axes.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377; consulted and reproduced
to 1e-4: facebookresearch/mae (2D) and LangDaniel/MAEMI (3D). Differences: parameters of equal blocks are stacked,
position codes are computed, not stored, and patches are flattened before a dense layer where the official code
convolves (the same product).
"""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jmae.masking import take
from jmae.nn.transformer import Block, Blocks, layer_norm, linear
from jmae.patches import grid_of, sincos_positions
from jmae.sharding import over_samples

token_init = nnx.initializers.normal(0.02)


@jax.custom_vjp
def float32_product(x: Float[Array, "*n d"], kernel: Float[Array, "d v"]) -> Float[Array, "*n v"]:
    """x @ kernel, summed and given in float32 whatever the type of the operands.

    The gradients are those of a product in that type, so only the result is larger.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return float32_product(x, kernel), (x, kernel)


def _backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    gradient, samples = gradient.astype(x.dtype), tuple(range(x.ndim - 1))
    return gradient @ kernel.T, jnp.tensordot(x, gradient, (samples, samples))


float32_product.defvjp(_forward, _backward)


class MAE(nnx.Module):
    """Encoder over the visible tokens, light decoder over all tokens.

    `positions(grid, width)` gives the fixed position codes. Arithmetic is in `dtype`; parameters, statistics of norms
    and the prediction are in float32. `Block` explains `memory`, `Blocks` explains `long_skips`.
    """

    def __init__(
        self,
        *,
        size: tuple[int, ...],
        patch: tuple[int, ...],
        channels: int,
        width: int,
        depth: int,
        heads: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        mlp_ratio: float = 4.0,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        positions: Callable[[tuple[int, ...], int], np.ndarray] = sincos_positions,
        memory: int = 0,
        long_skips: bool = False,
        decoder_block: Callable[..., nnx.Module] = Block,
        rngs: nnx.Rngs,
    ):
        def blocks(depth: int, make: Callable[..., nnx.Module], width: int, heads: int, **other: int) -> Blocks:
            one = lambda: make(width, heads, mlp_ratio, dtype, rngs=rngs, **other)
            return Blocks(depth, one, remat, long_skips=long_skips)

        values = prod(patch) * channels
        self.grid, self.width, self.decoder_width, self.dtype = (
            grid_of(size, patch),
            width,
            decoder_width,
            dtype,
        )
        self.positions = positions
        self.class_token = nnx.Param(token_init(rngs.params(), (1, 1, width)))
        self.patch_embed = linear(values, width, dtype, rngs)
        self.encoder = blocks(depth, Block, width, heads, memory=memory)
        self.encoder_norm = layer_norm(width, dtype, rngs)
        self.decoder_embed = linear(width, decoder_width, dtype, rngs)
        self.mask_token = nnx.Param(token_init(rngs.params(), (1, 1, decoder_width)))
        self.decoder = blocks(decoder_depth, decoder_block, decoder_width, decoder_heads)
        self.decoder_norm = layer_norm(decoder_width, dtype, rngs)
        self.predict = linear(decoder_width, values, dtype, rngs)

    def embed(self, patches: Float[Array, "b n v"]) -> Float[Array, "b n d"]:
        """All patches as tokens with their position codes, without the class token."""
        return over_samples(self.patch_embed)(patches) + self.positions(self.grid, self.width).astype(self.dtype)[None]

    def with_class(self, tokens: Float[Array, "b k d"]) -> Float[Array, "b k+1 d"]:
        """The class token before the others."""
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(tokens), 1, self.width))
        return jnp.concatenate([first, tokens], axis=1)

    def encode(self, tokens: Float[Array, "b k d"]) -> Float[Array, "b k+1 d"]:
        """Output of the encoder for tokens, after the final norm; the class token stands first."""
        return self.encoder_norm(self.encoder(self.with_class(tokens)))

    def decode(
        self, latent: Float[Array, "b m d"], restore: Int[Array, "b n"], *context: Array
    ) -> Float[Array, "b n v"]:
        """A prediction for every token, in float32. Hidden places hold the mask token. Blocks get `context`, too."""
        x = over_samples(self.decoder_embed)(latent)
        absent = (len(x), restore.shape[1] + 1 - x.shape[1], self.decoder_width)
        mask_token = jnp.broadcast_to(self.mask_token[...].astype(self.dtype), absent)
        tokens = take(jnp.concatenate([x[:, 1:], mask_token], axis=1), restore)
        tokens = tokens + self.positions(self.grid, self.decoder_width).astype(self.dtype)[None]
        x = self.decoder_norm(self.decoder(jnp.concatenate([x[:, :1], tokens], axis=1), *context))
        return over_samples(self.predicted)(x[:, 1:])

    def predicted(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """The last dense layer. bfloat16 would round its results to 8 bits, and MAEMI takes the least of 18 errors."""
        kernel, bias = self.predict.kernel[...], self.predict.bias[...]  # type: ignore[index]
        return float32_product(tokens, kernel.astype(tokens.dtype)) + bias[None, None]

    def __call__(
        self, patches: Float[Array, "b n v"], keep: Int[Array, "b k"], restore: Int[Array, "b n"]
    ) -> Float[Array, "b n v"]:
        """Prediction of all patches from those at `keep`; `restore` as `masking.order_of` gives it."""
        return self.decode(self.encode(take(self.embed(patches), keep)), restore)

    def predictions(
        self, patches: Float[Array, "b n v"], keep: Int[Array, "*own m k"], restore: Int[Array, "*own m n"]
    ) -> Float[Array, "b m n v"]:
        """Predictions of all patches under m masks, which the samples share; with a leading axis each has its own.

        Samples come first, so that they stay on the devices over which they are split.
        """
        (b, n, _), (m, k) = patches.shape, keep.shape[-2:]
        tokens = self.embed(patches)
        if keep.ndim == 2:
            seen = tokens[:, keep].reshape(b * m, k, -1)
            restore = jnp.broadcast_to(restore[None], (b, m, n))
        else:
            seen = take(jnp.repeat(tokens, m, axis=0), keep.reshape(b * m, k))
        return self.decode(self.encode(seen), restore.reshape(b * m, n)).reshape(b, m, n, -1)
