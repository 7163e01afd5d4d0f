"""The cases of a command. Each file that its rows name is opened once, checked, and prepared.

`load_cases` opens every file of a manifest. What the command needs later is kept from that one decoding. Images are
kept as the networks see them, and masks as packed bits. Training volumes go into the cache of the run folder. Volumes
to score go into a temporary file, and so do the films that the report draws.
"""

import os
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jmae import recipe
from jmae.data import duplicates, phantoms
from jmae.data.crops import Volumes, cache_volume
from jmae.data.files import Image
from jmae.data.loader import Images, ImageStore, Samples
from jmae.data.manifest import Finding, Row, dispensable, first, folded, leaks, summary
from jmae.data.opening import WORKERS, lines_of, open_each
from jmae.data.preparation import (
    Opened,
    Prepared,
    open_case,
    prepared_case,
    prepared_image,
    prepared_volume,
    soft_masks,
    stored_case,
    usable,
)
from jmae.data.rows import NO_DATA, kept_apart, parsed_manifest, refuse_problems
from jmae.data.unlabeled import labels_given, unlabeled_labels, with_anomaly_ratio
from jmae.errors import InputError
from jmae.likeness import Traits, traits_of
from jmae.tables import counted


class Bits(NamedTuple):
    """A mask as packed bits."""

    shape: tuple[int, ...]
    packed: bytes

    @classmethod
    def of(cls, mask: np.ndarray | None) -> "Bits | None":
        """The bits of a mask."""
        return None if mask is None else cls(mask.shape, zlib.compress(np.packbits(mask).tobytes(), 1))

    def mask(self) -> np.ndarray:
        """The mask, bool of `shape`."""
        n = int(np.prod(self.shape))
        return np.unpackbits(np.frombuffer(zlib.decompress(self.packed), np.uint8), count=n).reshape(self.shape) != 0


class KeptCase(NamedTuple):
    """A case that waits to be scored, while its arrays are packed or lie in a file."""

    case: Prepared  # without arrays
    masks: dict[str, Bits | None]
    arrays: dict[str, Callable[[], np.ndarray | None]]  # a function that reads each array

    @classmethod
    def of(cls, case: Prepared, arrays: dict[str, Callable[[], np.ndarray | None]]) -> "KeptCase":
        """Takes the arrays out of a case. `arrays` read them again: "array", and of a volume "stored" and
        "subtraction"."""
        masks = {"lesion": case.lesion, "region": case.region, "missing": case.missing}
        empty: dict[str, Any] = {**dict.fromkeys(masks), "array": _NOTHING, "stored": None, "subtraction": None}
        if volume := case.volume:
            masks |= {"volume lesion": volume.lesion, "volume region": volume.region}
            stored = volume.stored._replace(array=_NOTHING)
            empty["volume"] = volume._replace(array=_NOTHING, lesion=None, region=None, stored=stored)
        return cls(replace(case, **empty), {name: Bits.of(mask) for name, mask in masks.items()}, arrays)

    def whole(self, row: Row) -> Prepared:
        """The case with its arrays. `row` replaces its row, whose leak may have been marked since."""
        arrays: dict[str, Any] = {name: read() for name, read in self.arrays.items()}
        masks: dict[str, Any] = {name: bits and bits.mask() for name, bits in self.masks.items()}
        if volume := self.case.volume:
            arrays["stored"] = volume.stored._replace(array=np.asarray(arrays["stored"], np.float32))
            lesion, region = masks.pop("volume lesion"), masks.pop("volume region")
            found = {"array": arrays["array"], "stored": arrays["stored"], "lesion": lesion, "region": region}
            arrays["volume"] = volume._replace(**found)
        return replace(self.case, row=row, **arrays, **masks)


class ArrayFile:
    """A temporary file of arrays, which is gone when the process ends, however it ends."""

    def __init__(self, folder: Path | None):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            self.descriptor, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
        except OSError as error:
            raise InputError(f"{folder}: not written ({error.strerror or error}): make it writable") from None
        weakref.finalize(self, os.close, self.descriptor)
        self.end, self.lock = 0, threading.Lock()
        self.folder = folder or Path(tempfile.gettempdir())

    def add(self, array: np.ndarray | None) -> Callable[[], np.ndarray | None]:
        """Writes an array; returns the function that reads it. Raises InputError where the disk is full."""
        if array is None:
            return lambda: None
        data = np.ascontiguousarray(array)
        with self.lock:
            start, self.end = self.end, self.end + data.nbytes
        view, done = _bytes_of(data), 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self.descriptor, view[done:], start + done)
        except OSError as error:
            raise InputError(f"{self.folder}: not written ({error.strerror or error}): free space there") from None

        def read() -> np.ndarray:
            out = np.empty(data_shape, data_type)
            view, done = _bytes_of(out), 0
            while done < out.nbytes:
                if not (n := os.preadv(self.descriptor, [view[done:]], start + done)):
                    raise EOFError(f"temporary file in {self.folder} is too short")
                done += n
            return out

        data_shape, data_type = data.shape, data.dtype
        return read


class Cases:
    """The rows of a command, and what has been read of each. A row is known by its id.

    A row that the check did not open (phantoms, rows of other splits) is read when it is asked for.

    Args:
      rows: rows of a manifest or a phantom set.
      config: the recipe.
      folder: the run folder's cache; None puts what does not fit in memory into the system's temporary folder.
      scored: splits whose rows may be scored.
      trained: ids of the rows that training reads; None: those of split `train`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: ConfigDict,
        folder: Path | None = None,
        *,
        scored: Collection[str] = ("val", "test"),
        trained: Collection[str] | None = None,
    ):
        self.rows, self.config, self.folder = list(rows), config, folder
        self.scored = scored
        self.trained = {row.id for row in rows if row.split == "train"} if trained is None else set(trained)
        used = [row for row in rows if row.id in self.trained or row.split in (*scored, "train")]
        self.store: ImageStore | None = None if recipe.is_volume(config) else ImageStore(used, config.data)
        self.traits: dict[str, Traits] = {}  # of the opened cases that training reads, by id
        self.unread: list[str] = []  # what is wrong with each new scan that is left out
        self._kept: dict[str, KeptCase] = {}
        self._file: ArrayFile | None = None
        self._lock = threading.Lock()

    def take(self, row: Row, case: Opened) -> None:
        """Keeps what the command needs of an opened case. Raises InputError where the case cannot be used."""
        data = self.config.data
        usable(row, case.image, data)
        if not case.complete:
            return
        if row.id in self.trained:
            self.traits[row.id] = traits_of(case.image, data.get("axes", ""))
        if self.store:
            self.store.put(row, case.image)
            if row.split in self.scored:
                one = prepared_case(row, data, case, array=self._image(row, case.image))
                shown = row.split != "val" or set(self.scored) == {"val"}  # else `val` only calibrates
                film = self._kept_bytes(one.film()) if one.film and shown else None
                one = replace(one, film=film)
                self._kept[row.id] = KeptCase.of(one, {"array": partial(self._image, row)})
            return
        volume = cache(lambda: prepared_volume(row, data, case))
        if row.id in self.trained and self.folder:
            cache_volume(row, data, self.folder, volume)
        if row.split in self.scored:
            one = prepared_case(row, data, case, volume=volume())
            arrays = {
                "array": one.array,
                "stored": smallest_type(volume().stored.array),
                "subtraction": one.subtraction,
            }
            file = self._array_file()
            self._kept[row.id] = KeptCase.of(one, {name: file.add(array) for name, array in arrays.items()})

    def _kept_bytes(self, content: bytes) -> Callable[[], bytes]:
        kept = self._array_file().add(np.frombuffer(content, np.uint8))
        return lambda: np.asarray(kept()).tobytes()

    def _array_file(self) -> ArrayFile:
        with self._lock:
            self._file = self._file or ArrayFile(self.folder)
            return self._file

    def case(self, row: Row) -> Prepared:
        """A row's case, ready to be scored. Raises InputError where it is read only now and cannot be used."""
        if row.id in self._kept:
            return self._kept[row.id].whole(row)
        return prepared_case(row, self.config.data, open_case(row, self.config.data))

    def _image(self, row: Row, stored: Image | None = None) -> np.ndarray:
        """A row's image as the networks see it, from memory where it has a place there."""
        found = self.store.get(row) if self.store else None
        return prepared_image(row, self.config.data, stored) if found is None else found

    def images(self, rows: Sequence[Row]) -> Images:
        """The images of some of the rows, for training or scoring."""
        return Images(rows, self.config, self.folder, self.store)

    def volumes(self, rows: Sequence[Row], crops_on: str = "") -> Volumes:
        """The volumes of some of the rows, for training on crops; `crops_on` as of `Volumes`."""
        self.folder = self.folder or Path(tempfile.mkdtemp(prefix="jmae-"))
        return Volumes(rows, self.config, self.folder, crops_on)

    def samples(self, rows: Sequence[Row], crops_on: str = "") -> Samples:
        """The images or volumes of some of the rows, for training."""
        return self.volumes(rows, crops_on) if recipe.is_volume(self.config) else self.images(rows)


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer


_NOTHING = np.empty((0, 0, 0, 0), np.float32)


def smallest_type(array: np.ndarray) -> np.ndarray:
    """The array as uint8, uint16 or int16 where that is exact, else as it is: scanners store whole numbers."""
    low, high = array.min(), array.max()
    for kind in (np.uint8, np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            small = array.astype(kind)
            return small if (small == array).all() and not np.signbit(array[array == 0]).any() else array
    return array


def load_rows(config: ConfigDict, log: Callable[[str], None] = print) -> list[Row]:
    """The rows of `load_cases`."""
    return load_cases(config, log).rows


def load_cases(
    config: ConfigDict,
    log: Callable[[str], None] = print,
    *,
    folder: Path | None = None,
    scored: Collection[str] = ("val", "test"),
    trained: Callable[[Sequence[Row]], Sequence[Row]] | None = None,
) -> Cases:
    """The cases that `config.data` names: a phantom set, or a manifest whose every file is opened once.

    Two splits that share a patient, a file, or an image under two names are refused. With `data.allow_leaks` such a
    leak is a warning, and its rows are marked.

    Args:
      config: the recipe.
      log: called with each line that a user should read.
      folder, scored: as `Cases` takes them.
      trained: gives the rows that training reads; None: those of split `train`.

    Raises:
      InputError: all problems in one list.
    """
    data = config.data
    if data.manifest:
        cases = _from_manifest(config, log, folder, scored, trained)
    elif data.phantom:
        rows = phantoms.rows(data.phantom)
        rows = kept_apart(rows, data.calibration) if data.calibration else rows
        log(f"phantoms {data.phantom}: {summary(rows)}")
        cases = Cases(rows, config, folder, scored=scored, trained=_ids(trained, rows))
    else:
        raise InputError(NO_DATA)
    if data.calibration:
        kept = counted(sum(row.kept for row in cases.rows), "train rows")
        log(f"data.calibration: {kept} kept apart, as normals of val")
    if data.get("unlabeled_labels"):
        unlabeled_labels(config, cases.rows)  # an error in that file is told now, not when the labels are used
    if data.get("anomaly_ratio", -1) >= 0 and labels_given(config):
        cases.rows = with_anomaly_ratio(cases.rows, config)
    return cases


def _ids(trained: Callable[[Sequence[Row]], Sequence[Row]] | None, rows: Sequence[Row]) -> set[str] | None:
    return None if trained is None else {row.id for row in trained(rows)}


def _from_manifest(
    config: ConfigDict,
    log: Callable[[str], None],
    folder: Path | None,
    scored: Collection[str],
    trained: Callable[[Sequence[Row]], Sequence[Row]] | None,
) -> Cases:
    data = config.data
    rows, ignored, problems = parsed_manifest(config)
    written = rows
    if data.calibration and not problems:
        rows = kept_apart(rows, data.calibration)  # first: the search for leaks needs the final splits
    cases = Cases(rows, config, folder, scored=scored, trained=_ids(trained, rows))
    now = {row.id: row for row in rows}
    colour, soft = list[str](), list[str]()
    prints: dict[str, duplicates.Fingerprint] = {}

    def use(row: Row, case: Opened) -> None:
        prints[row.id] = duplicates.fingerprint(case.image.array)
        shape = case.image.array.shape
        colour.extend([row.id] * (len(shape) == 3 and shape[-1] == 3 and data.channels == 1))
        soft.extend([row.id] * case.soft)
        cases.take(now[row.id], case)

    found = open_each(written, workers=WORKERS, use=use, data=data)
    unread = [one.rows[0] for one in found if one.kind == "unreadable" and not readable(one.rows[0], data)]
    spared = dispensable(rows, unread)
    cases.unread = lines_of(one for one in found if one.rows[0].id in spared)
    of_files = lines_of(one for one in found if one.rows[0].id not in spared)
    leaking = [*leaks(rows), *duplicates.in_two_splits(rows, prints)]  # a damaged scan can tell its patient, too
    refuse_problems(config, [*problems, *folded(of_files, len(written))], leaking)
    rows = [row for row in rows if row.id not in spared]
    for line in folded(cases.unread):
        log(f"warning: left out, as it cannot be read: {line}")
    rows = [row._replace(content=prints[row.id].digest.hex()[:16]) if row.id in prints else row for row in rows]
    if colour:
        what = f"made grey: {counted(len(colour), 'colour images')}"
        log(f"{what}: --config.data.channels=3 keeps colour where a recipe can")
    if soft:
        log(soft_masks(len(soft), data.mask_threshold))
    for line in first([f"warning: {one.what}" for one in leaking]):
        log(line)
    cases.rows = marked(rows, leaking)
    log(f"{data.manifest}: {summary(cases.rows, ignored)}")
    return cases


def readable(row: Row, data: ConfigDict) -> bool:
    """Whether the image of a row can be read."""
    try:
        stored_case(row, data)
    except InputError:
        return False
    return True


def marked(rows: Sequence[Row], leaking: Sequence[Finding]) -> list[Row]:
    """The rows; `Row.leak` of each row of a leak says what leaks."""
    what: dict[str, list[str]] = {}
    for one in leaking:
        for row in one.rows:
            what.setdefault(row.id, []).append(one.what)
    return [row._replace(leak="; ".join(what[row.id])) if row.id in what else row for row in rows]
