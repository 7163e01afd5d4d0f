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
from patients import voxel_auroc, write_patients

from configs import memmc_mae as recipe
from jmae import train
from jmae.data.augment import random_flip, random_resized_crop
from jmae.data.files import read_image
from jmae.errors import InputError, exit_code
from jmae.masking import case_keys, fold_in, hidden, random_mask, sample_keys
from jmae.nn.mae import MAE
from jmae.nn.memory import MultiLevelMAE
from jmae.optim import has_decay
from jmae.patches import patchify, unpatchify
from jmae.recipe import override
from jmae.ssim import ms_ssim, ms_ssim_map
from jmae.system import load_system, masked_autoencoder

KEY = jax.random.key(0)
TINY = """
data.phantom= data.size=24,16 model.patch=8,4 model.width=24 model.heads=2 model.depth=2 model.memory=3
model.decoder_width=16 model.decoder_heads=2 model.decoder_depth=1 model.long_skips=false
train.batch=4 train.steps=6 checkpoint_every=4 log_every=3
evaluation.masks=3 evaluation.batch=4 evaluation.window=3,3 evaluation.scales=0.5,0.5 evaluation.average=all
evaluation.masks_of=case
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
    """(system, its stage, a state before the first step with all weights random, biases too)."""
    system = load_system(c)
    stage, rng = system.stages[0], np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: stage.init(KEY, {}, 8))
    draw = lambda path, leaf: (path[-1].key == "scale") + 0.15 * rng.standard_normal(leaf.shape, np.float32)
    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return system, stage, zeros.replace(params=params)


def scorer(c, **settings):
    system = load_system(c)
    score = jax.jit(lambda results, some: system.score(results, some, KEY, **settings))
    return lambda state, some: score({"train": {"params": state.params, "stats": {}}}, some)


def scored(c, state, some, **settings):
    return scorer(c, **settings)(state, some)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_paper_sizes_and_steps():
    c = recipe.get_config("paper")
    assert c.model.gate == "token"
    c.model.gate = "channel"
    system = load_system(c)
    (stage,) = system.stages
    assert (stage.steps(13_794), stage.steps(1_600), stage.batch, system.masks) == (106_000, 12_000, 256, 10)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    whole = jax.eval_shape(lambda: stage.init(KEY, {}, 1)).params
    assert count(whole) == 173_296_384
    assert count({k: v for k, v in whole.items() if k.startswith(("decoder", "mask", "predict"))}) == 86_911_744
    c.model.update(dict(memory=0, mc_decoder=False, long_skips=False))
    plain, _ = masked_autoencoder(c, 3)
    assert count(jax.eval_shape(plain, KEY)[0]) == 111_655_680


@pytest.mark.parametrize(
    "change, said",
    [
        ("data.channels=3", "model.channels is 1, data.channels 3"),
        ("data.normalise=fixed", "data.mean and data.std: one value"),
        ("evaluation.scales=", "evaluation.scales is empty"),
        ("data.flips=2", "data.flips is .2.*one of 0, 1"),
        ("evaluation.window=11,11", "lower evaluation.window to"),
        ("model.patch=7,4", "not divisible by patch"),
        ("data.size=24,16,8", "take a preset whose data.size"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        load_system(config(change))


def test_the_flags_of_the_ablation_change_the_network():
    tree = lambda *changes: jax.eval_shape(lambda: load_system(config(*changes)).stages[0].init(KEY, {}, 8)).params
    whole, plain = tree(), tree("model.memory=0", "model.mc_decoder=false")
    assert whole["encoder"]["stack"]["memory_k"].shape == (2, 3, 24)
    mae, _ = masked_autoencoder(config(), 1)
    same = lambda a, b: (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), a) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), b)
    )
    assert same(plain, jax.eval_shape(mae, KEY)[0])
    assert whole["decoder"]["stack"]["gates"]["kernel"].shape == (1, 2, 32, 16)
    assert tree("model.gate=token")["decoder"]["stack"]["gates"]["kernel"].shape == (1, 2, 32, 1)
    assert "memory_k" not in whole["decoder"]["stack"]["attend"]


# --- training ---------------------------------------------------------------------------------------------------------


def standardised(image):
    return (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)


def loss_by_hand(mae, image, visible):
    """The mean squared error of the hidden ones of 12 patches, under the masks that a step with KEY draws."""
    keys = jax.vmap(jax.random.split)(sample_keys(KEY, jnp.arange(len(image))))[:, 0]
    keep, restore = random_mask(fold_in(keys, 0), 12, visible)
    patches = patchify(image, (8, 4))
    error = jnp.mean((mae(patches, keep, restore) - patches) ** 2, -1)
    return jnp.sum(error * (restore >= visible)) / (len(image) * (12 - visible))


def loss_of(c, image):
    """What a step of the system says, and its state; without the step's gradients."""
    _, stage, state = started(c)
    some = batch() | {"image": image}
    return jax.jit(lambda state: stage.step(state, some, KEY, {}, steps=10)[1]["loss"])(state), state


@pytest.mark.parametrize(
    "changes, make, options, visible",
    [
        (["model.gate=token", "model.mc_norm=false"], MultiLevelMAE, dict(memory=3, gate="token", normed=False), 3),
        (
            ["model.long_skips=true", "model.depth=3", "model.decoder_depth=3", "train.mask_ratio=0.5"],
            MultiLevelMAE,
            dict(memory=3, long_skips=True),
            6,
        ),
        (["model.mc_decoder=false", "evaluation.mask_ratio=0.5"], MAE, dict(memory=3), 3),
        (["model.mc_decoder=false", "model.memory=0"], MAE, {}, 3),
    ],
    ids=["token, no root", "long skips, half", "memory alone", "plain"],
)
@pytest.mark.long_but_first
def test_the_loss_is_that_of_the_hidden_patches_of_the_network_that_the_recipe_names(changes, make, options, visible):
    c = config(*changes)
    image = batch()["image"]
    found, state = loss_of(c, image)
    _, mae_of = masked_autoencoder(c, 1, make, **options)
    expected = jax.jit(lambda params: loss_by_hand(mae_of(params), standardised(image), visible))(state.params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.long
def test_images_are_cropped_and_mirrored_by_keys_of_their_own():
    fixed, image = ["data.normalise=fixed", "data.mean=0.5", "data.std=0.25"], batch()["image"]

    @jax.jit
    def by_hand():
        keys = jax.vmap(jax.random.split)(sample_keys(KEY, jnp.arange(4)))[:, 1]
        crop, flip = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        crops = jax.vmap(partial(random_resized_crop, scale=(0.2, 0.6)))(image, crop)
        return crops, jax.vmap(partial(random_flip, axes=(0, 1)))(crops, flip)

    crops, seen = jax.device_get(by_hand())
    assert np.abs(image - crops).max() > 0.1 and np.abs(crops - seen).max() > 0.1
    moved, _ = loss_of(config(*fixed, "data.crop_scale=0.2,0.6", "data.flips=0,1"), image)
    plain, _ = loss_of(config(*fixed, "data.crop_scale="), seen)
    np.testing.assert_allclose(moved, plain, rtol=1e-5)


@pytest.fixture(scope="module")
def stepping():
    """(recipe, state before the first step, compiled step of 50)."""
    c = config("train.lr=0.004", "train.warmup=0.2", "train.clip=0.1", "train.betas=0.9,0.95", "train.decay=0.5")
    _, stage, state = started(c)
    return c, state, jax.jit(partial(stage.step, steps=50))


@pytest.mark.long
def test_a_step_is_adamw_s_with_its_decay_clipping_and_schedule(stepping):
    """Adam's first step is the learning rate in the direction of each gradient's sign, whatever the gradient."""
    _, state, step = stepping
    some = batch()
    for at, lr in ((5, 0.004 * 5 / 10), (30, 0.004 * (1 + np.cos(np.pi * 20 / 40)) / 2)):
        new, metrics = jax.device_get(step(state.replace(step=np.int32(at)), some, KEY, {}))
        assert metrics["lr"] == pytest.approx(lr, rel=1e-5) and new.step == at + 1
        pairs = jax.tree.map(lambda a, b: (a, b), state.params, new.params)
        for path, (a, b) in jax.tree_util.tree_leaves_with_path(pairs, is_leaf=lambda x: isinstance(x, tuple)):
            move = (a - b) / lr - 0.5 * a * (path[-1].key not in ("bias", "scale"))
            # Not all: to the keys' biases the loss is blind, up to rounding.
            assert np.mean(np.abs(np.abs(move) - 1) < 0.02) > 0.4, path
    first, second = (optax.tree.get(new.opt, name) for name in ("mu", "nu"))
    norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(first)])
    assert metrics["grad_norm"] > 0.1 and norm == pytest.approx((1 - 0.9) * 0.1, rel=1e-4)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-12),
        second,
        jax.tree.map(lambda m: (1 - 0.95) * (m / (1 - 0.9)) ** 2, first),
    )


def test_the_loss_falls(stepping):
    _, state, step = stepping
    some, losses = batch(), []
    for _ in range(30):
        state, metrics = step(state, some, KEY, {})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_decay_is_of_memory_but_not_of_biases():
    params = jax.eval_shape(lambda: load_system(config()).stages[0].init(KEY, {}, 8)).params
    of = has_decay(params)
    assert of["encoder"]["stack"]["memory_k"] and of["encoder"]["stack"]["memory_v"]
    assert of["decoder"]["stack"]["gates"] == {"kernel": True, "bias": False}


# --- scores -----------------------------------------------------------------------------------------------------------


def maps_by_hand(c, mae, image, span, keys, numbers):
    """What masks `numbers` of images in the network's range show on average: dissimilarity, 1 - MS-SSIM, squared error
    and reconstruction, one mask and one image at a time."""
    size, patch, evaluation = c.data.size, c.model.patch, c.evaluation
    patches = patchify(image, patch)
    tokens = patches.shape[1]
    visible = tokens - int(tokens * evaluation.mask_ratio)
    own = dict(window=3, sigma=evaluation.sigma, weights=evaluation.scales, pool=evaluation.pool)

    def one(j):
        keep, restore = random_mask(fold_in(keys, j), tokens, visible)
        prediction = mae(patches, keep, restore)
        if evaluation.paste:
            prediction = jnp.where(hidden(restore, visible)[..., None], prediction, patches)
        y = unpatchify(prediction, size, patch)
        pairs = jax.lax.map(
            lambda pair: (
                ms_ssim_map(pair[0][None], pair[1][None], data_range=pair[2], **own)[0],
                1 - ms_ssim(pair[0][None], pair[1][None], data_range=pair[2], **own)[0],
            ),
            (image, y, span),
        )
        return *pairs, jnp.mean((y - image) ** 2, -1), y

    return jax.tree.map(lambda x: np.asarray(x.mean(0)), jax.jit(lambda: jax.lax.map(one, numbers))())


near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "changes, paste",
    [
        (["data.normalise=image"], True),
        ([*IMAGENET, "evaluation.pool=1,2", "evaluation.sigma=0.7", "evaluation.mask_ratio=0.5"], False),
    ],
    ids=["image, pasted", "ImageNet, raw"],
)
@pytest.mark.long_but_first
def test_the_maps_are_the_mean_over_masks_of_the_dissimilarity(changes, paste):
    c = config(*changes, f"evaluation.paste={paste}")
    _, _, state = started(c)
    some, channels = batch(), c.model.channels
    out = scored(c, state, some)
    _, mae_of = masked_autoencoder(c, channels, MultiLevelMAE, memory=3)
    image = np.asarray(some["image"])
    if channels == 3:
        mean, std = np.array(c.data.mean), np.array(c.data.std)
        span = np.full(4, 2.1179 + 2.6400)
    else:
        mean, std = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
        span = 1 / std.ravel()
    image = jnp.asarray((image - mean) / std, jnp.float32)
    keys = case_keys(KEY, some["case"])
    d, product, error, _ = maps_by_hand(c, mae_of(state.params), image, span, keys, jnp.arange(3))
    *_, picture = maps_by_hand(c, mae_of(state.params), image, span, keys, jnp.arange(1))
    near(out["maps"]["ms_ssim"], d)
    near(out["scores"]["ms_ssim"], d.mean((1, 2)))
    near(out["maps"]["mse"], error)
    near(out["scores"]["ms_ssim_product"], product)
    near(out["reconstruction"], (picture * std + mean).mean(-1, keepdims=True))
    cells = d.reshape(4, 3, 8, 4, 4).mean((2, 4))
    patches = np.asarray(out["maps"]["ms_ssim_patches"])
    near(patches[:, 0, 0], cells[:, 0, 0])  # a corner lies beyond the cells' centres
    near(patches[:, -1, -1], cells[:, -1, -1])
    near(patches[:, 0, 2:4].mean(1), (cells[:, 0, 0] * 3 + cells[:, 0, 1]) / 4)  # 1/8 and 3/8 of the way to the next


@pytest.mark.long
def test_windows_of_volumes_have_their_maps_by_name_in_the_span_of_the_clipping():
    c = config(*VOLUMES, "evaluation.scales=0.5,0.5", "data.clip=0.2,0.9", preset="small3d")
    system, _, state = started(c)
    image = jnp.asarray(batch(2, (8, 8, 4), 2)["image"])
    keys = jax.random.split(KEY, 2)
    score = jax.jit(lambda params: system.sweep.score({"train": {"params": params}}, image, keys, jnp.zeros(2, int)))
    values, weights = score(state.params)
    assert (weights == 1).all() and weights.shape == (2, 8, 8, 4, 1)
    inside = np.ones((8, 8, 4), bool)
    inside[6:] = False
    _, mae_of = masked_autoencoder(c, 2, MultiLevelMAE, memory=3)
    clipped, span = jnp.clip(image, 0.2, 0.9), jnp.full(2, 0.7)
    d, _, error, picture = maps_by_hand(c, mae_of(state.params), clipped, span, keys, jnp.arange(1))
    for i in range(2):
        out = system.sweep.fuse({}, values[i], inside)
        cells = np.kron(d[i].reshape(2, 4, 2, 4, 2, 2).mean((1, 3, 5)), np.ones((4, 4, 2)))
        maps = out["maps"]
        assert set(maps) == {"ms_ssim", "ms_ssim_patches", "mse"}
        assert all(not np.any(m[6:]) for m in maps.values())
        near(maps["ms_ssim"][:6], d[i, :6])
        near(maps["mse"][:6], error[i, :6])
        near(maps["ms_ssim_patches"][0, 0, 0], cells[0, 0, 0])
        near(maps["ms_ssim_patches"][0, -1, -1], cells[0, -1, -1])
        near(out["reconstruction"], picture[i])


@pytest.mark.long
def test_chunks_of_masks_and_the_batch_do_not_change_a_case():
    c = config()
    _, _, state = started(c)
    whole = scored(c, state, batch())
    for other in (scored(c, state, batch(), chunk=2), scored(c, state, jax.tree.map(lambda x: x[1:3], batch()))):
        rows = slice(1, 3) if len(other["scores"]["mse"]) == 2 else slice(None)
        for kind in ("maps", "scores"):
            for name, values in other[kind].items():
                np.testing.assert_allclose(values, whole[kind][name][rows], rtol=1e-5, atol=1e-5)


def test_a_pasted_square_raises_the_score_where_it_lies():
    """The network fills in the mean value, whatever it sees."""
    c = config("data.normalise=fixed", "data.mean=0.5", "data.std=0.25")
    _, _, state = started(c)
    predict = jax.tree.map(jnp.zeros_like, state.params["predict"])
    state = state.replace(params=state.params | {"predict": predict})
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


@pytest.mark.long
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
    plain = scored(c, state, batch())["maps"]
    none, some, all_ = plain["ms_ssim"], share(0.15), share(1.0)
    np.testing.assert_allclose(some, 0.85 * none + 0.15 * all_, rtol=1e-4, atol=1e-5)
    error = np.asarray(plain["mse"])
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


@pytest.mark.long
def test_volumes_go_through_the_same_code(tmp_path):
    manifest = write_patients(tmp_path)
    given = arguments(manifest, tmp_path / "run", *VOLUMES, "evaluation.score=mse", preset="small3d")
    assert exit_code(train.main, given) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["primary"] == "mse" and metrics["pixel"] == metrics["scores"]["mse"]["pixel"]
    assert set(metrics["scores"]) == {"ms_ssim", "ms_ssim_patches", "mse", "tokens"}
    assert metrics["pixel"]["auroc"] == pytest.approx(voxel_auroc(manifest, tmp_path / "run"))
    names = sorted(path.name for path in (tmp_path / "run" / "evaluation" / "maps").iterdir())
    volume = read_image(str(tmp_path / "run" / "evaluation" / "maps" / names[0]))
    assert volume.array.ndim == 4 and np.isfinite(volume.array).all() and volume.array.max() > 0
