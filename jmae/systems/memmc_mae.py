"""MemMC-MAE: a masked autoencoder with a memory in its encoder and a decoder that attends to all encoder levels.

Tian, Pang, Liu et al., "Unsupervised Anomaly Detection in Medical Images with a Memory-augmented Multi-level
Cross-attentional Masked Autoencoder", MLMI 2023, arXiv 2203.11725. No code of it is public. Consulted, for what the
paper leaves open: meshed-memory-transformer (memory, gates), facebookresearch/mae (network, training), tianyu0207/IGD
(the same group's scoring by MS-SSIM). In 3D over the same code: `ours`.

One stage, `train`: masked reconstruction. Score: multi-scale structural dissimilarity of the image and its
reconstructions under several masks. The rows of the paper's ablation are `model.memory` (0: none), `model.mc_decoder`
and `model.long_skips`. [D] marks a value that the paper leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree
from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.transforms import moments_of
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.masked import (
    MODEL_KEYS,
    STANDARDISING_KEYS,
    TRAINING_KEYS,
    crop_and_flip,
    declared,
    standardised,
    start,
    train_step,
    training,
)
from jmae.masking import case_keys, visible_tokens
from jmae.nn.mae import MAE
from jmae.nn.memory import GATES, MultiLevelMAE
from jmae.optim import adamw
from jmae.patches import grid_of, patchify
from jmae.reconstruct import Reconstruction, reconstruct
from jmae.ssim import check_ssim, ms_ssim, ms_ssim_map
from jmae.system import Results, Stage, Sweep, System, masked_autoencoder, rows_of, steps_of

SCORES = ("ms_ssim", "ms_ssim_patches", "mse", "ms_ssim_product")  # the last one is of whole images, without a map

KEYS = {
    "checkpoint_every": recipe.Key(5000, "Steps between two checkpoints.", "steps", least=1),
    "data.crop_scale": recipe.Key(
        (0.2, 1.0),
        "Share of the image that a random resized crop takes [D]; ours: of the image at `size`; (): no crop.",
        above=0,
        most=1,
        length=2,
        empty=True,
    ),
    **declared("model", MODEL_KEYS),
    "model.channels": recipe.Key(3, "Channels of the network; a grey image is repeated.", least=1),
    "model.memory": recipe.Key(40, "Memory slots of each encoder block [D]; 0: plain attention.", least=0),
    "model.mc_decoder": recipe.Key(True, "Whether the decoder attends to all encoder levels; the MAE's does not."),
    "model.gate": recipe.Key(
        "channel",
        'Gates of a level: "channel", a number for each channel and token [D]; "token", one for each token.',
        choices=GATES,
    ),
    "model.mc_norm": recipe.Key(True, "Whether the sum over levels is divided by the root of their number [D]."),
    "model.long_skips": recipe.Key(
        True, "Whether the output of block i is added to the input of block depth - 1 - i [D], in both stacks."
    ),
    **declared("train", TRAINING_KEYS, epochs=2000, lr=1.5e-3, warmup=5 / 2000),
    "train.clip": recipe.Key(0.0, "Greatest norm of the gradient; 0: any.", least=0),
    "evaluation.score": recipe.Key("ms_ssim", "The primary score.", choices=SCORES),
    "evaluation.masks": recipe.Key(10, "Masks of a test image.", least=1),
    "evaluation.mask_ratio": recipe.Key(0.75, "Share of the tokens that a mask hides.", above=0, below=1),
    "evaluation.paste": recipe.Key(
        True, "Whether visible patches are the input's [D]; False: the decoder's output everywhere."
    ),
    "evaluation.window": recipe.Key((11, 11), "Edges of the SSIM window, odd; IGD's [D].", "pixels", least=1),
    "evaluation.sigma": recipe.Key(1.5, "Deviation of the SSIM window's weights; IGD's [D].", "pixels", above=0),
    "evaluation.scales": recipe.Key(
        (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), "Weights of the scales, the finest one first.", above=0
    ),
    "evaluation.pool": recipe.Key((2, 2), "Pixels of a scale that make one of the next scale.", least=1),
    "evaluation.l1_weight": recipe.Key(
        0.0, "Share of the absolute error in the map; 0: MS-SSIM alone; IGD: 0.15.", least=0, most=1
    ),
    "evaluation.iou": recipe.Key(
        95.0,
        "Percentile of the pixels of val's normals at which lesions are outlined for the IoU; 0: no IoU.",
        "%",
        least=0,
        most=100,
    ),
}
IMAGE_KEYS = {
    **declared("data", STANDARDISING_KEYS, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "data.flips": recipe.Key((), "Axes, each mirrored with probability 1/2; the paper lists none.", choices=(0, 1)),
}
VOLUME_KEYS = {
    "data.channels": recipe.Key(2, "Sequences of a volume.", least=1),
    "data.clip": recipe.Key((0.001, 1.5), "Bounds of the values that the network sees.", length=2),
    "data.flips": recipe.Key((0, 1), "Axes, each mirrored with probability 1/2.", choices=(0, 1, 2)),
    "evaluation.score": recipe.Key("ms_ssim", "The primary score.", choices=SCORES[:3]),
    "evaluation.iou": recipe.Key(0.0, "Only for images: 0, no IoU.", "%", least=0, most=0),
}


@dataclass(frozen=True)
class Networks:
    """The network of a recipe, and the recipe: `init` and `mae_of` are those of `system.network`."""

    config: ConfigDict
    init: Callable[[Array], tuple[PyTree, PyTree]]
    mae_of: Callable[[PyTree], MAE]


# --- loss: masked reconstruction (masked.train_step) ------------------------------------------------------------------


def view(config: ConfigDict, image: Float[Array, "b *size c"], keys: Key[Array, " b"]) -> Float[Array, "b *size k"]:
    """Crops and flips of images, in the network's range and channels."""
    data, volumes, raw = config.data, recipe.is_volume(config), image
    image = jnp.clip(image, *data.clip) if volumes else image
    image = crop_and_flip(image, keys, scale=tuple(data.crop_scale), axes=tuple(int(axis) for axis in data.flips))
    return jnp.clip(image, *data.clip) if volumes else standardised(image, config, raw)


# --- score ------------------------------------------------------------------------------------------------------------


def span_of(config: ConfigDict, image: Float[Array, "b *size c"]) -> Float[Array, " b"]:
    """Span of the values that each image can have in the network's range."""
    if recipe.is_volume(config):
        low, high = config.data.clip
        return jnp.full(len(image), high - low)
    mean, std = moments_of(image, config.data)
    dark, bright = ((end - mean) / std + jnp.zeros((len(image), *[1] * (image.ndim - 1))) for end in (0, 1))
    axes = tuple(range(1, image.ndim))
    return jnp.max(bright, axes) - jnp.min(dark, axes)  # ImageNet's moments: 4.7579, as IGD's


def dissimilarity(
    evaluation: ConfigDict,
    image: Float[Array, "b *size c"],
    reconstruction: Float[Array, "b *size c"],
    *,
    span: Float[Array, " b"],
) -> dict[str, Array]:
    """How unlike its reconstruction each image is: {"map": (b, *size), "product": (b,)}.

    "map" is D = sum_j w_j (1 - SSIM_j) of IGD, with a share `l1_weight` of |x - x'| / span. "product" is 1 - MS-SSIM,
    the product over scales.
    """
    similarity = dict(
        window=tuple(evaluation.window),
        sigma=evaluation.sigma,
        weights=tuple(evaluation.scales),
        pool=tuple(evaluation.pool),
    )
    share = evaluation.l1_weight

    def one(x, y, span):
        d = ms_ssim_map(x[None], y[None], data_range=span, **similarity)[0]
        d = d if not share else (1 - share) * d + share * jnp.mean(jnp.abs(x - y), -1) / span
        return {"map": d, "product": 1 - ms_ssim(x[None], y[None], data_range=span, **similarity)[0]}

    return jax.vmap(one)(image, reconstruction, span)


def reconstructed(
    networks: Networks,
    results: Results,
    raw: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    *,
    masks: int,
    chunk: int | None,
) -> tuple[Reconstruction, dict[str, Array]]:
    """The reconstruction of images under `masks` masks, and the maps of the first three `SCORES`."""
    config, evaluation = networks.config, networks.config.evaluation
    patch = tuple(config.model.patch)
    image = jnp.clip(raw, *config.data.clip) if recipe.is_volume(config) else standardised(raw, config)
    found = reconstruct(
        networks.mae_of(results["train"]["params"]),
        image,
        keys,
        patch=patch,
        ratio=evaluation.mask_ratio,
        masks=masks,
        paste=evaluation.paste,
        chunk=chunk,
        measure=partial(dissimilarity, evaluation, span=span_of(config, raw)),
    )
    pixel = found.measured["map"]
    cells = jnp.mean(patchify(pixel[..., None], patch), -1).reshape(len(image), *grid_of(image.shape[1:-1], patch))
    patches = jax.image.resize(cells, pixel.shape, "linear")
    return found, {"ms_ssim": pixel, "ms_ssim_patches": patches, "mse": jnp.mean(found.error, -1)}


def score(
    networks: Networks, results: Results, batch: PyTree, key: Key[Array, ""], *, chunk: int | None = None
) -> dict[str, Any]:
    """The scores of images; see `System.score`."""
    config, raw = networks.config, batch["image"]
    keys = case_keys(key, batch["case"])
    found, maps = reconstructed(networks, results, raw, keys, masks=config.evaluation.masks, chunk=chunk)
    scores = {name: jnp.mean(m, tuple(range(1, m.ndim))) for name, m in maps.items()}
    scores["ms_ssim_product"] = found.measured["product"]
    mean, std = moments_of(raw, config.data)
    picture = found.mean * std + mean
    if config.data.channels != config.model.channels:
        picture = jnp.mean(picture, -1, keepdims=True)
    return {"maps": maps, "scores": scores, "reconstruction": picture}


def window_score(
    networks: Networks, results: Results, image: Float[Array, "b *size c"], keys: Key[Array, " b"]
) -> tuple[Float[Array, "b *size k"], Float[Array, "b *size 1"]]:
    """(the maps and the reconstruction of windows under one mask, equal weights); see `Sweep.score`."""
    found, maps = reconstructed(networks, results, image, keys, masks=1, chunk=None)
    values = [maps[name][..., None] for name in SCORES[:3]]
    return jnp.concatenate([*values, found.mean], -1), jnp.ones((*image.shape[:-1], 1))


def fuse(averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict[str, Any]:
    """The maps and the reconstruction of a volume from the averages of `window_score`."""
    maps = {name: jnp.where(inside, averages[..., k], 0) for k, name in enumerate(SCORES[:3])}
    return {"maps": maps, "reconstruction": averages[..., 3:]}


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
    if not evaluation.scales:
        raise InputError("evaluation.scales is empty: give a weight for each scale")
    check_ssim(size, tuple(evaluation.window), evaluation.scales, tuple(evaluation.pool))
    tokens = prod(grid_of(size, tuple(model.patch)))
    for ratio in (config.train.mask_ratio, evaluation.mask_ratio):
        visible_tokens(tokens, ratio)


def build(config: ConfigDict) -> System:
    """The MemMC-MAE system that a recipe describes; raises InputError on settings that do not fit together."""
    check(config)
    model, section, evaluation = config.model, config.train, config.evaluation
    make = partial(MultiLevelMAE, gate=model.gate, normed=model.mc_norm) if model.mc_decoder else MAE
    init, mae_of = masked_autoencoder(config, model.channels, make, memory=model.memory, long_skips=model.long_skips)
    networks = Networks(config, init, mae_of)
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
    )
    system = partial(
        System,
        name="memmc_mae",
        stages=(stage,),
        uses=("train",),
        primary=evaluation.score,
        repetitions="masks",
    )
    if not recipe.is_volume(config):
        return system(score=partial(score, networks), masks=evaluation.masks)
    sweep = Sweep(
        window=tuple(config.data.size),
        stride=tuple(evaluation.stride),
        repeats=evaluation.masks,
        score=partial(window_score, networks),
        fuse=fuse,
    )
    return system(sweep=sweep)
