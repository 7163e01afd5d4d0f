"""Which step's weights are scored, chosen without a label: `config.select = "aucp"`.

Siddiquee, Rafsani, Shah, Wu, Chong, Schwedt, Li, "AUCp: Pseudo-AUC for Inference Model Selection with Unlabeled
Validation Data in Abnormality Detection", IEEE TMI 2026, arXiv 2606.08742: the AUROC of all unlabelled images against
known normals. Let p be the share of abnormal images among the unlabelled ones. Where their normals score as the known
ones do, the pseudo-AUC is p AUROC + (1 - p) / 2. Both then have their best step in common.

An overfit network gives the normals that it was trained on lower scores than new ones. The pseudo-AUC then rises with
overfitting. Recipes that hold normals out (`held_out`) compare with those.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jmae.data.manifest import Row, held_out
from jmae.errors import InputError
from jmae.masking import case_keys
from jmae.recipe import is_volume
from jmae.scoring import auroc
from jmae.system import Check, Results, State, System, keep_best, with_best

RULE = "aucp"


def by_pseudo_auc(config: ConfigDict, system: System) -> System:
    """The system whose result is the step with the highest pseudo-AUC, the later one of equals.

    The stage `system.choice` names, or the last one that the score reads, looks at its pseudo-AUC every `select_every`
    steps and after the last.

    Raises InputError where `model.weights` takes the place of that stage. `Check.rows` raises it where no row is
    unlabelled.
    """
    name = system.choice.stage if system.choice else system.uses[-1]
    number = [stage.name for stage in system.stages].index(name)
    stage = system.stages[number]
    if stage.pretrained and stage.pretrained.use == "instead" and config.model.weights:
        raise InputError(f"select=aucp: model.weights stands for stage {name}, no step is to be chosen: select=last")
    stand_ins = system.choice.stand_ins if system.choice else dict

    def init(key: Array, results: Results, n: int) -> State:
        state = with_best(stage.init(key, results, n), RULE)
        best = state.stats.pop("best") | {"step": state.step}
        return state.replace(stats={"own": state.stats, "best": best})

    def look(state: State, batch: dict, results: Results) -> tuple[State, dict[str, Array]]:
        own = {"params": state.params, "stats": state.stats["own"]}
        everything = stand_ins() | dict(results) | {name: own}
        value = auroc(scores(config, system, everything, batch), batch["unlabeled"])
        before = state.replace(stats=own["stats"] | {"best": state.stats["best"]})
        best = keep_best(before, RULE, value, step=state.step).stats["best"]
        found = {RULE: value, "best_aucp": best[RULE], "best_step": best["step"]}
        return state.replace(stats=state.stats | {"best": best}), found

    checks = tuple(replace(check, look=beside_best(check.look)) for check in stage.checks)
    selection = Check(every=config.select_every, rows=partial(compared_rows, config), look=look)
    selecting = replace(
        stage,
        splits=tuple(dict.fromkeys((*stage.splits, "train", "unlabeled"))),
        init=init,
        step=beside_best(stage.step),
        checks=(*checks, selection),
        result=lambda state: {part: state.stats["best"][part] for part in ("params", "stats")},
    )
    return replace(system, stages=(*system.stages[:number], selecting, *system.stages[number + 1 :]))


def beside_best(function: Callable) -> Callable:
    """A stage's step or look, on a state that holds the best weights beside the stage's own statistics."""

    def wrapped(state: State, *args: Any, **more: Any) -> tuple[State, dict[str, Array]]:
        after, metrics = function(state.replace(stats=state.stats["own"]), *args, **more)
        return after.replace(stats=state.stats | {"own": after.stats}), metrics

    return wrapped


def compared_rows(config: ConfigDict, rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the known normals, then of the unlabelled rows: `select_samples` of either, spread evenly.

    An image is compared once. A volume has several crops, so its row may come several times.
    """
    share = next((config[s].held_out for s in ("train", "validation") if "held_out" in config.get(s, {})), 0.0)
    apart, splits = held_out(rows, share), np.array([row.split for row in rows])
    normals = np.flatnonzero(apart if apart.any() else splits == "train")
    unlabelled = np.flatnonzero(splits == "unlabeled")
    if not min(normals.size, unlabelled.size):
        raise InputError(
            "select=aucp compares rows of split 'unlabeled' with rows of 'train': give the manifest both, or take"
            " select=last"
        )

    def spread(numbers: np.ndarray) -> np.ndarray:
        count = config.select_samples if is_volume(config) else min(numbers.size, config.select_samples)
        return numbers[np.arange(count) * numbers.size // count]

    return np.concatenate([spread(normals), spread(unlabelled)])


def scores(config: ConfigDict, system: System, results: Results, batch: dict) -> Float[Array, " n"]:
    """The primary score of each image, or of each crop of a volume."""
    return (crop_scores if system.sweep else image_scores)(config, system, results, batch)


def image_scores(config: ConfigDict, system: System, results: Results, batch: dict) -> Float[Array, " n"]:
    """The primary score of each image, in batches as the evaluation has them, under masks that are the same at every
    look."""
    assert system.score
    run, n, b, key = system.score, len(batch["image"]), config.evaluation.batch, jax.random.key(config.seed)
    numbers = jnp.minimum(jnp.arange(-(-n // b) * b), n - 1).reshape(-1, b)

    def one(numbers: Array) -> Float[Array, " b"]:
        part = {what: batch[what][numbers] for what in ("image", "case")}
        return run(results, part, key, chunk=config.evaluation.chunk or None)["scores"][system.primary]

    return jax.lax.map(one, numbers).reshape(-1)[:n]


def crop_scores(config: ConfigDict, system: System, results: Results, batch: dict) -> Float[Array, " n"]:
    """The mean of the primary map of each crop, which is scored as a volume of a window's size."""
    assert system.sweep
    sweep, n = system.sweep, len(batch["image"])
    run = jax.random.key(config.seed)
    keys = case_keys(run, batch["case"]) if sweep.by_case else jnp.broadcast_to(run, (n,))
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.arange(n))

    def one(sample: tuple[Array, Array]) -> Float[Array, ""]:
        image, key = sample
        averages = sweep.average(
            partial(sweep.score, results),
            image,
            jnp.zeros((1, image.ndim - 1), jnp.int32),
            jnp.int32(1),
            tuple(jnp.ones(edge) for edge in sweep.window),
            key,
            window=sweep.window,
            repeats=sweep.repeats,
            batch=sweep.repeats,
            groups=sweep.groups,
        )
        return jnp.mean(sweep.fuse(results, averages, jnp.ones(sweep.window, bool))["maps"][system.primary])

    return jax.lax.map(one, (batch["image"], keys), batch_size=max(1, config.evaluation.batch // sweep.repeats))
