"""Keys of AMAE."""

from jmae import recipe
from jmae.keys import residuals
from jmae.keys.masked import LEAST_RATE, MODEL_KEYS, STANDARDISING_KEYS, TRAINING_KEYS, WEIGHTS_KEYS, declared
from jmae.keys.tokens import RIDGE, TOKEN_KEYS
from jmae.keys.unlabeled import UNLABELED_KEYS

VARIANTS = {
    "stage2": ("pretrain", "proxy", "labels", "module_a", "module_b"),
    "stage1": ("pretrain", "proxy"),
    "no_pseudo": ("pretrain", "module_a", "module_b"),
    "mask_rec": ("pretrain", "module_a"),
    "mae": ("pretrain",),
    "one_class": ("pretrain", "module_a"),
    "b_perfect": ("pretrain", "module_a", "module_b"),
    "b_normals": ("pretrain", "proxy", "labels", "module_a", "module_b"),
}

SIGNED = "tokens_signed"  # a score

DISCREPANCIES = {
    "reconstruction": "stage2",
    "nearer": "stage2_nearer",
    "error": "stage2_error",
    SIGNED: SIGNED,
    RIDGE: RIDGE,
}

RECONSTRUCTION_KEYS = (
    TRAINING_KEYS
    | LEAST_RATE
    | {
        "lr_is_base": recipe.Key(False, "Whether the learning rate is `lr` times batch / 256."),
        "masks": recipe.Key(1, "Masks of an image and step.", least=1),
        "augment": recipe.Key(True, "Whether images are cropped and flipped at random."),
    }
)

KEYS = {
    "variant": recipe.Key("stage2", "AMAE, or one of the comparisons of the paper.", choices=tuple(VARIANTS)),
    "data.size": recipe.Key((224, 224), "Size of an image as the network sees it.", "pixels", least=1),
    **declared("data", STANDARDISING_KEYS, mean=0.5056, std=0.252),  # medical_mae's for NIH
    "data.crop_scale": recipe.Key(
        (0.5, 1.0), "Share of the image that a random resized crop takes.", above=0, most=1, length=2
    ),
    **UNLABELED_KEYS,
    "data.unlabeled_labels": recipe.Key(
        "", "CSV id,label of the unlabelled rows: for that share, and to train the control variant=b_perfect alone."
    ),
    **declared(
        "model",
        MODEL_KEYS | WEIGHTS_KEYS,
        width=384,
        heads=6,
        decoder_depth=2,
    ),
    "model.channels": recipe.Key(3, "Channels of the network; a grey image is repeated.", least=1),
    **declared(  # medical_mae's pre-training; warm-up of 40 of 800 epochs
        "pretrain", RECONSTRUCTION_KEYS, epochs=800, batch=2048, mask_ratio=0.90, lr=1.5e-4, lr_is_base=True
    ),
    "proxy.steps": recipe.Key(0, "Steps of the stage; 0: `epochs` counts.", least=0),
    "proxy.epochs": recipe.Key(150, "Rounds over the stage's rows; 0: `steps` counts.", least=0),
    "proxy.batch": recipe.Key(16, "Images of a step, each with and without an anomaly.", least=1),
    "proxy.head": recipe.Key((512, 128), "Channels of the classifier's hidden layers.", least=1),
    "proxy.lr": recipe.Key(2.5e-4, "Highest learning rate.", above=0),
    "proxy.lr_least": recipe.Key(1e-5, "Learning rate at the last step.", least=0),
    "proxy.warmup": recipe.Key(20 / 150, "Share of the steps over which the learning rate rises.", least=0, below=1),
    "proxy.betas": recipe.Key((0.9, 0.999), "Decay rates of AdamW's two moments.", least=0, below=1, length=2),
    "proxy.decay": recipe.Key(0.05, "Weight decay of AdamW.", least=0),
    "proxy.area": recipe.Key((0.02, 0.15), "Share of the image that an anomaly covers.", above=0, most=1, length=2),
    "proxy.aspect": recipe.Key((0.3, 1 / 0.3), "Width to height of an anomaly.", above=0, length=2),
    "proxy.fill": recipe.Key((150, 254), "Opacity of an anomaly, of 255.", least=0, most=255, length=2),
    "proxy.blur": recipe.Key((0, 14), "Size of the blur, at 256 x 256.", "pixels", least=0, length=2),
    "proxy.margin": recipe.Key(10, "Margin around an anomaly, at 256 x 256.", "pixels", least=0),
    "proxy.jitter": recipe.Key(0.1, "Range of the changes of brightness and contrast of a pasted patch.", least=0),
    "proxy.jitter_image": recipe.Key(
        0.0, "The same range for a whole image, alike with and without an anomaly; AnatPaste: 0.1.", least=0
    ),
    **declared("adapt", RECONSTRUCTION_KEYS, epochs=150, batch=16, masks=2, lr=2.5e-4, warmup=20 / 150),
    "adapt.equal": recipe.Key(
        "steps",
        'What is equal for modules A and B where `steps` counts: "steps"; or "epochs", where `steps` is the mean.',
        choices=("steps", "epochs"),
    ),
    "adapt.percentile": recipe.Key(
        50.0, "Percentile of the confidence from which a pseudo-label is used.", "%", least=0, below=100
    ),
    "adapt.percentile_over": recipe.Key(
        "class", "Images over which that percentile is taken (`pseudo_labels`).", choices=("class", "all")
    ),
    "evaluation.masks": recipe.Key(4, "Masks of a test image, the same for modules A and B.", least=1),
    **recipe.MASKS_OF,
    **residuals.KEYS,
    **residuals.IMAGE_KEYS,
    "evaluation.discrepancy": recipe.Key(
        "reconstruction",
        'The primary score: "reconstruction", Eq. 4. Ours: "nearer", the part of Eq. 4 where module B is nearer the '
        'image; "error", the error of A less that of B; "tokens_signed", how much nearer the tokens of module B lie to '
        'those of its own training images than to those of normal images; "tokens_ridge", a ridge regression of the '
        'mean tokens of normal against unlabelled images; "tokens", in every variant, the score of the tokens of '
        "Stage 0's encoder.",
        choices=(*DISCREPANCIES, "tokens"),
    ),
    **declared("evaluation", TOKEN_KEYS),
    "evaluation.paste": recipe.Key(
        True, "Whether visible patches are the input's; False: the decoder's output everywhere."
    ),
}
