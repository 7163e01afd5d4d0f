"""python -m jmae.data.prepare NAME --root DIR --out DIR [--seed 0] [--debug]

Writes a manifest, --out/manifest.csv, of the data set below the folder --root. NAME is a layout of folders:

folders     The layout of MVTec AD: train/good, test/good and test/DEFECT. Masks may lie in any folder called mask,
            ground_truth or annotation. Folders val and unlabeled are read too. Instead of --root, two folders of
            images may be named: --normal DIR and --test DIR.
nnunet      imagesTr/CASE_0000.nii.gz and further channels, labelsTr, imagesTs, dataset.json. A case with an empty
            segmentation is normal.
bids        sub-*/[ses-*/]anat/*_T1w.nii.gz. --sequences=T1w,FLAIR names the channels. Subjects with a lesion mask are
            in the test, with as many subjects that have none.
ddad        data.json of DDAD and MedIAnomaly (train.0, train.unlabeled.0 and .1, test.0 and .1) and a folder of images.

NAME may also be a public data set, in the form in which it is downloaded:

chexpert    CheXpert chest radiographs: train.csv, valid.csv and the images. An image with No Finding is normal, one
            with Pneumonia is abnormal. 1,024 normals train, 50 + 50 images are val, 100 + 100 the test. --views is PA,
            frontal or all.
jsrt        JSRT chest radiographs: the .IMG files and the tables CLNDAT_EN.txt and CNNDAT_EN.txt, in any folders. The
            images are written as 16-bit PNG, inverted so that air is dark. Nodules become boxes. 19 normals and all
            nodules are the test.
lidc        LIDC-IDRI chest CT: folders LIDC-IDRI-xxxx of DICOM series, and the readings as XML anywhere. The slices
            (in HU) stay where they are; masks are written. The first 800 patients train, the next 100 are val, the
            rest are the test. Val and test each get 500 healthy and 478 lesion slices, drawn at random.
deeplesion  DeepLesion CT: DL_info.csv and the folders Images_png. The 16-bit PNG stay where they are (HU = value -
            32768). Key slices get boxes. The patients are split officially. Val and test each get 500 healthy and 500
            key slices, drawn at random.
nih         NIH ChestX-ray14 by the curated lists of adult PA views, *_curated_list.txt. Lists and images lie in any
            folders. 3,614 normals train; 543 normals and 262 abnormal images are the test.
covidx      COVIDx chest radiographs: the folders train and test, and COVID-Net's lists anywhere, called
            train_COVIDx8B.txt or train.txt and the same for the test. The negatives of the training list train; the
            test list is the test. Grey copies of coloured images are written.
hyper_kvasir  HyperKvasir colonoscopy: folders of the classes cecum, ileum and bbps-2-3, anywhere, and segmented-images
            with images and masks. 1,600 normals train. 500 normals and all polyps are the test. Further normals are
            val. Masks are written as PNG.

The splits of jsrt, lidc and deeplesion are those of P-PII (Mueller et al., UNSURE 2023). Those of covidx and
hyper_kvasir are those of MemMC-MAE (Tian et al. 2022), and that of nih is AMAE's (Bozorgtabar et al. 2023). Random
draws depend on --seed alone. An image that stays where it is has an absolute path in the manifest. A patient or a file
in two splits is refused.

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import difflib
import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from jmae.data.manifest import SPLITS, Row, leaks, summary
from jmae.data.slices import command, in_words, refuse_used, write_manifest
from jmae.errors import InputError
from jmae.recipe import typed

# The flags of each data set. Its module has the function `prepare(root, out, seed, **flags) -> Prepared`.
DATASETS: dict[str, tuple[str, ...]] = {
    "bids": ("sequences",),
    "chexpert": ("views",),
    "covidx": (),
    "ddad": (),
    "deeplesion": (),
    "folders": ("normal", "test"),
    "hyper_kvasir": (),
    "jsrt": (),
    "lidc": (),
    "nih": (),
    "nnunet": (),
}
ALIASES = {"mvtec": "folders", "nnu-net": "nnunet", "medianomaly": "ddad"}
MOST_PROBLEMS = 20  # lines of a message

T = TypeVar("T")


class Prepared(NamedTuple):
    """The rows of a data set, and what its user must know."""

    rows: list[Row]  # with absolute paths
    found: str  # the contents of the data set, in words
    left_out: Counter[str]  # number of items left out, by the reason in words
    flags: str = ""  # flags that the recipe needs
    caution: str = ""  # a sentence that every figure needs beside it


def main(argv: list[str]) -> int:
    further = sorted({flag for own_flags in DATASETS.values() for flag in own_flags})
    names, flags = command(argv, __doc__, ["root", "out", "seed", *further])
    if len(names) != 1 or "out" not in flags or not {"root", "normal"} & flags.keys():
        raise InputError(
            "name one data set, its folder and a new folder: python -m jmae.data.prepare NAME --root=DIR --out=DIR; "
            f"names: {', '.join(DATASETS)}"
        )
    name = ALIASES.get(names[0].lower(), names[0].lower())
    if name not in DATASETS:
        near = difflib.get_close_matches(name, [*DATASETS, *ALIASES], n=1, cutoff=0.0)[0]
        raise InputError(f"{names[0]}: unknown data set: did you mean {near}? names: {', '.join(DATASETS)}")
    options = {flag: flags[flag] for flag in further if flag in flags}
    if wrong := [flag for flag in options if flag not in DATASETS[name]]:
        raise InputError(f"--{wrong[0]}: {name} has no such flag: leave it out")
    root, seed = flags.get("root"), typed("seed", flags.get("seed", "0"), 0)
    print(prepare(name, Path(root) if root else None, Path(flags["out"]), seed, **options))
    return 0


def prepare(name: str, root: Path | None, out: Path, seed: int = 0, **options: str) -> str:
    """Writes the manifest of a data set and returns a summary as text.

    The summary says what was found, what was left out, which flags the recipe needs, and what to say with each figure.
    The manifest is written last. On a problem no manifest is written, and InputError has one line for each problem.

    Args:
        root: folder of the data set; may be None where `options` name its folders.
        options: flags of this data set (`DATASETS`).
    """
    root, out = root and root.absolute(), out.absolute()
    if root and not root.is_dir():
        raise InputError(f"{root}: not a folder: name the folder with the files of {name}")
    refuse_used(out)
    rows, found, left_out, flags, caution = importlib.import_module(f"jmae.data.prepare.{name}").prepare(
        root, out, seed, **options
    )
    if not rows:
        raise InputError(
            f"{root or name}: {found}, but no image is left ({in_words(left_out)}): copy the whole data set"
        )
    check_rows(rows)
    write_manifest(out, rows)
    lines = [
        f"{out / 'manifest.csv'}: {found}: {summary(rows)}; left out: {in_words(left_out)}",
        "",
        *split_table(rows),
    ]
    lines += ["", f"give the recipe {flags}"] if flags else []
    return "\n".join(lines + ([f"caution: {caution}"] if caution else []))


def check_rows(rows: Sequence[Row]) -> None:
    """Raises InputError for an id of two rows, a patient or file in two splits, and a file name with a semicolon."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row.id, []).append(row.image[0])
    problems = [
        f"{id}: this would be the id of {', '.join(same)}: rename one of them" for id, same in files.items() if same[1:]
    ]
    semicolons = sorted({file for row in rows for file in (*row.image, row.mask or "") if ";" in file})
    problems += [f"{file}: a manifest cannot hold a name with a semicolon: rename the file" for file in semicolons]
    refuse(problems + [one.what for one in leaks(rows)])


def split_table(rows: Sequence[Row]) -> list[str]:
    """The number of cases of each kind in each split, as lines of a table."""
    lines = [f"{'split':<10}{'normal':>9}{'abnormal':>10}{'unknown':>9}{'masks':>8}{'patients':>10}"]
    for split in SPLITS:
        cases = [row for row in rows if row.split == split]
        n, masks = Counter(row.label for row in cases), sum(bool(row.mask or row.boxes) for row in cases)
        patients = len({row.patient for row in cases if row.patient}) or "-"
        if cases:
            lines.append(f"{split:<10}{n[0]:>9}{n[1]:>10}{n[None]:>9}{masks:>8}{patients:>10}")
    return lines


def count_unread(files: Iterable[Path]) -> Counter[str]:
    """The number of files of each ending that cannot be read as images, in the form of `Prepared.left_out`."""
    ending = lambda file: f"{file.suffix.lower()} files" if file.suffix else "files without an ending"
    return Counter(f"{ending(file)} (not images, or of a format that is not read)" for file in files)


def refuse(problems: Sequence[str]) -> None:
    """Raises InputError with one line for each problem, but at most the first 20; does nothing without problems."""
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more like these"] if len(problems) > MOST_PROBLEMS else []
        raise InputError("\n".join([*problems[:MOST_PROBLEMS], *more]))


def draw(items: Iterable[T], n: int, seed: int, name: Callable[[T], str]) -> list[T]:
    """The first n items of `shuffle` (all where there are fewer), sorted by name."""
    return sorted(shuffle(items, seed, name)[:n], key=name)


def shuffle(items: Iterable[T], seed: int, name: Callable[[T], str]) -> list[T]:
    """The items sorted by the SHA-256 of "SEED NAME".

    The order is the same on every machine. Adding an item does not change the order of the others.
    """
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {name(item)}".encode()).digest())


def text_of(path: Path) -> str:
    """The text of a file, decoded as UTF-8, Shift-JIS or Latin-1, whichever fits first.

    Raises InputError where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror or error}): copy it to that place") from None
    for encoding in ("utf-8-sig", "cp932"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")
