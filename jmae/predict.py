"""python -m jmae.predict --workdir DIR --out DIR [--continue] INPUT [INPUT ...] [--config.evaluation.KEY=VALUE ...]
python -m jmae.predict --workdir DIR --out DIR [--continue] --manifest CASES.csv [--config.evaluation.KEY=VALUE ...]

Scores new cases with a trained run: for each a map on its own grid, a score, and what the score means.

INPUT is a case: an image file of any name, told by its content; the sequences of one case joined by ";", in the order
of the run's channels; of a run of volumes a folder of one DICOM series. Or a folder of cases: every file in it and
below is a case, or every series where the run is of volumes; hidden files and DICOMDIR are passed over. A case's id is
its (first) file's name without the format's ending; two of one name are told apart by their folders.

CASES.csv lists cases instead: columns id and image, and where volumes are scored within a region or in two pieces also
region, midline and half, all as in a manifest, whose other columns are not looked at.

Into --out: ID_anomaly.nii.gz (of images .tif, 32 bits), ID_confidence where the system has one, ID_recon where the
recipe has evaluation.reconstruction, ID_overlay.png (of a volume the axial slice with the highest value), and, when all
is done, scores.csv: id,label,score,p_value and further scores. The p-value says how many held-out normals score as high
(jmae.scoring.Calibration); it is empty where the run is not calibrated, for an image that it was trained or calibrated
on, and where a case names no region, midline or half and the normals did, or the other way round. What fails is said,
listed in failed.csv, and the other cases go on.

--continue  finishes what is missing in --out: after an interruption, or once what failed is mended.

Exit codes: 0 done; 1 some cases failed; 2 the input or the environment is wrong.
"""

import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image as pillow

from jmae import recipe
from jmae.calibration import NEEDS, colours_of, read_calibration, score_line, scored_by, stated
from jmae.data.duplicates import content
from jmae.data.files import Image, is_dicom, write_map
from jmae.data.loader import WORKERS, Decoded, case_words, prepared, read_case, stored_image, stored_volume
from jmae.data.manifest import ID_BYTES, Row, read_cases, wrong_pieces
from jmae.data.slices import command, lie
from jmae.data.volumes import WORLD
from jmae.errors import InputError, exit_code
from jmae.evaluate import run_of
from jmae.inference import (
    SECONDS_BETWEEN_LINES,
    Result,
    ahead,
    image_result,
    own_results,
    restore_results,
    scorer,
    sweeper,
    volume_result,
)
from jmae.processes import keep_compiled
from jmae.report import PERCENTILES, Scale, blend
from jmae.run_folder import add_history, log, output_folder, read_history, write_bytes, write_csv, write_text
from jmae.scoring import Calibration
from jmae.seen import read_seen
from jmae.system import System, load_system

ENDINGS = ".nii.gz .nii .dcm .dicom .ima .png .jpg .jpeg .tif .tiff .nrrd .npy .npz".split()
DONE = ".scores.jsonl"  # in --out: what the predictions are of, then a line a finished case
SPLIT = "predict"  # of the rows, which are in no split


class Prediction(NamedTuple):
    """What a run says of one case."""

    map: np.ndarray | None  # float32, the input's spatial shape; higher is more abnormal; None: the score has no map
    score: float
    p_value: float | None  # None where the run is not calibrated
    confidence: np.ndarray | None  # float32, deviation of the map over the system's samples; None where it has none


class Run(NamedTuple):
    """A trained run, ready to score."""

    config: ConfigDict
    system: System
    calibration: Calibration | None
    of: dict[str, Any]  # `scored_by`
    at_once: int  # cases that are scored together
    open: Callable[..., Any]  # (row, image if it has been read, region if it is no file): a case, as `score` takes it
    seen: dict[str, Row]  # what it was trained or calibrated on, by `Row.content`
    score: Callable[[Sequence[Row], Sequence[Any]], list[Result]]


def main(argv: list[str]) -> int:
    further = "--continue" in argv
    words = [word for word in argv if word != "--continue"]
    names, given = command(words, __doc__, ["workdir", "out", "manifest", "continue", "config"])
    if bool(names) == ("manifest" in given) or "out" not in given:
        raise InputError(
            "name a new folder and either at least one case or --manifest=CASES.csv: "
            "python -m jmae.predict --workdir=DIR --out=DIR INPUT"
        )
    out = output_folder(given["out"])
    workdir, config = run_of(given)
    if names:
        cases = [case for name in names for case in cases_of(name, volumes=len(config.data.size) == 3)]
        rows = [row_of(name, case) for name, case in zip(names_of(cases), cases, strict=True)]
    else:
        rows = read_cases(given["manifest"], SPLIT)
    keep_compiled()
    try:
        return predict_all(open_run(workdir, config), rows, out, further=further)
    except KeyboardInterrupt:
        log("interrupted: the same command with --continue finishes what is missing")
        return 130


def load(workdir: str | os.PathLike) -> Callable[..., Prediction]:
    """The function `predict(image, spacing=None, affine=None, id="", region=None, midline="", half="")` -> Prediction
    of a run folder.

    Raises InputError where the folder holds no finished run. `predict` raises it, in one line, where a case cannot be
    used. Its arguments:
      image: a path, or several of the sequences of one case, as the command takes them; or an array (*size) or
        (*size, channels), 2D images as rows and columns. Unsigned 8-bit images span 0 to 255, all others are
        stretched.
      spacing: mm along each axis, where the input does not tell it.
      affine: (4, 4), voxel -> RAS mm, of an array. Without one, a volume with a spacing is taken to have the axes that
        the run works in (`data.axes`, as PLS: indices grow to posterior, left and superior).
      id: whence a case's random masks come: that of the manifest repeats `jmae.evaluate` on the same device. Of a path
        it is the file's name without its ending.
      region: of a volume, where its score counts, and what it is cropped to or normalised by where the run's training
        volumes were: a path, or an array (*size) on the volume's own grid, above 0 inside.
      midline, half: of a volume that is two pieces, as in a manifest: "middle" or an index; "first" or "second".
    """
    workdir = Path(workdir)
    run = open_run(workdir, recipe.read(workdir))

    def predict(
        image: Any,
        spacing: Sequence[float] | None = None,
        affine: np.ndarray | None = None,
        id: str = "",
        region: Any = None,
        midline: str | float = "",
        half: str = "",
    ) -> Prediction:
        named = isinstance(image, str | os.PathLike)
        if named or (isinstance(image, list | tuple) and all(isinstance(part, str | os.PathLike) for part in image)):
            parts = [image] if named else list(image)
            case = tuple(part for word in parts for part in sequences(os.fspath(word)))
            row = row_of(id or clean(stem(case[0])), case)
            stored = with_spacing(stored_case(row, run.config), spacing, row.image[0])
            if affine is not None:
                raise InputError(f"{row.image[0]}: affine is of arrays, a file tells its own: leave it out")
        else:
            row = Row(id, "", SPLIT, None, (f"array {id}".strip(),))
            stored = of_array(image, run.config.data, spacing, affine, row.image[0])
        row = row._replace(extra={"midline": str(midline), "half": half})
        inside: np.ndarray | None = None
        if problem := next((what for _, what in wrong_pieces(str(midline), half)), ""):
            raise InputError(f"{row.image[0]}: {problem}")
        if not run.system.sweep and (region is not None or midline or half):
            raise InputError(f"{row.image[0]}: a region, a midline and halves are of volumes: leave them out")
        if isinstance(region, str | os.PathLike):
            row = row._replace(region=os.path.abspath(region))
        elif region is not None:
            row = row._replace(region="array")
            inside = np.asarray(region) > 0
            if inside.shape != stored.array.shape[:-1]:
                what = f"its region has the shape {inside.shape}, the image {stored.array.shape[:-1]}"
                raise InputError(f"{row.image[0]}: {what}: give one on the image's grid")
        (result,) = run.score([row], [run.open(row, stored, inside)])
        line = checked_line(run, row, result)
        found = own_results(result, run.system, ["anomaly", "confidence"])
        return Prediction(found.get("anomaly"), line["score"], line["p_value"], found.get("confidence"))

    return predict


# --- a run ------------------------------------------------------------------------------------------------------------


def open_run(workdir: Path, config: ConfigDict) -> Run:
    """A run folder's last checkpoints, ready to score; raises InputError where one is missing."""
    system = load_system(config)
    results = restore_results(config, system, workdir)
    calibration, of = read_calibration(config, system, results, workdir), scored_by(config, system, results)
    seen = {row.content: row for row in read_seen(workdir) if row.content}
    if calibration and not seen and config.data.manifest:
        log(f"warning: {workdir} has no list of the images it has seen: theirs get p-values too, which mean nothing")
    if calibration and calibration.needs:
        log(
            f"p-values are of cases with a {' and a '.join(calibration.needs)}, as the held-out normals had: name them "
            "in columns of --manifest=CASES.csv, from Python by keyword"
        )
    if system.sweep:
        sweep = sweeper(config, system.sweep, results)
        open_one = lambda row, stored=None, region=None: prepared(row, config.data, stored, region)
        one_by_one = lambda rows, cases: [volume_result(config, *case, sweep) for case in zip(rows, cases, strict=True)]
        return Run(config, system, calibration, of, 1, open_one, seen, one_by_one)
    run = scorer(config, system, results)

    def open_image(row: Row, stored: Image | None = None, region: Any = None) -> tuple[Image, np.ndarray]:
        stored = stored_image(row) if stored is None else stored
        return stored, read_case(row, config.data, stored)

    def score(rows: Sequence[Row], cases: Sequence[tuple[Image, np.ndarray]]) -> list[Result]:
        words = np.array([case_words(row.id) for row in rows])
        scored = run(Decoded(np.stack([image for _, image in cases]), words), np.arange(len(rows)))
        return [image_result(stored, image, scored, k) for k, (stored, image) in enumerate(cases)]

    return Run(config, system, calibration, of, config.evaluation.batch, open_image, seen, score)


def stored_case(row: Row, config: ConfigDict) -> Image:
    """A case as stored, read as the run's training read it."""
    return stored_volume(row, config.data) if "join" in config.data else stored_image(row)


def checked_line(run: Run, row: Row, result: Result) -> dict[str, Any]:
    """A line of scores.csv; raises InputError where a score is not finite."""
    if bad := [name for name, values in result.scores.items() if not np.isfinite(values).all()]:
        raise InputError(f"{row.image[0]}: its score {bad[0]} is not finite: look at its values, or leave it out")
    line = score_line(row, result.scores, run.system, run.calibration)
    if line["p_value"] is not None and (why := without_p_value(run, row, result.stored)):
        log(f"{row.id}: no p-value: {why}")
        line["p_value"] = None
    return line


def without_p_value(run: Run, row: Row, stored: Image) -> str:
    """Why a score of a calibrated run says nothing of a case; empty where it does."""
    if known := run.seen.get(content(stored.array)):
        return f"it is the image of {known.id} in {known.split}, which the run was trained or calibrated on"
    assert run.calibration
    further = [name for name in NEEDS if stated(row, name) and name not in run.calibration.needs]
    return f"it has a {further[0]}, which the held-out normals had not" if run.system.sweep and further else ""


# --- cases ------------------------------------------------------------------------------------------------------------


def cases_of(word: str, *, volumes: bool) -> list[tuple[str, ...]]:
    """The cases that an argument names, each the absolute paths of its sequences. What cannot be read is a case too,
    which will be refused by its name."""
    paths = sequences(word)
    if len(paths) > 1 or not os.path.isdir(paths[0]):
        return [paths]
    return list(in_folder(Path(paths[0]), volumes)) or [paths]


def in_folder(folder: Path, volumes: bool) -> Iterator[tuple[str, ...]]:
    """The cases in a folder and below, in the order of their names; links to folders are not followed."""
    try:
        there = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name != "DICOMDIR")
    except OSError:
        yield (str(folder),)
        return
    below = [path.is_dir() and not path.is_symlink() for path in there]
    if volumes and any(is_dicom(path) for path, is_folder in zip(there, below, strict=True) if not is_folder):
        yield (str(folder),)
        there, below = [path for path in there if path.is_dir()], [True] * sum(below)
    for path, is_folder in zip(there, below, strict=True):
        if is_folder:
            yield from in_folder(path, volumes)
        else:
            yield (str(path),)


def sequences(word: str) -> tuple[str, ...]:
    """The absolute paths of "a;b", or of one file whose name may hold a semicolon."""
    parts = [word] if os.path.exists(word) else [part.strip() for part in word.split(";")]
    if not all(parts):
        raise InputError(f"{word!r}: is empty, or has an empty name between semicolons: name a file a sequence")
    return tuple(os.path.abspath(part) for part in parts)


def row_of(name: str, case: tuple[str, ...]) -> Row:
    """A case as the row of a manifest that tells nothing more of it."""
    return Row(name, "", SPLIT, None, case)


def names_of(cases: Sequence[tuple[str, ...]]) -> list[str]:
    """An id a case: the name of its first file; with its ending, then with as many folders as it takes, where another
    case has the same. Raises InputError where two cases begin with one file."""
    paths = [Path(case[0]) for case in cases]
    if twice := [path for path, n in Counter(paths).items() if n > 1]:
        raise InputError(f"{twice[0]}: is (the first file of) two cases, whose maps would have one name: name it once")
    beside = Counter((path.parent, clean(stem(path))) for path in paths)
    last = [path.name if beside[path.parent, clean(stem(path))] > 1 else stem(path) for path in paths]
    folders = [0] * len(paths)
    while True:
        names = [
            clean("_".join([*path.parts[-1 - n : -1], name]))
            for path, name, n in zip(paths, last, folders, strict=True)
        ]
        count = Counter(names)
        deeper = [i for i, name in enumerate(names) if count[name] > 1 and folders[i] < len(paths[i].parts) - 2]
        if not deeper:
            if max(count.values()) > 1:
                raise InputError(f"{count.most_common(1)[0][0]}: would be the id of two cases: rename one of them")
            return names
        for i in deeper:
            folders[i] += 1


def stem(path: str | Path) -> str:
    """A file's name without the ending of its format, a folder's whole name."""
    name = os.path.basename(path)
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name if os.path.isdir(path) or len(ending) == len(name) else name[: len(name) - len(ending)]


def clean(name: str) -> str:
    """A name as an id: no leading dots, nothing that does not print, not longer than a file's name may be."""
    name = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).lstrip(".") or "case"
    if len(name.encode()) > ID_BYTES:
        name = (
            name.encode()[: ID_BYTES - 9].decode(errors="ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        )
    return name


def of_array(
    image: Any, data: ConfigDict, spacing: Sequence[float] | None, affine: np.ndarray | None, name: str
) -> Image:
    """An array (*size) or (*size, channels) as an image on its own grid; raises InputError where it is none."""
    rank, array = len(data.size), np.asarray(image)
    if array.dtype.kind not in "biuf" or array.ndim not in (rank, rank + 1) or not array.size:
        shape = "(*size)" if data.channels == 1 else f"(*size, {data.channels})"
        raise InputError(
            f"{name}: is {array.dtype}{list(array.shape)}: give real values {shape} with {rank} axes of space"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        values = np.ascontiguousarray(array if array.ndim > rank else array[..., None], np.float32)
    bits = {"u1": 8, "u2": 16}.get(array.dtype.str[1:])
    if affine is not None:
        affine = np.asarray(affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise InputError(f"{name}: its affine is no invertible (4, 4) matrix of voxels to RAS mm: give one")
        spacing = spacing if spacing is not None else tuple(np.linalg.norm(affine[:3, :rank], axis=0).tolist())
    stored = with_spacing(Image(values, None, affine, bits), spacing, name)
    if affine is None and stored.spacing and rank == 3 and data.get("axes"):
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        for axis, (letter, mm) in enumerate(zip(data.axes, stored.spacing, strict=True)):
            world, sign = WORLD[letter]
            affine[world, axis] = sign * mm
        stored = stored._replace(affine=affine)
    return stored


def with_spacing(stored: Image, spacing: Sequence[float] | None, name: str) -> Image:
    """The image with a spacing in mm where it tells none; raises InputError where that is none or another."""
    if spacing is None:
        return stored
    mm, rank = np.asarray(spacing, float), stored.array.ndim - 1
    if mm.shape != (rank,) or not (np.isfinite(mm).all() and (mm > 0).all()):
        raise InputError(f"{name}: the spacing {spacing} is not {rank} numbers above 0: give mm along each axis")
    if stored.spacing and not np.allclose(stored.spacing, mm, rtol=0.01):
        raise InputError(f"{name}: has the spacing {stored.spacing} mm, not {tuple(spacing)}: leave it out")
    return stored if stored.spacing else stored._replace(spacing=tuple(mm.tolist()))


# --- the command ------------------------------------------------------------------------------------------------------


def predict_all(run: Run, rows: Sequence[Row], out: Path, *, further: bool) -> int:
    """Predicts the rows into `out`, a group at a time, the next one being read meanwhile; returns the exit code.

    Raises InputError where `out` holds predictions and `further` is False, or those of another run, or cannot be
    written.
    """
    done = begin(run, out, further)
    for row in rows:
        if row.id in done and done[row.id]["image"] != list(row.image):
            raise InputError(f"{row.id}: {out} has another case of that name: name another --out")
    missing = [row for row in rows if row.id not in done or done[row.id]["of"] != stamps(row)]
    if len(missing) < len(rows):
        log(f"{len(rows) - len(missing)} of {len(rows)} cases are done")
    colours = colours_of(run.calibration) if run.calibration else None
    if missing and colours is None:
        log("warning: overlays have a colour scale each, as no held-out normals give one: do not compare them")
    failed: list[dict[str, str]] = []

    def fail(row: Row, error: Exception) -> None:
        reason = str(error) or f"{row.image[0]}: does not fit in the memory: crop or resample it"
        log(f"failed: {row.id}: {reason}")
        texts = {"id": row.id, "image": ";".join(row.image), "reason": reason}
        failed.append({k: text.encode(errors="backslashreplace").decode() for k, text in texts.items()})

    groups = [missing[i : i + run.at_once] for i in range(0, len(missing), run.at_once)]
    said = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        opened = ahead(lambda group: list(pool.map(partial(opened_case, run), group)), groups)
        for number, (group, cases) in enumerate(zip(groups, opened, strict=True)):
            good = []
            for row, case in zip(group, cases, strict=True):
                if isinstance(case, Exception):
                    fail(row, case)
                else:
                    good.append((row, case))
            try:
                results = run.score([row for row, _ in good], [case for _, case in good]) if good else []
            except InputError as error:  # a volume that does not fit in the device's memory
                for row, _ in good:
                    fail(row, error)
                continue
            for (row, _), result in zip(good, results, strict=True):
                try:
                    line = checked_line(run, row, result)
                except InputError as error:
                    fail(row, error)
                    continue
                files = write_case(run, row, result, out, colours)
                done[row.id] = {"id": row.id, "image": list(row.image), "of": stamps(row), "files": files, "line": line}
                add_history(out / DONE, done[row.id])
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log(f"{min((number + 1) * run.at_once, len(missing))} of {len(missing)} cases")
    return finish(run, rows, done, failed, out)


def stamps(row: Row) -> list[list]:
    """Size and time of a case's files, by which `--continue` sees that one was replaced, and what else is said of it;
    none where one is gone."""
    try:
        names = [*row.image, *([row.region] if row.region else [])]
        parts = [sorted(Path(name).iterdir()) if Path(name).is_dir() else [Path(name)] for name in names]
        files = [[path.stat().st_size, path.stat().st_mtime_ns] for part in parts for path in part]
        return [*files, *([column, cell] for column, cell in sorted(row.extra.items()) if cell)]
    except OSError:
        return []


def opened_case(run: Run, row: Row) -> Any:
    """A case as `run.score` takes it, or why it cannot be used."""
    try:
        return run.open(row)
    except (InputError, MemoryError) as error:
        return error


def begin(run: Run, out: Path, further: bool) -> dict[str, dict[str, Any]]:
    """What is done in `out` already, by id; makes the folder ready for more."""
    calibration = sorted(run.calibration.scores.items()) if run.calibration else None
    head = json.loads(json.dumps({**run.of, "calibration": hashlib.sha256(repr(calibration).encode()).hexdigest()}))
    lines = read_history(out / DONE)
    if not further and ((out / DONE).exists() or (out / "scores.csv").exists()):
        raise InputError(f"{out}: holds predictions: add --continue to finish them, or name another --out")
    if lines and lines[0] != head:
        raise InputError(f"{out}: holds predictions of another run, calibration or settings: name another --out")
    if not lines and (out / "scores.csv").exists():
        raise InputError(f"{out}: holds a scores.csv that nothing can be added to: name another --out")
    whole = [line for line in lines[1:] if all((out / file).exists() for file in line["files"])]
    done = {line["id"]: line for line in whole}
    write_text(out / DONE, "".join(f"{json.dumps(line)}\n" for line in [head, *done.values()]))
    return done


def write_case(run: Run, row: Row, result: Result, out: Path, colours: Scale | None) -> list[str]:
    """Writes the maps and the overlay of a case; returns the names of the files."""
    asked = ["anomaly", "confidence", *(["recon"] if run.config.evaluation.get("reconstruction") else [])]
    found = own_results(result, run.system, asked)
    files = [write_map(out / f"{row.id}_{name}", array, result.stored).name for name, array in found.items()]
    if "anomaly" in found:
        picture = io.BytesIO()
        pillow.fromarray(overlay(result.stored, found["anomaly"], colours)).save(picture, "PNG")
        write_bytes(out / f"{row.id}_overlay.png", picture.getvalue())
        files.append(f"{row.id}_overlay.png")
    return files


def overlay(stored: Image, heat: np.ndarray, colours: Scale | None) -> np.ndarray:
    """An image under its map (*size) in colours, (rows, columns, 3) uint8, a pixel a pixel; of a volume the axial slice
    (without a position the one across the last axis) with the highest value. Without `colours` on the map's own."""
    low, high = (float(end) for end in np.percentile(heat, PERCENTILES))
    grey, colours = stored.array[..., 0], colours or Scale(low, high if high > low else low + 1, "")
    if heat.ndim == 3:
        layout = lie("2" if stored.affine is None else "axial", stored.affine, "")
        k = int(heat.max(axis=tuple(axis for axis in range(3) if axis != layout.across)).argmax())
        grey, heat = layout.plane(grey, k), layout.plane(heat, k)
    dark, bright = np.percentile(grey, (1, 99))
    return blend(np.clip((grey - dark) / ((bright - dark) or 1), 0, 1), heat, colours)


def finish(
    run: Run, rows: Sequence[Row], done: Mapping[str, Mapping], failed: Sequence[Mapping[str, str]], out: Path
) -> int:
    """Writes scores.csv of all that is done, and failed.csv; says what there is and returns the exit code."""
    now = {row.id for row in rows}
    lines = [done[name]["line"] for name in done if name not in now]
    lines += [done[row.id]["line"] for row in rows if row.id in done and done[row.id]["image"] == list(row.image)]
    if lines:
        write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in lines])
    if failed:
        write_csv(out / "failed.csv", failed)
    else:
        (out / "failed.csv").unlink(missing_ok=True)
    log(f"{len(lines)} cases: {out / 'scores.csv'}" if lines else "no case was predicted")
    if failed:
        log(f"{len(failed)} of {len(rows)} cases failed: {out / 'failed.csv'}: mend them and add --continue")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
