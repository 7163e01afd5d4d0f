"""MemMC-MAE: a masked autoencoder with memory slots in its encoder and a decoder that attends to all encoder levels.

Tian, Pang, Liu et al., MLMI 2023, arXiv 2203.11725.
Expected: Covid-X image AUROC 0.917 (plain MAE 0.799, with memory 0.862), Hyper-Kvasir AUROC 0.972, IoU 0.419. The
paper's figures need its data; ours are in benchmarks/results.

  python -m jmae.train --config configs/memmc_mae.py                                            phantoms, 6 minutes
  python -m jmae.train --config configs/memmc_mae.py:small --config.data.manifest=MANIFEST.csv  own data, 15 minutes
  python -m jmae.train --config configs/memmc_mae.py:paper --config.data.manifest=MANIFEST.csv  the paper's, one GPU
  the same in 3D: phantom3d, small3d; minutes on two cores

The paper's ablation: plain MAE --config.model.memory=0 --config.model.mc_decoder=False --config.model.long_skips=False.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "phantom") -> ConfigDict:
    """`paper` as published; the others change what their block says. Marked [D]: the paper leaves it open."""
    c = ConfigDict()
    c.system = "memmc_mae"
    c.seed = 0
    c.replicates = 1  # seeds seed, seed + 1, ... trained as one program
    c.budget = 1.0  # multiplies steps and epochs
    c.fsdp = 1  # devices that share one copy of the parameters and of the optimiser's state
    c.accumulate = 1  # parts of a batch, one after the other, where a whole one does not fit in memory
    c.steps_per_dispatch = 0  # steps that one program runs; 0: several where batches are small, on a CPU one

    c.data = ConfigDict()
    c.data.manifest = ""
    c.data.calibration = 0.0  # share of the train patients kept apart as normals of val, for p-values
    c.data.phantom = ""
    c.data.size = (224, 224)  # pixels [D]
    c.data.channels = 1  # as read; 1 makes colour images grey, and the network repeats them; 3 keeps colour
    c.data.normalise = "fixed"  # "fixed": (x - mean) / std; "image": each image's own mean and deviation
    c.data.mean, c.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's [D]
    c.data.crop_scale = (0.2, 1.0)  # area of the random resized crop [D]; ours: of the image at `size`; (): none
    c.data.flips = ()  # axes, each mirrored with probability 1/2: none, as the paper lists none
    c.data.normal_crops_only = False
    c.data.allow_leaks = False  # True: patients and images in two splits are told, in the report too

    c.model = ConfigDict()  # ViT-B/16, decoder 512 x 8
    c.model.patch = (16, 16)
    c.model.channels = 3
    c.model.width, c.model.depth, c.model.heads = 768, 12, 12
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 512, 8, 16  # [D]: the MAE's
    c.model.memory = 40  # slots of each encoder block [D]; 0: plain attention
    c.model.mc_decoder = True  # the multi-level decoder; False: the MAE's
    c.model.gate = "channel"  # gates of a level: a number a channel and token [D]; "token": a number a token
    c.model.mc_norm = True  # the sum over levels is divided by the root of their number [D]
    c.model.long_skips = True  # block i is added to the input of block depth - 1 - i [D], in encoder and decoder
    c.model.dtype = "auto"  # bfloat16 on accelerators, float32 on the CPU
    c.model.remat = False  # compute activations again in the backward pass: less memory

    c.train = ConfigDict()
    c.train.steps, c.train.epochs = 0, 2000
    c.train.batch = 256
    c.train.mask_ratio = 0.75  # 49 of 196 patches stay visible
    c.train.lr = 1.5e-3  # the paper's, ten times the MAE's: if the loss diverges, 1.5e-4
    c.train.warmup = 5 / 2000  # share of the steps
    c.train.betas, c.train.decay = (0.9, 0.95), 0.05
    c.train.clip = 0.0  # greatest norm of the gradient; 0: any

    c.checkpoint_every = 5000  # steps
    c.log_every = 10  # steps
    c.tensorboard = False
    c.select = "last"  # weights scored; "aucp": of the highest AUROC of unlabelled rows against known normals
    c.select_every, c.select_samples = 250, 200  # of aucp: steps; rows of either kind, at most
    c.evaluation = ConfigDict()
    c.evaluation.score = "ms_ssim"  # primary: or "ms_ssim_patches" (of an image the same), "mse", "ms_ssim_product"
    c.evaluation.masks = 10  # a test image
    c.evaluation.mask_ratio = 0.75
    c.evaluation.paste = True  # visible patches as they are [D]; False: raw decoder output everywhere
    c.evaluation.window, c.evaluation.sigma = (11, 11), 1.5  # pixels; IGD's [D]
    c.evaluation.scales = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights, the finest scale first
    c.evaluation.pool = (2, 2)  # pixels of one of the next scale
    c.evaluation.l1_weight = 0.0  # share of the absolute error in the map; IGD: 0.15
    c.evaluation.iou = 95.0  # percentile of the pixels of val's normals at which lesions are outlined; 0: no IoU
    c.evaluation.batch = 16
    c.evaluation.chunk = 0  # masks at a time; 0: as many as the memory holds
    c.evaluation.subsets = ()  # manifest columns; rows with another value than 0 or empty are scored apart too
    c.evaluation.maps = True  # write the maps of the split
    c.evaluation.draws = 2000  # of patients, for the intervals
    c.evaluation.alarm_rate = 0.05  # false alarms at the threshold of calibration.json
    c.evaluation.convergence = 0  # 2 or more: score that often at 1, 2, 4, ... masks, to tell how many are enough

    if preset == "paper":
        return c
    if preset not in ("phantom", "smoke", "small", "phantom3d", "small3d"):
        raise ValueError(f"preset {preset!r} is unknown: phantom, smoke, small, phantom3d, small3d or paper")

    # ours: a small network on small images and fixed steps for 2 cores; images standardised one by one, since exposure
    # differs within a set; no crops and a window of 7 over three scales (of what was tried on the phantoms' `val`).
    c.data.size, c.model.patch, c.model.channels = (96, 96), (12, 12), 1
    c.data.normalise, c.data.crop_scale = "image", ()
    c.model.width, c.model.depth, c.model.heads = 192, 6, 6
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 96, 2, 4
    c.train.steps, c.train.epochs, c.train.batch, c.train.warmup = 2000, 0, 32, 0.05
    c.evaluation.window, c.evaluation.scales = (7, 7), (0.2, 0.4, 0.4)
    c.checkpoint_every = 500
    if preset in ("phantom", "smoke"):
        c.data.phantom = "chest"
        c.data.size, c.model.patch = (64, 64), (8, 8)
        c.model.width, c.model.depth, c.model.heads = 128, 4, 4
        c.model.decoder_width = 64
    if preset in ("phantom3d", "small3d"):
        c.data.size, c.data.channels, c.model.channels = (32, 32, 8), 2, 2
        c.data.axes, c.data.spacing, c.data.join = "PLS", (), "same"
        c.data.crop, c.data.region, c.data.normalise = "none", "nonzero", "region"
        c.data.crop_least, c.data.crop_most, c.data.crop_margin = (), (), 0.0
        c.data.widen_test_crops = False
        with c.data.ignore_type():
            c.data.mean, c.data.std = 0.5, 0.25
        c.data.clip, c.data.flips = (0.001, 1.5), (0, 1)
        c.data.normal_crops_only, c.data.least_region, c.data.crops_on = True, 0.5, "auto"
        c.model.patch = (4, 4, 2)
        c.model.width, c.model.depth, c.model.heads = 96, 4, 4
        c.model.decoder_width, c.model.decoder_heads = 48, 2
        c.train.steps, c.train.batch = 950, 16
        c.evaluation.stride, c.evaluation.top = (16, 16, 4), 0.01
        c.evaluation.window, c.evaluation.pool = (3, 3, 3), (2, 2, 1)
        c.evaluation.scales = (0.3, 0.4, 0.3)
        c.evaluation.filter, c.evaluation.reconstruction = (1, 1, 1), False
        c.evaluation.iou = 0.0
    if preset == "phantom3d":
        c.data.phantom = "breast"
        c.data.region, c.data.normal_crops_only, c.data.least_region, c.data.normalise = "", False, 0.0, "crop"
    if preset == "smoke":
        c.data.size = (32, 32)
        c.model.width, c.model.depth, c.model.heads, c.model.memory = 48, 3, 3, 4
        c.model.decoder_width, c.model.decoder_depth = 32, 1
        c.train.steps, c.train.batch = 20, 8
        c.evaluation.masks = 3
        c.checkpoint_every, c.log_every = 5, 5
        c.evaluation.draws = 200
    return c
