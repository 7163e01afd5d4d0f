"""Slices of volumes: which are kept, how they lie, and that they hold the stored values."""

import csv

import nibabel as nib
import numpy as np
import pytest

from jmae.data import slices
from jmae.data.files import image_size, read_image, read_mask
from jmae.data.manifest import parse_manifest, summary
from jmae.data.opening import open_each
from jmae.data.slices import Options, cut_manifest, distance, lie
from jmae.data.volumes import boxes_mask
from jmae.errors import exit_code

RNG = np.random.default_rng(0)
COLUMNS = "id patient split label image mask region boxes midline age".split()
RAS = RNG.normal(size=(5, 6, 7)).astype(np.float32)  # axes to the right, forwards, upwards
CODES = ("RAS", "LPS", "LAS", "PIR", "SLA", "ARI")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Hundreds of small files need not reach the disk."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def save(path, array, affine=None):
    image = nib.Nifti1Image(np.asarray(array, np.float32), np.eye(4) if affine is None else affine)
    nib.save(image, path)
    return path.name


def turned(array, code, spacing=(1, 1, 1)):
    """A NIfTI image of an array in RAS, stored with other axes."""
    image = nib.Nifti1Image(array, np.diag([*spacing, 1.0]))
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(code))
    return image.as_reoriented(change)


def manifest(folder, *rows):
    with open(folder / "manifest.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def row(name, split="test", label="", **cells):
    return {"id": name, "patient": f"P{name}", "split": split, "label": label, "age": "63"} | cells


def cut(folder, *rows, **how):
    """The slices of a manifest, read as any recipe reads them."""
    said = cut_manifest(manifest(folder, *rows), folder / "out", Options(**how))
    found = parse_manifest(folder / "out" / "manifest.csv")[0]
    assert open_each(found, workers=1) == []
    return found, said


def numbers(rows, case, label="any"):
    return [int(r.extra["slice"]) for r in rows if r.extra["case"] == case and label in ("any", r.label)]


# Which slices


@pytest.fixture
def forty(tmp_path):
    """Forty axial slices without a background, and a mask of the slices 20 and 21."""
    mask = np.zeros((4, 5, 40))
    mask[1, 2, 20:22] = 1
    spacing = np.diag([1, 1, 2.5, 1])
    save(tmp_path / "m.nii", mask, spacing)
    for name in "abcde":
        save(tmp_path / f"{name}.nii", 1 + RNG.random((4, 5, 40)), spacing)
    return tmp_path


def test_a_slice_is_healthy_farther_than_the_margin_from_every_lesion_slice(forty):
    far = [*range(15), *range(27, 40)]  # 20 - 5 and 21 + 5 are not farther than 5
    truth = {"label": 1, "mask": "m.nii"}
    rows, said = cut(forty, row("a", "test", image="a.nii", **truth), row("b", "train", image="b.nii", **truth))
    assert numbers(rows, "a", 0) == far and numbers(rows, "a", 1) == [20, 21]
    assert numbers(rows, "b", 0) == far and numbers(rows, "b", 1) == []
    assert "20 within the margin of a lesion" in said and "2 lesion slices in train" in said
    assert summary(rows) in said
    lesion = next(r for r in rows if r.label)
    assert (lesion.id, lesion.patient, lesion.extra) == ("a_0020", "Pa", {"age": "63", "case": "a", "slice": "20"})
    assert read_mask(lesion.mask).sum() == 1 and all(r.mask is None for r in rows if r.label == 0)


@pytest.mark.parametrize(("margin", "last"), [("10mm", 15), ("9.9 mm", 16), ("0", 19), ("12.5mm", 14)])
def test_a_margin_in_mm_is_measured_by_the_spacing(forty, margin, last):
    how = slices.read_options({"margin": margin})  # slices are 2.5 mm apart
    rows, _ = cut(forty, row("a", "test", 1, image="a.nii", mask="m.nii"), **how._asdict())
    assert max(k for k in numbers(rows, "a", 0) if k < 20) == last


def test_labels_follow_what_is_known_and_only_train_loses_its_lesions(forty):
    rows, said = cut(
        forty,
        row("a", "train", 0, image="a.nii", patient=""),
        row("b", "val", 1, image="b.nii"),  # abnormal, nobody says where
        row("c", "unlabeled", 1, image="c.nii", mask="m.nii"),
        row("d", "test", "", image="d.nii", mask="m.nii"),
        row("e", "test", 1, image="e.nii", boxes="0 1 20 2 3 22;1 1 33 2 2 34"),
    )
    labels = {case: {r.label for r in rows if r.extra["case"] == case} for case in "abcde"}
    assert labels == {"a": {0}, "b": {None}, "c": {None}, "d": {0, 1}, "e": {0, 1}}
    assert [len(numbers(rows, case)) for case in "abc"] == [40, 40, 40]
    assert {r.patient for r in rows if r.extra["case"] == "a"} == {"a"}
    assert all(r.mask is None for r in rows if r.split == "unlabeled") and "1 mask of unlabeled rows" in said
    boxed = {int(r.extra["slice"]): r.boxes for r in rows if r.extra["case"] == "e" and r.label == 1}
    assert boxed.keys() == {20, 21, 33} and len(boxed[33]) == 1
    assert numbers(rows, "e", 0) == [*range(15), 27, 39]


def test_slices_with_little_region_and_between_the_steps_are_left_out(tmp_path):
    volume, region = np.zeros((10, 10, 9)), np.zeros((10, 10, 9))
    for k in range(9):
        volume[: k + 1, 0, k] = -5  # 1 to 9 voxels that are not 0
    region[:2, :2, 4:], region[0, 0, 3] = 1, 1
    save(tmp_path / "a.nii", volume), save(tmp_path / "b.nii", volume), save(tmp_path / "r.nii", region)
    rows, said = cut(
        tmp_path, row("a", label=0, image="a.nii"), row("b", label=0, image="b.nii", region="r.nii"), least=0.3
    )
    assert numbers(rows, "a") == list(range(2, 9))  # 3 of 9 is more than 0.3, 2 of 9 is not
    assert numbers(rows, "b") == list(range(4, 9)) and "6 with little region" in said
    assert all(read_mask(r.region).sum() == 4 for r in rows if r.region)
    (tmp_path / "out" / "manifest.csv").unlink()
    rows, _ = cut(tmp_path, row("a", label=0, image="a.nii", region="r.nii"), least=0.0, every=3)
    assert numbers(rows, "a") == [3, 6]  # 0 has none of the region


def test_the_distance_to_nothing_is_infinite():
    np.testing.assert_array_equal(distance(np.arange(4), np.array([1, 9])), [1, 0, 1, 2])
    assert np.isinf(distance(np.arange(3), np.array([], int))).all()


# How they lie


@pytest.mark.parametrize("code", CODES)
def test_slices_look_as_radiologists_expect_however_they_are_stored(tmp_path, code):
    nib.save(turned(RAS, code), tmp_path / "a.nii")
    stored = [*"RAS"]
    expected = {  # rows downwards, columns to the right of the picture
        "axial": RAS[::-1, ::-1].transpose(2, 1, 0),  # anterior up, the patient's right on the left
        "coronal": RAS[::-1, :, ::-1].transpose(1, 2, 0),  # head up, the patient's right on the left
        "sagittal": RAS[:, ::-1, ::-1].transpose(0, 2, 1),  # head up, anterior on the left
    }
    opposite = dict(zip("RASLPI", "LPIRAS", strict=True))
    for (axis, planes), letter in zip(expected.items(), "SAR", strict=True):
        own = next(i for i, c in enumerate(code) if c in (letter, opposite[letter]))
        for name in (axis, str(own)):
            rows, _ = cut(tmp_path, row("a", label=0, image="a.nii"), axis=name)
            got = np.stack([read_image(r.image).array[..., 0] for r in rows])
            np.testing.assert_array_equal(got, planes if code[own] in stored else planes[::-1])
            (tmp_path / "out" / "manifest.csv").unlink()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_boxes_masks_and_regions_lie_on_their_slice(tmp_path, code, axis):
    image = turned(RAS, code)
    box = (1, 0, 2, 3, 2, 5)
    layout, marked = lie(axis, image.affine, ""), boxes_mask([box], image.shape)
    for k in np.flatnonzero(marked.any(tuple(a for a in range(3) if a != layout.across))):
        plane = layout.plane(marked, k)
        np.testing.assert_array_equal(boxes_mask([layout.box(box, image.shape)], plane.shape), plane)
    if (code, axis) == ("PIR", "coronal"):
        nib.save(image, tmp_path / "a.nii"), nib.save(turned(RAS, "RAS"), tmp_path / "b.nii")
        mask = nib.Nifti1Image(marked.astype(np.uint8), image.affine)
        nib.save(mask, tmp_path / "m.nii"), nib.save(nib.as_closest_canonical(mask), tmp_path / "n.nii")
        cells = {"label": 1, "image": "a.nii", "mask": "n.nii", "region": "m.nii", "boxes": " ".join(map(str, box))}
        rows, _ = cut(tmp_path, row("a", **cells), axis=axis, margin=0)
        assert [r.label for r in rows] == [1] * len(rows) and rows  # elsewhere there is no region
        for r in rows:
            size = image_size(r.image[0])
            assert len(r.boxes) == 1
            np.testing.assert_array_equal(read_mask(r.mask), boxes_mask(r.boxes, size))
            np.testing.assert_array_equal(read_mask(r.region), boxes_mask(r.boxes, size))


def test_without_a_position_slices_keep_the_order_of_the_file(tmp_path):
    np.save(tmp_path / "a.npy", RAS)
    for axis in range(3):
        rows, _ = cut(tmp_path, row("a", label=0, image="a.npy"), axis=str(axis))
        got = np.stack([read_image(r.image).array[..., 0] for r in rows])
        np.testing.assert_array_equal(got, np.moveaxis(RAS, axis, 0))
        (tmp_path / "out" / "manifest.csv").unlink()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_sequences_become_channels_with_every_value_unchanged(tmp_path, channels):
    volumes = RNG.normal(-1000, 3000, (channels, 4, 5, 3)).astype(np.float32)
    if channels == 3:
        volumes[1:] = volumes[0]  # equal channels are no grey picture here
    names = ";".join(save(tmp_path / f"{c}.nii", volume, np.diag([-1, -1, 1, 1])) for c, volume in enumerate(volumes))
    rows, _ = cut(tmp_path, row("a", label=0, image=names))
    got = np.stack([read_image(r.image).array for r in rows])
    np.testing.assert_array_equal(got, volumes.transpose(3, 2, 1, 0))


# Refusals


def refused(capsys, *arguments):
    """What a command says that ends with 2."""
    assert exit_code(slices.main, [str(a) for a in arguments]) == 2
    return capsys.readouterr().err.strip().split("\n")


def test_all_problems_come_in_one_list_and_no_manifest_is_left(forty, capsys):
    np.save(forty / "p.npy", 1 + RNG.random((4, 5, 40)))
    np.save(forty / "q.npy", np.ones((4, 5)))
    hole = 1 + RNG.random((4, 5, 40))
    hole[0, 0, 0] = np.nan
    save(forty / "nan.nii", hole)
    path = manifest(
        forty,
        row("a", "train", 1, image="a.nii"),
        row("b", "test", 1, image="b.nii", mask="q.npy"),
        row("c", "test", 0, image="p.npy"),
        row("d", "test", 0, image="nan.nii"),
        row("e", "test", 0, image="none.nii"),
        row("f", "test", 0, image="q.npy"),
        row("g", "test", 1, image="c.nii", boxes="0 0 1 1"),
        row("h;h", "test", 0, image="d.nii"),
    )
    lines = refused(capsys, path, "--out", forty / "out")
    words = ["'a' is abnormal and in train: give it a mask or boxes", "q.npy: size", "write --axis=0, 1 or 2"]
    words += ["not finite", "not found", "not a volume", "box (0.0, 0.0, 1.0, 1.0)", "semicolon"]
    for word in words:
        assert sum(word in line for line in lines) == 1, (word, lines)
    assert len(lines) == len(words) and all(": " in line for line in lines)
    assert not (forty / "out").exists()


def test_what_is_found_while_slices_are_written_leaves_no_manifest(forty, capsys):
    path = manifest(forty, row("a", label=0, image="a.nii"), row("b", label=0, image="b.nii", mask="m.nii"))
    assert "the mask marks 2 values and the label is 0" in refused(capsys, path, "--out", forty / "out")[0]
    assert (forty / "out" / "slices").exists() and not (forty / "out" / "manifest.csv").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--axis=axail"], "axial, coronal, sagittal"),
        (["--axis=3"], "axial, coronal, sagittal"),
        (["--margin=2.5"], "number of slices"),
        (["--margin=-1"], "number of slices"),
        (["--margin", "5cm"], "number of slices"),
        (["--least=1.5"], "from 0 to 1"),
        (["--least=nan"], "finite"),
        (["--every=0"], "not a step"),
        (["--every=2.5"], "whole number"),
        (["--margn=2"], "did you mean --margin"),
        (["another.csv"], "name one manifest"),
    ],
)
def test_a_wrong_flag_is_one_line(forty, capsys, flags, word):
    path = manifest(forty, row("a", label=0, image="a.nii"))
    (line,) = refused(capsys, path, "--out", forty / "out", *flags)
    assert word in line


def test_a_manifest_is_never_written_over(forty, capsys):
    path = manifest(forty, row("a", label=0, image="a.nii"))
    before = path.read_bytes()
    (line,) = refused(capsys, path, "--out", forty)
    assert "exists already" in line and path.read_bytes() == before
    assert exit_code(slices.main, [str(path), f"--out={forty / 'out'}"]) == 0
    assert "40 slices of 1 volume:" in capsys.readouterr().out
    assert "exists already" in refused(capsys, path, "--out", forty / "out")[0]


def test_no_spacing_for_a_margin_in_mm_nothing_left_and_half_a_volume_are_refused(forty, capsys):
    mask, volume = np.zeros((4, 5, 40)), 1 + RNG.random((4, 5, 40))
    mask[:, :, 5] = 1
    np.save(forty / "v.npy", volume), np.save(forty / "k.npy", mask)
    path = manifest(forty, row("v", "train", 1, image="v.npy", mask="k.npy"))
    assert "needs the spacing" in refused(capsys, path, "--out", forty / "out", "--axis=2", "--margin=5mm")[0]
    assert "no slice is left" in refused(capsys, path, "--out", forty / "out", "--axis=2", "--margin=50")[0]
    path.write_text("id,patient,split,label,image,mask,region,midline,half\na,P,train,0,a.nii,,,middle,first\n")
    assert "slices are whole" in refused(capsys, path, "--out", forty / "out")[0]


def test_phantoms_are_cut_too(tmp_path):
    name = "phantom:breast/test/0"
    path = manifest(tmp_path, row("p", "test", 1, image=name, mask=name))
    cut_manifest(path, tmp_path / "out")
    rows = parse_manifest(tmp_path / "out" / "manifest.csv")[0]
    assert {r.label for r in rows} <= {0, 1} and read_image(rows[0].image).array.shape[-1] == 2


def test_help_says_what_least_means(capsys):
    with pytest.raises(SystemExit):
        slices.main(["--help"])
    assert "Smallest area of a slice's region" in capsys.readouterr().out
