"""DICOM series: slices written by pydicom as a scanner writes them, positions worked out by hand in LPS mm."""

import os
import tracemalloc

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid

from jmae.data.files import guard, image_size, read_image, read_mask, write_map
from jmae.errors import InputError

RNG = np.random.default_rng(0)
SIZE = (5, 7, 6)  # columns, rows, slices
VOLUME = RNG.integers(0, 4096, SIZE).astype(np.uint16)
ACROSS_MM, DOWN_MM, STEP_MM = 0.8, 0.7, 2.5
CORNER = np.array([-90.5, 40.25, -300.0])  # LPS mm of voxel (0, 0, 0)
TURN, TIP = np.deg2rad(25), np.deg2rad(15)
ORIENTATIONS = {  # row direction (i), column direction (j), LPS
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial, feet first prone": ((-1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": (
        (np.cos(TURN), np.sin(TURN), 0),
        (-np.sin(TURN) * np.cos(TIP), np.cos(TURN) * np.cos(TIP), np.sin(TIP)),
    ),
}


def series(folder, orientation="axial", volume=VOLUME, step=None, names=None, change=None, skip=()):
    """Writes `volume` (i, j, k) as one file a slice; `change(k, dataset)` edits what is written.

    `step` is the vector from slice to slice, by default the normal; `names` the files in the order of k."""
    folder.mkdir(parents=True, exist_ok=True)
    row, column = (np.array(direction, float) for direction in ORIENTATIONS[orientation])
    step = np.cross(row, column) * STEP_MM if step is None else np.array(step, float)
    for k in range(volume.shape[2]):
        if k in skip:
            continue
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = uid.MRImageStorage, f"1.2.3.{k + 1}"
        data.SeriesInstanceUID, data.Modality, data.InstanceNumber = "1.2.3", "MR", k + 1
        data.SliceThickness = "9"  # says nothing of the distance between slices
        data.ImagePositionPatient = [f"{x:.9g}" for x in CORNER + k * step]
        data.ImageOrientationPatient = [f"{x:.9g}" for x in (*row, *column)]
        data.PixelSpacing = [str(DOWN_MM), str(ACROSS_MM)]
        data.Rows, data.Columns, data.SamplesPerPixel = volume.shape[1], volume.shape[0], 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
        data.PixelData = volume[:, :, k].T.astype("<u2").tobytes()
        data["PixelData"].VR = "OW"
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        if change:
            change(k, data)
        pydicom.dcmwrite(folder / (names[k] if names else f"{k:03d}.dcm"), data, enforce_file_format=True)
    return folder


def position_ras(orientation, voxel, step=None):
    """RAS mm of a voxel, by the definition of ImagePositionPatient, ImageOrientationPatient and PixelSpacing."""
    row, column = (np.array(direction, float) for direction in ORIENTATIONS[orientation])
    step = np.cross(row, column) * STEP_MM if step is None else np.array(step, float)
    lps = CORNER + voxel[0] * ACROSS_MM * row + voxel[1] * DOWN_MM * column + voxel[2] * step
    return lps * [-1, -1, 1]


def read(folder, volume=VOLUME):
    image = read_image(folder)
    np.testing.assert_array_equal(image.array[..., 0], volume)
    assert image.array.dtype == np.float32 and image.array.flags.c_contiguous and image.bits is None
    assert image_size(folder) == volume.shape
    return image


def refused(folder, *words, file="", by=read_image):
    """The one line with which a series is refused; it names the folder, and the file that is to blame."""
    with pytest.raises(InputError) as caught:
        by(folder)
    line = str(caught.value)
    assert line.startswith(f"{folder / file if file else folder}: "), line
    assert "\n" not in line and line.count(": ") >= 2, line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_slices_are_ordered_by_position_and_have_their_affine(tmp_path, orientation):
    image = read(series(tmp_path / "s", orientation))
    np.testing.assert_allclose(image.spacing, (ACROSS_MM, DOWN_MM, STEP_MM), atol=1e-6)
    for voxel in ((0, 0, 0), (4, 0, 0), (0, 6, 0), (0, 0, 5), (3, 2, 4)):
        np.testing.assert_allclose((image.affine @ [*voxel, 1])[:3], position_ras(orientation, voxel), atol=1e-5)
    assert image.header is None


def test_neither_names_nor_instance_numbers_decide_the_order(tmp_path):
    names = [f"IM{RNG.permutation(SIZE[2])[k]}-{k * 7 % 6}" for k in range(SIZE[2])]

    def backwards(k, data):
        data.InstanceNumber = SIZE[2] - k

    read(series(tmp_path / "a", names=names, change=backwards))
    down = series(tmp_path / "b", volume=VOLUME[:, :, ::-1], step=(0, 0, -STEP_MM))  # written from the top
    image = read_image(down)
    np.testing.assert_array_equal(image.array[..., 0], VOLUME)  # k grows along the normal nevertheless
    lowest = CORNER[2] - (SIZE[2] - 1) * STEP_MM
    np.testing.assert_allclose(image.affine[:3, 3], [-CORNER[0], -CORNER[1], lowest], atol=1e-6)


def test_a_tilted_gantry_gives_the_sheared_affine_of_its_positions(tmp_path):
    step = (0, 0.9, STEP_MM)
    image = read(series(tmp_path / "s", step=step))
    np.testing.assert_allclose((image.affine @ [1, 2, 5, 1])[:3], position_ras("axial", (1, 2, 5), step), atol=1e-6)
    np.testing.assert_allclose(image.spacing[2], np.hypot(0.9, STEP_MM))
    written = nib.load(write_map(tmp_path / "m", image.array[..., 0], image))
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)


def test_each_slice_has_its_own_rescale_and_monochrome1_is_inverted(tmp_path):
    def rescaled(k, data):
        data.RescaleSlope, data.RescaleIntercept = str(k + 1), "-10"

    expected = VOLUME * np.arange(1.0, SIZE[2] + 1) - 10
    read(series(tmp_path / "a", change=rescaled), expected)

    def inverted(k, data):
        data.PhotometricInterpretation = "MONOCHROME1"

    read(series(tmp_path / "b", change=inverted), 4095.0 - VOLUME)


def test_series_without_uid_positions_of_two_decimals_hidden_files_and_dicomdir_are_read(tmp_path):
    def rough(k, data):
        del data.SeriesInstanceUID
        data.ImagePositionPatient = [f"{x:.2f}" for x in CORNER + np.array([0, 0, 1.3333]) * k]

    folder = series(tmp_path / "胸部 s", change=rough)
    (folder / ".DS_Store").write_bytes(b"junk")
    (folder / "DICOMDIR").write_bytes(b"junk")
    image = read(folder)
    np.testing.assert_allclose(image.spacing[2], 1.3333, atol=0.005)
    read(f"{folder}/")


def test_directions_of_few_decimals_do_not_change_the_spacing(tmp_path):
    def rough(k, data):
        data.ImageOrientationPatient = [f"{x:.3f}" for x in data.ImageOrientationPatient]

    spacing = read(series(tmp_path / "s", "oblique", change=rough)).spacing
    np.testing.assert_allclose(spacing, (ACROSS_MM, DOWN_MM, STEP_MM), atol=1e-5)


def test_a_missing_slice_of_a_micro_scan_is_seen(tmp_path):
    refused(series(tmp_path / "s", step=(0, 0, 0.01), skip={3}), "slice is missing")


def tag(name, value, only=None):
    def change(k, data):
        if only is None or k in only:
            if value is None:
                del data[name]
            else:
                setattr(data, name, value)

    return change


def two_phases(k, data):
    data.ImagePositionPatient = [f"{x:.9g}" for x in CORNER + np.array([0, 0, STEP_MM]) * (k // 2)]


def bent(k, data):
    data.ImagePositionPatient = [f"{x:.9g}" for x in CORNER + np.array([0, k * k, STEP_MM * k])]


def shifting(k, data):
    data.ImagePositionPatient = [f"{x:.9g}" for x in CORNER + np.array([0, 0, STEP_MM * k + 0.1 * (k == 2)])]


def smaller(k, data):
    if k == 3:
        data.Rows, data.PixelData = 6, VOLUME[:, :6, k].T.astype("<u2").tobytes()


def rgb(k, data):
    if k != 3:
        data.SamplesPerPixel, data.PlanarConfiguration, data.PhotometricInterpretation = 3, 0, "RGB"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelData = 8, 8, 7, bytes([1, 2, 3] * 35 + [0])


FAULTS = {
    "two series": ({"change": tag("SeriesInstanceUID", "1.2.4", {0, 2})}, "", ["2 DICOM series", "own"]),
    "no position": ({"change": tag("ImagePositionPatient", None, {2})}, "002.dcm", ["no ImagePositionPatient"]),
    "empty position": ({"change": tag("ImagePositionPatient", [], {2})}, "002.dcm", ["no ImagePositionPatient"]),
    "no orientation": ({"change": tag("ImageOrientationPatient", None)}, "000.dcm", ["no ImageOrientationPatient"]),
    "no spacing": ({"change": tag("PixelSpacing", None, {5})}, "005.dcm", ["no PixelSpacing"]),
    "zero spacing": ({"change": tag("PixelSpacing", ["0", "0"])}, "000.dcm", ["spacing", "not positive"]),
    "another spacing": ({"change": tag("PixelSpacing", ["0.7", "0.9"], {1})}, "001.dcm", ["spacing", "0.9"]),
    "mixed orientation": (
        {"change": tag("ImageOrientationPatient", ["1", "0", "0", "0", "0", "-1"], {4})},
        "004.dcm",
        ["orientation", "move it out"],
    ),
    "no orientation at all": (
        {"change": tag("ImageOrientationPatient", list("100100"))},
        "",
        ["orientation", "perpendicular"],
    ),
    "another size": ({"change": smaller}, "003.dcm", ["size (6, 5)", "(7, 5)"]),
    "another unit": ({"change": tag("RescaleType", "HU", {1})}, "001.dcm", ["values", "HU"]),
    "rescaled in part": ({"change": tag("RescaleSlope", "2", {1})}, "001.dcm", ["not rescaled"]),
    "colour in part": ({"change": rgb}, "003.dcm", ["MONOCHROME2", "RGB"]),
    "colour": ({"change": rgb, "skip": {3, 4, 5}}, "000.dcm", ["(7, 5, 3)", "grey"]),
    "two phases": ({"change": two_phases}, "001.dcm", ["000.dcm", "each phase"]),
    "a missing slice": ({"skip": {3}}, "", ["slice is missing between -295.00 and -290.00 mm", "most are 2.50"]),
    "uneven": ({"change": shifting}, "", ["between -297.50 and -294.90 mm"]),
    "bent": ({"change": bent}, "", ["straight line"]),
    "one slice": ({"skip": set(range(1, 6))}, "", ["single slice", "name the file"]),
    "multi-frame": ({"change": tag("NumberOfFrames", 2, {2})}, "002.dcm", ["multi-frame"]),
    "no image": ({"change": tag("Rows", None, {2})}, "002.dcm", ["without an image"]),
    "a lying header": ({"change": tag("Rows", 6)}, "000.dcm", ["more pixels"]),
    "a claim": ({"change": tag("Rows", 60000)}, "000.dcm", ["60000"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_that_makes_no_volume_is_one_line(tmp_path, fault):
    options, file, words = FAULTS[fault]
    folder = series(tmp_path / "s", **options)
    tracemalloc.start()
    refused(folder, *words, file=file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    if fault not in ("a lying header", "a claim", "colour"):  # which the pixels alone show
        refused(folder, *words, file=file, by=image_size)
    refused(folder, *words, file=file, by=read_mask)


@pytest.mark.parametrize("skip, gap", [(1, "-300.00 and -295.00"), (2, "-297.50 and -292.50")])
def test_of_three_slices_the_wider_gap_misses_one(tmp_path, skip, gap):
    refused(series(tmp_path / "s", volume=VOLUME[..., :4], skip={skip}), f"slice is missing between {gap} mm")


def test_a_slice_more_or_less_is_refused_for_every_place(tmp_path):
    for k in range(1, SIZE[2] - 1):
        refused(series(tmp_path / str(k), skip={k}), "slice is missing")
        folder = series(tmp_path / f"double {k}")
        (folder / "copy.dcm").write_bytes((folder / f"{k:03d}.dcm").read_bytes())
        refused(folder, f"{k:03d}.dcm", file="copy.dcm")


def test_what_is_no_dicom_is_named(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    refused(folder, "is a folder without a DICOM file")
    (folder / "notes.txt").write_text("seen by Dr. X, who found nothing of note in any of the slices\n" * 9)
    (folder / "sub").mkdir()
    refused(folder, "is a folder without a DICOM file")
    series(folder)
    refused(folder, "is no DICOM file", "like 1 more", "move it out", file="notes.txt")
    (folder / "notes.txt").unlink()
    refused(folder, "is no DICOM file", file="sub")
    (folder / "sub").rmdir()
    (folder / "999.dcm").write_bytes(b"")
    refused(folder, "is empty", file="999.dcm")
    (folder / "999.dcm").unlink()
    os.mkfifo(folder / "pipe")
    refused(folder, "is no DICOM file", file="pipe")
    (folder / "pipe").unlink()
    read(folder)


def test_a_cut_slice_is_named(tmp_path):
    folder = series(tmp_path / "s")
    data = (folder / "004.dcm").read_bytes()
    for cut in range(140, len(data), 31):
        (folder / "004.dcm").write_bytes(data[:cut])
        refused(folder, file="004.dcm")


def test_a_position_of_no_number_is_one_line(tmp_path):
    folder = series(tmp_path / "s")
    for text in (b"nan\\nan\\nan", b"one\\two\\three"):
        data = (folder / "001.dcm").read_bytes()
        start = data.index(b"\x20\0\x32\0DS") + 8
        length = int.from_bytes(data[start - 2 : start], "little")
        (folder / "001.dcm").write_bytes(data[:start] + text.ljust(length) + data[start + length :])
        refused(folder, file="001.dcm")


def test_a_series_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    folder = series(tmp_path / "s")
    monkeypatch.setattr(guard, "MAX_VOXELS", VOLUME.size - 1)
    refused(folder, "(5, 7, 6)", "limit")
    refused(folder, "limit", by=image_size)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_map_on_a_series_has_its_bright_voxel_in_the_right_place(tmp_path, orientation):
    image = read_image(series(tmp_path / "s", orientation))
    bright = np.zeros(SIZE, np.float32)
    bright[3, 5, 1] = 1
    written = nib.load(write_map(tmp_path / "m", bright, image))
    (voxel,) = np.argwhere(written.get_fdata() == 1)
    world = nib.affines.apply_affine(written.affine, voxel)
    np.testing.assert_allclose(world, position_ras(orientation, (3, 5, 1)), atol=1e-4)
    assert written.header["sform_code"] == written.header["qform_code"] == 1


def test_a_mask_a_channel_and_a_mask_series_lie_on_the_grid_of_a_series(tmp_path):
    image = read_image(series(tmp_path / "s", "oblique"))
    other = write_map(tmp_path / "m", image.array[..., 0] > 2000, image)
    np.testing.assert_array_equal(read_mask(other, like=image), VOLUME > 2000)
    joined = read_image([tmp_path / "s", other])
    np.testing.assert_array_equal(joined.array, np.stack([VOLUME, VOLUME > 2000], -1))
    marks = series(tmp_path / "marks", "oblique", (VOLUME > 99).astype(np.uint16))
    np.testing.assert_array_equal(read_mask(marks, like=image), VOLUME > 99)
    shifted = series(tmp_path / "shifted", "axial")
    with pytest.raises(InputError, match="mm away"):
        read_mask(shifted, like=image)


def test_a_file_of_a_series_is_still_a_2d_image(tmp_path):
    folder = series(tmp_path / "s")
    image = read_image(folder / "002.dcm")
    np.testing.assert_array_equal(image.array[..., 0], VOLUME[:, :, 2].T)
    assert image.spacing == (DOWN_MM, ACROSS_MM) and image.affine is None
