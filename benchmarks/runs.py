"""Trainings of several settings, budgets and seeds: each is a result of its own, and what is there is not run again."""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps import train_run
from benchmarks.timing import write

SEEDS = (0, 1, 2)
KEPT = ("image", "pixel", "scores", "baselines", "decision", "seconds_per_case")  # of metrics.json


def key_of(what: str, name: str, budget: float, seed: int) -> str:
    """The name of a result."""
    return f"{what}, {name}, budget {budget:g}, seed {seed}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script that trains settings."""
    parser.add_argument("--only", nargs="+", default=[], help="names of settings")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--budget", type=float, default=1.0, help="factor of the recipe's steps")
    parser.add_argument("--again", action="store_true", help="run what has a result, too")


def pack(name: str) -> Path | None:
    """The folder of a pack of images; None, said aloud, where it is not there."""
    folder = Path(os.environ.get("JMAE_DATA", "")) / name
    if os.environ.get("JMAE_DATA") and (folder / "manifest.csv").is_file():
        return folder
    print(f"not run: {folder / 'manifest.csv'} is not there; set JMAE_DATA to the folder of the packs")
    return None


def trained(
    results: Path,
    what: str,
    settings: Mapping[str, Sequence[str]],
    options: argparse.Namespace,
    *,
    folder: Path,
    extra: Callable[[Path], Mapping[str, Any]] = lambda folder: {},
) -> dict[str, list[dict[str, Any]]]:
    """The results of each setting, one of each seed; what is missing is trained and written.

    A run that was stopped goes on where it was.

    Args:
      results: file of the results.
      what: name of the experiment.
      settings: arguments of `jmae.train` by the setting's name.
      options: as `add_options` has them.
      folder: of the runs.
      extra: (run folder) -> further figures of a result.
    """
    if wrong := [name for name in options.only if name not in settings]:
        sys.exit(f"--only {wrong[0]}: is no setting of {what}: {', '.join(settings)}")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, arguments in settings.items():
        if options.only and name not in options.only:
            continue
        for seed in options.seeds:
            key = key_of(what, name, options.budget, seed)
            there = json.loads(results.read_text()) if results.exists() else {}
            if key not in there or options.again:
                own = [*arguments, f"--config.budget={options.budget:g}", f"--config.seed={seed}"]
                run = folder / key.replace(", ", "-").replace(" ", "-").replace("/", "-")
                seconds = train_run(own, run)["wall_seconds"]
                metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
                result = {name: metrics.get(name) for name in KEPT} | {"wall_seconds": seconds, "arguments": own}
                write(results, key, without_curves(result | dict(extra(run))))
                there = json.loads(results.read_text())
            found.setdefault(name, []).append(there[key])
    return found


def without_curves(value: Any) -> Any:
    """A result without the points of its curves and the figures of groups."""
    if isinstance(value, dict):
        dropped = ("curve", "per_patient", "oracle_groups", "normals_groups")
        return {k: without_curves(v) for k, v in value.items() if k not in dropped}
    return value


def over_seeds(results: Sequence[Mapping[str, Any]], *path: str) -> str:
    """A figure of the results as "mean +- deviation of the seeds"; "" where it is not there."""
    values = []
    for result in results:
        value: Any = result
        for name in path:
            value = (value or {}).get(name)
        if value is None:
            return ""
        values.append(value)
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
