"""Devices: placement of states and batches over them, and where their compiled programs are kept.

Models know nothing of it."""

import hashlib
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jmae.errors import InputError

SPLIT_FROM = 2**14  # numbers: what is smaller costs more to gather than to hold


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
