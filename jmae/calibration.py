"""What a score means: p-values, alarm thresholds and colour scales from held-out normals (calibration.json)."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jmae.cards import rows_digest
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.figures import Held, Split, patient_of
from jmae.inference import Scored, restore_results, scorer, shown_map, sweeper, volume_results
from jmae.report import PERCENTILES, Scale
from jmae.run_folder import digest, log, write_text
from jmae.scoring import Calibration, alarm_threshold, colour_ends
from jmae.seen import write_seen
from jmae.system import Results, System, chosen_on_val, compute_type, rows_read

CALIBRATION = "calibration.json"
UNCALIBRATED = (
    "not calibrated, so no p-values: give the manifest val rows of label 0, or train with --config.data.calibration=0.1"
)
NO_OTHERS = "no p-values: no case of this split is another than the held-out normals, which say nothing of themselves"
NEEDS = ("region", "midline", "half")  # columns that the score of a volume depends on
NO_SCORE = (  # of `evaluation`
    "batch chunk subsets maps reconstruction draws froc iou alarm_rate convergence decision".split()
)


def held_images(system: System, rows: Sequence[Row], scored: Scored) -> Held:
    """Held-out images, scored."""
    maps = scored.maps.get(shown_map(system))
    ends = [map_ends(None if maps is None else maps[:, k]) for k in range(len(rows))]
    return Held(rows, scored.scores[system.primary], np.array(ends))


def held_volumes(config: ConfigDict, system: System, rows: Sequence[Row], run: Callable) -> Held:
    """Held-out volumes, scored by `sweeper`'s function one by one."""
    scores, ends = [], []
    for result in volume_results(config, rows, run, lambda row, volume: {}):
        scores.append(result.scores[system.primary])
        ends.append(map_ends(result.maps.get(shown_map(system))))
    return Held(rows, np.stack(scores, 1), np.array(ends))


def map_ends(maps: np.ndarray | None) -> np.ndarray:
    """The percentiles `PERCENTILES` of a case's map (r, *size), the mean over replicates."""
    return np.full(2, np.nan) if maps is None else np.percentile(maps.mean(0), PERCENTILES)


def calibrators(
    config: ConfigDict, system: System, rows: Sequence[Row], say: Callable[[str], None] = log
) -> list[bool]:
    """Which rows of `val` say what a score means: the normals that nothing was chosen by."""
    labels = {row.label for row in rows if row.split == "val" and not row.kept}
    if chosen_on_val(system) and {0, 1} <= labels:
        say(
            f"select={config.select}: val's labels chose the weights, so only train rows kept apart give p-values "
            "(--config.data.calibration=0.1)"
        )
        return [row.kept for row in rows]
    return [row.label == 0 for row in rows]


def calibrate(
    config: ConfigDict,
    system: System,
    results: Results,
    held: Held,
    workdir: Path,
    say: Callable[[str], None] = log,
) -> Calibration | None:
    """Calibrates a run on the normals of `held` and writes calibration.json: whom it is of, the score of each normal,
    the threshold at the false-alarm rate `evaluation.alarm_rate`, the colour scale of maps. None where no row is left
    that nothing was chosen by."""
    used = calibrators(config, system, held.rows, say)
    normals = [row for row, use in zip(held.rows, used, strict=True) if use]
    if not normals:
        return None
    scores = {
        row.id: float(values.mean()) for row, values, use in zip(held.rows, held.scores.T, used, strict=True) if use
    }
    patients = len({patient_of(row) for row in normals})
    if patients < len(normals):
        log(f"warning: {len(normals)} held-out normals of {patients} patients: p-values promise less than their number")
    needs = [name for name in NEEDS if "join" in config.data and any(stated(row, name) for row in normals)]
    ends = held.ends[used]
    low, high = colour_ends(*ends.T) if np.isfinite(ends).all() else (None, None)
    rate = alarm_rate(config)
    threshold = alarm_threshold(list(scores.values()), rate)
    if threshold is None:
        log(f"warning: {len(scores)} held-out normals give no p-value up to {rate:g}: {math.ceil(1 / rate) - 1} would")
    about = {
        "n": len(scores),
        "patients": patients,
        "needs": needs,
        "alarm_rate": rate,
        "threshold": threshold,
        "colours": {"low": low, "high": high},
        "of": scored_by(config, system, results),
        "scores": scores,
    }
    write_text(workdir / CALIBRATION, json.dumps(about, indent=1))
    write_seen(workdir, normals)
    log(f"calibrated on {len(scores)} held-out normals: {workdir / CALIBRATION}")
    return Calibration(scores, low, high, tuple(needs))


def stated(row: Row, name: str) -> bool:
    """Whether a row says something in the column `name` of `NEEDS`."""
    return bool(row.region if name == "region" else row.extra.get(name))


def calibrate_run(config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path) -> None:
    """Calibrates a run that is not evaluated, where its data have held-out normals."""
    val = [row for row in rows if row.split == "val"]
    normals = [row for row, use in zip(val, calibrators(config, system, val), strict=True) if use]
    if not normals:
        log(UNCALIBRATED)
        return
    results = restore_results(config, system, workdir)
    if system.sweep:
        held = held_volumes(config, system, normals, sweeper(config, system.sweep, results))
    else:
        scored = scorer(config, system, results)(Images(normals, config), np.arange(len(normals)))
        held = held_images(system, normals, scored)
    calibrate(config, system, results, held, workdir)


def read_calibration(
    config: ConfigDict, system: System, results: Results, workdir: Path, say: Callable[[str], None] = log
) -> Calibration | None:
    """The run's calibration; None, and why to `say`, where there is none or it is of other weights or settings. Raises
    InputError where the file is damaged."""
    file = workdir / CALIBRATION
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        scores = {str(name): float(score) for name, score in about["scores"].items()}
        low, high = (None if end is None else float(end) for end in (about["colours"]["low"], about["colours"]["high"]))
        weights, settings = str(about["of"]["weights"]), dict(about["of"]["settings"])
        needs = tuple(str(name) for name in about["needs"])
        if not scores or not np.isfinite([*scores.values(), low or 0, high or 0]).all():
            raise ValueError("no scores, or not finite ones")
    except FileNotFoundError:
        say(UNCALIBRATED)
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is no calibration ({error!r}): delete it and run jmae.evaluate again") from None
    own = json.loads(json.dumps(scored_by(config, system, results)))
    if weights != own["weights"]:
        say(f"warning: {file} is of other weights: no p-values; run jmae.evaluate again")
        return None
    if other := [k for k in settings | own["settings"] if settings.get(k) != own["settings"].get(k)]:
        say(f"warning: {file} is of another evaluation.{other[0]}: no p-values")
        return None
    return Calibration(scores, low, high, needs)


def scored_by(config: ConfigDict, system: System, results: Results) -> dict[str, Any]:
    """What a score depends on but the case: the SHA-256 of the weights, and the settings of `evaluation` that are not
    of memory or figures alone."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(results):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    precision = str(jnp.dtype(compute_type(config))) if "dtype" in config.get("model", {}) else ""
    settings = {"score": system.primary, "dtype": precision} | {
        k: v for k, v in config.evaluation.items() if k not in NO_SCORE
    }
    return {"weights": digest.hexdigest(), "settings": settings}


def colours_of(calibration: Calibration) -> Scale | None:
    """The colour scale of all maps of a run; None where the normals have no maps."""
    if calibration.low is None or calibration.high is None:
        return None
    low, high = PERCENTILES
    source = f"median of the {low:g}th and 95th percentile of the {high:g}th percentiles of each map of the "
    return Scale(calibration.low, calibration.high, f"{source}{len(calibration.scores)} held-out normals")


def alarm_rate(config: ConfigDict) -> float:
    """The false-alarm rate that is asked for; raises InputError where it is none."""
    rate = config.evaluation.get("alarm_rate", 0.05)
    if not 0 < rate < 1:
        raise InputError(f"evaluation.alarm_rate={rate}: is no rate: write one between 0 and 1, as 0.05")
    return rate


def alarms(
    split: "Split", values: Sequence[float | None], calibration: Calibration | None, rate: float
) -> dict[str, Any] | None:
    """How often labelled rows that have a p-value have one of at most `rate`; None where no row has one."""
    p = np.array([np.nan if value is None else value for value in values])
    if not calibration or np.isnan(p).all():
        return None
    of = lambda label: (split.labels == label) & ~np.isnan(p)
    share = lambda label: float((p[of(label)] <= rate).mean()) if of(label).any() else None
    threshold = alarm_threshold(list(calibration.scores.values()), rate)
    found = {"n": len(calibration.scores), "rate": rate, "threshold": threshold}
    return found | {"normal": share(0), "abnormal": share(1)}


def score_line(
    row: Row, scores: Mapping[str, np.ndarray], system: System, calibration: Calibration | None
) -> dict[str, Any]:
    """A line of scores.csv, of scores (r,): the mean over replicates."""
    mean = {name: float(values.mean()) for name, values in scores.items()}
    primary = mean.pop(system.primary)
    p_value = None
    if calibration and not row.leak and all(stated(row, name) for name in calibration.needs):
        p_value = calibration.p_value(primary, row.id)
        if p_value is None and row.split != "val":
            log(f"{row.id}: no p-value: it has the name of a held-out normal")
    return {"id": row.id, "label": row.label, "score": primary, "p_value": p_value} | mean


def other_rows(system: System, rows: Sequence[Row], workdir: Path) -> bool:
    """Whether the data, changed since, no longer tell which rows were trained on: then none may calibrate."""
    saved = rows_digest(system, workdir)
    if saved in (None, digest(rows_read(system, rows))):
        return False
    log("warning: the manifest has changed since the training: not calibrated on it anew")
    return True
