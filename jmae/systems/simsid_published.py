"""SimSID as its authors published it: an autoencoder over windows with memories, and a discriminator, trained in turn.

Xiang et al., "Exploiting Structural Consistency of Chest Anatomy for Unsupervised Anomaly Detection in Radiography
Images", TPAMI 2024, arXiv 2403.08689. Consulted: MrGiovanni/SimSID, and tiangexiang/SQUID of Xiang et al., "SQUID: Deep
Feature In-Painting for Unsupervised Anomaly Detection", CVPR 2023. The network: jmae/nn/simsid_published.py.

The variant "official" of jmae/systems/simsid.py. Its one stage, `joint`, trains all networks from the first step on.
The discriminator learns at every step, the autoencoder at every `joint.critic`-th one, which also fills the memory
where that is a queue. Calibration and scores are those of jmae/systems/simsid_score.py.

ours: The running variances of norms are those of the batch, where PyTorch's are n / (n - 1) of it. An epoch has whole
batches alone. The learning rate changes at every step instead of every epoch. Discriminator and autoencoder learn from
the same images of the student; SQUID makes them anew for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from jmae import optim
from jmae.errors import InputError
from jmae.losses import discriminator_loss
from jmae.masking import sample_keys
from jmae.nn import simsid_weights
from jmae.nn.simsid import pytorch_weights
from jmae.nn.simsid_published import Windows, pytorch_autoencoder
from jmae.optim import descend
from jmae.scoring import auroc
from jmae.sharding import device_mean
from jmae.system import (
    Check,
    Pretrained,
    Results,
    Stage,
    State,
    best_weights,
    compute_type,
    keep_best,
    last_weights,
    network,
    stats_of,
    steps_of,
    with_best,
)
from jmae.systems.simsid_score import (
    LOG_WORDS,
    RULE,
    TEACHER,
    Method,
    Network,
    adam,
    discriminator,
    judged_size,
    labelled_rows,
    laid_out,
    reconstruction_check,
    selecting_splits,
    training_rows,
)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks and settings of the published method.

    Attributes:
        config: the recipe.
        autoencoder: the student's and the teacher's network over windows.
        discriminator: D.
    """

    config: ConfigDict
    autoencoder: Network
    discriminator: Network


def networks(config: ConfigDict) -> Networks:
    """The published networks; raises InputError on sizes that do not fit each other."""
    data, joint, dtype = config.data, config.joint, compute_type(config)
    if joint.judge == "image" and prod(judged_size(config)) == 1 < len(config.model.discriminator):
        raise InputError(
            "joint.judge=image: the last norm of the discriminator has one value an image: take fewer widths in "
            "model.discriminator, or joint.judge=running"
        )
    if joint.queue and joint.batch > joint.slots:
        raise InputError(
            f"joint.queue: a batch of {joint.batch} does not fit into joint.slots={joint.slots}: take more"
        )
    make = lambda rngs: Windows(
        tuple(data.size),
        data.channels,
        tuple(joint.windows),
        tuple(joint.widths),
        joint.joined,
        joint.slots,
        joint.top_k,
        joint.heads,
        joint.kept,
        dtype,
        decoder_share=joint.decoder_kept,
        queue=joint.queue,
        inpainting=joint.inpainting,
        norms=joint.norms,
        sigmoid=joint.activation == "sigmoid",
        rngs=rngs,
    )
    return Networks(
        config=config,
        autoencoder=drawn_as(pytorch_autoencoder, Network(*network(make))),
        discriminator=drawn_as(pytorch_weights, discriminator(config)),
    )


def drawn_as(draw: Callable[[PyTree, Array], PyTree], net: Network) -> Network:
    """A network whose first parameters come from `draw`."""

    def init(key: Array) -> tuple[PyTree, PyTree]:
        params, stats = net.init(key)
        return draw(params, jax.random.fold_in(key, 1)), stats

    return Network(init, net.bind)


def method(config: ConfigDict) -> Method:
    """The published method: its stage, and what the scores need."""
    nets = networks(config)
    return Method(
        stages=(joint_stage(nets),),
        maker="joint",
        remake=partial(remake, nets),
        judge=partial(judge, nets),
        pictures=partial(pictures, nets),
    )


def joint_stage(nets: Networks) -> Stage:
    """The stage that trains all networks."""
    config, joint = nets.config, nets.config.joint
    make = lambda state, results, image: made_by(nets, last_weights(state), image)
    selection = Check(every=config.validation.select_every, rows=labelled_rows, look=partial(joint_look, nets))
    return Stage(
        name="joint",
        splits=selecting_splits(config),
        rows=partial(training_rows, config),
        batch=joint.batch,
        steps=steps_of(joint, config.budget),
        init=partial(joint_init, nets),
        step=partial(joint_step, nets),
        words=LOG_WORDS,
        checks=(reconstruction_check(config, make), *[selection] * (config.select == RULE)),
        phases=(True, *[False] * (joint.critic - 1)),
        pretrained=Pretrained(use="instead", load=released_weights),
    )


def released_weights(source: Path, state: State) -> tuple[State, str]:
    """`Pretrained.load`: the state with the weights of a published or converted file or folder."""
    weights = simsid_weights.read(source)
    stats = {name: part for name, part in state.stats.items() if name != "best"}
    params = simsid_weights.load(weights, state.params)
    loaded = state.replace(params=params, stats=state.stats | simsid_weights.load(weights, stats))
    return loaded, simsid_weights.report(weights)


# --- images -----------------------------------------------------------------------------------------------------------


def seen(nets: Networks, image: Array) -> Array:
    """Images in [0, 1] as the networks see them."""
    return 2 * image - 1 if nets.config.joint.activation == "tanh" else image


def shown(nets: Networks, made: Array) -> Array:
    """Images of the networks in [0, 1]."""
    return (made + 1) / 2 if nets.config.joint.activation == "tanh" else made


def made_by(nets: Networks, weights: PyTree, image: Array, *, teacher: bool = False) -> Array:
    """The student's images of images, or the teacher's; `weights` are the "params" and "stats" of the stage."""
    net = nets.autoencoder.bind(*(weights[what]["network"] for what in ("params", "stats")))
    return shown(nets, net(seen(nets, image), train=False)[int(teacher)])


def judged_by(nets: Networks, weights: PyTree, image: Array) -> Float[Array, " b"]:
    """D's logits of images.

    The published code leaves D in training mode and judges one image at a time, so that its norms take the moments of
    each image by itself.
    """
    d = nets.discriminator.bind(*(weights[what]["discriminator"] for what in ("params", "stats")))
    return d(seen(nets, image), train=False, alone=nets.config.joint.judge == "image")


def remake(nets: Networks, results: Results, image: Array) -> Array:
    """`Method.remake`, by the best weights."""
    return made_by(nets, best_weights(results["joint"], RULE), image)


def judge(nets: Networks, results: Results, image: Array) -> Float[Array, " b"]:
    """`Method.judge`, by the best weights."""
    return judged_by(nets, best_weights(results["joint"], RULE), image)


def pictures(nets: Networks, results: Results, image: Array) -> dict[str, Array]:
    """`Method.pictures`: the teacher's image."""
    return {TEACHER: made_by(nets, best_weights(results["joint"], RULE), image, teacher=True)}


def affine(
    image: Float[Array, "*size c"], key: Array, *, translation: float, scaling: float
) -> Float[Array, "*size c"]:
    """The image moved along each axis by whole pixels, U(-translation, translation) of its length, and scaled by
    U(1 - scaling, 1 + scaling) about the middle.

    Each pixel is the nearest one of the image, or 0 outside of it: torchvision's `RandomAffine` as the code calls it.
    """
    u = jax.random.uniform(key, (image.ndim,), minval=-1)
    for axis, n in enumerate(image.shape[:-1]):
        centred = jnp.arange(n) + 0.5 - n / 2 - jnp.round(translation * u[1 + axis] * n)
        places = jnp.floor(centred / (1 + scaling * u[0]) + n / 2).astype(jnp.int32)
        image = jnp.take(image, jnp.where(places < 0, n, places), axis, mode="fill", fill_value=0)
    return image


# --- optimisers -------------------------------------------------------------------------------------------------------


def rate(joint: ConfigDict, step: Array, steps: int) -> Float[Array, ""]:
    """The autoencoder's learning rate, PyTorch's cosine: from `lr` to `lr_least` in a share `cosine` of the steps, and
    back again."""
    return joint.lr_least + (joint.lr - joint.lr_least) * (1 + jnp.cos(jnp.pi * step / (joint.cosine * steps))) / 2


def decayed_adam(joint: ConfigDict) -> optax.GradientTransformation:
    """The autoencoder's optimiser: Adam of epsilon 1e-7 with weight decay as a part of the gradient (PyTorch's)."""
    adam_of_joint = optim.adam(betas=tuple(joint.betas), eps=1e-7)
    return laid_out(optax.chain(optax.add_decayed_weights(joint.decay), adam_of_joint))


# --- the joint step ---------------------------------------------------------------------------------------------------


def joint_init(nets: Networks, key: Array, results: Results, n: int) -> State:
    """Autoencoder and discriminator with random weights."""
    config = nets.config
    parts = {
        "network": nets.autoencoder.init(jax.random.fold_in(key, 0)),
        "discriminator": nets.discriminator.init(jax.random.fold_in(key, 1)),
    }
    params, stats = ({name: part[i] for name, part in parts.items()} for i in range(2))
    opt = {
        "network": decayed_adam(config.joint).init(params["network"]),
        "discriminator": adam(config.joint).init(params["discriminator"]),
    }
    state = State(params=params, opt=opt, stats=stats, step=jnp.int32(0))
    return with_best(state, RULE) if config.select == RULE else state


def judge_loss(nets: Networks, stats: PyTree, params: PyTree, x: Array, made: Array) -> tuple[Array, tuple]:
    """The discriminator's weighted loss on images and the student's images of them; a loss as `descend` takes it."""
    d = nets.discriminator.bind(params, stats["discriminator"])
    real, fake = (d(y, train=True) for y in (x, made))
    accuracy = (jnp.mean(real > 0) + jnp.mean(fake < 0)) / 2
    value = nets.config.joint.weights.discriminator * discriminator_loss(real, fake)
    return value, ({"discriminator": stats_of(d)}, {"accuracy": accuracy})


def autoencoder_loss(
    nets: Networks, judge: State, x: Array, outs: tuple[Array, ...]
) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
    """(loss, (its parts without their weights, statistics of D)) of the autoencoder's results `outs` for images `x`."""
    made, taught, distillation = outs
    d = nets.discriminator.bind(judge.params, judge.stats["discriminator"])
    parts = {
        "reconstruction": jnp.mean((x - made) ** 2),
        "teacher": jnp.mean((x - taught) ** 2),
        "distillation": distillation,
        "adversarial": jnp.mean(jax.nn.softplus(-d(made, train=True))),
    }
    weights = nets.config.joint.weights
    return sum((weights[name] * value for name, value in parts.items()), jnp.float32(0)), (parts, stats_of(d))


def joint_step(
    nets: Networks, state: State, batch: PyTree, key: Array, results: Results, *, steps: int, phase: bool
) -> tuple[State, dict[str, Array]]:
    """A step of the discriminator, and where `phase` is true one of the autoencoder; each by its own losses.

    The autoencoder's images are made once and serve both losses: its gradient waits until the discriminator has
    learned. `descend`, which calls the loss itself, would make the images twice.
    """
    joint = nets.config.joint
    view, shortcut = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(key, batch["index"])), 1, 0)
    moved = joint.translation or joint.scaling
    augment = partial(affine, translation=joint.translation, scaling=joint.scaling)
    x = seen(nets, jax.vmap(augment)(batch["image"], view) if moved else batch["image"])
    rounds = state.step // joint.critic  # steps of the autoencoder so far
    oldest = rounds * joint.batch % joint.slots if phase and joint.queue else None

    def forward(params: PyTree) -> tuple[tuple[Array, ...], PyTree]:
        net = nets.autoencoder.bind(params, state.stats["network"])
        return net(x, shortcut, train=True, oldest=oldest), stats_of(net)

    params, opt = state.params["network"], state.opt["network"]
    if phase:
        outs, pull, net_stats = jax.vjp(forward, params, has_aux=True)
    else:
        outs, net_stats = forward(params)

    judge = State(
        params=state.params["discriminator"],
        opt=state.opt["discriminator"],
        stats={"discriminator": state.stats["discriminator"]},
        step=state.step,
    )
    loss_of_judge = partial(judge_loss, nets, judge.stats)
    judge, judged = descend(judge, loss_of_judge, adam(joint), joint.lr, x, jax.lax.stop_gradient(outs[0]))

    loss, lr = partial(autoencoder_loss, nets, judge, x), rate(joint, state.step, steps)
    d_stats = judge.stats["discriminator"]
    if phase:
        (value, (parts, d_stats)), cotangents = jax.value_and_grad(loss, has_aux=True)(outs)
        grads = device_mean(pull(cotangents)[0])
        updates, opt = decayed_adam(joint).update(grads, opt, params)
        params = optax.apply_updates(params, jax.tree.map(lambda update: -lr * update, updates))
    else:
        value, (parts, _) = loss(outs)
    value, parts, net_stats, d_stats = device_mean((value, parts, net_stats, d_stats))
    new = State(
        params={"network": params, "discriminator": judge.params},
        opt={"network": opt, "discriminator": judge.opt},
        stats=state.stats | {"network": net_stats, "discriminator": d_stats},
        step=state.step + 1,
    )
    metrics = {"loss": value, **parts, "discriminator": judged["loss"], "accuracy": judged["accuracy"], "lr": lr}
    return new, metrics


def joint_look(nets: Networks, state: State, batch: PyTree, results: Results) -> tuple[State, dict[str, Array]]:
    """AUROC of D(new image) on the labelled images, as the networks are now; keeps the best weights."""
    weights = last_weights(state)
    one = lambda image: judged_by(nets, weights, made_by(nets, weights, image[None]))[0]
    value = auroc(-jax.lax.map(one, batch["image"], batch_size=nets.config.joint.batch), batch["label"])
    return keep_best(state, RULE, value, tolerance=nets.config.joint.tolerance), {"check_auroc": value}
