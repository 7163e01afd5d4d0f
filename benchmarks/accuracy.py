"""Trains AMAE on real images and on phantoms: the settings of the paper, its figures, and controls, seed by seed.

    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds                           # the paper's settings
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds --only stage2 --budget 2
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_nih --subsets matched --only stage2
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds controls --seeds 0 1 2 3  # means, deviations, Welch's test
    JMAE_DATA=FOLDER python -m benchmarks.accuracy cxr_peds baselines                 # nothing is trained, a minute
    python -m benchmarks.accuracy phantoms controls --seeds 0 1 2 3
    python -m benchmarks.accuracy phantoms ratio --seeds 0 1 2 3                      # Fig. 3a: 0 to 100 % abnormal
    python -m benchmarks.accuracy phantoms stage0 --seeds 0 1 2 3                     # Eq. 4 against Stage 0's length

Trains with `python -m jmae.train --config configs/amae.py:PRESET`, `small` for packs and `phantom` for phantoms. All
settings of a seed start from one Stage 0 of all images, as they would from one checkpoint; `one_class` and the part
`stage0` have their own. `controls` tells what a score owes to the pseudo-labels: module B learns perfect labels,
normals alone, or all unlabelled images. It also tells what choices do: the other reading of the percentile, equal
epochs, the paper's learning rate, jitter. `ratio` has as many unlabelled images at every ratio as the rarer class
has.

benchmarks/results/accuracy.json keeps every run: AUROC and AP with 95 % intervals over patients, whole and central 80 %
of the map, the cheap baselines, seconds. A run that is there with the same arguments is not repeated, and one that was
interrupted goes on. The table has means over the seeds, 1.96 deviations, and Welch's two-sided p against the same score
of the first setting.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "settings": {name: {"variant": name} for name in ("stage2", "stage1", "mask_rec", "no_pseudo")},
    "controls": {
        **{name: {"variant": name} for name in ("stage2", "b_perfect", "b_normals", "no_pseudo", "one_class")},
        "percentile_all": {"adapt.percentile_over": "all"},
        "equal_epochs": {"adapt.equal": "epochs"},
        "paper_rate": {"adapt.lr": 2.5e-4},
        "jitter": {"proxy.jitter_image": 0.1},
    },
    "ratio": {},  # `ratios`
    "stage0": {},  # `lengths`
    "baselines": {},
}
BASE = "mae"  # the setting whose Stage 0 the others share
RATIOS, LENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)


def ratios(hidden: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Stage 2 and Mask Rec. at each anomaly ratio (Fig. 3a)."""
    size = min(Counter(hidden.values()).values())
    one = lambda ratio: {"data.anomaly_ratio": ratio, "data.unlabeled_size": size}
    return {f"{name} at {r:.0%}": {"variant": name} | one(r) for r in RATIOS for name in ("stage2", "mask_rec")}


def lengths(steps: int) -> dict[str, dict[str, Any]]:
    """Stage 2 after a Stage 0 of an eighth to four times its steps."""
    return {f"Stage 0 x {k:g}": {"pretrain.steps": round(steps * k)} for k in LENGTHS}


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What of metrics.json is kept of a run."""
    images = lambda part: {k: {n: v["image"] for n, v in part[k].items()} for k in ("scores", "baselines")}
    subsets = {name: {"n": subset["n"], **images(subset)} for name, subset in evaluation["subsets"].items()}
    return {"primary": evaluation["primary"], **images(evaluation), "subsets": subsets}


class Runs:
    """The runs of one data set at one budget, those of earlier calls included.

    Args:
        options: the command line's.
        data: arguments that name the data.
        overrides: further --config.KEY=VALUE of every run.
    """

    def __init__(self, options: argparse.Namespace, data: list[str], overrides: list[str]):
        self.options, self.data, self.overrides = options, data, overrides
        self.name = ", ".join([options.pack, f"budget {options.budget:g}"])

    def run(self, setting: str, changes: dict[str, Any], seed: int, weights: Path | None) -> dict[str, Any] | None:
        """The result of one run, trained where it is not there; None where it failed."""
        options, key = self.options, ", ".join([self.name, setting, *self.overrides, f"seed {seed}"])
        arguments = [f"--config=configs/amae.py:{options.preset}", f"--config.budget={options.budget}"]
        arguments += ["--config.evaluation.discrepancy=error"]  # b_perfect has no score of signed tokens
        arguments += [f"--config.{k}={v}" for k, v in changes.items()]
        arguments += [f"--config.seed={seed}", "--config.evaluation.maps=False", *self.overrides]
        if options.subsets:
            arguments += [f"--config.evaluation.subsets={','.join(options.subsets)}"]
        kept = json.loads(options.out.read_text()).get(key, {}) if options.out.exists() else {}
        if kept.get("arguments") == arguments and "not run" not in kept:
            return kept
        began, folder = time.monotonic(), self.folder(setting, seed)
        given = [*arguments, *self.data, *([f"--config.model.weights={weights}"] if weights else [])]
        done = subprocess.run([sys.executable, "-m", "jmae.train", *given, f"--workdir={folder}"])
        result: dict[str, Any] = {"arguments": arguments, "stage0": "shared" if weights else "own"}
        if done.returncode:
            write(options.out, key, result | {"not run": f"jmae.train ended with exit code {done.returncode}"})
            return None
        result |= figures(json.loads((folder / "evaluation" / "metrics.json").read_text()))
        write(options.out, key, result | {"seconds": time.monotonic() - began})
        return result

    def folder(self, setting: str, seed: int) -> Path:
        """The run folder of a setting and a seed."""
        words = [self.options.pack, f"{self.options.budget:g}", setting, *self.overrides, str(seed)]
        return self.options.workdir / "-".join(words).replace("--config.", "").replace(" ", "_").replace("/", "_")


def views(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of the test split that have figures."""
    return {"whole": result, **result["subsets"]}


def series(results: list[dict[str, Any]], view: str, kind: str, name: str, key: str) -> np.ndarray:
    """A figure of the image score `name` of each result that has it."""
    images = [views(result)[view][kind].get(name) for result in results]
    return np.array([image[key] for image in images if image])


def rows_of(each: Mapping[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """Table rows of the results of each setting, one result a seed. The baselines are those of the first setting."""
    rows, firsts = [], next(iter(each.values()))
    for setting, results in each.items():
        for view, part in views(results[0]).items():
            chosen = [("scores", name) for name, image in part["scores"].items() if image]
            if results is firsts:
                chosen += [("baselines", name) for name, image in part["baselines"].items() if image]
            for kind, name in chosen:
                auroc, ap = (series(results, view, kind, name, key) for key in ("auroc", "ap"))
                first = series(firsts, view, kind, name, "auroc")
                spread = "{:.3f} to {:.3f}".format(*part[kind][name]["auroc_ci"])
                if auroc.size > 1:
                    spread = f"± {1.96 * auroc.std(ddof=1):.3f}"
                p: Any = ""
                if results is not firsts and min(auroc.size, first.size) > 1:
                    p = float(ttest_ind(first, auroc, equal_var=False).pvalue)
                mark = " *" if name == results[0]["primary"] else ""
                rows.append([setting, view, name + mark, auroc.size, float(auroc.mean()), spread, float(ap.mean()), p])
    return rows


HEAD = ["setting", "view", "score", "seeds", "AUROC", "1.96 deviations, or 95 %", "AP", "Welch p"]


def cheap(config: Any, subsets: list[str]) -> dict[str, Any]:
    """The cheap baselines of a data set, and the ridge regression at three penalties; nothing is trained."""
    from jmae import metrics
    from jmae.baselines import ImageBaselines, ridge_scores
    from jmae.data.cases import load_cases
    from jmae.figures import CENTRAL

    cases = load_cases(config)
    of = lambda split: [row for row in cases.rows if row.split == split]
    found = ImageBaselines(cases.images(of("train")), [1.0, CENTRAL], False, cases.images(of("unlabeled")))
    test = [row for row in of("test") if row.label is not None]
    for row in test:
        found.add(cases.case(row), {})
    labels, patients = np.array([row.label for row in test], bool), [row.patient for row in test]
    parts = {"whole": (1.0, np.ones(len(test), bool)), f"central {CENTRAL:.0%}": (CENTRAL, np.ones(len(test), bool))}
    parts |= {name: (1.0, np.array([row.extra[name] not in ("", "0") for row in test])) for name in subsets}
    out: dict[str, Any] = {}
    for view, (share, inside) in parts.items():
        scores = {name: values[0] for name, values in found.scores(share).items()}
        images = found.normals[share], found.unlabelled[share], np.stack(found.cases[share])
        scores |= {f"ridge, penalty {k}": ridge_scores(*images, penalty=k) for k in (300, 1000, 3000)}
        own = [p for p, used in zip(patients, inside, strict=True) if used]
        out[view] = {name: metrics.image_metrics(labels[inside], v[inside], own) for name, v in scores.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", help="a folder of JMAE_DATA, or phantoms")
    parser.add_argument("part", nargs="?", default="settings", choices=tuple(PARTS))
    parser.add_argument("--only", nargs="+", default=[], help="settings of the part")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subsets", nargs="*", default=[])
    parser.add_argument("--preset", default="")
    parser.add_argument("--workdir", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    own, data = options.pack == "phantoms", list[str]()
    manifest = Path(os.environ.get("JMAE_DATA", "")) / options.pack / "manifest.csv"
    if not own:
        if not os.environ.get("JMAE_DATA") or not manifest.is_file():
            print(f"not run: {manifest} is not there; set JMAE_DATA to the folder of the packs")
            return
        hidden_file = manifest.with_name("unlabeled_labels.csv")
        data = [f"--config.data.manifest={manifest}"]
        data += [f"--config.data.unlabeled_labels={hidden_file}"] if hidden_file.is_file() else []
    options.preset = options.preset or ("phantom" if own else "small")

    from jmae import recipe
    from jmae.data.cases import load_rows
    from jmae.data.unlabeled import unlabeled_labels

    config = recipe.parse([f"--config=configs/amae.py:{options.preset}", *data, *overrides], "")[0]
    runs = Runs(options, data, overrides)
    if options.part == "baselines":
        found = cheap(config, options.subsets)
        write(options.out, f"{options.pack}, baselines", found)
        shown = lambda image: (image["auroc"], "{:.3f} to {:.3f}".format(*image["auroc_ci"]), image["ap"])
        rows = [(view, name, *shown(image)) for view, part in found.items() for name, image in part.items()]
        print(table(("view", "baseline", "AUROC", "95 %", "AP"), rows))
        return
    settings = PARTS[options.part]
    if options.part == "ratio":
        settings = ratios(unlabeled_labels(config, load_rows(config)))
    elif options.part == "stage0":
        settings = lengths(config.pretrain.steps)
    if unknown := [name for name in options.only if name not in settings]:
        parser.error(f"{unknown[0]} is no setting of {options.part}: {', '.join(settings)}")
    each: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for name, changes in settings.items():
            if options.only and name not in options.only:
                continue
            alone = name == "one_class" or options.part == "stage0" or config.model.weights
            if not alone:
                runs.run(BASE, {"variant": BASE}, seed, None)
            weights = None if alone else runs.folder(BASE, seed)
            if result := runs.run(name, changes, seed, weights):
                each.setdefault(name, []).append(result)
    if not each:
        sys.exit("no setting was trained")
    rows = rows_of(each)
    if len(options.seeds) > 1:
        seeds = " ".join(map(str, options.seeds))
        write(options.out, ", ".join([runs.name, options.part, *overrides, f"seeds {seeds}"]), {"table": [HEAD, rows]})
    print(table(tuple(HEAD), [tuple(row) for row in rows]))


if __name__ == "__main__":
    main()
