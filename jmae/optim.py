"""Schedules and the optimiser that all systems share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree


def warmup_cosine(lr: float, *, warmup: float, steps: int, least: float = 0.0) -> Callable[[Array], Array]:
    """Linear from 0 to `lr` over `warmup` steps, then half a cosine to `least` at `steps`; updated every step, as
    the official MAE code does."""

    def schedule(step: Array) -> Array:
        share = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
        return jnp.where(
            step < warmup,
            lr * step / max(warmup, 1),
            least + (lr - least) * (1 + jnp.cos(jnp.pi * share)) / 2,
        )

    return schedule


def accumulated(loss: Callable[..., Array], parts: int) -> Callable[..., tuple[Array, PyTree]]:
    """(params, *arrays (b, ...)) -> the value and gradient of a loss that is a mean over the batch, `parts` equal parts
    of it one after the other: the same to rounding, in the memory of one part. Part j has the samples j, j + parts, ...
    so that each device keeps its own, where a part divides among them; gradients are summed over devices once a part,
    so that this time does not shrink. Losses that look at several samples at once, as batch norm does, differ."""
    if parts == 1:
        return jax.value_and_grad(loss)

    def mean(params: PyTree, *arrays: Array) -> tuple[Array, PyTree]:
        cut = lambda x: jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)
        one = lambda sums, part: (jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, *part)), None)
        nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(one, nothing, tuple(map(cut, arrays)))
        return jax.tree.map(lambda x: x / parts, sums)

    return mean


def decayed(params: PyTree) -> PyTree:
    """True for leaves with weight decay: all but biases and norms (by name, since stacked biases are matrices)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def adamw(
    lr: float | Array | Callable[[Array], Array], *, betas: tuple[float, float], decay: float
) -> optax.GradientTransformation:
    """AdamW with decoupled decay scaled by the learning rate (PyTorch's form)."""
    return optax.adamw(lr, b1=betas[0], b2=betas[1], weight_decay=decay, mask=decayed)
