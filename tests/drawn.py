"""Weights drawn in NumPy, for tests: an `init` of many random layers compiles for longer than its network does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmae.system import Stage, State

KEY = jax.random.key(0)


def drawn(make: Callable[[], Any], seed: int = 0) -> Any:
    """Arrays of the shapes of what `make` returns: He normal kernels; scales and variances from 0.5 to 1.5, all other
    numbers from -0.5 to 0.5; integers 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(getattr(path[-1], "key", path[-1]))
        if leaf.dtype != jnp.float32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name == "kernel":
            return jnp.float32(rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape))
        return jnp.float32(rng.uniform(-0.5, 0.5, leaf.shape) + (name in ("scale", "var")))

    return jax.tree.map_with_path(draw, jax.eval_shape(make))


def first_state(stage: Stage, results: dict, n: int) -> State:
    """A stage's state before its first step, with drawn weights (and statistics) and zero moments."""
    init = lambda results: stage.init(KEY, results, n)
    state = drawn(lambda: init(results))
    if not state.params:  # a sweep: nothing is drawn
        return jax.jit(init)(results)
    return state.replace(opt=jax.tree.map(jnp.zeros_like, state.opt))
