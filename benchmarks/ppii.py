"""Trains P-PII on phantoms and on real images: generators, backbones, augmentations, slices and volumes.

    python -m benchmarks.ppii generators                 # phantoms, three seeds as one program each
    python -m benchmarks.ppii backbones                  # phantoms
    JMAE_DATA=FOLDER python -m benchmarks.ppii endoscopy # the paper's Tables 1 and 2 at a small size
    JMAE_DATA=FOLDER python -m benchmarks.ppii mri3d     # slices and volumes
    JMAE_DATA=FOLDER python -m benchmarks.ppii cxr_nih   # boxes

Each setting trains with `python -m jmae.train --config configs/ppii.py`, as the README does. Further --config.KEY=VALUE
are passed on. `--only NAME ...` runs some of the settings. The table has pixel AUROC and AP, the sensitivity for
lesions at 10 false positives an image, and image AUROC and AP, beside the cheap baselines. benchmarks/results/ppii.json
keeps every setting.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.steps import train_run, without_curves
from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results" / "ppii.json"
SCALING, COMBINED = {"train.scaling": 120 / 512}, {"train.rotation": 10.0, "train.elastic": 10 / 512}
VARIANTS = ("paper", "released", "jmae", "pii")
PARTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "generators": ("", {name: {"variant": name, "replicates": 3} for name in VARIANTS}),
    "backbones": ("", {name: {"model.backbone": name} for name in ("unet", "mc_unet", "phiseg")}),
    "endoscopy": (
        ":small",
        {
            "PII, unet": {"variant": "pii"},
            "unet": {},
            "mc_unet": {"model.backbone": "mc_unet"},
            "phiseg": {"model.backbone": "phiseg"},
            "unet, scaling": SCALING,
            "mc_unet, scaling": {"model.backbone": "mc_unet"} | SCALING,
            "unet, combined": SCALING | COMBINED,
            "mc_unet, combined": {"model.backbone": "mc_unet"} | SCALING | COMBINED,
        },
    ),
    "mri3d": ("", {"slices": {"data.channels": 2}, "volumes": {"data.channels": 2, "data.spacing": "2,2,2"}}),
    "cxr_nih": (":small", {"unet": {"evaluation.subsets": "matched"}}),
}


def slices(manifest: Path, folder: Path) -> Path:
    """The manifest of the volumes' axial slices. Those without a lesion are farther than 5 slices from each."""
    if not (folder / "manifest.csv").is_file():
        command = [sys.executable, "-m", "jmae.data.slices", str(manifest), "--out", str(folder), "--every", "2"]
        subprocess.run(command, check=True)
    return folder / "manifest.csv"


def show(name: str, result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a setting in the table: its primary score, and the baselines."""
    pixel, image = result["pixel"], result["image"] or {}
    froc = (pixel.get("froc") or {}).get("sensitivity", "")
    rows = [(name, "P-PII", pixel["auroc"], pixel["ap"], froc, image.get("auroc", ""), image.get("ap", ""))]
    for title, part in result["baselines"].items():
        found = (part.get("froc") or {}).get("sensitivity", "") if part else ""
        rows += [(name, title, part["auroc"], part["ap"], found, "", "")] if part else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(PARTS))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--workdir", type=Path, default=Path("runs/ppii-accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    preset, settings = PARTS[options.what]
    pack = Path(os.environ.get("JMAE_DATA", "")) / options.what / "manifest.csv"
    real = options.what not in ("generators", "backbones")
    if real and (not os.environ.get("JMAE_DATA") or not pack.is_file()):
        print(f"not run: {pack} not found; set JMAE_DATA to the folder of the packs")
        return
    rows = []
    for name, changes in settings.items():
        if options.only and name not in options.only:
            continue
        own, manifest = preset, pack
        if options.what == "mri3d":
            own = ":small" if name == "slices" else ":small3d"
            manifest = slices(pack, options.workdir / "slices") if name == "slices" else pack
        given = [f"--config.{key}={value}" for key, value in changes.items()]
        given += [f"--config.data.manifest={manifest}"] if real else []
        folder = options.workdir / f"{options.what}-{name.replace(', ', '-')}"
        result = train_run([f"--config=configs/ppii.py{own}", *given, *overrides], folder)
        write(RESULTS, f"{options.what}, {name}", without_curves(result))
        rows += show(name, result)
    print(table(("setting", "score", "pixel AUROC", "AP", "FROC@10", "image AUROC", "AP"), rows))


if __name__ == "__main__":
    main()
