"""python -m jmae.evaluate --workdir DIR [--manifest MANIFEST.csv] [--split test] [--out DIR]
                         [--config.evaluation.KEY=VALUE ...] [--debug]

Scores a split with a trained run and writes metrics.json, scores.csv, report.html and the maps, into DIR/evaluation
(`test`) or DIR/evaluation-SPLIT where no other folder is named; with another manifest one must be. Exit codes: 0 done;
2 the input or the environment is wrong.
"""

import json
import sys
import time
from collections import Counter
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
from jaxtyping import Array
from ml_collections import ConfigDict
from scipy.ndimage import minimum_filter

from jmae import baselines, checkpoint, metrics, recipe
from jmae.data.crops import Volumes
from jmae.data.files import Image, write_map
from jmae.data.loader import (
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
from jmae.reconstruct import fitting
from jmae.report import Case, choose_cases, one_slice, without_curves, write_report
from jmae.run_folder import log, read_history, write_csv, write_text
from jmae.scoring import top_mean
from jmae.sharding import device_mesh, keep_compiled, replicated, split
from jmae.system import Results, Sweep, System, load_system, stage_keys
from jmae.windows import average, inside, tile

WHOLE = "whole"  # the part that is the split itself
SECONDS_BETWEEN_LINES = 20  # while cases are scored
CENTRAL = 0.8  # share of each axis that the central crop keeps


def main(argv: list[str]) -> int:
    given = recipe.arguments(argv, __doc__, ["workdir", "manifest", "split", "out", "config"])
    if fixed := [flag for flag in given if flag.startswith("config") and not flag.startswith("config.evaluation.")]:
        raise InputError(
            f"--{fixed[0]} is unknown: of the run's recipe --config.evaluation.KEY=VALUE alone can be changed"
        )
    if "workdir" not in given:
        raise InputError("no run folder: write --workdir=DIR")
    workdir = Path(given["workdir"])
    config = recipe.read(workdir)
    recipe.override(config, given, "evaluation.")
    split = given.get("split", "test")
    if "manifest" in given:
        if "out" not in given:
            raise InputError("--manifest goes with --out=DIR: the run's own evaluation stays as it is")
        config.data.manifest = given["manifest"]
        # These are of the data trained on.
        neutral = {"anomaly_ratio": -1.0, "unlabeled_size": 0, "unlabeled_labels": ""}
        config.data.update({key: value for key, value in neutral.items() if key in config.data})
    keep_compiled()
    own = workdir / ("evaluation" if split == "test" else f"evaluation-{split}")
    system, out = load_system(config), Path(given.get("out", own))
    evaluate(config, system, load_rows(config, log), workdir, split=split, out=out)
    return 0


# --- scores -----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Scores of n images by r replicates; higher is more abnormal."""

    maps: dict[str, np.ndarray]  # (r, n, *size)
    scores: dict[str, np.ndarray]  # (r, n)
    seconds: float = 0.0
    reconstruction: np.ndarray | None = None  # (r, n, *size, c), in the images' own range
    confidence: np.ndarray | None = None  # (r, n, *size)


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


class Stream(NamedTuple):
    """The results of a split's rows in order, and what was scored with them."""

    results: Iterator[Result]
    on_val: np.ndarray | None = None  # (r, m): the primary scores of the labelled validation rows
    cheap: Mapping[str, Scored] = MappingProxyType({})  # the baselines' scores, by part
    shown: frozenset[int] | None = None  # the rows whose pictures may be shown; None: any
    thresholds: Mapping[str, Sequence[float]] = MappingProxyType({})  # `held_out`, of each map and replicate


def restore_results(config: ConfigDict, system: System, workdir: Path) -> Results:
    """What `system.score` reads, from the run folder's last checkpoints; raises InputError where one is missing."""
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
    return results


def seeds_of(config: ConfigDict) -> Array:
    """A key a replicate."""
    return jnp.stack([jax.random.key(config.seed + r) for r in range(config.replicates)])


def each_replicate(one: Callable, results: Any, keys: Array) -> Any:
    """`one(results, key)` of every replicate, on a leading axis."""
    if len(keys) > 1:
        return jax.vmap(one)(results, keys)
    return jax.tree.map(lambda x: x[None], one(results, keys[0]))


def scorer(config: ConfigDict, system: System, results: Results) -> Callable[[Images, np.ndarray], Scored]:
    """The function (images, row numbers) -> Scored, one compiled program for all batches.

    Batches are split over the devices; a case's result depends on neither, as its key comes from its id.
    """
    mesh, keys = device_mesh(), seeds_of(config)
    devices = mesh.shape["data"]
    b = -(-config.evaluation.batch // devices) * devices

    one = system.score
    assert one

    def score(results: Results, batch: Any, keys: Any, chunk: int) -> Any:
        return each_replicate(lambda result, key: one(result, batch, key, chunk=chunk), results, keys)

    shapes = {"image": (b, *config.data.size, config.data.channels), "case": (b, 2)}
    types = {"image": jnp.float32, "case": jnp.uint32}
    batch = {name: jax.ShapeDtypeStruct(shapes[name], types[name], sharding=split(mesh)) for name in shapes}
    program = jax.jit(score, static_argnums=3, out_shardings=replicated(mesh))
    compiled, chunk = fitting(
        lambda chunk: program.lower(results, batch, keys, chunk), config.evaluation.get("chunk") or system.masks
    )
    if chunk < system.masks:
        log(f"scoring {chunk} of {system.masks} masks at a time")

    def run(images: Images, rows: np.ndarray) -> Scored:
        began, said, parts = time.monotonic(), time.monotonic(), []
        for used, host in in_order(images, rows, b):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log(f"{len(parts) * b} of {len(rows)} images scored")
            # This batch is dispatched before the one before is fetched.
            parts.append((used, compiled(results, jax.device_put(host, split(mesh)), keys)))
            parts[-2:-1] = [(k, jax.device_get(out)) for k, out in parts[-2:-1]]
        outs = [jax.tree.map(lambda x, k=k: x[:, :k], jax.device_get(out)) for k, out in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *outs)
        further = joined.get("reconstruction"), joined.get("confidence")
        return Scored(joined["maps"], joined["scores"], time.monotonic() - began, *further)

    return run


def sweeper(config: ConfigDict, sweep: Sweep, results: Any) -> Callable[[Volume, np.ndarray], dict[str, Any]]:
    """The function (prepared volume, words of its id) -> {"maps": {NAME: (r, *size)}, "reconstruction"}: one program a
    bucket of sizes, whatever the case; as many windows at a time as fit in the memory, split over the devices."""
    mesh, keys = device_mesh(), seeds_of(config)
    devices = mesh.shape["data"]
    programs: dict[tuple[int, ...], tuple[Any, int]] = {}

    def score(results, volume, size, origins, number, coverage, words, keys, batch):
        def one(result, key):
            averages = average(
                partial(sweep.score, result),
                volume,
                origins,
                number,
                coverage,
                case_keys(key, words[None])[0],
                window=sweep.window,
                repeats=sweep.repeats,
                batch=-(-batch // devices) * devices,
                weighted=sweep.weighted,
                released=sweep.released,
                place=lambda x: jax.lax.with_sharding_constraint(x, split(mesh)),
            )
            return sweep.fuse(averages, inside(volume.shape[:-1], size))

        return each_replicate(one, results, keys)

    program = jax.jit(score, static_argnums=8, out_shardings=replicated(mesh))

    def run(volume: Volume, words: np.ndarray) -> dict[str, Any]:
        shape = volume.array.shape[:-1]
        tiling = tile(shape, sweep.window, sweep.stride, side=volume.side, midline=volume.midline)
        origins = np.zeros((2 ** max(4, (len(tiling.origins) - 1).bit_length()), len(shape)), np.int32)
        origins[: len(tiling.origins)] = tiling.origins
        array = np.pad(volume.array, [*tiling.pad, (0, 0)])
        number = np.int32(len(tiling.origins))
        case = (array, np.array(tiling.size, np.int32), origins, number, tiling.coverage, words)
        case = jax.device_put(case, replicated(mesh))
        kind = (*array.shape, len(origins))
        if kind not in programs:
            lower = lambda batch: program.lower(results, *case, keys, batch)
            programs[kind] = fitting(lower, config.evaluation.batch)
            if programs[kind][1] < config.evaluation.batch:
                log(f"volumes of {array.shape[:-1]}: scoring {programs[kind][1]} windows at a time")
        out = jax.device_get(programs[kind][0](results, *case, keys))
        own = tuple(slice(low, low + n) for (low, _), n in zip(tiling.pad, shape, strict=True))
        return jax.tree.map(lambda x: x[(slice(None), *own)], out)

    return run


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
    the region, a share `evaluation.top` of them (the paper scores voxels only)."""
    said = time.monotonic()
    for i, (row, volume) in enumerate(zip(rows, ahead(partial(prepared, data=config.data), rows), strict=True)):
        began = time.monotonic()
        if began - said > SECONDS_BETWEEN_LINES:
            said = began
            log(f"{i} of {len(rows)} volumes scored")
        out = run(volume, case_words(row.id))
        top = lambda m, region: top_mean(m, region, config.evaluation.top)
        scores = {name: np.array([top(m, volume.region) for m in maps]) for name, maps in out["maps"].items()}
        seconds, seen, baselines = time.monotonic() - began, volume.grid.inside(), cheap(row, volume)
        region = scored_region(row, volume.stored, config.data)
        region = seen if region is None else region & seen
        ends = baselines | {f"low {name}": -m for name, m in baselines.items() if name.startswith("brightness")}
        yield Result(
            image=volume.array,
            stored=volume.stored,
            maps=out["maps"],
            scores=scores,
            reconstruction=out.get("reconstruction"),
            confidence=out.get("confidence"),
            own=volume.grid.back,
            scored=partial(volume.grid.forward, order=0),
            seconds=seconds,
            values=partial(own_values, volume=volume, data=config.data),
            cheap_scores={name: top(m, region) for name, m in ends.items()},
            seen=seen,
            cheap=baselines,
        )


def own_values(picture: np.ndarray, *, volume: Volume, data: ConfigDict) -> np.ndarray:
    """A normalised picture (*size, c) in the values of the stored image."""
    return (picture - data.mean) / data.std * volume.std + volume.mean


def image_results(images: Images, scored: Scored, cheap: Scored, rows: range) -> Iterator[Result]:
    """Images by their numbers, of which `scored` has these alone and `cheap` all; maps are enlarged to a row's own
    grid."""
    for k, i in enumerate(rows):
        stored = stored_image(images.rows[i])
        size = stored.array.shape[:-1]

        def own(array: np.ndarray, size: tuple[int, ...] = size) -> np.ndarray:
            return resize(array, size) if array.ndim > len(size) else resize(array[..., None], size)[..., 0]

        small = lambda mask: resize(mask[..., None].astype(np.float32), images.size)[..., 0] > 0.5
        of = lambda values, k: {name: value[:, k] for name, value in values.items()}
        yield Result(
            image=images.image(np.array([i]))[0],
            stored=stored,
            maps=of(scored.maps, k),
            scores=of(scored.scores, k),
            reconstruction=None if scored.reconstruction is None else scored.reconstruction[:, k],
            own=own,
            scored=small,
            seconds=scored.seconds / len(rows),
            cheap={name: own(value[0]) for name, value in of(cheap.maps, i).items()},
            confidence=None if scored.confidence is None else scored.confidence[:, k],
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
    held = split.val or (split.normals if localised else [])
    images, every = Images([*split.rows, *held], config), range(n + len(held))
    scored = score(images, np.arange(n))
    on_held = score(images, np.array(every[n:])) if held else None
    cheap = {name: Scored({}, {}) for name in parts}
    if split.known.any() and (normals := [row for row in rows if row.split == "train" and row.label != 1]):
        fit = partial(baseline_scores, Images(normals, config), images, n, mapped=len(every) if localised else n)
        cheap = {name: fit(share=part.share, pixels=split.marked and part.share == 1) for name, part in parts.items()}
    thresholds = {}
    if on_held and localised:
        thresholds = held_out(config, held, image_results(images, on_held, cheap[WHOLE], every[n:]))
    means = scored.scores[system.primary].mean(0).tolist()
    groups = choose_cases([row.label for row in split.rows], means)
    shown = frozenset(i for group in groups.values() for i in group)
    on_val = on_held.scores[system.primary] if on_held and split.val else None
    return Stream(image_results(images, scored, cheap[WHOLE], every[:n]), on_val, cheap, shown, thresholds)


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
    if split.known.any():
        train = [row for row in rows if row.split == "train"]
        cheap = volume_baselines(config, system, Volumes(train, config, workdir / "cache") if train else None)
    on_val = [result.scores[system.primary] for result in volume_results(config, split.val, run, nothing)]
    return Stream(volume_results(config, split.rows, run, cheap), np.stack(on_val, 1) if on_val else None)


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
            self.patients.append({"patient": row.patient, "figures": figures})

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


def evaluate(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, *, split: str, out: Path
) -> dict[str, Any]:
    """Scores `split` of `rows`, writes metrics.json, scores.csv, report.html and maps into `out`; returns the metrics.

    Labels of the split and of `val` serve figures alone. Raises InputError where the split is empty.
    """
    began = time.monotonic()
    own = split_of(rows, split)
    parts = parts_of(config, own, volumes=system.sweep is not None)
    results = restore_results(config, system, workdir)
    log(f"{split}: scoring {len(own.rows)} cases")
    if own.known.any() and not any(row.split == "train" for row in rows):
        log("the manifest has no train rows: no cheap baselines that are fitted to them")
    if system.sweep:
        stream = score_volumes(config, system, results, rows, own, workdir)
    else:
        stream = score_images(config, system, results, rows, own, parts)
    gathered = gather(config, system, own, stream, parts, out)
    evaluation: dict[str, Any] = {
        "system": system.name,
        "split": split,
        "n": len(own.rows),
        "n_normal": int((own.labels == 0).sum()),
        "n_abnormal": int((own.labels == 1).sum()),
        "primary": system.primary,
        "image": None,
        "pixel": None,
        "scores": {},
        "subsets": {},
        "per_patient": None,
        "baselines": {},
        "decision": None,
        "chi2": None,
    }
    if own.known.any():
        found = {
            title: part_figures(config, system, own, stream, gathered, title, part) for title, part in parts.items()
        }
        evaluation |= found.pop(WHOLE) | {"n": len(own.rows), "subsets": found}
        evaluation |= of_scores(own, gathered.scores[system.primary][:, own.known], stream.on_val)
        if (shown := system.map or system.primary) in parts[WHOLE].pixels.pooled:
            evaluation["per_patient"] = parts[WHOLE].pixels.per_patient(shown, list(evaluation["scores"]))

    means = {name: values.mean(0) for name, values in gathered.scores.items()}
    further = [name for name in means if name != system.primary]
    table = [
        {"id": row.id, "label": row.label, "score": float(means[system.primary][i]), "p_value": None}
        | {name: float(means[name][i]) for name in further}
        for i, row in enumerate(own.rows)
    ]
    evaluation["seconds"] = time.monotonic() - began
    evaluation["seconds_per_case"] = gathered.seconds / len(own.rows)
    write_csv(out / "scores.csv", [{k: "" if v is None else v for k, v in line.items()} for line in table])
    write_text(out / "metrics.json", json.dumps(metrics.json_ready(evaluation), indent=1))
    environment = workdir / "environment.json"
    about = json.loads(environment.read_text()) if environment.exists() else {}
    history = read_history(workdir / "metrics.jsonl")
    write_report(out / "report.html", {**evaluation, "table": table}, gathered.cases, history, config.to_dict(), about)
    log(headline(evaluation))
    log(f"report: {out / 'report.html'}")
    return evaluation


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
    seconds = 0.0
    for i, (row, result) in enumerate(zip(split.rows, stream.results, strict=True)):
        seconds += result.seconds
        cheap.append(result.cheap_scores)
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
        if (shown := system.map or system.primary) not in result.maps:
            continue
        mean = result.maps[shown].mean(0)
        picture, confidence = (
            None if each is None else each.mean(0) for each in (result.reconstruction, result.confidence)
        )
        if config.evaluation.maps:
            (out / "maps").mkdir(parents=True, exist_ok=True)
            write_map(out / "maps" / f"{row.id}_anomaly", result.own(mean), result.stored)
            if confidence is not None:
                write_map(out / "maps" / f"{row.id}_confidence", result.own(confidence), result.stored)
        if config.evaluation.get("reconstruction") and picture is not None:
            (out / "maps").mkdir(parents=True, exist_ok=True)
            write_map(out / "maps" / f"{row.id}_recon", result.own(result.values(picture)), result.stored)
        if stream.shown is None or i in stream.shown:
            lesion = result.scored(truth[0]) if truth else None
            score = float(result.scores[system.primary].mean())
            case = Case(row.id, row.label, score, result.image, mean, lesion, picture, confidence=confidence)
            cases.append(one_slice(case))
    stack = lambda values: {name: np.stack(each, 1) for name, each in values.items()}
    known = [scores for scores, row in zip(cheap, split.rows, strict=True) if row.label is not None]
    whole = [name for name in (known[0] if known else ()) if all(name in scores for scores in known)]
    each = {name: np.array([[scores.get(name, np.nan) for scores in cheap]]) for name in whole}
    return Gathered(stack(scores), stack(inner), cases, seconds, each)


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


def of_scores(split: Split, values: np.ndarray, on_val: np.ndarray | None) -> dict[str, Any]:
    """The decision at the threshold chosen on `val`, and the distance of the classes, of primary scores (r, known)."""
    labels = split.labels[split.known]
    decision = None
    if on_val is not None:
        thresholds = [metrics.threshold_on(np.array([row.label for row in split.val], int), v) for v in on_val]
        decision = mean_of([metrics.at_threshold(labels, v, t) for v, t in zip(values, thresholds, strict=True)])
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
    primary, reason = evaluation["primary"], without_curves(evaluation)
    lines = [counts, *([reason] if reason else [])]
    scores, cheap = evaluation["scores"], evaluation["baselines"]
    if not reason:
        lines += [line(name + " *" * (name == primary), s["image"]) for name, s in scores.items() if s["image"]]
        rated = [line(name, s["image"]) for name, s in cheap.items() if s["image"]]
        lines += ["cheap baselines:", *rated] if rated else []
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
