"""Images in folders that say what they are: MVTec AD and the sets that follow it (BMAD, MedIAnomaly), or plain ones.

    train/good                 normal training images; train/ without folders inside means the same
    test/good, test/DEFECT     normal and abnormal test images; those right in test/ have no known label
    val/..., unlabeled/...     likewise, where they are there
    ground_truth/DEFECT        masks, NAME or NAME_mask; the folder may be called mask, annotation or label too, and may
                               lie anywhere, also in test/DEFECT beside img/

Or two folders anywhere, --normal DIR and --test DIR: one to train on, one with labels that nobody knows.

A case is an image file, or a folder of one DICOM series; DICOM files may have any name. Its id is its path below the
root. Patients are not known. Files of other kinds are counted aloud.
"""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pydicom

from jmae.data.files import is_dicom
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, unknown
from jmae.data.slices import counted
from jmae.errors import InputError
from jmae.run_folder import log

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
NORMAL = ("good", "normal", "healthy", "negative", "0")
MASKS = r"(ground_?truth|gt|masks?|annotations?|labels?|seg(mentations?)?)"
IMAGES = ("img", "imgs", "image", "images")  # folders inside one of a class
ENDS = (
    *(".nii.gz", ".nii", ".nrrd", ".npy", ".npz", ".dcm", ".dicom", ".ima"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff"),
)
DICOM = (".dcm", ".dicom", ".ima")
SECONDS_BETWEEN_LINES = 10  # while files are read


def prepare(root: Path | None, out: Path, seed: int, normal: str = "", test: str = "") -> Prepared:
    """The rows; nothing is written. Raises InputError with all problems."""
    if root is None:
        if not normal:
            raise InputError("name the folder: --root=DIR, or --normal=DIR and --test=DIR")
        other: list[Path] = []
        rows = [*two(Path(normal), "train", 0, other), *(two(Path(test), "test", None, other) if test else [])]
        named = f"{normal} and {test}" if test else normal
        return Prepared(rows, f"{named}: {len(rows)} cases, those to train on taken as normal", unknown(other))
    if normal or test:
        raise InputError("--root goes without --normal and --test: write one or the others")
    rows, masks, left_out = [], defaultdict[str, list[Path]](list), Counter[str]()
    other = []
    for path in cases(root, other):
        parts = path.relative_to(root).parts
        folders = [part.lower() for part in parts[:-1]]
        if any(re.fullmatch(MASKS, part) for part in folders):
            masks[re.sub(r"[_-](mask|seg|gt|label|annotation)$", "", stem(path))].append(path)
        elif not folders or folders[0] not in SPLITS:
            left_out["files outside of train, val, test and unlabeled"] += 1
        elif (split := SPLITS[folders[0]]) == "train" and kind_of(folders) not in (None, *NORMAL):
            left_out["abnormal training images"] += 1
        else:
            kind = kind_of(folders)
            label = (0 if split == "train" else None) if kind is None else int(kind not in NORMAL)
            extra = {"class": "" if split == "unlabeled" else kind or ""}
            known = None if split == "unlabeled" else label
            rows.append(Row(name_of(parts), "", split, known, (str(path),), extra=extra))
    left_out += unknown(other)
    if not any(row.split == "train" for row in rows):
        inner = sorted({p.parent.name for name in SPLITS for p in root.glob(f"*/{name}")})
        remedy = f"name one of the folders in it: {', '.join(inner)}" if inner else "sort them into train/good and test"
        there = f" (left out: {counted(left_out)})" if left_out else ""
        raise InputError(f"{root}: has no images in a folder train{there}: {remedy}")
    problems: list[str] = []
    classes = {row.extra["class"] for row in rows} - {""}
    for kind in sorted(classes - {*NORMAL}):
        if re.search(r"(?<!ab)(?<!un)(normal|good|healthy|control)|no[_ -]?finding|negative", kind):
            problems.append(
                f"{root}: the class {kind!r} would count as abnormal: rename it to normal, or to what is found"
            )
    mask = lambda row: mask_of(row, masks, root, classes, problems) if row.label == 1 else None
    rows = [row._replace(mask=mask(row)) for row in rows]
    refuse(problems)
    bare = sum(row.label == 1 and row.mask is None for row in rows)
    found = f"{len(rows)} cases" + (f", {bare} abnormal ones without a mask" if bare else "")
    left_out["masks of images that are normal or not there"] = sum(map(len, masks.values())) - sum(
        row.mask is not None for row in rows
    )
    return Prepared(rows, found, left_out)


def two(folder: Path, split: str, label: int | None, other: list[Path]) -> Iterator[Row]:
    """A row a case below a folder, all of one split and label; what is none is added to `other`."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder: name one with images")
    own: list[Path] = []
    paths = list(cases(folder, own))
    other += own
    if not paths:
        there = f", but {counted(unknown(own))}" if own else ""
        raise InputError(f"{folder}: has no image{there}: name a folder with images ({', '.join(ENDS)}) or DICOM")
    for path in paths:
        yield Row(name_of((split, *path.relative_to(folder).parts)), "", split, label, (str(path),))


def cases(folder: Path, other: list[Path]) -> Iterator[Path]:
    """The image files below a folder and its folders of one DICOM series, by name; other files are added to `other`,
    hidden ones passed over."""
    problems, read, said = [], 0, time.monotonic()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        known, series = list[Path](), dict[Path, str]()  # images; the series of those that are DICOM
        for file in (Path(place, name) for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR"):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log(f"{folder}: {read} files read")
            read += 1
            name = file.name.lower()
            if name.endswith(DICOM) or is_dicom(file):
                series[file] = series_of(file)
            (known if file in series or name.endswith(ENDS) else other).append(file)
        found = {*series.values()}
        if len(found) < len(series) and all(found):
            if len(found) > 1:
                problems.append(f"{place}: holds {len(found)} DICOM series: give each a folder of its own")
            yield Path(place)
            known = [file for file in known if file not in series]
        yield from known
    refuse(problems)


def series_of(file: Path) -> str:
    """The series of a DICOM file that lies somewhere in a volume; "" of any other."""
    try:
        tags = pydicom.dcmread(
            file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "ImagePositionPatient"]
        )
    except Exception:  # what is wrong with it is said when it is read
        return ""
    return str(tags.get("SeriesInstanceUID", "")) if tags.get("ImagePositionPatient") else ""


def kind_of(folders: list[str]) -> str | None:
    """The folder that tells the class, below that of the split; None where there is none."""
    inner = [name for name in folders[1:] if name not in IMAGES]
    return inner[0] if inner else None


def mask_of(row: Row, masks: dict[str, list[Path]], root: Path, classes: set[str], problems: list[str]) -> str | None:
    """The mask of a row by its name in a folder of its class, or else in one of no class; None where there is none."""
    found = masks.get(stem(Path(row.image[0])), [])
    parts = lambda path: [part.lower() for part in path.relative_to(root).parts[:-1]]
    splits = [path for path in found if row.split in {SPLITS.get(part) for part in parts(path)}]
    found = splits or [path for path in found if not {*parts(path)} & {*SPLITS}]
    found = [path for path in found if row.extra["class"] in parts(path)] or [
        path for path in found if not {*parts(path)} & {*classes, *NORMAL}
    ]
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        problems.append(f"{row.image[0]}: has several masks, {several}: keep one")
    return str(found[0]) if found else None


def stem(path: Path) -> str:
    """A name without the ending of an image."""
    end = next((end for end in ENDS if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(end)]


def name_of(parts: tuple[str, ...]) -> str:
    """An id of the parts of a path."""
    return "_".join([*parts[:-1], stem(Path(parts[-1]))]).replace("\\", "_").replace(";", "_")
