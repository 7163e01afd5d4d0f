"""Checks the guarantee of the p-values on normal phantoms that a trained run scores.

    python -m benchmarks.coverage                                  # trains configs/memmc_mae.py:smoke first
    python -m benchmarks.coverage --run RUN                        # uses a run on the phantoms `chest`
    python -m benchmarks.coverage --draws 20 --tests 200           # quicker
    python -m benchmarks.coverage --expect position --draws 100 --tests 40   # an expectation is fitted for each set

1000 normals are judged with 200 calibration sets of 60 normals each. All phantoms are different, and none was used for
training. With --expect the score is `evaluation.residual=smoothed` over what held-out normals have on average
(`jmae.residuals`). Each calibration set then comes with as many further normals, and the expectation is fitted to
these: a run fits it to one half of its held-out normals, and the other half calibrates. Each set then judges normals of
its own.

`jmae.p_values.Calibration` guarantees that the share b = floor(a (n + 1)) / (n + 1) of normals has a p-value of at most
a, on average over draws. With D sets, and T test normals in all, the Monte-Carlo error of this average is the root of
b (1 - b) / (n + 2) / D + b (1 - b) / T. The factor of 1 / D is the variance of Beta(k, n + 1 - k) with
k = floor(a (n + 1)). With the first set, `jmae.predict` must give the same p-values to the last bit.

Prints a table and writes benchmarks/results/coverage.json. Exit code 1: a share differs by more than three errors.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from math import floor, sqrt
from pathlib import Path

import numpy as np
from scipy.stats import beta

from benchmarks.timing import table, write
from jmae import predict, recipe
from jmae.data import phantoms
from jmae.data.files import Image
from jmae.data.preparation import Prepared
from jmae.fitting import finished, measuring, placed
from jmae.inference import Scorer, restore_stages
from jmae.inputs import row_of
from jmae.p_values import Calibration, p_values
from jmae.results import Result

RESULTS = Path(__file__).parent / "results" / "coverage.json"
RATES = (0.05, 0.1, 0.2)


def drawn(run: predict.Run, label: int, numbers: Iterable[int]) -> list[Prepared]:
    """The prepared phantoms of a label with these numbers."""
    cases = []
    for i in numbers:
        row = row_of(f"coverage-{label}-{i}", ("phantom",))
        phantom = phantoms.chest(phantoms.generator("coverage", label, row.id), label)
        cases.append(run.scorer.prepare(row, Image(phantom.image, phantom.spacing, None, 8)))
    return cases


def scored(scorer: Scorer, cases: Sequence[Prepared]) -> list[Result]:
    """The results of cases, as many at once as the pass takes."""
    starts = range(0, len(cases), scorer.at_once)
    return [result for k in starts for result in scorer.score(cases[k : k + scorer.at_once])]


def primary(run: predict.Run, results: Sequence[Result]) -> np.ndarray:
    """The primary scores of results."""
    return np.array([predict.checked_line(run, result.case.row, result)["score"] for result in results])


def fitter(run: predict.Run, workdir: Path) -> Callable[[Sequence[Prepared]], Scorer]:
    """A function from normals to the run's scorer with its expectation fitted to them."""
    config, system, stages = run.config, run.system, restore_stages(run.config, run.system, workdir)
    measure = {fit.name: Scorer(config, measuring(system, fit), stages) for fit in system.fits}

    def fit_to(cases: Sequence[Prepared]) -> Scorer:
        trees = {fit.name: finished(config, system, fit, scored(measure[fit.name], cases)) for fit in system.fits}
        return run.scorer.with_results({**stages, **{name: placed(tree) for name, tree in trees.items()}})

    return fit_to


def judged(run: predict.Run, workdir: Path, n: int, draws: int, tests: int) -> tuple[list[np.ndarray], ...]:
    """(p-values of `tests` normals, p-values of as many abnormal phantoms) by each of `draws` sets of n normals.

    Where an expectation is fitted, each set has its own normals and abnormal phantoms to judge, else all have the same.
    """
    fit_to, said, numbers = fitter(run, workdir), time.monotonic(), count()
    take = lambda k: [next(numbers) for _ in range(k)]
    of_normals, of_abnormal = [], []
    for number in range(draws):
        if run.system.fits or not number:
            test = take(tests)
        own = take(n)
        if run.system.fits:
            run = run._replace(scorer=fit_to(drawn(run, 0, take(n))))
        if run.system.fits or not number:
            results, high = (
                scored(run.scorer, drawn(run, 0, test)),
                primary(run, scored(run.scorer, drawn(run, 1, test))),
            )
            low = primary(run, results)
        normals = primary(run, scored(run.scorer, drawn(run, 0, own)))
        of_normals.append(p_values(normals, low))
        of_abnormal.append(p_values(normals, high))
        if not number:
            first = run._replace(calibration=Calibration({f"normal {i}": float(s) for i, s in enumerate(normals)}))
            if [predict.checked_line(first, r.case.row, r)["p_value"] for r in results] != of_normals[0].tolist():
                raise SystemExit("jmae.predict and jmae.p_values give different p-values: one of them is wrong")
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{number + 1} of {draws} sets", file=sys.stderr, flush=True)
    return of_normals, of_abnormal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--normals", type=int, default=60, help="normals of one calibration set")
    parser.add_argument("--tests", type=int, default=1000)
    parser.add_argument("--expect", choices=("none", "position", "appearance"), default="none")
    arguments = parser.parse_args()
    n, draws, tests, expect = arguments.normals, arguments.draws, arguments.tests, arguments.expect
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is None:
            words = ["--config=configs/memmc_mae.py:smoke", f"--workdir={folder}/run"]
            if expect != "none":
                words += ["--config.evaluation.residual=smoothed", f"--config.evaluation.expect={expect}"]
            subprocess.run([sys.executable, "-m", "jmae.train", *words], check=True)
        workdir = arguments.run or Path(folder) / "run"
        run = predict.open_run(workdir, recipe.read(workdir))
        if (fitted := run.config.evaluation.get("expect", "none")) != expect:
            raise SystemExit(f"{workdir}: evaluation.expect is {fitted}: name it as --expect")
        of_normals, of_abnormal = judged(run, workdir, n, draws, tests)
    judgements = tests * draws if run.system.fits else tests  # of different normals
    rows, result, far = [], {}, False
    for rate in RATES:
        k = floor(round(rate * (n + 1), 9))
        promised = k / (n + 1)
        each = np.array([(p <= rate).mean() for p in of_normals])
        power = float(np.mean([(p <= rate).mean() for p in of_abnormal]))
        error = sqrt(promised * (1 - promised) * (1 / (n + 2) / draws + 1 / judgements))
        got, ends = float(each.mean()), [float(x) for x in np.quantile(each, (0.05, 0.95))]
        known = [float(x) for x in beta.ppf((0.05, 0.95), k, n + 1 - k)]
        far |= abs(got - promised) > 3 * error
        rows.append((rate, promised, got, error, *ends, *known, power))
        result[str(rate)] = {
            "promised": promised,
            "false_alarms": got,
            "monte_carlo_error": error,
            "of_single_sets": {"5%": ends[0], "95%": ends[1], "beta": known},
            "abnormal": power,
        }
    names = "level promised found error 5%-set 95%-set beta-5% beta-95% abnormal".split()
    print(table(tuple(names), rows))
    about = {"system": run.system.name, "expect": expect, "normals": n, "draws": draws, "tests": tests, "rates": result}
    name = f"{run.system.name}, {n} normals" + (f", expectation by {expect}" if expect != "none" else "")
    write(RESULTS, name, about)
    return int(far)


if __name__ == "__main__":
    sys.exit(main())
