"""PHiSeg: its losses against SciPy and by hand, its paths, and what its samples depend on."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from scipy import integrate, special, stats

from jmae.errors import InputError
from jmae.losses import gaussian_kl, hierarchical_loss, soft_cross_entropy
from jmae.nn.phiseg import PHiSeg, accumulated, nearest
from jmae.system import network, stats_of
from jmae.target import Target, tracing_for

near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
RNG = np.random.default_rng(0)


@cache
def small(rank, **changes):
    """Three resolution levels of which two are latent, unless told otherwise."""
    settings = dict(rank=rank, channels=1, widths=(4, 5, 6), latent_levels=2, latent=2, base=3) | changes
    return network(lambda rngs: PHiSeg(**settings, rngs=rngs))


@cache
def arrays(init):
    return drawn(lambda: init(jax.random.key(0)))


def sample(size, batch=3):
    """(x, y, target (1 - y, y), keys)."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(batch, *size, 1)).astype(np.float32), rng.uniform(size=(batch, *size)).astype(np.float32)
    return x, y, np.stack([1 - y, y], axis=-1), jax.random.split(jax.random.key(3), batch)


@pytest.fixture(scope="module")
def tiny():
    """(a pass in test mode, a draw, x, target, keys) of a 2D net."""
    init, bind = small(2)
    params, start = arrays(init)
    x, _, target, keys = sample((8, 8))
    run = jax.jit(lambda x, target, keys: bind(params, start)(x, target, keys, train=False))
    draw = jax.jit(lambda x, keys: (lambda net: net.generate(net.features(x), keys))(bind(params, start)))
    return run, draw, x, target, keys


@pytest.mark.long
def test_the_published_net_has_as_many_parameters_and_levels_less_the_layers_that_nothing_reads():
    # By hand from PHiSeg's code: encoder (input 1 or 3), 4 pairs of lifts, 4 of joins, heads; the likelihood likewise.
    net = nnx.eval_shape(lambda: PHiSeg(rank=2, channels=1, rngs=nnx.Rngs(0)))
    count = lambda module: sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert count(net.posterior) == 4_356_768 + 153_088 + 1_467_008 + 5_524
    assert count(net.prior) == count(net.posterior) - 2 * 9 * 32
    assert count(net.likelihood) == 870_464 + 1_716_608 + 719_680 + 2_546_432 + 1_802

    graph, state = nnx.split(net)
    x, _, target, keys = sample((128, 128), 1)
    logits, q, _ = jax.eval_shape(lambda state: nnx.merge(graph, state)(x, target, keys, train=False), state)
    assert [mean.shape for mean, _ in q] == [(1, n, n, 2) for n in (32, 16, 8, 4, 2)]  # 2^-2 to 2^-6 of the side
    assert [s.shape for s in logits] == [(1, 128, 128, 2)] * 5


@pytest.mark.parametrize(("size", "latent_levels"), [((16, 24), 1), ((8, 4, 12), 2), ((8, 8, 2), 3)])
@pytest.mark.long_but_first
def test_paths_through_posterior_and_prior_have_equal_shapes(size, latent_levels):
    init, bind = small(len(size), latent_levels=latent_levels)

    def both(state, x, target, keys):
        net = bind(*state)
        return net(x, target, keys, train=True), net.generate(net.features(x), keys)

    x, _, target, keys = sample(size)
    (logits, q, p), drawn = jax.eval_shape(both, jax.eval_shape(init, keys[0]), x, target, keys)
    assert [s.shape for s in logits] == [drawn.shape] * latent_levels == [(3, *size, 2)] * latent_levels
    assert drawn.dtype == jnp.float32
    coarse = [tuple(max(1, n // 2**level) for n in size) for level in range(3)][-latent_levels:]
    assert [m.shape for m, _ in p] == [(3, *n, 2) for n in coarse]
    assert jax.tree.map(jnp.shape, q) == jax.tree.map(jnp.shape, p)


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="latent_levels is 5"):
        nnx.eval_shape(lambda: PHiSeg(rank=2, channels=1, widths=(4,) * 4, latent_levels=5, rngs=nnx.Rngs(0)))
    init, bind = small(2)
    with pytest.raises(InputError, match="does not halve"):
        x, _, target, keys = sample((6, 8))
        bind(*arrays(init))(x, target, keys, train=True)


def test_nearest_upsampling_is_that_of_jax():
    x = RNG.normal(size=(2, 3, 4, 1, 2)).astype(np.float32)
    np.testing.assert_array_equal(nearest(x, (6, 16, 1)), jax.image.resize(x, (2, 6, 16, 1, 2), "nearest"))


def test_cross_entropy_with_a_soft_target_is_that_of_the_softmax():
    logits, y = RNG.normal(size=(2, 3, 4, 2)) * 5, RNG.uniform(size=(2, 3, 4))
    y[0, 0, :2] = 0, 1
    expected = -np.sum(np.stack([1 - y, y], -1) * special.log_softmax(logits, -1), -1)
    near(soft_cross_entropy(jnp.float32(logits), jnp.float32(y)), expected)
    assert np.isfinite(soft_cross_entropy(jnp.array([-1e4, 1e4]), jnp.float32(0)))


def test_kl_of_normals_is_the_integral_and_zero_for_equal_ones():
    for m_q, s_q, m_p, s_p in ((0, 1, 0, 1), (0.3, 0.5, -0.4, 1.2), (1, 2, 0, 0.7), (-2, 0.1, -2.1, 0.3)):
        q, p = stats.norm(m_q, s_q), stats.norm(m_p, s_p)
        inside = lambda z, q=q, p=p: q.pdf(z) * (q.logpdf(z) - p.logpdf(z))
        expected, _ = integrate.quad(inside, m_q - 12 * s_q, m_q + 12 * s_q)
        near(gaussian_kl(*(tuple(map(jnp.float32, n)) for n in ((m_q, s_q), (m_p, s_p)))), expected)
    equal = jnp.linspace(-2, 2, 5), jnp.array([0, 1e-8, 1e-3, 1, 50])
    np.testing.assert_allclose(gaussian_kl(equal, equal), 0, atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.grad(lambda n: gaussian_kl(n, equal).sum())(equal))


def test_residual_sums_go_from_the_deepest_level_to_the_finest():
    s = [np.full((1, 2, 2, 2), v, np.float32) for v in (1, 20, 300)]
    assert [float(a.mean()) for a in accumulated(s)] == [321, 320, 300]


def test_loss_is_the_sum_over_pixels_and_cells_with_weights_4_to_the_level():
    y = RNG.uniform(size=(2, 4, 4))
    logits = RNG.normal(size=(3, 2, 4, 4, 2))
    normals = [
        [(RNG.normal(size=(2, n, n, 2)), RNG.uniform(0.5, 2, (2, n, n, 2))) for n in (4, 2, 1)] for _ in range(2)
    ]
    expected, soft = 0.0, np.stack([1 - y, y], -1)
    for s in (logits[0] + logits[1] + logits[2], logits[1] + logits[2], logits[2]):
        expected -= np.sum(soft * special.log_softmax(s, -1)) / 2
    for weight, (m_q, s_q), (m_p, s_p) in zip((1, 4, 16), *normals, strict=True):
        kl = np.log(s_p / s_q) + (s_q**2 + (m_q - m_p) ** 2) / (2 * s_p**2) - 0.5
        expected += weight * np.sum(kl) / 2
    near(hierarchical_loss(*jax.tree.map(jnp.float32, (list(logits), *normals, y))), expected)


@pytest.mark.long
def test_the_posteriors_samples_drive_the_prior_and_the_likelihood(tiny):
    run, _, x, target, keys = tiny
    (logits, q, p), (logits2, q2, p2) = run(x, target, keys), run(x, 1 - target, keys)  # the same noise, another target
    differs = lambda a, b: np.abs(a - b).max() > 1e-3
    near(p[1], p2[1])  # the deepest of the prior sees the image alone
    assert differs(p[0][0], p2[0][0]) and differs(q[1][0], q2[1][0]) and differs(logits[1], logits2[1])
    assert all(np.all(deviation > 0) for _, deviation in [*q, *p])


@pytest.mark.long
def test_a_sample_follows_from_its_key_alone(tiny):
    _, draw, x, _, keys = tiny
    drawn = draw(x, keys)
    np.testing.assert_array_equal(drawn, draw(x, keys))
    near(draw(x[::-1], keys[::-1]), drawn[::-1])
    near(draw(jnp.repeat(x[1:2], 3, 0), jnp.repeat(keys[1:2], 3))[0], drawn[1])
    assert np.abs(draw(x, keys[::-1])[0] - drawn[0]).max() > 1e-3


@pytest.mark.long
def test_the_mean_of_four_times_as_many_samples_has_half_the_error(tiny):
    _, draw, x, _, _ = tiny
    keys = jax.random.split(jax.random.key(5), 2048)
    draws = np.asarray(jax.nn.softmax(draw(jnp.broadcast_to(x[:1], (2048, *x.shape[1:])), keys))[..., 1])
    mean = draws.mean(0)
    error = lambda n: np.sqrt(np.mean((draws.reshape(-1, n, *mean.shape).mean(1) - mean) ** 2))
    assert error(1) > 1e-3
    assert 0.4 < error(64) / error(16) < 0.6


@pytest.mark.long
def test_training_gives_every_parameter_a_finite_gradient_and_moves_all_statistics():
    x, y, target, keys = sample((8, 8))
    init, bind = small(2)
    params, start = arrays(init)

    compiled = []

    def loss(params, x, keys):
        compiled.append(x)
        net = bind(params, start)
        return hierarchical_loss(*net(x, target, keys, train=True), y), stats_of(net)

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, after), grads = program(params, x, keys)
    assert np.isfinite(value)
    silent = [path for path, g in jax.tree.leaves_with_path(grads) if not np.isfinite(g).all() or np.abs(g).max() == 0]
    assert not silent
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True))
    program(params, x + 1, keys[::-1])
    assert len(compiled) == 1


@pytest.mark.long
def test_bfloat16_and_remat_change_neither_types_nor_much_else():
    x, _, target, keys = sample((8, 8))
    init, bind = small(2)
    params, start = arrays(init)
    run = lambda bind: bind(params, start)(x, target, keys, train=True)
    exact, again, coarse = jax.jit(
        lambda: [run(b) for b in (bind, small(2, remat=True)[1], small(2, dtype=jnp.bfloat16)[1])]
    )()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), exact, again)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(coarse))
    differences = [np.abs(a - b).mean() for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(coarse), strict=True)]
    assert 1e-5 < max(differences) < 0.3


@pytest.mark.long
def test_the_net_for_a_gpu_is_the_net_for_a_cpu():
    x, _, target, keys = sample((8, 8))
    init, bind = small(2)
    params, start = arrays(init)

    def run(chosen):
        with tracing_for(chosen):
            return jax.jit(lambda: bind(params, start)(x, target, keys, train=True))()

    found = [run(chosen) for chosen in (Target("cpu"), Target("cuda", (9, 0), 91000))]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *found)
