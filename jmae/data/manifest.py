"""The manifest: a CSV with one case a row. All its problems are reported at once, and nothing is dropped in silence.

Columns: `id,patient,split,label,image,mask,region`, of which `split` and `image` must be there. Without `id`, the id is
the name of the image's file. Columns are separated by commas, semicolons or tabs. Further columns: `boxes`; `boxes_on`,
the file whose voxels the boxes count (1, 2, ... of `image`, `region` or `pre`; empty is 1); `pre` and `post` (DCE-MRI:
the series before contrast, and the phases after it); `midline` and `half` (volumes of two pieces, such as left and
right). The label is that of the half; mask and boxes are those of the whole. All other columns are carried along.
`image` may join channels and `post` phases by ";", in quotes where columns are separated by it. Paths are relative to
the file.
"""

import csv
import difflib
import hashlib
import io
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from jmae.data.names import ID_BYTES, names_of
from jmae.errors import InputError
from jmae.tables import counted

COLUMNS = ("id", "patient", "split", "label", "image", "mask", "region")
NEEDED = ("split", "image")
SEPARATORS = ",;\t"
# Columns that may be missing; `boxes_on`, `midline` and `half` stay among the extra ones.
FURTHER = ("boxes", "pre", "post")
SPLITS = ("train", "unlabeled", "val", "test")
NEW = "predict"  # of the rows, which are in no split
SHOWN = 20  # problems of one kind that are spelled out
PHANTOM = "phantom:"  # an image that is made, not read
LEAKS = ("patient leak", "image leak")  # kinds of problems that `parse_manifest` may pass over


class Row(NamedTuple):
    """One case. `label` is 0 normal, 1 abnormal, None unknown. A row of `unlabeled` has no label, mask or boxes."""

    id: str
    patient: str  # "" where not known: a patient of its own
    split: str
    label: int | None
    image: tuple[str, ...]  # the channels' absolute paths, or "phantom:..." specifiers
    mask: str | None = None
    region: str | None = None
    boxes: tuple[tuple[float, ...], ...] = ()  # x0 y0 x1 y1, or x0 y0 z0 x1 y1 z1, in voxels of `boxes_file`
    pre: tuple[str, ...] = ()  # the series before contrast, none or one
    post: tuple[str, ...] = ()  # the phases after it, in order
    # Among them is `boxes_on` (see `boxes_file`), and `midline`: "", "middle", or an index between voxels on the
    # image's own left-right axis. The first piece is [0, midline). `half` ("first" or "second") names the only piece
    # that is used.
    extra: Mapping[str, str] = MappingProxyType({})
    leak: str = ""  # what this row shares with another split, where `data.allow_leaks` lets it pass
    kept: bool = False  # a train row that `data.calibration` made a normal of `val`
    content: str = ""  # `duplicates.content` of its image, where that has been opened

    @property
    def listed(self) -> str:
        """The split that the manifest names."""
        return "train" if self.kept else self.split


class Finding(NamedTuple):
    """One problem of some rows, in a line."""

    kind: str
    rows: tuple[Row, ...]
    what: str


def parse_manifest(
    path: str | os.PathLike, *, crops: bool = False, normal_crops_only: bool = False, allow: Collection[str] = ()
) -> tuple[list[Row], dict[str, int], list[str]]:
    """Reads the rows of the four splits.

    Args:
      path: the CSV file; UTF-8 with or without BOM, or Latin-1; any line ends; commas, semicolons or tabs.
      crops: whether the recipe trains on crops of volumes, so that `data.normal_crops_only` can be a remedy.
      normal_crops_only: whether abnormal rows may be in `train` if they have a mask or boxes. Only crops can keep off
        the lesions, so this counts with `crops` alone.
      allow: kinds of problems that are no problem: "abnormal" rows in `train`, `LEAKS`.

    Returns:
      The rows; what was ignored and how often, for `summary`; the problems, a line each, of one kind at most 20.

    Raises:
      InputError: the file cannot be read, is no CSV, or lacks columns.
    """
    folder = Path(os.path.abspath(path)).parent
    problems: dict[str, list[str]] = defaultdict(list)  # kind -> lines
    rows: list[Row] = []
    other, dropped = Counter[str](), Counter[str]()
    lines_of: dict[str, list[int]] = defaultdict(list)
    for line, cells in _cells(path, problems):
        row = _row(line, cells, folder, problems)
        lines_of[row.id].append(line)
        if row.split not in SPLITS:
            other[row.split] += 1
            continue
        if row.split == "unlabeled":
            for column, what in (("label", "labels"), ("mask", "masks"), ("boxes", "boxes")):
                if cells.get(column):
                    dropped[f"{what} of unlabeled rows"] += 1
            row = row._replace(label=None, mask=None, boxes=())
        elif row.split == "train" and row.label == 1 and not (crops and normal_crops_only and (row.mask or row.boxes)):
            remedy = "move it to val, test or unlabeled"
            if crops and normal_crops_only:
                remedy = "give it a mask or boxes, or " + remedy
            elif crops and (row.mask or row.boxes):
                remedy = "set data.normal_crops_only to train on crops outside its lesions, or " + remedy
            problems["abnormal"].append(f"line {line}: {row.id!r} is abnormal and in train: {remedy}")
        rows.append(row)

    problems["id"] += _repeated(lines_of)
    for leak in leaks(rows):
        problems[f"{leak.kind} leak"].append(leak.what)
    if not rows and not any(problems.values()):
        instead = f", only {', '.join(map(repr, other))}" if other else ""
        problems["empty"].append(f"no row of {', '.join(SPLITS)}{instead}: fill the column split")
    told = (lines for kind, lines in problems.items() if kind not in allow)
    shown = [line for lines in told for line in _shown(path, lines, len(rows) + other.total())]
    ignored = {f"rows of other splits ({', '.join(map(_other_split, other))})": other.total()} if other else {}
    return rows, ignored | {what: n for what, n in dropped.items() if n}, shown


def read_cases(path: str | os.PathLike, split: str) -> list[Row]:
    """The rows of a list of new cases, all of `split`. The column `image` must be there; `id`, `region`, `midline` and
    `half` mean the same as in a manifest. `split`, `label`, `mask` and `boxes` are not read.

    Raises:
      InputError: all problems of the file, a line each.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    folder, lines_of = Path(os.path.abspath(path)).parent, defaultdict[str, list[int]](list)
    rows, read = [], ("id", "image", "region", "midline", "half")
    for line, cells in _cells(path, problems, needed=("image",)):
        known = {name: cells.get(name, "") for name in read} | {"patient": "", "label": "", "mask": "", "split": split}
        rows.append(_row(line, known, folder, problems))
        lines_of[rows[-1].id].append(line)
    problems["id"] += _repeated(lines_of)
    if any(problems.values()):
        raise InputError("\n".join(line for lines in problems.values() for line in _shown(path, lines, len(rows))))
    return rows


def leaks(rows: Sequence[Row]) -> list[Finding]:
    """Each patient (kind "patient") and each file ("image") that is in two splits."""
    found = []
    named = {
        "patient": [(same_name(row.patient), row) for row in rows if row.patient],
        "image": [(file, row) for row in rows for file in (*row.image, *row.pre, *row.post)],
    }
    for kind, pairs in named.items():
        sharing: dict[str, list[Row]] = defaultdict(list)
        for name, row in pairs:
            sharing[name].append(row)
        for name, own in sharing.items():
            if len({row.split for row in own}) > 1:
                splits = [split for split in SPLITS if split in {row.listed for row in own}]
                spellings = dict.fromkeys(row.patient for row in own) if kind == "patient" else (name,)
                where = f"in {' and '.join(splits)}: keep it in one split"
                if len(splits) == 1:
                    where = (
                        "twice in train, and data.calibration holds out one: list it once, or give its rows one patient"
                    )
                what = f"{kind} {' or '.join(map(repr, spellings))} is {where}"
                found.append(Finding(kind, tuple(own), what))
    return found


def summary(rows: Sequence[Row], ignored: Mapping[str, int] = MappingProxyType({})) -> str:
    """What a run would use, in one line: "train 573 normal (432 patients), unlabeled 522, val 61 normal + ...".

    `ignored` comes from `parse_manifest`.
    """
    parts = []
    for split in SPLITS:
        cases = [row for row in rows if row.split == split]
        n = Counter(row.label for row in cases)
        kinds = [f"{n[label]} {kind}" for label, kind in _KINDS.items() if n[label]]
        patients = len({row.patient for row in cases if row.patient}) if split == "train" else 0
        if cases:
            text = str(len(cases)) if split == "unlabeled" else " + ".join(kinds)
            parts.append(f"{split} {text}" + (f" ({counted(patients, 'patients')})" if patients else ""))
    notes = [f"{counted(n, what)} ignored" for what, n in ignored.items()]
    if blank := sum(not row.patient for row in rows):
        notes.append(f"{counted(blank, 'rows')} without a patient: a patient in two splits would not be noticed")
    return "; ".join([", ".join(parts), *notes])


_KINDS = {0: "normal", 1: "abnormal", None: "of unknown label"}


def held_out(rows: Sequence[Row], share: float) -> Bool[np.ndarray, " n"]:
    """Which train rows belong to a share of the patients, rounded up. It takes the patients with the smallest digests
    of their names, and none where there are fewer than ten."""
    digest = lambda name: hashlib.sha256(name.encode()).hexdigest()
    names = sorted({row.patient or row.id for row in rows if row.split == "train"}, key=digest)
    held = {same_name(name) for name in names[: math.ceil(share * len(names)) if len(names) >= 10 else 0]}
    return np.array([row.split == "train" and same_name(row.patient or row.id) in held for row in rows], bool)


def dispensable(rows: Sequence[Row], unread: Sequence[Row]) -> set[str]:
    """The ids of the `unread` rows that a command leaves out: new scans whose files are there but damaged. A new scan
    is a row of `test` without a label. None is left out where no new scan could be read."""
    new = {row.id for row in rows if row.split == "test" and row.label is None}
    if new <= {row.id for row in unread}:
        return set()
    return {row.id for row in unread if row.id in new and all(map(os.path.exists, row.image))}


def learnable(rows: Sequence[Row]) -> int:
    """The number of normal scans to learn from, with those that `data.calibration` keeps from the training."""
    return sum(row.kept or (row.split == "train" and row.label != 1) for row in rows)


def same_name(name: str) -> str:
    """The name without what people vary by mistake: case, the Unicode form of a letter, the number of spaces."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())


def _repeated(lines_of: Mapping[str, Sequence[int]]) -> list[str]:
    """A problem for each id that several rows have, also where they write it in other ways (`same_name`)."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for case in filter(None, lines_of):
        spellings[same_name(case)].append(case)
    each = [(ids, sorted(line for case in ids for line in lines_of[case])) for ids in spellings.values()]
    return [
        f"id {' or '.join(map(repr, ids))} is in lines {', '.join(map(str, lines))}: give each row its own"
        for ids, lines in each
        if len(lines) > 1
    ]


def _cells(
    path: str | os.PathLike, problems: dict[str, list[str]], needed: Collection[str] = NEEDED
) -> Iterable[tuple[int, dict[str, str]]]:
    """(line number, column -> stripped cell) of every row that is not blank. Columns that are not there are empty; an
    id is the name of the image's file then."""
    text = _text(path)
    header = text.partition("\n")[0]
    separator = max(SEPARATORS, key=header.count)  # a comma where no separator is there
    # A quote that is never closed would swallow the rows behind it, unless strict.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise InputError(f"{os.fspath(path)}: line {reader.line_num}: {error}: repair the quotes") from None
    lines = [(line, cells) for line, cells in lines if any(cells)]
    if not lines:
        raise InputError(f"{os.fspath(path)}: is empty: write the columns {','.join(COLUMNS)} and a row a case")
    (_, columns), *body = lines
    _check_columns(path, columns, needed)
    for line, cells in body:
        if len(cells) != len(columns):
            what, mark = f"{counted(len(cells), 'cells')} for {len(columns)} columns", _MARKS[separator]
            problems["cells"].append(f"line {line}: {what}: put a cell that holds a {mark} in quotes")
    empty = dict.fromkeys(COLUMNS, "")
    named = [
        (line, empty | dict(zip(columns, cells, strict=True))) for line, cells in body if len(cells) == len(columns)
    ]
    if "id" not in columns:
        files = [(_names(cells["image"])[:1] or [f"line {line}"])[0] for line, cells in named]
        folder = Path(os.path.abspath(path)).parent
        try:
            ids = names_of([(os.path.abspath(folder / file),) for file in files])
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: no column id, and {error}, or add the column") from None
        named = [(line, cells | {"id": name}) for (line, cells), name in zip(named, ids, strict=True)]
    return named


_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8 or Latin-1. Control characters, which no table has, tell other encodings."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("latin-1")
        if any((ord(c) < 32 and c not in "\t\r\n") or 127 <= ord(c) < 160 for c in text):
            what = f"neither UTF-8 nor Latin-1 (byte {error.start})"
            raise InputError(f"{os.fspath(path)}: {what}: name a manifest, saved as CSV UTF-8") from None
    except IsADirectoryError:
        what = "a folder: name the manifest.csv in it; jmae prepare writes one"
        raise InputError(f"{os.fspath(path)}: {what}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{os.fspath(path)}: not readable ({why}): check the path") from error
    return text


def _check_columns(path: str | os.PathLike, columns: list[str], needed: Collection[str]) -> None:
    lines = [f"column {name!r} is there {n} times: keep one" for name, n in Counter(columns).items() if n > 1]
    further = {column.lower(): column for column in columns if column not in COLUMNS}
    for name in (*COLUMNS, *FURTHER, "midline", "half"):
        unsure = name in ("mask", "region", "pre", "post", "half")  # other words are near these: a strict cutoff
        near = difflib.get_close_matches(name, further, n=1, cutoff=0.85 if unsure else 0.7)
        if name not in columns and (near or name in needed):
            hint = f"rename {further[near[0]]!r}" if near else "add it"
            lines.append(f"column {name!r} is missing: {hint}")
    if lines:
        raise InputError("\n".join(f"{os.fspath(path)}: {line}" for line in lines))


def _row(line: int, cells: Mapping[str, str], folder: Path, problems: dict[str, list[str]]) -> Row:
    """One row with absolute paths; what is wrong with it goes to `problems`."""

    def bad(kind: str, what: str) -> None:
        problems[kind].append(f"line {line}: {what}")

    case, label = cells["id"], cells["label"]
    if not case:
        bad("id", "no id: give each row its own")
    elif case.startswith(".") or any(c in "/\\" or not c.isprintable() for c in case):
        bad("id", f"id {case!r} cannot be a file name: leave out slashes, leading dots and control characters")
    elif len(case.encode()) > ID_BYTES:
        bad("id", f"id {case[:20]!r}... is longer than {ID_BYTES} bytes: shorten it")
    if not cells["split"]:
        bad("split", f"no split: write one of {', '.join(SPLITS)}")
    if label not in ("", "0", "1"):
        bad("label", f"label {label!r}: write 0 (normal), 1 (abnormal) or leave it empty")
    images, pre, post = (_names(cells.get(column, "")) for column in ("image", "pre", "post"))
    if not images or not all(images) or len(set(images)) < len(images):
        bad("image", f"image {cells['image']!r} is empty, has an empty channel or one twice: name one file a channel")
    if not all(post) or len(set(pre + post)) < len(pre + post) or (len(pre), bool(post)) not in ((0, False), (1, True)):
        what = f"pre {cells.get('pre', '')!r} with post {cells.get('post', '')!r}"
        bad("contrast", f"{what}: name one series before contrast, and each phase after it once, joined by ;")
    for kind, what in wrong_pieces(cells.get("midline", ""), cells.get("half", "")):
        bad(kind, what)
    boxes = _boxes(cells.get("boxes", ""))
    if boxes is None:
        bad("boxes", f"boxes {cells['boxes']!r}: write x0 y0 x1 y1 (3D: x0 y0 z0 x1 y1 z1), several joined by ;")
    on, files = cells.get("boxes_on", ""), {"region": bool(cells["region"]), "pre": bool(pre)}
    if on and not (files.get(on) or on in {str(i + 1) for i in range(len(images))}):
        cells = {**cells, "boxes_on": ""}
        bad("boxes", f"boxes_on {on!r}: write the number of a file of image, or region or pre where the row has one")
    place = lambda name: name if name.startswith(PHANTOM) else os.path.abspath(folder / name)
    return Row(
        id=case,
        patient=cells["patient"],
        split=cells["split"],
        label=int(label) if label in ("0", "1") else None,
        image=tuple(place(name) for name in images if name),
        pre=tuple(place(name) for name in pre if name),
        post=tuple(place(name) for name in post if name),
        mask=place(cells["mask"]) if cells["mask"] else None,
        region=place(cells["region"]) if cells["region"] else None,
        boxes=boxes or (),
        extra={name: cell for name, cell in cells.items() if name not in (*COLUMNS, *FURTHER)},
    )


def boxes_file(row: Row) -> str:
    """The file whose voxels the row's boxes count, by the column `boxes_on`."""
    on = row.extra.get("boxes_on") or "1"
    return {"region": row.region or "", "pre": row.pre[0] if row.pre else ""}.get(on) or row.image[int(on) - 1]


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(";")] if cell else []


def wrong_pieces(midline: str, half: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the cells `midline` and `half` of a row: (column, a line)."""
    if midline not in ("", "middle") and not _is_index(midline):
        yield "midline", f"midline {midline!r}: write middle, a voxel index above 0, or leave it empty"
    if half not in ("", "first", "second") or (half and not midline):
        yield "half", f"half {half!r}, midline {midline!r}: write first or second beside a midline, or leave it empty"


def _is_index(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _boxes(text: str) -> tuple[tuple[float, ...], ...] | None:
    try:
        boxes = tuple(tuple(float(x) for x in box.split()) for box in text.split(";")) if text else ()
    except ValueError:
        return None
    rank = len(boxes[0]) // 2 if boxes else 2
    fits = all(
        len(box) == 2 * rank and all(map(math.isfinite, box)) and all(np.less(box[:rank], box[rank:])) for box in boxes
    )
    return boxes if rank in (2, 3) and fits else None


def _shown(path: str | os.PathLike, lines: Sequence[str], rows: int) -> list[str]:
    """The problems of one kind in a file with so many rows, each with the file before it; those alike are folded."""
    kind = lambda line: re.sub(r"^line \d+: ", "", line)
    return [f"{os.fspath(path)}: {line}" for line in first(folded(lines, rows, kind=kind))]


def first(lines: list[str]) -> list[str]:
    """The first 20 lines, and how many more there are."""
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"and {more} more like the line before"] if more > 0 else [])


def folded(
    problems: Sequence[str],
    cases: int = 0,
    most: int = 3,
    kind: Callable[[str], str] = lambda problem: problem.split(": ", 2)[-1],
) -> list[str]:
    """Problems "CASE: FILE: WHAT" or "WHERE: WHAT" of some of the `cases`. At most `most` lines are kept of each WHAT,
    and one line where all cases have it. The last line of a WHAT says how many more there are. `kind` gives the WHAT.
    """
    kinds = [kind(problem) for problem in problems]
    total, shown, lines = Counter(kinds), Counter[str](), []
    for problem, what in zip(problems, kinds, strict=True):
        shown[what] += 1
        keep = 1 if total[what] == cases else most
        if shown[what] < keep or total[what] <= keep:
            lines.append(problem)
        elif shown[what] == keep:
            lines.append(f"{problem} (and {total[what] - keep} more like it)")
    return lines


def _other_split(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), SPLITS, n=1, cutoff=0.75)
    return f"{name!r}, meant {near[0]!r}?" if near else repr(name)
