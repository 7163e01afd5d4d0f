"""What a command keeps of the files that it opened: each is decoded once."""

from collections import Counter
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from patients import arguments, write_patients

from jmae import evaluate, predict, train
from jmae.data.cases import ArrayFile, Bits, Cases, load_cases, smallest_type
from jmae.data.files import reading
from jmae.data.manifest import parse_manifest
from jmae.data.preparation import open_case, prepared_case
from jmae.data.rows import ManifestError, listed_rows
from jmae.errors import InputError, exit_code
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


@pytest.mark.long
def test_training_with_evaluation_decodes_each_image_file_once(tmp_path, tools, decoded):
    counts = {("train", 0): 6, ("unlabeled", None): 6, ("val", 0): 3, ("val", 1): 3, ("test", 0): 4, ("test", 1): 4}
    manifest = tools.write_set(tmp_path / "set", counts)
    short = "pretrain.steps=2 proxy.steps=2 adapt.steps=2".split()
    assert exit_code(train.main, tools.arguments(manifest, tmp_path / "run", *short)) == 0
    assert decoded == dict.fromkeys(files_of(parse_manifest(manifest)[0]), 1)


@pytest.mark.long
def test_each_command_decodes_each_volume_file_once(tmp_path, decoded):
    (tmp_path / "set").mkdir()
    manifest, run = write_patients(tmp_path / "set"), tmp_path / "run"
    rows = parse_manifest(manifest, crops=True, normal_crops_only=True)[0]
    again, new = f"--out={tmp_path / 'again'}", f"--out={tmp_path / 'new'}"
    convergence = ["--config.evaluation.repeats=2", "--config.evaluation.convergence=2"]
    predicted = [row._replace(mask=None, pre=(), post=()) for row in rows]  # columns that it does not read
    for command, words, read in (
        (train, arguments(manifest, run, "train.steps=2"), rows),
        (evaluate, [f"--workdir={run}", again, *convergence], rows),
        (predict, [f"--workdir={run}", new, f"--manifest={manifest}"], predicted),
    ):
        decoded.clear()
        assert exit_code(command.main, words) == 0
        assert decoded == dict.fromkeys(files_of(read), 1), command.__name__


def check_equal(kept, fresh):
    """Checks that a case that was kept is the one that is prepared anew."""
    names = "array lesion region subtraction geometry.affine digest moments".split()
    volume = "array region lesion mean std stored.array stored.affine side midline grid.size".split()
    for name in [*names, *(f"volume.{name}" for name in volume if fresh.volume)]:
        found, expected = (attrgetter(name)(case) for case in (kept, fresh))
        assert (found is None) == (expected is None), name
        np.testing.assert_array_equal(found, expected, name)


def test_kept_volumes_equal_those_that_are_prepared_anew(tmp_path):
    (tmp_path / "set").mkdir()
    manifest = write_patients(tmp_path / "set")
    config, _ = parse([word for word in arguments(manifest, tmp_path) if "workdir" not in word], "")
    cases = load_cases(config, str, folder=tmp_path / "cache")
    rows = [row for row in cases.rows if row.split == "test"]
    for row in rows:
        check_equal(cases.case(row), prepared_case(row, config.data, open_case(row, config.data)))
    assert any(cases.case(row).subtraction is not None for row in rows)


def test_kept_images_equal_those_that_are_prepared_anew(small_set):
    config, _ = parse(["--config=configs/amae.py:smoke", f"--config.data.manifest={small_set}"], "")
    cases = load_cases(config, str)
    for row in [row for row in cases.rows if row.split == "test"]:
        kept, fresh = cases.case(row), prepared_case(row, config.data, open_case(row, config.data))
        check_equal(kept, fresh)
        assert kept.stored is None and kept.film() == fresh.film()


def test_a_kept_case_takes_the_leak_of_its_row(small_set):
    config, _ = parse(["--config=configs/amae.py:smoke", f"--config.data.manifest={small_set}"], "")
    cases = load_cases(config, str)
    row = cases.rows[-1]._replace(leak="the image of another")
    assert cases.case(row).row == row


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


def test_new_scans_that_are_damaged_are_left_out_and_others_stop_the_command(tmp_path, tools, monkeypatch, capsys):
    manifest = tools.write_set(tmp_path, {("train", 0): 3, ("val", 0): 2, ("test", None): 3, ("test", 0): 1})
    config, _ = parse(["--config=ppii:smoke", f"--config.data.manifest={manifest}"], "")
    new, old = (
        [row for row in parse_manifest(manifest)[0] if row.split == "test" and row.label == x] for x in (None, 0)
    )
    (damaged, *others), kept = (Path(row.image[0]) for row in new), Path(old[0].image[0])
    damaged.write_bytes(damaged.read_bytes()[:60])
    cases = load_cases(config)
    assert new[0].id not in {row.id for row in cases.rows} and len(cases.rows) == 8
    assert len(cases.unread) == 1 and cases.unread[0].startswith(f"{new[0].id}: {damaged}: ")
    assert f"warning: left out, as it cannot be read: {cases.unread[0]}" in capsys.readouterr().out
    real = Cases.take
    monkeypatch.setattr(Cases, "take", lambda *given: (_ for _ in ()).throw(InputError("/tmp: not written")))
    with pytest.raises(InputError, match="/tmp: not written"):
        load_cases(config)
    monkeypatch.setattr(Cases, "take", real)
    capsys.readouterr()
    good = kept.read_bytes()
    kept.write_bytes(b"")
    with pytest.raises(InputError, match=f"{kept}: is empty"):
        load_cases(config)
    kept.write_bytes(good)
    others[0].unlink()
    with pytest.raises(InputError, match=f"{others[0]}: not found"):
        load_cases(config)
    for file in others:
        file.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        load_cases(config)


def test_all_problems_of_a_manifest_are_told_at_once_and_damaged_scans_leak_too(tmp_path, tools):
    manifest = tools.write_set(tmp_path, {("train", 0): 3, ("test", None): 3})
    config, _ = parse(["--config=ppii:smoke", f"--config.data.manifest={manifest}"], "")
    rows = parse_manifest(manifest)[0]
    old, new = rows[0], rows[-1]
    text = manifest.read_text().replace(f",{new.patient},", f",{old.patient},")
    manifest.write_text(text)
    Path(new.image[0]).write_bytes(b"")
    said = []
    for read in (listed_rows, load_cases):
        with pytest.raises(ManifestError, match=f"patient '{old.patient}' is in train and test") as error:
            read(config)
        said.append(str(error.value))
    assert said[0] == said[1] and [one.rows[-1].id for one in error.value.leaks] == [new.id]
    lines = text.splitlines()
    manifest.write_text("\n".join([lines[0], *(line.replace(",0,", ",normal,") for line in lines[1:])]))
    Path(old.image[0]).write_bytes(b"")
    with pytest.raises(ManifestError) as error:
        listed_rows(config)
    assert ["label 'normal'" in line for line in str(error.value).splitlines()] == [True, True, True, False]
    with pytest.raises(ManifestError) as error:
        load_cases(config)
    *labels, file, leak = str(error.value).splitlines()
    assert (
        len(labels) == 3 and file.startswith(f"{old.id}: {old.image[0]}: is empty") and "is in train and test" in leak
    )
