"""Chest radiographs as Kaggle, Stanford AIMI and the authors of lists publish them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from test_prepare_folders import HEAD
from trees import dicom_file, kinds, picture, prepared, refused, refused_in_one_line, text

from jmae.data.prepare import chexpert, jsrt

FILM = np.arange(30).reshape(5, 6)


# COVIDx


def covid(root, train, test, val=""):
    for split, lines in (("train", train), ("test", test), ("val", val)):
        for line in lines.splitlines():
            name = line.split()[-2 if line.split()[-1] in ("normal", "pneumonia", "COVID-19") else -3]
            picture(root / split / name)
        if lines:
            text(root / f"{split}_COVIDx9A.txt", lines)


def test_covidx_takes_lists_of_three_labels_a_validation_list_and_lists_without_sources(tmp_path, capsys):
    train = "1 a.png normal rsna\n2 b.png pneumonia cohen\nCOVID 3 c(1).JPG COVID-19 sirm\n"
    covid(tmp_path / "a", train, "4 d.png normal rnsa\n5 e.png pneumonia cohen\n", "6 f.png COVID-19 sirm\n")
    rows, said = prepared(capsys, "covidx", f"--root={tmp_path / 'a'}", out=tmp_path / "out")
    assert {(row.id, row.split, row.label) for row in rows.values()} == {
        *(("a.png", "train", 0), ("d.png", "test", 0), ("e.png", "test", 1), ("f.png", "val", 1)),
    }
    assert "3 lines for train, 1 lines for val, 2 lines for test" in said
    assert "sources of test abnormal: 1 cohen" in said and "--config memmc_mae:paper" in said
    covid(tmp_path / "b", "1 a.png normal\nx y b.png pneumonia\n", "4 d.png normal\n5 e.png COVID-19\n")
    rows, said = prepared(capsys, "covidx", f"--root={tmp_path / 'b'}", out=tmp_path / "two")
    assert rows["d.png"].patient == "4" and rows["a.png"].extra["source"] == "" and len(rows) == 3


def test_covidx_knows_nih_patients_by_rsnas_mapping(tmp_path, capsys):
    root = tmp_path / "covidx"
    covid(root, "r1 r1.png normal rsna\nr2 r2.png normal rsna\n", "r3 r3.png normal rsna\n9 e.png COVID-19 sirm\n")
    rows, said = prepared(capsys, "covidx", f"--root={root}", out=tmp_path / "unknown")
    assert len(rows) == 4 and "RSNA's ids are of images" in said
    names = {"r1": "00000001_000.png", "r2": "00000002_000.png", "r3": "00000001_004.png"}
    entries = [{"subset_img_id": one, "img_id": nih, "other": 0} for one, nih in names.items()]
    text(root / "maps" / "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(entries))
    rows, said = prepared(capsys, "covidx", f"--root={root}", out=tmp_path / "out")
    assert {row.id: row.patient for row in rows.values()} == {"r2.png": "00000002", "r3.png": "00000001", "e.png": "9"}
    assert "1 train image of patients of test" in said and "RSNA's ids" not in said


# CheXpert


def test_chexpert_as_stanford_ships_it_lies_in_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chexpert, "PARTS", {0: {"test": 1, "val": 1, "train": 2}, 1: {"test": 1}})
    root, lines, normal = tmp_path / "chexpertchestxrays-u20210408", [], ["1.0", *[""] * 12, ""]
    for patient, batch in ((1, "2 (train 1)"), (21514, "3 (train 2)"), (43018, "4 (train 3)"), (64540, "4 (train 3)")):
        picture(root / f"CheXpert-v1.0 batch {batch}/patient{patient:05d}/study1/view1_frontal.jpg")
        lines.append((patient, "train", normal))
    picture(root / "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg")
    sick = ["", *[""] * 6, "1.0", *[""] * 5, "1.0"]
    cells = lambda p, part, seen: (
        f"CheXpert-v1.0/{part}/patient{p:05d}/study1/view1_frontal.jpg,Male,50,Frontal,PA,{','.join(seen)}\n"
    )
    folder = root / "CheXpert-v1.0 batch 1 (validate & csv)"
    text(folder / "train.csv", HEAD + "".join(cells(*line) for line in lines))
    text(folder / "valid.csv", HEAD + cells(64541, "valid", sick))
    rows, said = prepared(capsys, "chexpert", f"--root={root}", out=tmp_path / "out")
    assert {row.patient for row in rows.values()} == {
        *(f"patient{p:05d}" for p in (1, 21514, 43018, 64540)),
        "patient64541",
    }
    assert "of 4 normals 0 show support devices, 0 are of patients with a finding in another image" in said
    assert "licence: Stanford research use agreement" in said and "--config simsid:paper" in said


def test_chexpert_takes_another_finding_and_counts_what_its_normals_hide(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chexpert, "PARTS", {0: {"test": 1, "train": 1}, 1: {"test": 1}})
    root, names = tmp_path / "CheXpert-v1.0", HEAD.strip().split(",")
    films = [(1, {"No Finding": "1.0", "Support Devices": "1.0"}), (2, {"No Finding": "1.0"}), (3, {"Edema": "1.0"})]
    body = ""
    for patient, seen in [*films, (2, {"Fracture": "1.0"})]:
        study = 1 + ("Fracture" in seen)
        path = f"train/patient{patient:05d}/study{study}/view1_frontal.jpg"
        picture(root / path)
        cells = {"Path": f"CheXpert-v1.0/{path}", "Frontal/Lateral": "Frontal", "AP/PA": "PA", **seen}
        body += ",".join(cells.get(name, "") for name in names) + "\n"
    text(root / "train.csv", HEAD + body)
    rows, said = prepared(capsys, "chexpert", f"--root={root}", "--finding=Edema", out=tmp_path / "out")
    assert {row.patient: row.label for row in rows.values()} == {
        "patient00001": 0,
        "patient00002": 0,
        "patient00003": 1,
    }
    assert "of 2 normals 1 show support devices, 1 are of patients with a finding" in said
    line = refused_in_one_line(capsys, "chexpert", f"--root={root}", "--finding=Oedema", out=tmp_path / "x")
    assert "has no column Oedema: write --finding= one of Enlarged Cardiomediastinum" in line


# DDAD's lists, and JSRT of Kaggle


def test_the_names_of_ddads_list_fit_the_dicom_files_of_the_download(tmp_path, capsys):
    root = tmp_path / "rsna"
    about = {"train": {"0": ["a.png"]}, "test": {"0": ["b.png"], "1": ["c.png"]}}
    text(root / "rsna_data.json", json.dumps(about))
    dicom_file(root / "stage_2_train_images/a.dcm", FILM), dicom_file(root / "stage_2_train_images/b.dicom", FILM + 1)
    dicom_file(root / "stage_2_train_images/c.dcm", FILM + 2)
    rows, _ = prepared(capsys, "ddad", f"--root={root}", out=tmp_path / "out")
    assert rows["b"].image == (str(root / "stage_2_train_images/b.dicom"),) and len(rows) == 3
    picture(root / "other" / "c.png")
    assert "c.png: lies in" in refused_in_one_line(capsys, "ddad", f"--root={root}", out=tmp_path / "two")
    picture(root / "other" / "c.png").rename(root / "stage_2_train_images" / "x.png")


def test_jsrt_of_kaggle_is_read_with_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jsrt, "TEST_NORMALS", 1)
    root = tmp_path / "root"
    lines = ["study_id,gender,state,diagnosis"]
    for name, state in (("JPCLN001", "malignant"), ("JPCNN001", "non-nodule"), ("JPCNN002", "non-nodule")):
        picture(root / "images" / "images" / f"{name}.png")
        lines.append(f"{name}.png,Female,{state},x")
    text(root / "jsrt_metadata.csv", "\n".join(lines))
    rows, said = prepared(capsys, "jsrt", f"--root={root}", out=tmp_path / "out")
    assert {(row.label, row.split) for row in rows.values()} == {(1, "test"), (0, "test"), (0, "train")}
    assert rows["JPCLN001"].extra["nodule"] == "malignant" and rows["JPCLN001"].image[0].startswith(str(root))
    assert "caution: .PNG files are used as they are" in said
    text(root / "CLNDAT_EN.txt", "JPCLN001.IMG\t5\t3.5\t53\tmale\t1024\t1024\tmalignant\n")
    text(root / "CNNDAT_EN.TXT", "JPCNN001.IMG 30 female non-nodule\r\nJPCNN002.IMG 30 female non-nodule\r\n")
    Image.fromarray(np.arange(65536, dtype=np.uint8).reshape(256, 256)).save(root / "images/images/JPCLN001.png")
    rows, _ = prepared(capsys, "jsrt", f"--root={root}", out=tmp_path / "two")
    assert rows["JPCLN001"].boxes == ((126.75, 126.75, 129.25, 129.25),)  # 20 pixels of 2048 are 2.5 of 256
    text(root / "jsrt_metadata.csv", "study_id,state\nJPCLN001.png,non-nodule\n")
    (root / "CLNDAT_EN.txt").unlink(), (root / "CNNDAT_EN.TXT").unlink()
    assert "is 'non-nodule'" in refused_in_one_line(capsys, "jsrt", f"--root={root}", out=tmp_path / "three")


# RSNA and VinDr


def ddad_list(path, train, hidden_normal, hidden_abnormal, normal, abnormal):
    names = lambda part: [f"{name}.png" for name in part]
    unlabeled = {"0": names(hidden_normal), "1": names(hidden_abnormal)}
    about = {"train": {"0": names(train), "unlabeled": unlabeled}, "test": {"0": names(normal), "1": names(abnormal)}}
    text(path, json.dumps(about))


def rsna(root, side=1024):
    """Five films; e has two boxes, so that its rows repeat in both tables; f is of the third class, in no list."""
    labels, details = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    boxes = {"c": ["10.0,20.0,30.0,40.0"], "e": ["264.0,152.0,213.0,379.0", "562.0,152.0,256.0,453.0"]}
    for name in "abcdef":
        for box in boxes.get(name, [",,,"]):
            labels.append(f"{name},{box},{int(name in boxes)}")
            kind = "Lung Opacity" if name in boxes else "Normal" if name != "f" else "No Lung Opacity / Not Normal"
            details.append(f"{name},{kind}")
        array = np.zeros((side, side), np.uint16)
        array[:5, :6] = FILM + ord(name)
        if side == 1024:
            dicom_file(root / "stage_2_train_images" / f"{name}.dcm", array, PatientID=name)
        else:
            Path(root / "train_png_512").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / "train_png_512" / f"{name}.png")
    text(root / "stage_2_train_labels.csv", "\n".join(labels))
    text(root / "stage_2_detailed_class_info.csv", "\n".join(details))
    ddad_list(root / "rsna_data.json", "a", "b", "c", "d", "e")


def test_rsna_joins_repeated_rows_lists_of_png_names_and_the_mapping_to_patients(tmp_path, capsys):
    root, out = tmp_path / "rsna", tmp_path / "out"
    rsna(root)
    rows, said = prepared(capsys, "rsna", f"--root={root}", out=out)
    assert {name: (row.split, row.label) for name, row in rows.items()} == {
        **{"a": ("train", 0), "b": ("unlabeled", None), "c": ("unlabeled", None)},
        **{"d": ("test", 0), "e": ("test", 1)},
    }
    assert rows["e"].boxes == ((264, 152, 477, 531), (562, 152, 818, 605)) and not rows["c"].boxes
    assert rows["e"].image == (f"{root}/stage_2_train_images/e.dcm",) and rows["c"].extra["class"] == ""
    assert (out / "unlabeled_labels.csv").read_text().splitlines() == ["id,label", "b,0", "c,1"]
    assert "6 images in the table, 2 of them with boxes; 5 in the list" in said and "1 image in no list" in said
    assert "--config amae:paper" in said and "RSNA's ids are of images" in said
    entries = [
        {"subset_img_id": one, "img_id": f"{n:08d}_000.png"} for one, n in zip("abcde", (1, 2, 3, 1, 4), strict=True)
    ]
    text(root / "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(entries))
    rows, said = prepared(capsys, "rsna", f"--root={root}", out=tmp_path / "two")
    assert "a" not in rows and rows["d"].patient == "00000001" and "1 train image of patients of test" in said
    rows, said = prepared(capsys, "rsna", f"--root={root}", "--leaks=keep", out=tmp_path / "three")
    assert len(rows) == 5 and "--config.data.allow_leaks=True" in said


def test_boxes_of_rsna_are_scaled_to_ddads_smaller_png_and_contradictions_are_told(tmp_path, capsys):
    root = tmp_path / "rsna"
    rsna(root, side=512)
    rows, _ = prepared(capsys, "rsna", f"--root={root}", out=tmp_path / "out")
    assert rows["e"].boxes == ((132, 76, 238.5, 265.5), (281, 76, 409, 302.5))
    ddad_list(root / "rsna_data.json", "a", "b", "c", "f", "d")
    table = (root / "stage_2_train_labels.csv").read_text()
    text(root / "stage_2_train_labels.csv", table.replace("10.0,20.0", "10.0,?"))
    line = refused_in_one_line(capsys, "rsna", f"--root={root}", out=tmp_path / "two")
    assert "row c,10.0,?,30.0,40.0,1: x, y, width, height are not numbers" in line
    text(root / "stage_2_train_labels.csv", table)
    lines = refused(capsys, "rsna", f"--root={root}", out=tmp_path / "two")
    assert "f: Target 0, No Lung Opacity / Not Normal, but the list has Normal" in lines[0]
    assert "d: Target 0, Normal, but the list has Lung Opacity" in lines[1]
    picture(root / "other" / "a.png")
    line = refused_in_one_line(capsys, "rsna", f"--root={root}", out=tmp_path / "two")
    assert "a.png: lies in" in line  # it might be a mask


def test_a_normal_film_of_vindr_has_three_rows_and_boxes_need_the_original_pixels(tmp_path, capsys):
    root = tmp_path / "vin"
    lines = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for name in "abd":
        lines += [f"{name},No finding,14,R{reader},,,," for reader in (1, 2, 17)]
        dicom_file(root / "train" / f"{name}.dicom", FILM + ord(name))
    for name in "ce":
        boxes = (
            ("R8", "1,0,3,4", "Cardiomegaly"),
            ("R9", "1,0,3,4", "Cardiomegaly"),
            ("R10", "2,2,5,3", "Nodule/Mass"),
        )
        lines += [f"{name},{kind},3,{reader},{box}" for reader, box, kind in boxes]
        dicom_file(root / "train" / f"{name}.dicom", FILM + ord(name))
    text(root / "train.csv", "\n".join(lines))
    ddad_list(root / "vin_data.json", "a", "b", "c", "d", "e")
    rows, said = prepared(capsys, "vindr", f"--root={root}", out=tmp_path / "out")
    assert rows["e"].boxes == ((1, 0, 3, 4), (2, 2, 5, 3)) and rows["e"].extra["class"] == "Cardiomegaly|Nodule/Mass"
    assert rows["a"].image[0].endswith("train/a.dicom") and rows["a"].extra["class"] == "No finding"
    assert "5 images in the table, 2 of them with boxes; 5 in the list" in said and "names no patients" in said
    (root / "train" / "e.dicom").unlink(), picture(root / "train_png_512" / "e.png")
    rows, said = prepared(capsys, "vindr", f"--root={root}", out=tmp_path / "two")
    assert not rows["e"].boxes and "1 image without boxes, which need DICOM files" in said
    ddad_list(root / "vin_data.json", "a", "b", "c", "e", "d")
    lines = refused(capsys, "vindr", f"--root={root}", out=tmp_path / "three")
    assert "e has Cardiomegaly, Nodule/Mass, but is normal in the list" in lines[0]
    assert "d has no finding, but is abnormal in the list" in lines[1]


# NIH ChestX-ray14

ENTRY = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def nih(root):
    """Headers with unquoted commas; the images in two of Kaggle's folders; 3 is normal once and ill once."""
    films = {"00000001_000": "No Finding", "00000002_000": "Mass|Infiltration", "00000003_000": "No Finding"}
    films |= {"00000003_001": "Effusion", "00000004_000": "No Finding", "00000005_000": "Infiltration"}
    lines = [ENTRY]
    for i, (name, labels) in enumerate(films.items()):
        view = "AP" if name == "00000001_000" else "PA"
        lines.append(f"{name}.png,{labels},{i},{int(name[:8])},50,M,{view},2682,2749,0.143,0.143")
        picture(root / f"images_00{1 + i % 2}" / "images" / f"{name}.png")
    text(root / "Data_Entry_2017_v2020.csv", "\n".join(lines))
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000005_000.png,Infiltrate,1.5,2,3,4\n"
    text(root / "BBox_List_2017.csv", boxes)
    names = [f"{name}.png" for name in films]
    text(root / "train_val_list.txt", "\n".join(names[:4]) + "\n")
    text(root / "test_list.txt", "\n".join(names[4:]))


def test_the_official_lists_of_nih_and_headers_with_commas(tmp_path, capsys):
    root = tmp_path / "nih"
    nih(root)
    rows, said = prepared(capsys, "nih", f"--root={root}", out=tmp_path / "out")
    assert {(row.id, row.patient, row.split, row.label) for row in rows.values()} == {
        *(("00000001_000", "00000001", "train", 0), ("00000003_000", "00000003", "train", 0)),
        *(("00000004_000", "00000004", "test", 0), ("00000005_000", "00000005", "test", 1)),
    }
    one = rows["00000005_000"]
    assert one.boxes == ((1.5, 2, 4.5, 6),) and one.extra["view"] == "PA" and one.extra["sex"] == "M"
    assert "2 images with a finding in train_val_list.txt" in said and "--config amae:paper" in said
    assert "1 training images with No Finding are of patients with a finding in another image" in said
    rows, said = prepared(capsys, "nih", f"--root={root}", "--views=PA", out=tmp_path / "two")
    assert "00000001_000" not in rows and "1 image of other views" in said
    text(root / "norm_MaleAdultPA_train_curated_list.txt", "00000001_000.png\n")
    text(root / "anomaly_MaleAdultPA_test_curated_list.txt", "00000002_000.png\n")
    line = refused_in_one_line(capsys, "nih", f"--root={root}", out=tmp_path / "three")
    assert "has NSA's and the official lists: choose: --lists=nsa or --lists=official" in line
    rows, said = prepared(capsys, "nih", f"--root={root}", "--lists=nsa", out=tmp_path / "three")
    assert {(row.id, row.label, row.extra["sex"]) for row in rows.values()} == {
        *(("00000001_000", 0, "M"), ("00000002_000", 1, "M"))
    }
    assert "not the paper's numbers: 1 of test 1 (the paper: 262), 1 of train 0 (the paper: 3614)" in said
    picture(root / "elsewhere" / "00000001_000.png", mask=True)
    line = refused_in_one_line(capsys, "nih", f"--root={root}", "--lists=nsa", out=tmp_path / "four")
    assert "00000001_000.png: lies in" in line
    line = refused_in_one_line(capsys, "nih", f"--root={root}", "--lists=all", out=tmp_path / "four")
    assert "unknown lists: write nsa or official" in line


# Paediatric radiographs


def test_zhanglab_of_kaggle_mendeley_and_datasetninja(tmp_path, capsys):
    kaggle = tmp_path / "kaggle"
    for top in ("chest_xray", "chest_xray/chest_xray", "__MACOSX/chest_xray"):
        for part, name in (
            *(("train/NORMAL", "IM-0115-0001"), ("train/PNEUMONIA", "person1_bacteria_1")),
            *(("val/NORMAL", "NORMAL2-IM-1427-0001"), ("val/PNEUMONIA", "person1946_bacteria_4874")),
            *(("test/NORMAL", "IM-0001-0001"), ("test/PNEUMONIA", "person1_virus_6")),
        ):
            picture(kaggle / top / part / f"{name}.jpeg", size=(24, 24))
    rows, said = prepared(capsys, "zhanglab", f"--root={kaggle}", out=tmp_path / "out")
    assert kinds(rows) == {
        **{("train", 0, False): 1, ("val", 0, False): 1, ("val", 1, False): 1},
        **{("test", 0, False): 1, ("test", 1, False): 1},
    }
    assert {row.patient for row in rows.values() if row.label} == {"trainval_person1946", "test_person1"}
    assert "1 abnormal training image" in said and "--config simsid:zhanglab" in said and "CC BY 4.0" in said
    mendeley = tmp_path / "CellData"
    for name in ("OCT/train/CNV/CNV-1-1", "OCT/train/NORMAL/NORMAL-1-1", "OCT/test/CNV/CNV-2-1"):
        picture(mendeley / f"{name}.jpeg", size=(24, 24))
    for name in ("train/NORMAL/NORMAL-1003233-0001", "test/NORMAL/NORMAL-1-1", "test/PNEUMONIA/VIRUS-1008087-0001"):
        picture(mendeley / "chest_xray" / f"{name}.jpeg", size=(24, 24))
    rows, _ = prepared(capsys, "zhanglab", f"--root={mendeley}", out=tmp_path / "mendeley")
    assert len(rows) == 3 and {row.patient for row in rows.values()} == {"1003233", "", "1008087"}
    ninja = tmp_path / "ninja"
    for part, name in (
        ("train", "NORMAL-0001-1"),
        ("train", "BACTERIA-0002-1"),
        ("test", "VIRUS-0003-1"),
        ("test", "NORMAL-0004-1"),
    ):
        picture(ninja / part / "img" / f"{name}.jpeg", size=(24, 24))
    rows, _ = prepared(capsys, "zhanglab", f"--root={ninja}", out=tmp_path / "two")
    assert kinds(rows) == {("train", 0, False): 1, ("test", 1, False): 1, ("test", 0, False): 1}
    picture(ninja / "test" / "NORMAL" / "person7_virus_2.jpeg", size=(24, 24))
    line = refused_in_one_line(capsys, "zhanglab", f"--root={ninja}", out=tmp_path / "three")
    assert "person7_virus_2.jpeg: name and folder do not tell one class" in line
    (ninja / "test/NORMAL/person7_virus_2.jpeg").unlink(), picture(ninja / "test/img/mask/NORMAL-0004-1.png", mask=True)
    picture(ninja / "test/img/other/NORMAL-0004-1.jpeg", size=(24, 24))
    line = refused_in_one_line(capsys, "zhanglab", f"--root={ninja}", out=tmp_path / "three")
    assert "other: 1 file with the names of files in test/img: are they masks?" in line


# A mask under the name of an image


def test_a_mask_under_a_listed_name_is_refused(tmp_path, capsys, monkeypatch):
    root = tmp_path / "covidx"
    covid(root, "1 a.png negative cohen\n", "2 b.png negative cohen\n3 c.png positive cohen\n")
    picture(root / "test" / "c.png", mask=True)
    line = refused_in_one_line(capsys, "covidx", f"--root={root}", out=tmp_path / "x")
    assert "test/c.png: looks like a mask, not like an image" in line
    root = tmp_path / "kvasir"
    for name in ("cecum/a.png", "segmented-images/images/p.png", "segmented-images/masks/p.png"):
        picture(root / name, mask="a.png" not in name)
    line = refused_in_one_line(capsys, "hyper_kvasir", f"--root={root}", out=tmp_path / "x")
    assert "segmented-images/images/p.png: looks like a mask" in line
    monkeypatch.setattr(chexpert, "PARTS", {0: {"train": 1}, 1: {"test": 1}})
    root, film = tmp_path / "CheXpert-v1.0", "train/patient00001/study1/view1_frontal.jpg"
    text(root / "train.csv", f"{HEAD}CheXpert-v1.0/{film},Male,50,Frontal,PA,1.0,,,,,,,,,,,,,\n")
    picture(root / film)
    image = np.zeros((64, 64), np.uint8)
    image[8:40, 8:40] = 255
    Image.fromarray(image).save(root / film)
    line = refused_in_one_line(capsys, "chexpert", f"--root={root}", out=tmp_path / "x")
    assert "view1_frontal.jpg: looks like a mask" in line
