"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR]
                         [--config.evaluation.KEY=VALUE ...] [--config.data.allow_leaks=True] [--debug]

Scores a split with a trained run. Writes metrics.json, scores.csv, baselines.csv, report.html and the maps.

Without --out the folder is DIR/evaluation for the split `test`, and DIR/evaluation-SPLIT for another. Another manifest
or other settings need --out. No case of another manifest may share its patient or its image with the data that the run
was trained or calibrated on. With data.allow_leaks such cases are scored: they are named, have no p-value, and mark the
report. Images are compared by all their values. The splits `train` and `unlabeled` get no p-values. A case
that is unlike the training images has a warning, and no p-value above the alarm rate, as in `jmae predict`.

Several runs that are evaluated on the same cases give one answer: --workdir A --workdir B --out DIR writes scores.csv
and metrics.json of their fused score, and compares it with each run and with the best of their baselines (jmae.fusion).

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import contextlib
import json
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jmae import checkpoint, command_words, metrics, recipe
from jmae.baselines import Baselines, baselines_of
from jmae.calibration import (
    ReferenceScores,
    alarm_rate,
    calibrate,
    calibrated_on,
    colours_of,
    mask_threshold,
    p_value_figures,
    read_calibration,
    reference_scores,
    rows_changed,
    score_lines,
    why_no_masks,
)
from jmae.cards import provenance, write_cards
from jmae.console import console_summary
from jmae.convergence import check_processes, convergence
from jmae.data.cases import Cases, load_cases
from jmae.data.files import write_map
from jmae.data.manifest import Row, learnable
from jmae.doubts import caveats, doubts
from jmae.errors import exit_code
from jmae.figures import (
    NormalThresholds,
    Part,
    Split,
    SplitScores,
    Thresholds,
    beside_published,
    parts_of,
    split_figures,
    split_of,
    truth_of,
)
from jmae.fitting import fitted_results
from jmae.fusion import evaluate_several
from jmae.inference import Scorer, score_rows
from jmae.likeness import read_kind, shown_line, unlike, unlike_counts
from jmae.outlines import MaskFigures
from jmae.p_values import Calibration
from jmae.processes import join_processes, keep_compiled
from jmae.python import Evaluate
from jmae.report import Case, one_slice, shown_voxel, slice_side, worth_showing, write_report
from jmae.results import Result, map_name, report_case
from jmae.run_folder import log, read_environment, read_history, write_csv, write_text
from jmae.run_recipe import refuse_other_config
from jmae.sealed import seal
from jmae.seen import check_unseen, check_unseen_since
from jmae.system import System, fitted_rows, load_system, split_replicates
from jmae.tables import counted
from jmae.waiting import at_work


def main(argv: list[str]) -> int:
    workdirs, rest = recipe.values_of(argv, "workdir")
    if len(workdirs) > 1:
        return evaluate_several([Path(workdir) for workdir in workdirs], rest)
    wanted = command_words.evaluation_request(argv, __doc__)
    config, workdir, split = wanted.config, wanted.workdir, wanted.split
    refuse_other_config(workdir)
    with join_processes():
        keep_compiled()
        system = load_system(config)
        fitted = ("train",) if system.sweep else ("train", "unlabeled")  # splits that the baselines are fitted to
        kept = lambda rows: [row for row in rows if row.split in fitted]
        cases = load_cases(config, log, folder=workdir / "cache", scored=(split, "val"), trained=kept)
        if wanted.manifest:
            rows, unchecked = check_unseen(cases.rows, split, workdir, wanted.manifest, allow=wanted.allow)
        else:
            rows, unchecked = check_unseen_since(config, cases.rows, workdir)
        out, of_run = wanted.out, wanted.of_run
        with locked(workdir, out, of_run):
            evaluate(
                config, system, rows, workdir, split=split, out=out, of_run=of_run, unchecked=unchecked, cases=cases
            )
    return 0


@contextlib.contextmanager
def locked(workdir: Path, out: Path, of_run: bool) -> Iterator[None]:
    """Locks the folder of the evaluation, and the run folder where that is written, too."""
    with (
        checkpoint.workdir_lock(workdir) if of_run else contextlib.nullcontext(),
        checkpoint.workdir_lock(out, "--out"),
    ):
        yield


@dataclass
class Gathered:
    """What stays of the results of a split. Maps are dropped after they are written or counted."""

    scores: SplitScores = field(default_factory=SplitScores)
    cases: list[Case] = field(default_factory=list)  # that the report may show
    digests: list[str] = field(default_factory=list)  # of the stored values of each row
    notes: list[tuple[np.ndarray | None, str]] = field(default_factory=list)  # (score_error, warning) of each row
    seconds: float = 0.0  # of scoring


def evaluate(
    config: ConfigDict,
    system: System,
    rows: Sequence[Row],
    workdir: Path,
    *,
    split: str,
    out: Path,
    of_run: bool = True,
    unchecked: str = "",
    cases: Cases | None = None,
) -> dict[str, Any]:
    """Scores a split and writes the files of an evaluation (docs/reference/run_folder.md); returns the metrics.

    Labels serve figures and thresholds alone, never scores. Where there are several processes, the first writes and
    returns the metrics, and the others return {}.

    Args:
      config: the run's recipe, with changed settings of the evaluation.
      system: of the recipe.
      rows: the rows of all splits.
      workdir: the run folder.
      split: name of the split.
      out: folder to write into.
      of_run: whether rows and settings are the run's own. If they are, the normals of `val` calibrate the run.
      unchecked: why it is not known whether the cases were trained on; "" where it is known.
      cases: the cases that the command has read; None reads each of them when it is needed.

    Raises:
      InputError: the split is empty, or a case cannot be scored.
    """
    began, reasons = time.monotonic(), list[str]()  # reasons why there are no p-values

    def say(line: str) -> None:
        reasons.append(line.removeprefix("warning: "))
        log(line)

    check_processes(config)
    cases = cases or Cases(rows, config, workdir / "cache")
    rate, chosen = alarm_rate(config), split_of(rows, split)
    parts = parts_of(config, chosen, volumes=system.sweep is not None, shown=map_name(system))
    results = fitted_results(config, system, rows, workdir, cases)
    scorer = Scorer(config, system, results, cases)
    log(f"{split}: scoring {counted(len(chosen.rows), 'cases')}")
    baselines = baselines_of(config, system, cases, rows, chosen, parts)
    fitted = fitted_rows(system, rows)
    known = of_run and not chosen.val and calibrated_on(scorer, results, workdir, chosen.normals, fitted)
    reference, thresholds = score_reference(scorer, chosen, baselines, known)
    if of_run and split != "val" and not known and not rows_changed(system, rows, workdir):
        calibration = calibrate(config, system, results, reference, workdir, say, fitted)
    else:
        calibration = read_calibration(config, system, results, workdir, say)
    if no_p_values := split in ("train", "unlabeled"):
        say(f"{split}: no p-values: only cases that were not trained on have them")
    if jax.process_index():  # it scores its share; the first process counts and writes
        deque(score_rows(scorer, chosen.rows), maxlen=0)
        return {}
    masks = MaskFigures(mask_threshold(config, calibration), config.evaluation.mask_least)
    kind = read_kind(workdir)
    gathered = gather_results(scorer, chosen, baselines, parts, out, masks, kind)
    of_baselines = cache(baselines.scores)
    evaluation = split_figures(
        config, system, chosen, parts, gathered.scores, of_baselines, thresholds, reference and reference.scores
    )
    history = read_history(workdir / "metrics.jsonl")
    optional = {
        "explained": baselines.explained(split_replicates(results, config.replicates)[0], cases, chosen.normals),
        "left_out": cases.unread,
        "leaks": sorted({row.leak for row in rows if row.leak}),
        "unchecked": unchecked,
        "maskless": why_no_masks(calibration, rate),
        "notes": list(system.notes),
        "printed": beside_published(config, system, rows, workdir, history),
    }
    evaluation |= {"mask": masks.result(), "masked": masks.counts()} | {k: v for k, v in optional.items() if v}
    if config.evaluation.convergence:
        labelled = [row for row in chosen.rows if row.label is not None]
        if numbers := convergence(config, system, results, labelled, cases):
            evaluation["convergence"] = numbers
    scores, used = gathered.scores.of(1), None if no_p_values else calibration
    lines = score_lines(chosen.rows, scores, system, used, gathered.notes)
    table = [shown_line(line, rate, len(used.scores) if used else 0) for line in lines]
    evaluation["unlike"] = unlike_counts(lines, table) if kind else None
    evaluation |= p_value_figures(chosen.labels, lines, table, calibration, rate, reasons)
    evaluation |= {"words": dict(system.words), "map_words": system.map_words}
    evaluation |= {"doubts": doubts(history, system.stages), "training_normals": learnable(rows) if of_run else None}
    evaluation |= provenance(config, system, chosen.rows, gathered.digests, workdir)
    evaluation |= {"seconds": time.monotonic() - began, "seconds_per_case": gathered.seconds / len(chosen.rows)}
    write_evaluation(config, chosen, evaluation, table, gathered, of_baselines(1.0), calibration, history, workdir, out)
    if of_run:
        write_cards(workdir, config, system, rows)
    log(console_summary(evaluation))
    for text in caveats(config, evaluation["doubts"]):
        log(text)
    log(f"report: {out / 'report.html'}")
    log(f"next: open the report; score new scans: jmae predict --workdir {shlex.quote(str(workdir))} --out DIR SCAN")
    return evaluation


def score_reference(
    scorer: Scorer, split: Split, baselines: Baselines, known: bool
) -> tuple[ReferenceScores | None, Thresholds]:
    """(the scores of the rows of `val`, where they serve the split and are not `known`; the normals' thresholds of
    maps, where `evaluation.iou` asks for them)."""
    config, thresholds = scorer.config, None
    if (percentile := config.evaluation.iou) and split.marked:
        if split.normals:
            thresholds = NormalThresholds(percentile)
        else:
            remedy = "these are the val rows" if split.name == "val" else "give the manifest val rows of label 0"
            log(f"no held-out normals: IoU at the oracle threshold alone; {remedy}")
    if known and thresholds is None:
        log("held-out normals: their scores are taken from calibration.json, as nothing has changed")
    if not split.reference or (known and thresholds is None):
        return None, {}

    def seen(results: Iterator[Result]) -> Iterator[Result]:
        for result, baseline_maps in baselines.beside(results, count=False) if thresholds else zip(results, repeat({})):
            if thresholds and result.case.row.label == 0 and (truth := truth_of(result.case)):
                thresholds.add(truth, all_maps(result, baseline_maps))
            yield result

    reference = reference_scores(config, scorer.system, seen(score_rows(scorer, split.reference)))
    return reference, thresholds.result() if thresholds else {}


def all_maps(result: Result, baseline_maps: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The maps of the system and of the baselines on the case's own grid, one of each replicate."""
    return result.own_maps() | {name: [m] for name, m in baseline_maps.items()}


def gather_results(
    scorer: Scorer,
    split: Split,
    baselines: Baselines,
    parts: Mapping[str, Part],
    out: Path,
    masks: MaskFigures,
    kind: Mapping[str, Any] | None,  # `likeness.kind_of` the training images
) -> Gathered:
    """Scores the split; counts pixels and masks, writes maps, keeps scores and what the report may show."""
    gathered, config, system = Gathered(), scorer.config, scorer.system
    files = {"anomaly": "maps", "confidence": "maps", "recon": "reconstruction"}  # the settings that ask for them
    names = [name for name, setting in files.items() if config.evaluation.get(setting)]
    each = baselines.beside(score_rows(scorer, split.rows))
    for i, (row, (result, baseline_maps)) in enumerate(zip(split.rows, each, strict=True)):
        case = result.case
        gathered.seconds += result.seconds
        gathered.digests.append(case.digest)
        gathered.notes.append((result.score_error, unlike(case.traits, kind)))
        gathered.scores.add(result.scores, result.maps)
        truth = truth_of(case) if split.marked and result.maps else None
        maps = all_maps(result, baseline_maps) if truth else {}
        for part in parts.values():
            if part.inside[i]:
                if truth:
                    part.pixels.add(row, truth, maps)
                part.pixels.close(row)
        if map_name(system) not in result.maps:
            continue
        made = result.written(system, names if masks.threshold is None else [*names, "anomaly"])
        mask = (
            masks.mask_of(made["anomaly"], case.counted_voxels(), case.geometry.spacing) if "anomaly" in made else None
        )
        if truth and mask is not None:
            masks.add(mask, *truth)
        for name in made.keys() & names:
            (out / "maps").mkdir(parents=True, exist_ok=True)
            write_map(out / "maps" / f"{row.id}_{name}", made[name], case.geometry)
        shown = report_case(result, system, truth and truth.lesion, baseline_maps, mask)
        window = scorer.example(case, shown_voxel(shown)) if system.sweep else {}
        shown = one_slice(shown, slice_side(len(split.rows)))
        gathered.cases.append(shown._replace(pictures={**shown.pictures, **window}))
        gathered.cases = worth_showing(gathered.cases, config.evaluation.pictures)
    return gathered


@at_work("writing the report")
def write_evaluation(
    config: ConfigDict,
    split: Split,
    evaluation: dict[str, Any],
    table: Sequence[Mapping[str, Any]],
    gathered: Gathered,
    of_baselines: Mapping[str, np.ndarray],  # scores (1, n)
    calibration: Calibration | None,
    history: Sequence[Mapping[str, Any]],
    workdir: Path,
    out: Path,
) -> None:
    """Writes scores.csv, baselines.csv, cases.csv, config.json, metrics.json and report.html."""
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    others = {name: [value if np.isfinite(value) else "" for value in each] for name, (each,) in of_baselines.items()}
    lines = [{"id": row.id} | {name: each[i] for name, each in others.items()} for i, row in enumerate(split.rows)]
    write_csv(out / "baselines.csv", lines)
    cases = zip(split.rows, gathered.digests, strict=True)
    write_csv(out / "cases.csv", [{"id": row.id, "patient": row.patient, "image": digest} for row, digest in cases])
    write_text(out / "config.json", seal(json.loads(recipe.to_json(config))))  # with the settings of this evaluation
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))
    page, colours = {**evaluation, "table": table}, colours_of(calibration)
    write_report(
        out / "report.html", page, gathered.cases, history, config.to_dict(), read_environment(workdir), colours
    )


sys.modules[__name__].__class__ = Evaluate  # `jmae.evaluate(...)`

if __name__ == "__main__":
    sys.exit(exit_code(main))
