"""P-PII: a segmentation network trained on probabilistic Poisson image interpolations of normal images.

Müller, Baugh, Tan, Dombrowski, Kainz, "Confidence-Aware and Self-Supervised Image Anomaly Localisation", UNSURE 2023,
arXiv 2303.13227. Consulted: ividja/Probabilistic-PII (the generator), baumgach/PHiSeg-code (the backbones), jemtan/PII.
Nothing else is public. The recipe decides what the paper leaves open.

The only stage, `train`, gives each image new anomalies at every step; the network learns to find their pixels.
Variants are kinds of anomalies: the paper's generator (`paper`), the authors' file (`released`), ours (`jmae`), and the
older tasks `pii`, `fpi`, `cutpaste`, `nsa`. Backbones are `unet`, `mc_unet` and `phiseg`. The last two are random: a
map is the mean of samples, and the samples' deviation is the confidence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from jaxtyping import Key as RandomKey
from ml_collections import ConfigDict

from jmae.anomalies.cutpaste import cutpaste
from jmae.anomalies.interpolation import fpi, pii, ppii
from jmae.anomalies.nsa import nsa
from jmae.data.augment import random_flip, random_warp
from jmae.data.manifest import Row, held_out
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.keys.ppii import PRESETS
from jmae.losses import hierarchical_loss, soft_cross_entropy
from jmae.masking import fold_in, sample_keys, scoring_keys, standard_error
from jmae.nn.phiseg import PHiSeg
from jmae.nn.unet import UNet, check_size
from jmae.optim import adam, begin, descend
from jmae.recipe import is_volume
from jmae.run_folder import log
from jmae.scoring import case_score_words
from jmae.sharding import device_gather, device_number
from jmae.system import (
    Check,
    Results,
    Stage,
    State,
    Sweep,
    System,
    best_weights,
    compute_type,
    keep_best,
    network,
    stats_of,
    steps_of,
    with_best,
)

OTHERS: dict[str, Callable] = {"pii": pii, "fpi": fpi, "cutpaste": cutpaste, "nsa": nsa}

RULE = "dice"
WORDS = {
    "ppii": "mean of the map",
    "ppii_top_quarter": "mean of the highest quarter of the map's values",
    "ppii_highest": "highest value of the map",
}
LOG_WORDS = {
    "target": "mean of the target map (0 normal, 1 anomalous)",
    "dice": "Dice of drawn anomalies (1 is perfect)",
    "dice_of_constant": "Dice of the best constant map",
    "best_dice": "best Dice so far",
}


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that do not fit together."""
    data, model, anomaly, train = config.data, config.model, config.anomaly, config.train
    rank, window = len(data.size), tuple(data.window)
    if rank not in (2, 3):
        raise InputError(f"data.size is {tuple(data.size)}: 2 or 3 numbers")
    ranges = {"patch": anomaly.patch, "half": anomaly.half}
    ranges |= {f"{name}.{key}": anomaly[name][key] for name in PRESETS for key in ("anomalies", "raters", "strength")}
    for key, (low, high) in ranges.items():
        if low > high:
            raise InputError(f"anomaly.{key} is {(low, high)}: the least value comes first")
    if window and not (all(isinstance(end, int | float) for end in window) and window[0] < window[1]):
        raise InputError(f"data.window is {window}: two numbers LOW,HIGH, LOW below HIGH")
    if wrong := [axis for axis in train.flips if axis not in range(rank)]:
        raise InputError(f"train.flips has {wrong[0]}: axes are 0 to {rank - 1}")
    if rank == 3:
        check_settings(data)
        if not data.equalise and not window:
            raise InputError("data.equalise=false of volumes needs data.window=LOW,HIGH: what becomes 0 and 1")
    check_size(tuple(data.size), len(widths_of(config)))
    if train.batch < 2 and anomaly.source == "other":
        raise InputError("train.batch=1: anomaly.source=other takes another image of the batch: set it to self")
    if train.variance_weight and config.variant not in PRESETS:
        raise InputError(f"train.variance_weight goes with variants {', '.join(PRESETS)}, which have raters")
    if train.target == "rater" and config.variant not in PRESETS:
        raise InputError(f"train.target=rater goes with variants {', '.join(PRESETS)}, which have raters")
    if model.backbone == "phiseg" and train.loss == "mse":
        raise InputError("train.loss=mse goes with the U-Nets: PHiSeg's loss is a likelihood")
    if model.backbone == "phiseg" and train.variance_weight:
        raise InputError("train.variance_weight goes with the U-Nets: PHiSeg's loss is a likelihood")


# --- system -----------------------------------------------------------------------------------------------------------

Task = Callable[..., tuple[Array, Array, dict[str, Any]]]
"""(image, source or all images of the batch, key, number in the batch) -> (image, target, extras)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The recipe, and what follows from it: the first argument of the functions below.

    Attributes:
        config: the recipe.
        init: (key) -> (params, stats) of a new network.
        bind: (params, stats) -> the network.
        task: makes the synthetic anomalies of an image.
    """

    config: ConfigDict
    init: Callable[[Array], tuple[Any, Any]]
    bind: Callable[..., Any]
    task: Task

    @property
    def random(self) -> bool:
        """Whether the network draws samples."""
        return self.config.model.backbone != "unet"

    @property
    def samples(self) -> int:
        """Number of samples of which a map is the mean."""
        return self.config.evaluation.samples if self.random else 1


def build(config: ConfigDict) -> System:
    """The P-PII system that a recipe describes; raises InputError for settings that do not fit together."""
    check(config)
    init, bind = network(partial(make, config))
    setup = Setup(config=config, init=init, bind=bind, task=task_of(config))
    about: dict[str, Any] = dict(name="ppii", stages=(stage_of(setup),), uses=("train",), primary="ppii", best=(RULE,))
    about |= {"repetitions": "samples", "map_words": "probability of an anomaly, from 0 to 1"}
    if not is_volume(config):
        return System(**about, score=partial(score, setup), masks=setup.samples, words=WORDS)
    window, stride = tuple(config.data.size), tuple(config.evaluation.stride)
    sweep = Sweep(
        window=window,
        stride=stride,
        by_case=config.evaluation.masks_of == "case",
        score=partial(score_window, setup),
        fuse=partial(fuse, setup),
    )
    return System(**about, sweep=sweep, words={"ppii": case_score_words("top", share=config.evaluation.top)})


def stage_of(setup: Setup) -> Stage:
    """The only stage."""
    train = setup.config.train
    looks = Check(
        every=train.validate_every,
        samples=train.validation_samples,
        rows=partial(dice_rows, setup),
        look=partial(look, setup),
    )
    return Stage(
        name="train",
        rows=partial(training_rows, setup),
        batch=train.batch,
        steps=steps_of(train, setup.config.budget),
        init=partial(first_state, setup),
        step=partial(step, setup),
        checks=(looks,) if setup.config.select == RULE else (),
        words=LOG_WORDS,
        nothing={"best_dice": "dice_of_constant"},
    )


def widths_of(config: ConfigDict) -> tuple[int, ...]:
    """Channels of each level of the backbone."""
    widths = tuple(config.model.widths)
    return widths + 2 * widths[-1:] if config.model.backbone == "phiseg" else widths


def make(config: ConfigDict, rngs: Any) -> UNet | PHiSeg:
    """A new backbone."""
    model, common = config.model, dict(rank=len(config.data.size), channels=config.data.channels)
    common |= dict(widths=widths_of(config), dtype=compute_type(config), remat=model.remat, rngs=rngs)
    if model.backbone == "phiseg":
        return PHiSeg(**common, latent_levels=model.latent_levels, latent=model.latent, base=model.base)
    rate = model.dropout if model.backbone == "mc_unet" else 0.0
    return UNet(**common, head=model.base, dropout=rate, prior=model.prior)


# --- anomalies --------------------------------------------------------------------------------------------------------


def options_of(config: ConfigDict) -> dict[str, Any]:
    """The options of the generator `ppii` that a recipe sets."""
    anomaly, numbers = config.anomaly, config.anomaly[config.variant]
    return {
        "preset": config.variant,
        "anomalies": tuple(numbers.anomalies),
        "raters": tuple(numbers.raters),
        "strength": tuple(numbers.strength),
        "gain": numbers.gain,
        "patch": tuple(anomaly.patch),
        "core": anomaly.core,
        "shape": anomaly.shape,
        "deviation": config.train.variance_weight > 0,
        "rater": config.train.target == "rater",
    }


def task_of(config: ConfigDict) -> Task:
    """The generator of anomalies that a recipe describes."""
    anomaly, least = config.anomaly, min(config.data.size)
    if config.variant in PRESETS:
        return partial(ppii, **options_of(config))
    task = OTHERS[config.variant]
    if config.variant in ("pii", "fpi"):
        task = partial(task, half=tuple(anomaly.half), core=anomaly.core)
    elif config.variant == "nsa":  # its filters have 5 pixels and a radius of 5 pixels at 256
        task = partial(task, medians=(2 * round(least / 103) + 1, max(1, round(5 * least / 256))))
    return lambda image, source, key, number: task(image, source, key)


def shown(config: ConfigDict, most: int = 3) -> tuple[list[str], Callable[..., list[Array]]]:
    """What a recipe trains on: titles, and the function (image, source, key) -> their arrays.

    They are the image with anomalies and its target. Where there are raters, the images of `most` of them and the
    deviation over all follow.
    """
    if config.variant not in PRESETS:
        make = task_of(config)
        return ["image", "target"], lambda image, source, key: list(make(image, source, key, None)[:2])
    whole = partial(ppii, **options_of(config) | {"deviation": True, "rater": True})

    def draw(image: Array, source: Array, key: Array) -> list[Array]:
        out, target, extras = whole(image, source, key)
        raters = jax.vmap(lambda k: whole(image, source, key, rater_number=k)[2]["rater"])(jnp.arange(most))
        label = extras["rater_target"] if config.train.target == "rater" else target
        return [out, label, *raters, extras["deviation"]]

    return ["image", "target", *(f"rater {k + 1}" for k in range(most)), "deviation"], draw


def corrupt(
    setup: Setup, image: Float[Array, "b *size c"], keys: RandomKey[Array, " b"]
) -> tuple[Float[Array, "b *size c"], Float[Array, " b *size"], Array]:
    """Images with new anomalies, their targets, and the deviations (b, *size) over raters, or 0 without raters.

    The target is the mean label, or with train.target=rater the label of one rater of each anomaly.

    Sources are images of the whole batch, also under `jax.pmap`.
    """
    everyone = device_gather(image)
    place = len(image) * device_number() + jnp.arange(len(image))
    task_keys = fold_in(keys, 1)
    if setup.config.anomaly.source == "self":
        out = jax.vmap(lambda image, key: setup.task(image, image, key, None))(image, task_keys)
    elif setup.config.variant in PRESETS:
        out = jax.vmap(setup.task, (0, None, 0, 0))(image, everyone, task_keys, place)
    else:
        turn = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 1, len(everyone)))(keys)
        source = everyone[(place + turn) % len(everyone)]
        out = jax.vmap(setup.task, (0, 0, 0, None))(image, source, task_keys, None)
    return out[0], out[2].get("rater_target", out[1]), out[2].get("deviation", jnp.zeros(()))


def augment(setup: Setup, image: Float[Array, "b *size c"], keys: RandomKey[Array, " b"]) -> Float[Array, "b *size c"]:
    """The augmentations of section 3.1, which come before the anomalies."""
    train = setup.config.train
    if train.scaling or train.rotation or train.elastic:
        warp = partial(random_warp, offset=train.scaling, degrees=train.rotation, elastic=train.elastic)
        image = jax.vmap(warp)(image, fold_in(keys, 0))
    flip = partial(random_flip, axes=tuple(train.flips))
    return jax.vmap(flip)(image, fold_in(keys, 1)) if train.flips else image


# --- training ---------------------------------------------------------------------------------------------------------


def centred(image: Array) -> Array:
    """The network's input for an image in [0, 1] (PHiSeg's code)."""
    return image - 0.5


def loss(
    setup: Setup,
    stats: Any,
    params: Any,
    image: Float[Array, "b *size c"],
    target: Float[Array, " b *size"],
    deviation: Array,
    keys: RandomKey[Array, " b"],
) -> tuple[Float[Array, ""], tuple[dict[str, Any], dict[str, Array]]]:
    """(loss, (new statistics, metrics)): PHiSeg's loss, or the mean of the pixels' losses.

    Ours: a pixel counts less where raters disagree (the paper's future work).
    """
    train, net = setup.config.train, setup.bind(params, stats)
    if setup.config.model.backbone == "phiseg":
        y = jnp.stack([1 - target, target], -1)
        logits, q, p = net(centred(image), y, keys, train=True)
        value = hierarchical_loss(logits, q, p, target)
    else:
        prediction = net(centred(image), train=True, keys=keys if setup.random else None)
        weight = 1 / (1 + train.variance_weight * deviation**2)
        value = jnp.mean(weight * pixel_loss(train.loss, prediction, target))
    return value, ({"network": stats_of(net)}, {"target": jnp.mean(target)})


def pixel_loss(
    kind: str, logits: Float[Array, "b *size 2"], target: Float[Array, " b *size"]
) -> Float[Array, " b *size"]:
    """The loss of each pixel: "mse" of the probability, or "cross_entropy"."""
    if kind == "mse":
        return (jax.nn.softmax(logits)[..., 1] - target) ** 2
    return soft_cross_entropy(logits, target)


def first_state(setup: Setup, key: Array, results: Results, n: int) -> State:
    """A new network, with room for its best weights under select=dice."""
    params, stats = setup.init(key)
    state = begin(params, adam(betas=setup.config.train.betas), {"network": stats})
    return in_checkpoint(with_best(of_network(state), RULE)) if setup.config.select == RULE else state


def step(setup: Setup, state: State, batch: Any, key: Array, results: Results, *, steps: int) -> Any:
    """One step of Adam on images with new anomalies: (state, metrics)."""
    train, keys = setup.config.train, sample_keys(key, batch["index"])
    view_keys, anomaly_keys, network_keys = (fold_in(keys, k) for k in range(3))
    image, target, deviation = corrupt(setup, augment(setup, batch["image"], view_keys), anomaly_keys)
    of_params = partial(loss, setup, state.stats["network"])
    optimiser = adam(betas=train.betas)
    return descend(state, of_params, optimiser, train.lr, image, target, deviation, network_keys)


def training_rows(setup: Setup, rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of the training rows that are not held out."""
    apart = held_out(rows, setup.config.train.held_out)
    return np.array([i for i, row in enumerate(rows) if row.split == "train" and not apart[i]], np.int64)


# --- best Dice --------------------------------------------------------------------------------------------------------


def of_network(state: State) -> State:
    """The state with the network's own statistics, beside the best weights if it has them.

    In a checkpoint the statistics of the last weights are one level deeper than those of the best weights.
    """
    best = {name: state.stats[name] for name in ("best",) if name in state.stats}
    return state.replace(stats=state.stats["network"] | best)


def in_checkpoint(state: State) -> State:
    """The inverse of `of_network`."""
    stats = dict(state.stats)
    best = {name: stats.pop(name) for name in ("best",) if name in stats}
    return state.replace(stats={"network": stats} | best)


def dice_rows(setup: Setup, rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the rows held out, or of the training rows where there are none (fewer than ten patients)."""
    apart = np.flatnonzero(held_out(rows, setup.config.train.held_out))
    if apart.size:
        return apart
    log("best Dice: on training images with other anomalies, as none is held out (of ten patients or more)")
    return training_rows(setup, rows, {})


def look(setup: Setup, state: State, batch: Any, results: Results) -> tuple[State, dict[str, Array]]:
    """Dice on synthetic samples that are the same at every look. The state keeps the weights of the best."""
    train, key = setup.config.train, jax.random.key(0)
    anomaly_keys, network_keys = (sample_keys(jax.random.fold_in(key, k), batch["index"]) for k in range(2))
    image, target, _ = corrupt(setup, batch["image"], anomaly_keys)
    net = partial(probability, setup, state.params, state.stats["network"])
    one = lambda x: net(x[0][None], x[1][None])[0]
    prediction = jax.lax.map(one, (image, network_keys), batch_size=train.batch)
    value = dice(prediction, target, train.dice_at)
    state = in_checkpoint(keep_best(of_network(state), RULE, value))
    constant = dice_of_constant(target, train.dice_at)
    return state, {"dice": value, "dice_of_constant": constant, "best_dice": state.stats["best"][RULE]}


def dice(prediction: Float[Array, " *b"], target: Float[Array, " *b"], threshold: float = 0.0) -> Float[Array, ""]:
    """2 sum(p y) / (sum(p^2) + sum(y^2)) over all pixels; of (p > threshold) and (y > threshold) where it is above 0.

    Of binary maps the formula is the Dice score. Without a threshold it is ours: |x - x'|, the target of `paper`,
    hardly ever reaches 0.5.
    """
    if threshold:
        prediction, target = (jnp.where(x > threshold, 1.0, 0.0) for x in (prediction, target))
    both = jnp.sum(prediction**2) + jnp.sum(target**2)
    return 2 * jnp.sum(prediction * target) / jnp.maximum(both, 1e-6)


def dice_of_constant(target: Float[Array, " *b"], threshold: float = 0.0) -> Float[Array, ""]:
    """The highest `dice` of a prediction that has one value everywhere. A network must do better to have learnt."""
    if threshold:
        return dice(jnp.ones_like(target), target, threshold)
    return dice(jnp.full_like(target, jnp.sqrt(jnp.mean(target**2))), target)


# --- score ------------------------------------------------------------------------------------------------------------


def probability(
    setup: Setup, params: Any, stats: Any, image: Float[Array, "b *size c"], keys: RandomKey[Array, " b"]
) -> Float[Array, " b *size"]:
    """The probability of an anomaly at each pixel, in one sample by the keys."""
    net = setup.bind(params, stats)
    if setup.config.model.backbone == "phiseg":
        logits = net.generate(net.features(centred(image)), keys)
    else:
        logits = net(centred(image), train=False, keys=keys if setup.random else None)
    return jax.nn.softmax(logits)[..., 1]


def scored_weights(setup: Setup, results: Results) -> tuple[Any, Any]:
    """(params, stats) of the network that scores: the best under select=dice, else the last."""
    result = results["train"]
    if setup.config.select != RULE:
        return result["params"], result["stats"]["network"]
    stats = result["stats"]
    best = best_weights({"params": result["params"], "stats": stats["network"] | {"best": stats["best"]}}, RULE)
    return best["params"], best["stats"]


def over_pixels(images: Float[Array, "a b *size"]) -> Float[Array, "a b"]:
    """The mean of each image."""
    return jnp.mean(images, tuple(range(2, images.ndim)))


def mean_and_variance(
    setup: Setup,
    results: Results,
    image: Float[Array, "b *size c"],
    keys: RandomKey[Array, " b"],
    chunk: int | None = None,
) -> tuple[Float[Array, " b *size"], Float[Array, " b *size"], Float[Array, "b j"]]:
    """(mean, variance) over the samples of the probability of an anomaly, `chunk` samples at a time, and the mean over
    pixels of each sample.

    Sample j of an image depends on the image's key and j alone. The sums are of differences to the first sample, so
    that nothing cancels where the spread is small.
    """
    (params, stats), samples = scored_weights(setup, results), setup.samples
    if not setup.random:
        mean = probability(setup, params, stats, image, keys)
        return mean, jnp.zeros_like(mean), over_pixels(mean[:, None])
    count, net = min(chunk or samples, max(samples - 1, 1)), lambda: setup.bind(params, stats)
    if setup.config.model.backbone == "phiseg":
        features = net().features(centred(image))
        logits = lambda keys: net().generate(features, keys)
    else:
        logits = lambda keys: net()(centred(image), train=False, keys=keys)
    sample = lambda j: jax.nn.softmax(logits(fold_in(keys, j)))[..., 1]
    first = sample(0)

    def add(sums: Any, numbers: Array) -> tuple[Any, Array]:
        used = (numbers < samples).astype(jnp.float32)  # the last chunk may be padded
        rest = jax.vmap(sample)(numbers) - first
        sums = sums[0] + jnp.tensordot(used, rest, 1), sums[1] + jnp.tensordot(used, rest**2, 1)
        return sums, over_pixels(rest + first)

    numbers = 1 + jnp.arange(-(-(samples - 1) // count) * count).reshape(-1, count)  # after the first sample
    (total, squares), each = jax.lax.scan(add, (jnp.zeros_like(first), jnp.zeros_like(first)), numbers)
    each = jnp.concatenate([over_pixels(first[None]), each.reshape(-1, len(image))])[:samples]
    return first + total / samples, jnp.maximum(squares / samples - (total / samples) ** 2, 0), each.T


def score(setup: Setup, results: Results, batch: Any, key: Array, *, chunk: int | None = None) -> dict[str, Any]:
    """Maps and scores of images (`System.score`).

    The paper does not state the score of an image. `ppii` is the mean over pixels, as in the code of PII and NSA.
    """
    keys = scoring_keys(setup.config.evaluation.masks_of, key, batch["case"])
    keys = jnp.broadcast_to(keys, (len(batch["image"]),))
    mean, variance, each = mean_and_variance(setup, results, batch["image"], keys, chunk)
    axes = tuple(range(1, mean.ndim))
    highest = jax.lax.top_k(mean.reshape(len(mean), -1), max(1, mean[0].size // 4))[0]
    scores = {
        "ppii": jnp.mean(mean, axes),
        "ppii_top_quarter": jnp.mean(highest, -1),
        "ppii_highest": jnp.max(mean, axes),
    }
    out: dict[str, Any] = {"maps": {"ppii": mean}, "scores": scores}
    if setup.samples > 1:
        out["score_error"] = standard_error(each)
    return out | ({"confidence": jnp.sqrt(variance)} if setup.random else {})


def score_window(setup: Setup, results: Results, image: Array, keys: Array, groups: Array) -> tuple[Array, Array]:
    """Mean and variance of a volume's windows, all of weight 1 (`Sweep.score`)."""
    mean, variance, _ = mean_and_variance(setup, results, image, keys)
    return jnp.stack([mean, variance], -1), jnp.ones((*mean.shape, 1))


def fuse(
    setup: Setup, results: Results, averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]
) -> dict[str, Any]:
    """The map of a volume (`Sweep.fuse`).

    Its confidence is the root of the mean variance of the windows that cover a voxel. That is an upper bound of the
    deviation of the windows' mean.
    """
    mean, variance = (jnp.where(inside, averages[..., k], 0) for k in range(2))
    return {"maps": {"ppii": mean}} | ({"confidence": jnp.sqrt(variance)} if setup.random else {})
