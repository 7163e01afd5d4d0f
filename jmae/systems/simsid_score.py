"""What SimSID's two methods share: rows, checks, the discriminator's calibration, and the scores.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025); equation and algorithm
numbers are the report's. A method makes a new image of each image, and a discriminator judges both. The report's method
is in jmae/systems/simsid.py, the method of the published code in jmae/systems/simsid_published.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from jmae import optim
from jmae.data.manifest import Row, held_out
from jmae.keys.simsid import SCORES
from jmae.losses import histogram_kl, pixel_kl
from jmae.nn.conv import on_gpu
from jmae.nn.simsid import Discriminator
from jmae.patches import patchify, unpatchify
from jmae.recipe import is_volume
from jmae.run_folder import log
from jmae.sharding import device_gather
from jmae.system import Check, Choice, Results, Stage, State, Sweep, System, compute_type, network

MAPS = ("l1", "mse", "patches")
WORDS = {
    "simsid": "by how many standard deviations the discriminator finds the reconstruction less real than those of the "
    "training images",
    "A": "simsid on a scale from 0 to 1",
    "difference": "as simsid, for how much less real the image is than its reconstruction",
    "l1": "mean absolute error of the reconstruction",
    "mse": "mean squared error of the reconstruction",
    "kl": "Kullback-Leibler divergence between the image and the student's reconstruction",
    "kl_teacher": "Kullback-Leibler divergence between the image and the teacher's reconstruction",
}
LOG_WORDS = {
    "mse": "mean squared error",
    "distillation": "distance of the student's layers from the teacher's",
    "adversarial": "how easily the discriminator tells the student's images from real ones",
    "discriminator": "loss of the discriminator",
    "accuracy": "share that the discriminator judges right (0.5 is chance)",
    "real": "mean logit of real images",
    "fake": "mean logit of reconstructions",
    "check_mse": "mean squared error of held-out images",
    "check_kl": "Kullback-Leibler divergence of held-out images",
    "check_kl_histogram": "Kullback-Leibler divergence of the histograms of held-out images",
    "check_auroc": "AUROC of the labelled images of val",
    **{f"overwritten_level_{i}": f"share of slots overwritten, level {i}" for i in range(4)},
    **{f"written_level_{i}": f"share of slots written, level {i}" for i in range(4)},
}
DEVIATION = 0.2  # deviation of each image with data.normalise=image; the mean is 0.5
TEACHER = "reconstruction by the teacher"  # the picture of both methods
RULE = "auroc"  # the rule of `select` that both methods have


def words(config: ConfigDict) -> dict[str, str]:
    """What each score is, in plain words."""
    top = config.evaluation.top
    which = "all patches" if top == 1 else f"the worst {100 * top:.3g} % of the patches"
    return WORDS | {"patches": f"mean of the squared mean errors of {which}"}


# --- the contract of a method -----------------------------------------------------------------------------------------


class Network(NamedTuple):
    """The two functions of `jmae.system.network`."""

    init: Callable[[Array], tuple[PyTree, PyTree]]
    bind: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its stages, and the functions that the scores need. Images are in [0, 1].

    Attributes:
        stages: stages in order; the last one trains the discriminator.
        maker: name of the stage that trains the network that makes the images.
        remake: (results, images) -> new images of them.
        judge: (results, images) -> the discriminator's logits (b,), high for real images.
        pictures: (results, images) -> pictures for the report, by name; one of them is `TEACHER`.
    """

    stages: tuple[Stage, ...]
    maker: str
    remake: Callable[[Results, Array], Array]
    judge: Callable[[Results, Array], Array]
    pictures: Callable[[Results, Array], dict[str, Array]]


def system(config: ConfigDict, method: Method) -> System:
    """The system of a method: its stages and the calibration, and the scores of images or of volumes."""
    primary, size = config.evaluation.score, tuple(config.data.size)
    stages = tuple(normalising(config, stage) for stage in (*method.stages, calibration(config, method)))
    choice = method.maker if primary in MAPS else method.stages[-1].name
    names = [stage.name for stage in stages]
    scoring: dict[str, Any] = {"score": partial(image_score, config, method)}
    if is_volume(config):
        stride, score = tuple(config.evaluation.stride), partial(window_score, config, method)
        scoring = {"sweep": Sweep(window=size, stride=stride, score=score, fuse=fuse)}
    elif primary not in MAPS:
        scoring["map"] = "l1"  # the other scores are of whole images and have no map
    return System(
        name="simsid",
        stages=stages,
        uses=tuple(names),
        primary=primary,
        # No reconstruction error depends on the discriminator, whose weights `select=auroc` chooses in `report`.
        primary_uses=tuple(names[: names.index(choice) + 1]) if primary in MAPS else (),
        best=(RULE,),
        choice=Choice(stage=choice, stand_ins=partial(stand_ins, config)),
        words=words(config),
        **scoring,
    )


def discriminator(config: ConfigDict) -> Network:
    """The discriminator D of both methods."""
    size, widths = tuple(config.data.size), tuple(config.model.discriminator)
    dtype = compute_type(config)
    return Network(*network(lambda rngs: Discriminator(size, config.data.channels, widths, dtype, rngs=rngs)))


def judged_size(config: ConfigDict) -> tuple[int, ...]:
    """The size of the discriminator's last layer, which halves an image once for each of its widths."""
    return tuple(ceil(n / 2 ** len(config.model.discriminator)) for n in config.data.size)


# --- calibration ------------------------------------------------------------------------------------------------------


def logits(method: Method, results: Results, image: Array) -> tuple[Array, Float[Array, "b 2"]]:
    """The new images, and for each image the pair D(new image), D(image) - D(new image)."""
    made = method.remake(results, image)
    fake, real = method.judge(results, made), method.judge(results, image)
    return made, jnp.stack([fake, real - fake], -1)


def calibration(config: ConfigDict, method: Method) -> Stage:
    """The last stage: one sweep over the training images for the mean and deviation of their `logits`."""
    batch = method.stages[-1].batch
    return Stage(
        name="calibration",
        rows=partial(training_rows, config),
        batch=batch,
        steps=lambda n: -(-n // batch),
        init=calibration_init,
        step=partial(calibration_step, method),
        shuffle=False,
    )


def calibration_init(key: Array, results: Results, n: int) -> State:
    """No image counted yet, and `n` left."""
    stats = {"mean": jnp.zeros(2), "squares": jnp.zeros(2), "count": jnp.int32(0), "left": jnp.int32(n)}
    return State(params={}, opt={}, stats=stats, step=jnp.int32(0))


def calibration_step(
    method: Method, state: State, batch: PyTree, key: Array, results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """Merges a batch's mean and its sum of squared differences from the mean into those so far.

    The merge is that of Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    values, old = device_gather(logits(method, results, batch["image"])[1]), state.stats
    used = (jnp.arange(len(values)) < old["left"])[:, None]
    number = jnp.sum(used)
    mean = jnp.sum(used * values, 0) / jnp.maximum(number, 1)
    squares = jnp.sum(used * (values - mean[None]) ** 2, 0)
    count, apart = old["count"] + number, mean - old["mean"]
    stats = {
        "mean": old["mean"] + apart * number / jnp.maximum(count, 1),
        "squares": old["squares"] + squares + apart**2 * old["count"] * number / jnp.maximum(count, 1),
        "count": count,
        "left": old["left"] - number,
    }
    return state.replace(stats=stats, step=state.step + 1), {"logit": stats["mean"][0]}


def stand_ins(config: ConfigDict) -> dict[str, Any]:
    """Results in place of those of a discriminator and a calibration that are not trained yet, for `select=aucp`.

    No reconstruction error depends on the discriminator. The calibration's constants keep the order of the logits. They
    are so wide that no two logits become the same A in float32.
    """
    params, stats = discriminator(config).init(jax.random.key(0))
    wide = {"mean": jnp.zeros(2), "squares": jnp.full(2, 1e4), "count": jnp.int32(1), "left": jnp.int32(0)}
    return {"discriminator": {"params": params, "stats": stats}, "calibration": {"params": {}, "stats": wide}}


# --- score (Eq. 5.7) --------------------------------------------------------------------------------------------------


def scored(
    config: ConfigDict, method: Method, results: Results, image: Float[Array, "b *size c"]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """(new images, maps, scores) of images.

    With z the standardised D(new image), the report's score is A = 1 - sigmoid(z). In float32 A is 1 below z = -17.
    The score "simsid", which ranks, is therefore the log odds of A, -z. The score "difference" is that of the report's
    prose: D(image) - D(new image) in the place of D(new image).
    """
    size, cell = image.shape[1:-1], tuple(config.evaluation.patch)
    made, values = logits(method, results, image)
    stats = results["calibration"]["stats"]
    deviation = jnp.sqrt(stats["squares"] / jnp.maximum(stats["count"], 1))
    z = (values - stats["mean"][None]) / (deviation[None] + 1e-8)
    error = image - made
    cells = jnp.mean(patchify(jnp.mean(error, -1, keepdims=True), cell), -1) ** 2
    maps = {"l1": jnp.mean(jnp.abs(error), -1), "mse": jnp.mean(error**2, -1)}
    scores = {"simsid": -z[:, 0], "difference": -z[:, 1], "A": jax.nn.sigmoid(-z[:, 0])}
    scores |= {name: jnp.mean(m, tuple(range(1, m.ndim))) for name, m in maps.items()}
    # ours: the square of a cell's mean error, in which the image's grain cancels.
    wide = jnp.broadcast_to(cells[..., None], (*cells.shape, prod(cell)))
    maps["patches"] = unpatchify(wide, size, cell)[..., 0]
    highest = max(1, round(config.evaluation.top * cells.shape[1]))
    scores["patches"] = jnp.mean(jax.lax.top_k(cells, highest)[0], -1)
    return made, maps, scores


def image_score(
    config: ConfigDict, method: Method, results: Results, batch: PyTree, key: Array, *, chunk: int | None = None
) -> dict[str, Any]:
    """`System.score`: maps, scores and pictures of a batch of images. Nothing in it is random.

    Further scores are Eq. 5.2 between an image and the new one, of the student and of the teacher (Fig. 5.10 and 5.3).
    """
    image, back = normalised(config, batch["image"])
    made, maps, scores = scored(config, method, results, image)
    pictures = {n: back(p) if p.ndim == image.ndim else p for n, p in method.pictures(results, image).items()}
    for name, other in (("kl", back(made)), ("kl_teacher", pictures[TEACHER])):
        scores[name] = pixel_kl(batch["image"], other)
    return {"maps": maps, "scores": scores, "reconstruction": back(made), "pictures": pictures}


def window_score(
    config: ConfigDict, method: Method, results: Results, image: Float[Array, "b *size c"], keys: Array, groups: Array
) -> tuple[Float[Array, "b *size k"], Float[Array, "b *size 1"]]:
    """`Sweep.score`: each window's maps, and its scores as constant maps. Volumes are ours; the report has none."""
    made, maps, scores = scored(config, method, results, image)
    flat = lambda value: jnp.broadcast_to(value.reshape(-1, *[1] * (image.ndim - 2)), image.shape[:-1])
    every = jnp.stack([maps[name] if name in maps else flat(scores[name]) for name in SCORES], -1)
    return jnp.concatenate([every, made], -1), jnp.ones((*image.shape[:-1], 1))


def fuse(results: Results, averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict[str, Any]:
    """`Sweep.fuse`: a volume's maps, which are 0 outside, and its reconstruction."""
    maps = {name: jnp.where(inside, averages[..., i], 0) for i, name in enumerate(SCORES)}
    return {"maps": maps, "reconstruction": averages[..., len(SCORES) :]}


# --- images as the networks see them ----------------------------------------------------------------------------------


def normalised(config: ConfigDict, image: Float[Array, "b *size c"]) -> tuple[Array, Callable[[Array], Array]]:
    """(images as the networks see them, function that takes such images back into [0, 1]).

    With `data.normalise=image` each image gets mean 0.5 and deviation 0.2. That is ours: exposure differs more between
    scans than a finding changes it. It removes the contrast of an image, although a finding may change it.
    """
    if not each_normalised(config):
        return image, lambda made: jnp.clip(made, 0, 1)
    axes = tuple(range(1, image.ndim))
    mean, std = jnp.mean(image, axes, keepdims=True), jnp.std(image, axes, keepdims=True)
    scale = jnp.maximum(std, 1e-6) / DEVIATION
    return 0.5 + (image - mean) / scale, lambda made: jnp.clip(mean + (made - 0.5) * scale, 0, 1)


def each_normalised(config: ConfigDict) -> bool:
    """Whether each image gets a mean and deviation (`data.normalise`)."""
    return config.data.normalise == "image" or (config.data.normalise == "auto" and config.variant == "report")


def normalising(config: ConfigDict, stage: Stage) -> Stage:
    """The stage on `normalised` images."""
    if not each_normalised(config):
        return stage
    ready = lambda batch: batch | {"image": normalised(config, batch["image"])[0]}
    ready_look = lambda look: lambda state, batch, results: look(state, ready(batch), results)
    checks = tuple(replace(check, look=ready_look(check.look)) for check in stage.checks)
    step = lambda state, batch, key, results, **options: stage.step(state, ready(batch), key, results, **options)
    return replace(stage, step=step, checks=checks)


# --- rows -------------------------------------------------------------------------------------------------------------


def selecting_splits(config: ConfigDict) -> tuple[str, ...]:
    """The splits of the stage whose weights `select=auroc` chooses."""
    return ("train", "val") if config.select == RULE else ("train",)


def training_rows(config: ConfigDict, rows: Sequence[Row], results: Results | None = None) -> np.ndarray:
    """Numbers of the training rows that are not held out."""
    out = held_out(rows, config.validation.held_out)
    return np.array([i for i, row in enumerate(rows) if row.split == "train" and not out[i]], np.int64)


def checked_rows(config: ConfigDict, rows: Sequence[Row]) -> np.ndarray:
    """`validation.samples` of the held-out training rows, or of all training rows where none is held out."""
    numbers = np.flatnonzero(held_out(rows, config.validation.held_out))
    if not numbers.size:
        log("check: on training images, as none is held out (of ten patients or more)")
    return np.resize(numbers if numbers.size else training_rows(config, rows), config.validation.samples)


def labelled_rows(rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the labelled rows of `val`; none where a class is missing."""
    numbers = np.array(
        [i for i, row in enumerate(rows) if row.split == "val" and row.label is not None and not row.kept], np.int64
    )
    if len({rows[i].label for i in numbers}) == 2:
        return numbers
    log("select=auroc: val has no labelled images of both classes: the last weights are used")
    return np.array([], np.int64)


# --- checks and optimisers --------------------------------------------------------------------------------------------


def divergences(image: Array, made: Array) -> dict[str, Array]:
    """MSE between images and new images of them, and both forms of Eq. 5.2."""
    found = {
        "check_mse": (image - made) ** 2,
        "check_kl": pixel_kl(image, made),
        "check_kl_histogram": histogram_kl(image, made),
    }
    return {name: jnp.mean(value) for name, value in found.items()}


def reconstruction_check(config: ConfigDict, make: Callable[[State, Results, Array], Array]) -> Check:
    """`divergences` of the new images that a stage's networks make, by `make(state, results, images)`."""
    look = lambda state, batch, results: (state, divergences(batch["image"], make(state, results, batch["image"])))
    return Check(every=config.validation.every, rows=partial(checked_rows, config), look=look)


def adam(section: ConfigDict) -> optax.GradientTransformation:
    """Adam with the betas of a stage's section."""
    return laid_out(optim.adam(betas=tuple(section.betas)))


def laid_out(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser on gradients in the memory order of their parameters.

    On an NVIDIA GPU a convolution's gradient comes in another order, which Adam's kernel takes over. XLA then copies
    the parameters and both moments back, instead of the gradient alone.
    """

    def update(grads: PyTree, opt: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if on_gpu():
            grads = jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), grads)
        return optimiser.update(grads, opt, params)

    return optax.GradientTransformation(optimiser.init, update)
