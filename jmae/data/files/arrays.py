"""Readers of volumes and arrays: NIfTI, NRRD, .npy and .npz."""

import bz2
import gzip
import math
import zipfile
from collections.abc import Callable
from typing import IO, Any

import nibabel as nib
import nrrd
import numpy as np

from jmae.data.files.guard import RATIO, Header, Refused, check_affine, check_claim, check_spacing, read_values, take

MAX_HEADER = 2**18  # bytes of an NRRD header: fields are short, only comments are long
MAX_CHANNELS = 16  # more on the last axis of a 4D array means that the channels are not last

_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's code of the space unit: unknown, m, mm, um


def read_nifti(file: IO[bytes], length: int) -> Header:
    """A single 2D or 3D image, or 2 to 16 volumes on the fourth axis as channels. sform before qform as in nibabel, and
    no affine where neither has a code."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream: Any = gzip.GzipFile(fileobj=file) if packed else file
    head = take(stream, 540)
    second = head[4:8] in (b"n+2\0", b"ni2\0")
    magic = head[4:8] if second else head[344:348]
    if magic in (b"ni1\0", b"ni2\0"):
        raise Refused("is a NIfTI pair (.hdr and .img): save it as one .nii or .nii.gz file")
    if magic not in (b"n+1\0", b"n+2\0"):
        raise Refused("holds no NIfTI image: copy or export it again")
    if len(head) < (540 if second else 348):
        raise Refused("is truncated: copy or export it again")
    header = nib.Nifti2Header(head, check=False) if second else nib.Nifti1Header(head[:348], check=False)
    if header["sizeof_hdr"] != (540 if second else 348):
        raise Refused("its header is damaged: copy or export it again")

    shape = [int(n) for n in header["dim"][1 : 1 + max(int(header["dim"][0]), 0)]]
    code = int(header["datatype"])
    if code not in _NIFTI_TYPES:
        raise Refused(f"has the NIfTI data type {code} (colour, complex or unknown): save one real value a voxel")
    dtype = np.dtype(_NIFTI_TYPES[code]).newbyteorder(header.endianness)
    stored = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    if len(shape) == 5 and shape[3] == 1:  # a vector a voxel
        del shape[3]
    channels = shape.pop() if len(shape) == 4 and 1 < shape[-1] <= MAX_CHANNELS else 1
    check_claim(stored if channels == 1 else [*shape, channels], dtype.itemsize, length)
    if not 2 <= len(shape) <= 3:
        raise Refused(
            f"is {len(shape)}D with the size {tuple(shape)}, and up to {MAX_CHANNELS} volumes count as channels: "
            "save one time point a file, for example with `fslsplit`, and give channels as A.nii;B.nii"
        )
    offset = float(header["vox_offset"]) or (544.0 if second else 352.0)
    if not (540 if second else 348) <= offset <= RATIO * length:
        raise Refused(f"its header puts the data at byte {offset}: copy or export it again")
    if not packed and int(offset) + math.prod(shape) * channels * dtype.itemsize != length:
        raise Refused(
            f"its header claims the size {tuple(shape)}, which does not fit its {length} bytes: copy it again"
        )
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or (slope and not math.isfinite(intercept)):
        raise Refused(f"has the scale slope {slope} and intercept {intercept}: repair the header")
    if slope == 0:  # the standard's "not scaled"
        slope, intercept = 1.0, 0.0

    unit = _MM.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise Refused(f"has the unknown space unit {int(header['xyzt_units']) & 7}: repair the header")
    spacing = check_spacing(header["pixdim"][1 : 1 + len(shape)].astype(float) * unit)
    affine = None
    if header["sform_code"] > 0 or header["qform_code"] > 0:
        affine = header.get_sform() if header["sform_code"] > 0 else header.get_qform()
        affine = np.diag([unit, unit, unit, 1]) @ check_affine(affine)
        spacing = check_spacing(np.linalg.norm(affine[:3, : len(shape)], axis=0))

    def decode() -> np.ndarray:
        stream.seek(int(offset))
        values = read_values(stream, math.prod(shape) * channels, dtype, slope, intercept)
        return values.reshape(*shape, channels, order="F") if len(shape) == 3 else values.reshape(*shape[::-1], 1)

    return _in_rows(Header(tuple(shape), decode, spacing, affine, nifti=header))


def _in_rows(header: Header) -> Header:
    """The header of a 2D image of (x, y) geometry as (rows, columns) = (y, x); `decode` transposes the values."""
    if len(header.size) == 3:
        return header
    affine = None if header.affine is None else header.affine[:, [1, 0, 2, 3]]
    return header._replace(
        size=header.size[::-1], spacing=header.spacing and header.spacing[::-1], affine=affine, nifti=None
    )


_NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
_TO_RAS = {  # signs that turn an NRRD space into right-anterior-superior
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_NRRD_STREAMS: dict[str, Callable[[IO[bytes]], Any]] = {
    "raw": lambda file: file,
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
}


def read_nrrd(file: IO[bytes], length: int) -> Header:
    """2D or 3D with its data in the same file; an affine where space, directions and origin are all given."""
    head = file.read(MAX_HEADER)
    ends = [head.find(end) for end in (b"\n\n", b"\r\n\r\n") if end in head]
    if (min(ends) if ends else len(head)) >= MAX_HEADER - 4:
        raise Refused(f"has a header of more than {MAX_HEADER} bytes: save it again without its comments")
    file.seek(0)
    header = nrrd.read_header(file)
    encoding = {"gz": "gzip", "bz2": "bzip2"}.get(header["encoding"].lower(), header["encoding"].lower())
    shape = [int(n) for n in header["sizes"]]
    rank = len(shape)
    get = lambda *names: next((header[name] for name in names if name in header), None)
    if get("data file", "datafile") is not None:
        raise Refused("keeps its data in another file: save it as one .nrrd file")
    if encoding not in _NRRD_STREAMS or get("byte skip", "byteskip") or get("line skip", "lineskip"):
        raise Refused(f"has the encoding {encoding} or skips bytes: save it as raw or gzip NRRD")
    if header["type"] not in _NRRD_TYPES:
        raise Refused(f"has the NRRD type {header['type']}: save one real value a voxel")
    order: Any = {"little": "<", "big": ">"}.get(str(header.get("endian", "little" if "8" in header["type"] else "")))
    dtype = np.dtype(_NRRD_TYPES[header["type"]])
    if order is None and dtype.itemsize > 1:
        raise Refused("does not say little or big endian: repair the header")
    dtype = dtype.newbyteorder(order or "=")
    directions = header.get("space directions")
    directions = None if directions is None else np.asarray(directions, float)
    unclear = rank == 3 and directions is None and "kinds" not in header and min(shape[0], shape[-1]) <= 4
    kinds = {str(kind).lower() for kind in header.get("kinds", [])}
    if header["dimension"] != rank or rank not in (2, 3) or not kinds <= {"domain", "space", "???", "none"} or unclear:
        raise Refused(f"its axes {tuple(shape)} are not all in space: save one 2D or 3D channel a file")
    check_claim(shape, dtype.itemsize, length)
    start = file.tell()
    if encoding == "raw" and start + math.prod(shape) * dtype.itemsize != length:
        raise Refused(
            f"its header claims the size {tuple(shape)}, which does not fit its {length} bytes: copy it again"
        )

    units = header.get("space units") or header.get("units") or []
    if any(unit.lower() not in ("mm", "", "???") for unit in units):
        raise Refused(f"has its geometry in {', '.join(units)}: save it in mm")
    spacing, affine = None, None
    if directions is not None:
        if directions.ndim != 2 or len(directions) != rank or directions.shape[1] not in (2, 3):
            raise Refused("its space directions do not fit its axes: repair the header")
        spacing = check_spacing(np.linalg.norm(directions, axis=1))
        space, origin = str(header.get("space", "")).lower(), header.get("space origin")
        if space.endswith("time"):
            raise Refused("has an axis of time: save one time point a file")
        if rank == 3:
            affine = np.eye(4)
            affine[:3, :3] = directions.T
            affine[:3, 3] = 0 if origin is None else origin
            affine = np.diag([*_TO_RAS.get(space, (1, 1, 1)), 1.0]) @ check_affine(affine)
            affine = affine if space in _TO_RAS and origin is not None else None
    elif "spacings" in header and np.isfinite(header["spacings"]).any():
        spacing = check_spacing(header["spacings"])

    def decode() -> np.ndarray:
        file.seek(start)
        values = read_values(_NRRD_STREAMS[encoding](file), math.prod(shape), dtype)
        return (values.reshape(shape, order="F") if rank == 3 else values.reshape(shape[::-1]))[..., None]

    return _in_rows(Header(tuple(shape), decode, spacing, affine))


def read_npy(file: Any, length: int) -> Header:
    """2D, 2D with up to 4 channels last, 3D, or 3D with channels last; nothing is ever unpickled."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise Refused("is not a plain array: save it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise Refused(f"holds values of type {dtype}: save real numbers")
    size = shape[:-1] if len(shape) == 4 or (len(shape) == 3 and shape[-1] <= 4) else shape
    channels = shape[-1] if len(size) < len(shape) else 1
    if len(size) not in (2, 3) or channels > MAX_CHANNELS:
        raise Refused(f"has the shape {shape}: save 2D or 3D, channels last")
    check_claim((*size, channels) if len(size) == 3 else size, dtype.itemsize * channels, length)

    def decode() -> np.ndarray:
        values = read_values(file, math.prod(shape), dtype)
        return values.reshape(shape, order="F" if fortran else "C").reshape(*size, channels)

    return Header(size, decode, bits={"u1": 8, "u2": 16}.get(dtype.str[1:]))


def read_npz(file: IO[bytes], length: int) -> Header:
    names = (archive := zipfile.ZipFile(file)).namelist()
    if len(names) != 1 or not names[0].endswith(".npy"):
        raise Refused(f"holds {len(names)} arrays or files ({', '.join(names[:6])}): save one array a file")
    return read_npy(archive.open(names[0]), length)
