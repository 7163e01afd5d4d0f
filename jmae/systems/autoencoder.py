"""Autoencoders of normal images, trained rivals of the five systems: AE, AE-U, a denoising one, and DDAD's ensembles.

Cai, Zhang, Chen, Cheng, "MedIAnomaly: A comparative study of anomaly detection in medical images", arXiv 2404.04518.
Variants, images in [-1, 1], `s` the predicted log variance:

- `ae`: loss and map (x - x')^2.
- `ae_u` (Mao et al., "Abnormality Detection in Chest X-Ray Images Using Uncertainty Prediction Autoencoders", MICCAI
  2020): loss exp(-s) (x - x')^2 + s, map exp(-s) (x - x')^2.
- `dae` (Kascenas, Pugeault, O'Neil, "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI", MIDL
  2022): a U-Net removes coarse noise. With `dae.foreground`, noise, loss and map `dae_median` are those of Kascenas et
  al. Without it, map `dae` is MedIAnomaly's.
- `ddad` (Cai, Chen, Yang, Zhou, Cheng, "Dual-Distribution Discrepancy for Anomaly Detection in Chest X-Rays", MICCAI
  2022, arXiv 2206.03935): module A are K networks of normal and unlabelled images, module B K networks of normal ones.
  Maps |mean A - mean B|, the deviation of B, and (x - mean B)^2. `ddad_intra` is module B alone.

Taken from the official code (caiyu6666/MedIAnomaly, caiyu6666/DDAD, AntanasKascenas/DenoisingAE): networks, losses,
maps, Adam with a constant rate, batch, epochs, range of values. An image's score is the mean of its map. The recipe's
presets tell where the three differ. The preset `paper_dae` has the U-Net and the optimiser of MedIAnomaly.

Not taken from the script of Kascenas et al.: 4 levels of 64 to 512 channels (`dae.widths` has 5, as in MedIAnomaly);
rate 1e-4 with a cosine schedule (`train.lr` is 1e-3 and constant); AMSGrad; weight decay; 2100 rounds of 32 steps;
weights chosen by the loss of held-out images; values as stored, where the networks here see [-1, 1].

ours:
- With `dae.foreground`, map `dae` has the mask of `dae_median`. MedIAnomaly masks the noise alone, and only
  for brain sets: to values above the least of the batch. Its loss and map have no mask.
- An epoch has no incomplete batch, as in DDAD; in MedIAnomaly it has one.
- The K networks of a module share an epoch. Each step deals K disjoint batches, one a network, where a table has as
  many images; a shorter table is repeated. In DDAD each network has its own order. So one program trains a module.
- The running variances of batch norms are those of the batch, where PyTorch's are n / (n - 1) of it.
- Each image has its own shift of the noise, as randomness belongs to the sample. In the official codes a batch has one.
- Transposed convolutions start uniform within (inputs x kernel)^-1/2, where PyTorch counts the outputs.
- DDAD's maps of several channels are means over them. Its code has grey images alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from jaxtyping import Key as RandomKey
from ml_collections import ConfigDict

from jmae.data.manifest import Row
from jmae.data.unlabeled import ratio_note
from jmae.errors import InputError
from jmae.keys.autoencoder import VARIANTS
from jmae.masking import sample_keys
from jmae.nn.autoencoder import Autoencoder, Denoiser
from jmae.nn.simsid import pytorch_weights
from jmae.optim import adam, begin, descend
from jmae.recipe import is_volume
from jmae.system import Results, Stage, State, System, network, rows_of, stats_of, steps_of

PRIMARY = {"ddad": "ddad_inter"}
WORDS = {
    "ae": "mean squared error of the reconstruction",
    "ae_u": "mean squared error of the reconstruction over its predicted variance",
    "squared_error": "mean squared error of the reconstruction",
    "dae": "mean squared error of the reconstruction",
    "dae_median": "mean absolute error of the reconstruction, after a median filter",
    "ddad_intra": "how much the reconstructions by module B's networks differ",
    "ddad_inter": "how much the mean reconstructions by modules A and B differ",
    "ddad_error": "mean squared error of module B's mean reconstruction",
}
FOREGROUND = 0.01  # sum over channels above which a pixel belongs to the foreground (Kascenas et al.)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A recipe with its networks.

    Attributes:
        config: the recipe.
        count: networks of a stage.
        uncertain: whether a network predicts the log variance, too.
        init: key -> (params, stats) of all networks of a stage, along a first axis.
        bind: (params, stats) of one network -> the network (`system.network`).
    """

    config: ConfigDict
    count: int
    uncertain: bool
    init: Callable[[RandomKey[Array, ""]], tuple[PyTree, PyTree]]
    bind: Callable[..., Any]

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam, without its learning rate."""
        return adam(betas=tuple(self.config.train.betas))


def setup_of(config: ConfigDict) -> Setup:
    """The networks that a recipe describes; raises InputError for a size that does not fit them."""
    size, channels, model, variant = tuple(config.data.size), config.data.channels, config.model, config.variant
    ensemble = variant.startswith("ddad")
    uncertain, count = variant == "ae_u" or (ensemble and model.uncertain), model.networks if ensemble else 1
    form = dict(size=size, channels=channels, outputs=channels * (2 if uncertain else 1))
    if variant == "dae":
        init, bind = network(lambda rngs: Denoiser(**form, widths=tuple(config.dae.widths), rngs=rngs))
    else:
        form |= dict(width=model.width, hidden=model.hidden, latent=model.latent)
        init, bind = network(lambda rngs: Autoencoder(**form, rngs=rngs))

    def first(key: RandomKey[Array, ""]) -> tuple[PyTree, PyTree]:
        params, stats = init(key)
        return pytorch_weights(params, jax.random.fold_in(key, 1)), stats

    every = lambda key: jax.vmap(first)(jax.random.split(key, count))
    return Setup(config=config, count=count, uncertain=uncertain, init=every, bind=bind)


def each(function: Callable[[PyTree], PyTree], trees: PyTree, count: int) -> PyTree:
    """Apply a function to the arrays of each network in turn.

    The program holds each network's operations apart: a loop on the device makes a convolution eight times as slow on a
    CPU, a batch axis of the networks three times.
    """
    outs = [function(jax.tree.map(lambda x: x[i], trees)) for i in range(count)]  # noqa: B023
    return jax.tree.map(lambda *x: jnp.stack(x), *outs)


def centred(image: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Values from 0 to 1 as the networks see them, from -1 to 1."""
    return 2 * image - 1


# --- noise (variant dae) ----------------------------------------------------------------------------------------------


def foreground(image: Float[Array, "*b c"]) -> Bool[Array, "*b 1"]:
    """True where the sum of an image's channels is above `FOREGROUND`."""
    return jnp.sum(image, -1, keepdims=True) > FOREGROUND


def stretched(coarse: Float[Array, "h w c"], size: tuple[int, ...]) -> Float[Array, "H W c"]:
    """Linear interpolation whose first and last values are those of `coarse` (`align_corners` of PyTorch)."""

    def weights(n: int, m: int) -> np.ndarray:
        places = np.arange(n)[:, None] * (m - 1) / max(1, n - 1)
        return np.maximum(0, 1 - np.abs(places - np.arange(m))).astype(np.float32)

    rows, columns = (jnp.asarray(weights(n, m)) for n, m in zip(size, coarse.shape, strict=False))
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, coarse, precision="highest")


def noise(dae: ConfigDict, image: Float[Array, "h w c"], key: RandomKey[Array, ""]) -> Float[Array, "h w c"]:
    """The noise of an image that spans 0 to 1: coarse normal values, resized, shifted around the borders."""
    values_key, shift_key = jax.random.split(key)
    size, channels = image.shape[:-1], image.shape[-1]
    coarse = dae.noise * jax.random.normal(values_key, (dae.grain, dae.grain, channels))
    shift = jax.random.randint(shift_key, (2,), 0, jnp.asarray(size))
    fine = jnp.roll(stretched(coarse, size), shift, (0, 1))
    return jnp.where(foreground(image), fine, 0) + dae.mean if dae.foreground else fine + dae.mean


# --- loss -------------------------------------------------------------------------------------------------------------


def errors(
    setup: Setup, out: Float[Array, "*b k"], image: Float[Array, "*b c"]
) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
    """(Squared errors of a network's result, its log variance, which is 0 where it predicts none)."""
    mean, log_variance = jnp.split(out, 2, -1) if setup.uncertain else (out, jnp.zeros_like(out))
    return (image - mean) ** 2, log_variance


def loss(
    setup: Setup,
    stats: PyTree,
    params: PyTree,
    given: Float[Array, "n b *size c"],
    image: Float[Array, "n b *size c"],
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    """The sum over the networks of their mean losses: (loss, (statistics, metrics)). Metrics are means over networks.

    Args:
        given: images that the networks get, with noise in the variant dae; 0 to 1.
        image: target images; 0 to 1.
    """
    dae = setup.config.dae if setup.config.variant == "dae" else None

    def one(parts: tuple[PyTree, PyTree, Array, Array]) -> tuple[Array, PyTree, Array]:
        params, stats, given, image = parts
        net = setup.bind(params, stats)
        squared, log_variance = errors(setup, net(centred(given), train=True), centred(image))
        if dae and dae.foreground:
            squared = jnp.where(foreground(image), squared, 0)
        terms = jnp.exp(-log_variance) * squared + log_variance if setup.uncertain else squared
        return jnp.mean(terms), stats_of(net), jnp.mean(squared)

    values, stats, squared = each(one, (params, stats, given, image), setup.count)
    return jnp.sum(values), (stats, {"loss": jnp.mean(values), "squared": jnp.mean(squared)})


def step(
    setup: Setup, state: State, batch: PyTree, key: RandomKey[Array, ""], results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """`Stage.step`: one step of Adam. Sample i of the batch belongs to network i mod K."""
    image, config = batch["image"], setup.config
    given = image
    if config.variant == "dae":
        given = image + jax.vmap(partial(noise, config.dae))(image, sample_keys(key, batch["index"]))
    deal = lambda x: jnp.moveaxis(x.reshape(-1, setup.count, *x.shape[1:]), 1, 0)
    return descend(state, partial(loss, setup, state.stats), setup.optimiser, config.train.lr, deal(given), deal(image))


# --- score ------------------------------------------------------------------------------------------------------------


def restored(setup: Setup, result: PyTree, image: Float[Array, "b *size c"]) -> Float[Array, "n b *size k"]:
    """What the networks of a stage make of images."""
    net = lambda weights: setup.bind(weights["params"], weights["stats"])(centred(image), train=False)
    return each(net, {name: result[name] for name in ("params", "stats")}, setup.count)


def median(x: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """The median of the 5 x 5 pixels around each pixel, borders mirrored."""
    h, w = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    return jnp.median(jnp.stack([x[:, i : i + h, j : j + w] for i in range(5) for j in range(5)]), 0)


def inside(image: Float[Array, "b h w c"]) -> Bool[Array, "b h w"]:
    """True where more than 0.95 of the 5 x 5 pixels around a pixel are foreground; beyond the image there is none."""
    mask = jnp.pad(foreground(image)[..., 0], ((0, 0), (2, 2), (2, 2)))
    h, w = image.shape[1:3]
    parts = [mask[:, i : i + h, j : j + w] for i in range(5) for j in range(5)]
    return jnp.mean(jnp.stack(parts), 0) > 0.95


def denoised_maps(
    setup: Setup, out: Float[Array, "b h w c"], image: Float[Array, "b h w c"]
) -> dict[str, Float[Array, "b h w"]]:
    """The squared error, and the median of the absolute one; the latter is of values from 0 to 1."""
    squared, absolute = jnp.mean((centred(image) - out) ** 2, -1), jnp.mean(jnp.abs(centred(image) - out), -1) / 2
    if setup.config.dae.foreground:
        squared, absolute = (jnp.where(inside(image), x, 0) for x in (squared, absolute))
    return {"dae": squared, "dae_median": median(absolute)}


def discrepancies(
    setup: Setup, outs: dict[str, Float[Array, "n b h w k"]], image: Float[Array, "b h w c"]
) -> dict[str, Float[Array, "b h w"]]:
    """DDAD's maps from the results of its modules: inter, where module A is there, intra, and the error of module B.

    With AE-U they are divided by sqrt(v), and the error by v; v is the mean variance of module B's networks.
    """
    mean, log_variance = {}, jnp.zeros(())
    for name, out in outs.items():
        mean[name], log_variance = jnp.split(out, 2, -1) if setup.uncertain else (out, jnp.zeros_like(out))
    b, variance = mean["module_b"], jnp.mean(jnp.exp(log_variance), 0)  # module B is the last
    centre = jnp.mean(b, 0)
    maps = {"ddad_intra": jnp.sqrt(jnp.var(b, 0, ddof=1) / variance), "ddad_error": (image - centre) ** 2 / variance}
    if "module_a" in mean:
        maps["ddad_inter"] = jnp.abs(jnp.mean(mean["module_a"], 0) - centre) / jnp.sqrt(variance)
    return {name: jnp.mean(value, -1) for name, value in maps.items()}


def score(
    setup: Setup, results: Results, batch: PyTree, key: RandomKey[Array, ""], *, chunk: int | None = None
) -> dict[str, Any]:
    """`System.score`. Nothing is random."""
    image, variant = batch["image"], setup.config.variant
    outs = {name: restored(setup, results[name], image) for name in VARIANTS[variant]}
    last = list(outs.values())[-1]
    if variant.startswith("ddad"):
        maps = discrepancies(setup, outs, centred(image))
    elif variant == "dae":
        maps = denoised_maps(setup, last[0], image)
    else:
        squared, log_variance = errors(setup, last[0], centred(image))
        maps = {"ae": jnp.mean(squared, -1)}
        if setup.uncertain:
            maps = {"ae_u": jnp.mean(jnp.exp(-log_variance) * squared, -1), "squared_error": maps["ae"]}
    normal = jnp.mean(last[..., : image.shape[-1]], 0)
    scores = {name: jnp.mean(value, (1, 2)) for name, value in maps.items()}
    return {"maps": maps, "scores": scores, "reconstruction": (normal + 1) / 2}


# --- system -----------------------------------------------------------------------------------------------------------


def rows_a(rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of module A's rows: normals and unlabelled images. Raises InputError where none is unlabelled."""
    if not len(rows_of(rows, results, splits=("unlabeled",))):
        need = "needs unlabelled images (rows of split 'unlabeled'): add some"
        raise InputError(f"variant ddad {need}, or take --config.variant=ddad_intra")
    return rows_of(rows, results, splits=("train", "unlabeled"))


def build(config: ConfigDict) -> System:
    """The rival that a recipe describes; raises InputError on settings that do not fit together."""
    if is_volume(config):
        raise InputError("data.size has 3 axes: the autoencoders are of images")
    if config.data.unlabeled_size and config.data.anomaly_ratio < 0:
        raise InputError("data.unlabeled_size goes with data.anomaly_ratio: set that too, or take it back to 0")
    setup, names = setup_of(config), VARIANTS[config.variant]
    both, one = ("train", "unlabeled"), partial(step, setup)  # modules A and B share one step, so one program

    def first(key: RandomKey[Array, ""], results: Results, n: int) -> State:
        params, stats = setup.init(key)
        return begin(params, setup.optimiser, stats)

    stages = tuple(
        Stage(
            name=name,
            splits=both if name == "module_a" else ("train",),
            rows=rows_a if name == "module_a" else rows_of,
            batch=setup.count * config.train.batch,
            steps=steps_of(config.train, config.budget),
            init=first,
            step=one,
            words={"squared": "mean squared error"},
        )
        for name in names
    )
    note = ratio_note(config) if config.variant == "ddad" else ""
    return System(
        name="autoencoder",
        stages=stages,
        uses=names,
        primary=PRIMARY.get(config.variant, config.variant),
        score=partial(score, setup),
        words=WORDS,
        notes=(note,) if note else (),
    )
