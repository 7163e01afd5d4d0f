"""DeepLesion, lesions marked in routine CT (Yan et al., Journal of Medical Imaging 2018).

Images_png/PPPPPP_SS_SS/NNN.png are 16-bit images of the key slices and the slices around them; HU = value - 32768.
DL_info.csv has one row for each lesion. File_name PPPPPP_SS_SS_NNN.png is the lesion's key slice. Bounding_boxes is
"x1, y1, x2, y2" in pixels of this slice, counted from 1 (NIH's own reader subtracts 1). The third number of
Spacing_mm_px_ is the distance between slices. Train_Val_Test is 1, 2 or 3.

The splits are those of P-PII. A slice counts as healthy where it is farther than 10 mm from every key slice of its
series. The healthy slices of the official training patients train. Not every lesion is marked, so no slice of this data
set is known to be healthy.
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
DRAWN = 500  # healthy slices, and as many key slices, in val and in test
SPLITS = {"1": "train", "2": "val", "3": "test"}
WINDOW = "--config.data.window=31744,35839"  # stored values of HU -1024 to 3071
NEEDED = ("File_name", "Bounding_boxes", "Spacing_mm_px_", "Train_Val_Test")


class Lesion(NamedTuple):
    """A row of DL_info.csv."""

    folder: str  # PPPPPP_SS_SS
    slice: int
    box: tuple[float, ...]  # x0 y0 x1 y1
    step_mm: float
    split: str


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
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
            left_out["series without a folder"] += 1
            continue
        marks, split = series[name], series[name][0].split
        numbers = np.array(sorted(int(f[:-4]) for f in os.listdir(folders[name]) if re.fullmatch(r"\d+\.png", f)), int)
        mm = np.min([distance(numbers, np.array([m.slice])) * m.step_mm for m in marks], axis=0)
        marked = sorted({m.slice for m in marks})
        for k in sorted(set(marked) - set(numbers.tolist())):
            problems.append(f"{folders[name] / f'{k:03d}.png'}: this key slice is not found: copy the folder again")
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
        if split != "train":  # ours: val, which only chooses the threshold, is drawn in the same way
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
    return Prepared(rows, found, left_out, WINDOW, recipe="ppii:paper", licence="NIH: free, cite the source")


def read_lesions(path: Path) -> list[Lesion]:
    """The rows of DL_info.csv. Raises InputError with all problems."""
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
            if not name or len(box) != 4 or not 0 < abs(spacing[2]) < np.inf or not np.isfinite(box).all():
                raise ValueError
            split = SPLITS[row["Train_Val_Test"].strip()]
            from_0 = tuple(x - 1 for x in box)
            lesions.append(Lesion(name[1], int(name[2]), from_0, abs(spacing[2]), split))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            problems.append(
                f"{path}: line {table.line_num}: needs PPPPPP_SS_SS_NNN.png, a box of four numbers, a spacing of "
                "three and a split 1 to 3: copy the original again"
            )
    splits: dict[str, set[str]] = defaultdict(set)
    for lesion in lesions:
        splits[lesion.folder.split("_")[0]].add(lesion.split)
    for patient, found in splits.items():
        if len(found) > 1:
            problems.append(f"{path}: patient {patient} is in {' and '.join(sorted(found))}: copy the original again")
    refuse(problems)
    if not lesions:
        raise InputError(f"{path}: empty table: copy the original again")
    return lesions


def _folders(root: Path) -> dict[str, Path]:
    """The folder of each series. The parts of the download (Images_png_01, ...) may lie beside each other."""
    found: dict[str, Path] = {}
    for pattern in ("Images_png*", "Images_png*/Images_png*"):
        for part in sorted(root.glob(pattern)):
            if part.is_dir():
                found |= {entry.name: Path(entry.path) for entry in os.scandir(part) if entry.is_dir()}
    if not found:
        raise InputError(f"{root / 'Images_png'}: not found or empty: unpack the images of DeepLesion there")
    return found


def _inside(boxes: list[tuple[float, ...]], path: Path) -> tuple[tuple[float, ...], ...]:
    """Boxes clipped to their image; some extend a little beyond it.

    Raises InputError where a box lies outside.
    """
    rows, columns = image_size(path)
    cut = [tuple(np.clip(box, 0, (columns, rows, columns, rows)).tolist()) for box in boxes]
    if any(box[0] >= box[2] or box[1] >= box[3] for box in cut):
        raise InputError(f"{path}: box {boxes} lies outside of the {columns} x {rows} pixels: repair DL_info.csv")
    return tuple(cut)
