"""Anatomical images in the Brain Imaging Data Structure (Gorgolewski et al., Scientific Data 2016).

Images are sub-NAME[/ses-NAME]/anat/sub-NAME[_ses-NAME][_...]_SEQUENCE.nii.gz. Folders of sites may lie above sub-NAME,
as in ATLAS 2.0. A session is a case; its patient is the subject. --sequences=T1w,FLAIR names the channels in their
order. Each name is the end of a file's name without .nii.gz. Where a session has several T1w, a longer end such as
acq-mprage_T1w chooses one. A session that lacks a channel is left out.

Lesion masks end in _mask, _dseg, _probseg, _roi or _lesion; they lie beside the images or below derivatives. A mask is
a lesion's if its label- or desc- says so (lesion, tumor, wmh, stroke, fcd, L), if it ends in _roi or _lesion, or if its
JSON file has the Type Lesion. Masks of brains, faces and tissues are passed over. Any other mask is refused;
--lesions=REGEX then says which files are lesion masks. Several masks of a session, as of several raters, are united;
--lesions may also choose one rater. A mask without a session belongs to the subject's only session.

participants.tsv may tell the group of each subject. Then only controls train; --control=VALUE[,VALUE] names their
groups where the names do not tell.

Subjects with a lesion are in the test, with as many subjects without a lesion (a seeded draw of at most half of the
latter). These sessions are in the test without a label: the other sessions of a subject with a lesion, and all sessions
of a subject whose mask matches no case, of a patient without a mask, and of a folder called Testing. All other sessions
train and are taken as normal.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np

from jmae.data.files import read_image, read_mask
from jmae.data.manifest import Row
from jmae.data.prepare import Prepared, refuse, shuffle
from jmae.data.prepare.folders import split_of
from jmae.data.prepare.patients import compiled
from jmae.data.prepare.tables import table_of
from jmae.data.prepare.tree import files_below
from jmae.errors import InputError
from jmae.tables import counted

PLACE = r"sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?"  # start of a file's name: subject and session
END = r"\.nii(?:\.gz)?"
MASKS = ("mask", "dseg", "probseg", "roi", "lesion", "seg", "label", "lesions")  # last words of masks' names
LESION = r"lesion|tumou?r|wmh|stroke|fcd|infarct|metasta|o?edema|ha?emorrhage|glioma"
OTHER = r"brain|face|head|skull|[gw]m$|csf|aseg|aparc|bs$|tissue|ventricle|hippocamp|anonymi|defac|preproc|t1wspace"
GROUPS = ("group", "diagnosis", "dx", "diagnosis_group", "patient_group", "status", "condition")
CONTROLS = r"(healthy|normal)?[ _-]*(hc|cn|nc|hv|td|con|ctrl|control|controls|healthy|normal|volunteer)s?( subjects?)?"


def prepare(root: Path, out: Path, seed: int, sequences: str = "", lesions: str = "", control: str = "") -> Prepared:
    """Returns the rows, and writes united masks. Raises InputError with all problems."""
    trees = find_trees(root)
    sessions: dict[str, list[Path]] = defaultdict(list)
    hidden = set[str]()  # subjects of a folder called Testing
    for tree in trees:
        site = "" if len(trees) == 1 else "_".join([*tree.relative_to(root).parts, ""])
        for pattern in ("sub-*/anat", "sub-*/ses-*/anat"):
            for path in sorted(tree.glob(f"{pattern}/sub-*.nii*")):
                if (match := re.fullmatch(rf"({PLACE})_.*{END}", path.name)) and suffix_of(path) not in MASKS:
                    sessions[site + match[1]].append(path)
                    if any(split_of(part) == "test" for part in tree.relative_to(root).parts):
                        hidden.add(subject_of(site + match[1]))
    wanted = chosen(root, sessions, sequences)
    found_masks, unsure = find_masks(root, trees, lesions)
    refuse(unsure)
    of_subject = Counter(map(subject_of, sessions))
    rows, left_out, problems, united = [], Counter[str](), list[str](), 0
    for name in sorted(sessions):
        channels = [[p for p in sessions[name] if re.fullmatch(rf".*_{re.escape(w)}{END}", p.name)] for w in wanted]
        if missing := [w for w, files in zip(wanted, channels, strict=True) if not files]:
            left_out[f"sessions without {missing[0]}"] += 1
        elif several := [w for w, files in zip(wanted, channels, strict=True) if len(files) > 1]:
            left_out[f"sessions with several {several[0]} (name one as acq-..._{several[0]})"] += 1
        else:
            subject = subject_of(name)
            masks = found_masks.pop(name if name in found_masks or of_subject[subject] > 1 else subject, [])
            try:
                mask, label = united_mask(masks, out / "masks" / f"{name}.nii.gz")
            except InputError as error:
                problems.append(str(error))
                continue
            united += len(masks) > 1
            rows.append(Row(name, subject, "train", label, tuple(str(files[0]) for files in channels), mask))
    refuse(problems)
    patients = patients_of(trees, root, {*of_subject}, control)
    sick = {row.patient for row in rows if row.label}
    excluded = sick | {subject_of(place) for place in found_masks} | patients | hidden
    left_out["lesion masks without a single case that fits (their subjects do not train)"] = sum(
        map(len, found_masks.values())
    )
    well = sorted({row.patient for row in rows} - excluded)
    tested = {*excluded, *shuffle(well, seed, str)[: min(len(sick), len(well) // 2)]}
    rows = [row if row.label is not None or row.patient in excluded else row._replace(label=0) for row in rows]
    rows = [row._replace(split="test") if row.patient in tested else row for row in rows]
    found = f"{len(sessions)} sessions of {len(of_subject)} subjects, {len(sick)} of them with a lesion mask"
    found += f" ({united} of several united)" if united else ""
    without = {row.patient for row in rows} & (patients | hidden) - sick
    found += f", {counted(len(without), 'patients')} without one (no label, not in train)" if without else ""
    return Prepared(rows, f"{found}; all others are taken as normal", left_out, licence=licence_of(trees[0]))


def find_trees(root: Path) -> list[Path]:
    """The folders that contain sub-NAME/.../anat: `root`, or folders of sites up to two levels below it."""
    for above in ("", "*/", "*/*/"):
        anat = [path for end in ("sub-*/anat", "sub-*/ses-*/anat") for path in root.glob(above + end)]
        steps = len(above) // 2
        trees = {Path(root, *path.relative_to(root).parts[:steps]) for path in anat}
        found = sorted(one for one in trees if not {"derivatives", "sourcedata"} & {*one.relative_to(root).parts})
        if found:
            return found
    raise InputError(f"{root}: has no sub-NAME/anat/sub-NAME_SEQUENCE.nii.gz: name the top folder of the data set")


def chosen(root: Path, sessions: dict[str, list[Path]], sequences: str) -> list[str]:
    """The names of the channels. Raises InputError where they have to be chosen."""
    suffixes = Counter(suffix_of(path) for files in sessions.values() for path in files)
    if not suffixes:
        raise InputError(f"{root}: has no sub-NAME/anat/sub-NAME_SEQUENCE.nii.gz: name the top folder of the data set")
    if not sequences and len(suffixes) > 1:
        there = ", ".join(f"{name} ({n})" for name, n in suffixes.most_common())
        raise InputError(f"{root}: has {there}: choose the channels in their order: --sequences={','.join(suffixes)}")
    return [name.strip() for name in sequences.split(",") if name.strip()] or list(suffixes)


def suffix_of(path: Path) -> str:
    return re.sub(END, "", path.name).rsplit("_", 1)[-1]


def subject_of(session: str) -> str:
    return re.sub(r"_ses-[A-Za-z0-9]+$", "", session)


def find_masks(root: Path, trees: list[Path], lesions: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The lesion masks of each session, or of the subject where a mask's name has no session; and what is unsure."""
    found: dict[str, list[Path]] = defaultdict(list)
    unsure, pattern = [], compiled("lesions", lesions)
    for tree in trees:
        site = "" if len(trees) == 1 else "_".join([*tree.relative_to(root).parts, ""])
        for path in files_below(tree, (".nii", ".nii.gz")):
            match = re.fullmatch(rf"({PLACE})_.*{END}", path.name)
            if not match or not (lesions or suffix_of(path) in MASKS):
                continue
            is_lesion = bool(pattern.search(str(path.relative_to(root)))) if lesions else kind_of(path)
            if is_lesion:
                found[site + match[1]].append(path)
            elif is_lesion is None:
                unsure.append(
                    f"{path}: looks like a mask, but its name tells neither a lesion nor a brain: add "
                    "--lesions=REGEX, which fits the lesion masks alone, or move it out"
                )
    return found, unsure


def kind_of(path: Path) -> bool | None:
    """Whether a mask is a lesion's; None where neither its name nor its JSON file tells."""
    side = path.with_name(re.sub(END, ".json", path.name))
    try:
        kind = str(json.loads(side.read_text(encoding="utf-8")).get("Type", "")) if side.is_file() else ""
    except (OSError, ValueError, AttributeError):
        kind = ""
    if kind in ("Lesion", "Brain", "Face"):
        return kind == "Lesion"
    text = re.sub(END, "", path.name)
    told = [part.partition("-")[2] for part in text.split("_") if re.match(r"(label|desc)-", part)]
    suffix = suffix_of(path)
    if suffix in ("lesion", "lesions") or any(part == "L" or re.search(LESION, part, re.I) for part in told):
        return True
    if any(re.search(OTHER, part, re.I) for part in told):
        return False
    return True if suffix == "roi" else None


def united_mask(masks: list[Path], united: Path) -> tuple[str | None, int | None]:
    """(the path of the mask of a case, or of the union of several, written to `united`; its label)."""
    if not masks:
        return None, None
    arrays = [read_mask(mask) for mask in masks]
    if len({array.shape for array in arrays}) > 1:
        names = ", ".join(mask.name for mask in masks)
        raise InputError(f"{masks[0]}: has other grids than {names}: choose one: --lesions=REGEX")
    union = np.any(arrays, axis=0)
    if not union.any():
        return None, 0
    if len(masks) == 1:
        return str(masks[0]), 1
    united.parent.mkdir(parents=True, exist_ok=True)
    affine = read_image(masks[0]).affine
    nib.save(nib.Nifti1Image(union.astype(np.uint8), np.eye(4) if affine is None else affine), united)
    return str(united), 1


def patients_of(trees: list[Path], root: Path, subjects: set[str], control: str) -> set[str]:
    """The subjects that participants.tsv calls patients; none without such a table or column.

    Raises InputError where the table does not tell which group the controls are.
    """
    patients, named = set[str](), False
    for tree in trees:
        table = next((one for one in (tree / "participants.tsv", root / "participants.tsv") if one.is_file()), None)
        if table is None:
            continue
        rows = table_of(table, "participant_id", delimiter="\t")
        column = next((name for name in rows[0] if name.lower() in GROUPS), None)
        if column is None:
            continue
        values = Counter(row[column] for row in rows)
        controls = {value for value in values if re.fullmatch(CONTROLS, value, re.I)}
        controls = {*control.split(",")} & values.keys() if control else controls
        named = True
        if not controls:
            there = ", ".join(f"{value or 'empty'} ({n})" for value, n in values.most_common())
            raise InputError(f"{table}: {column} has {there}: name the group that trains as normal: --control=VALUE")
        site = "" if len(trees) == 1 else "_".join([*tree.relative_to(root).parts, ""])
        well = {site + "sub-" + row["participant_id"].removeprefix("sub-") for row in rows if row[column] in controls}
        patients |= {subject for subject in subjects if subject.startswith(site)} - well
    if control and not named:
        raise InputError(f"{root}: has no participants.tsv with a column {', '.join(GROUPS)}: leave out --control")
    return patients


def licence_of(tree: Path) -> str:
    """The licence in dataset_description.json, "" without one."""
    try:
        about = json.loads((tree / "dataset_description.json").read_text(encoding="utf-8"))
        return str(about.get("License") or about.get("Licence") or "")
    except (OSError, ValueError, AttributeError):
        return ""
