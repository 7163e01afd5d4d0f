"""A small set of volumes as NIfTI files, and the recipe that tests train on it."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
from conftest import draw
from sklearn.metrics import roc_auc_score

# The file's axes run to the left, upwards and forwards, and lie a little askew.
AFFINE = np.array([[-3, 0.1, 0.1, 60], [0.1, 0.2, 3, -20], [0, 3.5, -0.2, 5], [0, 0, 0, 1]], float)
COLUMNS = "id patient split label image mask region boxes midline pre post".split()


def write_patients(folder: Path) -> Path:
    """A manifest of two-sequence volumes of several odd sizes: whole patients with a midline, lesions as masks and in
    one case as a box, and of two test cases series before and after contrast."""
    rng, rows = np.random.default_rng(0), []
    for split, label, n in [("train", 0, 3), ("val", 0, 2), ("val", 1, 2), ("test", 0, 2), ("test", 1, 3)]:
        for i in range(n):
            name, size = f"{split}{label}{i}", (19 + 2 * i, 7 + i, 17 - i)
            image, mask = draw(rng, size, bool(label))
            region = np.zeros(size, np.uint8)
            region[1:-1, :, 2:] = 1
            parts = {"a": image, "b": 255 - image.astype(int) + rng.integers(0, 9, size), "r": region}
            parts |= {"m": mask.astype(np.uint8)} if label else {}
            parts |= {k: image + 40.0 * mask * (k != "pre") + rng.normal(0, 5, size) for k in ("pre", "p1", "p2")}
            for part, array in parts.items():
                nib.save(nib.Nifti1Image(np.asarray(array, np.float32), AFFINE), folder / f"{name}-{part}.nii.gz")
            low, high = (f(np.argwhere(mask), 0) for f in (np.min, np.max)) if label else ((), ())
            boxed = (split, label, i) == ("test", 1, 2)
            rows.append(
                {
                    "id": name,
                    "patient": f"patient {name}",
                    "split": split,
                    "label": label,
                    "image": f"{name}-a.nii.gz;{name}-b.nii.gz",
                    "mask": f"{name}-m.nii.gz" if label and not boxed else "",
                    "region": f"{name}-r.nii.gz",
                    "boxes": " ".join(map(str, [*low, *(high + 1)])) if boxed else "",
                    "midline": "middle" if i == 0 else 9,
                    "pre": f"{name}-pre.nii.gz" if split == "test" and i < 2 else "",
                    "post": f"{name}-p1.nii.gz;{name}-p2.nii.gz" if split == "test" and i < 2 else "",
                }
            )
    return write_rows(folder / "manifest.csv", rows)


def write_rows(file: Path, rows: list[dict]) -> Path:
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file


def voxel_auroc(manifest: Path, run: Path) -> float:
    """AUROC of a run's written maps over the voxels of all test cases' regions, by scikit-learn."""
    load = lambda file: np.asarray(nib.load(file).dataobj)
    labels, values = [], []
    with open(manifest, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    for row in rows:
        region = load(manifest.with_name(row["region"])) > 0
        lesion = load(manifest.with_name(row["mask"])) > 0 if row["mask"] else np.zeros(region.shape, bool)
        if row["boxes"]:
            ends = list(map(int, row["boxes"].split()))
            lesion[tuple(slice(low, high) for low, high in zip(ends[:3], ends[3:], strict=True))] = True
        labels.append(lesion[region])
        values.append(load(run / "evaluation" / "maps" / f"{row['id']}_anomaly.nii.gz")[region])
    return roc_auc_score(np.concatenate(labels), np.concatenate(values))


SETTINGS = """
data.size=8,8,4 model.patch=4,4,2 model.width=24 model.heads=2 model.depth=1 model.decoder_width=12
model.decoder_heads=2
data.spacing= data.join=same data.crop=none evaluation.stride=4,4,2 evaluation.batch=16 evaluation.reconstruction=true
train.mask_ratio=0.5 evaluation.mask_ratio=0.5 train.steps=6 train.batch=2 checkpoint_every=4 log_every=2
evaluation.filter=3,3,2 evaluation.repeats=2
""".split()


def arguments(manifest: Path, workdir: Path, *changes: str) -> list[str]:
    own = [f"--config.{change}" for change in [*SETTINGS, f"data.manifest={manifest}", *changes]]
    return ["--config=configs/maemi.py:smoke", f"--workdir={workdir}", *own]
