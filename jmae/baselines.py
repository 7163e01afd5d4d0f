"""Baselines, printed beside every system: what brightness and linear statistics alone already tell.

Cheap baselines have scores of their own. Their images are shrunk to 64 x 64 (volumes: at most 32 a side) and, except
for brightness and contrast, standardised one by one. A system that does not beat them has not read the anatomy. Where
there are unlabelled images, one more baseline uses them, without a label. Rivals (`jmae.rivals`) stand in for a
system's network and have the system's own scores.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter

from jmae.data.cases import Cases
from jmae.data.crops import Volumes
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.data.transforms import area_resize, central
from jmae.figures import Part, Split
from jmae.inference import Scorer
from jmae.recipe import is_volume
from jmae.results import Result
from jmae.ridge import ridge
from jmae.rival_scores import CROPS, RivalScores, fitted_rivals, random_crops, some_images
from jmae.run_folder import log
from jmae.scoring import top_mean
from jmae.system import Results, System
from jmae.waiting import at_work
from jmae.windows import average, tile

COMPONENTS = 30
NEIGHBOURS = 5
RIDGE_SIDE, RIDGE = 32, 1000.0  # pixels a side and penalty of the ridge regression; 300 to 3000 differ little
EXPLAINED = 64  # images or crops of held-out normals, for the explained variance of hidden patches
OPENED = 8  # volumes that these crops come from, at most


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
    """The scores (m,) of each cheap baseline, one an image. Higher is more abnormal.

    - `mean intensity` and `low mean intensity`: the mean over pixels and channels, and its negative. Only labels tell
      which of the two is better, so both are given.
    - `standard deviation` and `low standard deviation`: the same of the standard deviation, which is contrast.
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
    brightness, contrast = new.mean(1), new.std(1)
    known, new = _standardise(known), _standardise(new)
    mean, components, variances = _principal(known)
    code = (new - mean) @ components.T
    squared = (new**2).sum(1)[:, None] - 2 * new @ known.T + (known**2).sum(1)
    nearest = np.sort(np.sqrt(np.maximum(squared, 0)), 1)[:, :NEIGHBOURS]
    return {
        "mean intensity": brightness,
        "low mean intensity": -brightness,
        "standard deviation": contrast,
        "low standard deviation": -contrast,
        "PCA-30 error": ((new - mean - code @ components) ** 2).mean(1),
        "Mahalanobis": (code**2 / variances).sum(1),
        "5-NN": nearest.mean(1),
    }


def ridge_scores(normals: NDArray, unlabelled: NDArray, test: NDArray, penalty: float = RIDGE) -> NDArray[np.float64]:
    """Ridge regression of training normals (-1) against all unlabelled images (+1): its value for new images (m,).

    Images are shrunk to 32 x 32 and standardised per image.

    Args:
        normals: (n, *size, c) at the system's working size.
        unlabelled: (k, *size, c).
        test: (m, *size, c).
        penalty: lambda, on the squared weights.
    """
    known, mixed, new = (_standardise(_flat(shrink(images, RIDGE_SIDE))) for images in (normals, unlabelled, test))
    weights, offset = ridge(known, mixed, penalty)
    return new @ weights + offset


def crop_components(volumes: Volumes, crops: int = CROPS) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (d,) and at most 30 principal components (k, d) of random training crops; fewer than `crops` where they
    would take more than 512 MB."""
    d = int(np.prod(volumes.crop)) * volumes.arrays[0].shape[-1]
    cut = random_crops(volumes, max(COMPONENTS + 1, min(crops, 2**26 // d)))
    mean, components, _ = _principal(_flat(cut))
    return mean.astype(np.float32), components.astype(np.float32)


def span_of(train: NDArray) -> tuple[NDArray, NDArray]:
    """Mean (d,) and at most 30 principal components (k, d) of normal images (n, *size, c), standardised per image."""
    mean, components, _ = _principal(_standardise(_flat(train)))
    return mean, components


def pixel_maps(span: tuple[NDArray, NDArray], test: NDArray) -> dict[str, NDArray[np.float32]]:
    """Maps (m, *size) of the baselines that have one.

    `brightness` is the mean over channels. `PCA-30 error` is the squared residual of the standardised image outside the
    span of 30 principal components of the normals, mean over channels.

    Args:
        span: as `span_of` gives it.
        test: (m, *size, c) images at the system's working size.
    """
    mean, components = span
    new = _standardise(_flat(test))
    residual = new - mean - ((new - mean) @ components.T) @ components
    return {
        "brightness": test.mean(-1, dtype=np.float32),
        "PCA-30 error": (residual**2).reshape(test.shape).mean(-1).astype(np.float32),
    }


# --- beside a system --------------------------------------------------------------------------------------------------


@runtime_checkable
class Cheap(Protocol):
    """The cheap baselines of one evaluation, which are given its cases one by one."""

    def maps(self, case: Prepared) -> dict[str, np.ndarray]:
        """The baselines' maps of a case, each on the case's own grid."""

    def add(self, case: Prepared, maps: dict[str, np.ndarray]) -> None:
        """Takes the next case, with its maps, into `scores`."""

    def scores(self, share: float) -> dict[str, np.ndarray]:
        """Scores (1, n) of the n cases that were added, computed on the central `share` of each axis."""


class NoBaselines:
    """Stands where there is nothing to compare with."""

    def maps(self, case: Prepared) -> dict[str, np.ndarray]:
        return {}

    def add(self, case: Prepared, maps: dict[str, np.ndarray]) -> None:
        pass

    def scores(self, share: float) -> dict[str, np.ndarray]:
        return {}


class ImageBaselines:
    """The baselines of images, fitted to training normals. Images are kept shrunk, as all may not fit in memory.

    Args:
        normals: images of the normals.
        shares: central shares of each axis for which scores are wanted.
        pixels: whether maps are wanted.
        unlabelled: images of the split `unlabeled`, for the ridge regression; None leaves it out.
    """

    def __init__(self, normals: Images, shares: Sequence[float], pixels: bool, unlabelled: Images | None = None):
        self.side = 64 if len(normals.size) == 2 else 32
        self.normals = {share: self._all_small(normals, share, self.side) for share in shares}
        self.unlabelled = {share: self._all_small(unlabelled, share, RIDGE_SIDE) for share in shares if unlabelled}
        self.cases: dict[float, list[np.ndarray]] = {share: [] for share in shares}
        self.span = span_of(normals.image(np.arange(len(normals.rows)))) if pixels else None

    def _all_small(self, images: Images, share: float, side: int) -> np.ndarray:
        one = lambda i: shrink(self._small(images.image(np.array([i]))[0], share)[None], side)[0]
        return np.stack([one(i) for i in range(len(images.rows))])

    def _small(self, image: np.ndarray, share: float) -> np.ndarray:
        middle = np.stack([central(channel, share) for channel in np.moveaxis(image, -1, 0)], -1)
        return shrink(middle[None], self.side)[0]

    def maps(self, case: Prepared) -> dict[str, np.ndarray]:
        if self.span is None:
            return {}
        return {name: case.on_own_grid(m[0]) for name, m in pixel_maps(self.span, case.array[None]).items()}

    def add(self, case: Prepared, maps: dict[str, np.ndarray]) -> None:
        for share, cases in self.cases.items():
            cases.append(self._small(case.array, share))

    def scores(self, share: float) -> dict[str, np.ndarray]:
        cases = np.stack(self.cases[share])
        found = image_scores(self.normals[share], cases)
        if self.unlabelled:
            found["ridge, unlabelled"] = ridge_scores(self.normals[share], self.unlabelled[share], cases)
        return {name: np.asarray(values)[None] for name, values in found.items()}


class VolumeBaselines:
    """The baselines of volumes: maps of single voxels or windows, and scores from them.

    The maps are:
      - the brightness of every channel, standardised as the volume is;
      - the residual outside the principal components of random training crops, in the system's own windows;
      - the subtraction image (`read_subtraction`) of rows that name series before and after contrast. It has passed the
        minimum filter `evaluation.filter` where the recipe has one.

    A score is the mean of the highest voxels in the region, as the system's own. A row without a label has none.

    Args:
        config: the recipe.
        system: a system of volumes.
        train: the training volumes; None leaves out the residual.
    """

    def __init__(self, config: ConfigDict, system: System, train: Volumes | None):
        self.config = config
        self.residual = train and residual_scorer(config, system, train)
        self.cases: list[dict[str, float]] = []
        self.labelled: list[bool] = []

    def maps(self, case: Prepared) -> dict[str, np.ndarray]:
        row, volume = case.row, case.volume
        if row.label is None:
            return {}
        assert volume
        channels = volume.stored.array.shape[-1]
        name = lambda k: "brightness" if channels == 1 else f"brightness of channel {k}"
        standard = (volume.stored.array - volume.mean) / volume.std  # scanners differ in scale
        found = {name(k): standard[..., k] for k in range(channels)}
        if self.residual:
            (result,) = self.residual.score([case])
            found["PCA-30 error"] = case.on_own_grid(result.maps["residual"][0])
        if case.subtraction is not None:
            edges = self.config.evaluation.get("filter", (1,) * len(volume.grid.size))
            subtracted = minimum_filter(case.subtraction, edges)
            found["subtraction"] = case.on_own_grid(subtracted)
        return found

    def add(self, case: Prepared, maps: dict[str, np.ndarray]) -> None:
        assert case.volume
        region, inside = case.region, case.scored_voxels()
        region = inside if region is None else region & inside
        ends = maps | {f"low {name}": -m for name, m in maps.items() if name.startswith("brightness")}
        self.cases.append({name: top_mean(m, region, self.config.evaluation.top) for name, m in ends.items()})
        self.labelled.append(case.row.label is not None)

    def scores(self, share: float) -> dict[str, np.ndarray]:
        """Scores that every labelled case has; a case without a label has nan."""
        known = [scores for scores, labelled in zip(self.cases, self.labelled, strict=True) if labelled]
        names = [name for name in (known[0] if known else ()) if all(name in scores for scores in known)]
        return {name: np.array([[scores.get(name, np.nan) for scores in self.cases]]) for name in names}


def residual_scorer(config: ConfigDict, system: System, train: Volumes) -> Scorer:
    """A scorer whose map "residual" is the squared error outside the principal components of training crops."""
    assert system.sweep
    mean, components = crop_components(train)

    def score(results: Any, image: Array, keys: Array, groups: Array) -> tuple[Array, Array]:
        rest = image.reshape(len(image), -1) - results["mean"]
        rest = rest - (rest @ results["components"].T) @ results["components"]
        error = jnp.mean(rest.reshape(image.shape) ** 2, -1, keepdims=True)
        return error, jnp.ones_like(error)

    fuse = lambda results, averages, inside: {"maps": {"residual": averages[..., 0]}}
    sweep = replace(
        system.sweep,
        repeats=1,
        score=score,
        fuse=fuse,
        average=average,
        tile=tile,
        example=None,
        further=None,
        further_maps=(),
    )
    single = config.copy_and_resolve_references()
    single.replicates = 1
    results: Any = {"mean": mean, "components": components}
    return Scorer(single, replace(system, sweep=sweep), results)


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass
class Baselines:
    """The cheap baselines of one evaluation, and the rivals of its system's network, where it has some."""

    cheap: Cheap
    rivals: RivalScores | None = None

    def beside(
        self, results: Iterable[Result], *, count: bool = True
    ) -> Iterator[tuple[Result, dict[str, np.ndarray]]]:
        """Each result with the baselines' maps of its case, on the case's own grid. With `count` the cases enter
        `scores`."""
        results = iter(results)
        while group := list(islice(results, self.rivals.at_once if self.rivals else 1)):
            cases = [result.case for result in group]
            others = self.rivals.score(cases) if self.rivals else [dict[str, Result]()] * len(cases)
            for result, other in zip(group, others, strict=True):
                maps = self.cheap.maps(result.case)
                if count:
                    self.cheap.add(result.case, maps)
                    if self.rivals:
                        self.rivals.add(other)
                yield result, maps | (self.rivals.maps(other) if self.rivals else {})

    def scores(self, share: float) -> dict[str, np.ndarray]:
        """Scores (1, n) of the n cases that were counted, computed on the central `share` of each axis."""
        return self.cheap.scores(share) | (self.rivals.scores(share) if self.rivals else {})

    def explained(self, results: Results, cases: Cases, normals: Sequence[Row]) -> dict[str, float]:
        """As `Predictions.explained`, of at most `EXPLAINED` images or crops of held-out normals; {} without rivals or
        without held-out normals."""
        predictions = self.rivals and self.rivals.predictions
        if not predictions or not normals:
            return {}
        some = normals[:: -(-len(normals) // OPENED)]
        held_out = cases.volumes(some) if is_volume(predictions.config) else cases.images(normals)
        return predictions.explained(results, some_images(held_out, EXPLAINED))


@at_work("reading the training images for the baselines")
def baselines_of(
    config: ConfigDict, system: System, cases: Cases, rows: Sequence[Row], split: Split, parts: Mapping[str, Part]
) -> Baselines:
    """The baselines of an evaluation. Only the first process has some."""
    train = [row for row in rows if row.split == "train"]
    if split.labelled.any() and not train:
        log("the manifest has no train rows, so there are no baselines fitted to them")
    if jax.process_index() or not split.labelled.any():
        return Baselines(NoBaselines())
    if system.sweep:
        volumes = cases.volumes(train) if train else None
        return Baselines(VolumeBaselines(config, system, volumes), fitted_rivals(config, system, volumes, rows, cases))
    if not (normals := [row for row in train if row.label != 1]):
        return Baselines(NoBaselines())
    shares = sorted({part.share for part in parts.values()})
    unlabelled = [row for row in rows if row.split == "unlabeled"]
    images, mixed = cases.images(normals), cases.images(unlabelled) if unlabelled else None
    cheap = ImageBaselines(images, shares, pixels=split.marked, unlabelled=mixed)
    return Baselines(cheap, fitted_rivals(config, system, images, rows, cases))
