"""Figures of a split by hand: of pixels, and by the size of the lesions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from test_metrics import aupro_by_hand, lesioned

from jmae import metrics
from jmae.console import region_words, size_words
from jmae.data.manifest import Row
from jmae.figures import PixelFigures, Truth, size_figures


def case(name: str, label: int) -> Row:
    return Row(name, "", "test", label, (name,))


def test_each_third_of_the_lesions_stands_beside_all_normals():
    rng = np.random.default_rng(0)
    areas = {f"a{i}": float(area) for i, area in enumerate(rng.permutation([1, 2, 2, 3, 10, 11, 12, 50, 60, 70]))}
    rows = [case(f"n{i}", 0) for i in range(8)] + [case(name, 1) for name in areas] + [case("no mask", 1)]
    scores = rng.normal(size=(2, len(rows)))
    found = size_figures(scores, rows, areas, draws=100)
    assert [(one["size"], one["least"], one["most"], one["n_abnormal"]) for one in found] == [
        ("small", 1, 3, 4), ("medium", 10, 12, 3), ("large", 50, 70, 3),
    ]  # fmt: skip
    for one in found:
        used = [row.label == 0 or one["least"] <= areas.get(row.id, -1) <= one["most"] for row in rows]
        labels = [row.label for row, use in zip(rows, used, strict=True) if use]
        assert one["auroc"] == pytest.approx(np.mean([roc_auc_score(labels, s[used]) for s in scores]))
        assert one["ap"] == pytest.approx(np.mean([average_precision_score(labels, s[used]) for s in scores]))
        assert one["auroc_ci"][0] <= one["auroc"] <= one["auroc_ci"][1] and one["n_normal"] == 8


def test_sizes_need_normals_and_three_lesions_and_equal_lesions_are_one_size():
    rows, scores = [case("a", 0), case("b", 1), case("c", 1), case("d", 1)], np.arange(4.0)[None]
    assert size_figures(scores, rows, {"b": 1.0, "c": 1.0}, draws=10) is None
    assert size_figures(scores[:, 1:], rows[1:], {"b": 1.0, "c": 1.0, "d": 1.0}, draws=10) is None
    (one,) = size_figures(scores, rows, {"b": 2.0, "c": 2.0, "d": 2.0}, draws=10)
    assert (one["size"], one["least"], one["most"], one["n_abnormal"]) == ("small", 2, 2, 3)


def test_the_figures_of_a_patient_are_means_over_replicates():
    rng, rows = np.random.default_rng(0), [case("a", 1), case("b", 1)]
    figures, expected = PixelFigures(rows), []
    for row in rows:
        lesion = rng.random((9, 8)) < 0.3
        maps = [rng.normal(size=(9, 8)) + sign * 2 * lesion for sign in (1, -1, -1)]  # two of three are inverted
        figures.add(row, Truth(lesion, None, 1.0), {"map": maps, "brightness": maps[:1]})
        figures.close(row)
        expected.append([roc_auc_score(lesion.ravel(), m.ravel()) for m in maps])
    found = figures.per_patient("map", ["map"])
    np.testing.assert_allclose([one["auroc"] for one in found], np.mean(expected, 1))
    lows = [one["baselines"]["low brightness"]["auroc"] for one in found]
    np.testing.assert_allclose(lows, [1 - first for first, *_ in expected])


@pytest.mark.parametrize("shape", [(17, 13), (9, 8, 6)])
def test_pixels_have_aupro_and_lesions_their_size_on_the_scored_grid(shape):
    rng = np.random.default_rng(0)
    images = [lesioned(rng, shape, lesions) for lesions in (0, 2, 4)]
    rows = [case("normal", 0), case("b", 1), case("c", 1)]
    figures = PixelFigures(rows)
    for row, (mask, scores, region, _) in zip(rows, images, strict=True):
        figures.add(row, Truth(mask, region, 4.0), {"ours": [scores, -scores], "brightness": [scores]})
        figures.close(row)
    expected, turned = aupro_by_hand(images), aupro_by_hand([(m, -s, r, one) for m, s, r, one in images])
    assert figures.result("ours")["aupro"] == pytest.approx((expected + turned) / 2, abs=1e-6)
    assert figures.result("brightness")["aupro"] == pytest.approx(expected, abs=1e-6)
    assert figures.result("low brightness")["aupro"] == pytest.approx(turned, abs=1e-6)
    labels, values = (np.concatenate([one[i][one[2]] for one in images]) for i in (0, 1))
    assert figures.result("brightness")["dice_best"] == metrics.best_dice(labels, values)[0]
    assert figures.areas == {
        row.id: (m & r).sum() / 4 for row, (m, _, r, _) in zip(rows, images, strict=True) if m.any()
    }


def test_the_console_marks_the_best_dice_and_names_the_sizes():
    assert region_words({"aupro": 0.25, "dice_best": 0.5}) == "  AUPRO@0.3 0.250  best Dice (upper bound) 0.500"
    assert region_words({"aupro": None, "dice_best": 0.5}) == "  best Dice (upper bound) 0.500"
    sizes = [{"size": "small", "most": 12.4, "auroc": 0.5}, {"size": "large", "most": 99.0, "auroc": 0.75}]
    expected = "small (up to 12 pixels as scored) 0.500, large (up to 99 pixels as scored) 0.750"
    assert size_words(sizes) == f"AUROC by the size of the lesions: {expected}"
