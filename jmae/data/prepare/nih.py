"""NIH ChestX-ray14 (Wang et al., CVPR 2017) by the curated lists of adult PA views, or by the official lists.

The curated lists are those of NSA (Schlueter et al. 2022, self_sup_data/chest_xray_lists), which AMAE's Table 2 uses. A
list has one file name a line. The first is norm_MaleAdultPA_train_curated_list.txt; the others are those of women, of
the test, and of its abnormal images. A name that begins with "norm" lists normal images. The paper trains one model for
both sexes: 3,614 normals train, 543 normals and 262 abnormal images are the test.

The official lists are train_val_list.txt and test_list.txt. With Data_Entry_2017.csv or its v2020, the images of the
first list with No Finding train, and all of the second are the test. --views=PA or AP takes one view.
BBox_List_2017.csv gives boxes, in pixels of 1024 x 1024.

Lists, tables and images lie in any folders; --lists=nsa or official chooses where both are there. The patient is the
first part of an image's name.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.tables import boxes_of, names_in, numbers, table_of
from jmae.data.prepare.tree import Images, files_below, named, one_file
from jmae.errors import InputError

LIST = re.compile(r"([a-z]+)_(male|female)adultpa_(train|test)_curated_list\.txt", re.IGNORECASE)
PAPER = {("train", 0): 3614, ("test", 0): 543, ("test", 1): 262}
OFFICIAL = {"train": "train_val_list.txt", "test": "test_list.txt"}
NORMAL = "No Finding"
VIEWS = ("all", "PA", "AP")
LICENCE = "NIH: free, cite the source"


def prepare(root: Path, out: Path, seed: int, lists: str = "", views: str = "all") -> Prepared:
    """The rows; nothing is written. Raises InputError with all problems."""
    if lists not in ("", "nsa", "official"):
        raise InputError(f"--lists={lists}: unknown lists: write nsa or official")
    if views not in VIEWS:
        raise InputError(f"--views={views}: unknown views: write one of {', '.join(VIEWS)}")
    curated = [(path, match) for path in files_below(root, (".txt",)) if (match := LIST.fullmatch(path.name))]
    published = [path for name in OFFICIAL.values() for path in named(root, name)]
    if curated and published and not lists:
        raise InputError(f"{root}: has NSA's and the official lists: choose: --lists=nsa or --lists=official")
    if lists == "official" or (published and lists != "nsa"):
        return by_official_lists(root, views)
    if views != "all":
        raise InputError(f"--views={views}: NSA's lists hold PA views alone: leave it out")
    if not curated:
        raise InputError(
            f"{root}: has no *_MaleAdultPA_train_curated_list.txt and no train_val_list.txt: copy NSA's or the "
            "official lists there"
        )
    return by_curated_lists(root, curated)


def by_curated_lists(root: Path, lists: list[tuple[Path, re.Match[str]]]) -> Prepared:
    images, rows, problems = Images(root, (".png",)), [], []
    for path, match in lists:
        label, sex, split = int(match[1].lower() != "norm"), match[2][0].upper(), match[3].lower()
        if label and split == "train":
            problems.append(f"{path}: lists abnormal images to train on: leave it out")
        for name in names_in(path):
            if found := images.find(Path(name).name, f"of {path.name}"):
                case = Path(name).stem
                rows.append(Row(case, case.split("_")[0], split, label, (str(found),), extra={"sex": sex}))
    refuse(problems + images.problems)
    counts = Counter((row.split, int(bool(row.label))) for row in rows)
    differ = [
        f"{n} of {split} {label} (the paper: {PAPER.get((split, label), 0)})"
        for (split, label), n in sorted(counts.items())
        if n != PAPER.get((split, label))
    ]
    left_out = Counter({"images in no list": len(images) - len(rows)})
    caution = f"not the paper's numbers: {', '.join(differ)}" if differ else ""
    flags = "--config.variant=stage1"  # there are no unlabelled images
    return Prepared(rows, f"{len(lists)} lists", left_out, flags, caution, recipe="amae:paper", licence=LICENCE)


def by_official_lists(root: Path, views: str) -> Prepared:
    table = one_file(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", what="the table of NIH")
    # The commas in OriginalImage[Width,Height] are not quoted; the columns up to View Position are as they should be.
    entries = {line["Image Index"]: line for line in table_of(table, "Image Index", "Finding Labels", "View Position")}
    ill = {name.split("_")[0] for name, line in entries.items() if line["Finding Labels"] != NORMAL}
    boxes, images = bounding_boxes(root), Images(root, (".png",))
    rows, left_out, problems = [], Counter[str](), []
    for split, name in OFFICIAL.items():
        path = one_file(root, name, what="the official lists of NIH")
        for file in names_in(path):
            line = entries.get(file)
            if line is None:
                problems.append(f"{path}: {file} is not in {table.name}: copy both again")
            elif views not in ("all", line["View Position"]):
                left_out["images of other views"] += 1
            elif split == "train" and line["Finding Labels"] != NORMAL:
                left_out[f"images with a finding in {path.name}"] += 1
            elif found := images.find(file, f"of {path.name}"):
                sex = line.get("Patient Gender") or line.get("Patient Sex") or ""
                extra = {"class": line["Finding Labels"], "sex": sex, "view": line["View Position"]}
                label = int(line["Finding Labels"] != NORMAL)
                case, own = Path(file).stem, boxes[file] if label else []
                rows.append(
                    Row(case, case.split("_")[0], split, label, (str(found),), boxes=boxes_of(own), extra=extra)
                )
    refuse(problems + images.problems)
    count = sum(row.split == "train" and row.patient in ill for row in rows)
    caution = f"{count} training images with No Finding are of patients with a finding in another image"
    what = f"{len(entries)} images in the table, {len(images)} files, the official lists ({views} views)"
    flags = "--config.variant=stage1"
    return Prepared(rows, what, left_out, flags, caution, recipe="amae:paper", licence=LICENCE)


def bounding_boxes(root: Path) -> dict[str, list[list[float]]]:
    """The boxes x0 y0 x1 y1 of each image in BBox_List_2017.csv, whose header has `Bbox [x,y,w,h]` without quotes."""
    found = defaultdict[str, list[list[float]]](list)
    for path in named(root, "BBox_List_2017.csv")[:1]:
        for line in table_of(path, "Image Index", "Bbox [x", "y", "w", "h]"):
            x, y, width, height = numbers(line, ("Bbox [x", "y", "w", "h]"), path)
            found[line["Image Index"]].append([x, y, x + width, y + height])
    return found
