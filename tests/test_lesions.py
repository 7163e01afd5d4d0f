"""Figures of lesions against the rule written as loops."""

import json
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure

from jmae import metrics
from jmae.errors import InputError
from jmae.lesions import Froc, Localisation

BOX = [((10, 20), (10, 20))]


def blobs(size=(48, 48), **squares):
    """A map of zeros with squares of five pixels a side, name=(score, row, column of its middle)."""
    scores = np.zeros(size, np.float32)
    for score, y, x in squares.values():
        scores[y - 2 : y + 3, x - 2 : x + 3] = score
    return scores


def frocs(*images, **settings):
    found = Froc(**settings)
    for image in images:
        found.add(*image)
    return found


@pytest.mark.parametrize("as_mask", [False, True])
def test_froc_of_the_specifications_two_images(as_mask):
    mask, none = np.zeros((48, 48), bool), np.zeros((48, 48), bool)
    mask[10:20, 10:20] = True
    lesions, nothing = (mask, none) if as_mask else (BOX, [])
    second = nothing, blobs(c=(0.7, 30, 30))
    got = frocs((lesions, blobs(a=(0.9, 15, 15), b=(0.8, 35, 35))), second).result()
    assert got["curve"][:4] == [[0, 0], [0, 1], [0.5, 1], [1, 1]]  # above all, at 0.9, 0.8 and 0.7
    assert (got["sensitivity"], got["at"], got["lesions"], got["images"]) == (1, 10, 1, 2)
    got = frocs((lesions, blobs(a=(0.6, 15, 15), b=(0.8, 35, 35))), second).result()
    assert got["curve"][:4] == [[0, 0], [0.5, 0], [1, 0], [1, 1]]
    assert got["sensitivity"] == 1  # the last reachable
    assert json.loads(json.dumps(metrics.json_ready(got), allow_nan=False)) == got


def froc_by_force(images, at=10.0, thresholds=200, least=5, overlap=None):
    """The rule component by component: images are (lesions: [(box, its mask)], scores, region)."""
    values = np.sort(np.concatenate([s[r] for _, s, r in images]))
    n = min(values.size, thresholds)
    grid = {values[int(k)] for k in np.linspace(0, values.size - 1, n)}
    grid |= {values[int(values.size - k)] for k in np.geomspace(1, values.size, n)}  # from the highest down
    total, curve = sum(len(lesions) for lesions, _, _ in images), [(0.0, 0.0)]
    for t in sorted(grid, reverse=True):
        hits = false = 0
        for lesions, scores, region in images:
            found = set()
            for part in measure.regionprops(measure.label((scores >= t) & region, connectivity=scores.ndim)):
                if part.area < least:
                    continue
                own = np.zeros(scores.shape, bool)
                own[tuple(part.coords.T)] = True
                mine = set()
                for i, (box, mask) in enumerate(lesions):
                    central = all(a <= c + 0.5 <= b for c, (a, b) in zip(part.centroid, box, strict=True))
                    inner = mask & region
                    if central or (overlap is not None and (own & inner).sum() >= overlap * (own | inner).sum()):
                        mine.add(i)
                found |= mine
                false += not mine
            hits += len(found)
        curve.append((false / len(images), hits / total))
        if curve[-1][0] > at:
            xs, ys = np.array(curve[-2:]).T
            return max(*(y for _, y in curve[:-1]), np.interp(at, xs, ys)), curve
    return max(y for _, y in curve), curve


def random_lesions(size, rng, as_mask):
    """What `add` takes, and [(box, mask)]."""
    boxes = [[(int(a), int(a) + int(rng.integers(1, 7))) for a in rng.integers(0, np.array(size) - 7)] for _ in "ab"]
    masks = [np.zeros(size, bool) for _ in boxes]
    for mask, box in zip(masks, boxes, strict=True):
        mask[tuple(slice(*ends) for ends in box)] = True
    if not as_mask:
        return boxes, list(zip(boxes, masks, strict=True))
    mask = (masks[0] | masks[1]) & (rng.random(size) < 0.8)
    labels = measure.label(mask, connectivity=len(size))
    ends = lambda bbox: list(zip(bbox[: len(size)], bbox[len(size) :], strict=True))
    return mask, [(ends(part.bbox), labels == part.label) for part in measure.regionprops(labels)]


@pytest.mark.parametrize("size", [(30, 24), (12, 11, 10)])
@pytest.mark.parametrize("as_mask", [False, True])
@pytest.mark.parametrize("settings", [{"at": 0.7, "thresholds": 37, "least": 1}, {"overlap": 0.1, "at": 2.0}, {}])
@pytest.mark.long_but_first
def test_froc_is_the_rule_component_by_component(size, as_mask, settings, monkeypatch):
    for seed in range(2):
        monkeypatch.setattr("jmae.lesions.STACK", (1, 3)[seed] * np.prod(size))  # images of a stack
        rng = np.random.default_rng(seed)
        fed, plain = [], []
        for i in range(4):
            scores = ndimage.gaussian_filter(rng.normal(size=size), 0.8).astype(np.float32)
            region = rng.random(size) < 0.97 if i % 2 else np.ones(size, bool)
            given, lesions = random_lesions(size, rng, as_mask) if i else ([], [])
            lesions = [(box, mask) for box, mask in lesions if (mask & region).any()]
            for _, mask in lesions:
                scores[mask] += 0.3
            fed.append((given, scores, region if i % 2 else None)), plain.append((lesions, scores, region))
        got, (value, curve) = frocs(*fed, **settings).result(), froc_by_force(plain, **settings)
        np.testing.assert_allclose(got["curve"], curve, atol=1e-12)
        assert got["sensitivity"] == pytest.approx(value) and got["lesions"] == sum(len(each[0]) for each in plain)


def test_froc_is_interpolated_where_its_false_positives_first_exceed_the_limit():
    second = ((10, 20), (30, 47))
    middles = [(y, x) for y in range(3, 48, 7) for x in range(3, 48, 7)]  # of squares that do not touch
    low = {f"low{i}": (0.5, y, x) for i, (y, x) in enumerate(middles)}
    four = {f"high{i}": (0.7, y, x) for i, (y, x) in enumerate(middles[:4])}
    got = frocs(([*BOX, second], blobs(**low, **four, hit=(0.9, 17, 17)))).result()
    outside = sum(not (10 <= y < 20 and (10 <= x < 20 or 30 <= x < 47)) for y, x in middles)
    assert got["curve"] == [[0, 0], [0, 0.5], [4, 0.5], [outside, 1]]
    assert got["sensitivity"] == pytest.approx(0.5 + 0.5 * (10 - 4) / (outside - 4))


def test_the_best_sensitivity_before_the_limit_counts_where_merged_components_lose_their_lesion():
    scores = blobs(a=(0.9, 15, 15))
    scores[13:18, 13:45] = np.maximum(scores[13:18, 13:45], 0.5)  # grows away from the lesion
    got = frocs((BOX, scores)).result()
    assert got["curve"][:3] == [[0, 0], [0, 1], [1, 0]] and got["sensitivity"] == 1


def test_a_curve_goes_on_where_its_false_positives_are_just_the_limit():
    """29 false positives of 100 images are 0.29 an image, though 0.29 * 100 is a little less than 29."""
    one = lambda score: np.pad([[np.float32(score)]], 2)
    images = [([[(2, 3), (2, 3)]], one(0.7)), *[([], one(0.8))] * 29, *[([], one(0))] * 70]
    got = frocs(*images, at=0.29, least=1).result()
    assert got["curve"][:3] == [[0, 0], [0.29, 0], [0.29, 1]] and got["sensitivity"] == 1


def test_froc_takes_only_what_lies_in_the_region():
    mask = np.zeros((48, 48), bool)
    mask[10:20, 10:20] = mask[30:40, 30:40] = True
    region = np.ones((48, 48), bool)
    region[25:], region[0, 0] = False, False
    scores = blobs(a=(0.9, 15, 15), b=(0.95, 35, 35))
    scores[0, 0] = np.nan
    for lesions in (mask, [*BOX, ((30, 40), (30, 40))]):
        got = frocs((lesions, scores, region)).result()
        assert got["lesions"] == 1 and got["curve"][:2] == [[0, 0], [0, 1]]


def test_froc_drops_small_components_and_lesions_touch_over_corners():
    scores, mask = np.zeros((20, 20), np.float32), np.zeros((20, 20), bool)
    scores[np.arange(5), np.arange(5)] = 1  # five pixels in a diagonal: one component
    scores[10, 10:14] = 1  # four: dropped
    mask[np.arange(5), np.arange(5)] = True
    got = frocs((mask, scores)).result()
    assert got["lesions"] == 1 and got["curve"][1] == [0, 1]
    assert frocs((mask, scores), least=4).result()["curve"][1] == [1, 1]
    assert frocs((mask, scores), least=6).result()["curve"][1] == [0, 0]


def test_a_component_beside_a_box_hits_by_its_overlap_only():
    scores = blobs(a=(0.9, 15, 23))  # rows 13 to 17, columns 21 to 25
    scores[13:18, 16:21] = 0.9  # its centroid is column 20.5, half a pixel beyond the box's border
    assert frocs((BOX, scores)).result()["curve"][1] == [1, 0]
    for overlap, point in ((20 / 130, [0, 1]), (20 / 129, [1, 0])):  # 5 x 4 shared of 100 + 50 - 20
        assert frocs((BOX, scores), overlap=overlap).result()["curve"][1] == point


def test_froc_boxes_are_rounded_as_the_loaders_are_and_keep_a_pixel():
    from jmae.data.volumes import boxes_mask

    for box in ((9.6, 3.4, 14.5, 8.2), (5.0, 5.0, 5.2, 5.1), (40.0, 45.0, 60.0, 60.0)):
        x0, y0, x1, y1 = box
        mask = boxes_mask([box], (48, 48))
        kept = [frocs((lesions, np.zeros((48, 48)))).maps[0] for lesions in (mask, [((y0, y1), (x0, x1))])]
        np.testing.assert_array_equal(kept[0].boxes, kept[1].boxes)


def test_froc_without_lesions_is_none_and_can_be_read_while_images_come():
    found = Froc()
    assert found.result() is None
    found.add([], blobs(a=(0.9, 15, 15)))
    assert found.result() is None
    for i in range(2):
        found.add(BOX, blobs(a=(0.9 - i / 10, 15, 15)))
        assert (
            found.result()
            == frocs(
                ([], blobs(a=(0.9, 15, 15))), *((BOX, blobs(a=(0.9 - k / 10, 15, 15))) for k in range(i + 1))
            ).result()
        )


def test_froc_beyond_the_limit_is_nan_never_a_part(monkeypatch):
    monkeypatch.setattr("jmae.lesions.FROC_EXACT", 48 * 48)
    found = frocs((BOX, blobs(a=(0.9, 15, 15))))
    assert found.result()["sensitivity"] == 1
    for images in (2, 3):
        found.add([], blobs())
        got = found.result()
        assert math.isnan(got.pop("sensitivity")) and not found.maps
        assert math.isnan(got.pop("mean"))
        assert got == {"at": 10, "lesions": 1, "images": images, "points": [], "curve": []}


def test_froc_refuses_an_image_whole_and_goes_on():
    found = frocs((BOX, blobs(a=(0.9, 15, 15))))
    before = found.result()
    with pytest.raises(InputError, match="1 of 4 scores are not finite"):
        found.add([], np.array([[0, 1], [np.nan, 2]]))
    with pytest.raises(ValueError, match="mask is"):
        found.add(np.zeros((3, 3), bool), blobs())
    with pytest.raises(ValueError, match="region is"):
        found.add([], blobs(), np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="give a pair"):
        found.add(np.zeros((48, 48), np.uint8), blobs())
    assert found.result() == before


def masked_maps(n, seed, *, decimals=None, size=(9, 8)):
    """n images (mask, map, region or None): lesions of all sizes, scores of both signs, with ties where rounded."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        mask = rng.random(size) < rng.uniform(0.05, 0.9)
        mask[0, 0] = True
        scores = (rng.normal(size=size) + 2 * mask).astype(np.float32)
        region = rng.random(size) < 0.8 if i % 2 else None
        if region is not None:
            region[0, 0] = True
            scores[~region] = np.nan  # must not matter
        yield mask, scores if decimals is None else scores.round(decimals), region


def localised(images):
    found = Localisation()
    for image in images:
        found.add(*image)
    return found


def ious_by_force(images, t):
    inner = [(m[r], s[r]) for m, s, r in ((m, s, np.ones(m.shape, bool) if r is None else r) for m, s, r in images)]
    return np.array([(m & (s >= t)).sum() / (m | (s >= t)).sum() for m, s in inner])


@pytest.mark.parametrize("decimals", [None, 0, 1])
def test_localisation_is_the_loop_over_all_thresholds(decimals):
    for seed in range(4):
        images = list(masked_maps(7, seed, decimals=decimals))
        every = np.unique(np.concatenate([s[np.isfinite(s)] for _, s, _ in images]))
        means = [ious_by_force(images, t).mean() for t in every]
        got = localised(images).result(0.3)
        assert got["oracle"] == pytest.approx(max(means), abs=1e-12)
        assert ious_by_force(images, got["oracle_threshold"]).mean() == pytest.approx(max(means), abs=1e-12)
        assert got["normals"] == pytest.approx(ious_by_force(images, 0.3).mean()) and got["normals_threshold"] == 0.3
        np.testing.assert_allclose(localised(images).at(0.3), ious_by_force(images, 0.3))
        assert got["exact"] and not got["overlap"] and (got["n"], got["size"], got["groups"]) == (7, 7, 1)
        assert math.isnan(got["oracle_deviation"])  # the one group is all of them


def test_localisation_of_groups_is_reproducible_disjoint_where_it_can_be_and_flagged_where_not():
    images = list(masked_maps(12, 0))
    found = localised(images)
    all_of_them = ious_by_force(images, 0.5)
    got = found.result(0.5, groups=3, size=4)
    assert got == found.result(0.5, groups=3, size=4) == localised(images).result(0.5, groups=3, size=4)
    assert got["normals_groups"] != found.result(0.5, groups=3, size=4, seed=1)["normals_groups"]
    assert not got["overlap"] and got["normals"] == pytest.approx(all_of_them.mean())  # three disjoint groups are all
    assert got["normals_deviation"] == pytest.approx(np.std(got["normals_groups"], ddof=1))
    some = found.result(0.5, groups=2, size=4)
    assert not some["overlap"] and some["n"] == 12  # the best threshold of 8 images need not be that of 12
    assert some["oracle"] >= found.at(got["oracle_threshold"])[np.random.default_rng(0).permutation(12)[:8]].mean()
    more = found.result(0.5, groups=4, size=4)
    assert more["overlap"] and more["size"] == 4 and len(more["oracle_groups"]) == 4
    one = found.result(0.5, groups=1, size=12)
    assert not one["overlap"] and math.isnan(one["normals_deviation"])


def test_localisation_without_a_prediction_a_threshold_or_a_lesion():
    mask, scores = np.array([[True, False]]), np.array([[1.0, 2.0]], np.float32)
    got = localised([(mask, scores)]).result(2.5)
    assert (got["normals"], got["oracle"], got["oracle_threshold"]) == (0, 0.5, 1)  # nothing is called at 2.5
    for threshold in (None, math.nan):
        none = localised([(mask, scores)]).result(threshold)
        assert [none[f"normals{part}"] for part in ("", "_deviation", "_groups", "_threshold")] == [None] * 4
    assert none["oracle"] == 0.5 and json.loads(json.dumps(metrics.json_ready(none), allow_nan=False))
    found = localised([(~mask & False, scores), (mask, scores, ~mask)])  # no lesion; none inside the region
    assert found.result(1.0) is None


def test_localisation_beyond_the_limit_is_exact_at_the_edges_of_bins_and_says_so(monkeypatch):
    images = list(masked_maps(6, 3))
    whole = localised(images)
    for limit in (0, 150):  # from the first image on, and from the third
        monkeypatch.setattr("jmae.lesions.IOU_EXACT", limit)
        thin = localised(images)
        got, exact = thin.result(0.3), whole.result(0.3)
        assert not got["exact"] and exact["exact"]
        for name in ("oracle", "normals"):
            t = got[f"{name}_threshold"]
            assert got[name] == pytest.approx(ious_by_force(images, t).mean(), abs=1e-12)
        assert 0.3 * (1 - 2**-10) <= got["normals_threshold"] <= 0.3
        assert exact["oracle"] - 0.02 <= got["oracle"] <= exact["oracle"] + 1e-12


def test_localisation_refuses_an_image_whole_and_goes_on():
    found = localised(masked_maps(3, 0))
    before = found.result(0.1)
    with pytest.raises(InputError, match="1 of 4 scores are not finite"):
        found.add(np.eye(2, dtype=bool), np.array([[0, 1], [np.nan, 2]]))
    with pytest.raises(ValueError, match="resample them to one grid"):
        found.add(np.eye(2, dtype=bool), np.zeros((3, 2)))
    assert found.result(0.1) == before
