import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.exposure
from PIL import Image

from jmae.data import augment
from jmae.data import transforms as tf

crop_resized = jax.jit(augment.crop_resized)
random_resized_crop = jax.jit(augment.random_resized_crop, static_argnames=("scale", "aspect"))
random_warp = jax.jit(augment.random_warp, static_argnames=("offset", "degrees", "elastic", "grid", "p"))


def smooth(size, channels=1, seed=0):
    """A random image in [0, 1] with structure at several scales."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
    frequencies = rng.normal(0, 15, (len(size), 6 * channels))
    waves = np.sin(np.stack(axes, -1) @ frequencies + rng.random(6 * channels))
    stack = waves.reshape(*size, channels, 6).mean(-1)
    return ((stack - stack.min()) / np.ptp(stack)).astype(np.float32)


# ------------------------------------------------------------------------------------------ host


def test_eight_bits_keep_their_zero_and_other_depths_are_stretched():
    np.testing.assert_allclose(tf.to_unit(np.array([[10, 200]], np.uint8), 8), [[10 / 255, 200 / 255]], 1e-6)
    np.testing.assert_allclose(tf.to_unit(np.array([1000, 2000, 1250], np.uint16), 16), [0, 1, 0.25])
    np.testing.assert_allclose(tf.to_unit(np.array([-3e38, 3e38, 0], np.float32), 32), [0, 1, 0.5])


def test_constant_images_and_values_that_are_not_finite_become_defined_values():
    assert not tf.to_unit(np.full((4, 4, 1), 700, np.int16), 16).any()
    unit = tf.to_unit(np.array([2.0, np.nan, np.inf, 4.0, -np.inf]), 32)
    np.testing.assert_array_equal(unit, np.float32([0, 0, 1, 1, 0]))
    assert not tf.to_unit(np.full(3, np.nan), 32).any()
    assert unit.dtype == np.float32


def test_grey_is_pillows_luma_and_refuses_other_channel_counts():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    ours = tf.grey(rgb.astype(np.float32))
    assert ours.shape == (9, 7, 1)
    pillow = np.asarray(Image.fromarray(rgb).convert("L"), float)
    assert np.abs(ours[..., 0] - pillow).max() <= 0.51  # Pillow rounds
    single = np.ones((3, 4, 5, 1), np.float32)
    assert tf.grey(single) is single
    with pytest.raises(ValueError, match="4 channels"):
        tf.grey(np.zeros((3, 3, 4)))


@pytest.mark.parametrize("size", [(17, 12), (9, 8, 5)])
def test_resize_is_the_identity_at_the_same_size_and_exact_on_constants(size):
    image = smooth(size, 2)
    np.testing.assert_array_equal(tf.resize(image, size), image)
    smaller = tuple(n // 2 for n in size)
    constant = tf.resize(np.full((*size, 2), 0.3, np.float32), smaller)
    assert constant.shape == (*smaller, 2) and constant.dtype == np.float32
    np.testing.assert_allclose(constant, 0.3, rtol=1e-5)


def test_resize_follows_pillows_anti_aliased_filter():
    image = smooth((128, 96))
    pillow = Image.fromarray(image[..., 0]).resize((40, 50), Image.Resampling.BILINEAR)
    error = tf.resize(image, (50, 40))[..., 0] - np.asarray(pillow)
    # a Gaussian where Pillow has a triangle: the same cut-off, not the same shape
    assert np.abs(error).max() < 0.03 and abs(error.mean()) < 1e-3


def test_shrinking_does_not_alias():
    board = np.indices((64, 64)).sum(0) % 2
    assert np.ptp(tf.resize(board[..., None].astype(np.float32), (22, 22))[3:-3, 3:-3]) < 0.1


def test_area_resize_averages_what_shrinks_and_interpolates_what_grows():
    image = smooth((48, 30, 12), 2)
    cells = image.reshape(16, 3, 15, 2, 12, 2).mean((1, 3))
    np.testing.assert_allclose(tf.area_resize(image, (16, 15, 12)), cells, atol=1e-6)
    mixed = tf.area_resize(image, (16, 15, 20))
    np.testing.assert_allclose(mixed, tf.resize(cells, (16, 15, 20)), atol=1e-6)
    assert mixed.shape == (16, 15, 20, 2) and mixed.dtype == np.float32
    np.testing.assert_array_equal(tf.area_resize(image, (48, 30, 12)), image)
    pillow = Image.fromarray(image[..., 0, 0]).resize((13, 31), Image.Resampling.BOX)
    uneven = tf.area_resize(image[..., 0, :1], (31, 13))
    np.testing.assert_allclose(uneven.mean(), image[..., 0, 0].mean(), atol=1e-6)
    assert np.abs(uneven[..., 0] - np.asarray(pillow)).max() < 0.1  # Pillow takes whole pixels


def equalised_by_ranks(levels, counted):
    """The formula pixel by pixel: how many of `counted` are at most v."""
    cdf = (counted.ravel() <= levels[..., None]).sum(-1)
    least = (counted == counted.min()).sum()
    return np.round(255 * np.clip(cdf - least, 0, None) / (counted.size - least)) / 255


@pytest.mark.parametrize("size", [(40, 30), (9, 8, 7)])
def test_equalisation_is_the_formula_of_mimic_cxr_jpg_for_each_channel(size):
    image = smooth(size, 2) ** 3
    out, levels = tf.equalise(image), np.round(255 * image)
    assert out.dtype == np.float32 and out.min() == 0 and out.max() == 1
    for c in range(2):
        np.testing.assert_allclose(out[..., c], equalised_by_ranks(levels[..., c], levels[..., c]), atol=1e-6)
        share = skimage.exposure.equalize_hist(levels[..., c].astype(np.uint8))  # cdf / n
        least = (levels[..., c] == levels[..., c].min()).mean()
        np.testing.assert_allclose(out[..., c], np.round(255 * (share - least) / (1 - least)) / 255, atol=1.01 / 255)


def test_an_equalised_ramp_is_itself_and_a_constant_channel_is_nought():
    ramp = np.linspace(0, 1, 256 * 6, dtype=np.float32).reshape(48, 32, 1)
    np.testing.assert_allclose(tf.equalise(ramp), ramp, atol=1 / 255)
    levels = (np.arange(256, dtype=np.float32) / 255)[:, None, None]
    np.testing.assert_allclose(tf.equalise(levels), levels, atol=1e-6)
    mixed = tf.equalise(np.stack([np.full((5, 4), 0.7), np.arange(20).reshape(5, 4) / 19], -1))
    assert not mixed[..., 0].any() and mixed[..., 1].max() == 1


def test_equalisation_counts_only_what_is_inside_and_applies_everywhere():
    image = smooth((30, 20)) * 0.8 + 0.1
    inside = np.zeros((30, 20), bool)
    inside[5:25, 4:16] = (image[5:25, 4:16, 0] > 0.3) & (image[5:25, 4:16, 0] < 0.7)
    image[0, 0], image[0, 1], image[0, 2] = -1.0, 0.2, 2.0
    levels = np.round(255 * np.clip(image[..., 0], 0, 1))
    out = tf.equalise(image, inside)[..., 0]
    np.testing.assert_allclose(out, equalised_by_ranks(levels, levels[inside]), atol=1e-6)
    assert list(out[0, :3]) == [0, 0, 1]
    np.testing.assert_array_equal(tf.equalise(image, np.zeros_like(inside)), tf.equalise(image))


def test_mask_resize_is_pillows_nearest_and_keeps_its_values():
    mask = np.random.default_rng(1).random((37, 20)) > 0.5
    pillow = Image.fromarray(mask).resize((13, 51), Image.Resampling.NEAREST)
    resized = tf.resize_mask(mask, (51, 13))
    np.testing.assert_array_equal(resized, np.asarray(pillow))
    assert resized.dtype == bool
    labels = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    np.testing.assert_array_equal(tf.resize_mask(labels, (2, 3, 4)), labels)
    np.testing.assert_array_equal(tf.resize_mask(labels, (4, 3, 2)), np.repeat(labels, 2, 0)[:, :, 1::2])


def test_the_central_view_drops_the_same_margin_on_both_sides_of_every_axis():
    image = np.arange(10 * 20 * 5).reshape(10, 20, 5)
    view = tf.central(image)
    np.testing.assert_array_equal(view, image[1:9, 2:18, 0:5])  # 0.5 voxels round to none
    assert view.base is not None
    np.testing.assert_array_equal(tf.central(image, 1.0), image)
    assert tf.central(jnp.asarray(image), 0.5).shape == (6, 10, 3)


# ---------------------------------------------------------------------------------------- device


@pytest.mark.parametrize("box", [(3, 5, 40, 50), (0, 0, 96, 80), (10, 0, 60, 30)])
def test_a_crop_is_pillows_bicubic_resize_of_its_box(box):
    top, left, height, width = box
    image = smooth((96, 80), 2)
    ours = crop_resized(jnp.asarray(image), jnp.float32([top, left]), jnp.float32([height, width]))
    for c in range(2):
        pillow = Image.fromarray(image[..., c]).resize(
            (80, 96), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        expected = np.clip(np.asarray(pillow), image[..., c].min(), image[..., c].max())
        np.testing.assert_allclose(ours[..., c], expected, atol=2e-5)  # float32 weights on both sides


@pytest.mark.parametrize("size", [(33, 20), (12, 9, 6)])
def test_the_whole_box_is_the_image_itself(size):
    image = jnp.asarray(smooth(size, 2))
    whole = crop_resized(image, jnp.zeros(len(size)), jnp.asarray(size, jnp.float32))
    np.testing.assert_allclose(whole, image, atol=1e-5)
    drawn = random_resized_crop(image, jax.random.key(0), scale=(1, 1), aspect=(1, 1))
    np.testing.assert_allclose(drawn, image, atol=1e-5)


def test_a_volumes_box_is_cut_along_each_of_its_axes():
    ramp = np.stack(np.meshgrid(*(np.arange(n) for n in (12, 10, 8)), indexing="ij"), -1).astype(np.float32)
    origin, edges = np.array([3, 2, 2]), np.array([6, 5, 4])
    out = np.asarray(crop_resized(jnp.asarray(ramp), jnp.float32(origin), jnp.float32(edges)))
    for axis, n in enumerate((12, 10, 8)):  # cubic interpolation reproduces a ramp
        line = np.moveaxis(out[..., axis], axis, 0).reshape(n, -1)[:, 0]
        expected = origin[axis] + (np.arange(n) + 0.5) * edges[axis] / n - 0.5
        np.testing.assert_allclose(line, expected, atol=1e-4)


def test_crops_never_leave_the_range_of_their_image():
    steps = jnp.asarray(np.indices((40, 40)).sum(0) // 10 % 2, jnp.float32)[..., None]
    keys = jax.random.split(jax.random.key(0), 32)
    out = jax.vmap(random_resized_crop, (None, 0))(steps, keys)
    assert out.min() >= 0 and out.max() <= 1


def boxes(size, scale, aspect, draws=4000):
    keys = jax.random.split(jax.random.key(3), draws)
    origin, edges = jax.jit(jax.vmap(lambda key: augment.crop_box(key, size, scale, aspect)))(keys)
    return np.asarray(origin), np.asarray(edges)


def test_boxes_have_uniform_area_and_log_uniform_aspect_and_fit():
    # at most half the area, so that each draw fits and nothing is rejected: the distributions are exact
    origin, edges = boxes((1000, 1000), (0.2, 0.5), (3 / 4, 4 / 3))
    area, log_aspect = edges.prod(1) / 1e6, np.log(edges[:, 1] / edges[:, 0])
    assert scipy.stats.kstest(area, "uniform", (0.2, 0.3)).pvalue > 0.01
    assert scipy.stats.kstest(log_aspect, "uniform", (np.log(3 / 4), 2 * np.log(4 / 3))).pvalue > 0.01
    place = origin / (1000 - edges)
    assert scipy.stats.kstest(place[:, 0], "uniform").pvalue > 0.01
    assert scipy.stats.kstest(place[:, 1], "uniform").pvalue > 0.01
    assert np.abs(np.corrcoef(np.c_[area, log_aspect, place].T) - np.eye(4)).max() < 0.06


def test_boxes_are_distributed_as_torchvisions():
    """torchvision's algorithm, written out in NumPy, on a square image where redraws are frequent."""
    rng, expected = np.random.default_rng(0), []
    while len(expected) < 4000:
        for _ in range(10):
            target, ratio = 64 * 64 * rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
            if 0 < w <= 64 and 0 < h <= 64:
                expected.append((rng.integers(0, 64 - h + 1), rng.integers(0, 64 - w + 1), h, w))
                break
        else:
            expected.append((0, 0, 64, 64))
    ours = np.concatenate(boxes((64, 64), (0.5, 1.0), (3 / 4, 4 / 3)), 1)
    for column in range(4):
        assert scipy.stats.ks_2samp(ours[:, column], np.array(expected)[:, column]).pvalue > 0.01


def test_boxes_of_volumes_share_the_volume_and_keep_the_images_proportions():
    size = np.array([240, 168, 8])
    origin, edges = boxes((240, 168, 8), (0.3, 0.6), (3 / 4, 4 / 3))
    assert ((edges >= 1) & (origin >= 0) & (origin + edges <= size)).all()
    np.testing.assert_allclose((edges / size).prod(1).mean(), 0.45, atol=0.01)
    relative = np.log(edges[:, 1] / 168) - np.log(edges[:, 0] / 240)
    assert np.abs(relative).max() < np.log(4 / 3) + 0.02 and abs(relative.mean()) < 0.02


@pytest.mark.parametrize(("aspect", "edges"), [((3 / 4, 4 / 3), (60, 60)), ((2, 3), (30, 60)), ((0.2, 0.5), (60, 30))])
def test_where_no_draw_fits_the_largest_centred_box_is_taken(aspect, edges):
    origin, taken = augment.crop_box(jax.random.key(0), (60, 60), (20, 30), aspect)
    np.testing.assert_array_equal(taken, edges)
    np.testing.assert_array_equal(origin, (60 - np.array(edges)) // 2)


@pytest.mark.parametrize("size", [(8, 6), (5, 4, 3)])
def test_flips_mirror_each_named_axis_half_of_the_time(size):
    image = np.arange(np.prod(size), dtype=np.float32).reshape(*size, 1)
    keys = jax.random.split(jax.random.key(0), 400)
    out = np.asarray(jax.jit(jax.vmap(lambda key: augment.random_flip(jnp.asarray(image), key, (0, 1))))(keys))
    forms = [np.flip(image, axes) for axes in ((), (0,), (1,), (0, 1))]
    counts = [sum(np.array_equal(o, form) for o in out) for form in forms]
    assert sum(counts) == 400
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_one_key_moves_an_image_and_its_companion_alike_and_batches_change_nothing():
    image, keys = jnp.asarray(smooth((20, 24))), jax.random.split(jax.random.key(5), 3)
    move = jax.jit(lambda image, key: augment.random_flip(augment.random_resized_crop(image, key), key, (1,)))
    batch = jax.vmap(move)(jnp.stack([jnp.concatenate([1 - image, image], -1)] * 3), keys)
    for out, key in zip(batch, keys, strict=True):
        np.testing.assert_allclose(out[..., 1:], move(image, key), atol=1e-5)


@pytest.mark.long
def test_compiled_crops_equal_plain_ones_and_another_box_does_not_compile_again():
    traces = []

    @jax.jit
    def crop(image, key):
        traces.append(1)
        return augment.random_resized_crop(image, key)

    for seed in range(3):
        image, key = jnp.asarray(smooth((16, 16), seed=seed)), jax.random.key(seed)
        np.testing.assert_allclose(crop(image, key), augment.random_resized_crop(image, key), atol=1e-5)
    assert len(traces) == 1


def ramps(size):
    """Each voxel's own coordinates as channels: a warp of them is the map of coordinates itself."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1).astype(np.float32)


@pytest.mark.parametrize("size", [(13, 11), (7, 6, 5)])
def test_a_warp_that_is_off_or_never_drawn_is_the_identity(size):
    image = jnp.asarray(smooth(size, 2))
    assert augment.random_warp(image, jax.random.key(0)) is image
    never = random_warp(image, jax.random.key(0), offset=0.3, degrees=20, elastic=0.1, p=0.0)
    np.testing.assert_array_equal(never, image)


@pytest.mark.parametrize("size", [(41, 41), (40, 56), (33, 40, 5)])
def test_a_rotation_is_scipys_by_the_same_angle_in_the_plane_of_the_first_two_axes(size):
    image = np.concatenate([ramps(size), smooth(size, 2)], -1)
    for seed in range(3):
        out = np.asarray(random_warp(jnp.asarray(image), jax.random.key(seed), degrees=30, p=1.0))
        middle = tuple(n // 2 for n in size)
        step = out[(middle[0] + 1, *middle[1:])] - out[middle]
        angle = np.degrees(np.arctan2(step[1], step[0]))
        assert abs(angle) <= 30
        from_middle = np.moveaxis(ramps(size)[..., :2] - (np.array(size[:2]) - 1) / 2, -1, 0)
        inside = np.hypot(*from_middle) < min(size[:2]) / 2 - 2
        turned = scipy.ndimage.rotate(image, -angle, (1, 0), reshape=False, order=1)
        np.testing.assert_allclose(out[inside], turned[inside], atol=2e-3)


@pytest.mark.parametrize("size", [(40, 40), (24, 30, 12)])
def test_scaling_is_a_resized_crop_of_the_same_share_of_every_edge(size):
    for seed in range(3):
        key = jax.random.key(seed)
        coordinates = np.asarray(random_warp(jnp.asarray(ramps(size)), key, offset=0.4, p=1.0))
        middle = tuple(n // 2 for n in size)
        shares = [
            coordinates[(*middle[:i], middle[i] + 1, *middle[i + 1 :])][i] - coordinates[middle][i]
            for i in range(len(size))
        ]
        np.testing.assert_allclose(shares, shares[0], atol=1e-4)
        assert 0.6 - 1e-4 <= shares[0] <= 1
        origin = coordinates[middle] + 0.5 - (np.array(middle) + 0.5) * shares[0]
        edges = np.array(size) * shares[0]
        assert (origin >= -1e-3).all() and (origin + edges <= np.array(size) + 1e-3).all()
        image = smooth(size)
        out = random_warp(jnp.asarray(image), key, offset=0.4, p=1.0)[..., 0]
        grids = [o + (np.arange(n) + 0.5) * shares[0] - 0.5 for o, n in zip(origin, size, strict=True)]
        places = np.meshgrid(*grids, indexing="ij")
        crop = scipy.ndimage.map_coordinates(image[..., 0], places, order=1, mode="nearest")
        np.testing.assert_allclose(out, crop, atol=1e-3)


@functools.cache
def many_warps(size, **settings):
    warp = lambda key, p: augment.random_warp(jnp.asarray(ramps(size)), key, p=p, **settings)
    return jax.jit(jax.vmap(warp, (0, None)))


def warped(size, keys=2000, p=1.0, **settings):
    """The maps of coordinates (keys, *size, d) of many warps."""
    return np.asarray(many_warps(size, **settings)(jax.random.split(jax.random.key(7), keys), p))


def test_each_of_the_three_is_drawn_with_its_own_coin():
    own = ramps((9, 9))
    moved = [
        np.abs(warped((9, 9), p=0.3, **{name: value}) - own).max((1, 2, 3)) > 1e-6
        for name, value in (("offset", 0.5), ("degrees", 30.0), ("elastic", 0.1))
    ]
    bound = 4 * np.sqrt(0.3 * 0.7 / 2000)
    assert all(abs(m.mean() - 0.3) < bound for m in moved)
    assert np.abs(np.corrcoef(moved) - np.eye(3)).max() < 0.09
    together = np.abs(warped((9, 9), p=0.3, offset=0.5, degrees=30.0, elastic=0.1) - own).max((1, 2, 3)) > 1e-6
    np.testing.assert_array_equal(together, moved[0] | moved[1] | moved[2])


def test_angles_shares_and_places_are_uniform():
    maps = warped((9, 9), degrees=30.0)
    angles = np.degrees(np.arctan2(*np.moveaxis(maps[:, 5, 4] - maps[:, 4, 4], -1, 0)[::-1]))
    assert scipy.stats.kstest(angles, "uniform", (-30, 60)).pvalue > 0.01
    maps = warped((9, 9), offset=0.5)
    share = maps[:, 5, 4, 0] - maps[:, 4, 4, 0]
    assert scipy.stats.kstest(share, "uniform", (0.5, 0.5)).pvalue > 0.01
    place = (maps[:, 4, 4] + 0.5 - 4.5 * share[:, None]) / (9 * (1 - share[:, None]))
    big = share < 0.95  # elsewhere float32 leaves little of the place
    assert all(scipy.stats.kstest(place[big, i], "uniform").pvalue > 0.01 for i in range(2))
    assert np.abs(np.corrcoef(np.c_[share, place][big].T) - np.eye(3)).max() < 0.09


@pytest.mark.parametrize("size", [(45, 27), (15, 9, 27)])
@pytest.mark.long_but_first
def test_displacements_are_normal_in_shares_of_each_edge_and_smooth(size):
    keys = 2000 if len(size) == 2 else 500
    shifts = warped(size, keys, elastic=0.05) - ramps(size)
    middle = shifts[(slice(None), *(n // 2 for n in size))]  # a point of the grid: the drawn value itself
    for i, n in enumerate(size):
        assert scipy.stats.kstest(middle[:, i], "norm", (0, 0.05 * n)).pvalue > 0.01
    assert np.abs(np.corrcoef(middle.T) - np.eye(len(size))).max() < 0.15
    inner = shifts[(slice(None), *(slice(n // 3, n - n // 3) for n in size))]
    for axis, n in enumerate(size, 1):
        assert np.abs(np.diff(inner, axis=axis)[..., axis - 1]).mean() < 3 * 0.05 * n / (n / 3)


@pytest.mark.long
def test_compiled_and_batched_warps_equal_plain_ones_and_compile_once():
    traces = []
    warp = lambda image, key: augment.random_warp(image, key, offset=0.3, degrees=10, elastic=0.02)

    @jax.jit
    def batch(images, keys):
        traces.append(1)
        return jax.vmap(warp)(images, keys)

    images, keys = jnp.asarray([smooth((16, 12), 2, 1), smooth((16, 12), 2)]), jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(batch(images, keys)[1], warp(images[1], keys[1]), atol=1e-5)
    batch(images + 1, jax.random.split(jax.random.key(1)))
    assert len(traces) == 1
