"""Anatomical images in the Brain Imaging Data Structure (Gorgolewski et al., Scientific Data 2016).

sub-NAME[/ses-NAME]/anat/sub-NAME[_ses-NAME][_...]_SEQUENCE.nii.gz; a session is a case, its patient the subject.
--sequences=T1w,FLAIR are the channels, in this order, each the end of a file's name without .nii.gz: acq-mprage_T1w
where a session has several T1w. Sessions that lack one are left out.

Lesion masks are derivatives/.../sub-NAME[_ses-NAME]..._mask.nii.gz or ..._dseg.nii.gz with lesion in the name, or
label-L: their subjects are the test, with as many subjects without a lesion (a seeded draw, at most half of them). A
mask without a session is that of the only one. Other sessions of a subject with a lesion, and all of one whose
mask belongs to none of the cases, are tested with no known label. All others train, and are taken as normal.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from jmae.data.files import read_mask
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffled
from jmae.errors import InputError

PLACE = r"sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?"  # of a session, at the start of its files' names
END = r"\.nii(?:\.gz)?"


def prepare(root: Path, out: Path, seed: int, sequences: str = "") -> Prepared:
    """The rows; nothing is written. Raises InputError with all problems."""
    sessions: dict[str, list[Path]] = defaultdict(list)
    for pattern in ("sub-*/anat", "sub-*/ses-*/anat"):
        for path in sorted(root.glob(f"{pattern}/sub-*.nii*")):
            if match := re.fullmatch(rf"({PLACE})_.*{END}", path.name):
                sessions[match[1]].append(path)
    suffixes = Counter(re.sub(END, "", path.name).rsplit("_", 1)[1] for files in sessions.values() for path in files)
    if not suffixes:
        raise InputError(f"{root}: has no sub-NAME/anat/sub-NAME_SEQUENCE.nii.gz: name the top folder of the data set")
    wanted = [name.strip() for name in sequences.split(",") if name.strip()] or list(suffixes)
    if not sequences and len(suffixes) > 1:
        there = ", ".join(f"{name} ({n})" for name, n in suffixes.most_common())
        raise InputError(f"{root}: has {there}: choose, in the channels' order, as --sequences={','.join(suffixes)}")
    lesions = masks(root)  # until a session takes them
    of_subject = Counter(name.split("_")[0] for name in sessions)
    rows, left_out, problems = [], Counter[str](), list[str]()
    for name in sorted(sessions):
        channels = [[p for p in sessions[name] if re.fullmatch(rf".*_{re.escape(w)}{END}", p.name)] for w in wanted]
        if missing := [w for w, files in zip(wanted, channels, strict=True) if not files]:
            left_out[f"sessions without {missing[0]}"] += 1
        elif several := [w for w, files in zip(wanted, channels, strict=True) if len(files) > 1]:
            left_out[f"sessions with several {several[0]} (name one as acq-..._{several[0]})"] += 1
        else:
            subject = name.split("_")[0]
            mask = lesions.pop(name if name in lesions or of_subject[subject] > 1 else subject, [])
            if len(mask) > 1:
                problems.append(f"{mask[0]}: is one of {len(mask)} lesion masks of {name}: keep one")
                continue
            try:
                label = int(read_mask(mask[0]).any()) if mask else None
            except InputError as error:
                problems.append(str(error))
                continue
            drawn = str(mask[0]) if label else None
            image = tuple(str(files[0]) for files in channels)
            rows.append(Row(name, subject, "train", label, image, drawn))
    refuse(problems)
    sick = {row.patient for row in rows if row.label}
    unclear = sick | {place.split("_")[0] for place in lesions}
    left_out["lesion masks of no one case (their subjects do not train)"] = sum(map(len, lesions.values()))
    well = sorted({row.patient for row in rows} - unclear)
    held = {*unclear, *shuffled(well, seed, str)[: min(len(sick), len(well) // 2)]}
    rows = [row if row.label is not None or row.patient in unclear else row._replace(label=0) for row in rows]
    rows = [row._replace(split="test") if row.patient in held else row for row in rows]
    found = f"{len(sessions)} sessions of {len(of_subject)} subjects"
    found += f", {len(sick)} of them with a lesion mask; all others are taken as normal"
    return Prepared(rows, found, left_out, f"--config.data.channels={len(wanted)}" if len(wanted) > 1 else "")


def masks(root: Path) -> dict[str, list[Path]]:
    """The lesion masks of each session, or subject where the name has no session; also those beside the images."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted({*root.glob("derivatives/**/sub-*.nii*"), *root.glob("sub-*/**/sub-*.nii*")}):
        match = re.fullmatch(rf"({PLACE})_.*(?<=_)(mask|dseg){END}", path.name)
        if match and re.search(r"lesion|_label-L_", path.name, re.IGNORECASE):
            found[match[1]].append(path)
    return found
