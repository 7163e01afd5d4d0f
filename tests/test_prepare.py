"""Public data sets in their true layout, small: what becomes of them, and what is said when something is missing."""

import csv
from collections import Counter

import numpy as np
import pydicom
import pytest
from PIL import Image as pillow
from pydicom import uid

from jmae.data import prepare
from jmae.data.files import read_image, read_mask
from jmae.data.manifest import parse_manifest
from jmae.data.opening import open_each
from jmae.data.prepare import deeplesion, draw, hyper_kvasir, jsrt, lidc
from jmae.errors import InputError, exit_code


def run(name, root, out, *flags):
    return exit_code(prepare.main, [name, f"--root={root}", f"--out={out}", *flags])


def prepared(capsys, name, root, out, *flags):
    """The rows by id, read as any recipe reads them, and what the command said."""
    assert run(name, root, out, *flags) == 0, capsys.readouterr().err
    rows = parse_manifest(out / "manifest.csv")[0]
    assert open_each(rows, workers=1) == []
    return {row.id: row for row in rows}, capsys.readouterr().out


def refused(capsys, name, root, out):
    assert run(name, root, out) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert not (out / "manifest.csv").exists()
    return lines


def test_an_unknown_name_a_missing_folder_and_a_used_one_are_one_line(tmp_path, capsys):
    assert "did you mean jsrt?" in refused(capsys, "jrst", tmp_path, tmp_path / "out")[0]
    assert "not a folder" in refused(capsys, "lidc", tmp_path / "none", tmp_path / "out")[0]
    assert exit_code(prepare.main, ["lidc", "--root=x"]) == 2
    names = capsys.readouterr().err.split("names: ")[1].split(", ")
    assert "folders" in names and [name.strip() for name in names] == sorted(name.strip() for name in names)
    (tmp_path / "manifest.csv").write_text("")
    assert run("lidc", tmp_path, tmp_path) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_draw_depends_on_seed_and_names_alone():
    names = [f"n{i}" for i in range(40)]
    first = draw(names, 10, 0, str)
    assert first == draw(names[::-1], 10, 0, str) == sorted(first) != draw(names, 10, 1, str)
    assert set(draw([n for n in names if n not in first[:3]], 7, 0, str)) == set(first[3:])  # others do not matter
    assert draw(names[:3], 10, 0, str) == names[:3]


# JSRT

# As the tables are: CRLF or none between two records, tabs or spaces, "?" for an unknown age, Shift-JIS in a remark.
NODULES = (
    "JPCLN001.IMG\t5\t7\t53\tMale\t30\t10\tmalignant\tl.upper lobe\tlung cancer\r\n"
    "JPCLN002.IMG\t1\t3.5\t?\tFemale\t1\t20\tbenign\tr.lower lobe(S6)\tgranulomaJPCLN003.IMG\t3\t7\t40\tmale\t20\t63\t"
    "malignant\tl.upper\t\u80ba\r\n"
).encode("cp932")
NORMALS = "".join(f"JPCNN{i:03d}.IMG   {30 + i}   female   non-nodule\r\n" for i in range(1, 24)).encode()


@pytest.fixture
def radiographs(tmp_path, monkeypatch):
    """Three with a nodule and 23 without, of 64 x 64 pixels; values 16 * row + column, beyond 12 bits at one pixel."""
    monkeypatch.setattr(jsrt, "SIDE", 64)
    values = (16 * np.arange(64)[:, None] + np.arange(64)).astype(">u2")
    values[0, 0] = 5000
    root = tmp_path / "root"
    for folder in ("images", "Clinical_Information"):
        (root / folder).mkdir(parents=True)
    for letter, n in (("L", 3), ("N", 23)):
        for i in range(1, n + 1):
            (root / "images" / f"JPC{letter}N{i:03d}.{'IMG' if i > 1 else 'img'}").write_bytes(values.tobytes())
    (root / "Clinical_Information" / "CLNDAT_EN.txt").write_bytes(NODULES)
    (root / "Clinical_Information" / "CNNDAT_EN.TXT").write_bytes(NORMALS)
    return root


def test_jsrt_becomes_inverted_16_bit_png_with_boxes_and_the_papers_split(radiographs, tmp_path, capsys):
    rows, said = prepared(capsys, "jsrt", radiographs, tmp_path / "out")
    assert Counter((row.split, row.label) for row in rows.values()) == {
        ("train", 0): 4,
        ("test", 0): 19,
        ("test", 1): 3,
    }
    assert "3 radiographs with a nodule, 23 without" in said and "left out: nothing" in said
    assert all(row.patient == row.id and row.image == (f"{tmp_path}/out/images/{row.id}.png",) for row in rows.values())
    image = read_image(rows["JPCLN001"].image)
    values = 16.0 * np.arange(64)[:, None] + np.arange(64)
    values[0, 0] = 4095
    assert image.bits == 16 and image.array[0, 0, 0] == 0
    np.testing.assert_allclose(image.array[..., 0], 65535 * (1 - values / 4095), atol=0.5)
    assert rows["JPCLN001"].boxes == ((10, 0, 50, 30),)  # 7 mm are 40 pixels, cut at the upper edge
    assert rows["JPCLN002"].boxes == ((0, 10, 11, 30),)
    assert rows["JPCLN003"].extra == {
        "licence": "JSRT: registration, research use",
        "subtlety": "3",
        "size_mm": "7",
        "age": "40",
        "sex": "male",
        "nodule": "malignant",
    }
    assert (rows["JPCLN002"].extra["age"], rows["JPCNN007"].extra["age"]) == ("", "37")
    again, _ = prepared(capsys, "jsrt", radiographs, tmp_path / "again", "--seed=1")
    assert {i for i, row in again.items() if row.split == "train"} != {
        i for i, row in rows.items() if row.split == "train"
    }


def test_a_radiograph_of_2048_squared_is_read_big_endian(tmp_path):
    path = tmp_path / "JPCLN001.IMG"
    with open(path, "wb") as file:
        file.truncate(2 * 2048**2)
        file.seek(2 * (5 * 2048 + 7))
        file.write(bytes([0x0F, 0xFF]))
    array = jsrt.read_radiograph(path)
    assert array.shape == (2048, 2048) and array.dtype == np.uint16
    assert array[5, 7] == 0 and np.count_nonzero(array != 65535) == 1


def test_what_is_wrong_with_jsrt_comes_in_one_list(radiographs, tmp_path, capsys):
    images, out = radiographs / "images", tmp_path / "out"
    (images / "JPCLN003.IMG").unlink()
    (images / "JPCNN002.IMG").write_bytes(b"short")
    (images / "JPCNN099.IMG").write_bytes(bytes(2 * 64**2))
    (radiographs / "JPCLN002.IMG").write_bytes(bytes(2 * 64**2))
    lines = refused(capsys, "jsrt", radiographs, out)
    for word in (
        "JPCLN003.IMG: listed in the tables but not found",
        "has 5 bytes, but 64 x 64",
        "in neither table",
        "also lies in",
    ):
        assert sum(word in line for line in lines) == 1
    assert len(lines) == 4 and not out.exists()
    (radiographs / "Clinical_Information" / "CLNDAT_EN.txt").unlink()
    assert "CLNDAT_EN.TXT: not found below" in refused(capsys, "jsrt", radiographs, out)[0]
    (radiographs / "CLNDAT_EN.txt").write_text("JPCLN001.IMG\t5\tlarge\t53\tMale\t30\t10\tmalignant\n")
    assert "lacks size or place" in refused(capsys, "jsrt", radiographs, out)[0]


def test_swapped_bytes_and_too_few_normals_are_refused(radiographs, tmp_path, capsys):
    file = radiographs / "images" / "JPCLN003.IMG"
    file.write_bytes(np.frombuffer(file.read_bytes(), ">u2").astype("<u2").tobytes())
    assert "above 4095 of 12 bits" in refused(capsys, "jsrt", radiographs, tmp_path / "out")[0]
    (radiographs / "Clinical_Information" / "CNNDAT_EN.TXT").write_bytes(b"".join(NORMALS.splitlines(True)[:19]))
    assert "19 normals, and the test needs 19" in refused(capsys, "jsrt", radiographs, tmp_path / "out")[0]


# LIDC-IDRI


def scan(folder, series, n=30, modality="CT", first=0, slope=1):
    """n slices of 16 x 16 named against their order; slice k is k above HU -1000."""
    folder.mkdir(parents=True)
    for k in range(n):
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = uid.CTImageStorage, f"{series}.{k + 1}"
        data.SeriesInstanceUID, data.Modality = series, modality
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, -40 + 2.5 * k], [1, 0, 0, 0, 1, 0]
        data.Rows = data.Columns = 16
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept = slope, -1000
        data.PixelData = np.full((16, 16), k, "<u2").tobytes()
        data["PixelData"].VR = "OW"
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        pydicom.dcmwrite(folder / f"{n - k:06d}.dcm", data, enforce_file_format=True)


def nodule(series, rois):
    """A reader's nodule of (slice, inclusion, [(x, y), ...])."""
    parts = ""
    for k, inclusion, edge in rois:
        edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in edge)
        head = f"<imageZposition>{k}</imageZposition><imageSOP_UID>{series}.{k + 1}</imageSOP_UID>"
        parts += f"<roi>{head}<inclusion>{inclusion}</inclusion>{edges}</roi>"
    return f"<unblindedReadNodule><noduleID>1</noduleID>{parts}</unblindedReadNodule>"


def message(series, *readers, other="", head='<?xml version="1.0" encoding="UTF-8"?>'):
    sessions = "".join(f"<readingSession>{reader}</readingSession>" for reader in readers)
    header = f"<ResponseHeader><SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>{other}"
    return f'{head}<LidcReadMessage xmlns="http://www.nih.gov">{header}{sessions}</LidcReadMessage>'


def square(low, high):
    return [(low, low), (high, low), (high, high), (low, high), (low, low)]


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Patients 1 and 2 train, 3 is val, 4 is the test; 5 has a radiograph, 6 no reading."""
    monkeypatch.setattr(lidc, "TRAIN", 2), monkeypatch.setattr(lidc, "VAL", 1)
    root = tmp_path / "root"
    folder = lambda i: root / "LIDC-IDRI" / f"LIDC-IDRI-{i:04d}" / "study"
    for i in (1, 2, 3, 4, 6):
        scan(folder(i) / "series", f"1.2.{i}")
    scan(folder(4) / "second", "1.2.44", n=3)
    scan(folder(5) / "series", "1.2.5", n=1, modality="DX")
    readings = {
        1: message("1.2.1", nodule("1.2.1", [(10, "TRUE", square(2, 6)), (11, "TRUE", square(2, 6))])),
        2: message("1.2.2", ""),  # read, nothing found: only the header names it
        3: message("9.9", nodule("1.2.3", [(0, "TRUE", [(3, 3)])]), nodule("1.2.3", [(29, "TRUE", square(1, 3))])),
        4: message(
            "9.9",
            nodule("1.2.4", [(12, "TRUE", square(1, 7)), (12, "FALSE", square(3, 5)), (13, "TRUE", square(9, 11))]),
            nodule("1.2.4", [(12, "TRUE", [(4, 4), (5, 4)])]) + nodule("1.2.4", [(12, "TRUE", square(12, 20))]),
            nodule("1.2.4", [(25, "TRUE", [(3, 3)])]) + nodule("1.2.44", [(1, "TRUE", [(3, 3)])]),
        ),
        5: '<IdriReadMessage xmlns="http://www.nih.gov"/>',
    }
    for i, text in readings.items():
        (folder(i) / "series" / f"{i:03d}.xml").write_text(text)
    return root


def test_lidc_keeps_slices_in_place_and_unites_contours(scans, tmp_path, capsys):
    rows, said = prepared(capsys, "lidc", scans, tmp_path / "out")
    found = lambda patient, label: [
        int(r.extra["slice"]) for r in rows.values() if r.patient == f"LIDC-IDRI-{patient:04d}" and r.label == label
    ]
    assert found(1, 0) == [*range(5), *range(17, 30)] and found(1, 1) == []  # 10 - 5 and 11 + 5 are not farther than 5
    assert found(2, 0) == list(range(30)) and found(3, 0) == list(range(6, 24)) and found(3, 1) == [29]
    assert found(4, 0) == [*range(7), 19] and found(4, 1) == [12, 13]  # a point at 25; the second scan is near a mark
    assert {r.split for r in rows.values() if r.patient == "LIDC-IDRI-0003"} == {"val"}
    assert "5 scans with a reading of 4 patients" in said and "--config.data.window=-1024,3071 --workdir" in said
    assert "1 CT series without a reading" in said and "1 XML file without a CT reading" in said
    assert "3 slices with only a point mark" in said and "2 lesion slices of training patients" in said

    lesion = rows["LIDC-IDRI-0004_1_0012"]
    assert lesion.image == (f"{scans}/LIDC-IDRI/LIDC-IDRI-0004/study/series/000018.dcm",)
    np.testing.assert_array_equal(read_image(lesion.image).array, np.full((16, 16, 1), 12 - 1000))
    expected = np.zeros((16, 16), bool)  # rows, columns
    expected[1:8, 1:8], expected[3:6, 3:6], expected[4, 4:6], expected[12:, 12:] = True, False, True, True
    np.testing.assert_array_equal(read_mask(lesion.mask), expected)
    assert lesion.boxes == ((1, 1, 8, 8), (12, 12, 16, 16))
    assert lesion.extra == {"case": "LIDC-IDRI-0004_1", "slice": "12", "licence": "CC BY 3.0"}


def test_lidc_draws_of_val_and_test_by_seed(scans, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lidc, "HEALTHY", 4), monkeypatch.setattr(lidc, "ABNORMAL", 1)
    rows, said = prepared(capsys, "lidc", scans / "LIDC-IDRI", tmp_path / "out")
    assert Counter((r.split, r.label) for r in rows.values() if r.split != "train") == {
        ("val", 0): 4,
        ("val", 1): 1,
        ("test", 0): 4,
        ("test", 1): 1,
    }
    assert "5 test slices not drawn" in said and len(list((tmp_path / "out" / "masks").iterdir())) == 2
    other, _ = prepared(capsys, "lidc", scans, tmp_path / "other", "--seed=5")
    assert other.keys() != rows.keys()


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "y"><!ENTITY z SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (message("1", head=BOMB, other="<a>&z;</a>"), "DOCTYPE"),
        (message("1", head=BOMB).encode("utf-16"), "DOCTYPE"),
        (message("1", nodule("1", [(1, "TRUE", [])])), "no edgeMap"),
        (message("1", nodule("1", [(1, "TRUE", [("x", 2)])])), "invalid literal"),
        (message("1", "<unblindedReadNodule><roi/></unblindedReadNodule>"), "is missing"),
        ("<LidcReadMessage", "unclosed token"),
    ],
)
def test_a_damaged_or_hostile_xml_is_one_line(tmp_path, text, word):
    file = tmp_path / "bad.xml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        lidc.read_xml(file)
    line = str(caught.value)
    assert line.startswith(f"{file}: not a reading of LIDC-IDRI") and word in line and "\n" not in line


def test_what_lidc_lacks_is_one_line(scans, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "has no folder LIDC-IDRI-xxxx" in refused(capsys, "lidc", tmp_path / "empty", out)[0]
    alone = scans / "LIDC-IDRI" / "LIDC-IDRI-0006"
    assert "has no XML file" in refused(capsys, "lidc", alone, out)[0]
    (alone / "other.xml").write_text(message("7", head=BOMB))
    assert "other.xml: not a reading" in refused(capsys, "lidc", alone, out)[0]
    (alone / "other.xml").write_text(message("7", ""))
    assert "has a CT series with a reading" in refused(capsys, "lidc", alone, out)[0]
    (alone / "study" / "series" / "000002.dcm").write_bytes(b"no image")
    assert "000002.dcm: not readable" in refused(capsys, "lidc", alone, out)[0]


# DeepLesion

HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
).split(",")


def lesion(patient, key, box, split, spacing="0.8, 0.8, 5"):
    cells = dict.fromkeys(HEADER, "1") | {
        "File_name": f"{patient:06d}_01_02_{key:03d}.png",
        "Bounding_boxes": box,
        "Spacing_mm_px_": spacing,
        "Image_size": "20, 10",
        "Train_Val_Test": split,
    }
    return cells


@pytest.fixture
def lesions(tmp_path):
    """Three patients, slices 101 to 120 of 10 rows and 20 columns each; value 32768 - 1000 + slice."""
    root = tmp_path / "root"
    for patient in (1, 2, 3):
        folder = root / "Images_png" / f"{patient:06d}_01_02"
        folder.mkdir(parents=True)
        for k in range(101, 121):
            pillow.fromarray(np.full((10, 20), 31768 + k, np.uint16)).save(folder / f"{k:03d}.png")
    table(
        root,
        lesion(1, 110, "1, 2, 3, 4", 1),
        lesion(2, 101, "1, 2, 3, 4", 2, "0.8, 0.8, 1"),
        lesion(3, 105, "-2.5, 2, 3.25, 4", 3),
        lesion(3, 105, "10, 6, 15, 12", 3),
        lesion(3, 115, "1, 2, 3, 4", 3, "0.8, 0.8, 2.5"),
        lesion(4, 115, "1, 2, 3, 4", 3),  # its folder was not downloaded
    )
    return root


def table(root, *rows):
    with open(root / "DL_info.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, HEADER)
        writer.writeheader()
        writer.writerows(rows)


def test_deeplesion_takes_slices_farther_than_10_mm_from_key_slices(lesions, tmp_path, capsys):
    rows, said = prepared(capsys, "deeplesion", lesions, tmp_path / "out")
    found = lambda patient, label: [
        int(r.extra["slice"]) for r in rows.values() if r.patient == f"{patient:06d}" and r.label == label
    ]
    assert found(1, 0) == [*range(101, 108), *range(113, 121)] and found(1, 1) == []
    assert found(2, 0) == list(range(112, 121)) and found(2, 1) == [101]
    assert found(3, 0) == [101, 102, 108, 109, 110, 120] and found(3, 1) == [105, 115]
    assert {r.split for r in rows.values() if r.patient == "000003"} == {"test"}
    one = rows["000003_01_02_105"]
    assert one.boxes == ((0, 1, 2.25, 3), (9, 5, 14, 10))  # counted from 0, cut at the edge
    assert one.image == (f"{lesions}/Images_png/000003_01_02/105.png",)
    assert (read_image(one.image).array == 32768 - 1000 + 105).all()
    assert "6 lesions, 3 of 4 series" in said and "1 series without a folder" in said
    assert "--config.data.window=31744,35839 --workdir" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.csv"]


def test_deeplesion_draws_and_finds_the_parts_of_the_download(lesions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deeplesion, "DRAWN", 1)
    (lesions / "Images_png" / "000003_01_02").rename(lesions / "part")
    (lesions / "Images_png_02" / "Images_png").mkdir(parents=True)
    (lesions / "part").rename(lesions / "Images_png_02" / "Images_png" / "000003_01_02")
    rows, said = prepared(capsys, "deeplesion", lesions, tmp_path / "out")
    assert Counter((r.split, r.label) for r in rows.values()) == {
        ("train", 0): 15,
        ("val", 0): 1,
        ("val", 1): 1,
        ("test", 0): 1,
        ("test", 1): 1,
    }
    assert "6 test slices not drawn" in said


def test_what_deeplesion_lacks_is_one_line(lesions, tmp_path, capsys):
    out = tmp_path / "out"
    (lesions / "Images_png" / "000002_01_02" / "101.png").unlink()
    assert "101.png: this key slice is not found" in refused(capsys, "deeplesion", lesions, out)[0]
    table(
        lesions, lesion(1, 110, "1, 2, 3", 1), lesion(2, 101, "1, 2, 3, 4", 4), lesion(3, 105, "1, 2, 3, 4", 3, "1, 1")
    )
    assert [f"line {i}: " in line for i, line in enumerate(refused(capsys, "deeplesion", lesions, out), 2)] == [
        True
    ] * 3
    table(lesions, lesion(1, 110, "1, 2, 3, 4", 1), lesion(1, 111, "1, 2, 3, 4", 3))
    assert "patient 000001 is in test and train" in refused(capsys, "deeplesion", lesions, out)[0]
    table(lesions, lesion(3, 110, "30, 2, 33, 4", 3))
    assert "lies outside of the 20 x 10" in refused(capsys, "deeplesion", lesions, out)[0]
    (lesions / "DL_info.csv").write_text("File_name\nx.png\n")
    assert "has no column Bounding_boxes" in refused(capsys, "deeplesion", lesions, out)[0]
    (lesions / "Images_png").rename(lesions / "other")
    table(lesions, lesion(1, 110, "1, 2, 3, 4", 1))
    assert "Images_png: not found or empty" in refused(capsys, "deeplesion", lesions, out)[0]
    (lesions / "DL_info.csv").unlink()
    assert "DL_info.csv: not found" in refused(capsys, "deeplesion", lesions, out)[0]


# COVIDx

TRAIN_LIST = """\
5 ARDSSevere.png negative cohen
COVID 1 COVID(1).png positive sirm
 ANON 1 b  CR.1.2.png   negative actmed

101 c.jpg negative cohen
8b9d 8b9d.png positive ricord
"""
TEST_LIST = "419639-1 m-0.png positive ricord\n419639-1 m-1.png positive ricord\nca3c ca3c.png negative rsna\n"


@pytest.fixture
def covid(tmp_path):
    """Two lists, and the images of the lines that are used."""
    root = tmp_path / "root"
    for folder in ("train", "test", "labels"):
        (root / folder).mkdir(parents=True)
    (root / "labels" / "train_COVIDx8B.txt").write_text(TRAIN_LIST)
    (root / "test.txt").write_text(TEST_LIST)
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    for i, name in enumerate(("train/ARDSSevere", "train/CR.1.2", "test/m-0", "test/m-1", "test/ca3c")):
        pillow.fromarray(np.full((8 + i, 9), 20 * i, np.uint8)).save(root / f"{name}.png")
    pillow.fromarray(colour).save(root / "train" / "c.jpg", quality=95)
    return root


def test_covidx_trains_on_the_negatives_and_splits_its_lines_from_the_right(covid, tmp_path, capsys):
    rows, said = prepared(capsys, "covidx", covid, tmp_path / "out")
    assert {(r.id, r.patient, r.split, r.label, r.extra["source"]) for r in rows.values()} == {
        ("ARDSSevere.png", "5", "train", 0, "cohen"),
        ("CR.1.2.png", "ANON 1 b", "train", 0, "actmed"),
        ("c.jpg", "101", "train", 0, "cohen"),
        ("m-0.png", "419639-1", "test", 1, "ricord"),
        ("m-1.png", "419639-1", "test", 1, "ricord"),
        ("ca3c.png", "ca3c", "test", 0, "rsna"),
    }
    assert "5 lines for train, 3 lines for test" in said and "left out: 2 positives of the training list" in said
    assert "come from ricord, all normal ones from rsna: a score can separate them by their source alone" in said
    assert rows["m-1.png"].image == (f"{covid}/test/m-1.png",)
    coloured = np.asarray(pillow.open(covid / "train" / "c.jpg"), float)
    grey = read_image(rows["c.jpg"].image).array[..., 0]
    np.testing.assert_allclose(grey, coloured @ [0.299, 0.587, 0.114], atol=0.51)
    assert [p.name for p in (tmp_path / "out" / "images" / "train").iterdir()] == ["c.jpg.png"]


def test_covidx_warns_of_sources_only_where_each_has_one_class(covid, tmp_path, capsys):
    (covid / "test.txt").write_text(TEST_LIST.replace("negative rsna", "negative ricord"))
    _, said = prepared(capsys, "covidx", covid, tmp_path / "out")
    assert "caution" not in said


def test_what_covidx_lacks_is_one_line(covid, tmp_path, capsys):
    out, lists = tmp_path / "out", covid / "labels"
    (covid / "test" / "m-0.png").write_bytes(b"no image"), (covid / "train" / "CR.1.2.png").unlink()
    assert "train/CR.1.2.png: listed but not found" in refused(capsys, "covidx", covid, out)[0]
    pillow.fromarray(np.zeros((4, 4), np.uint8)).save(covid / "train" / "CR.1.2.png")
    (line,) = refused(capsys, "covidx", covid, out)
    assert "test/m-0.png: " in line
    (lists / "train_COVIDx7B.txt").write_text(TRAIN_LIST)
    (line,) = refused(capsys, "covidx", covid, out)
    assert "several lists for train: keep one of labels/train_COVIDx7B.txt, labels/train_COVIDx8B.txt" in line
    (lists / "train_COVIDx7B.txt").write_text("x.png negative rsna\n1 a.png level1 rsna\n2 ../b.png negative rsna\n")
    (lists / "train_COVIDx8B.txt").unlink()
    lines = refused(capsys, "covidx", covid, out)
    assert [f"line {i}: not `patient filename" in line for i, line in enumerate(lines, 1)] == [True] * 3
    (lists / "train_COVIDx7B.txt").write_text("1 a.png negative rsna\n2 a.png negative rsna\n")
    assert "line 2: a.png is listed twice" in refused(capsys, "covidx", covid, out)[0]
    (lists / "train_COVIDx7B.txt").write_text("1 a.png negative rsna\n")
    (covid / "train").rename(covid / "images")
    assert "train: not found: unpack the images" in refused(capsys, "covidx", covid, out)[0]
    (lists / "train_COVIDx7B.txt").unlink()
    assert "has no train_COVIDx8B.txt or train.txt" in refused(capsys, "covidx", covid, out)[0]


# HyperKvasir


@pytest.fixture
def bowels(tmp_path, monkeypatch):
    """40 cecum, 2 ileum and 9 bbps-2-3, of which 42 train or test; 3 polyps, whose JPEG masks ring around a disc."""
    monkeypatch.setattr(hyper_kvasir, "TRAIN", 32), monkeypatch.setattr(hyper_kvasir, "TEST", 10)
    root, lower = tmp_path / "root", "labeled-images/lower-gi-tract"
    picture = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)

    def fill(folder, names, array):
        (root / folder).mkdir(parents=True)
        for name in names:
            pillow.fromarray(array).save(root / folder / name, quality=75)

    fill(f"{lower}/anatomical-landmarks/cecum", [f"c{i:02d}.jpg" for i in range(40)], picture)
    fill(f"{lower}/anatomical-landmarks/normal-ileum", ["i0.jpg", "i1.jpg"], picture)
    fill(f"{lower}/quality-of-mucosal-views/bbps-2-3", [f"b{i}.jpg" for i in range(9)], picture)
    fill(f"{lower}/pathological-findings/polyp", ["p0.jpg"], picture)
    (root / "labeled-videos" / "cecum").mkdir(parents=True)
    (root / "labeled-videos" / "cecum" / "a.avi").write_bytes(b"")
    fill("segmented-images/images", ["p0.jpg", "p1.jpg", "p2.jpg"], picture)
    y, x = np.mgrid[:24, :30]
    fill("segmented-images/masks", ["p0.jpg", "p1.jpg", "p2.jpg"], np.uint8(255 * disc(y, x)))
    return root


def disc(y, x):
    return (y - 11) ** 2 + (x - 14) ** 2 < 50


def test_hyper_kvasir_draws_its_normals_and_cuts_jpeg_masks_cleanly(bowels, tmp_path, capsys):
    rows, said = prepared(capsys, "hyper_kvasir", bowels, tmp_path / "out")
    assert Counter((r.split, r.label) for r in rows.values()) == {
        ("train", 0): 32,
        ("test", 0): 10,
        ("val", 0): 9,
        ("test", 1): 3,
    }
    assert "51 normals (40 cecum, 2 ileum, 9 bbps-2-3); 3 polyps with a mask" in said and "left out: nothing" in said
    assert {r.extra["class"] for r in rows.values() if r.split == "train"} >= {"cecum", "bbps-2-3"}
    assert not any("pathological-findings" in r.image[0] for r in rows.values())
    assert all(not r.patient and r.image[0].startswith(str(bowels)) for r in rows.values())
    path = bowels / "segmented-images" / "masks" / "p1.jpg"
    ringing = np.asarray(pillow.open(path))
    truth = disc(*np.mgrid[:24, :30])
    assert (ringing[~truth] > 0).sum() > 20 and (ringing[truth] < 255).any()
    np.testing.assert_array_equal(read_mask(rows["polyp_p1"].mask), truth)
    split = lambda rows: {r.id: r.split for r in rows.values()}
    again, _ = prepared(capsys, "hyper_kvasir", bowels, tmp_path / "again", "--seed=0")
    other, _ = prepared(capsys, "hyper_kvasir", bowels, tmp_path / "other", "--seed=1")
    assert split(again) == split(rows) != split(other)


def test_few_images_of_hyper_kvasir_are_split_in_the_same_proportion(bowels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hyper_kvasir, "TRAIN", 1600), monkeypatch.setattr(hyper_kvasir, "TEST", 500)
    rows, said = prepared(capsys, "hyper_kvasir", bowels, tmp_path / "out")
    assert Counter(r.split for r in rows.values() if r.label == 0) == {"train": 38, "test": 13}
    assert "51 normals (40 cecum, 2 ileum, 9 bbps-2-3), fewer than 2100: 38 of them train" in said


def test_what_hyper_kvasir_lacks_is_one_line(bowels, tmp_path, capsys):
    out, parts = tmp_path / "out", bowels / "segmented-images"
    pillow.fromarray(np.zeros((24, 30), np.uint8)).save(parts / "masks" / "p0.jpg")
    pillow.fromarray(np.full((25, 30), 255, np.uint8)).save(parts / "masks" / "p2.jpg")
    lines = refused(capsys, "hyper_kvasir", bowels, out)
    assert (
        "p0.jpg: no value is above 127" in lines[0]
        and "p2.jpg: size (25, 30), but its image has" in lines[1]
        and len(lines) == 2
    )
    (parts / "masks" / "p0.jpg").unlink(), (parts / "images" / "p2.jpg").unlink()
    lines = refused(capsys, "hyper_kvasir", bowels, out)
    assert "images/p0.jpg: has no mask" in lines[0] and "masks/p2.jpg: has no image" in lines[1] and len(lines) == 2
    parts.rename(bowels / "elsewhere"), (bowels / "elsewhere" / "masks").rename(bowels / "elsewhere" / "other")
    assert "has no folder with images and masks" in refused(capsys, "hyper_kvasir", bowels, out)[0]
    (bowels / "cecum").mkdir()
    pillow.fromarray(np.zeros((24, 30), np.uint8)).save(bowels / "cecum" / "a.png")
    (line,) = refused(capsys, "hyper_kvasir", bowels, out)
    assert (
        "several folders of cecum: keep one of cecum, labeled-images/lower-gi-tract/anatomical-landmarks/cecum" in line
    )
    assert "has no images in folders cecum" in refused(capsys, "hyper_kvasir", tmp_path / "root" / "elsewhere", out)[0]


def test_a_text_in_none_of_the_encodings_is_latin_1(tmp_path):
    for text, encoding in (("\u80ba", "cp932"), ("M\u00fcller", "latin-1"), ("\ufeffM\u00fcller", "utf-8")):
        (tmp_path / "t.txt").write_bytes(text.encode(encoding))
        assert prepare.text_of(tmp_path / "t.txt") == text.removeprefix("\ufeff")
    with pytest.raises(InputError, match="not readable"):
        prepare.text_of(tmp_path / "none.txt")
