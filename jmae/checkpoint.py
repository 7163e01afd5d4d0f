"""Checkpoints that are complete and verified, or not used: `checkpoints/STAGE/STEP/`.

A step folder contains `state/` (arrays, written by orbax as OCDBT), `step.json` (step, position of the data iterator,
configuration, shape and type of every array) and `digests.json` (size and SHA-256 of every other file). Orbax alone
restores most flipped bits without an error, so every digest is checked before orbax reads the files.

This module uses orbax's synchronous `Checkpointer`. Orbax's `CheckpointManager` gives a step its final name before
digests can be added, and deletes old steps in the same call. Here everything is written to `STEP.NUMBER.tmp`, and one
rename makes the step visible. A process that is killed at any moment therefore leaves the older steps or the new one.
Orbax receives the arrays as one flat dict `{"params/encoder/kernel": array}`. The nesting (records, empty states, empty
dicts) comes from the target, so no class is named in a file or built from it.

With several processes on a shared file system, every process calls these functions with the same arguments. Process 0
alone checks, renames and deletes folders, and sends its result to the others.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jmae.errors import InputError
from jmae.outputs import LOCK
from jmae.run_folder import resuming
from jmae.sharding import device_mesh, replicated

FORMAT = 1  # format of a step folder; another number is refused
DIGESTS, ABOUT, STATE = "digests.json", "step.json", "state"
LARGEST_DIGESTS_BYTES = 2**26  # a limit, as the digests are read before anything is verified
REPLY_BYTES = 2**14  # longest reply of process 0 to the others


def save(folder: Path, step: int, state: PyTree, position: dict, *, config: dict, keep: int = 2) -> None:
    """Saves a step, waits until it is on disk, then deletes all sound steps up to it but the newest `keep`.

    Args:
        folder: `checkpoints/STAGE`; created if missing.
        step: its number. An existing step of that number is removed after the new one is complete.
        state: pytree of arrays; with several processes, of global arrays.
        position: position of the data iterator, as a JSON value that is equal in all processes.
        config: nested dict; `restore` refuses the step where the configuration differs.

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
            with _orbax() as orbax:
                orbax.save(temporary / STATE, args=ocp.args.PyTreeSave(arrays))
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
    parts: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
    brought_up: Callable[[dict], dict] = lambda saved: saved,
) -> tuple[int, PyTree, dict] | None:
    """Reads the newest sound step, or `step`: (step, state, position); None where no step was ever completed.

    Args:
        target: pytree of arrays or `jax.ShapeDtypeStruct`. It gives the nesting, and the sharding where it has one;
            otherwise arrays go to the first device, or are replicated where the run has several processes. NumPy
            leaves stay NumPy.
        config: the step is refused where its configuration differs; None: not compared.
        parts: the fields of the saved state to read, for example ("params", "stats"); the target, a dict or a record,
            then has these fields alone. None: all.
        log: receives one line for every damaged step that is skipped.
        brought_up: brings the configuration of an earlier version up to date before it is compared.

    Raises:
        InputError: no step folder is sound; the step has another configuration; or its arrays have other names, shapes
            or types than the target.
    """
    folder = Path(folder).absolute()
    name = _on_first(lambda: _choose(folder, step, log))
    if name is None:
        return None
    path = folder / name
    about = json.loads((path / ABOUT).read_text())
    leaves = _leaves(target)
    if config is not None:
        refuse_difference(path, flat(brought_up(about["config"])), flat(json.loads(json.dumps(config))))
    saved = {name: of for name, of in about["leaves"].items() if parts is None or name.split("/")[0] in parts}
    refuse_difference(path, saved, _describe(leaves))
    wanted = {name: _placement(leaf) for name, leaf in leaves.items() if np.size(leaf)}
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items() if not np.size(leaf)}
    if wanted:
        item = {name: leaves[name] for name in wanted}
        try:
            args = ocp.args.PyTreeRestore(item, restore_args=wanted, partial_restore=parts is not None)
            with _orbax() as orbax:
                arrays |= orbax.restore(path / STATE, args=args)
        except (OSError, ValueError) as error:
            cause = str(error).split("\n")[0][:200]
            raise InputError(
                f"{path}: its digests are right, but orbax {ocp.__version__} cannot read it: {cause}; "
                "remedy: the orbax version that saved it, or another step"
            ) from error
    values = [_like(leaf, arrays[name]) for name, leaf in leaves.items()]
    return about["step"], jax.tree.unflatten(jax.tree.structure(target), values), about["position"]


def configs(workdir: Path) -> Iterator[tuple[Path, dict]]:
    """(step folder, the configuration that it holds) of every step of every stage. A step whose record is damaged is
    left out: `restore` names it."""
    for stage in sorted(workdir.glob("checkpoints/*/")):
        for _, path in sorted(_find(stage).items()):
            try:
                listed = json.loads((path / DIGESTS).read_bytes())["files"][ABOUT]
                if _digests(path, [ABOUT])[ABOUT] == listed:
                    yield path, json.loads((path / ABOUT).read_bytes())["config"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue


def refuse_unfinished(folder: Path, step: int, position: dict) -> None:
    """Raises InputError where a step is not the last of its stage, which has `position["steps"]` steps."""
    if step < position.get("steps", step):
        raise InputError(
            f"{folder}: stopped at step {step} of {position['steps']}: finish it: {resuming(folder.parents[1])}"
        )


def steps(folder: Path) -> list[int]:
    """The steps, oldest first, whose files are all present with their sizes. Digests are not computed."""
    return [step for step, path in sorted(_find(Path(folder)).items()) if not _fault(path, thorough=False)]


@contextlib.contextmanager
def workdir_lock(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Locks a folder, which `flag` names, for this run. The lock ends with the process, however the process ends. Its
    file is removed at the end. A folder that was made for the lock and has no other file is removed, too.

    Raises InputError where another run has the lock; the message names its host and process.
    """
    files: list[TextIO] = []  # empty in all processes but the first
    workdir = Path(workdir)
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    _on_first(lambda: files.append(_lock(workdir, flag)))
    try:
        yield
    finally:
        for file in files:
            with contextlib.suppress(OSError):  # another process may write there by now
                if _is_at(workdir / LOCK, file):
                    (workdir / LOCK).unlink()  # before the lock ends: whoever takes it then sees that the file is gone
                if new:
                    _remove_empty(workdir, new)
            file.close()


def _remove_empty(workdir: Path, new: Sequence[Path]) -> None:
    """Removes a folder without a file, and the folders `new` around it that then hold nothing."""
    inside = list(os.walk(workdir, topdown=False))
    if not any(names for _, _, names in inside):
        for folder in (*(Path(base) for base, _, _ in inside[:-1]), *new):
            os.rmdir(folder)


# --- writing, on process 0 ---


def _make_room(folder: Path, step: int, needed: int) -> str:
    """Creates a temporary folder and returns its name. Raises OSError where the disk has no room for `needed` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporary(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
    name = f"{step}.{time.time_ns()}.tmp"  # new: after a failed save tensorstore may still write
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
    if os.path.lexists(
        final
    ):  # `_find` finds the step under the other name if the process is killed between the renames
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    _sync(folder)
    _remove(replaced)
    older = [other for other in steps(folder) if other < step]
    for other in older[: max(0, len(older) + 1 - keep)]:
        rubbish = folder / f"{other}.0.tmp"  # renamed first, so that no half step has a step's name
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
    """All paths that have a step's name, sound or not."""
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
    """Describes what is wrong with a step folder; None: nothing. `thorough` computes the digests too."""
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
    """Names of all files below `path`, with links and special files, which never match a digest."""
    return {
        os.path.relpath(os.path.join(base, name), path)
        for base, folders, names in os.walk(path)
        for name in names + [f for f in folders if os.path.islink(os.path.join(base, f))]
    }


def _digests(path: Path, names: Any) -> dict[str, dict]:
    def digest(name: str) -> dict:
        # A link or a pipe with a listed name is foreign too, and must not be followed.
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return {"bytes": os.fstat(descriptor).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    names = sorted(names)
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter lock
        return dict(zip(names, pool.map(digest, names), strict=True))


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """`{"model.width": "192"}`: leaves as JSON text, so that NaN equals NaN and 1 differs from 1.0."""
    if not isinstance(tree, dict):
        return {prefix: json.dumps(tree)}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}


def refuse_difference(
    path: Path, saved: Mapping[str, str], given: Mapping[str, str], what: str = "recipe", remedy: str = ""
) -> None:
    """Raises InputError with the first differences between what a step holds and what is given, both as of `flat`.

    Args:
        path: the step's folder.
        what: what is given.
        remedy: the remedy, where it is not another folder.
    """
    keys = [key for key in dict(saved) | dict(given) if saved.get(key) != given.get(key)]
    if keys:
        digests = {"rows": "the rows to train on differ", "images": "the images to train on differ"}
        pair = lambda key: f"{key}: checkpoint {saved.get(key, 'absent')}, {what} {given.get(key, 'absent')}"
        shown = [digests.get(key) or pair(key) for key in keys[:3]]
        more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
        other, same = ("data", "images") if set(keys) <= set(digests) else ("settings", "settings")
        folder = f"another --workdir (of quickstart another --out) or the same {same}"
        raise InputError(f"{path}: saved with other {other}: {'; '.join(shown)}{more}; remedy: {remedy or folder}")


# --- arrays ---


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax's checkpointer. Failures are raised as OSError where the system refused a call, else as ValueError."""
    # Without compression: trained float32 shrinks by 8 %, and zstd takes longer than writing those 8 %.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    try:
        with ocp.Checkpointer(handler) as orbax:
            yield orbax
    except OSError:
        raise
    except Exception as error:  # orbax wraps some errors of tensorstore in a bare Exception
        code = re.search(r"os_error_code='(\d+)'", str(error))  # how tensorstore writes an OSError
        if code is None:
            raise ValueError(str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


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
    return replicated(device_mesh())


def _placement(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _like(leaf: Any, array: Any) -> Any:
    """The restored array in the type of the target's leaf."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return array if isinstance(array, jax.Array) else jax.device_put(array, _sharding(leaf))
    return array if isinstance(leaf, np.ndarray) else type(leaf)(array[()])


# --- several processes, several runs ---


def _on_first(work: Callable[[], Any]) -> Any:
    """Runs `work` on process 0. All processes return its result, a JSON value, or raise its error."""
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


def _lock(workdir: Path, flag: str, tries: int = 5) -> TextIO:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error.strerror}): choose another {flag}") from None
    file.seek(0)
    holder = "".join(c for c in file.read(200) if c.isprintable()).strip()
    try:  # the kernel drops the lock when its process ends, so the name that a killed run leaves has no effect
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked, remedy = False, ""
    except BlockingIOError:
        locked, remedy = True, f"wait for it, stop it, or choose another {flag}"
    except OSError:  # a file system without locks: the name in the file decides
        locked, remedy = bool(holder) and not _gone(holder), f"if it no longer runs, delete {workdir / LOCK}"
    if locked:
        file.close()
        raise InputError(f"{workdir}: in use by {holder or 'another process'}: {remedy}")
    if not _is_at(workdir / LOCK, file):  # the process before ended meanwhile, and removed its file
        file.close()
        if tries > 1:
            return _lock(workdir, flag, tries - 1)
        raise InputError(f"{workdir}: its lock changes all the time: choose another {flag}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _is_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


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
