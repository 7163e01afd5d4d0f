"""An image as stored, and whether two images lie on one grid."""

import itertools
from typing import NamedTuple

import nibabel as nib
import numpy as np

from jmae.errors import InputError

OFF_GRID_VOXELS = 0.1  # two grids are one if no corner moves by more than this


class Geometry(NamedTuple):
    """The grid of an image without its values: what a map needs to lie on that grid."""

    size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None
    header: nib.Nifti1Header | None = None


class Image(NamedTuple):
    """One case as stored.

    `array` is float32, C-contiguous, `(*size, channels)`. It holds the stored values after DICOM rescale, NIfTI scaling
    and the inversion of MONOCHROME1 and TIFF white-is-zero. 2D images are (rows, columns), also those from NIfTI and
    NRRD. Volumes keep the file's own (i, j, k); a DICOM series is (columns, rows, slices). NaN and Inf stay; a file
    without one finite value is refused.
    """

    array: np.ndarray
    spacing: tuple[float, ...] | None  # mm per axis of `size`; for projection DICOM at the detector
    affine: np.ndarray | None  # (4, 4) voxel -> RAS mm; None where the file tells no position, never made up
    bits: int | None  # 8 or 16 where the values fill that unsigned range: PNG, JPEG, TIFF, integer arrays, 8-bit DICOM
    header: nib.Nifti1Header | None = None  # of a NIfTI input: a map takes its geometry from it, code by code
    sequences: tuple["Image", ...] = ()  # as read, where their grids differ; `array` has them on the first grid

    @property
    def size(self) -> tuple[int, ...]:
        """The array's shape without channels."""
        return self.array.shape[:-1]

    @property
    def geometry(self) -> Geometry:
        """The grid without the values."""
        return Geometry(self.size, self.spacing, self.affine, self.header)


class OffGrid(InputError):
    """Two files of a case lie on different grids."""


def off_grid(image: Image | Geometry, other: Image | Geometry) -> str | None:
    """How the grid of `image` differs from that of `other`, as the start of a sentence; None if they are one grid."""
    if image.size != other.size:
        return f"size {image.size} differs from {other.size} of"
    if image.affine is not None and other.affine is not None:
        ends = [(0, n - 1) for n in (*image.size, 1)[:3]]
        corners = np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
        moved_mm = np.linalg.norm(((image.affine - other.affine) @ corners)[:3], axis=0).max()
        if moved_mm > OFF_GRID_VOXELS * min(other.spacing or (1,)):
            return f"its corners lie up to {moved_mm:.3g} mm away from those of"
    elif image.spacing and other.spacing and not np.allclose(image.spacing, other.spacing, rtol=0.01):
        return f"spacing {image.spacing} differs from {other.spacing} of"
    return None


def turned(image: Image, like: Image | Geometry) -> Image:
    """The volume with its axes in the order and directions of `like`, where the affines say that both have the same
    axes; otherwise the volume as it is.

    A DICOM series and a NIfTI file of one scan differ so. No value changes.
    """
    if image.affine is None or like.affine is None or len(image.size) != 3 or len(like.size) != 3:
        return image
    steps = np.linalg.inv(like.affine)[:3, :3] @ image.affine[:3, :3]  # voxels of `like` per voxel of `image`
    order = np.abs(steps).argmax(1)  # the image's axis along each axis of `like`
    signs = np.sign(steps[range(3), order])
    if sorted(order) != [0, 1, 2] or np.abs(steps - np.eye(3)[order] * signs[:, None]).max() > 0.1:
        return image
    if (order == np.arange(3)).all() and (signs > 0).all():
        return image
    flips = tuple(slice(None, None, int(sign)) for sign in signs)
    array = np.ascontiguousarray(image.array.transpose(*order, 3)[flips])
    ends = np.where(signs < 0, np.array(array.shape[:3]) - 1, 0)
    change = np.zeros((4, 4))
    change[order, range(3)], change[order, 3], change[3, 3] = signs, ends, 1
    spacing = image.spacing and tuple(image.spacing[axis] for axis in order)
    return image._replace(array=array, affine=image.affine @ change, spacing=spacing, header=None)
