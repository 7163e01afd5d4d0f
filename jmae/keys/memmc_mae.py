"""Keys of MemMC-MAE. [D] marks what the paper leaves open."""

from dataclasses import replace

from jmae import recipe
from jmae.keys import residuals
from jmae.keys.masked import MODEL_KEYS, STANDARDISING_KEYS, TRAINING_KEYS, WEIGHTS_KEYS, declared
from jmae.keys.tokens import TOKEN_KEYS

GATES = ("channel", "token")

BORDERS = ("stretch", "mirror")

LUMINANCES = ("standardised", "unit", "none")

SCORES = ("ms_ssim", "ms_ssim_patches", "mse", "ms_ssim_product")  # the last one is of whole images, without a map

KEYS = {
    "checkpoint_every": recipe.Key(5000, "Steps between two checkpoints.", "steps", least=1),
    "data.crop_scale": recipe.Key(
        (0.2, 1.0),
        "Share of the image that a random resized crop takes [D]; (): no crop.",
        above=0,
        most=1,
        length=2,
        empty=True,
    ),
    **declared("model", MODEL_KEYS | WEIGHTS_KEYS),
    "model.weights_part": recipe.Key(
        "mae",
        'Part of the network that takes the weights: "mae"; "encoder"; "blocks", the encoder\'s transformer blocks.',
        choices=("mae", "encoder", "blocks"),
    ),
    "model.channels": recipe.Key(3, "Channels of the network; a grey image is repeated.", least=1),
    "model.memory": recipe.Key(40, "Memory slots of each encoder block [D]; 0: plain attention.", least=0),
    "model.mc_decoder": recipe.Key(True, "Whether the decoder attends to all encoder levels; the MAE's does not."),
    "model.gate": recipe.Key(
        "token",
        'Gates of a level: "token", a number for each token, as the paper\'s 22 hours ask for; "channel", one for each '
        "channel and token, as Cornia et al.",
        choices=GATES,
    ),
    "model.mc_norm": recipe.Key(True, "Whether the sum over levels is divided by the root of their number [D]."),
    "model.long_skips": recipe.Key(
        True, "Whether the output of block i is added to the input of block depth - 1 - i [D], in both stacks."
    ),
    **declared("train", TRAINING_KEYS, epochs=2000, lr=1.5e-3, warmup=5 / 2000),
    "train.clip": recipe.Key(0.0, "Greatest norm of the gradient; 0: any.", least=0),
    "evaluation.score": recipe.Key("ms_ssim", "The primary score.", choices=(*SCORES, "tokens")),
    "evaluation.masks": recipe.Key(10, "Masks of a test image.", least=1),
    **recipe.MASKS_OF,
    **residuals.KEYS,
    "evaluation.mask_ratio": recipe.Key(0.75, "Share of the tokens that a mask hides.", above=0, below=1),
    "evaluation.paste": recipe.Key(
        True, "Whether visible patches are the input's [D]; False: the decoder's output everywhere."
    ),
    "evaluation.window": recipe.Key((11, 11), "Edges of the SSIM window, odd; IGD's [D].", "pixels", least=1),
    "evaluation.sigma": recipe.Key(1.5, "Deviation of the SSIM window's weights; IGD's [D].", "pixels", above=0),
    "evaluation.scales": recipe.Key(
        (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), "Weights of the scales, the finest one first.", above=0
    ),
    "evaluation.pool": recipe.Key((2, 2), "Pixels of a scale that make one of the next scale.", least=1),
    "evaluation.luminance": recipe.Key(
        "standardised",
        'Values that SSIM\'s luminance compares: "standardised", IGD\'s, where the mean counts as black; ours: "unit", '
        'from 0 to 1, for which the luminance is meant; "none", no luminance.',
        choices=LUMINANCES,
    ),
    "evaluation.border": recipe.Key(
        "stretch",
        'How a scale\'s map reaches the border: "stretch", IGD\'s, which moves defects outwards; ours: "mirror".',
        choices=BORDERS,
    ),
    "evaluation.average": recipe.Key(
        "all",
        'Masks over which a voxel\'s map is averaged: "all", or "hidden", those that hide the voxel.',
        choices=("all", "hidden"),
    ),
    "evaluation.l1_weight": recipe.Key(
        0.0, "Share of the absolute error in the map; 0: MS-SSIM alone; IGD: 0.15.", least=0, most=1
    ),
    "evaluation.iou": recipe.Key(
        95.0,
        "Percentile of the pixels of val's normals at which lesions are outlined for the IoU; 0: no IoU.",
        "%",
        least=0,
        most=100,
    ),
    **declared("evaluation", TOKEN_KEYS),
}

IMAGE_KEYS = {
    **residuals.IMAGE_KEYS,
    "data.crop_from": recipe.Key(
        (),
        "Size of the images that random crops are taken from; (): data.size.",
        "pixels",
        least=1,
        length=2,
        empty=True,
        holds=1,
    ),
    **declared("data", STANDARDISING_KEYS, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "data.flips": recipe.Key(
        (), "Axes, each mirrored with probability 1/2; the paper lists none.", choices=(0, 1), holds=0
    ),
}

VOLUME_KEYS = {
    **residuals.VOLUME_KEYS,
    "data.channels": recipe.Key(2, "Sequences of a volume.", least=1),
    "data.clip": recipe.Key((0.001, 1.5), "Bounds of the values that the network sees.", length=2),
    "data.flips": recipe.Key((0, 1), "Axes, each mirrored with probability 1/2.", choices=(0, 1, 2)),
    "evaluation.score": recipe.Key("ms_ssim", "The primary score.", choices=(*SCORES[:3], "tokens")),
    "evaluation.ring": replace(KEYS["evaluation.ring"], default=0),
    "evaluation.iou": recipe.Key(0.0, "Only for images: 0, no IoU.", "%", least=0, most=0),
}
