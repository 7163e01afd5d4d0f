"""Softmax attention, one function for every network and device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v, for each head; softmax in float32.

    The platform decides the form when the program is lowered: cuDNN's flash kernel on NVIDIA GPUs in half
    precision, `jax.nn.dot_product_attention` on other accelerators, plain batched products on the CPU.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
    flash = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=_cpu, cuda=flash if half else plain, default=plain)


def _cpu(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
