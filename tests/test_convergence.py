"""How many masks are enough: which scores are means over masks, that other numbers are other draws, and the verdict."""

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from sklearn.metrics import roc_auc_score
from sweeping import sweeper

from jmae import convergence as co
from jmae import recipe
from jmae.data.manifest import Row, parse_manifest
from jmae.data.preparation import Prepared, case_words
from jmae.data.volumes import Volume
from jmae.errors import InputError
from jmae.report.charts import convergence_chart
from jmae.report.words import convergence_sentences
from jmae.results import Result
from jmae.system import Sweep, System, load_system

MANY = 64


def a_recipe(name: str, **changes):
    config, _ = recipe.parse([f"--config=configs/{name}.py:smoke"], "")
    config.update_from_flattened_dict(changes)
    return config


def untrained(system):
    """Results of stages that were not trained; of one network each, so that no two are alike."""
    rng, results = np.random.default_rng(0), {}
    for stage in system.stages:
        found = drawn(lambda stage=stage: stage.result(stage.init(jax.random.key(0), results, 1)))
        noise = lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32)
        results[stage.name] = found | {"params": jax.tree.map(noise, found["params"])}
    return results


@pytest.mark.long
def test_scores_that_are_means_over_masks_are_those_that_are_said_to_be():
    of_case = {"evaluation.masks_of": "case"}
    single, many = (load_system(a_recipe("amae", **of_case | {"evaluation.masks": n})) for n in (1, MANY))
    results = untrained(single)
    image = jax.random.uniform(jax.random.key(1), (1, 64, 64, 1))
    words = jnp.asarray(np.stack([case_words(str(i)) for i in range(MANY)]))
    score = lambda system: jax.jit(lambda batch: system.score(results, batch, jax.random.key(2))["scores"])
    each = score(single)({"image": jnp.repeat(image, MANY, 0), "case": words})
    together = score(many)({"image": image, "case": words[:1]})
    for name, values in each.items():
        if name == "stage2_nearer":  # part of a difference of means, which may come near the mean by chance
            continue
        # Two means of MANY masks each: their difference has twice the variance of one.
        error = float(np.std(values, ddof=1)) * (2 / MANY) ** 0.5
        apart = abs(float(together[name][0]) - float(np.mean(values)))
        assert (apart > 4 * error + 1e-6) == (name == "stage2"), (name, apart, error)
    assert single.primary == "stage2_error" and single.averaged
    assert not load_system(a_recipe("amae", **{"evaluation.discrepancy": "reconstruction"})).averaged


class FakeScorer:
    """Masks that score label + noise by the words of the case's key, one of four at a time."""

    at_once = 4
    asked: ClassVar[list[int]] = []

    def __init__(self, config, system, results, cases=None):
        self.number, self.system = config.evaluation.masks, system
        self.asked.append(self.number)
        assert not config.evaluation.convergence

    def prepare(self, row):
        return Prepared(row=row, array=np.zeros(1), geometry=None, digest="")

    def dispatch(self, cases, draw, repeats):
        words = [case_words(f"{case.row.id}\n{draw}") for case in cases]
        noise = [np.random.default_rng(w.tolist()).normal(0, 3 / self.number**0.5) for w in words]
        scores = [np.array([case.row.label + n]) for case, n in zip(cases, noise, strict=True)]
        return [Result(case, {}, {self.system.primary: s}) for case, s in zip(cases, scores, strict=True)]

    def fetch(self, started):
        return started


@pytest.fixture
def fake(monkeypatch, small_set):
    monkeypatch.setattr(FakeScorer, "asked", [])
    monkeypatch.setattr(co, "Scorer", FakeScorer)
    config = a_recipe("amae", **{"evaluation.masks": 6, "evaluation.convergence": 3})
    rows = [row for row in parse_manifest(small_set)[0] if row.split == "test"]
    return config, rows, FakeScorer.asked


NUMBERS = [1, 2, 4, 6]


def drawn_scores(config, system, rows):
    draws = co.planned_draws(config, system, {}, "masks", NUMBERS)
    return co.averaged(co.draw_scores(system, draws, rows), NUMBERS)


@pytest.mark.parametrize(("averaged", "masks_of"), [(True, "case"), (True, "run"), (False, "case")])
def test_draws_are_independent_and_independent_masks_are_scored_by_one_program(fake, averaged, masks_of):
    config, rows, asked = fake
    config.evaluation.masks_of = masks_of
    single = averaged and masks_of == "case"
    draws = drawn_scores(config, replace(load_system(config), averaged=averaged), rows)
    assert asked == ([1] if single else NUMBERS)
    assert [len(each) for each in draws.values()] == ([18, 9, 4, 3] if single else [3] * 4)
    for number, each in draws.items():
        values = np.concatenate([np.ravel(scores) for scores in each])
        assert len(np.unique(values)) == values.size, number
    if single:
        np.testing.assert_allclose(draws[6][1], np.mean(draws[1][6:12], 0))


def test_the_standard_error_is_that_of_the_draws_aurocs(fake):
    config, rows, _ = fake
    found = co.convergence(config, load_system(config), {}, rows)
    labels = [row.label for row in rows]
    draws = drawn_scores(config, load_system(config), rows)
    for step, each in zip(found["steps"], draws.values(), strict=True):
        values = [roc_auc_score(labels, scores[0]) for scores in each]
        assert step["auroc"] == pytest.approx(np.mean(values)) and step["draws"] == len(each)
        assert step["se"] == pytest.approx(np.std(values, ddof=1) / len(each) ** 0.5)
    assert found["what"] == "masks" and [s["number"] for s in found["steps"]] == NUMBERS
    assert co.convergence(config, load_system(config), {}, rows[:6]) is None  # one class


def steps_of(*triples):
    return [dict(zip(("number", "auroc", "deviation"), t, strict=True), se=t[2] / 2, draws=4) for t in triples]


@pytest.mark.parametrize(
    ("steps", "expected", "words"),
    [
        (
            steps_of((1, 0.70, 0.02), (2, 0.798, 0.001), (4, 0.8, 0.001)),
            2,
            "From 2 masks on, an evaluation differs from that by at most 0.01",
        ),
        (
            steps_of((1, 0.8, 0.001), (2, 0.77, 0.001), (4, 0.8, 0.001)),
            4,
            "With fewer masks, an evaluation can differ from that by more than 0.01",
        ),
        (steps_of((1, 0.7, 0.1), (2, 0.75, 0.05), (4, 0.8, 0.02)), None, "varies by 0.040"),
        (steps_of((1, 0.8, 0), (2, 0.8, 0)), 1, "does not depend on the number of masks"),
    ],
)
def test_enough_is_from_where_on_nothing_larger_strays(steps, expected, words):
    assert co.enough(steps) == expected
    found = {"what": "masks", "steps": steps, "enough": expected, "close": co.CLOSE, "rising": False}
    assert words in " ".join(convergence_sentences(found))
    assert "aria-label" in convergence_chart(found)
    rising = " ".join(convergence_sentences(found | {"rising": True}))
    assert ("may raise it further" in rising) == (steps[0]["deviation"] > 0)


def test_sweeps_over_a_volume_are_a_number_that_one_program_is_given():
    traced = []

    def score(results, image, keys, groups):
        traced.append(1)
        noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:]))(keys)
        return image + noise, jnp.ones((*image.shape[:-1], 1))

    sweep = Sweep(
        window=(4, 4),
        stride=(2, 4),
        repeats=3,
        score=score,
        fuse=lambda results, averages, inside: {"maps": {"m": averages[..., 0] ** 2}},
    )
    config = a_recipe("maemi", **{"evaluation.batch": 4})
    volume = Volume(jnp.zeros((10, 8, 1)), *[None] * (len(Volume._fields) - 1))
    run = sweeper(config, replace(sweep, repeats=1), {})
    once = run(volume, "a")["maps"]["m"]
    count = len(traced)
    again = run(volume, "a", repeats=3)["maps"]["m"]
    assert len(traced) == count and np.abs(once - again).max() > 0.05
    np.testing.assert_allclose(again, sweeper(config, sweep, {})(volume, "a")["maps"]["m"], rtol=1e-6)
    assert np.std(again) < np.std(once)


def test_volumes_are_swept_from_one_mask_up_with_other_masks_each_time(monkeypatch):
    def score(results, image, keys, groups):
        noise = jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:]))(keys)
        return image + noise, jnp.ones((*image.shape[:-1], 1))

    sweep = Sweep(
        window=(4, 4),
        stride=(4, 4),
        score=score,
        fuse=lambda results, averages, inside: {"maps": {"m": averages[..., 0]}},
    )
    toy = System(name="toy", stages=(), uses=(), primary="m", sweep=sweep)
    config = a_recipe("maemi", **{"evaluation.repeats": 8, "evaluation.convergence": 4, "evaluation.top": 0.1})
    rows = [Row(str(i), "", "test", i % 2, ("x",)) for i in range(4)]

    def prepare(row):
        level = row.label / 10 + int(row.id) / 100  # all cases have the same masks
        volume = Volume(np.full((8, 8, 1), level, np.float32), *[None] * (len(Volume._fields) - 1))
        return Prepared(row=row, array=volume.array, geometry=None, digest="", volume=volume)

    monkeypatch.setattr(co, "with_number", lambda config, what, n: (config, toy))
    planned = co.planned_draws(config, toy, {}, "repeats", [1, 8], SimpleNamespace(case=prepare))
    draws = co.draw_scores(toy, planned, rows)
    assert [len(each) for each in draws.values()] == [4, 4] and draws[1][0].shape == (1, 4)
    assert all(len(np.unique(each)) == 16 for each in draws.values())
    assert np.mean(draws[1]) > np.mean(draws[8]) + 0.1 > 0.6  # noise: the highest tenth of one mask lies higher


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("amae", {"evaluation.convergence": 1}, "to 0 .off., or to 2 or more repetitions"),
        ("maemi", {"evaluation.convergence": 2}, "fewer repeats: evaluation.repeats is 1"),
    ],
)
def test_what_cannot_be_told_is_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        load_system(a_recipe(name, **changes))
