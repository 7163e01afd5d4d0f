"""P-PII on phantoms and on real images: generators, strengths, backbones, augmentations, slices and volumes.

    python -m benchmarks.ppii phantoms                      # generators and backbones
    JMAE_DATA=FOLDER python -m benchmarks.ppii generators   # on cxr_nih (boxes), endoscopy, and slices of mri3d
    JMAE_DATA=FOLDER python -m benchmarks.ppii strength     # cxr_nih: a factor of 2 to 19, mean of each patch, gain 10
    JMAE_DATA=FOLDER python -m benchmarks.ppii table1       # endoscopy: both tasks with three backbones
    JMAE_DATA=FOLDER python -m benchmarks.ppii table2       # endoscopy: augmentations
    JMAE_DATA=FOLDER python -m benchmarks.ppii volumes      # mri3d: the recipe small3d
    JMAE_DATA=FOLDER python -m benchmarks.ppii tables       # Tables 1 and 2 on prepared jsrt, deeplesion and lidc

All but `tables` train the recipe `small` (phantoms: the default) with seeds 0 to 2 (`--seeds`) and all of its steps
(`--budget`); further --config.KEY=VALUE are passed on, `--only NAME ...` runs some settings. `tables` trains the recipe
`paper` and needs an accelerator: 100,000 steps a row, by the paper about four days each on an A100. The folders are
those of `python -m jmae.data.prepare jsrt --out $JMAE_DATA/jsrt` and so on. benchmarks/results/ppii.json keeps every
seed. What has a result is not run again, and a run that was stopped goes on.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import add_options, over_seeds, pack, trained
from benchmarks.timing import table

RESULTS = Path(__file__).parent / "results" / "ppii.json"
VARIANTS = ("paper", "released", "jmae", "pii")
BACKBONES = ("unet", "mc_unet", "phiseg")
STRENGTHS = (2, 3, 5, 7, 10, 14, 19)
SCALING, COMBINED = {"train.scaling": 120 / 512}, {"train.rotation": 10.0, "train.elastic": 10 / 512}
AUGMENTED = {"scaling": SCALING, "combined": SCALING | COMBINED}
SETS = ("jsrt", "deeplesion", "lidc")  # of the paper
FIGURES = {
    "pixel AUROC": ("pixel", "auroc"),
    "pixel AP": ("pixel", "ap"),
    "FROC@10": ("pixel", "froc", "sensitivity"),
    "mean FROC": ("pixel", "froc", "mean"),
    "chance@10": ("pixel", "froc", "chance", "sensitivity"),
    "mean chance": ("pixel", "froc", "chance", "mean"),
    "image AUROC": ("image", "auroc"),
    "image AP": ("image", "ap"),
}


def settings_of(what: str) -> dict[str, dict[str, Any]]:
    """The settings of a part: changes of its recipe by the setting's name."""
    generators = {name: {"variant": name} for name in VARIANTS}
    networks = {name: {"model.backbone": name} for name in BACKBONES}
    rows = {f"P-PII, {name}": changes for name, changes in networks.items()}
    rows |= {f"PII, {name}": changes | {"variant": "pii"} for name, changes in networks.items()}
    augmented = {
        f"{name}, {title}": networks[name] | changes
        for name in ("unet", "mc_unet")
        for title, changes in AUGMENTED.items()
    }
    strengths = {
        f"strength {k}": {"variant": "paper", "anomaly.paper.strength": f"{k},{k}", "anomaly.paper.gain": 10.0}
        for k in STRENGTHS
    }
    return {
        "phantoms": generators | networks,
        "generators": generators,
        "strength": strengths,
        "table1": rows,
        "table2": augmented,
        "volumes": {"volumes": {"data.spacing": "2,2,2"}},
        "tables": rows | augmented,
    }[what]


def data_of(what: str) -> tuple[str, ...]:
    """The packs of a part; "" stands for phantoms, "mri3d slices" for the slices of that pack."""
    return {
        "phantoms": ("",),
        "generators": ("cxr_nih", "endoscopy", "mri3d slices"),
        "strength": ("cxr_nih",),
        "table1": ("endoscopy",),
        "table2": ("endoscopy",),
        "volumes": ("mri3d",),
        "tables": SETS,
    }[what]


def slices(manifest: Path, folder: Path) -> Path:
    """The manifest of the volumes' axial slices. Those without a lesion are farther than 5 slices from each."""
    if not (folder / "manifest.csv").is_file():
        command = [sys.executable, "-m", "jmae.data.slices", str(manifest), "--out", str(folder), "--every", "2"]
        subprocess.run(command, check=True)
    return folder / "manifest.csv"


def arguments_of(what: str, data: str, changes: Mapping[str, Any], workdir: Path) -> list[str] | None:
    """The arguments of a training; None where its images are not there."""
    preset = {"phantoms": "", "volumes": ":small3d", "tables": ":paper"}.get(what, ":small")
    own = [f"--config=configs/ppii.py{preset}", *(f"--config.{key}={value}" for key, value in changes.items())]
    if not data:
        return own
    folder = pack(data.split()[0])
    if folder is None:
        return None
    manifest = folder / "manifest.csv"
    if data.endswith(" slices"):
        manifest = slices(manifest, workdir / "slices")
    own += ["--config.data.channels=2"] if data.startswith("mri3d") else []
    own += ["--config.evaluation.subsets=matched"] if data == "cxr_nih" else []
    own += ["--config.data.window=-1024,3071"] if data in ("deeplesion", "lidc") else []
    return [*own, f"--config.data.manifest={manifest}"]


def show(data: str, name: str, results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Table rows of a setting: its primary score and the baselines over the seeds."""
    rows = [(data, name, "P-PII", *(over_seeds(results, *path) for path in FIGURES.values()))]
    for title in results[0]["baselines"]:
        rows.append((data, name, title, *(over_seeds(results, "baselines", title, *p) for p in FIGURES.values())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("phantoms", "generators", "strength", "table1", "table2", "volumes", "tables")
    parser.add_argument("what", choices=parts)
    parser.add_argument("--workdir", type=Path, default=Path("runs/ppii-accuracy"))
    add_options(parser)
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    if options.what == "tables":
        import jax

        if jax.default_backend() == "cpu":
            hours = 96 * len(settings_of("tables")) * len(SETS) * len(options.seeds)
            print(f"not run: no accelerator; by the paper's four days a row all rows take {hours:,} h on an A100")
            return
    rows: list[tuple[str, ...]] = []
    for data in data_of(options.what):
        own = {
            name: arguments_of(options.what, data, changes, options.workdir)
            for name, changes in settings_of(options.what).items()
        }
        if None in own.values():
            continue
        given = {name: [*arguments, *overrides] for name, arguments in own.items() if arguments is not None}
        what = "-".join([f"{options.what} {data}".strip(), *(o.removeprefix("--config.") for o in overrides)])
        found = trained(RESULTS, what, given, options, folder=options.workdir)
        rows += [row for name, results in found.items() for row in show(data, name, results)]
    print(table(("set", "setting", "score", *FIGURES), rows))


if __name__ == "__main__":
    main()
