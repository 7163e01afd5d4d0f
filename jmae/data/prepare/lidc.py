"""LIDC-IDRI, chest CT with the contours of up to four readers (Armato et al., Medical Physics 2011).

Folders LIDC-IDRI-xxxx contain DICOM series, one file for each slice. An XML file has the readings of one series:
`LidcReadMessage / readingSession / unblindedReadNodule / roi / {imageSOP_UID, inclusion, edgeMap / {xCoord, yCoord}}`,
with pixels counted from 0. A nodule below 3 mm is a single point. SOP instance UIDs link an XML file to its series. In
a reading without any mark the header's series UID does so. A series without a reading is left out. Of two slices at one
z, the slice with the lower InstanceNumber stays, with the marks of both.

The slices and splits are those of P-PII. A slice is healthy where it is farther than 5 slices (in the order of z) from
every mark, a point included. A slice with a contour is abnormal. A slice with only points is left out. The mask is the
union of the readers' filled contours, and each connected part of it has a box. "nonNodule" marks are no lesions. ours:
the pixels of a contour count as lesion, although readers draw it just outside the nodule.
"""

import os
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from scipy import ndimage
from skimage.draw import polygon

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, draw, refuse
from jmae.data.prepare.tables import parse_xml
from jmae.data.prepare.tree import walk
from jmae.data.slices import distance, write_png
from jmae.errors import InputError

MARGIN = 5  # slices
TRAIN, VAL = 800, 100  # patients by id
HEALTHY, ABNORMAL = 500, 478  # slices drawn for val, and again for test
WINDOW = "--config.data.window=-1024,3071"  # HU
TAGS = "SOPInstanceUID SeriesInstanceUID Modality ImagePositionPatient InstanceNumber Rows Columns".split()
SAME_Z = 0.001  # mm

Roi = tuple[bool, np.ndarray]  # (True: adds, False: excludes; contour points (n, 2): x, y)


class Reading(NamedTuple):
    """The marks of one or several XML files."""

    series: set[str]  # series UIDs in headers
    marked: set[str]  # SOP UIDs of all marks, "nonNodule" included
    contours: dict[str, list[list[Roi]]]  # the contours of each nodule, by SOP UID
    points: set[str]  # SOP UIDs with a nodule below 3 mm


class Slice(NamedTuple):
    """One DICOM file of a series."""

    name: str  # PATIENT_SCAN_NUMBER; scans count from 1 in the order of their UIDs, slices from 0 upwards along z
    file: Path
    sop: str
    size: tuple[int, int]  # rows, columns


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes masks as `out`/masks/SLICE.png. Raises InputError with all problems."""
    patients, messages = _walk(root)
    left_out = Counter[str]()
    reading = _readings(messages, left_out)
    scans = {patient: _scans(patient, patients[patient], reading, left_out) for patient in sorted(patients)}
    scans = {patient: found for patient, found in scans.items() if found}
    if not scans:
        raise InputError(
            f"{root}: none of {len(patients)} folders LIDC-IDRI-xxxx has a CT series with a reading: copy the series "
            "and the XML files there"
        )
    there = {one.sop for found in scans.values() for scan in found for one in scan}
    left_out["marked slices without an image"] = len({*reading.contours, *reading.points} - there)
    healthy: dict[str, list[Slice]] = defaultdict(list)
    lesions: dict[str, list[Slice]] = defaultdict(list)
    for number, patient in enumerate(scans):
        split = "train" if number < TRAIN else "val" if number < TRAIN + VAL else "test"
        for scan in scans[patient]:
            abnormal = [one.sop in reading.contours for one in scan]
            marked = np.array([has or one.sop in reading.points for has, one in zip(abnormal, scan, strict=True)])
            far = distance(np.arange(len(scan)), np.flatnonzero(marked)) > MARGIN
            healthy[split] += [one for one, free in zip(scan, far, strict=True) if free]
            left_out[f"slices within {MARGIN} of a mark"] += int(np.count_nonzero(~far & ~marked))
            left_out["slices with only a point mark"] += int(np.count_nonzero(marked) - sum(abnormal))
            if split == "train":
                left_out["lesion slices of training patients"] += sum(abnormal)
            else:
                truth = [one for one, has in zip(scan, abnormal, strict=True) if has and _mask(one, reading).any()]
                left_out["lesion slices without a pixel inside"] += sum(abnormal) - len(truth)
                lesions[split] += truth

    rows = []
    for split in ("train", "val", "test"):
        pools = [healthy[split], lesions[split]]
        if split != "train":  # ours: val, which only chooses the threshold, is drawn in the same way
            pools = [draw(pool, n, seed, lambda s: s.name) for pool, n in zip(pools, (HEALTHY, ABNORMAL), strict=True)]
            left_out[f"{split} slices not drawn"] += sum(map(len, (healthy[split], lesions[split])))
            left_out[f"{split} slices not drawn"] -= sum(map(len, pools))
        rows += [_row(one, split, None, out) for one in pools[0]]
        rows += [_row(one, split, _mask(one, reading), out) for one in pools[1]]
    found = f"{sum(map(len, scans.values()))} scans with a reading of {len(scans)} patients"
    return Prepared(rows, found, left_out, WINDOW, recipe="ppii:paper", licence="CC BY 3.0")


def _walk(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """(the .dcm files below each folder LIDC-IDRI-xxxx, all .xml files). Raises InputError without either."""
    patients: dict[str, list[Path]] = {}
    messages = []
    for folder, names in walk(root):
        patient = re.search(r"LIDC-IDRI-\d{4}(?!\d)", os.path.relpath(folder, root.parent))
        if patient:
            patients.setdefault(patient[0], []).extend(folder / name for name in names if name.lower().endswith(".dcm"))
        messages += [folder / name for name in names if name.lower().endswith(".xml")]
    if not patients:
        raise InputError(f"{root}: has no folder LIDC-IDRI-xxxx: name the folder that contains them")
    if not messages:
        raise InputError(f"{root}: has no XML file: copy the readings of LIDC-IDRI (LIDC-XML-only) there")
    return patients, messages


def _readings(messages: list[Path], left_out: Counter[str]) -> Reading:
    """The marks of all CT readings together. Raises InputError with all damaged files."""
    whole, problems = Reading(set(), set(), {}, set()), []
    for file in messages:
        try:
            found = read_xml(file)
        except InputError as error:
            problems.append(str(error))
            continue
        if found is None:
            left_out["XML files without a CT reading"] += 1
            continue
        whole.series.update(found.series)
        whole.marked.update(found.marked)
        whole.points.update(found.points)
        for sop, nodules in found.contours.items():
            whole.contours.setdefault(sop, []).extend(nodules)
    refuse(problems)
    return whole


def read_xml(file: Path) -> Reading | None:
    """The marks of one XML file, or None where it is not a CT reading. Raises InputError for a damaged file."""
    try:
        top = parse_xml(file.read_bytes())
        if not re.fullmatch(r"(\{.*\})?LidcReadMessage", top.tag):
            return None
        reading = Reading({_text(e) for e in top.iterfind(".//{*}SeriesInstanceUid")}, set(), {}, set())
        reading.marked.update(_text(e) for e in top.iterfind(".//{*}imageSOP_UID"))
        for nodule in top.iterfind("{*}readingSession/{*}unblindedReadNodule"):
            rois = [(_text(roi.find("{*}imageSOP_UID")), *_roi(roi)) for roi in nodule.iterfind("{*}roi")]
            point = all(len(edge) == 1 for _, _, edge in rois)
            parts: dict[str, list[Roi]] = defaultdict(list)
            for sop, adds, edge in rois:
                parts[sop].append((adds, edge))
            for sop, contours in parts.items():
                if point:
                    reading.points.add(sop)
                elif any(adds for adds, _ in contours):
                    reading.contours.setdefault(sop, []).append(contours)
        return reading
    except OSError as error:
        raise InputError(f"{file}: not readable ({error.strerror or error}): copy it again") from None
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{file}: not a reading of LIDC-IDRI ({error}): copy it again or move it out") from None


def _roi(roi: ET.Element) -> Roi:
    edge = [[int(_text(e.find(name))) for name in ("{*}xCoord", "{*}yCoord")] for e in roi.iterfind("{*}edgeMap")]
    if not edge:
        raise ValueError("a roi has no edgeMap")
    return _text(roi.find("{*}inclusion")).upper() != "FALSE", np.array(edge)


def _text(element: ET.Element | None) -> str:
    if element is None or not (element.text or "").strip():
        raise ValueError("imageSOP_UID, inclusion, xCoord or yCoord is missing")
    return str(element.text).strip()


def _scans(patient: str, files: list[Path], reading: Reading, left_out: Counter[str]) -> list[list[Slice]]:
    """The CT series of a patient that have a reading, each sorted by z. Raises InputError with all problems."""
    series: dict[str, list[tuple[float, int, str, Path, tuple[int, int]]]] = defaultdict(list)
    problems = []
    for file in files:
        try:
            tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            if str(tags.get("Modality")) == "CT":
                z, size = float(tags.ImagePositionPatient[2]), (int(tags.Rows), int(tags.Columns))
                number = int(tags.get("InstanceNumber") or 0)
                series[str(tags.SeriesInstanceUID)].append((z, number, str(tags.SOPInstanceUID), file, size))
        except Exception as error:  # pydicom raises errors of any class on damaged files
            problems.append(f"{file}: not readable ({error}): copy it again".replace("\n", " "))
    refuse(problems)
    scans: list[list[Slice]] = []
    for name in sorted(series):
        slices = sorted(series[name], key=lambda one: one[:3])
        if name not in reading.series and not any(sop in reading.marked for _, _, sop, _, _ in slices):
            left_out["CT series without a reading"] += 1
            continue
        kept = slices[:1]
        for one in slices[1:]:
            if one[0] - kept[-1][0] > SAME_Z:
                kept.append(one)
            else:
                _move_marks(reading, one[2], kept[-1][2])
                left_out["slices at the z of another slice"] += 1
        title = f"{patient}_{len(scans) + 1}"
        scans.append([Slice(f"{title}_{k:04d}", file, sop, size) for k, (_, _, sop, file, size) in enumerate(kept)])
    return scans


def _move_marks(reading: Reading, sop: str, to: str) -> None:
    """Gives the marks of one slice to another one."""
    if sop in reading.contours:
        reading.contours.setdefault(to, []).extend(reading.contours.pop(sop))
    if sop in reading.points:
        reading.points.remove(sop)
        reading.points.add(to)


def _mask(one: Slice, reading: Reading) -> np.ndarray:
    """bool (rows, columns): the union of all nodules of all readers. Excluding contours make holes in their nodule."""
    union = np.zeros(one.size, bool)
    for rois in reading.contours[one.sop]:
        nodule = np.zeros(one.size, bool)
        for adds, edge in sorted(rois, key=lambda roi: not roi[0]):  # excluding contours come last
            nodule[polygon(edge[:, 1], edge[:, 0], one.size)] = adds
        union |= nodule
    return union


def _row(one: Slice, split: str, mask: np.ndarray | None, out: Path) -> Row:
    case, number = one.name.rsplit("_", 1)
    row = Row(one.name, case.rsplit("_", 1)[0], split, int(mask is not None), (str(one.file),))
    row = row._replace(extra={"case": case, "slice": str(int(number))})
    if mask is None:
        return row
    return row._replace(mask=write_png(out / "masks" / f"{one.name}.png", mask), boxes=tuple(_boxes(mask)))


def _boxes(mask: np.ndarray) -> Iterator[tuple[float, ...]]:
    """The box x0 y0 x1 y1 of each connected part; pixels that touch at a corner are connected."""
    for rows, columns in ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0]):
        yield (columns.start, rows.start, columns.stop, rows.stop)
