"""Traits of images, their ranges over a training set, and what lies outside."""

import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats

from jmae import likeness
from jmae.data.files import Image
from jmae.errors import InputError


def image(array: np.ndarray, spacing=None) -> Image:
    return Image(np.asarray(array, np.float32)[..., None], spacing, None, 8 if array.ndim == 2 else None)


def film(seed: int, shape=(60, 50)) -> np.ndarray:
    """A dark middle between bright sides, with noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.clip(60 + 120 * axes[-1] ** 2 + rng.normal(0, 8, shape) + rng.uniform(-20, 20), 0, 255)


def test_traits_are_those_of_numpy():
    array = np.random.default_rng(0).integers(0, 256, (40, 30))
    numbers, layout, _ = likeness.traits_of(image(array))
    unit = array / 255
    assert numbers["smallest axis"] == 30 and numbers["ratio of the axes"] == 40 / 30 and numbers["channels"] == 1
    assert numbers["mean"] == pytest.approx(unit.mean(), abs=1e-6)
    assert numbers["median"] == pytest.approx(np.median(unit), abs=1e-6)
    assert numbers["share of black"] == pytest.approx((unit <= 0.02).mean(), abs=1e-6)
    assert numbers["roughness"] == pytest.approx(np.abs(np.diff(unit, axis=0)).mean() / unit.std(), rel=1e-5)
    assert layout.shape == (16, 16) and np.linalg.norm(layout) == pytest.approx(1, abs=1e-5)
    assert layout.sum() == pytest.approx(0, abs=1e-4)


def test_a_volume_does_not_depend_on_the_scale_of_its_scanner():
    volume = film(0, (30, 20, 25))
    one, other = (likeness.traits_of(image(v, (2.0, 1.0, 3.0))) for v in (volume, 17 * volume - 300))
    assert one.numbers == pytest.approx(other.numbers, rel=1e-4)
    assert one.numbers["millimetres along the largest axis"] == 75
    np.testing.assert_allclose(one.layout, other.layout, atol=1e-5)


def test_a_volume_with_a_position_is_looked_at_in_one_direction_however_it_is_stored(tmp_path):
    """Another order of storage changes nothing. The same array with another affine lies another way."""
    rng = np.random.default_rng(0)
    shade = sum((k + 2) * axis for k, axis in enumerate(np.meshgrid(*(np.linspace(0, 20, n) for n in (30, 20, 25)))))
    scan = lambda: np.clip(shade + rng.normal(0, 10, shade.shape), 0, 255).astype(np.float32)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    read = lambda nifti: Image(
        np.asarray(nifti.dataobj, np.float32)[..., None], nifti.header.get_zooms(), nifti.affine, None
    )
    base = nib.Nifti1Image(scan(), affine)
    as_stored = [likeness.traits_of(read(nib.Nifti1Image(scan(), affine))) for _ in range(30)]
    likeness.write_kind(tmp_path, as_stored)
    kind = likeness.read_kind(tmp_path)
    expected = likeness.traits_of(read(base))
    assert expected.axes == kind["axes"] == "PLS" and likeness.unlike(expected, kind) == ""
    for code in ("LAS", "SPR", "PIL", "ARS"):
        way = nib.orientations.axcodes2ornt(code)
        other = base.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), way))
        assert nib.aff2axcodes(other.affine) == tuple(code)
        found = likeness.traits_of(read(other))
        assert found.numbers == pytest.approx(expected.numbers, rel=1e-4)
        np.testing.assert_allclose(found.layout, expected.layout, atol=1e-5)
        assert likeness.unlike(found, kind) == ""
        as_it_is = likeness.traits_of(read(other), "")
        assert as_it_is.axes == "" and likeness.unlike(as_it_is, kind) == "", "no direction is known: not compared"
    upside_down = nib.Nifti1Image(np.asarray(base.dataobj), affine @ np.diag([1, 1, -1, 1]))
    assert "if it were turned or mirrored" in likeness.unlike(likeness.traits_of(read(upside_down)), kind)
    del kind["axes"]  # of an earlier version, which looked at the array as it was stored
    assert likeness.unlike(likeness.traits_of(read(upside_down)), kind) == ""


@pytest.mark.parametrize("shape", [(60, 50), (30, 20, 25)])
def test_an_image_that_is_turned_or_mirrored_is_named(shape):
    rng = np.random.default_rng(0)
    shade = sum((k + 2) * axis for k, axis in enumerate(np.meshgrid(*(np.linspace(0, 20, n) for n in shape))))
    shade = shade.swapaxes(0, 1)
    scan = lambda: image(np.clip(shade + rng.normal(0, 10, shape), 0, 255))
    kind = likeness.kind_of([likeness.traits_of(scan()) for _ in range(30)])
    what = "would be more like the training images if it were turned or mirrored"
    changed = lambda change: likeness.unlike(likeness.traits_of(scan()._replace(array=change(scan().array))), kind)
    assert changed(lambda array: array) == ""
    for axis in range(len(shape)):
        assert what in changed(lambda array, axis=axis: np.flip(array, axis))


def test_no_way_to_lie_is_wrong_where_the_training_images_have_none():
    rng = np.random.default_rng(0)
    scan = lambda: image(ndimage.gaussian_filter(rng.normal(0, 1, (40, 40)), 4) * 400 + 120)
    kind = likeness.kind_of([likeness.traits_of(scan()) for _ in range(30)])
    assert not any("turned" in likeness.unlike(likeness.traits_of(scan()), kind) for _ in range(50))


@pytest.mark.parametrize("wrong", [0, 1, 4, 12])
def test_training_images_upside_down_are_found_and_widen_no_range(wrong):
    rng = np.random.default_rng(0)
    rows, columns = np.meshgrid(np.linspace(0, 1, 40), np.linspace(0, 1, 40), indexing="ij")
    scans = [80 * rows + 40 * rows * columns + rng.normal(60, 8, (40, 40)) for _ in range(40)]
    traits = [likeness.traits_of(image(scan[::-1] if i < wrong else scan)) for i, scan in enumerate(scans)]
    assert np.flatnonzero(likeness.turned(traits)).tolist() == list(range(wrong))
    kind = likeness.kind_of(traits)
    assert kind["images"] == 40 - wrong and kind["ranges"][likeness.LIKENESS][0] > 0.5
    assert "turned or mirrored" in likeness.unlike(likeness.traits_of(image(scans[-1][::-1])), kind)
    assert "turned or mirrored" not in likeness.unlike(likeness.traits_of(image(scans[-1])), kind)


def test_images_without_a_common_layout_and_few_images_are_never_turned():
    rng = np.random.default_rng(1)
    noise = [likeness.traits_of(image(rng.integers(0, 255, (30, 30)))) for _ in range(200)]
    assert not likeness.turned(noise).any()
    few = [likeness.traits_of(image(film(i))) for i in range(9)]
    assert not likeness.turned([*few[:8], likeness.traits_of(image(film(9).T[:, ::-1]))]).any()
    assert likeness.turned([*few, likeness.traits_of(image(film(9).T))]).tolist() == 9 * [False] + [True]


def test_images_of_the_kind_pass_and_others_are_named(tmp_path):
    likeness.write_kind(tmp_path, [likeness.traits_of(image(film(seed))) for seed in range(40)])
    kind = likeness.read_kind(tmp_path)
    assert kind["images"] == 40
    assert sum(bool(likeness.unlike(likeness.traits_of(image(film(seed))), kind)) for seed in range(100, 200)) <= 2
    unlike = lambda array: likeness.unlike(likeness.traits_of(image(array)), kind)
    assert unlike(np.full((60, 50), 90)) == "all its values are equal"
    assert "light and dark lie in other places (likeness to the mean image -" in unlike(255 - film(0))
    assert "likeness to the mean image" in unlike(film(0)[:, np.r_[25:50, 0:25]])
    assert "fewer pixels along the shortest side (smallest axis 13, expected 25 to 100)" in unlike(film(0)[::4, ::4])
    assert "ratio of the axes" in unlike(film(0, (400, 60)))
    assert "grey values change faster from pixel to pixel (roughness" in unlike(
        np.random.default_rng(0).integers(0, 256, (60, 50))
    )
    colour = Image(np.repeat(film(0)[..., None], 3, -1).astype(np.float32), None, None, 8)
    assert likeness.unlike(likeness.traits_of(colour), kind) == "more channels (channels 3, expected 1)"


def test_a_count_of_one_is_in_the_singular():
    assert likeness.unlike_text(1, 20) == "1 of 20 cases is unlike"
    assert likeness.unlike_text(2, 20) == "2 of 20 cases are unlike" and likeness.unlike_text(1, 1).startswith(
        "1 of 1 case"
    )


def test_a_range_is_students_prediction_interval_and_holds_all_training_images():
    rng, name = np.random.default_rng(0), "roughness"
    scale = likeness.SCALES[name]
    for n in (2, 12, 26, 400):
        values = np.exp(rng.normal(0, 0.2, n))
        low, high = likeness.range_of(name, values)
        assert low <= values.min() and values.max() <= high
        logs = np.log(values)
        t = stats.t.ppf(1 - likeness.CHANCE / len(likeness.SCALES) / 2, n - 1)
        reach = t * logs.std(ddof=1) * (1 + 1 / n) ** 0.5
        expected = np.clip([logs.mean() - reach, logs.mean() + reach], *scale.ends)
        expected = [min(expected[0], logs.min()), max(expected[1], logs.max())]
        np.testing.assert_allclose(np.log([low, high]), expected, rtol=1e-6)
    for name in likeness.SCALES:
        low, high = likeness.range_of(name, np.array([0.3]))
        least, greatest = likeness.POSSIBLE.get(name, (0, math.inf))
        assert least <= low < 0.01 and 0.5 < high <= greatest, "one image says nothing of the others"
    low, high = likeness.range_of("share of black", np.array([0, 0, 0.01, 0.02] * 5))
    assert low == 0 and 0.02 < high < 0.5
    assert likeness.range_of("largest axis", np.array([50.0, 60.0])) == (50, 60)


def test_detail_is_the_ratio_of_the_deviations_of_octaves():
    small = np.random.default_rng(0).uniform(0, 1, (64, 64)).astype(np.float32)
    blurred = [small, *(ndimage.gaussian_filter(small, width) for width in (1, 2, 4, 8))]
    octaves = [np.std(a - b) for a, b in itertools.pairwise(blurred)]
    expected = [octaves[i] / octaves[i + 1] for i in range(3)]
    np.testing.assert_allclose(list(likeness.details_of(small).values()), expected, rtol=1e-5)


def test_images_of_the_same_size_brightness_and_layout_but_other_detail_are_found():
    """Blurred along the columns alone, so that the differences along the rows, "roughness", stay."""
    kind = likeness.kind_of([likeness.traits_of(image(film(seed))) for seed in range(40)])
    blurred = [ndimage.gaussian_filter1d(film(seed), 2, axis=1) for seed in range(40, 60)]
    found = [likeness.unlike(likeness.traits_of(image(one)), kind) for one in blurred]
    assert sum("detail" in one for one in found) >= 18


def test_an_image_that_is_the_mean_of_the_training_has_no_warning():
    for seed in range(40):
        one = likeness.traits_of(image(film(seed, (40, 30))))
        assert likeness.unlike(one, likeness.kind_of([one] * 3)) == ""


@pytest.mark.parametrize("n", [12, 16, 26, 50])
def test_few_images_of_a_kind_seldom_turn_down_others_of_the_kind(n):
    """At most about 1 in 50 on average over sets of n images; other kinds are still found."""
    traits = [likeness.traits_of(image(film(seed, (40, 30)))) for seed in range(400)]
    foreign = [
        255 - film(0, (40, 30)),
        film(0, (40, 30))[::4, ::4],
        np.random.default_rng(0).integers(0, 256, (40, 30)),
    ]
    turned_down, found = [], []
    for k in range(10):
        kind = likeness.kind_of(traits[n * k : n * (k + 1)] if n * (k + 1) <= 300 else traits[:n])
        turned_down.append(np.mean([bool(likeness.unlike(one, kind)) for one in traits[300:]]))
        found.append([bool(likeness.unlike(likeness.traits_of(image(array)), kind)) for array in foreign])
    assert np.mean(turned_down) <= 0.02
    assert np.all(found)


def test_a_run_without_the_file_has_no_kind_and_a_damaged_file_is_one_line(tmp_path):
    assert likeness.read_kind(tmp_path) is None
    likeness.write_kind(tmp_path, [])
    assert not (tmp_path / likeness.TRAINED_ON).exists()
    for text in ("{", "[]", json.dumps({"images": 1, "ranges": {"mean": [0]}, "layout": []})):
        (tmp_path / likeness.TRAINED_ON).write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            likeness.read_kind(tmp_path)


def test_a_line_says_whether_its_p_value_is_an_alarm():
    line = lambda p, warning="", n=100: likeness.shown_line({"id": "a", "p_value": p, "warning": warning}, 0.05, n)
    assert [line(p)["alarm"] for p in (None, 0.01, 0.05, 0.06)] == [None, 1, 1, 0]
    assert [line(p, "mean 2")["alarm"] for p in (0.01, 0.06)] == [1, None], "a withheld p-value is no alarm and no calm"
    assert [line(0.5, n=n)["alarm"] for n in (18, 19)] == [None, 0], "18 normals give no p-value as low"
    assert list(line(0.5)) == ["id", "p_value", "alarm", "warning"]


def test_a_warning_withholds_a_p_value_above_the_alarm_rate_alone():
    line = lambda p, warning: likeness.shown_line({"p_value": p, "warning": warning}, 0.05, 100)["p_value"]
    assert [line(p, "") for p in (None, 0.05, 0.9)] == [None, 0.05, 0.9]
    assert [line(p, "mean 2") for p in (None, 0.05, 0.9)] == [None, 0.05, None]
    assert likeness.unlike(likeness.traits_of(image(film(0))), None) == "" == likeness.unlike(None, {})
