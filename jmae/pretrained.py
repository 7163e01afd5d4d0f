"""Initial parameters of a stage from another model: a file of weights, or an earlier run (`model.weights`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jmae import checkpoint, recipe
from jmae.errors import InputError
from jmae.run_folder import log, write_text
from jmae.run_recipe import read_run
from jmae.sharding import on_host
from jmae.system import Stage, State
from jmae.weights import load_weights, read_weights, summary, tensor_table

# Keys of `model` that a checkpoint does not depend on.
FREE_OF_MODEL = ("weights", "weights_part", "weights_adapt", "dtype", "remat")


def with_pretrained(config: ConfigDict, stage: Stage, state: State, workdir: Path) -> State:
    """The state with the parameters that `model.weights` names; one set serves all replicates.

    A file is read as by `jmae.weights`, and weights.txt tells what became of each tensor. A run folder gives the
    parameters of the stage of the same name. A stage with `Pretrained.load` takes what that reads, statistics included.

    Raises InputError where there are none, or where they are of another network or preparation of images.
    """
    assert stage.pretrained
    source, n = Path(config.model.weights), config.replicates
    put = lambda new, old: jax.make_array_from_callback(new.shape, old.sharding, lambda i: new[i])
    if stage.pretrained.load:
        first = on_host(state)
        one, report = stage.pretrained.load(source, first if n == 1 else jax.tree.map(lambda x: x[0], first))
        log(f"{stage.name}: weights of {source}: {workdir / 'weights.txt'}")
        write_text(workdir / "weights.txt", report + "\n")
        return jax.tree.map(put, one if n == 1 else jax.tree.map(lambda x: np.stack([x] * n), one), state)
    if source.is_file():
        weights, model = read_weights(source), config.model
        part = model.get("weights_part", "mae")
        if weights.size is None and part != "blocks":  # the file does not tell the size
            weights = read_weights(source, size=tuple(config.data.size))
        drawn, form = on_host(state.params), stage.pretrained
        single = lambda r: drawn if n == 1 else jax.tree.map(lambda x: x[r], drawn)
        loaded = [
            load_weights(
                weights,
                form.part(single(r)),
                part=part,
                heads=model.heads,
                decoder_heads=model.decoder_heads,
                size=tuple(config.data.size),
                patch=tuple(model.patch),
                channels=model.get("channels", config.data.channels),
                positions=form.positions,
                adapt=model.weights_adapt,
            )
            for r in range(n)
        ]
        each = [form.whole(single(r), filled) for r, (filled, _) in enumerate(loaded)]
        params = each[0] if n == 1 else jax.tree.map(lambda *x: jnp.stack(x), *each)
        log(f"{stage.name}: {summary(loaded[0][1])} from {source}, part {part}: {workdir / 'weights.txt'}")
        write_text(workdir / "weights.txt", tensor_table(loaded[0][1]) + "\n")
    else:
        params = params_of_run(config, stage, state)
    return state.replace(params=jax.tree.map(put, on_host(params), state.params))


def params_of_run(config: ConfigDict, stage: Stage, state: State) -> PyTree:
    """A stage's parameters from the run folder that `model.weights` names. Raises InputError as `with_pretrained`."""
    workdir, n = Path(config.model.weights), config.replicates
    folder = workdir / "checkpoints" / stage.name
    if not workdir.exists():
        raise InputError(f"model.weights: {workdir} not found: name a checkpoint file, or the folder of an earlier run")
    if not (workdir / "config.json").is_file():
        raise InputError(f"model.weights: {folder} has no checkpoint: name a file, or the folder of an earlier run")
    source = read_run(workdir)
    ours, theirs = (dict(recipe.keys_of(c)) for c in (config, source))
    shared = [k for k in ours if k.startswith("model.") and k.split(".")[1] not in FREE_OF_MODEL]
    for key in [*shared, "data.size", "data.normalise", "data.mean", "data.std"]:
        if ours[key] != theirs.get(key):
            raise InputError(
                f"model.weights: {workdir} has {key}={theirs.get(key)}, the recipe {ours[key]}: make them equal"
            )
    stacked = n > 1 and source.replicates == n
    single = state if n == 1 or stacked else jax.tree.map(lambda x: x[0], state)
    found = checkpoint.restore(folder, single, config=None, log=log)
    if not found:
        raise InputError(f"model.weights: {folder} has no checkpoint: name the folder of an earlier run")
    step, saved, position = found
    checkpoint.refuse_unfinished(folder, step, position)
    log(f"{stage.name}: taken over from {folder}, step {step}")
    params = stage.result(saved)["params"]
    return params if n == 1 or stacked else jax.tree.map(lambda x: jnp.stack([x] * n), params)
