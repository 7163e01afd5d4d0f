"""python -m jmae.papers [NAME]
python -m jmae.papers ROW [--root DATA] [--out papers] [--preset NAME] [--seeds N] [--config.KEY=VALUE ...]
                       [--dry-run] [--debug]

Lists the rows of the five papers' tables with their published figures, data and files; with NAME only the rows whose
names begin with it. A ROW with a flag is run: its data is prepared, and the recipe is trained once for each seed and
evaluated. Our figures are then printed beside the paper's, with their difference. A finished step is not repeated: the
same command goes on where it was interrupted. The rows SYSTEM.packs are of the packs of images, and have no published
figure.

    python -m jmae.papers amae.table2
    python -m jmae.papers amae.table2.rsna.stage2 --root DATA --out DIR
    python -m jmae.papers amae.packs.cxr_peds --root $JMAE_DATA --seeds 1

--root     The folder of the data set, or the folder that holds it under the set's name, such as DATA/rsna. For packs it
           is the folder of the packs; without --root the variable JMAE_DATA names that folder.
--out      The folder for data/SET (the manifest), for a folder of each row with a run for each seed, and results.json.
--preset   Another preset than the row's. `small` has a size that suits a CPU; its figures are not the paper's.
--seeds    Another number of seeds than the paper's.
--dry-run  prints the steps as commands, and runs none of them.
--config.KEY=VALUE  changes a key of the training, such as --config.model.weights=FILE.

Exit codes: 0 done; 2 the input or the environment is wrong; 3, 130 and 143 as of `jmae train`.
"""

import json
import os
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jmae import recipe
from jmae.errors import InputError, exit_code

HERE = Path(__file__).parent
KEPT = HERE.parent / "benchmarks" / "results" / "papers.json"
"""Our figures of rows that were run, in a clone; each entry is that of a results.json."""
SPREAD = "no spread of a published figure is known here, so a difference has the interval of ours alone"


class DataSet(NamedTuple):
    """A public data set, or a pack."""

    name: str
    title: str
    prepare: str = ""  # importer; "" a pack, whose folder has a manifest
    files: str = "manifest.csv"  # that its folder must hold
    flags: Sequence[str] = ()  # of the importer
    keys: Mapping[str, Any] = {}  # that every recipe needs for these images
    regions: bool = False  # whether every case must have a region
    figures: Mapping[str, str] = {}  # further places in metrics.json


class Row(NamedTuple):
    """A row of a table of a paper."""

    name: str
    paper: str
    method: str
    data: DataSet
    places: Mapping[str, str]  # place in metrics.json of each figure
    published: Mapping[str, float]  # by the figure's name; a figure that is missing is not known
    recipe: str = ""  # SYSTEM:PRESET; "" where jmae does not have the method
    keys: Mapping[str, Any] = {}
    small: str = ""  # the recipe at a size that a CPU bears, and its keys
    small_keys: Mapping[str, Any] = {}
    seeds: int = 0  # of the paper; 0 where it tells none
    weights: str = ""  # published weights that the paper starts from
    needs_weights: bool = False

    @property
    def table(self) -> str:
        """The name of the table."""
        return ".".join(self.name.split(".")[:2])


class Plan(NamedTuple):
    """How a row is run."""

    row: Row
    recipe: str
    seeds: int
    manifest: Path
    commands: list[list[str]]  # of `jmae`
    runs: list[Path]  # run folders, one a seed


def main(argv: list[str]) -> int:
    names, rest = recipe.split(argv)
    flags = recipe.arguments(rest, __doc__, ["root", "out", "preset", "seeds", "config"], ["dry-run"])
    if len(names) > 1 or "config" in flags:
        what = f"{names[1]}: one row at a time" if names[1:] else "--config: the row names the recipe"
        raise InputError(f"{what}: write jmae papers ROW --root DATA [--preset NAME] [--config.KEY=VALUE]")
    name, dry = names[0] if names else "", recipe.typed("dry-run", flags.get("dry-run", "false"), False)
    found = named(name)
    if not flags:
        print("\n".join(listed(found)))
        return 0
    if len(found) != 1:
        raise InputError(f"{name or 'papers'}: names {len(found)} rows: name one, such as {found[0].name}")
    plan = plan_of(found[0], flags)
    if dry:
        print("\n".join([about(plan), *(f"  {in_shell(words)}" for words in plan.commands)]))
        return 0
    return run(plan, Path(flags.get("out", "papers")))


# --- the rows ---------------------------------------------------------------------------------------------------------


@cache
def rows() -> tuple[Row, ...]:
    """All rows, in the order of papers.toml."""
    content = tomllib.loads((HERE / "papers.toml").read_text(encoding="utf-8"))
    sets = {name: DataSet(name, **fields) for name, fields in content["sets"].items()}
    return tuple(row for table in content["table"] for row in rows_of(table, sets))


def rows_of(table: Mapping[str, Any], sets: Mapping[str, DataSet]) -> Iterator[Row]:
    """The rows of one table of papers.toml, set by set."""
    for name in table["sets"]:
        for line in table["rows"]:
            if name not in line:
                continue
            values = [round(value / 100, 6) if table.get("percent") else value for value in line[name]]
            row = Row(
                name=".".join(filter(None, [table["id"], name, line["id"]])),
                paper=table["paper"],
                method=line["method"],
                data=sets[name],
                places=table["figures"] | sets[name].figures,
                published=dict(zip(table["figures"], values, strict=False)),
            )
            if "keys" in line:
                further = {**table, **line}
                further = {
                    k: further[k] for k in ("recipe", "small", "seeds", "weights", "needs_weights") if k in further
                }
                row = row._replace(keys=line["keys"], small_keys=line.get("small_keys", line["keys"]), **further)
            yield row


def named(name: str) -> list[Row]:
    """The row of a name, or all rows whose names begin with it; raises InputError where there is none."""
    found = [row for row in rows() if row.name == name] or [
        row for row in rows() if f"{row.name}.".startswith(f"{name}." if name else "")
    ]
    if not found:
        near = recipe.nearest(name, [row.name for row in rows()])
        raise InputError(f"{name}: no row of the papers: did you mean {near}? jmae papers lists all")
    return found


def figures_in_words(row: Row) -> str:
    """The published figures of a row."""
    if not row.published:
        return "figure not known"
    return ", ".join(f"{name} {row.published.get(name, 'not known')}" for name in row.places)


def listed(chosen: Sequence[Row]) -> Iterator[str]:
    """The lines of the list: each table, and its rows."""
    width, before = max(len(row.name) for row in chosen), None
    for row in chosen:
        if row.table != before:
            yield f"{'' if before is None else chr(10)}{row.paper}, {row.table}"
            before = row.table
        yield f"  {row.name:<{width}}  {figures_in_words(row)}{'' if row.recipe else ' (not a method of jmae)'}"
    yield ""
    for data in {row.data.name: row.data for row in chosen}.values():
        importer = f"jmae prepare {' '.join([data.prepare, *data.flags])}" if data.prepare else "no preparation"
        yield f"{data.name}: {data.title}; {importer}; needs {data.files}"
    yield f"\njmae papers ROW --root DATA runs a row; --dry-run shows its steps. {SPREAD[0].upper()}{SPREAD[1:]}."


# --- the steps --------------------------------------------------------------------------------------------------------


def plan_of(row: Row, flags: Mapping[str, str]) -> Plan:
    """The steps of a row by the command's flags; raises InputError where it cannot be run."""
    if not row.recipe:
        raise InputError(f"{row.name}: jmae does not have {row.method}: the row is listed for its figure alone")
    given = {flag: value for flag, value in flags.items() if flag.startswith("config.")}
    if row.needs_weights and "config.model.weights" not in given:
        raise InputError(f"{row.name}: starts from published weights: add --config.model.weights=FILE: {row.weights}")
    chosen = chosen_recipe(row, flags.get("preset", ""))
    keys = {**row.data.keys, **(row.keys if chosen == row.recipe else row.small_keys)}
    seeds = recipe.typed("seeds", flags.get("seeds", str(row.seeds or 1)), 1)
    if seeds < 1:
        raise InputError(f"--seeds={seeds}: train at least one seed")
    out = Path(flags.get("out", "papers"))
    root = flags.get("root") or (os.environ.get("JMAE_DATA", "") if not row.data.prepare else "")
    if not root and "dry-run" not in flags:
        raise InputError(f"{row.name}: name the folder of {row.data.title}: --root=DIR; it needs {row.data.files}")
    place = Path(root or "DATA")
    place = place / row.data.name if (place / row.data.name).is_dir() or not row.data.prepare else place
    folder = out / "data" / row.data.name if row.data.prepare else place
    commands, runs = [], [out / run_name(row, chosen) / f"seed-{seed}" for seed in range(seeds)]
    if row.data.prepare:
        commands.append(["prepare", row.data.prepare, f"--root={place}", f"--out={folder}", *row.data.flags])
    for seed, workdir in enumerate(runs):
        settings = {"data.manifest": folder / "manifest.csv", **keys, "replicates": 1, "seed": seed}
        words = [f"--config.{key}={text_of(value, folder)}" for key, value in settings.items()]
        words += [f"--{flag}={value}" for flag, value in given.items()]
        commands.append(["train", f"--config={chosen}", *words, f"--workdir={workdir}"])
    for words in commands[-seeds:]:
        recipe.check(recipe.parse(words[1:], "", ["workdir"])[0])
    return Plan(row, chosen, seeds, folder / "manifest.csv", commands, runs)


def chosen_recipe(row: Row, preset: str) -> str:
    """The recipe of a row with the preset that --preset names; raises InputError for a preset that is not there."""
    if preset in ("", row.recipe.rpartition(":")[2]):
        return row.recipe
    chosen = row.small if preset == "small" else f"{row.recipe.partition(':')[0]}:{preset}"
    recipe.load(chosen)
    return chosen


def run_name(row: Row, chosen: str) -> str:
    """The folder of a row's runs. Rows with the same training share one folder."""
    whole = chosen == row.recipe
    what = lambda one: (one.recipe, one.keys) if whole else (one.small, one.small_keys)
    run = lambda one: (one.data, one.needs_weights, *what(one))
    same = (one for one in rows() if one.recipe and run(one) == run(row))
    return next(same).name + ("" if whole else f"-{chosen.rpartition(':')[2]}")


def text_of(value: Any, folder: Path) -> str:
    """A value of papers.toml as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).replace("{data}", str(folder))


def in_shell(words: Sequence[str]) -> str:
    """A command as it is typed."""
    return f"jmae {shlex.join(words)}"


def about(plan: Plan) -> str:
    """What is run, in words."""
    row = plan.row
    told = "" if row.seeds else ", as the paper tells no number" if row.published else ""
    seeds = f"{plan.seeds} seed{'s' * (plan.seeds > 1)}"
    lines = [f"{row.name}: {row.method} on {row.data.title}; {plan.recipe}, {seeds}{told}"]
    if plan.recipe != row.recipe:
        lines.append(f"{plan.recipe} is not the paper's size ({row.recipe}): its figures cannot be the paper's")
    elif row.weights and not any("--config.model.weights=" in word for word in plan.commands[-1]):
        lines.append(
            f"the paper starts from {row.weights}; without --config.model.weights=FILE this is not the paper's run"
        )
    return "\n".join(lines)


def run(plan: Plan, out: Path) -> int:
    """Runs the steps that are not done yet, prints the figures and adds them to results.json."""
    from jmae import train  # imports JAX
    from jmae.data import prepare
    from jmae.data.manifest import parse_manifest
    from jmae.run_folder import log, write_text

    log(about(plan))
    for words in plan.commands:
        if done := already(words, plan.manifest):
            log(f"{done}: is there already")
        else:
            log(f"$ {in_shell(words)}")
            if code := {"prepare": prepare.main, "train": train.main}[words[0]](words[1:]):
                return code
        if words[0] == "prepare" and plan.row.data.regions:
            without = [row.id for row in parse_manifest(plan.manifest, crops=True)[0] if not row.region]
            if without:
                what = f"{without[0]} has no region, and the paper's figures count in regions"
                raise InputError(f"{plan.manifest}: {what}: add {plan.row.data.files}, and remove the manifest")
    evaluations = [json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in plan.runs]
    result = compared(plan, evaluations)
    print("\n".join(result_lines(plan, result)))
    file = out / "results.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    write_text(file, json.dumps(kept | {f"{plan.row.name}, {plan.recipe}": result}, indent=1))
    log(f"{file}: has the result; reports: {plan.runs[0].parent}/seed-*/evaluation/report.html")
    return 0


def already(words: Sequence[str], manifest: Path) -> Path | None:
    """The file that shows that a step is done; None where the step is not done.

    Raises InputError where a run folder has a run of another recipe.
    """
    from jmae.run_recipe import refuse_other_recipe
    from jmae.sealed import unseal

    if words[0] == "prepare":
        return manifest if manifest.is_file() else None
    config, flags = recipe.parse(words[1:], "", ["workdir"])
    workdir = Path(flags["workdir"])
    refuse_other_recipe(config, workdir)
    found, settings, report = (workdir / "evaluation" / name for name in ("metrics.json", "config.json", "report.html"))
    if not (found.is_file() and settings.is_file() and report.is_file()):  # the report is written last
        return None
    same = unseal(settings.read_bytes(), settings, None) == json.loads(recipe.to_json(config))
    return found if same else None


# --- the figures ------------------------------------------------------------------------------------------------------


def figure(evaluation: Mapping[str, Any], place: str) -> tuple[float | None, list[float] | None]:
    """(A figure of metrics.json, its interval or None). A place is its keys, joined by dots; the key "primary" stands
    for the name of the primary score."""
    *sections, last = place.split(".")
    found: Any = evaluation
    if sections[0] == "printed":  # training values: printed.STAGE.METRIC.EPOCH
        values = {f"printed.{p['stage']}.{p['metric']}.{p['epoch']}": p["ours"] for p in found.get("printed") or ()}
        return values.get(place), None
    for section in sections:
        found = (found or {}).get(evaluation.get("primary") if section == "primary" else section)
    interval = (found or {}).get(f"{last}_ci")
    return (found or {}).get(last), interval if interval and None not in interval else None


def compared(plan: Plan, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our figures, means over seeds, beside the published ones.

    `interval` is the mean of the seeds' intervals over patients, `spread` is 1.96 deviations of the seeds.
    """
    import numpy as np

    figures = {}
    for name, place in plan.row.places.items():
        values, intervals = zip(*(figure(evaluation, place) for evaluation in evaluations), strict=True)
        one: dict[str, Any] = {
            "published": plan.row.published.get(name),
            "ours": None,
            "interval": None,
            "spread": None,
        }
        if None not in values:
            one["ours"] = float(np.mean(values))
            one["spread"] = 1.96 * float(np.std(values, ddof=1)) if len(values) > 1 else None
            one["interval"] = np.mean(intervals, 0).tolist() if None not in intervals else None
        figures[name] = one
    first = evaluations[0]
    origin = {"recipe": plan.recipe, "seeds": plan.seeds, "command": [in_shell(words) for words in plan.commands]}
    counts = {name: first[name] for name in ("n_normal", "n_abnormal")}
    notes = [*first.get("notes", ()), *(["patients or images are in two splits"] if first.get("leaks") else [])]
    return origin | counts | {"figures": figures, "notes": notes}


def result_lines(plan: Plan, result: Mapping[str, Any]) -> Iterator[str]:
    """The table of a row's figures."""
    number = lambda value: "-" if value is None else f"{value:.3f}"
    yield f"{'':<26}{'ours':>8}{'95 % of patients':>20}{'of seeds':>10}{'paper':>8}{'difference':>12}{'95 %':>20}"
    for name, one in result["figures"].items():
        ours, published, interval = one["ours"], one["published"], one["interval"]
        known = None not in (ours, published)
        cells = [f"{name:<26}{number(ours):>8}", ends(interval, "{:.3f}"), f"{number(one['spread']):>10}"]
        cells += [f"{number(published) if published is not None else 'not known':>8}"[-10:]]
        cells += [f"{ours - published:+.3f}" if known else "-"]
        cells += [ends([end - published for end in interval], "{:+.3f}") if known and interval else ends(None, "")]
        yield f"{cells[0]}{cells[1]:>20}{cells[2]}{cells[3]:>10}{cells[4]:>12}{cells[5]:>20}".rstrip()
    yield f"{result['n_normal']} normal and {result['n_abnormal']} abnormal cases; of seeds: 1.96 deviations; {SPREAD}"
    yield from (f"note: {note}" for note in result["notes"])


def ends(interval: Sequence[float] | None, form: str) -> str:
    """An interval in brackets; "-" where there is none."""
    return f"[{', '.join(form.format(end) for end in interval)}]" if interval else "-"


def table(kept: Path = KEPT) -> str:
    """All rows as Markdown: a table of each table of the papers, with our figures where `kept` has them."""
    ours = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    lines: list[str] = []
    before = None
    for row in rows():
        if row.table != before:
            lines += ["", f"## {row.paper}, {row.table}", ""]
            lines += ["| row | method | data | published | ours |", "| --- | --- | --- | --- | --- |"]
            before = row.table
        results = [
            f"{key.partition(', ')[2]}, {one['seeds']} seeds: "
            + ", ".join(f"{name} {v['ours']:.3f}" for name, v in one["figures"].items() if v["ours"] is not None)
            for key, one in ours.items()
            if key.partition(", ")[0] == row.name
        ]
        told = "; ".join(results) or ("not run" if row.recipe else "not a method of jmae")
        lines.append(f"| `{row.name}` | {row.method} | {row.data.title} | {figures_in_words(row)} | {told} |")
    lines += ["", "## The data", "", "| set | data | importer | files |", "| --- | --- | --- | --- |"]
    for data in {row.data.name: row.data for row in rows()}.values():
        importer = f"`jmae prepare {' '.join([data.prepare, *data.flags])}`" if data.prepare else "none"
        files = data.files.replace("*", "\\*")
        lines.append(f"| {data.name} | {data.title} | {importer} | {files} |")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    sys.exit(exit_code(main))
