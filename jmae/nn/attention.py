"""Softmax attention, one function for every network and device."""

from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jmae.sharding import on_each_device
from jmae.target import target

# For NVIDIA GPUs sequences are padded to a multiple of this length. JAX's cuDNN attention refuses odd lengths in
# training, and XLA pads each product whose rows are no multiple of 8. Longer padding costs more than it saves: with 64,
# 197 tokens become 256.
MULTIPLE = 8

# Scores that the CPU computes at once: all of them below WHOLE, else blocks that fit its cache. Milliseconds of CPU
# time on one core for (b, n, h, d), forward / with gradients; a block of all, of 2^17, 2^19, 2^21, PyTorch 2.13:
#   (16, 50, 6, 64)      1.6 / 4.8     2.0 / 5.9    1.4 / 4.6    1.6 / 4.7    1.3 / 4.4
#   (32, 145, 4, 32)     7.1 / 28.0    7.7 / 23.2   9.5 / 25.1   8.5 / 30.4   7.6 / 24.3
#   (16, 197, 16, 32)   26.9 / 167    47.1 / 109   33.4 / 105   33.8 / 151   27.4 / 88.8
#   (1, 2520, 16, 24)         -        181 / 683    159 / 639    167 / 662    182 / 668
WHOLE, BLOCK = 2**21, 2**19
GPU_BLOCK = 2**28  # scores that an NVIDIA GPU without a flash kernel computes at once: 1 GB in float32


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    keys: int | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v, for each head; softmax in float32.

    Only the first `keys` keys and values count (None: all). The others are padding: their values, even NaN, change
    neither the output nor a gradient.

    The platform decides the form when the program is lowered. NVIDIA GPUs run cuDNN's flash kernel where cuDNN has one.
    Otherwise they compute blocks of scores, as the CPU does. Other accelerators run `jax.nn.dot_product_attention`.
    """
    keys = keys or k.shape[1]
    first = lambda form: lambda q, k, v: form(q, k[:, :keys], v[:, :keys])
    blockwise = on_each_device(first(_blockwise))
    cuda = partial(_flash, keys=keys) if _flash_runs(q) else blockwise
    return jax.lax.platform_dependent(q, k, v, cpu=blockwise, cuda=cuda, default=first(jax.nn.dot_product_attention))


def padding(length: int) -> int:
    """Rows that bring a sequence to a length that suits the device: up to 7 on NVIDIA GPUs, else none."""
    return -length % MULTIPLE if target().platform == "cuda" else 0


def _flash_runs(q: Array) -> bool:
    """Whether cuDNN has a flash kernel: NVIDIA GPUs from Ampere on, half precision, heads of 8, 16, ... 128 channels.

    Callers ask first, since JAX raises while tracing if it finds no cuDNN, even for a CPU or a TPU."""
    device, width = target(), q.shape[-1]
    half = q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    return half and device.kernels and device.cudnn > 0


def _flash(q: Array, k: Array, v: Array, keys: int, implementation: str = "cudnn") -> Array:
    """cuDNN's flash kernel, on sequences whose length is padded to a multiple of `MULTIPLE`.

    Only keys are masked. cuDNN leaves the rows after a query length, and their gradients, undefined. So padding queries
    are computed and their rows cut off, and padding is set to 0, which makes its gradient 0.
    """
    n = q.shape[1]
    q, k, v = _filled(q, n), _filled(k, keys), _filled(v, keys)
    kernel = partial(jax.nn.dot_product_attention, implementation=implementation)
    if keys == k.shape[1]:
        return kernel(*_together(q, k, v))[:, :n]
    lengths = (jnp.full(len(x), length, jnp.int32) for x, length in ((q, q.shape[1]), (k, keys)))
    q, k, v, queries, known = _together(q, k, v, *lengths)
    return kernel(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=known)[:, :n]


def _filled(x: Float[Array, "b n h d"], rows: int) -> Float[Array, "b m h d"]:
    """The first `rows` rows, and zeros after them up to a multiple of `MULTIPLE`."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % MULTIPLE), (0, 0), (0, 0)))
    return x if rows == x.shape[1] else jnp.where((jnp.arange(x.shape[1]) < rows)[None, :, None, None], x, 0)


@jax.custom_vjp
def _together(*arrays: Array) -> tuple[Array, ...]:
    """The identity. Under vmap all arrays become mapped ones: cuDNN's kernel refuses a mix, such as keys and values
    that all replicates share."""
    return _mapped(*arrays)


@custom_vmap
def _mapped(*arrays: Array) -> tuple[Array, ...]:
    return arrays


@_mapped.def_vmap
def _(size: int, batched: list[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
    return _mapped(*_broadcast(size, batched, arrays)), (True,) * len(arrays)


_together.defvjp(lambda *arrays: (_together(*arrays), None), lambda _, gradients: tuple(gradients))


def _broadcast(size: int, batched: list[bool], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    both = zip(arrays, batched, strict=True)
    return tuple(x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in both)


def _blockwise(q: Array, k: Array, v: Array) -> Array:
    """Attention in blocks of scores. Heads come first (g = b h), as XLA's CPU products want contiguous matrices."""
    b, n, h, d = q.shape
    first = lambda x: x.transpose(0, 2, 1, 3).reshape(b * h, -1, d)
    return _attend(first(q * d**-0.5), first(k), first(v)).reshape(b, h, n, d).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(q: Float[Array, "g n d"], k: Float[Array, "g m d"], v: Float[Array, "g m d"]) -> Array:
    """softmax(q k^T) v.

    The backward pass computes the probabilities again, block by block, from their log-sum-exp (Dao et al.,
    "FlashAttention", NeurIPS 2022, arXiv 2205.14135). It has five products a block, and no array of n x m scores
    outlives its block.
    """
    return _forward(q, k, v)[0]


def _fwd(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = (checkpoint_name(x, "attention") for x in _forward(q, k, v))
    return out, (q, k, v, out, lse)


def _bwd(residuals: tuple[Array, ...], d_out: Array) -> tuple[Array, ...]:
    return _backward(*residuals, d_out)


_attend.defvjp(_fwd, _bwd)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    """Product over axis i of `a` and j of `b`, for each head; accumulated in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _blocks(g: int, n: int, m: int) -> tuple[int, int]:
    """(heads, query rows) of one block."""
    whole, most = (GPU_BLOCK, GPU_BLOCK) if target().platform == "cuda" else (WHOLE, BLOCK)
    if g * n * m <= whole:
        return g, n
    heads = max(i for i in range(1, g + 1) if g % i == 0 and (i == 1 or i * n * m <= most))
    return heads, n if heads > 1 else ceil(n / min(n, ceil(n * m / most)))


def _over_heads(f, heads: int, *arrays: Array):
    """f over blocks of `heads` leading entries."""
    g = len(arrays[0])
    if heads == g:
        return f(*arrays)
    out = jax.lax.map(lambda t: f(*t), tuple(x.reshape(g // heads, heads, *x.shape[1:]) for x in arrays))
    return jax.tree.map(lambda x: x.reshape(g, *x.shape[2:]), out)


def _rows(x: Array, rows: int) -> Array:
    """(heads, n, d) as (blocks, heads, rows, d); the last block is filled up with zeros."""
    heads, n, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -n % rows), (0, 0)))
    return x.reshape(heads, -1, rows, d).swapaxes(0, 1)


def _unrows(x: Array, n: int) -> Array:
    blocks, heads, rows, d = x.shape
    return x.swapaxes(0, 1).reshape(heads, blocks * rows, d)[:, :n]


def _folded(f):
    """`f` such that vmap folds the mapped axis into the leading one: blocks stay as small as without vmap."""
    f = custom_vmap(f)

    @f.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        out = f(*(x.reshape(-1, *x.shape[2:]) for x in _broadcast(size, batched, arrays)))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return f


@_folded
def _forward(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """(output, log-sum-exp of the scores)."""
    (g, n, _), m = q.shape, k.shape[1]
    heads, rows = _blocks(g, n, m)

    def block(q, k, v):
        scores = _dot(q, k, 2, 2)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        return (_dot(weights.astype(v.dtype), v, 2, 1) / total).astype(v.dtype), top + jnp.log(total)

    def head(q, k, v):
        if rows == n:
            return block(q, k, v)
        return jax.tree.map(lambda x: _unrows(x, n), jax.lax.map(lambda q: block(q, k, v), _rows(q, rows)))

    return _over_heads(head, heads, q, k, v)


@_folded
def _backward(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
    """(dq, dk, dv). Rows of zeros that fill up the last block add nothing: their d_out is zero."""
    (g, n, _), m = q.shape, k.shape[1]
    heads, rows = _blocks(g, n, m)

    def block(q, k, v, out, lse, d_out):
        weights = jnp.exp(_dot(q, k, 2, 2) - lse)
        dv = _dot(weights.astype(v.dtype), d_out, 1, 1)
        inner = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)
        d_scores = (weights * (_dot(d_out, v, 2, 2) - inner)).astype(q.dtype)
        return _dot(d_scores, k, 2, 1).astype(q.dtype), _dot(d_scores, q, 1, 1), dv

    def head(q, k, v, *rest):
        if rows == n:
            dq, dk, dv = block(q, k, v, *rest)
        else:

            def add(total, t):
                dq, dk, dv = block(t[0], k, v, *t[1:])
                return (total[0] + dk, total[1] + dv), dq

            zeros = jnp.zeros((heads, m, k.shape[-1]), jnp.float32)
            (dk, dv), dq = jax.lax.scan(add, (zeros, zeros), tuple(_rows(x, rows) for x in (q, *rest)))
            dq = _unrows(dq, n)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    return _over_heads(head, heads, q, k, v, out, lse, d_out)
