"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR] [--debug]

Scores a split with a trained run and writes metrics.json, scores.csv, report.html and the maps, into DIR/evaluation
(`test`) or DIR/evaluation-SPLIT where no other folder is named; with another manifest one must be. Exit codes: 0 done;
2 the input or the environment is wrong.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jmae import baselines, checkpoint, metrics, recipe
from jmae.data.files import write_map
from jmae.data.loader import Images, in_order, lesion_mask, load_rows, region_mask, stored_image
from jmae.data.manifest import Row
from jmae.data.transforms import central, resize
from jmae.errors import InputError, exit_code
from jmae.reconstruct import fitting
from jmae.report import Case, choose_cases, without_curves, write_report
from jmae.run_folder import log, read_history, write_csv, write_text
from jmae.sharding import device_mesh, keep_compiled, replicated, split
from jmae.system import Results, System, load_system, stage_keys

CENTRAL = 0.8  # share of each axis that the central crop keeps


def main(argv: list[str]) -> int:
    given = recipe.arguments(argv, __doc__, ["workdir", "manifest", "split", "out"])
    if "workdir" not in given:
        raise InputError("no run folder: write --workdir=DIR")
    workdir = Path(given["workdir"])
    config = recipe.read(workdir)
    split = given.get("split", "test")
    if "manifest" in given:
        if "out" not in given:
            raise InputError("--manifest goes with --out=DIR: the run's own evaluation stays as it is")
        config.data.manifest = given["manifest"]
        # These are of the data trained on.
        config.data.anomaly_ratio, config.data.unlabeled_size, config.data.unlabeled_labels = -1.0, 0, ""
    keep_compiled()
    own = workdir / ("evaluation" if split == "test" else f"evaluation-{split}")
    system, out = load_system(config), Path(given.get("out", own))
    evaluate(config, system, load_rows(config, log), workdir, split=split, out=out)
    return 0


# --- scores -----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Scores of n rows by r replicates; higher is more abnormal."""

    maps: dict[str, np.ndarray]  # (r, n, *size)
    scores: dict[str, np.ndarray]  # (r, n)
    seconds: float = 0.0
    reconstruction: np.ndarray | None = None  # (r, n, *size, c), in the images' own range


def restore_results(config: ConfigDict, system: System, workdir: Path) -> Results:
    """What `system.score` reads, from the run folder's last checkpoints; raises InputError where one is missing."""
    results: dict[str, Any] = {}
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(device_mesh()))
    for number, stage in enumerate(system.stages):
        if stage.name not in system.uses:
            continue
        init = lambda key, results, stage=stage: stage.init(key, results, 1)
        target = jax.eval_shape(init if config.replicates == 1 else jax.vmap(init), stage_keys(config, number), results)
        target = jax.tree.map(place, target._replace(frozen={}))
        found = checkpoint.restore(workdir / "checkpoints" / stage.name, target, config=None, log=log)
        if not found:
            raise InputError(f"{workdir}: stage {stage.name} has no checkpoint: train it first (python -m jmae.train)")
        checkpoint.refuse_unfinished(workdir / "checkpoints" / stage.name, found[0], found[2])
        results[stage.name] = {"params": found[1].params, "stats": found[1].stats}
    return results


def scorer(config: ConfigDict, system: System, results: Results) -> Callable[[Images, np.ndarray], Scored]:
    """The function (images, row numbers) -> Scored, one compiled program for all batches.

    Batches are split over the devices; a case's result depends on neither, as its key comes from its id.
    """
    n, mesh = config.replicates, device_mesh()
    keys = jnp.stack([jax.random.key(config.seed + r) for r in range(n)])
    devices = mesh.shape["data"]
    b = -(-config.evaluation.batch // devices) * devices

    def score(results: Results, batch: Any, keys: Any, chunk: int) -> Any:
        one = lambda result, key: system.score(result, batch, key, chunk=chunk)
        if n > 1:
            return jax.vmap(one)(results, keys)
        return jax.tree.map(lambda x: x[None], one(results, keys[0]))

    shapes = {"image": (b, *config.data.size, config.data.channels), "case": (b, 2)}
    types = {"image": jnp.float32, "case": jnp.uint32}
    batch = {name: jax.ShapeDtypeStruct(shapes[name], types[name], sharding=split(mesh)) for name in shapes}
    program = jax.jit(score, static_argnums=3, out_shardings=replicated(mesh))
    compiled, chunk = fitting(
        lambda chunk: program.lower(results, batch, keys, chunk), config.evaluation.chunk or system.masks
    )
    if chunk < system.masks:
        log(f"scoring {chunk} of {system.masks} masks at a time")

    def run(images: Images, rows: np.ndarray) -> Scored:
        began, parts = time.monotonic(), []
        for used, host in in_order(images, rows, b):
            # This batch is dispatched before the one before is fetched.
            parts.append((used, compiled(results, jax.device_put(host, split(mesh)), keys)))
            parts[-2:-1] = [(k, jax.device_get(out)) for k, out in parts[-2:-1]]
        outs = [jax.tree.map(lambda x, k=k: x[:, :k], jax.device_get(out)) for k, out in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *outs)
        return Scored(joined["maps"], joined["scores"], time.monotonic() - began, joined.get("reconstruction"))

    return run


def baseline_scores(normals: Images, images: Images, n: int, *, share: float = 1.0, pixels: bool = False) -> Scored:
    """The cheap baselines on the first `n` of `images`, fitted to the training normals, both cut to the central
    `share`; with `pixels` also their maps. Images are shrunk one by one, as all may not fit in memory at once."""
    side = 64 if len(images.size) == 2 else 32
    cut = lambda image: np.stack([central(channel, share) for channel in np.moveaxis(image, -1, 0)], -1)
    small = lambda i, of: baselines.shrink(cut(of.image(np.array([i]))[0])[None], side)[0]
    train, test = (np.stack([small(i, of) for i in range(m)]) for of, m in ((normals, len(normals.rows)), (images, n)))
    scores, maps = baselines.image_scores(train, test), {}
    if pixels:
        whole = lambda of, m: of.image(np.arange(m))
        maps = baselines.pixel_maps(whole(normals, len(normals.rows)), whole(images, n))
    lead = lambda values: {name: np.asarray(value)[None] for name, value in values.items()}
    return Scored(lead(maps), lead(scores))


# --- figures ----------------------------------------------------------------------------------------------------------

Truth = dict[int, tuple[np.ndarray, np.ndarray | None]]  # (lesion mask, region) on a row's own grid, by row number


def read_truth(rows: Sequence[Row]) -> Truth:
    """Masks and regions of labelled rows, where any row has a mask. A normal row's mask is empty; an abnormal row
    without one is left out of pixel figures."""
    if not any(row.mask for row in rows):
        return {}
    truth = {}
    for i, row in enumerate(rows):
        if row.label == 0 or (row.label == 1 and row.mask):
            mask = lesion_mask(row)
            if mask is None:
                mask = np.zeros(stored_image(row).array.shape[:-1], bool)
            truth[i] = (mask, region_mask(row))
    return truth


def pixel_inputs(truth: Truth, maps: np.ndarray, inside: np.ndarray, share: float = 1.0) -> tuple[list, list, list]:
    """(masks, maps, regions) of the rows `inside`, each map (n, *size) enlarged to its row's own grid, all cut to the
    central `share` there."""
    used = [i for i in truth if inside[i]]
    grown = [resize(maps[i][..., None], truth[i][0].shape)[..., 0] for i in used]
    view = lambda x: x if x is None or share == 1 else central(x, share)
    return [view(truth[i][0]) for i in used], [view(m) for m in grown], [view(truth[i][1]) for i in used]


def mean_of(each: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of equal dicts of numbers and lists of numbers, key by key; counts stay whole; None of none."""
    if len(each) < 2:
        return dict(each[0]) if each else None
    same = lambda value: value is None or isinstance(value, int)
    return {k: v if same(v) else np.mean([e[k] for e in each], axis=0) for k, v in each[0].items()}


def figures(
    scored: Scored, inside: np.ndarray, *, rows: Sequence[Row], truth: Truth, draws: int, share: float = 1.0
) -> dict[str, dict[str, Any]]:
    """{NAME: {"image", "pixel"}} of every score and map over the rows `inside`; pixels are cut to the central `share`;
    `draws` of the bootstrap.

    With replicates each figure is the mean over them, and "replicates" holds their means and 1.96 deviations.
    """
    labels = np.array([row.label for row, used in zip(rows, inside, strict=True) if used], bool)
    patients = [row.patient for row, used in zip(rows, inside, strict=True) if used]
    lesions = any(truth[i][0].any() for i in truth if inside[i])
    out: dict[str, dict[str, Any]] = {}
    for name in scored.scores | scored.maps:
        values = scored.scores.get(name, ())
        image = [metrics.image_metrics(labels, v[inside], patients, draws=draws) for v in values]
        maps = scored.maps.get(name, ()) if lesions else ()
        pixel = [metrics.pixel_metrics(*pixel_inputs(truth, m, inside, share)) for m in maps]
        out[name] = {"image": mean_of(image), "pixel": mean_of(pixel)}
        if len(image) > 1:
            out[name]["replicates"] = {k: metrics.replicate_summary([e[k] for e in image]) for k in ("auroc", "ap")}
    return out


def central_scores(scored: Scored) -> Scored:
    """The scores that have a map, as the mean over its central crop; the maps stay whole."""
    mean = lambda maps: np.array([[central(m, CENTRAL).mean() for m in replicate] for replicate in maps])
    return Scored(scored.maps, {name: mean(scored.maps[name]) for name in scored.scores if name in scored.maps})


def part_figures(scored: Scored, cheap: Scored, inside: np.ndarray, *, primary: str, **how: Any) -> dict[str, Any]:
    """What metrics.json says of one part of the split: the primary score's figures at the top, then those of all
    scores, and of the baselines `cheap`; `how` goes to `figures`."""
    scores, baseline = figures(scored, inside, **how), figures(cheap, inside, **how)
    # Which end of the brightness scale is abnormal is not the library's to know: the better one is the baseline.
    ends = [name for name in ("mean intensity", "low mean intensity") if name in baseline]
    for name in sorted(ends, key=lambda name: baseline[name]["image"]["auroc"])[:-1]:
        del baseline[name]
    top = scores.get(primary, {"image": None, "pixel": None})
    return {"n": int(inside.sum()), **top, "scores": scores, "baselines": baseline}


# --- the evaluation ---------------------------------------------------------------------------------------------------


def evaluate(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, *, split: str, out: Path
) -> dict[str, Any]:
    """Scores `split` of `rows`, writes metrics.json, scores.csv, report.html and maps into `out`; returns the metrics.

    Labels of the split and of `val` serve figures alone. Raises InputError where the split is empty.
    """
    began = time.monotonic()
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise InputError(f"split {split!r} has no rows: one of {', '.join(sorted({row.split for row in rows}))}")
    val = [row for row in rows if row.split == "val" and row.label is not None]
    train = [row for row in rows if row.split == "train" and row.label != 1]
    run = scorer(config, system, restore_results(config, system, workdir))
    images = Images(chosen + val, config)
    log(f"{split}: scoring {len(chosen)} cases")
    scored = run(images, np.arange(len(chosen)))
    primary, maps = system.primary, scored.maps.get(system.primary)
    labels = np.array([-1 if row.label is None else row.label for row in chosen])
    known = labels >= 0

    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split,
        "n": len(chosen),
        "n_normal": int((labels == 0).sum()),
        "n_abnormal": int((labels == 1).sum()),
        "primary": primary,
        "image": None,
        "pixel": None,
        "scores": {},
        "subsets": {},
        "per_patient": None,
        "baselines": {},
        "decision": None,
        "chi2": None,
    }
    truth = read_truth(chosen) if scored.maps else {}
    if known.any():
        normals = Images(train, config) if train else None
        whole = cropped = Scored({}, {})
        if not normals:
            log("warning: the manifest has no train rows: no cheap baselines")
        if normals:
            whole = baseline_scores(normals, images, len(chosen), pixels=bool(truth))
            cropped = baseline_scores(normals, images, len(chosen), share=CENTRAL)
        part = partial(part_figures, primary=primary, rows=chosen, truth=truth, draws=config.evaluation.draws)
        evaluation |= part(scored, whole, known) | {"n": len(chosen)}
        for column in config.evaluation.subsets:
            if column not in chosen[0].extra:
                log(f"warning: no column {column!r} in the manifest: no figures of that subset")
                continue
            inside = known & np.array([row.extra[column] not in ("", "0") for row in chosen])
            evaluation["subsets"][column] = part(scored, whole, inside)
        evaluation["subsets"][f"central {CENTRAL:.0%}"] = part(central_scores(scored), cropped, known, share=CENTRAL)
        if truth and maps is not None:
            masks, grown, regions = pixel_inputs(truth, maps[0], known)
            patients = [chosen[i].patient for i in truth]
            evaluation["per_patient"] = metrics.pixel_metrics_per_patient(masks, grown, patients, regions)
        values = scored.scores[primary][:, known]
        if split != "val" and {row.label for row in val} == {0, 1}:  # val itself chose the threshold
            on_val = run(images, len(chosen) + np.arange(len(val))).scores[primary]
            labels_val = np.array([row.label for row in val], int)
            thresholds = [metrics.threshold_on(labels_val, v) for v in on_val]
            evaluation["decision"] = mean_of(
                [metrics.at_threshold(labels[known], v, t) for v, t in zip(values, thresholds, strict=True)]
            )
        evaluation["chi2"] = mean_of(
            [metrics.chi2_distance(v[labels[known] == 0], v[labels[known] == 1]) for v in values]
        )

    means = {name: values.mean(0) for name, values in scored.scores.items()}
    further = [name for name in means if name != primary]
    table = [
        {"id": row.id, "label": row.label, "score": float(means[primary][i]), "p_value": None}
        | {name: float(means[name][i]) for name in further}
        for i, row in enumerate(chosen)
    ]
    evaluation["seconds"] = time.monotonic() - began
    evaluation["seconds_per_case"] = scored.seconds / len(chosen)
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    if config.evaluation.maps and maps is not None:
        (out / "maps").mkdir(parents=True, exist_ok=True)
        for row, own in zip(chosen, maps.mean(0), strict=True):
            like = stored_image(row)
            write_map(out / "maps" / f"{row.id}_anomaly", resize(own[..., None], like.array.shape[:-1])[..., 0], like)
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))

    cases = []
    if maps is not None:
        groups = choose_cases([row.label for row in chosen], means[primary].tolist())
        for i in sorted({i for group in groups.values() for i in group}):
            own = maps[:, i].mean(0)
            mask = resize(truth[i][0][..., None].astype(np.float32), own.shape)[..., 0] > 0.5 if i in truth else None
            image, normal = images.image(np.array([i]))[0], scored.reconstruction
            score, normal = float(means[primary][i]), None if normal is None else normal[:, i].mean(0)
            cases.append(Case(chosen[i].id, chosen[i].label, score, image, own, mask, normal))
    environment = workdir / "environment.json"
    about = json.loads(environment.read_text()) if environment.exists() else {}
    history = read_history(workdir / "metrics.jsonl")
    write_report(out / "report.html", {**evaluation, "table": table}, cases, history, config.to_dict(), about)
    log(headline(evaluation))
    log(f"report: {out / 'report.html'}")
    return evaluation


def headline(evaluation: Mapping[str, Any]) -> str:
    """What the command says at its end."""

    def line(name: str, image: Mapping[str, Any]) -> str:
        low, high = image["auroc_ci"]
        return f"  {name:<24} AUROC {image['auroc']:.3f} [{low:.3f}, {high:.3f}]  AP {image['ap']:.3f}"

    unknown = evaluation["n"] - evaluation["n_normal"] - evaluation["n_abnormal"]
    counts = f"{evaluation['split']}: {evaluation['n_normal']} normal, {evaluation['n_abnormal']} abnormal"
    counts += f", {unknown} of unknown label" if unknown else ""
    if reason := without_curves(evaluation):
        return f"{counts}\n{reason}"
    primary = evaluation["primary"]
    lines = [counts]
    lines += [line(name + " *" * (name == primary), s["image"]) for name, s in evaluation["scores"].items()]
    cheap = [line(name, s["image"]) for name, s in evaluation["baselines"].items() if s["image"]]
    return "\n".join([*lines, *(["cheap baselines:"] if cheap else []), *cheap])


if __name__ == "__main__":
    sys.exit(exit_code(main))
