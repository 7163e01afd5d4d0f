import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from jmae.anomalies import anatpaste as ap
from jmae.data.transforms import resize


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


def numpy_anatpaste(image, lungs, p, margin=10):
    """The paste of `p`, written pixel by pixel in NumPy, SciPy and colorsys."""
    height, width, c = image.shape
    scale = np.array([height, width]) / 256
    (cy, cx), (h, w), (top, left) = p.centre, p.edges, p.corner
    half = p.edges // 2 - margin * scale

    y, x = np.mgrid[:height, :width]
    if p.ellipse:
        shape = ((y - cy) / (half[0] + 0.5)) ** 2 + ((x - cx) / (half[1] + 0.5)) ** 2 <= 1
    else:
        shape = (np.abs(y - cy) <= half[0]) & (np.abs(x - cx) <= half[1])
    soft = scipy.ndimage.gaussian_filter(shape.astype(float), p.blur * scale, mode="nearest", truncate=9)
    soft = soft * lungs * p.fill / 255

    luma = np.array([0.299, 0.587, 0.114]) if c == 3 else np.ones(c) / c
    patch = image[top : top + h, left : left + w].astype(float)
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
    """200 pastes on one small image."""
    image, lungs = jnp.asarray(textured((64, 64), 1)), jnp.asarray(half_field((64, 64)))
    keys = jax.random.split(jax.random.key(0), 200)
    return image, lungs, keys, jax.vmap(ap.anatpaste, (None, None, 0))(image, lungs, keys)


@pytest.mark.parametrize(("size", "channels"), [((72, 72), 1), ((80, 56), 3)])
def test_pastes_equal_a_pixel_by_pixel_reference(size, channels):
    image, lungs = textured(size, channels), half_field(size)
    keys = jax.random.split(jax.random.key(1), 12)
    out, soft, extras = jax.vmap(ap.anatpaste, (None, None, 0))(jnp.asarray(image), jnp.asarray(lungs), keys)
    for i in range(len(keys)):
        drawn = jax.tree.map(lambda values, i=i: np.asarray(values[i]), extras["parameters"])
        expected, expected_soft = numpy_anatpaste(image, lungs, drawn)
        np.testing.assert_allclose(soft[i], expected_soft, atol=2e-6)
        np.testing.assert_allclose(out[i], expected, atol=2e-5)  # float32; hue divides by small chroma


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


def test_pastes_follow_the_papers_code_at_its_own_size():
    image, lungs = textured((256, 256), 1), half_field((256, 256))
    keys = jax.random.split(jax.random.key(2), 24)
    out, soft, extras = jax.vmap(ap.anatpaste, (None, None, 0))(jnp.asarray(image), jnp.asarray(lungs), keys)
    for i in range(len(keys)):
        drawn = jax.tree.map(lambda values, i=i: np.asarray(values[i]), extras["parameters"])
        picture, mask = pillow_anatpaste(image, lungs, drawn)
        # Pillow: three box blurs for the Gaussian, bytes after each step, and a few pixels of the ellipse's rim
        rim = 0.5 if drawn.ellipse and drawn.blur < 2 else 0.03
        error, error_soft = np.abs(out[i, ..., 0] - picture), np.abs(soft[i] - mask)
        print(i, drawn.ellipse, drawn.blur, error_soft.max(), error_soft.mean(), error.max(), error.mean())
