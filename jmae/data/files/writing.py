"""Maps on the grid of an image."""

import gzip
import os
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np
import tifffile

from jmae.data.files.grids import Geometry, Image
from jmae.data.files.guard import one_line
from jmae.errors import InputError


def write_map(path_without_suffix: str | os.PathLike, array: np.ndarray, like: Image | Geometry) -> Path:
    """Writes a map `(*size[, c])` on the grid of `like`: .nii.gz for volumes, .tif for 2D.

    Values are float32; those of a bool mask are 0 and 1 in 8 bits.

    Several channels are the fourth axis of the NIfTI file, or the TIFF's samples; one channel is no axis. A volume from
    NIfTI keeps sform, qform, their codes and units. A volume from another file gets the affine as scanner coordinates.
    Without an affine both codes stay 0 ("position unknown"). The file gets its name only when it is whole.

    Raises:
      InputError: the file cannot be written.
    """
    size = like.size
    if array.shape not in (size, (*size, array.shape[-1])):
        raise ValueError(f"map of shape {array.shape} for an image of size {size}")
    array = np.asarray(array, np.uint8 if array.dtype == bool else np.float32)
    array = array[..., 0] if array.shape == (*size, 1) else array
    path = Path(f"{os.fspath(path_without_suffix)}{'.tif' if len(size) == 2 else '.nii.gz'}")
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        try:
            with open(part, "xb") as file:
                if len(size) == 2:
                    planes = "contig" if array.ndim == 3 else None
                    tifffile.imwrite(file, array, photometric="minisblack", planarconfig=planes, metadata=None)
                else:  # neither name nor time in the gzip header: equal maps are equal files
                    with gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as packed:
                        _nifti_map(array, like).to_stream(packed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            one_line(path, f"not written ({error.strerror or error}): free space or choose another folder")
        ) from error
    return path


def _nifti_map(array: np.ndarray, like: Image | Geometry) -> nib.Nifti1Image:
    kind = nib.Nifti1Image if max(array.shape) < 2**15 else nib.Nifti2Image
    header = kind.header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    if like.header is not None:
        srow, quatern, offset = "srow_x srow_y srow_z", "quatern_b quatern_c quatern_d", "qoffset_x qoffset_y qoffset_z"
        for field in f"pixdim xyzt_units sform_code qform_code {srow} {quatern} {offset}".split():
            header[field] = like.header[field]
        if array.ndim == 4:
            header["pixdim"][4] = 1  # of channels; the source's may be a time
    elif like.affine is not None:
        header.set_sform(like.affine, code=1)
        header.set_qform(like.affine, code=1)
        if not np.allclose(header.get_qform(), like.affine, atol=1e-3):
            header.set_qform(None, code=0)  # a quaternion holds no shear
    elif like.spacing is not None:
        header.set_zooms((*like.spacing, *(1,) * (array.ndim - 3)))
    return kind(array, None, header)
