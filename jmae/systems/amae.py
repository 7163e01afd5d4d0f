"""AMAE: a pre-trained masked autoencoder adapted to normal and unlabelled chest X-rays.

Bozorgtabar, Mahapatra, Thiran, "AMAE: Adaptation of Pre-Trained Masked Autoencoder for Dual-Distribution Anomaly
Detection in Chest X-Rays", MICCAI 2023, arXiv 2307.12721. No official code is known; consulted: medical_mae (weights'
recipe), AnatPaste's code (proxy task and head), DDAD's (protocol). Equation numbers are the paper's.

Stages: `pretrain` (Stage 0, where no weights are given), `proxy` (Stage 1), `labels` (pseudo-labels), `module_a` and
`module_b` (Stage 2). Variants:

- the paper's: `stage2` (AMAE), `stage1` (proxy task alone), `no_pseudo` (module A on the normals, B on all unlabelled
  images), `mask_rec` (one module on both, reconstruction error), `mae` (not adapted, reconstruction error);
- `one_class`: one masked autoencoder of the normals alone, whose Stage 0 sees no other image either;
- ours, controls that tell what a score owes to the pseudo-labels: `b_perfect` takes the hidden labels in their place,
  for both modules; `b_normals` has AMAE's module A, and trains module B on the normals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree
from ml_collections import ConfigDict

from jmae import recipe, residuals
from jmae.anomalies.anatpaste import anatpaste, jittered, lung_field
from jmae.data.augment import moments_of
from jmae.data.manifest import Row
from jmae.data.unlabeled import ratio_note, unlabeled_labels
from jmae.errors import InputError
from jmae.keys.amae import DISCREPANCIES, SIGNED, VARIANTS
from jmae.masked import (
    Training,
    crop_and_flip,
    range_of,
    standardised,
    start,
    train_step,
    training,
)
from jmae.masking import fold_in, sample_keys, scoring_keys, standard_error
from jmae.nn.mae import MAE
from jmae.nn.transformer import linear
from jmae.optim import adamw, begin, descend
from jmae.patches import patchify
from jmae.reconstruct import Reconstruction, reconstruct
from jmae.run_folder import log
from jmae.sharding import device_gather, device_mean
from jmae.system import (
    Fit,
    Prediction,
    Pretrained,
    Results,
    Stage,
    State,
    System,
    masked_autoencoder,
    network,
    rows_of,
    stats_of,
    steps_of,
)
from jmae.tokens import (
    DISTANCE,
    NAME,
    RIDGE,
    RIDGE_FIT,
    TOKEN_KEYS,
    check_tokens,
    learned_by,
    ridge_fits,
    ridge_score,
    signed_token_score,
    token_fits,
    token_rivals,
    token_score,
    tokens_of,
)
from jmae.tokens import WORDS as TOKEN_WORDS

OWN = "own_tokens"  # what the score SIGNED keeps of module B's images
NORMALS_ALONE = ("stage1", "mae", "one_class")  # variants that need no unlabelled image
WORDS = TOKEN_WORDS | {
    "tokens_a": f"{DISTANCE}, by the encoder of module A",
    "tokens_b": f"{DISTANCE}, by the encoder of module B",
    "tokens_signed": "whether the image's tokens are nearer to those of normal images or to those of the unlabelled "
    "images that look abnormal; a token is what the network makes of one patch (a small square)",
    "tokens_ridge": "whether the image is like the unlabelled images rather than the normal ones, by what module B "
    "makes of it",
    "stage1": "log odds of an anomaly, by a classifier of normal images and images with drawn anomalies",
    "stage2": "difference of the reconstructions of the two modules",
    "stage2_error": "reconstruction error of module A less that of module B",
    "stage2_nearer": "difference of the reconstructions where module B is nearer to the image",
    "mae": "reconstruction error of the first network",
    "module_a": "reconstruction error of module A, which learned from normal images",
}
MEANS = ("mae", "mask_rec", "one_class", "stage2_error")  # primary scores that are means over masks
TOKEN_SCORES = {"pretrain": "tokens", "module_a": "tokens_a", "module_b": "tokens_b"}  # by the encoder's stage
HOME_MADE = (
    "Stage 0 learns from this run's images instead of the 0.3 million chest X-rays of the paper's checkpoint "
    "(model.weights names no file): this run is not the paper's"
)

MIXED = (
    "the primary score tells the unlabelled images from the normal training images: any other difference between the "
    "two, such as another scanner, counts as well"
)


class Head(nnx.Module):
    """The proxy task's classifier: three dense layers with batch norm and ReLU between (AnatPaste's projection
    head; the paper says "lightweight 3-layer MLP"). Logits in float32: 0 normal, 1 anomalous."""

    def __init__(self, width: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
        widths = (width, *hidden)
        norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.layers = nnx.List([linear(a, b, jnp.float32, rngs) for a, b in zip(widths, hidden, strict=False)])
        self.norms = nnx.List([norm(b) for b in hidden])
        self.out = linear(widths[-1], 2, jnp.float32, rngs)

    def __call__(self, x: Float[Array, "b d"], *, train: bool) -> Float[Array, "b 2"]:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x), use_running_average=not train))
        return self.out(x)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a recipe, and the recipe: each pair of functions is that of `system.network`."""

    config: ConfigDict
    mae_init: Callable[[Array], tuple[PyTree, PyTree]]
    mae_of: Callable[[PyTree], MAE]
    head_init: Callable[[Array], tuple[PyTree, PyTree]]
    head_of: Callable[[PyTree, PyTree], Head]


def networks_of(config: ConfigDict) -> Networks:
    """The networks that a recipe describes."""
    model, hidden = config.model, tuple(config.proxy.head)
    mae_init, mae_of = masked_autoencoder(config, model.channels)
    head_init, head_of = network(lambda rngs: Head(model.width, hidden, rngs=rngs))
    return Networks(config=config, mae_init=mae_init, mae_of=mae_of, head_init=head_init, head_of=head_of)


# --- loss: masked reconstruction (Stages 0 and 2: masked.train_step), proxy task (Stage 1) ----------------------------


def view(
    config: ConfigDict, augment: bool, image: Float[Array, "b *size c"], keys: Key[Array, " b"]
) -> Float[Array, "b *size k"]:
    """Images in the network's range and channels; with `augment` after a random resized crop and a horizontal flip, as
    in medical_mae's pre-training (spec sections 3 and 6)."""
    if not augment:
        return standardised(image, config)
    return standardised(crop_and_flip(image, keys, scale=tuple(config.data.crop_scale), axes=(1,)), config, image)


def features(networks: Networks, params: PyTree, image: Float[Array, "b *size c"]) -> Float[Array, "b d"]:
    """Mean over all patch tokens of the encoder, after its final norm, without the class token."""
    config, mae = networks.config, networks.mae_of(params)
    patches = patchify(standardised(image, config), tuple(config.model.patch))
    return jnp.mean(mae.encode(mae.embed(patches))[:, 1:].astype(jnp.float32), axis=1)


def proxy_loss(
    networks: Networks, stats: PyTree, params: PyTree, x: Float[Array, "b d"], abnormal: Array
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    """Eq. 2, the sum of two means over the batch: (loss, (statistics, metrics)).

    Args:
        x: features, half of them of images with an anomaly.
        abnormal: 1 for those, 0 for the others (b,).
    """
    head = networks.head_of(params, stats)
    logits = head(x, train=True)
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, abnormal)
    return 2 * jnp.mean(terms), (stats_of(head), {"accuracy": jnp.mean(jnp.argmax(logits, 1) == abnormal)})


def with_anomalies(proxy: ConfigDict, batch: PyTree, keys: Key[Array, " b"]) -> Float[Array, "b *size c"]:
    """Each image of the batch with an anomaly of AnatPaste in its lung field."""
    paste = partial(
        anatpaste,
        area=tuple(proxy.area),
        aspect=tuple(proxy.aspect),
        fill=tuple(proxy.fill),
        blur=tuple(proxy.blur),
        margin=proxy.margin,
        jitter=proxy.jitter,
    )
    one = lambda image, lungs, key: paste(image, image, key, lungs=lungs)[0]
    return jax.vmap(one)(batch["image"], batch["lungs"], keys)


def proxy_optimiser(proxy: ConfigDict) -> optax.GradientTransformation:
    """The proxy task's optimiser, without a learning rate."""
    return adamw(betas=tuple(proxy.betas), decay=proxy.decay)


def proxy_init(networks: Networks, key: Key[Array, ""], results: Results, n: int) -> State:
    """The head with random weights."""
    params, stats = networks.head_init(key)
    return begin(params, proxy_optimiser(networks.config.proxy), stats)


def proxy_step(
    networks: Networks, state: State, batch: PyTree, key: Key[Array, ""], results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """One step of the proxy task: the head tells images with a synthetic anomaly from the images themselves.

    AnatPaste jitters an image before it pastes: the image with the anomaly and the one without are jittered alike.
    ours: the default has no such jitter, as Eq. 2 has none.
    """
    proxy, keys = networks.config.proxy, sample_keys(key, batch["index"])
    schedule = optax.warmup_cosine_decay_schedule(0.0, proxy.lr, proxy.warmup * steps, steps, proxy.lr_least)
    if proxy.jitter_image:
        image = jax.vmap(partial(jittered, jitter=proxy.jitter_image))(batch["image"], fold_in(keys, 1))
        batch = batch | {"image": image}
    pasted = with_anomalies(proxy, batch, keys)
    both = jnp.stack([batch["image"], pasted], 1).reshape(-1, *pasted.shape[1:])  # pairs stay on one device
    x = jax.lax.stop_gradient(features(networks, results["pretrain"]["params"], both))
    abnormal = jnp.tile(jnp.arange(2), len(pasted))
    loss = partial(proxy_loss, networks, state.stats)
    rate = schedule(state.step)
    state, metrics = descend(state, loss, proxy_optimiser(proxy), rate, x, abnormal)
    found = device_mean(jnp.mean(~jnp.all(batch["lungs"], (1, 2))))
    return state, metrics | {"lung_fields_found": found}


# --- score (Eq. 4) ----------------------------------------------------------------------------------------------------


def margin_of(networks: Networks, results: Results, image: Float[Array, "b *size c"]) -> Float[Array, " b"]:
    """Logit abnormal less logit normal of h_0(f_0(x)); its sigmoid is Stage 1's probability softmax(h_0(f_0(x)))_1."""
    head = networks.head_of(results["proxy"]["params"], results["proxy"]["stats"])
    logits = head(features(networks, results["pretrain"]["params"], image), train=False)
    return logits[:, 1] - logits[:, 0]


def masked_passes(
    config: ConfigDict, batch: PyTree, key: Key[Array, ""], chunk: int | None
) -> Callable[..., Reconstruction]:
    """The function that reconstructs a batch by a predictor, under the masks of a test."""
    return partial(
        reconstruct,
        image=standardised(batch["image"], config),
        keys=scoring_keys(config.evaluation.masks_of, key, batch["case"]),
        patch=tuple(config.model.patch),
        ratio=config.adapt.mask_ratio,
        masks=config.evaluation.masks,
        paste=config.evaluation.paste,
        chunk=chunk,
    )


def evidence(
    networks: Networks, found: Reconstruction, results: Results, raw: Float[Array, "b *size c"]
) -> residuals.Evidence:
    """What a reconstruction by a predictor of normal images says of images, for `evaluation.residual`."""
    config = networks.config
    feature = config.evaluation.residual == "feature"
    mae = networks.mae_of(results[normal_error(config)[0]]["params"]) if feature else None
    patch = tuple(config.model.patch)
    return residuals.evidence(standardised(raw, config), found.measured, *range_of(raw, config), mae, patch)


def batch_evidence(
    networks: Networks, predict: Callable[..., Array], results: Results, batch: PyTree, key: Key[Array, ""]
) -> residuals.Evidence:
    """The same of a batch, for a fit."""
    view = masked_passes(networks.config, batch, key, networks.config.evaluation.chunk or None)
    found = view(partial(predict, results), measure=residuals.under_mask)
    return evidence(networks, found, results, batch["image"])


def score(
    networks: Networks, results: Results, batch: PyTree, key: Key[Array, ""], *, chunk: int | None = None
) -> dict[str, Any]:
    """The scores of images by all stages of the variant; see `System.score`."""
    config, raw = networks.config, batch["image"]
    names, image, view = VARIANTS[config.variant], standardised(raw, config), masked_passes(config, batch, key, chunk)
    autoencoders = [name for name in names if name in ("pretrain", "module_a", "module_b")]
    measures: dict[str, Any] = {normal_error(config)[0]: {"measure": residuals.under_mask}}
    measures = measures if residuals.wanted(config) else {}
    passes = {
        name: view(networks.mae_of(results[name]["params"]).predictions, **measures.get(name, {}))
        for name in autoencoders
    }
    maps = {"mae": jnp.mean(passes["pretrain"].error, axis=-1)}
    if "module_b" in passes:
        a, b = passes["module_a"], passes["module_b"]
        apart = jnp.abs(a.mean - b.mean)
        maps["stage2"] = jnp.mean(apart, axis=-1)  # Eq. 4
        # Eq. 4 has no sign. Where B is nearer the image, the difference is larger in abnormal images; where A is
        # nearer, it is larger in normal ones. Eq. 4 adds the two. ours: the first part alone, and by how much B
        # explains the hidden patches better than A.
        nearer = jnp.abs(b.mean - image) < jnp.abs(a.mean - image)
        maps["stage2_nearer"] = jnp.mean(apart * nearer, axis=-1)
        maps["stage2_error"] = jnp.mean(a.error - b.error, axis=-1)
    if "module_a" in passes:
        # A variant of one module has its name: the paper's Mask Rec., of normals and unlabelled images, and one_class.
        name = "module_a" if "module_b" in passes else config.variant
        maps[name] = jnp.mean(passes["module_a"].error, axis=-1)
    scores = {name: jnp.mean(m, axis=tuple(range(1, m.ndim))) for name, m in maps.items()}
    if NAME in results:  # neither in a plan nor while the training looks at the score
        for name, learned in results[NAME].items():
            mae = networks.mae_of(results[name]["params"])
            maps[TOKEN_SCORES[name]], scores[TOKEN_SCORES[name]] = token_score(config, mae, image, learned)
    if OWN in results:
        banks = results[NAME]["module_b"], results[OWN]
        mae = networks.mae_of(results["module_b"]["params"])
        maps[SIGNED], scores[SIGNED] = signed_token_score(config, mae, image, *banks)
    if RIDGE_FIT in results:
        scores[RIDGE] = ridge_score(config, networks.mae_of(results["module_b"]["params"]), image, results[RIDGE_FIT])
    if "proxy" in names:
        scores["stage1"] = margin_of(networks, results, raw)  # a probability would be 1 for all clear anomalies
    primary, more = primary_of(config), {}
    if primary in MEANS:
        each = passes["pretrain" if primary == "mae" else "module_a"].errors
        each = each - passes["module_b"].errors if primary == "stage2_error" else each
        more = {"score_error": standard_error(each)} if each.shape[1] > 1 else {}
    if residuals.wanted(config):
        of = evidence(networks, passes[normal_error(config)[0]], results, raw)
        maps[primary] = residuals.anomaly_map(config, of, results)
        scores |= residuals.device_score(config, maps[primary])
    mean, std = moments_of(raw, config.data)
    normal = passes[normal_error(config)[0]].mean  # what normal anatomy would look like
    if raw.shape[-1] != config.model.channels:
        normal = jnp.mean(normal, axis=-1, keepdims=True)
    return {"maps": maps, "scores": scores, "reconstruction": normal * std + mean} | more


def normal_error(config: ConfigDict) -> tuple[str, str]:
    """(the stage whose network predicts normal images, the name of its reconstruction error among the scores)."""
    names = VARIANTS[config.variant]
    if "module_a" not in names:
        return "pretrain", "mae"
    return "module_a", "module_a" if "module_b" in names else config.variant


def predicted(networks: Networks, results: Results, patches: Array, keep: Array, restore: Array) -> Array:
    """The network that predicts normal images, as a predictor: see `system.Prediction`."""
    stage = normal_error(networks.config)[0]
    return networks.mae_of(results[stage]["params"]).predictions(patches, keep, restore)


def error_score(
    networks: Networks,
    predict: Callable[..., Array],
    results: Results,
    batch: PyTree,
    key: Key[Array, ""],
    *,
    chunk: int | None = None,
) -> dict[str, Any]:
    """The reconstruction error of images by any predictor, in place of the network's; see `System.score`."""
    config = networks.config
    name, view = normal_error(config)[1], masked_passes(config, batch, key, chunk)
    found = view(partial(predict, results), measure=residuals.under_mask)
    error = jnp.mean(found.error, -1)
    maps, scores = {name: error}, {name: jnp.mean(error, tuple(range(1, error.ndim)))}
    if residuals.wanted(config):
        of = evidence(networks, found, results, batch["image"])
        maps[primary_of(config)] = residuals.anomaly_map(config, of, results)
        scores |= residuals.device_score(config, maps[primary_of(config)])
    return {"maps": maps, "scores": scores}


def mixed_rows(config: ConfigDict, rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the normal training rows and of the unlabelled ones, for the score `tokens_ridge`."""
    return np.concatenate([rows_of(rows, {}), unlabelled(config, rows, {})])


def own_tokens(networks: Networks) -> tuple[Fit, ...]:
    """The bank of module B's own training images, for the score `tokens_signed`; nothing where there is no such score.

    With pseudo-labels these are the unlabelled images that Stage 1 predicts abnormal with confidence, as in the
    training. The control b_perfect has no such score, as its images come from hidden labels.
    """
    config = networks.config
    none = "module_b" not in VARIANTS[config.variant] or config.variant == "b_perfect"
    if none or config.evaluation.tokens not in ("position", "global"):
        return ()
    predicted = config.variant == "stage2"
    rows = (lambda rows: unlabelled(config, rows, {})) if predicted else (lambda rows: rows_b(config, rows, {}))

    def measure(results: Results, batch: PyTree, key: Key[Array, ""]) -> dict[str, Array]:
        image, mae = batch["image"], networks.mae_of(results["module_b"]["params"])
        margin = {"margin": margin_of(networks, results, image)} if predicted else {}
        return {"tokens": tokens_of(config, mae, standardised(image, config))} | margin

    def finish(arrays: PyTree, key: Key[Array, ""], rows: Sequence[Row]) -> dict[str, np.ndarray]:
        tokens, adapt = np.asarray(arrays["tokens"]), config.adapt
        if predicted:
            label, confident = pseudo_labels(np.asarray(arrays["margin"]), adapt.percentile, adapt.percentile_over)
            own = np.flatnonzero(confident & (label == 1))
            tokens = tokens[own if len(own) else [0]]  # a plan asks for shapes, with margins of 0
        bank = learned_by(config, tokens)["bank"]
        repeated = np.resize(np.arange(bank.shape[1]), config.evaluation.bank_size)  # replicates have one shape
        return {"bank": bank[:, repeated]}

    return (
        Fit(
            name=OWN,
            rows=rows,
            measure=measure,
            finish=finish,
            settings=tuple(TOKEN_KEYS),
            needs="give the manifest rows of split unlabeled",
        ),
    )


# --- pseudo-labels: one sweep over the unlabelled images --------------------------------------------------------------


def labels_init(key: Key[Array, ""], results: Results, n: int) -> State:
    """No margin yet of the n unlabelled images."""
    return State(params={}, opt={}, stats={"margin": jnp.zeros(n)}, step=jnp.int32(0))


def labels_step(
    networks: Networks, state: State, batch: PyTree, key: Key[Array, ""], results: Results, *, steps: int
) -> tuple[State, dict[str, Array]]:
    """Puts the margins of a batch in their places."""
    index, margin = device_gather((batch["index"], margin_of(networks, results, batch["image"])))
    stats = {"margin": state.stats["margin"].at[index].set(margin)}
    return state.replace(stats=stats, step=state.step + 1), {"abnormal_share": jnp.mean(margin > 0)}


def labels_table(config: ConfigDict, rows: Sequence[Row], results: Results) -> list[dict[str, Any]]:
    """A line for each unlabelled image: its probability, its pseudo-label and the module that it trains."""
    margin = np.asarray(results["labels"]["stats"]["margin"])
    label, confident = pseudo_labels(margin, config.adapt.percentile, config.adapt.percentile_over)
    for c, word in enumerate(("normal", "abnormal")):
        if (n := int(np.sum((margin > 0) == c))) < 2:
            log(f"warning: labels: {n} unlabelled images are predicted {word}: raise proxy.steps")
    ids, known = [rows[i].id for i in unlabelled(config, rows, results)], unlabeled_labels(config, rows)
    return [
        {
            "id": name,
            "p_abnormal": float(1 / (1 + np.exp(-np.float64(m)))),
            "predicted": int(m > 0),
            "kept": int(k),
            "module": "AB"[c] if k else "",
            "hidden_label": known.get(name, ""),  # only to judge the pseudo-labels by, never to train on
        }
        for name, m, c, k in zip(ids, margin, label, confident, strict=True)
    ]


def pseudo_labels(margin: np.ndarray, percentile: float, over: str = "class") -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-labels of unlabelled images, and which of them are confident enough to train on (section 3).

    The confidence max(softmax) grows with the margin's size, which ranks images alike and does not saturate at 1.

    Args:
        margin: logit abnormal less logit normal of Stage 1 (n,).
        percentile: of the confidence.
        over: how the paper's "top K-th percentile" is read. "class" looks at the images predicted as a class, and takes
            those whose confidence reaches the percentile over them (50: the more confident half, ties included). A
            single image is taken. "all" takes images whose probability of a class reaches the percentile over all
            images, but no image of both classes. At 50 these are the two halves, whatever the anomaly ratio.

    Returns:
        (pseudo-labels, 0 or 1 (n,); True for a confident image (n,)).
    """
    predicted = (margin > 0).astype(np.int64)
    confident = np.zeros(len(margin), bool)
    if over == "all":
        normal, abnormal = (m >= np.percentile(m, percentile) for m in (-margin, margin))
        return np.where(abnormal, 1, 0), normal ^ abnormal
    for c in (0, 1):
        of_class = predicted == c
        if of_class.any():
            confidence = np.abs(margin)
            least = np.percentile(confidence[of_class], percentile) if of_class.sum() > 1 else 0
            confident |= of_class & (confidence >= least)
    return predicted, confident


# --- stages -----------------------------------------------------------------------------------------------------------


def unlabelled(config: ConfigDict, rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of the unlabelled rows. Raises InputError where there is none and the variant needs some."""
    numbers = rows_of(rows, results, splits=("unlabeled",))
    if not len(numbers) and config.variant not in NORMALS_ALONE:
        need = "needs unlabelled images (rows of split 'unlabeled'): add some"
        raise InputError(f"variant {config.variant} {need}, or take --config.variant=stage1")
    return numbers


def pretrain_rows(config: ConfigDict, rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of all rows, the unlabelled ones last; of the normals alone where the variant has one class."""
    if config.variant == "one_class":
        return rows_of(rows, results)
    return np.concatenate([rows_of(rows, results), unlabelled(config, rows, results)])


def pseudo_labelled(config: ConfigDict, rows: Sequence[Row], results: Results, label: int) -> np.ndarray:
    """Numbers of the unlabelled rows with a confident pseudo-label. Raises InputError where no image is abnormal."""
    margin = np.asarray(results["labels"]["stats"]["margin"])
    predicted, confident = pseudo_labels(margin, config.adapt.percentile, config.adapt.percentile_over)
    numbers = unlabelled(config, rows, results)[confident & (predicted == label)]
    if label == 1 and len(numbers) == 0:
        raise InputError(
            "no unlabelled image is predicted abnormal: raise proxy.steps in another --workdir,"
            " with --config.model.weights=THIS_WORKDIR to keep Stage 0; or choose --config.variant=stage1"
        )
    return numbers


def truly(config: ConfigDict, rows: Sequence[Row], results: Results, label: int) -> np.ndarray:
    """Numbers of the unlabelled rows with a hidden label: for the control `b_perfect` alone.

    Raises InputError where a row has none, or no row has this label.
    """
    known, numbers = unlabeled_labels(config, rows), unlabelled(config, rows, results)
    if missing := [rows[i].id for i in numbers if rows[i].id not in known]:
        raise InputError(f"variant b_perfect: {missing[0]} has no hidden label: name them all in data.unlabeled_labels")
    chosen = numbers[[known[rows[i].id] == label for i in numbers]]
    if label == 1 and not len(chosen):
        raise InputError("variant b_perfect: no unlabelled image is abnormal by data.unlabeled_labels")
    return chosen


def rows_a(config: ConfigDict, rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of module A's rows: normals, and the unlabelled images predicted normal."""
    if config.variant == "mask_rec":
        return pretrain_rows(config, rows, results)
    if config.variant in ("no_pseudo", "one_class"):
        return rows_of(rows, results)
    if config.variant == "b_perfect":
        return np.concatenate([rows_of(rows, results), truly(config, rows, results, 0)])
    pseudo_labelled(config, rows, results, 1)  # module B must have rows too: said before module A is trained
    return np.concatenate([rows_of(rows, results), pseudo_labelled(config, rows, results, 0)])


def rows_b(config: ConfigDict, rows: Sequence[Row], results: Results) -> np.ndarray:
    """Numbers of module B's rows: the unlabelled images predicted abnormal."""
    if config.variant == "no_pseudo":
        return unlabelled(config, rows, results)
    if config.variant == "b_normals":
        return rows_of(rows, results)
    if config.variant == "b_perfect":
        return truly(config, rows, results, 1)
    return pseudo_labelled(config, rows, results, 1)


def pace(config: ConfigDict, number: int, rows: Sequence[Row], results: Results) -> float:
    """Twice the share of module A (0) or B (1) in the rows of both: times `adapt.steps` it gives both equal epochs."""
    counts = [len(module(config, rows, results)) for module in (rows_a, rows_b)]
    return 2 * counts[number] / sum(counts)


def adapt_init(training: Training, key: Key[Array, ""], results: Results, n: int) -> State:
    """Stage 0's weights, for modules A and B alike."""
    return begin(results["pretrain"]["params"], training.optimiser)


def reconstruction(networks: Networks, section: ConfigDict) -> Training:
    """The training by Eq. 3 that a section of the recipe describes."""
    config = networks.config
    return training(
        section,
        section.lr * (section.batch / 256 if section.lr_is_base else 1),
        mae_of=networks.mae_of,
        view=partial(view, config, section.augment),
        patch=tuple(config.model.patch),
        masks=section.masks,
        parts=config.accumulate,
    )


def stages(networks: Networks) -> tuple[Stage, ...]:
    """All stages in order. Modules A and B share one step object: one compiled program serves both where they have as
    many steps."""
    config, everyone = networks.config, ("train", "unlabeled")
    seen = ("train",) if config.variant == "one_class" else everyone
    pretrain, proxy, adapt, parts = config.pretrain, config.proxy, config.adapt, config.accumulate
    stage_0, stage_2 = reconstruction(networks, pretrain), reconstruction(networks, adapt)
    paced = adapt.steps and adapt.equal == "epochs" and "module_b" in VARIANTS[config.variant]
    module = partial(
        Stage,
        batch=adapt.batch,
        steps=steps_of(adapt, config.budget),
        init=partial(adapt_init, stage_2),
        step=partial(train_step, stage_2),
        parts=parts,
    )
    return (
        Stage(
            name="pretrain",
            splits=seen,
            rows=partial(pretrain_rows, config),
            batch=pretrain.batch,
            steps=steps_of(pretrain, config.budget),
            init=partial(start, stage_0, networks.mae_init),
            step=partial(train_step, stage_0),
            pretrained=Pretrained(use="instead"),
            parts=parts,
        ),
        Stage(
            name="proxy",
            rows=rows_of,
            batch=proxy.batch,
            steps=steps_of(proxy, config.budget),
            init=partial(proxy_init, networks),
            step=partial(proxy_step, networks),
            host_arrays={"lungs": lung_field},
            words={
                "accuracy": "share of images told from those with a drawn anomaly (0.5 is chance)",
                "lung_fields_found": "share of images with a lung field",
            },
        ),
        Stage(
            name="labels",
            splits=("unlabeled",),
            rows=partial(unlabelled, config),
            batch=proxy.batch,
            steps=lambda n: -(-n // proxy.batch),
            init=labels_init,
            step=partial(labels_step, networks),
            shuffle=False,
            words={"abnormal_share": "share of unlabelled images taken as abnormal"},
            table=partial(labels_table, config),
        ),
        module(
            name="module_a",
            splits=("train",) if config.variant == "no_pseudo" else seen,
            rows=partial(rows_a, config),
            pace=partial(pace, config, 0) if paced else None,
        ),
        module(
            name="module_b",
            splits=("train",) if config.variant == "b_normals" else ("unlabeled",),
            rows=partial(rows_b, config),
            pace=partial(pace, config, 1) if paced else None,
        ),
    )


# --- system -----------------------------------------------------------------------------------------------------------


def home_made(weights: str) -> bool:
    """Whether Stage 0 comes from no file of weights: this run trains it, or the run that `model.weights` names did."""
    if not weights:
        return True
    run = Path(weights)
    return (run / "config.json").is_file() and home_made(recipe.read(run).model.weights)


def primary_of(config: ConfigDict) -> str:
    """The name of the primary score."""
    if residuals.wanted(config):
        return config.evaluation.residual
    if config.evaluation.discrepancy == NAME:
        return NAME
    two = "module_b" in VARIANTS[config.variant]
    return DISCREPANCIES[config.evaluation.discrepancy] if two else config.variant


def build(config: ConfigDict) -> System:
    """The AMAE system that a recipe describes; raises InputError on settings that do not fit together."""
    if config.data.unlabeled_size and config.data.anomaly_ratio < 0:
        raise InputError("data.unlabeled_size goes with data.anomaly_ratio: set that too, or take it back to 0")
    residuals.check(config, config.evaluation.masks)
    names, networks = VARIANTS[config.variant], networks_of(config)
    notes = [HOME_MADE] if home_made(config.model.weights) else []
    if config.variant not in NORMALS_ALONE and (note := ratio_note(config)):
        notes.append(note)
    if config.variant == "b_perfect":
        notes.append("variant b_perfect was trained on the hidden labels: it is a control, no method")
    primary = primary_of(config)
    if primary == RIDGE:
        notes.append(MIXED)
    check_tokens(config, NAME if primary in (SIGNED, RIDGE) else primary)
    own, mixed = own_tokens(networks), partial(mixed_rows, config) if primary == RIDGE else None
    if primary == SIGNED and not own:
        raise InputError(
            f"evaluation.discrepancy={SIGNED} needs evaluation.tokens=position or global, and no variant=b_perfect: "
            "change one of them, or take evaluation.discrepancy=error"
        )
    fits_of = lambda predict: residuals.fits(config, partial(batch_evidence, networks, predict), "masks", "paste")
    system = System(
        name="amae",
        stages=tuple(stage for stage in stages(networks) if stage.name in names),
        uses=tuple(name for name in names if name != "labels"),
        primary=primary,
        map=TOKEN_SCORES["module_b"] if primary == RIDGE else "",
        score=partial(score, networks),
        masks=config.evaluation.masks,
        repetitions="masks",
        averaged=primary
        not in ("stage2", "stage2_nearer", NAME, SIGNED, RIDGE, *residuals.MAPS),  # no means over masks
        fits=fits_of(partial(predicted, networks)),
        notes=tuple(notes),
        words=WORDS | residuals.words(config),
    )
    encoders = {name: networks.mae_of for name in names if name in TOKEN_SCORES}
    view = partial(standardised, config=config)
    tokens = token_fits(config, encoders, view)
    tokens += ridge_fits(config, networks.mae_of, "module_b", view, mixed)
    rivals = token_rivals(config, system, view, networks.mae_init, networks.mae_of, mixed)
    whole = replace(system, fits=(*system.fits, *tokens, *own), rivals=rivals)
    if config.evaluation.residual == "feature":  # only the network has features
        return whole
    name = primary if residuals.wanted(config) else normal_error(config)[1]
    prediction = Prediction(
        predict=partial(predicted, networks),
        view=partial(standardised, config=config),
        patch=tuple(config.model.patch),
        ratio=config.adapt.mask_ratio,
        beside=lambda predict: replace(
            system, primary=name, map=name, score=partial(error_score, networks, predict), fits=fits_of(predict)
        ),
    )
    return replace(whole, prediction=prediction)
