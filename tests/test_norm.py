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
    form = norm.Form(1e-6, x.dtype, beside=False, interpret=True)
    run = lambda x, scale, bias: norm._normed(x, None, None, scale, bias, form)[0]
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


def test_the_sum_that_is_normed_its_gradient_and_the_offset_s_equal_the_formula():
    x, scale, bias, d_out = inputs((3, 7, 24))
    rng = np.random.default_rng(1)
    branch, offset, d_sum = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x.shape, 24, x.shape))
    form = norm.Form(1e-6, x.dtype, beside=True, interpret=True)
    (total, out), backward = jax.vjp(lambda *given: norm._normed(*given, form), x, branch, offset, scale, bias)
    expected = np.asarray(x, np.float64) + np.asarray(branch) + np.asarray(offset)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    normed, d_x, d_scale, d_bias = formula(expected, scale, bias, d_out)
    np.testing.assert_allclose(out, normed, rtol=1e-3, atol=2e-4)
    d_total = d_x + np.asarray(d_sum)
    for found, value in zip(
        backward((d_sum, d_out)), (d_total, d_total, d_total.sum((0, 1)), d_scale, d_bias), strict=True
    ):
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=2e-4)


def test_a_residual_path_beside_a_norm_gets_both_gradients():
    x, scale, bias, d_out = inputs((5, 24))
    form = norm.Form(1e-6, x.dtype, beside=True, interpret=True)
    (same, out), backward = jax.vjp(lambda x: norm._normed(x, None, None, scale, bias, form), x)
    normed, d_x, *_ = formula(x, scale, bias, d_out)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(out, normed, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(backward((d_out, d_out))[0], d_x + np.asarray(d_out), rtol=1e-3, atol=2e-4)


def test_the_layer_s_three_forms_agree_on_a_cpu_whatever_it_is_traced_for():
    layer, (x, *_) = norm.layer_norm(24, jnp.float32, nnx.Rngs(0)), inputs((4, 24))
    offset = jnp.linspace(-1, 1, 24)

    def all_forms(x, offset):
        total, out = layer.after(x, jnp.sin(x), offset)
        return jnp.sum(jnp.cos(total) + jnp.sin(out)) + sum(jnp.sum(each) for each in layer.beside(jnp.cos(x)))

    expected = jax.jit(jax.grad(all_forms, argnums=(0, 1)))(x, offset)
    with tracing_for(H200):
        found = jax.jit(lambda *given: jax.grad(all_forms, argnums=(0, 1))(*given))(x, offset)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
