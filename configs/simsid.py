"""SimSID: inpainting from a memory of normal anatomy, a teacher and a student, a discriminator as the judge.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025), and the SimSID that it
simplifies: Xiang et al., TPAMI 2024, arXiv 2403.08689 (`--config.variant=official`, with the values of CheXpert).
Expected: the report prints no AUROC. The teacher's training MSE is 0.0323 after 20 epochs and 0.0029 after 1000, the
student's 0.0099 after 20 and 0.0032 after 250.

  python -m jmae.train --config configs/simsid.py                                            phantoms, 2 cores, 6 min
  python -m jmae.train --config configs/simsid.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 min
  python -m jmae.train --config configs/simsid.py:paper --config.data.manifest=MANIFEST.csv  the report's numbers, 1 GPU
  the published code on ZhangLab's X-rays, 1 GPU: zhanglab (SimSID, printed AUROC .911), squid (SQUID, .876)
  phantoms in 3D: phantom3d

The keys, with the report's values as their defaults, are declared in jmae/systems/simsid.py.
"""

from ml_collections import ConfigDict

from jmae import recipe

TAKES = "images: normal ones; labelled val images choose its weights (3D: phantoms alone)"


def fixed_steps(**steps: int) -> dict[str, int]:
    """The keys of a recipe that give its stages steps instead of epochs."""
    changes = {f"{stage}.steps": number for stage, number in steps.items()}
    return changes | {f"{stage}.epochs": 0 for stage in steps}


# ours: narrower networks on small images, fixed steps and a higher rate for 2 cores.
SMALL = {
    "data.size": (64, 64),
    "data.normalise": "auto",
    # Chosen by AUROC on val of the phantoms: with a teacher of 500 steps and a student of 300, "patches" has 0.90,
    # "mse" 0.86; centre="retrieved" has 0.84 and 0.81, also with 16 rows of the patch's own place.
    "evaluation.score": "patches",
    "evaluation.patch": (8, 8),
    "evaluation.top": 0.1,
    "model.centre": "raw",
    "model.dropout": 0.0,
    "student.from_teacher": True,
    "model.widths": (16, 32, 64, 128),
    "model.discriminator": (8, 16, 32, 64, 128),
    "joint.widths": (8, 16, 32, 64, 128),
    "joint.slots": 100,
    **fixed_steps(teacher=2000, student=1500, discriminator=500, joint=1000),
    "teacher.lr": 1e-3,
    "student.lr": 1e-3,
    # A spike of the loss in the last steps left a student with five times its error, and scores that pointed the wrong
    # way. It had a constant rate, as the report has.
    "teacher.cooldown": 0.2,
    "student.cooldown": 0.2,
    "discriminator.lr": 2e-4,
    "joint.lr": 1e-3,
    "joint.lr_least": 5e-4,
    "validation.held_out": 0.1,
    "validation.every": 250,
    "checkpoint_every": 500,
    "log_every": 10,
}

# zhang_dev.py of MrGiovanni/SimSID.
ZHANGLAB = {
    "variant": "official",
    "joint.epochs": 1000,
    "joint.queue": True,
    "joint.kept": 1.0,
    "joint.cosine": 0.3,  # 300 epochs
    "joint.lr_least": 1e-5,
}

# zhang_best.py of tiangexiang/SQUID.
SQUID = {
    **ZHANGLAB,
    "joint.epochs": 200,
    "joint.activation": "sigmoid",
    "joint.kept": 0.95,
    "joint.decoder_kept": 0.95,
    "joint.cosine": 1.5,  # 300 epochs
    "joint.tolerance": 0.005,
    "model.discriminator": (16, 32, 64, 128, 128),
}

PRESETS = {
    "paper": {},  # the report's values, and our decisions where it is silent
    "zhanglab": ZHANGLAB,
    "squid": SQUID,
    "small": SMALL,
    "phantom": {**SMALL, "data.phantom": "chest"},
    "smoke": {
        **SMALL,
        "data.phantom": "chest",
        "data.size": (32, 32),
        "model.patch": (8, 8),
        "model.widths": (4, 8, 8),
        "model.features": 16,
        "model.width": 16,
        "model.heads": 2,
        "model.mlp": 32,
        "model.depth": 1,
        "model.discriminator": (4, 8, 8),
        "joint.widths": (4, 8, 8),
        "joint.slots": 10,
        "joint.joined": 1,
        "joint.heads": 2,
        "memory.batch": 64,
        **fixed_steps(teacher=20, student=20, discriminator=20, joint=20),
        "validation.every": 10,
        "validation.select_every": 10,
        "validation.samples": 16,
        "checkpoint_every": 5,
        "log_every": 5,
        "evaluation.draws": 200,
    },
    "phantom3d": {
        **SMALL,
        "data.phantom": "breast",
        "data.channels": 2,
        "data.size": (32, 32, 8),
        "data.normalise": "crop",
        "model.patch": (8, 8, 8),
        "model.widths": (16, 32, 64),
        "model.discriminator": (8, 16, 32, 64),
        "joint.windows": (2, 2, 1),
        "joint.widths": (8, 16, 32, 64),
        "evaluation.score": "l1",  # a window has one value of each other score for all its voxels
        "evaluation.patch": (8, 8, 2),
        "evaluation.top": 0.01,
    },
}


def get_config(preset: str = "phantom") -> ConfigDict:
    """The recipe of a preset; raises ValueError for an unknown one."""
    return recipe.preset("simsid", PRESETS, preset)
