"""Ready-made benchmarks of folders: BMAD in its four forms, MedIAnomaly, MediCLIP, SQUID, paediatric radiographs."""

import json

import numpy as np
import pytest
from PIL import Image
from trees import dicom_file, kinds, picture, prepared, refused_in_one_line, text, volume

from jmae.data.files import read_mask


@pytest.mark.parametrize("folder", ["anomaly_mask", "ground_true", "Mask", "lesion_seg", "annotations"])
def test_a_folder_of_masks_beside_the_images_never_becomes_test_images(tmp_path, capsys, folder):
    root = tmp_path / "Brain"
    for split in ("train", "valid", "test"):
        picture(root / split / "good" / "img" / "00001_60.png")
        if split != "train":
            picture(root / split / "Ungood" / "img" / "00124_60.png")
            picture(root / split / "Ungood" / folder / "00124_60.png", mask=True)
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, True): 1},
        **{("test", 0, False): 1, ("test", 1, True): 1},
    }
    assert not any(folder in file for row in rows.values() for file in row.image)
    assert rows["test_Ungood_img_00124_60"].mask == str(root / "test" / "Ungood" / folder / "00124_60.png")


def test_a_mask_in_the_folder_of_its_image_is_no_image(tmp_path, capsys):
    root = tmp_path / "root"
    (
        picture(root / "train/good/1.png"),
        picture(root / "test/bad/7.png"),
        picture(root / "test/bad/7_mask.png", mask=True),
    )
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {("train", 0, False): 1, ("test", 1, True): 1}
    (root / "train/good/1.png").rename(root / "train/good/1_seg.png")
    line = refused_in_one_line(capsys, "folders", f"--root={root}", out=tmp_path / "two")
    assert "has no images in a folder train (left out: 2 files called like masks)" in line


def test_a_folder_of_any_name_whose_files_have_the_images_names_is_a_question(tmp_path, capsys):
    root = tmp_path / "Brain"
    picture(root / "train/good/1.png"), picture(root / "test/Ungood/img/1.png"), picture(root / "test/Ungood/foo/1.png")
    line = refused_in_one_line(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert "foo: 1 file with the names of files in test/Ungood/img: are they masks?" in line
    (root / "test/Ungood/img").rename(root / "test/Ungood/a"), picture(root / "test/bar/9.png", mask=True)
    (root / "test/Ungood/foo").rename(root / "test/Ungood/b")
    line = refused_in_one_line(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert "test/bar/9.png: looks like a mask, not like an image" in line


def test_a_jpeg_mask_and_one_of_few_brain_voxels_are_told_apart(tmp_path, capsys):
    y, x = np.mgrid[:64, :64]
    slice_ = np.where((y - 30) ** 2 + (x - 30) ** 2 < 40, 40 + 3 * y + x, 0).astype(np.uint8)  # mostly background
    root = tmp_path / "root"
    for name in ("train/good/a", "test/tumour/b"):
        (root / name).parent.mkdir(parents=True)
        Image.fromarray(slice_).save(root / f"{name}.png")
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert len(rows) == 2
    Image.fromarray(np.uint8(255 * ((y - 30) ** 2 + (x - 30) ** 2 < 300))).save(root / "test/tumour/c.jpg")
    line = refused_in_one_line(capsys, "folders", f"--root={root}", out=tmp_path / "two")
    assert "test/tumour/c.jpg: looks like a mask, not like an image" in line


def test_mediclips_jpeg_masks_are_matched_and_cut(tmp_path, capsys):
    root = tmp_path / "busi" / "images"
    picture(root / "train/normal/normal_1.jpg"), picture(root / "test/normal/normal_2.jpg")
    (
        picture(root / "test/abnormal/benign_0.jpg", size=(32, 32)),
        picture(root / "test/abnormal/benign_10.jpg", size=(32, 32)),
    )
    truth = picture(root / "test/ground_true/benign_mask_0.jpg", mask=True, size=(32, 32))
    rows, said = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows)["test", 1, True] == 1 and "1 abnormal ones without a mask" in said
    mask = read_mask(rows["test_abnormal_benign_0"].mask)
    assert truth.suffix == ".jpg" and rows["test_abnormal_benign_0"].mask.endswith(".png")
    expected = np.zeros((32, 32), bool)
    expected[2:4, 3:5] = True
    assert mask[2:4, 3:5].all() and mask.sum() <= 12 and not mask[8:].any()
    for kind, corner in (("a", 2), ("b", 20)):  # two masks of one name
        picture(root / "test" / kind / "img" / "0.jpg", size=(32, 32))
        values = np.zeros((32, 32), np.uint8)
        values[corner : corner + 8, corner : corner + 8] = 255
        (root / "test" / kind / "mask").mkdir()
        Image.fromarray(values).save(root / "test" / kind / "mask" / "0.jpg")
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "two")
    assert read_mask(rows["test_a_img_0"].mask)[5, 5] and read_mask(rows["test_b_img_0"].mask)[23, 23]


def test_the_segmentations_of_medianomalys_brats_have_seg_where_images_have_flair(tmp_path, capsys):
    root = tmp_path / "BraTS2021"
    picture(root / "train/BraTS2021_00002_flair_80.png"), picture(root / "test/normal/BraTS2021_00003_flair_70.png")
    for number in ("90", "91"):
        picture(root / f"test/tumor/BraTS2021_00000_flair_{number}.png")
        picture(root / f"test/annotation/BraTS2021_00000_seg_{number}.png", mask=True)
    rows, said = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    for number in ("90", "91"):
        row = rows[f"test_tumor_BraTS2021_00000_flair_{number}"]
        assert row.mask == str(root / f"test/annotation/BraTS2021_00000_seg_{number}.png")
        assert row.patient == "BraTS2021_00000"
    assert "without a mask" not in said


def test_resc_as_released_has_its_splits_one_level_deeper_and_labels_beside(tmp_path, capsys):
    root = tmp_path / "RESC"
    picture(root / "Train/train/good/1_1.png")
    for split in ("val", "test"):
        for kind in ("good", "Ungood"):
            name = f"{'9' if kind == 'good' else '10'}_28.png"
            picture(root / split.capitalize() / split / kind / name)
            picture(root / split.capitalize() / f"{split}_label" / kind / name, mask=True)
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, True): 1},
        **{("test", 0, False): 1, ("test", 1, True): 1},
    }
    assert rows["Test_test_Ungood_10_28"].mask == str(root / "Test/test_label/Ungood/10_28.png")


def test_squids_folders_carry_sizes_and_views(tmp_path, capsys):
    root = tmp_path / "chexpert"
    for folder in ("train_256_pa/normal_256", "val_256_pa/normal_256", "val_256_pa/abnormal_256"):
        picture(root / folder / "a.png")
    for folder in ("our_test_256_pa/normal_256", "our_test_256_pa/abnormal_256"):
        picture(root / folder / "b.png")
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, False): 1},
        **{("test", 0, False): 1, ("test", 1, False): 1},
    }
    picture(tmp_path / "z/train/normal_256/a.png"), picture(tmp_path / "z/test/pneumonia_256/a.png")
    rows, _ = prepared(capsys, "folders", f"--root={tmp_path / 'z'}", out=tmp_path / "two")
    assert rows["test_pneumonia_256_a"].extra["class"] == "pneumonia"


def test_patients_come_from_names_from_dicom_and_from_a_pattern(tmp_path, capsys):
    root = tmp_path / "kermany"
    picture(root / "train/NORMAL/IM-0115-0001.jpeg"), picture(root / "train/NORMAL/NORMAL2-IM-1427-0001.jpeg")
    picture(root / "train/NORMAL/person1_virus_9.jpeg")
    (
        picture(root / "test/PNEUMONIA/person1_bacteria_1.jpeg"),
        picture(root / "test/PNEUMONIA/BACTERIA-1008087-0001.jpeg"),
    )
    rows, _ = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert {row.id.rsplit("_", 1)[-1]: row.patient for row in rows.values()} == {
        **{"IM-0115-0001": "trainval_IM-0115", "NORMAL2-IM-1427-0001": "trainval_NORMAL2-IM-1427"},
        **{"9": "trainval_person1", "1": "test_person1", "BACTERIA-1008087-0001": "1008087"},
    }
    flag = r"--patient=(person\d+|IM-\d+|\d{7})"
    line = refused_in_one_line(capsys, "folders", f"--root={root}", flag, out=tmp_path / "two")
    assert "patient 'person1' is in train and test: keep it in one split, or add --leaks=drop" in line
    rows, said = prepared(capsys, "folders", f"--root={root}", flag, "--leaks=drop", out=tmp_path / "three")
    assert len(rows) == 4 and "1 train image of patients of test" in said and "not the published list" in said
    rows, said = prepared(capsys, "folders", f"--root={root}", flag, "--leaks=keep", out=tmp_path / "four")
    assert len(rows) == 5 and "--config.data.allow_leaks=True" in said and "1 patient in two splits" in said
    assert "does not fit" in refused_in_one_line(
        capsys, "folders", f"--root={root}", "--patient=x+y", out=tmp_path / "x"
    )


def test_the_patients_of_dicom_files_are_hashed_and_kinds_are_counted(tmp_path, capsys):
    folder, values = tmp_path / "normal", np.arange(30).reshape(5, 6)
    for i, modality in enumerate(("CT", "MR", "CT")):
        dicom_file(folder / f"{i}.dcm", values + i, PatientID=f"Smith{i % 2}", Modality=modality)
    rows, said = prepared(capsys, "folders", f"--normal={folder}", out=tmp_path / "out")
    patients = [row.patient for row in rows.values()]
    assert patients[0] == patients[2] != patients[1] and len(patients[0]) == 13
    assert "Smith" not in (tmp_path / "out" / "manifest.csv").read_text()
    assert "kinds of train: 2 CT images, 1 MR image; 5 x 6 (3)" in said
    assert f"caution: train mixes 2 CT images, 1 MR image (one of the MR images: {folder / '1.dcm'}): a recipe" in said
    for file in folder.iterdir():
        file.unlink()
    for i in range(2):
        dicom_file(folder / f"{i}.dcm", values + i, PatientID="anonymous")
    rows, said = prepared(capsys, "folders", f"--normal={folder}", out=tmp_path / "two")
    assert not any(row.patient for row in rows.values()) and "caution" not in said


def test_the_segmentation_of_a_case_folder_is_no_normal_image(tmp_path, capsys):
    for case in ("BraTS2021_00000", "BraTS2021_00002"):
        for name in ("flair", "t1", "seg"):
            volume(tmp_path / "brats" / case / f"{case}_{name}.nii.gz")
    line = refused_in_one_line(capsys, "folders", f"--normal={tmp_path / 'brats'}", out=tmp_path / "out")
    assert "BraTS2021_00000_seg.nii.gz: is called like a mask, as 2 of 6 files are" in line


def test_what_macos_leaves_in_archives_is_passed_over(tmp_path, capsys):
    root = tmp_path / "root"
    for name in ("train/good/a.png", "test/bad/b.png"):
        picture(root / name)
        for rest in (root / "__MACOSX" / name, (root / name).with_name(f"._{(root / name).name}")):
            rest.parent.mkdir(parents=True, exist_ok=True)
            rest.write_bytes(b"Mac OS X")
    rows, said = prepared(capsys, "folders", f"--root={root}", out=tmp_path / "out")
    assert len(rows) == 2 and "left out: nothing" in said
    kvasir = tmp_path / "kvasir"
    for part in ("", "__MACOSX/"):
        for name in ("cecum/a.jpg", "segmented-images/images/p.jpg"):
            picture(kvasir / part / name, size=(24, 24))
            (kvasir / name).with_name("._x.jpg").write_bytes(b"Mac OS X")
        picture(kvasir / part / "segmented-images/masks/p.jpg", mask=True, size=(24, 24))
    rows, _ = prepared(capsys, "hyper_kvasir", f"--root={kvasir}", out=tmp_path / "two")
    assert len(rows) == 2


# The importers of whole benchmarks


def bmad(root, form, names, inner="", normal="1_1", end="png"):
    """A set of BMAD in one of its forms; `names` are one normal and one abnormal name for each of val and test."""
    top = root / inner
    for split, (good, bad) in zip(("valid", "test"), names, strict=True):
        for kind, name in (("good", good), ("Ungood", bad)):
            file = f"{name}.{end}"
            image, mask = {
                "README": (f"{split}/{kind}/img", f"{split}/{kind}/anomaly_mask"),
                "brain": (f"{split}/{kind}/img", f"{split}/{kind}/label"),
                "liver": (f"{split}/img/{kind}", f"{split}/label/{kind}"),
                "plain": (f"{split}/{kind}", ""),
            }[form]
            picture(top / image / file)
            if mask:
                picture(top / mask / file, mask=True)
    picture(top / "train" / "good" / ("img" if form == "README" else "") / f"{normal}.{end}")
    return root


@pytest.mark.parametrize("form", ["README", "brain", "liver"])
def test_bmads_sets_are_read_in_each_form_with_patients_and_masks(tmp_path, capsys, form):
    names = (("00100_60", "00124_60"), ("00101_61", "00125_61"))
    root = bmad(tmp_path / "Brain_AD", form, names, "BraTS2021_slice", normal="00001_60")
    rows, said = prepared(capsys, "bmad", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, True): 1},
        **{("test", 0, False): 1, ("test", 1, True): 1},
    }
    assert sorted(row.patient for row in rows.values()) == ["00001", "00100", "00101", "00124", "00125"]
    assert "the set brain: 5 cases" in said and "--config memmc_mae:paper" in said
    for row in rows.values():
        assert not any(word in file for file in row.image for word in ("mask", "label"))
    masks = [path for path in root.rglob("*.png") if path.parent.name in ("anomaly_mask", "label")]
    masks = masks or [path for path in root.rglob("*.png") if path.parent.parent.name == "label"]
    for path in masks:
        path.unlink()
    line = refused_in_one_line(capsys, "bmad", f"--root={root}", out=tmp_path / "two")
    assert "has no mask, like 1 more of 2: copy the set again" in line


def test_bmads_numbers_of_other_sources_are_other_patients_and_a_shared_one_is_dropped(tmp_path, capsys):
    names = (("4_10", "4_487"), ("5_1", "6_3"))
    rows, _ = prepared(
        capsys,
        "bmad",
        f"--root={bmad(tmp_path / 'hist_DIY', 'liver', names, normal='4_487')}",
        "--set=liver",
        out=tmp_path / "liver",
    )
    assert sorted({row.patient for row in rows.values()}) == ["lits_4", "lits_5", "lits_6", "train_4"]
    names = (("NORMAL-5171640-1", "CNV-6294785-1"), ("NORMAL-5171641-1", "DME-6294786-2"))
    root = bmad(tmp_path / "OCT2017", "plain", names, normal="NORMAL-6294786-9", end="jpeg")
    rows, said = prepared(capsys, "bmad", f"--root={root}", "--leaks=keep", out=tmp_path / "oct")
    assert len(rows) == 5 and "1 patient in two splits" in said
    names = (("Normal_ff8d7572-1", "Lung_Opacity_000fe35a-2"), ("Normal_ab-3", "No-Not-Normal_f05468f3-4"))
    root = bmad(tmp_path / "Chest_AD", "plain", names, "Chest-RSNA", normal="Normal_aa-9")
    rows, said = prepared(capsys, "bmad", f"--root={root}", out=tmp_path / "chest")
    assert not any(row.patient for row in rows.values()) and "50% of the test is abnormal" in said
    (root / "Chest-RSNA").rename(tmp_path / "thing"), picture(tmp_path / "thing/test/Ungood/foo/a.png", mask=True)
    assert "add --set= one of brain" in refused_in_one_line(
        capsys, "bmad", f"--root={tmp_path / 'thing'}", out=tmp_path / "x"
    )
    line = refused_in_one_line(capsys, "bmad", f"--root={tmp_path / 'thing'}", "--set=chest", out=tmp_path / "x")
    assert "foo/a.png: looks like a mask" in line


def test_medianomalys_sets_are_told_by_their_folders(tmp_path, capsys):
    top = tmp_path / "MedIAnomaly-Data"
    for name in ("Tr-no_0010.jpg", "Te-noTr_0000.jpg", "Te-gl_0013.jpg", "Te-pi_1.jpg"):
        picture(top / "BrainTumor" / "images" / name, size=(24, 24))
    about = {"train": {"0": ["Tr-no_0010.jpg"], "unlabeled": {"0": [], "1": ["Te-pi_1.jpg"]}}}
    text(
        top / "BrainTumor" / "data.json",
        json.dumps(about | {"test": {"0": ["Te-noTr_0000.jpg"], "1": ["Te-gl_0013.jpg"]}}),
    )
    rows, said = prepared(capsys, "medianomaly", f"--root={top / 'BrainTumor'}", out=tmp_path / "brain")
    assert kinds(rows)["unlabeled", None, False] == 1 and "--config amae:paper" in said
    for name in ("train/good/1000", "test/good/1000", "test/Ungood/1000"):
        picture(top / "Camelyon16" / f"{name}.png", colours=3)
    rows, said = prepared(capsys, "medianomaly", f"--root={top / 'Camelyon16'}", out=tmp_path / "camelyon")
    assert len(rows) == 3 and "--config memmc_mae:paper_colour" in said
    brats = top / "BraTS2021"
    picture(brats / "train/BraTS2021_00002_flair_80.png"), picture(brats / "test/normal/BraTS2021_00003_flair_70.png")
    picture(brats / "test/tumor/BraTS2021_00000_flair_90.png")
    assert "has no mask in annotation" in refused_in_one_line(
        capsys, "medianomaly", f"--root={brats}", out=tmp_path / "x"
    )
    picture(brats / "test/annotation/BraTS2021_00000_seg_90.png", mask=True)
    rows, said = prepared(capsys, "medianomaly", f"--root={brats}", out=tmp_path / "brats")
    assert kinds(rows)["test", 1, True] == 1 and "--config memmc_mae:paper " in said
    line = refused_in_one_line(capsys, "medianomaly", f"--root={top}", out=tmp_path / "x")
    assert "has the sets BrainTumor, Camelyon16, BraTS2021: name the folder of one" in line


def isic(root):
    head = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    for part, kinds_of_images in (("Training", "NNM"), ("Test", "NM")):
        lines = ""
        for i, kind in enumerate(kinds_of_images):
            name = f"ISIC_{part[:2]}{i:05d}"
            picture(root / f"ISIC2018_Task3_{part}_Input" / f"{name}.jpg", size=(24, 24), colours=3)
            lines += f"{name},{'1.0' if kind == 'M' else '0.0'},{'1.0' if kind == 'N' else '0.0'},0.0,0.0,0.0,0.0,0.0\n"
        text(root / f"ISIC2018_Task3_{part}_GroundTruth" / f"ISIC2018_Task3_{part}_GroundTruth.csv", head + lines)


def test_the_moles_of_isic_train(tmp_path, capsys):
    root = tmp_path / "ISIC2018_Task3"
    isic(root)
    groups = "image,lesion_id,diagnosis_confirm_type\nISIC_Tr00000,HAM_1,x\nISIC_Tr00001,HAM_1,x\n"
    text(root / "ISIC2018_Task3_Training_LesionGroupings.csv", groups)
    for command in ("isic2018", "medianomaly"):
        rows, said = prepared(capsys, command, f"--root={root}", out=tmp_path / command)
        assert kinds(rows) == {("train", 0, False): 2, ("test", 0, False): 1, ("test", 1, False): 1}
        assert rows["ISIC_Tr00000"].patient == "HAM_1" and rows["ISIC_Te00001"].extra["class"] == "MEL"
        assert "1 training image of other lesions than moles" in said and "--config memmc_mae:paper_colour" in said
    picture(root / "other" / "ISIC_Te00000.jpg", mask=True, size=(24, 24))
    assert "ISIC_Te00000: lies in" in refused_in_one_line(capsys, "isic2018", f"--root={root}", out=tmp_path / "x")


def test_kvasir_seg_is_a_test_set_with_cut_masks(tmp_path, capsys):
    root = tmp_path / "Kvasir-SEG"
    for name in ("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4"):
        picture(root / "images" / f"{name}.jpg", size=(32, 32), colours=3)
        picture(root / "masks" / f"{name}.jpg", mask=True, size=(32, 32))
    text(root / "kavsir_bboxes.json", "{}")
    rows, said = prepared(capsys, "kvasir_seg", f"--root={root}", out=tmp_path / "out")
    assert kinds(rows) == {("test", 1, True): 2} and "jmae evaluate --workdir RUN" in said
    assert all(read_mask(row.mask)[2:4, 3:5].all() and row.mask.endswith(".png") for row in rows.values())
    (root / "masks" / "cju0qoxqj9q6s0835b43399p4.jpg").unlink()
    assert "has no mask" in refused_in_one_line(capsys, "kvasir_seg", f"--root={root}", out=tmp_path / "x")
    text(root / "image-labels.csv", "x")
    assert "polyps are the same" in refused_in_one_line(capsys, "kvasir_seg", f"--root={root}", out=tmp_path / "x")
