"""Image files to arrays on their own grid, and maps back onto that grid.

The format is told by content, never by name. A reader looks at the header first, so that a file which claims more
than it holds is refused before memory is asked for, and gzip, zip and PNG streams are read to their end, so that
their checksums are seen. Whatever is wrong becomes one `InputError` of the form "PATH: what: remedy".
"""

import bz2
import contextlib
import gzip
import itertools
import logging
import math
import os
import stat
import threading
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.filereader
import pydicom.pixels
import tifffile
from PIL import Image as pillow
from pydicom import uid

from jmae.errors import InputError

MAX_PIXELS = 2**27  # of a 2D image: the largest radiographs have 2**25
MAX_VOXELS = 2**29  # of a volume: 1024 x 1024 x 512, 2 GiB as float32
MAX_CHANNELS = 16  # more on the last axis of a 4D array means that the channels are not last
RATIO = 4096  # no file packs real data tighter; the bound of deflate is 1032
HARMLESS_BYTES = 2**26  # claims below this are not worth a ratio check
BLOCK = 2**20  # values per step of a streamed read
OFF_GRID_VOXELS = 0.1  # two grids are one if no corner moves by more than this
UNEVEN = 0.01  # share of the slice distance by which the slices of a series may lie unevenly
ROUNDING_MM = 0.02  # or this, where it is more: scanners write positions with two decimals
DOUBLED_MM = 0.001  # slices closer than this are one slice twice

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it logs is checked here and raised


class Image(NamedTuple):
    """One case as stored.

    `array` is float32, C-contiguous, `(*size, channels)`: stored values after DICOM rescale, NIfTI scaling and the
    inversion of MONOCHROME1 and TIFF white-is-zero. 2D images are (rows, columns), also those from NIfTI and NRRD;
    volumes keep the file's own (i, j, k), a DICOM series is (columns, rows, slices). NaN and Inf are kept; a file
    without one finite value is refused.
    """

    array: np.ndarray
    spacing: tuple[float, ...] | None  # mm per axis of `size`; for projection DICOM at the detector
    affine: np.ndarray | None  # (4, 4) voxel -> RAS mm; None where the file tells no position, never made up
    bits: int | None  # 8 or 16 where the values fill that unsigned range: PNG, JPEG, TIFF, integer arrays
    header: nib.Nifti1Header | None = None  # of a NIfTI input: a map takes its geometry from it, code by code


class OffGrid(InputError):
    """Two files of a case lie on different grids."""


class _Refused(Exception):
    """What is wrong with the file at hand, "what: remedy"; `_opened` puts the path before it."""


class _Found(NamedTuple):
    """What a header tells; `load` reads the values, (*size, channels), any real dtype."""

    size: tuple[int, ...]
    load: Callable[[], np.ndarray]
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None
    bits: int | None = None
    header: nib.Nifti1Header | None = None
    lossy: bool = False
    tags: pydicom.Dataset | None = None  # of a DICOM file


def read_image(source: str | os.PathLike | Sequence[str | os.PathLike]) -> Image:
    """Reads one file or folder of a DICOM series, or several as channels in order, which must lie on one grid:
    the first one's, to whose axes others are `turned`.

    Raises:
      InputError: "PATH: what: remedy", for every file that cannot be read without doubt.
    """
    paths = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not paths:
        raise InputError("image: no file given: name at least one")
    images = [_read(path)[0] for path in paths]
    images = [images[0], *(turned(image, images[0]) for image in images[1:])]
    for path, image in zip(paths[1:], images[1:], strict=True):
        if problem := off_grid(image, images[0]):
            raise OffGrid(_line(path, f"{problem} {paths[0]}: resample it, or set data.join=resample"))
    placed = next((image for image in images if image.affine is not None), images[0])
    array = images[0].array if len(images) == 1 else np.concatenate([i.array for i in images], axis=-1)
    bits = {image.bits for image in images}
    return placed._replace(array=array, bits=bits.pop() if len(bits) == 1 else None)


def read_mask(path: str | os.PathLike, like: Image | None = None) -> np.ndarray:
    """Reads a mask, bool `(*size)`: True where any channel is above 0 (alpha is not a channel).

    With `like`, the mask must lie on that image's grid, to whose axes it is `turned`. A JPEG whose values are
    not all 0 or 255 is refused: its lesions have no edge, for compression leaves small values around them.
    """
    image, lossy = _read(path)
    if lossy and not np.isin(image.array, (0, 255)).all():
        raise InputError(_line(path, "a JPEG mask without sharp edges: cut it at 127 and save it as PNG"))
    image = image if like is None else turned(image, like)
    if like is not None and (problem := off_grid(image, like)):
        raise OffGrid(_line(path, f"{problem} its image: save the mask on the image's grid"))
    return np.any(image.array > 0, axis=-1)


def image_size(path: str | os.PathLike) -> tuple[int, ...]:
    """The size of `read_image(path).array` without channels, from the header alone."""
    with _opened(path) as found:
        return found.size


def write_map(path_without_suffix: str | os.PathLike, array: np.ndarray, like: Image) -> Path:
    """Writes a float32 map `(*size[, c])` on the grid of `like`: .nii.gz for volumes, 32-bit .tif for 2D.

    Several channels are the fourth axis of the NIfTI file, or the TIFF's samples; one channel is no axis.
    A volume from NIfTI keeps sform, qform, their codes and units; from another file it gets the affine as scanner
    coordinates; without an affine both codes stay 0 ("position unknown"). The file has its name only when whole.

    Raises:
      InputError: the file cannot be written.
    """
    size = like.array.shape[:-1]
    if array.shape not in (size, (*size, array.shape[-1])):
        raise ValueError(f"map of shape {array.shape} for an image of size {size}")
    array = np.asarray(array, np.float32)
    array = array[..., 0] if array.shape == (*size, 1) else array
    path = Path(f"{os.fspath(path_without_suffix)}{'.tif' if len(size) == 2 else '.nii.gz'}")
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        try:
            with open(part, "xb") as file:
                if len(size) == 2:
                    planes = "contig" if array.ndim == 3 else None
                    tifffile.imwrite(file, array, photometric="minisblack", planarconfig=planes, metadata=None)
                else:  # neither name nor time in the gzip header: equal maps are equal files
                    with gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as packed:
                        _nifti_map(array, like).to_stream(packed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            _line(path, f"not written ({error.strerror or error}): free space or choose another folder")
        ) from error
    return path


def _nifti_map(array: np.ndarray, like: Image) -> nib.Nifti1Image:
    kind = nib.Nifti1Image if max(array.shape) < 2**15 else nib.Nifti2Image
    header = kind.header_class()
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    if like.header is not None:
        srow, quatern, offset = "srow_x srow_y srow_z", "quatern_b quatern_c quatern_d", "qoffset_x qoffset_y qoffset_z"
        for field in f"pixdim xyzt_units sform_code qform_code {srow} {quatern} {offset}".split():
            header[field] = like.header[field]
        if array.ndim == 4:
            header["pixdim"][4] = 1  # of channels; the source's may be a time
    elif like.affine is not None:
        header.set_sform(like.affine, code=1)
        header.set_qform(like.affine, code=1)
        if not np.allclose(header.get_qform(), like.affine, atol=1e-3):
            header.set_qform(None, code=0)  # a quaternion holds no shear
    elif like.spacing is not None:
        header.set_zooms((*like.spacing, *(1,) * (array.ndim - 3)))
    return kind(array, None, header)


# What all formats share


def _line(path: str | os.PathLike, problem: str) -> str:
    return f"{os.fspath(path)}: {problem}".translate({10: " ", 13: " "})


def _read(path: str | os.PathLike) -> tuple[Image, bool]:
    """One file, and whether its compression lost something."""
    with _opened(path) as found:
        with np.errstate(over="raise", invalid="ignore"):  # a double beyond float32 is an error, not an Inf
            array = np.ascontiguousarray(found.load(), dtype=np.float32)
        if array.shape[:-1] != found.size:
            raise _Refused(f"its header says {found.size} but its data are {array.shape[:-1]}: export it again")
        if not np.isfinite(array).any():
            raise _Refused("has no finite value: export it again, or leave the case out")
        return Image(array, found.spacing, found.affine, found.bits, found.header), found.lossy


def off_grid(image: Image, other: Image) -> str | None:
    """How the grid of `image` differs from that of `other`, which the sentence goes on with; None if they are one."""
    size, expected = image.array.shape[:-1], other.array.shape[:-1]
    if size != expected:
        return f"size {size} differs from {expected} of"
    if image.affine is not None and other.affine is not None:
        ends = [(0, n - 1) for n in (*size, 1)[:3]]
        corners = np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
        moved_mm = np.linalg.norm(((image.affine - other.affine) @ corners)[:3], axis=0).max()
        if moved_mm > OFF_GRID_VOXELS * min(other.spacing or (1,)):
            return f"its corners lie up to {moved_mm:.3g} mm away from those of"
    elif image.spacing and other.spacing and not np.allclose(image.spacing, other.spacing, rtol=0.01):
        return f"spacing {image.spacing} differs from {other.spacing} of"
    return None


def turned(image: Image, like: Image) -> Image:
    """A volume with its axes in the order and directions of another, where their affines say that these are the same
    lines: as a DICOM series and a NIfTI of one scan store them. No value changes. Else the volume as it is."""
    if image.affine is None or like.affine is None or image.array.ndim != 4 or like.array.ndim != 4:
        return image
    steps = np.linalg.inv(like.affine)[:3, :3] @ image.affine[:3, :3]  # voxels of `like` per voxel of `image`
    order = np.abs(steps).argmax(1)  # the image's axis along each axis of `like`
    signs = np.sign(steps[range(3), order])
    if sorted(order) != [0, 1, 2] or np.abs(steps - np.eye(3)[order] * signs[:, None]).max() > 0.1:
        return image
    if (order == np.arange(3)).all() and (signs > 0).all():
        return image
    flips = tuple(slice(None, None, int(sign)) for sign in signs)
    array = np.ascontiguousarray(image.array.transpose(*order, 3)[flips])
    ends = np.where(signs < 0, np.array(array.shape[:3]) - 1, 0)
    change = np.zeros((4, 4))
    change[order, range(3)], change[order, 3], change[3, 3] = signs, ends, 1
    spacing = image.spacing and tuple(image.spacing[axis] for axis in order)
    return image._replace(array=array, affine=image.affine @ change, spacing=spacing, header=None)


_reading = threading.Lock()
_readers: list[Any] = []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of the decoders while at least one thread reads.

    What matters of them is checked here and raised. `catch_warnings` restores a global list: entered from several
    threads it would leave the filters of one to the others, so the first enters and the last leaves.
    """
    with _reading:
        if not _readers:
            filters = warnings.catch_warnings()
            filters.__enter__()
            warnings.filterwarnings("ignore", module=r"(pydicom|PIL|tifffile|nibabel|nrrd|openjpeg|libjpeg)\b")
            logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it reports what is raised as well
            _readers.append(filters)
        else:
            _readers.append(_readers[0])
    try:
        yield
    finally:
        with _reading:
            filters = _readers.pop()
            if not _readers:
                filters.__exit__(None, None, None)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[_Found]:
    """The header of a file or series; every exception up to the end of the block becomes an `InputError`."""
    head = b""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            yield _series(os.fspath(path))
            return
        if not stat.S_ISREG(mode):
            raise _Refused("is not a regular file: name an image file")
        with _quiet(), open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(2**16)
            file.seek(0)
            yield _format(head)(file, length)
    except InputError:
        raise
    except _Refused as refused:
        raise InputError(_line(path, _as_text(head) or str(refused))) from None
    except FileNotFoundError as error:
        raise InputError(_line(path, "not found: check the path")) from error
    except PermissionError as error:
        where = error.filename or path  # in a folder, the file
        raise InputError(_line(where, "may not be read: check its permissions")) from error
    except Exception as error:  # decoders raise anything on damaged files
        why = str(error).strip().split("\n")[0] or type(error).__name__
        problem = _as_text(head) or f"not readable ({why}): copy or export it again"
        raise InputError(_line(path, problem)) from error


def _as_text(head: bytes) -> str | None:
    """A binary file that a tool copied as text has U+FFFD wherever a byte was above 127."""
    if head.count(b"\xef\xbf\xbd") > 8:
        return "was copied as text, which destroyed its values: copy the original again in binary mode"
    return None


def _format(head: bytes) -> Callable[[IO[bytes], int], _Found]:
    if not head:
        raise _Refused("is empty: copy or export it again")
    if _is_dicom(head):
        return _dicom
    for magic, reader in (
        (b"\x89PNG\r\n\x1a\n", _png),
        (b"\xff\xd8\xff", _jpeg),
        (b"II*\0", _tiff),
        (b"MM\0*", _tiff),
        (b"II+\0", _tiff),
        (b"MM\0+", _tiff),
        (b"NRRD", _nrrd),
        (b"\x93NUMPY", _npy),
        (b"PK\x03\x04", _npz),
        (b"\x1f\x8b", _nifti),
    ):
        if head.startswith(magic):
            return reader
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return _nifti
    if head.startswith(b"version https://git-lfs"):
        raise _Refused("is a Git LFS pointer, not the image: run `git lfs pull`")
    raise _Refused("not a format that is read here: convert it to NIfTI, DICOM, PNG, JPEG, TIFF, NRRD, .npy or .npz")


def _is_dicom(head: bytes) -> bool:
    """Before all other formats: the preamble may hold anything, and is never looked at; or there is none."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0")


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a regular file begins as DICOM does; False where it cannot be read."""
    try:
        return os.path.isfile(path) and _is_dicom(_head(os.fspath(path)))
    except OSError:
        return False


def _check_claim(size: Sequence[int], value_bytes: float, length: int) -> None:
    """Refuses a header that claims more than a file of `length` bytes can hold or memory should."""
    if any(n < 1 for n in size):
        raise _Refused(f"its header claims the size {tuple(size)}: copy or export it again")
    limit = MAX_PIXELS if len(size) == 2 else MAX_VOXELS
    if math.prod(size) > limit:
        raise _Refused(f"size {tuple(size)} is beyond the limit of {limit} values: crop or resample it")
    if math.prod(size) * value_bytes > max(HARMLESS_BYTES, RATIO * length):
        raise _Refused(f"its header claims the size {tuple(size)}, its {length} bytes cannot hold that: copy it again")


def _check_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(s) for s in spacing)
    if not all(math.isfinite(s) and s > 0 for s in values):
        raise _Refused(f"spacing {values} is not positive and finite: repair the header")
    return values


def _check_affine(affine: np.ndarray) -> np.ndarray:
    """(4, 4) float64 as given, if it maps the grid one to one."""
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not columns.all():
        raise _Refused("its affine has values that are not finite, or an axis of length 0: repair the header")
    if abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-6:
        raise _Refused("its affine is singular: repair the header")
    return np.asarray(affine, np.float64)


def _take(stream: Any, n: int) -> bytes:
    """Up to `n` bytes; fewer only at the end of the stream, where its checksum has then been compared."""
    parts = []
    while n > 0 and (part := stream.read(n)):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _stream(stream: Any, count: int, dtype: np.dtype, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """Exactly `count` values up to the stream's end, scaled in float64, as (count,) float32.

    Memory is touched only as data arrive, so a claim that the data do not fulfil costs nothing.
    """
    values = np.empty(count, np.float32)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        block = _take(stream, (stop - start) * dtype.itemsize)
        if len(block) < (stop - start) * dtype.itemsize:
            raise _Refused("is truncated: copy or export it again")
        read = np.frombuffer(block, dtype)
        values[start:stop] = read if (slope, intercept) == (1, 0) else read * np.float64(slope) + intercept
    if _take(stream, 1):
        raise _Refused("holds more data than its header claims: copy or export it again")
    return values


def _one_grey(array: np.ndarray) -> np.ndarray:
    """(*size, channels) -> one channel if it is RGB with equal channels."""
    equal = array.shape[-1] == 3 and (array[..., 1:] == array[..., :1]).all()
    return array[..., :1] if equal else array


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the EXIF / TIFF orientation 1 to 8 of (rows, columns, channels)."""
    array = array.swapaxes(0, 1) if orientation > 4 else array
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::rows, ::columns]


# Pictures


def _png(file: IO[bytes], length: int) -> _Found:
    head = file.read(29)
    width, height = np.frombuffer(head[16:24], ">u4").tolist()
    depth, colour = head[24], head[25]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 4)
    _check_claim((height, width), channels * depth / 8, length)

    def load() -> np.ndarray:
        file.seek(0)
        with pillow.open(file, formats=("PNG",)) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise _Refused("is an animation: save one frame")
            image.verify()  # the checksums, which decoding alone does not compare
        _check_rows(file, width, height, channels * depth, interlaced=bool(head[28]))
        file.seek(0)
        if depth == 16:  # Pillow keeps 16 bits of grey only
            array = np.atleast_3d(np.asarray(imagecodecs.png_decode(file.read())))
        else:
            array = _decoded(file, "PNG")
        return _one_grey(array[..., : 3 if colour in (2, 3, 6) else 1])

    return _Found((height, width), load, bits=16 if depth == 16 else 8)


def _check_rows(file: IO[bytes], width: int, height: int, pixel_bits: int, *, interlaced: bool) -> None:
    """Refuses a PNG whose data are not those of its header's size: decoders fill up what is missing in silence."""
    adam7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, dx, y, dy in adam7 if x < width and y < height]
    claim = sum(h * (1 + -(-w * pixel_bits // 8)) for w, h in (passes if interlaced else [(width, height)]))
    file.seek(8)
    unpack, found = zlib.decompressobj(), 0
    while len(chunk := file.read(8)) == 8 and found <= claim:
        data = file.read(int.from_bytes(chunk[:4], "big"))
        file.seek(4, os.SEEK_CUR)
        while chunk[4:] == b"IDAT" and data and found <= claim:
            found += len(unpack.decompress(data, BLOCK))
            data = unpack.unconsumed_tail
    if found != claim:
        raise _Refused(f"its header claims the size {(height, width)}, which its data are not: copy or export it again")


def _jpeg(file: IO[bytes], length: int) -> _Found:
    with pillow.open(file, formats=("JPEG",)) as image:
        width, height = image.size
        orientation = image.getexif().get(0x0112, 1)
    if orientation not in range(1, 9):
        orientation = 1  # 0 is written for "unknown"
    _check_claim((height, width), 3, length)

    def load() -> np.ndarray:
        file.seek(0)
        return _upright(_one_grey(_decoded(file, "JPEG")), orientation)

    return _Found((width, height) if orientation > 4 else (height, width), load, bits=8, lossy=True)


def _decoded(file: IO[bytes], kind: str) -> np.ndarray:
    """(rows, columns, 1 or 3) uint8 without alpha; a palette as its colours, CMYK as RGB, 1 bit as 0 and 255."""
    with pillow.open(file, formats=(kind,)) as image:
        if image.mode in ("1", "L", "LA"):
            return np.asarray(image.convert("LA"))[..., :1]
        if image.mode in ("P", "RGB", "RGBA"):
            return np.asarray(image.convert("RGBA"))[..., :3]
        if image.mode == "CMYK":
            return np.asarray(image.convert("RGB"))
        raise _Refused(f"has the colour mode {image.mode}: save it as grey or RGB")


def _tiff(file: IO[bytes], length: int) -> _Found:
    page: Any
    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.pages.first
        axes, photometric = series.axes, int(page.photometric)
        pages = [p for p in series.pages if p is not None]
        orientation = page.tags.valueof(274, 1)
        if not axes:
            raise _Refused("is truncated or damaged: copy or export it again")
        if len(tiff.series) > 1 or not set(axes) <= set("ZCSYX") or len(pages) != len(series.pages):
            raise _Refused(
                f"holds {len(tiff.pages)} pages and does not say that they are a volume: save a volume as NIfTI, "
                "or one picture a file"
            )
        size = tuple(series.shape[axes.index(axis)] for axis in "ZYX" if axis in axes)
        channels = math.prod(series.shape) // math.prod(size)
        kind, depth = np.dtype(series.dtype).kind, page.bitspersample
        if len(size) < 2 or kind not in "biuf" or orientation not in (range(1, 9) if len(size) == 2 else (1,)):
            raise _Refused(f"a TIFF of axes {axes} and type {series.dtype}: save it as a plain picture")
        if photometric not in (0, 1, 2, 3) and not (photometric == 6 and page.compression in (6, 7)):
            raise _Refused(f"has the TIFF colour space {page.photometric!s}: save it as grey or RGB")
        _check_claim(size, channels * np.dtype(series.dtype).itemsize, length)
        for p in pages:  # tifffile fills what is missing with zeros
            stored = [(at, n) for at, n in zip(p.dataoffsets, p.databytecounts, strict=True) if at > 0 and n > 0]
            if len(stored) != math.prod(page.chunked) or any(at + n > length for at, n in stored):
                raise _Refused("is truncated or damaged: copy or export it again")

        colours = page.colormap if photometric == 3 else None
        alpha = [int(extra) in (1, 2) for extra in page.extrasamples]

    def load() -> np.ndarray:
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            array = tiff.series[0].asarray(maxworkers=1)
        if photometric == 0:  # white is zero
            if kind not in "bu":
                raise _Refused("is white-is-zero with signed or real values: save it with black as zero")
            array = ~array if kind == "b" else (2**depth - 1) - array
        if kind == "b":
            array = array * np.uint8(255)
        order = [axes.index(axis) for axis in "ZYXCS" if axis in axes]
        array = array.transpose(order).reshape(*size, channels)
        if colours is not None:
            array = np.moveaxis(colours[:, array[..., 0]] >> 8, 0, -1)
        array = array[..., : channels - len(alpha)] if alpha and all(alpha) and "C" not in axes else array
        array = _one_grey(array) if photometric in (2, 3, 6) else array
        return _upright(array, orientation) if array.ndim == 3 else array

    full = (kind == "u" and depth in (8, 16)) or kind == "b" or colours is not None
    bits = (16 if depth == 16 and colours is None else 8) if full else None
    return _Found(size[::-1] if orientation > 4 else size, load, bits=bits, lossy=page.compression in (6, 7))


# DICOM


def _dicom(file: IO[bytes], length: int) -> _Found:
    """A single-frame file. MONOCHROME1 is inverted in its stored range, then slope and intercept are applied."""
    if file.read(132)[128:] == b"DICM" and (
        pydicom.filereader.read_file_meta_info(file.name).get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
    ):  # pydicom inflates the whole file, whatever its size, before it looks inside
        raise _Refused("is a deflated DICOM: convert it, for example with `dcmconv +te`")
    file.seek(0)
    header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
    if not header.get("Rows") or not header.get("Columns"):
        raise _Refused("is a DICOM file without an image: leave it out")
    size = (int(header.Rows), int(header.Columns))
    samples = int(header.get("SamplesPerPixel") or 1)
    if int(header.get("NumberOfFrames") or 1) > 1 or "SharedFunctionalGroupsSequence" in header:
        raise _Refused("is a multi-frame DICOM: convert it to NIfTI, for example with dcm2niix")
    _check_claim(size, samples * int(header.get("BitsAllocated") or 8) / 8, length)
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")

    def load() -> np.ndarray:
        file.seek(0)
        return _dicom_values(pydicom.dcmread(file, force=True))

    return _Found(size, load, spacing=_check_spacing(spacing) if spacing else None, tags=header)


def _dicom_values(dataset: pydicom.Dataset) -> np.ndarray:
    name = next((n for n in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if n in dataset), None)
    if name is None:
        raise _Refused("is a DICOM file without pixel data: name an image file")
    if "TransferSyntaxUID" not in dataset.file_meta:
        # Only uncompressed pixels can be told from their length, which is compared below.
        implicit, little = dataset.original_encoding
        native = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = native if little else uid.ExplicitVRBigEndian
        if dataset[name].is_undefined_length:
            raise _Refused("is compressed and names no transfer syntax: export it again")
    shape = (int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1))
    colours = str(dataset.get("PhotometricInterpretation", "none")).strip()
    encapsulated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if not encapsulated and colours != "YBR_FULL_422":
        row_bytes = shape[1] * shape[2] * int(dataset.BitsAllocated) / 8
        if len(dataset[name].value) - shape[0] * row_bytes >= max(row_bytes, 2):
            raise _Refused("holds more pixels than its header claims: export it again")
    if encapsulated:
        _check_codestream(pydicom.encaps.get_frame(dataset[name].value, 0, number_of_frames=1), shape)
    array = pydicom.pixels.pixel_array(dataset, correct_unused_bits=False)
    if array.shape != (shape if shape[2] > 1 else shape[:2]):
        raise _Refused(f"its header says {shape} but its pixels are {array.shape}: export it again")

    if colours == "PALETTE COLOR":
        return _one_grey(pydicom.pixels.apply_color_lut(array, dataset)[..., :3])
    if colours in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT") and shape[2] == 3:
        return _one_grey(array)
    if colours not in ("MONOCHROME1", "MONOCHROME2") or shape[2] != 1:
        raise _Refused(f"has the DICOM colour space {colours}: export it as MONOCHROME2 or RGB")
    if array.dtype.kind in "iu":
        bits, signed, array = int(dataset.BitsStored), array.dtype.kind == "i", array.astype(np.int64)
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if signed and array.min() >= 0 and array.max() < 2**bits:
            array = np.where(array > highest, array - 2**bits, array)  # the bits above may lack the sign
        if array.min() < lowest or array.max() > highest:
            raise _Refused(f"has values beyond its {bits} stored bits, as an overlay inside them: export it again")
        if colours == "MONOCHROME1":
            array = lowest + highest - array
    elif colours == "MONOCHROME1":
        raise _Refused("is MONOCHROME1 with real values, whose range is unknown: export it as MONOCHROME2")
    if dataset.get("ModalityLUTSequence"):
        return pydicom.pixels.apply_modality_lut(array, dataset)[..., None]
    slope = 1.0 if dataset.get("RescaleSlope") is None else float(dataset.RescaleSlope)
    intercept = 0.0 if dataset.get("RescaleIntercept") is None else float(dataset.RescaleIntercept)
    if not math.isfinite(slope * intercept) or slope == 0:
        raise _Refused(f"has the rescale slope {slope} and intercept {intercept}: repair the header")
    return (array * slope + intercept)[..., None]


def _check_codestream(frame: bytes, shape: tuple[int, int, int]) -> None:
    """Refuses a JPEG frame of another shape: decoders fill rows x columns from it in whatever order it has."""
    if frame.startswith(b"\xff\x4f\xff\x51"):  # JPEG 2000: extent and offset of its reference grid
        right, bottom, left, top = np.frombuffer(frame[8:24], ">u4").tolist()
        if (bottom - top, right - left) != shape[:2]:
            raise _Refused(f"its header says {shape[:2]}, its JPEG 2000 otherwise: export it again")
    at = 2
    while frame.startswith(b"\xff\xd8") and at + 9 < len(frame) and frame[at] == 0xFF:
        marker, step = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:  # SOF, or JPEG-LS
            size = (int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big"))
            if size != shape[:2]:
                raise _Refused(f"its header says {shape[:2]} but its compressed pixels are {size}: export it again")
            return
        at += 2 + step if marker != 0xFF else 1


# DICOM series

_PLACE = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


class _Slice(NamedTuple):
    file: str
    size: tuple[int, ...]  # rows, columns
    series: str
    values: str  # modality, units, colour space, whether they are rescaled
    value_bytes: float
    place: dict[str, np.ndarray]  # of the tags of `_PLACE`, as far as they are there


def _series(folder: str) -> _Found:
    """The single-frame DICOM files of one series, alone in a folder, as a volume (columns, rows, slices).

    Slices are ordered by their position along the normal, row direction x column direction, along which k grows; never
    by name or InstanceNumber. The affine is that of the positions: sheared where the gantry was tilted. DICOMDIR and
    hidden files are passed over.
    """
    slices, others = [], []
    for name in sorted(os.listdir(folder)):
        file = os.path.join(folder, name)
        if name.startswith(".") or name == "DICOMDIR":
            continue
        if not os.path.isfile(file) or ((head := _head(file)) and not _is_dicom(head)):
            others.append(file)
            continue
        with _opened(file) as found:
            slices.append(_slice(file, found))
    if not slices:
        raise _Refused("is a folder without a DICOM file: name a file, or the folder of one DICOM series")
    if others:
        more = f", like {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(_line(others[0], f"is no DICOM file, but in the folder of a series{more}: move it out"))
    if len(series := {s.series for s in slices if s.series}) > 1:
        raise _Refused(f"holds {len(series)} DICOM series: give each a folder of its own")
    if len(slices) == 1:
        raise _Refused("holds a single slice, which is no volume: name the file to read it as a 2D image")
    (rows, columns), depth = _uniform(slices), len(slices)
    size = (columns, rows, depth)
    _check_claim(size, slices[0].value_bytes, sum(os.path.getsize(s.file) for s in slices))
    slices, affine = _stacked(slices)

    def load() -> np.ndarray:
        array = np.empty((depth, rows, columns), np.float32)
        for k, s in enumerate(slices):
            with _opened(s.file) as found:
                values = found.load()
                if values.shape != (rows, columns, 1):
                    raise _Refused(f"has pixels of shape {values.shape}, where a series is grey: export it again")
                array[k] = values[..., 0]
        return array.transpose(2, 1, 0)[..., None]

    return _Found(size, load, _check_spacing(np.linalg.norm(affine[:3, :3], axis=0)), _check_affine(affine))


def _head(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(132)


def _slice(file: str, found: _Found) -> _Slice:
    assert found.tags is not None
    tags = found.tags
    text = lambda name: str(tags.get(name) or "")
    rescaled = "" if text("RescaleSlope") or tags.get("ModalityLUTSequence") else "not rescaled"
    values = (text("Modality"), text("RescaleType"), text("Units"), text("PhotometricInterpretation"), rescaled)
    place = {name: np.array(tags.get(name) or [], float) for name in _PLACE}
    value_bytes = int(tags.get("BitsAllocated") or 8) / 8
    return _Slice(file, found.size, text("SeriesInstanceUID"), " ".join(filter(None, values)), value_bytes, place)


def _uniform(slices: list[_Slice]) -> tuple[int, ...]:
    """The size of all slices, if size, values, spacing and orientation are those of one volume."""
    for s in slices:
        for name, n in _PLACE.items():
            if s.place[name].shape != (n,) or not np.isfinite(s.place[name]).all():
                problem = f"has no {name} of {n} numbers, so that its place in a volume is unknown: export it again"
                raise InputError(_line(s.file, problem))
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
                raise InputError(_line(s.file, problem))
    return size


def _stacked(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices in the order of their positions, and the affine voxel (i, j, k) -> RAS mm."""
    row, column = slices[0].place["ImageOrientationPatient"].reshape(2, 3)  # the directions in which i and j grow
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise _Refused(f"its orientation {(*row, *column)} is not of two perpendicular directions: export it again")
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)  # written with few decimals
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda s: float(s.place["ImagePositionPatient"] @ normal))
    positions = np.array([s.place["ImagePositionPatient"] for s in slices])
    at = positions @ normal
    gaps = np.diff(at)
    for before, after, mm, gap in zip(slices, slices[1:], at, gaps, strict=False):
        if gap < DOUBLED_MM:
            problem = f"lies at {mm:.2f} mm as {os.path.basename(before.file)} does: give each phase its own folder"
            raise InputError(_line(after.file, problem))
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # of two distances the smaller: the other misses a slice
    worst = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[worst] - usual) > min(max(UNEVEN * usual, ROUNDING_MM), OFF_GRID_VOXELS * usual):
        what = "a slice is missing" if gaps[worst] > usual else "its slices lie unevenly"
        raise _Refused(
            f"{what} between {at[worst]:.2f} and {at[worst + 1]:.2f} mm, {gaps[worst]:.2f} mm apart where most are "
            f"{usual:.2f}: copy the whole series again, or resample it to even slices and save it as NIfTI"
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    off_mm = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1).max()
    down_mm, across_mm = slices[0].place["PixelSpacing"]  # between rows, between columns
    if off_mm > OFF_GRID_VOXELS * min(down_mm, across_mm, usual):
        raise _Refused(f"its slices lie up to {off_mm:.2f} mm off a straight line: resample them and save as NIfTI")
    affine = np.eye(4)
    affine[:3] = np.stack([row * across_mm, column * down_mm, step, positions[0]], axis=1)
    return slices, np.diag([-1, -1, 1, 1]) @ affine  # DICOM is left-posterior-superior


# Volumes and arrays

_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's code of the space unit: unknown, m, mm, um


def _nifti(file: IO[bytes], length: int) -> _Found:
    """A single 2D or 3D image; sform before qform as in nibabel, no affine where neither has a code."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream: Any = gzip.GzipFile(fileobj=file) if packed else file
    head = _take(stream, 540)
    second = head[4:8] in (b"n+2\0", b"ni2\0")
    magic = head[4:8] if second else head[344:348]
    if magic in (b"ni1\0", b"ni2\0"):
        raise _Refused("is a NIfTI pair (.hdr and .img): save it as one .nii or .nii.gz file")
    if magic not in (b"n+1\0", b"n+2\0"):
        raise _Refused("holds no NIfTI image: copy or export it again")
    if len(head) < (540 if second else 348):
        raise _Refused("is truncated: copy or export it again")
    header = nib.Nifti2Header(head, check=False) if second else nib.Nifti1Header(head[:348], check=False)
    if header["sizeof_hdr"] != (540 if second else 348):
        raise _Refused("its header is damaged: copy or export it again")

    shape = [int(n) for n in header["dim"][1 : 1 + max(int(header["dim"][0]), 0)]]
    code = int(header["datatype"])
    if code not in _NIFTI_TYPES:
        raise _Refused(f"has the NIfTI data type {code} (colour, complex or unknown): save one real value a voxel")
    dtype = np.dtype(_NIFTI_TYPES[code]).newbyteorder(header.endianness)
    stored = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    _check_claim(stored, dtype.itemsize, length)
    if not 2 <= len(shape) <= 3:
        raise _Refused(
            f"is {len(shape)}D with the size {tuple(shape)}: save one volume a file, and give channels as A.nii;B.nii"
        )
    offset = float(header["vox_offset"]) or (544.0 if second else 352.0)
    if not (540 if second else 348) <= offset <= RATIO * length:
        raise _Refused(f"its header puts the data at byte {offset}: copy or export it again")
    if not packed and int(offset) + math.prod(shape) * dtype.itemsize != length:
        raise _Refused(f"its header claims the size {tuple(shape)}, which its {length} bytes are not: copy it again")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or (slope and not math.isfinite(intercept)):
        raise _Refused(f"has the scale slope {slope} and intercept {intercept}: repair the header")
    if slope == 0:  # the standard's "not scaled"
        slope, intercept = 1.0, 0.0

    unit = _MM.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise _Refused(f"has the unknown space unit {int(header['xyzt_units']) & 7}: repair the header")
    spacing = _check_spacing(header["pixdim"][1 : 1 + len(shape)].astype(float) * unit)
    affine = None
    if header["sform_code"] > 0 or header["qform_code"] > 0:
        affine = header.get_sform() if header["sform_code"] > 0 else header.get_qform()
        affine = np.diag([unit, unit, unit, 1]) @ _check_affine(affine)
        spacing = tuple(np.linalg.norm(affine[:3, : len(shape)], axis=0).tolist())

    def load() -> np.ndarray:
        stream.seek(int(offset))
        values = _stream(stream, math.prod(shape), dtype, slope, intercept)
        return (values.reshape(shape, order="F") if len(shape) == 3 else values.reshape(shape[::-1]))[..., None]

    return _in_rows(_Found(tuple(shape), load, spacing, affine, header=header))


def _in_rows(found: _Found) -> _Found:
    """A 2D image of (x, y) geometry as (rows, columns) = (y, x); `load` has done so already."""
    if len(found.size) == 3:
        return found
    affine = None if found.affine is None else found.affine[:, [1, 0, 2, 3]]
    return found._replace(
        size=found.size[::-1], spacing=found.spacing and found.spacing[::-1], affine=affine, header=None
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


def _nrrd(file: IO[bytes], length: int) -> _Found:
    """2D or 3D with its data in the same file; an affine where space, directions and origin are all given."""
    header = nrrd.read_header(file)
    encoding = {"gz": "gzip", "bz2": "bzip2"}.get(header["encoding"].lower(), header["encoding"].lower())
    shape = [int(n) for n in header["sizes"]]
    rank = len(shape)
    get = lambda *names: next((header[name] for name in names if name in header), None)
    if get("data file", "datafile") is not None:
        raise _Refused("keeps its data in another file: save it as one .nrrd file")
    if encoding not in _NRRD_STREAMS or get("byte skip", "byteskip") or get("line skip", "lineskip"):
        raise _Refused(f"has the encoding {encoding} or skips bytes: save it as raw or gzip NRRD")
    if header["type"] not in _NRRD_TYPES:
        raise _Refused(f"has the NRRD type {header['type']}: save one real value a voxel")
    order: Any = {"little": "<", "big": ">"}.get(str(header.get("endian", "little" if "8" in header["type"] else "")))
    dtype = np.dtype(_NRRD_TYPES[header["type"]])
    if order is None and dtype.itemsize > 1:
        raise _Refused("does not say little or big endian: repair the header")
    dtype = dtype.newbyteorder(order or "=")
    directions = header.get("space directions")
    directions = None if directions is None else np.asarray(directions, float)
    unclear = rank == 3 and directions is None and "kinds" not in header and min(shape[0], shape[-1]) <= 4
    kinds = {str(kind).lower() for kind in header.get("kinds", [])}
    if header["dimension"] != rank or rank not in (2, 3) or not kinds <= {"domain", "space", "???", "none"} or unclear:
        raise _Refused(f"its axes {tuple(shape)} are not all in space: save one 2D or 3D channel a file")
    _check_claim(shape, dtype.itemsize, length)
    start = file.tell()
    if encoding == "raw" and start + math.prod(shape) * dtype.itemsize != length:
        raise _Refused(f"its header claims the size {tuple(shape)}, which its {length} bytes are not: copy it again")

    units = header.get("space units") or header.get("units") or []
    if any(unit.lower() not in ("mm", "", "???") for unit in units):
        raise _Refused(f"has its geometry in {', '.join(units)}: save it in mm")
    spacing, affine = None, None
    if directions is not None:
        if directions.ndim != 2 or len(directions) != rank or directions.shape[1] not in (2, 3):
            raise _Refused("its space directions do not fit its axes: repair the header")
        spacing = _check_spacing(np.linalg.norm(directions, axis=1))
        space, origin = str(header.get("space", "")).lower(), header.get("space origin")
        if space.endswith("time"):
            raise _Refused("has an axis of time: save one time point a file")
        if rank == 3:
            affine = np.eye(4)
            affine[:3, :3] = directions.T
            affine[:3, 3] = 0 if origin is None else origin
            affine = np.diag([*_TO_RAS.get(space, (1, 1, 1)), 1.0]) @ _check_affine(affine)
            affine = affine if space in _TO_RAS and origin is not None else None
    elif "spacings" in header and np.isfinite(header["spacings"]).any():
        spacing = _check_spacing(header["spacings"])

    def load() -> np.ndarray:
        file.seek(start)
        values = _stream(_NRRD_STREAMS[encoding](file), math.prod(shape), dtype)
        return (values.reshape(shape, order="F") if rank == 3 else values.reshape(shape[::-1]))[..., None]

    return _in_rows(_Found(tuple(shape), load, spacing, affine))


def _npy(file: Any, length: int) -> _Found:
    """2D, 2D with up to 4 channels last, 3D, or 3D with channels last; nothing is ever unpickled."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _Refused("is not a plain array: save it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise _Refused(f"holds values of type {dtype}: save real numbers")
    size = shape[:-1] if len(shape) == 4 or (len(shape) == 3 and shape[-1] <= 4) else shape
    channels = shape[-1] if len(size) < len(shape) else 1
    if len(size) not in (2, 3) or channels > MAX_CHANNELS:
        raise _Refused(f"has the shape {shape}: save 2D or 3D, channels last")
    _check_claim((*size, channels) if len(size) == 3 else size, dtype.itemsize * channels, length)

    def load() -> np.ndarray:
        values = _stream(file, math.prod(shape), dtype)
        return values.reshape(shape, order="F" if fortran else "C").reshape(*size, channels)

    return _Found(size, load, bits={"u1": 8, "u2": 16}.get(dtype.str[1:]))


def _npz(file: IO[bytes], length: int) -> _Found:
    names = (archive := zipfile.ZipFile(file)).namelist()
    if len(names) != 1 or not names[0].endswith(".npy"):
        raise _Refused(f"holds {len(names)} arrays or files ({', '.join(names[:6])}): save one array a file")
    return _npy(archive.open(names[0]), length)
