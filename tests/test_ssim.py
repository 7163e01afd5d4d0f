"""Structural similarity against the textbook formula and pytorch-msssim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jmae.errors import InputError
from jmae.ssim import check_ssim, ms_ssim, ms_ssim_map

OPTIONS = ("window", "sigma", "weights", "data_range", "pool")
scored = jax.jit(ms_ssim, static_argnames=OPTIONS)
scored_and_mapped = jax.jit(lambda x, y, **o: (ms_ssim(x, y, **o), ms_ssim_map(x, y, **o)), static_argnames=OPTIONS)
WANG = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
IGD = (0.0516, 0.3295, 0.3463, 0.2726)
SMALL = dict(window=3, sigma=1.5, weights=IGD, data_range=2.0)


def pairs(n: int, size: tuple[int, ...], c: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of coarse and fine structure (n, *size, c), and the same under noise and a change of brightness that grow
    from the first to the last."""
    rng = np.random.default_rng(seed)
    blur = [0, *[2.0] * len(size), 0]
    x = ndimage.gaussian_filter(rng.normal(size=(n, *size, c)), blur) * 4 + 0.1 * rng.normal(size=(n, *size, c))
    strength = np.geomspace(0.03, 1.5, n).reshape(-1, *[1] * (len(size) + 1))
    y = (1 - 0.2 * strength) * x + strength * rng.normal(size=x.shape) + 0.3 * strength
    return x.astype(np.float32), y.astype(np.float32)


def reference(x: np.ndarray, y: np.ndarray, *, window, sigma, weights, data_range, pool=2):
    """MS-SSIM and IGD's map of one channel of one image (*size), by the textbook formula in float64."""
    x, y, size = x.astype(np.float64), y.astype(np.float64), x.shape
    windows, pools = (v if isinstance(v, tuple) else (v,) * len(size) for v in (window, pool))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def mean(image):
        for axis, w in enumerate(windows):
            taps = np.exp(-(np.linspace(-(w - 1) / 2, (w - 1) / 2, w) ** 2) / (2 * sigma**2))
            image = ndimage.correlate1d(image, taps / taps.sum(), axis, mode="constant")
        return image[tuple(slice(w // 2, n - w // 2) for w, n in zip(windows, image.shape, strict=True))]

    product, total = 1.0, np.zeros(size)
    for j, weight in enumerate(weights):
        mx, my = mean(x), mean(y)
        vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        structure = (2 * covariance + c2) / (vx + vy + c2)
        ssim = structure * (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        product *= max((ssim if j == len(weights) - 1 else structure).mean(), 0) ** weight
        nearest = np.ix_(*(np.arange(n) * m // n for n, m in zip(size, ssim.shape, strict=True)))
        total += weight * (1 - np.maximum(ssim, 0)[nearest])
        for axis, p in enumerate(pools):
            x, y = (np.pad(v, [(v.shape[k] % p * (k == axis), 0) for k in range(v.ndim)]) for v in (x, y))
            x, y = (sum(v.take(range(i, v.shape[axis], p), axis) for i in range(p)) / p for v in (x, y))
    return product, total


@pytest.mark.parametrize(
    ("size", "c", "window", "weights"),
    [
        ((161, 161), 1, 11, WANG),  # the smallest that pytorch-msssim takes: it asks for 16 (window - 1) + 1
        ((200, 163), 3, 11, WANG),
        ((81, 97), 3, 5, WANG),
        ((33, 33), 3, 3, IGD),
        ((64, 47), 1, 3, IGD),
        ((200, 101), 1, 3, IGD),
        ((17, 33, 34), 1, 3, IGD),
    ],
)
def test_ms_ssim_is_pytorch_msssims(size, c, window, weights):
    msssim = pytest.importorskip("pytorch_msssim", reason="pytorch-msssim is in the extra 'bench'")
    torch = pytest.importorskip("torch")
    x, y = pairs(8, size, c)
    expected = msssim.ms_ssim(
        *(torch.from_numpy(np.moveaxis(v, -1, 1).astype(np.float64)) for v in (x, y)),
        data_range=2.0,
        size_average=False,
        win_size=window,
        win_sigma=1.5,
        weights=list(weights),
    ).numpy()
    assert np.ptp(expected) > 0.3  # the pairs reach from similar to not
    found = scored(x, y, window=window, sigma=1.5, weights=weights, data_range=2.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "c", "options"),
    [
        ((17, 22), 1, {}),  # the smallest that window 3 and four scales allow
        ((45, 31), 3, {"window": (5, 3)}),
        ((19, 17, 18), 1, {}),
        ((32, 32, 8), 2, {"weights": (0.2, 0.3, 0.5), "pool": (2, 2, 1)}),
    ],
)
def test_map_and_score_follow_their_formulas(size, c, options):
    options = SMALL | options
    x, y = pairs(3, size, c)
    expected = [[reference(x[i, ..., j], y[i, ..., j], **options) for j in range(c)] for i in range(3)]
    scores = [np.mean([score for score, _ in image]) for image in expected]
    share = {1: [1], 2: [0.5, 0.5], 3: np.array([0.2989, 0.5870, 0.1140]) / 0.9999}[c]
    maps = [sum(s * total for s, (_, total) in zip(share, image, strict=True)) for image in expected]
    found = scored_and_mapped(x, y, **options)
    np.testing.assert_allclose(found[0], scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], maps, rtol=0, atol=1e-5)


def test_channels_merge_by_their_weights():
    x, y = pairs(3, (24, 32), 3)
    each = [scored_and_mapped(x[..., [j]], y[..., [j]], **SMALL)[1] for j in range(3)]
    mapped = jax.jit(lambda x, y: ms_ssim_map(x, y, **SMALL, channel_weights=(1, 0, 3)))
    np.testing.assert_allclose(mapped(x, y), 0.25 * each[0] + 0.75 * each[2], atol=1e-6)
    grey = [np.repeat(v[..., [1]], 3, -1) for v in (x, y)]
    np.testing.assert_allclose(mapped(*grey), each[1], atol=1e-6)


def test_each_channel_can_have_its_own_range():
    x, y = pairs(3, (24, 32), 3)
    spans, own = np.array([0.5, 2.0, 9.0], np.float32), {k: v for k, v in SMALL.items() if k != "data_range"}
    of_all = jax.jit(lambda x, y: (ms_ssim(x, y, **own, data_range=spans), ms_ssim_map(x, y, **own, data_range=spans)))
    each = [scored_and_mapped(x[..., [j]], y[..., [j]], **own, data_range=float(s)) for j, s in enumerate(spans)]
    score, image = of_all(x, y)
    np.testing.assert_allclose(score, np.mean([score for score, _ in each], 0), atol=1e-6)
    expected = sum(w * image for w, (_, image) in zip((0.2989, 0.5870, 0.1140), each, strict=True)) / 0.9999
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_sequences_of_volumes_weigh_equally():
    x, y = pairs(2, (19, 17, 18), 3)
    each = [scored_and_mapped(x[..., [j]], y[..., [j]], **SMALL)[1] for j in range(3)]
    np.testing.assert_allclose(scored_and_mapped(x, y, **SMALL)[1], np.mean(each, 0), atol=1e-6)


@pytest.mark.parametrize("size", [(24, 32), (19, 17, 18)])
def test_equal_images_score_exactly_one_and_a_pasted_block_stands_out(size):
    x, _ = pairs(3, size, 1)
    score, image = scored_and_mapped(x, x, **SMALL)
    assert np.all(score == 1) and np.all(image == 0)
    block = (slice(None), *(slice(4, 10) for _ in size))
    y = x.copy()
    y[block] += 1.5
    score, image = map(np.asarray, scored_and_mapped(x, y, **SMALL))
    assert np.all(score < 0.95)
    assert np.all(image >= 0) and image[block].mean() > 1.25 * image.mean()


def test_constant_images_differ_by_their_luminance_alone():
    x, y, c1 = 0.3, 0.8, (0.01 * 2) ** 2
    luminance = (2 * x * y + c1) / (x * x + y * y + c1)
    score, image = scored_and_mapped(*(np.full((3, 24, 32, 1), v, np.float32) for v in (x, y)), **SMALL)
    np.testing.assert_allclose(score, luminance ** IGD[-1], rtol=1e-5)
    np.testing.assert_allclose(image, sum(IGD) * (1 - luminance), rtol=1e-4)


def test_a_large_offset_costs_no_precision():
    x, y = (v + np.float32(100) for v in pairs(3, (24, 32), 1))
    score, image = scored_and_mapped(x, y, **SMALL)
    expected = [reference(x[i, ..., 0], y[i, ..., 0], **SMALL) for i in range(3)]
    np.testing.assert_allclose(score, [score for score, _ in expected], rtol=0, atol=1e-4)
    np.testing.assert_allclose(image, [total for _, total in expected], rtol=0, atol=1e-4)


def test_mapped_over_y_alone_x_is_filtered_once():
    x, y = pairs(6, (24, 32), 1)
    x, y = x[:3], np.stack([y[:3], y[3:], x[3:]])  # (3, 24, 32, 1), (3, 3, 24, 32, 1)
    f = lambda x, y: ms_ssim_map(x, y, **SMALL)
    once, apart = jax.vmap(f, (None, 0)), jax.vmap(f)
    np.testing.assert_allclose(jax.jit(once)(x, y), [scored_and_mapped(x, v, **SMALL)[1] for v in y], atol=1e-6)
    moments_of_x = "f32[2,3,1,22,30] = add"  # E[x], E[x^2] of three images of one channel, at the finest scale
    assert moments_of_x in str(jax.make_jaxpr(once)(x, y))
    assert moments_of_x not in str(jax.make_jaxpr(apart)(np.stack([x, x, x]), y))


@pytest.mark.parametrize(
    ("size", "window", "scales", "pool", "message"),
    [
        ((96, 96), 11, 5, 2, r"needs more than \(160, 160\) voxels.*window to 5 or"),
        ((160, 224), 11, 5, 2, r"data.size is \(160, 224\).*window to \(9, 11\) or"),
        ((32, 32, 8), 3, 3, 2, r"window to \(3, 3, 1\) or"),
        ((32, 32, 2), 3, 3, (2, 2, 1), r"needs more than \(8, 8, 2\) voxels"),
        ((64, 64), 4, 2, 2, "odd"),
        ((64, 64), (3, 3, 3), 2, 2, "one value, or one for each axis"),
    ],
)
def test_a_window_that_does_not_fit_is_an_input_error(size, window, scales, pool, message):
    weights = (1 / scales,) * scales
    with pytest.raises(InputError, match=message) as error:
        check_ssim(size, window, weights, pool)
    assert "\n" not in str(error.value)
    image = jnp.zeros((1, *size, 1))
    with pytest.raises(InputError, match=message):
        ms_ssim(image, image, window=window, sigma=1.5, weights=weights, data_range=1.0, pool=pool)


@pytest.mark.parametrize(
    ("size", "window", "scales", "pool"),
    [((81, 97), 5, 5, 2), ((32, 32, 8), (3, 3, 1), 3, 2), ((32, 32, 8), 3, 3, (2, 2, 1))],
)
def test_the_largest_window_named_fits_and_one_voxel_less_does_not(size, window, scales, pool):
    weights = (1 / scales,) * scales
    check_ssim(size, window, weights, pool)
    edges, pools = (v if isinstance(v, tuple) else (v,) * len(size) for v in (window, pool))
    least = tuple((w - 1) * p ** (scales - 1) + 1 for w, p in zip(edges, pools, strict=True))
    check_ssim(least, window, weights, pool)
    with pytest.raises(InputError):
        check_ssim((least[0] - 1, *least[1:]), window, weights, pool)
