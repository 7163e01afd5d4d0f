"""AMAE: a pre-trained masked autoencoder adapted to normal and unlabelled chest X-rays.

Bozorgtabar, Mahapatra, Thiran, "AMAE: Adaptation of Pre-Trained Masked Autoencoder for Dual-Distribution Anomaly
Detection in Chest X-Rays", MICCAI 2023, arXiv 2307.12721. No official code is known; consulted: medical_mae (weights'
recipe), AnatPaste's code (proxy task and head), DDAD's (protocol). Equation numbers are the paper's.

Stages: `pretrain` (Stage 0, where no weights are given), `proxy` (Stage 1), `labels` (pseudo-labels), `module_a` and
`module_b` (Stage 2). Variants, the paper's comparisons: `stage2` (AMAE), `stage1` (proxy task alone), `no_pseudo`
(module A on the normals, B on all unlabelled images), `mask_rec` (one module on both, reconstruction error), `mae` (not
adapted, reconstruction error).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jmae.anomalies.anatpaste import anatpaste, lung_field
from jmae.data.loader import unlabeled_labels
from jmae.data.manifest import Row
from jmae.data.transforms import moments_of, random_flip, random_resized_crop
from jmae.errors import InputError
from jmae.masking import case_keys, sample_keys
from jmae.nn.transformer import linear
from jmae.optim import accumulated, adamw, warmup_cosine
from jmae.patches import patchify
from jmae.reconstruct import masked_loss, reconstruct
from jmae.run_folder import log
from jmae.sharding import device_gather, device_mean
from jmae.system import Pretrained, Results, Stage, State, System, masked_autoencoder, network, stats_of, steps_of

VARIANTS = {
    "stage2": ("pretrain", "proxy", "labels", "module_a", "module_b"),
    "stage1": ("pretrain", "proxy"),
    "no_pseudo": ("pretrain", "module_a", "module_b"),
    "mask_rec": ("pretrain", "module_a"),
    "mae": ("pretrain",),
}
DISCREPANCIES = {"reconstruction": "stage2", "error": "stage2_error"}


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


def pseudo_labels(margin: np.ndarray, percentile: float, over: str = "class") -> tuple[np.ndarray, np.ndarray]:
    """(pseudo-label, kept) of unlabelled images from Stage 1's margin, logit abnormal less logit normal (section 3).

    The confidence max(softmax) grows with the margin's size, which ranks images alike and does not saturate at 1.
    `over="class"`: of the images predicted as a class, those whose confidence reaches the class's `percentile`-th
    percentile are kept (50: the more confident half, ties included); a class predicted less than twice keeps all.
    `over="all"`: those whose probability of the class reaches the percentile over all images; an image selected for
    both classes is dropped.
    """
    predicted = (margin > 0).astype(np.int64)
    kept = np.zeros(len(margin), bool)
    if over == "all":
        chosen = [m >= np.percentile(m, percentile) for m in (-margin, margin)]
        return np.where(chosen[1], 1, 0), chosen[0] ^ chosen[1]
    for c in (0, 1):
        of = predicted == c
        if of.any():
            confidence = np.abs(margin)
            kept |= of & (confidence >= (np.percentile(confidence[of], percentile) if of.sum() > 1 else 0))
    return predicted, kept


def build(config: ConfigDict) -> System:
    """The AMAE system that a recipe describes; raises InputError on settings that do not fit together."""
    if config.variant not in VARIANTS:
        raise InputError(f"variant {config.variant!r} is unknown: one of {', '.join(VARIANTS)}")
    model, adapt, proxy, evaluation = config.model, config.adapt, config.proxy, config.evaluation
    if evaluation.discrepancy not in DISCREPANCIES:
        raise InputError(f"evaluation.discrepancy is {evaluation.discrepancy!r}: one of {', '.join(DISCREPANCIES)}")
    if config.data.normalise not in ("fixed", "image"):
        raise InputError(f"data.normalise is {config.data.normalise!r}: 'fixed' or 'image'")
    if config.data.normal_crops_only:
        raise InputError("amae trains on whole images: take abnormal rows out of train and data.normal_crops_only back")
    if adapt.percentile_over not in ("class", "all"):
        raise InputError(f"adapt.percentile_over is {adapt.percentile_over!r}: 'class' or 'all'")
    if not 0 <= adapt.percentile < 100:
        raise InputError(f"adapt.percentile is {adapt.percentile}: from 0 to below 100")
    if min(config.pretrain.masks, adapt.masks, evaluation.masks) < 1 or config.budget <= 0:
        raise InputError("pretrain.masks, adapt.masks and evaluation.masks are 1 or more, and budget is above 0")
    if config.data.unlabeled_size and config.data.anomaly_ratio < 0:
        raise InputError("data.unlabeled_size goes with data.anomaly_ratio: set that too, or take it back to 0")
    names = VARIANTS[config.variant]
    patch, ratio, parts = tuple(model.patch), adapt.mask_ratio, config.get("accumulate", 1)
    mae_init, mae_of = masked_autoencoder(config, model.channels)
    head_init, head_of = network(lambda rngs: Head(model.width, tuple(proxy.head), rngs=rngs))

    def normalise(image: Float[Array, "b *size c"], whole: Array | None = None) -> Float[Array, "b *size c"]:
        """[0, 1] to the network's range; one channel is repeated to as many as the network has. Where each image has
        its own moments, those of a crop are its whole image's."""
        mean, std = moments_of(image if whole is None else whole, config.data)
        return jnp.broadcast_to((image - mean) / std, (*image.shape[:-1], model.channels))

    def augment(image: Array, keys: Array) -> Array:
        """Random resized crop and horizontal flip, as medical_mae's pre-training (spec sections 3 and 6)."""
        crop, flip = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        image = jax.vmap(partial(random_resized_crop, scale=tuple(config.data.crop_scale)))(image, crop)
        return jax.vmap(partial(random_flip, axes=(image.ndim - 3,)))(image, flip)

    # --- loss: masked reconstruction (Stages 0 and 2) ------------------------------------------------------------

    def reconstruction(section: ConfigDict):
        """(init, step) of a MAE trained by Eq. 3 from `start(key, results)`."""
        optimiser = lambda lr: adamw(lr, betas=tuple(section.betas), decay=section.decay)
        lr = section.lr * (section.batch / 256 if section.lr_is_base else 1)

        def init(start, key, results, n):
            params = start(key, results)
            return State(params=params, opt=optimiser(0.0).init(params), stats={}, step=jnp.int32(0))

        def loss(params, image, keys):
            return masked_loss(mae_of(params), image, keys, patch=patch, ratio=section.mask_ratio, masks=section.masks)

        def step(state, batch, key, results, *, steps):
            schedule = warmup_cosine(lr, warmup=section.warmup * steps, steps=steps, least=section.lr_least)
            mask, view = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(key, batch["index"])), 1, 0)
            # Crops come before one channel is repeated. Their weights add up to 1, so the order changes rounding alone.
            image = augment(batch["image"], view) if section.augment else batch["image"]
            image = normalise(image, batch["image"])
            found = accumulated(loss, parts)(state.params, image, mask)
            value, grads = device_mean(found)
            updates, opt = optimiser(schedule(state.step)).update(grads, state.opt, state.params)
            metrics = {"loss": value, "lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
            params = optax.apply_updates(state.params, updates)
            return state.replace(params=params, opt=opt, step=state.step + 1), metrics

        return init, step

    def unlabelled(rows: Sequence[Row]) -> np.ndarray:
        chosen = [i for i, row in enumerate(rows) if row.split == "unlabeled"]
        if not chosen and config.variant not in ("stage1", "mae"):
            raise InputError(f"variant {config.variant} needs rows of split 'unlabeled': or take variant=stage1")
        return np.array(chosen, np.int64)

    def normals(rows: Sequence[Row]) -> np.ndarray:
        return np.array([i for i, row in enumerate(rows) if row.split == "train"], np.int64)

    def pseudo_labelled(rows: Sequence[Row], results: Results, label: int) -> np.ndarray:
        margin = np.asarray(results["labels"]["stats"]["margin"])
        predicted, kept = pseudo_labels(margin, adapt.percentile, adapt.percentile_over)
        chosen = unlabelled(rows)[kept & (predicted == label)]
        if label == 1 and len(chosen) == 0:
            raise InputError(
                "no unlabelled image is predicted abnormal: raise proxy.steps in another --workdir,"
                " with --config.model.weights=THIS_WORKDIR to keep Stage 0; or choose --config.variant=stage1"
            )
        return chosen

    def rows_a(rows, results):
        if config.variant == "mask_rec":
            return np.concatenate([normals(rows), unlabelled(rows)])
        if config.variant == "no_pseudo":
            return normals(rows)
        pseudo_labelled(rows, results, 1)  # module B must have rows too: said before module A is trained
        return np.concatenate([normals(rows), pseudo_labelled(rows, results, 0)])

    def rows_b(rows, results):
        return unlabelled(rows) if config.variant == "no_pseudo" else pseudo_labelled(rows, results, 1)

    # --- Stage 1: the proxy task -----------------------------------------------------------------------------------

    def features(params, image: Float[Array, "b *size c"]) -> Float[Array, "b d"]:
        """Mean over all patch tokens of the frozen encoder, its final norm applied, without the class token."""
        mae = mae_of(params)
        return jnp.mean(mae.encode(mae.embed(patchify(normalise(image), patch)))[:, 1:].astype(jnp.float32), axis=1)

    def proxy_init(key, results, n):
        params, stats = head_init(key)
        opt = adamw(0.0, betas=tuple(proxy.betas), decay=proxy.decay).init(params)
        return State(params=params, opt=opt, stats=stats, step=jnp.int32(0))

    def proxy_step(state, batch, key, results, *, steps):
        schedule = warmup_cosine(proxy.lr, warmup=proxy.warmup * steps, steps=steps, least=proxy.lr_least)
        paste = partial(
            anatpaste,
            area=tuple(proxy.area),
            aspect=tuple(proxy.aspect),
            fill=tuple(proxy.fill),
            blur=tuple(proxy.blur),
            margin=proxy.margin,
            jitter=proxy.jitter,
        )
        # ours: no colour jitter of the whole image before the paste (AnatPaste's step 1): Eq. 2's normals have none,
        # and jitter on one side alone would be the easier thing to tell.
        pasted, _, _ = jax.vmap(lambda image, lungs, key: paste(image, image, key, lungs=lungs))(
            batch["image"], batch["lungs"], sample_keys(key, batch["index"])
        )
        both = jnp.stack([batch["image"], pasted], 1).reshape(-1, *pasted.shape[1:])  # a device has both of its own
        x = jax.lax.stop_gradient(features(results["pretrain"]["params"], both))
        target = jnp.tile(jnp.arange(2), len(pasted))

        def loss(params):  # Eq. 2: the two terms, each a mean over the batch
            head = head_of(params, state.stats)
            logits = head(x, train=True)
            terms = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return 2 * jnp.mean(terms), (stats_of(head), jnp.mean(jnp.argmax(logits, 1) == target))

        (value, (stats, accuracy)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        value, grads, stats, accuracy = device_mean((value, grads, stats, accuracy))
        optimiser = adamw(schedule(state.step), betas=tuple(proxy.betas), decay=proxy.decay)
        updates, opt = optimiser.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": value,
            "accuracy": accuracy,
            "lung_fields_found": device_mean(jnp.mean(~jnp.all(batch["lungs"], (1, 2)))),
            "lr": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
        }
        return State(params=params, opt=opt, stats=stats, step=state.step + 1), metrics

    def margin_of(results, image) -> Float[Array, " b"]:
        """Logit abnormal less logit normal of h_0(f_0(x)); its sigmoid is Stage 1's score softmax(h_0(f_0(x)))_1."""
        head = head_of(results["proxy"]["params"], results["proxy"]["stats"])
        logits = head(features(results["pretrain"]["params"], image), train=False)
        return logits[:, 1] - logits[:, 0]

    # --- the pseudo-labels: one sweep over the unlabelled images ---------------------------------------------------

    def labels_init(key, results, n):
        return State(params={}, opt={}, stats={"margin": jnp.zeros(n)}, step=jnp.int32(0))

    def labels_step(state, batch, key, results, *, steps):
        index, margin = batch["index"], margin_of(results, batch["image"])
        index, margin = device_gather((index, margin))
        stats = {"margin": state.stats["margin"].at[index].set(margin)}
        return state.replace(stats=stats, step=state.step + 1), {"abnormal_share": jnp.mean(margin > 0)}

    def labels_table(rows, results):
        margin = np.asarray(results["labels"]["stats"]["margin"])
        label, kept = pseudo_labels(margin, adapt.percentile, adapt.percentile_over)
        for c, word in enumerate(("normal", "abnormal")):
            if (n := int(np.sum((margin > 0) == c))) < 2:
                log(f"warning: labels: {n} unlabelled images are predicted {word}: raise proxy.steps")
        ids, known = [rows[i].id for i in unlabelled(rows)], unlabeled_labels(config, rows)
        return [
            {
                "id": name,
                "p_abnormal": float(1 / (1 + np.exp(-np.float64(m)))),
                "predicted": int(m > 0),
                "kept": int(k),
                "module": "AB"[c] if k else "",
                "hidden_label": known.get(name, ""),  # where given: to judge the pseudo-labels by, never to train on
            }
            for name, m, c, k in zip(ids, margin, label, kept, strict=True)
        ]

    # --- score (Eq. 4) -----------------------------------------------------------------------------------------------

    def score(results, batch, key, *, chunk=None):
        keys, image = case_keys(key, batch["case"]), normalise(batch["image"])
        view = partial(
            reconstruct,
            image=image,
            keys=keys,
            patch=patch,
            ratio=ratio,
            masks=evaluation.masks,
            paste=evaluation.paste,
            chunk=chunk,
        )
        passes = {
            name: view(mae_of(results[name]["params"]))
            for name in names
            if name in ("pretrain", "module_a", "module_b")
        }
        maps = {"mae": jnp.mean(passes["pretrain"].error, axis=-1)}
        if "module_b" in passes:
            a, b = passes["module_a"], passes["module_b"]
            maps["stage2"] = jnp.mean(jnp.abs(a.mean - b.mean), axis=-1)  # Eq. 4
            # ours: by how much B, which saw anomalies, explains the hidden patches better than A. Eq. 4 has no sign: it
            # grows as well where A is the better one, on normals; short training shows it (benchmarks/results).
            maps["stage2_error"] = jnp.mean(a.error - b.error, axis=-1)
        if "module_a" in passes:
            # The paper's Mask Rec. where the module was trained on both sets, else module A's reconstruction error.
            name = "mask_rec" if config.variant == "mask_rec" else "module_a"
            maps[name] = jnp.mean(passes["module_a"].error, axis=-1)
        scores = {name: jnp.mean(m, axis=tuple(range(1, m.ndim))) for name, m in maps.items()}
        if "proxy" in names:
            scores["stage1"] = jax.nn.sigmoid(margin_of(results, batch["image"]))
        mean, std = moments_of(batch["image"], config.data)
        normal = passes["module_a" if "module_a" in passes else "pretrain"].mean  # what normal anatomy would look like
        if batch["image"].shape[-1] != model.channels:
            normal = jnp.mean(normal, axis=-1, keepdims=True)
        return {"maps": maps, "scores": scores, "reconstruction": normal * std + mean}

    def everything(rows, results):
        return np.concatenate([normals(rows), unlabelled(rows)])

    adapted = lambda key, results: results["pretrain"]["params"]
    fresh = lambda key, results: mae_init(key)[0]
    pretrain_init, pretrain_step = reconstruction(config.pretrain)
    adapt_init, adapt_step = reconstruction(adapt)  # one function for both modules: one compiled program
    pretrain_steps, proxy_steps, adapt_steps = (steps_of(c, config.budget) for c in (config.pretrain, proxy, adapt))
    init_a = partial(adapt_init, adapted)
    normal_rows, unlabelled_rows = (lambda rows, results: normals(rows)), (lambda rows, results: unlabelled(rows))
    sweep = lambda n: -(-n // proxy.batch)
    lungs = {"lungs": lung_field}
    everyone, unknown = ("train", "unlabeled"), ("unlabeled",)
    stages = (
        Stage(
            name="pretrain",
            splits=everyone,
            rows=everything,
            batch=config.pretrain.batch,
            steps=pretrain_steps,
            init=partial(pretrain_init, fresh),
            step=pretrain_step,
            pretrained=Pretrained(use="instead"),
            parts=parts,
        ),
        Stage(
            name="proxy",
            rows=normal_rows,
            batch=proxy.batch,
            steps=proxy_steps,
            init=proxy_init,
            step=proxy_step,
            host_arrays=lungs,
        ),
        Stage(
            name="labels",
            splits=unknown,
            rows=unlabelled_rows,
            batch=proxy.batch,
            steps=sweep,
            init=labels_init,
            step=labels_step,
            shuffle=False,
            table=labels_table,
        ),
        Stage(
            name="module_a",
            splits=("train",) if config.variant == "no_pseudo" else everyone,
            rows=rows_a,
            batch=adapt.batch,
            steps=adapt_steps,
            init=init_a,
            step=adapt_step,
            parts=parts,
        ),
        Stage(
            name="module_b",
            splits=unknown,
            rows=rows_b,
            batch=adapt.batch,
            steps=adapt_steps,
            init=init_a,
            step=adapt_step,
            parts=parts,
        ),
    )
    primary = DISCREPANCIES[evaluation.discrepancy] if "module_b" in names else config.variant
    return System(
        name="amae",
        stages=tuple(stage for stage in stages if stage.name in names),
        uses=tuple(name for name in names if name != "labels"),
        primary=primary,
        score=score,
        masks=evaluation.masks,
        repetitions="masks",
        averaged=primary != "stage2",  # a difference of means
    )
