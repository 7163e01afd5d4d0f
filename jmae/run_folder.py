"""The files of a run folder that are not checkpoints: written whole or not at all."""

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

# A checkpoint does not depend on these: they may change between a run and its continuation.
FREE = ("log_every", "checkpoint_every", "tensorboard", "evaluation", "data.manifest", "data.unlabeled_labels")


def log(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def fixed(config: ConfigDict) -> dict:
    """The part of a recipe that a checkpoint depends on."""
    out = json.loads(recipe.to_json(config))
    for path in FREE:
        *parents, last = path.split(".")
        section = out
        for parent in parents:
            section = section[parent]
        section.pop(last, None)
    return out


def digest(rows: Sequence[Row]) -> str:
    """Which rows are trained on, in their order."""
    return hashlib.sha256("\n".join(f"{row.split}\t{row.id}" for row in rows).encode()).hexdigest()[:16]


def describe_run(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json and environment.json."""
    libraries = (
        "jmae",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "scipy",
        "scikit-image",
    )
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in libraries},
    }
    write_text(workdir / "config.json", recipe.to_json(config))
    write_text(workdir / "environment.json", json.dumps(environment, indent=1))


def cut_history(file: Path, stage: str, step: int) -> None:
    """Drops the lines of a stage beyond `step`: its continuation writes them again."""
    if not file.exists():
        return
    kept = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # torn by a kill; its step comes again
        if line["stage"] != stage or line["step"] <= step:
            kept.append(text)
    write_text(file, "".join(f"{text}\n" for text in kept))
