"""Recipes: `--config FILE[:PRESET]` and its overrides, checked, and their JSON form in the run folder."""

import difflib
import json
import math
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jmae.errors import InputError


def keys_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every ("a.b.c", value) of a recipe."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def arguments(argv: Sequence[str], usage: str, known: Sequence[str]) -> dict[str, str]:
    """{NAME: VALUE} of a command line of `--NAME=VALUE` and `--NAME VALUE`; `--config.KEY` takes "=" alone, and without
    a value is true. `--help` prints `usage` and exits 0.

    Raises InputError for a flag that is neither `known` nor an override, naming the nearest, and for what is no flag.
    """
    if "--help" in argv or "-h" in argv:
        print(usage)
        raise SystemExit(0)
    out, rest = {}, iter(argv)
    for word in rest:
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no flag: write --NAME=VALUE; flags: {', '.join(f'--{k}' for k in known)}")
        name, equals, value = word.removeprefix("--").partition("=")
        if name.startswith("config.") and "config" in known:
            value = value if equals else "true"
        elif name not in known:
            raise InputError(f"--{name} is unknown: did you mean --{nearest(name, known)}?")
        elif not equals and (value := next(rest, "--")).startswith("--"):
            raise InputError(f"--{name} has no value: write --{name}=VALUE")
        out[name] = value
    return out


def is_volume(config: ConfigDict) -> bool:
    """Whether a recipe is of volumes: `data.size` has three axes."""
    return len(config.data.size) == 3


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names, flags) of a command line that takes both: a word after "--NAME" without "=" is that flag's value."""
    value = lambda i: i > 0 and argv[i - 1].startswith("--") and "=" not in argv[i - 1]
    flag = [word.startswith("-") or value(i) for i, word in enumerate(argv)]
    names = [word for word, is_flag in zip(argv, flag, strict=True) if not is_flag]
    return names, [word for word, is_flag in zip(argv, flag, strict=True) if is_flag]


def nearest(name: str, known: Sequence[str]) -> str:
    """The most similar of the known names."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def parse(argv: Sequence[str], usage: str, known: Sequence[str] = ()) -> tuple[ConfigDict, dict[str, str]]:
    """The recipe that `--config` names with its overrides, and the other flags, of which `known` are allowed.

    Raises InputError for an unknown flag or recipe key (naming the nearest), a value of another type, a missing file or
    preset.
    """
    given = arguments(argv, usage, ["config", *known])
    if "config" not in given:
        raise InputError("no recipe: write --config=configs/NAME.py[:PRESET]")
    config = load(given.pop("config"))
    override(config, given)
    return config, given


def override(config: ConfigDict, given: dict[str, str], section: str = "") -> None:
    """Takes the overrides out of the flags `given` into a recipe, those of one `section` alone where one is named."""
    defaults = {key: value for key, value in keys_of(config) if key.startswith(section)}
    for flag in [name for name in given if name.startswith("config.")]:
        key, text = flag.removeprefix("config."), given.pop(flag)
        if key not in defaults:
            raise InputError(f"--{flag} is unknown: did you mean --config.{nearest(key, list(defaults))}?")
        config.update_from_flattened_dict({key: typed(flag, text, defaults[key])})


def load(recipe: str) -> ConfigDict:
    """`get_config(PRESET)` of FILE[:PRESET], the recipe's default without a preset."""
    name, colon, preset = recipe.rpartition(":") if not Path(recipe).is_file() else (recipe, "", "")
    file = Path(name if colon else recipe)
    if not file.is_file() or file.suffix != ".py":
        there = ", ".join(sorted(str(p) for p in (file if file.is_dir() else file.parent).glob("*.py")))
        raise InputError(f"{file}: no recipe: there {f'are {there}' if there else 'is none'}")
    try:
        names = runpy.run_path(str(file))
        if "get_config" not in names:
            raise ValueError("has no get_config(preset)")
        return names["get_config"](*[preset] if preset else [])
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: {what}") from error


def typed(flag: str, text: str, default: Any) -> Any:
    """The value that `text` means where the recipe has `default`; a tuple is written 64,64 or (64, 64). Where `default`
    is an empty one, numbers are numbers and anything else is text."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        parts = [part.strip(" '\"") for part in text.strip(" ()[]").split(",")]
        numbers = all(re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", part) for part in parts if part)
        empty = 1.0 if numbers else ""  # what an empty tuple would hold
        like = next((1.0 for d in default if isinstance(d, float)), default[0] if default else empty)
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


def read(workdir: Path) -> ConfigDict:
    """The recipe of a run folder; raises InputError where there is none."""
    file = workdir / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
        if not isinstance(json.loads(text), dict) or "system" not in json.loads(text):
            raise ValueError("it names no system")
        return from_json(text)
    except OSError:
        raise InputError(f"{workdir}: no config.json: name the folder of a run (python -m jmae.train)") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: is no recipe ({error}): restore it, or train again") from None
