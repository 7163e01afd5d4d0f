"""Anatomical images in the Brain Imaging Data Structure (Gorgolewski et al., Scientific Data 2016).

Images are sub-NAME[/ses-NAME]/anat/sub-NAME[_ses-NAME][_...]_SEQUENCE.nii.gz. A session is a case; its patient is the
subject. --sequences=T1w,FLAIR names the channels in their order. Each name is the end of a file's name without .nii.gz.
Where a session has several T1w, a longer end such as acq-mprage_T1w chooses one. A session that lacks a channel is left
out.

Lesion masks are derivatives/.../sub-NAME[_ses-NAME]..._mask.nii.gz or ..._dseg.nii.gz; their names contain "lesion" or
"label-L". A mask without a session belongs to the subject's only session.

Subjects with a lesion are in the test, with as many subjects without a lesion (a seeded draw of at most half of the
latter). Other sessions of a subject with a lesion are in the test without a label. So are all sessions of a subject
whose mask matches no case. All other sessions train and are taken as normal.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from jmae.data.files import read_mask
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.errors import InputError

PLACE = r"sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?"  # start of a file's name: subject and session
END = r"\.nii(?:\.gz)?"


def prepare(root: Path, out: Path, seed: int, sequences: str = "") -> Prepared:
    """Returns the rows and writes no file. Raises InputError with all problems."""
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
        raise InputError(f"{root}: has {there}: choose the channels in their order: --sequences={','.join(suffixes)}")
    lesions = find_masks(root)  # a session removes its mask from here
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
                problems.append(f"{mask[0]}: {name} has {len(mask)} lesion masks: keep one")
                continue
            try:
                label = int(read_mask(mask[0]).any()) if mask else None
            except InputError as error:
                problems.append(str(error))
                continue
            image = tuple(str(files[0]) for files in channels)
            rows.append(Row(name, subject, "train", label, image, str(mask[0]) if label else None))
    refuse(problems)
    sick = {row.patient for row in rows if row.label}
    excluded = sick | {place.split("_")[0] for place in lesions}
    left_out["lesion masks that match no single case (their subjects do not train)"] = sum(map(len, lesions.values()))
    well = sorted({row.patient for row in rows} - excluded)
    tested = {*excluded, *shuffle(well, seed, str)[: min(len(sick), len(well) // 2)]}
    rows = [row if row.label is not None or row.patient in excluded else row._replace(label=0) for row in rows]
    rows = [row._replace(split="test") if row.patient in tested else row for row in rows]
    found = f"{len(sessions)} sessions of {len(of_subject)} subjects"
    found += f", {len(sick)} of them with a lesion mask; all others are taken as normal"
    return Prepared(rows, found, left_out, f"--config.data.channels={len(wanted)}" if len(wanted) > 1 else "")


def find_masks(root: Path) -> dict[str, list[Path]]:
    """The lesion masks of each session, or of the subject where a mask's name has no session.

    Masks below derivatives and masks beside the images both count.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted({*root.glob("derivatives/**/sub-*.nii*"), *root.glob("sub-*/**/sub-*.nii*")}):
        match = re.fullmatch(rf"({PLACE})_.*(?<=_)(mask|dseg){END}", path.name)
        if match and re.search(r"lesion|_label-L_", path.name, re.IGNORECASE):
            found[match[1]].append(path)
    return found
