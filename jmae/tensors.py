"""Reads files of network weights as named arrays. No code in a file ever runs.

A .pth file is a pickle, and a pickle can run any code when it is loaded. This module therefore has a small interpreter
of its own, without PyTorch. It knows the operations of plain data, of the tensors of `torch.save` and of
`argparse.Namespace`. It calls nothing and refuses everything else. Consulted: PyTorch's serialization.py and
_weights_only_unpickler.py.

As in `data/files`, the content of a file tells its format, and sizes are checked against the file before memory is
allocated. Every problem becomes one `InputError`, "PATH: what: remedy".
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from jmae.errors import InputError

MAX_PICKLE_BYTES = 2**21  # ViT-H with its optimiser takes 2**18; lists alone would fill 2**28 bytes of memory
MAX_VALUES = 2**40  # values of a storage; no real file has more
HARMLESS_BYTES = 2**26  # bytes of tensors that are always allowed
EXPANSION = 4  # bytes of tensors for each byte of the file: weights hardly compress, and few share a storage


class Contents(NamedTuple):
    """The contents of a file of weights."""

    tensors: dict[str, np.ndarray]
    arguments: dict[str, Any]  # of the training, or metadata
    ignored: list[str]  # names of all other entries


class Refused(Exception):
    """A problem of a file, "what: remedy". `naming` puts the path before it."""


def line(path: str | os.PathLike, problem: str) -> str:
    """ "PATH: what: remedy"; a character that cannot be printed becomes a space."""
    return "".join(c if c.isprintable() else " " for c in f"{os.fspath(path)}: {problem}")


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns every exception into an InputError of one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except Refused as refused:
        raise InputError(line(path, str(refused))) from None
    except FileNotFoundError as error:
        raise InputError(line(path, "not found: check the path")) from error
    except PermissionError as error:
        raise InputError(line(path, "no permission to read it: check its permissions")) from error
    except Exception as error:  # decoders raise errors of any class on damaged files
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(line(path, f"not readable ({why}): download or save it again")) from error


# --- files ------------------------------------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike) -> Contents:
    """The contents of a .pth (either form of `torch.save`), .safetensors or .npz file. No code in it runs.

    Raises:
        InputError: "PATH: what: remedy", for every file that cannot be read or is ambiguous.
    """
    with naming(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise Refused(f"is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}: name one file of weights")
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(512)
            file.seek(0)
            contents = _format(head, length)(file, length)
        if not contents.tensors:
            raise Refused("contains no tensors: name a file with the weights of a network")
        for name in (*contents.tensors, *contents.ignored):
            if not name.isprintable() or len(name) > 200:
                raise Refused(f"has a tensor called {name[:40]!a}: save it with plain names")
        return contents


def digest_of(tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    """The SHA-256 of the names, types, shapes and values of tensors and of what the file says of them."""
    whole = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return whole.hexdigest()


def _format(head: bytes, length: int) -> Callable[[Any, int], Contents]:
    """The function that reads a file with these first bytes and this length. Raises Refused for other formats."""
    if not head:
        raise Refused("is empty: download or save it again")
    if head.startswith(b"PK\x03\x04"):
        return _zip
    if head.startswith(_LEGACY_MAGIC):
        return _legacy
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= length - 8:
        return _safetensors
    if head.startswith(b"\x80"):
        raise Refused("is a pickle but not one of torch.save: save the network's state dict with torch.save")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("is a Git LFS pointer, not the weights: run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise Refused("is a web page, not the weights: download the file itself")
    raise Refused("not a format that is read here: save the weights as .pth, .safetensors or .npz")


def _check_total(nbytes: int, length: int) -> None:
    if nbytes > max(HARMLESS_BYTES, EXPANSION * length):
        raise Refused(f"claims {nbytes} bytes of tensors, too many for its {length} bytes: download it again")


def _safetensors(file: IO[bytes], length: int) -> Contents:
    with safe_open(file.name, framework="np") as found:
        return Contents({name: found.get_tensor(name) for name in found.keys()}, found.metadata() or {}, [])


def _zip(file: IO[bytes], length: int) -> Contents:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise Refused("contains two files of the same name: save it again")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in archive.infolist()):
            raise Refused("has a compression that neither torch.save nor numpy.savez uses: save it with one of them")
        if any(name.endswith("/constants.pkl") for name in names):
            raise Refused("is a TorchScript program: save its state dict with torch.save")
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) == 1:
            return _torch(archive, pickles[0].removesuffix("data.pkl"), length)
        if names and all(name.endswith(".npy") for name in names):
            return _npz(archive, length)
        raise Refused("is a zip file of neither torch.save nor numpy.savez: save the weights with one of them")


def _npz(archive: zipfile.ZipFile, length: int) -> Contents:
    """The contents of numpy.savez. Where arrays are called `state/NAME`, only these are tensors.

    In that case other arrays of at most 8 values and one axis are arguments.
    """
    _check_total(sum(entry.file_size for entry in archive.infolist()), length)
    arrays = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise Refused(f"{name} is not a plain array: save it with numpy.savez")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            if dtype.kind not in "biuf" or stream.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise Refused(f"{name} has {entry.file_size} bytes, not those of {dtype}{shape}: save it again")
            values = np.frombuffer(stream.read(), dtype)
        arrays[name] = values.reshape(shape, order="F" if fortran else "C")
    tensors = {name: array for name, array in arrays.items() if name.startswith("state/")}
    if not tensors:
        return Contents(arrays, {}, [])
    others = {name: array for name, array in arrays.items() if name not in tensors}
    small = {name: array.tolist() for name, array in others.items() if array.size <= 8 and array.ndim <= 1}
    return Contents(tensors, small, [name for name in others if name not in small])


def _torch(archive: zipfile.ZipFile, root: str, length: int) -> Contents:
    """The zip form of `torch.save`: a pickle, and an uncompressed file with the bytes of each storage."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise Refused("is compressed, which torch.save never does: save it again with torch.save")
    if sum(entry.file_size for entry in entries.values()) > length:
        raise Refused(f"claims more than its {length} bytes: download it again")
    if entries[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise Refused(f"has a pickle of more than {MAX_PICKLE_BYTES} bytes: save the network's state dict alone")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise Refused(f"has the byte order {order[:20]!r}: save it again with torch.save")
    value = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), {})

    def load(storage: _Storage) -> bytes:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size != storage.values * storage.dtype.itemsize:
            raise Refused(f"has no data of the right length for storage {storage.key}: download it again")
        return archive.read(entry)

    return _state(value, load, big=order == b"big", length=length)


_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def _legacy(file: IO[bytes], length: int) -> Contents:
    """The form of `torch.save` before 1.6.

    Five pickles (magic number, version, system, value, storage keys) are followed, for each key, by the number of
    values and the values.
    """
    stream, storages = io.BytesIO(file.read(MAX_PICKLE_BYTES)), dict[str, _Storage]()
    _, version, system = (unpickle(stream, {}) for _ in range(3))
    value, keys = unpickle(stream, storages), unpickle(stream, {})
    if version != 1001 or type(system) is not dict or type(keys) is not list or sorted(storages) != sorted(keys):
        raise Refused("has an unknown form of torch.save: save it with a newer PyTorch")
    places, at = {}, stream.tell()
    for key in keys:
        file.seek(at)
        count, places[key] = int.from_bytes(file.read(8), "little" if system["little_endian"] else "big"), at + 8
        at = at + 8 + storages[key].values * storages[key].dtype.itemsize
        if count != storages[key].values or at > length:
            raise Refused(f"has no data of the right length for storage {key}: download it again")

    def load(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.values * storage.dtype.itemsize)

    return _state(value, load, big=not system["little_endian"], length=length)


# --- the pickle of torch.save, as data --------------------------------------------------------------------------------


class _Global(NamedTuple):
    """A name that the pickle refers to. It is never imported."""

    name: str


class _Storage(NamedTuple):
    """A flat array of the file, which tensors share."""

    key: str
    dtype: np.dtype
    values: int


class _Tensor(NamedTuple):
    """A view of a storage. Offset and strides are in values."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """The values of an `argparse.Namespace`."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}


BFLOAT16 = np.dtype(jnp.bfloat16)
_STORAGES = {
    f"torch {name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Long": "i8", "Int": "i4", "Short": "i2",
        "Char": "i1", "Byte": "u1", "Bool": "?",
    }.items()
} | {"torch.storage UntypedStorage": np.dtype("u1")}  # fmt: skip
_DTYPES = "float16 bfloat16 float32 float64 int8 uint8 int16 int32 int64 bool"
_ALLOWED = {
    *_STORAGES,
    *(f"torch {name}" for name in _DTYPES.split()),
    "torch Size",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "argparse Namespace",
    "pathlib PosixPath",  # in the arguments of submitit_pretrain.py (facebookresearch/mae)
    "pathlib._local PosixPath",  # its name in Python 3.13
}
_VALUES = set(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def unpickle(stream: IO[bytes], storages: dict[str, _Storage]) -> Any:
    """The value of one pickle, built of plain data, `_Global`, `_Tensor` and `_Record`.

    Adds the storages of the pickle to `storages`. Nothing that the pickle names is imported, called or changed. Raises
    Refused for an operation that is not known.
    """
    # One function, although it is long: it is one table of operations, and each case is a line or two.
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    value: Any
    for operation, value, at in pickletools.genops(stream):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name if name in _VALUES:
                stack.append(value)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(operation.name[-1]))])))
            case "MARK":
                marked.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _only(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marked.pop()
                _only(stack[-1], list).extend(items)
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, item])
            case "SETITEMS":
                items, stack = stack, marked.pop()
                _put(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_global(value))
            case "STACK_GLOBAL":
                attribute, module = _only(stack.pop(), str), _only(stack.pop(), str)
                stack.append(_global(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "REDUCE":
                values, function = _only(stack.pop(), tuple), _only(stack.pop(), _Global)
                stack.append(_result(function.name, values))
            case "NEWOBJ":
                values, kind = _only(stack.pop(), tuple), _only(stack.pop(), _Global)
                if kind.name != "argparse Namespace" or values:
                    raise Refused(f"its pickle makes an object of {kind.name}: save the state dict alone")
                stack.append(_Record())
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) is _Record:
                    _put(stack[-1].values, [item for pair in _only(state, dict).items() for item in pair])
                else:
                    _only(stack[-1], dict)  # `_metadata` of a state dict; it does not describe the tensors
            case name:
                raise Refused(f"its pickle has the operation {name} at byte {at}: save it again with torch.save")
    raise AssertionError("unreachable: genops ends with STOP or an exception")


def _only(value: Any, kind: type) -> Any:
    """The value if it has exactly this type, not a subclass. Raises Refused."""
    if type(value) is not kind:
        raise Refused(
            f"its pickle has {type(value).__name__} instead of {kind.__name__}: save it again with torch.save"
        )
    return value


def _put(target: Any, items: Sequence[Any]) -> None:
    """Adds key, value, key, value, ... to a dict. Raises Refused for keys that are not plain."""
    for key, item in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (
            str,
            int,
            float,
            bool,
            bytes,
            type(None),
        ):  # the hash of a deep tuple overflows the C stack
            raise Refused(f"its pickle has a dict key of type {type(key).__name__}: save the state dict alone")
        _only(target, dict)[key] = item


def _global(name: str) -> _Global:
    if name not in _ALLOWED:
        plain = ascii(name[:80])[1:-1].replace(" ", ".")
        raise Refused(f"its pickle refers to {plain}, which is not allowed: save the network's state dict alone")
    return _Global(name)


def _storage(id: Any, storages: dict[str, _Storage]) -> _Storage:
    """The storage of a persistent id ("storage", type, key, device, count); the old form has a None at its end."""
    if len(_only(id, tuple)) not in (5, 6) or _only(id[0], str) != "storage" or id[5:] not in ((), (None,)):
        raise Refused("its pickle refers to something that is not a storage: save it with a newer PyTorch")
    kind, key, count = _only(id[1], _Global), _only(id[2], str), _only(id[4], int)
    if kind.name not in _STORAGES or not re.fullmatch("[0-9]{1,20}", key) or not 0 <= count <= MAX_VALUES:
        raise Refused(f"its pickle has a storage {key[:20]!a} of {kind.name}: save it again with torch.save")
    storage = _Storage(key, _STORAGES[kind.name], count)
    if storages.setdefault(key, storage) != storage:
        raise Refused(f"storage {key} has two types or lengths: save it again with torch.save")
    return storage


def _result(function: str, values: tuple[Any, ...]) -> Any:
    """The result of an allowed function, as data. Raises Refused for other functions."""
    match function, len(values):
        case "collections OrderedDict", 0:
            return {}
        case "torch Size", 1:
            return _only(values[0], tuple)
        case (("pathlib PosixPath" | "pathlib._local PosixPath"), _):
            return "/".join(_only(part, str) for part in values)
        case "torch._utils _rebuild_parameter", 3:
            return _only(values[0], _Tensor)
        case ("torch._utils _rebuild_tensor", 4) | ("torch._utils _rebuild_tensor_v2", 6 | 7):
            if values[6:] not in ((), (None,), ({},)):
                raise Refused("has a conjugate or negated view: save it with .resolve_neg()")
            return _view(*values[:4])
    raise Refused(f"its pickle calls {function.replace(' ', '.')} with {len(values)} values: save the state dict alone")


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """A tensor. Raises Refused unless it lies within its storage and is no larger than the storage."""
    _only(storage, _Storage)
    numbers = [_only(n, int) for n in (offset, *_only(size, tuple), *_only(stride, tuple))]
    inside = len(size) == len(stride) <= 32 and all(0 <= n <= MAX_VALUES for n in numbers)
    if inside and 0 not in size:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        inside = last < storage.values and math.prod(size) <= storage.values
    if not inside:
        raise Refused(f"has a tensor that exceeds its storage {storage.key}: download or save it again")
    return _Tensor(storage, offset, size, stride)


def _state(value: Any, load: Callable[[_Storage], bytes], *, big: bool, length: int) -> Contents:
    """The contents of a checkpoint: its state dict, the training arguments beside it, and the names of all else.

    Args:
        value: the value of the pickle: a state dict, or a dict with one as `model`, `state_dict`, `module` or `net`.
        load: reads the bytes of a storage.
        big: whether the bytes are big-endian.
        length: bytes of the file.
    """
    arguments: dict[str, Any] = {}
    ignored: list[str] = []
    prefix = ""
    for _ in range(4):  # a dict may contain itself
        if type(value) is not dict or any(type(item) is _Tensor for item in value.values()):
            break
        inner = next((key for key in ("model", "state_dict", "module", "net") if type(value.get(key)) is dict), None)
        if inner is None:
            break
        for key in value:
            if key == inner:
                continue
            if key in ("args", "config", "hyper_parameters") and type(value[key]) in (dict, _Record):
                found = value[key] if type(value[key]) is dict else value[key].values
                arguments |= {k: v for k, v in found.items() if type(k) is str and _plain(v)}
            else:
                ignored.append(f"{prefix}{key}")
        value, prefix = value[inner], f"{prefix}{inner}."
    if type(value) is not dict:
        raise Refused("contains no state dict: save the network's state dict with torch.save")
    views = {_only(name, str): item for name, item in value.items() if type(item) is _Tensor}
    ignored += [f"{prefix}{name}" for name in value if name not in views]
    _check_total(sum(math.prod(v.size) * v.storage.dtype.itemsize for v in views.values()), length)

    flat: dict[str, np.ndarray] = {}
    tensors = {}
    for name, view in views.items():
        key, dtype = view.storage.key, view.storage.dtype
        if key not in flat:
            stored = np.dtype("u2") if dtype == BFLOAT16 else dtype
            raw = np.frombuffer(load(view.storage), stored.newbyteorder(">" if big else "<"))
            flat[key] = raw.astype(stored, copy=False).view(dtype)
        steps = [step * dtype.itemsize for step in view.stride]
        start = flat[key][view.offset :] if 0 not in view.size else flat[key][:0]
        tensors[name] = np.lib.stride_tricks.as_strided(start, view.size, steps, writeable=False)
    return Contents(tensors, arguments, sorted(ignored))


def _plain(value: Any) -> bool:
    """Whether a value is a number, text, None, or a list or tuple of these."""
    items = value if type(value) in (list, tuple) else [value]
    return all(type(item) in (bool, int, float, str, type(None)) for item in items)
