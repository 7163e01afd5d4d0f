"""The files of a run folder that are not checkpoints: written whole or not at all."""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import Row
from jmae.data.names import ENDINGS
from jmae.errors import InputError
from jmae.outputs import outputs_in
from jmae.sealed import seal, unseal
from jmae.tables import csv_text

# A checkpoint does not depend on these: they may change between a run and its continuation.
FREE = (
    *("log_every", "checkpoint_every", "loggers", "profile", "evaluation", "fsdp", "accumulate"),
    *("steps_per_dispatch", "skip_nonfinite"),
    *("data.manifest", "data.unlabeled_labels", "data.allow_leaks"),
)
CLOCK = ("time", "step_seconds", "samples_per_second")  # of a line of metrics.jsonl: these differ from run to run


def is_first() -> bool:
    """Whether this is the first process of a run. A process that has not imported JAX is the only one."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def log(line: str) -> None:
    """One line on standard error, of the first process alone."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def output_folder(text: str | Path, kind: str) -> Path:
    """The folder that --out names, or --workdir for the kind "run". Raises InputError where it is a file, or where it
    holds scans and is not yet of this kind, one of `outputs_in`."""
    folder, flag = Path(text), "--workdir" if kind == "run" else "--out"
    if folder.is_file():
        raise InputError(f"{flag}={text} is a file: name a folder")
    written = outputs_in(folder)
    if kind not in written and (scan := first_scan(folder, set[str]().union(*written.values()))):
        raise InputError(f"{folder}: holds scans, such as {scan}: name another {flag}")
    return folder


def resuming(workdir: Path) -> str:
    """The command that goes on with the training of a run folder, which has config.json."""
    return f"jmae train --workdir {shlex.quote(str(workdir))}"


def first_scan(folder: Path, without: Collection[str]) -> str:
    """The name of the first image file in a folder, or ""; names of `without` do not count."""
    from jmae.data.files import is_dicom  # here: the readers take a second to import

    names = sorted(name for name in (os.listdir(folder) if folder.is_dir() else ()) if name[0] != ".")
    is_scan = lambda name: name not in without and (name.lower().endswith(tuple(ENDINGS)) or is_dicom(folder / name))
    return next((name for name in names if is_scan(name)), "")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old file or the new one. Of several
    processes the first writes. Raises InputError where that fails."""
    if not is_first():
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
    write_text(path, csv_text(rows))


def fixed(config: ConfigDict) -> dict:
    """The part of a recipe that a checkpoint depends on; with `select=aucp` also the evaluation."""
    out = json.loads(recipe.to_json(config))
    for path in FREE if config.get("select") != "aucp" else set(FREE) - {"evaluation"}:
        *parents, last = path.split(".")
        section = out
        for parent in parents:
            section = section[parent]
        section.pop(last, None)
    return out


def digest(rows: Sequence[Row]) -> str:
    """The digest of the rows that are trained on, in their order."""
    return hashlib.sha256("\n".join(f"{row.split}\t{row.id}" for row in rows).encode()).hexdigest()[:16]


def images_digest(rows: Sequence[Row]) -> str:
    """The digest of the values of the images that are trained on: the same ids may come with other images."""
    return hashlib.sha256("\n".join(row.content for row in rows).encode()).hexdigest()[:16]


def recipe_digest(config: ConfigDict) -> str:
    """The digest of the recipe of a checkpoint; equal where `fixed` is equal."""
    return hashlib.sha256(json.dumps(fixed(config), sort_keys=True).encode()).hexdigest()[:16]


def describe_run(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json and environment.json."""
    import jax  # here: commands that refuse their arguments do not import it

    libraries = "jmae jax jaxlib flax optax orbax-checkpoint grain numpy scipy scikit-image".split()
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in libraries},
    }
    write_text(workdir / "config.json", seal(json.loads(recipe.to_json(config))))
    write_text(workdir / "environment.json", seal(environment))


def read_environment(workdir: Path) -> dict[str, Any]:
    """The content of environment.json, which only reports show; {} where it is missing or, as the log says, damaged."""
    file = workdir / "environment.json"
    try:
        return unseal(file.read_bytes(), file, log)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log(f"warning: {file}: left out of reports: {error}")
        return {}


def read_history(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. A line that was torn by a kill is left out, as its step comes again. Any other line
    that cannot be read is left out with a warning."""
    found = _history(file)
    if damaged := [number for number, (_, line) in enumerate(found, 1) if line is None]:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        log(f"warning: {file}: line {', '.join(map(str, damaged[:3]))}{more}: cannot be read and is passed over")
    return [line for _, line in found if line is not None]


def _history(file: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(bytes, content) of each line of metrics.jsonl; None where it is no line of a stage and its step."""
    try:
        whole = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): check its rights") from None
    found: list[tuple[bytes, dict[str, Any] | None]] = []
    for text in whole.splitlines(keepends=True):
        try:
            line = json.loads(text)
            fits = isinstance(line, dict) and isinstance(line.get("stage"), str) and type(line.get("step")) is int
        except (ValueError, RecursionError):
            fits = False
        if fits or text.endswith(b"\n"):  # a line without its end was torn by a kill
            found.append((text, line if fits else None))
    return found


def cut_history(file: Path, stage: str, step: int) -> None:
    """Drops the lines of a stage beyond `step`: its continuation writes them again. Lines that cannot be read stay."""
    if file.exists():
        keep = lambda line: line is None or line["stage"] != stage or line["step"] <= step
        lines = [text.rstrip(b"\r\n") + b"\n" for text, line in _history(file) if keep(line)]
        write_bytes(file, b"".join(lines))


def add_history(file: Path, line: Mapping[str, Any]) -> None:
    """Appends a line to metrics.jsonl; raises InputError where that fails."""
    add_line(file, json.dumps(line))


def add_line(file: Path, line: str) -> None:
    """Appends a line to a file, of the first process alone; raises InputError where that fails."""
    if not is_first():
        return
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(f"{line}\n")
    except OSError as error:
        raise InputError(f"{file}: not written ({error.strerror or error}): free space, then run again") from None
