"""Traits of images, their ranges over a training set, and what lies outside."""

import json

import numpy as np
import pytest

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
    numbers, layout = likeness.traits_of(image(array))
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


def test_images_of_the_kind_pass_and_others_are_named(tmp_path):
    likeness.write_kind(tmp_path, [likeness.traits_of(image(film(seed))) for seed in range(40)])
    kind = likeness.read_kind(tmp_path)
    assert kind["images"] == 40
    assert sum(bool(likeness.unlike(likeness.traits_of(image(film(seed))), kind)) for seed in range(100, 200)) <= 2
    unlike = lambda array: likeness.unlike(likeness.traits_of(image(array)), kind)
    assert unlike(np.full((60, 50), 90)) == "all its values are equal"
    assert unlike(255 - film(0)).split(" ")[0] in ("mean", "median", "likeness")
    assert "likeness to the mean image" in unlike(film(0)[:, np.r_[25:50, 0:25]])
    assert "smallest axis 13 (training images: 50 to 50)" in unlike(film(0)[::4, ::4])
    assert "ratio of the axes" in unlike(film(0, (400, 60)))
    assert "roughness" in unlike(np.random.default_rng(0).integers(0, 256, (60, 50)))
    colour = Image(np.repeat(film(0)[..., None], 3, -1).astype(np.float32), None, None, 8)
    assert likeness.unlike(likeness.traits_of(colour), kind) == "channels 3 (training images: 1 to 1)"


def test_a_range_of_few_images_is_wider():
    numbers = lambda value: likeness.Traits({"mean": value}, np.zeros((16, 16), np.float32))
    wide = likeness.kind_of([numbers(0.2), numbers(0.6)])["ranges"]["mean"]
    narrow = likeness.kind_of([numbers(v) for v in np.linspace(0.2, 0.6, 40)])["ranges"]["mean"]
    assert narrow == pytest.approx((0.1, 0.7)) and wide == pytest.approx((0.2 - 1.0, 0.6 + 1.0))


def test_a_run_without_the_file_has_no_kind_and_a_damaged_file_is_one_line(tmp_path):
    assert likeness.read_kind(tmp_path) is None
    likeness.write_kind(tmp_path, [])
    assert not (tmp_path / likeness.TRAINED_ON).exists()
    for text in ("{", "[]", json.dumps({"images": 1, "ranges": {"mean": [0]}, "layout": []})):
        (tmp_path / likeness.TRAINED_ON).write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            likeness.read_kind(tmp_path)


def test_a_warning_withholds_a_p_value_above_the_alarm_rate_alone():
    line = lambda p, warning: likeness.without_calm_p_value({"p_value": p, "warning": warning}, 0.05)["p_value"]
    assert [line(p, "") for p in (None, 0.05, 0.9)] == [None, 0.05, 0.9]
    assert [line(p, "mean 2") for p in (None, 0.05, 0.9)] == [None, 0.05, None]
    assert likeness.unlike(likeness.traits_of(image(film(0))), None) == "" == likeness.unlike(None, {})
