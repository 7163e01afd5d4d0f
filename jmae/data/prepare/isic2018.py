"""ISIC 2018 task 3, dermoscopy (HAM10000; Codella et al. 2019), as MedIAnomaly uses it: moles (NV) are normal.

ISIC2018_Task3_{Training,Validation,Test}_Input hold ISIC_xxxxxxx.jpg, and ISIC2018_Task3_..._GroundTruth.csv has a
column of 0 and 1 for each diagnosis. The moles of the training part train; the other parts are val and test. In
ISIC2018_Task3_Training_LesionGroupings.csv, where it is there, several images have one lesion, which counts as
the patient.
"""

from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.tables import table_of
from jmae.data.prepare.tree import Images, named
from jmae.errors import InputError

PARTS = {"Training": "train", "Validation": "val", "Test": "test"}
DIAGNOSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    groups = named(root, "ISIC2018_Task3_Training_LesionGroupings.csv")
    lesions = {line["image"]: line["lesion_id"] for line in table_of(groups[0], "image", "lesion_id")} if groups else {}
    rows, left_out, problems = [], Counter[str](), list[str]()
    for part, split in PARTS.items():
        tables = named(root, f"ISIC2018_Task3_{part}_GroundTruth.csv")
        if not tables and split == "val":
            continue
        if len(tables) != 1:
            what = "has several of" if tables else "has no"
            raise InputError(f"{root}: {what} ISIC2018_Task3_{part}_GroundTruth.csv: copy the data set again")
        images = Images(root, (".jpg",))
        for line in table_of(tables[0], "image", *DIAGNOSES):
            kind = next((name for name in DIAGNOSES if line[name] in ("1", "1.0")), "")
            if not kind:
                problems.append(f"{tables[0]}: {line['image']} has no diagnosis: copy the table again")
            elif split == "train" and kind != "NV":
                left_out["training images of other lesions than moles"] += 1
            elif found := images.find(line["image"], f"of {tables[0].name}"):
                patient, label = lesions.get(line["image"], ""), int(kind != "NV")
                rows.append(Row(line["image"], patient, split, label, (str(found),), extra={"class": kind}))
        problems += images.problems
    refuse(problems)
    counts = Counter(row.extra["class"] for row in rows)
    found_words = f"{len(rows)} images ({', '.join(f'{counts[name]} {name}' for name in DIAGNOSES if counts[name])})"
    return Prepared(rows, found_words, left_out, recipe="memmc_mae:paper_colour", licence="CC BY-NC 4.0")
