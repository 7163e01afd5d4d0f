"""What `prepare` prints: how many cases of each kind there are, and the command that comes next."""

import contextlib
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom

from jmae.data.files import image_size, is_dicom, read_image
from jmae.data.files.guard import named_errors
from jmae.data.manifest import SPLITS, Row, dispensable, folded, learnable
from jmae.data.opening import WORKERS
from jmae.data.prepare.tree import refuse
from jmae.data.rows import kept_apart
from jmae.data.slices import in_words
from jmae.errors import InputError
from jmae.p_values import RATE, few_to_learn, normals_needed, too_few_normals
from jmae.recipe import suggested
from jmae.tables import counted

LAYOUTS = ("bids", "ddad", "folders", "nnunet")  # whose images are of any kind
CHOOSE = "docs/how-to/choose.md compares the systems"
NORMALS = normals_needed(RATE)  # normal patients to hold out
A_THIRD = 0.35
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, A_THIRD, 0.4, 0.5)  # that are proposed


def split_table(rows: Sequence[Row]) -> list[str]:
    """The number of cases of each kind in each split, as lines of a table."""
    lines = [f"{'split':<10}{'normal':>9}{'abnormal':>10}{'unknown':>9}{'masks':>8}{'patients':>10}"]
    for split in SPLITS:
        cases = [row for row in rows if row.split == split]
        n, masks = Counter(row.label for row in cases), sum(bool(row.mask or row.boxes) for row in cases)
        patients = len({row.patient for row in cases if row.patient}) or "-"
        if cases:
            lines.append(f"{split:<10}{n[0]:>9}{n[1]:>10}{n[None]:>9}{masks:>8}{patients:>10}")
    sources = Counter((row.split, row.label, row.extra["source"]) for row in rows if row.extra.get("source"))
    kinds = {0: "normal", 1: "abnormal", None: "unknown"}
    each = lambda split, label: Counter({s: n for (a, b, s), n in sources.items() if (a, b) == (split, label)})
    found = [(split, label) for split in SPLITS for label in kinds if each(split, label)]
    return lines + [f"sources of {split} {kinds[label]}: {in_words(each(split, label))}" for split, label in found]


def advice(name: str, rows: Sequence[Row], recipe: str = "") -> list[str]:
    """The recipe for rows to train on and what to expect of it, a line each. `recipe` is that of a public data set."""
    if not any(row.split == "train" for row in rows):
        return []
    lines = [] if recipe else [recipe_line(rows)]
    lines += [p_value_line(rows, calibration_share(rows))] if name in LAYOUTS else []
    return lines + list(filter(None, [too_few_to_learn(rows)]))


def next_command(name: str, file: Path, rows: Sequence[Row], recipe: str, flags: str, *, allow_leaks: bool) -> str:
    """The command line that trains on a manifest, or that scores it where it has nothing to train on. `name` is that of
    the data set or layout. For a layout without normals of `val`, some training normals give p-values."""
    manifest = shlex.quote(str(file))
    if not any(row.split == "train" for row in rows):
        return f"next: jmae evaluate --workdir RUN --manifest {manifest} --out RUN/{name}"
    volumes = is_volume(rows[0])
    recipe = recipe or f"{suggested(kind_of_data(rows))[0]}:small"
    given = [flags] if flags else []
    if name in LAYOUTS and not normals_of_val(rows):  # they would give p-values
        share = calibration_share(rows)
        given += [f"--config.data.calibration={share:g}"] if share else []
    if (volumes or len(rows[0].image) > 1) and "data.channels" not in flags:
        given.append(f"--config.data.channels={channels_of(rows[0])}")
    if any(row.split == "train" and row.label == 1 for row in rows):
        given.append("--config.data.normal_crops_only=True")
    given += ["--config.data.allow_leaks=True"] if allow_leaks else []
    return " ".join(
        [
            f"next: jmae train --config {recipe} --config.data.manifest={manifest}",
            *given,
            f"--workdir {shlex.quote(f'runs/{file.absolute().parent.name}')}",
        ]
    )


def channels_of(row: Row) -> int:
    """The channels of a case: its files, or those in its one file. 1 where the file cannot be read."""
    if len(row.image) == 1:
        with contextlib.suppress(InputError):
            return read_image(row.image).array.shape[-1]
    return len(row.image)


def kind_of_data(rows: Sequence[Row]) -> str:
    """The kind of data for which `recipe.suggested` has a recipe."""
    images = "unlabelled images" if any(row.split == "unlabeled" for row in rows) else "images"
    return "volumes" if is_volume(rows[0]) else images


def recipe_line(rows: Sequence[Row]) -> str:
    """The recipe that `next_command` proposes, and why."""
    name, why = suggested(kind_of_data(rows))
    return f"recipe: {name}:small ({why}; {CHOOSE})"


def calibration_share(rows: Sequence[Row]) -> float:
    """Share of the normal training patients for `data.calibration`; 0 where there are fewer than ten.

    It is the smallest of `SHARES` that holds out `NORMALS` patients. A third needs only as many scans, and so do larger
    shares. Where a half has too few scans as well, it is a third.
    """
    lesions = {row.patient or row.id for row in rows if row.split == "train" and row.label == 1}
    if len({row.patient or row.id for row in rows if row.split == "train"} - lesions) < 10:
        return 0.0
    return next((share for share in SHARES if is_enough(rows, share)), A_THIRD)


def is_enough(rows: Sequence[Row], share: float) -> bool:
    """Whether the scans that a share holds out give a p-value of `RATE`, and are of enough patients."""
    held = [row for row in kept_apart(rows, share) if row.kept]
    patients = {row.patient or row.id for row in held}
    return not too_few_normals(len(held), RATE) and (len(patients) >= NORMALS or share >= A_THIRD)


def held_out_by(rows: Sequence[Row], share: float) -> int:
    """The number of training scans that `data.calibration` holds out."""
    return sum(row.kept for row in kept_apart(rows, share)) if share else 0


def normals_of_val(rows: Sequence[Row]) -> int:
    """The number of normals that the manifest itself holds out."""
    return sum(row.split == "val" and row.label == 0 for row in rows)


def p_value_line(rows: Sequence[Row], share: float) -> str:
    """Which p-values a run of these rows can give, in a line; `share` is its `data.calibration`."""
    kept = f"that data.calibration keeps from the training (at least {NORMALS} are needed for a p-value of 0.05)"
    n, source = normals_of_val(rows), "of val"
    if not n:
        n, source = held_out_by(rows, share), kept
    return f"p-values: {too_few_normals(n, RATE) or 'from ' + counted(n, 'normals') + ' ' + source}"


def too_few_to_learn(rows: Sequence[Row]) -> str:
    """A warning where the rows have too few normal scans to learn from, else ""."""
    few = few_to_learn(learnable(rows))
    return f"warning: {': '.join(few)}" if few else ""


def is_volume(row: Row) -> bool:
    """Whether the first image of a row is a volume; False where it cannot be read."""
    try:
        return Path(row.image[0]).is_dir() or len(image_size(row.image[0])) == 3
    except InputError:
        return False


def read_kinds(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(Kind, size) of each row's image, from the headers of its files. A kind is "images" or "volumes", behind the
    modality of DICOM. It is "" where the header of a new scan cannot be read.

    Raises InputError with a line for each other file whose header cannot be read.
    """

    def kind(row: Row) -> tuple[str, str, str]:
        """The kind, the size, and what is wrong with the files."""
        file, is_folder = Path(row.image[0]), os.path.isdir(row.image[0])
        try:
            sizes = [() if is_folder else image_size(one) for one in row.image]
            with named_errors(file):
                modality = modality_of(sorted(file.iterdir()) if is_folder else [file])
        except InputError as error:
            return "", "", str(error)
        rank = "volumes" if is_folder or len(sizes[0]) == 3 else "images"
        return f"{modality} {rank}".strip(), " x ".join(map(str, sizes[0])), ""

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(kind, rows))
    spared = dispensable(rows, [row for row, (_, _, problem) in zip(rows, found, strict=True) if problem])
    refuse([problem for row, (_, _, problem) in zip(rows, found, strict=True) if problem and row.id not in spared])
    return [(name, size) for name, size, _ in found]


def modality_of(files: Iterable[Path]) -> str:
    """The modality of the first DICOM file, with or without a preamble; "" where no file is one or names its own."""
    for file in filter(is_dicom, files):
        return str(pydicom.dcmread(file, force=True, specific_tags=["Modality"]).get("Modality") or "")
    return ""


def one_rank(rows: Sequence[Row], kinds: Sequence[tuple[str, str]]) -> str:
    """ "images" or "volumes", which all rows are by what `read_kinds` found. Raises InputError with one line where some
    rows are of the rarer rank."""
    ranks = [(row, name.split()[-1]) for row, (name, _) in zip(rows, kinds, strict=True) if name]
    (usual, n), *_ = Counter(rank for _, rank in ranks).most_common()
    what = f"where {n} of {len(ranks)} scans are {usual}: move it to a folder of its own kind"
    one = {"images": "an image", "volumes": "a volume"}
    odd = [f"{row.image[0]}: is {one[rank]}, {what}" for row, rank in ranks if rank != usual]
    refuse(folded(odd, most=1))
    return usual


def kinds_of(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(The number of images of each kind and size, a line a split; cautions of damaged scans and of mixed kinds.)

    Raises InputError as `read_kinds` and `one_rank` do.
    """
    found = read_kinds(rows)
    one_rank(rows, found)
    kinds, sizes = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    known = [(row, *kind) for row, kind in zip(rows, found, strict=True) if kind[0]]
    for row, name, size in known:
        kinds[row.split][name] += 1
        sizes[row.split][size] += bool(size)
    lines, mixed = [], []
    for split in (split for split in SPLITS if split in kinds):
        usual = [f"{size} ({n})" for size, n in sizes[split].most_common(3) if n]
        more = len(+sizes[split]) - len(usual)
        usual += [f"{more} other sizes"] if more else []
        lines.append(f"kinds of {split}: {in_words(kinds[split])}" + (f"; {', '.join(usual)}" if usual else ""))
        if len(kinds[split]) > 1:
            mixed.append(f"{split} mixes {in_words(kinds[split])}")
    everywhere = {name for split in kinds for name in kinds[split]}
    if mixed:
        rarest = min(everywhere, key=lambda name: sum(one[name] for one in kinds.values()))
        file = next(row.image[0] for row, name, _ in known if name == rarest)
        mixed[-1] += f" (one of the {rarest}: {file})"
    if not mixed and len(everywhere) > 1:
        mixed = [f"the splits hold {' and '.join(sorted(everywhere))}"]
    damaged = [row.image[0] for row, (name, _) in zip(rows, found, strict=True) if not name]
    them = "it" if len(damaged) == 1 else "them"
    of = f"{counted(len(damaged), 'new scans')} cannot be read, and training and evaluation leave {them} out"
    cautions = [f"{of}: {', '.join(damaged[:3])}{', ...' if damaged[3:] else ''}"] if damaged else []
    kind = "a recipe takes images of one kind: check that this is meant"
    return lines, cautions + ([f"{'; '.join(mixed)}: {kind}"] if mixed else [])
