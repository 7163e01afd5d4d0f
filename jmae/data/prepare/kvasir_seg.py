"""Kvasir-SEG (Jha et al., MMM 2020): 1,000 polyps with masks, and no normal image.

images/ID.jpg and masks/ID.jpg have the same names; kavsir_bboxes.json (so spelt) is not needed. Masks are JPEG and are
written as PNG, cut at 127. All images are abnormal test images, for a run that was trained on normal colonoscopy, such
as `hyper_kvasir`. HyperKvasir's polyps are the same pictures: never use both.
"""

from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.hyper_kvasir import pictures
from jmae.data.prepare.masks import sharp
from jmae.data.prepare.tree import named, walk
from jmae.errors import InputError


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes each mask as PNG. Raises InputError with all problems."""
    if named(root, "image-labels.csv"):
        raise InputError(
            f"{root}: has HyperKvasir's image-labels.csv, whose polyps are the same pictures: name one set"
        )
    tops = [place for place, _ in walk(root) if (place / "images").is_dir() and (place / "masks").is_dir()]
    if len(tops) != 1:
        raise InputError(f"{root}: has {len(tops)} folders with images and masks: name the folder Kvasir-SEG")
    images, masks = pictures(tops[0] / "images"), pictures(tops[0] / "masks")
    refuse(
        [
            f"{images.get(name, masks.get(name))}: has no {'mask' if name in images else 'image'}: copy both again"
            for name in sorted(images.keys() ^ masks.keys())
        ]
    )
    rows = [
        Row(f"polyp_{name}", "", "test", 1, (str(images[name]),), mask, extra={"class": "polyp"})
        for name, mask in ((name, sharp(masks[name], out / "masks" / f"{name}.png")) for name in images)
    ]
    caution = "no normal image: image figures need normals of another set; HyperKvasir's polyps are the same pictures"
    return Prepared(
        rows, f"{len(rows)} polyps with a mask", Counter(), caution=caution, licence="research and education"
    )
