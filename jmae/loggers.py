"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow get the same lines, through their packages.

Without further settings every logger writes below the run folder and sends nothing. Whoever sets WANDB_MODE or
MLFLOW_TRACKING_URI decides otherwise.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jmae import recipe
from jmae.errors import InputError
from jmae.run_folder import log

Write = Callable[[Mapping[str, float], int], None]
"""Writes metrics {name: value} of a step."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def package(name: str) -> Any:
    """The package of a logger, an optional dependency. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise InputError(f"loggers={name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}") from None


@contextmanager
def lines_to_loggers(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Callable[[Mapping], None]]:
    """Gives a function that writes a line of metrics to the recipe's `loggers`.

    Raises InputError where a logger does not start.
    """
    names = config.loggers if jax.process_index() == 0 else ()
    with ExitStack() as stack:
        writers = list[Write]()
        for name in names:
            try:
                writers.append(stack.enter_context(LOGGERS[name](config, workdir, stage, start)))
            except InputError:
                raise
            except Exception as error:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                raise InputError(f"loggers={name} does not start ({why}): correct that, or leave it out") from error

        def write(line: Mapping) -> None:
            values = {name: value for name, value in line.items() if name not in ("stage", "step", "time")}
            for writer in writers:
                writer(values, line["step"])

        yield write


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
    """A run of Weights & Biases for each stage, and for each continuation of one, grouped by the run folder."""
    api, mode = package("wandb"), os.environ.get("WANDB_MODE", "offline")
    run = api.init(
        project=os.environ.get("WANDB_PROJECT", "jmae"),
        group=workdir.absolute().name,
        name=f"{stage} from step {start}",
        dir=str(workdir),
        config=config.to_dict(),
        mode=mode,
        settings=api.Settings(silent=True, console="off"),
    )
    if mode == "offline":
        log(f"wandb: kept in {workdir / 'wandb'}, nothing is sent; to send: wandb sync, or WANDB_MODE=online before")
    with run:  # ends as failed where an error leaves the block
        yield lambda values, step: run.log(dict(values), step=step)


@contextmanager
def mlflow(config: ConfigDict, workdir: Path, stage: str, start: int) -> Iterator[Write]:
    """A run of MLflow for each stage, and for each continuation of one, in the experiment `jmae`."""
    folder, status = (workdir / "mlflow").absolute(), "FAILED"
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        folder.mkdir(parents=True, exist_ok=True)
        log(f"mlflow: kept in {folder}; to look: mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db")
    client = package("mlflow").MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name("jmae")
    place = None if uri else folder.as_uri()
    experiment = found.experiment_id if found else client.create_experiment("jmae", place)
    run = client.create_run(experiment, run_name=f"{workdir.absolute().name}, {stage} from step {start}").info.run_id

    def write(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    try:
        for key, value in recipe.keys_of(config):
            client.log_param(run, key, value)
        yield write
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


LOGGERS: dict[str, Callable[[ConfigDict, Path, str, int], AbstractContextManager[Write]]]
LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
