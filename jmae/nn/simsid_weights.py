"""Weights of the published SimSID and SQUID, as their PyTorch code saves them, in this library's layout.

    python -m jmae.weights SOURCE --out FILE.safetensors

SOURCE is a folder with the state dicts of the generator (`model.pth`) and the discriminator (`discriminator.pth`), as
the code leaves it; or one file with the tensors of both, or of one. Files are .pth, .safetensors or .npz.
`model.weights` of the recipe takes the same sources, and the converted file.

Differences of layout: kernels have the output last. Vectors of several cells have the channels last. The memories of
all windows are one array. The attention's bias of the values is a part of the bias of its output, as its weights sum to
one; the bias of the keys has no effect.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save as save_tensors

from jmae.errors import InputError
from jmae.tensors import digest_of, line, read_tensors

FORMAT = 1  # of a converted file; another number is refused
ABOUT = "simsid"  # of the metadata of a converted file
FILES = ("discriminator", "model")  # stems of the files of a folder
_PREFIX = r"^((module|state|generator|discriminator)[./])+"
_FIRST = {"in_conv.conv.conv1.0.weight", "conv_model.0.weight"}  # tensors that tell a generator, a discriminator
_ATTENTION = "inpaint_block.attention"
_PLACES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # modules of the code, and their places here
    (r"in_conv\.conv\.", "network/enter/"),
    (r"down_blocks\.(\d+)\.mpconv\.", r"network/down/\1/"),
    (r"up_blocks\.(\d+)\.conv\.", r"network/student/levels/\1/"),
    (r"teacher_ups\.(\d+)\.conv\.", r"network/teacher/levels/\1/"),
    (r"out_conv\.conv$", "network/student/out"),
    (r"teacher_out\.conv$", "network/teacher/out"),
    (r"inpaint_block\.bottleneck_conv1\.", "network/inpaint/enter/"),
    (r"inpaint_block\.bottleneck_conv2\.", "network/inpaint/leave/"),
    (r"inpaint_block\.attn_norm", "network/inpaint/norm"),
    (r"inpaint_block\.ff\.0$", "network/inpaint/fc1"),
    (r"inpaint_block\.ff\.3$", "network/inpaint/fc2"),
    (r"inpaint_block\.attention\.(q|kv|out)$", r"network/inpaint/\1"),
    (r"conv_model\.0$", "discriminator/first"),
    (r"conv_model\.(\d+)$", lambda found: "discriminator/layers/{}/{}".format(*_layer(int(found[1])))),
    (r"regressor$", "discriminator/out"),
]
_PARTS = {  # of a double convolution, and of a convolution with its norm
    "conv1.0": "enter/conv",
    "conv1.1": "enter/norm",
    "conv2.0": "middle/conv",
    "conv2.1": "middle/norm",
    "conv2.3": "leave/conv",
    "conv2.4": "leave/norm",
    "0": "conv",
    "1": "norm",
}
_VECTORS = {  # axis of a window's vector in the tensors of the inpaint block
    "attn_norm1.weight": 0,
    "attn_norm1.bias": 0,
    "attn_norm2.weight": 0,
    "attn_norm2.bias": 0,
    "attention.in_proj_weight": 1,
    "attention.out_proj.weight": 0,
    "attention.out_proj.bias": 0,
    "ff.0.weight": 1,
    "ff.3.weight": 0,
    "ff.3.bias": 0,
}


class Weights(NamedTuple):
    """Weights in this library's layout.

    Attributes:
        path: where they come from.
        sha256: digest of the digests of the files.
        leaves: arrays, float32, by the "/"-joined names of the networks' parameters and statistics.
        skipped: names of the tensors that have no place here.
    """

    path: str
    sha256: str
    leaves: dict[str, np.ndarray]
    skipped: list[str]


def files_of(source: Path) -> list[Path]:
    """The files that a source names: itself, or in a folder those of `FILES`."""
    if not source.is_dir():
        return [source]
    found = [file for file in sorted(source.iterdir()) if file.suffix in (".pth", ".safetensors", ".npz")]
    found = [file for file in found if file.stem in FILES]
    if tuple(file.stem for file in found) != FILES:
        problem = "is a folder without model.pth and discriminator.pth"
        raise InputError(line(source, f"{problem}: name one weights file, or SimSID's folder"))
    return found


def holds(source: Path) -> bool:
    """Whether a source holds weights of SimSID, published or converted. A folder is taken for one."""
    if source.is_dir():
        return True
    contents = read_tensors(source)
    return ABOUT in contents.arguments or bool(_FIRST & {_plain(name) for name in contents.tensors})


def read(source: Path) -> Weights:
    """Weights of a file or folder; raises InputError where it holds none of SimSID, or values that are not finite."""
    tensors: dict[str, np.ndarray] = {}
    hashed, converted, ignored = hashlib.sha256(), "", list[str]()
    for file in files_of(source):
        contents = read_tensors(file)
        with file.open("rb") as content:
            hashed.update(hashlib.file_digest(content, "sha256").digest())
        converted = contents.arguments.get(ABOUT, converted)
        tensors |= contents.tensors
        ignored += contents.ignored
    if converted:
        about = json.loads(converted)
        if about.pop("sha256", None) not in (None, digest_of(tensors, about)):
            raise InputError(
                line(source, "is damaged: its content is not that of its digest: copy or convert it again")
            )
        if about["format"] != FORMAT:
            raise InputError(line(source, f"is of another format than {FORMAT}: convert the original again"))
        leaves, skipped = tensors, list[str]()
    else:
        leaves, skipped = from_pytorch({_plain(name): array for name, array in tensors.items()})
    if not leaves:
        names = ", ".join(sorted(tensors)[:3])
        raise InputError(line(source, f"has no weights of SimSID, its names are {names}, ...: name model.pth's folder"))
    for name, array in leaves.items():
        if not np.isfinite(array).all():
            raise InputError(line(source, f"{name} has values that are not finite: take an earlier checkpoint"))
    return Weights(os.fspath(source), hashed.hexdigest(), leaves, [*skipped, *ignored])


def load(weights: Weights, target: PyTree) -> PyTree:
    """A nested dict of parameters or statistics with the weights in their places.

    Args:
        target: nested dict of arrays or ShapeDtypeStructs, {"network", "discriminator"} or one of them.

    Raises InputError where a leaf is missing, or has another shape.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(target)
    names = ["/".join(str(step.key) for step in path) for path, _ in flat]
    shapes = {name: array.shape for name, array in weights.leaves.items()}
    problems = [
        f"{name} is {shapes.get(name, 'missing')}, the network's is {leaf.shape}"
        for name, (_, leaf) in zip(names, flat, strict=True)
        if shapes.get(name) != leaf.shape
    ]
    if problems:
        more = f"; {len(problems) - 3} more" if len(problems) > 3 else ""
        remedy = "set data.size, the section joint and model.discriminator to those of the weights"
        raise InputError(line(weights.path, f"does not fit: {'; '.join(problems[:3])}{more}: {remedy}"))
    arrays = [weights.leaves[name].astype(leaf.dtype) for name, (_, leaf) in zip(names, flat, strict=True)]
    return jax.tree_util.tree_unflatten(structure, arrays)


def save(out: Path, weights: Weights) -> None:
    """Writes weights as a file that `read` reads. The file has its name only when whole."""
    what = {"format": FORMAT, "source_sha256": weights.sha256}
    about = {ABOUT: json.dumps(what | {"sha256": digest_of(weights.leaves, what)})}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save_tensors(weights.leaves, about))  # `save_file` lets only the owner read the file
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(line(out, f"not written ({error.strerror}): free space or change the folder")) from None
    finally:
        temporary.unlink(missing_ok=True)


def report(weights: Weights) -> str:
    """A line for every leaf, and for every tensor without a place."""
    shape = lambda array: "x".join(map(str, array.shape)) or "scalar"
    lines = [f"loaded   {name}  {shape(array)}" for name, array in sorted(weights.leaves.items())]
    return "\n".join([*lines, *(f"skipped  {name}  no part of the networks" for name in sorted(weights.skipped))])


# --- names and layout -------------------------------------------------------------------------------------------------


def from_pytorch(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """(leaves, names of the tensors without a place) of the state dicts of generator and discriminator together."""
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    tensors = with_channels_last(tensors)
    leaves, skipped, rows = dict[str, np.ndarray](), list[str](), dict[str, dict[int, np.ndarray]]()
    for name, array in with_plain_attention(tensors).items():
        if memory := re.fullmatch(r"(inpaint_block|memory_blocks\.\d+)\.memory\.(\d+)\.memMatrix", name):
            rows.setdefault(memory[1], {})[int(memory[2])] = array
        elif leaf := _leaf(name, array.ndim):
            leaves[leaf] = np.moveaxis(array, (0, 1), (-1, -2)) if leaf.endswith("kernel") else array
        else:
            skipped.append(name)
    # SimSID's decoder memories are listed from the bottleneck on, as here; SQUID's end with that of the bottleneck.
    blocks = sorted((name for name in rows if name != "inpaint_block"), key=lambda name: int(name.split(".")[1]))
    if _is_squid(tensors):
        blocks.reverse()
    places = {name: f"network/memories/{number}/rows" for number, name in enumerate(blocks)}
    places["inpaint_block"] = "network/inpaint/memory/rows"
    for name, windows in rows.items():
        leaves[places[name]] = np.stack([windows[number] for number in sorted(windows)])
    return {name: np.ascontiguousarray(array) for name, array in leaves.items()}, skipped


def with_channels_last(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors whose vectors of several cells have the channels last. The code has them first, but for the decoder's
    memories of SQUID."""
    width = lambda name: len(tensors[name]) if name in tensors else 1
    last = [name for name in tensors if re.fullmatch(r"conv_model\.\d+\.weight", name) and tensors[name].ndim > 1]
    found = {}
    for name, array in tensors.items():
        block, _, rest = name.partition(".")
        if block == "inpaint_block" and (rest in _VECTORS or rest.endswith("memMatrix")):
            axis, channels = _VECTORS.get(rest, 1), width("inpaint_block.bottleneck_conv1.0.weight")
        elif block == "memory_blocks" and not _is_squid(tensors):
            axis, channels = 1, width(f"up_blocks.{rest.split('.')[0]}.conv.conv1.0.weight")
        elif name == "regressor.weight" and last:
            axis, channels = 1, width(max(last, key=lambda one: int(one.split(".")[1])))
        else:
            axis, channels = 0, 0
        found[name] = _channels_last(array, axis, channels) if channels else array
    return found


def _channels_last(array: np.ndarray, axis: int, channels: int) -> np.ndarray:
    x = np.moveaxis(array, axis, -1)
    x = x.reshape(*x.shape[:-1], channels, -1)
    return np.moveaxis(np.moveaxis(x, -1, -2).reshape(*x.shape[:-2], -1), -1, axis)


def with_plain_attention(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with the attention's joint projection as those of queries (q), and of keys and values (kv)."""
    names = [f"{_ATTENTION}.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
    if any(name not in tensors for name in names):
        return tensors
    weight, bias, out_weight, out_bias = (tensors[name] for name in names)
    d = len(out_bias)
    plain = {
        "q.weight": weight[:d],
        "q.bias": bias[:d],
        "kv.weight": weight[d:],
        "out.weight": out_weight,
        "out.bias": out_bias + out_weight @ bias[2 * d :],
    }
    rest = {name: array for name, array in tensors.items() if name not in names}
    return rest | {f"{_ATTENTION}.{name}": array for name, array in plain.items()}


def _plain(name: str) -> str:
    """A tensor's name without the prefixes of wrappers."""
    return re.sub(_PREFIX, "", name)


def _is_squid(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a generator is SQUID's, whose first decoder memory is not the first of the list."""
    return not any(name.startswith("memory_blocks.0.") for name in tensors)


def _layer(number: int) -> tuple[int, str]:
    """(layer, part) of a module of the discriminator: a convolution, a norm and an activation follow each other."""
    return (number - 2) // 3, ("conv", "norm", "")[(number - 2) % 3]


def _leaf(name: str, axes: int) -> str:
    """The name of a tensor here; "" where it has no place."""
    module, _, kind = name.rpartition(".")
    for pattern, place in _PLACES:
        found = re.match(pattern, module)
        if not found:
            continue
        start = found.expand(place) if isinstance(place, str) else place(found)
        rest = module[found.end() :]
        if rest and rest not in _PARTS and not start.endswith("norm"):
            return ""
        start += _PARTS.get(rest, rest) if not start.endswith("norm") else rest
        norm = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        kinds = norm if "norm" in start.rpartition("/")[2] else {"weight": "kernel", "bias": "bias"}
        return f"{start}/{kinds[kind]}" if kind in kinds else ""
    return ""
