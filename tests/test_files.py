"""Readers against files in their true format, made by the format's own library; faults as tables."""

import bz2
import concurrent.futures
import contextlib
import errno
import gzip
import io
import itertools
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image as pillow
from pydicom import uid
from pydicom.encaps import encapsulate

from jmae.data.files import Image, image_size, read_image, read_mask, write_map
from jmae.data.files.guard import named_errors
from jmae.errors import InputError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 5), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 5), dtype=np.uint16)
RGB = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
VOLUME = RNG.normal(size=(6, 5, 4)).astype(np.float32)
AFFINE = np.array([[0, -0.8, 0, 10], [0.7, 0, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])


def refused(path, *words, by=read_image):
    """The one line with which a file is refused: path, what, remedy."""
    with pytest.raises(InputError) as caught:
        by(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and line.count(": ") >= 2, line
    for word in words:
        assert word in line, line
    return line


def saved(path, data):
    path.write_bytes(data)
    return path


def read(path):
    """The array, after a check that the header alone tells its size."""
    image = read_image(path)
    assert image.array.dtype == np.float32 and image.array.flags.c_contiguous
    assert image_size(path) == image.array.shape[:-1]
    return image


def png(array, **options):
    file = io.BytesIO()
    pillow.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


# Pictures


def test_png_of_8_and_16_bits_keeps_every_value(tmp_path):
    for array, bits in ((GREY, 8), (DEEP, 16)):
        image = read(saved(tmp_path / "a.png", png(array)))
        np.testing.assert_array_equal(image.array[..., 0], array)
        assert image.bits == bits and image.spacing is None and image.affine is None


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_png_is_not_cut_to_8_bits(tmp_path, channels):
    array = RNG.integers(0, 65536, (7, 5, channels), dtype=np.uint16)
    image = read(saved(tmp_path / "a.png", imagecodecs.png_encode(array)))
    np.testing.assert_array_equal(image.array, array[..., : 1 if channels == 2 else 3])


def test_a_colour_picture_with_equal_channels_is_one_grey_channel_and_alpha_is_dropped(tmp_path):
    alpha = np.full((7, 5, 1), 128, np.uint8)
    grey3 = np.repeat(GREY[..., None], 3, -1)
    one_off = grey3.copy()
    one_off[6, 4, 2] ^= 1
    for array, expected in (
        (grey3, GREY[..., None]),
        (one_off, one_off),
        (np.concatenate([RGB, alpha], -1), RGB),
        (np.concatenate([grey3, alpha], -1), GREY[..., None]),
        (np.concatenate([GREY[..., None], alpha], -1), GREY[..., None]),
    ):
        np.testing.assert_array_equal(read(saved(tmp_path / "a.png", png(array))).array, expected)


def test_a_palette_is_read_as_its_colours_with_and_without_transparency(tmp_path):
    indices = (GREY % 4).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 9, 0], [1, 2, 3]], np.uint8)
    picture = pillow.frombytes("P", (5, 7), indices.tobytes())
    picture.putpalette(colours.tobytes())
    for options in ({}, {"transparency": 0}, {"transparency": bytes([0, 128, 255, 7])}):
        picture.save(tmp_path / "a.png", **options)
        np.testing.assert_array_equal(read(tmp_path / "a.png").array, colours[indices])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), indices > 0)


def test_a_bilevel_png_fills_the_8_bit_range(tmp_path):
    image = read(saved(tmp_path / "a.png", png(GREY > 127)))
    np.testing.assert_array_equal(image.array[..., 0], np.where(GREY > 127, 255, 0))
    assert image.bits == 8


def test_jpeg_grey_colour_and_cmyk(tmp_path):
    flat = np.full((16, 16), 90, np.uint8)  # constant blocks survive compression
    for picture, expected in (
        (pillow.fromarray(flat), [90]),
        (pillow.fromarray(np.repeat(flat[..., None], 3, -1)), [90]),
        (pillow.new("RGB", (16, 16), (200, 40, 90)), [200, 40, 90]),
        (pillow.new("CMYK", (16, 16), (55, 215, 165, 0)), [200, 40, 90]),
    ):
        picture.save(tmp_path / "a.jpg", quality=100)
        array = read(tmp_path / "a.jpg").array
        assert array.shape == (16, 16, len(expected))
        np.testing.assert_allclose(array, np.broadcast_to(expected, array.shape), atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_and_tiff_orientation_are_undone(tmp_path, orientation):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # upper left
    upright[:8, 8:16] = 120
    from_upright = {  # how a camera held that way stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    stored = np.ascontiguousarray(from_upright[orientation])
    exif = pillow.Exif()
    exif[0x0112] = orientation
    pillow.fromarray(stored).save(tmp_path / "a.jpg", quality=100, exif=exif)
    np.testing.assert_allclose(read(tmp_path / "a.jpg").array[..., 0], upright, atol=3)
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_array_equal(read(tmp_path / "a.tif").array[..., 0], upright)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f4"])
def test_tiff_keeps_every_value(tmp_path, dtype, compression):
    array = (RNG.uniform(0, 100, (40, 30)) - (50 if dtype[0] != "u" else 0)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression, rowsperstrip=16)
    image = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.array[..., 0], array.astype(np.float32))
    assert image.bits == {"u1": 8, "u2": 16}.get(dtype)


def test_tiff_colour_alpha_planar_palette_white_is_zero_and_bilevel(tmp_path):
    path = tmp_path / "a.tif"
    alpha = np.full((7, 5, 1), 9, np.uint8)
    tifffile.imwrite(path, RGB, photometric="rgb")
    np.testing.assert_array_equal(read(path).array, RGB)
    tifffile.imwrite(path, np.concatenate([RGB, alpha], -1), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read(path).array, RGB)
    tifffile.imwrite(path, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read(path).array, RGB)
    tifffile.imwrite(path, np.repeat(GREY[..., None], 3, -1), photometric="rgb")
    np.testing.assert_array_equal(read(path).array[..., 0], GREY)
    tifffile.imwrite(path, GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read(path).array[..., 0], 255.0 - GREY)
    tifffile.imwrite(path, GREY > 100, photometric="minisblack")
    np.testing.assert_array_equal(read(path).array[..., 0], np.where(GREY > 100, 255, 0))
    colours = RNG.integers(0, 256, (3, 256), dtype=np.uint16)
    tifffile.imwrite(path, GREY, photometric="palette", colormap=colours * 257)
    np.testing.assert_array_equal(read(path).array, np.moveaxis(colours[:, GREY], 0, -1))


def test_a_tiff_stack_is_a_volume_only_if_it_says_so(tmp_path):
    path = tmp_path / "a.tif"
    stack = RNG.integers(0, 256, (6, 7, 5), dtype=np.uint8)
    for options in ({"metadata": {"axes": "ZYX"}}, {"imagej": True, "metadata": {"axes": "ZYX"}}):
        tifffile.imwrite(path, stack, photometric="minisblack", **options)
        np.testing.assert_array_equal(read(path).array[..., 0], stack)
    for options in ({}, {"metadata": None}, {"metadata": {"axes": "TYX"}}):
        tifffile.imwrite(path, stack, photometric="minisblack", **options)
        refused(path, "does not say that they are a volume")


# NIfTI


def nifti(path, array=VOLUME, affine=AFFINE, kind=nib.Nifti1Image, **fields):
    """A NIfTI file; `fields` are header fields, patched after nibabel has written its own idea of them."""
    image = kind(array, affine)
    data = bytearray(image.to_bytes())
    header = image.header_class(bytes(data[: image.header_class.sizeof_hdr]), check=False)
    for name, value in fields.items():
        if isinstance(value, tuple):
            header[name][: len(value)] = value
        else:
            header[name] = value
    data[: len(header.binaryblock)] = header.binaryblock
    return saved(path, gzip.compress(bytes(data), 1) if path.suffix == ".gz" else bytes(data))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "u2"])
def test_nifti_values_spacing_and_affine(tmp_path, name, kind, dtype):
    array = RNG.integers(0, 100, (6, 5, 4)).astype(dtype)
    image = read(nifti(tmp_path / name, array, kind=kind))
    np.testing.assert_array_equal(image.array[..., 0], array)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(image.spacing, (0.7, 0.8, 2.5), rtol=1e-6)
    assert image.bits is None


def test_nifti_scaling_is_applied_and_slope_0_means_unscaled(tmp_path):
    array = RNG.integers(-30000, 30000, (6, 5, 4)).astype("i2")
    scaled = read(nifti(tmp_path / "a.nii", array, scl_slope=0.5, scl_inter=-100.0)).array[..., 0]
    np.testing.assert_array_equal(scaled, array * 0.5 - 100)
    unscaled = read(nifti(tmp_path / "a.nii", array, scl_slope=0.0, scl_inter=7.0)).array[..., 0]
    np.testing.assert_array_equal(unscaled, array)


def test_scaling_happens_in_float64(tmp_path):
    array = np.array([2**30, 2**30 + 1, 2**30 + 3], "i4").reshape(3, 1, 1) * np.ones((1, 2, 2), "i4")
    scaled = read(nifti(tmp_path / "a.nii", array, scl_slope=1.0, scl_inter=-(2.0**30))).array
    np.testing.assert_array_equal(scaled[:, 0, 0, 0], [0, 1, 3])


def test_big_endian_nifti_is_read(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(VOLUME, AFFINE, header)
    image.to_filename(tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == struct.pack(">i", 348)
    np.testing.assert_array_equal(read(tmp_path / "a.nii").array[..., 0], VOLUME)


def test_nifti_units_become_mm_and_qform_serves_without_sform(tmp_path):
    metres = nifti(tmp_path / "a.nii", xyzt_units=1)
    np.testing.assert_allclose(read(metres).affine[:3], AFFINE[:3] * 1000, rtol=1e-5)
    image = nib.Nifti1Image(VOLUME, None)
    image.header.set_qform(AFFINE, code=1)
    image.to_filename(tmp_path / "b.nii")
    np.testing.assert_allclose(read(tmp_path / "b.nii").affine, AFFINE, atol=1e-5)


def test_without_form_codes_there_is_spacing_but_no_affine(tmp_path):
    image = read(nifti(tmp_path / "a.nii", sform_code=0, qform_code=0))
    assert image.affine is None
    np.testing.assert_allclose(image.spacing, (0.7, 0.8, 2.5), rtol=1e-6)


def test_trailing_axes_of_length_1_are_dropped_and_one_slice_is_rows_by_columns(tmp_path):
    four = read(nifti(tmp_path / "a.nii", VOLUME[..., None]))
    np.testing.assert_array_equal(four.array[..., 0], VOLUME)
    slab = read(nifti(tmp_path / "a.nii", VOLUME[..., :1]))
    np.testing.assert_array_equal(slab.array[..., 0], VOLUME[..., 0].T)
    np.testing.assert_allclose(slab.spacing, (0.8, 0.7), rtol=1e-6)
    row, column = 3, 2
    np.testing.assert_allclose(slab.affine @ [row, column, 0, 1], AFFINE @ [column, row, 0, 1], atol=1e-5)


LIES = {
    "huge": ({"dim": (3, 32000, 32000, 32000)}, "32000"),
    "twice too large": ({"dim": (3, 12, 5, 4)}, "12"),
    "half as large": ({"dim": (3, 3, 5, 4)}, "(3, 5, 4)"),
    "negative size": ({"dim": (3, -6, 5, 4)}, "-6"),
    "zero size": ({"dim": (3, 0, 5, 4)}, "(0, 5, 4)"),
    "rank 0": ({"dim": (0, 6, 5, 4)}, "0D"),
    "rank 1": ({"dim": (1, 120, 1, 1)}, "1D"),
    "zero spacing": ({"pixdim": (1, 0, 1, 1)}, "spacing"),
    "NaN spacing": ({"pixdim": (1, np.nan, 1, 1)}, "spacing"),
    "negative spacing": ({"pixdim": (1, 1, -1, 1)}, "spacing"),
    "singular affine": ({"srow_y": (0, -0.8, 0, 1), "srow_x": (0, -0.8, 0, 1)}, "affine"),
    "collinear affine": ({"srow_y": (1, 2, 0, 1), "srow_x": (2, 4, 0, 1)}, "singular"),
    "NaN affine": ({"srow_z": (0, 0, np.nan, 0)}, "affine"),
    "infinite offset": ({"srow_z": (0, 0, 1, np.inf)}, "affine"),
    "NaN quaternion": ({"sform_code": 0, "qform_code": 1, "quatern_b": np.nan}, "affine"),
    "NaN slope": ({"scl_slope": np.nan}, "slope"),
    "infinite slope": ({"scl_slope": np.inf}, "slope"),
    "NaN intercept": ({"scl_slope": 2.0, "scl_inter": np.nan}, "intercept"),
    "complex": ({"datatype": 32, "bitpix": 64}, "data type 32"),
    "RGB": ({"datatype": 128, "bitpix": 24}, "data type 128"),
    "unknown type": ({"datatype": 3}, "data type 3"),
    "data before the header's end": ({"vox_offset": 100.0}, "byte 100"),
    "data beyond the end": ({"vox_offset": 1e30}, "byte"),
    "NaN data offset": ({"vox_offset": np.nan}, "byte nan"),
    "unknown unit": ({"xyzt_units": 7}, "unit"),
    "pair": ({"magic": b"ni1"}, ".img"),
    "wrong magic": ({"magic": b"n+9"}, "not"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_nifti_header_is_refused_without_allocating_what_it_claims(tmp_path, name, lie):
    fields, word = LIES[lie]
    path = nifti(tmp_path / name, **fields)
    tracemalloc.start()
    refused(path) if lie == "wrong magic" or "large" in lie else refused(path, word)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5, 6, 1, 3)])
def test_a_few_volumes_on_the_fourth_axis_are_channels_and_many_are_refused_with_a_remedy(tmp_path, name, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype("f4")
    image = read_image(nifti(tmp_path / name, values))
    np.testing.assert_array_equal(image.array, values.reshape(4, 5, 6, -1))
    many = nifti(tmp_path / name, np.zeros((2, 2, 2, 17), "f4"))
    refused(many, "4D with the size (2, 2, 2, 17)", "fslsplit", "A.nii;B.nii")
    refused(nifti(tmp_path / name, np.zeros((2, 2, 2, 3, 2), "f4")), "5D")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_cut_of_a_nifti_file_is_refused(tmp_path, name):
    data = nifti(tmp_path / name).read_bytes()
    cuts = sorted({*range(0, 400, 13), *range(400, len(data), 29), len(data) - 1, len(data) - 8})
    for cut in cuts:
        refused(saved(tmp_path / f"cut_{name}", data[:cut]))


def test_a_flipped_bit_in_the_body_of_a_gzipped_nifti_is_refused_or_changes_nothing(tmp_path):
    data = nifti(tmp_path / "a.nii.gz").read_bytes()
    for place in np.random.default_rng(0).choice(range(8 * 10, 8 * len(data)), 200, replace=False):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        file = saved(tmp_path / "b.nii.gz", bytes(flipped))
        if unpacked(flipped) == gzip.decompress(data):  # a stream of other codes may stand for the same bytes
            assert np.array_equal(read_image(file).array, read_image(tmp_path / "a.nii.gz").array)
        else:
            refused(file)


def unpacked(data):
    """What a gzipped file holds; None where it is damaged."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


def test_gzip_bombs_are_refused_under_a_limit(tmp_path):
    zeros = bytes(2**24)
    truth = nifti(tmp_path / "a.nii", dim=(3, 2150, 2150, 2150)).read_bytes()[:352]
    lie = nifti(tmp_path / "a.nii").read_bytes()
    for head, word in ((truth, "limit"), (lie, "more data than its header claims")):
        with gzip.open(tmp_path / "bomb.nii.gz", "wb", 1) as file:
            file.write(head)
            for _ in range(8):
                file.write(zeros)
        tracemalloc.start()
        refused(tmp_path / "bomb.nii.gz", word)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6


# NRRD


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_nrrd_values_and_geometry_in_ras(tmp_path, encoding):
    path = tmp_path / "a.nrrd"
    directions = np.array([[0, 0.7, 0], [-0.8, 0, 0], [0, 0, 2.5]])  # row: the step of one axis, LPS mm
    header = {"space": "left-posterior-superior", "space directions": directions, "space origin": [1.0, 2.0, 3.0]}
    nrrd.write(str(path), VOLUME, {**header, "encoding": encoding})
    image = read(path)
    np.testing.assert_array_equal(image.array[..., 0], VOLUME)
    np.testing.assert_allclose(image.spacing, (0.7, 0.8, 2.5))
    lps = np.array([1, 2, 3]) + np.array([4, 2, 3]) @ directions
    np.testing.assert_allclose((image.affine @ [4, 2, 3, 1])[:3], lps * [-1, -1, 1])


def test_nrrd_without_space_has_spacing_but_no_affine_and_2d_is_rows_by_columns(tmp_path):
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), VOLUME, {"spacings": [1.0, 2.0, 3.0], "kinds": ["domain"] * 3})
    image = read(path)
    assert image.affine is None and image.spacing == (1.0, 2.0, 3.0)
    nrrd.write(str(path), VOLUME[..., 0], {"spacings": [1.0, 2.0]})
    image = read(path)
    np.testing.assert_array_equal(image.array[..., 0], VOLUME[..., 0].T)
    assert image.spacing == (2.0, 1.0)


@pytest.mark.parametrize(
    "header, word",
    [
        ({"space": "left-posterior-superior", "space directions": np.zeros((3, 3))}, "spacing"),
        ({"space": "left-posterior-superior", "space directions": np.ones((3, 3))}, "singular"),
        ({"space": "left-posterior-superior-time", "space directions": np.eye(3)}, "time"),
        ({"kinds": ["RGB-color", "domain", "domain"]}, "axes"),
        ({"kinds": ["domain"] * 3, "spacings": [1.0, -1.0, 1.0]}, "spacing"),
        ({"kinds": ["domain"] * 3, "spacings": [1.0, 1.0, 1.0], "units": ["um"] * 3}, "mm"),
        ({}, "axes"),  # 6 x 5 x 4: colours or slices?
        ({"kinds": ["domain"] * 3, "encoding": "text"}, "encoding"),
    ],
)
def test_nrrd_headers_that_cannot_be_trusted_are_refused(tmp_path, header, word):
    nrrd.write(str(tmp_path / "a.nrrd"), VOLUME, header)
    refused(tmp_path / "a.nrrd", word)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_damaged_nrrd_is_refused(tmp_path, encoding):
    nrrd.write(str(tmp_path / "a.nrrd"), VOLUME, {"kinds": ["domain"] * 3, "encoding": encoding})
    data = (tmp_path / "a.nrrd").read_bytes()
    for cut in [*range(0, len(data), 23), len(data) - 1]:
        refused(saved(tmp_path / "b.nrrd", data[:cut]))
    for sizes in (b"sizes: 6 5 3", b"sizes: 9 9 9", b"sizes: 0 5 4", b"sizes: 99999 99999 99999"):
        refused(saved(tmp_path / "b.nrrd", data.replace(b"sizes: 6 5 4", sizes)))
    start = data.index(b"\n\n") + 2
    if encoding != "raw":
        for byte in range(start + 10, len(data), 7):
            flipped = bytearray(data)
            flipped[byte] ^= 4
            refused(saved(tmp_path / "b.nrrd", bytes(flipped)))


def test_a_detached_nrrd_does_not_make_the_reader_open_other_files(tmp_path):
    (tmp_path / "secret.raw").write_bytes(VOLUME.tobytes())
    nrrd.write(str(tmp_path / "a.nhdr"), VOLUME, {"kinds": ["domain"] * 3}, detached_header=True)
    refused(tmp_path / "a.nhdr", "another file")


# Arrays


def test_arrays_of_numpy(tmp_path):
    colour, series = RGB.astype("f8"), np.asfortranarray(RNG.normal(size=(6, 5, 4, 7)))
    for array, shape, bits in (
        (GREY, (7, 5, 1), 8),
        (DEEP, (7, 5, 1), 16),
        (colour, (7, 5, 3), None),
        (RNG.normal(size=(8, 7, 5)), (8, 7, 5, 1), None),
        (series, (6, 5, 4, 7), None),
        (GREY > 9, (7, 5, 1), None),
        (DEEP.astype(">u2"), (7, 5, 1), 16),
    ):
        np.save(tmp_path / "a.npy", array)
        np.savez_compressed(tmp_path / "b.npz", array)
        for path in (tmp_path / "a.npy", tmp_path / "b.npz"):
            image = read(path)
            np.testing.assert_array_equal(image.array, array.reshape(shape).astype("f4"))
            assert image.bits == bits


class Canary:
    def __reduce__(self):
        return (os.mkdir, ("canary",))


def test_a_pickle_in_an_array_file_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Canary()], dtype=object))
    np.savez(tmp_path / "b.npz", np.array([Canary()], dtype=object))
    refused(tmp_path / "a.npy", "object")
    refused(tmp_path / "b.npz", "object")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "array", [*map(np.zeros, ((4,), (), (2,) * 5, (3, 0), (4, 4, 4, 99))), np.zeros((4, 4), "c8"), np.array("text")]
)
def test_arrays_that_are_no_image_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy")


def test_lying_or_damaged_array_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", VOLUME)
    data = (tmp_path / "a.npy").read_bytes()
    for lie in (b"(9, 9, 9)", b"(6, 5, 2)", b"(-6,5, 4)"):
        refused(saved(tmp_path / "b.npy", data.replace(b"(6, 5, 4)", lie)))
    refused(saved(tmp_path / "b.npy", data.replace(b"(6, 5, 4), }           ", b"(99999, 99999, 999), } ")))
    np.savez_compressed(tmp_path / "a.npz", VOLUME)
    packed = (tmp_path / "a.npz").read_bytes()
    for cut in range(0, len(data), 17):
        refused(saved(tmp_path / "b.npy", data[:cut]))
        refused(saved(tmp_path / "b.npz", packed[: cut % len(packed)]))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 1
    refused(saved(tmp_path / "b.npz", bytes(flipped)))
    np.savez(tmp_path / "two.npz", a=VOLUME, b=VOLUME)
    refused(tmp_path / "two.npz", "2 arrays", "one array a file")


# DICOM


STORED = DEEP // 16  # 12 bits
NATIVE = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian]


def dicom(path, array=STORED, syntax=uid.ExplicitVRLittleEndian, frame=None, meta=True, preamble=bytes(128), **tags):
    """A DICOM file; a tag of None is left out."""
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    data.Modality = "OT"
    values = {
        "Rows": array.shape[0],
        "Columns": array.shape[1],
        "SamplesPerPixel": 1 if array.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if array.ndim == 2 else "RGB",
        "BitsAllocated": 8 * array.itemsize,
        "BitsStored": 12 if array.itemsize == 2 else 8,
        "PixelRepresentation": int(array.dtype.kind == "i"),
    }
    if array.ndim == 3:
        values["PlanarConfiguration"] = 0
    values["HighBit"] = tags.get("BitsStored", values["BitsStored"]) - 1
    big = syntax == uid.ExplicitVRBigEndian
    raw = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes()
    values["PixelData"] = encapsulate([frame]) if frame else raw + b"\0" * (len(raw) % 2)
    for name, value in {**values, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    if "PixelData" in data:
        data["PixelData"].VR = "OB" if frame or array.itemsize == 1 else "OW"
        data["PixelData"].is_undefined_length = frame is not None
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.preamble = preamble
    if meta:
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    else:  # as written by tools before 1993, and by some since
        file = pydicom.filebase.DicomBytesIO()
        file.is_little_endian, file.is_implicit_VR = not big, syntax == uid.ImplicitVRLittleEndian
        pydicom.filewriter.write_dataset(file, data)
        path.write_bytes(file.getvalue())
    return path


def test_a_dicom_file_of_8_bits_has_the_range_of_a_png_of_the_same_pixels(tmp_path):
    """A rescale slope, another sign or more bits give it another range, or none."""
    array = np.arange(8, 8 + 6 * 7, dtype=np.uint8).reshape(6, 7)
    bits = lambda **tags: read(dicom(tmp_path / "a.dcm", array, **tags)).bits
    assert bits() == bits(RescaleSlope=1, RescaleIntercept=0) == bits(PhotometricInterpretation="MONOCHROME1") == 8
    assert bits(RescaleSlope=2, RescaleIntercept=0) is bits(RescaleSlope=1, RescaleIntercept=-100) is None
    assert bits(PixelRepresentation=1) is bits(BitsStored=7) is None
    assert read(dicom(tmp_path / "b.dcm")).bits is None


@pytest.mark.parametrize("syntax", [*NATIVE, uid.RLELossless, uid.JPEG2000Lossless])
def test_dicom_values_in_every_lossless_syntax(tmp_path, syntax):
    path = tmp_path / "a.dcm"
    array = np.tile(STORED, (9, 13))  # JPEG 2000 needs more than a few pixels
    if syntax.is_encapsulated:
        data = pydicom.dcmread(dicom(path, array))
        data.compress(syntax, generate_instance_uid=False)
        data.save_as(path)
    else:
        dicom(path, array, syntax)
    image = read(path)
    np.testing.assert_array_equal(image.array[..., 0], array)
    assert image.bits is None and image.spacing is None and image.affine is None


def test_signed_pixels_without_sign_above_their_stored_bits_are_read_signed(tmp_path):
    signed = STORED.astype("i2") - 2048
    cut = (signed & 0xFFF).astype("i2")
    for stored in (signed, cut):
        np.testing.assert_array_equal(read(dicom(tmp_path / "a.dcm", stored)).array[..., 0], signed)


def jpeg(picture):
    file = io.BytesIO()
    pillow.fromarray(picture).save(file, "JPEG", quality=100)
    return file.getvalue()


def test_dicom_with_jpeg_pixels(tmp_path):
    picture = np.repeat(np.repeat(GREY[:4, :3], 8, 0), 8, 1)
    frame = jpeg(picture)
    expected = np.asarray(pillow.open(io.BytesIO(frame))).astype(float)
    path = dicom(tmp_path / "a.dcm", picture, uid.JPEGBaseline8Bit, frame)
    np.testing.assert_allclose(read(path).array[..., 0], expected, atol=1)
    path = dicom(tmp_path / "a.dcm", picture, uid.JPEGBaseline8Bit, frame, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(read(path).array[..., 0], 255 - expected, atol=1)
    colour = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    path = dicom(
        tmp_path / "a.dcm", colour, uid.JPEGBaseline8Bit, jpeg(colour), PhotometricInterpretation="YBR_FULL_422"
    )
    np.testing.assert_allclose(read(path).array, colour, atol=3)


def test_compressed_pixels_of_another_shape_are_refused_even_with_as_many_values(tmp_path):
    picture = np.zeros((16, 32), np.uint8)
    path = dicom(tmp_path / "a.dcm", picture, uid.JPEGBaseline8Bit, jpeg(picture.T))
    refused(path, "compressed pixels are (32, 16)")
    frame = imagecodecs.jpeg2k_encode(picture.T + np.eye(32, 16, dtype=np.uint8), codecformat="j2k", reversible=True)
    refused(dicom(tmp_path / "a.dcm", picture, uid.JPEG2000Lossless, frame), "JPEG 2000")


def test_monochrome1_is_inverted_in_its_stored_range_before_the_rescale(tmp_path):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": "2", "RescaleIntercept": "-1024"}
    image = read(dicom(tmp_path / "a.dcm", **tags))
    np.testing.assert_array_equal(image.array[..., 0], (4095.0 - STORED) * 2 - 1024)
    signed = STORED.astype("i2") - 2048
    image = read(dicom(tmp_path / "a.dcm", signed, **tags))
    np.testing.assert_array_equal(image.array[..., 0], (-1.0 - signed) * 2 - 1024)


def test_rescale_spacing_and_colour_of_dicom(tmp_path):
    path = tmp_path / "a.dcm"
    image = read(dicom(path, RescaleSlope="0.5", RescaleIntercept="-1024", PixelSpacing=[0.7, 0.8]))
    np.testing.assert_array_equal(image.array[..., 0], STORED * 0.5 - 1024)
    assert image.spacing == (0.7, 0.8)
    assert read(dicom(path, ImagerPixelSpacing=[0.2, 0.3])).spacing == (0.2, 0.3)
    np.testing.assert_array_equal(read(dicom(path, RGB)).array, RGB)
    np.testing.assert_array_equal(read(dicom(path, np.repeat(GREY[..., None], 3, -1))).array[..., 0], GREY)


def test_harmless_dicom_oddities_are_read(tmp_path):
    path = tmp_path / "a.dcm"
    program = b"MZ\x90\0" + b"\xcc" * 124
    for oddity in (
        {"preamble": program},
        {"preamble": b"II*\0" + b"\0" * 124},  # a DICOM file that is also a TIFF
        {"PatientName": "Пётр^山田", "SpecificCharacterSet": "ISO_IR 192"},
        {"array": GREY},  # an odd number of bytes, padded
    ):
        array = oddity.get("array", STORED)
        np.testing.assert_array_equal(read(dicom(path, **oddity)).array[..., 0], array)
    broken = dicom(path, PatientName="XXXX", SpecificCharacterSet="ISO_IR 192").read_bytes()
    broken = broken.replace(b"XXXX", b"\xff\xfe\xff\xfe").replace(b"ISO_IR 192", b"ISO_IR 999")
    np.testing.assert_array_equal(read(saved(path, broken)).array[..., 0], STORED)


@pytest.mark.parametrize("syntax", NATIVE)
def test_uncompressed_dicom_without_transfer_syntax_is_read_by_its_length(tmp_path, syntax):
    path = dicom(tmp_path / "a.dcm", syntax=syntax, meta=False)
    if syntax != uid.ExplicitVRBigEndian:
        np.testing.assert_array_equal(read(path).array[..., 0], STORED)
    else:  # its first bytes are those of no known format
        refused(path)
    data = dicom(tmp_path / "b.dcm", syntax=syntax).read_bytes()
    start, end = data.index(b"\x02\0\x10\0"), data.index(b"\x02\0\x12\0")
    data = data[:start] + data[end:]  # TransferSyntaxUID
    length = struct.unpack("<I", data[140:144])[0] - (end - start)
    data = data[:140] + struct.pack("<I", length) + data[144:]
    np.testing.assert_array_equal(read(saved(tmp_path / "b.dcm", data)).array[..., 0], STORED)


@pytest.mark.parametrize(
    "tags, word",
    [
        ({"PixelData": None}, "without pixel data"),
        ({"Rows": None}, "without an image"),
        ({"Rows": 0}, "without an image"),
        ({"PixelData": b"\0\0" * 20}, "less than expected"),
        ({"Rows": 3}, "more pixels"),
        ({"Rows": 65535, "Columns": 65535}, "limit"),
        ({"Rows": 11000, "Columns": 11000}, "beyond the limit"),
        ({"NumberOfFrames": 2, "PixelData": STORED.tobytes() * 2}, "multi-frame"),
        ({"SharedFunctionalGroupsSequence": [pydicom.Dataset()]}, "multi-frame"),
        ({"PhotometricInterpretation": None}, ""),
        ({"PhotometricInterpretation": "HSV"}, "HSV"),
        ({"PixelSpacing": [0, 0]}, "spacing"),
        ({"PixelSpacing": [-1, 1]}, "spacing"),
        ({"RescaleSlope": "0", "RescaleIntercept": "1"}, "slope"),
        ({"BitsStored": 9}, "stored bits"),
        ({"syntax": uid.MPEG2MPML, "frame": b"\0" * 64}, ""),
        ({"syntax": uid.JPEGBaseline8Bit, "frame": b"\xff\xd8\xff\xe0junk"}, ""),
        ({"syntax": uid.DeflatedExplicitVRLittleEndian}, "deflated"),
    ],
)
def test_dicom_files_that_cannot_be_read_without_doubt_are_refused(tmp_path, tags, word):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom on writing
        path = dicom(tmp_path / "a.dcm", **tags)
    tracemalloc.start()
    refused(path, word)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_cut_dicom_is_refused(tmp_path):
    data = dicom(tmp_path / "a.dcm").read_bytes()
    for cut in [*range(0, len(data), 11), len(data) - 1]:
        refused(saved(tmp_path / "b.dcm", data[:cut]))


# All formats


def test_cut_pictures_are_refused(tmp_path):
    noise = RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    pillow.fromarray(noise).save(tmp_path / "a.jpg")
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", rowsperstrip=8)
    tifffile.imwrite(tmp_path / "b.tif", noise, photometric="rgb", compression="zlib")
    tifffile.imwrite(tmp_path / "c.tif", noise, metadata={"axes": "ZYX"}, photometric="minisblack")
    saved(tmp_path / "a.png", png(noise))
    saved(tmp_path / "b.png", png(noise[..., 0].astype(np.uint16) * 257))
    for name in ("a.png", "b.png", "a.jpg", "a.tif", "b.tif", "c.tif"):
        data = (tmp_path / name).read_bytes()
        for cut in [*range(0, len(data) - 40, 61), len(data) - 40]:
            refused(saved(tmp_path / f"cut_{name}", data[:cut]))


def test_a_cut_jpeg_is_called_damaged_in_our_words_with_the_remedy(tmp_path):
    pillow.fromarray(np.kron(GREY, np.ones((8, 8), np.uint8))).save(tmp_path / "a.jpg")
    cut = saved(tmp_path / "cut.jpg", (tmp_path / "a.jpg").read_bytes()[:-40])
    line = refused(cut, "seems damaged or incomplete (the decoder says: image file is truncated")
    assert line.endswith("): copy or export it again, or leave it out")


def test_what_is_no_fault_of_a_file_does_not_call_it_damaged(tmp_path):
    for error in (OSError(errno.EMFILE, "Too many open files"), MemoryError("no memory")):
        with pytest.raises(InputError) as caught, named_errors(tmp_path / "a.png"):
            raise error
        assert "a.png: could not be read (" in str(caught.value) and "damaged" not in str(caught.value)


def test_a_flipped_bit_in_a_png_never_changes_a_value(tmp_path):
    for array in (GREY, DEEP):
        data = png(array)
        for place in range(0, 8 * (len(data) - 12), 5):  # behind that is the end mark, whose checksum is of nothing
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            refused(saved(tmp_path / "b.png", bytes(flipped)))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("side, depth", [(60000, 8), (11000, 8), (11000, 16)])
def test_a_png_that_claims_more_than_it_holds_is_refused(tmp_path, side, depth):
    head = struct.pack(">IIBBBBB", side, side, depth, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b"")
    )
    tracemalloc.start()
    refused(saved(tmp_path / "a.png", data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def gif():
    file = io.BytesIO()
    pillow.fromarray(GREY).save(file, "GIF")
    return file.getvalue()


def animation():
    file = io.BytesIO()
    frames = [pillow.fromarray(GREY), pillow.fromarray(255 - GREY)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "is empty"),
        (b"id,patient\n1,2\n" * 40, "not a format"),
        (b"\0" * 4000, "not a format"),
        (RNG.bytes(4000), "not a format"),
        (gif(), "not a format"),
        (gzip.compress(b"text", mtime=0), "no NIfTI"),
        (gzip.compress(png(GREY), mtime=0), "no NIfTI"),
        (bz2.compress(b"text"), "not a format"),
        (animation(), "animation"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (png(DEEP).decode("utf-8", "replace").encode(), "copied as text"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff\xe0", ""),
        (b"II*\0\x08\0\0\0", ""),
        (b"NRRD0004\n", ""),
        (b"NRRD0004\ntype: float\n\n", ""),
        (b"\x93NUMPY\x01\0", ""),
        (b"PK\x03\x04", ""),
        (b"\x1f\x8b\x08\0", ""),
        (b"\0" * 128 + b"DICM", ""),
    ],
)
def test_files_of_no_known_format_are_refused_under_any_name(tmp_path, data, word):
    for name in ("a.png", "a.nii.gz", "a.dcm"):
        refused(saved(tmp_path / name, data), word)
        refused(tmp_path / name, word, by=image_size) if word != "animation" else None


def test_the_content_decides_not_the_name(tmp_path):
    np.testing.assert_array_equal(read(saved(tmp_path / "a.nii.gz", png(GREY))).array[..., 0], GREY)
    nifti(tmp_path / "b.nii").rename(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "b.nii.gz").array[..., 0], VOLUME)


def test_missing_folder_and_device_are_refused(tmp_path):
    refused(tmp_path / "none.png", "not found")
    refused(tmp_path, "folder")
    refused("/dev/zero", "regular file")
    refused(tmp_path / ("x" * 300), "")
    refused(f"{tmp_path}/a\0b", "")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "regular file")


def test_names_with_spaces_and_other_scripts_work_and_a_line_break_stays_one_line(tmp_path):
    for name in ("a b;c.png", "胸部 снимок é.png", "x" * 200 + ".png"):
        np.testing.assert_array_equal(read(saved(tmp_path / name, png(GREY))).array[..., 0], GREY)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a\nb.png")
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_kept_but_an_image_without_others_is_refused(tmp_path):
    array = VOLUME.copy()
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    np.testing.assert_array_equal(read(nifti(tmp_path / "a.nii", array)).array[..., 0], array)
    refused(nifti(tmp_path / "a.nii", np.full_like(VOLUME, np.nan)), "no finite value")
    refused(nifti(tmp_path / "a.nii", VOLUME.astype("f8") * 1e200), "overflow")


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(tmp_path):
    picture = pillow.frombytes("P", (5, 7), GREY.tobytes())
    picture.putpalette(bytes(range(256)) * 3)
    picture.save(tmp_path / "a.png", transparency=bytes(range(256)))
    pictures = [tmp_path / "a.png", dicom(tmp_path / "a.dcm"), nifti(tmp_path / "a.nii.gz")] * 30
    before = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, pictures))
    assert warnings.filters == before


# Channels and masks


def test_several_files_are_channels_in_order(tmp_path):
    paths = [nifti(tmp_path / f"{i}.nii.gz", VOLUME + i) for i in range(3)]
    image = read_image(paths)
    np.testing.assert_array_equal(image.array, np.stack([VOLUME, VOLUME + 1, VOLUME + 2], -1))
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    pictures = [saved(tmp_path / "a.png", png(GREY)), saved(tmp_path / "b.png", png(DEEP))]
    assert read_image(pictures).bits is None and read_image(pictures[:1]).bits == 8
    with pytest.raises(InputError, match="no file given"):
        read_image([])


def test_channels_and_masks_on_another_grid_are_refused(tmp_path):
    image, marks = nifti(tmp_path / "a.nii"), np.float32(VOLUME > 0)
    moved, mirrored = AFFINE.copy(), AFFINE @ np.diag([-1, 1, 1, 1])
    moved[0, 3] += 0.5
    within = AFFINE.copy()
    within[0, 3] += 1e-3
    for other, word in (
        (nifti(tmp_path / "b.nii", marks[:, :, :3]), "size (6, 5, 3)"),
        (nifti(tmp_path / "c.nii", marks, affine=moved), "0.5 mm"),
        (nifti(tmp_path / "d.nii", marks, affine=mirrored), "mm away"),
        (saved(tmp_path / "e.png", png(GREY)), "size (7, 5)"),
    ):
        with pytest.raises(InputError, match=f"^{other}: .*: ") as caught:
            read_image([image, other])
        assert word in str(caught.value)
        with pytest.raises(InputError, match=f"^{other}: .*: ") as caught:
            read_mask(other, like=read_image(image))
        assert word in str(caught.value)
    read_image([image, nifti(tmp_path / "f.nii", affine=within)])


def test_a_mask_is_true_above_0_in_any_channel_but_alpha(tmp_path):
    marks = GREY > 200
    rgba = np.zeros((7, 5, 4), np.uint8)
    rgba[..., 1], rgba[..., 3] = marks * 3, 255
    for path in (
        saved(tmp_path / "a.png", png(marks.astype(np.uint8))),
        saved(tmp_path / "b.png", png(rgba)),
        saved(tmp_path / "c.png", png(marks)),
        nifti(tmp_path / "d.nii", np.where(marks.T, 5, np.where(GREY.T > 100, -1, np.nan)).astype("f4")),
    ):
        mask = read_mask(path)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, marks)


def test_a_jpeg_mask_with_soft_edges_is_refused(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    pillow.fromarray(mask).save(tmp_path / "empty.jpg")
    assert not read_mask(tmp_path / "empty.jpg").any()
    mask[5:20, 9:23] = 255
    pillow.fromarray(mask).save(tmp_path / "a.jpg", quality=75)
    refused(tmp_path / "a.jpg", "PNG", by=read_mask)


# Maps


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_map_has_exactly_the_grid_of_its_volume(tmp_path, kind):
    for case in range(25):
        size = tuple(RNG.integers(2, 12, 3))
        affine = np.eye(4)
        affine[:3] = RNG.normal(size=(3, 4)) * [1, 1, 1, 50]
        source = kind(RNG.normal(size=size).astype("f4"), None)
        source.header.set_sform(affine, code=int(RNG.integers(0, 5)))
        source.header.set_qform(affine, code=int(RNG.integers(0, 5)))
        source.header.set_xyzt_units(("mm", "meter", "micron")[case % 3])
        source.to_filename(tmp_path / "a.nii.gz")
        image = read_image(tmp_path / "a.nii.gz")
        values = RNG.normal(size=size).astype("f4")
        values[0, 0, 0] = np.nan
        path = write_map(tmp_path / "a.b_anomaly", values, image)
        assert path == tmp_path / "a.b_anomaly.nii.gz"
        written = nib.load(path)
        assert written.get_data_dtype() == np.float32
        np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), values)
        for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "pixdim"):
            np.testing.assert_array_equal(written.header[field], source.header[field].astype("f4"))
        assert written.header.get_xyzt_units() == source.header.get_xyzt_units()


def test_a_map_of_a_volume_from_elsewhere_has_its_affine_or_no_position(tmp_path):
    array = VOLUME[..., None]
    shear = AFFINE.copy()
    shear[0, 2] = 0.5
    for affine in (AFFINE, shear):
        written = nib.load(write_map(tmp_path / "a", VOLUME, Image(array, (1.0,) * 3, affine, None)))
        np.testing.assert_allclose(written.affine, affine, atol=1e-6)
        codes = int(written.header["sform_code"]), int(written.header["qform_code"])
        assert codes == ((1, 1) if affine is AFFINE else (1, 0))
    written = nib.load(write_map(tmp_path / "a", VOLUME, Image(array, (0.5, 1.0, 2.0), None, None)))
    assert written.header["sform_code"] == written.header["qform_code"] == 0
    assert written.header.get_zooms() == (0.5, 1.0, 2.0)


def test_a_map_of_a_picture_is_a_32_bit_tiff(tmp_path):
    values = RNG.normal(size=(7, 5)).astype("f4")
    path = write_map(tmp_path / "a", values, read_image(saved(tmp_path / "a.png", png(GREY))))
    assert path == tmp_path / "a.tif"
    np.testing.assert_array_equal(np.asarray(pillow.open(path)), values)
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        write_map(tmp_path / "a", values.T, read_image(tmp_path / "a.png"))


def test_a_map_of_several_channels_is_one_file_on_the_same_grid(tmp_path):
    image = read_image(nifti(tmp_path / "a.nii", pixdim=(1, 0.7, 0.8, 2.5, 9)))  # as written from a series in time
    values = RNG.normal(size=(6, 5, 4, 2)).astype("f4")
    elsewhere = Image(image.array, image.spacing, AFFINE, None)
    unplaced = Image(image.array, (0.5, 1.0, 2.0), None, None)
    for like, affine in ((image, AFFINE), (elsewhere, AFFINE), (unplaced, None)):
        written = nib.load(write_map(tmp_path / "m", values, like))
        np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), values)
        if affine is not None:
            np.testing.assert_allclose(written.affine, affine, atol=1e-6)
        assert written.header.get_zooms()[:3] == pytest.approx(like.spacing) and written.header.get_zooms()[3] == 1
        single = nib.load(write_map(tmp_path / "m", values[..., :1], like))
        np.testing.assert_array_equal(single.get_fdata(dtype=np.float32), values[..., 0])
    for shape in ((6, 5), (5, 6, 4, 2), (6, 5, 4, 1, 2)):
        with pytest.raises(ValueError, match="for an image of size"):
            write_map(tmp_path / "m", np.zeros(shape), image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_a_picture_of_several_channels_is_a_tiff_with_channels_last(tmp_path, channels):
    values = RNG.normal(size=(7, 5, channels)).astype("f4")
    path = write_map(tmp_path / "a", values, read_image(saved(tmp_path / "a.png", png(GREY))))
    np.testing.assert_array_equal(read(path).array, values)
    assert tifffile.imread(path).shape == ((7, 5, channels) if channels > 1 else (7, 5))


def test_equal_maps_are_equal_files(tmp_path):
    image = read_image(nifti(tmp_path / "a.nii"))
    first = write_map(tmp_path / "b", VOLUME, image).read_bytes()
    assert write_map(tmp_path / "c", VOLUME, image).read_bytes() == first


@pytest.mark.parametrize("shape", [(7, 5), (6, 5, 4)])
def test_a_failed_write_is_one_line_and_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, shape):
    like = Image(np.zeros((*shape, 1), "f4"), None, None, None)
    path = write_map(tmp_path / "a", np.zeros(shape), like)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*: free space"):
        write_map(tmp_path / "a", np.ones(shape), like)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    with pytest.raises(InputError, match="none/a"):
        write_map(tmp_path / "none" / "a", np.ones(shape), like)


def test_reading_back_a_map_gives_its_values_and_grid(tmp_path):
    for source in (nifti(tmp_path / "a.nii"), saved(tmp_path / "a.png", png(GREY))):
        image = read_image(source)
        again = read_image(write_map(tmp_path / "m", image.array[..., 0] / 3, image))
        np.testing.assert_array_equal(again.array, image.array / np.float32(3))
        if image.affine is not None:
            np.testing.assert_array_equal(again.affine, image.affine)


def test_zip_members_are_not_paths(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, GREY)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../../outside.npy", buffer.getvalue())
    np.testing.assert_array_equal(read(tmp_path / "a.npz").array[..., 0], GREY)
    assert sorted(os.listdir(tmp_path)) == ["a.npz"] and not list(itertools.islice(tmp_path.parent.glob("outside*"), 1))


def test_what_a_decoder_logs_does_not_reach_the_user(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "a.tif", np.eye(64, dtype=np.uint8), description="x" * 50, metadata=None)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    entry = data.index(struct.pack("<HH", 270, 2))  # the description's: tag, type, count, offset
    data[entry + 8 : entry + 12] = struct.pack("<I", 2**31 - 1)
    (tmp_path / "a.tif").write_bytes(data)
    with contextlib.suppress(InputError):
        read_image(str(tmp_path / "a.tif"))
    assert not caplog.records


def test_an_interlaced_png_is_read_and_one_of_other_rows_refused(tmp_path):
    """Adam7 by its definition: seven smaller images, each row behind a filter byte."""
    array = np.arange(7 * 11, dtype=np.uint8).reshape(7, 11)
    starts = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    rows = b"".join(b"\0" + bytes(row) for x, dx, y, dy in starts for row in array[y::dy, x::dx])
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def write(height):
        head = struct.pack(">IIBBBBB", 11, height, 8, 0, 0, 0, 1)
        parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
        return tmp_path / "x.png"

    np.testing.assert_array_equal(read_image(write(7)).array[..., 0], array)
    for height in (6, 8, 70):
        with pytest.raises(InputError, match="which does not fit its data"):
            read_image(write(height))
