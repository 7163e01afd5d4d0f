"""AMAE: the paper's protocol, the controls and the options, each against its definition."""

import csv
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from drawn import drawn, first_state
from ml_collections import ConfigDict
from PIL import Image
from sklearn.linear_model import Ridge
from test_anatpaste import chest

from benchmarks import accuracy
from configs import amae as recipes
from jmae import baselines, checkpoint, recipe, train
from jmae.anomalies import anatpaste
from jmae.data import phantoms
from jmae.data.cases import load_rows
from jmae.data.prepare import prepare
from jmae.errors import InputError, exit_code
from jmae.masking import case_keys
from jmae.nn.mae import MAE
from jmae.reconstruct import reconstruct
from jmae.system import load_system, network, splits_read
from jmae.systems import amae

KEY = jax.random.key(0)


def config(preset: str = "smoke", **changes) -> ConfigDict:
    c = recipes.get_config(preset)
    if preset == "smoke":
        c.data.size, c.model.patch, c.evaluation.masks_of = (32, 32), (8, 8), "case"
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return c


def stages_of(c: ConfigDict) -> dict:
    return {stage.name: stage for stage in load_system(c).stages}


ROWS = [row for row in phantoms.rows("chest") if row.split in ("train", "unlabeled")]
TRAIN, UNLABELLED = ([i for i, row in enumerate(ROWS) if row.split == split] for split in ("train", "unlabeled"))
HIDDEN = phantoms.unlabeled_labels("chest")


# --- the paper's protocol ---------------------------------------------------------------------------------------------


def with_hidden(small_set: Path, folder: Path) -> str:
    """A file of hidden labels of the small set's 16 unlabelled images, half of them abnormal."""
    (folder / "hidden.csv").write_text("id,label\n" + "".join(f"unlabeled-x-{i},{i % 2}\n" for i in range(16)))
    return str(folder / "hidden.csv")


@pytest.mark.long
def test_the_paper_preset_has_the_papers_unlabelled_set_and_four_seeds(small_set, tmp_path):
    c = config("paper")
    assert (c.data.anomaly_ratio, c.data.unlabeled_size, c.replicates) == (0.6, 4000, 4)
    c.data.manifest, c.data.unlabeled_labels = str(small_set), with_hidden(small_set, tmp_path)
    with pytest.raises(
        InputError, match=r"anomaly ratio 0\.6 of 4000 needs 2400 abnormal unlabelled images, there are 8"
    ):
        load_rows(c, str)
    c.data.unlabeled_size = 10
    of_split = [int(row.id.rsplit("-", 1)[1]) for row in load_rows(c, str) if row.split == "unlabeled"]
    assert sorted(of_split) == sorted([1, 3, 5, 7, 9, 11, 0, 2, 4, 6])  # the first six odd, the first four even
    assert not [note for note in load_system(c).notes if "ratio" in note]


def test_without_hidden_labels_the_ratio_is_said_to_be_unknown_and_all_images_are_used(small_set, tmp_path):
    c = config("paper", data__manifest=str(small_set))
    assert sum(row.split == "unlabeled" for row in load_rows(c, str)) == 16
    (note,) = [note for note in load_system(c).notes if "ratio" in note]
    assert "the anomaly ratio of the unlabelled images is unknown" in note and "60% of 4000" in note
    c.variant = "stage1"  # it needs no unlabelled image
    assert not [note for note in load_system(c).notes if "ratio" in note]


def test_a_home_made_stage_0_is_known_through_the_runs_that_pass_it_on(tmp_path):
    file = tmp_path / "vit-s.pth"
    file.write_bytes(b"")
    for name, weights in (("own", ""), ("second", str(tmp_path / "own")), ("published", str(file))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(recipe.to_json(config(model__weights=weights)))
    says = lambda weights: amae.HOME_MADE in load_system(config(model__weights=str(weights))).notes
    assert says("") and says(tmp_path / "own") and says(tmp_path / "second")
    assert not says(file) and not says(tmp_path / "published")


def test_a_home_made_stage_0_stands_in_the_log_the_figures_the_report_and_the_card(
    finished, small_set, tools, tmp_path, monkeypatch, capfd
):
    assert json.loads((finished / "evaluation" / "metrics.json").read_text())["notes"] == [amae.HOME_MADE]
    for file in ("evaluation/report.html", "MODEL_CARD.md"):
        assert "Stage 0 learns from this run" in (finished / file).read_text()
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: None)
    assert exit_code(train.main, tools.arguments(small_set, tmp_path / "run")) == 0
    assert capfd.readouterr().err.count(f"warning: {amae.HOME_MADE}\n") == 1


# --- scores -----------------------------------------------------------------------------------------------------------


def mae_of(c: ConfigDict, params) -> MAE:
    sizes = {k: c.model[k] for k in ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")}
    make = lambda rngs: MAE(size=(32, 32), patch=(8, 8), channels=c.model.channels, **sizes, rngs=rngs)
    return network(make)[1](params)


@pytest.mark.long
def test_stage2_nearer_is_the_part_of_eq_4_where_module_b_is_nearer_the_image():
    c = config(variant="no_pseudo", evaluation__masks=2, evaluation__discrepancy="nearer")
    system = load_system(c)
    assert system.primary == "stage2_nearer" and not system.averaged
    params = lambda seed: drawn(lambda: stages_of(c)["pretrain"].init(KEY, {}, 1).params, seed)
    names = ("pretrain", "module_a", "module_b")
    results = {name: {"params": params(seed), "stats": {}} for seed, name in enumerate(names)}
    rng = np.random.default_rng(0)
    raw = rng.uniform(size=(3, 32, 32, 1)).astype(np.float32)
    batch = {"image": jnp.asarray(raw), "case": jnp.asarray(rng.integers(0, 2**32, (3, 2)), jnp.uint32)}
    image = (raw - raw.mean((1, 2, 3), keepdims=True)) / raw.std((1, 2, 3), keepdims=True)
    one = partial(reconstruct, patch=(8, 8), ratio=0.75, masks=2)
    keys = case_keys(KEY, batch["case"])
    mean = lambda name: np.asarray(one(mae_of(c, results[name]["params"]).predictions, image, keys).mean)
    a, b = mean("module_a"), mean("module_b")
    score = jax.jit(lambda r: system.score(r, batch, KEY))
    out, swapped = score(results), score({**results, "module_a": results["module_b"], "module_b": results["module_a"]})
    expected = np.where(np.abs(b - image) < np.abs(a - image), np.abs(a - b), 0).mean(-1)
    np.testing.assert_allclose(out["maps"]["stage2_nearer"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(out["scores"]["stage2_nearer"], expected.mean((1, 2)), rtol=1e-4)
    both = out["maps"]["stage2_nearer"] + swapped["maps"]["stage2_nearer"]  # the two parts are the whole
    np.testing.assert_allclose(both, out["maps"]["stage2"], rtol=1e-3, atol=1e-5)


# --- variants and pseudo-labels ---------------------------------------------------------------------------------------


def test_the_one_class_variant_reads_normals_alone_in_every_stage():
    system = load_system(config(variant="one_class"))
    assert splits_read(system) == ("train",) and system.primary == "one_class"
    assert [stage.rows(ROWS, {}).tolist() for stage in system.stages] == [TRAIN, TRAIN]


def test_perfect_labels_divide_the_unlabelled_images_by_their_hidden_labels_and_the_report_says_so(tmp_path):
    stages = stages_of(config(variant="b_perfect"))
    abnormal = [i for i in UNLABELLED if HIDDEN[ROWS[i].id]]
    normal = [i for i in UNLABELLED if not HIDDEN[ROWS[i].id]]
    assert set(stages) == {"pretrain", "module_a", "module_b"}
    assert stages["module_a"].rows(ROWS, {}).tolist() == TRAIN + normal
    assert stages["module_b"].rows(ROWS, {}).tolist() == abnormal
    assert any("a control, no method" in note for note in load_system(config(variant="b_perfect")).notes)
    (tmp_path / "few.csv").write_text(f"id,label\n{ROWS[UNLABELLED[0]].id},1\n")
    few = config(variant="b_perfect", data__manifest="m.csv", data__unlabeled_labels=str(tmp_path / "few.csv"))
    with pytest.raises(InputError, match=f"{ROWS[UNLABELLED[1]].id} has no hidden label"):
        stages_of(few)["module_b"].rows(ROWS, {})


def test_b_on_normals_has_amaes_module_a():
    margin = np.random.default_rng(0).normal(size=len(UNLABELLED))
    results = {"labels": {"params": {}, "stats": {"margin": margin}}}
    own, whole = stages_of(config(variant="b_normals")), stages_of(config())
    assert own["module_b"].rows(ROWS, results).tolist() == TRAIN and own["module_b"].splits == ("train",)
    np.testing.assert_array_equal(own["module_a"].rows(ROWS, results), whole["module_a"].rows(ROWS, results))


@pytest.mark.parametrize("abnormal", [0.1, 0.5, 0.9])
def test_percentiles_over_all_images_at_50_are_two_disjoint_halves_whatever_the_ratio(abnormal):
    rng = np.random.default_rng(0)
    margin = np.where(np.arange(100) < 100 * abnormal, 1, -1) * rng.uniform(0.1, 5, 100)
    label, confident = amae.pseudo_labels(margin, 50, "all")
    assert confident.all() and label.sum() == 50
    assert margin[label == 1].min() > margin[label == 0].max()


# --- equal epochs -----------------------------------------------------------------------------------------------------


def test_modules_a_and_b_have_equal_epochs_where_the_recipe_says_so():
    c = config("small", adapt__equal="epochs")
    stages = stages_of(c)
    margin = np.random.default_rng(0).normal(1, 1, len(UNLABELLED))  # most are predicted abnormal
    results = {"labels": {"params": {}, "stats": {"margin": margin}}}
    rows = [len(stages[name].rows(ROWS, results)) for name in ("module_a", "module_b")]
    steps = [
        stages[name].steps(n) * stages[name].pace(ROWS, results)
        for n, name in zip(rows, ("module_a", "module_b"), strict=True)
    ]
    assert rows[0] != rows[1] and steps[0] / rows[0] == pytest.approx(steps[1] / rows[1])
    assert sum(steps) == pytest.approx(2 * c.adapt.steps)
    assert stages_of(config("small"))["module_b"].pace is None  # equal steps, as measured on the phantoms


def test_the_paper_preset_has_equal_epochs_by_its_epochs():
    stages = stages_of(config("paper"))
    assert stages["module_b"].pace is None
    assert stages["module_a"].steps(4640) / 4640 == stages["module_b"].steps(1200) / 1200 == 150 / 16


@pytest.mark.long
def test_a_run_takes_the_paced_number_of_steps(finished, small_set, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: None)
    arguments = tools.arguments(small_set, tmp_path / "run", "adapt.equal=epochs", f"model.weights={finished}")
    assert exit_code(train.main, arguments) == 0
    with open(tmp_path / "run" / "labels.csv", newline="") as file:
        modules = [line["module"] for line in csv.DictReader(file)]
    a, b = 16 + modules.count("A"), modules.count("B")
    last = [checkpoint.steps(tmp_path / "run" / "checkpoints" / f"module_{m}")[-1] for m in "ab"]
    assert last == [round(20 * a / (a + b)), round(20 * b / (a + b))] and last[0] > last[1]


# --- the proxy task ---------------------------------------------------------------------------------------------------


def test_small_lung_fields_are_lungs():
    """Fields below a tenth of the image, as of adults with large hearts or little air, show both lungs."""
    image, _ = chest(128)
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    lungs = np.any([((x - c) / 0.08) ** 2 + ((y - 0.5) / 0.13) ** 2 < 1 for c in (0.3, 0.7)], axis=0)
    image = np.where(((x - 0.5) / 0.46) ** 2 + ((y - 0.55) / 0.5) ** 2 < 1, 0.75, 0.1).astype(np.float32)
    image[lungs] = 0.3
    field = anatpaste.lung_field(image[..., None])
    assert 0.05 < lungs.mean() < 0.08
    assert not field.all() and field[lungs].mean() > 0.9


def test_a_whole_image_is_jittered_as_torchvision_does_it():
    image = jax.random.uniform(KEY, (9, 9, 1))
    out = np.asarray(anatpaste.jittered(image, jax.random.key(3), 0.1))
    u = 0.1 * (2 * np.asarray(jax.random.uniform(jax.random.key(3), (4,))) - 1)
    x = np.asarray(image)
    expected = np.clip((1 + u[0]) * ((1 + u[1]) * x - u[1] * x.mean()), 0, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(out - x).max() > 1e-3


@pytest.mark.parametrize("jitter", [0.1, 0.0])
@pytest.mark.long_but_first
def test_normal_and_pasted_images_are_jittered_alike(jitter, monkeypatch):
    c = config(variant="stage1", proxy__jitter_image=jitter)
    proxy, seen = stages_of(c)["proxy"], []
    monkeypatch.setattr(amae, "with_anomalies", lambda proxy, batch, keys: batch["image"])  # nothing is pasted

    def features(networks, params, image):
        seen.append(np.asarray(image))
        return jnp.zeros((len(image), c.model.width))

    monkeypatch.setattr(amae, "features", features)
    results = {"pretrain": {"params": {}, "stats": {}}}
    image = jax.random.uniform(KEY, (4, 32, 32, 1))
    batch = {"image": image, "index": jnp.arange(4), "lungs": jnp.ones((4, 32, 32), bool)}
    proxy.step(first_state(proxy, results, 4), batch, KEY, results, steps=10)
    normal, pasted = seen[0][::2], seen[0][1::2]
    np.testing.assert_array_equal(normal, pasted)
    assert (np.array_equal(normal, image)) == (jitter == 0)
    factors = [np.ptp(n) / np.ptp(i) for n, i in zip(normal, np.asarray(image), strict=True)]
    assert jitter == 0 or len(set(np.round(factors, 4))) == 4  # each image has its own


# --- the baseline that uses unlabelled images -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(20, 30), (400, 800)], ids=["fewer images than pixels", "more"])
def test_the_ridge_baseline_is_scikit_learns_ridge_of_normals_against_unlabelled(n, k):
    rng = np.random.default_rng(0)
    draw = lambda m: rng.uniform(size=(m, 64, 64, 1)).astype(np.float32)
    normals, unlabelled, test = draw(n), draw(k), draw(7)
    small = lambda images: images.reshape(-1, 32, 2, 32, 2).mean((2, 4)).reshape(len(images), -1).astype(np.float64)
    standard = lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    x = standard(small(np.concatenate([normals, unlabelled])))
    oracle = Ridge(alpha=1000).fit(x, np.repeat([-1, 1], [n, k]))
    expected = oracle.predict(standard(small(test)))
    np.testing.assert_allclose(baselines.ridge_scores(normals, unlabelled, test), expected, rtol=1e-4, atol=1e-6)


def test_the_ridge_baseline_stands_beside_amae_where_there_are_unlabelled_rows(finished):
    found = json.loads((finished / "evaluation" / "metrics.json").read_text())
    assert found["baselines"]["ridge, unlabelled"]["image"]["auroc"] is not None
    assert found["subsets"]["central 80%"]["baselines"]["ridge, unlabelled"]["image"]["auroc"] is not None
    c = recipes.get_config("smoke")
    images = type("Images", (), {"rows": [0] * 6, "size": (64, 64), "image": lambda self, i: noise(i)})()
    noise = lambda i: np.random.default_rng(int(i[0])).uniform(size=(len(i), *c.data.size, 1)).astype(np.float32)
    without = baselines.ImageBaselines(images, [1.0], pixels=False)
    without.add(type("Case", (), {"array": noise(np.array([9]))[0]})(), {})
    assert "ridge, unlabelled" not in without.scores(1.0)


# --- the curated NIH lists --------------------------------------------------------------------------------------------


def nih(root: Path, lists: dict[str, list[str]]) -> Path:
    """A folder of lists, and of one image for each name in them."""
    for title, names in lists.items():
        (root / "lists").mkdir(parents=True, exist_ok=True)
        (root / "lists" / f"{title}_curated_list.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            (root / "images_001" / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(root / "images_001" / "images" / name)
    return root


def test_the_curated_nih_lists_become_one_manifest_of_both_sexes(tmp_path):
    lists = {
        "norm_MaleAdultPA_train": ["00000001_000.png", "00000001_001.png"],
        "norm_FemaleAdultPA_train": ["00000002_000.png"],
        "norm_FemaleAdultPA_test": ["00000003_000.png"],
        "anomaly_MaleAdultPA_test": ["00000004_010.png"],
    }
    said, _ = prepare("nih", nih(tmp_path / "nih", lists), tmp_path / "out")
    with open(tmp_path / "out" / "manifest.csv", newline="") as file:
        rows = [(r["id"], r["patient"], r["split"], r["label"], r["sex"]) for r in csv.DictReader(file)]
    assert sorted(rows) == [
        ("00000001_000", "00000001", "train", "0", "M"),
        ("00000001_001", "00000001", "train", "0", "M"),
        ("00000002_000", "00000002", "train", "0", "F"),
        ("00000003_000", "00000003", "test", "0", "F"),
        ("00000004_010", "00000004", "test", "1", "M"),
    ]
    assert "caution: not the paper's numbers" in said and "3 of train 0 (the paper: 3614)" in said


def test_wrong_nih_lists_are_refused(tmp_path):
    with pytest.raises(InputError, match="copy NSA's or the official lists there"):
        prepare("nih", nih(tmp_path / "none", {"other": ["a.png"]}), tmp_path / "out")
    both = {"norm_MaleAdultPA_train": ["00000001_000.png"], "norm_MaleAdultPA_test": ["00000001_001.png"]}
    with pytest.raises(InputError, match="00000001"):  # a patient in two splits
        prepare("nih", nih(tmp_path / "both", both), tmp_path / "out", leaks="refuse")
    root = nih(tmp_path / "abnormal", {"anomaly_MaleAdultPA_train": ["00000001_000.png"]})
    with pytest.raises(InputError, match="lists abnormal images to train on"):
        prepare("nih", root, tmp_path / "out")
    (root / "images_001" / "images" / "00000001_000.png").unlink()
    with pytest.raises(InputError, match=r"00000001_000\.png: not found"):
        prepare("nih", root, tmp_path / "out")


# --- the benchmark's table --------------------------------------------------------------------------------------------


def test_the_benchmarks_table_has_means_deviations_and_welchs_test_over_seeds():
    image = lambda auroc: {"auroc": auroc, "auroc_ci": [auroc - 0.1, auroc + 0.1], "ap": auroc / 2}
    result = lambda auroc: {
        "primary": "stage2",
        "scores": {"stage2": image(auroc), "none": None},
        "baselines": {"5-NN": image(0.5)},
        "subsets": {},
    }
    ours, other = (0.80, 0.82, 0.84, 0.86), (0.70, 0.74, 0.75, 0.77)
    table = accuracy.rows_of({"stage2": [*map(result, ours)], "b_normals": [*map(result, other)]})
    spread = lambda values: f"± {1.96 * np.std(values, ddof=1):.3f}"
    # Welch: t = difference / sqrt(s1^2/n + s2^2/n), Satterthwaite's degrees of freedom.
    variances = np.var(ours, ddof=1) / 4, np.var(other, ddof=1) / 4
    t = (np.mean(ours) - np.mean(other)) / np.sqrt(sum(variances))
    p = 2 * scipy.stats.t.sf(t, sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 3))
    assert table == [
        ["stage2", "whole", "stage2 *", 4, pytest.approx(0.83), spread(ours), pytest.approx(0.415), ""],
        ["stage2", "whole", "5-NN", 4, 0.5, "± 0.000", 0.25, ""],
        [
            "b_normals",
            "whole",
            "stage2 *",
            4,
            pytest.approx(0.74),
            spread(other),
            pytest.approx(0.37),
            pytest.approx(p),
        ],
    ]


def test_every_ratio_of_the_sweep_has_as_many_unlabelled_images():
    settings = accuracy.ratios(HIDDEN)
    assert len(settings) == 2 * 6 and {s["data.unlabeled_size"] for s in settings.values()} == {103}
    for changes in settings.values():
        changes = {name.replace(".", "__"): value for name, value in changes.items()}
        rows = load_rows(config(data__phantom="chest", **changes), str)
        labels = [HIDDEN[row.id] for row in rows if row.split == "unlabeled"]
        assert len(labels) == 103 and sum(labels) == int(round(103 * changes["data__anomaly_ratio"], 9))
