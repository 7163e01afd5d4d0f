"""SimSID: features of patches inpainted from a memory of normal anatomy; what a discriminator then takes for unreal.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025; equation and algorithm
numbers are its), and the method that it simplifies: Xiang et al., SimSID, TPAMI 2024, arXiv 2403.08689; consulted:
MrGiovanni/SimSID and tiangexiang/SQUID. The networks and what of them is ours: jmae/nn/simsid.py.

Variants: `report`, in the one reading in which its listings agree, and `official`, the published SimSID. Stages of the
first: `teacher` (encoder and generator), `memory` (ordered passes that write it), `student` (inpainting and generator,
with distillation), `discriminator`; of the second: `joint`, generator and discriminator in turn. Both end with
`calibration`: mean and deviation of the discriminator's logits over the training images. With `select=auroc` the
weights of the last stage but one are those of the highest AUROC on `val`, where it has labels of both classes.

Decided where the report is silent or contradicts itself: one path for training and scoring (its Alg. 4.11 leaves the
inpainting out); memory is written on training images alone; Eq. 5.7's sign (a real-looking image has a high logit, so
its score is low); loss weights, rates and epochs as in the recipe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from jmae.data.manifest import Row, held_out
from jmae.data.volumes import check_settings
from jmae.errors import InputError
from jmae.losses import discriminator_loss, histogram_kl, pixel_kl
from jmae.masking import sample_keys
from jmae.nn.conv import on_gpu
from jmae.nn.simsid import (
    Discriminator,
    Encoder,
    Generator,
    Inpainting,
    Memory,
    Windows,
    hierarchy,
    recall,
    summaries,
    write_all,
)
from jmae.patches import grid_of, patchify, unpatchify
from jmae.run_folder import log
from jmae.scoring import auroc
from jmae.sharding import device_gather, device_mean
from jmae.system import Check, Choice, Results, Stage, State, Sweep, System, compute_type, network, stats_of, steps_of

SCORES = ("simsid", "difference", "l1", "mse", "patches")
MAPS = ("l1", "mse", "patches")
DEVIATION = 0.2  # of an image's own values where data.normalise is "image"; their mean is 0.5
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


class Variant(NamedTuple):
    """What the scores need of a variant; images are in [0, 1]."""

    stages: tuple[Stage, ...]
    remake: Callable[[Results, Array], Array]  # images -> the student's images of them
    judge: Callable[[Results, Array], Array]  # images -> the discriminator's logits, high for real
    pictures: Callable[[Results, Array], dict[str, Array]]  # images -> what the report shows of them


def check(config: ConfigDict) -> None:
    """Raises InputError on settings that do not fit together."""
    data, model, memory, joint = config.data, config.model, config.memory, config.joint
    for key, value, allowed in (
        ("variant", config.variant, ("report", "official")),
        ("select", config.select, ("auroc", "last", "aucp")),
        ("evaluation.score", config.evaluation.score, SCORES),
        ("evaluation.decision", config.evaluation.get("decision", "youden"), ("accuracy", "youden")),
        ("model.encoder", model.encoder, ("joint", "frozen_random")),
        ("model.centre", model.centre, ("retrieved", "raw", "mask")),
    ):
        if value not in allowed:
            raise InputError(f"{key} is {value!r}: one of {', '.join(allowed)}")
    sections = (config.teacher, config.student, config.discriminator, joint)
    validation, shares = config.validation, (joint.translation, joint.scaling, config.validation.held_out)
    for what, holds in {
        "data.size: 2 or 3 numbers, 1 or more": len(data.size) in (2, 3) and min(data.size) >= 1,
        "data.channels: 1 or more": data.channels >= 1,
        "model.patch, evaluation.patch and joint.windows: numbers, 1 or more": all(
            edges and min(edges) >= 1 for edges in (model.patch, config.evaluation.patch, joint.windows)
        ),
        "betas: two numbers, from 0 to below 1": all(
            len(section.betas) == 2 and 0 <= min(section.betas) and max(section.betas) < 1 for section in sections
        ),
        "batches, validation.every, select_every and samples, and evaluation.batch: 1 or more": min(
            *(section.batch for section in (*sections, memory)),
            validation.every,
            validation.select_every,
            validation.samples,
            config.evaluation.batch,
        )
        >= 1,
        "learning rates: above 0": min(section.lr for section in sections) > 0,
        "joint.lr_least and joint.decay: not below 0": min(joint.lr_least, joint.decay) >= 0,
        "model.features, model.width, model.depth, model.heads and model.mlp: 1 or more": min(
            model.features, model.width, model.depth, model.heads, model.mlp
        )
        >= 1,
        "model.widths, model.discriminator and joint.widths: numbers, 1 or more": all(
            widths and min(widths) >= 1 for widths in (model.widths, model.discriminator, joint.widths)
        ),
        "model.dropout: from 0 to below 1": 0 <= model.dropout < 1,
        "memory.levels: from 1 to 3": 1 <= memory.levels <= 3,
        "memory.threshold: above 0, to 1": 0 < memory.threshold <= 1,
        "memory.temperature: above 0": memory.temperature > 0,
        "memory.top_k, slots and passes, joint.top_k, slots and heads: 1 or more": min(
            memory.top_k, memory.slots, memory.passes, joint.top_k, joint.slots, joint.heads
        )
        >= 1,
        "memory.ema: from 0 to below 1, with memory.slots=1": 0 <= memory.ema < 1
        and not (memory.ema and memory.slots > 1),
        "student.kept and joint.kept: above 0, to 1": all(0 < kept <= 1 for kept in (config.student.kept, joint.kept)),
        "student.distillation and student.adversarial: not below 0": min(
            config.student.distillation, config.student.adversarial
        )
        >= 0,
        "evaluation.top: above 0, to 1": 0 < config.evaluation.top <= 1,
        "joint.critic: 1 or more": joint.critic >= 1,
        "joint.cosine: above 0": joint.cosine > 0,
        "joint.translation, joint.scaling and validation.held_out: from 0 to below 1": 0 <= min(shares)
        and max(shares) < 1,
    }.items():
        if not holds:
            raise InputError(what)
    if (len(data.size) == 3) != ("join" in data):
        preset = "phantom3d, with data.phantom= of images of your own" if len(data.size) == 3 else "small"
        raise InputError(f"data.size has {len(data.size)} axes: take the preset {preset}")
    if "join" in data:
        check_settings(data)
        if config.select == "auroc":
            raise InputError("select=auroc is of images: of volumes write --config.select=last")
    elif data.normalise not in ("unit", "image"):
        raise InputError(f"data.normalise is {data.normalise!r}: one of unit, image")


def build(config: ConfigDict) -> System:
    """The SimSID system that a recipe describes; raises InputError on settings that do not fit together."""
    check(config)
    size, score_name, evaluation = tuple(config.data.size), config.evaluation.score, config.evaluation
    cell = tuple(evaluation.patch)
    variant = (report if config.variant == "report" else official)(config)
    grid_of(size, cell)
    variant = variant._replace(stages=tuple(normalising(config, stage) for stage in variant.stages))
    names = tuple(stage.name for stage in variant.stages)

    def logits(results: Results, image: Array) -> tuple[Array, Float[Array, "b 2"]]:
        """The image made of each, and D of it beside D of the image itself less D of it."""
        made = variant.remake(results, image)
        fake, real = variant.judge(results, made), variant.judge(results, image)
        return made, jnp.stack([fake, real - fake], -1)

    # --- calibration: one sweep over the training images ---------------------------------------------------------

    def calibration_init(key, results, n):
        stats = {"mean": jnp.zeros(2), "squares": jnp.zeros(2), "count": jnp.int32(0), "left": jnp.int32(n)}
        return State(params={}, opt={}, stats=stats, step=jnp.int32(0))

    def calibration_step(state, batch, key, results, *, steps):
        """Means and sums of squared differences to them, merged batch by batch (Chan et al. 1979)."""
        values, old = device_gather(logits(results, batch["image"])[1]), state.stats
        used = (jnp.arange(len(values)) < old["left"])[:, None]
        own = jnp.sum(used)
        mean = jnp.sum(used * values, 0) / jnp.maximum(own, 1)
        squares = jnp.sum(used * (values - mean) ** 2, 0)
        count, apart = old["count"] + own, mean - old["mean"]
        stats = {
            "mean": old["mean"] + apart * own / jnp.maximum(count, 1),
            "squares": old["squares"] + squares + apart**2 * old["count"] * own / jnp.maximum(count, 1),
            "count": count,
            "left": old["left"] - own,
        }
        return state.replace(stats=stats, step=state.step + 1), {"logit": stats["mean"][0]}

    # --- score (Eq. 5.7) -----------------------------------------------------------------------------------------

    def judged(results: Results, image: Array) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """(made image, maps, scores). A = 1 - sigmoid(z), z the standardised D(made); in float32 it is 1 below z = -17,
        so that `simsid`, which ranks, is its log odds, -z. `difference`, the report's prose: log odds too, the
        standardised D(image) - D(made). ours: its sign, high where the made image looks less real than the given one;
        put into A for D(made) it would be turned round."""
        made, values = logits(results, image)
        stats = results["calibration"]["stats"]
        deviation = jnp.sqrt(stats["squares"] / jnp.maximum(stats["count"], 1))
        z = (values - stats["mean"]) / (deviation + 1e-8)
        error = image - made
        cells = jnp.mean(patchify(jnp.mean(error, -1, keepdims=True), cell), -1) ** 2
        maps = {"l1": jnp.mean(jnp.abs(error), -1), "mse": jnp.mean(error**2, -1)}
        scores = {"simsid": -z[:, 0], "difference": z[:, 1], "A": jax.nn.sigmoid(-z[:, 0])}
        scores |= {name: jnp.mean(m, tuple(range(1, m.ndim))) for name, m in maps.items()}
        # ours: the square of a cell's mean error, in which the image's grain cancels.
        wide = jnp.broadcast_to(cells[..., None], (*cells.shape, prod(cell)))
        maps["patches"] = unpatchify(wide, size, cell)[..., 0]
        highest = max(1, round(evaluation.top * cells.shape[1]))
        scores["patches"] = jnp.mean(jax.lax.top_k(cells, highest)[0], -1)
        return made, maps, scores

    def score(results, batch, key, *, chunk=None):
        image, back = normalised(config, batch["image"])
        made, maps, scores = judged(results, image)
        shown = {n: back(p) if p.ndim == image.ndim else p for n, p in variant.pictures(results, image).items()}
        return {"maps": maps, "scores": scores, "reconstruction": back(made), "pictures": shown}

    def window_score(results, image: Array, keys: Array) -> tuple[Array, Array]:
        """Each window's maps, and its scores as constant maps: ours, as the report has no volumes."""
        made, maps, scores = judged(results, image)
        flat = lambda value: jnp.broadcast_to(value.reshape(-1, *[1] * len(size)), image.shape[:-1])
        every = jnp.stack([maps[name] if name in maps else flat(scores[name]) for name in SCORES], -1)
        return jnp.concatenate([every, made], -1), jnp.ones((*image.shape[:-1], 1))

    def fuse(averages: Float[Array, "*size k"], inside: Bool[Array, "*size"]) -> dict:
        maps = {name: jnp.where(inside, averages[..., i], 0) for i, name in enumerate(SCORES)}
        return {"maps": maps, "reconstruction": averages[..., len(SCORES) :]}

    def rest() -> dict[str, Any]:
        """Any D, which no reconstruction error depends on, and a calibration by constants: it ranks logits as any does,
        and is so wide that no two logits become the same A in float32."""
        params, stats = discriminator_of(config)[0](jax.random.key(0))
        wide = {"mean": jnp.zeros(2), "squares": jnp.full(2, 1e4), "count": jnp.int32(1), "left": jnp.int32(0)}
        return {"discriminator": {"params": params, "stats": stats}, "calibration": {"params": {}, "stats": wide}}

    batch = variant.stages[-1].batch
    last = Stage(
        name="calibration",
        rows=partial(trained, config),
        batch=batch,
        steps=lambda n: -(-n // batch),
        init=calibration_init,
        step=calibration_step,
        shuffle=False,
    )
    stages, uses = (*variant.stages, normalising(config, last)), (*names, "calibration")
    student = config.variant == "report" and score_name in MAPS
    about: dict[str, Any] = dict(name="simsid", stages=stages, uses=uses, primary=score_name, best=("auroc",))
    about["choice"] = Choice(stage="student" if student else names[-1], stand_ins=rest)
    if len(size) == 3:
        stride = tuple(evaluation.stride)
        return System(**about, sweep=Sweep(window=size, stride=stride, score=window_score, fuse=fuse))
    # A and the difference are of whole images: the picture beside them is |I - made|.
    return System(**about, score=score, map="" if score_name in MAPS else "l1")


def normalised(config: ConfigDict, image: Float[Array, "b *size c"]) -> tuple[Array, Callable[[Array], Array]]:
    """(images as the networks see them, the way back of such ones into [0, 1]). With `data.normalise=image` (ours:
    exposure differs more between scans than a finding changes it) each has mean 0.5 and deviation 0.2."""
    if config.data.normalise != "image":
        return image, lambda made: jnp.clip(made, 0, 1)
    axes = tuple(range(1, image.ndim))
    mean, std = jnp.mean(image, axes, keepdims=True), jnp.std(image, axes, keepdims=True)
    scale = jnp.maximum(std, 1e-6) / DEVIATION
    return 0.5 + (image - mean) / scale, lambda made: jnp.clip(mean + (made - 0.5) * scale, 0, 1)


def normalising(config: ConfigDict, stage: Stage) -> Stage:
    """The stage, its images `normalised` first."""
    if config.data.normalise != "image":
        return stage
    ready = lambda batch: batch | {"image": normalised(config, batch["image"])[0]}
    seeing = lambda look: lambda state, batch, results: look(state, ready(batch), results)
    checks = tuple(replace(check, look=seeing(check.look)) for check in stage.checks)
    step = lambda state, batch, key, results, **options: stage.step(state, ready(batch), key, results, **options)
    return replace(stage, step=step, checks=checks)


def splits_of(config: ConfigDict) -> tuple[str, ...]:
    """The splits that the stage reads whose weights `select=auroc` chooses."""
    return ("train", "val") if config.select == "auroc" else ("train",)


def trained(config: ConfigDict, rows: Sequence[Row], results: Results | None = None) -> np.ndarray:
    """The training rows that are not held out."""
    held = held_out(rows, config.validation.held_out)
    return np.array([i for i, row in enumerate(rows) if row.split == "train" and not held[i]], np.int64)


def held(config: ConfigDict, rows: Sequence[Row]) -> np.ndarray:
    """`validation.samples` of the held-out training rows, or of those trained on where none is held out."""
    chosen = np.flatnonzero(held_out(rows, config.validation.held_out))
    if not chosen.size:
        log("check: on training images, as none is held out (of ten patients or more)")
    return np.resize(chosen if chosen.size else trained(config, rows), config.validation.samples)


def labelled(rows: Sequence[Row]) -> np.ndarray:
    """The labelled rows of `val`; none where a class is missing."""
    chosen = np.array(
        [i for i, row in enumerate(rows) if row.split == "val" and row.label is not None and not row.kept], np.int64
    )
    if len({rows[i].label for i in chosen}) == 2:
        return chosen
    log("select=auroc: val has no labelled images of both classes: the last weights are used")
    return np.array([], np.int64)


def divergences(image: Array, made: Array) -> dict[str, Array]:
    """MSE and both forms of Eq. 5.2 of images made of held-out ones."""
    mean = {"check_mse": (image - made) ** 2, "check_kl": pixel_kl(image, made)}
    return {name: jnp.mean(v) for name, v in (mean | {"check_kl_histogram": histogram_kl(image, made)}).items()}


def reconstruction_check(config: ConfigDict, make: Callable[[State, Array, Results], Array]) -> Check:
    """`divergences` of the images that a stage's networks make."""
    look = lambda state, batch, results: (state, divergences(batch["image"], make(state, batch["image"], results)))
    return Check(every=config.validation.every, rows=partial(held, config), look=look)


# --- the weights of the best AUROC ------------------------------------------------------------------------------------


def with_best(state: State) -> State:
    """A fresh state that will keep its best weights beside the last."""
    return state.replace(stats=state.stats | {"best": {**as_result(state), "auroc": jnp.float32(-1)}})


def keep_best(state: State, found: Float[Array, ""]) -> State:
    """The state with its weights as the best where their AUROC is not below that of the best."""
    best = state.stats["best"]
    own = {**as_result(state), "auroc": found.astype(jnp.float32)}
    best = jax.tree.map(partial(jnp.where, found >= best["auroc"]), own, best)
    return state.replace(stats=state.stats | {"best": best})


def as_result(state: State) -> dict[str, PyTree]:
    return {"params": state.params, "stats": {name: s for name, s in state.stats.items() if name != "best"}}


def chosen(result: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
    """A stage's result with its best weights, or its last where no AUROC was ever found."""
    stats = dict(result["stats"])
    if "best" not in stats:
        return result
    best = stats.pop("best")
    last = {"params": result["params"], "stats": stats}
    return jax.tree.map(partial(jnp.where, best["auroc"] >= 0), {name: best[name] for name in last}, last)


# --- pictures ---------------------------------------------------------------------------------------------------------


def mosaic(features: Float[Array, "b n d"], grid: tuple[int, ...]) -> Float[Array, "b h w"]:
    """Each patch's features as a tile, as square as they fill it, tiles at the patches' places (Fig. 5.4 to 5.6)."""
    d = features.shape[-1]
    tall = max(k for k in range(1, d + 1) if d % k == 0 and k * k <= d)
    tile = (tall, d // tall)
    size = tuple(g * t for g, t in zip(grid, tile, strict=True))
    return unpatchify(features, size, tile)[..., 0]


def affine(image: Float[Array, "*size c"], key: Array, *, translation: float, scaling: float) -> Array:
    """Moved by U(-translation, translation) of each edge and scaled by U(1 - scaling, 1 + scaling) about the middle,
    linear between pixels, 0 outside."""
    size = image.shape[:-1]
    u, n, axes = jax.random.uniform(key, (1 + len(size),), minval=-1), np.array(size, np.float32), range(len(size))
    scale = jnp.full(len(size), 1 + scaling * u[0])
    move = translation * u[1:] * n + (1 - scale) * n / 2
    return jax.image.scale_and_translate(image, image.shape, tuple(axes), scale, move, "linear", antialias=False)


def adam(section: ConfigDict) -> optax.GradientTransformation:
    """Adam as a stage's section has it."""
    return optax.adam(section.lr, b1=section.betas[0], b2=section.betas[1])


def decayed_adam(section: ConfigDict, lr: float | Array) -> optax.GradientTransformation:
    """Adam of epsilon 1e-7 with weight decay as a part of the gradient (PyTorch's)."""
    adam = optax.adam(lr, b1=section.betas[0], b2=section.betas[1], eps=1e-7)
    return optax.chain(optax.add_decayed_weights(section.decay), adam)


def laid_out(grads: PyTree) -> PyTree:
    """Gradients in memory as their parameters. On an NVIDIA GPU a convolution's comes in another order, which Adam's
    kernel takes over: XLA then copies the parameters and both moments back, instead of the gradient alone."""
    if not on_gpu():
        return grads
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), grads)


def discriminator_of(config: ConfigDict) -> tuple[Callable, Callable]:
    """`network` of D."""
    size, channels = tuple(config.data.size), config.data.channels
    dtype, widths = compute_type(config), tuple(config.model.discriminator)
    return network(lambda rngs: Discriminator(size, channels, widths, dtype, rngs=rngs))


# --- variant `report` -------------------------------------------------------------------------------------------------


def report(config: ConfigDict) -> Variant:
    """The report's stages."""
    data, model, memory, student = config.data, config.model, config.memory, config.student
    size, patch, widths, dtype = tuple(data.size), tuple(model.patch), tuple(model.widths), compute_type(config)
    grid = grid_of(size, patch)
    slots, rank = hierarchy(grid, memory.levels), len(size)
    tokens = len(slots[0])
    enc_init, enc_of = network(
        lambda rngs: Encoder(patch, data.channels, widths, model.features, dtype, rngs=rngs),
    )
    gen_init, gen_of = network(
        lambda rngs: Generator(
            size, tokens * model.features, widths[::-1], data.channels, model.sigmoid, dtype, rngs=rngs
        )
    )
    inp_init, inp_of = network(
        lambda rngs: Inpainting(
            rank,
            memory.levels * model.features,
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
    )
    dis_init, dis_of = discriminator_of(config)
    together = model.encoder == "joint"

    # --- the path from an image to the student's ---------------------------------------------------------------------

    def features(teacher: PyTree, image: Array) -> Float[Array, "b n d"]:
        """E(I), frozen."""
        return enc_of(teacher["params"]["encoder"], teacher["stats"]["encoder"])(image, train=False)

    def inpainted(kept: Memory, params: PyTree, f: Array, keys: Array | None = None) -> Float[Array, "b n d"]:
        """What stands for the features `f`, from the memory `kept`; with keys under noise and dropout, and patches
        that keep their own features with probability 1 - kept (SimSID's masked shortcut)."""
        noise = drop = shortcut = None
        if keys is not None:
            noise, drop, shortcut = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        recalled = recall(
            kept,
            f,
            slots,
            k=memory.top_k,
            temperature=memory.temperature,
            weighted=memory.weighted,
            restrict=memory.restrict,
            keys=noise,
        )
        x = inp_of(params)(recalled, f, grid, drop)
        if shortcut is None or student.kept == 1:
            return x
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, student.kept, (tokens, 1)))(shortcut)
        return jnp.where(mask, x, f)

    def for_student(results: Results, params: PyTree, f: Array, keys: Array | None = None) -> Array:
        """The student's input: inpainted features, or without inpainting (Alg. 4.11's listing) E's own."""
        if not model.inpainting:
            return f
        stats = results["memory"]["stats"]
        return inpainted((stats["rows"], stats["count"]), params["inpainting"], f, keys)

    def made_by(results: Results, params: PyTree, stats: PyTree, image: Array) -> Array:
        x = for_student(results, params, features(results["teacher"], image))
        return gen_of(params["generator"], stats["generator"])(x, train=False)[-1]

    def remake(results: Results, image: Array) -> Array:
        return made_by(results, results["student"]["params"], results["student"]["stats"], image)

    def judge(results: Results, image: Array) -> Array:
        own = chosen(results["discriminator"])
        return dis_of(own["params"], own["stats"]["network"])(image, train=False)

    def pictures(results: Results, image: Array) -> dict[str, Array]:
        """The teacher's image, and in 2D the features before and after the inpainting."""
        f = features(results["teacher"], image)
        out = {"reconstruction by the teacher": taught_by(results["teacher"], f)[-1]}
        if rank == 2:
            own = results["student"]["params"]
            out |= {"features of the patches": mosaic(f, grid)}
            out |= {"features for the student": mosaic(for_student(results, own, f), grid)}
        return out

    def taught_by(teacher: PyTree, f: Array) -> list[Array]:
        """The teacher's layers' results, frozen."""
        return gen_of(teacher["params"]["generator"], teacher["stats"]["generator"])(f, train=False)

    # --- teacher (Eq. 5.3) -------------------------------------------------------------------------------------------

    def teacher_init(key, results, n):
        parts = {"encoder": enc_init(jax.random.fold_in(key, 0)), "generator": gen_init(jax.random.fold_in(key, 1))}
        params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
        return State(params=params, opt=adam(config.teacher).init(params), stats=stats, step=jnp.int32(0))

    def teacher_step(state, batch, key, results, *, steps):
        def loss(params):
            encoder = enc_of(params["encoder"], state.stats["encoder"])
            f = encoder(batch["image"], train=together)
            f = f if together else jax.lax.stop_gradient(f)  # without gradient Adam leaves the encoder as drawn
            generator = gen_of(params["generator"], state.stats["generator"])
            made = generator(f, train=True)[-1]
            stats = {"encoder": stats_of(encoder), "generator": stats_of(generator)}
            return jnp.mean((batch["image"] - made) ** 2), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        value, grads, stats = device_mean((value, grads, stats))
        updates, opt = adam(config.teacher).update(laid_out(grads), state.opt)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, updates)
        return State(params=params, opt=opt, stats=stats, step=state.step + 1), metrics

    def taught(state: State, image: Array, results: Results) -> Array:
        own = as_result(state)
        return taught_by(own, features(own, image))[-1]

    # --- memory (Alg. 4.4 and 4.5) -----------------------------------------------------------------------------------

    levels = np.array([own.max() + 1 for own in slots])  # slots of each

    def memory_init(key, results, n):
        stats = {
            "rows": jnp.zeros((levels.sum(), memory.slots, model.features)),
            "count": jnp.zeros(levels.sum(), jnp.int32),
            "left": jnp.int32(memory.passes * n),
        }
        return State(params={}, opt={}, stats=stats, step=jnp.int32(0))

    def memory_step(state, batch, key, results, *, steps):
        values = device_gather(summaries(features(results["teacher"], batch["image"]), slots))
        allowed = jnp.arange(len(values)) < state.stats["left"]
        (rows, count), written = write_all(
            (state.stats["rows"], state.stats["count"]), values, allowed, threshold=memory.threshold, ema=memory.ema
        )
        shares = jnp.sum(written, 0) / jnp.maximum(jnp.sum(allowed), 1)
        parts = jnp.split(shares, np.cumsum(levels)[:-1])
        metrics = {f"written_level_{i}": jnp.mean(part) for i, part in enumerate(parts)}
        stats = {"rows": rows, "count": count, "left": state.stats["left"] - jnp.sum(allowed)}
        return state.replace(stats=stats, step=state.step + 1), metrics

    # --- student (Eq. 5.4 and 5.5) -----------------------------------------------------------------------------------

    def student_init(key, results, n):
        parts = {"generator": gen_init(jax.random.fold_in(key, 0))}
        if model.inpainting:
            parts["inpainting"] = inp_init(jax.random.fold_in(key, 1))
        if student.adversarial:
            parts["discriminator"] = dis_init(jax.random.fold_in(key, 2))
        if student.from_teacher:
            parts["generator"] = tuple(results["teacher"][what]["generator"] for what in ("params", "stats"))
        params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
        return State(params=params, opt=adam(student).init(params), stats=stats, step=jnp.int32(0))

    def student_step(state, batch, key, results, *, steps):
        image, keys, teacher = batch["image"], sample_keys(key, batch["index"]), results["teacher"]
        f = features(teacher, image)
        shown = taught_by(teacher, f)

        def loss(params):
            generator = gen_of(params["generator"], state.stats["generator"])
            xs = generator(for_student(results, params, f, keys), train=True)
            stats = state.stats | {"generator": stats_of(generator)}
            parts = {"mse": jnp.mean((image - xs[-1]) ** 2)}
            parts["distillation"] = sum(
                (jnp.mean((z.astype(jnp.float32) - x) ** 2) for z, x in zip(shown, xs, strict=True)), jnp.float32(0)
            )
            total = parts["mse"] + student.distillation * parts["distillation"]
            if not student.adversarial:
                return total, (stats, parts | {"loss": total})
            # ours: D learns beside the student, each by its own terms: the student's by a D without gradient.
            fixed = dis_of(jax.lax.stop_gradient(params["discriminator"]), state.stats["discriminator"])
            parts["adversarial"] = jnp.mean(jax.nn.softplus(-fixed(xs[-1], train=True)))
            total = total + student.adversarial * parts["adversarial"]
            d = partial(dis := dis_of(params["discriminator"], state.stats["discriminator"]), train=True)
            real, fake = (d(x) for x in (image, jax.lax.stop_gradient(xs[-1])))
            parts["discriminator"] = discriminator_loss(real, fake)
            stats |= {"discriminator": stats_of(dis)}
            return total + parts["discriminator"], (stats, parts | {"loss": total})

        (_, (stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads, stats, metrics = device_mean((grads, stats, metrics))
        updates, opt = adam(student).update(laid_out(grads), state.opt)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return State(params=params, opt=opt, stats=stats, step=state.step + 1), metrics

    # --- discriminator (Alg. 4.11) -----------------------------------------------------------------------------------

    def discriminator_init(key, results, n):
        own = results["student"]
        params, stats = dis_init(key)
        if student.adversarial:
            params, stats = own["params"]["discriminator"], own["stats"]["discriminator"]
        opt = adam(config.discriminator).init(params)
        state = State(params=params, opt=opt, stats={"network": stats}, step=jnp.int32(0))
        return with_best(state) if config.select == "auroc" else state

    def discriminator_step(state, batch, key, results, *, steps):
        made = jax.lax.stop_gradient(remake(results, batch["image"]))

        def loss(params):
            d = dis_of(params, state.stats["network"])
            real, fake = (d(x, train=True) for x in (batch["image"], made))
            accuracy = (jnp.mean(real > 0) + jnp.mean(fake < 0)) / 2
            means = {"accuracy": accuracy, "real": jnp.mean(real), "fake": jnp.mean(fake)}
            return discriminator_loss(real, fake), (stats_of(d), means)

        (value, (stats, means)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        value, grads, stats, means = device_mean((value, grads, stats, means))
        updates, opt = adam(config.discriminator).update(laid_out(grads), state.opt)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, **means, "grad_norm": optax.tree.norm(grads)}
        stats = state.stats | {"network": stats}
        return State(params=params, opt=opt, stats=stats, step=state.step + 1), metrics

    def compare(state: State, batch: PyTree, results: Results) -> tuple[State, dict[str, Array]]:
        """AUROC of D(made), as it is now, on the labelled images; keeps the best."""
        made = lambda image: remake(results, image[None])
        one = lambda image: dis_of(state.params, state.stats["network"])(made(image), train=False)[0]
        found = auroc(-jax.lax.map(one, batch["image"], batch_size=config.discriminator.batch), batch["label"])
        return keep_best(state, found), {"check_auroc": found}

    rows, budget = partial(trained, config), config.budget
    checks = tuple(
        reconstruction_check(config, make)
        for make in (taught, lambda state, image, results: made_by(results, state.params, state.stats, image))
    )
    select = Check(every=config.validation.select_every, rows=labelled, look=compare)
    stages = (
        Stage(
            name="teacher",
            rows=rows,
            batch=config.teacher.batch,
            steps=steps_of(config.teacher, budget),
            init=teacher_init,
            step=teacher_step,
            checks=checks[:1],
            published=PUBLISHED["teacher"],
        ),
        Stage(
            name="memory",
            rows=rows,
            batch=memory.batch,
            steps=lambda n: -(-memory.passes * n // memory.batch),
            init=memory_init,
            step=memory_step,
            shuffle=False,
        ),
        Stage(
            name="student",
            rows=rows,
            batch=student.batch,
            steps=steps_of(student, budget),
            init=student_init,
            step=student_step,
            checks=checks[1:],
            published=PUBLISHED["student"],
        ),
        Stage(
            name="discriminator",
            splits=splits_of(config),
            rows=rows,
            batch=config.discriminator.batch,
            steps=steps_of(config.discriminator, budget),
            init=discriminator_init,
            step=discriminator_step,
            checks=(select,) if config.select == "auroc" else (),
        ),
    )
    kept = tuple(stage for stage in stages if stage.name != "memory" or model.inpainting)
    return Variant(kept, remake, judge, pictures)


# --- variant `official` -----------------------------------------------------------------------------------------------


def official(config: ConfigDict) -> Variant:
    """The published SimSID: one stage, all networks from the first step on."""
    data, joint, weights = config.data, config.joint, config.joint.weights
    size, dtype = tuple(data.size), compute_type(config)
    net_init, net_of = network(
        lambda rngs: Windows(
            size,
            data.channels,
            tuple(joint.windows),
            tuple(joint.widths),
            joint.joined,
            joint.slots,
            joint.top_k,
            joint.heads,
            joint.kept,
            dtype,
            rngs=rngs,
        )
    )
    dis_init, dis_of = discriminator_of(config)
    seen = lambda image: 2 * image - 1  # tanh's range

    def made_by(own: Mapping[str, PyTree], image: Array, which: int = 0) -> Array:
        """The student's images, or with 1 the teacher's."""
        return (
            net_of(*(own[what]["network"] for what in ("params", "stats")))(seen(image), train=False)[which] + 1
        ) / 2

    def judged_by(own: Mapping[str, PyTree], image: Array) -> Array:
        return dis_of(*(own[what]["discriminator"] for what in ("params", "stats")))(seen(image), train=False)

    def remake(results: Results, image: Array) -> Array:
        return made_by(chosen(results["joint"]), image)

    def judge(results: Results, image: Array) -> Array:
        return judged_by(chosen(results["joint"]), image)

    def pictures(results: Results, image: Array) -> dict[str, Array]:
        return {"reconstruction by the teacher": made_by(chosen(results["joint"]), image, 1)}

    def rate(step: Array, steps: int) -> Array:
        """Cosine from `lr` to `lr_least` in a share `cosine` of the steps, and back again (PyTorch's)."""
        return joint.lr_least + (joint.lr - joint.lr_least) * (1 + jnp.cos(jnp.pi * step / (joint.cosine * steps))) / 2

    def joint_init(key, results, n):
        parts = {"network": net_init(jax.random.fold_in(key, 0)), "discriminator": dis_init(jax.random.fold_in(key, 1))}
        params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
        opt = {
            "network": decayed_adam(joint, 0.0).init(params["network"]),
            "discriminator": adam(joint).init(params["discriminator"]),
        }
        state = State(params=params, opt=opt, stats=stats, step=jnp.int32(0))
        return with_best(state) if config.select == "auroc" else state

    def joint_step(state, batch, key, results, *, steps, phase):
        """D at every step, the network where `phase` is true; each by its own losses."""
        view, shortcut = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(key, batch["index"])), 1, 0)
        moved = joint.translation or joint.scaling
        augment = partial(affine, translation=joint.translation, scaling=joint.scaling)
        x = seen(jax.vmap(augment)(batch["image"], view) if moved else batch["image"])

        def forward(params):
            net = net_of(params, state.stats["network"])
            return net(x, shortcut, train=True), stats_of(net)

        net_params, net_opt = state.params["network"], state.opt["network"]
        if phase:
            outs, pull, net_stats = jax.vjp(forward, net_params, has_aux=True)
        else:
            outs, net_stats = forward(net_params)

        def critic_loss(params):
            d = dis_of(params, state.stats["discriminator"])
            real, fake = (d(y, train=True) for y in (x, jax.lax.stop_gradient(outs[0])))
            accuracy = (jnp.mean(real > 0) + jnp.mean(fake < 0)) / 2
            return weights.discriminator * discriminator_loss(real, fake), (stats_of(d), accuracy)

        params, opt = state.params["discriminator"], state.opt["discriminator"]
        (critic, (stats, accuracy)), grads = jax.value_and_grad(critic_loss, has_aux=True)(params)
        critic, stats, accuracy, grads = device_mean((critic, stats, accuracy, grads))
        updates, critic_opt = adam(joint).update(laid_out(grads), opt)
        critic_params = optax.apply_updates(params, updates)

        def loss(outs):
            made, taught, distillation = outs
            d = dis_of(critic_params, stats)
            parts = {
                "reconstruction": jnp.mean((x - made) ** 2),
                "teacher": jnp.mean((x - taught) ** 2),
                "distillation": distillation,
                "adversarial": jnp.mean(jax.nn.softplus(-d(made, train=True))),
            }
            return sum((weights[name] * value for name, value in parts.items()), jnp.float32(0)), parts

        if phase:
            (value, parts), cotangents = jax.value_and_grad(loss, has_aux=True)(outs)
            grads = device_mean(pull(cotangents)[0])
            updates, net_opt = decayed_adam(joint, rate(state.step, steps)).update(laid_out(grads), net_opt, net_params)
            net_params = optax.apply_updates(net_params, updates)
        else:
            value, parts = loss(outs)
        value, parts, net_stats = device_mean((value, parts, net_stats))
        metrics = {"loss": value, **parts, "discriminator": critic, "accuracy": accuracy}
        return State(
            params={"network": net_params, "discriminator": critic_params},
            opt={"network": net_opt, "discriminator": critic_opt},
            stats=state.stats | {"network": net_stats, "discriminator": stats},
            step=state.step + 1,
        ), metrics | {"lr": rate(state.step, steps)}

    def rows(rows: Sequence[Row]) -> np.ndarray:
        return np.concatenate([held(config, rows), *[labelled(rows)] * (config.select == "auroc")])

    def look(state: State, batch: PyTree, results: Results) -> tuple[State, dict[str, Array]]:
        """`divergences` of held-out images; AUROC of D(made) on labelled ones, of which the best is kept."""
        own, n = as_result(state), config.validation.samples
        found = divergences(batch["image"][:n], made_by(own, batch["image"][:n]))
        if len(batch["image"]) == n:  # none is labelled
            return state, found
        one = lambda image: judged_by(own, made_by(own, image[None]))[0]
        value = auroc(-jax.lax.map(one, batch["image"][n:], batch_size=joint.batch), batch["label"][n:])
        return keep_best(state, value), found | {"check_auroc": value}

    stage = Stage(
        name="joint",
        splits=splits_of(config),
        rows=partial(trained, config),
        batch=joint.batch,
        steps=steps_of(joint, config.budget),
        init=joint_init,
        step=joint_step,
        checks=(Check(every=config.validation.every, rows=rows, look=look),),
        phases=(True, *[False] * (joint.critic - 1)),
    )
    return Variant((stage,), remake, judge, pictures)
