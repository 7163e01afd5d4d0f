"""The format of a file, its values, and several files as channels of one image."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jmae.data.files import arrays, dicom, pictures
from jmae.data.files.grids import Geometry, Image, OffGrid, off_grid, turned
from jmae.data.files.guard import Header, Reader, Refused, named_errors, one_line, opened
from jmae.errors import InputError


def read_file(path: str | os.PathLike) -> tuple[Image, bool]:
    """One file or series, and whether its compression lost something. All values of all files come through here.

    Raises:
      InputError: "PATH: what: remedy", for a file that cannot be read without doubt.
    """
    with _opened(path) as header:
        with np.errstate(over="raise", invalid="ignore"):  # a double beyond float32 is an error, not an Inf
            array = np.ascontiguousarray(header.decode(), dtype=np.float32)
        if array.shape[:-1] != header.size:
            raise Refused(f"its header says {header.size} but its data are {array.shape[:-1]}: export it again")
        if not np.isfinite(array).any():
            raise Refused("has no finite value: export it again, or leave the case out")
        return Image(array, header.spacing, header.affine, header.bits, header.nifti), header.lossy


ReadFile = Callable[[str], tuple[Image, bool]]  # as `read_file`


def read_image(
    source: str | os.PathLike | Sequence[str | os.PathLike], read: Callable[..., tuple[Image, bool]] | None = None
) -> Image:
    """Reads one file or one folder of a DICOM series, or several of them as channels in order.

    Several must lie on one grid: that of the first, to whose axes the others are `turned`. `read` replaces `read_file`.

    Raises:
      InputError: "PATH: what: remedy", for every file that cannot be read without doubt.
    """
    paths = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not paths:
        raise InputError("image: no file given: name at least one")
    images = [(read or read_file)(path)[0] for path in paths]
    images = [images[0], *(turned(image, images[0]) for image in images[1:])]
    for path, image in zip(paths[1:], images[1:], strict=True):
        if problem := off_grid(image, images[0]):
            raise OffGrid(one_line(path, f"{problem} {paths[0]}: resample it, or set data.join=resample"))
    placed = next((image for image in images if image.affine is not None), images[0])
    array = images[0].array if len(images) == 1 else np.concatenate([i.array for i in images], axis=-1)
    bits = {image.bits for image in images}
    return placed._replace(array=array, bits=bits.pop() if len(bits) == 1 else None)


def read_mask(
    path: str | os.PathLike,
    like: Image | Geometry | None = None,
    read: Callable[..., tuple[Image, bool]] | None = None,
    threshold: float = 0.5,
) -> np.ndarray:
    """Reads a mask, bool `(*size)`. With `like` it must lie on that image's grid (`on_grid`).

    Raises:
      InputError: as `read_marks` and `on_grid`.
    """
    image, _ = read_marks(path, read, threshold)
    return image.array[..., 0] if like is None else on_grid(path, image, like)


def read_marks(
    path: str | os.PathLike, read: Callable[..., tuple[Image, bool]] | None = None, threshold: float = 0.5
) -> tuple[Image, bool]:
    """(A mask on its own grid, as an image of one bool channel; whether the file holds probabilities.)

    A voxel is marked where any channel is (`marks_of`); alpha is not a channel. A JPEG whose values are not all 0 or
    255 is refused: compression leaves small values around its lesions, so that they have no edge. `read` replaces
    `read_file`.

    Raises:
      InputError: as `read_image` and `marks_of`.
    """
    image, lossy = (read or read_file)(path)
    if lossy and not np.isin(image.array, (0, 255)).all():
        raise InputError(one_line(path, "a JPEG mask without sharp edges: cut it at 127 and save it as PNG"))
    marked, soft = marks_of(image.array, threshold, path)
    return image._replace(array=np.any(marked, axis=-1, keepdims=True)), soft


def marks_of(values: np.ndarray, threshold: float, name: str | os.PathLike) -> tuple[np.ndarray, bool]:
    """(Which values mark a voxel, bool; whether they are probabilities.)

    Whole numbers mark above 0. Fractional numbers from 0 to 1 are probabilities and mark above `threshold`; splines may
    lead a little beyond 0 and 1.

    Raises InputError that begins with `name` for other fractional numbers.
    """
    finite = values[np.isfinite(values)]
    soft = bool((np.abs(finite - np.rint(finite)) > 1e-3).any())  # less is rounding
    if soft and (finite.min() < -0.5 or finite.max() > 1.5):
        what = f"has fractional values from {finite.min():g} to {finite.max():g}"
        raise InputError(one_line(name, f"{what}: save it as 0 and 1, or as probabilities from 0 to 1"))
    with np.errstate(invalid="ignore"):
        return (values > threshold if soft else np.rint(values) > 0), soft


def on_grid(path: str | os.PathLike, image: Image, like: Image | Geometry) -> np.ndarray:
    """The first channel of an image, `turned` to the axes of another; raises `OffGrid` where their grids differ."""
    image = turned(image, like)
    if problem := off_grid(image, like):
        other = "" if image.affine is None or like.affine is None else ", or set data.join=resample"
        raise OffGrid(one_line(path, f"{problem} its image: save the mask on the image's grid{other}"))
    return image.array[..., 0]


def image_size(path: str | os.PathLike) -> tuple[int, ...]:
    """The size of `read_image(path).array` without channels, from the header alone."""
    with _opened(path) as header:
        return header.size


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Header]:
    """The header of a file or of a folder of a series; errors up to the end of the block become an `InputError`."""
    if os.path.isdir(path):
        with named_errors(path):
            yield dicom.read_series(os.fspath(path))
    else:
        with opened(path, reader_of) as header:
            yield header


_MAGIC: tuple[tuple[bytes, Reader], ...] = (
    (b"\x89PNG\r\n\x1a\n", pictures.read_png),
    (b"\xff\xd8\xff", pictures.read_jpeg),
    (b"II*\0", pictures.read_tiff),
    (b"MM\0*", pictures.read_tiff),
    (b"II+\0", pictures.read_tiff),
    (b"MM\0+", pictures.read_tiff),
    (b"NRRD", arrays.read_nrrd),
    (b"\x93NUMPY", arrays.read_npy),
    (b"PK\x03\x04", arrays.read_npz),
    (b"\x1f\x8b", arrays.read_nifti),
)


def reader_of(head: bytes) -> Reader:
    """The reader of the format that a file's first bytes tell; raises `Refused` for any other."""
    if not head:
        raise Refused("is empty: copy or export it again")
    if dicom.begins_as_dicom(head):
        return dicom.read_dicom
    for magic, reader in _MAGIC:
        if head.startswith(magic):
            return reader
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return arrays.read_nifti
    if head.startswith(b"version https://git-lfs"):
        raise Refused("is a Git LFS pointer, not the image: run `git lfs pull`")
    raise Refused("not a format that is read here: convert it to NIfTI, DICOM, PNG, JPEG, TIFF, NRRD, .npy or .npz")
