"""Attention against its formula in float64, in every form that the CPU chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmae.nn import attention as module
from jmae.nn.attention import attention
from jmae.target import Target, tracing_for

FORMS = {  # WHOLE, BLOCK: 2 samples, 3 heads, 13 queries, 17 keys
    "all at once": (2**22, 2**20),
    "blocks of three heads": (0, 3 * 13 * 17),
    "blocks of one head": (0, 13 * 17),
    "odd chunks of queries": (0, 100),
    "a query at a time": (0, 1),
}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS.keys())
def form(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WHOLE", request.param[0])
        patch.setattr(module, "BLOCK", request.param[1])
        jax.clear_caches()
        yield
    jax.clear_caches()


def inputs(queries=13, keys=17, lead=(2,), dtype=jnp.float32):
    """q, k, v and the gradient that comes in; scores of a few units, so that softmax is far from flat."""
    lengths = (queries, keys, keys, queries)
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(2 * rng.standard_normal((*lead, n, 3, 8)), dtype) for n in lengths)


def formula(q, k, v, d_out):
    """Output and gradients by hand: dS = P (dP - sum P dP)."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = np.einsum("bnhd,bmhd->bhnm", d_out, v)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhnm,bmhd->bnhd", p, v),
        np.einsum("bhnm,bmhd->bnhd", d_scores, k),
        np.einsum("bhnm,bnhd->bmhd", d_scores, q),
        np.einsum("bhnm,bnhd->bmhd", p, d_out),
    )


def with_gradients(q, k, v, d_out, keys=None):
    out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, keys), q, k, v)
    return out, *backward(d_out)


@pytest.mark.parametrize("keys", [5, 17], ids=lambda n: f"{n} keys")
def test_softmax_attention_and_its_gradients_equal_the_formula(form, keys):
    given = inputs(keys=keys)
    for found, expected in zip(jax.jit(with_gradients)(*given), formula(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_vmap_equals_a_loop_with_keys_that_all_share(form):
    q, k, v, d_out = inputs(lead=(4, 2))
    mapped = jax.jit(jax.vmap(with_gradients, in_axes=(0, None, 0, 0)))(q, k[0], v, d_out)
    for i in range(4):
        for found, expected in zip(mapped, formula(q[i], k[0], v[i], d_out[i]), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=2e-5, atol=1e-5)


def test_gradients_of_shared_keys_add_up_over_vmap():
    q, k, v, d_out = inputs(lead=(4, 2))
    together = lambda k: jnp.sum(jax.vmap(attention, in_axes=(0, None, 0))(q, k, v) * d_out)
    expected = sum(formula(q[i], k[0], v[i], d_out[i])[2] for i in range(4))
    np.testing.assert_allclose(jax.jit(jax.grad(together))(k[0]), expected, rtol=2e-5, atol=2e-5)


def test_scan_and_remat_keep_the_gradient():
    q, k, v, d_out = inputs()
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    layer = lambda x, _: (attention(x, k, v), None)
    wraps = (lambda f: f, jax.checkpoint, lambda f: jax.checkpoint(f, prevent_cse=False, policy=policy))
    loss = lambda q, wrap: jnp.sum(jax.lax.scan(wrap(layer), q, None, length=2)[0] * d_out)
    plain, *others = (jax.jit(jax.grad(loss), static_argnums=1)(q, wrap) for wrap in wraps)
    middle = formula(q, k, v, d_out)[0]
    expected = formula(q, k, v, formula(middle, k, v, d_out)[1])[1]
    for found in (plain, *others):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_of_any_size_overflow_nothing():
    q, k, v, d_out = inputs()
    for found in jax.jit(with_gradients)(100 * q, 100 * k, v, d_out):
        assert np.isfinite(found).all()


def test_half_precision_is_within_its_rounding(form):
    given = inputs(dtype=jnp.bfloat16)
    for found, expected in zip(jax.jit(with_gradients)(*given), formula(*given), strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.abs(np.asarray(found, np.float64) - expected).max() < 2**-6 * np.abs(expected).max()


def test_long_sequences_hold_a_block_of_scores_at_a_time():
    shape = jax.ShapeDtypeStruct((1, 2520, 16, 24), jnp.float32)
    used = jax.jit(with_gradients).lower(*[shape] * 4).compile().memory_analysis().temp_size_in_bytes
    assert used < 64 * 2**20 < 16 * 2520**2 * 4


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_lowers_for_every_platform_under_vmap_scan_and_grad(platform, dtype):
    q, k, v, _ = inputs(lead=(4, 2), dtype=dtype)
    layer = lambda k, v: jax.checkpoint(lambda x, _: (attention(x, k, v), None))
    network = lambda q, v: jax.lax.scan(layer(k[0], v), q, None, length=2)[0].astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(lambda q, v: jax.vmap(network)(q, v).sum(), argnums=(0, 1)))
    assert "dot_general" in gradient.trace(q, v).lower(lowering_platforms=(platform,)).as_text()


def test_arrays_that_vmap_mixes_become_mapped_ones_with_the_right_gradients():
    q, k = jnp.arange(6.0).reshape(3, 2), jnp.array([2.0, 5.0])
    loss = lambda q, k: jnp.prod(jnp.stack(module._together(q, k)))
    d_q, d_k = jax.grad(lambda q, k: jax.vmap(loss, in_axes=(0, None))(q, k).sum(), argnums=(0, 1))(q, k)
    np.testing.assert_allclose(d_q, q[:, ::-1] * 10)
    np.testing.assert_allclose(d_k, np.prod(q, axis=1).sum() * np.array([5.0, 2.0]))


def flash(keys):
    """What the GPU's form does around the fused kernel, whose place JAX's own attention takes."""

    def run(q, k, v, d_out):
        out, backward = jax.vjp(lambda q, k, v: module._flash(q, k, v, keys, implementation="xla"), q, k, v)
        return out, *backward(d_out)

    return jax.jit(run)


@pytest.mark.parametrize("queries, keys", [(13, 17), (16, 24), (9, 16)])
def test_padding_to_a_multiple_of_8_changes_neither_values_nor_gradients(queries, keys):
    given = inputs(queries, keys)
    for found, expected in zip(flash(keys)(*given), formula(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("form", [flash, lambda keys: jax.jit(lambda *given: with_gradients(*given, keys))])
def test_what_padded_keys_hold_reaches_nothing(form):
    q, k, v, d_out = inputs(13, 16)
    bad = lambda x: x.at[:, 11:].set(jnp.nan)
    expected = formula(q, k[:, :11], v[:, :11], d_out)
    out, d_q, d_k, d_v = form(11)(q, bad(k), bad(v), d_out)
    for found, value in zip((out, d_q, d_k[:, :11], d_v[:, :11]), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    assert not np.any(d_k[:, 11:]) and not np.any(d_v[:, 11:])


def test_vmap_pads_and_masks_each_replicate_alike():
    q, k, v, d_out = inputs(lead=(3, 2))
    mapped = jax.vmap(flash(17), in_axes=(0, None, 0, 0))(q, k[0], v, d_out)
    for i in range(3):
        for found, expected in zip(mapped, formula(q[i], k[0], v[i], d_out[i]), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "device, dtype, width, runs",
    [
        (Target("cuda", (9, 0), 91000), jnp.bfloat16, 24, True),
        (Target("cuda", (8, 0), 91000), jnp.float16, 128, True),
        (Target("cuda", (7, 5), 91000), jnp.bfloat16, 24, False),  # before Ampere
        (Target("cuda", (9, 0), 91000), jnp.float32, 24, False),
        (Target("cuda", (9, 0), 91000), jnp.bfloat16, 12, False),
        (Target("cuda", (9, 0), 91000), jnp.bfloat16, 136, False),
        (Target("cuda", (9, 0), 0), jnp.bfloat16, 24, False),  # no cuDNN
        (Target("tpu"), jnp.bfloat16, 24, False),
    ],
)
def test_the_flash_kernel_is_called_where_cudnn_has_one(device, dtype, width, runs):
    x = jnp.zeros((2, 17, 3, width), dtype)
    with tracing_for(device):
        gradient = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
        text = gradient.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert ("fmhaSoftmaxBackward" in text) == runs and ("dot_general" in text) != runs
