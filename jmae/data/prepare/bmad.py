"""One of the six sets of BMAD (Bao et al., CVPR workshops 2024), in any form in which they are distributed.

    README, MVFA-AD   {train,valid,test}/{good,Ungood}/{img,anomaly_mask}/*.png
    brain             train/good ; {valid,test}/{good,Ungood}/{img,label}
    liver             train/good ; {valid,test}/img/{good,Ungood} ; {valid,test}/label/Ungood
    RESC              Train/train/good ; Val/val, Val/val_label ; Test/test, Test/test_label
    chest, OCT2017, histopathology   {train,val,test}/{good,Ungood}, without masks

The folder of the archive (Brain_AD) or a folder in it (BraTS2021_slice) may be named. The name of a folder tells the
set; --set=brain, liver, resc, oct, chest or histopathology does so elsewhere.

Patients come from file names: 00124_60 (brain), 4_487 (liver), 9_28 (RESC), CNV-6294785-1 (OCT2017). The training
volumes of the liver are of another source than the other volumes, so equal numbers are different patients. RESC's
numbers are taken to begin anew in each split. The chest films have RSNA's ids.
"""

import re
from pathlib import Path

import numpy as np

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, folders
from jmae.data.prepare.patients import IMAGES_NOT_PATIENTS, KNOWN, nih_of_rsna
from jmae.data.prepare.tree import walk
from jmae.errors import InputError

SETS = {  # words in the names of folders, and the patient at the start of a file's name
    "brain": (r"brain|brats", (r"(\d+)_\d+$",)),
    "liver": (r"liver|hist_diy", (r"(\d+)_\d+$",)),
    "resc": (r"resc", (r"(\d+)_\d+$",)),
    "oct": (r"oct2017", KNOWN),
    "chest": (r"chest", (r"(?:Normal|Lung_Opacity|No-Not-Normal)_([0-9a-f-]+)$",)),
    "histopathology": (r"histo|camelyon", ()),
}
MASKED = ("brain", "liver", "resc")
COLOUR = ("histopathology",)


def prepare(root: Path, out: Path, seed: int, set: str = "") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    tops = [place for place, _ in walk(root) if any(folders.split_of(one.name) == "train" for one in place.iterdir())]
    if not tops:
        raise InputError(f"{root}: has no folder train: name the folder of one set, such as Brain_AD")
    top = min(tops, key=lambda place: len(place.parts))
    path = str(top.relative_to(root.parent)).lower()
    name = set or next((name for name, (word, _) in SETS.items() if re.search(word, path)), "")
    if name not in SETS:
        raise InputError(f"{root}: the folder does not tell the set: add --set= one of {', '.join(SETS)}")
    made = folders.sorted_folders(top, out, SETS[name][1])
    sick = [row for row in made.rows if row.label == 1]
    if name in MASKED and (bare := [row for row in sick if not row.mask]):
        raise InputError(
            f"{bare[0].image[0]}: has no mask, like {len(bare) - 1} more of {len(sick)}: copy the set again"
        )
    nih = nih_of_rsna(root) if name == "chest" else {}
    rows = [row._replace(patient=patient_of(name, row, nih)) for row in made.rows]
    cautions = {
        "resc": "whether RESC numbers its volumes anew in each split is not published",
        "chest": "" if nih else IMAGES_NOT_PATIENTS,
    }
    tested = [int(row.label == 1) for row in rows if row.split == "test"]
    share = f"{np.mean(tested):.0%} of the test is abnormal: AP begins there" if tested and name == "chest" else ""
    caution = [cautions.get(name, ""), share]
    return made._replace(
        rows=rows,
        found=f"the set {name}: {made.found}",
        caution="; ".join(filter(None, caution)),
        recipe="memmc_mae:paper_colour" if name in COLOUR else "memmc_mae:paper",
        licence="of the set's own authors; BMAD itself has no licence file",
    )


def patient_of(name: str, row: Row, nih: dict[str, str]) -> str:
    if name == "liver" and row.patient:
        return f"{'train' if row.split == 'train' else 'lits'}_{row.patient}"
    if name == "resc" and row.patient:
        return f"{row.split}_{row.patient}"
    return nih.get(row.patient, "") if name == "chest" else row.patient
