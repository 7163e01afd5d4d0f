"""Synthetic anomalies by interpolating two images: FPI, PII and P-PII.

FPI: Tan et al., "Detecting outliers with foreign patch interpolation", MELBA 2022, arXiv 2011.04197. PII: Tan et al.,
"Detecting outliers with Poisson image interpolation", MICCAI 2021, arXiv 2107.02622; github.com/jemtan/PII. P-PII:
Müller et al., "Confidence-aware and self-supervised image anomaly localisation", UNSURE 2023, arXiv 2303.13227;
github.com/ividja/Probabilistic-PII (only the generator). Equation numbers are those of P-PII.

A generator is a function `(image (*size, c), source, key) -> (image, target (*size), extras)` over any number of axes.
Images and targets are in [0, 1], and the target is 0 where nothing changed. `source` is another image of the same size,
or the image itself. The functions `draw_*` have all the randomness, `apply_*` have none. Sizes are traced, so that one
compilation serves all draws. `jax.vmap` makes batches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jmae.anomalies.poisson import (
    add_part,
    change,
    crop_to,
    edges_of,
    grow,
    inner,
    interpolation_guidance,
    mixed_guidance,
    window,
)
from jmae.keys.ppii import PRESETS, Preset

TOLERANCE = 1e-3  # a change counts where it crosses a multiple of this number (PII's code)
RADIUS_DEVIATION = 1.0  # voxels


# --- FPI and PII ------------------------------------------------------------------------------------------------------


class Square(NamedTuple):
    """A rectangle, which lies at the same place in both images, and the share of the source inside it."""

    corner: Int[Array, " d"]
    edges: Int[Array, " d"]
    alpha: Float[Array, ""]


def draw_square(key: PRNGKeyArray, size: tuple[int, ...], half: tuple[float, float], core: float) -> Square:
    """Draws a rectangle.

    - half width, the same for the first two axes: h ~ U{round(half[0] n) ... round(half[1] n) - 1}, at least 2; n is
      the shorter of these sides. A third axis has the same quantile for its own side (ours: windows may be flat);
    - centre: uniform over the central share `core` of each axis; the image's border cuts off the rectangle;
    - alpha ~ U(0.05, 0.95).
    """
    u = jax.random.uniform(key, (2 + len(size),))
    least, most = widths(size, half)
    half_width = least + jnp.floor(u[0] * (most - least + 1)).astype(jnp.int32)  # (d,)
    n = np.array(size)
    first, last = central_share(size, core)
    centre = first + jnp.floor(u[2:] * (last - first)).astype(jnp.int32)
    low, high = jnp.maximum(centre - half_width, 0), jnp.minimum(centre + half_width, n)
    return Square(low, high - low, 0.05 + 0.9 * u[1])


def central_share(size: tuple[int, ...], share: float) -> tuple[np.ndarray, np.ndarray]:
    """(first voxel, voxel after the last) of the central `share` of each axis."""
    first, last = (np.round(np.array(size) * (1 + sign * share) / 2).astype(int) for sign in (-1, 1))
    return first, last


def widths(size: tuple[int, ...], half: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest half width (d,) of `draw_square`."""
    sides = np.array([min(size[:2])] * 2 + list(size[2:]))
    least, most = (np.round(share * sides).astype(int) for share in half)
    least = np.maximum(least, 2)
    return least, np.maximum(most - 1, least)


def largest_edges(size: tuple[int, ...], half: tuple[float, float]) -> tuple[int, ...]:
    """The greatest edges of `draw_square`."""
    return tuple(int(2 * most) for most in widths(size, half)[1])


def apply_fpi(
    image: Float[Array, "*size c"], source: Float[Array, "*size c"], p: Square, *, most: tuple[int, ...]
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """(1 - alpha) image + alpha source inside the rectangle, which has at most `most` voxels on an axis.

    The target is alpha where the image changes.
    """
    return _paste(image, source, p, most, lambda t, s, inside: inside[..., None] * p.alpha * (s - t))


def apply_pii(
    image: Float[Array, "*size c"], source: Float[Array, "*size c"], p: Square, *, most: tuple[int, ...]
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Eq. 1 to 4 inside the rectangle's outer ring, clipped to the range of the image.

    The target is alpha where the image changes.
    """
    how = lambda t, s, inside: change(interpolation_guidance(t, s, p.alpha), p.edges)
    return _paste(image, source, p, most, how, clipped=True)


def _paste(
    image: Array, source: Array, p: Square, n: tuple[int, ...], how: Any, clipped: bool = False
) -> tuple[Array, Array, dict[str, Any]]:
    size = image.shape[:-1]
    axes = tuple(range(len(size)))
    whole, other = grow(image, n), grow(source, n)
    inside = [jnp.arange(most) < edge for most, edge in zip(n, p.edges, strict=True)]
    t, s = window(whole, p.corner, n), window(other, p.corner, n)
    part = how(t, s, jnp.prod(jnp.stack(jnp.meshgrid(*inside, indexing="ij")), axis=0))
    out = crop_to(add_part(whole, part, p.corner), size)
    if clipped:
        out = jnp.clip(out, image.min(axes, keepdims=True), image.max(axes, keepdims=True))
    changed = jnp.any(jnp.floor(out / TOLERANCE) != jnp.floor(image / TOLERANCE), axis=-1)
    return out, changed * p.alpha, {"parameters": p}


@jax.jit(static_argnames=("half", "core"))
def fpi(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    half: tuple[float, float] = (0.05, 0.2),
    core: float = 0.8,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Foreign patch interpolation: `draw_square` (its docstring states the distributions), then `apply_fpi`."""
    size = image.shape[:-1]
    return apply_fpi(image, source, draw_square(key, size, half, core), most=largest_edges(size, half))


@jax.jit(static_argnames=("half", "core"))
def pii(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    half: tuple[float, float] = (0.05, 0.2),
    core: float = 0.8,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Poisson image interpolation: `draw_square` (its docstring states the distributions), then `apply_pii`."""
    size = image.shape[:-1]
    return apply_pii(image, source, draw_square(key, size, half, core), most=largest_edges(size, half))


# --- P-PII ------------------------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """Up to `a` anomalies of up to `r` raters. The first `number` anomalies and their first `raters` raters count."""

    number: Int[Array, ""]
    which: Int[Array, " a"]  # number of the source
    cut: Int[Array, "a d"]  # first voxel in the source
    corner: Int[Array, "a d"]  # first voxel in the image
    edges: Int[Array, "a d"]
    raters: Int[Array, " a"]
    centre: Int[Array, "a r d"]  # centre of the disc in the patch
    radius: Int[Array, "a r d"]  # half widths, before the patch's edge limits them
    turn: Float[Array, "a r"]  # angle of an ellipse in radians
    strength: Float[Array, "a r"]
    chosen: Int[Array, " a"]  # number of the one rater of each anomaly whose label may be the target


def draw_patches(
    key: PRNGKeyArray,
    size: tuple[int, ...],
    sources: int,
    image_number: Int[Array, ""] | None,
    preset: Preset,
    *,
    patch: tuple[float, float],
    core: float,
) -> Patches:
    """Draws the anomalies of one image. Ranges include their ends.

    - number: A ~ U{preset.anomalies};
    - source of a patch: uniform over the sources but number `image_number`, which is the image itself;
    - edge of a patch on each axis: ~ U{round(patch[0] n) ... round(patch[1] n) - 1}, at least 3;
    - centre in the source: uniform over the central share `core` of each axis; the border cuts off the patch;
    - place in the image: uniform where the patch fits. With `preset.core` the first voxel is ~ U[edge, core n - edge)
      on each axis where that interval is not empty (ours: an edge of core n / 2 or more leaves none);
    - raters of a patch: R ~ U{preset.raters}. The centre of a rater's disc is ~ N(edge / 2, edge / 12), its half widths
      are ~ N(edge / 2, 1) / 2. Both are truncated to whole voxels;
    - strength of a rater: ~ U{preset.strength}, a whole number where both ends are whole, else a real number. With
      `preset.consistent` it is A times a real number ~ U(preset.strength), and at least 1;
    - the one rater of each patch: uniform over its raters.
    """
    # One function of 60 lines: it reads as its docstring, a line for each quantity.
    d, n = len(size), np.array(size)[None]
    a, r = preset.anomalies[1], preset.raters[1]
    for_patches, for_raters, for_strength = jax.random.split(key, 3)
    u = jax.random.uniform(for_patches, (a * (3 * d + 2) + 1,))
    whole = lambda u, low, high: low + jnp.floor(u * (high - low + 1)).astype(jnp.int32)
    number, u = whole(u[0], *preset.anomalies), u[1:].reshape(a, -1)
    least, most = edges_of(size, patch)
    edges = whole(u[:, :d], least[None], most[None])
    first, last = central_share(size, core)
    centre = whole(u[:, d : 2 * d], first[None], last[None] - 1)
    cut, end = jnp.maximum(centre - edges // 2, 0), jnp.minimum(centre - edges // 2 + edges, n)
    edges = end - cut
    if preset.core:
        beyond = np.floor(core * n).astype(int)
        fits = edges < beyond - edges
        low, high = jnp.where(fits, edges, 0), jnp.where(fits, beyond - edges - 1, n - edges)
        corner = whole(u[:, 2 * d : 3 * d], low, high)
    else:
        corner = whole(u[:, 2 * d : 3 * d], 0, n - edges)
    which = whole(u[:, 3 * d], 0, sources - 1 - (image_number is not None))
    which = which if image_number is None else which + (which >= image_number)
    normal = jax.random.normal(for_raters, (a, r, 2 * d))
    half = edges[:, None] / 2
    each = jax.random.uniform(for_strength, (a, r, 2))
    if not preset.consistent and all(float(end).is_integer() for end in preset.strength):
        strength = whole(each[..., 0], *preset.strength).astype(jnp.float32)
    else:
        strength = preset.strength[0] + each[..., 0] * (preset.strength[1] - preset.strength[0])
        strength = jnp.maximum(number * strength, 1) if preset.consistent else strength
    number_of_raters = whole(u[:, 3 * d + 1], *preset.raters)
    which_rater = jax.random.uniform(jax.random.fold_in(key, 3), (a,))
    return Patches(
        number=number,
        which=which,
        cut=cut,
        corner=corner,
        edges=edges,
        raters=number_of_raters,
        centre=jnp.trunc(half + half / 6 * normal[..., :d]).astype(jnp.int32),
        radius=jnp.trunc(half + RADIUS_DEVIATION * normal[..., d:]).astype(jnp.int32) // 2,
        turn=2 * jnp.pi * each[..., 1],
        strength=strength,
        chosen=whole(which_rater, 0, number_of_raters - 1),
    )


def discs(p: Patches, n: tuple[int, ...], shape: str) -> Bool[Array, "a r *n"]:
    """True inside each rater's disc. A disc lies inside its patch; the narrower axis gives its radius.

    In volumes the narrower of the first two axes gives the radius in their plane. The third axis has a half width of
    its own (ours): windows are flat, and a sphere in them would be a voxel or two. An ellipse has a half width for each
    axis, and is turned in the plane of the first two axes. A rectangle has the same half widths, and is not turned.
    """
    room = jnp.minimum(p.centre, p.edges[:, None] - 1 - p.centre)
    radius = jnp.maximum(jnp.minimum(p.radius, room), 0)
    wide = lambda x: x.reshape(*x.shape[:2], *(1,) * len(n), *x.shape[2:])
    offset = jnp.stack(jnp.meshgrid(*map(jnp.arange, n), indexing="ij"), -1)[None, None] - wide(p.centre)
    if shape == "circular" and len(n) == 2:
        return jnp.sum(offset**2, -1) <= wide(radius.min(-1) ** 2)
    if shape == "circular":
        flat = jnp.broadcast_to(radius[..., :2].min(-1, keepdims=True), radius[..., :2].shape)
        half = jnp.maximum(jnp.concatenate([flat, radius[..., 2:]], -1), 0.5)  # a half width of 0 is one voxel
        return jnp.sum((offset / wide(half)) ** 2, -1) <= 1
    if shape == "rectangular":
        return jnp.all(jnp.abs(offset) <= wide(radius), -1)
    cos, sin = wide(jnp.cos(p.turn)), wide(jnp.sin(p.turn))
    first, second = offset[..., 0], offset[..., 1]
    turned = [cos * first - sin * second, sin * first + cos * second]
    turned += [offset[..., k] for k in range(2, len(n))]
    plane = jnp.minimum(radius[..., :2], room[..., :2].min(-1, keepdims=True))  # so that it fits at any angle
    radius = jnp.concatenate([plane, radius[..., 2:]], -1)
    return jnp.sum((jnp.stack(turned, -1) / wide(jnp.maximum(radius, 0.5))) ** 2, -1) <= 1


def apply_ppii(
    image: Float[Array, "*size c"],
    sources: Float[Array, "m *size c"],
    p: Patches,
    *,
    most: tuple[int, ...],
    preset: Preset,
    shape: str = "circular",
    deviation: bool = False,
    rater: bool = False,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Composes the patches, each of at most `most` voxels.

    The image of a rater is the target into which mixed gradients blend the disc of the patch. The patch's differences
    are multiplied by the strength. With `preset.sequence` the patches follow one after another, and each is the mean of
    its raters' images. Otherwise the result is the mean of all raters' images, and each of these starts from the clean
    target.

    The blend is linear in the guidance, so that the mean over the raters of a patch takes one solve. The result is
    clipped to [0, 1], in a sequence after each patch (ours: the released file does not clip). The label is min(gain |X'
    - x|, 1), with the mean over channels.

    The deviation takes one solve for each rater. It is that of the raters' images, each clipped to [0, 1], and
    therefore at most 1/2; in a sequence the variances of overlapping patches add up to 1/4 at most.

    With `rater` (ours) the extras hold "rater", the composite X_r in which one rater stands for the mean of each patch,
    and "rater_target", its label min(gain |X_r - x|, 1). Before clipping, the mean of X_r over raters is X'.
    """
    # One function of 60 lines and more: both orders of composition share the blend of a window.
    size = image.shape[:-1]
    whole, others = grow(image, most), jax.vmap(lambda s: grow(s, most))(sources)
    active = jnp.arange(p.which.shape[0]) < p.number
    count = jnp.arange(p.strength.shape[1])[None] < p.raters[:, None]
    share = count / p.raters[:, None]
    source = lambda q: jax.lax.dynamic_slice(others, (q.which, *q.cut, 0), (1, *most, image.shape[-1]))[0]
    each = Patches(p.number + jnp.zeros_like(p.which), *p[1:])
    masks = discs(p, most, shape)

    def blend_window(canvas: Array, q: Patches, mask: Array, share: Array) -> dict[str, Array]:
        """Changes of a window: "mean" over raters and "one" rater's; "first" and "second", the moments over the raters'
        clipped changes."""
        t, s = window(canvas, q.corner, most), source(q)
        ring = inner(most, q.edges)
        fields = jax.vmap(lambda mask, strength: mixed_guidance(t, strength * s, mask * ring))(mask, q.strength)
        found = {"mean": change([jnp.tensordot(share, f, 1) for f in fields], q.edges)}
        if rater:
            found["one"] = change([f[q.chosen] for f in fields], q.edges)
        if deviation:
            raters = jax.vmap(lambda *f: jnp.clip(t + change(list(f), q.edges), 0, 1) - t)(*fields)
            found |= {"first": jnp.tensordot(share, raters, 1), "second": jnp.tensordot(share, raters**2, 1)}
        return found

    if preset.sequence:

        def add(carry: dict[str, Array], x: Any) -> tuple[dict[str, Array], None]:
            q, mask, share, active = x
            found = blend_window(carry["mean"], q, mask, share)
            t = window(carry["mean"], q.corner, most)
            parts = {k: jnp.clip(t + v, 0, 1) - t for k, v in found.items() if k in ("mean", "one")}
            if deviation:
                parts["variance"] = found["second"] - found["first"] ** 2
            return {k: add_part(carry[k], active * v, q.corner) for k, v in parts.items()}, None

        zero = {"variance": jnp.zeros_like(whole)} if deviation else {}
        start = {"mean": whole} | ({"one": whole} if rater else {}) | zero
        sums, _ = jax.lax.scan(add, start, (each, masks, share, active))
        if deviation:
            variance = jnp.minimum(sums["variance"], 0.25)
    else:
        found = jax.vmap(blend_window, (None, 0, 0, 0))(whole, each, masks, share)
        weight = active * p.raters / jnp.sum(active * p.raters)

        def add(carry: dict[str, Array], x: Any) -> tuple[dict[str, Array], None]:
            found, weight, corner = x
            return {k: add_part(carry[k], weight * v, corner) for k, v in found.items()}, None

        sums, _ = jax.lax.scan(add, {k: jnp.zeros_like(whole) for k in found}, (found, weight, p.corner))
        if deviation:
            variance = sums["second"] - sums["first"] ** 2
        sums = {k: whole + sums[k] for k in ("mean", "one") if k in sums}
    final = lambda canvas: jnp.clip(crop_to(canvas, size), 0, 1)
    label = lambda composite: jnp.minimum(preset.gain * jnp.mean(jnp.abs(composite - image), -1), 1)
    out = final(sums["mean"])
    extras: dict[str, Any] = {"parameters": p}
    if rater:
        extras["rater"] = final(sums["one"])
        extras["rater_target"] = label(extras["rater"])
    if deviation:
        extras["deviation"] = jnp.sqrt(jnp.maximum(jnp.mean(crop_to(variance, size), -1), 0))
    return out, label(out), extras


STATIC = ("preset", "anomalies", "raters", "strength", "gain", "patch", "core", "shape", "deviation", "rater")


@jax.jit(static_argnames=STATIC)
def ppii(
    image: Float[Array, "*size c"],
    source: Float[Array, "..."],
    key: PRNGKeyArray,
    image_number: Int[Array, ""] | None = None,
    *,
    preset: str = "paper",
    anomalies: tuple[int, int] | None = None,
    raters: tuple[int, int] | None = None,
    strength: tuple[float, float] | None = None,
    gain: float | None = None,
    patch: tuple[float, float] = (0.05, 0.2),
    core: float = 0.8,
    shape: str = "circular",
    deviation: bool = False,
    rater: bool = False,
    rater_number: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Probabilistic Poisson image interpolation (Eq. 5).

    It is `draw_patches` (its docstring states the distributions), then `apply_ppii`.

    Args:
        source: an image, or several images (m, *size, c). Each patch comes from one of them.
        image_number: number of the image itself among the sources. No patch comes from it.
        anomalies, raters, strength, gain: values that replace those of the preset.
        deviation: whether the extras contain the deviation (*size) over raters' images.
        rater: whether the extras contain what one rater of each patch gives. That rater is drawn, or is number
            `rater_number` (the last one where a patch has fewer).
    """
    base = PRESETS[preset]
    chosen = base._replace(
        anomalies=base.anomalies if anomalies is None else anomalies,
        raters=base.raters if raters is None else raters,
        strength=base.strength if strength is None else strength,
        gain=base.gain if gain is None else gain,
    )
    sources = source if source.ndim > image.ndim else source[None]
    size = image.shape[:-1]
    p = draw_patches(key, size, len(sources), image_number, chosen, patch=patch, core=core)
    most = tuple(int(n) for n in edges_of(size, patch)[1])
    p = p if rater_number is None else p._replace(chosen=jnp.minimum(rater_number, p.raters - 1))
    return apply_ppii(image, sources, p, most=most, preset=chosen, shape=shape, deviation=deviation, rater=rater)
