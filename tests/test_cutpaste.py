import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from jmae.anomalies import cutpaste as cp


def textured(size, channels, seed=0):
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (*size, channels)), (2,) * len(size) + (0,))
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def numpy_cutpaste(image, source, p):
    """The paste of `p`, pixel by pixel."""
    c, d = image.shape[-1], image.ndim - 1
    luma = np.array([0.299, 0.587, 0.114]) if c == 3 else np.ones(c) / c
    patch = source[tuple(slice(a, a + e) for a, e in zip(p.corner, p.edges, strict=True))].astype(float)
    patch = patch * p.brightness
    patch = p.contrast * patch + (1 - p.contrast) * (patch @ luma).mean()
    if c == 3:
        patch = p.saturation * patch + (1 - p.saturation) * (patch @ luma)[..., None]
    patch = patch.clip(0, 1)
    if c == 3:
        for pixel in patch.reshape(-1, 3):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            pixel[:] = colorsys.hsv_to_rgb((hue + p.hue) % 1, saturation, value)

    turn = np.eye(d)
    turn[:2, :2] = [[np.cos(p.angle), np.sin(p.angle)], [-np.sin(p.angle), np.cos(p.angle)]]
    extent = np.ceil(np.abs(turn.T) @ p.edges - 1e-5)
    out, pasted = image.astype(float), np.zeros(image.shape[:-1], bool)
    for index in np.ndindex(*image.shape[:-1]):
        inner = turn @ (np.array(index) + 0.5 - p.place - extent / 2) + p.edges / 2
        if (inner >= 0).all() and (inner < p.edges).all():
            out[index], pasted[index] = patch[tuple(inner.astype(int))], True
    return out, pasted


def all_of(p, i):
    return jax.tree.map(lambda values: np.asarray(values[i]), p)


@pytest.mark.parametrize(
    ("size", "channels", "lengths"),
    [
        pytest.param((48, 36), 3, {}, id="oblong colour"),
        pytest.param((48, 48), 1, {"width": (8, 40), "length": (60, 200)}, id="large scars"),
        pytest.param((20, 16, 12), 2, {"width": (20, 60), "length": (60, 160)}, id="volume"),
    ],
)
@pytest.mark.long_but_first
def test_pastes_equal_a_pixel_by_pixel_reference(size, channels, lengths):
    image, source = jnp.asarray(textured(size, channels)), jnp.asarray(textured(size, channels, seed=1))
    keys = jax.random.split(jax.random.key(0), 10)
    paste = lambda key: cp.cutpaste(image, source, key, **lengths)
    out, target, extras = jax.vmap(paste)(keys)
    scars = extras["parameters"].scar
    assert scars.any() and not scars.all()
    for i in range(len(keys)):
        expected, pasted = numpy_cutpaste(np.asarray(image), np.asarray(source), all_of(extras["parameters"], i))
        visible = pasted & (np.abs(expected - image).max(-1) >= 0.5 / 255)
        wrong = np.abs(out[i] - np.where(visible[..., None], expected, image)).max(-1) > 2e-5
        # float32 decides otherwise about a change of just half a grey level, and about a pixel on a turned edge
        assert (wrong | (target[i] != visible)).sum() <= (3 if scars[i] else 1)
    alone = cp.cutpaste(image, source, keys[5], **lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[5], atol=1e-6), alone, (out, target, extras))


def test_outside_the_target_nothing_changes():
    image = jnp.asarray(textured((40, 40), 1))
    out, target, _ = jax.vmap(cp.cutpaste, (None, None, 0))(image, image, jax.random.split(jax.random.key(1), 50))
    moved = np.abs(out - image)[..., 0]
    assert not moved[target == 0].any() and (moved[target == 1] >= 0.5 / 255).all()
    assert out.min() >= 0 and out.max() <= 1 and target.any((1, 2)).all()


def test_a_box_pasted_where_it_was_cut_changes_nothing():
    image = jnp.asarray(textured((40, 40), 1))
    p = jax.jit(lambda key: cp.draw(key, (40, 40), style="normal", jitter=0.0))(jax.random.key(2))
    out, target, _ = jax.jit(cp.apply)(image, image, p._replace(place=p.corner))
    np.testing.assert_array_equal(out, image)
    assert not target.any()


@pytest.fixture(scope="module")
def draws():
    keys = jax.random.split(jax.random.key(3), 4000)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: cp.draw(key, (1024, 768))))(keys))


def test_boxes_have_the_stated_share_and_ratio(draws):
    normal = ~draws.scar
    assert abs(normal.mean() - 0.5) < 0.03 and not draws.angle[normal].any()
    h, w = (draws.edges[normal] / [1024, 768]).T
    assert scipy.stats.kstest(h * w, "uniform", (0.02, 0.13)).statistic < 0.04
    ratio = w / h
    wide = ratio > 1
    assert abs(wide.mean() - 0.5) < 0.04
    assert scipy.stats.kstest(ratio[wide], "uniform", (1, 2.3)).statistic < 0.05
    assert scipy.stats.kstest(ratio[~wide], "uniform", (0.3, 0.7)).statistic < 0.05


def test_scars_have_the_stated_width_length_and_angle(draws):
    edges = draws.edges[draws.scar] / (np.array([1024, 768]) / 256)
    assert scipy.stats.kstest(edges[:, 0], "uniform", (10, 15)).statistic < 0.04
    assert scipy.stats.kstest(edges[:, 1], "uniform", (2, 14)).statistic < 0.04
    assert scipy.stats.kstest(np.rad2deg(draws.angle[draws.scar]), "uniform", (-45, 90)).statistic < 0.04


def test_places_and_jitter_are_uniform(draws):
    room = np.array([1024, 768]) - draws.edges + 1
    assert (draws.corner >= 0).all() and (draws.corner < room).all()
    for axis in range(2):
        assert scipy.stats.kstest((draws.corner / room)[:, axis], "uniform").statistic < 0.03
    extent = np.asarray(jax.vmap(cp.bounding_box)(draws.edges, draws.angle))
    room = np.array([1024, 768]) - extent + 1
    assert (draws.place >= 0).all() and (draws.place < room).all()
    assert scipy.stats.kstest((draws.place / room).ravel(), "uniform").statistic < 0.03
    for factor in (draws.brightness, draws.contrast, draws.saturation, draws.hue + 1):
        assert scipy.stats.kstest(factor, "uniform", (0.9, 0.2)).statistic < 0.03
    place = draws.corner / (np.array([1024, 768]) - draws.edges + 1)
    numbers = np.c_[place, draws.brightness, draws.contrast, draws.saturation, draws.hue, draws.scar]
    assert np.abs(np.corrcoef(numbers.T) - np.eye(7)).max() < 0.06


def test_a_style_is_one_of_three():
    image, keys = jnp.asarray(textured((24, 24), 1)), jax.random.split(jax.random.key(4), 20)
    styled = lambda style: jax.jit(jax.vmap(lambda key: cp.draw(key, (24, 24), style=style)))(keys).scar
    assert styled("scar").all() and not styled("normal").any()
    with pytest.raises(ValueError, match="'scars'"):
        cp.cutpaste(image, image, keys[0], style="scars")


def test_another_key_or_image_does_not_compile_again():
    traces = []

    @jax.jit
    def paste(image, key):
        traces.append(1)
        return cp.cutpaste(image, image, key)

    for i in range(5):
        paste(jnp.asarray(textured((24, 24), 1, i)), jax.random.key(i))
    assert len(traces) == 1
