"""A folder in nnU-Net's convention (Isensee et al., Nature Methods 2021): imagesTr, labelsTr, imagesTs, dataset.json.

imagesTr/CASE_0000.nii.gz is the first channel of a case, CASE_0001.nii.gz the second. labelsTr/CASE.nii.gz is its
segmentation; every class above 0 counts as lesion. The cases of imagesTr train. They are normal where their
segmentation is empty or where the folder labelsTr is missing. The cases of imagesTs are the test. They have a label
where the folder labelsTs exists. Without dataset.json, the most frequent ending is taken, and the channels that exist.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

from jmae.data.files import read_mask
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse
from jmae.errors import InputError
from jmae.tables import counted


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
    about = read_json(root / "dataset.json")
    ending, channels = str(about.get("file_ending") or usual_ending(root)), channels_of(about)
    rows, problems, left_out = [], [], Counter[str]()
    for split, part in (("train", "Tr"), ("test", "Ts")):
        images, labels = root / f"images{part}", root / f"labels{part}"
        cases, other = channel_files(images, ending)
        for name in other:
            left_out[f"files not called CASE_0000{ending} ({Path(name).suffix or 'without an ending'})"] += 1
        for case, files in cases.items():
            if sorted(files) != list(range(len(channels) or len(files))):
                there, wanted = ", ".join(f"{k:04d}" for k in sorted(files)), len(channels) or len(files)
                problems.append(f"{images / case}: has the channels {there} of {wanted}: copy them again")
                continue
            mask, label = labels / f"{case}{ending}", 0 if split == "train" else None
            if labels.is_dir():
                if not mask.is_file():
                    problems.append(f"{mask}: not found: copy it again, or move the case's images out")
                    continue
                try:
                    label = int(read_mask(mask).any())
                except InputError as error:
                    problems.append(str(error))
                    continue
            image = tuple(str(files[k]) for k in sorted(files))
            rows.append(Row(case, "", split, label, image, str(mask) if label else None))
    refuse(problems)
    names = {name: value for name, value in (about.get("labels") or {}).items() if value not in (0, "0")}
    taken = "" if (root / "labelsTr").is_dir() else "; without labelsTr, the training cases are taken as normal"
    classes = ", ".join(map(str, names)) or "dataset.json names no classes"
    caution = f"every class above 0 counts as lesion: {classes}" if any(row.mask for row in rows) else ""
    title = " + ".join(channels) or "channels as they are"
    licence = str(about.get("licence") or about.get("license") or "")
    return Prepared(
        rows, f"{counted(len(rows), 'cases')} of {title}{taken}", left_out, caution=caution, licence=licence
    )


def usual_ending(root: Path) -> str:
    """The most frequent ending of files CASE_0000 in imagesTr and imagesTs. Raises InputError without such a file."""
    folders = [root / "imagesTr", root / "imagesTs"]
    names = [name for folder in folders if folder.is_dir() for name in sorted(os.listdir(folder))]
    if endings := [match[1] for name in names if (match := re.fullmatch(r".+_\d{4}(\.nii\.gz|\.\w+)", name))]:
        return Counter(endings).most_common(1)[0][0]
    if names:
        raise InputError(
            f"{root}: none of {len(names)} files (such as {names[0]}) is called CASE_0000.nii.gz: rename them"
        )
    inner = sorted(
        {str(path.parent.relative_to(root)) for path in [*root.glob("*/imagesTr"), *root.glob("*/*/imagesTr")]}
    )
    remedy = f"name a folder inside it: {', '.join(inner)}" if inner else "name the folder DatasetXXX_NAME"
    raise InputError(f"{root}: has no folder imagesTr with images: {remedy}")


def read_json(path: Path) -> dict:
    """The contents of dataset.json; empty without this file. Raises InputError where it is damaged."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}): copy it again, or move it out") from None
    if not isinstance(about, dict):
        raise InputError(f"{path}: not a JSON object: copy it again, or move it out")
    return about


def channels_of(about: dict) -> list[str]:
    """The names of the channels in order; may be empty. The key is `channel_names`, before version 2 `modality`.

    Raises InputError where the channels are not numbered.
    """
    named = about.get("channel_names") or about.get("modality") or {}
    try:
        return [str(named[number]) for number in sorted(named, key=int)]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"dataset.json: channel_names {named!r} need numbers from 0: repair the file") from None


def channel_files(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[str]]:
    """(the files of each case by channel number, the names of all other files)."""
    found: dict[str, dict[int, Path]] = {}
    other = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if match := re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", name):
            found.setdefault(match[1], {})[int(match[2])] = folder / name
        elif not name.startswith("."):
            other.append(name)
    return found, other
