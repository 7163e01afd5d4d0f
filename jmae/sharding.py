"""Devices and processes: placement of states and batches over them, and where their compiled programs are kept.

Models say of their arrays only that samples are split (`over_samples`, `on_each_device`). A run of several processes,
one a host or a device, is started by setting in each of them JAX_COORDINATOR_ADDRESS (HOST:PORT of the first),
JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...); in a step of SLURM (srun) or Open MPI (mpirun) of several tasks, JAX
finds these by itself; on TPU pods where JAX_NUM_PROCESSES=auto."""

import ctypes
import hashlib
import operator
import os
import pickle
import platform
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jmae.errors import InputError, exit_code

SPLIT_FROM = 2**14  # numbers: what is smaller costs more to gather than to hold
BY_SAMPLE = PartitionSpec(("data", "fsdp"))
KEPT: list[Any] = []  # what native code calls lives as long as the process
PIECE = 2**28  # bytes that processes exchange at a time
HEARTBEAT = 30  # seconds without one, after which a process counts as dead
START = 300  # seconds in which all processes of a run must have started
AGAIN = "what was saved is kept: start all processes again to go on"
LOST = f"another process of this run has ended, or is not reached: {AGAIN}"
ABORTED = f"either another process of this run has ended, or JAX itself failed (--debug shows its words): {AGAIN}"
APART = f"the processes of this run did not find each other in {START} seconds: start all, with the same address"


def device_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) on the axes `data` x `fsdp`: batches are split over both, parameters and
    optimiser state over `fsdp`.

    Raises InputError where `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp={fsdp} does not divide {len(devices)} devices: set it to one of their divisors")
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Every device holds its share along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def sharded(mesh: Mesh, tree: PyTree) -> PyTree:
    """A NamedSharding for each array (or shape) of a tree of parameters or optimiser state. One rule: an array of
    `SPLIT_FROM` numbers or more is split over `fsdp` along the longest axis that it divides, the last of equals; all
    others, keys and steps are whole on every device."""
    size = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < SPLIT_FROM:
            return replicated(mesh)
        axis = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(place, tree)


def inside_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A function of a program for a mesh, in which networks see that several devices share the samples."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return function if mesh.size == 1 else wrapped


def over_samples(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function (samples, ...) -> samples of which, inside a step of several devices, argument and result have their
    first axis split over all of them, and nothing else of them, where it divides. Transformers' blocks and U-Nets'
    convolutions are such; else the compiler, which sees weights split over `fsdp`, splits channels too and sends
    activations around instead of weights."""
    split = lambda x: jax.lax.with_sharding_constraint(x, BY_SAMPLE) if divides(x) else x

    @wraps(function, updated=())
    def over(x: jax.Array, *more: Any, **options: Any) -> jax.Array:
        return split(function(split(x), *more, **options))

    return over


def on_each_device(
    function: Callable[..., Any], axes: Sequence[int | None] | int = 0, out: Any = 0
) -> Callable[..., Any]:
    """A function of arrays of samples, for each device's own samples inside a step of several devices: its loops over
    samples are not loops over those of all devices.

    `axes` are the samples' axes in the arguments (one for all, or one each; None: an argument that all devices share).
    `out` is their axis in the result, or in each of several results.
    """
    spec = lambda axis: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, *BY_SAMPLE)

    def each(*arrays: jax.Array) -> Any:
        own = [axes] * len(arrays) if isinstance(axes, int) else axes
        if not divides(arrays[0], own[0] or 0):
            return function(*arrays)
        specs = tuple(map(spec, own))
        return jax.shard_map(function, in_specs=specs, out_specs=jax.tree.map(spec, out), check_vma=False)(*arrays)

    return each


def divides(x: jax.Array, axis: int = 0) -> bool:
    """Whether this is inside a step of several devices (not of `pmap`, whose mesh has its own axis) that divide the
    samples, which lie along `axis`; not inside the part of such a step that each device runs for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == ("data", "fsdp") and not mesh.manual_axes and x.shape[axis] % mesh.size == 0


def place_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Host arrays as global arrays, split over all devices along `axis`; each process gives its own part.

    Raises InputError where the batch does not divide among the devices.
    """
    sharding, local = split(mesh, axis), mesh.size // jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % local:
            raise InputError(
                f"a batch of {leaf.shape[axis]} is not divisible by {local} devices: use a multiple, or fewer devices"
            )
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def place_whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays, the same in every process, as global arrays that every device holds whole."""
    whole = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(whole, np.asarray(leaf)), tree)


def on_host(tree: PyTree) -> PyTree:
    """Arrays whole on the host, also those that other processes hold parts of; every process must call it."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(device_mesh()))(tree)
    return jax.device_get(tree)


# --- several processes ------------------------------------------------------------------------------------------------


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes of this run, where it was started as several, and leaves them when all are done. The end of
    one without the others, however it comes, ends these too, with one line and exit code 2: at once where they wait for
    it in a collective operation of the CPU, or it is the first, else after `HEARTBEAT` seconds. What native code writes
    to standard error is shown with --debug alone.

    Raises InputError where the processes do not find each other.
    """
    tasks = max(int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    number = os.environ.get("JAX_NUM_PROCESSES") or ("auto" if tasks > 1 else "1")
    if number == "1" or jax.distributed.is_initialized():
        yield
        return
    join(number)
    try:
        yield
        multihost_utils.sync_global_devices("done")
        jax.distributed.shutdown()
    except BaseException as error:
        leave(InputError(f"{LOST}: {str(error).strip().splitlines()[0]}") if lost(error) else error)


def leave(error: BaseException) -> NoReturn:
    """Says what went wrong and ends this process; the first one last, as the others lose their connection with it. The
    runtime cannot be left in an orderly way: it would wait for all."""

    def fail(_: list[str]) -> int:
        raise error

    try:
        code = exit_code(fail)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if not str(error).startswith(LOST):  # the others may say the same of themselves
        number = os.environ.get("JAX_PROCESS_ID") or (jax.distributed.is_initialized() and jax.process_index())
        time.sleep(3 if int(number) == 0 else 1)
    os._exit(code)


def join(number: str) -> None:
    """Joins `number` processes; "auto": as many as JAX finds."""
    given: dict[str, Any] = {}
    if number != "auto":
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise InputError(f"several processes need {', '.join(names)}: {missing[0]} is not set")
        address, *numbers = (os.environ[name] for name in names)
        if not all(n.isdecimal() for n in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise InputError(f"JAX_NUM_PROCESSES={numbers[0]}, JAX_PROCESS_ID={numbers[1]}: a number and one below it")
        given = {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    # SIGTERM is the commands' own (`train.signals`), not that service's.
    jax.config.update("jax_enable_preemption_service", False)
    say = on_abort()
    say(APART)
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=START)
    except (RuntimeError, ValueError, OSError) as error:
        leave(InputError(f"the processes of this run did not find each other: {str(error).splitlines()[0]}"))
    say(ABORTED)


def on_abort() -> Callable[[str], None]:
    """Gives a function that sets the one line that is said, with exit code 2, where JAX's runtime aborts this process,
    as it does when another one is gone: it has no callback for that. Its own page, and all else that native code writes
    to standard error, is left out without --debug."""
    sys.stderr, line = os.fdopen(os.dup(2), "w", buffering=1), [""]
    if "--debug" not in sys.argv:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def ended(_: int) -> None:
        os.write(sys.stderr.fileno(), f"{line[0]}\n".encode())
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(ended)  # Python's own handlers run too late
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    KEPT.append(handler)
    return partial(operator.setitem, line, 0)


def lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    return jax.process_count() > 1 and bool(re.search("Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|coordination", str(error)))


def of_all(value: Any) -> list[Any]:
    """What every process gives, arrays in containers, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    own = pickle.dumps(value)
    # Numbers of 32 bits, and lengths of powers of two, as each new one is a compilation.
    told = multihost_utils.process_allgather(np.array(divmod(len(own), PIECE), np.int32))
    sizes = [wholes * PIECE + rest for wholes, rest in told.tolist()]
    pieces = []
    for start in range(0, max(sizes), PIECE):
        length = min(1 << (max(sizes) - start - 1).bit_length(), PIECE)
        piece = own[start : start + length].ljust(length, b"\0")
        pieces.append(multihost_utils.process_allgather(np.frombuffer(piece, np.uint8)))
    return [pickle.loads(b"".join(each)[:size]) for each, size in zip(zip(*pieces, strict=True), sizes, strict=True)]


def agreement() -> Callable[[int, bool], int]:
    """Gives a function (number, now) -> the largest number that any process gave it one call before, or, `now`, up to
    this call: the same in every process, and none waits for the step that it has just begun."""
    mesh, told = device_mesh(), [jnp.int32(0)]
    largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def agreed(number: int, now: bool) -> int:
        mine = np.full(jax.local_device_count(), number, np.int32)
        told.append(largest(place_batch(mine, mesh)))
        return int(told[-1] if now else told.pop(0))

    return agreed


def keep_compiled() -> None:
    """Keeps compiled programs in ~/.cache/jmae between runs: a continued run starts in seconds.

    A folder of its own for each kind of processor, as homes are shared in clusters. JAX's own settings go first; where
    the folder cannot be made or written, nothing is kept.
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
        # An entry torn by a kill, or a full disk, costs a compilation and is no news.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
        jax.config.update("jax_compilation_cache_dir", str(folder))
