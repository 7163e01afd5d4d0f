"""A picture of an image as stored, for people to look at."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pillow

from jmae.data.files import Image

FILM_SIDE = 512  # pixels of a film along its longer edge, at most


def film_of(stored: Image, window: Sequence[float] = ()) -> bytes:
    """Draws a stored image as a JPEG with at most `FILM_SIDE` pixels along its longer edge.

    Black is the 1st percentile of its values, white the 99th. Three channels are red, green and blue; of another number
    the first channel is drawn.

    Args:
      stored: the image, with two axes.
      window: (low, high), to which values are clipped before; () clips none.
    """
    channels = range(3 if stored.array.shape[-1] == 3 else 1)
    finite = [np.nan_to_num(stored.array[..., c], posinf=0, neginf=0) for c in channels]
    low, high = window or (-np.inf, np.inf)
    small = np.stack([shrink(np.clip(one, low, high), FILM_SIDE) for one in finite], -1)
    dark, bright = np.percentile(small, (1, 99))
    unit = np.clip((small - dark) / ((bright - dark) or 1), 0, 1)
    grey = (255 * unit).round().astype(np.uint8)
    pillow.fromarray(grey if len(channels) > 1 else grey[..., 0]).save(buffer := io.BytesIO(), "JPEG", quality=85)
    return buffer.getvalue()


def shrink(array: NDArray, side: int) -> NDArray:
    """Reduce a picture (h, w) to at most `side` pixels along the longer axis, by area means. Never enlarges."""
    h, w = array.shape
    factor = min(1, side / max(h, w))
    size = max(1, round(w * factor)), max(1, round(h * factor))
    floats = pillow.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(floats if factor == 1 else floats.resize(size, pillow.Resampling.BOX))
