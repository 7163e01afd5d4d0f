"""AMAE: adaptation of a pre-trained masked autoencoder to normal and unlabelled chest X-rays.

Bozorgtabar, Mahapatra, Thiran, MICCAI 2023, arXiv 2307.12721.
Expected (RSNA, anomaly ratio 60 %, four seeds): Stage 1 AUROC 86.8 / AP 84.9, Stage 2 AUROC 91.4 / AP 91.7 (Table 1).
The paper's figures need its data and the chest X-ray checkpoint; ours are in benchmarks/results.

  python -m jmae.train --config configs/amae.py                                            phantoms, 2 cores, 6 minutes
  python -m jmae.train --config configs/amae.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 minutes
  python -m jmae.train --config configs/amae.py:paper --config.data.manifest=MANIFEST.csv  the paper's numbers, one GPU

Variants (`--config.variant=`): stage2, stage1, mask_rec, no_pseudo, mae: see jmae/systems/amae.py.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "phantom") -> ConfigDict:
    """`paper` as published; the others change what their block says."""
    c = ConfigDict()
    c.system = "amae"
    c.variant = "stage2"
    c.seed = 0
    c.replicates = 1  # seeds seed, seed + 1, ... trained as one program; the paper reports 4
    c.budget = 1.0  # multiplies steps and epochs of every stage
    c.fsdp = 1  # devices that share one copy of the parameters and of the optimiser's state
    c.accumulate = 1  # parts of a batch of `pretrain` and `adapt`, one after the other, where a whole one does not fit
    c.steps_per_dispatch = 0  # steps that one program runs; 0: several where batches are small, on a CPU one

    c.data = ConfigDict()
    c.data.manifest = ""
    c.data.calibration = 0.0  # share of the train patients kept apart as normals of val, for p-values
    c.data.phantom = ""
    c.data.size = (224, 224)  # pixels
    c.data.channels = 1  # as read; the network repeats a grey image
    c.data.normalise = "fixed"  # "fixed": (x - mean) / std; "image": each image's own mean and deviation
    c.data.mean, c.data.std = 0.5056, 0.252  # medical_mae's for NIH
    c.data.crop_scale = (0.5, 1.0)  # area of the random resized crop
    c.data.normal_crops_only = False
    c.data.allow_leaks = False  # True: patients and images in two splits are told, in the report too
    c.data.anomaly_ratio = -1.0  # >= 0: share of abnormal images in the unlabelled set, by data.unlabeled_labels
    c.data.unlabeled_size = 0  # images in the unlabelled set then; 0: all
    c.data.unlabeled_labels = ""  # CSV id,label of the unlabelled rows: for that sweep only, never for training

    c.model = ConfigDict()  # ViT-S/16, decoder 512 x 2
    c.model.weights = ""  # a masked autoencoder's checkpoint, or the folder of an earlier run: instead of Stage 0
    c.model.weights_adapt = False  # resize what has another shape
    c.model.patch = (16, 16)
    c.model.channels = 3
    c.model.width, c.model.depth, c.model.heads = 384, 12, 6
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 512, 2, 16
    c.model.dtype = "auto"  # bfloat16 on accelerators, float32 on the CPU
    c.model.remat = False

    c.pretrain = ConfigDict()  # Stage 0: medical_mae's pre-training recipe
    c.pretrain.steps, c.pretrain.epochs = 0, 800
    c.pretrain.batch = 2048
    c.pretrain.masks, c.pretrain.mask_ratio = 1, 0.90
    c.pretrain.lr, c.pretrain.lr_is_base, c.pretrain.lr_least = 1.5e-4, True, 0.0  # base: times batch / 256
    c.pretrain.warmup = 0.05  # share of the steps: 40 of 800 epochs
    c.pretrain.betas, c.pretrain.decay = (0.9, 0.95), 0.05
    c.pretrain.augment = True

    c.proxy = ConfigDict()  # Stage 1
    c.proxy.steps, c.proxy.epochs = 0, 150
    c.proxy.batch = 16
    c.proxy.head = (512, 128)
    c.proxy.lr, c.proxy.lr_least = 2.5e-4, 1e-5
    c.proxy.warmup = 20 / 150
    c.proxy.betas, c.proxy.decay = (0.9, 0.999), 0.05
    c.proxy.area, c.proxy.aspect = (0.02, 0.15), (0.3, 1 / 0.3)  # AnatPaste: share of the image, height to width
    c.proxy.fill, c.proxy.blur = (150, 254), (0, 14)  # of 255; pixels at 256 x 256
    c.proxy.margin, c.proxy.jitter = 10, 0.1  # pixels at 256 x 256; brightness and contrast

    c.adapt = ConfigDict()  # Stage 2, modules A and B alike
    c.adapt.steps, c.adapt.epochs = 0, 150
    c.adapt.batch = 16
    c.adapt.masks, c.adapt.mask_ratio = 2, 0.75  # 49 of 196 patches stay visible
    c.adapt.lr, c.adapt.lr_is_base, c.adapt.lr_least = 2.5e-4, False, 0.0
    c.adapt.warmup = 20 / 150
    c.adapt.betas, c.adapt.decay = (0.9, 0.95), 0.05
    c.adapt.augment = True
    c.adapt.percentile, c.adapt.percentile_over = 50.0, "class"

    c.checkpoint_every = 500  # steps
    c.log_every = 10  # steps
    c.tensorboard = False
    c.select = "last"  # weights scored; "aucp": of the highest AUROC of unlabelled rows against known normals
    c.select_every, c.select_samples = 250, 200  # of aucp: steps; rows of either kind, at most
    c.evaluation = ConfigDict()
    c.evaluation.masks = 4  # a test image, the same for modules A and B
    c.evaluation.discrepancy = "reconstruction"  # the primary score: Eq. 4; "error" (ours): error of A less error of B
    c.evaluation.paste = True  # visible patches as they are; False: raw decoder output everywhere
    c.evaluation.batch = 16
    c.evaluation.chunk = 0  # masks at a time; 0: as many as the memory holds
    c.evaluation.subsets = ()  # manifest columns; rows with another value than 0 or empty are scored apart too
    c.evaluation.maps = True  # write the maps of the split
    c.evaluation.draws = 2000  # of patients, for the intervals
    c.evaluation.alarm_rate = 0.05  # false alarms at the threshold of calibration.json
    c.evaluation.convergence = 0  # 2 or more: score that often at 1, 2, 4, ... masks, to tell how many are enough

    if preset == "paper":
        return c
    if preset not in ("phantom", "smoke", "small"):
        raise ValueError(f"preset {preset!r} is unknown: phantom, smoke, small or paper")

    # ours: a small network trained from nothing on 2 cores, so fixed steps and higher rates; images standardised one by
    # one, since exposure differs within a set and no checkpoint's statistics have to be met; mask ratio 0.75 before
    # adaptation too, since 0.9 leaves 6 of 64 patches; the signed discrepancy (jmae/systems/amae.py, `score`).
    c.data.normalise = "image"
    c.data.size, c.model.patch, c.model.channels = (96, 96), (12, 12), 1
    c.model.width, c.model.depth, c.model.heads = 192, 6, 6
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 128, 2, 4
    c.pretrain.steps, c.pretrain.epochs, c.pretrain.batch, c.pretrain.mask_ratio = 2000, 0, 32, 0.75
    c.pretrain.lr, c.pretrain.lr_is_base = 1e-3, False
    c.proxy.steps, c.proxy.epochs, c.proxy.batch, c.proxy.lr = 800, 0, 32, 2e-3
    c.adapt.steps, c.adapt.epochs, c.adapt.lr = 800, 0, 1e-3
    c.evaluation.discrepancy, c.evaluation.masks = "error", 32  # masks: less noise in the score
    if preset in ("phantom", "smoke"):
        c.data.phantom = "chest"
        c.data.size, c.model.patch = (64, 64), (8, 8)
        c.model.width, c.model.depth, c.model.heads = 128, 4, 4
        c.model.decoder_width, c.model.decoder_heads = 64, 4
        c.pretrain.steps, c.proxy.steps, c.adapt.steps = 1200, 500, 1500
    if preset == "smoke":
        c.model.width, c.model.depth, c.model.heads = 48, 2, 3
        c.model.patch = (16, 16)
        c.model.decoder_width, c.model.decoder_depth = 32, 1
        c.pretrain.steps, c.proxy.steps, c.adapt.steps = 20, 10, 10
        c.adapt.percentile_over = "all"  # so short a proxy task may predict one class alone
        c.checkpoint_every = 5
        c.log_every = 5
        c.evaluation.draws, c.evaluation.masks = 200, 4
    return c
