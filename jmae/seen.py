"""The rows that a run has seen (seen.csv), and what of other data may not be scored because of them."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.run_folder import log, write_csv

ALLOW = "config.data.allow_leaks"
SEEN, SEEN_COLUMNS = "seen.csv", ("id", "patient", "split", "image")


def write_seen(workdir: Path, rows: Sequence[Row]) -> None:
    """Adds rows that a run has been trained or calibrated on to seen.csv: id, patient, split and `Row.content`."""
    lines = dict.fromkeys((row.id, row.patient, row.split, row.content) for row in [*read_seen(workdir), *rows])
    if lines:
        write_csv(workdir / SEEN, [dict(zip(SEEN_COLUMNS, line, strict=True)) for line in lines])


def read_seen(workdir: Path) -> list[Row]:
    """The rows of seen.csv, their images told by their content alone; none where there is no such file. Raises
    InputError where it is damaged."""
    file = workdir / SEEN
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines, strict=True))
        return [Row(row["id"], row["patient"], row["split"], None, (), content=row["image"]) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"{file}: not readable ({error!r}): delete it and run jmae.train again") from None


def not_seen_before(config: ConfigDict, rows: Sequence[Row], workdir: Path) -> tuple[list[Row], str]:
    """A run's own rows, of which `test` and `val`, where `model.weights` names another run, are held against what
    `workdir` has seen, as `not_seen` does: that other run before the training, this one afterwards."""
    source = config.model.get("weights") or ""
    if not source or Path(source).is_file():
        return list(rows), ""
    where = f"{config.data.manifest or config.data.phantom} (model.weights={source})"
    return not_seen(rows, "test", workdir, where, allow=bool(config.data.get("allow_leaks")))


def not_seen(rows: Sequence[Row], split: str, workdir: Path, manifest: str, *, allow: bool) -> tuple[list[Row], str]:
    """The rows of another manifest, of which those of `split`, and of `val` that chooses thresholds, are held against
    what the run has seen (seen.csv): patients, images by their content, ids where that is not known; and the sentence
    that a run which does not tell what it has seen gets, else "". Raises InputError where one was seen, or with `allow`
    marks it; val of the run may be val again."""
    seen, unchecked = read_seen(workdir), ""
    if all(row.split == "val" for row in seen):
        unchecked = f"{workdir} does not say what it was trained on: not known whether cases of {manifest} were"
        log(f"warning: {unchecked}")
    by: dict[str, dict[str, Row]] = {"patient": {}, "content": {}, "id": {}}
    for row in seen:
        for key, named in by.items():
            named.setdefault(getattr(row, key), row)

    def leak(row: Row) -> str:
        for key, word in (("patient", "patient"), ("content", "image"), ("id", "id")):
            other = by[key].get(getattr(row, key)) if getattr(row, key) else None
            unsure = key == "id" and other and row.content and other.content
            if other and not unsure and not row.split == other.split == "val" != split:
                return f"the {word} of {row.id} is that of {other.id}, {other.split} of the run"
        return ""

    rows = [row._replace(leak=row.leak or leak(row)) if row.split in (split, "val") else row for row in rows]
    found = [row.leak for row in rows if row.leak]
    if found and not allow:
        more = f", and {len(found) - 1} more cases were seen in training" if len(found) > 1 else ""
        raise InputError(f"{manifest}: {found[0]}{more}: leave them out, or --{ALLOW}=True marks the report")
    for what in found[:20]:
        log(f"warning: {what}")
    return rows, unchecked
