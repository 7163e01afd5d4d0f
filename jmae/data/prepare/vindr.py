"""VinDr-CXR (Nguyen et al., Scientific Data 2022), from Kaggle or PhysioNet, with the lists of DDAD and MedIAnomaly.

train/ID.dicom are the images (or ID.png, as DDAD's script writes them). train.csv of Kaggle, or annotations_train.csv
of PhysioNet, has a row for each finding of each of three readers, so that a normal image has three rows. vin_data.json
is DDAD's list (`ddad`). All lie in any folders. An image is normal where no reader has a finding. The boxes of all
readers are kept, on DICOM files alone: they count the pixels of the original image. The set names no patients.
"""

from collections import defaultdict
from pathlib import Path

from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.ddad import finished, rows_of
from jmae.data.prepare.tables import boxes_of, numbers, table_of
from jmae.data.prepare.tree import DICOM, named, one_file, stem

NORMAL = "no finding"
CORNERS = ("x_min", "y_min", "x_max", "y_max")


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes `out`/unlabeled_labels.csv last. Raises InputError with all problems."""
    table = next(iter(named(root, "annotations_train.csv")), None)
    table = table or one_file(root, "train.csv", what="the table of the training images")
    findings, boxes = defaultdict[str, set[str]](set), defaultdict[str, list[list[float]]](list)
    for line in table_of(table, "image_id", "class_name", *CORNERS):
        findings[line["image_id"]].add(line["class_name"])
        if line["class_name"].lower() != NORMAL and all(line[name] for name in CORNERS):
            boxes[line["image_id"]].append(numbers(line, CORNERS, table))
    listed, left_out = rows_of(root, ("vin_data.json", "data.json"))
    rows, problems = [], []
    for name, row, label in listed:
        image = stem(name)
        seen = sorted(one for one in findings[image] if one.lower() != NORMAL)
        if not findings[image] or bool(seen) != bool(label):
            what = f"has {', '.join(seen) or 'no finding'}" if findings[image] else "has no row"
            problems.append(f"{table}: {image} {what}, but is {'ab' * label}normal in the list: copy both again")
            continue
        row = row._replace(extra={"class": "" if row.split == "unlabeled" else "|".join(seen) or "No finding"})
        if row.label and Path(row.image[0]).suffix.lower() in DICOM:
            row = row._replace(boxes=boxes_of(boxes[image]))
        elif row.label:
            left_out["images without boxes, which need DICOM files"] += 1
        rows.append((name, row, label))
    refuse(problems)
    found = f"{len(findings)} images in the table, {len(boxes)} of them with boxes; {len(rows)} in the list"
    caution = "VinDr-CXR names no patients, so a patient may be in two splits unseen"
    licence = "PhysioNet credentialed health data; Kaggle: competition rules"
    return finished(rows, left_out, out, found=found, caution=caution, licence=licence)
