"""What tests/test_types.py runs in a process of its own: traces every stage and score, with all types checked.

An argument is TARGET:SYSTEM, with `cpu` or `h200` as the target.
"""

import os
import sys

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # before JAX is imported

import checked
import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError

checked.install()

from jmae import plan, recipe  # noqa: E402
from jmae.gpus import without_cudnn  # noqa: E402
from jmae.losses import masked_mse  # noqa: E402
from jmae.passes import seeds_of  # noqa: E402
from jmae.sharding import device_mesh  # noqa: E402
from jmae.system import load_system  # noqa: E402
from jmae.target import Target, tracing_for  # noqa: E402

TARGETS = {"cpu": Target("cpu"), "h200": Target("cuda", (9, 0), 91000)}


def refused(function, *arguments) -> bool:
    """Whether a call raises for the shapes or the type of its arguments."""
    try:
        function(*arguments)
    except (TypeCheckError, ValueError):
        return True
    return False


def trace(name: str) -> None:
    """Traces the stages, in each phase, and the score of a system's recipe `smoke`."""
    config, _ = recipe.parse([f"--config=configs/{name}.py:smoke"], "")
    system, mesh, results = load_system(config), device_mesh(devices=jax.devices()[:1]), {}
    for number, stage in enumerate(system.stages):
        for phase in dict.fromkeys(stage.phases):
            state, inputs, step = plan.step_of(config, stage, number, results, mesh, None, phase)
            step.trace(state, *inputs, None)
        results |= {stage.name: plan.result_of(config, stage, number, results)}
    used, keys = {name: results[name] for name in system.uses}, jax.eval_shape(lambda: seeds_of(config))
    if system.sweep:
        plan.sweep_of(config, system.sweep, mesh, system.sweep.window, used, keys)[1](config.evaluation.batch)
    else:
        plan.pass_of(config, system, mesh, used, keys)[1](system.masks)


if __name__ == "__main__":
    patches, hidden = jnp.zeros((2, 4, 3)), jnp.ones((2, 4), bool)
    assert not refused(masked_mse, patches, patches, hidden)
    assert refused(masked_mse, patches, patches[..., :2], hidden), "a wrong shape passes"
    assert refused(masked_mse, patches, patches, patches[..., 0]), "a wrong type passes"
    assert refused(jnp.add, patches, hidden), "ranks are promoted"
    for argument in sys.argv[1:]:
        target, name = argument.split(":")
        with without_cudnn(), tracing_for(TARGETS[target]):
            trace(name)
        print(argument, flush=True)
