"""Keys of SimSID: of its score, of the published code, and of the report's method."""

from jmae.recipe import AXES, Key

SCORES = ("simsid", "difference", "l1", "mse", "patches")


def stage_keys(name: str, epochs: int) -> dict[str, Key]:
    """The keys that each trained stage has."""
    return {
        f"{name}.steps": Key(0, "Steps of the stage; 0: `epochs` counts.", "steps", least=0),
        f"{name}.epochs": Key(epochs, "Epochs of the stage; 0: `steps` counts.", "epochs", least=0),
        f"{name}.batch": Key(16, "Images a step.", least=1),
        f"{name}.lr": Key(1e-4, "Learning rate.", above=0),
        f"{name}.betas": Key((0.5, 0.999), "Decay rates of Adam's moments.", least=0, below=1, length=2),
    }


SCORE_KEYS = {
    "select": Key(
        "auroc",
        'Which weights judge: "auroc", those with the best AUROC on the labelled images of val; "last"; "aucp", those '
        "with the highest AUROC of unlabelled rows against known normals.",
        choices=("auroc", "last", "aucp"),
    ),
    "accumulate": Key(1, "1 alone: batch norm and memory are of the whole batch.", least=1),
    "checkpoint_every": Key(5000, "Steps between two checkpoints.", "steps", least=1),
    "log_every": Key(64, "Steps between two lines of metrics.jsonl.", "steps", least=1),
    "data.size": Key((128, 128), "Size of an image, or of a crop of a volume.", "pixels", least=1),
    "model.discriminator": Key((16, 32, 64, 128, 256), "Channels of the discriminator.", least=1),
    "model.dtype": Key(
        "auto",
        'Arithmetic of the networks; "auto": bfloat16 on accelerators, float32 on the CPU.',
        choices=("auto", "float32", "bfloat16"),
    ),
    "validation.held_out": Key(
        0.0, "Share of the training patients that is held out for checks; 0: training images.", least=0, below=1
    ),
    "validation.every": Key(640, "Steps between two checks.", "steps", least=1),
    "validation.samples": Key(64, "Images of a check.", least=1),
    "validation.select_every": Key(
        0, "Steps between two looks of select=auroc; 0: an epoch, as released.", "steps", least=0
    ),
    "evaluation.score": Key("simsid", "The primary score.", choices=SCORES),
    "evaluation.patch": Key((16, 16), 'Size of a cell of the score "patches".', "pixels", least=1, length=AXES),
    "evaluation.decision": Key(
        "accuracy",
        'Rule of the decision threshold on val; "youden", ours, suits a val of few abnormal cases.',
        choices=("youden", "accuracy"),
    ),
}

PUBLISHED_KEYS = {
    **stage_keys("joint", 600),
    "joint.windows": Key((2, 2), "Windows along each axis.", least=1, length=AXES),
    "joint.widths": Key((32, 64, 128, 256, 512), "Channels of the levels, from the first to the bottleneck.", least=1),
    "joint.joined": Key(2, "Decoder levels with skips and memories; the windows are joined after them.", least=1),
    "joint.slots": Key(200, "Rows of a window's memory; 0: no memory, features go on as they are.", least=0),
    "joint.queue": Key(
        False,
        "Whether the bottleneck's memory is a queue of the last training features, as for ZhangLab, not learned.",
    ),
    # The released hard shrinkage, of "top 5", zeroes the fifth weight too.
    "joint.top_k": Key(4, "Rows that a query retrieves.", least=1),
    "joint.heads": Key(8, "Attention heads of the bottleneck.", least=1),
    "joint.inpainting": Key(
        True, "Whether features are inpainted from the windows around; false: the window's own memory alone."
    ),
    "joint.norms": Key(
        "branch",
        'Norms of the bottleneck: "branch", before the read is added, as released; "sum", after it, as in earlier '
        "versions of this library.",
        choices=("branch", "sum"),
        before="sum",
    ),
    "joint.activation": Key(
        "tanh",
        'Last activation and range of images: "tanh", [-1, 1] (SimSID); "sigmoid", [0, 1] (SQUID).',
        choices=("tanh", "sigmoid"),
    ),
    "joint.kept": Key(0.9, "Share of the cells that are inpainted in training.", above=0, most=1),
    "joint.decoder_kept": Key(
        1.0, "Share of the cells that the decoder's memories replace in training; SQUID has 0.95.", above=0, most=1
    ),
    "joint.judge": Key(
        "image",
        'Statistics of the discriminator\'s norms when it judges: "image", of each image by itself, as released; '
        '"running", those of the training.',
        choices=("image", "running"),
        before="running",
    ),
    "joint.critic": Key(2, "Steps of the discriminator for one of the autoencoder.", "steps", least=1),
    "joint.lr_least": Key(5e-5, "Least learning rate of the autoencoder.", least=0),
    "joint.cosine": Key(0.5, "Share of the steps in which its learning rate falls to the least.", above=0),
    "joint.decay": Key(1e-5, "Weight decay of the autoencoder, a part of its gradient.", least=0),
    "joint.translation": Key(0.05, "Augmentation: largest move, a share of the edge.", least=0, below=1),
    "joint.scaling": Key(0.05, "Augmentation: largest change of scale.", least=0, below=1),
    "joint.tolerance": Key(
        0.0, "How far the AUROC of chosen weights may be below the best one so far.", least=0, below=1
    ),
    "joint.weights.reconstruction": Key(10.0, "Weight of the student decoder's MSE."),
    "joint.weights.teacher": Key(0.01, "Weight of the teacher decoder's MSE."),
    "joint.weights.distillation": Key(0.001, "Weight of the difference between the decoders' features."),
    "joint.weights.adversarial": Key(0.005, "Weight of the adversarial loss."),
    "joint.weights.discriminator": Key(0.005, "Weight of the discriminator's loss."),
}


def section_keys(name: str, epochs: int) -> dict[str, Key]:
    """The keys of a stage that gradients train; see `rate`."""
    falls = "ours: last share of the steps, in which the learning rate falls to 0."
    return {**stage_keys(name, epochs), f"{name}.cooldown": Key(0.0, falls, least=0, most=1)}


KEYS = {
    "variant": Key(
        "report",
        'The method: "report" has the sections teacher, memory, student and discriminator; "official" is the published '
        "code's, section joint.",
        choices=("report", "official"),
    ),
    **SCORE_KEYS,
    # The report's layers fit each other for no other square patch than 16.
    "model.patch": Key((16, 16), "Size of a patch, a multiple of 2 for each of model.widths.", least=1, length=AXES),
    "model.widths": Key((32, 64, 128, 256), "Channels of the encoder; the generators have them backwards.", least=1),
    "model.features": Key(64, "Features of a patch.", least=1),
    "model.weights": Key(
        "",
        "Released or converted weights of SimSID in place of the training (variant=official): a file, or the folder of "
        "model.pth and discriminator.pth.",
    ),
    "model.encoder": Key(
        "joint",
        'The encoder: "joint" is trained with the teacher; "frozen_random", as in the listing, stays random.',
        choices=("joint", "frozen_random"),
    ),
    "model.inpainting": Key(True, "Whether features are inpainted; false gives the student the encoder's features."),
    "model.width": Key(64, "Width of the inpainting transformer.", least=1),
    "model.depth": Key(2, "Layers of the inpainting transformer.", least=1),
    "model.heads": Key(8, "Attention heads of the inpainting transformer.", least=1),
    "model.mlp": Key(256, "Hidden units of the inpainting transformer's MLP.", least=1),
    "model.dropout": Key(0.1, "Dropout of the inpainting transformer.", least=0, below=1),
    "model.centre": Key(
        "retrieved",
        'Token at the inpainted place: "retrieved" from memory; "raw", the features of the patch; "mask", learned.',
        choices=("retrieved", "raw", "mask"),
    ),
    "model.sigmoid": Key(False, "Whether the generators' images go through a sigmoid."),
    "memory.levels": Key(
        3,
        "Levels of the memory: patches, blocks of 2 patches an axis, the image; 0: no memory, the transformer gets the "
        "features of the patches.",
        least=0,
        most=3,
    ),
    "memory.slots": Key(1, "Rows of a place.", least=1),
    "memory.threshold": Key(0.9, "Cosine similarity below which a row is replaced.", above=0, most=1),
    "memory.ema": Key(
        0.0, "Share of the way to the new value at every visit but the first; 0: rows are replaced.", least=0, below=1
    ),
    "memory.passes": Key(2, "Passes over the training images in order.", least=1),
    "memory.batch": Key(16, "Images a step of the memory stage.", least=1),
    "memory.top_k": Key(5, "Rows that a patch retrieves from a level.", least=1),
    "memory.temperature": Key(1.0, "Temperature of the retrieval's softmax.", above=0),
    "memory.weighted": Key(True, "Whether the rows are summed by their weights; false: their plain sum."),
    "memory.restrict": Key(False, "Whether a patch retrieves from the rows of its own place alone."),
    **section_keys("teacher", 1000),
    **section_keys("student", 251),  # the report's last epoch has the number 250, its first one 0
    "student.distillation": Key(0.1, "Weight of the distillation beside the MSE.", least=0),
    "student.adversarial": Key(0.0, "Weight of the adversarial loss beside the MSE.", least=0),
    "student.kept": Key(1.0, "Share of the patches that are inpainted in training; SQUID has 0.95.", above=0, most=1),
    "student.from_teacher": Key(False, "Whether the student's generator starts as the teacher's."),
    **section_keys("discriminator", 100),
    **PUBLISHED_KEYS,
}

IMAGE_KEYS = {
    "data.normalise": Key(
        "unit",
        '"unit" leaves values in [0, 1] as they are; "image" gives each image mean 0.5 and deviation 0.2; "auto": '
        '"unit" with variant=official, whose tanh reaches no other values, and "image" otherwise.',
        choices=("unit", "image", "auto"),
    ),
    "evaluation.top": Key(1.0, 'Share of the cells, the highest, that the score "patches" averages.', above=0, most=1),
}

VOLUME_KEYS = {
    "select": Key(
        "last",
        'Which weights judge: "last"; "aucp", those with the highest AUROC of unlabelled rows against known normals.',
        choices=("last", "aucp"),
    ),
    "data.normalise": Key(
        "crop", "Moments by which values are standardised: of the crop, or of the region.", choices=("crop", "region")
    ),
    "data.normal_crops_only": Key(
        False, "Whether abnormal training rows with a mask are used, by crops that touch no lesion, instead of refused."
    ),
    "data.region": Key(
        "", '"nonzero": a row without a region counts its voxels that are not 0.', choices=("", "nonzero")
    ),
    "data.least_region": Key(0.0, "Least share of a training crop that lies in the region.", least=0, most=1),
}
