"""The shape of the code: imports without a cycle, no system's name in shared code, functions of a readable length."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest

from jmae.recipe import SYSTEMS

ROOT = Path(__file__).parents[2]
LONGEST = 100  # lines of a function
SHARED = ("configs", "systems")  # where a system may be named


def modules(package: str) -> dict[str, ast.Module]:
    """The syntax tree of each module of a package, by its dotted name."""
    files = (ROOT / package).rglob("*.py")
    name = lambda file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return {name(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imports(package: str) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, at its top or inside a function."""
    trees, out = modules(package), {}
    for name, tree in trees.items():
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (below & trees.keys()) or {node.module}
        out[name] = (found & trees.keys()) - {name}
    return out


def cycles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules of which each imports, directly or not, all others."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    return {frozenset({a} | {b for b in reach[a] if a in reach[b]}) for a in graph if a in reach[a]}


def test_the_walk_finds_a_cycle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}


@pytest.mark.parametrize("package", ["jmae", "benchmarks"])
def test_no_modules_import_each_other(package):
    assert not cycles(imports(package))


def test_shared_code_tests_no_system_s_name():
    name = re.compile(rf"""(==|!=|\bin)\s*\(?["']({"|".join(SYSTEMS)})["']|["']({"|".join(SYSTEMS)})["']\s*(==|!=|:)""")
    found = []
    for file in (ROOT / "jmae").rglob("*.py"):
        if file.parent.name not in SHARED:
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            found += [f"{file.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in lines if name.search(line)]
    assert not found


def test_functions_are_short():
    found = []
    for name, tree in modules("jmae").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                found += [f"{name}.{node.name}: {length} lines"] * (length > LONGEST)
    assert not found


def test_the_command_that_evaluates_is_short():
    assert len((ROOT / "jmae" / "evaluate.py").read_text().splitlines()) <= 350


def test_a_masked_autoencoder_reads_in_two_thousand_lines():
    """The reading order of CONTRIBUTING.md names parts that exist, with their true numbers of lines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(jmae/\S+\.py)` \| (.+?) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) > 10
    for file, names, told in rows:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        parts = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        read = [parts[name] for name in re.findall(r"`(\w+)`", names)]
        length = sum((n.end_lineno or 0) - n.lineno + 1 + len(n.decorator_list) for n in read)
        length += len((ast.get_docstring(tree, clean=False) or "").split("\n"))
        assert abs(length - int(told)) <= 0.1 * int(told) + 5, (file, length)
    assert sum(int(told) for _, _, told in rows) <= 2000


def test_no_jax_function_is_patched_in_the_library():
    patches = [name for name, tree in modules("jmae").items() if "unittest" in set(chain.from_iterable(
        [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    ))]  # fmt: skip
    assert not patches
