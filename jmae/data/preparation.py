"""One case: from the files of a row to the array that is scored, the masks, and the words that seed its random numbers.

2D images become arrays of `data.size` in [0, 1]; volumes go to their working grid (`jmae.data.volumes`).
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jmae.data import phantoms
from jmae.data.files import Geometry, Image, ReadFile, read_file, read_image, read_mask
from jmae.data.manifest import PHANTOM, Row
from jmae.data.transforms import area_resize, equalise, grey, resize, to_unit
from jmae.data.volumes import Volume, boxes_mask, in_window, prepare, read_subtraction, read_volume
from jmae.errors import InputError

PLS = np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # axes to posterior, left, superior


class CaseReader:
    """Reads the files of one row, each once: a file that the row names twice is kept until the case is done."""

    def __init__(self, row: Row):
        named = Counter([*row.image, *row.pre, *row.post, *(file for file in (row.mask, row.region) if file)])
        self.shared = {file for file, n in named.items() if n > 1}
        self.tried: set[str] = set()
        self.images: dict[str, tuple[Image, bool]] = {}

    def __call__(self, path: str) -> tuple[Image, bool]:
        """As `files.read_file`."""
        if path in self.images:
            return self.images[path]
        self.tried.add(path)
        found = read_file(path)
        if path in self.shared:
            self.images[path] = found
        return found


class Opened(NamedTuple):
    """A case as stored, on the image's own grid."""

    image: Image
    lesion: np.ndarray | None  # bool (*size); None where the row has neither mask nor boxes
    region: np.ndarray | None  # bool (*size): where metrics count; None is everywhere
    read: ReadFile = read_file  # reads the case's other files
    complete: bool = True  # False where a mask or region could not be read, or a box is wrong


def open_case(row: Row, data: ConfigDict, stored: Image | None = None, region: np.ndarray | None = None) -> Opened:
    """Reads a row's image, mask and region; `stored` and `region` replace what the files would give.

    Raises InputError where a file cannot be read.
    """
    read = CaseReader(row)
    stored = stored_case(row, data, read) if stored is None else stored
    region = region_mask(row, stored, read) if region is None else region
    return Opened(stored, lesion_mask(row, stored, read), region, read)


def stored_case(row: Row, data: ConfigDict, read: ReadFile = read_file) -> Image:
    """A row's image or volume as stored; `data.join` says how the channels of a volume become one array."""
    joined = len(data.size) == 3 and not row.image[0].startswith(PHANTOM)
    return read_volume(row.image, data, read) if joined else stored_image(row, read)


def stored_image(row: Row, read: ReadFile = read_file) -> Image:
    """A row's image as stored; several files give its channels in order."""
    if not row.image[0].startswith(PHANTOM):
        return read_image(row.image, read)
    drawn = phantom(row.image[0])
    volume = drawn.image.ndim == 4
    affine = PLS @ np.diag([*drawn.spacing, 1.0]) if volume else None
    return Image(drawn.image, drawn.spacing, affine, None if volume else 8)


@lru_cache(maxsize=1024)  # image, mask and region of a case are asked for one by one, and drawing takes longest
def phantom(specifier: str) -> phantoms.Phantom:
    """The phantom that "phantom:NAME/SPLIT/INDEX" specifies."""
    name, split, index = specifier.removeprefix(PHANTOM).split("/")
    return phantoms.draw(name, split, int(index))


def lesion_mask(row: Row, like: Image | Geometry, read: ReadFile = read_file) -> np.ndarray | None:
    """The lesion mask on the image's own grid: from the mask, else from the boxes; None without both."""
    if row.mask and row.mask.startswith(PHANTOM):
        return phantom(row.mask).mask
    if row.mask:
        return read_mask(row.mask, like, read)
    return boxes_mask(row.boxes, like.size) if row.boxes else None


def region_mask(row: Row, like: Image | Geometry, read: ReadFile = read_file) -> np.ndarray | None:
    """Where metrics count, bool (*size) on the image's own grid; None is everywhere."""
    if row.region and row.region.startswith(PHANTOM):
        return phantom(row.region).region
    return read_mask(row.region, like, read) if row.region else None


def usable(row: Row, stored: Image, size: tuple[int, ...], channels: int) -> np.ndarray:
    """A row's array as stored; a colour image becomes grey where one channel is asked for.

    Raises InputError that names the file where the array has another number of channels or axes, or values that are not
    finite.
    """
    array = stored.array
    if array.ndim - 1 != len(size):
        preset = "small3d or phantom3d" if array.ndim == 4 else "small"
        raise InputError(
            f"{row.image[0]}: {array.ndim - 1} axes where data.size has {len(size)}: train one for it, as :{preset}"
        )
    if array.shape[-1] == 3 and channels == 1 and len(row.image) == 1:
        array = grey(array)
    if array.shape[-1] != channels:
        raise InputError(
            f"{row.image[0]}: channels: {array.shape[-1]} where the recipe has {channels}: give {channels}, or train "
            f"with --config.data.channels={array.shape[-1]}, and model.channels where the recipe has it"
        )
    if not np.isfinite(array).all():
        bad = np.count_nonzero(~np.isfinite(array), axis=tuple(range(array.ndim - 1)))
        file = row.image[int(bad.argmax())] if len(row.image) == len(bad) else row.image[0]
        raise InputError(f"{file}: {bad.max()} values are not finite: mend the file or drop its row")
    return array


def prepared_image(row: Row, data: ConfigDict, stored: Image | None = None) -> np.ndarray:
    """A row's image as the networks see it, float32 (*size, channels) in [0, 1].

    With `data.window` the window's ends become 0 and 1 in each image alike. With `data.equalise` the image is shrunk by
    area, and its histogram of 256 levels is made even.

    Raises:
      InputError: as `usable`, and where the window leaves a constant image.
    """
    stored, size = stored_image(row) if stored is None else stored, tuple(data.size)
    array, bits = usable(row, stored, size, data.channels), stored.bits or 0
    if data.equalise:
        array = area_resize(array, size)
    if data.window:
        unit = in_window(array, data.window, row.image[0])
    else:
        unit = to_unit(array, bits)
    return equalise(unit) if data.equalise else resize(unit, size)


def prepared_volume(row: Row, data: ConfigDict, case: Opened | None = None) -> Volume:
    """A row's volume on the working grid (`jmae.data.volumes.prepare`), from the opened case or from the files.

    Raises:
      InputError: as `usable` and `prepare`, and where a file cannot be read.
    """
    case = open_case(row, data) if case is None else case
    return prepare(
        case.image._replace(array=usable(row, case.image, tuple(data.size), data.channels)),
        data,
        name=row.image[0],
        lesion=case.lesion,
        region=case.region,
        midline=row.extra.get("midline", ""),
        half=row.extra.get("half", ""),
        # The voxels that are scored must not depend on a label, whatever was published.
        widen=row.split == "train" or data.widen_test_crops,
    )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case that is ready to be scored, with what its maps are compared with.

    Attributes:
      row: the case.
      array: float32 (*size, channels), as the networks see it.
      geometry: the grid of the stored image, which is the case's own grid.
      digest: of the stored values (`stored_digest`).
      lesion: the lesion mask or boxes, bool on the own grid; None without both.
      region: where metrics count, bool on the own grid; None is everywhere.
      stored: the stored image; None for an image that the command has not kept.
      volume: a volume's working grid and its masks there; None for an image.
      subtraction: subtraction image of a volume with series before and after contrast, on the working grid
        (`read_subtraction`).
      moments: (mean, standard deviation) to which the recipe normalises volumes.
    """

    row: Row
    array: np.ndarray
    geometry: Geometry
    digest: str
    lesion: np.ndarray | None = None
    region: np.ndarray | None = None
    stored: Image | None = None
    volume: Volume | None = None
    subtraction: np.ndarray | None = None
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


def prepared_case(
    row: Row, data: ConfigDict, case: Opened, *, array: np.ndarray | None = None, volume: Volume | None = None
) -> Prepared:
    """An opened case, ready to be scored. `array` of an image, or `volume`, is passed where it has been prepared
    before.

    Raises:
      InputError: as `prepared_image` and `prepared_volume`.
    """
    stored, region, subtraction, moments = case.image, case.region, None, (0.0, 1.0)
    if len(data.size) == 3:
        volume = volume or prepared_volume(row, data, case)
        array, stored, moments = volume.array, volume.stored, (data.mean, data.std)
        if region is None and data.region == "nonzero":
            region = np.any(stored.array != 0, axis=-1)
        if row.pre and row.post:
            subtraction = read_subtraction(row, volume, data, case.read)
    return Prepared(
        row=row,
        array=prepared_image(row, data, stored) if array is None else array,
        geometry=stored.geometry,
        digest=stored_digest(stored),
        lesion=case.lesion,
        region=region,
        stored=stored,
        volume=volume,
        subtraction=subtraction,
        moments=moments,
    )


def stored_digest(stored: Image) -> str:
    """The first 16 digits of the SHA-256 of an image's stored values: the column `image` of cases.csv."""
    return hashlib.sha256(np.ascontiguousarray(stored.array).data).hexdigest()[:16]


def case_words(name: str) -> np.ndarray:
    """The first 8 bytes of SHA-256 of a case's id as two uint32: all randomness of a case comes from them."""
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], ">u4").astype(np.uint32)
