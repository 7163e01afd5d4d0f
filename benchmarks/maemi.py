"""Trains MAEMI on real brains, on small real volumes with planted lesions, and for two ablations on phantoms.

    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d                  # FLAIR and T1c, recipe `small`
    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d --sequences T1c  # without FLAIR, whose brightness shows lesions
    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d_hippo            # normals; half of the test gets planted lesions
    python -m benchmarks.maemi ratio                                    # mask ratio 0.75 to 0.95 (the paper's Fig. 3)
    python -m benchmarks.maemi patch                                   # patches of 6:8:12:24 (the paper's table)

Each trains with `python -m jmae.train --config configs/maemi.py`, as the README does. Further --config.KEY=VALUE are
passed on. It prints a table (for mri3d with each patient) and writes benchmarks/results/maemi.json. The ablations also
draw benchmarks/results/maemi_ratio.png and maemi_patch.png. `--only N` runs only value number N of an ablation.
"""

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from benchmarks.steps import train_run
from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.75, 0.80, 0.85, 0.90, 0.95)
# Scaled from the paper: 6, 8, 12, 24 of 240 become 3, 4, 6, 12 of 48, at twice the spacing or more.
PATCHES = ((3, 3, 2), (4, 4, 2), (6, 6, 2), (12, 12, 2))
PAPER_PATCH = {"6x6x4": 0.724, "8x8x4": 0.712, "12x12x4": 0.660, "24x24x4": 0.546}


def show(result: dict[str, Any], patients: bool) -> None:
    """Prints the pooled figures and those of each patient, beside the baselines."""
    rows = [("pooled", "MAEMI", result["pixel"]["auroc"], result["pixel"]["ap"], result["pixel"]["prevalence"])]
    rows += [("pooled", name, part["auroc"], part["ap"], "") for name, part in result["baselines"].items() if part]
    for patient in result["per_patient"] if patients else ():
        rows.append((patient["patient"], "MAEMI", patient["auroc"], patient["ap"], patient["prevalence"]))
        rows += [(patient["patient"], name, p["auroc"], p["ap"], "") for name, p in patient["baselines"].items()]
    print(table(("patient", "score", "voxel AUROC", "AP", "chance AP"), rows))


def sequences(manifest: Path, chosen: list[str], folder: Path) -> Path:
    """Writes a copy of a manifest with only the `chosen` sequences (names of its column `channels`).

    Image files stay where they are. A row without a region gets one, the brain: FLAIR is not 0 there (the data pack's
    own rule).
    """
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        files = dict(zip(row["channels"].split(";"), row["image"].split(";"), strict=True))
        place = lambda name: str(manifest.parent / name) if name else ""
        row["image"] = ";".join(place(files[name]) for name in chosen)
        row["mask"], row["region"] = place(row["mask"]), place(row["region"])
        if not row["region"]:
            image = nib.load(place(files["FLAIR"]))
            brain = np.asarray(image.dataobj) != 0
            row["region"] = str((folder / f"{row['id']}_brain.nii.gz").resolve())
            nib.save(nib.Nifti1Image(brain.astype(np.uint8), image.affine), row["region"])
    return write_manifest(rows, folder)


def write_manifest(rows: list[dict[str, str]], folder: Path) -> Path:
    """Writes rows as manifest.csv into a folder of the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def plant_lesions(manifest: Path, folder: Path) -> Path:
    """Writes a copy of a manifest in which every second test volume has one planted lesion.

    The lesion is a blob with its centre in the middle half of the volume, a radius of U(3.5, 6) voxels and a lobulated
    edge. Inside, half of the volume's interquartile range is added or subtracted, and speckle of a tenth of that range
    is added. The draw depends only on the volume's name. Changed volumes are written into `folder`.
    """
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    test = [row for row in rows if row["split"] == "test"]
    for row in rows:
        row["image"] = str(manifest.parent / row["image"])
    for row in test[::2]:
        rng = np.random.default_rng(list(row["id"].encode()))
        image = nib.load(row["image"])
        array = image.get_fdata().astype(np.float32)
        seat = [rng.uniform(0.25, 0.75) * n for n in array.shape]
        distance = np.sqrt(sum((x - s) ** 2 for x, s in zip(np.indices(array.shape), seat, strict=True)))
        noise = gaussian_filter(rng.normal(size=array.shape), 2)
        inside = 1 / (1 + np.exp(distance - rng.uniform(3.5, 6) * (1 + 0.25 * noise / noise.std())))
        low, high = np.percentile(array, (25, 75))
        sign = rng.choice([-1, 1])
        speckle = gaussian_filter(rng.normal(size=array.shape), 0.7)
        array += (high - low) * inside * (0.5 * sign + 0.1 * speckle / speckle.std())
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((f"{row['id']}.nii.gz", array), (f"{row['id']}_mask.nii.gz", (inside > 0.5) * 1.0)):
            nib.save(nib.Nifti1Image(content.astype(np.float32), image.affine), folder / name)
        row["image"], row["mask"] = (str(folder / f"{row['id']}{end}") for end in (".nii.gz", "_mask.nii.gz"))
        row["label"] = "1"
    return write_manifest(rows, folder)


def real(options: argparse.Namespace, overrides: list[str]) -> None:
    """Trains on one data pack of volumes."""
    pack = Path(os.environ.get("JMAE_DATA", "")) / options.what / "manifest.csv"
    if not os.environ.get("JMAE_DATA") or not pack.is_file():
        print(f"not run: {pack} not found; set JMAE_DATA to the folder of the packs")
        return
    chosen = options.sequences or ["FLAIR", "T1c"]
    title = options.what if options.what == "mri3d_hippo" else f"mri3d, {' and '.join(chosen)}"
    folder = options.workdir / title.replace(", ", "-").replace(" ", "-")
    if options.what == "mri3d":
        manifest = sequences(pack, chosen, folder)
        own = [f"--config.data.channels={len(chosen)}", "--config.data.spacing=2,2,2"]
    else:  # about 35 x 50 x 36 voxels without air
        manifest = plant_lesions(pack, folder)
        own = ["--config.data.channels=1", "--config.data.size=24,24,8", "--config.model.patch=4,4,2"]
        own += ["--config.evaluation.stride=8,8,4", "--config.train.steps=2000", "--config.evaluation.repeats=6"]
    base = ["--config=configs/maemi.py:small", f"--config.data.manifest={manifest}", *own, *overrides]
    result = train_run(base, folder / f"run-{options.name}")
    write(RESULTS / "maemi.json", f"{title}{'' if options.name == 'small' else f', {options.name}'}", result)
    show(result, patients=options.what == "mri3d")


def ablation(options: argparse.Namespace, overrides: list[str]) -> None:
    """Trains the phantom recipe for each value, and compares the order of the figures with the paper's."""
    key = options.what
    values = RATIOS if key == "ratio" else PATCHES
    results: dict[str, dict[str, Any]] = {}
    for i, value in enumerate(values):
        name = str(value) if key == "ratio" else "x".join(map(str, value))
        folder = options.workdir / f"{key}-{name}"
        done = folder / "result.json"
        if options.only in (None, i) and not done.exists():
            changes = (
                [f"--config.train.mask_ratio={value}", f"--config.evaluation.mask_ratio={value}"]
                if key == "ratio"
                else [
                    f"--config.model.patch={','.join(map(str, value))}",
                    "--config.data.size=48,24,8",
                    "--config.evaluation.stride=24,8,4",
                ]
            )
            result = train_run(["--config=configs/maemi.py", *changes, *overrides], folder)
            done.write_text(json.dumps({k: v for k, v in result.items() if k != "per_patient"}))
        if done.exists():
            results[name] = json.loads(done.read_text())
    if len(results) < len(values):
        print(f"{len(results)} of {len(values)} runs exist: run the others (--only)")
        return
    aurocs = [r["pixel"]["auroc"] for r in results.values()]
    order = "optimum at 0.9, lowest at 0.95" if key == "ratio" else "the smaller the patch the better"
    best = list(results)[int(np.argmax(aurocs))]
    same_order = (
        best == "0.9" and min(aurocs) == aurocs[-1] if key == "ratio" else aurocs == sorted(aurocs, reverse=True)
    )
    found = {"results": results, "paper": order, "in the paper's order": bool(same_order)}
    write(RESULTS / "maemi.json", f"phantoms, {key}", found | ({"paper_auroc": PAPER_PATCH} if key == "patch" else {}))
    rows = [(name, r["pixel"]["auroc"], r["pixel"]["ap"], r["image"]["auroc"]) for name, r in results.items()]
    print(table((key, "voxel AUROC", "AP", "image AUROC"), rows))
    print(f"the paper: {order}; here {'the same' if same_order else 'another order'}")
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(results), aurocs, "o-", color="#2f6690", label="voxel AUROC")
    axes.set(xlabel="mask ratio" if key == "ratio" else "patch (voxels)", ylabel="voxel AUROC, phantoms")
    right = axes.twinx()
    right.plot(list(results), [r["pixel"]["ap"] for r in results.values()], "s--", color="#b4491f")
    right.set_ylabel("AP (dashed)")
    figure.savefig(RESULTS / f"maemi_{key}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mri3d", "mri3d_hippo", "ratio", "patch"))
    parser.add_argument("--sequences", nargs="+", choices=("FLAIR", "T1c"))
    parser.add_argument("--only", type=int)
    parser.add_argument("--name", default="small", help="name of a run with overridden values")
    parser.add_argument("--workdir", type=Path, default=Path("runs/maemi-accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    (real if options.what.startswith("mri3d") else ablation)(options, overrides)


if __name__ == "__main__":
    main()
