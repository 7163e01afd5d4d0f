"""Copies of an image under another name: also of another size, saved as JPEG, or shifted by a few percent.

Films of one view look alike, and hashes of their coarse brightness call strangers copies. An image is known here by its
detail instead, of even strength all over; two are one image where their details correlate after the best shift. Of
volumes the edge of a body in air may be most of that: two that share it to the voxel, and little else, are told too.
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

SIDE = {2: 96, 3: 32}  # of a print, by the number of axes
FINE, COARSE, AROUND = 1.0, 3.0, 6.0  # pixels of a print: detail is what lies between, its strength that around it
EVEN = 0.3  # of the greatest strength: what is weaker is not brought to even strength
SHIFT = 0.05  # of the side, tried on every axis
STRETCH = (0.98, 1.0, 1.02)  # of either axis, tried on images that are nearly alike: one that is cut fills the print
# From here two images are one, by their number of axes: correlation of spectra, which decides whether a shift is looked
# for, and of details at the best shift. Measured on three public packs of images (pairs of one patient in brackets):
#   1,616 chest films of children     strangers up to 0.73 (0.71), copies from 0.92
#   629 chest films of adults         strangers up to 0.78 (0.88), copies from 0.92
#   1,510 endoscopic frames           strangers up to 0.75, copies from 0.91, but 8 % of those shifted into black
# Copies: resized, of another aspect ratio, JPEG of quality 40, darker, shifted or cut by 2 %, and several of these.
CANDIDATE = {2: 0.45, 3: 0.75}
ALIKE = {2: 0.90, 3: 0.88}
NEARLY = 0.75
BLOCK = 256  # prints or pairs at a time


class Print(NamedTuple):
    """What an image is known by."""

    digest: bytes  # of all values
    detail: Float[np.ndarray, "*side"]  # float16, mean 0, length 1; 0 where there is no detail


class Copy(NamedTuple):
    """Two of a sequence of prints, by their numbers."""

    first: int
    second: int
    correlation: float  # of their details; exactly 1 where the images are identical


def taken(array: Float[np.ndarray, "*size c"]) -> Print:
    """The print of an image or volume; values that are not finite count as the mean."""
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
    return Print(digest(array), (detail / length if length > 1e-6 else 0 * detail).astype(np.float16))


def digest(array: Float[np.ndarray, "*size c"]) -> bytes:
    """The SHA-256 of an image's shape and values: equal for copies of a file, and for what another format holds."""
    whole = hashlib.sha256(repr(array.shape).encode())
    whole.update(np.ascontiguousarray(array).data)
    return whole.digest()


def content(array: Float[np.ndarray, "*size c"]) -> str:
    """The first 16 hexadecimal digits of `digest`: `Row.content`."""
    return digest(array).hex()[:16]


def in_two_splits(rows: Sequence[Row], prints: Mapping[str, Print]) -> list[Finding]:
    """The images that are in two splits under two names, of kinds "identical" and "near-identical"; `prints` by id."""
    known = [row for row in rows if row.id in prints]
    found = []
    for copy in copies([prints[row.id] for row in known], [row.split for row in known]):
        a, b = known[copy.first], known[copy.second]
        if set(a.image) & set(b.image):
            continue  # one file: that is told of the manifest
        further = ", or share a hard edge of air and little else" if prints[a.id].detail.ndim == 3 else ""
        near = f"are one image, or two of one patient{further} (correlation {copy.correlation:.2f})"
        alike = "are identical" if copy.correlation == 1 else near
        what = f"{a.id} in {a.split} and {b.id} in {b.split} {alike}: keep both in one split, or leave one out"
        found.append(Finding("identical" if copy.correlation == 1 else "near-identical", (a, b), what))
    return found


def copies(prints: Sequence[Print], groups: Sequence[Hashable]) -> list[Copy]:
    """The pairs from different groups that are one image, in order. Spectra, which no shift changes, are compared by
    matrix products; a shift is looked for where they are alike."""
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
    """The numbers (a, b), a < b, of pairs from different groups with spectra alike."""
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
    """Roots of the magnitudes of low frequencies over the mean at their radius, less 1, as unit vectors (n, d)."""
    axes, ring = tuple(range(1, details.ndim)), _ring(details.ndim - 1)
    kept = ring >= 0
    roots = np.sqrt(np.abs(fft.rfftn(details.astype(np.float32), axes=axes))[:, kept])
    counts = np.bincount(ring[kept])
    means = (roots @ np.eye(len(counts), dtype=np.float32)[ring[kept]] / np.maximum(counts, 1))[:, ring[kept]]
    relative = roots / np.maximum(means, 1e-6) - 1
    relative[means[:, 0] < 1e-6] = 0  # without detail
    return relative / np.maximum(np.linalg.norm(relative, axis=1, keepdims=True), 1e-6)


def registered(details: np.ndarray, a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " m"]:
    """The correlation of the pairs (a, b) at the best of all shifts up to `SHIFT`, of images also of all stretches."""
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
    """A detail stretched about its middle, of length 1 again."""
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
    """1 inside, falling to 0 over the outer eighth of every axis: what a shift brings in or pushes out counts less."""
    at = np.linspace(0, 1, SIDE[rank])
    one = np.sin(np.pi / 2 * np.clip(np.minimum(at, 1 - at) * 8, 0, 1)) ** 2
    taper = one
    for _ in range(rank - 1):
        taper = taper[..., None] * one
    return taper
