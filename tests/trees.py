"""Small data sets on disk, and what `prepare` makes of them."""

import io
import shlex
import zipfile
from collections import Counter

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom import uid

from jmae import recipe
from jmae.data import prepare
from jmae.data.manifest import parse_manifest
from jmae.data.opening import open_each
from jmae.errors import exit_code

RNG = np.random.default_rng(0)


def run(*arguments):
    return exit_code(prepare.main, list(map(str, arguments)))


def prepared(capsys, *arguments, out):
    """The rows by id, read as any recipe reads them, and what the command said.

    The command that it proposes must name a recipe and keys that exist.
    """
    assert run(*arguments, f"--out={out}") == 0, capsys.readouterr().err
    rows, _, problems = parse_manifest(out / "manifest.csv", crops=True, normal_crops_only=True)
    assert problems == [] or "--leaks=keep" in arguments
    assert open_each(rows, workers=1) == []
    said = capsys.readouterr().out
    commands = [line for line in said.splitlines() if line.startswith("next: jmae train ")]
    assert len(commands) == any(row.split == "train" for row in rows)
    for command in commands:
        words = shlex.split(command.removeprefix("next: "))
        config, flags = recipe.parse(words[2:], "", ["workdir"])
        recipe.check(config)
        assert words[:2] == ["jmae", "train"] and flags.keys() == {"workdir"}
        assert config.data.manifest == str(out / "manifest.csv")
    return {row.id: row for row in rows}, said


def refused(capsys, *arguments, out):
    assert run(*arguments, f"--out={out}") == 2
    assert not (out / "manifest.csv").exists()
    return capsys.readouterr().err.strip().split("\n")


def refused_in_one_line(capsys, *arguments, out):
    (line,) = refused(capsys, *arguments, out=out)
    return line


def picture(path, mask=False, size=(8, 9), colours=1):
    """Random values, or 0 and 255. A JPEG of either has rings around its edges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(size, np.uint8) if mask else RNG.integers(0, 256, size, np.uint8)
    values[2:4, 3:5] = 255
    if colours > 1:
        values = np.stack([values, *(RNG.integers(0, 256, size, np.uint8) for _ in range(colours - 1))], -1)
    Image.fromarray(values).save(path)
    return path


def volume(path, array=None, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.random((4, 5, 6)) if array is None else array
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.eye(4) if affine is None else affine), path)
    return path


def lesion(marked=True, value=1):
    mask = np.zeros((4, 5, 6))
    mask[1, 2, 3] = value * marked
    return mask


def kinds(rows):
    return Counter((row.split, row.label, bool(row.mask)) for row in rows.values())


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def dicom_file(path, array, **tags):
    """A DICOM file; `tags` add to its header or replace what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    one = pydicom.dataset.FileDataset("", {}, preamble=bytes(128), file_meta=meta)
    one.Rows, one.Columns = array.shape
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
    one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    one.PixelData = np.asarray(array, "<u2").tobytes()
    for name, value in tags.items():
        setattr(one, name, value)
    one.save_as(path, enforce_file_format=True)
    return path


def workbook(path, rows):
    """An Excel workbook of one sheet, with numbers as numbers and text as shared strings, as Excel writes it."""
    strings, lines = [], []
    for i, row in enumerate(rows, 1):
        cells = ""
        for k, cell in enumerate(row):
            place = f"{chr(ord('A') + k)}{i}"
            if isinstance(cell, str) and cell:
                strings.append(cell)
                cells += f'<c r="{place}" t="s"><v>{len(strings) - 1}</v></c>'
            elif cell != "":
                cells += f'<c r="{place}"><v>{cell}</v></c>'
        lines.append(f'<row r="{i}">{cells}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    escaped = [s.replace("&", "&amp;").replace("<", "&lt;") for s in strings]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as book:
        book.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        )
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(f'<si><t>{s}</t></si>' for s in escaped)}</sst>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path
