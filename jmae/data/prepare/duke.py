"""Duke-Breast-Cancer-MRI (Saha et al. 2018, TCIA), with the lists and the preparation of MAEMI (Lang et al. 2023).

Folders Breast_MRI_xxx hold DICOM series, in TCIA's descriptive or classic folders. The SeriesDescription tells a series
(`PRE`, `PLAIN`, `PHASE`): the fat-saturated one before contrast, the one without fat saturation, and the phases after
contrast. A second series of a kind is left out aloud. A case needs both sequences and the phases 1 and 2.

Annotation_Boxes.xlsx has a box a patient, in rows, columns and slices that are counted from 1, inclusive. Slices count
files (InstanceNumber); where z falls as InstanceNumber grows, the box is mirrored in z.
Clinical_and_Other_Features.xlsx tells the side of the tumour and bilateral cases, which are left out. Both may be CSV
files.

The lists are MAEMI's train.csv, valid.csv and test.csv (data/labels/anomaly_no_bilateral): 744, 50 and 100 patients.
The healthy halves train and are val; both breasts are tested. Breast masks are PATIENT.nii.gz (of MAEMI's folder SEG,
or of the U-Net of mazurowski-lab), or Segmentation_PATIENT_Breast.seg.nrrd. Where there are some, patients without one
are left out.

The DICOM series stay where they are; the recipe resamples, crops and standardises them. Headers are read in parallel
and kept in OUT/series, so that an interrupted command goes on where it stopped.
"""

import json
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom

from jmae.data.files import is_dicom
from jmae.data.manifest import Row
from jmae.data.opening import WORKERS
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.tables import table_of
from jmae.data.prepare.tree import named, one_file, walk
from jmae.errors import InputError
from jmae.run_folder import write_text

PATIENT = re.compile(r"Breast_MRI_\d{3}")
# SeriesDescription in lower case, with single spaces; the names are those of MAEMI's download_MRI_data.py.
PRE = (
    *("ax vibrant multiphase", "ax 3d dyn", "ax 3d dyn mp", "ax 3d dyn pre", "ax 3d pre", "ax dyn", "ax dyn pre"),
    *("ax dynamic", "t1_fl3d_tra_dynviews_spair_ pre"),
)
PLAIN = (
    *("ax ideal breast", "ax 3d t1 bilateral", "ax t1", "ax t1 +c", "ax t1 2mm", "ax t1 3mm", "ax t1 pre"),
    *("ax t1 repeat", "ax t1 tse", "ax t1 tse +c", "ax 3d t1 non fs"),
)
PHASE = (
    r"ph(\d) ?/? ?(?:ax vibrant multiphase|ax 3d dyn(?: mp)?|ax dyn|ax dynamic)",
    r"(\d)(?:st|nd|rd|th) ax dyn",
    r"ax (?:3d )?dyn (\d)(?:st|nd|rd|th) pass?",  # one is spelt "1st pas"
    r"t1_fl3d_tra_dynviews_spair[_ ]+(\d)(?:st|nd|rd|th) pass",
)
SPLITS = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}
BOX = ("Start Column", "Start Row", "Start Slice", "End Column", "End Row", "End Slice")
CLINICAL = ("Patient ID", "Position", "Bilateral Information")


class Series(NamedTuple):
    """A DICOM series."""

    folder: str
    description: str
    number: int
    slices: int
    rising: bool  # whether the position along the normal grows with InstanceNumber
    right_first: bool  # whether the columns run from the patient's right to the left


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes the headers of each patient. Raises InputError with all problems."""
    splits = read_lists(root)
    boxes, clinical = read_boxes(root), read_clinical(root)
    folders = {place.name: place for place, _ in walk(root) if PATIENT.fullmatch(place.name) and has_series(place)}
    if not folders:
        raise InputError(f"{root}: has no folder Breast_MRI_xxx with DICOM series: name the folder that contains them")
    regions = breast_masks(root)
    wanted = sorted(splits.keys() & folders.keys())
    with ThreadPoolExecutor(WORKERS) as pool:
        found = dict(zip(wanted, pool.map(lambda name: series_of(folders[name], out), wanted), strict=True))
    rows, left_out, problems = [], Counter[str](), []
    left_out["patients of the lists without a folder"] = len(splits.keys() - folders.keys())
    left_out["patients in no list"] = len(folders.keys() - splits.keys())
    for name in wanted:
        kinds = chosen(found[name], left_out)
        side, bilateral = clinical.get(name, ("", False))
        if lacking := [kind for kind in ("pre", "plain", "1", "2") if kind not in kinds]:
            left_out[f"cases without {WORDS.get(lacking[0], f'phase {lacking[0]}')}"] += 1
        elif bilateral:
            left_out["bilateral cases"] += 1
        elif regions and name not in regions:
            left_out["cases without a breast mask"] += 1
        elif side not in ("L", "R") or name not in boxes:
            what = "has no side in Position" if side not in ("L", "R") else "has no box"
            problems.append(f"{name}: {what}: copy the tables of TCIA again")
        else:
            rows.append(row_of(name, splits[name], kinds, side, boxes[name], regions.get(name)))
    refuse(problems)
    found_words = f"{len(folders)} patients, {len(rows)} cases with both sequences and two phases"
    flags = "--config.data.channels=2" + ("" if regions else " --config.data.region=nonzero")
    caution = "" if regions else "without breast masks, voxels outside of the breasts count in every figure"
    return Prepared(rows, found_words, left_out, flags, caution, recipe="maemi:paper", licence="CC BY-NC 4.0")


WORDS = {"pre": "a fat-saturated series before contrast", "plain": "a series without fat saturation"}


def row_of(
    name: str, split: str, kinds: dict[str, Series], side: str, box: tuple[int, ...], region: Path | None
) -> Row:
    """The case of a patient: both breasts with the lesion in the test, else the healthy half."""
    plain, pre = kinds["plain"], kinds["pre"]
    healthy_first = plain.right_first == (side == "L")
    half = "" if split == "test" else "first" if healthy_first else "second"
    phases = [kinds[key].folder for key in sorted(kinds) if key.isdigit()]
    return Row(
        name,
        name,
        split,
        int(split == "test"),
        (plain.folder, pre.folder),
        region=str(region) if region else None,
        boxes=(voxels(box, pre),),
        pre=(pre.folder,),
        post=tuple(phases),
        extra={"boxes_on": "2", "midline": "middle", "half": half, "side": side},
    )


def voxels(box: tuple[int, ...], series: Series) -> tuple[float, ...]:
    """A box of the table, x0 y0 z0 x1 y1 z1 from 1 and inclusive, as half-open bounds in voxels of the volume.

    The slices of the volume are sorted along the normal, those of the table by InstanceNumber.
    """
    low, high = np.array(box[:3], float) - 1, np.array(box[3:], float)
    if not series.rising:
        low[2], high[2] = series.slices - high[2], series.slices - low[2]
    return (*low.tolist(), *high.tolist())


def chosen(series: list[Series], left_out: Counter[str]) -> dict[str, Series]:
    """The series of each kind: "pre", "plain", or the number of a phase. Of several of a kind, the first counts."""
    found: dict[str, Series] = {}
    for one in sorted(series, key=lambda one: one.number):
        kind = kind_of(one.description)
        if not kind:
            left_out["series of another kind"] += 1
        elif kind in found:
            left_out["second series of a kind"] += 1
        else:
            found[kind] = one
    return found


def kind_of(description: str) -> str:
    """ "pre", "plain", the number of a phase, or "" for another series."""
    text = re.sub(r"\s+", " ", description.strip().lower())
    if text in PRE:
        return "pre"
    if text in PLAIN:
        return "plain"
    match = next((match for pattern in PHASE if (match := re.fullmatch(pattern, text))), None)
    return match[1] if match else ""


def has_series(place: Path) -> bool:
    return any(
        name.lower().endswith(".dcm") or is_dicom(folder / name) for folder, names in walk(place) for name in names
    )


def series_of(folder: Path, out: Path) -> list[Series]:
    """The MR series of a patient, from their headers; or as an earlier call wrote them to `out`/series.

    Raises InputError where a header cannot be read.
    """
    kept = out / "series" / f"{folder.name}.json"
    if kept.is_file():
        try:
            return [Series(*one) for one in json.loads(kept.read_text(encoding="utf-8"))]
        except (ValueError, TypeError):
            pass  # it was cut short: read the headers again
    found = []
    for place, names in walk(folder):
        files = [place / name for name in names if name.lower().endswith(".dcm") or is_dicom(place / name)]
        if files and (one := header_of(place, files)):
            found.append(one)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(found))
    return found


def header_of(place: Path, files: list[Path]) -> Series | None:
    """What the headers of a series tell; None where it is no MR series, such as a segmentation."""
    tags = ["Modality", "SeriesDescription", "SeriesNumber", "InstanceNumber", "ImagePositionPatient"]
    try:
        heads = [
            pydicom.dcmread(f, stop_before_pixels=True, specific_tags=[*tags, "ImageOrientationPatient"]) for f in files
        ]
        first = heads[0]
        if str(first.get("Modality")) != "MR":
            return None
        description, number = str(first.get("SeriesDescription") or ""), int(first.get("SeriesNumber") or 0)
        row, column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
        along = [(int(h.InstanceNumber), float(np.dot(np.cross(row, column), h.ImagePositionPatient))) for h in heads]
    except Exception as error:  # pydicom raises errors of any class on damaged files
        raise InputError(
            f"{place}: a header is not readable ({error}): copy the series again".replace("\n", " ")
        ) from None
    along.sort()
    return Series(str(place), description, number, len(files), along[0][1] <= along[-1][1], bool(row[0] > 0))


def read_lists(root: Path) -> dict[str, str]:
    """The split of each patient in MAEMI's lists. Raises InputError without them, or for a patient in two."""
    found: dict[str, str] = {}
    places = defaultdict[Path, dict[str, Path]](dict)
    for name in SPLITS:
        for path in named(root, name):
            places[path.parent][name] = path
    whole = [paths for paths in places.values() if paths.keys() == SPLITS.keys()]
    if len(whole) != 1:
        what = "has several folders with" if whole else "has no"
        raise InputError(
            f"{root}: {what} train.csv, valid.csv and test.csv: copy MAEMI's anomaly_no_bilateral there, once"
        )
    for name, split in SPLITS.items():
        for line in table_of(whole[0][name], "identifier"):
            if found.setdefault(line["identifier"], split) != split:
                raise InputError(f"{whole[0][name]}: {line['identifier']} is in two lists: copy the lists again")
    return found


def table_named(root: Path, name: str) -> Path:
    return one_file(root, f"{name}.xlsx", f"{name}.csv", what="the table of TCIA")


def read_boxes(root: Path) -> dict[str, tuple[int, ...]]:
    """The box of each patient: columns, rows and slices, first and last, from 1."""
    path = table_named(root, "Annotation_Boxes")
    try:
        return {
            line["Patient ID"]: tuple(int(float(line[name])) for name in BOX)
            for line in table_of(path, "Patient ID", *BOX)
        }
    except ValueError as error:
        raise InputError(f"{path}: a box is not of whole numbers ({error}): copy the table again") from None


def read_clinical(root: Path) -> dict[str, tuple[str, bool]]:
    """(The side of the tumour, whether the case is bilateral) of each patient. Rows below the names hold codes."""
    lines = table_of(table_named(root, "Clinical_and_Other_Features"), *CLINICAL)
    return {
        line["Patient ID"]: (line["Position"].strip()[:1].upper(), line["Bilateral Information"] == "1")
        for line in lines
        if PATIENT.fullmatch(line["Patient ID"])
    }


def breast_masks(root: Path) -> dict[str, Path]:
    """The breast mask of each patient that has one. Raises InputError where a patient has several."""
    found: dict[str, Path] = {}
    for place, names in walk(root):
        for name in names:
            match = re.fullmatch(r"(?:Segmentation_)?(Breast_MRI_\d{3})(?:_Breast\.seg\.nrrd|\.nii\.gz|\.nii)", name)
            if match and (other := found.setdefault(match[1], place / name)) != place / name:
                raise InputError(f"{place / name}: {other} is a breast mask of the same patient: keep one")
    return found
