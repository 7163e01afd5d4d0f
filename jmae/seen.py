"""The rows that a run has been trained or calibrated on (seen.csv), and the check of other data against them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jmae.data.manifest import Row, same_name
from jmae.errors import InputError
from jmae.run_folder import log, write_text
from jmae.sealed import seal_table, unseal_table
from jmae.tables import csv_text, plain

ALLOW = "config.data.allow_leaks"
SEEN, SEEN_COLUMNS = "seen.csv", ("id", "patient", "split", "image")


def write_seen(workdir: Path, rows: Sequence[Row]) -> None:
    """Adds rows that a run has been trained or calibrated on to seen.csv: id, patient, split and `Row.content`."""
    lines = dict.fromkeys((row.id, row.patient, row.split, row.content) for row in [*read_seen(workdir), *rows])
    if lines:
        table = csv_text([dict(zip(SEEN_COLUMNS, line, strict=True)) for line in lines])
        write_text(workdir / SEEN, seal_table(table))


def read_seen(workdir: Path) -> list[Row]:
    """The rows of seen.csv, without files: `Row.content` tells their images. Empty where there is no such file.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / SEEN
    try:
        text = unseal_table(file.read_bytes().decode(), file, log)
        rows = [{k: plain(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(text), strict=True)]
        return [Row(row["id"], row["patient"], row["split"], None, (), content=row["image"]) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{file}: not readable ({error}): delete it and run jmae train again") from None


def differences(before: Sequence[Row], now: Sequence[Row]) -> str:
    """How many images of the splits of `now` were changed, removed or added since `before`, with some ids; "" without
    any."""
    splits = {row.split for row in now}
    old = {row.id: row.content for row in before if row.split in splits}
    new = {row.id: row.content for row in now}
    kinds = {
        "changed": [name for name, content in new.items() if old.get(name) and content and old[name] != content],
        "removed": [name for name in old if name not in new],
        "added": [name for name in new if name not in old],
    }
    some = lambda ids: ", ".join(ids[:3]) + ", ..." * (len(ids) > 3)
    return "; ".join(f"{len(ids)} {kind} ({some(ids)})" for kind, ids in kinds.items() if ids)


class SeenRows:
    """What a run has seen, by patient, by the image's content and by id."""

    def __init__(self, rows: Sequence[Row]):
        self.by: dict[str, dict[str, Row]] = {"patient": {}, "content": {}, "id": {}}
        for row in sorted(rows, key=lambda row: row.split == "val"):  # of two rows the one that was trained on counts
            for key, named in self.by.items():
                named.setdefault(same_name(getattr(row, key)), row)

    def leak(self, row: Row, split: str) -> str:
        """How a row was seen, as a sentence; "" where it was not.

        Ids are compared where a content is not known. A row of the run's `val` may be in `val` again, unless `val` is
        the split that is scored.
        """
        for key, word in (("patient", "patient"), ("content", "image"), ("id", "id")):
            value = getattr(row, key)
            other = self.by[key].get(same_name(value)) if value else None
            if not other or (key == "id" and row.content and other.content):
                continue
            if not row.split == other.split == "val" != split:
                return f"the {word} of {row.id} is that of {other.id}, {other.split} of the run"
        return ""


def check_unseen(
    rows: Sequence[Row], split: str, workdir: Path, manifest: str, *, allow: bool
) -> tuple[list[Row], str]:
    """Checks that the run has seen no row of `split`, and none of `val`, which chooses thresholds.

    Args:
      rows: of all splits of the manifest.
      split: the split that is scored.
      workdir: the run folder.
      manifest: its name in messages.
      allow: whether such rows are marked (`Row.leak`) instead.

    Returns:
      (the rows, a sentence where the run does not tell what it has seen, else "").

    Raises:
      InputError: a row was seen, unless `allow`.
    """
    known, unchecked = read_seen(workdir), ""
    if all(row.split == "val" for row in known):
        unchecked = f"{workdir} does not say what it was trained on: not known whether cases of {manifest} were"
        log(f"warning: {unchecked}")
    seen = SeenRows(known)
    rows = [
        row._replace(leak=row.leak or seen.leak(row, split)) if row.split in (split, "val") else row for row in rows
    ]
    found = [row for row in rows if row.leak]
    if found and not allow:
        more = f", and {len(found) - 1} more cases were seen in training" if len(found) > 1 else ""
        splits = " and ".join(dict.fromkeys(row.split for row in found))
        remedy = f"delete such rows of {splits} (those of train may stay), or --{ALLOW}=True marks the report"
        raise InputError(f"{manifest}: {found[0].leak}{more}: {remedy}")
    for row in found[:20]:
        log(f"warning: {row.leak}")
    return rows, unchecked


def check_unseen_by_source(config: ConfigDict, rows: Sequence[Row], workdir: Path) -> tuple[list[Row], str]:
    """As `check_unseen`, for a run's own rows whose `model.weights` names another run; other rows need no check.

    Args:
      config: the run's recipe.
      rows: the run's own rows.
      workdir: that other run before the training, this run afterwards.
    """
    source = config.get("model", {}).get("weights") or ""
    if not source or Path(source).is_file():
        return list(rows), ""
    return _check_own(config, rows, workdir)


def check_unseen_since(config: ConfigDict, rows: Sequence[Row], workdir: Path) -> tuple[list[Row], str]:
    """As `check_unseen`, for a run's own rows after the training, since when its manifest may have changed.

    A run folder without seen.csv is checked only where `check_unseen_by_source` does so.
    """
    return _check_own(config, rows, workdir) if read_seen(workdir) else check_unseen_by_source(config, rows, workdir)


def _check_own(config: ConfigDict, rows: Sequence[Row], workdir: Path) -> tuple[list[Row], str]:
    source = config.get("model", {}).get("weights") or ""
    where = f"{config.data.manifest or config.data.phantom}" + (f" (model.weights={source})" if source else "")
    return check_unseen(rows, "test", workdir, where, allow=config.data.allow_leaks)
