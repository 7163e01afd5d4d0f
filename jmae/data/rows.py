"""The rows that a recipe names, from the text of its manifest: no image is opened, and no JAX imported."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jmae import recipe
from jmae.data.manifest import LEAKS, Finding, Row, first, held_out, leaks, parse_manifest
from jmae.errors import InputError
from jmae.p_values import more_normals

NO_DATA = "no data: set --config.data.manifest=MANIFEST.csv, or data.phantom"


class ManifestError(InputError):
    """What is wrong with the cases of a manifest: `leaks` are patients and scans in two splits, `problems` the lines of
    all else."""

    def __init__(self, manifest: str, problems: Sequence[str], leaks: Sequence[Finding]):
        leak_lines = first([f"{manifest}: {one.what}, or --config.data.allow_leaks=True" for one in leaks])
        super().__init__("\n".join([*problems, *leak_lines]))
        self.problems, self.leaks = problems, leaks


def listed_rows(config: ConfigDict) -> tuple[list[Row], dict[str, int]]:
    """(rows, what was ignored) of the phantom set or the manifest that `config.data` names.

    Raises InputError where there is neither, and ManifestError with all problems of the manifest's text.
    """
    data = config.data
    if data.phantom and not data.manifest:
        from jmae.data import phantoms  # here: it imports SciPy, which few commands need so early

        rows = phantoms.rows(data.phantom)
        return (kept_apart(rows, data.calibration) if data.calibration else rows), {}
    rows, ignored, problems = parsed_manifest(config)
    if data.calibration and not problems:
        rows = kept_apart(rows, data.calibration)
    refuse_problems(config, problems, leaks(rows))
    return rows, ignored


def parsed_manifest(config: ConfigDict) -> tuple[list[Row], dict[str, int], list[str]]:
    """`parse_manifest` by the settings of a recipe. Leaks pass: `data.calibration` makes further ones."""
    if not config.data.manifest:
        raise InputError(NO_DATA)
    crops = recipe.is_volume(config)
    normal_crops_only = crops and config.data.normal_crops_only
    return parse_manifest(Path(config.data.manifest), crops=crops, normal_crops_only=normal_crops_only, allow=LEAKS)


def refuse_problems(config: ConfigDict, problems: Sequence[str], leaking: Sequence[Finding]) -> None:
    """Raises ManifestError where there are problems, or leaks that `data.allow_leaks` does not let pass."""
    leaking = [] if config.data.allow_leaks else leaking
    if problems or leaking:
        raise ManifestError(config.data.manifest, problems, leaking)


def in_split(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a split; raises InputError where there are none."""
    if not (chosen := [row for row in rows if row.split == name]):
        raise InputError(f"split {name!r} has no rows: one of {', '.join(sorted({row.split for row in rows}))}")
    return chosen


def kept_apart(rows: Sequence[Row], share: float) -> list[Row]:
    """The rows with `share` of the normal train patients moved to `val`, as normals that calibrate the scores.

    Whole patients move, none of them with a lesion, and their rows are no longer trained on.

    Raises:
      InputError: `share` is not in [0, 1), or so few patients are left that none moves.
    """
    if not 0 <= share < 1:
        raise InputError(f"data.calibration={share}: is no share of the patients: write 0.1 for a tenth, 0 for none")
    name = lambda row: row.patient or row.id
    lesions = {name(row) for row in rows if row.split == "train" and row.label == 1}
    candidates = [row for row in rows if row.split == "train" and name(row) not in lesions]
    apart = {row.id for row, moved in zip(candidates, held_out(candidates, share), strict=True) if moved}
    if not apart:
        raise InputError(
            f"data.calibration={share}: of fewer than ten normal patients none is kept from the training: set it to 0 "
            f"(no p-values then), or {more_normals()}"
        )
    return [row._replace(split="val", label=0, kept=True) if row.id in apart else row for row in rows]
