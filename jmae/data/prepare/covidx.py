"""COVIDx, chest radiographs with and without COVID-19 (Wang et al., COVID-Net, Scientific Reports 2020).

A list has one line for each image, `patient filename label source`. The id of a patient may contain spaces, so a line
is split from the right. Images are train/FILENAME and test/FILENAME.

The splits are those of MemMC-MAE (Tian et al. 2022). The negatives of the training list train; its positives are not
used. The test list is the test. train_COVIDx8B.txt and test_COVIDx8B.txt give the paper's numbers: 13,794 to train, and
200 of each class to test. The lists of two versions share images and are refused.

ours: the few coloured images become grey, as most images are: 0.299 R + 0.587 G + 0.114 B.
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
    """Returns the rows, and writes a grey copy `out`/images/SPLIT/NAME.png of each coloured image.

    Raises InputError with all problems.
    """
    paths = {split: find_list(root, split) for split in ("train", "test")}
    one, other = (re.sub(r"^(train|test)_?|\.txt$", "", path.name.lower()) for path in paths.values())
    if one and other and one != other:
        what = f"{paths['train'].name} and {paths['test'].name} are of two versions and share images"
        raise InputError(f"{root}: {what}: keep the two lists of one version")
    lists = {split: read_list(path) for split, path in paths.items()}
    twice = {line.file for line in lists["train"]} & {line.file for line in lists["test"]}
    refuse([f"{name}: listed in both splits: copy the two lists of one version" for name in sorted(twice)])
    used = [(split, line) for split, lines in lists.items() for line in lines if split == "test" or not line.label]
    missing = [f"{root / s}: not found: unpack the images of COVIDx there" for s in lists if not (root / s).is_dir()]
    refuse(missing)
    there = {split: set(os.listdir(root / split)) for split in lists}
    problems = [
        f"{root / split / line.file}: listed but not found: copy it there"
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
    return Prepared(rows, counts, left_out, caution=source_caution(lists["test"]))


def find_list(root: Path, split: str) -> Path:
    """The list of a split, anywhere below `root`. Raises InputError unless there is exactly one."""
    name = re.compile(rf"{split}(_.+)?\.txt", re.IGNORECASE)
    found = sorted(Path(folder, n) for folder, _, names in os.walk(root) for n in names if name.fullmatch(n))
    if not found:
        raise InputError(f"{root}: has no {split}_COVIDx8B.txt or {split}.txt: copy the lists of COVID-Net there")
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"{root}: has several lists for {split}: keep one of {several}")
    return found[0]


def read_list(path: Path) -> list[Line]:
    """The lines of a list. Raises InputError with all problems."""
    lines, problems, files = [], [], set[str]()
    for number, text in enumerate(text_of(path).splitlines(), 1):
        parts = text.rsplit(None, 3)
        if not parts:
            continue
        if len(parts) < 4 or parts[2] not in LABELS or Path(parts[1]).name != parts[1]:
            what = "not `patient filename label source` with a label positive or negative"
            problems.append(f"{path}: line {number}: {what}: copy the original again")
        elif parts[1] in files:
            problems.append(f"{path}: line {number}: {parts[1]} is listed twice: copy the original again")
        else:
            lines.append(Line(parts[0].strip(), parts[1], LABELS[parts[2]], parts[3]))
            files.add(parts[1])
    refuse(problems)
    if not lines:
        raise InputError(f"{path}: empty list: copy the original again")
    return lines


def in_grey(path: Path, grey: Path) -> str:
    """The path of a grey version of an image: of the image itself, or of a grey copy written to `grey`.

    Raises InputError where the image cannot be read.
    """
    image = read_image(path)
    if image.array.shape[-1] == 1:
        return str(path)
    return write_png(grey, np.round(image.array @ GREY).astype(np.uint16 if image.bits == 16 else np.uint8))


def source_caution(test: list[Line]) -> str:
    """A warning where no source of the test has both classes, else ""."""
    normal, abnormal = (sorted({line.source for line in test if line.label == label}) for label in (0, 1))
    if not normal or not abnormal or set(normal) & set(abnormal):
        return ""
    return (
        f"all abnormal images of the test come from {', '.join(abnormal)}, all normal ones from {', '.join(normal)}: a "
        "score can separate them by their source alone; say so with every figure"
    )
