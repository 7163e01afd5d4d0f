"""Keys of the autoencoders, rivals of the five systems."""

from jmae.keys.unlabeled import UNLABELED_KEYS
from jmae.recipe import Key

VARIANTS = {
    "ae": ("train",),
    "ae_u": ("train",),
    "dae": ("train",),
    "ddad": ("module_a", "module_b"),
    "ddad_intra": ("module_b",),
}

KEYS = {
    "variant": Key("ae", "The rival.", choices=tuple(VARIANTS)),
    "data.size": Key((64, 64), "Size of an image as the network sees it.", "pixels", least=1),
    **UNLABELED_KEYS,
    "model.width": Key(
        16, "Channels of the autoencoder's first convolution; the others have 2, 4 and 4 times so many."
    ),
    "model.hidden": Key(1024, "Units of the dense layers around the bottleneck; DDAD has 2048.", least=1),
    "model.latent": Key(16, "Numbers of the bottleneck.", least=1),
    "model.networks": Key(3, "Networks of a module of DDAD.", least=2),
    "model.uncertain": Key(False, "Whether DDAD's networks are of AE-U; its maps are then divided by the deviation."),
    "dae.widths": Key((64, 128, 256, 512, 1024), "Channels of the U-Net's levels.", least=1),
    "dae.noise": Key(0.2, "Deviation of the noise before it is resized, where an image spans 0 to 1.", above=0),
    "dae.mean": Key(0.0, "Mean of the noise; MedIAnomaly's code has -0.5, as it centres the noise like an image."),
    "dae.grain": Key(16, "Values of the noise along an axis before it is resized.", least=2),
    "dae.foreground": Key(
        True, "Whether noise, loss and maps are of the foreground alone, the pixels above 0.01: for scans on black."
    ),
    "train.steps": Key(0, "Steps of a stage; 0: `epochs` counts.", least=0),
    "train.epochs": Key(250, "Rounds over the stage's rows; 0: `steps` counts.", least=0),
    "train.batch": Key(64, "Images of a step and network.", least=1),
    "train.lr": Key(1e-3, "Learning rate.", above=0),
    "train.betas": Key((0.9, 0.999), "Decay rates of Adam's two moments.", least=0, below=1, length=2),
}
