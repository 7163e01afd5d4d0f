"""MemMC-MAE where the paper, IGD's code and the first version of this library differ; tiny networks."""

import base64
import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy import ndimage
from test_memmc_mae import IMAGENET, KEY, VOLUMES, arguments, batch, config, near, scored, started

from benchmarks.memmc import FRAMES, key_of, multiply_adds
from configs import memmc_mae as recipe
from jmae import train
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.errors import InputError, exit_code
from jmae.masked import range_of, standardised
from jmae.masking import case_keys, fold_in, hidden, random_mask
from jmae.nn.mae import MAE
from jmae.nn.memory import MultiLevelMAE
from jmae.patches import patchify, unpatchify
from jmae.pretrained import with_pretrained
from jmae.recipe import from_json, read, to_json
from jmae.report.cases import Case
from jmae.report.pictures import Scale, case_pictures
from jmae.ssim import ms_ssim_map
from jmae.system import load_system, masked_autoencoder, trained_shape
from jmae.systems.memmc_mae import dissimilarity
from jmae.weights import read_weights, save_weights

ONE = dict(window=5, sigma=1.5, weights=(1.0,), data_range=1.0)


# --- 1 and 3: luminance and border ------------------------------------------------------------------------------------


def test_a_channel_of_low_contrast_does_not_mute_the_others():
    """Of images that are standardised one by one, the same lesion in red has the same map, however flat blue is."""
    c = config("data.normalise=image", "data.channels=3", "model.channels=3", "evaluation.luminance=none")
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(1, 24, 16, 3)) * [0.15, 0.15, 1.0] + 0.5
    lesion = np.zeros((24, 16, 3), np.float32)
    lesion[8:14, 4:10, 0] = 2.0

    def found(contrast: float) -> tuple[np.ndarray, np.ndarray]:
        image = jnp.asarray(plain * [1, 1, contrast] + [0, 0, 0.5 - 0.5 * contrast], jnp.float32)
        (black, span), x = range_of(image, c), standardised(image, c)
        hide = jnp.ones(x.shape[:-1], bool)
        out = dissimilarity(c.evaluation, x, x + lesion, hide, black=black, span=span)
        return np.asarray(out["map"]), np.asarray(span[0] * image.std((0, 1, 2)))

    normal, spans = found(0.15)
    np.testing.assert_allclose(spans, 1, rtol=1e-5)
    assert normal.max() > 0.05
    np.testing.assert_allclose(found(0.01)[0], normal, rtol=1e-4, atol=1e-5)


def luminance_by_hand(x, y, c1):
    return (2 * x * y + c1) / (x * x + y * y + c1)


@pytest.mark.parametrize("grey", [0.5, 0.8])
def test_luminance_is_that_of_the_values_above_black(grey):
    """Of constant images SSIM is its luminance factor alone. Standardised grey of the mean's brightness counts as 0."""
    step, mean, std = 0.05, 0.5, 0.25
    x = np.full((1, 9, 9, 1), (grey - mean) / std, np.float32)
    y = x + np.float32(step / std)
    own = ONE | {"data_range": 1 / std}
    standardised = ms_ssim_map(x, y, **own)
    unit = ms_ssim_map(x, y, **own, black=np.array([-mean / std], np.float32))
    c1 = 0.01**2
    expected = 1 - luminance_by_hand(grey - mean, grey - mean + step, c1)
    np.testing.assert_allclose(standardised, expected, rtol=1e-4)
    np.testing.assert_allclose(unit, 1 - luminance_by_hand(grey, grey + step, c1), rtol=1e-3)
    np.testing.assert_allclose(ms_ssim_map(x, y, **own, black=None), 0, atol=1e-5)
    assert (expected > 0.9) == (grey == 0.5)  # the same step: almost 1 at mid-grey, almost 0 at bright grey


@pytest.mark.parametrize("changes", [[], [*IMAGENET]], ids=["own moments", "ImageNet"])
@pytest.mark.long_but_first
def test_the_recipe_names_the_values_that_the_luminance_compares(changes):
    """The network returns 0, the mean, so that the map of a constant image is that of two constant images."""
    c = config("evaluation.scales=1.0", "evaluation.paste=false", *changes)
    _, _, state = started(c)
    state = state.replace(params=state.params | {"predict": jax.tree.map(jnp.zeros_like, state.params["predict"])})
    image = jnp.full((4, 24, 16, 1), 0.7).at[:, 0, 0].set(0.1).at[:, -1, -1].set(0.2)
    found = {}
    for name in ("standardised", "unit", "none"):
        own = config("evaluation.scales=1.0", "evaluation.paste=false", f"evaluation.luminance={name}", *changes)
        found[name] = np.asarray(scored(own, state, batch() | {"image": image})["maps"]["ms_ssim"])[:, 10, 10]
    if changes:
        mean, std = np.array(c.data.mean), np.array(c.data.std)
        span, share = 2.1179 + 2.6400, np.array([0.2989, 0.5870, 0.1140]) / 0.9999
    else:
        flat = np.asarray(image[0]).ravel()
        mean, std, share = flat.mean()[None], flat.std()[None], np.ones(1)
        span = 1 / std[0]
    x, c1 = (0.7 - mean) / std, (0.01 * span) ** 2
    black = -mean / std
    relu = lambda value: np.maximum(value, 0)
    np.testing.assert_allclose(found["standardised"], share @ (1 - relu(luminance_by_hand(x, 0, c1))), rtol=1e-3)
    expected = share @ (1 - luminance_by_hand(x - black, 0 - black, c1))
    np.testing.assert_allclose(found["unit"], expected, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found["none"], 0, atol=1e-4)


@pytest.mark.long
def test_a_mirrored_border_keeps_a_defect_in_its_place_and_a_stretched_one_moves_it():
    """The middle of a defect's map: the mirrored windows' SSIM by SciPy, and the distance between both borders."""
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.normal(size=(64, 64)), 2).astype(np.float32)
    y = x.copy()
    y[6:10, 30:34] += 0.5
    of = lambda border: np.asarray(ms_ssim_map(x[None, ..., None], y[None, ..., None], **ONE, border=border))[0]
    taps = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    blur = lambda v: ndimage.correlate1d(ndimage.correlate1d(v, taps / taps.sum(), 0), taps / taps.sum(), 1)
    x, y = x.astype(float), y.astype(float)
    mx, my = blur(x), blur(y)
    vx, vy, both = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ssim = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4) * (2 * both + 9e-4) / (vx + vy + 9e-4)
    np.testing.assert_allclose(of("mirror"), 1 - np.maximum(ssim, 0), atol=2e-5)
    middle = lambda m: (m.sum(1) @ np.arange(64)) / m.sum()
    assert abs(middle(of("mirror")) - 7.5) < 0.3
    assert middle(of("stretch")) < 7.5 - 1  # two pixels nearer to the border, less what the stretching gives back


@pytest.mark.parametrize("n", [32, 37])
@pytest.mark.long_but_first
def test_a_coarse_scale_s_mirrored_map_lies_over_the_pixels_that_make_it(n):
    """One pixel differs; at the second scale, with a window of one pixel, exactly the pixels beside it are marked."""
    x = np.random.default_rng(0).uniform(size=(1, n, n, 1)).astype(np.float32)
    y = x.copy()
    y[0, 17, 9] += 1
    found = np.asarray(ms_ssim_map(x, y, **ONE | {"window": 1, "weights": (1e-9, 1.0)}, border="mirror"))[0]
    start = lambda i: (i + n % 2) // 2 * 2 - n % 2  # where n is odd, the first cell has one row of zeros before it
    rows, columns = (np.arange(max(0, start(i)), start(i) + 2) for i in (17, 9))
    expected = np.zeros((n, n), bool)
    expected[np.ix_(rows, columns)] = True
    np.testing.assert_array_equal(found > 0.01, expected)


# --- 2: maps are means over the masks that hide a voxel ---------------------------------------------------------------


@pytest.mark.parametrize("paste", [pytest.param(True, marks=pytest.mark.long), False])
@pytest.mark.long
def test_a_map_is_the_mean_over_the_masks_that_hide_the_voxel(paste):
    c = config("evaluation.average=hidden", f"evaluation.paste={paste}", "evaluation.masks=4")
    _, _, state = started(c)
    some = batch()
    out = scored(c, state, some, chunk=3)
    _, mae_of = masked_autoencoder(c, 1, MultiLevelMAE, memory=3)
    image = np.asarray(some["image"])
    mean, std = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True)
    x = (image - mean) / std
    keys, patches = case_keys(KEY, some["case"]), patchify(jnp.asarray(x), (8, 4))

    @jax.jit
    def one(params, j):
        keep, restore = random_mask(fold_in(keys, j), 12, 3)
        away = hidden(restore, 3)
        prediction = mae_of(params)(patches, keep, restore)
        whole = jnp.where(away[..., None], prediction, patches) if paste else prediction
        away = jnp.broadcast_to(away[..., None], patches.shape)
        return unpatchify(whole, (24, 16), (8, 4)), unpatchify(away, (24, 16), (8, 4))[..., 0]

    drawn = [jax.device_get(one(state.params, j)) for j in range(4)]
    square = np.stack([((y - x) ** 2).mean(-1) for y, _ in drawn])
    own = dict(window=3, sigma=1.5, weights=(0.5, 0.5), pool=(2, 2))
    d = np.stack(
        [
            np.stack([ms_ssim_map(x[i, None], y[i, None], data_range=1 / std[i].item(), **own)[0] for i in range(4)])
            for y, _ in drawn
        ]
    )
    away = np.stack([mask for _, mask in drawn])
    seen = away.any(0)
    over = lambda values: (values * away).sum(0)[seen] / away.sum(0)[seen]
    assert len(np.unique(away.sum(0))) > 2  # patches are hidden more and less often
    near(out["maps"]["mse"][seen], over(square))
    near(out["maps"]["ms_ssim"][seen], over(d))
    near(np.asarray(out["maps"]["mse"])[~seen], square.mean(0)[~seen])  # never hidden: the mean over all masks
    near(out["scores"]["mse"], np.asarray(out["maps"]["mse"]).mean((1, 2)))
    assert not load_system(c).averaged and load_system(config()).averaged


@pytest.mark.long
def test_windows_of_volumes_weigh_by_what_is_hidden():
    c = config(*VOLUMES, "evaluation.average=hidden", preset="small3d")
    system, _, state = started(c)
    image, keys = jnp.asarray(batch(2, (8, 8, 4), 2)["image"]), jax.random.split(KEY, 2)
    score = jax.jit(lambda params: system.sweep.score({"train": {"params": params}}, image, keys, jnp.zeros(2, int)))
    _, weights = score(state.params)
    _, restore = random_mask(fold_in(keys, 0), 8, 2)
    away = jnp.broadcast_to(hidden(restore, 2)[..., None], (2, 8, 32))
    expected = np.where(unpatchify(away, (8, 8, 4), (4, 4, 2)), 1, 1e-6)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_an_earlier_run_keeps_its_maps(tmp_path):
    """A recipe saved before the keys were declared gets the values that change nothing."""
    old = from_json(to_json(config()))
    for section, names in {"evaluation": ("average", "luminance", "border"), "data": ("crop_from",)}.items():
        for name in names:
            del old[section][name]
    for name in ("weights", "weights_part", "weights_adapt"):
        del old.model[name]
    (tmp_path / "config.json").write_text(to_json(old))
    found = read(tmp_path)
    assert (found.evaluation.average, found.evaluation.luminance, found.evaluation.border) == (
        "all",
        "standardised",
        "stretch",
    )
    assert found.data.crop_from == () and found.model.weights == "" and found.model.gate == old.model.gate


# --- 5: published weights ---------------------------------------------------------------------------------------------

SIZES = dict(width=24, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(a plain MAE, its file as `jmae weights` writes them)."""
    mae = MAE(size=(24, 16), patch=(8, 4), channels=1, rngs=nnx.Rngs(3), **SIZES)
    params = nnx.to_pure_dict(nnx.state(mae, nnx.Param))
    file = tmp_path_factory.mktemp("weights") / "mae.safetensors"
    about = {"format": 1, "part": "mae", "source_sha256": "", "positions": "computed", "norm_pix_loss": False}
    about |= {"size": [24, 16], "patch": [8, 4], "channels": 1, "heads": 2, "decoder_heads": 2}
    write_file(file, params, about)
    return mae, file


def write_file(file, params, about):
    from safetensors.numpy import save_file

    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    tensors = {"/".join(str(step.key) for step in path): np.asarray(leaf) for path, leaf in flat}
    save_file(tensors, file, {"jmae": json.dumps(about)})
    assert read_weights(file).heads == 2 and callable(save_weights)


def filled(c, file, tmp_path):
    c.model.weights = str(file)
    stage = load_system(c).stages[0]
    return stage, with_pretrained(c, stage, jax.jit(lambda: stage.init(KEY, {}, 8))(), tmp_path)


@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.long_but_first
def test_published_weights_make_the_network_the_plain_mae(published, tmp_path, gate):
    mae, file = published
    c = config("model.memory=0", f"model.gate={gate}")
    _, state = filled(c, file, tmp_path)
    _, mae_of = masked_autoencoder(c, 1, partial(MultiLevelMAE, gate=gate), memory=0)
    patches = patchify(batch()["image"], (8, 4))
    keep, restore = random_mask(jax.random.split(KEY, 4), 12, 3)
    found = jax.jit(lambda params: mae_of(params)(patches, keep, restore))(state.params)
    np.testing.assert_allclose(found, mae(patches, keep, restore), atol=1e-5)


@pytest.mark.long
def test_memory_slots_and_gates_learn_after_published_weights(published, tmp_path):
    _, file = published
    stage, state = filled(config("train.lr=0.01"), file, tmp_path)
    before = state.params
    assert not np.any(before["decoder"]["stack"]["out"]["kernel"])
    step = jax.jit(partial(stage.step, steps=10))
    for _ in range(2):
        after, _ = step(state.replace(step=jnp.int32(5)), batch(), KEY, {})
        state = state.replace(params=after.params)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, before)
    assert changed["decoder"]["stack"]["out"]["kernel"] and changed["decoder"]["stack"]["gates"]["kernel"]
    assert changed["encoder"]["stack"]["memory_k"] and changed["decoder"]["stack"]["attend"]["fc1"]["kernel"]


def test_long_skips_and_published_weights_exclude_each_other(published):
    with pytest.raises(InputError, match="no published network has long skips"):
        load_system(config("model.long_skips=true", f"model.weights={published[1]}"))


# --- 6: random crops --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_random_crops_come_from_the_larger_image(tmp_path):
    """A stripe of one pixel in two of the larger image is grey in an image of half the size, and not in a crop."""
    stripes = np.tile(np.array([0, 255], np.uint8), (96, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    rows = [Row("a", "", "train", 0, (str(tmp_path / "a.png"),))]
    fixed = ["data.normalise=fixed", "data.mean=0.0", "data.std=1.0", "data.crop_scale=0.05,0.07"]
    c = config(*fixed, "data.crop_from=96,64")
    stage = load_system(c).stages[0]
    assert stage.size == (96, 64) and trained_shape(c, stage) == (96, 64, 1)
    images = Images(rows, c)
    small, large = images.image(np.array([0])), images.at(stage.size).image(np.array([0]))
    assert small.shape == (1, 24, 16, 1) and large.shape == (1, 96, 64, 1)
    crop = train_view(c, large)
    assert crop.shape == (1, 24, 16, 1)
    assert np.ptp(small) < 0.1 and np.ptp(crop) > 3 * np.ptp(train_view(config(*fixed), small))


def train_view(c, image):
    from jmae.systems.memmc_mae import view

    return np.asarray(jax.jit(partial(view, c))(jnp.asarray(image), jax.random.split(KEY, len(image))))


@pytest.mark.long
def test_a_run_trains_on_larger_images(small_set, tmp_path):
    changes = ["data.crop_scale=0.3,1.0", "data.crop_from=48,32", "train.steps=2", "select=aucp", "select_samples=4"]
    assert exit_code(train.main, arguments(small_set, tmp_path, *changes, "evaluation.average=hidden")) == 0
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "calling every pixel gives" in page and 'class="called"' in page and "visible patches" in page
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["pixel"]["localisation"]["everything"] > 0


def test_a_size_of_crops_without_crops_is_refused():
    with pytest.raises(InputError, match=r"data.crop_from goes with random crops"):
        load_system(config("data.crop_scale=", "data.crop_from=48,32"))


# --- 7: colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper_colour", "small_colour"])
def test_a_preset_keeps_colours(preset):
    c = recipe.get_config(preset)
    plain = recipe.get_config(preset.removesuffix("_colour"))
    assert (c.data.channels, c.model.channels) == (3, 3)
    c.data.channels, c.model.channels = plain.data.channels, plain.model.channels
    assert to_json(c) == to_json(plain)


# --- 8: gates ---------------------------------------------------------------------------------------------------------


def test_the_count_of_products_is_that_by_hand_at_the_paper_s_size():
    """197 tokens of 512, 12 levels of 50 tokens of 768: multiply-adds of a decoder block and image."""
    c = recipe.get_config("paper")
    plain = 12 * 197 * 512**2 + 2 * 197 * 197 * 512
    levels = 12 * (50 * 768 * 2 * 512 + 2 * 197 * 50 * 512)
    query, project = 197 * 512**2, 197 * 512**2
    token = plain + query + levels + 12 * 2 * 197 * 512 + project
    channel = plain + query + levels + 12 * (2 * 197 * 512 * 512 + project)
    assert multiply_adds(c)[1] == 8 * token
    c.model.gate = "channel"
    assert multiply_adds(c)[1] == 8 * channel
    assert plain == pytest.approx(659e6, rel=1e-3) and channel == pytest.approx(3163e6, rel=1e-3)


# --- 9: pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_pictures_are_those_of_one_mask():
    c = config("evaluation.average=hidden")
    _, _, state = started(c)
    some = batch()
    out = scored(c, state, some)
    _, restore = random_mask(fold_in(case_keys(KEY, some["case"]), 0), 12, 3)
    away = jnp.broadcast_to(hidden(restore, 3)[..., None], (4, 12, 32))
    away = np.asarray(unpatchify(away, (24, 16), (8, 4)))
    image, left = np.asarray(some["image"]), np.asarray(out["pictures"]["visible patches"])
    np.testing.assert_array_equal(left, np.where(away, np.float32(0.5), image))
    shown = np.asarray(out["reconstruction"])
    np.testing.assert_allclose(shown[~away], image[~away], atol=1e-5)
    assert np.abs(shown[away] - image[away]).min() > 1e-6


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"), float)


def test_the_report_shows_colours_and_outlines_what_the_map_calls():
    y, x = np.mgrid[:16, :16] / 15
    image = np.stack([x, np.zeros((16, 16)), y], -1)
    case = Case("c", 1, 0.5, image, x, y > 0.7, image[:, ::-1], pictures={"visible patches": image}, called=x > 0.5)
    found = case_pictures(case, Scale(0, 1, ""))
    for name, expected in (("image", image), ("reconstruction", image[:, ::-1])):
        np.testing.assert_allclose(decoded(found[name]) / 255, expected, atol=0.13)  # of 256 colours
    np.testing.assert_allclose(decoded(found["further"]["visible patches"]) / 255, image, atol=0.13)
    assert "8.0 " in found["called"] and found["outline"] != found["called"]  # pixels 8 to 15 of a row
    volume = np.repeat(image[:, :, None], 2, 2)
    sequences = Case("v", 1, 0.5, volume, np.repeat(x[:, :, None], 2, 2))
    shown = decoded(case_pictures(sequences, Scale(0, 1, ""))["image"])
    np.testing.assert_array_equal(shown[..., 0], shown[..., 1])  # three sequences of a volume are no colours


# --- 11: results ------------------------------------------------------------------------------------------------------


def test_results_of_another_budget_or_seed_are_another_result():
    keys = {key_of("ablation", "MAE", budget, seed) for budget in (0.2, 1.0) for seed in (0, 1)}
    assert len(keys) == 4 and key_of("ablation", "MAE", 1.0, 0) == "ablation, MAE, budget 1, seed 0"
    assert FRAMES == "endoscopy/full"
