"""Files that ask for more memory or time than they are worth, and headers that lie about a scanner's grid."""

import io
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pydicom
import pytest
from ml_collections import ConfigDict
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileMetaDataset

from jmae import recipe
from jmae.data.files import read_image
from jmae.data.manifest import Row
from jmae.data.preparation import open_case, prepared_volume
from jmae.errors import InputError
from jmae.tensors import read_tensors

PEAK = """
import re, sys
from pathlib import Path
from jmae.data.files import read_image
from jmae.errors import InputError
of = lambda name: int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, size = of("VmRSS"), 0
try:
    size = read_image(sys.argv[1]).array.nbytes
except InputError as error:
    print(error, file=sys.stderr)
print(of("VmHWM") - before, size)
"""


def peak_of(path) -> tuple[int, int, str]:
    """(bytes at the peak of reading a file, bytes of its float32 image, what was said), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return *map(int, done.stdout.split()), done.stderr


def deflated(path, *, preamble: bool, inflated: int):
    """A deflated DICOM whose data set inflates to so many bytes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    head = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(head, meta)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(inflated // 2**20)) + packer.flush()
    path.write_bytes((bytes(128) + b"DICM") * preamble + head.getvalue() + body)
    return path


@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.long_but_first
def test_a_deflated_dicom_is_refused_before_it_is_inflated(tmp_path, preamble):
    file = deflated(tmp_path / "a.dcm", preamble=preamble, inflated=2**29)
    assert file.stat().st_size < 2**20
    peak, size, said = peak_of(file)
    assert size == 0 and "is a deflated DICOM" in said and peak < 100e6


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "jpg"])
@pytest.mark.long_but_first
def test_a_picture_takes_little_more_memory_than_its_float32_array(tmp_path, kind):
    """Half of the largest picture, so that half of 300 MB is the bound."""
    picture = Image.new("RGB" if kind == "jpg" else kind, (4096, 4096), 77 if kind in "LP" else (1, 2, 3))
    file = tmp_path / ("a.jpg" if kind == "jpg" else "a.png")
    picture.save(file, **({} if kind == "jpg" else {"compress_level": 1}))
    peak, size, said = peak_of(file)
    assert size == 4 * 4096**2 * (1 if kind in "LP" else 3) and said == ""
    assert peak - size < 150e6


def test_a_picture_beyond_the_limit_is_refused():
    for size in ((2**13, 2**12 + 1), (2**26, 1)):
        with pytest.raises(InputError, match="beyond the limit"):
            with_png_header(size)


def with_png_header(size):
    from jmae.data.files.guard import Refused, check_claim

    try:
        check_claim(size, 1, 2**40)
    except Refused as refused:
        raise InputError(str(refused)) from None


def volume(path, spacing=(1, 1, 1), unit="mm", **fields):
    image = nib.Nifti1Image(np.random.default_rng(0).random((16, 16, 8), np.float32), np.diag([*spacing, 1]))
    image.header.set_xyzt_units(unit)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def small3d() -> ConfigDict:
    config = recipe.load("configs/maemi.py:small")
    config.data.channels, config.data.spacing = 1, (1.0, 1.0, 1.0)
    return config.data


@pytest.mark.parametrize(
    "spacing, unit",
    [
        ((1, 1, 1), "meter"),
        ((1e30, 1, 1), "mm"),
        ((1e-30, 1, 1), "mm"),
        ((900, 900, 900), "mm"),
        ((999, 1e-5, 1), "mm"),
    ],
)
def test_a_lying_spacing_is_refused_before_memory_is_taken(tmp_path, spacing, unit):
    row = Row("a", "", "test", 0, (str(volume(tmp_path / "a.nii.gz", spacing, unit)),))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"a\.nii\.gz: (spacing|size) .* (repair the header|repair its header)"):
        prepared_volume(row, small3d(), open_case(row, small3d()))
    assert time.monotonic() - began < 5


def test_a_volume_of_a_usual_spacing_is_resampled(tmp_path):
    row = Row("a", "", "test", 0, (str(volume(tmp_path / "a.nii.gz", (2, 2, 3))),))
    assert sorted(prepared_volume(row, small3d(), open_case(row, small3d())).array.shape) == [1, 24, 32, 32]


def test_an_nrrd_header_of_a_million_lines_is_refused_at_once(tmp_path):
    file = tmp_path / "a.nrrd"
    began = time.monotonic()
    for body in (b"# x\n" * 10**6, b"a:=b\n" * 10**6, b"#" * 10**7):
        file.write_bytes(
            b"NRRD0004\ntype: float\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n" + body + b"\n\n" + bytes(32)
        )
        with pytest.raises(InputError, match="has a header of more than"):
            read_image(file)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "opcodes", [b"(" * 10**6, b"]" + b"]a" * 0 + b"]" * 10**6 + b"a" * 10**6, b"N" + b"\x85" * 10**6]
)
def test_a_pickle_that_is_nested_a_million_deep_is_one_line(tmp_path, opcodes):
    file = tmp_path / "a.pth"
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("a/version", "3")
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        read_tensors(file)
    assert "\n" not in str(error.value) and time.monotonic() - began < 30
