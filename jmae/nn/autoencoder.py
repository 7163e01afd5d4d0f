"""The networks of the trained rivals: an autoencoder with a bottleneck of few numbers, and a U-Net that denoises.

`Autoencoder` is the network of MedIAnomaly (`networks/ae.py`) and of DDAD (`models/autoencoder.py`), which differ in
the width of the dense layers alone. `Denoiser` is the U-Net of Kascenas et al. (`src/unet.py`), which MedIAnomaly has
too. Images have any number of axes. All arithmetic is float32, as in these codes.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jmae.errors import InputError
from jmae.nn.conv import convolve, pool
from jmae.nn.simsid import Layer, doubled
from jmae.nn.transformer import linear
from jmae.nn.unet import check_size
from jmae.patches import patchify, unpatchify
from jmae.sharding import over_samples

HALVINGS = 4  # of the autoencoder's encoder


# --- autoencoder ------------------------------------------------------------------------------------------------------


def shrunk(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: object, **__: object
) -> Float[Array, "b *half d"]:
    """Convolution of kernel 4, stride 2 and padding 1 along every axis; each length is even.

    The function takes the place of `lax.conv_general_dilated` in `nnx.Conv`. Like `simsid.halved` it is a convolution
    of stride 1 over blocks of 2: its gradients are fast on XLA's CPU.
    """
    rank, (c, d) = x.ndim - 2, kernel.shape[-2:]
    two = (2,) * rank
    x = jnp.pad(x, ((0, 0), *[(1, 1)] * rank, (0, 0)))
    blocks = patchify(x, two).reshape(len(x), *(n // 2 for n in x.shape[1:-1]), -1)
    flat = patchify(kernel.reshape(1, *kernel.shape[:rank], c * d), two).reshape(*two, -1, d)
    return convolve(blocks, flat)[(slice(None), *[slice(1, None)] * rank)]


class Autoencoder(nnx.Module):
    """Four convolutions that halve the image, dense layers to `latent` numbers, and the way back.

    Channels are `width`, 2, 4 and 4 times `width`. Every convolution but the last has batch norm and ReLU and no bias.
    The dense layers go over `hidden` units with batch norm and ReLU. The result has `outputs` channels without bounds.

    Raises InputError for a size that does not halve four times.
    """

    def __init__(
        self,
        *,
        size: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int,
        hidden: int,
        latent: int,
        rngs: nnx.Rngs,
    ):
        if any(n % 2**HALVINGS for n in size):
            by = 2**HALVINGS
            remedy = f"divisible by {by}, such as {tuple(max(by, round(n / by) * by) for n in size)}"
            raise InputError(f"data.size {tuple(size)} does not halve {HALVINGS} times: take a size {remedy}")
        widths = (channels, width, 2 * width, 4 * width, 4 * width)
        self.grid = (*(n // 2**HALVINGS for n in size), widths[-1])
        layer = partial(Layer, len(size), length=4, dtype=jnp.float32, bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, rngs=rngs)
        dense = partial(linear, dtype=jnp.float32, rngs=rngs)
        flat = prod(self.grid)
        self.encoder = nnx.List([layer(a, b, form=shrunk) for a, b in pairwise(widths)])
        self.enter, self.enter_norm, self.code = dense(flat, hidden), norm(hidden), dense(hidden, latent)
        self.leave, self.leave_norm, self.decode = dense(latent, hidden), norm(hidden), dense(hidden, flat)
        self.decoder = nnx.List([layer(a, b, form=doubled) for a, b in pairwise(widths[:0:-1])])
        self.out = plain(len(size), width, outputs, 4, doubled, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b *size c"], *, train: bool) -> Float[Array, "b *size outputs"]:
        for layer in self.encoder:
            x = layer(x, train=train)
        x = jax.nn.relu(self.enter_norm(self.enter(x.reshape(len(x), -1)), use_running_average=not train))
        x = jax.nn.relu(self.leave_norm(self.leave(self.code(x)), use_running_average=not train))
        x = self.decode(x).reshape(len(x), *self.grid)
        for layer in self.decoder:
            x = layer(x, train=train)
        return self.out(x)


def plain(
    rank: int, inputs: int, outputs: int, length: int, form: Callable, *, bias: bool = True, rngs: nnx.Rngs
) -> nnx.Conv:
    """A layer of convolution by `form`, in float32."""
    size = (length,) * rank
    return nnx.Conv(inputs, outputs, size, use_bias=bias, conv_general_dilated=form, rngs=rngs)


# --- U-Net ------------------------------------------------------------------------------------------------------------


@over_samples
def standardised(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: object, **__: object
) -> Float[Array, "b *size d"]:
    """Convolution of kernel 3 with mirrored borders and a standardised kernel, in place of `conv_general_dilated`.

    The weights of each output get mean 0 and deviation 1: (w - mean) / (deviation + 1e-5), by n - 1.
    """
    rank, axes = x.ndim - 2, tuple(range(kernel.ndim - 1))
    kernel = kernel - jnp.mean(kernel, axes, keepdims=True)
    kernel = kernel / (jnp.std(kernel, axes, keepdims=True, ddof=1) + 1e-5)
    x = jnp.pad(x, ((0, 0), *[(1, 1)] * rank, (0, 0)), mode="reflect")
    letters = "".join(map(str, range(rank)))
    layouts = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return jax.lax.conv_general_dilated(x, kernel, (1,) * rank, "VALID", dimension_numbers=layouts)


def expanded(
    x: Float[Array, "b *half c"], kernel: Float[Array, "*kernel c d"], *_: object, **__: object
) -> Float[Array, "b *size d"]:
    """Transposed convolution of kernel 2 and stride 2: each place becomes a block of 2 along every axis."""
    rank = x.ndim - 2
    matrix = jnp.moveaxis(kernel, -2, 0).reshape(x.shape[-1], -1)
    blocks = (x.reshape(-1, x.shape[-1]) @ matrix).reshape(len(x), -1, matrix.shape[1])
    return unpatchify(blocks, tuple(2 * n for n in x.shape[1:-1]), (2,) * rank)


def groups_of(channels: int) -> int:
    """The groups of a group norm: the median divisor of `channels`, or the larger of the two in the middle."""
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    return divisors[len(divisors) // 2]


class Block(nnx.Module):
    """Twice: a `standardised` convolution with bias, swish, group norm."""

    def __init__(self, rank: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List([plain(rank, n, outputs, 3, standardised, rngs=rngs) for n in (inputs, outputs)])
        norm = partial(nnx.GroupNorm, num_groups=groups_of(outputs), epsilon=1e-5, rngs=rngs)
        self.norms = nnx.List([norm(outputs) for _ in range(2)])

    def __call__(self, x: Float[Array, "b *size c"]) -> Float[Array, "b *size d"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(jax.nn.swish(conv(x)))
        return x


class Denoiser(nnx.Module):
    """A U-Net with a `Block` a level, pooling by means, transposed convolutions upwards, and a last 1 x 1 convolution.

    `widths` are the channels of the levels. The network has no batch norm, so that training and test are alike.

    Raises InputError for a size that does not halve from level to level, or ends below 2.
    """

    def __init__(self, *, size: tuple[int, ...], channels: int, outputs: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        if min(check_size(size, len(widths))[-1]) < 2:
            raise InputError(f"data.size {tuple(size)} is too small for {len(widths)} levels: take fewer dae.widths")
        rank = len(size)
        self.down = nnx.List([Block(rank, a, b, rngs=rngs) for a, b in pairwise((channels, *widths))])
        steps = list(pairwise(widths[::-1]))
        self.up = nnx.List([plain(rank, a, b, 2, expanded, rngs=rngs) for a, b in steps])
        self.join = nnx.List([Block(rank, 2 * b, b, rngs=rngs) for _, b in steps])
        self.out = linear(widths[0], outputs, jnp.float32, rngs)

    def __call__(self, x: Float[Array, "b *size c"], *, train: bool) -> Float[Array, "b *size outputs"]:
        skips: list[Array] = []
        for block in self.down:
            skips.append(block(pool(skips[-1]) if skips else x))
        x = skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(jnp.concatenate([up(x), skips.pop()], -1))
        return self.out(x)
