"""Every training step and every score is traced and lowered for an H200 here, on a machine without a GPU.

XLA's GPU compiler is not part of these tests; `make gpu-check` runs it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from jmae import plan, recipe
from jmae.nn import attention
from jmae.nn.transformer import Block, Blocks
from jmae.passes import seeds_of
from jmae.sharding import device_mesh
from jmae.system import load_system
from jmae.target import Target, portable, tracing_for

H200 = Target("cuda", (9, 0), 91000)
FLASH = "__cudnn$fmhaSoftmax"
PRESETS = {
    "amae": "phantom smoke small paper",
    "maemi": "phantom smoke small paper",
    "memmc_mae": "phantom smoke small phantom3d small3d paper",
    "ppii": "phantom smoke small phantom3d small3d paper",
    "simsid": "phantom smoke small phantom3d paper",
    "autoencoder": "smoke small_dae paper",
}
RECIPES = [f"{name}:{preset}" for name, presets in PRESETS.items() for preset in presets.split()]
RECIPES += ["simsid:paper variant=official", "ppii:paper model.backbone=mc_unet", "ppii:paper model.backbone=phiseg"]
FLASH_LESS = {"maemi:smoke": "heads of 12 channels"}  # cuDNN wants a multiple of 8


def read(text):
    """The recipe with at most three equal blocks in a stack; on a GPU stacks are unrolled, and each block is traced."""
    name, *changes = text.split()
    config, _ = recipe.parse([f"--config=configs/{name.replace(':', '.py:')}", *(f"--config.{c}" for c in changes)], "")
    if "dtype" in config.model:
        config.model.dtype = "bfloat16"  # what "auto" is on a GPU
    for key in ("depth", "decoder_depth"):
        if key in config.model:
            config.model[key] = min(config.model[key], 3)
    return config


def networks():
    """The first recipe of each network: presets of one network differ in steps, batches and data alone."""
    found = {}
    for text in RECIPES:
        config = read(text)
        about = [config.system, config.data.size, config.data.channels, config.get("variant"), config.model.to_dict()]
        found.setdefault(json.dumps(about), text)
    return list(found.values())


def lowered(text):
    """StableHLO of each stage of a recipe, in each phase, and of its score. A shared step is lowered once."""
    config, mesh, results, found, known = read(text), device_mesh(1, jax.devices()[:1]), {}, {}, set()
    with tracing_for(H200):
        system = load_system(config)
        for number, stage in enumerate(system.stages):
            for phase in dict.fromkeys(stage.phases if stage.step not in known else ()):
                state, inputs, jitted = plan.step_of(config, stage, number, results, mesh, None, phase)
                found[stage.name, phase] = jitted.trace(state, *inputs, None)
            known.add(stage.step)
            results = results | {stage.name: plan.result_of(config, stage, number, results)}
        used, keys = {name: results[name] for name in system.uses}, jax.eval_shape(lambda: seeds_of(config))
        if system.sweep:
            size = tuple(system.sweep.window)
            found["score", None] = plan.sweep_of(config, system.sweep, mesh, size, used, keys)[1](
                config.evaluation.batch
            )
        else:
            found["score", None] = plan.pass_of(config, system, mesh, used, keys)[1](system.masks)
        return {name: traced.lower(lowering_platforms=("cuda",)).as_text() for name, traced in found.items()}


def tiered(recipe):
    return pytest.param(recipe, marks=() if recipe.endswith(":smoke") else pytest.mark.long)


@pytest.mark.parametrize("recipe", [tiered(recipe) for recipe in networks()])
def test_every_step_and_score_lowers_for_an_h200_with_flash_attention(recipe):
    """JAX refuses odd lengths of sequences in training, so they are padded to a multiple of 8."""
    found = lowered(recipe)
    systems_with_attention = {"amae", "maemi", "memmc_mae"} if recipe not in FLASH_LESS else set()
    for (stage, _), text in found.items():
        trained = stage in ("pretrain", "train", "module_a", "student")
        if recipe.split(":")[0] in systems_with_attention or stage == "student":
            assert FLASH in text
            assert ("fmhaSoftmaxBackward" in text) == trained


def test_without_padding_the_trace_fails(monkeypatch):
    monkeypatch.setattr(attention, "MULTIPLE", 1)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered("amae:smoke")


@pytest.mark.parametrize("memory", [pytest.param(0, id="plain", marks=pytest.mark.long), pytest.param(5, id="memory")])
@pytest.mark.parametrize(
    "long_skips",
    [pytest.param(False, id="straight"), pytest.param(True, id="skips", marks=pytest.mark.long)],
)
def test_a_stack_padded_for_a_gpu_gives_its_tokens_the_same_outputs_and_gradients(memory, long_skips):
    make = lambda: Block(24, 3, 2.0, jnp.float32, memory, rngs=rngs)
    rngs = nnx.Rngs(0)
    graph, parameters = nnx.split(Blocks(5, make, long_skips=long_skips))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 24)), jnp.float32)

    def loss(parameters, x):
        stack = nnx.merge(graph, parameters)
        return jnp.sum(jnp.sin(stack(x))) + jnp.sum(jnp.cos(stack.outputs(x)))

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(parameters, x)
    with tracing_for(H200):
        traced = jax.jit(lambda *given: jax.value_and_grad(loss, argnums=(0, 1))(*given)).trace(parameters, x)
        assert "16,24]" in str(traced.jaxpr)  # 11 tokens are padded to 16 rows
        found = traced.lower().compile()(parameters, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * max(1, np.abs(other).max()))


def test_a_stack_is_unrolled_and_its_matrices_are_cast_once_for_a_gpu():
    graph, parameters = nnx.split(Blocks(6, lambda: Block(16, 2, 2.0, jnp.bfloat16, rngs=nnx.Rngs(0))))
    x = jnp.zeros((2, 8, 16), jnp.bfloat16)
    with tracing_for(H200):
        lowered = jax.jit(lambda p, x: nnx.merge(graph, p)(x)).trace(parameters, x).lower(lowering_platforms=("cuda",))
    assert "stablehlo.while" not in lowered.as_text()
    casts = [line for line in lowered.as_text().splitlines() if "stablehlo.convert" in line and "tensor<6x" in line]
    assert len(casts) == 4  # qkv, out, fc1, fc2; norms' parameters stay in float32


@pytest.mark.long
def test_gradients_that_eight_devices_add_in_bfloat16_are_within_one_percent():
    """Matrices are cast before the stack, so devices add gradients in bfloat16 and send half the bytes of float32.

    The bound is 2^-8 for each rounding, over three rounds of a tree."""
    graph, parameters = nnx.split(Blocks(3, lambda: Block(32, 4, 2.0, jnp.bfloat16, rngs=nnx.Rngs(0))))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 32)), jnp.bfloat16)
    loss = lambda p, x: jnp.mean(jnp.sin(nnx.merge(graph, p)(x)).astype(jnp.float32))
    with tracing_for(H200):
        parts = jax.jit(lambda p, x: jax.vmap(jax.grad(loss), (None, 0))(p, x[:, None]))(parameters, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        if any(getattr(key, "key", None) == "kernel" for key in path):
            rounded = leaf.astype(jnp.bfloat16)
            np.testing.assert_array_equal(rounded.astype(jnp.float32), leaf)  # they are of that type already
            pairs = rounded
            while len(pairs) > 1:
                pairs = pairs[::2] + pairs[1::2]
            exact = np.sum(np.asarray(leaf, np.float64), 0)
            assert np.linalg.norm(np.asarray(pairs[0], np.float64) - exact) < 0.01 * np.linalg.norm(exact)


def test_an_exported_program_calls_no_kernel_of_one_gpu():
    """JAX stores neither cuDNN's attention nor Triton's kernels."""
    graph, parameters = nnx.split(Blocks(2, lambda: Block(32, 4, 2.0, jnp.bfloat16, rngs=nnx.Rngs(0))))
    run = lambda p, x: nnx.merge(graph, p)(x)
    x = jnp.ones((2, 11, 32), jnp.bfloat16)
    with tracing_for(H200), portable():
        stored = export.export(jax.jit(run), platforms=("cpu", "cuda"))(parameters, x)
    np.testing.assert_allclose(
        np.asarray(stored.call(parameters, x), np.float32),
        np.asarray(jax.jit(run)(parameters, x), np.float32),
        atol=0.1,
    )
