"""How often scans get the warning that they are unlike the training images (`jmae.likeness`).

    JMAE_DATA=FOLDER python -m benchmarks.likeness

Of each pack, `DRAWS` subsets of its normal training images stand for a training. The table has the share of the pack's
own test normals and abnormal scans with a warning, and that of foreign scans. These are the test images of the other
packs, and the pack's own test normals inverted, turned, mirrored, made 8 times smaller, or replaced by noise.
"disguised" are images of another pack in the size and channels of the own ones, which only their grey values tell
apart. Of a foreign volume the middle slice is taken. A share is a mean over subsets.

Writes benchmarks/results/likeness.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import pack
from benchmarks.timing import table, write
from jmae.data.files import Image, read_image
from jmae.data.manifest import parse_manifest
from jmae.data.transforms import resize, to_unit
from jmae.likeness import Traits, kind_of, traits_of, unlike

RESULTS = Path(__file__).parent / "results" / "likeness.json"
PACKS = ("cxr_nih", "endoscopy", "mri3d_hippo", "cxr_peds")
SIZES = (12, 16, 26, 50, 100)  # training images, and then all of a pack
DRAWS = 20


def read(folder: Path) -> dict[tuple[str, int], list[Image]]:
    """The images of a pack by split and label."""
    found: dict[tuple[str, int], list[Image]] = {}
    for row in parse_manifest(folder / "manifest.csv")[0]:
        if row.label is not None and (row.split == "test" or (row.split == "train" and row.label == 0)):
            found.setdefault((row.split, row.label), []).append(read_image(row.image))
    return found


def changed(images: list[Image]) -> dict[str, list[Traits]]:
    """The traits of images that are no scans of their kind any more."""
    rng = np.random.default_rng(0)
    forms = {
        "inverted": lambda a: a.max() + a.min() - a,
        "upside down": lambda a: a[::-1],
        "turned by 90 degrees": lambda a: np.swapaxes(a, 0, 1)[::-1],
        "mirrored": lambda a: a[:, ::-1],
        "8 times smaller": lambda a: a[(slice(None, None, 8),) * (a.ndim - 1)],
        "noise": lambda a: rng.uniform(a.min(), a.max(), a.shape).astype(np.float32),
    }
    return {
        name: [traits_of(one._replace(array=np.ascontiguousarray(form(one.array)))) for one in images]
        for name, form in forms.items()
    }


def disguised(images: list[Image], own: Image) -> list[Traits]:
    """The traits of foreign images in the size and channels of the pack's own image; volumes are not disguised."""
    found = []
    for one in images if len(own.size) == 2 else ():
        flat = one if len(one.size) == 2 else one._replace(array=one.array[one.size[0] // 2], spacing=None)
        unit = to_unit(flat.array, flat.bits or 0).mean(-1, keepdims=True)
        array = np.repeat(resize(255 * unit, own.size), own.array.shape[-1], -1)
        found.append(traits_of(flat._replace(array=array, bits=8)))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folders = {name: folder for name in PACKS if (folder := pack(name))}
    images = {name: read(folder) for name, folder in folders.items()}
    traits = {
        name: {key: [traits_of(one) for one in each] for key, each in own.items()} for name, own in images.items()
    }
    for name, own in traits.items():
        train, rng = own["train", 0], np.random.default_rng(0)
        groups = {"normal": own["test", 0], "abnormal": own.get(("test", 1), [])}
        groups |= {f"of {other}": each["test", 0] for other, each in traits.items() if other != name}
        groups |= {
            f"of {other}, disguised": disguised(each["test", 0], images[name]["test", 0][0])
            for other, each in images.items()
            if other != name
        }
        groups |= changed(images[name]["test", 0])
        shares: dict[str, Any] = {}
        for n in (*(n for n in SIZES if n < len(train)), len(train)):
            draws = DRAWS if n < len(train) else 1
            kinds = [kind_of([train[i] for i in rng.choice(len(train), n, replace=False)]) for _ in range(draws)]
            shares[f"{n} training images"] = {
                group: float(np.mean([bool(unlike(one, kind)) for kind in kinds for one in each]))
                for group, each in groups.items()
                if each
            }
        head = (name, *next(iter(shares.values())))
        lines = [(n, *(f"{share[group]:.3g}" for group in head[1:])) for n, share in shares.items()]
        write(RESULTS, name, {"draws": DRAWS, "table": [head, lines]})
        print(table(head, lines), "\n")


if __name__ == "__main__":
    main()
