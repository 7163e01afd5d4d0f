"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR]
                         [--config.evaluation.KEY=VALUE ...] [--config.data.allow_leaks=True] [--debug]

Scores a split with a trained run and writes metrics.json, scores.csv, report.html and the maps, into DIR/evaluation
(`test`) or DIR/evaluation-SPLIT where no other folder is named; with another manifest one must be. Of that no case may
be of a patient, or have an image, that the run was trained or calibrated on; with data.allow_leaks these are told, have
no p-value, and mark the report. Copies that are not equal value by value are not looked for there. The splits `train`
and `unlabeled` get no p-values. Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import hashlib
import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from scipy.ndimage import minimum_filter

from jmae import baselines, checkpoint, metrics, recipe
from jmae.cards import rows_of, write_cards
from jmae.data.crops import Volumes
from jmae.data.files import Image, write_map
from jmae.data.loader import (
    Decoded,
    Images,
    case_words,
    in_order,
    lesion_mask,
    load_rows,
    prepared,
    scored_region,
    stored_image,
)
from jmae.data.manifest import Row
from jmae.data.transforms import central, resize
from jmae.data.volumes import Volume, read_subtraction
from jmae.errors import InputError, exit_code
from jmae.masking import case_keys
from jmae.reconstruct import fitting, out_of_memory, too_large
from jmae.report import PERCENTILES, Case, Scale, choose_cases, held_side, one_slice, without_curves, write_report
from jmae.run_folder import (
    digest,
    log,
    output_folder,
    read_history,
    read_seen,
    recipe_digest,
    write_csv,
    write_seen,
    write_text,
)
from jmae.scoring import Calibration, alarm_threshold, colour_ends, top_mean
from jmae.sharding import device_mesh, inside_mesh, joined, keep_compiled, of_all, replicated, split
from jmae.system import Results, Sweep, System, compute_type, load_system, stage_keys
from jmae.windows import average, inside, tile

ALLOW = "config.data.allow_leaks"
WHOLE = "whole"  # the part that is the split itself
SECONDS_BETWEEN_LINES = 20  # while cases are scored
CENTRAL = 0.8  # share of each axis that the central crop keeps
CALIBRATION = "calibration.json"
UNCALIBRATED = (
    "not calibrated, so no p-values: give the manifest val rows of label 0, or train with --config.data.calibration=0.1"
)
NO_OTHERS = "no p-values: no case of this split is another than the held-out normals, which say nothing of themselves"
NEEDS = ("region", "midline", "half")  # columns that the score of a volume depends on
NO_SCORE = (  # of `evaluation`
    "batch chunk subsets maps reconstruction draws froc iou alarm_rate convergence decision".split()
)


def main(argv: list[str]) -> int:
    given = recipe.arguments(argv, __doc__, ["workdir", "manifest", "split", "out", "config"])
    own = "manifest" not in given and not any(flag.startswith("config") for flag in given)
    if ALLOW in given and "manifest" not in given:
        raise InputError(f"--{ALLOW} goes with --manifest: the run's own manifest was looked at when it was trained")
    allow = recipe.typed(ALLOW, given.pop(ALLOW, "false"), False)
    workdir, config = run_of(given)
    split = given.get("split", "test")
    if not own and "out" not in given:
        what = "--manifest" if "manifest" in given else "--config.evaluation.KEY"
        raise InputError(f"{what} goes with --out=DIR: the run's own evaluation stays as it is")
    if "manifest" in given:
        config.data.manifest = given["manifest"]
        neutral = {"allow_leaks": allow}
        # These are of the data trained on.
        neutral |= {"anomaly_ratio": -1.0, "unlabeled_size": 0, "unlabeled_labels": "", "calibration": 0.0}
        config.data.update({key: value for key, value in neutral.items() if key in config.data})
    out = output_folder(given.get("out", workdir / ("evaluation" if split == "test" else f"evaluation-{split}")))
    with joined():
        keep_compiled()
        system = load_system(config)
        rows = load_rows(config, log)
        if "manifest" in given:
            rows, unchecked = not_seen(rows, split, workdir, given["manifest"], allow=allow)
        else:
            rows, unchecked = not_seen_before(config, rows, workdir)
        evaluate(config, system, rows, workdir, split=split, out=out, own=own, unchecked=unchecked)
    return 0


def not_seen_before(config: ConfigDict, rows: Sequence[Row], workdir: Path) -> tuple[list[Row], str]:
    """A run's own rows, of which `test` and `val`, where `model.weights` names another run, are held against what
    `workdir` has seen, as `not_seen` does: that other run before the training, this one afterwards."""
    source = config.model.get("weights") or ""
    if not source or Path(source).is_file():
        return list(rows), ""
    where = f"{config.data.manifest or config.data.phantom} (model.weights={source})"
    return not_seen(rows, "test", workdir, where, allow=bool(config.data.get("allow_leaks")))


def not_seen(rows: Sequence[Row], split: str, workdir: Path, manifest: str, *, allow: bool) -> tuple[list[Row], str]:
    """The rows of another manifest, of which those of `split`, and of `val` that chooses thresholds, are held against
    what the run has seen (seen.csv): patients, images by their content, ids where that is not known; and the sentence
    that a run which does not tell what it has seen gets, else "". Raises InputError where one was seen, or with `allow`
    marks it; val of the run may be val again."""
    seen, unchecked = read_seen(workdir), ""
    if all(row.split == "val" for row in seen):
        unchecked = f"{workdir} does not say what it was trained on: not known whether cases of {manifest} were"
        log(f"warning: {unchecked}")
    by: dict[str, dict[str, Row]] = {"patient": {}, "content": {}, "id": {}}
    for row in seen:
        for key, named in by.items():
            named.setdefault(getattr(row, key), row)

    def leak(row: Row) -> str:
        for key, word in (("patient", "patient"), ("content", "image"), ("id", "id")):
            other = by[key].get(getattr(row, key)) if getattr(row, key) else None
            unsure = key == "id" and other and row.content and other.content
            if other and not unsure and not row.split == other.split == "val" != split:
                return f"the {word} of {row.id} is that of {other.id}, {other.split} of the run"
        return ""

    rows = [row._replace(leak=row.leak or leak(row)) if row.split in (split, "val") else row for row in rows]
    found = [row.leak for row in rows if row.leak]
    if found and not allow:
        more = f", and {len(found) - 1} more cases were seen in training" if len(found) > 1 else ""
        raise InputError(f"{manifest}: {found[0]}{more}: leave them out, or --{ALLOW}=True marks the report")
    for what in found[:20]:
        log(f"warning: {what}")
    return rows, unchecked


def run_of(given: dict[str, str]) -> tuple[Path, ConfigDict]:
    """The run folder that `--workdir` names, and its recipe with what `--config.evaluation.KEY` changes, both taken
    from the flags `given`; raises InputError for any other change."""
    if fixed := [flag for flag in given if flag.startswith("config") and not flag.startswith("config.evaluation.")]:
        raise InputError(
            f"--{fixed[0]} is unknown: of the run's recipe --config.evaluation.KEY=VALUE alone can be changed"
        )
    if "workdir" not in given:
        raise InputError("no run folder: write --workdir=DIR")
    workdir = Path(given["workdir"])
    config = recipe.read(workdir)
    recipe.override(config, given, "evaluation.")
    return workdir, config


# --- scores -----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Scores of n images by r replicates; higher is more abnormal."""

    maps: dict[str, np.ndarray]  # (r, n, *size)
    scores: dict[str, np.ndarray]  # (r, n)
    seconds: float = 0.0
    reconstruction: np.ndarray | None = None  # (r, n, *size, c), in the images' own range
    confidence: np.ndarray | None = None  # (r, n, *size)
    pictures: Mapping[str, np.ndarray] = MappingProxyType({})  # (r, n, *size, c) or (r, n, h, w)


class Result(NamedTuple):
    """One row scored by r replicates, with the cheap baselines that come case by case."""

    image: np.ndarray  # (*size, c), as scored
    stored: Image
    maps: dict[str, np.ndarray]  # (r, *size)
    scores: dict[str, np.ndarray]  # (r,)
    reconstruction: np.ndarray | None  # (r, *size, c)
    own: Callable[[np.ndarray], np.ndarray]  # a map (*size) or picture (*size, c) on the row's own grid
    scored: Callable[[np.ndarray], np.ndarray]  # a mask on the row's own grid on the grid that was scored
    seconds: float  # of scoring alone
    values: Callable[[np.ndarray], np.ndarray] = lambda picture: picture  # a picture in the row's own values
    cheap_scores: Mapping[str, float] = MappingProxyType({})  # of the maps below
    seen: np.ndarray | None = None  # where on its own grid a map exists; None: everywhere
    cheap: Mapping[str, np.ndarray] = MappingProxyType({})  # the baselines' maps, on the row's own grid
    confidence: np.ndarray | None = None  # (r, *size): spread of the primary map over the system's samples
    pictures: Mapping[str, np.ndarray] = MappingProxyType({})  # (r, *size, c) or (r, h, w)


class Held(NamedTuple):
    """Rows of `val`, scored: they choose thresholds, and the normals among them say what a score means."""

    rows: Sequence[Row]
    scores: np.ndarray  # (r, m), the primary ones
    ends: np.ndarray  # (m, 2): the percentiles `PERCENTILES` of each row's map, nan without one


class Stream(NamedTuple):
    """The results of a split's rows in order, and what was scored with them."""

    results: Iterator[Result]
    held: Held | None = None
    cheap: Mapping[str, Scored] = MappingProxyType({})  # the baselines' scores, by part
    shown: frozenset[int] | None = None  # the rows whose pictures may be shown; None: any
    thresholds: Mapping[str, Sequence[float]] = MappingProxyType({})  # `held_out`, of each map and replicate


def restore_results(config: ConfigDict, system: System, workdir: Path) -> Results:
    """What `system.score` reads, from the run folder's last checkpoints, on each of this process's devices; raises
    InputError where one is missing."""
    results: dict[str, Any] = {}
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(device_mesh()))
    for number, stage in enumerate(system.stages):
        if stage.name not in system.uses:
            continue
        init = lambda key, results, stage=stage: stage.init(key, results, 1)
        target = jax.eval_shape(init if config.replicates == 1 else jax.vmap(init), stage_keys(config, number), results)
        target = jax.tree.map(place, target._replace(frozen={}))
        found = checkpoint.restore(workdir / "checkpoints" / stage.name, target, config=None, log=log)
        if not found:
            raise InputError(f"{workdir}: stage {stage.name} has no checkpoint: train it first (python -m jmae.train)")
        checkpoint.refuse_unfinished(workdir / "checkpoints" / stage.name, found[0], found[2])
        results[stage.name] = stage.result(found[1])
    if jax.process_count() == 1:
        return results
    return jax.device_put(jax.tree.map(lambda x: x.addressable_data(0), results), replicated(own_mesh()))


def own_mesh() -> Mesh:
    """The devices of this process: each scores its share of the cases without the others."""
    return device_mesh(devices=jax.local_devices())


def seeds_of(config: ConfigDict) -> Array:
    """A key a replicate."""
    return jnp.stack([jax.random.key(config.seed + r) for r in range(config.replicates)])


def each_replicate(one: Callable, results: Any, keys: Array) -> Any:
    """`one(results, key)` of every replicate, on a leading axis."""
    if len(keys) > 1:
        return jax.vmap(one)(results, keys)
    return jax.tree.map(lambda x: x[None], one(results, keys[0]))


def scorer(config: ConfigDict, system: System, results: Results) -> Callable[[Images | Decoded, np.ndarray], Scored]:
    """The function (images, row numbers) -> Scored, one compiled program for all batches.

    Rows are split over the processes, batches over the devices; a case's result depends on neither, as its key comes
    from its id. Where a device runs out of memory, fewer masks at a time, then fewer images, are tried until they fit.
    """
    mesh, keys = own_mesh(), seeds_of(config)
    devices, program = mesh.shape["data"], scoring_program(system, mesh)

    def fit(b: int, most: int) -> tuple[int, Any, int]:
        batch = scoring_batch(config, b, mesh)
        lower = lambda chunk: program.lower(results, batch, keys, chunk)
        compiled, chunk = fitting(lower, most, what=f"scoring {b} images of {tuple(config.data.size)}")
        if chunk < system.masks:
            log(f"scoring {chunk} of {system.masks} masks at a time")
        return b, compiled, chunk

    def attempt(images: Images | Decoded, rows: np.ndarray, b: int, compiled: Any) -> Scored | None:
        began = said = time.monotonic()
        parts: list[tuple[int, Any]] = []
        try:
            for used, host in in_order(images, rows, b):
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    log(f"{len(parts) * b} of {len(rows)} images scored")
                # This batch is dispatched before the one before is fetched.
                parts.append((used, compiled(results, jax.device_put(host, split(mesh)), keys)))
                parts[-2:-1] = [(k, jax.device_get(out)) for k, out in parts[-2:-1]]
            outs = [jax.tree.map(lambda x, k=k: x[:, :k], jax.device_get(out)) for k, out in parts]
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *outs)
        further = joined.get("reconstruction"), joined.get("confidence"), joined.get("pictures", {})
        return Scored(joined["maps"], joined["scores"], time.monotonic() - began, *further)

    size = -(-config.evaluation.batch // devices) * devices
    fitted = [fit(size, config.evaluation.get("chunk") or system.masks)]

    def run(images: Images | Decoded, rows: np.ndarray) -> Scored:
        n, own = jax.process_count(), jax.process_index()
        mine = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % n)])[own::n]
        while (scored := attempt(images, mine, *fitted[0][:2])) is None:
            b, compiled, chunk = fitted[0]
            if chunk == 1 and b == devices:
                raise too_large(f"scoring {b} images of {tuple(config.data.size)}", compiled)
            fewer = b if chunk > 1 else -(-b // 2 // devices) * devices
            log(f"out of memory at {b} images, {chunk} masks at a time: trying fewer")
            fitted[0] = fit(fewer, max(1, chunk // 2))
        return scored if n == 1 else gathered(scored, len(rows))

    return run


def scoring_program(system: System, mesh: Mesh) -> Any:
    """The jitted function (results, batch, keys of the replicates, chunk) -> what `system.score` gives, a leading axis
    of replicates before each array."""
    one = system.score
    assert one

    def score(results: Results, batch: Any, keys: Any, chunk: int) -> Any:
        return each_replicate(lambda result, key: one(result, batch, key, chunk=chunk), results, keys)

    return jax.jit(inside_mesh(score, mesh), static_argnums=3, out_shardings=replicated(mesh))


def scoring_batch(config: ConfigDict, b: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of b images and of what their ids give, split over the devices."""
    shapes = {"image": (b, *config.data.size, config.data.channels), "case": (b, 2)}
    types = {"image": jnp.float32, "case": jnp.uint32}
    return {name: jax.ShapeDtypeStruct(shapes[name], types[name], sharding=split(mesh)) for name in shapes}


def gathered(scored: Scored, n: int) -> Scored:
    """All n images of which each process has scored every so-many-th one."""
    each = multihost_utils.process_allgather(scored)  # (processes, r, of each, ...)
    join = lambda x: np.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])[:, :n]
    seconds = float(each.seconds.max())
    return jax.tree.map(join, each._replace(seconds=None))._replace(seconds=seconds)


def sweeper(config: ConfigDict, sweep: Sweep, results: Any) -> Callable[..., dict[str, Any]]:
    """The function (prepared volume, words of its id, repeats=the sweep's) -> {"maps": {NAME: (r, *size)},
    "reconstruction"}: one program a bucket of sizes, whatever the case and `repeats`; as many windows at a time as fit
    in the memory, split over the devices. Raises InputError where one window at a time does not."""
    mesh, keys = own_mesh(), seeds_of(config)
    program = sweep_program(sweep, mesh)
    programs: dict[tuple[int, ...], tuple[Any, int]] = {}

    def run(volume: Volume, words: np.ndarray, repeats: int = sweep.repeats) -> dict[str, Any]:
        shape = volume.array.shape[:-1]
        tiling = tile(shape, sweep.window, sweep.stride, side=volume.side, midline=volume.midline)
        origins, number = filled(tiling.origins), np.int32(len(tiling.origins))
        array = np.pad(volume.array, [*tiling.pad, (0, 0)])
        case = (array, np.array(tiling.size, np.int32), origins, number, tiling.coverage, words, np.int32(repeats))
        case = jax.device_put(case, replicated(mesh))
        kind = (*array.shape, len(origins))
        what, lower = f"a volume of {array.shape[:-1]}", lambda batch: program.lower(results, *case, keys, batch)
        most, out = config.evaluation.batch, None
        while out is None:
            if kind not in programs:
                programs[kind] = fitting(lower, most, what=what)
                if programs[kind][1] < config.evaluation.batch:
                    log(f"{what}: scoring {programs[kind][1]} windows at a time")
            compiled, batch = programs[kind]
            try:
                out = jax.device_get(compiled(results, *case, keys))
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                if batch == 1:
                    raise too_large(what, compiled) from error
                most = -(-batch // 2)
                del programs[kind]
        own = tuple(slice(low, low + n) for (low, _), n in zip(tiling.pad, shape, strict=True))
        return jax.tree.map(lambda x: x[(slice(None), *own)], out)

    return run


def sweep_program(sweep: Sweep, mesh: Mesh) -> Any:
    """The jitted function (results, volume, its true size, origins of windows, how many of them count, coverage, words
    of the case's id, repeats, keys of the replicates, windows at a time) -> what `sweep.fuse` gives, a leading axis of
    replicates before each array."""
    devices = mesh.shape["data"]

    def score(results, volume, size, origins, number, coverage, words, repeats, keys, batch):
        def one(result, key):
            averages = average(
                partial(sweep.score, result),
                volume,
                origins,
                number,
                coverage,
                case_keys(key, words[None])[0],
                window=sweep.window,
                repeats=repeats,
                batch=-(-batch // devices) * devices,
                weighted=sweep.weighted,
                released=sweep.released,
                place=lambda x: jax.lax.with_sharding_constraint(x, split(mesh)),
            )
            return sweep.fuse(averages, inside(volume.shape[:-1], size))

        return each_replicate(one, results, keys)

    return jax.jit(inside_mesh(score, mesh), static_argnums=9, out_shardings=replicated(mesh))


def filled(origins: np.ndarray) -> np.ndarray:
    """Origins of windows, with zeros behind them up to a power of two: few lengths are compiled."""
    rows = np.zeros((2 ** max(4, (len(origins) - 1).bit_length()), origins.shape[1]), np.int32)
    rows[: len(origins)] = origins
    return rows


def ahead(function: Callable, items: Sequence) -> Iterator[Any]:
    """`function` of each item in order, one item ahead of its use, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def volume_results(
    config: ConfigDict, rows: Sequence[Row], run: Callable, cheap: Callable[[Row, Volume], dict[str, np.ndarray]]
) -> Iterator[Result]:
    """Each row prepared, scored and put back on its own grid. ours: a map's score is the mean of its highest voxels in
    the region, a share `evaluation.top` of them (the paper scores voxels only). Of several processes each scores every
    so-many-th row, and all yield all results."""
    said = time.monotonic()
    for i, (row, volume, result) in enumerate(scored_volumes(config, rows, run)):
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log(f"{i} of {len(rows)} volumes scored")
        baselines = cheap(row, volume)
        region = scored_region(row, volume.stored, config.data)
        region = result.seen if region is None else region & result.seen
        ends = baselines | {f"low {name}": -m for name, m in baselines.items() if name.startswith("brightness")}
        cheap_scores = {name: top_mean(m, region, config.evaluation.top) for name, m in ends.items()}
        yield result._replace(cheap_scores=cheap_scores, cheap=baselines)


def scored_volumes(config: ConfigDict, rows: Sequence[Row], run: Callable) -> Iterator[tuple[Row, Volume, Result]]:
    """Rows with their volumes and results, prepared one ahead; a row a process at a time."""
    volumes, n, own = ahead(partial(prepared, data=config.data), rows), jax.process_count(), jax.process_index()
    for start in range(0, len(rows), n):
        part = [(row, next(volumes)) for row in rows[start : start + n]]
        began = time.monotonic()
        outs = of_all(run(part[own][1], case_words(part[own][0].id)) if own < len(part) else None)
        seconds = (time.monotonic() - began) / len(part)
        for (row, volume), out in zip(part, outs, strict=False):  # the last rows may be fewer than processes
            yield row, volume, volume_result(config, row, volume, lambda *_, out=out: out)._replace(seconds=seconds)


def volume_result(config: ConfigDict, row: Row, volume: Volume, run: Callable) -> Result:
    """One prepared volume, scored."""
    began, out = time.monotonic(), run(volume, case_words(row.id))
    top = lambda m: top_mean(m, volume.region, config.evaluation.top)
    return Result(
        image=volume.array,
        stored=volume.stored,
        maps=out["maps"],
        scores={name: np.array([top(m) for m in maps]) for name, maps in out["maps"].items()},
        reconstruction=out.get("reconstruction"),
        confidence=out.get("confidence"),
        own=volume.grid.back,
        scored=partial(volume.grid.forward, order=0),
        seconds=time.monotonic() - began,
        values=partial(own_values, volume=volume, data=config.data),
        seen=volume.grid.inside(),
    )


def own_values(picture: np.ndarray, *, volume: Volume, data: ConfigDict) -> np.ndarray:
    """A normalised picture (*size, c) in the values of the stored image."""
    return (picture - data.mean) / data.std * volume.std + volume.mean


def image_results(images: Images, scored: Scored, cheap: Scored, rows: range) -> Iterator[Result]:
    """Images by their numbers, of which `scored` has these alone and `cheap` all; maps are enlarged to a row's own
    grid."""
    for k, i in enumerate(rows):
        result = image_result(stored_image(images.rows[i]), images.image(np.array([i]))[0], scored, k)
        yield result._replace(cheap={name: result.own(value[0, i]) for name, value in cheap.maps.items()})


def image_result(stored: Image, image: np.ndarray, scored: Scored, k: int) -> Result:
    """The k-th of scored images; `image` is (*size, c) as it was scored."""
    size = stored.array.shape[:-1]

    def own(array: np.ndarray) -> np.ndarray:
        return resize(array, size) if array.ndim > len(size) else resize(array[..., None], size)[..., 0]

    of = lambda values: {name: value[:, k] for name, value in values.items()}
    return Result(
        image=image,
        stored=stored,
        maps=of(scored.maps),
        scores=of(scored.scores),
        reconstruction=None if scored.reconstruction is None else scored.reconstruction[:, k],
        own=own,
        scored=lambda mask: resize(mask[..., None].astype(np.float32), image.shape[:-1])[..., 0] > 0.5,
        seconds=scored.seconds / len(scored.scores[next(iter(scored.scores))][0]),
        confidence=None if scored.confidence is None else scored.confidence[:, k],
        pictures=of(scored.pictures),
    )


def score_images(
    config: ConfigDict,
    system: System,
    results: Results,
    rows: Sequence[Row],
    split: "Split",
    parts: Mapping[str, "Part"],
) -> Stream:
    """All images of a split at once, beside the baselines of each part."""
    n, score = len(split.rows), scorer(config, system, results)
    localised = bool(config.evaluation.get("iou", 0.0)) and split.marked
    if localised and not split.normals:
        remedy = "they are scored themselves" if split.name == "val" else "give the manifest val rows of label 0"
        log(f"no held-out normals: IoU at the oracle threshold alone; {remedy}")
    held = split.held
    images, every = Images([*split.rows, *held], config), range(n + len(held))
    scored = score(images, np.arange(n))
    scored_held = score(images, np.array(every[n:])) if held else None
    cheap = {name: Scored({}, {}) for name in parts}
    normals = [row for row in rows if row.split == "train" and row.label != 1]
    if split.known.any() and normals and jax.process_index() == 0:
        fit = partial(baseline_scores, Images(normals, config), images, n, mapped=len(every) if localised else n)
        cheap = {name: fit(share=part.share, pixels=split.marked and part.share == 1) for name, part in parts.items()}
    thresholds = {}
    if scored_held and localised:
        thresholds = held_out(config, held, image_results(images, scored_held, cheap[WHOLE], every[n:]))
    means = scored.scores[system.primary].mean(0).tolist()
    groups = choose_cases([row.label for row in split.rows], means)
    shown = frozenset(i for group in groups.values() for i in group)
    on_held = held_images(system, held, scored_held) if scored_held else None
    return Stream(image_results(images, scored, cheap[WHOLE], every[:n]), on_held, cheap, shown, thresholds)


def held_out(config: ConfigDict, rows: Sequence[Row], results: Iterator[Result]) -> dict[str, list[float]]:
    """The percentile `evaluation.iou` of the pixels of the normal ones among `rows`, inside their regions and on their
    own grids: of each map, one a replicate."""
    pools: dict[str, list[metrics.Pooled]] = {}
    for row, result in zip(rows, results, strict=True):
        if row.label != 0 or not (truth := read_truth(row, result, config.data)):
            continue
        for name, maps in own_maps(result).items():
            for pool, m in zip(pools.setdefault(name, [metrics.Pooled() for _ in maps]), maps, strict=True):
                pool.add(truth[0], m, truth[1])
    return {name: [pool.percentile(config.evaluation.iou) for pool in each] for name, each in pools.items()}


def own_maps(result: Result) -> dict[str, list[np.ndarray]]:
    """All maps of a row on its own grid, one a replicate, also the baselines'."""
    maps = {name: [result.own(m) for m in values] for name, values in result.maps.items()}
    return maps | {name: [m] for name, m in result.cheap.items()}


def score_volumes(
    config: ConfigDict, system: System, results: Results, rows: Sequence[Row], split: "Split", workdir: Path
) -> Stream:
    """The volumes of a split one by one, beside the baselines' maps where a row has a label."""
    assert system.sweep
    run = sweeper(config, system.sweep, results)
    nothing: Callable[[Row, Volume], dict[str, np.ndarray]] = lambda row, volume: {}
    cheap = nothing
    if split.known.any() and jax.process_index() == 0:
        train = [row for row in rows if row.split == "train"]
        cheap = volume_baselines(config, system, Volumes(train, config, workdir / "cache") if train else None)
    on_held = held_volumes(config, system, split.held, run) if split.held else None
    return Stream(volume_results(config, split.rows, run, cheap), on_held)


# --- what a score means -----------------------------------------------------------------------------------------------


def held_images(system: System, rows: Sequence[Row], scored: Scored) -> Held:
    """Held-out images, scored."""
    maps = scored.maps.get(shown_map(system))
    ends = [map_ends(None if maps is None else maps[:, k]) for k in range(len(rows))]
    return Held(rows, scored.scores[system.primary], np.array(ends))


def held_volumes(config: ConfigDict, system: System, rows: Sequence[Row], run: Callable) -> Held:
    """Held-out volumes, scored by `sweeper`'s function one by one."""
    scores, ends = [], []
    for result in volume_results(config, rows, run, lambda row, volume: {}):
        scores.append(result.scores[system.primary])
        ends.append(map_ends(result.maps.get(shown_map(system))))
    return Held(rows, np.stack(scores, 1), np.array(ends))


def map_ends(maps: np.ndarray | None) -> np.ndarray:
    """The percentiles `PERCENTILES` of a case's map (r, *size), the mean over replicates."""
    return np.full(2, np.nan) if maps is None else np.percentile(maps.mean(0), PERCENTILES)


def shown_map(system: System) -> str:
    """The name of the map that stands for a system; there may be none of that name."""
    return system.map or system.primary


def calibrators(
    config: ConfigDict, system: System, rows: Sequence[Row], say: Callable[[str], None] = log
) -> list[bool]:
    """Which rows of `val` say what a score means: the normals that nothing was chosen by."""
    labels = {row.label for row in rows if row.split == "val" and not row.kept}
    if system.chosen_on_val and {0, 1} <= labels:
        say(
            f"select={config.select}: val's labels chose the weights, so only train rows kept apart give p-values "
            "(--config.data.calibration=0.1)"
        )
        return [row.kept for row in rows]
    return [row.label == 0 for row in rows]


def calibrate(
    config: ConfigDict,
    system: System,
    results: Results,
    held: Held,
    workdir: Path,
    say: Callable[[str], None] = log,
) -> Calibration | None:
    """Calibrates a run on the normals of `held` and writes calibration.json: whom it is of, the score of each normal,
    the threshold at the false-alarm rate `evaluation.alarm_rate`, the colour scale of maps. None where no row is left
    that nothing was chosen by."""
    used = calibrators(config, system, held.rows, say)
    normals = [row for row, use in zip(held.rows, used, strict=True) if use]
    if not normals:
        return None
    scores = {
        row.id: float(values.mean()) for row, values, use in zip(held.rows, held.scores.T, used, strict=True) if use
    }
    patients = len({patient_of(row) for row in normals})
    if patients < len(normals):
        log(f"warning: {len(normals)} held-out normals of {patients} patients: p-values promise less than their number")
    needs = [name for name in NEEDS if "join" in config.data and any(stated(row, name) for row in normals)]
    ends = held.ends[used]
    low, high = colour_ends(*ends.T) if np.isfinite(ends).all() else (None, None)
    rate = alarm_rate(config)
    threshold = alarm_threshold(list(scores.values()), rate)
    if threshold is None:
        log(f"warning: {len(scores)} held-out normals give no p-value up to {rate:g}: {math.ceil(1 / rate) - 1} would")
    about = {
        "n": len(scores),
        "patients": patients,
        "needs": needs,
        "alarm_rate": rate,
        "threshold": threshold,
        "colours": {"low": low, "high": high},
        "of": scored_by(config, system, results),
        "scores": scores,
    }
    write_text(workdir / CALIBRATION, json.dumps(about, indent=1))
    write_seen(workdir, normals)
    log(f"calibrated on {len(scores)} held-out normals: {workdir / CALIBRATION}")
    return Calibration(scores, low, high, tuple(needs))


def stated(row: Row, name: str) -> bool:
    """Whether a row says something in the column `name` of `NEEDS`."""
    return bool(row.region if name == "region" else row.extra.get(name))


def calibrate_run(config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path) -> None:
    """Calibrates a run that is not evaluated, where its data have held-out normals."""
    val = [row for row in rows if row.split == "val"]
    normals = [row for row, use in zip(val, calibrators(config, system, val), strict=True) if use]
    if not normals:
        log(UNCALIBRATED)
        return
    results = restore_results(config, system, workdir)
    if system.sweep:
        held = held_volumes(config, system, normals, sweeper(config, system.sweep, results))
    else:
        scored = scorer(config, system, results)(Images(normals, config), np.arange(len(normals)))
        held = held_images(system, normals, scored)
    calibrate(config, system, results, held, workdir)


def read_calibration(
    config: ConfigDict, system: System, results: Results, workdir: Path, say: Callable[[str], None] = log
) -> Calibration | None:
    """The run's calibration; None, and why to `say`, where there is none or it is of other weights or settings. Raises
    InputError where the file is damaged."""
    file = workdir / CALIBRATION
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        scores = {str(name): float(score) for name, score in about["scores"].items()}
        low, high = (None if end is None else float(end) for end in (about["colours"]["low"], about["colours"]["high"]))
        weights, settings = str(about["of"]["weights"]), dict(about["of"]["settings"])
        needs = tuple(str(name) for name in about["needs"])
        if not scores or not np.isfinite([*scores.values(), low or 0, high or 0]).all():
            raise ValueError("no scores, or not finite ones")
    except FileNotFoundError:
        say(UNCALIBRATED)
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is no calibration ({error!r}): delete it and run jmae.evaluate again") from None
    own = json.loads(json.dumps(scored_by(config, system, results)))
    if weights != own["weights"]:
        say(f"warning: {file} is of other weights: no p-values; run jmae.evaluate again")
        return None
    if other := [k for k in settings | own["settings"] if settings.get(k) != own["settings"].get(k)]:
        say(f"warning: {file} is of another evaluation.{other[0]}: no p-values")
        return None
    return Calibration(scores, low, high, needs)


def scored_by(config: ConfigDict, system: System, results: Results) -> dict[str, Any]:
    """What a score depends on but the case: the SHA-256 of the weights, and the settings of `evaluation` that are not
    of memory or figures alone."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(results):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    precision = str(jnp.dtype(compute_type(config))) if "dtype" in config.get("model", {}) else ""
    settings = {"score": system.primary, "dtype": precision} | {
        k: v for k, v in config.evaluation.items() if k not in NO_SCORE
    }
    return {"weights": digest.hexdigest(), "settings": settings}


def colours_of(calibration: Calibration) -> Scale | None:
    """The colour scale of all maps of a run; None where the normals have no maps."""
    if calibration.low is None or calibration.high is None:
        return None
    low, high = PERCENTILES
    source = f"median of the {low:g}th and 95th percentile of the {high:g}th percentiles of each map of the "
    return Scale(calibration.low, calibration.high, f"{source}{len(calibration.scores)} held-out normals")


def alarm_rate(config: ConfigDict) -> float:
    """The false-alarm rate that is asked for; raises InputError where it is none."""
    rate = config.evaluation.get("alarm_rate", 0.05)
    if not 0 < rate < 1:
        raise InputError(f"evaluation.alarm_rate={rate}: is no rate: write one between 0 and 1, as 0.05")
    return rate


def alarms(
    split: "Split", values: Sequence[float | None], calibration: Calibration | None, rate: float
) -> dict[str, Any] | None:
    """How often labelled rows that have a p-value have one of at most `rate`; None where no row has one."""
    p = np.array([np.nan if value is None else value for value in values])
    if not calibration or np.isnan(p).all():
        return None
    of = lambda label: (split.labels == label) & ~np.isnan(p)
    share = lambda label: float((p[of(label)] <= rate).mean()) if of(label).any() else None
    threshold = alarm_threshold(list(calibration.scores.values()), rate)
    found = {"n": len(calibration.scores), "rate": rate, "threshold": threshold}
    return found | {"normal": share(0), "abnormal": share(1)}


# --- cheap baselines --------------------------------------------------------------------------------------------------


def baseline_scores(
    normals: Images, images: Images, n: int, *, mapped: int, share: float = 1.0, pixels: bool = False
) -> Scored:
    """The cheap baselines on the first `n` of `images`, fitted to the training normals, both cut to the central
    `share`; with `pixels` also the maps of the first `mapped`. Images are shrunk one by one, as all may not fit in
    memory at once."""
    side = 64 if len(images.size) == 2 else 32
    cut = lambda image: np.stack([central(channel, share) for channel in np.moveaxis(image, -1, 0)], -1)
    small = lambda i, of: baselines.shrink(cut(of.image(np.array([i]))[0])[None], side)[0]
    train, test = (np.stack([small(i, of) for i in range(m)]) for of, m in ((normals, len(normals.rows)), (images, n)))
    scores, maps = baselines.image_scores(train, test), {}
    if pixels:
        whole = lambda of, m: of.image(np.arange(m))
        maps = baselines.pixel_maps(whole(normals, len(normals.rows)), whole(images, mapped))
    lead = lambda values: {name: np.asarray(value)[None] for name, value in values.items()}
    return Scored(lead(maps), lead(scores))


def volume_baselines(
    config: ConfigDict, system: System, volumes: Volumes | None
) -> Callable[[Row, Volume], dict[str, np.ndarray]]:
    """The function (row, prepared volume) -> the cheap baselines' maps on the row's own grid: every channel's
    brightness, standardised as the volume is; the residual of random training crops' principal components in the
    system's own windows; the subtraction image (MAEMI's Eq. 1) of rows that name pre- and post-contrast series."""
    assert system.sweep
    residual = None
    if volumes:
        mean, components = baselines.crop_components(volumes)

        def score(results: Any, image: Array, keys: Array) -> tuple[Array, Array]:
            rest = image.reshape(len(image), -1) - results["mean"]
            rest = rest - (rest @ results["components"].T) @ results["components"]
            error = jnp.mean(rest.reshape(image.shape) ** 2, -1, keepdims=True)
            return error, jnp.ones_like(error)

        fuse = lambda averages, inside: {"maps": {"residual": averages[..., 0]}}
        part = system.sweep._replace(repeats=1, score=score, fuse=fuse, weighted=False, released=False)
        single = config.copy_and_resolve_references()
        single.replicates = 1
        residual = sweeper(single, part, {"mean": mean, "components": components})

    def maps(row: Row, volume: Volume) -> dict[str, np.ndarray]:
        if row.label is None:
            return {}  # nothing to hold them against
        channels = volume.stored.array.shape[-1]
        name = lambda k: "brightness" if channels == 1 else f"brightness of channel {k}"
        standard = (volume.stored.array - volume.mean) / volume.std  # scanners differ in scale
        out = {name(k): standard[..., k] for k in range(channels)}
        if residual:
            out["PCA-30 error"] = volume.grid.back(residual(volume, case_words(row.id))["maps"]["residual"][0])
        if row.pre and row.post:
            subtracted = read_subtraction(row, volume, config.data)
            out["subtraction"] = volume.grid.back(minimum_filter(subtracted, config.evaluation.filter))
        return out

    return maps


# --- figures ----------------------------------------------------------------------------------------------------------


def read_truth(row: Row, result: Result, data: ConfigDict) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(lesion mask, region that was scored) of a row on its own grid. A normal row's mask is empty; None of an abnormal
    row without a mask or a box, and of an unlabelled one: it is left out of pixel figures."""
    empty = np.zeros(result.stored.array.shape[:-1], bool)
    mask = empty if row.label == 0 else lesion_mask(row, result.stored) if row.label == 1 else None
    if mask is None:
        return None
    region = scored_region(row, result.stored, data)
    both = [part for part in (region, result.seen) if part is not None]
    return mask, np.logical_and(*both) if len(both) == 2 else both[0] if both else None


class Pixels:
    """Pixel figures of every map of one part of a split, fed case by case: pooled, and of each patient. With `froc`
    also the sensitivity for lesions at so many false positives an image, with `iou` also how far masks and maps
    overlap image by image, both where no margin is cut off."""

    def __init__(self, rows: Sequence[Row], share: float = 1.0, froc: float = 0.0, iou: bool = False):
        self.share, self.lesions, self.froc, self.iou = share, False, froc, iou
        self.left = Counter(patient_of(row) for row in rows)
        self.pooled: dict[str, list[metrics.Pooled]] = {}
        self.found: dict[str, list[metrics.Froc]] = {}
        self.localised: dict[str, list[metrics.Localisation]] = {}
        self.own: dict[str, dict[str, metrics.Pooled]] = {}  # by patient, of the first replicate
        self.patients: list[dict[str, Any]] = []

    def add(self, row: Row, mask: np.ndarray, region: np.ndarray | None, maps: Mapping[str, Sequence[np.ndarray]]):
        """One case's maps {NAME: a map a replicate}, mask and region, on its own grid."""
        view = lambda x: x if x is None or self.share == 1 else central(x, self.share)
        mask, region, patient = view(mask), view(region), patient_of(row)
        self.lesions |= bool(mask.any())
        mine = self.own.setdefault(patient, {})
        for name, values in maps.items():
            pooled = self.pooled.setdefault(name, [metrics.Pooled() for _ in values])
            for one, value in zip(pooled, values, strict=True):
                one.add(mask, view(value), region)
            mine.setdefault(name, metrics.Pooled()).add(mask, view(values[0]), region)
            if self.froc and self.share == 1:
                lesions = boxes_of(row) if row.boxes and not row.mask else mask
                found = self.found.setdefault(name, [metrics.Froc(self.froc) for _ in values])
                for curve, value in zip(found, values, strict=True):
                    curve.add(lesions, value, region)
            if self.iou and self.share == 1 and row.mask:  # a box is no outline
                localised = self.localised.setdefault(name, [metrics.Localisation() for _ in values])
                for overlap, value in zip(localised, values, strict=True):
                    overlap.add(mask, value, region)

    def close(self, row: Row) -> None:
        """One more row of its patient is done; with the last one the patient's figures are computed."""
        patient = patient_of(row)
        self.left[patient] -= 1
        if not self.left[patient] and (mine := self.own.pop(patient, {})):
            figures = {name: pooled.result() for name, pooled in both_ends(mine).items()}
            self.patients.append({"patient": row.patient or row.id, "figures": figures})

    def result(self, name: str, thresholds: Sequence[float] = ()) -> dict[str, Any] | None:
        """The pooled figures of a map, or of its "low " end, the mean over replicates; None where no case has a lesion
        or there is no such map. `thresholds` are those of held-out normals, one a replicate, or none."""
        each = self.pooled.get(name.removeprefix("low "), ())
        if not self.lesions:
            return None
        mean = mean_of([(one.negated() if name.startswith("low ") else one).result() for one in each])
        curves = [found for one in self.found.get(name, ()) if (found := one.result())]
        if mean is not None and curves:
            sensitivity = float(np.mean([found["sensitivity"] for found in curves]))
            mean |= {"froc": curves[0] | {"sensitivity": sensitivity}}  # with the first replicate's curve
        localised = zip(self.localised.get(name, ()), thresholds or repeat(None), strict=False)
        overlaps = [found for one, t in localised if (found := one.result(t))]
        return mean | {"localisation": mean_of(overlaps)} if mean is not None and overlaps else mean

    def per_patient(self, primary: str, scores: Sequence[str]) -> list[dict[str, Any]]:
        """A row {patient, auroc, ap, prevalence, baselines} a patient, of the primary score's map; baselines are all
        that are none of the system's `scores`, either end of a brightness."""
        keys = ("auroc", "ap", "prevalence")
        return [
            {
                "patient": p["patient"],
                **{k: p["figures"][primary][k] for k in keys},
                "baselines": {b: {k: f[k] for k in keys[:2]} for b, f in p["figures"].items() if b not in scores},
            }
            for p in self.patients
        ]


def boxes_of(row: Row) -> list[tuple[tuple[float, float], ...]]:
    """A row's boxes as (low, high) of each axis of the array: in 2D the manifest's x runs along the columns."""
    d = len(row.boxes[0]) // 2
    pairs = [tuple(zip(box[:d], box[d:], strict=True)) for box in row.boxes]
    return [pair[::-1] if d == 2 else pair for pair in pairs]


def both_ends(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Maps with the other end of each brightness: which of them is abnormal is not the library's to know."""
    lows = {f"low {name}": pooled.negated() for name, pooled in maps.items() if name.startswith("brightness")}
    return {**maps, **lows}


def patient_of(row: Row) -> str:
    """The patient, or the row itself where it names none."""
    return f"patient {row.patient}" if row.patient else f"case {row.id}"


def mean_of(each: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of equal dicts of numbers and lists of numbers, key by key; counts stay whole; None of none."""
    if len(each) < 2:
        return dict(each[0]) if each else None
    same = lambda value: value is None or isinstance(value, int)
    return {k: v if same(v) else np.mean([e[k] for e in each], axis=0) for k, v in each[0].items()}


def figures(
    scores: Mapping[str, np.ndarray],
    names: Sequence[str],
    pixels: Pixels,
    rows: Sequence[Row],
    draws: int,
    thresholds: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """{NAME: {"image", "pixel"}} of scores (r, n) of labelled rows and of the maps `names`; `draws` of the bootstrap,
    `thresholds` of maps by `held_out`.

    With replicates each figure is the mean over them, and "replicates" holds their means and 1.96 deviations.
    """
    labels, patients = np.array([row.label for row in rows], bool), [row.patient for row in rows]
    out: dict[str, dict[str, Any]] = {}
    for name in [*scores, *(name for name in names if name not in scores)]:
        image = [metrics.image_metrics(labels, v, patients, draws=draws) for v in scores.get(name, ())]
        out[name] = {"image": mean_of(image), "pixel": pixels.result(name, thresholds.get(name, ()))}
        if len(image) > 1:
            out[name]["replicates"] = {k: metrics.replicate_summary([e[k] for e in image]) for k in ("auroc", "ap")}
    return out


def better_ends(baseline: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a baseline "NAME" and its "low NAME" the better one."""
    worth = lambda entry: (entry["image"] or entry["pixel"] or {}).get("auroc", 0)
    lows = [name for name in baseline if name.startswith("low ") and name.removeprefix("low ") in baseline]
    dropped = {min((name, name.removeprefix("low ")), key=lambda n: worth(baseline[n])) for name in lows}
    return {name: entry for name, entry in baseline.items() if name not in dropped}


# --- the evaluation ---------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The rows that are scored."""

    name: str
    rows: list[Row]
    val: list[Row]  # labelled rows of `val` that choose the threshold; none where a class is missing
    normals: list[Row]  # the normal rows of `val`, held out; none where `val` itself is scored
    labels: np.ndarray  # (n,), -1 unknown
    marked: bool  # whether any row has a mask or a box

    @property
    def held(self) -> list[Row]:
        """The rows of `val` that are scored beside it."""
        return self.val or self.normals

    @property
    def known(self) -> np.ndarray:
        """(n,) which rows have a label."""
        return self.labels >= 0


class Part(NamedTuple):
    """A part of a split that gets figures of its own."""

    inside: np.ndarray  # (n,), which rows
    pixels: Pixels
    share: float = 1.0  # of each axis, in the middle


class Gathered(NamedTuple):
    """What is kept of the results: the maps are written or counted, and gone."""

    scores: dict[str, np.ndarray]  # (r, n)
    inner: dict[str, np.ndarray]  # (r, n): the scores of the maps' central part
    cases: list[Case]
    seconds: float
    cheap: dict[str, np.ndarray]  # (1, n): scores of baselines that come case by case; of those that every row has
    digests: list[str]  # (n,) of the images' values


def check_processes(config: ConfigDict) -> None:
    """Raises InputError where the evaluation cannot be of as many processes as there are."""
    if config.evaluation.get("convergence") and jax.process_count() > 1:
        raise InputError("evaluation.convergence is of one process: set it to 0, and evaluate again with one")


def evaluate(
    config: ConfigDict,
    system: System,
    rows: Sequence[Row],
    workdir: Path,
    *,
    split: str,
    out: Path,
    own: bool = True,
    unchecked: str = "",
) -> dict[str, Any]:
    """Scores `split` of `rows`, writes metrics.json, scores.csv, report.html and maps into `out`; returns the metrics.

    Labels of the split and of `val` serve figures alone. `own` data and settings of the run calibrate it, on the
    normals of `val`; any other are read by the calibration that it has. `unchecked` says why it is not known whether
    the cases were trained on; "" where it is. Raises InputError where the split is empty,
    or `evaluation.alarm_rate` is no rate. Of several processes the first writes and returns; the others return {}.
    """
    began, why = time.monotonic(), list[str]()  # why there are no p-values

    def told(line: str) -> None:
        why.append(line.removeprefix("warning: "))
        log(line)

    check_processes(config)
    rate, of = alarm_rate(config), split_of(rows, split)
    parts = parts_of(config, of, volumes=system.sweep is not None)
    results = restore_results(config, system, workdir)
    log(f"{split}: scoring {len(of.rows)} cases")
    if of.known.any() and not any(row.split == "train" for row in rows):
        log("the manifest has no train rows: no cheap baselines that are fitted to them")
    if system.sweep:
        stream = score_volumes(config, system, results, rows, of, workdir)
    else:
        stream = score_images(config, system, results, rows, of, parts)
    if own and of.normals and stream.held and not other_rows(system, rows, workdir):
        calibration = calibrate(config, system, results, stream.held, workdir, told)
    else:
        calibration = read_calibration(config, system, results, workdir, told)
    judge = calibration
    if split in ("train", "unlabeled"):
        judge = None
        told(f"{split}: no p-values, which are of cases that were not trained on")
    if jax.process_index():  # it scores its share; the first process counts and writes
        if system.sweep:
            deque(stream.results, maxlen=0)
        return {}
    kept = gather(config, system, of, stream, parts, out)
    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split,
        "n": len(of.rows),
        "n_normal": int((of.labels == 0).sum()),
        "n_abnormal": int((of.labels == 1).sum()),
        "primary": system.primary,
        "image": None,
        "pixel": None,
        "scores": {},
        "subsets": {},
        "per_patient": None,
        "baselines": {},
        "decision": None,
        "chi2": None,
        "alarms": None,
    }
    if leaking := sorted({row.leak for row in rows if row.leak}):
        evaluation["leaks"] = leaking
    if unchecked:
        evaluation["unchecked"] = unchecked
    if of.known.any():
        found = {title: part_figures(config, system, of, stream, kept, title, part) for title, part in parts.items()}
        evaluation |= found.pop(WHOLE) | {"n": len(of.rows), "subsets": found}
        evaluation |= of_scores(config, of, kept.scores[system.primary][:, of.known], stream.held)
        if (shown := shown_map(system)) in parts[WHOLE].pixels.pooled:
            evaluation["per_patient"] = parts[WHOLE].pixels.per_patient(shown, list(evaluation["scores"]))

    if config.evaluation.get("convergence"):
        from jmae.convergence import convergence  # which is made of this module's parts

        labelled = [row for row in of.rows if row.label is not None]
        if numbers := convergence(config, system, results, labelled):
            evaluation["convergence"] = numbers
    of_row = lambda i: {name: values[:, i] for name, values in kept.scores.items()}
    table = [score_line(row, of_row(i), system, judge) for i, row in enumerate(of.rows)]
    evaluation["alarms"] = alarms(of, [line["p_value"] for line in table], calibration, rate)
    if not evaluation["alarms"]:
        needs = " and a ".join(calibration.needs) if calibration else ""
        none = (
            f"no p-values: the held-out normals were scored with a {needs}, which no row here has"
            if needs
            else NO_OTHERS
        )
        evaluation["uncalibrated"] = why[0] if why else none
    evaluation["resampled"] = "patients" if any(row.patient for row in of.rows) else "cases"  # for the intervals
    evaluation["digests"] = {
        "recipe": recipe_digest(config),
        "rows trained on": rows_of(system, workdir) or "unknown",
        "images evaluated": hashlib.sha256("\n".join(kept.digests).encode()).hexdigest()[:16],
    }
    history = read_history(workdir / "metrics.jsonl")
    if printed := beside_printed(config, system, rows, workdir, history):
        evaluation["printed"] = printed
    evaluation["seconds"] = time.monotonic() - began
    evaluation["seconds_per_case"] = kept.seconds / len(of.rows)
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    about_cases = zip(of.rows, kept.digests, strict=True)
    write_csv(out / "cases.csv", [{"id": row.id, "patient": row.patient, "image": seen} for row, seen in about_cases])
    write_text(out / "config.json", recipe.to_json(config))  # with what was changed for this evaluation
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))
    environment = workdir / "environment.json"
    about = json.loads(environment.read_text()) if environment.exists() else {}
    page = {**evaluation, "table": table}
    colours = colours_of(calibration) if calibration else None
    write_report(out / "report.html", page, kept.cases, history, config.to_dict(), about, colours)
    if own:
        write_cards(workdir, config, system, rows)
    log(headline(evaluation))
    log(f"report: {out / 'report.html'}")
    return evaluation


def beside_printed(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """{stage, metric, epoch, printed, ours} for every value of a stage's metrics that the paper prints: ours is the
    mean over that epoch, None where the run did not get so far; nothing where other rows are scored than trained on."""
    printed = [stage for stage in system.stages if stage.printed]
    if not printed or recipe.read(workdir).data.manifest != config.data.manifest:
        return []
    out = []
    for stage in printed:
        n = len(stage.rows([row for row in rows if row.split in ("train", "unlabeled")], {}))
        length = max(1, n // stage.batch)
        for metric, values in stage.printed.items():
            lines = [(h["step"], h[metric]) for h in history if h["stage"] == stage.name and metric in h]
            for epoch, value in values.items():
                end = epoch * length
                inside = [v for step, v in lines if end - length < step <= end]  # lines are means since the last one
                reached = bool(lines) and lines[-1][0] >= end
                ours = float(np.mean(inside)) if inside else next((v for step, v in lines if step > end), None)
                entry = {"stage": stage.name, "metric": metric, "epoch": epoch, "printed": value}
                out.append(entry | {"ours": ours if reached else None})
    return out


def trained_rows(system: System, rows: Sequence[Row]) -> list[Row]:
    """The rows whose images training reads."""
    splits = ["train"]
    if not system.sweep or any(stage.selection for stage in system.stages):
        splits.append("unlabeled")
    if any(stage.check and stage.check.labelled for stage in system.stages):
        splits.append("val")
    return [row for row in rows if row.split in splits]


def other_rows(system: System, rows: Sequence[Row], workdir: Path) -> bool:
    """Whether the data, changed since, no longer tell which rows were trained on: then none may calibrate."""
    saved = rows_of(system, workdir)
    if saved in (None, digest(trained_rows(system, rows))):
        return False
    log("warning: the manifest has changed since the training: not calibrated on it anew")
    return True


def score_line(
    row: Row, scores: Mapping[str, np.ndarray], system: System, calibration: Calibration | None
) -> dict[str, Any]:
    """A line of scores.csv, of scores (r,): the mean over replicates."""
    mean = {name: float(values.mean()) for name, values in scores.items()}
    primary = mean.pop(system.primary)
    p_value = None
    if calibration and not row.leak and all(stated(row, name) for name in calibration.needs):
        p_value = calibration.p_value(primary, row.id)
        if p_value is None and row.split != "val":
            log(f"{row.id}: no p-value: it has the name of a held-out normal")
    return {"id": row.id, "label": row.label, "score": primary, "p_value": p_value} | mean


def split_of(rows: Sequence[Row], name: str) -> Split:
    """A split of a manifest; raises InputError where it is empty."""
    chosen = [row for row in rows if row.split == name]
    if not chosen:
        raise InputError(f"split {name!r} has no rows: one of {', '.join(sorted({row.split for row in rows}))}")
    val = [row for row in rows if row.split == "val" != name and row.label is not None]  # it chooses thresholds
    normals = [row for row in val if row.label == 0]
    val = val if 0 < len(normals) < len(val) else []
    labels = np.array([-1 if row.label is None else row.label for row in chosen])
    return Split(name, chosen, val, normals, labels, any(row.mask or row.boxes for row in chosen))


def gather(
    config: ConfigDict, system: System, split: Split, stream: Stream, parts: Mapping[str, Part], out: Path
) -> Gathered:
    """Goes through the results once: counts pixels, writes maps, keeps scores and pictures."""
    scores: dict[str, list[np.ndarray]] = {}
    inner: dict[str, list[np.ndarray]] = {}
    cases: list[Case] = []
    cheap: list[Mapping[str, float]] = []
    digests: list[str] = []
    seconds = 0.0
    for i, (row, result) in enumerate(zip(split.rows, stream.results, strict=True)):
        seconds += result.seconds
        cheap.append(result.cheap_scores)
        digests.append(hashlib.sha256(np.ascontiguousarray(result.stored.array).tobytes()).hexdigest()[:16])
        for name, values in result.scores.items():
            scores.setdefault(name, []).append(values)
        for name in result.maps.keys() & result.scores.keys():
            inner.setdefault(name, []).append(np.array([central(m, CENTRAL).mean() for m in result.maps[name]]))
        truth = read_truth(row, result, config.data) if split.marked and result.maps else None
        own = own_maps(result) if truth else {}
        for part in parts.values():
            if part.inside[i]:
                if truth:
                    part.pixels.add(row, *truth, own)
                part.pixels.close(row)
        if (shown := shown_map(system)) not in result.maps:
            continue
        mean = result.maps[shown].mean(0)
        picture, confidence = (
            None if each is None else each.mean(0) for each in (result.reconstruction, result.confidence)
        )
        asked = {"anomaly": config.evaluation.maps, "confidence": config.evaluation.maps}
        asked |= {"recon": bool(config.evaluation.get("reconstruction"))}
        for name, array in own_results(result, system, [name for name, wanted in asked.items() if wanted]).items():
            (out / "maps").mkdir(parents=True, exist_ok=True)
            write_map(out / "maps" / f"{row.id}_{name}", array, result.stored)
        if stream.shown is None or i in stream.shown:
            lesion = result.scored(truth[0]) if truth else None
            score = float(result.scores[system.primary].mean())
            further = {name: each.mean(0) for name, each in result.pictures.items()}
            case = Case(row.id, row.label, score, result.image, mean, lesion, picture, None, confidence, further)
            cases.append(one_slice(case, held_side(len(split.rows))))
    stack = lambda values: {name: np.stack(each, 1) for name, each in values.items()}
    known = [scores for scores, row in zip(cheap, split.rows, strict=True) if row.label is not None]
    whole = [name for name in (known[0] if known else ()) if all(name in scores for scores in known)]
    each = {name: np.array([[scores.get(name, np.nan) for scores in cheap]]) for name in whole}
    return Gathered(stack(scores), stack(inner), cases, seconds, each, digests)


def own_results(result: Result, system: System, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """What is asked of "anomaly", "confidence" (*size) and "recon" (*size, c), as far as the system has it, on the
    case's own grid, means over replicates; the reconstruction in the image's own values."""
    back = lambda values: np.asarray(result.own(values.mean(0)), np.float32)
    found: dict[str, np.ndarray] = {}
    if "anomaly" in asked and shown_map(system) in result.maps:
        found["anomaly"] = back(result.maps[shown_map(system)])
    if "confidence" in asked and result.confidence is not None:
        found["confidence"] = back(result.confidence)
    if "recon" in asked and result.reconstruction is not None:
        found["recon"] = np.asarray(result.own(result.values(result.reconstruction.mean(0))), np.float32)
    return found


def part_figures(
    config: ConfigDict, system: System, split: Split, stream: Stream, gathered: Gathered, title: str, part: Part
) -> dict[str, Any]:
    """What metrics.json says of one part of the split: the primary score's figures at the top, then those of all
    scores, and of the baselines."""
    rows = [row for row, used in zip(split.rows, part.inside, strict=True) if used]
    of = lambda values: {name: value[:, part.inside] for name, value in values.items()}
    pooled, draws = part.pixels.pooled, config.evaluation.draws
    ours = gathered.scores if part.share == 1 else gathered.inner
    scores = figures(of(ours), [m for m in pooled if m in gathered.inner], part.pixels, rows, draws, stream.thresholds)
    cheap = stream.cheap[title].scores if title in stream.cheap else gathered.cheap
    others = [m for m in pooled if m not in gathered.inner]
    others += [f"low {m}" for m in others if m.startswith("brightness") and system.sweep]
    baseline = figures(of(cheap), others, part.pixels, rows, draws, stream.thresholds)
    top = scores.get(system.primary, {"image": None, "pixel": None})
    top = top | {"pixel": scores.get(system.map, top)["pixel"]}
    return {"n": int(part.inside.sum()), **top, "scores": scores, "baselines": better_ends(baseline)}


def of_scores(config: ConfigDict, split: Split, values: np.ndarray, held: Held | None) -> dict[str, Any]:
    """The decision at the threshold chosen on `val`, and the distance of the classes, of primary scores (r, known).
    ours: by Youden's J, which does not depend on how many of `val` are abnormal, where a recipe names no rule."""
    labels = split.labels[split.known]
    decision = None
    if held and split.val:
        val, rule = np.array([row.label for row in split.val], int), config.evaluation.get("decision", "youden")
        thresholds = [metrics.threshold_on(val, v, rule) for v in held.scores]
        each = [metrics.at_threshold(labels, v, t) for v, t in zip(values, thresholds, strict=True)]
        decision = (mean_of(each) or {}) | {"chosen_by": rule}
    chi2 = mean_of([metrics.chi2_distance(v[labels == 0], v[labels == 1]) for v in values])
    return {"decision": decision, "chi2": chi2}


def parts_of(config: ConfigDict, split: Split, *, volumes: bool) -> dict[str, Part]:
    """The labelled rows, those of each subset column and, of images, their central crop."""
    rows, known = split.rows, split.known

    def part(inside: np.ndarray, share: float = 1.0) -> Part:
        used = [row for row, used in zip(rows, inside, strict=True) if used]
        further = config.evaluation.get("froc", 0.0), bool(config.evaluation.get("iou", 0.0))
        return Part(inside, Pixels(used, share, *further), share)

    parts = {WHOLE: part(known)}
    for column in config.evaluation.subsets:
        if column not in rows[0].extra:
            log(f"warning: no column {column!r} in the manifest: no figures of that subset")
            continue
        parts[column] = part(known & np.array([row.extra[column] not in ("", "0") for row in rows]))
    if not volumes:
        parts[f"central {CENTRAL:.0%}"] = part(known, CENTRAL)
    return parts


def found_lesions(pixel: Mapping[str, Any]) -> str:
    """The sensitivity for lesions, where it was asked for."""
    froc = pixel.get("froc")
    return f"  lesions found {froc['sensitivity']:.3f} at up to {froc['at']:g} false positives an image" if froc else ""


def overlap(pixel: Mapping[str, Any]) -> str:
    """The IoU of maps and masks, where it was asked for."""
    found = pixel.get("localisation")
    if not found:
        return ""
    known = "" if found["normals"] is None else f" {found['normals']:.3f}"
    return f"  IoU{known} (oracle {found['oracle']:.3f})"


def headline(evaluation: Mapping[str, Any]) -> str:
    """What the command says at its end."""

    def line(name: str, image: Mapping[str, Any]) -> str:
        low, high = image["auroc_ci"]
        return f"  {name:<24} AUROC {image['auroc']:.3f} [{low:.3f}, {high:.3f}]  AP {image['ap']:.3f}"

    unknown = evaluation["n"] - evaluation["n_normal"] - evaluation["n_abnormal"]
    counts = f"{evaluation['split']}: {evaluation['n_normal']} normal, {evaluation['n_abnormal']} abnormal"
    counts += f", {unknown} of unknown label" if unknown else ""
    if evaluation.get("leaks"):
        counts = f"NOT AN INDEPENDENT TEST: patients or images are in two splits (data.allow_leaks)\n{counts}"
    primary, reason = evaluation["primary"], without_curves(evaluation)
    lines = [counts, *([reason] if reason else [])]
    scores, cheap = evaluation["scores"], evaluation["baselines"]
    if not reason:
        lines += [line(name + " *" * (name == primary), s["image"]) for name, s in scores.items() if s["image"]]
        rated = [line(name, s["image"]) for name, s in cheap.items() if s["image"]]
        lines += ["cheap baselines:", *rated] if rated else []
    if found := evaluation["alarms"]:
        shares = ", ".join(f"{found[word]:.1%} of {word}" for word in ("normal", "abnormal") if found[word] is not None)
        if shares:
            lines.append(f"p-value up to {found['rate']:g} (of {found['n']} held-out normals): {shares}")
    if evaluation["pixel"]:
        lines.append(f"pixels, of which {evaluation['pixel']['prevalence']:.4f} are lesion:")
        named = [(name + " *" * (name == primary), s) for name, s in [*scores.items(), *cheap.items()]]
        lines += [
            f"  {name:<24} AUROC {s['pixel']['auroc']:.3f}  AP {s['pixel']['ap']:.3f}"
            f"{found_lesions(s['pixel'])}{overlap(s['pixel'])}"
            for name, s in named
            if s["pixel"]
        ]
        mean = metrics.patient_mean(evaluation["per_patient"])
        lines.append(f"  mean of {mean['n']} patients      AUROC {mean['auroc']:.3f}  AP {mean['ap']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
