"""Structural similarity over several scales, of whole images and of each voxel; on the device."""

from collections.abc import Iterator, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmae.errors import InputError

GREY = (0.2989, 0.5870, 0.1140)  # red, green, blue; IGD's

Values = float | Float[Array, " c"]  # of all channels, or of each
Black = Values | None


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def check_ssim(
    size: tuple[int, ...], window: int | Sequence[int], weights: Sequence[float], pool: int | Sequence[int] = 2
) -> None:
    """Check that the window fits images of `size` voxels at the last scale: size > (window - 1) * pool^(scales - 1).

    Raises InputError where an axis is too short, where a window is even or not positive, or where the number of values
    differs from the number of axes.
    """
    windows, pools = _per_axis(window, len(size)), _per_axis(pool, len(size))
    if not len(windows) == len(pools) == len(size):
        raise InputError(
            f"evaluation.window {window} and evaluation.pool {pool} must fit the {len(size)} axes of data.size {size}: "
            "give one value, or one for each axis"
        )
    if any(w < 1 or w % 2 == 0 for w in windows):
        raise InputError(f"evaluation.window {window} has no middle voxel: give odd, positive values")
    least = tuple((w - 1) * p ** (len(weights) - 1) for w, p in zip(windows, pools, strict=True))
    if any(n <= m for n, m in zip(size, least, strict=True)):
        fits = [(n - 1) // p ** (len(weights) - 1) // 2 * 2 + 1 for n, p in zip(size, pools, strict=True)]
        edges = tuple(min(w, f) for w, f in zip(windows, fits, strict=True))
        lower = edges[0] if len(set(edges)) == 1 else edges
        raise InputError(
            f"window {window} over {len(weights)} scales needs more than {least} voxels, data.size is {size}: lower "
            f"evaluation.window to {lower} or give evaluation.scales fewer weights"
        )


def _gaussian(images: Float[Array, "k b c *size"], window: tuple[int, ...], sigma: float) -> Float[Array, "k b c *n"]:
    """Weighted means in a Gaussian window, only where the whole window fits: n = size - window + 1.

    The means are sums of shifted copies, in float32 on every device. On one core, `_similarity` of 2 images of 224 x
    224 x 3 with 10 reconstructions each and window 11 takes 23 ms (a volume of 64^3 with window 7: 21 ms). Products
    with banded matrices take 131 (100) ms, and convolutions 1,440 (3,220) ms. The images are stacked over k, because
    XLA otherwise computes them again for each shift (262 ms).
    """
    for axis, w in enumerate(window, images.ndim - len(window)):
        taps = np.exp(-((np.arange(w) - w // 2) ** 2) / (2 * sigma**2))
        n = images.shape[axis] - w + 1
        shifted = [
            float(t) * jax.lax.slice_in_dim(images, i, i + n, axis=axis) for i, t in enumerate(taps / taps.sum())
        ]
        images = sum(shifted[1:], start=shifted[0])
    return images


def _pool(images: Float[Array, "b c *size"], pool: tuple[int, ...]) -> Float[Array, "b c *n"]:
    """Means of `pool` voxels: n = ceil(size / pool).

    Where `pool` does not divide an axis, zeros before its first voxel count too, as in pytorch-msssim and IGD.
    """
    box = (1, 1, *pool)
    before = [(-n % p, 0) for n, p in zip(images.shape, box, strict=True)]
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, box, box, before) / prod(pool)


def _similarity(
    x: Float[Array, "b c *size"],
    y: Float[Array, "b c *size"],
    window: tuple[int, ...],
    sigma: float,
    data_range: Values,
    k: tuple[float, float],
    black: Black,
) -> tuple[Float[Array, "b c *n"], Float[Array, "b c *n"]]:
    """Maps of SSIM and of its contrast-structure factor, n = size - window + 1.

    With d = y - x, 2 cov(x, y) = var(x) + var(y) - var(d); the same holds for products of means. Equal images therefore
    have exactly 1, and the rounding error of E[d^2] - E[d]^2 in float32 is small for similar images. Variances do not
    change with a shift, so the mean of x is subtracted before squaring, and added again for the luminance.
    """
    mean = x.mean(tuple(range(2, x.ndim)), keepdims=True)
    x, d = x - mean, y - x
    y = x + d
    mean_x, square_x = _gaussian(jnp.stack([x, x * x]), window, sigma)
    mean_d, square_d, square_y = _gaussian(jnp.stack([d, d * d, y * y]), window, sigma)
    mean_y = mean_x + mean_d
    var_x, var_y, var_d = (
        jnp.maximum(square - m**2, 0) for square, m in ((square_x, mean_x), (square_y, mean_y), (square_d, mean_d))
    )
    of_channels = lambda values: jnp.reshape(values, (1, -1, *[1] * len(window)))
    c1, c2 = ((share * of_channels(data_range)) ** 2 for share in k)
    structure = 1 - var_d / (var_x + var_y + c2)
    if black is None:
        return structure, structure
    mean = mean - of_channels(black)
    return (1 - mean_d**2 / ((mean_x + mean) ** 2 + (mean_y + mean) ** 2 + c1)) * structure, structure


def _scales(
    x: Float[Array, "b *size c"],
    y: Float[Array, "b *size c"],
    window: int | Sequence[int],
    sigma: float,
    weights: Sequence[float],
    data_range: Values,
    k: tuple[float, float],
    pool: int | Sequence[int],
    black: Black,
    mirror: bool = False,
) -> Iterator[tuple[Float[Array, "b c *n"], Float[Array, "b c *n"]]]:
    """`_similarity` at each scale, the finest first; with `mirror` of images continued by half a window. Channels move
    to axis 1."""
    check_ssim(x.shape[1:-1], window, weights, pool)
    window, pool = _per_axis(window, x.ndim - 2), _per_axis(pool, x.ndim - 2)
    x, y = (jnp.moveaxis(image, -1, 1).astype(jnp.float32) for image in (x, y))
    more = [(0, 0), (0, 0), *((w // 2, w // 2) for w in window)]
    continued = lambda image: jnp.pad(image, more, mode="symmetric") if mirror else image
    for j in range(len(weights)):
        if j:
            x, y = _pool(x, pool), _pool(y, pool)
        yield _similarity(continued(x), continued(y), window, sigma, data_range, k, black)


def ms_ssim(
    x: Float[Array, "b *size c"],
    y: Float[Array, "b *size c"],
    *,
    window: int | Sequence[int],
    sigma: float,
    weights: Sequence[float],
    data_range: Values,
    k: tuple[float, float] = (0.01, 0.03),
    pool: int | Sequence[int] = 2,
    black: Black = 0.0,
) -> Float[Array, " b"]:
    """Multi-scale structural similarity, 1 for equal images: the mean over channels of prod_j cs_j^w_j * ssim_M^w_M.

    cs_j is the mean of the contrast-structure map at scale j < M, and ssim_M the mean of the SSIM map at the last
    scale. Negative means count as zero. Z. Wang, E. Simoncelli, A. Bovik, "Multiscale structural similarity for image
    quality assessment", Asilomar 2003, eq. 7, with alpha = beta = gamma. The values equal those of pytorch-msssim, for
    odd sizes too.

    To compare x with m images, map over y alone, `jax.vmap(f, (None, 0))`. Then x is pooled and filtered once.

    Args:
        window: edge of the Gaussian window in voxels at every scale, odd; one value, or one for each axis.
        sigma: the window's standard deviation in voxels.
        weights: w_1 .. w_M, the finest scale first; as many scales as weights.
        data_range: largest minus smallest possible value of images, in their unit; for all channels or for each.
        k: K1 and K2; luminance is stabilised by (K1 * data_range)^2, contrast by (K2 * data_range)^2.
        pool: number of voxels in the mean that makes a voxel of the next scale; one value, or one for each axis. 1
            leaves an axis unchanged: with pool (2, 2, 1), a volume of 32 x 32 x 8 has 3 scales with window 3.
        black: value of black, for all channels or for each. The luminance factor is meant for values from black up.
            IGD's code has standardised images and 0, so that their mean counts as black. None leaves luminance out.

    Raises:
        InputError: as `check_ssim` does.
    """
    *finer, (last, _) = _scales(x, y, window, sigma, weights, data_range, k, pool, black)
    space = tuple(range(2, x.ndim))
    factors = [jax.nn.relu(image.mean(space)) for image in (*(structure for _, structure in finer), last)]
    return jnp.stack([f**w for f, w in zip(factors, weights, strict=True)]).prod(0).mean(-1)  # (b,)


def ms_ssim_map(
    x: Float[Array, "b *size c"],
    y: Float[Array, "b *size c"],
    *,
    window: int | Sequence[int],
    sigma: float,
    weights: Sequence[float],
    data_range: Values,
    k: tuple[float, float] = (0.01, 0.03),
    pool: int | Sequence[int] = 2,
    black: Black = 0.0,
    border: str = "stretch",
    channel_weights: Sequence[float] | None = None,
) -> Float[Array, " b *size"]:
    """Dissimilarity of each voxel over several scales: sum_j w_j (1 - relu(SSIM_j)), 0 for equal images.

    Y. Chen, Y. Tian, G. Pang, G. Carneiro, "Deep one-class classification via interpolated Gaussian descriptor" (IGD),
    AAAI 2022, arXiv 2101.10043, code for localisation. The map of a scale has m values on an axis of n voxels, m = n -
    window + 1 at the finest scale. With `border="stretch"`, as in that code, the map is stretched, not padded: voxel i
    has the value floor(i m / n), as with `F.interpolate(mode="nearest")`. Values therefore move towards the border by
    at most (window - 1) / 2 voxels of their scale. For window 11, these are 80 voxels of the image at the fifth scale.
    With `border="mirror"` (ours) the images of each scale are mirrored at their border. A voxel then has the value of
    the window around it. At a coarser scale it is the window around the voxel that contains it.

    Args:
        channel_weights: one for each channel, divided by their sum. By default grey weights for the three channels of
            2D images (red, green, blue), as IGD has; else equal weights. Sequences of volumes are no colours.
        window, sigma, weights, data_range, k, pool, black: as for `ms_ssim`.

    Raises:
        InputError: as `check_ssim` does.
    """
    c = x.shape[-1]
    share = np.asarray(channel_weights or (GREY if c == 3 and x.ndim == 4 else (1,) * c), np.float32)
    total, mirror = jnp.zeros(x.shape[:-1], jnp.float32), border == "mirror"
    scales = _scales(x, y, window, sigma, weights, data_range, k, pool, black, mirror)
    at, sizes = [np.arange(n) for n in x.shape[1:-1]], x.shape[1:-1]  # voxels of a mirrored scale that contain those
    for j, (w, (image, _)) in enumerate(zip(weights, scales, strict=True)):
        image = jnp.tensordot(1 - jax.nn.relu(image), share / share.sum(), (1, 0), precision="highest")  # (b, *m)
        if j and mirror:
            edges = _per_axis(pool, len(sizes))
            at = [(i + -n % p) // p for i, n, p in zip(at, sizes, edges, strict=True)]  # as `_pool` fills up
            sizes = image.shape[1:]
        for axis, n in enumerate(x.shape[1:-1], 1):
            own = at[axis - 1] if mirror else np.arange(n) * image.shape[axis] // n
            image = jnp.take(image, own, axis=axis)
        total += w * image
    return total
