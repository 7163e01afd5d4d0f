"""Image files to arrays on their own grid, and maps back onto that grid.

The format is told by content, never by name. A reader looks at the header first, and refuses a file that claims more
than it holds before memory is asked for. It reads gzip, zip and PNG streams to their end, so that their checksums are
compared. Whatever is wrong becomes one `InputError` of the form "PATH: what: remedy".

- `guard`: checks of headers, streams and errors
- `pictures`: PNG, JPEG, TIFF
- `dicom`: single files and series
- `arrays`: NIfTI, NRRD, .npy, .npz
- `grids`: an image and its grid
- `reading`, `writing`: the format of a file; maps
"""

from jmae.data.files.dicom import is_dicom
from jmae.data.files.grids import Geometry, Image, OffGrid, off_grid, turned
from jmae.data.files.guard import MAX_VOXELS
from jmae.data.files.pictures import one_grey
from jmae.data.files.reading import (
    ReadFile,
    image_size,
    marks_of,
    on_grid,
    read_file,
    read_image,
    read_marks,
    read_mask,
)
from jmae.data.files.writing import write_map

__all__ = [
    "MAX_VOXELS",
    "Geometry",
    "Image",
    "OffGrid",
    "ReadFile",
    "image_size",
    "is_dicom",
    "marks_of",
    "off_grid",
    "on_grid",
    "one_grey",
    "read_file",
    "read_image",
    "read_marks",
    "read_mask",
    "turned",
    "write_map",
]
