"""HyperKvasir, colonoscopy (Borgli et al., Scientific Data 2020): healthy bowel, and polyps with masks.

Labelled images lie in one folder for each class, labeled-images/.../CLASS/*.jpg. 1,000 images of polyps lie in
segmented-images/images, and their masks have the same names in segmented-images/masks. The masks are JPEG, whose
compression makes rings around edges; a pixel above 127 counts as polyp. The same 1,000 images are in the class `polyp`
too, so that class is not used. Patients are unknown.

The sizes of the splits are those of MemMC-MAE (Tian et al. 2022). Of cecum, ileum and bbps-2-3, 1,600 images train. 500
further images and the polyps are the test. The paper's list is not public. ours: a seeded draw chooses the images; the
normals beyond these 2,100 are val, for a threshold; with fewer than 2,100 normals, 16 of 21 train.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jmae.data.files import image_size, read_image
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.data.prepare.tree import walk
from jmae.data.slices import write_png
from jmae.errors import InputError

NORMAL = ("cecum", "ileum", "bbps-2-3")  # a folder may also be called normal-CLASS
TRAIN, TEST = 1600, 500
MASK_ABOVE = 127  # a mask's pixel above this value is polyp
ENDS = (".jpg", ".jpeg", ".png")
WORKERS = min(8, os.cpu_count() or 1)


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes each mask as `out`/masks/NAME.png. Raises InputError with all problems."""
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
            mask, size = read_image(masks[name]).array.max(-1) > MASK_ABOVE, image_size(images[name])
            if mask.shape != size or not mask.any():
                what = (
                    f"size {mask.shape}, but its image has {size}" if mask.any() else f"no value is above {MASK_ABOVE}"
                )
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
    normals = [row._replace(split=split(i)) for i, row in enumerate(shuffle(normals, seed, lambda row: row.id))]
    counts = Counter(row.extra["class"] for row in normals)
    found = f"{len(normals)} normals ({', '.join(f'{counts[name]} {name}' for name in NORMAL)})"
    found += f", fewer than {TRAIN + TEST}: {train} of them train" if few else ""
    found += f"; {len(polyps)} polyps with a mask"
    return Prepared([*normals, *polyps], found, Counter(), recipe="memmc_mae:paper_colour", licence="CC BY 4.0")


def find_folders(root: Path) -> tuple[dict[str, Path | None], Path]:
    """(the folder of each normal class or None, the folder that contains the folders images and masks).

    Raises InputError where no normal class or no such folder is found, or where several folders of one kind are.
    """
    found: dict[str, list[Path]] = {name: [] for name in (*NORMAL, "segmented-images")}
    for folder, _ in walk(root):
        name = folder.name.lower().removeprefix("normal-")
        if name in NORMAL and pictures(folder):  # folders of labeled-videos have the same names but no images
            found[name].append(folder)
        if (folder / "images").is_dir() and (folder / "masks").is_dir():
            found["segmented-images"].append(folder)
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
    """The image files of a folder by name without ending, sorted. Raises InputError where two have the same name."""
    there = sorted(os.listdir(folder)) if folder else []
    names = [name for name in there if name.lower().endswith(ENDS) and name[0] != "."]
    found: dict[str, Path] = {}
    for name in names:
        if (stem := Path(name).stem) in found:
            raise InputError(f"{Path(folder or '', name)}: {found[stem].name} beside it has the same name: keep one")
        found[stem] = Path(folder or "", name)
    return found
