"""Images in folders named after split and class, as in MVTec AD, BMAD and MedIAnomaly; or in one or two plain folders.

    train/good                 normal training images; images directly in train/ are normal too
    test/good, test/DEFECT     normal and abnormal test images; images directly in test/ have no label
    val/..., unlabeled/...     the same for the splits val and unlabeled (optional)
    ground_truth/DEFECT        masks, NAME or NAME_mask. A folder holds masks if a word of its name is mask, truth,
                               annotation, label or seg (anomaly_mask, val_label, ...). It may lie anywhere, even in
                               test/DEFECT beside img/. NAME_mask is a mask in any folder

The folder of a split may lie in another of the same split (Train/train/good), and may have a size and a view in its
name (our_test_256_pa/abnormal_256). A mask may have the word mask, seg or label anywhere in its name, and seg in the
place of flair. JPEG masks are cut at 127 and written as PNG.

Instead, --normal DIR and --test DIR name two folders: normal images to train on, and test images without labels.

A case is an image file or a folder with one DICOM series. DICOM files may have any name. The id of a case is its path
below the root, but --test names its cases as `jmae predict` does, by their files. The patient is a hash of DICOM's
PatientID. Some public sets tell it in their file names. Files of other kinds are counted and reported. A file whose
header cannot be read is refused by its name, and so is a volume among images. A scan of --test that cannot be read
gets a caution: the training and the evaluation leave it out.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pydicom

from jmae.data.files import is_dicom
from jmae.data.manifest import Row, same_name
from jmae.data.names import count_unread, names_of
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.masks import bare, is_mask_folder, is_mask_name, sharp, words
from jmae.data.prepare.patients import KNOWN, by_name, hidden
from jmae.data.prepare.tree import DICOM, ENDS, stem, walk
from jmae.data.slices import in_words
from jmae.errors import InputError
from jmae.run_folder import log
from jmae.tables import counted

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
SIZED = re.compile(r"(?:our_)?(train|val|test)_\d{2,4}(?:_[a-z]+)?")  # our_test_256_pa
NORMAL = ("good", "normal", "healthy", "negative", "0")
_KINDS = "abnormal lesion lesions tumour tumours tumor tumors disease diseases diseased positive positives pathological"
ABNORMAL = {*_KINDS.split()}  # words in the name of a folder
WITHOUT = {"no", "non", "not", "without", "free"}  # words that turn their meaning round
MOST_CLASSES = 20  # more folders than these are hardly of classes
NAMED = 5  # subfolders that are named
IMAGES = ("img", "imgs", "image", "images")  # folders of images inside the folder of a class
CLEAR = {*NORMAL, *SPLITS, *IMAGES, *ABNORMAL}  # words of folders that leave no question, or that have a caution
SECONDS_BETWEEN_LINES = 10  # interval of progress lines while files are read


def prepare(root: Path | None, out: Path, seed: int, normal: str = "", test: str = "") -> Prepared:
    """Returns the rows, and writes JPEG masks as PNG. Raises InputError with all problems."""
    if root is None:
        if not normal:
            raise InputError("name the folder: --root=DIR, or --normal=DIR and --test=DIR")
        other: list[Path] = []
        rows = list(plain(Path(normal), "train", 0, other))
        rows += named_by_predict(list(plain(Path(test), "test", None, other)), rows) if test else []
        sources = f"{normal} and {test}" if test else normal
        inner = in_words_of(subfolders(rows, "train", normal) + subfolders(rows, "test", test))
        found = f"{sources}: {counted(len(rows), 'cases')}{inner}; the training cases are taken as normal"
        cautions = filter(None, [called_abnormal(rows, normal), called_otherwise(rows, normal)])
        return Prepared(told_apart(rows), found, count_unread(other), caution="; ".join(cautions))
    if normal or test:
        raise InputError("--root excludes --normal and --test: write either --root or the other two")
    return sorted_folders(root, out)


def sorted_folders(root: Path, out: Path, patterns: Sequence[str] = KNOWN) -> Prepared:
    """The cases below a root whose folders are named after splits and classes.

    Args:
        patterns: regular expressions that find the patient at the start of a file's name.
    """
    rows, masks, left_out = [], list[Path](), Counter[str]()
    other, ids, outside = list[Path](), dict[Path, str](), list[Path]()
    for path in cases(root, other, ids):
        folders = folders_of(path, root)
        if any(is_mask_folder(part) for part in folders) or is_mask_name(stem(path)):
            masks.append(path)
        elif not folders or not (split := split_of(folders[0])):
            outside.append(path.relative_to(root))
        elif split == "train" and kind_of(folders) not in (None, *NORMAL):
            left_out["abnormal training images"] += 1
        else:
            kind = kind_of(folders)
            label = (0 if split == "train" else None) if kind is None else int(kind not in NORMAL)
            extra = {"class": "" if split == "unlabeled" else kind or ""}
            label = None if split == "unlabeled" else label
            patient = by_name(stem(path), split, patterns) or ids.get(path, "")
            name = name_of(path.relative_to(root).parts)
            rows.append(Row(name, patient, split, label, (str(path),), extra=extra))
    left_out += count_unread(other) + in_no_split(outside)
    if not any(row.split == "train" for row in rows):
        inner = sorted({p.parent.name for name in SPLITS for p in root.glob(f"*/{name}")})
        remedy = f"name a folder inside it: {', '.join(inner)}" if inner else "sort the images into train/good and test"
        left_out["files called like masks"] = len(masks)
        there = f" (left out: {in_words(left_out)})" if +left_out else ""
        raise InputError(f"{root}: has no images in a folder train{there}: {remedy}")
    problems = [*questions(rows, root), *named_normal(rows, root)]
    rows = with_masks(rows, masks, root, out, problems)
    refuse(problems)
    bare_ones = sum(row.label == 1 and row.mask is None for row in rows)
    found = counted(len(rows), "cases") + (f", {bare_ones} abnormal ones without a mask" if bare_ones else "")
    left_out["masks of normal or missing images"] = len(masks) - sum(row.mask is not None for row in rows)
    tested = any(row.split == "test" for row in rows)
    caution = "" if tested else "no folder test: put new scans into test, or into test/good and test/DEFECT"
    return Prepared(told_apart(rows), found, left_out, caution=caution)


def in_no_split(files: Sequence[Path]) -> Counter[str]:
    """The number of files in no folder of a split, with the first folders, in the form of `Prepared.left_out`."""
    places = list(dict.fromkeys(file.parts[0] for file in files))
    named = ", ".join([*places[:2], *["..."] * (len(places) > 2)])
    return Counter({f"files outside of train, val, test and unlabeled ({named})": len(files)})


def split_of(folder: str) -> str | None:
    """The split that the name of a folder tells: Train, valid, our_test_256_pa, test_label."""
    name = folder.lower()
    sized = SIZED.fullmatch(name)
    first = re.split(r"[_-]", name)[0] if is_mask_folder(name) else name
    return sized[1] if sized else SPLITS.get(first)


def folders_of(path: Path, root: Path) -> list[str]:
    """The folders from the root to a file, in lower case. Of two folders of one split, only the second stays; a size
    at the end, as in normal_256, is cut off."""
    names = [part.lower() for part in path.relative_to(root).parts[:-1]]
    if len(names) > 1 and split_of(names[0]) and split_of(names[0]) == split_of(names[1]):
        names = names[1:]
    return [names[0], *(re.sub(r"_(64|128|224|256|320|512|1024)$", "", name) for name in names[1:])] if names else []


def questions(rows: Sequence[Row], root: Path) -> Iterator[str]:
    """A question for each pair of neighbouring folders with files of the same names: one may hold the masks of the
    other."""
    places: dict[str, dict[Path, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        path = Path(row.image[0])
        places[row.split][path.parent].add(stem(path))
    for folders in places.values():
        for folder in folders:
            beside = [one for one in folders if one.parent == folder.parent] if folder.name.lower() in IMAGES else []
            for one in (*beside, *(one for one in folders if one.parent == folder)):
                if one != folder and folders[one] & folders[folder]:
                    same, names = len(folders[one] & folders[folder]), folder.relative_to(root)
                    what = f"{counted(same, 'files')} with the names of files in {names}"
                    yield f"{one}: {what}: are they masks? Rename the folder to mask, or move it out"


def named_normal(rows: Sequence[Row], root: Path) -> Iterator[str]:
    """Classes that would count as abnormal, though their names say the contrary."""
    for kind in sorted({row.extra["class"] for row in rows} - {"", *NORMAL}):
        if re.search(r"(?<!ab)(?<!un)(normal|good|healthy|control)|no[_ -]?finding|negative", kind):
            yield f"{root}: the class {kind!r} would count as abnormal: rename it to normal, or to the finding"


def told_apart(rows: list[Row]) -> list[Row]:
    """The rows, without a patient where the PatientID of all files is the same, as anonymisers write it."""
    one = len({row.patient for row in rows}) == 1 and len(rows) > 1
    return [row._replace(patient="") for row in rows] if one else rows


def plain(folder: Path, split: str, label: int | None, other: list[Path]) -> Iterator[Row]:
    """A row for each case below a folder, all with the same split and label. Adds files that are no image to `other`.

    Raises InputError where there is no folder or no image, and where a name says that it is a mask's.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder: name a folder with images")
    unread, ids = list[Path](), dict[Path, str]()
    paths = list(cases(folder, unread, ids))
    other += unread
    if not paths:
        there = f", but {in_words(count_unread(unread))}" if unread else ""
        raise InputError(f"{folder}: has no image{there}: name a folder with images ({', '.join(ENDS)}) or DICOM")
    masks = [path for path in paths if is_mask_name(stem(path)) or any(map(is_mask_folder, folders_of(path, folder)))]
    if masks:
        raise InputError(
            f"{masks[0]}: is called like a mask, as {len(masks)} of {len(paths)} files are: move the masks out, or "
            "rename the images"
        )
    for path in paths:
        patient = by_name(stem(path), split) or ids.get(path, "")
        yield Row(name_of((split, *path.relative_to(folder).parts)), patient, split, label, (str(path),))


def subfolders(rows: Sequence[Row], split: str, folder: str) -> Counter[str]:
    """The number of cases of a split in each folder below that of the split."""
    top = Path(folder).absolute()
    places = [Path(row.image[0]).parent for row in rows if row.split == split]
    return Counter(str(Path(folder) / place.relative_to(top)) for place in places if place != top)


def in_words_of(folders: Counter[str]) -> str:
    """The largest subfolders with their counts: ", of them 5 in a/b and 4 in 2 more subfolders"; "" without any."""
    named = [f"{n} in {place}" for place, n in folders.most_common(NAMED)]
    further = folders.total() - sum(n for _, n in folders.most_common(NAMED))
    more = f" and {further} in {len(folders) - NAMED} more subfolders" if further else ""
    return f", of them {', '.join(named)}{more}" if named else ""


def called_abnormal(rows: Sequence[Row], normal: str) -> str:
    """A caution where folders below that of the normal cases are called after lesions; "" without any."""
    top, found = Path(normal).absolute(), Counter[Path]()
    for path in (Path(row.image[0]) for row in rows if row.split == "train"):
        place = path if path.is_dir() else path.parent
        names = [set(words(part)) for part in place.relative_to(top).parts]
        found[place] += any(name & ABNORMAL and not name & WITHOUT for name in names)
    if not (places := +found):
        return ""
    first, more = next(iter(places)), f" (and {len(places) - 1} more such folders)" if len(places) > 1 else ""
    what = f"{counted(places.total(), 'scans')} taken as normal, in {first}{more}"
    return f"{what}: the name of the folder says abnormal: move the scans to the folder of --test, or rename the folder"


def called_otherwise(rows: Sequence[Row], normal: str) -> str:
    """A caution where a few folders below that of the normal cases have names without a digit, as folders of classes
    have; "" where their names say normal, or without any."""
    top = Path(normal).absolute()
    places = Counter(Path(row.image[0]).parent for row in rows if row.split == "train")
    names = Counter(place.name for place in places)  # one that many patients have, as anat of BIDS, is no class
    clear = lambda name: bool(re.search(r"\d", name)) or names[name] > 1 or bool(CLEAR & set(words(name)))
    found = {place: n for place, n in places.items() if place != top and not clear(place.name)}
    if not 0 < len(found) <= MOST_CLASSES:
        return ""
    each = in_words_of(Counter({str(Path(normal) / place.relative_to(top)): n for place, n in found.items()}))
    return f"scans taken as normal{each}: if one of these folders holds abnormal scans, move it out of {normal}"


def named_by_predict(tests: list[Row], others: Sequence[Row]) -> list[Row]:
    """The test rows with the ids that `jmae predict` gives to these scans, unless another row has one of these ids."""
    names = [name.replace(";", "_") for name in names_of([row.image for row in tests])]
    taken = {*map(same_name, names)} & {same_name(row.id) for row in others}
    return tests if taken else [row._replace(id=name) for row, name in zip(tests, names, strict=True)]


def cases(folder: Path, other: list[Path], ids: dict[Path, str]) -> Iterator[Path]:
    """The cases below a folder, sorted by path: image files, and folders with one DICOM series.

    Adds other files to `other`, the `hidden` PatientID of a DICOM case to `ids`, and ignores hidden files. Raises
    InputError where a folder contains several series.
    """
    problems, read, last_line = [], 0, time.monotonic()
    for place, names in walk(folder, other):
        images, series = list[Path](), dict[Path, str]()  # image files; the series of each DICOM file among them
        for file in (place / name for name in names if name != "DICOMDIR"):
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log(f"{folder}: {read} files read")
            read += 1
            name = file.name.lower()
            if name.endswith(DICOM) or is_dicom(file):
                series[file], ids[file] = series_of(file)
            (images if file in series or name.endswith(ENDS) else other).append(file)
        found = {*series.values()}
        if len(found) < len(series) and all(found):
            if len(found) > 1:
                problems.append(f"{place}: contains {len(found)} DICOM series: give each series a folder of its own")
            ids[place] = ids[next(iter(series))]
            yield place
            images = [file for file in images if file not in series]
        yield from images
    refuse(problems)


def series_of(file: Path) -> tuple[str, str]:
    """(The series UID of a DICOM file that has a position in a volume, else ""; its hidden PatientID.)"""
    try:
        wanted = ["SeriesInstanceUID", "ImagePositionPatient", "PatientID"]
        tags = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(wanted))
    except Exception:  # the error is reported when the pixels are read
        return "", ""
    series = str(tags.get("SeriesInstanceUID", "")) if tags.get("ImagePositionPatient") else ""
    return series, hidden(str(tags.get("PatientID") or ""))


def kind_of(folders: list[str]) -> str | None:
    """The name of the folder of a class, which lies below that of the split; None without such a folder."""
    inner = [name for name in folders[1:] if name not in IMAGES]
    return inner[0] if inner else None


def with_masks(rows: list[Row], masks: list[Path], root: Path, out: Path, problems: list[str]) -> list[Row]:
    """The rows, the abnormal ones with their masks. Adds to `problems` where several masks fit."""
    same, alike = defaultdict[str, list[Path]](list), defaultdict[str, list[Path]](list)
    for path in masks:
        same[re.sub(r"[_-](mask|seg|gt|label|annotation)$", "", stem(path))].append(path)
        alike[bare(stem(path))].append(path)
    classes = {row.extra["class"] for row in rows} - {""}
    found = []
    for row in rows:
        name = stem(Path(row.image[0]))
        fitting = same.get(name) or alike.get(bare(name), []) if row.label == 1 else []
        place = mask_of(row, fitting, root, classes, problems)
        found.append(row._replace(mask=sharp(place, out / "masks" / f"{row.id}.png") if place else None))
    return found


def mask_of(row: Row, found: list[Path], root: Path, classes: set[str], problems: list[str]) -> Path | None:
    """The mask of a row among those that have its name, or None.

    The mask lies in a folder of the row's split, if there is one, and of the row's class, else in a folder of no class.
    """
    parts = lambda path: folders_of(path, root)
    splits = [path for path in found if row.split in {split_of(part) for part in parts(path)}]
    found = splits or [path for path in found if not any(map(split_of, parts(path)))]
    found = [path for path in found if row.extra["class"] in parts(path)] or [
        path for path in found if not {*parts(path)} & {*classes, *NORMAL}
    ]
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        problems.append(f"{row.image[0]}: several masks match ({several}): keep one")
    return found[0] if found else None


def name_of(parts: tuple[str, ...]) -> str:
    """The id of the case with the path `parts`."""
    return "_".join([*parts[:-1], stem(parts[-1])]).replace("\\", "_").replace(";", "_")
