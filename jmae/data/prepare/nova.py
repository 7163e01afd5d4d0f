"""NOVA (Bercea et al. 2025, Hugging Face c-i-ber/Nova): brain MRI slices of rare diseases with boxes; for evaluation.

data/nova-v1.parquet has a row for each image: `filename`, `case_id` and `bboxes`, a list of x, y, width, height and
source (gold or a rater). The rows are not in the order of the images, so the file name joins them. The gold boxes
count, and those of all raters where an image has no gold. All images are abnormal test images: no image is normal.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.tables import boxes_of
from jmae.data.prepare.tree import PICTURES, Images, files_below
from jmae.errors import InputError

NEEDED = ("filename", "case_id", "bboxes")


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    tables = files_below(root, (".parquet",))
    if len(tables) != 1:
        raise InputError(f"{root}: has {len(tables)} files .parquet: copy data/nova-v1.parquet there, once")
    images, rows, left_out = Images(root, PICTURES), [], Counter[str]()
    for line in read_parquet(tables[0]):
        if any(name not in line for name in NEEDED):
            raise InputError(f"{tables[0]}: has no column {next(n for n in NEEDED if n not in line)}: copy it again")
        found = images.find(str(line["filename"]), tables[0].name)
        try:
            boxes = [one for one in line["bboxes"] or () if one["source"] == "gold"] or list(line["bboxes"] or ())
            corners = [[one["x"], one["y"], one["x"] + one["width"], one["y"] + one["height"]] for one in boxes]
        except (KeyError, TypeError):
            what = "the boxes have no x, y, width, height and source"
            raise InputError(f"{tables[0]}: {line['filename']}: {what}: copy nova-v1.parquet again") from None
        if found and not corners:
            left_out["images without a box"] += 1
        elif found:
            case = str(line["case_id"])
            rows.append(Row(found.stem, case, "test", 1, (str(found),), boxes=boxes_of(corners), extra={"case": case}))
    refuse(images.problems)
    caution = "no normal image: only figures of where lesions lie count, none of whole images"
    return Prepared(rows, f"{len(rows)} images with boxes", left_out, caution=caution, licence="CC BY-NC-SA 4.0")


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file. Raises InputError without pyarrow, or where the file is damaged."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("NOVA's table is a Parquet file: pip install 'jmae[sets]'") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        raise InputError(f"{path}: not a Parquet file ({error}): copy it again".replace("\n", " ")) from None
