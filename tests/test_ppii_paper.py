"""P-PII where the paper leaves room: lesions found by peaks, PHiSeg's start, raters, exact ranks, the gallery."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy import ndimage
from skimage import measure
from test_interpolation import images

from benchmarks.anomalies import pii_sparse
from benchmarks.ppii import arguments_of, data_of, settings_of
from configs import ppii as recipe
from jmae import gallery
from jmae.anomalies import interpolation as own
from jmae.anomalies import poisson
from jmae.data.manifest import Row
from jmae.data.preparation import prepared_image
from jmae.data.transforms import equalise
from jmae.errors import InputError, exit_code
from jmae.figures import PixelFigures, Truth, froc_of
from jmae.lesions import POINTS, Froc, Localisation, random_map_like, sensitivity_at
from jmae.losses import gaussian_kl, hierarchical_loss
from jmae.metrics import auroc
from jmae.nn.phiseg import PHiSeg
from jmae.recipe import from_json, override, parse, read, to_json
from jmae.system import load_system, network, stats_of

KEY = jax.random.key(0)
BOX = [((10, 20), (10, 20))]


def config(*changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    override(c, {f"config.{k}": v for k, _, v in (change.partition("=") for change in changes)})
    return c


# --- 1: FROC ----------------------------------------------------------------------------------------------------------


def curve_of(*maps, **settings):
    found = Froc(rule="peak", **settings)
    for one in maps:
        found.add(*one)
    return found.result()


def test_a_component_hits_where_its_peak_lies_not_where_its_centroid_does():
    """A ring around the box has its centroid in the box and its peak outside."""
    y, x = np.mgrid[:48, :48]
    far = np.hypot(y - 14.5, x - 14.5)
    ring = ((far > 9) & (far < 11)).astype(np.float32)
    ring[24, 14] = 1.5
    old = Froc()
    old.add(BOX, ring)
    assert old.result()["sensitivity"] == 1
    assert curve_of((BOX, ring))["sensitivity"] == 0
    ring[15, 15:26] = 0.5  # a bridge into the box
    ring[15, 15] = 2
    assert curve_of((BOX, ring))["sensitivity"] == 1


def by_force(lesions, scores, t, least, overlap):
    """(hits, false positives) at a threshold, component by component; `lesions` are masks."""
    found, false = set(), 0
    labels = measure.label(scores >= t, connectivity=scores.ndim)
    for part in measure.regionprops(labels):
        if part.area < least:
            continue
        inside = labels == part.label
        peak = np.flatnonzero(inside & (scores == scores[inside].max()))[0]
        mine = {
            i
            for i, mask in enumerate(lesions)
            if mask.ravel()[peak] or (overlap is not None and (inside & mask).sum() >= overlap * (inside | mask).sum())
        }
        found |= mine
        false += not mine
    return len(found), false


@pytest.mark.parametrize("overlap", [None, 0.1])
@pytest.mark.parametrize("size", [(40, 32), (12, 11, 10)])
def test_the_rule_of_peaks_is_the_rule_component_by_component(size, overlap):
    rng, given = np.random.default_rng(1), []
    for _ in range(4):
        scores = ndimage.gaussian_filter(rng.normal(size=size), 1.2).astype(np.float32).round(2)
        boxes = [[(int(a), int(a) + 5) for a in rng.integers(0, np.array(size) - 6)] for _ in range(2)]
        masks = []
        for box in boxes:
            masks.append(np.zeros(size, bool))
            masks[-1][tuple(slice(*ends) for ends in box)] = True
        given.append((boxes, scores, masks))
    got = curve_of(*((boxes, scores) for boxes, scores, _ in given), overlap=overlap, least=3, at=40)
    values = np.sort(np.concatenate([scores.ravel() for _, scores, _ in given]))
    ranks = np.concatenate([np.linspace(0, values.size - 1, 200), values.size - np.geomspace(1, values.size, 200)])
    expected = [[0, 0]]
    for t in sorted(set(values[ranks.astype(int)]), reverse=True):
        hits, false = np.sum([by_force(masks, scores, t, 3, overlap) for _, scores, masks in given], 0)
        expected.append([false / 4, hits / 8])
        if expected[-1][0] > 40:
            break
    np.testing.assert_allclose(got["curve"], expected)


def test_the_sensitivities_are_those_of_the_curve_at_eight_points_and_their_mean():
    scores = np.zeros((60, 60), np.float32)
    scores[10:13, 10:13] = 0.9
    for k, (y, x) in enumerate([(30, 3), (30, 13), (30, 23), (30, 33), (30, 43)]):
        scores[y : y + 3, x : x + 3] = 0.8 - 0.1 * k
    lesions = [((10, 13), (10, 13)), ((30, 33), (23, 26))]
    got = curve_of((lesions, scores), ([], 0 * scores + np.eye(60, dtype=np.float32) * 0), least=4)
    points = dict(map(tuple, got["points"]))
    assert tuple(points) == (*POINTS, 10)
    # Two images: the second lesion is found where one image's two false positives are let through, 1 an image.
    assert points[0.125] == 0.5 and points[1] == 1 and points[10] == 1
    assert points[0.5] == 0.5
    assert got["mean"] == pytest.approx(np.mean(list(points.values())))
    assert got["sensitivity"] == points[10]
    assert [p for p, _ in curve_of((lesions, scores), at=2)["points"]] == [0.125, 0.25, 0.5, 1, 2]
    assert sensitivity_at([[0, 0], [0, 0.5], [4, 0.5], [20, 1]], 10) == pytest.approx(0.5 + 0.5 * 6 / 16)


def test_the_least_area_counts_on_the_grid_that_is_scored():
    """A spot of 4 x 4 pixels of a file of 96 is one of 2 x 2 where 48 pixels are scored."""
    scores = np.zeros((96, 96), np.float32)
    scores[30:34, 30:34] = 1
    lesions = [((28, 36), (28, 36))]
    for least, found in ((4, 1), (5, 0)):
        one = Froc(rule="peak", least=least)
        one.add(lesions, scores, share=4.0)
        assert one.result()["curve"][1] == [0, found]
    old = Froc(least=5)
    old.add(lesions, scores, share=4.0)
    assert old.result()["curve"][1] == [0, 1]


def test_a_random_map_has_the_values_and_the_spectrum_of_its_map():
    rng = np.random.default_rng(0)
    scores = ndimage.gaussian_filter(rng.normal(size=(64, 64)), 2, mode="wrap").astype(np.float32)
    region = np.ones((64, 64), bool)
    region[:3] = False
    other = random_map_like(scores, region, 1)
    np.testing.assert_array_equal(np.sort(other[region]), np.sort(scores[region]))
    assert np.isneginf(other[~region]).all()
    np.testing.assert_array_equal(other, random_map_like(scores, region, 1))
    assert abs(np.corrcoef(other[region], scores[region])[0, 1]) < 0.3
    step = lambda m: np.abs(np.diff(m[3:], axis=0)).mean()
    assert step(other) == pytest.approx(step(scores), rel=0.15)
    shuffled = rng.permutation(scores.ravel()).reshape(64, 64)
    assert step(shuffled) > 2 * step(scores)


def test_a_map_of_noise_finds_what_the_chance_level_says_and_a_true_map_more():
    rng = np.random.default_rng(0)
    noise, truth = Froc(rule="peak", chance=True), Froc(rule="peak", chance=True)
    for _ in range(24):
        y, x = rng.integers(0, 40, 2)
        lesions = [((int(y), int(y) + 8), (int(x), int(x) + 8))]
        scores = ndimage.gaussian_filter(rng.normal(size=(48, 48)), 1.5).astype(np.float32)
        noise.add(lesions, scores)
        scores[y : y + 8, x : x + 8] += 1
        truth.add(lesions, scores)
    noise, truth = noise.result(), truth.result()
    assert abs(noise["mean"] - noise["chance"]["mean"]) < 0.15
    assert truth["mean"] > truth["chance"]["mean"] + 0.5
    assert [p for p, _ in truth["chance"]["points"]] == [*POINTS, 10]


def test_presets_ask_for_peaks_and_an_earlier_run_keeps_its_rule(tmp_path):
    for preset in recipe.PRESETS:
        evaluation = recipe.get_config(preset).evaluation
        assert (evaluation.froc_rule, evaluation.froc_overlap, evaluation.froc_least) == ("peak", 0.1, 5)
    old = from_json(to_json(config()))
    for name in ("froc_rule", "froc_overlap", "froc_least"):
        del old.evaluation[name]
    del old.train.target, old.data.equalise_exact
    (tmp_path / "config.json").write_text(to_json(old))
    found = read(tmp_path)
    assert (found.evaluation.froc_rule, found.evaluation.froc_overlap) == ("centroid", 0.0)
    assert found.train.target == "mean" and not found.data.equalise_exact
    made = froc_of(found.evaluation)(chance=False)
    assert (made.rule, made.overlap, made.least, made.at) == ("centroid", None, 5, 10)


@pytest.mark.long
def test_the_figures_have_the_chance_level_of_the_map_that_stands_for_the_system():
    scores = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(24, 24)), 1).astype(np.float32)
    row = Row("a", "", "test", 1, ("a.png",), "m.png")
    lesion = np.zeros((24, 24), bool)
    lesion[4:9, 4:9] = True
    figures = PixelFigures([row], 1.0, froc_of(config().evaluation), True, "ppii")
    figures.add(row, Truth(lesion, None, 4.0), {"ppii": [scores, -scores], "brightness": [scores]})
    assert "chance" in figures.result("ppii")["froc"] and "chance" not in figures.result("brightness")["froc"]
    each = [curve_of((lesion, part), overlap=0.1, least=20) for part in (scores, -scores)]
    found = figures.result("ppii")["froc"]
    np.testing.assert_allclose(found["points"], np.mean([one["points"] for one in each], 0))
    assert found["mean"] == pytest.approx(np.mean([one["mean"] for one in each]))


def test_iou_stands_beside_that_of_calling_everything_and_the_shares_called():
    rng, found = np.random.default_rng(0), Localisation()
    masks = [rng.random((9, 8)) < share for share in (0.3, 0.6)]
    maps = [rng.normal(size=(9, 8)).astype(np.float32) for _ in masks]
    for mask, scores in zip(masks, maps, strict=True):
        found.add(mask, scores)
    got = found.result(0.2)
    assert got["everything"] == pytest.approx(np.mean([mask.mean() for mask in masks]))
    for name in ("normals", "oracle"):
        share = np.mean([(scores >= got[f"{name}_threshold"]).mean() for scores in maps])
        assert got[f"{name}_called"] == pytest.approx(share)
    assert got["oracle"] >= got["everything"]


# --- 2: PHiSeg's start ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_phiseg_starts_with_equal_posterior_and_prior_and_learns_a_fixed_set_of_tiles():
    """Of dark and bright squares the bright ones are abnormal. He normal heads start at 128,000 and end at 184, .88."""
    rng = np.random.default_rng(0)
    init, bind = network(lambda rngs: PHiSeg(rank=2, channels=1, widths=(6,), latent_levels=1, base=2, rngs=rngs))
    x, y = rng.normal(0, 0.1, (8, 16, 16, 1)).astype(np.float32), np.zeros((8, 16, 16), np.float32)
    for i in range(8):
        for bright in (0, 1):
            r, c = rng.integers(0, 12, 2)
            x[i, r : r + 4, c : c + 4, 0] += 1 if bright else -1
            y[i, r : r + 4, c : c + 4] = bright
    keys, optimiser, x = jax.random.split(KEY, 8), optax.adam(1e-2), jnp.asarray(x)
    folded = lambda k: jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)

    def loss(params, stats, keys):
        net = bind(params, stats)
        logits, q, p = net(x, jnp.stack([1 - y, y], -1), keys, train=True)
        return hierarchical_loss(logits, q, p, jnp.asarray(y)), (stats_of(net), jnp.abs(gaussian_kl(q[0], p[0])).max())

    @jax.jit
    def step(params, stats, opt, k):
        (value, (stats, kl)), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, folded(k))
        updates, opt = optimiser.update(grads, opt)
        return (optax.apply_updates(params, updates), stats, opt), value, kl

    @jax.jit
    def predict(params, stats):
        net = bind(params, stats)
        features = net.features(x)
        draw = lambda k: jax.nn.softmax(net.generate(features, folded(k)))[..., 1]
        return jnp.mean(jax.lax.map(draw, 1000 + jnp.arange(8)), 0)

    params, stats = init(KEY)
    carry, start = (params, stats, optimiser.init(params)), None
    for k in range(100):
        carry, value, kl = step(*carry, k)
        start = start or (float(value), float(kl))
    assert start[0] < 256 and start[1] < 1e-6  # 256 pixels: about 1/2 nat each
    assert value < start[0] / 2
    assert auroc(y.ravel() > 0, np.asarray(predict(*carry[:2])).ravel()) > 0.95


# --- 5 and 6: raters --------------------------------------------------------------------------------------------------

SOME = {"anomalies": (2, 3), "raters": (2, 3), "patch": (0.3, 0.6)}


@pytest.mark.parametrize("preset", own.PRESETS)
def test_a_deviation_over_raters_never_exceeds_one_half(preset):
    pool = images((24, 20), 3)
    run = jax.jit(
        lambda key: own.ppii(pool[0], pool, key, 0, preset=preset, deviation=True, **SOME | {"strength": (10, 19)})
    )
    found = np.stack([run(jax.random.key(k))[2]["deviation"] for k in range(4)])
    assert 0.2 < found.max() <= 0.5 + 1e-6


@pytest.mark.long
def test_one_rater_s_target_is_that_of_the_anomaly_which_the_rater_alone_draws():
    pool = images((24, 20), 3)
    p = own.draw_patches(KEY, (24, 20), 3, 0, own.PRESETS["paper"]._replace(**CHOICE), patch=(0.3, 0.6), core=0.8)
    apply = lambda p, **more: own.apply_ppii(
        jnp.asarray(pool[0]), jnp.asarray(pool), p, most=(13, 11), preset=own.PRESETS["paper"], **more
    )
    whole = apply(p, rater=True)
    k = int(p.chosen[0])
    assert 0 <= k < int(p.raters[0])
    alone = p._replace(
        raters=jnp.ones_like(p.raters),
        **{name: getattr(p, name)[:, k : k + 1] for name in ("centre", "radius", "turn", "strength")},
    )
    out, target, _ = apply(alone)
    np.testing.assert_allclose(whole[2]["rater"], out, atol=1e-5)
    np.testing.assert_allclose(whole[2]["rater_target"], target, atol=1e-5)
    assert np.abs(whole[1] - target).max() > 1e-3  # the mean's target is another one


CHOICE = {"anomalies": (1, 1), "raters": (3, 3)}


@pytest.mark.parametrize("preset", ["released", "jmae"])
def test_the_mean_over_raters_of_one_rater_s_image_is_the_composite(preset):
    pool = images((24, 20), 3) * 0.2 + 0.4  # far from the bounds, where nothing is clipped
    same = {"preset": preset, "anomalies": (2, 2), "raters": (2, 2), "patch": (0.3, 0.6), "strength": (1, 1)}
    one = lambda k: own.ppii(pool[0], pool, KEY, 0, **same, rater=True, rater_number=k)
    (out, *_), each = one(0), np.mean([one(k)[2]["rater"] for k in range(2)], 0)
    np.testing.assert_allclose(each, out, atol=1e-5)


@pytest.mark.long
def test_the_network_learns_one_rater_s_label_where_the_recipe_says_so():
    from jmae.systems import ppii as system

    c = config("train.target=rater", "variant=paper", "anomaly.paper.raters=3,3")
    pool, keys = jnp.asarray(images((32, 32), 4)), jax.random.split(KEY, 4)
    targets = {}
    for name in ("rater", "mean"):
        c.train.target = name
        setup = system.Setup(config=c, init=print, bind=print, task=system.task_of(c))
        targets[name] = jax.jit(lambda setup=setup: system.corrupt(setup, pool, keys)[:2])()
    np.testing.assert_allclose(targets["rater"][0], targets["mean"][0], atol=1e-6)
    assert np.abs(targets["rater"][1] - targets["mean"][1]).max() > 1e-3
    with pytest.raises(InputError, match=r"train\.target=rater is of variants"):
        load_system(config("train.target=rater", "variant=pii"))


# --- 7: gallery -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_gallery_shows_what_a_recipe_trains_on(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(40, 36)), 3)
    file = tmp_path / "a.png"
    Image.fromarray((40 + 200 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)).save(file)
    figures, save = [], gallery.save
    monkeypatch.setattr(gallery, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    own_flags = ["--config=configs/ppii.py:smoke", "--config.data.equalise=true", "--config.variant=paper"]
    out = f"--out={tmp_path / 'g.png'}"
    assert exit_code(gallery.main, [str(file), out, "--draws=2", *own_flags]) == 0
    titles = [axes.get_title().split(",")[0] for axes in figures[0].axes]
    assert titles == 2 * ["a.png", "image", "target", "rater 1", "rater 2", "rater 3", "deviation"]
    c = config("data.equalise=true", "variant=paper")
    expected = prepared_image(Row("a", "", "train", 0, (str(file),)), c.data)
    clean, deviation = (np.asarray(figures[0].axes[k].images[0].get_array()) for k in (0, 6))
    np.testing.assert_array_equal(clean, expected[..., 0])
    assert clean.shape == (32, 32) and 0 < deviation.max() <= 0.5
    assert exit_code(gallery.main, [str(file), out, "--config=configs/maemi.py:smoke"]) == 2
    assert "trains on no synthetic anomalies" in capfd.readouterr().err
    assert exit_code(gallery.main, [str(file), out, "--size=32,32", *own_flags]) == 2
    assert "--size: a recipe names it" in capfd.readouterr().err


# --- 8: exact ranks ---------------------------------------------------------------------------------------------------


def test_exact_ranks_keep_what_256_levels_merge():
    """Soft tissue: 200 of 400 values within 2 of 256 levels."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0.5, 0.5 + 2 / 256, 200), rng.uniform(0, 1, 200)]).astype(np.float32)
    image = values.reshape(20, 20, 1)
    found = equalise(image, exact=True)
    ranks = np.searchsorted(np.sort(values), values, "right").reshape(20, 20, 1)
    np.testing.assert_allclose(found, (ranks - 1) / 399, atol=1e-6)
    soft = lambda x: len(np.unique(x.ravel()[:200]))
    assert soft(equalise(image)) <= 4 and soft(found) == 200
    inside = np.zeros((20, 20), bool)
    inside[:10] = True
    part = equalise(image, inside, exact=True)
    expected = np.maximum(np.searchsorted(np.sort(values[:200]), values, "right") - 1, 0) / 199
    np.testing.assert_allclose(part.ravel(), expected, atol=1e-6)
    assert not equalise(np.full((4, 4, 1), 0.3, np.float32), exact=True).any()


def test_a_recipe_asks_for_exact_ranks(tmp_path):
    values = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    Image.fromarray((65535 * values**4).astype(np.uint16)).save(tmp_path / "a.png")
    row = Row("a", "", "train", 0, (str(tmp_path / "a.png"),))
    c = config("data.equalise=true", "data.equalise_exact=true", "data.size=32,32")
    found = prepared_image(row, c.data)[..., 0]
    assert len(np.unique(found)) > 900
    c.data.equalise_exact = False
    assert len(np.unique(prepared_image(row, c.data))) < 256


def test_the_sparse_solve_that_is_timed_gives_the_image_of_pii():
    rng = np.random.default_rng(0)
    target, source = (rng.uniform(0.3, 0.7, (14, 11)) for _ in range(2))
    found = pii_sparse(target, source, 0.4)
    wide = [jnp.asarray(np.pad(part, [(0, 2), (0, 5)])[..., None], jnp.float32) for part in (target, source)]
    own_change = poisson.change(poisson.interpolation_guidance(*wide, 0.4), jnp.array([14, 11]))
    np.testing.assert_allclose(found, target + own_change[:14, :11, 0], atol=1e-5)


# --- 3, 4 and 9: experiments ------------------------------------------------------------------------------------------


def test_every_row_of_the_paper_s_tables_is_a_setting():
    names = settings_of("table1")
    assert {f"{task}, {net}" for task in ("PII", "P-PII") for net in ("unet", "mc_unet", "phiseg")} <= set(names)
    assert {f"{net}, {what}" for net in ("unet", "mc_unet") for what in ("scaling", "combined")} <= set(
        settings_of("table2")
    )
    assert set(settings_of("generators")) == {"paper", "released", "jmae", "pii"}
    strengths = {changes["anomaly.paper.strength"] for changes in settings_of("strength").values()}
    assert {"2,2", "19,19"} <= strengths
    assert all(changes["anomaly.paper.gain"] == 10.0 for changes in settings_of("strength").values())


@pytest.mark.parametrize("what", ["phantoms", "generators", "strength", "table1", "table2", "volumes", "tables"])
def test_each_part_of_the_benchmark_has_data_and_recipes(what, tmp_path, monkeypatch):
    monkeypatch.setenv("JMAE_DATA", str(tmp_path))
    for data in data_of(what):
        for folder in (data.split()[0] if data else "", "slices"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "manifest.csv").write_text("id,split,label,image\n")
        for changes in settings_of(what).values():
            config, _ = parse(arguments_of(what, data, changes, tmp_path), "")
            assert all(config.system == "ppii" and name.split(".")[0] in config for name in changes)
