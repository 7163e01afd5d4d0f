"""SimSID: a memory of normal anatomy inpaints the features of patches; a discriminator judges the images made of them.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025; equation and algorithm
numbers are the report's). The method that the report simplifies is Xiang et al., SimSID, TPAMI 2024, arXiv 2403.08689,
variant "official" (jmae/systems/simsid_published.py). Consulted: MrGiovanni/SimSID and tiangexiang/SQUID. The networks,
and what of them is ours: jmae/nn/simsid.py.

Stages of the variant "report", in the one reading in which its listings agree: `teacher` trains encoder and generator,
`memory` writes the memory in ordered passes, `student` trains inpainting and generator with distillation, and
`discriminator` trains the judge. `calibration` follows in both variants (jmae/systems/simsid_score.py). With
`select=auroc` the weights of the last stage before it are those of the highest AUROC on `val`.

Our decisions where the report is silent or contradicts itself: images take one path in training and in scoring (its
Alg. 4.11 leaves the inpainting out); the memory is written on training images alone; the sign of Eq. 5.7 makes the
score low for an image that looks real (its logit is high); loss weights, rates and epochs are in the recipe.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.losses import discriminator_loss
from jmae.masking import sample_keys
from jmae.nn.simsid import Encoder, Generator, Inpainting, hierarchy, recall, summaries, write_all
from jmae.optim import begin, descend
from jmae.patches import grid_of, unpatchify
from jmae.recipe import is_volume
from jmae.scoring import auroc
from jmae.sharding import device_gather
from jmae.system import (
    Check,
    Results,
    Stage,
    State,
    System,
    best_weights,
    compute_type,
    keep_best,
    last_weights,
    network,
    stats_of,
    steps_of,
    with_best,
)
from jmae.systems import simsid_published
from jmae.systems.simsid_score import (
    LOG_WORDS,
    RULE,
    TEACHER,
    Method,
    Network,
    adam,
    discriminator,
    labelled_rows,
    reconstruction_check,
    selecting_splits,
    system,
    training_rows,
)

PUBLISHED: dict[str, dict[str, dict[int, float]]] = {  # the report's training values; its student's first epoch is 0
    "teacher": {
        "loss": {
            1: 0.3495,
            2: 0.0608,
            3: 0.0444,
            4: 0.0394,
            5: 0.0372,
            10: 0.0342,
            15: 0.0333,
            20: 0.0323,
            1000: 0.0029,
        }
    },
    "student": {
        "mse": {1: 0.0317, 11: 0.0119, 21: 0.0099, 232: 0.0033, 251: 0.0032},
        "distillation": {1: 0.6160, 11: 0.5879, 21: 0.5815, 232: 0.4830, 251: 0.4758},
    },
}

PUBLISHED_WITH: dict[str, Any] = {
    "data.size": (128, 128),
    "data.normalise": "unit",
    "model.patch": (16, 16),
    "model.widths": (32, 64, 128, 256),
}
"""The recipe values for which the report's training values hold."""

# --- the system -------------------------------------------------------------------------------------------------------


def build(config: ConfigDict) -> System:
    """The SimSID system that a recipe describes; raises InputError on settings that do not fit together."""
    check(config)
    return system(config, report(config) if config.variant == "report" else simsid_published.method(config))


def check(config: ConfigDict) -> None:
    """Raises InputError on settings that do not fit together."""
    if config.model.weights and config.variant != "official":
        raise InputError("model.weights are those of the published code: set variant=official")
    if config.memory.ema and config.memory.slots > 1:
        raise InputError(f"memory.ema={config.memory.ema} moves one row of a place: set memory.slots=1 or memory.ema=0")
    for key in ("model.widths", "model.discriminator", "joint.widths"):
        section, name = key.split(".")
        if not config[section][name]:
            raise InputError(f"{key} is empty: one number or more")
    if is_volume(config):
        check_settings(config.data)
    grid_of(tuple(config.data.size), tuple(config.evaluation.patch))


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks and settings of the report's method.

    Attributes:
        config: the recipe.
        encoder: E, images -> features of their patches.
        generator: G of the teacher and of the student, features -> images.
        inpainting: what inpaints features by what the memory gives.
        discriminator: D.
        grid: patches along each axis.
        slots: the slot of each patch at each level of the memory (`hierarchy`).
    """

    config: ConfigDict
    encoder: Network
    generator: Network
    inpainting: Network
    discriminator: Network
    grid: tuple[int, ...]
    slots: list[np.ndarray]


def networks(config: ConfigDict) -> Networks:
    """The report's networks; raises InputError on sizes that do not fit each other."""
    data, model, levels = config.data, config.model, config.memory.levels
    size, patch, widths, dtype = tuple(data.size), tuple(model.patch), tuple(model.widths), compute_type(config)
    grid = grid_of(size, patch)
    slots = hierarchy(grid, levels)
    inputs = prod(grid) * model.features
    encoder = lambda rngs: Encoder(patch, data.channels, widths, model.features, dtype, rngs=rngs)
    generator = lambda rngs: Generator(size, inputs, widths[::-1], data.channels, model.sigmoid, dtype, rngs=rngs)
    inpainting = lambda rngs: Inpainting(
        len(size),
        max(1, levels) * model.features,
        model.features,
        model.width,
        model.depth,
        model.heads,
        model.mlp,
        model.dropout,
        model.centre,
        dtype,
        rngs=rngs,
    )
    return Networks(
        config=config,
        encoder=Network(*network(encoder)),
        generator=Network(*network(generator)),
        inpainting=Network(*network(inpainting)),
        discriminator=discriminator(config),
        grid=grid,
        slots=slots,
    )


# --- from an image to the student's image of it -----------------------------------------------------------------------


def features(nets: Networks, teacher: PyTree, image: Float[Array, "b *size c"]) -> Float[Array, "b n d"]:
    """E(image), frozen."""
    return nets.encoder.bind(teacher["params"]["encoder"], teacher["stats"]["encoder"])(image, train=False)


def teacher_layers(nets: Networks, teacher: PyTree, f: Float[Array, "b n d"]) -> list[Array]:
    """The results of the teacher's layers on features, frozen; the last is the image."""
    return nets.generator.bind(teacher["params"]["generator"], teacher["stats"]["generator"])(f, train=False)


def student_input(
    nets: Networks, results: Results, params: PyTree, f: Float[Array, "b n d"], keys: Array | None = None
) -> Float[Array, "b n d"]:
    """The features that the student gets: inpainted ones, or E's own without inpainting (the listing of Alg. 4.11).

    With keys (b,) retrieval is under noise and the transformer under dropout. Each patch then keeps the features of E
    with probability 1 - student.kept (SimSID's masked shortcut).
    """
    memory, share = nets.config.memory, nets.config.student.kept
    if not nets.config.model.inpainting:
        return f
    noise = drop = shortcut = None
    if keys is not None:
        noise, drop, shortcut = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    recalled = f
    if memory.levels:
        stats = results["memory"]["stats"]
        recalled = recall(
            (stats["rows"], stats["count"]),
            f,
            nets.slots,
            k=memory.top_k,
            temperature=memory.temperature,
            weighted=memory.weighted,
            restrict=memory.restrict,
            keys=noise,
        )
    x = nets.inpainting.bind(params["inpainting"])(recalled, f, nets.grid, drop)
    if shortcut is None or share == 1:
        return x
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, share, (f.shape[1], 1)))(shortcut)
    return jnp.where(mask, x, f)


def student_image(nets: Networks, results: Results, student: PyTree, image: Array) -> Array:
    """The student's images of images; `student` holds its "params" and "stats"."""
    x = student_input(nets, results, student["params"], features(nets, results["teacher"], image))
    return nets.generator.bind(student["params"]["generator"], student["stats"]["generator"])(x, train=False)[-1]


def remake(nets: Networks, results: Results, image: Array) -> Array:
    """`Method.remake`."""
    return student_image(nets, results, results["student"], image)


def judge(nets: Networks, results: Results, image: Array) -> Float[Array, " b"]:
    """`Method.judge`, by the best weights."""
    best = best_weights(results["discriminator"], RULE)
    return nets.discriminator.bind(best["params"], best["stats"]["network"])(image, train=False)


def pictures(nets: Networks, results: Results, image: Array) -> dict[str, Array]:
    """`Method.pictures`: the teacher's image, and in 2D the features before and after the inpainting."""
    f = features(nets, results["teacher"], image)
    out = {TEACHER: teacher_layers(nets, results["teacher"], f)[-1]}
    if len(nets.grid) == 2:
        x = student_input(nets, results, results["student"]["params"], f)
        out |= {"features of the patches": mosaic(f, nets.grid), "features for the student": mosaic(x, nets.grid)}
    return out


def mosaic(f: Float[Array, "b n d"], grid: tuple[int, ...]) -> Float[Array, "b h w"]:
    """Each patch's features as a tile at the patch's place (Fig. 5.4 to 5.6), in the most square shape that they
    fill."""
    d = f.shape[-1]
    tall = max(k for k in range(1, d + 1) if d % k == 0 and k * k <= d)
    tile = (tall, d // tall)
    size = tuple(g * t for g, t in zip(grid, tile, strict=True))
    return unpatchify(f, size, tile)[..., 0]


def rate(section: ConfigDict, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """The learning rate of a step: `lr`. In the last share `cooldown` of the steps it falls on a line to 0."""
    left = (steps - step) / max(section.cooldown * steps, 1)
    return section.lr * jnp.minimum(left, 1.0)


# --- teacher (Eq. 5.3) ------------------------------------------------------------------------------------------------


def drawn_networks(makers: dict[str, Network], key: Array) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """(parameters, statistics) of networks with random weights; the i-th network has the i-th key."""
    parts = {name: net.init(jax.random.fold_in(key, i)) for i, (name, net) in enumerate(makers.items())}
    params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return params, stats


def teacher_init(nets: Networks, key: Array, results: Results, n: int) -> State:
    """Encoder and generator with random weights."""
    params, stats = drawn_networks({"encoder": nets.encoder, "generator": nets.generator}, key)
    return begin(params, adam(nets.config.teacher), stats)


def teacher_loss(nets: Networks, stats: PyTree, params: PyTree, image: Array) -> tuple[Array, tuple[dict, dict]]:
    """MSE of the teacher's images; a loss as `descend` takes it."""
    together = nets.config.model.encoder == "joint"
    encoder = nets.encoder.bind(params["encoder"], stats["encoder"])
    f = encoder(image, train=together)
    f = f if together else jax.lax.stop_gradient(f)  # without gradient Adam leaves the encoder as it is
    generator = nets.generator.bind(params["generator"], stats["generator"])
    made = generator(f, train=True)[-1]
    return jnp.mean((image - made) ** 2), ({"encoder": stats_of(encoder), "generator": stats_of(generator)}, {})


def teacher_step(
    nets: Networks, state: State, batch: PyTree, key: Array, results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """A step of the teacher."""
    section, loss = nets.config.teacher, partial(teacher_loss, nets, state.stats)
    return descend(state, loss, adam(section), rate(section, state.step, steps), batch["image"])


# --- memory (Alg. 4.4 and 4.5) ----------------------------------------------------------------------------------------


def slots_of_levels(nets: Networks) -> np.ndarray:
    """Number of slots of each level."""
    return np.array([level.max() + 1 for level in nets.slots])


def memory_init(nets: Networks, key: Array, results: Results, n: int) -> State:
    """An empty memory; "left" is the number of images that may still write."""
    number, config = slots_of_levels(nets).sum(), nets.config
    stats = {
        "rows": jnp.zeros((number, config.memory.slots, config.model.features)),
        "count": jnp.zeros(number, jnp.int32),
        "left": jnp.int32(config.memory.passes * n),
    }
    return State(params={}, opt={}, stats=stats, step=jnp.int32(0))


def memory_step(
    nets: Networks, state: State, batch: PyTree, key: Array, results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """Writes a batch into the memory, image by image.

    Metrics by level, of an image: the share of slots that it wrote, and the share where it overwrote the oldest row.
    """
    memory = nets.config.memory
    values = device_gather(summaries(features(nets, results["teacher"], batch["image"]), nets.slots))
    allowed, before = jnp.arange(len(values)) < state.stats["left"], state.stats["count"]
    (rows, count), written = write_all(
        (state.stats["rows"], state.stats["count"]), values, allowed, threshold=memory.threshold, ema=memory.ema
    )
    full = before[None] + jnp.cumsum(written, 0) - written >= memory.slots
    metrics: dict[str, Array] = {}
    for name, of in (("overwritten", written & full), ("written", written)):
        shares = jnp.sum(of, 0) / jnp.maximum(jnp.sum(allowed), 1)
        parts = jnp.split(shares, np.cumsum(slots_of_levels(nets))[:-1])
        metrics |= {f"{name}_level_{i}": jnp.mean(part) for i, part in enumerate(parts)}
    stats = {"rows": rows, "count": count, "left": state.stats["left"] - jnp.sum(allowed)}
    return state.replace(stats=stats, step=state.step + 1), metrics


# --- student (Eq. 5.4 and 5.5) ----------------------------------------------------------------------------------------


def student_init(nets: Networks, key: Array, results: Results, n: int) -> State:
    """The generator is random or the teacher's; inpainting and discriminator are random, where the recipe has them."""
    config = nets.config
    parts = {"generator": nets.generator.init(jax.random.fold_in(key, 0))}
    if config.model.inpainting:
        parts["inpainting"] = nets.inpainting.init(jax.random.fold_in(key, 1))
    if config.student.adversarial:
        parts["discriminator"] = nets.discriminator.init(jax.random.fold_in(key, 2))
    if config.student.from_teacher:
        parts["generator"] = tuple(results["teacher"][what]["generator"] for what in ("params", "stats"))
    params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return begin(params, adam(config.student), stats)


def student_loss(
    nets: Networks, results: Results, stats: PyTree, params: PyTree, image: Array, keys: Array
) -> tuple[Array, tuple[dict, dict]]:
    """MSE and distillation, and with `student.adversarial` the adversarial losses; a loss as `descend` takes it.

    The metric "loss" is the student's alone. The adversarial losses are ours. The discriminator learns beside the
    student, from its own loss. In the student's loss it has no gradient.
    """
    section = nets.config.student
    f = features(nets, results["teacher"], image)
    generator = nets.generator.bind(params["generator"], stats["generator"])
    xs = generator(student_input(nets, results, params, f, keys), train=True)
    new_stats = {"generator": stats_of(generator)}
    parts = {"mse": jnp.mean((image - xs[-1]) ** 2)}
    pairs = zip(teacher_layers(nets, results["teacher"], f), xs, strict=True)
    parts["distillation"] = sum((jnp.mean((z.astype(jnp.float32) - x) ** 2) for z, x in pairs), jnp.float32(0))
    total = parts["mse"] + section.distillation * parts["distillation"]
    if not section.adversarial:
        return total, (new_stats, parts | {"loss": total})
    bind, d_stats = nets.discriminator.bind, stats["discriminator"]
    fixed = bind(jax.lax.stop_gradient(params["discriminator"]), d_stats)
    parts["adversarial"] = jnp.mean(jax.nn.softplus(-fixed(xs[-1], train=True)))
    total = total + section.adversarial * parts["adversarial"]
    d = bind(params["discriminator"], d_stats)
    real, fake = (d(x, train=True) for x in (image, jax.lax.stop_gradient(xs[-1])))
    parts["discriminator"] = discriminator_loss(real, fake)
    new_stats |= {"discriminator": stats_of(d)}
    return total + parts["discriminator"], (new_stats, parts | {"loss": total})


def student_step(
    nets: Networks, state: State, batch: PyTree, key: Array, results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """A step of the student."""
    section, loss = nets.config.student, partial(student_loss, nets, results, state.stats)
    return descend(
        state, loss, adam(section), rate(section, state.step, steps), batch["image"], sample_keys(key, batch["index"])
    )


# --- discriminator (Alg. 4.11) ----------------------------------------------------------------------------------------


def discriminator_init(nets: Networks, key: Array, results: Results, n: int) -> State:
    """The discriminator with random weights, or as the stage `student` left it."""
    params, stats = nets.discriminator.init(key)
    if nets.config.student.adversarial:
        params, stats = (results["student"][what]["discriminator"] for what in ("params", "stats"))
    state = begin(params, adam(nets.config.discriminator), {"network": stats})
    return with_best(state, RULE) if nets.config.select == RULE else state


def judge_loss(nets: Networks, stats: PyTree, params: PyTree, image: Array, made: Array) -> tuple[Array, tuple]:
    """The discriminator's loss on images and new images of them; a loss as `descend` takes it."""
    d = nets.discriminator.bind(params, stats["network"])
    real, fake = (d(x, train=True) for x in (image, made))
    accuracy = (jnp.mean(real > 0) + jnp.mean(fake < 0)) / 2
    means = {"accuracy": accuracy, "real": jnp.mean(real), "fake": jnp.mean(fake)}
    return discriminator_loss(real, fake), ({"network": stats_of(d)}, means)


def discriminator_step(
    nets: Networks, state: State, batch: PyTree, key: Array, results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """A step of the discriminator."""
    section, loss = nets.config.discriminator, partial(judge_loss, nets, state.stats)
    made = jax.lax.stop_gradient(remake(nets, results, batch["image"]))
    return descend(state, loss, adam(section), rate(section, state.step, steps), batch["image"], made)


def discriminator_look(nets: Networks, state: State, batch: PyTree, results: Results) -> tuple[State, dict[str, Array]]:
    """AUROC of D(new image) on the labelled images, as D is now; keeps the best weights."""
    judged = lambda image: nets.discriminator.bind(state.params, state.stats["network"])(image, train=False)
    one = lambda image: judged(remake(nets, results, image[None]))[0]
    logits = jax.lax.map(one, batch["image"], batch_size=nets.config.discriminator.batch)
    value = auroc(-logits, batch["label"])
    return keep_best(state, RULE, value), {"check_auroc": value}


# --- stages -----------------------------------------------------------------------------------------------------------


def report(config: ConfigDict) -> Method:
    """The report's method: its stages in order, and what the scores need."""
    nets = networks(config)
    stages = (teacher_stage(nets), memory_stage(nets), student_stage(nets), discriminator_stage(nets))
    return Method(
        stages=tuple(stage for stage in stages if stage.name != "memory" or uses_memory(config)),
        maker="student",
        remake=partial(remake, nets),
        judge=partial(judge, nets),
        pictures=partial(pictures, nets),
    )


def uses_memory(config: ConfigDict) -> bool:
    """Whether the report's method has a memory: something reads it, and it has a level."""
    return config.model.inpainting and config.memory.levels > 0


def teacher_stage(nets: Networks) -> Stage:
    """The stage that trains encoder and generator."""
    config = nets.config

    def make(state: State, results: Results, image: Array) -> Array:
        teacher = last_weights(state)
        return teacher_layers(nets, teacher, features(nets, teacher, image))[-1]

    return Stage(
        name="teacher",
        rows=partial(training_rows, config),
        batch=config.teacher.batch,
        steps=steps_of(config.teacher, config.budget),
        init=partial(teacher_init, nets),
        step=partial(teacher_step, nets),
        words=LOG_WORDS,
        checks=(reconstruction_check(config, make),),
        published=PUBLISHED["teacher"],
        published_with=PUBLISHED_WITH | {"teacher.lr": 1e-4, "teacher.batch": 16, "teacher.cooldown": 0.0},
    )


def memory_stage(nets: Networks) -> Stage:
    """The stage that writes the memory, in passes over the rows in order."""
    config, memory = nets.config, nets.config.memory
    return Stage(
        name="memory",
        rows=partial(training_rows, config),
        batch=memory.batch,
        steps=lambda n: -(-memory.passes * n // memory.batch),
        init=partial(memory_init, nets),
        step=partial(memory_step, nets),
        words=LOG_WORDS,
        shuffle=False,
    )


def student_stage(nets: Networks) -> Stage:
    """The stage that trains inpainting and the student's generator."""
    config = nets.config
    make = lambda state, results, image: student_image(nets, results, last_weights(state), image)
    return Stage(
        name="student",
        rows=partial(training_rows, config),
        batch=config.student.batch,
        steps=steps_of(config.student, config.budget),
        init=partial(student_init, nets),
        step=partial(student_step, nets),
        words=LOG_WORDS,
        checks=(reconstruction_check(config, make),),
        published=PUBLISHED["student"],
        published_with=PUBLISHED_WITH
        | {"student.lr": 1e-4, "student.cooldown": 0.0, "student.batch": 16, "student.from_teacher": False},
    )


def discriminator_stage(nets: Networks) -> Stage:
    """The stage that trains the discriminator."""
    config = nets.config
    look = partial(discriminator_look, nets)
    selection = Check(every=config.validation.select_every, rows=labelled_rows, look=look)
    return Stage(
        name="discriminator",
        splits=selecting_splits(config),
        rows=partial(training_rows, config),
        batch=config.discriminator.batch,
        steps=steps_of(config.discriminator, config.budget),
        init=partial(discriminator_init, nets),
        step=partial(discriminator_step, nets),
        words=LOG_WORDS,
        checks=(selection,) if config.select == RULE else (),
    )
