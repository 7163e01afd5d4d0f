"""The network of the published SimSID: an autoencoder over windows with memories, for images with any number of axes.

Xiang et al., "Exploiting Structural Consistency of Chest Anatomy for Unsupervised Anomaly Detection in Radiography
Images" (SimSID), TPAMI 2024, arXiv 2403.08689; consulted: MrGiovanni/SimSID and its predecessor tiangexiang/SQUID. The
discriminator is in jmae/nn/simsid.py, as the report has it too.

Differences: the code loops over windows, here they are an axis. Keys and values of the attention have no bias: a
softmax ignores a bias of the keys, and the bias of the output contains that of the values. Vectors have the channels
last.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jmae.errors import InputError
from jmae.nn.attention import attention
from jmae.nn.conv import conv, convolve, upsample
from jmae.nn.norm import LayerNorm
from jmae.nn.simsid import Layer, halved, neighbours, pytorch_weights, retrieve
from jmae.nn.transformer import linear
from jmae.patches import grid_of, patchify, unpatchify
from jmae.sharding import device_gather

layer_norm = partial(LayerNorm, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)


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


class Queue(nnx.Variable):
    """Rows of a memory that the last training features fill; no gradient changes them."""


class Slots(nnx.Module):
    """Memories, one of `slots` rows for each window, read by `retrieve` without noise.

    The rows are learned, or with `queue` the queries of the last training steps, first in, first out. They are drawn
    uniformly within 1 / sqrt(width).
    """

    def __init__(self, windows: int, slots: int, width: int, k: int, *, queue: bool = False, rngs: nnx.Rngs):
        least = width**-0.5
        rows = jax.random.uniform(rngs.params(), (windows, slots, width), minval=-least, maxval=least)
        self.rows = Queue(rows) if queue else nnx.Param(rows)
        self.k = k

    def __call__(self, query: Float[Array, "b w d"], oldest: Int[Array, ""] | None = None) -> Float[Array, "b w d"]:
        """What the queries read; with the number of the oldest row they then take the place of the oldest rows."""
        query = query.astype(jnp.float32)
        read = retrieve(query, self.rows[...], k=self.k)
        if oldest is not None:
            values = jnp.moveaxis(device_gather(jax.lax.stop_gradient(query)), 1, 0)
            places = (oldest + jnp.arange(values.shape[1])) % self.rows.shape[1]
            self.rows[...] = self.rows[...].at[:, places].set(values)
        return read


class Bottleneck(nnx.Module):
    """SimSID's inpaint block.

    The features of each window, as one vector, read the window's memory; without `slots` the features themselves are
    the read. The vector then queries the reads of the windows around: attention, norm, sum with the window's own read,
    ReLU. A feed-forward part with norm, sum and ReLU follows. Without `inpainting` the own read goes on as it is. The
    window's number in binary comes as further channels. Convolutions of kernel 1 stand before and after.

    Norms are on the branch, as released. With `norms="sum"` they take the sum with the read, as earlier versions did.

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
        queue: bool = False,
        inpainting: bool = True,
        norms: str = "branch",
        rngs: nnx.Rngs,
    ):
        rank, self.windows, narrow = len(windows), windows, width // 4
        vector = narrow * prod(cells)
        if vector % heads or vector < 4 or width % 4:
            raise InputError(
                f"joint.widths ends with {width}: a multiple of 4, and joint.heads {heads} divides its {vector}"
            )
        self.enter = Layer(rank, width, narrow, 1, dtype, bias=False, rngs=rngs)
        self.memory = Slots(prod(windows), slots, vector, k, queue=queue, rngs=rngs) if slots else None
        self.q = linear(vector, vector, dtype, rngs)
        self.kv = nnx.Linear(vector, 2 * vector, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(vector, vector, dtype, rngs)
        self.norm1, self.norm2 = layer_norm(vector, rngs=rngs), layer_norm(vector, rngs=rngs)
        self.fc1, self.fc2 = linear(vector, vector // 4, dtype, rngs), linear(vector // 4, vector, dtype, rngs)
        bits = prod(windows).bit_length()
        self.leave = Layer(rank, narrow + bits, width, 1, dtype, rngs=rngs)
        self.heads, self.cells, self.bits, self.dtype = heads, cells, bits, dtype
        self.inpainting, self.norms = inpainting, norms

    def __call__(
        self, x: Float[Array, "g *cells c"], *, train: bool, oldest: Int[Array, ""] | None = None
    ) -> Float[Array, "g *cells c"]:
        w = prod(self.windows)
        f = self.enter(x, train=train).reshape(-1, w, self.q.in_features)
        read = self.memory(f, oldest) if self.memory else f.astype(jnp.float32)
        y = self.inpainted(f, read) if self.inpainting else read
        bits = (np.arange(w)[:, None] >> np.arange(self.bits)[::-1] & 1).astype(np.float32)  # highest first
        bits = np.tile(bits, (len(f), 1)).reshape(-1, *[1] * len(self.cells), self.bits)
        y = y.reshape(-1, *self.cells, f.shape[-1] // prod(self.cells))
        y = jnp.concatenate([y, jnp.broadcast_to(bits, (*y.shape[:-1], self.bits))], -1).astype(self.dtype)
        return self.leave(y, train=train)

    def inpainted(self, f: Float[Array, "b w d"], read: Float[Array, "b w d"]) -> Float[Array, "b w d"]:
        """The transformer layer over the windows around each window."""
        b, w, d = f.shape
        # Keys and values have no bias: zeros outside the image stay zeros, and can be gathered after the projection.
        kv = neighbours(self.kv(read.astype(self.dtype)), self.windows).reshape(
            b * w, -1, 2, self.heads, d // self.heads
        )
        q = self.q(f).reshape(b * w, 1, self.heads, -1)
        y = self.out(attention(q, *jnp.moveaxis(kv, 2, 0)).reshape(b, w, d))
        added = lambda norm, branch, x: norm(branch) + x if self.norms == "branch" else norm(branch + x)
        y = jax.nn.relu(added(self.norm1, y, read))
        return jax.nn.relu(added(self.norm2, self.fc2(jax.nn.relu(self.fc1(y))), y))


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

    The student decoder has learned memories after its levels with skips, or none without `slots`. The teacher decoder
    has none, and its features come without gradient. `widths` go from the first level to the bottleneck. Windows are
    joined before the level that follows the last skip. Images are in [-1, 1], or with `sigmoid` in [0, 1].

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
        decoder_share: float = 1.0,
        queue: bool = False,
        inpainting: bool = True,
        norms: str = "branch",
        sigmoid: bool = False,
        rngs: nnx.Rngs,
    ):
        rank, levels = len(size), len(widths) - 1
        if len(windows) != rank or not 0 < joined < levels:
            raise InputError(f"joint.windows has a number an axis, joint.joined is from 1 to {levels - 1}")
        if any(n % (w * 2**levels) or (2 * n // (w * 2**levels)) % w for n, w in zip(size, windows, strict=True)):
            least = tuple(w * 2**levels for w in windows)
            raise InputError(f"data.size {tuple(size)}: joint.windows {windows} need multiples of {least}")
        self.windows, self.joined, self.dtype = windows, joined, dtype
        self.share, self.decoder_share = share, decoder_share
        self.activation = jax.nn.sigmoid if sigmoid else jnp.tanh
        cells = tuple(n // (w * 2**levels) for n, w in zip(size, windows, strict=True))
        pairs = pairwise(widths)
        self.enter = Residual(rank, channels, widths[0], dtype, rngs=rngs)
        self.down = nnx.List([Residual(rank, a, b, dtype, halved, rngs=rngs) for a, b in pairs])
        options: dict[str, Any] = {"queue": queue, "inpainting": inpainting, "norms": norms}
        self.inpaint = Bottleneck(windows, cells, widths[-1], slots, k, heads, dtype, **options, rngs=rngs)
        up = widths[::-1]
        self.student = Decoder(rank, channels, up, joined, dtype, rngs=rngs)
        self.teacher = Decoder(rank, channels, up, joined, dtype, rngs=rngs)
        # The code divides each window once more, into as many parts as there are windows; each part has a memory.
        lengths = [
            up[i + 1] * prod(2 ** (i + 1) * c // w for c, w in zip(cells, windows, strict=True)) for i in range(joined)
        ]
        self.memories = nnx.List([Slots(prod(windows), slots, d, k, rngs=rngs) for d in lengths if slots])

    def whole(self, x: Float[Array, "g *cells c"]) -> Float[Array, "b *size c"]:
        """The windows joined to whole images."""
        window = x.shape[1:-1]
        size = tuple(n * w for n, w in zip(window, self.windows, strict=True))
        return unpatchify(x.reshape(-1, prod(self.windows), prod(x.shape[1:])), size, window)

    def remembered(self, x: Float[Array, "g *cells c"], memory: Slots) -> Float[Array, "g *cells c"]:
        """What the parts of each window read from their memories."""
        part = grid_of(x.shape[1:-1], self.windows)
        return unpatchify(memory(patchify(x, part)), x.shape[1:-1], part).astype(self.dtype)

    def kept(
        self,
        new: Float[Array, "g *cells c"],
        old: Float[Array, "g *cells c"],
        keys: Key[Array, " b"] | None,
        share: float,
    ) -> Float[Array, "g *cells c"]:
        """The masked shortcut: with keys (b,) a cell keeps its new features with probability `share`."""
        if keys is None or share == 1:
            return new
        shape = (len(new) // len(keys), *new.shape[1:-1], 1)
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, share, shape))(keys)
        return jnp.where(mask.reshape(-1, *shape[1:]), new, old)

    def __call__(
        self,
        image: Float[Array, "b *size c"],
        keys: Key[Array, " b"] | None = None,
        *,
        train: bool,
        oldest: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b *size c"], Float[Array, "b *size c"], Float[Array, ""]]:
        """(student's image, teacher's image, distillation).

        The distillation is the mean squared difference of the two decoders' features, summed over the levels. With keys
        (b,) the bottleneck and the decoder's memories have the masked shortcut. `oldest` as in `Slots`.
        """
        mode: dict[str, Any] = {"train": train}
        window = grid_of(image.shape[1:-1], self.windows)
        x = self.enter(patchify(image, window).reshape(-1, *window, image.shape[-1]).astype(self.dtype), **mode)
        skips = [x]
        for layer in self.down:
            skips.append(layer(skips[-1], **mode))
        x = self.kept(self.inpaint(skips[-1], oldest=oldest, **mode), skips[-1], keys, self.share)
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
            if i < len(self.memories):
                own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
                x = self.kept(self.remembered(x, self.memories[i]), x, own, self.decoder_share)
            differences += jnp.mean((x.astype(jnp.float32) - taught.astype(jnp.float32)) ** 2)
        out = lambda decoder, x: self.activation(decoder.out(x).astype(jnp.float32))
        return out(self.student, x), out(self.teacher, taught), differences


def pytorch_autoencoder(params: dict[Any, Any], key: Key[Array, ""]) -> dict[Any, Any]:
    """`pytorch_weights` of `Windows`. Its attention starts otherwise: queries, keys and values are Xavier uniform (of
    their joint matrix), and no bias."""
    params = pytorch_weights(params, key)
    block = params["inpaint"]
    scale = 1.5**0.5  # 1 / sqrt(d) becomes sqrt(6 / (d + 3 d))
    joint = {name: block[name] | {"kernel": scale * block[name]["kernel"]} for name in ("q", "kv")}
    zero = {name: {"bias": jnp.zeros_like(block[name]["bias"])} for name in ("q", "out")}
    changed = {name: block[name] | joint.get(name, {}) | zero.get(name, {}) for name in ("q", "kv", "out")}
    return params | {"inpaint": block | changed}
