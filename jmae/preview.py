"""What a training would do, told from the manifest alone: no image is opened."""

import math
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data import phantoms
from jmae.data.cases import kept_apart
from jmae.data.manifest import LEAKS, SPLITS, Row, parse_manifest, summary
from jmae.errors import InputError
from jmae.report.words import share_of_small
from jmae.system import Stage, load_system, nothing_to_train_on, rows_read
from jmae.tables import counted

MINUTES = 15  # the longest training of a preset `small` with all steps, on two idle CPU cores
TIMED = ("small", "small3d", "small_colour")  # the presets that this holds for
COSTLY = ("model.", "data.size", "variant")  # keys that change what a step costs, beside the batches


def preview(config: ConfigDict) -> str:
    """Two tables: the cases of each split, and images, batch and steps of each stage."""
    system = load_system(config)
    rows, ignored = listed_rows(config)
    read = rows_read(system, rows)
    lines = [f"{config.data.manifest or f'phantoms {config.data.phantom}'}: {summary(rows, ignored)}", ""]
    lines += [f"{'split':<12}{'normal':>8}{'abnormal':>10}{'unknown':>9}"]
    for split in SPLITS:
        counts = [sum(row.split == split and row.label == label for row in rows) for label in (0, 1, None)]
        if any(counts):
            lines.append("{:<12}{:>8}{:>10}{:>9}".format(split, *counts))
    lines += ["", f"{'stage':<12}{'images':>8}{'batch':>10}{'steps':>9}"]
    for stage, n, steps in planned(config, system.stages, read):
        lines.append(f"{stage.name:<12}{n:>8}{stage.batch:>10}{steps:>9}")
    lines += ["", training_line(config, system.stages, read)]
    note = (
        "A stage may keep images back to choose its weights. It takes fewer images where an earlier stage selects them."
    )
    lines += [note, "No image was opened (jmae check MANIFEST.csv opens all), nothing was trained."]
    return "\n".join(lines)


def planned(config: ConfigDict, stages: Sequence[Stage], rows: Sequence[Row]) -> Iterator[tuple[Stage, int, int]]:
    """Each stage, how many images it takes from `rows`, and its steps. Raises InputError where it takes none."""
    for stage in stages:
        try:
            n = len(stage.rows(rows, {}))
        except KeyError:  # an earlier stage's result chooses among the rows
            n = sum(row.split in stage.splits for row in rows)
        if not n:
            raise nothing_to_train_on(stage, config)
        yield stage, n, max(1, round(stage.steps(n)))


def training_line(config: ConfigDict, stages: Sequence[Stage], rows: Sequence[Row]) -> str:
    """How many stages and steps a training has, and how long it takes where that is known."""
    steps = sum(steps for *_, steps in planned(config, stages, rows))
    what = f"training: {counted(len(stages), 'stages')}, {steps} steps in all"
    if not like_small(config):
        return f"{what}; the first steps of each stage show how long it takes"
    minutes = math.ceil(MINUTES * share_of_small(config))
    return f"{what}; up to about {counted(minutes, 'minutes')} on two idle CPU cores, without reading and scoring"


def like_small(config: ConfigDict) -> bool:
    """Whether a step costs what it costs in one of the presets `TIMED`."""
    if config.system not in recipe.SYSTEMS:
        return False
    presets = runpy.run_path(str(recipe.RECIPES / f"{config.system}.py"))["PRESETS"]
    costly = lambda of: {k: v for k, v in recipe.keys_of(of) if k.startswith(COSTLY) or k.endswith(".batch")}
    timed = [recipe.preset(config.system, presets, name) for name in TIMED if name in presets]
    return costly(config) in map(costly, timed)


def listed_rows(config: ConfigDict) -> tuple[list[Row], dict[str, int]]:
    """(rows, what was ignored) of the phantom set or the manifest that `config.data` names, no file opened.

    Raises InputError where there is neither, or where the manifest has problems.
    """
    data, volumes = config.data, recipe.is_volume(config)
    if data.manifest:
        normal_crops_only = volumes and data.normal_crops_only
        allow = LEAKS if data.allow_leaks else ()
        file = Path(data.manifest)
        rows, ignored, problems = parse_manifest(file, crops=volumes, normal_crops_only=normal_crops_only, allow=allow)
        if problems:
            raise InputError("\n".join(problems))
    elif data.phantom:
        rows, ignored = phantoms.rows(data.phantom), {}
    else:
        raise InputError("no data: set --config.data.manifest=MANIFEST.csv, or data.phantom")
    return (kept_apart(rows, data.calibration) if data.calibration else rows), ignored
