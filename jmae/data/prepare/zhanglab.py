"""Paediatric chest radiographs of Kermany et al. (Cell 2018), called ZhangLab or Chest X-ray pneumonia.

chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg, as Kaggle (val has 16 images) and Mendeley (no val) have it; the
folders normal_256 and pneumonia_256 of SQUID and SimSID; or train/img/NORMAL-0001-1.jpeg, where the name tells the
class. The normals in the folder train are trained on.

The patient is person12 of person12_virus_3.jpeg, IM-0115 of IM-0115-0001.jpeg, or the middle number of
BACTERIA-1008087-0001.jpeg. Kaggle's numbers begin anew in the test, so the patient's name has the split before it.
"""

import re
from collections import Counter
from pathlib import Path

from jmae.data.prepare import Prepared, folders, refuse
from jmae.data.prepare.tree import stem, walk
from jmae.errors import InputError

NORMAL = r"(NORMAL|(NORMAL2-)?IM-)"
ABNORMAL = r"(person\d+_|BACTERIA|VIRUS|PNEUMONIA)"


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    tops = [place for place, _ in walk(root) if (place / "train").is_dir() and (place / "test").is_dir()]
    tops = [place for place in tops if not (place / "train" / "CNV").is_dir()]  # Mendeley's OCT lies beside chest_xray
    if not tops:
        raise InputError(f"{root}: has no folders train and test: name the folder chest_xray")
    top = min(tops, key=lambda place: len(place.parts))
    made = folders.sorted_folders(top, out)
    rows, left_out, problems = [], Counter(made.left_out), []
    for row in made.rows:
        name = stem(row.image[0])
        told = 0 if re.match(NORMAL, name) else 1 if re.match(ABNORMAL, name) else None
        label = row.label if row.extra["class"] else told
        if label is None or (told is not None and told != label):
            problems.append(f"{row.image[0]}: name and folder do not tell one class: sort it into NORMAL or PNEUMONIA")
        elif row.split == "train" and label:
            left_out["abnormal training images"] += 1
        else:
            rows.append(
                row._replace(label=label, extra={"class": row.extra["class"] or ("pneumonia" if label else "normal")})
            )
    refuse(problems)
    return Prepared(rows, f"{len(rows)} radiographs", left_out, recipe="simsid:zhanglab", licence="CC BY 4.0")
