"""Meshes of devices, and the placement of states and batches on them.

A mesh has two axes, `data` and `fsdp`. Samples are split over both. Large parameters and their optimiser states are
split over `fsdp` alone. Networks state only that their samples are split (`over_samples`, `on_each_device`); the
compiler derives the communication from the placement.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from jmae.errors import InputError

AXES = ("data", "fsdp")
SPLIT_FROM = 2**14  # numbers in an array; a smaller one costs more to gather than to replicate
BY_SAMPLE = PartitionSpec(AXES)
DEVICES = "devices"  # the axis of a step under jax.pmap


def device_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `data` x `fsdp` of all devices of the run, or of `devices`.

    Raises InputError where `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp={fsdp} does not divide {len(devices)} devices: set it to one of their divisors")
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((len(devices) // fsdp, fsdp), AXES, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array that is split over all devices along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def sharded(mesh: Mesh, tree: PyTree) -> PyTree:
    """A NamedSharding for each array, or shape, in a tree of parameters or optimiser states.

    An array of `SPLIT_FROM` numbers or more is split over `fsdp` along its longest axis that `fsdp` divides; of equal
    axes, the last. All other arrays are replicated.
    """
    size = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or math.prod(leaf.shape) < SPLIT_FROM:
            return replicated(mesh)
        axis = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(place, tree)


def inside_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Wraps the function of a compiled program so that the networks in it see the mesh while they are traced."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return function if mesh.size == 1 else wrapped


def over_samples(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wraps a function (samples, ...) -> (samples, ...) whose argument and result are split over samples alone.

    Transformer blocks and convolution stages use this function. Without it the compiler, which sees weights that are
    split over `fsdp`, also splits channels, and then sends activations between devices instead of weights. The wrapper
    changes nothing outside a step of several devices, or where the number of samples is not divisible by theirs.
    """
    constrain = lambda x: jax.lax.with_sharding_constraint(x, BY_SAMPLE) if divides(x) else x

    @wraps(function, updated=())
    def wrapped(x: jax.Array, *more: Any, **options: Any) -> jax.Array:
        return constrain(function(constrain(x), *more, **options))

    return wrapped


def on_each_device(
    function: Callable[..., Any], axes: Sequence[int | None] | int = 0, out: Any = 0
) -> Callable[..., Any]:
    """Wraps a function of arrays of samples so that each device applies it to its own samples.

    A loop over samples in the function then has one device's samples only. The wrapper changes nothing outside a step
    of several devices, or where the number of samples is not divisible by theirs.

    Args:
        axes: the samples' axis in all arguments, or a list with the axis in each; None: all devices share the argument.
        out: the samples' axis in the result, or a tree with the axis in each result.
    """
    spec = lambda axis: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, *BY_SAMPLE)

    def wrapped(x: jax.Array, *more: jax.Array | None) -> Any:
        axis_of = [axes] * (1 + len(more)) if isinstance(axes, int) else axes
        if not divides(x, axis_of[0] or 0):
            return function(x, *more)
        specs = tuple(map(spec, axis_of))
        return jax.shard_map(function, in_specs=specs, out_specs=jax.tree.map(spec, out), check_vma=False)(x, *more)

    return wrapped


def divides(x: jax.Array, axis: int = 0) -> bool:
    """Whether the trace is inside a step of several devices whose number divides the samples along `axis` of x.

    False under `pmap`, whose mesh has another axis, and inside `on_each_device`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == AXES and not mesh.manual_axes and x.shape[axis] % mesh.size == 0


def device_mean(tree: PyTree) -> PyTree:
    """The mean of a tree over the devices of a step under `jax.pmap` (axis `DEVICES`); elsewhere the tree itself.

    A step that calls this on its gradients, statistics and metrics runs on one device, on a mesh, and under `pmap`.
    """
    return jax.lax.pmean(tree, DEVICES) if _mapped() else tree


def device_gather(tree: PyTree) -> PyTree:
    """Arrays (b, ...) of each device of a step under `jax.pmap`, joined to those of the whole batch in its order;
    elsewhere the tree itself."""
    return jax.lax.all_gather(tree, DEVICES, tiled=True) if _mapped() else tree


def device_number() -> Int[Array, ""] | int:
    """The number of this device in a step under `jax.pmap`; elsewhere 0."""
    return jax.lax.axis_index(DEVICES) if _mapped() else 0


def _mapped() -> bool:
    return DEVICES in jax.sharding.get_abstract_mesh().manual_axes


def over_devices(step: Callable[..., Any]) -> Callable[..., Any]:
    """A stage's step under `jax.pmap`: (state, batches, key, results) -> (state, metrics) with a leading device axis.

    `batches` has the devices first, (devices, b / devices, ...); state, key and results are the same on all devices.
    Flax's own batch norm normalises each device's samples by themselves; its running statistics are those of all.
    """
    return jax.pmap(step, axis_name=DEVICES, in_axes=(None, 0, None, None))


def place_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Host arrays as global arrays that are split over all devices along `axis`. Each process passes its own part.

    Raises InputError where the batch is not divisible by the number of devices.
    """
    sharding, local = split(mesh, axis), mesh.size // jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % local:
            raise InputError(
                f"a batch of {leaf.shape[axis]} is not divisible by {local} devices: use a multiple, or fewer devices"
            )
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def place_whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays, equal in all processes, as global arrays that are replicated on all devices."""
    whole = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(whole, np.asarray(leaf)), tree)


def on_host(tree: PyTree) -> PyTree:
    """Global arrays as whole host arrays. Every process must call this function with the same tree."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(device_mesh()))(tree)
    return jax.device_get(tree)
