"""What a command keeps of the files that it opened: each is decoded once."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from ml_collections import ConfigDict
from patients import arguments, write_patients

from jmae import train
from jmae.data.cases import ArrayFile, Bits, load_cases, smallest_type
from jmae.data.files import reading
from jmae.data.manifest import parse_manifest
from jmae.data.preparation import lesion_mask, prepared_image, prepared_volume, scored_region, stored_image
from jmae.data.volumes import read_subtraction
from jmae.errors import exit_code
from jmae.recipe import parse


@pytest.fixture
def decoded(monkeypatch):
    """How often each file was decoded."""
    counts, real = Counter(), reading._opened

    @contextmanager
    def counting(path):
        with real(path) as header:
            yield header._replace(decode=lambda: counts.update([str(path)]) or header.decode())

    monkeypatch.setattr(reading, "_opened", counting)
    return counts


def files_of(rows):
    return {file for row in rows for file in (*row.image, *row.pre, *row.post, row.mask, row.region) if file}


@pytest.mark.xfail(strict=True, reason="the evaluator reads the files again")
def test_training_with_evaluation_decodes_each_image_file_once(tmp_path, tools, decoded):
    counts = {("train", 0): 6, ("unlabeled", None): 6, ("val", 0): 3, ("val", 1): 3, ("test", 0): 4, ("test", 1): 4}
    manifest = tools.write_set(tmp_path / "set", counts)
    short = "pretrain.steps=2 proxy.steps=2 adapt.steps=2".split()
    assert exit_code(train.main, tools.arguments(manifest, tmp_path / "run", *short)) == 0
    assert decoded == dict.fromkeys(files_of(parse_manifest(manifest)[0]), 1)


@pytest.mark.xfail(strict=True, reason="the evaluator reads the files again")
def test_training_with_evaluation_decodes_each_volume_file_once(tmp_path, decoded):
    (tmp_path / "set").mkdir()
    manifest = write_patients(tmp_path / "set")
    assert exit_code(train.main, arguments(manifest, tmp_path / "run", "train.steps=2")) == 0
    assert decoded == dict.fromkeys(files_of(parse_manifest(manifest, crops=True, normal_crops_only=True)[0]), 1)


def test_kept_volumes_equal_those_that_are_prepared_anew(tmp_path):
    (tmp_path / "set").mkdir()
    manifest = write_patients(tmp_path / "set")
    config, _ = parse([word for word in arguments(manifest, tmp_path) if "workdir" not in word], "")
    cases = load_cases(config, str, folder=tmp_path / "cache")
    for row in [row for row in cases.rows if row.split == "test"]:
        found, expected = cases.volume(row), prepared_volume(row, config.data)
        for name in ("array", "region", "lesion", "mean", "std"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_array_equal(found.stored.array, expected.stored.array)
        np.testing.assert_array_equal(cases.lesion(row), lesion_mask(row, expected.stored))
        np.testing.assert_array_equal(cases.region(row), scored_region(row, expected.stored, config.data))
        if row.pre and row.post:
            np.testing.assert_array_equal(cases.subtraction(row, found), read_subtraction(row, expected, config.data))
        assert (found.side, found.midline, found.grid.size) == (expected.side, expected.midline, expected.grid.size)


def test_kept_images_equal_those_that_are_read_anew(small_set):
    data = {"size": (32, 32), "channels": 1, "manifest": str(small_set), "phantom": "", "normal_crops_only": False}
    config = ConfigDict({"data": data})
    cases = load_cases(config, str)
    rows = [row for row in cases.rows if row.split == "test"]
    images = cases.images(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(images.image(np.array([i]))[0], prepared_image(row, config.data))
        stored = stored_image(row)
        assert cases.record(row).geometry.size == stored.size
        np.testing.assert_array_equal(cases.lesion(row), lesion_mask(row, stored))


def test_arrays_of_a_temporary_file_come_back_and_leave_nothing(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5, 4, 3)).astype(np.float32), rng.random((7, 3)) > 0.5, np.arange(6, dtype=np.int16)]
    file = ArrayFile(tmp_path / "cache")
    for array, read in [(array, file.add(array)) for array in arrays]:
        np.testing.assert_array_equal(read(), array)
        assert read().dtype == array.dtype
    assert file.add(None)() is None and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("size", [(3, 5), (9, 7, 5)])
def test_a_mask_comes_back_from_its_bits(size):
    mask = np.random.default_rng(0).random(size) > 0.7
    np.testing.assert_array_equal(Bits.of(mask).mask(), mask)
    assert Bits.of(None) is None


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 255], "uint8"), ([0, 65535], "uint16"), ([-1, 5], "int16"), ([0, 1.5], "float32"), ([-0.0, 1], "float32")],
)
def test_the_smallest_type_holds_the_values_exactly(values, dtype):
    small = smallest_type(np.float32(values))
    assert small.dtype == dtype
    np.testing.assert_array_equal(small.astype(np.float32), np.float32(values))
