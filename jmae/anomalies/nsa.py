"""NSA clones resized patches of another image seamlessly into an image. The label is how much the image changes.

Schlüter, Tan, Hou, Kainz, "Natural synthetic anomalies for self-supervised anomaly detection and localization", ECCV
2022, arXiv:2109.15222. Consulted: github.com/hmsch/natural-synthetic-anomalies (self_sup_data/self_sup_tasks.py).
Defaults are those for chest X-rays (train_chest_xray.py), where mixed gradients give the best results.

The generator is a function `(image (*size, c), source, key) -> (image, target (*size), extras)` over any number of
axes. Images are in [0, 1]. `source` is another image of the same size, or the image itself. `draw` has all the
randomness, `apply` has none. Grey levels (`background`, `tolerance`, `logistic`) are from 0 to 255, as in the code. The
widths of the median filters are in voxels.

ours, in contrast to that code:
- cloning solves Poisson's equation in float on the whole patch, whose edge is the boundary. OpenCV's clone has a window
  one pixel smaller and rounds down to bytes;
- `mixed` takes the larger difference on each axis separately. OpenCV takes the source's gradient where its |g_x - g_y|
  is larger, which has no meaning for three axes;
- patches of less than 50 pixels are allowed; OpenCV cannot clone them;
- 16 candidates are drawn at once; the code draws up to 200 in a loop. Without a good one, the best is taken; the code
  takes none;
- the resizing factor is clipped once for all axes; the code clips it one axis after the other. Results differ by up to
  a pixel, and by more for patches that are too elongated for the bounds;
- resizing reads beyond the patch's edge; the code repeats the edge;
- the shape of the gamma distribution is a whole number (always 2 in the code), so that it is a sum of exponentials,
  which compiles fast.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jmae.anomalies.anatpaste import CANDIDATES
from jmae.anomalies.poisson import add_part, change, crop_to, grow, inner, mixed_guidance, source_guidance, window

GUIDANCE = {"mixed": mixed_guidance, "normal": source_guidance}
LABELS = ("binary", "intensity", "logistic-intensity")
LEAST = 3  # voxels of an edge; a smaller window has no inner voxel


class Patches(NamedTuple):
    """Up to `a` patches, which are cloned one after another."""

    used: Bool[Array, " a"]
    cut: Int[Array, "a d"]  # first voxel in the source
    edges: Int[Array, "a d"]  # in the source
    resized: Int[Array, "a d"]  # edges in the image
    corner: Int[Array, "a d"]  # first voxel in the image


def bounds(size: tuple[int, ...], half: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest half width of a patch. As in the code, they also bound the edges after resizing."""
    least, most = (np.round(share * np.array(size)).astype(int) for share in half)
    return np.maximum(least, 2), np.maximum(most, LEAST)


def largest(size: tuple[int, ...], half: tuple[float, float], resize: tuple[float, float] | None) -> tuple[int, ...]:
    """The greatest edges of a patch in the image."""
    most = bounds(size, half)[1]
    return tuple(int(n) for n in (most if resize else np.minimum(2 * most, np.array(size) - 2)))


def draw(
    key: PRNGKeyArray,
    objects: Float[Array, "*size"],
    source_objects: Float[Array, "*size"],
    *,
    patches: int = 3,
    half: tuple[float, float] = (0.03, 0.4),
    gamma: tuple[int, float, float] | None = (2, 0.03, 0.05),
    resize: tuple[float, float] | None = (0.7, 1.3),
    object_share: float = 0.7,
    overlap: float = 0.7,
) -> Patches:
    """Draws the patches of one image. `objects` and `source_objects` are 1 where there is an object (`foreground`).

    - number: the first patch always, each further one with probability 1/2;
    - half width on each axis: clip((gamma[2] + Gamma(gamma[0], scale gamma[1])) n, bounds), rounded down to whole
      voxels. n is the image's edge, and the bounds are `half` n. Without `gamma` it is uniform over the whole numbers
      in the bounds;
    - centre in the source: uniform, at least half[0] n from the border. The border cuts off the patch. The first of 16
      candidates with more than `object_share` of the patch on objects is taken, else the one with the most;
    - size: multiplied by s ~ clip(N(1, 0.5), resize), the same for all axes. s is clipped further so that all resized
      edges are within `half` n (as in the code). Without `resize` the size stays;
    - place in the image: uniform where the patch fits, at least a voxel from the border. The first of 16 candidates
      with more than `overlap` of the patch's object on objects is taken, else the one with the most.
    """
    # One function of 60 lines and more: the draws of a patch depend on each other, in this order.
    size = objects.shape
    n, d, k = np.array(size), len(size), CANDIDATES
    least, most = bounds(size, half)
    room = largest(size, half, resize)
    shape = gamma[0] if gamma else 1
    whole = lambda u, low, high: low + jnp.floor(u * (high - low + 1)).astype(jnp.int32)
    padded = grow(objects[..., None], room)

    def one(u: Float[Array, " m"]) -> tuple[Array, ...]:
        coin, spread, normal, centre, place = jnp.split(u, np.cumsum([1, shape * d, 1, k * d]))
        if gamma:
            share = gamma[2] - gamma[1] * jnp.log1p(-spread.reshape(shape, d)).sum(0)
            width = jnp.clip(share * n, least, most).astype(jnp.int32)
        else:
            width = whole(spread, least, most - 1)
        middle = whole(centre.reshape(k, d), least[None], (n - least - 1)[None])
        low, high = jnp.maximum(middle - width[None], 0), jnp.minimum(middle + width[None], n[None])
        filled = jax.vmap(lambda low, high: box_mean(source_objects, low, high))(low, high)
        i = first_or_best(filled, object_share)
        cut, edges = low[i], high[i] - low[i]

        resized = jnp.minimum(edges, jnp.array(room))
        if resize:
            factor = jnp.clip(1 + 0.5 * jax.scipy.special.ndtri(normal[0]), *resize)
            factor = jnp.minimum(jnp.maximum(factor, jnp.max(least / edges)), jnp.min(most / edges))
            resized = jnp.floor(factor * edges + 1e-4).astype(jnp.int32)
        resized = jnp.clip(resized, LEAST, jnp.array(room))
        corners = whole(place.reshape(k, d), 1, jnp.maximum(n - resized - 1, 1)[None])
        of_patch = resample(source_objects[..., None], cut, edges, resized, room) > 0.5
        of_patch &= box(room, jnp.zeros_like(resized), resized)[..., None]
        shared = jax.vmap(lambda corner: jnp.sum(of_patch * window(padded, corner, room)))(corners)
        j = first_or_best(shared / jnp.maximum(of_patch.sum(), 1), overlap)
        return coin[0] < 0.5, cut, edges, resized, corners[j]

    u = jax.random.uniform(key, (patches * (2 + (shape + 2 * k) * d),)).reshape(patches, -1)
    drawn = Patches(*jax.vmap(one)(u))
    return drawn._replace(used=drawn.used.at[0].set(True))


def first_or_best(share: Float[Array, " k"], least: float) -> Int[Array, ""]:
    """The index of the first share above `least`; without one, that of the greatest share."""
    return jnp.where(jnp.any(share > least), jnp.argmax(share > least), jnp.argmax(share))


def box(size: tuple[int, ...], low: Int[Array, " d"], high: Int[Array, " d"]) -> Bool[Array, "*size"]:
    """True inside the box from `low` to before `high`."""
    inside = jnp.array(True)
    for axis, first, end in zip(jnp.ix_(*map(jnp.arange, size)), low, high, strict=True):
        inside &= (axis >= first) & (axis < end)
    return inside


def box_mean(array: Float[Array, "*size"], low: Int[Array, " d"], high: Int[Array, " d"]) -> Float[Array, ""]:
    """The mean of the array over the box from `low` to before `high`."""
    for first, end in zip(low, high, strict=True):
        i = jnp.arange(array.shape[0])
        array = jnp.tensordot(((i >= first) & (i < end)) * 1.0, array, 1)
    return array / jnp.prod(high - low)


def resample(
    image: Float[Array, "*size c"],
    cut: Int[Array, " d"],
    edges: Int[Array, " d"],
    resized: Int[Array, " d"],
    n: tuple[int, ...],
) -> Float[Array, "*n c"]:
    """A patch of `edges` voxels from `cut`, resized to `resized` voxels, at the start of a window of n voxels.

    The interpolation is linear, without a filter against aliasing, as in OpenCV's `resize`.
    """
    stretch = resized / edges
    axes = tuple(range(len(n)))
    shape = (*n, image.shape[-1])
    return jax.image.scale_and_translate(image, shape, axes, stretch, -cut * stretch, "linear", antialias=False)


# --- labels -----------------------------------------------------------------------------------------------------------


def median(mask: Bool[Array, "*size"], width: int) -> Bool[Array, "*size"]:
    """The median of a mask over `width` voxels (an odd number) on each axis. The border's voxels continue beyond it."""
    count = jnp.pad(mask.astype(jnp.int32), width // 2, "edge")
    for axis in range(mask.ndim):
        along = tuple(width if axis == other else 1 for other in range(mask.ndim))
        count = jax.lax.reduce_window(count, 0, jax.lax.add, along, (1,) * mask.ndim, "valid")
    return count > width**mask.ndim // 2


def ball_median(values: Float[Array, "*size"], radius: int) -> Float[Array, "*size"]:
    """The exact median of values >= 0 over the voxels within `radius`. The border's voxels continue beyond it.

    Floats >= 0 have the same order as their bits read as integers. So the median is found bit by bit, by counting the
    smaller neighbours.
    """
    grid = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * values.ndim, indexing="ij"), -1)
    offsets = grid[np.sum(grid**2, -1) <= radius**2] + radius
    bits = jax.lax.bitcast_convert_type(jnp.pad(values.astype(jnp.float32), radius, "edge"), jnp.int32)

    def bit(i: Array, found: Array) -> Array:
        trial = found | (1 << (30 - i))
        below = lambda count, at: (count + (jax.lax.dynamic_slice(bits, at, values.shape) < trial), None)
        count, _ = jax.lax.scan(below, jnp.zeros(values.shape, jnp.int32), jnp.asarray(offsets))
        return jnp.where(count <= len(offsets) // 2, trial, found)

    found = jax.lax.fori_loop(0, 31, bit, jnp.zeros(values.shape, jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def foreground(
    image: Float[Array, "*size c"], background: tuple[float, float] | None, width: int = 7
) -> Float[Array, "*size"]:
    """1 at objects, whose mean over channels differs from the grey level background[0] by more than background[1].

    A median over `width` voxels follows. Without `background` all voxels are objects.
    """
    if background is None:
        return jnp.ones(image.shape[:-1])
    value, threshold = background
    return median(jnp.abs(image.mean(-1) * 255 - value) > threshold, width).astype(jnp.float32)


def change_labels(
    image: Float[Array, "*size c"],
    out: Float[Array, "*size c"],
    counted: Float[Array, "*size"],
    *,
    labels: str,
    logistic: tuple[float, float],
    tolerance: float,
    medians: tuple[int, int],
) -> Float[Array, "*size"]:
    """The target of a change, where `counted` is 1.

    The change c is the mean over channels of |out - image|, in grey levels.
    - binary: 1 where c > `tolerance`, after a median over medians[0] voxels along each axis;
    - intensity: where binary is 1, the median m of c over the ball of radius medians[1], divided by 255 (ours; the code
      gives m);
    - logistic-intensity: where binary is 1, 1 / (1 + exp(-k (m - x0))) with (k, x0) = `logistic`.
    """
    levels = 255 * jnp.mean(jnp.abs(out - image), -1) * counted
    mask = median(levels > tolerance, medians[0])
    if labels == "binary":
        return mask.astype(jnp.float32)
    levels = ball_median(levels * mask, medians[1])
    return levels / 255 if labels == "intensity" else mask * jax.nn.sigmoid(logistic[0] * (levels - logistic[1]))


# --- the generator ----------------------------------------------------------------------------------------------------


def apply(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    objects: Float[Array, "*size"],
    source_objects: Float[Array, "*size"],
    p: Patches,
    *,
    most: tuple[int, ...],
    gradients: str = "mixed",
    labels: str = "binary",
    logistic: tuple[float, float] = (1 / 2, 4),
    tolerance: float = 1,
    medians: tuple[int, int] = (5, 5),
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Clones the patches, each of at most `most` voxels, one after another. Clips to [0, 1] after each patch.

    A change counts for the target (`change_labels`) where the patch or the image has an object. Where patches overlap,
    the last one decides.
    """
    size = image.shape[:-1]
    both = jnp.concatenate([source, source_objects[..., None]], -1)

    def clone(carry: tuple[Array, Array], q: Patches) -> tuple[tuple[Array, Array], None]:
        canvas, counted = carry
        patch = resample(both, q.cut, q.edges, q.resized, most)
        t, inside = window(canvas, q.corner, most), inner(most, q.resized)
        u = change(GUIDANCE[gradients](t, patch[..., :-1], inside), q.resized)
        canvas = add_part(canvas, q.used * (jnp.clip(t + u, 0, 1) - t), q.corner)
        shown = jnp.maximum(patch[..., -1:] > 0.5, window(objects_grown, q.corner, most))
        before = window(counted, q.corner, most)
        of_patch = q.used & box(most, jnp.zeros_like(q.corner), q.resized)[..., None]
        return (canvas, add_part(counted, of_patch * (shown - before), q.corner)), None

    objects_grown = grow(objects[..., None], most)
    start = grow(image, most), jnp.zeros_like(objects_grown)
    (canvas, counted), _ = jax.lax.scan(clone, start, p)
    out, counted = crop_to(canvas, size), crop_to(counted, size)[..., 0]
    target = change_labels(image, out, counted, labels=labels, logistic=logistic, tolerance=tolerance, medians=medians)
    return out, target, {"parameters": p}


@jax.jit(
    static_argnames=(
        *("patches", "half", "gamma", "resize", "background", "object_share", "overlap"),
        *("gradients", "labels", "logistic", "tolerance", "medians"),
    )
)
def nsa(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    patches: int = 3,
    half: tuple[float, float] = (0.03, 0.4),
    gamma: tuple[int, float, float] | None = (2, 0.03, 0.05),
    resize: tuple[float, float] | None = (0.7, 1.3),
    background: tuple[float, float] | None = (0, 20),
    object_share: float = 0.7,
    overlap: float = 0.7,
    gradients: str = "mixed",
    labels: str = "binary",
    logistic: tuple[float, float] = (1 / 2, 4),
    tolerance: float = 1,
    medians: tuple[int, int] = (5, 5),
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Natural synthetic anomalies, from patches that contain an object (`foreground`).

    It is `draw` (its docstring states the distributions), then `apply`. Raises ValueError for unknown `gradients` or
    `labels`.
    """
    if gradients not in GUIDANCE or labels not in LABELS:
        raise ValueError(f"gradients {gradients!r}, labels {labels!r}: {', '.join(GUIDANCE)}; {', '.join(LABELS)}")
    objects, source_objects = foreground(image, background), foreground(source, background)
    p = draw(
        key,
        objects,
        source_objects,
        patches=patches,
        half=half,
        gamma=gamma,
        resize=resize,
        object_share=object_share,
        overlap=overlap,
    )
    return apply(
        image,
        source,
        objects,
        source_objects,
        p,
        most=largest(image.shape[:-1], half, resize),
        gradients=gradients,
        labels=labels,
        logistic=logistic,
        tolerance=tolerance,
        medians=medians,
    )
