"""Converts published weights, of masked autoencoders and of SimSID, to parameters of this library.

    python -m jmae.weights SOURCE --out FILE.safetensors [--part mae|encoder|blocks]
                           [--heads H --decoder-heads D] [--size 224,224]

SOURCE is an MAE checkpoint as .pth, .safetensors or .npz; its content tells the format. Its tensors have the names of
facebookresearch/mae (which medical_mae, MAEMI and timm use too) or of `transformers` (ViTMAE, old and new). A file that
this command has written also serves. For SimSID and SQUID, SOURCE is the folder with model.pth and discriminator.pth,
or one such file; no further flag is needed.

--part is the whole network (mae), its encoder, or only the encoder's blocks, from which MAEMI starts. The report has a
line for every tensor. A state dict does not contain the numbers of heads. They come from the training arguments in the
file, else from --heads and --decoder-heads. --size is the size of the images; it is needed where the number of tokens
does not tell it.

Differences from PyTorch's layout: dense kernels are transposed, equal blocks are stacked, the convolution over patches
is a dense layer over flattened patches, and fixed position codes are computed instead of stored.
"""

import hashlib
import json
import math
import os
import re
import shlex
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
from safetensors.numpy import save as save_tensors

from jmae.errors import InputError, exit_code
from jmae.nn import simsid_weights
from jmae.nn.mae import MAE
from jmae.patches import grid_of, sincos_positions
from jmae.recipe import arguments, typed
from jmae.run_folder import log
from jmae.tensors import Contents, Refused, digest_of, line, naming, read_tensors
from jmae.waiting import at_work

FORMAT = 1  # format of a converted file; other formats are refused
MAX_TOKENS = 2**20  # more than any attention can process
PARTS = {  # the starts of the parameters' names
    "mae": ("",),
    "encoder": ("class_token", "patch_embed/", "encoder/", "encoder_norm/"),
    "blocks": ("encoder/stack/",),
}

Positions = Callable[[tuple[int, ...], int], np.ndarray]


class Entry(NamedTuple):
    """The report's line on one tensor.

    Attributes:
        status: "loaded"; "resized"; "skipped", the file's tensor is not used; "kept", the network's tensor stays.
        name: name in the file, or of a kept tensor in the network.
        source: shape in the file.
        target: shape in the network.
        note: explanation.
    """

    status: str
    name: str
    source: tuple[int, ...] | None = None
    target: tuple[int, ...] | None = None
    note: str = ""


# --- names and layout -------------------------------------------------------------------------------------------------

# Substitutions that turn prefixed names, and then names of transformers' ViTMAE, into those of facebookresearch/mae.
_OFFICIAL = [
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
_CODES = {"mae": ("pos_embed", "decoder_pos_embed"), "encoder": ("pos_embed",), "blocks": ()}  # position codes of parts
# An unknown tensor with such a start belongs to another network and is refused. Others, as classifiers, are skipped.
_ESSENTIAL = ("blocks.", "decoder_blocks.", "patch_embed.", "norm_pre.", "reg_token", "dist_token")
_PUBLISHED = {"small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}  # width, heads
# Names of published models; all of their decoders have 16 heads.
_MODEL = r"mae_vit_(small|base|large|huge)_patch\d+(_dec(512d[28]|128d2)b?)?(_448)?"


class Weights(NamedTuple):
    """A checkpoint in this library's layout. A value that the file does not tell is None."""

    path: str
    sha256: str
    leaves: dict[str, np.ndarray]  # float32 parameters, by the "/"-joined names of `MAE`
    origins: dict[str, list[Entry]]  # the tensors of the file that form each leaf and position code
    skipped: list[Entry]
    codes: dict[str, np.ndarray]  # pos_embed, decoder_pos_embed: (1 + n, width); row 0 is the class token's
    size: tuple[int, ...] | None
    patch: tuple[int, ...] | None
    channels: int | None
    heads: int | None
    decoder_heads: int | None
    norm_pix_loss: bool | None

    def known(self) -> dict[str, Any]:
        """The keyword arguments of `MAE` that follow from the file."""
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
        """The keyword arguments of `MAE` for the network in the file. Raises InputError where the file lacks one."""
        known = self.known()
        names = "size patch channels heads decoder_width decoder_depth decoder_heads".split()
        if missing := ", ".join(name for name in names if name not in known):
            raise InputError(line(self.path, f"does not tell {missing}: pass it, or take a file with a whole MAE"))
        return known | {"positions": self.positions()}

    def positions(self, part: str = "mae") -> Positions:
        """The argument `positions` of `MAE`: computed codes where the file has these, else the codes of the file.

        Raises InputError where the file does not tell its grid, or where its codes do not fit `MAE`.
        """
        if self.patch is None:
            raise InputError(line(self.path, "has no patch embedding: load the part blocks"))
        if self.size is None:
            raise InputError(line(self.path, "does not tell the grid of its tokens: write --size"))
        grid, path = grid_of(self.size, self.patch), self.path
        codes = [self.codes[name] for name in _CODES[part] if name in self.codes]
        if all(_is_code(code, sincos_positions, grid) for code in codes):
            return sincos_positions
        by_width: dict[int, np.ndarray] = {}
        for code in codes:
            rows = code[1:].astype(np.float32)
            if code[0].any() or not np.array_equal(by_width.setdefault(rows.shape[1], rows), rows):
                raise InputError(line(path, "the position codes of its decoder do not fit `MAE`: load the encoder"))

        def positions(asked: tuple[int, ...], width: int) -> np.ndarray:
            if asked != grid or width not in by_width:
                there = f"the grid {grid} and widths {', '.join(map(str, by_width))}"
                raise InputError(line(path, f"its position codes are for {there}, not {asked}, {width}: adapt them"))
            return by_width[width]

        return positions


def read_weights(
    path: str | os.PathLike,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    size: tuple[int, ...] | None = None,
) -> Weights:
    """A checkpoint in this library's layout.

    Args:
        heads, decoder_heads, size: values of the network in the file, needed where the file does not tell them.

    Raises:
        InputError: the file cannot be read, has no vision transformer, has values that are not finite, or contradicts
            an argument.
    """
    contents = read_tensors(path)
    with naming(path):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        weights = _converted(contents) if "jmae" in contents.arguments else _official(contents, size)
        weights = weights._replace(path=os.fspath(path), sha256=sha256)
        if size and weights.size and size != weights.size:
            raise Refused(f"is for images of size {weights.size}, not {size}: leave out the size")
        if "encoder/stack/fc1/kernel" not in weights.leaves:
            names = ", ".join(sorted(contents.tensors)[:3])
            raise Refused(f"has no blocks of a vision transformer (its tensors are {names}, ...): rename its tensors")
        for name, array in (weights.leaves | weights.codes).items():
            tokens, codes = name.endswith("token"), name in weights.codes
            axes = 3 if tokens else 2 if codes else 1 + name.endswith("kernel") + ("/stack/" in name)
            if array.ndim != axes or 0 in array.shape:
                raise Refused(f"{name} has the shape {array.shape}: download or save it again")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise Refused(f"{name} has the type {array.dtype}: take floating-point weights")
            if not np.isfinite(array).all():
                raise Refused(f"{name} has values that are not finite: take an earlier checkpoint")
        values = math.prod(weights.patch) * weights.channels if weights.patch and weights.channels else None
        for name, axis in (("patch_embed/kernel", 0), ("predict/kernel", 1), ("predict/bias", 0)):
            found = weights.leaves[name].shape[axis] if name in weights.leaves else values
            if found != values:
                raise Refused(
                    f"{name} is for patches of {found} values, but its patches have {values}: download it again"
                )
    return _with_heads(weights, heads, decoder_heads)


def _official(contents: Contents, size: tuple[int, ...] | None) -> Weights:
    """The weights of a file with PyTorch's names and layout."""
    pieces: dict[str, dict[tuple[int, int], tuple[str, np.ndarray]]] = {}
    codes: dict[str, np.ndarray] = {}
    origins: dict[str, list[Entry]] = {}
    skipped = [Entry("skipped", name, note="not part of the network") for name in contents.ignored]
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
                raise Refused(
                    f"has {name} and {pieces[leaf][at[0], at[1]][0]}, which are the same parameter: remove one"
                )
            pieces[leaf][at[0], at[1]] = name, array
            if official == "patch_embed.proj.weight":
                if array.ndim < 3:
                    raise Refused(f"{name} has the shape {array.shape}, not that of a convolution: take other weights")
                patch, channels = array.shape[2:], array.shape[1]
        elif official.startswith(_ESSENTIAL):
            raise Refused(f"{name} does not belong to a masked autoencoder: load a network without it")
        else:
            skipped.append(Entry("skipped", name, array.shape, note="not part of the network"))

    leaves = _stack(pieces, origins)
    if "pos_embed" in codes and "class_token" in leaves:  # the first row of a learned code is added to the class token
        leaves["class_token"] = leaves["class_token"] + codes["pos_embed"][0].astype(np.float32)
        codes["pos_embed"] = np.concatenate([0 * codes["pos_embed"][:1], codes["pos_embed"][1:]])

    arguments, width = contents.arguments, leaves.get("class_token", np.empty(0)).shape[-1]
    heads, decoder_heads = arguments.get("num_heads"), arguments.get("decoder_num_heads")
    published = re.fullmatch(_MODEL, str(arguments.get("model")))
    if published and _PUBLISHED[published[1]][0] == width:
        heads, decoder_heads = _PUBLISHED[published[1]][1], 16
    norm = arguments.get("norm_pix_loss")
    return Weights(
        path="",
        sha256="",
        leaves=leaves,
        origins=origins,
        skipped=skipped,
        codes=codes,
        size=None if patch is None else _size(codes, patch, size, arguments.get("img_size")),
        patch=patch,
        channels=channels,
        heads=heads if type(heads) is int else None,
        decoder_heads=decoder_heads if type(decoder_heads) is int else None,
        norm_pix_loss=norm if type(norm) is bool else None,
    )


def _stack(
    pieces: Mapping[str, Mapping[tuple[int, int], tuple[str, np.ndarray]]], origins: dict[str, list[Entry]]
) -> dict[str, np.ndarray]:
    """The parameters that tensors form: those of one layer are joined, and layers of equal blocks are stacked.

    Adds the origins of each parameter. Raises Refused where a block is missing or has another width.

    Args:
        pieces: (name, tensor) of each parameter at (number of the block, order in the block).
    """
    leaves = {}
    for leaf, parts in pieces.items():
        depth = 1 + max(i for i, _ in parts)
        if missing := set(range(depth)) - {i for i, _ in parts}:
            raise Refused(f"has no block {min(missing)} of {leaf}: download or save it again")
        arrays = {at: _transpose(*part) for at, part in parts.items()}
        layers = [np.concatenate([arrays[at] for at in sorted(arrays) if at[0] == i], -1) for i in range(depth)]
        if len({layer.shape for layer in layers}) > 1:
            raise Refused(f"has blocks of several widths in {leaf}: only equal blocks are read")
        stacked = "/stack/" in leaf
        leaves[leaf] = np.stack(layers) if stacked else layers[0]
        origins[leaf] = [
            Entry("loaded", name, array.shape, arrays[at].shape, f"{leaf}[{at[0]}]" if stacked else leaf)
            for at, (name, array) in sorted(parts.items())
        ]
    return leaves


def _converted(contents: Contents) -> Weights:
    """The weights of a file that `save_weights` has written."""
    about = json.loads(contents.arguments["jmae"])
    if about.pop("sha256", None) not in (None, digest_of(contents.tensors, about)):
        raise Refused("is damaged: its content is not that of its digest: copy it, or convert the original, again")
    if about["format"] != FORMAT:
        raise Refused(f"has the format {about['format']} instead of {FORMAT}: convert the original again")
    size, patch = (about[name] and tuple(about[name]) for name in ("size", "patch"))
    counts = {name: about[name] for name in ("channels", "heads", "decoder_heads")}
    for n in (*(size or ()), *(patch or ()), *counts.values()):
        if n is not None and (type(n) is not int or n < 1):
            raise Refused(f"its metadata have {ascii(n)[:20]} instead of a count: convert the original again")
    leaves = {name: array for name, array in contents.tensors.items() if name not in _CODES["mae"]}
    codes = {name: array for name, array in contents.tensors.items() if name not in leaves}
    origins = {name: [Entry("loaded", name, array.shape, array.shape)] for name, array in contents.tensors.items()}
    if about["positions"] == "computed":
        grid, tokens = grid_of(size, patch), zip(_CODES["mae"], ("class_token", "mask_token"), strict=True)
        widths = {name: leaves[token].shape[-1] for name, token in tokens if token in leaves}
        if math.prod(grid) > MAX_TOKENS:
            raise Refused(f"its metadata have size {size} and patches of {patch}: convert the original again")
        codes = {name: np.pad(sincos_positions(grid, width), ((1, 0), (0, 0))) for name, width in widths.items()}
    norm = about["norm_pix_loss"]
    return Weights("", "", leaves, origins, [], codes, size, patch, **counts, norm_pix_loss=norm)


def _place(official: str) -> tuple[str, int, int] | None:
    """(name of the parameter, number of the block, order among the tensors that form this parameter), or None.

    `official` is the name of the tensor in facebookresearch/mae.
    """
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


def _transpose(name: str, array: np.ndarray) -> np.ndarray:
    """A tensor in float32 and this library's layout: a kernel (out, in, *patch) becomes (prod(patch) * in, out)."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise Refused(f"{name} has the type {array.dtype}: take floating-point weights")
    if name.endswith("weight") and array.ndim > 1:
        array = np.moveaxis(array, (0, 1), (-1, -2)).reshape(-1, len(array))
    with np.errstate(over="ignore"):  # `read_weights` then finds values that are not finite
        return array.astype(np.float32)


def _size(
    codes: Mapping[str, np.ndarray], patch: tuple[int, ...], default: tuple[int, ...] | None, recorded: Any
) -> tuple[int, ...] | None:
    """The size of the images: `recorded` in the file, else `default`, else the size that the number of tokens tells.

    In the last case 2D images are taken as square. Volumes are cubic where the position codes agree with that, else
    the size stays unknown. Raises Refused where the number of tokens contradicts the size.
    """
    recorded = tuple(recorded) if type(recorded) in (list, tuple) else (recorded,) * len(patch)
    size = recorded if all(type(n) is int for n in recorded) else default
    for code in codes.values():
        n = len(code) - 1
        side = round(n ** (1 / len(patch)))
        cube = (side,) * len(patch)
        if size is not None and math.prod(grid_of(size, patch)) != n:
            raise Refused(
                f"has {n} tokens, which size {size} in patches of {patch} does not have: pass the size of its images"
            )
        if size is None and math.prod(cube) == n and (len(patch) == 2 or _is_code(code, sincos_positions, cube)):
            size = tuple(side * p for p in patch)
    return size


def _is_code(code: np.ndarray, positions: Positions, grid: tuple[int, ...]) -> bool:
    """Whether a file's code (1 + n, width) equals that of `positions`, to the precision of the code's type.

    The class token's code is zero.
    """
    if len(code) != math.prod(grid) + 1:
        return False
    expected = np.pad(positions(grid, code.shape[1]), ((1, 0), (0, 0)))
    return np.allclose(code.astype(np.float32), expected, rtol=0, atol=max(1e-4, float(jnp.finfo(code.dtype).eps)))


def _with_heads(weights: Weights, heads: int | None, decoder_heads: int | None) -> Weights:
    """The weights with these numbers of heads (None: those of the file).

    Raises InputError where the file has other numbers, or where they do not divide the width.
    """
    known = weights.known()
    for name, wanted, width in (("heads", heads, "width"), ("decoder_heads", decoder_heads, "decoder_width")):
        if wanted is not None and known.get(name, wanted) != wanted:
            raise InputError(line(weights.path, f"was trained with {known[name]} {name}, not {wanted}: set that"))
        count = known.get(name) if wanted is None else wanted
        if count is not None and width in known and (count < 1 or known[width] % count):
            raise InputError(line(weights.path, f"{count} {name} do not divide its {width} {known[width]}: set others"))
    return weights._replace(heads=heads or weights.heads, decoder_heads=decoder_heads or weights.decoder_heads)


# --- into a network ---------------------------------------------------------------------------------------------------


def resize_weights(
    values: np.ndarray,
    patch: tuple[int, ...],
    channels: int,
    to_patch: tuple[int, ...],
    to_channels: int,
    *,
    embedding: bool,
) -> np.ndarray:
    """Weights (prod(patch) * channels, ...) of patches, resized to patches of another size, channel count or rank.

    An embedding keeps its response:
    - channels: with equal channels. Each of the c' new channels gets c / c' times the mean of the c old ones;
    - axes: to images that are constant along a new last axis. Weights are repeated and divided by its length (Carreira
      & Zisserman, "Quo Vadis", CVPR 2017, arXiv 1705.07750). Weights are summed along an axis that is dropped;
    - patch: the new layer responds to a patch as the old layer responds to this patch, resized linearly.

    A prediction is resized as an image: the mean of the channels, equal values along a new axis, the mean along an axis
    that is dropped, and linear resizing.
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
    """The matrix (to, n) of linear resizing from n to `to` samples; cell centres are aligned.

    The triangle is wider where the number of samples falls.
    """
    centres = (np.arange(to) + 0.5) * n / to - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(n) - centres[:, None]) / max(n / to, 1))
    return weights / weights.sum(1, keepdims=True)


def _starts(part: str) -> tuple[str, ...]:
    """The starts of the parameters' names of a part. Raises InputError for an unknown part."""
    if part not in PARTS:
        raise InputError(f"part {part!r} is unknown: one of {', '.join(PARTS)}")
    return PARTS[part]


def _fit(
    weights: Weights,
    part: str,
    size: tuple[int, ...] | None,
    patch: tuple[int, ...] | None,
    channels: int | None,
    positions: Positions,
    adapt: bool,
) -> tuple[dict[str, np.ndarray], list[Entry], list[str]]:
    """(leaves for the network's patch and channels, report on the position codes, problems that prevent loading)."""
    leaves, report, problems = dict(weights.leaves), list[Entry](), list[str]()
    if patch is None or channels is None or weights.patch is None or weights.channels is None:
        raise InputError(line(weights.path, "has no patch embedding: load the part blocks"))
    if size is None:
        raise InputError(line(weights.path, "does not tell the grid of its tokens: write --size, or pass size"))
    if (patch, channels) != (weights.patch, weights.channels):
        if not adapt:
            theirs, ours = f"{weights.patch} with {weights.channels} channels", f"{patch} with {channels}"
            problems.append(f"its patches are {theirs}, those of the network {ours} (adapt resizes them)")
        else:
            sizes = weights.patch, weights.channels, patch, channels
            leaves["patch_embed/kernel"] = resize_weights(leaves["patch_embed/kernel"], *sizes, embedding=True)
            for name in leaves.keys() & {"predict/kernel", "predict/bias"} if part == "mae" else ():
                leaves[name] = resize_weights(leaves[name].T, *sizes, embedding=False).T
    grid = grid_of(size, patch)
    for name in _CODES[part]:
        code = weights.codes.get(name)
        entries = weights.origins.get(name, [])
        if code is None:
            if not adapt:
                problems.append(f"it has no position code {name} (adapt keeps that of the network)")
        elif _is_code(code, positions, grid):
            report += [entry._replace(target=code.shape, note="equals the network's code") for entry in entries]
        elif not adapt:
            problems.append(
                f"{name} {code.shape} is not the network's code of the grid {grid} (adapt keeps the latter)"
            )
        elif weights.size and _is_code(code, sincos_positions, grid_of(weights.size, weights.patch)):
            there, note = (math.prod(grid) + 1, code.shape[1]), f"computed for {grid}"
            report += [entry._replace(status="resized", target=there, note=note) for entry in entries]
        else:
            note = "differs from the network's code, which stays"
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
    """Loads a part of a file into the parameters of a network. Returns (parameters, report on every tensor).

    The file's position codes must equal those of the network, unless `adapt` is True. A warning is logged for a decoder
    that was trained on normalised patches.

    Args:
        source: a file, or the result of `read_weights`.
        target: nested dict of the network's parameters, as arrays or ShapeDtypeStructs. Loaded parameters become NumPy
            arrays. All others stay as they are.
        part: "mae" is the whole network. "encoder" is the class token, patch embedding, encoder blocks and last norm.
            "blocks" is only the encoder's blocks.
        heads, decoder_heads: numbers of heads of the network; None: those of the file.
        size, patch, channels: size of the images, patch and channels of the network; None: those of the file.
        positions: function that computes the network's position codes.
        adapt: resize patch embedding and prediction to the network's patch, channel count or rank (`resize_weights`),
            and keep the network's position codes where the file has others.

    Raises:
        InputError: a tensor of the part is missing or has another shape, position codes or numbers of heads differ, or
            the numbers of heads are unknown.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    weights, starts = _with_heads(weights, heads, decoder_heads if part == "mae" else None), _starts(part)
    within = lambda name: name.startswith(starts)
    if part == "mae" and not any(name.startswith("decoder/") for name in weights.leaves):
        raise InputError(line(weights.path, "has no decoder: load the part encoder or blocks"))
    if weights.heads is None or (part == "mae" and weights.decoder_heads is None):
        raise InputError(
            line(
                weights.path,
                "does not tell its numbers of heads: pass heads and decoder_heads (--heads, --decoder-heads)",
            )
        )
    leaves, report, problems = dict(weights.leaves), list[Entry](), list[str]()
    if part != "blocks":
        patch = tuple(patch) if patch else weights.patch
        size = tuple(size) if size else weights.size
        channels = channels or weights.channels
        leaves, report, problems = _fit(weights, part, size, patch, channels, positions, adapt)

    flat, structure = jax.tree_util.tree_flatten_with_path(target)
    names = ["/".join(str(step.key) for step in path) for path, _ in flat]
    shapes = {name: leaf.shape for name, (_, leaf) in zip(names, flat, strict=True)}
    report += [Entry("kept", name, None, shape) for name, shape in shapes.items() if not within(name)]
    if problems := problems + _misfits(leaves, shapes, within):
        more = f"; {len(problems) - 4} more" if len(problems) > 4 else ""
        remedy = "set the network's sizes to the file's, or load a smaller part"
        raise InputError(line(weights.path, f"does not fit: {'; '.join(problems[:4])}{more}: {remedy}"))

    if part == "mae":
        _warn_of_normalised_patches(weights)
    report += _leaf_entries(weights, part, leaves)
    values = [leaves[n].astype(leaf.dtype) if within(n) else leaf for n, (_, leaf) in zip(names, flat, strict=True)]
    return jax.tree_util.tree_unflatten(structure, values), report + weights.skipped


def _misfits(
    leaves: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], within: Callable[[str], bool]
) -> list[str]:
    """The differences between the leaves of a file and the shapes of a network, in the part `within`."""
    problems = []
    for name, shape in shapes.items():
        if within(name) and name not in leaves:
            problems.append(f"{name} {shape} is missing")
        elif within(name) and leaves[name].shape != shape:
            problems.append(f"{name} has the shape {leaves[name].shape}, that of the network {shape}")
    return problems + [f"the network has no {name}" for name in leaves.keys() - shapes.keys() if within(name)]


def _leaf_entries(weights: Weights, part: str, leaves: Mapping[str, np.ndarray]) -> list[Entry]:
    """The report on the tensors of a file that form its leaves; `leaves` are the loaded ones, perhaps resized."""
    report: list[Entry] = []
    for name, entries in weights.origins.items():
        if name in _CODES[part]:
            continue
        if name not in leaves or not name.startswith(_starts(part)):
            report += [entry._replace(status="skipped", target=None, note=f"not in part {part}") for entry in entries]
        elif leaves[name] is not weights.leaves[name]:
            report += [entry._replace(status="resized", target=leaves[name].shape) for entry in entries]
        else:
            report += entries
    return report


def _warn_of_normalised_patches(weights: Weights) -> None:
    """Logs a warning unless the file says that its decoder was trained on pixels."""
    if weights.norm_pix_loss is not False:
        if weights.norm_pix_loss:
            what = "was trained on normalised patches and predicts"
        else:
            what = "may have been trained on normalised patches (the file does not say) and then predicts"
        remedy = (
            "train it further, or take weights for pixels (those of facebookresearch have 'visualize' in their names)"
        )
        log(line(weights.path, f"warning: its decoder {what} patches of mean 0 and variance 1, not pixels: {remedy}"))


def summary(report: Sequence[Entry]) -> str:
    """The numbers of tensors that were loaded, resized, skipped and kept, as text."""
    counts = {status: 0 for status in ("loaded", "resized", "skipped", "kept")}
    for entry in report:
        counts[entry.status] += 1
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def tensor_table(report: Sequence[Entry]) -> str:
    """The report as a text table with one line for every tensor."""
    shape = lambda x: "-" if x is None else "x".join(map(str, x)) or "scalar"
    rows = [("", "tensor", "in the file", "here", "note")]
    rows += [(e.status, e.name, shape(e.source), shape(e.target), e.note) for e in report]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# --- converted files --------------------------------------------------------------------------------------------------


def save_weights(path: str | os.PathLike, weights: Weights, params: PyTree, part: str = "mae") -> None:
    """Writes a part of a network's parameters and the arguments of `MAE` in one piece, for `read_weights`.

    Args:
        weights: the source of the parameters.

    Raises:
        InputError: the file cannot be written.
    """
    out = Path(path)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {"/".join(str(step.key) for step in path): leaf for path, leaf in flat}
    tensors = {name: np.ascontiguousarray(v) for name, v in leaves.items() if name.startswith(_starts(part))}
    about: dict[str, Any] = {"format": FORMAT, "part": part, "source_sha256": weights.sha256}
    about |= dict.fromkeys(("size", "patch", "channels", "positions", "decoder_heads"))
    about |= {"heads": weights.heads, "norm_pix_loss": weights.norm_pix_loss}
    if part != "blocks":
        computed = weights.positions(part) is sincos_positions
        about |= {"size": weights.size, "patch": weights.patch, "channels": weights.channels}
        about |= {"positions": "computed" if computed else "own"}
        codes = {} if computed else {name: weights.codes[name] for name in _CODES[part] if name in weights.codes}
        tensors |= {name: code.astype(np.float32) for name, code in codes.items()}
    if part == "mae":
        about |= {"decoder_heads": weights.decoder_heads}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            digested = {"jmae": json.dumps(about | {"sha256": digest_of(tensors, about)})}
            temporary.write_bytes(save_tensors(tensors, digested))  # `save_file` lets only the owner read the file
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(line(out, f"cannot be written ({error.strerror}): free space or change the folder")) from None


@at_work("reading and converting the weights")
def main(argv: list[str]) -> None:
    sources, words, rest = [], [], iter(argv)
    for word in rest:
        if word.startswith("-"):
            words += [word] if "=" in word or word in ("--help", "-h") else [word, *islice(rest, 1)]
        else:
            sources.append(word)
    flags = arguments(words, __doc__, ["out", "part", "heads", "decoder-heads", "size"])
    if len(sources) != 1 or "out" not in flags:
        raise InputError("name one checkpoint and its copy: jmae weights SOURCE --out FILE.safetensors")
    source, out, part = Path(sources[0]), Path(flags["out"]), flags.get("part", "mae")
    _starts(part)
    if out.suffix != ".safetensors" or out.resolve() == source.resolve():
        raise InputError(f"--out={out}: write a new name that ends in .safetensors")
    if simsid_weights.holds(source):
        if more := sorted(flags.keys() - {"out"}):
            raise InputError(f"--{more[0]} is of masked autoencoders, {source} holds weights of SimSID: leave it out")
        found = simsid_weights.read(source)
        simsid_weights.save(out, found)
        print(simsid_weights.report(found))
        print(f"{out}: SimSID of {source}: {len(found.leaves)} loaded, {len(found.skipped)} skipped")
        return
    heads, decoder_heads = (typed(n, flags[n], 0) if n in flags else None for n in ("heads", "decoder-heads"))
    size = typed("size", flags["size"], (0,)) if "size" in flags else None
    weights = read_weights(source, heads=heads, decoder_heads=decoder_heads, size=size)

    # The network has the sizes of the file. A part that the file lacks is not written, so it may have any size.
    any_size: dict[str, Any] = {"size": weights.patch or (1,), "patch": (1,), "channels": 1, "heads": 1}
    any_size |= {"decoder_width": 2, "decoder_depth": 1, "decoder_heads": 1}
    make = lambda: nnx.to_pure_dict(nnx.state(MAE(**(any_size | weights.known()), rngs=nnx.Rngs(0)), nnx.Param))
    positions = sincos_positions if part == "blocks" else weights.positions(part)
    params, report = load_weights(weights, nnx.eval_shape(make), part=part, positions=positions)
    if positions is not sincos_positions:
        log(line(source, "warning: its position codes differ from the computed ones: pass adapt, or use these codes"))
    save_weights(out, weights, params, part)
    report = [entry for entry in report if entry.status != "kept"]
    print(tensor_table(report))
    print(f"{out}: {part} of {source}: {summary(report)}")
    print(f"next: jmae train --config NAME --config.model.weights={shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
