"""python -m jmae.data.prepare NAME --root DIR --out DIR [--seed 0] [--debug]

A data set as it lies below --root becomes a manifest, --out/manifest.csv. NAME is a convention of folders

folders     train/good, test/good, test/DEFECT and masks anywhere (mask, ground_truth, annotation), as MVTec AD has it;
            also val and unlabeled. Or two folders of images, --normal DIR and --test DIR, instead of --root.
nnunet      imagesTr/CASE_0000.nii.gz and on, labelsTr, imagesTs, dataset.json. Empty segmentations are normal.
bids        sub-*/[ses-*/]anat/*_T1w.nii.gz; the channels are --sequences=T1w,FLAIR. Sessions with a lesion mask are
            the test.
ddad        data.json of DDAD and MedIAnomaly (train.0, train.unlabeled.0 and .1, test.0 and .1) and a folder of images.

or a public data set as it is downloaded:

chexpert    CheXpert chest radiographs: train.csv, valid.csv and the images. No Finding is normal, Pneumonia abnormal;
            1,024 normals train, 50 + 50 are val, 100 + 100 the test. --views=PA, frontal or all.
jsrt        JSRT chest radiographs: the .IMG files and the tables CLNDAT_EN.txt and CNNDAT_EN.txt, in any folders.
            Written as 16-bit PNG, inverted (air dark); nodules as boxes. 19 normals and all nodules are the test.
lidc        LIDC-IDRI chest CT: the folders LIDC-IDRI-xxxx of DICOM series, and the readings as XML anywhere. The
            slices stay where they are (HU); masks are written. The first 800 patients train, 100 are val, the rest
            test: 500 healthy and 478 lesion slices are drawn of either.
deeplesion  DeepLesion CT: DL_info.csv and the folders Images_png. The 16-bit PNG stay where they are, HU = value -
            32768; boxes on the key slices. The official patients: 500 + 500 slices of val and of test are drawn.
covidx      COVIDx chest radiographs: COVID-Net's lists, as train_COVIDx8B.txt or train.txt and the same for the test,
            anywhere, and the folders train and test. The negatives of the first train, all of the second is the test.
            Coloured images are written anew in grey.
hyper_kvasir  HyperKvasir colonoscopy: the folders of classes cecum, ileum and bbps-2-3, anywhere, and images and masks
            of segmented-images. 1,600 normals train, 500 and all polyps are the test, further normals are val. Masks
            are written as PNG.

The splits of jsrt, lidc and deeplesion are those of P-PII (Mueller et al., UNSURE 2023), of covidx and hyper_kvasir
those of MemMC-MAE (Tian et al. 2022). Draws follow --seed alone. Images that stay where they are have absolute paths
in the manifest. A patient or a file in two splits is refused.

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
from jmae.data.slices import command, counted, refuse_used, write_manifest
from jmae.errors import InputError
from jmae.recipe import typed

DATASETS: dict[str, tuple[str, ...]] = {  # each a module with `prepare(root, out, seed, ...) -> Prepared`; its flags
    "bids": ("sequences",),
    "chexpert": ("views",),
    "covidx": (),
    "ddad": (),
    "deeplesion": (),
    "folders": ("normal", "test"),
    "hyper_kvasir": (),
    "jsrt": (),
    "lidc": (),
    "nnunet": (),
}
NAMES = {"mvtec": "folders", "nnu-net": "nnunet", "medianomaly": "ddad"}  # also understood
SHOWN = 20  # problems that are spelled out

T = TypeVar("T")


class Prepared(NamedTuple):
    """What a data set gave."""

    rows: list[Row]  # with absolute paths
    found: str  # what is there, in words
    left_out: Counter[str]
    flags: str = ""  # what a recipe must be told
    caution: str = ""  # what is to be said with every figure


def main(argv: list[str]) -> int:
    further = sorted({flag for flags in DATASETS.values() for flag in flags})
    names, given = command(argv, __doc__, ["root", "out", "seed", *further])
    if len(names) != 1 or "out" not in given or not {"root", "normal"} & given.keys():
        raise InputError(
            "name one data set, its folder and a new one: python -m jmae.data.prepare NAME --root=DIR --out=DIR; "
            f"names: {', '.join(DATASETS)}"
        )
    name = NAMES.get(names[0].lower(), names[0].lower())
    if name not in DATASETS:
        near = difflib.get_close_matches(name, [*DATASETS, *NAMES], n=1, cutoff=0.0)[0]
        raise InputError(f"{names[0]}: is no data set that is known: did you mean {near}? names: {', '.join(DATASETS)}")
    options = {flag: given[flag] for flag in further if flag in given}
    if wrong := [flag for flag in options if flag not in DATASETS[name]]:
        raise InputError(f"--{wrong[0]}: is no flag of {name}: leave it out")
    root, seed = given.get("root"), typed("seed", given.get("seed", "0"), 0)
    print(prepare(name, Path(root) if root else None, Path(given["out"]), seed, **options))
    return 0


def prepare(name: str, root: Path | None, out: Path, seed: int = 0, **options: str) -> str:
    """Writes the manifest of a data set, last of all, and says what there is, what was left out, and which flags a
    recipe needs, or a reader must know. `options` are the data set's own; `root` may be None where these name folders.

    Raises InputError with all problems, a line each; no manifest is written then.
    """
    root, out = root and root.absolute(), out.absolute()
    if root and not root.is_dir():
        raise InputError(f"{root}: is no folder: name the one with the files of {name}")
    refuse_used(out)
    rows, found, left_out, flags, caution = importlib.import_module(f"jmae.data.prepare.{name}").prepare(
        root, out, seed, **options
    )
    if not rows:
        raise InputError(f"{root or name}: {found}, no image is left ({counted(left_out)}): copy the whole data set")
    check_rows(rows)
    write_manifest(out, rows)
    lines = [f"{out / 'manifest.csv'}: {found}: {summary(rows)}; left out: {counted(left_out)}", "", *table(rows)]
    lines += ["", f"give the recipe {flags}"] if flags else []
    return "\n".join(lines + ([f"caution: {caution}"] if caution else []))


def check_rows(rows: Sequence[Row]) -> None:
    """Raises InputError for ids that two rows have, for patients and files in two splits, and for names of files that a
    manifest cannot hold."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row.id, []).append(row.image[0])
    problems = [f"{id}: would be the id of {', '.join(same)}: rename one" for id, same in files.items() if same[1:]]
    named = sorted({file for row in rows for file in (*row.image, row.mask or "") if ";" in file})
    problems += [f"{file}: has a semicolon, which separates files in a manifest: rename it" for file in named]
    refuse(problems + [one.what for one in leaks(rows)])


def table(rows: Sequence[Row]) -> list[str]:
    """How many cases of each kind a split has, as lines."""
    lines = [f"{'split':<10}{'normal':>9}{'abnormal':>10}{'unknown':>9}{'masks':>8}{'patients':>10}"]
    for split in SPLITS:
        own = [row for row in rows if row.split == split]
        n, masks = Counter(row.label for row in own), sum(bool(row.mask or row.boxes) for row in own)
        patients = len({row.patient for row in own if row.patient}) or "-"
        if own:
            lines.append(f"{split:<10}{n[0]:>9}{n[1]:>10}{n[None]:>9}{masks:>8}{patients:>10}")
    return lines


def unknown(files: Iterable[Path]) -> Counter[str]:
    """How many files of each ending are no images that are read, as `Prepared.left_out` has it."""
    ending = lambda file: f"{file.suffix.lower()} files" if file.suffix else "files without an ending"
    return Counter(f"{ending(file)} (no images, or of a kind that is not read)" for file in files)


def refuse(problems: Sequence[str]) -> None:
    """Raises InputError with a line each, if there are any; of many the first 20."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more like these"] if len(problems) > SHOWN else []
        raise InputError("\n".join([*problems[:SHOWN], *more]))


def draw(items: Iterable[T], n: int, seed: int, name: Callable[[T], str]) -> list[T]:
    """n of the items, or all if they are fewer, in the order of their names.

    The first that are `shuffled`."""
    return sorted(shuffled(items, seed, name)[:n], key=name)


def shuffled(items: Iterable[T], seed: int, name: Callable[[T], str]) -> list[T]:
    """The items by the SHA-256 of "SEED NAME": the same order on every machine, whatever lies beside them."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {name(item)}".encode()).digest())


def text_of(path: Path) -> str:
    """A text file in UTF-8, Shift-JIS or Latin-1, the first that fits; raises InputError if it cannot be read."""
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
