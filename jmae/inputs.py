"""What a user names or gives as a case of `predict`: files, folders and arrays, as rows and images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jmae.data.files import Image, is_dicom, one_grey
from jmae.data.manifest import NEW, Row
from jmae.data.names import ENDINGS, count_unread, sequences
from jmae.data.slices import in_words
from jmae.data.volumes import WORLD
from jmae.errors import InputError
from jmae.outputs import names_of_outputs
from jmae.tables import counted

MOST_CHANNELS = 4  # an array with a longer last axis has no channels there, unless the run takes as many


def cases_of(word: str, other: list[Path], *, volumes: bool) -> list[tuple[str, ...]]:
    """The cases that an argument of the command names, each as the absolute paths of its sequences.

    A path that cannot be read is a case too: it is refused later, by its name. Adds the files of a folder that are no
    images to `other`. Raises InputError where a folder has no image.
    """
    paths = sequences(word)
    if len(paths) > 1 or not os.path.isdir(paths[0]):
        return [paths]
    unread = list[Path]()
    if not (cases := list(in_folder(Path(paths[0]), unread, volumes))):
        there = f", but with {in_words(count_unread(unread))}" if unread else ""
        raise InputError(f"{word}: is a folder without an image{there}: name files, or a folder of scans")
    other += unread
    return cases


def in_folder(folder: Path, other: list[Path], volumes: bool) -> Iterator[tuple[str, ...]]:
    """The cases in a folder and below it, in the order of their names, by the rule of `jmae prepare folders`: a file is
    an image by the ending of its name, or by its content where that is DICOM. Links to folders are not followed.
    What jmae wrote is no image."""
    hidden = lambda name: name[0] == "." or name in ("DICOMDIR", "__MACOSX")
    written = names_of_outputs(folder)
    try:
        there = sorted(path for path in folder.iterdir() if not hidden(path.name))
    except OSError:
        yield (str(folder),)
        return
    files = [path for path in there if not path.is_dir() and path.name not in written]
    series = volumes and any(map(is_dicom, files))
    if series:
        yield (str(folder),)
    for path in there:
        if path.name in written:
            other.append(path)
        elif path.is_dir() and not path.is_symlink():
            yield from in_folder(path, other, volumes)
        elif path.is_dir() or (not series and (path.name.lower().endswith(tuple(ENDINGS)) or is_dicom(path))):
            yield (str(path),)
        elif not series:
            other.append(path)


def row_of(name: str, case: tuple[str, ...]) -> Row:
    """A case as a manifest row without further columns."""
    return Row(name, "", NEW, None, case)


def is_image(part: Any, data: ConfigDict) -> bool:
    """Whether a part of a list is an array with at least as many axes as the images of the recipe's section `data`."""
    return not isinstance(part, list | tuple) and np.ndim(part) >= len(data.size)


def several_cases(parts: Sequence[Any], what: str, data: ConfigDict) -> InputError:
    """The error where a list can be no case of the recipe's section `data`: it has too many paths, or has arrays."""
    takes = counted(data.channels, "sequences")
    join = f"; np.stack(LIST, -1) joins the {takes} of one case" if what == "arrays" and data.channels > 1 else ""
    return InputError(
        f"a list of {len(parts)} {what}: a list has the paths of one case's sequences, and the run takes {takes}: "
        f"score several cases one by one, [run(case) for case in LIST]{join}"
    )


def wrong_array(array: np.ndarray, data: ConfigDict) -> str:
    """Why an array can be no image of the recipe's section `data`, and the remedy; "" where it can be one."""
    rank, most = len(data.size), max(MOST_CHANNELS, data.channels)
    axes = "rows, columns" if rank == 2 else "i, j, k"
    if array.dtype.kind not in "biuf":
        return f"holds values of the type {array.dtype}: give real numbers"
    if not array.size:
        return f"has the shape {array.shape} and no values: give the values of one case"
    if array.ndim == rank or (array.ndim == rank + 1 and array.shape[-1] <= most):
        return ""
    alone = f"({axes}) or " if data.channels == 1 else ""
    takes = f"the run takes {data.channels} channel{'s' * (data.channels > 1)}"
    return f"has the shape {array.shape}: give {alone}({axes}, channels); one case a call; {takes}"


def image_of_array(
    image: Any, data: ConfigDict, spacing: Sequence[float] | None, affine: np.ndarray | None, name: str
) -> Image:
    """An array (*size) or (*size, channels) as an image on its own grid. For a run of grey images, equal channels of a
    picture become one, as when a file is read.

    Args:
      image: the array, of real numbers.
      data: the recipe's section `data`.
      spacing: mm along each axis, or None.
      affine: (4, 4) voxel -> RAS mm, or None. A volume with a spacing then has the axes `data.axes`.
      name: in messages.

    Raises:
      InputError: the array is no image of the recipe's rank, or its spacing or affine is wrong.
    """
    rank, array = len(data.size), np.asarray(image)
    if wrong := wrong_array(array, data):
        raise InputError(f"{name}: {wrong}")
    with np.errstate(over="ignore"):  # a value that becomes infinite is refused later
        values = np.ascontiguousarray(array if array.ndim > rank else array[..., None], np.float32)
    values = one_grey(values) if rank == 2 and data.channels == 1 else values
    bits = {"u1": 8, "u2": 16}.get(array.dtype.str[1:])
    if affine is not None:
        affine = np.asarray(affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise InputError(f"{name}: its affine is no invertible (4, 4) matrix of voxels to RAS mm: give one")
        spacing = spacing if spacing is not None else tuple(np.linalg.norm(affine[:3, :rank], axis=0).tolist())
    stored = with_spacing(Image(values, None, affine, bits), spacing, name)
    if affine is None and stored.spacing and rank == 3 and data.get("axes"):
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        for axis, (letter, mm) in enumerate(zip(data.axes, stored.spacing, strict=True)):
            world, sign = WORLD[letter]
            affine[world, axis] = sign * mm
        stored = stored._replace(affine=affine)
    return stored


def with_spacing(stored: Image, spacing: Sequence[float] | None, name: str) -> Image:
    """The image with a spacing in mm, where it has none yet.

    Raises:
      InputError: the spacing is not one positive number an axis, or the image has another one.
    """
    if spacing is None:
        return stored
    mm, rank = np.asarray(spacing, float), stored.array.ndim - 1
    if mm.shape != (rank,) or not (np.isfinite(mm).all() and (mm > 0).all()):
        raise InputError(f"{name}: the spacing {spacing} is not {rank} numbers above 0: give mm along each axis")
    if stored.spacing and not np.allclose(stored.spacing, mm, rtol=0.01):
        raise InputError(f"{name}: has the spacing {stored.spacing} mm, not {tuple(spacing)}: leave it out")
    return stored if stored.spacing else stored._replace(spacing=tuple(mm.tolist()))
