"""JSRT, the chest radiographs of the Japanese Society of Radiological Technology (Shiraishi et al., AJR 2000).

The data set has 247 radiographs of 2048 x 2048 pixels of 0.175 mm. A file has 12-bit values in big-endian uint16 and no
header; dense tissue has low values. 154 radiographs have a nodule (JPCLNxxx.IMG), 93 have none (JPCNNxxx.IMG). Each is
of another patient. CLNDAT_EN.txt has a record for each image with a nodule: name, subtlety, size in mm, age, sex, x, y,
malignant or benign, place, diagnosis. CNNDAT_EN.txt has name, age, sex and "non-nodule".

Kaggle has the images as JPCLNxxx.png, with jsrt_metadata.csv (study_id, gender, state, diagnosis) instead of tables;
others have them as DICOM. Such files stay where they are. Without CLNDAT_EN.txt there are no boxes.

The splits are those of P-PII: 19 normals (a seeded draw) and all nodules are the test, and the other normals train.
"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmae.data.files import image_size
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, draw, refuse
from jmae.data.prepare.tables import table_of, text_of
from jmae.data.prepare.tree import walk
from jmae.data.slices import write_png
from jmae.errors import InputError

SIDE = 2048  # pixels
PIXEL_MM = 0.175
FULL = 4095  # the largest value of 12 bits
MOST_ABOVE = 0.01  # largest share of pixels above FULL in an original file
TEST_NORMALS = 19
METADATA = "JSRT_METADATA.CSV"
WORKERS = min(8, os.cpu_count() or 1)
FIELDS = ("subtlety", "size_mm", "age", "sex", "nodule")  # columns of the manifest; a "?" of the table becomes empty


class Record(NamedTuple):
    """A line of a table."""

    name: str  # JPCLN001
    extra: dict[str, str]  # `FIELDS`
    box: tuple[float, ...] | None = None  # x0 y0 x1 y1


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes each image as `out`/images/NAME.png. Raises InputError with all problems."""
    files: dict[str, list[Path]] = {}
    for folder, names in walk(root):
        for name in names:
            files.setdefault(name.upper(), []).append(folder / name)
    ending = next((end for end in (".IMG", ".PNG", ".DCM") if any(is_film(name, end) for name in files)), ".IMG")
    records = read_metadata(files[METADATA][0]) if is_kaggle(files) else read_tables(root, files)
    problems, normals = [], [record for record in records if not has_nodule(record)]
    if len(normals) <= TEST_NORMALS:
        problems.append(f"{root}: {len(normals)} normals, and the test needs {TEST_NORMALS}: copy the whole data set")
    listed = {f"{record.name}{ending}" for record in records}
    for name in sorted(listed | {name for name in files if is_film(name, ending)}):
        there = files.get(name, [])
        if not there:
            problems.append(f"{name}: listed in the tables but not found below {root}: copy it there")
        elif len(there) > 1:
            problems.append(f"{there[1]}: also lies in {there[0].parent}: keep one of them")
        elif name not in listed:
            problems.append(f"{there[0]}: listed in neither table: copy the tables again, or move the file out")
        elif ending == ".IMG" and (size := there[0].stat().st_size) != 2 * SIDE**2:
            whole = f"{SIDE} x {SIDE} pixels of 16 bits are {2 * SIDE**2}"
            problems.append(f"{there[0]}: has {size} bytes, but {whole}: copy the original again")
    refuse(problems)

    def convert(record: Record) -> str:
        path = files[f"{record.name}{ending}"][0]
        try:
            if ending != ".IMG":
                return str(path)
            return write_png(out / "images" / f"{record.name}.png", read_radiograph(path))
        except InputError as error:
            problems.append(str(error))
            return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        written = list(pool.map(convert, records))
    refuse(sorted(problems))
    test = {record.name for record in draw(normals, TEST_NORMALS, seed, lambda record: record.name)}
    rows = [
        Row(
            id=record.name,
            patient=record.name,  # one image a patient
            split="test" if has_nodule(record) or record.name in test else "train",
            label=int(has_nodule(record)),
            image=(path,),
            boxes=(scaled(record.box, path),) if record.box else (),
            extra=record.extra,
        )
        for record, path in zip(records, written, strict=True)
    ]
    found = f"{len(records) - len(normals)} radiographs with a nodule, {len(normals)} without"
    caution = (
        "" if ending == ".IMG" else f"{ending} files are used as they are: look whether lungs are dark, as in a film"
    )
    return Prepared(
        rows, found, Counter(), caution=caution, recipe="ppii:paper", licence="JSRT: registration, research use"
    )


def is_film(name: str, ending: str) -> bool:
    return bool(re.fullmatch(rf"JPC[LN]N\d+\{ending}", name))


def has_nodule(record: Record) -> bool:
    return record.name.startswith("JPCL")


def is_kaggle(files: dict[str, list[Path]]) -> bool:
    """Whether there is Kaggle's table, and not the original ones."""
    return METADATA in files and not {"CLNDAT_EN.TXT", "CNNDAT_EN.TXT"} & files.keys()


def scaled(box: tuple[float, ...], path: str) -> tuple[float, ...]:
    """A box of the original pixels in the pixels of a file that may be smaller."""
    rows, columns = image_size(path)
    factors = (columns / SIDE, rows / SIDE) * 2
    return tuple(x * factor for x, factor in zip(box, factors, strict=True))


def read_metadata(table: Path) -> list[Record]:
    """The records of Kaggle's table, sorted by name, without boxes. Raises InputError where names are of other form."""
    records = []
    for row in table_of(table, "study_id", "state"):
        name = row["study_id"].upper().removesuffix(".PNG")
        nodule = "" if row["state"].lower() == "non-nodule" else row["state"].lower()
        if not is_film(f"{name}.PNG", ".PNG") or name.startswith("JPCL") != bool(nodule):
            raise InputError(f"{table}: {row['study_id']!r} is {row['state']!r}: copy the table again")
        extra = dict.fromkeys(FIELDS, "") | {"sex": row.get("gender", "").lower(), "nodule": nodule}
        records.append(Record(name, extra))
    return sorted(records)


def read_radiograph(path: Path) -> np.ndarray:
    """A radiograph as uint16 (SIDE, SIDE): round(65535 * (1 - value / 4095)), so 0 is air. Raises InputError."""
    try:
        raw = np.fromfile(path, ">u2").reshape(SIDE, SIDE)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror or error}): copy the original again") from None
    if np.count_nonzero(raw > FULL) > MOST_ABOVE * raw.size:
        raise InputError(f"{path}: has values up to {raw.max()}, above {FULL} of 12 bits: copy the original again")
    inverted = 1 - np.minimum(raw, FULL) / FULL
    return np.round(inverted * 65535).astype(np.uint16)


def read_tables(root: Path, files: dict[str, list[Path]]) -> list[Record]:
    """The records of both tables, sorted by name. `files` has the paths of each upper-case file name.

    Raises InputError with all problems.
    """
    records: dict[str, Record] = {}
    problems = []
    for table, letter in (("CLNDAT_EN.TXT", "L"), ("CNNDAT_EN.TXT", "N")):
        if table not in files:
            problems.append(f"{table}: not found below {root}: copy the Clinical_Information of JSRT there")
            continue
        path = files[table][0]
        # Some records lack their line end, so names separate them.
        parts = re.split(rf"(JPC{letter}N\d+)\.IMG", text_of(path), flags=re.IGNORECASE)[1:]
        if not parts:
            problems.append(f"{path}: names no JPC{letter}Nxxx.IMG: copy the table again")
        for name, rest in zip(parts[::2], parts[1::2], strict=True):
            try:
                records[name.upper()] = _nodule(name.upper(), rest) if letter == "L" else _normal(name.upper(), rest)
            except (ValueError, IndexError):
                what = f"record {name}{rest[:60].rstrip()!r} lacks size or place" if letter == "L" else name
                problems.append(f"{path}: {what}: copy the table again")
    refuse(problems)
    return [records[name] for name in sorted(records)]


def _nodule(name: str, rest: str) -> Record:
    """A record with a nodule. Its box is centred at (x, y), size / 0.175 pixels wide and high, clipped to the image."""
    subtlety, size, age, sex, x, y, kind = rest.split()[:7]
    half = float(size) / PIXEL_MM / 2
    ends = [float(np.clip(float(v) + sign * half, 0, SIDE)) for sign in (-1, 1) for v in (x, y)]
    if not (half > 0 and ends[0] < ends[2] and ends[1] < ends[3]):
        raise ValueError("no box inside the image")
    values = (subtlety, size, age.replace("?", ""), sex.lower(), kind.lower())
    return Record(name, dict(zip(FIELDS, values, strict=True)), tuple(ends))


def _normal(name: str, rest: str) -> Record:
    age, sex = [*rest.split(), "", ""][:2]
    return Record(name, dict(zip(FIELDS, ("", "", age.replace("?", ""), sex.lower(), ""), strict=True)))
