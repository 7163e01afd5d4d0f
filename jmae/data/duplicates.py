"""Copies of an image under another name.

A copy may have another size, be saved as JPEG, be shifted by a few percent or be cut by up to 20 %. It may also be
mirrored, turned by 90 or a few degrees, or inverted.

Films of one view look alike, so hashes of their coarse brightness take strangers for copies. Here the fingerprint of an
image is its detail, brought to even strength everywhere. Two images are copies if their details correlate after the
best shift. In volumes the edge of a body in air may be most of the detail: two volumes that share this edge to the
voxel are reported too.
"""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
SHIFT = 0.07  # of the side, tried on every axis
# (zoom, degrees) in which one of two images is tried: a cut image is the middle of the other. Each is tried in the
# eight ways to turn and mirror it. Shifts and stretches cover the poses between.
POSES = ((1.0, 0), (1.055, 0), (1.11, 0), (1.18, 0), (1.25, 0), (1.0, 3), (1.0, -3))
STRETCH = (0.98, 1.0, 1.02)  # of either axis, tried on near copies: a cropped image fills the fingerprint
# Least correlations of copies, by the number of axes. `CANDIDATE` is that of spectra, whose pairs are then shifted;
# `ALIKE` is that of details at the best shift. Measured on three public packs (pairs of one patient in brackets):
#   1,616 chest films of children     strangers up to 0.73 (0.71), copies from 0.92
#   629 chest films of adults         strangers up to 0.78 (0.88), copies from 0.92
#   1,510 endoscopic frames           strangers up to 0.75, copies from 0.91, but 8 % of those shifted into black
# Copies: resized, of another aspect ratio, JPEG of quality 40, darker, shifted or cut by 2 %, and several of these.
CANDIDATE = {2: 0.45, 3: 0.75}
POSED = 0.6  # of images in another pose: of the same packs, strangers reach 0.55, copies have 0.8 and more
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
        first, second = (f"{row.id} in {row.listed} ({row.image[0]})" for row in (a, b))
        what = f"{first} and {second} {alike}: keep both in one split, or delete the row of one"
        if a.listed == b.listed:
            remedy = "delete the row of one, or give both one patient"
            what = f"{first} and {second} {alike}, and data.calibration holds out one: {remedy}"
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
        for posed, a, b in candidates(details, group[index]):
            alike = registered(posed, details[b]).tolist()
            for i, j, value in zip(index[a].tolist(), index[b].tolist(), alike, strict=True):
                pair = min(i, j), max(i, j)
                if value >= ALIKE[rank] and found.get(pair, 0.0) < min(value, 0.999):
                    found[pair] = min(value, 0.999)
    return [Copy(i, j, value) for (i, j), value in sorted(found.items())]


def candidates(details: np.ndarray, group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs (a, b) from different groups whose spectra are alike: (details of a in a pose, numbers a, numbers b)."""
    parts, rank = range(0, len(details), BLOCK), details.ndim - 1
    known = np.concatenate([spectra(details[start : start + BLOCK]) for start in parts])
    for start, pose in itertools.product(parts, POSES if rank == 2 else POSES[:1]):
        plain = pose == POSES[0]
        block = details[start : start + BLOCK]
        block = block if plain else np.stack([stretched(detail, 1 / pose[0], pose[1]) for detail in block])
        apart = group[start : start + BLOCK, None] != group
        of_block = known[start : start + BLOCK] if plain else spectra(block)
        for turn, order in enumerate(_orders() if rank == 2 else (np.arange(known.shape[1]),)):
            first = plain and turn == 0
            alike = of_block[:, order] @ known.T >= (CANDIDATE[rank] if first else POSED)
            a, b = np.nonzero(alike & apart)
            if first:
                a, b = a[a + start < b], b[a + start < b]
            for some in range(0, len(a), BLOCK):
                part = slice(some, some + BLOCK)
                yield TURNS[turn](block[a[part]]), a[part] + start, b[part]


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


def registered(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, " m"]:
    """The size of the correlation of details (m, *side), pair by pair, at the best of all shifts up to `SHIFT`. Images
    are also stretched, and turned by 180 degrees, which spectra do not tell."""
    if first.ndim != 3:
        return shifted(first, second)
    turned = first[:, ::-1, ::-1]
    best, other = shifted(first, second), shifted(turned, second)
    first, best = np.where((other > best)[:, None, None], turned, first), np.maximum(best, other)
    near = np.flatnonzero((best >= NEARLY) & (best < ALIKE[2]))
    for i, scale in itertools.product(near, itertools.product(STRETCH, repeat=2)):
        best[i] = max(best[i], shifted(stretched(first[i], scale)[None], second[[i]])[0])
    return best


def shifted(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, " m"]:
    """The size of the correlation of details (m, *side), pair by pair, at the best of all shifts up to `SHIFT`.
    Inverted images correlate negatively."""
    axes, side = tuple(range(1, first.ndim)), first.shape[1:]
    reach = math.ceil(SHIFT * side[0])
    of = lambda part: fft.rfftn(part.astype(np.float32), axes=axes)
    moved = fft.irfftn(of(first) * of(second).conj(), side, axes)
    for axis in axes:
        moved = moved.take(np.r_[-reach : reach + 1], axis)
    return np.abs(moved).max(axes)


def stretched(detail: np.ndarray, scale: float | tuple[float, ...], degrees: float = 0) -> np.ndarray:
    """A detail of an image, stretched and turned about its middle, and brought to length 1 again."""
    angle, middle = np.deg2rad(degrees), (np.array(detail.shape) - 1) / 2
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * np.reshape(scale, (-1, 1))
    order = 1 if degrees or np.ndim(scale) == 0 else 3
    out = affine_transform(detail.astype(np.float32), matrix, middle - matrix @ middle, order=order)
    out = out * _taper(2) if order == 1 else out
    return (out / max(float(np.linalg.norm(out)), 1e-6)).astype(np.float32)


# Ways to turn and mirror details (m, rows, columns), but for half turns.
TURNS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: x,
    lambda x: x[:, :, ::-1],
    lambda x: x.swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2)[:, :, ::-1],
)


@lru_cache
def _orders() -> tuple[np.ndarray, ...]:
    """The order of the numbers of `spectra` after each of `TURNS`."""
    side, kept = SIDE[2], _ring(2) >= 0
    number = np.full(kept.shape, -1)
    number[kept] = np.arange(kept.sum())
    y, x = np.nonzero(kept)
    y = np.where(y > side // 2, y - side, y)  # signed frequencies; (y, x) and (-y, -x) are equal
    at = lambda y, x: number[np.where(x < 0, -y, y) % side, np.abs(x)]
    return tuple(np.asarray(order) for order in (at(y, x), at(-y, x), at(x, y), at(-x, y)))


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
