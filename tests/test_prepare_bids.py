"""Lesion masks and patients as BIDS data sets on OpenNeuro and ATLAS 2.0 have them."""

import json

import numpy as np
import pytest
from trees import kinds, lesion, prepared, refused_in_one_line, text, volume

from jmae.data.files import read_mask


def subjects(root, *names, sequence="T1w"):
    for name in names:
        volume(root / name / "anat" / f"{name.replace('/', '_')}_{sequence}.nii.gz")


@pytest.mark.parametrize(
    ("mask", "about"),
    [
        ("sub-01/anat/sub-01_T1w_label-lesion_roi", None),  # fMRIPrep
        ("sub-01/anat/sub-01_FLAIR_roi", None),  # ds004199
        ("derivatives/manual_masks/sub-01/anat/sub-01_desc-tumor_mask", None),  # the specification's example
        ("derivatives/manual_masks/sub-01/anat/sub-01_desc-manual_mask", {"Type": "Lesion"}),
        ("derivatives/x/sub-01/anat/sub-01_space-MNI_label-tumor_mask", None),
        ("derivatives/x/sub-01/anat/sub-01_label-WMH_probseg", None),
        ("sub-01/anat/sub-01_T1w_lesion", None),
    ],
)
def test_a_patient_with_a_lesion_file_of_any_usual_name_does_not_train(tmp_path, capsys, mask, about):
    root = tmp_path / "bids"
    subjects(root, "sub-01", "sub-02", "sub-03")
    volume(root / f"{mask}.nii.gz", lesion())
    if about:
        text(root / f"{mask}.json", json.dumps(about))
    rows, said = prepared(capsys, "bids", f"--root={root}", out=tmp_path / "out")  # masks are no sequence to choose
    assert (rows["sub-01"].split, rows["sub-01"].label) == ("test", 1)
    assert rows["sub-01"].mask == str(root / f"{mask}.nii.gz") and "1 of them with a lesion mask" in said


def test_a_mask_of_unknown_meaning_is_refused_by_its_name_until_a_pattern_tells(tmp_path, capsys):
    root = tmp_path / "bids"
    subjects(root, "sub-01", "sub-02", "sub-03")
    for name in ("sub-01_desc-brain_mask", "sub-02_label-GM_probseg", "sub-02_desc-aseg_dseg"):
        volume(root / "derivatives" / "p" / name[:6] / "anat" / f"{name}.nii.gz", lesion())
    odd = volume(root / "derivatives/p/sub-01/anat/sub-01_desc-manual_mask.nii.gz", lesion())
    line = refused_in_one_line(capsys, "bids", f"--root={root}", out=tmp_path / "no")
    assert line.startswith(f"jmae: {odd}: looks like a mask") or line.startswith(f"{odd}: looks like a mask")
    flag = "--lesions=desc-manual"
    rows, _ = prepared(capsys, "bids", f"--root={root}", flag, out=tmp_path / "out")
    assert kinds(rows) == {("test", 1, True): 1, ("test", 0, False): 1, ("train", 0, False): 1}


def test_only_controls_of_participants_tsv_train(tmp_path, capsys):
    root = tmp_path / "bids"
    subjects(root, *(f"sub-{i:05d}" for i in range(1, 7)), sequence="FLAIR")
    volume(root / "sub-00001/anat/sub-00001_FLAIR_roi.nii.gz", lesion())
    groups = ["fcd", "fcd", "hc", "hc", "hc", "hc"]
    lines = [f"sub-{i:05d}\t{g}\t{20 + i}" for i, g in enumerate(groups, 1)]
    text(root / "participants.tsv", "\n".join(["participant_id\tgroup\tage", *lines]) + "\n")
    text(root / "dataset_description.json", json.dumps({"Name": "x", "License": "CC0"}))
    rows, said = prepared(capsys, "bids", f"--root={root}", out=tmp_path / "out")
    assert rows["sub-00002"].split == "test" and rows["sub-00002"].label is None  # a patient without a mask
    assert {row.id for row in rows.values() if row.split == "train"} < {f"sub-{i:05d}" for i in range(3, 7)}
    assert "1 patient without one (no label, not in train)" in said and "licence: CC0" in said
    text(
        root / "participants.tsv",
        "participant_id\tgroup\nsub-00001\ta\n" + "\n".join(f"sub-{i:05d}\tb" for i in range(2, 7)),
    )
    line = refused_in_one_line(capsys, "bids", f"--root={root}", out=tmp_path / "two")
    assert "group has b (5), a (1): name the group that trains as normal: --control=VALUE" in line
    rows, _ = prepared(capsys, "bids", f"--root={root}", "--control=b", out=tmp_path / "three")
    assert sum(row.split == "train" for row in rows.values()) == 4
    rows, _ = prepared(capsys, "bids", f"--root={root}", "--control=a,b", out=tmp_path / "four")
    assert sum(row.label == 0 for row in rows.values()) == 5 and "sub-00001" not in {
        row.id for row in rows.values() if row.split == "train"
    }
    line = refused_in_one_line(capsys, "bids", f"--root={root}", "--lesions=(", out=tmp_path / "five")
    assert "--lesions=(: not a regular expression" in line


def test_the_masks_of_two_raters_are_united_or_one_is_chosen(tmp_path, capsys):
    root = tmp_path / "bids"
    subjects(root, "sub-086", "sub-087", "sub-088")
    masks = {"radA": lesion(), "radB": np.roll(lesion(), 1, axis=0)}
    for rater, mask in masks.items():
        volume(root / f"derivatives/manual_lesion/sub-086/anat/sub-086_T1w_desc-{rater}_label-lesion_roi.nii.gz", mask)
    rows, said = prepared(capsys, "bids", f"--root={root}", out=tmp_path / "out")
    np.testing.assert_array_equal(read_mask(rows["sub-086"].mask), np.maximum(*masks.values()) > 0)
    assert "1 of several united" in said
    rows, _ = prepared(capsys, "bids", f"--root={root}", "--lesions=radB", out=tmp_path / "two")
    np.testing.assert_array_equal(read_mask(rows["sub-086"].mask), masks["radB"] > 0)


def test_atlas_is_read_from_its_top_folder_and_patients_without_a_mask_do_not_train(tmp_path, capsys):
    root, space = tmp_path / "ATLAS_2", "space-MNI152NLin2009aSym"
    for part, site, subject in (
        ("Training", "R001", "r001s001"),
        ("Training", "R042", "r042s002"),
        ("Testing", "R003", "r003s001"),
    ):
        folder = root / part / site / f"sub-{subject}" / "ses-1" / "anat"
        volume(folder / f"sub-{subject}_ses-1_{space}_T1w.nii.gz")
        if part == "Training":
            volume(folder / f"sub-{subject}_ses-1_{space}_label-L_desc-T1lesion_mask.nii.gz", lesion())
    rows, said = prepared(capsys, "bids", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {("test", 1, True): 2, ("test", None, False): 1}
    assert rows["Training_R042_sub-r042s002_ses-1"].patient == "Training_R042_sub-r042s002"
    assert "next: jmae evaluate" in said
