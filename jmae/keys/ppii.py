"""Keys of P-PII."""

from dataclasses import replace
from typing import NamedTuple

from jmae.recipe import MASKS_OF, SHARED, Key

SHAPES = ("circular", "elliptic", "rectangular")


class Preset(NamedTuple):
    """The settings in which P-PII's paper and its released file differ. Ranges include their ends."""

    anomalies: tuple[int, int]
    raters: tuple[int, int]
    strength: tuple[float, float]  # of the source's differences
    consistent: bool  # whether the strength is a real number times the number of anomalies, and at least 1
    gain: float  # factor of the target
    sequence: bool  # True: patch after patch, each the mean of its raters. False: the mean of all raters' images
    core: bool  # True: places of the released file, without the last fifth of each axis. False: any place


PRESETS = {
    # The paper gives no strength: 2 to 5 is ours.
    "paper": Preset((1, 10), (1, 9), (2, 5), False, 1.0, True, False),
    "released": Preset((10, 19), (1, 9), (10, 19), False, 10.0, False, True),
    # ours: the average of the released file, at any place, with a strength and a gain for 1 to 10 anomalies. If R of N
    # images show an anomaly, the average has R / N of it. So strength / anomalies stays in the released range of 0.53
    # to 1.9.
    "jmae": Preset((1, 10), (1, 9), (0.53, 1.9), True, 10.0, False, False),
}

TASKS = ("pii", "fpi", "cutpaste", "nsa")
"""Older tasks that are variants, too."""

BACKBONES = ("unet", "mc_unet", "phiseg")


def _generator_keys(variant: str) -> dict[str, Key]:
    preset = PRESETS[variant]
    most = "The paper gives none: ours." if variant == "paper" else ""
    times = ", times the number of anomalies" if preset.consistent else ""
    keys = {
        "anomalies": Key(preset.anomalies, "Least and most anomalies of an image.", least=1, length=2),
        "raters": Key(preset.raters, "Least and most raters of an anomaly.", least=1, length=2),
        "strength": Key(
            tuple(map(float, preset.strength)),
            f"Least and greatest factor of the source's gradients{times}. {most}".strip(),
            above=0,
            length=2,
        ),
        "gain": Key(preset.gain, "Factor of the target |x - x'|.", above=0),
    }
    return {f"anomaly.{variant}.{name}": key for name, key in keys.items()}


KEYS = {
    "variant": Key("paper", "Generator of the anomalies.", choices=(*PRESETS, *TASKS)),
    "select": Key(
        "dice",
        'Which weights are scored: "last"; "dice", those with the best Dice on synthetic anomalies; "aucp", those with '
        "the highest AUROC of unlabelled rows.",
        choices=("last", "dice", "aucp"),
    ),
    "checkpoint_every": replace(SHARED["checkpoint_every"], default=5000),
    "data.size": replace(SHARED["data.size"], default=(512, 512)),
    "data.equalise": replace(SHARED["data.equalise"], default=True),
    "model.backbone": Key("unet", "Network.", choices=BACKBONES),
    "model.widths": Key(
        (32, 64, 128, 192, 192), "Channels of each level; phiseg has two more levels of the last width.", least=1
    ),
    "model.base": Key(32, "Channels of the last layers.", least=1),
    "model.prior": Key(
        0.0,
        "Ours: about the probability of an anomaly that a U-Net predicts before the training; 0: its last layer "
        "starts He normal, and chance decides.",
        least=0,
        below=1,
    ),
    "model.dropout": Key(
        0.1, "Dropout rate of mc_unet, after the last convolution of each level. Ours: not stated.", least=0, below=1
    ),
    "model.latent_levels": Key(5, "Levels of phiseg that have latent maps.", least=1),
    "model.latent": Key(2, "Channels of phiseg's latent maps.", least=1),
    "model.remat": Key(False, "Whether activations are computed again in the backward pass, in less memory."),
    "model.dtype": Key(
        "auto",
        'Type of the arithmetic; "auto" is bfloat16 on accelerators and float32 on a CPU.',
        choices=("auto", "float32", "bfloat16"),
    ),
    "anomaly.patch": Key(
        (0.05, 0.2), "Least and greatest edge of a patch.", "shares of the image's edge", above=0, most=1, length=2
    ),
    "anomaly.half": Key(
        (0.05, 0.2),
        "Least and greatest half edge of the squares of pii and fpi; along a third axis, shares of that axis.",
        "shares of the image's shorter edge",
        above=0,
        most=1,
        length=2,
    ),
    "anomaly.core": Key(
        0.8, "Share of each axis, in its middle, in which the centres of patches lie in the source.", above=0, most=1
    ),
    "anomaly.shape": Key("circular", "Shape of an anomaly of P-PII.", choices=SHAPES),
    "anomaly.source": Key(
        "other",
        'Image that patches come from: "other", another one of the batch, or "self", the image itself.',
        choices=("other", "self"),
    ),
    **_generator_keys("paper"),
    **_generator_keys("released"),
    **_generator_keys("jmae"),
    "train.steps": Key(100_000, "Steps; 0 where epochs are set.", "steps", least=0),
    "train.epochs": Key(0, "Epochs; 0 where steps are set.", "epochs", least=0),
    "train.batch": Key(16, "Images of a step.", least=1),
    "train.loss": Key(
        "cross_entropy", "Loss of a pixel; the cross-entropy has soft targets.", choices=("cross_entropy", "mse")
    ),
    "train.target": Key(
        "mean",
        'Label that the network learns: "mean", over the raters; ours: "rater", that of one rater of each anomaly, who '
        "is drawn at each step.",
        choices=("mean", "rater"),
    ),
    "train.variance_weight": Key(
        0.0, "Ours: a pixel's loss is divided by 1 + this number times the raters' variance.", least=0
    ),
    "train.lr": Key(1e-3, "Learning rate.", above=0),
    "train.betas": Key((0.9, 0.999), "Adam's two decay rates of the moments.", least=0, below=1, length=2),
    "train.scaling": Key(
        0.0, "Share of the edge that a random crop loses at most; 120 / 512 in Table 2.", least=0, below=1
    ),
    "train.rotation": Key(0.0, "Greatest rotation, either way; 10 in Table 2.", "degrees", least=0),
    "train.elastic": Key(
        0.0,
        "Standard deviation of the displacements of a grid of 3 points an axis; 10 / 512 in Table 2.",
        "shares of the edge",
        least=0,
    ),
    "train.flips": Key((), "Ours: axes that are each mirrored with probability 1/2.", least=0, holds=0),
    "train.held_out": Key(0.1, "Share of the patients kept for the best Dice.", least=0, below=1),
    "train.dice_at": Key(
        0.0,
        "Threshold of prediction and target in the Dice; 0, ours: none, as |x - x'| hardly ever reaches 0.5.",
        least=0,
        below=1,
    ),
    "train.validate_every": Key(500, "Steps between two values of the Dice.", "steps", least=1),
    "train.validation_samples": Key(100, "Synthetic samples for the Dice.", least=1),
    "evaluation.samples": Key(50, "Samples of mc_unet and phiseg.", least=1),
    **MASKS_OF,
    "evaluation.froc": replace(SHARED["evaluation.froc"], default=10.0),
}
"""The keys of this system; defaults are the paper's values."""

VOLUME_KEYS = {
    "data.normalise": Key(
        "region",
        "Voxels whose values are equalised evenly: those of the crop or the region.",
        choices=("crop", "region"),
    ),
    "data.mean": Key(0.5, "Mean of the values of a volume that is not equalised."),
    "data.std": Key(0.25, "Standard deviation of the values of a volume that is not equalised.", above=0),
}
"""The further keys of volumes."""
