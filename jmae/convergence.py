"""How many random masks, samples or sweeps a score needs: its AUROC against their number, with its standard error.

`evaluation.convergence=R` scores the labelled cases R more times with every number 1, 2, 4, ... up to the recipe's,
each time with other masks. A score that is a mean over its masks is computed once a mask and averaged here, in one
program; of another, as AMAE's Eq. 4, every number is a program of its own. Sweeps over volumes are a number that one
program is given. Cost beside the evaluation: of the first R times its scoring, of the others up to 2 R times.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jmae import metrics
from jmae.data.loader import Images, case_words, prepared
from jmae.data.manifest import Row
from jmae.inference import SECONDS_BETWEEN_LINES, ahead, scorer, sweeper
from jmae.run_folder import log
from jmae.scoring import top_mean
from jmae.system import Results, System, drawn, load_system

CLOSE = 0.01  # of AUROC: what one evaluation may differ by

Draws = Mapping[int, Sequence[Float[np.ndarray, "r n"]]]  # by number: a draw's primary scores of r replicates, n cases


def convergence(config: ConfigDict, system: System, results: Results, rows: Sequence[Row]) -> dict[str, Any] | None:
    """{"what", "draws", "steps", "enough", "close", "rising", "seconds"} of labelled rows: "steps" by `summary`,
    "enough" by `enough`, "rising" whether the AUROC rose from the last number but one by more than two standard
    errors. None where a class is missing, said aloud."""
    labels = np.array([row.label for row in rows])
    if set(labels) != {0, 1}:
        log("evaluation.convergence: the labelled cases are of one class: no AUROC, so not computed")
        return None
    began = time.monotonic()
    what, most = system.repetitions, drawn(config, system)
    numbers = [*(2**i for i in range((most - 1).bit_length())), most]
    log(f"convergence: {len(rows)} cases, {', '.join(map(str, numbers))} {what}, {config.evaluation.convergence} times")
    make = volume_draws if system.sweep else image_draws
    steps = summary(labels, make(config, system, results, rows, what, numbers))
    last, before = steps[-1], steps[-2]
    rise = last["auroc"] - before["auroc"]
    return {
        "what": what,
        "draws": config.evaluation.convergence,
        "steps": steps,
        "enough": enough(steps),
        "close": CLOSE,
        "rising": bool(rise > 2 * math.hypot(last["se"], before["se"])),
        "seconds": time.monotonic() - began,
    }


def summary(labels: np.ndarray, draws: Draws) -> list[dict[str, Any]]:
    """A line a number: mean AUROC over its draws (each a mean over replicates), the deviation of one draw, the standard
    error of the mean, how many draws."""
    steps = []
    for number, each in draws.items():
        values = np.array([np.mean([metrics.auroc(labels, scores) for scores in draw]) for draw in each])
        deviation = float(values.std(ddof=1))
        line = {"number": number, "auroc": float(values.mean()), "se": deviation / math.sqrt(len(values))}
        steps.append(line | {"deviation": deviation, "draws": len(values)})
    return steps


def enough(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """The least number from which on one evaluation lies within `CLOSE` of the mean at the last: the difference of the
    means and two deviations of a draw together; None where not even the last does."""
    found = None
    for step in reversed(steps):
        if abs(step["auroc"] - steps[-1]["auroc"]) + 2 * step["deviation"] > CLOSE:
            break
        found = step["number"]
    return found


def with_number(config: ConfigDict, what: str, number: int) -> tuple[ConfigDict, System]:
    """The recipe and its system with another number of masks, samples or sweeps."""
    other = config.copy_and_resolve_references()
    other.evaluation.update({what: number, "convergence": 0})
    return other, load_system(other)


def image_draws(
    config: ConfigDict, system: System, results: Results, rows: Sequence[Row], what: str, numbers: Sequence[int]
) -> Draws:
    """Scores of images; a case's masks in draw d come from its id and d."""
    images, index, times = Images(rows, config), np.arange(len(rows)), config.evaluation.convergence
    said = time.monotonic()

    def draw(score: Any, d: int, of: int) -> Float[np.ndarray, "r n"]:
        nonlocal said
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log(f"{d} of {of} times")
        other = copy.copy(images)
        other.words = np.stack([case_words(f"{row.id}\ndraw {d}") for row in rows])
        return score(other, index).scores[system.primary]

    if not system.averaged:
        scorers = {n: scorer(*with_number(config, what, n), results) for n in numbers}
        return {n: [draw(score, d, times) for d in range(times)] for n, score in scorers.items()}
    single, total = scorer(*with_number(config, what, 1), results), times * numbers[-1]
    each = np.stack([draw(single, d, total) for d in range(total)])
    return {n: [each[i : i + n].mean(0) for i in range(0, total - n + 1, n)] for n in numbers}


def volume_draws(
    config: ConfigDict, system: System, results: Results, rows: Sequence[Row], what: str, numbers: Sequence[int]
) -> Draws:
    """Scores of volumes as `inference.volume_results` has them; sweeps of one mask or sample each."""
    single = with_number(config, what, 1)[1]
    assert single.sweep
    run, times, said = sweeper(config, single.sweep, results), config.evaluation.convergence, time.monotonic()
    scores: dict[int, list[list[list[float]]]] = {n: [[] for _ in range(times)] for n in numbers}
    for i, (row, volume) in enumerate(zip(rows, ahead(partial(prepared, data=config.data), rows), strict=True)):
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log(f"{i} of {len(rows)} volumes")
        top = lambda m, region=volume.region: top_mean(m, region, config.evaluation.top)
        for n in numbers:
            for d in range(times):
                maps = run(volume, case_words(f"{row.id}\ndraw {d}"), repeats=n)["maps"][system.primary]
                scores[n][d].append([top(m) for m in maps])
    return {n: [np.array(draw).T for draw in each] for n, each in scores.items()}
