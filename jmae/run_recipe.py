"""The recipe of a run folder: config.json, which must be that of the checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jmae import checkpoint, recipe
from jmae.run_folder import FREE, fixed


def saved_recipe(saved: Mapping[str, Any], config: ConfigDict) -> dict:
    """The recipe that a checkpoint holds, brought up to date: `fixed` with the keys of this version."""
    free = {key: value for key, value in recipe.keys_of(config) if f"{key}.".startswith(tuple(f"{f}." for f in FREE))}
    whole: dict[str, Any] = {}
    for key, value in (free | dict(recipe.keys_of(recipe.from_json(json.dumps(saved))))).items():
        *sections, last = key.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return fixed(recipe.brought_up(ConfigDict(whole)))


def refuse_other_recipe(config: ConfigDict, workdir: Path, what: str = "recipe", remedy: str = "") -> None:
    """Compares a recipe with the one that every step of the run folder holds. Raises InputError with the first
    differences; arguments as of `checkpoint.refuse_difference`."""
    ours, known = checkpoint.flat({"recipe": fixed(config)}), set[str]()
    for path, saved in checkpoint.configs(workdir):
        text = json.dumps(theirs := saved.get("recipe", {}))
        if text not in known and theirs:
            known.add(text)
            same = theirs.get("system") == config.system
            theirs = saved_recipe(theirs, config) if same else {"system": theirs.get("system")}
            given = ours if same else {"recipe.system": json.dumps(config.system)}
            checkpoint.refuse_difference(path, checkpoint.flat({"recipe": theirs}), given, what, remedy)


def refuse_other_config(workdir: Path) -> None:
    """Raises InputError where config.json is not the recipe of the checkpoints. It is read here without the changes of
    a command."""
    read_run(workdir)


def read_run(workdir: Path) -> ConfigDict:
    """The recipe of a run folder, which must be that of its checkpoints. Raises InputError where it is not."""
    config = recipe.read(workdir)
    remedy = "restore config.json, or run the training command again, which writes it"
    refuse_other_recipe(config, workdir, "config.json", remedy)
    return config
