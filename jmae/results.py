"""What scoring a case gives."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jmae.data.preparation import Prepared
from jmae.report.cases import Case
from jmae.system import System


class Result(NamedTuple):
    """A case scored by r replicates. Higher is more abnormal."""

    case: Prepared
    maps: Mapping[str, np.ndarray]  # (r, *size)
    scores: Mapping[str, np.ndarray]  # (r,)
    reconstruction: np.ndarray | None = None  # (r, *size, c), normalised as the case's array
    confidence: np.ndarray | None = None  # (r, *size): spread of the primary map over the system's samples
    pictures: Mapping[str, np.ndarray] = MappingProxyType({})  # (r, *size, c) or (r, h, w)
    seconds: float = 0.0  # of scoring alone
    score_error: np.ndarray | None = None  # (r,): Monte-Carlo error of the primary score
    measured: Any = None  # what a fit measures of the case

    def own_maps(self) -> dict[str, list[np.ndarray]]:
        """All maps on the case's own grid, one of each replicate."""
        return {name: [self.case.on_own_grid(m) for m in maps] for name, maps in self.maps.items()}

    def written(self, system: System, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The files' content among `names` ("anomaly", "confidence", "recon"), as far as the system has it.

        Arrays are float32 on the case's own grid, (*size) or for "recon" (*size, c), and means over replicates. The
        reconstruction has the values of the stored image.
        """
        missing = self.case.missing

        def back(values: np.ndarray) -> np.ndarray:
            array = np.asarray(self.case.on_own_grid(values), np.float32)
            if missing is not None:
                array = array.copy()
                array[missing] = np.nan
            return array

        found: dict[str, np.ndarray] = {}
        if "anomaly" in names and map_name(system) in self.maps:
            found["anomaly"] = back(self.maps[map_name(system)].mean(0))
        if "confidence" in names and self.confidence is not None:
            found["confidence"] = back(self.confidence.mean(0))
        if "recon" in names and self.reconstruction is not None:
            found["recon"] = back(self.case.in_stored_values(self.reconstruction.mean(0)))
        return found


def map_name(system: System) -> str:
    """The name of the map that stands for a system. A system may have no map of that name."""
    return system.map or system.primary


def report_case(
    result: Result,
    system: System,
    lesion: np.ndarray | None,
    baseline_maps: Mapping[str, np.ndarray],
    mask: np.ndarray | None,
) -> Case:
    """A result as the report shows it, means over replicates.

    Of a volume, further channels, their reconstructions and the subtraction image are further pictures. `lesion`,
    `baseline_maps` and `mask`, of what the map calls abnormal, lie on the case's own grid.
    """
    case, pictures = result.case, {name: each.mean(0) for name, each in result.pictures.items()}
    if case.volume:
        for c in range(1, case.array.shape[-1]):
            pictures[f"channel {c}"] = case.array[..., [c]]
            if result.reconstruction is not None:
                pictures[f"the reconstruction of channel {c}"] = result.reconstruction.mean(0)[..., [c]]
        if "subtraction" in baseline_maps:
            pictures["the subtraction image"] = case.volume.grid.forward(baseline_maps["subtraction"], 1)
    mean = lambda values: None if values is None else values.mean(0)
    return Case(
        case.row.id,
        case.row.label,
        float(result.scores[system.primary].mean()),
        case.array,
        result.maps[map_name(system)].mean(0),
        None if lesion is None else case.on_scored_grid(lesion),
        mean(result.reconstruction),
        confidence=mean(result.confidence),
        pictures=pictures,
        region=case.volume.region if case.volume else None,
        called=None if mask is None else case.on_scored_grid(mask, share=0.0),  # no small mask of an image vanishes
        film=case.film() if case.film else b"",
    )
