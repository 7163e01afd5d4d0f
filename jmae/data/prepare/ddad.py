"""A data.json as of DDAD (Cai et al., MICCAI 2022, arXiv 2206.03935), which MedIAnomaly follows: the official splits.

    {"train": {"0": [NAME, ...], "unlabeled": {"0": [...], "1": [...]}}, "test": {"0": [...], "1": [...]}}

The images lie beside it or in a folder there, as train_png_512. Labels of unlabelled images go into
OUT/unlabeled_labels.csv, for the sweep over anomaly ratios: training never reads them. Patients are not known.
"""

import json
from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, check_rows, refuse
from jmae.data.prepare.folders import name_of
from jmae.errors import InputError
from jmae.run_folder import write_csv

PARTS = {  # where each list is: (split, label)
    ("train", "0"): ("train", 0),
    ("train", "unlabeled", "0"): ("unlabeled", 0),
    ("train", "unlabeled", "1"): ("unlabeled", 1),
    ("test", "0"): ("test", 0),
    ("test", "1"): ("test", 1),
}


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Writes `out`/unlabeled_labels.csv, last of all, and returns the rows; raises InputError with all problems."""
    lists = read(root / "data.json")
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")]
    rows, problems, hidden = [], [], []
    for part, (split, label) in PARTS.items():
        for name in lists.get(part, ()):
            there = [folder / name for folder in folders if (folder / name).is_file()]
            if len(there) != 1:
                where = f"is in {' and '.join(str(path.parent) for path in there)}" if there else "is not found"
                problems.append(f"{name}: {where}, of {'.'.join(part)} in data.json: copy the images again, once")
                continue
            case = name_of(Path(name).parts)
            rows.append(Row(case, "", split, None if split == "unlabeled" else label, (str(there[0]),)))
            hidden += [{"id": case, "label": label}] if split == "unlabeled" else []
    refuse(problems)
    check_rows(rows)
    absent = Counter(f"list {'.'.join(part)}, which data.json has not" for part in PARTS if part not in lists)
    flags = ""
    if hidden:
        write_csv(out / "unlabeled_labels.csv", hidden)
        flags = f"--config.data.unlabeled_labels={out / 'unlabeled_labels.csv'} for a sweep over anomaly ratios"
    return Prepared(rows, f"{len(rows)} images of data.json", absent, flags)


def read(path: Path) -> dict[tuple[str, ...], list[str]]:
    """The lists of data.json by `PARTS`, as far as they are there; raises InputError where it is not of this form."""
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
            raise ValueError(f"names {outside[0]}, outside of the folder")
        return lists
    except FileNotFoundError:
        raise InputError(f"{path}: not found: rename rsna_data.json, or another of these, to data.json") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is no data.json of train and test lists ({error}): copy it again") from None
