"""One case: from the files of a row to the array that is scored, the masks, and the words that seed its random numbers.

2D images become arrays of `data.size` in [0, 1]; volumes go to their working grid (`jmae.data.volumes`).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jmae.data import phantoms
from jmae.data.files import Geometry, Image, ReadFile, off_grid, on_grid, read_file, read_image, read_marks, turned
from jmae.data.films import film_of
from jmae.data.manifest import PHANTOM, Row, boxes_file
from jmae.data.transforms import area_resize, equalise, grey, resize, to_unit
from jmae.data.volumes import Mask, Volume, boxes_mask, in_window, prepare, read_subtraction, read_volume
from jmae.errors import InputError
from jmae.likeness import Traits, traits_of
from jmae.recipe import suggested
from jmae.tables import counted

PLS = np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # axes to posterior, left, superior


class CaseReader:
    """Reads the files of one row, each once: a file that the row names twice is kept until the case is done."""

    def __init__(self, row: Row):
        others = row.mask, row.region, boxes_file(row) if row.boxes and not row.mask else None
        named = Counter([*row.image, *row.pre, *row.post, *(file for file in others if file)])
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


class Marked(NamedTuple):
    """A mask of a case."""

    mask: np.ndarray  # bool (*size), on the image's own grid
    apart: Mask | None = None  # as stored, where it lies on another grid
    soft: bool = False  # whether its file holds probabilities, cut at data.mask_threshold


class Opened(NamedTuple):
    """A case as stored, on the image's own grid."""

    image: Image
    lesion: np.ndarray | None  # bool (*size); None where the row has neither mask nor boxes
    region: np.ndarray | None  # bool (*size): where metrics count; None is everywhere
    read: ReadFile = read_file  # reads the case's other files
    complete: bool = True  # False where a mask or region could not be read, or a box is wrong
    apart: Mapping[str, Mask] = MappingProxyType({})  # "lesion" and "region" as stored, where on another grid
    soft: bool = False  # whether a mask holds probabilities

    @classmethod
    def of(
        cls, image: Image, lesion: Marked | None, region: Marked | None, read: ReadFile, complete: bool = True
    ) -> "Opened":
        """The case with its masks."""
        masks = {name: one for name, one in (("lesion", lesion), ("region", region)) if one}
        apart = {name: one.apart for name, one in masks.items() if one.apart}
        soft = any(one.soft for one in masks.values())
        return cls(image, lesion and lesion.mask, region and region.mask, read, complete, apart, soft)


def open_case(
    row: Row, data: ConfigDict | None = None, stored: Image | None = None, region: np.ndarray | None = None
) -> Opened:
    """Reads a row's image, mask and region; `stored` and `region` replace what the files would give.

    `data` is the recipe's section; without it all files must lie on one grid.

    Raises InputError where a file cannot be read.
    """
    read = CaseReader(row)
    stored = stored_case(row, data, read) if stored is None else stored
    marked = region_mask(row, stored, data, read) if region is None else Marked(region)
    return Opened.of(stored, lesion_mask(row, stored, data, read), marked, read)


def stored_case(row: Row, data: ConfigDict | None, read: ReadFile = read_file) -> Image:
    """A row's image or volume as stored; `data.join` says how the channels of a volume become one array."""
    if data and len(data.size) == 3 and not row.image[0].startswith(PHANTOM):
        return read_volume(row.image, data, read)
    return stored_image(row, read)


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
    try:
        name, split, index = specifier.removeprefix(PHANTOM).split("/")
        return phantoms.draw(name, split, int(index))
    except ValueError:
        raise InputError(f"{specifier}: names no phantom: write {PHANTOM}NAME/SPLIT/NUMBER, as chest/test/0") from None


def lesion_mask(
    row: Row, like: Image | None, data: ConfigDict | None = None, read: ReadFile = read_file
) -> Marked | None:
    """The lesions: from the mask, else from the boxes; None without both.

    `like` is the case's image; without it the mask stays on its own grid. `data` as of `open_case`.
    """
    if row.mask and row.mask.startswith(PHANTOM):
        return Marked(phantom(row.mask).mask)
    if row.mask:
        return _marked(row.mask, like, data, read)
    if not row.boxes or like is None:
        return None
    grid = boxes_grid(row, like, read)
    mask = boxes_mask(row.boxes, grid.size)
    return _placed(boxes_file(row), Image(mask[..., None], grid.spacing, grid.affine, None), like, data)


def region_mask(
    row: Row, like: Image | None, data: ConfigDict | None = None, read: ReadFile = read_file
) -> Marked | None:
    """Where metrics count; None is everywhere. Arguments as of `lesion_mask`."""
    if row.region and row.region.startswith(PHANTOM):
        return Marked(phantom(row.region).region)
    return _marked(row.region, like, data, read) if row.region else None


def boxes_grid(row: Row, like: Image, read: ReadFile) -> Geometry:
    """The grid whose voxels a row's boxes count, that of the column `boxes_on`."""
    file = boxes_file(row)
    return like.geometry if file == row.image[0] else read(file)[0].geometry


def soft_masks(n: int, threshold: float) -> str:
    """The line that tells how masks of probabilities are read."""
    return f"masks of probabilities in {counted(n, 'cases')}: voxels above data.mask_threshold={threshold:g} are marked"


def _marked(file: str, like: Image | None, data: ConfigDict | None, read: ReadFile) -> Marked:
    """The mask of a file."""
    image, soft = read_marks(file, read, data.mask_threshold if data else 0.5)
    return Marked(image.array[..., 0], soft=soft) if like is None else _placed(file, image, like, data, soft)


def _placed(file: str, image: Image, like: Image, data: ConfigDict | None, soft: bool = False) -> Marked:
    """A mask that was read as an image, on the grid of its case's image. Raises `OffGrid` for a mask on another grid,
    unless `data.join` is "resample" and both have an affine.
    """
    image = turned(image, like)
    join = data.get("join", "same") if data else "same"
    if join == "resample" and off_grid(image, like) and image.affine is not None and like.affine is not None:
        mask = Mask(image.array[..., 0], image.affine)
        return Marked(mask.onto(like.affine, like.size), mask, soft)
    return Marked(on_grid(file, image, like), soft=soft)


class OtherRank(InputError):
    """A volume for a run of images, or an image for a run of volumes: no repair of the file helps."""


def usable(row: Row, stored: Image, data: ConfigDict) -> np.ndarray:
    """A row's array as stored; a 2D colour image becomes grey where one channel is asked for. With
    data.nonfinite="zero", values that are not finite are 0 in a volume, and the lowest value of an image.

    Raises InputError that names the file where the array has another number of channels or axes, values that are not
    finite, or one value all over. A network rebuilds one value without an error: its score would say "normal".
    """
    array, size, channels = stored.array, tuple(data.size), data.channels
    if array.ndim - 1 != len(size):
        one, usual, kind = ("an image", "volumes", "images") if array.ndim == 3 else ("a volume", "images", "volumes")
        what = f"is {one}, where the recipe takes {usual} (data.size has {len(size)} axes)"
        raise OtherRank(f"{row.image[0]}: {what}: for {kind} train one such as {suggested(kind)[0]}:small")
    if array.ndim == 3 and array.shape[-1] == 3 and channels == 1 and len(row.image) == 1:
        array = grey(array)
    if array.shape[-1] != channels:
        raise InputError(
            f"{row.image[0]}: channels: {array.shape[-1]} where the recipe has {channels}: give {channels}, or train "
            f"with --config.data.channels={array.shape[-1]}, and model.channels where the recipe has it"
        )
    if data.get("nonfinite", "refuse") == "zero" and not (finite := np.isfinite(array)).all():
        array = np.where(finite, array, 0 if len(size) == 3 else array.min(where=finite, initial=np.inf))
    if not np.isfinite(array).all():
        bad = np.count_nonzero(~np.isfinite(array), axis=tuple(range(array.ndim - 1)))
        file = row.image[int(bad.argmax())] if len(row.image) == len(bad) else row.image[0]
        raise InputError(f"{file}: {bad.max()} values are not finite: mend the file or drop its row")
    if all(channel.min() == channel.max() for channel in np.moveaxis(array, -1, 0)):
        raise InputError(f"{row.image[0]}: no content: it has one value all over: export it again or leave it out")
    return array


def prepared_image(row: Row, data: ConfigDict, stored: Image | None = None) -> np.ndarray:
    """A row's image as the networks see it, float32 (*size, channels) in [0, 1].

    With `data.window` the window's ends become 0 and 1 in each image alike. With `data.equalise` the image is shrunk by
    area, and its histogram of 256 levels is made even.

    Raises:
      InputError: as `usable`, and where the window leaves a constant image.
    """
    stored, size = stored_image(row) if stored is None else stored, tuple(data.size)
    array, bits = usable(row, stored, data), stored.bits or 0
    if data.equalise:
        array = area_resize(array, size)
    if data.window:
        unit = in_window(array, data.window, row.image[0])
    else:
        unit = to_unit(array, bits)
    return equalise(unit, exact=data.equalise_exact) if data.equalise else resize(unit, size)


def prepared_volume(row: Row, data: ConfigDict, case: Opened | None = None) -> Volume:
    """A row's volume on the working grid (`jmae.data.volumes.prepare`), from the opened case or from the files.

    Raises:
      InputError: as `usable` and `prepare`, and where a file cannot be read.
    """
    case = open_case(row, data) if case is None else case
    volume = prepare(
        case.image._replace(array=usable(row, case.image, data)),
        data,
        name=row.image[0],
        lesion=case.apart.get("lesion", case.lesion),
        region=case.apart.get("region", _without(missing_values(case.image), case.region)),
        midline=row.extra.get("midline", ""),
        half=row.extra.get("half", ""),
        # The voxels that are scored must not depend on a label, whatever was published.
        widen=row.split == "train" or data.widen_test_crops,
    )
    _check_half(row, volume, case.lesion)
    return volume


def _check_half(row: Row, volume: Volume, lesion: np.ndarray | None) -> None:
    """Raises InputError where the label of a half contradicts the lesions of the whole image.

    A normal half may have the smaller part of a lesion that crosses the midline: no crop touches it.
    """
    half = row.extra.get("half", "")
    if not half or lesion is None or row.label is None:
        return
    total, here = np.count_nonzero(lesion), np.count_nonzero(lesion & volume.grid.inside())
    if (2 * here > total) if row.label == 0 else not here:
        what = f"half {half!r} has {here} of {total} lesion voxels and the label {row.label}"
        raise InputError(f"{row.image[0]}: {what}: name the other half, or repair the label")


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
      missing: where stored values are not finite, bool on the own grid; None where all are.
      stored: the stored image; None for an image that the command has not kept.
      volume: a volume's working grid and its masks there; None for an image.
      subtraction: subtraction image of a volume with series before and after contrast, on the working grid
        (`read_subtraction`).
      moments: (mean, standard deviation) to which the recipe normalises volumes.
      film: gives the stored image as a JPEG (`films.film_of`); None for a volume.
      traits: of the stored image, which are compared with those of the training images.
    """

    row: Row
    array: np.ndarray
    geometry: Geometry
    digest: str
    lesion: np.ndarray | None = None
    region: np.ndarray | None = None
    missing: np.ndarray | None = None
    stored: Image | None = None
    volume: Volume | None = None
    subtraction: np.ndarray | None = None
    moments: tuple[float, float] = (0.0, 1.0)
    film: Callable[[], bytes] | None = None
    traits: Traits | None = None

    def on_own_grid(self, array: np.ndarray) -> np.ndarray:
        """A map (*size), or a picture (*size, channels), on the case's own grid."""
        if self.volume:
            return self.volume.grid.back(array)
        size = self.geometry.size
        return resize(array, size) if array.ndim > len(size) else resize(array[..., None], size)[..., 0]

    def on_scored_grid(self, mask: np.ndarray, share: float = 0.5) -> np.ndarray:
        """A mask on the case's own grid, bool on the grid that is scored. A pixel of an image is True where more than
        this share of it lies in the mask."""
        if self.volume:
            return self.volume.grid.forward(mask, order=0)
        return area_resize(mask[..., None].astype(np.float32), self.array.shape[:-1])[..., 0] > share

    def in_stored_values(self, picture: np.ndarray) -> np.ndarray:
        """A picture (*size, channels) of a volume in the values of its stored image; an image's picture as it is."""
        if not self.volume:
            return picture
        mean, deviation = self.moments
        return (picture - mean) / deviation * self.volume.std + self.volume.mean

    def counted_voxels(self) -> np.ndarray | None:
        """Where a map exists and counts, bool on the case's own grid; None is everywhere."""
        scored = self.scored_voxels()
        return scored if self.region is None else self.region if scored is None else self.region & scored

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
    missing = missing_values(stored)
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
        region=region if missing is None else ~missing if region is None else region & ~missing,
        missing=missing,
        stored=stored,
        volume=volume,
        subtraction=subtraction,
        moments=moments,
        film=None if volume else partial(film_of, stored, data.window),
        traits=traits_of(case.image, data.get("axes", "")),
    )


def missing_values(stored: Image) -> np.ndarray | None:
    """Where an image as stored has values that are not finite, bool (*size); None where all are."""
    finite = np.isfinite(stored.array)
    return None if finite.all() else ~finite.all(-1)


def _without(missing: np.ndarray | None, region: np.ndarray | None) -> np.ndarray | None:
    return region if missing is None or region is None else region & ~missing


def stored_digest(stored: Image) -> str:
    """The first 16 digits of the SHA-256 of an image's stored values: the column `image` of cases.csv."""
    return hashlib.sha256(np.ascontiguousarray(stored.array).data).hexdigest()[:16]


def case_words(name: str) -> np.ndarray:
    """The first 8 bytes of SHA-256 of a case's id as two uint32: all randomness of a case comes from them."""
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], ">u4").astype(np.uint32)
