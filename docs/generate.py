"""The generated parts of the site, a hook of mkdocs.

A page has a line `<!-- generated: NAME ARGUMENT ... -->` where the function `NAME` of `PARTS` puts its text: commands
from the help texts, recipe keys from their declarations, figures from benchmarks/results. Nothing of that is typed.
README.md, CONTRIBUTING.md and CHANGELOG.md become pages, too, with their links turned.
"""

import re
import runpy
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.structure.files import File

from benchmarks import __main__ as bench
from jmae import cli, recipe
from jmae.report import charts

TOP = Path(__file__).resolve().parents[1]
WHOLE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's top folder."""
SCRIPTS = {"amae": ["accuracy", "tokens"], "maemi": ["maemi"], "memmc_mae": ["memmc"], "ppii": ["ppii", "anomalies"]}
SCRIPTS |= {"simsid": ["simsid"], "comparison": ["systems"], "trust": ["coverage", "parity"]}
SCRIPTS |= {"speed": ["cpu", "throughput", "masks", "volume", "compile", "loading", "scaling"]}
"""The benchmarks of each page of results."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `WHOLE`."""
    for page, source in WHOLE.items():
        text = (TOP / source).read_text(encoding="utf-8")
        for ours, theirs in {**WHOLE, "results/index.md": "benchmarks/results.md"}.items():
            text = text.replace(f"]({theirs})", f"]({ours})")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the generated parts of a page."""

    def part(match: re.Match) -> str:
        name, *arguments = match[1].split()
        return "\n".join(PARTS[name](*arguments))

    return re.sub(r"^<!-- generated: (.*?) -->$", part, markdown, flags=re.M)


# --- the reference ----------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Every command with its help."""
    for name, sentence in {n: s for n, (_, s) in cli.COMMANDS.items()}.items():
        yield f"## jmae {name}\n\n{sentence[0].upper()}{sentence[1:]}.\n\n```text\n{cli.usage(name)}\n```\n"
    for name, sentence in cli.OWN.items():
        yield f"## jmae {name}\n\n{sentence[0].upper()}{sentence[1:]}.\n"
    yield f"## All\n\n```text\n{cli.overview()}\n```\n"


def systems() -> Iterator[str]:
    """Which system takes which data."""
    yield f"```text\n{cli.systems()}\n```"


def presets(system: str) -> dict[str, dict[str, Any]]:
    """{preset: {key: value}} of a system's recipe file."""
    names = runpy.run_path(str(recipe.RECIPES / f"{system}.py"))["PRESETS"]
    return {name: dict(recipe.keys_of(recipe.load(f"{system}:{name}"))) for name in names}


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f"`{escape(text)}`" if text else "empty"


def keys(group: str) -> Iterator[str]:
    """The recipe keys of a group as a table: "shared", "images", "volumes", or a system with the keys that it declares."""
    common = {"shared": recipe.SHARED, "images": recipe.IMAGES, "volumes": recipe.VOLUMES}
    if group in common:
        declared, values = common[group], {f"{s}:{p}": v for s in recipe.SYSTEMS for p, v in presets(s).items()}
    else:
        module = recipe.module_of(group)
        further = (getattr(module, name, {}) for name in ("IMAGE_KEYS", "VOLUME_KEYS"))
        declared = dict(module.KEYS) | {key: one for part in further for key, one in part.items()}
        values = presets(group)
    yield "| key | default | allowed | meaning | other values |\n| --- | --- | --- | --- | --- |"
    for key, one in declared.items():
        others: dict[str, list[str]] = {}
        for where, recipe_of in values.items():
            if key in recipe_of and recipe_of[key] != one.default:
                others.setdefault(shown(recipe_of[key]), []).append(where)
        lists = "; ".join(f"{value}: {', '.join(where)}" for value, where in others.items())
        allowed = ", ".join(filter(None, [kind(one), one.bounds().replace("'", ""), one.unit]))
        cells = [f"`{key}`", shown(one.default), allowed, escape(one.doc, quote=False), lists]
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def kind(one: recipe.Key) -> str:
    """The type of a key's value in words; empty where `Key.bounds` lists the choices."""
    like = one.like[0] if isinstance(one.default, tuple) else one.default
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(like)]
    if isinstance(one.default, tuple):
        each = {None: "list of", recipe.AXES: "one an axis, each a"}.get(one.length, f"{one.length} times")
        words = f"{each} {words}"
    return "" if one.choices else words


# --- the results ------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """One AUROC of a result, with the best rival or baseline beside it; intervals may be missing."""

    case: str
    what: str  # such as "images", "pixels", "images, central 80%"
    score: str
    own: dict[str, Any]
    rival: str
    other: dict[str, Any]


def cases_of(scripts: list[str]) -> dict[str, dict[str, Any]]:
    """{name: case} of all results of some benchmarks that were run."""
    files = (bench.RESULTS / f"{script}{end}.json" for script in scripts for end in ("", "_gpu"))
    return {name: case for file in files if file.is_file() for name, case in bench.read(file).items()}


def is_figure(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("auroc"), float)


def split(entry: Any) -> dict[str, dict[str, Any]]:
    """The figures of a score: {"images": ..., "pixels": ...}, as far as they are there."""
    if is_figure(entry):  # older results have the figures of one kind alone, without its name
        return {"images" if "n_normal" in entry else "pixels": entry}
    found = {"images": entry.get("image"), "pixels": entry.get("pixel")} if isinstance(entry, dict) else {}
    return {what: value for what, value in found.items() if is_figure(value)}


def figures(name: str, case: dict[str, Any]) -> Iterator[Figure]:
    """The figures of a case: of each dictionary inside it that has a score's figures and baselines."""
    for where, part in bench.walk({k: v for k, v in case.items() if k not in bench.ABOUT}):
        baselines = part.get("baselines")
        if not isinstance(baselines, dict):
            continue
        scores = {} if split(part) else part.get("scores") or {}
        for score, entry in ({case.get("primary", ""): part} if split(part) else scores).items():
            for what, own in split(entry).items():
                rivals = {n: f[what] for n, b in baselines.items() if what in (f := split(b))}
                best = max(rivals, key=lambda n: rivals[n]["auroc"], default="")
                view = ", ".join([what, *([where.removeprefix("subsets: ")] if where else [])])
                yield Figure(name, view, score, own, best, rivals.get(best, {}))


def number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if abs(value) < 1 else f"{value:.3f}"


def interval(figure: dict[str, Any]) -> str:
    """An AUROC with its interval, where it has one; empty without a figure."""
    ends = [end for end in figure.get("auroc_ci") or () if isinstance(end, float)]
    return f"{number(figure['auroc'])}{f' [{number(ends[0])}, {number(ends[1])}]' if ends else ''}" if figure else ""


def summary(found: list[Figure], machines: list[str], cases: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of figures, the higher of both in bold."""
    head = [
        "result",
        "of",
        "score",
        "AUROC [95 %]",
        "AP",
        "best rival or baseline",
        "its AUROC [95 %]",
        "date",
        "machine",
    ]
    yield f"| {' | '.join(head)} |\n|{' --- |' * len(head)}"
    for figure in found:
        case, (ours, theirs) = cases[figure.case], (interval(figure.own), interval(figure.other))
        if figure.other:
            better = figure.own["auroc"] > figure.other["auroc"]
            ours, theirs = (f"**{ours}**", theirs) if better else (ours, f"**{theirs}**")
        ap = number(figure.own["ap"]) if isinstance(figure.own.get("ap"), float) else ""
        number_of = f"[{machines.index(bench.environment(case)) + 1}](index.md#machines)"
        link = f"[{figure.case}](#{anchor(figure.case)})"
        cells = [link, figure.what, figure.score, ours, ap, figure.rival, theirs, case.get("date", ""), number_of]
        yield f"| {' | '.join(cells)} |"
    yield ""


def anchor(name: str) -> str:
    """The anchor of a case's heading."""
    return "case-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def forest(name: str, found: list[Figure]) -> str:
    """AUROC with intervals, a row a result, each beside its best rival or baseline."""
    labels = [f"{f.case}: {f.what}{f', {f.score}' if f.score else ''}" for f in found]

    def draw(ax: Any) -> None:
        for row, figure in enumerate(found):
            for shift, one, colour, mark in (
                (0.15, figure.own, charts.NORMAL, "o"),
                (-0.15, figure.other, charts.ABNORMAL, "s"),
            ):
                if one:
                    ends = [end for end in one.get("auroc_ci") or () if isinstance(end, float)]
                    ax.plot(ends, [-row + shift] * len(ends), color=colour, lw=1.2)
                    ax.plot(one["auroc"], -row + shift, mark, ms=4.5, color=colour)
        ax.axvline(0.5, color=charts.FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.set(xlim=(0, 1), ylim=(-len(found) + 0.4, 0.6), xlabel="AUROC; dashed: chance")
        ax.set_yticks([-row for row in range(len(found))], labels, fontsize=8)
        ax.plot([], [], "o-", ms=4.5, color=charts.NORMAL, label="the system's score, 95 %")
        ax.plot([], [], "s-", ms=4.5, color=charts.ABNORMAL, label="the best rival or baseline")
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)

    alt = "AUROC of each result with its interval, beside the best rival or baseline; the table above has the numbers."
    return drawn(charts.chart(name, alt, draw, (9, 1.2 + 0.34 * len(found))))


def drawn(svg: Any) -> str:
    """A chart as a block of a page."""
    return f'\n<div class="chart">{" ".join(str(svg).split(chr(10)))}</div>\n'


def ratios(cases: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """(label, {median, least, greatest}) of every ratio of times."""
    found = []
    for name, case in cases.items():
        for where, part in bench.walk({k: v for k, v in case.items() if k not in bench.ABOUT}):
            if all(isinstance(part.get(key), float) for key in ("median", "least", "greatest")):
                found.append((f"{name}: {where}", part))
    return found


def ratio_chart(found: list[tuple[str, dict[str, float]]]) -> str:
    """The time of the other over that of jmae: median, least and greatest."""

    def draw(ax: Any) -> None:
        for row, (_, ratio) in enumerate(found):
            ax.plot([ratio["least"], ratio["greatest"]], [-row, -row], color=charts.INK, lw=1.2)
            ax.plot(ratio["median"], -row, "o", ms=4.5, color=charts.NORMAL)
        ax.axvline(1, color=charts.FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.set_xscale("log")
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if t <= max(r["greatest"] for _, r in found)]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set(ylim=(-len(found) + 0.4, 0.6), xlabel="times as fast as the other; dashed: the same")
        ax.set_yticks([-row for row in range(len(found))], [label for label, _ in found], fontsize=7)

    alt = "Ratios of times, median, least and greatest over interleaved rounds; the tables below have the numbers."
    return drawn(charts.chart("ratios", alt, draw, (9, 1 + 0.22 * len(found))))


def all_machines() -> list[str]:
    """The machines of all results, in the order in which the results name them."""
    every = cases_of([script for scripts in SCRIPTS.values() for script in scripts])
    return list(dict.fromkeys(bench.environment(case) for case in every.values() if "not run" not in case))


def results(page: str) -> Iterator[str]:
    """The results of a page: a table, charts, each case with its command, and what was not run."""
    cases, machines = cases_of(SCRIPTS[page]), all_machines()
    ran = {name: case for name, case in cases.items() if "not run" not in case}
    found = [figure for name, case in ran.items() for figure in figures(name, case)]
    if found:
        yield from summary(found, machines, ran)
        for what in ("images", "pixels"):
            if some := [f for f in found if f.what == what and f.score in ("", primary(ran[f.case], f))]:
                yield forest(f"{page}-{what}", some)
    for name, case in ran.items():
        if study := case.get("convergence"):
            yield f"\n{name}: the AUROC against the number of {study['what']}.\n" + drawn(
                charts.convergence_chart(study)
            )
    if page == "speed" and (times := ratios(ran)):
        yield ratio_chart(times)
    yield "\n## Not run\n\n" + (
        "\n".join(f"- {line}" for line in not_run(SCRIPTS[page], cases)) or "Nothing is missing."
    )
    yield "\n## Each result\n"
    for name, case in ran.items():
        facts = [f"`{case['command']}`", case.get("date", "date not kept")]
        facts.append(f"machine [{machines.index(bench.environment(case)) + 1}](index.md#machines)")
        yield f"### {name} {{ #{anchor(name)} }}\n\n{', '.join(facts)}\n"
        yield from bench.tables(case)


def primary(case: dict[str, Any], figure: Figure) -> str:
    return case.get("primary", figure.score)


def not_run(scripts: list[str], cases: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each part of some benchmarks that has no result."""
    parts = [part for part in bench.PARTS if part.script in scripts]
    ran = {bench.part_of(case["command"], parts) for case in cases.values() if "command" in case}
    lines = [f"`{part.command}`" for part in parts if part not in ran]
    lines += [f"{name}: {case['not run']}" for name, case in cases.items() if "not run" in case]
    on_gpu = [script for script in scripts if script in bench.GPU and not cases_of([f"{script}_gpu"])]
    return lines + [f"`bash benchmarks/gpu.sh {script}`: needs an NVIDIA GPU" for script in on_gpu]


def machines() -> Iterator[str]:
    """The machines of all results."""
    yield "\n".join(f"{k}. {text}" for k, text in enumerate(all_machines(), 1))


def missing() -> Iterator[str]:
    """What was not run, page by page."""
    for page, scripts in SCRIPTS.items():
        if lines := not_run(scripts, cases_of(scripts)):
            yield f"- [{page}]({page}.md#not-run): {len(lines)} commands"


PARTS: dict[str, Callable[..., Iterator[str]]] = {
    one.__name__: one for one in (commands, systems, keys, results, machines, missing)
}
