"""CheXpert chest radiographs (Irvin et al., AAAI 2019): train.csv, valid.csv and the images that they name.

The column Path is, for example, CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg. Observations are 1, 0,
-1 (uncertain) or blank. An image with No Finding is normal, one with Pneumonia is abnormal. All others are left out,
and so are uncertain ones.

The report on SimSID trains on 1,024 normals, validates on 50 + 50 images and tests on 100 + 100. Its list is not
public. ours: only PA views (--views=frontal adds AP views, --views=all adds lateral views too); one image of each
patient, drawn by --seed; a patient who ever had Pneumonia is abnormal. Where there are fewer patients, each part gets
its share.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle, text_of
from jmae.errors import InputError

PARTS = {0: {"test": 100, "val": 50, "train": 1024}, 1: {"test": 100, "val": 50}}  # by label
NEEDED = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Pneumonia")
VIEWS = ("PA", "frontal", "all")


def prepare(root: Path, out: Path, seed: int, views: str = "PA") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    if views not in VIEWS:
        raise InputError(f"--views={views}: unknown views: write one of {', '.join(VIEWS)}")
    left_out = Counter[str]()
    images: dict[int, dict[str, list[Row]]] = {0: defaultdict(list), 1: defaultdict(list)}  # by label and patient
    sick: set[str] = set()
    for table in find_tables(root):
        for row in read_table(table, views, left_out, sick):
            images[row.label or 0][row.patient].append(row)
    both = images[0].keys() & sick
    left_out["normal images of patients with Pneumonia"] += sum(len(images[0].pop(patient)) for patient in both)
    rows, problems = [], []
    for label, parts in PARTS.items():
        patients = shuffle(images[label], seed, str)
        counts = shares(len(patients), parts)
        for split, n in counts.items():
            chosen, patients = patients[:n], patients[n:]
            images_of_split = [shuffle(images[label][patient], seed, lambda row: row.id)[0] for patient in chosen]
            rows += sorted((row._replace(split=split) for row in images_of_split), key=lambda row: row.id)
        left_out[f"{'abnormal' if label else 'normal'} patients not drawn"] += len(patients)
    left_out["further images of drawn patients"] += sum(len(images[row.label or 0][row.patient]) - 1 for row in rows)
    problems = [
        f"{row.image[0]}: listed in the table but not found: copy it there" for row in rows if not is_there(row)
    ]
    refuse(problems)
    found = f"{len(images[0])} patients with No Finding, {len(images[1])} with Pneumonia ({views} views)"
    return Prepared(rows, found, left_out)


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


def read_table(table: Path, views: str, left_out: Counter[str], sick: set[str]) -> list[Row]:
    """The normal and abnormal images of a table in the views `views`.

    Adds each patient with Pneumonia in any view to `sick`, and counts other images in `left_out`.

    Raises InputError with all problems.
    """
    lines = csv.DictReader(io.StringIO(text_of(table), newline=""))
    if missing := [name for name in NEEDED if name not in (lines.fieldnames or ())]:
        raise InputError(f"{table}: has no column {', '.join(missing)}: copy the original again")
    rows, problems = [], []
    for line in lines:
        match = re.fullmatch(r"(?:[^/]+/)?((?:train|valid)/(patient\d+)/(study\d+)/(view\d+)_\w+\.jpg)", line["Path"])
        if not match or any(line[name] is None for name in NEEDED):
            problems.append(
                f"{table}: line {lines.line_num}: {line['Path']!r} is not the path of an image: copy the original again"
            )
            continue
        try:
            normal, pneumonia = (float(line[name] or 0) for name in ("No Finding", "Pneumonia"))
        except ValueError:
            problems.append(f"{table}: line {lines.line_num}: an observation is not a number: copy the original again")
            continue
        if pneumonia == 1:
            sick.add(match[2])
        if (views != "all" and line["Frontal/Lateral"] != "Frontal") or (views == "PA" and line["AP/PA"] != "PA"):
            left_out["images of other views"] += 1
            continue
        if (normal, pneumonia) != (1, 0) and (normal == 1 or pneumonia != 1):
            left_out["images without a certain No Finding or Pneumonia"] += 1
            continue
        extra = {"sex": line["Sex"], "age": line["Age"], "view": line["AP/PA"] or line["Frontal/Lateral"]}
        name = "_".join(match.groups()[1:])
        rows.append(Row(name, match[2], "", int(pneumonia == 1), (str(table.parent / match[1]),), extra=extra))
    refuse(problems)
    return rows


def is_there(row: Row) -> bool:
    return Path(row.image[0]).is_file()
