"""Checkpoints that are either complete and verified or not used: `checkpoints/STAGE/STEP/`.

A step folder holds `state/` (arrays, written by orbax as OCDBT), `step.json` (step, position of the data
iterator, configuration, shape and type of every array) and `digests.json` (size and SHA-256 of every other file).
Orbax alone restores most flipped bits without a word, so nothing is read before its digest was checked.

Orbax's low-level `Checkpointer` is used and not its `CheckpointManager`: the manager gives a step its final name
before digests can be added and deletes old steps in the same call. Here everything is written to `STEP.NUMBER.tmp`,
and one rename makes the step appear whole: a process killed at any moment leaves the older steps or the new one.
The arrays go to orbax as one flat dict `{"params/encoder/kernel": array}`; the nesting (NamedTuples, empty states,
empty dicts) comes from the target, so that no class is ever named in, or built from, a file.

With several processes (`jax.distributed`, shared file system) every process calls these functions with the same
arguments; process 0 alone looks at, checks, renames and deletes folders, and tells the others what it found.
"""

import contextlib
import fcntl
import gc
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jmae.errors import InputError

PyTree = Any
FORMAT = 1  # of a step folder; another number is refused
DIGESTS, ABOUT, STATE, LOCK = "digests.json", "step.json", "state", ".lock"
LARGEST_DIGESTS_BYTES = 2**26  # read before anything is verified
REPLY_BYTES = 2**14


def save(folder: Path, step: int, state: PyTree, position: dict, *, config: dict, keep: int = 2) -> None:
    """Saves a step and then deletes all but the `keep` newest sound steps up to it; returns when it is on disk.

    Args:
        folder: `checkpoints/STAGE`; made if missing.
        step: an existing step of that number is replaced, but removed only after the new one is complete.
        state: pytree of arrays; with several processes, of global arrays.
        position: of the data iterator; anything that JSON can hold, the same on every process.
        config: nested dict; `restore` refuses the step under another one.

    Raises:
        InputError: the disk is full or not writable; older steps are as they were.
    """
    if keep < 1:
        raise InputError(f"checkpoints to keep: {keep}, expected 1 or more")
    folder = Path(folder).absolute()
    leaves = _leaves(state)
    about = {"step": step, "position": position, "config": config, "leaves": _describe(leaves)}
    arrays = {name: _array(leaf) for name, leaf in leaves.items() if np.size(leaf)}
    needed = sum(array.nbytes + 1024 for array in arrays.values())
    try:
        temporary = folder / _on_first(lambda: _make_room(folder, step, needed))
        if arrays:
            _orbax(lambda orbax: orbax.save(temporary / STATE, args=ocp.args.PyTreeSave(arrays)))
        _on_first(lambda: _commit(folder, step, temporary, about, keep))
    except OSError as error:
        if jax.process_index() == 0:
            _remove_temporary(folder)
        raise InputError(
            f"{folder / str(step)}: not saved: {error.strerror or error}; older steps are intact: free some space "
            "(or choose another --workdir) and run the same command again"
        ) from error


def restore(
    folder: Path,
    target: PyTree,
    *,
    config: dict | None,
    step: int | None = None,
    log: Callable[[str], None] = print,
) -> tuple[int, PyTree, dict] | None:
    """The newest sound step (or `step`) as (step, state, position); None where no step was ever completed.

    Args:
        target: pytree of arrays or `jax.ShapeDtypeStruct`; gives the nesting, and the sharding where it has one
            (the first device otherwise; replicated, with several processes). NumPy leaves stay NumPy.
        config: refused where it differs from the saved one; None: not compared.
        log: receives one line for every step that is damaged and passed over.

    Raises:
        InputError: there are step folders but none is sound; the step is of another configuration, or its arrays
            have other names, shapes or types than the target.
    """
    folder = Path(folder).absolute()
    name = _on_first(lambda: _choose(folder, step, log))
    if name is None:
        return None
    path = folder / name
    about = json.loads((path / ABOUT).read_text())
    leaves = _leaves(target)
    if config is not None:
        _refuse_difference(path, _flat(about["config"]), _flat(json.loads(json.dumps(config))))
    _refuse_difference(path, about["leaves"], _describe(leaves))
    wanted = {name: _placement(leaf) for name, leaf in leaves.items() if np.size(leaf)}
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items() if not np.size(leaf)}
    if wanted:
        item = {name: leaves[name] for name in wanted}
        try:
            args = ocp.args.PyTreeRestore(item, restore_args=wanted)
            arrays |= _orbax(lambda orbax: orbax.restore(path / STATE, args=args))
        except (OSError, ValueError) as error:
            cause = str(error).split("\n")[0][:200]
            raise InputError(
                f"{path}: intact, but orbax {ocp.__version__} cannot read it: {cause}; "
                "remedy: the orbax version that saved it, or another step"
            ) from error
    values = [_like(leaf, arrays[name]) for name, leaf in leaves.items()]
    return about["step"], jax.tree.unflatten(jax.tree.structure(target), values), about["position"]


def refuse_unfinished(folder: Path, step: int, position: dict) -> None:
    """Raises InputError where a step is not its stage's last, as `position["steps"]` tells."""
    if step < position.get("steps", step):
        raise InputError(
            f"{folder}: stopped at step {step} of {position['steps']}: run its training command again to finish it"
        )


def steps(folder: Path) -> list[int]:
    """The steps that look sound (every listed file there in its size, digests not computed), oldest first."""
    return [step for step, path in sorted(_find(Path(folder)).items()) if not _fault(path, thorough=False)]


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Holds `workdir` for this run; the lock vanishes with the process, however that ends.

    Raises:
        InputError: another run holds it; names its host and process.
    """
    files: list[TextIO] = []  # stays empty on all processes but the first
    _on_first(lambda: files.append(_lock(Path(workdir))))
    try:
        yield
    finally:
        for file in files:
            file.truncate(0)
            file.close()


# --- writing, on process 0 ---


def _make_room(folder: Path, step: int, needed: int) -> str:
    """Name of a new temporary folder; fails early where the disk cannot hold `needed` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporary(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
    name = f"{step}.{time.time_ns()}.tmp"  # after a failed save tensorstore may still write into the old one
    (folder / name).mkdir()
    return name


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        if re.fullmatch(r"[0-9]+\.[0-9]+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _commit(folder: Path, step: int, temporary: Path, about: dict, keep: int) -> None:
    final, replaced = folder / str(step), folder / f"{step}.replaced"
    (temporary / ABOUT).write_text(_dumps(about))
    for name in _files(temporary):
        _sync(temporary / name)
    (temporary / DIGESTS).write_text(_dumps({"format": FORMAT, "files": _digests(temporary, _files(temporary))}))
    for path in [temporary / DIGESTS, *(Path(base) for base, _, _ in os.walk(temporary))]:
        _sync(path)
    if os.path.lexists(final):  # `_find` knows the other name, should the process be killed between the renames
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    _sync(folder)
    _remove(replaced)
    older = [other for other in steps(folder) if other < step]
    for other in older[: max(0, len(older) + 1 - keep)]:
        rubbish = folder / f"{other}.0.tmp"  # renamed first: half a step never stands under a step's name
        _find(folder)[other].rename(rubbish)
        _remove_temporary(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


# --- checking, on process 0 ---


def _find(folder: Path) -> dict[int, Path]:
    """Everything that has a step's name, sound or not."""
    found: dict[int, Path] = {}
    try:
        for name in sorted(os.listdir(folder)):  # STEP sorts before STEP.replaced
            if match := re.fullmatch(r"(0|[1-9][0-9]{0,17})(\.replaced)?", name):
                found.setdefault(int(match[1]), folder / name)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}: check the path and its rights") from error
    return found


def _choose(folder: Path, step: int | None, log: Callable[[str], None]) -> str | None:
    found = _find(folder)
    if step is not None and step not in found:
        raise InputError(f"{folder}: no step {step}; there are {sorted(found) or 'none'}")
    faults = []
    for number in sorted(found, reverse=True) if step is None else [step]:
        fault = _fault(found[number], thorough=True)
        if fault is None:
            return found[number].name
        faults.append(f"{found[number]}: step not used: {fault}")
        log(faults[-1])
    if faults:
        raise InputError(
            f"{folder}: no sound step to continue from ({faults[0]}); restore the folder from a backup, "
            "or delete it to start again from step 0"
        )
    return None


def _fault(path: Path, *, thorough: bool) -> str | None:
    """What is wrong with a step folder, in words; `thorough` computes the digests as well."""
    if path.is_symlink() or not path.is_dir():
        return "not a folder"
    try:
        there = _files(path)
        if DIGESTS not in there:
            return f"no {DIGESTS}: saving was interrupted" if there else "empty"
        if (path / DIGESTS).stat().st_size > LARGEST_DIGESTS_BYTES:
            return f"{DIGESTS} is damaged"
        text = (path / DIGESTS).read_bytes().decode()
        listed = json.loads(text)
        if listed["format"] != FORMAT:
            return f"{DIGESTS} has format {listed['format']!r}, expected {FORMAT}"
        files = listed["files"]
        if text != _dumps(listed) or not all(type(entry) is dict for entry in files.values()):
            return f"{DIGESTS} is damaged"
        for name in sorted(files.keys() ^ (there - {DIGESTS})):
            return f"{name!r} is {'missing' if name in files else 'foreign'}"
        for name, entry in files.items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name!r} has {size} bytes, expected {entry['bytes']}"
        if thorough:
            for name, entry in _digests(path, files).items():
                if entry != files[name]:
                    return f"{name!r} is damaged: its SHA-256 differs"
        if (number := json.loads((path / ABOUT).read_text())["step"]) != int(path.name.split(".")[0]):
            return f"a copy of step {number!r}"
    except OSError as error:
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{DIGESTS} or {ABOUT} is damaged"
    return None


def _files(path: Path) -> set[str]:
    """Names of all files below, links and special files included (these never match a digest)."""
    return {
        os.path.relpath(os.path.join(base, name), path)
        for base, folders, names in os.walk(path)
        for name in names + [f for f in folders if os.path.islink(os.path.join(base, f))]
    }


def _digests(path: Path, names: Any) -> dict[str, dict]:
    def digest(name: str) -> dict:
        # A link or a pipe with a listed name is as foreign as any other file, and must not be followed.
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return {"bytes": os.fstat(descriptor).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    names = sorted(names)
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter lock
        return dict(zip(names, pool.map(digest, names), strict=True))


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """`{"model.width": "192"}`: leaves as JSON text, so that NaN equals NaN and 1 is not 1.0."""
    if not isinstance(tree, dict):
        return {prefix: json.dumps(tree)}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _refuse_difference(path: Path, saved: dict[str, str], given: dict[str, str]) -> None:
    keys = [key for key in saved | given if saved.get(key) != given.get(key)]
    if keys:
        shown = [f"{k}: checkpoint {saved.get(k, 'absent')}, recipe {given.get(k, 'absent')}" for k in keys[:3]]
        more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise InputError(
            f"{path}: saved by another configuration: {'; '.join(shown)}{more}; "
            "remedy: another --workdir or the same settings"
        )


# --- arrays ---


def _orbax(work: Callable[[ocp.Checkpointer], Any]) -> Any:
    """Runs `work`; what fails in orbax is raised once, as an OSError where the system refused, else a ValueError.

    Left alone, orbax, asyncio and tensorstore print a failed call again for every array and thread, some of it
    after the call has ended. So its threads are waited for, and its unfinished coroutines collected as tensorstore lets
    go of them, while their reports are muted; the original exception is not chained, as its traceback would keep those
    coroutines alive.
    """
    # Without compression: trained float32 shrinks by 8 %, and zstd takes longer than writing those 8 %.
    orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))
    levels = [(logger, logger.level) for logger in map(logging.getLogger, ("absl", "asyncio"))]
    hook, threads = sys.unraisablehook, set(threading.enumerate())
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None
        try:
            return work(orbax)
        except Exception as error:  # orbax wraps some of tensorstore's errors in a bare Exception
            code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's form of an OSError
            number = int(code[1]) if code else error.errno if isinstance(error, OSError) else None
            failure = ValueError(str(error)) if number is None else OSError(number, os.strerror(number))
        for thread in set(threading.enumerate()) - threads:
            with contextlib.suppress(Exception):  # orbax's threads raise their own error again when joined
                thread.join(60)
        until = time.monotonic() + 60
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # coroutines that were never started
            while _unfinished() and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        sys.unraisablehook = hook
        for logger, level in levels:
            logger.setLevel(level)
    raise failure


def _unfinished() -> bool:
    """Whether a coroutine of orbax is still waiting for a read or a write."""
    gc.collect()
    return any(inspect.iscoroutine(x) and "orbax" in x.cr_code.co_filename for x in gc.get_objects())


def _leaves(tree: PyTree) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same name: a key of a dict contains '/'")
    return leaves


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{_array(leaf).dtype}{list(np.shape(leaf))}" for name, leaf in leaves.items()}


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    if leaf.sharding is not None:
        return leaf.sharding
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _placement(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _like(leaf: Any, array: Any) -> Any:
    """The restored array as the kind of thing that the target's leaf is."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return array if isinstance(array, jax.Array) else jax.device_put(array, _sharding(leaf))
    return array if isinstance(leaf, np.ndarray) else type(leaf)(array[()])


# --- several processes, several runs ---


def _on_first(work: Callable[[], Any]) -> Any:
    """Runs `work` on process 0; all processes return its result (JSON), or fail with it instead of waiting for it."""
    if jax.process_count() == 1:
        return work()
    failure, reply = None, {}
    if jax.process_index() == 0:
        try:
            reply = {"result": work()}
        except Exception as error:
            failure, reply = error, {"error": str(error)[: REPLY_BYTES // 8], "system": isinstance(error, OSError)}
    text = json.dumps(reply).encode().ljust(REPLY_BYTES)
    text = bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8)))
    if failure is not None:
        raise failure
    reply = json.loads(text)
    if "error" in reply:
        raise (OSError if reply["system"] else InputError)(reply["error"])
    return reply["result"]


def _lock(workdir: Path) -> TextIO:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+")
    except OSError as error:
        raise InputError(f"{workdir}: no run folder ({error.strerror}): choose another --workdir") from None
    file.seek(0)
    holder = file.read(200).strip()
    try:  # the kernel drops the lock when its holder ends, so a name left in the file by a killed run means nothing
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, remedy = False, ""
    except BlockingIOError:
        held, remedy = True, "wait for it, stop it, or choose another --workdir"
    except OSError:  # a file system without locks: the name decides
        held, remedy = bool(holder) and not _gone(holder), f"if it no longer runs, delete {workdir / LOCK}"
    if held:
        file.close()
        raise InputError(f"{workdir}: in use by {holder or 'another process'}: {remedy}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _gone(holder: str) -> bool:
    match = re.fullmatch(r"process ([0-9]{1,9}) on (.*)", holder)
    if not match or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
