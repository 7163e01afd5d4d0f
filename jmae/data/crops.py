"""Random crops of prepared volumes, for training: taken on the device where the set fits there, else on the host."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from math import prod
from pathlib import Path
from threading import Lock

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from jmae.data.loader import SHOWN, Host, code_digest, save_array
from jmae.data.manifest import PHANTOM, Row
from jmae.data.opening import WORKERS
from jmae.data.preparation import case_words, prepared_volume
from jmae.data.volumes import Volume
from jmae.errors import InputError
from jmae.processes import gather
from jmae.windows import room

PARSER = Lock()  # np.load parses headers by `ast`, which Python 3.11 cannot do in several threads at once
SHARE = 0.4  # of a device's memory that a set may take; on the CPU the set is there twice for a moment

# Keys of the recipe's section `data` that a prepared volume and its allowed origins depend on.
PREPARED = """size channels axes spacing join mask_threshold crop crop_least crop_most crop_margin region normalise mean
    std least_region window equalise equalise_exact nonfinite""".split()


def box_sums(marked: Bool[np.ndarray, "*size"], box: tuple[int, ...]) -> Int[np.ndarray, "*places"]:
    """The number of marked voxels in the box at every place where it fits, by its lower corner."""
    sums = marked.astype(np.int64)
    for axis, edge in enumerate(box):
        total = np.insert(np.cumsum(sums, axis), 0, 0, axis)
        n = total.shape[axis]
        sums = np.take(total, range(edge, n), axis) - np.take(total, range(n - edge), axis)
    return sums


def allowed(
    size: tuple[int, ...],
    crop: tuple[int, ...],
    *,
    lesion: Bool[np.ndarray, "*size"] | None = None,
    region: Bool[np.ndarray, "*size"] | None = None,
    least: float = 0.0,
    side: int | None = None,
    midline: int | None = None,
) -> Int[np.ndarray, " n"] | None:
    """The flat numbers of the origins that a crop may have, in C order of the places where it fits; None: all of them.

    Such a crop touches no voxel of `lesion`, has at least a share `least` of its voxels inside `region`, and does not
    cross `midline` on the axis `side`.
    """
    places = tuple(n - c + 1 for n, c in zip(size, crop, strict=True))
    good = np.ones(places, bool)
    if lesion is not None and lesion.any():
        good &= box_sums(lesion, crop) == 0
    if region is not None and least > 0:
        good &= box_sums(region, crop) >= least * prod(crop)
    if side is not None and midline is not None:
        start = np.arange(places[side]).reshape([-1 if axis == side else 1 for axis in range(len(size))])
        good &= (start + crop[side] <= midline) | (start >= midline)
    return None if good.all() else np.flatnonzero(good).astype(np.int32)


class Volumes:
    """The prepared volumes of rows; a sample is a random crop of `data.size`.

    The folder keeps the volumes, which are mapped into memory. A row's crop at a step depends on the seed, the step,
    the row's id and its number in the table; not on the batch, the number of processes, or the device.

    Args:
      crops_on: in place of `data.crops_on`; "" leaves the recipe's.

    Raises:
      InputError: all unusable volumes in one list.
    """

    def __init__(self, rows: Sequence[Row], config: ConfigDict, folder: Path, crops_on: str = ""):
        self.rows, self.crop = list(rows), tuple(config.data.size)
        self.words = np.array([case_words(row.id) for row in rows], np.uint32).reshape(-1, 2)
        self.keys = [int(a) << 32 | int(b) for a, b in self.words]
        if not rows:
            raise InputError("no train rows: give the manifest volumes of split train")
        with ThreadPoolExecutor(WORKERS) as pool:
            made = list(pool.map(partial(self._loaded, data=config.data, folder=folder), rows))
        if problems := [line for line in made if isinstance(line, str)]:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise InputError("\n".join([*problems[:SHOWN], *more]))
        self.arrays, self.origins = zip(*made, strict=True)
        self.crops_on, choices = crops_on or config.data.crops_on, ("auto", "device", "host")
        if self.crops_on not in choices:
            raise InputError(f"data.crops_on is {self.crops_on!r}: one of {', '.join(choices)}")

    @cached_property
    def largest(self) -> tuple[int, ...] | None:
        """The size (*size, c) that holds every volume, where the volumes live on the device; else None.

        With crops_on "auto" they live there if they fit on the devices of every process. Every process must ask for
        this before the processes exchange anything else, as training does.
        """
        largest = tuple(np.max([array.shape for array in self.arrays], axis=0).tolist())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / jax.process_count()
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", memory)
        fits = 4 * len(self.rows) * prod(largest) <= SHARE * limit
        return largest if self.crops_on == "device" or (self.crops_on == "auto" and all(gather(fits))) else None

    def _loaded(self, row: Row, *, data: ConfigDict, folder: Path) -> tuple[np.ndarray, np.ndarray | None] | str:
        """(the padded volume, its allowed origins) from the cache; what is wrong with the row."""
        try:
            parts = cache_volume(row, data, folder, lambda: prepared_volume(row, data))
        except InputError as error:
            return str(error)
        with PARSER:
            array, origins = (np.load(part, mmap_mode="r", allow_pickle=False) for part in parts)
        return array, origins if origins.size else None

    def origin(self, row: int, step: int, seed: int, number: int = 0) -> tuple[int, ...]:
        """A crop's origin, uniform over the allowed ones of a row; `number` is the row's place in a table, which may
        hold the row several times."""
        rng = np.random.Generator(np.random.Philox(key=[seed, self.keys[row]], counter=[0, 0, number, step]))
        places = tuple(n - c + 1 for n, c in zip(self.arrays[row].shape, self.crop, strict=False))
        some = self.origins[row]
        number = int(rng.random() * (prod(places) if some is None else some.size))
        return tuple(int(i) for i in np.unravel_index(number if some is None else int(some[number]), places))

    def samples(self, rows: np.ndarray, numbers: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        """The crop of each row at `step`: "image" (n, *crop, c); or "row" and "origin", for `cut`."""
        origins = np.array([self.origin(row, step, seed, k) for row, k in zip(rows, numbers, strict=True)], np.int32)
        if self.largest:
            return {"row": rows.astype(np.int32), "origin": origins}
        return {"image": np.stack([self.crop_at(row, o) for row, o in zip(rows, origins, strict=True)])}

    def crop_at(self, row: int, origin: Sequence[int]) -> Float[np.ndarray, "*crop c"]:
        """A row's crop by its origin."""
        return self.arrays[row][tuple(slice(o, o + c) for o, c in zip(origin, self.crop, strict=True))]

    @property
    def ready(self) -> bool:
        """Whether a batch needs no work but copying."""
        return self.largest is not None

    def resident(self) -> Float[np.ndarray, "n *size c"] | None:
        """All volumes as one array, padded with zeros, if they are to live on the device."""
        if not self.largest:
            return None
        stack = np.zeros((len(self.rows), *self.largest), np.float32)
        for own, array in zip(stack, self.arrays, strict=True):
            own[tuple(slice(n) for n in array.shape)] = array
        return stack

    def host_arrays(self, index: np.ndarray, make: Host) -> dict[str, np.ndarray]:
        """Nothing: random crops have no arrays that are computed once an image."""
        if make:
            raise ValueError(f"random crops have no {', '.join(make)}")
        return {}


def cache_volume(row: Row, data: ConfigDict, folder: Path, make: Callable[[], Volume]) -> tuple[Path, Path]:
    """The files of a row's padded volume and of its allowed origins in the cache `folder`; `make` prepares the volume
    where they are not there yet.

    The names hold a digest of everything that the files depend on: the row's files by size and time, its cells, the
    recipe's keys `PREPARED`, the code. Raises InputError where no crop fits, or as `make` does.
    """
    named = [file for file in (*row.image, row.mask, row.region) if file and not file.startswith(PHANTOM)]
    files = [f for name in named for f in (sorted(Path(name).iterdir()) if os.path.isdir(name) else [name])]
    state = [(str(f), s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)]]
    ways = {key: data[key] for key in PREPARED}
    about = json.dumps([row.image, state, row.boxes, dict(row.extra), ways, code_digest()], default=str)
    name = f"{row.id}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    parts = folder / f"{name}.npy", folder / f"{name}-origins.npy"
    if not all(part.is_file() for part in parts):
        array, origins = padded(row, make(), data)
        save_array(parts[1], origins)
        save_array(parts[0], array)  # the volume comes last: with it the pair is whole
    return parts


def padded(row: Row, volume: Volume, data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """A prepared volume with room for crops of `data.size`, and the flat numbers of their allowed origins; an empty
    array allows all. Raises InputError where no crop fits."""
    crop = tuple(data.size)
    if data.least_region > 0 and volume.region is None:
        raise InputError(f"{row.id}: names no region for data.least_region: fill it, or data.region=nonzero")
    pad, midline = room(volume.array.shape[:-1], crop, volume.side, volume.midline)
    grow = lambda array: None if array is None else np.pad(array, pad)
    array = np.pad(volume.array, [*pad, (0, 0)])
    origins = allowed(
        array.shape[:-1],
        crop,
        lesion=grow(volume.lesion),
        region=grow(volume.region),
        least=data.least_region,
        side=volume.side,
        midline=midline,
    )
    if origins is not None and not origins.size:
        raise InputError(
            f"{row.id}: no crop of {crop} fits: each touches a lesion, crosses the midline or has less than"
            f" {data.least_region:.0%} of the region: lower data.size or data.least_region, or leave the case out"
        )
    return array, np.empty(0, np.int32) if origins is None else origins


def cut(volumes: Float[Array, "n *size c"], batch: dict[str, Array], crop: tuple[int, ...]) -> dict[str, Array]:
    """The batch with "image", the crops, in place of "row" and "origin", which name them."""
    one = lambda row, origin: jax.lax.dynamic_slice(volumes, (row, *origin, 0), (1, *crop, volumes.shape[-1]))[0]
    image = jax.vmap(one)(batch["row"], batch["origin"])
    return {name: batch[name] for name in batch.keys() - {"row", "origin"}} | {"image": image}
