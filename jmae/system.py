"""The contract of a method: what a system is. The training loop and the evaluator know nothing else of it.

A system is one module with two names. `build(config)` gives a `System`: a tuple of training stages and a function that
scores, all of them pure functions of arrays. `KEYS` declares the recipe keys that the system adds.

- **Where the module lies.** A recipe names it by its key `system`. `amae` is jmae/systems/amae.py. Any other name is
  that of a module that Python finds, such as denoising.py in the current folder (`recipe.module_of`).
  docs/tutorials/sixth_system.md writes such a system from its first line to its report.
- **Keys.** `KEYS` is {"section.name": recipe.Key(default, sentence, bounds)}; `jmae.keys` has those of the library.
  All recipes have the keys `recipe.SHARED`, those of images also `recipe.IMAGES`, those of volumes also
  `recipe.VOLUMES`. A system that declares one of these anew changes its default. The module's `IMAGE_KEYS` hold for
  recipes of images alone, its `VOLUME_KEYS` for recipes of volumes alone. `build` reads values as
  `config.section.name`.
- **Recipe.** A recipe file has `get_config(preset)`, which gives the result of `recipe.preset`.
- **Arrays.** Images are float32 (b, *size, channels), of `data.size` and `data.channels`. The values of an image go
  from 0 to 1. The values of a volume have the mean `data.mean` and the deviation `data.std`. The length of `data.size`
  says whether a recipe is of volumes (`recipe.is_volume`); a stage then gets crops of that size.
- **What helps.** `network` makes pure functions of a Flax module. `optim.begin` makes the first state. `optim.descend`
  makes a step from a loss (params, *arrays) -> (loss, (new statistics, metrics)). `masking.sample_keys` makes
  the random keys of a batch. `rows_of` and `steps_of` are the usual `Stage.rows` and `Stage.steps`. Networks
  are in `jmae.nn`. What a score learns from images after the training, without a gradient, is a `Fit`.
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from jmae import recipe, windows
from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.nn.mae import MAE
from jmae.patches import sincos_positions
from jmae.target import target

PARTS = (nnx.Param, nnx.RngState, ...)  # parts of a network: parameters, random streams, statistics

Results = Mapping[str, Mapping[str, PyTree]]
"""What the finished stages leave, by the stage's name: {"params", "stats"}. Later stages and the score read it."""


class State(struct.PyTreeNode, kw_only=True):
    """What a stage changes from step to step, and what a checkpoint of the stage holds.

    Attributes:
        params: trained parameters, nested dicts of arrays.
        opt: state of the optimiser.
        stats: everything else that a step updates: statistics of batch norm, memories, the best weights so far.
        step: number of the steps done, an int32 scalar. JAX unflattens states with stand-ins for arrays, too.
    """

    params: PyTree
    opt: PyTree
    stats: PyTree
    step: PyTree


@dataclass(frozen=True, kw_only=True)
class Check:
    """A pure look at a stage's state every `every` steps and after the last, on samples that are not trained on.

    The samples are drawn once and are the same at every look. A check without rows does not run.

    Attributes:
        every: steps between two looks; 0: an epoch of whole batches.
        rows: (manifest rows) -> row numbers to look at.
        look: (state, batch, results) -> (state, metrics); deterministic. `results` are those of earlier stages. The
            batch holds "image", "index", "case", "unlabeled" and "label". "unlabeled" says whether the sample's row has
            that split. "label" is 0 or 1 for a labelled row of `val`, -1 for any other.
        samples: number of samples; the rows are repeated to fill it. 0 takes one sample of each row.
    """

    every: int
    rows: Callable[[Sequence[Row]], np.ndarray]
    look: Callable[[State, PyTree, Results], tuple[State, dict[str, Array]]]
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """How a stage uses the weights that `model.weights` names.

    Attributes:
        use: "instead" skips the stage's training; "start" initialises the stage from the weights.
        positions: (grid, width) -> the network's position codes; the codes of the weights must equal them.
        load: (file or folder, first state) -> (state with its weights, a report for weights.txt). None: the weights are
            those of a masked autoencoder, or of a stage of the same name.
        part: (parameters of the stage) -> the masked autoencoder among them, which a file's weights fill.
        whole: (parameters of the stage, that masked autoencoder with its weights) -> parameters of the stage.
    """

    use: Literal["instead", "start"]
    positions: Callable[[tuple[int, ...], int], np.ndarray] = sincos_positions
    load: Callable[[Path, State], tuple[State, str]] | None = None
    part: Callable[[PyTree], PyTree] = lambda params: params
    whole: Callable[[PyTree, PyTree], PyTree] = lambda params, part: part


def final(state: State) -> dict[str, PyTree]:
    """A stage's result: the parameters and statistics of its last step."""
    return {"params": state.params, "stats": state.stats}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: two pure functions, and the data that they get.

    Attributes:
        name: name of the stage, of its checkpoints and of its results.
        splits: splits of the manifest that the stage and its checks read. Rows of other splits are neither
            decoded for training nor counted as seen.
        rows: (rows of all splits that the system reads, results) -> numbers of the rows to train on. A preview calls
            it without results: a stage whose rows depend on an earlier result then raises KeyError.
        batch: samples a step.
        steps: (number of rows) -> number of steps, times `pace` where the stage has one.
        init: (key, results, number of rows) -> the first state.
        step: (state, batch, key, results, *, steps) -> (state, metrics). The batch holds "image" (b, *size, c),
            "index" (b,), the samples' numbers in the table of rows, and the arrays of `host_arrays`. A sample's
            randomness comes from `key`, which is new at every step, and from the sample's number:
            `masking.sample_keys`. `steps` is the number of the stage's steps. The metrics are scalars, among them
            "loss".
        shuffle: True gives epochs in random order, without the last incomplete batch. False gives the rows in order,
            round and round.

    Optional, the data:
        size: size of the images that the stage trains on, where it is not `data.size`. Its checks have `data.size`.
        host_arrays: {name: function of an image (*size, c)} of arrays that the host computes once an image. They come
            with the batch.
        table: (rows, results) -> lines of STAGE.csv in the run folder, a file for people to read.

    Optional, the course of the training:
        pace: (rows, results) -> factor on `steps`, for stages that divide steps among them by their rows. A plan takes
            it as 1.
        pretrained: how the stage uses `model.weights`; None ignores them.
        checks: looks at how the training goes.
        watch: a look at held-out rows that only logs. It chooses nothing, so its rows count neither as read nor as
            seen, and may still calibrate the run. None, or without rows: it does not run.
        parts: parts in which a step takes its batch, one after the other (`accumulate`).
        phases: values of the step's further argument `phase`, which is known while the step is traced. Step k, counted
            from 0, gets phases[k % len(phases)]. The single phase None stands for a step without that argument.
        result: (state) -> {"params", "stats"} for later stages and the score.
        published: values of the stage's metrics that the paper prints, {metric: {epoch, counted from 1: value}}. The
            evaluation lists them beside the run's own.
        published_with: the paper's recipe values for them. The evaluation lists those in which the run differs.
        words: {metric: what it is, in plain words} for the lines of a training. A metric without words has its name.
            The words of "NAME" hold for "NAME_0", "NAME_1", ... too, one a channel.
        nothing: {metric: value} at or below which the network has learnt nothing, or hardly anything (`jmae.doubts`);
            of several channels the best counts. In place of a value may stand another metric of the same line.
    """

    name: str
    splits: tuple[str, ...] = ("train",)
    rows: Callable[[Sequence[Row], Results], np.ndarray]
    batch: int
    steps: Callable[[int], int]
    init: Callable[..., State]
    step: Callable[..., tuple[State, dict[str, Array]]]
    shuffle: bool = True
    size: tuple[int, ...] = ()
    host_arrays: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    table: Callable[[Sequence[Row], Results], list[dict[str, Any]]] | None = None
    pace: Callable[[Sequence[Row], Results], float] | None = None
    pretrained: Pretrained | None = None
    checks: tuple[Check, ...] = ()
    watch: Check | None = None
    parts: int = 1
    phases: tuple[Any, ...] = (None,)
    result: Callable[[State], dict[str, PyTree]] = final
    published: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    published_with: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    nothing: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How a system scores a whole volume: windows x repetitions as one stream (`jmae.windows.average`).

    Attributes:
        window: edges of a window, voxels.
        stride: distance between windows, voxels.
        repeats: sweeps over all windows.
        groups: sweeps in a row in which a window keeps its random key: a round. Systems whose masks of a round are a
            partition of the tokens have several.
        by_case: whether random keys are made of the case's id, too. Then a file's score depends on its name.
        score: (results, images (b, *window, c), keys (b,), groups (b,)) -> (values (b, *window, k), weights
            (b, *window, 1)): the values that are averaged over the windows that cover a voxel. Each window of a round
            has its own random key, and each sweep of a round its number, from 0 to `groups` - 1. The weights count
            where `average` is weighted.
        fuse: (results, averages (*size, k), inside (*size)) -> {"maps": {name: (*size)}} and, where the system has
            them, "reconstruction" (*size, c) and "confidence" (*size). `inside` is False where the array is filled up;
            maps are 0 there. A volume's score is the mean of each map's highest voxels; `evaluation.top` is their
            share.
        further: (results) -> None or a function (images (b, *window, c)) -> (values (b, *window, k), weights
            (b, *window, 1)) without a random part. Its weighted means over the windows are further maps. It is None
            where the results lack what the score learns from images, as in a plan. None without such maps.
        further_maps: names of these maps.
        average: the function that averages, `windows.average` or a form of it.
        tile: the function that places the windows, `windows.tile` or a form of it.
        example: (results, images (b, *window, c), keys (b,), groups (b,)) -> (images as the network sees them, its
            prediction under one mask each, True (b, *window, 1) for hidden voxels): for pictures of one window. None
            without masks.
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    repeats: int = 1
    groups: int = 1
    by_case: bool = False
    score: Callable[..., tuple[Array, Array]]
    fuse: Callable[..., dict[str, Any]]
    further: Callable[[Results], Callable[[Array], tuple[Array, Array]] | None] | None = None
    further_maps: tuple[str, ...] = ()
    average: Callable[..., Array] = windows.average
    tile: Callable[..., windows.Tiling] = windows.tile
    example: Callable[..., tuple[Array, Array, Array]] | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a score learns from images after the training and without a gradient: a bank of tokens, a map of expected
    errors. `score` finds it as `results[name]`.

    The library computes it at the end of the training, or when an evaluation first needs it, and keeps it in the run
    folder (`jmae.fitting`). `evaluate`, `predict`, `export` and `load` read it from there.

    Attributes:
        name: its name among the results; no stage has that name.
        rows: (manifest rows) -> numbers of the rows that it is fitted to, such as `train_normals` or
            `fitting_normals`. Rows of `val` among them no longer calibrate, so that p-values keep their guarantee.
        measure: (results, batch, key) -> nested dicts of arrays (b, ...), a pure function. `key` is the run's key, as
            `score` gets it. For images the batch is that of `score`. For volumes it depends on `crops`. With crops it
            holds "image" (b, *window, c), windows as `Sweep.score` gets them. Without crops it holds a volume's
            "average" (1, *size, k), as `Sweep.fuse` gets it, and "inside" (1, *size); sizes differ between volumes, so
            the arrays must not depend on them.
        finish: (the arrays of all rows or crops, joined along b, on the host; key; the rows) -> nested dicts of arrays.
        crops: windows of each volume that are measured, spread evenly over it, without those that touch a lesion; 0:
            the volume as a whole.
        settings: keys of the section `evaluation` that change what is fitted, without the section's name.
        needs: the remedy where `rows` gives none, in words.
    """

    name: str
    rows: Callable[[Sequence[Row]], np.ndarray]
    measure: Callable[..., PyTree]
    finish: Callable[[PyTree, Array, Sequence[Row]], dict[str, Any]]
    crops: int = 0
    settings: tuple[str, ...] = ()
    needs: str = "give the manifest more normals"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The stage whose step `select=aucp` chooses, where it is not the last stage that the score reads.

    Attributes:
        stage: name of the stage.
        stand_ins: () -> results that stand for those of later stages. With these results the score ranks cases as it
            will after the training.
    """

    stage: str
    stand_ins: Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a system predicts hidden patches, and how it scores where another predictor stands in for its network.

    A predictor is a function (results, patches (b, n, v), keep, restore) -> predictions (b, m, n, v) of all patches
    from the visible ones. `keep` (m, k) and `restore` (m, n) are those of `masking.order_of`, of m masks that the
    images share; with a leading axis (b, ...) each image has masks of its own.

    Attributes:
        predict: the network as a predictor.
        view: (images as read (b, *size, c)) -> as the network sees them, without augmentation.
        patch: edges of a patch.
        ratio: share of the tokens that a mask hides in a test.
        beside: (predictor) -> the system that scores with it, by the same rule under the same masks. Its results are
            those that the predictor reads, and those of its fits, which measure with the predictor too.
    """

    predict: Callable[..., Array]
    view: Callable[[Array], Array]
    patch: tuple[int, ...]
    ratio: float
    beside: Callable[[Callable[..., Array]], "System"]


class Rival(NamedTuple):
    """What stands in for a system's network where the network does not predict hidden patches.

    Attributes:
        name: what it is, in words.
        system: the system of its score alone.
        results: (key) -> what the score reads, without the system's fits.
    """

    name: str
    system: "System"
    results: Callable[[Array], Results]


@dataclass(frozen=True, kw_only=True)
class System:
    """Stages in order, and the score that they serve.

    A system scores images with `score`, or volumes with `sweep`; the other one is None. Higher is more abnormal.

    Attributes:
        name: name of the system in recipes.
        stages: stages in order.
        uses: names of the stages whose results the score reads.
        primary: name of the score that stands for the system; for volumes, name of a map.
        primary_uses: names of the stages that this score depends on; (): all of `uses`.
        score: (results, batch, key, *, chunk) -> {"maps": {name: (b, *size)}, "scores": {name: (b,)}} and, where the
            system has them, "reconstruction": (b, *size, c) in the images' own range; "confidence": (b, *size), the
            deviation of the primary map over the samples; "score_error": (b,), the Monte-Carlo error of the primary
            score, where that is a mean over two or more masks or samples; "pictures": {name: (b, *size, c), or
            (b, h, w) in another unit} for the report. The batch holds "image" and "case" (b, 2), words of the case's
            id. All randomness comes from `key`, the same for every image, so that a score is a function of the image.
            The words serve `evaluation.masks_of` "case" alone. `chunk` masks or samples are computed at a time. A map
            without a score of its name gets one on the host (`Scorer.result`).
        sweep: how the system scores volumes.

    Optional:
        masks: number of masks or samples in one call of `score`.
        repetitions: key of the recipe's section `evaluation` that holds the number of masks, samples or sweeps of a
            score.
        averaged: whether the primary score is the mean of the scores that each mask or sample alone would give.
        map: name of the map to show, where no map has the name of the primary score.
        fits: what the score learns from images after the training.
        choice: what `select=aucp` chooses by, where the default does not fit.
        prediction: how the system predicts hidden patches, if its score is made of such predictions. Closed-form rivals
            of its network are then scored beside it (`jmae.rivals`).
        rivals: further rivals, by their name in `evaluation.rivals`.
        best: rules of `select` that the system has beside "last" and "aucp".
        notes: sentences without the full stop. They say how a run of this recipe differs from the paper's, where every
            reader of its figures must know. The log, metrics.json, the report and the model card say them.
        words: {score: what it is, in plain words} for the report. A score without words has its name alone.
        map_words: what the values of the map are, in plain words.
    """

    name: str
    stages: tuple[Stage, ...]
    uses: tuple[str, ...]
    primary: str
    primary_uses: tuple[str, ...] = ()
    score: Callable[..., dict[str, dict[str, Array]]] | None = None
    sweep: Sweep | None = None
    masks: int = 1
    repetitions: str = ""
    averaged: bool = True
    map: str = ""
    fits: tuple[Fit, ...] = ()
    choice: Choice | None = None
    prediction: Prediction | None = None
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    best: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    map_words: str = "values of the map, without a unit"


def with_best(state: State, rule: str) -> State:
    """A first state that will keep its best weights under a rule, beside its last ones. stats["best"] holds "params",
    "stats" and, under the rule's name, the value -1."""
    return state.replace(stats=state.stats | {"best": {**last_weights(state), rule: jnp.float32(-1)}})


def keep_best(state: State, rule: str, value: Array, *, tolerance: float = 0.0, **more: Array) -> State:
    """The state with its weights as the best, where their value is not below that of the best so far.

    Args:
        rule: name of the rule, as `with_best` has it.
        value: value of the state's last weights; higher is better.
        tolerance: how far below the highest value so far it may be.
        more: further numbers to keep with the weights, such as their step.
    """
    best = state.stats["best"]
    highest = jnp.where(value > best[rule], value, best[rule]).astype(jnp.float32)
    new = {**last_weights(state), rule: highest, **more}
    better = value >= best[rule] - tolerance
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), new, best)
    return state.replace(stats=state.stats | {"best": best})


def last_weights(state: State) -> dict[str, PyTree]:
    """The parameters and statistics of a state's last step, without the best ones."""
    return {"params": state.params, "stats": {name: s for name, s in state.stats.items() if name != "best"}}


def best_weights(result: Mapping[str, PyTree], rule: str) -> dict[str, PyTree]:
    """The best {"params", "stats"} of a stage's result, or the last ones where no value of the rule was ever found or
    the stage keeps no best weights."""
    stats = dict(result["stats"])
    last = {"params": result["params"], "stats": stats}
    if "best" not in stats:
        return last
    best = stats.pop("best")
    return jax.tree.map(lambda best_, last_: jnp.where(best[rule] >= 0, best_, last_), {k: best[k] for k in last}, last)


def splits_read(system: System) -> tuple[str, ...]:
    """The splits whose rows training reads, those of its checks included."""
    return tuple(dict.fromkeys(split for stage in system.stages for split in stage.splits))


def rows_read(system: System, rows: Sequence[Row]) -> list[Row]:
    """The rows that training reads. They are decoded, count as seen (seen.csv), and may not be scored as new cases."""
    splits = splits_read(system)
    return [row for row in rows if row.split in splits]


def nothing_to_train_on(stage: Stage, config: ConfigDict) -> InputError:
    """The error of a stage without rows; it names `data.calibration` where that has moved normals out of `train`."""
    manifest, share = f"give the manifest rows of {' and '.join(stage.splits)}", config.data.calibration
    if share and "train" in stage.splits:  # `kept_apart` moves some normals or raises
        remedy = f"data.calibration={share:g} keeps the normal scans of train for p-values: set it lower, or {manifest}"
        return InputError(f"stage {stage.name}: no rows left to train on: {remedy}")
    return InputError(f"stage {stage.name}: no rows to train on: {manifest}")


def rows_watched(system: System, rows: Sequence[Row]) -> list[Row]:
    """The rows that training only watches (`Stage.watch`)."""
    looks = [stage.watch for stage in system.stages if stage.watch]
    return [rows[i] for i in sorted({int(i) for look in looks for i in look.rows(rows)})]


def held_out_normals(rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the normal rows of `val` that leak nothing: the usual `Check.rows` of a watch."""
    held_out = lambda row: row.split == "val" and row.label == 0 and not row.leak
    return np.array([i for i, row in enumerate(rows) if held_out(row)], np.int64)


def train_normals(rows: Sequence[Row]) -> np.ndarray:
    """Numbers of the normal rows of `train`: the usual `Fit.rows` of a bank."""
    return np.array([i for i, row in enumerate(rows) if row.split == "train" and row.label != 1], np.int64)


def fitting_normals(rows: Sequence[Row]) -> np.ndarray:
    """Numbers of one half of the held-out normals: the usual `Fit.rows` of an expectation. The other half calibrates.

    Whole patients go into a half, in an order that depends on their names alone. An odd patient calibrates. A single
    patient serves the fit, and none calibrates then.
    """
    numbers, patient = held_out_normals(rows), lambda i: rows[i].patient or rows[i].id
    order = sorted({patient(i) for i in numbers}, key=lambda name: hashlib.sha256(name.encode()).digest())
    half = set(order[1::2] or order)
    return np.array([i for i in numbers if patient(i) in half], np.int64)


def fitted_rows(system: System, rows: Sequence[Row]) -> set[str]:
    """Ids of the rows of `val` that the score is fitted to, so that they cannot calibrate it."""
    return {rows[i].id for fit in system.fits for i in fit.rows(rows) if rows[i].split == "val"}


def rows_of(rows: Sequence[Row], results: Results, *, splits: tuple[str, ...] = ("train",)) -> np.ndarray:
    """Numbers of the rows of some splits: the usual `Stage.rows`."""
    return np.array([i for i, row in enumerate(rows) if row.split in splits], np.int64)


def trained_shape(config: ConfigDict, stage: Stage) -> tuple[int, ...]:
    """The shape (*size, channels) of an image, or of a crop of a volume, in a batch of a stage."""
    return (*(stage.size or config.data.size), config.data.channels)


def chosen_on_val(system: System) -> bool:
    """Whether labels of `val` chose weights that the primary score depends on: such a stage reads that split."""
    names = system.primary_uses or system.uses
    return any("val" in stage.splits for stage in system.stages if stage.name in names)


def load_system(config: ConfigDict) -> System:
    """The system that `config.system` names (`recipe.module_of`).

    Raises InputError for a recipe that does not fit its declarations, and for settings that do not fit together.
    Settings of the evaluation are checked here too, so that they do not fail after the training.
    """
    module = recipe.module_of(config.system)
    recipe.check(config)
    system = module.build(config)
    evaluation, volumes = config.evaluation, recipe.is_volume(config)
    if volumes and evaluation.iou:
        raise InputError(f"evaluation.iou is {evaluation.iou}: volumes have no IoU, set it to 0")
    if (sweep := system.sweep) and any(s > w for s, w in zip(sweep.stride, sweep.window, strict=True)):
        raise InputError(f"evaluation.stride {sweep.stride} leaves gaps: set it to at most the window, {sweep.window}")
    if evaluation.convergence == 1:
        raise InputError("evaluation.convergence is 1: set it to 0 (off), or to 2 or more repetitions")
    if evaluation.convergence and (number := drawn(config, system)) < 2:
        what = system.repetitions
        raise InputError(f"evaluation.convergence asks for the score at fewer {what}: evaluation.{what} is {number}")
    k = config.accumulate
    if k != 1 and all(stage.parts == 1 for stage in system.stages):
        raise InputError(f"accumulate={k}: {system.name} takes statistics of the whole batch: set it to 1")
    if any(stage.batch % stage.parts for stage in system.stages):
        batches = ", ".join(f"{stage.name} {stage.batch}" for stage in system.stages if stage.parts != 1)
        raise InputError(f"accumulate={k}: does not divide a batch ({batches}): set it to a common divisor")
    rules, rule = ("last", *system.best, "aucp"), config.select
    if rule not in rules:
        raise InputError(f"select is {rule!r}: one of {', '.join(rules)}")
    if rule != "aucp":
        return system
    return importlib.import_module("jmae.selection").by_pseudo_auc(config, system)


def drawn(config: ConfigDict, system: System) -> int:
    """How many masks, samples or sweeps a score has; 1 where it has no random part."""
    return config.evaluation[system.repetitions] if system.repetitions else 1


class Keys(nnx.Rngs):
    """`nnx.Rngs(params=key)` with the keys of initial weights counted in Python.

    In Flax the count is an array. Tracing its updates took most of the time that the initial weights took to trace.
    Random streams of other names, as `nnx.Dropout` makes them, are Flax's own.
    """

    def __init__(self, key: Array):
        super().__init__(jax.random.fold_in(key, 2**32 - 1))
        self.key, self.number = key, 0

    def params(self) -> Array:
        self.number += 1
        return jax.random.fold_in(self.key, self.number - 1)


def network(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[Array], PyTree], Callable[..., Any]]:
    """The two functions (init, bind) of a network, between which all its arrays are plain nested dicts.

    `init(key)` gives (params, stats). `bind(params, stats=None, key=None)` gives the module; `stats_of(module)` are its
    statistics after a call. Flax's modules with a random stream, such as `nnx.Dropout`, draw from `key` for the whole
    batch. A network whose randomness belongs to each sample takes the samples' keys as an argument instead.
    """
    graph, *parts = nnx.split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))), *PARTS)

    streams = parts[1]

    def init(key: Array) -> tuple[PyTree, PyTree]:
        params, _, stats = nnx.state(make(Keys(key)), *PARTS)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def bind(params: PyTree, stats: PyTree = None, key: Array | None = None) -> Any:
        if not (leaves := jax.tree.leaves(streams)):
            return nnx.merge(graph, params, {}, stats or {})
        keys = iter(jax.random.split(jax.random.key(0) if key is None else key, len(leaves)))
        seed = lambda leaf, one: one if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros((), leaf.dtype)
        return nnx.merge(graph, params, jax.tree.map(lambda leaf: seed(leaf, next(keys)), streams), stats or {})

    return init, bind


def stats_of(module: nnx.Module) -> PyTree:
    """A network's statistics, such as those of batch norm, as a plain dict."""
    return nnx.to_pure_dict(nnx.state(module, *PARTS)[2])


def compute_type(config: ConfigDict) -> Any:
    """The type that networks compute in, as `model.dtype` names it."""
    auto = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
    dtypes = {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if config.model.dtype not in dtypes:
        raise InputError(f"model.dtype is {config.model.dtype!r}: one of {', '.join(dtypes)}")
    return dtypes[config.model.dtype]


def masked_autoencoder(
    config: ConfigDict, channels: int, make: Callable[..., MAE] = MAE, **other: Any
) -> tuple[Callable, Callable]:
    """`network` of the MAE that `config.model` describes, for images of `config.data.size` and `channels`."""
    model = config.model
    return network(
        lambda rngs: make(
            size=tuple(config.data.size),
            patch=tuple(model.patch),
            channels=channels,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            decoder_width=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            dtype=compute_type(config),
            remat=model.remat,
            rngs=rngs,
            **other,
        )
    )


def steps_of(section: ConfigDict, budget: float) -> Callable[[int], int]:
    """Steps of a stage for n rows: `steps` of its section, or else `epochs` of whole batches, times `budget`."""
    if min(section.get("steps", 0), section.get("epochs", 0)) < 0 or budget <= 0:
        raise InputError("steps and epochs must not be below 0, and budget must be above 0")
    if bool(section.get("steps")) == bool(section.get("epochs")):
        raise InputError("a stage has either steps or epochs: set one of them and the other to 0")
    if section.get("steps"):
        return lambda n: max(1, round(section.steps * budget))
    return lambda n: max(1, round(section.epochs * budget)) * max(1, n // section.batch)


def stage_keys(config: ConfigDict, number: int) -> Any:
    """The key of a stage; with replicates, one key a seed."""
    keys = [jax.random.fold_in(jax.random.key(config.seed + r), number) for r in range(config.replicates)]
    return keys[0] if config.replicates == 1 else jnp.stack(keys)


def split_replicates(results: Results, n: int) -> list[Results]:
    """Results of each replicate."""
    return [results] if n == 1 else [jax.tree.map(itemgetter(r), results) for r in range(n)]
