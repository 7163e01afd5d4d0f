"""jmae: unsupervised anomaly detection in medical images with masked autoencoders and their relatives."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jmae.predict import Prediction

__version__ = "0.1.0"


def load(workdir: str | os.PathLike) -> "Callable[..., Prediction]":
    """The function `predict(image, spacing=None, affine=None, id="")` of a run folder: `jmae.predict.load`."""
    from jmae import predict  # a run needs all of the library, which takes seconds to import

    return predict.load(workdir)
