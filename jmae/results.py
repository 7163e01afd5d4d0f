"""A case that is ready to be scored, and what scoring it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jmae.data.files import Image
from jmae.data.files.grids import Geometry
from jmae.data.manifest import Row
from jmae.data.transforms import resize
from jmae.data.volumes import Volume
from jmae.system import System


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case that is ready to be scored.

    Attributes:
      row: the case.
      array: float32 (*size, channels), as the networks see it.
      geometry: the grid of the stored image, which is the case's own grid.
      digest: digest of the stored values.
      stored: the stored image, where it was read for this case.
      volume: a volume's working grid and region; None for an image.
      moments: (mean, standard deviation) to which the recipe normalises volumes.
    """

    row: Row
    array: np.ndarray
    geometry: Geometry
    digest: str
    stored: Image | None = None
    volume: Volume | None = None
    moments: tuple[float, float] = (0.0, 1.0)

    def on_own_grid(self, array: np.ndarray) -> np.ndarray:
        """A map (*size), or a picture (*size, channels), on the case's own grid."""
        if self.volume:
            return self.volume.grid.back(array)
        size = self.geometry.size
        return resize(array, size) if array.ndim > len(size) else resize(array[..., None], size)[..., 0]

    def on_scored_grid(self, mask: np.ndarray) -> np.ndarray:
        """A mask on the case's own grid, bool on the grid that is scored."""
        if self.volume:
            return self.volume.grid.forward(mask, order=0)
        return resize(mask[..., None].astype(np.float32), self.array.shape[:-1])[..., 0] > 0.5

    def in_stored_values(self, picture: np.ndarray) -> np.ndarray:
        """A picture (*size, channels) of a volume in the values of its stored image; an image's picture as it is."""
        if not self.volume:
            return picture
        mean, deviation = self.moments
        return (picture - mean) / deviation * self.volume.std + self.volume.mean

    def scored_voxels(self) -> np.ndarray | None:
        """Where a map exists, bool on the case's own grid; None is everywhere."""
        return self.volume.grid.inside() if self.volume else None


class Result(NamedTuple):
    """A case scored by r replicates. Higher is more abnormal."""

    case: Prepared
    maps: Mapping[str, np.ndarray]  # (r, *size)
    scores: Mapping[str, np.ndarray]  # (r,)
    reconstruction: np.ndarray | None = None  # (r, *size, c), normalised as the case's array
    confidence: np.ndarray | None = None  # (r, *size): spread of the primary map over the system's samples
    pictures: Mapping[str, np.ndarray] = MappingProxyType({})  # (r, *size, c) or (r, h, w)
    seconds: float = 0.0  # of scoring alone

    def own_maps(self) -> dict[str, list[np.ndarray]]:
        """All maps on the case's own grid, one of each replicate."""
        return {name: [self.case.on_own_grid(m) for m in maps] for name, maps in self.maps.items()}

    def written(self, system: System, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The files' content among `names` ("anomaly", "confidence", "recon"), as far as the system has it.

        Arrays are float32 on the case's own grid, (*size) or for "recon" (*size, c), and means over replicates. The
        reconstruction has the values of the stored image.
        """
        back = lambda values: np.asarray(self.case.on_own_grid(values), np.float32)
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
