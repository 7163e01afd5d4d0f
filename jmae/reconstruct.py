"""Reconstructions of images under random masks: the training loss, and one pass for many masks."""

import os
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jmae.errors import InputError
from jmae.losses import masked_mse
from jmae.masking import fold_in, group_mask, groups_of, hidden, random_mask, run_masks, visible_tokens
from jmae.nn.mae import MAE
from jmae.patches import patchify, unpatchify


class Reconstruction(NamedTuple):
    """Moments over the masks of one pass, each (b, *size, c), and what the first mask shows."""

    mean: Float[Array, "b *size c"]
    variance: Float[Array, "b *size c"]
    error: Float[Array, "b *size c"]  # mean squared difference to the input; pasted patches count as 0
    measured: PyTree  # mean over the masks of the results of `measure`
    first: Float[Array, "b *size c"]  # reconstruction under the first mask
    first_hidden: Bool[Array, " b *size"]  # what the first mask hides
    # Means over voxels of `error` and of `measured`, one of each whole round of masks, or of each mask where images
    # have masks of their own. They are independent, so that their spread tells the Monte-Carlo error of the mean. The
    # masks of one round are not: a round hides every token equally often. (b, 0) with less than a round.
    errors: Float[Array, "b r"]
    measures: PyTree


Predictor = Callable[[Array, Array, Array], Array]
"""(patches (b, n, v), keep, restore) -> predictions (b, m, n, v) of all patches: `MAE.predictions`, or a stand-in."""


def _masks(
    keys: Key[Array, ""] | Key[Array, " b"],
    numbers: Int[Array, " m"],
    tokens: int,
    visible: int,
    groups: Int[Array, " b"] | None = None,
) -> tuple[Int[Array, "*b m k"], Int[Array, "*b m n"]]:
    """(keep, restore) of the masks `numbers`, which all samples share or each has of its own. Keys and groups are those
    of `reconstruct`."""
    if keys.ndim == 0:
        return run_masks(keys, numbers, tokens, visible)
    own = jax.vmap(partial(fold_in, keys), out_axes=1)(numbers).reshape(-1)
    found = random_mask(own, tokens, visible) if groups is None else group_mask(own, groups, tokens, visible)
    keep, restore = (x.reshape(len(keys), len(numbers), -1) for x in found)
    return keep, restore


def _hidden(restore: Int[Array, "*b m n"], visible: int, samples: int) -> Bool[Array, "b m n"]:
    """True for hidden tokens of every sample under its masks."""
    absent = hidden(restore, visible)
    return jnp.broadcast_to(absent[None], (samples, *absent.shape)) if absent.ndim == 2 else absent


def masked_loss(
    mae: MAE,
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    *,
    patch: tuple[int, ...],
    ratio: float,
    masks: int,
) -> Float[Array, ""]:
    """Mean over `masks` masks of the masked-patch error (AMAE Eq. 3; with one mask He et al. 2022)."""
    patches = patchify(image, patch)
    visible = visible_tokens(patches.shape[1], ratio)
    keep, restore = _masks(keys, jnp.arange(masks), patches.shape[1], visible)
    prediction = mae.predictions(patches, keep, restore)
    return jnp.mean(masked_mse(prediction, patches[:, None], hidden(restore, visible)))


def reconstruct(
    predict: Predictor,
    image: Float[Array, "b *size c"],
    keys: Key[Array, ""] | Key[Array, " b"],
    *,
    patch: tuple[int, ...],
    ratio: float,
    masks: int,
    groups: Int[Array, " b"] | None = None,
    paste: bool = True,
    chunk: int | None = None,
    measure: Callable[[Array, Array, Array], PyTree] = lambda image, reconstruction, hidden: (),
) -> Reconstruction:
    """Reconstructs every image under `masks` random masks in one compiled pass.

    Moments are accumulated on the device.

    Args:
        predict: predicts hidden patches from visible ones, such as `MAE.predictions`.
        keys: one key for all images, which then share the masks `masking.run_masks`; or a key for each image, and its
            mask j depends on that key and j alone.
        ratio: share of the tokens that a mask hides.
        groups: with one mask and a key for each image: the group of the partition that the mask shows
            (`masking.group_mask`). None: the first.
        paste: whether visible patches are the input's; the decoder is not trained there.
        chunk: masks at a time, where memory is short; the same result up to rounding. None: all.
        measure: (image, reconstruction, hidden) -> arrays (b, ...), of which the mean over masks is taken. Image and
            reconstruction are (b, *size, c); `hidden` (b, *size) is True where the mask hides a voxel.
    """
    patches = patchify(image, patch)
    visible = visible_tokens(patches.shape[1], ratio)
    chunk = min(chunk or masks, masks)
    assert groups is None or masks == 1

    whole = partial(unpatchify, size=image.shape[1:-1], patch=patch)

    def voxels(tokens: Bool[Array, "b n"]) -> Bool[Array, " b *size"]:
        ones = tokens[..., None].astype(jnp.float32)
        return whole(jnp.broadcast_to(ones, (*tokens.shape, prod(patch))))[..., 0] > 0.5

    def moments(numbers: Array) -> PyTree:
        keep, restore = _masks(keys, numbers, patches.shape[1], visible, groups)
        is_hidden = _hidden(restore, visible, len(image))
        difference = predict(patches, keep, restore) - patches[:, None]
        if paste:
            difference = difference * is_hidden[..., None]
        one = lambda d, is_hidden: measure(image, image + whole(d), voxels(is_hidden))
        measured = jax.vmap(one, 1, 1)(difference, is_hidden)
        used = (numbers < masks).astype(jnp.float32)  # the last chunk may be padded
        mean = lambda values: jnp.tensordot(values, used, (1, 0)) / masks
        of_first = lambda values: jnp.tensordot(values, (numbers == 0).astype(jnp.float32), (1, 0))
        firsts = of_first(difference), of_first(is_hidden.astype(jnp.float32))
        over_voxels = lambda values: jnp.mean(values, tuple(range(2, values.ndim)))
        each = jax.tree.map(over_voxels, (difference**2, measured))
        return (jax.tree.map(mean, (difference, difference**2, measured)), firsts), each

    numbers = jnp.arange(-(-masks // chunk) * chunk).reshape(-1, chunk)
    if len(numbers) == 1:
        found, each = moments(numbers[0])
    else:

        def add(total: PyTree, numbers: Array) -> tuple[PyTree, PyTree]:
            found, each = moments(numbers)
            return jax.tree.map(jnp.add, total, found), each

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(moments, numbers[0])[0])
        found, each = jax.lax.scan(add, zeros, numbers)
        each = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(len(image), -1)[:, :masks], each)
    in_round = groups_of(patches.shape[1], visible) if keys.ndim == 0 else 1
    rounds = masks // in_round
    each = jax.tree.map(lambda x: jnp.mean(x[:, : rounds * in_round].reshape(len(image), rounds, in_round), 2), each)
    # Moments of the difference to the input, not of the pixels: no cancellation where the variance is small.
    (mean, squares, measured), (of_first, hidden_first) = found
    return Reconstruction(
        mean=whole(patches + mean),
        variance=whole(jnp.maximum(squares - mean**2, 0)),
        error=whole(squares),
        measured=measured,
        first=whole(patches + of_first),
        first_hidden=voxels(hidden_first > 0.5),
        errors=each[0],
        measures=each[1],
    )


def device_bytes() -> int:
    """Memory that one pass may use: 80 % of an accelerator's limit, half of the host's memory on the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def fitting(lower: Callable[[int], Any], most: int, limit: int | None = None, what: str = "a pass") -> tuple[Any, int]:
    """(compiled pass, its chunk) for the largest chunk of masks or windows whose temporary memory fits.

    Args:
        lower: (chunk) -> lowered program.
        most: first chunk to try; each further one is half of it.
        limit: bytes of memory; None: the device's.
        what: name of the pass in the message.

    Raises InputError where a chunk of 1 needs more memory than there is.
    """
    least, chunk = limit or device_bytes(), most
    while True:
        try:
            compiled = lower(chunk).compile()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            if chunk == 1:
                raise too_large(what, None) from error
        else:
            memory = compiled.memory_analysis()
            if memory is None or memory.temp_size_in_bytes <= least:
                return compiled, chunk
            if chunk == 1:
                if limit is None and memory.temp_size_in_bytes > 2 * least:  # the host would kill the process
                    raise too_large(what, compiled)
                return compiled, chunk
        chunk = -(-chunk // 2)


def out_of_memory(error: Exception) -> bool:
    """Whether an error is a device's lack of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def too_large(what: str, compiled: Any) -> InputError:
    """The error of a pass that does not fit in the device's memory, one chunk at a time."""
    memory, device = compiled and compiled.memory_analysis(), jax.local_devices()[0]
    parts = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
    need = f"needs {sum(getattr(memory, part) for part in parts) / 1e9:.3g} GB" if memory else "does not fit"
    total = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    larger = "a machine with more memory" if device.platform == "cpu" else "the host (JAX_PLATFORMS=cpu)"
    return InputError(f"{what} {need} of the {total / 1e9:.3g} GB of {device}: crop or resample it, or take {larger}")
