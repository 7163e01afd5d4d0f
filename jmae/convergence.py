"""How many random masks, samples or sweeps a score needs: its AUROC against their number, with its standard error.

`evaluation.convergence=R` scores the labelled cases R more times with each number 1, 2, 4, ... up to the recipe's, each
time with other masks. Where the score of an image is a mean over independent masks or samples, one program scores
single ones, and the means are taken here. Masks that all images share come in rounds, whose masks are not independent.
For these, and for another score of images, such as AMAE's Eq. 4, each number has its program. The number of sweeps over
volumes is an argument of one program. The cost is R scorings of the split in the first case, else up to 2 R.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jmae import metrics
from jmae.data.cases import Cases
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.errors import InputError
from jmae.inference import Scorer, prepared_groups
from jmae.results import Result
from jmae.run_folder import log
from jmae.system import Results, System, drawn, load_system
from jmae.tables import counted
from jmae.waiting import at_work

CLOSE = 0.01  # how far the AUROC of one evaluation may be off

Draws = Mapping[
    int, Sequence[Float[np.ndarray, "r n"]]
]  # by number: each draw's primary scores of replicates and cases


class Draw(NamedTuple):
    """One scoring of all cases with masks of its own."""

    number: int  # of masks, samples or sweeps
    name: str  # seeds the masks, so each draw has its own
    scorer: Scorer
    repeats: int | None = None  # sweeps over a volume


def check_processes(config: ConfigDict) -> None:
    """Raises InputError where the evaluation cannot run in as many processes as there are."""
    if config.evaluation.convergence and jax.process_count() > 1:
        raise InputError("evaluation.convergence needs a single process: set it to 0, and evaluate again with one")


def convergence(
    config: ConfigDict,
    system: System,
    results: Results,
    rows: Sequence[Row],
    cases: Cases | None = None,
) -> dict[str, Any] | None:
    """How the AUROC of labelled rows converges; None, and a line in the log, where a class is missing.

    Args:
      rows: labelled rows.
      cases: as of `Scorer`.

    Returns:
      {"what", "draws", "steps", "enough", "close", "rising", "seconds"}: "what" is what is counted; "steps" and
      "enough" come from `summary` and `enough`. "rising" is whether the AUROC rose by more than two standard errors
      from the last number but one to the last.
    """
    labels = np.array([row.label for row in rows])
    if set(labels) != {0, 1}:
        log("evaluation.convergence: the labelled cases are of one class: no AUROC, so not computed")
        return None
    began = time.monotonic()
    what, most = system.repetitions, drawn(config, system)
    numbers = [*(2**i for i in range((most - 1).bit_length())), most]
    sizes, of = ", ".join(map(str, numbers)), counted(len(rows), "cases")
    log(f"convergence: {of}, {sizes} {what}, {config.evaluation.convergence} times")
    draws = planned_draws(config, system, results, what, numbers, cases)
    steps = summary(labels, averaged(draw_scores(system, draws, rows), numbers))
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
    """A line {"number", "auroc", "se", "deviation", "draws"} of each number.

    The AUROC is the mean over draws, each a mean over replicates. "deviation" is that of one draw, "se" the standard
    error of the mean.
    """
    steps = []
    for number, each in draws.items():
        values = np.array([np.mean([metrics.auroc(labels, scores) for scores in draw]) for draw in each])
        deviation = float(values.std(ddof=1))
        line = {"number": number, "auroc": float(values.mean()), "se": deviation / math.sqrt(len(values))}
        steps.append(line | {"deviation": deviation, "draws": len(values)})
    return steps


def enough(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """The least number from which on one evaluation lies within `CLOSE` of the mean at the last number.

    The distance is the difference of the means and two deviations of a draw. None where it is too large even for the
    last number.
    """
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


def planned_draws(
    config: ConfigDict,
    system: System,
    results: Results,
    what: str,
    numbers: Sequence[int],
    cases: Cases | None = None,
) -> list[Draw]:
    """The draws that are scored. Single masks are drawn as often as the largest number needs."""
    times = config.evaluation.convergence
    scorer = lambda number: Scorer(*with_number(config, what, number), results, cases)
    if system.sweep:
        single = scorer(1)
        return [Draw(n, f"draw {d}", single, n) for n in numbers for d in range(times)]
    if system.averaged and not (what == "masks" and config.evaluation.masks_of == "run"):
        single = scorer(1)
        return [Draw(1, f"draw {d}", single) for d in range(times * numbers[-1])]
    return [Draw(n, f"draw {d}", one) for n, one in ((n, scorer(n)) for n in numbers) for d in range(times)]


def draw_scores(
    system: System, draws: Sequence[Draw], rows: Sequence[Row]
) -> dict[int, list[Float[np.ndarray, "r n"]]]:
    """The primary scores of rows in each draw, by the draw's number. Cases are prepared once for all draws."""
    scorer, parts, done = draws[0].scorer, [[] for _ in draws], 0  # type: ignore[var-annotated]
    with at_work(lambda: f"{done} of {counted(len(rows), 'cases')} scored {len(draws)} times"):
        for cases in prepared_groups(scorer, rows):
            for part, results in zip(parts, scored_draws(draws, cases), strict=True):
                part.extend(result.scores[system.primary] for result in results)
            done += len(cases)
    found: dict[int, list[np.ndarray]] = {}
    for draw, part in zip(draws, parts, strict=True):
        found.setdefault(draw.number, []).append(np.stack(part, 1))
    return found


def scored_draws(draws: Sequence[Draw], cases: Sequence[Prepared]) -> Iterator[list[Result]]:
    """The results of cases in each draw. A draw is dispatched before the one before is fetched."""
    waiting = None
    for draw in draws:
        started = draw.scorer.dispatch(cases, draw.name, draw.repeats)
        if waiting:
            yield waiting[0].fetch(waiting[1])
        waiting = draw.scorer, started
    if waiting:
        yield waiting[0].fetch(waiting[1])


def averaged(draws: Draws, numbers: Sequence[int]) -> Draws:
    """The draws of each number. Single masks become means over that number of masks; no mask is in two of these
    means."""
    if set(draws) != {1}:
        return draws
    each = np.stack(draws[1])
    return {n: [each[i : i + n].mean(0) for i in range(0, len(each) - n + 1, n)] for n in numbers}
