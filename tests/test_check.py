"""The check of a manifest, and copies of images: what is planted is found, and strangers are none."""

import io
import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from faults.changes import CHANGES
from PIL import Image as pillow

from jmae.data import check, duplicates, phantoms
from jmae.data.duplicates import fingerprint
from jmae.data.transforms import resize
from jmae.errors import exit_code

CHESTS = 120


def run(manifest, *flags):
    return exit_code(check.main, [str(manifest), *flags])


@pytest.fixture(scope="module")
def chests():
    """Normal phantoms: films of one view, by one process, 128 x 128."""
    return [phantoms.draw("chest", "train", i).image for i in range(CHESTS)]


@pytest.fixture(scope="module")
def prints(chests):
    return [fingerprint(image) for image in chests]


def jpeg(image, quality):
    data = io.BytesIO()
    pillow.fromarray(image[..., 0].astype(np.uint8)).save(data, "JPEG", quality=quality)
    return np.asarray(pillow.open(data), np.float32)[..., None]


def cut(image, rows, columns):
    """Shifted by so many pixels, without what leaves the frame."""
    h, w = image.shape[:2]
    return image[max(rows, 0) : h + min(rows, 0), max(columns, 0) : w + min(columns, 0)]


NEAR = {  # of an image of 128 x 128: shifts are 2 %
    "smaller": lambda image: np.round(resize(image, (90, 90))),
    "larger": lambda image: np.round(resize(image, (200, 200))),
    "another aspect ratio": lambda image: np.round(resize(image, (128, 100))),
    "JPEG": lambda image: jpeg(image, 40),
    "shifted, the rest cut": lambda image: cut(image, 3, -3),
    "shifted, the rest black": lambda image: np.pad(cut(image, -3, -3), ((3, 0), (3, 0), (0, 0))),
    "darker": lambda image: 200 * (image / 255) ** 1.3,
    "all of it": lambda image: jpeg(np.round(resize(cut(image, -3, 3), (96, 96))), 60),
    "in colour": lambda image: np.repeat(image, 3, -1),
    "of 16 bits": lambda image: 257 * image,
}


@pytest.mark.long
def test_of_all_pairs_of_strangers_none_is_a_copy(prints):
    assert duplicates.copies(prints, range(CHESTS)) == []


@pytest.mark.long
def test_every_exact_and_near_copy_is_found_and_nothing_else(chests, prints):
    own = [i % CHESTS for i in range(0, 7 * 60, 7)]  # ten of each kind would do; these are six
    kinds = [list(NEAR)[i % len(NEAR)] for i in range(len(own))]
    copied = [fingerprint(np.asarray(NEAR[kind](chests[i]), np.float32)) for i, kind in zip(own, kinds, strict=True)]
    found = duplicates.copies([*prints, *copied], [0] * CHESTS + [1] * len(copied))
    pairs = {(one.first, one.second - CHESTS) for one in found}
    planted = {(i, k) for k, i in enumerate(own)}
    assert pairs <= planted
    assert len(pairs) >= 0.95 * len(planted), sorted(kinds[k] for _, k in planted - pairs)
    exact = duplicates.copies([*prints, *prints], [0] * CHESTS + [1] * CHESTS)
    assert [(one.first, one.second, one.correlation) for one in exact] == [(i, CHESTS + i, 1) for i in range(CHESTS)]


def test_copies_that_were_cut_mirrored_turned_or_inverted_are_found_and_nothing_else(chests, prints):
    planted = [(i, kind) for kind in CHANGES for i in range(0, CHESTS, CHESTS // 20)]
    copied = [fingerprint(np.ascontiguousarray(CHANGES[kind](chests[i]), np.float32)) for i, kind in planted]
    found = duplicates.copies([*prints, *copied], [0] * CHESTS + [1] * len(copied))
    pairs = {(one.first, one.second - CHESTS) for one in found}
    assert all(planted[k][0] == i for i, k in pairs)
    of = Counter(planted[k][1] for _, k in pairs)
    assert all(of[kind] >= 0.95 * 20 for kind in CHANGES), of


@pytest.mark.parametrize("turn", range(4))
def test_the_spectrum_of_a_turned_image_is_that_of_the_image_in_another_order(turn):
    detail = np.random.default_rng(0).normal(size=(2, 96, 96)).astype(np.float32)
    order = duplicates._orders()[turn]
    turned, plain = duplicates.spectra(duplicates.TURNS[turn](detail)), duplicates.spectra(detail)
    np.testing.assert_allclose(turned, plain[:, order], atol=0.02)
    assert turn == 0 or np.abs(turned - plain).max() > 0.05


def test_copies_within_one_group_are_none(prints):
    assert duplicates.copies([*prints[:5], *prints[:5]], ["train"] * 10) == []
    assert duplicates.copies([], []) == [] and duplicates.copies(prints[:1], ["train"]) == []


@pytest.mark.parametrize("shape", [(20, 24, 1), (9, 12, 10, 2), (3, 2, 1)])
def test_images_without_detail_are_copies_only_where_every_value_is_equal(shape):
    flat, other, none = np.full(shape, 3.0), np.full(shape, 4.0), np.full(shape, np.nan)
    found = duplicates.copies([fingerprint(np.float32(x)) for x in (flat, other, flat, none)], range(4))
    assert [(one.first, one.second, one.correlation) for one in found] == [(0, 2, 1)]


def test_copies_of_volumes_are_found_and_other_volumes_are_not():
    rng = np.random.default_rng(0)
    volumes = [phantoms.draw("breast", "train", i).image for i in range(6)]
    size = volumes[0].shape[:3]
    copied = [
        resize(volumes[0], [int(0.7 * n) for n in size]),
        np.roll(volumes[1], [round(0.02 * n) for n in size], (0, 1, 2)),
        np.round(volumes[2] / 16),
        volumes[3] + rng.normal(0, 20, volumes[3].shape),
    ]
    prints = [fingerprint(np.asarray(v, np.float32)) for v in [*volumes, *copied]]
    found = duplicates.copies(prints, [0] * 6 + [1] * 4)
    assert [(one.first, one.second) for one in found] == [(0, 6), (1, 7), (2, 8), (3, 9)]
    assert duplicates.copies(prints[:6], range(6)) == []
    assert duplicates.copies([*prints, fingerprint(volumes[0][:, :, 0])], [0] * 10 + [1]) == []  # a slice is no volume


# The command


@pytest.fixture
def cases(tmp_path, chests):
    """A sound set of images, with masks; the folder and its rows, of which a test spoils some."""
    rows = []
    for i, (split, label) in enumerate([("train", 0)] * 3 + [("val", 0), ("test", 0), ("test", 1)]):
        save(tmp_path / f"{i}.png", chests[i])
        rows.append([f"c{i}", f"P{i}", split, label, f"{i}.png", "", ""])
    mask = np.zeros((128, 128), bool)
    mask[40:50, 60:70] = True
    pillow.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    rows[5][5] = "mask.png"
    return tmp_path, rows


def save(path, image):
    pillow.fromarray(image[..., 0].astype(np.uint8)).save(path)


def write(cases):
    folder, rows = cases
    lines = ["id,patient,split,label,image,mask,region", *(",".join(map(str, row)) for row in rows)]
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


def found(cases):
    """{kind: the ids of each finding} of the JSON file, after a run that ends with 1."""
    out = cases[0] / "out.json"
    assert run(write(cases), f"--json={out}") == 1
    content, kinds = json.loads(out.read_text()), {}
    for one in content["findings"]:
        kinds.setdefault(one["kind"], []).append(one["ids"])
    assert {kind: n for kind, n in content["counts"].items() if n} == {kind: len(ids) for kind, ids in kinds.items()}
    assert content["cases"] == len(cases[1]) and content["seconds"] > 0
    return kinds


def test_a_sound_manifest_has_no_findings(cases, capsys):
    assert run(write(cases), "--json", str(cases[0] / "out.json")) == 0
    said = capsys.readouterr().out
    assert "train 3 normal (3 patients), val 1 normal, test 1 normal + 1 abnormal" in said and "nothing found" in said
    assert (
        "p-values: 1 normal scan kept from the training cannot give a p-value of 0.05 (smallest possible p-value 0.5)"
        in said
    )
    assert "warning: only 3 normal scans to learn from: " in said and "give 20 or more" in said
    own = "next: the command that `jmae prepare` printed, or for a manifest of your own: jmae train --config ppii:small"
    assert said.splitlines()[-1].startswith(f"{own} --config.data.manifest=")
    assert json.loads((cases[0] / "out.json").read_text())["findings"] == []
    assert run(f"--manifest={write(cases)}") == 0 and capsys.readouterr().out == said


def test_every_kind_of_finding_is_told_with_its_cases(cases, chests, capsys):
    folder, rows = cases
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:300])
    np.save(folder / "nan.npy", np.where(np.arange(128) == 5, np.nan, chests[1][..., 0]).astype(np.float32))
    pillow.fromarray(np.full((128, 128), 7, np.uint8)).save(folder / "flat.png")
    rows[1][4], rows[2][4] = "nan.npy", "flat.png"
    save(folder / "copy.png", chests[3])
    save(folder / "near.jpg", np.round(resize(chests[4], (100, 100))))
    pillow.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "small.png")
    pillow.fromarray(np.zeros((128, 128), np.uint8)).save(folder / "empty.png")
    save(folder / "6.png", chests[6]), save(folder / "7.png", chests[7])
    rows += [
        ["copy", "Q1", "train", 0, "copy.png", "", ""],
        ["near", "Q2", "train", 0, "near.jpg", "", ""],
        ["same", "Q3", "val", 1, "5.png", "small.png", ""],
        ["patient", "P4", "train", 0, "6.png", "", ""],
        ["sick", "Q4", "train", 1, "7.png", "", ""],
        ["wrong", "Q5", "test", 1, "8.png", "empty.png", ""],
    ]
    save(folder / "8.png", chests[8])
    assert found(cases) == {
        "unreadable": [["c0"]],
        "geometry": [["same"]],
        "truth": [["wrong"]],
        "not finite": [["c1"]],
        "constant": [["c2"]],
        "patient": [["c4", "patient"]],
        "image": [["c5", "same"]],
        "identical": [["c3", "copy"]],
        "near-identical": [["c4", "near"]],
        "abnormal": [["sick"]],
    }
    said = capsys.readouterr().out
    assert "     1  near-identical  the same, resized" in said and "10 findings" in said
    assert "are identical: keep both in one split, or delete the row of one\n" in said
    alike = "are one image, or two of one patient (correlation "
    assert f"c4 in test ({folder / '4.png'}) and near in train ({folder / 'near.jpg'}) {alike}" in said
    assert "sick is abnormal and in train: move it to val, test or unlabeled\n" in said


def test_abnormal_training_volumes_with_a_mask_are_a_note_and_images_a_finding(cases, tmp_path, capsys):
    cases[1][5][2] = "train"
    assert found(cases) == {"abnormal": [["c5"]]}
    assert "normal_crops_only" not in capsys.readouterr().out
    volume = np.random.default_rng(0).random((8, 9, 10), np.float32)
    for name, array in {"v": volume, "m": np.float32(volume > 0.99)}.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    volumes = tmp_path, [["v", "", "train", 1, "v.nii.gz", "m.nii.gz", ""]]
    assert run(write(volumes), "--json", str(tmp_path / "out.json")) == 0
    said = capsys.readouterr().out
    assert "note: 1 abnormal volume in train with a mask or boxes: set --config.data.normal_crops_only=True" in said
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(content["notes"]) == 1 and content["findings"] == []


def test_a_training_image_upside_down_is_a_note(tmp_path, chests, capsys):
    rows = [[f"c{i}", "", "train", 0, f"{i}.png", "", ""] for i in range(14)]
    for i, image in enumerate(chests[:14]):
        save(tmp_path / f"{i}.png", image[::-1] if i == 5 else image)
    assert run(write((tmp_path, rows))) == 0
    what = "would be more like the other training images if it were turned or mirrored: look at it, and mend it if it"
    assert f"note: {tmp_path / '5.png'}: {what} lies the wrong way" in capsys.readouterr().out


def test_copies_with_different_labels_are_a_finding(cases, capsys):
    for name, label in (("again", 0), ("sick", 1)):
        (cases[0] / f"{name}.png").write_bytes((cases[0] / "4.png").read_bytes())
        cases[1].append([name, "", "test", label, f"{name}.png", "", ""])
    assert found(cases) == {"truth": [["c4", "sick"]]}
    said = capsys.readouterr().out
    assert "c4 is normal and sick is abnormal, but their images are equal: find out which label is right" in said


@pytest.mark.parametrize(("last", "told"), [((2.0, 1.0, 1.05), ""), ((6.0, 1.0, 1.5), "1 x 1 to 1.5 x 2 to 6 mm")])
def test_training_volumes_of_different_voxels_are_a_note(tmp_path, capsys, last, told):
    rng, rows = np.random.default_rng(0), []
    for i, spacing in enumerate([(1.0, 1.0, 2.0), (1.0, 2.0, 1.0), last]):
        nib.save(nib.Nifti1Image(rng.random((8, 9, 10), np.float32), np.diag([*spacing, 1])), tmp_path / f"{i}.nii.gz")
        rows.append([f"v{i}", "", "train", 0, f"{i}.nii.gz", "", ""])
    assert run(write((tmp_path, rows))) == 0
    said = capsys.readouterr().out
    assert ("note: voxels of training volumes differ, " in said) == bool(told) and told in said


def test_the_command_has_the_channels_of_a_4d_file(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i in range(3):
        nib.save(nib.Nifti1Image(rng.random((8, 9, 10, 4), np.float32), np.eye(4)), tmp_path / f"{i}.nii.gz")
        rows.append([f"v{i}", "", "train", 0, f"{i}.nii.gz", "", ""])
    assert run(write((tmp_path, rows))) == 0
    assert "--config.data.channels=4" in capsys.readouterr().out


def test_copies_within_a_split_are_a_note(cases, capsys):
    for i in range(2):
        (cases[0] / f"again{i}.png").write_bytes((cases[0] / "0.png").read_bytes())
        cases[1].append([f"again{i}", "", "train", 0, f"again{i}.png", "", ""])
    assert run(write(cases)) == 0
    note = "note: train has 2 further copies of its images, such as again0 (a copy of c0)"
    assert note in capsys.readouterr().out


def test_sequences_of_volumes_on_other_grids_are_findings(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i, shift in enumerate((0, 5)):
        for part in "ab":
            affine = np.diag([1.0, 1, 2, 1])
            affine[0, 3] = shift * (part == "b")
            nib.save(nib.Nifti1Image(rng.random((8, 9, 10), np.float32), affine), tmp_path / f"{i}{part}.nii.gz")
        rows.append([f"v{i}", "", "train", 0, f"{i}a.nii.gz;{i}b.nii.gz", "", ""])
    assert found((tmp_path, rows)) == {"geometry": [["v1"]]}
    assert "v1: " in (said := capsys.readouterr().out) and "its corners lie up to 5 mm away from those of" in said


def test_what_is_wrong_with_the_manifest_itself_is_exit_2(cases, capsys):
    assert run(cases[0] / "none.csv") == 2
    assert exit_code(check.main, []) == 2
    cases[1][0][3] = "2"
    assert run(write(cases)) == 2
    assert "label '2'" in capsys.readouterr().err
