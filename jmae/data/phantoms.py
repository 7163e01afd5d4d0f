"""Built-in phantoms, drawn on the fly: chest radiographs (`chest`) and two-channel breast MRI (`breast`).

They let every command run without data. Each image is a function of (name, split, index) alone: their SHA-256 is the
key of a Philox generator. Only `Generator.random` is used, since NumPy promises no stable stream for normal variates.
Images are quantised as an 8-bit or 12-bit acquisition, so that the last bit of a float, which differs between
platforms, cannot change them. They are frozen: a test pins their digest.

What varies in healthy images (exposure, film curve, contrast, pose, habitus, rib contrast, noise; coil
sensitivity, glandular density) is larger than what a lesion changes in any global statistic. A lesion stands
out only against the anatomy around it. Lesions come from a process of their own, never from one of
`jmae.anomalies`, which would make detecting them circular.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from jmae.data.manifest import Row
from jmae.errors import InputError

Field = NDArray[np.floating]


class Phantom(NamedTuple):
    """One drawn case."""

    image: NDArray[np.float32]  # (*size, channels), whole numbers: 0..255 (chest), 0..4095 (breast)
    mask: NDArray[np.bool_]  # (*size), what the lesion visibly changed
    region: NDArray[np.bool_]  # (*size), where metrics count: lung fields, breast tissue
    spacing: tuple[float, ...]  # mm
    label: int  # 0 normal, 1 abnormal


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _noise(rng: Generator, size: tuple[int, ...], sigma: float | tuple[float, ...]) -> Field:
    """Gaussian-filtered white noise of mean 0 and variance 1; `sigma` in voxels."""
    field = gaussian_filter(rng.random(size) - 0.5, sigma, mode="wrap", truncate=3.0)
    field -= field.mean()
    return field / field.std()


def _step(distance: Field, softness: float) -> Field:
    """Smooth inside (1) to outside (0) of a signed distance."""
    return 0.5 + 0.5 * np.tanh(distance / softness)


# --- chest: 128 x 128, one channel, 8 bit, 2.8 mm ---------------------------------------------------------------

CHEST_SIZE = (128, 128)
CHEST_SPACING_MM = (2.8, 2.8)
CHEST_VISIBLE = 6.0  # grey levels of 255


def chest(rng: Generator, label: int) -> Phantom:
    """Draws a frontal radiograph: attenuations add up along the beam, then a film curve makes them grey.

    Pose: rotation U(-7, 7) degrees, scale U(0.94, 1.12) a side, shift U(-0.07, 0.07) of half the image.
    Soft tissue is lumpy outside the lungs, by a log-uniform 0.015 to 0.17; grain is log-uniform, 0.8 to 4 grey levels.
    Findings: 30 % enlarged heart (by U(1.4, 1.7); half of them with an opacity), 20 % nodules, 50 % a diffuse opacity.
    """
    between = lambda low, high: _between(rng, low, high)
    rows, cols = np.meshgrid(*(np.linspace(-1, 1, n) for n in CHEST_SIZE), indexing="ij")

    # Pose of the patient and a smooth warp: (x, y) are the anatomy's coordinates, x > 0 the patient's left.
    turn = np.deg2rad(between(-7, 7))
    u, v = cols - between(-0.07, 0.07), rows - between(-0.07, 0.07)
    x = (np.cos(turn) * u + np.sin(turn) * v) / between(0.94, 1.12)
    y = (np.cos(turn) * v - np.sin(turn) * u) / between(0.94, 1.12)
    x = x + 0.015 * _noise(rng, CHEST_SIZE, 20)
    y = y + 0.015 * _noise(rng, CHEST_SIZE, 20)
    side = np.tanh(x / 0.05)  # -1 right, +1 left
    ax = np.abs(x)

    # Trunk, neck and shoulders; outside is air.
    width = between(0.92, 1.08)
    shoulder = -0.78 + between(0.4, 0.6) * np.maximum(ax - 0.24, 0) - 4 * np.maximum(0.24 - ax, 0)
    body = _step(np.minimum(width - ax, y - shoulder), 0.03)

    # Lung fields: inside the rib cage, lateral to the mediastinum, above the diaphragm.
    cage, base, apex = between(0.68, 0.78), between(0.42, 0.60), between(-0.78, -0.68)
    lift = np.clip((base - y) / (base - apex), 0, 1)
    wall = cage * np.sqrt(np.maximum(1 - lift**2.6, 0)) - ax
    medial = ax - 0.13 - 0.06 * np.maximum(y, 0)
    dome = base - between(0.10, 0.24) * (1 - ((ax - 0.36) / 0.42) ** 2) - between(0.0, 0.07) * (side < 0)
    lung = _step(wall, 0.03) * _step(medial, 0.03) * _step(dome - y, 0.02)

    # Heart and great vessels.
    hx, hy = between(0.08, 0.14), between(0.16, 0.26)
    ra, rb, tilt = between(0.27, 0.33), between(0.24, 0.29), between(0.3, 0.7)
    p, q = x - hx, y - hy
    along, across = np.cos(tilt) * p + np.sin(tilt) * q, np.cos(tilt) * q - np.sin(tilt) * p
    heart_radius = np.sqrt((along / ra) ** 2 + (across / rb) ** 2)
    knob = _step(between(0.08, 0.12) - np.hypot(x - 0.12, y + between(0.18, 0.26)), 0.03)
    hilum = np.exp(-(((ax - 0.2) / 0.09) ** 2) - ((y - 0.02) / 0.16) ** 2)
    spine = np.exp(-((x / 0.09) ** 4)) * (1 + 0.15 * np.cos(2 * np.pi * y / between(0.13, 0.16)))

    # Bones: posterior ribs fall gently outwards, anterior ones steeply; clavicles.
    inside = _step(wall + 0.05, 0.03) * body
    gap, phase = between(0.17, 0.21), between(0, 1)
    posterior = np.exp(5 * (np.cos(2 * np.pi * ((y - 0.5 * (ax - 0.3) ** 2 + 0.18 * ax) / gap + phase)) - 1))
    anterior = np.exp(6 * (np.cos(2 * np.pi * ((y - 0.75 * ax) / (1.15 * gap) + phase)) - 1)) * _step(ax - 0.3, 0.1)
    drop = between(-0.64, -0.54)
    clavicle = np.exp(-(((y - drop + between(0.1, 0.3) * (ax - 0.15)) / 0.03) ** 2)) * _step(ax - 0.1, 0.03) * body
    ribs = inside * (posterior + 0.5 * anterior) * (0.35 + 0.65 * _step(ax - 0.1, 0.04) * _step(dome - y, 0.05))
    bone = between(0.03, 0.09) * ribs + between(0.08, 0.2) * clavicle

    lumps = np.exp(between(np.log(0.015), np.log(0.17))) * _noise(rng, CHEST_SIZE, 6) * (1 - 0.85 * lung)
    tissue = 1 + between(-0.1, 0.1) * x + lumps
    abdomen = 0.12 * _step(y - dome, 0.03)
    lung_depth, hilar, cardiac = between(0.58, 0.70), between(0.06, 0.14), between(0.10, 0.20)

    def attenuation(enlarged: float) -> tuple[Field, Field]:
        heart = _step(enlarged - heart_radius, 0.07) * _step(dome + 0.06 - y, 0.04)
        air = lung * (1 - 0.8 * np.maximum(heart, 0.7 * knob))
        depth = tissue + abdomen - lung_depth * air + hilar * hilum * air + cardiac * np.maximum(heart, spine)
        return np.maximum(body * depth + bone, 0), air

    healthy, field = attenuation(1.0)
    ill, air = healthy, field
    extra: Field = np.zeros(CHEST_SIZE)
    finding = rng.random() if label else np.nan
    if finding < 0.3:
        ill, air = attenuation(between(1.4, 1.7))
    if 0.3 <= finding < 0.5:
        extra = _nodules(rng, x, y, air)
    elif finding < 0.15 or finding >= 0.5:
        extra = _opacity(rng, x, y, air)

    # Film: exposure, contrast, curve and noise are the acquisition's.
    low, high, curve = between(10, 45), between(170, 240), between(0.75, 1.35)
    film = lambda depth: low + (high - low) * (np.clip(depth, 0, 1.6) / 1.5) ** curve
    grain = np.exp(between(np.log(0.8), np.log(4.0))) * (
        _noise(rng, CHEST_SIZE, 0.5) + 0.6 * _noise(rng, CHEST_SIZE, 1.2)
    )
    grey = film(ill + extra)
    mask = np.abs(grey - film(healthy)) > CHEST_VISIBLE
    image = np.clip(np.rint(grey + grain), 0, 255).astype(np.float32)
    return Phantom(image[..., None], mask, field > 0.5, CHEST_SPACING_MM, label)


def _seat(rng: Generator, field: Field) -> tuple[int, ...]:
    """A voxel drawn with probability proportional to `field` >= 0."""
    cumulative = np.cumsum(field)
    seat = np.searchsorted(cumulative, rng.random() * cumulative[-1])
    return tuple(int(i) for i in np.unravel_index(seat, field.shape))


def _nodules(rng: Generator, x: Field, y: Field, air: Field) -> Field:
    """One to four soft-edged, lobulated nodules with a speckled texture; radius U(0.1, 0.17)."""
    extra = np.zeros_like(x)
    speckle = _noise(rng, x.shape, 1.2)
    for _ in range(1 + int(4 * rng.random())):
        seat = _seat(rng, (air > 0.7) * 1.0)
        p, q = x - x[seat], y - y[seat]
        angle = np.arctan2(q, p)
        lobes = 1 + 0.15 * np.cos(3 * angle + _between(rng, 0, 6.28)) + 0.1 * np.cos(5 * angle + _between(rng, 0, 6.28))
        core = _step(_between(rng, 0.1, 0.17) * lobes - np.hypot(p, q), 0.03)
        extra += core * _between(rng, 0.28, 0.5) * (1 + 0.15 * speckle)
    return extra * (0.3 + 0.7 * air)


def _opacity(rng: Generator, x: Field, y: Field, air: Field) -> Field:
    """A fluffy consolidation over part of one lung, patchy at the scale of acini."""
    seat = _seat(rng, (air > 0.7) * 1.0)
    p, q = x - x[seat], y - y[seat]
    radius = np.hypot(p / _between(rng, 0.32, 0.55), q / _between(rng, 0.34, 0.7))
    extent = _step(1 - radius + 0.25 * _noise(rng, x.shape, 5), 0.3)
    patches = _noise(rng, x.shape, 4)
    return air * extent * _between(rng, 0.26, 0.5) * np.maximum(1 + 0.3 * patches, 0)


# --- breast: 48 x 80 x 24 (P, L, S), two channels (without and with fat saturation), 12 bit, 3 mm -----------------

BREAST_SIZE = (48, 80, 24)
BREAST_SPACING_MM = (3.0, 3.0, 3.0)
BREAST_VISIBLE = 220.0  # of 4095, in either channel


def breast(rng: Generator, label: int) -> Phantom:
    """Draws both breasts of a patient: P grows backwards, L to the patient's left, S upwards.

    Channel 0, not fat-saturated: fat bright, gland and muscle darker. Channel 1, fat-saturated: fat dark where
    the saturation works, gland brighter. A mass is dark in the first and adds signal in the second. Coil
    sensitivity (log-normal, sigma 0.4, smooth over 8 voxels) and failed fat saturation (up to U(1.5, 3.5) of
    the normal fat signal) vary more than a mass does, but smoothly: neighbours tell what linear statistics over
    patients do not.
    """
    between = lambda low, high: _between(rng, low, high)
    p, lr, s = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in BREAST_SIZE), indexing="ij")  # voxels
    p, lr, s = p + 1.2 * _noise(rng, BREAST_SIZE, 6), lr - between(-2, 2), s - between(-2, 2)

    # Two half-ellipsoids before a curved chest wall; `sag` is 0 in the middle of a base and 1 at the skin.
    wall = between(2, 11) + 0.006 * lr**2
    reach, breadth, height = between(19, 28), between(12.5, 17), between(9, 13)
    cleft = between(16.5, 20.5)
    right, left = (
        np.sqrt(((p - wall) / (reach * between(0.93, 1.07))) ** 2 + ((lr - centre) / breadth) ** 2 + (s / height) ** 2)
        for centre in (-cleft, cleft)
    )
    sag = np.minimum(right, left)
    behind = _step(p - wall, 1.0)
    chest = behind * _step(39 - np.abs(lr) - 0.02 * (p - wall) ** 2, 1.0)
    breasts = _step(1 - sag, 0.05) * (1 - behind)
    body = np.maximum(breasts, chest)
    skin = breasts * np.exp(-(((sag - 0.97) / 0.05) ** 2))
    heart = _step(between(8, 11) - np.sqrt((p - wall - 12) ** 2 + (lr - 6) ** 2 + (1.2 * s) ** 2), 1.0) * chest
    muscle = np.maximum(chest * np.exp(-(((p - wall - 2) / 2.2) ** 2)), heart)

    # Glandular strands: the level lines of smooth noise, densest in the middle of the breast.
    density = between(0.1, 0.9)
    strands = np.exp(-((_noise(rng, BREAST_SIZE, 1.6) / between(0.3, 0.5)) ** 2))
    patchy = _step(_noise(rng, BREAST_SIZE, 4) + 2.2 * (density - sag), 0.8)
    parenchyma = breasts * _step(0.9 - sag, 0.05)
    gland = parenchyma * strands * patchy
    mass = _mass(rng, p, lr, s, parenchyma) if label else np.zeros(BREAST_SIZE)

    # Signal, coil sensitivity, noise.
    speckle, tissue = 1 + 0.2 * mass * _noise(rng, BREAST_SIZE, 1.0), 1 + 0.02 * _noise(rng, BREAST_SIZE, 2)
    fat, decay = between(0.75, 1.0), between(0.3, 0.7)
    plain = fat * (1 - between(0.2, 0.4) * gland - 0.45 * muscle) - 0.3 * skin
    failure = between(1.5, 3.5) * _step(_noise(rng, BREAST_SIZE, 8) - between(0, 1), 0.8)
    saturated = between(0.12, 0.22) + failure + 0.3 * gland + 0.3 * muscle + 0.15 * skin
    bright, dark = between(0.6, 1.0), between(0.05, 0.2)
    coils = np.stack(
        [
            between(500, 900)
            * np.exp(between(-0.15, 0.15) * lr / 40 - decay * (p + 24) / 48 + 0.4 * _noise(rng, BREAST_SIZE, 8))
            for _ in range(2)
        ],
        -1,
    )
    scan = lambda mass: (
        coils
        * (body * tissue * speckle)[..., None]
        * np.stack([(1 - mass) * plain + mass * dark, saturated + mass * bright], -1)
    )
    signal = scan(mass)
    mask = np.any(np.abs(signal - scan(np.zeros(BREAST_SIZE))) > BREAST_VISIBLE, -1)
    noise = between(4, 12) * np.stack([_noise(rng, BREAST_SIZE, 0.5) for _ in range(2)], -1)
    image = np.clip(np.rint(np.abs(signal + noise)), 0, 4095).astype(np.float32)
    return Phantom(image, mask, (sag < 0.9) & (p < wall - 1), BREAST_SPACING_MM, label)


def _mass(rng: Generator, p: Field, lr: Field, s: Field, parenchyma: Field) -> Field:
    """One spiculated mass: a core of radius U(2.6, 4.2) voxels (8 to 13 mm), twelve spikes of drawn direction and
    length."""
    seat = _seat(rng, (parenchyma > 0.95) * 1.0)
    ray = np.stack([p - p[seat], lr - lr[seat], s - s[seat]], -1)
    distance = np.sqrt((ray**2).sum(-1)) + 1e-6
    radius, spikes = _between(rng, 2.6, 4.2), np.zeros(BREAST_SIZE)
    for _ in range(12):
        z, turn = _between(rng, -1, 1), _between(rng, 0, 2 * np.pi)
        axis = np.array([z, np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn)])
        cosine = (ray * axis).sum(-1) / distance
        spikes = np.maximum(spikes, _between(rng, 0.3, 0.9) * np.exp(12 * (cosine - 1)))
    return _step(radius * (1 + 0.7 * spikes) - distance, 0.25) * parenchyma * _between(rng, 0.9, 1.0)


# --- the frozen sets -------------------------------------------------------------------------------------------------


class _Set(NamedTuple):
    sample: Callable[[Generator, int], Phantom]
    edition: int  # of the seed, so that cheap baselines lie in 0.5 to 0.8 (of 24 cases an AUROC scatters by 0.12)
    splits: dict[str, tuple[int, int]]  # normal, abnormal
    extra: dict[str, str]


_SETS = {
    "chest": _Set(chest, 0, {"train": (256, 0), "unlabeled": (103, 153), "val": (40, 40), "test": (100, 100)}, {}),
    "breast": _Set(breast, 25, {"train": (48, 0), "test": (12, 12)}, {"midline": str(BREAST_SIZE[1] // 2)}),
}


def _set(name: str) -> _Set:
    if name not in _SETS:
        raise InputError(f"phantom {name!r} is unknown: choose one of {', '.join(_SETS)}")
    return _SETS[name]


def generator(*parts: object) -> Generator:
    """The generator whose key is the SHA-256 of its parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return Generator(Philox(key=int.from_bytes(digest[:16], "little")))


def _labels(name: str, split: str) -> list[int]:
    """Normals, then abnormals; in `unlabeled` shuffled, so that the order tells nothing."""
    splits = _set(name).splits
    if split not in splits:
        raise InputError(f"phantom {name!r} has no split {split!r}: it has {', '.join(splits)}")
    normal, abnormal = splits[split]
    labels = [0] * normal + [1] * abnormal
    if split == "unlabeled":
        labels = [labels[i] for i in np.argsort(generator(name, split, "order").random(len(labels)), kind="stable")]
    return labels


def _id(name: str, split: str, index: int) -> str:
    return f"{name}-{split}-{index:03d}"


def draw(name: str, split: str, index: int) -> Phantom:
    """Draws case `index` of a split; the same on every platform."""
    labels = _labels(name, split)
    if not 0 <= index < len(labels):
        raise InputError(f"phantom {name}/{split} has cases 0 to {len(labels) - 1}, not {index}")
    sample, edition, _, _ = _set(name)
    return sample(generator(name, edition, split, index), labels[index])


def rows(name: str) -> list[Row]:
    """The phantom's manifest. Labels of `unlabeled` are hidden (None); every case is a patient of its own."""
    return [
        Row(
            id=_id(name, split, index),
            patient=_id(name, split, index),
            split=split,
            label=None if split == "unlabeled" else label,
            image=(f"phantom:{name}/{split}/{index}",),
            mask=f"phantom:{name}/{split}/{index}" if split != "unlabeled" and label else None,
            region=f"phantom:{name}/{split}/{index}",
            boxes=(),
            extra=_set(name).extra,
        )
        for split in _set(name).splits
        for index, label in enumerate(_labels(name, split))
    ]


def unlabeled_labels(name: str) -> dict[str, int]:
    """The hidden labels of `unlabeled` by id: for analysis and the anomaly-ratio sweep, never for training."""
    labels = _labels(name, "unlabeled") if "unlabeled" in _set(name).splits else []
    return {_id(name, "unlabeled", i): label for i, label in enumerate(labels)}
