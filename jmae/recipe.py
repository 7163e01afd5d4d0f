"""Recipes: `--config FILE[:PRESET]` and its overrides, checked, and their JSON form in the run folder."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jmae.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"


def keys_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every ("a.b.c", value) of a recipe."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse(argv: list[str], usage: str, **strings: str | None) -> flags.FlagValues:
    """Flags of a command with a recipe: `--config`, its overrides, and `strings` (name -> default) as string flags.

    Raises InputError for an unknown flag or recipe key (naming the nearest), a value of another type, a missing file or
    preset. `--help` prints `usage` and exits 0.
    """
    if "--help" in argv or "-h" in argv:
        print(usage)
        raise SystemExit(0)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["jmae", *argv])
    for name, default in strings.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    recipe = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if recipe is None and "--config" in argv and argv.index("--config") + 1 < len(argv):
        recipe = argv[argv.index("--config") + 1]
    if recipe is None:
        raise InputError("no recipe: --config configs/NAME.py[:PRESET]")
    file = Path(recipe.partition(":")[0])
    if not file.is_file():
        there = ", ".join(sorted(str(p) for p in file.parent.glob("*.py")))
        raise InputError(f"{file}: no such recipe: one of {there or 'none there'}")
    try:
        rest = values(["jmae", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise InputError(unknown(error.flagname, recipe, strings)) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # Where the recipe itself raised, its message stands last, behind a traceback.
        raise InputError(" ".join(str(error).split()).rpartition("Error: ")[2]) from None
    if rest:
        raise InputError(f"{rest[0]!r} is no flag: write --config.KEY=VALUE")
    return values


def unknown(flag: str, recipe: str, strings: dict[str, str | None]) -> str:
    """The one line for an unknown flag: what it may have meant."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["jmae", f"--config={recipe}"])
    values(["jmae", f"--config={recipe}"])
    known = [f"config.{key}" for key, _ in keys_of(holder.value)] + ["config", "debug", *strings]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
    return f"--{flag} is unknown: did you mean --{near[0]}?"


def to_json(config: ConfigDict) -> str:
    """A recipe as JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1, default=list)


def from_json(text: str) -> ConfigDict:
    """The recipe back from its JSON: data only, nothing is executed; lists become tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))
