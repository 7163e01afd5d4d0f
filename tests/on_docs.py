"""Runs the code of the pages: `make docs-test`, or python -m pytest tests/on_docs.py; no part of `make test`.

README.md and each page of docs/tutorials and docs/how-to is one test. It starts in an empty folder, and
its blocks run from top to bottom:

- ```python title="NAME" (or ```csv, ```text, any language): the text is written to the file NAME. It is not run.
- ```sh: runs in bash and stops at the first command that fails. `jmae` and `python` are those of the test.
- ```python: runs in this process; the blocks of a page share their variables, as the cells of a notebook do.
- ```bash, ```text, ```console, ```json, ...: shown, never run.

For what only the test needs there are two comments:

- <!-- test: OLD -> NEW --> above a block (several are allowed) replaces OLD, which must be there, by NEW: fewer steps.
- A whole block inside of <!-- ... --> runs and is not shown: data that a how-to needs, or a check of its result.

Notebooks, docs/notebooks/*.ipynb, run cell by cell in an empty folder. All pages together take under ten minutes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
PAGES = [TOP / "README.md", *sorted(DOCS.glob("tutorials/*.md")), *sorted(DOCS.glob("how-to/*.md"))]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
BLOCK = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?[^\n]*\n(?P<text>.*?)^ *```$', re.M | re.S
)
CHANGE = re.compile(r"<!-- test: (.*?) -> (.*?) -->")


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


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """A folder with `python` and `jmae`, of the Python and the library that run this test."""
    folder = tmp_path_factory.mktemp("programs")
    for name, words in {"python": "", "jmae": "-m jmae"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, programs) -> Path:
    """The empty folder that a page starts in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOP), str(tmp_path)]))
    monkeypatch.syspath_prepend(tmp_path)  # the files of the page can be imported
    return tmp_path


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_the_blocks_of_a_page_run_in_order(page, folder):
    names: dict = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        run(*block, names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_runs(notebook, folder):
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(notebook, folder)
    NotebookClient(nbformat.read(folder / notebook.name, as_version=4), timeout=600).execute()


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


def test_a_block_that_fails_fails_its_page(folder):
    run("csv", "a.csv", "id\n1\n", {})
    run("sh", "", "test -f a.csv; python -c 'import jmae'; jmae --version", {})
    with pytest.raises(AssertionError, match="exit code 1"):
        run("sh", "", "false\ntrue\n", {})
    run("python", "", "from pathlib import Path\nb = Path('a.csv').read_text()", names := {})
    assert names["b"] == "id\n1\n"
    run("bash", "", "false", {})
