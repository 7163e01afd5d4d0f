"""What every reader shares: the record of a header, the checks that come before memory is taken, and the error lines.

A reader compares the header's claims with the length of the file before it asks for memory. Compressed streams are read
to their end, so that their checksums are compared.
"""

import contextlib
import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom

from jmae.errors import InputError

MAX_PIXELS = 2**25  # of a 2D image: the largest radiographs have as many
MAX_PICTURE_BYTES = 2**27  # of a decoded picture: a decoder needs twice as much, beside the image
MAX_VOXELS = 2**29  # of a volume: 1024 x 1024 x 512, 2 GiB as float32
SPACINGS = 1e-6, 1e4  # mm: of a microscope, and beyond any scanner
RATIO = 4096  # no file packs real data tighter; the bound of deflate is 1032
HARMLESS_BYTES = 2**26  # claims below this are not worth a ratio check
BLOCK = 2**20  # values per step of a streamed read

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # the readers check what it logs, and raise


class Refused(Exception):
    """What is wrong with the present file, as "what: remedy"; `named_errors` puts the path before it."""


class Header(NamedTuple):
    """What a header tells. `decode` reads the values, (*size, channels), of any real dtype."""

    size: tuple[int, ...]
    decode: Callable[[], np.ndarray]
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None
    bits: int | None = None
    nifti: nib.Nifti1Header | None = None
    lossy: bool = False
    tags: pydicom.Dataset | None = None  # of a DICOM file


Reader = Callable[[IO[bytes], int], Header]  # of an open file and its length in bytes


def one_line(path: str | os.PathLike, problem: str) -> str:
    """The error message "PATH: PROBLEM" without line breaks."""
    return f"{os.fspath(path)}: {problem}".translate({10: " ", 13: " "})


@contextlib.contextmanager
def named_errors(path: str | os.PathLike, head: bytearray | None = None) -> Iterator[None]:
    """Turns every exception of the block into one `InputError` that begins with `path`.

    `head` receives the file's first bytes inside the block. They tell a file that was copied as text.
    """
    head = bytearray() if head is None else head
    try:
        yield
    except InputError:
        raise
    except Refused as refused:
        raise InputError(one_line(path, _as_text(head) or str(refused))) from None
    except FileNotFoundError as error:
        raise InputError(one_line(path, "not found: check the path")) from error
    except PermissionError as error:
        where = error.filename or path  # the file in a folder of a series
        raise InputError(one_line(where, "may not be read: check its permissions")) from error
    except Exception as error:  # decoders raise anything on damaged files
        why = str(error).strip().split("\n")[0] or type(error).__name__
        problem = f"seems damaged or incomplete (the decoder says: {why}): copy or export it again, or leave it out"
        if isinstance(error, MemoryError | ImportError) or getattr(error, "errno", None):  # no fault of the file
            problem = f"could not be read ({why}): see to this and give the command again"
        problem = _as_text(head) or problem
        raise InputError(one_line(path, problem)) from error


@contextlib.contextmanager
def opened(path: str | os.PathLike, reader_of: Callable[[bytes], Reader]) -> Iterator[Header]:
    """The header of one file; `reader_of` chooses the reader by the first 64 KiB.

    The file stays open inside the block, where `Header.decode` may be called. Raises InputError for whatever is wrong,
    also inside the block.
    """
    head = bytearray()
    with named_errors(path, head):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refused("is not a regular file: name an image file")
        with _quiet(), open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            head += file.read(2**16)
            file.seek(0)
            yield reader_of(bytes(head))(file, length)


def _as_text(head: bytearray) -> str | None:
    """A binary file that a tool copied as text has U+FFFD in place of every byte above 127."""
    if head.count(b"\xef\xbf\xbd") > 8:
        return "was copied as text, which destroyed its values: copy the original again in binary mode"
    return None


_reading = threading.Lock()
_readers: list[Any] = []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of the decoders while at least one thread reads; the readers check what matters of them.

    `catch_warnings` restores a global list. If each thread entered it, one could restore the filters of another. So
    only the first thread enters it, and the last one leaves.
    """
    with _reading:
        if not _readers:
            filters = warnings.catch_warnings()
            filters.__enter__()
            warnings.filterwarnings("ignore", module=r"(pydicom|PIL|tifffile|nibabel|nrrd|openjpeg|libjpeg)\b")
            logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs is raised, too
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


# ------------------------------------------------------------------------------------------ checks of a header


def check_claim(size: Sequence[int], value_bytes: float, length: int) -> None:
    """Refuses a header that claims more than a file of `length` bytes can hold, or more than memory should."""
    if any(n < 1 for n in size):
        raise Refused(f"its header claims the size {tuple(size)}: copy or export it again")
    limit = MAX_PIXELS if len(size) == 2 else MAX_VOXELS
    if math.prod(size) > limit:
        raise Refused(f"size {tuple(size)} is beyond the limit of {limit} values: crop or resample it")
    if math.prod(size) * value_bytes > max(HARMLESS_BYTES, RATIO * length):
        raise Refused(f"its header claims the size {tuple(size)}, its {length} bytes cannot hold that: copy it again")


def check_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    """The spacing as floats; refuses one that is not positive and finite."""
    values = tuple(float(s) for s in spacing)
    if not all(math.isfinite(s) and s > 0 for s in values):
        raise Refused(f"spacing {values} is not positive and finite: repair the header")
    if not all(SPACINGS[0] <= s <= SPACINGS[1] for s in values):
        raise Refused(f"spacing {values} mm is that of no image of a patient: repair the header, or its unit")
    return values


def check_affine(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4) as float64; refuses one that does not map the grid one to one."""
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not columns.all():
        raise Refused("its affine has values that are not finite, or an axis of length 0: repair the header")
    if abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-6:
        raise Refused("its affine is singular: repair the header")
    return np.asarray(affine, np.float64)


# ------------------------------------------------------------------------------------------ streams


def take(stream: Any, n: int) -> bytes:
    """Up to `n` bytes; fewer only at the end of the stream, where its checksum has then been compared."""
    parts = []
    while n > 0 and (part := stream.read(n)):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def read_values(stream: Any, count: int, dtype: np.dtype, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """Exactly `count` values up to the stream's end, scaled in float64, as (count,) float32.

    Memory is touched only as data arrive, so that a false claim costs nothing.
    """
    values = np.empty(count, np.float32)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        block = take(stream, (stop - start) * dtype.itemsize)
        if len(block) < (stop - start) * dtype.itemsize:
            raise Refused("is truncated: copy or export it again")
        read = np.frombuffer(block, dtype)
        values[start:stop] = read if (slope, intercept) == (1, 0) else read * np.float64(slope) + intercept
    if take(stream, 1):
        raise Refused("holds more data than its header claims: copy or export it again")
    return values
