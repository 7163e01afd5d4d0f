"""SimSID: inpainting from a memory of normal anatomy, a teacher and a student, a discriminator as the judge.

"Unsupervised anomaly detection using SimSID algorithm" (project report, Anna University, 2025), and the SimSID that it
simplifies: Xiang et al., TPAMI 2024, arXiv 2403.08689 (`--config.variant=official`).
Expected: the report prints no AUROC. Teacher's training MSE 0.0323 after 20 epochs and 0.0029 after 1000, student's
0.0099 after 20 and 0.0032 after 250.

  python -m jmae.train --config configs/simsid.py                                            phantoms, 2 cores, 6 min
  python -m jmae.train --config configs/simsid.py:small --config.data.manifest=MANIFEST.csv  own data, 2 cores, 15 min
  python -m jmae.train --config configs/simsid.py:paper --config.data.manifest=MANIFEST.csv  the report's numbers, 1 GPU
  phantoms in 3D: phantom3d
"""

from ml_collections import ConfigDict


def get_config(preset: str = "phantom") -> ConfigDict:
    """`paper` as published, and as decided where the report is silent; the others change what their block says."""
    c = ConfigDict()
    c.system = "simsid"
    c.variant = "report"  # "official": sections `joint` and `model.discriminator` instead of the others
    c.seed = 0
    c.select = "auroc"  # weights of the discriminator with the best AUROC on labelled val images; "last"; "aucp":
    # those of the highest AUROC of unlabelled rows against known normals
    c.replicates = 1  # seeds seed, seed + 1, ... trained as one program
    c.budget = 1.0  # multiplies steps and epochs
    c.fsdp = 1  # devices that share one copy of the parameters and of the optimiser's state
    c.accumulate = 1  # no other: batch norm and memory are of the whole batch
    c.steps_per_dispatch = 0  # steps that one program runs; 0: several where batches are small, on a CPU one

    c.data = ConfigDict()
    c.data.manifest = ""
    c.data.calibration = 0.0  # share of the train patients kept apart as normals of val, for p-values
    c.data.phantom = ""
    c.data.size = (128, 128)  # pixels
    c.data.channels = 1
    c.data.normalise = "unit"  # values in [0, 1] as stored; "image": each image's mean 0.5, its deviation 0.2
    c.data.normal_crops_only = False
    c.data.allow_leaks = False  # True: patients and images in two splits are told, in the report too

    c.model = ConfigDict()
    c.model.patch = (16, 16)  # the only square patch for which the report's layers fit each other
    c.model.widths = (32, 64, 128, 256)  # of the encoder, and backwards of the generators; 2^4 divides the patch
    c.model.features = 64  # of a patch
    c.model.encoder = "joint"  # trained with the teacher; "frozen_random": as drawn, the listing to the letter
    c.model.inpainting = True  # False: the student gets the encoder's own features
    c.model.width, c.model.depth, c.model.heads, c.model.mlp = 64, 2, 8, 256  # inpainting transformer
    c.model.dropout = 0.1
    c.model.centre = "retrieved"  # the own token: from memory; "raw": the patch's features; "mask": a learned one
    c.model.sigmoid = False  # of the generators' images
    c.model.discriminator = (16, 32, 64, 128, 256)
    c.model.dtype = "auto"  # bfloat16 on accelerators, float32 on the CPU

    c.memory = ConfigDict()
    c.memory.levels = 3  # patches; and blocks of 2 x 2; and the whole image
    c.memory.slots = 1  # rows a place
    c.memory.threshold = 0.9  # cosine below which a row is written anew
    c.memory.ema = 0.0  # share of the way to the new value at every visit but the first; 0: rows are replaced
    c.memory.passes, c.memory.batch = 2, 16  # over the training images in order
    c.memory.top_k, c.memory.temperature = 5, 1.0
    c.memory.weighted = True  # the k rows by their weights; False: their plain sum
    c.memory.restrict = False  # True: only the rows of the patch's own place

    stage = lambda epochs: ConfigDict(dict(steps=0, epochs=epochs, batch=16, lr=1e-4, betas=(0.5, 0.999)))
    c.teacher = stage(1000)
    c.student = stage(250)
    c.student.distillation, c.student.adversarial = 0.1, 0.0  # weights beside the MSE
    c.student.kept = 1.0  # share of the patches that are inpainted in training; 0.95 in SQUID
    c.student.from_teacher = False  # start from the teacher's generator
    c.discriminator = stage(100)

    c.joint = stage(600)  # official
    c.joint.windows = (2, 2)
    c.joint.widths = (32, 64, 128, 256, 512)  # levels, from the first to the bottleneck
    c.joint.joined = 2  # decoder levels with skips and memories; the windows are put together after them
    c.joint.slots, c.joint.top_k, c.joint.heads = 200, 5, 8
    c.joint.kept = 0.9  # share of the cells that are inpainted in training
    c.joint.critic = 2  # steps of the discriminator for one of the others
    c.joint.lr_least, c.joint.cosine, c.joint.decay = 5e-5, 0.5, 1e-5  # cosine: share of the steps down to lr_least
    c.joint.translation, c.joint.scaling = 0.05, 0.05  # augmentation
    c.joint.weights = ConfigDict(
        dict(reconstruction=10.0, teacher=0.01, distillation=0.001, adversarial=0.005, discriminator=0.005)
    )

    c.validation = ConfigDict()  # MSE and KL of held-out training images, as the loss is of those trained on
    c.validation.held_out = 0.0  # share of the patients; 0: of training images
    c.validation.every, c.validation.samples = 640, 64  # steps; images
    c.validation.select_every = 64  # steps of the discriminator: an epoch of the report's; official: `every`

    c.checkpoint_every = 5000  # steps
    c.log_every = 64  # steps
    c.tensorboard = False
    c.select_every, c.select_samples = 250, 200  # of aucp: steps; rows of either kind, at most
    c.evaluation = ConfigDict()
    c.evaluation.score = "simsid"  # the primary one: "simsid", "difference" (discriminator), "l1", "mse", "patches"
    c.evaluation.patch = (16, 16)  # cells of "patches", the squares of their mean errors ...
    c.evaluation.top = 1.0  # ... and the share of them that its score averages, the highest ones
    c.evaluation.decision = "accuracy"  # largest on val at the threshold of the decision; "youden" (ours): sensitivity
    # and specificity together, for a val of few abnormal cases
    c.evaluation.batch = 16
    c.evaluation.subsets = ()  # manifest columns; rows with another value than 0 or empty are scored apart too
    c.evaluation.maps = True  # write the maps of the split
    c.evaluation.draws = 2000  # of patients, for the intervals
    c.evaluation.alarm_rate = 0.05  # false alarms at the threshold of calibration.json

    if preset == "paper":
        return c
    if preset not in ("phantom", "smoke", "small", "phantom3d"):
        raise ValueError(f"preset {preset!r} is unknown: phantom, smoke, small, phantom3d or paper")

    # ours: narrower networks on small images, fixed steps and a higher rate for 2 cores.
    c.data.size, c.data.normalise = (64, 64), "image"
    # Chosen by AUROC on val of the phantoms: with a teacher of 500 steps and a student of 300,
    # "patches" has 0.90, "mse" 0.86; centre="retrieved" 0.84 and 0.81, also with 16 rows of the patch's own place.
    c.evaluation.score, c.evaluation.patch, c.evaluation.top = "patches", (8, 8), 0.1
    c.model.centre, c.model.dropout, c.student.from_teacher = "raw", 0.0, True
    c.model.widths, c.model.discriminator = (16, 32, 64, 128), (8, 16, 32, 64, 128)
    c.joint.widths, c.joint.slots = (8, 16, 32, 64, 128), 100
    for section, steps in ((c.teacher, 2000), (c.student, 1500), (c.discriminator, 500), (c.joint, 1000)):
        section.steps, section.epochs, section.lr = steps, 0, 1e-3
    c.discriminator.lr = 2e-4
    c.joint.lr_least = 5e-4
    c.validation.held_out, c.validation.every = 0.1, 250
    c.checkpoint_every, c.log_every = 500, 10
    if preset in ("phantom", "smoke"):
        c.data.phantom = "chest"
    if preset == "smoke":
        c.data.size = (32, 32)
        c.model.patch, c.model.widths, c.model.features = (8, 8), (4, 8, 8), 16
        c.model.width, c.model.heads, c.model.mlp, c.model.depth = 16, 2, 32, 1
        c.model.discriminator = (4, 8, 8)
        c.joint.widths, c.joint.slots, c.joint.joined, c.joint.heads = (4, 8, 8), 10, 1, 2
        c.memory.batch = 64
        for section in (c.teacher, c.student, c.discriminator, c.joint):
            section.steps = 20
        c.validation.every, c.validation.select_every, c.validation.samples = 10, 10, 16
        c.checkpoint_every, c.log_every = 5, 5
        c.evaluation.draws = 200
    if preset == "phantom3d":
        c.select = "last"
        c.data.size = (32, 32, 8)
        c.data.axes, c.data.spacing, c.data.join = "PLS", (), "same"
        c.data.crop, c.data.region, c.data.normalise = "none", "", "crop"
        c.data.crop_least, c.data.crop_most, c.data.crop_margin = (), (), 0.0
        c.data.widen_test_crops, c.data.mean, c.data.std = False, 0.5, 0.25
        c.data.least_region, c.data.crops_on = 0.0, "auto"
        c.data.phantom, c.data.channels = "breast", 2
        c.model.patch, c.model.widths, c.model.discriminator = (8, 8, 8), (16, 32, 64), (8, 16, 32, 64)
        c.joint.windows, c.joint.widths = (2, 2, 1), (8, 16, 32, 64)
        c.evaluation.score = "l1"  # a window's own score is the same for all its voxels
        c.evaluation.stride, c.evaluation.top, c.evaluation.patch = (16, 16, 4), 0.01, (8, 8, 2)
        c.evaluation.reconstruction, c.evaluation.filter = False, (1, 1, 1)
    return c
