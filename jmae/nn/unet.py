"""The U-Net over images with any number of axes, and the layers that PHiSeg shares with it.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, arXiv 1505.04597, in the form of baumgach/PHiSeg-code (`det_unet2D`),
which P-PII trains (Mueller et al., UNSURE 2023). It has average pooling, linear upsampling, batch norm before each
ReLU, and decoder levels as wide as the level below them. Two differences are `ours:`

- dropout at the end of every level: P-PII does not say where its MC U-Net has dropout;
- half-pixel centres in the upsampling: TensorFlow 1 took pixel i/2, which shifts maps by half a fine pixel a level.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jmae.errors import InputError
from jmae.nn.conv import batch_norm_in_training, conv, dropout, normalised, pool, upsample

START = 0.15  # size of each weight of the last layer at the start, where there is a prior; He normal has about 0.5


def check_size(size: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """The size of the map at each level. Each axis halves from level to level until it is 1.

    Raises InputError for an odd length.
    """
    sizes = [tuple(size)]
    for _ in range(levels - 1):
        if any(n > 1 and n % 2 for n in sizes[-1]):
            by = 2 ** (levels - 1)
            raise InputError(
                f"size {tuple(size)} does not halve {levels - 1} times for {levels} levels: pad or crop it to"
                f" {tuple(n if n == 1 else -(-n // by) * by for n in size)}, divisible by {by}, or take fewer levels"
            )
        sizes.append(tuple(max(1, n // 2) for n in sizes[-1]))
    return sizes


class Convs(nnx.Module):
    """Convolutions in a row to `widths` channels, each with batch norm (momentum 0.99, epsilon 1e-3) and ReLU.

    Statistics and norm are float32. With `remat` the backward pass computes the activations again, in less memory.
    """

    def __init__(
        self,
        rank: int,
        inputs: int,
        widths: tuple[int, ...],
        dtype: DTypeLike,
        remat: bool = False,
        *,
        length: int = 3,
        rngs: nnx.Rngs,
    ):
        norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, dtype=jnp.float32, rngs=rngs)
        pairs = zip((inputs, *widths), widths, strict=False)
        self.convs = nnx.List([conv(rank, a, b, length, dtype, rngs) for a, b in pairs])
        self.norms = nnx.List([norm(b) for b in widths])
        self.dtype, self.remat = dtype, remat

    def normed(self, norm: nnx.BatchNorm, x: Array, train: bool) -> Array:
        """Batch norm and ReLU: by the moments of the batch in training, by the running moments otherwise."""
        variables: list[Any] = [norm.mean, norm.var, norm.scale, norm.bias]
        mean, var, scale, bias = (variable[...] for variable in variables)
        if train:  # the running mean is near the batch's, and every device has it
            return batch_norm_in_training(norm, x, mean, jax.nn.relu)
        return jax.nn.relu(normalised(x, mean, var, scale, bias, norm.epsilon)).astype(self.dtype)

    def row(self, x: Float[Array, "b *size c"], train: bool) -> Float[Array, "b *size d"]:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = self.normed(norm, layer(x), train)
        return x

    def __call__(self, x: Float[Array, "b *size c"], *, train: bool) -> Float[Array, "b *size d"]:
        if not self.remat:
            return self.row(x, train)
        graph, state = nnx.split(self)

        def pure(state, x):
            copy = nnx.merge(graph, state)
            return copy.row(x, train), nnx.state(copy, nnx.BatchStat)

        x, stats = jax.checkpoint(pure)(state, x)
        nnx.update(self, stats)
        return x


class Encoder(nnx.Module):
    """Levels of three convolutions, with pooling in between. A call gives the features of all levels, finest first."""

    def __init__(
        self, rank: int, channels: int, widths: tuple[int, ...], dtype: DTypeLike, remat: bool, *, rngs: nnx.Rngs
    ):
        pairs = zip((channels, *widths), widths, strict=False)
        self.levels = nnx.List([Convs(rank, a, (b,) * 3, dtype, remat, rngs=rngs) for a, b in pairs])

    def __call__(
        self,
        x: Float[Array, "b *size c"],
        *,
        train: bool,
        drop: Callable[[Array, int], Array] = lambda x, place: x,
    ) -> list[Float[Array, "b *_ _"]]:
        check_size(x.shape[1:-1], len(self.levels))
        features: list[Array] = []
        for i, level in enumerate(self.levels):
            x = level(pool(features[-1]) if features else x, train=train)
            features.append(drop(x, i))
        return features


class UNet(nnx.Module):
    """Encoder, decoder with skips, three 1x1 convolutions of `head` channels, logits in float32.

    `widths` are the channels of the levels. `check_size` says which sizes fit. `dropout` is a rate; it is in use where
    a call has keys. `prior` is about the probability of the last of two outputs that the untrained network gives: ours.
    The last layer then starts with that bias, and with weights of the size `START`, whose signs alternate over the
    channels. So no seed decides how the last layer starts. After a start at 0 its weights often became equal in sign.
    Their inputs are 0 or more, so the probability had a ceiling, which many maps reached. With a prior of 0 the last
    layer starts He normal, as published.
    """

    def __init__(
        self,
        *,
        rank: int,
        channels: int,
        outputs: int = 2,
        widths: tuple[int, ...] = (32, 64, 128, 192, 192),
        head: int = 32,
        dropout: float = 0.0,
        prior: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(rank, channels, widths, dtype, remat, rngs=rngs)
        below = (*widths[1:], widths[-1])  # channels that come up to each level
        triples = zip(widths[:-1], below[1:], widths[1:], strict=True)
        self.decoder = nnx.List([Convs(rank, a + b, (c,) * 3, dtype, remat, rngs=rngs) for a, b, c in triples])
        self.head = Convs(rank, below[0], (head,) * 3, dtype, remat, length=1, rngs=rngs)
        self.out = conv(rank, head, outputs, 1, jnp.float32, rngs, bias=True)
        if prior:
            signs = (-1.0) ** jnp.add.outer(jnp.arange(head), jnp.arange(outputs))
            self.out.kernel = nnx.Param(jnp.broadcast_to(START * signs, self.out.kernel.shape))
            self.out.bias = nnx.Param(jnp.log(jnp.array([1 - prior, prior], jnp.float32)))
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "b *size c"],
        *,
        train: bool,
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b *size outputs"]:
        def drop(x: Array, place: int) -> Array:
            if keys is None or self.dropout == 0:
                return x
            return dropout(x, jax.vmap(jax.random.fold_in, (0, None))(keys, place), self.dropout)

        *skips, x = self.encoder(x, train=train, drop=drop)
        for i, skip in reversed(list(enumerate(skips))):
            x = jnp.concatenate([upsample(x, skip.shape[1:-1]), skip], axis=-1)
            x = drop(self.decoder[i](x, train=train), len(skips) + 1 + i)
        return self.out(self.head(x, train=train))
