"""Readers of pictures: PNG, JPEG and TIFF."""

import math
import os
import zlib
from typing import IO, Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image as pillow

from jmae.data.files.guard import BLOCK, MAX_PICTURE_BYTES, Header, Refused, check_claim


def one_grey(array: np.ndarray) -> np.ndarray:
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


def read_png(file: IO[bytes], length: int) -> Header:
    head = file.read(29)
    width, height = np.frombuffer(head[16:24], ">u4").tolist()
    depth, colour = head[24], head[25]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 4)
    check_claim((height, width), channels * depth / 8, length)
    if (decoded := height * width * channels * depth // 8) > MAX_PICTURE_BYTES:
        raise Refused(f"size {(height, width)} takes {decoded} bytes, beyond {MAX_PICTURE_BYTES}: crop or resample it")

    def decode() -> np.ndarray:
        file.seek(0)
        with pillow.open(file, formats=("PNG",)) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise Refused("is an animation: save one frame")
            image.verify()  # the checksums, which decoding alone does not compare
        _check_rows(file, width, height, channels * depth, interlaced=bool(head[28]))
        file.seek(0)
        if depth == 16:  # Pillow keeps 16 bits of grey only
            array = np.atleast_3d(np.asarray(imagecodecs.png_decode(file.read())))
        else:
            array = _decoded(file, "PNG")
        return one_grey(array[..., : 3 if colour in (2, 3, 6) else 1])

    return Header((height, width), decode, bits=16 if depth == 16 else 8)


def _check_rows(file: IO[bytes], width: int, height: int, pixel_bits: int, *, interlaced: bool) -> None:
    """Refuses a PNG whose data do not fit the size in its header: decoders fill up what is missing in silence."""
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
        raise Refused(
            f"its header claims the size {(height, width)}, which does not fit its data: copy or export it again"
        )


def read_jpeg(file: IO[bytes], length: int) -> Header:
    with pillow.open(file, formats=("JPEG",)) as image:
        width, height = image.size
        orientation = image.getexif().get(0x0112, 1)
    if orientation not in range(1, 9):
        orientation = 1  # 0 is written for "unknown"
    check_claim((height, width), 3, length)

    def decode() -> np.ndarray:
        file.seek(0)
        return _upright(one_grey(_decoded(file, "JPEG")), orientation)

    return Header((width, height) if orientation > 4 else (height, width), decode, bits=8, lossy=True)


def _decoded(file: IO[bytes], kind: str) -> np.ndarray:
    """(rows, columns, 1 or 3) uint8 without alpha; a palette as its colours, CMYK as RGB, 1 bit as 0 and 255."""
    with pillow.open(file, formats=(kind,)) as image:
        modes = {"1": "LA", "L": "LA", "LA": "LA", "P": "RGBA", "RGB": "RGBA", "RGBA": "RGBA", "CMYK": "RGB"}
        if image.mode not in modes:
            raise Refused(f"has the colour mode {image.mode}: save it as grey or RGB")
        mode, (width, height) = modes[image.mode], image.size
        array = np.empty((height, width, 1 if mode == "LA" else 3), np.uint8)
        for y in range(0, height, rows := max(1, BLOCK // width)):  # a whole conversion would double the memory
            strip = image.crop((0, y, width, min(height, y + rows)))
            array[y : y + rows] = np.asarray(strip.convert(mode))[..., : array.shape[-1]]
        return array


def read_tiff(file: IO[bytes], length: int) -> Header:
    page: Any
    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.pages.first
        axes, photometric = series.axes, int(page.photometric)
        pages = [p for p in series.pages if p is not None]
        orientation = page.tags.valueof(274, 1)
        if not axes:
            raise Refused("is truncated or damaged: copy or export it again")
        if len(tiff.series) > 1 or not set(axes) <= set("ZCSYX") or len(pages) != len(series.pages):
            raise Refused(
                f"holds {len(tiff.pages)} pages and does not say that they are a volume: save a volume as NIfTI, "
                "or one picture a file"
            )
        size = tuple(series.shape[axes.index(axis)] for axis in "ZYX" if axis in axes)
        channels = math.prod(series.shape) // math.prod(size)
        kind, depth = np.dtype(series.dtype).kind, page.bitspersample
        if len(size) < 2 or kind not in "biuf" or orientation not in (range(1, 9) if len(size) == 2 else (1,)):
            raise Refused(f"a TIFF of axes {axes} and type {series.dtype}: save it as a plain picture")
        if photometric not in (0, 1, 2, 3) and not (photometric == 6 and page.compression in (6, 7)):
            raise Refused(f"has the TIFF colour space {page.photometric!s}: save it as grey or RGB")
        check_claim(size, channels * np.dtype(series.dtype).itemsize, length)
        for p in pages:  # tifffile fills what is missing with zeros
            stored = [(at, n) for at, n in zip(p.dataoffsets, p.databytecounts, strict=True) if at > 0 and n > 0]
            if len(stored) != math.prod(page.chunked) or any(at + n > length for at, n in stored):
                raise Refused("is truncated or damaged: copy or export it again")

        colours = page.colormap if photometric == 3 else None
        alpha = [int(extra) in (1, 2) for extra in page.extrasamples]

    def decode() -> np.ndarray:
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            array = tiff.series[0].asarray(maxworkers=1)
        if photometric == 0:  # white is zero
            if kind not in "bu":
                raise Refused("is white-is-zero with signed or real values: save it with black as zero")
            array = ~array if kind == "b" else (2**depth - 1) - array
        if kind == "b":
            array = array * np.uint8(255)
        order = [axes.index(axis) for axis in "ZYXCS" if axis in axes]
        array = array.transpose(order).reshape(*size, channels)
        if colours is not None:
            array = np.moveaxis(colours[:, array[..., 0]] >> 8, 0, -1)
        array = array[..., : channels - len(alpha)] if alpha and all(alpha) and "C" not in axes else array
        array = one_grey(array) if photometric in (2, 3, 6) else array
        return _upright(array, orientation) if array.ndim == 3 else array

    full = (kind == "u" and depth in (8, 16)) or kind == "b" or colours is not None
    bits = (16 if depth == 16 and colours is None else 8) if full else None
    return Header(size[::-1] if orientation > 4 else size, decode, bits=bits, lossy=page.compression in (6, 7))
