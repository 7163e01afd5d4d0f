"""Chest radiographs as Kaggle, Stanford AIMI and the authors of lists publish them."""

import json

import numpy as np
from PIL import Image
from test_prepare_folders import HEAD
from trees import dicom_file, picture, prepared, refused_in_one_line, text

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
    assert "sources of test abnormal: 1 cohen" in said and "configs/memmc_mae.py:paper" in said
    covid(tmp_path / "b", "1 a.png normal\nx y b.png pneumonia\n", "4 d.png normal\n5 e.png COVID-19\n")
    rows, said = prepared(capsys, "covidx", f"--root={tmp_path / 'b'}", out=tmp_path / "two")
    assert rows["d.png"].patient == "4" and rows["a.png"].extra["source"] == "" and len(rows) == 3


def test_covidx_and_ddad_know_nih_patients_by_rsnas_mapping(tmp_path, capsys):
    root = tmp_path / "covidx"
    covid(root, "r1 r1.png normal rsna\nr2 r2.png normal rsna\n", "r3 r3.png normal rsna\n9 e.png COVID-19 sirm\n")
    rows, said = prepared(capsys, "covidx", f"--root={root}", out=tmp_path / "unknown")
    assert len(rows) == 4 and "RSNA's ids are of images" in said
    names = {"r1": "00000001_000.png", "r2": "00000002_000.png", "r3": "00000001_004.png"}
    entries = [{"subset_img_id": one, "img_id": nih, "other": 0} for one, nih in names.items()]
    text(root / "maps" / "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(entries))
    rows, said = prepared(capsys, "covidx", f"--root={root}", out=tmp_path / "out")
    assert {row.id: row.patient for row in rows.values()} == {"r2.png": "00000002", "r3.png": "00000001", "e.png": "9"}
    assert "1 train images of patients of test" in said and "RSNA's ids" not in said


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
    assert "licence: Stanford research use agreement" in said and "configs/simsid.py:paper" in said


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
