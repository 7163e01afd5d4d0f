"""Readers of DICOM: single files, and a folder of one series as a volume."""

import math
import os
from collections import Counter
from typing import IO, NamedTuple

import numpy as np
import pydicom
import pydicom.encaps
import pydicom.filereader
import pydicom.pixels
from pydicom import uid

from jmae.data.files.grids import OFF_GRID_VOXELS
from jmae.data.files.guard import (
    Header,
    Reader,
    Refused,
    check_affine,
    check_claim,
    check_spacing,
    one_line,
    opened,
)
from jmae.data.files.pictures import one_grey
from jmae.errors import InputError

UNEVEN = 0.01  # share of the slice distance by which the slices of a series may lie unevenly
ROUNDING_MM = 0.02  # allowed where it is more than `UNEVEN`: scanners write positions with two decimals
DOUBLED_MM = 0.001  # slices closer than this are one slice twice


def begins_as_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM does, with or without a preamble. The preamble may hold anything, even the first
    bytes of another format, so this is asked first."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0")


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a regular file begins as DICOM does; False where it cannot be read."""
    try:
        return os.path.isfile(path) and begins_as_dicom(_head(os.fspath(path)))
    except OSError:
        return False


def read_dicom(file: IO[bytes], length: int) -> Header:
    """A single-frame file. MONOCHROME1 is inverted in its stored range, then slope and intercept are applied."""
    if file.read(132)[128:] != b"DICM":
        file.seek(0)  # without a preamble
    beyond = lambda tag, vr, length: tag.group != 2
    meta = pydicom.filereader.read_dataset(file, False, True, stop_when=beyond)  # type: ignore[arg-type]
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        # pydicom inflates the whole file, whatever its size, before it looks inside
        raise Refused("is a deflated DICOM: convert it, for example with `dcmconv +te`")
    file.seek(0)
    header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
    if not header.get("Rows") or not header.get("Columns"):
        raise Refused("is a DICOM file without an image: leave it out")
    size = (int(header.Rows), int(header.Columns))
    samples = int(header.get("SamplesPerPixel") or 1)
    if int(header.get("NumberOfFrames") or 1) > 1 or "SharedFunctionalGroupsSequence" in header:
        raise Refused("is a multi-frame DICOM: convert it to NIfTI, for example with dcm2niix")
    check_claim(size, samples * int(header.get("BitsAllocated") or 8) / 8, length)
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")

    def decode() -> np.ndarray:
        file.seek(0)
        return _dicom_values(pydicom.dcmread(file, force=True))

    return Header(
        size, decode, spacing=check_spacing(spacing) if spacing else None, tags=header, bits=_full_bits(header)
    )


def _full_bits(header: pydicom.Dataset) -> int | None:
    """8 where the values are those of 8 bits without a rescale, as in a PNG of the same pixels; else None."""
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    plain = slope in (None, 1) and intercept in (None, 0) and not header.get("ModalityLUTSequence")
    unsigned = int(header.get("PixelRepresentation") or 0) == 0
    return 8 if plain and unsigned and int(header.get("BitsStored") or 0) == 8 else None


def _dicom_values(dataset: pydicom.Dataset) -> np.ndarray:
    name = next((n for n in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if n in dataset), None)
    if name is None:
        raise Refused("is a DICOM file without pixel data: name an image file")
    if "TransferSyntaxUID" not in dataset.file_meta:
        # Only uncompressed pixels can be told from their length, which is compared below.
        implicit, little = dataset.original_encoding
        native = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = native if little else uid.ExplicitVRBigEndian
        if dataset[name].is_undefined_length:
            raise Refused("is compressed and names no transfer syntax: export it again")
    shape = (int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1))
    colours = str(dataset.get("PhotometricInterpretation", "none")).strip()
    encapsulated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if not encapsulated and colours != "YBR_FULL_422":
        row_bytes = shape[1] * shape[2] * int(dataset.BitsAllocated) / 8
        if len(dataset[name].value) - shape[0] * row_bytes >= max(row_bytes, 2):
            raise Refused("holds more pixels than its header claims: export it again")
    if encapsulated:
        _check_codestream(pydicom.encaps.get_frame(dataset[name].value, 0, number_of_frames=1), shape)
    array = pydicom.pixels.pixel_array(dataset, correct_unused_bits=False)
    if array.shape != (shape if shape[2] > 1 else shape[:2]):
        raise Refused(f"its header says {shape} but its pixels are {array.shape}: export it again")

    if colours == "PALETTE COLOR":
        return one_grey(pydicom.pixels.apply_color_lut(array, dataset)[..., :3])
    if colours in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT") and shape[2] == 3:
        return one_grey(array)
    if colours not in ("MONOCHROME1", "MONOCHROME2") or shape[2] != 1:
        raise Refused(f"has the DICOM colour space {colours}: export it as MONOCHROME2 or RGB")
    if array.dtype.kind in "iu":
        bits, signed, array = int(dataset.BitsStored), array.dtype.kind == "i", array.astype(np.int64)
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if signed and array.min() >= 0 and array.max() < 2**bits:
            array = np.where(array > highest, array - 2**bits, array)  # the bits above may lack the sign
        if array.min() < lowest or array.max() > highest:
            raise Refused(f"has values beyond its {bits} stored bits, such as an overlay: export it again")
        if colours == "MONOCHROME1":
            array = lowest + highest - array
    elif colours == "MONOCHROME1":
        raise Refused("is MONOCHROME1 with real values, whose range is unknown: export it as MONOCHROME2")
    if dataset.get("ModalityLUTSequence"):
        return pydicom.pixels.apply_modality_lut(array, dataset)[..., None]
    slope = 1.0 if dataset.get("RescaleSlope") is None else float(dataset.RescaleSlope)
    intercept = 0.0 if dataset.get("RescaleIntercept") is None else float(dataset.RescaleIntercept)
    if not math.isfinite(slope * intercept) or slope == 0:
        raise Refused(f"has the rescale slope {slope} and intercept {intercept}: repair the header")
    return (array * slope + intercept)[..., None]


def _check_codestream(frame: bytes, shape: tuple[int, int, int]) -> None:
    """Refuses a JPEG frame of another shape: decoders fill rows x columns from it in whatever order it has."""
    if frame.startswith(b"\xff\x4f\xff\x51"):  # JPEG 2000: extent and offset of its reference grid
        right, bottom, left, top = np.frombuffer(frame[8:24], ">u4").tolist()
        if (bottom - top, right - left) != shape[:2]:
            raise Refused(f"its header says {shape[:2]} but its JPEG 2000 data say another size: export it again")
    at = 2
    while frame.startswith(b"\xff\xd8") and at + 9 < len(frame) and frame[at] == 0xFF:
        marker, step = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:  # SOF, or JPEG-LS
            size = (int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big"))
            if size != shape[:2]:
                raise Refused(f"its header says {shape[:2]} but its compressed pixels are {size}: export it again")
            return
        at += 2 + step if marker != 0xFF else 1


_PLACE = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


class _Slice(NamedTuple):
    file: str
    size: tuple[int, ...]  # rows, columns
    series: str
    values: str  # modality, units, colour space, whether they are rescaled
    value_bytes: float
    place: dict[str, np.ndarray]  # of the tags of `_PLACE`, as far as they are there


def read_series(folder: str) -> Header:
    """The single-frame DICOM files of one series, alone in a folder, as a volume (columns, rows, slices).

    Slices are ordered by their position along the normal (row direction x column direction), never by name or
    InstanceNumber; k grows along it. The affine is that of the positions: sheared where the gantry was tilted. DICOMDIR
    and hidden files are passed over.
    """
    slices, others = [], []
    for name in sorted(os.listdir(folder)):
        file = os.path.join(folder, name)
        if name.startswith(".") or name == "DICOMDIR":
            continue
        if not os.path.isfile(file) or ((head := _head(file)) and not begins_as_dicom(head)):
            others.append(file)
            continue
        with opened(file, _reader_of) as header:
            slices.append(_slice(file, header))
    if not slices:
        raise Refused("is a folder without a DICOM file: name a file, or the folder of one DICOM series")
    if others:
        more = f", like {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(one_line(others[0], f"is no DICOM file, but in the folder of a series{more}: move it out"))
    if len(series := {s.series for s in slices if s.series}) > 1:
        raise Refused(f"holds {len(series)} DICOM series: give each a folder of its own")
    if len(slices) == 1:
        raise Refused("holds a single slice, which is no volume: name the file to read it as a 2D image")
    (rows, columns), depth = _uniform(slices), len(slices)
    size = (columns, rows, depth)
    check_claim(size, slices[0].value_bytes, sum(os.path.getsize(s.file) for s in slices))
    slices, affine = _stacked(slices)

    def decode() -> np.ndarray:
        array = np.empty((depth, rows, columns), np.float32)
        for k, s in enumerate(slices):
            with opened(s.file, _reader_of) as header:
                values = header.decode()
                if values.shape != (rows, columns, 1):
                    raise Refused(f"has pixels of shape {values.shape}, where a series is grey: export it again")
                array[k] = values[..., 0]
        return array.transpose(2, 1, 0)[..., None]

    return Header(size, decode, check_spacing(np.linalg.norm(affine[:3, :3], axis=0)), check_affine(affine))


def _head(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(132)


def _reader_of(head: bytes) -> Reader:
    if not head:
        raise Refused("is empty: copy or export it again")
    return read_dicom


def _slice(file: str, header: Header) -> _Slice:
    assert header.tags is not None
    tags = header.tags
    text = lambda name: str(tags.get(name) or "")
    rescaled = "" if text("RescaleSlope") or tags.get("ModalityLUTSequence") else "not rescaled"
    values = (text("Modality"), text("RescaleType"), text("Units"), text("PhotometricInterpretation"), rescaled)
    place = {name: np.array(tags.get(name) or [], float) for name in _PLACE}
    value_bytes = int(tags.get("BitsAllocated") or 8) / 8
    return _Slice(file, header.size, text("SeriesInstanceUID"), " ".join(filter(None, values)), value_bytes, place)


def _uniform(slices: list[_Slice]) -> tuple[int, ...]:
    """The size of all slices, if size, values, spacing and orientation are those of one volume."""
    for s in slices:
        for name, n in _PLACE.items():
            if s.place[name].shape != (n,) or not np.isfinite(s.place[name]).all():
                problem = f"has no {name} of {n} numbers, so that its place in a volume is unknown: export it again"
                raise InputError(one_line(s.file, problem))
    size, values = (
        Counter(each).most_common(1)[0][0] for each in zip(*((s.size, s.values) for s in slices), strict=True)
    )
    spacing, orientation = (
        np.median([s.place[name] for s in slices], axis=0) for name in ("PixelSpacing", "ImageOrientationPatient")
    )
    for s in slices:
        own_spacing, own_orientation = s.place["PixelSpacing"], s.place["ImageOrientationPatient"]
        for what, own, usual, equal in (
            ("size", s.size, size, s.size == size),
            ("values", s.values, values, s.values == values),
            ("spacing", own_spacing, spacing, np.allclose(own_spacing, spacing, rtol=1e-3, atol=0)),
            ("orientation", own_orientation, orientation, np.allclose(own_orientation, orientation, atol=1e-3)),
        ):
            if not equal:
                problem = f"has the {what} {own} where most slices of its folder have {usual}: move it out"
                raise InputError(one_line(s.file, problem))
    return size


def _stacked(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices in the order of their positions, and the affine voxel (i, j, k) -> RAS mm."""
    row, column = slices[0].place["ImageOrientationPatient"].reshape(2, 3)  # the directions in which i and j grow
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise Refused(f"its orientation {(*row, *column)} is not of two perpendicular directions: export it again")
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)  # written with few decimals
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda s: float(s.place["ImagePositionPatient"] @ normal))
    positions = np.array([s.place["ImagePositionPatient"] for s in slices])
    at = positions @ normal
    gaps = np.diff(at)
    for before, after, mm, gap in zip(slices, slices[1:], at, gaps, strict=False):
        if gap < DOUBLED_MM:
            problem = f"lies at {mm:.2f} mm as {os.path.basename(before.file)} does: give each phase its own folder"
            raise InputError(one_line(after.file, problem))
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # of two, the smaller: a slice is missing in the larger
    worst = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[worst] - usual) > min(max(UNEVEN * usual, ROUNDING_MM), OFF_GRID_VOXELS * usual):
        what = "a slice is missing" if gaps[worst] > usual else "its slices lie unevenly"
        raise Refused(
            f"{what} between {at[worst]:.2f} and {at[worst + 1]:.2f} mm, {gaps[worst]:.2f} mm apart where most are "
            f"{usual:.2f}: copy the whole series again, or resample it to even slices and save it as NIfTI"
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    off_mm = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1).max()
    down_mm, across_mm = slices[0].place["PixelSpacing"]  # between rows, between columns
    if off_mm > OFF_GRID_VOXELS * min(down_mm, across_mm, usual):
        raise Refused(f"its slices lie up to {off_mm:.2f} mm off a straight line: resample them and save as NIfTI")
    affine = np.eye(4)
    affine[:3] = np.stack([row * across_mm, column * down_mm, step, positions[0]], axis=1)
    return slices, np.diag([-1, -1, 1, 1]) @ affine  # DICOM is left-posterior-superior
