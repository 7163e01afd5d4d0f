"""The optimiser and gradients of a batch in parts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_8_devices import batch, crops, difference, small_system

from jmae.errors import InputError
from jmae.losses import masked_mse
from jmae.optim import adamw
from jmae.train import check_batches


def test_adamw_equals_its_written_out_form_and_spares_biases_and_norms():
    rng = np.random.default_rng(0)
    start = {
        "layer": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=(4, 2))},
        "norm": {"scale": np.ones(2)},
    }
    params = {k: {n: jnp.asarray(v, jnp.float32) for n, v in d.items()} for k, d in start.items()}
    tx = adamw(betas=(0.9, 0.95), decay=0.05)
    state = tx.init(params)
    first = {k: {n: np.zeros_like(v) for n, v in d.items()} for k, d in start.items()}
    second = {k: {n: np.zeros_like(v) for n, v in d.items()} for k, d in start.items()}
    for t in range(1, 4):
        grads = {k: {n: rng.normal(size=np.shape(v)) for n, v in d.items()} for k, d in start.items()}
        updates, state = tx.update(
            {k: {n: jnp.asarray(g, jnp.float32) for n, g in d.items()} for k, d in grads.items()}, state, params
        )
        params = {k: {n: v - 0.1 * updates[k][n] for n, v in d.items()} for k, d in params.items()}
        for k, d in grads.items():
            for n, g in d.items():
                first[k][n] = 0.9 * first[k][n] + 0.1 * g
                second[k][n] = 0.95 * second[k][n] + 0.05 * g**2
                step = (first[k][n] / (1 - 0.9**t)) / (np.sqrt(second[k][n] / (1 - 0.95**t)) + 1e-8)
                start[k][n] = start[k][n] - 0.1 * (step + (0.05 * start[k][n] if n == "kernel" else 0))
    for k, d in start.items():
        for n, v in d.items():
            np.testing.assert_allclose(params[k][n], v, atol=1e-5)


def test_the_masked_loss_ignores_visible_patches():
    target = jnp.zeros((1, 4, 2))
    prediction = jnp.array([[[1.0, 3.0], [100.0, 100.0], [2.0, 2.0], [-50.0, 0.0]]])
    hidden = jnp.array([[True, False, True, False]])
    assert float(masked_mse(prediction, target, hidden)[0]) == pytest.approx(((1 + 9) / 2 + 4) / 2)


@pytest.mark.parametrize("name, samples", [pytest.param("amae", batch, marks=pytest.mark.long), ("maemi", crops)])
@pytest.mark.long
def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(name, samples):
    key, found = jax.random.key(1), []
    for parts in (1, 4):
        _, system = small_system(f"accumulate={parts}", name=name)
        stage = system.stages[0]
        # One step on: in the first the learning rate is zero.
        state = stage.init(jax.random.key(0), {}, 16).replace(step=jnp.int32(1))
        program = jax.jit(partial(stage.step, steps=3)).lower(state, samples(16), key, {}).compile()
        found.append((*program(state, samples(16), key, {}), program.memory_analysis().temp_size_in_bytes))
    (whole, metrics, most), (summed, said, least) = found
    assert difference(said, metrics) < 1e-5 and difference(summed.opt, whole.opt) < 1e-5
    assert difference(summed.params, whole.params) < 2e-5  # Adam makes whole steps of gradients that are rounding alone
    assert least < most


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("ppii", "accumulate=2", "accumulate=2: ppii takes statistics of the whole batch: set it to 1"),
        ("simsid", "accumulate=2", "accumulate=2: simsid takes statistics of the whole batch: set it to 1"),
        ("maemi", "accumulate=3", r"accumulate=3: does not divide a batch \(train 8\): set it to a common divisor"),
    ],
)
def test_parts_that_mean_nothing_are_refused(name, change, words):
    with pytest.raises(InputError, match=words):
        small_system(change, name=name)


def test_parts_divide_the_batches_of_the_stages_that_take_them_alone():
    _, system = small_system("accumulate=4", "pretrain.batch=16", "proxy.batch=6", "adapt.batch=8")
    assert {stage.name: stage.parts for stage in system.stages} == {
        **{"pretrain": 4, "proxy": 1, "labels": 1},
        **{"module_a": 4, "module_b": 4},
    }
    check_batches(system, 2)
    with pytest.raises(
        InputError, match=r"accumulate=4: does not divide a batch \(pretrain 16, module_a 6, module_b 6"
    ):
        small_system("accumulate=4", "pretrain.batch=16", "adapt.batch=6")


def test_each_part_divides_among_the_devices():
    _, system = small_system(name="maemi")
    of = lambda batch, parts: replace(system, stages=(replace(system.stages[0], batch=batch, parts=parts),))
    check_batches(of(32, 4), 8)
    for whole, parts in ((16, 4), (8, 2), (8, 8)):
        words = f"a batch of {whole} in {parts} parts is not divisible by 8 devices: use a multiple of {8 * parts}, or"
        with pytest.raises(InputError, match=words):
            check_batches(of(whole, parts), 8)
