"""The official splits of DDAD (Cai et al., MICCAI 2022, arXiv 2206.03935) and MedIAnomaly, from their data.json:

    {"train": {"0": [NAME, ...], "unlabeled": {"0": [...], "1": [...]}}, "test": {"0": [...], "1": [...]}}

The images lie beside data.json or in a folder there, such as train_png_512. The labels of unlabelled images are written
to OUT/unlabeled_labels.csv, for the sweep over anomaly ratios. Training never reads these labels. Patients are unknown.
"""

import json
from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, check_rows, refuse
from jmae.data.prepare.folders import name_of
from jmae.errors import InputError
from jmae.run_folder import write_csv

PARTS = {  # (split, label) of the list at each place in data.json
    ("train", "0"): ("train", 0),
    ("train", "unlabeled", "0"): ("unlabeled", 0),
    ("train", "unlabeled", "1"): ("unlabeled", 1),
    ("test", "0"): ("test", 0),
    ("test", "1"): ("test", 1),
}


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes `out`/unlabeled_labels.csv last. Raises InputError with all problems."""
    lists = read_lists(root / "data.json")
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")]
    rows, problems, hidden = [], [], []
    for part, (split, label) in PARTS.items():
        for name in lists.get(part, ()):
            there = [folder / name for folder in folders if (folder / name).is_file()]
            if len(there) != 1:
                where = f"lies in {' and '.join(str(path.parent) for path in there)}" if there else "not found"
                what = f"{where} (list {'.'.join(part)} of data.json)"
                problems.append(f"{name}: {what}: copy the images again, into one folder")
                continue
            case = name_of(Path(name).parts)
            rows.append(Row(case, "", split, None if split == "unlabeled" else label, (str(there[0]),)))
            hidden += [{"id": case, "label": label}] if split == "unlabeled" else []
    refuse(problems)
    check_rows(rows)
    absent = Counter(f"list {'.'.join(part)}, missing in data.json" for part in PARTS if part not in lists)
    flags = ""
    if hidden:
        write_csv(out / "unlabeled_labels.csv", hidden)
        flags = f"--config.data.unlabeled_labels={out / 'unlabeled_labels.csv'} for a sweep over anomaly ratios"
    return Prepared(rows, f"{len(rows)} images of data.json", absent, flags)


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
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found: rename the data set's list, such as rsna_data.json, to data.json"
        ) from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a data.json of train and test lists ({error}): copy it again") from None
