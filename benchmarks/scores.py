"""Trains each system on real images, and scores each trained network as published, in our ways, and beside all rivals.

    JMAE_DATA=FOLDER python -m benchmarks.scores cxr_peds --seeds 0 1 2
    JMAE_DATA=FOLDER python -m benchmarks.scores cxr_nih --seeds 0 1 2          # adults; the subset `matched`, too
    JMAE_DATA=FOLDER python -m benchmarks.scores endoscopy --seeds 0 1 2        # crops
    JMAE_DATA=FOLDER python -m benchmarks.scores mri3d --seeds 0 1 2            # FLAIR and T1c
    JMAE_DATA=FOLDER python -m benchmarks.scores mri3d_hippo --seeds 0 1 2      # planted lesions
    JMAE_DATA=FOLDER python -m benchmarks.scores mri3d --seeds 0 1 2 --planted  # for the choice of a way

Each system trains once a seed: `python -m jmae.train --config configs/NAME.py:small`, all steps (`--budget 1`), a fifth
of the training patients kept apart for expectations and p-values. `normals` is AMAE's Stage 0 on normal images alone.
Then `python -m jmae.evaluate` scores the test split again in each way of WAYS. Nothing is trained for a way, and none
is chosen here. The ways come from an earlier experiment, which scored test images of cxr_peds, endoscopy and mri3d.

In mri3d one patient (openms_07, the smallest lesion: 0.1 % of the brain) is kept apart as a normal, its lesion left
out of the region. The expectation comes from this patient, and there are no p-values.

`--planted` takes the runs of mri3d, and another test: six copies of the one volume of `val`, each with three planted
lesions. So a way can be chosen without a test image. Each lesion has a radius of 4 to 10 mm. In each sequence the
lesion is brighter or darker than the brain around it, by 0.5 to 1.5 interquartile ranges of the brain. The volume has a
metastasis of its own, which counts as normal.

benchmarks/results/scores.json keeps for each pack, system, seed and way: AUROC and AP of cases and voxels with 95 %
intervals over patients, means over patients, the rivals, and the paired difference to the best of all rivals. What has
a result is not run again, and a run that was stopped goes on. `--only NAME ...` runs some systems.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.maemi import blob, plant_lesions, sequences, write_manifest
from benchmarks.runs import add_options, key_of, over_seeds, pack
from benchmarks.steps import train_run, without_curves
from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results" / "scores.json"
KEPT = ("primary", "image", "pixel", "scores", "baselines", "best_rival", "patient_means", "explained", "subsets")
KEPT += ("alarms", "seconds_per_case")
APART = {"data.calibration": 0.2}
PUBLISHED = {"evaluation.residual": "none"}  # of volumes, whose preset smooths
SMOOTHED = {"evaluation.residual": "smoothed"}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "smoothed, position": SMOOTHED | {"evaluation.expect": "position"},
        "feature, position": {"evaluation.residual": "feature", "evaluation.expect": "position"},
    },
    "volumes": {
        "smoothed": SMOOTHED,
        "smoothed, appearance": SMOOTHED | {"evaluation.expect": "appearance"},
    },
}
IMAGES: dict[str, dict[str, Any]] = {
    "normals": {"system": "amae", "variant": "one_class", "adapt.steps": 1, "tokens": "evaluation.discrepancy"} | APART,
    "amae": {"system": "amae", "tokens": "evaluation.discrepancy"} | APART,
    "memmc_mae": {"system": "memmc_mae", "tokens": "evaluation.score"} | APART,
    "ppii": {"system": "ppii"} | APART,
    "simsid": {"system": "simsid"} | APART,
}
HIPPO = {"data.channels": 1, "data.size": "24,24,8", "model.patch": "4,4,2", "evaluation.stride": "8,8,4"}
SYSTEMS: dict[str, dict[str, dict[str, Any]]] = {
    "cxr_peds": IMAGES,
    "cxr_nih": {name: one | {"evaluation.subsets": "matched"} for name, one in IMAGES.items()},
    "endoscopy": {name: one | {"data.channels": 1} for name, one in IMAGES.items()},
    "mri3d": {"maemi": {"system": "maemi", "data.channels": 2, "data.spacing": "2,2,2"}},
    "mri3d_hippo": {"maemi": {"system": "maemi", "train.steps": 2000, "evaluation.repeats": 6} | HIPPO},
}
APART_PATIENT = "openms_07"


def manifest_of(name: str, folder: Path, place: Path) -> Path:
    """The manifest of a pack's experiment; volumes get theirs in the folder of the runs."""
    if name == "mri3d_hippo":
        return plant_lesions(folder / "manifest.csv", place)
    if name == "mri3d":
        return with_normal(sequences(folder / "manifest.csv", ["FLAIR", "T1c"], place), place)
    return folder / "manifest.csv"


def with_normal(manifest: Path, place: Path) -> Path:
    """The manifest with one training patient as a normal of `val`, whose region leaves the lesion out."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import binary_dilation

    with open(manifest, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] != "val"]
    (row,) = [row for row in rows if row["id"] == APART_PATIENT]
    lesion, region = nib.load(row["mask"]), nib.load(row["region"])
    near = binary_dilation(np.asarray(lesion.dataobj) > 0, iterations=3)
    row |= {"split": "val", "label": "0", "mask": "", "region": str((place / f"{row['id']}_normal.nii.gz").resolve())}
    free = (np.asarray(region.dataobj) > 0) & ~near
    nib.save(nib.Nifti1Image(free.astype(np.uint8), region.affine), row["region"])
    return write_manifest(rows, place)


def planted(manifest: Path, place: Path, copies: int = 6, lesions: int = 3) -> Path:
    """Writes the manifest of the experiment with copies of the volume of `val` as its test, with planted lesions."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import binary_erosion

    with open(sequences(manifest, ["FLAIR", "T1c"], place), newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["split"] == "val"]
    brain = np.asarray(nib.load(row["region"]).dataobj) > 0
    seats = np.argwhere(binary_erosion(brain, iterations=12))
    with open(manifest_of("mri3d", manifest.parent, place / "others"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] != "test"]
    for copy in range(copies):
        rng = np.random.default_rng(copy)
        inside = [blob(rng, brain.shape, seats[rng.integers(len(seats))], (4, 10)) for _ in range(lesions)]
        volumes = dict[str, tuple[Any, np.ndarray]]()
        for name, file in zip(("FLAIR", "T1c"), row["image"].split(";"), strict=True):
            image = nib.load(file)
            array = image.get_fdata().astype(np.float32)
            low, high = np.percentile(array[brain], (25, 75))
            changes = [rng.choice([-1, 1]) * rng.uniform(0.5, 1.5) * part for part in inside]
            volumes[name] = image, np.where(brain, np.maximum(array + (high - low) * sum(changes), 1), 0)
        volumes["mask"] = image, (np.max(inside, 0) > 0.5) & brain
        files = {name: str((place / f"planted_{copy}_{name}.nii.gz").resolve()) for name in volumes}
        for name, (image, array) in volumes.items():
            nib.save(nib.Nifti1Image(array.astype(np.float32), image.affine), files[name])
        images = f"{files['FLAIR']};{files['T1c']}"
        rows.append(
            {name: row[name] for name in rows[0]}
            | {"id": f"planted_{copy}", "split": "test", "image": images, "mask": files["mask"]}
        )
    return write_manifest(rows, place)


def arguments(changes: dict[str, Any]) -> list[str]:
    """Changes of a recipe on the command line."""
    return [f"--config.{key}={value}" for key, value in changes.items()]


def found_in(folder: Path) -> dict[str, Any]:
    """What is kept of an evaluation."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return without_curves({name: metrics.get(name) for name in KEPT})


def measure(name: str, options: argparse.Namespace) -> None:
    """Trains and scores all systems on a pack."""
    folder = pack(name)
    if folder is None:
        return
    place = options.workdir / name
    manifest = manifest_of(name, folder, place)
    for system, changes in SYSTEMS[name].items():
        if options.only and system not in options.only:
            continue
        own = dict(changes)
        recipe, tokens = f"configs/{own.pop('system')}.py:small", own.pop("tokens", "")
        ways: dict[str, dict[str, Any]] = {"published": PUBLISHED if system == "maemi" else {}}
        if tokens:
            ways["tokens"] = {tokens: "tokens"}
        if system not in ("ppii", "simsid"):
            ways |= WAYS["volumes" if system == "maemi" else "images"]
        for seed in options.seeds:
            run = place / f"{system}-{options.budget:g}-{seed}"
            train = [f"--config={recipe}", f"--config.data.manifest={manifest}", f"--config.budget={options.budget:g}"]
            train += [f"--config.seed={seed}", *arguments(own)]
            for way, change in ways.items():
                key = key_of(f"{name}, {system}", way, options.budget, seed)
                if key in results() and not options.again:
                    continue
                seconds = {} if (run / "evaluation" / "metrics.json").is_file() else train_run(train, run)
                out = run / "evaluation" if not change else run / way.replace(", ", "-")
                if change:
                    command = ["-m", "jmae.evaluate", f"--workdir={run}", f"--out={out}", *arguments(change)]
                    subprocess.run([sys.executable, *command, "--config.evaluation.maps=False"], check=True)
                kept = found_in(out) | {"arguments": [*train[2:], *arguments(change)]}
                write(RESULTS, key, kept | ({"wall_seconds": seconds["wall_seconds"]} if seconds else {}))
    show(name, options)


def measure_planted(options: argparse.Namespace) -> None:
    """Scores the planted lesions with the runs of mri3d, in each way."""
    folder = pack("mri3d")
    if folder is None:
        return
    manifest = planted(folder / "manifest.csv", options.workdir / "planted")
    for seed in options.seeds:
        run = options.workdir / "mri3d" / f"maemi-{options.budget:g}-{seed}"
        if not (run / "evaluation" / "metrics.json").is_file():
            print(f"not run: {run} is not there; run this command without --planted first")
            continue
        for way, change in ({"published": PUBLISHED} | WAYS["volumes"]).items():
            key = key_of("mri3d planted, maemi", way, options.budget, seed)
            if key in results() and not options.again:
                continue
            out = run / f"planted-{way.replace(', ', '-')}"
            command = ["-m", "jmae.evaluate", f"--workdir={run}", f"--manifest={manifest}", f"--out={out}"]
            subprocess.run([sys.executable, *command, *arguments(change)], check=True)
            write(RESULTS, key, found_in(out) | {"arguments": arguments(change)})
    show("mri3d planted", options)


def results() -> dict[str, Any]:
    """What benchmarks/results/scores.json has."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def show(name: str, options: argparse.Namespace) -> None:
    """Prints the results of a pack: means over the seeds, with those of the paired differences to the best rival."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, one in results().items():
        place, system, rest = key.split(", ", 2)
        way, budget, _ = rest.rsplit(", ", 2)
        if place == name and budget == f"budget {options.budget:g}":
            groups.setdefault(f"{system}, {way}", []).append(one)
    rows = []
    for group, found in groups.items():
        kind = "image" if (found[0]["image"] or {}).get("auroc") is not None else "pixel"
        best = (found[0]["best_rival"] or {}).get(kind) or {}
        interval = "[{:+.3f}, {:+.3f}]".format(*best["auroc_ci"]) if best else ""
        figures = [over_seeds(found, part, key) for part in ("image", "pixel") for key in ("auroc", "ap")]
        against = over_seeds(found, "best_rival", kind, "auroc")
        rows.append((group, len(found), *figures, best.get("name", ""), against, interval))
    head = ("system, way", "seeds", "AUROC", "AP", "voxel AUROC", "AP", "best rival", "less it", "95 %, first seed")
    print(table(head, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", choices=tuple(SYSTEMS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/scores"))
    add_options(parser)
    parser.add_argument("--planted", action="store_true", help="score planted lesions with the runs of mri3d")
    options = parser.parse_args(argv)
    if options.planted and options.pack != "mri3d":
        parser.error("--planted goes with mri3d")
    measure_planted(options) if options.planted else measure(options.pack, options)


if __name__ == "__main__":
    main()
