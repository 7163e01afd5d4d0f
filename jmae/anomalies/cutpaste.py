"""CutPaste pastes a box of an image elsewhere, with jittered colours and hard edges. A scar is a thin, turned box.

Li, Sohn, Yoon, Pfister, "CutPaste: Self-supervised learning for anomaly detection and localization", CVPR 2021,
arXiv:2104.04015. No official code is known. Consulted: the reimplementations github.com/Runinho/pytorch-cutpaste and
github.com/LilitYolyan/CutPaste.

The generator is a function `(image (*size, c), source, key) -> (image, target (*size), extras)` over two axes or more.
Images are in [0, 1]. `source` is the image itself, as in the paper, or another image of the same size. `draw` has all
the randomness, `apply` has none. A scar's lengths are in pixels of a 256 x 256 image, as in the paper, and are scaled
to the working size axis by axis.

ours: the jitter has a fixed order (`colour_jitter`). A box may lie wherever its bounding box fits. Runinho leaves out
the last place; LilitYolyan cuts off turned scars at the border.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jmae.anomalies.anatpaste import FACTORS, REFERENCE, VISIBLE, box_shares, colour_jitter, patch_mean

STYLES = ("normal", "scar", "both")


class Parameters(NamedTuple):
    """The random numbers of one paste. Axis 0 is down, axis 1 right."""

    scar: Bool[Array, ""]
    edges: Int[Array, " d"]  # pixels of the cut box
    corner: Int[Array, " d"]  # first pixel of the cut box in the source
    angle: Float[Array, ""]  # radians from axis 0 to axis 1; 0 for a normal box
    place: Int[Array, " d"]  # first pixel of the turned box's bounding box in the image
    brightness: Float[Array, ""]
    contrast: Float[Array, ""]
    saturation: Float[Array, ""]
    hue: Float[Array, ""]  # turns


def draw(
    key: PRNGKeyArray,
    size: tuple[int, ...],
    *,
    style: str = "both",
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
    width: tuple[float, float] = (2, 16),
    length: tuple[float, float] = (10, 25),
    angle: float = 45,
    jitter: float = 0.1,
) -> Parameters:
    """Draws a paste.

    - style: "normal" or "scar"; "both" is either with probability 1/2;
    - normal box: it covers the share U(area) of the image. Width over height ~ U(aspect[0], 1) or U(1, aspect[1]), with
      probability 1/2 each; both are shares of the image's edges. Edges are whole pixels. With d axes, each axis i > 0
      has such a ratio to axis 0 (ours, as `crop_box`), and an edge is at most that of the image;
    - scar: axis 0 ~ U(length), every other axis ~ U(width) (ours beyond the second axis), in whole pixels, at least 1.
      It is turned in the plane of the first two axes by U(-angle, angle) degrees;
    - places: where the box is cut and where it is pasted are independent. Each is uniform over the places where the
      (turned) box fits;
    - brightness, contrast, saturation ~ U(1 - jitter, 1 + jitter); hue ~ U(-jitter, jitter) turns.

    Raises ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r}: one of {', '.join(STYLES)}")
    n, d = jnp.asarray(size, jnp.float32), len(size)
    u = iter(jnp.split(jax.random.uniform(key, (5 * d + 5,)), np.cumsum([1, 1, d - 1, d - 1, d, 1, d, d])))
    coin, volume, side, within, thin, turn, cut, to, factors = u
    scar = {"normal": jnp.array(False), "scar": jnp.array(True), "both": coin[0] < 0.5}[style]

    ratio = jnp.where(side < 0.5, aspect[0] + within * (1 - aspect[0]), 1 + within * (aspect[1] - 1))
    box = n * box_shares(area[0] + volume * (area[1] - area[0]), ratio)
    low, high = np.array([length] + [width] * (d - 1), np.float32).T
    edges = jnp.where(scar, (low + thin * (high - low)) * n / REFERENCE, box)
    edges = jnp.clip(jnp.round(edges), 1, n).astype(jnp.int32)
    radians = jnp.where(scar, np.deg2rad(angle) * (2 * turn[0] - 1), 0.0)
    whole = lambda u, room: jnp.floor(u * (room + 1)).astype(jnp.int32)
    spread = 1 + jitter * (2 * factors - 1)
    return Parameters(
        scar=scar,
        edges=edges,
        corner=whole(cut, n - edges),
        angle=radians,
        place=whole(to, jnp.maximum(n - bounding_box(edges, radians), 0)),
        brightness=spread[0],
        contrast=spread[1],
        saturation=spread[2],
        hue=spread[3] - 1,
    )


def bounding_box(edges: Int[Array, " d"], angle: Float[Array, ""]) -> Int[Array, " d"]:
    """The edges, in whole pixels, of the bounding box of a box that is turned in the plane of the first two axes."""
    cos, sin = jnp.abs(jnp.cos(angle)), jnp.abs(jnp.sin(angle))
    turned = jnp.stack([edges[0] * cos + edges[1] * sin, edges[0] * sin + edges[1] * cos])
    return jnp.concatenate([jnp.ceil(turned).astype(jnp.int32), edges[2:]])


def apply(
    image: Float[Array, "*size c"], source: Float[Array, "*size c"], p: Parameters
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """Pastes the drawn box. Each pixel of a turned box takes the nearest pixel of the cut box.

    The target is 1 where any channel of the image moves by 0.5/255 or more. Elsewhere the image stays as it is.
    """
    mean = patch_mean(source, p.corner[None], p.edges[None])[0]
    jittered = colour_jitter(source, mean, *(getattr(p, name) for name in FACTORS))

    # Offsets of pixel middles (at a half) from the paste's centre, turned back into the cut box.
    centre = p.place + bounding_box(p.edges, p.angle) / 2
    axes = jnp.ix_(*map(jnp.arange, image.shape[:-1]))
    offset = [axis + 0.5 - middle for axis, middle in zip(axes, centre, strict=True)]
    cos, sin = jnp.cos(p.angle), jnp.sin(p.angle)
    offset[:2] = cos * offset[0] + sin * offset[1], cos * offset[1] - sin * offset[0]
    inside, index = jnp.array(True), []
    for along, edge, first, n in zip(offset, p.edges, p.corner, image.shape, strict=False):
        inside &= (along >= -edge / 2) & (along < edge / 2)
        index.append(jnp.clip(jnp.floor(along + edge / 2).astype(jnp.int32) + first, 0, n - 1))
    pasted = jittered[tuple(index)]
    target = inside & jnp.any(jnp.abs(pasted - image) >= VISIBLE, axis=-1)
    return jnp.where(target[..., None], pasted, image), target.astype(image.dtype), {"parameters": p}


@jax.jit(static_argnames=("style", "area", "aspect", "width", "length", "angle", "jitter"))
def cutpaste(
    image: Float[Array, "*size c"],
    source: Float[Array, "*size c"],
    key: PRNGKeyArray,
    *,
    style: str = "both",
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
    width: tuple[float, float] = (2, 16),
    length: tuple[float, float] = (10, 25),
    angle: float = 45,
    jitter: float = 0.1,
) -> tuple[Float[Array, "*size c"], Float[Array, "*size"], dict[str, Any]]:
    """One paste: `draw` (its docstring states the distributions), then `apply`."""
    size = image.shape[:-1]
    p = draw(key, size, style=style, area=area, aspect=aspect, width=width, length=length, angle=angle, jitter=jitter)
    return apply(image, source, p)
