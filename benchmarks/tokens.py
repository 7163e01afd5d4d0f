"""Answers what the score of the nearest normal token left open, on AMAE's networks.

    JMAE_DATA=FOLDER python -m benchmarks.tokens cxr_peds --seeds 0 1 2               # all networks
    JMAE_DATA=FOLDER python -m benchmarks.tokens cxr_nih --subset matched             # adults, and the matched ones
    JMAE_DATA=FOLDER python -m benchmarks.tokens cxr_peds --only normals --budget 0.1
    python -m benchmarks.tokens phantoms --only normals                               # built-in phantoms

Networks: `normals` sees normal images alone (96 pixels, the preset `small`); `narrow`, `wide`, `deep` and `long` change
its width, depth or steps; `stage2` is AMAE with unlabelled images. A fifth of the training patients is kept apart.

Of each network, AUROC and AP on `test` with 95 % intervals over patients, and the share of normal test images above the
threshold that one in twenty of the normals kept apart exceeds:
  - positions: the inner tokens, as many random ones (five draws), all tokens;
  - layers: each block;
  - ways: bank of each position, one bank, Gaussians, one covariance, coreset;
  - tolerances: 0, 1 and 2 tokens;
  - banks: normals that were trained on, and as many that were kept apart (the other half of them gives the threshold);
  - an untrained network;
  - ridge regression of tokens, normals against unlabelled images, where there are some;
  - with AMAE's modules: the token score of each, and their signed difference; and in module B the distance to normal
    less the distance to its own training images.

benchmarks/results/tokens.json keeps every result by pack, network, budget and seed; what is there is not run again.
"""

import argparse
import csv
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import add_options, key_of, over_seeds, pack, trained
from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results" / "tokens.json"
NORMALS = {"variant": "one_class", "adapt.steps": 1, "data.calibration": 0.2}  # module A is not looked at
NETWORKS: dict[str, dict[str, Any]] = {
    "normals": NORMALS,
    "narrow": NORMALS | {"model.width": 96, "model.heads": 3},
    "wide": NORMALS | {"model.width": 384, "model.heads": 12},
    "deep": NORMALS | {"model.depth": 12},
    "long": NORMALS | {"pretrain.steps": 8000},
    "stage2": {"variant": "stage2", "data.calibration": 0.2},
}
BATCH, BANK, DRAWS, RATE = 64, 1500, 5, 0.05
PENALTY = 1000.0  # of the ridge regression, as of the library's baseline


class Run:
    """The networks of a run folder with the images of their data, and their tokens."""

    def __init__(self, folder: Path):
        import jax

        from jmae import recipe
        from jmae.data.cases import load_cases
        from jmae.inference import restore_stages
        from jmae.patches import grid_of
        from jmae.system import load_system
        from jmae.systems.amae import networks_of

        self.folder, self.config = folder, recipe.read(folder)
        system, data = load_system(self.config), self.config.data
        self.cases = load_cases(self.config, scored=("val", "test"), trained=lambda rows: rows)
        self.networks = networks_of(self.config)
        self.grid = grid_of(tuple(data.size), tuple(self.config.model.patch))
        results = restore_stages(self.config, system, folder)
        self.params = {n: r["params"] for n, r in results.items() if n in ("pretrain", "module_a", "module_b")}
        self.params["untrained"] = self.networks.mae_init(jax.random.key(self.config.seed))[0]
        rows = self.cases.rows
        module_b = {line["id"] for line in self._labels() if line["module"] == "B"}
        chosen: dict[str, Callable[[Any], bool]] = {
            "train": lambda row: row.split == "train" and row.label != 1,
            "apart": lambda row: row.kept,
            "test": lambda row: row.split == "test" and row.label is not None,
            "unlabeled": lambda row: row.split == "unlabeled",
            "module_b": lambda row: row.id in module_b,
        }
        self.rows = {name: [row for row in rows if wanted(row)] for name, wanted in chosen.items()}
        self.tokens = cache(self._tokens)

    def _labels(self) -> list[dict[str, str]]:
        file = self.folder / "labels.csv"
        return list(csv.DictReader(file.open())) if file.is_file() else []

    def _tokens(self, rows: str, positions: tuple[int, ...], layer: int = 0, stage: str = "pretrain") -> np.ndarray:
        """Tokens (n, k, d) of the images of some rows."""
        import jax

        from jmae.masked import standardised
        from jmae.patches import patchify
        from jmae.tokens import token_features

        where = np.array(positions)

        @jax.jit
        def features(params: Any, image: Any) -> Any:
            patches = patchify(standardised(image, self.config), tuple(self.config.model.patch))
            return token_features(self.networks.mae_of(params), patches, where, layer)

        images, found = self.cases.images(self.rows[rows]), []
        for start in range(0, len(images.rows), BATCH):
            numbers = np.minimum(np.arange(start, start + BATCH), len(images.rows) - 1)
            part = np.asarray(features(self.params[stage], images.image(numbers)))
            found.append(part[: len(images.rows) - start])
        return np.concatenate(found)


def scored(
    bank: np.ndarray, others: Mapping[str, np.ndarray], near: np.ndarray, way: str = "position", coreset: bool = False
) -> dict[str, np.ndarray]:
    """The scores of images by their tokens (n, k, d), against the tokens of normal images."""
    import jax
    import jax.numpy as jnp

    from jmae.tokens import distances, learned, score_of

    kept = jax.tree.map(jnp.asarray, learned(bank, near, way, size=BANK, coreset=coreset, seed=0))
    score = jax.jit(lambda kept, tokens: score_of(distances(tokens, kept)))

    def one(tokens: np.ndarray) -> np.ndarray:
        parts = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
        return np.concatenate([np.asarray(score(kept, part)) for part in parts])

    return {name: one(tokens) for name, tokens in others.items()}


def ridge(known: np.ndarray, mixed: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression of known normals (-1) against mixed images (+1), by rows of values standardised over all: its
    value for new rows."""
    from jmae.ridge import standardised_ridge

    weights, offset = standardised_ridge(known, mixed, PENALTY)
    return new @ weights + offset


def questions(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """{score: {"test": scores of the test images, "apart": of the normals kept apart}} of a run."""
    from jmae.tokens import inner, neighbours

    found: dict[str, dict[str, np.ndarray]] = {}

    def take(name: str, positions: np.ndarray, tolerance: int = 1, how: Any = (), **which: Any) -> None:
        tokens = partial(run.tokens, positions=tuple(positions.tolist()), **which)
        others = {part: tokens(part) for part in ("test", "apart")}
        found[name] = scored(tokens("train"), others, neighbours(run.grid, positions, tolerance), **dict(how))

    inside, everything = inner(run.grid, 1), inner(run.grid, 0)
    take("inner", inside)
    take("all tokens", everything)
    for draw in range(DRAWS):
        some = np.random.default_rng(draw).choice(everything, len(inside), replace=False)
        take(f"as many random tokens, draw {draw}", np.sort(some))
    for layer in range(1, run.config.model.depth + 1):
        take(f"block {layer}", inside, layer=layer)
    for way in ("global", "gaussian", "mahalanobis"):
        take(way, inside, how={"way": way})
    take("coreset", inside, how={"coreset": True})
    for tolerance in (0, 2):
        take(f"tolerance {tolerance}", inside, tolerance=tolerance)
    take("untrained", inside, stage="untrained")

    tokens, near = partial(run.tokens, positions=tuple(inside.tolist())), neighbours(run.grid, inside)
    apart, half = tokens("apart"), len(run.rows["apart"]) // 2
    others = {"test": tokens("test"), "apart": apart[half:]}
    number = min(half, len(run.rows["train"]))
    found[f"bank of {number} trained on"] = scored(tokens("train")[:number], others, near)
    found[f"bank of {number} kept apart"] = scored(apart[:number], others, near)
    if run.rows["unlabeled"] and "module_b" in run.params:
        known, mixed = tokens("train"), tokens("unlabeled")
        flat = lambda array: array.reshape(len(array), -1)
        parts = {part: tokens(part) for part in ("test", "apart")}
        found["ridge of tokens"] = {p: ridge(flat(known), flat(mixed), flat(t)) for p, t in parts.items()}
        mean = lambda array: array.mean(1)
        found["ridge of mean tokens"] = {p: ridge(mean(known), mean(mixed), mean(t)) for p, t in parts.items()}
    if "module_b" in run.params:
        of = lambda stage, rows: tokens(rows, stage=stage)
        parts = lambda stage: {part: of(stage, part) for part in ("test", "apart")}
        for stage in ("module_a", "module_b"):
            found[stage] = scored(of(stage, "train"), parts(stage), near)
        own = scored(of("module_b", "module_b"), parts("module_b"), near)
        minus = lambda a, b: {part: a[part] - b[part] for part in a}
        found["module A less module B"] = minus(found["module_a"], found["module_b"])
        found["module B: normals less its own images"] = minus(found["module_b"], own)
    return found


def figures(folder: Path, subset: str) -> dict[str, Any]:
    """The figures of all scores of a run."""
    from jmae import metrics
    from jmae.p_values import alarm_threshold

    run = Run(folder)
    rows = run.rows["test"]
    labels, patients = np.array([row.label for row in rows], bool), np.array([row.patient for row in rows])
    views = {"whole": np.ones(len(rows), bool)}
    if subset:
        views[subset] = np.array([dict(row.extra).get(subset, "") not in ("", "0") for row in rows])
    out: dict[str, Any] = {}
    for name, scores in questions(run).items():
        limit = alarm_threshold(scores["apart"].tolist(), RATE)
        alarms = None if limit is None else float(np.mean(scores["test"][~labels] > limit))
        view = lambda inside, s=scores["test"]: metrics.image_metrics(labels[inside], s[inside], patients[inside])
        out[name] = {"false_alarms": alarms} | {v: view(inside) for v, inside in views.items()}
    return {"tokens": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", help="a folder of JMAE_DATA, or phantoms")
    parser.add_argument("--subset", default="", help="column of the manifest; its rows have figures of their own, too")
    parser.add_argument("--preset", default="")
    parser.add_argument("--workdir", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_options(parser)
    options = parser.parse_args()
    own = options.pack == "phantoms"
    if not own and not (folder := pack(options.pack)):
        return
    preset = options.preset or ("phantom" if own else "small")
    given = [f"--config=configs/amae.py:{preset}", "--config.evaluation.maps=False"]
    given += [] if own else [f"--config.data.manifest={folder / 'manifest.csv'}"]
    settings = {
        name: [*given, *(f"--config.{k}={v}" for k, v in changes.items())] for name, changes in NETWORKS.items()
    }
    what = ", ".join([options.pack, *([options.subset] if options.subset else [])])
    extra = partial(figures, subset=options.subset)
    trained(options.out, what, settings, options, folder=options.workdir, extra=extra)
    there, rows = json.loads(options.out.read_text()), []
    for name in settings:  # the table has all results of this budget, those of earlier calls included
        begins = key_of(what, name, options.budget, 0).removesuffix("0")
        if not (results := [result for key, result in there.items() if key.startswith(begins)]):
            continue
        for score, parts in results[0]["tokens"].items():
            for view in [v for v in parts if v != "false_alarms"]:
                auroc, ap = (over_seeds(results, "tokens", score, view, key) for key in ("auroc", "ap"))
                alarms = over_seeds(results, "tokens", score, "false_alarms")
                rows.append((name, len(results), score, view, auroc, ap, alarms))
    head = ("network", "seeds", "score", "view", "AUROC", "AP", "false alarms at 5 %")
    write(options.out, f"{what}, budget {options.budget:g}, table", {"table": [head, rows]})
    print(table(head, rows))


if __name__ == "__main__":
    main()
