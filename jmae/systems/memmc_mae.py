"""MemMC-MAE: a masked autoencoder with a memory in its encoder and a decoder that sees all of the encoder's levels.

Tian, Pang, Liu et al., "Unsupervised Anomaly Detection in Medical Images with a Memory-augmented Multi-level
Cross-attentional Masked Autoencoder", MLMI 2023, arXiv 2203.11725. No code of it is public. Consulted, for what the
paper leaves open: meshed-memory-transformer (memory, gates), facebookresearch/mae (network, training), tianyu0207/IGD
(the same group's scoring by MS-SSIM). In 3D over the same code: `ours`.

One stage, `train`: masked reconstruction. Score: multi-scale structural dissimilarity of the image and its
reconstructions under several masks. The rows of the paper's ablation are `model.memory` (0: none), `model.mc_decoder`
and `model.long_skips`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from jmae.data.manifest import Row
from jmae.data.transforms import moments_of, random_flip, random_resized_crop
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.masking import case_keys, sample_keys, visible_tokens
from jmae.nn.mae import MAE
from jmae.nn.memory import MultiLevelMAE
from jmae.optim import accumulated, adamw, warmup_cosine
from jmae.patches import grid_of, patchify
from jmae.reconstruct import Reconstruction, masked_loss, reconstruct
from jmae.sharding import device_mean
from jmae.ssim import check_ssim, ms_ssim, ms_ssim_map
from jmae.system import Stage, State, Sweep, System, masked_autoencoder, steps_of

SCORES = ("ms_ssim", "ms_ssim_patches", "mse", "ms_ssim_product")


def build(config: ConfigDict) -> System:
    """The MemMC-MAE system that a recipe describes; raises InputError on settings that do not fit together."""
    data, model, train, evaluation = config.data, config.model, config.train, config.evaluation
    size, patch, rank, volumes = tuple(data.size), tuple(model.patch), len(data.size), "join" in data
    if (rank == 3) != volumes:
        raise InputError(f"data.size has {rank} axes: take the preset {'small3d' if rank == 3 else 'small'}")
    if volumes:
        check_settings(data)
    elif data.normalise not in ("fixed", "image"):
        raise InputError(f"data.normalise is {data.normalise!r}: 'fixed' or 'image'")
    if data.normal_crops_only and not volumes:
        raise InputError("memmc_mae trains on whole images: take abnormal rows out of train and normal_crops_only back")
    if evaluation.score not in SCORES[: 3 if volumes else 4]:
        raise InputError(f"evaluation.score is {evaluation.score!r}: one of {', '.join(SCORES[: 3 if volumes else 4])}")
    if model.memory < 0 or evaluation.masks < 1 or train.clip < 0:
        raise InputError("model.memory and train.clip are 0 or more, evaluation.masks 1 or more")
    if model.channels != data.channels and (volumes or data.channels != 1):
        raise InputError(
            f"model.channels is {model.channels}, data.channels {data.channels}: set --config.model.channels="
            f"{data.channels} too (one channel alone is repeated, in 2D)"
        )
    if (
        not volumes
        and data.normalise == "fixed"
        and any(np.size(m) not in (1, model.channels) for m in (data.mean, data.std))
    ):
        raise InputError(f"data.mean and data.std: one value, or one for each of {model.channels} model.channels")
    if not evaluation.scales or min(evaluation.scales) <= 0 or evaluation.sigma <= 0 or min(evaluation.pool) < 1:
        raise InputError(
            "evaluation.scales are weights above 0, evaluation.sigma is above 0, evaluation.pool 1 or more"
        )
    if not 0 <= evaluation.l1_weight <= 1:
        raise InputError(f"evaluation.l1_weight is {evaluation.l1_weight}: from 0 (MS-SSIM alone) to 1")
    if any(axis not in range(rank) for axis in data.flips):
        raise InputError(f"data.flips {tuple(data.flips)}: axes, 0 to {rank - 1}")
    check_ssim(size, tuple(evaluation.window), evaluation.scales, tuple(evaluation.pool))
    tokens = int(np.prod(grid_of(size, patch)))
    for ratio in (train.mask_ratio, evaluation.mask_ratio):
        visible_tokens(tokens, ratio)
    make = partial(MultiLevelMAE, gate=model.gate, normed=model.mc_norm) if model.mc_decoder else MAE
    other = {"memory": model.memory, "long_skips": model.long_skips}
    init, mae_of = masked_autoencoder(config, model.channels, make, **other)

    # --- images in the network's range -------------------------------------------------------------------------------

    def prepared(image: Float[Array, "b *size c"], whole: Array | None = None) -> tuple[Array, Array]:
        """(standardised images, span of values (b,) that an image can have); one channel is repeated. Where each image
        has its own moments, those of a crop are its whole image's."""
        if volumes:
            low, high = data.clip
            return jnp.clip(image, low, high), jnp.full(len(image), high - low)
        mean, std = moments_of(image if whole is None else whole, data)
        wide = jnp.broadcast_to((image - mean) / std, (*image.shape[:-1], model.channels))
        dark, bright = ((end - mean) / std + jnp.zeros((len(image), *[1] * rank, 1)) for end in (0, 1))
        axes = tuple(range(1, image.ndim))
        return wide, jnp.max(bright, axes) - jnp.min(dark, axes)  # ImageNet's moments: 4.7579, as IGD's

    # --- loss: masked reconstruction ---------------------------------------------------------------------------------

    clip = [optax.clip_by_global_norm(train.clip)] if train.clip else []
    optimiser = lambda lr: optax.chain(*clip, adamw(lr, betas=tuple(train.betas), decay=train.decay))

    def train_init(key, results, n):
        params, _ = init(key)
        return State(params=params, opt=optimiser(0.0).init(params), stats={}, step=jnp.int32(0))

    def train_step(state, batch, key, results, *, steps):
        schedule = warmup_cosine(train.lr, warmup=train.warmup * steps, steps=steps)
        mask, view = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(key, batch["index"])), 1, 0)
        crop, flip = jnp.moveaxis(jax.vmap(jax.random.split)(view), 1, 0)
        image = jnp.clip(batch["image"], *data.clip) if volumes else batch["image"]
        if (
            data.crop_scale
        ):  # before one channel is repeated; the crop's weights add up to 1: the order changes rounding alone
            image = jax.vmap(partial(random_resized_crop, scale=tuple(data.crop_scale)))(image, crop)
        image = jax.vmap(partial(random_flip, axes=tuple(int(axis) for axis in data.flips)))(image, flip)
        image, _ = prepared(image, batch["image"])

        def loss(params, image, mask):
            return masked_loss(mae_of(params), image, mask, patch=patch, ratio=train.mask_ratio, masks=1)

        found = accumulated(loss, config.get("accumulate", 1))(state.params, image, mask)
        value, grads = device_mean(found)
        updates, opt = optimiser(schedule(state.step)).update(grads, state.opt, state.params)
        metrics = {"loss": value, "lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return state.replace(params=optax.apply_updates(state.params, updates), opt=opt, step=state.step + 1), metrics

    # --- score -------------------------------------------------------------------------------------------------------

    similarity = dict(
        window=tuple(evaluation.window),
        sigma=evaluation.sigma,
        weights=tuple(evaluation.scales),
        pool=tuple(evaluation.pool),
    )

    def unlike(image: Array, reconstruction: Array, span: Array) -> dict[str, Array]:
        """How unlike an image (b, *size, c) one reconstruction of it is: the map D = sum_j w_j (1 - SSIM_j) of IGD,
        with a share `l1_weight` of |x - x'| / span, and 1 - MS-SSIM, the product over scales."""

        def one(x, y, span):
            d = ms_ssim_map(x[None], y[None], data_range=span, **similarity)[0]
            share = evaluation.l1_weight
            d = d if not share else (1 - share) * d + share * jnp.mean(jnp.abs(x - y), -1) / span
            return {"map": d, "product": 1 - ms_ssim(x[None], y[None], data_range=span, **similarity)[0]}

        return jax.vmap(one)(image, reconstruction, span)

    def seen(results, image: Array, keys: Array, masks: int, chunk: int | None) -> tuple[Reconstruction, dict]:
        """All masks' reconstructions of raw images, and their maps (b, *size)."""
        image, span = prepared(image)
        found = reconstruct(
            mae_of(results["train"]["params"]),
            image,
            keys,
            patch=patch,
            ratio=evaluation.mask_ratio,
            masks=masks,
            paste=evaluation.paste,
            chunk=chunk,
            measure=partial(unlike, span=span),
        )
        pixel = found.measured["map"]
        cells = jnp.mean(patchify(pixel[..., None], patch), -1).reshape(len(image), *grid_of(size, patch))
        patches = jax.image.resize(cells, pixel.shape, "linear")
        return found, {"ms_ssim": pixel, "ms_ssim_patches": patches, "mse": jnp.mean(found.error, -1)}

    def score(results, batch, key, *, chunk=None):
        keys = case_keys(key, batch["case"])
        found, maps = seen(results, batch["image"], keys, evaluation.masks, chunk)
        scores = {name: jnp.mean(m, tuple(range(1, m.ndim))) for name, m in maps.items()}
        scores["ms_ssim_product"] = found.measured["product"]
        mean, std = moments_of(batch["image"], data)
        picture = found.mean * std + mean
        if data.channels != model.channels:
            picture = jnp.mean(picture, -1, keepdims=True)
        return {"maps": maps, "scores": scores, "reconstruction": picture}

    def window_score(results, image: Array, keys: Array) -> tuple[Array, Array]:
        found, maps = seen(results, image, keys, 1, None)
        own = [maps[name][..., None] for name in SCORES[:3]]
        return jnp.concatenate([*own, found.mean], -1), jnp.ones((*image.shape[:-1], 1))

    def fuse(averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict:
        maps = {name: jnp.where(inside, averages[..., k], 0) for k, name in enumerate(SCORES[:3])}
        return {"maps": maps, "reconstruction": averages[..., 3:]}

    def rows(rows: Sequence[Row], results) -> np.ndarray:
        return np.array([i for i, row in enumerate(rows) if row.split == "train"], np.int64)

    steps, parts = steps_of(train, config.budget), config.get("accumulate", 1)
    stage = Stage(
        name="train", rows=rows, batch=train.batch, steps=steps, init=train_init, step=train_step, parts=parts
    )
    about: dict[str, Any] = dict(name="memmc_mae", stages=(stage,), uses=("train",), primary=evaluation.score)
    about["repetitions"] = "masks"
    if not volumes:
        return System(**about, score=score, masks=evaluation.masks)
    stride = tuple(evaluation.stride)
    sweep = Sweep(window=size, stride=stride, repeats=evaluation.masks, score=window_score, fuse=fuse)
    return System(**about, sweep=sweep)
