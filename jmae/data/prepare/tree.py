"""The files below a folder: listing them, and finding the images that a list names."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from jmae.data.prepare.masks import is_mask_folder
from jmae.errors import InputError
from jmae.outputs import names_of_outputs

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
DICOM = (".dcm", ".dicom", ".ima")
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".npy", ".npz")
ENDS = (*VOLUMES, *DICOM, *PICTURES)
MOST_PROBLEMS = 20  # lines of a message


def walk(folder: Path, other: list[Path] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """(a folder, the names of its files), sorted, for `folder` and all folders below it.

    Hidden files and folders are passed over, and so is `__MACOSX`, which macOS adds to its archives. What jmae wrote is
    passed over, too, and added to `other`.
    """
    for place, folders, names in os.walk(folder):
        written = names_of_outputs(Path(place))
        if other is not None:
            other += [Path(place, name) for name in sorted(written & {*folders, *names})]
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in {"__MACOSX", *written})
        yield Path(place), sorted(name for name in names if name[0] != "." and name not in written)


def stem(path: Path | str) -> str:
    """The name of a file without the ending of an image."""
    name = os.path.basename(path)
    end = next((end for end in ENDS if name.lower().endswith(end)), "")
    return name[: len(name) - len(end)]


def files_below(root: Path, ends: Collection[str]) -> list[Path]:
    """All files with one of the endings (of lower case), in any folder."""
    return [place / name for place, names in walk(root) for name in names if name.lower().endswith(tuple(ends))]


def named(root: Path, *names: str) -> list[Path]:
    """All files with one of the names, whose case does not matter, in any folder."""
    wanted = {name.lower() for name in names}
    return [place / name for place, there in walk(root) for name in there if name.lower() in wanted]


def one_file(root: Path, *names: str, what: str) -> Path:
    """The only file with one of the names, in any folder. Raises InputError without one, or with several.

    Args:
        what: the file in words, for the remedy.
    """
    found = named(root, *names)
    if not found:
        raise InputError(f"{root}: has no {' or '.join(names)}: copy {what} there")
    if found[1:]:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        raise InputError(f"{root}: has several of {' or '.join(names)}: keep one of {several}")
    return found[0]


class Images:
    """The images below a folder by their names. Files in folders of masks are no images."""

    def __init__(self, root: Path, ends: Sequence[str] = (*PICTURES, *DICOM)):
        self.root, self.problems = root, list[str]()
        self.places: dict[str, list[Path]] = {}
        for path in files_below(root, ends):
            if not any(is_mask_folder(part) for part in path.relative_to(root).parts[:-1]):
                end = next(end for end in ends if path.name.lower().endswith(end))
                self.places.setdefault(path.name[: -len(end)], []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def find(self, name: str, listed_in: str) -> Path | None:
        """The image of this name, whatever its ending. Adds to `problems` and returns None unless there is just one."""
        found = self.places.get(stem(name), [])
        if len(found) == 1:
            return found[0]
        where = f"lies in {' and '.join(str(path.parent) for path in found)}" if found else "not found"
        self.problems.append(f"{name}: {where} ({listed_in}): copy the images again, into one folder")
        return None


def refuse(problems: Sequence[str]) -> None:
    """Raises InputError with one line for each problem, but at most the first 20; does nothing without problems."""
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more like these"] if len(problems) > MOST_PROBLEMS else []
        raise InputError("\n".join([*problems[:MOST_PROBLEMS], *more]))
