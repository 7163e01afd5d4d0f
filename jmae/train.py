"""python -m jmae.train --config NAME[:PRESET] [--workdir DIR] [--config.KEY=VALUE ...] [--debug]
python -m jmae.train --config NAME[:PRESET] [--config.KEY=VALUE ...] --dry-run | --show [KEY]
python -m jmae.train --workdir DIR

Trains every stage of a system, picks up where an interrupted run stopped, and evaluates the test split where it has
labels. The run folder is runs/SYSTEM where none is named. NAME is a recipe of the library or a FILE.py. Without
--config, an interrupted run goes on with the recipe that its folder has.

    python -m jmae.train --config amae                                             built-in phantoms
    python -m jmae.train --config amae:small --config.data.manifest=MANIFEST.csv --workdir runs/mine
    python -m jmae.train --config amae:small --show evaluation                     the keys evaluation.*

--config.KEY=VALUE changes a key of the recipe. The keys that users change most:

    --config.budget=0.25             factor of all steps: a first impression; 4 trains longer
    --config.data.calibration=0.5    share of the normal training patients that is kept apart for p-values
    --config.data.channels=1         colours of the images (1 or 3), or sequences of the volumes
    --config.seed=1                  another random start

--dry-run  shows the data, and images, batch and steps of each stage. It opens no image and trains nothing.
--show     shows the recipe's keys: value, type, bounds, default, meaning. KEY is a key or a section.

Exit codes: 0 done; 2 the input or the environment is wrong;
3 a loss was not finite, last good step kept; 143 stopped by SIGTERM after saving, 130 by Ctrl-C.
"""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jmae import checkpoint, command_words, recipe
from jmae.calibration import calibrate_run, tell_p_values
from jmae.cards import write_cards
from jmae.convergence import check_processes
from jmae.data.cases import load_cases
from jmae.data.loader import Images, Samples, batches
from jmae.data.manifest import folded
from jmae.doubts import caveats, doubts
from jmae.errors import InputError, NonFiniteLoss, Stopped, exit_code
from jmae.evaluate import evaluate
from jmae.likeness import turned_rows, turned_text, write_kind
from jmae.loggers import lines_to_loggers, package
from jmae.pretrained import with_pretrained
from jmae.preview import preview, training_line
from jmae.processes import join_processes, keep_compiled
from jmae.programs import (
    compiled_check,
    compiled_init,
    compiled_step,
    compiled_steps,
    finite,
    next_dispatch,
    skipping,
    steps_of_dispatch,
)
from jmae.progress import profiled_steps, profiling, progress, signals
from jmae.python import Train
from jmae.run_folder import (
    add_history,
    cut_history,
    describe_run,
    digest,
    fixed,
    images_digest,
    log,
    output_folder,
    read_history,
    resuming,
    write_csv,
)
from jmae.run_recipe import refuse_other_recipe, saved_recipe
from jmae.seen import check_unseen_by_source, differences, read_seen, write_seen
from jmae.sharding import device_mesh, place_batch, place_whole
from jmae.system import (
    Check,
    Results,
    Stage,
    State,
    System,
    load_system,
    nothing_to_train_on,
    rows_read,
    rows_watched,
    split_replicates,
    stage_keys,
)
from jmae.tables import counted
from jmae.waiting import at_work

CHECK_STEP = 2**40  # a stage's checks take the crops of this step, which no training reaches


def main(argv: list[str]) -> int:
    config, flags = recipe.parse(argv, __doc__, *command_words.TRAIN)
    if "show" in flags:
        print(recipe.explained(config, flags["show"].replace("true", "")))
        return 0
    if recipe.typed("dry-run", flags.get("dry-run", "false"), False):
        print(preview(config))
        return 0
    workdir = output_folder(flags.get("workdir", f"runs/{config.system}"), "run")
    with join_processes():
        keep_compiled()
        with checkpoint.workdir_lock(workdir):
            return run(config, workdir)


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains and evaluates in `workdir`; the caller holds its lock."""
    system = load_system(config)
    refuse_other_recipe(config, workdir)
    devices = device_mesh(config.fsdp).size
    check_batches(system, devices)
    for stage in system.stages:
        steps_of_dispatch(config, stage, stage.batch / devices)
    check_processes(config)
    profiled_steps(config)
    for name in config.loggers:
        package(name)
    source = Path(config.get("model", {}).get("weights") or workdir)  # may be another run; its cases then count as seen
    needed = lambda rows: [*rows_read(system, rows), *rows_watched(system, rows)]
    cases = load_cases(config, log, folder=workdir / "cache", trained=needed)
    rows, unchecked = check_unseen_by_source(config, cases.rows, source)
    images, watched = cases.samples(rows_read(system, rows)), rows_watched(system, rows)
    for note in system.notes:
        log(f"warning: {note}")
    tell_p_values(config, system, rows)
    for line in folded([turned_text(row) for row in turned_rows(images.rows, cases.traits)]):
        log(f"warning: {line}")
    if not any(workdir.glob("checkpoints/*/*")):
        log(training_line(config, system.stages, images.rows))
    elif source == workdir and (others := differences(read_seen(workdir), images.rows)):
        log(f"images to train on since this run began: {others}")
    train(config, system, images, workdir, cases.samples(watched, crops_on="host") if watched else None)
    write_kind(workdir, [cases.traits[row.id] for row in images.rows if row.id in cases.traits])
    write_seen(workdir, [*(read_seen(source) if source.is_dir() else ()), *images.rows])
    if any(row.split == "test" and row.label is not None for row in rows):
        out = workdir / "evaluation"
        evaluate(config, system, rows, workdir, split="test", out=out, unchecked=unchecked, cases=cases)
    else:
        log("no test row has a label: not evaluated")
        calibrate_run(config, system, rows, workdir, cases)
        write_cards(workdir, config, system, rows)
        for text in caveats(config, doubts(read_history(workdir / "metrics.jsonl"), system.stages)):
            log(text)
        new = "--out DIR SCAN" if all(row.split != "test" for row in rows) else ""
        log(f"next: jmae {'predict' if new else 'evaluate'} --workdir {shlex.quote(str(workdir))} {new}".rstrip())
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


def train(
    config: ConfigDict, system: System, images: Samples, workdir: Path, watched: Samples | None = None
) -> Results:
    """All stages in order; returns their results. `watched` are the rows that stages only watch."""
    results: dict[str, Any] = {}
    # What a check lacks is said before the first stage is trained.
    checked = {stage.name: [check.rows(images.rows) for check in stage.checks] for stage in system.stages}
    programs: dict[Any, Callable] = {}
    for number, stage in enumerate(system.stages):
        state = train_stage(
            config, system.stages, number, images, results, workdir, checked[stage.name], programs, watched
        )
        results[stage.name] = stage.result(state)
        if stage.table:
            for seed, part in enumerate(split_replicates(results, config.replicates)):
                suffix = f"_{config.seed + seed}" if config.replicates > 1 else ""
                write_csv(workdir / f"{stage.name}{suffix}.csv", stage.table(images.rows, part))
    return results


@dataclass(frozen=True, kw_only=True)
class Course:
    """What stays the same while a stage is trained.

    Attributes:
        tables: numbers of the rows to train on, one table a replicate.
        steps: number of the stage's steps.
        keys: the key of the stage, one a replicate.
        results: results of the earlier stages.
        identity: recipe, rows and images, with which a checkpoint must agree.
        checked_rows: rows of each of the stage's checks; none: the check does not run.
        later: how many stages follow.
        watched: samples that the stage only watches; None: there are none.
    """

    config: ConfigDict
    stage: Stage
    samples: Samples
    tables: Sequence[np.ndarray]
    steps: int
    keys: Any
    results: Results
    identity: dict[str, Any]
    checked_rows: Sequence[np.ndarray]
    watched: Samples | None
    mesh: Mesh
    workdir: Path
    later: int

    @property
    def folder(self) -> Path:
        """Where the stage's checkpoints lie."""
        return self.workdir / "checkpoints" / self.stage.name

    @property
    def history(self) -> Path:
        """The file of the run's metrics."""
        return self.workdir / "metrics.jsonl"


def train_stage(
    config: ConfigDict,
    stages: Sequence[Stage],
    number: int,
    samples: Samples,
    results: Results,
    workdir: Path,
    checked_rows: Sequence[np.ndarray],
    programs: dict[Any, Callable],
    watched: Samples | None,
) -> State:
    """Stage `number`, from its newest sound checkpoint, or from its start, to its last step.

    Resume order: 1. rows and steps from the manifest and the earlier stages' results; 2. a fresh state; 3. the newest
    sound checkpoint over it; 4. metrics.jsonl cut back to that step; 5. the data iterator's position.
    """
    stage, parts = stages[number], split_replicates(results, config.replicates)
    tables = [stage.rows(samples.rows, part) for part in parts]
    if not min(len(table) for table in tables):
        raise nothing_to_train_on(stage, config)
    paces = [stage.pace(samples.rows, part) if stage.pace else 1 for part in parts]
    course = Course(
        config=config,
        stage=stage,
        samples=samples,
        tables=tables,
        steps=max(1, round(np.mean([stage.steps(len(table)) * k for table, k in zip(tables, paces, strict=True)]))),
        keys=stage_keys(config, number),
        results=results,
        identity={"recipe": fixed(config), "rows": digest(samples.rows), "images": images_digest(samples.rows)},
        checked_rows=checked_rows,
        watched=watched if stage.watch else None,
        mesh=device_mesh(config.fsdp),
        workdir=workdir,
        later=len(stages) - number - 1,
    )
    with at_work(f"{stage.name}: making the weights, or reading a checkpoint"):
        state, start, position = begin_stage(course, first=number == 0)
    cut_history(course.history, stage.name, start)
    if start >= course.steps:
        log(f"{stage.name}: done before, {start} steps")
        return state
    return take_steps(course, programs, state, start, position)


def begin_stage(course: Course, *, first: bool) -> tuple[State, int, dict[str, Any]]:
    """(state, steps done, position of the data) from which a stage goes on."""
    config, stage = course.config, course.stage
    state = compiled_init(stage, len(course.tables[0]), config.replicates, course.mesh)(course.keys, course.results)
    found = checkpoint.restore(
        course.folder, state, config=course.identity, log=log, brought_up=partial(saved_identity, course)
    )
    if first:  # only now: `restore` refuses a folder of another configuration, which stays as it is
        describe_run(config, course.workdir)
        write_seen(course.workdir, course.samples.rows)
    if found:
        start, state, position = found
        return state, start, position
    if not stage.pretrained:
        return state, 0, {}
    if not config.model.weights:
        if stage.pretrained.use == "start":
            log(f"{stage.name}: starts from random weights, as model.weights names no file")
        return state, 0, {}
    state = with_pretrained(config, stage, state, course.workdir)
    if stage.pretrained.use == "start":
        return state, 0, {}
    checkpoint.save(course.folder, course.steps, state, {"steps": course.steps}, config=course.identity)
    return state, course.steps, {}


def saved_identity(course: Course, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, as this version writes it."""
    if "images" not in saved:
        log(f"{course.folder}: an earlier version wrote it, without digests of its images: they are not compared")
    found = {"images": course.identity["images"], **saved}
    same = saved.get("recipe", {}).get("system") == course.config.system
    return found | ({"recipe": saved_recipe(saved["recipe"], course.config)} if same else {})


def images_read(course: Course) -> str:
    """How many images a stage learns from, and how many more only check it, in words."""
    checking = len({*np.concatenate([[], *course.checked_rows]).tolist()} - {*course.tables[0].tolist()})
    return counted(len(course.tables[0]), "images") + f" ({checking} more only check the training)" * bool(checking)


def take_steps(
    course: Course, programs: dict[Any, Callable], state: State, start: int, position: dict[str, Any]
) -> State:
    """The training loop: the steps of a stage from `start` on.

    Its order: run a dispatch of one or several steps; run the checks; fetch metrics and save; fetch metrics; stop.
    Metrics of the newest dispatch are fetched after the next one runs.
    """
    config, stage, mesh, steps = course.config, course.stage, course.mesh, course.steps
    n, name = config.replicates, stage.name
    if (least := min(len(table) for table in course.tables)) < stage.batch:
        log(f"warning: {name}: {counted(least, 'images')} for a batch of {stage.batch}: images repeat within it")
    seeds = [config.seed + r for r in range(n)]
    samples = course.samples
    if stage.size:
        assert isinstance(samples, Images)  # volumes have crops of data.size
        samples = samples.at(stage.size)
    iterator = batches(
        samples, course.tables, batch=stage.batch, seeds=seeds, shuffle=stage.shuffle, host=stage.host_arrays
    )
    if position:
        iterator.set_state(position["data"])
    volumes = None if (resident := samples.resident()) is None else place_whole(resident, mesh)
    del resident
    crop = () if volumes is None else tuple(config.data.size)
    length = steps_of_dispatch(config, stage, stage.batch / mesh.size)

    def program(compile: Callable, *last: Any) -> Callable:
        """A compiled step. Stages that share a step share it."""
        step = skipping(stage.step) if config.skip_nonfinite else stage.step
        form = (compile, step, steps, *last)
        if form not in programs:
            programs[form] = compile(step, steps, n, crop, mesh, *last)
        return programs[form]

    one_step = {phase: program(compiled_step, phase) for phase in dict.fromkeys(stage.phases)}
    several = program(compiled_steps, stage.phases, length) if length > 1 else None
    checks = [
        (
            check.every or max(1, len(course.tables[0]) // stage.batch),
            compiled_check(check.look, n, crop, mesh),
            place_whole(check_batch(rows, check, course.samples), mesh),
        )
        for check, rows in zip(stage.checks, course.checked_rows, strict=True)
        if rows.size
    ]
    if stage.watch and course.watched:
        batch = check_batch(stage.watch.rows(course.watched.rows), stage.watch, course.watched)
        checks.append((stage.watch.every, compiled_check(stage.watch.look, n, (), mesh), place_whole(batch, mesh)))
    elif stage.watch:
        log(f"{name}: no held-out normals (val rows of label 0, or data.calibration), so no figures of them")
    halts = [config.checkpoint_every, *(every for every, *_ in checks)]
    log(f"{name}: {images_read(course)}, steps {start} to {steps}, batch {stage.batch}, compiling")
    with (
        progress(name, start, steps, stage.words, course.later) as show,
        lines_to_loggers(config, course.workdir, name, start) as draw,
        profiling(config, course.workdir, name) as profile,
        signals() as stopped,
    ):
        record = Record(course, [show, draw], start, position.get("seen", []), position.get("skipped", 0))
        done = start
        while done < steps:
            count = next_dispatch(done, steps, length, len(stage.phases), halts)
            profile(done, state)
            taken = [next(iterator) for _ in range(count)]
            if several and count == length:
                whole = jax.tree.map(lambda *arrays: np.stack(arrays), *taken)
                batch = place_batch(whole, mesh, axis=1 + int(n > 1))
                state, metrics = several(state, batch, course.keys, course.results, volumes)
            else:
                batch = place_batch(taken[0], mesh, axis=int(n > 1))
                step = one_step[stage.phases[done % len(stage.phases)]]
                state, metrics = step(state, batch, course.keys, course.results, volumes)
            if done == start:
                jax.block_until_ready(state)  # compiled: the pace is measured from here
                show({"step": done + count})
            record.add(done + 1, [batch["index"] for batch in taken], metrics)
            done += count
            stop = stopped(done == steps)
            for every, look, looked_at in checks:
                if done % every == 0 or done == steps:
                    record.fetch()
                    with at_work(f"{name}: looking at held-out images at step {done}"):
                        state, metrics = look(state, looked_at, course.results, volumes)
                        record.add_check(done, jax.device_get(metrics))
            if done % config.checkpoint_every == 0 or done == steps or stop:
                record.fetch()  # a state is saved only after its losses and its weights were looked at
                if not finite((state.params, state.stats)):
                    raise NonFiniteLoss(f"stage {name}, step {done}: weights not finite; {record.remedy()}")
                position = {"data": iterator.get_state(), "seen": record.since_line, "steps": steps}
                position |= {"skipped": record.skipped} if record.skipped else {}
                checkpoint.save(course.folder, done, state, position, config=course.identity)
                record.saved = done
            else:
                record.fetch_old(done)
            if stop:
                where = f"stage {name}, step {done} saved in {course.folder}"
                raise Stopped(f"stopped by {stop.name}: {where}: to go on: {resuming(course.workdir)}", stop)
        profile(done, state)
    return state


class Record:
    """The metrics of a stage: fetched from the device, looked at, and written a line every `log_every` steps.

    Attributes:
        pending: dispatches (first step, samples' numbers, metrics) whose metrics are still on the device.
        since_line: metrics of the steps since the last line; a checkpoint holds them.
        saved: the last step that was saved.
        skipped: steps of the stage so far whose update was dropped (`skip_nonfinite`).
    """

    def __init__(
        self,
        course: Course,
        readers: Sequence[Callable[[Mapping], None]],
        start: int,
        since_line: list[dict[str, float]],
        skipped: int = 0,
    ):
        self.course, self.readers, self.saved, self.since_line = course, readers, start, since_line
        self.skipped = skipped
        self.pending: list[tuple[int, list[np.ndarray], dict]] = []
        self.clock: tuple[float, int] | None = None  # time and step of this process's last fetch
        self.pace: dict[str, float] = {}

    def add(self, first: int, indices: list[np.ndarray], metrics: dict) -> None:
        """Takes over the metrics of a dispatch."""
        self.pending.append((first, indices, metrics))

    def fetch_old(self, done: int) -> None:
        """Fetches all metrics but the newest, where a line is due: the device goes on meanwhile."""
        if self.pending and done - self.pending[0][0] >= self.course.config.log_every:
            *old, newest = self.pending
            self.pending = old
            self.fetch()
            self.pending = [newest]

    def fetch(self) -> None:
        """Fetches all metrics and writes lines. Raises NonFiniteLoss at the first step where one is not finite."""
        fetched = jax.device_get([metrics for *_, metrics in self.pending])
        if self.pending:
            self._measure(self.pending[-1][0] + len(self.pending[-1][1]) - 1)
        for (first, indices, _), metrics in zip(self.pending, fetched, strict=True):
            for i, index in enumerate(indices):
                one = metrics if len(indices) == 1 else {name: value[i] for name, value in metrics.items()}
                self._step(first + i, index, one)
        self.pending = []

    def _step(self, step: int, index: np.ndarray, metrics: dict) -> None:
        course = self.course
        if bad := [name for name, value in metrics.items() if not np.isfinite(value).all()]:
            replicate = int(np.argmin(np.isfinite(metrics[bad[0]])))  # the first one that failed
            table = course.tables[replicate]
            ids = ", ".join(course.samples.rows[i].id for i in table[np.atleast_2d(index)[replicate] % len(table)])
            what = f"stage {course.stage.name}, step {step}: {' and '.join(bad)} not finite; batch: {ids}"
            if self.skipped >= course.config.skip_nonfinite:
                raise NonFiniteLoss(f"{what}; {self.remedy()}")
            self.skipped += 1
            log(f"warning: {what}; its update is dropped: {self.skipped} of {course.config.skip_nonfinite}")
        else:
            self.since_line.append({name: float(np.mean(value)) for name, value in metrics.items()})
        if self.since_line and (step % course.config.log_every == 0 or step == course.steps):
            names = self.since_line[0]
            means = {name: float(np.mean([one[name] for one in self.since_line])) for name in names}
            self._write(step, means | ({"skipped": self.skipped} if self.skipped else {}) | self.pace)
            self.since_line.clear()

    def _measure(self, step: int) -> None:
        """Measures the mean time of a step, from the last fetch to a step that is now known to be done."""
        now = time.monotonic()
        if self.clock and step > self.clock[1]:
            seconds = (now - self.clock[0]) / (step - self.clock[1])
            samples = self.course.stage.batch * self.course.config.replicates / max(seconds, 1e-9)
            self.pace = {"step_seconds": round(seconds, 6), "samples_per_second": round(samples, 3)}
        self.clock = (now, step)

    def add_check(self, step: int, metrics: dict) -> None:
        """Writes the metrics of a check. Raises NonFiniteLoss where a rule's value is not finite."""
        means = {name: float(np.mean(value)) for name, value in metrics.items()}
        if bad := [name for name in ("aucp",) if not np.isfinite(means.get(name, 0))]:
            where = f"stage {self.course.stage.name}, step {step}"
            raise NonFiniteLoss(f"{where}: scores not finite ({bad[0]}); {self.remedy()}")
        self._write(step, means)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"stage": self.course.stage.name, "step": step, **metrics, "time": round(time.time(), 3)}
        add_history(self.course.history, line)
        for reader in self.readers:
            reader(line)

    def remedy(self) -> str:
        """Which step is saved, and what to do about a number that is not finite."""
        kept = f"step {self.saved} is kept in {self.course.folder}" if self.saved else "no step was saved yet"
        return f"{kept}: lower the stage's lr, or mend these images"


def check_batch(rows: np.ndarray, check: Check, samples: Samples) -> dict[str, np.ndarray]:
    """The samples of rows that a check looks at."""
    rows = np.resize(rows, check.samples or len(rows))
    numbers, own = np.arange(len(rows)), [samples.rows[i] for i in rows]
    label = [row.label if row.split == "val" and row.label is not None else -1 for row in own]
    more = {"index": numbers, "case": samples.words[rows], "label": np.array(label, np.int32)}
    more |= {"unlabeled": np.array([row.split == "unlabeled" for row in own])}
    return samples.samples(rows, numbers, CHECK_STEP, 0) | more


sys.modules[__name__].__class__ = Train  # `jmae.train(...)`

if __name__ == "__main__":
    sys.exit(exit_code(main))
