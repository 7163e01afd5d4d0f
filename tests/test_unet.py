"""The U-Net: parameter counts of the published net, its layers against JAX's general ones, norms and dropout."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmae.errors import InputError
from jmae.losses import soft_cross_entropy
from jmae.nn import unet
from jmae.nn.conv import batch_norm, convolve, dropout, moments, pool, upsample
from jmae.nn.unet import Convs, UNet, check_size
from jmae.system import network, stats_of
from jmae.target import Target, tracing_for

SIZES = [(16, 24), (16, 8, 8), (16, 16, 2)]  # not square, 3D, thin: ends at 2x2x1 on 4 levels
near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
TARGETS = {"cpu": Target("cpu"), "cuda": Target("cuda", (9, 0), 91000)}  # the form for a GPU runs here too


@pytest.fixture(params=TARGETS)
def platform(request):
    with tracing_for(TARGETS[request.param]):
        yield request.param


@cache
def small(rank, **changes):
    settings = dict(rank=rank, channels=1, widths=(4, 5), head=3) | changes
    return network(lambda rngs: UNet(**settings, rngs=rngs))


@cache
def arrays(init):
    """Parameters and statistics of a network's shapes, drawn without compiling anything: He normal kernels, means
    around 0, all else around 1."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return jnp.float32(rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape))
        return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape) - (path[-1].key == "mean"))

    return jax.tree.map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def images(size, batch=3, channels=1):
    return np.random.default_rng(1).normal(size=(batch, *size, channels)).astype(np.float32)


def test_the_published_nets_have_as_many_parameters():
    net = nnx.eval_shape(lambda: UNet(rank=2, channels=1, rngs=nnx.Rngs(0)))
    count = lambda module: sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert (count(net.encoder), count(net)) == (2_363_232, 5_670_370)


@pytest.mark.parametrize("train", [False, True])
def test_with_a_prior_the_untrained_net_predicts_about_it(train):
    init, bind = small(2, prior=0.02, head=4)
    state = init(jax.random.key(1))
    p = jax.nn.softmax(bind(*state)(images((8, 8)), train=train))[..., 1]
    assert 0.01 < p.mean() < 0.04 and p.max() < 0.2
    kernels = [np.asarray(init(jax.random.key(k))[0]["out"]["kernel"]) for k in (1, 2)]
    np.testing.assert_array_equal(*kernels)  # no seed decides
    weights = (kernels[0][..., 1] - kernels[0][..., 0]).ravel()
    assert sum(weights > 0) == sum(weights < 0) == len(weights) / 2  # of one sign, they would give a ceiling


@pytest.mark.parametrize("size", SIZES)
def test_logits_have_the_images_size(size):
    init, bind = small(len(size), widths=(4, 5, 6, 7), outputs=3)
    net = lambda state, x: bind(*state)(x, train=False)
    assert jax.eval_shape(net, jax.eval_shape(init, jax.random.key(0)), images(size)).shape == (3, *size, 3)
    assert check_size(size, 4)[-1] == tuple(max(1, n // 8) for n in size)


@pytest.mark.parametrize("size", [(30, 32), (32, 32, 6)])
def test_a_size_that_does_not_halve_is_refused_with_a_remedy(size):
    with pytest.raises(InputError, match=r"\(3[02], 32.*(divisible by 8|levels)") as error:
        check_size(size, 4)
    assert "\n" not in str(error.value) and "(32, 32" in str(error.value)


def test_the_net_refuses_such_a_size_itself():
    init, bind = small(2)
    with pytest.raises(InputError, match="pad or crop it to"):
        bind(*arrays(init))(images((7, 8)), train=False)


@pytest.mark.parametrize("size", [(6, 10), (4, 6, 8), (8, 6, 1)])
def test_pooling_is_the_mean_of_blocks_and_upsampling_linear_interpolation(size, platform):
    x, half = images(size, channels=2), tuple(max(1, n // 2) for n in size)
    coarse, window = images(half, channels=2), (1, *(min(n, 2) for n in size), 1)

    @jax.jit
    def ours_and_theirs():
        summed = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID")
        resized, back = jax.vjp(lambda x: jax.image.resize(x, (3, *size, 2), "linear"), coarse)
        ours, our_back = jax.vjp(lambda x: upsample(x, size), coarse)
        return (pool(x), ours, our_back(x)), (summed / np.prod(window), resized, back(x))

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), *ours_and_theirs())


def test_upsampling_for_a_gpu_rounds_once():
    with tracing_for(TARGETS["cuda"]):
        x = jnp.asarray(images((4, 6), channels=2), jnp.bfloat16)
        fine, back = jax.vjp(lambda x: upsample(x, (8, 12)), x)
        g = jnp.asarray(images((8, 12), channels=2), jnp.bfloat16)
        (of_x,) = back(g)
    # By hand, along one axis: outputs 2i and 2i + 1 are of i and its neighbour before or behind.
    matrix = lambda n: sum(
        w * (np.clip(np.arange(2 * n) // 2 + k * np.tile([-1, 1], n), 0, n - 1)[:, None] == np.arange(n))
        for k, w in ((0, 0.75), (1, 0.25))
    )
    rows, columns = matrix(4), matrix(6)
    exact = lambda array: np.asarray(array, np.float64)
    rounded = lambda array: exact(jnp.asarray(array, jnp.bfloat16))
    np.testing.assert_array_equal(exact(fine), rounded(np.einsum("ai,bj,nijc->nabc", rows, columns, exact(x))))
    np.testing.assert_allclose(exact(of_x), np.einsum("ai,bj,nabc->nijc", rows, columns, exact(g)), rtol=2**-8)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("size", "outputs"), [((6, 5), 3), ((6, 5), 16), ((4, 5, 3), 3)])  # 6 pairs of channels or 32
def test_convolution_and_its_gradients_are_those_of_jax(size, outputs, length, platform):
    x, names = images(size, channels=2), "DHW"[-len(size) :]
    kernel = images((length,) * (len(size) - 1) + (2,), length, outputs)
    numbers = (f"N{names}C", f"{names}IO", f"N{names}C")
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,) * len(size), "SAME", dimension_numbers=numbers)
    loss = lambda f: lambda x, k: ((y := f(x, k)).sum() + jnp.sin(y).sum(), y)
    both = jax.jit(lambda: [jax.value_and_grad(loss(f), (0, 1), has_aux=True)(x, kernel) for f in (convolve, plain)])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *both())


def test_a_layer_normalises_by_the_batch_in_training_and_by_its_statistics_in_test():
    init, bind = network(lambda rngs: Convs(2, 2, (3,), jnp.float32, rngs=rngs))
    params, stats = arrays(init)
    x = images((6, 8), channels=2)
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = params["convs"][0]["kernel"]
    y = np.asarray(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers))
    scale, bias, before = params["norms"][0]["scale"], params["norms"][0]["bias"], stats["norms"][0]
    expected = lambda mean, var: np.maximum((y - mean) / np.sqrt(var + 1e-3) * scale + bias, 0)
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))

    run = lambda train: (lambda net: (net(x, train=train), stats_of(net)))(bind(params, stats))
    (tested, same), (trained, after) = jax.jit(lambda: (run(False), run(True)))()
    near(tested, expected(before["mean"], before["var"]), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    near(trained, expected(mean, var), rtol=1e-4)
    near(after["norms"][0]["mean"], 0.99 * before["mean"] + 0.01 * mean)
    near(after["norms"][0]["var"], 0.99 * before["var"] + 0.01 * var)


def test_the_moments_of_a_batch_are_exact_though_its_mean_is_100_deviations(platform):
    x = (np.random.default_rng(5).normal(300, 3, (4, 64, 64, 2))).astype(np.float32)
    mean, var = x.mean((0, 1, 2), np.float64), x.astype(np.float64).var((0, 1, 2))
    found = jax.jit(lambda shift: moments(x, shift))
    for shift, exact in ((mean, 1e-5), (mean + 6, 1e-4), (0 * mean, 0.1)):  # the last: a first step
        ours = found(jnp.float32(shift))
        np.testing.assert_allclose(ours[0], mean, rtol=1e-5)
        np.testing.assert_allclose(ours[1], var, rtol=exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_with_relu_has_the_gradient_of_its_formula_and_keeps_its_input_alone(dtype, platform):
    x = jnp.asarray(images((8, 6), 4, 3) * 2 + 1, dtype)
    scale, bias, g = jnp.array([0.5, 1, 2]), jnp.array([0.1, -0.2, 0.3]), images((8, 6), 4, 3)[::-1]

    def formula(x, scale, bias):
        x = x.astype(jnp.float32)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-3) * scale + bias)

    def ours(x, scale, bias):
        found = moments(jax.lax.stop_gradient(x), jnp.ones(3))
        return batch_norm(x, *found, scale, bias, 1e-3, jax.nn.relu)

    exact, back = jax.vjp(formula, x.astype(jnp.float32), scale, bias)
    y, our_back = jax.vjp(ours, x, scale, bias)
    assert y.dtype == x.dtype
    kept = [leaf for leaf in jax.tree.leaves(our_back) if leaf.size > 3]
    assert [leaf.dtype for leaf in kept] == [x.dtype] and kept[0].shape == x.shape
    rounding = 1e-5 if dtype == "float32" else 1e-2
    given = jnp.asarray(g, y.dtype)
    for a, b in zip((y, *our_back(given)), (exact, *back(given.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=rounding, atol=rounding * np.abs(b).max())


def test_a_new_layer_has_he_normal_kernels_and_a_norm_that_changes_nothing():
    init, _ = network(lambda rngs: Convs(2, 16, (32,), jnp.float32, rngs=rngs))
    params, stats = jax.jit(init)(jax.random.key(0))
    kernel, norm = params["convs"][0]["kernel"], params["norms"][0] | stats["norms"][0]
    assert kernel.shape == (3, 3, 16, 32) and abs(np.std(kernel) / (2 / (9 * 16)) ** 0.5 - 1) < 0.05
    assert {name: set(np.asarray(a)) for name, a in norm.items()} == {
        "scale": {1},
        "bias": {0},
        "mean": {0},
        "var": {1},
    }


def test_dropout_zeroes_the_given_share_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(3), 2)
    dropped = np.asarray(dropout(jnp.ones((2, 100, 100, 2)), keys, 0.1))
    near(np.unique(dropped), [0, 1 / 0.9])
    for sample in dropped:
        assert abs(np.mean(sample == 0) - 0.1) < 4 * (0.09 / sample.size) ** 0.5
    assert np.mean(dropped[0] == dropped[1]) < 0.9


def test_every_level_drops_once_with_a_mask_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(unet, "dropout", lambda x, keys, rate: seen.append((x.shape, keys, rate)) or x)
    init, bind = small(2, widths=(4, 5, 6), dropout=0.1)
    params, stats = arrays(init)

    def used(keys):
        bind(params, stats)(images((8, 8), 2), train=False, keys=keys)
        return [jax.random.key_data(keys) for _, keys, _ in seen]

    words = np.concatenate(jax.jit(used)(jax.random.split(jax.random.key(0), 2)))
    assert [shape[1:] for shape, *_ in seen] == [(8, 8, 4), (4, 4, 5), (2, 2, 6), (4, 4, 6), (8, 8, 5)]
    assert len(np.unique(words, axis=0)) == 2 * 5 and {rate for *_, rate in seen} == {0.1}


@pytest.mark.parametrize("size", [(8, 8), (8, 4, 2)])
@pytest.mark.long_but_first
def test_a_samples_dropout_follows_from_its_key_alone(size):
    init, bind = small(len(size), dropout=0.5)
    params, stats = arrays(init)
    x, keys = images(size), jax.random.split(jax.random.key(4), 3)
    compiled = []
    net = jax.jit(lambda x, keys=None: compiled.append(x) or bind(params, stats)(x, train=False, keys=keys))
    drawn = net(x, keys)
    np.testing.assert_array_equal(drawn, net(x, keys))
    near(net(x[::-1], keys[::-1]), drawn[::-1])
    near(net(jnp.repeat(x[1:2], 3, 0), jnp.repeat(keys[1:2], 3))[0], drawn[1])
    assert np.abs(net(x, keys[::-1])[0] - drawn[0]).max() > 1e-2
    assert np.abs(net(x) - drawn).max() > 1e-2
    assert len(compiled) == 2  # with keys and without: other values compile nothing

    certain = small(len(size))[1]  # no rate, the same parameters
    near(net(x), jax.jit(lambda: certain(params, stats)(x, train=False, keys=keys))())


@pytest.mark.long
def test_training_gives_every_parameter_a_finite_gradient_with_and_without_remat():
    x, target = images((8, 8)), jnp.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    found = []
    for remat in (False, True):
        init, bind = small(2, remat=remat)
        params, stats = arrays(init)

        def loss(params, bind=bind, stats=stats):
            net = bind(params, stats)
            return jnp.mean(soft_cross_entropy(net(x, train=True), target)), stats_of(net)

        program = jax.jit(jax.value_and_grad(loss, has_aux=True))
        traced = program.trace(params)
        rows = sum(e.primitive.name.startswith(("remat", "checkpoint")) for e in traced.jaxpr.eqns)
        assert rows == (4 if remat else 0)  # two levels down, one up, the head
        found.append(program(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *found)
    (_, after), grads = found[0]
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))


def test_bfloat16_reaches_the_convolutions_but_not_norms_and_logits():
    x, (init, fine), (_, coarse) = images((8, 8)), small(2), small(2, dtype=jnp.bfloat16)
    params, stats = arrays(init)
    run = lambda bind: (lambda net: (net(x, train=True), stats_of(net)))(bind(params, stats))
    (exact, _), (logits, after) = jax.jit(lambda: (run(fine), run(coarse)))()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((logits, after)))
    assert 1e-5 < np.abs(logits - exact).max() < 0.3


@pytest.mark.parametrize("size", [(8, 8), (8, 4, 2)])
@pytest.mark.long_but_first
def test_the_net_for_a_gpu_is_the_net_for_a_cpu(size):
    init, bind = small(len(size), outputs=2)
    params, stats = arrays(init)
    x, target = images(size), jnp.linspace(0, 1, 3 * np.prod(size)).reshape(3, *size)

    def loss(params):
        net = bind(params, stats)
        return jnp.mean(soft_cross_entropy(net(x, train=True), target)), stats_of(net)

    found, texts = [], []
    for chosen in TARGETS.values():
        with tracing_for(chosen):
            traced = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params)).trace(params)
        found.append(traced.lower().compile()(params))
        texts.append(str(traced.jaxpr))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *found)
    assert texts[0] != texts[1]
