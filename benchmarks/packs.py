"""All methods on one data pack in one table: the five systems, the trained rivals and the closed forms.

    jmae papers SYSTEM.packs.PACK --root data --preset small --seeds 3      # each row trains first
    jmae papers rivals.packs.PACK.ae_u --root data --preset small --seeds 3
    JMAE_DATA=data python -m benchmarks.packs cxr_peds --runs papers
    JMAE_DATA=data python -m benchmarks.packs cxr_nih --runs papers --subset matched

It trains nothing. It reads the finished runs of the pack in the folder --runs, which `jmae papers` made. Runs of
another budget than 1 are left out. benchmarks/results/packs/PACK.jsonl keeps the scores of each run, in the order of
the manifest's test rows. So runs of several machines and days come into one table.

Each method has its primary score, which its recipe fixed before the run. Figures are means over the method's seeds,
with 95 % intervals over patients. A line "METHOD, as published" has the score of the paper, where the recipe has
another one (`PUBLISHED`). A line "METHOD, WAY" has the evaluation in the folder ways/WAY of each run, which
`jmae evaluate --workdir RUN --out RUN/ways/WAY --config.evaluation.KEY=VALUE` wrote. With --subset the figures are
those of the test rows that a column of the manifest marks.

Differences are those to the best closed form that learns from normal images alone, to the best trained rival, and to
"ridge, unlabelled", over the same draws of patients. The best are chosen on the same cases, which favours them. These
closed forms (jmae.baselines) see the images at the size of the recipe `autoencoder:small`. "ridge, unlabelled" learns
from unlabelled images too, as AMAE does. Where an evaluation has closed forms under the method's own score and masks
(jmae.rivals), the best of them stands beside the method. "explained" is the share of the variance of hidden patches of
held-out normals that the network explains. "central" is an AUROC of the central 80 % of each axis. A closed form sees
the cropped images. A network sees whole images, and the mean of its map on the crop is scored. A score without a map
has no such figure.

benchmarks/results/packs.json keeps the table.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import pack
from benchmarks.timing import table, write
from jmae import baselines, metrics, recipe
from jmae.data.cases import Row, load_rows
from jmae.data.preparation import prepared_image
from jmae.data.transforms import central
from jmae.errors import InputError, exit_code
from jmae.figures import CENTRAL
from jmae.report.compare import read_run
from jmae.run_folder import write_text

RESULTS = Path(__file__).parent / "results" / "packs.json"
KEPT = RESULTS.with_suffix("")
MIXED = "ridge, unlabelled"  # a closed form that learns from more than normal images
PUBLISHED = {"amae": "stage2", "simsid": "simsid"}  # the paper's score, where another one is primary
PAIRED = ("difference", "to_trained", "to_mixed")  # figures with their intervals
Entry = Mapping[str, Any]
"""A run: its method and seed, and what `entry_of` gives."""


def rows_of_manifest(manifest: str) -> tuple[Any, list[Row], list[Row]]:
    """(the config that reads the manifest, all its rows, its labelled test rows)"""
    config, _ = recipe.parse(["--config=autoencoder:small", f"--config.data.manifest={manifest}"], "")
    rows = load_rows(config)
    return config, rows, [row for row in rows if row.split == "test" and row.label is not None]


def cases_digest(rows: Sequence[Row]) -> str:
    """16 hexadecimal digits of the ids and labels of the cases, in their order."""
    return hashlib.sha256("\n".join(f"{row.id},{row.label}" for row in rows).encode()).hexdigest()[:16]


def finished(folder: Path, pack: str) -> Iterator[tuple[str, int, Path]]:
    """(method, seed, folder) of each finished run of the pack, and of each further evaluation of it.

    A method is the name of a row without the pack; a further evaluation has the name of its folder after it.
    """
    for row in sorted(folder.glob(f"*.packs.{pack}*")):
        if row.name.split(".")[2] == pack:
            name = ".".join(part for part in row.name.split(".") if part not in ("packs", pack))
            for run in sorted(row.glob("seed-*")):
                if (run / "evaluation" / "metrics.json").exists():
                    seed = int(run.name.removeprefix("seed-"))
                    yield name, seed, run
                    for file in sorted(run.glob("ways/*/metrics.json")):
                        yield f"{name}, {file.parent.name}", seed, file.parent


def entry_of(folder: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """What is kept of a run; None of a run of another budget than 1.

    Raises InputError where the run has no score of one of the cases.
    """
    run = read_run(folder)
    if run.config.get("budget", 1) != 1:
        return None
    if missing := [row.id for row in rows if run.cases.get(row.id, (None,))[0] != row.label]:
        raise InputError(
            f"{folder}: no score of {len(missing)} cases, such as {missing[0]}: evaluate it on the manifest"
        )
    primary = run.metrics["primary"]
    other = primary if folder.parent.name == "ways" else PUBLISHED.get(run.config["system"], primary)
    middle = run.metrics["subsets"].get(f"central {CENTRAL:.0%}", {}).get("scores", {})
    inside = lambda name: middle[name]["image"]["auroc"] if (middle.get(name) or {}).get("image") else None
    rivals = {
        name.split(":")[0]: entry["image"]["auroc"]
        for name, entry in run.metrics["baselines"].items()
        if name.endswith(f": {primary}") and entry["image"]
    }
    return {
        "primary": primary,
        "settings": settings(run.config),
        "cases": cases_digest(rows),
        "rivals": rivals,
        "explained": (run.metrics.get("explained") or {}).get("the network"),
        "central": {name: inside(name) for name in (primary, other)},
        "scores": [float(f"{run.cases[row.id][1]:.6g}") for row in rows],
        "published": [float(f"{float(run.table[row.id][other]):.6g}") for row in rows] if other != primary else None,
    }


def settings(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a recipe without its seed and the place of its manifest."""
    data = {name: value for name, value in config["data"].items() if name != "manifest"}
    rest = {name: value for name, value in config.items() if name != "seed"} | {"data": data}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def read_kept(pack: str) -> dict[tuple[str, int], Entry]:
    """The kept runs of a pack by method and seed."""
    file = KEPT / f"{pack}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line["method"], line["seed"]): line for line in lines}


def keep(pack: str, entries: Mapping[tuple[str, int], Entry]) -> None:
    """Writes the runs of a pack, a line each."""
    KEPT.mkdir(exist_ok=True)
    write_text(KEPT / f"{pack}.jsonl", "".join(json.dumps(entries[key]) + "\n" for key in sorted(entries)))


def methods(entries: Iterable[Entry], cases: str) -> dict[str, list[Entry]]:
    """The runs of each method.

    Raises InputError where runs do not belong together.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        where = f"the kept run {entry['method']}, seed {entry['seed']}"
        if entry["cases"] != cases:
            raise InputError(f"{where} has other test cases than the manifest: delete its line, and run it again")
        each = found.setdefault(entry["method"], [])
        if each and each[0]["settings"] != entry["settings"]:
            raise InputError(f"{where} has another recipe than seed {each[0]['seed']}: run both with the same version")
        each.append(entry)
    return found


def of_subset(
    runs: Mapping[str, Sequence[Entry]], rows: Sequence[Row], column: str
) -> tuple[dict[str, list[Entry]], list[Row]]:
    """The runs and test rows of the cases that a column of the manifest marks.

    Raises InputError where it marks none. Figures of all cases are left out.
    """
    marked = [i for i, row in enumerate(rows) if row.extra.get(column, "") not in ("", "0")]
    if not marked:
        raise InputError(f"--subset {column}: the manifest marks no test case in such a column")
    cut = lambda scores: scores and [scores[i] for i in marked]
    gone = {"rivals": {}, "central": {}}
    own = lambda run: {**run, "scores": cut(run["scores"]), "published": cut(run.get("published")), **gone}
    return {name: [own(run) for run in each] for name, each in runs.items()}, [rows[i] for i in marked]


def closed_forms(config: Any, rows: Sequence[Row], tested: Sequence[Row], share: float = 1) -> dict[str, np.ndarray]:
    """The score of each tested case by each closed form, on the central `share` of each axis."""
    middle = lambda image: np.stack([central(channel, share) for channel in np.moveaxis(image, -1, 0)], -1)
    images = lambda chosen: np.stack([middle(prepared_image(row, config.data)) for row in chosen])
    normals = images([row for row in rows if row.split == "train" and row.label == 0])
    cases = images(tested)
    found = baselines.image_scores(normals, cases)
    if unlabelled := [row for row in rows if row.split == "unlabeled"]:
        found[MIXED] = baselines.ridge_scores(normals, images(unlabelled), cases)
    return found


def same_score(runs: Sequence[Entry]) -> tuple[str, float] | None:
    """(name, mean AUROC over the seeds) of the best closed form under a method's own score; None without any."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, auroc in run["rivals"].items():
            found.setdefault(name, []).append(auroc)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return max(means.items(), key=lambda item: item[1]) if means else None


def of_crop(runs: Sequence[Entry], published: bool) -> tuple[float, int] | None:
    """(mean AUROC on the central crop, seeds that have one) of a method; None where no seed has one."""
    of = lambda run, name, auroc: auroc is not None and (name != run["primary"]) == published
    there = [auroc for run in runs for name, auroc in run.get("central", {}).items() if of(run, name, auroc)]
    return (float(np.mean(there)), len(there)) if there else None


def compared(
    runs: Mapping[str, Sequence[Entry]],
    forms: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    cropped: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The figures of each method and closed form, and their differences to the best closed form of normals alone, to
    the best trained rival and to `MIXED`. `cropped` has the scores of the closed forms on the central crop."""
    labels, patients = np.array([row.label for row in rows], bool), [row.patient for row in rows]
    published = {f"{name}, as published": [run for run in each if run.get("published")] for name, each in runs.items()}
    scores = {name: np.array([run["scores"] for run in each]) for name, each in runs.items()}
    scores |= {name: np.array([run["published"] for run in each]) for name, each in published.items() if each}
    scores |= {name: values[None] for name, values in forms.items()}
    auroc = {name: float(np.mean([metrics.auroc(labels, one) for one in seeds])) for name, seeds in scores.items()}
    best = max((name for name in forms if name != MIXED), key=lambda name: auroc[name])
    trained = max((name for name in runs if name.startswith("rivals.")), key=lambda name: auroc[name], default=None)
    others = dict(zip(PAIRED, (best, trained, MIXED if MIXED in forms else None), strict=True))
    chance = np.zeros(len(rows))  # a constant score has an AUROC of 1/2 in each draw, so a difference to it is a figure
    paired = partial(metrics.paired_difference, labels=labels, patients=patients)
    crop = {name: (metrics.auroc(labels, one), 1) for name, one in (cropped or {}).items()}
    crop |= {name: of_crop(each, False) for name, each in runs.items()}
    crop |= {name: of_crop(each, True) for name, each in published.items()}
    out: dict[str, Any] = {}
    for name, seeds in scores.items():
        above, (low, high) = paired(metrics.auroc, scores=seeds, others=chance)
        to = {what: paired(metrics.auroc, scores=seeds, others=scores[one]) for what, one in others.items() if one}
        explained = [run["explained"] for run in runs.get(name, []) if run.get("explained") is not None]
        each = [metrics.average_precision(labels, one) for one in seeds]
        out[name] = {
            "trained": name not in forms,
            "seeds": len(seeds) if name not in forms else None,
            "auroc": above + 0.5,
            "auroc_ci": (low + 0.5, high + 0.5),
            "ap": float(np.mean(each)),
            **{what: (to[what][0], *to[what][1]) if what in to else None for what in PAIRED},
            "same_score": same_score(runs.get(name, [])),
            "central": crop.get(name),
            "explained": float(np.mean(explained)) if explained else None,
        }
    return {
        "best_closed_form": best,
        "best_trained_rival": trained,
        "n": len(rows),
        "n_abnormal": int(labels.sum()),
        "methods": out,
    }


def rows_of(found: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of the table, the highest AUROC first."""
    ends = lambda interval: f"{interval[0]:.3f} to {interval[1]:.3f}"
    above = lambda figure: "{:+.3f}, {:+.3f} to {:+.3f}".format(*figure) if figure else ""
    for name, one in sorted(found["methods"].items(), key=lambda item: -item[1]["auroc"]):
        name = f"**{name}**" if one["trained"] else name
        figures = (f"{one['auroc']:.3f}", ends(one["auroc_ci"]), f"{one['ap']:.3f}")
        middle, n = one["central"] or (None, 0)
        of = f" ({n} of {one['seeds']} seeds)" if one["trained"] and n < one["seeds"] else ""
        rival = "{}: {:.3f}".format(*one["same_score"]) if one["same_score"] else ""
        yield (
            name,
            one["seeds"] or "",
            *figures,
            *(above(one[what]) for what in PAIRED),
            "" if middle is None else f"{middle:.3f}{of}",
            rival,
            "" if one["explained"] is None else f"{one['explained']:.2f}",
        )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("--subset", default="", help="column of the manifest that marks the test rows")
    parser.add_argument("--runs", type=Path, default=Path("papers"), help="folder of the runs of `jmae papers`")
    options = parser.parse_args(argv)
    if not (folder := pack(options.pack)):
        return
    config, rows, tested = rows_of_manifest(str(folder / "manifest.csv"))
    entries = read_kept(options.pack)
    for method, seed, run in finished(options.runs, options.pack):
        if entry := entry_of(run, tested):
            entries[method, seed] = {"method": method, "seed": seed} | entry
    if not entries:
        print(f"not run: {options.runs} has no finished run of {options.pack}: train one by jmae papers")
        return
    runs = methods(entries.values(), cases_digest(tested))
    keep(options.pack, entries)
    if options.subset:
        runs, tested = of_subset(runs, tested, options.subset)
    cropped = {} if options.subset else closed_forms(config, rows, tested, CENTRAL)
    found = compared(runs, closed_forms(config, rows, tested), tested, cropped)
    head = (
        "method",
        "seeds",
        "AUROC",
        "95 %",
        "AP",
        f"above {found['best_closed_form']}, 95 %",
        f"above {found['best_trained_rival'] or 'a trained rival'}, 95 %",
        f"above {MIXED}, 95 %",
        f"central {CENTRAL:.0%}",
        "same score, best closed form",
        "explained",
    )
    name = ", ".join([options.pack, *([options.subset] if options.subset else [])])
    write(RESULTS, name, found | {"table": [head, (lines := list(rows_of(found)))]})
    print(table(head, lines))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
