"""P-PII: a segmentation network trained on probabilistic Poisson image interpolations of normal images.

Müller, Baugh, Tan, Dombrowski, Kainz, "Confidence-Aware and Self-Supervised Image Anomaly Localisation", UNSURE 2023,
arXiv 2303.13227. Consulted: ividja/Probabilistic-PII (the generator), baumgach/PHiSeg-code (backbones), jemtan/PII.
Nothing else is public: what the paper leaves open is decided in the recipe.

One stage, `train`: each image gets new anomalies at every step, and the network tells their pixels. Variants are what
is put in: the paper's generator (`paper`), the authors' file (`released`), ours (`jmae`), and the older tasks `pii`,
`fpi`, `cutpaste`, `nsa`. Backbones: `unet`, `mc_unet`, `phiseg`; of the last two a map is the mean of samples, and
their spread the confidence.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from jmae.anomalies.cutpaste import cutpaste
from jmae.anomalies.interpolation import PRESETS, SHAPES, fpi, pii, ppii
from jmae.anomalies.nsa import nsa
from jmae.data.manifest import Row, held_out
from jmae.data.transforms import random_flip, random_warp
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.losses import hierarchical_loss, soft_cross_entropy
from jmae.masking import case_keys, fold_in, sample_keys
from jmae.nn.phiseg import PHiSeg
from jmae.nn.unet import UNet, check_size
from jmae.run_folder import log
from jmae.sharding import device_gather, device_mean, device_number
from jmae.system import Check, Stage, State, Sweep, System, compute_type, network, stats_of, steps_of

BACKBONES = ("unet", "mc_unet", "phiseg")
OTHERS: dict[str, Callable] = {"pii": pii, "fpi": fpi, "cutpaste": cutpaste, "nsa": nsa}


def build(config: ConfigDict) -> System:
    """The P-PII system that a recipe describes; raises InputError on settings that do not fit together."""
    data, model, anomaly, train, evaluation = config.data, config.model, config.anomaly, config.train, config.evaluation
    choices = {
        "variant": (config.variant, (*PRESETS, *OTHERS)),
        "model.backbone": (model.backbone, BACKBONES),
        "anomaly.source": (anomaly.source, ("other", "self")),
        "anomaly.shape": (anomaly.shape, SHAPES),
        "train.loss": (train.loss, ("cross_entropy", "mse")),
        "select": (config.select, ("last", "dice", "aucp")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"{key} is {value!r}: one of {', '.join(allowed)}")
    numbers = anomaly.get(config.variant, ConfigDict())  # of the variants that have some
    pairs = {key: tuple(anomaly[key]) for key in ("patch", "half")}
    pairs |= {f"{config.variant}.{key}": tuple(numbers[key]) for key in numbers if key != "gain"}
    size, rank, window = tuple(data.size), len(data.size), tuple(data.window)
    for key, pair in pairs.items():
        if not (len(pair) == 2 and 0 < pair[0] <= pair[1] and ("." in key or pair[1] <= 1)):
            raise InputError(f"anomaly.{key} is {pair}: the least and the most, above 0; shares of a side to 1")
    for what, holds in {
        "data.size: 2 or 3 numbers, 1 or more": rank in (2, 3) and min(size) >= 1,
        "data.channels: 1 or more": data.channels >= 1,
        "data.window: nothing, or two numbers LOW,HIGH, LOW below HIGH": not window
        or (len(window) == 2 and all(isinstance(end, int | float) for end in window) and window[0] < window[1]),
        f"anomaly.{config.variant}.gain: above 0": numbers.get("gain", 1) > 0,
        "anomaly.core: above 0, to 1": 0 < anomaly.core <= 1,
        "model.dropout: from 0 to below 1": 0 <= model.dropout < 1,
        "train.batch, train.validate_every and train.validation_samples: 1 or more": min(
            train.batch, train.validate_every, train.validation_samples
        )
        >= 1,
        "train.lr and budget: above 0": min(train.lr, config.budget) > 0,
        "train.steps and train.epochs: not below 0": min(train.steps, train.epochs) >= 0,
        "train.dice_at and train.held_out: from 0 to below 1": 0 <= min(train.dice_at, train.held_out)
        and max(train.dice_at, train.held_out) < 1,
        f"train.flips: axes, 0 to {rank - 1}": all(axis in range(rank) for axis in train.flips),
        "train.scaling: from 0 to below 1": 0 <= train.scaling < 1,
        "evaluation.samples and evaluation.batch: 1 or more": min(evaluation.samples, evaluation.batch) >= 1,
        "evaluation.froc and evaluation.chunk: not below 0": min(evaluation.froc, evaluation.chunk) >= 0,
    }.items():
        if not holds:
            raise InputError(what)
    if (rank == 3) != ("join" in data):
        raise InputError(f"data.size has {rank} axes: take the preset {'small3d' if rank == 3 else 'small'}")
    if rank == 3:
        check_settings(data)
        if not data.equalise and not window:
            raise InputError("data.equalise=false of volumes needs data.window=LOW,HIGH: what becomes 0 and 1")
    widths = tuple(model.widths) + 2 * tuple(model.widths[-1:]) * (model.backbone == "phiseg")
    check_size(size, len(widths))
    if train.batch < 2 and anomaly.source == "other":
        raise InputError("train.batch=1: anomaly.source=other takes another image of the batch: set it to self")
    if train.variance_weight and config.variant not in PRESETS:
        raise InputError(f"train.variance_weight is of variants {', '.join(PRESETS)}, which have raters")
    if model.backbone == "phiseg" and train.loss == "mse":
        raise InputError("train.loss=mse is of the U-Nets: PHiSeg's loss is a likelihood")
    if model.backbone == "phiseg" and train.variance_weight:
        raise InputError("train.variance_weight is of the U-Nets: PHiSeg's loss is a likelihood")
    common = {"rank": rank, "channels": data.channels, "widths": widths, "dtype": compute_type(config)}
    common |= {"remat": model.remat}
    make: Callable = partial(UNet, **common, head=model.base, dropout=model.dropout * (model.backbone == "mc_unet"))
    if model.backbone == "phiseg":
        make = partial(PHiSeg, **common, latent_levels=model.latent_levels, latent=model.latent, base=model.base)
    init, net_of = network(lambda rngs: make(rngs=rngs))
    random = model.backbone != "unet"
    samples = evaluation.samples if random else 1

    # --- anomalies ---------------------------------------------------------------------------------------------------

    def generator() -> Callable:
        """(image, source or all of the batch, key, place in the batch) -> (image, target, extras)."""
        if config.variant not in PRESETS:
            task = OTHERS[config.variant]
            if config.variant in ("pii", "fpi"):
                task = partial(task, half=tuple(anomaly.half), core=anomaly.core)
            elif config.variant == "nsa":  # its filters have 5 pixels and a radius of 5 pixels at 256
                task = partial(task, medians=(2 * round(min(size) / 103) + 1, max(1, round(5 * min(size) / 256))))
            return lambda image, source, key, own: task(image, source, key)
        return partial(
            ppii,
            preset=config.variant,
            anomalies=tuple(numbers.anomalies),
            raters=tuple(numbers.raters),
            strength=tuple(numbers.strength),
            gain=numbers.gain,
            patch=tuple(anomaly.patch),
            core=anomaly.core,
            shape=anomaly.shape,
            deviation=train.variance_weight > 0,
        )

    def corrupted(image: Float[Array, "b *size c"], keys: Array) -> tuple[Array, Array, Array]:
        """New anomalies in every image: (images, targets (b, *size), deviations or 0)."""
        everyone = device_gather(image)
        place = len(image) * device_number() + jnp.arange(len(image))
        make, which = generator(), jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        if anomaly.source == "self":
            out = jax.vmap(lambda image, key: make(image, image, key, None))(image, which)
        elif config.variant in PRESETS:
            out = jax.vmap(make, (0, None, 0, 0))(image, everyone, which, place)
        else:
            turn = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 1, len(everyone)))(keys)
            out = jax.vmap(make, (0, 0, 0, None))(image, everyone[(place + turn) % len(everyone)], which, None)
        return out[0], out[1], out[2].get("deviation", jnp.zeros(()))

    def augment(image: Array, keys: Array) -> Array:
        """Section 3.1, before the anomalies."""
        warp = partial(random_warp, offset=train.scaling, degrees=train.rotation, elastic=train.elastic)
        warped = train.scaling or train.rotation or train.elastic
        image = jax.vmap(warp)(image, fold_in(keys, 0)) if warped else image
        flip = partial(random_flip, axes=tuple(int(axis) for axis in train.flips))
        return jax.vmap(flip)(image, fold_in(keys, 1)) if train.flips else image

    def seen(image: Array) -> Array:
        """What the network sees of an image in [0, 1] (PHiSeg's code)."""
        return image - 0.5

    # --- loss --------------------------------------------------------------------------------------------------------

    def pixel_loss(logits: Array, target: Array) -> Array:
        if train.loss == "mse":
            return (jax.nn.softmax(logits)[..., 1] - target) ** 2
        return soft_cross_entropy(logits, target)

    def loss(params, stats, image, target, deviation, keys):
        net = net_of(params, stats)
        if model.backbone == "phiseg":
            y = jnp.stack([1 - target, target], -1)
            logits, q, p = net(seen(image), y, keys, train=True)
            value = hierarchical_loss(logits, q, p, target)
        else:
            prediction = net(seen(image), train=True, keys=keys if random else None)
            # ours: where raters disagree a pixel counts less (the paper's future work).
            weight = 1 / (1 + train.variance_weight * deviation**2)
            value = jnp.mean(weight * pixel_loss(prediction, target))
        return value, stats_of(net)

    optimiser = partial(optax.adam, b1=train.betas[0], b2=train.betas[1])

    def train_init(key, results, n):
        params, stats = init(key)
        best = {"params": params, "stats": stats, "dice": jnp.float32(-1)}
        stats = {"network": stats} | ({"best": best} if config.select == "dice" else {})
        return State(params=params, opt=optimiser(0.0).init(params), stats=stats, step=jnp.int32(0))

    def train_step(state, batch, key, results, *, steps):
        keys = sample_keys(key, batch["index"])
        view, made, noise = (fold_in(keys, k) for k in range(3))
        image, target, deviation = corrupted(augment(batch["image"], view), made)
        of = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = of(state.params, state.stats["network"], image, target, deviation, noise)
        value, grads, stats = device_mean((value, grads, stats))
        updates, opt = optimiser(train.lr).update(grads, state.opt, state.params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "target": device_mean(jnp.mean(target))}
        params = optax.apply_updates(state.params, updates)
        stats = state.stats | {"network": stats}
        return State(params=params, opt=opt, stats=stats, step=state.step + 1), metrics

    # --- best Dice ---------------------------------------------------------------------------------------------------

    def rows(rows: Sequence[Row], results: Any = None) -> np.ndarray:
        held = held_out(rows, train.held_out)
        return np.array([i for i, row in enumerate(rows) if row.split == "train" and not held[i]], np.int64)

    def checked(rows_: Sequence[Row]) -> np.ndarray:
        held = np.flatnonzero(held_out(rows_, train.held_out))
        if not held.size:
            log("best Dice: on training images with other anomalies, as none is held out (of ten patients or more)")
        return held if held.size else rows(rows_)

    def look(state: State, batch: Any, results: Any) -> tuple[State, dict[str, Array]]:
        """Dice over all pixels of fixed synthetic samples; the state keeps the weights of the best.

        `train.dice_at` 0.5: of (prediction > 0.5) and (target > 0.5). 0: 2 sum p y / (sum p^2 + sum y^2), the same of
        binary maps; ours, as the targets |x - x'| of `paper` hardly ever reach 0.5."""
        key = jax.random.key(0)
        made, keys = (sample_keys(jax.random.fold_in(key, k), batch["index"]) for k in range(2))
        image, target, _ = corrupted(batch["image"], made)
        one = lambda x: probability(state.params, state.stats["network"], x[0][None], x[1][None])[0]
        prediction = jax.lax.map(one, (image, keys), batch_size=train.batch)
        if train.dice_at:
            prediction, target = (jnp.where(x > train.dice_at, 1.0, 0.0) for x in (prediction, target))
        both = jnp.sum(prediction**2) + jnp.sum(target**2)
        dice = 2 * jnp.sum(prediction * target) / jnp.maximum(both, 1e-6)
        own = {"params": state.params, "stats": state.stats["network"], "dice": dice.astype(jnp.float32)}
        better = dice >= state.stats["best"]["dice"]
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), own, state.stats["best"])
        return state.replace(stats=state.stats | {"best": best}), {"dice": dice, "best_dice": best["dice"]}

    # --- score -------------------------------------------------------------------------------------------------------

    def probability(params, stats, image: Array, keys: Array) -> Float[Array, " b *size"]:
        """P(anomaly) of each pixel, of one sample by the keys (b,)."""
        net = net_of(params, stats)
        if model.backbone == "phiseg":
            logits = net.generate(net.features(seen(image)), keys)
        else:
            logits = net(seen(image), train=False, keys=keys if random else None)
        return jax.nn.softmax(logits)[..., 1]

    def moments(results, image: Array, keys: Array, chunk: int | None) -> tuple[Array, Array]:
        """Mean and variance over `samples` samples of P(anomaly), `chunk` at a time; sample j of an image depends on
        its key and j alone. Sums of differences to the first sample: nothing cancels where the spread is small."""
        kept = results["train"]["stats"]["best"] if config.select == "dice" else results["train"]
        stats = kept["stats"] if config.select == "dice" else kept["stats"]["network"]
        if not random:
            mean = probability(kept["params"], stats, image, keys)
            return mean, jnp.zeros_like(mean)
        count, net = min(chunk or samples, max(samples - 1, 1)), lambda: net_of(kept["params"], stats)
        if model.backbone == "phiseg":
            features = net().features(seen(image))
            logits = lambda keys: net().generate(features, keys)
        else:
            logits = lambda keys: net()(seen(image), train=False, keys=keys)
        sample = lambda j: jax.nn.softmax(logits(fold_in(keys, j)))[..., 1]
        first = sample(0)

        def add(sums: Any, numbers: Array) -> tuple[Any, None]:
            used = (numbers < samples).astype(jnp.float32)  # the last chunk may be padded
            rest = jax.vmap(sample)(numbers) - first
            return (sums[0] + jnp.tensordot(used, rest, 1), sums[1] + jnp.tensordot(used, rest**2, 1)), None

        numbers = 1 + jnp.arange(-(-(samples - 1) // count) * count).reshape(-1, count)  # the first is there
        (total, squares), _ = jax.lax.scan(add, (jnp.zeros_like(first), jnp.zeros_like(first)), numbers)
        return first + total / samples, jnp.maximum(squares / samples - (total / samples) ** 2, 0)

    def score(results, batch, key, *, chunk=None):
        mean, variance = moments(results, batch["image"], case_keys(key, batch["case"]), chunk)
        axes = tuple(range(1, mean.ndim))
        highest = jax.lax.top_k(mean.reshape(len(mean), -1), max(1, mean[0].size // 4))[0]
        scores = {
            "ppii": jnp.mean(mean, axes),  # not stated: the mean over pixels, as PII's and NSA's code
            "ppii_top_quarter": jnp.mean(highest, -1),
            "ppii_highest": jnp.max(mean, axes),
        }
        out = {"maps": {"ppii": mean}, "scores": scores}
        return out | ({"confidence": jnp.sqrt(variance)} if random else {})

    def window_score(results, image: Array, keys: Array) -> tuple[Array, Array]:
        mean, variance = moments(results, image, keys, None)
        return jnp.stack([mean, variance], -1), jnp.ones((*mean.shape, 1))

    def fuse(averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict:
        """The confidence is the root of the mean variance of the windows that cover a voxel: an upper bound of the
        deviation of their mean."""
        mean, variance = (jnp.where(inside, averages[..., k], 0) for k in range(2))
        return {"maps": {"ppii": mean}} | ({"confidence": jnp.sqrt(variance)} if random else {})

    check = Check(every=train.validate_every, samples=train.validation_samples, rows=checked, look=look)
    stage = Stage(
        name="train",
        rows=rows,
        batch=train.batch,
        steps=steps_of(train, config.budget),
        init=train_init,
        step=train_step,
        checks=(check,) if config.select == "dice" else (),
    )
    about: dict[str, Any] = dict(name="ppii", stages=(stage,), uses=("train",), primary="ppii", best=("dice",))
    about["repetitions"] = "samples"
    if rank == 2:
        return System(**about, score=score, masks=samples)
    return System(**about, sweep=Sweep(window=size, stride=tuple(evaluation.stride), score=window_score, fuse=fuse))
