"""From rows to batches. Images that fit in memory are decoded once; grain orders the samples and fetches them ahead."""

import hashlib
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from jmae.data.files import Image
from jmae.data.manifest import SPLITS, Row
from jmae.data.opening import WORKERS
from jmae.data.preparation import case_words, prepared_image, stored_image
from jmae.errors import InputError
from jmae.tables import csv_text

SHOWN = 20  # unusable images that are spelled out
RETRIES = (0.1, 1.0, 0.0)  # seconds after each try to read a file in mid-training
QUARANTINED = 0.01  # share of the rows that may turn bad in mid-training

Host = Mapping[str, Callable[[np.ndarray], np.ndarray]]  # functions of an image that the host computes once, by name


@runtime_checkable
class Samples(Protocol):
    """What a stage is trained on: `Images`, or the `crops.Volumes`."""

    rows: list[Row]
    words: np.ndarray  # (n, 2): `case_words` of each row

    @property
    def ready(self) -> bool:
        """Whether a batch needs no work but copying."""

    def samples(self, rows: np.ndarray, numbers: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        """A sample of each row for a step: its "image", or the numbers that find it in `resident`. `numbers` are the
        rows' places in the table."""

    def resident(self) -> np.ndarray | None:
        """The array of the set that lives on the device; None where nothing does."""

    def host_arrays(self, index: np.ndarray, make: Host) -> dict[str, np.ndarray]:
        """The arrays that the functions `make` compute of each image."""


class ImageStore:
    """Images as the networks see them, each decoded once where all fit in a quarter of the memory.

    Where not all fit, whole splits are kept in the order of `SPLITS`, training first: its images are read most often.
    Several processes share that quarter, as if all were on one host.
    """

    def __init__(self, rows: Sequence[Row], data: ConfigDict):
        self.data = data
        shape = (*data.size, data.channels)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.process_count()
        fits = int(memory / 4 / (4 * np.prod(shape, dtype=float)))
        self.slots: dict[str, int] = {}
        for split in SPLITS:
            own = dict.fromkeys(row.id for row in rows if row.split == split)
            if len(self.slots) + len(own) > fits:
                break
            self.slots |= {name: len(self.slots) + i for i, name in enumerate(own)}
        self.arrays = np.empty((len(self.slots), *shape), np.float32)
        self.filled = np.zeros(len(self.slots), bool)

    def put(self, row: Row, stored: Image) -> None:
        """Prepares a stored image and keeps it where it has a place; raises InputError as `prepared_image`."""
        if row.id in self.slots and not self.filled[self.slots[row.id]]:
            self.arrays[self.slots[row.id]] = prepared_image(row, self.data, stored)
            self.filled[self.slots[row.id]] = True

    def get(self, row: Row) -> np.ndarray | None:
        """A row's image, float32 (*size, channels); None where it is not there."""
        slot = self.slots.get(row.id)
        return self.arrays[slot] if slot is not None and self.filled[slot] else None

    def fill(self, rows: Sequence[Row]) -> None:
        """Decodes the images of rows that have a place in memory and are not there yet; raises InputError with all
        unusable ones."""

        def problem(row: Row) -> str:
            try:
                self.put(row, stored_image(row))
            except InputError as error:
                return str(error)
            return ""

        missing = [row for row in rows if row.id in self.slots and not self.filled[self.slots[row.id]]]
        with ThreadPoolExecutor(WORKERS) as pool:
            problems = [line for line in pool.map(problem, missing) if line]
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise InputError("\n".join([*problems[:SHOWN], *more]))


class Images:
    """The images of rows, from a store that decodes each of them once where memory allows.

    Raises InputError with all unusable images in one list; an image that is decoded at use is named then.
    """

    def __init__(
        self, rows: Sequence[Row], config: ConfigDict, folder: Path | None = None, store: ImageStore | None = None
    ):
        self.rows = list(rows)
        self.size, self.channels, self.data = tuple(config.data.size), config.data.channels, config.data
        self.words = np.array([case_words(row.id) for row in rows], np.uint32).reshape(-1, 2)
        self.folder = folder  # of host arrays
        self.store = ImageStore(rows, config.data) if store is None else store
        self.store.fill(rows)
        self.slots = np.array([self.store.slots.get(row.id, -1) for row in rows], int)
        self.quarantine: dict[str, str] = {}  # id -> what was wrong, of files that turned bad since the start
        self.lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether a batch needs no work but copying."""
        return bool((self.slots >= 0).all())

    def at(self, size: tuple[int, ...]) -> "Images":
        """The images at another size, which are decoded again."""
        data = self.data.copy_and_resolve_references()
        data.size = size
        return Images(self.rows, ConfigDict({"data": data}), self.folder)

    def image(self, index: np.ndarray) -> np.ndarray:
        """Images (n, *size, c) of rows by number."""
        slots = self.slots[index]
        if (slots >= 0).all():
            return self.store.arrays[slots]
        one = lambda i, slot: self.store.arrays[slot] if slot >= 0 else self._decoded(int(i))
        return np.stack([one(i, slot) for i, slot in zip(index, slots, strict=True)])

    def _decoded(self, i: int) -> np.ndarray:
        """The image of a row that is decoded at every use. A file that has vanished or turned bad is tried three times,
        then quarantined: the next row of its split and label takes its place from then on.

        Raises InputError where more than `QUARANTINED` of the rows are quarantined.
        """
        of = lambda row: (row.split, row.label)
        for row in (*self.rows[i:], *self.rows[:i]):
            if row.id in self.quarantine or of(row) != of(self.rows[i]):
                continue
            for wait in RETRIES:
                try:
                    return prepared_image(row, self.data)
                except InputError as error:
                    problem = str(error)
                    time.sleep(wait)
            with self.lock:
                self.quarantine[row.id] = problem
                if len(self.quarantine) > QUARANTINED * len(self.rows):
                    raise InputError(
                        f"{problem}; tried {len(RETRIES)} times. {len(self.quarantine)} of {len(self.rows)} rows can "
                        f"no longer be read, above {QUARANTINED:.0%}: restore the files, and run the same command again"
                    )
                lines = [{"id": name, "reason": reason} for name, reason in self.quarantine.items()]
                where = f" ({self.folder.parent / 'quarantine.csv'})" if self.folder else ""
                print(f"warning: {problem}; its row is quarantined{where}", file=sys.stderr, flush=True)
                if self.folder:
                    self.folder.parent.mkdir(parents=True, exist_ok=True)
                    (self.folder.parent / "quarantine.csv").write_text(csv_text(lines), encoding="utf-8")
        raise InputError(f"{self.rows[i].id}: no row of its split can be read any more: restore the files")

    def samples(self, rows: np.ndarray, numbers: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        """The images of rows for a batch, the same at every step."""
        return {"image": self.image(rows)}

    def resident(self) -> None:
        """None: images do not live on the device."""

    def host_arrays(self, index: np.ndarray, make: Host) -> dict[str, np.ndarray]:
        """What each function of `make` computes of each image, in the order of `index`.

        The run folder keeps the arrays under a digest of the images, of the library's code and of the function's
        module, so that each is computed once.
        """
        return {name: self._host_array(index, name, function) for name, function in make.items()}

    def _host_array(self, index: np.ndarray, name: str, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        single = lambda i: self.image(np.array([i]))[0]
        key = hashlib.sha256(f"{function_name(function)} {code_digest()}".encode())
        for i in index:
            key.update(single(i).tobytes())
        file = self.folder / f"{name}-{key.hexdigest()[:16]}.npy" if self.folder else None
        with suppress(FileNotFoundError, ValueError):  # not there yet, or torn: computed (again)
            if file:
                with file.open("rb") as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
        with ThreadPoolExecutor(WORKERS) as pool:
            array = np.stack(list(pool.map(lambda i: function(single(i)), index)))
        if file:
            save_array(file, array)
        return array


def function_name(function: Callable[..., Any]) -> str:
    """What tells a function from others: its name with its bound arguments and the digest of its module's source."""
    bound = ""
    while isinstance(function, partial):
        bound += f" {function.args} {function.keywords}"
        function = function.func
    source = inspect.getsourcefile(function) or ""
    text = Path(source).read_bytes() if os.path.isfile(source) else b""
    return f"{function.__module__}.{function.__qualname__}{bound} {hashlib.sha256(text).hexdigest()}"


@cache
def code_digest() -> str:
    """The SHA-256 of the source of jmae and of the versions of the libraries that it computes with.

    So a cache never gives what other code has computed.
    """
    folder = Path(__file__).parents[1]
    versions = [metadata.version(name) for name in ("numpy", "scipy", "scikit-image")]
    digest = hashlib.sha256(" ".join(versions).encode())
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def save_array(file: Path, array: np.ndarray) -> None:
    """Writes a .npy file, which gets its name only when it is whole; raises InputError where that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.{os.getpid()}.{jax.process_index()}.npy")  # hosts may have equal numbers
    try:
        np.save(part, array)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{file}: not written ({error.strerror or error}): free space or change --workdir") from None


def batches(
    images: Samples,
    tables: Sequence[np.ndarray],
    *,
    batch: int,
    seeds: Sequence[int],
    shuffle: bool,
    host: Host,
) -> grain.DatasetIterator:
    """An endless iterator of batches over index tables, one table for each replicate; its state is its position.

    A batch holds image (b, *size, c); index (b,), the sample's number in its table; case (b, 2), the `case_words`; and
    the host arrays. With several tables all these arrays have a leading axis of replicates. With `shuffle` every epoch
    has a new order by seed and drops its last incomplete batch; otherwise rows come in order, round and round. A table
    shorter than a batch is repeated to fill one. Each process reads its own part of every batch.

    Raises:
      InputError: the batch does not divide among the processes.
    """
    process, processes = jax.process_index(), jax.process_count()
    if batch % processes:
        raise InputError(f"batch {batch} is not divisible by {processes} processes: change the batch size")
    own = slice(process * batch // processes, (process + 1) * batch // processes)
    tables = [np.tile(t, -(-batch // len(t))) for t in tables]  # once, unless the table is shorter than a batch
    used = np.unique(np.concatenate(tables))
    arrays = images.host_arrays(used, host)

    def order(table: np.ndarray, seed: int) -> grain.MapDataset:
        numbers = grain.MapDataset.range(len(table))
        if shuffle:
            return numbers.seed(seed).shuffle().batch(batch, drop_remainder=True).repeat()
        return numbers.repeat().batch(batch, drop_remainder=True)

    def part(table: np.ndarray, number: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        row = table[number]
        extra = {name: array[np.searchsorted(used, row)] for name, array in arrays.items()}
        return {
            **images.samples(row, number, step, seed),
            "index": number.astype(np.int32),
            "case": images.words[row],
            **extra,
        }

    def gather(step: int, numbers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        each = zip(tables, numbers, seeds, strict=True)
        parts = [part(table, number[own], step, seed) for table, number, seed in each]
        return parts[0] if len(parts) == 1 else {name: np.stack([p[name] for p in parts]) for name in parts[0]}

    orders = [order(table, seed) for table, seed in zip(tables, seeds, strict=True)]
    zipped = grain.experimental.ZipMapDataset(orders).map_with_index(gather)
    threads = 2 if images.ready else WORKERS
    return iter(zipped.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))
