"""LayerNorm, with kernels of its own for NVIDIA GPUs.

For these GPUs XLA's compiler makes seven kernels of a LayerNorm and its gradient. Some of them write the normed values
in float32. This module has one kernel forward and one backward, and each reads its inputs once. A sum of the
parameters' gradients follows.
"""

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmae.sharding import on_each_device
from jmae.target import target

ROWS = 4  # rows that a kernel's program reads at a time
PROGRAMS = 1024  # most programs of the backward kernel; each sums the parameters' gradients over its rows

Rows = Float[Array, "*n d"]
Vector = Float[Array, " d"]


def on_last_axes(array: Array | float, x: Array) -> Array:
    """An array with axes of length 1 before its own, so that it has as many axes as `x` and meets the last ones."""
    return jnp.expand_dims(array, tuple(range(x.ndim - jnp.ndim(array))))


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis; statistics in float32."""

    def __call__(self, x: Rows, *, mask: Array | None = None, samples: int = 0) -> Rows:
        """(x - mean) / sqrt(variance + epsilon) * scale + bias. `mask` is Flax's; `samples` is the axis of samples."""
        if mask is None and _kernels_run(x):
            return self._kernels(False, x, samples=samples)[0]
        return super().__call__(x, mask=mask)

    def beside(self, x: Rows) -> tuple[Rows, Rows]:
        """(x, LayerNorm of x), for a residual path; one kernel adds both gradients of x."""
        return self._kernels(True, x) if _kernels_run(x) else (x, super().__call__(x))  # type: ignore[return-value]

    def after(self, x: Rows, branch: Rows, offset: Vector | None = None) -> tuple[Rows, Rows]:
        """(x + (branch + offset), LayerNorm of it), by one kernel; `offset` is the bias of the branch's last layer."""
        offset = None if offset is None else offset.astype(branch.dtype)
        if _kernels_run(x):
            return self._kernels(True, x, branch, offset)  # type: ignore[return-value]
        x = x + (branch if offset is None else branch + on_last_axes(offset, branch))
        return x, super().__call__(x)

    def _kernels(
        self, beside: bool, x: Rows, branch: Rows | None = None, offset: Vector | None = None, samples: int = 0
    ) -> tuple[Rows, ...]:
        parameters = self.scale[...], self.bias[...]  # type: ignore[index]
        return _normed(x, branch, offset, *parameters, Form(self.epsilon, jnp.dtype(self.dtype), beside, samples))


def _kernels_run(x: Rows) -> bool:
    """Whether Triton supports the target GPU and the array: Triton counts places in an array with 32 bits."""
    return target().kernels and x.size < 2**31


def layer_norm(width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm with the paper's epsilon 1e-6, statistics in float32, `dtype` output."""
    return LayerNorm(width, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Form(NamedTuple):
    """Form of a LayerNorm.

    Attributes:
        epsilon: added to the variance.
        dtype: type of the output.
        beside: whether the sum that is normed is an output, too.
        samples: axis of the samples, along which several devices split the input.
        interpret: whether Pallas' interpreter runs the kernels, which it does on any device.
    """

    epsilon: float
    dtype: DTypeLike
    beside: bool
    samples: int = 0
    interpret: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normed(
    x: Rows, branch: Rows | None, offset: Vector | None, scale: Vector, bias: Vector, form: Form
) -> tuple[Rows, ...]:
    """The LayerNorm of the sum of x, branch and offset; with `form.beside`, (the sum, its LayerNorm)."""
    axis = form.samples
    out = (axis, axis) if form.beside else (axis,)
    kernels = on_each_device(partial(_forward, form), (axis, axis, None, None, None), out)
    return _on_gpu(kernels, partial(_plain, form), form, x, branch, offset, scale, bias)


def _normed_fwd(x, branch, offset, scale, bias, form):
    out = _normed(x, branch, offset, scale, bias, form)
    return out, (out[0] if branch is not None else x, branch is not None, offset, scale, bias)


def _normed_bwd(form, residuals, gradients):
    total, branched, offset, scale, bias = residuals
    d_sum, d_out = gradients if form.beside else (None, *gradients)

    def kernels(total, d_sum, scale, bias, d_out):
        axis = form.samples
        each = on_each_device(partial(_backward, form, offset is not None), (axis, axis, None, axis), (axis, 0))
        d_total, sums = each(total, d_sum, scale, d_out)
        return d_total, *jnp.sum(sums, 0)

    def plain(total, d_sum, scale, bias, d_out):
        norm = lambda x, *parameters: _plain(form._replace(beside=False), x, None, None, *parameters)[0]
        d_total, d_scale, d_bias = jax.vjp(norm, total, scale, bias)[1](d_out)
        d_total = d_total if d_sum is None else d_total + d_sum
        rows = tuple(range(total.ndim - 1))
        more = () if offset is None else (jnp.sum(d_total.astype(jnp.float32), rows),)
        return d_total, d_scale, d_bias, *more

    d_total, d_scale, d_bias, *d_offset = _on_gpu(kernels, plain, form, total, d_sum, scale, bias, d_out)
    d_offset = d_offset[0].astype(offset.dtype) if d_offset else None
    return d_total, d_total if branched else None, d_offset, d_scale, d_bias


_normed.defvjp(_normed_fwd, _normed_bwd)


def _on_gpu(kernels, plain, form: Form, *arrays):
    if form.interpret:
        return kernels(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=kernels, default=plain)


def _plain(form: Form, x, branch, offset, scale, bias) -> tuple[Rows, ...]:
    """The outputs of `_normed` without a kernel, for other devices."""
    if branch is not None:
        x = x + (branch if offset is None else branch + on_last_axes(offset, branch))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + form.epsilon)
    scale, bias = on_last_axes(scale, x), on_last_axes(bias, x)
    out = (centred * (rate * scale) + bias).astype(form.dtype)
    return (x, out) if form.beside else (out,)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _forward(form: Form, x, branch, offset, scale, bias):
    """The outputs of `_normed`. A branch needs `form.beside`."""
    rows, width = prod(x.shape[:-1]), x.shape[-1]
    arrays = {"x": x, "branch": branch, "offset": offset, "scale": scale, "bias": bias}
    arrays = {
        name: each.reshape(-1, width) if each.ndim > 1 else each for name, each in arrays.items() if each is not None
    }
    summed = form.beside and branch is not None

    def kernel(*refs):
        ref, (*sums, out) = dict(zip(arrays, refs, strict=False)), refs[len(arrays) :]
        columns, inside = _columns(width)
        at, here = _rows(pl.program_id(0), columns, rows, width)
        block = lambda name: triton.load(ref[name].at[at], mask=here, other=0.0)
        row = lambda name: triton.load(ref[name].at[columns], mask=inside, other=0.0)[None]
        values = block("x")
        if branch is not None:
            values = values + (block("branch") if offset is None else block("branch") + row("offset"))
        for each in sums:
            triton.store(each.at[at], values, mask=here)
        centred, rate = _centred(values, here, width, form.epsilon)
        normed = centred * rate * row("scale") + row("bias")
        triton.store(out.at[at], normed.astype(form.dtype), mask=here)

    shape = lambda dtype: jax.ShapeDtypeStruct((rows, width), dtype)
    shapes = (*[shape(x.dtype)] * summed, shape(form.dtype))
    outputs = _call(kernel, pl.cdiv(rows, ROWS), shapes, form.interpret)(*arrays.values())
    outputs = [each.reshape(x.shape) for each in outputs]
    return (x, *outputs) if form.beside and not summed else tuple(outputs)


def _backward(form: Form, offset: bool, total, d_sum, scale, d_out):
    """(gradient of the sum, gradients of scale, bias and, where there is one, the offset (programs, 2 or 3, d)).

    Each program sums the parameters' gradients over its rows."""
    rows, width = prod(total.shape[:-1]), total.shape[-1]
    arrays = [each.reshape(rows, width) for each in (total, d_out, d_sum) if each is not None]
    blocks = pl.cdiv(rows, ROWS)
    times = pl.cdiv(blocks, PROGRAMS)
    programs = pl.cdiv(blocks, times)

    def kernel(scale, total, d_out, *rest):
        *d_sum, d_total, sums = rest
        columns, inside = _columns(width)
        program = pl.program_id(0)
        weight = triton.load(scale.at[columns], mask=inside, other=0.0)[None]

        def block(i, added):
            at, here = _rows(program * times + i, columns, rows, width)
            load = lambda ref: triton.load(ref.at[at], mask=here, other=0.0)
            centred, rate = _centred(load(total), here, width, form.epsilon)
            normed, gradient = centred * rate, load(d_out).astype(jnp.float32)
            inner = gradient * weight
            mean = lambda values: jnp.sum(values, 1, keepdims=True) / width
            found = rate * (inner - mean(inner) - normed * mean(inner * normed))
            for each in d_sum:
                found = found + load(each).astype(jnp.float32)
            triton.store(d_total.at[at], found.astype(d_total.dtype), mask=here)
            terms = (gradient * normed, gradient, *[found] * offset)
            return tuple(each + jnp.sum(term, 0) for each, term in zip(added, terms, strict=True))

        nothing = (jnp.zeros(columns.shape, jnp.float32),) * (2 + offset)
        for i, each in enumerate(jax.lax.fori_loop(0, times, block, nothing)):
            triton.store(sums.at[program, i, columns], each, mask=inside)

    sums = jax.ShapeDtypeStruct((programs, 2 + offset, width), jnp.float32)
    shapes = jax.ShapeDtypeStruct((rows, width), total.dtype), sums
    d_total, sums = _call(kernel, programs, shapes, form.interpret)(scale, *arrays)
    return d_total.reshape(total.shape), sums


def _columns(width: int) -> tuple[Array, Array]:
    """(indices of a row's elements, mask of those inside). Their number is a power of two, which Triton wants."""
    columns = jnp.arange(pl.next_power_of_2(width))
    return columns, columns < width


def _rows(block, columns: Array, rows: int, width: int) -> tuple[tuple[Array, Array], Array]:
    """(indices of a block of rows, mask of the elements inside)."""
    numbers = block * ROWS + jnp.arange(ROWS)
    return (numbers[:, None], columns[None]), (numbers < rows)[:, None] & (columns < width)[None]


def _centred(values: Array, here: Array, width: int, epsilon: float) -> tuple[Array, Array]:
    """(rows minus their means, 0 outside; 1 / sqrt(variance + epsilon))."""
    values = values.astype(jnp.float32)
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
