"""The compiled passes that score: over batches of images, and over the windows of a volume.

An image batch has one program. A volume has one for its bucket of sizes, whatever the case and the number of sweeps.
All cases share the run's random key, so that a result depends on neither the case's name nor batch nor device. Where a
device runs out of memory, a smaller pass takes the place of the larger one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from jmae.data.preparation import Prepared, case_words
from jmae.masking import case_keys
from jmae.reconstruct import fitting, out_of_memory, too_large
from jmae.run_folder import log
from jmae.sharding import device_mesh, inside_mesh, replicated, split
from jmae.system import Results, Sweep, System
from jmae.tables import counted
from jmae.waiting import at_work
from jmae.windows import average, inside


def local_mesh() -> Mesh:
    """The devices of this process. Each process scores its share of the cases without the others."""
    return device_mesh(devices=jax.local_devices())


def seeds_of(config: ConfigDict, draw: str = "") -> Array:
    """The random key of each replicate; `draw` names other random masks than those of the evaluation."""
    keys = jnp.stack([jax.random.key(config.seed + r) for r in range(config.replicates)])
    return jax.vmap(lambda key: case_keys(key, jnp.asarray(case_words(draw))[None])[0])(keys) if draw else keys


def each_replicate(function: Callable, results: Any, keys: Array) -> Any:
    """`function(results, key)` of every replicate; its arrays get a leading axis of replicates."""
    if len(keys) > 1:
        return jax.vmap(function)(results, keys)
    return jax.tree.map(lambda x: x[None], function(results, keys[0]))


@runtime_checkable
class Pass(Protocol):
    """A compiled pass over cases. Where a device runs out of memory, a smaller pass takes its place."""

    results: Any  # what the score reads
    compiling: bool  # whether a program is compiled at this moment

    @property
    def at_once(self) -> int:
        """Cases of one call."""

    def dispatch(self, cases: Sequence[Prepared], repeats: int | None = None, draw: str = "") -> Any:
        """Starts the pass and does not wait for it. `draw` is that of `seeds_of`."""

    def fetch(self, started: Any) -> list[dict[str, Any]]:
        """Waits for the pass. Gives each case's arrays by kind ("maps", "scores", ...), replicates first."""


class BatchPass:
    """Images in equal batches. Where memory ends, fewer masks at a time are tried, then fewer images."""

    compiling: bool = False

    def __init__(self, config: ConfigDict, system: System, results: Results):
        self.config, self.system, self.results = config, system, results
        self.mesh, self.keys = local_mesh(), seeds_of(config)
        self.program = scoring_program(system, self.mesh)
        devices = self.mesh.size
        with at_work("scoring (compiling)"):
            self._fit(-(-config.evaluation.batch // devices) * devices, config.evaluation.chunk or system.masks)

    @property
    def at_once(self) -> int:
        return self.batch

    def _fit(self, batch: int, masks: int) -> None:
        shapes = scoring_batch(self.config, batch, self.mesh)
        lower = lambda chunk: self.program.lower(self.results, shapes, self.keys, chunk)
        self.compiled, self.chunk = fitting(lower, masks, what=self._what(batch))
        self.batch = batch
        if self.chunk < self.system.masks:
            log(f"scoring {self.chunk} of {self.system.masks} masks at a time")

    def _what(self, batch: int) -> str:
        return f"scoring {counted(batch, 'images')} of {tuple(self.config.data.size)}"

    def dispatch(self, cases: Sequence[Prepared], repeats: int | None = None, draw: str = "") -> Any:
        assert repeats is None  # the number of masks is part of the program
        compiled, parts, keys = self.compiled, [], seeds_of(self.config, draw) if draw else self.keys
        try:
            for start in range(0, len(cases), self.batch):
                numbers = np.minimum(np.arange(start, start + self.batch), len(cases) - 1)  # filled with the last case
                batch = {
                    "image": np.stack([cases[i].array for i in numbers]),
                    "case": np.stack([case_words(cases[i].row.id) for i in numbers]),
                }
                parts.append(compiled(self.results, jax.device_put(batch, split(self.mesh)), keys))
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            parts = []
        return compiled, parts, cases, draw

    def fetch(self, started: Any) -> list[dict[str, Any]]:
        compiled, parts, cases, draw = started
        while True:
            try:
                outs = jax.device_get(parts)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                outs = []
            if outs:
                taken = lambda k: lambda x: x[:, k]
                each = [jax.tree.map(taken(k), out) for out in outs for k in range(self._size(out))]
                return each[: len(cases)]
            if compiled is self.compiled:  # else a smaller pass is there already
                self._shrink()
            compiled, parts, *_ = self.dispatch(cases, draw=draw)

    def _size(self, out: Any) -> int:
        return jax.tree.leaves(out)[0].shape[1]

    def _shrink(self) -> None:
        devices = self.mesh.size
        if self.chunk == 1 and self.batch == devices:
            raise too_large(self._what(self.batch), self.compiled)
        log(f"out of memory at {counted(self.batch, 'images')}, {self.chunk} masks at a time: trying fewer")
        batch = self.batch if self.chunk > 1 else -(-self.batch // 2 // devices) * devices
        self._fit(batch, max(1, self.chunk // 2))


class SweepPass:
    """Volumes one by one, as streams of windows. Where memory ends, fewer windows at a time are tried.

    A bucket of sizes has one program, whatever the case and the number of repetitions.
    """

    at_once: int = 1
    compiling: bool = False

    def __init__(self, config: ConfigDict, sweep: Sweep, results: Any):
        self.config, self.sweep, self.results = config, sweep, results
        self.mesh, self.keys = local_mesh(), seeds_of(config)
        self.program = sweep_program(sweep, self.mesh)
        self.programs: dict[tuple[int, ...], tuple[Any, int]] = {}  # by bucket: program, windows at a time
        self.one_window = jax.jit(sweep.example) if sweep.example else None

    def dispatch(self, cases: Sequence[Prepared], repeats: int | None = None, draw: str = "") -> Any:
        keys = seeds_of(self.config, draw) if draw else self.keys
        return [self._start(case, keys, repeats) for case in cases]

    def fetch(self, started: Any) -> list[dict[str, Any]]:
        return [self._finish(*one) for one in started]

    def example(self, case: Prepared, point: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """A slice through a voxel of a case: of one window around the voxel, under that window's mask of the first
        sweep.

        Returns (the window (h, w, c), the same with 0 where it was hidden, the prediction), by the first replicate.
        """
        assert case.volume and self.one_window
        shape, sweep = case.array.shape[:-1], self.sweep
        tiling = sweep.tile(shape, sweep.window, sweep.stride, side=case.volume.side, midline=case.volume.midline)
        at = np.array(point) + [low for low, _ in tiling.pad]
        within = ((tiling.origins <= at) & (at < tiling.origins + sweep.window)).all(1)
        away = np.abs(tiling.origins + (np.array(sweep.window) - 1) / 2 - at).sum(1)
        number = int(np.where(within, away, np.inf).argmin())
        origin = tiling.origins[number]
        cut = tuple(slice(o, o + w) for o, w in zip(origin, sweep.window, strict=True))
        key = sweep_key(sweep, self.keys[0], jnp.asarray(case_words(case.row.id)))
        key = jax.random.fold_in(jax.random.fold_in(key, 0), number)
        first = jax.tree.map(lambda x: x[0], self.results) if len(self.keys) > 1 else self.results
        window = np.pad(case.array, [*tiling.pad, (0, 0)])[cut]
        image, prediction, hidden = (x[0] for x in self.one_window(first, window[None], key[None], jnp.zeros(1, int)))
        arrays = image, jnp.where(hidden, 0, image), prediction
        return tuple(np.asarray(x[:, :, at[2] - origin[2]]) for x in arrays)

    def _start(self, case: Prepared, keys: Array, repeats: int | None) -> tuple[Any, ...]:
        assert case.volume
        shape, sweep, volume = case.array.shape[:-1], self.sweep, case.volume
        tiling = sweep.tile(shape, sweep.window, sweep.stride, side=volume.side, midline=volume.midline)
        origins, number = padded_origins(tiling.origins), np.int32(len(tiling.origins))
        array = np.pad(case.array, [*tiling.pad, (0, 0)])
        count = np.int32(sweep.repeats if repeats is None else repeats)
        words = case_words(case.row.id)
        inputs = (array, np.array(tiling.size, np.int32), origins, number, tiling.coverage, words, count)
        inputs = (*jax.device_put(inputs, replicated(self.mesh)), keys)
        own = tuple(slice(low, low + n) for (low, _), n in zip(tiling.pad, shape, strict=True))
        return inputs, own, *self._run(inputs)

    def _run(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """(the program, what it gives; None where the memory does not hold it)."""
        bucket = (*inputs[0].shape, len(inputs[2]))
        if bucket not in self.programs:
            self._fit(inputs, self.config.evaluation.batch)
        compiled = self.programs[bucket][0]
        try:
            return compiled, compiled(self.results, *inputs)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return compiled, None

    def _fit(self, inputs: tuple[Any, ...], windows: int) -> None:
        what = f"a volume of {inputs[0].shape[:-1]}"
        lower = lambda batch: self.program.lower(self.results, *inputs, batch)
        self.compiling = True
        try:
            compiled, batch = fitting(lower, windows, what=what)
        finally:
            self.compiling = False
        self.programs[(*inputs[0].shape, len(inputs[2]))] = compiled, batch
        if batch < self.config.evaluation.batch:
            log(f"{what}: scoring {batch} windows at a time")

    def _finish(self, inputs: tuple[Any, ...], own: tuple[slice, ...], compiled: Any, out: Any) -> dict[str, Any]:
        while True:
            try:
                found = None if out is None else jax.device_get(out)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                found = None
            if found is not None:
                cut = lambda kind, x: x if kind == "measured" else jax.tree.map(lambda a: a[(slice(None), *own)], x)
                return {kind: cut(kind, arrays) for kind, arrays in found.items()}
            current, batch = self.programs[(*inputs[0].shape, len(inputs[2]))]
            if compiled is current:  # else a smaller pass is there already
                if batch == 1:
                    raise too_large(f"a volume of {inputs[0].shape[:-1]}", compiled)
                self._fit(inputs, -(-batch // 2))
            compiled, out = self._run(inputs)


def scoring_program(system: System, mesh: Mesh) -> Any:
    """The jitted function (results, batch, keys of the replicates, chunk) -> what `system.score` gives, with a leading
    axis of replicates before each array."""
    one = system.score
    assert one

    def score(results: Results, batch: Any, keys: Any, chunk: int) -> Any:
        return each_replicate(lambda result, key: one(result, batch, key, chunk=chunk), results, keys)

    return jax.jit(inside_mesh(score, mesh), static_argnums=3, out_shardings=replicated(mesh))


def scoring_batch(config: ConfigDict, b: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of b images and of the words of their ids, split over the devices."""
    shapes = {"image": (b, *config.data.size, config.data.channels), "case": (b, 2)}
    types = {"image": jnp.float32, "case": jnp.uint32}
    return {name: jax.ShapeDtypeStruct(shapes[name], types[name], sharding=split(mesh)) for name in shapes}


def sweep_program(sweep: Sweep, mesh: Mesh) -> Any:
    """The jitted function of a sweep. It gives what `sweep.fuse` gives, with an axis of replicates before each array.

    Its arguments: results, volume, true size of the volume, origins of the windows, number of origins that count,
    coverage, words of the case's id, repeats, keys of the replicates, windows at a time.
    """
    place = lambda x: jax.lax.with_sharding_constraint(x, split(mesh))

    def score(results, volume, size, origins, number, coverage, words, repeats, keys, batch):
        windows = origins, number, coverage
        batch = -(-batch // mesh.size) * mesh.size
        one = lambda result, key: sweep_volume(
            sweep, result, volume, size, windows, words, key, repeats=repeats, batch=batch, place=place
        )
        return each_replicate(one, results, keys)

    return jax.jit(inside_mesh(score, mesh), static_argnums=9, out_shardings=replicated(mesh))


def sweep_key(sweep: Sweep, key: Array, words: Array) -> Array:
    """The random key of a volume: the run's, or one made of it and of the words of the case's id."""
    return case_keys(key, words[None])[0] if sweep.by_case else key


def sweep_volume(
    sweep: Sweep,
    results: Results,
    volume: Array,
    size: Array,
    windows: tuple[Array, Array, tuple[Array, ...]],
    words: Array,
    key: Array,
    *,
    repeats: Any,
    batch: int,
    place: Callable[[Array], Array] = lambda x: x,
) -> dict[str, Any]:
    """What `sweep.fuse` gives of one padded volume (*size, c), with the maps of `sweep.further`.

    Args:
      size: the volume's true size, (rank,).
      windows: (origins, how many of them count, coverage), as `windows.average` takes them.
      words: of the case's id.
      place: puts a batch of windows on the devices.
    """
    averages = sweep.average(
        partial(sweep.score, results),
        volume,
        *windows,
        sweep_key(sweep, key, words),
        window=sweep.window,
        repeats=repeats,
        groups=sweep.groups,
        batch=batch,
        place=place,
    )
    own = inside(volume.shape[:-1], size)
    found = sweep.fuse(results, averages, own)
    if further := sweep.further and sweep.further(results):
        once = average(
            lambda image, keys, groups: further(image),
            volume,
            *windows,
            key,
            window=sweep.window,
            repeats=1,
            batch=batch,
            weighted=True,
            place=place,
        )
        maps = {name: jnp.where(own, once[..., k], 0) for k, name in enumerate(sweep.further_maps)}
        found = found | {"maps": found["maps"] | maps}
    return found


def padded_origins(origins: np.ndarray) -> np.ndarray:
    """Origins of windows, with zeros behind them up to a power of two, so that few lengths are compiled."""
    rows = np.zeros((2 ** max(4, (len(origins) - 1).bit_length()), origins.shape[1]), np.int32)
    rows[: len(origins)] = origins
    return rows
