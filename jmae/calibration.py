"""What a score means: p-values, alarm thresholds and colour scales from held-out normals (calibration.json)."""

import hashlib
import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jmae import __version__, recipe
from jmae.cards import trained_on
from jmae.data.cases import Cases
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.errors import InputError
from jmae.figures import patient_key
from jmae.fitting import fitted_results
from jmae.inference import Scorer, score_rows
from jmae.outlines import least_voxels, peak
from jmae.p_values import (
    NO_NORMALS,
    Calibration,
    alarm_threshold,
    colour_ends,
    more_normals,
    normals_needed,
    saturated,
    smallest_p_value,
    too_few_normals,
)
from jmae.report import PERCENTILES, Scale
from jmae.results import Result, map_name
from jmae.run_folder import log, write_text
from jmae.sealed import seal, unseal
from jmae.seen import write_seen
from jmae.system import Results, System, chosen_on_val, compute_type, fitted_rows, rows_read
from jmae.tables import counted

CALIBRATION = "calibration.json"
ONLY_NORMALS = "This split contains only the normals used for calibration, so it has no p-values"
LOCATING_COLUMNS = ("region", "midline", "half")  # of the manifest, on which the score of a volume depends
# Settings of the section `evaluation` that change no score: of memory, of the files written, of the figures.
SETTINGS_WITHOUT_EFFECT = (
    "batch chunk subsets maps reconstruction draws froc froc_rule froc_least froc_overlap iou alarm_rate convergence "
    "decision mask_least rivals pictures"
).split()
DEFINITION = 2  # of the scores: one more where the same weights and settings give other scores than before
LOWEST = float(np.finfo(np.float32).min)  # stands for the peak of a map without any component of the least size
Say = Callable[[str], None]


class ReferenceScores(NamedTuple):
    """The scored rows of `val`. They choose thresholds, and the normals among them calibrate the run."""

    rows: Sequence[Row]
    scores: np.ndarray  # (r, m), the primary scores
    ends: np.ndarray  # (m, 2): the percentiles `PERCENTILES` of each row's map, nan without a map
    peaks: np.ndarray  # (m,): `outlines.peak` of each row's map on its own grid, nan without a map
    inputs: Sequence[str] = ()  # (m,): `inputs_digest` of each row's case


def reference_scores(config: ConfigDict, system: System, results: Iterable[Result]) -> ReferenceScores:
    """The scores of rows of `val`, from their results."""
    rows, scores, ends, peaks, inputs = [], [], [], [], []
    for result in results:
        maps = result.maps.get(map_name(system))
        rows.append(result.case.row)
        inputs.append(inputs_digest(result.case))
        scores.append(result.scores[system.primary])
        ends.append(np.full(2, np.nan) if maps is None else np.percentile(maps.mean(0), PERCENTILES))
        peaks.append(np.nan)
        if maps is not None:
            least = least_voxels(config.evaluation.mask_least, result.case.geometry.spacing)
            own = result.written(system, ["anomaly"])["anomaly"]
            own = np.nan_to_num(own, nan=np.nanmin(own))  # where the image has no value
            peaks[-1] = peak(own, least, result.case.counted_voxels())
    return ReferenceScores(rows, np.stack(scores, 1), np.array(ends), np.array(peaks), inputs)


def inputs_digest(case: Prepared) -> str:
    """The digest of a case's id and of all that its score and the peak of its map depend on."""
    affine = None if case.geometry.affine is None else case.geometry.affine.tolist()
    columns = [case.row.extra.get(name, "") for name in LOCATING_COLUMNS]
    hashed = hashlib.sha256(repr((case.row.id, case.digest, columns, case.geometry.spacing, affine)).encode())
    for array in (case.array, case.region):
        hashed.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return hashed.hexdigest()[:16]


def digest_of_normals(config: ConfigDict, inputs: Iterable[str]) -> str:
    """The digest of the `inputs_digest` of the normals that calibrate a run, of the settings in calibration.json that
    change no score, and of this version of jmae."""
    settings = [__version__, str(DEFINITION), repr(alarm_rate(config)), repr(float(config.evaluation.mask_least))]
    return hashlib.sha256("\n".join([*settings, *inputs]).encode()).hexdigest()[:16]


# --- calibrating a run ------------------------------------------------------------------------------------------------


def calibrate(
    config: ConfigDict,
    system: System,
    results: Results,
    reference: ReferenceScores | None,
    workdir: Path,
    say: Say = log,
    fitted: Collection[str] = (),
) -> Calibration | None:
    """Calibrates a run on the normals of `val` that are not `fitted` (`system.fitted_rows`); writes calibration.json.

    The file holds the score of each normal, the threshold at the false-alarm rate `evaluation.alarm_rate`, the colour
    scale of maps, and the weights and settings that these numbers belong to. Where no normal may calibrate, an older
    file is removed, and there is no calibration.
    """
    used = np.array(calibrating_rows(config, system, reference.rows if reference else (), say, fitted), bool)
    if reference is None or not used.any():
        remove_calibration(workdir)
        if reference is None:
            say(NO_NORMALS)
        return None
    normals = [row for row, use in zip(reference.rows, used, strict=True) if use]
    scores = {row.id: float(s) for row, s in zip(normals, reference.scores[:, used].mean(0), strict=True)}
    inputs = digest_of_normals(config, compress(reference.inputs, used))
    patients = len({patient_key(row) for row in normals})
    if patients < len(normals):
        of = counted(patients, "patients")
        log(f"warning: {len(normals)} held-out normals of {of}: the promise of p-values is weaker")
    needs = [name for name in LOCATING_COLUMNS if system.sweep and any(has_column(row, name) for row in normals)]
    ends = reference.ends[used]
    low, high = colour_ends(*ends.T) if np.isfinite(ends).all() else (None, None)
    peaks = [] if np.isnan(reference.peaks[used]).any() else np.maximum(reference.peaks[used], LOWEST).tolist()
    rate = alarm_rate(config)
    threshold = alarm_threshold(list(scores.values()), rate)
    content = {
        "n": len(scores),
        "patients": patients,
        "needs": needs,
        "alarm_rate": rate,
        "threshold": threshold,
        "colours": {"low": low, "high": high},
        "of": score_identity(config, system, results),
        "scores": scores,
        "mask_least": config.evaluation.mask_least,
        "peaks": peaks,
        "fitted": sorted(fitted),
        "inputs": inputs,
    }
    file, text = workdir / CALIBRATION, seal(content)
    other = file.exists() and file.read_bytes() != text.encode()
    write_text(file, text)
    write_seen(workdir, normals)
    normals_said = f"{counted(len(scores), 'held-out normals')} ({smallest_p_value(len(scores))})"
    anew = " (anew, as the weights, the settings or these normals have changed)" if other else ""
    log(f"calibrated on {normals_said}: {file}{anew}")
    calibration = Calibration(scores, low, high, tuple(needs), peaks, config.evaluation.mask_least, fitted, inputs)
    if saturated(peaks, rate):
        log(f"warning: {why_no_masks(calibration, rate)}")
    return calibration


def calibrating_rows(
    config: ConfigDict, system: System, rows: Sequence[Row], say: Say = log, fitted: Collection[str] = ()
) -> list[bool]:
    """Which rows of `val` may calibrate: the normals, unless labels of `val` chose the weights. In that case only
    normals that were kept apart from `train` may calibrate. A row that leaks (`Row.leak`) or that the score was
    `fitted` to never may: the run has seen it."""
    free = lambda row: not row.leak and row.id not in fitted
    labels = {row.label for row in rows if row.split == "val" and not row.kept}
    if chosen_on_val(system) and {0, 1} <= labels:
        say(
            f"select={config.select}: val's labels chose the weights, so only train rows kept apart give p-values "
            "(data.calibration, with ten or more train patients)"
        )
        return [row.kept and free(row) for row in rows]
    if leaking := sum(row.label == 0 and bool(row.leak) for row in rows):
        say(f"{counted(leaking, 'normals')} of val in another split, too: no p-values from them")
    used = [row.label == 0 and free(row) for row in rows]
    if not any(used) and any(row.id in fitted for row in rows):
        say("the score was fitted to all held-out normals, so there are no p-values: give val normals of more patients")
    return used


def remove_calibration(workdir: Path) -> None:
    """Removes the calibration of a run that has no held-out normals any more, and says so."""
    if (workdir / CALIBRATION).exists():
        (workdir / CALIBRATION).unlink(missing_ok=True)
        log(f"warning: {workdir / CALIBRATION}: removed, as none of its normals is kept from the training any more")


def tell_p_values(config: ConfigDict, system: System, rows: Sequence[Row]) -> None:
    """Logs before a training that its run will have no p-values, or none as low as the alarm rate."""
    val = [row for row in rows if row.split == "val"]
    n = sum(calibrating_rows(config, system, val, fitted=fitted_rows(system, rows)))
    if few := too_few_normals(n, alarm_rate(config)):
        log(f"warning: {few}")


def calibrate_run(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, cases: Cases | None = None
) -> None:
    """Calibrates a run that is not evaluated, where its data have held-out normals. `cases` is passed to `Scorer`."""
    val, fitted = [row for row in rows if row.split == "val"], fitted_rows(system, rows)
    used = calibrating_rows(config, system, val, fitted=fitted)
    normals = [row for row, use in zip(val, used, strict=True) if use]
    if not normals:
        remove_calibration(workdir)
        log(NO_NORMALS)
        return
    results = fitted_results(config, system, rows, workdir, cases)
    reference = reference_scores(config, system, score_rows(Scorer(config, system, results, cases), normals))
    calibrate(config, system, results, reference, workdir, fitted=fitted)


def rows_changed(system: System, rows: Sequence[Row], workdir: Path) -> bool:
    """Whether the rows differ from the rows of the training, so that none of them may calibrate the run. Logs it."""
    if trained_on(system, workdir, rows_read(system, rows)):
        return False
    log("warning: the manifest has changed since the training: not calibrated on it anew")
    return True


# --- reading a calibration --------------------------------------------------------------------------------------------


def read_calibration(
    config: ConfigDict, system: System, results: Results, workdir: Path, say: Say = log
) -> Calibration | None:
    """The run's calibration. None, with a reason to `say`, where the run has no calibration, or one for other weights
    or settings.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / CALIBRATION
    try:
        content = unseal(file.read_bytes(), file, log)
        scores = {str(name): float(score) for name, score in content["scores"].items()}
        low, high = (
            None if end is None else float(end) for end in map(content["colours"].__getitem__, ("low", "high"))
        )
        weights, settings = str(content["of"]["weights"]), dict(content["of"]["settings"])
        needs = tuple(str(name) for name in content["needs"])
        peaks = [float(value) for value in content.get("peaks", ())]  # runs before there were masks have none
        least = float(content.get("mask_least", 0))
        fitted, inputs = {str(name) for name in content.get("fitted", ())}, str(content.get("inputs", ""))
        if not scores or not np.isfinite([*scores.values(), low or 0, high or 0, *peaks, least]).all():
            raise ValueError("no scores, or not finite ones")
    except FileNotFoundError:
        command = f"jmae evaluate --workdir {shlex.quote(str(workdir))}"
        why = "no normal scan is kept from the training, or the evaluation did not finish"
        say(f"no p-values: {why}: {command} tells which, and makes them where it can")
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is no calibration ({error!r}): delete it and run jmae.evaluate again") from None
    now = json.loads(json.dumps(score_identity(config, system, results)))
    settings = settings_before(config) | settings
    retired = {key.removeprefix("evaluation.") for key in recipe.RETIRED} - now["settings"].keys()
    compared = (settings | now["settings"]).keys() - retired
    if other := sorted(k for k in compared if settings.get(k) != now["settings"].get(k)):
        if "definition" in other:
            say(f"warning: {file} has the scores of another version of jmae: no p-values; run jmae.evaluate again")
            return None
        key = {"dtype": "model.dtype"}.get(other[0], f"evaluation.{other[0]}")
        say(f"warning: {file} belongs to another {key}: no p-values")
        return None
    if weights != now["weights"]:
        say(f"warning: {file} belongs to other weights: no p-values; run jmae.evaluate again")
        return None
    return Calibration(scores, low, high, needs, peaks, least, fitted, inputs)


def calibrated_on(scorer: Scorer, results: Results, workdir: Path, normals: Sequence[Row], fitted: set[str]) -> bool:
    """Whether scoring these normals of `val` again would give the run's calibration again: calibration.json has these
    weights and settings, exactly the normals that may calibrate, and their images and regions as they are now."""
    config, system = scorer.config, scorer.system
    silent: Say = lambda line: None  # the line is logged where the calibration is used
    used = list(compress(normals, calibrating_rows(config, system, normals, silent, fitted)))
    if not used or not (workdir / CALIBRATION).exists():
        return False
    known = read_calibration(config, system, results, workdir, silent)
    now = lambda: digest_of_normals(config, (inputs_digest(scorer.prepare(row)) for row in used))
    return known is not None and bool(known.inputs) and known.inputs == now()


def settings_before(config: ConfigDict) -> dict[str, Any]:
    """The settings that change a score, in a run that is older than their keys (`Key.before`)."""
    declared = recipe.declarations(config.system, volumes=recipe.is_volume(config))
    values = {
        name.removeprefix("evaluation."): key.default if key.before is None else key.before
        for name, key in declared.items()
        if name.startswith("evaluation.")
    }
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in SETTINGS_WITHOUT_EFFECT}))


def score_identity(config: ConfigDict, system: System, results: Results) -> dict[str, Any]:
    """What a score depends on beside the case: {"weights": their SHA-256, "settings": those that change a score}."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(results):
        hashed.update(jax.tree_util.keystr(path).encode())
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    precision = str(jnp.dtype(compute_type(config))) if "dtype" in config.get("model", {}) else ""
    settings = {key: value for key, value in config.evaluation.items() if key not in SETTINGS_WITHOUT_EFFECT}
    own = {"score": system.primary, "dtype": precision, "definition": DEFINITION}
    return {"weights": hashed.hexdigest(), "settings": own | settings}


def mask_threshold(config: ConfigDict, calibration: Calibration | None) -> float | None:
    """The value above which a map's components are the mask of lesions, at the rate `evaluation.alarm_rate` of normal
    cases with a mask. None without held-out normals, or where these are too few for that rate.

    Raises:
      InputError: the normals' maps were looked at with another `evaluation.mask_least`.
    """
    if not calibration or not calibration.peaks:
        return None
    if calibration.least != config.evaluation.mask_least:
        raise InputError(
            f"evaluation.mask_least={config.evaluation.mask_least:g}: the run is calibrated for {calibration.least:g}: "
            "train or evaluate it with that value"
        )
    return alarm_threshold(calibration.peaks, alarm_rate(config))


def why_no_masks(calibration: Calibration | None, rate: float) -> str:
    """Why cases get no mask, or empty masks; "" where nothing prevents masks or the run has no maps."""
    if not calibration:
        return "no masks: without a calibration there is no threshold for them"
    if not calibration.peaks:
        return ""
    normals, needed = counted(len(calibration.peaks), "held-out normals"), normals_needed(rate)
    if len(calibration.peaks) < needed:
        return f"no masks: {normals}, {needed} are needed"
    if saturated(calibration.peaks, rate):
        top = f"the highest values of several maps of {normals} are equal ({max(calibration.peaks):.4g})"
        return f"{top}, so masks of new cases stay empty: train longer"
    return ""


def has_column(row: Row, name: str) -> bool:
    """Whether a row's cell in one of the `LOCATING_COLUMNS` is filled."""
    return bool(row.region if name == "region" else row.extra.get(name))


def colours_of(calibration: Calibration | None) -> Scale | None:
    """The colour scale of all maps of a run; None without a calibration, or where the normals have no maps."""
    if calibration is None or calibration.low is None or calibration.high is None:
        return None
    rare, normals = round(1000 - 10 * PERCENTILES[1]), counted(len(calibration.scores), "held-out normals")
    source = (
        f"The bright end is {calibration.high:.3g}. Normal maps hardly go beyond it: in 19 of 20 maps of {normals}, at "
        f"most {rare} of 1,000 values is higher. The dark end is the middle value of such a map. So a bright place is "
        "rare in normal scans, but its value may be small."
    )
    return Scale(calibration.low, calibration.high, source)


# --- p-values and alarms ----------------------------------------------------------------------------------------------


def score_line(
    row: Row,
    scores: Mapping[str, np.ndarray],
    system: System,
    calibration: Calibration | None,
    score_error: np.ndarray | None = None,
    warning: str = "",
) -> dict[str, Any]:
    """A line of scores.csv: each score (r,), mean over replicates. The primary score has its p-value and its
    Monte-Carlo error. `warning` says in what the case is unlike the training images (`likeness.unlike`).

    Replicates have masks of their own. So the error of their mean is the root of the sum of the squared errors
    `score_error` (r,), divided by r. Raises InputError where a score is not finite.
    """
    if bad := [name for name, values in scores.items() if not np.isfinite(values).all()]:
        raise InputError(f"{row.image[0]}: its score {bad[0]} is not finite: look at its values, or leave it out")
    mean = {name: float(values.mean()) for name, values in scores.items()}
    primary = mean.pop(system.primary)
    p_value = None
    if calibration and not row.leak and all(has_column(row, name) for name in calibration.needs):
        p_value = calibration.p_value(primary, row.id)
        further = [name for name in LOCATING_COLUMNS if has_column(row, name) and name not in calibration.needs]
        if p_value is None and row.split != "val":
            log(f"{row.id}: no p-value: it has the name of a held-out normal")
        elif p_value is not None and system.sweep and further:
            p_value = None
            log(f"{row.id}: no p-value: it has a {further[0]}, which the held-out normals did not have")
    error = None if score_error is None else float(np.linalg.norm(score_error)) / len(score_error)
    line = {"id": row.id, "label": row.label, "score": primary, "p_value": p_value, "score_error": error}
    return line | mean | {"warning": warning}


def score_lines(
    rows: Sequence[Row],
    scores: Mapping[str, np.ndarray],
    system: System,
    calibration: Calibration | None,
    notes: Iterable[tuple[np.ndarray | None, str]],
) -> list[dict[str, Any]]:
    """The `score_line` of each row. `scores` are (r, n), and `notes` are its Monte-Carlo error and its warning."""
    return [
        score_line(row, {name: values[:, i] for name, values in scores.items()}, system, calibration, *note)
        for i, (row, note) in enumerate(zip(rows, notes, strict=True))
    ]


def p_value_figures(
    labels: np.ndarray,
    lines: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    calibration: Calibration | None,
    rate: float,
    reasons: Sequence[str],
) -> dict[str, Any]:
    """What metrics.json says of p-values: `alarms`; the "withheld" ones by id; "uncalibrated", why there are none.

    Args:
      labels: (n,), -1 unknown.
      lines: `score_lines`.
      table: the same as the user sees them, without the p-values that a warning withholds.
      reasons: why there are no p-values, as far as it was said before.
    """
    found: dict[str, Any] = {"alarms": alarms(labels, [line["p_value"] for line in lines], calibration, rate)}
    calm = {
        line["id"]: line["p_value"]
        for line, shown in zip(lines, table, strict=True)
        if shown["p_value"] != line["p_value"]
    }
    if calm:
        found["withheld"] = calm  # `fusion.fused_evaluation` reads them
    if not found["alarms"]:
        why = reasons[0] if reasons else why_no_p_values(calibration)
        found["uncalibrated"] = f"{why}: {more_normals(rate)}" if why == NO_NORMALS else why
    return found


def why_no_p_values(calibration: Calibration | None) -> str:
    """Why no case of a calibrated run has a p-value."""
    if not calibration or not calibration.needs:
        return ONLY_NORMALS
    needs = " and a ".join(calibration.needs)
    return f"no p-values: the held-out normals were scored with a {needs}, which no row here has"


def alarm_rate(config: ConfigDict) -> float:
    """The false-alarm rate `evaluation.alarm_rate`. Raises InputError where it is not above 0 and below 1."""
    rate = config.evaluation.alarm_rate
    if not 0 < rate < 1:
        raise InputError(f"evaluation.alarm_rate={rate}: is no rate: write one between 0 and 1, as 0.05")
    return rate


def alarms(
    labels: np.ndarray, p_values: Sequence[float | None], calibration: Calibration | None, rate: float
) -> dict[str, Any] | None:
    """The shares of normal and of abnormal cases with a p-value of at most `rate`, among those that have one.

    Args:
      labels: (n,), -1 unknown.
      p_values: of each case; None where a case has none. Those that a warning withholds (`likeness`) are among them. So
        they count as no alarm, and the shares are those that the promise is about.

    Returns:
      {"n": held-out normals, "rate", "threshold", "normal", "abnormal", "counts": {"normal": [alarms, cases], ...}};
      None where no case has a p-value. "counts" has the cases without a label as "unlabelled".
    """
    p = np.array([np.nan if value is None else value for value in p_values])
    if not calibration or np.isnan(p).all():
        return None
    of = lambda label: p[(labels == label) & ~np.isnan(p)]
    kinds = {"normal": of(0), "abnormal": of(1), "unlabelled": of(-1)}
    counts = {kind: [int((own <= rate).sum()), len(own)] for kind, own in kinds.items()}
    share = lambda kind: counts[kind][0] / counts[kind][1] if counts[kind][1] else None
    threshold = alarm_threshold(list(calibration.scores.values()), rate)
    found = {"n": len(calibration.scores), "rate": rate, "threshold": threshold, "counts": counts}
    return found | {"normal": share("normal"), "abnormal": share("abnormal")}
