"""Runs the code of the pages: `make docs-test`, or python -m pytest tests/on_docs.py; no part of `make test`.

README.md and each page with code of docs/tutorials, docs/how-to, docs/explanation, docs/results and docs/reference is
one test. Its blocks run from top to bottom:

- ```python title="NAME" (or ```csv, ```text, any language): the text is written to the file NAME. It is not run.
- ```sh: runs in bash and stops at the first command that fails. `jmae` and `python` are those of the test.
- ```python: runs in this process; the blocks of a page share their variables, as the cells of a notebook do.
- ```bash: shown, never run. Every such block needs a thing that SHOWN lists, such as pip or Docker; a test checks it.
- ```text: shown, never run: a formula, a tree of folders or an output, but no command.

For what only the test needs there are three comments:

- <!-- test: after PAGE --> (several are allowed): the page starts in a copy of the folder that PAGE, such as README.md,
  has left. There are scans, a manifest and a trained run. Without this comment the page starts in an empty folder.
- <!-- test: OLD -> NEW --> above a block (several are allowed) replaces OLD, which must be there, by NEW: fewer steps.
- A whole block inside of <!-- ... --> runs and is not shown: data that a how-to needs, or a check of its result.

Notebooks, docs/notebooks/*.ipynb, run cell by cell in an empty folder, with the changes of the tutorials that they are
made of. All pages together take under ten minutes on two cores.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
BLOCK = re.compile(
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?[^\n]*\n(?P<text>.*?)^ *```$', re.M | re.S
)
CHANGE = re.compile(r"<!-- test: (.*?) -> (.*?) -->")
AFTER = re.compile(r"<!-- test: after (\S+) -->")
# What no laptop has at hand: an index of packages, a container, a cluster, a compiler for a GPU.
SHOWN = re.compile(r"^(?!#).*\b(pip install|docker|conda|sbatch|kubectl|plan .*--target)\b", re.M)
COMMAND = re.compile(r"^\s*(\$ |jmae |python |pip )", re.M)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title or "", text) of each block of a page, with the changes that the comments above it ask for."""
    found, end = [], 0
    for match in BLOCK.finditer(page):
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        for old, new in CHANGE.findall(page, end, match.start()):
            assert old in text, f"<!-- test: {old} -> ... --> stands above a block without {old!r}"
            text = text.replace(old, new)
        found.append((match["language"], match["title"] or "", text))
        end = match.end()
    return found


def complaint(language: str, title: str, text: str) -> str:
    """Why a block may not stand in a page as it is: it is not run, and nothing keeps it from running. Else ""."""
    if title or language in ("sh", "python"):
        return ""
    if language == "bash":
        return "" if SHOWN.search(text) else "a ```bash block that a laptop can run: make it ```sh"
    if language == "text":
        return "a command in a ```text block: make it ```sh" if COMMAND.search(text) else ""
    return f"a block of {language or 'no language'}: it is neither run nor marked as shown"


SECTIONS = ("tutorials", "how-to", "explanation", "results", "reference")
PAGES = [TOP / "README.md", *(page for section in SECTIONS for page in sorted((DOCS / section).glob("*.md")))]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
RUN = [
    page for page in PAGES if any(language in ("sh", "python") for language, _, _ in blocks(page.read_text("utf-8")))
]
RUN.sort(key=lambda page: bool(AFTER.search(page.read_text("utf-8"))))  # first those that others start from


def name_of(page: Path) -> str:
    return str(page.relative_to(TOP))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of all folders that pages run in, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"


@pytest.fixture
def programs(tmp_path, monkeypatch) -> None:
    """Commands of blocks find `python` and `jmae`, of the Python and the library that run this test."""
    for name, words in {"python": "", "jmae": "-m jmae"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(TOP))


def run(language: str, title: str, text: str, names: dict) -> None:
    """Writes or runs one block; `names` are the variables of the page."""
    if title:
        Path(title).parent.mkdir(parents=True, exist_ok=True)
        Path(title).write_text(text, encoding="utf-8")
    elif language == "sh":
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, f"exit code {done.returncode} of\n{text}\n{done.stdout.decode()[-4000:]}"
    elif language == "python":
        exec(compile(text, "<block>", "exec"), names)


def left_by(page: Path, site: Path) -> Path:
    """The folder in which all blocks of a page have run. They run once, in the worker that asks first."""
    folder = site / name_of(page).replace("/", "-")
    site.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{folder}.done")
        if not done.exists():
            assert not folder.exists(), f"{name_of(page)} has failed before; another test shows where"
            text = page.read_text(encoding="utf-8")
            folder.mkdir()
            for base in AFTER.findall(text):
                shutil.copytree(left_by(TOP / base, site), folder, dirs_exist_ok=True)
            names: dict = {"__name__": "page"}
            with chdir(folder):
                for block in blocks(text):
                    run(*block, names)
            done.touch()
    return folder


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_blocks_of_a_page_run_in_order(page, site, programs):
    left_by(page, site)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch, programs):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorials" / f"{notebook.stem}.md").read_text(encoding="utf-8")
    content = nbformat.read(notebook, as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    for old, new in CHANGE.findall(page):
        (cell,) = [cell for cell in code if old in cell.source]
        cell.source = cell.source.replace(old, new)
    NotebookClient(content, timeout=600).execute()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_is_not_run_needs_what_a_laptop_lacks(page):
    found = [(complaint(*block), block[2]) for block in blocks(page.read_text(encoding="utf-8"))]
    assert not [f"{why}:\n{text}" for why, text in found if why]


def test_blocks_that_nothing_runs_are_found():
    assert not complaint("bash", "", "docker build .\n") and not complaint("text", "", "init(key) -> state\n")
    assert not complaint("sh", "", "jmae doctor\n") and not complaint("csv", "a.csv", "id\n")
    assert "make it ```sh" in complaint("bash", "", "jmae doctor\n")
    assert "a command" in complaint("text", "", "the command:\n  jmae doctor\n")
    for language in ("py", "csv", "console", ""):
        assert "neither run nor" in complaint(language, "", "x = 1\n")


def test_a_page_starts_in_the_folder_that_another_page_has_left(tmp_path, monkeypatch, programs):
    monkeypatch.setitem(globals(), "TOP", tmp_path)
    first, second = tmp_path / "first.md", tmp_path / "second.md"
    first.write_text("```sh\ntest ! -e a && echo 1 >> a\n```\n")
    second.write_text(
        "<!-- test: after first.md -->\n```python\nfrom pathlib import Path\n```\n"
        "```sh\necho 2 >> a\n```\n```python\nassert Path('a').read_text() == '1\\n2\\n'\n```\n"
    )
    for _ in range(2):  # a page that has run does not run again
        assert (left_by(second, tmp_path / "site") / "a").read_text() == "1\n2\n"
        assert (left_by(first, tmp_path / "site") / "a").read_text() == "1\n"
    first.with_name("third.md").write_text("```sh\nfalse\n```\n")
    for message in ("exit code 1", "failed before"):
        with pytest.raises(AssertionError, match=message):
            left_by(tmp_path / "third.md", tmp_path / "site")


def test_blocks_are_found_and_changed_as_the_top_of_this_file_says():
    page = (
        "<!-- test: 1000 -> 8 -->\n```sh\njmae train --steps=1000\n```\ntext\n"
        '```csv title="a/b.csv"\nid\n```\n'
        "1. item\n    ```python\n    x = 1\n    if x:\n        y = 2\n    ```\n"
        "<!--\n```python\nassert y == 2\n```\n-->\n"
    )
    assert blocks(page) == [
        ("sh", "", "jmae train --steps=8\n"),
        ("csv", "a/b.csv", "id\n"),
        ("python", "", "x = 1\nif x:\n    y = 2\n"),
        ("python", "", "assert y == 2\n"),
    ]
    with pytest.raises(AssertionError, match="stands above a block without"):
        blocks("<!-- test: 7 -> 8 -->\n```sh\necho\n```\n")


def test_a_block_that_fails_fails_its_page(tmp_path, monkeypatch, programs):
    monkeypatch.chdir(tmp_path)
    run("csv", "a.csv", "id\n1\n", {})
    run("sh", "", "test -f a.csv; python -c 'import jmae'; jmae --version", {})
    with pytest.raises(AssertionError, match="exit code 1"):
        run("sh", "", "false\ntrue\n", {})
    run("python", "", "from pathlib import Path\nb = Path('a.csv').read_text()", names := {})
    assert names["b"] == "id\n1\n"
    run("bash", "", "false", {})
