"""What a system is: pure functions in two NamedTuples. The loop and the evaluator know nothing else."""

import importlib
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, PyTree
from ml_collections import ConfigDict

from jmae.data.manifest import Row
from jmae.errors import InputError
from jmae.nn.mae import MAE
from jmae.patches import sincos_positions
from jmae.target import target

SYSTEMS = ("amae", "maemi", "memmc_mae", "ppii", "simsid")

Results = Mapping[str, Mapping[str, PyTree]]  # by stage: {"params", "stats"}, of its last step or the one chosen


class State(NamedTuple):
    """All that a stage changes, and the frozen weights that it uses; `frozen` comes from earlier stages' results
    and is not saved again."""

    params: PyTree
    opt: PyTree
    stats: PyTree
    frozen: PyTree
    step: Int[Array, ""]


class Check(NamedTuple):
    """A look at a stage's state every `every` steps and after the last, on samples that it is not trained on.

    rows(rows) -> manifest row numbers; `samples` samples of them (0: one of each) are made once and are the same at
        every look; without rows there is none.
    look(state, batch) -> (State, metrics): pure, and deterministic. A batch holds "image", "index", "case", whether a
        sample's row is "unlabeled", and "label": 0 normal, 1 abnormal of labelled rows of `val`, -1 of all other ones.
    labelled: `rows` are of `val` too.
    """

    every: int
    samples: int
    rows: Callable[[list[Row]], np.ndarray]
    look: Callable[[State, PyTree], tuple[State, dict[str, Array]]]
    labelled: bool = False


class Stage(NamedTuple):
    """One training stage.

    rows(rows, results) -> manifest row numbers that it trains on (an index table).
    steps(n) -> how many steps, for n rows.
    init(key, results, n) -> State.
    step(state, batch, key, *, steps, axis_name=None) -> (State, metrics): pure; with `axis_name` it averages
        gradients and statistics over that axis. Samples' keys come from `key` and batch["index"].
    shuffle: epochs in random order, the last incomplete batch dropped; else rows in order, round and round.
    host: arrays made once an image on the host, by name: function of the image (*size, c).
    table(rows, results) -> rows of a CSV file STAGE.csv in the run folder that a person can read, or None.
    weights: what `model.weights` is to this stage: "instead" of training it, the "start" of it, or "" nothing.
    positions: the position codes of its network, which those of a file must equal.
    printed: values of its metrics that the paper prints, METRIC -> {epoch, counted from 1: value}.
    check: a look at how training goes; selection: one that decides which step's weights are kept.
    result(state) -> {"params", "stats"} that later stages and the score read.
    parts: how many the step takes its batch in (`accumulate`).
    phases: values that the step receives in turn as its argument `phase`, known while it is traced: step k, counted
        from 0, receives phases[k % len(phases)]. Equal ones share a program, and all have the same metrics. With one,
        None, the step has no such argument.
    """

    name: str
    batch: int
    rows: Callable[[list[Row], Results], np.ndarray]
    steps: Callable[[int], int]
    init: Callable[..., State]
    step: Callable[..., tuple[State, dict[str, Array]]]
    shuffle: bool = True
    host: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {}
    table: Callable[[list[Row], Results], list[dict[str, Any]]] | None = None
    weights: str = ""
    positions: Callable[[tuple[int, ...], int], np.ndarray] = sincos_positions
    check: Check | None = None
    printed: Mapping[str, Mapping[int, float]] = {}
    selection: Check | None = None
    result: Callable[[State], dict[str, PyTree]] = lambda state: {"params": state.params, "stats": state.stats}
    parts: int = 1
    phases: tuple[Any, ...] = (None,)


class Sweep(NamedTuple):
    """How a system scores whole volumes: windows x repetitions as one stream (`jmae.windows.average`).

    score(results, image (b, *window, c), keys (b,)) -> (values (b, *window, k), weights (b, *window, 1)): what is
        averaged over all windows that cover a voxel.
    fuse(averages (*size, k), inside (*size)) -> {"maps": {NAME: (*size)}} and, where there is one, "reconstruction":
        (*size, c) and "confidence": (*size); `inside` is False for what only fills up the array.
    `weighted` and `released` as `average` has them.
    """

    window: tuple[int, ...]  # voxels
    stride: tuple[int, ...]  # voxels
    repeats: int
    score: Callable[..., tuple[Array, Array]]
    fuse: Callable[..., dict[str, Any]]
    weighted: bool = False
    released: bool = False


class System(NamedTuple):
    """Stages in order, and the scores they serve.

    score(results, batch, key, *, chunk=None) -> {"maps": {NAME: (b, *size)}, "scores": {NAME: (b,)}} and, where there
    is one, "reconstruction": (b, *size, c) in the images' own range, "confidence": (b, *size), the deviation of the
    primary map over the system's samples, and "pictures": {NAME: (b, *size, c) as the images, or (b, h, w) in another
    unit}, for the report alone. Higher is more abnormal; `chunk` masks (or samples) at a time. `masks` is how
    many one pass has. `uses` names the stages whose results `score` reads, `primary` the score that stands for the
    system, and `map` the map that does, where the primary score has none. A system of volumes has a `sweep` instead of
    `score` and `masks`. `choice` names the stage whose weights `select=aucp` chooses, where it is not the last of
    `uses`: `rest()` are stand-ins for the results of the stages behind it, with which `score` ranks cases alike.
    """

    name: str
    stages: tuple[Stage, ...]
    score: Callable[..., dict[str, dict[str, Array]]] | None
    uses: tuple[str, ...]
    primary: str
    masks: int = 1
    sweep: Sweep | None = None
    map: str = ""
    choice: str = ""
    averaged: bool = True  # whether the primary score is the mean of what each mask or sample alone would give
    chosen_on_val: bool = False  # whether labelled rows of `val` chose what `primary` reads
    rest: Callable[[], dict[str, Any]] = dict


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


def averaged(tree: PyTree, axis_name: str | None) -> PyTree:
    """Mean over the devices of `axis_name`; the tree itself without one."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def stage_keys(config: ConfigDict, number: int) -> Any:
    """The key of a stage; with replicates one a seed."""
    keys = [jax.random.fold_in(jax.random.key(config.seed + r), number) for r in range(config.replicates)]
    return keys[0] if config.replicates == 1 else jnp.stack(keys)


def split_replicates(results: Results, n: int) -> list[Results]:
    """Results of each replicate."""
    return [results] if n == 1 else [jax.tree.map(itemgetter(r), results) for r in range(n)]
