"""MAEMI: a 3D masked autoencoder of healthy breasts, for anomalies in MRI without contrast agent.

Lang, Schwartz, Heitzer et al., 2023, arXiv 2303.05861.
Expected (Duke-Breast-Cancer-MRI, 100 test patients, voxels of the breast): AUROC 0.732, AP 0.081 (chance 0.046);
subtraction images 0.705 / 0.127. The paper's figures need its data; ours are in benchmarks/results.

  python -m jmae.train --config configs/maemi.py                                            phantoms, 2 cores, 6 min
  python -m jmae.train --config configs/maemi.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 min
  python -m jmae.train --config configs/maemi.py:paper --config.data.manifest=MANIFEST.csv  the paper's numbers, 1 GPU
"""

from ml_collections import ConfigDict


def get_config(preset: str = "phantom") -> ConfigDict:
    """`paper` as published; the others change what their block says."""
    c = ConfigDict()
    c.system = "maemi"
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
    c.data.size = (240, 168, 8)  # voxels of a crop and of a window
    c.data.channels = 2  # without and with fat saturation
    c.data.axes = "PLS"  # the axes' directions; "": the file's own axes
    c.data.spacing = (0.75, 0.75, 1.0)  # mm; (): the file's own
    c.data.join = "resample"  # "same": sequences on different grids are refused
    c.data.crop = "region"  # the chest around the region; "none": the whole volume
    c.data.crop_least, c.data.crop_most = (200.0, 200.0, 50.0), (350.0, 350.0, 100.0)  # mm
    c.data.crop_margin = 20.0  # mm around a lesion that sticks out of the chest box, of training volumes
    c.data.widen_test_crops = False  # of test volumes too, as published: then what is scored depends on its label
    c.data.region = ""  # "nonzero": of rows that name none, the voxels that are not 0
    c.data.normalise = "crop"  # moments over the crop; "region": over the region
    c.data.mean, c.data.std = 0.5, 0.25
    c.data.clip = (0.001, 1.5)
    c.data.flips = (0, 1)  # axes, each mirrored with probability 1/2
    c.data.normal_crops_only = False  # abnormal training rows with a mask: only crops that touch no lesion
    c.data.allow_leaks = False  # True: patients and images in two splits are told, in the report too
    c.data.least_region = 0.0  # share of a training crop that lies in the region
    c.data.crops_on = "auto"  # "device" where the set fits in its memory, else "host": the same crops

    c.model = ConfigDict()  # ViT-B, decoder 384 x 4
    c.model.weights = ""  # a masked autoencoder's checkpoint, or the folder of an earlier run
    c.model.weights_part = "blocks"  # "blocks": the encoder's transformer blocks; "encoder"; "mae"
    c.model.weights_adapt = False  # resize what has another shape
    c.model.patch = (8, 8, 2)
    c.model.width, c.model.depth, c.model.heads = 768, 12, 12
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 384, 4, 16
    c.model.dtype = "auto"  # bfloat16 on accelerators, float32 on the CPU
    c.model.remat = False

    c.train = ConfigDict()
    c.train.steps, c.train.epochs = 0, 1000
    c.train.batch = 6
    c.train.mask_ratio = 0.90  # 251 of 2520 tokens stay visible
    c.train.lr, c.train.lr_least = 1e-3, 1e-4
    c.train.warmup = 7 / 1000
    c.train.betas, c.train.decay = (0.9, 0.95), 0.05

    c.compat = ConfigDict()  # defects of the released code
    c.compat.position = False  # permuted position codes
    c.compat.averaging = False  # voxels under few windows weigh more
    c.compat.clip = False  # test images are not clipped

    c.checkpoint_every = 5000  # steps
    c.log_every = 10  # steps
    c.tensorboard = False
    c.select = "last"  # weights scored; "aucp": of the highest AUROC of unlabelled rows against known normals
    c.select_every, c.select_samples = 250, 200  # of aucp: steps; rows of either kind, at most
    c.evaluation = ConfigDict()
    c.evaluation.stride = (64, 42, 2)  # voxels
    c.evaluation.repeats = 6  # sweeps over all windows, each with new masks
    c.evaluation.mask_ratio = 0.90
    c.evaluation.filter = (3, 3, 2)  # voxels of the minimum filter
    c.evaluation.error = "all"  # tokens; "hidden" (ours): only those hidden, as a visible token's output is not trained
    c.evaluation.top = 0.01  # ours: a case's score is the mean of this share of its highest voxels in the region
    c.evaluation.batch = 64  # windows at a time; fewer where the memory is too small
    c.evaluation.subsets = ()  # manifest columns; rows with another value than 0 or empty are scored apart too
    c.evaluation.maps = True  # write the maps of the split
    c.evaluation.reconstruction = False  # write the reconstructions too
    c.evaluation.draws = 2000  # of patients, for the intervals
    c.evaluation.alarm_rate = 0.05  # false alarms at the threshold of calibration.json
    c.evaluation.convergence = 0  # 2 or more: score that often at 1, 2, 4, ... repeats, to tell how many are enough

    if preset == "paper":
        return c
    if preset not in ("phantom", "smoke", "small"):
        raise ValueError(f"preset {preset!r} is unknown: phantom, smoke, small or paper")

    # ours: a small network trained from nothing on 2 cores, so fixed steps, small crops and patches and a higher rate;
    # standardised over the region, as the air around it differs in size; errors of hidden tokens alone; for voxels of 2
    # to 3 mm (`data.spacing`), of which the paper's filter of 2 mm is one: below 1 mm set evaluation.filter=3,3,2.
    # Figures: benchmarks/results/maemi.json.
    c.data.size, c.data.spacing, c.data.join = (32, 32, 8), (), "same"
    c.data.crop, c.data.region, c.data.normalise = "none", "nonzero", "region"
    c.data.normal_crops_only, c.data.least_region = True, 0.5
    c.model.patch = (4, 4, 2)
    c.model.width, c.model.depth, c.model.heads = 96, 4, 4
    c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads = 48, 2, 2
    c.train.steps, c.train.epochs, c.train.batch, c.train.lr = 4000, 0, 16, 2e-3
    c.evaluation.stride, c.evaluation.repeats, c.evaluation.filter = (16, 16, 4), 2, (1, 1, 1)
    c.evaluation.error, c.evaluation.batch, c.checkpoint_every = "hidden", 16, 500
    if preset in ("phantom", "smoke"):
        # 64 of 256 tokens visible, as learning from 25 takes longer than five minutes.
        c.data.phantom = "breast"
        c.data.region, c.data.normal_crops_only, c.data.least_region = "", False, 0.0
        c.data.normalise = "crop"
        c.train.steps, c.train.mask_ratio, c.evaluation.mask_ratio = 2200, 0.75, 0.75
        c.evaluation.stride, c.evaluation.repeats = (16, 8, 4), 6
    if preset == "smoke":
        c.data.size, c.model.patch = (32, 24, 4), (8, 8, 2)
        c.model.width, c.model.depth = 48, 2
        c.model.decoder_width, c.model.decoder_depth = 24, 1
        c.train.steps, c.train.batch = 20, 8
        c.evaluation.stride, c.evaluation.repeats = (16, 16, 4), 1
        c.checkpoint_every = 5
        c.log_every = 5
        c.evaluation.draws = 200
    return c
