"""The U-Net over images with any number of axes, and the layers that PHiSeg shares with it.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, arXiv 1505.04597, in the form of baumgach/PHiSeg-code (`det_unet2D`),
which P-PII trains (Mueller et al., UNSURE 2023): average pooling, linear upsampling, batch norm before each ReLU, and
decoder levels as wide as the level below them. Differences, `ours:` dropout at the end of every level (P-PII does not
say where its MC U-Net has it), and half-pixel centres in the upsampling (TensorFlow 1 took pixel i/2, which shifts maps
by half a fine pixel a level).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from jmae.errors import InputError
from jmae.sharding import device_mean, over_samples
from jmae.target import target

NARROW = 4  # outputs up to which a 1x1 convolution is no matrix product on a GPU


def check_size(size: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """The map's size at each of `levels`, each axis half the one before until it is 1; InputError on an odd length."""
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


def pool(x: Float[Array, "b *size c"]) -> Float[Array, "b *half c"]:
    """Mean of blocks of 2 along every axis; an axis of length 1 stays."""
    size = x.shape[1:-1]
    split = [length for n in size for length in (max(1, n // 2), min(2, n))]
    return jnp.mean(x.reshape(len(x), *split, x.shape[-1]), axis=tuple(range(2, 2 * len(size) + 1, 2)))


def on_gpu() -> bool:
    """Whether programs are made for a GPU: there, each function below takes the form that reads and writes least."""
    return target().platform in ("cuda", "rocm")


def upsample(x: Float[Array, "b *half c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """Linear interpolation to `size`, along each axis the double or the same length; half-pixel centres, edges
    repeated: output 2i is x[i-1]/4 + 3x[i]/4 and output 2i+1 is 3x[i]/4 + x[i+1]/4."""
    axes = tuple(axis for axis, n in enumerate(size, 1) if n != x.shape[axis])
    return doubled_at_once(x, axes) if on_gpu() else doubled(x, axes)


def doubled(x: Float[Array, "b *half c"], axes: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """`upsample` along `axes`, one axis after the other in the type of `x`."""
    for axis in axes:
        cut = partial(jax.lax.slice_in_dim, x, axis=axis)
        before = jnp.concatenate([cut(0, 1), cut(0, -1)], axis)
        after = jnp.concatenate([cut(1, None), cut(-1, None)], axis)
        pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def doubled_at_once(x: Float[Array, "b *half c"], axes: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """`upsample` along `axes` as one sum of gathers in float32, rounded once.

    XLA's GPU compiler fuses it with the concatenation behind it and its gradient with the slice before it, where
    `doubled` writes each axis to memory.
    """
    own = lambda n: np.arange(2 * n) // 2
    other = lambda n: own(n) + np.tile([-1, 1], n)
    return weighted(jnp.asarray(x, jnp.float32), axes, lambda n: [(0.75, own(n)), (0.25, other(n))]).astype(x.dtype)


def _doubled_at_once_gradient(axes: tuple[int, ...], _: None, g: Array) -> tuple[Array]:
    weights = {-1: 0.25, 0: 0.75, 1: 0.75, 2: 0.25}  # of outputs 2i - 1 to 2i + 2
    taps = lambda n: [(weight, np.arange(0, n, 2) + k) for k, weight in weights.items()]
    return (weighted(jnp.asarray(g, jnp.float32), axes, taps).astype(g.dtype),)


doubled_at_once.defvjp(lambda x, axes: (doubled_at_once(x, axes), None), _doubled_at_once_gradient)


def weighted(x: Array, axes: tuple[int, ...], taps: Callable[[int], list[tuple[float, np.ndarray]]]) -> Array:
    """Weighted sums of elements along each of `axes`; `taps` gives the weights and the places of an axis's length.
    Places outside count as the edge."""
    if not axes:
        return x
    axis, n = axes[0], x.shape[axes[0]]
    total = jnp.zeros((), x.dtype)
    for weight, places in taps(n):
        at = (slice(None),) * axis + (np.clip(places, 0, n - 1),)
        total = total + weight * weighted(x.at[at].get(mode="promise_in_bounds"), axes[1:], taps)
    return total


def dropout(x: Float[Array, " b *n"], keys: Key[Array, " b"], rate: float) -> Float[Array, " b *n"]:
    """Each element 0 with probability `rate`, else divided by 1 - rate; a sample's mask follows from its key alone."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def totals(arrays: tuple[Float[Array, "..."], ...], axes: tuple[int, ...]) -> tuple[Float[Array, "..."], ...]:
    """The sum of each array over `axes`. On a GPU one reduction of all, as they come of the same memory."""
    if not on_gpu():
        return tuple(jnp.sum(array, axes) for array in arrays)
    zeros = tuple(jnp.zeros((), array.dtype) for array in arrays)
    return tuple(jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes))


@jax.custom_vjp
def narrow_product(x: Float[Array, "b *size c"], matrix: Float[Array, "c d"]) -> Float[Array, "b *size d"]:
    """`x` @ `matrix` for a small d, by element-wise products: on a GPU these fuse with the norm before them, so that
    neither `x` nor its gradient is written to memory."""
    wide, columns = x.astype(jnp.float32), matrix.T.astype(jnp.float32)  # sums are float32, as a product's are
    return jnp.stack(totals(tuple(wide * column for column in columns), (x.ndim - 1,)), -1).astype(x.dtype)


def _narrow_product_gradient(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, matrix = kept
    wide, columns = x.astype(jnp.float32), matrix.T.astype(jnp.float32)
    parts = tuple(jnp.split(g.astype(jnp.float32), g.shape[-1], -1))
    of_x = sum((part * column for part, column in zip(parts, columns, strict=True)), jnp.zeros(()))
    of_matrix = jnp.stack(totals(tuple(wide * part for part in parts), tuple(range(x.ndim - 1))), -1)
    return of_x.astype(x.dtype), of_matrix.astype(matrix.dtype)


narrow_product.defvjp(lambda x, matrix: (narrow_product(x, matrix), (x, matrix)), _narrow_product_gradient)


@over_samples
def convolve(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: Any, **__: Any
) -> Float[Array, "b *size d"]:
    """Convolution of stride 1, zeros outside; a kernel of even length has its extra place below. Takes the place of
    `lax.conv_general_dilated`.

    XLA's CPU is fast over two axes only. There, neighbours along the first of more axes become channels and the axis
    joins the batch: on one core, 32x32x8, batch 8, width 8 / 16 / 32, forward and backward took 24 / 66 / 186 instead
    of 139 / 278 / 573 ms. Over two axes matrix products do not come near, but where the kernel is longer than the
    image: 256x2x2x64 to 128 took 5 instead of 42 ms; and where channels are so few that XLA leaves its fast form:
    256x16x16x1 to 16 took 2.4 instead of 5.2 ms forward and 6.6 instead of 8.3 with gradients, 64x32x32x1 to 8 took
    2.0 instead of 5.4 and 2.8 instead of 4.8, but 4x128x128x1 to 32 would take 2.5 instead of 1.4 and 11.7 instead of
    4.9.
    """
    rank, k = x.ndim - 2, kernel.shape[0]
    if rank == 0:
        return x @ kernel
    if on_gpu() and max(kernel.shape[:-2]) == 1 and kernel.shape[-1] <= NARROW:
        return narrow_product(x, kernel.reshape(kernel.shape[-2:]))
    few = x.shape[-1] * kernel.shape[-1] < 32
    if target().platform == "cpu" and (rank != 2 or few or max(x.shape[1:-1]) < k):
        padded = jnp.pad(x, ((0, 0), (k // 2, (k - 1) // 2), *[(0, 0)] * rank))
        near = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(k)], axis=-1)
        flat = jnp.moveaxis(kernel, 0, -3).reshape(*kernel.shape[1:-2], -1, kernel.shape[-1])
        return convolve(near.reshape(-1, *near.shape[2:]), flat).reshape(*x.shape[:-1], -1)
    axes = "".join(map(str, range(rank)))
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    ends = [(k // 2, (k - 1) // 2) for k in kernel.shape[:rank]]
    return jax.lax.conv_general_dilated(x, kernel, (1,) * rank, ends, dimension_numbers=numbers)


def conv(
    rank: int,
    inputs: int,
    outputs: int,
    length: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
    form: Callable = convolve,
) -> nnx.Conv:
    """Convolution with a kernel of `length` along every axis, He normal; float32 parameters, `dtype` arithmetic."""
    return nnx.Conv(
        inputs,
        outputs,
        (length,) * rank,
        use_bias=bias,
        kernel_init=nnx.initializers.he_normal(),
        dtype=dtype,
        conv_general_dilated=form,
        rngs=rngs,
    )


def moments(x: Float[Array, "b *size c"], shift: Float[Array, " c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and variance of each channel, in one pass over `x`: E[d] + shift and E[d^2] - E[d]^2 of d = x - shift, so
    that little cancels where `shift` is near the mean.

    The shift in use is the running mean, which every device has. In the first steps, before it has come near, a mean of
    100 deviations costs the variance some per cent, as without a shift.
    """
    apart = x.astype(jnp.float32) - shift
    first, second = means((apart, apart * apart))
    return shift + first, jnp.maximum(second - first * first, 0)


def means(arrays: tuple[Float[Array, "b *size c"], ...]) -> tuple[Float[Array, " c"], ...]:
    """The mean of each channel of every array, over the devices of a `jax.pmap` step too."""
    count = arrays[0].size // arrays[0].shape[-1]
    found = tuple(total / count for total in totals(arrays, tuple(range(arrays[0].ndim - 1))))
    return device_mean(found)


def normalised(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias in float32."""
    return (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def batch_norm(
    x: Float[Array, "b *size c"],
    mean: Float[Array, " c"],
    var: Float[Array, " c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
    activation: Callable[[Array], Array],
) -> Float[Array, "b *size c"]:
    """activation(normalised(x)) in the type of `x`, where `mean` and `var` are the moments of `x` over the batch.

    Its gradient is that of batch norm (Ioffe and Szegedy, ICML 2015): `mean` and `var` depend on `x` and get none of
    their own. It keeps `x` in its own type and the moments, and reads `x` and the result's gradient twice: once for
    two sums a channel, once for the gradient of `x`.
    """
    return activation(normalised(x, mean, var, scale, bias, epsilon)).astype(x.dtype)


def _batch_norm_gradient(
    epsilon: float, activation: Callable[[Array], Array], kept: tuple[Array, ...], g: Array
) -> tuple:
    x, mean, var, scale, bias = kept
    rate = jax.lax.rsqrt(var + epsilon)
    unit = (x.astype(jnp.float32) - mean) * rate
    (g,) = jax.vjp(activation, normalised(x, mean, var, scale, bias, epsilon))[1](g.astype(jnp.float32))
    sums = totals((g, g * unit), tuple(range(x.ndim - 1)))
    over, over_unit = device_mean(tuple(total / (x.size // x.shape[-1]) for total in sums))
    of_x = scale * rate * (g - over - unit * over_unit)
    return of_x.astype(x.dtype), jnp.zeros_like(mean), jnp.zeros_like(var), sums[1], sums[0]


batch_norm.defvjp(lambda *given: (batch_norm(*given), given[:5]), _batch_norm_gradient)


def batch_norm_relu(*given: Any) -> Float[Array, "b *size c"]:
    """`batch_norm` with ReLU."""
    return batch_norm(*given, jax.nn.relu)


class Convs(nnx.Module):
    """Convolutions in a row to `widths` channels, each with batch norm (momentum 0.99, epsilon 1e-3) and ReLU.

    Statistics and norm in float32. `remat` computes them again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        rank: int,
        inputs: int,
        widths: tuple[int, ...],
        dtype: jnp.dtype,
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
        """Batch norm and ReLU; in training with the moments of the batch, which move the running ones."""
        variables: list[Any] = [norm.mean, norm.var, norm.scale, norm.bias]
        mean, var, scale, bias = (variable[...] for variable in variables)
        if not train:
            return jax.nn.relu(normalised(x, mean, var, scale, bias, norm.epsilon)).astype(self.dtype)
        found = moments(jax.lax.stop_gradient(x), mean)
        norm.mean[...], norm.var[...] = (
            norm.momentum * old + (1 - norm.momentum) * new for old, new in zip((mean, var), found, strict=True)
        )
        return batch_norm_relu(x, *found, scale, bias, norm.epsilon)

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
    """Three convolutions a level, pooled in between; gives the features of every level, finest first."""

    def __init__(
        self, rank: int, channels: int, widths: tuple[int, ...], dtype: jnp.dtype, remat: bool, *, rngs: nnx.Rngs
    ):
        pairs = zip((channels, *widths), widths, strict=False)
        self.levels = nnx.List([Convs(rank, a, (b,) * 3, dtype, remat, rngs=rngs) for a, b in pairs])

    def __call__(
        self,
        x: Float[Array, "b *size c"],
        *,
        train: bool,
        drop: Callable[[Array, int], Array] = lambda x, place: x,
    ) -> list[Float[Array, "b *_ d"]]:
        check_size(x.shape[1:-1], len(self.levels))
        features: list[Array] = []
        for i, level in enumerate(self.levels):
            x = level(pool(features[-1]) if features else x, train=train)
            features.append(drop(x, i))
        return features


class UNet(nnx.Module):
    """Encoder, decoder with skips, three 1x1 convolutions of `head` channels, logits in float32.

    `widths` has a level each; sizes as `check_size` has them. `dropout` is a rate, active where a call gets keys.
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
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(rank, channels, widths, dtype, remat, rngs=rngs)
        below = (*widths[1:], widths[-1])  # channels of what comes up to a level
        triples = zip(widths[:-1], below[1:], widths[1:], strict=True)
        self.decoder = nnx.List([Convs(rank, a + b, (c,) * 3, dtype, remat, rngs=rngs) for a, b, c in triples])
        self.head = Convs(rank, below[0], (head,) * 3, dtype, remat, length=1, rngs=rngs)
        self.out = conv(rank, head, outputs, 1, jnp.float32, rngs, bias=True)
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
