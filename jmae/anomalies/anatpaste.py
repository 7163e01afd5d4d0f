"""AnatPaste pastes a patch of the image softly into the lung field. AMAE's proxy task uses it as pseudo-anomaly.

Sato et al., "Anatomy-aware self-supervised learning for anomaly detection in chest radiographs", iScience 2023,
arXiv:2205.04282. Consulted: github.com/jun-sato/AnatPaste. The paste is equation 1 of Bozorgtabar et al., "AMAE:
Adaptation of pre-trained masked autoencoder for dual-distribution anomaly detection in chest X-rays", MICCAI 2023:
Aug(x) = x (1 - x_mask) + x_paste x_mask.

`lung_field` runs on the host, once for each image. It takes 2D images whose lungs have a left and a right half. `draw`
and `apply` run on the device, under jit and vmap. `draw` has all the randomness, `apply` has none. Images are
`(*size, c)` in [0, 1] before standardisation, with two axes or more. Lengths are in pixels of a 256 x 256 image, as in
the paper's code, and are scaled to the working size axis by axis. The patch comes from `source`; in the paper this is
the image itself.

ours, in contrast to that code:
- an erased component loses only its own pixels; the code erases its bounding box;
- a lung field of implausible size counts as missing;
- a draw that would change nothing is replaced by another;
- the blur is a Gaussian in float; Pillow approximates it by three box filters in 8 bits;
- the jitter has a fixed order;
- the code also jitters the whole image, alike for the normal and the pasted one; `jittered` does that apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from skimage.exposure import equalize_adapthist
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.morphology import dilation, opening
from skimage.segmentation import clear_border

from jmae.data.transforms import LUMA, grey, resize, resize_mask

REFERENCE = 256  # side of the image, in pixels, to which the paper's lengths refer
COMPONENT_PX = 400  # smaller components of the lung field are erased
FIELD_SHARE = (0.025, 0.45)  # plausible shares of a lung field in the image's area; small fields show both lungs too
CANDIDATES = 16  # draws for each paste; the first that changes the image is taken
FACTORS = ("brightness", "contrast", "saturation", "hue")  # factors of the colour jitter
VISIBLE = 0.5 / 255  # the smallest change that survives rounding to 8 bits


# --- host -------------------------------------------------------------------------------------------------------------


def lung_field(image: Float[np.ndarray, "h w c"], share: tuple[float, float] = FIELD_SHARE) -> Bool[np.ndarray, "h w"]:
    """The mask of the lungs in a chest X-ray, where AnatPaste may paste. Values are in [0, 1]; lungs are dark.

    The lungs are found at 256 x 256, as in the paper's code, and the mask is resized to the image's size. At 96 x 96
    more lungs touch the border and are lost. The steps are CLAHE, Otsu's threshold, selection of the dark side without
    the value 0, and opening. Then components that touch the border are removed, the rest is dilated, and small
    components are removed.

    A mask whose share of the image lies outside `share`, or with an empty left or right half, is no lung field. Then
    all pixels are True; the code does this for an empty mask.
    """
    value = np.clip(resize(grey(image), (REFERENCE, REFERENCE))[..., 0], 0, 1)
    value = equalize_adapthist(value, clip_limit=0.01, nbins=256)  # kernel: 1/8 of each side
    dark = (value > 0) & (value <= threshold_otsu(value, nbins=256))
    square = np.ones((3,) * dark.ndim, bool)
    inner = dilation(clear_border(opening(dark, square)), square)
    parts = label(inner)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    lungs = (areas >= COMPONENT_PX)[parts]
    left, right = np.array_split(lungs, 2, axis=-1)
    plausible = share[0] <= lungs.mean() <= share[1] and left.any() and right.any()
    return resize_mask(lungs, image.shape[:-1]) if plausible else np.ones(image.shape[:-1], bool)


# --- device -----------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """The random numbers of one paste. Axis 0 is down, axis 1 right."""

    centre: Int[Array, " d"]  # pixel of the paste's centre in the image
    edges: Int[Array, " d"]  # pixels of the cut patch
    corner: Int[Array, " d"]  # first pixel of the cut patch in the source
    ellipse: Bool[Array, ""]  # True: ellipse; False: rectangle
    fill: Float[Array, ""]  # opacity of the shape before the blur, 255 is opaque
    blur: Float[Array, ""]  # deviation of the Gaussian, in pixels of a 256 x 256 image
    brightness: Float[Array, ""]
    contrast: Float[Array, ""]
    saturation: Float[Array, ""]
    hue: Float[Array, ""]  # turns


def draw(
    key: PRNGKeyArray,
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    lungs: Bool[Array, "*size"],
    *,
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    fill: tuple[int, int] = (150, 254),
    blur: tuple[int, int] = (0, 14),
    margin: float = 10,
    jitter: float = 0.1,
) -> Parameters:
    """Draws a paste that changes the image at its centre.

    - centre: uniform over the pixels of `lungs` (over all pixels where it is empty);
    - patch: it covers the share a ~ U(area) of the image; r is log-uniform over `aspect`. Its height is
      round(H sqrt(a / r)), its width round(W sqrt(a r)). Its first pixel is (floor(u (H - height)),
      floor(v (W - width))) with u, v ~ U(0, 1). With d axes, each axis but the first has a ratio r_i, and the first has
      ratio 1. The edges are min(n_i, round(n_i (a p_i)^(1/d))) with p_i = r_i^d / (r_1 ... r_d);
    - shape: ellipse or rectangle with probability 1/2. `fill` is uniform over the integers fill[0]..fill[1] and `blur`
      over blur[0]..blur[1], ends included;
    - brightness, contrast, saturation ~ U(1 - jitter, 1 + jitter); hue ~ U(-jitter, jitter) turns.

    All but the centre are drawn 16 times. The first good candidate is taken: its edges exceed twice the margin, and its
    paste moves the centre pixel by 0.5/255 or more. The distributions are conditional on that; it drops 1-2 % of the
    draws on chest X-rays. Without a good candidate, the one that moves the centre pixel most is taken. It may change
    nothing, for example on a constant image. `apply` then gives `changed` False.
    """
    # One function of 60 lines and more: the candidates and their choice share all sizes.
    size = image.shape[:-1]
    n, k, d = jnp.asarray(size, jnp.float32)[None], CANDIDATES, len(size)
    # One flat draw of all numbers: XLA compiles each call in half a second, but a call of shape (16, 11) in 9.
    u = jax.random.uniform(key, (1 + (2 * d + 7) * k,))
    centre, u = true_pixel(lungs | ~lungs.any(), u[0]), u[1:].reshape(k, 2 * d + 7)
    share = area[0] + u[:, :1] * (area[1] - area[0])
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** u[:, 1:d]
    edges = jnp.minimum(jnp.round(n * box_shares(share, ratio)), n).astype(jnp.int32)
    u = u[:, d:]
    candidates = Parameters(
        centre=jnp.broadcast_to(centre, (k, d)),
        edges=edges,
        corner=jnp.floor(u[:, :d] * (n - edges)).astype(jnp.int32),
        ellipse=u[:, d] < 0.5,
        fill=fill[0] + jnp.floor(u[:, d + 1] * (fill[1] - fill[0] + 1)),
        blur=blur[0] + jnp.floor(u[:, d + 2] * (blur[1] - blur[0] + 1)),
        brightness=1 + jitter * (2 * u[:, d + 3] - 1),
        contrast=1 + jitter * (2 * u[:, d + 4] - 1),
        saturation=1 + jitter * (2 * u[:, d + 5] - 1),
        hue=jitter * (2 * u[:, d + 6] - 1),
    )

    # The change at the centre pixel: that of the patch's middle pixel, times a lower bound of the blurred shape there.
    # The bound is the blur of the largest centred box inside the shape.
    middle = source[tuple((candidates.corner + edges // 2).T)]
    means = patch_mean(source, candidates.corner, edges)
    pasted = jax.vmap(colour_jitter)(middle, means, *(getattr(candidates, name) for name in FACTORS))
    rim = reach(edges, size, margin)
    inscribed = jnp.ceil(jnp.where(candidates.ellipse[:, None], rim / np.sqrt(d), rim)) - 0.5
    deviation = jnp.maximum(candidates.blur[:, None] * n / REFERENCE, 1e-3)
    peak = jnp.prod(jax.scipy.special.erf(jnp.maximum(inscribed, 0) / deviation / np.sqrt(2)), axis=1)
    change = jnp.abs(pasted - image[tuple(centre)][None]).max(axis=1) * peak * candidates.fill / 255
    good = jnp.all(edges > 2 * margin * n / REFERENCE, axis=1) & (change >= VISIBLE)
    taken = jnp.where(good.any(), jnp.argmax(good), jnp.argmax(change))
    return jax.tree.map(lambda values: values[taken], candidates)


def apply(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    lungs: Bool[Array, "*size"],
    parameters: Parameters,
    *,
    margin: float = 10,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Equation 1 for one drawn paste: `(pasted image, x_mask, extras)`. Pixels outside the lungs do not change.

    - x_mask: an ellipse or rectangle around the centre, with opacity fill / 255. It ends `margin` inside the patch's
      edges. It is blurred, and then 0 outside the lung field.
    - x_paste: the jittered patch, with its middle on the centre. It is black outside the patch, where the blur may
      still reach.
    - extras: `changed`, whether any pixel moved by 0.5/255 or more, and `parameters`.
    """
    size, p = image.shape[:-1], parameters
    inside = jnp.ones(size, bool)
    squares: Any = 0.0
    patch = jnp.ones(size, bool)
    for axis, rim in enumerate(reach(p.edges, size, margin)):
        offset = jax.lax.broadcasted_iota(jnp.int32, size, axis) - p.centre[axis]
        inside &= jnp.abs(offset) < rim
        squares += (offset / rim) ** 2
        first = -(p.edges[axis] // 2)
        patch &= (offset >= first) & (offset < first + p.edges[axis])
    shape = inside & (~p.ellipse | (squares < 1))

    soft = shape.astype(image.dtype)
    for axis, n in enumerate(size):
        matrix = blur_matrix(n, p.blur * n / REFERENCE)
        soft = jnp.moveaxis(jnp.tensordot(matrix, soft, ((1,), (axis,)), precision=Precision.HIGHEST), 0, axis)
    soft = soft * p.fill / 255 * (lungs | ~lungs.any())

    mean = patch_mean(source, p.corner[None], p.edges[None])[0]
    jittered = colour_jitter(source, mean, *(getattr(p, name) for name in FACTORS))
    paste = translate(jittered, p.centre - p.edges // 2 - p.corner) * patch[..., None]
    pasted = image + (paste - image) * soft[..., None]
    changed = jnp.any(jnp.abs(pasted - image) >= VISIBLE)
    return pasted, soft, {"changed": changed, "parameters": parameters}


@jax.jit(static_argnames=("area", "aspect", "fill", "blur", "margin", "jitter"))
def anatpaste(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    lungs: Bool[Array, "*size"] | None = None,
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    fill: tuple[int, int] = (150, 254),
    blur: tuple[int, int] = (0, 14),
    margin: float = 10,
    jitter: float = 0.1,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """One paste: `draw` (its docstring states the distributions), then `apply`. Without `lungs` it lies anywhere."""
    field = jnp.ones(image.shape[:-1], bool) if lungs is None else lungs
    p = draw(key, image, source, field, area=area, aspect=aspect, fill=fill, blur=blur, margin=margin, jitter=jitter)
    return apply(image, source, field, p, margin=margin)


def box_shares(volume: Float[Array, "*k 1"], ratio: Float[Array, "*k e"]) -> Float[Array, "*k e+1"]:
    """The edges of a box that covers the share `volume` of the image, as shares of the image's d axes.

    Axis i > 0 is `ratio` times as long as axis 0, both as shares of the image.
    """
    d = ratio.shape[-1] + 1
    powers = (d * np.eye(d, dtype=int)[:, 1:] - 1).reshape(*[1] * (ratio.ndim - 1), d, d - 1)
    shares = volume * jnp.prod(ratio[..., None, :] ** powers, axis=-1)
    return jnp.sqrt(shares) if d == 2 else shares ** (1 / d)


def true_pixel(mask: Bool[Array, "*size"], u: Float[Array, ""]) -> Int[Array, " d"]:
    """The index of True pixel number floor(u m) in C order, where m pixels are True. It is found axis by axis."""
    rank = jnp.floor(u * mask.sum()).astype(jnp.int32)
    index = []
    while mask.ndim:
        counts = mask.sum(axis=tuple(range(1, mask.ndim)))
        ends = jnp.cumsum(counts)
        i = jnp.sum(ends <= rank)
        rank = rank - (ends[i] - counts[i])
        mask = mask[i]
        index.append(i)
    return jnp.stack(index)


def reach(edges: Int[Array, "*k d"], size: tuple[int, ...], margin: float) -> Float[Array, "*k d"]:
    """The distance in pixels from the paste's centre to the shape's rim; not positive where no shape is left.

    At 256 pixels the shape has edge // 2 - margin whole pixels on each side of the centre pixel. The rim is half a
    pixel further. Pillow fills an ellipse of the same radius.
    """
    n = jnp.asarray(size, jnp.float32).reshape(*[1] * (edges.ndim - 1), -1)
    return edges // 2 - margin * n / REFERENCE + 0.5


def patch_mean(
    image: Float[Array, "*size c"], corner: Int[Array, "k d"], edges: Int[Array, "k d"]
) -> Float[Array, " k"]:
    """The mean luma of k patches. `colour_jitter` changes the contrast about it."""
    axes = "abcdefgh"[: corner.shape[-1]]
    inside = [
        (jnp.arange(n)[None] >= first[:, None]) & (jnp.arange(n)[None] < (first + edge)[:, None])
        for n, first, edge in zip(image.shape, corner.T, edges.T, strict=False)
    ]
    first, *others = (f"z{axis}" for axis in axes)
    terms = f"{','.join([first, axes, *others])}->z"
    total = jnp.einsum(terms, inside[0] * 1.0, luma(image), *(i * 1.0 for i in inside[1:]), precision=Precision.HIGHEST)
    return total / edges.prod(axis=1)


def luma(image: Float[Array, "*size c"]) -> Float[Array, "*size"]:
    """The luma of a colour image, as Pillow's mode "L"; the mean of the channels where they are not three."""
    c = image.shape[-1]
    return jnp.dot(image, jnp.asarray(LUMA if c == 3 else [1 / c] * c), precision=Precision.HIGHEST)


def colour_jitter(
    image: Float[Array, "*size c"],
    mean: Float[Array, ""],
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    saturation: Float[Array, ""],
    hue: Float[Array, ""],
) -> Float[Array, "*size c"]:
    """torchvision's ColorJitter with these factors.

    Brightness multiplies. Contrast changes about the luma `mean`. With three channels, saturation changes about each
    pixel's luma, and the hue turns in HSV (in turns).

    ours: the order is fixed; torchvision draws it. Values are clipped to [0, 1] once, before the hue. Apart from
    clipping, the first three commute.
    """
    image = brightness * (contrast * image + (1 - contrast) * mean)
    if image.shape[-1] != 3:
        return jnp.clip(image, 0, 1)
    image = jnp.clip(saturation * image + (1 - saturation) * luma(image)[..., None], 0, 1)
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value, chroma = image.max(-1), jnp.ptp(image, axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    sixth = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    ramp = (jnp.array([5, 3, 1]) + (sixth + 6 * hue)[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(ramp, 4 - ramp), 0, 1)


def jittered(image: Float[Array, "*size c"], key: PRNGKeyArray, jitter: float) -> Float[Array, "*size c"]:
    """The whole image under `colour_jitter`, with factors of the range `jitter` as `draw` has them for a patch.

    AnatPaste does so before it pastes. The result is the normal image, and the one in which the anomaly is pasted.
    """
    u = jitter * (2 * jax.random.uniform(key, (4,)) - 1)
    return colour_jitter(image, jnp.mean(luma(image)), 1 + u[0], 1 + u[1], 1 + u[2], u[3])


def blur_matrix(n: int, deviation: Float[Array, ""]) -> Float[Array, "n n"]:
    """A Gaussian filter of n pixels as a matrix. (The deviation is traced, so a kernel would have no static size.)

    Deviation 0 is the identity. The end pixels continue beyond the ends, as in Pillow and in SciPy's mode "nearest".
    """
    density = lambda distance: jnp.exp(-0.5 * (distance / jnp.maximum(deviation, 1e-3)) ** 2)
    i = jnp.arange(n)
    beyond = jnp.cumsum(density(jnp.arange(2 * n))[::-1])[::-1]  # weight at this distance and further
    matrix = density(i[:, None] - i[None]).at[:, 0].set(beyond[:n]).at[:, -1].set(beyond[:n][::-1])
    return matrix / matrix.sum(axis=1, keepdims=True)


def translate(image: Float[Array, "*size c"], shift: Int[Array, " d"]) -> Float[Array, "*size c"]:
    """The image, moved by `shift` pixels (less than its size) along each axis. New pixels are black.

    It is a slice of the padded image. On a CPU this is 5 times as fast as a roll, 40 times as fast as one-hot products.
    """
    size = image.shape[:-1]
    padded = jnp.pad(image, [(n, n) for n in size] + [(0, 0)])
    return jax.lax.dynamic_slice(padded, (*(n - s for n, s in zip(size, shift, strict=True)), 0), image.shape)
