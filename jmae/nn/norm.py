"""LayerNorm, with kernels of its own for NVIDIA GPUs.

XLA's compiler makes seven kernels of a LayerNorm and its gradient there, some of which write the normed values in
float32. The kernels here are two and the sum of the parameters' gradients; each reads its inputs once.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jmae.sharding import on_each_device
from jmae.target import target

ROWS = 4  # rows that a kernel's program reads at a time
PROGRAMS = 1024  # programs of the backward kernel at most: each sums the parameters' gradients of its own rows


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis; statistics in float32."""

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        device = target()
        if device.platform != "cuda" or device.capability < (8, 0):  # Triton's oldest GPUs
            return super().__call__(x)
        scale, bias = self.scale[...], self.bias[...]  # type: ignore[index]
        return _normed(x, scale, bias, self.epsilon, jnp.dtype(self.dtype), False)


def layer_norm(width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm with the paper's epsilon 1e-6, statistics in float32, `dtype` output."""
    return LayerNorm(width, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normed(
    x: Float[Array, "*n d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    epsilon: float,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "*n d"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias by the kernels; `interpret` runs them on any device."""
    options = dict(epsilon=epsilon, dtype=dtype)
    if interpret:
        return _forward(x, scale, bias, interpret=True, **options)
    return jax.lax.platform_dependent(
        x,
        scale,
        bias,
        cuda=on_each_device(partial(_forward, **options), (0, None, None)),
        default=partial(_plain, **options),
    )


def _normed_fwd(x, scale, bias, epsilon, dtype, interpret):
    return _normed(x, scale, bias, epsilon, dtype, interpret), (x, scale, bias)


def _normed_bwd(epsilon, dtype, interpret, kept, d_out):
    x, scale, bias = kept
    if interpret:
        d_x, partial_sums = _backward(x, scale, d_out, epsilon=epsilon, interpret=True)
        d_scale, d_bias = jnp.sum(partial_sums, 0)
        return d_x, d_scale, d_bias

    def kernels(x, scale, bias, d_out):
        each = on_each_device(partial(_backward, epsilon=epsilon), (0, None, 0), (0, 0))
        d_x, sums = each(x, scale, d_out)
        return d_x, *jnp.sum(sums, 0)

    def plain(x, scale, bias, d_out):
        return jax.vjp(partial(_plain, epsilon=epsilon, dtype=dtype), x, scale, bias)[1](d_out)

    return jax.lax.platform_dependent(x, scale, bias, d_out, cuda=kernels, default=plain)


_normed.defvjp(_normed_fwd, _normed_bwd)


def _plain(x: Array, scale: Array, bias: Array, *, epsilon: float, dtype: jnp.dtype) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + epsilon)
    return (centred * (rate * scale) + bias).astype(dtype)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _forward(x, scale, bias, *, epsilon, dtype, interpret=False):
    rows, width = prod(x.shape[:-1]), x.shape[-1]

    def kernel(x, scale, bias, out):
        columns, inside = _columns(width)
        numbers = pl.program_id(0) * ROWS + jnp.arange(ROWS)
        at, here = (numbers[:, None], columns[None]), (numbers < rows)[:, None] & inside[None]
        centred, rate = _centred(x, at, here, width, epsilon)
        row = lambda ref: triton.load(ref.at[columns], mask=inside, other=0.0)[None]
        normed = centred * rate * row(scale) + row(bias)
        triton.store(out.at[at], normed.astype(dtype), mask=here)

    shape = jax.ShapeDtypeStruct((rows, width), dtype)
    made = _call(kernel, pl.cdiv(rows, ROWS), shape, interpret)(x.reshape(rows, width), scale, bias)
    return made.reshape(x.shape)


def _backward(x, scale, d_out, *, epsilon, interpret=False):
    """(gradient of x, sums over each program's rows of the gradients of scale and bias (programs, 2, d))."""
    rows, width = prod(x.shape[:-1]), x.shape[-1]
    blocks = pl.cdiv(rows, ROWS)
    times = pl.cdiv(blocks, PROGRAMS)
    programs = pl.cdiv(blocks, times)

    def kernel(x, scale, d_out, d_x, sums):
        columns, inside = _columns(width)
        program = pl.program_id(0)
        weight = triton.load(scale.at[columns], mask=inside, other=0.0)[None]

        def block(i, total):
            numbers = (program * times + i) * ROWS + jnp.arange(ROWS)
            at, here = (numbers[:, None], columns[None]), (numbers < rows)[:, None] & inside[None]
            centred, rate = _centred(x, at, here, width, epsilon)
            normed, gradient = centred * rate, triton.load(d_out.at[at], mask=here, other=0.0).astype(jnp.float32)
            inner = gradient * weight
            mean = lambda values: jnp.sum(values, 1, keepdims=True) / width
            found = rate * (inner - mean(inner) - normed * mean(inner * normed))
            triton.store(d_x.at[at], found.astype(d_x.dtype), mask=here)
            return total[0] + jnp.sum(gradient * normed, 0), total[1] + jnp.sum(gradient, 0)

        nothing = jnp.zeros(columns.shape, jnp.float32)
        found = jax.lax.fori_loop(0, times, block, (nothing, nothing))
        for i, total in enumerate(found):
            triton.store(sums.at[program, i, columns], total, mask=inside)

    shapes = jax.ShapeDtypeStruct((rows, width), x.dtype), jax.ShapeDtypeStruct((programs, 2, width), jnp.float32)
    flat = lambda a: a.reshape(rows, width)
    d_x, sums = _call(kernel, programs, shapes, interpret)(flat(x), scale, flat(d_out))
    return d_x.reshape(x.shape), sums


def _columns(width: int) -> tuple[Array, Array]:
    """(numbers of a row's places, as many as a power of two, which Triton wants; which of them are inside)."""
    columns = jnp.arange(pl.next_power_of_2(width))
    return columns, columns < width


def _centred(x, at, here, width: int, epsilon: float) -> tuple[Array, Array]:
    """Rows less their means, 0 outside, and 1 / sqrt(variance + epsilon)."""
    values = triton.load(x.at[at], mask=here, other=0.0).astype(jnp.float32)
    centred = jnp.where(here, values - jnp.sum(values, 1, keepdims=True) / width, 0)
    return centred, jax.lax.rsqrt(jnp.sum(centred**2, 1, keepdims=True) / width + epsilon)


def _call(kernel, programs: int, shapes, interpret: bool):
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(programs,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="layer_norm",
    )
