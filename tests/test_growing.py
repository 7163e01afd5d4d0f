"""Components that grow while the threshold falls, against `scipy.ndimage.label` at each threshold."""

import numpy as np
import pytest
from scipy import ndimage

from jmae import growing


@pytest.mark.parametrize("size", [(3, 9, 11), (2, 5, 6, 7)])
@pytest.mark.parametrize("piece", [7, 1 << 17])
def test_components_and_their_attributes_are_those_of_a_label_at_each_threshold(size, piece, monkeypatch):
    monkeypatch.setattr(growing, "PIECE", piece)
    rng = np.random.default_rng(sum(size))
    scores = rng.integers(0, 9, size).astype(np.float32)  # many equal values
    scores[rng.random(size) < 0.1] = -np.inf
    lesion, owned = np.flatnonzero(rng.random(size) < 0.3), rng.integers(0, 2, np.prod(size))
    within = np.zeros((3,) * len(size))
    within[1] = 1
    thresholds = np.float32([2, 3, 5, 6.5, 8])
    grown = growing.Growing(scores, thresholds, lesions=2)
    came = list[np.ndarray]()
    for t, pieces in zip(thresholds[::-1], grown.fall(), strict=True):
        for pixels in pieces:
            grown.add(pixels)
            marked = pixels[np.isin(pixels, lesion)]
            grown.own(marked, owned[marked])
            came.append(pixels)
        labels, n = ndimage.label(scores >= t, within)
        there = np.concatenate(came)
        assert sorted(there) == np.flatnonzero(labels).tolist()
        numbers = grown.root(grown.number[grown.at[there]])
        pairs = set(zip(labels.ravel()[there].tolist(), numbers.tolist(), strict=True))
        assert len(pairs) == n == len(set(numbers.tolist()))  # one number for each component
        for label, number in pairs:
            part = labels == label
            pixels = np.flatnonzero(part)
            assert grown.size[number] == pixels.size
            np.testing.assert_allclose(grown.place[number], [axis.sum() for axis in np.nonzero(part)[1:]])
            assert grown.peak[number] == np.flatnonzero(part & (scores == scores[part].max()))[0]
            mine = owned[pixels[np.isin(pixels, lesion)]]
            assert grown.owned[number].tolist() == [(mine == 0).sum(), (mine == 1).sum()]


def test_changed_and_gone_numbers_are_all_that_change():
    scores = np.float32([[[9, 1, 8, 0, 7]]])
    grown = growing.Growing(scores, np.float32([1, 7, 8, 9]))
    told = [[tuple(map(np.ndarray.tolist, grown.add(pixels))) for pixels in pieces] for pieces in grown.fall()]
    assert told[:3] == [[([0], [])], [([1], [])], [([2], [])]]
    ((changed, gone),) = told[3]  # the value 1 joins 9 and 8; 7 stays alone
    assert sorted(changed + gone) == [0, 1] and len(changed) == 1
    assert grown.size[changed[0]] == 3 and grown.peak[changed[0]] == 0
