"""Metrics against scikit-learn, SciPy, brute force and algebra."""

import json
import math
import time
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn import metrics as sk

from jmae import metrics
from jmae.errors import InputError
from jmae.lesions import lesion_sizes


def random_cases(n=60):
    """Labels and scores of all kinds: few and many, with and without ties, float32 and float64, rare positives."""
    for seed in range(n):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 300))
        labels = rng.random(size) < rng.choice([0.03, 0.5, 0.9])
        labels[:2] = False, True
        scores = rng.normal(size=size) + labels * rng.normal()
        if seed % 3:
            scores = np.round(scores, seed % 3 - 1)  # to integers or tenths: many ties
        yield rng.permutation(labels), scores.astype([np.float32, np.float64][seed % 2])


def thresholds_by_force(labels, scores):
    """Every distinct score as a threshold, descending, with its true and false positives."""
    for t in np.unique(scores)[::-1]:
        yield t, int((labels & (scores >= t)).sum()), int((~labels & (scores >= t)).sum())


def test_auroc_and_ap_are_those_of_scikit_learn():
    for labels, scores in random_cases():
        assert metrics.auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
        expected = sk.average_precision_score(labels, scores)
        assert metrics.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_nothing_changes_when_positives_come_in_chunks(monkeypatch):
    cases = list(random_cases(12))
    measures = (metrics.auroc, metrics.average_precision, metrics.best_dice, metrics.threshold_on)
    whole = [[f(*case) for f in measures] for case in cases]
    monkeypatch.setattr(metrics, "CHUNK", 3)
    for before, case in zip(whole, cases, strict=True):
        assert np.allclose(np.hstack(before), np.hstack([f(*case) for f in measures]), rtol=1e-13, atol=0)


def test_equal_scores_everywhere_are_chance():
    labels = [0, 1, 1, 0, 0]
    assert metrics.auroc(labels, np.ones(5)) == 0.5
    assert metrics.average_precision(labels, np.ones(5)) == 0.4  # the prevalence


def test_auroc_is_antisymmetric_and_blind_to_monotone_maps():
    for labels, scores in random_cases(10):
        value = metrics.auroc(labels, scores)
        assert metrics.auroc(labels, -scores) == pytest.approx(1 - value, abs=1e-12)
        assert metrics.auroc(labels, np.float64(scores) * 8 + 1) == value


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_gives_nan_and_no_curve(labels):
    scores = np.arange(len(labels), dtype=float)
    assert math.isnan(metrics.auroc(labels, scores))
    assert math.isnan(metrics.average_precision(labels, scores))
    assert np.isnan(metrics.best_dice(labels, scores)).all()
    assert math.isnan(metrics.threshold_on(labels, scores))
    assert np.isnan(metrics.bootstrap_interval(metrics.auroc, labels, scores, labels)).all()
    assert all(a.size == 0 for f in (metrics.roc_curve, metrics.pr_curve) for a in f(labels, scores))


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.average_precision, metrics.best_dice])
def test_scores_that_are_not_finite_are_counted_in_the_error(metric):
    with pytest.raises(InputError, match="3 of 5 scores are not finite"):
        metric([0, 1, 0, 1, 0], [np.nan, np.inf, -np.inf, 1.0, 2.0])


def test_wrong_labels_and_lengths_are_refused():
    with pytest.raises(ValueError, match="3 labels for 2 scores"):
        metrics.auroc([0, 1, 1], [0.0, 1.0])
    for labels in ([0, 1, 2], [0, 1, None], [0, 1, np.nan]):
        with pytest.raises(ValueError, match="labels must be 0"):
            metrics.auroc(labels, [0.0, 1.0, 2.0])


def test_the_callers_arrays_stay_as_they_are():
    labels, scores = np.array([True, False, True]), np.array([3, 2, 1], np.float32)
    metrics.auroc(labels, scores), metrics.pixel_metrics([labels], [scores])
    assert scores.tolist() == [3, 2, 1] and labels.tolist() == [True, False, True]


def test_pixels_take_little_memory_and_time():
    n = 4_000_000
    rng = np.random.default_rng(0)
    scores, labels = rng.random(n, np.float32), rng.random(n, np.float32) < 0.05
    start = time.perf_counter()
    tracemalloc.start()
    value = metrics.auroc(labels, scores)
    metrics.average_precision(labels, scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(value - 0.5) < 0.01
    assert peak / n < 25, f"{peak / n:.1f} bytes a pixel: 10^8 pixels must fit in 4 GiB with their 5 bytes each"
    assert time.perf_counter() - start < 8


def test_curves_have_the_exact_areas():
    for labels, scores in random_cases(20):
        fpr, tpr, t = metrics.roc_curve(labels, scores, points=300)
        assert sk.auc(fpr, tpr) == pytest.approx(metrics.auroc(labels, scores), abs=1e-12)
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (np.diff(t) < 0).all()
        recall, precision, _ = metrics.pr_curve(labels, scores, points=300)
        area = (np.diff(recall, prepend=0) * precision).sum()
        assert area == pytest.approx(metrics.average_precision(labels, scores), abs=1e-12)


def test_thinned_curves_are_short_and_their_points_exact():
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.3
    scores = rng.normal(size=20_000) + labels
    fpr, tpr, t = metrics.roc_curve(labels, scores, points=50)
    assert fpr.size <= 101
    assert sk.auc(fpr, tpr) == pytest.approx(metrics.auroc(labels, scores), abs=2e-3)
    assert np.allclose(tpr[1:], [(scores[labels] >= x).mean() for x in t[1:]])


def test_best_dice_is_the_largest_over_every_threshold():
    for labels, scores in random_cases(30):
        force = [(2 * tp / (tp + fp + labels.sum()), t) for t, tp, fp in thresholds_by_force(labels, scores)]
        dice, threshold = metrics.best_dice(labels, scores)
        assert dice == pytest.approx(max(d for d, _ in force), abs=1e-12)
        assert dice == pytest.approx(sk.f1_score(labels, scores >= threshold), abs=1e-12)
        assert metrics.iou(labels, scores, threshold) == pytest.approx(dice / (2 - dice), abs=1e-12)
        assert metrics.iou(labels, scores, threshold) == sk.jaccard_score(labels, scores >= threshold)


def test_the_threshold_maximises_youdens_j_and_ties_go_to_the_highest():
    for labels, scores in random_cases(30):
        n, p = (~labels).sum(), labels.sum()
        force = [(tp * n - fp * p, t) for t, tp, fp in thresholds_by_force(labels, scores)]
        best, found = max(j for j, _ in force), metrics.threshold_on(labels, scores)
        if best > 0:
            assert found == max(t for j, t in force if j == best and t in scores[labels])
        else:
            assert found > scores.max()
    assert metrics.threshold_on([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0]) == 4.0  # J = 1/2 at 2 and at 4


def test_the_threshold_may_maximise_accuracy():
    for labels, scores in random_cases(30):
        none = np.nextafter(scores.max(), scores.dtype.type(np.inf))
        at = {t: sk.accuracy_score(labels, scores >= t) for t in {*scores[labels], none}}
        assert metrics.threshold_on(labels, scores, "accuracy") == max(t for t in at if at[t] == max(at.values()))
    few = [0, 0, 0, 0, 0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 5.5, 6.5]
    assert (metrics.threshold_on(*few, "accuracy"), metrics.threshold_on(*few)) == (6.5, 5.5)


def test_where_nothing_is_better_than_to_call_nothing_the_threshold_lies_above_all_scores():
    labels, scores = np.arange(100) < 5, np.arange(100.0)  # the abnormal cases have the lowest scores
    for rule in ("accuracy", "youden"):
        t = metrics.threshold_on(labels, scores, rule)
        assert scores.max() < t < scores.max() + 1e-6
    assert metrics.at_threshold(labels, scores, t)["accuracy"] == 0.95


def test_scores_of_several_seeds_have_the_interval_of_their_mean():
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    scores, patients = labels + rng.normal(size=(3, 60)), [str(i // 2) for i in range(60)]
    found = metrics.image_metrics(labels, scores, patients, draws=300)
    each = [metrics.image_metrics(labels, one, patients, draws=300) for one in scores]
    assert found["auroc"] == pytest.approx(np.mean([one["auroc"] for one in each]))
    assert found["ap"] == pytest.approx(np.mean([one["ap"] for one in each]))
    draws = np.random.default_rng(0).integers(30, size=(300, 30))  # patients, with both their cases
    for key, measure in (("auroc_ci", sk.roc_auc_score), ("ap_ci", sk.average_precision_score)):
        by_hand = []
        for drawn in draws:
            cases = np.concatenate([2 * drawn, 2 * drawn + 1])
            by_hand.append(np.mean([measure(labels[cases], one[cases]) for one in scores]))
        np.testing.assert_allclose(found[key], np.quantile(by_hand, [0.025, 0.975]))
    assert found["auroc_ci"][1] - found["auroc_ci"][0] < np.mean([np.ptp(one["auroc_ci"]) for one in each])


def test_decisions_at_a_threshold_are_those_of_scikit_learn():
    for labels, scores in random_cases(20):
        t = float(np.median(scores))
        called, row = scores >= t, metrics.at_threshold(labels, scores, t)
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(labels, called))
        assert row["f1"] == pytest.approx(sk.f1_score(labels, called))
        assert row["sensitivity"] == pytest.approx(sk.recall_score(labels, called))
        assert row["precision"] == pytest.approx(sk.precision_score(labels, called))
        assert row["specificity"] == pytest.approx(sk.recall_score(~labels, ~called))
        assert row["threshold"] == t


def test_a_decision_without_a_class_or_a_threshold_is_nan():
    row = metrics.at_threshold([0, 0], [1.0, 2.0], 1.5)
    assert row["specificity"] == 0.5 and math.isnan(row["sensitivity"])
    assert all(math.isnan(v) for v in metrics.at_threshold([0, 1], [1.0, 2.0], math.nan).values())


@pytest.mark.parametrize(
    ("own", "known"),
    [(metrics.auroc, sk.roc_auc_score), (metrics.average_precision, sk.average_precision_score)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_that_of_a_plain_loop_over_patients(own, known, ties):
    rng = np.random.default_rng(5)
    patients = [f"p{i}" for i in rng.integers(0, 12, 40)]
    labels, scores = rng.random(40) < 0.4, rng.integers(0, 6, 40) if ties else rng.normal(size=40)
    names = list(dict.fromkeys(patients))
    members = [[i for i, p in enumerate(patients) if p == name] for name in names]
    draw, values = np.random.default_rng(3), []
    for _ in range(200):
        cases = [i for k in draw.integers(len(names), size=len(names)) for i in members[k]]
        if len(set(labels[cases])) == 2:
            values.append(known(labels[cases], scores[cases]))
    expected = np.percentile(values, [5, 95])
    got = metrics.bootstrap_interval(own, labels, scores, patients, draws=200, seed=3, level=0.9)
    assert np.allclose(got, expected)


def test_the_interval_covers_at_about_its_level():
    """Scores N(0,1) and N(1,1): AUROC = Phi(1/sqrt 2)."""
    truth, hits = stats.norm.cdf(1 / math.sqrt(2)), 0
    labels = np.arange(80) % 2
    for seed in range(100):
        scores = np.random.default_rng(seed).normal(size=80) + labels
        lo, hi = metrics.bootstrap_interval(metrics.auroc, labels, scores, range(80), draws=200)
        hits += lo <= truth <= hi
    assert 88 <= hits <= 99


def test_images_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scores = rng.normal(size=40) + labels
    width = lambda *a: float(np.diff(metrics.bootstrap_interval(metrics.auroc, *a, draws=500))[0])
    alone = width(labels, scores, [""] * 40)
    copied = np.repeat(labels, 9), np.repeat(scores, 9)
    assert width(*copied, np.repeat(np.arange(40), 9)) == pytest.approx(alone, rel=0.15)
    assert width(*copied, [None] * 360) < 0.5 * alone  # nine copies taken for nine patients


def test_draws_with_one_class_are_left_out():
    lo, hi = metrics.bootstrap_interval(metrics.auroc, [1, 0, 0], [2.0, 1.0, 0.0], "abc", draws=300)
    assert (lo, hi) == (1, 1)


def test_intervals_do_not_depend_on_how_many_draws_are_looked_at_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    labels, scores, patients = np.arange(30) % 2, rng.integers(0, 9, 30), rng.integers(0, 12, 30)
    for figure in (metrics.auroc, metrics.average_precision):
        together = metrics.bootstrap_interval(figure, labels, scores, patients, draws=100)
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "CHUNK", 70)
            assert metrics.bootstrap_interval(figure, labels, scores, patients, draws=100) == pytest.approx(together)
    with pytest.raises(ValueError, match="measure is auroc or average_precision"):
        metrics.bootstrap_interval(metrics.best_dice, labels, scores, patients)


def test_chi2_of_equal_disjoint_and_hand_counted_histograms():
    assert metrics.chi2_distance([0, 1, 2], [2, 1, 0]) == {"raw": 0, "normalised": 0}
    assert metrics.chi2_distance([0.0, 0.1], [0.9, 1.0, 0.95]) == pytest.approx({"raw": 2.5, "normalised": 1})
    got = metrics.chi2_distance([0, 0, 0, 10], [0, 10], bins=2)  # h = (3, 1), k = (1, 1)
    assert got["raw"] == pytest.approx(0.5 * (4 / 4 + 0))
    assert got["normalised"] == pytest.approx(0.5 * (0.25**2 / 1.25 + 0.25**2 / 0.75))
    assert metrics.chi2_distance([7.0], [7.0, 7.0])["normalised"] == 0
    assert math.isnan(metrics.chi2_distance([], [1.0])["raw"])


def test_replicates_give_mean_and_1_96_standard_deviations():
    got = metrics.replicate_summary([0.8, 0.9, 1.0])
    assert got["mean"] == pytest.approx(0.9) and got["half_width"] == pytest.approx(0.196)
    assert math.isnan(metrics.replicate_summary([0.8])["half_width"])


def test_image_metrics_hold_the_values_with_their_intervals():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3 == 0
    scores = rng.normal(size=60) + labels
    got = metrics.image_metrics(labels, scores, [""] * 60, draws=200)
    assert (got["n_normal"], got["n_abnormal"]) == (40, 20)
    assert got["auroc_ci"][0] < got["auroc"] == sk.roc_auc_score(labels, scores) < got["auroc_ci"][1]
    assert got["ap_ci"][0] < got["ap"] < got["ap_ci"][1]


@pytest.mark.parametrize("size", [(9, 7), (5, 4, 3)])
def test_pixels_are_pooled_over_images_and_only_inside_the_region(size):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < p for p in (0, 0.2, 0.4)]
    maps = [rng.normal(size=size).astype(np.float32) + 0.5 * m for m in masks]
    regions = [None, rng.random(size) < 0.5, rng.random(size) < 0.5]
    everywhere = np.ones(size, bool)
    inside = [everywhere if r is None else r for r in regions]
    y, s = (np.concatenate([a[r] for a, r in zip(x, inside, strict=True)]) for x in (masks, maps))
    got = metrics.pixel_metrics(masks, maps, regions)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(y, s))
    assert got["ap"] == pytest.approx(sk.average_precision_score(y, s))
    assert got["prevalence"] == pytest.approx(y.mean()) and got["froc"] is None
    dice, threshold = metrics.best_dice(y, s)
    assert got["dice_best"] == pytest.approx(dice)
    assert got["iou"] == pytest.approx(sk.jaccard_score(y, s >= threshold))


def test_pixel_metrics_of_normals_alone_are_nan_and_shapes_must_agree():
    blank, scores = np.zeros((2, 2), bool), np.ones((2, 2), np.float32)
    assert math.isnan(metrics.pixel_metrics([blank], [scores])["auroc"])
    with pytest.raises(ValueError, match=r"image 1: .*\(2, 2\), \(2, 3\)"):
        metrics.pixel_metrics([blank, blank], [scores, np.ones((2, 3))])


def pooled(*images):
    pool = metrics.Pooled()
    for image in images:
        pool.add(*image)
    return pool


def between(low, high, n, rng):
    """n float32 scores from low to high, any representable one as likely: equal ones and close ones."""
    ends = np.array([low, high], np.float32).view(np.int32)
    return rng.integers(*ends, n, endpoint=True).astype(np.int32).view(np.float32)


def hostile_cases():
    """(name, labels, scores) that bins of float32 tell apart badly, in many orders within the bins."""
    rng = np.random.default_rng(0)
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    tiny = np.float32(2**-149)  # the smallest denormal
    for share in (0.02, 0.5, 0.95):
        y = rng.random(3000) < share
        y[:2] = False, True
        ladder = (1 + 2**-23 * np.arange(y.size)).astype(np.float32)  # distinct, in one bin
        one_bin = between(1, 1 + 2**-12, y.size, rng)
        edge = np.where(rng.random(y.size) < 0.5, between(1 - 2**-13, below, y.size, rng), one_bin)
        yield "all equal", y, np.full(y.size, 0.3, np.float32)
        yield "one bin", y, one_bin
        yield "one bin, positives first", y, ladder[np.argsort(np.argsort(y, kind="stable"))]
        yield "one bin, positives last", y, ladder[np.argsort(np.argsort(~y, kind="stable"))]
        yield "one bin, positives tied", y, np.where(y, np.float32(1 + 2**-12), one_bin)
        yield "tied positives below far negatives", y, np.where(y, 1 + 2**-20, np.where(one_bin > 1.0001, 2, 1))
        yield "two clusters at an edge", y, np.where(y, np.float32(1), np.float32(below))
        yield "around an edge", y, edge
        yield "around an edge, positives first", y, np.where(y, np.maximum(edge, 1), edge)
        yield "negative", y, -edge
        yield "zeros of both signs", y, np.where(rng.random(y.size) < 0.5, np.float32(-0.0), np.float32(0.0))
        yield "denormal", y, tiny * rng.integers(-9000, 9000, y.size).astype(np.float32)
        yield "both signs", y, rng.normal(size=y.size).astype(np.float32) + y
        yield "all of float32", y, np.where(rng.random(y.size) < 0.5, -1, 1) * between(0, 3e38, y.size, rng)
        yield "float64 that float32 cannot tell", y, 0.1 + 1e-12 * rng.normal(size=y.size)
        yield "float64 beyond float32", y, 1e300 * rng.normal(size=y.size)


def test_pools_up_to_the_limit_are_exact():
    for labels, scores in random_cases():
        got = pooled((labels, scores)).result()
        assert got["auroc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
        assert got["ap"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
        assert set(got) == {"auroc", "ap", "prevalence", "dice_best", "iou", "aupro", "froc"} and got["aupro"] is None


def lesioned(rng, shape, lesions, levels=0):
    """(mask, map, region, sizes) with blocks as lesions, some of which the region cuts; `levels`: so many scores."""
    mask = np.zeros(shape, bool)
    for _ in range(lesions):
        start = [int(rng.integers(0, n - 2)) for n in shape]
        mask[tuple(slice(a, a + int(rng.integers(1, 5))) for a in start)] = True
    scores = rng.normal(size=shape).astype(np.float32) + mask
    scores = np.round(scores * levels) / levels if levels else scores
    region = rng.random(shape) < 0.9
    return mask, scores, region, lesion_sizes(mask & region)


def aupro_by_hand(images, limit=0.3):
    """Every distinct score is a threshold: trapezoids under the mean overlap of lesions, cut off at the limit."""
    outside = np.concatenate([s[r & ~m] for m, s, r, _ in images])
    inside = []
    for mask, scores, region, _ in images:
        labels, n = ndimage.label(mask & region, np.ones((3,) * mask.ndim))
        inside += [scores[labels == k] for k in range(1, n + 1)]
    thresholds = np.unique(np.concatenate([outside, *inside]))[::-1]
    fpr = np.array([0.0, *((outside >= t).mean() for t in thresholds)])
    pro = np.array([0.0, *(np.mean([(one >= t).mean() for one in inside]) for t in thresholds)])
    last = int(np.searchsorted(fpr, limit, "right"))  # beyond the limit
    cut = np.interp(limit, fpr[last - 1 : last + 1], pro[last - 1 : last + 1])
    return np.trapezoid(np.r_[pro[:last], cut], np.r_[fpr[:last], limit]) / limit


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("shape", [(17, 13), (9, 8, 6)])
def test_aupro_is_the_area_under_the_overlap_of_lesions(levels, shape, monkeypatch):
    rng = np.random.default_rng(levels)
    images = [lesioned(rng, shape, lesions, levels) for lesions in (0, 3, 5)]
    images[0] = (*images[0][:3], None)  # a normal image needs no sizes
    expected = aupro_by_hand(images)
    pool = pooled(*images)
    assert 0.15 < pool.result()["aupro"] == pytest.approx(expected, abs=1e-6)
    negated = [(m, -s, r, sizes) for m, s, r, sizes in images]
    assert pool.negated().result()["aupro"] == pytest.approx(aupro_by_hand(negated), abs=1e-6)
    for limit in (0, images[0][2].sum(), 10**9):  # counted in bins from the start, from the second image on, never
        monkeypatch.setattr(metrics, "EXACT", limit)
        binned = pooled(*images)
        got = binned.result()
        assert (binned.counts is None) == (limit == 10**9)
        assert abs(got["aupro"] - expected) <= got.get("aupro_error", 0) + 1e-6
        assert got.get("aupro_error", 0) < 2e-3 or levels
        assert abs(binned.negated().result()["aupro"] - aupro_by_hand(negated)) <= got.get("aupro_error", 0) + 1e-3


def test_aupro_of_maps_whose_value_is_known():
    mask = np.zeros((10, 10), bool)
    mask[0, 0], mask[5:9, 5:9] = True, True  # 83 negatives
    sizes = lesion_sizes(mask)
    assert sorted(np.unique(sizes)) == [0, 1, 16] and pooled((mask, mask * 1.0, None, sizes)).result()["aupro"] == 1
    assert pooled((mask, np.ones(mask.shape), None, sizes)).result()["aupro"] == pytest.approx(0.15)  # says nothing
    large = mask * 1.0
    large[0, 0] = -1  # the small lesion is never found: it counts as much as the large one
    assert pooled((mask, large, None, sizes)).result()["aupro"] == pytest.approx(0.5)
    assert pooled((mask, large, None, sizes), (mask, large)).result()["aupro"] is None
    assert math.isnan(pooled((~(mask | ~mask), large)).result()["aupro"])


def test_aupro_of_hostile_scores_is_within_its_bound(monkeypatch):
    for name, y, s in hostile_cases():
        sizes = 1 + np.arange(y.size) % 7  # any weights
        monkeypatch.setattr(metrics, "EXACT", 1 << 27)
        exact = pooled((y, s, None, sizes)).result()["aupro"]
        monkeypatch.setattr(metrics, "EXACT", 0)
        got = pooled((y, s, None, sizes)).result()
        assert abs(got["aupro"] - exact) <= got["aupro_error"] + 1e-6, name


def test_the_true_figures_are_within_the_bounds_of_the_bins(monkeypatch):
    for name, y, s in hostile_cases():
        monkeypatch.setattr(metrics, "EXACT", 1 << 27)
        exact = pooled((y, s)).result()
        monkeypatch.setattr(metrics, "EXACT", 0)
        got = pooled((y, s)).result()
        assert abs(got["auroc"] - sk.roc_auc_score(y, s)) <= got["auroc_error"] + 1e-12, name
        assert abs(got["ap"] - sk.average_precision_score(y, s)) <= got["ap_error"] + 1e-12, name
        assert got["dice_best"] <= exact["dice_best"] + 1e-12, name
        assert got["prevalence"] == exact["prevalence"] and got["froc"] is None


def test_bounds_are_reached_by_the_worst_order_and_nought_where_bins_hold_one_class(monkeypatch):
    monkeypatch.setattr(metrics, "EXACT", 0)
    cases = {(name, round(y.mean(), 1)): (y, s) for name, y, s in hostile_cases()}
    for name in ("one bin, positives first", "one bin, positives last"):
        got, (y, s) = pooled(cases[name, 0.5]).result(), cases[name, 0.5]
        assert abs(got["auroc"] - sk.roc_auc_score(y, s)) == pytest.approx(got["auroc_error"]) == 0.5
        assert got["auroc"] == 0.5 and got["ap"] == pytest.approx(y.mean())
    y, s = cases["one bin, positives first", 0.5]
    got = pooled((y, s)).result()
    assert 1 - got["ap"] == pytest.approx(got["ap_error"])
    y, s = cases["one bin, positives last", 0.9]  # here the lowest AP is farther off than the highest
    got = pooled((y, s)).result()
    assert got["ap"] - sk.average_precision_score(y, s) == pytest.approx(got["ap_error"], rel=1e-5)
    got = pooled(cases["two clusters at an edge", 0.5]).result()
    assert (got["auroc"], got["auroc_error"], got["ap"], got["ap_error"]) == (1, 0, 1, 0)


def test_bounds_of_spread_scores_are_small(monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.random(1 << 16) < 0.05
    s = rng.normal(size=y.size).astype(np.float32) + y
    monkeypatch.setattr(metrics, "EXACT", 0)
    got = pooled((y, s)).result()
    assert 0 < got["auroc_error"] < 2e-4 and 0 < got["ap_error"] < 2e-3


def test_bins_follow_the_order_of_scores_and_are_narrow():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 16, np.uint32)
    scores = np.sort(bits.view(np.float32)[np.isfinite(bits.view(np.float32))])
    bins = metrics.score_bins(scores).astype(int)
    assert (np.diff(bins) >= 0).all() and 0 <= bins[0] and bins[-1] < metrics.BINS
    usual = scores[(np.abs(scores) > 2.0**-126) & (np.abs(scores) < 2.0**127)]
    assert (metrics.score_bins(usual) != metrics.score_bins(usual * np.float32(1 + 2**-11))).all()
    assert np.ptp(metrics.score_bins(np.array([-0.0, 0.0], np.float32))) == 0
    assert np.ptp(metrics.score_bins(np.array([1e39, 1e300]))) == 0  # both are inf in float32: above all others


def test_a_pool_that_outgrows_the_limit_is_as_if_binned_from_the_start(monkeypatch):
    rng = np.random.default_rng(0)
    images = [(rng.random((9, 8)) < p, rng.normal(size=(9, 8)), rng.random((9, 8)) < 0.7) for p in (0, 0.2, 0.5, 1)]
    monkeypatch.setattr(metrics, "CHUNK", 7)
    inside = [int(region.sum()) for _, _, region in images]
    counts, results = [], []
    for limit in (0, inside[0], inside[0] + inside[1], sum(inside) - 1):
        monkeypatch.setattr(metrics, "EXACT", limit)
        pool = pooled(*images)
        counts.append(pool.counts), results.append(pool.result())
        assert counts[-1].sum() == sum(inside) and all(not parts for parts in pool.parts)
    assert all((c == counts[0]).all() for c in counts) and all(r == results[0] for r in results)
    monkeypatch.setattr(metrics, "EXACT", sum(inside))
    assert pooled(*images).counts is None


def test_a_result_can_be_read_while_images_come(monkeypatch):
    rng = np.random.default_rng(0)
    images = [(rng.random(50) < 0.3, rng.normal(size=50)) for _ in range(4)]
    for limit in (1 << 27, 0, 120):
        monkeypatch.setattr(metrics, "EXACT", limit)
        pool = metrics.Pooled()
        for i, image in enumerate(images):
            pool.add(*image)
            assert pool.result() == pooled(*images[: i + 1]).result()


def test_a_binned_pool_of_one_class_is_nan(monkeypatch):
    monkeypatch.setattr(metrics, "EXACT", 0)
    for label in (False, True):
        got = pooled((np.full(3, label), np.ones(3))).result()
        assert all(math.isnan(got[k]) for k in ("auroc", "ap", "dice_best", "iou", "aupro", "auroc_error", "ap_error"))
        assert got["prevalence"] == label


def test_a_pool_refuses_an_image_whole_and_goes_on():
    good = np.array([True, False]), np.array([1.0, 0.0])
    pool = pooled(good)
    with pytest.raises(InputError, match="1 of 2 scores are not finite"):
        pool.add(good[0], np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"image 1: .*\(2,\), \(3,\)"):
        pool.add(good[0], np.zeros(3))
    pool.add(good[0], np.array([1.0, np.nan]), np.array([True, False]))  # not finite outside the region only
    assert pool.result()["auroc"] == 1 and pool.result()["prevalence"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("limit", [1 << 27, 0])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
def test_a_case_of_100_million_voxels_takes_less_than_4_gib(share, limit, monkeypatch):
    """The caller's mask (bool), map (float32) and region (bool) included; bytes a voxel, from a smaller case."""
    monkeypatch.setattr(metrics, "EXACT", limit)
    n, rng = 1 << 22, np.random.default_rng(0)
    tracemalloc.start()
    mask, scores, region = rng.random(n, np.float32) < share, rng.random(n, np.float32), np.ones(n, bool)
    tracemalloc.reset_peak()
    pool = pooled((mask, scores, region))
    pool.result()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n * 1e8 < 4 << 30, f"{peak / n:.1f} bytes a voxel"


def test_the_edge_of_a_bin_is_its_lowest_score():
    scores = np.random.default_rng(0).normal(size=500) * np.logspace(-30, 30, 500)
    scores = np.append(scores, [0.0, -0.0]).astype(np.float32)
    edges = metrics.bin_edges(metrics.score_bins(scores))
    assert (edges <= scores).all() and (metrics.score_bins(edges) == metrics.score_bins(scores)).all()
    assert (metrics.score_bins(np.nextafter(edges, np.float32(-np.inf))) < metrics.score_bins(scores)).all()


def test_the_percentile_of_a_pool_is_that_of_its_negatives(monkeypatch):
    rng = np.random.default_rng(1)
    images = [(rng.random(72) < 0.4, rng.normal(size=72).astype(np.float32), rng.random(72) < 0.8) for _ in range(5)]
    values = np.concatenate([scores[~mask & region] for mask, scores, region in images])
    assert pooled(*images).percentile(95) == pytest.approx(np.percentile(values, 95))
    monkeypatch.setattr(metrics, "EXACT", 0)
    below = np.percentile(values, 95, method="lower")
    got = pooled(*images).percentile(95)
    assert got <= below and metrics.score_bins(np.array(got)) == metrics.score_bins(below)
    assert math.isnan(metrics.Pooled().percentile(95))


def test_the_mean_over_patients_leaves_out_those_without_a_lesion_and_counts_them():
    rows = [{"auroc": a, "ap": p, "prevalence": 0.5} for a, p in ((1.0, 1.0), (0.0, 0.5), (math.nan, math.nan))]
    assert metrics.patient_mean(rows) == {"auroc": 0.5, "ap": 0.75, "prevalence": 0.5, "n": 2, "skipped": 1}
    assert metrics.patient_mean([dict.fromkeys(rows[0])])["skipped"] == 1  # None, as JSON has it
    assert all(math.isnan(end) for end in metrics.patient_mean([dict.fromkeys(rows[0])], draws=9)["ap_ci"])


def test_the_interval_of_a_mean_over_patients_is_that_of_its_bootstrap():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(40, 3))
    rows = [dict(zip(("auroc", "ap", "prevalence"), row, strict=True)) for row in values]
    found = metrics.patient_mean(rows, draws=4000)
    for k, name in enumerate(("auroc", "ap", "prevalence")):
        error = values[:, k].std() / 40**0.5  # of the mean of 40; the bootstrap's own, without its correction
        low, high = found[f"{name}_ci"]
        assert found[name] == pytest.approx(values[:, k].mean())
        assert (low, high) == pytest.approx((found[name] - 1.96 * error, found[name] + 1.96 * error), abs=0.15 * error)
    twice = metrics.patient_mean([{**row, "auroc": row["ap"]} for row in rows], draws=4000)
    assert twice["auroc_ci"] == twice["ap_ci"] == found["ap_ci"]  # the same patients are drawn for every map


@pytest.mark.parametrize("limit", [1 << 27, 0])
def test_negated_scores_are_those_of_the_negated_maps(monkeypatch, limit):
    monkeypatch.setattr(metrics, "EXACT", limit)
    rng = np.random.default_rng(0)
    mask, scores = rng.random(500) < 0.2, np.round(rng.normal(size=500), 1).astype(np.float32)
    found, expected = (pooled((mask, s)) for s in (scores, -scores))
    assert found.negated().result() == pytest.approx(expected.result(), nan_ok=True)
    assert found.negated().result()["auroc"] == pytest.approx(1 - found.result()["auroc"])


def test_what_goes_to_json_is_strict_json():
    value = {"a": np.float32(0.5), "b": (math.nan, math.inf, np.int64(3)), 4: np.array([1.0, np.nan]), "t": np.True_}
    text = json.dumps(metrics.json_ready(value), allow_nan=False)
    assert json.loads(text) == {"a": 0.5, "b": [None, None, 3], "4": [1.0, None], "t": True}
