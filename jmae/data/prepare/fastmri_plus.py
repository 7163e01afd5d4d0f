"""fastMRI+ (Zhao et al., Scientific Data 2022): boxes for fastMRI's brain and knee volumes.

brain.csv or knee.csv has a row for each finding, `file,slice,study_level,x,y,width,height,label`. brain_file_list.csv
or knee_file_list.csv, without a header, names the files that were read; a file in the list alone has no finding.
FILE.h5 of fastMRI holds the images, `reconstruction_rss`; boxes refer to the images upside down, with slices from 0.
--part=brain or knee. Each slice is written as a 32-bit TIFF.

ours: normal variants and artifacts are no lesions. A file without a lesion is normal: four fifths of these files train
and the others are tested (a seeded draw). They give the middle half of their slices, as outer slices show little. Each
slice with a box is an abnormal test image. Labels of a whole study have no box; a file with such a lesion and no other
box is left out. One reader marked the findings, and patients are not named.
"""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from jmae.data.files import Image, write_map
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.data.prepare.tables import boxes_of, names_in, numbers, table_of
from jmae.data.prepare.tree import Images, one_file
from jmae.errors import InputError

PARTS = ("brain", "knee")
HARMLESS = ("normal for age", "normal variant", "possible artifact", "motion artifact", "artifact")
TRAIN = 0.8  # share of the normal files

Box = tuple[str, list[float]]  # label, x0 y0 x1 y1


def prepare(root: Path, out: Path, seed: int, part: str = "brain") -> Prepared:
    """Returns the rows, and writes the slices. Raises InputError with all problems."""
    if part not in PARTS:
        raise InputError(f"--part={part}: unknown part: write one of {', '.join(PARTS)}")
    table = one_file(root, f"{part}.csv", what="the annotations of fastMRI+")
    boxes: dict[str, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    whole: dict[str, set[str]] = defaultdict(set)
    for line in table_of(table, "file", "slice", "study_level", "x", "y", "width", "height", "label"):
        label = line["label"].lower()
        if label in HARMLESS:
            continue
        if line["study_level"].lower() == "yes" or not line["width"]:
            whole[line["file"]].add(label)
        else:
            x, y, width, height = numbers(line, ("x", "y", "width", "height"), table)
            boxes[line["file"]][int(numbers(line, ["slice"], table)[0])].append((label, [x, y, x + width, y + height]))
    listed = names_in(one_file(root, f"{part}_file_list.csv", what="the list of fastMRI+"))
    places, files = Images(root, (".h5",)), {}
    for name in listed:
        if path := places.find(name, f"{part}_file_list.csv"):
            files[name] = path
    refuse(places.problems)
    left_out = Counter({"files with a finding of the whole study": len(whole.keys() - boxes.keys())})
    normal = shuffle([name for name in files if name not in boxes and name not in whole], seed, str)
    train = set(normal[: round(TRAIN * len(normal))])
    rows = []
    for name, path in files.items():
        if name not in boxes and name in whole:
            continue
        volume = read_h5(path)
        wanted = sorted(boxes[name]) if name in boxes else range(len(volume) // 4, len(volume) - len(volume) // 4)
        for k in wanted:
            if k >= len(volume):
                raise InputError(f"{table}: {name} has no slice {k}: copy the file again")
            found = boxes[name][k] if name in boxes else []
            array = np.ascontiguousarray(volume[k][::-1, :, None], np.float32)
            (out / "slices").mkdir(parents=True, exist_ok=True)
            image = write_map(out / "slices" / f"{name}_{k:02d}", array, Image(array, None, None, None))
            extra = {"class": "|".join(sorted({label for label, _ in found})), "case": name, "slice": str(k)}
            split, corners = "train" if name in train else "test", [corner for _, corner in found]
            rows.append(
                Row(
                    f"{name}_{k:02d}",
                    name,
                    split,
                    int(bool(found)),
                    (str(image),),
                    boxes=boxes_of(corners),
                    extra=extra,
                )
            )
    found_words = f"{len(files)} files, {len(boxes)} with boxes, {len(normal)} without a lesion"
    caution = "one reader marked the findings, not exhaustively; a patient may be in two files"
    licence = "annotations MIT; images: agreement at fastmri.org"
    return Prepared(rows, found_words, left_out, caution=caution, recipe="memmc_mae:paper", licence=licence)


def read_h5(path: Path) -> np.ndarray:
    """The images (slices, rows, columns) of a file of fastMRI. Raises InputError without h5py or for a damaged file."""
    try:
        import h5py
    except ImportError:
        raise InputError("fastMRI's files are HDF5: pip install 'jmae[sets]'") from None
    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file["reconstruction_rss"], np.float32)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: has no reconstruction_rss ({error}): copy it again".replace("\n", " ")) from None
