"""The compiled programs of training: a stage's first state, its step, several steps, its checks.

Several seeds are replicates of one program (`side_by_side`). On a mesh of several devices the state stays placed.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree
from ml_collections import ConfigDict

from jmae.data.crops import cut
from jmae.errors import InputError
from jmae.sharding import inside_mesh, replicated, sharded
from jmae.system import Check, Results, Stage, State, trained_shape
from jmae.target import target

MOST_STEPS = 16  # of a dispatch that the loop chooses
MOST_BYTES = 2**26  # images of such a dispatch, on a device


def compiled_init(stage: Stage, rows: int, n: int, mesh: Mesh) -> Callable[[Any, Results], State]:
    """The program (keys, results) -> a stage's first state for so many rows and `n` replicates, placed on the mesh.

    It runs once. For a CPU it is therefore compiled with less effort, in about half the time, to the same numbers.
    """

    def one(key: Any, results: Results) -> State:
        return stage.init(key, results, rows)

    def whole(key: Any, results: Results) -> State:
        return placed((one if n == 1 else jax.vmap(one))(key, results), mesh)

    less = target().platform == "cpu" and not jax.config.values["jax_disable_most_optimizations"]
    return jax.jit(whole, compiler_options={"xla_backend_optimization_level": 1} if less else None)


def compiled_step(
    step: Callable, steps: int, n: int, crop: tuple[int, ...] = (), mesh: Mesh | None = None, phase: Any = None
) -> Callable:
    """The program (state, batch, keys, results, volumes) -> (state, metrics) of one step of a stage.

    Args:
        step: the stage's step.
        steps: number of the stage's steps.
        n: number of replicates.
        crop: edges of the crops that are first cut from `volumes`, which live on the device; (): none.
        mesh: where the state stays placed; every device has the metrics.
        phase: the phase that the step is compiled for; None: the stage has no phases.
    """
    return jax.jit(one_step(step, steps, n, crop, mesh, phase), donate_argnums=0)


def compiled_steps(
    step: Callable,
    steps: int,
    n: int,
    crop: tuple[int, ...],
    mesh: Mesh | None,
    phases: tuple[Any, ...],
    length: int,
) -> Callable:
    """`length` steps as one program, a loop on the device. Its first step is of the first phase. Batches and metrics
    have a leading axis of that length.

    A GPU launches as many kernels as for single steps. The loop saves the host's work between steps. XLA can record a
    loop as one CUDA graph: XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE asks for it. The compiler accepts that, but
    nobody has tried it on a GPU, so it is off.
    """
    each = [one_step(step, steps, n, crop, mesh, phase) for phase in phases]

    def several(
        state: State, batches: PyTree, key: Any, results: Results, volumes: Any = None
    ) -> tuple[State, dict[str, Array]]:
        def cycle(state: State, some: PyTree) -> tuple[State, dict]:
            found = []
            for i, one in enumerate(each):
                state, metrics = one(state, jax.tree.map(lambda x, i=i: x[i], some), key, results, volumes)
                found.append(metrics)
            return state, jax.tree.map(lambda *values: jnp.stack(values), *found)

        cycles = jax.tree.map(lambda x: x.reshape(length // len(each), len(each), *x.shape[1:]), batches)
        state, metrics = jax.lax.scan(cycle, state, cycles)
        return state, jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), metrics)

    return jax.jit(several, donate_argnums=0)


def one_step(
    step: Callable, steps: int, n: int, crop: tuple[int, ...], mesh: Mesh | None, phase: Any
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The function that `compiled_step` compiles."""
    more = {} if phase is None else {"phase": phase}

    def one(
        state: State, batch: PyTree, key: Any, results: Results, volumes: Any = None
    ) -> tuple[State, dict[str, Array]]:
        batch = cut(volumes, batch, crop) if crop else batch
        return step(state, batch, jax.random.fold_in(key, state.step), results, steps=steps, **more)

    return staying_placed(side_by_side(one, n, (0, 0, 0, 0, None)), mesh)


def side_by_side(function: Callable, n: int, axes: tuple[int | None, ...]) -> Callable:
    """A function of one replicate as a function of `n`; `axes` are those of `jax.vmap`, 0 or None.

    On a CPU the replicates' operations stay apart. XLA's CPU has no fast form of convolutions with a kernel for each
    replicate: with three, a step of P-PII's recipe `small` took 2.97 s on one core, and 0.93 s apart.
    """
    if n == 1:
        return function
    if target().platform != "cpu":
        return jax.vmap(function, axes)

    def each(*given: Any) -> Any:
        pairs = list(zip(given, axes, strict=True))
        own = lambda i: [x if axis is None else jax.tree.map(lambda leaf: leaf[i], x) for x, axis in pairs]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(function(*own(i)) for i in range(n)))

    return each


@cache
def skipping(step: Callable) -> Callable:
    """A stage's step that leaves the state as it was, but for its number, where a metric is not finite."""

    def careful(state: State, *arguments: Any, **more: Any) -> tuple[State, dict[str, Array]]:
        new, metrics = step(state, *arguments, **more)
        ok = finite(metrics)
        return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state.replace(step=new.step)), metrics

    return careful


def compiled_check(
    look: Callable, n: int, crop: tuple[int, ...] = (), mesh: Mesh | None = None
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The program (state, batch, results, volumes) -> (state, metrics) of a stage's check; arguments as of
    `compiled_step`."""

    def one(state: State, batch: PyTree, results: Results, volumes: Any = None) -> tuple[State, dict[str, Array]]:
        return look(state, cut(volumes, batch, crop) if crop else batch, results)

    return jax.jit(staying_placed(side_by_side(one, n, (0, None, 0, None)), mesh), donate_argnums=0)


def staying_placed(function: Callable, mesh: Mesh | None) -> Callable:
    """The function (state, ...) -> (state, metrics) on a mesh of several devices, over which networks split samples.

    The state stays placed, and every device has the metrics.
    """
    if mesh is None or mesh.size == 1:
        return function
    inner = inside_mesh(function, mesh)

    def wrapped(*args: Any) -> tuple[State, dict[str, Array]]:
        state, metrics = inner(*args)
        return placed(state, mesh), jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return wrapped


def placed(state: State, mesh: Mesh) -> State:
    """The state at its `places`."""
    return jax.lax.with_sharding_constraint(state, places(state, mesh))


def places(state: State, mesh: Mesh) -> State:
    """The shardings of a state, or of its shapes.

    `sharded` places parameters and optimiser state. Statistics, which the host reads too, and the step are whole on
    every device.
    """
    split = {part: sharded(mesh, getattr(state, part)) for part in ("params", "opt")}
    whole = jax.tree.map(lambda _: replicated(mesh), {"stats": state.stats, "step": state.step})
    return State(**split, **whole)


@jax.jit
def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


# --- how many steps a program runs ------------------------------------------------------------------------------------


def steps_of_dispatch(config: ConfigDict, stage: Stage, batch: float) -> int:
    """How many steps of a stage with `batch` samples a device one program runs: `config.steps_per_dispatch`, or with 0
    a choice.

    The choice is 1 on a CPU, where a loop is slower than its steps one by one. Elsewhere it is the largest number up to
    `MOST_STEPS` that meets three conditions. It is whole rounds of the stage's phases. Its images take `MOST_BYTES` of
    a device at most. It divides `checkpoint_every` and the intervals of the stage's checks. Stages of large batches
    thus have 1: their steps take so long that launching them costs nothing beside.

    Raises InputError where the recipe's number is no multiple of the stage's phases.
    """
    number, period = config.steps_per_dispatch, len(stage.phases)
    if number > 1 and number % period:
        remedy = f"0 (automatic), 1, or a multiple of the {period} phases of stage {stage.name}"
        raise InputError(f"steps_per_dispatch is {number}: {remedy}")
    if number:
        return number
    if target().platform == "cpu":
        return 1
    size = 4 * math.prod(trained_shape(config, stage)) * batch * config.replicates
    intervals = [config.checkpoint_every, *(check.every for check in looks_of(stage))]
    fits = [
        k for k in range(period, MOST_STEPS + 1, period) if k * size <= MOST_BYTES and math.gcd(*intervals) % k == 0
    ]
    return max(fits, default=1)


def looks_of(stage: Stage) -> tuple[Check, ...]:
    """The stage's checks, and its watch behind them."""
    return (*stage.checks, stage.watch) if stage.watch else stage.checks


def next_dispatch(done: int, steps: int, length: int, period: int, halts: Sequence[int]) -> int:
    """How many steps the dispatch after step `done` takes: `length`, or 1.

    No dispatch crosses the stage's end, or a multiple of a number in `halts`, at which the host has something to do.
    The number depends on `done` alone, so that a resumed run has the dispatches of an unbroken one. `period` is the
    number of the stage's phases.
    """
    before = max(done - done % every for every in halts)
    after = min(steps, *(done - done % every + every for every in halts))
    first = -(-before // period) * period  # where a round of the phases begins
    whole = done >= first and (done - first) % length == 0 and done + length <= after
    return length if whole else 1
