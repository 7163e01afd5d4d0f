"""pretrain_data.json of nnssl (MIC-DKFZ; OpenMind and others): volumes to pre-train on, without labels.

collection -> datasets -> subjects -> sessions -> images, each with `image_path`. A path that begins with $NAME, such as
$nnssl_raw/..., starts at the environment variable NAME. The file pretrain_data.json lies below --root. --modality=T1w
takes the images of one modality; without it all of them are taken. Each image is a case of one channel in split
`train`, without a label. The patient is the data set with the subject, since ids of subjects repeat between data sets.
An anonymization_mask marks voxels that were defaced, and is not used: it is no lesion.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.data.prepare.tree import one_file
from jmae.errors import InputError


def prepare(root: Path, out: Path, seed: int, modality: str = "") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    path = one_file(root, "pretrain_data.json", what="the file of the collection")
    rows, problems, left_out, modalities = [], [], Counter[str](), Counter[str]()
    for parts, image in images_of(path):
        modalities[image["modality"]] += 1
        if modality not in ("", image["modality"]):
            left_out[f"images of {image['modality']}"] += 1
            continue
        file, wrong = place_of(image["image_path"], root)
        if wrong:
            problems.append(f"{path}: {image['image_path']}: {wrong}")
            continue
        name = "_".join([*parts, str(image["name"]).partition(".")[0]]).replace("/", "_").replace(";", "_")
        extra = {"source": parts[0], "modality": image["modality"]}
        rows.append(Row(name, "_".join(parts[:2]), "train", None, (str(file),), extra=extra))
    refuse(problems)
    if modality and modality not in modalities:
        raise InputError(f"{path}: has no {modality}: write --modality= one of {', '.join(sorted(modalities))}")
    kinds = ", ".join(f"{n} {name}" for name, n in modalities.most_common())
    caution = "nobody labelled these images: lesions among them train as normal"
    return Prepared(rows, f"{len(rows)} images ({kinds})", left_out, caution=caution, recipe="maemi:small")


def images_of(path: Path) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    """((data set, subject, session), the image) of each image. Raises InputError where the file has another form."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        for key, data in about["datasets"].items():
            for subject, person in data["subjects"].items():
                for session, visit in person["sessions"].items():
                    for image in visit["images"]:
                        needed = {name: str(image[name]) for name in ("name", "image_path", "modality")}
                        yield (str(data.get("name") or key), subject, session), needed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a pretrain_data.json ({type(error).__name__} {error}): copy it again") from None


def place_of(path: str, root: Path) -> tuple[Path, str]:
    """The file of a path, relative to the root or to an environment variable; and what is wrong with it, or ""."""
    first, _, rest = path.partition("/")
    if first.startswith("$"):
        folder = os.environ.get(first[1:], "")
        if not folder:
            return Path(path), f"the environment variable {first[1:]} is not set: export {first[1:]}=DIR"
        file = Path(folder, rest)
    else:
        file = root / path
    return file, "" if file.is_file() else f"{file} is not found: copy it there"
