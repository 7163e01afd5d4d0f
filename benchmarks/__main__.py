"""Runs the benchmarks, each as a process, and renders benchmarks/results.md from their JSON files.

    python -m benchmarks                   # everything that this machine can run (hours)
    python -m benchmarks cpu throughput    # only these scripts
    python -m benchmarks --render          # only the page

A part that needs images (JMAE_DATA), a GPU or a package that is missing is "not run", also on the page. A part that
fails does not stop the others. It is listed at the end, and the exit code is 1.
"""

import argparse
import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "results.md"
PEERS = {
    "torch": "torch",
    "transformers": "transformers",
    "pietorch": "pie-torch",
    "libtpu": "libtpu",
}  # module -> package


class Part(NamedTuple):
    """One run of a script. `needs` names "JMAE_DATA" or modules of packages, separated by spaces."""

    script: str
    arguments: str = ""
    needs: str = ""

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.script} {self.arguments}".strip()

    def lacks(self) -> str:
        """The first need that this machine does not meet, as a sentence; "" where it meets all."""
        for need in self.needs.split():
            if need == "JMAE_DATA":
                if not os.environ.get(need):
                    return "JMAE_DATA is not set"
            elif importlib.util.find_spec(need) is None:
                return f"{PEERS[need]} is not installed: pip install {PEERS[need]}"
        return ""


PARTS = (
    Part("cpu", needs="torch transformers pietorch"),
    Part("throughput", needs="torch transformers"),
    Part("throughput", "--systems small", "torch"),
    Part("throughput", "--systems paper", "torch"),
    Part("masks"),
    Part("volume", "infer --small", "torch"),
    Part("volume", "train --small", "torch"),
    Part("volume", "check", "torch"),
    Part("anomalies", needs="pietorch"),
    Part("anomalies", "--solvers"),
    Part("memmc", "steps"),
    Part("memmc", "scoring"),
    Part("memmc", "count"),
    Part("simsid", "speed", "torch"),
    Part("loading"),
    Part("compile"),
    Part("parity", needs="torch transformers"),
    Part("coverage"),
    Part("coverage", "--expect position --draws 100 --tests 40"),
    Part("likeness", needs="JMAE_DATA"),
    Part("scoring"),
    Part("accuracy", "cxr_peds", "JMAE_DATA"),
    Part("accuracy", "cxr_nih --subsets matched --only stage2", "JMAE_DATA"),
    *(Part("accuracy", what, "JMAE_DATA") for what in ("cxr_peds baselines", "cxr_nih baselines --subsets matched")),
    *(
        Part("accuracy", f"cxr_peds controls --only {settings} --seeds 0 1 2 3", "JMAE_DATA")
        for settings in ("stage2 b_perfect b_normals one_class", "percentile_all equal_epochs paper_rate jitter")
    ),
    *(Part("accuracy", f"phantoms {part} --seeds 0 1 2 3") for part in ("controls", "ratio", "stage0")),
    *(
        Part("tokens", what, "JMAE_DATA")
        for what in (
            "cxr_peds --only normals --seeds 0 1 2",
            *(f"cxr_peds --only {networks} --seeds 0" for networks in ("stage2", "long", "narrow wide deep")),
            "cxr_nih --subset matched --only normals stage2 --seeds 0",
        )
    ),
    *(
        Part("scores", f"{pack} --seeds 0 1 2", "JMAE_DATA")
        for pack in (
            "cxr_peds --only normals",
            "cxr_peds --only amae memmc_mae ppii simsid",
            "cxr_nih",
            "endoscopy",
            "mri3d",
            "mri3d_hippo",
        )
    ),
    *(
        Part("maemi", what, "JMAE_DATA" if "mri3d" in what else "")
        for what in ("mri3d", "mri3d_hippo", "ratio", "patch")
    ),
    *(
        Part("memmc", what, "JMAE_DATA")
        for what in ("cxr_peds", "endoscopy", "ablation", "options", "scores", "frames")
    ),
    Part("ppii", "phantoms"),
    *(Part("ppii", what, "JMAE_DATA") for what in ("generators", "strength", "table1", "table2", "volumes", "tables")),
    *(Part("simsid", what) for what in ("phantoms", "volumes")),
    Part("simsid", "cxr_peds", "JMAE_DATA"),
    *(Part("packs", f"{pack} --runs papers", "JMAE_DATA") for pack in ("cxr_peds", "cxr_nih", "endoscopy")),
    *(
        Part("border", f"{what} --runs papers", "JMAE_DATA")
        for what in ("cxr_peds", "cxr_nih", "cxr_nih --subset matched")
    ),
    Part("systems", "cxr_peds --budget 0.5", "JMAE_DATA"),
    Part("systems", "endoscopy --budget 0.25", "JMAE_DATA"),
    Part("scaling", needs="libtpu"),
    *(Part("scaling", what, "jax_cuda12_plugin") for what in ("--chip h100", "--recipes")),
)
SCRIPTS = tuple(dict.fromkeys(part.script for part in PARTS))
# Scripts that gpu.sh runs. Their results are NAME_gpu.json.
GPU = ("demo", "volume", "throughput", "masks", "anomalies", "memmc", "against_plan")
COLUMNS = {  # key of a contestant's result -> heading on the page
    "median_s": "median s",
    "least_s": "least s",
    "cpu_median_s": "CPU s",
    "compile_s": "compile s",
    "peak_mib": "host MiB",
    "device_mib": "device MiB",
    "share": "share of the matrix rate",
}
ABOUT = ("command", "date", "machine", "versions")


# --- the page ---------------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value as the text of a table's cell."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, without columns that are empty in all rows."""
    full = [k for k in range(len(head)) if any(row[k] not in ("", None) for row in rows)]
    lines = [[head[k] for k in full], ["---"] * len(full), *([cell(row[k]) for k in full] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path as text, dictionary) of a dictionary and all dictionaries inside it, from the outside in."""
    if isinstance(value, dict):
        yield ": ".join(name for name in path if name not in ("contestants", "results", "cases")), value
        for name, inner in value.items():
            yield from walk(inner, (*path, name))


def tables(case: dict[str, Any]) -> list[str]:
    """The tables of a case: its "table" (head, rows) if it has one, else contestants, ratios, and figures by name."""
    if "table" in case:
        return [markdown(*case["table"])]
    parts = list(walk({k: v for k, v in case.items() if k not in ABOUT}))
    timed = [[where, *(part.get(key, "") for key in COLUMNS)] for where, part in parts if "median_s" in part]
    ratios = [
        [where, *(part.get(key, "") for key in ("median", "least", "greatest", "cpu"))]
        for where, part in parts
        if {"median", "least", "greatest"} <= set(part)
    ]
    found = []
    for where, part in parts:
        if isinstance(part.get("auroc"), float):
            ends = part.get("auroc_ci") or ()
            interval = "{:.3f} to {:.3f}".format(*ends) if len(ends) == 2 else ""
            found.append([where, part["auroc"], interval, part.get("ap", "")])
    out = [markdown(["contestant", *COLUMNS.values()], timed)] if timed else []
    out += [markdown(["ratio", "median", "least", "greatest", "of CPU seconds"], ratios)] if ratios else []
    out += [markdown(["figure of", "AUROC", "95 %", "AP"], found)] if found else []
    plain = parts[0][1] if parts else {}
    single = [f"{k.replace('_', ' ')} {cell(v)}" for k, v in plain.items() if isinstance(v, (int, float, str))]
    single += [] if out else [f"{where}: {cell(v)}" for where, part in parts[1:] for v in [leaves(part)] if v]
    return [*out, *([f"{'; '.join(single)}.\n"] if single else [])]


def leaves(part: dict[str, Any]) -> str:
    """The numbers and texts of one dictionary."""
    return ", ".join(f"{k.replace('_', ' ')} {cell(v)}" for k, v in part.items() if isinstance(v, (int, float, str)))


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The cases of a result file. Ends the process with one line where the file is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{file}: not JSON ({error}): restore it, or delete it and run its script again")


def summary(script: str) -> str:
    """The first paragraph of a script's docstring."""
    text = ast.get_docstring(ast.parse((HERE / f"{script}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def environment(case: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    machine, versions = case.get("machine", {}), case.get("versions", {})
    words = [f"{machine.get('cores')} x {machine.get('processor')}, {machine.get('memory_gib')} GiB"]
    words += [case["device"]] if case.get("device", "cpu") != "cpu" else []
    words += [f"{name}={value}" for name, value in machine.get("environment", {}).items()]
    return f"{', '.join(words)}; {', '.join(f'{name} {version}' for name, version in versions.items())}"


def part_of(command: str, parts: list[Part]) -> Part | None:
    """The longest part whose words are all in a command, or None."""
    fits = [part for part in parts if set(part.command.split()) <= set(command.split())]
    return max(fits, key=lambda part: len(part.command.split()), default=None)


def page(results: Path) -> str:
    """The text of benchmarks/results.md for the JSON files in a folder."""
    machines: list[str] = []
    body: list[str] = []
    absent: list[str] = []

    def section(title: str, about: str, cases: dict[str, dict[str, Any]], missing: list[str]) -> None:
        body.append(f"## {title}\n\n{about}\n")
        for name, case in cases.items():
            if "not run" in case:
                missing.append(f"{name}: {case['not run']}")
                continue
            if (here := environment(case)) not in machines:
                machines.append(here)
            load = case.get("machine", {}).get("load")
            facts = [f"`{case['command']}`", case.get("date", "date not kept"), f"[{machines.index(here) + 1}]"]
            facts += [f"load {load:.1f}"] if load is not None else []
            body.append(f"### {name}\n\n{', '.join(facts)}\n")
            body.extend(tables(case))
        absent.extend(f"{title}: {line}" for line in missing)
        body.extend([f"- not run: {line}" for line in missing] + [""] * bool(missing))

    for script in SCRIPTS:
        file = results / f"{script}.json"
        cases = read(file) if file.is_file() else {}
        parts = [part for part in PARTS if part.script == script]
        ran = {part_of(case["command"], parts) for case in cases.values()}
        missing = [f"`{part.command}`" for part in parts if part not in ran]
        section(script, summary(script), cases, missing)
    for script in GPU:
        file = results / f"{script}_gpu.json"
        cases = read(file) if file.is_file() else {}
        missing = [] if cases else ["`bash benchmarks/gpu.sh` needs an NVIDIA GPU"]
        about = f"The same as {script}, on one NVIDIA GPU." if script in SCRIPTS else summary(script)
        section(f"{script} on a GPU", about, cases, missing)

    head = "# Results of the benchmarks\n\nWritten by `python -m benchmarks --render` from benchmarks/results/*.json.\n"
    head += "A figure stands beside its command, its date, the machine [n] and the load of the machine: the number of"
    head += " processes that wanted to run when the result was written.\nA ratio is the time of the other over that of"
    head += " jmae: median, least and greatest over interleaved rounds. On a machine that others use too, the ratio of"
    head += " CPU seconds is more reliable.\n"
    where = [f"{k}. {text}" for k, text in enumerate(machines, 1)]
    missing = [f"- {line}" for line in absent] or ["- nothing"]
    return "\n".join([head, "## Machines\n", *where, "\n## Not run\n", *missing, "", *body]).rstrip() + "\n"


# --- the runs ---------------------------------------------------------------------------------------------------------


def run(scripts: list[str]) -> list[str]:
    """Runs the parts of scripts. Returns a line for each part that failed."""
    failed = []
    for part in (part for part in PARTS if part.script in scripts):
        if lacks := part.lacks():
            print(f"{part.command}: not run: {lacks}", flush=True)
            continue
        print(f"\n== {part.command}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part.script}", *part.arguments.split()]
        if code := subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(f"{part.command}: exit code {code}")
    if wanted := [script for script in GPU if script in scripts]:
        if shutil.which("nvidia-smi") is None:
            print(f"{', '.join(wanted)} on a GPU: not run: this machine has no NVIDIA GPU", flush=True)
        elif code := subprocess.run(
            ["bash", str(HERE / "gpu.sh")], env=os.environ | {"PYTHON": sys.executable}
        ).returncode:
            failed.append(f"bash benchmarks/gpu.sh: exit code {code}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"one of {', '.join(SCRIPTS)}; default all")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if unknown := [script for script in arguments.scripts if script not in SCRIPTS]:
        parser.error(f"{unknown[0]} is unknown: one of {', '.join(SCRIPTS)}")
    failed = [] if arguments.render else run(arguments.scripts or list(SCRIPTS))
    PAGE.write_text(page(RESULTS), encoding="utf-8")
    print(f"\n{PAGE}")
    print("\n".join(failed), file=sys.stderr, end="\n" * bool(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
