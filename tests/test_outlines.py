"""Masks at a promised rate of false alarms, and their figures."""

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import area_opening

from jmae import outlines
from jmae.p_values import alarm_threshold


def smooth(seed: int, shape: tuple[int, ...], sigma: float = 1.5) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma).astype(np.float32)


@pytest.mark.parametrize("shape", [(30, 26), (14, 12, 10)])
@pytest.mark.parametrize("least", [1, 2, 7, 40])
def test_a_peak_is_the_maximum_of_the_area_opening(shape, least):
    values = smooth(0, shape)
    assert outlines.peak(values, least) == area_opening(values, least, connectivity=len(shape)).max()


def test_a_peak_counts_inside_the_region_alone():
    values = np.arange(25.0).reshape(5, 5)
    region = np.zeros((5, 5), bool)
    region[:2] = True
    assert outlines.peak(values, 1, region) == 9 and outlines.peak(values, 3, region) == 7
    assert outlines.peak(values, 11, region) == -math.inf


@pytest.mark.parametrize("least", [1, 6])
@pytest.mark.long_but_first
def test_of_normal_cases_at_most_the_promised_share_has_a_mask(least):
    """Over many sets of normals: 200 draws of 19 normals and 20 further cases each."""
    rate, alarms = 0.1, []
    for draw in range(200):
        maps = [smooth(1000 * draw + i, (12, 12), 1.0) for i in range(39)]
        threshold = alarm_threshold([outlines.peak(m, least) for m in maps[:19]], rate)
        alarms += [outlines.outline(m, threshold, least).any() for m in maps[19:]]
    assert np.mean(alarms) == pytest.approx(0.1, abs=0.025)  # 4,000 cases, 200 sets: deviation about 0.006


def test_small_components_and_what_lies_outside_are_left_out():
    values = np.zeros((6, 8))
    values[1, 1], values[4, 4:8], values[0, 5:8] = 3, 2, 2
    region = np.ones((6, 8), bool)
    region[0] = False
    mask = outlines.outline(values, 1, 3, region)
    assert mask[4, 4:8].all() and mask.sum() == 4
    assert not outlines.outline(values, 2, 1)[4].any()  # strictly above


def test_sizes_are_in_millimetres_where_the_spacing_is_known():
    assert outlines.least_voxels(0, (0.5, 0.5)) == 1
    assert outlines.least_voxels(4, (0.5, 0.5)) == 16
    assert outlines.least_voxels(4, None) == 4
    assert outlines.least_voxels(10, (1, 1, 3)) == 4


def test_figures_of_masks_are_those_by_hand():
    figures = outlines.MaskFigures(0.5, 2)
    lesion, mask = np.zeros((6, 9), bool), np.zeros((6, 9), bool)
    lesion[0:2, 0:2] = lesion[4, 4] = True
    mask[1:3, 0:2] = mask[5, 7:9] = True  # finds one of two lesions, one component is false
    mask[0, 8] = True  # one voxel is too small
    nothing, values = np.zeros((6, 9), bool), mask.astype(float)
    part = np.broadcast_to(np.arange(9) < 5, (6, 9))  # its second component lies outside
    figures.add(figures.mask_of(values), lesion)
    figures.add(figures.mask_of(nothing * 1.0), nothing)
    figures.add(figures.mask_of(values, part), nothing, part)
    assert figures.counts() == {"n": 2, "of": 3, "threshold": 0.5}
    expected = {
        "dice": 2 * 2 / (6 + 5),
        "dice_of_everything": 2 * 5 / (54 + 5),
        "lesion_recall": 0.5,
        "false_components": 2 / 3,
        "false_alarms": 0.5,
    }
    found = figures.result()
    assert found.pop("sizes") == []  # of two lesions
    assert found == pytest.approx(expected | {"images": 3, "lesions": 2, "threshold": 0.5, "least": 2})
    figures = outlines.MaskFigures(None, 0)
    assert figures.mask_of(values) is None and figures.result() is None and figures.counts() is None


def test_lesions_of_each_size_are_found_apart():
    """Rows of 1 to 6 pixels; those of 2, 5 and 6 are found."""
    figures = outlines.MaskFigures(0.5, 1)
    for n in range(1, 7):
        lesion = np.zeros((3, 20), bool)
        lesion[1, :n] = lesion[1, 10 : 10 + n] = True
        figures.add(lesion & (n in (2, 5, 6)), lesion, None, 0.5)  # two pixels of the scored grid each
    expected = [("small", 4.0, 4, 0.5), ("medium", 8.0, 4, 0.0), ("large", 12.0, 4, 1.0)]
    keys = ("size", "most", "lesions", "recall")
    assert figures.result()["sizes"] == [dict(zip(keys, one, strict=True)) for one in expected]
