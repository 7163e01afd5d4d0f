"""Placement of states and batches over devices; models know nothing of it."""

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


def place_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Host arrays as global arrays, split over `data` along `axis`; each process gives its own part.

    Raises InputError where the batch does not divide among the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    local = mesh.shape["data"] // jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % local:
            raise InputError(
                f"a batch of {leaf.shape[axis]} is not divisible by {local} devices: use a multiple, or fewer devices"
            )
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
