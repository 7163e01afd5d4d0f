"""What tells a mask from an image: names of folders and files, and the values inside."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jmae.data.files import read_image
from jmae.data.manifest import Row
from jmae.data.slices import write_png
from jmae.errors import InputError

FOLDER = r"(\w*masks?|groundtru(e|th)|gt|truth|annot(ation)?s?|labels?|seg(m|s|mentations?)?|rois?)\d*"
FILE = r"(\w*masks?|groundtruth|gt|annotation|label|dseg|probseg|seg(m|mentation)?|roi)"
SEQUENCES = ("flair", "t1", "t1ce", "t2", "t1n", "t1c", "t2w", "t2f")  # BraTS has one of them in the place of "seg"
ABOVE = 127  # the pixels of a JPEG mask above this value are lesion
SAMPLES = 32  # images that are opened at most to see whether they look like masks
DARK = 0.03  # values up to this share of the largest one are background; a JPEG has some
BRIGHT_SHARE = 0.8  # at least this share of a mask's foreground has nearly the largest value
LABEL_VALUES = 8  # a volume of at most so many values, all whole, looks like a segmentation


def words(name: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", name.lower()) if word]


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks: mask, anomaly_mask, ground_truth, annotation, val_label..."""
    return any(re.fullmatch(FOLDER, word) for word in [*words(name), name.lower().replace("_", "")])


def is_mask_name(stem: str) -> bool:
    """Whether a file's name, without its ending, says that it is a mask: NAME_mask, BraTS20_Training_001_seg."""
    return any(re.fullmatch(FILE, word) for word in words(stem)[1:]) or bool(re.fullmatch(FILE, stem.lower()))


def bare(stem: str) -> str:
    """A name without its words for masks and sequences. It is the same for an image and for its mask."""
    return "_".join(word for word in words(stem) if not re.fullmatch(FILE, word) and word not in SEQUENCES)


def refuse_look_alikes(rows: Sequence[Row], kind: Callable[[Row], str]) -> None:
    """Raises InputError where an image of the rows looks like a mask; a few images of each kind are opened."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[kind(row)].append(row)
    most = max(1, SAMPLES // max(1, len(groups)))
    samples = [row for group in groups.values() for row in group[:: max(1, len(group) // most)][:most]]
    for row in samples[:: max(1, len(samples) // SAMPLES)]:
        if _looks_like_mask(row.image[0]):
            raise InputError(
                f"{row.image[0]}: looks like a mask, not like an image: move masks into a folder called mask"
            )


def _looks_like_mask(path: str) -> bool:
    """Whether nearly all of a picture is black or of one brightness, or a volume has few values, all whole."""
    if Path(path).is_dir():  # a DICOM series
        return False
    try:
        array = read_image(path).array
    except InputError:  # reported when the manifest is read
        return False
    if array.shape[-1] > 1 or not array.min() == 0 < array.max():
        return False
    if array.ndim == 3:
        marked = array[array > DARK * array.max()]
        return bool(np.mean(marked > (1 - DARK) * array.max()) > BRIGHT_SHARE)
    values = np.unique(array)
    return len(values) <= LABEL_VALUES and bool((values == np.rint(values)).all())


def sharp(mask: Path, written: Path) -> str:
    """The path of a mask with sharp edges: of the mask itself, or of a PNG, `written`, where the mask is a JPEG.

    Compression leaves rings of small values around the edges of a JPEG, so it is cut at 127.
    """
    if mask.suffix.lower() not in (".jpg", ".jpeg"):
        return str(mask)
    return write_png(written, read_image(mask).array.max(-1) > ABOVE)
