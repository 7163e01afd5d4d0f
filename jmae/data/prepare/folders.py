"""Images in folders named after split and class, as in MVTec AD, BMAD and MedIAnomaly; or in one or two plain folders.

    train/good                 normal training images; images directly in train/ are normal too
    test/good, test/DEFECT     normal and abnormal test images; images directly in test/ have no label
    val/..., unlabeled/...     the same for the splits val and unlabeled (optional)
    ground_truth/DEFECT        masks, NAME or NAME_mask; the folder may also be called mask, annotation or label, and it
                               may lie anywhere, even in test/DEFECT beside img/

Instead, --normal DIR and --test DIR name two folders: normal images to train on, and test images without labels.

A case is an image file or a folder with one DICOM series. DICOM files may have any name. The id of a case is its path
below the root. Patients are unknown. Files of other kinds are counted and reported.
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
from jmae.data.prepare import Prepared, count_unread, refuse
from jmae.data.slices import in_words
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
IMAGES = ("img", "imgs", "image", "images")  # folders of images inside the folder of a class
ENDS = (
    *(".nii.gz", ".nii", ".nrrd", ".npy", ".npz", ".dcm", ".dicom", ".ima"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff"),
)
DICOM = (".dcm", ".dicom", ".ima")
SECONDS_BETWEEN_LINES = 10  # interval of progress lines while files are read


def prepare(root: Path | None, out: Path, seed: int, normal: str = "", test: str = "") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    if root is None:
        if not normal:
            raise InputError("name the folder: --root=DIR, or --normal=DIR and --test=DIR")
        other: list[Path] = []
        rows = [*plain(Path(normal), "train", 0, other), *(plain(Path(test), "test", None, other) if test else [])]
        sources = f"{normal} and {test}" if test else normal
        found = f"{sources}: {len(rows)} cases; the training cases are taken as normal"
        return Prepared(rows, found, count_unread(other))
    if normal or test:
        raise InputError("--root excludes --normal and --test: write either --root or the other two")
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
            label = None if split == "unlabeled" else label
            rows.append(Row(name_of(parts), "", split, label, (str(path),), extra=extra))
    left_out += count_unread(other)
    if not any(row.split == "train" for row in rows):
        inner = sorted({p.parent.name for name in SPLITS for p in root.glob(f"*/{name}")})
        remedy = f"name a folder inside it: {', '.join(inner)}" if inner else "sort the images into train/good and test"
        there = f" (left out: {in_words(left_out)})" if left_out else ""
        raise InputError(f"{root}: has no images in a folder train{there}: {remedy}")
    problems: list[str] = []
    classes = {row.extra["class"] for row in rows} - {""}
    for kind in sorted(classes - {*NORMAL}):
        if re.search(r"(?<!ab)(?<!un)(normal|good|healthy|control)|no[_ -]?finding|negative", kind):
            problems.append(
                f"{root}: the class {kind!r} would count as abnormal: rename it to normal, or to the finding"
            )
    mask = lambda row: mask_of(row, masks, root, classes, problems) if row.label == 1 else None
    rows = [row._replace(mask=mask(row)) for row in rows]
    refuse(problems)
    bare = sum(row.label == 1 and row.mask is None for row in rows)
    found = f"{len(rows)} cases" + (f", {bare} abnormal ones without a mask" if bare else "")
    left_out["masks of normal or missing images"] = sum(map(len, masks.values())) - sum(
        row.mask is not None for row in rows
    )
    return Prepared(rows, found, left_out)


def plain(folder: Path, split: str, label: int | None, other: list[Path]) -> Iterator[Row]:
    """A row for each case below a folder, all with the same split and label. Adds files that are no image to `other`.

    Raises InputError where there is no folder or no image.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder: name a folder with images")
    unread: list[Path] = []
    paths = list(cases(folder, unread))
    other += unread
    if not paths:
        there = f", but {in_words(count_unread(unread))}" if unread else ""
        raise InputError(f"{folder}: has no image{there}: name a folder with images ({', '.join(ENDS)}) or DICOM")
    for path in paths:
        yield Row(name_of((split, *path.relative_to(folder).parts)), "", split, label, (str(path),))


def cases(folder: Path, other: list[Path]) -> Iterator[Path]:
    """The cases below a folder, sorted by path: image files, and folders with one DICOM series.

    Adds other files to `other` and ignores hidden files. Raises InputError where a folder contains several series.
    """
    problems, read, last_line = [], 0, time.monotonic()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images, series = list[Path](), dict[Path, str]()  # image files; the series of each DICOM file among them
        for file in (Path(place, name) for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR"):
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log(f"{folder}: {read} files read")
            read += 1
            name = file.name.lower()
            if name.endswith(DICOM) or is_dicom(file):
                series[file] = series_of(file)
            (images if file in series or name.endswith(ENDS) else other).append(file)
        found = {*series.values()}
        if len(found) < len(series) and all(found):
            if len(found) > 1:
                problems.append(f"{place}: contains {len(found)} DICOM series: give each series a folder of its own")
            yield Path(place)
            images = [file for file in images if file not in series]
        yield from images
    refuse(problems)


def series_of(file: Path) -> str:
    """The series UID of a DICOM file that has a position in a volume, else ""."""
    try:
        tags = pydicom.dcmread(
            file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "ImagePositionPatient"]
        )
    except Exception:  # the error is reported when the pixels are read
        return ""
    return str(tags.get("SeriesInstanceUID", "")) if tags.get("ImagePositionPatient") else ""


def kind_of(folders: list[str]) -> str | None:
    """The name of the folder of a class, which lies below that of the split; None without such a folder."""
    inner = [name for name in folders[1:] if name not in IMAGES]
    return inner[0] if inner else None


def mask_of(row: Row, masks: dict[str, list[Path]], root: Path, classes: set[str], problems: list[str]) -> str | None:
    """The path of a row's mask, or None.

    The mask has the image's name. It lies in a folder of the row's split, if there is one, and of the row's class, else
    in a folder of no class. Adds to `problems` where several masks fit.
    """
    found = masks.get(stem(Path(row.image[0])), [])
    parts = lambda path: [part.lower() for part in path.relative_to(root).parts[:-1]]
    splits = [path for path in found if row.split in {SPLITS.get(part) for part in parts(path)}]
    found = splits or [path for path in found if not {*parts(path)} & {*SPLITS}]
    found = [path for path in found if row.extra["class"] in parts(path)] or [
        path for path in found if not {*parts(path)} & {*classes, *NORMAL}
    ]
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        problems.append(f"{row.image[0]}: several masks match ({several}): keep one")
    return str(found[0]) if found else None


def stem(path: Path) -> str:
    """The name of a file without the ending of an image."""
    end = next((end for end in ENDS if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(end)]


def name_of(parts: tuple[str, ...]) -> str:
    """The id of the case with the path `parts`."""
    return "_".join([*parts[:-1], stem(Path(parts[-1]))]).replace("\\", "_").replace(";", "_")
