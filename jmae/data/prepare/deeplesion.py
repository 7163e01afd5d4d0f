"""DeepLesion, lesions marked in routine CT (Yan et al., Journal of Medical Imaging 2018).

Images_png/PPPPPP_SS_SS/NNN.png are 16-bit, HU = value - 32768: key slices and the slices around them. DL_info.csv has
a row a lesion; File_name PPPPPP_SS_SS_NNN.png is its key slice, Bounding_boxes "x1, y1, x2, y2" in its pixels, the
third number of Spacing_mm_px_ the distance between slices, Train_Val_Test 1, 2 or 3.

Splits as P-PII has them: slices farther than 10 mm from every key slice of their series count as healthy; those of the
official training patients train. Lesions beside the marked ones exist: no slice of this set is known to be healthy.
"""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmae.data.files import image_size
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, draw, refuse, text_of
from jmae.data.slices import distance
from jmae.errors import InputError

MARGIN_MM = 10.0
DRAWN = 500  # healthy slices and key slices each, of val and of test
SPLITS = {"1": "train", "2": "val", "3": "test"}
WINDOW = "--config.data.window=31744,35839"  # HU -1024 to 3071 as stored
NEEDED = ("File_name", "Bounding_boxes", "Spacing_mm_px_", "Train_Val_Test")


class Lesion(NamedTuple):
    """A row of DL_info.csv."""

    folder: str  # PPPPPP_SS_SS
    slice: int
    box: tuple[float, ...]  # x0 y0 x1 y1
    step_mm: float
    split: str


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """The rows; nothing is written. Raises InputError with all problems."""
    lesions = read_lesions(root / "DL_info.csv")
    folders = _folders(root)
    series: dict[str, list[Lesion]] = defaultdict(list)
    for lesion in lesions:
        series[lesion.folder].append(lesion)
    left_out, problems = Counter[str](), []
    healthy: dict[str, list[tuple[str, int]]] = defaultdict(list)
    keys: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name in sorted(series):
        if name not in folders:
            left_out["series whose folder is not there"] += 1
            continue
        marks, split = series[name], series[name][0].split
        numbers = np.array(sorted(int(f[:-4]) for f in os.listdir(folders[name]) if re.fullmatch(r"\d+\.png", f)), int)
        mm = np.min([distance(numbers, np.array([m.slice])) * m.step_mm for m in marks], axis=0)
        marked = sorted({m.slice for m in marks})
        for k in sorted(set(marked) - set(numbers.tolist())):
            problems.append(f"{folders[name] / f'{k:03d}.png'}: not found, but a key slice: copy the folder again")
        free = mm > MARGIN_MM + 1e-6
        healthy[split] += [(name, int(k)) for k in numbers[free]]
        left_out["slices within 10 mm of a key slice"] += int(np.count_nonzero(~free)) - len(marked)
        if split == "train":
            left_out["key slices of training patients"] += len(marked)
        else:
            keys[split] += [(name, k) for k in marked]
    refuse(problems)

    title = lambda one: f"{one[0]}_{one[1]:03d}"
    rows = []
    for split in SPLITS.values():
        pools = [healthy[split], keys[split]]
        if split != "train":  # ours: val is drawn as the test is, it only chooses the threshold
            pools = [draw(pool, DRAWN, seed, title) for pool in pools]
            left_out[f"{split} slices not drawn"] += sum(map(len, (healthy[split], keys[split]))) - sum(map(len, pools))
        for label, pool in enumerate(pools):
            for name, k in pool:
                path = folders[name] / f"{k:03d}.png"
                boxes = _inside([m.box for m in series[name] if m.slice == k], path) if label else ()
                extra = {"case": name, "slice": str(k)}
                rows.append(
                    Row(title((name, k)), name.split("_")[0], split, label, (str(path),), boxes=boxes, extra=extra)
                )
    found = f"{len(lesions)} lesions, {sum(name in folders for name in series)} of {len(series)} series"
    return Prepared(rows, found, left_out, WINDOW)


def read_lesions(path: Path) -> list[Lesion]:
    """All rows of DL_info.csv; raises InputError with all problems."""
    if not path.is_file():
        raise InputError(f"{path}: not found: copy DL_info.csv of DeepLesion there")
    table = csv.DictReader(io.StringIO(text_of(path), newline=""), skipinitialspace=True)
    if missing := [column for column in NEEDED if column not in (table.fieldnames or ())]:
        raise InputError(f"{path}: has no column {missing[0]}: copy the original again")
    lesions, problems = [], []
    for row in table:
        try:
            name = re.fullmatch(r"(\d+_\d+_\d+)_(\d+)\.png", row["File_name"].strip())
            box, spacing = ([float(x) for x in row[column].split(",")] for column in NEEDED[1:3])
            if not name or len(box) != 4 or not 0 < spacing[2] < np.inf or not np.isfinite(box).all():
                raise ValueError
            split = SPLITS[row["Train_Val_Test"].strip()]
            lesions.append(Lesion(name[1], int(name[2]), tuple(box), spacing[2], split))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            problems.append(
                f"{path}: line {table.line_num}: not PPPPPP_SS_SS_NNN.png with a box of four numbers, three of spacing "
                "and a split 1 to 3: copy the original again"
            )
    splits: dict[str, set[str]] = defaultdict(set)
    for lesion in lesions:
        splits[lesion.folder.split("_")[0]].add(lesion.split)
    for patient, found in splits.items():
        if len(found) > 1:
            problems.append(f"{path}: patient {patient} is in {' and '.join(sorted(found))}: copy the original again")
    refuse(problems)
    if not lesions:
        raise InputError(f"{path}: has no row: copy the original again")
    return lesions


def _folders(root: Path) -> dict[str, Path]:
    """The folder of each series; the parts of the download, Images_png_01 and so on, may lie beside each other."""
    found: dict[str, Path] = {}
    for pattern in ("Images_png*", "Images_png*/Images_png*"):
        for part in sorted(root.glob(pattern)):
            if part.is_dir():
                found |= {entry.name: Path(entry.path) for entry in os.scandir(part) if entry.is_dir()}
    if not found:
        raise InputError(f"{root / 'Images_png'}: not found or empty: unpack the images of DeepLesion there")
    return found


def _inside(boxes: list[tuple[float, ...]], path: Path) -> tuple[tuple[float, ...], ...]:
    """Boxes cut at the edges of their image; some stick out a little."""
    rows, columns = image_size(path)
    cut = [tuple(np.clip(box, 0, (columns, rows, columns, rows)).tolist()) for box in boxes]
    if any(box[0] >= box[2] or box[1] >= box[3] for box in cut):
        raise InputError(f"{path}: its box {boxes} is not inside {columns} x {rows} pixels: repair DL_info.csv")
    return tuple(cut)
