"""Memory-augmented attention, long skips and the multi-level decoder against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmae.errors import InputError
from jmae.nn.memory import MultiLevelBlock, MultiLevelMAE
from jmae.nn.transformer import Block, Blocks, gelu

WIDTH, HEADS, SLOTS = 12, 3, 5
TINY = dict(size=(8, 12), patch=(4, 4), channels=1, width=24, depth=3, heads=2)
TINY |= dict(decoder_width=16, decoder_depth=1, decoder_heads=2)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def heads_of(x, heads):
    """(n, d) as (heads, n, d / heads)."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def attend(q, k, v, heads):
    q, k, v = (heads_of(x, heads) for x in (q, k, v))
    out = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) @ v
    return out.swapaxes(0, 1).reshape(out.shape[1], -1)


def randomised(make, seed=0):
    """What `make` makes, with every parameter drawn anew: zero biases and equal scales hide mistakes."""
    graph, params = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def jitted(module, *arrays, method="__call__"):
    graph, params = nnx.split(module)
    return jax.jit(lambda p, *a: getattr(nnx.merge(graph, p), method)(*a))(params, *arrays)


def tokens(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def block_by_hand(block, x):
    """One sample (n, d): Eq. 1 written out, with residuals and the MLP."""
    q, k, v = np.split(dense(block.qkv, norm(block.norm1, x)), 3, -1)
    if hasattr(block, "memory_k"):
        k = np.concatenate([k, np.asarray(block.memory_k[...]) * np.sqrt(x.shape[-1] // block.heads)])
        v = np.concatenate([v, np.asarray(block.memory_v[...]) * np.sqrt(block.memory)])
    u = x + dense(block.out, attend(q, k, v, block.heads))
    return u + dense(block.fc2, np.asarray(gelu(dense(block.fc1, norm(block.norm2, u)))))


class OneByOne(nnx.Module):
    """Blocks in a loop, the output of block i added to the input of block depth - 1 - i."""

    def __init__(self, blocks):
        self.blocks = blocks

    def outputs(self, x, *context):
        graph, stacked = nnx.split(self.blocks.stack)
        depth, outputs = self.blocks.depth, []
        for i in range(depth):
            source = depth - 1 - i
            x = x + outputs[source] if source < i - 1 else x  # neighbours are joined already
            x = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))(x, *context)
            outputs.append(x)
        return jnp.stack(outputs)

    def __call__(self, x, *context):
        return self.outputs(x, *context)[-1]


@pytest.mark.parametrize("slots", [0, 1, SLOTS])
def test_a_block_equals_the_written_out_formula_with_and_without_memory(slots):
    block = randomised(lambda: Block(WIDTH, HEADS, 4.0, jnp.float32, slots, rngs=nnx.Rngs(0)))
    assert {"memory_k", "memory_v"} & set(nnx.to_pure_dict(nnx.state(block))) == (
        {"memory_k", "memory_v"} if slots else set()
    )
    x = tokens(2, 7, WIDTH)
    found = jitted(block, x)
    assert found.shape == x.shape
    for i in range(2):
        np.testing.assert_allclose(found[i], block_by_hand(block, x[i].astype(float)), rtol=2e-4, atol=2e-4)


def test_memory_is_drawn_as_its_source_has_it_and_has_gradients():
    block = Block(64, 4, 1.0, jnp.float32, 400, rngs=nnx.Rngs(0))
    assert np.std(block.memory_k[...]) == pytest.approx(1 / 16, rel=0.02)  # 1 / d_h
    assert np.std(block.memory_v[...]) == pytest.approx(1 / 400, rel=0.02)  # 1 / m
    graph, params = nnx.split(block)
    x = tokens(1, 3, 64)
    grads = nnx.to_pure_dict(jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x) ** 2)))(params))
    assert all(np.abs(grads[name]).max() > 1e-6 for name in ("memory_k", "memory_v"))


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_long_skips_join_the_blocks_that_the_rule_names(depth):
    make = lambda: Block(WIDTH, HEADS, 2.0, jnp.float32, rngs=nnx.Rngs(0))
    blocks, x = randomised(lambda: Blocks(depth, make, long_skips=True)), tokens(2, 4, WIDTH)
    outputs = jitted(OneByOne(blocks), x, method="outputs")
    np.testing.assert_allclose(jitted(blocks, x), outputs[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jitted(blocks, x, method="outputs"), outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_network_has_long_skips_in_both_stacks():
    sizes = TINY | dict(depth=3, decoder_depth=3, memory=2, long_skips=True)
    mae = randomised(lambda: MultiLevelMAE(**sizes, rngs=nnx.Rngs(0)))
    order = np.array([[4, 1, 0, 2, 3, 5], [0, 3, 5, 1, 2, 4]])
    given = tokens(2, 6, 16), order[:, :2], np.argsort(order, 1)
    found = jitted(mae, *given)
    mae.encoder, mae.decoder = OneByOne(mae.encoder), OneByOne(mae.decoder)
    np.testing.assert_allclose(found, jitted(mae, *given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normed", [True, False], ids=["root", "no root"])
@pytest.mark.parametrize("gate", ["channel", "token"])
def test_the_multi_level_block_equals_a_loop_over_levels(gate, normed):
    levels, e, n = 4, 10, 6
    options = dict(levels=levels, level_width=e, gate=gate, normed=normed)
    block = randomised(lambda: MultiLevelBlock(WIDTH, HEADS, 2.0, jnp.float32, **options, rngs=nnx.Rngs(0)))
    y, x = tokens(2, n, WIDTH), np.swapaxes(tokens(2, levels, 5, e, seed=2), 0, 1)
    found = jitted(block, y, x)
    kernel, bias = (np.asarray(p[...], np.float64) for p in (block.gates.kernel, block.gates.bias))
    assert kernel.shape == (levels, 2 * WIDTH, WIDTH if gate == "channel" else 1)
    inner = block.attend
    for i in range(2):
        row = y[i].astype(float)
        q, k, v = np.split(dense(inner.qkv, norm(inner.norm1, row)), 3, -1)
        s = row + dense(inner.out, attend(q, k, v, HEADS))
        total = np.zeros_like(s)
        for level in range(levels):
            k, v = np.split(dense(block.key_value, norm(block.level_norm, x[level, i].astype(float))), 2, -1)
            c = dense(block.out, attend(dense(block.query, norm(block.norm, s)), k, v, HEADS))
            alpha = 1 / (1 + np.exp(-(np.concatenate([s, c], -1) @ kernel[level] + bias[level])))
            total += alpha * c
        r = s + total / (np.sqrt(levels) if normed else 1)
        expected = r + dense(inner.fc2, np.asarray(gelu(dense(inner.fc1, norm(inner.norm2, r)))))
        np.testing.assert_allclose(found[i], expected, rtol=2e-4, atol=2e-4)


def test_closed_gates_leave_the_plain_decoder_block():
    block = randomised(
        lambda: MultiLevelBlock(WIDTH, HEADS, 2.0, jnp.float32, levels=3, level_width=10, rngs=nnx.Rngs(0))
    )
    block.gates.kernel[...] = jnp.zeros_like(block.gates.kernel[...])
    block.gates.bias[...] = jnp.full_like(block.gates.bias[...], -200.0)
    y = tokens(2, 4, WIDTH)
    np.testing.assert_allclose(jitted(block, y, tokens(3, 2, 5, 10)), jitted(block.attend, y), rtol=1e-6, atol=1e-6)


def test_an_unknown_gate_is_refused():
    with pytest.raises(InputError, match=r"model\.gate is 'row': one of channel, token"):
        MultiLevelBlock(WIDTH, HEADS, 2.0, jnp.float32, levels=3, level_width=10, gate="row", rngs=nnx.Rngs(0))


@pytest.mark.long
def test_the_network_decodes_from_the_outputs_of_all_encoder_blocks():
    size, patch = (8, 8, 4), (4, 4, 2)
    mae = randomised(lambda: MultiLevelMAE(**TINY | dict(size=size, patch=patch, memory=4), rngs=nnx.Rngs(0)))
    count, values = int(np.prod(np.array(size) // patch)), int(np.prod(patch))
    patches, keep = tokens(2, count, values), np.array([[1, 3], [0, 2]])
    restore = np.argsort(np.concatenate([keep, [[i for i in range(count) if i not in row] for row in keep]], 1), 1)
    assert jitted(mae, patches, keep, restore).shape == patches.shape

    noise = tokens(2, 3, 24, seed=3)  # a norm takes away what is added to all channels alike

    def loss(at, patches):
        graph, params = nnx.split(mae)
        model = nnx.merge(graph, params)
        levels = model.encode(jnp.take_along_axis(model.embed(patches), keep[..., None], 1))
        assert levels.shape == (3, 2, 3, 24)
        return jnp.sum(model.decode(levels.at[at].add(noise), restore))

    loss = jax.jit(loss)
    values = [float(loss(level, patches)) for level in range(3)]  # every level counts, each in its own way
    assert len({round(value, 3) for value in [*values, float(jnp.sum(jitted(mae, patches, keep, restore)))]}) == 4
    hidden = jax.jit(jax.grad(lambda p: jnp.sum(loss(0, p)[None])))(patches)
    for i in range(2):
        unseen = [j for j in range(count) if j not in keep[i]]
        assert not np.any(hidden[i, unseen]) and np.all(np.abs(hidden[i, keep[i]]).max(-1) > 0)
