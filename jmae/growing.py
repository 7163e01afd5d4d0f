"""Connected components of {score >= t} while the threshold t falls; NumPy, on the host.

Each pixel is added once, with its links to the neighbours that were added before or with it. So all thresholds together
take about as long as to label a few of the masks {score >= t}.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

PIECE = 1 << 17  # pixels that are added at a time


class Growing:
    """The components of several maps. Pixels of one map are neighbours also across edges and corners.

    A component has a number. Where components meet, one of their numbers stays, and its attributes are those of all.

    Attributes:
        size: (n,) pixels of each component.
        place: (n, axes) sums of the places of these pixels.
        peak: (n,) flat index of the highest pixel, of equal ones the first.
        owned: (n, k) how many of these pixels lie in each of k lesions of the map; `own` counts them.
    """

    def __init__(self, scores: NDArray[np.float32], thresholds: NDArray[np.float32], lesions: int = 0):
        """Takes maps (images, *axes), -inf where a pixel never counts, and ascending thresholds above -inf."""
        self.shape, self.values, axes = scores.shape, scores.ravel(), scores.ndim - 1
        levels = np.searchsorted(thresholds, self.values, "right").astype(np.min_scalar_type(len(thresholds)))
        size = np.add(scores.shape, [0, *[2] * axes])  # with a border around each map
        number = np.int32 if (count := int(size.prod())) < 2**31 else np.int64  # a pixel takes half as much memory
        self.order = np.argsort(levels, kind="stable").astype(number)
        self.ends = np.cumsum([0, *np.bincount(levels, minlength=len(thresholds) + 1)])
        places = np.arange(count, dtype=number).reshape(size)
        steps = np.array(places.strides[1:]) // places.itemsize
        self.around = [int(np.dot(move, steps)) for move in product((-1, 0, 1), repeat=axes) if any(move)]
        self.at = places[(slice(None), *[slice(1, -1)] * axes)].ravel()  # of a pixel among `places`
        self.number = np.full(count, -1, np.int32)  # the component's number when the pixel was added; -1: not added yet
        self.row = np.zeros(count, np.int32)  # of a pixel among those that are being added
        self.n, self.joined = 0, np.zeros(0, np.int32)  # the number that has replaced each number, or itself
        self.size, self.place = np.zeros(0, np.int64), np.zeros((0, axes))
        self.peak, self.owned = np.zeros(0, np.int64), np.zeros((0, lesions), np.int64)

    def fall(self) -> Iterator[Iterator[NDArray[np.int64]]]:
        """For each threshold, the highest first, the pixels from it up to the threshold above it, in pieces."""
        for level in range(len(self.ends) - 2, 0, -1):
            pixels = self.order[self.ends[level] : self.ends[level + 1]]
            yield (pixels[start : start + PIECE].astype(np.int64) for start in range(0, pixels.size, PIECE))

    def add(self, pixels: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """Adds pixels. Those of higher thresholds come before; those of one threshold come in any order.

        Returns (the numbers of components that are new or have changed, the numbers that are gone).
        """
        at, n = self.at[pixels], pixels.size
        self.number[at], self.row[at] = -2, np.arange(n)
        rows, columns, further, numbers = ([np.zeros(0, np.int64)] for _ in range(4))
        for step in self.around:
            number = self.number[near := at + step]
            among, there = np.flatnonzero(number == -2), np.flatnonzero(number >= 0)
            rows, columns = [*rows, among], [*columns, self.row[near[among]]]
            further, numbers = [*further, there], [*numbers, number[there]]
        met, column = np.unique(self.root(np.concatenate(numbers)), return_inverse=True)
        row, column = np.concatenate([*rows, *further]), np.concatenate([*columns, column + n])
        links = coo_array((np.ones(row.size, bool), (row, column)), shape=(n + met.size,) * 2)
        groups, group = connected_components(links, directed=False)
        stays = np.full(groups, -1)
        stays[group[n:]] = met  # one of the numbers of each group; a group without one is new
        new = np.flatnonzero(stays < 0)
        stays[new] = np.arange(self.n, self.n + new.size)
        self._begin(stays[new])
        gone = np.flatnonzero(stays[group[n:]] != met)
        self._merge(met[gone], stays[group[n + gone]])
        own = group[:n]
        self.number[at] = stays[own]
        self.size[stays] += np.bincount(own, minlength=groups)
        for axis, place in enumerate(np.unravel_index(pixels, self.shape)[1:]):
            self.place[stays, axis] += np.bincount(own, place, groups)
        self._raise_peaks(stays[own], pixels)
        return stays, met[gone]

    def own(self, pixels: NDArray[np.int64], lesion: NDArray[np.int64]) -> None:
        """Counts pixels that were added as pixels of the given lesions of their maps."""
        np.add.at(self.owned, (self.root(self.number[self.at[pixels]]), lesion), 1)

    def root(self, numbers: NDArray) -> NDArray[np.int64]:
        """The numbers that components have now."""
        found = self.joined[numbers]
        while not np.array_equal(further := self.joined[found], found):
            found = further
        self.joined[numbers] = found
        return found.astype(np.int64)

    def _begin(self, numbers: NDArray[np.int64]) -> None:
        """Begins components without a pixel."""
        self.n += numbers.size
        for name in ("joined", "size", "place", "peak", "owned"):
            setattr(self, name, longer(getattr(self, name), self.n))
        self.joined[numbers], self.peak[numbers] = numbers, -1

    def _merge(self, gone: NDArray[np.int64], stays: NDArray[np.int64]) -> None:
        self.joined[gone] = stays
        for values in (self.size, self.place, self.owned):
            np.add.at(values, stays, values[gone])
        self._raise_peaks(stays, self.peak[gone])

    def _raise_peaks(self, numbers: NDArray[np.int64], pixels: NDArray[np.int64]) -> None:
        """Makes pixels the peaks of components where they are higher than the peaks, or as high and earlier."""
        held = np.unique(numbers)
        held = held[self.peak[held] >= 0]
        number, pixel = np.concatenate([numbers, held]), np.concatenate([pixels, self.peak[held]])
        by = np.lexsort((pixel, -self.values[pixel], number))
        first = by[np.flatnonzero(np.diff(number[by], prepend=-1))]
        self.peak[number[first]] = pixel[first]


def longer(values: NDArray, n: int) -> NDArray:
    """An array that has at least n entries; further ones are 0."""
    if n <= len(values):
        return values
    return np.concatenate([values, np.zeros((max(n, 2 * len(values)) - len(values), *values.shape[1:]), values.dtype)])
