"""Keys of the score of an encoder's tokens (`jmae.tokens`)."""

from jmae import recipe

WAYS = ("position", "global", "gaussian", "mahalanobis")
"""What distances compare a token with: the bank of its position; one bank for all positions; the mean and covariance of
its position; the mean of its position and the covariance of all."""

RIDGE = "tokens_ridge"  # a score

TOKEN_KEYS = {
    "tokens": recipe.Key(
        "none",
        'What the score "tokens" compares the tokens of an image with (ours): "none", there is no such score; '
        '"position", the normals\' tokens near the position; "global", those of all positions, for images that are not '
        'aligned; "gaussian", the normals\' mean and covariance at the position; "mahalanobis", the mean at the '
        "position and one covariance.",
        choices=("none", *WAYS),
    ),
    "ring": recipe.Key(1, "Outermost rows of tokens left out of the score of tokens; 0: none.", "tokens", least=0),
    "layer": recipe.Key(
        0, "Block of the encoder whose tokens give the score of tokens, from 1; 0: the middle.", least=0
    ),
    "bank_size": recipe.Key(1500, "Tokens of normal images that a bank keeps.", "tokens", least=1),
    "bank_choice": recipe.Key(
        "random",
        'Tokens that a bank keeps: "random" ones, or "coreset", each the farthest from those before it.',
        choices=("random", "coreset"),
    ),
}
"""Keys of the section `evaluation` where an encoder's tokens give a score, by their last name."""
