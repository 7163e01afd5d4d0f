"""What a training would do, told from the manifest alone: no image is opened."""

import math
import runpy
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import SPLITS, Row, summary
from jmae.data.rows import listed_rows
from jmae.report.words import MINUTES, share_of_small
from jmae.run_folder import FREE
from jmae.system import Stage, load_system, nothing_to_train_on, rows_read
from jmae.tables import counted

TIMED = ("small", "small3d", "small_colour")  # the presets that this holds for
CHEAP = (*FREE, "seed", "budget", "data.phantom", "data.calibration", "data.channels")  # keys that cost no time


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
    for stage, n, steps in stage_plans(system.stages, read):
        if not n:
            raise nothing_to_train_on(stage, config)
        lines.append(f"{stage.name:<12}{n:>8}{stage.batch:>10}{steps:>9}")
    lines += ["", training_line(config, system.stages, read)]
    note = "A stage may train on fewer images: some choose its weights, or an earlier stage leaves some out."
    lines += [note, "No image was opened (jmae check MANIFEST.csv opens all), nothing was trained."]
    return "\n".join(lines)


def stage_plans(stages: Sequence[Stage], rows: Sequence[Row]) -> Iterator[tuple[Stage, int, int]]:
    """Each stage, how many images it takes from `rows`, and its steps, as far as these can be told before the
    training."""
    for stage in stages:
        try:
            n = len(stage.rows(rows, {}))
        except (LookupError, TypeError, AttributeError):  # it needs an earlier stage's result, which is not there yet
            n = sum(row.split in stage.splits for row in rows)
        yield stage, n, max(1, round(stage.steps(n))) if n else 0


def training_line(config: ConfigDict, stages: Sequence[Stage], rows: Sequence[Row]) -> str:
    """How many stages and steps a training has, and how long it takes where that is known."""
    steps = sum(steps for *_, steps in stage_plans(stages, rows))
    what = f"training: {counted(len(stages), 'stages')}, {steps} steps in all"
    if not like_small(config):
        return f"{what}; the first steps of each stage show how long it takes"
    minutes = math.ceil(MINUTES * share_of_small(config))
    return f"{what}; up to about {counted(minutes, 'minutes')} on two idle CPU cores, and more to read and to score"


def like_small(config: ConfigDict) -> bool:
    """Whether a step costs what it costs in one of the presets `TIMED`."""
    if config.system not in recipe.SYSTEMS:
        return False
    presets = runpy.run_path(str(recipe.RECIPES / f"{config.system}.py"))["PRESETS"]
    cheap = lambda key: key in CHEAP or key.startswith("evaluation.")
    steps = lambda key, value: value > 0 if key.endswith(".steps") else value  # `share_of_small` compares their numbers
    costly = lambda of: {key: steps(key, value) for key, value in recipe.keys_of(of) if not cheap(key)}
    timed = [recipe.preset(config.system, presets, name) for name in TIMED if name in presets]
    return costly(config) in map(costly, timed)
