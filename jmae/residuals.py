"""Further scores of a reconstruction (ours): what is measured between an image and its reconstruction, and divided by
what normal images have there. All systems with a masked autoencoder use it, in 2D and 3D.

For each voxel p, the masks that hide p give the mean d_p and the variance v_p of prediction less image. So no pasted
value takes part. `evaluation.residual` names the measure r of a voxel and channel:

- smoothed: (G d)^2 with a Gaussian G of `evaluation.smooth` patch edges, 0.25 of each edge. It is the same length in mm
  in all volumes where the recipe sets `data.spacing`.
- ssim: the mean of 1 - SSIM over three Gaussian windows, of the image and of image + d on [0, 1].
- mahalanobis: d^2 / (v + 0.05 mean of v).
- feature: the mean over encoder blocks at a quarter, half and three quarters of the depth of the distance between the
  tokens of the image and of image + d. In volumes the prediction under each mask takes the place of image + d.

`evaluation.expect` divides r by its mean in normals that were not trained on, half of those of `val` (`FIT`):

- position: e = G_1 * (mean of r over the normals) + 0.05 (mean of that), for images that are aligned. Channels are
  averaged first.
- appearance: the mean of r among the normals' voxels of the same bin. There are 16 x 16 bins, of the predicted value
  and of its local deviation. 50 voxels shrink a bin to the mean over all bins. Each channel is divided on its own,
  then all are averaged.

A case's score is the mean of the map, the mean of its highest share, or the size of its largest connected part
(`evaluation.case_score`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from jmae.errors import InputError
from jmae.nn.mae import MAE
from jmae.patches import grid_of, patchify
from jmae.recipe import is_volume
from jmae.scoring import case_score_words
from jmae.system import Fit, Results, fitting_normals
from jmae.tokens import token_features

MAPS = {
    "smoothed": "squared reconstruction error, smoothed before it is squared",
    "ssim": "lack of structural similarity between image and reconstruction",
    "mahalanobis": "reconstruction error over the spread of the reconstructions",
    "feature": "distance between the features of image and reconstruction",
}
DIVIDED = {
    "none": "",
    "position": ", divided by its mean in held-out normals at the same place",
    "appearance": ", divided by its mean in held-out normals where the reconstruction looks alike",
}
SETTINGS = ("residual", "smooth", "expect", "masks_of")  # that a fit depends on; a system adds its own

FIT = "expected"
BINS = 16  # of the predicted value, and of its local deviation
PSEUDO = 50  # voxels with the mean over all bins that are added to each bin
FLOOR = 0.05  # share of the mean that is added to an expectation or a variance
WINDOWS = (1.5, 3.0, 6.0)  # deviations of SSIM's windows, voxels
TINY = 1e-12


class Evidence(NamedTuple):
    """What the masks that hide a voxel say of it."""

    image: Float[Array, "b *size c"]  # as the network sees it
    residual: Float[Array, "b *size c"]  # mean of prediction less image; 0 where no mask hides the voxel
    variance: Float[Array, "b *size c"]  # of the predictions
    black: Float[Array, "b c"]  # value of black
    span: Float[Array, "b c"]  # from black to white
    size: tuple[Any, ...]  # true size of the images; beyond it they are filled up
    features: Float[Array, " b *size"] | None = None  # the measure "feature"


def wanted(config: ConfigDict) -> bool:
    """Whether the recipe asks for a further score."""
    return config.evaluation.residual != "none"


def check(config: ConfigDict, masks: int) -> None:
    """Raises InputError on settings of this module that do not fit together. `masks` is the number of masks or
    sweeps."""
    e = config.evaluation
    if not wanted(config):
        if e.expect != "none":
            raise InputError(f"evaluation.expect={e.expect} divides evaluation.residual: set that too, as smoothed")
        return
    if e.expect == "position" and is_volume(config):
        raise InputError("evaluation.expect=position: volumes are not aligned: take evaluation.expect=appearance")
    if e.residual == "mahalanobis" and masks < 3:
        raise InputError(f"evaluation.residual=mahalanobis needs a spread over masks: {masks} are too few, take 4")
    if e.residual == "mahalanobis" and e.convergence:
        raise InputError("evaluation.convergence scores with one mask, too few for mahalanobis: set it to 0")
    if e.expect != "none" and config.select == "aucp":
        raise InputError("select=aucp: evaluation.expect is fitted after the training: take select=last or expect=none")
    if e.case_score == "part" and config.select == "aucp":
        raise InputError("select=aucp ranks by a score on the device: set evaluation.case_score to mean or top")


def words(config: ConfigDict) -> dict[str, str]:
    """What the score `evaluation.residual` is, in plain words; {} where it is "none"."""
    e = config.evaluation
    if not wanted(config):
        return {}
    how = case_score_words(e.case_score, share=e.top, above=e.part_above)
    return {e.residual: f"{how}; the map is the {MAPS[e.residual]}{DIVIDED[e.expect]}"}


# --- evidence ---------------------------------------------------------------------------------------------------------


def under_mask(
    image: Float[Array, "b *size c"], made: Float[Array, "b *size c"], hidden: Bool[Array, " b *size"]
) -> dict[str, Array]:
    """What one mask adds to the evidence: the `measure` of `reconstruct`."""
    share, difference = hidden[..., None].astype(jnp.float32), made - image
    return {"share": share, "residual": share * difference, "square": share * difference**2}


def evidence(
    image: Float[Array, "b *size c"],
    found: Mapping[str, Array],
    black: Float[Array, "b c"],
    span: Float[Array, "b c"],
    mae: MAE | None = None,
    patch: tuple[int, ...] = (),
) -> Evidence:
    """The evidence of images from the means of `under_mask` over masks. With a network, its features too."""
    mean, variance = moments(found["share"], found["residual"], found["square"])
    features = None if mae is None else features_apart(mae, image, image + mean, patch)
    return Evidence(image, mean, variance, black, span, image.shape[1:-1], features)


def moments(share: Array, residual: Array, square: Array) -> tuple[Array, Array]:
    """(mean, variance) over the masks that hide a voxel."""
    count = jnp.where(share > TINY, share, 1)
    mean = residual / count
    return mean, jnp.maximum(square / count - mean**2, 0)


def window_values(image: Float[Array, "b *size c"], found: Mapping[str, Array]) -> Float[Array, "b *size k"]:
    """The values that are averaged over the windows of a volume: the parts of `volume_evidence`."""
    prediction = found["residual"] + found["share"] * image
    return jnp.concatenate([found["share"], found["residual"], found["square"], prediction], -1)


def volume_evidence(
    config: ConfigDict, averages: Float[Array, "b *size k"], inside: Bool[Array, " b *size"]
) -> Evidence:
    """The evidence of volumes from the averages of `window_values`, and of the features behind them."""
    c, (low, high) = config.data.channels, config.data.clip
    parts = jnp.split(averages, [1, 1 + c, 1 + 2 * c, 1 + 3 * c], -1)
    mean, variance = moments(*parts[:3])
    prediction = parts[3] / jnp.where(parts[0] > TINY, parts[0], 1)
    axes = range(1, inside.ndim)
    size = tuple(jnp.sum(jnp.any(inside, tuple(a for a in (0, *axes) if a != axis))) for axis in axes)
    black, span = (jnp.full((len(averages), c), value, jnp.float32) for value in (low, high - low))
    features = parts[4][..., 0] if config.evaluation.residual == "feature" else None
    return Evidence(prediction - mean, mean, variance, black, span, size, features)


def features_apart(
    mae: MAE, image: Float[Array, "b *size c"], made: Float[Array, "b *size c"], patch: tuple[int, ...]
) -> Float[Array, " b *size"]:
    """The distance between the tokens of two images in the encoder, the mean over three blocks, at each voxel."""
    depth, size = mae.encoder.depth, image.shape[1:-1]
    grid = grid_of(size, patch)
    positions = np.arange(int(np.prod(grid)))
    layers = sorted({max(1, -(-depth * quarters // 4)) for quarters in (1, 2, 3)})

    def apart(layer: int) -> Array:
        a, b = (token_features(mae, patchify(x, patch), positions, layer) for x in (image, made))
        return jnp.linalg.norm(a - b, axis=-1)

    mean = jnp.mean(jnp.stack([apart(layer) for layer in layers]), 0)
    return jax.image.resize(mean.reshape(-1, *grid), (len(image), *size), "linear")


# --- measures ---------------------------------------------------------------------------------------------------------


def smooth(
    image: Float[Array, "b *size c"], sigma: Sequence[float], size: Sequence[Any] = ()
) -> Float[Array, "b *size c"]:
    """`scipy.ndimage.gaussian_filter` of each channel, with its mirrored border ("reflect").

    Args:
        sigma: deviation along each axis, voxels; 0 leaves an axis as it is.
        size: true size of the images, which may be filled up beyond it; traced numbers are allowed. (): their shape.
    """
    for axis, (deviation, n) in enumerate(zip(sigma, size or image.shape[1:-1], strict=True), 1):
        radius = int(4 * deviation + 0.5)
        if not radius:
            continue
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
        taps, length = jnp.asarray(weights / weights.sum(), jnp.float32), image.shape[axis]
        place = jnp.mod(jnp.arange(-radius, length + radius), 2 * n)
        padded = jnp.take(image, jnp.where(place < n, place, 2 * n - 1 - place), axis)

        def add(k: Array, total: Array, padded: Array = padded, taps: Array = taps, axis: int = axis) -> Array:
            return total + taps[k] * jax.lax.dynamic_slice_in_dim(padded, k, total.shape[axis], axis)

        image = jax.lax.fori_loop(0, len(weights), add, jnp.zeros_like(image))
    return image


def sigma_of(config: ConfigDict) -> tuple[float, ...]:
    """The deviation of G along each axis, voxels."""
    return tuple(config.evaluation.smooth * edge for edge in config.model.patch)


def over_voxels(values: Float[Array, " b *c"], like: Array) -> Array:
    """Values of images, or of their channels, with an axis of length 1 for each axis of voxels of `like`."""
    return values.reshape(len(values), *[1] * (like.ndim - 2), -1)


def measured(config: ConfigDict, of: Evidence) -> Float[Array, "b *size k"]:
    """The measure r of each voxel and channel; of features there is one channel."""
    name, d = config.evaluation.residual, of.residual
    if name == "smoothed":
        return smooth(d, sigma_of(config), of.size) ** 2
    if name == "ssim":
        unit = lambda x: (x - over_voxels(of.black, x)) / over_voxels(of.span, x)
        return dissimilar(unit(of.image), unit(of.image + d), of.size)
    if name == "mahalanobis":
        least = jnp.mean(of.variance, tuple(range(1, d.ndim)), keepdims=True)
        return d**2 / (of.variance + FLOOR * least + TINY)
    assert of.features is not None
    return of.features[..., None]


def dissimilar(x: Float[Array, "b *size c"], y: Float[Array, "b *size c"], size: Sequence[Any]) -> Array:
    """The mean over windows of 1 - SSIM of two images on [0, 1], at each voxel and channel."""

    def one(sigma: float) -> Array:
        mean = lambda values: smooth(values, [sigma] * (x.ndim - 2), size)
        a, b = mean(x), mean(y)
        va, vb, cov = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
        return (2 * a * b + 1e-4) * (2 * cov + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))

    return 1 - jnp.mean(jnp.stack([one(sigma) for sigma in WINDOWS]), 0)


# --- expectations -----------------------------------------------------------------------------------------------------


def bins_of(config: ConfigDict, of: Evidence) -> Array:
    """The number of the bin of each voxel and channel, by the predicted value and its local deviation."""
    sigma = tuple(max(s, edge / 4) for s, edge in zip(sigma_of(config), config.model.patch, strict=True))
    mu = of.image + of.residual
    unit = (mu - over_voxels(of.black, mu)) / over_voxels(of.span, mu)
    mean = smooth(unit, sigma, of.size)
    deviation = jnp.sqrt(jnp.maximum(smooth((unit - mean) ** 2, sigma, of.size), 0))
    index = lambda share: jnp.clip(jnp.floor(BINS * share), 0, BINS - 1).astype(jnp.int32)
    return index(unit) * BINS + index(jnp.sqrt(4 * deviation))  # a quarter of the span and more is the last bin


def sums_of(config: ConfigDict, of: Evidence, inside: Bool[Array, " b *size"] | None = None) -> dict[str, Array]:
    """What a fit measures in images: r itself ("position"), or its sums and counts in each bin ("appearance").

    The sums of large volumes are those of slabs along the first axis. One float32 sum of 10^7 numbers is several per
    cent off.
    """
    r = measured(config, of)
    if config.evaluation.expect == "position":
        return {"r": jnp.mean(r, -1)}
    bins = bins_of(config, of)[..., : r.shape[-1]]
    counted = jnp.ones(r.shape[:-1], bool) if inside is None else inside.astype(bool)

    def one(r: Array, bins: Array, counted: Array) -> tuple[Array, Array]:
        def add(values: Array, bins: Array) -> Array:
            slabs = jnp.zeros((len(values), BINS**2), values.dtype)
            rows = jnp.arange(len(values))[:, None]
            return slabs.at[rows, bins.reshape(len(bins), -1)].add(values.reshape(len(values), -1)).sum(0)

        each, used = jax.vmap(add, (-1, -1)), jnp.broadcast_to(counted[..., None], r.shape)
        return each(jnp.where(used, r, 0), bins), each(used.astype(jnp.int32), bins)

    total, count = jax.vmap(one)(r, bins, counted)
    return {"total": total, "count": count}


def finished(config: ConfigDict, arrays: Mapping[str, np.ndarray], key: Array) -> dict[str, Array]:
    """The expectation e, from the sums of all normals: of each pixel, or of each channel and bin."""
    if config.evaluation.expect == "position":
        mean = jnp.mean(jnp.asarray(arrays["r"]), 0)
        return {"e": smooth(mean[None, ..., None], [1.0] * mean.ndim)[0, ..., 0] + FLOOR * jnp.mean(mean)}
    total, count = (np.sum(arrays[name], 0, dtype=np.float64) for name in ("total", "count"))
    overall = total.sum(1, keepdims=True) / np.maximum(count.sum(1, keepdims=True), 1)
    return {"e": jnp.asarray((total + PSEUDO * overall) / (count + PSEUDO), jnp.float32)}


def anomaly_map(config: ConfigDict, of: Evidence, results: Results) -> Float[Array, " b *size"]:
    """The map of `evaluation.residual`, divided by what the normals lead to expect."""
    r, expect = measured(config, of), config.evaluation.expect
    if expect == "none":
        return jnp.mean(r, -1)
    e = results[FIT]["e"]
    if expect == "position":
        return jnp.mean(r, -1) / (e[None] + TINY)
    bins = bins_of(config, of)[..., : r.shape[-1]]
    expected = jnp.stack([e[k][bins[..., k]] for k in range(r.shape[-1])], -1)
    return jnp.mean(r / (expected + TINY), -1)


def fits(config: ConfigDict, evidence_of: Callable[[Results, Any, Array], Evidence], *further: str) -> tuple[Fit, ...]:
    """The fits that the recipe asks for. `evidence_of` gives the evidence of a batch of `Fit.measure`. `further` are
    the settings of the system that it depends on."""
    if config.evaluation.expect == "none":
        return ()
    measure = lambda results, batch, key: sums_of(config, evidence_of(results, batch, key), batch.get("inside"))
    return (
        Fit(
            name=FIT,
            rows=fitting_normals,
            measure=measure,
            finish=lambda arrays, key, rows: finished(config, arrays, key),
            settings=(*SETTINGS, *further),
            needs="give the manifest normals of val, or train with --config.data.calibration=0.2",
        ),
    )


def device_score(config: ConfigDict, maps: Float[Array, " b *size"]) -> dict[str, Array]:
    """{name: score} of the maps of images, on the device. Empty for parts, which the host looks for
    (`scoring.case_score`)."""
    rule, flat = config.evaluation.case_score, maps.reshape(len(maps), -1)
    if rule == "part":
        return {}
    k = flat.shape[1] if rule == "mean" else max(1, round(config.evaluation.top * flat.shape[1]))
    return {config.evaluation.residual: jnp.mean(flat if rule == "mean" else jax.lax.top_k(flat, k)[0], 1)}
