"""CSV text whose cells no spreadsheet runs as formulas; counts in words."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV, with fractions as `fraction` writes them. Text that a spreadsheet would run as a
    formula begins with an apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: harmless(cell) for key, cell in row.items()} for row in rows)
    return text.getvalue()


FORMULA = re.compile(r"'*[=+\-@\t\r]")


def harmless(cell: Any) -> Any:
    """A cell of text with an apostrophe before what would begin a formula; a fraction with nine digits."""
    if isinstance(cell, Real) and not isinstance(cell, Integral):  # of Python or NumPy
        return fraction(float(cell))
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def fraction(number: float) -> str:
    """A number with nine digits: two different float32 never look the same."""
    return f"{number:.9g}"


NOUN = re.compile(
    r"\b(case|cell|file|finding|group|image|label|lesion|map|mask|minute|normal|patient|positive|result|row|run|scan|score|"
    r"sequence|session|slice|stage|subject|volume)s\b"
)


def counted(n: int, what: str) -> str:
    """A number with its noun, which is given in the plural: "2 cases of it", "1 case of it"."""
    noun, of, rest = what.partition(" of ")
    noun = NOUN.sub(r"\1", noun, count=1) if n == 1 else noun
    return f"{n} {noun}{of}{rest}"


def plain(cell: str) -> str:
    """The text of which `harmless` made a cell."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
