import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from jmae.anomalies import anatpaste as ap


def chest(side, seed=0, centres=(0.3, 0.7), lung=0.3):
    """A grey chest in [0, 1]: a bright body in dark air, two dark ellipses for lungs; and where these are."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    body = ((x - 0.5) / 0.46) ** 2 + ((y - 0.55) / 0.5) ** 2 < 1
    image = np.where(body, 0.75 + 0.1 * np.sin(3 * x + seed), 0.1)
    lungs = np.any([((x - c) / 0.13) ** 2 + ((y - 0.5) / 0.27) ** 2 < 1 for c in centres], axis=0)
    image[lungs] = lung
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, image.shape), side / 128)
    return np.clip(image + 0.05 * noise, 0.01, 1).astype(np.float32)[..., None], lungs


def textured(size, channels, seed=0):
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (*size, channels)), (4, 4, 0))
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


# ------------------------------------------------------------------------------------------ host


@pytest.mark.parametrize("side", [128, 256])
def test_the_lung_field_is_the_dark_side_inside_the_body(side):
    image, lungs = chest(side)
    field = ap.lung_field(image)
    assert field.dtype == bool and field.shape == lungs.shape
    assert field[lungs].mean() > 0.97
    assert (field & ~scipy.ndimage.binary_dilation(lungs, iterations=4)).sum() < 0.02 * lungs.sum()
    assert not field[0].any() and not field[:, 0].any()  # the air around the body is dark too


def test_bright_lungs_are_not_found():
    image, lungs = chest(128, lung=0.99)
    assert ap.lung_field(image).all() or ap.lung_field(image)[lungs].mean() < 0.05


def test_what_touches_the_border_is_not_lung():
    image, lungs = chest(128)
    image[60:70, :40] = 0.3  # a dark bridge from the left lung to the border
    assert ap.lung_field(image).all()  # its half is empty: not a lung field
    image, lungs = chest(128)
    image[120:, 60:] = 0.3
    field = ap.lung_field(image)
    assert field[lungs].mean() > 0.97 and not field[118:].any()


@pytest.mark.parametrize("side", [128, 256])
def test_components_below_400_pixels_of_a_256_image_are_erased_and_their_neighbours_kept(side):
    image, lungs = chest(side)
    middle, unit = side // 2, side // 128
    spot = lambda half: (slice(middle - half, middle + half), slice(middle - half, middle + half))
    image[spot(3 * unit)] = 0.3  # (6 + 2)^2 = 64 pixels of 128 after dilation: below 100
    field = ap.lung_field(image)
    assert not field[spot(3 * unit)].any()
    assert field[lungs].mean() > 0.97
    image[spot(6 * unit)] = 0.3  # 196 and more: above
    assert ap.lung_field(image)[spot(5 * unit)].all()


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(chest(128, centres=(0.3,))[0], id="one half empty"),
        pytest.param(chest(128, centres=())[0], id="no lungs"),
        pytest.param(np.zeros((64, 64, 1), np.float32), id="black"),
        pytest.param(np.full((64, 64, 1), 0.5, np.float32), id="constant"),
    ],
)
def test_an_implausible_field_becomes_the_whole_image(image):
    assert ap.lung_field(image).all()


def test_the_plausible_share_of_the_image_is_an_argument():
    image, lungs = chest(128)
    assert 0.2 < lungs.mean() < 0.25
    assert ap.lung_field(image, share=(0.4, 0.5)).all() and ap.lung_field(image, share=(0.05, 0.15)).all()
    assert not ap.lung_field(image, share=(0.15, 0.3)).all()


def test_colour_images_are_segmented_by_their_luma():
    image, _ = chest(96)
    np.testing.assert_array_equal(ap.lung_field(np.repeat(image, 3, -1)), ap.lung_field(image))


# ---------------------------------------------------------------------------------------- device


def own(key, image, lungs):
    """A paste of the image itself, as the paper's."""
    return ap.anatpaste(image, image, key, lungs=lungs)


def numpy_anatpaste(image, source, lungs, p, margin=10):
    """The paste of `p`, written pixel by pixel in NumPy, SciPy and colorsys."""
    height, width, c = image.shape
    scale = np.array([height, width]) / 256
    (cy, cx), (h, w), (top, left) = p.centre, p.edges, p.corner
    half = p.edges // 2 - margin * scale

    y, x = np.mgrid[:height, :width]
    if p.ellipse:
        shape = ((y - cy) / (half[0] + 0.5)) ** 2 + ((x - cx) / (half[1] + 0.5)) ** 2 < 1
    else:
        shape = (np.abs(y - cy) < half[0] + 0.5) & (np.abs(x - cx) < half[1] + 0.5)
    soft = scipy.ndimage.gaussian_filter(shape.astype(float), p.blur * scale, mode="nearest", truncate=9)
    soft = soft * lungs * p.fill / 255

    luma = np.array([0.299, 0.587, 0.114]) if c == 3 else np.ones(c) / c
    patch = source[top : top + h, left : left + w].astype(float)
    patch = patch * p.brightness
    patch = p.contrast * patch + (1 - p.contrast) * (patch @ luma).mean()
    if c == 3:
        patch = p.saturation * patch + (1 - p.saturation) * (patch @ luma)[..., None]
    patch = patch.clip(0, 1)
    if c == 3:
        for pixel in patch.reshape(-1, 3):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            pixel[:] = colorsys.hsv_to_rgb((hue + p.hue) % 1, saturation, value)

    paste = np.zeros(image.shape)
    for row in range(h):
        for column in range(w):
            to = (cy - h // 2 + row, cx - w // 2 + column)
            if 0 <= to[0] < height and 0 <= to[1] < width:
                paste[to] = patch[row, column]
    return image * (1 - soft[..., None]) + paste * soft[..., None], soft


def half_field(size):
    lungs = np.zeros(size, bool)
    lungs[size[0] // 8 : -size[0] // 8, size[1] // 8 : -size[1] // 3] = True
    return lungs


@pytest.fixture(scope="module")
def pastes():
    """200 pastes on one small image: the image, its field, the keys, the results, the compiled function."""
    traces = []

    @jax.jit
    def paste(image, lungs, keys):
        traces.append(1)
        return jax.vmap(own, (0, None, None))(keys, image, lungs)

    image, lungs = jnp.asarray(textured((72, 72), 1)), jnp.asarray(half_field((72, 72)))
    keys = jax.random.split(jax.random.key(0), 200)
    return image, lungs, keys, paste(image, lungs, keys), (paste, traces)


def assert_equals_reference(image, source, lungs, out, soft, parameters):
    for i in range(12):
        drawn = jax.tree.map(lambda values, i=i: np.asarray(values[i]), parameters)
        expected, expected_soft = numpy_anatpaste(np.asarray(image), np.asarray(source), np.asarray(lungs), drawn)
        np.testing.assert_allclose(soft[i], expected_soft, atol=2e-6)
        np.testing.assert_allclose(out[i], expected, atol=2e-5)  # float32; hue divides by small chroma


def test_pastes_equal_a_pixel_by_pixel_reference(pastes):
    image, lungs, _, (out, soft, extras), _ = pastes
    assert_equals_reference(image, image, lungs, out, soft, extras["parameters"])


@pytest.mark.long
def test_colour_pastes_on_oblong_images_equal_a_pixel_by_pixel_reference():
    image, lungs = jnp.asarray(textured((80, 56), 3)), jnp.asarray(half_field((80, 56)))
    keys = jax.random.split(jax.random.key(1), 12)
    out, soft, extras = jax.vmap(own, (0, None, None))(keys, image, lungs)
    assert_equals_reference(image, image, lungs, out, soft, extras["parameters"])
    grey = jnp.repeat(image[..., :1], 3, -1)  # an X-ray in three equal channels stays grey
    out, _, _ = jax.vmap(own, (0, None, None))(keys, grey, lungs)
    np.testing.assert_allclose(np.ptp(out, axis=-1), 0, atol=1e-6)


def pillow_anatpaste(image, lungs, p):
    """The calls to Pillow of github.com/jun-sato/AnatPaste, on 8-bit grey images of 256 x 256."""
    (cy, cx), (h, w), (top, left) = (tuple(int(v) for v in pair) for pair in (p.centre, p.edges, p.corner))
    picture = Image.fromarray((image[..., 0] * 255).round().astype(np.uint8))
    patch = picture.crop((left, top, left + w, top + h))
    patch = ImageEnhance.Contrast(ImageEnhance.Brightness(patch).enhance(p.brightness)).enhance(p.contrast)
    mask = Image.new("L", picture.size)
    box = (cx - w // 2 + 10, cy - h // 2 + 10, cx + w // 2 - 10, cy + h // 2 - 10)
    shape = ImageDraw.Draw(mask)
    (shape.ellipse if p.ellipse else shape.rectangle)(box, fill=int(p.fill))
    mask = Image.fromarray(np.asarray(mask.filter(ImageFilter.GaussianBlur(float(p.blur)))) * lungs)
    paste = Image.new("L", picture.size)
    paste.paste(patch, (cx - w // 2, cy - h // 2))
    picture.paste(paste, (0, 0), mask)
    return np.asarray(picture) / 255, np.asarray(mask) / 255


@pytest.mark.long
def test_pastes_follow_the_papers_code_at_its_own_size():
    image, lungs = textured((256, 256), 1), half_field((256, 256))
    keys = jax.random.split(jax.random.key(2), 24)
    out, soft, extras = jax.vmap(own, (0, None, None))(keys, jnp.asarray(image), jnp.asarray(lungs))
    for i in range(len(keys)):
        drawn = jax.tree.map(lambda values, i=i: np.asarray(values[i]), extras["parameters"])
        picture, mask = pillow_anatpaste(image, lungs, drawn)
        error, error_soft = np.abs(out[i, ..., 0] - picture), np.abs(soft[i] - mask)
        # Pillow has three box blurs for the Gaussian and rounds to bytes after each step
        assert error_soft.mean() < 1e-3 and error.mean() < 2e-3
        if drawn.ellipse and drawn.blur < 2:  # and up to 12 other pixels on an ellipse's rim
            assert (error_soft > 0.03).sum() < 40
        else:
            assert error_soft.max() < 0.03 and error.max() < 0.02


def test_pixels_change_inside_the_lung_field_only(pastes):
    image, lungs, _, (out, soft, _), _ = pastes
    np.testing.assert_array_equal(
        np.asarray(out)[:, ~lungs], np.broadcast_to(image[~lungs], (200, *image[~lungs].shape))
    )
    assert not np.asarray(soft)[:, ~lungs].any()
    assert soft.min() >= 0 and soft.max() <= 254 / 255 and out.min() >= 0 and out.max() <= 1


def test_each_paste_moves_its_centre_by_more_than_rounding(pastes):
    image, lungs, _, (out, _, extras), _ = pastes
    moved = np.abs(np.asarray(out) - image)[..., 0]
    centre = extras["parameters"].centre
    assert (moved[np.arange(200), centre[:, 0], centre[:, 1]] >= 0.4 / 255).all()  # bound and blur differ slightly
    assert extras["changed"].all()
    np.testing.assert_array_equal(extras["changed"], moved.max((1, 2)) >= 0.5 / 255)
    assert lungs[centre[:, 0], centre[:, 1]].all()


def test_shapes_that_the_margin_eats_are_redrawn():
    image, lungs = jnp.asarray(textured((128, 128), 1)), jnp.ones((128, 128), bool)
    keys = jax.random.split(jax.random.key(4), 200)
    # 10 px of 256: edges up to 10 of 128 leave nothing; here about half of the draws have one
    draw = jax.jit(jax.vmap(lambda key: ap.draw(key, image, image, lungs, area=(0.004, 0.02))))
    edges = np.asarray(draw(keys).edges)
    assert edges.min() == 11
    assert edges.prod(1).min() < 0.012 * 128**2  # small patches are still among them


def test_on_a_constant_image_nothing_can_change_and_the_flag_says_so(pastes):
    image, lungs, keys, _, (paste, _) = pastes
    out, soft, extras = paste(jnp.zeros_like(image), lungs, keys)
    assert not out.any() and not extras["changed"].any() and jnp.isfinite(soft).all()


def test_an_empty_lung_field_counts_as_the_whole_image(pastes):
    image, lungs, keys, _, (paste, _) = pastes
    empty = paste(image, jnp.zeros_like(lungs), keys)
    jax.tree.map(np.testing.assert_array_equal, empty, paste(image, jnp.ones_like(lungs), keys))
    assert empty[2]["changed"].all()


@pytest.fixture(scope="module")
def draws():
    """4000 draws without margin or blur, so that hardly any is replaced and the stated distributions are exact."""
    image, lungs = jnp.asarray(textured((128, 96), 1)), half_field((128, 96))
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = lambda key: ap.draw(key, image, image, jnp.asarray(lungs), margin=0.0, blur=(0, 3))
    p = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=500))(keys)
    return lungs, jax.tree.map(np.asarray, p)


def test_patches_have_uniform_area_log_uniform_aspect_and_uniform_place(draws):
    _, p = draws
    h, w = (p.edges / [128, 96]).T
    spread = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 2)) / [128, 96]  # edges are whole pixels
    h, w = h + spread[:, 0], w + spread[:, 1]
    assert scipy.stats.kstest(h * w, "uniform", (0.02, 0.13)).statistic < 0.03
    assert scipy.stats.kstest(np.log(w / h), "uniform", (np.log(0.3), -2 * np.log(0.3))).statistic < 0.03
    place = (p.corner + 0.5) / ([128, 96] - p.edges)
    assert (p.corner >= 0).all() and (p.corner + p.edges <= [128, 96]).all()
    assert scipy.stats.kstest(place[:, 0], "uniform").statistic < 0.03
    assert scipy.stats.kstest(place[:, 1], "uniform").statistic < 0.03


def test_centres_are_uniform_over_the_lungs(draws):
    lungs, p = draws
    counts = np.zeros(lungs.shape)
    np.add.at(counts, tuple(p.centre.T), 1)
    assert counts[~lungs].sum() == 0
    blocks = lambda array: array.reshape(16, 8, 12, 8).sum((1, 3))
    expected = 4000 * blocks(lungs) / lungs.sum()
    assert scipy.stats.chisquare(blocks(counts)[expected > 0], expected[expected > 0]).pvalue > 0.01


def test_shape_fill_blur_and_jitter_have_their_distributions(draws):
    _, p = draws
    assert abs(p.ellipse.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(np.unique(p.fill), np.arange(150, 255))
    assert scipy.stats.chisquare(np.bincount(p.fill.astype(int) - 150)).pvalue > 0.01
    np.testing.assert_array_equal(np.unique(p.blur), np.arange(4))
    assert scipy.stats.chisquare(np.bincount(p.blur.astype(int))).pvalue > 0.01
    for factor in (p.brightness, p.contrast, p.saturation, p.hue + 1):
        assert scipy.stats.kstest(factor, "uniform", (0.9, 0.2)).statistic < 0.03
    numbers = np.c_[p.edges.prod(1), p.corner, p.ellipse, p.fill, p.blur, p.brightness, p.contrast, p.hue, p.centre]
    correlation = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    correlation[0, 1:3] = correlation[1:3, 0] = correlation[1, 2] = correlation[2, 1] = 0  # a large patch has less room
    assert np.abs(correlation).max() < 0.06


@pytest.mark.long
def test_a_paste_does_not_depend_on_its_batch_nor_on_compilation(pastes):
    image, lungs, keys, batch, _ = pastes
    close = lambda a, b: np.testing.assert_allclose(a, b[7], atol=1e-6)
    parameters = jax.jit(ap.draw)(keys[7], image, image, lungs)
    jax.tree.map(close, parameters, batch[2]["parameters"])
    jax.tree.map(close, ap.apply(image, image, lungs, parameters), batch)  # operation by operation


def test_another_key_image_or_field_does_not_compile_again(pastes):
    image, lungs, keys, _, (paste, traces) = pastes
    for i in range(3):
        paste(image * (1 - 0.1 * i), jnp.roll(lungs, i, 0), keys[::-1])
    assert len(traces) == 1


def test_a_patch_of_another_image_equals_the_reference():
    image, source = jnp.asarray(textured((72, 72), 1)), jnp.asarray(textured((72, 72), 1, seed=1))
    keys, everywhere = jax.random.split(jax.random.key(6), 12), np.ones((72, 72), bool)
    out, soft, extras = jax.vmap(ap.anatpaste, (None, None, 0))(image, source, keys)
    assert_equals_reference(image, source, everywhere, out, soft, extras["parameters"])


@pytest.mark.long
def test_volumes_are_pasted_by_the_same_code():
    rng = np.random.default_rng(0)
    volume = jnp.asarray(scipy.ndimage.gaussian_filter(rng.normal(0.5, 1, (24, 20, 16, 1)), (2, 2, 2, 0)).clip(0, 1))
    keys = jax.random.split(jax.random.key(7), 50)
    out, soft, extras = jax.vmap(ap.anatpaste, (None, None, 0))(volume, volume, keys)
    assert extras["changed"].all() and jnp.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    np.testing.assert_array_equal(out[soft == 0], jnp.broadcast_to(volume, out.shape)[soft == 0])
    p = extras["parameters"]
    assert (p.corner >= 0).all() and (p.corner + p.edges <= np.array([24, 20, 16])).all()
    i = int(jnp.argmax(soft.max((1, 2, 3)) * (p.blur < 3)))  # deep inside, the patch as it is drawn
    at = tuple(np.asarray(p.centre[i]))
    cut = tuple(np.asarray(p.corner[i] + p.edges[i] // 2))
    box = tuple(slice(a, a + e) for a, e in zip(np.asarray(p.corner[i]), np.asarray(p.edges[i]), strict=True))
    jittered = p.brightness[i] * (p.contrast[i] * volume[cut] + (1 - p.contrast[i]) * volume[box].mean())
    expected = volume[at] + (jnp.clip(jittered, 0, 1) - volume[at]) * soft[i][at]
    np.testing.assert_allclose(out[i][at], expected, atol=1e-5)


def test_of_more_axes_the_patch_keeps_its_volume_and_its_ratios():
    ratio = jnp.array([[0.5, 2.0], [1.0, 3.0]])
    edges = ap.box_shares(jnp.full((2, 1), 0.1), ratio)
    np.testing.assert_allclose(edges.prod(1), 0.1, rtol=1e-6)
    np.testing.assert_allclose(edges[:, 1:] / edges[:, :1], ratio, rtol=1e-6)
