"""Volumes of Duke-Breast-Cancer-MRI, BraTS and nnssl, in their true layouts."""

import json

import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from trees import dicom_file, kinds, lesion, picture, prepared, refused, refused_in_one_line, text, volume, workbook

from jmae import recipe
from jmae.data.files import read_image
from jmae.data.preparation import prepared_volume
from jmae.data.prepare import duke, fastmri_plus, nova
from jmae.errors import InputError

SLICES, ROWS, COLUMNS = 5, 6, 8


def series(folder, description, number, rising=True, right_first=True, modality="MR"):
    """A series of TCIA; its pixel values are 100 * slice along the normal + 10 * row + column."""
    series_uid, sign = uid.generate_uid(), 1 if right_first else -1
    orientation = [sign, 0, 0, 0, sign, 0]  # both axes turned: the normal stays the same
    for k in range(SLICES):
        at = (k + 1) if rising else SLICES - k
        tags = {"SeriesInstanceUID": series_uid, "SeriesDescription": description, "SeriesNumber": number}
        tags |= {"Modality": modality, "InstanceNumber": at, "PixelSpacing": [1, 1], "PatientID": folder.parts[-3]}
        tags |= {"ImagePositionPatient": [0, 0, 2.0 * k], "ImageOrientationPatient": orientation}
        values = 100 * k + 10 * np.arange(ROWS)[:, None] + np.arange(COLUMNS)
        dicom_file(folder / f"1-{at:02d}.dcm", values, **tags)


def patient(root, number, *found, **options):
    """`found` are (folder, SeriesDescription) pairs of one study."""
    study = (
        root / "Duke-Breast-Cancer-MRI" / f"Breast_MRI_{number:03d}" / "01-01-1990-NA-MRI BREAST BILATERAL WWO-97538"
    )
    for i, (folder, description) in enumerate(found):
        series(study / f"{i + 3}.000000-{folder}-{10000 + i}", description, i + 3, **options)


USUAL = (
    *(("ax dyn pre", "ax dyn pre"), ("ax t1 tse", "ax t1 tse")),
    *(("ax dyn 1st pas", "ax dyn 1st pas"), ("ax dyn 2nd pass", "ax dyn 2nd pass")),
)
GE = (  # on disk the slash of Ph1/ax is lost
    *(("ax 3d dyn", "ax 3d dyn"), ("Ph1ax 3d dyn", "Ph1/ax 3d dyn"), ("Ph2ax 3d dyn", "Ph2/ax 3d dyn")),
    *(("Ph3ax 3d dyn", "Ph3/ax 3d dyn"), ("ax t1  c", "ax t1 +c"), ("ax t1", "ax t1"), ("loc", "3 plane loc")),
)


@pytest.fixture
def breasts(tmp_path):
    """1 trains, 2 (other names, falling z, turned axes) and 6 are tested, 3 is val, 4 is bilateral, 5 lacks phase 2."""
    root = tmp_path / "manifest-1654812109500"
    patient(root, 1, *USUAL)
    patient(root, 2, *GE, rising=False, right_first=False)
    patient(root, 3, *USUAL), patient(root, 4, *USUAL), patient(root, 5, *USUAL[:3]), patient(root, 6, *USUAL)
    segmentation = root / "Duke-Breast-Cancer-MRI/Breast_MRI_001/01-01-1990-NA-x-1/900.000000-Segmentation-1"
    series(segmentation, "ax dyn pre", 1, modality="SEG")
    text(root / "Duke-Breast-Cancer-MRI" / "LICENSE", "CC BY-NC 4.0")
    names = [f"Breast_MRI_{k:03d}" for k in range(1, 7)]
    box = ["Patient ID", "Start Row", "End Row", "Start Column", "End Column", "Start Slice", "End Slice"]
    columns = [(5, 8), (5, 8), (5, 8), (5, 8), (1, 4), (1, 4)]  # on the tumour's side
    boxes = [[name, 2, 3, *own, 2, 2] for name, own in zip(names, columns, strict=True)]
    workbook(root / "Annotation_Boxes.xlsx", [box, *boxes])
    clinical = [
        ["Patient Information", "", "Tumor"],
        ["Patient ID", "Bilateral Information ", "Position"],
        ["", "0=no,1=yes", "L, R"],
    ]
    sides = ["L", "R", "L", "L", "R", "R5"]
    clinical += [[name, int(name.endswith("4")), side] for name, side in zip(names, sides, strict=True)]
    workbook(root / "Clinical_and_Other_Features.xlsx", clinical)
    lists = {"train": names[:1] + names[3:5], "valid": names[2:3], "test": names[1:2] + names[5:]}
    for part, own in lists.items():
        lines = [f"{name},{10 + i}" for i, name in enumerate(own)]
        text(root / "anomaly_no_bilateral" / f"{part}.csv", "\n".join(["identifier,volume", *lines]))
    return root


def test_duke_chooses_series_by_description_halves_by_side_and_boxes_by_the_direction_of_slices(
    breasts, tmp_path, capsys
):
    rows, said = prepared(capsys, "duke", f"--root={breasts}", out=tmp_path / "out")
    assert {row.id[-1]: (row.split, row.label, row.extra["half"]) for row in rows.values()} == {
        **{"1": ("train", 0, "first"), "2": ("test", 1, ""), "3": ("val", 0, "first"), "6": ("test", 1, "")}
    }
    two = rows["Breast_MRI_002"]
    names = lambda files: [file.rsplit(".000000-", 1)[1][:-6] for file in files]
    assert names(two.image) == ["ax t1  c", "ax 3d dyn"] and names(two.pre) == ["ax 3d dyn"]
    assert names(two.post) == ["Ph1ax 3d dyn", "Ph2ax 3d dyn", "Ph3ax 3d dyn"]
    assert "1 second series of a kind" in said and "1 series of another kind" in said
    assert "1 bilateral case," in said and "1 case without phase 2" in said
    assert "--config maemi:paper" in said and "--config.data.region=nonzero" in said
    # Columns 5 to 8, rows 2 to 3 and file 2, which is the second from below, or from above where z falls.
    assert rows["Breast_MRI_001"].boxes == ((4, 1, 1, 8, 3, 2),) and two.boxes == ((4, 1, 3, 8, 3, 4),)
    image = read_image(two.image[1]).array[..., 0]
    assert image.shape == (COLUMNS, ROWS, SLICES)
    x0, y0, z0, x1, y1, z1 = map(int, two.boxes[0])
    np.testing.assert_array_equal(np.unique(image[x0:x1, y0:y1, z0:z1]), [314, 315, 316, 317, 324, 325, 326, 327])


def test_the_volumes_of_duke_are_prepared_without_a_lesion_in_the_healthy_half(breasts, tmp_path, capsys):
    rows, _ = prepared(capsys, "duke", f"--root={breasts}", out=tmp_path / "out")
    data = recipe.load("maemi:small").data
    for name in ("Breast_MRI_001", "Breast_MRI_003"):
        assert prepared_volume(rows[name], data).array.shape == (ROWS, COLUMNS // 2, SLICES, 2)
        other = rows[name]._replace(extra={**rows[name].extra, "half": "second"})
        with pytest.raises(InputError, match="name the other half"):
            prepared_volume(other, data)


@pytest.mark.parametrize(
    ("description", "kind"),
    [
        *(("Ax Vibrant MultiPhase", "pre"), ("t1_fl3d_tra_dynVIEWS_spair_ pre", "pre"), ("ax dynamic", "pre")),
        *(("Ph1/Ax Vibrant MultiPhase", "1"), ("Ph2/ax 3d dyn MP", "2"), ("Ph3/ax dynamic", "3"), ("4th ax dyn", "4")),
        *(("t1_fl3d_tra_dynVIEWS_spair 1st pass", "1"), ("t1_fl3d_tra_dynVIEWS_spair_2nd pass", "2")),
        *(
            ("ax dyn 1st pas", "1"),
            ("ax 3d dyn 3rd pass", "3"),
            ("Ax 3D T1 NON FS", "plain"),
            ("AX IDEAL Breast", "plain"),
        ),
        *(("ax t1 tse +c", "plain"), ("ax t2", ""), ("Segmentation", ""), ("SUB ax dyn 1st pass", "")),
    ],
)
def test_a_series_is_told_by_maemis_names(description, kind):
    assert duke.kind_of(description) == kind


def test_the_healthy_half_is_that_of_the_other_side_in_the_files_own_direction():
    pre = duke.Series("pre", "", 1, SLICES, True, True)
    for right_first, side, half in (
        (True, "L", "first"),
        (True, "R", "second"),
        (False, "L", "second"),
        (False, "R", "first"),
    ):
        found = {"plain": pre._replace(folder="plain", right_first=right_first), "pre": pre, "1": pre, "2": pre}
        assert duke.row_of("x", "train", found, side, (1, 1, 1, 2, 2, 2), None).extra["half"] == half


def test_duke_goes_on_where_it_stopped_and_takes_only_cases_with_a_breast_mask(breasts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    volume(breasts / "SEG" / "Breast_MRI_001.nii.gz", np.ones((COLUMNS, ROWS, SLICES)), np.diag([-1, -1, 2, 1.0]))
    text(breasts / "Annotation_Boxes.csv", "x")
    assert "has several of Annotation_Boxes.xlsx" in refused_in_one_line(capsys, "duke", f"--root={breasts}", out=out)
    (breasts / "Annotation_Boxes.csv").unlink()
    prepared(capsys, "duke", f"--root={breasts}", out=out)
    (out / "manifest.csv").unlink()
    monkeypatch.setattr(duke, "header_of", None)  # no header is read again
    rows, said = prepared(capsys, "duke", f"--root={breasts}", out=out)
    assert rows.keys() == {"Breast_MRI_001"} and "3 cases without a breast mask" in said
    assert rows["Breast_MRI_001"].region == str(breasts / "SEG" / "Breast_MRI_001.nii.gz") and "data.region" not in said
    volume(breasts / "other" / "Breast_MRI_001.nii.gz")
    assert "is a breast mask of the same patient" in refused_in_one_line(
        capsys, "duke", f"--root={breasts}", out=tmp_path / "x"
    )


def test_what_duke_lacks_is_one_line(breasts, tmp_path, capsys):
    out = tmp_path / "out"
    lists = breasts / "anomaly_no_bilateral"
    text(lists / "valid.csv", "identifier,volume\nBreast_MRI_001,1\n")
    assert "Breast_MRI_001 is in two lists" in refused_in_one_line(capsys, "duke", f"--root={breasts}", out=out)
    (lists / "valid.csv").unlink()
    assert "has no train.csv, valid.csv and test.csv" in refused_in_one_line(
        capsys, "duke", f"--root={breasts}", out=out
    )
    text(lists / "valid.csv", "identifier,volume\nBreast_MRI_003,1\n")
    rows = [["", "", ""], ["Patient ID", "Bilateral Information", "Position"], ["Breast_MRI_001", 0, ""]]
    workbook(breasts / "Clinical_and_Other_Features.xlsx", rows)
    assert "Breast_MRI_001: has no side in Position" in refused(capsys, "duke", f"--root={breasts}", out=out)[0]
    (breasts / "Clinical_and_Other_Features.xlsx").write_bytes(b"PK")
    assert "not an Excel workbook" in refused_in_one_line(capsys, "duke", f"--root={breasts}", out=out)


# BraTS


def test_brats_of_three_years_keeps_patients_together_and_finds_the_segmentation_of_355(tmp_path, capsys):
    root = tmp_path / "brats"
    for case, words, mask in (
        *(((f"BraTS20_Training_{k:03d}"), ("flair", "t1", "t1ce", "t2"), "") for k in range(351, 359)),
        *(((f"BraTS-GLI-00008-{k:03d}"), ("t2f", "t1n", "t1c", "t2w"), "seg") for k in range(100, 104)),
        ("BraTS20_Validation_001", ("flair", "t1", "t1ce", "t2"), "none"),
    ):
        mark = "-" if "GLI" in case else "_"
        for word in words:
            volume(root / case / f"{case}{mark}{word}.nii.gz")
        name = "W39_1998.09.19_Segm" if case.endswith("355") else f"{case}{mark}seg"
        if mask != "none":
            volume(root / case / f"{name}.nii.gz", lesion(value=4))
    text(root / "name_mapping.csv", "x")
    rows, said = prepared(capsys, "brats", f"--root={root}", out=tmp_path / "out")
    assert rows["BraTS20_Training_355"].mask.endswith("W39_1998.09.19_Segm.nii.gz") and len(rows) == 12
    names = [file.rsplit("_", 1)[1] for file in rows["BraTS20_Training_355"].image]
    assert names == ["t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz"]
    points = [row for row in rows.values() if "GLI" in row.id]
    assert {row.patient for row in points} == {"BraTS-GLI-00008"} and len({row.split for row in points}) == 1
    patients = {split: {row.patient for row in rows.values() if row.split == split} for split in ("val", "test")}
    assert (len(patients["val"]), len(patients["test"])) == (1, 2)
    assert "1 case without a segmentation" in said
    assert "--config.data.channels=4 --config.data.normal_crops_only=True" in said
    rows, said = prepared(capsys, "brats", f"--root={root}", "--sequences=flair", out=tmp_path / "two")
    assert rows["BraTS-GLI-00008-100"].image == (str(root / "BraTS-GLI-00008-100/BraTS-GLI-00008-100-t2f.nii.gz"),)
    (root / "BraTS20_Training_351/BraTS20_Training_351_flair.nii.gz").unlink()
    line = refused_in_one_line(capsys, "brats", f"--root={root}", out=tmp_path / "x")
    assert "BraTS20_Training_351: has 0 files of flair" in line
    copy = root / "BraTS20_Training_352/BraTS20_Training_352_flair.nii.gz"
    copy.write_bytes((root / "BraTS20_Training_352/BraTS20_Training_352_seg.nii.gz").read_bytes())
    line = refused_in_one_line(capsys, "brats", f"--root={root}", "--sequences=flair,t1", out=tmp_path / "x")
    assert "has 0 files of flair" in line
    volume(root / "BraTS20_Training_351/BraTS20_Training_351_flair.nii.gz")
    line = refused_in_one_line(capsys, "brats", f"--root={root}", "--sequences=flair", out=tmp_path / "x")
    assert f"{copy}: looks like a mask" in line


# nnssl


def test_nnssls_paths_start_at_environment_variables_and_subjects_repeat_between_sets(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("nnssl_raw", str(tmp_path / "raw"))
    about = {"collection_index": 745, "collection_name": "OpenMind", "datasets": {}}
    for key in ("1", "2"):
        images = []
        for word, modality in (("T1w", "T1w"), ("FLAIR", "FLAIR")):
            path = f"Dataset745/ds{key}/sub-01/{word}.nii.gz"
            volume(tmp_path / "raw" / path)
            mask = {"anonymization_mask": f"$nnssl_raw/{path}", "anatomy_mask": None}
            image = {"name": f"{word}.nii.gz", "image_path": f"$nnssl_raw/{path}", "modality": modality}
            images.append(image | {"image_info": {}, "associated_masks": mask if word == "T1w" else None})
        sessions = {"ses-DEFAULT": {"session_id": "ses-DEFAULT", "images": images}}
        subject = {"subject_id": "sub-01", "subject_info": {}, "sessions": sessions}
        about["datasets"][key] = {"dataset_index": key, "name": f"ds{key}", "subjects": {"sub-01": subject}}
    text(tmp_path / "pre" / "pretrain_data.json", json.dumps(about))
    rows, said = prepared(capsys, "nnssl", f"--root={tmp_path / 'pre'}", "--modality=T1w", out=tmp_path / "out")
    assert {name: row.patient for name, row in rows.items()} == {
        **{"ds1_sub-01_ses-DEFAULT_T1w": "ds1_sub-01", "ds2_sub-01_ses-DEFAULT_T1w": "ds2_sub-01"}
    }
    assert kinds(rows) == {("train", None, False): 2} and "2 images of FLAIR" in said
    assert "nobody labelled these images" in said and "--config.data.channels=1" in said
    line = refused_in_one_line(capsys, "nnssl", f"--root={tmp_path / 'pre'}", "--modality=T2w", out=tmp_path / "x")
    assert "has no T2w: write --modality= one of FLAIR, T1w" in line
    volume(tmp_path / "raw" / "Dataset745/ds1/sub-01/T1w.nii.gz", lesion())
    line = refused_in_one_line(capsys, "nnssl", f"--root={tmp_path / 'pre'}", "--modality=T1w", out=tmp_path / "x")
    assert "T1w.nii.gz: looks like a mask" in line
    monkeypatch.delenv("nnssl_raw")
    lines = refused(capsys, "nnssl", f"--root={tmp_path / 'pre'}", out=tmp_path / "x")
    assert "the environment variable nnssl_raw is not set: export nnssl_raw=DIR" in lines[0]


# fastMRI+ and NOVA


def test_the_boxes_of_fastmri_count_flipped_slices_and_harmless_labels_are_no_lesions(tmp_path, capsys, monkeypatch):
    names = [f"file_brain_AXT2_200_{k}" for k in range(7)]
    volumes = {f"{name}.h5": 100 * i + np.arange(8 * 5 * 6.0).reshape(8, 5, 6) for i, name in enumerate(names)}
    monkeypatch.setattr(fastmri_plus, "read_h5", lambda path: volumes[path.name])
    root = tmp_path / "fastmri"
    for name in volumes:
        text(root / "multicoil_train" / name, "")
    lines = ["file,slice,study_level,x,y,width,height,label"]
    lines += [
        f"{names[0]},3,No,1,0,2,3,Edema ",
        f"{names[0]},3,No,0,0,1,1,Mass",
        f"{names[1]},2,No,1,1,1,1,Motion artifact",
    ]
    lines += [f"{names[2]},0,Yes,,,,,Normal for age", f"{names[3]},0,Yes,,,,,Global label: Small vessel disease"]
    text(root / "Annotations" / "brain.csv", "\n".join(lines))
    text(root / "Annotations" / "brain_file_list.csv", "\n".join(names[:6]))
    rows, said = prepared(capsys, "fastmri_plus", f"--root={root}", out=tmp_path / "out")
    sick = rows[f"{names[0]}_03"]
    assert sick.boxes == ((0, 0, 1, 1), (1, 0, 3, 3)) and sick.extra["class"] == "edema|mass"
    np.testing.assert_array_equal(read_image(sick.image).array[..., 0], volumes[f"{names[0]}.h5"][3][::-1])
    normal = {row.patient: row.split for row in rows.values() if row.label == 0}
    assert normal.keys() == {names[1], names[2], names[4], names[5]} and list(normal.values()).count("train") == 3
    assert {row.extra["slice"] for row in rows.values() if row.label == 0} == {"2", "3", "4", "5"}
    assert sum(row.label == 1 for row in rows.values()) == 1 and "1 file with a finding of the whole study" in said
    volumes[f"{names[0]}.h5"] = np.ones((2, 5, 6))
    assert "has no slice 3" in refused_in_one_line(capsys, "fastmri_plus", f"--root={root}", out=tmp_path / "x")
    text(root / "masks_of" / "other" / f"{names[0]}.h5", ""), text(root / "copy" / f"{names[4]}.h5", "")
    line = refused_in_one_line(capsys, "fastmri_plus", f"--root={root}", out=tmp_path / "x")
    assert f"{names[4]}: lies in" in line


def test_novas_rows_are_joined_by_file_name_and_gold_boxes_count(tmp_path, capsys, monkeypatch):
    box = lambda x, source: {"x": x, "y": 1, "width": 2, "height": 3, "source": source}
    lines = [
        {"filename": "case2_1.png", "case_id": "case2", "bboxes": [box(1, "rater1"), box(4, "rater2")]},
        {"filename": "case1_1.png", "case_id": "case1", "bboxes": [box(0, "gold"), box(5, "rater1")]},
    ]
    monkeypatch.setattr(nova, "read_parquet", lambda path: lines)
    text(tmp_path / "nova" / "data" / "nova-v1.parquet", "")
    for name in ("case1_1.png", "case2_1.png"):
        picture(tmp_path / "nova" / "images" / name)
    rows, said = prepared(capsys, "nova", f"--root={tmp_path / 'nova'}", out=tmp_path / "out")
    assert rows["case1_1"].boxes == ((0, 1, 2, 4),) and rows["case1_1"].patient == "case1"
    assert rows["case2_1"].boxes == ((1, 1, 3, 4), (4, 1, 6, 4)) and "no normal image" in said
    lines[1]["bboxes"] = {"x": [0], "y": [1]}  # as in an older version
    line = refused_in_one_line(capsys, "nova", f"--root={tmp_path / 'nova'}", out=tmp_path / "x")
    assert "case1_1.png: the boxes have no x, y, width, height and source" in line
    lines[1]["bboxes"] = [box(0, "gold")]
    image = np.zeros((24, 24), np.uint8)
    image[5:9, 5:9] = 255
    Image.fromarray(image).save(tmp_path / "nova" / "images" / "case1_1.png")
    assert "looks like a mask" in refused_in_one_line(capsys, "nova", f"--root={tmp_path / 'nova'}", out=tmp_path / "x")


def test_parquet_and_hdf5_files_are_read_as_they_are(tmp_path):
    h5py, pyarrow = pytest.importorskip("h5py"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    boxes = [{"x": 1, "y": 2, "width": 3, "height": 4, "source": "gold"}]
    parquet.write_table(
        pyarrow.Table.from_pylist([{"filename": "a.png", "case_id": "1", "bboxes": boxes}]), tmp_path / "a"
    )
    assert nova.read_parquet(tmp_path / "a") == [{"filename": "a.png", "case_id": "1", "bboxes": boxes}]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["reconstruction_rss"] = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(fastmri_plus.read_h5(tmp_path / "b.h5"), np.arange(24.0).reshape(2, 3, 4))
    (tmp_path / "c").write_bytes(b"no table")
    for read in (nova.read_parquet, fastmri_plus.read_h5):
        with pytest.raises(InputError, match="copy it again"):
            read(tmp_path / "c")
