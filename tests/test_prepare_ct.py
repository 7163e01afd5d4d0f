"""Oddities of DeepLesion and LIDC-IDRI."""

import numpy as np
import pydicom
from PIL import Image
from test_prepare import lesion, message, nodule, scan, square, table
from trees import prepared

from jmae.data.files import read_mask
from jmae.data.prepare import lidc


def test_the_first_pixel_of_deeplesion_is_1_and_slice_intervals_may_be_negative(tmp_path, capsys):
    root = tmp_path / "root"
    folder = root / "Images_png" / "000001_01_02"
    folder.mkdir(parents=True)
    for k in range(101, 121):
        Image.fromarray(np.arange(200, dtype=np.uint16).reshape(10, 20) + k).save(folder / f"{k:03d}.png")
    table(root, lesion(1, 110, "1, 1, 21, 4", 3, "0.8, 0.8, -5"))
    rows, _ = prepared(capsys, "deeplesion", f"--root={root}", out=tmp_path / "out")
    assert rows["000001_01_02_110"].boxes == ((0, 0, 20, 3),)
    assert sum(row.label == 0 for row in rows.values()) == 20 - 5


def test_of_two_slices_at_one_z_the_first_stays_with_the_marks_of_both(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lidc, "TRAIN", 0), monkeypatch.setattr(lidc, "VAL", 0)
    root = tmp_path / "root"
    series = root / "LIDC-IDRI-0085" / "study" / "series"
    scan(series, "1.2.3", n=20)
    for file in sorted(series.iterdir()):
        one = pydicom.dcmread(file)
        one.InstanceNumber = int(one.SOPInstanceUID.rsplit(".", 1)[1])
        one.save_as(file)
    for k in range(20):  # every slice twice
        one = pydicom.dcmread(series / f"{20 - k:06d}.dcm")
        one.SOPInstanceUID, one.InstanceNumber = f"1.2.3.{k + 101}", 100 + k
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.PixelData = (one.pixel_array + 1).astype("<u2").tobytes()
        one.save_as(series / f"{100 + k:06d}.dcm")
    marks = nodule("1.2.3", [(10, "TRUE", square(2, 4)), (110, "TRUE", square(8, 9))])
    (series / "1.xml").write_text(message("1.2.3", marks))
    rows, said = prepared(capsys, "lidc", f"--root={root}", out=tmp_path / "out")
    healthy = sorted(int(row.extra["slice"]) for row in rows.values() if row.label == 0)
    assert healthy == [*range(5), *range(16, 20)]  # more than 5 slices of 2.5 mm from slice 10, not 2.5 of them
    (sick,) = [row for row in rows.values() if row.label == 1]
    mask = read_mask(sick.mask)
    assert mask[3, 3] and mask[8, 8] and "20 slices at the z of another slice" in said
    assert pydicom.dcmread(sick.image[0]).InstanceNumber == 11
