"""Cheap baselines, printed beside every system: what brightness and linear statistics alone already tell.

Image scores are computed on images shrunk to 64 x 64 (volumes: at most 32 a side) and, brightness apart,
standardised per image. A system that does not beat them has not read the anatomy.
"""

import numpy as np
from numpy.typing import NDArray

from jmae.data.crops import Volumes
from jmae.data.transforms import area_resize

COMPONENTS = 30
NEIGHBOURS = 5


def shrink(images: NDArray, limit: int) -> NDArray:
    """Area-averages every spatial axis longer than `limit` down to it: (n, *size, c) -> (n, *small, c)."""
    return area_resize(images, (len(images), *(min(n, limit) for n in images.shape[1:-1])))


def _flat(images: NDArray) -> NDArray[np.float64]:
    return images.reshape(len(images), -1).astype(np.float64)


def _standardise(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rows - rows.mean(1, keepdims=True)) / np.maximum(rows.std(1, keepdims=True), 1e-12)


def _principal(train: NDArray[np.float64]) -> tuple[NDArray, NDArray, NDArray]:
    """Mean (d,), the leading components (k, d) and their variances (k,) of rows (n, d).

    By the n x n Gram matrix: with n << d a thousand times cheaper than the covariance.
    """
    mean = train.mean(0)
    centred = train - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    rank = min(COMPONENTS, int((values > 1e-9 * values[-1]).sum()))
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    return mean, (vectors / np.sqrt(values)).T @ centred, values / len(train)


def image_scores(train: NDArray, test: NDArray) -> dict[str, NDArray[np.float64]]:
    """One score an image (m,), higher is more abnormal, of every cheap baseline.

    - `mean intensity` and `low mean intensity`: the mean over pixels and channels, and its negative. Which of
      the two is the better takes labels, so both are given.
    - `PCA-30 error`: mean squared residual outside the span of 30 principal components of the normals.
    - `Mahalanobis`: squared distance to the normals' mean within that span, each component divided by its
      variance. With far fewer images than pixels the full covariance has no inverse.
    - `5-NN`: mean Euclidean distance to the five nearest normals.

    Args:
        train: (n, *size, c) normal images at the system's working size.
        test: (m, *size, c).
    """
    limit = 64 if train.ndim == 4 else 32
    known, new = _flat(shrink(train, limit)), _flat(shrink(test, limit))
    brightness = new.mean(1)
    known, new = _standardise(known), _standardise(new)
    mean, components, variances = _principal(known)
    code = (new - mean) @ components.T
    squared = (new**2).sum(1)[:, None] - 2 * new @ known.T + (known**2).sum(1)
    nearest = np.sort(np.sqrt(np.maximum(squared, 0)), 1)[:, :NEIGHBOURS]
    return {
        "mean intensity": brightness,
        "low mean intensity": -brightness,
        "PCA-30 error": ((new - mean - code @ components) ** 2).mean(1),
        "Mahalanobis": (code**2 / variances).sum(1),
        "5-NN": nearest.mean(1),
    }


def crop_components(volumes: Volumes, crops: int = 256) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (d,) and at most 30 principal components (k, d) of random training crops, the same at every call; fewer
    than `crops` where they would take more than 512 MB."""
    d = int(np.prod(volumes.crop)) * volumes.arrays[0].shape[-1]
    rows = np.arange(max(COMPONENTS + 1, min(crops, 2**26 // d))) % len(volumes.rows)
    cut = [volumes.crop_at(row, volumes.origin(row, step, 0)) for step, row in enumerate(rows)]
    mean, components, _ = _principal(_flat(np.stack(cut)))
    return mean.astype(np.float32), components.astype(np.float32)


def pixel_maps(train: NDArray, test: NDArray) -> dict[str, NDArray[np.float32]]:
    """Maps (m, *size) of the baselines that have one, at the working size and standardised per image.

    `brightness` is the mean over channels, `PCA-30 error` the squared residual outside the span of 30 principal
    components of the normals, mean over channels.

    Args:
        train: (n, *size, c) normal images.
        test: (m, *size, c).
    """
    known, new = _standardise(_flat(train)), _standardise(_flat(test))
    mean, components, _ = _principal(known)
    residual = new - mean - ((new - mean) @ components.T) @ components
    return {
        "brightness": test.mean(-1, dtype=np.float32),
        "PCA-30 error": (residual**2).reshape(test.shape).mean(-1).astype(np.float32),
    }
