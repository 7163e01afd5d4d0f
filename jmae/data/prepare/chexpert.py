"""CheXpert chest radiographs (Irvin et al., AAAI 2019): train.csv, valid.csv and the images that they name.

The column Path is, for example, CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg. Images lie in train/
and valid/ beside the tables, or in the batches of the full download, as "CheXpert-v1.0 batch 2 (train 1)/patient00001".
Observations are 1, 0, -1 (uncertain) or blank. An image with No Finding is normal, one with Pneumonia is abnormal. All
others are left out, and so are uncertain ones. --finding=NAME takes another observation for Pneumonia.

The report on SimSID trains on 1,024 normals, validates on 50 + 50 images and tests on 100 + 100. Its list is not
public. ours: only PA views (--views=frontal adds AP views, --views=all adds lateral views too); one image of each
patient, drawn by --seed; a patient who ever had the finding is abnormal. Where there are fewer patients, each part gets
its share.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.data.prepare.tables import text_of
from jmae.errors import InputError

PARTS = {0: {"test": 100, "val": 50, "train": 1024}, 1: {"test": 100, "val": 50}}  # by label
NEEDED = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding")
NO_FINDINGS = (*NEEDED, "Support Devices")  # the other columns are findings
VIEWS = ("PA", "frontal", "all")


class Films(NamedTuple):
    """What a table tells, besides the rows."""

    left_out: Counter[str]
    sick: set[str]  # patients with the finding in any view
    ill: set[str]  # patients with any finding in any view
    supported: set[str]  # ids of images with support devices


def prepare(root: Path, out: Path, seed: int, views: str = "PA", finding: str = "Pneumonia") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    if views not in VIEWS:
        raise InputError(f"--views={views}: unknown views: write one of {', '.join(VIEWS)}")
    images: dict[int, dict[str, list[Row]]] = {0: defaultdict(list), 1: defaultdict(list)}  # by label and patient
    films = Films(left_out := Counter[str](), set(), set(), set())
    tables = find_tables(root)
    for table in tables:
        for row in read_table(table, views, finding, films):
            images[row.label or 0][row.patient].append(row)
    both = images[0].keys() & films.sick
    left_out[f"normal images of patients with {finding}"] += sum(len(images[0].pop(patient)) for patient in both)
    rows = []
    for label, parts in PARTS.items():
        patients = shuffle(images[label], seed, str)
        counts = shares(len(patients), parts)
        for split, n in counts.items():
            chosen, patients = patients[:n], patients[n:]
            images_of_split = [shuffle(images[label][patient], seed, lambda row: row.id)[0] for patient in chosen]
            rows += sorted((row._replace(split=split) for row in images_of_split), key=lambda row: row.id)
        left_out[f"{'abnormal' if label else 'normal'} patients not drawn"] += len(patients)
    left_out["further images of drawn patients"] += sum(len(images[row.label or 0][row.patient]) - 1 for row in rows)
    batches = [tables[0].parent, *sorted(tables[0].parent.parent.glob("CheXpert-v1.0 batch*"))]
    placed = [(row, place(row.image[0], batches)) for row in rows]
    refuse([f"{row.image[0]}: listed in the table but not found: copy it there" for row, path in placed if not path])
    rows = [row._replace(image=(str(path),)) for row, path in placed]
    found = f"{len(images[0])} patients with No Finding, {len(images[1])} with {finding} ({views} views)"
    normals = [row for row in rows if not row.label]
    supported = sum(row.id in films.supported for row in normals)
    ill = sum(row.patient in films.ill for row in normals)
    caution = (
        f"of {len(normals)} normals {supported} show support devices, {ill} are of patients with a finding in another "
        "image"
    )
    return Prepared(
        rows, found, left_out, caution=caution, recipe="simsid:paper", licence="Stanford research use agreement"
    )


def shares(n: int, parts: dict[str, int]) -> dict[str, int]:
    """How many of n items each part gets: the number in `parts`, or its share where n is less than their sum.

    Shares are rounded down; the last part gets the remainder.
    """
    if n >= sum(parts.values()):
        return dict(parts)
    counts = {name: n * number // sum(parts.values()) for name, number in parts.items()}
    return counts | {name: n - sum(counts.values()) + counts[name] for name in list(parts)[-1:]}


def find_tables(root: Path) -> list[Path]:
    """train.csv in `root` or one of its folders, and valid.csv beside it if there is one.

    Raises InputError unless there is exactly one train.csv.
    """
    found = [path for pattern in ("", "*/") for path in sorted(root.glob(f"{pattern}train.csv"))]
    if len(found) != 1:
        what = "has no train.csv" if not found else f"has several train.csv ({', '.join(map(str, found))})"
        raise InputError(f"{root}: {what}: name the folder CheXpert-v1.0 or CheXpert-v1.0-small")
    valid = found[0].with_name("valid.csv")
    return [found[0], valid] if valid.is_file() else found


def place(path: str, batches: list[Path]) -> Path | None:
    """The file of an image train/PATIENT/STUDY/VIEW.jpg, with or without its first folder, in one of the folders."""
    tries = (folder / name for folder in batches for name in (path, path.partition("/")[2]))
    return next((one for one in tries if one.is_file()), None)


def read_table(table: Path, views: str, finding: str, films: Films) -> list[Row]:
    """The normal and abnormal images of a table in the views `views`, and in `films` what else it tells.

    Raises InputError with all problems.
    """
    lines = csv.DictReader(io.StringIO(text_of(table), newline=""))
    if missing := [name for name in NEEDED if name not in (lines.fieldnames or ())]:
        raise InputError(f"{table}: has no column {', '.join(missing)}: copy the original again")
    others = [name for name in lines.fieldnames or () if name not in NO_FINDINGS]
    if finding not in others:
        raise InputError(f"{table}: has no column {finding}: write --finding= one of {', '.join(others)}")
    rows, problems = [], []
    for line in lines:
        match = re.fullmatch(r"(?:[^/]+/)?((?:train|valid)/(patient\d+)/(study\d+)/(view\d+)_\w+\.jpg)", line["Path"])
        if not match or any(line[name] is None for name in NEEDED):
            problems.append(
                f"{table}: line {lines.line_num}: {line['Path']!r} is not the path of an image: copy the original again"
            )
            continue
        try:
            normal, positive = (float(line[name] or 0) for name in ("No Finding", finding))
            ill = any(float(line[name] or 0) == 1 for name in others)
        except ValueError:
            problems.append(f"{table}: line {lines.line_num}: an observation is not a number: copy the original again")
            continue
        name = "_".join(match.groups()[1:])
        films.sick.update({match[2]} if positive == 1 else ())
        films.ill.update({match[2]} if ill else ())
        films.supported.update({name} if (line.get("Support Devices") or "") in ("1", "1.0") else ())
        if (views != "all" and line["Frontal/Lateral"] != "Frontal") or (views == "PA" and line["AP/PA"] != "PA"):
            films.left_out["images of other views"] += 1
            continue
        if (normal, positive) != (1, 0) and (normal == 1 or positive != 1):
            films.left_out[f"images without a certain No Finding or {finding}"] += 1
            continue
        extra = {"sex": line["Sex"], "age": line["Age"], "view": line["AP/PA"] or line["Frontal/Lateral"]}
        rows.append(Row(name, match[2], "", int(positive == 1), (match[1],), extra=extra))
    refuse(problems)
    return rows
