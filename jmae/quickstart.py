"""python -m jmae.quickstart NORMALS NEW [--budget 0.25] [--out quickstart] [--config NAME[:PRESET]]
                         [--config.KEY=VALUE ...] [--debug]

Makes a report from two folders. NORMALS holds normal scans to train on, NEW the scans to look at: images, volumes, or
folders of DICOM series. The command finds out whether the scans are images or volumes, chooses a system for them and
says why. It then prints and runs three commands. --out gets data/ (the manifest) and run/ (the run). The folder
run/evaluation gets report.html, scores.csv and the maps. The same command goes on where it was interrupted.
Before the training it says how long all this may take.

--budget  Factor of the steps of the training. 0.25 gives a first impression; 1 is what the recipe was made for.
--config  Your own choice of a recipe; --config.KEY=VALUE changes a key of the training.

Exit codes: 0 done; 2 the input or the environment is wrong; 3, 130 and 143 as of `jmae train`.
"""

import importlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data import prepare
from jmae.data.manifest import Finding, Row, first, parse_manifest
from jmae.data.prepare import folders
from jmae.data.prepare.overview import (
    CHOOSE,
    calibration_share,
    one_rank,
    read_kinds,
    too_few_to_learn,
)
from jmae.data.rows import ManifestError
from jmae.errors import InputError, exit_code
from jmae.report.words import MINUTES
from jmae.run_folder import fixed, log, output_folder
from jmae.tables import counted


def prepare_data(argv: list[str]) -> int:
    """`jmae prepare` without its advice, which quickstart follows."""
    found, _ = prepare.written(argv)
    print(found)
    return 0


def heavy(command: str) -> Callable[[list[str]], int]:
    """A command whose module is imported when the command is run, as JAX takes seconds to import."""
    return lambda argv: importlib.import_module(f"jmae.{command}").main(argv)


RUN = {"prepare": prepare_data, "train": heavy("train"), "evaluate": heavy("evaluate")}

MINUTES_BESIDE = {"images": 2, "volumes": 5}  # mostly for compilation, by docs/results/speed.md
MOVED = 5  # files of one patient that are named
A_MINUTE = {"images": 300, "volumes": 20}  # scans that are read and scored in a minute, or more


def main(argv: list[str]) -> int:
    names, flags = recipe.command(argv, __doc__, ["budget", "out", "config"])
    if len(names) != 2:
        raise InputError("name a folder of normal scans and one of new scans: jmae quickstart NORMALS NEW")
    budget = flags.pop("budget", "0.25")
    if wrong := recipe.SHARED["budget"].wrong(recipe.typed("budget", budget, 0.25), 2):
        raise InputError(f"--budget={budget} is not {wrong}: write 0.25 for a first impression, 1 for a whole training")
    out, (normals, new) = output_folder(flags.pop("out", "quickstart"), "quickstart"), names
    rows = folders.prepare(None, out, 0, normal=normals, test=new).rows
    kind = one_rank(rows, read_kinds(rows))
    made = manifest_of(out, rows, f"{normals} and {new}")
    name, why = recipe.suggested(kind)
    chosen = flags.pop("config", "")
    log(f"{counted(len(rows), kind)}: {f'{chosen}, as you chose' if chosen else f'{name}:small ({why}; {CHOOSE})'}")
    share = f"{calibration_share(rows):g}"
    given = {"config": chosen or f"{name}:small", "config.data.manifest": str(made)}
    given |= {"config.data.calibration": share, "config.budget": budget}
    given |= {"config.data.channels": "1"} if kind == "volumes" else {}
    if few := too_few_to_learn(rows):
        log(few)
    run = out / "run"
    settings = [f"--{flag}={value}" for flag, value in (given | flags).items()]
    recipe.check(config := recipe.parse(settings, "")[0])
    refuse_other_settings(run, config)
    log(time_line(run, given["config"], kind, config.budget, len(rows)))
    commands = [
        ["prepare", "folders", "--normal", normals, "--test", new, "--out", str(out / "data")],
        ["train", *settings, "--workdir", str(run)],
        ["evaluate", "--workdir", str(run)],
    ]
    log("\n".join(["this stands for three commands:", *(f"  {in_shell(words)}" for words in commands), ""]))
    for words in commands:
        if words[0] == "prepare" and made.exists():
            log(f"{made}: is there already")
            continue
        log(f"$ {in_shell(words)}")
        try:
            code = RUN[words[0]](words[1:])
        except ManifestError as error:
            raise InputError("\n".join([*error.problems, *first([*map(move_out, error.leaks)])])) from None
        if code:
            return code
    log(f"{run / 'evaluation' / 'report.html'}: the new scans, from the most to the least suspicious")
    more = [f"--config={chosen.replace(':smoke', ':small')}"] * bool(chosen) + [
        f"--{flag}={value}" for flag, value in flags.items()
    ]
    longer = in_shell(["quickstart", *names, *more, "--budget", "1", "--out", f"{out}-longer"])
    log(f"next: open it; a longer training: {longer}")
    return 0


def refuse_other_settings(run: Path, config: ConfigDict) -> None:
    """Raises InputError where the run has begun with another budget or recipe."""
    if not (run / "config.json").exists():
        return
    if (before := recipe.read(run)).budget != config.budget:
        raise InputError(f"{run}: began with --budget={before.budget:g}: give this budget, or name another --out")
    if fixed(before) != fixed(config):
        what = f"began with other settings (system {before.system})"
        raise InputError(f"{run}: {what}: give the same --config and --config.KEY, or name another --out")


def move_out(leak: Finding) -> str:
    """A leak with a remedy that lasts: a row that is deleted from the manifest comes back from the folders."""
    of_new = [row.image[0] for row in leak.rows if row.split == "test"] or [leak.rows[-1].image[0]]
    more = f" and {len(of_new) - MOVED} more" if len(of_new) > MOVED else ""
    again = "then give the same command again, or add --config.data.allow_leaks=True"
    return f"{leak.what.rpartition(': ')[0]}: move {', '.join(of_new[:MOVED])}{more} to another folder, {again}"


def time_line(run: Path, config: str, kind: str, budget: float, scans: int) -> str:
    """How long the commands take, or that there is nothing left to train. `config` is SYSTEM:PRESET; `kind` is "images"
    or "volumes"."""
    if (run / "evaluation" / "report.html").exists():
        return f"{run}: has a report: a finished training is not repeated, and the new scans are scored again"
    if not config.endswith(":small"):
        return "time: the log of the training says how much is left"
    minutes = math.ceil(MINUTES * budget + MINUTES_BESIDE[kind] + scans / A_MINUTE[kind])
    return f"time: up to about {minutes} minutes on two CPU cores; longer if other programs use them"


def manifest_of(out: Path, rows: Sequence[Row], sources: str) -> Path:
    """The place of the manifest. One that lists other scans is renamed while nothing is trained, so that it is written
    anew; afterwards it raises InputError."""
    made = out / "data" / "manifest.csv"
    if made.exists() and files(rows) != files(parse_manifest(made)[0]):
        if any((out / "run" / "checkpoints").glob("*/*")):
            further = f"jmae predict --workdir {shlex.quote(str(out / 'run'))} --out DIR SCAN"
            what = f"lists other scans than {sources} hold: name another --out"
            raise InputError(f"{made}: {what}, or score further scans: {further}")
        before = made.replace(made.with_name("manifest.before.csv"))
        log(f"{made}: listed other scans and is written anew; the old one is {before}")
    return made


def files(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The split and the files of each row."""
    return [(row.split, *map(os.path.abspath, row.image)) for row in rows]


def in_shell(words: Sequence[str]) -> str:
    """A command as it is typed."""
    return f"jmae {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
