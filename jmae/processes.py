"""Runs of several processes, one for each host or device: how they join, exchange values and end.

Each process of such a run has the environment variables JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process),
JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...). JAX finds these values itself in a SLURM step (srun) or Open MPI run
(mpirun) of several tasks, and on TPU pods where JAX_NUM_PROCESSES=auto.

The processes end together. An error that Python sees is one line on standard error, with exit code 2: an input error
in this process, or a collective operation that failed because another process has ended. JAX's runtime also watches
the other processes by heartbeats. When it misses one, it prints its own report and aborts this process, with SIGABRT
(exit code 134 in a shell); Python cannot catch that. In both cases the last checkpoint is complete, and the same
command, started in all processes, continues from it.
"""

import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jmae.errors import InputError
from jmae.sharding import device_mesh, place_batch, replicated

HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this time counts as dead
START_SECONDS = 300  # all processes of a run must have started within this time
END_SECONDS = 30  # a process that ends with an error waits this long for the others to end too
LOST = "another process of this run has ended or cannot be reached: start all processes again to continue"


@contextmanager
def join_processes() -> Iterator[None]:
    """Joins the processes of this run where it was started as several; leaves them when all have finished.

    Raises InputError where the processes do not find each other, or where a collective operation inside failed because
    another process has ended.
    """
    tasks = max(int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    number = os.environ.get("JAX_NUM_PROCESSES") or ("auto" if tasks > 1 else "1")
    if number == "1" or jax.distributed.is_initialized():
        yield
        return
    join(number)
    try:
        yield
        # The first process may still write results; the shutdown itself would not wait so long.
        multihost_utils.sync_global_devices("done")
    except Exception as error:
        if process_lost(error):
            raise InputError(f"{LOST}: {str(error).strip().splitlines()[0]}") from error
        raise


def join(number: str) -> None:
    """Joins `number` processes; "auto": as many as JAX finds. JAX leaves them at the end of this process."""
    places: dict[str, Any] = {}
    if number != "auto":
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise InputError(f"several processes need {', '.join(names)}: {missing[0]} is not set")
        address, *numbers = (os.environ[name] for name in names)
        if not all(n.isdecimal() for n in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise InputError(
                f"JAX_NUM_PROCESSES={numbers[0]}, JAX_PROCESS_ID={numbers[1]}: write a number, and one below it"
            )
        places = {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    # The preemption service would take SIGTERM, which the commands handle themselves (`progress.signals`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **places,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"the processes of this run did not find each other: {str(error).splitlines()[0]}") from error


def process_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    return jax.process_count() > 1 and bool(re.search("Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|coordination", str(error)))


def gather(tree: PyTree) -> list[PyTree]:
    """The trees of all processes as host arrays, in the order of the processes.

    Every process must call this function with a tree of one structure, whose arrays have the same types and ranks in
    all processes; their shapes may differ. Raises TypeError for an array that JAX would store in another type.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    if jax.process_count() == 1:
        return [jax.tree.unflatten(structure, leaves)]
    shapes = multihost_utils.process_allgather([np.array(leaf.shape, np.int32) for leaf in leaves])
    columns = [gather_array(leaf, each.tolist()) for leaf, each in zip(leaves, shapes, strict=True)]
    return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


def gather_array(array: np.ndarray, shapes: list[list[int]]) -> list[np.ndarray]:
    """The arrays of all processes, whose shapes are known."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise TypeError(f"processes cannot exchange {array.dtype}: convert it to 32 bits or less")
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    # Every new length is compiled, so lengths are rounded up to powers of two.
    flat = np.zeros(1 << max(max(sizes) - 1, 0).bit_length(), array.dtype)
    flat[: array.size] = array.ravel()
    rows = multihost_utils.process_allgather(flat)
    return [row[:size].reshape(shape) for row, size, shape in zip(rows, sizes, shapes, strict=True)]


def agreement() -> Callable[[int, bool], int]:
    """Gives a function (number, now) -> the largest number that any process has passed to it.

    The result is the same in every process. It covers the calls up to the one before, so that no process waits for the
    step that it has just started; with `now`, it covers this call too.
    """
    mesh, results = device_mesh(), [jnp.int32(0)]
    largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def agree(number: int, now: bool) -> int:
        numbers = np.full(jax.local_device_count(), number, np.int32)
        results.append(largest(place_batch(numbers, mesh)))
        return int(results[-1] if now else results.pop(0))

    return agree


def keep_compiled() -> None:
    """Stores compiled programs in ~/.cache/jmae, so that a continued run starts in seconds.

    Each kind of processor has its own folder there, as clusters share home folders. JAX's own settings take precedence.
    Nothing is stored where the folder cannot be written.
    """
    if jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    name = hashlib.sha256("\n".join([platform.machine(), platform.processor(), *sorted(kind)]).encode()).hexdigest()[:8]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jmae" / f"programs-{name}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return
    if os.access(folder, os.W_OK):
        # A damaged entry, or a full disk, costs one more compilation and needs no action.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
        jax.config.update("jax_compilation_cache_dir", str(folder))
