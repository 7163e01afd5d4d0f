"""Convolution networks' layers over images with any number of axes: convolution, pooling, upsampling, batch norm.

Most functions have two forms: a plain one, and one for GPUs that reads and writes less memory. Both give the same
values to rounding. The target of the program (`jmae.target`) selects the form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jmae.nn.norm import on_last_axes
from jmae.sharding import device_mean, over_samples
from jmae.target import target

MOST_NARROW_OUTPUTS = 4  # with at most so many outputs, a 1x1 convolution on a GPU is no matrix product


def on_gpu() -> bool:
    """Whether the program is for a GPU."""
    return target().platform in ("cuda", "rocm")


# --- pooling and upsampling -------------------------------------------------------------------------------------------


def pool(x: Float[Array, "b *size c"]) -> Float[Array, "b *half c"]:
    """Mean of blocks of 2 along every axis. An axis of length 1 stays."""
    size = x.shape[1:-1]
    split = [length for n in size for length in (max(1, n // 2), min(2, n))]
    return jnp.mean(x.reshape(len(x), *split, x.shape[-1]), axis=tuple(range(2, 2 * len(size) + 1, 2)))


def upsample(x: Float[Array, "b *half c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """Linear interpolation to `size`, which has twice or once the length of each axis.

    Pixel centres lie at halves and edges are repeated: output 2i is x[i-1]/4 + 3x[i]/4, output 2i+1 is
    3x[i]/4 + x[i+1]/4.
    """
    axes = tuple(axis for axis, n in enumerate(size, 1) if n != x.shape[axis])
    return _upsample_at_once(x, axes) if on_gpu() else _upsample_by_axis(x, axes)


def _upsample_by_axis(x: Float[Array, "b *half c"], axes: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """One axis after the other, in the type of `x`."""
    for axis in axes:
        part = partial(jax.lax.slice_in_dim, x, axis=axis)
        before = jnp.concatenate([part(0, 1), part(0, -1)], axis)
        after = jnp.concatenate([part(1, None), part(-1, None)], axis)
        pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _upsample_at_once(x: Float[Array, "b *half c"], axes: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """All axes as one sum of gathers in float32, rounded once.

    XLA's GPU compiler fuses the sum with the concatenation behind it, and its gradient with the slice before it. The
    form by axis writes each axis to memory.
    """
    near = lambda n: np.arange(2 * n) // 2
    far = lambda n: near(n) + np.tile([-1, 1], n)
    return _weighted(jnp.asarray(x, jnp.float32), axes, lambda n: [(0.75, near(n)), (0.25, far(n))]).astype(x.dtype)


def _upsample_gradient(axes: tuple[int, ...], _: None, g: Array) -> tuple[Array]:
    weights = {-1: 0.25, 0: 0.75, 1: 0.75, 2: 0.25}  # of outputs 2i - 1 to 2i + 2
    taps = lambda n: [(weight, np.arange(0, n, 2) + k) for k, weight in weights.items()]
    return (_weighted(jnp.asarray(g, jnp.float32), axes, taps).astype(g.dtype),)


_upsample_at_once.defvjp(lambda x, axes: (_upsample_at_once(x, axes), None), _upsample_gradient)


def _weighted(x: Array, axes: tuple[int, ...], taps: Callable[[int], list[tuple[float, np.ndarray]]]) -> Array:
    """Weighted sums of elements along each of `axes`.

    `taps(length of an axis)` gives pairs of a weight and the places that it applies to. A place outside the array
    counts as the nearest place inside.
    """
    if not axes:
        return x
    axis, n = axes[0], x.shape[axes[0]]
    total = jnp.zeros((), x.dtype)
    for weight, places in taps(n):
        at = (slice(None),) * axis + (np.clip(places, 0, n - 1),)
        total = total + weight * _weighted(x.at[at].get(mode="promise_in_bounds"), axes[1:], taps)
    return total


def dropout(x: Float[Array, " b *n"], keys: Key[Array, " b"], rate: float) -> Float[Array, " b *n"]:
    """Each element is 0 with probability `rate`, and divided by 1 - rate otherwise. A sample's mask depends on its key
    alone."""
    passes = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(passes, x / (1 - rate), 0).astype(x.dtype)


# --- convolution ------------------------------------------------------------------------------------------------------


def totals(arrays: tuple[Float[Array, "..."], ...], axes: tuple[int, ...]) -> tuple[Float[Array, "..."], ...]:
    """The sum of each array over `axes`. On a GPU one reduction computes all sums, as the arrays come from the same
    memory."""
    if not on_gpu():
        return tuple(jnp.sum(array, axes) for array in arrays)
    zeros = tuple(jnp.zeros((), array.dtype) for array in arrays)
    return tuple(jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes))


@jax.custom_vjp
def narrow_product(x: Float[Array, "b *size c"], matrix: Float[Array, "c d"]) -> Float[Array, "b *size d"]:
    """`x` @ `matrix` for a small d, as element-wise products with float32 sums.

    On a GPU these products fuse with the norm before them. Neither `x` nor its gradient is then written to memory.
    """
    wide, columns = x.astype(jnp.float32), matrix.T.astype(jnp.float32)
    return jnp.stack(totals(tuple(wide * on_last_axes(column, x) for column in columns), (x.ndim - 1,)), -1).astype(
        x.dtype
    )


def _narrow_product_gradient(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, matrix = residuals
    wide, columns = x.astype(jnp.float32), matrix.T.astype(jnp.float32)
    parts = tuple(jnp.split(g.astype(jnp.float32), g.shape[-1], -1))
    of_x = sum((part * on_last_axes(column, x) for part, column in zip(parts, columns, strict=True)), jnp.zeros(()))
    of_matrix = jnp.stack(totals(tuple(wide * part for part in parts), tuple(range(x.ndim - 1))), -1)
    return of_x.astype(x.dtype), of_matrix.astype(matrix.dtype)


narrow_product.defvjp(lambda x, matrix: (narrow_product(x, matrix), (x, matrix)), _narrow_product_gradient)


@over_samples
def convolve(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: Any, **__: Any
) -> Float[Array, "b *size d"]:
    """Convolution of stride 1 with zeros outside. A kernel of even length has its extra place below.

    The function takes the place of `lax.conv_general_dilated` in `nnx.Conv`, whose further arguments it ignores.

    XLA's CPU is fast over two axes only. With more axes, neighbours along the first axis become channels there, and the
    axis joins the batch. On one core, forward and backward of 32x32x8, batch 8, took 24 / 66 / 186 ms instead of
    139 / 278 / 573 ms at width 8 / 16 / 32. Over two axes that form is faster in two cases only:

    - the kernel is longer than the image: 256x2x2x64 to 128 took 5 ms instead of 42 ms;
    - channels are few. Forward / with gradients, 256x16x16x1 to 16 took 2.4 / 6.6 ms instead of 5.2 / 8.3 ms, and
      64x32x32x1 to 8 took 2.0 / 2.8 ms instead of 5.4 / 4.8 ms. But 4x128x128x1 to 32 would take 2.5 / 11.7 ms instead
      of 1.4 / 4.9 ms.
    """
    rank, k = x.ndim - 2, kernel.shape[0]
    if rank == 0:
        return x @ kernel
    if on_gpu() and max(kernel.shape[:-2]) == 1 and kernel.shape[-1] <= MOST_NARROW_OUTPUTS:
        return narrow_product(x, kernel.reshape(kernel.shape[-2:]))
    few_channels = x.shape[-1] * kernel.shape[-1] < 32
    if target().platform == "cpu" and (rank != 2 or few_channels or max(x.shape[1:-1]) < k):
        padded = jnp.pad(x, ((0, 0), (k // 2, (k - 1) // 2), *[(0, 0)] * rank))
        neighbours = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(k)], axis=-1)
        flat = jnp.moveaxis(kernel, 0, -3).reshape(*kernel.shape[1:-2], -1, kernel.shape[-1])
        return convolve(neighbours.reshape(-1, *neighbours.shape[2:]), flat).reshape(*x.shape[:-1], -1)
    axes = "".join(map(str, range(rank)))
    layouts = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    padding = [(k // 2, (k - 1) // 2) for k in kernel.shape[:rank]]
    return jax.lax.conv_general_dilated(x, kernel, (1,) * rank, padding, dimension_numbers=layouts)


def conv(
    rank: int,
    inputs: int,
    outputs: int,
    length: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
    form: Callable = convolve,
    zeros: bool = False,
) -> nnx.Conv:
    """A layer of convolution with a kernel of `length` along every axis, He normal, or 0 with `zeros`.

    Parameters are float32, arithmetic has `dtype`. `form` is the function that convolves, `convolve` or one like it.
    """
    return nnx.Conv(
        inputs,
        outputs,
        (length,) * rank,
        use_bias=bias,
        kernel_init=nnx.initializers.zeros if zeros else nnx.initializers.he_normal(),
        dtype=dtype,
        conv_general_dilated=form,
        rngs=rngs,
    )


# --- batch norm in one pass -------------------------------------------------------------------------------------------


def moments(x: Float[Array, "b *size c"], shift: Float[Array, " c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and variance of each channel over the batch, in one pass over `x`.

    They are E[d] + shift and E[d^2] - E[d]^2 of d = x - shift. Little cancels where `shift` is near the mean. A mean of
    100 deviations from the shift costs the variance some per cent. Under `jax.pmap` the batch is that of all devices.
    """
    apart = x.astype(jnp.float32) - on_last_axes(shift, x)
    count = x.size // x.shape[-1]
    sums = totals((apart, apart * apart), tuple(range(x.ndim - 1)))
    first, second = device_mean(tuple(total / count for total in sums))
    return shift + first, jnp.maximum(second - first * first, 0)


def normalised(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias in float32."""
    rate = jax.lax.rsqrt(var + epsilon) * scale
    return (x.astype(jnp.float32) - on_last_axes(mean, x)) * on_last_axes(rate, x) + on_last_axes(bias, x)


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

    The gradient is that of batch norm (Ioffe and Szegedy, ICML 2015). It takes into account that `mean` and `var`
    depend on `x`; they get no gradient of their own. The backward pass keeps `x`, in its own type, and the moments. It
    reads `x` and the result's gradient twice: for two sums a channel, and for the gradient of `x`.
    """
    return activation(normalised(x, mean, var, scale, bias, epsilon)).astype(x.dtype)


def _batch_norm_gradient(
    epsilon: float, activation: Callable[[Array], Array], residuals: tuple[Array, ...], g: Array
) -> tuple:
    x, mean, var, scale, bias = residuals
    rate = jax.lax.rsqrt(var + epsilon)
    unit = (x.astype(jnp.float32) - on_last_axes(mean, x)) * on_last_axes(rate, x)
    (g,) = jax.vjp(activation, normalised(x, mean, var, scale, bias, epsilon))[1](g.astype(jnp.float32))
    sums = totals((g, g * unit), tuple(range(x.ndim - 1)))
    mean_g, mean_g_unit = device_mean(tuple(total / (x.size // x.shape[-1]) for total in sums))
    inner = g - on_last_axes(mean_g, x) - unit * on_last_axes(mean_g_unit, x)
    of_x = on_last_axes(scale * rate, x) * inner
    return of_x.astype(x.dtype), jnp.zeros_like(mean), jnp.zeros_like(var), sums[1], sums[0]


batch_norm.defvjp(lambda *arguments: (batch_norm(*arguments), arguments[:5]), _batch_norm_gradient)


def batch_norm_in_training(
    norm: nnx.BatchNorm, x: Float[Array, "b *size c"], shift: Float[Array, " c"], activation: Callable[[Array], Array]
) -> Float[Array, "b *size c"]:
    """`batch_norm` with the moments of `x`, which also move the running moments of `norm`. `shift` as in `moments`."""
    variables: list[Any] = [norm.mean, norm.var, norm.scale, norm.bias]
    mean, var, scale, bias = (variable[...] for variable in variables)
    found = moments(jax.lax.stop_gradient(x), shift)
    norm.mean[...], norm.var[...] = (
        norm.momentum * old + (1 - norm.momentum) * new for old, new in zip((mean, var), found, strict=True)
    )
    return batch_norm(x, *found, scale, bias, norm.epsilon, activation)
