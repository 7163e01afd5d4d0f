"""The multi-level cross-attention decoder of MemMC-MAE; its memory is in `transformer.Block`.

Tian et al., "Unsupervised Anomaly Detection in Medical Images with a Memory-augmented Multi-level Cross-attentional
Masked Autoencoder", MLMI 2023, arXiv 2203.11725. No code of it is public; consulted: meshed-memory-transformer (Cornia
et al., CVPR 2020), the source of both operators, which decides what the paper leaves open.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jmae.errors import InputError
from jmae.keys.memmc_mae import GATES
from jmae.nn.attention import attention
from jmae.nn.mae import MAE
from jmae.nn.transformer import Block, layer_norm, linear
from jmae.sharding import divides, on_each_device


class Gates(nnx.Module):
    """The weights W of all levels' gates alpha_l = sigmoid(W_l [S; C_l] + b_l)."""

    def __init__(self, levels: int, width: int, outputs: int, dtype: DTypeLike, *, rngs: nnx.Rngs):
        draw = nnx.initializers.xavier_uniform(batch_axis=(0,))
        self.kernel = nnx.Param(draw(rngs.params(), (levels, 2 * width, outputs)))
        self.bias = nnx.Param(jnp.zeros((levels, 1, outputs)))
        self.width, self.dtype = width, dtype

    def parts(self) -> tuple[Array, Array, Array]:
        """(weights of S, weights of C_l, bias), each by level."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return kernel[:, : self.width], kernel[:, self.width :], bias


class MultiLevelBlock(nnx.Module):
    """A decoder block that attends to all levels of the encoder (Eq. 2 and 3):

    S = Y + self-attention(norm Y), R = S + sum_l alpha_l C_l / sqrt(levels), Y' = R + mlp(norm R).

    C_l is the cross-attention of norm S to the normed output X_l of encoder block l. All levels share its projections
    and its norm.
    The gate alpha_l = sigmoid(W_l [S; C_l] + b_l) is a vector for each token (`gate="channel"`, Cornia et al.) or a
    number for each token (`gate="token"`). The root is from Cornia et al.; `normed=False` leaves it out.

    ours: the paper's Eq. 3 takes the gate from Y', which needs the gate. Here the gate depends on C_l, as in Cornia et
    al. With a number for each token the output projection comes after the sum, and the gate's weights contain it: the
    same function in fewer products.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        dtype: DTypeLike,
        *,
        levels: int,
        level_width: int,
        gate: str = "channel",
        normed: bool = True,
        rngs: nnx.Rngs,
    ):
        if gate not in GATES:
            raise InputError(f"model.gate is {gate!r}: one of {', '.join(GATES)}")
        self.attend = Block(width, heads, mlp_ratio, dtype, rngs=rngs)  # its attention and its mlp
        self.norm = layer_norm(width, dtype, rngs)
        self.level_norm = layer_norm(level_width, dtype, rngs)
        self.query = linear(width, width, dtype, rngs)
        self.key_value = linear(level_width, 2 * width, dtype, rngs)
        self.out = linear(width, width, dtype, rngs)
        self.gates = Gates(levels, width, width if gate == "channel" else 1, dtype, rngs=rngs)
        self.heads, self.gate, self.scale = heads, gate, levels**-0.5 if normed else 1.0

    def __call__(
        self, y: Float[Array, "b n d"], levels: Float[Array, "levels b k e"], *, tokens: int | None = None
    ) -> Float[Array, "b n d"]:
        rows, branch = self.attend.attended(y, tokens)
        rows, normed = self.norm.after(rows, branch, self.attend.out.bias[...])  # type: ignore[index]
        found = self.cross(rows, normed, levels)
        return self.attend.transformed(rows, self.scale * found).reshape(y.shape)

    def cross(
        self, rows: Float[Array, "r d"], normed: Float[Array, "r d"], levels: Float[Array, "levels b k e"]
    ) -> Float[Array, "r d"]:
        """sum_l alpha_l C_l for the rows S and their LayerNorm; one call of the attention takes all levels."""
        (r, d), (count, b, k, _) = rows.shape, levels.shape
        heads = (self.heads, d // self.heads)
        q = self.query(normed).reshape(b, -1, *heads)
        of_level = lambda x: self.key_value(self.level_norm(x, samples=int(x.ndim == 4)))
        kv = _rowwise(of_level, levels).reshape(count, b, k, 2, *heads)
        found = on_each_device(_attention_to_levels, (0, 1), 1)(q, kv)
        of_s, of_c, bias = self.gates.parts()
        if self.gate == "channel":
            c = _rowwise(self.out, found).reshape(count, r, d)
            alpha = jax.nn.sigmoid(_gate(rows, of_s, c, of_c, bias))
            return jnp.sum(alpha * c, axis=0)
        found = found.reshape(count, r, d)
        project, shift = (p[...].astype(rows.dtype) for p in (self.out.kernel, self.out.bias))  # type: ignore[index]
        alpha = jax.nn.sigmoid(_gate(rows, of_s, found, project @ of_c, bias + (shift @ of_c)[:, None]))
        return jnp.sum(alpha * found, axis=0) @ project + jnp.sum(alpha, axis=0) * shift[None]


def _attention_to_levels(
    q: Float[Array, "b n h e"], kv: Float[Array, "levels b k 2 h e"]
) -> Float[Array, "levels b n h*e"]:
    """Each sample's queries attend to each of its levels separately."""
    count, b, _, _, *heads = kv.shape
    samples = lambda x: x.reshape(count * b, -1, *heads)
    found = attention(samples(jnp.broadcast_to(q, (count, *q.shape))), samples(kv[:, :, :, 0]), samples(kv[:, :, :, 1]))
    return found.reshape(count, b, q.shape[1], -1)


def _rowwise(layer: Callable[[Array], Array], x: Float[Array, "levels b k e"]) -> Float[Array, "levels b k o"]:
    """A layer on the rows of all levels. They form one matrix, which suits a CPU, unless several devices split the
    samples."""
    if divides(x, 1):
        return layer(x)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _gate(
    rows: Float[Array, "r d"],
    of_s: Float[Array, "levels d o"],
    found: Float[Array, "levels r d"],
    of_c: Float[Array, "levels d o"],
    bias: Float[Array, "levels 1 o"],
) -> Float[Array, "levels r o"]:
    """The input of each level's sigmoid gate, saved for the backward pass. One product of `rows` serves all levels."""
    count, d, o = of_s.shape
    from_s = jnp.moveaxis((rows @ of_s.swapaxes(0, 1).reshape(d, -1)).reshape(-1, count, o), 1, 0)
    return checkpoint_name(from_s + jnp.einsum("lrd,ldo->lro", found, of_c) + bias, "gate")


def plain_part(params: PyTree) -> PyTree:
    """The parameters of a plain `MAE` inside those of a network with memory, with the multi-level decoder, or both."""
    encoder, decoder = (params[name]["stack"] for name in ("encoder", "decoder"))
    encoder = {name: value for name, value in encoder.items() if name not in ("memory_k", "memory_v")}
    return params | {"encoder": {"stack": encoder}, "decoder": {"stack": decoder.get("attend", decoder)}}


def around_plain(params: PyTree, plain: PyTree) -> PyTree:
    """The parameters of a network that has those of a plain `MAE` in their places, the inverse of `plain_part`.

    The cross-attention's output starts at 0, so that the decoder is the plain one. Memory slots stay as they are: they
    take their share of the attention, so that only without slots and long skips the network is the plain one.
    """
    encoder, decoder = (params[name]["stack"] for name in ("encoder", "decoder"))
    encoder = encoder | plain["encoder"]["stack"]
    if "attend" in decoder:
        out = jax.tree.map(jnp.zeros_like, decoder["out"])
        decoder = decoder | {"attend": plain["decoder"]["stack"], "out": out}
    else:
        decoder = plain["decoder"]["stack"]
    return plain | {"encoder": {"stack": encoder}, "decoder": {"stack": decoder}}


class MultiLevelMAE(MAE):
    """A masked autoencoder whose decoder blocks attend to the outputs of all encoder blocks."""

    def __init__(self, *, gate: str = "channel", normed: bool = True, **mae: Any):
        block = partial(MultiLevelBlock, levels=mae["depth"], level_width=mae["width"], gate=gate, normed=normed)
        super().__init__(decoder_block=block, **mae)

    def encode(self, tokens: Float[Array, "b k d"]) -> Float[Array, "levels b k+1 d"]:
        """Outputs of all encoder blocks for tokens, without a norm; the class token stands first."""
        return self.encoder.outputs(self.with_class(tokens))

    def decode(
        self, latent: Float[Array, "levels b m d"], restore: Int[Array, "b n"], *context: Array
    ) -> Float[Array, "b n v"]:
        """A prediction for every token from the levels of `encode`, in float32. Hidden places hold the mask token."""
        return super().decode(self.encoder_norm(latent[-1]), restore, latent, *context)
