"""LayerNorm's kernels for NVIDIA GPUs, run by Pallas' interpreter, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmae.nn import norm
from jmae.target import Target, tracing_for

H200 = Target("cuda", (9, 0), 91000)


def inputs(shape, dtype=jnp.float32):
    """Rows whose mean is a hundred deviations, scale, bias, and the gradient that comes in."""
    rng = np.random.default_rng(0)
    x, d_out = 100 + rng.standard_normal(shape), rng.standard_normal(shape)
    scale, bias = 1 + 0.3 * rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    return jnp.asarray(x, dtype), jnp.float32(scale), jnp.float32(bias), jnp.asarray(d_out, dtype)


def formula(x, scale, bias, d_out):
    """Output and gradients by hand."""
    x, scale, bias, d_out = (np.asarray(each, np.float64) for each in (x, scale, bias, d_out))
    centred = x - x.mean(-1, keepdims=True)
    rate = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    normed, inner, rows = centred * rate, d_out * scale, tuple(range(x.ndim - 1))
    mean = lambda values: values.mean(-1, keepdims=True)
    d_x = rate * (inner - mean(inner) - normed * mean(inner * normed))
    return normed * scale + bias, d_x, (d_out * normed).sum(rows), d_out.sum(rows)


def by_kernels(x, scale, bias, d_out):
    run = lambda x, scale, bias: norm._normed(x, scale, bias, 1e-6, x.dtype, True)
    out, backward = jax.vjp(run, x, scale, bias)
    return out, *backward(d_out)


@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 32), (1, 1), (9, 130)])
def test_the_kernels_equal_the_formula_at_any_width_and_number_of_rows(shape):
    given = inputs(shape)
    for found, expected in zip(by_kernels(*given), formula(*given), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)  # 100 deviations cost two digits


def test_programs_of_several_blocks_add_up_all_rows(monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    given = inputs((61, 16))
    for found, expected in zip(by_kernels(*given), formula(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


def test_half_precision_keeps_float32_statistics():
    given = inputs((6, 48), jnp.bfloat16)
    for found, expected in zip(by_kernels(*given), formula(*given), strict=True):
        assert np.abs(np.asarray(found, np.float64) - expected).max() < 2**-6 * np.abs(expected).max()
    assert by_kernels(*given)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("capability, kernels", [((9, 0), 1), ((8, 0), 1), ((7, 0), 0)])
def test_gpus_that_triton_knows_get_the_kernels_also_under_vmap(capability, kernels):
    layer = norm.layer_norm(24, jnp.bfloat16, nnx.Rngs(0))
    with tracing_for(Target("cuda", capability, 91000)):
        loss = lambda x: jnp.sum(layer(x).astype(jnp.float32))
        traced = jax.jit(jax.vmap(jax.grad(loss))).trace(jnp.zeros((3, 5, 24), jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("xla.gpu.triton" in text) == bool(kernels)


def test_a_cpu_computes_the_same_whatever_it_is_traced_for():
    layer, (x, *_) = norm.layer_norm(24, jnp.float32, nnx.Rngs(0)), inputs((4, 5, 24))
    slope = lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x)
    expected = jax.jit(slope)(x)
    with tracing_for(H200):
        found = jax.jit(lambda x: slope(x))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
