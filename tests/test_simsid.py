"""SimSID against its specification: memory by hand, layers against JAX's general ones, stages, calibration, scores."""

import csv
import json
import os
import signal
from functools import cache, partial
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from patients import voxel_auroc, write_patients
from scipy.special import expit
from scipy.stats import entropy

from configs import simsid as recipe
from jmae import checkpoint, programs, train
from jmae.data.manifest import Row
from jmae.errors import InputError, exit_code
from jmae.losses import discriminator_loss, histogram_kl, pixel_kl
from jmae.metrics import auroc
from jmae.nn import simsid as nets
from jmae.nn import simsid_published as published_nets
from jmae.nn.conv import upsample
from jmae.recipe import override
from jmae.run_folder import read_history
from jmae.sharding import device_mesh, place_batch, replicated
from jmae.system import Check, Stage, last_weights, load_system, network, stats_of
from jmae.systems import simsid, simsid_published, simsid_score
from jmae.target import Target, tracing_for

KEY = jax.random.key(0)
TINY = """
data.phantom= data.size=16,16 model.patch=4,4 model.widths=3,4 model.features=8 model.width=8 model.heads=2 model.mlp=12
model.depth=1 model.discriminator=3,4 memory.batch=4 memory.top_k=2 memory.threshold=0.9999 teacher.batch=4
student.batch=4 discriminator.batch=4 joint.batch=4 joint.widths=4,4,4 joint.joined=1 joint.slots=4 joint.top_k=2
joint.heads=2 teacher.steps=6 student.steps=6 discriminator.steps=6 joint.steps=6 validation.every=3
validation.samples=4 validation.select_every=3 evaluation.batch=4 evaluation.patch=4,4 evaluation.top=0.5
data.normalise=unit model.centre=retrieved student.from_teacher=false evaluation.score=simsid checkpoint_every=4
log_every=2
""".split()
VOLUMES = """
data.normalise=crop data.size=8,8,4 data.channels=2 model.patch=4,4,2 evaluation.stride=4,4,2 evaluation.batch=8
evaluation.patch=4,4,2 model.widths=3 model.discriminator=3
""".split()
near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
normal = lambda *shape, seed=0: np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def config(*changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    given = {f"config.{k}": v for k, _, v in (change.partition("=") for change in [*TINY, *changes])}
    override(c, given)
    return c


def arguments(manifest, workdir, *changes: str, preset: str = "smoke") -> list[str]:
    own = [f"--config.{change}" for change in [*TINY, f"data.manifest={manifest}", *changes]]
    return [f"--config=configs/simsid.py:{preset}", f"--workdir={workdir}", *own]


def batch(n: int = 4, size: tuple[int, ...] = (16, 16), channels: int = 1, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    image = rng.uniform(size=(n, *size, channels)).astype(np.float32)
    case = rng.integers(0, 2**32, (n, 2)).astype(np.uint32)
    return {"image": image, "index": np.arange(n, dtype=np.int32), "case": case}


def drawn(make, seed: int = 0):
    """An `init`'s arrays drawn in NumPy, without compiling it: kernels small, all else around 1 or 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(getattr(path[-1], "key", path[-1]))
        if leaf.dtype != jnp.float32:
            return np.zeros(leaf.shape, leaf.dtype)
        around = 1.0 if name in ("scale", "var") else 0.0
        return np.float32(around + rng.normal(0, 0.1 if around else 0.3, leaf.shape))

    return jax.tree.map_with_path(draw, jax.eval_shape(make))


def fresh(stage, results, seed: int = 0, n: int = 8):
    """A stage's first state with drawn weights, zero moments, and what its own init says of the rest."""
    state = drawn(lambda: stage.init(KEY, results, n), seed)
    return state.replace(opt=zeroed(state.opt))


def zeroed(tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def as_results(state) -> dict:
    return {"params": state.params, "stats": state.stats}


@cache
def compiled(*changes: str):
    """(system, {stage: its step}, score), each compiled once for all tests, and for the run at the end."""
    system = load_system(config(*changes))
    score = jax.jit(lambda results, some: system.score(results, some, KEY))

    def of(stage):
        mesh, phases = device_mesh(), stage.phases
        steps = {phase: programs.compiled_step(stage.step, stage.steps(8), 1, phase=phase) for phase in set(phases)}
        copy = lambda state: jax.device_put(jax.tree.map(np.array, state), replicated(mesh))  # it is donated
        step = lambda state: steps[phases[int(state.step) % len(phases)]]
        return lambda state, some, key, results: step(state)(copy(state), place_batch(some, mesh), key, results)

    return system, {stage.name: of(stage) for stage in system.stages}, score


@cache
def trained(*changes: str):
    """Results of every stage after a step, or a sweep over 8 images, from drawn weights.

    Its programs take half a minute to compile, so a test that needs them is long."""
    system, steps, _ = compiled(*changes)
    results = {}
    for stage in system.stages:
        swept = stage.name in ("memory", "calibration")
        state = stage.init(KEY, results, 8) if swept else fresh(stage, results, seed=len(results))
        for i in range(stage.steps(8) if swept else 1):
            some = {k: v[4 * (i % 2) : 4 * (i % 2) + 4] for k, v in batch(8, seed=1).items()}
            state, _ = steps[stage.name](state, some, KEY, dict(results))
        results[stage.name] = as_results(state)
    return results


@cache
def untrained():
    """Results of every stage with drawn weights. Nothing is compiled."""
    results = {}
    for number, stage in enumerate(load_system(config()).stages):
        swept = stage.name in ("memory", "calibration")
        results[stage.name] = as_results(stage.init(KEY, results, 8) if swept else fresh(stage, results, seed=number))
    return results


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "length"), [((8, 6), 5), ((7, 4), 3), ((4, 5, 6), 5)])
def test_halved_is_a_convolution_of_stride_two(size, length):
    rank = len(size)
    x, kernel = normal(2, *size, 3), normal(*[length] * rank, 3, 4, seed=1)
    axes = "xyz"[:rank]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    ends = [(length // 2, length // 2)] * rank
    theirs = jax.lax.conv_general_dilated(x, kernel, (2,) * rank, ends, dimension_numbers=numbers)
    near(nets.halved(jnp.asarray(x), jnp.asarray(kernel)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 2)])
def test_doubled_spreads_each_cell_over_four_outputs_an_axis(size):
    rank = len(size)
    x, kernel = normal(2, *size, 3), normal(*[4] * rank, 3, 2, seed=1)
    out = np.zeros((2, *(2 * n + 2 for n in size), 2), np.float32)  # with the padding of 1 that is cut off
    for at in np.ndindex(*size):
        for tap in product(range(4), repeat=rank):  # output u = 2 j - 1 + k of a flipped kernel
            place = tuple(2 * a + t for a, t in zip(at, tap, strict=True))
            own = kernel[tuple(3 - t for t in tap)]
            out[(slice(None), *place)] += x[(slice(None), *at)] @ own
    near(nets.doubled(jnp.asarray(x), jnp.asarray(kernel)), out[(slice(None), *[slice(1, -1)] * rank)], atol=1e-4)


def test_max_pool_is_the_largest_of_blocks():
    x = normal(2, 4, 6, 3)
    near(nets.max_pool(jnp.asarray(x)), x.reshape(2, 2, 2, 3, 2, 3).max((2, 4)))


def test_the_papers_networks_have_as_many_parameters_and_the_shapes_of_its_listings():
    patch, widths = (16, 16), (32, 64, 128, 256)
    f32, size = jnp.float32, (128, 128)
    makers = {
        405_248: lambda rngs: nets.Encoder(patch, 1, widths, 64, f32, rngs=rngs),
        67_814_561: lambda rngs: nets.Generator(size, 4096, widths[::-1], 1, False, f32, rngs=rngs),
        1_093_953: lambda rngs: nets.Discriminator(size, 1, (16, 32, 64, 128, 256), f32, rngs=rngs),
    }
    made = {n: network(make) for n, make in makers.items()}
    states = {n: jax.eval_shape(init, KEY) for n, (init, _) in made.items()}
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert [count(params) for params, _ in states.values()] == list(made)
    assert count(states[67_814_561][0]["dense"]) == 67_125_248
    image = jax.ShapeDtypeStruct((2, *size, 1), f32)
    run = lambda n, x: jax.eval_shape(lambda state, x: made[n][1](*state)(x, train=False), states[n], x)
    features = run(405_248, image)
    assert features.shape == (2, 64, 64)
    assert [x.shape for x in run(67_814_561, features)] == [(2, 2**i, 2**i, 2 ** (11 - i)) for i in (4, 5, 6)] + [
        (2, 128, 128, 1)
    ]
    assert run(1_093_953, image).shape == (2,)


@pytest.mark.long
def test_a_patch_s_features_are_its_own():
    own, rows = untrained()["teacher"], np.arange(16).reshape(4, 4)
    _, bind = network(lambda rngs: nets.Encoder((4, 4), 1, (3, 4), 8, jnp.float32, rngs=rngs))
    encode = lambda image: bind(own["params"]["encoder"], own["stats"]["encoder"])(image, train=False)
    image = batch(1)["image"]
    changed = image.copy()
    changed[:, 4:8, 8:12] += 1  # the patch of row 1, column 2
    apart = np.abs(np.asarray(encode(jnp.asarray(image)) - encode(jnp.asarray(changed)))).max((0, 2))
    assert list(np.flatnonzero(apart)) == [rows[1, 2]]


# --- memory -----------------------------------------------------------------------------------------------------------


def plain_write(rows, values, threshold, ema):
    """Algorithms 4.4 and 4.5 by hand: rows (slots, s, d) as lists of arrays in order of writing; one image's values."""
    written = []
    for slot, value in enumerate(values):
        empty = not any(np.abs(row).sum() for row in rows[slot])
        if ema:
            rows[slot][0] = value if empty else (1 - ema) * rows[slot][0] + ema * value
            written.append(True)
            continue
        most = -np.inf
        for row in rows[slot]:
            most = max(most, row @ value / (np.linalg.norm(row) * np.linalg.norm(value) + 1e-8))
        written.append(bool(most < threshold or empty))
        if written[-1]:
            rows[slot].pop(0)  # the oldest
            rows[slot].append(value)
    return written


@pytest.mark.parametrize(("s", "ema", "threshold"), [(1, 0.0, 0.5), (1, 0.1, 0.5), (3, 0.0, 0.7), (1, 0.0, 1.0)])
def test_memory_writes_what_a_plain_loop_writes(s, ema, threshold):
    rng = np.random.default_rng(3)
    base = rng.normal(size=(5, 6))
    stream = np.float32(base + rng.normal(0, 0.7, (20, 5, 6)))  # like the base, now and then not
    rows = [[np.zeros(6) for _ in range(s)] for _ in range(5)]
    expected = [plain_write(rows, image, threshold, ema) for image in stream]
    memory = jnp.zeros((5, s, 6)), jnp.zeros(5, jnp.int32)
    run = jax.jit(partial(nets.write_all, threshold=threshold, ema=ema))
    parts = []
    for start in (0, 10):  # in batches as in one go
        memory, written = run(memory, jnp.asarray(stream[start : start + 10]), jnp.ones(10, bool))
        parts.append(written)
    assert np.array_equal(np.concatenate(parts), expected)
    assert ema or np.all(expected[0])  # the first write into an empty slot always happens
    near(np.sort(memory[0], 1), np.sort(np.float32(rows), 1), rtol=1e-4)
    unchanged, none = run(memory, jnp.asarray(stream[:10]), jnp.zeros(10, bool))
    jax.tree.map(np.testing.assert_array_equal, unchanged, memory)
    assert not none.any()


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (2, 4, 3)])
def test_levels_are_patches_means_of_blocks_and_the_largest(grid):
    slots, f = nets.hierarchy(grid, 3), normal(2, prod(grid), 6)
    blocks = {at: [] for at in np.ndindex(*(-(-n // 2) for n in grid))}
    for number, at in enumerate(np.ndindex(*grid)):
        blocks[tuple(a // 2 for a in at)].append(number)
    expected = [f, np.stack([f[:, own].mean(1) for own in blocks.values()], 1), f.max(1, keepdims=True)]
    near(nets.summaries(jnp.asarray(f), slots), np.concatenate(expected, 1))
    for slot, own in enumerate(blocks.values()):
        assert set(np.flatnonzero(slots[1] == slot)) == set(own)
    assert [own.max() + 1 for own in slots] == [prod(grid), len(blocks), 1]
    assert len(nets.hierarchy(grid, 2)) == 2


def plain_retrieve(query, rows, noise, k, temperature, weighted):
    """One query's retrieval by hand."""
    scores = [(float(row @ query) + float(noise[i])) / temperature for i, row in enumerate(rows)]
    p = np.exp(scores - np.max(scores))
    p /= p.sum()
    best = sorted(range(len(rows)), key=lambda i: -p[i])[:k]
    total = sum(p[i] for i in best)
    return sum((p[i] / total if weighted else 1.0) * rows[i] for i in best)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_retrieval_is_the_plain_one_for_given_noise(own, weighted):
    query, noise = normal(2, 4, 6), normal(2, 4, 7, seed=2)
    rows = normal(4, 7, 6, seed=1) if own else normal(7, 6, seed=1)
    given = dict(k=3, temperature=0.7, weighted=weighted)
    out = jax.jit(lambda: nets.retrieve(query, rows, noise=noise, **given))()
    for b, n in np.ndindex(2, 4):
        near(out[b, n], plain_retrieve(query[b, n], rows[n] if own else rows, noise[b, n], **given), rtol=1e-4)


@pytest.mark.parametrize("restrict", [True, False])
def test_recall_joins_the_levels(restrict):
    slots, f = nets.hierarchy((4, 4), 3), normal(2, 16, 6)
    memory, count = normal(16 + 4 + 1, 3, 6, seed=1), np.resize([1, 3, 7, 2], 21)  # 7: rows were replaced
    run = jax.jit(lambda keys=None: nets.recall((memory, count), f, slots, k=2, restrict=restrict, keys=keys))
    out = run()
    starts = np.cumsum([0, 16, 4])
    for b, n, level in product(range(2), range(16), range(3)):
        own = starts[level] + (slots[level][n : n + 1] if restrict else np.arange(slots[level].max() + 1))
        rows = np.concatenate([memory[slot, : count[slot]] for slot in own])  # a row never written is not found
        expected = plain_retrieve(f[b, n], rows, np.zeros(len(rows)), 2, 1.0, True)
        near(out[b, n, 6 * level : 6 * level + 6], expected, rtol=1e-4)
    noisy = lambda seed: run(jax.random.split(jax.random.key(seed)))
    assert np.array_equal(noisy(0), noisy(0)) and not np.allclose(noisy(0), noisy(1))


def test_gumbel_noise_makes_rows_win_as_often_as_their_softmax_says():
    query, rows = jnp.broadcast_to(jnp.asarray([1.0, 0.5]), (1, 4000, 2)), jnp.asarray([[1.0, 0], [0, 1.0], [0.3, 0.2]])
    memory = rows[:, None], np.ones(3, int)
    out = jax.jit(lambda keys: nets.recall(memory, query, [np.arange(3)], k=1, keys=keys))(KEY[None])[0]
    won = [np.mean(np.all(np.isclose(out, row), -1)) for row in rows]
    np.testing.assert_allclose(won, jax.nn.softmax(rows @ query[0, 0]), atol=0.03)


def test_all_rows_at_low_temperature_are_the_nearest():
    rows = normal(7, 6)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    query = rows[None, [4, 2]] + 0.1 * normal(1, 2, 6, seed=1)
    near(nets.retrieve(jnp.asarray(query), jnp.asarray(rows), k=7, temperature=1e-3)[0], rows[[4, 2]])


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_pass_the_choice_straight_through(weighted):
    query, rows, out = jnp.asarray(normal(1, 3, 6)), jnp.asarray(normal(5, 6, seed=1)), normal(1, 3, 6, seed=2)
    hard = lambda q, m: jnp.vdot(nets.retrieve(q, m, k=2, weighted=weighted), out)
    soft = lambda q, m: jnp.vdot(jax.nn.softmax(q @ m.T) @ m, out)
    (dq, dm), (soft_q, _) = jax.grad(hard, (0, 1))(query, rows), jax.grad(soft, (0, 1))(query, rows)
    near(dq, soft_q)  # backward as if all soft weights had been used
    p = np.asarray(jax.nn.softmax(query @ rows.T))[0]
    chosen = np.argsort(-p, 1)[:, :2]
    w = np.zeros_like(p)
    np.put_along_axis(w, chosen, np.take_along_axis(p, chosen, 1) if weighted else 1.0, 1)
    w = w / w.sum(1, keepdims=True) if weighted else w
    through = jax.grad(lambda m: jnp.vdot(jax.nn.softmax(query @ m.T) @ jax.lax.stop_gradient(rows), out))(rows)
    near(dm, w.T @ out[0] + through, rtol=1e-4)  # the chosen weights on the rows, the soft ones on the scores


@pytest.mark.parametrize(
    ("grid", "centre"), [((4, 3), "retrieved"), ((2, 3, 2), "retrieved"), ((1, 3), "raw"), ((3, 3), "mask")]
)
def test_inpainting_all_positions_equals_a_loop_over_them(grid, centre):
    rank, n = len(grid), prod(grid)
    make = lambda rngs: nets.Inpainting(rank, 12, 8, 8, 2, 2, 16, 0.1, centre, jnp.float32, rngs=rngs)
    init, bind = network(make)
    params = drawn(lambda: init(KEY)[0])
    net, recalled, f = bind(params), normal(2, n, 12), normal(2, n, 8, seed=1)
    whole = jax.jit(lambda params: bind(params)(recalled, f, grid))(params)
    sequences = []
    projected = np.asarray(net.project(jnp.asarray(recalled))).reshape(2, *grid, 8)
    for b, at in product(range(2), np.ndindex(*grid)):
        tokens = []
        for offset in product((-1, 0, 1), repeat=rank):
            place = tuple(a + o for a, o in zip(at, offset, strict=True))
            inside = all(0 <= p < g for p, g in zip(place, grid, strict=True))
            if any(offset):
                tokens.append(projected[(b, *place)] if inside else np.zeros(8))
        number = np.ravel_multi_index(at, grid)
        own = {"retrieved": projected[(b, *at)], "raw": f[b, number], "mask": params.get("token")}[centre]
        sequences.append([*tokens, own])

    @jax.jit
    def every_token_through_every_layer(params, x):
        net = bind(params)
        x = x + net.positions[...]
        for layer in net.layers:
            x = layer(x, x, None)
        return net.out(x[:, -1])

    expected = every_token_through_every_layer(params, np.float32(sequences))
    near(whole, np.reshape(expected, whole.shape), rtol=1e-4, atol=1e-4)


def test_dropout_is_each_image_s_own_and_off_without_keys():
    recalled, f, keys = normal(2, 4, 12), normal(2, 4, 8, seed=1), jax.random.split(KEY, 2)

    def run(rate):
        make = lambda rngs: nets.Inpainting(2, 12, 8, 8, 1, 2, 16, rate, "retrieved", jnp.float32, rngs=rngs)
        init, bind = network(make)
        params = drawn(lambda: init(KEY)[0])
        return jax.jit(lambda keys=None: bind(params)(recalled, f, (2, 2), keys))

    half, none = run(0.5), run(0.0)
    near(none(keys), half())
    assert not np.allclose(half(keys), half(), atol=1e-3)
    other = half(jnp.stack([keys[0], jax.random.key(9)]))
    near(other[0], half(keys)[0])
    assert not np.allclose(other[1], half(keys)[1], atol=1e-3)


def test_a_transformer_layer_is_pytorch_s_post_norm_one():
    torch = pytest.importorskip("torch")
    make = lambda rngs: nets.Attend(8, 2, 12, 0.0, jnp.float32, rngs=rngs)
    init, bind = network(make)
    net = bind(drawn(lambda: init(KEY)[0]))
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, layer_norm_eps=1e-6).eval()
    tensor = lambda x: torch.from_numpy(np.array(x))
    joined = lambda what: np.concatenate([np.asarray(net.q.__dict__[what]), np.asarray(net.kv.__dict__[what])], -1)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(tensor(joined("kernel").T))
        theirs.self_attn.in_proj_bias.copy_(tensor(joined("bias")))
        for a, b in ((theirs.self_attn.out_proj, net.out), (theirs.linear1, net.fc1), (theirs.linear2, net.fc2)):
            a.weight.copy_(tensor(b.kernel[...].T))
            a.bias.copy_(tensor(b.bias[...]))
        for a, b in ((theirs.norm1, net.norm1), (theirs.norm2, net.norm2)):
            a.weight.copy_(tensor(b.scale[...]))
            a.bias.copy_(tensor(b.bias[...]))
        x = normal(3, 5, 8)
        near(net(jnp.asarray(x), jnp.asarray(x), None), theirs(tensor(x)), rtol=1e-4, atol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_discriminator_s_loss_is_the_binary_cross_entropy():
    real, fake = normal(5) * 3, normal(5, seed=1) * 3
    expected = -np.mean(np.log(expit(real))) - np.mean(np.log(1 - expit(fake)))
    near(discriminator_loss(jnp.asarray(real), jnp.asarray(fake)), expected)
    near(discriminator_loss(jnp.zeros(3), jnp.zeros(3)), 2 * np.log(2))
    assert np.isfinite(discriminator_loss(jnp.asarray([-1e4]), jnp.asarray([1e4])))


@pytest.mark.long
def test_both_divergences_by_scipy():
    p, q = (np.random.default_rng(i).uniform(0.3, 0.95, (3, 20, 20, 1)).astype(np.float32) for i in range(2))
    q = p + 0.05 * (q - 0.65)
    flat = lambda x: x.reshape(3, -1).astype(float)
    near(pixel_kl(p, q), [entropy(a, b) for a, b in zip(flat(p), flat(q), strict=True)], rtol=1e-3)
    peak = np.eye(4, dtype=np.float32)[:2, :, None]  # all mass on one pixel: epsilon is added to masses, not to pixels
    masses = [(m + 1e-10) / (1 + 4e-10) for m in np.eye(4)[:2]]
    near(pixel_kl(0.01 * peak[:1], peak[1:]), entropy(*masses), rtol=1e-4)
    near(pixel_kl(0 * peak[:1], 1 + 0 * peak[:1]), 0)
    near(pixel_kl(p, q), 0.5 * np.var(q - p, (1, 2, 3)) / np.mean(p, (1, 2, 3)) ** 2, rtol=0.3, atol=0)
    counts = lambda x: np.stack([np.histogram(own, 256, (0, 1))[0] / own.size + 1e-10 for own in x])
    theirs = [entropy(a, b) for a, b in zip(counts(p), counts(q), strict=True)]
    near(histogram_kl(p, q), theirs, rtol=1e-3)
    for form in (pixel_kl, histogram_kl):
        near(form(p, p), 0, atol=1e-6)
        assert (np.asarray(form(p, q)) > 0).all()
    near(pixel_kl(p - 1, p + 3), pixel_kl(np.clip(p - 1, 0, 1), np.clip(p + 3, 0, 1)))


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_preset_is_a_system():
    for preset in recipe.PRESETS:
        c = recipe.get_config(preset)
        if c.variant == "official":
            c.variant = "report"
        names = ["teacher", "memory", "student", "discriminator", "calibration"]
        assert [stage.name for stage in load_system(c).stages] == names
        c.variant = "official"
        assert [stage.name for stage in load_system(c).stages] == ["joint", "calibration"]


def test_the_papers_stages_have_the_steps_of_its_epochs():
    c = recipe.get_config("paper")
    assert [stage.steps(1024) for stage in load_system(c).stages] == [64_000, 128, 16_064, 6_400, 64]
    assert max(simsid.PUBLISHED["student"]["mse"]) == c.student.epochs  # the report's last value is reached
    c.variant, c.joint.batch = "official", 8
    assert [stage.steps(1024) for stage in load_system(c).stages] == [76_800, 128]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("evaluation.patch=5,4", "is not divisible by patch"),
        ("model.patch=5,4", "is not divisible by patch"),
        ("model.patch=2,2", r"model.patch \(2, 2\): 2 poolings need multiples of 4"),
        ("model.heads=3", "width 8 is not divisible by 3 heads"),
        ("model.widths=", "model.widths is empty"),
        ("model.centre=raw model.width=16", "model.centre=raw needs model.width 16 equal to model.features 8"),
        ("memory.ema=0.5 memory.slots=2", "memory.ema=0.5 moves one row of a place"),
        ("variant=official joint.windows=2", "joint.windows is"),
        ("variant=official data.size=20,16", r"joint.windows \(2, 2\) need multiples of \(8, 8\)"),
        ("variant=official joint.joined=2", "joint.joined is from 1 to 1"),
        ("variant=official joint.queue=true joint.slots=3", "a batch of 4 does not fit into joint.slots=3"),
        ("variant=official model.discriminator=2,2,2,2", "joint.judge=image: the last norm of the discriminator"),
        ("model.weights=model.pth", "model.weights are those of the published code: set variant=official"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(change, line):
    with pytest.raises(InputError, match=line) as error:
        load_system(config(*change.split()))
    assert "\n" not in str(error.value)


# --- stages -----------------------------------------------------------------------------------------------------------


def moved(before, after) -> dict[str, bool]:
    change = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before, after)
    return {name: all(jax.tree.leaves(part)) for name, part in change.items()}


@pytest.mark.parametrize("encoder", ["joint", "frozen_random"])
@pytest.mark.long_but_first
def test_the_teacher_trains_its_encoder_or_leaves_it_as_drawn(encoder):
    stage = load_system(config(f"model.encoder={encoder}")).stages[0]
    state = fresh(stage, {})
    new, metrics = jax.jit(partial(stage.step, steps=4))(state, batch(), KEY, {})
    assert moved(state.params, new.params) == {"encoder": encoder == "joint", "generator": True}
    same = jax.tree.leaves(jax.tree.map(np.array_equal, state.stats["encoder"], new.stats["encoder"]))
    assert (encoder == "joint") != all(same) and metrics["loss"] > 0


@pytest.mark.long
def test_the_second_pass_writes_less_and_the_last_batch_writes_no_image_a_third_time():
    stage = load_system(config("memory.threshold=0.5")).stages[1]
    state, shares, step = stage.init(KEY, trained(), 6), [], jax.jit(partial(stage.step, steps=4))
    assert stage.steps(6) == 3 and not stage.shuffle
    for i in range(4):
        numbers = np.arange(4 * i, 4 * i + 4) % 6  # in order, round and round
        before = state
        state, metrics = step(state, {k: v[numbers] for k, v in batch(6).items()}, KEY, trained())
        shares.append(float(metrics["written_level_0"]))
    assert state.stats["left"] == 0 and shares[0] >= 0.25 and shares[2] < shares[0] and shares[3] == 0
    jax.tree.map(np.testing.assert_array_equal, state.stats, before.stats)
    assert set(metrics) == {f"{what}_level_{i}" for what in ("overwritten", "written") for i in range(3)}


@pytest.mark.long
def test_overwritten_slots_are_those_that_were_full():
    """An image that no slot knows: it fills the empty ones, then overwrites all; the same image again writes none."""
    stage = load_system(config("memory.threshold=1.0", "memory.levels=1", "memory.batch=1")).stages[1]
    state, step = stage.init(KEY, trained(), 3), jax.jit(partial(stage.step, steps=6))
    found = []
    for seed in (1, 2, 3):
        state, metrics = step(state, batch(1, seed=seed), KEY, trained())
        found.append((float(metrics["overwritten_level_0"]), float(metrics["written_level_0"])))
    assert found == [(0, 1), (1, 1), (1, 1)]


@pytest.mark.long
def test_the_student_s_losses_by_hand():
    (system, steps, _), results = compiled(), trained()
    state, image = fresh(system.stages[2], results), batch()["image"]
    silence = lambda params: params | {"generator": zeroed(params["generator"])}
    teacher = results["teacher"] | {"params": silence(results["teacher"]["params"])}
    silent, results = state.replace(params=silence(state.params)), results | {"teacher": teacher}
    _, metrics = steps["student"](silent, batch(), KEY, results)
    assert metrics["distillation"] == 0  # equal generators
    near(metrics["mse"], np.mean(image**2))
    silent.params["generator"]["out"]["bias"] = jnp.full(1, 0.5)
    _, metrics = steps["student"](silent, batch(), KEY, results)
    near(metrics["distillation"], 0.25)  # of the image alone: the mean over it
    near(metrics["loss"], np.mean((image - 0.5) ** 2) + 0.1 * 0.25)
    silent.params["generator"]["layers"][0]["norm"]["bias"] = jnp.asarray([3.0, -3.0, 0.0])  # 3, 0, 0 after ReLU
    _, metrics = steps["student"](silent, batch(), KEY, results)
    near(metrics["distillation"], 3.0 + 0.25)  # the sum of each layer's mean


@pytest.mark.long
def test_the_adversarial_student_trains_its_discriminator_too():
    results = trained()
    stages = load_system(config("student.adversarial=100.0", "model.inpainting=false")).stages
    assert [stage.name for stage in stages] == ["teacher", "student", "discriminator", "calibration"]
    stage = stages[1]
    state, step = fresh(stage, results), jax.jit(partial(stage.step, steps=4))
    new, metrics = step(state, batch(), KEY, results)
    assert moved(state.params, new.params) == {"generator": True, "discriminator": True}
    near(metrics["loss"], metrics["mse"] + 0.1 * metrics["distillation"] + 100 * metrics["adversarial"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))
    judge = stages[2].init(KEY, results | {"student": as_results(new)}, 8)
    jax.tree.map(np.testing.assert_array_equal, judge.params, new.params["discriminator"])
    # With a hundred times the weight of all else: the generator has learned to look real to the D that it knew, and D,
    # by its own loss alone, to tell them apart.
    mixed = lambda *names: state.replace(params=state.params | {n: new.params[n] for n in names})
    after = lambda *names: step(mixed(*names), batch(), KEY, results)[1]
    assert after("generator")["adversarial"] < metrics["adversarial"]
    assert after("discriminator")["discriminator"] < metrics["discriminator"]
    assert after("discriminator")["adversarial"] > metrics["adversarial"]


@pytest.mark.long
def test_the_student_is_a_function_of_its_key_and_trains_inpainting_and_generator():
    (system, steps, _), results = compiled(), trained()
    state = fresh(system.stages[2], results)
    (new, one), (_, again), (_, other) = (
        steps["student"](state, batch(), jax.random.key(k), results) for k in (0, 0, 1)
    )
    assert one["loss"] == again["loss"] != other["loss"]
    assert moved(state.params, new.params) == {"generator": True, "inpainting": True}


def test_every_option_has_its_shapes():
    changes = "memory.slots=2 memory.restrict=true memory.levels=2 memory.weighted=false"
    changes += " model.centre=mask model.sigmoid=true student.kept=0.5"
    results, (_, memory, student, *_) = untrained(), load_system(config(*changes.split())).stages
    shape = lambda stage, results: jax.eval_shape(
        lambda state, some: stage.step(state, some, KEY, results, steps=4),
        jax.eval_shape(lambda: stage.init(KEY, results, 8)),
        batch(),
    )
    state, metrics = shape(memory, results)
    assert state.stats["rows"].shape == (16 + 4, 2, 8) and len(metrics) == 4
    state, _ = shape(student, results | {"memory": {"params": {}, "stats": zeroed(state.stats)}})
    assert state.params["inpainting"]["token"].shape == (8,)
    assert state.params["inpainting"]["project"]["kernel"].shape == (2 * 8, 8)


def test_the_memory_s_options_reach_the_retrieval(monkeypatch):
    seen, results = [], untrained()
    monkeypatch.setattr(
        simsid, "recall", lambda *args, **options: seen.append(options) or nets.recall(*args, **options)
    )
    changes = "memory.top_k=3 memory.temperature=0.5 memory.weighted=false memory.restrict=true"
    stage = load_system(config(*changes.split())).stages[2]
    step = lambda state, some: stage.step(state, some, KEY, results, steps=4)
    jax.eval_shape(step, fresh(stage, results), batch())
    options = {"k": 3, "temperature": 0.5, "weighted": False, "restrict": True}
    assert {k: seen[0][k] for k in options} == options
    assert seen[0]["keys"] is not None  # Gumbel noise in training


@pytest.mark.long
def test_a_student_may_start_from_the_teacher():
    results, stage = untrained(), load_system(config("student.from_teacher=true")).stages[2]
    own = stage.init(KEY, results, 8)
    jax.tree.map(np.testing.assert_array_equal, own.params["generator"], results["teacher"]["params"]["generator"])
    jax.tree.map(np.testing.assert_array_equal, own.stats["generator"], results["teacher"]["stats"]["generator"])


def judge_of(params):
    """D as in training, which its batch's statistics decide."""
    init, bind = network(lambda rngs: nets.Discriminator((16, 16), 1, (3, 4), jnp.float32, rngs=rngs))
    stats = jax.tree.map(jnp.zeros_like, jax.eval_shape(init, KEY)[1])
    return lambda image: bind(params, stats)(jnp.asarray(image), train=True)


@pytest.mark.long
def test_the_discriminator_takes_given_images_for_real_and_made_ones_for_fake():
    (system, steps, score), results = compiled(), trained()
    student = results["student"]["params"]
    out = {"kernel": 0.01 * student["generator"]["out"]["kernel"], "bias": np.full(1, 0.5, np.float32)}  # within [0, 1]
    params = student | {"generator": student["generator"] | {"out": out}}
    results = results | {"student": results["student"] | {"params": params}}
    state, some = fresh(system.stages[3], results), batch(seed=9)
    made = score(results, some)["reconstruction"]
    assert 0 < made.min() and made.max() < 1
    d = judge_of(state.params)
    real, fake = d(some["image"]), d(made)
    _, metrics = steps["discriminator"](state, some, KEY, results)
    near(metrics["loss"], discriminator_loss(real, fake), rtol=1e-3)
    assert abs(discriminator_loss(fake, real) - metrics["loss"]) > 0.01
    near([metrics["real"], metrics["fake"]], [real.mean(), fake.mean()], rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_the_best_weights_on_labelled_images_are_those_that_judge():
    system, _, score = compiled()
    stage, some = system.stages[3], batch(8, seed=3)
    state = jax.jit(lambda results: stage.init(KEY, results, 8))(trained())
    check, label = stage.checks[0], np.array([0, 1, 0, 0, 1, 1, -1, -1], np.int32)
    looked = jax.jit(check.look)
    look = lambda state, some: looked(state, some, trained())
    found = look(state, some | {"label": label})[1]["check_auroc"]
    results = trained() | {"discriminator": as_results(state)}
    ranks = lambda results: np.concatenate(
        [score(results, {k: v[s] for k, v in some.items()})["scores"]["simsid"] for s in (slice(4), slice(4, 8))]
    )
    near(found, auroc(label[:6], ranks(results)[:6]))
    turned = state.replace(params=state.params | {"out": {"kernel": -state.params["out"]["kernel"], "bias": 0 * found}})
    found = [float(look(s, some | {"label": label})[1]["check_auroc"]) for s in (state, turned)]
    near(sum(found), 1)
    better, worse = (state, turned)[int(np.argmax(found))], (state, turned)[int(np.argmin(found))]
    kept = look(better, some | {"label": label})[0]
    kept = look(worse.replace(stats=kept.stats), some | {"label": label})[0]  # the last weights are the worse ones
    scored = lambda state: ranks(trained() | {"discriminator": as_results(state)})
    near(scored(kept), scored(better))
    rows = [Row(f"r{i}", "", "val", int(i == 3), ("x.png",)) for i in range(4)] + [Row("t", "", "train", 0, ("x",))]
    assert list(check.rows(rows)) == [0, 1, 2, 3] and not len(check.rows(rows[:3]))
    assert [stage.checks for stage in load_system(config("select=last")).stages[3:]] == [(), ()]


def test_held_out_patients_are_checked_and_not_trained_on():
    rows = [Row(f"r{i}", f"p{i // 2}", "train", 0, ("x.png",)) for i in range(40)] + [Row("t", "", "test", 1, ("x",))]
    stage = load_system(config("validation.held_out=0.2", "validation.samples=8")).stages[0]
    used, checked = set(stage.rows(rows, {})), set(stage.checks[0].rows(rows))
    assert used | checked == set(range(40)) and not used & checked and len(checked) == 8
    look = jax.jit(stage.checks[0].look)
    state = fresh(stage, {})
    state = state.replace(params={**state.params, "generator": zeroed(state.params["generator"])})
    same, found = look(state, batch(), {})
    near(found["check_mse"], np.mean(batch()["image"] ** 2))
    black = np.zeros_like(batch()["image"])
    near(found["check_kl"], np.mean(pixel_kl(batch()["image"], black)))
    near(found["check_kl_histogram"], np.mean(histogram_kl(batch()["image"], black)), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same.params, state.params)


@pytest.mark.long
def test_the_official_step_alternates():
    system, steps, _ = compiled("variant=official")
    state = fresh(system.stages[0], {})
    step = lambda state, some, key: steps["joint"](state, some, key, {})
    both, metrics = step(state, batch(), KEY)
    assert moved(state.params, both.params) == {"network": True, "discriminator": True}
    critic, _ = step(both, batch(), jax.random.fold_in(KEY, 1))
    assert moved(both.params["discriminator"], critic.params["discriminator"])
    jax.tree.map(np.testing.assert_array_equal, critic.params["network"], both.params["network"])
    jax.tree.map(np.testing.assert_array_equal, critic.opt["network"], both.opt["network"])
    w = recipe.get_config("smoke").joint.weights
    # Black images stay black when moved, and a decoder without kernel makes grey ones: D's terms by hand.
    out = state.params["network"]["student"]["out"]
    student = state.params["network"]["student"] | {"out": {"kernel": 0 * out["kernel"], "bias": np.full(1, 0.3, "f")}}
    grey = state.replace(params=state.params | {"network": state.params["network"] | {"student": student}})
    black = batch() | {"image": np.zeros((4, 16, 16, 1), np.float32)}
    after, known = step(grey, black, KEY)
    images = np.full((4, 16, 16, 1), -1.0), np.full((4, 16, 16, 1), np.tanh(0.3))
    real, fake = (judge_of(state.params["discriminator"])(np.float32(x)) for x in images)
    near(known["discriminator"], w.discriminator * discriminator_loss(real, fake), rtol=1e-3)
    assert abs(discriminator_loss(fake, real) - discriminator_loss(real, fake)) > 0.01
    fake = judge_of(after.params["discriminator"])(np.float32(images[1]))  # D after its step
    near(known["adversarial"], jnp.mean(jax.nn.softplus(-fake)), rtol=1e-3)
    near([known["reconstruction"]], np.mean((images[0] - images[1]) ** 2), rtol=1e-4)
    total = sum(w[name] * metrics[name] for name in ("reconstruction", "teacher", "distillation", "adversarial"))
    near(metrics["loss"], total)
    near(metrics["lr"], 1e-3)
    half = step(both.replace(step=jnp.int32(3)), batch(), KEY)[1]["lr"]  # half of the 6 steps
    near([half, step(both.replace(step=jnp.int32(6)), batch(), KEY)[1]["lr"]], [5e-4, 1e-3])


@pytest.mark.long
def test_the_official_step_is_two_programs_and_neither_computes_for_the_other():
    system, steps, _ = compiled("variant=official")
    stage = system.stages[0]
    assert stage.phases == (True, False)
    assert load_system(config("variant=official", "joint.critic=4")).stages[0].phases == (True, False, False, False)
    start, some = jax.tree.map(jnp.asarray, fresh(stage, {})), batch()
    flops = lambda function, *args: jax.jit(function).lower(*args).cost_analysis()["flops"]
    step = lambda phase: flops(lambda state: stage.step(state, some, KEY, {}, steps=6, phase=phase)[0], start)
    c = config("variant=official")
    remake = simsid_published.method(c).remake
    made = flops(lambda image: remake({"joint": last_weights(start)}, image), some["image"])
    both, critic = step(True), step(False)
    # The network forward is most of the one; its gradient, as two networks more, is in the other alone. D is small.
    assert made < critic < 2 * made and both - critic > 2 * made
    # A round of both on the device is the two steps one after the other.
    mesh = device_mesh()
    several = programs.compiled_steps(stage.step, stage.steps(8), 1, (), mesh, stage.phases, 4)
    some = [batch(4, seed=i) for i in range(4)]
    whole = jax.device_put(jax.tree.map(np.array, start), replicated(mesh))
    stacked = place_batch(jax.tree.map(lambda *arrays: np.stack(arrays), *some), mesh, axis=1)
    whole, found = several(whole, stacked, KEY, {})
    for i, each in enumerate(some):
        start, metrics = steps["joint"](start, each, KEY, {})
        near([found[name][i] for name in metrics], [*metrics.values()], rtol=1e-5, atol=1e-6)
    jax.tree.map(partial(near, rtol=1e-2, atol=1e-3), whole.stats, start.stats)  # after steps of Adam
    assert whole.step == 4


# --- calibration and scores -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_calibration_is_the_mean_and_deviation_over_all_training_images():
    (system, steps, score), results = compiled(), trained()
    stage, images = system.stages[-1], batch(6, seed=5)
    state = stage.init(KEY, results, 6)
    assert stage.steps(6) == 2
    one = {"mean": jnp.zeros(2), "squares": jnp.ones(2), "count": jnp.int32(1), "left": jnp.int32(0)}
    raw, logits = results | {"calibration": {"params": {}, "stats": one}}, []
    for numbers in ([0, 1, 2, 3], [4, 5, 0, 1]):  # the last batch goes on from the start
        some = {k: v[numbers] for k, v in images.items()}
        state, _ = steps["calibration"](state, some, KEY, results)
        p = {name: np.asarray(v, float) for name, v in score(raw, some)["scores"].items()}
        logits += [-p["simsid"], -p["difference"]]  # D(made), D(image) - D(made)
    d = np.array([np.concatenate(logits[0::2]), np.concatenate(logits[1::2])])[:, :6]
    near(state.stats["mean"], d.mean(1), rtol=1e-3, atol=1e-4)
    near(np.sqrt(state.stats["squares"] / state.stats["count"]), d.std(1), rtol=1e-2, atol=1e-4)
    assert state.stats["count"] == 6 and state.stats["left"] == 0


@pytest.mark.long
@pytest.mark.parametrize("variant", ["report", "official"])
def test_scores_say_how_unreal_the_made_image_is(variant):
    (_, _, score), results = compiled(f"variant={variant}"), trained(f"variant={variant}")
    some = batch(4, seed=7)
    out = score(results, some)
    image, made = some["image"], np.asarray(out["reconstruction"])
    assert set(out["maps"]) == {"l1", "mse", "patches"}
    assert set(out["scores"]) == {"simsid", "difference", "A", "l1", "mse", "patches", "kl", "kl_teacher"}
    near(out["scores"]["kl"], pixel_kl(image, made), rtol=1e-3)
    near(out["scores"]["kl_teacher"], pixel_kl(image, out["pictures"]["reconstruction by the teacher"]), rtol=1e-3)
    assert out["maps"]["l1"].shape == (4, 16, 16) and made.shape == image.shape
    inside = (made > 0) & (made < 1)
    assert inside.any()
    near(np.asarray(out["maps"]["l1"])[inside[..., 0]], np.abs(image - made)[inside], atol=1e-4)
    for name in ("l1", "mse"):
        near(out["scores"][name], np.mean(out["maps"][name], (1, 2)))
    if inside.all():
        cells = np.mean((image - made).reshape(4, 4, 4, 4, 4), (2, 4)) ** 2  # of 4 x 4 pixels
        near(out["maps"]["patches"], cells.repeat(4, 1).repeat(4, 2), rtol=1e-3)
    cells = np.asarray(out["maps"]["patches"])[:, ::4, ::4].reshape(4, -1)
    near(out["scores"]["patches"], np.sort(cells, 1)[:, -8:].mean(1))  # evaluation.top: half of them
    assert np.array_equal(score(results, some)["scores"]["simsid"], out["scores"]["simsid"])  # no noise
    alone = score(results, {k: v[[2, 2, 2, 2]] for k, v in some.items()})["scores"]  # whatever is in the batch
    jax.tree.map(lambda a, b: near(a, b[2], atol=1e-4), alone, out["scores"])

    def changed(change, **more):
        """Scores with D's last layer changed."""
        name = "discriminator" if variant == "report" else "joint"
        params = results[name]["params"]
        d = params if variant == "report" else params["discriminator"]
        d = d | {"out": change(d["out"])}
        params = d if variant == "report" else params | {"discriminator": d}
        return score(results | {name: results[name] | {"params": params}} | more, some)["scores"]

    more_real = changed(lambda out: out | {"bias": out["bias"] + 1})
    assert (more_real["A"] < out["scores"]["A"]).all()  # A falls with d
    near(more_real["difference"], out["scores"]["difference"], atol=1e-4)
    near(out["scores"]["A"], expit(out["scores"]["simsid"]))
    calibration = {"params": {}, "stats": results["calibration"]["stats"] | {"mean": jnp.zeros(2)}}
    near(changed(zeroed, calibration=calibration)["A"], 0.5)  # d at the mean
    narrow = {"params": {}, "stats": calibration["stats"] | {"mean": jnp.full(2, 100.0)}}
    far = score(results | {"calibration": narrow}, some)["scores"]
    assert (far["A"] == 1).all() and len(np.unique(far["simsid"])) == 4  # A ties in float32, its log odds do not


@pytest.mark.long
def test_the_masked_shortcut_passes_the_encoder_s_features_on_in_training_alone():
    make = lambda rngs: published_nets.Windows((8, 8), 1, (2, 2), (4, 4, 16), 1, 3, 2, 2, 1e-9, jnp.float32, rngs=rngs)
    init, bind = network(make)
    params, stats = drawn(lambda: init(KEY))
    run = jax.jit(lambda params, keys: bind(params, stats)(batch(2, (8, 8))["image"], keys, train=False)[0])
    other = params | {"inpaint": jax.tree.map(lambda x: x + 0.5, params["inpaint"])}
    keys = jax.random.split(KEY, 2)
    np.testing.assert_array_equal(run(params, keys), run(other, keys))  # every cell keeps its own features
    assert not np.allclose(run(params, None), run(other, None))


@pytest.mark.parametrize(("windows", "branch"), [((2, 2), True), ((1, 3), False)])
def test_the_bottleneck_is_a_loop_over_windows(windows, branch):
    w, cells, width, heads = prod(windows), (1, 2), 8, 2
    norms = "branch" if branch else "sum"
    make = lambda rngs: published_nets.Bottleneck(
        windows, cells, width, 5, 2, heads, jnp.float32, norms=norms, rngs=rngs
    )
    init, bind = network(make)
    params, stats = drawn(lambda: init(KEY))
    x = normal(2 * w, *cells, width)
    whole = jax.jit(lambda: bind(params, stats)(x, train=False))()
    net = bind(params, stats)
    f = np.asarray(net.enter(jnp.asarray(x), train=False)).reshape(2, w, 4)
    expected = np.zeros((2, w, *cells, 2 + int(w).bit_length()), np.float32)
    for b, number in np.ndindex(2, w):
        read = [plain_retrieve(f[b, v], net.memory.rows[...][v], np.zeros(5), 2, 1.0, True) for v in range(w)]
        place = np.unravel_index(number, windows)
        keys, values = [], []
        for offset in product((-1, 0, 1), repeat=2):
            at = tuple(p + o for p, o in zip(place, offset, strict=True))
            inside = all(0 <= a < n for a, n in zip(at, windows, strict=True))
            if any(offset):
                near_by = read[np.ravel_multi_index(at, windows)] if inside else np.zeros(4)
                k, v = np.split(near_by @ params["kv"]["kernel"], 2)
                keys.append(k.reshape(heads, -1))
                values.append(v.reshape(heads, -1))
        q = (f[b, number] @ params["q"]["kernel"] + params["q"]["bias"]).reshape(heads, -1)
        mixed = []
        for h in range(heads):
            scores = np.array([k[h] @ q[h] for k in keys]) / np.sqrt(q.shape[1])
            p = np.exp(scores - scores.max())
            mixed.append((p / p.sum()) @ np.array([v[h] for v in values]))
        y = np.concatenate(mixed) @ params["out"]["kernel"] + params["out"]["bias"]
        relu = lambda x: np.maximum(x, 0)
        added = lambda norm, y, x: np.asarray(norm(jnp.float32(y if branch else y + x))) + (x if branch else 0)
        y = relu(added(net.norm1, y, read[number]))
        hidden = relu(y @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        y = relu(added(net.norm2, hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"], y))
        bits = [int(bit) for bit in f"{number:0{int(w).bit_length()}b}"]
        expected[b, number] = np.concatenate([y.reshape(*cells, 2), np.tile(bits, (*cells, 1))], -1)
    near(whole, net.leave(jnp.asarray(expected.reshape(2 * w, *cells, -1)), train=False), rtol=1e-3, atol=1e-4)


def test_the_autoencoder_is_a_loop_over_its_windows():
    make = lambda rngs: published_nets.Windows((16, 8), 1, (2, 2), (4, 4, 16), 1, 3, 2, 2, 0.5, jnp.float32, rngs=rngs)
    init, bind = network(make)
    params, stats = drawn(lambda: init(KEY))
    image = normal(2, 16, 8, 1)
    made, taught, differences = jax.jit(lambda params: bind(params, stats)(image, train=False))(params)
    deeper, deepest = np.zeros((2, 2, 2, 4, 2, 4), np.float32), np.zeros((2, 2, 2, 2, 1, 16), np.float32)
    rows = np.asarray(params["memories"][0]["rows"])

    @jax.jit
    def down(window):
        net = bind(params, stats)
        first = net.down[0](net.enter(window, train=False), train=False)
        return first, net.down[1](first, train=False)

    @jax.jit
    def up(decoder, below, skip):
        decoder = bind(*(own | {"student": part} for own, part in zip((params, stats), decoder, strict=True))).student
        return decoder.levels[0](jnp.concatenate([skip, upsample(below, (4, 2))], -1), train=False)

    student, teacher = ((params[name], stats[name]) for name in ("student", "teacher"))
    for b, i, j in np.ndindex(2, 2, 2):
        window = image[b : b + 1, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
        first, second = down(window)
        deeper[b, i, j], deepest[b, i, j] = first[0], second[0]
    inpainted = np.asarray(jax.jit(lambda x: bind(params, stats).inpaint(x, train=False))(deepest.reshape(8, 2, 1, 16)))
    inpainted = inpainted.reshape(deepest.shape)
    whole, other = np.zeros((2, 8, 4, 4), np.float32), np.zeros((2, 8, 4, 4), np.float32)
    for b, i, j in np.ndindex(2, 2, 2):
        skip, place = deeper[b, i, j][None], np.s_[b, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2]
        x = np.array(up(student, inpainted[b, i, j][None], skip)[0])
        for number, (r, c) in enumerate(product(range(2), repeat=2)):  # each part of a window reads its own memory
            part = np.s_[2 * r : 2 * r + 2, c : c + 1]
            x[part] = plain_retrieve(x[part].ravel(), rows[number], np.zeros(3), 2, 1.0, True).reshape(2, 1, 4)
        whole[place] = x
        other[place] = up(teacher, deepest[b, i, j][None], skip)[0]  # from features not inpainted

    @jax.jit
    def last(decoder, x):
        decoder = bind(*(own | {"student": part} for own, part in zip((params, stats), decoder, strict=True))).student
        x = decoder.levels[1](upsample(x, (16, 8)), train=False)
        return x, jnp.tanh(decoder.out(x))

    (x, own), (y, theirs) = last(student, whole), last(teacher, other)
    near(made, own, rtol=1e-4, atol=1e-4)
    near(taught, theirs, rtol=1e-4, atol=1e-4)
    near(differences, np.mean((whole - other) ** 2) + np.mean((x - y) ** 2), rtol=1e-3)


def test_the_teacher_decoder_teaches_the_encoder_nothing():
    make = lambda rngs: published_nets.Windows((8, 8), 1, (2, 2), (4, 4, 16), 1, 3, 2, 2, 1.0, jnp.float32, rngs=rngs)
    init, bind = network(make)
    params, stats = drawn(lambda: init(KEY))
    image = normal(1, 8, 8, 1)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(bind(params, stats)(image, train=False)[1] ** 2)))(params)
    learns = {name: any(np.any(leaf) for leaf in jax.tree.leaves(part)) for name, part in grads.items()}
    assert {name for name in learns if learns[name]} == {"teacher"}


def test_windows_are_joined_and_their_parts_remembered_in_place():
    make = lambda rngs: published_nets.Windows((16, 8), 1, (2, 2), (4, 4, 16), 1, 3, 2, 2, 1.0, jnp.float32, rngs=rngs)
    init, bind = network(make)
    net = bind(*drawn(lambda: init(KEY)))
    x = normal(2 * 4, 4, 2, 3)
    whole = np.asarray(net.whole(jnp.asarray(x)))
    for b, i, j in np.ndindex(2, 2, 2):
        np.testing.assert_array_equal(whole[b, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2], x[4 * b + 2 * i + j])
    numbered = net.remembered(jnp.asarray(x), lambda q: q + 10.0 * np.arange(4)[:, None])  # a memory a part
    for i, j in np.ndindex(2, 2):
        part = np.s_[:, 2 * i : 2 * i + 2, j : j + 1]
        near(numbered[part], x[part] + 10 * (2 * i + j))


def test_augmentation_moves_and_scales_about_the_middle():
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], (40, 30, 1))
    keys = jax.random.split(KEY, 64)

    def found(**given):
        """(1 / scale, rows that the middle was moved by) of 64 draws: the slope and offset of the moved ramp."""
        each = jax.jit(jax.vmap(partial(simsid_published.affine, jnp.asarray(ramp), **given)))(keys)[:, 17:24, 15, 0]
        return np.diff(each, axis=1).mean(1), 19.5 - np.mean(each[:, 2:4], 1)

    slope, move = found(translation=0.1, scaling=0.0)
    near(slope, 1)
    assert set(map(float, move)) == set(range(-4, 5))  # whole rows, at most a tenth of 40, either way
    _, move = found(translation=0.0, scaling=0.2)
    near(move, 0, atol=0.5)
    one = partial(simsid_published.affine, jnp.asarray(ramp), keys[0], translation=0.1, scaling=0.2)
    u = np.asarray(jax.random.uniform(keys[0], (3,), minval=-1))
    move, rows = np.round(0.1 * u[1] * 40), np.arange(40)
    source = np.floor((rows + 0.5 - 20 - move) / (1 + 0.2 * u[0]) + 20)  # the nearest row, 0 outside
    np.testing.assert_array_equal(one()[:, 15, 0], np.where((source >= 0) & (source < 40), source, 0))
    far = jax.jit(partial(simsid_published.affine, translation=0.9, scaling=0.0))(jnp.ones((8, 8, 1)), keys[0])
    assert np.min(far) == 0  # outside is black


def test_an_image_s_own_mean_and_deviation_are_taken_off_and_put_back():
    image, c = batch(3)["image"] * np.float32([0.2, 0.5, 1]).reshape(3, 1, 1, 1), config("data.normalise=image")
    seen, back = simsid_score.normalised(c, jnp.asarray(image))
    near(np.mean(seen, (1, 2, 3)), 0.5)
    near(np.std(seen, (1, 2, 3)), 0.2)
    near(back(seen), image)
    assert np.max(back(seen + 9)) == 1 and np.min(back(seen - 9)) == 0
    flat, _ = simsid_score.normalised(c, jnp.full((1, 4, 4, 1), 0.3))
    near(flat, 0.5, atol=1e-2)
    same, clip = simsid_score.normalised(config(), jnp.asarray(image))
    assert np.array_equal(same, image) and clip(jnp.float32(2)) == 1
    got = []
    seen_by = lambda state, some, *_: got.append(some)
    check = Check(every=1, rows=None, look=seen_by)
    kept = Stage(name="s", rows=None, batch=1, steps=None, init=None, step=seen_by, checks=(check,))
    stage = simsid_score.normalising(c, kept)
    stage.step(None, {"image": image, "index": 7}, KEY, {})
    stage.checks[0].look(None, {"image": image}, {})
    for part in got:
        near(part["image"], seen)
    assert got[0]["index"] == 7 and simsid_score.normalising(config(), kept) is kept


def test_weight_decay_is_a_part_of_the_gradient():
    optimiser = simsid_published.decayed_adam(ConfigDict(dict(betas=(0.5, 0.75), decay=1e-7)))
    direction, _ = optimiser.update(jnp.float32(0), optimiser.init(jnp.float32(3)), jnp.float32(3))
    near(direction, 3e-7 / (3e-7 + 1e-7))  # epsilon is 1e-7


def test_layers_have_the_listings_constants():
    near(nets.leaky_relu(jnp.asarray([-1.0, 2.0])), [-0.2, 2.0])
    init, bind = network(lambda rngs: nets.Layer(2, 1, 2, 1, jnp.float32, activation=lambda x: x, rngs=rngs))
    params, stats = drawn(lambda: init(KEY))
    image, kernel = 0.01 * normal(3, 4, 4, 1), 1 + params["conv"]["kernel"]
    params = params | {"conv": params["conv"] | {"kernel": kernel}}

    @jax.jit
    def run(params, stats):
        layer = bind(params, stats)
        return layer(image, train=True), stats_of(layer)

    out, new = run(params, stats)
    x, norm = image @ kernel[0, 0] + params["conv"]["bias"], params["norm"]
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    near(out, (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], rtol=1e-3, atol=1e-3)
    near(new["norm"]["mean"], 0.9 * stats["norm"]["mean"] + 0.1 * mean)
    near(new["norm"]["var"], 0.9 * stats["norm"]["var"] + 0.1 * var)
    rows = published_nets.Slots(2, 500, 16, 1, rngs=nnx.Rngs(0)).rows[...]
    assert 0.245 < rows.max() <= 0.25 and -0.25 <= rows.min() < -0.245  # uniform within 1 / sqrt(16)


@pytest.mark.parametrize("activation", [jax.nn.relu, nets.leaky_relu, lambda x: x], ids=["relu", "leaky", "none"])
@pytest.mark.parametrize(("form", "length"), [(nets.convolve, 3), (nets.halved, 5), (nets.doubled, 4)])
def test_a_gpu_s_layer_is_the_layer(form, length, activation):
    make = lambda rngs: nets.Layer(2, 3, 2, length, jnp.float32, form=form, activation=activation, rngs=rngs)
    init, bind = network(make)
    params, stats = jax.tree.map(jnp.asarray, drawn(lambda: init(KEY)))
    params["conv"]["bias"] = jnp.float32([3.0, -2.0])  # far from 0, where batch norm takes it off
    image, weight = normal(3, 4, 4, 3), normal(3, 8, 8, 2)

    def loss(params, image):
        layer = bind(params, stats)
        out = layer(image, train=True)
        return jnp.sum(weight[:, : out.shape[1], : out.shape[2]] * out), (out, stats_of(layer))

    run = lambda: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, image)
    (_, plain), (of_params, of_image) = run()
    with tracing_for(Target("cuda", (9, 0), 91000)):
        (_, gpu), (params_gpu, image_gpu) = run()
    jax.tree.map(partial(near, rtol=1e-4, atol=1e-4), gpu, plain)
    near(image_gpu, of_image, rtol=1e-3, atol=1e-4)
    assert not np.any(params_gpu["conv"].pop("bias"))  # a bias before batch norm has no gradient: here exactly
    near(of_params["conv"].pop("bias"), 0, atol=1e-3)
    jax.tree.map(partial(near, rtol=1e-3, atol=1e-3), params_gpu, of_params)


def test_a_mosaic_has_each_patch_s_features_at_its_place():
    f = normal(2, 6, 8)
    out = np.asarray(simsid.mosaic(jnp.asarray(f), (2, 3)))
    assert out.shape == (2, 4, 12)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[:, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4], f[:, 3 * i + j].reshape(2, 2, 4))


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_run_scores_and_shows_where(small_set, tmp_path):
    assert exit_code(train.main, arguments(small_set, tmp_path, "validation.held_out=0.2")) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "simsid" and set(metrics["scores"]) == {
        "simsid",
        "difference",
        "A",
        "l1",
        "mse",
        "patches",
        "kl",
        "kl_teacher",
    }
    assert metrics["scores"]["simsid"]["pixel"] is None and metrics["pixel"] == metrics["scores"]["l1"]["pixel"]
    assert len(list((tmp_path / "evaluation" / "maps").glob("*_anomaly.*"))) == 12
    assert metrics["decision"]["threshold"] is not None and metrics["decision"]["chosen_by"] == "accuracy"
    history = read_history(tmp_path / "metrics.jsonl")
    assert [h["step"] for h in history if h["stage"] == "student" and "check_kl" in h] == [3, 6]
    header = (tmp_path / "evaluation" / "scores.csv").read_text().splitlines()[0]
    assert header == "id,label,score,p_value,alarm,score_error,A,difference,kl,kl_teacher,l1,mse,patches,warning"
    assert [h["step"] for h in history if "check_auroc" in h] == [3, 6]
    page = (tmp_path / "evaluation" / "report.html").read_text()
    for name in ("reconstruction by the teacher", "features of the patches", "features for the student"):
        assert page.count(f"{name} of case") == 12
    printed = metrics["printed"]
    assert {(p["stage"], p["metric"]) for p in printed} == {
        ("teacher", "loss"),
        ("student", "mse"),
        ("student", "distillation"),
    }
    # 16 images of 8 patients, too few to hold any out: 4 batches of 4 an epoch, and 6 steps.
    lines = {h["step"]: h["loss"] for h in history if h["stage"] == "teacher" and "loss" in h}
    ours = [p["ours"] for p in printed if p["stage"] == "teacher"]
    near(ours[0], np.mean([lines[2], lines[4]]))
    assert ours[1:] == [None] * (len(ours) - 1) and "printed in the paper" in page
    assert "data.size (16, 16) for (128, 128), model.patch (4, 4) for (16, 16)" in page and ", kl " in page


@pytest.mark.long
def test_the_official_variant_runs(small_set, tmp_path):
    assert exit_code(train.main, arguments(small_set, tmp_path, "variant=official", "validation.select_every=0")) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    with (tmp_path / "evaluation" / "scores.csv").open() as file:
        table = [(int(line["label"]), float(line["score"])) for line in csv.DictReader(file)]
    labels, scores = map(np.array, zip(*table, strict=True))
    near(metrics["image"]["auroc"], auroc(labels, scores))
    near(metrics["decision"]["accuracy"], np.mean((scores >= metrics["decision"]["threshold"]) == labels))
    history = read_history(tmp_path / "metrics.jsonl")
    assert [h["step"] for h in history if "check_kl" in h] == [3, 6]
    assert [h["step"] for h in history if "check_auroc" in h] == [4, 6]  # an epoch has 4 batches; and the last step


@pytest.mark.long
def test_an_alternating_run_that_is_stopped_within_a_round_goes_on_with_the_other_step(
    small_set, tools, tmp_path, monkeypatch
):
    changes = ("variant=official", "joint.critic=3", "joint.steps=5", "select=last", "evaluation.maps=false")
    runs, placed = [tmp_path / name for name in ("whole", "stopped")], train.place_batch
    assert exit_code(train.main, arguments(small_set, runs[0], *changes)) == 0
    calls = []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return placed(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "place_batch", stop)
        assert exit_code(train.main, arguments(small_set, runs[1], *changes)) == 143
    assert checkpoint.steps(runs[1] / "checkpoints" / "joint") == [2]
    assert exit_code(train.main, arguments(small_set, runs[1], *changes)) == 0
    (runs[0] / "labels.csv").touch()
    (runs[1] / "labels.csv").touch()
    assert tools.content(runs[1]) == tools.content(runs[0])


@pytest.mark.long
def test_volumes_go_through_the_same_code(tmp_path):
    manifest = write_patients(tmp_path)
    assert exit_code(train.main, arguments(manifest, tmp_path / "run", *VOLUMES, preset="phantom3d")) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "simsid" and set(metrics["scores"]) == {*simsid_score.SCORES}
    assert metrics["pixel"]["auroc"] == pytest.approx(voxel_auroc(manifest, tmp_path / "run"))


def test_the_rate_falls_to_0_in_the_last_share_of_the_steps():
    section = recipe.get_config("small").student
    rates = [float(simsid.rate(section, jnp.int32(k), 1500)) for k in (0, 1199, 1200, 1350, 1499)]
    np.testing.assert_allclose(rates, np.array([1, 1, 1, 0.5, 1 / 300]) * section.lr, rtol=1e-5)
    section.cooldown = 0.0  # as in the report
    assert {float(simsid.rate(section, jnp.int32(k), 1500)) for k in (0, 700, 1499)} == {float(np.float32(section.lr))}
