"""The ledger of claims, docs/explanation/claims.md: every function, test, command and result that it names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from jmae.cli import COMMANDS

TOP = Path(__file__).parents[1]
PAGE = TOP / "docs" / "explanation" / "claims.md"
STATES = ("tested", "measured", "not run", "open", "not built")
SYSTEMS = ("MAEMI", "MemMC-MAE", "AMAE", "P-PII", "SimSID")


def ledger(page: str) -> list[tuple[str, ...]]:
    """(heading, claim, function, test, command, state) of each row of the tables below a heading."""
    rows, heading = [], ""
    for line in page.splitlines():
        heading = line[3:] if line.startswith("## ") else heading
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heading and line.startswith("|") and cells[0] != "claim" and set(cells[0]) != {"-"}:
            rows.append((heading, *cells))
    return rows


@cache
def names_of(file: Path) -> frozenset[str]:
    """The functions, classes and constants at the top level of a file."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names |= {str(getattr(target, "id", getattr(target, "name", ""))) for target in targets}
    return frozenset(names)


def faults(row: tuple[str, ...]) -> list[str]:
    """What a row names and the library lacks."""
    if len(row) != 6:
        return [f"{len(row) - 1} cells in place of 5: {row}"]
    _, claim, function, test, command, state = row
    found = [] if state.startswith(STATES) else [f"state {state!r}"]
    for cell, kind, pattern in (
        (function, "function", r"`([\w/]+\.py):(\w+)`"),
        (test, "test", r"`([\w/]+\.py)::(\w+)`"),
    ):
        named = re.findall(pattern, cell)
        if len(named) != max(1, cell.count("`") // 2) and cell != "-":
            found.append(f"{kind} {cell!r}")
        for file, name in named:
            if not (TOP / file).is_file() or name not in names_of(TOP / file):
                found.append(f"{kind} {file}: {name}")
    if state.startswith("tested") and test == "-":
        found.append("tested without a test")
    if state.startswith("measured") and not re.search(r"`(\w+\.json)`", state):
        found.append("measured without a file of results")
    results = TOP / "benchmarks" / "results"
    found += [f"result {name}" for name in re.findall(r"`(\w+\.json)`", state) if not (results / name).is_file()]
    found += faults_of_command(command) if command != "-" else []
    return [f"{claim}: {fault}" for fault in found]


def faults_of_command(command: str) -> list[str]:
    """What is wrong with a command: its module, or a word after it that the module's text does not have."""
    match = re.fullmatch(r"`python -m (?P<module>(?:benchmarks|jmae)[\w.]*)(?P<words>[^`]*)`", command)
    if not match:
        return [f"command {command!r}"]
    place = TOP / match["module"].replace(".", "/")
    files = [
        file for file in (place.with_suffix(".py"), place / "__main__.py", place / "__init__.py") if file.is_file()
    ]
    if not files or (place.parent == TOP / "jmae" and place.name not in {m for m, _ in COMMANDS.values()}):
        return [f"module {match['module']}"]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    words = match["words"].split()
    wrong = [
        f"word {word}" for word in words[:1] if word[0] != "-" and not re.search(rf"\b{word}\b", text + known(place))
    ]
    for recipe in re.findall(r"configs/(\w+\.py):(\w+)", match["words"]):
        if f'"{recipe[1]}"' not in (TOP / "configs" / recipe[0]).read_text(encoding="utf-8"):
            wrong.append(f"preset {recipe}")
    return wrong


def known(place: Path) -> str:
    """The names of the modules in a package, which are words of its command."""
    return " ".join(file.stem for file in place.glob("*.py"))


@pytest.mark.parametrize("row", ledger(PAGE.read_text(encoding="utf-8")), ids=lambda row: " ".join(row[:2])[:60])
def test_what_a_claim_names_exists(row):
    assert not faults(row)


def test_every_system_has_its_table_and_no_claim_stands_twice():
    rows = ledger(PAGE.read_text(encoding="utf-8"))
    for system in SYSTEMS:
        assert sum(row[0].startswith(system) for row in rows) > 10, system
    twice = {row for row in rows if rows.count(row) > 1}
    assert not twice


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({2: "`jmae/scoring.py:auroc_of`"}, "function jmae/scoring.py: auroc_of"),
        ({2: "auroc"}, "function 'auroc'"),
        ({3: "`tests/test_scoring.py::test_nothing`"}, "test tests/test_scoring.py: test_nothing"),
        ({3: "-"}, "tested without a test"),
        ({4: "`python -m benchmarks.nothing`"}, "module benchmarks.nothing"),
        ({4: "`python -m jmae.scoring`"}, "module jmae.scoring"),
        ({4: "`python -m benchmarks.maemi table3`"}, "word table3"),
        ({4: "`python -m jmae.train --config configs/amae.py:large`"}, "preset ('amae.py', 'large')"),
        ({5: "done"}, "state 'done'"),
        ({5: "measured"}, "measured without a file of results"),
        ({5: "measured: `nothing.json`"}, "result nothing.json"),
    ],
)
def test_a_name_that_is_wrong_is_found(change, fault):
    right = "`jmae/scoring.py:auroc`", "`tests/test_claims.py::test_a_name_that_is_wrong_is_found`"
    row = ["AMAE", "AUROC", *right, "`python -m benchmarks.maemi table1`", "tested"]
    assert not faults(tuple(row))
    for number, cell in change.items():
        row[number] = cell
    assert faults(tuple(row)) == [f"AUROC: {fault}"]
