"""Opens every file that rows name, each once, and reports all problems."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_collections import ConfigDict

from jmae.data.files import OffGrid, ReadFile
from jmae.data.manifest import PHANTOM, Finding, Row
from jmae.data.preparation import CaseReader, Marked, Opened, boxes_grid, lesion_mask, region_mask, stored_case
from jmae.errors import InputError
from jmae.waiting import at_work

WORKERS = min(16, os.cpu_count() or 1)  # threads that read
UseCase = Callable[[Row, Opened], object]


def open_each(
    rows: Sequence[Row], *, workers: int, use: UseCase | None = None, data: ConfigDict | None = None
) -> list[Finding]:
    """Opens every image, mask, region and series of contrast; returns all problems in the order of the rows.

    Kinds of findings:
      - "unreadable": a missing or damaged file, or a case that `use` refuses.
      - "geometry": another grid than the image's, or another rank or number of channels than most images have.
      - "truth": a mask, region or box that contradicts the label, marks nothing, or lies outside the image.

    Phantoms pass.

    Args:
      rows: rows of a manifest.
      workers: number of threads.
      use: called with every case whose image was read; raises InputError where the case cannot be used.
      data: the recipe's section; without it all files of a case must lie on one grid.
    """
    real = [row for row in rows if row.image and not row.image[0].startswith(PHANTOM)]
    found: list[tuple[tuple[int, int] | None, list[tuple[str, str]]]] = []
    with at_work(lambda: f"{len(found)} of {len(real)} cases read"), ThreadPoolExecutor(max(1, workers)) as pool:
        found.extend(pool.map(lambda row: _open_row(row, use, data), real))
    usual = Counter(shape for shape, _ in found if shape).most_common(1)
    problems = []
    for row, (shape, lines) in zip(real, found, strict=True):
        problems += [Finding(kind, (row,), line) for kind, line in dict.fromkeys(lines)]
        if shape and shape != usual[0][0]:
            (rank, channels), (ranks, most) = shape, usual[0][0]
            what = f"{row.image[0]}: {rank}D with {channels} channels where most are {ranks}D with {most}"
            problems.append(Finding("geometry", (row,), f"{what}: complete or convert it, or leave the case out"))
    return problems


def lines_of(findings: Iterable[Finding]) -> list[str]:
    """Each finding as "CASE: what"; some begin with their case themselves."""
    return [f"{one.rows[0].id}: {one.what.removeprefix(f'{one.rows[0].id}: ')}" for one in findings]


def _open_row(
    row: Row, use: UseCase | None, data: ConfigDict | None
) -> tuple[tuple[int, int] | None, list[tuple[str, str]]]:
    """((rank, channels) of the image if it could be read, (kind, problem) of each)."""
    lines: list[tuple[str, str]] = []
    reader, image = CaseReader(row), None
    try:
        image = stored_case(row, data, reader)
    except InputError as error:
        lines += _failures(row.image, reader) or [_problem(error)]

    masks, complete, outside = dict[str, Marked | None](), True, list[str]()
    for name, read in (("lesion", lesion_mask), ("region", region_mask)):
        masks[name] = None
        try:
            if name == "lesion" and image is not None and row.boxes:
                outside = list(_boxes_outside(row, boxes_grid(row, image, reader).size))
                if outside and not row.mask:
                    continue
            masks[name] = read(row, image, data, reader)
        except InputError as error:
            lines.append(_problem(error))
            complete = False
    complete = complete and not outside
    lines += [("truth", line) for line in (*_contradictions(row, masks["lesion"], masks["region"]), *outside)]

    if image is not None:
        if use:
            try:
                use(row, Opened.of(image, masks["lesion"], masks["region"], reader, complete))
            except InputError as error:
                lines.append(_problem(error))
                image = None  # its shape says nothing more
    lines += _failures([file for file in (*row.pre, *row.post) if file not in reader.tried], reader)
    return (len(image.size), image.array.shape[-1]) if image else None, lines


def _contradictions(row: Row, lesion: Marked | None, region: Marked | None) -> Iterator[str]:
    """The problems of a row's mask, region and boxes, such as a mask that contradicts the label.

    Lesions of a half may lie in the other half. Its own lesions are looked at when the half is cut.
    """
    half = bool(row.extra.get("half"))
    if lesion and row.mask and row.label is not None and not half and lesion.mask.any() != bool(row.label):
        marked = np.count_nonzero(lesion.mask)
        yield f"{row.mask}: the mask marks {marked} values and the label is {row.label}: repair one of them"
    if region and not region.mask.any():
        yield f"{row.region}: the region marks nothing: leave it empty or repair it"
    if row.boxes and row.label == 0 and not half:
        yield f"{row.image[0]}: boxes of lesions and the label 0: repair one of them"


def _boxes_outside(row: Row, size: tuple[int, ...]) -> Iterator[str]:
    ends = size[::-1] if len(size) == 2 else size  # x runs along the columns in 2D, along i in 3D
    for box in row.boxes:
        rank = len(box) // 2
        if rank != len(ends) or min(box) < 0 or any(np.greater(box[rank:], ends)):
            yield f"{row.image[0]}: box {box} is not inside the image of size {size}: repair it"


def _problem(error: InputError) -> tuple[str, str]:
    """(The kind of a finding, its line.)"""
    further = ", or delete its row" if isinstance(error.__cause__, FileNotFoundError) else ""
    return "geometry" if isinstance(error, OffGrid) else "unreadable", f"{error}{further}"


def _failures(files: Iterable[str], read: ReadFile) -> list[tuple[str, str]]:
    """("unreadable", the error) of each file that cannot be read."""
    lines = []
    for file in files:
        try:
            read(file)
        except InputError as error:
            lines.append(_problem(error))
    return lines
