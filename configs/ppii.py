"""P-PII: a segmentation network trained on probabilistic Poisson image interpolations of normal images.

Müller, Baugh, Tan, Dombrowski, Kainz, "Confidence-Aware and Self-Supervised Image Anomaly Localisation", UNSURE 2023,
arXiv 2303.13227. Expected (pixel AUROC, Table 1): JSRT .90, DeepLesion .74, LIDC .69 with the U-Net.
Our numbers are in benchmarks/results.

  python -m jmae.train --config configs/ppii.py                                            phantoms, 2 cores, 6 minutes
  python -m jmae.train --config configs/ppii.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 minutes
  python -m jmae.train --config configs/ppii.py:paper --config.data.manifest=MANIFEST.csv  the paper's numbers, one GPU
  the same in 3D: phantom3d, small3d

Variants (`--config.variant=`): paper, released (the authors' file), jmae (ours), and the tasks pii, fpi, cutpaste, nsa.
Backbones (`--config.model.backbone=`): unet; mc_unet and phiseg take longer: 6 minutes with budget=0.7 and 0.45.
FROC: `--config.evaluation.froc_rule=centroid --config.evaluation.froc_overlap=0` is the rule of earlier runs.
Keys, their defaults and meaning: jmae/systems/ppii.py and jmae/recipe.py.
"""

from ml_collections import ConfigDict

from jmae import recipe

TAKES = "images or volumes (small3d): normal ones"
SUGGESTED = {"images": "it learns from normal images alone, and trains fastest"}

# FROC by the peaks of components: by their centroids, a map of noise finds many boxes. The paper names no rule.
FROC = {"evaluation.froc_rule": "peak", "evaluation.froc_overlap": 0.1}
# ours: a narrow network on small images and fixed steps for 2 cores. Patches are fewer, larger and of lower strength
# than the paper's: 5 % of a small side is no lesion, and steep gradients show a patch without any anatomy.
SMALL = FROC | {
    "data.size": (64, 64),
    "model.widths": (8, 16, 32, 32),
    "model.base": 8,
    "model.latent_levels": 4,
    "anomaly.patch": (0.2, 0.8),
    "anomaly.half": (0.1, 0.4),
    "anomaly.paper.anomalies": (1, 4),
    "anomaly.paper.strength": (1.0, 2.0),
    "train.steps": 1200,
    "train.validate_every": 400,
    "checkpoint_every": 400,
    "evaluation.samples": 20,
}
# ours: the soft composites of `jmae`, on images that are not equalised, find the phantoms' soft lesions best of what
# was tried on their `val`.
PHANTOM = SMALL | {"data.phantom": "chest", "variant": "jmae", "data.equalise": False, "anomaly.patch": (0.3, 0.9)}
SMALL3D = SMALL | {"data.size": (32, 32, 8), "anomaly.patch": (0.3, 0.7)}

PRESETS = {
    "paper": FROC,
    "small": SMALL | {"model.prior": 0.02},  # the share of anomalous pixels in its targets: see docs/results/ppii.md
    "phantom": PHANTOM,
    "smoke": PHANTOM
    | {
        "data.size": (32, 32),
        "model.widths": (4, 8, 8),
        "model.base": 4,
        "model.latent_levels": 3,
        "train.steps": 20,
        "train.batch": 8,
        "train.validate_every": 10,
        "train.validation_samples": 16,
        "checkpoint_every": 5,
        "log_every": 5,
        "evaluation.samples": 3,
        "evaluation.draws": 200,
    },
    "small3d": SMALL3D,
    "phantom3d": SMALL3D
    | {
        "data.phantom": "breast",
        "data.channels": 2,
        "data.region": "",
        "data.normal_crops_only": False,
        "data.least_region": 0.0,
        "data.normalise": "crop",
    },
}


def get_config(preset: str = "phantom") -> ConfigDict:
    """The recipe of a preset: `paper` as published, the others with the changes above."""
    return recipe.preset("ppii", PRESETS, preset)
