"""MemMC-MAE: a masked autoencoder with memory slots in its encoder and a decoder that attends to all encoder levels.

Tian, Pang, Liu et al., MLMI 2023, arXiv 2203.11725.
Expected: Covid-X image AUROC 0.917 (plain MAE 0.799, with memory 0.862), Hyper-Kvasir AUROC 0.972, IoU 0.419. The
paper's figures need its data; ours are in benchmarks/results.

  python -m jmae.train --config configs/memmc_mae.py                                            phantoms, 6 minutes
  python -m jmae.train --config configs/memmc_mae.py:small --config.data.manifest=MANIFEST.csv  own data, 15 minutes
  python -m jmae.train --config configs/memmc_mae.py:paper --config.data.manifest=MANIFEST.csv  the paper's, one GPU
  paper_colour, small_colour: the same for colour images, such as Hyper-Kvasir's; phantom3d, small3d: in 3D

`--config.model.weights=FILE --config.model.long_skips=false` starts from a published masked autoencoder.

The paper's ablation: plain MAE --config.model.memory=0 --config.model.mc_decoder=False --config.model.long_skips=False.
"""

from ml_collections import ConfigDict

from jmae import recipe

TAKES = "images or volumes (small3d): normal ones"

# A voxel's map is the mean over the masks that hide it: other masks paste the voxel, which then has no error. The
# smallest crop, 0.2 of the area of 512 x 512 pixels, still has `data.size`.
PAPER = {"evaluation.average": "hidden", "data.crop_from": (512, 512)}
COLOUR = {"data.channels": 3, "model.channels": 3}
# ours: a small network on small images and fixed steps for 2 cores. Images are standardised one by one, since exposure
# differs within a set. No crops, and a window of 7 over three scales: the best of what was tried on the
# phantoms' `val`.
SMALL = {
    "data.size": (96, 96),
    "data.normalise": "image",
    "data.crop_scale": (),
    "model.patch": (12, 12),
    "model.channels": 1,
    "model.gate": "channel",
    "model.width": 192,
    "model.depth": 6,
    "model.heads": 6,
    "model.decoder_width": 96,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "train.steps": 2000,
    "train.epochs": 0,
    "train.batch": 32,
    "train.warmup": 0.05,
    "evaluation.window": (7, 7),
    "evaluation.scales": (0.2, 0.4, 0.4),
    "evaluation.average": "hidden",
    "evaluation.tokens": "position",
    "checkpoint_every": 500,
}
PHANTOM = SMALL | {
    "data.phantom": "chest",
    "data.size": (64, 64),
    "model.patch": (8, 8),
    "model.width": 128,
    "model.depth": 4,
    "model.heads": 4,
    "model.decoder_width": 64,
}
SMOKE = PHANTOM | {
    "data.size": (32, 32),
    "model.width": 48,
    "model.depth": 3,
    "model.heads": 3,
    "model.memory": 4,
    "model.decoder_width": 32,
    "model.decoder_depth": 1,
    "train.steps": 20,
    "train.batch": 8,
    "evaluation.masks": 3,
    "evaluation.tokens": "none",
    "evaluation.draws": 200,
    "checkpoint_every": 5,
    "log_every": 5,
}
# ours: the paper has no volumes.
SMALL_3D = {key: value for key, value in SMALL.items() if key != "data.normalise"} | {
    "data.size": (32, 32, 8),
    "model.channels": 2,
    "model.patch": (4, 4, 2),
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 4,
    "model.decoder_width": 48,
    "model.decoder_heads": 2,
    "train.steps": 950,
    "train.batch": 16,
    "evaluation.window": (3, 3, 3),
    "evaluation.pool": (2, 2, 1),
    "evaluation.scales": (0.3, 0.4, 0.3),
}
PHANTOM_3D = SMALL_3D | {
    "data.phantom": "breast",
    "data.region": "",
    "data.normal_crops_only": False,
    "data.least_region": 0.0,
    "data.normalise": "crop",
}
PRESETS = {
    "paper": PAPER,
    "paper_colour": PAPER | COLOUR,
    "small": SMALL,
    "small_colour": SMALL | COLOUR,
    "phantom": PHANTOM,
    "smoke": SMOKE,
    "small3d": SMALL_3D,
    "phantom3d": PHANTOM_3D,
}


def get_config(preset: str = "phantom") -> ConfigDict:
    """The recipe of a preset; `paper` as published, but for the maps' mean over masks."""
    return recipe.preset("memmc_mae", PRESETS, preset)
