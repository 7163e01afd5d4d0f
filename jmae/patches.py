"""Images as sequences of patches, for any number of spatial axes.

Arrays are (batch, *size, channels). Tokens are in C order of the grid, the values of a token in C order of (*patch,
channels), as in the official MAE code.
"""

from functools import lru_cache
from math import prod

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jmae.errors import InputError

AXES = "ijk"


def grid_of(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens per axis of an image of `size` voxels. Raises InputError where the patch does not divide it."""
    if len(size) != len(patch):
        raise InputError(f"size {size} has {len(size)} axes, patch {patch} has {len(patch)}: give one value an axis")
    if any(s % p or s < p for s, p in zip(size, patch, strict=True)):
        padded = tuple(-(-s // p) * p for s, p in zip(size, patch, strict=True))
        raise InputError(f"size {size} is not divisible by patch {patch}: set data.size to {padded}")
    return tuple(s // p for s, p in zip(size, patch, strict=True))


def _pattern(rank: int) -> tuple[str, str]:
    image = " ".join(f"(g{a} p{a})" for a in AXES[:rank])
    tokens = " ".join(f"g{a}" for a in AXES[:rank]), " ".join(f"p{a}" for a in AXES[:rank])
    return f"b {image} c", f"b ({tokens[0]}) ({tokens[1]} c)"


def patchify(image: Float[Array, "b *size c"], patch: tuple[int, ...]) -> Float[Array, "b n v"]:
    """Cuts images into tokens of v = prod(patch) * c values, in C order; the inverse of `unpatchify`."""
    grid_of(image.shape[1:-1], patch)
    whole, tokens = _pattern(len(patch))
    return rearrange(image, f"{whole} -> {tokens}", **{f"p{a}": p for a, p in zip(AXES, patch, strict=False)})


def unpatchify(
    tokens: Float[Array, "b n v"], size: tuple[int, ...], patch: tuple[int, ...]
) -> Float[Array, "b *size c"]:
    """Images of v / prod(patch) channels from their tokens; the inverse of `patchify`."""
    whole, flat = _pattern(len(patch))
    sizes = {f"p{a}": p for a, p in zip(AXES, patch, strict=False)}
    sizes |= {f"g{a}": g for a, g in zip(AXES, grid_of(size, patch), strict=False)}
    return rearrange(tokens, f"{flat} -> {whole}", **sizes, c=tokens.shape[-1] // prod(patch))


@lru_cache
def sincos_positions(grid: tuple[int, ...], width: int) -> np.ndarray:
    """Fixed sine-cosine position codes (n, width), n in C order of the grid.

    Every axis gets width / rank channels, half of them sines, half cosines, with frequencies 10000^(-k/K). The last
    axis stands first, as in the official 2D code ("w goes first"). Channels that the axes cannot share evenly are zero.

    Raises InputError where the width has no two channels for each axis.
    """
    k = width // (2 * len(grid))
    if not k:
        raise InputError(f"width {width} is too small for position codes of {len(grid)} axes: at least {2 * len(grid)}")
    frequency = 10000.0 ** -(np.arange(k) / k)
    codes = []
    for coordinate in reversed(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij")):
        angle = coordinate.reshape(-1, 1) * frequency
        codes += [np.sin(angle), np.cos(angle)]
    code = np.concatenate(codes, axis=1)
    return np.pad(code, ((0, 0), (0, width - code.shape[1]))).astype(np.float32)
