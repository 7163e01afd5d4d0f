"""RSNA Pneumonia Detection Challenge (Kaggle), with the lists of DDAD and MedIAnomaly.

stage_2_train_images/ID.dcm are the images (or ID.png, as DDAD's script writes them), stage_2_train_labels.csv has a row
for each box, and rsna_data.json is DDAD's list (`ddad`). stage_2_detailed_class_info.csv is optional. All lie in any
folders. The list takes the class Normal as normal and Lung Opacity as abnormal; "No Lung Opacity / Not Normal" is not
used. Boxes count the pixels of the original images of 1024 x 1024 pixels; on smaller images they are scaled.

RSNA's ids are of images. Where pneumonia-challenge-dataset-mappings_2018.json lies below --root, patients are known.
"""

from collections import defaultdict
from pathlib import Path

from jmae.data.files import image_size
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.ddad import finished, rows_of
from jmae.data.prepare.patients import IMAGES_NOT_PATIENTS, nih_of_rsna
from jmae.data.prepare.tables import boxes_of, numbers, table_of
from jmae.data.prepare.tree import named, one_file, stem

SIDE = 1024  # pixels of an original image
CLASSES = {0: "Normal", 1: "Lung Opacity"}


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes `out`/unlabeled_labels.csv last. Raises InputError with all problems."""
    path = one_file(root, "stage_2_train_labels.csv", what="the tables of the challenge")
    boxes, target = defaultdict[str, list[list[float]]](list), dict[str, str]()
    for line in table_of(path, "patientId", "x", "y", "width", "height", "Target"):
        target[line["patientId"]] = line["Target"]
        if line["Target"] == "1":
            x, y, width, height = numbers(line, ("x", "y", "width", "height"), path)
            boxes[line["patientId"]].append([x, y, x + width, y + height])
    detailed = named(root, "stage_2_detailed_class_info.csv")
    classes = (
        {line["patientId"]: line["class"] for line in table_of(detailed[0], "patientId", "class")} if detailed else {}
    )
    listed, left_out = rows_of(root, ("rsna_data.json", "data.json"))
    nih, rows, problems = nih_of_rsna(root), [], []
    for name, row, label in listed:
        image = stem(name)
        kind = classes.get(image, CLASSES[label])
        if target.get(image) != str(label) or kind != CLASSES[label]:
            what = f"Target {target.get(image, 'missing')}, {kind}" if image in target else "no row"
            problems.append(f"{path}: {image}: {what}, but the list has {CLASSES[label]}: copy both again")
            continue
        extra = {"class": "" if row.split == "unlabeled" else kind}
        row = row._replace(patient=nih.get(image, ""), extra=extra)
        if row.label:
            height, width = image_size(row.image[0])
            scale = (width / SIDE, height / SIDE) * 2
            row = row._replace(
                boxes=boxes_of([[a * b for a, b in zip(box, scale, strict=True)] for box in boxes[image]])
            )
        rows.append((name, row, label))
    refuse(problems)
    found = f"{len(target)} images in the table, {len(boxes)} of them with boxes; {len(rows)} in the list"
    return finished(
        rows,
        left_out,
        out,
        found=found,
        caution="" if nih else IMAGES_NOT_PATIENTS,
        licence="Kaggle competition rules: academic use",
    )
