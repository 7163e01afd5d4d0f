"""python -m jmae.data.prepare NAME --root DIR --out DIR [--seed 0] [--debug]

A public data set as it is downloaded, below --root, becomes a manifest, --out/manifest.csv. NAME is one of

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

The splits are those of P-PII (Mueller et al., UNSURE 2023), of the last two those of MemMC-MAE (Tian et al. 2022). The
draws follow --seed alone. Images that stay where they are have absolute paths in the manifest.

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import difflib
import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from jmae.data.manifest import Row, summary
from jmae.data.slices import command, counted, refuse_used, write_manifest
from jmae.errors import InputError
from jmae.recipe import typed

DATASETS = (
    "covidx",
    "deeplesion",
    "hyper_kvasir",
    "jsrt",
    "lidc",
)  # each a module with `prepare(root, out, seed) -> Prepared`
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
    names, given = command(argv, __doc__, ["root", "out", "seed"])
    if len(names) != 1 or not {"root", "out"} <= given.keys():
        raise InputError(
            "name one data set, its folder and a new one: python -m jmae.data.prepare NAME --root=DIR --out=DIR; "
            f"names: {', '.join(DATASETS)}"
        )
    name = names[0].lower()
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise InputError(f"{names[0]}: is no data set that is known: did you mean {near}? names: {', '.join(DATASETS)}")
    print(prepare(name, Path(given["root"]), Path(given["out"]), typed("seed", given.get("seed", "0"), 0)))
    return 0


def prepare(name: str, root: Path, out: Path, seed: int = 0) -> str:
    """Writes the manifest of a data set, last of all, and says what there is, what was left out, and which flags a
    recipe needs, or a reader must know.

    Raises InputError with all problems, a line each; no manifest is written then.
    """
    root, out = root.absolute(), out.absolute()
    if not root.is_dir():
        raise InputError(f"{root}: is no folder: name the one with the files of {name}")
    if any(";" in str(folder) for folder in (root, out)):
        raise InputError(f"{root} or {out}: has a semicolon, which separates files in a manifest: rename the folder")
    refuse_used(out)
    made = importlib.import_module(f"jmae.data.prepare.{name}").prepare(root, out, seed)
    rows, found, left_out, flags, caution = made
    if not rows:
        raise InputError(f"{root}: {found}, no image is left ({counted(left_out)}): copy the whole data set")
    write_manifest(out, rows)
    lines = [f"{out / 'manifest.csv'}: {found}: {summary(rows)}; left out: {counted(left_out)}"]
    lines += [f"give the recipe {flags}"] if flags else []
    return "\n".join(lines + ([f"caution: {caution}"] if caution else []))


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
