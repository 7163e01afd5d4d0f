"""Ridge regression of normal against unlabelled images, each a row of numbers.

No label is used: some unlabelled images are abnormal, and that suffices. Elkan and Noto, "Learning classifiers from
only positive and unlabeled data", KDD 2008, show why: where the known images are a random part of their class, the best
classifier of known against unlabelled images ranks images as the best one of the two classes does. Any other difference
between the known and the unlabelled images counts as well, such as another scanner.
"""

import numpy as np
from jaxtyping import Float


def ridge(
    normal: Float[np.ndarray, "n d"], unlabelled: Float[np.ndarray, "k d"], penalty: float
) -> tuple[Float[np.ndarray, " d"], float]:
    """(weights, offset) of the regression of normal rows (-1) and unlabelled ones (+1), in float64: a new row x has the
    value x @ weights + offset.

    The solution is closed, with an intercept that has no penalty.

    Args:
        penalty: lambda, on the squared weights.
    """
    x = np.concatenate([normal, unlabelled]).astype(np.float64)
    y = np.repeat([-1.0, 1.0], [len(normal), len(unlabelled)])
    centre, mean = x.mean(0), y.mean()
    x, y = x - centre, y - mean
    if len(x) < x.shape[1]:  # the dual form: a smaller system, the same weights
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return weights, float(mean - centre @ weights)


def standardised_ridge(
    normal: Float[np.ndarray, "n d"], unlabelled: Float[np.ndarray, "k d"], penalty: float | None = None
) -> tuple[Float[np.ndarray, " d"], float]:
    """The same, of numbers that are first standardised over all rows. The weights are those of the numbers as they are.

    Args:
        penalty: as in `ridge`; None: d, so that it weighs as much at any width.
    """
    rows = np.concatenate([normal, unlabelled]).astype(np.float64)
    scale = np.maximum(rows.std(0), 1e-12)
    weights, offset = ridge(normal / scale, unlabelled / scale, rows.shape[1] if penalty is None else penalty)
    return weights / scale, offset
