"""Tables and lists as data sets publish them: text of unknown encoding, CSV, Excel sheets, lists of names."""

import csv
import io
import math
import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jmae.errors import InputError

MOST_XML = 2**28  # bytes of an unpacked sheet


def text_of(path: Path) -> str:
    """The text of a file, decoded as UTF-8, Shift-JIS or Latin-1, whichever fits first.

    Raises InputError where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror or error}): copy it to that place") from None
    for encoding in ("utf-8-sig", "cp932"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def names_in(path: Path) -> list[str]:
    """The names of a list, one a line. Raises InputError for an empty list and for a name that is listed twice."""
    names = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: empty list: copy the original again")
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: {twice} is listed twice: copy the original again")
    return names


def table_of(path: Path, *needed: str, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV or .xlsx table as stripped cells by stripped column name; missing cells are "".

    Of two columns with one name the first counts.

    Raises:
        InputError: the table cannot be read, lacks a needed column, or has no row.
    """
    lines = sheet(path) if path.suffix.lower() == ".xlsx" else _csv(path, delimiter)
    head = next((i for i, line in enumerate(lines[:5]) if {*needed} <= {cell.strip() for cell in line}), None)
    if head is None:
        there = {cell.strip() for cell in (lines or [[]])[0]}
        missing = next((name for name in needed if name not in there), "row")
        raise InputError(f"{path}: has no column {missing}: copy the original again")
    columns = [cell.strip() for cell in lines[head]]
    found = []
    for line in lines[head + 1 :]:
        row = dict.fromkeys(columns, "")
        for name, cell in reversed(list(zip(columns, line, strict=False))):
            row[name] = cell.strip()
        if any(row.values()):
            found.append(row)
    if not found:
        raise InputError(f"{path}: empty table: copy the original again")
    return found


def numbers(line: Mapping[str, str], names: Sequence[str], path: Path) -> list[float]:
    """The numbers in some cells of a row. Raises InputError, which names the row, where a cell holds none."""
    try:
        found = [float(line[name]) for name in names]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        row = ",".join(list(line.values())[:8])
        raise InputError(f"{path}: row {row}: {', '.join(names)} are not numbers: copy the original again")
    return found


def _csv(path: Path, delimiter: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        return [line for line in reader if line]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}: copy the original again") from None


class _NoDoctype(ET.TreeBuilder):
    """Refuses a DOCTYPE, so that no entity is expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE")


def parse_xml(data: bytes) -> ET.Element:
    """The root of an XML text. Raises ParseError, or ValueError for a DOCTYPE."""
    return ET.fromstring(data, ET.XMLParser(target=_NoDoctype()))


def sheet(path: Path) -> list[list[str]]:
    """The cells of the first sheet of an Excel workbook (.xlsx) as text; blank cells are "". Raises InputError."""
    try:
        with zipfile.ZipFile(path) as book:
            if sum(entry.file_size for entry in book.infolist()) > MOST_XML:
                raise ValueError(f"unpacks to more than {MOST_XML} bytes")
            parts = sorted(name for name in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name))
            strings = []
            if "xl/sharedStrings.xml" in book.namelist():
                strings = [_text(si) for si in parse_xml(book.read("xl/sharedStrings.xml")).iterfind("{*}si")]
            rows = []
            for row in parse_xml(book.read(parts[0])).iterfind(".//{*}row"):
                cells: dict[int, str] = {}
                for k, cell in enumerate(row.iterfind("{*}c")):
                    value = _text(cell)
                    letters = re.match(r"[A-Z]+", cell.get("r", ""))
                    cells[_column(letters[0]) if letters else k] = (
                        strings[int(value)] if cell.get("t") == "s" and value else value
                    )
                rows.append([cells.get(k, "") for k in range(max(cells, default=-1) + 1)])
            return rows
    except FileNotFoundError:
        raise InputError(f"{path}: not found: copy it there") from None
    except (OSError, zipfile.BadZipFile, ET.ParseError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not an Excel workbook ({error}): copy it again, or save it as CSV") from None


def _text(cell: ET.Element) -> str:
    """The text of a cell or string. Numbers of Excel may be written as 12.0."""
    text = "".join(part.text or "" for part in cell.iter() if part.tag.rpartition("}")[2] in ("t", "v"))
    return text.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", text) else text


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def boxes_of(corners: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Boxes x0 y0 x1 y1 without repeats, sorted. Boxes that hold no pixel are left out."""
    return tuple(sorted({tuple(map(float, box)) for box in corners if box[0] < box[2] and box[1] < box[3]}))
