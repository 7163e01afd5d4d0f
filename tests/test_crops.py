"""Random crops: where they may lie, that they depend on the case and the step alone, and that host and device agree."""

import jax
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from jmae import recipe
from jmae.data import crops, loader
from jmae.data.crops import Volumes, allowed, box_sums, cut
from jmae.data.loader import batches
from jmae.data.manifest import Row
from jmae.data.preparation import prepared_volume
from jmae.errors import InputError

CROP = (6, 5, 4)


def config(**changes):
    c, _ = recipe.parse(["--config=configs/maemi.py:smoke"], "")
    c.data.size, c.data.channels, c.data.axes, c.data.phantom = CROP, 1, "", ""
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture
def rows(tmp_path):
    """Three volumes of different odd sizes; the second has a lesion, the third is smaller than a crop."""
    rng, out = np.random.default_rng(0), []
    for i, size in enumerate([(11, 9, 8), (13, 7, 6), (5, 12, 7)]):
        np.save(tmp_path / f"{i}.npy", rng.normal(size=size).astype(np.float32))
        mask = np.zeros(size, np.uint8)
        mask[0, 0, 0] = 1
        np.save(tmp_path / f"{i}-mask.npy", mask)
        lesion = str(tmp_path / "1-mask.npy") if i == 1 else None
        out.append(Row(f"case {i}", "", "train", int(i == 1), (str(tmp_path / f"{i}.npy"),), lesion))
    return out


def test_a_volume_is_prepared_again_when_any_code_of_the_library_changes(rows, tmp_path, monkeypatch):
    made, code, c = [], tmp_path / "jmae", config().data
    (code / "data").mkdir(parents=True)
    monkeypatch.setattr(loader, "__file__", str(code / "data" / "loader.py"))
    monkeypatch.setattr(crops, "code_digest", loader.code_digest.__wrapped__)

    def make():
        made.append(1)
        return prepared_volume(rows[0], c)

    for text in ("room = 1", "room = 1", "room = 2"):  # `padded` calls jmae.windows
        (code / "windows.py").write_text(text)
        crops.cache_volume(rows[0], c, tmp_path / "cache", make)
    assert len(made) == 2


def test_box_sums_count_the_marked_voxels_of_every_box():
    marked = np.random.default_rng(0).random((7, 6, 5)) < 0.3
    sums = box_sums(marked, (3, 2, 5))
    assert sums.shape == (5, 5, 1)
    for place in np.ndindex(sums.shape):
        box = marked[tuple(slice(o, o + n) for o, n in zip(place, (3, 2, 5), strict=True))]
        assert sums[place] == box.sum()


def test_allowed_origins_touch_no_lesion_hold_the_region_and_stay_on_their_side():
    rng = np.random.default_rng(1)
    lesion, region, size = rng.random((9, 10, 8)) < 0.01, rng.random((9, 10, 8)) < 0.6, (9, 10, 8)
    found = allowed(size, (3, 3, 2), lesion=lesion, region=region, least=0.6, side=1, midline=4)
    places = (7, 8, 7)
    for number, place in enumerate(np.ndindex(places)):
        box = tuple(slice(o, o + n) for o, n in zip(place, (3, 3, 2), strict=True))
        crosses = place[1] < 4 < place[1] + 3
        good = not lesion[box].any() and region[box].mean() >= 0.6 and not crosses
        assert good == (number in found)
    assert allowed(size, (3, 3, 2)) is None
    assert allowed(size, (3, 3, 2), region=region) is None


def test_crops_never_touch_a_lesion_and_reach_every_other_place(rows, tmp_path):
    volumes = Volumes(rows, config(), tmp_path / "cache")
    seen = [{volumes.origin(row, step, 0) for step in range(2000)} for row in range(3)]
    assert len(seen[0]) == 6 * 5 * 5
    assert len(seen[1]) == 8 * 3 * 3 - 1 and (0, 0, 0) not in seen[1]
    assert len(seen[2]) == 1 * 8 * 4  # padded to a crop


def test_origins_are_uniform_and_change_with_step_seed_and_case(rows, tmp_path):
    volumes = Volumes(rows, config(), tmp_path / "cache")
    counts = np.zeros((6, 5, 5))
    for step in range(6000):
        counts[volumes.origin(0, step, 0)] += 1
    assert abs(counts / 40 - 1).max() < 0.6  # 40 expected, a deviation of 6.3
    same = [volumes.origin(0, step, 0) == volumes.origin(0, step, 1) for step in range(300)]
    assert sum(same) < 15
    again = Volumes(rows[:1], config(), tmp_path / "cache")
    assert [again.origin(0, step, 3) for step in range(50)] == [volumes.origin(0, step, 3) for step in range(50)]


def test_host_and_device_give_the_same_crops_and_a_restored_iterator_goes_on_with_them(rows, tmp_path):
    def some(where):
        volumes = Volumes(rows, config(**{"data.crops_on": where}), tmp_path / "cache")
        made = batches(volumes, [np.arange(3)], batch=2, seeds=[5], shuffle=True, host={})
        held, out, states = volumes.resident(), [], []
        assert (held is None) == (where == "host")
        for _ in range(7):
            batch = next(made)
            out.append(jax.device_get(cut(held, batch, CROP)) if where == "device" else batch)
            states.append(made.get_state())
        made.set_state(states[3])
        again = next(made)
        return out, jax.device_get(cut(held, again, CROP)) if where == "device" else again

    (host, host_again), (device, device_again) = some("host"), some("device")
    for a, b in zip([*host, host_again], [*device, device_again], strict=True):
        assert set(a) == set(b) == {"image", "index", "case"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_array_equal(host[4]["image"], host_again["image"])
    assert host[0]["image"].shape == (2, *CROP, 1)


def test_a_volume_is_prepared_once_and_again_when_its_file_or_the_recipe_changes(rows, tmp_path, monkeypatch):
    made, real = [], crops.prepared_volume
    monkeypatch.setattr(crops, "prepared_volume", lambda row, data: made.append(row.id) or real(row, data))
    folder = tmp_path / "cache"
    first = Volumes(rows, config(), folder)
    Volumes(rows, config(), folder)
    assert sorted(made) == ["case 0", "case 1", "case 2"]
    np.save(rows[0].image[0], np.load(rows[0].image[0])[:-1])
    changed = Volumes(rows, config(), folder)
    assert made[3:] == ["case 0"] and changed.arrays[0].shape[0] == first.arrays[0].shape[0] - 1
    Volumes(rows, config(**{"data.mean": 0.0}), folder)
    assert len(made) == 7


def test_a_lesion_thinner_than_the_new_spacing_is_not_lost(tmp_path):
    size, lesion = (31, 29, 27), np.zeros((31, 29, 27), np.uint8)
    lesion[10, 12:15, 13] = 1
    affine = np.diag([0.7, 0.7, 0.7, 1])
    for name, array in (("v", np.random.default_rng(0).normal(size=size)), ("m", lesion)):
        nib.save(nib.Nifti1Image(array.astype(np.float32), affine), tmp_path / f"{name}.nii.gz")
    row = Row("thin", "", "train", 1, (str(tmp_path / "v.nii.gz"),), str(tmp_path / "m.nii.gz"))
    for spacing in (0.75, 1.1, 2.0, 3.0):
        c = config(**{"data.spacing": (spacing,) * 3, "data.size": (2, 2, 2), "model.patch": (1, 1, 1)})
        volumes = Volumes([row], c, tmp_path / "cache")
        n = np.array(volumes.arrays[0].shape[:3])
        at = (np.argwhere(lesion) - (np.array(size) - 1) / 2) * 0.7 / spacing + (n - 1) / 2
        for step in range(300):
            origin = np.array(volumes.origin(0, step, 0))
            # No lesion voxel's centre lies in a voxel of the crop.
            assert not ((at > origin - 0.5) & (at < origin + 1.5)).all(1).any()


def test_a_row_that_a_small_table_repeats_in_a_batch_has_another_crop_each_time(rows, tmp_path):
    volumes = Volumes(rows[:1], config(**{"data.crops_on": "host"}), tmp_path / "cache")
    batch = next(batches(volumes, [np.arange(1)], batch=6, seeds=[0], shuffle=True, host={}))
    assert len({image.tobytes() for image in batch["image"]}) > 3


def test_a_slice_that_is_rewritten_in_a_series_folder_is_seen(rows, tmp_path, monkeypatch):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"one")
    real = crops.prepared_volume
    monkeypatch.setattr(crops, "prepared_volume", lambda row, data: real(rows[0], data))
    row = rows[0]._replace(image=(str(folder),))
    Volumes([row], config(), tmp_path / "cache")
    (folder / "1.dcm").write_bytes(b"other")
    Volumes([row], config(), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*-origins.npy"))) == 2


def test_no_volume_at_all_and_a_share_of_no_region_are_named(rows, tmp_path):
    with pytest.raises(InputError, match="no train rows"):
        Volumes([], config(), tmp_path / "cache")
    with pytest.raises(InputError, match=r"names no region for data\.least_region"):
        Volumes(rows, config(**{"data.least_region": 0.5}), tmp_path / "cache")


def test_a_volume_without_any_allowed_crop_is_named(rows, tmp_path):
    mask = np.ones((13, 7, 6), np.uint8)
    np.save(tmp_path / "1-mask.npy", mask)
    with pytest.raises(InputError, match="case 1: no crop of"):
        Volumes(rows, config(), tmp_path / "cache")


def test_all_unusable_volumes_come_in_one_list(rows, tmp_path):
    for i in (0, 2):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8, 8), np.nan, np.float32))
    with pytest.raises(InputError) as caught:
        Volumes(rows, config(), tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 2


def test_a_colour_film_is_made_grey_and_three_sequences_are_not(tmp_path):
    rng, data = np.random.default_rng(0), config(**{"data.size": (6, 5)}).data
    for name, shape in {"film": (9, 8, 3), "t1": (9, 8), "t2": (9, 8), "fs": (9, 8)}.items():
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f"{name}.png")
    row = lambda *names: Row("case", "", "train", 0, tuple(str(tmp_path / f"{name}.png") for name in names), None)
    assert prepared_volume(row("film"), data).array.shape == (9, 8, 1)
    with pytest.raises(InputError, match="channels: 3 where the recipe has 1"):
        prepared_volume(row("t1", "t2", "fs"), data)
    np.save(tmp_path / "volume.npy", rng.random((9, 8, 6, 3), np.float32))
    one_file = Row("case", "", "train", 0, (str(tmp_path / "volume.npy"),), None)
    with pytest.raises(InputError, match="channels: 3 where the recipe has 1"):
        prepared_volume(one_file, config(**{"data.size": (6, 5, 4)}).data)


def test_crops_are_cut_on_the_devices_where_those_of_all_processes_hold_the_set(rows, tmp_path, monkeypatch):
    asked = []
    for others, held in (([True], True), ([False], False)):
        monkeypatch.setattr(crops, "gather", lambda mine, others=others: asked.append(mine) or [mine, *others])
        assert (Volumes(rows, config(), tmp_path / "cache").resident() is not None) == held
    assert asked == [True, True]
    # The host's memory is shared by its processes.
    monkeypatch.setattr(jax, "process_count", lambda: 10**9)
    assert Volumes(rows, config(), tmp_path / "cache").resident() is None and asked[-1] is False
