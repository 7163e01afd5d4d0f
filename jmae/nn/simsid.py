"""The networks of the SimSID report: encoder of patches, memory, inpainting, generator and discriminator.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025), algorithms 4.1 to 4.8,
and the method that it simplifies: Xiang et al., "Exploiting Structural Consistency of Chest Anatomy for Unsupervised
Anomaly Detection in Radiography Images" (SimSID), TPAMI 2024, arXiv 2403.08689; consulted: MrGiovanni/SimSID and its
predecessor tiangexiang/SQUID. The network of the published code is in jmae/nn/simsid_published.py. Images have any
number of axes.

Differences: the listings loop over patches, positions and levels, here each is an axis. What the report leaves open is
ours: kernel 3 in the encoder, kernel 4, stride 2 and padding 1 in the generators, top-k weights that sum to one, and
dropout on the two branches of a layer.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise, product
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jmae.errors import InputError
from jmae.nn.attention import attention
from jmae.nn.conv import batch_norm_in_training, conv, convolve, dropout, normalised, on_gpu
from jmae.nn.norm import on_last_axes
from jmae.nn.transformer import layer_norm, linear
from jmae.patches import grid_of, patchify, unpatchify
from jmae.sharding import on_each_device

leaky_relu = partial(jax.nn.leaky_relu, negative_slope=0.2)


# --- convolutions -----------------------------------------------------------------------------------------------------


def halved(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: object, **__: object
) -> Float[Array, "b *half d"]:
    """Convolution of stride 2 with an odd kernel of length k and k // 2 zeros around: ceil(n / 2) values along an axis.

    The function takes the place of `lax.conv_general_dilated` in `nnx.Conv`. It is a convolution of stride 1 over
    blocks of 2, whose gradients are fast on XLA's CPU: 16x8x8x64 to 128 with kernel 5, forward and backward, took
    5.4 ms instead of 24.7 ms on one core.
    """
    rank, k, (c, d) = x.ndim - 2, kernel.shape[0], kernel.shape[-2:]
    half, two = k // 2, (2,) * rank
    below, above = ceil(half / 2), half // 2  # blocks that the kernel reaches
    x = jnp.pad(x, ((0, 0), *((0, n % 2) for n in x.shape[1:-1]), (0, 0)))
    blocks = patchify(x, two).reshape(len(x), *(n // 2 for n in x.shape[1:-1]), -1)
    length = below + 1 + above
    ends = (2 * below - half, 2 * length - k - (2 * below - half))
    kernel = jnp.pad(kernel, (*[ends] * rank, (0, 0), (0, 0)))
    flat = patchify(kernel.reshape(1, *kernel.shape[:rank], c * d), two)
    return convolve(blocks, flat.reshape(*[length] * rank, -1, d))


def doubled(
    x: Float[Array, "b *size c"], kernel: Float[Array, "*kernel c d"], *_: object, **__: object
) -> Float[Array, "b *double d"]:
    """Transposed convolution of kernel 4, stride 2 and padding 1 along every axis.

    Output u is the sum of x[j] kernel[2 j - u + 2] over j. Each of the 2^rank outputs of a cell depends on 2^rank
    inputs, so that one matrix product gives all. Forward and backward from 16x8x8x64 to 32 channels took 3.1 ms on one
    core, where `lax.conv_general_dilated` with dilation took 32.2 ms.
    """
    rank, size, (c, d) = x.ndim - 2, x.shape[1:-1], kernel.shape[-2:]
    corners, two = list(product(range(2), repeat=rank)), (2,) * rank

    def window(x: Array, start: tuple[int, ...], more: int) -> Array:
        return x[(slice(None), *(slice(a, a + n + more) for a, n in zip(start, size, strict=True)))]

    padded = jnp.pad(x, ((0, 0), *[(1, 1)] * rank, (0, 0)))
    near = jnp.concatenate([window(padded, at, 1) for at in corners], -1)  # the 2^rank cells around each corner
    matrix = patchify(kernel.reshape(1, *kernel.shape[:rank], c * d), two).reshape(2**rank, 2**rank, c, d)
    every = near @ matrix.transpose(0, 2, 1, 3).reshape(2**rank * c, 2**rank * d)
    every = every.reshape(*near.shape[:-1], 2**rank, d)
    outputs = jnp.stack([window(every[..., i, :], at, 0) for i, at in enumerate(corners)], -2)
    return unpatchify(outputs.reshape(len(x), -1, 2**rank * d), tuple(2 * n for n in size), two)


def max_pool(x: Float[Array, "b *size c"]) -> Float[Array, "b *half c"]:
    """The largest value of each block of 2 along every axis.

    It is taken by pairs. Forward and backward of 256x16x16x16 took 11.7 ms instead of 19.3 ms on one core. The gradient
    of `max` would also divide by the number of values equal to the largest, and rounding may leave none.
    """
    size = x.shape[1:-1]
    split = x.reshape(len(x), *[length for n in size for length in (n // 2, 2)], x.shape[-1])
    corners = product(range(2), repeat=len(size))
    return reduce(jnp.maximum, [split[(slice(None), *[i for a in at for i in (slice(None), a)])] for at in corners])


class Layer(nnx.Module):
    """Convolution with bias, batch norm (momentum 0.9, epsilon 1e-5, float32), activation."""

    def __init__(
        self,
        rank: int,
        inputs: int,
        outputs: int,
        length: int,
        dtype: DTypeLike,
        *,
        form: Callable = convolve,
        activation: Callable[[Array], Array] = jax.nn.relu,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.conv = conv(rank, inputs, outputs, length, dtype, rngs, bias=bias, form=form)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.activation, self.form, self.dtype = activation, form, dtype

    def __call__(self, x: Float[Array, "b *size c"], *, train: bool, alone: bool = False) -> Float[Array, "b *_ d"]:
        if alone:
            return self.alone(x)
        if train and on_gpu():
            return self.trained(x)
        return self.activation(self.norm(self.conv(x), use_running_average=not train)).astype(self.dtype)

    def alone(self, x: Float[Array, "b *size c"]) -> Float[Array, "b *_ d"]:
        """The layer with the moments of each image by itself, as training has them for a batch of one image."""
        y = self.conv(x).astype(jnp.float32)
        parameters: list[Any] = [self.norm.scale, self.norm.bias]
        axes = tuple(range(1, y.ndim - 1))
        mean, var = jnp.mean(y, axes, keepdims=True), jnp.var(y, axes, keepdims=True)
        scale, bias = (x[...].reshape(*[1] * (y.ndim - 1), -1) for x in parameters)
        y = normalised(y, mean, var, scale, bias, self.norm.epsilon)
        return self.activation(y).astype(self.dtype)

    def trained(self, x: Float[Array, "b *size c"]) -> Float[Array, "b *_ d"]:
        """The layer in training, in fewer kernels.

        The gradient of a bias before batch norm is 0 up to rounding, so its sums are left out. The variance is E[y^2] -
        E[y]^2, as in Flax; a shift would write `y` to memory.
        """
        y = self.form(x.astype(self.dtype), self.conv.kernel[...].astype(self.dtype))
        if self.conv.bias is not None:
            y = y + on_last_axes(jax.lax.stop_gradient(self.conv.bias[...]).astype(self.dtype), y)
        return batch_norm_in_training(self.norm, y, jnp.zeros(y.shape[-1]), self.activation)


def pytorch_weights(params: dict[Any, Any], key: Key[Array, ""]) -> dict[Any, Any]:
    """A network's parameters, drawn anew as PyTorch draws those of convolutions and dense layers.

    Kernels and biases are uniform within 1 / sqrt(fan in). Parameters of layers without a kernel stay.
    """
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(sorted(params))}
    if "kernel" not in params:
        return {name: pytorch_weights(x, keys[name]) if isinstance(x, dict) else x for name, x in params.items()}
    most = prod(params["kernel"].shape[:-1]) ** -0.5
    return {name: jax.random.uniform(keys[name], x.shape, minval=-most, maxval=most) for name, x in params.items()}


# --- memory -----------------------------------------------------------------------------------------------------------


def hierarchy(grid: tuple[int, ...], levels: int) -> list[np.ndarray]:
    """The slot of each patch at each level, patches in C order (Alg. 4.5).

    Level 0 has one slot for each patch, level 1 one for each block of 2 patches along every axis, level 2 one for all
    patches. The blocks' shape is ours, as the report gives none.
    """
    places = np.indices(grid).reshape(len(grid), -1)
    blocks = np.asarray(np.ravel_multi_index(tuple(places // 2), tuple(-(-n // 2) for n in grid)))
    return [np.arange(prod(grid)), blocks, np.zeros(prod(grid), np.int64)][:levels]


def summaries(features: Float[Array, "b n d"], slots: list[np.ndarray]) -> Float[Array, "b m d"]:
    """The values that an image offers to the slots, level by level (Alg. 4.5).

    They are the features of each patch, their mean over each block, and the largest value of each feature.
    """
    out = [features]
    if len(slots) > 1:
        members = np.equal.outer(np.arange(slots[1].max() + 1), slots[1])
        out.append(jnp.einsum("mn,bnd->bmd", (members / members.sum(1, keepdims=True)).astype(np.float32), features))
    if len(slots) > 2:
        out.append(jnp.max(features, axis=1, keepdims=True))
    return jnp.concatenate(out, 1)


Memory = tuple[Float[Array, "m s d"], Int[Array, " m"]]
"""The rows of each slot, and how often each slot was written."""


def write(
    memory: Memory, values: Float[Array, "m d"], *, threshold: float, ema: float = 0.0
) -> tuple[Memory, Bool[Array, " m"]]:
    """Offers one image's values to all slots at once (Alg. 4.4): (the memory, which slots were written).

    A slot stays as it is if the cosine between one of its rows and its value is at least `threshold`. Otherwise the
    value replaces the oldest row. An empty slot always takes its value.

    With one row, a slot remembers its last writer alone. So a second pass over the same images in the same order meets
    the same rows as the first, from its first write on, and writes as many. The writing ends only with several rows a
    slot, a lower threshold or `ema`.

    With `ema` (ours), the first visit writes the value. Every further visit moves the only row by that share of the way
    to the value.
    """
    rows, count = memory
    rows_norm, norm = jnp.linalg.norm(rows, axis=-1), jnp.linalg.norm(values, axis=-1)
    cosine = jnp.einsum("msd,md->ms", rows, values) / (rows_norm * norm[:, None] + 1e-8)
    if ema:
        share = jnp.where(count == 0, 1.0, ema)[:, None, None]
        return (rows + share * (values[:, None] - rows), count + 1), jnp.ones(len(count), bool)
    written = (jnp.max(cosine, -1) < threshold) | (count == 0)
    place = jax.nn.one_hot(count % rows.shape[1], rows.shape[1], dtype=bool) & written[:, None]
    return (jnp.where(place[..., None], values[:, None], rows), count + written), written


def write_all(
    memory: Memory, values: Float[Array, "b m d"], allowed: Bool[Array, " b"], *, threshold: float, ema: float = 0.0
) -> tuple[Memory, Bool[Array, "b m"]]:
    """`write` of the images of a batch that are `allowed`, in their order; the last writer stays."""

    def one(memory: Memory, image: tuple[Array, Array]) -> tuple[Memory, Array]:
        new, written = write(memory, image[0], threshold=threshold, ema=ema)
        return jax.tree.map(partial(jnp.where, image[1]), new, memory), written & image[1]

    return jax.lax.scan(one, memory, (values, allowed))


def retrieve(
    query: Float[Array, "b n d"],
    rows: Float[Array, "*n m d"],
    *,
    k: int,
    temperature: float = 1.0,
    noise: Float[Array, "*_ m"] | float = 0.0,
    weighted: bool = True,
) -> Float[Array, "b n d"]:
    """The weighted sum of the k memory rows that are most like each query (Alg. 4.4).

    Weights are softmax((query rows^T + noise) / temperature). The k highest are made to sum to one; without `weighted`
    each of them is 1. Of equal weights the first counts. `rows` are the same for all queries, or a set for each.

    Gumbel `noise` makes the choice a sample, none gives the mode, and -1e30 excludes a row. Gradients pass straight
    through, as in SimSID's code: forward with the k weights, backward as if the sum had all softmax weights.
    """
    axes = "nmd" if rows.ndim == 3 else "md"
    products = jnp.einsum(f"bnd,{axes}->bnm", query, rows)
    soft = jax.nn.softmax((products + on_last_axes(noise, products)) / temperature)
    highest = on_each_device(lambda x: jax.lax.top_k(x, min(k, x.shape[-1]))[1])  # otherwise XLA gathers all queries
    index = highest(jax.lax.stop_gradient(soft))
    hard = jnp.sum(jax.nn.one_hot(index, soft.shape[-1], dtype=soft.dtype), -2)
    if weighted:
        hard = hard * soft
        hard = hard / jnp.sum(hard, -1, keepdims=True)
    weights = soft + jax.lax.stop_gradient(hard - soft)
    return jnp.einsum(f"bnm,{axes}->bnd", weights, rows)


def recall(
    memory: Memory,
    features: Float[Array, "b n d"],
    slots: list[np.ndarray],
    *,
    k: int,
    temperature: float = 1.0,
    weighted: bool = True,
    restrict: bool = False,
    keys: Key[Array, " b"] | None = None,
) -> Float[Array, "b n e"]:
    """What each patch retrieves from every level, side by side (Alg. 4.5).

    A patch retrieves from all written rows of a level, or with `restrict` from the rows of the patch's slot. With keys
    (b,) the retrieval is under Gumbel noise, -log(-log u).
    """
    rows, count = memory
    bars = jnp.where(jnp.arange(rows.shape[1])[None] < count[:, None], 0.0, -1e30)  # (m, s)
    starts = np.cumsum([level.max() + 1 for level in slots])[:-1]
    by_level = lambda x: [
        part[level] if restrict else part.reshape(-1, *x.shape[2:])
        for part, level in zip(jnp.split(x, starts), slots, strict=True)
    ]
    levels, noise = by_level(rows), by_level(bars)
    ends = np.cumsum([part.shape[-1] for part in noise])
    if keys is not None:
        draw = lambda key: jax.random.gumbel(key, (features.shape[1], ends[-1]))
        gumbel = jnp.split(jax.vmap(draw)(keys), ends[:-1], -1)
        noise = [on_last_axes(bar, part) + part for bar, part in zip(noise, gumbel, strict=True)]
    one = partial(retrieve, features, k=k, temperature=temperature, weighted=weighted)
    return jnp.concatenate([one(rows, noise=part) for rows, part in zip(levels, noise, strict=True)], -1)


def neighbours(x: Float[Array, "b n d"], grid: tuple[int, ...]) -> Float[Array, "b n k d"]:
    """The cells around each cell of a grid, in C order without the cell itself; zeros outside."""
    rank = len(grid)
    padded = jnp.pad(x.reshape(len(x), *grid, -1), ((0, 0), *[(1, 1)] * rank, (0, 0)))
    starts = [at for at in product(range(3), repeat=rank) if at != (1,) * rank]
    at = lambda start: (slice(None), *(slice(s, s + n) for s, n in zip(start, grid, strict=True)))
    return jnp.stack([padded[at(start)].reshape(x.shape) for start in starts], 2)


# --- the report's networks --------------------------------------------------------------------------------------------


class Encoder(nnx.Module):
    """E, the network of patches (Alg. 4.1 and 4.2): each patch goes through layers with pooling and a dense layer.

    Raises InputError where a patch is too small for its poolings.
    """

    def __init__(
        self,
        patch: tuple[int, ...],
        channels: int,
        widths: tuple[int, ...],
        features: int,
        dtype: DTypeLike,
        *,
        rngs: nnx.Rngs,
    ):
        if any(p % 2 ** len(widths) for p in patch):
            raise InputError(
                f"model.patch {patch}: {len(widths)} poolings need multiples of {2 ** len(widths)}, or fewer widths"
            )
        pairs = zip((channels, *widths), widths, strict=False)
        self.layers = nnx.List([Layer(len(patch), a, b, 3, dtype, rngs=rngs) for a, b in pairs])
        cells = prod(p // 2 ** len(widths) for p in patch)
        self.out = linear(cells * widths[-1], features, jnp.float32, rngs)
        self.patch = patch

    def __call__(self, image: Float[Array, "b *size c"], *, train: bool) -> Float[Array, "b n d"]:
        x = patchify(image, self.patch)
        b, n, _ = x.shape
        x = x.reshape(b * n, *self.patch, image.shape[-1])
        for layer in self.layers:
            x = max_pool(layer(x, train=train))
        return self.out(x.reshape(b * n, -1)).reshape(b, n, -1)


class Attend(nnx.Module):
    """A post-norm transformer layer with ReLU: norm(x + attention(x, context)), then norm(x + mlp(x)).

    With keys both branches are under dropout.
    """

    def __init__(self, width: int, heads: int, hidden: int, rate: float, dtype: DTypeLike, *, rngs: nnx.Rngs):
        if width % heads:
            raise InputError(f"width {width} is not divisible by {heads} heads: choose heads that divide it")
        self.q, self.kv = linear(width, width, dtype, rngs), linear(width, 2 * width, dtype, rngs)
        self.out = linear(width, width, dtype, rngs)
        self.fc1, self.fc2 = linear(width, hidden, dtype, rngs), linear(hidden, width, dtype, rngs)
        self.norm1, self.norm2 = layer_norm(width, dtype, rngs), layer_norm(width, dtype, rngs)
        self.heads, self.rate = heads, rate

    def __call__(
        self, x: Float[Array, "g q d"], context: Float[Array, "g m d"], keys: Key[Array, "b 2"] | None
    ) -> Float[Array, "g q d"]:
        (g, n, d), m = x.shape, context.shape[1]

        def drop(x: Array, number: int) -> Array:
            if keys is None or not self.rate:
                return x
            return dropout(x.reshape(len(keys), -1), keys[:, number], self.rate).reshape(x.shape)

        x = x.reshape(g * n, d)
        q = self.q(x).reshape(g, n, self.heads, -1)
        k, v = jnp.moveaxis(self.kv(context.reshape(g * m, d)).reshape(g, m, 2, self.heads, -1), 2, 0)
        x = self.norm1(x + drop(self.out(attention(q, k, v).reshape(g * n, d)), 0))
        return self.norm2(x + drop(self.fc2(jax.nn.relu(self.fc1(x))), 1)).reshape(g, n, d)


class Inpainting(nnx.Module):
    """The inpainting transformer (Alg. 4.6 and 4.7), at all positions at once.

    The retrieved vectors are projected. The sequence of a position holds the vectors around it and, last, its centre
    token. The result is a dense layer of the centre token after the layers; the last layer is computed there alone.

    The centre token is the projection of what was retrieved (`centre="retrieved"`), the features of the patch ("raw",
    as in the printed listing, which can copy them), or a learned one ("mask").
    """

    def __init__(
        self,
        rank: int,
        inputs: int,
        features: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        rate: float,
        centre: str,
        dtype: DTypeLike,
        *,
        rngs: nnx.Rngs,
    ):
        if centre == "raw" and width != features:
            raise InputError(f"model.centre=raw needs model.width {width} equal to model.features {features}")
        normal = nnx.initializers.normal(0.02)
        self.project = linear(inputs, width, dtype, rngs)
        self.positions = nnx.Param(normal(rngs.params(), (3**rank, width)))
        self.layers = nnx.List([Attend(width, heads, hidden, rate, dtype, rngs=rngs) for _ in range(depth)])
        self.out = linear(width, features, jnp.float32, rngs)
        self.centre, self.width = centre, width
        if centre == "mask":
            self.token = nnx.Param(normal(rngs.params(), (width,)))

    def __call__(
        self,
        recalled: Float[Array, "b n e"],
        features: Float[Array, "b n d"],
        grid: tuple[int, ...],
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Inpainted features; with keys (b,) under dropout."""
        x = self.project(recalled)
        centre = {"retrieved": x, "raw": features}.get(self.centre)
        centre = jnp.broadcast_to(self.token[...], x.shape) if centre is None else centre
        tokens = jnp.concatenate([neighbours(x, grid), centre[:, :, None].astype(x.dtype)], 2)
        tokens = tokens + on_last_axes(self.positions[...].astype(x.dtype), tokens)
        tokens = tokens.reshape(-1, tokens.shape[2], self.width)  # one sequence for each position
        depth = len(self.layers)
        drop = None if keys is None else jax.vmap(lambda key: jax.random.split(key, (depth, 2)))(keys)
        for i, layer in enumerate(self.layers):
            query = tokens if i + 1 < depth else tokens[:, -1:]
            tokens = layer(query, tokens, None if drop is None else drop[:, i])
        return self.out(tokens[:, -1]).reshape(*x.shape[:2], -1)


class Generator(nnx.Module):
    """G of teacher and student (Alg. 4.8): one dense layer takes all patches' features to a coarse grid, and transposed
    convolutions double that to the image's size."""

    def __init__(
        self,
        size: tuple[int, ...],
        inputs: int,
        widths: tuple[int, ...],
        channels: int,
        sigmoid: bool,
        dtype: DTypeLike,
        *,
        rngs: nnx.Rngs,
    ):
        rank, self.sigmoid, self.width, self.dtype = len(size), sigmoid, widths[0], dtype
        self.start = grid_of(size, (2 ** len(widths),) * rank)
        pairs = pairwise(widths)
        self.dense = linear(inputs, widths[0] * prod(self.start), dtype, rngs)
        self.layers = nnx.List([Layer(rank, a, b, 4, dtype, form=doubled, rngs=rngs) for a, b in pairs])
        self.out = conv(rank, widths[-1], channels, 4, dtype, rngs, bias=True, form=doubled)

    def __call__(self, features: Float[Array, "b n d"], *, train: bool) -> list[Float[Array, "b *_ _"]]:
        """The results x0, x1, ... of the layers; the last is the image, in float32."""
        x = self.dense(features.reshape(len(features), -1).astype(self.dtype))
        xs = [x.reshape(len(x), *self.start, self.width)]
        for layer in self.layers:
            xs.append(layer(xs[-1], train=train))
        image = self.out(xs[-1]).astype(jnp.float32)
        return [*xs[1:], jax.nn.sigmoid(image) if self.sigmoid else image]


class Discriminator(nnx.Module):
    """D of both methods: convolutions of kernel 5 and stride 2 with batch norm from the second on, LeakyReLU, and a
    dense layer. It gives one logit for each image, high for real ones.

    It is SimSID's `SimpleDiscriminator`; the report has no architecture.
    """

    def __init__(
        self, size: tuple[int, ...], channels: int, widths: tuple[int, ...], dtype: DTypeLike, *, rngs: nnx.Rngs
    ):
        rank = len(size)
        for _ in widths:
            size = tuple(ceil(n / 2) for n in size)
        pairs = pairwise(widths)
        self.first = conv(rank, channels, widths[0], 5, dtype, rngs, bias=True, form=halved)
        layer = partial(Layer, rank, form=halved, activation=leaky_relu, rngs=rngs)
        self.layers = nnx.List([layer(a, b, 5, dtype) for a, b in pairs])
        self.out = linear(prod(size) * widths[-1], 1, jnp.float32, rngs)

    def __call__(self, image: Float[Array, "b *size c"], *, train: bool, alone: bool = False) -> Float[Array, " b"]:
        """Logits; `alone` takes the norms' moments of each image by itself."""
        x = leaky_relu(self.first(image))
        for layer in self.layers:
            x = layer(x, train=train, alone=alone)
        return self.out(x.reshape(len(x), -1).astype(jnp.float32))[:, 0]
