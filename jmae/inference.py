"""Scoring with a trained run: its weights restored, one compiled program, and a result for each case."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

from jmae import checkpoint
from jmae.data.files import Image
from jmae.data.loader import Decoded, Images, case_words, in_order, prepared, scored_region, stored_image
from jmae.data.manifest import Row
from jmae.data.transforms import resize
from jmae.data.volumes import Volume
from jmae.errors import InputError
from jmae.masking import case_keys
from jmae.processes import gather
from jmae.reconstruct import fitting, out_of_memory, too_large
from jmae.run_folder import log
from jmae.scoring import top_mean
from jmae.sharding import device_mesh, inside_mesh, replicated, split
from jmae.system import Results, Sweep, System, stage_keys
from jmae.windows import inside, tile

SECONDS_BETWEEN_LINES = 20  # while cases are scored


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
        target = jax.tree.map(place, target)
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
            averages = sweep.average(
                partial(sweep.score, result),
                volume,
                origins,
                number,
                coverage,
                case_keys(key, words[None])[0],
                window=sweep.window,
                repeats=repeats,
                batch=-(-batch // devices) * devices,
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


def scored_volumes(config: ConfigDict, rows: Sequence[Row], run: Callable) -> Iterator[tuple[Row, Volume, Result]]:
    """Rows with their volumes and results, prepared one ahead; a row a process at a time."""
    volumes, n, own = ahead(partial(prepared, data=config.data), rows), jax.process_count(), jax.process_index()
    for start in range(0, len(rows), n):
        part = [(row, next(volumes)) for row in rows[start : start + n]]
        began = time.monotonic()
        case, volume = part[min(own, len(part) - 1)]  # the last rows may be fewer than processes: one is scored twice
        outs = gather(run(volume, case_words(case.id)))
        seconds = (time.monotonic() - began) / len(part)
        for (row, volume), out in zip(part, outs, strict=False):
            yield row, volume, volume_result(config, row, volume, lambda *_, out=out: out)._replace(seconds=seconds)


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


def own_maps(result: Result) -> dict[str, list[np.ndarray]]:
    """All maps of a row on its own grid, one a replicate, also the baselines'."""
    maps = {name: [result.own(m) for m in values] for name, values in result.maps.items()}
    return maps | {name: [m] for name, m in result.cheap.items()}


def shown_map(system: System) -> str:
    """The name of the map that stands for a system; there may be none of that name."""
    return system.map or system.primary


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
