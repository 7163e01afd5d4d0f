"""Scores from an encoder: how far the tokens of an image lie from those of normal images (ours).

h_i is token i of encoder block l, before the final norm, of an image that no mask hides; the decoder has no part in it.
I are the positions of the grid without its outermost rings. A normal image's token at a position near i is a member of
the bank B_i. The distance of token i is d_i = min over b in B_i of ||h_i - b||. An image's score is the mean of d_i.

Further sources: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265 (bank
of tokens, coreset); Defard et al., "PaDiM", ICPR 2021, arXiv 2011.08785 (a Gaussian at each position); Lee et al., "A
Simple Unified Framework", NeurIPS 2018, arXiv 1807.03888 (one covariance for all); Ledoit and Wolf, "A well-conditioned
estimator for large-dimensional covariance matrices", 2004 (shrinkage).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.keys.tokens import RIDGE, TOKEN_KEYS
from jmae.nn.mae import MAE
from jmae.patches import grid_of, patchify
from jmae.ridge import standardised_ridge
from jmae.system import Fit, Results, Rival, System
from jmae.windows import average

DISTANCE = "distance of the image's tokens from those of normal training images"
WORDS = {"tokens": f"{DISTANCE}; a token is what the network makes of one patch (a small square or block)"}
RIDGE_FIT = "token_ridge"  # what the score RIDGE keeps of normal and unlabelled images
NAME = "tokens"  # of the score, of its map, and of what it learns from normal images


CROPS = 24  # windows of a training volume whose tokens may come into a bank
OUTER = 1e-6  # weight of a ring's voxel in a window: it counts where no window has an inner token
TOLERANCE = 1  # tokens along an axis within which a position is near
LARGE_BANK = 2**30  # bytes in float32, above which a bank is kept in float16
AT_ONCE = 2**24  # distances in memory at a time

# --- positions --------------------------------------------------------------------------------------------------------


def inner(grid: tuple[int, ...], ring: int) -> Int[np.ndarray, " k"]:
    """Numbers of the positions of a grid without its `ring` outermost rows along each axis; 0 keeps all.

    Raises InputError where no position is left.
    """
    if min(grid) <= 2 * ring:
        raise InputError(f"evaluation.ring {ring} leaves no token of a grid of {grid}: at most {(min(grid) - 1) // 2}")
    rows = (np.arange(ring, n - ring) for n in grid)
    return np.ravel_multi_index(np.meshgrid(*rows, indexing="ij"), grid).reshape(-1)


def neighbours(
    grid: tuple[int, ...], positions: Int[np.ndarray, " k"], tolerance: int = TOLERANCE
) -> Int[np.ndarray, "k m"]:
    """For each position the places, in `positions`, of the positions at most `tolerance` away along every axis; -1
    fills up shorter rows. The position itself is among them."""
    place = np.full(grid, -1)
    place.reshape(-1)[positions] = np.arange(len(positions))
    offsets = np.array(list(product(range(-tolerance, tolerance + 1), repeat=len(grid))))
    around = np.stack(np.unravel_index(positions, grid), -1)[:, None] + offsets[None]
    within = ((around >= 0) & (around < np.array(grid)[None, None])).all(-1)
    at = np.moveaxis(np.where(within[..., None], around, 0), -1, 0)
    return np.where(within, place[tuple(at)], -1)


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_features(
    mae: MAE, patches: Float[Array, "b n v"], positions: Int[np.ndarray, " k"], layer: int = 0
) -> Float[Array, "b k d"]:
    """Tokens of images at some positions, output of an encoder block before the final norm, in float32.

    The encoder gets the class token and the tokens at `positions` alone. Neither a mask nor the decoder takes part.

    Args:
        layer: number of the block, counted from 1; 0 is the middle, half of the depth rounded up. Later blocks are not
            computed.

    Raises InputError where the encoder has no such block.
    """
    depth = mae.encoder.depth
    if layer > depth:
        raise InputError(f"evaluation.layer {layer}: the encoder has {depth} blocks, choose one of them, or 0 (middle)")
    tokens = mae.with_class(mae.embed(patches)[:, positions])
    return mae.encoder(tokens, number=layer or -(-depth // 2))[:, 1:].astype(jnp.float32)


# --- what is kept of normal images ------------------------------------------------------------------------------------


def learned(
    features: Float[np.ndarray, "n k d"], near: Int[np.ndarray, "k m"], way: str, *, size: int, coreset: bool, seed: int
) -> dict[str, np.ndarray]:
    """What `distances` needs of the tokens of n normal images; "bank", or "mean" and "whitening".

    Args:
        near: as `neighbours` gives it.
        way: one of `WAYS`.
        size: tokens of a bank, for each position or for all.
        coreset: whether a bank is a greedy k-center coreset instead of a random subset.
        seed: of the random choice.

    Raises InputError where there are no images.
    """
    if not len(features):
        raise InputError("evaluation.tokens: no window without a lesion: give the manifest normal rows of split train")
    if way in ("gaussian", "mahalanobis"):
        return gaussian(features, pooled=way == "mahalanobis")
    candidates = near if way == "position" else np.arange(len(near))[None]
    bank = (coresets if coreset else subsets)(features, candidates, size, seed)
    return {"bank": bank.astype(np.float16) if 4 * bank.size > LARGE_BANK else bank}


def subsets(
    features: Float[np.ndarray, "n k d"], near: Int[np.ndarray, "p m"], size: int, seed: int
) -> Float[np.ndarray, "p s d"]:
    """For each row of `near` a random subset of the tokens there; s = `size`, or as many as the longest row has.

    A row that has fewer tokens repeats some, which changes no minimum.
    """
    rng, n = np.random.default_rng(seed), len(features)
    size = min(size, n * int((near >= 0).sum(1).max()))

    def one(row: Int[np.ndarray, " m"]) -> np.ndarray:
        places = row[row >= 0]
        total = n * len(places)
        chosen = np.resize(rng.choice(total, min(size, total), replace=False), size)
        return features[chosen // len(places), places[chosen % len(places)]]

    return np.stack([one(row) for row in near])


def coresets(
    features: Float[np.ndarray, "n k d"], near: Int[np.ndarray, "p m"], size: int, seed: int
) -> Float[np.ndarray, "p s d"]:
    """For each row of `near` the greedy k-center coreset of the tokens there, of as many tokens as `subsets` gives.

    The first token is a random one. Each further one has the greatest distance to those before it.
    """
    size = min(size, len(features) * int((near >= 0).sum(1).max()))
    firsts = np.random.default_rng(seed).random(len(near))

    @jax.jit
    def all_rows(features: Array, near: Array, firsts: Array) -> Array:
        def one(row: tuple[Array, Array]) -> Array:
            places, first = row
            tokens = jnp.take(features, jnp.maximum(places, 0), axis=1)  # (n, m, d)
            valid = jnp.broadcast_to(places >= 0, tokens.shape[:2]).reshape(-1)
            order = jnp.argsort(~valid, stable=True)  # the valid ones first
            number = jnp.minimum((first * jnp.sum(valid)).astype(int), jnp.sum(valid) - 1)
            return k_centers(tokens.reshape(-1, tokens.shape[-1]), valid, order[number], size)

        return jax.lax.map(one, (near, firsts))

    return np.asarray(all_rows(features, near, firsts))


def k_centers(tokens: Float[Array, "m d"], valid: Array, first: Int[Array, ""], size: int) -> Float[Array, "size d"]:
    """`size` of the valid tokens, each the farthest from the nearest of those before it."""

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        newest, apart = state
        apart = jnp.minimum(apart, jnp.sum((tokens - tokens[newest][None]) ** 2, -1))
        return (jnp.argmax(apart), apart), tokens[newest]

    apart = jnp.where(valid, jnp.inf, -1.0)
    return jax.lax.scan(step, (first, apart), None, length=size)[1]


def gaussian(features: Float[np.ndarray, "n k d"], *, pooled: bool) -> dict[str, np.ndarray]:
    """Mean (k, d) of each position's tokens, and the whitening (q, d, d) of the tokens less their position's mean.

    The whitening W of a covariance S has S^-1 = W^T W. `pooled` gives one covariance for all positions, q = 1; else
    each position has its own, q = k. Covariances are shrunk towards a multiple of the identity (Ledoit and Wolf).
    """
    mean = features.mean(0, dtype=np.float64)
    rest = np.moveaxis(features - mean[None], 1, 0)
    groups = rest.reshape(1, -1, rest.shape[-1]) if pooled else rest
    whitening = np.stack([np.linalg.inv(np.linalg.cholesky(shrunk_covariance(group))) for group in groups])
    return {"mean": mean.astype(np.float32), "whitening": whitening.astype(np.float32)}


def shrunk_covariance(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """The covariance of rows of mean 0, shrunk by Ledoit and Wolf's formula towards its mean variance times the
    identity."""
    n, d = rows.shape
    covariance = rows.T @ rows / n
    variance = np.trace(covariance) / d
    target = variance * np.eye(d)
    spread = np.sum((covariance - target) ** 2)
    noise = (np.mean(np.sum(rows**2, 1) ** 2) - np.sum(covariance**2)) / n
    share = min(noise / spread, 1.0) if spread > 0 else 1.0
    least = np.finfo(np.float32).tiny ** 0.5  # where all rows are equal
    return (1 - share) * covariance + share * target + least * np.eye(d)


# --- distances --------------------------------------------------------------------------------------------------------


def distances(features: Float[Array, "b k d"], learned: Mapping[str, Array]) -> Float[Array, "b k"]:
    """The distance of each token from the normal images, of which `learned` keeps what is needed."""
    if "bank" in learned:
        return nearest(features, learned["bank"])
    rest, whitening = features - learned["mean"][None], learned["whitening"]
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    one = len(whitening) == 1
    white = product("bkd,ed->bke", rest, whitening[0]) if one else product("bkd,ked->bke", rest, whitening)
    return jnp.linalg.norm(white, axis=-1)


def nearest(
    features: Float[Array, "b k d"], bank: Float[Array, "p s d"], at_once: int = AT_ONCE
) -> Float[Array, "b k"]:
    """The distance of each token to the nearest of its bank; p = 1 is one bank for all positions, else p = k.

    Products of matrices find the nearest token, at most `at_once` distances at a time. The distance itself is that of
    the difference, so that rounding in the products does not reach it.
    """
    b, k, _ = features.shape
    p, s, _ = bank.shape
    rows = jnp.moveaxis(features, 1, 0) if p > 1 else features.reshape(1, b * k, -1)
    centre = jnp.mean(bank, (0, 1), jnp.float32)[None, None]  # smaller numbers, smaller errors
    tokens = rows - centre
    chunk = max(1, min(s, at_once // (p * rows.shape[1])))

    def step(j: Int[Array, ""], best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(j * chunk, s - chunk)  # the last chunk may repeat some, which changes no minimum
        part = jax.lax.dynamic_slice_in_dim(bank, start, chunk, 1).astype(jnp.float32) - centre
        product = jnp.einsum("prd,pcd->prc", tokens, part, precision=jax.lax.Precision.HIGHEST)
        apart = jnp.sum(part**2, -1)[:, None] - 2 * product
        least, at = jnp.min(apart, -1), jnp.argmin(apart, -1)
        return jnp.minimum(best[0], least), jnp.where(least < best[0], start + at, best[1])

    none = jnp.full(rows.shape[:2], jnp.inf), jnp.zeros(rows.shape[:2], jnp.int32)
    index = jax.lax.fori_loop(0, -(-s // chunk), step, none)[1]
    found = jnp.take_along_axis(bank, index[..., None], axis=1).astype(jnp.float32)
    apart = jnp.linalg.norm(rows - found, axis=-1)
    return apart.T if p > 1 else apart.reshape(b, k)


# --- scores and maps --------------------------------------------------------------------------------------------------


def score_of(distances: Float[Array, "b k"], share: float = 1.0) -> Float[Array, " b"]:
    """The mean of the highest distances of each image: a share of all its distances, at least one."""
    k = distances.shape[1]
    return jnp.mean(jax.lax.top_k(distances, max(1, min(k, round(share * k))))[0], -1)


def map_of(
    distances: Float[Array, "b k"], grid: tuple[int, ...], ring: int, size: tuple[int, ...]
) -> Float[Array, " b *size"]:
    """Maps of images of `size` from the distances of the positions `inner(grid, ring)`, linear between the patches'
    centres. A token of the rings has no distance of its own and gets that of the nearest inner token."""
    cells = distances.reshape(-1, *(n - 2 * ring for n in grid))
    cells = jnp.pad(cells, [(0, 0), *[(ring, ring)] * len(grid)], mode="edge")
    return jax.image.resize(cells, (len(cells), *size), "linear")


def window_weights(grid: tuple[int, ...], ring: int, size: tuple[int, ...]) -> Float[np.ndarray, "*size"]:
    """1 for voxels of the positions `inner(grid, ring)`, almost 0 for those of the rings."""
    weights = np.full(prod(grid), OUTER, np.float32)
    weights[inner(grid, ring)] = 1
    weights = weights.reshape(grid)
    for axis, (n, g) in enumerate(zip(size, grid, strict=True)):
        weights = np.repeat(weights, n // g, axis)
    return weights


# --- by a recipe's settings -------------------------------------------------------------------------------------------


def check_tokens(config: ConfigDict, primary: str) -> None:
    """Raises InputError where a recipe's settings of this score do not fit together; `primary` is the primary score."""
    evaluation, model = config.evaluation, config.model
    if evaluation.tokens == "none":
        if primary == NAME:
            raise InputError('the primary score is that of tokens: set evaluation.tokens, such as to "position"')
        return
    inner(grid_of(tuple(config.data.size), tuple(model.patch)), evaluation.ring)
    if evaluation.layer > model.depth:
        raise InputError(f"evaluation.layer {evaluation.layer}: the encoder has {model.depth} blocks: choose one, or 0")
    if primary == NAME and config.select == "aucp":
        raise InputError("select=aucp: the score of tokens exists only after the training: take select=last")


def token_fits(
    config: ConfigDict, encoders: Mapping[str, Callable[[PyTree], MAE | None]], view: Callable[[Array], Array]
) -> tuple[Fit, ...]:
    """What the score keeps of the training normals' tokens, for each encoder; nothing where there is no such score.

    Of volumes it takes windows. Those that touch a lesion are left out, so that abnormal training volumes serve, too,
    where their lesions are known.

    Args:
        encoders: by the name of the stage that trains it, parameters -> network.
        view: (images as read) -> images in the network's range, without augmentation.
    """
    evaluation, volumes = config.evaluation, recipe.is_volume(config)
    if evaluation.tokens == "none":
        return ()
    keep = partial(learned_by, config)

    def rows(rows: Sequence[Row]) -> np.ndarray:
        known = lambda row: volumes and (row.mask or row.boxes)
        return np.array([i for i, r in enumerate(rows) if r.split == "train" and (r.label != 1 or known(r))], np.int64)

    def measure(results: Results, batch: PyTree, key: Array) -> dict[str, Array]:
        image = view(batch["image"])
        return {name: tokens_of(config, mae_of(results[name]["params"]), image) for name, mae_of in encoders.items()}

    return (
        Fit(
            name=NAME,
            rows=rows,
            measure=measure,
            finish=lambda arrays, key, rows: {name: keep(np.asarray(tokens)) for name, tokens in arrays.items()},
            crops=CROPS if volumes else 0,
            settings=tuple(TOKEN_KEYS),
            needs="give the manifest normal rows of split train",
        ),
    )


def learned_by(config: ConfigDict, features: Float[np.ndarray, "n k d"]) -> dict[str, np.ndarray]:
    """`learned` of the inner tokens of n images by a recipe's settings."""
    evaluation, grid = config.evaluation, grid_of(tuple(config.data.size), tuple(config.model.patch))
    near, coreset = neighbours(grid, inner(grid, evaluation.ring)), evaluation.bank_choice == "coreset"
    return learned(features, near, evaluation.tokens, size=evaluation.bank_size, coreset=coreset, seed=config.seed)


def tokens_of(
    config: ConfigDict, mae: MAE | None, image: Float[Array, "b *size c"], ring: int | None = None
) -> Float[Array, "b k d"]:
    """The inner tokens of images that are in the network's range; without a network the inner patches themselves.

    `ring` takes the place of `evaluation.ring`.
    """
    patch, evaluation = tuple(config.model.patch), config.evaluation
    ring = evaluation.ring if ring is None else ring
    positions, patches = inner(grid_of(image.shape[1:-1], patch), ring), patchify(image, patch)
    return token_features(mae, patches, positions, evaluation.layer) if mae else patches[:, positions]


def token_score(
    config: ConfigDict, mae: MAE | None, image: Float[Array, "b *size c"], learned: Mapping[str, Array]
) -> tuple[Float[Array, " b *size"], Float[Array, " b"]]:
    """(maps, scores) of images that are in the network's range."""
    size, found = image.shape[1:-1], distances(tokens_of(config, mae, image), learned)
    grid = grid_of(size, tuple(config.model.patch))
    return map_of(found, grid, config.evaluation.ring, size), score_of(found)


def signed_token_score(
    config: ConfigDict,
    mae: MAE,
    image: Float[Array, "b *size c"],
    normal: Mapping[str, Array],
    abnormal: Mapping[str, Array],
) -> tuple[Float[Array, " b *size"], Float[Array, " b"]]:
    """(maps, scores) of (d - e) / (d + e), from -1 to 1: d is the distance to the tokens of normal images, e to those
    of images that are taken as abnormal. The score has the means of d and of e over the tokens (ours)."""
    size, tokens = image.shape[1:-1], tokens_of(config, mae, image)
    d, e = distances(tokens, normal), distances(tokens, abnormal)
    between = lambda d, e: (d - e) / jnp.maximum(d + e, jnp.finfo(jnp.float32).tiny)
    grid = grid_of(size, tuple(config.model.patch))
    return map_of(between(d, e), grid, config.evaluation.ring, size), between(score_of(d), score_of(e))


def mean_token(config: ConfigDict, mae: MAE | None, image: Float[Array, "b *size c"]) -> Float[Array, "b d"]:
    """The mean over the tokens of all positions, of images that are in the network's range."""
    return jnp.mean(tokens_of(config, mae, image, ring=0), 1)


def ridge_fits(
    config: ConfigDict,
    mae_of: Callable[[PyTree], MAE | None],
    stage: str,
    view: Callable[[Array], Array],
    rows: Callable[[Sequence[Row]], np.ndarray] | None,
) -> tuple[Fit, ...]:
    """The regression of the score `tokens_ridge`, which tells mean tokens of normal from those of unlabelled images;
    nothing where there is no such score.

    Args:
        mae_of: parameters -> network.
        stage: name of the stage that trains the network.
        view: (images as read) -> images in the network's range.
        rows: numbers of the normal and of the unlabelled rows; None: there is no such score.
    """
    if config.evaluation.tokens == "none" or rows is None:
        return ()

    def measure(results: Results, batch: PyTree, key: Array) -> dict[str, Array]:
        return {"mean": mean_token(config, mae_of(results[stage]["params"]), view(batch["image"]))}

    def finish(arrays: PyTree, key: Array, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        mean, mixed = np.asarray(arrays["mean"]), np.array([row.split == "unlabeled" for row in rows])
        weights, offset = standardised_ridge(mean[~mixed], mean[mixed])
        return {"weights": weights.astype(np.float32), "offset": np.asarray(offset, np.float32)}

    needs = "give the manifest normal rows of split train, and rows of split unlabeled"
    return (Fit(name=RIDGE_FIT, rows=rows, measure=measure, finish=finish, settings=("layer",), needs=needs),)


def ridge_score(
    config: ConfigDict, mae: MAE | None, image: Float[Array, "b *size c"], learned: Mapping[str, Array]
) -> Float[Array, " b"]:
    """The score `tokens_ridge` of images that are in the network's range (ours): around -1 like normal images, around 1
    like the unlabelled ones. It is of an image and has no map."""
    return mean_token(config, mae, image) @ learned["weights"] + learned["offset"]


def sweeping(
    config: ConfigDict, mae_of: Callable[[PyTree], MAE | None], stage: str, view: Callable[[Array], Array]
) -> dict:
    """The fields of a `Sweep` that give the map of tokens; {} where the recipe wants no such score.

    Windows are encoded without a mask. The distances of the windows that cover a voxel are averaged. A ring's voxel
    counts where no window has an inner token there.

    Args:
        mae_of: parameters -> network.
        stage: name of the stage that trains the network.
        view: (windows as read) -> windows in the network's range.
    """
    if config.evaluation.tokens == "none":
        return {}
    size, evaluation = tuple(config.data.size), config.evaluation
    weights = window_weights(grid_of(size, tuple(config.model.patch)), evaluation.ring, size)[None, ..., None]

    def values(results: Results, image: Float[Array, "b *size c"]) -> tuple[Array, Array]:
        mae = mae_of(results[stage]["params"])
        found = token_score(config, mae, view(image), results[NAME][stage])[0][..., None]
        return found, jnp.broadcast_to(weights, found.shape)

    def further(results: Results) -> Callable[[Array], tuple[Array, Array]] | None:
        return partial(values, results) if NAME in results else None

    return {"further": further, "further_maps": (NAME,)}


def token_rivals(
    config: ConfigDict,
    system: System,
    view: Callable[[Array], Array],
    init: Callable[[Array], tuple[PyTree, PyTree]],
    mae_of: Callable[[PyTree], MAE],
    mixed: Callable[[Sequence[Row]], np.ndarray] | None = None,
) -> dict[str, Rival]:
    """Rivals of the encoder in this score: an untrained one, and raw patches without any; none where there is no such
    score.

    Args:
        system: the system that has the score.
        view: (images as read) -> images in the network's range.
        init, mae_of: those of the network.
        mixed: `rows` of `ridge_fits`, for that score, too.
    """
    if config.evaluation.tokens == "none":
        return {}
    stage = "encoder"

    def beside(mae_of: Callable[[PyTree], MAE | None]) -> System:
        def score(results: Results, batch: PyTree, key: Array, *, chunk: int | None = None) -> dict[str, Any]:
            mae, image = mae_of(results[stage]["params"]), view(batch["image"])
            found, scores = token_score(config, mae, image, results[NAME][stage])
            more = {RIDGE: ridge_score(config, mae, image, results[RIDGE_FIT])} if mixed else {}
            return {"maps": {NAME: found}, "scores": {NAME: scores} | more}

        fits = *token_fits(config, {stage: mae_of}, view), *ridge_fits(config, mae_of, stage, view, mixed)
        other = replace(system, primary=NAME, map=NAME, masks=1, fits=fits)
        if not system.sweep:
            return replace(other, score=score)
        further = sweeping(config, mae_of, stage, view)["further"]
        sweep = replace(
            system.sweep,
            repeats=1,
            groups=1,
            score=lambda results, image, keys, groups: further(results)(image),
            average=partial(average, weighted=True),
            fuse=lambda results, averages, inside: {"maps": {NAME: jnp.where(inside, averages[..., 0], 0)}},
            example=None,
            further=None,
            further_maps=(),
        )
        return replace(other, sweep=sweep)

    untrained = lambda key: {stage: {"params": jax.jit(init)(key)[0]}}
    return {
        "untrained": Rival("untrained encoder", beside(mae_of), untrained),
        "raw": Rival("raw patches", beside(lambda params: None), lambda key: {stage: {"params": {}}}),
    }
