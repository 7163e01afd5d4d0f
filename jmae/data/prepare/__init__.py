"""python -m jmae.data.prepare folders --normal DIR --test DIR --out DIR [--patient REGEX] [--licence TEXT]
                            [--relative] [--debug]
python -m jmae.data.prepare NAME --root DIR --out DIR [--seed 0] [--patient REGEX] [--leaks drop] [--relative] [--debug]

Writes a manifest, --out/manifest.csv, and prints what it found and the command that trains on it. The first form takes
two folders of your own: --normal holds normal scans to train on, --test the scans to look at. The second form takes the
data set below the folder --root. NAME is a layout of folders:

folders     The layout of MVTec AD: train/good, test/good and test/DEFECT. Masks may lie in any folder that is called
            after masks, such as anomaly_mask, ground_truth or annotation. Folders val and unlabeled are read too.
nnunet      imagesTr/CASE_0000.nii.gz and further channels, labelsTr, imagesTs, dataset.json. A case with an empty
            segmentation is normal.
bids        sub-*/[ses-*/]anat/*_T1w.nii.gz; also ATLAS 2.0. --sequences=T1w,FLAIR names the channels. Subjects with a
            lesion mask are in the test, with as many subjects that have none. --lesions=REGEX tells the lesion masks,
            --control=VALUE the group of participants.tsv that trains.
ddad        data.json of DDAD and MedIAnomaly (train.0, train.unlabeled.0 and .1, test.0 and .1) and a folder of images.

NAME may also be a public data set, in the form in which it is downloaded:

chexpert    CheXpert chest radiographs: train.csv, valid.csv and the images, also in batches. An image with No Finding
            is normal, one with Pneumonia (--finding=NAME: another observation) is abnormal. 1,024 normals train, 50 +
            50 images are val, 100 + 100 the test. --views is PA, frontal or all.
jsrt        JSRT chest radiographs: the .IMG files and the tables CLNDAT_EN.txt and CNNDAT_EN.txt, in any folders. The
            images are written as 16-bit PNG, inverted so that air is dark. Nodules become boxes. 19 normals and all
            nodules are the test. Kaggle's PNG with jsrt_metadata.csv are read, too, without boxes.
lidc        LIDC-IDRI chest CT: folders LIDC-IDRI-xxxx of DICOM series, and the readings as XML anywhere. The slices
            (in HU) stay where they are; masks are written. The first 800 patients train, the next 100 are val, the
            rest are the test. Val and test each get 500 healthy and 478 lesion slices, drawn at random.
deeplesion  DeepLesion CT: DL_info.csv and the folders Images_png. The 16-bit PNG stay where they are (HU = value -
            32768). Key slices get boxes. The patients are split officially. Val and test each get 500 healthy and 500
            key slices, drawn at random.
rsna        RSNA Pneumonia Detection Challenge from Kaggle: the .dcm files (or PNG), stage_2_train_labels.csv and DDAD's
            rsna_data.json. Abnormal test images get boxes. Hidden labels of the unlabelled images are written.
vindr       VinDr-CXR from Kaggle or PhysioNet: the .dicom files (or PNG), train.csv or annotations_train.csv, and
            DDAD's vin_data.json. The same as rsna.
nih         NIH ChestX-ray14 by NSA's curated lists of adult PA views, *_curated_list.txt, or by the official lists with
            Data_Entry_2017.csv (--lists=official, --views=PA). Lists and images lie in any folders. By NSA's lists
            3,614 normals train; 543 normals and 262 abnormal images are the test.
zhanglab    Paediatric radiographs of Kermany et al.: chest_xray/{train,val,test}/{NORMAL,PNEUMONIA} of Kaggle,
            Mendeley, SQUID or DatasetNinja.
covidx      COVIDx chest radiographs: the folders train, test and perhaps val, and COVID-Net's lists anywhere, called
            train_COVIDx8B.txt or train.txt and so on. The negatives (normals) of the training list train; the other
            lists are test and val. Grey copies of coloured images are written.
hyper_kvasir  HyperKvasir colonoscopy: folders of the classes cecum, ileum and bbps-2-3, anywhere, and segmented-images
            with images and masks. 1,600 normals train. 500 normals and all polyps are the test. Further normals are
            val. Masks are written as PNG.

isic2018    ISIC 2018 task 3: the folders and tables of ISIC. Moles (NV) are normal.
kvasir_seg  Kvasir-SEG: 1,000 polyps with masks for the test of a run that has learned other colonoscopies.
medianomaly One of the seven sets of MedIAnomaly, in its folder: RSNA, VinCXR, BrainTumor, LAG, ISIC2018_Task3,
            Camelyon16, BraTS2021.
bmad        One of the six sets of BMAD, in any of its forms: brain, liver, resc, oct, chest, histopathology. --set=NAME
            where no folder tells which.
brats       Volumes of BraTS 2020, 2021 and 2023. Training crops lie outside the tumours. --sequences=t1,flair.
duke        Duke-Breast-Cancer-MRI from TCIA: DICOM series, Annotation_Boxes and Clinical_and_Other_Features (.xlsx or
            .csv), and MAEMI's train.csv, valid.csv and test.csv; breast masks where there are some.
fastmri_plus  fastMRI's .h5 volumes with the boxes of fastMRI+; slices are written. --part=brain or knee. Needs h5py.
nova        NOVA of Hugging Face: brain MRI with boxes, for the test alone. Needs pyarrow.
nnssl       pretrain_data.json of nnssl: volumes without labels. --modality=T1w takes one kind.

The splits of jsrt, lidc and deeplesion are those of P-PII (Mueller et al., UNSURE 2023). Those of covidx and
hyper_kvasir are those of MemMC-MAE (Tian et al. 2022), and that of nih is AMAE's (Bozorgtabar et al. 2023). Random
draws depend on --seed alone.

--patient   A regular expression that finds the patient in an image's path; its groups are joined by _. Without it the
            patient comes from the data set's tables, its file names or DICOM's PatientID (hashed), or is unknown.
--leaks     What becomes of a patient in two splits: `refuse` (the default of layouts), `drop` leaves out the images of
            train (and unlabeled), aloud (the default of public sets), `keep` has the list as published; the run is
            marked then. A file that is in two splits is always refused. This compares paths; `jmae check` and the
            training also find copies under other names.
--licence   The licence of your own images, for the column `licence`.
--relative  Writes all paths relative to the manifest, so that manifest and images can be moved together to another
            place or computer. Without it an image that is not below --out has an absolute path.

RSNA's ids are of images. Where pneumonia-challenge-dataset-mappings_2018.json lies below --root, covidx and ddad take
the patients of NIH ChestX-ray14 from it; so do rsna and bmad.

`jmae prepare NAME --help` has more about one layout or data set.

Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import hashlib
import importlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from jmae import recipe
from jmae.data.manifest import Row, folded, summary
from jmae.data.manifest import leaks as leaks_of
from jmae.data.prepare.masks import refuse_look_alikes
from jmae.data.prepare.overview import (
    LAYOUTS,
    advice,
    kinds_of,
    next_command,
    split_table,
)
from jmae.data.prepare.patients import by_pattern, kept_apart
from jmae.data.prepare.tables import text_of
from jmae.data.prepare.tree import refuse
from jmae.data.slices import in_words, refuse_used, write_manifest
from jmae.errors import InputError, nearest
from jmae.recipe import typed
from jmae.run_folder import output_folder
from jmae.tables import counted
from jmae.waiting import at_work

__all__ = ["Prepared", "check_rows", "draw", "main", "prepare", "refuse", "shuffle", "text_of"]

# The flags of each data set. Its module has the function `prepare(root, out, seed, **flags) -> Prepared`.
DATASETS: dict[str, tuple[str, ...]] = {
    "bids": ("sequences", "lesions", "control"),
    "bmad": ("set",),
    "brats": ("sequences",),
    "chexpert": ("views", "finding"),
    "covidx": (),
    "ddad": (),
    "deeplesion": (),
    "duke": (),
    "fastmri_plus": ("part",),
    "folders": ("normal", "test"),
    "hyper_kvasir": (),
    "isic2018": (),
    "jsrt": (),
    "kvasir_seg": (),
    "lidc": (),
    "medianomaly": (),
    "nih": ("lists", "views"),
    "nnssl": ("modality",),
    "nnunet": (),
    "nova": (),
    "rsna": (),
    "vindr": (),
    "zhanglab": (),
}
ALIASES: dict[str, str] = {"mvtec": "folders", "nnu-net": "nnunet"}
SHARED = ("patient", "leaks", "licence")  # flags of every data set, besides `RELATIVE`
RELATIVE = "relative"
LEAKS = ("refuse", "drop", "keep")

T = TypeVar("T")


class Prepared(NamedTuple):
    """The rows of a data set, and what its user must know."""

    rows: list[Row]  # with absolute paths
    found: str  # the contents of the data set, in words
    left_out: Counter[str]  # number of items left out, by the reason in words
    flags: str = ""  # flags that the recipe needs
    caution: str = ""  # a sentence that every figure needs beside it
    recipe: str = ""  # SYSTEM:PRESET that fits; "" chooses by the images
    licence: str = ""  # of the data set, in words


def main(argv: list[str]) -> int:
    print("\n".join(written(argv)))
    return 0


def written(argv: list[str]) -> tuple[str, str]:
    """Does what the command line says, and returns what it prints, as `prepare` does."""
    further = sorted({flag for own_flags in DATASETS.values() for flag in own_flags})
    names, flags = recipe.command(argv, __doc__, ["root", "out", "seed", *SHARED, *further], [RELATIVE])
    if len(names) != 1 or "out" not in flags or not {"root", "normal"} & flags.keys():
        raise InputError(
            "name one data set, its folder and a new folder: jmae prepare NAME --root DIR --out DIR, or "
            f"jmae prepare folders --normal DIR --test DIR --out DIR; names: {', '.join(DATASETS)}"
        )
    name = ALIASES.get(names[0].lower(), names[0].lower())
    if name not in DATASETS:
        near = nearest(name, [*DATASETS, *ALIASES])
        raise InputError(f"{names[0]}: unknown data set: did you mean {near}? names: {', '.join(DATASETS)}")
    options = {flag: flags[flag] for flag in (*SHARED, *further) if flag in flags}
    if wrong := [flag for flag in options if flag not in (*SHARED, *DATASETS[name])]:
        raise InputError(f"--{wrong[0]}: {name} has no such flag: leave it out")
    root, seed = flags.get("root"), typed("seed", flags.get("seed", "0"), 0)
    relative = typed(RELATIVE, flags.get(RELATIVE, "false"), False)
    with at_work(f"{name}: reading and listing the files"):
        return prepare(name, Path(root) if root else None, Path(flags["out"]), seed, relative=relative, **options)


def prepare(
    name: str,
    root: Path | None,
    out: Path,
    seed: int = 0,
    *,
    patient: str = "",
    leaks: str = "",
    licence: str = "",
    relative: bool = False,
    **options: str,
) -> tuple[str, str]:
    """Writes the manifest of a data set; returns two texts.

    The first says what was found, what was left out, and what to say with each figure. The second says what to do with
    it: the recipe, the check and the training. The manifest is written last. On a problem no manifest is written, and
    InputError has one line for each problem.

    Args:
        root: folder of the data set; may be None where `options` name its folders.
        patient: regular expression that finds the patient in an image's path.
        leaks: what becomes of a patient in two splits, one of `LEAKS`; "" refuses it in a layout and drops its
            training images in a public set.
        licence: the licence of the images, where the data set does not tell it.
        relative: whether all paths become relative to the manifest.
        options: flags of this data set (`DATASETS`).
    """
    root, out = root and root.absolute(), out.absolute()
    if root and not root.is_dir():
        raise InputError(f"{root}: not a folder: name the folder with the files of {name}")
    if leaks not in ("", *LEAKS):
        raise InputError(f"--leaks={leaks}: unknown choice: write one of {', '.join(LEAKS)}")
    refuse_used(output_folder(out, ""))
    made: Prepared = importlib.import_module(f"jmae.data.prepare.{name}").prepare(root, out, seed, **options)
    rows, left_out, cautions = made.rows, Counter(made.left_out), [made.caution] if made.caution else []
    if not rows:
        raise InputError(
            f"{root or name}: {made.found}, but no image is left ({in_words(left_out)}): copy the whole data set"
        )
    rows = by_pattern(rows, patient, root) if patient else rows
    leaks = leaks or ("refuse" if name in LAYOUTS else "drop")
    if leaks == "drop":
        rows, dropped = kept_apart(rows)
        left_out += dropped
        cautions += [f"not the published list: without {in_words(dropped)} (--leaks=keep has them)"] if dropped else []
    check_rows(rows, patients=leaks != "keep")
    shared = sum(one.kind == "patient" for one in leaks_of(rows))
    cautions += [f"{counted(shared, 'patients')} in two splits: say so with every figure"] if shared else []
    refuse_look_alikes(rows, lambda row: f"{row.split} {row.label} {Path(row.image[0]).parent.name}")
    licence = licence or made.licence
    rows = [row._replace(extra={**row.extra, "licence": licence}) for row in rows] if licence else rows
    kinds, further_cautions = kinds_of(rows) if name in LAYOUTS else ([], [])
    write_manifest(out, rows, relative=relative)
    cautions += further_cautions
    manifest = out / "manifest.csv"
    found = [
        f"{manifest}: {made.found}: {summary(rows)}; left out: {in_words(left_out)}",
        *["", *split_table(rows), *kinds, f"licence: {licence or 'not stated (--licence=TEXT writes it)'}"],
        *(f"caution: {caution}" for caution in cautions),
    ]
    further = [
        *[*advice(name, rows, made.recipe), ""],
        f"first, to find damaged files and copies: jmae check {shlex.quote(str(manifest))}",
        next_command(name, manifest, rows, made.recipe, made.flags, allow_leaks=bool(shared)),
    ]
    return "\n".join(found), "\n".join(further)


def check_rows(rows: Sequence[Row], *, patients: bool = True) -> None:
    """Raises InputError for an id of two rows, a file in two splits, and a file name with a semicolon. With `patients`
    it does so for a patient in two splits, too."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row.id, []).append(row.image[0])
    problems = [
        f"{id}: this would be the id of {', '.join(same)}: rename one of them" for id, same in files.items() if same[1:]
    ]
    semicolons = sorted({file for row in rows for file in (*row.image, row.mask or "") if ";" in file})
    problems += [f"{file}: a manifest cannot hold a name with a semicolon: rename the file" for file in semicolons]
    found = [one for one in leaks_of(rows) if patients or one.kind != "patient"]
    leaking = [f"{one.what}{', or add --leaks=drop' * (one.kind == 'patient')}" for one in found]
    refuse(problems + folded(leaking, most=1))


def draw(items: Iterable[T], n: int, seed: int, name: Callable[[T], str]) -> list[T]:
    """The first n items of `shuffle` (all where there are fewer), sorted by name."""
    return sorted(shuffle(items, seed, name)[:n], key=name)


def shuffle(items: Iterable[T], seed: int, name: Callable[[T], str]) -> list[T]:
    """The items sorted by the SHA-256 of "SEED NAME".

    The order is the same on every machine. Adding an item does not change the order of the others.
    """
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {name(item)}".encode()).digest())
