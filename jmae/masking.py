"""Random masks over tokens. True means hidden.

In training each sample draws its masks from its own key. In a test all images share the masks of the run's key, and a
round of masks is a random partition of the tokens, so that a score is a function of the image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jmae.errors import InputError


def visible_tokens(tokens: int, ratio: float) -> int:
    """The number of tokens that stay visible at a mask ratio: int(tokens * (1 - ratio)).

    The product is truncated in float64 as in the official code: 2520 tokens at ratio 0.9 leave 251. Raises InputError
    where no token, or every token, would be visible.
    """
    visible = int(tokens * (1 - ratio))
    if not 0 < visible < tokens:
        remedy = f"choose a ratio that leaves between 1 and {tokens - 1}"
        raise InputError(f"mask ratio {ratio} leaves {visible} of {tokens} tokens visible: {remedy}")
    return visible


def order_of(noise: Float[Array, "b n"], visible: int) -> tuple[Int[Array, "b k"], Int[Array, "b n"]]:
    """(keep, restore) of the official code.

    Tokens are sorted by noise. `keep` has the indices of the first `visible` ones, which stay visible. `restore` is the
    inverse permutation. A token is hidden where restore >= visible.
    """
    order = jnp.argsort(noise, axis=1)
    return order[:, :visible], jnp.argsort(order, axis=1)


def random_mask(keys: Key[Array, " b"], tokens: int, visible: int) -> tuple[Int[Array, "b k"], Int[Array, "b n"]]:
    """One uniformly random mask for each key: `order_of` noise from U(0, 1)."""
    return order_of(jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys), visible)


def groups_of(tokens: int, visible: int) -> int:
    """How many disjoint masks show `visible` of the tokens each: the masks of one round."""
    return tokens // visible


def group_mask(
    keys: Key[Array, " b"], groups: Int[Array, " b"], tokens: int, visible: int
) -> tuple[Int[Array, "b k"], Int[Array, "b n"]]:
    """For each key the mask that shows one group of a random partition of the tokens; group 0 is `random_mask`."""
    order = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys), axis=1)
    order = jax.vmap(jnp.roll)(order, -visible * groups)
    return order[:, :visible], jnp.argsort(order, axis=1)


def run_masks(
    key: Key[Array, ""], numbers: Int[Array, " m"], tokens: int, visible: int
) -> tuple[Int[Array, "m k"], Int[Array, "m n"]]:
    """The masks of these numbers, which all images of a run share: (keep, restore) as `order_of` gives them.

    Masks 0 to G - 1, with G = `groups_of`, are the first round, and so on. Each round has its own random partition of
    the tokens, and each of its masks shows another group. Where `visible` divides `tokens`, a round hides every token
    G - 1 times.
    """
    rounds, groups = jnp.divmod(numbers, groups_of(tokens, visible))
    return group_mask(jax.vmap(lambda j: jax.random.fold_in(key, j))(rounds), groups, tokens, visible)


def standard_error(values: Float[Array, "b r"]) -> Float[Array, " b"]:
    """The standard error of the mean of r independent values."""
    return jnp.std(values, axis=1, ddof=1) / values.shape[1] ** 0.5


def hidden(restore: Int[Array, "*b n"], visible: int) -> Bool[Array, "*b n"]:
    """True where a token is hidden."""
    return restore >= visible


def take(tokens: Float[Array, "b n d"], index: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """Tokens by index; each sample has its own indices."""
    return jnp.take_along_axis(tokens, index[..., None], axis=1)


def fold_in(keys: Key[Array, " b"], number: int | Int[Array, ""]) -> Key[Array, " b"]:
    """`jax.random.fold_in` for a row of keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def sample_keys(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each sample, from the step's key and the sample's number in its table.

    It depends neither on the sample's place in the batch nor on the number of devices.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def case_keys(key: Key[Array, ""], case: UInt32[Array, "b 2"]) -> Key[Array, " b"]:
    """A key for each case, from the run's key and the case's words (`data.preparation.case_words`)."""
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(case)


def scoring_keys(masks_of: str, key: Key[Array, ""], case: UInt32[Array, "b 2"]) -> Key[Array, ""] | Key[Array, " b"]:
    """The keys of random masks or samples in a test, by `evaluation.masks_of`: the run's key for all images ("run"), or
    a key for each case ("case")."""
    return case_keys(key, case) if masks_of == "case" else key
