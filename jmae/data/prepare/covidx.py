"""COVIDx, chest radiographs with and without COVID-19 (Wang et al., COVID-Net, Scientific Reports 2020).

A list has one line for each image, `patient filename label source`. The id of a patient may contain spaces, so a line
is split from the right. The lists of version 2 have no source. Labels are positive and negative, or, in the lists 1 to
5, 7A, 8A and 9A, COVID-19, pneumonia and normal. Images are train/FILENAME, val/FILENAME and test/FILENAME.

The splits are those of MemMC-MAE (Tian et al. 2022). The negatives (normals) of the training list train; its other
images are not used. The test list is the test, and val.txt is val where it exists. train_COVIDx8B.txt and
test_COVIDx8B.txt give the paper's numbers: 13,794 to train, and 200 of each class to test. The lists of two versions
share images and are refused. "negative" means no COVID: many of these images show another pneumonia.

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
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.patients import IMAGES_NOT_PATIENTS, nih_of_rsna
from jmae.data.prepare.tables import text_of
from jmae.data.prepare.tree import walk
from jmae.data.slices import write_png
from jmae.errors import InputError

LABELS = {"negative": 0, "positive": 1, "normal": 0, "pneumonia": 1, "COVID-19": 1}
RSNA = ("rsna", "rnsa")  # sources; 199 lines of 9B misspell it
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
    paths = {split: path for split in ("train", "val", "test") if (path := find_list(root, split))}
    versions = {re.sub(r"^(train|val|test)_?|\.txt$", "", path.name.lower()) for path in paths.values()} - {""}
    if len(versions) > 1:
        names = " and ".join(path.name for path in paths.values())
        raise InputError(f"{root}: {names} are of two versions and share images: keep the lists of one version")
    lists = {split: read_list(path) for split, path in paths.items()}
    times = Counter(line.file for lines in lists.values() for line in lines)
    refuse([f"{name}: listed in both splits: copy the lists of one version" for name, n in times.items() if n > 1])
    used = [(split, line) for split, lines in lists.items() for line in lines if split != "train" or not line.label]
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
    nih = nih_of_rsna(root)
    patient = lambda line: nih.get(line.patient, line.patient) if line.source in RSNA else line.patient
    rows = [
        Row(line.file, patient(line), split, line.label, (image,), extra={"source": line.source})
        for (split, line), image in zip(used, images, strict=True)
    ]
    counts = ", ".join(f"{len(lines)} lines for {split}" for split, lines in lists.items())
    left_out = Counter({"positives of the training list": sum(line.label for line in lists["train"])})
    told = [source_caution(lists["test"])]
    told += [IMAGES_NOT_PATIENTS] if not nih and any(line.source in RSNA for _, line in used) else []
    return Prepared(
        rows,
        counts,
        left_out,
        caution="; ".join(filter(None, told)),
        recipe="memmc_mae:paper",
        licence="of each source: COVID-Net names them",
    )


def find_list(root: Path, split: str) -> Path | None:
    """The list of a split, anywhere below `root`; only val may have none. Raises InputError for several lists."""
    name = re.compile(rf"{split}(_.+)?\.txt", re.IGNORECASE)
    found = sorted(folder / n for folder, names in walk(root) for n in names if name.fullmatch(n))
    if not found and split != "val":
        raise InputError(f"{root}: has no {split}_COVIDx8B.txt or {split}.txt: copy the lists of COVID-Net there")
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"{root}: has several lists for {split}: keep one of {several}")
    return found[0] if found else None


def read_list(path: Path) -> list[Line]:
    """The lines of a list. Raises InputError with all problems."""
    lines, problems, files = [], [], set[str]()
    for number, text in enumerate(text_of(path).splitlines(), 1):
        if not text.strip():
            continue
        parts = text.rsplit(None, 2 if text.split()[-1] in LABELS else 3)
        parts += [""] if len(parts) == 3 else []
        if len(parts) < 4 or parts[2] not in LABELS or Path(parts[1]).name != parts[1]:
            what = f"not `patient filename label source` with a label of {', '.join(LABELS)}"
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
    if not all(normal) or not all(abnormal) or not normal or not abnormal or set(normal) & set(abnormal):
        return ""
    return (
        f"all abnormal images of the test come from {', '.join(abnormal)}, all normal ones from {', '.join(normal)}: a "
        "score can separate them by their source alone; say so with every figure"
    )
