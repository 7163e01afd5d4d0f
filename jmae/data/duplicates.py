"""Copies of an image under another name, also with another size, saved as JPEG, or shifted by a few percent.

Films of one view look alike, so hashes of their coarse brightness take strangers for copies. Here the fingerprint of an
image is its detail, brought to even strength everywhere. Two images are copies if their details correlate after the
best shift. In volumes the edge of a body in air may be most of the detail: two volumes that share this edge to the
voxel are reported too.
"""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import fft
from scipy.ndimage import affine_transform, gaussian_filter

from jmae.data.manifest import Finding, Row
from jmae.data.transforms import area_resize

SIDE = {2: 96, 3: 32}  # of a fingerprint, by the number of axes
FINE, COARSE, AROUND = 1.0, 3.0, 6.0  # sigmas in its pixels: detail lies between the first two; strength is local
EVEN = 0.3  # of the greatest strength: weaker detail is not amplified to even strength
SHIFT = 0.05  # of the side, tried on every axis
STRETCH = (0.98, 1.0, 1.02)  # of either axis, tried on near copies: a cropped image fills the fingerprint
# Correlations from which two images are copies, by their number of axes: of spectra, for candidates, which are then
# shifted; and of details at the best shift. Measured on three public packs (pairs of one patient in brackets):
#   1,616 chest films of children     strangers up to 0.73 (0.71), copies from 0.92
#   629 chest films of adults         strangers up to 0.78 (0.88), copies from 0.92
#   1,510 endoscopic frames           strangers up to 0.75, copies from 0.91, but 8 % of those shifted into black
# Copies: resized, of another aspect ratio, JPEG of quality 40, darker, shifted or cut by 2 %, and several of these.
CANDIDATE = {2: 0.45, 3: 0.75}
ALIKE = {2: 0.90, 3: 0.88}
NEARLY = 0.75
BLOCK = 256  # fingerprints or pairs at a time


class Fingerprint(NamedTuple):
    """What tells an image from others."""

    digest: bytes  # of all values
    detail: Float[np.ndarray, "*side"]  # float16, mean 0, length 1; 0 where there is no detail


class Copy(NamedTuple):
    """A pair of fingerprints, by their numbers in a sequence."""

    first: int
    second: int
    correlation: float  # of their details; exactly 1 where the images are identical


def fingerprint(array: Float[np.ndarray, "*size c"]) -> Fingerprint:
    """The fingerprint of an image or volume; values that are not finite count as the mean."""
    rank = array.ndim - 1
    grey = array.mean(-1, keepdims=True)
    finite = np.isfinite(grey)
    if not finite.all():
        grey = np.where(finite, grey, grey[finite].mean() if finite.any() else 0)
    small = area_resize(grey, (SIDE[rank],) * rank)[..., 0]
    detail = gaussian_filter(small, FINE) - gaussian_filter(small, COARSE)
    strength = np.sqrt(gaussian_filter(detail**2, AROUND))
    detail = _taper(rank) * detail / (strength + EVEN * strength.max() + 1e-12)
    detail -= detail.mean()
    length = np.linalg.norm(detail)
    return Fingerprint(values_digest(array), (detail / length if length > 1e-6 else 0 * detail).astype(np.float16))


def values_digest(array: Float[np.ndarray, "*size c"]) -> bytes:
    """The SHA-256 of an image's shape and values: the same for a copy of a file, and for the same values in another
    format."""
    whole = hashlib.sha256(repr(array.shape).encode())
    whole.update(np.ascontiguousarray(array).data)
    return whole.digest()


def content(array: Float[np.ndarray, "*size c"]) -> str:
    """The first 16 hexadecimal digits of `values_digest`: `Row.content`."""
    return values_digest(array).hex()[:16]


def in_two_splits(rows: Sequence[Row], prints: Mapping[str, Fingerprint]) -> list[Finding]:
    """The images that are in two splits under two names, as findings "identical" and "near-identical"; `prints` holds
    the fingerprints by id."""
    known = [row for row in rows if row.id in prints]
    found = []
    for copy in copies([prints[row.id] for row in known], [row.split for row in known]):
        a, b = known[copy.first], known[copy.second]
        if set(a.image) & set(b.image):
            continue  # one file, which `manifest.leaks` reports
        further = ", or share a hard edge of air and little else" if prints[a.id].detail.ndim == 3 else ""
        near = f"are one image, or two of one patient{further} (correlation {copy.correlation:.2f})"
        alike = "are identical" if copy.correlation == 1 else near
        what = f"{a.id} in {a.split} and {b.id} in {b.split} {alike}: keep both in one split, or leave one out"
        found.append(Finding("identical" if copy.correlation == 1 else "near-identical", (a, b), what))
    return found


def copies(prints: Sequence[Fingerprint], groups: Sequence[Hashable]) -> list[Copy]:
    """The pairs from different groups that are copies, in order.

    Spectra, which no shift changes, are compared by matrix products. The best shift is searched where they are alike.
    """
    identical: dict[bytes, list[int]] = defaultdict(list)
    by_rank: dict[int, list[int]] = defaultdict(list)
    for i, one in enumerate(prints):
        identical[one.digest].append(i)
        by_rank[one.detail.ndim].append(i)
    same = ((i, j) for own in identical.values() for k, j in enumerate(own) for i in own[:k])
    found = {(i, j): 1.0 for i, j in same if groups[i] != groups[j]}
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    group = np.array([numbers[g] for g in groups], int)
    for rank, own in by_rank.items():
        index = np.array(own)
        details = np.stack([prints[i].detail for i in own])
        a, b = candidates(details, group[index])
        alike = registered(details, a, b).tolist()
        for i, j, value in zip(index[a].tolist(), index[b].tolist(), alike, strict=True):
            if value >= ALIKE[rank] and (i, j) not in found:
                found[i, j] = min(value, 0.999)
    return [Copy(i, j, value) for (i, j), value in sorted(found.items())]


def candidates(details: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (a, b), a < b, of pairs from different groups whose spectra are alike."""
    parts = range(0, len(details), BLOCK)
    known = np.concatenate([spectra(details[start : start + BLOCK]) for start in parts])
    pairs = []
    for start in parts:
        alike = known[start : start + BLOCK] @ known.T >= CANDIDATE[details.ndim - 1]
        alike &= group[start : start + BLOCK, None] != group
        a, b = np.nonzero(alike)
        pairs.append(np.stack([a + start, b])[:, a + start < b])
    return tuple(np.concatenate(pairs, 1))


def spectra(details: np.ndarray) -> np.ndarray:
    """Square roots of the magnitudes of low frequencies, divided by the mean at their radius, minus 1, as unit vectors
    (n, d)."""
    axes, ring = tuple(range(1, details.ndim)), _ring(details.ndim - 1)
    kept = ring >= 0
    roots = np.sqrt(np.abs(fft.rfftn(details.astype(np.float32), axes=axes))[:, kept])
    counts = np.bincount(ring[kept])
    means = (roots @ np.eye(len(counts), dtype=np.float32)[ring[kept]] / np.maximum(counts, 1))[:, ring[kept]]
    relative = roots / np.maximum(means, 1e-6) - 1
    relative[means[:, 0] < 1e-6] = 0  # without detail
    return relative / np.maximum(np.linalg.norm(relative, axis=1, keepdims=True), 1e-6)


def registered(details: np.ndarray, a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " m"]:
    """The correlation of the pairs (a, b) at the best of all shifts up to `SHIFT`; for images also of all stretches."""
    best = np.empty(len(a), np.float32)
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        best[part] = shifted(details[a[part]], details[b[part]])
    if details.ndim == 3:
        near = np.flatnonzero((best >= NEARLY) & (best < ALIKE[2]))
        for i, scale in itertools.product(near, itertools.product(STRETCH, repeat=2)):
            best[i] = max(best[i], shifted(stretched(details[a[i]], scale)[None], details[b[i]][None])[0])
    return best


def shifted(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, " m"]:
    """The correlation of details (m, *side), pair by pair, at the best of all shifts up to `SHIFT`."""
    axes, side = tuple(range(1, first.ndim)), first.shape[1:]
    reach = math.ceil(SHIFT * side[0])
    of = lambda part: fft.rfftn(part.astype(np.float32), axes=axes)
    moved = fft.irfftn(of(first) * of(second).conj(), side, axes)
    for axis in axes:
        moved = moved.take(np.r_[-reach : reach + 1], axis)
    return moved.max(axes)


def stretched(detail: np.ndarray, scale: tuple[float, ...]) -> np.ndarray:
    """A detail stretched about its middle and brought to length 1 again."""
    middle = (np.array(detail.shape) - 1) / 2
    out = affine_transform(detail.astype(np.float32), scale, middle - middle * scale, order=3)
    return out / max(float(np.linalg.norm(out)), 1e-6)


@lru_cache
def _ring(rank: int) -> np.ndarray:
    """The radius of each frequency of `fft.rfftn`, rounded; -1 of those that are too coarse or too fine."""
    side = SIDE[rank]
    axes = [np.fft.fftfreq(side)] * (rank - 1) + [np.fft.rfftfreq(side)]
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij")))
    return np.where((radius >= 1 / 24) & (radius < 1 / 4), np.round(side * radius), -1).astype(int)


@lru_cache
def _taper(rank: int) -> np.ndarray:
    """1 inside, falling to 0 over the outer eighth of every axis, so that what a shift moves in or out counts less."""
    at = np.linspace(0, 1, SIDE[rank])
    one = np.sin(np.pi / 2 * np.clip(np.minimum(at, 1 - at) * 8, 0, 1)) ** 2
    taper = one
    for _ in range(rank - 1):
        taper = taper[..., None] * one
    return taper
