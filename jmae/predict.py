"""python -m jmae.predict --workdir DIR --out DIR [--continue] INPUT [INPUT ...] [--config.evaluation.KEY=VALUE ...]
python -m jmae.predict --workdir DIR --out DIR [--continue] --manifest CASES.csv [--config.evaluation.KEY=VALUE ...]

Scores new cases with a trained run. Each case gets a map on its own grid, a score, and a p-value.

INPUT is one case or a folder of cases. A case is an image file of any name: its content tells the format. The
sequences of one case are joined by ";", in the order of the run's channels. For a run of volumes, a folder of one DICOM
series is a case too. In a folder of cases, every image file at any depth is a case; for a run of volumes, so is every
series. Files of other kinds are counted and left out, as by `jmae prepare folders`: an image has the ending of one, or
is DICOM. A case's id is the name of its (first) file without the format's ending. Where two cases have one name,
folders are added to the ids.

Several runs give one answer: --workdir A --workdir B. Each run's predictions are in OUT/1, OUT/2, ... OUT then has the
mean of their maps and of their normal scores, and one p-value (jmae.fusion). The runs need common held-out normals.

CASES.csv lists cases instead. It has the column image; id may be missing, and region, midline and half are needed where
volumes are scored within a region or in two pieces. These columns are as in a manifest; its other columns are not read.

--out gets for each case ID_anomaly.nii.gz (for images .tif, 32 bits) and ID_overlay.png. It also gets ID_mask (8 bits)
where the run has enough held-out normals, and ID_confidence where the system has one. ID_recon is there where the
recipe has evaluation.reconstruction. The mask marks where the map lies above a threshold. At most a share
evaluation.alarm_rate of normal cases has a mask with anything in it (jmae.outlines). The rate 0.05 needs 19 held-out
normals. The overlay of a volume shows the axial slice with the highest value.

At the end the terminal shows the highest scores, and --out gets scores.csv: id,label,score,p_value,alarm,score_error,
further scores, and warning. Among the held-out normals and the case itself, the p-value is the share that scores as
high (jmae.p_values.Calibration). The column alarm is 1 where the p-value is at most evaluation.alarm_rate. It is empty
where so few normals were held out that no p-value can be as low. The p-value is empty in five cases:

- The run is not calibrated.
- The run was trained or calibrated on the image.
- The case has the name of a held-out normal.
- The case has another set of region, midline and half than the normals had.
- The case has a warning and a p-value above the alarm rate.

The column warning says in what a case is unlike the training images: size, channels, grey values or layout
(jmae.likeness). The column score_error has the Monte-Carlo error of a score that is a mean over masks or samples. A
case that fails is listed in failed.csv, and the others go on. A path that is not there is refused before anything is
written.

--continue  adds to what is in --out: further scans, the rest after an interruption, or failed files once mended.
            failed.csv then lists the failures of this command alone.

Exit codes: 0 done; 1 some cases failed; 2 the input or the environment is wrong.
"""

import base64
import csv
import glob
import hashlib
import html
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image as pillow

from jmae import checkpoint, command_words, recipe
from jmae.calibration import (
    alarm_rate,
    colours_of,
    mask_threshold,
    read_calibration,
    score_identity,
    score_line,
    why_no_masks,
)
from jmae.console import highest
from jmae.data.duplicates import content
from jmae.data.files import Image, marks_of, read_image, write_map
from jmae.data.manifest import NEW, Row, wrong_pieces
from jmae.data.names import count_unread, id_of, names_of, sequences, stem_of
from jmae.data.preparation import OtherRank, Prepared, stored_case
from jmae.data.slices import in_words, lie
from jmae.doubts import doubts, doubts_line
from jmae.errors import InputError, exit_code, shortly
from jmae.fitting import restore_results
from jmae.fusion import colours_of_file, common_normals, fused, fused_line, fused_map, scores_of_normals
from jmae.inference import Scorer, score_rows
from jmae.inputs import cases_of, image_of_array, is_image, row_of, several_cases, with_spacing
from jmae.likeness import read_kind, remedy, shown_line, unlike, unlike_text
from jmae.outlines import least_voxels, outline
from jmae.outputs import DONE, read_done
from jmae.p_values import Calibration
from jmae.processes import keep_compiled
from jmae.report import PERCENTILES, Scale, blend, short_training
from jmae.results import Result
from jmae.run_folder import add_line, log, output_folder, read_history, write_bytes, write_csv, write_text
from jmae.run_recipe import read_run, refuse_other_config
from jmae.sealed import seal_line
from jmae.seen import read_seen
from jmae.system import System, load_system
from jmae.tables import counted, plain
from jmae.waiting import at_work

GIVE = "give a path, a list of paths, or an array of numbers"


class Prediction(NamedTuple):
    """What a run says of one case. Higher is more abnormal.

    Attributes:
      map: float32, with the spatial shape of the input; None where the score has no map.
      score: of the case.
      p_value: None where the run is not calibrated for the case. None also where the case has a warning and the p-value
        is above the alarm rate.
      confidence: float32, standard deviation of the map over the system's samples; None where it has none.
      warning: in what the case is unlike the training images; "" where in nothing.
      mask: bool, the lesions; None where the run gives no threshold.
      image: the stored values and their grid.
      colours: colour scale of maps; None where the run gives none.
    """

    map: np.ndarray | None
    score: float
    p_value: float | None
    confidence: np.ndarray | None
    warning: str = ""
    mask: np.ndarray | None = None
    image: Image | None = None
    colours: Scale | None = None

    def picture(self) -> np.ndarray:
        """The image beside the image under its map: uint8 (rows, columns, 3). A volume has one slice, as `overlay`."""
        if self.image is None or self.map is None:
            raise InputError("the score has no map, so there is no picture")
        return np.concatenate(views(self.image, self.map, self.colours), 1)

    def _repr_html_(self) -> str:
        """The case in a notebook."""
        p = "none" if self.p_value is None else f"{self.p_value:.3g}"
        lines = [f"<p>score {self.score:.4g}, p-value {p}</p>"]
        lines += [f"<p>warning: {html.escape(self.warning)}</p>"] * bool(self.warning)
        if self.map is not None:
            pillow.fromarray(self.picture()).save(buffer := io.BytesIO(), "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            lines.append(f'<img src="data:image/png;base64,{data}" style="width: 40em; max-width: 100%">')
        return "".join(lines)

    def __repr__(self) -> str:
        size = None if self.map is None else self.map.shape
        return f"Prediction(score={self.score:.6g}, p_value={self.p_value}, map={size}, warning={self.warning!r})"


class Run(NamedTuple):
    """A trained run, ready to score. Call it with an image: `__call__` below says how."""

    config: ConfigDict
    system: System
    scorer: Scorer
    calibration: Calibration | None
    identity: dict[str, Any]  # as `score_identity` gives it
    seen: dict[str, Row]  # what the run was trained or calibrated on, by `Row.content`
    kind: dict[str, Any] | None  # what these images have in common (`likeness.read_kind`)
    unnamed: Iterator[int]  # numbers the arrays that come without an id, for messages

    @shortly
    def __call__(
        self,
        image: Any,
        spacing: Sequence[float] | None = None,
        affine: np.ndarray | None = None,
        id: str = "",
        region: Any = None,
        midline: str | float = "",
        half: str = "",
    ) -> Prediction:
        """Scores one case.

        Args:
          image: a path; or a list of the paths of a case's sequences; or an array (*size) or (*size, channels), a 2D
            image as rows and columns. An array of unsigned 8-bit numbers spans 0 to 255, all others are stretched. Of
            three equal channels, a run of grey images takes one.
          spacing: mm along each axis, where the input does not tell it.
          affine: (4, 4), voxel -> RAS mm, of an array. A volume with a spacing and without an affine is taken to have
            the axes of the run (`data.axes`, as PLS: indices grow to posterior, left and superior).
          id: name of the case in messages; without it, the file's name without its ending, or "array 0" for the first
            array, "array 1" for the second. The score does not depend on it, but for a run whose masks come from ids
            (evaluation.masks_of=case): then give the manifest's id.
          region: part of a volume that its score covers: a path, or an array (*size) on the volume's own grid, above 0
            inside, or above `data.mask_threshold` where it holds probabilities. A volume is cropped to the region, or
            normalised by it, where the run's training volumes were.
          midline, half: for a volume of two pieces, as in a manifest: "middle" or an index; "first" or "second".

        Returns: score, p-value, map and more: see `help` of what is returned.

        Raises:
          InputError: the case cannot be used; one line says why.
        """
        row, stored = case_of(self, image, spacing, affine, id)
        row = row._replace(extra={"midline": str(midline), "half": half})
        if problem := next((what for _, what in wrong_pieces(str(midline), half)), ""):
            raise InputError(f"{row.image[0]}: {problem}")
        if not self.system.sweep and (region is not None or midline or half):
            raise InputError(f"{row.image[0]}: only volumes have a region, a midline and halves: leave them out")
        row, inside = with_region(row, stored, region, self.config.data.mask_threshold)
        with at_work(lambda: self.scorer.progress("scoring")):
            case = self.scorer.prepare(row, stored, inside)
            tell_unlike(self, case)
            (result,) = self.scorer.score([case])
        line = self.shown(checked_line(self, row, result))
        found = result.written(self.system, ["anomaly", "confidence"])
        maps = found.get("anomaly"), found.get("confidence")
        return Prediction(
            maps[0],
            line["score"],
            line["p_value"],
            maps[1],
            line["warning"],
            mask_of(self, result, maps[0]),
            stored,
            colours_of(self.calibration),
        )

    def shown(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line of scores.csv as the user sees it (`likeness.shown_line`)."""
        return shown_line(line, alarm_rate(self.config), len(self.calibration.scores) if self.calibration else 0)

    def __repr__(self) -> str:
        return f"<a trained run of {self.system.name}: call it with an image>"


def main(argv: list[str]) -> int:
    workdirs, rest = recipe.values_of(argv, "workdir")
    if len(workdirs) > 1:
        return predict_with_several([Path(workdir) for workdir in workdirs], rest)
    wanted = command_words.prediction_request(argv, __doc__)
    config, workdir, out = wanted.config, wanted.workdir, wanted.out
    rows = command_words.listed_cases(wanted.manifest) if wanted.manifest else []
    refuse_other_config(workdir)
    if wanted.names:
        other = list[Path]()
        cases = [case for name in wanted.names for case in cases_of(name, other, volumes=recipe.is_volume(config))]
        if other:
            log(f"left out: {in_words(count_unread(other))}")
        rows = [row_of(name, case) for name, case in zip(names_of(cases), cases, strict=True)]
    keep_compiled()
    try:
        run = open_run(workdir, config)
        with checkpoint.workdir_lock(out, "--out"):
            return predict_rows(run, rows, out, further=wanted.further)
    except KeyboardInterrupt:
        log("interrupted: the same command with --continue finishes what is missing")
        return 130


def predict_with_several(workdirs: Sequence[Path], argv: Sequence[str]) -> int:
    """Predicts with each run into a folder of its own inside --out, and fuses what all of them predicted there."""
    values, rest = recipe.values_of(argv, "out")
    if not values:
        raise InputError("name a folder: --out=DIR")
    out = output_folder(values[-1], "predictions")
    normals = common_normals({str(workdir): scores_of_normals(workdir) for workdir in workdirs})[1]
    flags = recipe.command([word for word in rest if word != "--continue"], __doc__, command_words.PREDICT)[1]
    changed = {key: value for key, value in flags.items() if key.startswith("config")}
    rate = min(alarm_rate(command_words.run_of({"workdir": str(workdir), **changed})[1]) for workdir in workdirs)
    folders = [out / str(k + 1) for k in range(len(workdirs))]
    codes = [main([f"--workdir={w}", f"--out={f}", *rest]) for w, f in zip(workdirs, folders, strict=True)]
    runs = [scores_in(folder) for folder in folders]
    ids = [name for name in runs[0] if all(name in run for run in runs)]
    if not ids:
        raise InputError(f"{out}: no case was predicted by all runs: see {folders[0] / 'failed.csv'}")
    score, p = fused(normals, np.array([[float(run[name]["score"]) for name in ids] for run in runs]))
    scales = [colours_of_file(workdir) for workdir in workdirs]
    lines = list[dict[str, Any]]()
    for k, name in enumerate(ids):
        own = {f"score of {workdir.name}": run[name]["score"] for workdir, run in zip(workdirs, runs, strict=True)}
        line = {"id": name, "label": "", "score": float(score[k]), "p_value": float(p[k])}
        lines.append(fused_line(line | own, [run[name] for run in runs], rate, normals.shape[1]))
        files = [next(iter(sorted(folder.glob(f"{glob.escape(name)}_anomaly.*"))), None) for folder in folders]
        if all(files) and all(scales):
            images = [read_image([str(file)]) for file in files]
            heat = fused_map([image.array[..., 0] for image in images], [scale for scale in scales if scale])
            write_map(out / f"{name}_anomaly", heat, images[0])
    write_csv(out / "scores.csv", lines)
    log(f"{counted(len(lines), 'cases')} of {len(workdirs)} runs: {out / 'scores.csv'}")
    log("\n".join(highest(lines, rate)))
    return max(codes)


def load(workdir: str | os.PathLike) -> Run:
    """A trained run, ready to score: call it with an image.

    Raises InputError where the folder holds no finished run.
    """
    return open_run(Path(workdir), read_run(Path(workdir)))


def case_of(
    run: Run, image: Any, spacing: Sequence[float] | None, affine: np.ndarray | None, id: str
) -> tuple[Row, Image]:
    """The row and the stored image of a case that Python gives: a path, several, or an array."""
    is_path = lambda part: isinstance(part, str | os.PathLike)
    if isinstance(image, list | tuple) and not image:
        raise InputError(f"an empty {type(image).__name__} is no case: {GIVE}")
    if is_path(image) or (isinstance(image, list | tuple) and all(map(is_path, image))):
        parts = [image] if is_path(image) else list(image)
        case = tuple(part for word in parts for part in sequences(os.fspath(word)))
        if not is_path(image) and len(case) > run.config.data.channels:
            raise several_cases(case, "paths", run.config.data)
        row = row_of(id or id_of(stem_of(case[0])), case)
        stored = stored_case(row, run.config.data)
        stored = with_spacing(stored, spacing, row.image[0])
        if affine is not None:
            raise InputError(f"{row.image[0]}: affine goes with an array, a file has its own: leave it out")
        return row, stored
    if isinstance(image, list | tuple) and any(is_image(part, run.config.data) for part in image):
        raise several_cases(image, "arrays", run.config.data)
    row = Row(id, "", NEW, None, (f"array {id or next(run.unnamed)}",))
    try:
        array = np.asarray(image)
    except ValueError:  # lists of unequal lengths
        array = np.array(None)
    if array.dtype == object:
        raise InputError(f"{row.image[0]}: {type(image).__name__} is no image: {GIVE}")
    return row, image_of_array(array, run.config.data, spacing, affine, row.image[0])


def with_region(row: Row, stored: Image, region: Any, threshold: float) -> tuple[Row, np.ndarray | None]:
    """(the row with its region, the region bool on the image's own grid where it is an array)."""
    if region is None:
        return row, None
    if isinstance(region, str | os.PathLike):
        return row._replace(region=os.path.abspath(region)), None
    inside, _ = marks_of(np.asarray(region), threshold, f"{row.image[0]}: its region")
    if inside.shape != stored.size:
        what = f"its region has the shape {inside.shape}, the image {stored.size}"
        raise InputError(f"{row.image[0]}: {what}: give one on the image's grid")
    return row._replace(region="array"), inside


# --- a run ------------------------------------------------------------------------------------------------------------


def open_run(workdir: Path, config: ConfigDict) -> Run:
    """A run folder's last checkpoints, ready to score; raises InputError where one is missing."""
    system = load_system(config)
    results = restore_results(config, system, workdir)
    calibration = read_calibration(config, system, results, workdir)
    seen = {row.content: row for row in read_seen(workdir) if row.content}
    if calibration and not seen and config.data.manifest:
        log(f"warning: {workdir} has no seen.csv: p-values of images that it was trained on mean nothing")
    if calibration and calibration.needs:
        log(
            f"only cases with a {' and a '.join(calibration.needs)} get p-values, as the held-out normals have "
            "them: name them in columns of --manifest=CASES.csv, or from Python by keyword"
        )
    if line := doubts_line(doubts(read_history(workdir / "metrics.jsonl"), system.stages)):
        log(line)
    scorer = Scorer(config, system, results)
    identity = score_identity(config, system, results)
    return Run(config, system, scorer, calibration, identity, seen, read_kind(workdir), count())


def tell_unlike(run: Run, case: Prepared) -> None:
    """Logs in what a case is unlike the training images, before it is scored: to score a huge volume takes long."""
    if warning := unlike(case.traits, run.kind):
        name = case.row.id or case.row.image[0]
        log(f"{name}: warning: unlike the images that the run was trained on: {warning}")


def checked_line(run: Run, row: Row, result: Result) -> dict[str, Any]:
    """A line of scores.csv, before a warning withholds its p-value; raises InputError where a score is not finite."""
    assert result.case.stored
    warning = unlike(result.case.traits, run.kind)
    line = score_line(row, result.scores, run.system, run.calibration, result.score_error, warning)
    if line["p_value"] is not None and (seen := run.seen.get(content(result.case.stored.array))):
        why = f"the run was trained or calibrated on this image ({seen.id} in {seen.split})"
        log(f"{row.id or row.image[0]}: no p-value: {why}")
        line["p_value"] = None
    return line


def scores_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of a folder's scores.csv, by id, with the p-values that a warning withholds; {} where no case was
    predicted."""
    if not (folder / "scores.csv").exists():
        return {}
    whole = {line["id"]: {"p_value": line["line"]["p_value"]} for line in read_done(folder / DONE)[1:]}
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return {name: line | whole.get(name, {}) for line in csv.DictReader(file) for name in [plain(line["id"])]}


# --- the command ------------------------------------------------------------------------------------------------------


def predict_rows(run: Run, rows: Sequence[Row], out: Path, *, further: bool) -> int:
    """Predicts the rows into `out` and returns the exit code.

    Raises:
      InputError: `out` holds predictions and `further` is False, or it holds those of another run, or cannot be
        written.
    """
    if not further and holds_predictions(out):
        raise InputError(
            f"{out}: holds predictions: add --continue to finish them or to add scans, or name another --out"
        )
    done = begin(run, out)
    for row in rows:
        if row.id in done and done[row.id]["image"] != list(row.image):
            raise InputError(f"{row.id}: {out} has another case of that name: name another --out")
    missing = [row for row in rows if row.id not in done or done[row.id]["of"] != stamps(row)]
    for row in missing:
        done.pop(row.id, None)  # of other files: if the case fails now, its old score must not stay
    if len(missing) < len(rows):
        log(f"done before: {len(rows) - len(missing)} of {counted(len(rows), 'cases')}")
    colours = colours_of(run.calibration)
    if missing and colours is None:
        log("warning: each overlay has its own colour scale, as no held-out normals give one: do not compare them")
    if missing and (reason := why_no_masks(run.calibration, alarm_rate(run.config))):
        log(reason)
    if missing and (short := short_training(run.config)):
        log(f"short training: {short}")
    failed: dict[str, list[Failure]] = {}  # by what is wrong

    def fail(row: Row, error: Exception) -> None:
        reason = printable(why_failed(row, error))
        alike = failed.setdefault(reason.split(": ", 1)[-1], [])
        if not alike:
            log(f"failed: {printable(row.id)}: {reason}")
        alike.append(Failure(row, reason, isinstance(error, OtherRank)))

    for result in score_rows(run.scorer, missing, failed=fail, ready=partial(tell_unlike, run)):
        row = result.case.row
        try:
            line = checked_line(run, row, result)
        except InputError as error:
            fail(row, error)
            continue
        files = write_case(run, result, out, colours)
        done[row.id] = {"id": row.id, "image": list(row.image), "of": stamps(row), "files": files, "line": line}
        add_line(out / DONE, seal_line(done[row.id]))
    for alike in failed.values():
        if len(alike) > 1:
            log(f"failed: {len(alike) - 1} more for the same reason as {printable(alike[0].row.id)}")
    failures = [one for alike in failed.values() for one in alike]
    shown = {name: {**one, "line": run.shown(one["line"])} for name, one in done.items()}
    code = finish(rows, shown, failures, out, alarm_rate(run.config))
    log(f"next: {next_step(failures, bool(done), 'images' if recipe.is_volume(run.config) else 'volumes')}")
    return code


class Failure(NamedTuple):
    """A case without a score."""

    row: Row
    reason: str
    final: bool  # whether another try cannot succeed

    def line(self) -> dict[str, str]:
        """The case's line of failed.csv."""
        texts = {"id": self.row.id, "image": ";".join(self.row.image), "reason": self.reason}
        return {k: text.encode(errors="backslashreplace").decode() for k, text in texts.items()}


def why_failed(row: Row, error: Exception) -> str:
    """Why a case has no score, in one line."""
    if isinstance(error, MemoryError):
        return f"{row.image[0]}: does not fit in the memory: crop or resample it"
    if isinstance(error, InputError):
        return str(error)
    return f"{row.image[0]}: cannot be used ({type(error).__name__}: {error}): export it again, or report this"


def printable(text: str) -> str:
    """The text with its control characters written out. A terminal would obey those of a file's name or header."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def stamps(row: Row) -> list[list]:
    """Sizes and times of a case's files, and its further columns: `--continue` sees by them what has changed.

    Empty where a file is gone.
    """
    try:
        names = [*row.image, *([row.region] if row.region else [])]
        parts = [sorted(Path(name).iterdir()) if Path(name).is_dir() else [Path(name)] for name in names]
        files = [[path.stat().st_size, path.stat().st_mtime_ns] for part in parts for path in part]
        return [*files, *([column, cell] for column, cell in sorted(row.extra.items()) if cell)]
    except OSError:
        return []


def holds_predictions(out: Path) -> bool:
    """Whether a folder has predictions, finished or not. Failures alone are none."""
    return len(read_done(out / DONE)) > 1 or (out / "scores.csv").exists()


def begin(run: Run, out: Path) -> dict[str, dict[str, Any]]:
    """The lines of the cases that are done in `out`, by id; makes the folder ready for more."""
    calibration = sorted(run.calibration.scores.items()) if run.calibration else None
    head = json.loads(
        json.dumps({**run.identity, "calibration": hashlib.sha256(repr(calibration).encode()).hexdigest()})
    )
    lines = read_done(out / DONE)
    if lines and lines[0] != head and holds_predictions(out):
        raise InputError(f"{out}: holds predictions of another run, calibration or settings: name another --out")
    if not lines and (out / "scores.csv").exists():
        raise InputError(f"{out}: holds a scores.csv that nothing can be added to: name another --out")
    whole = [line for line in lines[1:] if all((out / file).exists() for file in line["files"])]
    done = {line["id"]: line for line in whole}
    write_text(out / DONE, "".join(f"{seal_line(line)}\n" for line in [head, *done.values()]))
    return done


def write_case(run: Run, result: Result, out: Path, colours: Scale | None) -> list[str]:
    """Writes the maps and the overlay of a case; returns the names of the files."""
    asked = ["anomaly", "confidence", *(["recon"] if run.config.evaluation.get("reconstruction") else [])]
    found, case = result.written(run.system, asked), result.case
    files = [write_map(out / f"{case.row.id}_{name}", array, case.geometry).name for name, array in found.items()]
    if "anomaly" in found:
        assert case.stored
        mask = mask_of(run, result, found["anomaly"])
        if mask is not None:
            files.append(write_map(out / f"{case.row.id}_mask", mask, case.geometry).name)
        picture = io.BytesIO()
        pillow.fromarray(overlay(case.stored, found["anomaly"], colours)).save(picture, "PNG")
        write_bytes(out / f"{case.row.id}_overlay.png", picture.getvalue())
        files.append(f"{case.row.id}_overlay.png")
    return files


def mask_of(run: Run, result: Result, heat: np.ndarray | None) -> np.ndarray | None:
    """The mask of lesions, bool on the case's own grid; None without a map or a threshold."""
    case, threshold = result.case, mask_threshold(run.config, run.calibration)
    if heat is None or threshold is None:
        return None
    least = least_voxels(run.config.evaluation.mask_least, case.geometry.spacing)
    return outline(heat, threshold, least, case.counted_voxels())


def overlay(stored: Image, heat: np.ndarray, colours: Scale | None) -> np.ndarray:
    """An image under its map in colours, uint8 (rows, columns, 3), with one pixel for each pixel of the image.

    A volume is shown by the axial slice with the highest value, or without a position by the slice across the last
    axis.

    Args:
      stored: the image.
      heat: the map (*size).
      colours: the colour scale; None takes the map's own.
    """
    return views(stored, heat, colours)[1]


def views(stored: Image, heat: np.ndarray, colours: Scale | None) -> tuple[np.ndarray, np.ndarray]:
    """(the image alone, the image under its map), as `overlay` has them."""
    heat, stored = np.nan_to_num(heat), stored._replace(array=np.nan_to_num(stored.array, posinf=0, neginf=0))
    low, high = (float(end) for end in np.percentile(heat, PERCENTILES))
    colourful = heat.ndim == 2 and stored.array.shape[-1] == 3
    shown, colours = (
        stored.array if colourful else stored.array[..., 0],
        colours or Scale(low, high if high > low else low + 1, ""),
    )
    if heat.ndim == 3:
        layout = lie("2" if stored.affine is None else "axial", stored.affine, "")
        k = int(heat.max(axis=tuple(axis for axis in range(3) if axis != layout.across)).argmax())
        shown, heat = layout.plane(shown, k), layout.plane(heat, k)
    dark, bright = np.percentile(shown, (1, 99))
    unit = np.clip((shown - dark) / ((bright - dark) or 1), 0, 1)
    plain = (255 * np.broadcast_to(unit.reshape(*heat.shape, -1), (*heat.shape, 3))).round().astype(np.uint8)
    return plain, blend(unit, heat, colours)


def finish(rows: Sequence[Row], done: Mapping[str, Mapping], failed: Sequence[Failure], out: Path, rate: float) -> int:
    """Writes scores.csv of all cases that are done, and failed.csv of the rows that failed now; logs the counts and the
    highest scores, marked by the alarm rate `rate`, and returns the exit code."""
    now = {row.id for row in rows}
    lines = [done[name]["line"] for name in done if name not in now]
    lines += [done[row.id]["line"] for row in rows if row.id in done and done[row.id]["image"] == list(row.image)]
    if lines:
        names = dict.fromkeys(name for line in lines for name in line)
        cell = lambda value: "" if value is None else value
        write_csv(out / "scores.csv", [{name: cell(line.get(name)) for name in names} for line in lines])
    if failed:
        write_csv(out / "failed.csv", [one.line() for one in failed])
    else:
        (out / "failed.csv").unlink(missing_ok=True)
    log(f"{counted(len(lines), 'cases')}: {out / 'scores.csv'}" if lines else "no case was predicted")
    if warned := sum(bool(line.get("warning")) for line in lines):
        what = f"{unlike_text(warned, len(lines))} the images that the run was trained on"
        log(f"{what}: {remedy(warned, len(lines))}")
    if lines:
        log("\n".join(highest(lines, rate)))
    if failed:
        log(f"{len(failed)} of {counted(len(failed) + len(lines), 'cases')} failed: {out / 'failed.csv'}")
    return 1 if failed else 0


def next_step(failed: Sequence[Failure], predicted: bool, other: str) -> str:
    """What to do next; `other` names the kind of scans that the run does not take."""
    final = sum(one.final for one in failed)
    mendable, steps = len(failed) - final, list[str]()
    if predicted and not mendable:
        steps.append("look at the overlays of the highest scores: ID_overlay.png")
    if final:
        steps.append(f"score {counted(final, other)} with a run of {other} (--workdir)")
    if mendable:
        them = f"the other {counted(mendable, 'cases')}" if final else "them"
        steps.append(f"mend {them}, then the same command with --continue")
    return "; ".join(steps)


if __name__ == "__main__":
    sys.exit(exit_code(main))
