"""Trains all five systems on one data pack with equal budgets (the presets `small`), and compares them.

    JMAE_DATA=FOLDER python -m benchmarks.systems cxr_peds --budget 0.5    # image scores, whole image and central crop
    JMAE_DATA=FOLDER python -m benchmarks.systems endoscopy --budget 0.25  # maps against masks

Budget 1 is the recipe's own length, about 15 minutes of training on two cores. Every system trains with `python -m
jmae.train --config configs/NAME.py:small` on grey images. Its recipe names its primary score before the run.

The table and benchmarks/results/systems.json have AUROC and AP with 95 % intervals over patients, and pixel AUROC and
AP. They are of the whole image and of the central 80 % of each axis, beside the cheap baselines. There are also the
differences of every pair of systems over the same draws of patients, and the seconds of training. The page that
compares the runs is written into the work folder. `--only NAME ...` trains some of the systems; all trained systems are
compared. CHANGES has the changes of recipes and their reasons.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steps import train_run, without_curves
from benchmarks.timing import table, write
from jmae import metrics
from jmae.data.files import read_image
from jmae.data.transforms import central
from jmae.recipe import RIVALS, SYSTEMS
from jmae.report.compare import common_cases, paired_differences, read_run, write_comparison

RESULTS = Path(__file__).parent / "results" / "systems.json"
# MAEMI is a system for volumes. An image is a volume on its own grid with a window of 14 x 14 patches; flips mirror it
# left to right.
CHANGES: dict[str, dict[str, Any]] = {
    "maemi": {
        "data.channels": 1,
        "data.size": "224,224",
        "data.axes": "",
        "data.region": "",
        "data.least_region": 0.0,
        "data.normalise": "crop",
        "data.flips": "1,",
        "model.patch": "16,16",
        "evaluation.stride": "224,224",
        "evaluation.filter": "1,1",
    },
}
PACKS: dict[str, dict[str, dict[str, Any]]] = {
    "cxr_peds": {},
    "endoscopy": {"maemi": {"data.size": "128,128", "evaluation.stride": "128,128", "model.patch": "8,8"}},
}


def central_of(folder: Path, top: float) -> dict[str, Any]:
    """The figures of the central crop for a system for volumes, from its maps, in the form of `subsets` in
    metrics.json.

    The score is the mean of the share `top` of the highest values, like the system's own score.
    """
    run = read_run(folder)
    ids, values = list(run.cases), []
    for name in ids:
        inner = np.sort(
            central(read_image(folder / "evaluation" / "maps" / f"{name}_anomaly.tif").array[..., 0]).ravel()
        )
        values.append(inner[-max(1, round(top * inner.size)) :].mean())
    labels, patients = np.array([run.cases[name][0] for name in ids], bool), [run.patients[name] for name in ids]
    out: dict[str, Any] = {}
    for title, measure in (("auroc", metrics.auroc), ("ap", metrics.average_precision)):
        out[title] = measure(labels, np.array(values))
        out[f"{title}_ci"] = metrics.bootstrap_interval(measure, labels, np.array(values), patients)
    return out


def figures(folder: Path) -> dict[str, Any]:
    """The part of a run's metrics.json that is kept: the primary score and the baselines, on image and central crop."""
    found = json.loads((folder / "evaluation" / "metrics.json").read_text())
    crop = next((part for name, part in found["subsets"].items() if name.startswith("central")), None)
    if crop:
        inner = {"image": crop["scores"][found["primary"]]["image"], "baselines": crop["baselines"]}
    else:
        top = json.loads((folder / "evaluation" / "config.json").read_text())["evaluation"]["top"]
        inner = {"image": central_of(folder, top), "baselines": {}}
    kept = {k: found[k] for k in ("primary", "image", "pixel", "baselines", "seconds_per_case")}
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept |= {"central": inner, "stages": {h["stage"]: h["step"] for h in history}}
    return without_curves(kept)


def rows_of(name: str, found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a system and of its baselines in the table."""

    def row(title: str, image: Any, inner: Any, pixel: Any) -> tuple[Any, ...]:
        each: list[Any] = []
        for part in (image, inner, pixel):
            interval = (part or {}).get("auroc_ci") or (None, None)
            shown = "" if interval[0] is None else "[{:.3f}, {:.3f}]".format(*interval)
            each += [part["auroc"], shown, part["ap"]] if part and part.get("auroc") is not None else ["", "", ""]
        return (name, title, *each)

    rows = [row(found["primary"] + " *", found["image"], found["central"]["image"], found["pixel"])]
    for title, part in found["baselines"].items():
        inner = (found["central"]["baselines"].get(title) or {}).get("image")
        rows.append(row(title, part["image"], inner, part["pixel"]))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", choices=tuple(PACKS))
    parser.add_argument("--only", nargs="+", default=[name for name in SYSTEMS if name not in RIVALS], choices=SYSTEMS)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/systems"))
    options = parser.parse_args(argv)
    manifest = Path(os.environ.get("JMAE_DATA", "")) / options.pack / "manifest.csv"
    if not os.environ.get("JMAE_DATA") or not manifest.is_file():
        print(f"not run: {manifest} not found; set JMAE_DATA to the folder of the packs")
        return
    place, rows = options.workdir / f"{options.pack}-{options.budget:g}", []
    for name in options.only:
        changes = CHANGES.get(name, {}) | PACKS[options.pack].get(name, {})
        given = [f"--config.{key}={value}" for key, value in changes.items()]
        given = [f"--config=configs/{name}.py:small", f"--config.budget={options.budget}", *given]
        trained = train_run([*given, f"--config.data.manifest={manifest}"], place / name)
        result = figures(place / name) | {"wall_seconds": trained["wall_seconds"], "arguments": given}
        write(RESULTS, f"{options.pack}, budget {options.budget:g}, {name}", result)
        rows += rows_of(name, result)
    head = ("system", "score", "AUROC", "95 %", "AP", "central AUROC", "95 %", "AP", "pixel AUROC", "95 %", "AP")
    print(table(head, rows))
    ready = [place / name for name in SYSTEMS if (place / name / "evaluation" / "metrics.json").is_file()]
    if len(ready) > 1:
        runs = [read_run(folder) for folder in ready]
        ids = common_cases(runs)
        by_patient, pairs = any(runs[0].patients[name] for name in ids), paired_differences(runs, ids)
        differences = {f"{pair.first} - {pair.second}": pair._asdict() for pair in pairs}
        write(
            RESULTS,
            f"{options.pack}, budget {options.budget:g}, differences",
            {"over": "patients" if by_patient else "images", "pairs": differences},
        )
        print(write_comparison(place / "comparison.html", ready))


if __name__ == "__main__":
    main()
