"""HyperKvasir, colonoscopy (Borgli et al., Scientific Data 2020): healthy bowel, and polyps with masks.

Labelled images lie in a folder a class, labeled-images/.../CLASS/*.jpg; 1,000 polyps in segmented-images/images, with
masks of the same names in segmented-images/masks. Those are JPEG, whose compression rings around the edge: a pixel
above 127 is polyp. They are pictures of the class `polyp` too, which is never used. Patients are not known.

Splits in MemMC-MAE's numbers (Tian et al. 2022): 1,600 of cecum, ileum and bbps-2-3 train, 500 of them and the polyps
are the test; its list is not public. ours: which ones is a seeded draw, and the normals beyond the 2,100 are val, held
out for a threshold. Of fewer than 2,100, 16 of 21 train.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jmae.data.files import image_size, read_image
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffled
from jmae.data.slices import write_png
from jmae.errors import InputError

NORMAL = ("cecum", "ileum", "bbps-2-3")  # folders may be named normal-CLASS
TRAIN, TEST = 1600, 500
MASKED = 127  # a mask's pixel above it is polyp
ENDS = (".jpg", ".jpeg", ".png")
WORKERS = min(8, os.cpu_count() or 1)


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Writes `out`/masks/NAME.png and returns the rows; raises InputError with all problems."""
    classes, segmented = find_folders(root)
    normals = [
        Row(f"{name}_{path.stem}", "", "", 0, (str(path),), extra={"class": name})
        for name in NORMAL
        for path in pictures(classes[name]).values()
    ]
    images, masks = pictures(segmented / "images"), pictures(segmented / "masks")
    problems = [
        f"{images.get(name, masks.get(name))}: has no {'mask' if name in images else 'image'}: copy both again"
        for name in sorted(images.keys() ^ masks.keys())
    ]
    refuse(problems)

    def polyp(name: str) -> Row | None:
        try:
            mask, size = read_image(masks[name]).array.max(-1) > MASKED, image_size(images[name])
            if mask.shape != size or not mask.any():
                what = f"its size {mask.shape} is not its image's, {size}" if mask.any() else f"nothing above {MASKED}"
                raise InputError(f"{masks[name]}: {what}: copy both again, or move both out")
            written = write_png(out / "masks" / f"{name}.png", mask)
            return Row(f"polyp_{name}", "", "test", 1, (str(images[name]),), written, extra={"class": "polyp"})
        except InputError as error:
            problems.append(str(error))
            return None

    with ThreadPoolExecutor(WORKERS) as pool:
        polyps = [row for row in pool.map(polyp, images) if row]
    refuse(sorted(problems))
    few = len(normals) < TRAIN + TEST
    train = len(normals) * TRAIN // (TRAIN + TEST) if few else TRAIN
    split = lambda i: "train" if i < train else "test" if i < TRAIN + TEST else "val"
    drawn = [row._replace(split=split(i)) for i, row in enumerate(shuffled(normals, seed, lambda row: row.id))]
    counts = Counter(row.extra["class"] for row in normals)
    found = f"{len(normals)} normals ({', '.join(f'{counts[name]} {name}' for name in NORMAL)})"
    found += f", fewer than {TRAIN + TEST}, of which {train} train" if few else ""
    return Prepared([*drawn, *polyps], f"{found}; {len(polyps)} polyps with a mask", Counter())


def find_folders(root: Path) -> tuple[dict[str, Path | None], Path]:
    """The folder of each normal class, None where there is none, and the one with the folders images and masks; raises
    InputError where none is there, or several of one kind are."""
    found: dict[str, list[Path]] = {name: [] for name in (*NORMAL, "segmented-images")}
    for folder, folders, _ in os.walk(root):
        name = os.path.basename(folder).lower().removeprefix("normal-")
        if name in NORMAL and pictures(Path(folder)):  # labeled-videos has such folders too
            found[name].append(Path(folder))
        if {"images", "masks"} <= set(folders):
            found["segmented-images"].append(Path(folder))
    for name, paths in found.items():
        if len(paths) > 1:
            several = ", ".join(str(path.relative_to(root)) for path in sorted(paths))
            raise InputError(f"{root}: has several folders of {name}: keep one of {several}")
    if not any(found[name] for name in NORMAL):
        raise InputError(f"{root}: has no images in folders {', '.join(NORMAL)}: copy labeled-images there")
    if not found["segmented-images"]:
        raise InputError(f"{root}: has no folder with images and masks: copy segmented-images there")
    return {name: next(iter(found[name]), None) for name in NORMAL}, found["segmented-images"][0]


def pictures(folder: Path | None) -> dict[str, Path]:
    """The images of a folder by their names without ending, in order; raises InputError where two have one name."""
    names = sorted(name for name in (os.listdir(folder) if folder else ()) if name.lower().endswith(ENDS))
    found: dict[str, Path] = {}
    for name in names:
        if (stem := Path(name).stem) in found:
            raise InputError(f"{Path(folder or '', name)}: has the name of {found[stem].name} beside it: keep one")
        found[stem] = Path(folder or "", name)
    return found
