"""python -m jmae.data.slices MANIFEST.csv --out DIR [--axis axial] [--margin 5] [--least 0.1] [--every 1] [--debug]

Cuts the volumes of a manifest into slices. DIR/manifest.csv lists the slices for 2D recipes. DIR/slices contains images
as 32-bit TIFF with the stored values (one channel for each sequence), and masks and regions as PNG.

--axis    Direction across the slices: axial, coronal or sagittal by the volume's affine, or axis 0, 1 or 2 of the file.
          Slices are the stored ones; nothing is resampled. With an affine, slices are shown as radiologists expect. In
          axial slices anterior is up; in coronal and sagittal slices the head is up. The patient's right is on the
          left; in sagittal slices anterior is on the left. Without an affine, rows and columns are the other two axes
          in their order.
--margin  Distance between healthy slices and lesion slices, in slices (5) or mm (10mm). A lesion slice contains a voxel
          of the mask, or a box. A slice is healthy where it lies farther than the margin from every lesion slice. All
          others are left out.
--least   Smallest area of a slice's region, as a share of the largest area in the same case. Slices below it are left
          out; 0 leaves out only slices with an empty region. The region is that of the row. Without one, it is the
          voxels that are not 0 in some channel. Images without a background of zeros, such as CT, thus lose no slice.
--every   Step n: only the slices 0, n, 2n, ... along the file's axis are used.

A lesion slice has label 1, and its mask or boxes. A healthy slice has label 0, also in an abnormal case. An abnormal
case in `train` needs a mask or boxes, as `train` gets only healthy slices. In other splits, the slices of an abnormal
case without a mask or boxes have no label. In `unlabeled` no slice has a label. The columns `case` and `slice` (from 0,
along the file's axis) name the source of a slice. An empty patient becomes the case. `pre`, `post` and `midline` are
dropped.

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import csv
import io
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image as pillow

from jmae import recipe
from jmae.data.files import Image, write_map
from jmae.data.manifest import COLUMNS, PHANTOM, Row, parse_manifest, summary
from jmae.data.names import ID_BYTES
from jmae.data.opening import WORKERS, lines_of, open_each
from jmae.data.preparation import Opened, open_case, stored_image
from jmae.errors import InputError, exit_code
from jmae.recipe import suggested, typed
from jmae.run_folder import write_text
from jmae.tables import counted

ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # axis of RAS across the slices
ROWS_COLUMNS = {
    0: (2, 1),
    1: (2, 0),
    2: (1, 0),
}  # RAS axes down and along a row of a slice; both run against RAS (I, P, L)
VOLUME_COLUMNS = ("midline", "half")  # columns without a meaning in 2D


class Options(NamedTuple):
    """The flags of the command line; its usage explains them."""

    axis: str = "axial"  # or coronal, sagittal, "0", "1", "2"
    margin: float = 5
    mm: bool = False  # unit of the margin: mm or slices
    least: float = 0.1
    every: int = 1


class Layout(NamedTuple):
    """The place of slices in a volume, as axes of the stored array."""

    across: int  # from slice to slice
    down: int  # from row to row
    right: int  # from column to column
    mirrored: tuple[bool, bool]  # whether `down` and `right` are mirrored

    def plane(self, volume: np.ndarray, k: int) -> np.ndarray:
        """Slice k of a volume (*size[, c]), as (rows, columns[, c])."""
        plane = volume.take(k, self.across)
        plane = plane.swapaxes(0, 1) if self.down > self.right else plane
        return plane[:: -1 if self.mirrored[0] else 1, :: -1 if self.mirrored[1] else 1]

    def box(self, box: Sequence[float], size: tuple[int, ...]) -> tuple[float, ...]:
        """The box x0 y0 x1 y1 in a slice of the box x0 y0 z0 x1 y1 z1 in a volume of `size`; x counts columns."""
        low, high = [], []
        for axis, mirrored in ((self.right, self.mirrored[1]), (self.down, self.mirrored[0])):
            a, b = box[axis], box[axis + 3]
            low.append(size[axis] - b if mirrored else a)
            high.append(size[axis] - a if mirrored else b)
        return (*low, *high)


def main(argv: list[str]) -> int:
    names, flags = recipe.command(argv, __doc__, ["out", "axis", "margin", "least", "every"])
    if len(names) != 1 or "out" not in flags:
        raise InputError("name one manifest and a new folder: jmae slices MANIFEST.csv --out DIR")
    print(cut_manifest(Path(names[0]), Path(flags["out"]), read_options(flags)))
    made = Path(flags["out"]) / "manifest.csv"
    print(f"next: jmae train --config {suggested('images')[0]}:small --config.data.manifest={shlex.quote(str(made))}")
    return 0


def read_options(flags: dict[str, str]) -> Options:
    """The options that the flags set. Raises InputError for a value that is not allowed."""
    default = Options()
    axis = flags.get("axis", default.axis)
    if axis not in (*ACROSS, "0", "1", "2"):
        raise InputError(f"--axis={axis}: unknown axis: write axial, coronal, sagittal, 0, 1 or 2")
    margin = flags.get("margin", f"{default.margin:g}")
    number = re.fullmatch(r"(\d+)|(\d+\.?\d*) ?mm", margin)
    if not number:
        raise InputError(f"--margin={margin}: not a distance: write a number of slices (5) or mm (10mm)")
    least = typed("least", flags["least"], default.least) if "least" in flags else default.least
    every = typed("every", flags["every"], default.every) if "every" in flags else default.every
    if not 0 <= least <= 1:
        raise InputError(f"--least={least}: not a share of an area: write a number from 0 to 1")
    if every < 1:
        raise InputError(f"--every={every}: not a step: write 1 for all slices, 2 for every second slice")
    return Options(axis, float(number[1] or number[2]), number[1] is None, least, every)


def cut_manifest(manifest: Path, out: Path, options: Options = Options()) -> str:  # noqa: B008, it is immutable
    """Cuts all volumes of a manifest, writes the manifest of the slices last, and returns a summary as text.

    On a problem no manifest is written, and InputError has one line for each problem.
    """
    refuse_used(out)
    rows, ignored, problems = parse_manifest(manifest, crops=True, normal_crops_only=True)
    folder = None if problems else out
    found: dict[str, tuple[list[Row], Counter[str]]] = {}

    def use(row: Row, case: Opened) -> None:
        found[row.id] = slice_case(row, case, options, folder)

    problems += lines_of(open_each(rows, workers=WORKERS, use=use))
    for row in rows:
        if row.image and row.image[0].startswith(PHANTOM):
            stored = stored_image(row)
            try:
                use(row, open_case(row, stored=stored))
            except InputError as error:
                problems.append(f"{row.id}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    slices = [one for row in rows for one in found[row.id][0]]
    left_out = sum((found[row.id][1] for row in rows), Counter[str]())
    if not slices:
        raise InputError(f"{manifest}: no slice is left ({in_words(left_out)}): lower --margin or --least")
    write_manifest(out, slices)
    empty = sum(not found[row.id][0] for row in rows)
    made = f"{counted(len(slices), 'slices')} of {counted(len(rows) - empty, 'volumes')}"
    return f"{out / 'manifest.csv'}: {made}: {summary(slices, ignored)}; left out: {in_words(left_out)}" + (
        f"; {empty} volumes give no slice" if empty else ""
    )


def slice_case(row: Row, case: Opened, options: Options, out: Path | None) -> tuple[list[Row], Counter[str]]:
    """(the rows of a volume's slices, the number of slices left out by reason).

    Writes the files below `out`; with None nothing is written. Raises InputError where the volume cannot be cut.
    """
    array, size = case.image.array, case.image.size
    _check_volume(row, array)
    layout = lie(options.axis, case.image.affine, row.image[0])
    if not case.complete:
        return [], Counter()  # `open_each` reports the problem
    others = tuple(axis for axis in range(3) if axis != layout.across)
    mask = case.lesion if row.mask else None
    masked = np.zeros(size[layout.across], bool) if mask is None else np.any(mask, axis=others)
    spans = [_span(box, layout.across, len(masked)) for box in row.boxes]
    marked = np.array(masked)
    for span in spans:
        marked[span.start : span.stop] = True
    near = _near(marked, case.image, layout, options, row.image[0])
    known = row.label == 0 or mask is not None or bool(row.boxes)
    region = case.region
    areas = np.count_nonzero(np.any(array != 0, axis=-1) if region is None else region, axis=others)
    little = (areas == 0) | (areas < options.least * areas.max())
    extra = {column: cell for column, cell in row.extra.items() if column not in VOLUME_COLUMNS}

    rows, left_out = [], Counter[str]()
    for k in range(0, len(marked), options.every):
        if little[k]:
            left_out["with little region" + (" (lesion slices)" if marked[k] else "")] += 1
        elif near[k]:
            left_out["within the margin of a lesion"] += 1
        elif marked[k] and row.split == "train":
            left_out["lesion slices in train"] += 1
        else:
            png = lambda what, whole, k=k: _write_mask(out, row.id, k, what, layout.plane(whole, k))
            rows.append(
                Row(
                    id=f"{row.id}_{k:04d}",
                    patient=row.patient or row.id,
                    split=row.split,
                    label=int(marked[k]) if known else None,
                    image=_write_image(out, row.id, k, layout.plane(array, k)),
                    mask=png("mask", mask) if mask is not None and masked[k] else None,
                    region=None if region is None else png("region", region),
                    boxes=tuple(layout.box(box, size) for box, span in zip(row.boxes, spans, strict=True) if k in span),
                    extra=extra | {"case": row.id, "slice": str(k)},
                )
            )
    return rows, left_out


def _check_volume(row: Row, array: np.ndarray) -> None:
    name = row.image[0]
    if array.ndim != 4:
        raise InputError(f"{name}: not a volume, so it has no slices: list it in another manifest")
    if row.extra.get("half"):
        raise InputError(
            f"{name}: the column half is {row.extra['half']!r}, but slices are whole: cut the file and empty the cell"
        )
    if row.extra.get("boxes_on", "1") not in ("", "1"):
        raise InputError(f"{name}: boxes_on {row.extra['boxes_on']!r}, but slices are cut by the first image's voxels")
    if len(row.id.encode()) > ID_BYTES - 6 or ";" in row.id:
        raise InputError(
            f"{name}: the id {row.id[:20]!r} names the slices and is too long or has a semicolon: change it"
        )
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise InputError(f"{name}: {bad} values are not finite: mend the file or drop its row")


def _near(marked: np.ndarray, stored: Image, layout: Layout, options: Options, name: str) -> np.ndarray:
    """bool (n,): slices within the margin of a lesion slice that are no lesion slices themselves."""
    step = 1.0
    if options.mm and marked.any():
        if stored.spacing is None:
            raise InputError(
                f"{name}: a margin in mm needs the spacing: save the volume as NIfTI, or give the margin in slices"
            )
        step = stored.spacing[layout.across]
    return ~marked & (distance(np.arange(len(marked)), np.flatnonzero(marked)) * step <= options.margin + 1e-6)


def lie(axis: str, affine: np.ndarray | None, name: str) -> Layout:
    """The layout of slices across `axis` in a volume with the affine (4, 4), voxel -> RAS mm, or None.

    Raises InputError for an anatomical axis without an affine. `name` is the volume's name in the message.
    """
    if affine is None:
        if axis in ACROSS:
            raise InputError(
                f"{name}: has no affine, which {axis} slices need: save it as NIfTI or DICOM series, or "
                "write --axis=0, 1 or 2"
            )
        down, right = (other for other in range(3) if other != int(axis))
        return Layout(int(axis), down, right, (False, False))
    ras, signs = nib.io_orientation(affine).astype(int).T  # of each stored axis: the nearest axis of RAS, and the sign
    stored_axis = {int(world): i for i, world in enumerate(ras)}
    across = stored_axis[ACROSS[axis]] if axis in ACROSS else int(axis)
    down, right = (stored_axis[world] for world in ROWS_COLUMNS[int(ras[across])])
    return Layout(across, down, right, (bool(signs[down] > 0), bool(signs[right] > 0)))


def distance(at: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The distance (n,) of each number of `at` (n,) from the nearest of `marks` (m,); inf without marks."""
    if not len(marks):
        return np.full(len(at), np.inf)
    return np.abs(np.asarray(at, float)[:, None] - np.asarray(marks, float)).min(1)


def _span(box: Sequence[float], axis: int, n: int) -> range:
    """The slices that a box covers, with the rounding of `boxes_mask`."""
    low, high = (int(np.floor(box[i] + 0.5)) for i in (axis, axis + 3))
    low = min(low, n - 1)
    return range(low, max(low + 1, high))


def _write_image(out: Path | None, case: str, k: int, array: np.ndarray) -> tuple[str, ...]:
    if out is None:
        return ("",)
    path = out.absolute() / "slices" / case / f"{k:04d}"
    _folder(path.parent)
    return (str(write_map(path, array, Image(array, None, None, None))),)


def _write_mask(out: Path | None, case: str, k: int, what: str, mask: np.ndarray) -> str:
    return write_png(out.absolute() / "slices" / case / f"{k:04d}_{what}.png", mask) if out else ""


# --- shared with jmae.data.prepare ------------------------------------------------------------------------------------


def refuse_used(out: Path) -> None:
    """Raises InputError where a folder has a manifest, which might be the input or belong to other files."""
    if (out / "manifest.csv").exists():
        raise InputError(f"{out / 'manifest.csv'}: exists already: name another folder, or remove the file")


def write_png(path: Path, array: np.ndarray) -> str:
    """Writes an array (rows, columns) of uint8, uint16 or bool (as 0 and 255) as PNG. Returns the path.

    Raises InputError where the file cannot be written.
    """
    _folder(path.parent)
    try:
        pillow.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array).save(path, compress_level=4)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}): free space or change --out") from None
    return str(path)


def write_manifest(out: Path, rows: Sequence[Row], *, relative: bool = False) -> None:
    """Writes rows as `out`/manifest.csv in one piece. Paths below `out` become relative to it; with `relative` all."""

    def place(path: str | None) -> str:
        if not path or path.startswith(PHANTOM):
            return path or ""
        from_out = os.path.relpath(path, out)
        return os.path.abspath(path) if from_out.startswith("..") and not relative else from_out

    boxed, contrast = any(row.boxes for row in rows), any(row.pre for row in rows)
    further = [*(["boxes"] if boxed else []), *(["pre", "post"] if contrast else [])]
    extra = list(dict.fromkeys(name for row in rows for name in row.extra))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *further, *extra])
    for row in rows:
        label, image = "" if row.label is None else row.label, ";".join(map(place, row.image))
        cells = [row.id, row.patient, row.split, label, image, place(row.mask), place(row.region)]
        boxes = ";".join(" ".join(f"{x:.10g}" for x in box) for box in row.boxes)
        series = [";".join(map(place, files)) for files in (row.pre, row.post)]
        cells += [*([boxes] if boxed else []), *(series if contrast else [])]
        writer.writerow([*cells, *(row.extra.get(name, "") for name in extra)])
    write_text(out / "manifest.csv", text.getvalue())


def in_words(left_out: Counter[str]) -> str:
    """The counts as text: "12 images of other views, 3 pdf files"."""
    return ", ".join(counted(n, what) for what, n in sorted(left_out.items()) if n) or "nothing"


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}): free space or change --out") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
