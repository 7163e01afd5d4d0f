"""python -m jmae.train --config configs/NAME.py[:PRESET] [--workdir DIR] [--config.KEY=VALUE ...] [--debug]

Trains every stage of a system, picks up where an interrupted run stopped, and evaluates the test split where it has
labels. The run folder is runs/SYSTEM where none is named.

    python -m jmae.train --config configs/amae.py                                             built-in phantoms
    python -m jmae.train --config configs/amae.py:small --config.data.manifest=MANIFEST.csv --workdir runs/mine

Exit codes: 0 done; 2 the input or the environment is wrong;
3 a loss was not finite, last good step kept; 143 stopped by SIGTERM after saving, 130 by Ctrl-C.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jmae import checkpoint, recipe
from jmae.calibration import calibrate_run
from jmae.cards import write_cards
from jmae.data.cases import load_cases
from jmae.data.crops import cut
from jmae.data.loader import Samples, batches
from jmae.errors import InputError, NonFiniteLoss, Stopped, exit_code
from jmae.evaluate import check_processes, evaluate
from jmae.processes import agreement, join_processes, keep_compiled
from jmae.run_folder import (
    add_history,
    cut_history,
    describe_run,
    digest,
    fixed,
    log,
    write_csv,
    write_text,
)
from jmae.seen import not_seen_before, read_seen, write_seen
from jmae.sharding import (
    device_mesh,
    inside_mesh,
    on_host,
    place_batch,
    place_whole,
    replicated,
    sharded,
)
from jmae.system import Check, Results, Stage, State, System, load_system, rows_read, split_replicates, stage_keys
from jmae.target import target
from jmae.weights import load_weights, read_weights, summary, table

APART = (
    "weights",
    "weights_part",
    "weights_adapt",
    "dtype",
    "remat",
)  # of `model`: a checkpoint fits whatever they are
CHECKS = 2**40  # the step whose crops a stage's check takes: none that is trained on
SECONDS_BETWEEN_LINES = 10  # where standard error is no terminal
PACE_AFTER = 3  # seconds of steps: the first few tell little, checkpoints count too
MOST_STEPS, MOST_BYTES = 16, 2**26  # of a dispatch that the loop chooses: steps, and images on a device


def main(argv: list[str]) -> int:
    config, flags = recipe.parse(argv, __doc__, ["workdir"])
    workdir = Path(flags.get("workdir", f"runs/{config.system}"))
    with join_processes():
        keep_compiled()
        with checkpoint.workdir_lock(workdir):
            return run(config, workdir)


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains and evaluates in `workdir`; the caller holds its lock."""
    system = load_system(config)
    devices = device_mesh(config.get("fsdp", 1)).size
    check_batches(system, devices)
    for stage in system.stages:
        steps_of_dispatch(config, stage, stage.batch / devices)
    check_processes(config)
    if config.tensorboard:
        board()
    source = Path(config.model.get("weights") or workdir)  # another run, whose cases this one has seen too
    cases = load_cases(config, log, folder=workdir / "cache", trained=partial(rows_read, system))
    rows, unchecked = not_seen_before(config, cases.rows, source)
    images = cases.samples(rows_read(system, rows))
    train(config, system, images, workdir)
    write_seen(workdir, [*(read_seen(source) if source.is_dir() else ()), *images.rows])
    if any(row.split == "test" and row.label is not None for row in rows):
        evaluate(config, system, rows, workdir, split="test", out=workdir / "evaluation", unchecked=unchecked)
    else:
        log("no test row has a label: not evaluated")
        calibrate_run(config, system, rows, workdir)
        write_cards(workdir, config, system, rows)
    return 0


def check_batches(system: System, devices: int) -> None:
    """Raises InputError where a stage's batch, or each of its parts, does not divide among the devices."""
    for stage in system.stages:
        if stage.batch % (least := devices * stage.parts):
            batch = f"a batch of {stage.batch}" + (f" in {stage.parts} parts" if stage.parts > 1 else "")
            raise InputError(
                f"stage {stage.name}: {batch} is not divisible by {devices} devices: "
                f"use a multiple of {least}, or fewer devices"
            )


def train(config: ConfigDict, system: System, images: Samples, workdir: Path) -> Results:
    """All stages in order; returns their results."""
    results: dict[str, Any] = {}
    # What a check lacks is said before the first stage is trained.
    looks = {stage.name: [(check, check.rows(images.rows)) for check in stage.checks] for stage in system.stages}
    programs: dict[Any, Callable] = {}
    for number, stage in enumerate(system.stages):
        state = train_stage(config, stage, number, images, results, workdir, looks[stage.name], programs)
        results[stage.name] = stage.result(state)
        if stage.table:
            for seed, part in enumerate(split_replicates(results, config.replicates)):
                suffix = f"_{config.seed + seed}" if config.replicates > 1 else ""
                write_csv(workdir / f"{stage.name}{suffix}.csv", stage.table(images.rows, part))
    return results


def train_stage(
    config: ConfigDict,
    stage: Stage,
    number: int,
    images: Samples,
    results: Results,
    workdir: Path,
    looks: Sequence[tuple[Check, np.ndarray]],
    programs: dict[Any, Callable],
) -> State:
    """One stage from its newest sound checkpoint, or from its start, to its last step.

    Resume order: 1. rows and steps from the manifest and the earlier stages' results; 2. a fresh state; 3. the newest
    sound checkpoint over it; 4. metrics.jsonl cut back to that step; 5. the data iterator's position.
    """
    n, name, folder = config.replicates, stage.name, workdir / "checkpoints" / stage.name
    tables = [stage.rows(images.rows, part) for part in split_replicates(results, n)]
    if not min(len(table) for table in tables):
        raise InputError(f"stage {name}: no rows to train on: give the manifest rows of its splits")
    steps = round(np.mean([stage.steps(len(table)) for table in tables]))
    keys, mesh = stage_keys(config, number), device_mesh(config.get("fsdp", 1))

    state = compiled_init(stage, len(tables[0]), n, mesh)(keys, results)
    identity = {"recipe": fixed(config), "rows": digest(images.rows)}
    found = checkpoint.restore(folder, state, config=identity, log=log)
    if number == 0:  # not before a folder of another configuration is refused, and stays as it is
        describe_run(config, workdir)
    start = 0
    position: dict[str, Any] = {}
    if found:
        start, saved, position = found
        state = saved
    elif stage.pretrained and config.model.weights:
        state = adopt(config, stage, state, workdir)
        if stage.pretrained.use == "instead":
            start = steps
            checkpoint.save(folder, steps, state, {"steps": steps}, config=identity)
    elif stage.pretrained and stage.pretrained.use == "start":
        log(f"{name}: from random weights: model.weights names none")
    history = workdir / "metrics.jsonl"
    cut_history(history, name, start)
    if start >= steps:
        log(f"{name}: done before, {start} steps")
        return state

    if (least := min(len(table) for table in tables)) < stage.batch:
        log(f"warning: {name}: {least} images are fewer than a batch of {stage.batch}: they repeat within it")
    seeds = [config.seed + r for r in range(n)]
    iterator = batches(images, tables, batch=stage.batch, seeds=seeds, shuffle=stage.shuffle, host=stage.host_arrays)
    if found:
        iterator.set_state(position["data"])
    resident = images.resident()
    held = None if resident is None else place_whole(resident, mesh)
    del resident
    crop = () if held is None else tuple(config.data.size)
    length = steps_of_dispatch(config, stage, stage.batch / mesh.size)

    def program(compile: Callable, *last: Any) -> Callable:
        """A compiled step; stages that share a step share it."""
        form = (compile, stage.step, steps, *last)
        if form not in programs:
            programs[form] = compile(stage.step, steps, n, crop, mesh, *last)
        return programs[form]

    single = {phase: program(compiled_step, phase) for phase in dict.fromkeys(stage.phases)}
    several = program(compiled_steps, stage.phases, length) if length > 1 else None
    checks = []
    for check, chosen in looks:
        if chosen.size:
            batch = place_whole(check_batch(chosen, check, images), mesh)
            checks.append((check.every, compiled_check(check.look, n, crop, mesh), batch))
    halts = [config.checkpoint_every, *(every for every, *_ in checks)]
    pending: list[tuple[int, list[np.ndarray], dict]] = []  # dispatches whose metrics are still on the device
    seen: list[dict[str, float]] = position.get("seen", [])  # metrics since the last line
    saved_at = start

    def look(some: Sequence[tuple[int, list[np.ndarray], dict]]) -> None:
        """Fetches the metrics of dispatches; ends the run at a step where one is not finite; writes a line every
        `log_every` steps."""
        fetched = jax.device_get([metrics for *_, metrics in some])
        for k, index, metrics in each_step([(*one[:2], own) for one, own in zip(some, fetched, strict=True)]):
            if bad := [metric for metric, value in metrics.items() if not np.isfinite(value).all()]:
                r = int(np.argmin(np.isfinite(metrics[bad[0]])))  # the first bad replicate
                rows = tables[r][np.atleast_2d(index)[r] % len(tables[r])]
                raise NonFiniteLoss(
                    f"stage {name}, step {k}: {' and '.join(bad)} not finite; batch: "
                    f"{', '.join(images.rows[i].id for i in rows)}; {kept()}"
                )
            seen.append({metric: float(np.mean(value)) for metric, value in metrics.items()})
            if k % config.log_every == 0 or k == steps:
                line = {"stage": name, "step": k} | {m: float(np.mean([s[m] for s in seen])) for m in seen[0]}
                add_history(history, line | {"time": round(time.time(), 3)})
                show(line)
                draw(line)
                seen.clear()

    def kept() -> str:
        what = f"step {saved_at} is kept in {folder}" if saved_at else "no step was saved yet"
        return f"{what}: lower the stage's lr, or mend these images"

    log(f"{name}: {len(tables[0])} images, steps {start} to {steps}, batch {stage.batch}, compiling")
    with progress(name, start, steps) as show, drawing(config, workdir, name, start) as draw, signals() as stopped:
        k = start
        while k < steps:
            first, count = k + 1, next_dispatch(k, steps, length, len(stage.phases), halts)
            taken = [next(iterator) for _ in range(count)]
            if several and count == length:
                whole = jax.tree.map(lambda *arrays: np.stack(arrays), *taken)
                state, metrics = several(state, place_batch(whole, mesh, axis=1 + int(n > 1)), keys, results, held)
            else:
                step = single[stage.phases[k % len(stage.phases)]]
                state, metrics = step(state, place_batch(taken[0], mesh, axis=int(n > 1)), keys, results, held)
            k += count
            if first == start + 1:
                jax.block_until_ready(state)  # compiled: the pace is measured from here
                show({"step": k})
            pending.append((first, [batch["index"] for batch in taken], metrics))
            stop = stopped(k == steps)
            for every, look_at, checked in checks:
                if k % every and k != steps:
                    continue
                look(pending)
                pending.clear()
                state, found_out = look_at(state, checked, results, held)
                means = {m: float(np.mean(value)) for m, value in jax.device_get(found_out).items()}
                if not np.isfinite(means.get("aucp", 0)):
                    raise NonFiniteLoss(f"stage {name}, step {k}: scores not finite; {kept()}")
                line = {"stage": name, "step": k} | means
                add_history(history, line | {"time": round(time.time(), 3)})
                show(line)
                draw(line)
            if k % config.checkpoint_every == 0 or k == steps or stop:
                # A state is saved only after its losses and its weights were looked at.
                look(pending)
                pending.clear()
                if not finite((state.params, state.stats)):
                    raise NonFiniteLoss(f"stage {name}, step {k}: weights not finite; {kept()}")
                position = {"data": iterator.get_state(), "seen": seen, "steps": steps}
                checkpoint.save(folder, k, state, position, config=identity)
                saved_at = k
            elif pending and k - pending[0][0] >= config.log_every:  # the newest runs on while others are fetched
                look(pending[:-1])
                del pending[:-1]
            if stop:
                what = f"stopped by {stop.name}: stage {name}, step {k} saved in {folder}: run again to go on"
                raise Stopped(what, stop)
    return state


def steps_of_dispatch(config: ConfigDict, stage: Stage, batch: float) -> int:
    """How many steps of a stage with `batch` samples a device one program runs: `config.steps_per_dispatch`, or with 0
    a choice.

    The choice is 1 on a CPU, where a loop is slower than its steps one by one. Elsewhere it is the largest number up to
    `MOST_STEPS` that is whole rounds of the stage's phases, whose images take `MOST_BYTES` of a device at most, and
    that divides `checkpoint_every` and the intervals of the stage's checks. Stages of large batches thus have 1: their
    steps take so long that launching them costs nothing beside.

    Raises InputError where the recipe's number is below 0, or no multiple of the stage's phases.
    """
    given, period = config.get("steps_per_dispatch", 0), len(stage.phases)
    if given < 0 or (given > 1 and given % period):
        more = "or 1 or more" if period == 1 else f"1, or a multiple of the {period} phases of stage {stage.name}"
        raise InputError(f"steps_per_dispatch is {given}: 0 (automatic), {more}")
    if given:
        return given
    if target().platform == "cpu":
        return 1
    size = 4 * math.prod(config.data.size) * config.data.channels * batch * config.replicates
    intervals = [config.checkpoint_every, *(check.every for check in stage.checks)]
    fits = [
        k for k in range(period, MOST_STEPS + 1, period) if k * size <= MOST_BYTES and math.gcd(*intervals) % k == 0
    ]
    return max(fits, default=1)


def next_dispatch(done: int, steps: int, length: int, period: int, halts: Sequence[int]) -> int:
    """How many steps the dispatch after step `done` takes: `length`, or 1. No dispatch crosses a multiple of a number
    in `halts`, at which the host has something to do, or the stage's end. It depends on the number of the step alone,
    so that a resumed run has the dispatches of an unbroken one."""
    before = max(done - done % every for every in halts)
    after = min(steps, *(done - done % every + every for every in halts))
    first = -(-before // period) * period  # where a round of the phases begins
    whole = done >= first and (done - first) % length == 0 and done + length <= after
    return length if whole else 1


def each_step(dispatches: Sequence[tuple[int, list[np.ndarray], dict]]) -> Iterator[tuple[int, np.ndarray, dict]]:
    """(step, index, metrics) of every step of dispatches (first step, indices, metrics)."""
    for first, indices, metrics in dispatches:
        for i, index in enumerate(indices):
            yield first + i, index, metrics if len(indices) == 1 else {m: value[i] for m, value in metrics.items()}


def compiled_init(stage: Stage, rows: int, n: int, mesh: Mesh) -> Callable[[Any, Results], State]:
    """A stage's first state for so many rows, `vmap`ped over n replicates, `placed`. It runs once: for a CPU it is
    compiled with less effort, in about half the time, to the same numbers."""

    def one(key: Any, results: Results) -> State:
        return stage.init(key, results, rows)

    def whole(key: Any, results: Results) -> State:
        return placed((one if n == 1 else jax.vmap(one))(key, results), mesh)

    less = target().platform == "cpu" and not jax.config.values["jax_disable_most_optimizations"]
    return jax.jit(whole, compiler_options={"xla_backend_optimization_level": 1} if less else None)


def compiled_step(
    step: Callable, steps: int, n: int, crop: tuple[int, ...] = (), mesh: Mesh | None = None, phase: Any = None
) -> Callable:
    """The stage's step as one program, `vmap`ped over n replicates.

    With `crop` the images are first cut from the volumes on the device, its last argument. On a `mesh` the state stays
    `placed`, and every device has the metrics. A step of a stage with `phases` is compiled for one of them."""
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
    """`length` steps as one program, a loop on the device; the first of them is of the first phase. Batches and metrics
    have a leading axis of that length.

    A GPU launches as many kernels as for single steps; what the loop saves is the host's work between steps. XLA can
    record a loop as one CUDA graph: XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE asks for it, which the compiler
    accepts but nobody has tried on a GPU, so it is off."""
    each = [one_step(step, steps, n, crop, mesh, phase) for phase in phases]

    def several(state: State, batches: PyTree, key: Any, results: Results, held: Any = None) -> tuple[State, dict]:
        def cycle(state: State, some: PyTree) -> tuple[State, dict]:
            found = []
            for i, one in enumerate(each):
                state, metrics = one(state, jax.tree.map(lambda x, i=i: x[i], some), key, results, held)
                found.append(metrics)
            return state, jax.tree.map(lambda *values: jnp.stack(values), *found)

        cycles = jax.tree.map(lambda x: x.reshape(length // len(each), len(each), *x.shape[1:]), batches)
        state, metrics = jax.lax.scan(cycle, state, cycles)
        return state, jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), metrics)

    return jax.jit(several, donate_argnums=0)


def one_step(
    step: Callable, steps: int, n: int, crop: tuple[int, ...], mesh: Mesh | None, phase: Any
) -> Callable[..., tuple[State, dict]]:
    """What `compiled_step` compiles."""
    more = {} if phase is None else {"phase": phase}

    def one(state: State, batch: PyTree, key: Any, results: Results, held: Any = None) -> tuple[State, dict]:
        batch = cut(held, batch, crop) if crop else batch
        return step(state, batch, jax.random.fold_in(key, state.step), results, steps=steps, **more)

    return kept_placed(one if n == 1 else jax.vmap(one, (0, 0, 0, 0, None)), mesh)


def kept_placed(function: Callable, mesh: Mesh | None) -> Callable:
    """The function on a mesh of several devices, where its networks' samples are split and its results (state, metrics)
    are placed."""
    if mesh is None or mesh.size == 1:
        return function
    inner = inside_mesh(function, mesh)

    def wrapped(*args: Any) -> tuple[State, dict]:
        state, metrics = inner(*args)
        return placed(state, mesh), jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return wrapped


def placed(state: State, mesh: Mesh) -> State:
    """The state at its `places`."""
    return jax.lax.with_sharding_constraint(state, places(state, mesh))


def places(state: State, mesh: Mesh) -> State:
    """Where a state, or its shapes, lies: parameters and optimiser state as `sharded` has them;
    statistics, which the host reads too, and the step are whole on every device."""
    own = {part: sharded(mesh, getattr(state, part)) for part in ("params", "opt")}
    rest = jax.tree.map(lambda _: replicated(mesh), {"stats": state.stats, "step": state.step})
    return State(**own, **rest)


def check_batch(rows: np.ndarray, check: Check, images: Samples) -> dict[str, np.ndarray]:
    """The samples of rows that a check looks at."""
    rows = np.resize(rows, check.samples or len(rows))
    numbers, own = np.arange(len(rows)), [images.rows[i] for i in rows]
    label = [row.label if row.split == "val" and row.label is not None else -1 for row in own]
    more = {"index": numbers, "case": images.words[rows], "label": np.array(label, np.int32)}
    more |= {"unlabeled": np.array([row.split == "unlabeled" for row in own])}
    return images.samples(rows, numbers, CHECKS, 0) | more


def compiled_check(look: Callable, n: int, crop: tuple[int, ...] = (), mesh: Mesh | None = None) -> Callable:
    """A stage's look at its state as one program, as `compiled_step` makes it of a step."""

    def one(state: State, batch: PyTree, results: Results, held: Any = None) -> tuple[State, dict]:
        return look(state, cut(held, batch, crop) if crop else batch, results)

    return jax.jit(kept_placed(one if n == 1 else jax.vmap(one, (0, None, 0, None)), mesh), donate_argnums=0)


@jax.jit
def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def adopt(config: ConfigDict, stage: Stage, state: State, workdir: Path) -> State:
    """The state with the parameters that `model.weights` names: of a file, as `jmae.weights` reads it, each tensor's
    fate in weights.txt; or of that stage in another run's folder. One set serves all replicates.

    Raises InputError where there is none, where they are of another network or preparation of images.
    """
    assert stage.pretrained
    source, n = Path(config.model.weights), config.replicates
    if source.is_file():
        weights, model = read_weights(source), config.model
        part = model.get("weights_part", "mae")
        if weights.size is None and part != "blocks":  # which file this is for nothing else tells
            weights = read_weights(source, size=tuple(config.data.size))
        drawn = on_host(state.params)
        single = lambda r: drawn if n == 1 else jax.tree.map(lambda x: x[r], drawn)
        loaded = [
            load_weights(
                weights,
                single(r),
                part=part,
                heads=model.heads,
                decoder_heads=model.decoder_heads,
                size=tuple(config.data.size),
                patch=tuple(model.patch),
                channels=model.get("channels", config.data.channels),
                positions=stage.pretrained.positions,
                adapt=model.weights_adapt,
            )
            for r in range(n)
        ]
        params = loaded[0][0] if n == 1 else jax.tree.map(lambda *x: jnp.stack(x), *(p for p, _ in loaded))
        log(f"{stage.name}: {summary(loaded[0][1])} from {source}, part {part}: {workdir / 'weights.txt'}")
        write_text(workdir / "weights.txt", table(loaded[0][1]) + "\n")
    else:
        params = of_run(config, stage, state)
    put = lambda new, old: jax.make_array_from_callback(new.shape, old.sharding, lambda i: new[i])
    return state.replace(params=jax.tree.map(put, on_host(params), state.params))


def of_run(config: ConfigDict, stage: Stage, state: State) -> PyTree:
    """A stage's parameters from the run folder `model.weights`."""
    workdir, n = Path(config.model.weights), config.replicates
    folder = workdir / "checkpoints" / stage.name
    if not workdir.exists():
        raise InputError(f"model.weights: {workdir} not found: name a checkpoint file, or the folder of an earlier run")
    if not (workdir / "config.json").is_file():
        raise InputError(f"model.weights: {folder} has no checkpoint: name a file, or the folder of an earlier run")
    source = recipe.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    ours, theirs = (dict(recipe.keys_of(c)) for c in (config, source))
    shared = [k for k in ours if k.startswith("model.") and k.split(".")[1] not in APART]
    for key in [*shared, "data.size", "data.normalise", "data.mean", "data.std"]:
        if ours[key] != theirs.get(key):
            raise InputError(
                f"model.weights: {workdir} has {key}={theirs.get(key)}, the recipe {ours[key]}: make them equal"
            )
    stacked = n > 1 and source.replicates == n
    single = state if n == 1 or stacked else jax.tree.map(lambda x: x[0], state)
    found = checkpoint.restore(folder, single, config=None, log=log)
    if not found:
        raise InputError(f"model.weights: {folder} has no checkpoint: name the folder of an earlier run")
    step, saved, position = found
    checkpoint.refuse_unfinished(folder, step, position)
    log(f"{stage.name}: taken over from {folder}, step {step}")
    params = stage.result(saved)["params"]
    return params if n == 1 or stacked else jax.tree.map(lambda x: jnp.stack([x] * n), params)


# --- signs of life --------------------------------------------------------------------------------------------------


@contextmanager
def signals() -> Iterator[Callable[[bool], signal.Signals | None]]:
    """Gives a function that tells which of SIGTERM and SIGINT (Ctrl-C) has arrived; the second Ctrl-C interrupts at
    once. Elsewhere either ends the process at once, which a shell sees as 143 or 130 too: nothing but these steps is
    lost with it. Of several processes all learn at the same call what one of them has got: the last call, told by its
    argument, knows all, an earlier one what came before the call before it."""
    arrived: list[signal.Signals] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}

    def note(number: int, _: Any) -> None:
        arrived.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
            log("Ctrl-C: saving after this step; once more stops at once")

    try:
        for number in before:
            signal.signal(number, note)
        if jax.process_count() == 1:
            yield lambda last: arrived[0] if arrived else None
        else:
            agreed = agreement()
            own = lambda: arrived[0] if arrived else 0
            yield lambda last: signal.Signals(found) if (found := agreed(own(), last)) else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(stage: str, start: int, steps: int) -> Iterator[Callable[[Mapping], None]]:
    """Gives a function that shows a line of metrics: a bar on a terminal, else now and then a plain line. Its first
    line is the mark from which the pace is measured."""
    console, marks, shown = Console(stderr=True), list[tuple[float, int]](), [-1e9]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    terminal = console.is_terminal and jax.process_index() == 0
    with Progress(*columns, console=console, disable=not terminal) as bar:
        task = bar.add_task(stage, total=steps, completed=start, text="compiling")

        def show(line: Mapping) -> None:
            step, text = line["step"], headline(line)
            marks.append((time.monotonic(), step))
            seconds, done = marks[-1][0] - marks[0][0], step - marks[0][1]
            if done and seconds > PACE_AFTER:
                text += f"  {done / seconds:.2f} steps/s  {(steps - step) * seconds / done:.0f} s left"
            if terminal:
                bar.update(task, completed=step, text=text)
            elif headline(line) and (marks[-1][0] - shown[0] > SECONDS_BETWEEN_LINES or step == steps):
                shown[0] = marks[-1][0]
                log(f"{stage} {step}/{steps}  {text}")

        yield show


def headline(line: Mapping) -> str:
    """The metrics of a line that are worth a look while it runs."""
    return "  ".join(
        f"{name} {line[name]:.4f}" for name in ("loss", "accuracy", "abnormal_share", "dice", "aucp") if name in line
    )


def board() -> Any:
    """tensorboardX, an optional dependency."""
    try:
        import tensorboardX
    except ImportError:
        raise InputError("tensorboard=True needs tensorboardX: pip install 'jmae[tensorboard]'") from None
    return tensorboardX


@contextmanager
def drawing(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Callable[[Mapping], None]]:
    """Gives a function that writes a line of metrics to TensorBoard files, where the recipe asks for them."""
    if not config.tensorboard or jax.process_index() != 0:
        yield lambda line: None
        return
    # What a killed run wrote beyond its checkpoint is purged: its continuation writes it again.
    with board().SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=start + 1) as writer:

        def draw(line: Mapping) -> None:
            for name in line.keys() - {"stage", "step"}:
                writer.add_scalar(name, line[name], line["step"])

        yield draw


if __name__ == "__main__":
    sys.exit(exit_code(main))
