"""Order, position and content of batches, and the rows that go into them."""

import csv
import hashlib
import json
from types import SimpleNamespace

import jax
import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jmae.data import loader
from jmae.data.cases import load_rows
from jmae.data.loader import Images, batches
from jmae.data.manifest import Row, folded
from jmae.data.preparation import case_words, open_case, stored_image, usable
from jmae.data.unlabeled import unlabeled_labels, with_anomaly_ratio
from jmae.errors import InputError
from jmae.recipe import SHARED


def config(size=(8, 8), channels=1, **data) -> ConfigDict:
    """The section `data` of a recipe of images, with the options of an unlabelled set."""
    declared = {key.removeprefix("data."): one.default for key, one in SHARED.items() if key.startswith("data.")}
    further = {"size": size, "channels": channels, "anomaly_ratio": -1.0, "unlabeled_size": 0, "unlabeled_labels": ""}
    return ConfigDict({"data": declared | further | data})


@pytest.fixture
def images(tmp_path):
    """Ten 8 x 8 images; every pixel of image i is i / 9."""
    rows = []
    for i in range(10):
        array = np.full((8, 8), i, np.uint8)
        array[0] = 255
        np.save(tmp_path / f"{i}.npy", array)
        rows.append(Row(id=f"case {i}", patient="", split="train", label=0, image=(str(tmp_path / f"{i}.npy"),)))
    return Images(rows, config())


def stream(images, tables, n, *, batch=4, seeds=(0,), shuffle=True, host=None):
    iterator = batches(images, tables, batch=batch, seeds=seeds, shuffle=shuffle, host=host or {})
    return [next(iterator) for _ in range(n)]


def numbers(got) -> list:
    return [b["index"].tolist() for b in got]


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch(images):
    order = np.array(numbers(stream(images, [np.arange(10)], 6))).reshape(3, 8)
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(10)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3, "epochs differ"
    whole = np.array(numbers(stream(images, [np.arange(8)], 4))).reshape(2, 8)
    assert all(sorted(epoch) == list(range(8)) for epoch in whole.tolist())


def test_order_follows_the_seed(images):
    a, b, c = (numbers(stream(images, [np.arange(10)], 4, seeds=[s])) for s in (0, 0, 1))
    assert a == b != c


def test_without_shuffling_rows_come_round_and_round(images):
    assert numbers(stream(images, [np.arange(10)], 4, shuffle=False)) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
        [2, 3, 4, 5],
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_table_shorter_than_a_batch_is_repeated_to_fill_one(images, shuffle):
    table = np.array([5, 7, 9])
    for got in stream(images, [table], 5, shuffle=shuffle):
        assert len(set(got["index"].tolist())) == 4, "each repetition has a number, and so a key, of its own"
        np.testing.assert_array_equal(got["case"], images.words[table[got["index"] % 3]])


def test_a_batch_holds_the_table_s_rows(images):
    table = np.array([9, 3, 4, 0, 8])
    for got in stream(images, [table], 3):
        row = table[got["index"]]
        np.testing.assert_array_equal(got["image"], images.image(row))
        np.testing.assert_array_equal(got["case"], [case_words(f"case {i}") for i in row])
        assert (got["image"].dtype, got["index"].dtype, got["case"].dtype) == (np.float32, np.int32, np.uint32)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_position_restores_exactly_past_what_was_prefetched(images, shuffle, taken):
    make = lambda: batches(images, [np.arange(10)], batch=4, seeds=[3], shuffle=shuffle, host={})
    first = make()
    for _ in range(taken):
        next(first)
    position = json.loads(json.dumps(first.get_state()))
    expected = numbers([next(first) for _ in range(5)])
    second = make()
    second.set_state(position)
    assert numbers([next(second) for _ in range(5)]) == expected


def test_replicates_have_tables_and_orders_of_their_own(images):
    tables = [np.arange(10), np.array([2, 4, 6, 8, 1])]
    both = stream(images, tables, 4, seeds=[0, 1])
    for r, table in enumerate(tables):
        alone = stream(images, [table], 4, seeds=[r])
        for got, expected in zip(both, alone, strict=True):
            assert got["image"].shape == (2, 4, 8, 8, 1)
            for name in expected:
                np.testing.assert_array_equal(got[name][r], expected[name])


def test_the_parts_of_two_processes_joined_are_the_whole_batch(images, monkeypatch):
    whole = stream(images, [np.arange(10)], 3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(stream(images, [np.arange(10)], 3))
    for k, expected in enumerate(whole):
        for name in expected:
            np.testing.assert_array_equal(np.concatenate([part[k][name] for part in parts]), expected[name])
    with pytest.raises(InputError, match="batch 3 is not divisible by 2 processes"):
        stream(images, [np.arange(10)], 1, batch=3)


# --- content ----------------------------------------------------------------------------------------------------------


def test_case_words_are_the_first_eight_bytes_of_sha256():
    for name in ("case 1", "Röntgen", ""):
        digest = hashlib.sha256(name.encode()).hexdigest()
        assert case_words(name).tolist() == [int(digest[:8], 16), int(digest[8:16], 16)]


def test_images_decoded_at_every_use_equal_those_decoded_once(images, monkeypatch):
    real = loader.os.sysconf
    monkeypatch.setattr(loader.os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))
    reread = Images(images.rows, config(size=(64, 64)))
    assert not reread.ready
    monkeypatch.undo()
    kept = Images(images.rows, config(size=(64, 64)))
    assert kept.ready
    index = np.array([3, 3, 0])
    np.testing.assert_array_equal(reread.image(index), kept.image(index))
    for a, b in zip(stream(reread, [index], 2, batch=2), stream(kept, [index], 2, batch=2), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_processes_share_the_memory_that_decoded_images_may_take(images, monkeypatch):
    real, least = loader.os.sysconf, 4 * 4 * len(images.rows) * 64 * 64  # bytes: four times the set's
    sizes = {"SC_PHYS_PAGES": least, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(loader.os, "sysconf", lambda name: sizes.get(name) or real(name))
    assert Images(images.rows, config(size=(64, 64))).ready
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not Images(images.rows, config(size=(64, 64))).ready


def test_all_unusable_images_are_named_at_once(tmp_path):
    good, nan, colour, volume = np.eye(4), np.full((4, 4), np.nan), np.ones((4, 4, 4)), np.ones((4, 4, 9))
    nan[0] = 1
    rows = []
    for name, array in {"good": good, "nan": nan, "colour": colour, "volume": volume}.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
        rows.append(Row(id=name, patient="", split="train", label=0, image=(str(tmp_path / f"{name}.npy"),)))
    with pytest.raises(InputError) as caught:
        Images(rows, config())
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "nan.npy: 12 values are not finite" in lines[0]
    assert "colour.npy: channels: 4 where the recipe has 1: give 1, or train with --config.data.channels=4" in lines[1]
    what = (
        "is a volume, where the recipe takes images (data.size has 2 axes): for volumes train one such as maemi:small"
    )
    assert lines[2].endswith(f"volume.npy: {what}")
    with pytest.raises(
        InputError, match=r"is an image, where the recipe takes volumes .*: for images train one such as p"
    ):
        usable(rows[0], stored_image(rows[0]), config(size=(4, 4, 4)).data)


def test_problems_of_one_kind_are_folded_and_counted():
    kind = lambda n, what: [f"case{i}: file{i}.nii: {what}" for i in range(n)]
    lines = folded([*kind(5, "channels: 1"), *kind(3, "is empty"), "case9: file9.nii: is cut off"])
    assert lines[:3] == ["case0: file0.nii: channels: 1", "case1: file1.nii: channels: 1", lines[2]]
    assert lines[2] == "case2: file2.nii: channels: 1 (and 2 more like it)"
    assert lines[3:] == [*kind(3, "is empty"), "case9: file9.nii: is cut off"]
    volumes = kind(5, "is an image, where the recipe takes volumes")
    assert folded(volumes, cases=5) == [f"{volumes[0]} (and 4 more like it)"]
    assert folded(volumes, cases=6)[1] == volumes[1] and folded(volumes[:1], cases=1) == volumes[:1]


def test_a_colour_image_becomes_grey_where_one_channel_is_asked_for(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1], colour[0, 0] = 255, 1
    Image.fromarray(colour).save(tmp_path / "a.png")
    row = Row(id="a", patient="", split="train", label=0, image=(str(tmp_path / "a.png"),))
    np.testing.assert_allclose(Images([row], config()).image(np.array([0]))[0, 4:, 4:], 0.587, atol=1e-6)
    assert Images([row], config(channels=3)).image(np.array([0])).shape == (1, 8, 8, 3)


def test_a_file_that_vanishes_after_the_start_is_named(images, tmp_path):
    images.slots[:] = -1  # as where not all images fit in memory
    iterator = batches(images, [np.arange(4)], batch=4, seeds=[0], shuffle=False, host={})
    (tmp_path / "2.npy").unlink()
    with pytest.raises(InputError, match=r"2\.npy"):
        for _ in range(99):
            next(iterator)


def test_a_file_that_turns_bad_in_mid_training_is_tried_three_times_then_quarantined(tmp_path, monkeypatch, capfd):
    """Up to 1 % of the rows; the next row of its split and label stands in."""
    rows = []
    for i in range(200):
        np.save(tmp_path / f"{i}.npy", np.full((16, 16), i, np.uint8) + np.eye(16, dtype=np.uint8))
        split = "train" if i % 2 else "unlabeled"
        rows.append(Row(id=f"case {i}", patient="", split=split, label=None, image=(str(tmp_path / f"{i}.npy"),)))
    images = Images(rows, config(), tmp_path / "run" / "cache")
    images.slots[:] = -1
    tried, waits, real = [], [], loader.prepared_image
    monkeypatch.setattr(loader, "prepared_image", lambda row, *more: tried.append(row.id) or real(row, *more))
    monkeypatch.setattr(loader.time, "sleep", waits.append)
    sound = images.image(np.array([5]))[0]
    (tmp_path / "3.npy").unlink()
    tried.clear()
    for _ in range(2):
        np.testing.assert_array_equal(images.image(np.array([3]))[0], sound)
    assert tried == ["case 3"] * 3 + ["case 5"] * 2 and waits == list(loader.RETRIES)
    (tmp_path / "10.npy").write_bytes(b"bad")
    images.image(np.array([10]))
    table = (tmp_path / "run" / "quarantine.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["id", "case 3", "case 10"]
    assert capfd.readouterr().err.count("its row is quarantined") == 2
    (tmp_path / "11.npy").unlink()
    with pytest.raises(InputError, match=r"11\.npy: not found.*; tried 3 times. 3 of 200 rows can no longer be read"):
        images.image(np.array([11]))


def test_a_file_that_comes_back_within_three_tries_is_read(images, monkeypatch):
    images.slots[:] = -1
    real, left = loader.prepared_image, [2]

    def flaky(row, *more):
        left[0] -= 1
        if left[0] >= 0:
            raise InputError("gone")
        return real(row, *more)

    monkeypatch.setattr(loader, "prepared_image", flaky)
    monkeypatch.setattr(loader.time, "sleep", lambda _: None)
    assert np.isfinite(images.image(np.array([0]))).all() and not images.quarantine


def test_volumes_of_several_channels_come_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for channel in range(2):
        files.append(tmp_path / f"{channel}.nii.gz")
        nib.save(nib.Nifti1Image(rng.normal(size=(6, 5, 4)).astype(np.float32), np.eye(4)), files[-1])
    row = Row(id="v", patient="", split="test", label=0, image=tuple(map(str, files)))
    array = Images([row], config(size=(6, 5, 4), channels=2)).image(np.array([0, 0]))
    assert array.shape == (2, 6, 5, 4, 2)
    assert array.min() == 0 and array.max() == 1


def test_phantom_volumes_pass_through_the_same_path():
    rows = [row for row in load_rows(config(phantom="breast"), lambda line: None) if row.split == "test"][-3:]
    array = Images(rows, config(size=(16, 16, 8), channels=2)).image(np.arange(3))
    assert array.shape == (3, 16, 16, 8, 2) and 0 <= array.min() < array.max() <= 1
    stored = stored_image(rows[0])
    assert stored.affine is not None and open_case(rows[0]).region.shape == stored.array.shape[:-1]
    assert open_case(rows[0]).lesion.any()


def test_a_manifest_of_mixed_files_reaches_the_batch(small_set):
    said = []
    rows = load_rows(config(manifest=str(small_set)), said.append)
    assert len(rows) == 50 and "train 16 normal" in said[0] and "unlabeled 16" in said[0]
    images = Images(rows, config(size=(32, 32)))
    assert images.image(np.arange(50)).shape == (50, 32, 32, 1)
    # PNG of 8 bits over 255, PNG of 16 bits and all else by rank of its type: within [0, 1], none of them flat.
    assert (images.image(np.arange(50)).std((1, 2, 3)) > 0.05).all()


def test_all_problems_of_a_manifest_come_in_one_list(tmp_path, small_set):
    with open(small_set, newline="") as file:
        rows = list(csv.DictReader(file))[:3]
    for row in rows:
        row["image"] = str(small_set.parent / row["image"])
    rows[0]["image"], rows[1]["image"] = "missing.png", "empty.png"
    rows[0] |= {"patient": "P1"}
    rows[1] |= {"patient": "P1", "split": "test"}
    (tmp_path / "empty.png").touch()
    with open(tmp_path / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(InputError) as caught:
        load_rows(config(manifest=str(tmp_path / "m.csv")), lambda line: None)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "missing.png" in lines[0] and "empty.png" in lines[1]
    assert "'P1' is in train and test" in lines[2]


@pytest.mark.parametrize("name, patient", [("copy", "Q"), ("near", "Q"), ("other", "P0")])
def test_a_leak_is_refused_and_where_it_is_allowed_told_and_marked(tmp_path, name, patient):
    rng = np.random.default_rng(0)
    films = rng.integers(0, 256, (3, 48, 40), np.uint8)
    copies = {"copy": films[0], "near": np.roll(films[0], (1, 1), (0, 1)), "other": films[2]}
    for file, film in {"a": films[0], "b": films[1], **copies}.items():
        Image.fromarray(film).save(tmp_path / f"{file}.png")
    head = "id,patient,split,label,image,mask,region\n"
    rows = f"a,P0,train,0,a.png,,\nb,P1,test,1,b.png,,\nt,{patient},test,0,{name}.png,,\n"
    (tmp_path / "m.csv").write_text(head + rows)
    with pytest.raises(InputError) as caught:
        load_rows(config(manifest=str(tmp_path / "m.csv")), lambda line: None)
    (line,) = str(caught.value).splitlines()
    what = {
        "copy": "are identical",
        "near": "are one image, or two of one patient (correlation 0.",
        "other": "patient 'P0' is in train and test",
    }
    assert what[name] in line and line.endswith("or --config.data.allow_leaks=True")
    assert name == "other" or (f"({tmp_path}/a.png)" in line and f"({tmp_path}/{name}.png)" in line)
    said: list[str] = []
    marked = load_rows(config(manifest=str(tmp_path / "m.csv"), allow_leaks=True), said.append)
    assert said[0].startswith("warning: ") and what[name] in said[0]
    assert [bool(row.leak) for row in marked] == [True, False, True] and what[name] in marked[0].leak


def test_normal_crops_only_lets_no_whole_abnormal_image_into_training(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(4))
    np.save(tmp_path / "b.npy", np.eye(4)[::-1])
    head = "id,patient,split,label,image,mask,region\n"
    (tmp_path / "m.csv").write_text(head + "a,,train,1,a.npy,a.npy,\nb,,train,0,b.npy,,\n")
    with pytest.raises(InputError, match="'a' is abnormal and in train: move it to val, test or unlabeled"):
        load_rows(config(manifest=str(tmp_path / "m.csv"), normal_crops_only=True), lambda line: None)


def test_an_image_that_the_recipe_cannot_use_is_found_in_every_split(tmp_path):
    np.save(tmp_path / "nan.npy", np.array([[0.0, np.nan], [1.0, 2.0]]))
    np.save(tmp_path / "sound.npy", np.eye(4))
    head = "id,patient,split,label,image,mask,region\n"
    (tmp_path / "m.csv").write_text(head + "a,,train,0,sound.npy,,\nb,,test,1,nan.npy,,\n")
    with pytest.raises(InputError, match=r"b: .*nan.npy: 1 values are not finite"):
        load_rows(config(manifest=str(tmp_path / "m.csv")), lambda line: None)


def test_hidden_labels_are_found_by_path_and_a_wrong_file_is_said_at_once(tmp_path):
    np.save(tmp_path / "u.npy", np.eye(4))
    head = "id,patient,split,label,image,mask,region\n"
    (tmp_path / "m.csv").write_text(head + "a,,unlabeled,,u.npy,,\n")
    (tmp_path / "hidden.csv").write_text("path,label\n./u.npy,1\nelsewhere.npy,0\n")
    settings = config(manifest=str(tmp_path / "m.csv"), unlabeled_labels=str(tmp_path / "hidden.csv"))
    assert unlabeled_labels(settings, load_rows(settings, lambda line: None)) == {"a": 1}
    (tmp_path / "hidden.csv").write_text("name,label\nu,1\n")
    with pytest.raises(InputError, match="columns id,label or path,label"):
        load_rows(settings, lambda line: None)


def test_rows_of_other_splits_are_counted_aloud(tmp_path, small_set):
    text = small_set.read_text()
    odd = tmp_path / "m.csv"
    odd.write_text(text + "x,,holdout,0,nowhere.png,," + "," * (text.splitlines()[0].count(",") - 6) + "\n")
    for file in small_set.parent.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    said = []
    load_rows(config(manifest=str(odd)), said.append)
    assert "1 row of other splits ('holdout') ignored" in said[0]


def test_no_data_at_all_is_one_line():
    with pytest.raises(InputError, match="no data: set --config"):
        load_rows(config(), lambda line: None)


# --- host arrays ------------------------------------------------------------------------------------------------------


def test_host_arrays_are_made_once_and_a_torn_file_again(images, tmp_path):
    made = []

    def brightness(image):
        made.append(1)
        return image.mean(keepdims=True)[0]

    images.folder = tmp_path / "cache"
    table, host = np.array([1, 4, 6]), {"mean": brightness}
    got = stream(images, [table], 1, batch=3, host=host)[0]
    np.testing.assert_array_equal(got["mean"].ravel(), got["image"].mean((1, 2, 3)))
    assert len(made) == 3
    (file,) = images.folder.iterdir()
    whole = file.read_bytes()
    for damaged, times in ((whole, 3), (whole[:-4], 6), (b"", 9), (b"PK\x03\x04 no array", 12)):
        file.write_bytes(damaged)
        again = stream(images, [table], 1, batch=3, host=host)[0]
        np.testing.assert_array_equal(again["mean"], got["mean"])
        assert len(made) == times and file.read_bytes() == whole
    stream(images, [np.array([1, 4])], 1, batch=2, host=host)
    assert len(list(images.folder.iterdir())) == 2, "other images, another file"


# --- the anomaly ratio ------------------------------------------------------------------------------------------------


def ratio_rows(tmp_path, normal=10, abnormal=10):
    labels = {f"u{i}": int(i % 2 == 1) for i in range(normal + abnormal)}
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{k},{v}\n" for k, v in labels.items()))
    rows = [Row(id=k, patient="", split="unlabeled", label=None, image=("x",)) for k in labels]
    return [Row(id="t", patient="", split="train", label=0, image=("y",)), *rows], labels


@pytest.mark.parametrize("ratio", [0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_the_unlabelled_set_has_the_asked_share_of_the_first_of_each_class(tmp_path, ratio):
    rows, labels = ratio_rows(tmp_path)
    settings = dict(manifest="m", unlabeled_labels=str(tmp_path / "labels.csv"), unlabeled_size=10)
    chosen = with_anomaly_ratio(rows, config(**settings, anomaly_ratio=ratio))
    assert chosen[0].id == "t"
    ids = [row.id for row in chosen if row.split == "unlabeled"]
    k = round(10 * ratio)
    first = lambda label, n: [name for name, value in labels.items() if value == label][:n]
    assert set(ids) == {*first(1, k), *first(0, 10 - k)} and len(ids) == 10
    assert ids == [row.id for row in rows if row.id in ids], "the manifest's order stays"


def test_too_few_of_a_class_and_wrong_label_files_are_named(tmp_path):
    rows, _ = ratio_rows(tmp_path)
    file = tmp_path / "labels.csv"
    asked = lambda **data: config(**{"manifest": "m", "unlabeled_labels": str(file), "anomaly_ratio": 0.6, **data})
    with pytest.raises(InputError, match=r"anomaly ratio 0.6 of 20 needs 12 abnormal unlabelled images, there are 10"):
        with_anomaly_ratio(rows, asked())
    with pytest.raises(InputError, match=r"nothing\.csv: not a CSV file"):
        with_anomaly_ratio(rows, asked(unlabeled_labels="nothing.csv"))
    file.write_text("name,label\na,1\n")
    with pytest.raises(InputError, match="columns id,label"):
        with_anomaly_ratio(rows, asked())
    file.write_text("id,label\nu0,1\n")
    with pytest.raises(InputError, match="u1: no hidden label"):
        with_anomaly_ratio(rows, asked())


def test_phantoms_know_their_hidden_labels():
    rows = load_rows(config(phantom="chest", anomaly_ratio=0.25, unlabeled_size=80), lambda line: None)
    labels = unlabeled_labels(SimpleNamespace(data=config(phantom="chest").data), rows)
    assert sum(labels[row.id] for row in rows if row.split == "unlabeled") == 20
