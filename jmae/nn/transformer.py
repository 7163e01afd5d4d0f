"""The vision transformer's pre-norm block, and stacks of it that compile as one scanned block.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929; block layout, initialisation and
LayerNorm epsilon as in the official MAE code (facebookresearch/mae, on timm's blocks): qkv bias, exact GELU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmae.errors import InputError
from jmae.nn.attention import attention, padding
from jmae.nn.norm import layer_norm
from jmae.sharding import over_samples
from jmae.target import target

xavier = nnx.initializers.xavier_uniform()


def saved(primitive: Any, *values: Any, **parameters: Any) -> bool:
    """Rematerialisation policy: save dense products, the attention output and gates; recompute scores, norms and GELU.

    Attention and gates are the results with the names "attention" and "gate", and all outputs of cuDNN's attention.
    """
    policies = jax.checkpoint_policies
    return (
        policies.dots_with_no_batch_dims_saveable(primitive, *values, **parameters)
        or policies.save_only_these_names("attention", "gate")(primitive, *values, **parameters)
        or "dot_product_attention" in primitive.name
    )


def linear(inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Dense layer, Xavier uniform, zero bias; float32 parameters, `dtype` arithmetic."""
    return nnx.Linear(inputs, outputs, kernel_init=xavier, dtype=dtype, rngs=rngs)


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x Phi(x), exact, by erf as in PyTorch. The erfc of `jax.nn.gelu` takes 2.4 times as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def product(layer: nnx.Linear, rows: Float[Array, "r d"]) -> Float[Array, "r e"]:
    """A dense layer without its bias."""
    return rows @ layer.kernel[...].astype(rows.dtype)


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x).

    With `memory` slots, attention is memory-augmented (Tian et al. 2022, arXiv 2203.11725, Eq. 1): m learned keys and
    values, the same for every input, stand before those of the tokens. Like those of tokens, they are split
    over the heads. Scale and initial values are those of the source, Cornia et al., "Meshed-Memory Transformer", CVPR
    2020. Only tokens are queries. Without slots, attention is plain.

    Raises InputError where the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dtype: DTypeLike, memory: int = 0, *, rngs: nnx.Rngs):
        if width % heads:
            raise InputError(f"width {width} is not divisible by {heads} heads: choose heads that divide it")
        self.heads = heads
        self.norm1 = layer_norm(width, dtype, rngs)
        self.qkv = linear(width, 3 * width, dtype, rngs)
        if memory:
            slots = lambda deviation: nnx.Param(deviation * jax.random.normal(rngs.params(), (memory, width)))
            self.memory_k, self.memory_v = slots(heads / width), slots(1 / memory)
        self.memory = memory
        self.out = linear(width, width, dtype, rngs)
        self.norm2 = layer_norm(width, dtype, rngs)
        self.fc1 = linear(width, int(width * mlp_ratio), dtype, rngs)
        self.fc2 = linear(int(width * mlp_ratio), width, dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"], *, tokens: int | None = None) -> Float[Array, "b n d"]:
        """The block's output; rows after the first `tokens` are padding, to which no token attends."""
        rows, branch = self.attended(x, tokens)
        return self.transformed(rows, branch, self.out.bias[...]).reshape(x.shape)  # type: ignore[index]

    def attended(
        self, x: Float[Array, "b n d"], tokens: int | None = None
    ) -> tuple[Float[Array, "b*n d"], Float[Array, "b*n d"]]:
        """(x as rows, attention(norm x) as rows without the bias of `out`).

        Products of rows are products of matrices. With more axes, XLA's CPU code copies a transpose for each gradient.
        """
        b, n, d = x.shape
        rows, normed = self.norm1.beside(x.reshape(b * n, d))
        q, k, v = jnp.moveaxis(self.qkv(normed).reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        keys = tokens or n
        if self.memory:
            k = self._before(k, self.memory_k[...] * (d / self.heads) ** 0.5)
            v = self._before(v, self.memory_v[...] * self.memory**0.5)
            keys += self.memory
        return rows, product(self.out, attention(q, k, v, keys).reshape(b * n, d))

    def transformed(
        self, rows: Float[Array, "r d"], branch: Float[Array, "r d"], offset: Float[Array, " d"] | None = None
    ) -> Float[Array, "r d"]:
        """s + mlp(norm s), where s is the sum of rows, branch and offset."""
        rows, normed = self.norm2.after(rows, branch, offset)
        return rows + self.fc2(gelu(self.fc1(normed)))

    def _before(self, tokens: Float[Array, "b n h e"], slots: Float[Array, "m d"]) -> Float[Array, "b m+n h e"]:
        b, _, h, e = tokens.shape
        slots = jnp.broadcast_to(slots.reshape(-1, h, e).astype(tokens.dtype), (b, self.memory, h, e))
        return jnp.concatenate([slots, tokens], axis=1)


class Blocks(nnx.Module):
    """`depth` blocks that `make` gives, their parameters stacked on a leading axis, applied by one scan.

    For the backward pass a block saves what `saved` names and computes the rest again, which costs less than to write
    and read it. A step of ViT-S/16 (batch 16, 512x8 decoder) took 1.0 instead of 2.3 GB; a step of the small CPU recipe
    took 0.75 instead of 0.90 s of CPU time. `remat` computes whole blocks again and needs the memory of one block. With
    `long_skips` the output of block i is added to the input of block depth - 1 - i, for all pairs but neighbours.
    """

    def __init__(self, depth: int, make: Callable[[], nnx.Module], remat: bool = False, *, long_skips: bool = False):
        layers = [nnx.split(make()) for _ in range(depth)]
        self.stack = nnx.merge(layers[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s for _, s in layers)))
        self.depth, self.remat = depth, remat
        self.skips = (depth - 1) // 2 if long_skips else 0

    def __call__(self, x: Float[Array, "b n d"], *context: Array, number: int | None = None) -> Float[Array, "b n d"]:
        """Output of block `number`, counted from 1; None: of the last block. Later blocks are not computed. Each block
        gets `context` as further arguments."""
        number = number or self.depth
        if self.skips and number > self.depth - self.skips:
            return self.outputs(x, *context, number=number)[-1]
        block, parameters = self._block(x, context), jax.tree.map(lambda p: p[:number], self._parameters(x))
        return _over(lambda x, p: (block(x, p), None), _filled(x), parameters)[0][:, : x.shape[1]]

    def outputs(
        self, x: Float[Array, "b n d"], *context: Array, number: int | None = None
    ) -> Float[Array, "depth b n d"]:
        """Outputs of the first `number` blocks; None: of all."""
        number = number or self.depth
        block, parameters, n = self._block(x, context), self._parameters(x), min(number, self.depth - self.skips)

        def one(x: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, Array]:
            p, skip = inputs
            x = block(x if skip is None else x + skip, p)
            return x, x

        last, outputs = _over(one, _filled(x), (jax.tree.map(lambda p: p[:n], parameters), None))
        if number > n:
            skipped = outputs[: self.skips][::-1][: number - n]
            more = _over(one, last, (jax.tree.map(lambda p: p[n:number], parameters), skipped))[1]
            outputs = jnp.concatenate([outputs, more])
        return outputs[:, :, : x.shape[1]]

    def _block(self, x: Float[Array, "b n d"], context: tuple[Array, ...]) -> Callable[[Array, Any], Array]:
        """A block as a function of input and parameters. The input may have padding after the tokens of `x`."""
        graph, tokens = nnx.graphdef(self.stack), x.shape[1]
        block = lambda x, p: over_samples(nnx.merge(graph, p))(x, *context, tokens=tokens)
        # Without a loop around the blocks, the compiler would find whole blocks computed twice and keep their results.
        apart = self.remat and target().platform == "cuda"
        return jax.checkpoint(block, prevent_cse=apart, policy=None if self.remat else saved)

    def _parameters(self, x: Float[Array, "b n d"]) -> Any:
        """All blocks' parameters. On accelerators the matrices have the type of `x`, cast once for all blocks.

        Devices also add the gradients of these matrices in that type, which halves what they send. On eight devices
        the error is below one percent (tests/test_gpu.py); on more it was not measured. The optimiser's moments are
        float32.
        """
        parameters = nnx.state(self.stack)
        if target().platform == "cpu":
            return parameters
        return jax.tree.map_with_path(lambda path, p: p.astype(x.dtype) if _is_kernel(path) else p, parameters)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == "kernel" for key in path)


def _filled(x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    """The tokens, and after them rows of 0 that bring the sequence to a length that suits the device."""
    return jnp.pad(x, ((0, 0), (0, padding(x.shape[1])), (0, 0)))


def _over(step: Callable, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, unrolled for NVIDIA GPUs.

    On these, a loop copies and clears what each block saves, launches twice as many kernels, and overlaps no
    communication with the next block. The loop's only advantage is half the time to compile.
    """
    unroll = target().platform == "cuda"
    return jax.lax.scan(step, carry, inputs, unroll=unroll or 1)
