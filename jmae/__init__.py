"""jmae: unsupervised anomaly detection in medical images with masked autoencoders and their relatives."""

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

from jmae.errors import shortly
from jmae.python import Evaluate, Evaluation, Train, prepare

if TYPE_CHECKING:
    from jmae.predict import Run

    train: Train
    evaluate: Evaluate

__all__ = ["Evaluation", "evaluate", "load", "prepare", "train"]
__version__ = "0.1.0"


@shortly
def load(workdir: str | os.PathLike) -> "Run":
    """Opens a trained run. The run scores one case a call:

        run = jmae.load("runs/mine")
        one = run("film.png")  # a file, or an array
        one.score, one.p_value, one.warning, one.map, one.mask

    `help(run)` tells what a call takes, and `help(one)` what it gives.

    Raises InputError where the folder holds no finished run.
    """
    from jmae import predict  # a run needs all of the library, which takes seconds to import

    return predict.load(workdir)


def __getattr__(name: str) -> ModuleType:
    """The modules `train` and `evaluate`, which can be called; the import of jmae alone stays quick."""
    if name in ("train", "evaluate"):
        return importlib.import_module(f"jmae.{name}")
    raise AttributeError(f"module 'jmae' has no attribute {name!r}")
