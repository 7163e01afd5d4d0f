"""Further scores of a reconstruction, and what normals lead to expect, beside NumPy and SciPy, in 2D and 3D."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import first_state
from flax import nnx
from scipy import ndimage

from jmae import fitting, recipe, residuals
from jmae.data.manifest import Row
from jmae.data.preparation import Prepared
from jmae.data.volumes import Volume
from jmae.errors import InputError
from jmae.inference import Scorer
from jmae.masking import group_mask, hidden, run_masks
from jmae.nn.mae import MAE
from jmae.p_values import p_values
from jmae.patches import patchify, unpatchify
from jmae.reconstruct import reconstruct
from jmae.residuals import Evidence
from jmae.scoring import case_score
from jmae.system import fitting_normals, load_system, masked_autoencoder

SIZES = {"2d": ((12, 20), (4, 5), 1), "3d": ((8, 6, 4), (2, 3, 2), 2)}


def config_of(patch=(4, 5), channels=1, system="memmc_mae", **changes):
    config, _ = recipe.parse([f"--config=configs/{system}.py:smoke"], "")
    config.model.patch, config.data.channels = patch, channels
    changes = {f"evaluation.{name}": value for name, value in {"residual": "smoothed", **changes}.items()}
    config.update_from_flattened_dict(changes)
    return config


def evidence(seed=0, size=(12, 20), channels=1, n=3):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, (n, *size, channels)), jnp.float32)
    black = jnp.asarray(rng.uniform(-0.2, 0, (n, channels)), jnp.float32)
    return Evidence(draw(0, 1), draw(-0.3, 0.3), draw(0, 0.1), black, jnp.linspace(1, 1.5, n), size)


def smoothed(values, sigma):
    """SciPy's filter of each channel of each image."""
    return ndimage.gaussian_filter(np.asarray(values, np.float64), (0, *sigma, 0), mode="reflect")


@pytest.mark.parametrize(("size", "sigma"), [((9, 14), (2.0, 0.7)), ((7, 5, 4), (1.5, 0.0, 2.5))])
def test_a_filled_up_image_is_smoothed_as_scipy_does_within_its_true_size(size, sigma):
    image = np.random.default_rng(0).normal(size=(2, *size, 2)).astype(np.float32)
    filled = np.pad(image, [(0, 0), *[(0, 6)] * len(size), (0, 0)], constant_values=9)
    own = (slice(None), *(slice(n) for n in size))
    found = jax.jit(lambda x, n: residuals.smooth(x, sigma, tuple(n)))(filled, jnp.array(size))
    np.testing.assert_allclose(found[own], smoothed(image, sigma), atol=1e-5)
    np.testing.assert_allclose(residuals.smooth(jnp.asarray(image), sigma), smoothed(image, sigma), atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("paste", [False, True])
@pytest.mark.long_but_first
def test_the_evidence_is_that_of_the_masks_that_hide_a_voxel(kind, paste):
    size, patch, channels = SIZES[kind]
    sizes = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2}
    graph, params = nnx.split(MAE(size=size, patch=patch, channels=channels, **sizes, rngs=nnx.Rngs(0)))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, channels)), jnp.float32)
    key, settings = jax.random.key(1), dict(patch=patch, ratio=0.75, masks=6, paste=paste, measure=residuals.under_mask)
    found = jax.jit(lambda p: reconstruct(nnx.merge(graph, p).predictions, image, key, **settings).measured)(params)
    of = residuals.evidence(image, found, jnp.zeros((2, channels)), jnp.ones(2))
    patches = patchify(image, patch)
    n = patches.shape[1]
    made, away = [], []
    own = lambda x: jnp.broadcast_to(x[None], (2, len(x)))
    one = jax.jit(lambda p, keep, restore: nnx.merge(graph, p)(patches, own(keep), own(restore)))
    for keep, restore in zip(*run_masks(key, jnp.arange(6), n, n // 4), strict=True):
        ones = np.broadcast_to(np.asarray(hidden(own(restore), n // 4))[..., None], patches.shape)
        away.append(np.asarray(unpatchify(jnp.asarray(ones, jnp.float32), size, patch)) > 0)
        made.append(np.asarray(unpatchify(one(params, keep, restore), size, patch), np.float64))
    made = np.ma.array(np.stack(made), mask=~np.stack(away))
    np.testing.assert_allclose(of.residual, made.mean(0).filled(0) - np.asarray(image), atol=1e-5)
    np.testing.assert_allclose(of.variance, made.var(0).filled(0), atol=1e-5)


@pytest.mark.parametrize(("patch", "size", "channels"), [((4, 5), (12, 20), 1), ((2, 3, 2), (8, 6, 4), 2)])
@pytest.mark.long_but_first
def test_the_measures_are_their_equations(patch, size, channels):
    of = evidence(0, size, channels)
    x, d, v = (np.asarray(a, np.float64) for a in (of.image, of.residual, of.variance))
    axes = tuple(range(1, d.ndim))
    one = lambda name: residuals.measured(config_of(patch, channels, residual=name), of)
    sigma = [edge / 4 for edge in patch]
    np.testing.assert_allclose(one("smoothed"), smoothed(d, sigma) ** 2, atol=1e-6)
    expected = d**2 / (v + 0.05 * v.mean(axes, keepdims=True))
    np.testing.assert_allclose(one("mahalanobis"), expected, rtol=1e-4)
    over = lambda a: np.asarray(a, np.float64).reshape(len(x), *[1] * len(size), -1)
    a, b = ((y - over(of.black)) / over(of.span) for y in (x, x + d))
    similar = []
    for deviation in (1.5, 3, 6):
        mean = lambda y, deviation=deviation: smoothed(y, [deviation] * len(size))
        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        similar.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    np.testing.assert_allclose(one("ssim"), 1 - np.mean(similar, 0), atol=1e-4)
    features = jnp.asarray(np.random.default_rng(1).random((3, *size)), jnp.float32)
    of = of._replace(features=features)
    assert np.array_equal(residuals.measured(config_of(patch, channels, residual="feature"), of)[..., 0], features)


@pytest.mark.long
def test_an_image_that_is_reconstructed_exactly_has_no_anomaly():
    of = evidence()._replace(residual=jnp.zeros((3, 12, 20, 1)))
    for name in ("smoothed", "ssim", "mahalanobis"):
        assert np.abs(residuals.measured(config_of(residual=name), of)).max() < 1e-5


def test_a_map_is_divided_by_what_normals_have_at_its_position():
    config, normals, new = config_of(expect="position"), evidence(1, channels=2, n=5), evidence(2, channels=2)
    sums = residuals.sums_of(config, normals)
    fitted = residuals.finished(config, jax.tree.map(np.asarray, sums), jax.random.key(0))
    r = (smoothed(normals.residual, (1, 1.25)) ** 2).mean(-1)
    e = ndimage.gaussian_filter(r.mean(0), 1, mode="reflect") + 0.05 * r.mean()
    np.testing.assert_allclose(fitted["e"], e, rtol=1e-4)
    found = residuals.anomaly_map(config, new, {"expected": fitted})
    np.testing.assert_allclose(found, (smoothed(new.residual, (1, 1.25)) ** 2).mean(-1) / e, rtol=1e-4)


@pytest.mark.parametrize(("patch", "size"), [((4, 5), (12, 20)), ((2, 3, 2), (8, 6, 4))])
@pytest.mark.long_but_first
def test_a_map_is_divided_by_what_normals_have_in_the_bin_of_its_appearance(patch, size):
    config = config_of(patch, 2, expect="appearance")
    normals, new = evidence(1, size, 2, 5), evidence(2, size, 2)
    inside = np.random.default_rng(3).random((5, *size)) > 0.3
    sums = residuals.sums_of(config, normals, jnp.asarray(inside))
    fitted = residuals.finished(config, jax.tree.map(np.asarray, sums), jax.random.key(0))
    sigma = [edge / 4 for edge in patch]

    def parts(of):
        over = lambda a: np.asarray(a, np.float64).reshape(len(of.image), *[1] * len(size), -1)
        unit = (np.asarray(of.image + of.residual, np.float64) - over(of.black)) / over(of.span)
        mean = smoothed(unit, sigma)
        deviation = np.sqrt(smoothed((unit - mean) ** 2, sigma))
        place = lambda share: np.clip(np.floor(16 * share), 0, 15).astype(int)
        return smoothed(of.residual, sigma) ** 2, place(unit), place(np.sqrt(4 * deviation))

    r, i, j = parts(normals)
    table = np.zeros((2, 16, 16))
    for c in range(2):
        overall = r[..., c][inside].mean()
        for p in range(16):
            for q in range(16):
                here = inside & (i[..., c] == p) & (j[..., c] == q)
                table[c, p, q] = (r[..., c][here].sum() + 50 * overall) / (here.sum() + 50)
    np.testing.assert_allclose(np.asarray(fitted["e"]).reshape(2, 16, 16), table, rtol=2e-2)
    np.testing.assert_allclose(np.asarray(fitted["e"]).reshape(2, 16, 16).mean(), table.mean(), rtol=1e-3)
    r, i, j = parts(new)
    expected = np.mean([r[..., c] / table[c][i[..., c], j[..., c]] for c in range(2)], 0)
    found = np.asarray(residuals.anomaly_map(config, new, {"expected": fitted}))
    assert np.isclose(found, expected, rtol=2e-2).mean() > 0.99  # a voxel on the edge of a bin may fall on either side


def test_the_bins_of_a_large_volume_are_exact(monkeypatch):
    """Nearly all voxels of a volume may lie in one bin. One float32 sum of these would be .3 % off."""
    config, size = config_of((4, 4, 4), 1, expect="appearance", smooth=0.0), (64, 256, 256)
    rng = np.random.default_rng(0)
    residual = jnp.asarray(rng.normal(size=(1, *size, 1)), jnp.float32)
    monkeypatch.setattr(residuals, "bins_of", lambda config, of: jnp.zeros(of.image.shape, jnp.int32))
    of = Evidence(jnp.zeros_like(residual), residual, residual, jnp.zeros((1, 1)), jnp.ones((1, 1)), size)
    sums = jax.jit(lambda of: residuals.sums_of(config, of))(of._replace(size=()))
    assert int(sums["count"][0, 0, 0]) == residual.size and not np.asarray(sums["count"])[0, 0, 1:].any()
    exact = np.sum(np.asarray(residual, np.float64) ** 2)
    np.testing.assert_allclose(float(sums["total"][0, 0, 0]), exact, rtol=1e-4)


def test_a_case_s_score_is_a_mean_a_top_share_or_the_largest_part():
    values = np.zeros((6, 7))
    values[1:3, 1:3], values[4, 4], values[5, 5], values[0, 6] = 3, 9, 9, 2
    region = np.ones((6, 7), bool)
    one = lambda rule, region: case_score(rule, values, region, share=0.1, above=2.0)
    assert one("mean", None) == pytest.approx(values.mean())
    assert one("top", None) == pytest.approx((9 + 9 + 3 + 3) / 4)
    assert one("part", None) == 4  # diagonal neighbours are two parts, and 2 is not above 2
    region[1, 1:3] = False
    assert one("part", region) == 2 and one("mean", region) == pytest.approx(values[region].mean())
    config = config_of(case_score="top", top=0.1)
    maps = jnp.asarray(np.stack([values, values + 1]), jnp.float32)
    np.testing.assert_allclose(residuals.device_score(config, maps)["smoothed"], [6, 7])
    config.evaluation.case_score = "mean"
    np.testing.assert_allclose(residuals.device_score(config, maps)["smoothed"], [values.mean(), values.mean() + 1])


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("amae", {"residual": "none", "expect": "position"}, "divides evaluation.residual: set that too"),
        ("maemi", {"expect": "position"}, "volumes are not aligned: take evaluation.expect=appearance"),
        ("memmc_mae", {"residual": "mahalanobis", "masks": 2}, "2 are too few, take 4"),
        (
            "amae",
            {"expect": "position", "select": "aucp"},
            "select=aucp: evaluation.expect is fitted after the training",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_one_line(system, changes, message):
    config, _ = recipe.parse([f"--config=configs/{system}.py:smoke"], "")
    config.select = changes.get("select", "last")
    changes = {"residual": "smoothed", **changes} | {"convergence": 0}
    changes.pop("select", None)
    config.update_from_flattened_dict({f"evaluation.{k}": v for k, v in changes.items()})
    with pytest.raises(InputError, match=message):
        load_system(config)


# --- in the systems ---------------------------------------------------------------------------------------------------


def image_case(row):
    array = np.random.default_rng([ord(c) for c in row.id]).random((32, 32, 1)).astype(np.float32)
    return Prepared(row=row, array=array, geometry=None, digest="")


def volume_case(row):
    size = (8, 12, 4) if row.id != "new 1" else (8, 11, 4)
    array = np.random.default_rng([ord(c) for c in row.id]).random((*size, 2)).astype(np.float32)
    return Prepared(row=row, array=array, geometry=None, digest="", volume=Volume(array, *[None] * 8))


def run_of(system, **changes):
    """(the recipe, its system, results with drawn weights and their fit, the fit's rows)."""
    small = {"data.size": (32, 32), "model.patch": (8, 8)} if system == "amae" else {}
    if system == "maemi":
        small = {"data.size": (8, 12, 4), "model.patch": (4, 4, 2), "data.channels": 2, "evaluation.repeats": 4}
        small |= {"evaluation.stride": (8, 12, 4), "evaluation.batch": 4, "data.clip": (0.001, 1.5)}
        small |= {"evaluation.mask_ratio": 0.75, "evaluation.filter": (3, 3, 2)}
    config, _ = recipe.parse([f"--config=configs/{system}.py:smoke"], "")
    config.update_from_flattened_dict(small | {f"evaluation.{k}": v for k, v in changes.items()})
    config.evaluation.batch = 4
    if system == "amae":
        config.variant = "mae"
    method, results = load_system(config), {}
    for stage in method.stages:
        results[stage.name] = stage.result(first_state(stage, results, 4))
    rows = [Row(f"n{i}", f"p{i}", "val", 0, (f"n{i}",)) for i in range(4)]
    cases = SimpleNamespace(case=image_case if system == "amae" else volume_case)
    told = fitting.shapes(config, method, results)
    for fit in method.fits:
        chosen = [rows[i] for i in fit.rows(rows)]
        results[fit.name] = fitting.computed(config, method, fit, results, chosen, cases)
        shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shape(told[fit.name]) == shape(results[fit.name])
    return config, method, results, [rows[i] for i in fitting_normals(rows)]


def new(name):
    return Row(name, "", "test", None, (name,))


@pytest.mark.long
def test_an_image_is_scored_by_the_division_and_nothing_is_compiled_again(monkeypatch):
    traced, real = [], residuals.anomaly_map
    monkeypatch.setattr(residuals, "anomaly_map", lambda *a: traced.append(1) or real(*a))
    config, system, results, rows = run_of("amae", residual="smoothed", expect="position", masks=4)
    assert system.primary == "smoothed" and not system.averaged and len(rows) == 2
    scorer = Scorer(config, system, results)
    count = len(traced)
    many = scorer.score([image_case(new(f"new {i}")) for i in range(6)])
    assert len(traced) == count > 0
    plain = run_of("amae", residual="smoothed", masks=4)
    normals = Scorer(plain[0], plain[1], plain[2]).score([image_case(row) for row in [*rows, new("new 5")]])
    r = np.stack([one.maps["smoothed"][0] for one in normals])
    e = ndimage.gaussian_filter(r[:2].mean(0), 1, mode="reflect") + 0.05 * r[:2].mean()
    np.testing.assert_allclose(many[5].maps["smoothed"][0], r[2] / e, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(many[5].scores["smoothed"][0], (r[2] / e).mean(), rtol=1e-3)
    assert set(many[5].maps) == {"mae", "smoothed"} and many[5].score_error is None
    other = system.prediction.beside(system.prediction.predict)  # as a rival's predictor would be scored
    (stand_in,) = Scorer(config, other, results).score([image_case(new("new 5"))])
    assert other.primary == "smoothed" and [fit.name for fit in other.fits] == ["expected"]
    np.testing.assert_allclose(stand_in.maps["smoothed"], many[5].maps["smoothed"], rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_a_volume_s_map_is_that_of_its_masks_and_appearance(monkeypatch):
    traced, real = [], residuals.anomaly_map
    monkeypatch.setattr(residuals, "anomaly_map", lambda *a: traced.append(1) or real(*a))
    config, system, results, rows = run_of("maemi", residual="smoothed", expect="appearance", case_score="mean")
    scorer = Scorer(config, system, results)
    (found,) = scorer.score([volume_case(new("new 0"))])
    count = len(traced)
    scorer.score([volume_case(new("new 1"))])  # of another size
    scorer.score([volume_case(new("new 2"))])
    assert len(traced) == count > 0
    _, mae_of = masked_autoencoder(config, 2)
    mae = jax.jit(lambda p, *given: mae_of(p)(*given))

    def evidence_by_hand(array):
        x, key = np.clip(array, 0.001, 1.5), jax.random.key(config.seed)
        patches, made, away = patchify(jnp.asarray(x)[None], (4, 4, 2)), [], []
        for sweep in range(4):  # one window; a round has four sweeps
            own = jax.random.fold_in(jax.random.fold_in(key, sweep // 4), 0)[None]
            keep, restore = group_mask(own, jnp.array([sweep % 4]), 12, 3)
            back = lambda values: np.asarray(unpatchify(values, (8, 12, 4), (4, 4, 2)))[0]
            made.append(back(mae(results["train"]["params"], patches, keep, restore)))
            away.append(back(jnp.broadcast_to(hidden(restore, 3)[..., None] * 1.0, patches.shape)) > 0)
        made = np.ma.array(np.stack(made), mask=~np.stack(away))
        black, span = jnp.full((1, 2), 0.001), jnp.full(1, 1.499)
        d = jnp.asarray(made.mean(0).filled(0) - x, jnp.float32)[None]
        return Evidence(jnp.asarray(x)[None], d, d, black, span, (8, 12, 4))

    each = [residuals.sums_of(config, evidence_by_hand(volume_case(row).array)) for row in rows]
    sums = {name: np.concatenate([np.asarray(one[name]) for one in each]) for name in ("total", "count")}
    e = residuals.finished(config, sums, jax.random.key(0))
    expected = np.asarray(real(config, evidence_by_hand(volume_case(new("new 0")).array), {"expected": e}))[0]
    ours = found.maps["smoothed"][0]
    assert np.isclose(ours, expected, rtol=1e-2).mean() > 0.99
    np.testing.assert_allclose(found.scores["smoothed"][0], ours.mean(), rtol=1e-5)


@pytest.mark.parametrize("system", ["amae", "maemi"])
@pytest.mark.long_but_first
def test_features_are_compared_in_the_encoder(system):
    config, method, results, _ = run_of(system, residual="feature", **({"masks": 4} if system == "amae" else {}))
    case = (image_case if system == "amae" else volume_case)(new("new 0"))
    (found,) = Scorer(config, method, results).score([case])
    values = found.maps["feature"][0]
    assert values.shape == case.array.shape[:-1] and values.min() > 0 and np.ptp(values) > 0


def test_p_values_keep_their_promise_where_other_normals_than_the_fitted_ones_calibrate():
    """P(p <= 0.25) of a new normal is 1/4 with three normals that calibrate; it is more with those fitted to."""
    draws, config = 2000, config_of(expect="position")
    r = jnp.asarray(np.random.default_rng(0).gamma(0.5, size=(draws, 7, 6, 6)), jnp.float32)
    e = jax.jit(jax.vmap(lambda normals: residuals.finished(config, {"r": normals}, None)["e"]))(r[:, :3])
    scores = np.asarray(jnp.mean(r / e[:, None], (2, 3)))
    rate = lambda normals: np.mean([p_values(own[normals], own[6:])[0] <= 0.25 for own in scores])
    error = (0.25 * 0.75 / draws) ** 0.5
    assert abs(rate(slice(3, 6)) - 0.25) < 4 * error
    assert rate(slice(0, 3)) > 0.25 + 10 * error


def test_the_primary_score_of_a_residual_is_explained():
    for name in ("maemi:small", "amae:small", "memmc_mae:small"):
        for residual in residuals.MAPS:
            words = [
                f"--config.evaluation.{key}" for key in (f"residual={residual}", "repeats=4")[: 1 + ("maemi" in name)]
            ]
            system = load_system(recipe.parse([f"--config={name}", *words], "")[0])
            assert system.primary == residual and "; the map is the " in system.words[residual]
    assert load_system(recipe.load("maemi:small")).primary == "smoothed"
