"""From error maps to anomaly maps and scores, on the device."""

from collections.abc import Collection, Mapping, Sequence
from math import ceil, floor
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage

from jmae.errors import InputError
from jmae.tables import counted


def minimum_filter(image: Float[Array, "b *size c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """The smallest value in a box of `size` voxels around each voxel: `scipy.ndimage.minimum_filter`, mirrored border.

    A box of an even edge has its extra voxel below: 2 covers {s - 1, s}. A mirrored border only repeats voxels of the
    box. So voxels outside the image are taken as infinite here, with the same result. A caller can mark missing voxels
    as infinite too.
    """
    for axis, edge in enumerate(size, 1):
        low, high, n = edge // 2, edge - 1 - edge // 2, image.shape[axis]
        widths = [(0, 0)] * image.ndim
        widths[axis] = (low, high)
        padded = jnp.pad(image, widths, constant_values=np.inf)
        at = [slice(None)] * image.ndim
        out = image
        for start in range(edge):
            if start != low:
                at[axis] = slice(start, start + n)
                out = jnp.minimum(out, padded[tuple(at)])
        image = out
    return image


def top_mean(values: np.ndarray, region: np.ndarray | None, share: float) -> float:
    """The mean of the highest values of a map inside a region (None: everywhere).

    It takes the share `share` of the values, but at least one.
    """
    values = values.ravel() if region is None else values[region]
    k = max(1, round(share * values.size))
    return float(np.partition(values, -k)[-k:].mean(dtype=np.float64))


def case_score(rule: str, values: np.ndarray, region: np.ndarray | None, *, share: float, above: float) -> float:
    """A case's score from its map inside a region (None: everywhere).

    Args:
        rule: "mean" of the values; "top", the mean of the highest (`top_mean`); or "part", the number of voxels of the
            largest connected part whose values lie above `above`. Voxels of a part share a side.
        share: of the values that "top" averages.
    """
    if rule == "part":
        labels, _ = ndimage.label((values > above) if region is None else (values > above) & region)
        return float(np.bincount(labels.ravel())[1:].max(initial=0))
    return top_mean(values, region, 1.0 if rule == "mean" else share)


def case_score_words(rule: str, *, share: float, above: float = 0.0) -> str:
    """How `case_score` makes a case's score from its map, in words."""
    if rule == "part":
        return f"number of voxels of the largest connected part of the map above {above:g}"
    return "mean of the map" if rule == "mean" else f"mean of the highest {100 * share:.3g} % of the map's values"


def auroc(scores: Float[Array, " n"], labels: Int[Array, " n"] | Bool[Array, " n"]) -> Float[Array, ""]:
    """`metrics.auroc` on the device: the probability that a positive (label 1) has a higher score than a negative (0).

    Ties count half, and other labels do not count. nan where a class is missing or a score is not finite. Pairs are
    counted exactly in 32 bits, so 2^16 or more scores raise InputError.
    """
    if len(scores) >= 2**16:
        raise InputError(f"AUROC of {len(scores)} scores on the device: use fewer than {2**16} images")
    negative, positive = labels == 0, labels == 1
    below, m = jnp.sort(jnp.where(negative, scores, jnp.inf)), jnp.sum(negative)
    halves = sum(jnp.searchsorted(below, scores, side) for side in ("left", "right"))
    value = jnp.sum(jnp.where(positive, halves, 0)) / (2.0 * m * jnp.sum(positive))
    return jnp.where(jnp.isfinite(scores).all(where=negative | positive), value, jnp.nan)


# --- what a score means -----------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """The scores of held-out normals, which give p-values, and the colour scale on which their maps look calm.

    The conformal p-value of a case with score s is (1 + #{scores >= s}) / (n + 1) for n held-out normals.

    Guarantee: P(p <= a) <= a for every a in [0, 1], for a normal case that is exchangeable with the held-out normals.
    This means the same population, scanner and preparation; no held-out normal was used for training or for any choice.
    The probability is over the draw of the n normals and of the case. Without ties it is exactly
    floor(a (n + 1)) / (n + 1). The rate of one set of n normals differs: it has the distribution Beta(k, n + 1 - k)
    with k = floor(a (n + 1)). There is no guarantee for cases of another kind.

    V. Vovk, A. Gammerman, G. Shafer, "Algorithmic learning in a random world", 2005; S. Bates, E. Candes, L. Lei, Y.
    Romano, M. Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 2023, arXiv 2104.08279.
    """

    scores: Mapping[str, float]  # score of each held-out normal, by its id
    low: float | None = None  # value of the map that is shown in black; None without maps
    high: float | None = None  # value of the map that is shown in pale yellow
    needs: tuple[str, ...] = ()  # columns of the manifest that the scores depend on, so that a new case needs them too
    peaks: Sequence[float] = ()  # of the map of each held-out normal (`outlines.peak`); empty without maps
    least: float = 0.0  # smallest component that counts in a peak, mm2, mm3 or pixels
    fitted: Collection[str] = ()  # ids of further held-out normals, which the score was fitted to
    inputs: str = ""  # `calibration.digest_of_normals`; "" in files of earlier versions

    def p_value(self, score: float, case: str = "") -> float | None:
        """The p-value of a case; None for the held-out normals themselves."""
        if case in self.scores or case in self.fitted:
            return None
        return float(p_values(list(self.scores.values()), [score])[0])


def p_values(normals: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> Float[np.ndarray, " n"]:
    """The conformal p-value of each score, (1 + #{normals >= score}) / (number of normals + 1); see `Calibration`."""
    ordered = np.sort(np.asarray(normals, np.float64))
    return (1 + len(ordered) - np.searchsorted(ordered, np.asarray(scores, np.float64))) / (len(ordered) + 1)


def alarm_threshold(normals: Sequence[float], rate: float) -> float | None:
    """The score above which a case has a p-value of at most `rate`; None where the normals are too few for that."""
    k = floor(round(rate * (len(normals) + 1), 9))  # 0.29 * 100 is 28.999... in floats
    return float(np.sort(np.asarray(normals, np.float64))[-k]) if 0 < k <= len(normals) else None


RATE = 0.05  # p-value that held-out normals should reach
LEARN = 20  # normal scans to learn from; fewer get a warning
NO_NORMALS = "no normal scan is kept from the training to give p-values"
TIE = 1e-4  # relative: peaks of maps that differ by less tie


def saturated(peaks: Sequence[float], rate: float) -> bool:
    """Whether the highest peaks of normal maps tie, so many that the mask threshold at `rate` is one of them.

    The map then has reached its ceiling, and hardly any map can lie above the threshold.
    """
    least = max(2, floor(round(rate * (len(peaks) + 1), 9)))
    if len(peaks) < max(least, normals_needed(rate)):
        return False
    ordered = np.sort(np.asarray(peaks, np.float64))
    top = ordered[-1]
    return bool(top > np.finfo(np.float32).min and ordered[-least] >= top - TIE * abs(top))


def normals_needed(rate: float) -> int:
    """The fewest held-out normals that give a p-value as low as `rate`, and masks at that rate."""
    return ceil(1 / rate) - 1


def more_normals(rate: float = RATE) -> str:
    """The remedy for too few held-out normals. Of fewer than ten scans, `data.calibration` keeps none apart."""
    scans = f"{max(10, 2 * normals_needed(rate))} normal scans or more"
    return f"give {scans}, and keep half of them from the training (data.calibration=0.5)"


def few_to_learn(n: int) -> tuple[str, ...]:
    """(what, why, remedy) where fewer than `LEARN` normal scans are there to learn from, else ()."""
    if not 0 < n < LEARN:
        return ()
    why = "so few hardly show how much normal scans differ, and a new normal one may score high"
    return f"only {counted(n, 'normal scans')} to learn from", why, f"give {LEARN} or more"


def smallest_p_value(n: int) -> str:
    """The smallest p-value that n held-out normals can give, in words."""
    return f"smallest possible p-value {1 / (n + 1):.2g}"


def too_few_normals(n: int, rate: float) -> str:
    """Why n held-out normals give no p-value as low as `rate`, and the remedy; "" where they are enough."""
    if floor(round(rate * (n + 1), 9)) > 0:  # as in `alarm_threshold`
        return ""
    kept = f"{counted(n, 'normal scans')} kept from the training"
    what = f"{kept} cannot give a p-value of {rate:g} ({smallest_p_value(n)})" if n else NO_NORMALS
    return f"{what}: {more_normals(rate)}"


def colour_ends(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """(low, high) of the colour scale of maps, on which the map of a normal looks calm.

    `lows` has a middle percentile of each normal's map, `highs` a percentile near its top. `low` is the median of
    `lows`. `high` is the value that 19 of 20 `highs` do not exceed.
    """
    low, high = float(np.median(lows)), float(np.quantile(highs, 0.95, method="higher"))
    return low, high if high > low else low + 1
