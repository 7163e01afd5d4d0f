"""P-PII: a segmentation network trained on probabilistic Poisson image interpolations of normal images.

Müller, Baugh, Tan, Dombrowski, Kainz, "Confidence-Aware and Self-Supervised Image Anomaly Localisation", UNSURE 2023,
arXiv 2303.13227. Expected (pixel AUROC, Table 1): JSRT .90, DeepLesion .74, LIDC .69 with the U-Net.
Ours are in benchmarks/results.

  python -m jmae.train --config configs/ppii.py                                            phantoms, 2 cores, 6 minutes
  python -m jmae.train --config configs/ppii.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 minutes
  python -m jmae.train --config configs/ppii.py:paper --config.data.manifest=MANIFEST.csv  the paper's numbers, one GPU
  the same in 3D: phantom3d, small3d

Variants (`--config.variant=`): paper, released (the authors' file), jmae (ours), and the tasks pii, fpi, cutpaste, nsa.
Backbones (`--config.model.backbone=`): unet; mc_unet and phiseg take longer: 6 minutes with budget=0.7 and 0.45.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "phantom") -> ConfigDict:
    """`paper` as published; the others change what their block says."""
    c = ConfigDict()
    c.system = "ppii"
    c.variant = "paper"
    c.select = "dice"  # weights of the best Dice on synthetic anomalies; "last"; "aucp": the AUROC of unlabelled rows
    c.select_every, c.select_samples = 250, 200  # of aucp: steps; rows of either kind, at most
    c.seed = 0
    c.replicates = 1  # seeds seed, seed + 1, ... trained as one program
    c.budget = 1.0  # multiplies steps and epochs
    c.fsdp = 1  # devices that share one copy of the parameters and of the optimiser's state
    c.accumulate = 1  # no other: batch norm is of the whole batch
    c.steps_per_dispatch = 0  # steps that one program runs; 0: several where batches are small, on a CPU one

    c.data = ConfigDict()
    c.data.manifest = ""
    c.data.calibration = 0.0  # share of the train patients kept apart as normals of val, for p-values
    c.data.phantom = ""
    c.data.size = (512, 512)  # pixels
    c.data.channels = 1
    c.data.window = ()  # stored values that become 0 and 1, all others clipped; CT in HU: -1024,3071
    c.data.equalise = True  # an even histogram of 256 levels, image by image
    c.data.normal_crops_only = False
    c.data.allow_leaks = False  # True: patients and images in two splits are told, in the report too

    c.model = ConfigDict()
    c.model.backbone = "unet"
    c.model.widths = (32, 64, 128, 192, 192)  # channels of a level; phiseg has two more levels of the last
    c.model.base = 32  # channels of the last layers
    c.model.dropout = 0.1  # of mc_unet, after the last convolution of each level
    c.model.latent_levels, c.model.latent = 5, 2  # of phiseg
    c.model.remat = False  # compute activations again in the backward pass: less memory
    c.model.dtype = "auto"  # bfloat16 on accelerators, float32 on the CPU

    c.anomaly = ConfigDict()
    c.anomaly.patch = (0.05, 0.2)  # edges, shares of the image's
    c.anomaly.half = (0.05, 0.2)  # half edges of pii's and fpi's squares, shares of the shortest side
    c.anomaly.core = 0.8  # share of each axis, in the middle, in which the patches' centres lie in the source
    c.anomaly.shape = "circular"  # "elliptic", "rectangular"
    c.anomaly.source = "other"  # image of the batch; "self": the image itself
    # Least and most anomalies an image and raters an anomaly, factors of the source's gradients (jmae: times the number
    # of anomalies), and the factor of the target |x - x'|. The paper gives no strength: 2 to 5 is ours.
    numbers = lambda anomalies, strength, gain: dict(anomalies=anomalies, raters=(1, 9), strength=strength, gain=gain)
    c.anomaly.paper = ConfigDict(numbers((1, 10), (2.0, 5.0), 1.0))
    c.anomaly.released = ConfigDict(numbers((10, 19), (10.0, 19.0), 10.0))
    c.anomaly.jmae = ConfigDict(numbers((1, 10), (0.53, 1.9), 10.0))

    c.train = ConfigDict()
    c.train.steps, c.train.epochs = 100_000, 0
    c.train.batch = 16
    c.train.loss = "cross_entropy"  # with soft targets; "mse"
    c.train.variance_weight = 0.0  # ours: a pixel's loss is divided by 1 + this times the raters' variance
    c.train.lr = 1e-3
    c.train.betas = (0.9, 0.999)
    c.train.scaling = 0.0  # share of the side that a random square crop loses at most: 120 / 512 in Table 2
    c.train.rotation = 0.0  # degrees at most: 10
    c.train.elastic = 0.0  # deviation of a 3 x 3 grid's displacements, share of the side: 10 / 512
    c.train.flips = ()  # ours: axes, each mirrored with probability 1/2
    c.train.held_out = 0.1  # share of the patients kept for the best Dice
    c.train.dice_at = 0.0  # threshold of prediction and target; ours: 0, none, as |x - x'| hardly ever reaches 0.5
    c.train.validate_every, c.train.validation_samples = 500, 100  # steps; synthetic samples

    c.checkpoint_every = 5000  # steps
    c.log_every = 10  # steps
    c.tensorboard = False
    c.evaluation = ConfigDict()
    c.evaluation.samples = 50  # of mc_unet and phiseg
    c.evaluation.batch = 16
    c.evaluation.chunk = 0  # samples at a time; 0: as many as the memory holds
    c.evaluation.froc = 10.0  # false positives an image at which the sensitivity for lesions is reported; 0: not at all
    c.evaluation.subsets = ()  # manifest columns; rows with another value than 0 or empty are scored apart too
    c.evaluation.maps = True  # write the maps of the split
    c.evaluation.draws = 2000  # of patients, for the intervals
    c.evaluation.alarm_rate = 0.05  # false alarms at the threshold of calibration.json
    c.evaluation.convergence = 0  # 2 or more: score that often at 1, 2, 4, ... samples, to tell how many are enough

    if preset == "paper":
        return c
    if preset not in ("phantom", "smoke", "small", "phantom3d", "small3d"):
        raise ValueError(f"preset {preset!r} is unknown: phantom, smoke, small, phantom3d, small3d or paper")

    # ours: a narrow network on small images and fixed steps for 2 cores; fewer, larger patches of lower strength than
    # the paper's: 5 % of a small side is no lesion, and steep gradients are told without looking at anatomy.
    c.data.size = (64, 64)
    c.model.widths, c.model.base = (8, 16, 32, 32), 8
    c.model.latent_levels = 4
    c.anomaly.patch, c.anomaly.half = (0.2, 0.8), (0.1, 0.4)
    c.anomaly.paper.anomalies, c.anomaly.paper.strength = (1, 4), (1.0, 2.0)
    c.train.steps, c.train.batch = 1200, 16
    c.train.validate_every, c.checkpoint_every = 400, 400
    c.evaluation.samples = 20
    if preset in ("phantom", "smoke"):
        # ours: the soft composites of `jmae` on images that are not equalised find the phantoms' soft lesions best (of
        # what was tried on their `val`); `paper` is one flag away.
        c.data.phantom, c.variant, c.data.equalise = "chest", "jmae", False
        c.anomaly.patch = (0.3, 0.9)
    if preset == "smoke":
        c.data.size = (32, 32)
        c.model.widths, c.model.base, c.model.latent_levels = (4, 8, 8), 4, 3
        c.train.steps, c.train.batch = 20, 8
        c.train.validate_every, c.train.validation_samples, c.evaluation.samples = 10, 16, 3
        c.checkpoint_every, c.log_every = 5, 5
        c.evaluation.draws = 200
    if preset in ("phantom3d", "small3d"):
        c.data.size = (32, 32, 8)
        c.data.axes, c.data.spacing, c.data.join = "PLS", (), "same"
        c.data.crop, c.data.region, c.data.normalise = "none", "nonzero", "region"
        c.data.crop_least, c.data.crop_most, c.data.crop_margin = (), (), 0.0
        c.data.widen_test_crops, c.data.mean, c.data.std = False, 0.5, 0.25
        c.data.normal_crops_only, c.data.least_region, c.data.crops_on = True, 0.5, "auto"
        c.anomaly.patch = (0.2, 0.6)
        c.evaluation.stride, c.evaluation.top = (16, 16, 4), 0.01
        c.evaluation.reconstruction, c.evaluation.filter = False, (1, 1, 1)
    if preset == "phantom3d":
        c.data.phantom, c.data.channels = "breast", 2
        c.data.region, c.data.normal_crops_only, c.data.least_region, c.data.normalise = "", False, 0.0, "crop"
    return c
