"""Checks the guarantee of the p-values on normal phantoms that a trained run scores.

    python -m benchmarks.coverage                                  # trains configs/memmc_mae.py:smoke first
    python -m benchmarks.coverage --run RUN                        # uses a run on the phantoms `chest`
    python -m benchmarks.coverage --draws 20 --tests 200           # quicker

1000 normals are judged with 200 calibration sets of 60 normals each. All phantoms are different, and none was used for
training. `jmae.scoring.Calibration` guarantees that the share b = floor(a (n + 1)) / (n + 1) of normals has a p-value
of at most a, on average over draws. The Monte-Carlo error of this average over D sets and T test normals is the root of
b (1 - b) / (n + 2) / D + b (1 - b) / T. The factor of 1 / D is the variance of Beta(k, n + 1 - k) with
k = floor(a (n + 1)). With the first set, `jmae.predict` must give the same p-values to the last bit.

Prints a table and writes benchmarks/results/coverage.json. Exit code 1: a share differs by more than three errors.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import floor, sqrt
from pathlib import Path

import numpy as np
from scipy.stats import beta

from benchmarks.timing import table, write
from jmae import predict, recipe
from jmae.data import phantoms
from jmae.data.files import Image
from jmae.inference import lookahead
from jmae.scoring import Calibration, p_values

RESULTS = Path(__file__).parent / "results" / "coverage.json"
RATES = (0.05, 0.1, 0.2)


def scores(run: predict.Run, label: int, numbers: range) -> tuple[np.ndarray, list[float | None]]:
    """(primary scores, p-values of `predict`) of the phantoms of a label with these numbers."""
    size, lines = run.at_once, []

    def draw(start: int) -> list[tuple]:
        part = range(start, min(start + size, numbers.stop))
        rows = [predict.row_of(f"coverage-{label}-{i}", ("phantom",)) for i in part]
        draws = [phantoms.chest(phantoms.generator("coverage", label, row.id), label) for row in rows]
        return [(row, run.open(row, Image(d.image, d.spacing, None, 8))) for row, d in zip(rows, draws, strict=True)]

    starts = range(numbers.start, numbers.stop, size)
    for group in with_progress(lookahead(draw, starts), len(numbers), size):
        results = run.score(*map(list, zip(*group, strict=True)))
        lines += [predict.checked_line(run, row, r) for (row, _), r in zip(group, results, strict=True)]
    return np.array([line["score"] for line in lines]), [line["p_value"] for line in lines]


def with_progress(groups: Iterator, n: int, size: int) -> Iterator:
    """Yields the groups, and prints a line every 30 seconds."""
    last = time.monotonic()
    for number, group in enumerate(groups):
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{number * size} of {n} phantoms", file=sys.stderr, flush=True)
        yield group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--normals", type=int, default=60, help="normals of one calibration set")
    parser.add_argument("--tests", type=int, default=1000)
    arguments = parser.parse_args()
    n, draws, tests = arguments.normals, arguments.draws, arguments.tests
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is None:
            words = ["--config=configs/memmc_mae.py:smoke", f"--workdir={folder}/run"]
            subprocess.run([sys.executable, "-m", "jmae.train", *words], check=True)
        workdir = arguments.run or Path(folder) / "run"
        config = recipe.read(workdir)
        run = predict.open_run(workdir, config)
        sets = scores(run, 0, range(tests, tests + n * draws))[0].reshape(draws, n)
        first = Calibration({f"normal {i}": float(score) for i, score in enumerate(sets[0])})
        test, judged = scores(run._replace(calibration=first), 0, range(tests))
        abnormal, _ = scores(run, 1, range(tests))
    if judged != p_values(sets[0], test).tolist():
        raise SystemExit("jmae.predict and jmae.scoring.p_values give different p-values: one of them is wrong")
    rows, result, far = [], {}, False
    for rate in RATES:
        k = floor(round(rate * (n + 1), 9))
        promised = k / (n + 1)
        each = np.array([(p_values(normals, test) <= rate).mean() for normals in sets])
        power = float(np.mean([(p_values(normals, abnormal) <= rate).mean() for normals in sets]))
        error = sqrt(promised * (1 - promised) * (1 / (n + 2) / draws + 1 / tests))
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
    about = {"system": config.system, "normals": n, "draws": draws, "tests": tests, "rates": result}
    write(RESULTS, f"{config.system}, {n} normals", about)
    return int(far)


if __name__ == "__main__":
    sys.exit(main())
