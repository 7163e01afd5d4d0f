"""Volumes of BraTS 2020, 2021 and 2023 (Menze et al. 2015; Baid et al. 2021): brain MRI with tumours.

A case is a folder with NAME_{t1,t1ce,t2,flair,seg}.nii or .nii.gz (2023: -t1n, -t1c, -t2w, -t2f), in any folder. The
segmentation of BraTS20_Training_355 is called W39_1998.09.19_Segm.nii. Any value above 0 is lesion. Cases without a
segmentation (the validation sets) are left out. --sequences=t1,flair chooses channels; without it they are t1, t1ce, t2
and flair.

No subject is healthy: the normal training data are crops outside the tumours, so training cases are abnormal and have a
mask. Of the patients, a tenth is val and a fifth the test (a seeded draw). The time points of a patient of 2023 stay in
one split.
"""

import re
from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.data.prepare.patients import by_name
from jmae.data.prepare.tree import stem, walk
from jmae.errors import InputError

SEQUENCES = {"t1": ("t1", "t1n"), "t1ce": ("t1ce", "t1c"), "t2": ("t2", "t2w"), "flair": ("flair", "t2f")}
CASE = r"BraTS(20_(Training|Validation)_\d{3}|2021_\d{5}|-[A-Z]+-\d{5}-\d{3})"
VAL, TEST = 0.1, 0.2  # shares of the patients


def prepare(root: Path, out: Path, seed: int, sequences: str = "") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    wanted = [name.strip() for name in sequences.split(",") if name.strip()] or list(SEQUENCES)
    if unknown := [name for name in wanted if name not in SEQUENCES]:
        raise InputError(f"--sequences={sequences}: {unknown[0]} is unknown: write some of {','.join(SEQUENCES)}")
    rows, left_out, problems = [], Counter[str](), []
    for place, names in walk(root):
        if not re.fullmatch(CASE, place.name):
            continue
        files = [place / name for name in names if name.endswith((".nii", ".nii.gz"))]
        by_word = {word: [one for one in files if last_word(one) in words] for word, words in SEQUENCES.items()}
        masks = [one for one in files if last_word(one) in ("seg", "segm")]
        wrong = [word for word in wanted if len(by_word[word]) != 1]
        if wrong or len(masks) > 1:
            what = f"{len(by_word[wrong[0]])} files of {wrong[0]}" if wrong else f"{len(masks)} segmentations"
            problems.append(f"{place}: has {what}: copy the case again")
        elif not masks:
            left_out["cases without a segmentation"] += 1
        else:
            image = tuple(str(by_word[word][0]) for word in wanted)
            patient = by_name(f"{place.name}_", "")
            rows.append(Row(place.name, patient, "train", 1, image, str(masks[0])))
    refuse(problems)
    if not rows and not left_out:
        raise InputError(
            f"{root}: has no folder such as BraTS2021_00000 or BraTS20_Training_001: name the folder above"
        )
    patients = shuffle({row.patient for row in rows}, seed, str)
    val, test = round(VAL * len(patients)), round(TEST * len(patients))
    split = dict.fromkeys(patients[:val], "val") | dict.fromkeys(patients[val : val + test], "test")
    rows = [row._replace(split=split.get(row.patient, "train")) for row in rows]
    found = f"{len(rows)} cases of {len(patients)} patients, channels {', '.join(wanted)}"
    caution = "no subject is healthy: normal is what lies outside the tumours"
    return Prepared(
        rows, found, left_out, caution=caution, recipe="maemi:small", licence="BraTS: research, registration (Synapse)"
    )


def last_word(path: Path) -> str:
    return re.split(r"[_-]", stem(path))[-1].lower()
