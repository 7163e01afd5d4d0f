"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR] [--debug]

Scores a split with a trained run and writes metrics.json, scores.csv, report.html and the maps. Exit codes: 0 done; 2
the input or the environment is wrong.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jmae import baselines, checkpoint, metrics, recipe
from jmae.data.files import write_map
from jmae.data.loader import Images, in_order, lesion_mask, load_rows, region_mask, stored_image
from jmae.data.manifest import Row
from jmae.data.transforms import central, resize
from jmae.errors import InputError, exit_code
from jmae.reconstruct import fitting
from jmae.report import Case, choose_cases, write_report
from jmae.run_folder import log, write_csv, write_text
from jmae.system import Results, System, load_system, stage_keys

CENTRAL = 0.8  # share of each axis that the central crop keeps


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    values = flags.FlagValues()
    for name, default in {"workdir": None, "manifest": None, "split": "test", "out": None}.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    try:
        rest = values(["jmae", *argv])[1:]
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    if rest or not values.workdir:
        raise InputError(f"{rest[0]!r} is no flag" if rest else "no run folder: --workdir DIR")
    workdir = Path(values.workdir)
    if not (workdir / "config.json").is_file():
        raise InputError(f"{workdir}: no config.json: name the folder of a run (python -m jmae.train)")
    config = recipe.from_json((workdir / "config.json").read_text())
    if values.manifest:
        config.data.manifest = values.manifest
    out = Path(values.out) if values.out else workdir / "evaluation"
    evaluate(config, load_system(config), load_rows(config), workdir, split=values.split, out=out)
    return 0


def restore_results(config: ConfigDict, system: System, workdir: Path) -> Results:
    """What `system.score` reads, from the run folder's last checkpoints; raises InputError where one is missing."""
    results: dict[str, Any] = {}
    for number, stage in enumerate(system.stages):
        if stage.name not in system.uses:
            continue
        init = lambda key, results, stage=stage: stage.init(key, results, 1)
        keys = stage_keys(config, number)
        target = jax.eval_shape(init if config.replicates == 1 else jax.vmap(init), keys, results)
        folder = workdir / "checkpoints" / stage.name
        found = checkpoint.restore(folder, target._replace(frozen={}), config=None, log=log)
        if not found:
            raise InputError(f"{workdir}: stage {stage.name} has no checkpoint: train it first (python -m jmae.train)")
        results[stage.name] = {"params": found[1].params, "stats": found[1].stats}
    return results


class Scored:
    """Scores of rows: `maps[name]` (r, n, *size) and `scores[name]` (r, n), r replicates; `seconds` of scoring."""

    def __init__(self, config: ConfigDict, system: System, results: Results, images: Images, rows: np.ndarray):
        key = jax.random.key(config.seed)
        n = config.replicates
        keys = key if n == 1 else jnp.stack([jax.random.key(config.seed + r) for r in range(n)])

        def score(results: Results, batch: Any, key: Any, chunk: int) -> Any:
            if n == 1:
                return system.score(results, batch, key, chunk=chunk)
            return jax.vmap(lambda r, k: system.score(r, batch, k, chunk=chunk))(results, key)

        parts, compiled = [], None
        for part, batch in in_order(images, rows, config.evaluation.batch):
            if compiled is None:
                lower = lambda chunk: jax.jit(score, static_argnums=3).lower(results, batch, keys, chunk)  # noqa: B023
                compiled, chunk = fitting(lower, config.evaluation.chunk or system.masks)
                if chunk < system.masks:
                    log(f"scoring {chunk} of {system.masks} masks at a time")
                began = time.monotonic()
            # The next batch is dispatched before this one is fetched.
            parts.append((len(part), compiled(results, batch, keys)))
            if len(parts) > 1:
                parts[-2] = (parts[-2][0], jax.device_get(parts[-2][1]))
        parts = [(k, jax.device_get(out)) for k, out in parts]
        self.seconds = time.monotonic() - began
        lead = lambda x, k: x[None, :k] if n == 1 else x[:, :k]
        joined = jax.tree.map(
            lambda *x: np.concatenate(x, axis=1), *(jax.tree.map(lambda x, k=k: lead(x, k), o) for k, o in parts)
        )
        self.maps, self.scores = joined["maps"], joined["scores"]


def evaluate(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, *, split: str, out: Path
) -> dict[str, Any]:
    """Scores `split` of `rows`, writes metrics.json, scores.csv, report.html and maps into `out`; returns the metrics.

    Labels of the split and of `val` are used for figures alone. Raises InputError where the split is empty.
    """
    began = time.monotonic()
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise InputError(f"split {split!r} has no rows: one of {', '.join(sorted({row.split for row in rows}))}")
    results = restore_results(config, system, workdir)
    val = [row for row in rows if row.split == "val" and row.label is not None]
    images = Images(chosen + val, config)
    scored = Scored(config, system, results, images, np.arange(len(chosen)))
    labels = np.array([-1 if row.label is None else row.label for row in chosen])
    known = labels >= 0

    truth = Truth(chosen, scored.maps)
    table = [
        {
            "id": row.id,
            "label": row.label,
            "score": float(scored.scores[system.primary][:, i].mean()),
            "p_value": None,
            **{name: float(values[:, i].mean()) for name, values in scored.scores.items()},
        }
        for i, row in enumerate(chosen)
    ]
    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split,
        "n": len(chosen),
        "n_normal": int((labels == 0).sum()),
        "n_abnormal": int((labels == 1).sum()),
        "primary": system.primary,
        "image": None,
        "pixel": None,
    }
    if {0, 1} <= set(labels.tolist()):
        both = Figures(chosen, labels, scored, truth, system.primary)
        train = [row for row in rows if row.split == "train"]
        normals = Images(train, config) if train else None
        evaluation |= both.of(known)
        evaluation["subsets"] = {}
        for column in config.evaluation.subsets:
            inside = known & np.array([row.extra.get(column, "") not in ("", "0") for row in chosen])
            evaluation["subsets"][column] = {"n": int(inside.sum()), **both.of(inside)}
        evaluation["baselines"] = baseline_figures(normals, images, chosen, labels, known, truth)
        for column in config.evaluation.subsets:
            inside = known & np.array([row.extra.get(column, "") not in ("", "0") for row in chosen])
            evaluation["subsets"][column]["baselines"] = baseline_figures(
                normals, images, chosen, labels, inside, truth
            )
        crop = f"central {CENTRAL:.0%}"
        evaluation["subsets"][crop] = {"n": int(known.sum()), **both.of(known, share=CENTRAL)}
        evaluation["subsets"][crop]["baselines"] = baseline_figures(
            normals, images, chosen, labels, known, truth, share=CENTRAL
        )
        evaluation["decision"] = decision(config, system, results, images, chosen, val, labels, known, scored)
        primary = scored.scores[system.primary][0]
        evaluation["chi2"] = metrics.chi2_distance(primary[labels == 0], primary[labels == 1])
    evaluation["seconds"] = time.monotonic() - began
    evaluation["scoring_seconds_per_case"] = scored.seconds / len(chosen)
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    map_of = scored.maps.get(system.primary)
    if config.evaluation.maps and map_of is not None:
        (out / "maps").mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(chosen):
            like = stored_image(row)
            whole = resize(map_of[:, i].mean(0)[..., None], like.array.shape[:-1])[..., 0]
            write_map(out / "maps" / f"{row.id}_anomaly", whole, like)
    cases = []
    if map_of is not None:
        groups = choose_cases([row.label for row in chosen], [line["score"] for line in table])
        for i in sorted({i for group in groups.values() for i in group}):
            row = chosen[i]
            cases.append(
                Case(
                    row.id,
                    row.label,
                    table[i]["score"],
                    images.image(np.array([i]))[0],
                    map_of[:, i].mean(0),
                    truth.shrunk(i),
                )
            )
    history = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        if (workdir / "metrics.jsonl").exists()
        else []
    )
    environment = json.loads((workdir / "environment.json").read_text())
    write_report(out / "report.html", {**evaluation, "table": table}, cases, history, config.to_dict(), environment)
    log(headline(evaluation, out))
    return evaluation


class Truth:
    """Lesion masks and regions of rows on their own grids, where the set has masks; a normal row's is empty, an
    abnormal row without one is left out of pixel figures."""

    def __init__(self, rows: Sequence[Row], maps: Any):
        self.rows = rows
        self.any = bool(maps) and any(row.mask for row in rows)
        self.size = next(iter(maps.values())).shape[2:] if maps else ()
        self.masks: dict[int, np.ndarray] = {}
        self.regions: dict[int, np.ndarray | None] = {}
        for i, row in enumerate(rows) if self.any else ():
            if row.label == 0 or row.mask:
                mask = lesion_mask(row)
                self.masks[i] = np.zeros(stored_image(row).array.shape[:-1], bool) if mask is None else mask
                self.regions[i] = region_mask(row)

    def figures(self, maps: np.ndarray, inside: np.ndarray, share: float = 1.0) -> dict[str, Any] | None:
        """Pixel metrics of maps (n, *size), each enlarged to its own grid; `share` scores the central crop alone."""
        used = [i for i in self.masks if inside[i]]
        if not any(self.masks[i].any() for i in used):
            return None
        view = lambda x: x if x is None or share == 1 else central(x, share)
        grown = [resize(maps[i][..., None], self.masks[i].shape)[..., 0] for i in used]
        return metrics.pixel_metrics(
            [view(self.masks[i]) for i in used], [view(m) for m in grown], [view(self.regions[i]) for i in used]
        )

    def shrunk(self, i: int) -> np.ndarray | None:
        """The mask at the maps' size, for pictures."""
        mask = self.masks.get(i)
        return None if mask is None else resize(mask[..., None].astype(np.float32), self.size)[..., 0] > 0.5


class Figures:
    """Image and pixel figures of every score, over replicates."""

    def __init__(self, rows: Sequence[Row], labels: np.ndarray, scored: Scored, truth: Truth, primary: str):
        self.rows, self.labels, self.scored, self.truth, self.primary = rows, labels, scored, truth, primary

    def of(self, inside: np.ndarray, share: float = 1.0) -> dict[str, Any]:
        """Figures of the rows `inside`; with a `share`, of the maps' central crop alone (scores without a map: None).

        With replicates, each figure is the mean over them, and "replicates" holds mean and 1.96 deviations.
        """
        patients = [row.patient for row, used in zip(self.rows, inside, strict=True) if used]
        scores, spread = {}, {}
        for name, values in self.scored.scores.items():
            maps = self.scored.maps.get(name)
            if share != 1:
                if maps is None:
                    scores[name] = {"image": None, "pixel": None}
                    continue
                values = np.stack([[float(central(m, share).mean()) for m in replicate] for replicate in maps])
            each = [metrics.image_metrics(self.labels[inside], v[inside], patients) for v in values]
            pixel = (
                [self.truth.figures(m, inside, share) for m in maps] if maps is not None and self.truth.any else [None]
            )
            scores[name] = {"image": mean_of(each), "pixel": mean_of(pixel)}
            spread[name] = {k: metrics.replicate_summary([e[k] for e in each]) for k in ("auroc", "ap")}
        out = {**scores[self.primary], "scores": scores}
        return out | ({"replicates": spread} if len(values) > 1 else {})


def mean_of(each: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The mean of equal dicts of numbers and lists of numbers, key by key."""
    if each[0] is None:
        return None
    return {k: None if v is None else np.mean([e[k] for e in each], axis=0) for k, v in each[0].items()}  # type: ignore[index]


def baseline_figures(
    normals: Images | None,
    images: Images,
    rows: Sequence[Row],
    labels: np.ndarray,
    inside: np.ndarray,
    truth: Truth,
    share: float = 1.0,
) -> dict[str, Any]:
    """Figures of the cheap baselines on the same rows, fitted to the training normals."""
    if normals is None:
        return {}
    cut = lambda x: x if share == 1 else np.stack([central(i, share) for i in x])
    train = cut(normals.image(np.arange(len(normals.rows))))
    test = cut(images.image(np.arange(len(rows))))
    patients = [row.patient for row, used in zip(rows, inside, strict=True) if used]
    out: dict[str, Any] = {
        name: {"image": metrics.image_metrics(labels[inside], values[inside], patients), "pixel": None}
        for name, values in baselines.image_scores(train, test).items()
    }
    # Which end of the brightness scale is abnormal is not the library's to know: the better one is the baseline.
    names = ("mean intensity", "low mean intensity")
    del out[min(names, key=lambda name: out[name]["image"]["auroc"])]
    if truth.any and share == 1:
        for name, maps in baselines.pixel_maps(train, test).items():
            out.setdefault(name, {"image": None, "pixel": None})["pixel"] = truth.figures(maps, inside)
    return out


def decision(config, system, results, images, chosen, val, labels, known, scored) -> dict[str, float] | None:
    """Accuracy, F1, sensitivity and specificity of the primary score at the threshold that `val` chooses (first
    replicate); None where `val` lacks a class."""
    if {row.label for row in val} != {0, 1}:
        return None
    on_val = Scored(config, system, results, images, np.arange(len(chosen), len(chosen) + len(val)))
    threshold = metrics.threshold_on(np.array([row.label for row in val]), on_val.scores[system.primary][0])
    return metrics.at_threshold(labels[known], scored.scores[system.primary][0][known], threshold)


def headline(evaluation: dict[str, Any], out: Path) -> str:
    """What the command says at its end."""
    lines = []
    if evaluation["image"]:
        line = lambda name, m: (
            f"  {name:<24} AUROC {m['auroc']:.3f} [{m['auroc_ci'][0]:.3f}, {m['auroc_ci'][1]:.3f}]  AP {m['ap']:.3f}"
        )
        lines = [f"{evaluation['split']}: {evaluation['n_normal']} normal, {evaluation['n_abnormal']} abnormal"]
        lines += [
            line(name + (" *" if name == evaluation["primary"] else ""), s["image"])
            for name, s in evaluation["scores"].items()
        ]
        lines += ["cheap baselines:"] + [
            line(name, s["image"]) for name, s in evaluation["baselines"].items() if s["image"]
        ]
    return "\n".join([*lines, f"report: {out / 'report.html'}"])


if __name__ == "__main__":
    sys.exit(exit_code(main))
