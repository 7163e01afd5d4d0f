"""What a score learns from images after the training (`system.Fit`): computed once, kept in RUN/fitted, read again.

A file NAME-SETTINGS.npz holds the arrays of one fit under the settings that it depends on. Its entry "about" tells the
weights and the rows that they come from, and a digest of the arrays.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from jmae import recipe
from jmae.cards import rows_digest
from jmae.data.cases import Cases
from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.inference import Scorer, restore_stages, score_rows
from jmae.passes import local_mesh, seeds_of
from jmae.results import Result
from jmae.run_folder import digest, log, write_bytes
from jmae.seen import write_seen
from jmae.sharding import replicated
from jmae.system import Fit, Results, System, rows_read
from jmae.tables import counted
from jmae.windows import cut_windows

FOLDER, ABOUT = "fitted", "about"


def restore_results(config: ConfigDict, system: System, workdir: Path) -> Results:
    """All that the score reads: the results of the stages, and the fits that the run folder holds.

    Raises InputError where a stage has not finished, or a fit is missing or belongs to other weights.
    """
    results = restore_stages(config, system, workdir)
    return {**results, **{fit.name: placed(stored(config, fit, results, workdir)[0]) for fit in system.fits}}


def fitted_results(
    config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path, cases: Cases | None = None
) -> Results:
    """As `restore_results`; where `rows` are the run's own, a fit that is missing, or of other weights or rows, is
    computed and kept. Its rows then count as seen.

    Raises InputError where a stage has not finished, a fit has no rows, or other rows come with a missing fit.
    """
    if system.fits and not own_rows(config, system, rows, workdir):
        return restore_results(config, system, workdir)
    results, found = restore_stages(config, system, workdir), dict[str, Any]()
    for fit in system.fits:
        chosen = [rows[i] for i in fit.rows(rows)]
        try:
            tree, about = stored(config, fit, results, workdir)
            if about["rows"] != digest(chosen):
                raise InputError(f"{fit.name}: the rows that it was fitted to have changed")
        except InputError as why:
            if not chosen:
                raise InputError(f"{fit.name}: no row to fit it to: {fit.needs}") from None
            if file_of(config, fit, workdir).exists():
                log(f"warning: {why}: fitted anew")
            tree = computed(config, system, fit, results, chosen, cases)
            keep(config, fit, results, chosen, tree, workdir)
            write_seen(workdir, chosen)
        found[fit.name] = placed(tree)
    return {**results, **found}


def own_rows(config: ConfigDict, system: System, rows: Sequence[Row], workdir: Path) -> bool:
    """Whether the rows are those of the run's own manifest, which has not changed since the training."""
    named = recipe.read(workdir).data.manifest == config.data.manifest
    return named and rows_digest(system, workdir) in (None, digest(rows_read(system, rows)))


# --- computing --------------------------------------------------------------------------------------------------------


def computed(
    config: ConfigDict, system: System, fit: Fit, results: Results, rows: Sequence[Row], cases: Cases | None = None
) -> dict[str, Any]:
    """A fit's arrays from these rows, on the host; several replicates are a leading axis."""
    log(f"{fit.name}: after the training, the score learns from {counted(len(rows), 'cases')} what is usual")
    scorer = Scorer(config, measuring(system, fit), results, cases)
    return finished(config, system, fit, list(score_rows(scorer, rows)))


def finished(config: ConfigDict, system: System, fit: Fit, measured: Sequence[Result]) -> dict[str, Any]:
    """A fit's arrays from the results of `measuring`, on the host; several replicates are a leading axis."""
    join = np.concatenate if system.sweep else np.stack
    parts = [without_lesions(system, fit, result) for result in measured]
    joined = jax.tree.map(lambda *each: join(each, 1), *parts)
    rows = [result.case.row for result in measured]
    trees = [
        jax.device_get(fit.finish(jax.tree.map(lambda x, r=r: x[r], joined), key, rows))
        for r, key in enumerate(seeds_of(config))
    ]
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *each: np.stack(each), *trees)


def measuring(system: System, fit: Fit) -> System:
    """A system whose pass gives what a fit measures in each case, as "measured"."""
    nothing: dict[str, Any] = {"maps": {}, "scores": {}}
    if not system.sweep:
        score = lambda results, batch, key, *, chunk: nothing | {"measured": fit.measure(results, batch, key)}
        return replace(system, score=score, masks=1)
    fuse_none = lambda results, measured, inside: {"maps": {}, "measured": measured}
    sweep = replace(system.sweep, fuse=fuse_none, further=None)
    if fit.crops:
        return replace(system, sweep=replace(sweep, average=partial(some_windows, fit), repeats=1))

    def fuse(results: Results, averages: Array, inside: Array) -> dict[str, Any]:
        batch = {"average": averages[None], "inside": inside[None]}
        return {"maps": {}, "measured": fit.measure(results, batch, jax.random.key(0))}

    return replace(system, sweep=replace(sweep, fuse=fuse))


def some_windows(
    fit: Fit,
    score: Callable[..., Any],
    volume: Array,
    origins: Array,
    number: Array,
    coverage: Any,
    key: Array,
    *,
    window: tuple[int, ...],
    **other: Any,
) -> PyTree:
    """`Sweep.average` for a fit to crops: what the fit measures in `fit.crops` windows, spread evenly over the
    volume."""
    chosen = origins[jnp.arange(fit.crops) * number // fit.crops]
    return fit.measure(score.args[-1], {"image": cut_windows(volume, chosen, window)}, key)  # type: ignore[attr-defined]


def without_lesions(system: System, fit: Fit, result: Result) -> PyTree:
    """What a fit measures of a case, without the windows of a training volume that touch a lesion."""
    case, sweep, volume = result.case, system.sweep, result.case.volume
    if not fit.crops or not sweep or not volume or volume.lesion is None:
        return result.measured
    shape = case.array.shape[:-1]
    tiling = sweep.tile(shape, sweep.window, sweep.stride, side=volume.side, midline=volume.midline)
    lesion = np.pad(volume.lesion, tiling.pad)
    chosen = tiling.origins[np.arange(fit.crops) * len(tiling.origins) // fit.crops]
    cut = lambda origin: tuple(slice(o, o + w) for o, w in zip(origin, sweep.window, strict=True))
    free = np.array([not lesion[cut(origin)].any() for origin in chosen])
    return jax.tree.map(lambda x: x[:, free], result.measured)


def shapes(config: ConfigDict, system: System, results: Results, cases: int = 64) -> dict[str, Any]:
    """The shapes of all fits, as if to `cases` images or crops, from the shapes of the stages' results."""
    window = system.sweep.window if system.sweep else tuple(config.data.size)
    several = config.replicates > 1
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[several:], x.dtype), results)
    images = lambda n: jax.ShapeDtypeStruct((n, *window, config.data.channels), jnp.float32)
    key, found = jax.random.key(0), dict[str, Any]()
    for fit in system.fits:
        batch = {"image": images(cases), "case": jax.ShapeDtypeStruct((cases, 2), jnp.uint32)}
        if system.sweep and not fit.crops:
            given = one, images(1), jax.random.split(key, 1), jnp.zeros(1, jnp.int32)
            average = jax.eval_shape(system.sweep.score, *given)[0]
            batch = {"average": average, "inside": jax.ShapeDtypeStruct((1, *window), bool)}
        measured = jax.eval_shape(fit.measure, one, batch, key)
        rows = [Row("", "", "train", None, ())] * cases
        tree = fit.finish(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), measured), key, rows)
        lead = (config.replicates,) * several
        found[fit.name] = jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), tree)
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def stored(config: ConfigDict, fit: Fit, results: Results, workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a fit's arrays, what its file says of them).

    Raises InputError where there is no file for these settings, it is damaged, or it belongs to other weights.
    """
    file = file_of(config, fit, workdir)
    remedy = "run jmae.evaluate on the run's own manifest"
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        about = json.loads(arrays.pop(ABOUT).tobytes())
        if about["arrays"] != digest_of(arrays):
            raise ValueError("its arrays have changed")
        of_weights = about["weights"]
    except FileNotFoundError:
        raise InputError(f"{file}: not there, the score needs it: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{file}: damaged ({error}): delete it and {remedy}") from None
    if of_weights != digest_of(flat(results)):
        raise InputError(f"{file}: belongs to other weights: {remedy}")
    return nested(arrays), about


def keep(
    config: ConfigDict, fit: Fit, results: Results, rows: Sequence[Row], tree: Mapping[str, Any], workdir: Path
) -> None:
    """Writes a fit's file."""
    arrays = flat(tree)
    about: dict[str, Any] = {"weights": digest_of(flat(results)), "rows": digest(rows), "arrays": digest_of(arrays)}
    about |= {"settings": settings_of(config, fit), "ids": [row.id for row in rows]}
    content = io.BytesIO()
    np.savez(content, **{ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}, **arrays)  # type: ignore[arg-type]
    write_bytes(file_of(config, fit, workdir), content.getvalue())


def file_of(config: ConfigDict, fit: Fit, workdir: Path) -> Path:
    """The file of a fit under a recipe's settings."""
    text = json.dumps(settings_of(config, fit), sort_keys=True)
    return workdir / FOLDER / f"{fit.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.npz"


def settings_of(config: ConfigDict, fit: Fit) -> dict[str, Any]:
    """The values that a fit depends on beside weights and rows."""
    return {"seed": config.seed} | {name: config.evaluation[name] for name in fit.settings}


def placed(tree: PyTree) -> PyTree:
    """Arrays on each of this process's devices."""
    return jax.device_put(tree, replicated(local_mesh()))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of nested dicts by their path, "a/b"."""
    return {
        "/".join(str(key.key) for key in path): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested dicts back from `flat`."""
    out: dict[str, Any] = {}
    for path, array in arrays.items():
        *names, last = path.split("/")
        place = out
        for name in names:
            place = place.setdefault(name, {})
        place[last] = array
    return out


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """The digest of named arrays."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        hashed.update(arrays[name].tobytes())
    return hashed.hexdigest()
