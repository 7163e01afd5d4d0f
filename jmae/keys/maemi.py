"""Keys of MAEMI."""

from jmae import recipe
from jmae.keys import residuals
from jmae.keys.masked import LEAST_RATE, MODEL_KEYS, TRAINING_KEYS, WEIGHTS_KEYS, declared
from jmae.keys.tokens import TOKEN_KEYS

KEYS = {
    "checkpoint_every": recipe.Key(5000, "Steps between two checkpoints.", "steps", least=1),
    "data.size": recipe.Key((240, 168, 8), "Size of a training crop and of a window.", "voxels", least=1, length=3),
    "data.channels": recipe.Key(2, "Sequences of a volume; the paper's: without and with fat saturation.", least=1),
    "data.spacing": recipe.Key(
        (0.75, 0.75, 1.0), "Working voxel size; () keeps the file's own.", "mm", above=0, length=3, empty=True
    ),
    "data.join": recipe.Key(
        "resample",
        'How sequences on different grids are joined: "resample", or "same" refuses them.',
        choices=("resample", "same"),
    ),
    "data.crop": recipe.Key(
        "region",
        'Part of a volume that is used: "region", the box around the region, or "none", all of it.',
        choices=("region", "none"),
    ),
    "data.crop_least": recipe.Key(
        (200.0, 200.0, 50.0), "Least edges of the box around the region.", "mm", above=0, length=3, empty=True
    ),
    "data.crop_most": recipe.Key(
        (350.0, 350.0, 100.0), "Greatest edges of the box around the region.", "mm", above=0, length=3, empty=True
    ),
    "data.crop_margin": recipe.Key(
        20.0, "Margin around a lesion that sticks out of that box, in training volumes.", "mm", least=0
    ),
    "data.region": recipe.Key(
        "", '"nonzero": a row without a region counts its voxels that are not 0.', choices=("", "nonzero")
    ),
    "data.normal_crops_only": recipe.Key(
        False, "Whether abnormal training rows with a mask are used, by crops that touch no lesion, instead of refused."
    ),
    "data.least_region": recipe.Key(0.0, "Least share of a training crop that lies in the region.", least=0, most=1),
    "data.normalise": recipe.Key(
        "crop", 'Voxels whose moments standardise a volume: "crop" or "region".', choices=("crop", "region")
    ),
    "data.clip": recipe.Key((0.001, 1.5), "Bounds of the values that the network sees.", length=2),
    "data.flips": recipe.Key((0, 1), "Axes, each mirrored with probability 1/2.", choices=(0, 1, 2)),
    **declared(
        "model", MODEL_KEYS | WEIGHTS_KEYS, patch=(8, 8, 2), decoder_width=384, decoder_depth=4, decoder_heads=16
    ),
    "model.weights_part": recipe.Key(
        "blocks",
        'Part of the network that takes the weights: "blocks", the encoder\'s transformer blocks; "encoder"; "mae".',
        choices=("blocks", "encoder", "mae"),
    ),
    **declared(
        "train",
        TRAINING_KEYS | LEAST_RATE,
        epochs=1000,
        batch=6,
        mask_ratio=0.90,
        lr=1e-3,
        lr_least=1e-4,
        warmup=7 / 1000,
    ),
    "compat.position": recipe.Key(False, "The released code's permuted position codes."),
    "compat.averaging": recipe.Key(
        False, "The released code's padding, halves and averaging: voxels under few windows weigh more."
    ),
    "compat.clip": recipe.Key(False, "The released code's test images, which are not clipped."),
    "evaluation.batch": recipe.Key(64, "Windows that are scored at a time; fewer where memory is short.", least=1),
    "evaluation.stride": recipe.Key((64, 42, 2), "Distance between windows.", "voxels", least=1, length=3),
    "evaluation.repeats": recipe.Key(6, "Sweeps over all windows, each with new masks.", least=1),
    **recipe.MASKS_OF,
    **residuals.KEYS,
    **residuals.VOLUME_KEYS,
    "evaluation.mask_ratio": recipe.Key(0.90, "Share of a window's tokens that a mask hides.", above=0, below=1),
    "evaluation.filter": recipe.Key((3, 3, 2), "Edges of the minimum filter.", "voxels", least=1, length=3),
    "evaluation.error": recipe.Key(
        "all",
        'Tokens whose error counts: "all", or "hidden" (ours), as the output at visible tokens is not trained.',
        choices=("all", "hidden"),
    ),
    **declared("evaluation", TOKEN_KEYS, ring=0),
}
