"""Published weights of masked autoencoders as this library's parameters.

    python -m jmae.weights SOURCE --out FILE.safetensors [--part mae|encoder|blocks]
                           [--heads H --decoder-heads D] [--size 224,224]

SOURCE: an MAE checkpoint with the names of facebookresearch/mae (so have medical_mae, MAEMI and timm) or of
`transformers` (ViTMAE, old and new), as .pth, .safetensors or .npz, told by content; or a file of this command.
Written are the whole network, its encoder, or the encoder's blocks alone (what MAEMI starts from); the report has a
line for every tensor. Head counts are in no state dict: they are the file's own arguments' where it has some, else
--heads and --decoder-heads. --size is the images', where the number of tokens does not tell it.

Differences from PyTorch's layout: dense kernels are transposed, equal blocks stacked, the convolution over patches is
a dense layer over flattened ones, and fixed position codes are computed, not stored.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jmae.errors import InputError, exit_code
from jmae.nn.mae import MAE
from jmae.patches import grid_of, sincos_positions
from jmae.recipe import arguments, typed
from jmae.run_folder import log
from jmae.tensors import Contents, Refused, line, naming, read_tensors

FORMAT = 1  # of a converted file; another number is refused
MAX_TOKENS = 2**20  # beyond any attention
PARTS = {  # by the start of the parameters' names
    "mae": ("",),
    "encoder": ("class_token", "patch_embed/", "encoder/", "encoder_norm/"),
    "blocks": ("encoder/stack/",),
}

Positions = Callable[[tuple[int, ...], int], np.ndarray]


class Entry(NamedTuple):
    """What became of one tensor: `loaded`, `resized`, `skipped` (it stays in the file), `kept` (the network's own)."""

    status: str
    name: str
    source: tuple[int, ...] | None = None  # shape in the file
    target: tuple[int, ...] | None = None  # shape here
    note: str = ""


# --- names and layout -------------------------------------------------------------------------------------------------

_OFFICIAL = [  # prefixes, then the names of transformers' ViTMAE as facebookresearch/mae has them
    (r"^(module\.|model\.|state/)+", ""),
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(?=\d)", "blocks."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.(?=\d)", "decoder_blocks."),  # the latter: saved by 5.x
    (r"^decoder\.(?=decoder_|mask_token$)", ""),
    (r"^layernorm\.", "norm."),
    (r"(?<=\d)\.layernorm_before\.", ".norm1."),
    (r"(?<=\d)\.layernorm_after\.", ".norm2."),
    (r"(?<=\d)\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"(?<=\d)\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"(?<=\d)\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(?<=\d)\.output\.dense\.", ".mlp.fc2."),
]
_PLACES = {
    "cls_token": "class_token",
    "patch_embed.proj": "patch_embed",
    "norm": "encoder_norm",
    "decoder_embed": "decoder_embed",
    "mask_token": "mask_token",
    "decoder_norm": "decoder_norm",
    "decoder_pred": "predict",
}
_IN_BLOCK = {
    "norm1": ("norm1", 0),
    "attn.qkv": ("qkv", 0),
    "attn.q": ("qkv", 0),
    "attn.k": ("qkv", 1),
    "attn.v": ("qkv", 2),
    "attn.proj": ("out", 0),
    "norm2": ("norm2", 0),
    "mlp.fc1": ("fc1", 0),
    "mlp.fc2": ("fc2", 0),
}
_STACKS = {"blocks": "encoder/stack", "decoder_blocks": "decoder/stack"}
_CODES = {"mae": ("pos_embed", "decoder_pos_embed"), "encoder": ("pos_embed",), "blocks": ()}  # by part
# Unknown tensors of these make the network another one; of others, such as classifiers, they are left out.
_ESSENTIAL = ("blocks.", "decoder_blocks.", "patch_embed.", "norm_pre.", "reg_token", "dist_token")
_PUBLISHED = {"small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}  # width, heads
_MODEL = r"mae_vit_(small|base|large|huge)_patch\d+(_dec(512d[28]|128d2)b?)?(_448)?"  # their decoders have 16 heads


class Weights(NamedTuple):
    """A checkpoint in this library's layout. What the file does not tell is None."""

    path: str
    sha256: str
    leaves: dict[str, np.ndarray]  # float32, by the "/"-joined names of `MAE`'s parameters
    origins: dict[str, list[Entry]]  # of each leaf and code, the tensors that it is made of
    skipped: list[Entry]
    codes: dict[str, np.ndarray]  # pos_embed, decoder_pos_embed: (1 + n, width), the class token's first
    size: tuple[int, ...] | None
    patch: tuple[int, ...] | None
    channels: int | None
    heads: int | None
    decoder_heads: int | None
    norm_pix_loss: bool | None

    def known(self) -> dict[str, Any]:
        """The keyword arguments of `MAE` that the file tells."""
        depth, width, hidden = self.leaves["encoder/stack/fc1/kernel"].shape
        ratio = hidden / width
        found = {name: getattr(self, name) for name in ("size", "patch", "channels", "heads")}
        found |= {"width": width, "depth": depth}
        found |= {"mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)}
        if "decoder/stack/fc1/kernel" in self.leaves:
            found["decoder_depth"], found["decoder_width"], _ = self.leaves["decoder/stack/fc1/kernel"].shape
            found["decoder_heads"] = self.decoder_heads
        return {name: value for name, value in found.items() if value is not None}

    def config(self) -> dict[str, Any]:
        """The keyword arguments of `MAE` for the network in the file; raises InputError for what it does not tell."""
        known = self.known()
        names = "size patch channels heads decoder_width decoder_depth decoder_heads".split()
        if missing := ", ".join(name for name in names if name not in known):
            raise InputError(line(self.path, f"does not tell {missing}: give it, or take a file with a whole MAE"))
        return known | {"positions": self.positions()}

    def positions(self, part: str = "mae") -> Positions:
        """`positions` of `MAE`: the computed codes where the file has these, else the file's own for its own grid."""
        if self.patch is None:
            raise InputError(line(self.path, "has no patch embedding: load the part blocks"))
        if self.size is None:
            raise InputError(line(self.path, "does not tell the grid of its tokens: write --size"))
        grid, path = grid_of(self.size, self.patch), self.path
        codes = [self.codes[name] for name in _CODES[part] if name in self.codes]
        if all(_is_code(code, sincos_positions, grid) for code in codes):
            return sincos_positions
        own: dict[int, np.ndarray] = {}
        for code in codes:
            rows = code[1:].astype(np.float32)
            if code[0].any() or not np.array_equal(own.setdefault(rows.shape[1], rows), rows):
                raise InputError(line(path, "its decoder's position codes have no place here: load the encoder"))

        def positions(asked: tuple[int, ...], width: int) -> np.ndarray:
            if asked != grid or width not in own:
                there = f"{grid}, widths {', '.join(map(str, own))}"
                raise InputError(line(path, f"its position codes are for {there}, not {asked}, {width}: adapt them"))
            return own[width]

        return positions


def read_weights(
    path: str | os.PathLike,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    size: tuple[int, ...] | None = None,
) -> Weights:
    """A checkpoint in this library's layout; what is given, of the network in the file, is what it does not tell.

    Raises:
        InputError: the file cannot be read, holds no vision transformer or values that are not finite, or tells
            otherwise than what is given.
    """
    contents = read_tensors(path)
    with naming(path):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        weights = _converted(contents) if "jmae" in contents.arguments else _official(contents, size)
        weights = weights._replace(path=os.fspath(path), sha256=sha256)
        if size and weights.size and size != weights.size:
            raise Refused(f"is for images of size {weights.size}, not {size}: leave the size out")
        if "encoder/stack/fc1/kernel" not in weights.leaves:
            names = ", ".join(sorted(contents.tensors)[:3])
            raise Refused(f"has no blocks of a vision transformer, its names are {names}, ...: rename its tensors")
        for name, array in (weights.leaves | weights.codes).items():
            tokens, codes = name.endswith("token"), name in weights.codes
            axes = 3 if tokens else 2 if codes else 1 + name.endswith("kernel") + ("/stack/" in name)
            if array.ndim != axes or 0 in array.shape:
                raise Refused(f"{name} has the shape {array.shape}: download or save it again")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise Refused(f"{name} is {array.dtype}, no real numbers: take weights that are not quantised")
            if not np.isfinite(array).all():
                raise Refused(f"{name} has values that are not finite: take an earlier checkpoint")
        values = math.prod(weights.patch) * weights.channels if weights.patch and weights.channels else None
        for name, axis in (("patch_embed/kernel", 0), ("predict/kernel", 1), ("predict/bias", 0)):
            found = weights.leaves[name].shape[axis] if name in weights.leaves else values
            if found != values:
                raise Refused(f"{name} is for {found} values a patch, its patches have {values}: download it again")
    return _with_heads(weights, heads, decoder_heads)


def _official(contents: Contents, size: tuple[int, ...] | None) -> Weights:
    """From PyTorch's names and layout."""
    pieces: dict[str, dict[tuple[int, int], tuple[str, np.ndarray]]] = {}
    codes: dict[str, np.ndarray] = {}
    origins: dict[str, list[Entry]] = {}
    skipped = [Entry("skipped", name, note="no part of the network") for name in contents.ignored]
    patch = channels = None
    for name, array in contents.tensors.items():
        official = name
        for pattern, plain in _OFFICIAL:
            official = re.sub(pattern, plain, official)
        place = _place(official)
        if official in _CODES["mae"]:
            codes[official] = array.reshape(array.shape[-2:])
            origins[official] = [Entry("loaded", name, array.shape)]
        elif place:
            leaf, *at = place
            if tuple(at) in pieces.setdefault(leaf, {}):
                raise Refused(f"has {name} and {pieces[leaf][at[0], at[1]][0]}, which mean the same: leave one")
            pieces[leaf][at[0], at[1]] = name, array
            if official == "patch_embed.proj.weight":
                if array.ndim < 3:
                    raise Refused(f"{name} has the shape {array.shape}: only convolutions tell the patch")
                patch, channels = array.shape[2:], array.shape[1]
        elif official.startswith(_ESSENTIAL):
            raise Refused(f"{name} has no place in a masked autoencoder: load a network without it")
        else:
            skipped.append(Entry("skipped", name, array.shape, note="no part of the network"))

    leaves = {}
    for leaf, parts in pieces.items():
        depth = 1 + max(i for i, _ in parts)
        if missing := set(range(depth)) - {i for i, _ in parts}:
            raise Refused(f"lacks block {min(missing)} of {leaf}: download or save it again")
        turned = {at: _turned(*part) for at, part in parts.items()}
        layers = [np.concatenate([turned[at] for at in sorted(turned) if at[0] == i], -1) for i in range(depth)]
        if len({layer.shape for layer in layers}) > 1:
            raise Refused(f"has blocks of several widths in {leaf}: only equal blocks are read")
        stacked = "/stack/" in leaf
        leaves[leaf] = np.stack(layers) if stacked else layers[0]
        origins[leaf] = [
            Entry("loaded", name, array.shape, turned[at].shape, f"{leaf}[{at[0]}]" if stacked else leaf)
            for at, (name, array) in sorted(parts.items())
        ]
    if "pos_embed" in codes and "class_token" in leaves:  # a learned code's first row is added to the class token
        leaves["class_token"] = leaves["class_token"] + codes["pos_embed"][0].astype(np.float32)
        codes["pos_embed"] = np.concatenate([0 * codes["pos_embed"][:1], codes["pos_embed"][1:]])

    own, width = contents.arguments, leaves.get("class_token", np.empty(0)).shape[-1]
    heads, decoder_heads = own.get("num_heads"), own.get("decoder_num_heads")
    published = re.fullmatch(_MODEL, str(own.get("model")))
    if published and _PUBLISHED[published[1]][0] == width:
        heads, decoder_heads = _PUBLISHED[published[1]][1], 16
    norm = own.get("norm_pix_loss")
    return Weights(
        path="",
        sha256="",
        leaves=leaves,
        origins=origins,
        skipped=skipped,
        codes=codes,
        size=None if patch is None else _size(codes, patch, size, own.get("img_size")),
        patch=patch,
        channels=channels,
        heads=heads if type(heads) is int else None,
        decoder_heads=decoder_heads if type(decoder_heads) is int else None,
        norm_pix_loss=norm if type(norm) is bool else None,
    )


def _converted(contents: Contents) -> Weights:
    """From a file of `save_weights`."""
    about = json.loads(contents.arguments["jmae"])
    if about["format"] != FORMAT:
        raise Refused(f"is of format {about['format']}, read is {FORMAT}: convert the original again")
    own, patch = (about[name] and tuple(about[name]) for name in ("size", "patch"))
    counts = {name: about[name] for name in ("channels", "heads", "decoder_heads")}
    for n in (*(own or ()), *(patch or ()), *counts.values()):
        if n is not None and (type(n) is not int or n < 1):
            raise Refused(f"its metadata have {ascii(n)[:20]} for a count: convert the original again")
    leaves = {name: array for name, array in contents.tensors.items() if name not in _CODES["mae"]}
    codes = {name: array for name, array in contents.tensors.items() if name not in leaves}
    origins = {name: [Entry("loaded", name, array.shape, array.shape)] for name, array in contents.tensors.items()}
    if about["positions"] == "computed":
        grid, tokens = grid_of(own, patch), zip(_CODES["mae"], ("class_token", "mask_token"), strict=True)
        widths = {name: leaves[token].shape[-1] for name, token in tokens if token in leaves}
        if math.prod(grid) > MAX_TOKENS:
            raise Refused(f"its metadata have the size {own} in patches of {patch}: convert the original again")
        codes = {name: np.pad(sincos_positions(grid, width), ((1, 0), (0, 0))) for name, width in widths.items()}
    norm = about["norm_pix_loss"]
    return Weights("", "", leaves, origins, [], codes, own, patch, **counts, norm_pix_loss=norm)


def _place(official: str) -> tuple[str, int, int] | None:
    """(parameter's name, number of the block, order among the tensors that are one parameter here)."""
    module, _, kind = official.rpartition(".")
    if official in ("cls_token", "mask_token"):
        return _PLACES[official], 0, 0
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d{1,4})\.(.+)", module)
    if block and block[3] in _IN_BLOCK:
        part, order = _IN_BLOCK[block[3]]
        leaf, number = f"{_STACKS[block[1]]}/{part}", int(block[2])
    elif module in _PLACES:
        leaf, number, order = _PLACES[module], 0, 0
    else:
        return None
    kinds = {"weight": "scale" if "norm" in module.rpartition(".")[2] else "kernel", "bias": "bias"}
    return (f"{leaf}/{kinds[kind]}", number, order) if kind in kinds else None


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """(out, in, *patch) as (*patch * in, out), in float32; tokens, biases and scales as they are."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise Refused(f"{name} is {array.dtype}, no real numbers: take weights that are not quantised")
    if name.endswith("weight") and array.ndim > 1:
        array = np.moveaxis(array, (0, 1), (-1, -2)).reshape(-1, len(array))
    with np.errstate(over="ignore"):  # found as not finite
        return array.astype(np.float32)


def _size(
    codes: Mapping[str, np.ndarray], patch: tuple[int, ...], given: tuple[int, ...] | None, own: Any
) -> tuple[int, ...] | None:
    """The images' size: the file's own, else as given, else from the number of tokens: square, as all 2D ones are, or
    cubic where the codes agree."""
    own = tuple(own) if type(own) in (list, tuple) else (own,) * len(patch)
    size = own if all(type(n) is int for n in own) else given
    for code in codes.values():
        n = len(code) - 1
        side = round(n ** (1 / len(patch)))
        cube = (side,) * len(patch)
        if size is not None and math.prod(grid_of(size, patch)) != n:
            raise Refused(f"has {n} tokens, size {size} in patches of {patch} has others: give the size of its images")
        if size is None and math.prod(cube) == n and (len(patch) == 2 or _is_code(code, sincos_positions, cube)):
            size = tuple(side * p for p in patch)
    return size


def _is_code(code: np.ndarray, positions: Positions, grid: tuple[int, ...]) -> bool:
    """Whether a file's code (1 + n, width) is that of `positions`, the class token's zero, up to its own precision."""
    if len(code) != math.prod(grid) + 1:
        return False
    expected = np.pad(positions(grid, code.shape[1]), ((1, 0), (0, 0)))
    return np.allclose(code.astype(np.float32), expected, rtol=0, atol=max(1e-4, float(jnp.finfo(code.dtype).eps)))


def _with_heads(weights: Weights, heads: int | None, decoder_heads: int | None) -> Weights:
    """The weights with the given head counts; raises InputError where the file tells others or the width forbids."""
    known = weights.known()
    for name, given, width in (("heads", heads, "width"), ("decoder_heads", decoder_heads, "decoder_width")):
        if given is not None and known.get(name, given) != given:
            raise InputError(line(weights.path, f"was trained with {known[name]} {name}, not {given}: set that"))
        count = known.get(name) if given is None else given
        if count is not None and width in known and (count < 1 or known[width] % count):
            raise InputError(line(weights.path, f"{count} {name} do not divide its {width} {known[width]}: set others"))
    return weights._replace(heads=heads or weights.heads, decoder_heads=decoder_heads or weights.decoder_heads)


# --- into a network ---------------------------------------------------------------------------------------------------


def resized(
    values: np.ndarray,
    patch: tuple[int, ...],
    channels: int,
    to_patch: tuple[int, ...],
    to_channels: int,
    *,
    embedding: bool,
) -> np.ndarray:
    """Weights (prod(patch) * channels, ...) of a patch's voxels for patches of another size, channel count or rank.

    Of an embedding, so that the old layer's response stays: to equal channels (their mean, c / c' of it to each), along
    new last axes to images that are constant there (repeated and divided by the length: Carreira & Zisserman, "Quo
    Vadis", CVPR 2017, arXiv 1705.07750; axes that go are summed), and to a new patch as the old patch that linear
    resizing makes of it. Else, of a prediction: the channels' mean, equal along new axes (mean over those that go), and
    the old patch resized linearly.
    """
    x = values.reshape(*patch, channels, -1)
    rank, to_rank = len(patch), len(to_patch)
    if channels != to_channels:
        mean = x.mean(axis=rank, keepdims=True) * (channels / to_channels if embedding else 1)
        x = np.repeat(mean, to_channels, axis=rank)
    for axis in range(rank - 1, to_rank - 1, -1):
        x = x.sum(axis) if embedding else x.mean(axis)
    for axis in range(rank, to_rank):
        x = np.repeat(np.expand_dims(x, axis), to_patch[axis], axis=axis) / (to_patch[axis] if embedding else 1)
    for axis, (old, new) in enumerate(zip(patch, to_patch, strict=False)):
        if old != new:
            matrix = _linear(new, old).T if embedding else _linear(old, new)
            x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return np.ascontiguousarray(x.reshape(-1, *values.shape[1:]), np.float32)


def _linear(n: int, to: int) -> np.ndarray:
    """(to, n): linear resizing of n samples, cell centres aligned, with a wider triangle where they become fewer."""
    centres = (np.arange(to) + 0.5) * n / to - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(n) - centres[:, None]) / max(n / to, 1))
    return weights / weights.sum(1, keepdims=True)


def _starts(part: str) -> tuple[str, ...]:
    if part not in PARTS:
        raise InputError(f"part {part!r} is unknown: one of {', '.join(PARTS)}")
    return PARTS[part]


def _fitted(
    weights: Weights,
    part: str,
    size: tuple[int, ...] | None,
    patch: tuple[int, ...] | None,
    channels: int | None,
    positions: Positions,
    adapt: bool,
) -> tuple[dict[str, np.ndarray], list[Entry], list[str]]:
    """(leaves at the network's patch and channels, what became of the position codes, what does not fit)."""
    leaves, report, problems = dict(weights.leaves), list[Entry](), list[str]()
    if patch is None or channels is None or weights.patch is None or weights.channels is None:
        raise InputError(line(weights.path, "has no patch embedding: load the part blocks"))
    if size is None:
        raise InputError(line(weights.path, "does not tell the grid of its tokens: write --size, or give size"))
    if (patch, channels) != (weights.patch, weights.channels):
        if not adapt:
            theirs, ours = f"{weights.patch} with {weights.channels} channels", f"{patch} with {channels}"
            problems.append(f"its patches are {theirs}, the network's {ours} (adapt resizes them)")
        else:
            sizes = weights.patch, weights.channels, patch, channels
            leaves["patch_embed/kernel"] = resized(leaves["patch_embed/kernel"], *sizes, embedding=True)
            for name in leaves.keys() & {"predict/kernel", "predict/bias"} if part == "mae" else ():
                leaves[name] = resized(leaves[name].T, *sizes, embedding=False).T
    grid = grid_of(size, patch)
    for name in _CODES[part]:
        code = weights.codes.get(name)
        entries = weights.origins.get(name, [])
        if code is None:
            if not adapt:
                problems.append(f"it has no position code {name} (adapt keeps the network's)")
        elif _is_code(code, positions, grid):
            report += [entry._replace(target=code.shape, note="equals the network's code") for entry in entries]
        elif not adapt:
            problems.append(f"{name} {code.shape} is not the network's code of {grid} (adapt keeps the network's)")
        elif weights.size and _is_code(code, sincos_positions, grid_of(weights.size, weights.patch)):
            there, note = (math.prod(grid) + 1, code.shape[1]), f"computed for {grid}"
            report += [entry._replace(status="resized", target=there, note=note) for entry in entries]
        else:
            note = "another code than the network's, which stays"
            report += [entry._replace(status="skipped", note=note) for entry in entries]
    return leaves, report, problems


def load_weights(
    source: str | os.PathLike | Weights,
    target: PyTree,
    *,
    part: str = "mae",
    heads: int | None = None,
    decoder_heads: int | None = None,
    size: tuple[int, ...] | None = None,
    patch: tuple[int, ...] | None = None,
    channels: int | None = None,
    positions: Positions = sincos_positions,
    adapt: bool = False,
) -> tuple[PyTree, list[Entry]]:
    """A network's parameters with those of a file in their places, and what became of every tensor.

    `encoder` is class token, patch embedding, blocks and last norm; `blocks` the encoder's blocks and nothing else.
    The file's position codes must be those of the network. With `adapt` they need not, and the network keeps its own;
    and patch embedding and prediction are `resized` to another patch, channel count or rank. A decoder that was
    trained on normalised patches is warned of.

    Args:
        source: a file, or what `read_weights` made of one.
        target: nested dict of the network's parameters, arrays or ShapeDtypeStructs. What is not loaded stays as it
            is; what is loaded are NumPy arrays.
        heads, decoder_heads: the network's; None: the file's.
        size, patch, channels: the network's; None: the file's.
        positions: the network's.

    Raises:
        InputError: a tensor of the part is missing or of another shape, codes or head counts differ, or neither side
            tells the head counts.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    weights, starts = _with_heads(weights, heads, decoder_heads if part == "mae" else None), _starts(part)
    within = lambda name: name.startswith(starts)
    if part == "mae" and not any(name.startswith("decoder/") for name in weights.leaves):
        raise InputError(line(weights.path, "has no decoder: load the part encoder or blocks"))
    if weights.heads is None or (part == "mae" and weights.decoder_heads is None):
        raise InputError(
            line(weights.path, "does not tell its head counts: give heads and decoder_heads (--heads, --decoder-heads)")
        )
    leaves, report, problems = dict(weights.leaves), list[Entry](), list[str]()
    if part != "blocks":
        patch = tuple(patch) if patch else weights.patch
        size = tuple(size) if size else weights.size
        channels = channels or weights.channels
        leaves, report, problems = _fitted(weights, part, size, patch, channels, positions, adapt)

    flat, structure = jax.tree_util.tree_flatten_with_path(target)
    names = ["/".join(str(step.key) for step in path) for path, _ in flat]
    for name, (_, leaf) in zip(names, flat, strict=True):
        if not within(name):
            report.append(Entry("kept", name, None, leaf.shape))
        elif name not in leaves:
            problems.append(f"{name} is missing, the network's is {leaf.shape}")
        elif leaves[name].shape != leaf.shape:
            problems.append(f"{name} is {leaves[name].shape}, the network's is {leaf.shape}")
    problems += [f"{name} has no place in the network" for name in leaves.keys() - set(names) if within(name)]
    if problems:
        more = f"; {len(problems) - 4} more" if len(problems) > 4 else ""
        remedy = "set the network's sizes to the file's, or load a smaller part"
        raise InputError(line(weights.path, f"does not fit: {'; '.join(problems[:4])}{more}: {remedy}"))

    if part == "mae":
        _warn_of_normalised_patches(weights)
    for name, entries in weights.origins.items():
        if name in _CODES[part]:
            continue
        if name not in leaves or not within(name):
            report += [entry._replace(status="skipped", target=None, note=f"not of part {part}") for entry in entries]
        elif leaves[name] is not weights.leaves[name]:
            report += [entry._replace(status="resized", target=leaves[name].shape) for entry in entries]
        else:
            report += entries
    values = [leaves[n].astype(leaf.dtype) if within(n) else leaf for n, (_, leaf) in zip(names, flat, strict=True)]
    return jax.tree_util.tree_unflatten(structure, values), report + weights.skipped


def _warn_of_normalised_patches(weights: Weights) -> None:
    if weights.norm_pix_loss is not False:
        if weights.norm_pix_loss:
            what = "was trained on normalised patches, so it predicts"
        else:
            what = "was perhaps trained on normalised patches (the file does not say), then it predicts"
        remedy = "train it further, or take weights for pixels (facebookresearch's are called 'visualize')"
        log(line(weights.path, f"warning: its decoder {what} patches of mean 0 and variance 1, no pixels: {remedy}"))


def summary(report: Sequence[Entry]) -> str:
    """How many tensors were loaded, resized, skipped and kept, in words."""
    counts = {status: 0 for status in ("loaded", "resized", "skipped", "kept")}
    for entry in report:
        counts[entry.status] += 1
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def table(report: Sequence[Entry]) -> str:
    """A line for every tensor, in columns."""
    shape = lambda x: "-" if x is None else "x".join(map(str, x)) or "scalar"
    rows = [("", "tensor", "in the file", "here", "what")]
    rows += [(e.status, e.name, shape(e.source), shape(e.target), e.note) for e in report]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# --- converted files --------------------------------------------------------------------------------------------------


def save_weights(path: str | os.PathLike, weights: Weights, params: PyTree, part: str = "mae") -> None:
    """Writes a part of a network's parameters and what `MAE` has to know of them; `read_weights` reads it.

    The file has its name only when whole. `weights` is where they come from.

    Raises:
        InputError: the file cannot be written.
    """
    out = Path(path)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {"/".join(str(step.key) for step in path): leaf for path, leaf in flat}
    tensors = {name: np.ascontiguousarray(v) for name, v in named.items() if name.startswith(_starts(part))}
    about: dict[str, Any] = {"format": FORMAT, "part": part, "source_sha256": weights.sha256}
    about |= dict.fromkeys(("size", "patch", "channels", "positions", "decoder_heads"))
    about |= {"heads": weights.heads, "norm_pix_loss": weights.norm_pix_loss}
    if part != "blocks":
        computed = weights.positions(part) is sincos_positions
        about |= {"size": weights.size, "patch": weights.patch, "channels": weights.channels}
        about |= {"positions": "computed" if computed else "own"}
        own = {} if computed else {name: weights.codes[name] for name in _CODES[part] if name in weights.codes}
        tensors |= {name: code.astype(np.float32) for name, code in own.items()}
    if part == "mae":
        about |= {"decoder_heads": weights.decoder_heads}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {"jmae": json.dumps(about)})
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(line(out, f"not written ({why}): free space or change the folder")) from None


def main(argv: list[str]) -> None:
    sources, flags, words = [], [], iter(argv)
    for word in words:
        if word.startswith("-"):
            flags += [word] if "=" in word or word in ("--help", "-h") else [word, *islice(words, 1)]
        else:
            sources.append(word)
    given = arguments(flags, __doc__, ["out", "part", "heads", "decoder-heads", "size"])
    if len(sources) != 1 or "out" not in given:
        raise InputError("name one checkpoint and its copy: python -m jmae.weights SOURCE --out=FILE.safetensors")
    source, out, part = Path(sources[0]), Path(given["out"]), given.get("part", "mae")
    _starts(part)
    if out.suffix != ".safetensors" or out.resolve() == source.resolve():
        raise InputError(f"--out={out}: write another name than the source's, ending in .safetensors")
    heads, decoder_heads = (typed(n, given[n], 0) if n in given else None for n in ("heads", "decoder-heads"))
    size = typed("size", given["size"], (0,)) if "size" in given else None
    weights = read_weights(source, heads=heads, decoder_heads=decoder_heads, size=size)

    # A network of the file's own sizes; what the file does not have is not written, and may have any size.
    any_size: dict[str, Any] = {"size": weights.patch or (1,), "patch": (1,), "channels": 1, "heads": 1}
    any_size |= {"decoder_width": 2, "decoder_depth": 1, "decoder_heads": 1}
    make = lambda: nnx.to_pure_dict(nnx.state(MAE(**(any_size | weights.known()), rngs=nnx.Rngs(0)), nnx.Param))
    positions = sincos_positions if part == "blocks" else weights.positions(part)
    params, report = load_weights(weights, nnx.eval_shape(make), part=part, positions=positions)
    if positions is not sincos_positions:
        log(
            line(
                source, "warning: its position codes are its own, not the computed ones: to load it, adapt or take them"
            )
        )
    save_weights(out, weights, params, part)
    report = [entry for entry in report if entry.status != "kept"]
    print(table(report))
    print(f"{out}: {part} of {source}: {summary(report)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
