"""The official splits of DDAD (Cai et al., MICCAI 2022, arXiv 2206.03935) and MedIAnomaly, from their data.json:

    {"train": {"0": [NAME, ...], "unlabeled": {"0": [...], "1": [...]}}, "test": {"0": [...], "1": [...]}}

The images lie in any folder, under these names or as .dcm or .dicom. The labels of unlabelled images are written to
OUT/unlabeled_labels.csv, for the sweep over anomaly ratios. Training never reads these labels. Patients are unknown,
unless RSNA's mapping to NIH lies beside the images (`rsna`).
"""

import json
from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, check_rows, refuse
from jmae.data.prepare.folders import name_of
from jmae.data.prepare.patients import nih_of_rsna
from jmae.data.prepare.tree import Images, one_file
from jmae.errors import InputError
from jmae.run_folder import write_csv

PARTS = {  # (split, label) of the list at each place in data.json
    ("train", "0"): ("train", 0),
    ("train", "unlabeled", "0"): ("unlabeled", 0),
    ("train", "unlabeled", "1"): ("unlabeled", 1),
    ("test", "0"): ("test", 0),
    ("test", "1"): ("test", 1),
}
Listed = list[tuple[str, Row, int]]  # the name in data.json, the row, the label even where it is hidden


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes `out`/unlabeled_labels.csv last. Raises InputError with all problems."""
    listed, absent = rows_of(root, ("data.json", "rsna_data.json", "vin_data.json", "brain_data.json", "lag_data.json"))
    nih = nih_of_rsna(root)
    listed = [(name, row._replace(patient=nih.get(row.id, "")), label) for name, row, label in listed]
    return finished(listed, absent, out)


def rows_of(root: Path, names: tuple[str, ...]) -> tuple[Listed, Counter[str]]:
    """The images that a data.json under one of the names lists, in its order; and what is left out.

    Raises InputError with all problems.
    """
    path = root / names[0]
    if not path.is_file():
        path = one_file(root, *names, what="the list of DDAD (data/rsna_data.json and so on)")
    lists, images, listed = read_lists(path), Images(root), []
    for part, (split, label) in PARTS.items():
        for name in lists.get(part, ()):
            if found := images.find(name, f"list {'.'.join(part)} of {path.name}"):
                case = name_of(Path(name).parts)
                listed.append(
                    (name, Row(case, "", split, None if split == "unlabeled" else label, (str(found),)), label)
                )
    refuse(images.problems)
    absent = Counter(f"list {'.'.join(part)}, missing in {path.name}" for part in PARTS if part not in lists)
    absent["images in no list"] = len(images) - len(listed)
    return listed, absent


def finished(listed: Listed, absent: Counter[str], out: Path, **told: str) -> Prepared:
    """The rows of `rows_of`; `told` are fields of `Prepared`. Writes hidden labels to `out`/unlabeled_labels.csv."""
    rows = [row for _, row, _ in listed]
    check_rows(rows, patients=False)
    hidden = [{"id": row.id, "label": label} for _, row, label in listed if row.split == "unlabeled"]
    if hidden:
        write_csv(out / "unlabeled_labels.csv", hidden)
        told["flags"] = f"--config.data.unlabeled_labels={out / 'unlabeled_labels.csv'}"
    return Prepared(
        rows, told.pop("found", f"{len(rows)} images of data.json"), absent, **{"recipe": RECIPE[bool(hidden)], **told}
    )


RECIPE = {True: "amae:paper", False: "simsid:paper"}  # with and without unlabelled images


def read_lists(path: Path) -> dict[tuple[str, ...], list[str]]:
    """The lists in data.json, by their keys in `PARTS`. Raises InputError where the file has another form."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        lists = {}
        for part in PARTS:
            found = about
            for key in part:
                found = found.get(key, {} if key != part[-1] else None)
            if found is not None:
                lists[part] = [str(Path(name)) for name in found]
        if outside := [name for names in lists.values() for name in names if {"..", "/"} & {*Path(name).parts}]:
            raise ValueError(f"it names {outside[0]}, which is outside of the folder")
        return lists
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a data.json of train and test lists ({error}): copy it again") from None
