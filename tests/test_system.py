"""Initial weights, and what a command imports."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from on_8_devices import small_system

from jmae.nn.transformer import Block
from jmae.nn.unet import Convs
from jmae.programs import compiled_init
from jmae.sharding import device_mesh
from jmae.system import State, best_weights, keep_best, network, stage_keys


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: Block(6, 2, 2.0, jnp.float32, 3, rngs=rngs),
        lambda rngs: Convs(2, 1, (3, 2), jnp.float32, rngs=rngs),
    ],
    ids=["transformer", "convolutions"],
)
def test_initial_weights_are_those_of_the_library_s_keys(make):
    key = jax.random.key(7)
    init, _ = network(make)
    library = jax.jit(lambda: nnx.state(make(nnx.Rngs(params=key)), nnx.Param))()
    assert equal(jax.jit(init)(key)[0], nnx.to_pure_dict(library))


@pytest.mark.long
@pytest.mark.parametrize("name", ["memmc_mae", "ppii"])
def test_less_effort_of_the_compiler_gives_the_same_initial_weights(name):
    config, system = small_system(name=name)
    stage, key = system.stages[0], stage_keys(config, 0)
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        whole = jax.jit(lambda key: stage.init(key, {}, 8))(key)
        less = compiled_init(stage, 8, 1, device_mesh())(key, {})
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert equal(whole, less)


def test_training_does_not_import_what_draws_before_it_draws():
    program = "import sys, jmae.train, jmae.evaluate; print(*({'matplotlib', 'scipy.stats', 'torch'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


@pytest.mark.parametrize(("tolerance", "chosen"), [(0.0, 1), (0.05, 3)])
def test_weights_that_are_hardly_worse_than_the_best_may_replace_them(tolerance, chosen):
    """The best value stays the measure: weight 2 is too low, 3 is near the best, 4 is near 3 alone."""
    params = lambda k: {"w": jnp.float32(k)}
    best = {"params": params(-1), "stats": {}, "auroc": jnp.float32(-1)}
    state = State(params=params(-1), opt=(), stats={"best": best}, step=jnp.int32(0))
    for k, value in enumerate((0.7, 0.9, 0.8, 0.86, 0.82, float("nan"))):
        state = keep_best(state.replace(params=params(k)), "auroc", jnp.float32(value), tolerance=tolerance)
    assert best_weights({"params": params(9), "stats": state.stats}, "auroc")["params"]["w"] == chosen
    assert state.stats["best"]["auroc"] == jnp.float32(0.9)
