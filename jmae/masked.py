"""Training of a masked autoencoder: its recipe keys, its views of images, and its step.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377. All systems with a masked
autoencoder use this module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree
from ml_collections import ConfigDict

from jmae.data.augment import moments_of, random_flip, random_resized_crop
from jmae.masking import hidden, random_mask, sample_keys, visible_tokens
from jmae.nn.mae import MAE
from jmae.optim import adamw, begin, descend
from jmae.patches import patchify
from jmae.reconstruct import masked_loss
from jmae.system import Results, State

LOOK = 0  # seed of the masks of `explained_variance`, the same at every look


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage trains a masked autoencoder.

    Attributes:
        mae_of: parameters -> network.
        view: (images as read (b, *size, c), keys (b,)) -> augmented, standardised images (b, *size, channels).
        patch: edges of a patch.
        ratio: share of the tokens that a mask hides.
        masks: masks of an image and step.
        optimiser: of optax, without a learning rate.
        schedule: (number of steps) -> learning rate as a function of the step.
        parts: parts in which a step takes its batch, one after the other.
    """

    mae_of: Callable[[PyTree], MAE]
    view: Callable[[Array, Array], Array]
    patch: tuple[int, ...]
    ratio: float
    masks: int = 1
    optimiser: optax.GradientTransformation
    schedule: Callable[[int], Callable[[Array], Array]]
    parts: int = 1


def training(section: ConfigDict, lr: float | None = None, **fields: Any) -> Training:
    """The training that a section of a recipe describes by `TRAINING_KEYS`; `fields` are the others of `Training`. `lr`
    is the learning rate, where the section's `lr` has another meaning.
    """
    fields = {"optimiser": adamw(betas=tuple(section.betas), decay=section.decay)} | fields
    return Training(
        ratio=section.mask_ratio,
        schedule=partial(_schedule, section.lr if lr is None else lr, section.warmup, section.get("lr_least", 0.0)),
        **fields,
    )


def _schedule(lr: float, warmup: float, least: float, steps: int) -> Callable[[Array], Array]:
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup * steps, steps, least)


def start(
    training: Training, init: Callable[[Array], tuple[PyTree, PyTree]], key: Array, results: Results, n: int
) -> State:
    """The first state with random weights: a stage's `init`, once `training` and the network's `init` are bound."""
    return begin(init(key)[0], training.optimiser)


def train_step(
    training: Training, state: State, batch: PyTree, key: Key[Array, ""], results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """One step of masked reconstruction: a stage's `step`, once `training` is bound.

    Each sample has its own keys of masks and view, from `key` and its number in the table of rows.
    """
    masks, views = split_keys(sample_keys(key, batch["index"]))

    def loss(params: PyTree, image: Array, keys: Array) -> tuple[Array, tuple[dict, dict]]:
        mae, ratio = training.mae_of(params), training.ratio
        return masked_loss(mae, image, keys, patch=training.patch, ratio=ratio, masks=training.masks), ({}, {})

    image = training.view(batch["image"], views)
    rate = training.schedule(steps)(state.step)
    return descend(state, loss, training.optimiser, rate, image, masks, parts=training.parts)


def explained_variance(
    training: Training,
    clean: Callable[[Array], Array],
    state: State,
    batch: PyTree,
    results: Results,
    *,
    at_once: int,
) -> tuple[State, dict[str, Array]]:
    """A look at held-out samples (`system.Check`): how much of the variance of hidden voxels the network explains.

    1 - (mean squared error) / (variance), over the hidden voxels of all samples, of each channel c:
    "explained_variance_c". 1 is a perfect prediction. At 0 the prediction is no better than one value, the mean. A map
    of squared errors is then little more than the squared distance to it.

    Args:
        clean: images as read (b, *size, c) -> as the network sees them, without augmentation.
        at_once: samples at a time.
    """
    mae, channels = training.mae_of(state.params), batch["image"].shape[-1]

    def sums(one: tuple[Array, Array]) -> Array:
        patches = patchify(clean(one[0][None]), training.patch)
        visible = visible_tokens(patches.shape[1], training.ratio)
        keep, restore = random_mask(one[1][None], patches.shape[1], visible)
        error = (mae(patches, keep, restore) - patches) ** 2
        moments = jnp.stack([jnp.ones_like(patches), patches, patches**2, error])
        absent = hidden(restore, visible)[None, ..., None]
        return jnp.sum((moments * absent).reshape(4, -1, channels), 1)

    keys = sample_keys(jax.random.key(LOOK), batch["index"])
    count, first, second, error = jnp.sum(jax.lax.map(sums, (batch["image"], keys), batch_size=at_once), 0)
    variance = second / count - (first / count) ** 2
    explained = 1 - error / count / jnp.maximum(variance, 1e-12)
    return state, {f"explained_variance_{c}": explained[c] for c in range(channels)}


def split_keys(keys: Key[Array, " b"]) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """Two keys for each key."""
    first, second = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return first, second


def crop_and_flip(
    image: Float[Array, "b *size c"],
    keys: Key[Array, " b"],
    *,
    scale: tuple[float, ...],
    axes: tuple[int, ...],
    size: tuple[int, ...] | None = None,
) -> Float[Array, "b *new c"]:
    """A random resized crop of a share `scale` of each image (for (), no crop), then random flips of `axes`.

    A crop has `size`, or else that of the image."""
    crops, flips = split_keys(keys)
    if scale:
        image = jax.vmap(partial(random_resized_crop, scale=(scale[0], scale[1]), to=size))(image, crops)
    return jax.vmap(partial(random_flip, axes=axes))(image, flips)


def standardised(
    image: Float[Array, "b *size c"], config: ConfigDict, whole: Float[Array, "b *full c"] | None = None
) -> Float[Array, "b *size channels"]:
    """Images of [0, 1] less their mean, by their deviation; one channel is repeated to `model.channels`.

    A crop has the moments of its `whole` image where each image has its own. The crop comes before this function
    repeats a channel. That order changes rounding alone, as a crop's weights add up to 1.
    """
    mean, std = moments_of(image if whole is None else whole, config.data)
    return jnp.broadcast_to((image - mean) / std, (*image.shape[:-1], config.model.channels))


def range_of(
    image: Float[Array, "b *size c"], config: ConfigDict
) -> tuple[Float[Array, "b channels"], Float[Array, "b channels"]]:
    """(value of black, span from black to white) in each channel of `standardised` images.

    Fixed moments have one span for all channels, as IGD's code has for ImageNet's: 4.7579. Where each image has its own
    moments, each channel has its own span (ours). A channel of low contrast then changes no other channel's similarity.
    """
    mean, std = moments_of(image, config.data)
    n, channels = len(image), config.model.channels
    flat = lambda value: jnp.broadcast_to(value, (n, *[1] * (image.ndim - 2), channels)).reshape(n, channels)
    black, white = flat((0 - mean) / std), flat((1 - mean) / std)
    if config.data.normalise == "image":
        return black, white - black
    span = jnp.max(white, 1, keepdims=True) - jnp.min(black, 1, keepdims=True)
    return black, jnp.broadcast_to(span, black.shape)
