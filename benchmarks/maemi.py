"""Trains MAEMI on real brains, on small real volumes with planted lesions, and for two ablations on phantoms.

    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d                  # FLAIR and T1c, recipe `small`
    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d --sequences T1c  # without FLAIR, whose brightness shows lesions
    JMAE_DATA=FOLDER python -m benchmarks.maemi mri3d_hippo            # normals; half of the test gets planted lesions
    python -m benchmarks.maemi ratio                                    # mask ratio 0.75 to 0.95 (the paper's Fig. 3)
    python -m benchmarks.maemi patch                                   # patches of 6:8:12:24 (the paper's table)
    python -m benchmarks.maemi table1 --manifest MANIFEST.csv          # the paper's size, on a GPU: Tables 1, 2, Fig. 3
    python -m benchmarks.maemi table2 --manifest MANIFEST.csv
    python -m benchmarks.maemi figure3 --manifest MANIFEST.csv

The last three print how long they would take before they begin, and stop there without a GPU. `--seeds N` trains N
seeds of each setting, of all commands. Each trains with `python -m jmae.train --config configs/maemi.py`. Further
--config.KEY=VALUE are passed on. It prints a table (for mri3d with each patient) and writes
benchmarks/results/maemi.json. The ablations also draw benchmarks/results/maemi_ratio.png and maemi_patch.png.
`--only N` runs only value number N of an ablation.
"""

import argparse
import csv
import json
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy.ndimage import gaussian_filter

from benchmarks.steps import train_run
from benchmarks.timing import table, write
from jmae import metrics, recipe
from jmae.data.manifest import parse_manifest
from jmae.masking import visible_tokens
from jmae.patches import grid_of
from jmae.system import load_system
from jmae.windows import tile

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.75, 0.80, 0.85, 0.90, 0.95)
# Scaled from the paper: 6, 8, 12, 24 of 240 become 3, 4, 6, 12 of 48, at twice the spacing or more.
PATCHES = ((3, 3, 2), (4, 4, 2), (6, 6, 2), (12, 12, 2))
# At the paper's size: (name, changes of the recipe `paper`, the paper's patient means of AUROC and AP).
PAPER = {
    "table1": [("8x8x2", {}, (0.732, 0.081))],
    "table2": [
        ("8x8x2", {}, (0.732, 0.081)),
        ("6x6x4", {"model.patch": (6, 6, 4)}, (0.724, 0.0784)),
        ("8x8x4", {"model.patch": (8, 8, 4)}, (0.712, 0.0777)),
        ("12x12x4", {"model.patch": (12, 12, 4)}, (0.660, 0.0750)),
        ("24x24x4", {"model.patch": (24, 24, 4)}, (0.546, 0.0560)),
    ],
    "figure3": [(str(ratio), {"train.mask_ratio": ratio, "evaluation.mask_ratio": ratio}, None) for ratio in RATIOS],
}
VOLUME = (273, 406, 105)  # voxels of a typical chest at 0.75 x 0.75 x 1 mm, of the estimate
RATE = 2.33e12 / 4.84e-3  # FLOP a second: the compiled step of the recipe on an H200 (results/scaling.json), not timed
PAPER_PATCH = {"6x6x4": 0.724, "8x8x4": 0.712, "12x12x4": 0.660, "24x24x4": 0.546}


def of_seeds(arguments: list[str], folder: Path, seeds: int) -> dict[str, Any]:
    """The result of the first seed, and of all seeds the voxel figures with their mean and 1.96 deviations."""
    each = [train_run([*arguments, f"--config.seed={s}"], folder / f"seed-{s}") for s in range(seeds)]
    figures = {key: metrics.replicate_summary([one["pixel"][key] for one in each]) for key in ("auroc", "ap")}
    return each[0] | {"seeds": figures}


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
        place = lambda name: str((manifest.parent / name).resolve()) if name else ""
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


def blob(
    rng: np.random.Generator, shape: Sequence[int], seat: Sequence[float], radii: tuple[float, float]
) -> np.ndarray:
    """How much of each voxel lies in a lobulated blob around `seat`, from 0 to 1; its radius is U(*radii) voxels."""
    distance = np.sqrt(sum((x - s) ** 2 for x, s in zip(np.indices(shape), seat, strict=True)))
    noise = gaussian_filter(rng.normal(size=shape), 2)
    return 1 / (1 + np.exp(distance - rng.uniform(*radii) * (1 + 0.25 * noise / noise.std())))


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
        row["image"] = str((manifest.parent / row["image"]).resolve())
    for row in test[::2]:
        rng = np.random.default_rng(list(row["id"].encode()))
        image = nib.load(row["image"])
        array = image.get_fdata().astype(np.float32)
        inside = blob(rng, array.shape, [rng.uniform(0.25, 0.75) * n for n in array.shape], (3.5, 6))
        low, high = np.percentile(array, (25, 75))
        sign = rng.choice([-1, 1])
        speckle = gaussian_filter(rng.normal(size=array.shape), 0.7)
        array += (high - low) * inside * (0.5 * sign + 0.1 * speckle / speckle.std())
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((f"{row['id']}.nii.gz", array), (f"{row['id']}_mask.nii.gz", (inside > 0.5) * 1.0)):
            nib.save(nib.Nifti1Image(content.astype(np.float32), image.affine), folder / name)
        row["image"], row["mask"] = (
            str((folder / f"{row['id']}{end}").resolve()) for end in (".nii.gz", "_mask.nii.gz")
        )
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
    result = of_seeds(base, folder / f"run-{options.name}", options.seeds)
    write(RESULTS / "maemi.json", f"{title}{'' if options.name == 'small' else f', {options.name}'}", result)
    show(result, patients=options.what == "mri3d")


def forward_flops(config: ConfigDict) -> float:
    """Floating-point operations of one masked crop forward; a training step of one crop takes three times as many."""
    model, tokens = config.model, prod(grid_of(tuple(config.data.size), tuple(config.model.patch)))
    visible, values = visible_tokens(tokens, config.train.mask_ratio), prod(model.patch) * config.data.channels
    block = lambda n, d: 24 * n * d**2 + 4 * n**2 * d  # dense layers, scores and their product with the values
    encoder = model.depth * block(visible + 1, model.width)
    decoder = model.decoder_depth * block(tokens + 1, model.decoder_width)
    return encoder + decoder + 2 * tokens * values * (model.width + model.decoder_width)


def estimate(config: ConfigDict, train: int, test: int) -> tuple[float, float]:
    """(Hours of training, hours of scoring) on the device alone, for so many training and test rows."""
    (stage,) = load_system(config).stages
    windows = len(tile(VOLUME, tuple(config.data.size), tuple(config.evaluation.stride), side=1, midline=203).origins)
    crops = 3 * stage.steps(train) * stage.batch
    scored = test * windows * config.evaluation.repeats
    return tuple(n * forward_flops(config) / RATE / 3600 for n in (crops, scored))  # type: ignore[return-value]


def at_papers_size(options: argparse.Namespace, overrides: list[str]) -> None:
    """The settings of a table or figure of the paper, with the recipe `paper`, on a manifest of the paper's data."""
    if not options.manifest:
        raise SystemExit(f"{options.what}: name the data: --manifest MANIFEST.csv")
    rows, _, problems = parse_manifest(options.manifest, crops=True)
    if problems:
        raise SystemExit("\n".join(problems))
    numbers = [sum(row.split == split for row in rows) for split in ("train", "test")]
    lines, hours = [], 0.0
    for name, changes, _ in PAPER[options.what]:
        config = recipe.load("configs/maemi.py:paper")
        recipe.override(config, dict(change.removeprefix("--").split("=", 1) for change in overrides))
        config.update_from_flattened_dict(changes)
        training, scoring = estimate(config, *numbers)
        hours += options.seeds * (training + scoring)
        lines.append((name, 3 * forward_flops(config) * config.train.batch / 1e12, training, scoring))
    print(
        f"{numbers[0]} training and {numbers[1]} test rows, {options.seeds} seed(s); "
        "estimated for one H200, device alone"
    )
    print(table((options.what, "TFLOP a step", "hours of training", "hours of scoring"), lines))
    print(f"at least {hours:.2g} hours in all; an A6000 takes about ten times as long")
    if jax.default_backend() == "cpu":
        print("not run: no GPU on this machine")
        return
    results = {}
    for name, changes, paper in PAPER[options.what]:
        own = [f"--config.{key}={','.join(map(str, np.atleast_1d(value)))}" for key, value in changes.items()]
        base = ["--config=configs/maemi.py:paper", f"--config.data.manifest={options.manifest}", *own, *overrides]
        found = []
        for seed in range(options.seeds):
            folder = options.workdir / f"{options.what}-{name}-{seed}"
            if not (folder / "result.json").exists():
                (folder / "result.json").write_text(json.dumps(train_run([*base, f"--config.seed={seed}"], folder)))
            found.append(json.loads((folder / "result.json").read_text()))
        results[name] = {"paper": paper, "seeds": [one["patient_means"] for one in found]}
        write(RESULTS / "maemi.json", f"paper, {options.what}", {"results": results})
        means = found[0]["patient_means"]
        print(
            table(("map", "AUROC", "95 %", "AP", "95 %", "mean prevalence"), [mean_row(*one) for one in means.items()])
        )
        print(f"{name}: the paper has {paper or 'a figure alone'}")
    if options.what == "figure3":
        draw(options.what, "mask ratio", results)


def mean_row(name: str, mean: dict[str, Any]) -> tuple[Any, ...]:
    """A line of Table 1."""
    ends = lambda key: "-".join(f"{end:.3f}" for end in mean[f"{key}_ci"])
    return name, mean["auroc"], ends("auroc"), mean["ap"], ends("ap"), mean["prevalence"]


def draw(name: str, label: str, results: dict[str, Any]) -> None:
    """AUROC and AP, means over patients and seeds, against the settings (the paper's Fig. 3)."""
    mean = lambda key: [np.mean([seed["maemi"][key] for seed in one["seeds"]]) for one in results.values()]
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(results), mean("auroc"), "o-", color="#2f6690")
    axes.set(xlabel=label, ylabel="voxel AUROC, mean over patients")
    right = axes.twinx()
    right.plot(list(results), mean("ap"), "s--", color="#b4491f")
    right.set_ylabel("AP (dashed)")
    figure.savefig(RESULTS / f"maemi_{name}.png", dpi=110)


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
            result = of_seeds(["--config=configs/maemi.py", *changes, *overrides], folder, options.seeds)
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
    parser.add_argument("what", choices=("mri3d", "mri3d_hippo", "ratio", "patch", *PAPER))
    parser.add_argument("--manifest", type=Path, help="of the paper's data, for its tables and its figure")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequences", nargs="+", choices=("FLAIR", "T1c"))
    parser.add_argument("--only", type=int)
    parser.add_argument("--name", default="small", help="name of a run with overridden values")
    parser.add_argument("--workdir", type=Path, default=Path("runs/maemi-accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    run = at_papers_size if options.what in PAPER else real if options.what.startswith("mri3d") else ablation
    run(options, overrides)


if __name__ == "__main__":
    main()
