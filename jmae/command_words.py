"""What the words of a command ask for, read without JAX.

`jmae COMMAND` calls `refuse_mistakes` before it imports the command. So a mistake in the flags, the recipe, config.json
or the manifest's text is reported at once. The commands read their words by the same functions.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import NEW, PHANTOM, Row, read_cases
from jmae.data.names import sequences
from jmae.data.rows import in_split, listed_rows
from jmae.errors import InputError
from jmae.run_folder import output_folder, resuming
from jmae.seen import ALLOW

TRAIN = ["workdir"], ["dry-run", "show"]  # flags of `jmae train`, and those whose value may be missing
PREDICT = ["workdir", "out", "manifest", "continue", "config"]
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
EARLY = 2**20  # bytes of a manifest that is read before JAX is imported: a longer one takes as long as the import
UNFINISHED = ".part"  # folder inside of the one that export writes


def refuse_mistakes(command: str, words: Sequence[str]) -> None:
    """Raises InputError for what is wrong with the words of a command."""
    workdirs, rest = recipe.values_of(words, "workdir")
    if command == "train":
        refuse_training(words)
    elif command == "evaluate" and len(workdirs) > 1:  # to fuse evaluations takes no system
        for workdir in workdirs:
            recipe.saved_text(Path(workdir))
    elif command in READ:
        for of_run in [[f"--workdir={workdir}", *rest] for workdir in workdirs] or [[*words]]:
            wanted = READ[command](of_run)
            if isinstance(wanted, ToEvaluate) and is_early(wanted.config.data.manifest):
                in_split(listed_rows(wanted.config)[0], wanted.split)
            if isinstance(wanted, ToPredict) and wanted.manifest and is_early(wanted.manifest):
                listed_cases(wanted.manifest)
            if not any(wanted.workdir.glob("checkpoints/*/*")):
                raise InputError(f"{wanted.workdir}: no stage has a checkpoint: train it: {resuming(wanted.workdir)}")


def is_early(manifest: str) -> bool:
    """Whether a manifest is read before JAX is imported, and again afterwards. A pipe gives its text only once."""
    path = Path(manifest)
    return not path.exists() or not (path.is_fifo() or path.stat().st_size > EARLY)


def refuse_training(words: Sequence[str]) -> None:
    """Raises InputError for what is wrong with the words of `jmae train`."""
    config, flags = recipe.parse(words, "", *TRAIN)
    if "show" in flags:
        recipe.explained(config, flags["show"].replace("true", ""))
    else:
        recipe.check(config)
        if not recipe.typed("dry-run", flags.get("dry-run", "false"), False):
            output_folder(flags.get("workdir", f"runs/{config.system}"), "run")
        if is_early(config.data.manifest):
            listed_rows(config)


class ToEvaluate(NamedTuple):
    """What `jmae evaluate` is asked for. `manifest` is "" for that of the run. `of_run`: neither --manifest nor
    --config.* is given. `allow`: rows that the run has seen are scored, too."""

    config: ConfigDict
    workdir: Path
    split: str
    out: Path
    manifest: str
    of_run: bool
    allow: bool


def evaluation_request(words: Sequence[str], usage: str = "") -> ToEvaluate:
    """What the words of `jmae evaluate` ask for; raises InputError for what is wrong."""
    flags = recipe.arguments(words, usage, ["workdir", "manifest", "split", "out", "config"])
    of_run = "manifest" not in flags and not any(flag.startswith("config") for flag in flags)
    if ALLOW in flags and "manifest" not in flags:
        raise InputError(f"--{ALLOW} goes with --manifest: the run's own manifest was checked when the run was trained")
    allow = recipe.typed(ALLOW, flags.pop(ALLOW, "false"), False)
    workdir, config = run_of(flags)
    split, manifest = flags.get("split", "test"), flags.get("manifest", "")
    if not of_run and "out" not in flags:
        what = "--manifest" if "manifest" in flags else "--config.evaluation.KEY"
        raise InputError(f"{what} goes with --out=DIR: the run's own evaluation stays as it is")
    if "manifest" in flags:
        config.data.manifest = manifest
        # The recipe's values hold for the training data alone.
        neutral = {"anomaly_ratio": -1.0, "unlabeled_size": 0, "unlabeled_labels": "", "calibration": 0.0}
        neutral["allow_leaks"] = allow
        config.data.update({key: value for key, value in neutral.items() if key in config.data})
    elif (gone := config.data.manifest) and not os.path.exists(gone):
        moved = f"{resuming(workdir)} --config.data.manifest=MANIFEST.csv"
        scans = "if the scans were moved, too, write it anew first (jmae prepare)"
        raise InputError(f"{gone}: not found: if it was moved, tell the run its new place: {moved}; {scans}")
    out = workdir / ("evaluation" if split == "test" else f"evaluation-{split}")
    out = output_folder(flags.get("out", out), "evaluation")
    return ToEvaluate(config, workdir, split, out, manifest, of_run, allow)


class ToPredict(NamedTuple):
    """What `jmae predict` is asked for: the names of scans, or a manifest of cases; the other is empty. `further`: the
    predictions are added to those that `out` has."""

    config: ConfigDict
    workdir: Path
    out: Path
    names: list[str]
    manifest: str
    further: bool


def prediction_request(words: Sequence[str], usage: str = "") -> ToPredict:
    """What the words of `jmae predict` ask for, of one run; raises InputError for what is wrong."""
    further, words = "--continue" in words, [word for word in words if word != "--continue"]
    names, flags = recipe.command(words, usage, PREDICT)
    if "out" not in flags:
        raise InputError("no --out: name a folder for maps and scores: jmae predict --workdir DIR --out DIR SCAN")
    if bool(names) == ("manifest" in flags):
        wrong = "both scans and --manifest: give one of them" if names else "no scans: name files or folders of scans"
        raise InputError(
            f"{wrong}: jmae predict --workdir DIR --out DIR SCAN, or --manifest CASES.csv in place of SCAN"
        )
    out = output_folder(flags["out"], "predictions")
    workdir, config = run_of(flags)
    refuse_missing([path for name in names for path in sequences(name)])
    return ToPredict(config, workdir, out, names, flags.get("manifest", ""), further)


def listed_cases(manifest: str) -> list[Row]:
    """The cases of `jmae predict --manifest`; raises InputError for what is wrong, also where a file is not there."""
    rows = read_cases(manifest, NEW)
    refuse_missing([path for row in rows for path in (*row.image, row.region) if path])
    return rows


def refuse_missing(paths: Sequence[str]) -> None:
    """Raises InputError where the path of a file is not there, before anything is written."""
    if gone := [path for path in paths if not path.startswith(PHANTOM) and not os.path.exists(path)]:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise InputError(f"{gone[0]}: not found{more}: check the path")


class ToExport(NamedTuple):
    """What `jmae export` is asked for; what is not given is empty."""

    config: ConfigDict
    workdir: Path
    out: Path
    platforms: tuple[str, ...]
    batch: int
    size: tuple[int, ...]
    like: tuple[str, ...]


def export_request(words: Sequence[str], usage: str = "") -> ToExport:
    """What the words of `jmae export` ask for; raises InputError for what is wrong."""
    flags = recipe.arguments(words, usage, ["workdir", "out", "batch", "like", "size", "platforms", "config"])
    if missing := [name for name in ("workdir", "out") if name not in flags]:
        raise InputError(f"no --{missing[0]}: write --workdir=DIR --out=DIR")
    workdir, config = run_of(flags)
    out = Path(flags["out"]).absolute()
    if out.exists() and (not out.is_dir() or any(path.name != UNFINISHED for path in out.iterdir())):
        raise InputError(f"{out}: is there already and not an empty folder: choose another --out")
    platforms = tuple(flags["platforms"].split(",")) if "platforms" in flags else ()
    if wrong := [name for name in platforms if name not in PLATFORMS]:
        raise InputError(f"--platforms: {wrong[0]!r} is none of {', '.join(PLATFORMS)}")
    numbers = {name: whole(name, flags[name]) for name in ("batch", "size") if name in flags}
    if len(numbers.get("batch", (1,))) > 1:
        raise InputError(f"--batch={flags['batch']}: one number")
    like = sequences(flags["like"]) if "like" in flags else ()
    return ToExport(config, workdir, out, platforms, sum(numbers.get("batch", ())), numbers.get("size", ()), like)


def whole(name: str, text: str) -> tuple[int, ...]:
    """A flag's numbers, separated by commas; raises InputError where they are not whole and above 0."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--{name}={text}: whole numbers above 0, separated by commas")
    return tuple(map(int, parts))


def run_of(flags: dict[str, str]) -> tuple[Path, ConfigDict]:
    """The run folder that `--workdir` names, and its recipe with the changes of `--config.evaluation.KEY`.

    Raises:
      InputError: no --workdir, or a change of another section of the recipe.
    """
    if "workdir" not in flags:
        raise InputError("no run folder: write --workdir=DIR")
    workdir = Path(flags["workdir"])
    config = recipe.read(workdir)
    if other := [flag for flag in flags if flag.startswith("config") and not flag.startswith("config.evaluation.")]:
        known = other[0].removeprefix("config.") in dict(recipe.keys_of(config))
        what = "is fixed by the training" if known else "is unknown"
        raise InputError(f"--{other[0]} {what}: only --config.evaluation.KEY=VALUE can change a run's recipe")
    recipe.override(config, flags, "evaluation.")
    recipe.check(config)
    return workdir, config


READ: dict[str, Callable[[Sequence[str]], ToEvaluate | ToPredict | ToExport]] = {
    "evaluate": evaluation_request,
    "predict": prediction_request,
    "export": export_request,
}
"""The function that reads the words of a command with a trained run."""
