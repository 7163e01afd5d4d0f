"""Poisson image editing on rectangular windows: sine transforms solve the discrete Poisson equation.

Perez, Gangnet, Blake, "Poisson image editing", 2003. The solver of a window whose edge is the boundary follows the DST
form of github.com/matt-baugh/pytorch-poisson-image-editing, which the authors of P-PII use. Windows may have any number
of axes.

A window is an array (*n, c) of the static size n. Only its first `edges` (d,) voxels on each axis count. `edges` is
traced, so that windows of all sizes share one compilation.

The unknown is the change u of the target t. The guidance g_t + delta gives div(g_t + delta) = lap(t + u). Hence
lap(u) = div(delta), with u = 0 on the window's outer ring. The blended window t + u solves the full equation without a
boundary term, and u = 0 where delta is 0 everywhere. The solution is linear in delta, so the mean over several
guidances needs one solve.
"""

from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision, dynamic_slice, dynamic_update_slice
from jaxtyping import Array, Float, Int


def sine_basis(n: int, edge: Int[Array, ""]) -> Float[Array, "n n"]:
    """S_jk = sin(pi j k / (edge - 1)) for j, k = 1 ... edge - 2, else 0: the DST-I of the inner points.

    On the inner points, S S is (edge - 1) / 2 times the identity.
    """
    j = jnp.arange(n)
    inside = (j > 0) & (j < edge - 1)
    turns = (
        j[:, None] * j[None] % (2 * jnp.maximum(edge - 1, 1))
    )  # reduced as whole numbers, which loses no digits at high j k
    basis = jnp.sin(jnp.pi * turns / jnp.maximum(edge - 1, 1))
    return jnp.where(inside[:, None] & inside[None], basis, 0.0).astype(jnp.float32)


def solve(divergence: Float[Array, "*n c"], edges: Int[Array, " d"]) -> Float[Array, "*n c"]:
    """The solution u of lap(u) = divergence at the inner voxels of the window; u = 0 on its ring and beyond it.

    The Laplacian is the sum over axes of u[i + 1] - 2 u[i] + u[i - 1]. Mode a of an axis has the eigenvalue
    2 cos(pi a / (edge - 1)) - 2. Each axis takes two products with the sine basis.
    """
    size = divergence.shape[:-1]
    bases = [sine_basis(n, edge) for n, edge in zip(size, edges, strict=True)]

    def transform(u: Array) -> Array:
        for axis, basis in enumerate(bases):
            u = jnp.moveaxis(jnp.tensordot(basis, u, (1, axis), precision=Precision.HIGHEST), 0, axis)
        return u

    last = jnp.maximum(edges - 1, 1)
    eigen = [2 * jnp.cos(jnp.pi * jnp.arange(n) / m) - 2 for n, m in zip(size, last, strict=True)]
    sums, modes = reduce(jnp.add, jnp.ix_(*eigen)), inner(size, edges) > 0
    scale = jnp.where(modes, 1 / jnp.where(modes, sums, 1), 0) * jnp.prod(2 / last)
    return transform(transform(divergence) * scale[..., None])


def differences(window: Float[Array, "*n c"]) -> list[Float[Array, "*n c"]]:
    """a[i + 1] - a[i] along each axis; 0 at the last voxel, which no inner voxel of the window needs."""
    rank = window.ndim - 1
    end = lambda axis: [(0, int(other == axis)) for other in range(rank)] + [(0, 0)]
    return [jnp.pad(jnp.diff(window, axis=axis), end(axis)) for axis in range(rank)]


def divergence(fields: list[Float[Array, "*n c"]]) -> Float[Array, "*n c"]:
    """The sum over axes of g[i] - g[i - 1], with g[-1] = 0."""
    rank = fields[0].ndim - 1
    first = lambda axis: [(int(other == axis), 0) for other in range(rank)] + [(0, 0)]
    back = [jnp.diff(jnp.pad(g, first(axis)), axis=axis) for axis, g in enumerate(fields)]
    return reduce(jnp.add, back)


def inner(n: tuple[int, ...], edges: Int[Array, " d"]) -> Float[Array, "*n"]:
    """1 at the inner voxels of a window, 0 on its outer ring and beyond it."""
    index = jnp.ix_(*map(jnp.arange, n))
    inside = [(i > 0) & (i < edge - 1) for i, edge in zip(index, edges, strict=True)]
    return reduce(jnp.logical_and, inside).astype(jnp.float32)


def mixed_guidance(
    target: Float[Array, "*n c"], source: Float[Array, "*n c"], mask: Float[Array, "*n"]
) -> list[Float[Array, "*n c"]]:
    """Mixed gradients: the change of the target's differences when larger ones of the source replace them in `mask`.

    Perez et al., section 3.2. Each axis is treated separately, as in the solver of P-PII's authors. Ties keep the
    target.
    """
    pairs = zip(differences(target), differences(source), strict=True)
    return [mask[..., None] * jnp.where(jnp.abs(t) >= jnp.abs(s), 0, s - t) for t, s in pairs]


def source_guidance(
    target: Float[Array, "*n c"], source: Float[Array, "*n c"], mask: Float[Array, "*n"]
) -> list[Float[Array, "*n c"]]:
    """The change of the target's differences, which those of the source replace inside `mask` (section 3.1)."""
    pairs = zip(differences(target), differences(source), strict=True)
    return [mask[..., None] * (s - t) for t, s in pairs]


def interpolation_guidance(
    target: Float[Array, "*n c"], source: Float[Array, "*n c"], alpha: Float[Array, ""]
) -> list[Float[Array, "*n c"]]:
    """PII's guidance (Tan et al. 2021; Eq. 1 of P-PII, where the second branch means the source).

    A difference becomes (1 - alpha) times that of the target or alpha times that of the source, whichever is larger in
    size. The result is the change of the target's differences on each axis.
    """
    pairs = zip(differences(target), differences(source), strict=True)
    larger = lambda t, s: jnp.where(jnp.abs((1 - alpha) * t) > jnp.abs(alpha * s), (1 - alpha) * t, alpha * s)
    return [larger(t, s) - t for t, s in pairs]


def change(fields: list[Float[Array, "*n c"]], edges: Int[Array, " d"]) -> Float[Array, "*n c"]:
    """The change of a window whose differences change by `fields` (one for each axis)."""
    return solve(divergence(fields), edges)


def blend(
    target: Float[Array, "*n c"], source: Float[Array, "*n c"], mask: Float[Array, "*n"], edges: Int[Array, " d"]
) -> Float[Array, "*n c"]:
    """The target's window, with the source blended in by mixed gradients inside `mask` without the window's ring.

    The result is not clipped. It equals the target on the ring and beyond the window, and everywhere if the source has
    no larger difference.
    """
    return target + change(mixed_guidance(target, source, mask * inner(mask.shape, edges)), edges)


# --- windows of images ------------------------------------------------------------------------------------------------


def grow(image: Float[Array, "*size c"], n: tuple[int, ...]) -> Float[Array, "*more c"]:
    """The image, padded with n zeros at the end of each axis, so that a window of n voxels fits at any voxel."""
    return jnp.pad(image, [*((0, m) for m in n), (0, 0)])


def window(image: Float[Array, "*more c"], corner: Int[Array, " d"], n: tuple[int, ...]) -> Float[Array, "*n c"]:
    """The window of n voxels from `corner` of an image that `grow` has padded."""
    return dynamic_slice(image, (*corner, 0), (*n, image.shape[-1]))


def add_part(
    image: Float[Array, "*more c"], part: Float[Array, "*n c"], corner: Int[Array, " d"]
) -> Float[Array, "*more c"]:
    """The image plus `part`, whose first voxel lies at `corner`."""
    whole = window(image, corner, part.shape[:-1]) + part
    return dynamic_update_slice(image, whole.astype(image.dtype), (*corner, 0))


def crop_to(image: Float[Array, "*more c"], size: tuple[int, ...]) -> Float[Array, "*size c"]:
    """The first `size` voxels of an image that `grow` has padded."""
    return image[tuple(map(slice, size))]


def edges_of(size: tuple[int, ...], share: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest edge of a patch on each axis: round(share[0] n) and round(share[1] n) - 1.

    Both are at least 3, because a smaller window has no inner voxel.
    """
    least, most = (np.round(part * np.array(size)).astype(int) for part in share)
    least = np.maximum(least, 3)
    return least, np.maximum(most - 1, least)
