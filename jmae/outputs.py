"""What jmae wrote into a folder: maps, overlays and arrays that no command may take for scans."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from jmae.errors import InputError
from jmae.sealed import unseal

LOCK = ".lock"  # in each folder of a run, an evaluation or predictions, while a command writes there
DONE = ".scores.jsonl"  # of predict: first the run and its settings, then a line for each case that is done
WRITTEN = re.compile(r"_(anomaly|confidence|mask|overlay)\.[^_]+$")  # what predict appends to an id
OF_RUN = ("cache", "checkpoints", "evaluation", "fitted")  # folders
# Names in the folders of a command that did not finish: each of them must fit.
CACHED = re.compile(r"-[0-9a-f]{16}(-origins)?\.npy$")
MAPS = re.compile(r"_(anomaly|confidence|recon)\.[^_]+$")


def outputs_in(folder: Path) -> dict[str, set[str]]:
    """What jmae wrote into a folder, by kind: the names of its folders and of its images.

    A kind is "run", "evaluation", "predictions" or "quickstart". A command that did not finish is known by the names of
    its arrays or maps.
    """
    has = lambda *names: all(os.path.exists(folder / name) for name in names)  # False where it cannot be read
    found: dict[str, set[str]] = {}
    if has("config.json", "environment.json") or _all_named(folder / "cache", CACHED):
        found["run"] = {*OF_RUN, *(path.name for path in folder.glob("evaluation-*"))}
    if has("metrics.json", "scores.csv") or _all_named(folder / "maps", MAPS):
        found["evaluation"] = {"maps"}
    if has(DONE) or has("scores.csv", f"1/{DONE}"):  # several runs have a folder each
        lines = [line for file in (folder / DONE, folder / "1" / DONE) for line in read_done(file)[1:]]
        found["predictions"] = {name for line in lines for name in line["files"]}
        # A command that was killed has files that its list does not name.
        found["predictions"] |= {path.name for path in folder.iterdir() if WRITTEN.search(path.name)}
    if has("data/manifest.csv", "run"):
        found["quickstart"] = set()
    return found


def _all_named(folder: Path, pattern: re.Pattern) -> bool:
    """Whether a folder has files, and the pattern is in the name of each that is not hidden."""
    try:
        names = [name for name in os.listdir(folder) if name[0] != "."]
    except OSError:
        return False
    return bool(names) and all(map(pattern.search, names))


def names_of_outputs(folder: Path) -> set[str]:
    """The names of all kinds of `outputs_in`."""
    return set[str]().union(*outputs_in(folder).values())


def read_done(file: Path) -> list[dict[str, Any]]:
    """The lines of `DONE`. A line that is torn or damaged is left out, so that its case is predicted again."""
    lines = []
    try:
        for text in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(unseal(text, file, None))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): check its rights") from None
    return lines[:1] + [line for line in lines[1:] if {"id", "image", "of", "files", "line"} <= line.keys()]
