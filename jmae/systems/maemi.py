"""MAEMI: a 3D masked autoencoder trained on normal volumes; anomalies are what it reconstructs badly.

Daniel M. Lang, Eli Schwartz, Cosmin I. Bercea, Raja Giryes, Julia A. Schnabel, "Multispectral 3D Masked Autoencoders
for Anomaly Detection in Non-Contrast Enhanced Breast MRI", CaPTion 2023, arXiv 2303.05861. Consulted: LangDaniel/MAEMI
(the released code), facebookresearch/mae.
Differences: the released code's position codes, averaging and unclipped test images are options (`compat`), off.

One stage, `train`: random crops of the healthy parts of volumes, masked reconstruction. Score: Eq. 2 and 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from jmae import residuals
from jmae.data.augment import random_flip
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.masked import (
    explained_variance,
    start,
    train_step,
    training,
)
from jmae.masking import group_mask, groups_of, hidden, visible_tokens
from jmae.nn.mae import MAE
from jmae.patches import grid_of, patchify, sincos_positions, unpatchify
from jmae.scoring import case_score_words, minimum_filter
from jmae.system import (
    Check,
    Prediction,
    Pretrained,
    Results,
    Stage,
    Sweep,
    System,
    held_out_normals,
    masked_autoencoder,
    rows_of,
    steps_of,
)
from jmae.tokens import WORDS as TOKEN_WORDS
from jmae.tokens import check_tokens, sweeping, token_fits, token_rivals
from jmae.windows import average, tile

WATCHED = 64  # crops of held-out normals, whose explained variance is logged
VISIBLE = 1e-6  # weight of a visible token's error beside a hidden token's, where only the latter counts


@dataclass(frozen=True)
class Networks:
    """The network of a recipe, and the recipe: `init` and `mae_of` are those of `system.network`. `predict` is the
    network as a predictor (`system.Prediction`), or what stands in for it."""

    config: ConfigDict
    init: Callable[[Array], tuple[PyTree, PyTree]]
    mae_of: Callable[[PyTree], MAE]
    predict: Callable[..., Array]


def released_positions(grid: tuple[int, ...], width: int) -> np.ndarray:
    """The released code's permuted position codes (n, width).

    That code exchanges the first two axes of a meshgrid in (S, L, P) order and reads it as if it were (P, L, S). Codes
    are unique for each token, but neighbours in space are not neighbours in code.
    """
    p, l, s = grid  # noqa: E741
    order = np.arange(p * l * s).reshape(p, l, s).transpose(1, 2, 0).reshape(-1)
    return sincos_positions(grid, width)[order]


# --- loss: masked reconstruction of a random crop (masked.train_step) -------------------------------------------------


def view(data: ConfigDict, image: Float[Array, "b *size c"], keys: Key[Array, " b"]) -> Float[Array, "b *size c"]:
    """Clipped crops, mirrored at random."""
    flip = partial(random_flip, axes=tuple(data.flips))
    return jax.vmap(flip)(jnp.clip(image, *data.clip), keys)


# --- score (Eq. 2 and 3) ----------------------------------------------------------------------------------------------


def clean(config: ConfigDict, image: Float[Array, "b *size c"]) -> Float[Array, "b *size c"]:
    """Windows as the network sees them in a test."""
    return image if config.compat.clip else jnp.clip(image, *config.data.clip)


def predicted(
    mae_of: Callable[[PyTree], MAE], results: Results, patches: Array, keep: Array, restore: Array
) -> Float[Array, "b m n v"]:
    """The network as a predictor, see `system.Prediction`."""
    return mae_of(results["train"]["params"]).predictions(patches, keep, restore)


def reconstructed(
    networks: Networks,
    results: Results,
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    groups: Int[Array, " b"],
) -> tuple[Float[Array, "b *size c"], Float[Array, "b *size c"], Bool[Array, "b *size 1"]]:
    """(Windows as the network sees them, its prediction under one random mask each, True for hidden voxels.)"""
    config, size, patch = networks.config, image.shape[1:-1], tuple(networks.config.model.patch)
    image = clean(config, image)
    patches = patchify(image, patch)
    visible = visible_tokens(patches.shape[1], config.evaluation.mask_ratio)
    keep, restore = group_mask(keys, groups, patches.shape[1], visible)
    prediction = unpatchify(networks.predict(results, patches, keep[:, None], restore[:, None])[:, 0], size, patch)
    absent = jnp.broadcast_to(hidden(restore, visible)[..., None], (*restore.shape, prod(patch)))
    return image, prediction, unpatchify(absent.astype(jnp.float32), size, patch) > 0


def window_error(
    networks: Networks,
    results: Results,
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    groups: Int[Array, " b"],
) -> tuple[Float[Array, "b *size k"], Float[Array, "b *size 1"]]:
    """Eq. 2 of each window under one random mask: (values, weights).

    Values are the filtered squared error of each sequence at all tokens, visible tokens too, and then the prediction.
    Weights are 1 at hidden and almost 0 at visible tokens: only a voxel that no mask hid has a visible token's error.
    With `evaluation.error` "hidden", a hidden voxel has the smallest error of the hidden voxels in its box.
    """
    image, prediction, absent = reconstructed(networks, results, image, keys, groups)
    squared, edges = (image - prediction) ** 2, tuple(networks.config.evaluation.filter)
    error = minimum_filter(squared, edges)
    if networks.config.evaluation.error == "hidden" and max(edges) > 1:
        error = jnp.where(absent, minimum_filter(jnp.where(absent, squared, jnp.inf), edges), error)
    values, config = [error, prediction], networks.config
    if residuals.wanted(config):
        one = residuals.under_mask(image, prediction, absent[..., 0])
        values.append(residuals.window_values(image, one))
        if config.evaluation.residual == "feature":
            mae = networks.mae_of(results["train"]["params"])
            made = image + one["residual"]
            values.append(residuals.features_apart(mae, image, made, tuple(config.model.patch))[..., None])
    return jnp.concatenate(values, -1), jnp.where(absent, 1, VISIBLE)


def fuse(config: ConfigDict, results: Results, averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict:
    """Eq. 3: the mean over sequences, after a second minimum filter; beside it the map of `evaluation.residual`."""
    error, prediction, further = jnp.split(averages, [config.data.channels, 2 * config.data.channels], -1)
    mean = jnp.where(inside, jnp.mean(error, -1), jnp.inf)
    maps = {"maemi": minimum_filter(mean[None, ..., None], tuple(config.evaluation.filter))[0, ..., 0]}
    if residuals.wanted(config):
        of = residuals.volume_evidence(config, further[None], inside[None])
        maps[config.evaluation.residual] = residuals.anomaly_map(config, of, results)[0]
    return {"maps": {name: jnp.where(inside, m, 0) for name, m in maps.items()}, "reconstruction": prediction}


def batch_evidence(config: ConfigDict, results: Results, batch: PyTree, key: Key[Array, ""]) -> residuals.Evidence:
    """What the averages of a volume say of it, for a fit."""
    return residuals.volume_evidence(config, batch["average"][..., 2 * config.data.channels :], batch["inside"])


# --- system -----------------------------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Raises InputError on settings that do not fit together."""
    check_settings(config.data)
    residuals.check(config, config.evaluation.repeats)
    if config.compat.averaging and config.evaluation.error == "hidden":
        raise InputError("compat.averaging goes with evaluation.error='all', as in the released code: set that")
    tokens = prod(grid_of(tuple(config.data.size), tuple(config.model.patch)))
    for ratio in (config.train.mask_ratio, config.evaluation.mask_ratio):
        visible_tokens(tokens, ratio)


def build(config: ConfigDict) -> System:
    """The MAEMI system that a recipe describes; raises InputError on settings that do not fit together."""
    check(config)
    check_tokens(config, "maemi")
    data, evaluation, compat = config.data, config.evaluation, config.compat
    patch = tuple(config.model.patch)
    positions = released_positions if compat.position else sincos_positions
    init, mae_of = masked_autoencoder(config, data.channels, positions=positions)
    networks = Networks(config, init, mae_of, partial(predicted, mae_of))
    train = training(config.train, mae_of=mae_of, view=partial(view, data), patch=patch, parts=config.accumulate)
    stage = Stage(
        name="train",
        rows=rows_of,
        batch=config.train.batch,
        steps=steps_of(config.train, config.budget),
        init=partial(start, train, init),
        step=partial(train_step, train),
        pretrained=Pretrained(use="start", positions=positions),
        watch=Check(
            every=config.checkpoint_every,
            rows=held_out_normals,
            look=partial(
                explained_variance, train, lambda image: jnp.clip(image, *data.clip), at_once=config.train.batch
            ),
            samples=WATCHED,
        ),
        parts=config.accumulate,
        words={"explained_variance": "explained share of the variance of hidden voxels (1 is perfect)"},
        nothing={"explained_variance": 0.0},
    )
    number, by_case = prod(grid_of(tuple(data.size), patch)), evaluation.masks_of == "case"
    sweep = Sweep(
        window=tuple(data.size),
        stride=tuple(evaluation.stride),
        repeats=evaluation.repeats,
        groups=1 if by_case else groups_of(number, visible_tokens(number, evaluation.mask_ratio)),
        by_case=by_case,
        score=partial(window_error, networks),
        example=partial(reconstructed, networks),
        fuse=partial(fuse, config),
        average=partial(
            average, weighted=evaluation.error == "hidden", released=data.channels if compat.averaging else 0
        ),
        tile=partial(tile, released=True) if compat.averaging else tile,
    )
    how = case_score_words(evaluation.case_score, share=evaluation.top, above=evaluation.part_above)
    system = System(
        name="maemi",
        stages=(stage,),
        uses=("train",),
        primary=evaluation.residual if residuals.wanted(config) else "maemi",
        sweep=sweep,
        repetitions="repeats",
        fits=residuals.fits(config, partial(batch_evidence, config), "repeats", "mask_ratio", "error", "stride"),
        words=TOKEN_WORDS | {"maemi": f"{how}; the map is the squared reconstruction error"} | residuals.words(config),
        map_words="values of the map, without a unit"
        if residuals.wanted(config)
        else "squared reconstruction error, in the unit of the prepared image",
    )

    def beside(predict: Callable[..., Array]) -> System:
        other = replace(networks, predict=predict)
        assert system.sweep
        return replace(system, sweep=replace(system.sweep, score=partial(window_error, other), example=None))

    seen = partial(clean, config)
    tokens = token_fits(config, {"train": mae_of}, seen)
    sweep = replace(sweep, **sweeping(config, mae_of, "train", seen))
    rivals = token_rivals(config, system, seen, init, mae_of)
    whole = replace(system, sweep=sweep, fits=(*system.fits, *tokens), rivals=rivals)
    if evaluation.residual == "feature":  # only the network has features
        return whole
    ratio = evaluation.mask_ratio
    prediction = Prediction(predict=networks.predict, view=seen, patch=patch, ratio=ratio, beside=beside)
    return replace(whole, prediction=prediction)
