"""Changes that leave an image a copy of itself, {name: function of (rows, columns, c)}."""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import rotate, zoom


def _cut(array: np.ndarray, share: float) -> np.ndarray:
    """The image without `share` of its rows and columns, as much at either end."""
    rows, columns = (round(n * share / 2) for n in array.shape[:2])
    return array[rows : array.shape[0] - rows, columns : array.shape[1] - columns]


def _jpeg(array: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(array[..., 0].round().astype(np.uint8)).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file), np.float32)[..., None]


CHANGES = {
    "identical": lambda array: array,
    "smaller": lambda array: zoom(array, (0.6, 0.6, 1), order=1),
    "JPEG": _jpeg,
    "darker": lambda array: 0.5 * array + 3,
    "cut by 5 %": lambda array: _cut(array, 0.05),
    "cut by 10 %": lambda array: _cut(array, 0.10),
    "mirrored": lambda array: array[:, ::-1],
    "upside down": lambda array: array[::-1],
    "turned by 90 degrees": lambda array: np.rot90(array),
    "turned by 3 degrees": lambda array: rotate(array, 3, reshape=False, order=1, mode="nearest"),
    "inverted": lambda array: array.max() - array,
}
