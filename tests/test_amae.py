"""AMAE against its specification."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn, first_state
from ml_collections import ConfigDict
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from configs import amae as recipe
from jmae.data import phantoms
from jmae.errors import InputError
from jmae.masked import standardised
from jmae.masking import case_keys, fold_in, hidden, random_mask, sample_keys
from jmae.nn.mae import MAE
from jmae.patches import patchify, unpatchify
from jmae.reconstruct import masked_loss, reconstruct
from jmae.system import load_system, network
from jmae.systems.amae import VARIANTS, pseudo_labels
from jmae.tokens import token_features

KEY = jax.random.key(0)


def config(**changes) -> ConfigDict:
    c = recipe.get_config("smoke")
    c.data.size, c.model.patch, c.evaluation.masks_of = (32, 32), (8, 8), "case"
    for name, value in changes.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


def batch(n: int = 16, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    lungs = np.zeros((n, 32, 32), bool)
    lungs[:, 6:26, 4:14] = lungs[:, 6:26, 18:28] = True
    return {
        "image": jnp.asarray(rng.uniform(size=(n, 32, 32, 1)), jnp.float32),
        "index": jnp.arange(n),
        "case": jnp.asarray(rng.integers(0, 2**32, (n, 2)), jnp.uint32),
        "lungs": jnp.asarray(lungs),
    }


@pytest.fixture(scope="module")
def trained():
    """(stages by name, results) of the whole system, two steps each, every stage on images of its own."""
    system = load_system(config())
    results, stages = {}, {stage.name: stage for stage in system.stages}
    for number, (name, stage) in enumerate(stages.items()):
        state = stage.init(KEY, results, 16)
        step = jax.jit(partial(stage.step, steps=10))
        for k in range(2):
            state, _ = step(state, batch(seed=10 * number + k), jax.random.fold_in(KEY, k), results)
        results[name] = {"params": state.params, "stats": state.stats}
    return stages, results


def labels_of(p1: np.ndarray, *rule):
    return pseudo_labels(np.log(p1 / (1 - p1)), *rule)


def mae_of(c, params):
    sizes = {k: c.model[k] for k in ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")}
    make = lambda rngs: MAE(size=(32, 32), patch=(8, 8), channels=c.model.channels, **sizes, rngs=rngs)
    return network(make)[1](params)


def leaves_equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- the recipe's sizes -------------------------------------------------------------------------------------------


def test_the_paper_preset_has_the_papers_parameter_counts():
    system = load_system(recipe.get_config("paper"))
    pretrain, proxy = (jax.eval_shape(lambda s=s: s.init(KEY, FAKE, 1)) for s in system.stages[:2])
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    decoder = {k: v for k, v in pretrain.params.items() if k.startswith(("decoder", "mask", "predict"))}
    assert count(pretrain.params) == 28_487_424
    assert count(decoder) == 6_897_408
    assert count(proxy.params) == 264_322


FAKE = {"pretrain": {"params": {}, "stats": {}}}


def test_paper_steps():
    stages = {stage.name: stage for stage in load_system(recipe.get_config("paper")).stages}
    assert stages["proxy"].steps(3851) == 36_000  # 240 steps an epoch, the last incomplete batch dropped
    assert stages["module_a"].steps(4651) == 290 * 150


def test_modules_share_one_step():
    a, b = load_system(config()).stages[-2:]
    assert a.step is b.step


# --- pseudo-labels (section 5) ------------------------------------------------------------------------------------


def test_the_more_confident_half_of_each_predicted_class_is_kept():
    p1 = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 41))
    predicted, kept = labels_of(p1, 50)
    assert np.array_equal(predicted, p1 > 0.5)
    for c, confidence in ((0, 1 - p1), (1, p1)):
        of = predicted == c
        assert kept[of].sum() == -(-of.sum() // 2)
        assert confidence[of & kept].min() >= confidence[of & ~kept].max()


def test_ties_at_the_threshold_are_kept_and_a_lone_class_keeps_all():
    assert labels_of(np.array([0.9, 0.8, 0.8, 0.8, 0.1]), 50)[1].tolist() == [True] * 5
    assert labels_of(np.array([0.9, 0.8, 0.7, 0.6]), 50)[1].tolist() == [True, True, False, False]


def test_the_other_reading_takes_percentiles_over_all_and_drops_what_both_classes_select():
    predicted, kept = labels_of(np.array([0.1, 0.2, 0.3, 0.4, 0.45]), 50, "all")
    # median of p1 is 0.3, of p0 is 0.7: both select the third image
    assert predicted[kept].tolist() == [0, 0, 1, 1] and kept.tolist() == [True, True, False, True, True]


def test_very_confident_images_are_still_ranked():
    """As float32 probabilities all of these are 1.0, and ties are kept."""
    kept = pseudo_labels(np.array([20.0, 21, 22, 23, -20, -21, -22, -23], np.float32), 50)[1]
    assert kept.tolist() == [False, False, True, True] * 2


@pytest.mark.long
def test_a_class_that_hardly_any_image_is_predicted_as_is_said_aloud(trained, capsys):
    stages, results = trained
    rows = [row for row in phantoms.rows("chest") if row.split == "unlabeled"][:4]
    stats = {"margin": np.array([-1.0, -2, -3, 0.5])}
    stages["labels"].table(rows, {**results, "labels": {"params": {}, "stats": stats}})
    assert "1 unlabelled images are predicted abnormal" in capsys.readouterr().err


def test_modules_train_on_disjoint_sets_and_the_labels_sweep_scores_every_image(trained):
    stages, results = trained
    rows = [row for row in phantoms.rows("chest") if row.split in ("train", "unlabeled")][248:272]
    stats = {"margin": np.random.default_rng(0).normal(size=sum(r.split == "unlabeled" for r in rows))}
    fake = {**results, "labels": {"params": {}, "stats": stats}}
    a, b = (stages[name].rows(rows, fake) for name in ("module_a", "module_b"))
    assert not set(a) & set(b)
    assert {i for i in range(len(rows)) if rows[i].split == "train"} <= set(a)
    assert {rows[i].split for i in b} == {"unlabeled"}
    table = stages["labels"].table(rows, fake)
    kept = {line["id"] for line in table if line["kept"]}
    assert kept == {rows[i].id for i in (*a, *b) if rows[i].split == "unlabeled"}
    assert (results["labels"]["stats"]["margin"] != 0).all()  # every place was written


# --- stages ---------------------------------------------------------------------------------------------------------


def test_the_encoder_stays_frozen_in_the_proxy_task_and_only_the_head_learns(trained):
    stages, results = trained
    stage = stages["proxy"]
    state = stage.init(KEY, results, 16)
    after, _ = jax.jit(partial(stage.step, steps=10))(state.replace(step=jnp.int32(5)), batch(), KEY, results)
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
    assert not leaves_equal(after.params, state.params)
    assert not leaves_equal(after.stats, state.stats)


def test_the_proxy_loss_is_the_sum_of_two_mean_cross_entropies(trained):
    """Eq. 2, with a head whose logits are known: all weights of its last layer 0, so both terms are log 2."""
    stages, results = trained
    state = stages["proxy"].init(KEY, results, 16)
    state.params["out"]["kernel"] = jnp.zeros_like(state.params["out"]["kernel"])
    loss = jax.jit(lambda state: stages["proxy"].step(state, batch(), KEY, results, steps=10)[1]["loss"])
    assert float(loss(state)) == pytest.approx(2 * np.log(2), rel=1e-6)
    state.params["out"]["bias"] = jnp.array([1.0, 0.0])
    both = optax.softmax_cross_entropy_with_integer_labels(jnp.array([[1.0, 0.0]] * 2), jnp.arange(2))
    assert float(loss(state)) == pytest.approx(float(both.sum()), rel=1e-6)


def test_both_modules_start_from_the_pretrained_weights_and_move(trained):
    stages, results = trained
    for name in ("module_a", "module_b"):
        assert leaves_equal(stages[name].init(KEY, results, 1).params, results["pretrain"]["params"])
        assert not leaves_equal(results[name]["params"], results["pretrain"]["params"])


def test_a_sample_is_masked_alike_wherever_it_stands_in_the_batch(trained):
    stages, results = trained
    stage = stages["module_a"]
    state, whole = stage.init(KEY, results, 1), batch()
    turned = {name: value[::-1] for name, value in whole.items()}
    losses = [float(jax.jit(lambda b: stage.step(state, b, KEY, {}, steps=10)[1]["loss"])(b)) for b in (whole, turned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- score (section 7) ------------------------------------------------------------------------------------------------


def score(c, results, data):
    return jax.jit(lambda r, b: load_system(c).score(r, b, KEY))(results, data)


def test_equal_modules_have_no_discrepancy(trained):
    _, results = trained
    same = {**results, "module_b": results["module_a"]}
    out = score(config(), same, batch(4))
    # Two calls of one network in one program: equal up to the rounding of sums in another order.
    assert np.abs(out["maps"]["stage2"]).max() < 1e-6 and np.abs(out["scores"]["stage2"]).max() < 1e-6


@pytest.mark.long
def test_the_score_is_the_mean_absolute_difference_of_mean_reconstructions(trained):
    """Eq. 4 written out: the same four masks for both modules, visible patches pasted."""

    _, results = trained
    c, data = config(evaluation__masks=4), batch(3)
    image = np.asarray(data["image"])
    mean, std = image.mean((1, 2, 3), keepdims=True), image.std((1, 2, 3), keepdims=True)
    image = (image - mean) / std
    patches, means, errors = patchify(jnp.asarray(image), (8, 8)), [], []
    for name in ("module_a", "module_b"):
        drawn = []
        for j in range(4):
            keep, restore = random_mask(fold_in(case_keys(KEY, data["case"]), j), 16, 4)
            prediction = mae_of(c, results[name]["params"])(patches, keep, restore)
            drawn.append(np.asarray(jnp.where(hidden(restore, 4)[..., None], prediction, patches)))
        means.append(np.mean(drawn, axis=0))
        errors.append(np.mean((np.stack(drawn) - np.asarray(patches)) ** 2, axis=(0, 2, 3)))
    out = score(c, results, data)
    scores = out["scores"]
    assert (scores["stage2"] > 1e-3).all()  # equal modules would agree with anything
    normal = np.asarray(unpatchify(jnp.asarray(means[0]), (32, 32), (8, 8)))  # module A's, in the image's own range
    np.testing.assert_allclose(out["reconstruction"], normal * std + mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores["stage2"], np.abs(means[0] - means[1]).mean((1, 2)), rtol=1e-4)
    # ours: positive where B, which saw anomalies, explains an image better than A
    np.testing.assert_allclose(scores["stage2_error"], errors[0] - errors[1], rtol=1e-3, atol=1e-6)


def test_the_map_and_the_score_agree_and_every_score_is_given(trained):
    _, results = trained
    out = score(config(), results, batch(4))
    assert set(out["scores"]) == {"mae", "module_a", "stage1", "stage2", "stage2_nearer", "stage2_error"}
    for name, m in out["maps"].items():
        assert m.shape == (4, 32, 32)
        np.testing.assert_allclose(np.asarray(m).mean((1, 2)), out["scores"][name], rtol=1e-4, atol=1e-7)
    assert np.isfinite(out["scores"]["stage1"]).all()


def test_tokens_are_signed_by_their_distances_to_normal_images_and_to_module_b_s_own(trained):
    """(d - e) / (d + e) of module B's inner tokens, at the same place, against NumPy; its own images are those that
    the training took."""
    _, results = trained
    c = config(**{"evaluation.tokens": "position", "evaluation.bank_size": 200})
    system, images, cases = load_system(c), batch(12), 12
    fits = {fit.name: fit for fit in system.fits}
    measured = fits["own_tokens"].measure(results, images, None)
    margin = np.asarray(measured["margin"]).copy()
    order = np.argsort(margin)
    margin[order] = np.linspace(-1, 1, cases)  # the trained head may call all of them one class
    label, confident = pseudo_labels(margin, c.adapt.percentile, c.adapt.percentile_over)
    own = confident & (label == 1)
    assert 0 < own.sum() < cases
    bank = fits["own_tokens"].finish({"tokens": measured["tokens"], "margin": margin}, None, [])
    normal = fits["tokens"].measure(results, images, None)
    kept = {"tokens": fits["tokens"].finish(normal, None, []), "own_tokens": bank}
    new = batch(3, seed=100)
    out = system.score(results | jax.tree.map(jnp.asarray, kept), new, jax.random.key(0))
    tokens = np.asarray(fits["own_tokens"].measure(results, new, None)["tokens"])
    grid = (2, 2)  # of inner tokens: all are near each other
    assert tokens.shape[1] == np.prod(grid)
    apart = lambda bank: np.array(
        [
            [np.linalg.norm(bank.reshape(-1, bank.shape[-1]) - token, axis=-1).min() for token in image]
            for image in tokens
        ]
    )
    d, e = apart(np.asarray(normal["module_b"])), apart(np.asarray(measured["tokens"])[own])
    expected = (d.mean(1) - e.mean(1)) / (d.mean(1) + e.mean(1))
    np.testing.assert_allclose(out["scores"]["tokens_signed"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(out["maps"]["tokens_signed"])[:, [0, 0, -1, -1], [0, -1, 0, -1]], (d - e) / (d + e), atol=1e-4
    )


def test_a_ridge_regression_tells_mean_tokens_of_normal_from_those_of_unlabelled_images(trained):
    """Against scikit-learn, on tokens of all positions; the score has no map."""
    _, results = trained
    c = config(**{"evaluation.tokens": "gaussian", "evaluation.layer": 2, "evaluation.discrepancy": "tokens_ridge"})
    system, rows = load_system(c), [row for row in phantoms.rows("chest") if row.split in ("train", "unlabeled")]
    (fit,) = (fit for fit in system.fits if fit.name == "token_ridge")
    chosen = [rows[i] for i in fit.rows(rows)]
    assert {row.split for row in chosen} == {"train", "unlabeled"} and len(chosen) == len(rows)
    few = [*chosen[:9], *chosen[-7:]]
    known, new = batch(16), batch(3, seed=100)
    learned = fit.finish(fit.measure(results, known, None), None, few)
    mae, patch = mae_of(c, results["module_b"]["params"]), (8, 8)
    view = lambda given: patchify(standardised(given["image"], c), patch)
    tokens = lambda given: np.asarray(token_features(mae, view(given), np.arange(16), 2), np.float64)
    scaler = StandardScaler().fit(tokens(known).mean(1))
    model = Ridge(alpha=c.model.width).fit(scaler.transform(tokens(known).mean(1)), np.repeat([-1, 1], [9, 7]))
    kept = {"token_ridge": jax.tree.map(jnp.asarray, learned), "tokens": {}}
    out = system.score(results | kept, new, jax.random.key(0))
    expected = model.predict(scaler.transform(tokens(new).mean(1)))
    np.testing.assert_allclose(out["scores"]["tokens_ridge"], expected, rtol=1e-3, atol=1e-4)
    assert "tokens_ridge" not in out["maps"] and system.map == "tokens_b"
    rival = system.rivals["untrained"].system
    assert {fit.name for fit in rival.fits} == {"tokens", "token_ridge"} and any("scanner" in n for n in system.notes)
    params = {"encoder": results["module_b"]}  # a trained encoder in the rival's place has the system's own score
    fits = {fit.name: fit.finish(fit.measure(params, known, None), None, few) for fit in rival.fits}
    found = rival.score(params | jax.tree.map(jnp.asarray, fits), new, None)
    np.testing.assert_allclose(found["scores"]["tokens_ridge"], expected, rtol=1e-3, atol=1e-4)
    for variant in ("one_class", "mask_rec"):
        alone = config(**{"variant": variant, "evaluation.tokens": "position"})
        assert "token_ridge" not in {fit.name for fit in load_system(alone).fits}
    with pytest.raises(InputError, match="set evaluation"):
        load_system(config(**{"evaluation.discrepancy": "tokens_ridge"}))


@pytest.mark.parametrize(
    "changes", [{"variant": "b_perfect", "evaluation.tokens": "position"}, {"evaluation.tokens": "gaussian"}]
)
def test_signed_tokens_need_banks_and_images_that_are_known_without_labels(changes):
    with pytest.raises(InputError, match="tokens_signed needs evaluation"):
        load_system(config(**{"evaluation.discrepancy": "tokens_signed"} | changes))
    with pytest.raises(InputError, match="set evaluation"):
        load_system(config(**{"evaluation.discrepancy": "tokens_signed"}))


def test_without_pseudo_labels_the_own_images_are_all_of_module_b():
    rows = [row for row in phantoms.rows("chest") if row.split in ("train", "unlabeled")]
    for variant, split in (("no_pseudo", "unlabeled"), ("b_normals", "train")):
        c = config(**{"variant": variant, "evaluation.tokens": "global", "evaluation.discrepancy": "tokens_signed"})
        (fit,) = (fit for fit in load_system(c).fits if fit.name == "own_tokens")
        assert {rows[i].split for i in fit.rows(rows)} == {split}
        tokens = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
        bank = fit.finish({"tokens": tokens}, None, [])["bank"]
        assert {tuple(token) for token in bank.reshape(-1, 3)} == {tuple(token) for token in tokens.reshape(-1, 3)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_scores_what_it_trained(variant, trained):
    _, results = trained
    c = config(variant=variant)
    system = load_system(c)
    out = score(c, {name: results[name] for name in system.uses}, batch(2))
    assert system.primary in out["scores"]
    assert {stage.name for stage in system.stages} == set(VARIANTS[variant])


def test_the_variants_train_on_the_papers_sets(trained):
    rows = [row for row in phantoms.rows("chest") if row.split in ("train", "unlabeled")]
    of = lambda variant, name: next(s for s in load_system(config(variant=variant)).stages if s.name == name).rows(
        rows, {}
    )
    normal = [i for i, row in enumerate(rows) if row.split == "train"]
    unlabelled = [i for i, row in enumerate(rows) if row.split == "unlabeled"]
    assert of("mask_rec", "module_a").tolist() == normal + unlabelled
    assert of("no_pseudo", "module_a").tolist() == normal
    assert of("no_pseudo", "module_b").tolist() == unlabelled
    assert of("stage1", "proxy").tolist() == normal


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("variant", "stage3", "one of 'stage2', 'stage1'"),
        ("adapt__percentile", 250.0, "from 0 to below 100"),
        ("data__size", (32, 32, 8), "take a preset whose data.size"),
        ("data__unlabeled_size", 50, "goes with data.anomaly_ratio"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, words):
    with pytest.raises(InputError, match=words):
        load_system(config(**{setting: value}))


@pytest.mark.long
def test_the_proxy_task_learns_to_call_pasted_images_abnormal():
    """Polarity decides which images module B sees: after training on one batch, p(abnormal) is high where pasted."""
    c = config(variant="stage1", proxy__lr=1e-2, proxy__steps=60)
    system = load_system(c)
    pretrain, proxy = system.stages
    results = {"pretrain": {"params": pretrain.init(KEY, {}, 1).params, "stats": {}}}
    state, data = proxy.init(KEY, results, 16), batch()
    data["image"] = jnp.full_like(data["image"], 0.2) + 0.3 * data["lungs"][..., None]
    data["image"] = data["image"].at[:, :6].set(0.9)  # what is cut from there shows inside the lungs
    step = jax.jit(lambda s: proxy.step(s, data, KEY, results, steps=60))
    for _ in range(60):
        state, metrics = step(state)
    assert float(metrics["accuracy"]) > 0.8 and float(metrics["lung_fields_found"]) == 1
    results["proxy"] = {"params": state.params, "stats": state.stats}
    assert float(np.mean(score(c, results, data)["scores"]["stage1"])) < -0.4  # the plain images are the normal ones


# --- preparation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_channels():
    """(config, system, results) in the paper's preparation: fixed mean and deviation, grey images as three channels."""
    c = config(data__normalise="fixed", model__channels=3, evaluation__masks=2)
    system, results = load_system(c), {}
    for stage in system.stages:
        init = lambda r, stage=stage: stage.init(KEY, r, 16)
        state = jax.jit(init)(results) if stage.name == "proxy" else first_state(stage, results, 16)
        results[stage.name] = {"params": state.params, "stats": state.stats}
    results["module_b"] = {"params": drawn(lambda: system.stages[0].init(KEY, {}, 16), seed=9).params, "stats": {}}
    return c, system, results


@pytest.mark.long
def test_fixed_preparation_and_three_equal_channels_reach_the_score(three_channels):

    c, _, results = three_channels
    data = batch(3)
    image = jnp.repeat((data["image"] - 0.5056) / 0.252, 3, axis=-1)
    passes = [
        reconstruct(
            mae_of(c, results[m]["params"]).predictions,
            image,
            case_keys(KEY, data["case"]),
            patch=(8, 8),
            ratio=0.75,
            masks=2,
        )
        for m in ("module_a", "module_b")
    ]
    out = score(c, results, data)
    np.testing.assert_allclose(
        out["maps"]["stage2"], np.abs(passes[0].mean - passes[1].mean).mean(-1), rtol=1e-3, atol=1e-5
    )
    grey = np.asarray(passes[0].mean).mean(-1, keepdims=True) * 0.252 + 0.5056
    np.testing.assert_allclose(out["reconstruction"], grey, rtol=1e-3, atol=1e-5)


def test_stage_1_classifies_the_mean_of_the_patch_tokens_without_the_class_token(three_channels):
    c, _, results = three_channels
    data = batch(3)
    mae = mae_of(c, results["pretrain"]["params"])
    image = jnp.repeat((data["image"] - 0.5056) / 0.252, 3, axis=-1)
    x = np.asarray(mae.encode(mae.embed(patchify(image, (8, 8)))))[:, 1:].mean(1)
    head, stats = results["proxy"]["params"], results["proxy"]["stats"]
    for i in (0, 1):  # fresh statistics: mean 0, variance 1
        layer, norm = head["layers"][i], head["norms"][i]
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = np.maximum(x / np.sqrt(1 + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    logits = x @ np.asarray(head["out"]["kernel"]) + np.asarray(head["out"]["bias"])
    log_odds = logits[:, 1] - logits[:, 0]
    assert stats and np.ptp(log_odds) > 0
    np.testing.assert_allclose(score(c, results, data)["scores"]["stage1"], log_odds, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.long_but_first
def test_an_adaptation_step_has_the_loss_of_its_masks_on_the_plain_image(masks):

    c = config(adapt__masks=masks, adapt__augment=False, adapt__batch=4)
    stages = {stage.name: stage for stage in load_system(c).stages}
    start = {"pretrain": {"params": first_state(stages["pretrain"], {}, 1).params, "stats": {}}}
    data = batch(4)
    loss_of = lambda stage: jax.jit(lambda s, d: stage.step(s, d, KEY, {}, steps=10)[1]["loss"])(
        stage.init(KEY, start, 4), data
    )
    image = np.asarray(data["image"])
    image = (image - image.mean((1, 2, 3), keepdims=True)) / image.std((1, 2, 3), keepdims=True)
    keys = jax.vmap(jax.random.split)(sample_keys(KEY, data["index"]))[:, 0]
    loss = masked_loss(
        mae_of(c, start["pretrain"]["params"]), jnp.asarray(image), keys, patch=(8, 8), ratio=0.75, masks=masks
    )
    assert float(loss_of(stages["module_a"])) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.long
def test_augmentation_mirrors_left_and_right_alone():
    """Crops of the whole image leave only the flip: an image that is its own mirror keeps its loss."""
    losses = {}
    for augment in (False, True):
        c = config(adapt__augment=augment, data__crop_scale=(1.0, 1.0), adapt__batch=4)
        stages = {stage.name: stage for stage in load_system(c).stages}
        start = {"pretrain": {"params": first_state(stages["pretrain"], {}, 1).params, "stats": {}}}
        state, step = stages["module_a"].init(KEY, start, 4), jax.jit(partial(stages["module_a"].step, steps=10))
        for name, fold in (("own mirror", lambda x: x + x[:, :, ::-1]), ("any", lambda x: x)):
            data = batch(4)
            data["image"] = fold(data["image"]) / 2
            losses[name, augment] = float(step(state, data, KEY, start)[1]["loss"])
    assert losses["own mirror", True] == pytest.approx(losses["own mirror", False], rel=1e-5)
    assert losses["any", True] != pytest.approx(losses["any", False], rel=1e-4)
