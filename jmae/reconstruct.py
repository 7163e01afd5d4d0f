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
from jmae.masking import fold_in, hidden, random_mask, take, visible_tokens
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


def _predicted(
    mae: MAE, tokens: Float[Array, "b n d"], keys: Key[Array, " b"], numbers: Int[Array, " m"], visible: int
) -> tuple[Float[Array, "b m n v"], Bool[Array, "b m n"]]:
    """(predictions of every sample under its masks `numbers`, True for hidden tokens).

    A mask depends on its sample's key and its number only. Samples come first, so that they stay on the devices over
    which they are split.
    """
    (b, n, _), m = tokens.shape, len(numbers)
    keys = jax.vmap(partial(fold_in, keys), out_axes=1)(numbers).reshape(-1)
    keep, restore = random_mask(keys, n, visible)
    prediction = mae.decode(mae.encode(take(jnp.repeat(tokens, m, axis=0), keep)), restore)
    return prediction.reshape(b, m, n, -1), hidden(restore, visible).reshape(b, m, n)


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
    prediction, is_hidden = _predicted(mae, mae.embed(patches), keys, jnp.arange(masks), visible)
    return jnp.mean(masked_mse(prediction, patches[:, None], is_hidden))


def reconstruct(
    mae: MAE,
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    *,
    patch: tuple[int, ...],
    ratio: float,
    masks: int,
    paste: bool = True,
    chunk: int | None = None,
    measure: Callable[[Array, Array, Array], PyTree] = lambda image, reconstruction, hidden: (),
) -> Reconstruction:
    """Reconstructs every image under `masks` random masks in one compiled pass.

    Patches are embedded once, and moments are accumulated on the device. Mask j of an image depends on the image's key
    and j alone.

    Args:
        ratio: share of the tokens that a mask hides.
        paste: whether visible patches are the input's; the decoder is not trained there.
        chunk: masks at a time, where memory is short; the same result up to rounding. None: all.
        measure: (image, reconstruction, hidden) -> arrays (b, ...), of which the mean over masks is taken. Image and
            reconstruction are (b, *size, c); `hidden` (b, *size) is True where the mask hides a voxel.
    """
    patches = patchify(image, patch)
    tokens = mae.embed(patches)
    visible = visible_tokens(patches.shape[1], ratio)
    chunk = min(chunk or masks, masks)

    whole = partial(unpatchify, size=image.shape[1:-1], patch=patch)

    def voxels(tokens: Bool[Array, "b n"]) -> Bool[Array, " b *size"]:
        ones = tokens[..., None].astype(jnp.float32)
        return whole(jnp.broadcast_to(ones, (*tokens.shape, prod(patch))))[..., 0] > 0.5

    def moments(numbers: Array) -> PyTree:
        prediction, is_hidden = _predicted(mae, tokens, keys, numbers, visible)
        difference = prediction - patches[:, None]
        if paste:
            difference = difference * is_hidden[..., None]
        one = lambda d, is_hidden: measure(image, image + whole(d), voxels(is_hidden))
        measured = jax.vmap(one, 1, 1)(difference, is_hidden)
        used = (numbers < masks).astype(jnp.float32)  # the last chunk may be padded
        mean = lambda values: jnp.tensordot(values, used, (1, 0)) / masks
        of_first = lambda values: jnp.tensordot(values, (numbers == 0).astype(jnp.float32), (1, 0))
        firsts = of_first(difference), of_first(is_hidden.astype(jnp.float32))
        return jax.tree.map(mean, (difference, difference**2, measured)), firsts

    numbers = jnp.arange(-(-masks // chunk) * chunk).reshape(-1, chunk)
    if len(numbers) == 1:
        found = moments(numbers[0])
    else:
        add = lambda total, j: (jax.tree.map(jnp.add, total, moments(j)), None)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(moments, numbers[0]))
        found, _ = jax.lax.scan(add, zeros, numbers)
    # Moments of the difference to the input, not of the pixels: no cancellation where the variance is small.
    (mean, squares, measured), (of_first, hidden_first) = found
    return Reconstruction(
        mean=whole(patches + mean),
        variance=whole(jnp.maximum(squares - mean**2, 0)),
        error=whole(squares),
        measured=measured,
        first=whole(patches + of_first),
        first_hidden=voxels(hidden_first > 0.5),
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
