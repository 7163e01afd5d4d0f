"""From a patient's sequences on disk to one prepared volume, and maps back onto the patient's own grid.

The steps are: reorient by the affine, resample, crop to the chest, normalise. Steps and order follow MAEMI: Daniel M.
Lang, Eli Schwartz, Cosmin I. Bercea, Raja Giryes, Julia A. Schnabel, "Multispectral 3D Masked Autoencoders for Anomaly
Detection in Non-Contrast Enhanced Breast MRI", CaPTion 2023, arXiv 2303.05861, and their code. ours: masks take the
nearest voxel; the code resamples masks with splines too. The sequences meet by their affines in one interpolation each;
the code cuts each out of its own grid, to whole voxels. Grids share their centre; in the code, their first voxel.

The own grid is that of the stored image; the working grid is that of the networks. Both hold arrays
`(*size, channels)`. A direction (L or R, P or A, S or I) is the one in which an index grows.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, overload

import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

from jmae.data.files import MAX_VOXELS, Image, ReadFile, off_grid, read_file, read_image, turned
from jmae.data.manifest import Row
from jmae.data.transforms import equalise, to_unit
from jmae.errors import InputError

WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # letter -> RAS axis, sign
MAX_EDGE = 2**13  # voxels of the working grid along an axis: twice those of the largest scans
KEPT_VOXELS = 0.01  # a spacing is kept, not resampled to, where no voxel would move by more than this


class Grid(NamedTuple):
    """How the working grid lies in the own grid.

    Axes are permuted and mirrored, resampled about the common centre, then cropped. On an axis, working index w is the
    (mirrored) own coordinate (w + origin - (full - 1) / 2) * step + (own - 1) / 2.
    """

    own_size: tuple[int, ...]
    own_axes: tuple[int, ...]  # the own axis of each working axis
    flipped: tuple[bool, ...]  # by working axis
    full: tuple[int, ...]  # size before the crop
    step: tuple[float, ...]  # own voxels per working voxel, exactly 1 where the spacing is kept
    origin: tuple[int, ...]  # of the crop, below 0 where it leaves the image
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None  # mm per working axis
    own_affine: np.ndarray | None  # own voxel -> RAS mm, oblique or sheared as it is

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) working voxel -> RAS mm."""
        if self.own_affine is None:
            return None
        to_own = np.diag([0.0] * len(self.size) + [1.0] * (4 - len(self.size)))
        for axis, (own, flipped) in enumerate(zip(self.own_axes, self.flipped, strict=True)):
            first = self.own(axis, 0)
            to_own[own, axis] = -self.step[axis] if flipped else self.step[axis]
            to_own[own, 3] = self.own_size[own] - 1 - first if flipped else first
        return self.own_affine @ to_own

    def cropped(self, origin: Sequence[int], size: Sequence[int]) -> "Grid":
        """The grid of a box, whose `origin` and `size` are in voxels of this grid; the box may leave the image."""
        return self._replace(origin=tuple(a + b for a, b in zip(self.origin, origin, strict=True)), size=tuple(size))

    def forward(self, array: np.ndarray, order: int) -> np.ndarray:
        """Own (*own_size[, c]) -> working (*size[, c]): splines of `order` 0 to 3, 0 outside the image.

        Beyond the centre of the outermost voxel its value goes on (mode "nearest"). Where the spacing stays, values are
        copied. Values must be finite: one NaN would spread. `order` 0 keeps the dtype; others give float32.
        """
        oriented = self.oriented(array)
        inside = []
        for axis in sorted(range(len(self.size)), key=lambda axis: -self.step[axis]):  # most shrunk axis first
            low, high = self._filled(axis)
            inside.append((axis, slice(low, high)))
            start = low + self.origin[axis]
            if self.step[axis] == 1:
                oriented = oriented[(slice(None),) * axis + (slice(start, start + high - low),)]
                continue
            at = self.own(axis, np.arange(low, high))
            if order == 0:
                nearest = np.clip(np.floor(at + 0.5).astype(int), 0, oriented.shape[axis] - 1)
                oriented = oriented.take(nearest, axis)
            else:
                weights = spline_weights(oriented.shape[axis], tuple(at.tolist()), order)
                oriented = np.moveaxis(np.tensordot(weights, np.asarray(oriented, np.float32), (1, axis)), 0, axis)
        dtype = array.dtype if order == 0 else np.dtype(np.float32)
        working = np.zeros((*self.size, *array.shape[len(self.size) :]), dtype)
        working[tuple(part for _, part in sorted(inside))] = oriented
        return working

    def back(self, array: np.ndarray) -> np.ndarray:
        """Working (*size[, c]) -> own (*own_size[, c]), float32: linear interpolation, 0 where `inside` is False. Where
        the spacing stays, values are copied."""
        array = np.asarray(array, np.float32)
        own = np.zeros((*self.own_size, *array.shape[len(self.size) :]), np.float32)
        oriented = self.oriented(own)  # a view: what is written to it is written to `own`
        block = []
        for axis in sorted(range(len(self.size)), key=lambda axis: -self.step[axis]):
            low, high = self._covered(axis)
            block.append((axis, slice(low, high)))
            centre, own_centre = (self.full[axis] - 1) / 2, (self.own_size[self.own_axes[axis]] - 1) / 2
            at = (np.arange(low, high) - own_centre) / self.step[axis] + centre - self.origin[axis]
            at = np.clip(at, 0, self.size[axis] - 1)
            below = np.floor(at).astype(int)
            if self.step[axis] == 1:
                array = array.take(below, axis)
                continue
            share = (at - below).astype(np.float32).reshape(-1, *(1,) * (array.ndim - axis - 1))
            above = np.minimum(below + 1, self.size[axis] - 1)
            array = array.take(below, axis) * (1 - share) + array.take(above, axis) * share
        oriented[tuple(part for _, part in sorted(block))] = array
        return own

    def inside(self) -> np.ndarray:
        """bool (*own_size): own voxels whose centre lies in a voxel of the working grid, which is what was analysed.

        Where the grid reaches the image's end, its last voxel reaches that end too. So two halves of a volume share no
        own voxel, and leave none out.
        """
        own = np.zeros(self.own_size, bool)
        self.oriented(own)[tuple(slice(*self._covered(axis)) for axis in range(len(self.size)))] = True
        return own

    def oriented(self, array: Any) -> Any:
        """A view of own (*own_size[, c]) with the axes and directions of the working grid."""
        rank = len(self.size)
        array = array.transpose(*self.own_axes, *range(rank, array.ndim))
        return array[tuple(slice(None, None, -1 if flipped else 1) for flipped in self.flipped)]

    def own(self, axis: int, w: Any) -> Any:
        """The mirrored own coordinate of working coordinates `w`."""
        own = self.own_size[self.own_axes[axis]]
        return (w + self.origin[axis] - (self.full[axis] - 1) / 2) * self.step[axis] + (own - 1) / 2

    def _filled(self, axis: int) -> tuple[int, int]:
        """The working indices of an axis, from and to, that lie in the image."""
        low = min(max(0, -self.origin[axis]), self.size[axis])
        return low, max(low, min(self.size[axis], self.full[axis] - self.origin[axis]))

    def _covered(self, axis: int) -> tuple[int, int]:
        """The mirrored own indices of an axis, from and to, that lie in the working grid."""
        own, origin, size = self.own_size[self.own_axes[axis]], self.origin[axis], self.size[axis]
        low = 0 if origin <= 0 else int(np.ceil(self.own(axis, -0.5)))
        high = own if origin + size >= self.full[axis] else int(np.ceil(self.own(axis, size - 0.5)))
        return min(low, own), max(min(low, own), high)


@lru_cache(maxsize=64)
def spline_weights(n: int, at: tuple[float, ...], order: int) -> np.ndarray:
    """(len(at), n) float32: the weight of each of n samples in the spline through them, at the coordinates `at`."""
    unit = np.eye(n)
    each = [ndimage.map_coordinates(unit[i], [at], order=order, mode="nearest") for i in range(n)]
    return np.stack(each, 1).astype(np.float32)


class Mask(NamedTuple):
    """A mask on a grid that is not its image's."""

    array: np.ndarray  # bool (*size)
    affine: np.ndarray  # (4, 4) voxel -> RAS mm

    def onto(self, affine: np.ndarray, size: tuple[int, ...], *, whole: bool = False) -> np.ndarray:
        """bool (*size): the nearest voxel of the mask for each voxel that `affine` places; False outside the mask.

        With `whole` no marked voxel is lost: the mask first grows to the voxels that may represent its own.
        """
        to_own = np.linalg.inv(self.affine) @ affine
        steps = np.abs(to_own[:3, :3]).sum(1)  # voxels of the mask in a voxel of the grid, along each axis of the mask
        same = np.allclose(to_own[:3, :3], np.rint(to_own[:3, :3]), atol=1e-3) and np.allclose(steps, 1, atol=1e-3)
        grown = tuple(1 if same else 2 * int(np.ceil(step / 2)) + 1 for step in steps)
        mask = ndimage.maximum_filter(self.array, grown) if whole and max(grown) > 1 else self.array
        found = ndimage.affine_transform(
            mask.astype(np.uint8), to_own, output_shape=size, order=0, mode="grid-constant"
        )
        return found > 0


class Volume(NamedTuple):
    """One case on its working grid.

    Stored values are (array - data.mean) / data.std * std + mean, channel by channel, unless the recipe has a window or
    equalises.
    """

    array: np.ndarray  # float32 (*size, c), normalised
    region: np.ndarray | None  # bool (*size): where metrics count
    lesion: np.ndarray | None  # bool (*size)
    side: int | None  # the working axis along left and right; None where the image tells no position
    midline: int | None  # the pieces are [0, midline) and [midline, n) along `side`; None: one piece
    mean: np.ndarray  # float32 (c,)
    std: np.ndarray
    grid: Grid
    stored: Image  # on its own grid


def read_volume(paths: Sequence[str], data: ConfigDict, read: ReadFile = read_file) -> Image:
    """The sequences of a case as channels of one image on the grid of the first.

    With `data.join` "same" all lie on one grid, as `read_image` demands. With "resample" the affines put further
    sequences onto it, by cubic splines, 0 where they have no data; a sequence on that grid is not resampled. The image
    then keeps all sequences as read, from which `prepare` takes the working grid in one step. `read` reads one file.

    Raises:
      InputError: a file that cannot be read, tells no position, or does not overlap the first.
    """
    _choice(data, "join", ("same", "resample"))
    if data.join == "same" or len(paths) == 1:
        return read_image(paths, read)
    images = [read_image(path, read) for path in paths]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        if image.affine is None:
            raise InputError(f"{path}: tells no position to resample by: save it as NIfTI, or --config.data.join=same")
    size, affine = first.array.shape[:-1], first.affine
    images = [first, *(turned(image, first) for image in images[1:])]
    arrays = [
        image.array if off_grid(image, first) is None else _resampled(image, affine, size, path, paths[0])
        for path, image in zip(paths, images, strict=True)
    ]
    bits = {image.bits for image in images}
    apart = any(off_grid(image, first) for image in images)
    return first._replace(
        array=np.concatenate(arrays, -1),
        bits=bits.pop() if len(bits) == 1 else None,
        sequences=tuple(images) if apart else (),
    )


def _resampled(image: Image, affine: np.ndarray | None, size: tuple[int, ...], path: str, of: str) -> np.ndarray:
    """(*size, c) of an image at the voxels that `affine` places: cubic splines, as in `Grid.forward`, 0 outside."""
    if image.affine is None or affine is None or image.array.ndim != 4 or len(size) != 3:
        raise InputError(f"{path}: is no volume with a position to resample onto the grid of {of}: save it as NIfTI")
    if bad := np.size(image.array) - np.isfinite(image.array).sum():
        raise InputError(f"{path}: {bad} values are not finite: mend the file or drop its row")
    put = partial(ndimage.affine_transform, matrix=np.linalg.inv(image.affine) @ affine, output_shape=size)
    outside = ~put(np.ones(image.array.shape[:3], bool), order=0, mode="grid-constant")
    array = np.stack([put(c, order=3, mode="nearest", output=np.float32) for c in np.moveaxis(image.array, -1, 0)], -1)
    array[outside] = 0
    if not array.any():
        raise InputError(f"{path}: is 0 all over the grid of {of}: name sequences of one patient and session")
    return array


def prepare(
    stored: Image,
    data: ConfigDict,
    *,
    name: str,
    lesion: np.ndarray | Mask | None = None,
    region: np.ndarray | Mask | None = None,
    midline: str = "",
    half: str = "",
    widen: bool = True,
) -> Volume:
    """One case on its working grid: reoriented, resampled, cropped, normalised, in this order.

    Args:
      stored: the case on its own grid.
      data: `axes`, `spacing`, `crop`, `crop_least`, `crop_most`, `crop_margin`, `region`, `normalise`, `mean`, `std`,
        `window`, `equalise`. With `window` (low, high) its ends become 0 and 1 instead. With `equalise`
        each channel gets the even histogram of `transforms.equalise` in [0, 1], which counts the region's voxels where
        `normalise` is "region".
      name: the file that messages name.
      lesion, region: bool on the own grid, or on a grid of their own.
      midline: "" for one piece; an index of the own left-right axis between voxels; or "middle" of the cropped axis.
      half: "first" or "second" returns that piece alone, in the order of the own axis. Both are normalised together.
      widen: whether a lesion that sticks out moves the side of the crop.

    Raises:
      InputError: "NAME: what: remedy".
    """
    _choice(data, "crop", ("none", "region"))
    _choice(data, "region", ("", "nonzero"))
    _choice(data, "normalise", ("crop", "region"))
    grid = whole_grid(stored, data, name)
    if region is None and data.region == "nonzero":
        region = np.any(stored.array != 0, axis=-1)
    if region is None and "region" in (data.crop, data.normalise):
        raise InputError(
            f"{name}: names no region to crop to or to normalise by: fill the column region, or train with "
            "data.region=nonzero"
        )
    if data.crop == "region" and region is not None:
        if grid.spacing is None:
            raise InputError(f"{name}: tells no spacing for a crop in mm: save it as NIfTI, or --config.data.crop=none")
        marked, found = _mask_on(grid, region), _mask_on(grid, lesion, whole=True) if widen else None
        _check_region(marked, name, "on the working grid")
        least, most = data.crop_least, data.crop_most
        grid = grid.cropped(*chest_box(marked, grid.spacing, least, most, found, data.crop_margin, data.axes))

    array, region, lesion = _array_on(grid, stored, name), _mask_on(grid, region), _mask_on(grid, lesion, whole=True)
    _check_region(region, name, "in the crop")
    inside = region if data.normalise == "region" else None
    windowed = in_window(array, data.window, name) if data.window else None
    array, mean, std = _normalised(array, inside, data, name)
    if data.equalise:
        unit = lambda: np.stack([to_unit(channel, 0) for channel in np.moveaxis(array, -1, 0)], -1)
        array = equalise(unit() if windowed is None else windowed, inside, exact=data.equalise_exact)
    elif windowed is not None:
        array = windowed

    side = _side(stored, data, grid)
    middle = _midline(grid, side, midline, name)
    if half:
        if side is None or middle is None:
            raise InputError(f"{name}: half {half!r} of an image without a midline: give it one")
        lower = (half == "first") != grid.flipped[side]
        low, high = (0, middle) if lower else (middle, grid.size[side])
        cut = (slice(None),) * side + (slice(low, high),)
        origin, size = [0] * len(grid.size), list(grid.size)
        origin[side], size[side] = low, high - low
        grid, middle, array = grid.cropped(origin, size), None, np.ascontiguousarray(array[cut])
        region, lesion = (None if mask is None else np.ascontiguousarray(mask[cut]) for mask in (region, lesion))
        _check_region(region, name, f"in the {half} half")
    return Volume(array, region, lesion, side, middle, mean, std, grid, stored._replace(sequences=()))


def in_window(array: np.ndarray, window: Sequence[float], name: str) -> np.ndarray:
    """Stored values clipped to a window (low, high), low as 0 and high as 1.

    Raises InputError where that leaves a constant image.
    """
    low, high = window
    unit = ((np.clip(array, low, high) - low) / (high - low)).astype(np.float32)
    if unit.min() == unit.max():
        raise InputError(f"{name}: is constant within data.window {low:g} to {high:g}: give the values' own unit")
    return unit


def _array_on(grid: Grid, stored: Image, name: str) -> np.ndarray:
    """The sequences on the working grid, float32 (*size, c), each interpolated once from its own grid."""
    if not stored.sequences:
        return grid.forward(stored.array, 3)
    parts = [
        grid.forward(one.array, 3)
        if off_grid(one, stored) is None
        else _resampled(one, grid.affine, grid.size, name, "the crop")
        for one in stored.sequences
    ]
    return np.concatenate(parts, -1)


@overload
def _mask_on(grid: Grid, mask: np.ndarray | Mask, *, whole: bool = False) -> np.ndarray: ...
@overload
def _mask_on(grid: Grid, mask: None, *, whole: bool = False) -> None: ...
def _mask_on(grid: Grid, mask: np.ndarray | Mask | None, *, whole: bool = False) -> np.ndarray | None:
    """A mask on the working grid, by its nearest voxels; with `whole` no marked voxel is lost."""
    if mask is None:
        return None
    if isinstance(mask, Mask):
        assert grid.affine is not None
        return mask.onto(grid.affine, grid.size, whole=whole)
    return _forward_all(mask, grid) if whole else grid.forward(mask, 0)


def _forward_all(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """A mask on the working grid that loses no marked voxel: where voxels are resampled, the mask first grows to the
    voxels that may represent its own."""
    grown = [1] * len(grid.size)
    for axis, own in enumerate(grid.own_axes):
        if grid.step[axis] != 1:
            grown[own] = 2 * int(np.ceil(grid.step[axis] / 2)) + 1
    return grid.forward(ndimage.maximum_filter(mask, tuple(grown)) if max(grown) > 1 else mask, 0)


def check_settings(data: ConfigDict) -> None:
    """Raises InputError for values of a recipe that can prepare no volume: one message, not one a case."""
    for key, allowed in (
        ("join", ("same", "resample")),
        ("crop", ("none", "region")),
        ("region", ("", "nonzero")),
        ("normalise", ("crop", "region")),
    ):
        _choice(data, key, allowed)
    if data.axes and sorted(WORLD.get(letter, (-1,))[0] for letter in data.axes) != [0, 1, 2]:
        raise InputError(f"--config.data.axes={data.axes!r}: is no orientation: write three letters, as PLS")
    if len(data.spacing) not in (0, len(data.size)) or not all(new > 0 for new in data.spacing):
        raise InputError(f"--config.data.spacing={data.spacing}: give mm for each of {len(data.size)} axes, or nothing")


def _choice(data: ConfigDict, key: str, allowed: tuple[str, ...]) -> None:
    if data[key] not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise InputError(f"--config.data.{key}={data[key]!r}: is unknown: choose one of {words}")


def _check_region(region: np.ndarray | None, name: str, where: str) -> None:
    if region is not None and not region.any():
        raise InputError(f"{name}: its region marks nothing {where}: repair it or leave the case out")


def whole_grid(stored: Image, data: ConfigDict, name: str) -> Grid:
    """The working grid before the crop. Its size is the own size times own spacing / new spacing, rounded."""
    own_size = stored.array.shape[:-1]
    rank = len(own_size)
    own_axes, flipped = tuple(range(rank)), (False,) * rank
    if data.axes:
        if sorted(WORLD.get(letter, (-1,))[0] for letter in data.axes) != [0, 1, 2]:
            raise InputError(f"--config.data.axes={data.axes!r}: is no orientation: write three letters, as PLS")
        if rank != 3 or stored.affine is None:
            raise InputError(
                f"{name}: is no volume with a position, so that data.axes={data.axes} would be guessed: save it as "
                "NIfTI or DICOM series, or keep the file's own axes by --config.data.axes="
            )
        own_axes, flipped = directions(stored.affine, data.axes)
    own = [own_size[axis] for axis in own_axes]
    spacing = None if stored.spacing is None else tuple(stored.spacing[axis] for axis in own_axes)
    full, step = tuple(own), (1.0,) * rank
    if data.spacing:
        if len(data.spacing) != rank or not all(new > 0 for new in data.spacing):
            raise InputError(f"{name}: {rank} axes where data.spacing is {data.spacing}: give mm for each axis")
        if spacing is None:
            raise InputError(f"{name}: tells no spacing: save it as NIfTI, or keep it by --config.data.spacing=()")
        full = tuple(max(1, round(n * old / new)) for n, old, new in zip(own, spacing, data.spacing, strict=True))
        if math.prod(full) > MAX_VOXELS or max(full) > MAX_EDGE:
            what = f"size {tuple(own)} at spacing {spacing} mm becomes {full} at data.spacing={tuple(data.spacing)}"
            raise InputError(f"{name}: {what}, beyond the limit of {MAX_VOXELS} voxels: repair its header or its unit")
        step = tuple(new / old for old, new in zip(spacing, data.spacing, strict=True))
        kept = [m == n and abs(s - 1) * n / 2 <= KEPT_VOXELS for m, n, s in zip(full, own, step, strict=True)]
        step = tuple(1.0 if keep else s for keep, s in zip(kept, step, strict=True))
        spacing = tuple(old * s for old, s in zip(spacing, step, strict=True))
    return Grid(own_size, own_axes, flipped, full, step, (0,) * rank, full, spacing, stored.affine)


def directions(affine: np.ndarray, axes: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """(own axis, whether it is flipped) of each of the directions `axes`, such as "PLS"."""
    nearest = nearest_axes(affine)
    own_axes = tuple(nearest[WORLD[letter][0]] for letter in axes)
    towards = zip(own_axes, (WORLD[letter] for letter in axes), strict=True)
    return own_axes, tuple(bool(affine[world, own] * sign < 0) for own, (world, sign) in towards)


def nearest_axes(affine: np.ndarray) -> tuple[int, ...]:
    """The own axis nearest to each axis of RAS: the assignment, of six, with the largest sum of cosines."""
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return max(itertools.permutations(range(3)), key=lambda own: sum(cosines[world, own[world]] for world in range(3)))


def _side(stored: Image, data: ConfigDict, grid: Grid) -> int | None:
    """The working axis nearest to left-right."""
    if stored.affine is None:
        return None
    own = nearest_axes(stored.affine)[0]
    return grid.own_axes.index(own) if own in grid.own_axes else None  # a 2D slice may lack it


def _midline(grid: Grid, side: int | None, midline: str, name: str) -> int | None:
    """The midline as an index of the working grid between voxels."""
    if not midline:
        return None
    if side is None:
        raise InputError(f"{name}: tells no position, which a midline needs: save it as NIfTI, or empty the midline")
    if midline == "middle":
        index = grid.size[side] // 2
    else:
        own = grid.own_size[grid.own_axes[side]]
        edge = own - float(midline) if grid.flipped[side] else float(midline)
        index = round((edge - own / 2) / grid.step[side] + grid.full[side] / 2) - grid.origin[side]
    if not 0 < index < grid.size[side]:
        raise InputError(f"{name}: midline {midline} is not inside the volume, which both pieces need: repair it")
    return index


def _normalised(
    array: np.ndarray, inside: np.ndarray | None, data: ConfigDict, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x - mean) / std * data.std + data.mean of each channel, and the means and deviations over `inside` (None: all
    voxels)."""
    moments = []
    for c in range(array.shape[-1]):
        values = array[..., c] if inside is None else array[..., c][inside]
        mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        if not std > 1e-6 * np.abs(values).max():  # float32's resolution; a spline of a constant varies by less
            raise InputError(f"{name}: channel {c + 1} is constant or not finite: repair it or leave the case out")
        moments.append((mean, std))
    mean, std = np.array(moments, np.float32).T
    return (array - mean) * (np.float32(data.std) / std) + np.float32(data.mean), mean, std


def chest_box(
    region: np.ndarray,
    spacing: Sequence[float],
    least: Sequence[float],
    most: Sequence[float],
    lesion: np.ndarray | None,
    margin: float,
    axes: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(origin, size) in voxels of the box around `region`, by the rule of MAEMI's code. The box may leave the image.

    Its edges are clamped to `least` and `most` mm: an axis P or A keeps its anterior end, any other axis its centre.
    Where `lesion` sticks out, that side moves to the lesion and `margin` mm further.
    """
    origin, size = [], []
    for axis, mm in enumerate(spacing):
        low, high = _ends(region, axis)
        extent = int(np.clip(high - low, round(least[axis] / mm), round(most[axis] / mm)))
        letter = axes[axis] if axes else ""
        if letter == "A":  # the index grows forwards
            low = high - extent
        elif letter != "P":
            low -= (extent - (high - low)) // 2
        high = low + extent
        if lesion is not None and lesion.any():
            first, last = _ends(lesion, axis)
            low = first - round(margin / mm) if first < low else low
            high = last + round(margin / mm) if last > high else high
        origin.append(low)
        size.append(high - low)
    return tuple(origin), tuple(size)


def _ends(mask: np.ndarray, axis: int) -> tuple[int, int]:
    marked = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
    return int(marked[0]), int(marked[-1]) + 1


def boxes_mask(boxes: Iterable[Sequence[float]], size: tuple[int, ...]) -> np.ndarray:
    """bool (*size) of a manifest's boxes: x0 y0 z0 x1 y1 z1 along i, j, k; in 2D x runs along the columns.

    Boxes are half-open and rounded to voxels. Each box marks at least one voxel.
    """
    mask = np.zeros(size, bool)
    for box in boxes:
        low, high = np.floor(np.reshape(box, (2, len(size))) + 0.5).astype(int)
        low = np.minimum(low, np.array(size[::-1] if len(size) == 2 else size) - 1)
        ends = [slice(a, max(a + 1, b)) for a, b in zip(low, high, strict=True)]
        mask[tuple(ends[::-1] if len(size) == 2 else ends)] = True
    return mask


def read_subtraction(row: Row, volume: Volume, data: ConfigDict, read: ReadFile = read_file) -> np.ndarray:
    """The subtraction image of a row with the series `pre` and `post`, float32 (*size): MAEMI's Eq. 1 without its
    minimum filter.

    Each series is put onto the volume's grid and normalised alone, over the grid or, by `data.normalise`, the region. A
    series on the case's own grid is prepared as the case's channels; any other is resampled by its affine in one cubic
    step. `read` reads one file.

    Raises:
      InputError: the row lacks a series, or one cannot be read or does not overlap the case.
    """
    if not row.pre or not row.post:
        raise InputError(f"{row.id}: names no series before and after contrast: fill the columns pre and post")

    def prepared(path: str) -> np.ndarray:
        image = read_image(path, read)
        if image.array.shape[-1] != 1:
            raise InputError(f"{path}: has {image.array.shape[-1]} channels: name a series of one value a voxel")
        if off_grid(image, volume.stored) is None:
            array = volume.grid.forward(image.array, 3)
        else:
            array = _resampled(image, volume.grid.affine, volume.grid.size, path, row.image[0])
        inside = volume.region if data.normalise == "region" else None
        return _normalised(array, inside, data, path)[0][..., 0]

    return subtraction(prepared(row.pre[0]), (prepared(path) for path in row.post))


def subtraction(pre: np.ndarray, posts: Iterable[np.ndarray]) -> np.ndarray:
    """MAEMI's Eq. 1 without its minimum filter: the mean over k = 1..m of (pre - post_k)^2."""
    squares = [(pre - post) ** 2 for post in posts]
    return np.stack(squares).mean(axis=0, dtype=np.float32)
