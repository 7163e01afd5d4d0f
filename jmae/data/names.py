"""The ids of cases that have none, from the names of their files; and files that are no case."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jmae.errors import InputError
from jmae.outputs import names_of_outputs

ENDINGS = ".nii.gz .nii .dcm .dicom .ima .png .jpg .jpeg .tif .tiff .nrrd .npy .npz".split()
TEXTS = (".csv", ".html", ".json", ".jsonl", ".md")  # of the files that jmae writes beside its arrays and maps
ID_BYTES = 200  # a file name has 255, and "_confidence.nii.gz" is put behind the id


def names_of(cases: Sequence[tuple[str, ...]]) -> list[str]:
    """An id for each case: the name of its first file, without its ending.

    Where two cases would have one id, it takes the ending too, then as many folders as needed.

    Raises:
      InputError: two cases begin with one file.
    """
    paths = [Path(case[0]) for case in cases]
    if twice := [path for path, n in Counter(paths).items() if n > 1]:
        raise InputError(f"{twice[0]}: is (the first file of) two cases, whose maps would have one name: name it once")
    beside = Counter((path.parent, id_of(stem_of(path))) for path in paths)
    last = [path.name if beside[path.parent, id_of(stem_of(path))] > 1 else stem_of(path) for path in paths]
    folders = [0] * len(paths)
    while True:
        names = [
            id_of("_".join([*path.parts[-1 - n : -1], name]))
            for path, name, n in zip(paths, last, folders, strict=True)
        ]
        count = Counter(names)
        deeper = [i for i, name in enumerate(names) if count[name] > 1 and folders[i] < len(paths[i].parts) - 2]
        if not deeper:
            if max(count.values()) > 1:
                raise InputError(f"{count.most_common(1)[0][0]}: would be the id of two cases: rename one of them")
            return names
        for i in deeper:
            folders[i] += 1


def stem_of(path: str | Path) -> str:
    """A file's name without the ending of its format; a folder's whole name."""
    name = os.path.basename(path)
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name if os.path.isdir(path) or len(ending) == len(name) else name[: len(name) - len(ending)]


def id_of(name: str) -> str:
    """A name as an id: without leading dots and unprintable characters, and as short as a file's name must be."""
    name = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).lstrip(".") or "case"
    if len(name.encode()) > ID_BYTES:
        name = (
            name.encode()[: ID_BYTES - 9].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        )
    return name


def count_unread(files: Iterable[Path]) -> Counter[str]:
    """The number of files of each ending that cannot be read as images, and of results of jmae, with the name of one,
    in the form of `Prepared.left_out`."""
    kinds = defaultdict[str, list[Path]](list)
    written = cache(names_of_outputs)
    for file in files:
        kind = f"{file.suffix.lower()} files (not images, or of a format that is not read)"
        if not file.suffix:
            kind = "files without an ending (not DICOM: give an image its ending, such as .jpg or .png)"
        names = written(file.parent)
        of_jmae = file.name in names or (names and file.suffix in TEXTS)
        kinds["results of jmae (of runs, evaluations, predictions)" if of_jmae else kind].append(file)
    return Counter({f"{kind}, such as {named[0]}": len(named) for kind, named in kinds.items()})


def sequences(word: str) -> tuple[str, ...]:
    """The absolute paths of "a;b". A file whose name holds a semicolon is one path."""
    parts = [word] if os.path.exists(word) else [part.strip() for part in word.split(";")]
    if not all(parts):
        raise InputError(f"{word!r}: is empty, or has an empty name between semicolons: name a file a sequence")
    return tuple(os.path.abspath(part) for part in parts)
