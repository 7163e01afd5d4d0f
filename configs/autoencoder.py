"""Autoencoders of normal images: trained rivals of the five systems.

Cai, Zhang, Chen, Cheng, "MedIAnomaly", arXiv 2404.04518: AE, AE-U, a denoising one; DDAD's ensembles, arXiv 2206.03935.

  python -m jmae.train --config configs/autoencoder.py                                            phantoms
  python -m jmae.train --config configs/autoencoder.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores
  python -m jmae.train --config configs/autoencoder.py:paper --config.data.manifest=MANIFEST.csv  MedIAnomaly's
  small_dae, paper_dae: the denoising autoencoder; small_ddad, paper_ddad: DDAD, with DDAD's own settings

Variants (`--config.variant=`): ae, ae_u, dae, ddad, ddad_intra (needs no unlabelled image): see
jmae/systems/autoencoder.py. `dae` in another preset has the noise and the mask of Kascenas et al. (`dae.foreground`).
"""

from ml_collections import ConfigDict

from jmae import recipe

TAKES = "images: normal ones (variant=ddad: unlabelled ones too); a rival, none of the five systems"

# MedIAnomaly's denoising autoencoder on chest X-rays: noise everywhere. Its code sets the noise's mean to -0.5.
DAE = {"variant": "dae", "dae.mean": -0.5, "dae.foreground": False}
PAPER_DAE = DAE | {"data.size": (128, 128), "train.batch": 16}
DDAD = {"variant": "ddad", "model.hidden": 2048, "train.lr": 5e-4, "train.betas": (0.5, 0.999)}
PAPER_DDAD = DDAD | {"data.anomaly_ratio": 0.6, "data.unlabeled_size": 4000}
# ours: fixed steps for 2 cores, and a narrower U-Net.
SMALL = {"train.steps": 1200, "train.epochs": 0}
SMALL_DAE = SMALL | DAE | {"dae.widths": (16, 32, 64, 128), "train.batch": 16}
SMALL_DDAD = SMALL | DDAD | {"train.steps": 500, "train.batch": 32}
PHANTOM = SMALL | {"data.phantom": "chest", "variant": "ae_u"}
SMOKE = PHANTOM | {
    "variant": "ddad",
    "data.size": (32, 32),
    "model.width": 4,
    "model.hidden": 16,
    "model.latent": 4,
    "model.networks": 2,
    "dae.widths": (8, 16),
    "train.steps": 10,
    "train.batch": 8,
    "evaluation.draws": 200,
    "checkpoint_every": 5,
    "log_every": 5,
}
PRESETS = {
    "paper": {},
    "paper_dae": PAPER_DAE,
    "paper_ddad": PAPER_DDAD,
    "small": SMALL,
    "small_dae": SMALL_DAE,
    "small_ddad": SMALL_DDAD,
    "phantom": PHANTOM,
    "smoke": SMOKE,
}


def get_config(preset: str = "phantom") -> ConfigDict:
    """The recipe of a preset; `paper` as MedIAnomaly trains AE and AE-U."""
    return recipe.preset("autoencoder", PRESETS, preset)
