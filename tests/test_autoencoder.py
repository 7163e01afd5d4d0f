"""The trained rivals: their networks against PyTorch, losses and maps against NumPy, noise, and two runs."""

import json
import re
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_set
from drawn import drawn
from flax import nnx
from scipy import ndimage

from jmae import evaluate, export, predict, recipe, train
from jmae.data.manifest import Row
from jmae.errors import InputError, exit_code
from jmae.nn.autoencoder import Autoencoder, Block, Denoiser, expanded, groups_of, shrunk
from jmae.system import load_system
from jmae.systems import autoencoder

near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
TINY = ["data.size=16,16", "model.width=2", "model.hidden=6", "model.latent=3", "dae.widths=4,6", "train.batch=4"]


def config(*changes: str, preset: str = "smoke"):
    return recipe.parse([f"--config=autoencoder:{preset}", *(f"--config.{c}" for c in changes)], "")[0]


@cache
def setup(*changes: str):
    """A tiny rival with drawn weights: (setup, params, stats), networks along the first axis."""
    one = autoencoder.setup_of(config(*TINY, *changes))
    return one, *drawn(lambda: one.init(jax.random.key(0)))


def images(n: int, size: tuple[int, ...] = (16, 16), channels: int = 1) -> np.ndarray:
    return np.random.default_rng(n).random((n, *size, channels)).astype(np.float32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")


def tensor(x):
    """An array as a tensor of PyTorch."""
    return pytest.importorskip("torch").from_numpy(np.array(x))


def channels_first(x):
    """(b, h, w, c) as PyTorch has it."""
    return tensor(x).movedim(-1, 1)


def kernel_of(conv):
    """(h, w, c, d) as PyTorch's (d, c, h, w)."""
    return tensor(conv["kernel"]).permute(3, 2, 0, 1)


# --- networks ---------------------------------------------------------------------------------------------------------


def count(make) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))


def test_the_published_networks_have_as_many_parameters():
    """Sums by hand over the official layer lists: convolutions and their norms, dense layers and theirs."""
    form = dict(size=(64, 64), channels=1, width=16, latent=16)
    make = lambda **more: Autoencoder(**form, **more, rngs=nnx.Rngs(0))
    down = 16 * (16 + 16 * 32 + 32 * 64 + 64 * 64) + 2 * (16 + 32 + 64 + 64)
    up = 16 * (64 * 64 + 64 * 32 + 32 * 16 + 16) + 2 * (64 + 32 + 16)
    dense = lambda h: 1024 * h + h + 2 * h + h * 16 + 16 + 16 * h + h + 2 * h + h * 1024 + 1024
    assert count(lambda: make(outputs=1, hidden=1024)) == down + dense(1024) + up == 2_351_184
    assert count(lambda: make(outputs=2, hidden=1024)) == 2_351_184 + 16 * 16  # AE-U: one output more
    assert count(lambda: make(outputs=1, hidden=2048)) == down + dense(2048) + up == 4_487_248  # DDAD
    block = lambda a, b: 9 * a * b + 9 * b * b + 2 * b + 4 * b
    rise = lambda a, b: 4 * a * b + b + block(2 * b, b)
    five = block(1, 64) + block(64, 128) + block(128, 256) + block(256, 512) + block(512, 1024)
    five += rise(1024, 512) + rise(512, 256) + rise(256, 128) + rise(128, 64) + 64 + 1
    widths = (64, 128, 256, 512, 1024)
    net = lambda: Denoiser(size=(128, 128), channels=1, outputs=1, widths=widths, rngs=nnx.Rngs(0))
    assert count(net) == five == 31_042_369


def test_the_groups_of_a_norm_are_the_middle_divisor():
    assert [groups_of(n) for n in (64, 128, 256, 512, 1024, 6, 1)] == [8, 16, 16, 32, 32, 3, 1]


def test_convolutions_are_those_of_pytorch(torch):
    F, rng = torch.nn.functional, np.random.default_rng(0)
    x, kernel = images(2, (8, 12), 3), rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    weight = tensor(kernel).permute(3, 2, 0, 1)
    near(
        shrunk(jnp.asarray(x), jnp.asarray(kernel)),
        F.conv2d(channels_first(x), weight, stride=2, padding=1).movedim(1, -1),
    )
    kernel = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    weight = tensor(kernel).permute(2, 3, 0, 1)  # transposed ones have (c, d, h, w)
    near(
        expanded(jnp.asarray(x), jnp.asarray(kernel)),
        F.conv_transpose2d(channels_first(x), weight, stride=2).movedim(1, -1),
    )


def test_a_block_of_the_u_net_is_that_of_pytorch(torch):
    F = torch.nn.functional
    graph, params = nnx.split(nnx.eval_shape(lambda: Block(2, 3, 6, rngs=nnx.Rngs(0))))
    params = drawn(lambda: params)
    x, tree = images(2, (7, 9), 3), nnx.to_pure_dict(params)
    y = channels_first(x)
    for conv, norm in zip(tree["convs"].values(), tree["norms"].values(), strict=True):
        weight = kernel_of(conv)
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).reshape(-1, 1, 1, 1) + 1e-5)
        y = F.silu(F.conv2d(F.pad(y, (1, 1, 1, 1), mode="reflect"), weight, tensor(conv["bias"])))
        y = F.group_norm(y, 3, *(tensor(norm[k]) for k in ("scale", "bias")))
    near(jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, x), y.movedim(1, -1))


@pytest.mark.parametrize("train", [True, False])
def test_the_autoencoder_is_that_of_pytorch(torch, train):
    F = torch.nn.functional
    one, params, stats = setup("variant=ae")
    params, stats = (jax.tree.map(lambda x: x[0], tree) for tree in (params, stats))
    x = images(4)

    def normed(y, of, moments):
        mean, var, scale, bias = map(tensor, (moments["mean"], moments["var"], of["scale"], of["bias"]))
        return F.relu(F.batch_norm(y, mean, var, scale, bias, training=train, eps=1e-5))

    dense = lambda y, name: y @ tensor(params[name]["kernel"]) + tensor(params[name]["bias"])
    flipped = lambda conv: torch.from_numpy(np.array(conv["kernel"])).flip(0, 1).permute(2, 3, 0, 1)
    y = channels_first(x)
    for layer, moments in zip(params["encoder"].values(), stats["encoder"].values(), strict=True):
        y = normed(F.conv2d(y, kernel_of(layer["conv"]), stride=2, padding=1), layer["norm"], moments["norm"])
    y = y.movedim(1, -1).flatten(1)  # the order of the code's numbers is no part of the method
    y = dense(normed(dense(y, "enter"), params["enter_norm"], stats["enter_norm"]), "code")
    y = dense(normed(dense(y, "leave"), params["leave_norm"], stats["leave_norm"]), "decode")
    y = y.reshape(4, 1, 1, 8).movedim(-1, 1)
    for layer, moments in zip(params["decoder"].values(), stats["decoder"].values(), strict=True):
        y = normed(F.conv_transpose2d(y, flipped(layer["conv"]), stride=2, padding=1), layer["norm"], moments["norm"])
    y = F.conv_transpose2d(y, flipped(params["out"]), stride=2, padding=1)
    near(jax.jit(lambda p, s, x: one.bind(p, s)(x, train=train))(params, stats, x), y.movedim(1, -1))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["variant=ae", "data.size=40,64"], r"does not halve 4 times: take a size divisible by 16, such as \(32, 64\)"),
        (["variant=dae", "data.size=15,16"], "does not halve"),
        (["variant=dae", "data.size=2,2"], "too small for 2 levels"),
        (["data.unlabeled_size=3"], "goes with data.anomaly_ratio"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, line):
    with pytest.raises(InputError, match=line):
        load_system(config(*changes))


# --- losses and maps --------------------------------------------------------------------------------------------------


def test_the_loss_and_the_score_of_ae_u_are_their_formulas():
    one, params, stats = setup("variant=ae_u")
    x = images(4)
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    result = {"train": {"params": params, "stats": stats}}
    both = jax.jit(lambda p, s, x: [one.bind(p, s)(2 * x - 1, train=train) for train in (True, False)])
    trained, tested = both(first(params), first(stats), x)
    mean, log_variance = (np.asarray(part, np.float64) for part in np.split(np.asarray(trained), 2, -1))
    terms = np.exp(-log_variance) * (2 * x - 1 - mean) ** 2 + log_variance
    value, (_, metrics) = jax.jit(partial(autoencoder.loss, one))(stats, params, x[None], x[None])
    near(value, terms.mean())
    near(metrics["squared"], ((2 * x - 1 - mean) ** 2).mean())
    found = jax.jit(partial(autoencoder.score, one))(result, {"image": x}, jax.random.key(0))
    mean, log_variance = (np.asarray(part, np.float64) for part in np.split(np.asarray(tested), 2, -1))
    expected = (np.exp(-log_variance) * (2 * x - 1 - mean) ** 2)[..., 0]
    near(found["maps"]["ae_u"], expected)
    near(found["scores"]["ae_u"], expected.mean((1, 2)))
    near(found["maps"]["squared_error"], ((2 * x - 1 - mean) ** 2)[..., 0])
    near(found["reconstruction"], (mean + 1) / 2)


@pytest.mark.long
def test_networks_of_a_module_learn_as_if_alone():
    one, params, stats = setup("variant=ddad_intra")
    x = images(8).reshape(2, 4, 16, 16, 1)
    whole = jax.jit(jax.grad(lambda p: autoencoder.loss(one, stats, p, x, x)[0]))(params)
    alone = jax.jit(jax.grad(lambda p, s, x: jnp.mean((one.bind(p, s)(2 * x - 1, train=True) - (2 * x - 1)) ** 2)))
    for i in range(2):
        part = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)
        jax.tree.map(near, part(whole), alone(part(params), part(stats), x[i]))


def test_the_networks_of_a_module_are_not_looped_over():
    """In a loop, and with a kernel for each network, XLA's CPU has slow convolutions."""
    one, params, stats = setup("variant=ddad_intra")
    x = images(8).reshape(2, 4, 16, 16, 1)
    whole = jax.jit(jax.grad(lambda p: autoencoder.loss(one, stats, p, x, x)[0])).lower(params).as_text()
    assert "stablehlo.convolution" in whole and "stablehlo.while" not in whole
    assert set(re.findall(r"(?:feature|batch)_group_count = (\d+)", whole)) == {"1"}


@pytest.mark.long
def test_a_step_deals_the_batch_among_the_networks():
    one, params, stats = setup("variant=ddad_intra")
    x = images(8)
    state = autoencoder.begin(params, one.optimiser, stats)
    batch = {"image": x, "index": jnp.arange(8)}
    after, metrics = jax.jit(partial(autoencoder.step, one, results={}, steps=9))(state, batch, jax.random.key(0))
    before, moved = (tree["encoder"][0]["norm"] for tree in (stats, after.stats))
    for i in range(2):  # the running moments move a tenth of the way to those of the network's own images
        kernel = jax.tree.map(lambda leaf, i=i: leaf[i], params["encoder"][0]["conv"])
        padded = np.pad(2 * x[i::2] - 1, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (1, 2))[:, ::2, ::2]
        seen = np.einsum("nhwcij,ijcd->nhwd", windows, np.asarray(kernel["kernel"]))
        for name, expected in (("mean", seen.mean((0, 1, 2))), ("var", seen.var((0, 1, 2)))):
            near(10 * np.asarray(moved[name][i]) - 9 * np.asarray(before[name][i]), expected)  # ours: n, not n - 1
    assert after.step == 1 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("uncertain", [False, True])
def test_ddads_maps_are_their_formulas(uncertain):
    one, _, _ = setup("variant=ddad", f"model.uncertain={uncertain}")
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=(2, 3, 5, 4, 1 + uncertain)).astype(np.float32) for _ in range(2))
    x = rng.uniform(-1, 1, (3, 5, 4, 1)).astype(np.float32)
    found = autoencoder.discrepancies(one, {"module_a": jnp.asarray(a), "module_b": jnp.asarray(b)}, x)
    variance = np.exp(b[..., 1]).mean(0) if uncertain else 1
    inter = np.abs(a[..., 0].mean(0) - b[..., 0].mean(0))
    near(found["ddad_inter"], inter / np.sqrt(variance))
    near(found["ddad_intra"], b[..., 0].std(0, ddof=1) / np.sqrt(variance))
    near(found["ddad_error"], (x[..., 0] - b[..., 0].mean(0)) ** 2 / variance)
    assert set(autoencoder.discrepancies(one, {"module_b": jnp.asarray(b)}, x)) == {"ddad_intra", "ddad_error"}


def test_the_maps_of_the_denoising_autoencoder_are_those_of_scipy():
    rng = np.random.default_rng(4)
    x, out = rng.uniform(0.2, 1, (2, 20, 18, 1)).astype(np.float32), rng.normal(size=(2, 20, 18, 1)).astype(np.float32)
    x[:, :4] = x[0, 10, 9] = x[1, 10, 8:10] = 0  # one pixel of the background among 25 is allowed, two are not
    absolute, squared = np.abs(2 * x - 1 - out)[..., 0] / 2, ((2 * x - 1 - out) ** 2)[..., 0]
    for foreground in (False, True):
        one, _, _ = setup("variant=dae", f"dae.foreground={foreground}")
        found = autoencoder.denoised_maps(one, jnp.asarray(out), jnp.asarray(x))
        for i in range(2):
            share = ndimage.uniform_filter((x[i, ..., 0] > 0.01).astype(float), 5, mode="constant")
            mask = share > 0.95 if foreground else np.ones((20, 18))
            assert mask[10, 9] == (i == 0 or not foreground) and foreground == (mask.sum() < mask.size)
            near(found["dae"][i], squared[i] * mask)
            near(found["dae_median"][i], ndimage.median_filter(absolute[i] * mask, 5, mode="mirror"))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_the_noise_is_resized_between_corners_as_by_scipy():
    coarse = np.random.default_rng(5).normal(size=(16, 16, 2)).astype(np.float32)
    expected = ndimage.zoom(coarse, (4, 3, 1), order=1)  # the first and last values stay at the corners
    near(autoencoder.stretched(jnp.asarray(coarse), (64, 48)), expected)


def test_the_noise_has_its_deviation_and_lies_on_the_foreground_alone():
    """Between two coarse values, at a share t of the way, the variance is t^2 + (1 - t)^2 of theirs along an axis."""
    image = np.full((32, 32, 1), 0.5, np.float32)
    image[:8] = 0
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = lambda *changes: np.asarray(
        jax.jit(jax.vmap(partial(autoencoder.noise, config("variant=dae", *changes).dae, image)))(keys)
    )
    places = np.arange(32) * 15 / 31
    t = places % 1
    axis = np.mean(t**2 + (1 - t) ** 2)
    found = draws()
    assert not found[:, :8].any()
    near(found[:, 8:].var(), 0.2**2 * axis**2, rtol=0.02)
    near(found[:, 8:].mean(), 0, atol=0.002)
    everywhere = draws("dae.foreground=false", "dae.mean=-0.5")
    near(everywhere.mean((0, 2, 3)), -0.5, atol=0.02)
    near(everywhere[:, :8].var(), 0.2**2 * axis**2, rtol=0.03)


def test_the_network_gets_noise_and_learns_the_image():
    """The loss of the variant dae is of the image without noise, on the foreground alone."""
    one, params, stats = setup("variant=dae")
    x = images(4)
    x[:, :6] = 0
    given = x + 0.1
    net = jax.jit(lambda params, x: one.bind(params, {})(2 * x - 1, train=True))
    squared = (np.asarray(net(jax.tree.map(lambda leaf: leaf[0], params), given)) - (2 * x - 1)) ** 2
    value, _ = jax.jit(partial(autoencoder.loss, one))(stats, params, given[None], x[None])
    near(value, (squared * (x > 0.01)).mean())


# --- runs -------------------------------------------------------------------------------------------------------------


def test_module_a_needs_unlabelled_images_and_module_b_none():
    rows = [
        Row(f"c{i}", f"p{i}", split, None, (f"{i}.png",)) for i, split in enumerate(["train", "unlabeled", "train"])
    ]
    a, b = load_system(config()).stages
    assert a.rows(rows, {}).tolist() == [0, 1, 2] and b.rows(rows, {}).tolist() == [0, 2]
    with pytest.raises(InputError, match="variant=ddad_intra"):
        a.rows(rows[::2], {})
    assert [stage.name for stage in load_system(config("variant=ddad_intra")).stages] == ["module_b"]
    assert a.step is b.step  # one program


def test_the_share_of_abnormal_images_that_is_not_known_is_told():
    changes = ["data.manifest=m.csv", "data.phantom="]
    (note,) = load_system(config(*changes, preset="paper_ddad")).notes
    assert "60% of 4000" in note
    assert not load_system(config(*changes, "variant=ddad_intra", preset="paper_ddad")).notes


@pytest.mark.long
def test_the_denoising_autoencoder_trains_goes_on_evaluates_predicts_and_is_exported(tmp_path):
    counts = {("train", 0): 10, ("val", 0): 4, ("test", 0): 4, ("test", 1): 4}
    manifest, run = write_set(tmp_path / "set", counts), tmp_path / "run"
    words = ["--config=autoencoder:smoke", f"--config.data.manifest={manifest}", "--config.data.phantom="]
    words += [f"--config.{change}" for change in [*TINY, "variant=dae", "train.steps=4", "checkpoint_every=2"]]
    words += [f"--workdir={run}"]
    assert exit_code(train.main, words) == 0
    found = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert found["primary"] == "dae" and set(found["scores"]) == {"dae", "dae_median"} and found["pixel"]
    scores = (run / "evaluation" / "scores.csv").read_text()

    shutil.rmtree(run / "checkpoints" / "train" / "4")  # as if stopped after step 2
    shutil.rmtree(run / "evaluation")
    assert exit_code(train.main, words) == 0
    assert (run / "evaluation" / "scores.csv").read_text() == scores

    assert exit_code(evaluate.main, [f"--workdir={run}", f"--out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "scores.csv").read_text() == scores
    image = next((tmp_path / "set").rglob("test-1-*.png"))
    assert exit_code(predict.main, [f"--workdir={run}", f"--out={tmp_path / 'new'}", str(image)]) == 0
    assert (tmp_path / "new" / "scores.csv").is_file()
    assert exit_code(export.main, [f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "export.json").is_file()
