"""Cheap baselines, printed beside every system: what brightness and linear statistics alone already tell.

Image scores are computed on images shrunk to 64 x 64 (volumes: at most 32 a side) and, brightness apart,
standardised per image. A system that does not beat them has not read the anatomy.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter

from jmae.data.crops import Volumes
from jmae.data.loader import Images, case_words
from jmae.data.manifest import Row
from jmae.data.transforms import area_resize, central
from jmae.data.volumes import Volume, read_subtraction
from jmae.inference import Scored, sweeper
from jmae.system import System
from jmae.windows import average

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


def baseline_scores(
    normals: Images, images: Images, n: int, *, mapped: int, share: float = 1.0, pixels: bool = False
) -> Scored:
    """The cheap baselines on the first `n` of `images`, fitted to the training normals, both cut to the central
    `share`; with `pixels` also the maps of the first `mapped`. Images are shrunk one by one, as all may not fit in
    memory at once."""
    side = 64 if len(images.size) == 2 else 32
    cut = lambda image: np.stack([central(channel, share) for channel in np.moveaxis(image, -1, 0)], -1)
    small = lambda i, of: shrink(cut(of.image(np.array([i]))[0])[None], side)[0]
    train, test = (np.stack([small(i, of) for i in range(m)]) for of, m in ((normals, len(normals.rows)), (images, n)))
    scores, maps = image_scores(train, test), {}
    if pixels:
        whole = lambda of, m: of.image(np.arange(m))
        maps = pixel_maps(whole(normals, len(normals.rows)), whole(images, mapped))
    lead = lambda values: {name: np.asarray(value)[None] for name, value in values.items()}
    return Scored(lead(maps), lead(scores))


def volume_baselines(
    config: ConfigDict, system: System, volumes: Volumes | None
) -> Callable[[Row, Volume], dict[str, np.ndarray]]:
    """The function (row, prepared volume) -> the cheap baselines' maps on the row's own grid: every channel's
    brightness, standardised as the volume is; the residual of random training crops' principal components in the
    system's own windows; the subtraction image (MAEMI's Eq. 1) of rows that name pre- and post-contrast series."""
    assert system.sweep
    residual = None
    if volumes:
        mean, components = crop_components(volumes)

        def score(results: Any, image: Array, keys: Array) -> tuple[Array, Array]:
            rest = image.reshape(len(image), -1) - results["mean"]
            rest = rest - (rest @ results["components"].T) @ results["components"]
            error = jnp.mean(rest.reshape(image.shape) ** 2, -1, keepdims=True)
            return error, jnp.ones_like(error)

        fuse = lambda averages, inside: {"maps": {"residual": averages[..., 0]}}
        part = replace(system.sweep, repeats=1, score=score, fuse=fuse, average=average)
        single = config.copy_and_resolve_references()
        single.replicates = 1
        residual = sweeper(single, part, {"mean": mean, "components": components})

    def maps(row: Row, volume: Volume) -> dict[str, np.ndarray]:
        if row.label is None:
            return {}  # nothing to hold them against
        channels = volume.stored.array.shape[-1]
        name = lambda k: "brightness" if channels == 1 else f"brightness of channel {k}"
        standard = (volume.stored.array - volume.mean) / volume.std  # scanners differ in scale
        out = {name(k): standard[..., k] for k in range(channels)}
        if residual:
            out["PCA-30 error"] = volume.grid.back(residual(volume, case_words(row.id))["maps"]["residual"][0])
        if row.pre and row.post:
            subtracted = read_subtraction(row, volume, config.data)
            out["subtraction"] = volume.grid.back(minimum_filter(subtracted, config.evaluation.filter))
        return out

    return maps
