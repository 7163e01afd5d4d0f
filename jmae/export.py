"""python -m jmae.export --workdir DIR --out DIR [--batch 8] [--like SCAN.nii.gz] [--size 64,64,16]
                       [--platforms cpu,cuda,tpu] [--config.evaluation.KEY=VALUE ...] [--debug]

Writes a trained run as StableHLO (of `jax.export`), with its weights (`weights.safetensors`) and a description
(`export.json`). These files can be used without the recipe and without jmae.

A run of images has `stored.bin`. It makes score, map and p-value from an image file's values, as `jmae.predict` does:

    import jax, numpy, safetensors.numpy, PIL.Image
    call = jax.jit(jax.export.deserialize(bytearray(open("DIR/stored.bin", "rb").read())).call)
    weights = safetensors.numpy.load_file("DIR/weights.safetensors")
    film = numpy.asarray(PIL.Image.open("film.png"), numpy.float32)[..., None]   # (h, w, channels), of any size
    out = call(weights, film, numpy.int32(8))   # {"score", "p_value", "map" (h, w)}

The last argument is 8 where the values fill 8 bits; any other number stretches the image from its least to its greatest
value. Of a DICOM file give the values after its rescale slope, and invert them if the file is MONOCHROME1. Of a colour
image for a run of one channel give 0.299 R + 0.587 G + 0.114 B. An image that has a value that is not finite, or one
value all over (within its window), gets NaN. The function does not tell foreign images. The p-value is NaN where the
run is not calibrated.

A run of volumes has `stored.bin` where --like names a scan; several sequences are "A;B". Volumes must have that scan's
size, spacing and directions; others get NaN, or an error for their size. The call is
`call(weights, volume, affine, region)`: float32 (x, y, z, channels), the scan's affine float32 (4, 4), and bool
(x, y, z), True where metrics count. A scan without an affine, such as a .npy file, has numpy.eye(4). A region without
True is none. There is no midline. The p-value is NaN where the held-out normals had a midline or half, and where only
they or only the volume had a region.

`function.bin` takes what the network sees, and gives all scores and maps: `call(weights, image, case)` has
{"maps/NAME", "scores/NAME", "reconstruction", "confidence"}. `image` is float32 (batch, *size, channels). Without
--batch it has any number of images, scored one after another; with --batch 8 it has eight, scored together. `case` is
uint32 (batch, 2). It has an effect only in a run with evaluation.masks_of=case, where it seeds the masks:
`jmae.export.case_words` makes it from the cases' ids. A system of volumes takes one prepared volume (*size, channels)
of the --size, in voxels of the working grid, and `case` (2,). Without --size it is the size of the --like scan there,
or of its largest crop. The function includes windows, repetitions and averaging, but no midline.

`export.json` also holds the settings of the evaluation and, for a calibrated run, "calibration": the scores of the n
held-out normals, what they depend on ("needs"), and the threshold at the false-alarm rate. The p-value of a score s is
(1 + number of those scores >= s) / (n + 1). A score above the threshold is an alarm. A volume's score is the mean of
its map's highest values in the region; evaluation.top is their share.

`function.bin` gives the results of `jmae.evaluate` to 1e-5, with a leading axis of replicates where the run has
several; `stored.bin` gives means over them. The functions run on the --platforms alone, by default
that of this machine.
Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as stablehlo
from ml_collections import ConfigDict

from jmae import command_words, recipe
from jmae.calibration import CALIBRATION, Calibration, read_calibration
from jmae.command_words import UNFINISHED
from jmae.data import on_device, volumes_on_device
from jmae.data.preparation import case_words, usable
from jmae.data.volumes import Grid, read_volume, whole_grid
from jmae.errors import InputError, exit_code
from jmae.fitting import restore_results
from jmae.inputs import row_of
from jmae.passes import each_replicate, seeds_of, sweep_volume
from jmae.results import map_name
from jmae.run_folder import log
from jmae.run_recipe import refuse_other_config
from jmae.sealed import seal, unseal
from jmae.system import Results, System, load_system
from jmae.target import portable, target
from jmae.waiting import at_work
from jmae.windows import places, tile

__all__ = ["case_words", "export", "load"]
STORED, FUNCTION, WEIGHTS, ABOUT = "stored.bin", "function.bin", "weights.safetensors", "export.json"


def main(argv: list[str]) -> int:
    wanted = command_words.export_request(argv, __doc__)
    refuse_other_config(wanted.workdir)
    system = load_system(wanted.config)
    if wanted.batch and system.sweep:
        raise InputError(
            f"--batch is for images: {system.name} takes one volume; --config.evaluation.batch: its windows"
        )
    if wanted.like and not system.sweep:
        raise InputError(f"--like is for volumes: {system.name} takes images of any size")
    export(
        wanted.config,
        system,
        wanted.workdir,
        wanted.out,
        batch=wanted.batch,
        size=wanted.size,
        like=wanted.like,
        platforms=wanted.platforms or (target().platform,),
    )
    how = "docs/how-to/export.md shows" if system.sweep else "the five lines of jmae export --help show"
    log(f"next: call it as {how}")
    return 0


def export(
    config: ConfigDict,
    system: System,
    workdir: Path,
    out: Path,
    *,
    batch: int = 0,
    size: tuple[int, ...] = (),
    like: tuple[str, ...] = (),
    platforms: Sequence[str] = (),
) -> None:
    """Writes the run in `workdir` into the new folder `out`, whole or not at all.

    Args:
      batch: images of one call of `function.bin`, for a system of images; 0: any number, one after another.
      size: voxels of a prepared volume, of a system of volumes; (): the largest that scans like `like` can have.
      like: the files of a scan, whose grid all scans of `stored.bin` have, of a system of volumes.
      platforms: names as `jax.export` has them; () is the platform of this machine.

    Raises InputError where a stage has no finished checkpoint, `size` does not fit the system, the scan `like` cannot
    be read or its sequences have several grids, or writing fails.
    """
    grid = grid_of(like, config) if like else None
    size = volumes_on_device.room(grid, config.data) if grid and not size else size
    results = jax.device_get(restore_results(config, system, workdir))
    calibration = read_calibration(config, system, results, workdir)
    leaves, nesting = jax.tree_util.tree_flatten_with_path(results)
    names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    weights = {name: np.ascontiguousarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
    seeds = [int(seed) for seed in range(config.seed, config.seed + config.replicates)]

    def replicates(weights: dict[str, Any], score: Any, image: Any, case: Any) -> dict[str, Any]:
        results = jax.tree.unflatten(nesting, [weights[name] for name in names])
        return each_replicate(lambda result, key: score(result, image, case, key), results, seeds_of(config))

    def function(weights: dict[str, Any], image: Any, case: Any) -> dict[str, Any]:
        found = replicates(weights, score_function(config, system, size, batch), image, case)
        found = found if len(seeds) > 1 else jax.tree.map(lambda x: x[0], found)
        flat, _ = jax.tree_util.tree_flatten_with_path(found)
        return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}

    lead = () if system.sweep else (batch,) if batch else stablehlo.symbolic_shape("batch")
    shape = (*lead, *(size or config.data.size), config.data.channels)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    given = shapes, jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((*lead, 2), jnp.uint32)
    whole: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {FUNCTION: (function, given)}
    if why := why_not_stored(config, system, like):
        log(f"no {STORED}: {why}")
    else:
        stored, case = stored_volume(config, system, grid) if grid else stored_image(config, system)
        whole[STORED] = (
            (lambda weights, *case: stored(partial(replicates, weights), calibration, *case)),
            (shapes, *case),
        )
    with portable(), at_work(f"exporting {' and '.join(whole)}"):
        platforms = platforms or (target().platform,)
        exported = {
            name: stablehlo.export(jax.jit(one), platforms=platforms)(*given) for name, (one, given) in whole.items()
        }
    about = {
        "system": system.name,
        "primary": system.primary,
        "map": system.map or system.primary,
        "platforms": list(platforms),
        "image": sizes_of(shape),
        "case": sizes_of((*lead, 2)),
        "out": {name: sizes_of(leaf.shape) for name, leaf in zip(*outputs(exported[FUNCTION]), strict=True)},
        "replicates": seeds,
        "data": json.loads(recipe.to_json(config))["data"],  # how files become images
        "evaluation": json.loads(recipe.to_json(config))["evaluation"],
        "calibration": calibration and unseal((workdir / CALIBRATION).read_bytes(), CALIBRATION, None),
        "jax": jax.__version__,
        "use": "for research, not for clinical use",
    }
    write(out, {name: one.serialize() for name, one in exported.items()}, weights, about)
    log(f"{out}: {system.name}, {sum(w.size for w in weights.values()):,} numbers, for {', '.join(platforms)}")


def write(out: Path, programs: dict[str, bytearray], weights: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """The files of an export in the folder `out`, all or none. Raises InputError where writing fails."""
    new, half = not out.exists(), out / UNFINISHED
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for name, program in programs.items():
            (half / name).write_bytes(program)
        (half / WEIGHTS).write_bytes(safetensors.numpy.save(weights))  # `save_file` lets only the owner read it
        about["sha256"] = {name: sha256(half / name) for name in (*programs, WEIGHTS)}
        (half / ABOUT).write_text(seal(about))
        for name in (*programs, WEIGHTS, ABOUT):  # the last file makes the folder an export
            os.replace(half / name, out / name)
        half.rmdir()
    except OSError as error:
        shutil.rmtree(out if new else half, ignore_errors=True)
        raise InputError(f"{out}: not written ({error.strerror or error}): free space or change the folder") from None


Stored = tuple[Callable[..., dict[str, Any]], tuple[jax.ShapeDtypeStruct, ...]]


def stored_image(config: ConfigDict, system: System) -> Stored:
    """(function from an image's stored values to its score, shapes of what it takes behind the first two arguments).

    Those are (score, image, words) -> the system's outputs with an axis of replicates, and the calibration.
    """

    def function(replicates: Any, calibration: Calibration | None, image: Any, bits: Any) -> dict[str, Any]:
        ready, words = on_device.prepared(image, bits, config.data)[None], jnp.zeros((1, 2), jnp.uint32)
        found = replicates(score_function(config, system, (), 1), ready, words)
        usable = on_device.usable(image, config.data)  # a network rebuilds one value all over, as if it were normal
        size = image.shape[:2]
        back = lambda picture: on_device.resize(picture[0][..., None], size)[..., 0]
        scores = found["scores"][system.primary][:, 0]
        return of_case(scores, found["maps"].get(map_name(system)), back, calibration, usable)

    image = jax.ShapeDtypeStruct((*stablehlo.symbolic_shape("h, w"), config.data.channels), jnp.float32)
    return function, (image, jax.ShapeDtypeStruct((), jnp.int32))


def stored_volume(config: ConfigDict, system: System, grid: Grid) -> Stored:
    """As `stored_image`, for volumes of one grid."""
    share = 1.0 if config.evaluation.get("case_score", "top") == "mean" else config.evaluation.top
    score = lambda results, ready, words, key: sweep_ready(config, system, results, ready, words, key)

    def function(
        replicates: Any, calibration: Calibration | None, volume: Any, affine: Any, region: Any
    ) -> dict[str, Any]:
        ready = volumes_on_device.prepared(volume, region, grid, config.data)
        maps = replicates(score, ready, jnp.zeros(2, jnp.uint32))["maps"]
        usable = ready.usable & volumes_on_device.same_grid(affine, grid, config.data)
        back = lambda heat: volumes_on_device.back(heat, grid, ready.origin, ready.size)
        scores = jax.vmap(lambda heat: top_mean(heat, ready.region, share))(maps[system.primary])
        out = of_case(scores, maps[map_name(system)], back, calibration, usable)
        return out | {"p_value": jnp.where(like_normals(calibration, region), out["p_value"], jnp.nan)}

    size = (*grid.own_size, config.data.channels)
    shaped = (size, jnp.float32), ((4, 4), jnp.float32), (grid.own_size, bool)
    return function, tuple(jax.ShapeDtypeStruct(*one) for one in shaped)


def like_normals(calibration: Calibration | None, region: Any) -> Any:
    """Whether the held-out normals had a region where a volume has one, and neither midline nor half."""
    needs = calibration.needs if calibration else ()
    return (region.any() == ("region" in needs)) & (not {"midline", "half"} & {*needs})


def grid_of(like: tuple[str, ...], config: ConfigDict) -> Grid:
    """The grids of a scan of these files: its own and, before a crop, the working grid.

    Raises InputError where it cannot be read, its sequences have several grids, or a crop lacks its spacing.
    """
    stored = read_volume(like, config.data)
    if stored.sequences:
        raise InputError(f"--like {like[0]}: its sequences have several grids: export from sequences of one grid")
    usable(row_of("like", like), stored, config.data)
    grid = whole_grid(stored, config.data, like[0])
    if grid.spacing is None and config.data.crop == "region":
        raise InputError(f"--like {like[0]}: tells no spacing for a crop in mm: save it as NIfTI")
    return grid


def why_not_stored(config: ConfigDict, system: System, like: tuple[str, ...]) -> str:
    """Why there is no function from stored values to a score; "" where there is one."""
    if system.sweep and not like:
        return "it depends on the grid of the scans: name one of them by --like"
    if system.sweep and system.sweep.tile is not tile:
        return f"{system.name} places its windows as released (compat.averaging), which is not exported"
    if config.evaluation.get("masks_of", "run") == "case":
        return "evaluation.masks_of=case draws masks by the cases' ids: export with --config.evaluation.masks_of=run"
    if config.evaluation.get("case_score", "top") == "part" and (
        system.sweep or config.evaluation.get("residual", "none") != "none"
    ):
        return "evaluation.case_score=part looks for parts on the host: export with mean or top"
    return ""


def of_case(
    scores: Any, maps: Any, back: Callable[[Any], Any], calibration: Calibration | None, usable: Any
) -> dict[str, Any]:
    """Score, p-value and map of one case, means over replicates; NaN where it is not `usable`.

    Args:
      scores, maps: with a leading axis of replicates; `maps` is None for a system without.
      back: puts a map on the stored grid.
    """
    score, p_value = jnp.mean(scores), jnp.float32(jnp.nan)
    if calibration:
        others = jnp.asarray(list(calibration.scores.values()), jnp.float32)
        p_value = (1 + jnp.sum(others >= score)) / jnp.float32(len(others) + 1)
    case = {"score": score, "p_value": p_value}
    if maps is not None:
        case["map"] = back(jnp.mean(maps, 0))
    return {name: jnp.where(usable, value, jnp.nan) for name, value in case.items()}


def top_mean(values: Any, region: Any, share: float) -> Any:
    """`jmae.scoring.top_mean` on the device; `region` marks one voxel at least."""
    ordered = jnp.sort(jnp.where(region, values, -jnp.inf).reshape(-1), descending=True)
    k = jnp.maximum(1, jnp.round(share * jnp.sum(region)).astype(jnp.int32))
    return jnp.sum(ordered, where=jnp.arange(len(ordered)) < k) / k


def sweep_ready(
    config: ConfigDict, system: System, results: Results, ready: volumes_on_device.Ready, words: Any, key: Any
) -> dict[str, Any]:
    """The system's outputs for a volume whose size is data, (*most)."""
    sweep, most = system.sweep, ready.region.shape
    assert sweep
    low, origins, number, coverage = places(ready.size, most, sweep.window, sweep.stride)
    full = tuple(max(m, w) for m, w in zip(most, sweep.window, strict=True))
    wide = jnp.zeros([n + w for n, w in zip(full, sweep.window, strict=True)] + [ready.array.shape[-1]])
    wide = jax.lax.dynamic_update_slice(wide, ready.array, (*low, 0))
    volume, size = wide[tuple(map(slice, full))], jnp.maximum(ready.size, np.array(sweep.window))
    options = {"repeats": sweep.repeats, "batch": config.evaluation.batch}
    found = sweep_volume(sweep, results, volume, size, (origins, number, coverage), words, key, **options)

    def own(x: Any) -> Any:
        rest = x.ndim - len(most)
        wide = jnp.pad(x, [(0, w) for w in sweep.window] + [(0, 0)] * rest)
        return jax.lax.dynamic_slice(wide, (*low, *[0] * rest), (*most, *x.shape[len(most) :]))

    return jax.tree.map(own, found)


def outputs(exported: stablehlo.Exported) -> tuple[list[str], list[jax.ShapeDtypeStruct]]:
    """(names, shapes) of a function's outputs."""
    tree = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return list(tree), list(tree.values())


def sizes_of(shape: Sequence[Any]) -> list[int | str]:
    """The numbers of a shape; a symbol is its name."""
    return [n if isinstance(n, int) else str(n) for n in shape]


def score_function(
    config: ConfigDict, system: System, size: tuple[int, ...], batch: int = 0
) -> Callable[..., dict[str, Any]]:
    """The pure function (results, array, words, key) -> the system's outputs for `batch` images together, for any
    number of images one after another (0), or for one prepared volume of `size` voxels.

    Raises:
      InputError: a size for images, or none for volumes.
    """
    sweep = system.sweep
    if not sweep:
        if size:
            raise InputError(f"--size is for volumes: {system.name} takes images of {tuple(config.data.size)}")
        assert system.score
        one, chunk = system.score, config.evaluation.chunk or system.masks
        if batch:
            return lambda results, image, words, key: one(results, {"image": image, "case": words}, key, chunk=chunk)

        def case(results: Results, image: Any, words: Any, key: Any) -> dict[str, Any]:
            found = one(results, {"image": image[None], "case": words[None]}, key, chunk=chunk)
            return jax.tree.map(lambda x: x[0], found)

        return lambda results, image, words, key: jax.lax.map(lambda x: case(results, x[0], x[1], key), (image, words))
    if len(size) != len(sweep.window):
        raise InputError(f"--size has {len(size)} numbers: write the volume's voxels on the working grid, as 64,64,16")
    tiling = sweep.tile(size, sweep.window, sweep.stride)
    within = tuple(slice(low, low + n) for (low, _), n in zip(tiling.pad, size, strict=True))

    def score(results: Results, volume: Any, words: Any, key: Any) -> dict[str, Any]:
        windows = jnp.asarray(tiling.origins), jnp.int32(len(tiling.origins)), tuple(map(jnp.asarray, tiling.coverage))
        padded, true_size = jnp.pad(volume, [*tiling.pad, (0, 0)]), jnp.array(tiling.size, jnp.int32)
        options = {"repeats": sweep.repeats, "batch": config.evaluation.batch}
        found = sweep_volume(sweep, results, padded, true_size, windows, words, key, **options)
        return jax.tree.map(lambda x: x[within], found)

    return score


def sha256(path: Path) -> str:
    """A file's digest."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder: str | Path) -> tuple[Callable[[Any, Any], dict[str, np.ndarray]], dict[str, Any]]:
    """(function (image, case) -> results by name, content of export.json) of an exported folder.

    Raises InputError where a file is missing or damaged, or was exported for another platform.
    """
    folder = Path(folder)
    try:
        about = unseal((folder / ABOUT).read_bytes(), folder / ABOUT, log)
        files = {FUNCTION, WEIGHTS, *about["sha256"]}
        if files - {FUNCTION, WEIGHTS, STORED}:
            raise ValueError(f"{ABOUT} names other files")
        if changed := sorted(name for name in files if sha256(folder / name) != about["sha256"][name]):
            raise ValueError(f"{' and '.join(changed)} changed since")
        exported = stablehlo.deserialize(bytearray((folder / FUNCTION).read_bytes()))
        weights = jax.device_put(safetensors.numpy.load_file(folder / WEIGHTS))
    except Exception as error:  # the readers of both files raise anything on damage
        why = f"{ABOUT} lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise InputError(f"{folder}: no whole export ({why}): run jmae export again") from None
    if jax.default_backend() not in exported.platforms:
        raise InputError(f"{folder}: exported for {', '.join(exported.platforms)}, not for {jax.default_backend()}")
    call = jax.jit(exported.call)
    return lambda image, case: jax.device_get(call(weights, image, case)), about


if __name__ == "__main__":
    sys.exit(exit_code(main))
