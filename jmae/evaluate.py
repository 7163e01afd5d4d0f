"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR]
                         [--config.evaluation.KEY=VALUE ...] [--config.data.allow_leaks=True] [--debug]

Scores a split with a trained run and writes metrics.json, scores.csv, report.html and the maps, into DIR/evaluation
(`test`) or DIR/evaluation-SPLIT where no other folder is named; with another manifest one must be. Of that no case may
be of a patient, or have an image, that the run was trained or calibrated on; with data.allow_leaks these are told, have
no p-value, and mark the report. Copies that are not equal value by value are not looked for there. The splits `train`
and `unlabeled` get no p-values. Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jmae import metrics, recipe
from jmae.baselines import baseline_scores, volume_baselines
from jmae.calibration import (
    NO_OTHERS,
    alarm_rate,
    alarms,
    calibrate,
    colours_of,
    held_images,
    held_volumes,
    other_rows,
    read_calibration,
    score_line,
)
from jmae.cards import rows_digest, write_cards
from jmae.convergence import convergence
from jmae.data.crops import Volumes
from jmae.data.files import write_map
from jmae.data.loader import Images, load_rows
from jmae.data.manifest import Row
from jmae.data.transforms import central
from jmae.data.volumes import Volume
from jmae.errors import InputError, exit_code
from jmae.figures import (
    CENTRAL,
    WHOLE,
    Gathered,
    Held,
    Part,
    Split,
    beside_printed,
    held_out,
    of_scores,
    part_figures,
    parts_of,
    read_truth,
    split_of,
)
from jmae.inference import (
    Result,
    Scored,
    image_results,
    own_maps,
    own_results,
    restore_results,
    scorer,
    shown_map,
    sweeper,
    volume_results,
)
from jmae.processes import join_processes, keep_compiled
from jmae.report import Case, choose_cases, no_curves_reason, one_slice, slice_side, write_report
from jmae.run_folder import log, output_folder, read_history, recipe_digest, write_csv, write_text
from jmae.seen import ALLOW, not_seen, not_seen_before
from jmae.system import Results, System, load_system


def main(argv: list[str]) -> int:
    given = recipe.arguments(argv, __doc__, ["workdir", "manifest", "split", "out", "config"])
    own = "manifest" not in given and not any(flag.startswith("config") for flag in given)
    if ALLOW in given and "manifest" not in given:
        raise InputError(f"--{ALLOW} goes with --manifest: the run's own manifest was looked at when it was trained")
    allow = recipe.typed(ALLOW, given.pop(ALLOW, "false"), False)
    workdir, config = run_of(given)
    split = given.get("split", "test")
    if not own and "out" not in given:
        what = "--manifest" if "manifest" in given else "--config.evaluation.KEY"
        raise InputError(f"{what} goes with --out=DIR: the run's own evaluation stays as it is")
    if "manifest" in given:
        config.data.manifest = given["manifest"]
        neutral = {"allow_leaks": allow}
        # These are of the data trained on.
        neutral |= {"anomaly_ratio": -1.0, "unlabeled_size": 0, "unlabeled_labels": "", "calibration": 0.0}
        config.data.update({key: value for key, value in neutral.items() if key in config.data})
    out = output_folder(given.get("out", workdir / ("evaluation" if split == "test" else f"evaluation-{split}")))
    with join_processes():
        keep_compiled()
        system = load_system(config)
        rows = load_rows(config, log)
        if "manifest" in given:
            rows, unchecked = not_seen(rows, split, workdir, given["manifest"], allow=allow)
        else:
            rows, unchecked = not_seen_before(config, rows, workdir)
        evaluate(config, system, rows, workdir, split=split, out=out, own=own, unchecked=unchecked)
    return 0


def run_of(given: dict[str, str]) -> tuple[Path, ConfigDict]:
    """The run folder that `--workdir` names, and its recipe with what `--config.evaluation.KEY` changes, both taken
    from the flags `given`; raises InputError for any other change."""
    if fixed := [flag for flag in given if flag.startswith("config") and not flag.startswith("config.evaluation.")]:
        raise InputError(
            f"--{fixed[0]} is unknown: of the run's recipe --config.evaluation.KEY=VALUE alone can be changed"
        )
    if "workdir" not in given:
        raise InputError("no run folder: write --workdir=DIR")
    workdir = Path(given["workdir"])
    config = recipe.read(workdir)
    recipe.override(config, given, "evaluation.")
    return workdir, config


# --- scores -----------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """The results of a split's rows in order, and what was scored with them."""

    results: Iterator[Result]
    held: Held | None = None
    cheap: Mapping[str, Scored] = MappingProxyType({})  # the baselines' scores, by part
    shown: frozenset[int] | None = None  # the rows whose pictures may be shown; None: any
    thresholds: Mapping[str, Sequence[float]] = MappingProxyType({})  # `held_out`, of each map and replicate


def score_images(
    config: ConfigDict,
    system: System,
    results: Results,
    rows: Sequence[Row],
    split: "Split",
    parts: Mapping[str, "Part"],
) -> Stream:
    """All images of a split at once, beside the baselines of each part."""
    n, score = len(split.rows), scorer(config, system, results)
    localised = bool(config.evaluation.get("iou", 0.0)) and split.marked
    if localised and not split.normals:
        remedy = "they are scored themselves" if split.name == "val" else "give the manifest val rows of label 0"
        log(f"no held-out normals: IoU at the oracle threshold alone; {remedy}")
    held = split.held
    images, every = Images([*split.rows, *held], config), range(n + len(held))
    scored = score(images, np.arange(n))
    scored_held = score(images, np.array(every[n:])) if held else None
    cheap = {name: Scored({}, {}) for name in parts}
    normals = [row for row in rows if row.split == "train" and row.label != 1]
    if split.known.any() and normals and jax.process_index() == 0:
        fit = partial(baseline_scores, Images(normals, config), images, n, mapped=len(every) if localised else n)
        cheap = {name: fit(share=part.share, pixels=split.marked and part.share == 1) for name, part in parts.items()}
    thresholds = {}
    if scored_held and localised:
        thresholds = held_out(config, held, image_results(images, scored_held, cheap[WHOLE], every[n:]))
    means = scored.scores[system.primary].mean(0).tolist()
    groups = choose_cases([row.label for row in split.rows], means)
    shown = frozenset(i for group in groups.values() for i in group)
    on_held = held_images(system, held, scored_held) if scored_held else None
    return Stream(image_results(images, scored, cheap[WHOLE], every[:n]), on_held, cheap, shown, thresholds)


def score_volumes(
    config: ConfigDict, system: System, results: Results, rows: Sequence[Row], split: "Split", workdir: Path
) -> Stream:
    """The volumes of a split one by one, beside the baselines' maps where a row has a label."""
    assert system.sweep
    run = sweeper(config, system.sweep, results)
    nothing: Callable[[Row, Volume], dict[str, np.ndarray]] = lambda row, volume: {}
    cheap = nothing
    if split.known.any() and jax.process_index() == 0:
        train = [row for row in rows if row.split == "train"]
        cheap = volume_baselines(config, system, Volumes(train, config, workdir / "cache") if train else None)
    on_held = held_volumes(config, system, split.held, run) if split.held else None
    return Stream(volume_results(config, split.rows, run, cheap), on_held)


# --- the evaluation ---------------------------------------------------------------------------------------------------


def check_processes(config: ConfigDict) -> None:
    """Raises InputError where the evaluation cannot be of as many processes as there are."""
    if config.evaluation.get("convergence") and jax.process_count() > 1:
        raise InputError("evaluation.convergence is of one process: set it to 0, and evaluate again with one")


def evaluate(
    config: ConfigDict,
    system: System,
    rows: Sequence[Row],
    workdir: Path,
    *,
    split: str,
    out: Path,
    own: bool = True,
    unchecked: str = "",
) -> dict[str, Any]:
    """Scores `split` of `rows`, writes metrics.json, scores.csv, report.html and maps into `out`; returns the metrics.

    Labels of the split and of `val` serve figures alone. `own` data and settings of the run calibrate it, on the
    normals of `val`; any other are read by the calibration that it has. `unchecked` says why it is not known whether
    the cases were trained on; "" where it is. Raises InputError where the split is empty,
    or `evaluation.alarm_rate` is no rate. Of several processes the first writes and returns; the others return {}.
    """
    began, why = time.monotonic(), list[str]()  # why there are no p-values

    def told(line: str) -> None:
        why.append(line.removeprefix("warning: "))
        log(line)

    check_processes(config)
    rate, of = alarm_rate(config), split_of(rows, split)
    parts = parts_of(config, of, volumes=system.sweep is not None)
    results = restore_results(config, system, workdir)
    log(f"{split}: scoring {len(of.rows)} cases")
    if of.known.any() and not any(row.split == "train" for row in rows):
        log("the manifest has no train rows: no cheap baselines that are fitted to them")
    if system.sweep:
        stream = score_volumes(config, system, results, rows, of, workdir)
    else:
        stream = score_images(config, system, results, rows, of, parts)
    if own and of.normals and stream.held and not other_rows(system, rows, workdir):
        calibration = calibrate(config, system, results, stream.held, workdir, told)
    else:
        calibration = read_calibration(config, system, results, workdir, told)
    judge = calibration
    if split in ("train", "unlabeled"):
        judge = None
        told(f"{split}: no p-values, which are of cases that were not trained on")
    if jax.process_index():  # it scores its share; the first process counts and writes
        if system.sweep:
            deque(stream.results, maxlen=0)
        return {}
    kept = gather(config, system, of, stream, parts, out)
    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split,
        "n": len(of.rows),
        "n_normal": int((of.labels == 0).sum()),
        "n_abnormal": int((of.labels == 1).sum()),
        "primary": system.primary,
        "image": None,
        "pixel": None,
        "scores": {},
        "subsets": {},
        "per_patient": None,
        "baselines": {},
        "decision": None,
        "chi2": None,
        "alarms": None,
    }
    if leaking := sorted({row.leak for row in rows if row.leak}):
        evaluation["leaks"] = leaking
    if unchecked:
        evaluation["unchecked"] = unchecked
    if of.known.any():
        found = {}
        for title, part in parts.items():
            fitted = stream.cheap[title].scores if title in stream.cheap else None
            found[title] = part_figures(config, system, of, kept, part, fitted, stream.thresholds)
        evaluation |= found.pop(WHOLE) | {"n": len(of.rows), "subsets": found}
        evaluation |= of_scores(config, of, kept.scores[system.primary][:, of.known], stream.held)
        if (shown := shown_map(system)) in parts[WHOLE].pixels.pooled:
            evaluation["per_patient"] = parts[WHOLE].pixels.per_patient(shown, list(evaluation["scores"]))

    if config.evaluation.get("convergence"):
        labelled = [row for row in of.rows if row.label is not None]
        if numbers := convergence(config, system, results, labelled):
            evaluation["convergence"] = numbers
    of_row = lambda i: {name: values[:, i] for name, values in kept.scores.items()}
    table = [score_line(row, of_row(i), system, judge) for i, row in enumerate(of.rows)]
    evaluation["alarms"] = alarms(of, [line["p_value"] for line in table], calibration, rate)
    if not evaluation["alarms"]:
        needs = " and a ".join(calibration.needs) if calibration else ""
        none = (
            f"no p-values: the held-out normals were scored with a {needs}, which no row here has"
            if needs
            else NO_OTHERS
        )
        evaluation["uncalibrated"] = why[0] if why else none
    evaluation["resampled"] = "patients" if any(row.patient for row in of.rows) else "cases"  # for the intervals
    evaluation["digests"] = {
        "recipe": recipe_digest(config),
        "rows trained on": rows_digest(system, workdir) or "unknown",
        "images evaluated": hashlib.sha256("\n".join(kept.digests).encode()).hexdigest()[:16],
    }
    history = read_history(workdir / "metrics.jsonl")
    if printed := beside_printed(config, system, rows, workdir, history):
        evaluation["printed"] = printed
    evaluation["seconds"] = time.monotonic() - began
    evaluation["seconds_per_case"] = kept.seconds / len(of.rows)
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    about_cases = zip(of.rows, kept.digests, strict=True)
    write_csv(out / "cases.csv", [{"id": row.id, "patient": row.patient, "image": seen} for row, seen in about_cases])
    write_text(out / "config.json", recipe.to_json(config))  # with what was changed for this evaluation
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))
    environment = workdir / "environment.json"
    about = json.loads(environment.read_text()) if environment.exists() else {}
    page = {**evaluation, "table": table}
    colours = colours_of(calibration) if calibration else None
    write_report(out / "report.html", page, kept.cases, history, config.to_dict(), about, colours)
    if own:
        write_cards(workdir, config, system, rows)
    log(headline(evaluation))
    log(f"report: {out / 'report.html'}")
    return evaluation


def gather(
    config: ConfigDict, system: System, split: Split, stream: Stream, parts: Mapping[str, Part], out: Path
) -> Gathered:
    """Goes through the results once: counts pixels, writes maps, keeps scores and pictures."""
    scores: dict[str, list[np.ndarray]] = {}
    inner: dict[str, list[np.ndarray]] = {}
    cases: list[Case] = []
    cheap: list[Mapping[str, float]] = []
    digests: list[str] = []
    seconds = 0.0
    for i, (row, result) in enumerate(zip(split.rows, stream.results, strict=True)):
        seconds += result.seconds
        cheap.append(result.cheap_scores)
        digests.append(hashlib.sha256(np.ascontiguousarray(result.stored.array).tobytes()).hexdigest()[:16])
        for name, values in result.scores.items():
            scores.setdefault(name, []).append(values)
        for name in result.maps.keys() & result.scores.keys():
            inner.setdefault(name, []).append(np.array([central(m, CENTRAL).mean() for m in result.maps[name]]))
        truth = read_truth(row, result, config.data) if split.marked and result.maps else None
        own = own_maps(result) if truth else {}
        for part in parts.values():
            if part.inside[i]:
                if truth:
                    part.pixels.add(row, *truth, own)
                part.pixels.close(row)
        if (shown := shown_map(system)) not in result.maps:
            continue
        mean = result.maps[shown].mean(0)
        picture, confidence = (
            None if each is None else each.mean(0) for each in (result.reconstruction, result.confidence)
        )
        asked = {"anomaly": config.evaluation.maps, "confidence": config.evaluation.maps}
        asked |= {"recon": bool(config.evaluation.get("reconstruction"))}
        for name, array in own_results(result, system, [name for name, wanted in asked.items() if wanted]).items():
            (out / "maps").mkdir(parents=True, exist_ok=True)
            write_map(out / "maps" / f"{row.id}_{name}", array, result.stored)
        if stream.shown is None or i in stream.shown:
            lesion = result.scored(truth[0]) if truth else None
            score = float(result.scores[system.primary].mean())
            further = {name: each.mean(0) for name, each in result.pictures.items()}
            case = Case(row.id, row.label, score, result.image, mean, lesion, picture, None, confidence, further)
            cases.append(one_slice(case, slice_side(len(split.rows))))
    stack = lambda values: {name: np.stack(each, 1) for name, each in values.items()}
    known = [scores for scores, row in zip(cheap, split.rows, strict=True) if row.label is not None]
    whole = [name for name in (known[0] if known else ()) if all(name in scores for scores in known)]
    each = {name: np.array([[scores.get(name, np.nan) for scores in cheap]]) for name in whole}
    return Gathered(stack(scores), stack(inner), cases, seconds, each, digests)


def found_lesions(pixel: Mapping[str, Any]) -> str:
    """The sensitivity for lesions, where it was asked for."""
    froc = pixel.get("froc")
    return f"  lesions found {froc['sensitivity']:.3f} at up to {froc['at']:g} false positives an image" if froc else ""


def overlap(pixel: Mapping[str, Any]) -> str:
    """The IoU of maps and masks, where it was asked for."""
    found = pixel.get("localisation")
    if not found:
        return ""
    known = "" if found["normals"] is None else f" {found['normals']:.3f}"
    return f"  IoU{known} (oracle {found['oracle']:.3f})"


def headline(evaluation: Mapping[str, Any]) -> str:
    """What the command says at its end."""

    def line(name: str, image: Mapping[str, Any]) -> str:
        low, high = image["auroc_ci"]
        return f"  {name:<24} AUROC {image['auroc']:.3f} [{low:.3f}, {high:.3f}]  AP {image['ap']:.3f}"

    unknown = evaluation["n"] - evaluation["n_normal"] - evaluation["n_abnormal"]
    counts = f"{evaluation['split']}: {evaluation['n_normal']} normal, {evaluation['n_abnormal']} abnormal"
    counts += f", {unknown} of unknown label" if unknown else ""
    if evaluation.get("leaks"):
        counts = f"NOT AN INDEPENDENT TEST: patients or images are in two splits (data.allow_leaks)\n{counts}"
    primary, reason = evaluation["primary"], no_curves_reason(evaluation)
    lines = [counts, *([reason] if reason else [])]
    scores, cheap = evaluation["scores"], evaluation["baselines"]
    if not reason:
        lines += [line(name + " *" * (name == primary), s["image"]) for name, s in scores.items() if s["image"]]
        rated = [line(name, s["image"]) for name, s in cheap.items() if s["image"]]
        lines += ["cheap baselines:", *rated] if rated else []
    if found := evaluation["alarms"]:
        shares = ", ".join(f"{found[word]:.1%} of {word}" for word in ("normal", "abnormal") if found[word] is not None)
        if shares:
            lines.append(f"p-value up to {found['rate']:g} (of {found['n']} held-out normals): {shares}")
    if evaluation["pixel"]:
        lines.append(f"pixels, of which {evaluation['pixel']['prevalence']:.4f} are lesion:")
        named = [(name + " *" * (name == primary), s) for name, s in [*scores.items(), *cheap.items()]]
        lines += [
            f"  {name:<24} AUROC {s['pixel']['auroc']:.3f}  AP {s['pixel']['ap']:.3f}"
            f"{found_lesions(s['pixel'])}{overlap(s['pixel'])}"
            for name, s in named
            if s["pixel"]
        ]
        mean = metrics.patient_mean(evaluation["per_patient"])
        lines.append(f"  mean of {mean['n']} patients      AUROC {mean['auroc']:.3f}  AP {mean['ap']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
