"""Rivals beside a system: the score of a stand-in is the system's own where it is the network, and what evaluations say
of the rivals."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from ml_collections import ConfigDict
from sklearn.metrics import average_precision_score, roc_auc_score

from jmae import recipe, rivals
from jmae.data.cases import load_cases, load_rows
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.data.preparation import case_words
from jmae.figures import image_difference, pixel_difference
from jmae.masking import hidden, run_masks
from jmae.patches import patchify
from jmae.rival_scores import fitted_rivals
from jmae.system import System, load_system

SIZES = {"amae": (32, 32), "memmc_mae": (48, 48), "maemi": (16, 16, 4)}
CHANGES = {
    "amae": ("data.size=32,32", "model.patch=8,8", "variant=stage2"),
    "memmc_mae": ("data.size=48,48", "model.patch=8,8", "evaluation.masks=3"),
    "maemi": ("data.size=16,16,4", "model.patch=4,4,2", "evaluation.stride=8,8,2", "evaluation.repeats=2"),
}


def made(name: str, *changes: str) -> tuple[ConfigDict, System, dict]:
    """A small recipe, its system and drawn results of the stages that the score reads."""
    arguments = [f"--config=configs/{name}.py:smoke", *(f"--config.{c}" for c in (*CHANGES[name], *changes))]
    config = recipe.parse(arguments, "")[0]
    system = load_system(config)
    results: dict = {}
    for number, stage in enumerate(system.stages):
        if stage.name in system.uses:
            state = drawn(lambda stage=stage: stage.init(jax.random.key(0), results, 8), seed=number)
            results[stage.name] = {"params": state.params, "stats": state.stats}
    return config, system, results


def images(config: ConfigDict, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (n, *config.data.size, config.data.channels)).astype(np.float32)


def batch_score(config, system, results, image):
    """The scores and maps of a batch of images, or of a volume that is one window."""
    if system.sweep:
        keys = jax.random.split(jax.random.key(3), len(image))
        values, weights = jax.jit(partial(system.sweep.score, results))(image, keys, jnp.arange(len(image)) % 2)
        return {"values": values, "weights": weights}
    batch = {"image": image, "case": jnp.stack([jnp.asarray(case_words(f"c{i}")) for i in range(len(image))])}
    found = jax.jit(system.score, static_argnames="chunk")(results, batch, jax.random.key(config.seed))
    return {name: found[name] for name in ("maps", "scores")}


@pytest.mark.parametrize("masks", ["run", pytest.param("case", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SIZES)
def test_a_stand_in_that_is_the_network_has_the_systems_own_score(name, masks):
    config, system, results = made(name, f"evaluation.masks_of={masks}")
    image = images(config, 2)
    other = system.prediction.beside(system.prediction.predict)
    own, stand_in = (batch_score(config, one, results, image) for one in (system, other))
    if system.sweep:
        np.testing.assert_allclose(stand_in["values"], own["values"], rtol=1e-6, atol=1e-6)
        assert float(np.std(own["values"])) > 0
        return
    for kind in ("maps", "scores"):
        assert set(stand_in[kind]) <= set(own[kind]) and stand_in[kind]
        for score, values in stand_in[kind].items():
            np.testing.assert_allclose(values, own[kind][score], rtol=2e-5, atol=2e-5)  # other fusions
    assert other.primary in stand_in["scores"]


# --- in an evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_rivals_of_amae_have_its_error_under_its_masks(finished):
    """The figures of a run, against the closed forms, mask by mask."""
    found = json.loads((finished / "evaluation" / "metrics.json").read_text())
    config = recipe.read(finished)
    rows = load_rows(config, lambda line: None)
    of = lambda split: [row for row in rows if row.split == split]
    view = lambda x: (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
    patch = tuple(config.model.patch)
    read = lambda rows: patchify(jnp.asarray(view(Images(rows, config).image(np.arange(len(rows))))), patch)
    known, new, normals = read(of("train")), read(of("test")), read([row for row in of("val") if row.label == 0])
    n = known.shape[1]
    keep, restore = run_masks(jax.random.key(config.seed), jnp.arange(config.evaluation.masks), n, n // 4)
    absent, labels = np.asarray(hidden(restore, n // 4)), [row.label for row in of("test")]
    fitted = rivals.rivals_of(rivals.KINDS, known, tuple(config.data.size), patch)
    assert fitted.names == ("7 components", "blur", "5 nearest normals")
    for name in fitted.names:
        error = (
            np.asarray(fitted.predict(fitted.parameters(name), new, keep, restore)) - np.asarray(new)[:, None]
        ) ** 2
        scores = (error * absent[None, ..., None]).mean((1, 2, 3))
        image = found["baselines"][f"{name}: module_a"]["image"]
        assert image["auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert image["ap"] == pytest.approx(average_precision_score(labels, scores))
        assert found["baselines"][f"{name}: module_a"]["pixel"]["auroc"] is not None
        assert found["subsets"]["central 80%"]["baselines"][f"{name}: module_a"]["image"]["auroc"] is not None
        one_round = [x[:4] for x in (keep, restore)]
        sums = rivals.explained_sums(fitted.predict(fitted.parameters(name), normals, *one_round), normals, *one_round)
        assert found["explained"][name] == pytest.approx(rivals.explained(np.asarray(sums), 1), abs=1e-3)
    assert set(found["explained"]) == {"the network", *fitted.names}


def test_the_best_of_all_baselines_is_named_with_the_difference_from_it(finished):
    found = json.loads((finished / "evaluation" / "metrics.json").read_text())
    aurocs = {name: part["image"]["auroc"] for name, part in found["baselines"].items() if part["image"]}
    best = found["best_rival"]["image"]
    assert aurocs[best["name"]] == max(aurocs.values()) and best["of"] == len(aurocs)
    assert best["auroc"] == pytest.approx(found["image"]["auroc"] - aurocs[best["name"]])
    assert best["ap"] == pytest.approx(found["image"]["ap"] - found["baselines"][best["name"]]["image"]["ap"])
    page = (finished / "evaluation" / "report.html").read_text()
    assert f"{found['primary']} is {'' if best['auroc_ci'][0] > 0 else 'not '}better than" in page


def test_a_difference_is_a_mean_over_replicates_and_that_of_maps_over_patients():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    rows = [Row(f"c{i}", f"p{i // 2}", "test", int(y), ()) for i, y in enumerate(labels)]
    primary, baselines = labels + rng.normal(size=(2, 40)), {k: labels + rng.normal(size=(1, 40)) for k in "ab"}
    auroc = {name: roc_auc_score(labels, values[0]) for name, values in baselines.items()}
    evaluation = {"baselines": {name: {"image": {"auroc": value}} for name, value in auroc.items()}}
    found = image_difference(primary, baselines, evaluation, rows, 200)
    name = max(auroc, key=auroc.get)
    assert found["name"] == name and found["of"] == 2
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(labels, v) for v in primary]) - auroc[name])
    each = []
    for draw in np.random.default_rng(0).integers(20, size=(200, 20)):  # patients, with both their cases
        cases = np.concatenate([2 * draw, 2 * draw + 1])
        of = lambda values, cases=cases: roc_auc_score(labels[cases], values[cases])
        each.append(np.mean([of(v) for v in primary]) - of(baselines[name][0]))
    np.testing.assert_allclose(found["auroc_ci"], np.quantile(each, (0.025, 0.975)))
    assert image_difference(primary, {}, {"baselines": {}}, rows, 9) is None

    value = lambda auroc: {"auroc": auroc, "ap": auroc / 2}
    patients = [
        {"patient": str(i), "prevalence": 0.1, **value(a), "baselines": {"low": value(b), "high": value(c)}}
        for i, (a, b, c) in enumerate(rng.uniform(size=(9, 3)) * [1, 0.2, 0.9])
    ]
    means = {k: {"auroc": np.mean([p["baselines"][k]["auroc"] for p in patients])} for k in ("low", "high")}
    evaluation = {"baselines": dict.fromkeys(means), "patient_means": {"own": {"auroc": 1.0}, **means}}
    found = pixel_difference(evaluation | {"per_patient": patients}, 300)
    apart = np.array([p["auroc"] - p["baselines"]["high"]["auroc"] for p in patients])
    drawn = np.random.default_rng(0).integers(9, size=(300, 9))
    assert (found["name"], found["of"], found["n"]) == ("high", 2, 9)
    assert found["auroc"] == pytest.approx(apart.mean())
    np.testing.assert_allclose(found["auroc_ci"], np.quantile(apart[drawn].mean(1), (0.025, 0.975)))
    assert pixel_difference({"baselines": {}, "patient_means": None}, 9) is None


@pytest.mark.long
def test_one_program_scores_with_all_rivals_and_too_few_normals_have_none(small_set, capfd):
    config, system, _ = made("amae", f"data.manifest={small_set}", "data.phantom=", "variant=mae")
    cases = load_cases(config, lambda line: None)
    rows = [row for row in cases.rows if row.split == "train"]
    found = fitted_rivals(config, system, Images(rows, config), rows, cases)
    assert len({id(scorer.passes.compiled) for scorer in found.scorers.values()}) == 1 < len(found.scorers)
    config.evaluation.rivals = ("components",)
    assert fitted_rivals(config, system, Images(rows[:2], config), rows, cases) is None
    assert "no rivals of the network: too few training normals" in capfd.readouterr().err
    config.evaluation.rivals = ()
    assert fitted_rivals(config, system, Images(rows, config), rows, cases) is None
    assert load_system(recipe.parse(["--config=configs/ppii.py:smoke"], "")[0]).prediction is None
