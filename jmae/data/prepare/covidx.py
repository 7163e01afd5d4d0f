"""COVIDx, chest radiographs with and without COVID-19 (Wang et al., COVID-Net, Scientific Reports 2020).

A list has a line an image, `patient filename label source`; ids of patients may hold spaces, so it is split from the
right. Images are train/FILENAME and test/FILENAME. Splits as MemMC-MAE has them (Tian et al. 2022): the negatives of
the training list train, its positives are not used, the test list is the test; with train_COVIDx8B.txt and
test_COVIDx8B.txt these are the paper's 13,794, and 200 of either class. Lists of two versions share images: refused.

ours: most images are grey, the few coloured ones become so: 0.299 R + 0.587 G + 0.114 B.
"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmae.data.files import read_image
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, text_of
from jmae.data.slices import write_png
from jmae.errors import InputError

LABELS = {"negative": 0, "positive": 1}
GREY = np.array([0.299, 0.587, 0.114])
WORKERS = min(8, os.cpu_count() or 1)


class Line(NamedTuple):
    """A line of a list."""

    patient: str
    file: str
    label: int
    source: str


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Writes `out`/images/SPLIT/NAME.png of coloured images and returns the rows; raises InputError with all
    problems."""
    paths = {split: find_list(root, split) for split in ("train", "test")}
    one, other = (re.sub(r"^(train|test)_?|\.txt$", "", path.name.lower()) for path in paths.values())
    if one and other and one != other:
        what = f"{paths['train'].name} and {paths['test'].name} are of two versions, which share images"
        raise InputError(f"{root}: {what}: keep the two lists of one version")
    lists = {split: read_list(path) for split, path in paths.items()}
    twice = {line.file for line in lists["train"]} & {line.file for line in lists["test"]}
    refuse([f"{name}: is in both lists: copy the two lists of one version" for name in sorted(twice)])
    used = [(split, line) for split, lines in lists.items() for line in lines if split == "test" or not line.label]
    missing = [f"{root / s}: not found: unpack the images of COVIDx there" for s in lists if not (root / s).is_dir()]
    refuse(missing)
    there = {split: set(os.listdir(root / split)) for split in lists}
    problems = [
        f"{root / split / line.file}: not found, but in the list: copy it there"
        for split, line in used
        if line.file not in there[split]
    ]
    refuse(problems)

    def place(one: tuple[str, Line]) -> str:
        split, line = one
        path = root / split / line.file
        try:
            return in_grey(path, out / "images" / split / f"{line.file}.png")
        except InputError as error:
            problems.append(str(error))
            return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        images = list(pool.map(place, used))
    refuse(sorted(problems))
    rows = [
        Row(line.file, line.patient, split, line.label, (image,), extra={"source": line.source})
        for (split, line), image in zip(used, images, strict=True)
    ]
    counts = ", ".join(f"{len(lines)} lines for {split}" for split, lines in lists.items())
    left_out = Counter({"positives of the training list": sum(line.label for line in lists["train"])})
    return Prepared(rows, counts, left_out, caution=told_by_source(lists["test"]))


def find_list(root: Path, split: str) -> Path:
    """The one list of a split anywhere below `root`; raises InputError where there is none, or are several."""
    name = re.compile(rf"{split}(_.+)?\.txt", re.IGNORECASE)
    found = sorted(Path(folder, n) for folder, _, names in os.walk(root) for n in names if name.fullmatch(n))
    if not found:
        raise InputError(f"{root}: has no {split}_COVIDx8B.txt or {split}.txt: copy the lists of COVID-Net there")
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"{root}: has several lists for {split}: keep one of {several}")
    return found[0]


def read_list(path: Path) -> list[Line]:
    """All lines of a list; raises InputError with all problems."""
    lines, problems, seen = [], [], set[str]()
    for number, text in enumerate(text_of(path).splitlines(), 1):
        parts = text.rsplit(None, 3)
        if not parts:
            continue
        if len(parts) < 4 or parts[2] not in LABELS or Path(parts[1]).name != parts[1]:
            what = "not `patient filename label source` with a label positive or negative"
            problems.append(f"{path}: line {number}: {what}: copy the original again")
        elif parts[1] in seen:
            problems.append(f"{path}: line {number}: {parts[1]} is listed twice: copy the original again")
        else:
            lines.append(Line(parts[0].strip(), parts[1], LABELS[parts[2]], parts[3]))
            seen.add(parts[1])
    refuse(problems)
    if not lines:
        raise InputError(f"{path}: has no line: copy the original again")
    return lines


def in_grey(path: Path, grey: Path) -> str:
    """The path of a grey image, or of its copy in grey, which is written; raises InputError if it is not readable."""
    image = read_image(path)
    if image.array.shape[-1] == 1:
        return str(path)
    return write_png(grey, np.round(image.array @ GREY).astype(np.uint16 if image.bits == 16 else np.uint8))


def told_by_source(test: list[Line]) -> str:
    """What is to be said where no source of the test has both classes."""
    normal, abnormal = (sorted({line.source for line in test if line.label == label}) for label in (0, 1))
    if not normal or not abnormal or set(normal) & set(abnormal):
        return ""
    return (
        f"all abnormal images of the test come from {', '.join(abnormal)}, all normal ones from {', '.join(normal)}: a "
        "score can tell them by their source alone; say so with every figure"
    )
