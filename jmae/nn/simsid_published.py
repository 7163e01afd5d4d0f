"""The network of the published SimSID: an autoencoder over windows with memories, for images with any number of axes.

Xiang et al., "Exploiting Structural Consistency of Chest Anatomy for Unsupervised Anomaly Detection in Radiography
Images" (SimSID), TPAMI 2024, arXiv 2403.08689; consulted: MrGiovanni/SimSID and its predecessor tiangexiang/SQUID. The
discriminator is in jmae/nn/simsid.py, as the report has it too.

Differences: the code loops over windows, here they are an axis. Keys and values of the attention have no bias: a
softmax ignores that of the keys, and the bias of the output takes that of the values.
"""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jmae.errors import InputError
from jmae.nn.attention import attention
from jmae.nn.conv import conv, convolve, upsample
from jmae.nn.simsid import Layer, halved, neighbours, retrieve
from jmae.nn.transformer import layer_norm, linear
from jmae.patches import grid_of, patchify, unpatchify


class Residual(nnx.Module):
    """Three convolutions of kernel 3 with batch norm, then ReLU of the sum of the first and the last one's results."""

    def __init__(
        self, rank: int, inputs: int, outputs: int, dtype: DTypeLike, form: Callable = convolve, *, rngs: nnx.Rngs
    ):
        self.enter = Layer(rank, inputs, outputs, 3, dtype, form=form, rngs=rngs)
        self.middle = Layer(rank, outputs, outputs, 3, dtype, rngs=rngs)
        self.leave = Layer(rank, outputs, outputs, 3, dtype, activation=lambda x: x, rngs=rngs)

    def __call__(self, x: Float[Array, "b *size c"], *, train: bool) -> Float[Array, "b *_ d"]:
        x = self.enter(x, train=train)
        y = self.middle(x, train=train)
        return jax.nn.relu(x + self.leave(y, train=train))


class Slots(nnx.Module):
    """Learned memories, one of `slots` rows for each window, read by `retrieve` without noise.

    Rows are drawn uniformly within 1 / sqrt(width).
    """

    def __init__(self, windows: int, slots: int, width: int, k: int, *, rngs: nnx.Rngs):
        least = width**-0.5
        self.rows = nnx.Param(jax.random.uniform(rngs.params(), (windows, slots, width), minval=-least, maxval=least))
        self.k = k

    def __call__(self, query: Float[Array, "b w d"]) -> Float[Array, "b w d"]:
        return retrieve(query.astype(jnp.float32), self.rows[...], k=self.k)


class Bottleneck(nnx.Module):
    """SimSID's inpaint block.

    The features of each window, as one vector, read the window's memory. The vector then queries the reads of the
    windows around, and the window's read is added. Norm, ReLU, feed-forward, norm and ReLU follow. The window's number
    in binary comes as further channels. Convolutions of kernel 1 stand before and after.

    Raises InputError where the heads do not divide the vector.
    """

    def __init__(
        self,
        windows: tuple[int, ...],
        cells: tuple[int, ...],
        width: int,
        slots: int,
        k: int,
        heads: int,
        dtype: DTypeLike,
        *,
        rngs: nnx.Rngs,
    ):
        rank, self.windows, narrow, f32 = len(windows), windows, width // 4, jnp.float32
        vector = narrow * prod(cells)
        if vector % heads or vector < 4 or width % 4:
            raise InputError(
                f"joint.widths ends with {width}: a multiple of 4, and joint.heads {heads} divides its {vector}"
            )
        self.enter = Layer(rank, width, narrow, 1, dtype, bias=False, rngs=rngs)
        self.memory = Slots(prod(windows), slots, vector, k, rngs=rngs)
        self.q = linear(vector, vector, dtype, rngs)
        self.kv = nnx.Linear(vector, 2 * vector, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(vector, vector, dtype, rngs)
        self.norm1, self.norm2 = layer_norm(vector, f32, rngs), layer_norm(vector, f32, rngs)
        self.fc1, self.fc2 = linear(vector, vector // 4, dtype, rngs), linear(vector // 4, vector, dtype, rngs)
        bits = prod(windows).bit_length()
        self.leave = Layer(rank, narrow + bits, width, 1, dtype, rngs=rngs)
        self.heads, self.cells, self.bits, self.dtype = heads, cells, bits, dtype

    def __call__(self, x: Float[Array, "g *cells c"], *, train: bool) -> Float[Array, "g *cells c"]:
        w = prod(self.windows)
        f = self.enter(x, train=train).reshape(-1, w, self.q.in_features)
        b, _, d = f.shape
        read = self.memory(f)
        # Keys and values have no bias: zeros outside the image stay zeros, and can be gathered after the projection.
        kv = neighbours(self.kv(read.astype(self.dtype)), self.windows).reshape(
            b * w, -1, 2, self.heads, d // self.heads
        )
        q = self.q(f).reshape(b * w, 1, self.heads, -1)
        y = self.out(attention(q, *jnp.moveaxis(kv, 2, 0)).reshape(b, w, d))
        y = jax.nn.relu(self.norm1(y + read))
        y = jax.nn.relu(self.norm2(y + self.fc2(jax.nn.relu(self.fc1(y)))))
        bits = (np.arange(w)[:, None] >> np.arange(self.bits)[::-1] & 1).astype(np.float32)  # highest first
        bits = np.tile(bits, (b, 1)).reshape(b * w, *[1] * len(self.cells), self.bits)
        y = y.reshape(b * w, *self.cells, -1)
        y = jnp.concatenate([y, jnp.broadcast_to(bits, (*y.shape[:-1], self.bits))], -1).astype(self.dtype)
        return self.leave(y, train=train)


class Decoder(nnx.Module):
    """The layers of a decoder: a residual block for each level, whose first `joined` levels have skips, and a
    convolution of kernel 1. `Windows` calls them."""

    def __init__(
        self, rank: int, channels: int, widths: tuple[int, ...], joined: int, dtype: DTypeLike, *, rngs: nnx.Rngs
    ):
        triples = [(a + b * (i < joined), b) for i, (a, b) in enumerate(pairwise(widths))]
        self.levels = nnx.List([Residual(rank, a, b, dtype, rngs=rngs) for a, b in triples])
        self.out = conv(rank, widths[-1], channels, 1, dtype, rngs, bias=True)


class Windows(nnx.Module):
    """SimSID's autoencoder over windows: an encoder, the inpaint block, a student decoder and a teacher decoder.

    The student decoder has memories after its levels with skips. The teacher decoder has none, and its features come
    without gradient. `widths` go from the first level to the bottleneck. Windows are joined before the level that
    follows the last skip. Images are in [-1, 1].

    Raises InputError where windows cannot be halved that often.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        windows: tuple[int, ...],
        widths: tuple[int, ...],
        joined: int,
        slots: int,
        k: int,
        heads: int,
        share: float,
        dtype: DTypeLike,
        *,
        rngs: nnx.Rngs,
    ):
        rank, levels = len(size), len(widths) - 1
        if len(windows) != rank or not 0 < joined < levels:
            raise InputError(f"joint.windows has a number an axis, joint.joined is from 1 to {levels - 1}")
        if any(n % (w * 2**levels) or (2 * n // (w * 2**levels)) % w for n, w in zip(size, windows, strict=True)):
            least = tuple(w * 2**levels for w in windows)
            raise InputError(f"data.size {tuple(size)}: joint.windows {windows} need multiples of {least}")
        self.windows, self.joined, self.share, self.dtype = windows, joined, share, dtype
        cells = tuple(n // (w * 2**levels) for n, w in zip(size, windows, strict=True))
        pairs = pairwise(widths)
        self.enter = Residual(rank, channels, widths[0], dtype, rngs=rngs)
        self.down = nnx.List([Residual(rank, a, b, dtype, halved, rngs=rngs) for a, b in pairs])
        self.inpaint = Bottleneck(windows, cells, widths[-1], slots, k, heads, dtype, rngs=rngs)
        up = widths[::-1]
        self.student = Decoder(rank, channels, up, joined, dtype, rngs=rngs)
        self.teacher = Decoder(rank, channels, up, joined, dtype, rngs=rngs)
        # The code divides each window once more, into as many parts as there are windows; each part has a memory.
        lengths = [
            up[i + 1] * prod(2 ** (i + 1) * c // w for c, w in zip(cells, windows, strict=True)) for i in range(joined)
        ]
        self.memories = nnx.List([Slots(prod(windows), slots, d, k, rngs=rngs) for d in lengths])

    def whole(self, x: Float[Array, "g *cells c"]) -> Float[Array, "b *size c"]:
        """The windows joined to whole images."""
        window = x.shape[1:-1]
        size = tuple(n * w for n, w in zip(window, self.windows, strict=True))
        return unpatchify(x.reshape(-1, prod(self.windows), prod(x.shape[1:])), size, window)

    def remembered(self, x: Float[Array, "g *cells c"], memory: Slots) -> Float[Array, "g *cells c"]:
        """What the parts of each window read from their memories."""
        part = grid_of(x.shape[1:-1], self.windows)
        return unpatchify(memory(patchify(x, part)), x.shape[1:-1], part).astype(self.dtype)

    def __call__(
        self,
        image: Float[Array, "b *size c"],
        keys: Key[Array, " b"] | None = None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "b *size c"], Float[Array, "b *size c"], Float[Array, ""]]:
        """(student's image, teacher's image, distillation).

        The distillation is the mean squared difference of the two decoders' features, summed over the levels. With keys
        (b,) a cell keeps its inpainted features with probability `share` (the masked shortcut).
        """
        mode: dict[str, Any] = {"train": train}
        window = grid_of(image.shape[1:-1], self.windows)
        x = self.enter(patchify(image, window).reshape(-1, *window, image.shape[-1]).astype(self.dtype), **mode)
        skips = [x]
        for layer in self.down:
            skips.append(layer(skips[-1], **mode))
        x = self.inpaint(skips[-1], **mode)
        if keys is not None and self.share < 1:
            shape = (prod(self.windows), *x.shape[1:-1], 1)
            mask = jax.vmap(lambda key: jax.random.bernoulli(key, self.share, shape))(keys)
            x = jnp.where(mask.reshape(-1, *shape[1:]), x, skips[-1])
        taught, differences = jax.lax.stop_gradient(skips[-1]), jnp.float32(0)
        for i, skip in enumerate(skips[-2::-1]):
            size = skip.shape[1:-1]
            if i == self.joined:
                x, taught = self.whole(x), self.whole(taught)
            if i >= self.joined:
                size = tuple(n * w for n, w in zip(size, self.windows, strict=True))
            x, taught = upsample(x, size), upsample(taught, size)
            if i < self.joined:
                x = jnp.concatenate([skip, x], -1)
                taught = jnp.concatenate([jax.lax.stop_gradient(skip), taught], -1)
            x, taught = self.student.levels[i](x, **mode), self.teacher.levels[i](taught, **mode)
            if i < self.joined:
                x = self.remembered(x, self.memories[i])
            differences += jnp.mean((x.astype(jnp.float32) - taught.astype(jnp.float32)) ** 2)
        out = lambda decoder, x: jnp.tanh(decoder.out(x).astype(jnp.float32))
        return out(self.student, x), out(self.teacher, taught), differences
