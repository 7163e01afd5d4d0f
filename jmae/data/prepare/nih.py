"""NIH ChestX-ray14 (Wang et al., CVPR 2017) by the curated lists of adult PA views, as AMAE's Table 2 has it.

The lists are those of NSA (Schlueter et al. 2022, self_sup_data/chest_xray_lists), one file name a line:
norm_MaleAdultPA_train_curated_list.txt, and so on for Female, for the test, and for the abnormal of the test. A name
that begins with "norm" lists normal images. They lie with the images, in any folders. The paper trains one model for
both sexes: 3,614 normals train, 543 normals and 262 abnormal images are the test.
"""

import re
from collections import Counter
from pathlib import Path

from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, text_of
from jmae.errors import InputError

LIST = re.compile(r"([a-z]+)_(male|female)adultpa_(train|test)_curated_list\.txt", re.IGNORECASE)
PAPER = {("train", 0): 3614, ("test", 0): 543, ("test", 1): 262}


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """The rows; nothing is written. Raises InputError with all problems."""
    lists = [(path, match) for path in sorted(root.rglob("*.txt")) if (match := LIST.fullmatch(path.name))]
    if not lists:
        raise InputError(f"{root}: has no *_MaleAdultPA_train_curated_list.txt: copy NSA's lists there")
    places: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        places.setdefault(path.name, []).append(path)
    rows, problems = [], []
    for path, match in lists:
        label, sex, split = int(match[1].lower() != "norm"), match[2][0].upper(), match[3].lower()
        if label and split == "train":
            problems.append(f"{path}: lists abnormal images to train on: leave it out")
        for name in text_of(path).split():
            if len(found := places.get(Path(name).name, [])) != 1:
                where = f"is in {' and '.join(str(one.parent) for one in found)}" if found else "is not found"
                problems.append(f"{name}: {where}, of {path.name}: copy the images again, once")
                continue
            case = Path(name).stem
            rows.append(Row(case, case.split("_")[0], split, label, (str(found[0]),), extra={"sex": sex}))
    refuse(problems)
    counts = Counter((row.split, int(bool(row.label))) for row in rows)
    differ = [
        f"{n} of {split} {label} (the paper: {PAPER.get((split, label), 0)})"
        for (split, label), n in sorted(counts.items())
        if n != PAPER.get((split, label))
    ]
    listed = {path for row in rows for path in row.image}
    left_out = Counter({"images in no list": sum(str(one) not in listed for same in places.values() for one in same)})
    return Prepared(
        rows, f"{len(lists)} lists", left_out, caution=f"not the paper's numbers: {', '.join(differ)}" if differ else ""
    )
