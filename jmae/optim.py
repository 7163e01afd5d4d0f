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


def decayed(params: PyTree) -> PyTree:
    """True for leaves with weight decay: all but biases and norms (by name, since stacked biases are matrices)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def adamw(
    lr: float | Array | Callable[[Array], Array], *, betas: tuple[float, float], decay: float
) -> optax.GradientTransformation:
    """AdamW with decoupled decay scaled by the learning rate (PyTorch's form)."""
    return optax.adamw(lr, b1=betas[0], b2=betas[1], weight_decay=decay, mask=decayed)
