"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow get the same lines, through their packages.

Without further settings every logger writes below the run folder and sends nothing. WANDB_MODE and MLFLOW_TRACKING_URI
change that. MLflow's own usage data are off, unless MLFLOW_DISABLE_TELEMETRY says otherwise.
"""

import hashlib
import importlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jmae import recipe
from jmae.errors import InputError, Stopped
from jmae.run_folder import log, write_text

Write = Callable[[Mapping[str, float], int], None]
"""Writes metrics {name: value} of a step."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
PARAMS = 100  # most that MLflow takes at once
RUNS = "loggers.json"  # in the run folder: the runs that a continuation goes on with, {key: their id}


def package(name: str) -> Any:
    """The package of a logger, an optional dependency. Raises InputError where it is not installed."""
    if name == "mlflow":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at its import
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise InputError(f"loggers={name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}") from None


@contextmanager
def lines_to_loggers(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Callable[[Mapping], None]]:
    """Gives a function that writes a line of metrics to the recipe's `loggers`.

    Raises InputError where a logger does not start. One that fails later is dropped with a warning: no training ends
    by it.
    """
    names = config.loggers if jax.process_index() == 0 else ()
    with ExitStack() as stack:
        writers = dict[str, Write]()
        for name in names:
            logger = LOGGERS[name](config, workdir, stage, start)
            try:
                writers[name] = logger.__enter__()
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"loggers={name} does not start ({why(error)}): correct that, or leave it out"
                ) from error
            stack.push(partial(leave, name, logger))

        def write(line: Mapping) -> None:
            values = {name: value for name, value in line.items() if name not in ("stage", "step", "time")}
            for name, writer in list(writers.items()):
                try:
                    writer(values, line["step"])
                except Exception as error:
                    del writers[name]
                    what = f"loggers={name} failed at step {line['step']} ({why(error)})"
                    log(f"warning: {what}: it gets no further lines; metrics.jsonl has all")

        yield write


def leave(name: str, logger: AbstractContextManager[Write], *error: Any) -> None:
    """Ends a logger, with the error that ends its block. What the logger itself raises is logged as one line."""
    try:
        logger.__exit__(*error)
    except Exception as failure:
        log(f"warning: loggers={name} failed at its end ({why(failure)}); metrics.jsonl has all")


def why(error: Exception) -> str:
    """The first line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def known_run(workdir: Path, key: str, start: int) -> str | None:
    """The id of the run that a stage has written so far; None where the stage begins, or where none is known."""
    return runs_of(workdir).get(key) if start else None


def runs_of(workdir: Path) -> dict[str, str]:
    """The content of `RUNS`. Raises InputError where it is damaged."""
    try:
        return dict(json.loads((workdir / RUNS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{workdir / RUNS}: not read ({why(error)}): delete it, then loggers begin new runs"
        ) from error


def remember(workdir: Path, key: str, run: str) -> None:
    """Adds a run to `RUNS`."""
    write_text(workdir / RUNS, json.dumps(runs_of(workdir) | {key: run}, indent=1))


@contextmanager
def tensorboard(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Write]:
    """Event files in tensorboard/STAGE of the run folder."""
    # What a killed run wrote beyond its checkpoint is purged: its continuation writes it again.
    folder = str(workdir / "tensorboard" / stage)
    with package("tensorboard").SummaryWriter(folder, purge_step=start + 1) as writer:

        def write(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


@contextmanager
def wandb(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Write]:
    """A run of Weights & Biases for each stage, grouped by the run folder. With WANDB_MODE=online a continuation goes
    on in that run. Offline it is a run of its own, as the package cannot resume there.

    Its exit code is that of the command. A stage that was stopped counts as preempted: it is about to go on.
    """
    api, mode = package("wandb"), os.environ.get("WANDB_MODE", "offline")
    project = os.environ.get("WANDB_PROJECT", "jmae")
    key = f"wandb {project} {stage}"
    earlier = known_run(workdir, key, start) if mode == "online" else None
    run = api.init(
        project=project,
        group=workdir.absolute().name,
        name=None if earlier else f"{stage} from step {start}",
        id=earlier,
        resume="allow" if earlier else None,
        dir=str(workdir),
        config=config.to_dict(),
        mode=mode,
        reinit="create_new",  # leaves a run of the caller alone
        settings=api.Settings(silent=True, console="off"),
    )
    if mode == "online":
        remember(workdir, key, run.id)
    if mode == "offline":
        folder = workdir / "wandb"
        how = f"To send it: `wandb sync {shlex.quote(str(folder))}/offline-run-*`; to send at once, set"
        log(f"wandb: kept in {folder}; nothing is sent. {how} WANDB_MODE=online before the training")
    code = 1
    try:
        yield lambda values, step: run.log(dict(values), step=step)
        code = 0
    except (Stopped, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, Stopped) else 130
        run.mark_preempting()
        raise
    finally:
        run.finish(exit_code=code)


@contextmanager
def mlflow(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Write]:
    """A run of MLflow for each stage in the experiment `jmae`. A continuation goes on in it."""
    api, folder, status = package("mlflow"), (workdir / "mlflow").absolute(), "FAILED"
    uri, store = os.environ.get("MLFLOW_TRACKING_URI", ""), f"sqlite:///{folder}/mlflow.db"
    if not uri:
        folder.mkdir(parents=True, exist_ok=True)
        log(f"mlflow: kept in {folder}; to look: mlflow ui --backend-store-uri {shlex.quote(store)}")
    client = api.MlflowClient(uri or store)
    key = f"mlflow {stage} {hashlib.sha256(uri.encode()).hexdigest()[:8]}"  # a URI may hold a password
    run = known_run(workdir, key, start)
    if run:
        try:
            client.update_run(run, status="RUNNING")
        except Exception as error:
            log(f"mlflow: its run {run} cannot go on ({why(error)}): a new one begins")
            run = None
    begins = run is None
    if run is None:
        found = client.get_experiment_by_name("jmae")
        place = None if uri else folder.as_uri()
        experiment = found.experiment_id if found else client.create_experiment("jmae", place)
        run = client.create_run(
            experiment, run_name=f"{workdir.absolute().name}, {stage} from step {start}"
        ).info.run_id
        remember(workdir, key, run)

    def write(values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, metrics=[api.entities.Metric(name, value, now, step) for name, value in values.items()])

    try:
        params = [api.entities.Param(key, str(value)) for key, value in recipe.keys_of(config)] if begins else []
        for i in range(0, len(params), PARAMS):
            client.log_batch(run, params=params[i : i + PARAMS])
        yield write
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run, status)


LOGGERS: dict[str, Callable[[ConfigDict, Path, str, int], AbstractContextManager[Write]]]
LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
