"""P-PII against its specification: what is trained on, what is kept, what is scored."""

import csv
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import first_state
from patients import write_patients

from configs import ppii as recipe
from jmae import train
from jmae.data.files import read_image
from jmae.data.manifest import Row
from jmae.data.preparation import prepared_image
from jmae.errors import InputError, exit_code
from jmae.keys.ppii import BACKBONES
from jmae.recipe import override
from jmae.run_folder import read_history
from jmae.system import load_system
from jmae.systems import ppii
from jmae.systems.ppii import held_out

KEY = jax.random.key(0)
TINY = """
data.phantom= data.size=16,16 model.widths=3,4 model.base=3 model.latent_levels=2 train.batch=4 train.steps=6
train.validate_every=2 train.validation_samples=4 anomaly.patch=0.2,0.6 evaluation.samples=3 checkpoint_every=4
log_every=3 evaluation.masks_of=case
""".split()
VOLUMES = """
data.size=8,8,4 data.channels=2 data.normal_crops_only=false evaluation.stride=4,4,2 evaluation.batch=8
""".split()


def config(*changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    given = {f"config.{k}": v for k, _, v in (change.partition("=") for change in [*TINY, *changes])}
    override(c, given)
    return c


def arguments(manifest: Path, workdir: Path, *changes: str, preset: str = "smoke") -> list[str]:
    own = [f"--config.{change}" for change in [*TINY, f"data.manifest={manifest}", *changes]]
    return [f"--config=configs/ppii.py:{preset}", f"--workdir={workdir}", *own]


def batch(n: int = 4, size: tuple[int, ...] = (16, 16), channels: int = 1, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.uniform(size=(n, *size, channels)), jnp.float32),
        "index": jnp.arange(n),
        "case": jnp.asarray(rng.integers(0, 2**32, (n, 2)), jnp.uint32),
    }


def as_best(state, dice: float):
    """The state with its last weights also as those of the best Dice."""
    best = {"params": state.params, "stats": state.stats["network"], "dice": jnp.float32(dice)}
    return state.replace(stats=state.stats | {"best": best})


def jitted_step(stage):
    return jax.jit(lambda state, batch, key: stage.step(state, batch, key, {}, steps=10))


@cache
def started(*changes: str):
    """(system, stage, first state with drawn weights, compiled step), once for all tests."""
    system = load_system(config(*changes))
    stage = system.stages[0]
    return system, stage, as_best(first_state(stage, {}, 8), -1), jitted_step(stage)


def results_of(state) -> dict:
    return {"train": {"params": state.params, "stats": state.stats}}


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_paper_preset_is_the_papers():
    system = load_system(recipe.get_config("paper"))
    (stage,) = system.stages
    state = jax.eval_shape(lambda key: stage.init(key, {}, 1), KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 5_670_370
    assert stage.steps(1) == 100_000 and stage.batch == 16 and system.masks == 1


def test_phiseg_of_the_paper_preset_has_two_more_levels(monkeypatch):
    made = []
    monkeypatch.setattr(ppii, "PHiSeg", lambda **given: made.append(given))
    monkeypatch.setattr(ppii, "network", lambda make: (make(None), None))  # traced in test_phiseg.py
    c = recipe.get_config("paper")
    c.model.backbone = "phiseg"
    assert load_system(c).masks == 50
    assert made[0]["widths"] == (32, 64, 128, 192, 192, 192, 192) and made[0]["latent_levels"] == 5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("data.size=15,16", "15"),
        ("train.batch=1", "train.batch=1: anomaly.source=other takes another image"),
        ("data.window=100,-100", "data.window"),
        ("data.size=16,16,8", "data.size has 3 axes"),
        ("anomaly.jmae.gain=-1.0", "anomaly.jmae.gain"),
        ("anomaly.jmae.anomalies=3,2", "anomaly.jmae.anomalies"),
        ("anomaly.patch=0.5,0.2", "anomaly.patch"),
        ("train.flips=2", "train.flips"),
        ("select=best", "select"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(change, line):
    with pytest.raises(InputError, match=line.replace("(", r"\(")) as error:
        load_system(config(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["phantom3d", "small3d"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_presets_of_volumes_sweep(preset, backbone, monkeypatch):
    monkeypatch.setattr(ppii, "network", lambda make: (None, None))  # traced where it trains
    c = recipe.get_config(preset)
    c.model.backbone = backbone
    system = load_system(c)
    assert system.score is None and system.sweep.window == (32, 32, 8) and system.sweep.stride == (16, 16, 4)


# --- training ---------------------------------------------------------------------------------------------------------


NETWORKS = {b: (f"model.backbone={b}", "evaluation.samples=5") for b in BACKBONES}
NETWORKS["phiseg"] += ("model.widths=3",)  # and two more levels


@pytest.mark.parametrize(
    "backbone", ["unet", *(pytest.param(name, marks=pytest.mark.long) for name in ("mc_unet", "phiseg"))]
)
def test_every_backbone_trains_under_jit_without_compiling_again(backbone):
    _, _, state, step = started(*NETWORKS[backbone])
    before = state
    for k in range(3):
        state, metrics = step(state, batch(seed=k), jax.random.fold_in(KEY, k))
    assert step._cache_size() == 1
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((metrics, state.params, state.stats)))
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), state.params, before.params)
    assert all(jax.tree.leaves(moved))  # no weight without a gradient
    assert metrics["target"] > 0 and state.step == 3


TASKS = [("released", "other"), ("jmae", "other"), ("paper", "self")]
TASKS += [pytest.param(v, "other", marks=pytest.mark.long) for v in ("pii", "fpi", "cutpaste", "nsa")]
TASKS += [pytest.param("pii", "self", marks=pytest.mark.long)]


@pytest.mark.parametrize(("variant", "source"), TASKS)
@pytest.mark.long_but_first
def test_every_task_gives_targets_and_depends_on_the_key(variant, source):
    _, stage, state, _ = started(f"variant={variant}", f"anomaly.source={source}")
    # Of the program for the target alone, the network is no part.
    target = jax.jit(lambda state, batch, key: stage.step(state, batch, key, {}, steps=10)[1]["target"])
    targets = [float(target(state, batch(), jax.random.key(k))) for k in (0, 0, 1)]
    assert targets[0] == targets[1] != targets[2] and all(0 < t < 1 for t in targets)


@pytest.mark.long
def test_the_variance_of_the_raters_weighs_the_loss():
    losses = []
    for weight in (0.0, 1e4):
        _, stage, state, _ = started(f"train.variance_weight={weight}")
        loss = jax.jit(lambda state, batch, stage=stage: stage.step(state, batch, KEY, {}, steps=10)[1]["loss"])
        losses.append(float(loss(state, batch())))
    assert 0 < losses[1] < losses[0]


@pytest.mark.long
def test_training_learns_its_anomalies():
    _, _, state, step = started("train.lr=0.01", "model.widths=8,8", "train.batch=8")
    smooth = np.stack(
        [np.add.outer(np.linspace(0, a, 16), np.linspace(0, 1 - a, 16)) for a in np.linspace(0.1, 0.9, 8)]
    )
    images = {"image": jnp.asarray(smooth[..., None] * 0.8, jnp.float32), "index": jnp.arange(8)}
    losses = []
    for _ in range(60):
        state, metrics = step(state, images, jax.random.fold_in(KEY, state.step))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


# --- best Dice --------------------------------------------------------------------------------------------------------


def rows(n: int, patients: int) -> list[Row]:
    row = lambda i, split: Row(f"r{i}", f"p{i % patients}", split, 0, (f"{i}.png",))
    return [row(i, "train") for i in range(n)] + [row(n, "test")]


def test_patients_are_held_out_whole_and_are_not_trained_on():
    some = rows(40, 20)
    held = held_out(some, 0.2)
    names = {row.patient for row, h in zip(some, held, strict=True) if h}
    assert len(names) == 4 and held.sum() == 8 and not held[-1]
    stage = load_system(config("train.held_out=0.2")).stages[0]
    trained, checked = stage.rows(some, {}), stage.checks[0].rows(some)
    assert set(trained) | set(checked) == set(range(40)) and not set(trained) & set(checked)
    assert np.array_equal(held_out(some[::-1], 0.2)[::-1], held)  # whatever the order
    assert set(stage.checks[0].rows(rows(2, 2))) == {0, 1}  # too few to hold any out


@pytest.mark.long
def test_the_best_weights_are_kept_and_scored():
    system, stage, state, _ = started()
    look = jax.jit(lambda state, batch: stage.checks[0].look(state, batch, {}))
    some = batch()
    first, found = look(state, some)
    _, same = look(state, some)
    assert found["dice"] == same["dice"] == found["best_dice"]
    worse = first.replace(params=jax.tree.map(jnp.zeros_like, first.params))  # predicts one half everywhere
    best = first.replace(stats=first.stats | {"best": first.stats["best"] | {"dice": jnp.float32(2)}})
    after, said = look(best.replace(params=worse.params), some)
    assert said["best_dice"] == 2 and said["dice"] < 2
    jax.tree.map(np.testing.assert_array_equal, after.stats["best"]["params"], first.params)
    score = jax.jit(lambda results: system.score(results, some, KEY)["maps"]["ppii"])
    np.testing.assert_array_equal(score(results_of(after)), score(results_of(first)))
    last = load_system(config("select=last"))
    assert not last.stages[0].checks
    score = jax.jit(lambda results: last.score(results, some, KEY)["maps"]["ppii"])
    np.testing.assert_allclose(score(results_of(worse)), 0.5)


def test_dice_by_hand():
    prediction, target = jnp.array([0.5, 0.8, 0.0]), jnp.array([0.5, 0.4, 1.0])
    np.testing.assert_allclose(ppii.dice(prediction, target), 2 * (0.25 + 0.32) / (0.25 + 0.64 + 0.25 + 0.16 + 1))
    np.testing.assert_allclose(ppii.dice(prediction, target, 0.3), 2 * 2 / (2 + 3))
    assert ppii.dice(prediction, target, 0.9) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_no_map_of_one_value_has_a_higher_dice_than_the_constant(threshold):
    target = jnp.asarray(np.random.default_rng(0).random((4, 8, 8)) ** 4)
    tried = [float(ppii.dice(jnp.full_like(target, value), target, threshold)) for value in np.linspace(0.01, 1, 400)]
    assert float(ppii.dice_of_constant(target, threshold)) == pytest.approx(max(tried), rel=1e-4)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["mc_unet", "phiseg"])
def test_samples_do_not_depend_on_chunk_or_batch_and_spread(backbone):
    system, _, state, step = started(*NETWORKS[backbone])
    results, some = results_of(as_best(step(state, batch(), KEY)[0], 0)), batch(3, seed=1)
    score = jax.jit(system.score, static_argnames="chunk")
    whole = score(results, some, KEY, chunk=5)
    part = score(results, some, KEY, chunk=3)  # of four after the first: the last chunk is padded
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), part, whole)
    alone = score(results, {k: v[jnp.array([2, 2, 2])] for k, v in some.items()}, KEY, chunk=5)
    np.testing.assert_allclose(alone["maps"]["ppii"][0], whole["maps"]["ppii"][2], atol=1e-6)
    assert whole["confidence"].shape == (3, 16, 16) and (whole["confidence"] > 0).mean() > 0.5
    np.testing.assert_array_equal(score(results, some, KEY, chunk=5)["confidence"], whole["confidence"])


def test_the_scores_of_an_image():
    system, _, state, _ = started()
    out = jax.jit(lambda results: system.score(results, batch(), KEY))(results_of(state))
    flat = np.sort(np.asarray(out["maps"]["ppii"]).reshape(4, -1), 1)
    assert set(out) == {"maps", "scores"}  # one network without randomness has no confidence
    np.testing.assert_allclose(out["scores"]["ppii"], flat.mean(1), rtol=1e-5)
    np.testing.assert_allclose(out["scores"]["ppii_top_quarter"], flat[:, -64:].mean(1), rtol=1e-5)
    np.testing.assert_allclose(out["scores"]["ppii_highest"], flat[:, -1], rtol=1e-6)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppii") / "run"
    assert exit_code(train.main, arguments(small_set, folder, "model.backbone=mc_unet")) == 0
    return folder


def test_a_run_writes_maps_confidence_and_figures(run):
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "ppii" and set(metrics["scores"]) == {"ppii", "ppii_top_quarter", "ppii_highest"}
    froc = metrics["pixel"]["froc"]
    assert froc["at"] == 10 and 0 <= froc["sensitivity"] <= 1 and froc["lesions"] > 0
    maps = run / "evaluation" / "maps"
    names = [line["id"] for line in csv.DictReader((run / "evaluation" / "scores.csv").read_text().splitlines())]
    for name in names:
        spread = read_image(str(next(maps.glob(f"{name}_confidence.*")))).array
        assert spread.shape[:2] == read_image(str(next(maps.glob(f"{name}_anomaly.*")))).array.shape[:2]
        assert (spread >= 0).all()
    assert "Spread of the samples" in (run / "evaluation" / "report.html").read_text()
    history = read_history(run / "metrics.jsonl")
    assert [h["step"] for h in history if "dice" in h] == [2, 4, 6]


@pytest.mark.long
def test_an_interrupted_run_ends_equal(run, small_set, tools, tmp_path, monkeypatch):
    real, saved = train.checkpoint.save, []

    def save(*args, **kwargs):
        real(*args, **kwargs)
        saved.append(args[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(small_set, tmp_path / "run", "model.backbone=mc_unet"))
    assert saved == [4]
    monkeypatch.setattr(train.checkpoint, "save", real)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: None)
    assert exit_code(train.main, arguments(small_set, tmp_path / "run", "model.backbone=mc_unet")) == 0
    assert tools.last_states(tmp_path / "run") == tools.last_states(run)  # the best weights too
    dice = lambda folder: [(h["dice"], h["best_dice"]) for h in read_history(folder / "metrics.jsonl") if "dice" in h]
    assert dice(tmp_path / "run") == dice(run)


@pytest.mark.long
def test_replicates_are_one_program(small_set, tmp_path):
    assert exit_code(train.main, arguments(small_set, tmp_path, "replicates=2")) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert len(metrics["scores"]["ppii"]["replicates"]["auroc"]["values"]) == 2


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["unet", "phiseg"])
def test_volumes_go_through_the_same_code(tmp_path, backbone):
    manifest = write_patients(tmp_path)
    small = ("model.widths=3", "model.latent_levels=1", "select=last") if backbone == "phiseg" else ()
    given = arguments(manifest, tmp_path / "run", *VOLUMES, f"model.backbone={backbone}", *small, preset="small3d")
    assert exit_code(train.main, given) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["pixel"]["froc"]["lesions"] >= 3
    kinds = {path.name.rsplit("_", 1)[1] for path in (tmp_path / "run" / "evaluation" / "maps").iterdir()}
    assert kinds == {"anomaly.nii.gz"} | ({"confidence.nii.gz"} if backbone == "phiseg" else set())


# --- augmentation, windows, equalisation ------------------------------------------------------------------------------


@pytest.mark.long
def test_augmentations_change_the_images_and_keep_the_step_whole():
    every = ("train.scaling=0.2", "train.rotation=10.0", "train.elastic=0.02", "train.flips=0,1")
    losses = []
    for changes in ((), (*every, "anomaly.shape=elliptic"), (*every, "train.loss=mse")):
        _, _, state, step = started(*changes)
        state, metrics = step(state, batch(), KEY)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, state.params)))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_a_window_has_one_scale_for_all_images_and_refuses_what_it_leaves_constant(tmp_path):
    ramp = np.linspace(-1000, 1000, 256, dtype=np.float32).reshape(16, 16)
    spot = ramp.copy()
    spot[0, 0] = 3000
    for name, array in (("ramp", ramp), ("spot", spot)):
        np.save(tmp_path / f"{name}.npy", array)
    row = lambda name: Row(name, "", "train", 0, (str(tmp_path / f"{name}.npy"),))
    c = config("data.window=-1024,3071", "data.equalise=false")
    one, two = (prepared_image(row(name), c.data)[..., 0] for name in ("ramp", "spot"))
    np.testing.assert_allclose(one, (ramp + 1024) / 4095, atol=1e-6)
    np.testing.assert_array_equal(one.ravel()[1:], two.ravel()[1:])
    with pytest.raises(InputError, match=r"constant within data\.window 5000 to 6000"):
        prepared_image(row("ramp"), config("data.window=5000,6000").data)


def test_an_equalised_image_has_an_even_histogram_whatever_its_contrast(tmp_path):
    image = (np.random.default_rng(0).uniform(size=(32, 32)) * 90 + 20).astype(np.uint8)
    np.save(tmp_path / "image.npy", image)
    row = Row("image", "", "train", 0, (str(tmp_path / "image.npy"),))
    out = prepared_image(row, config("data.size=32,32", "data.equalise=true").data)
    assert out.min() == 0 and out.max() == 1 and abs(np.median(out) - 0.5) < 0.03
    np.testing.assert_allclose(np.round(out * 255), out * 255, atol=1e-4)
