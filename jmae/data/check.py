"""python -m jmae.data.check MANIFEST.csv [--json FILE] [--debug]
python -m jmae.data.check --manifest MANIFEST.csv [--json FILE] [--debug]

Opens every file that a manifest names and prints a table of what is wrong, kind by kind.

unreadable      missing, damaged or foreign files
geometry        masks, regions and channels on another grid than their image; images of another rank or channel count
truth           masks, boxes and regions that contradict the label, or mark nothing; one image with two labels
not finite      images with NaN or Inf
constant        images, or channels of them, that have one value
patient         a patient in two splits
image           a file in two splits
identical       an image in two splits under two names
near-identical  the same, but resized, saved again as JPEG, shifted, cut, mirrored, turned or inverted
abnormal        abnormal images among the training normals, and abnormal volumes there without a mask or boxes

An abnormal volume with a mask or boxes is a note instead: a recipe can train on its crops outside the lesions
(data.normal_crops_only). An image is trained on as a whole, so it must leave `train`. --json also writes everything to
a file. The command changes no file and loads no network. Copies within a split are notes, too. So are training images
that lie in another way than the others, such as upside down, and training volumes whose voxels differ in size.

Exit codes: 0 nothing found; 1 findings; 2 the manifest itself is wrong, or the environment.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmae import recipe
from jmae.data import duplicates
from jmae.data.manifest import LEAKS, Finding, Row, first, leaks, parse_manifest, summary
from jmae.data.opening import WORKERS, open_each
from jmae.data.preparation import Opened
from jmae.data.prepare.overview import advice, next_command
from jmae.errors import InputError, exit_code
from jmae.likeness import Traits, traits_of, turned_rows, turned_text
from jmae.run_folder import write_text
from jmae.tables import counted

KINDS = {
    "unreadable": "files that cannot be read",
    "geometry": "grids, ranks or channels that do not fit",
    "truth": "masks, boxes, regions or copies against the label",
    "not finite": "images with NaN or Inf",
    "constant": "images or channels of one value",
    "patient": "patients in two splits",
    "image": "files in two splits",
    "identical": "images in two splits under two names",
    "near-identical": "the same, resized, recompressed or shifted",
    "abnormal": "abnormal cases among training normals",
}


class Checked(NamedTuple):
    """What there is, and what is wrong with it, in the order of `KINDS`."""

    rows: list[Row]
    summary: str
    findings: list[Finding]
    notes: list[str]  # what is no fault


def main(argv: list[str]) -> int:
    names, given = recipe.command(argv, __doc__, ["json", "manifest"])
    names += [given["manifest"]] if "manifest" in given else []
    if len(names) != 1:
        raise InputError("name one manifest: jmae check MANIFEST.csv [--json FILE]")
    began, manifest = time.monotonic(), Path(names[0])
    checked = check(manifest)
    if "json" in given:
        write_text(Path(given["json"]), to_json(manifest, checked, time.monotonic() - began))
    print(table(manifest, checked))
    own = next_command("folders", manifest, checked.rows, "", "", allow_leaks=False).removeprefix("next: ")
    train = f"next: the command that `jmae prepare` printed, or for a manifest of your own: {own}"
    told = [
        *advice("folders", checked.rows),
        "next: mend the findings, then check again" if checked.findings else train,
    ]
    print("\n".join(told))
    return int(bool(checked.findings))


def check(manifest: Path) -> Checked:
    """Everything that is wrong with the cases of a manifest; raises InputError where the file itself is wrong."""
    rows, ignored, problems = parse_manifest(manifest, allow=("abnormal", *LEAKS))
    if problems:
        raise InputError("\n".join(problems))
    prints: dict[str, duplicates.Fingerprint] = {}
    values, traits, voxels = list[Finding](), dict[str, Traits](), set[tuple[float, ...]]()

    def look(row: Row, case: Opened) -> None:
        prints[row.id] = duplicates.fingerprint(case.image.array)
        if row.split == "train":
            traits[row.id] = traits_of(case.image)
            if len(case.image.size) == 3 and case.image.spacing:
                voxels.add(case.image.spacing)
        values.extend(of_values(row, case.image.array))

    found = open_each(rows, workers=WORKERS, use=look)
    volumes = {name for name, one in prints.items() if one.detail.ndim == 3}
    found += [
        *values,
        *contradictions(rows, prints),
        *leaks(rows),
        *duplicates.in_two_splits(rows, prints),
        *abnormal(rows, volumes),
    ]
    order = {row.id: i for i, row in enumerate(rows)}
    found.sort(key=lambda one: (list(KINDS).index(one.kind), order[one.rows[0].id], one.what))
    further = [
        *notes(rows, volumes),
        *spacings(voxels),
        *copied(rows, prints),
        *map(turned_text, turned_rows(rows, traits)),
    ]
    return Checked(rows, summary(rows, ignored), found, further)


def of_values(row: Row, array: np.ndarray) -> Iterator[Finding]:
    """What is wrong with the values (*size, c) of an image."""
    for c, channel in enumerate(np.moveaxis(array, -1, 0)):
        file = row.image[c] if len(row.image) == array.shape[-1] else row.image[0]
        finite = np.isfinite(channel)
        if bad := channel.size - np.count_nonzero(finite):
            yield Finding("not finite", (row,), f"{file}: {bad} values are not finite: mend the file or drop its row")
        if finite.any() and channel.min(where=finite, initial=np.inf) == channel.max(where=finite, initial=-np.inf):
            yield Finding("constant", (row,), f"{file}: has one value all over: export it again or drop its row")


def abnormal(rows: list[Row], volumes: Collection[str]) -> Iterator[Finding]:
    """Abnormal rows of `train` that no recipe can train on; `volumes` are the ids of rows whose image is a volume."""
    for row in rows:
        if row.split == "train" and row.label == 1 and not (row.id in volumes and (row.mask or row.boxes)):
            further = ", or give it a mask or boxes" if row.id in volumes else ""
            what = f"{row.id} is abnormal and in train: move it to val, test or unlabeled{further}"
            yield Finding("abnormal", (row,), what)


def notes(rows: list[Row], volumes: Collection[str]) -> list[str]:
    """Settings that a recipe needs for these rows, a line each."""
    marked = [row for row in rows if row.id in volumes and (row.mask or row.boxes)]
    n = sum(row.split == "train" and row.label == 1 for row in marked)
    what = f"{counted(n, 'abnormal volumes')} in train with a mask or boxes"
    return [f"{what}: set --config.data.normal_crops_only=True, or move them"] if n else []


def contradictions(rows: list[Row], prints: Mapping[str, duplicates.Fingerprint]) -> Iterator[Finding]:
    """Copies of one image that have different labels."""
    groups: dict[bytes, list[Row]] = {}
    for row in rows:
        if row.id in prints and row.label is not None and not row.extra.get("half"):
            groups.setdefault(prints[row.id].digest, []).append(row)
    for same in groups.values():
        normal, abnormal = (next((row for row in same if row.label == label), None) for label in (0, 1))
        if normal and abnormal:
            what = f"{normal.id} is normal and {abnormal.id} is abnormal, but their images are equal"
            yield Finding("truth", (normal, abnormal), f"{what}: find out which label is right, and drop a row")


def spacings(found: Collection[tuple[float, ...]]) -> list[str]:
    """A line where training volumes differ in their voxels by more than a tenth."""
    ends = [(min(axis), max(axis)) for axis in zip(*map(sorted, found), strict=True)] if found else []
    if all(high <= 1.1 * low for low, high in ends):
        return []
    words = " x ".join(f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for low, high in ends)
    return [f"voxels of training volumes differ, {words} mm: give one spacing, as --config.data.spacing=1,1,1"]


def copied(rows: list[Row], prints: Mapping[str, duplicates.Fingerprint]) -> Iterator[str]:
    """A line for each split that has several files with one image."""
    groups: dict[tuple[str, bytes], dict[tuple[str, ...], str]] = {}
    for row in rows:
        if row.id in prints:
            groups.setdefault((row.split, prints[row.id].digest), {}).setdefault(row.image, row.id)
    for split in dict.fromkeys(row.split for row in rows):
        same = [[*own.values()] for (name, _), own in groups.items() if name == split and len(own) > 1]
        if same:
            n, (one, other) = sum(map(len, same)) - len(same), same[0][:2]
            yield f"{split} has {counted(n, 'further copies')} of its images, such as {other} (a copy of {one})"


def table(manifest: Path, checked: Checked) -> str:
    """The summary, the number of findings of each kind, and at most 20 findings of a kind."""
    counts = Counter(one.kind for one in checked.findings)
    lines = [f"{manifest}: {checked.summary}", ""]
    lines += [f"{counts[kind]:6}  {kind:<15} {what}" for kind, what in KINDS.items()]
    for kind in counts:
        lines += ["", f"{kind}:"]
        lines += [f"  {line}" for line in first([of_case(one) for one in checked.findings if one.kind == kind])]
    lines += ["", *(f"note: {line}" for line in checked.notes)] if checked.notes else []
    return "\n".join([*lines, "", counted(len(checked.findings), "findings") if checked.findings else "nothing found"])


def of_case(finding: Finding) -> str:
    """The line of a finding, which begins with the case."""
    name = finding.rows[0].id
    return finding.what if len(finding.rows) > 1 or finding.what.startswith(name) else f"{name}: {finding.what}"


def to_json(manifest: Path, checked: Checked, seconds: float) -> str:
    """All findings, with the ids of their cases."""
    counts = Counter(one.kind for one in checked.findings)
    findings = [{"kind": f.kind, "ids": [row.id for row in f.rows], "what": f.what} for f in checked.findings]
    content = {
        "manifest": str(manifest),
        "cases": len(checked.rows),
        "summary": checked.summary,
        "counts": {kind: counts[kind] for kind in KINDS},
        "findings": findings,
        "notes": checked.notes,
        "seconds": round(seconds, 3),
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(exit_code(main))
