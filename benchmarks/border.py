"""How much of AMAE's score `tokens_ridge` comes from the border of the images.

    JMAE_DATA=data python -m benchmarks.border cxr_peds --runs papers
    JMAE_DATA=data python -m benchmarks.border cxr_nih --runs papers
    JMAE_DATA=data python -m benchmarks.border cxr_nih --runs papers --subset matched

This benchmark trains no network. It reads the finished runs of AMAE in the folder --runs, which
`jmae papers amae.packs.PACK` made. The encoder of module B gets all tokens of an image, or the tokens without one or
two rings at the border. The inner part alone then gives the mean and the deviation that standardise the image, too. So
nothing of the border takes part in the regression or in the test. But module B has learned from whole images. The line
"standardised as a whole" leaves out the tokens alone. It has no differences, since the rivals do not know the mean and
deviation of the whole image. The score of an untrained encoder and the ridge regression of the pixels of the inner part
stand beside the score of AMAE.

Figures are means over the runs, with 95 % intervals over patients. "above the pixels" and "above untrained" are
paired differences. benchmarks/results/border.json keeps them.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packs import MIXED, closed_forms, finished, of_subset, rows_of_manifest, settings
from benchmarks.runs import pack
from benchmarks.timing import table, write
from benchmarks.tokens import BATCH, Run
from jmae import metrics
from jmae.errors import InputError, exit_code
from jmae.recipe import read
from jmae.ridge import standardised_ridge

RESULTS = Path(__file__).parent / "results" / "border.json"
RINGS = (0, 1, 2)
AMAE, WHOLE, UNTRAINED = "AMAE, module B", "AMAE, standardised as a whole", "untrained encoder"


def scores_of(run: Run, stage: str, ring: int, whole: bool = False) -> dict[str, float]:
    """The score `tokens_ridge` of each test image by its id, without `ring` rings of tokens at the border; `whole`:
    of images that are standardised as a whole."""
    import jax

    from jmae.masked import standardised
    from jmae.tokens import tokens_of

    (h, w), (y, x) = run.config.data.size, (ring * p for p in run.config.model.patch)

    @jax.jit
    def mean(params: Any, image: Any) -> Any:
        image = standardised(image, run.config, whole=image if whole else image[:, y : h - y, x : w - x])
        return tokens_of(run.config, run.networks.mae_of(params), image, ring).mean(1)

    def means(rows: str) -> np.ndarray:
        images, found = run.cases.images(run.rows[rows]), []
        for start in range(0, len(images.rows), BATCH):
            numbers = np.minimum(np.arange(start, start + BATCH), len(images.rows) - 1)
            found.append(np.asarray(mean(run.params[stage], images.image(numbers)))[: len(images.rows) - start])
        return np.concatenate(found)

    weights, offset = standardised_ridge(means("train"), means("unlabeled"))
    return dict(zip([row.id for row in run.rows["test"]], means("test") @ weights + offset, strict=True))


def measure(manifest: str, folders: Sequence[Path], subset: str) -> list[dict[str, Any]]:
    """A result for each number of rings and each method."""
    config, rows, tested = rows_of_manifest(manifest)
    if subset:
        _, tested = of_subset({}, tested, subset)
    labels, patients = np.array([row.label for row in tested], bool), [row.patient for row in tested]
    runs, found, chance = [Run(folder) for folder in folders], list[dict[str, Any]](), np.zeros(len(tested))
    trained = lambda run: settings({name: part for name, part in run.config.to_dict().items() if name != "evaluation"})
    if len({trained(run) for run in runs}) > 1:
        raise InputError(f"{folders[0]} and others: runs of several recipes: run all with the same version")
    for ring in RINGS:
        scores = {AMAE: of_runs(runs, tested, "module_b", ring)}
        if ring:  # without it both are the same
            scores[WHOLE] = of_runs(runs, tested, "module_b", ring, whole=True)
        scores[UNTRAINED] = of_runs(runs, tested, "untrained", ring)
        inside = 1 - 2 * ring / runs[0].grid[0]
        scores["pixels"] = closed_forms(config, rows, tested, inside)[MIXED][None]
        for title, one in scores.items():
            above = partial(metrics.paired_difference, metrics.auroc, labels=labels, patients=patients, scores=one)
            auroc, (low, high) = above(others=chance)
            figures = {"auroc": auroc + 0.5, "auroc_ci": (low + 0.5, high + 0.5), "seeds": len(one)}
            figures["above_pixels"] = above(others=scores["pixels"]) if title in (AMAE, UNTRAINED) else None
            figures["above_untrained"] = above(others=scores[UNTRAINED]) if title == AMAE else None
            found.append({"rings": ring, "inside": inside, "method": title, **figures})
    return found


def of_runs(runs: Sequence[Run], tested: Sequence[Any], stage: str, ring: int, whole: bool = False) -> np.ndarray:
    """`scores_of` the tested rows in their order, a row a run.

    Raises InputError where a run's manifest lacks one of them.
    """
    each = [scores_of(run, stage, ring, whole) for run in runs]
    for run, scores in zip(runs, each, strict=True):
        if missing := [row.id for row in tested if row.id not in scores]:
            raise InputError(f"{run.folder}: its manifest has no {missing[0]}: the manifest has changed")
    return np.array([[scores[row.id] for row in tested] for scores in each])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("--runs", type=Path, default=Path("papers"), help="folder of the runs of `jmae papers`")
    parser.add_argument("--subset", default="", help="column of the manifest that marks the test rows")
    options = parser.parse_args(argv)
    if not (folder := pack(options.pack)):
        return
    runs = finished(options.runs, options.pack)
    folders = [run for method, _, run in runs if method == "amae" and read(run).budget == 1]
    if not folders:
        print(f"not run: {options.runs} has no finished run of AMAE on {options.pack}: train one by jmae papers")
        return
    found = measure(str(folder / "manifest.csv"), folders, options.subset)
    ends = lambda figure: "{:.3f} to {:.3f}".format(*figure)
    above = lambda figure: "{:+.3f}, {:+.3f} to {:+.3f}".format(figure[0], *figure[1]) if figure else ""
    lines = [
        (
            one["rings"],
            f"{one['inside']:.0%}",
            one["method"],
            one["seeds"] if one["method"] != "pixels" else "",
            f"{one['auroc']:.3f}",
            ends(one["auroc_ci"]),
            above(one["above_pixels"]),
            above(one["above_untrained"]),
        )
        for one in found
    ]
    head = ("rings left out", "inside of each axis", "method", "seeds", "AUROC", "95 %")
    head += ("above the pixels, 95 %", "above untrained, 95 %")
    name = ", ".join([options.pack, *([options.subset] if options.subset else [])])
    write(RESULTS, name, {"results": found, "table": [head, lines]})
    print(table(head, lines))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
