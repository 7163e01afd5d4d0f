"""python -m jmae.data.slices MANIFEST.csv --out DIR [--axis axial] [--margin 5] [--least 0.1] [--every 1] [--debug]

Cuts the volumes of a manifest into slices: DIR/manifest.csv serves any 2D recipe, DIR/slices has the files: images as
32-bit TIFF with the stored values, a channel for each sequence of a case, masks and regions as PNG.

--axis    axial, coronal or sagittal by the volume's affine, or 0, 1, 2: that axis of the file. Slices are those stored,
          nothing is resampled. With an affine they look as radiologists expect: axial anterior up, coronal and sagittal
          head up, the patient's right on the left, in sagittal ones anterior on the left; without, rows and columns are
          the other two axes in their order.
--margin  a lesion slice is one with a voxel of the mask or with a box; a slice is healthy where it lies farther than
          this from every one, in slices (5) or in mm (10mm). What is neither is left out.
--least   a slice is left out whose region covers less than this share of the area that it covers in that slice of the
          case where it is largest; 0 leaves out only slices without any. The region is that of the row, else the voxels
          that are not 0 in some channel: without a background of zeros, as in CT, these are nearly all, and nothing is
          left out.
--every   n: only the slices 0, n, 2n, ... of the file's axis.

Lesion slices have label 1 and their mask or boxes, healthy ones label 0, those of abnormal cases too. `train` gets
healthy slices alone, so an abnormal case there needs a mask or boxes; in other splits its slices then have no label, as
all in `unlabeled`. Columns `case` and `slice` (from 0, along the file's axis) say where a slice is from; a patient that
is not named is the case. `pre`, `post` and `midline` end here.

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image as pillow

from jmae.data.files import Image, write_map
from jmae.data.loader import WORKERS
from jmae.data.manifest import COLUMNS, ID_BYTES, PHANTOM, Row, parse_manifest, summary
from jmae.data.opening import lines_of, open_each
from jmae.data.preparation import Opened, lesion_mask, region_mask, stored_image
from jmae.errors import InputError, exit_code
from jmae.recipe import arguments, typed
from jmae.run_folder import write_text

ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis of RAS along which slices follow each other
ROWS_COLUMNS = {0: (2, 1), 1: (2, 0), 2: (1, 0)}  # RAS axes down and across a slice; all run against RAS: I, P, L
OF_VOLUMES = ("midline", "half")  # columns that mean nothing in 2D


class How(NamedTuple):
    """What the flags say."""

    axis: str = "axial"  # or coronal, sagittal, "0", "1", "2"
    margin: float = 5
    mm: bool = False  # the margin's unit, else slices
    least: float = 0.1
    every: int = 1


class Layout(NamedTuple):
    """How slices lie in a volume: own axes, and which of the two in the plane are mirrored."""

    across: int
    down: int
    right: int
    mirrored: tuple[bool, bool]  # down, right

    def plane(self, volume: np.ndarray, k: int) -> np.ndarray:
        """Slice k of (*size[, c]) as (rows, columns[, c])."""
        plane = volume.take(k, self.across)
        plane = plane.swapaxes(0, 1) if self.down > self.right else plane
        return plane[:: -1 if self.mirrored[0] else 1, :: -1 if self.mirrored[1] else 1]

    def box(self, box: Sequence[float], size: tuple[int, ...]) -> tuple[float, ...]:
        """x0 y0 x1 y1 in a slice, x along its columns, of x0 y0 z0 x1 y1 z1 in a volume of `size`."""
        low, high = [], []
        for axis, mirrored in ((self.right, self.mirrored[1]), (self.down, self.mirrored[0])):
            a, b = box[axis], box[axis + 3]
            low.append(size[axis] - b if mirrored else a)
            high.append(size[axis] - a if mirrored else b)
        return (*low, *high)


def main(argv: list[str]) -> int:
    names, given = command(argv, __doc__, ["out", "axis", "margin", "least", "every"])
    if len(names) != 1 or "out" not in given:
        raise InputError("name one manifest and a new folder: python -m jmae.data.slices MANIFEST.csv --out=DIR")
    print(cut_manifest(Path(names[0]), Path(given["out"]), settings(given)))
    return 0


def settings(given: dict[str, str]) -> How:
    """The flags, checked."""
    how = How()
    axis = given.get("axis", how.axis)
    if axis not in (*ACROSS, "0", "1", "2"):
        raise InputError(f"--axis={axis}: is no axis: write axial, coronal or sagittal, or 0, 1, 2")
    margin = given.get("margin", f"{how.margin:g}")
    number = re.fullmatch(r"(\d+)|(\d+\.?\d*) ?mm", margin)
    if not number:
        raise InputError(f"--margin={margin}: is no distance: write whole slices, as 5, or mm, as 10mm")
    least = typed("least", given.get("least", ""), how.least) if "least" in given else how.least
    every = typed("every", given.get("every", ""), how.every) if "every" in given else how.every
    if not 0 <= least <= 1:
        raise InputError(f"--least={least}: is no share of an area: write a number from 0 to 1")
    if every < 1:
        raise InputError(f"--every={every}: is no step: write 1 for all slices, 2 for every other one")
    return How(axis, float(number[1] or number[2]), number[1] is None, least, every)


def cut_manifest(manifest: Path, out: Path, how: How = How()) -> str:  # noqa: B008, it cannot be changed
    """Cuts all volumes and writes the manifest of the slices last; says what there is and what was left out.

    Raises InputError with all problems, a line each; no manifest is written then.
    """
    refuse_used(out)
    rows, ignored, problems = parse_manifest(manifest, crops=True, normal_crops_only=True)
    folder = None if problems else out
    found: dict[str, tuple[list[Row], Counter[str]]] = {}

    def use(row: Row, case: Opened) -> None:
        found[row.id] = slice_case(row, case, how, folder)

    problems += lines_of(open_each(rows, workers=WORKERS, use=use))
    for row in rows:
        if row.image and row.image[0].startswith(PHANTOM):
            stored = stored_image(row)
            try:
                use(row, Opened(stored, lesion_mask(row, stored), region_mask(row, stored)))
            except InputError as error:
                problems.append(f"{row.id}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    slices = [one for row in rows for one in found[row.id][0]]
    left_out = sum((found[row.id][1] for row in rows), Counter[str]())
    if not slices:
        raise InputError(f"{manifest}: no slice is left ({counted(left_out)}): lower --margin or --least")
    write_manifest(out, slices)
    empty = sum(not found[row.id][0] for row in rows)
    return (
        f"{out / 'manifest.csv'}: {len(slices)} slices of {len(rows) - empty} volumes: {summary(slices, ignored)}; "
        f"left out: {counted(left_out)}" + (f"; {empty} volumes give no slice" if empty else "")
    )


def slice_case(row: Row, case: Opened, how: How, out: Path | None) -> tuple[list[Row], Counter[str]]:
    """The rows of a volume's slices, and how many slices were left out for which reason.

    The files are written below `out` if it is given. Raises InputError where slices of the volume cannot be cut.
    """
    array, size = case.image.array, case.image.size
    _check_volume(row, array)
    layout = lie(how.axis, case.image.affine, row.image[0])
    if not case.complete:
        return [], Counter()  # `open_each` says what is wrong
    others = tuple(axis for axis in range(3) if axis != layout.across)
    mask = case.lesion if row.mask else None
    masked = np.zeros(size[layout.across], bool) if mask is None else np.any(mask, axis=others)
    spans = [_span(box, layout.across, len(masked)) for box in row.boxes]
    marked = np.array(masked)
    for span in spans:
        marked[span.start : span.stop] = True
    near = _near(marked, case.image, layout, how, row.image[0])
    known = row.label == 0 or mask is not None or bool(row.boxes)
    region = case.region
    areas = np.count_nonzero(np.any(array != 0, axis=-1) if region is None else region, axis=others)
    little = (areas == 0) | (areas < how.least * areas.max())
    extra = {column: cell for column, cell in row.extra.items() if column not in OF_VOLUMES}

    rows, left_out = [], Counter[str]()
    for k in range(0, len(marked), how.every):
        if little[k]:
            left_out["with little region" + (" (lesion slices)" if marked[k] else "")] += 1
        elif near[k]:
            left_out["within the margin of a lesion"] += 1
        elif marked[k] and row.split == "train":
            left_out["lesion slices in train"] += 1
        else:
            drawn = lambda what, whole, k=k: _drawn(out, row.id, k, what, layout.plane(whole, k))
            rows.append(
                Row(
                    id=f"{row.id}_{k:04d}",
                    patient=row.patient or row.id,
                    split=row.split,
                    label=int(marked[k]) if known else None,
                    image=_written(out, row.id, k, layout.plane(array, k)),
                    mask=drawn("mask", mask) if mask is not None and masked[k] else None,
                    region=None if region is None else drawn("region", region),
                    boxes=tuple(layout.box(box, size) for box, span in zip(row.boxes, spans, strict=True) if k in span),
                    extra=extra | {"case": row.id, "slice": str(k)},
                )
            )
    return rows, left_out


def _check_volume(row: Row, array: np.ndarray) -> None:
    name = row.image[0]
    if array.ndim != 4:
        raise InputError(f"{name}: is no volume, of which slices are cut: list it in a manifest of its own")
    if row.extra.get("half"):
        raise InputError(f"{name}: half {row.extra['half']!r}, but slices are cut whole: cut the file, empty the cell")
    if len(row.id.encode()) > ID_BYTES - 6 or ";" in row.id:
        raise InputError(f"{name}: the id {row.id[:20]!r} is too long or holds a semicolon: a slice is named by it")
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise InputError(f"{name}: {bad} values are not finite: mend the file or drop its row")


def _near(marked: np.ndarray, stored: Image, layout: Layout, how: How, name: str) -> np.ndarray:
    """Which slices (n,) lie within the margin of a lesion slice and are none."""
    step = 1.0
    if how.mm and marked.any():
        if stored.spacing is None:
            raise InputError(f"{name}: tells no spacing for a margin in mm: save it as NIfTI, or give it in slices")
        step = stored.spacing[layout.across]
    return ~marked & (distance(np.arange(len(marked)), np.flatnonzero(marked)) * step <= how.margin + 1e-6)


def lie(axis: str, affine: np.ndarray | None, name: str) -> Layout:
    """How the slices across `axis` lie in a volume with an affine (4, 4) voxel -> RAS mm, or without."""
    if affine is None:
        if axis in ACROSS:
            raise InputError(
                f"{name}: tells no position, so that {axis} would be guessed: save it as NIfTI or DICOM series, or "
                "write --axis=0, 1 or 2"
            )
        down, right = (other for other in range(3) if other != int(axis))
        return Layout(int(axis), down, right, (False, False))
    ras, signs = (
        nib.io_orientation(affine).astype(int).T
    )  # of each own axis: the nearest of RAS, and along it or against
    own = {int(world): i for i, world in enumerate(ras)}
    across = own[ACROSS[axis]] if axis in ACROSS else int(axis)
    down, right = (own[world] for world in ROWS_COLUMNS[int(ras[across])])
    return Layout(across, down, right, (bool(signs[down] > 0), bool(signs[right] > 0)))


def distance(at: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """How far each of the numbers `at` (n,) is from the nearest of `marks` (m,); inf where there are none."""
    if not len(marks):
        return np.full(len(at), np.inf)
    return np.abs(np.asarray(at, float)[:, None] - np.asarray(marks, float)).min(1)


def _span(box: Sequence[float], axis: int, n: int) -> range:
    """The slices of a box, rounded as by `boxes_mask`."""
    low, high = (int(np.floor(box[i] + 0.5)) for i in (axis, axis + 3))
    low = min(low, n - 1)
    return range(low, max(low + 1, high))


def _written(out: Path | None, case: str, k: int, array: np.ndarray) -> tuple[str, ...]:
    if out is None:
        return ("",)
    path = out.absolute() / "slices" / case / f"{k:04d}"
    _folder(path.parent)
    return (str(write_map(path, array, Image(array, None, None, None))),)


def _drawn(out: Path | None, case: str, k: int, what: str, mask: np.ndarray) -> str:
    return write_png(out.absolute() / "slices" / case / f"{k:04d}_{what}.png", mask) if out else ""


# What `jmae.data.prepare` shares


def command(argv: Sequence[str], usage: str | None, known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names and the {FLAG: VALUE} of a command line in any order; raises InputError as `recipe.arguments`."""
    names, flags, words = [], [], iter(argv)
    for word in words:
        if word.startswith("-"):
            flags += [word] if "=" in word or word in ("--help", "-h") else [word, *islice(words, 1)]
        else:
            names.append(word)
    return names, arguments(flags, usage or "", known)


def refuse_used(out: Path) -> None:
    """Raises InputError where a folder has a manifest: it might be the one that is read, or that of other files."""
    if (out / "manifest.csv").exists():
        raise InputError(f"{out / 'manifest.csv'}: is there already: name another folder, or remove it")


def write_png(path: Path, array: np.ndarray) -> str:
    """Writes (rows, columns) as PNG, uint8 or uint16 as it is, bool as 0 and 255; returns the path."""
    _folder(path.parent)
    try:
        pillow.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array).save(path, compress_level=4)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror or error}): free space or change --out") from None
    return str(path)


def write_manifest(out: Path, rows: Sequence[Row]) -> None:
    """Writes rows as `out`/manifest.csv, whole or not at all; paths below `out` become relative to it."""
    folder = os.path.join(os.path.abspath(out), "")
    place = lambda path: (path or "").removeprefix(folder)
    boxed = any(row.boxes for row in rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(["boxes"] if boxed else []), *rows[0].extra])
    for row in rows:
        label, image = "" if row.label is None else row.label, ";".join(map(place, row.image))
        cells = [row.id, row.patient, row.split, label, image, place(row.mask), place(row.region)]
        boxes = ";".join(" ".join(f"{x:.10g}" for x in box) for box in row.boxes)
        writer.writerow([*cells, *([boxes] if boxed else []), *row.extra.values()])
    write_text(out / "manifest.csv", text.getvalue())


def counted(left_out: Counter[str]) -> str:
    """ "12 of this, 3 of that"."""
    return ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()) if n) or "nothing"


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror or error}): free space or change --out") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
