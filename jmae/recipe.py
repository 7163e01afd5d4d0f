"""Recipes: the declarations of their keys, `--config NAME[:PRESET]` with its overrides, and their JSON form.

A key is declared once, as a `Key` with its default, bounds, unit and one sentence. The keys of all recipes are declared
here, the further keys of the library's systems in `jmae.keys`. A system of your own has them as `KEYS` in its module. A
recipe file holds presets, the changes of those defaults.
"""

import functools
import importlib
import json
import math
import operator
import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jmae.errors import InputError, nearest
from jmae.sealed import unseal

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "configs"
"""The folder of the library's recipes: in a wheel inside the package, in a clone configs/."""

RIVALS = ("autoencoder",)
"""Methods that the five systems are compared with, trained in the same loop."""

SYSTEMS = ("amae", "maemi", "memmc_mae", "ppii", "simsid", *RIVALS)
"""The systems of the library, each a module of `jmae.systems`; the rivals come last."""

# Keys that some recipes no longer have; in those recipes they had no effect on weights or scores.
RETIRED = {"data.normal_crops_only", "evaluation.chunk", "evaluation.filter", "tensorboard"}
AXES = -1  # length of a tuple with one number for each axis of `data.size`


@dataclass(frozen=True)
class Key:
    """The declaration of a recipe key.

    Attributes:
        default: value where no preset sets another one; it has the key's type.
        holds: value whose type the values of a tuple have where `default` is empty.
        doc: one sentence.
        unit: unit of the value.
        least, above, most, below: bounds of a number, or of each number of a tuple; None: no bound.
        choices: the values allowed; (): any.
        length: number of values of a tuple; `AXES`: one for each axis of `data.size`; None: any.
        empty: whether a tuple of a given length may also be empty.
        single: whether one number may stand for a tuple, or the other way round.
        before: value of recipes that were saved before the key was declared; None: the default.
    """

    default: Any
    doc: str
    unit: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    length: int | None = None
    empty: bool = False
    single: bool = False
    before: Any = None
    holds: Any = 1.0

    @property
    def like(self) -> Any:
        """A value of the key's type; a tuple has one or more values."""
        return (self.holds,) if self.default == () else self.default

    def bounds(self) -> str:
        """The bounds in words, such as "from 0 to below 1"; empty without any."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        low = (
            f"from {self.least:g}"
            if self.least is not None
            else f"above {self.above:g}"
            if self.above is not None
            else ""
        )
        high = (
            f"to {self.most:g}" if self.most is not None else f"below {self.below:g}" if self.below is not None else ""
        )
        if self.least is not None and self.below is not None:
            high = f"to below {self.below:g}"
        if low and not high:
            return f"{self.least:g} or more" if self.least is not None else low
        return " ".join(part for part in (low, high) if part)

    def wrong(self, value: Any, axes: int) -> str:
        """Why a value is not allowed, in words; empty where it is. `axes` is the number of axes of `data.size`."""
        several = isinstance(self.default, tuple)
        parts = tuple(value) if isinstance(value, tuple | list) else (value,)
        if isinstance(value, tuple | list) != several and not self.single:
            return "a list of values" if several else "one value"
        length = axes if self.length == AXES else self.length
        if several and length is not None and isinstance(value, tuple | list):
            if len(parts) != length and not (self.empty and not parts):
                return f"{length} values, one an axis" if self.length == AXES else f"{length} values"
        like = self.like[0] if several else self.default
        for part in parts:
            if not _same_type(part, like):
                return f"{_TYPES[type(like)]}, as {like!r} is"
            if self.choices and part not in self.choices:
                return self.bounds()
            if isinstance(part, int | float) and not isinstance(part, bool):
                low = (self.least is not None and part < self.least) or (self.above is not None and part <= self.above)
                high = (self.most is not None and part > self.most) or (self.below is not None and part >= self.below)
                if low or high or not math.isfinite(part):
                    return self.bounds() or "a finite number"
        return ""


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _same_type(value: Any, like: Any) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    return isinstance(value, int | float) if isinstance(like, float) else isinstance(value, type(like))


SHARED = {
    "seed": Key(0, "First random seed.", least=0),
    "replicates": Key(1, "Seeds seed, seed + 1, ... that one program trains side by side.", least=1),
    "budget": Key(1.0, "Factor of the steps and epochs of every stage.", above=0),
    "fsdp": Key(1, "Devices that share one copy of the parameters and of the optimiser's state.", least=1),
    "accumulate": Key(1, "Parts of a batch, one after the other, where a whole batch does not fit in memory.", least=1),
    "steps_per_dispatch": Key(
        0, "Steps that one program runs. 0 takes several where batches are small, and one on a CPU.", least=0
    ),
    "skip_nonfinite": Key(
        0,
        "Steps of a stage, at most, whose update is dropped because its loss or gradient is not finite; the next one "
        "stops the run. The presets phantom, small and smoke have 3.",
        "steps",
        least=0,
    ),
    "checkpoint_every": Key(500, "Steps between two checkpoints.", "steps", least=1),
    "log_every": Key(10, "Steps between two lines of metrics.jsonl.", "steps", least=1),
    "loggers": Key(
        (),
        "Loggers that get the lines of metrics.jsonl, too, in the run folder; each needs its package. The variables "
        "WANDB_MODE and MLFLOW_TRACKING_URI send them elsewhere.",
        choices=("tensorboard", "wandb", "mlflow"),
        holds="",
    ),
    "profile": Key("", "Steps FROM:TO of each stage to profile, into the run folder's profile/; empty: none."),
    "select": Key(
        "last",
        'Which weights are scored: "last", or "aucp", the weights with the highest AUROC of unlabelled rows against '
        "known normals. A system may have further rules.",
    ),
    "select_every": Key(250, "Steps between two looks of select=aucp.", "steps", least=1),
    "select_samples": Key(200, "Rows of either kind for select=aucp, at most.", least=1, most=10_000),
    "data.manifest": Key("", "Manifest file of the data, CSV."),
    "data.phantom": Key(
        "", "Built-in phantoms in place of a manifest: chest or breast.", choices=("", "chest", "breast")
    ),
    "data.calibration": Key(
        0.0, "Share of the training patients that become normals of val, for p-values.", least=0, below=1
    ),
    "data.mask_threshold": Key(
        0.5, "Probability above which a mask with fractional values marks a voxel.", least=0, below=1, before=0.0
    ),
    "data.allow_leaks": Key(
        False, "Whether patients and images in two splits are named in the log and the report, not refused."
    ),
    "data.size": Key(
        (224, 224), "Size of an image, or of a crop of a volume, as the network sees it.", "pixels", least=1
    ),
    "data.channels": Key(1, "Channels of an image as it is read.", least=1),
    "data.nonfinite": Key(
        "refuse",
        'Images with NaN or Inf: "refuse" them, or take such values as "zero" (in an image: its lowest value). Maps are'
        " NaN there, and no metric counts them.",
        choices=("refuse", "zero"),
    ),
    "data.window": Key(
        (), "Stored values that become 0 and 1; all others are clipped. CT in HU: -1024,3071.", length=2, empty=True
    ),
    "data.equalise": Key(False, "Whether each image gets an even histogram of 256 levels."),
    "data.equalise_exact": Key(False, "Ours: whether that histogram has a level for each value in place of 256."),
    "evaluation.batch": Key(16, "Images or windows that are scored at a time; fewer where memory is short.", least=1),
    "evaluation.froc": Key(
        0.0, "False positives an image at which the sensitivity for lesions is reported; 0: not at all.", least=0
    ),
    "evaluation.froc_rule": Key(
        "centroid",
        'When a component of a map hits a lesion: "peak", its highest pixel lies in the lesion; "centroid", its '
        "centroid lies in the lesion's box.",
        choices=("centroid", "peak"),
    ),
    "evaluation.froc_least": Key(
        5,
        "Pixels of the smallest component that counts, on the grid that is scored; with froc_rule=centroid, on the "
        "file's grid.",
        "pixels",
        least=1,
    ),
    "evaluation.froc_overlap": Key(
        0.0,
        "Intersection over union at which a component hits a lesion, too; 0: it never does.",
        least=0,
        most=1,
    ),
    "evaluation.iou": Key(
        0.0,
        "Percentile of the pixels of val's normals at which lesions are outlined for the IoU; 0: no IoU.",
        "%",
        least=0,
        most=100,
    ),
    "evaluation.decision": Key("youden", "Rule of the decision threshold on val.", choices=("youden", "accuracy")),
    "evaluation.subsets": Key(
        (), "Manifest columns; rows whose value is neither 0 nor empty are scored apart, too.", holds=""
    ),
    "evaluation.rivals": Key(
        ("components", "blur", "nearest", "untrained", "raw"),
        'Rivals that are scored beside a network. For hidden patches: "components", "blur", "nearest". For the score'
        ' of tokens: an "untrained" encoder, "raw" patches. (): none.',
        choices=("components", "blur", "nearest", "untrained", "raw"),
        before=(),
    ),
    "evaluation.maps": Key(True, "Whether the maps of the split are written."),
    "evaluation.pictures": Key(
        200, "Cases without a label that have pictures in the report; the highest scores first.", least=1
    ),
    "evaluation.draws": Key(2000, "Draws of patients for the confidence intervals.", least=1),
    "evaluation.alarm_rate": Key(0.05, "Rate of false alarms at the threshold in calibration.json.", above=0, below=1),
    "evaluation.mask_least": Key(
        0.0,
        "Smallest component of a mask of lesions; pixels where a file tells no spacing. Masks have the alarm rate.",
        "mm2 or mm3",
        least=0,
    ),
    "evaluation.convergence": Key(
        0, "Repetitions of a score at 1, 2, 4, ... masks or samples, to tell how many are enough; 0: none.", least=0
    ),
}
"""Keys of all recipes."""

MASKS_OF = {
    "evaluation.masks_of": Key(
        "run",
        'What random masks or samples of a test case depend on: "run", the seed and their number alone: they are '
        'the same for all cases and hide every token as often; "case", the case\'s id too.',
        choices=("run", "case"),
        before="case",
    ),
}
"""Key of systems whose score has random masks or samples."""

IMAGES = {
    "evaluation.chunk": Key(0, "Masks or samples at a time; 0: as many as the memory holds.", least=0),
}
"""Further keys of recipes whose `data.size` has two axes."""

VOLUMES = {
    "data.axes": Key("PLS", 'Directions of the working axes, as "PLS"; "" keeps the file\'s own.'),
    "data.spacing": Key((), "Working voxel size; () keeps the file's own.", "mm", above=0, length=AXES, empty=True),
    "data.join": Key(
        "same",
        'How sequences on different grids are joined: "resample", or "same" refuses them.',
        choices=("resample", "same"),
    ),
    "data.crop": Key(
        "none",
        'Part of a volume that is used: "region", the box around the region, or "none", all of it.',
        choices=("region", "none"),
    ),
    "data.crop_least": Key((), "Least edges of the box around the region.", "mm", above=0, length=AXES, empty=True),
    "data.crop_most": Key((), "Greatest edges of the box around the region.", "mm", above=0, length=AXES, empty=True),
    "data.crop_margin": Key(
        0.0, "Margin around a lesion that sticks out of that box, in training volumes.", "mm", least=0
    ),
    "data.widen_test_crops": Key(
        False, "Whether test volumes are widened for lesions, too, as published: the score then depends on the label."
    ),
    "data.region": Key(
        "nonzero", '"nonzero": a row without a region counts its voxels that are not 0.', choices=("", "nonzero")
    ),
    "data.normalise": Key(
        "region", 'Voxels whose moments standardise a volume: "crop" or "region".', choices=("crop", "region")
    ),
    "data.mean": Key(0.5, "Mean of a standardised volume."),
    "data.std": Key(0.25, "Deviation of a standardised volume.", above=0),
    "data.normal_crops_only": Key(
        True, "Whether abnormal training rows with a mask are used, by crops that touch no lesion, instead of refused."
    ),
    "data.least_region": Key(0.5, "Least share of a training crop that lies in the region.", least=0, most=1),
    "data.crops_on": Key(
        "auto",
        'Where crops are cut: "device", "host", or "auto", on the device where the set fits there.',
        choices=("auto", "device", "host"),
    ),
    "evaluation.stride": Key((16, 16, 4), "Distance between windows.", "voxels", least=1, length=AXES),
    "evaluation.top": Key(
        0.01, "Share of the region's voxels, the highest of the map, whose mean is a case's score.", above=0, most=1
    ),
    "evaluation.reconstruction": Key(False, "Whether reconstructions are written."),
}
"""Further keys of recipes whose `data.size` has three axes."""


def module_of(system: str) -> ModuleType:
    """The module that a recipe's `system` names: one of the library, or any module that Python finds by that name.

    `denoising` is denoising.py in the current folder or in a folder of PYTHONPATH; dots go into packages.

    Raises InputError where there is no such module, or it has no `build`, or outside the library no `KEYS`.
    """
    unknown = f"system {system!r} is unknown: one of {', '.join(SYSTEMS)}, or a module on Python's path"
    if not all(part.isidentifier() for part in system.split(".")):
        raise InputError(unknown)
    name = f"jmae.systems.{system}" if system in SYSTEMS else system
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        raise InputError(
            unknown if f"{name}.".startswith(f"{missing}.") else f"system {system!r} imports {missing}: install that"
        ) from error
    parts = ("build",) if system in SYSTEMS else ("KEYS", "build")
    if lacking := [part for part in parts if not hasattr(module, part)]:
        raise InputError(f"system {system!r}: {module.__name__} has no {lacking[0]}: see the contract in jmae.system")
    return module


def declarations(system: str, *, volumes: bool) -> dict[str, Key]:
    """The keys of a system's recipes for images or for volumes.

    A key that the system declares anew, such as one with another default, replaces the shared one. The system's module
    has `KEYS` and, if needed, `IMAGE_KEYS` or `VOLUME_KEYS`. A system of the library has them in `jmae.keys`, which
    imports no JAX.
    """
    module = importlib.import_module(f"jmae.keys.{system}") if system in SYSTEMS else module_of(system)
    further = getattr(module, "VOLUME_KEYS" if volumes else "IMAGE_KEYS", {})
    return {**SHARED, **(VOLUMES if volumes else IMAGES), **module.KEYS, **further}


def preset(system: str, presets: Mapping[str, Mapping[str, Any]], name: str) -> ConfigDict:
    """The recipe of a preset: the declared defaults with its changes {key: value}.

    Raises ValueError for an unknown preset, or a change of a key that is not declared.
    """
    if name not in presets:
        near = nearest(name, list(presets))
        raise ValueError(f"preset {name!r} is unknown: did you mean {near}? One of {', '.join(presets)}")
    changes = presets[name]
    size = changes.get("data.size", declarations(system, volumes=False)["data.size"].default)
    declared = declarations(system, volumes=len(size) == 3)
    if unknown := [key for key in changes if key not in declared]:
        raise ValueError(f"preset {name}: {unknown[0]} is no key of {system}: {nearest(unknown[0], list(declared))}?")
    config = ConfigDict({"system": system})
    ours = {"skip_nonfinite": 3} if name.startswith(("phantom", "small", "smoke")) else {}
    for key, value in ({key: one.default for key, one in declared.items()} | ours | dict(changes)).items():
        *sections, last = key.split(".")
        place = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[last] = value
    return config


def check(config: ConfigDict) -> None:
    """Checks a recipe against the declarations of its keys.

    Raises InputError for an unknown key (naming the nearest), a missing one, or a value out of its bounds.
    """
    values = dict(keys_of(config))
    del values["system"]
    if not isinstance(values.get("data.size"), tuple):
        raise InputError(f"the recipe lacks data.size: {SHARED['data.size'].doc}")
    declared = declarations(config.system, volumes=is_volume(config))
    if set(values) != set(declared) and set(values) == set(declarations(config.system, volumes=not is_volume(config))):
        raise InputError(f"data.size has {len(config.data.size)} axes: take a preset whose data.size has as many")
    if unknown := [key for key in values if key not in declared]:
        raise InputError(f"{unknown[0]} is no key of this recipe: did you mean {nearest(unknown[0], list(declared))}?")
    if missing := [key for key in declared if key not in values]:
        raise InputError(f"the recipe lacks {missing[0]}: {declared[missing[0]].doc}")
    for key, one in declared.items():
        if problem := one.wrong(values[key], len(config.data.size)):
            raise InputError(f"{key} is {values[key]!r}: {problem}")


def keys_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every ("a.b.c", value) of a recipe."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def arguments(argv: Sequence[str], usage: str, known: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """{NAME: VALUE} of a command line of `--NAME=VALUE` and `--NAME VALUE`. The value of a flag of `optional` may be
    missing, and is then "true"; so is that of `--config.KEY`. `--help` prints `usage` and exits 0.

    Raises InputError for a flag that is neither `known` nor an override, naming the nearest, and for a word that is no
    flag.
    """
    if "--help" in argv or "-h" in argv:
        print(usage)
        raise SystemExit(0)
    out, words, known = {}, list(argv), [*known, *optional]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no flag: write --NAME=VALUE; flags: {', '.join(f'--{k}' for k in known)}")
        name, equals, value = word.removeprefix("--").partition("=")
        override = name.startswith("config.") and "config" in known
        if not override and name not in known:
            raise InputError(f"--{name} is unknown: did you mean --{nearest(name, known)}?")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals and (override or name in optional):
            value = "true"
        elif not equals:
            raise InputError(f"--{name} has no value: write --{name}=VALUE")
        out[name] = value
    return out


def command(
    argv: Sequence[str], usage: str | None, known: Sequence[str], optional: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """(names, {FLAG: VALUE}) of a command line whose words may have any order. A flag of `optional` has no value,
    or "true" or "false", or one behind "=".

    Raises InputError for a flag that is neither `known` nor `optional` (`arguments`).
    """
    names, flags, words = list[str](), list[str](), list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.append(word)
            continue
        alone = "=" in word or word in ("--help", "-h")
        if word.removeprefix("--") in optional:
            alone = words[:1] not in (["true"], ["false"])
        flags += [word] if alone else [word, *words[:1]]
        words = words if alone else words[1:]
    return names, arguments(flags, usage or "", known, optional)


def values_of(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """(the values of a flag that may stand several times, the other words of a command line)."""
    values, rest, words = list[str](), list[str](), iter(argv)
    for word in words:
        if word == f"--{name}":
            values += islice(words, 1)
        elif word.startswith(f"--{name}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return values, rest


def is_volume(config: ConfigDict) -> bool:
    """Whether a recipe is of volumes: `data.size` has three axes."""
    return len(config.data.size) == 3


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names, flags) of a command line that takes both: a word after "--NAME" without "=" is that flag's value."""
    value = lambda i: i > 0 and argv[i - 1].startswith("--") and "=" not in argv[i - 1]
    flag = [word.startswith("-") or value(i) for i, word in enumerate(argv)]
    names = [word for word, is_flag in zip(argv, flag, strict=True) if not is_flag]
    return names, [word for word, is_flag in zip(argv, flag, strict=True) if is_flag]


def parse(
    argv: Sequence[str], usage: str, known: Sequence[str] = (), optional: Sequence[str] = ()
) -> tuple[ConfigDict, dict[str, str]]:
    """The recipe that `--config` names with its overrides, and the other flags, `known` and `optional` ones as of
    `arguments`. Without `--config` the recipe is that of the run folder `--workdir`.

    Raises InputError for an unknown flag or recipe key (naming the nearest), a value of another type, a missing file or
    preset.
    """
    given = arguments(argv, usage, ["config", *known], optional)
    if "config" in given:
        config = load(given.pop("config"))
    elif "workdir" in given and (Path(given["workdir"]) / "config.json").exists():
        config = read(Path(given["workdir"]))
    else:
        raise InputError(f"no recipe: write --config=NAME[:PRESET]; NAME: {', '.join(SYSTEMS)}, or a FILE.py")
    override(config, given)
    return config, given


def override(config: ConfigDict, given: dict[str, str], section: str = "") -> None:
    """Moves the overrides from the flags `given` into a recipe. Where `section` is named, only its keys are known."""
    declared = declarations(config.system, volumes=is_volume(config))
    defaults = {key: value for key, value in keys_of(config) if key.startswith(section)}
    for flag in [name for name in given if name.startswith("config.")]:
        key, text = flag.removeprefix("config."), given.pop(flag)
        if key not in defaults:
            near = " or ".join(f"--config.{one}" for one in similar_keys(key, list(defaults)))
            remedy = f"did you mean {near}?" if near else "no key is like it; jmae train --show lists all"
            if any(one.startswith(f"{key}.") for one in defaults):
                remedy = f"{key} is a section; jmae train --show {key} lists its keys"
            raise InputError(f"--{flag} is unknown: {remedy}")
        like = declared[key].like if defaults[key] == () and key in declared else defaults[key]
        config.update_from_flattened_dict({key: typed(flag, text, like)})


def similar_keys(key: str, known: Sequence[str]) -> list[str]:
    """Keys that an unknown one may stand for, at most three: first those with its last part."""
    last = lambda one: one.rpartition(".")[2]
    of = lambda parts: [one for one in known if last(one) in parts]
    if same := of([last(key)]):
        return get_close_matches(key, same, n=1, cutoff=0) if "." in key else same[:3]
    near = get_close_matches(last(key), [last(one) for one in known], n=1)
    return of(near)[:3] if near and "." not in key else get_close_matches(key, known, n=1) or of(near)[:3]


def explained(config: ConfigDict, name: str = "") -> str:
    """What the keys of a recipe are: value, type, default, bounds and sentence of each.

    Args:
      config: the recipe.
      name: a key ("data.size") or a section ("data"); "" for all.

    Raises:
      InputError: there is no such key or section.
    """
    declared, values = declarations(config.system, volumes=is_volume(config)), dict(keys_of(config))
    chosen = [key for key in declared if not name or key == name or key.startswith(f"{name}.")]
    if not chosen:
        sections = {key.rpartition(".")[0] for key in declared} - {""}
        raise InputError(f"--show={name}: no key of {config.system}: {nearest(name, [*declared, *sections])}?")
    lines = []
    for key in chosen:
        one = declared[key]
        several = isinstance(one.default, tuple)
        kind = _TYPES[type(one.like[0] if several else one.like)]
        length = ", one an axis" if one.length == AXES else "" if one.length is None else f", {one.length} values"
        facts = [f"a list{length}; each {kind}" if several else kind, one.bounds(), one.unit]
        facts += [f"default {one.default!r}"] if values[key] != one.default else []
        lines += [f"{key} = {values[key]!r}  ({'; '.join(filter(None, facts))})", f"    {one.doc}"]
    return "\n".join(lines)


def load(recipe: str) -> ConfigDict:
    """`get_config(PRESET)` of `find(recipe)`, the recipe's default without a preset."""
    file, preset = find(recipe)
    name = file.stem if file.parent == RECIPES else file
    try:
        names = runpy.run_path(str(file))
        if "get_config" not in names:
            raise ValueError("has no get_config(preset)")
        return names["get_config"](*[preset] if preset else [])
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: {what}") from error


def find(recipe: str) -> tuple[Path, str]:
    """(file, preset or "") of NAME[:PRESET] or FILE[:PRESET]; NAME is a recipe of the library.

    Raises InputError where there is no such file.
    """
    whole = ":" not in recipe or Path(recipe).is_file()
    name, _, preset = (recipe, "", "") if whole else recipe.rpartition(":")
    file = Path(name)
    if (built_in := RECIPES / f"{file}.py").is_file() and not file.is_file():
        return built_in, preset
    if not file.is_file() or file.suffix != ".py":
        if not file.suffix and file.name == str(file) and not file.is_dir():
            near, known = nearest(file.name, SYSTEMS), ", ".join(SYSTEMS)
            raise InputError(f"{file}: no recipe: did you mean {near}? The library has {known}; others are FILE.py")
        there = ", ".join(sorted(str(p) for p in (file if file.is_dir() else file.parent).glob("*.py")))
        raise InputError(f"{file}: no recipe: there {f'are {there}' if there else 'is none'}")
    return file, preset


@functools.cache
def suggested(kind: str) -> tuple[str, str]:
    """(Name, reason) of the recipe that is suggested for "images", "unlabelled images" or "volumes": the recipe files
    tell. Its preset is `small`."""
    told = {name: runpy.run_path(str(RECIPES / f"{name}.py")).get("SUGGESTED", {}) for name in SYSTEMS}
    return next((name, reasons[kind]) for name, reasons in told.items() if kind in reasons)


def typed(flag: str, text: str, default: Any) -> Any:
    """The value of the type of `default` that `text` means; a tuple is written 64,64 or (64, 64)."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        parts = [part.strip(" '\"") for part in text.strip(" ()[]").split(",")]
        like = next((1.0 for d in default if isinstance(d, float)), default[0])
        return tuple(typed(flag, part, like) for part in parts if part)
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        value = words[text.lower()] if isinstance(default, bool) else type(default)(text)
        if not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a finite number"}[type(default)]
        raise InputError(f"--{flag}: {text!r} is not {kind}, as {default} is") from None
    return value


def to_json(config: ConfigDict) -> str:
    """A recipe as JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str) -> ConfigDict:
    """The recipe back from its JSON: data only, nothing is executed; lists become tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def brought_up(config: ConfigDict) -> ConfigDict:
    """A saved recipe brought up to date. Newer keys are added, at values that change nothing (`Key.before`), and
    `RETIRED` keys are removed."""
    for key in RETIRED & {key for key, _ in keys_of(config)}:
        if key not in declarations(config.system, volumes=is_volume(config)):
            *sections, last = key.split(".")
            del functools.reduce(operator.getitem, sections, config)[last]
    saved = {key for key, _ in keys_of(config)}
    with config.unlocked():
        for key, one in declarations(config.system, volumes=is_volume(config)).items():
            if key not in saved:
                *sections, last = key.split(".")
                functools.reduce(operator.getitem, sections, config)[last] = (
                    one.default if one.before is None else one.before
                )
    return config


def saved_text(workdir: Path) -> bytes:
    """The text of config.json in a run folder; raises InputError where there is none."""
    try:
        return (workdir / "config.json").read_bytes()
    except OSError:
        inside = workdir / "run"  # of quickstart
        remedy = f"name {inside}" if (inside / "config.json").is_file() else "name the folder of a run"
        raise InputError(f"{workdir}: no config.json: {remedy}, as jmae train writes it") from None


def read(workdir: Path) -> ConfigDict:
    """The recipe of a run folder; raises InputError where there is none."""
    file = workdir / "config.json"
    try:
        content = unseal(saved_text(workdir), file, None)  # `run_recipe.refuse_other_recipe` compares older ones, too
        if "system" not in content:
            raise ValueError("it names no system")
        return brought_up(from_json(json.dumps(content)))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        why = str(error.args[0] if error.args else error).strip("\"'").partition("\\n")[0].partition("\n")[0]
        why = f"it lacks {why}" if isinstance(error, KeyError) else why
        remedy = "restore it, or run the training command again, which writes it"
        raise InputError(f"{file}: is no recipe of a run ({why}): {remedy}") from None
