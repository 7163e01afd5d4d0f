"""What a score means: p-values by held-out normals, the threshold of alarms, and how many normals they need."""

from collections.abc import Collection, Mapping, Sequence
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jmae.tables import counted


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
