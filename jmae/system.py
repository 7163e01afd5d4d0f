"""The contract of a method: what a system is. The training loop and the evaluator know nothing else of it.

A system is one module `jmae.systems.NAME` with `KEYS`, the declarations of its recipe keys, and `build(config)`, which
gives a `System`: a tuple of training stages and a function that scores. All of them are pure functions of arrays.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Int, PyTree
from ml_collections import ConfigDict

from jmae import windows
from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.nn.mae import MAE
from jmae.patches import sincos_positions
from jmae.target import target

SYSTEMS = ("amae", "maemi", "memmc_mae", "ppii", "simsid")

Results = Mapping[str, Mapping[str, PyTree]]
"""What the finished stages leave, by the stage's name: {"params", "stats"}. Later stages and the score read it."""


class State(struct.PyTreeNode, kw_only=True):
    """What a stage changes from step to step, and what a checkpoint of the stage holds.

    Attributes:
        params: trained parameters, nested dicts of arrays.
        opt: state of the optimiser.
        stats: everything else that a step updates: statistics of batch norm, memories, the best weights so far.
        step: number of the steps done.
    """

    params: PyTree
    opt: PyTree
    stats: PyTree
    step: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A pure look at a stage's state every `every` steps and after the last, on samples that are not trained on.

    The samples are drawn once and are the same at every look. A check without rows does not run.

    Attributes:
        every: steps between two looks.
        rows: (manifest rows) -> row numbers to look at.
        look: (state, batch, results) -> (state, metrics); deterministic. `results` are those of earlier stages. The
            batch holds "image", "index", "case", "unlabeled" (whether the sample's row has that split) and "label":
            0 or 1 of a labelled row of `val`, -1 of every other row.
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
        positions: (grid, width) -> the network's position codes, which those of the weights must equal.
    """

    use: Literal["instead", "start"]
    positions: Callable[[tuple[int, ...], int], np.ndarray] = sincos_positions


def final(state: State) -> dict[str, PyTree]:
    """A stage's result: the parameters and statistics of its last step."""
    return {"params": state.params, "stats": state.stats}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: two pure functions, and what they are to be given.

    Attributes:
        name: name of the stage, of its checkpoints and of its results.
        splits: splits of the manifest that the stage reads, its checks included. Rows of other splits are neither
            decoded for training nor counted as seen.
        rows: (rows of all splits that the system reads, results) -> numbers of the rows to train on.
        batch: samples a step.
        steps: (number of rows) -> number of steps.
        init: (key, results, number of rows) -> the first state.
        step: (state, batch, key, results, *, steps) -> (state, metrics). A sample's randomness comes from `key` and
            its number in the table of rows, batch["index"]. `results` are read only.
        shuffle: True gives epochs in random order, without the last incomplete batch. False gives the rows in order,
            round and round.

    Optional, the data:
        host_arrays: {name: function of an image (*size, c)} of arrays that the host computes once an image. They come
            with the batch.
        table: (rows, results) -> lines of STAGE.csv in the run folder, a file for people to read.

    Optional, the course of the training:
        pretrained: how the stage uses `model.weights`; None ignores them.
        checks: looks at how the training goes.
        parts: parts in which a step takes its batch, one after the other (`accumulate`).
        phases: values of the step's further argument `phase`, which is known while the step is traced. Step k, counted
            from 0, gets phases[k % len(phases)]. The single phase None stands for a step without that argument.
        result: (state) -> {"params", "stats"} for later stages and the score.
        published: values of the stage's metrics that the paper prints, {metric: {epoch, counted from 1: value}}. The
            evaluation lists them beside the run's own.
    """

    name: str
    splits: tuple[str, ...] = ("train",)
    rows: Callable[[Sequence[Row], Results], np.ndarray]
    batch: int
    steps: Callable[[int], int]
    init: Callable[..., State]
    step: Callable[..., tuple[State, dict[str, Array]]]
    shuffle: bool = True
    host_arrays: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    table: Callable[[Sequence[Row], Results], list[dict[str, Any]]] | None = None
    pretrained: Pretrained | None = None
    checks: tuple[Check, ...] = ()
    parts: int = 1
    phases: tuple[Any, ...] = (None,)
    result: Callable[[State], dict[str, PyTree]] = final
    published: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How a system scores a whole volume: windows x repetitions as one stream (`jmae.windows.average`).

    Attributes:
        window: edges of a window, voxels.
        stride: distance between windows, voxels.
        repeats: sweeps over all windows.
        score: (results, images (b, *window, c), keys (b,)) -> (values (b, *window, k), weights (b, *window, 1)): what
            is averaged over the windows that cover a voxel.
        fuse: (averages (*size, k), inside (*size)) -> {"maps": {name: (*size)}} and, where the system has them,
            "reconstruction" (*size, c) and "confidence" (*size). `inside` is False where the array is filled up.
        average: the function that averages, `windows.average` or a form of it.
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    repeats: int = 1
    score: Callable[..., tuple[Array, Array]]
    fuse: Callable[..., dict[str, Any]]
    average: Callable[..., Array] = windows.average


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The stage whose step `select=aucp` chooses, where it is not the last stage that the score reads.

    Attributes:
        stage: name of the stage.
        stand_ins: () -> results that stand for those of later stages. With them the score ranks cases as it will.
    """

    stage: str
    stand_ins: Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class System:
    """Stages in order, and the score that they serve.

    A system scores images with `score`, or volumes with `sweep`; the other one is None. Higher is more abnormal.

    Attributes:
        name: name of the system.
        stages: stages in order.
        uses: names of the stages whose results the score reads.
        primary: name of the score that stands for the system.
        score: (results, batch, key, *, chunk) -> {"maps": {name: (b, *size)}, "scores": {name: (b,)}} and, where the
            system has them, "reconstruction": (b, *size, c) in the images' own range; "confidence": (b, *size), the
            deviation of the primary map over the samples; "pictures": {name: (b, *size, c), or (b, h, w) in another
            unit} for the report. `chunk` masks or samples are computed at a time.
        sweep: how the system scores volumes.

    Optional:
        masks: masks or samples of one call of `score`.
        repetitions: recipe key, in the section `evaluation`, of the number of masks, samples or sweeps of a score.
        averaged: whether the primary score is the mean of the scores that each mask or sample alone would give.
        map: name of the map to show, where no map has the name of the primary score.
        choice: what `select=aucp` chooses by, where the default does not fit.
        best: rules of `select` that the system has beside "last" and "aucp".
    """

    name: str
    stages: tuple[Stage, ...]
    uses: tuple[str, ...]
    primary: str
    score: Callable[..., dict[str, dict[str, Array]]] | None = None
    sweep: Sweep | None = None
    masks: int = 1
    repetitions: str = ""
    averaged: bool = True
    map: str = ""
    choice: Choice | None = None
    best: tuple[str, ...] = ()


def splits_read(system: System) -> tuple[str, ...]:
    """The splits whose rows training reads, those of its checks included."""
    return tuple(dict.fromkeys(split for stage in system.stages for split in stage.splits))


def rows_read(system: System, rows: Sequence[Row]) -> list[Row]:
    """The rows that training reads. They are decoded, count as seen (seen.csv), and may not be scored as new cases."""
    splits = splits_read(system)
    return [row for row in rows if row.split in splits]


def chosen_on_val(system: System) -> bool:
    """Whether labels of `val` chose the weights: a stage reads that split."""
    return "val" in splits_read(system)


def load_system(config: ConfigDict) -> System:
    """The system that `config.system` names, by import of `jmae.systems.NAME`; raises InputError where a setting means
    nothing, also one of the evaluation, which would else come to light after the training."""
    if config.system not in SYSTEMS:
        raise InputError(f"system {config.system!r} is unknown: one of {', '.join(SYSTEMS)}")
    system = importlib.import_module(f"jmae.systems.{config.system}").build(config)
    for name in ("checkpoint_every", "log_every", "replicates"):
        if (value := config.get(name, 1)) < 1:
            raise InputError(f"{name} is {value}: 1 or more")
    evaluation, volumes = config.evaluation, system.sweep is not None
    for name, least in (("batch", 1), ("draws", 1), ("chunk", 0)):
        if (value := evaluation.get(name, least)) < least:
            raise InputError(f"evaluation.{name} is {value}: {least} or more")
    if not 0 < (rate := evaluation.get("alarm_rate", 0.05)) < 1:
        raise InputError(f"evaluation.alarm_rate={rate}: is no rate: above 0 and below 1, as 0.05")
    if not 0 < (top := evaluation.get("top", 1.0)) <= 1:
        raise InputError(f"evaluation.top={top}: is no share of the map: above 0, up to 1")
    if not 0 <= (q := evaluation.get("iou", 0.0)) <= (0 if volumes else 100):
        raise InputError(f"evaluation.iou is {q}: a percentile from 0 (no IoU) to 100; of volumes 0 alone")
    if evaluation.get("convergence"):
        if evaluation.convergence < 2:
            raise InputError(f"evaluation.convergence is {evaluation.convergence}: 0 (off), or 2 or more repetitions")
        what, number = drawn(config)
        if number < 2:
            raise InputError(
                f"evaluation.convergence asks for the score at fewer {what}: evaluation.{what} is {number}"
            )
    if (k := config.get("accumulate", 1)) != 1 and system.name in ("ppii", "simsid"):
        raise InputError(f"accumulate={k}: {system.name} takes statistics of the whole batch: set it to 1")
    if k < 1 or any(stage.batch % stage.parts for stage in system.stages):
        batches = ", ".join(f"{stage.name} {stage.batch}" for stage in system.stages if stage.parts != 1)
        raise InputError(f"accumulate={k}: does not divide a batch ({batches}): set it to a common divisor")
    own = {"ppii": ("dice",), "simsid": ("auroc",)}.get(system.name, ())
    rules, rule = ("last", *own, "aucp"), config.get("select", "last")
    if rule not in rules:
        raise InputError(f"select is {rule!r}: one of {', '.join(rules)}")
    if rule != "aucp":
        return system
    return importlib.import_module("jmae.selection").by_pseudo_auc(config, system)


def drawn(config: ConfigDict) -> tuple[str, int]:
    """(which setting of the evaluation says how many random masks, samples or sweeps a score has, how many)."""
    what = next(name for name in ("masks", "samples", "repeats") if name in config.evaluation)
    return what, config.evaluation[what]


class Keys:
    """The keys for initial weights that `nnx.Rngs(params=key)` gives, counted in Python: there the count is an array,
    whose every update was traced, most of the time that it took to trace a network's initial weights."""

    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def params(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def network(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[Array], PyTree], Callable[..., Any]]:
    """(init, bind) of a network: `init(key)` -> (params, stats) as plain nested dicts, `bind(params, stats)` -> the
    module. Statistics after a call: `stats_of(module)`."""
    made = lambda key: make(cast(nnx.Rngs, Keys(key)))
    graph, *_ = nnx.split(nnx.eval_shape(lambda: made(jax.random.key(0))), nnx.Param, ...)

    def init(key: Array) -> tuple[PyTree, PyTree]:
        params, stats = nnx.state(made(key), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    return init, lambda params, stats=None: nnx.merge(graph, params, stats or {})


def compute_type(config: ConfigDict) -> Any:
    """What `model.dtype` says networks compute in."""
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


def stats_of(module: nnx.Module) -> PyTree:
    """A network's batch statistics as a plain dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param, ...)[1])


def steps_of(section: ConfigDict, budget: float) -> Callable[[int], int]:
    """Steps of a stage for n rows: `steps` of its section, or else `epochs` of whole batches, times `budget`."""
    if min(section.get("steps", 0), section.get("epochs", 0)) < 0 or budget <= 0:
        raise InputError("steps and epochs are not below 0, and budget is above 0")
    if bool(section.get("steps")) == bool(section.get("epochs")):
        raise InputError("a stage has either steps or epochs: set one of them and the other to 0")
    if section.get("steps"):
        return lambda n: max(1, round(section.steps * budget))
    return lambda n: max(1, round(section.epochs * budget)) * max(1, n // section.batch)


def stage_keys(config: ConfigDict, number: int) -> Any:
    """The key of a stage; with replicates one a seed."""
    keys = [jax.random.fold_in(jax.random.key(config.seed + r), number) for r in range(config.replicates)]
    return keys[0] if config.replicates == 1 else jnp.stack(keys)


def split_replicates(results: Results, n: int) -> list[Results]:
    """Results of each replicate."""
    return [results] if n == 1 else [jax.tree.map(itemgetter(r), results) for r in range(n)]
