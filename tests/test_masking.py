"""Random masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jmae.errors import InputError
from jmae.masking import (
    case_keys,
    group_mask,
    groups_of,
    hidden,
    order_of,
    random_mask,
    run_masks,
    sample_keys,
    standard_error,
    take,
    visible_tokens,
)


@pytest.mark.parametrize(
    "tokens, ratio, kept",
    [
        (196, 0.75, 49),
        (2520, 0.9, 251),
        (2240, 0.9, 223),
        (1260, 0.9, 125),
        (560, 0.9, 55),
        (140, 0.9, 13),
        (196, 0.9, 19),
    ],
)
def test_visible_tokens_are_truncated_as_in_the_official_code(tokens, ratio, kept):
    assert visible_tokens(tokens, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999, -0.5])
def test_a_ratio_that_hides_all_or_nothing_is_refused(ratio):
    with pytest.raises(InputError, match="choose a ratio that leaves"):
        visible_tokens(16, ratio)


def test_the_least_noise_stays_visible_and_restore_puts_tokens_back():
    noise = np.random.default_rng(0).permutation(24).reshape(2, 12) / 24
    keep, restore = order_of(jnp.asarray(noise), 5)
    for b in range(2):
        assert set(np.asarray(keep[b]).tolist()) == set(np.argsort(noise[b])[:5].tolist())
        assert not np.asarray(hidden(restore, 5))[b][np.asarray(keep[b])].any()
    tokens = jnp.arange(2 * 12 * 3.0).reshape(2, 12, 3)
    shuffled = take(tokens, jnp.argsort(noise, axis=1))
    assert np.array_equal(take(shuffled, restore), tokens)


def test_masks_differ_between_samples_and_hide_every_token_equally_often():
    keys = jax.random.split(jax.random.key(0), 4000)
    _, restore = random_mask(keys, 12, 3)
    mask = np.asarray(hidden(restore, 3))
    assert (mask.sum(1) == 9).all()
    assert len({m.tobytes() for m in mask}) > 200  # of 220 possible
    # each token is hidden with probability 3/4: 4000 draws have a deviation of 0.0068
    assert np.abs(mask.mean(0) - 0.75).max() < 0.03


def test_a_mask_depends_on_its_own_sample_alone():
    key = jax.random.key(3)
    whole = random_mask(sample_keys(key, jnp.arange(7)), 20, 5)[0]
    alone = random_mask(sample_keys(key, jnp.array([4])), 20, 5)[0]
    turned = random_mask(sample_keys(key, jnp.arange(7)[::-1]), 20, 5)[0]
    assert np.array_equal(whole[4], alone[0])
    assert np.array_equal(whole, turned[::-1])


def test_case_keys_use_both_words():
    key = jax.random.key(0)
    cases = jnp.array([[1, 2], [2, 1], [1, 3], [4, 2], [1, 2]], jnp.uint32)
    data = np.asarray(jax.random.key_data(case_keys(key, cases)))
    assert len({row.tobytes() for row in data[:4]}) == 4
    assert np.array_equal(data[0], data[4])


@pytest.mark.parametrize(("tokens", "visible"), [(12, 3), (14, 4)])
def test_a_round_of_a_run_s_masks_is_a_partition_of_the_tokens(tokens, visible):
    groups = groups_of(tokens, visible)
    keep, restore = run_masks(jax.random.key(5), jnp.arange(4 * groups), tokens, visible)
    rounds = np.asarray(keep).reshape(4, groups, visible)
    for one in rounds:  # no token is shown twice in a round
        assert len(set(one.ravel().tolist())) == groups * visible
    assert len({one.tobytes() for one in rounds}) == 4
    away = np.asarray(hidden(restore, visible))
    assert all(set(np.flatnonzero(~a)) == set(np.asarray(k).tolist()) for a, k in zip(away, keep, strict=True))
    if tokens % visible == 0:
        assert (away.sum(0) == 4 * (groups - 1)).all()
    tokens_of = jnp.arange(tokens * 2.0).reshape(1, tokens, 2)
    order = jnp.argsort(restore, axis=1)
    assert all(
        np.array_equal(take(take(tokens_of, o[None]), r[None]), tokens_of) for o, r in zip(order, restore, strict=True)
    )


def test_a_run_s_mask_depends_on_key_and_number_alone_and_group_0_is_a_random_mask():
    key, numbers = jax.random.key(1), jnp.array([6, 1])
    some, every = run_masks(key, numbers, 12, 3)[1], run_masks(key, jnp.arange(8), 12, 3)[1]
    assert np.array_equal(some, every[numbers])
    assert not np.array_equal(run_masks(jax.random.key(2), jnp.arange(8), 12, 3)[1], every)
    keys = jax.random.split(key, 5)
    for ours, plain in zip(group_mask(keys, jnp.zeros(5, int), 12, 3), random_mask(keys, 12, 3), strict=True):
        assert np.array_equal(ours, plain)


def test_the_standard_error_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=(3, 7))
    np.testing.assert_allclose(standard_error(jnp.asarray(values)), scipy.stats.sem(values, axis=1), rtol=1e-5)
