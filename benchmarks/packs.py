"""All methods on one data pack in one table: the five systems, the trained rivals and the closed forms.

    jmae papers SYSTEM.packs.PACK --root data --preset small --seeds 3      # each row trains first
    jmae papers rivals.packs.PACK.ae_u --root data --preset small --seeds 3
    python -m benchmarks.packs cxr_peds --runs papers

It reads the finished runs of `jmae papers` in the folder --runs, all of the pack, and trains nothing. Runs of another
budget than 1 are left out. Each method has its primary score, which its recipe fixed before the run. Figures are means
over the method's seeds, with 95 % intervals over patients. A difference is the distance to the best closed form that
learns from normal images alone, over the same draws of patients. The best is chosen on the same cases, which favours
it. These closed forms (jmae.baselines) see the images at the size of the recipe `autoencoder:small`. "ridge,
unlabelled" learns from unlabelled images too, as AMAE does. Where an evaluation has closed forms under the method's own
score and masks (jmae.rivals), the best of them stands beside the method.

benchmarks/results/packs.json keeps the table.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import table, write
from jmae import baselines, metrics, recipe
from jmae.data.cases import load_rows
from jmae.data.preparation import prepared_image
from jmae.report.compare import Run, common_cases, labels_of, read_run, scores_of

RESULTS = Path(__file__).parent / "results" / "packs.json"
MIXED = "ridge, unlabelled"  # a closed form that learns from more than normal images


def methods(folder: Path, pack: str) -> dict[str, list[Run]]:
    """The runs of each method, one a seed, by the name of its row without the pack."""
    found: dict[str, list[Run]] = {}
    for row in sorted(folder.glob(f"*.packs.{pack}*")):
        name = ".".join(part for part in row.name.split(".") if part not in ("packs", pack))
        seeds = [seed for seed in sorted(row.glob("seed-*")) if (seed / "evaluation" / "metrics.json").exists()]
        runs = [run for seed in seeds if (run := read_run(seed)).config.get("budget", 1) == 1]
        if runs and row.name.split(".")[2] == pack:
            found[name] = runs
    return found


def closed_forms(manifest: str, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The score of each case by each closed form."""
    config, _ = recipe.parse(["--config=autoencoder:small", f"--config.data.manifest={manifest}"], "")
    rows = load_rows(config)
    images = lambda chosen: np.stack([prepared_image(row, config.data) for row in chosen])
    of = {row.id: row for row in rows if row.split == "test"}
    normals = images([row for row in rows if row.split == "train" and row.label == 0])
    cases = images([of[name] for name in ids])
    found = baselines.image_scores(normals, cases)
    if unlabelled := [row for row in rows if row.split == "unlabeled"]:
        found[MIXED] = baselines.ridge_scores(normals, images(unlabelled), cases)
    return found


def same_score(runs: Sequence[Run]) -> tuple[str, float] | None:
    """(name, mean AUROC over the seeds) of the best closed form under a method's own score; None without any."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, entry in run.metrics["baselines"].items():
            if name.endswith(f": {run.metrics['primary']}") and entry["image"]:
                found.setdefault(name.split(":")[0], []).append(entry["image"]["auroc"])
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return max(means.items(), key=lambda item: item[1]) if means else None


def compared(runs: dict[str, list[Run]], forms: dict[str, np.ndarray], ids: Sequence[str]) -> dict[str, Any]:
    """The figures of each method and closed form, and their differences to the best closed form of normals alone."""
    first = next(iter(runs.values()))[0]
    labels, patients = labels_of(first, ids), [first.patients[name] for name in ids]
    scores = {name: np.stack([scores_of(run, ids) for run in each]) for name, each in runs.items()}
    scores |= {name: values[None] for name, values in forms.items()}
    auroc = {name: float(np.mean([metrics.auroc(labels, row) for row in rows])) for name, rows in scores.items()}
    best = max((name for name in forms if name != MIXED), key=lambda name: auroc[name])
    chance = np.zeros(len(ids))  # a constant score has an AUROC of 1/2 in each draw, so a difference to it is a figure
    paired = partial(metrics.paired_difference, labels=labels, patients=patients)
    out: dict[str, Any] = {}
    for name, rows in scores.items():
        above, (low, high) = paired(metrics.auroc, scores=rows, others=chance)
        difference, interval = paired(metrics.auroc, scores=rows, others=scores[best])
        each = [metrics.average_precision(labels, row) for row in rows]
        out[name] = {
            "trained": name in runs,
            "seeds": len(rows) if name in runs else None,
            "auroc": above + 0.5,
            "auroc_ci": (low + 0.5, high + 0.5),
            "ap": float(np.mean(each)),
            "difference": difference,
            "difference_ci": interval,
            "same_score": same_score(runs.get(name, [])),
        }
    return {"best_closed_form": best, "n": len(ids), "n_abnormal": int(labels.sum()), "methods": out}


def rows_of(found: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of the table, the highest AUROC first."""
    ends = lambda interval: f"{interval[0]:.3f} to {interval[1]:.3f}"
    for name, one in sorted(found["methods"].items(), key=lambda item: -item[1]["auroc"]):
        name = f"**{name}**" if one["trained"] else name
        figures = (f"{one['auroc']:.3f}", ends(one["auroc_ci"]), f"{one['ap']:.3f}")
        rival = "{}: {:.3f}".format(*one["same_score"]) if one["same_score"] else ""
        yield name, one["seeds"] or "", *figures, f"{one['difference']:+.3f}", ends(one["difference_ci"]), rival


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("--runs", type=Path, default=Path("papers"), help="folder of the runs of `jmae papers`")
    options = parser.parse_args(argv)
    runs = methods(options.runs, options.pack)
    if not runs:
        print(f"not run: {options.runs} has no finished run of {options.pack}: train one by jmae papers")
        return 0
    every = [run for each in runs.values() for run in each]
    ids = common_cases(every)
    found = compared(runs, closed_forms(every[0].config["data"]["manifest"], ids), ids)
    head = (
        "method",
        "seeds",
        "AUROC",
        "95 %",
        "AP",
        f"above {found['best_closed_form']}",
        "95 %",
        "same score, best closed form",
    )
    write(RESULTS, options.pack, found | {"table": [head, (lines := list(rows_of(found)))]})
    print(table(head, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
