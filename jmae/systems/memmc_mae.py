"""MemMC-MAE: a masked autoencoder with a memory in its encoder and a decoder that attends to all encoder levels.

Tian, Pang, Liu et al., "Unsupervised Anomaly Detection in Medical Images with a Memory-augmented Multi-level
Cross-attentional Masked Autoencoder", MLMI 2023, arXiv 2203.11725. No code of it is public. Consulted, for what the
paper leaves open: meshed-memory-transformer (memory, gates), facebookresearch/mae (network, training), tianyu0207/IGD
(the same group's scoring by MS-SSIM). In 3D over the same code: `ours`.

One stage, `train`: masked reconstruction. Score: multi-scale structural dissimilarity of the image and its
reconstructions under several masks. The rows of the paper's ablation are `model.memory` (0: none), `model.mc_decoder`
and `model.long_skips`. `jmae.keys.memmc_mae` marks by [D] what the paper leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from jmae import recipe, residuals
from jmae.data.augment import moments_of
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.keys.memmc_mae import SCORES
from jmae.masked import (
    crop_and_flip,
    range_of,
    standardised,
    start,
    train_step,
    training,
)
from jmae.masking import groups_of, scoring_keys, standard_error, visible_tokens
from jmae.nn.mae import MAE
from jmae.nn.memory import MultiLevelMAE, around_plain, plain_part
from jmae.optim import adamw
from jmae.patches import grid_of, patchify
from jmae.reconstruct import Reconstruction, reconstruct
from jmae.ssim import check_ssim, ms_ssim, ms_ssim_map
from jmae.system import (
    Prediction,
    Pretrained,
    Results,
    Stage,
    Sweep,
    System,
    masked_autoencoder,
    rows_of,
    steps_of,
)
from jmae.tokens import NAME, check_tokens, sweeping, token_fits, token_rivals, token_score
from jmae.tokens import WORDS as TOKEN_WORDS
from jmae.windows import average

VISIBLE = 1e-6  # weight of a mask that does not hide a voxel: it counts only where no mask hides the voxel
WORDS = TOKEN_WORDS | {
    "ms_ssim": "how much the reconstruction differs in structure from the image",
    "ms_ssim_patches": "ms_ssim as a mean over each patch",
    "ms_ssim_product": "ms_ssim as a product over scales",
    "mse": "mean squared error of the reconstruction",
}
FITTED_BY = ("masks", "mask_ratio", "paste", "average")  # settings that change a fit
MEANS = {
    "ms_ssim": "map",
    "mse": "error",
    "ms_ssim_product": "product",
}  # a score is the mean of this measure over voxels


@dataclass(frozen=True)
class Networks:
    """The network of a recipe, and the recipe: `init` and `mae_of` are those of `system.network`. `predict` is the
    network as a predictor (`system.Prediction`), or what stands in for it."""

    config: ConfigDict
    init: Callable[[Array], tuple[PyTree, PyTree]]
    mae_of: Callable[[PyTree], MAE]
    predict: Callable[..., Array]


# --- loss: masked reconstruction (masked.train_step) ------------------------------------------------------------------


def view(config: ConfigDict, image: Float[Array, "b *size c"], keys: Key[Array, " b"]) -> Float[Array, "b *new k"]:
    """Crops and flips of images, in the network's range and channels. Crops have `data.size`."""
    data, volumes, raw = config.data, recipe.is_volume(config), image
    image = jnp.clip(image, *data.clip) if volumes else image
    scale, axes, size = tuple(data.crop_scale), tuple(data.flips), tuple(data.size)
    image = crop_and_flip(image, keys, scale=scale, axes=axes, size=size)
    return jnp.clip(image, *data.clip) if volumes else standardised(image, config, raw)


# --- score ------------------------------------------------------------------------------------------------------------


def ends_of(
    config: ConfigDict, image: Float[Array, "b *size c"]
) -> tuple[Float[Array, "b channels"], Float[Array, "b channels"]]:
    """(value of black, span of the values) that each channel of an image can have in the network's range."""
    if not recipe.is_volume(config):
        return range_of(image, config)
    (low, high), shape = config.data.clip, (len(image), config.model.channels)
    return jnp.full(shape, low), jnp.full(shape, high - low)


def dissimilarity(
    evaluation: ConfigDict,
    image: Float[Array, "b *size c"],
    reconstruction: Float[Array, "b *size c"],
    hidden: Bool[Array, " b *size"],
    *,
    black: Float[Array, "b c"],
    span: Float[Array, "b c"],
) -> dict[str, Array]:
    """How unlike its reconstruction under one mask each image is.

    Returns:
        "weight" (b, *size): how much the mask counts at a voxel; "map" and "error" (b, *size), times that weight: D =
        sum_j w_j (1 - SSIM_j) of IGD, with a share `l1_weight` of |x - x'| / span, and the squared error; "product"
        (b,): 1 - MS-SSIM, the product over scales.
    """
    share, standard = evaluation.l1_weight, evaluation.luminance == "standardised"
    similarity = dict(
        window=tuple(evaluation.window),
        sigma=evaluation.sigma,
        weights=tuple(evaluation.scales),
        pool=tuple(evaluation.pool),
    )

    def one(x: Array, y: Array, black: Array, span: Array) -> tuple[Array, Array]:
        own = similarity | {"data_range": span, "black": 0.0 if standard else black}
        own |= {"black": None} if evaluation.luminance == "none" else {}
        d = ms_ssim_map(x[None], y[None], border=evaluation.border, **own)[0]
        d = d if not share else (1 - share) * d + share * jnp.mean(jnp.abs(x - y) / span, -1)
        return d, 1 - ms_ssim(x[None], y[None], **own)[0]

    weight = jnp.where(hidden, 1.0, VISIBLE) if evaluation.average == "hidden" else jnp.ones(hidden.shape)
    d, product = jax.vmap(one)(image, reconstruction, black, span)
    error = jnp.mean((reconstruction - image) ** 2, -1)
    return {"weight": weight, "map": weight * d, "error": weight * error, "product": product}


def clean(config: ConfigDict, raw: Float[Array, "b *size c"]) -> Float[Array, "b *size k"]:
    """Images as the network sees them in a test."""
    return jnp.clip(raw, *config.data.clip) if recipe.is_volume(config) else standardised(raw, config)


def predicted(
    mae_of: Callable[[PyTree], MAE], results: Results, patches: Array, keep: Array, restore: Array
) -> Float[Array, "b m n v"]:
    """The network as a predictor, see `system.Prediction`."""
    return mae_of(results["train"]["params"]).predictions(patches, keep, restore)


def reconstructed(
    networks: Networks,
    results: Results,
    raw: Float[Array, "b *size c"],
    keys: Key[Array, ""] | Key[Array, " b"],
    *,
    masks: int,
    chunk: int | None = None,
    groups: Int[Array, " b"] | None = None,
) -> tuple[Reconstruction, dict[str, Array]]:
    """The reconstruction of images under `masks` masks, and the maps of the first three `SCORES`.

    With `evaluation.average="hidden"` a voxel's map is the mean over the masks that hide the voxel: a pasted patch is
    its own reconstruction, and how often a patch is pasted is chance.
    """
    config, evaluation = networks.config, networks.config.evaluation
    patch = tuple(config.model.patch)
    image = clean(config, raw)
    black, span = ends_of(config, raw)
    further = residuals.wanted(config)

    def measure(image: Array, made: Array, hidden: Array) -> dict[str, Array]:
        own = dissimilarity(evaluation, image, made, hidden, black=black, span=span)
        return own | (residuals.under_mask(image, made, hidden) if further else {})

    found = reconstruct(
        partial(networks.predict, results),
        image,
        keys,
        patch=patch,
        ratio=evaluation.mask_ratio,
        masks=masks,
        groups=groups,
        paste=evaluation.paste,
        chunk=chunk,
        measure=measure,
    )
    pixel, error = (found.measured[name] / found.measured["weight"] for name in ("map", "error"))
    cells = jnp.mean(patchify(pixel[..., None], patch), -1).reshape(len(image), *grid_of(image.shape[1:-1], patch))
    patches = jax.image.resize(cells, pixel.shape, "linear")
    return found, {"ms_ssim": pixel, "ms_ssim_patches": patches, "mse": error}


def evidence(
    networks: Networks, found: Reconstruction, results: Results, raw: Float[Array, "b *size c"]
) -> residuals.Evidence:
    """What the reconstruction of images says of them, for `evaluation.residual`."""
    config = networks.config
    feature = config.evaluation.residual == "feature"
    mae = networks.mae_of(results["train"]["params"]) if feature else None
    patch = tuple(config.model.patch)
    return residuals.evidence(standardised(raw, config), found.measured, *range_of(raw, config), mae, patch)


def score(
    networks: Networks, results: Results, batch: PyTree, key: Key[Array, ""], *, chunk: int | None = None
) -> dict[str, Any]:
    """The scores of images; see `System.score`.

    `ms_ssim_patches` has no Monte-Carlo error: the borders of its patches weigh more than their middles. The pictures
    are those of the paper's Figs. 2 and 3: what the first mask leaves, in mid-grey elsewhere, and the reconstruction
    under that mask.
    """
    config, raw = networks.config, batch["image"]
    keys = scoring_keys(config.evaluation.masks_of, key, batch["case"])
    found, maps = reconstructed(networks, results, raw, keys, masks=config.evaluation.masks, chunk=chunk)
    scores = {name: jnp.mean(m, tuple(range(1, m.ndim))) for name, m in maps.items()}
    scores["ms_ssim_product"] = found.measured["product"]
    if residuals.wanted(config):
        residual = residuals.anomaly_map(config, evidence(networks, found, results, raw), results)
        maps[config.evaluation.residual] = residual
        scores |= residuals.device_score(config, residual)
    name, errors = primary_of(config), {}
    if name in MEANS and (config.evaluation.average == "all" or name == "ms_ssim_product"):
        each = found.measures[MEANS[name]]
        errors = {"score_error": standard_error(each)} if each.shape[1] > 1 else {}
    if NAME in results:  # neither in a plan nor while the training looks at the score
        mae = networks.mae_of(results["train"]["params"])
        maps[NAME], scores[NAME] = token_score(config, mae, clean(config, raw), results[NAME]["train"])
    mean, std = moments_of(raw, config.data)
    picture = found.first * std + mean
    if config.data.channels != config.model.channels:
        picture = jnp.mean(picture, -1, keepdims=True)
    visible = {"visible patches": jnp.where(found.first_hidden[..., None], 0.5, raw)}
    return {"maps": maps, "scores": scores, "reconstruction": picture, "pictures": visible} | errors


def window_score(
    networks: Networks,
    results: Results,
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    groups: Int[Array, " b"],
) -> tuple[Float[Array, "b *size k"], Float[Array, "b *size 1"]]:
    """(the maps and the reconstruction of windows under one mask, the mask's weights); see `Sweep.score`."""
    found, maps = reconstructed(networks, results, image, keys, masks=1, groups=groups)
    values, config = [maps[name][..., None] for name in SCORES[:3]], networks.config
    values.append(found.mean)
    if residuals.wanted(config):
        clipped = jnp.clip(image, *config.data.clip)
        values.append(residuals.window_values(clipped, found.measured))
        if config.evaluation.residual == "feature":
            mae = networks.mae_of(results["train"]["params"])
            made = clipped + found.measured["residual"]
            values.append(residuals.features_apart(mae, clipped, made, tuple(config.model.patch))[..., None])
    return jnp.concatenate(values, -1), found.measured["weight"][..., None]


def fuse(
    config: ConfigDict, results: Results, averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]
) -> dict[str, Any]:
    """The maps and the reconstruction of a volume from the averages of `window_score`."""
    behind = 3 + config.data.channels
    maps = {name: averages[..., k] for k, name in enumerate(SCORES[:3])}
    if residuals.wanted(config):
        of = residuals.volume_evidence(config, averages[None, ..., behind:], inside[None])
        maps[config.evaluation.residual] = residuals.anomaly_map(config, of, results)[0]
    maps = {name: jnp.where(inside, values, 0) for name, values in maps.items()}
    return {"maps": maps, "reconstruction": averages[..., 3:behind]}


def batch_evidence(networks: Networks, results: Results, batch: PyTree, key: Key[Array, ""]) -> residuals.Evidence:
    """The evidence of a fit's batch: of images, from their reconstructions; of a volume, from its averages."""
    config = networks.config
    if recipe.is_volume(config):
        behind = 3 + config.data.channels
        return residuals.volume_evidence(config, batch["average"][..., behind:], batch["inside"])
    keys, chunk = scoring_keys(config.evaluation.masks_of, key, batch["case"]), config.evaluation.chunk or None
    found, _ = reconstructed(networks, results, batch["image"], keys, masks=config.evaluation.masks, chunk=chunk)
    return evidence(networks, found, results, batch["image"])


def primary_of(config: ConfigDict) -> str:
    """The name of the primary score."""
    return config.evaluation.residual if residuals.wanted(config) else config.evaluation.score


# --- system -----------------------------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Raises InputError on settings that do not fit together."""
    data, model, evaluation, volumes = config.data, config.model, config.evaluation, recipe.is_volume(config)
    size = tuple(data.size)
    if volumes:
        check_settings(data)
    if model.channels != data.channels and (volumes or data.channels != 1):
        raise InputError(
            f"model.channels is {model.channels}, data.channels {data.channels}: set --config.model.channels="
            f"{data.channels} too (one channel alone is repeated, in 2D)"
        )
    moments = (np.size(data.mean), np.size(data.std))
    if not volumes and data.normalise == "fixed" and any(n not in (1, model.channels) for n in moments):
        raise InputError(f"data.mean and data.std: one value, or one for each of {model.channels} model.channels")
    if not volumes and data.crop_from and not data.crop_scale:
        raise InputError("data.crop_from goes with random crops: set data.crop_scale, or data.crop_from=()")
    if model.weights and not Path(model.weights).is_dir() and model.long_skips:
        raise InputError("model.weights: no published network has long skips: set --config.model.long_skips=false")
    residuals.check(config, evaluation.masks)
    if not evaluation.scales:
        raise InputError("evaluation.scales is empty: give a weight for each scale")
    check_ssim(size, tuple(evaluation.window), evaluation.scales, tuple(evaluation.pool))
    tokens = prod(grid_of(size, tuple(model.patch)))
    for ratio in (config.train.mask_ratio, evaluation.mask_ratio):
        visible_tokens(tokens, ratio)


def build(config: ConfigDict) -> System:
    """The MemMC-MAE system that a recipe describes; raises InputError on settings that do not fit together."""
    check(config)
    check_tokens(config, primary_of(config))
    model, section, evaluation = config.model, config.train, config.evaluation
    make = partial(MultiLevelMAE, gate=model.gate, normed=model.mc_norm) if model.mc_decoder else MAE
    init, mae_of = masked_autoencoder(config, model.channels, make, memory=model.memory, long_skips=model.long_skips)
    networks = Networks(config, init, mae_of, partial(predicted, mae_of))
    clip = [optax.clip_by_global_norm(section.clip)] if section.clip else []
    train = training(
        section,
        mae_of=mae_of,
        view=partial(view, config),
        patch=tuple(model.patch),
        optimiser=optax.chain(*clip, adamw(betas=tuple(section.betas), decay=section.decay)),
        parts=config.accumulate,
    )
    stage = Stage(
        name="train",
        rows=rows_of,
        batch=section.batch,
        steps=steps_of(section, config.budget),
        init=partial(start, train, init),
        step=partial(train_step, train),
        parts=config.accumulate,
        size=tuple(config.data.get("crop_from", ())),
        pretrained=Pretrained(use="start", part=plain_part, whole=around_plain),
    )
    system = System(
        name="memmc_mae",
        stages=(stage,),
        uses=("train",),
        primary=primary_of(config),
        repetitions="masks",
        averaged=not residuals.wanted(config)
        and (evaluation.average == "all" or evaluation.score == "ms_ssim_product"),
        words=WORDS | residuals.words(config),
        **scoring(networks),
    )
    seen = partial(clean, config)
    tokens = token_fits(config, {"train": mae_of}, seen)
    rivals = token_rivals(config, system, seen, init, mae_of)
    whole = replace(system, fits=(*system.fits, *tokens), rivals=rivals)
    if whole.sweep:
        whole = replace(whole, sweep=replace(whole.sweep, **sweeping(config, mae_of, "train", seen)))
    if evaluation.residual == "feature":  # only the network has features
        return whole
    error = "ms_ssim" if system.primary == NAME else system.primary  # a rival has no encoder
    prediction = Prediction(
        predict=networks.predict,
        view=seen,
        patch=tuple(model.patch),
        ratio=evaluation.mask_ratio,
        beside=lambda predict: replace(system, primary=error, **scoring(replace(networks, predict=predict))),
    )
    return replace(whole, prediction=prediction)


def scoring(networks: Networks) -> dict[str, Any]:
    """The fields of `System` that score."""
    config, evaluation = networks.config, networks.config.evaluation
    volumes = recipe.is_volume(config)
    fits = residuals.fits(config, partial(batch_evidence, networks), *FITTED_BY, *["stride"] * volumes)
    if not volumes:
        return {"score": partial(score, networks), "masks": evaluation.masks, "fits": fits}
    tokens = prod(grid_of(tuple(config.data.size), tuple(config.model.patch)))
    by_case = evaluation.masks_of == "case"
    sweep = Sweep(
        window=tuple(config.data.size),
        stride=tuple(evaluation.stride),
        repeats=evaluation.masks,
        groups=1 if by_case else groups_of(tokens, visible_tokens(tokens, evaluation.mask_ratio)),
        by_case=by_case,
        score=partial(window_score, networks),
        fuse=partial(fuse, config),
        average=partial(average, weighted=evaluation.average == "hidden"),
    )
    return {"sweep": sweep, "fits": fits}
