"""python -m jmae.train --config configs/NAME.py[:PRESET] [--workdir DIR] [--config.KEY=VALUE ...] [--debug]

Trains every stage of a system, picks up where an interrupted run stopped, and evaluates the test split where it has
labels. Exit codes: 0 done; 2 the input or the environment is wrong; 3 a loss was not finite, last good step kept; 143
stopped by SIGTERM after saving.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jmae import checkpoint, recipe
from jmae.data.loader import Images, batches, load_rows
from jmae.errors import InputError, NonFiniteLoss, Stopped, exit_code
from jmae.evaluate import evaluate
from jmae.run_folder import cut_history, describe_run, digest, fixed, log, write_csv
from jmae.sharding import device_mesh, place_batch, replicated
from jmae.system import Results, Stage, State, System, load_system, split_replicates, stage_keys


def main(argv: list[str]) -> int:
    flags = recipe.parse(argv, __doc__, workdir=None)
    config = flags.config
    workdir = Path(flags.workdir or f"runs/{config.system}")
    with checkpoint.workdir_lock(workdir):
        return run(config, workdir)


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains and evaluates in `workdir`; the caller holds its lock."""
    system = load_system(config)
    rows = load_rows(config)
    describe_run(config, workdir)
    images = Images([row for row in rows if row.split in ("train", "unlabeled")], config, workdir / "cache")
    train(config, system, images, workdir)
    if not any(row.split == "test" and row.label is not None for row in rows):
        print("the test split has no labels: no evaluation")
        return 0
    evaluate(config, system, rows, workdir, split="test", out=workdir / "evaluation")
    return 0


def train(config: ConfigDict, system: System, images: Images, workdir: Path) -> Results:
    """All stages in order; returns their results."""
    results: dict[str, Any] = {}
    for number, stage in enumerate(system.stages):
        state = train_stage(config, stage, number, images, results, workdir)
        results[stage.name] = {"params": state.params, "stats": state.stats}
        if stage.table:
            for seed, part in enumerate(split_replicates(results, config.replicates)):
                suffix = f"_{config.seed + seed}" if config.replicates > 1 else ""
                write_csv(workdir / f"{stage.name}{suffix}.csv", stage.table(images.rows, part))
    return results


def train_stage(
    config: ConfigDict, stage: Stage, number: int, images: Images, results: Results, workdir: Path
) -> State:
    """One stage from its newest sound checkpoint, or from its start, to its last step.

    Resume order: 1. rows and steps from the manifest and the earlier stages' results; 2. a fresh state; 3. the newest
    sound checkpoint over it; 4. the data iterator's position from there; 5. metrics.jsonl cut back to that step.
    """
    n = config.replicates
    folder = workdir / "checkpoints" / stage.name
    tables = [stage.rows(images.rows, part) for part in split_replicates(results, n)]
    if not min(len(table) for table in tables):
        raise InputError(f"stage {stage.name}: no rows to train on: see the manifest's splits")
    steps = round(np.mean([stage.steps(len(table)) for table in tables]))
    keys = stage_keys(config, number)
    mesh = device_mesh()

    def init(key: Any, results: Results) -> State:
        return stage.init(key, results, len(tables[0]))

    state = jax.jit(init if n == 1 else jax.vmap(init), out_shardings=replicated(mesh))(keys, results)
    frozen = state.frozen
    identity = {"recipe": fixed(config), "rows": digest(images.rows)}
    found = checkpoint.restore(folder, state._replace(frozen={}), config=identity, log=log)
    position, start = None, 0
    if found:
        start, saved, position = found
        state = saved._replace(frozen=frozen)
    elif number == 0 and config.model.weights:
        state = adopt(Path(config.model.weights), stage, state, n)
        start = steps
        checkpoint.save(folder, steps, state._replace(frozen={}), {}, config=identity)
    history = workdir / "metrics.jsonl"
    cut_history(history, stage.name, start)
    if start >= steps:
        log(f"{stage.name}: done before, {start} steps")
        return state

    short = [len(table) for table in tables if len(table) < stage.batch]
    if short:
        log(f"warning: {stage.name}: {min(short)} rows are fewer than a batch of {stage.batch}: rows repeat within it")
    seeds = [config.seed + r for r in range(n)]
    iterator = batches(images, tables, batch=stage.batch, seeds=seeds, shuffle=stage.shuffle, host=stage.host)
    if position:
        iterator.set_state(position)
    log(f"{stage.name}: {len(tables[0])} images, steps {start} to {steps}, batch {stage.batch}")

    step = compiled_step(stage.step, steps, n)
    pending: list[tuple[int, np.ndarray, dict]] = []
    saved_at = start

    def flush() -> None:
        """Fetches the pending steps' metrics; one that is not finite ends the run."""
        fetched = jax.device_get([metrics for _, _, metrics in pending])
        for (k, index, _), metrics in zip(pending, fetched, strict=True):
            bad = [name for name, value in metrics.items() if not np.isfinite(value).all()]
            if bad:
                ids = ", ".join(images.rows[i].id for i in tables[0][np.ravel(index) % len(tables[0])][:4])
                raise NonFiniteLoss(
                    f"stage {stage.name}, step {k}: {' and '.join(bad)} not finite (batch of {ids}, ...): lower the"
                    f" stage's lr or mend these images; step {saved_at} is kept in {folder}"
                )
        if fetched:
            means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
            line = {"stage": stage.name, "step": pending[-1][0], **means, "time": round(time.time(), 3)}
            with history.open("a") as file:
                file.write(json.dumps(line) + "\n")
            show(line)
        pending.clear()

    def save(k: int) -> None:
        nonlocal saved_at
        checkpoint.save(folder, k, state._replace(frozen={}), iterator.get_state(), config=identity)
        saved_at = k

    with progress(stage.name, start, steps, config) as show, stop_requested() as stopped:
        for k in range(start + 1, steps + 1):
            batch = next(iterator)
            placed = place_batch(batch, mesh, axis=int(n > 1))
            state, metrics = step(state, placed, keys)
            # Metrics are fetched while the next step runs; a state is saved only after all its losses were looked at.
            if len(pending) == config.log_every:
                flush()
            pending.append((k, batch["index"], metrics))
            if k % config.checkpoint_every == 0 or k == steps or stopped():
                flush()
                save(k)
            if stopped():
                raise Stopped(f"stopped by SIGTERM: stage {stage.name}, step {k} saved in {folder}")
    return state


@lru_cache(maxsize=8)
def compiled_step(step: Callable, steps: int, n: int) -> Callable:
    """The stage's step as one program, `vmap`ped over n replicates; stages that share a step share its compilation."""

    def one(state: State, batch: PyTree, key: Any) -> tuple[State, dict]:
        return step(state, batch, jax.random.fold_in(key, state.step), steps=steps)

    return jax.jit(one if n == 1 else jax.vmap(one), donate_argnums=0)


def adopt(workdir: Path, stage: Stage, state: State, n: int) -> State:
    """The first stage's parameters from another run folder; one set serves all replicates."""
    folder = workdir / "checkpoints" / stage.name
    if not checkpoint.steps(folder):
        raise InputError(f"model.weights: {folder} has no finished stage: name the folder of an earlier run")
    single = state if n == 1 else jax.tree.map(lambda x: x[0], state)
    _, saved, _ = checkpoint.restore(folder, single._replace(frozen={}), config=None, log=log)  # type: ignore[misc]
    log(f"{stage.name}: taken over from {folder}")
    params = saved.params if n == 1 else jax.tree.map(lambda x: jnp.stack([x] * n), saved.params)
    return state._replace(params=params)


# --- signs of life --------------------------------------------------------------------------------------------------


@contextmanager
def stop_requested():
    """Gives a function that tells whether SIGTERM has arrived."""
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress(stage: str, start: int, steps: int, config: ConfigDict):
    """Gives a function that shows a line of metrics: a bar on a terminal, else a plain line about every 10 seconds."""
    console = Console(stderr=True)
    began, last = time.monotonic(), [0.0]

    def rate(step: int) -> float:
        return (step - start) / max(time.monotonic() - began, 1e-9)

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(stage, total=steps, completed=start, text="compiling")

            def show(line: dict) -> None:
                text = f"{rate(line['step']):.1f} steps/s  {headline(line)}"
                bar.update(task, completed=line["step"], text=text)

            yield show
        return

    def plain(line: dict) -> None:
        now = time.monotonic()
        if now - last[0] > 10 or line["step"] == steps:
            last[0] = now
            left = (steps - line["step"]) / rate(line["step"])
            log(
                f"{stage} {line['step']}/{steps}  {rate(line['step']):.2f} steps/s  {headline(line)}  {left:.0f} s left"
            )

    yield plain


def headline(line: dict) -> str:
    """The metrics of a line that are worth a look while it runs."""
    return "  ".join(f"{name} {line[name]:.4f}" for name in ("loss", "accuracy", "abnormal_share") if name in line)


if __name__ == "__main__":
    sys.exit(exit_code(main))
