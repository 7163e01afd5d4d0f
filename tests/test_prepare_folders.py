"""Folder conventions and CheXpert, small: what becomes of them, and what is said when something is missing."""

import json
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from test_files import dicom

from jmae import predict, quickstart, recipe, train
from jmae.data import check, prepare
from jmae.data.manifest import parse_manifest
from jmae.data.opening import open_each
from jmae.data.prepare import chexpert, folders
from jmae.errors import InputError, exit_code
from jmae.inputs import cases_of
from jmae.run_folder import output_folder

RNG = np.random.default_rng(0)


def run(*arguments):
    return exit_code(prepare.main, list(map(str, arguments)))


def prepared(capsys, *arguments, out, **options):
    """The rows by id, read as any recipe reads them, and what the command said."""
    assert run(*arguments, f"--out={out}") == 0, capsys.readouterr().err
    rows = parse_manifest(out / "manifest.csv", **options)[0]
    assert open_each(rows, workers=1) == []
    return {row.id: row for row in rows}, capsys.readouterr().out


def refused(capsys, *arguments, out):
    assert run(*arguments, f"--out={out}") == 2
    assert not (out / "manifest.csv").exists()
    return capsys.readouterr().err.strip().split("\n")


def picture(path, mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((8, 9), np.uint8) if mask else RNG.integers(0, 256, (8, 9), np.uint8)
    values[2:4, 3:5] = 255
    Image.fromarray(values).save(path)


def volume(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.random((4, 5, 6)) if array is None else array
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.eye(4)), path)


def lesion(marked=True):
    mask = np.zeros((4, 5, 6))
    mask[1, 2, 3] = marked
    return mask


def kinds(rows):
    return Counter((row.split, row.label, bool(row.mask)) for row in rows.values())


# Folders


def test_the_mvtec_convention_gives_labels_and_the_mask_of_the_own_defect(tmp_path, capsys):
    root = tmp_path / "bottle"
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/broken/000", "test/stained/000"):
        picture(root / f"{name}.png")
    picture(root / "ground_truth/broken/000_mask.png", mask=True)
    picture(root / "ground_truth/stained/000_mask.png", mask=True)
    (root / "license.txt").write_text("free")
    rows, said = prepared(capsys, "mvtec", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {("train", 0, False): 2, ("test", 0, False): 1, ("test", 1, True): 2}
    assert rows["test_broken_000"].mask == str(root / "ground_truth/broken/000_mask.png")
    assert rows["test_stained_000"].mask == str(root / "ground_truth/stained/000_mask.png")
    assert rows["test_broken_000"].extra == {"class": "broken"} and not rows["test_broken_000"].patient
    lines = [line.split() for line in said.splitlines()]
    assert ["train", "2", "0", "0", "0", "-"] in lines and ["test", "1", "2", "0", "2", "-"] in lines
    (line,) = refused(capsys, "folders", f"--root={tmp_path}", out=tmp_path / "other")
    assert "has no images in a folder train" in line and ": name a folder inside it: bottle" in line


def test_masks_beside_the_images_of_a_class_and_a_validation_set_are_found(tmp_path, capsys):
    root = tmp_path / "brain"
    for split in ("valid", "test"):
        for kind in ("good", "Ungood"):
            picture(root / split / kind / "img" / "7.png")
            picture(root / split / kind / "label" / "7.png", mask=True)
    picture(root / "train" / "good" / "7.png"), picture(root / "train" / "Ungood" / "8.png")
    picture(root / "unlabeled" / "u.png"), picture(root / "elsewhere" / "e.png")
    rows, said = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, True): 1},
        **{("test", 0, False): 1, ("test", 1, True): 1, ("unlabeled", None, False): 1},
    }
    assert rows["valid_Ungood_img_7"].mask == str(root / "valid/Ungood/label/7.png")
    assert rows["test_Ungood_img_7"].mask == str(root / "test/Ungood/label/7.png")
    assert (
        "1 abnormal training image," in said and "1 file outside of train, val, test and unlabeled (elsewhere)" in said
    )
    assert "no folder test" not in said


def test_folders_that_are_no_split_are_named_and_a_missing_test_is_said(tmp_path, capsys):
    for place in ("train", "normal", "pneumonia", "pneumonia/b"):
        picture(tmp_path / "sorted" / place / "a.png")
    _, said = prepared(capsys, "folders", f"--root={tmp_path / 'sorted'}", out=tmp_path / "out")
    assert "left out: 3 files outside of train, val, test and unlabeled (normal, pneumonia)\n" in said
    assert "caution: no folder test: put new scans into test, or into test/good and test/DEFECT\n" in said
    picture(tmp_path / "sorted" / "other" / "a.png")
    _, said = prepared(capsys, "folders", f"--root={tmp_path / 'sorted'}", out=tmp_path / "two")
    assert "unlabeled (normal, other, ...)\n" in said


def test_one_folder_of_masks_for_all_and_an_image_with_two_masks(tmp_path, capsys):
    root = tmp_path / "slices"
    picture(root / "train" / "a.png"), picture(root / "test" / "normal" / "b.png")
    picture(root / "test" / "tumor" / "c.png"), picture(root / "test" / "tumor" / "d.png")
    picture(root / "test" / "annotation" / "c.png", mask=True)
    rows, said = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert rows["test_tumor_c"].mask and not rows["test_tumor_d"].mask and "1 abnormal ones without a mask" in said
    picture(root / "test" / "annotation" / "c_mask.png", mask=True)
    (line,) = refused(capsys, "folders", f"--root={root}", out=tmp_path / "other")
    assert "c.png: several masks match (test/annotation/c.png, test/annotation/c_mask.png): keep one" in line


def series(folder, n, series_uid):
    """Slices as scanners store them, without an ending, and a file that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
        meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        one = pydicom.dataset.FileDataset("", {}, preamble=bytes(128), file_meta=meta)
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = 5, 6, 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.SeriesInstanceUID, one.Modality = series_uid, "MR"
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, 2.0 * k], [1, 0, 0, 0, 1, 0]
        one.PixelSpacing = [1, 1]
        one.PixelData = RNG.integers(0, 900, (5, 6)).astype("<u2").tobytes()
        one.save_as(folder / f"IM{k:04d}", enforce_file_format=True)


def test_files_that_cannot_be_read_are_named_and_no_manifest_is_written(tmp_path, capsys):
    folder = tmp_path / "normals"
    picture(folder / "a.png"), picture(folder / "b.png")
    (folder / "b.png").write_bytes(b""), (folder / "d.png").write_text("no picture"), (folder / "e.txt").write_text("e")
    flags = ["folders", f"--normal={folder}"]
    empty, other = refused(capsys, *flags, out=tmp_path / "out")
    assert empty == f"{folder / 'b.png'}: is empty: copy or export it again" and other.startswith(
        f"{folder / 'd.png'}:"
    )
    picture(folder / "b.png"), picture(folder / "d.png")
    _, said = prepared(capsys, *flags, out=tmp_path / "out")
    assert f"1 .txt file (not images, or of a format that is not read), such as {folder / 'e.txt'}" in said


def test_dicom_files_without_a_preamble_are_read_like_others(tmp_path, capsys):
    (tmp_path / "films").mkdir()
    for k in range(3):
        dicom(tmp_path / "films" / f"{k}.dcm", meta=False, PatientID=f"p{k}", Modality="DX")
    rows, said = prepared(capsys, "folders", "--normal", tmp_path / "films", out=tmp_path / "out")
    assert "3 DX images" in said and len({row.patient for row in rows.values()} - {""}) == 3


def test_two_folders_of_volumes_of_any_kind_are_one_command(tmp_path, capsys):
    healthy, new = tmp_path / "healthy", tmp_path / "new; scans"
    volume(healthy / "a.nii.gz"), series(healthy / "b", 3, "1.2.3"), (healthy / "README").write_text("scans")
    series(tmp_path / "unknown" / "c", 3, "1.2.4"), volume(tmp_path / "unknown" / "d.v2.nii")
    flags = ["folders", f"--normal={healthy}", f"--test={tmp_path / 'unknown'}"]
    rows, said = prepared(capsys, *flags, out=tmp_path / "out")
    assert {(row.id, row.split, row.label) for row in rows.values()} == {
        *(("train_a", "train", 0), ("train_b", "train", 0)),
        *(("c", "test", None), ("d.v2", "test", None)),
    }
    assert rows["train_b"].image == (str(healthy / "b"),) and "taken as normal" in said
    alone, _ = prepared(capsys, "folders", f"--normal={healthy}", out=tmp_path / "alone")
    assert len(alone) == 2
    series(healthy / "b", 2, "1.2.9")
    assert "contains 2 DICOM series: give each series a folder" in refused(capsys, *flags, out=tmp_path / "x")[0]
    picture(new / "p.png")
    assert "with a semicolon" in refused(capsys, "folders", f"--normal={new}", out=tmp_path / "x")[0]
    assert "not a folder" in refused(capsys, "folders", "--normal=none", out=tmp_path / "x")[0]
    (tmp_path / "empty").mkdir()
    assert "has no image" in refused(capsys, "folders", f"--normal={tmp_path / 'empty'}", out=tmp_path / "x")[0]
    assert "--root excludes" in refused(capsys, *flags, f"--root={healthy}", out=tmp_path / "x")[0]
    assert "--test: jsrt has no such flag" in refused(capsys, "jsrt", "--root=x", "--test=y", out=tmp_path / "x")[0]
    assert "did you mean mvtec?" in refused(capsys, "mvtek", "--root=x", out=tmp_path / "x")[0]


@pytest.mark.parametrize(("normals", "share"), [(9, ""), (40, "0.5"), (100, "0.2")])
def test_the_next_command_keeps_normals_back_for_p_values_where_none_are_in_val(normals, share, tmp_path, capsys):
    for folder, count in (("normals", normals), ("new", 1)):
        for i in range(count):
            picture(tmp_path / folder / f"{i}.png")
    words = [f"--normal={tmp_path / 'normals'}", f"--test={tmp_path / 'new'}"]
    _, said = prepared(capsys, "folders", *words, out=tmp_path / "my scans")
    command = next(line for line in said.splitlines() if line.startswith("next: "))
    assert command.endswith("--workdir 'runs/my scans'")
    assert f"--config.data.calibration={share} " in command if share else "calibration" not in command
    line = "from 20 normals that data.calibration keeps" if share else "no normal scan is kept from the training"
    assert f"p-values: {line}" in said
    assert ("warning: only 9 normal scans to learn from: " in said) == (normals == 9)
    check = f"first, to find damaged files and copies: jmae check '{tmp_path / 'my scans' / 'manifest.csv'}'"
    assert said.splitlines()[-2:] == [check, command]
    name, why = recipe.suggested("images")
    assert f"recipe: {name}:small ({why}; docs/how-to/choose.md compares the systems)" in said
    assert f"jmae train --config {name}:small " in command


def test_files_in_one_place_that_would_have_one_id_are_named(tmp_path, capsys):
    picture(tmp_path / "a" / "x.png"), picture(tmp_path / "a" / "x.jpg")
    (line,) = refused(capsys, "folders", f"--normal={tmp_path / 'a'}", out=tmp_path / "out")
    assert "train_x: this would be the id of" in line and "x.jpg" in line and "x.png" in line


# nnU-Net


@pytest.fixture
def dataset(tmp_path):
    """Two channels; of two training cases one has a lesion, a test case has no segmentation."""
    root = tmp_path / "Dataset007_Brain"
    for part, cases in (("Tr", ("b_1", "b_2")), ("Ts", ("b_3",))):
        for case in cases:
            for channel in range(2):
                volume(root / f"images{part}" / f"{case}_{channel:04d}.nii.gz")
    volume(root / "labelsTr" / "b_1.nii.gz", lesion()), volume(root / "labelsTr" / "b_2.nii.gz", lesion(False))
    about = {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": {"background": 0, "tumour": 1, "oedema": 2}}
    (root / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz"}))
    return root


def test_nnunet_joins_channels_and_takes_labels_from_segmentations(dataset, tmp_path, capsys):
    rows, said = prepared(
        capsys, "nnunet", f"--root={dataset}", out=tmp_path / "out", crops=True, normal_crops_only=True
    )
    assert kinds(rows) == {("train", 1, True): 1, ("train", 0, False): 1, ("test", None, False): 1}
    names = [f"b_1_{k:04d}.nii.gz" for k in range(2)]
    assert rows["b_1"].image == tuple(str(dataset / "imagesTr" / name) for name in names)
    assert "3 cases of FLAIR + T1" in said and "caution: every class above 0 counts as lesion: tumour, oedema" in said
    assert "--config.data.channels=2 --config.data.normal_crops_only=True" in said
    volume(dataset / "labelsTs" / "b_3.nii.gz", lesion())
    rows, _ = prepared(capsys, "nnu-net", f"--root={dataset}", out=tmp_path / "two", crops=True, normal_crops_only=True)
    assert rows["b_3"].label == 1 and rows["b_3"].mask == str(dataset / "labelsTs" / "b_3.nii.gz")


def test_nnunet_without_segmentations_trains_on_what_is_taken_as_normal(dataset, tmp_path, capsys):
    (dataset / "labelsTr").rename(tmp_path / "away"), (dataset / "dataset.json").unlink()
    rows, said = prepared(capsys, "nnunet", f"--root={dataset}", out=tmp_path / "out")
    assert kinds(rows) == {("train", 0, False): 2, ("test", None, False): 1} and "without labelsTr" in said


def test_what_an_nnunet_folder_lacks_is_one_line(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    (dataset / "imagesTr" / "b_1_0000.nii.gz").unlink(), (dataset / "labelsTr" / "b_2.nii.gz").unlink()
    lines = refused(capsys, "nnunet", f"--root={dataset}", out=out)
    assert "b_1: has the channels 0001 of 2" in lines[0] and "b_2.nii.gz: not found" in lines[1]
    (dataset / "dataset.json").write_text('{"channel_names": {"first": "T1"}}')
    assert "need numbers from 0" in refused(capsys, "nnunet", f"--root={dataset}", out=out)[0]
    (dataset / "dataset.json").write_text("{")
    assert "dataset.json: not readable" in refused(capsys, "nnunet", f"--root={dataset}", out=out)[0]
    (tmp_path / "away").mkdir()
    assert "has no folder imagesTr" in refused(capsys, "nnunet", f"--root={tmp_path / 'away'}", out=out)[0]
    assert (
        f"name a folder inside it: {dataset.name}" in refused(capsys, "nnunet", f"--root={dataset.parent}", out=out)[0]
    )


def test_nnunet_without_dataset_json_takes_the_usual_ending_and_says_what_lesions_are(tmp_path, capsys):
    root = tmp_path / "set"
    for case in ("a", "b", "c"):
        picture(root / "imagesTr" / f"{case}_0000.png")
        picture(root / "labelsTr" / f"{case}.png", mask=True)
    (root / "imagesTr" / "notes.txt").write_text("")
    rows, said = prepared(capsys, "nnunet", f"--root={root}", out=tmp_path / "out", crops=True, normal_crops_only=True)
    assert kinds(rows) == {("train", 1, True): 3}
    assert "1 file not called CASE_0000.png (.txt)" in said
    assert "every class above 0 counts as lesion: dataset.json names no classes" in said
    for file in (root / "imagesTr").iterdir():
        file.rename(file.with_name(f"x{file.name.replace('_0000', '')}"))
    assert (
        "none of 4 files (such as xa.png) is called CASE_0000.nii.gz"
        in refused(capsys, "nnunet", f"--root={root}", out=tmp_path / "two")[0]
    )


def test_a_folder_of_many_files_takes_time_in_proportion(tmp_path, monkeypatch, capfd):
    names = [f"{i}.{'png' if i % 2 else 'txt'}" for i in range(20_000)]
    monkeypatch.setattr(folders, "walk", lambda folder, other: [(folder, names)])
    monkeypatch.setattr(folders, "is_dicom", lambda file: False)
    began, other = time.process_time(), []
    assert len(list(folders.cases(tmp_path, other, {}))) == len(other) == 10_000
    assert time.process_time() - began < 10  # a search in a list for each of them takes minutes
    monkeypatch.setattr(folders, "SECONDS_BETWEEN_LINES", 0)
    del names[3:]
    assert [path.name for path in folders.cases(tmp_path, other, {})] == ["1.png"]
    assert f"{tmp_path}: 2 files read" in capfd.readouterr().err


def test_a_data_json_of_ddad_is_taken_as_it_is(tmp_path, capsys):
    root, out = tmp_path / "rsna", tmp_path / "out"
    names = {key: [f"{key}{i}.png" for i in range(n)] for key, n in (("a", 3), ("b", 1), ("c", 2), ("d", 1), ("e", 1))}
    for name in [name for part in names.values() for name in part]:
        picture(root / "train_png_512" / name)
    about = {"train": {"0": names["a"], "unlabeled": {"0": names["b"], "1": names["c"]}}}
    about["test"] = {"0": names["d"], "1": names["e"]}
    assert "has no data.json or rsna_data.json" in refused(capsys, "ddad", f"--root={root}", out=out)[0]
    (root / "data.json").write_text(json.dumps(about))
    rows, said = prepared(capsys, "ddad", f"--root={root}", out=out)
    assert kinds(rows) == {
        ("train", 0, False): 3,
        ("unlabeled", None, False): 3,
        ("test", 0, False): 1,
        ("test", 1, False): 1,
    }
    assert f"--config.data.unlabeled_labels={out}/unlabeled_labels.csv" in said
    assert (out / "unlabeled_labels.csv").read_text().splitlines() == ["id,label", "b0,0", "c0,1", "c1,1"]
    del about["train"]["unlabeled"], about["test"]["0"]
    (root / "data.json").write_text(json.dumps(about))
    _, said = prepared(capsys, "ddad", f"--root={root}", out=tmp_path / "absent")
    for absent in ("train.unlabeled.0", "train.unlabeled.1", "test.0"):
        assert f"1 list {absent}, missing in data.json" in said
    about["train"]["unlabeled"] = {"0": names["b"], "1": names["b"]}
    (root / "data.json").write_text(json.dumps(about))
    assert "b0: this would be the id of" in refused(capsys, "ddad", f"--root={root}", out=tmp_path / "two")[0]
    assert not (tmp_path / "two").exists()  # so that it is free for the next try
    about["train"]["unlabeled"], about["test"]["0"] = {"0": names["b"], "1": names["c"]}, names["d"]
    (root / "data.json").write_text(json.dumps(about))
    (root / "train_png_512" / "e0.png").unlink()
    assert (
        "e0.png: not found (list test.1 of data.json)"
        in refused(capsys, "ddad", f"--root={root}", out=tmp_path / "two")[0]
    )
    for text in ("[]", "{", '{"train": {"0": ["../x.png"]}}'):
        (root / "data.json").write_text(text)
        (line,) = refused(capsys, "ddad", f"--root={root}", out=tmp_path / "two")
        assert "not a data.json of train and test lists" in line


def test_dicom_of_any_name_is_found_and_files_that_are_not_read_are_counted(tmp_path, capsys):
    folder = tmp_path / "normal"
    folder.mkdir()
    for i, name in enumerate(("1.2.840.113619.2.5", "plain", "old.IMA", "odd.name", "x.dcm")):
        dicom(folder / name, np.arange(600, dtype=np.uint16).reshape(20, 30) + i)
    picture(folder / "a.png")
    for name in ("a.bmp", "b.bmp", "c.gif", "README", "Thumbs.db"):
        (folder / name).write_bytes(b"BM" * 99)
    rows, said = prepared(capsys, "folders", f"--normal={folder}", out=tmp_path / "out")
    assert {row.image[0].rsplit("/", 1)[1] for row in rows.values()} == {
        *("1.2.840.113619.2.5", "plain", "old.IMA", "odd.name", "x.dcm", "a.png")
    }
    for count in ("2 .bmp files", "1 .gif file", "1 .db file"):
        assert f"{count} (not images, or of a format that is not read)" in said
    what = "not DICOM: give an image its ending, such as .jpg or .png"
    assert f"1 file without an ending ({what}), such as {folder / 'README'}" in said
    for path in list(folder.iterdir()):
        if path.suffix not in (".bmp", ".gif"):
            path.unlink()
    (line,) = refused(capsys, "folders", f"--normal={folder}", out=tmp_path / "two")
    assert "has no image, but 2 .bmp files" in line


# BIDS


@pytest.fixture
def bids(tmp_path):
    """Four subjects with T1w and FLAIR, one in two sessions, one without FLAIR, one with a lesion."""
    root = tmp_path / "bids"
    for name in ("sub-01/ses-a", "sub-01/ses-b", "sub-02", "sub-03", "sub-04"):
        for suffix in ("T1w", "FLAIR"):
            if (name, suffix) != ("sub-04", "FLAIR"):
                volume(root / name / "anat" / f"{name.replace('/', '_')}_{suffix}.nii.gz")
    volume(root / "derivatives/manual/sub-02/anat/sub-02_label-L_mask.nii.gz", lesion())
    volume(root / "derivatives/manual/sub-03/anat/sub-03_desc-lesion_mask.nii.gz", lesion(False))
    volume(root / "derivatives/manual/sub-03/anat/sub-03_desc-brain_mask.nii.gz", lesion())
    return root


def test_bids_joins_the_chosen_sequences_and_knows_patients(bids, tmp_path, capsys):
    rows, said = prepared(capsys, "bids", f"--root={bids}", "--sequences=T1w,FLAIR", out=tmp_path / "out")
    assert {row.id: row.patient for row in rows.values()} == {
        **{"sub-01_ses-a": "sub-01", "sub-01_ses-b": "sub-01", "sub-02": "sub-02", "sub-03": "sub-03"}
    }
    files = [bids / "sub-01/ses-a/anat" / f"sub-01_ses-a_{suffix}.nii.gz" for suffix in ("T1w", "FLAIR")]
    assert rows["sub-01_ses-a"].image == tuple(map(str, files))
    assert rows["sub-02"].label == 1 and rows["sub-02"].mask and rows["sub-02"].split == "test"
    held = {row.patient for row in rows.values() if row.split == "test"}
    assert len(held) == 2 and held < {"sub-01", "sub-02", "sub-03"}  # one with a lesion, one without
    assert all(row.label == 0 and not row.mask for row in rows.values() if row.id != "sub-02")
    assert "1 session without FLAIR" in said and "--config.data.channels=2" in said


def test_bids_asks_for_sequences_where_there_are_several(bids, tmp_path, capsys):
    (line,) = refused(capsys, "bids", f"--root={bids}", out=tmp_path / "out")
    assert "has T1w (5), FLAIR (4): choose the channels in their order: --sequences=" in line
    volume(bids / "sub-02" / "anat" / "sub-02_acq-fast_T1w.nii.gz")
    _, said = prepared(capsys, "bids", f"--root={bids}", "--sequences=T1w", out=tmp_path / "out")
    assert "1 session with several T1w" in said
    rows, _ = prepared(capsys, "bids", f"--root={bids}", "--sequences=acq-fast_T1w", out=tmp_path / "two")
    assert list(rows) == ["sub-02"]
    volume(bids / "derivatives/other/sub-02_label-L_mask.nii.gz", np.ones((4, 5, 7)))
    lines = refused(capsys, "bids", f"--root={bids}", "--sequences=FLAIR", out=tmp_path / "three")
    assert "has other grids than sub-02_label-L_mask.nii.gz, sub-02_label-L_mask.nii.gz: choose one" in lines[0]
    assert "has no sub-NAME/anat" in refused(capsys, "bids", f"--root={tmp_path / 'out'}", out=tmp_path / "four")[0]


def test_bids_keeps_subjects_with_a_mask_of_no_one_session_out_of_train(bids, tmp_path, capsys):
    for session in ("ses-a", "ses-b"):
        for subject in ("sub-05", "sub-06"):
            volume(bids / subject / session / "anat" / f"{subject}_{session}_T1w.nii.gz")
    volume(bids / "sub-07/ses-a/anat/sub-07_ses-a_T1w.nii.gz")
    masks = bids / "derivatives" / "lesions"
    volume(masks / "sub-05_space-T1w_label-lesion_mask.nii.gz", lesion())  # of which session?
    volume(masks / "sub-06_ses-a_label-lesion_dseg.nii.gz", lesion())
    volume(masks / "sub-07_space-T1w_label-lesion_mask.nii.gz", lesion())  # of its only session
    volume(masks / "sub-04_ses-z_label-lesion_mask.nii.gz", lesion())  # of a session without images
    rows, said = prepared(capsys, "bids", f"--root={bids}", "--sequences=T1w", out=tmp_path / "out")
    assert {id: rows[id].label for id in rows if rows[id].patient > "sub-03"} == {
        **{"sub-04": None, "sub-05_ses-a": None, "sub-05_ses-b": None},
        **{"sub-06_ses-a": 1, "sub-06_ses-b": None, "sub-07_ses-a": 1},
    }
    assert all(row.split == "test" for row in rows.values() if row.patient > "sub-03")
    assert rows["sub-06_ses-a"].mask.endswith("dseg.nii.gz") and {row.split for row in rows.values()} > {"test"}
    assert "2 lesion masks without a single case that fits (their subjects do not train)" in said
    volume(masks / "sub-06_ses-b_label-lesion_mask.nii.gz", lesion(False))
    rows, _ = prepared(capsys, "bids", f"--root={bids}", "--sequences=T1w", out=tmp_path / "two")
    assert (rows["sub-06_ses-b"].split, rows["sub-06_ses-b"].label) == ("test", 0)


# CheXpert

HEAD = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices\n"
)


@pytest.fixture
def radiographs(tmp_path, monkeypatch):
    """train.csv as published; of patient 1 two normal films and a lateral one, of 9 a normal and a sick one."""
    monkeypatch.setattr(chexpert, "PARTS", {0: {"test": 1, "val": 1, "train": 3}, 1: {"test": 1, "val": 1}})
    root, text = tmp_path / "CheXpert-v1.0-small", HEAD

    def film(patient, study, view, side, beam, normal, pneumonia, part="train"):
        name = f"{part}/patient{patient:05d}/study{study}/view{view}_{side.lower()}.jpg"
        picture(root / name)
        return f"CheXpert-v1.0-small/{name},Female,{50 + patient},{side},{beam},{normal},,,,,,,{pneumonia},,,,,,1.0\n"

    text += film(1, 1, 1, "Frontal", "PA", "1.0", "") + film(1, 2, 1, "Frontal", "PA", "1.0", "0.0")
    text += film(1, 1, 2, "Lateral", "", "1.0", "") + film(2, 1, 1, "Frontal", "AP", "1.0", "")
    text += "".join(film(k, 1, 1, "Frontal", "PA", "1.0", "") for k in range(3, 8))
    text += film(8, 1, 1, "Frontal", "PA", "", "1.0") + film(9, 2, 1, "Frontal", "PA", "", "1.0")
    text += film(9, 1, 1, "Frontal", "PA", "1.0", "") + film(10, 1, 1, "Frontal", "PA", "", "-1.0")
    (root / "train.csv").write_text(text)
    (root / "valid.csv").write_text(HEAD + film(64541, 1, 1, "Frontal", "PA", "0.0", "1.0", "valid"))
    return root


def test_chexpert_draws_one_pa_film_a_patient_and_keeps_uncertain_ones_out(radiographs, tmp_path, capsys):
    rows, said = prepared(capsys, "chexpert", f"--root={radiographs}", out=tmp_path / "out")
    assert Counter((row.split, row.label) for row in rows.values()) == {
        **{("train", 0): 3, ("val", 0): 1, ("test", 0): 1, ("val", 1): 1, ("test", 1): 1}
    }
    patients = [row.patient for row in rows.values()]
    assert len(set(patients)) == len(patients) and "patient00010" not in patients and "patient00002" not in patients
    assert {row.label for row in rows.values() if row.patient == "patient00009"} <= {1}
    one = next(row for row in rows.values() if row.patient == "patient00003" or row.patient == "patient00004")
    assert one.id == f"{one.patient}_study1_view1" and one.extra["view"] == "PA" and one.extra["sex"] == "Female"
    assert "6 patients with No Finding, 3 with Pneumonia (PA views)" in said
    assert "1 normal image of patients with Pneumonia" in said and "2 images of other views" in said
    again, _ = prepared(capsys, "chexpert", f"--root={radiographs.parent}", out=tmp_path / "again")
    other, _ = prepared(capsys, "chexpert", f"--root={radiographs}", "--seed=1", out=tmp_path / "other")
    assert again.keys() == rows.keys() != other.keys()
    _, said = prepared(capsys, "chexpert", f"--root={radiographs}", "--views=frontal", out=tmp_path / "frontal")
    assert "7 patients with No Finding" in said and "1 image of other views" in said


def test_a_film_of_another_view_or_an_uncertain_pneumonia_keeps_a_patient_from_the_normals(radiographs, tmp_path):
    lines = (radiographs / "train.csv").read_text().splitlines()
    film = next(line for line in lines if "patient00003" in line)
    lateral = film.replace("view1_frontal", "view2_lateral").replace("Frontal,PA,1.0,,,,,,,", "Lateral,,,,,,,,,1.0")
    unsure = next(line for line in lines if "patient00004" in line).replace("PA,1.0,,,,,,,", "PA,1.0,,,,,,,-1.0")
    kept = [line for line in lines if "patient00004" not in line]
    (radiographs / "train.csv").write_text("\n".join([*kept, lateral, unsure]) + "\n")
    prepared = chexpert.prepare(radiographs, tmp_path / "out", 0)
    assert "4 patients with No Finding, 3 with Pneumonia" in prepared.found  # of 6, without 3 and 4
    assert prepared.left_out["normal images of patients with Pneumonia"] == 2


def test_fewer_films_of_chexpert_are_shared_out(radiographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chexpert, "PARTS", {0: {"test": 100, "val": 50, "train": 150}, 1: {"test": 2, "val": 1}})
    rows, _ = prepared(capsys, "chexpert", f"--root={radiographs}", out=tmp_path / "out")
    assert Counter((row.split, row.label) for row in rows.values()) == {
        **{("train", 0): 3, ("val", 0): 1, ("test", 0): 2, ("val", 1): 1, ("test", 1): 2}
    }


def test_what_chexpert_lacks_is_one_line(radiographs, tmp_path, capsys):
    out, table = tmp_path / "out", radiographs / "train.csv"
    assert "--views=AP: unknown views" in refused(capsys, "chexpert", f"--root={radiographs}", "--views=AP", out=out)[0]
    (radiographs / "valid" / "patient64541" / "study1" / "view1_frontal.jpg").rename(tmp_path / "gone.jpg")
    (radiographs / "train" / "patient00008" / "study1" / "view1_frontal.jpg").unlink()
    (radiographs / "train" / "patient00009" / "study2" / "view1_frontal.jpg").unlink()
    lines = refused(capsys, "chexpert", f"--root={radiographs}", out=out)
    assert len(lines) == 2 and all("listed in the table but not found" in line for line in lines)
    text = table.read_text()
    table.write_text(text.replace("Pneumonia", "Pneumonitis"))
    assert "has no column Pneumonia" in refused(capsys, "chexpert", f"--root={radiographs}", out=out)[0]
    table.write_text(text + "somewhere/else.jpg,,,Frontal,PA,1.0\n")
    assert (
        "line 15: 'somewhere/else.jpg' is not the path of an image"
        in refused(capsys, "chexpert", f"--root={radiographs}", out=out)[0]
    )
    table.unlink()
    assert "has no train.csv" in refused(capsys, "chexpert", f"--root={radiographs}", out=out)[0]


# Leaks of public lists


def test_lists_of_two_versions_of_covidx_and_a_patient_in_both_are_noticed(tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        picture(root / name)
    (root / "train_COVIDx7B.txt").write_text("1 a.png negative cohen\n2 b.png negative rsna\n")
    (root / "test_COVIDx8B.txt").write_text("2 c.png positive ricord\n")
    (line,) = refused(capsys, "covidx", f"--root={root}", out=out)
    assert "train_COVIDx7B.txt and test_COVIDx8B.txt are of two versions" in line
    (root / "train_COVIDx7B.txt").rename(root / "train_COVIDx8B.txt")
    rows, said = prepared(capsys, "covidx", f"--root={root}", out=tmp_path / "dropped")
    assert rows.keys() == {"a.png", "c.png"} and "1 train image of patients of test" in said
    rows, said = prepared(capsys, "covidx", f"--root={root}", "--leaks=keep", out=tmp_path / "kept")
    assert len(rows) == 3 and "1 patient in two splits: say so with every figure" in said
    (root / "test_COVIDx8B.txt").write_text("3 a.png positive ricord\n")
    (line,) = refused(capsys, "covidx", f"--root={root}", out=out)
    assert "a.png: listed in both splits" in line


def test_two_pictures_of_one_name_in_a_folder_of_hyper_kvasir_are_noticed(tmp_path, capsys):
    root = tmp_path / "root"
    for name in ("cecum/a.jpg", "cecum/a.png", "segmented-images/images/p.jpg", "segmented-images/masks/p.jpg"):
        picture(root / name)
    (line,) = refused(capsys, "hyper_kvasir", f"--root={root}", out=tmp_path / "out")
    assert "cecum/a.png: a.jpg beside it has the same name: keep one" in line


def test_no_image_gets_the_mask_of_another_class_and_normals_of_another_name_are_no_lesions(tmp_path):
    for name in ("train/good/0.png", "test/crack/0.png", "test/scratch/0.png", "ground_truth/scratch/0_mask.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / name)
    found = folders.prepare(tmp_path, tmp_path / "out", 0)
    masks = {row.extra["class"]: row.mask for row in found.rows if row.split == "test"}
    assert masks["crack"] is None and masks["scratch"].endswith("ground_truth/scratch/0_mask.png")
    assert found.left_out["masks of images that are normal or not there"] == 0
    (tmp_path / "test" / "crack").rename(tmp_path / "test" / "no_finding")
    with pytest.raises(InputError, match="the class 'no_finding' would count as abnormal"):
        folders.prepare(tmp_path, tmp_path / "out", 0)


# What jmae wrote


def lines_of_done(folder, *files):
    """The list that `predict` keeps in its folder, of one case a file."""
    lines = [{"weights": ""}, *({"id": file, "image": [], "of": [], "files": [file], "line": {}} for file in files)]
    (folder / ".scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_maps_and_overlays_of_jmae_are_no_scans(tmp_path, capsys):
    normals = tmp_path / "normals"
    picture(normals / "a.png"), picture(normals / "b.png")
    picture(normals / "a_anomaly.tif"), picture(normals / "a_overlay.png")  # predictions beside the scans
    lines_of_done(normals, "a_anomaly.tif", "a_overlay.png")
    picture(normals / "b_anomaly.tif")  # of a case whose line was not written
    picture(normals / "p" / "1" / "n_anomaly.tif"), picture(normals / "p" / "n_anomaly.tif")  # those of two runs
    lines_of_done(normals / "p" / "1", "n_anomaly.tif"), (normals / "p" / "scores.csv").write_text("id\n")
    for name in ("evaluation", "evaluation-val"):  # a run in the folder of the scans
        picture(normals / name / "maps" / "a_anomaly.tif")
    (normals / "config.json").write_text("{}"), (normals / "environment.json").write_text("{}")
    picture(normals / "e" / "maps" / "a_anomaly.tif"), picture(normals / "e" / "maps" / "b_recon.tif")  # cut short
    (normals / "r" / "cache").mkdir(parents=True)
    np.save(normals / "r" / "cache" / "a-0123456789abcdef.npy", np.zeros((8, 9)))  # a training cut short
    picture(normals / "maps" / "c.png"), picture(normals / "maps" / "c_anomaly.png")  # own scans
    rows, said = prepared(capsys, "folders", f"--normal={normals}", out=tmp_path / "out")
    assert list(rows) == ["train_a", "train_b", "train_maps_c", "train_maps_c_anomaly"]
    assert (
        f"left out: 12 results of jmae (of runs, evaluations, predictions), such as {normals}/a_anomaly.tif\n" in said
    )
    other = []
    found = [Path(case[0]).name for case in cases_of(str(normals), other, volumes=False)]
    assert found == ["a.png", "b.png", "c.png", "c_anomaly.png"]
    (line,) = refused(capsys, "folders", f"--normal={normals}/e", out=tmp_path / "other")
    assert f"{normals}/e: has no image, but 1 result of jmae (" in line


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (prepare.main, ["folders", "--normal=DIR", "--out=DIR"]),
        (quickstart.main, ["DIR", "DIR", "--out=DIR"]),
        (predict.main, ["--workdir=none", "--out=DIR", "DIR"]),
        (train.main, ["--config=ppii:smoke", "--config.data.phantom=lesions", "--workdir=DIR"]),
    ],
)
def test_a_folder_of_scans_is_no_place_for_results(main, words, tmp_path, capsys):
    picture(tmp_path / "a.png")
    assert exit_code(main, [word.replace("DIR", str(tmp_path)) for word in words]) == 2
    flag = "--workdir" if main is train.main else "--out"
    assert capsys.readouterr().err == f"{tmp_path}: holds scans, such as a.png: name another {flag}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_has_results_beside_scans_takes_more_of_their_kind(tmp_path):
    picture(tmp_path / "a_anomaly.tif")
    lines_of_done(tmp_path, "a_anomaly.tif")
    assert output_folder(tmp_path, "run") == tmp_path  # holds no scan
    picture(tmp_path / "a.png")
    assert output_folder(tmp_path, "predictions") == tmp_path
    with pytest.raises(InputError, match=r"holds scans, such as a\.png: name another --workdir"):
        output_folder(tmp_path, "run")


def test_subfolders_are_named_and_those_called_after_lesions_get_a_caution(tmp_path, capsys):
    normals, new = tmp_path / "normals of abnormal", tmp_path / "new"
    picture(normals / "a.png"), picture(normals / "nest" / "sub" / "Abnormal-1" / "b.png")
    picture(normals / "no_tumor" / "c.png"), picture(new / "lesion" / "d.png")
    _, said = prepared(capsys, "folders", f"--normal={normals}", f"--test={new}", out=tmp_path / "out")
    place = normals / "nest" / "sub" / "Abnormal-1"
    assert f": 4 cases, of them 1 in {place}, 1 in {normals}/no_tumor, 1 in {new}/lesion; the training" in said
    what = f"1 scan taken as normal, in {place}: the name of the folder says abnormal"
    remedy = "move the scans to the folder of --test, or rename the folder"
    assert [line for line in said.splitlines() if line.startswith("caution")] == [f"caution: {what}: {remedy}"]
    for i in range(6):
        picture(new / "lesion" / f"p{i}" / "d.png"), picture(normals / "tumours" / f"p{i}" / "d.png")
    _, said = prepared(capsys, "folders", f"--normal={normals}", f"--test={new}", out=tmp_path / "second")
    assert said.count(f" 1 in {tmp_path}") == 5 and " and 10 in 10 more subfolders; the training cases" in said
    assert f"caution: 7 scans taken as normal, in {place} (and 6 more such folders): " in said


def test_folders_that_may_be_classes_are_a_question(tmp_path, capsys):
    normals = tmp_path / "sorted"
    for name in ("normal", "train", "pneumonia", "P01", "pneumonia/p2", "sub-1/anat", "sub-2/anat"):
        picture(normals / name / f"{name[:2]}.png")
    _, said = prepared(capsys, "folders", f"--normal={normals}", out=tmp_path / "out")
    what = f"scans taken as normal, of them 1 in {normals}/pneumonia: if one of these folders holds abnormal scans"
    assert f"caution: {what}, move it out of {normals}" in said


def test_a_series_in_a_folder_called_after_lesions_gets_a_caution(tmp_path, capsys):
    series(tmp_path / "normals" / "a", 3, "1.2"), series(tmp_path / "normals" / "positive", 3, "1.3")
    _, said = prepared(capsys, "folders", f"--normal={tmp_path}/normals", out=tmp_path / "out", crops=True)
    assert ": 2 cases; the" in said and f"caution: 1 scan taken as normal, in {tmp_path}/normals/positive: " in said


# Paths


def test_relative_paths_let_images_and_manifest_move_together(tmp_path, capsys):
    for name in ("train/good/a.png", "train/good/b.png", "test/good/c.png", "test/bad/d.png", "masks/bad/d.png"):
        picture(tmp_path / "here" / "scans" / name, mask="masks" in name)
    rows, _ = prepared(
        capsys, "folders", "--relative", f"--root={tmp_path}/here/scans", out=tmp_path / "here" / "data" / "mine"
    )
    text = (tmp_path / "here" / "data" / "mine" / "manifest.csv").read_text()
    assert str(tmp_path) not in text and text.count("../../scans/") == 5
    words = ("--relative", "true", "folders", f"--root={tmp_path}/here/scans")
    assert prepared(capsys, *words, out=tmp_path / "here" / "data" / "again")[0] == rows
    assert (tmp_path / "here" / "data" / "again" / "manifest.csv").read_text() == text
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "data" / "mine" / "manifest.csv"
    assert exit_code(check.main, [str(moved)]) == 0
    again = [row.mask or row.image[0] for row in parse_manifest(moved)[0]]
    assert again == [(row.mask or row.image[0]).replace("/here/", "/there/") for row in rows.values()]


def test_a_path_in_the_manifest_has_no_way_back(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "normals" / "a.png"), (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    prepared(capsys, "folders", "--normal=../normals", out=Path("data"))
    assert f",{tmp_path}/normals/a.png," in Path("data/manifest.csv").read_text()
