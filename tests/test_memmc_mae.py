"""MemMC-MAE against its specification: what is trained on, what is scored, the command; tiny networks."""

import csv
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from patients import write_patients

from configs import memmc_mae as recipe
from jmae import train
from jmae.data.files import read_image
from jmae.errors import InputError, exit_code
from jmae.masking import case_keys, fold_in, hidden, random_mask, sample_keys, take
from jmae.nn.memory import MultiLevelMAE
from jmae.optim import decayed
from jmae.patches import patchify, unpatchify
from jmae.recipe import override
from jmae.scoring import ms_ssim, ms_ssim_map
from jmae.system import load_system, masked_autoencoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
TINY = """
data.phantom= data.size=24,16 model.patch=8,4 model.width=24 model.heads=2 model.depth=2 model.memory=3
model.decoder_width=16 model.decoder_heads=2 model.decoder_depth=1 model.long_skips=false
train.batch=4 train.steps=6 checkpoint_every=4 log_every=3
evaluation.masks=3 evaluation.batch=4 evaluation.window=3,3 evaluation.scales=0.5,0.5
""".split()
VOLUMES = """
model.depth=1 evaluation.scales=1.0
data.size=8,8,4 model.patch=4,4,2 evaluation.stride=4,4,2 evaluation.batch=8 evaluation.window=3,3,3
data.normal_crops_only=false evaluation.pool=2,2,1
""".split()
IMAGENET = ["data.normalise=fixed", "data.channels=1", "model.channels=3"]


def config(*changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    if IMAGENET[0] in changes:
        c.data.mean, c.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    override(c, {f"config.{k}": v for k, _, v in (change.partition("=") for change in [*TINY, *changes])})
    return c


def arguments(manifest: Path, workdir: Path, *changes: str, preset: str = "smoke") -> list[str]:
    own = [f"--config.{change}" for change in [*TINY, f"data.manifest={manifest}", *changes]]
    return [f"--config=configs/memmc_mae.py:{preset}", f"--workdir={workdir}", *own]


def batch(n: int = 4, size: tuple[int, ...] = (24, 16), channels: int = 1, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.uniform(size=(n, *size, channels)), jnp.float32),
        "index": jnp.arange(n),
        "case": jnp.asarray(rng.integers(0, 2**32, (n, 2)), jnp.uint32),
    }


def started(c):
    system = load_system(c)
    return system, system.stages[0], jax.jit(lambda key: system.stages[0].init(key, {}, 8))(KEY)


def scorer(c, **settings):
    system = load_system(c)
    score = jax.jit(lambda results, some: system.score(results, some, KEY, **settings))
    return lambda state, some: score({"train": {"params": state.params, "stats": {}}}, some)


def scored(c, state, some, **settings):
    return scorer(c, **settings)(state, some)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_paper_preset_is_the_papers():
    c = recipe.get_config("paper")
    model, train, evaluation = c.model, c.train, c.evaluation
    assert (c.data.size, c.data.crop_scale, c.data.flips, model.patch) == ((224, 224), (0.2, 1.0), (), (16, 16))
    assert (model.width, model.depth, model.heads, model.memory) == (768, 12, 12, 40)
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads, model.gate) == (512, 8, 16, "channel")
    assert model.mc_decoder and model.mc_norm and model.long_skips
    assert (train.epochs, train.batch, train.lr, train.warmup * 2000) == (2000, 256, 1.5e-3, 5)
    assert (train.mask_ratio, train.betas, train.decay, train.clip) == (0.75, (0.9, 0.95), 0.05, 0)
    assert (evaluation.masks, evaluation.mask_ratio, evaluation.window, evaluation.sigma) == (10, 0.75, (11, 11), 1.5)
    assert evaluation.scales == (0.0448, 0.2856, 0.3001, 0.2363, 0.1333) and evaluation.paste


@pytest.mark.parametrize(
    "change, said",
    [
        ("evaluation.score=psnr", "evaluation.score is 'psnr': one of ms_ssim, ms_ssim_patches, mse, ms_ssim_product"),
        ("model.memory=-1", "model.memory and train.clip are 0 or more"),
        ("evaluation.masks=0", "evaluation.masks 1 or more"),
        ("evaluation.l1_weight=1.5", "evaluation.l1_weight is 1.5: from 0"),
        ("data.channels=3", "model.channels is 1, data.channels 3"),
        ("data.normalise=fixed", "data.mean and data.std: one value"),
        ("evaluation.scales=", "evaluation.scales are weights above 0"),
        ("evaluation.sigma=0", "evaluation.sigma is above 0"),
        ("evaluation.iou=120", "evaluation.iou is 120"),
        ("data.flips=2", "data.flips .2.*: axes, 0 to 1"),
        ("data.normalise=crop", "data.normalise is 'crop'"),
        ("data.normal_crops_only=true", "trains on whole images"),
        ("evaluation.window=11,11", "lower evaluation.window to"),
        ("model.gate=row", "model.gate is 'row'"),
        ("evaluation.mask_ratio=1.0", "mask ratio 1.0 leaves 0 of 12"),
        ("model.patch=7,4", "not divisible by patch"),
        ("data.size=24,16,8", "take the preset small3d"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        load_system(config(change))


def test_the_flags_of_the_ablation_change_the_network():
    tree = lambda *changes: jax.eval_shape(lambda: load_system(config(*changes)).stages[0].init(KEY, {}, 8)).params
    whole, plain = tree(), tree("model.memory=0", "model.mc_decoder=false")
    assert whole["encoder"]["stack"]["memory_k"].shape == (2, 3, 24)
    assert "memory_k" not in plain["encoder"]["stack"] and "gates" not in plain["decoder"]["stack"]
    assert whole["decoder"]["stack"]["gates"]["kernel"].shape == (1, 2, 32, 16)
    assert tree("model.gate=token")["decoder"]["stack"]["gates"]["kernel"].shape == (1, 2, 32, 1)
    assert "memory_k" not in whole["decoder"]["stack"]["attend"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_hidden_patches_its_gradient_is_clipped_and_it_falls():
    c = config("data.crop_scale=", "train.lr=0.003", "train.warmup=0.0", "train.clip=0.001")
    _, stage, state = started(c)
    _, mae_of = masked_autoencoder(c, 1, partial(MultiLevelMAE), memory=3)
    some = batch()
    image = some["image"]
    image = (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)
    keys = jax.vmap(jax.random.split)(sample_keys(KEY, some["index"]))[:, 0]
    step = jax.jit(partial(stage.step, steps=50))
    new, metrics = step(state, some, KEY)

    @jax.jit
    def by_hand(params):
        keep, restore = random_mask(fold_in(keys, 0), 12, 3)
        patches = patchify(image, (8, 4))
        error = jnp.mean((mae_of(params)(patches, keep, restore) - patches) ** 2, -1)
        return jnp.sum(error * (restore >= 3)) / (4 * 9)

    np.testing.assert_allclose(metrics["loss"], by_hand(state.params), rtol=1e-5)
    moments = [np.linalg.norm(np.ravel(leaf)) for leaf in jax.tree.leaves(optax.tree.get(new.opt, "mu"))]
    assert np.linalg.norm(moments) == pytest.approx(0.1 * 0.001, rel=1e-3)  # 1 - beta_1 of the clipped norm
    for _ in range(30):
        new, last = step(new, some, KEY)
    assert last["loss"] < 0.9 * metrics["loss"]


def test_decay_is_of_memory_but_not_of_biases():
    params = jax.eval_shape(lambda: load_system(config()).stages[0].init(KEY, {}, 8)).params
    of = decayed(params)
    assert of["encoder"]["stack"]["memory_k"] and of["encoder"]["stack"]["memory_v"]
    assert of["decoder"]["stack"]["gates"] == {"kernel": True, "bias": False}


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalise, paste", [(["data.normalise=image"], True), (IMAGENET, False)], ids=["image, pasted", "ImageNet, raw"]
)
def test_the_maps_are_the_mean_over_masks_of_the_dissimilarity(normalise, paste):
    c = config(*normalise, f"evaluation.paste={paste}")
    _, _, state = started(c)
    some, channels = batch(), c.model.channels
    out = scored(c, state, some)
    _, mae_of = masked_autoencoder(c, channels, partial(MultiLevelMAE), memory=3)
    image = np.asarray(some["image"])
    if channels == 3:
        mean, std = np.array(c.data.mean), np.array(c.data.std)
        span = np.full(4, 2.1179 + 2.6400)
    else:
        mean, std = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
        span = 1 / std.ravel()
    image = jnp.asarray((image - mean) / std, jnp.float32)
    patches, keys = patchify(image, (8, 4)), case_keys(KEY, some["case"])
    expected, products, errors = [], [], []

    @jax.jit
    def one(params, j):
        mae = mae_of(params)
        keep, restore = random_mask(fold_in(keys, j), 12, 3)
        prediction = mae.decode(mae.encode(take(mae.embed(patches), keep)), restore)
        prediction = jnp.where(hidden(restore, 3)[..., None], prediction, patches) if paste else prediction
        y = unpatchify(prediction, (24, 16), (8, 4))
        own = dict(window=3, sigma=1.5, weights=(0.5, 0.5))
        maps = [ms_ssim_map(image[i, None], y[i, None], data_range=span[i], **own)[0] for i in range(4)]
        product = [ms_ssim(image[i, None], y[i, None], data_range=span[i], **own)[0] for i in range(4)]
        return jnp.stack(maps), 1 - jnp.stack(product), jnp.mean((y - image) ** 2, -1)

    for j in range(3):
        for into, value in zip((expected, products, errors), one(state.params, j), strict=True):
            into.append(value)
    d = np.mean(expected, 0)
    near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    near(out["maps"]["ms_ssim"], d)
    near(out["scores"]["ms_ssim"], d.mean((1, 2)))
    near(out["maps"]["mse"], np.mean(errors, 0))
    near(out["scores"]["ms_ssim_product"], np.mean(products, 0))
    cells = d.reshape(4, 3, 8, 4, 4).mean((2, 4))
    patches = np.asarray(out["maps"]["ms_ssim_patches"])
    near(patches[:, 0, 0], cells[:, 0, 0])  # a corner lies beyond the cells' centres
    near(patches[:, -1, -1], cells[:, -1, -1])
    near(patches[:, 0, 2:4].mean(1), (cells[:, 0, 0] * 3 + cells[:, 0, 1]) / 4)  # 1/8 and 3/8 of the way to the next
    assert out["reconstruction"].shape == (4, 24, 16, 1)


def test_chunks_of_masks_and_the_batch_do_not_change_a_case():
    c = config()
    _, _, state = started(c)
    whole = scored(c, state, batch())
    for other in (scored(c, state, batch(), chunk=2), scored(c, state, jax.tree.map(lambda x: x[1:3], batch()))):
        rows = slice(1, 3) if len(other["scores"]["mse"]) == 2 else slice(None)
        for kind in ("maps", "scores"):
            for name, values in other[kind].items():
                np.testing.assert_allclose(values, whole[kind][name][rows], rtol=2e-4, atol=1e-5)


def test_a_pasted_square_raises_the_score_where_it_lies():
    """The network fills in the mean value, whatever it sees."""
    c = config("data.normalise=fixed", "data.mean=0.5", "data.std=0.25")
    _, _, state = started(c)
    predict = jax.tree.map(jnp.zeros_like, state.params["predict"])
    state = state._replace(params=state.params | {"predict": predict})
    flat = batch() | {"image": jnp.full((4, 24, 16, 1), 0.5)}
    run = scorer(c)
    normal = run(state, flat)
    assert all(np.abs(value).max() < 1e-6 for value in normal["scores"].values())
    out = run(state, flat | {"image": flat["image"].at[:, 8:16, 4:12].set(1.0)})
    for name in out["scores"]:
        assert (out["scores"][name] > normal["scores"][name]).all(), name
    for name in ("mse", "ms_ssim"):
        rise = np.asarray(out["maps"][name] - normal["maps"][name]).mean(0)
        assert rise[8:16, 4:12].mean() > 1.5 * rise.mean(), name


def test_a_share_of_the_absolute_error_goes_into_the_map():
    c = config("data.normalise=fixed", "data.mean=0.5", "data.std=0.25")
    _, _, state = started(c)
    share = lambda w: np.asarray(
        scored(
            config("data.normalise=fixed", "data.mean=0.5", "data.std=0.25", f"evaluation.l1_weight={w}"),
            state,
            batch(),
        )["maps"]["ms_ssim"]
    )
    none, some, all_ = share(0.0), share(0.15), share(1.0)
    np.testing.assert_allclose(some, 0.85 * none + 0.15 * all_, rtol=1e-4, atol=1e-5)
    error = np.asarray(scored(c, state, batch())["maps"]["mse"])
    assert (all_ * 4 <= np.sqrt(error) + 1e-5).all() and (all_ >= 0).all()  # mean |d| / 4 is below the root of mean d^2


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_run_writes_maps_and_figures(small_set, tmp_path):
    assert exit_code(train.main, arguments(small_set, tmp_path, "replicates=2")) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "ms_ssim" and "ms_ssim_product" in metrics["scores"]
    assert len(metrics["scores"]["ms_ssim"]["replicates"]["auroc"]["values"]) == 2
    assert metrics["pixel"]["auroc"] and metrics["scores"]["ms_ssim_product"]["pixel"] is None
    lines = list(csv.DictReader((tmp_path / "evaluation" / "scores.csv").read_text().splitlines()))
    assert all(0 <= float(line["score"]) <= 2 for line in lines)
    maps = tmp_path / "evaluation" / "maps"
    assert all(len(list(maps.glob(f"{line['id']}_anomaly.*"))) == 1 for line in lines)


def test_volumes_go_through_the_same_code(tmp_path):
    manifest = write_patients(tmp_path)
    given = arguments(manifest, tmp_path / "run", *VOLUMES, "evaluation.score=mse", preset="small3d")
    assert exit_code(train.main, given) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "mse" and set(metrics["scores"]) == {"ms_ssim", "ms_ssim_patches", "mse"}
    assert all(score["pixel"]["auroc"] > 0 for score in metrics["scores"].values())
    names = sorted(path.name for path in (tmp_path / "run" / "evaluation" / "maps").iterdir())
    volume = read_image(str(tmp_path / "run" / "evaluation" / "maps" / names[0]))
    assert volume.array.ndim == 4 and np.isfinite(volume.array).all() and volume.array.max() > 0
