"""From manifest rows to batches: images decoded once where they fit in memory, order and prefetch by grain."""

import csv
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from jmae.data import duplicates, phantoms
from jmae.data.files import Image, read_image, read_mask
from jmae.data.manifest import (
    LEAKS,
    PHANTOM,
    Finding,
    Row,
    check_files,
    first,
    held_out,
    leaks,
    parse_manifest,
    summary,
)
from jmae.data.transforms import area_resize, equalise, grey, resize, to_unit
from jmae.data.volumes import Volume, boxes_mask, in_window, prepare, read_subtraction, read_volume
from jmae.errors import InputError

WORKERS = min(16, os.cpu_count() or 1)
SHOWN = 20  # unusable images that are spelled out

PLS = np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # axes to posterior, left, superior

Host = Mapping[str, Callable[[np.ndarray], np.ndarray]]  # arrays made once an image, by name


def stored_image(row: Row) -> Image:
    """A row's image as stored."""
    if not row.image[0].startswith(PHANTOM):
        return read_image(row.image)
    drawn = phantom(row.image[0])
    volume = drawn.image.ndim == 4
    affine = PLS @ np.diag([*drawn.spacing, 1.0]) if volume else None
    return Image(drawn.image, drawn.spacing, affine, None if volume else 8)


def usable(row: Row, stored: Image, size: tuple[int, ...], channels: int) -> np.ndarray:
    """A row's array as stored, grey where it is a colour image and one channel is asked for.

    Raises InputError naming the file where it has another number of channels or of axes, or values that are not finite.
    """
    array = stored.array
    if array.ndim - 1 != len(size):
        preset = "small3d or phantom3d" if array.ndim == 4 else "small"
        raise InputError(
            f"{row.image[0]}: {array.ndim - 1} axes where data.size has {len(size)}: train one for it, as :{preset}"
        )
    if array.shape[-1] == 3 and channels == 1 and len(row.image) == 1:
        array = grey(array)
    if array.shape[-1] != channels:
        raise InputError(
            f"{row.image[0]}: channels: {array.shape[-1]} where the recipe has {channels}: give so many, or train "
            f"with --config.data.channels={array.shape[-1]}, and model.channels where the recipe has it"
        )
    if not np.isfinite(array).all():
        bad = np.count_nonzero(~np.isfinite(array), axis=tuple(range(array.ndim - 1)))
        file = row.image[int(bad.argmax())] if len(row.image) == len(bad) else row.image[0]
        raise InputError(f"{file}: {bad.max()} values are not finite: mend the file or drop its row")
    return array


def read_case(row: Row, data: ConfigDict, stored: Image | None = None) -> np.ndarray:
    """A row's image as the networks see it: float32 (*size, channels) in [0, 1]; raises InputError as `usable`.

    With `data.window` its ends become 0 and 1, in each image alike. With `data.equalise` (P-PII, as MIMIC-CXR-JPG) the
    image is shrunk by area, and its histogram of 256 levels made even. Raises InputError also where the window leaves a
    constant image."""
    stored, size = stored_image(row) if stored is None else stored, tuple(data.size)
    array, bits = usable(row, stored, size, data.channels), stored.bits or 0
    if data.get("equalise"):
        array = area_resize(array, size)
    if data.get("window"):
        unit = in_window(array, data.window, row.image[0])
    else:
        unit = to_unit(array, bits)
    return equalise(unit) if data.get("equalise") else resize(unit, size)


@lru_cache(maxsize=1024)  # image, mask and region of a case come apart, and drawing takes longer than all else
def phantom(specifier: str) -> phantoms.Phantom:
    """The phantom that "phantom:NAME/SPLIT/INDEX" specifies."""
    name, split, index = specifier.removeprefix(PHANTOM).split("/")
    return phantoms.draw(name, split, int(index))


def lesion_mask(row: Row, stored: Image) -> np.ndarray | None:
    """The lesion mask on the image's own grid, of the boxes where there is no mask; None without both."""
    if row.mask and row.mask.startswith(PHANTOM):
        return phantom(row.mask).mask
    if row.mask:
        return read_mask(row.mask, like=stored)
    return boxes_mask(row.boxes, stored.array.shape[:-1]) if row.boxes else None


def region_mask(row: Row, stored: Image) -> np.ndarray | None:
    """Where metrics count, (*size) on the image's own grid; None is everywhere."""
    if row.region and row.region.startswith(PHANTOM):
        return phantom(row.region).region
    return read_mask(row.region, like=stored) if row.region else None


def stored_volume(row: Row, data: ConfigDict) -> Image:
    """A row's volume as stored, its channels joined on the first one's grid as `data.join` says."""
    return stored_image(row) if row.image[0].startswith(PHANTOM) else read_volume(row.image, data)


def scored_region(row: Row, stored: Image, data: ConfigDict) -> np.ndarray | None:
    """The row's region on the image's own grid; where it names none, by `data.region` the voxels that are not 0."""
    region = region_mask(row, stored)
    return np.any(stored.array != 0, axis=-1) if region is None and data.get("region") == "nonzero" else region


def prepared(row: Row, data: ConfigDict, stored: Image | None = None, region: np.ndarray | None = None) -> Volume:
    """A row's volume on the working grid (`jmae.data.volumes.prepare`), within the row's region if none is given."""
    stored = stored_volume(row, data) if stored is None else stored
    stored = stored._replace(array=usable(row, stored, tuple(data.size), data.channels))
    return prepare(
        stored,
        data,
        name=row.image[0],
        lesion=lesion_mask(row, stored),
        region=scored_region(row, stored, data) if region is None else region,
        midline=row.extra.get("midline", ""),
        half=row.extra.get("half", ""),
        # What is scored must not depend on its label, whatever was published.
        widen=row.split == "train" or bool(data.get("widen_test_crops")),
    )


def check_volume(row: Row, stored: Image, data: ConfigDict) -> None:
    """Raises InputError where a volume cannot be used; one that is only scored is prepared, as one that is trained on
    will be before training: what is wrong with a test case is not said after it."""
    usable(row, stored, tuple(data.size), data.channels)
    if row.split in ("val", "test"):
        volume = prepared(row, data, stored)
        if row.pre and row.post:
            read_subtraction(row, volume, data)


def case_words(name: str) -> np.ndarray:
    """The first 8 bytes of SHA-256 of a case's id as two uint32: all randomness of a case comes from them."""
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], ">u4").astype(np.uint32)


def load_rows(config: ConfigDict, log: Callable[[str], None] = print) -> list[Row]:
    """The rows that `config.data` names: a phantom set, or a manifest whose every file has been opened once.

    A patient, a file, or an image under two names in two splits is refused; with `data.allow_leaks` it is told, and its
    rows are marked.

    Raises InputError with all problems in one list.
    """
    data = config.data
    if data.manifest:
        rows, ignored, problems = parse_manifest(
            Path(data.manifest), normal_crops_only=data.normal_crops_only, allow=LEAKS
        )
        colour: list[str] = []
        prints: dict[str, duplicates.Print] = {}
        volumes = "join" in data
        use: Callable[[Row, Image], object] = partial(usable, size=data.size, channels=data.channels)
        use, read = (
            (partial(check_volume, data=data), partial(read_volume, data=data)) if volumes else (use, read_image)
        )

        def look(row: Row, image: Image) -> None:
            use(row, image)
            colour.extend([row.id] * (image.array.shape[-1] == 3 and data.channels == 1))
            prints[row.id] = duplicates.taken(image.array)

        of_files = check_files(rows, workers=WORKERS, use=look, read=read)
        if data.get("calibration") and not problems:
            rows = kept_apart(rows, data.calibration)  # before copies of trained images are looked for
        leaking = [*leaks(rows), *duplicates.in_two_splits(rows, prints)]
        if leaking and not data.get("allow_leaks"):
            problems += first([f"{data.manifest}: {one.what}, or --config.data.allow_leaks=True" for one in leaking])
        if problems := [*problems, *folded(of_files)]:
            raise InputError("\n".join(problems))
        rows = [row._replace(content=prints[row.id].digest.hex()[:16]) if row.id in prints else row for row in rows]
        if colour:
            log(f"{len(colour)} colour images are made grey: --config.data.channels=3 keeps colour where a recipe can")
        for line in first([f"warning: {one.what}" for one in leaking]):
            log(line)
        rows = marked(rows, leaking)
        log(f"{data.manifest}: {summary(rows, ignored)}")
    elif data.phantom:
        rows = phantoms.rows(data.phantom)
        rows = kept_apart(rows, data.calibration) if data.get("calibration") else rows
        log(f"phantoms {data.phantom}: {summary(rows)}")
    else:
        raise InputError("no data: set --config.data.manifest=MANIFEST.csv, or data.phantom")
    if data.get("calibration"):
        log(f"data.calibration: {sum(row.kept for row in rows)} train rows kept apart, as normals of val")
    if data.get("unlabeled_labels"):
        unlabeled_labels(config, rows)  # what is wrong with that file is said now, not when it is used
    return with_anomaly_ratio(rows, config) if data.get("anomaly_ratio", -1) >= 0 else rows


def folded(problems: Sequence[str], most: int = 3) -> list[str]:
    """Problems "CASE: FILE: WHAT" with at most `most` of each WHAT, the last of them saying how many more there are."""
    kinds = [problem.split(": ", 2)[-1] for problem in problems]
    count, seen, lines = Counter(kinds), Counter[str](), []
    for problem, kind in zip(problems, kinds, strict=True):
        seen[kind] += 1
        if seen[kind] < most or count[kind] <= most:
            lines.append(problem)
        elif seen[kind] == most:
            lines.append(f"{problem} (and {count[kind] - most} more like it)")
    return lines


def marked(rows: Sequence[Row], leaking: Sequence[Finding]) -> list[Row]:
    """The rows, those that are in two splits in some way with what it is."""
    what: dict[str, list[str]] = {}
    for one in leaking:
        for row in one.rows:
            what.setdefault(row.id, []).append(one.what)
    return [row._replace(leak="; ".join(what[row.id])) if row.id in what else row for row in rows]


def kept_apart(rows: Sequence[Row], share: float) -> list[Row]:
    """The rows with `share` of the train patients (whole patients, none with a lesion) as normals of `val` instead:
    they are trained on no more, so that scores can be calibrated on them (`scoring.Calibration`).

    Raises InputError where `share` is no share, or so few patients are left that none is kept apart.
    """
    if not 0 <= share < 1:
        raise InputError(f"data.calibration={share}: is no share of the patients: write 0.1 for a tenth, 0 for none")
    name = lambda row: row.patient or row.id
    lesions = {name(row) for row in rows if row.split == "train" and row.label == 1}
    candidates = [row for row in rows if row.split == "train" and name(row) not in lesions]
    apart = {row.id for row, held in zip(candidates, held_out(candidates, share), strict=True) if held}
    if not apart:
        raise InputError(
            f"data.calibration={share}: of fewer than ten train patients none is kept apart: set it to 0 (no p-values"
            " then), or give val rows of label 0"
        )
    return [row._replace(split="val", label=0, kept=True) if row.id in apart else row for row in rows]


def unlabeled_labels(config: ConfigDict, rows: Sequence[Row]) -> dict[str, int]:
    """Hidden labels of unlabelled rows by id, for the anomaly-ratio sweep and analysis, never for training. The file
    names rows by the column `id`, or by `path`, the image's relative to the file."""
    if config.data.manifest and not config.data.unlabeled_labels:
        return {}
    if not config.data.manifest:
        return phantoms.unlabeled_labels(config.data.phantom)
    try:
        with open(config.data.unlabeled_labels, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
        labels = [int(line["label"]) for line in lines]
        if lines and "id" not in lines[0]:
            folder = os.path.dirname(os.path.abspath(config.data.unlabeled_labels))
            ids = {os.path.normpath(file): row.id for row in rows for file in row.image}
            named = [ids.get(os.path.normpath(os.path.join(folder, line["path"])), "") for line in lines]
        else:
            named = [line["id"] for line in lines]
        return {name: label for name, label in zip(named, labels, strict=True) if name}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{config.data.unlabeled_labels}: not a CSV file with the columns id,label or path,label ({error!r})"
        ) from None


def with_anomaly_ratio(rows: Sequence[Row], config: ConfigDict) -> list[Row]:
    """The rows with an unlabelled set of `data.unlabeled_size` images of which a share `data.anomaly_ratio` is
    abnormal: the first int(size * ratio) abnormal and the first remaining normal ones (DDAD's rule, spec section 2)."""
    labels, ratio = unlabeled_labels(config, rows), config.data.anomaly_ratio
    pools: dict[int, list[Row]] = {0: [], 1: []}
    for row in rows:
        if row.split == "unlabeled":
            if row.id not in labels:
                raise InputError(f"{row.id}: no hidden label: name them all in data.unlabeled_labels")
            pools[labels[row.id]].append(row)
    size = config.data.unlabeled_size or len(pools[0]) + len(pools[1])
    abnormal = int(round(size * ratio, 9))  # 0.29 * 100 is 28.999... in floats
    wanted = {1: abnormal, 0: size - abnormal}
    for label, word in ((1, "abnormal"), (0, "normal")):
        if wanted[label] > len(pools[label]):
            raise InputError(
                f"anomaly ratio {ratio} of {size} needs {wanted[label]} {word} unlabelled images, there are"
                f" {len(pools[label])}: lower data.unlabeled_size or change data.anomaly_ratio"
            )
    chosen = {row.id for label in (0, 1) for row in pools[label][: wanted[label]]}
    return [row for row in rows if row.split != "unlabeled" or row.id in chosen]


class Samples(Protocol):
    """What a stage is trained on: `Images`, or the `crops.Volumes`."""

    rows: list[Row]
    words: np.ndarray  # (n, 2): `case_words` of each row

    @property
    def ready(self) -> bool:
        """Whether a batch needs no work but copying."""

    def samples(self, rows: np.ndarray, numbers: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        """A sample of each row, by its number in the table, for a step: its "image", or what names it in `resident`."""

    def resident(self) -> np.ndarray | None:
        """What of the set lives on the device."""

    def host_arrays(self, index: np.ndarray, make: Host) -> dict[str, np.ndarray]:
        """What `make` computes of each image."""


class Images:
    """The images of rows, each decoded once where all fit in a quarter of the memory, else at every use. Of several
    processes each has its share of that quarter, as if all were on one host.

    Raises InputError with all unusable images in one list; those decoded at use are named one by one.
    """

    def __init__(self, rows: Sequence[Row], config: ConfigDict, folder: Path | None = None):
        self.rows = list(rows)
        self.size, self.channels, self.data = tuple(config.data.size), config.data.channels, config.data
        self.words = np.array([case_words(row.id) for row in rows], np.uint32).reshape(-1, 2)
        self.folder = folder  # of host arrays
        shape = (len(rows), *self.size, self.channels)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.process_count()
        self.decoded = np.empty(shape, np.float32) if 4 * np.prod(shape, dtype=float) <= memory / 4 else None
        if self.decoded is not None:
            with ThreadPoolExecutor(WORKERS) as pool:
                problems = [line for line in pool.map(self._decode, range(len(rows))) if line]
            if problems:
                more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
                raise InputError("\n".join([*problems[:SHOWN], *more]))

    def _decode(self, i: int) -> str | None:
        assert self.decoded is not None
        try:
            self.decoded[i] = read_case(self.rows[i], self.data)
        except InputError as error:
            return str(error)
        return None

    @property
    def ready(self) -> bool:
        """Whether a batch needs no work but copying."""
        return self.decoded is not None

    def image(self, index: np.ndarray) -> np.ndarray:
        """Images (n, *size, c) of rows by number."""
        if self.decoded is not None:
            return self.decoded[index]
        return np.stack([read_case(self.rows[i], self.data) for i in index])

    def samples(self, rows: np.ndarray, numbers: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        """The images of rows for a batch, the same at every step."""
        return {"image": self.image(rows)}

    def resident(self) -> None:
        """Nothing of a set of images lives on the device."""

    def host_arrays(self, index: np.ndarray, make: Host) -> dict[str, np.ndarray]:
        """What `make` computes of each image, in the order of `index`; kept in the run folder by the digest of the
        images and the function's name, so that it is computed once."""
        return {name: self._host_array(index, name, function) for name, function in make.items()}

    def _host_array(self, index: np.ndarray, name: str, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        single = lambda i: self.image(np.array([i]))[0]
        digest = hashlib.sha256(inspect.getsource(function).encode())  # another rule, another file
        for i in index:
            digest.update(single(i).tobytes())
        file = self.folder / f"{name}-{digest.hexdigest()[:16]}.npy" if self.folder else None
        with suppress(FileNotFoundError, ValueError):  # not there yet, or torn: made (again)
            if file:
                with file.open("rb") as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
        with ThreadPoolExecutor(WORKERS) as pool:
            array = np.stack(list(pool.map(lambda i: function(single(i)), index)))
        if file:
            save_array(file, array)
        return array


class Decoded(NamedTuple):
    """Images that are scored and no more, already as the networks see them."""

    images: np.ndarray  # (n, *size, c)
    words: np.ndarray  # (n, 2)

    def image(self, index: np.ndarray) -> np.ndarray:
        """Images (m, *size, c) by number."""
        return self.images[index]


def save_array(file: Path, array: np.ndarray) -> None:
    """Writes a .npy file that has its name only when it is whole."""
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
    """An endless iterator of batches over index tables, one table a replicate; its state is its position.

    A batch holds image (b, *size, c), index (b,): the sample's number in its table, case (b, 2): `case_words`, and the
    host arrays; with several tables all have a leading replicate axis. With `shuffle`, every epoch has a new order by
    seed and drops its last incomplete batch, else rows come in order, round and round; a table shorter than a batch is
    repeated to fill one. Each process reads its own part of every batch.
    """
    process, processes = jax.process_index(), jax.process_count()
    if batch % processes:
        raise InputError(f"batch {batch} is not divisible by {processes} processes: change the batch size")
    own = slice(process * batch // processes, (process + 1) * batch // processes)
    tables = [np.tile(t, -(-batch // len(t))) for t in tables]  # once, unless the table is shorter than a batch
    used = np.unique(np.concatenate(tables))
    made = images.host_arrays(used, host)

    def order(table: np.ndarray, seed: int) -> grain.MapDataset:
        numbers = grain.MapDataset.range(len(table))
        if shuffle:
            return numbers.seed(seed).shuffle().batch(batch, drop_remainder=True).repeat()
        return numbers.repeat().batch(batch, drop_remainder=True)

    def part(table: np.ndarray, number: np.ndarray, step: int, seed: int) -> dict[str, np.ndarray]:
        row = table[number]
        extra = {name: array[np.searchsorted(used, row)] for name, array in made.items()}
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


def in_order(images: Images | Decoded, rows: np.ndarray, batch: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row once, in equal batches: (how many rows, batch); the last is filled up with its own last row."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        full = np.concatenate([part, np.repeat(part[-1:], batch - len(part))])
        yield len(part), {"image": images.image(full), "case": images.words[full]}
