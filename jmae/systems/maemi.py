"""MAEMI: a 3D masked autoencoder trained on healthy breasts; anomalies are what it reconstructs badly.

Lang, Schwartz, Heitzer, ... Schnabel, "Multispectral 3D Masked Autoencoders for Anomaly Detection in Non-Contrast
Enhanced Breast MRI", 2023, arXiv 2303.05861. Consulted: LangDaniel/MAEMI (the released code), facebookresearch/mae.
Differences: the released code's position codes, averaging and unclipped test images are options (`compat`), off.

One stage, `train`: random crops of the healthy parts of volumes, masked reconstruction. Score: Eq. 2 and 3.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from jmae.data.manifest import Row
from jmae.data.transforms import random_flip
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.masking import hidden, random_mask, sample_keys, visible_tokens
from jmae.optim import accumulated, adamw, warmup_cosine
from jmae.patches import grid_of, patchify, sincos_positions, unpatchify
from jmae.reconstruct import masked_loss
from jmae.scoring import minimum_filter
from jmae.sharding import device_mean
from jmae.system import Pretrained, Stage, State, Sweep, System, masked_autoencoder, steps_of
from jmae.windows import average

SEEN = 1e-6  # weight of a visible token's error beside a hidden one's, where only these count


def released_positions(grid: tuple[int, ...], width: int) -> np.ndarray:
    """The released code's permuted codes: a meshgrid in (S, L, P) order with its first two axes exchanged, read as if
    it were (P, L, S). Unique for each token, but neighbours in space are not neighbours in code."""
    p, l, s = grid  # noqa: E741
    order = np.arange(p * l * s).reshape(p, l, s).transpose(1, 2, 0).reshape(-1)
    return sincos_positions(grid, width)[order]


def build(config: ConfigDict) -> System:
    """The MAEMI system that a recipe describes; raises InputError on settings that do not fit together."""
    data, train, evaluation, compat = config.data, config.train, config.evaluation, config.compat
    check_settings(data)
    size, patch, stride = tuple(data.size), tuple(config.model.patch), tuple(evaluation.stride)
    filtered, ratio = tuple(evaluation.filter), evaluation.mask_ratio
    low, high = data.clip
    if len(size) != len(stride) or len(size) != len(filtered):
        raise InputError(
            f"data.size {size}, evaluation.stride {stride} and evaluation.filter {filtered}: a value an axis"
        )
    if any(not 0 < s <= w for s, w in zip(stride, size, strict=True)) or evaluation.repeats < 1:
        raise InputError(f"evaluation.stride {stride} is from 1 to data.size {size}, evaluation.repeats 1 or more")
    if min(filtered) < 1:
        raise InputError(f"evaluation.filter {filtered}: 1 voxel or more on each axis")
    if compat.averaging and evaluation.error == "hidden":
        raise InputError("compat.averaging is of evaluation.error='all', as the released code: set that")
    if evaluation.error not in ("all", "hidden"):
        raise InputError(f"evaluation.error is {evaluation.error!r}: 'all' tokens (the paper) or 'hidden' ones (ours)")
    tokens = int(np.prod(grid_of(size, patch)))
    kept = visible_tokens(tokens, ratio)
    visible_tokens(tokens, train.mask_ratio)
    positions = released_positions if compat.position else sincos_positions
    init, mae_of = masked_autoencoder(config, data.channels, positions=positions)
    optimiser = partial(adamw, betas=tuple(train.betas), decay=train.decay)

    # --- loss: masked reconstruction of a random crop ------------------------------------------------------------

    def train_init(key, results, n):
        params, _ = init(key)
        return State(params=params, opt=optimiser(0.0).init(params), stats={}, step=jnp.int32(0))

    def train_step(state, batch, key, results, *, steps):
        schedule = warmup_cosine(train.lr, warmup=train.warmup * steps, steps=steps, least=train.lr_least)
        mask, view = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(key, batch["index"])), 1, 0)
        image = jax.vmap(partial(random_flip, axes=tuple(data.flips)))(jnp.clip(batch["image"], low, high), view)

        def loss(params, image, mask):
            return masked_loss(mae_of(params), image, mask, patch=patch, ratio=train.mask_ratio, masks=1)

        found = accumulated(loss, config.get("accumulate", 1))(state.params, image, mask)
        value, grads = device_mean(found)
        updates, opt = optimiser(schedule(state.step)).update(grads, state.opt, state.params)
        metrics = {"loss": value, "lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return state.replace(params=optax.apply_updates(state.params, updates), opt=opt, step=state.step + 1), metrics

    # --- score (Eq. 2 and 3) -----------------------------------------------------------------------------------------

    def window_error(results, image: Float[Array, "b *size c"], keys) -> tuple[Array, Array]:
        """Eq. 2 of each window under one random mask: the filtered squared error of each sequence at all tokens,
        visible ones too, and the prediction; weights are 1 where a voxel was hidden and all but 0 where not, so that
        only voxels that no mask hid have the error of a visible token."""
        mae, image = mae_of(results["train"]["params"]), image if compat.clip else jnp.clip(image, low, high)
        patches = patchify(image, patch)
        keep, restore = random_mask(keys, tokens, kept)
        prediction = unpatchify(mae(patches, keep, restore), size, patch)
        error = minimum_filter((image - prediction) ** 2, filtered)
        weights = jnp.where(hidden(restore, kept), 1, SEEN)[..., None]
        weights = jnp.broadcast_to(weights, (*restore.shape, int(np.prod(patch))))
        return jnp.concatenate([error, prediction], -1), unpatchify(weights, size, patch)

    def fuse(averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict:
        """Eq. 3: the mean over sequences, filtered once more."""
        error, prediction = jnp.split(averages, 2, -1)
        mean = jnp.where(inside, jnp.mean(error, -1), jnp.inf)
        fused = minimum_filter(mean[None, ..., None], filtered)[0, ..., 0]
        return {"maps": {"maemi": jnp.where(inside, fused, 0)}, "reconstruction": prediction}

    def rows(rows: Sequence[Row], results) -> np.ndarray:
        return np.array([i for i, row in enumerate(rows) if row.split == "train"], np.int64)

    stage = Stage(
        name="train",
        rows=rows,
        batch=train.batch,
        steps=steps_of(train, config.budget),
        init=train_init,
        step=train_step,
        pretrained=Pretrained(use="start", positions=positions),
        parts=config.get("accumulate", 1),
    )
    sweep = Sweep(
        window=size,
        stride=stride,
        repeats=evaluation.repeats,
        score=window_error,
        fuse=fuse,
        average=partial(average, weighted=evaluation.error == "hidden", released=compat.averaging),
    )
    return System(name="maemi", stages=(stage,), uses=("train",), primary="maemi", sweep=sweep, repetitions="repeats")
