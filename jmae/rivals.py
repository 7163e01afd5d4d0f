"""Rivals of a network: closed-form predictors of hidden patches, scored as the network is.

A predictor is a pure function (parameters, patches (b, n, v), keep (m, k), restore (m, n)) -> predictions (b, m, n, v).
It predicts all patches of b images from the patches that each of m masks shows. The images share the masks; `keep` and
`restore` are those of `masking.order_of`. A masked autoencoder is one predictor. A network that is not better than
these rivals under its own score has added nothing to that score.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jmae.masking import hidden
from jmae.patches import patchify, unpatchify

COMPONENTS = 80  # principal components, at most; half of the rank where that is less
NEIGHBOURS = 5
SIGMAS = 16  # the deviation of the blur is this part of the image's size: 4 pixels of 64
FAINT = 1e-6  # weight of the mean of all visible pixels in a blur: it counts only where no visible pixel is near
NORMALS, VALUES = 1024, 2**27  # normals that rivals are fitted to, and their values, at most (512 MiB of float32)

_einsum = partial(jnp.einsum, precision="highest")


def shown(keep: Int[Array, "m k"], restore: Int[Array, "m n"]) -> Float[Array, "m n"]:
    """1 where a mask shows a patch, 0 where it hides the patch."""
    return 1.0 - hidden(restore, keep.shape[1]).astype(jnp.float32)


# --- principal components ---------------------------------------------------------------------------------------------


class Components(NamedTuple):
    """Probabilistic principal components of images in patches (Tipping & Bishop 1999).

    The images are N(mean, V diag(l - s) V' + s I): `basis` is V, q orthonormal columns, l are the variances along them,
    and s is the mean variance along all other directions.
    """

    mean: Float[Array, "n v"]
    basis: Float[Array, "n v q"]
    grams: Float[Array, "n q q"]  # V_i' V_i of each patch i
    ridge: Float[Array, " q"]  # s / (l - s)


def components_of(normals: Float[Array, "j n v"], most: int = COMPONENTS) -> Components | None:
    """At most `most` components of normal images, by their Gram matrix; None where not even one can be fitted.

    At least half of the directions in which the images differ are left to the residual variance.
    """
    mean = jnp.mean(normals, 0)
    flat = (normals - mean[None]).reshape(len(normals), -1)
    values, vectors = np.linalg.eigh(np.asarray(_einsum("id,jd->ij", flat, flat), np.float64))
    values, vectors = values[::-1], vectors[:, ::-1]
    q = min(most, int((values > 1e-6 * values[0]).sum()) // 2)
    if not q:
        return None
    variances = values / len(flat)
    rest = max(variances[q:].sum(), 0.0) / (flat.shape[1] - q)
    basis = _einsum("jd,jq->dq", flat, jnp.asarray(vectors[:, :q] / np.sqrt(values[:q]), jnp.float32))
    basis = basis.reshape(*normals.shape[1:], q)
    ridge = rest / np.maximum(variances[:q] - rest, 1e-6 * variances[:q])
    return Components(mean, basis, _einsum("nvq,nvr->nqr", basis, basis), jnp.asarray(ridge, jnp.float32))


def conditional_mean(
    fitted: Components, patches: Float[Array, "b n v"], keep: Int[Array, "m k"], restore: Int[Array, "m n"]
) -> Float[Array, "b m n v"]:
    """The mean of all patches given the visible ones, mean + V z, with
    z = (V_o' V_o + diag(s / (l - s)))^-1 V_o' (x_o - mean_o) over the visible values o: one small system a mask."""
    visible = shown(keep, restore)
    code = _einsum("mn,bnq->mqb", visible, _einsum("bnv,nvq->bnq", patches - fitted.mean[None], fitted.basis))
    system = _einsum("mn,nqr->mqr", visible, fitted.grams) + jnp.diag(fitted.ridge)[None]
    z = solved(system, code)
    return fitted.mean[None, None] + _einsum("mqb,nvq->bmnv", z, fitted.basis)


def solved(system: Float[Array, "m q q"], right: Float[Array, "m q b"]) -> Float[Array, "m q b"]:
    """The solutions of symmetric positive definite systems, by Gauss and Jordan's elimination. (LAPACK's kernels wait
    for each other's threads for ever where a process has several CPU devices.)"""

    def eliminate(i: Array, both: Array) -> Array:
        row = both[:, i] / both[:, i, i][:, None]
        return (both - both[:, :, i][:, :, None] * row[:, None]).at[:, i].set(row)

    q = system.shape[-1]
    return jax.lax.fori_loop(0, q, eliminate, jnp.concatenate([system, right], -1))[..., q:]


# --- blur, nearest normals --------------------------------------------------------------------------------------------


def blurred(
    patches: Float[Array, "b n v"],
    keep: Int[Array, "m k"],
    restore: Int[Array, "m n"],
    *,
    size: tuple[int, ...],
    patch: tuple[int, ...],
) -> Float[Array, "b m n v"]:
    """The mean of the visible pixels, weighted by a Gaussian around each pixel. Its deviation is an axis' 16th part."""
    visible = shown(keep, restore)
    weight = unpatchify(jnp.repeat(visible[..., None], prod(patch), -1), size, patch)[None]
    image = unpatchify(patches, size, patch)[:, None] * weight
    axes = tuple(range(2, image.ndim - 1))
    average = jnp.sum(image, axes, keepdims=True) / jnp.sum(weight, axes, keepdims=True)
    mean = (_smooth(image, size) + FAINT * average) / (_smooth(weight, size) + FAINT)
    tokens = patchify(mean.reshape(-1, *image.shape[2:]), patch)
    return tokens.reshape(len(patches), len(keep), *patches.shape[1:])


def _smooth(image: Float[Array, "b m *size c"], size: tuple[int, ...]) -> Float[Array, "b m *size c"]:
    """A Gaussian filter of every axis; there is nothing beyond the border."""
    for axis, n in enumerate(size, 2):
        sigma = n / SIGMAS
        away = np.subtract.outer(np.arange(n), np.arange(n)) / sigma
        whole = np.exp(-((np.arange(1 - n, n) / sigma) ** 2) / 2).sum()
        kernel = jnp.asarray(np.exp(-(away**2) / 2) / whole, jnp.float32)
        image = jnp.moveaxis(jnp.tensordot(image, kernel, (axis, 0), precision="highest"), -1, axis)
    return image


def nearest_mean(
    normals: Float[Array, "j n v"],
    patches: Float[Array, "b n v"],
    keep: Int[Array, "m k"],
    restore: Int[Array, "m n"],
    *,
    neighbours: int = NEIGHBOURS,
) -> Float[Array, "b m n v"]:
    """The mean of the normal images that are nearest to an image in its visible patches, by Euclidean distance."""
    mean = jnp.mean(normals, 0)[None]
    known, new = normals - mean, patches - mean  # smaller numbers: no cancellation in the squares
    squares = jnp.sum(known**2, -1)[None] + jnp.sum(new**2, -1)[:, None] - 2 * _einsum("bnv,jnv->bjn", new, known)
    away = _einsum("mn,bjn->bmj", shown(keep, restore), squares)
    neighbours = min(neighbours, len(normals))
    nearest = jax.lax.top_k(-away, neighbours)[1]
    return reduce(jnp.add, [normals[nearest[..., i]] for i in range(neighbours)]) / neighbours


# --- all of them ------------------------------------------------------------------------------------------------------

KINDS = ("components", "blur", "nearest")


class Rivals(NamedTuple):
    """Rivals that are fitted to the same normals. They share one predictor, so that one program scores with them all.

    The predictor's parameters are those of `parameters(name)`. Its masks may have a leading axis of images: each image
    has masks of its own then.
    """

    names: tuple[str, ...]
    fitted: dict[str, PyTree]
    predict: Callable[[PyTree, Array, Array, Array], Array]

    def parameters(self, name: str) -> dict[str, PyTree]:
        """What the predictor needs of one rival."""
        return {**self.fitted, "number": jnp.int32(self.names.index(name))}


def rivals_of(
    kinds: Sequence[str], normals: Float[Array, "j n v"], size: tuple[int, ...], patch: tuple[int, ...]
) -> Rivals:
    """The rivals of these `KINDS`, fitted to normal images; components are left out where none can be fitted."""
    ways: dict[str, Callable[..., Array]] = {}
    fitted: dict[str, PyTree] = {}
    if "components" in kinds and (found := components_of(normals)):
        fitted["components"], q = found, found.basis.shape[-1]
        ways[f"{q} component{'s' if q > 1 else ''}"] = lambda p, *masked: conditional_mean(p["components"], *masked)
    if "blur" in kinds:
        ways["blur"] = lambda p, *masked: blurred(*masked, size=size, patch=patch)
    if "nearest" in kinds:
        fitted["normals"] = normals
        ways[f"{min(NEIGHBOURS, len(normals))} nearest normals"] = lambda p, *masked: nearest_mean(
            p["normals"], *masked
        )

    def predict(parameters: PyTree, patches: Array, keep: Array, restore: Array) -> Array:
        if keep.ndim == 3:
            one = lambda x, keep, restore: predict(parameters, x[None], keep, restore)[0]
            return jax.vmap(one)(patches, keep, restore)
        branches = [partial(way, parameters) for way in ways.values()]
        return jax.lax.switch(parameters["number"], branches, patches, keep, restore)

    return Rivals(tuple(ways), fitted, predict)


def explained_sums(
    prediction: Float[Array, "b m n v"],
    patches: Float[Array, "b n v"],
    keep: Int[Array, "m k"],
    restore: Int[Array, "m n"],
) -> Float[Array, "4 v"]:
    """Of the hidden values, by their place v in a patch: number, sum, sum of squares, sum of squared errors."""
    absent = 1 - shown(keep, restore)
    error = jnp.einsum("mn,bmnv->v", absent, (prediction - patches[:, None]) ** 2)
    count = jnp.full(error.shape, len(patches) * jnp.sum(absent))
    weights = jnp.sum(absent, 0)
    return jnp.stack([count, *(jnp.einsum("n,bnv->v", weights, patches**k) for k in (1, 2)), error])


def explained(sums: Float[np.ndarray, "4 v"], channels: int) -> float:
    """The share of the variance of hidden values that a predictor explains: 1 - error / variance about the mean of each
    channel. At 0 it predicts no better than that mean."""
    count, first, second, error = np.asarray(sums, np.float64).reshape(4, -1, channels).sum(1)
    return float(1 - error.sum() / np.maximum(second - first**2 / count, 1e-12).sum())
