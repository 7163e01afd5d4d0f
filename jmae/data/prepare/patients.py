"""Patients: from names of files, from DICOM's PatientID, from a mapping file; and patients in two splits."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare.tree import named
from jmae.errors import InputError

MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
IMAGES_NOT_PATIENTS = (
    f"RSNA's ids are of images, so a patient may be in two splits unseen: put {MAPPING} beside the images, or say so "
    "with every figure"
)

# Names that tell the patient wherever they are found. Each group of a pattern is a part of the patient's name.
KNOWN = (
    r"(BraTS2021_\d{5})(?:_|$)",
    r"(BraTS20_(?:Training|Validation)_\d{3})(?:_|$)",
    r"(BraTS-[A-Z]+-\d{5})-\d{3}",
    r"(?:CNV|DME|DRUSEN|NORMAL|BACTERIA|VIRUS)-(\d{4,})-\d+$",
    r"(person\d+)_(?:bacteria|virus)_\d+$",
    r"((?:NORMAL2-)?IM-\d{4})-\d{4}",
    r"(LIDC-IDRI-\d{4})",
)
ORDER = ("test", "val", "train", "unlabeled")  # of two splits with one patient, the first keeps the patient's cases


ANEW = r"person|(NORMAL2-)?IM-"  # numbers of Kaggle's paediatric radiographs, which begin anew in the test


def by_name(stem: str, split: str, patterns: Sequence[str] = KNOWN) -> str:
    """The patient that a file's name tells, "" where none of the patterns fits."""
    match = next((match for pattern in patterns if (match := re.match(pattern, stem))), None)
    if not match:
        return ""
    part = ("test_" if split == "test" else "trainval_") if re.match(ANEW, stem) else ""
    return part + "_".join(match.groups())


def by_pattern(rows: Sequence[Row], pattern: str, root: Path | None) -> list[Row]:
    """The rows with the patient that a regular expression finds in the path of their first image, below the root.

    The groups of the expression, joined by _, are the patient; without a group, the whole match is.

    Raises InputError where the expression is wrong, or does not fit all paths.
    """
    search = compiled("patient", pattern).search
    paths = [row.image[0].removeprefix(f"{root}/") for row in rows]
    found = [search(path) for path in paths]
    if lost := [path for path, match in zip(paths, found, strict=True) if not match]:
        raise InputError(f"--patient={pattern}: does not fit {lost[0]} and {len(lost) - 1} more: correct it")
    name = lambda match: "_".join(match.groups(default="")) if match.groups() else match[0]
    return [row._replace(patient=name(match)) for row, match in zip(rows, found, strict=True)]


def compiled(flag: str, pattern: str) -> re.Pattern[str]:
    """The regular expression of a flag. Raises InputError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"--{flag}={pattern}: not a regular expression ({error}): correct it") from None


def nih_of_rsna(root: Path) -> dict[str, str]:
    """The NIH patient of each image of RSNA's challenge, by its RSNA id; empty without RSNA's mapping file.

    The ids of RSNA are of images. pneumonia-challenge-dataset-mappings_2018.json names for each `subset_img_id` the
    image of ChestX-ray14, `img_id`, whose first eight digits are the patient.
    """
    found = named(root, MAPPING)
    try:
        entries = json.loads(found[0].read_text(encoding="utf-8")) if found else []
        return {str(one["subset_img_id"]): str(one["img_id"])[:8] for one in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{found[0]}: not RSNA's mapping to NIH ({error}): copy the original again") from None


def hidden(patient_id: str) -> str:
    """A name for a DICOM PatientID from which the ID cannot be read."""
    return f"p{hashlib.sha256(patient_id.encode()).hexdigest()[:12]}" if patient_id.strip() else ""


def kept_apart(rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """(the rows, without those whose patient is also in an earlier split of `ORDER`; how many rows are left out)."""
    rank, first = {split: i for i, split in enumerate(ORDER)}, dict[str, int]()
    for row in rows:
        if row.patient:
            first[row.patient] = min(rank[row.split], first.get(row.patient, rank[row.split]))
    kept, left_out = [], Counter[str]()
    for row in rows:
        if row.patient and first[row.patient] < rank[row.split]:
            left_out[f"{row.split} images of patients of {ORDER[first[row.patient]]}"] += 1
        else:
            kept.append(row)
    return kept, left_out
