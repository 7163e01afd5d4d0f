"""Scores of the rivals of a system's network: in its place under its own score, or as systems of their own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jmae.data.cases import Cases
from jmae.data.crops import Volumes
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.errors import InputError
from jmae.figures import SplitScores
from jmae.fitting import computed, placed
from jmae.inference import Scorer
from jmae.masking import groups_of, run_masks, visible_tokens
from jmae.passes import seeds_of
from jmae.patches import grid_of, patchify
from jmae.results import Result, map_name
from jmae.rivals import KINDS, NORMALS, VALUES, explained, explained_sums, rivals_of
from jmae.run_folder import log
from jmae.system import Prediction, Results, Rival, System

CROPS = 256  # random crops of training volumes

Learn = Callable[[System, Any], Any]  # (system, a rival's results) -> the results with what the score learns (`fits`)


class RivalScores:
    """The rivals of a system's network, each with a scorer. A predictor scores under the system's own score and masks;
    a rival of `System.rivals` has a system of its own.

    Args:
        config: the recipe.
        learn: gives a rival's results what its score learns from images.
    """

    def __init__(self, config: ConfigDict, learn: Learn):
        self.config, self.learn = config.copy_and_resolve_references(), learn
        self.config.replicates = 1
        self.scorers: dict[str, Scorer] = {}
        self.found: dict[str, SplitScores] = {}
        self.predictions: Predictions | None = None

    def add_predictors(self, prediction: Prediction, normals: np.ndarray) -> None:
        """Adds the closed-form predictors, fitted to images or crops (j, *size, c) of training normals, as read. One
        compiled program serves them all."""
        first: Scorer | None = None
        found = Predictions(self.config, prediction, normals)
        other = prediction.beside(found.rivals.predict)
        for name in found.rivals.names:
            own = self.learn(other, found.parameters(name))
            first = first.with_results(own) if first else Scorer(self.config, other, own)
            self._add(name, first)
            self.predictions = found

    def add_rival(self, rival: Rival) -> None:
        """Adds a rival that is a system of its own."""
        results = placed(rival.results(jax.random.key(self.config.seed)))
        self._add(rival.name, Scorer(self.config, rival.system, self.learn(rival.system, results)))

    def _add(self, name: str, scorer: Scorer) -> None:
        self.scorers[name], self.found[name] = scorer, SplitScores()

    @property
    def at_once(self) -> int:
        """Cases that one pass takes."""
        return max((scorer.at_once for scorer in self.scorers.values()), default=1)

    def score(self, cases: Sequence[Prepared]) -> list[dict[str, Result]]:
        """For each case, the result of each rival by its name."""
        each = {name: scorer.score(cases) for name, scorer in self.scorers.items()}
        return [{name: results[i] for name, results in each.items()} for i in range(len(cases))]

    def maps(self, results: Mapping[str, Result]) -> dict[str, np.ndarray]:
        """The rivals' maps of a case, on the case's own grid: those of their primary scores."""
        shown = {name: map_name(self.scorers[name].system) for name in results}
        return {f"{name}: {m}": results[name].own_maps()[m][0] for name, m in shown.items() if m in results[name].maps}

    def add(self, results: Mapping[str, Result]) -> None:
        """Takes the results of the next case into `scores`."""
        for name, one in results.items():
            self.found[name].add(one.scores, one.maps)

    def scores(self, share: float) -> dict[str, np.ndarray]:
        """Scores (1, n) of the n cases that were added, "RIVAL: SCORE", on the central `share` of each axis."""
        return {f"{name}: {score}": v for name, own in self.found.items() for score, v in own.of(share).items()}


class Predictions:
    """Closed-form predictors of hidden patches beside a system's own network.

    Args:
        config: the recipe.
        prediction: of the system.
        normals: images or crops (j, *size, c) of training normals, as read.
    """

    def __init__(self, config: ConfigDict, prediction: Prediction, normals: np.ndarray):
        self.config, self.prediction = config, prediction
        patches, size = jax.jit(self.patches)(normals), tuple(config.data.size)
        found = rivals_of(tuple(config.evaluation.rivals), patches, size, prediction.patch)
        self.rivals = found._replace(fitted=placed(found.fitted))

    def patches(self, images: Array) -> Array:
        """Images in patches, as the network sees them."""
        return patchify(self.prediction.view(images), self.prediction.patch)

    def parameters(self, name: str) -> PyTree:
        """The predictor's parameters of one rival, on each of this process's devices."""
        return placed(self.rivals.parameters(name))

    def explained(self, results: Results, images: np.ndarray) -> dict[str, float]:
        """The share of the variance of hidden values that the network and each rival explain; see `rivals.explained`.

        Args:
            results: those of the system, of one replicate.
            images: of held-out normals (k, *size, c), as read. They are hidden by one round of the masks of a test.
        """
        prediction, channels = self.prediction, jax.eval_shape(self.prediction.view, images[:1]).shape[-1]
        n = prod(grid_of(tuple(self.config.data.size), prediction.patch))
        visible = visible_tokens(n, prediction.ratio)
        keep, restore = run_masks(seeds_of(self.config)[0], jnp.arange(groups_of(n, visible)), n, visible)

        @partial(jax.jit, static_argnums=0)
        def sums(predict: Callable[..., Array], parameters: PyTree, images: Array) -> Array:
            def one(image: Array) -> Array:
                patches = self.patches(image[None])
                return explained_sums(predict(parameters, patches, keep, restore), patches, keep, restore)

            return jnp.sum(jax.lax.map(one, images), 0)

        network = {"the network": (prediction.predict, results)}
        others = {name: (self.rivals.predict, self.parameters(name)) for name in self.rivals.names}
        return {
            name: explained(np.asarray(sums(predict, parameters, images)), channels)
            for name, (predict, parameters) in (network | others).items()
        }


def fitted_rivals(
    config: ConfigDict, system: System, normals: Images | Volumes | None, rows: Sequence[Row], cases: Cases
) -> RivalScores | None:
    """The rivals of a system's network, fitted to its training normals; None where it has none.

    Each rival's score learns from images (`System.fits`), from the same rows among `rows` as the system's own score.
    """
    kinds, prediction = config.evaluation.rivals, system.prediction
    others = [rival for kind, rival in system.rivals.items() if kind in kinds]
    if normals is None or not (others or (prediction and set(kinds) & set(KINDS))):
        return None

    def learn(other: System, results: Any) -> Any:
        for fit in other.fits:
            chosen = [rows[i] for i in fit.rows(rows)]
            if not chosen or jax.process_count() > 1:
                raise InputError(f"{fit.name} is fitted in a single process, to rows: {fit.needs}")
            results = {**results, fit.name: placed(computed(found.config, other, fit, results, chosen, cases))}
        return results

    found = RivalScores(config, learn)
    try:
        if prediction and set(kinds) & set(KINDS):
            one = jax.ShapeDtypeStruct((1, *config.data.size, config.data.channels), jnp.float32)
            most = min(NORMALS, VALUES // prod(jax.eval_shape(prediction.view, one).shape))
            if most < 3:
                raise InputError(f"images of {tuple(config.data.size)} take too much memory")
            if len(normals.rows) > most and not isinstance(normals, Volumes):
                log(f"rivals of the network are fitted to {most} of {len(normals.rows)} training normals")
            found.add_predictors(prediction, some_images(normals, most))
        for rival in others:
            found.add_rival(rival)
        if not found.scorers:
            raise InputError("too few training normals")
    except InputError as error:
        log(f"no {'further ' if found.scorers else ''}rivals of the network: {error}")
    return found if found.scorers else None


def some_images(samples: Images | Volumes, most: int) -> np.ndarray:
    """At most `most` images, evenly spaced in the table; of volumes random crops, at most `CROPS`."""
    if isinstance(samples, Volumes):
        return random_crops(samples, min(most, CROPS))
    n = len(samples.rows)
    return samples.image(np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)))


def random_crops(volumes: Volumes, number: int) -> NDArray[np.float32]:
    """Random crops (number, *crop, c) of the volumes in turn, the same at every call."""
    rows = [step % len(volumes.rows) for step in range(number)]
    return np.stack([volumes.crop_at(row, volumes.origin(row, step, 0)) for step, row in enumerate(rows)])
