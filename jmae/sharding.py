"""Devices: placement of states and batches over them, and where their compiled programs are kept.

Models know nothing of it."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jmae.errors import InputError


def device_mesh() -> Mesh:
    """All devices on the axis `data`, with the axis `fsdp` of size 1 that parameters may be split over."""
    devices = np.array(jax.devices()).reshape(-1, 1)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Every device holds its share along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def place_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Host arrays as global arrays, split over `data` along `axis`; each process gives its own part.

    Raises InputError where the batch does not divide among the devices.
    """
    sharding, local = split(mesh, axis), mesh.shape["data"] // jax.process_count()
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
