"""The files of a run folder that are not checkpoints: written whole or not at all."""

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import Row
from jmae.errors import InputError

# A checkpoint does not depend on these: they may change between a run and its continuation.
FREE = (
    *("log_every", "checkpoint_every", "tensorboard", "profile", "evaluation", "fsdp", "accumulate"),
    "steps_per_dispatch",
    *("data.manifest", "data.unlabeled_labels", "data.allow_leaks"),
)
CLOCK = ("time", "step_seconds", "samples_per_second")  # of a line of metrics.jsonl: these differ from run to run


def log(line: str) -> None:
    """One line on standard error, of the first process alone."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def output_folder(text: str | Path) -> Path:
    """The folder that --out names; raises InputError where it is a file."""
    if (folder := Path(text)).is_file():
        raise InputError(f"--out={text} is a file: name a folder")
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old file or the new one. Of several
    processes the first writes. Raises InputError where that fails."""
    if jax.process_index() != 0:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: not written ({error.strerror or error}): free space or change the folder") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def fixed(config: ConfigDict) -> dict:
    """The part of a recipe that a checkpoint depends on; with `select=aucp` the evaluation too, whose score chooses."""
    out = json.loads(recipe.to_json(config))
    for path in FREE if config.get("select") != "aucp" else set(FREE) - {"evaluation"}:
        *parents, last = path.split(".")
        section = out
        for parent in parents:
            section = section[parent]
        section.pop(last, None)
    return out


def digest(rows: Sequence[Row]) -> str:
    """Which rows are trained on, in their order."""
    return hashlib.sha256("\n".join(f"{row.split}\t{row.id}" for row in rows).encode()).hexdigest()[:16]


def recipe_digest(config: ConfigDict) -> str:
    """Which recipe a checkpoint is of: equal where `fixed` is."""
    return hashlib.sha256(json.dumps(fixed(config), sort_keys=True).encode()).hexdigest()[:16]


def describe_run(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json and environment.json."""
    libraries = "jmae jax jaxlib flax optax orbax-checkpoint grain numpy scipy scikit-image".split()
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in libraries},
    }
    write_text(workdir / "config.json", recipe.to_json(config))
    write_text(workdir / "environment.json", json.dumps(environment, indent=1))


def read_history(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one torn by a kill is left out, its step comes again."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def cut_history(file: Path, stage: str, step: int) -> None:
    """Drops the lines of a stage beyond `step`: its continuation writes them again."""
    if file.exists():
        kept = [line for line in read_history(file) if line["stage"] != stage or line["step"] <= step]
        write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))


def add_history(file: Path, line: Mapping[str, Any]) -> None:
    """Appends a line to metrics.jsonl; raises InputError where that fails."""
    if jax.process_index() != 0:
        return
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"{file}: not written ({error.strerror or error}): free space, then run again") from None
