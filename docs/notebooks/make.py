"""python docs/notebooks/make.py: writes the notebooks in this folder, each from the tutorial of the same name.

Text stays text. A `python` block becomes a cell. A `sh` block becomes a cell that bash runs. Other blocks stay in the
text. Comments are left out.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGES = ("xrays", "volumes")
CELL = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def notebook(name: str) -> str:
    """The notebook of a tutorial, without outputs."""
    page = (HERE.parent / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    page = re.sub(r"<!--.*?-->\n*", "", page, flags=re.S)
    text, *blocks = CELL.split(re.sub(r"\]\((\w+\.md)", r"](../tutorials/\1", page))
    cells = [("markdown", text)]
    for language, code, text in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        cells += [("code", f"%%bash\nset -eu\n{code}" if language == "sh" else code), ("markdown", text)]
    extra = {"markdown": {}, "code": {"execution_count": None, "outputs": []}}
    found = [
        {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.strip().splitlines(True), **extra[kind]}
        for i, (kind, text) in enumerate(cells)
        if text.strip()
    ]
    return json.dumps({"cells": found, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (HERE / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
