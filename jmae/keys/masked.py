"""Keys of every masked autoencoder."""

from dataclasses import replace
from typing import Any

from jmae import recipe

MODEL_KEYS = {
    "patch": recipe.Key((16, 16), "Edges of a patch, which is one token.", "pixels", least=1, length=recipe.AXES),
    "width": recipe.Key(768, "Channels of the encoder.", least=1),
    "depth": recipe.Key(12, "Blocks of the encoder.", least=1),
    "heads": recipe.Key(12, "Heads of the encoder's attention; they divide its width.", least=1),
    "decoder_width": recipe.Key(512, "Channels of the decoder.", least=1),
    "decoder_depth": recipe.Key(8, "Blocks of the decoder.", least=1),
    "decoder_heads": recipe.Key(16, "Heads of the decoder's attention; they divide its width.", least=1),
    "dtype": recipe.Key(
        "auto",
        'Type of the arithmetic; "auto" is bfloat16 on accelerators and float32 on the CPU.',
        choices=("auto", "float32", "bfloat16"),
    ),
    "remat": recipe.Key(False, "Whether the backward pass computes activations again, to save memory."),
}
"""Keys of the section `model` of every masked autoencoder, by their last name."""

WEIGHTS_KEYS = {
    "weights": recipe.Key("", "A masked autoencoder's checkpoint file, or the folder of an earlier run; empty: none."),
    "weights_adapt": recipe.Key(False, "Whether tensors of another shape are resized."),
}
"""Further keys of the section `model` where a stage can use `model.weights`."""

TRAINING_KEYS = {
    "steps": recipe.Key(0, "Steps of the stage; 0: `epochs` counts.", least=0),
    "epochs": recipe.Key(0, "Rounds over the stage's rows; 0: `steps` counts.", least=0),
    "batch": recipe.Key(256, "Images of a step.", least=1),
    "mask_ratio": recipe.Key(0.75, "Share of the tokens that a mask hides.", above=0, below=1),
    "lr": recipe.Key(1e-3, "Highest learning rate.", above=0),
    "warmup": recipe.Key(0.05, "Share of the steps over which the learning rate rises.", least=0, below=1),
    "betas": recipe.Key((0.9, 0.95), "Decay rates of AdamW's two moments.", least=0, below=1, length=2),
    "decay": recipe.Key(0.05, "Weight decay of AdamW.", least=0),
}
"""Keys of a section that trains a masked autoencoder, by their last name."""

LEAST_RATE = {"lr_least": recipe.Key(0.0, "Learning rate at the last step.", least=0)}

STANDARDISING_KEYS = {
    "normalise": recipe.Key(
        "fixed",
        'Moments that standardise an image: "fixed", data.mean and data.std; "image", its own.',
        choices=("fixed", "image"),
    ),
    "mean": recipe.Key(0.5, "Mean of an image, for all channels or for each.", least=0, most=1, single=True),
    "std": recipe.Key(0.25, "Deviation of an image, for all channels or for each.", above=0, single=True),
}
"""Keys of the section `data` for images that `standardised` takes, by their last name."""


def declared(section: str, keys: dict[str, recipe.Key], **defaults: Any) -> dict[str, recipe.Key]:
    """The keys of a recipe's section, with the defaults of one paper.

    Raises KeyError for a default of a key that `keys` does not have.
    """
    changed = keys | {name: replace(keys[name], default=value) for name, value in defaults.items()}
    return {f"{section}.{name}": key for name, key in changed.items()}
