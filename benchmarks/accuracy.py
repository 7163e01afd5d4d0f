"""Trains AMAE on real images: the paper's settings on one data pack, each once.

    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds                      # all settings, recipe `small`
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds --budget 2 --settings stage2
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds --settings mask_rec --config.model.weights=RUN
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_nih --subsets matched --settings stage2
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_nih64 --replicates 4      # means, 1.96 deviations, Welch tests

It trains with `python -m jmae.train --config configs/amae.py:small`, as the README does. All settings start from Stage
0 of the first one, as from one checkpoint (`model.weights`). It prints a table and writes
benchmarks/results/accuracy.json. Both have AUROC and AP with 95 % intervals over patients, beside the cheap baselines.
The figures are of the whole image and of the central 80 % of the map. The seconds of training on this machine follow.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

from benchmarks.timing import table, write

SETTINGS = ("stage2", "stage1", "mask_rec", "no_pseudo")
RESULTS = Path(__file__).parent / "results" / "accuracy.json"


def train(arguments: list[str]) -> float:
    """Runs one training as a process. Returns the wall seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "jmae.train", *arguments], check=True)
    return time.monotonic() - began


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that the table shows."""
    crop = next(name for name in evaluation["subsets"] if name.startswith("central"))
    out = {
        "primary": evaluation["primary"],
        "scores": {name: score["image"] for name, score in evaluation["scores"].items()},
        "baselines": {name: score["image"] for name, score in evaluation["baselines"].items()},
        "subsets": {
            name: {
                "n": subset["n"],
                "scores": {k: v["image"] for k, v in subset["scores"].items()},
                "baselines": {k: v["image"] for k, v in subset["baselines"].items()},
            }
            for name, subset in evaluation["subsets"].items()
        },
    }
    return out | {"central": crop, "replicates": evaluation.get("replicates")}


def against_first(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(first setting, other setting, p) of Welch's two-sided test on the primary AUROC over replicates."""
    values = {name: r["replicates"]["auroc"]["values"] for name, r in results.items()}
    first, *others = values
    return [(first, other, float(ttest_ind(values[first], values[other], equal_var=False).pvalue)) for other in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", help="a folder of JMAE_DATA")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--subsets", nargs="*", default=())
    parser.add_argument("--workdir", type=Path, default=Path("runs/accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    manifest = Path(os.environ.get("JMAE_DATA", "")) / options.pack / "manifest.csv"
    if not os.environ.get("JMAE_DATA") or not manifest.is_file():
        print(f"not run: {manifest} not found; set JMAE_DATA to the folder of the packs")
        return
    rows, first, results = [], None, {}
    for setting in options.settings:
        replicated = f", {options.replicates} seeds" if options.replicates > 1 else ""
        folder = options.workdir / f"{options.pack}-{options.budget:g}-{options.replicates}-{setting}"
        arguments = [
            "--config=configs/amae.py:small",
            f"--config.data.manifest={manifest}",
            f"--config.variant={setting}",
            f"--config.budget={options.budget}",
            f"--config.replicates={options.replicates}",
            f"--config.evaluation.subsets={tuple(options.subsets)!r}",
            "--config.evaluation.maps=False",
            f"--workdir={folder}",
            *overrides,
        ]
        seconds = train(arguments + ([f"--config.model.weights={first}"] if first else []))
        result = figures(json.loads((folder / "evaluation" / "metrics.json").read_text()))
        shown = [a for a in arguments if not any(word in a for word in ("manifest", "workdir", "model.weights"))]
        trained_here = first is None and not any(word.startswith("--config.model.weights=") for word in overrides)
        result |= {"seconds": seconds, "stage0": "own" if trained_here else "shared", "arguments": shown}
        first, results[setting] = first or folder, result
        write(RESULTS, f"{options.pack}, budget {options.budget:g}, {setting}{replicated}", result)
        views = {"whole": result, **result["subsets"]}
        for view, part in views.items():
            for kind in ("scores", "baselines"):
                for name, image in part[kind].items():
                    if image:
                        interval = f"[{image['auroc_ci'][0]:.3f}, {image['auroc_ci'][1]:.3f}]"
                        mark = " *" if name == result["primary"] else ""
                        rows.append((setting, view, name + mark, image["auroc"], interval, image["ap"]))
    print(table(("setting", "view", "score", "AUROC", "95 %", "AP"), rows))
    if options.replicates > 1 and len(results) > 1:
        print(table(("setting", "against", "Welch p"), against_first(results)))


if __name__ == "__main__":
    main()
