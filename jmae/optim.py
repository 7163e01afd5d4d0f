"""Optimisers, schedules, and the one function that makes a training step of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jmae.sharding import device_mean
from jmae.system import State

Loss = Callable[..., tuple[Array, tuple[dict[str, PyTree], dict[str, Array]]]]
"""(params, *arrays) -> (loss, (new statistics, metrics)); the loss is a mean over the samples of the arrays."""


def adamw(*, betas: tuple[float, float], decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `descend` multiplies with. The rate scales the decay too (PyTorch's form).

    Biases and the scales of norms do not decay.
    """
    return optax.chain(optax.scale_by_adam(*betas), optax.add_decayed_weights(decay, has_decay))


def adam(*, betas: tuple[float, float], eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam without its learning rate, which `descend` multiplies with."""
    return optax.chain(optax.scale_by_adam(*betas, eps=eps))


def has_decay(params: PyTree) -> PyTree:
    """True for the parameters with weight decay: all but biases and the scales of norms.

    Their names tell them, because stacked biases are matrices.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def begin(params: PyTree, optimiser: optax.GradientTransformation, stats: dict[str, PyTree] | None = None) -> State:
    """The state of a stage before its first step."""
    return State(params=params, opt=optimiser.init(params), stats=stats or {}, step=jnp.int32(0))


def descend(
    state: State,
    loss: Loss,
    optimiser: optax.GradientTransformation,
    rate: float | Float[Array, ""],
    *arrays: Array,
    parts: int = 1,
) -> tuple[State, dict[str, Array]]:
    """One step of gradient descent: (the new state, metrics).

    Gradients, statistics and metrics are means over the devices of a `jax.pmap` step, too. Metrics are those of the
    loss, "loss", "lr" and "grad_norm".

    Args:
        loss: see `Loss`; statistics that it does not give stay as they are.
        optimiser: gradients -> direction, without a learning rate (`adam`, `adamw`).
        rate: learning rate of this step.
        arrays: arrays (b, ...) of the batch, given to the loss after the parameters.
        parts: parts in which the batch is taken, one after the other (`gradient`).
    """
    (value, (stats, metrics)), grads = device_mean(gradient(loss, parts)(state.params, *arrays))
    updates, opt = optimiser.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda update: -rate * update, updates))
    new = state.replace(params=params, opt=opt, stats=state.stats | stats, step=state.step + 1)
    return new, {"loss": value, **metrics, "lr": jnp.float32(rate), "grad_norm": optax.tree.norm(grads)}


def gradient(loss: Loss, parts: int) -> Callable[..., tuple[Any, PyTree]]:
    """(params, *arrays (b, ...)) -> (what the loss gives, gradients), with the batch in `parts` equal parts.

    Several parts need the memory of one and give the same numbers to rounding. Part j holds the samples j, j + parts,
    ..., so that each device keeps its own samples where a part divides among the devices. Gradients are then summed
    over devices once a part. Losses that mix samples, as batch norm does, give other numbers in parts.
    """
    whole = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return whole

    def mean(params: PyTree, *arrays: Array) -> tuple[Any, PyTree]:
        cut = lambda x: jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)
        pieces = tuple(map(cut, arrays))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, params, *(piece[0] for piece in pieces))
        )
        add = lambda sums, piece: (jax.tree.map(jnp.add, sums, whole(params, *piece)), None)
        return jax.tree.map(lambda x: x / parts, jax.lax.scan(add, zeros, pieces)[0])

    return mean
