"""The generated parts of the site, a hook of mkdocs.

A page has a line `<!-- generated: NAME ARGUMENT ... -->` where the function `NAME` of `PARTS` puts its text: commands
from the help texts, recipe keys from their declarations, figures from benchmarks/results. Nothing of that is typed.
A line `> `make docs` completes this page. ...` is for readers of the file, and the site leaves it out. README.md,
CONTRIBUTING.md and CHANGELOG.md become pages, too, with their links turned.
"""

import importlib
import re
import runpy
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from benchmarks import __main__ as bench
from jmae import cli, recipe
from jmae.papers import table as rows_of_papers
from jmae.report import charts

TOP = Path(__file__).resolve().parents[1]
WHOLE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's top folder."""
SCRIPTS = {
    **{"amae": ["accuracy", "tokens"], "maemi": ["maemi"], "memmc_mae": ["memmc"], "ppii": ["ppii", "anomalies"]},
    **{
        "simsid": ["simsid"],
        "comparison": ["packs", "border", "systems"],
        "rivals": ["scores"],
        "trust": ["coverage", "parity"],
    },
    "speed": ["cpu", "throughput", "masks", "volume", "compile", "loading", "scaling", "demo", "against_plan"],
}
"""The benchmarks of each page of results; one that is in no list is on the page "trust"."""
SCRIPTS["trust"] += sorted({*bench.SCRIPTS, *bench.GPU} - {script for each in SCRIPTS.values() for script in each})
OF_ALL = ("systems", "scores")
"""Benchmarks of several systems: the page of a system has its cases, too."""
NETWORKS = {"amae": {"amae", "normals"}}
"""Names of a system in those cases, where it has others than its own."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `WHOLE`."""
    for page, source in WHOLE.items():
        text = (TOP / source).read_text(encoding="utf-8")
        for ours, theirs in {**WHOLE, "results/index.md": "benchmarks/results.md"}.items():
            text = text.replace(f"]({theirs})", f"]({ours})")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the generated parts of a page, and drops the line that tells where they are without the site."""

    def part(match: re.Match) -> str:
        name, *arguments = match[1].split()
        return "\n".join(PARTS[name](*arguments))

    markdown = re.sub(r"^> `make docs` completes this page\. .*\n", "", markdown, flags=re.M)
    return re.sub(r"^<!-- generated: (.*?) -->$", part, markdown, flags=re.M)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Raises PluginError where a page would load something from another server."""
    if foreign := re.search(r'<(?:script|img|iframe|link)[^>]* (?:src|href)="[^"]*//[^"]*"', output):
        raise PluginError(f"{page.file.src_uri} loads from another server: {foreign[0]}")
    return output


# --- the reference ----------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Every command with its help."""
    for name, (_, sentence) in cli.COMMANDS.items():
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
    """The table of recipe keys: the "shared" ones, those of "images" or "volumes", or those that a system declares."""
    common = {"shared": recipe.SHARED, "images": recipe.IMAGES, "volumes": recipe.VOLUMES}
    if group in common:
        declared, values = common[group], {f"{s}:{p}": v for s in recipe.SYSTEMS for p, v in presets(s).items()}
    else:
        module = importlib.import_module(f"jmae.keys.{group}")
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
        bounds = one.bounds().replace("''", "empty").replace("'", "")
        allowed = ", ".join(filter(None, [kind(one), bounds, one.unit]))
        cells = [f"`{key}`", shown(one.default), allowed, escape(one.doc, quote=False), lists]
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def kind(one: recipe.Key) -> str:
    """The type of a key's value in words; empty where `Key.bounds` lists the choices."""
    like = one.like[0] if isinstance(one.default, tuple) else one.default
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(like)]
    if isinstance(one.default, tuple):
        words = f"list of {words}{'' if words == 'text' else 's'}" if one.length is None else f"{words}s"
        words = f"{words}, one an axis" if one.length == recipe.AXES else f"{one.length or ''} {words}".strip()
    return "" if one.choices else words


# --- the results ------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """The figures of one score in one view, means over seeds, with those of its rivals and baselines."""

    case: str  # the name of the result, without its seed
    link: str  # the name of the (first) result
    what: str  # such as "images", "pixels", "images, central 80%"
    score: str
    own: dict[str, Any]
    rivals: dict[str, dict[str, Any]]
    better: dict[str, Any]  # the paired difference to the best rival; empty where it was not computed
    deviation: float = 0.0  # of the AUROC over seeds
    seeds: int = 1

    @property
    def rival(self) -> str:
        """The name of the best rival or baseline; empty where there is none."""
        return max(self.rivals, key=lambda name: self.rivals[name]["auroc"], default="")


def cases_of(page: str) -> dict[str, dict[str, Any]]:
    """{name: case} of the results of a page. Where the page has several scripts, a name begins with its own one, but
    for the page of a system."""
    found, scripts = {}, SCRIPTS[page]
    for script in scripts:
        for end in ("", "_gpu"):
            alone = len(scripts) == 1 or page in recipe.SYSTEMS
            prefix = "" if alone and not end else f"{script}{end}, "
            found |= {prefix + name: case for name, case in results_of(script + end).items()}
    if page in recipe.SYSTEMS:
        names = NETWORKS.get(page, {page})
        each = [results_of(script) for script in OF_ALL]
        found |= {name: case for part in each for name, case in part.items() if names & set(name.split(", "))}
    return found


def results_of(script: str) -> dict[str, dict[str, Any]]:
    """The cases of a result file; {} where there is none."""
    file = bench.RESULTS / f"{script}.json"
    return bench.read(file) if file.is_file() else {}


def is_figure(value: Any) -> bool:
    """Whether a value has an AUROC."""
    return isinstance(value, dict) and isinstance(value.get("auroc"), float)


def split(entry: Any) -> dict[str, dict[str, Any]]:
    """The figures of a score: {"images": ..., "pixels": ...}, as far as they are there."""
    if is_figure(entry):  # older results have the figures of one kind alone, without its name
        return {"images" if "n_normal" in entry else "pixels": entry}
    found = {"images": entry.get("image"), "pixels": entry.get("pixel")} if isinstance(entry, dict) else {}
    return {what: value for what, value in found.items() if is_figure(value)}


def figures(name: str, case: dict[str, Any]) -> Iterator[Figure]:
    """The figures of a case: of each dictionary inside it that has a score's figures and baselines."""
    without_seed = re.sub(r", seed \d+$", "", name)
    for where, part in bench.walk({k: v for k, v in case.items() if k not in bench.ABOUT}):
        baselines = part.get("baselines")
        if not isinstance(baselines, dict):
            continue
        scores = {case.get("primary", ""): part} if split(part) else part.get("scores") or {}
        for score, entry in scores.items():
            for what, own in split(entry).items():
                rivals = {n: f[what] for n, b in baselines.items() if what in (f := split(b))}
                view = ", ".join([what, *([where.removeprefix("subsets: ")] if where else [])])
                better = (part.get("best_rival") or {}).get({"images": "image", "pixels": "pixel"}[what]) or {}
                yield Figure(without_seed, name, view, score, own, rivals, better)


def over_seeds(found: list[Figure]) -> list[Figure]:
    """The means over seeds of equal results; a rival counts where each seed has it."""
    groups: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in found:
        groups.setdefault((figure.case, figure.what, figure.score), []).append(figure)

    def mean(each: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = {k: [one.get(k) for one in each] for k in ("auroc", "ap")}
        out = {k: statistics.mean(v) for k, v in numbers.items() if all(isinstance(x, float) for x in v)}
        ends = [[e for e in one.get("auroc_ci") or () if isinstance(e, float)] for one in each]
        return out | ({"auroc_ci": [statistics.mean(e) for e in zip(*ends, strict=True)]} if all(ends) else {})

    merged = []
    for each in groups.values():
        names = [name for name in each[0].rivals if all(name in one.rivals for one in each)]
        rivals = {name: mean([one.rivals[name] for one in each]) for name in names}
        if len(each) == 1:
            merged += each
            continue
        own, better = mean([one.own for one in each]), mean([one.better for one in each])
        aurocs = [one.own["auroc"] for one in each]
        spread, n = statistics.stdev(aurocs), len(each)
        merged.append(each[0]._replace(own=own, rivals=rivals, better=better, deviation=spread, seeds=n))
    return merged


def number(value: float) -> str:
    """Three decimals, without the 0 before the point."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def ends_of(figure: dict[str, Any]) -> list[float]:
    """The ends of the AUROC's interval; empty where it has none."""
    return [end for end in figure.get("auroc_ci") or () if isinstance(end, float)]


def interval(figure: dict[str, Any], deviation: float = 0.0) -> str:
    """An AUROC with its deviation over seeds and its interval, where it has them; empty without a figure."""
    if not is_figure(figure):
        return ""
    ends, spread = ends_of(figure), f" ± {number(deviation)}" if deviation else ""
    text = f"{number(figure['auroc'])}{spread}{' [{}, {}]'.format(*map(number, ends)) if ends else ''}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def summary(found: list[Figure], cases: dict[str, dict[str, Any]]) -> str:
    """The table of figures. The higher of the two AUROCs is bold."""
    head = ["result", "seeds", "of", "score", "AUROC [95 %]", "AP", "best rival or baseline", "its AUROC [95 %]"]
    rows, several = [], any(figure.seeds > 1 for figure in found)
    for figure in found:
        other = figure.rivals.get(figure.rival, {})
        ours, theirs = interval(figure.own, figure.deviation), interval(other)
        if other:
            better = figure.own["auroc"] > other["auroc"]
            ours, theirs = (f"**{ours}**", theirs) if better else (ours, f"**{theirs}**")
        ap = number(figure.own["ap"]) if isinstance(figure.own.get("ap"), float) else ""
        case = cases[figure.link]
        cells = [
            f"[{figure.case}](#{anchor(figure.link)})",
            figure.seeds if several else "",
            figure.what,
            figure.score,
            ours,
            ap,
        ]
        cells += [figure.rival, theirs, interval(figure.better), *of_lesions(figure), date_of(case), machine_of(case)]
        rows.append(cells)
    head += [
        "difference [95 %]",
        "lesions found (at false positives an image)",
        "the rival's",
        "IoU (oracle)",
        "date",
        "machine",
    ]
    return bench.markdown(head, rows)


def of_lesions(figure: Figure) -> list[str]:
    """The sensitivity for lesions, that of the rival, and the overlap of masks; empty where there is none."""
    froc = lambda one: one.get("froc") or {}
    found = ["", ""]
    if "sensitivity" in froc(figure.own):
        at = f" (at {froc(figure.own)['at']:g})"
        theirs = froc(figure.rivals.get(figure.rival, {}))
        found = [number(froc(figure.own)["sensitivity"]) + at, number(theirs["sensitivity"]) if theirs else ""]
    overlap = figure.own.get("localisation") or {}
    return [*found, f"{number(overlap['normals'])} ({number(overlap['oracle'])})" if "normals" in overlap else ""]


def anchor(name: str) -> str:
    """The anchor of a case's heading."""
    return "case-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def date_of(case: dict[str, Any]) -> str:
    """The date of a case, which no cell breaks."""
    return case.get("date", "").replace("-", "\N{NON-BREAKING HYPHEN}")


def machine_of(case: dict[str, Any]) -> str:
    """The link to the machine of a case."""
    return f"[{all_machines().index(bench.environment(case)) + 1}](index.md#machines)"


def forest(name: str, found: list[Figure]) -> str:
    """AUROC with intervals, a row a result, each beside its best rival or baseline."""
    labels = [f"{f.case}{f' ({f.score})' if f.score else ''}" for f in found]
    inks = ((0.15, charts.NORMAL, "o", "the score"), (-0.15, charts.ABNORMAL, "s", "the best rival or baseline"))

    def draw(ax: Any) -> None:
        for row, figure in enumerate(found):
            for one, (shift, colour, mark, _) in zip((figure.own, figure.rivals.get(figure.rival)), inks, strict=True):
                if one:
                    ax.plot(ends_of(one), [-row + shift] * len(ends_of(one)), color=colour, lw=1.2)
                    ax.plot(one["auroc"], -row + shift, mark, ms=4.5, color=colour)
        ax.axvline(0.5, color=charts.FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.set(xlim=(0, 1), ylim=(-len(found) + 0.4, 0.6), xlabel="AUROC with its interval of 95 %; dashed: chance")
        ax.set_yticks([-row for row in range(len(found))], labels, fontsize=8)
        for _, colour, mark, label in inks:
            ax.plot([], [], f"{mark}-", ms=4.5, color=colour, label=label)
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)

    alt = "AUROC of each result with its interval, beside the best rival or baseline; the table below has the numbers."
    return drawn(charts.chart(name, alt, draw, (9, 1.2 + 0.34 * len(found))))


def drawn(svg: str) -> str:
    """A chart as a block of a page."""
    return f'\n<div class="chart">{" ".join(str(svg).split())}</div>\n'


def ratio_chart(cases: dict[str, dict[str, Any]]) -> str:
    """The ratios of times of all cases: the time of the other over that of jmae; median, least and greatest."""
    found = [
        (f"{name}: {where}", part)
        for name, case in cases.items()
        for where, part in bench.walk({k: v for k, v in case.items() if k not in bench.ABOUT})
        if all(isinstance(part.get(key), float) for key in ("median", "least", "greatest"))
    ]

    def draw(ax: Any) -> None:
        for row, (_, ratio) in enumerate(found):
            ax.plot([ratio["least"], ratio["greatest"]], [-row, -row], color=charts.INK, lw=1.2)
            ax.plot(ratio["median"], -row, "o", ms=4.5, color=charts.NORMAL)
        ax.axvline(1, color=charts.FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.set_xscale("log")
        most = max(ratio["greatest"] for _, ratio in found)
        ticks = [2.0**k for k in range(-2, 12) if 2.0**k <= most]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(ylim=(-len(found) + 0.4, 0.6), xlabel="the other's time over that of the first; dashed: the same")
        ax.set_yticks([-row for row in range(len(found))], [label for label, _ in found], fontsize=7)

    alt = "Ratios of times, median, least and greatest over interleaved rounds; the tables below have the numbers."
    return drawn(charts.chart("ratios", alt, draw, (9, 1 + 0.22 * len(found)))) if found else ""


@cache
def all_machines() -> list[str]:
    """The machines of all results, in the order in which the pages name them."""
    every = [case for page in SCRIPTS for case in cases_of(page).values()]
    return list(dict.fromkeys(bench.environment(case) for case in every if "not run" not in case))


def results(page: str) -> Iterator[str]:
    """The results of a page: a table, charts, what was not run, and each case with its command."""
    cases = cases_of(page)
    ran = {name: case for name, case in cases.items() if "not run" not in case}
    if found := over_seeds([figure for name, case in ran.items() for figure in figures(name, case)]):
        for what in ("images", "pixels"):
            main = [f for f in found if f.what == what and f.score in ("", ran[f.link].get("primary", f.score))]
            if main:
                yield f"## AUROC of {what}\n" + forest(f"{page}-{what}", main)
        yield "## All figures\n\n" + summary(found, ran)
    for name, case in ran.items():
        if study := case.get("convergence"):
            yield f"\n## {name}: AUROC against the number of {study['what']}\n"
            yield drawn(charts.convergence_chart(study).replace("convergence-", f"{anchor(name)}-"))
    yield ratio_chart(ran)
    yield "\n## Not run\n\n" + ("\n".join(f"- {line}" for line in not_run(page, cases)) or "Nothing is missing.")
    yield "\n## Each result\n"
    for name, case in ran.items():
        facts = [f"`{case['command']}`", case.get("date", "date not kept"), f"machine {machine_of(case)}"]
        yield f"### {name} {{ #{anchor(name)} }}\n\n{', '.join(facts)}\n"
        yield from bench.tables(case)
        if rows := patients(case):
            yield bench.markdown(["patient", "prevalence", "AUROC", "AP", "best baseline", "its AUROC", "its AP"], rows)


def patients(case: dict[str, Any]) -> list[list[Any]]:
    """A row for each patient with a lesion: the figures of its map, and of the baseline with the highest AUROC."""
    rows = []
    for one in case.get("per_patient") or ():
        if not is_figure(one):
            continue
        known = {name: entry for name, entry in (one.get("baselines") or {}).items() if is_figure(entry)}
        best = max(known, key=lambda name: known[name]["auroc"], default="")
        theirs = [number(known[best][key]) for key in ("auroc", "ap")] if best else ["", ""]
        ours = [number(one[key]) for key in ("prevalence", "auroc", "ap")]
        rows.append([one["patient"], *ours, best, *theirs])
    return rows


def not_run(page: str, cases: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each part of a page's benchmarks that has no result."""
    parts = [part for part in bench.PARTS if part.script in SCRIPTS[page]]
    ran = {bench.part_of(case["command"], parts) for case in cases.values() if "command" in case}
    lines = [f"`{part.command}`" for part in parts if part not in ran]
    lines += [f"{name}: {case['not run']}" for name, case in cases.items() if "not run" in case]
    on_gpu = [script for script in SCRIPTS[page] if script in bench.GPU and not results_of(f"{script}_gpu")]
    return lines + [f"`bash benchmarks/gpu.sh {script}`: needs an NVIDIA GPU" for script in on_gpu]


def papers() -> Iterator[str]:
    """The rows of the papers' tables."""
    yield rows_of_papers()


def machines() -> Iterator[str]:
    """The machines of all results."""
    yield "\n".join(f"{k}. {text}" for k, text in enumerate(all_machines(), 1))


def missing() -> Iterator[str]:
    """What was not run, page by page."""
    for page in SCRIPTS:
        if lines := not_run(page, cases_of(page)):
            yield f"- [{page}]({page}.md#not-run): {len(lines)} {'commands' if len(lines) > 1 else 'command'}"
    if not any("convergence" in case for page in SCRIPTS for case in cases_of(page).values()):
        yield "- AUROC against the number of masks (`jmae evaluate --config.evaluation.convergence=4`), on any set"


PARTS: dict[str, Callable[..., Iterator[str]]] = {
    one.__name__: one for one in (commands, systems, keys, papers, results, machines, missing)
}
"""What a page can ask for."""
