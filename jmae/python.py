"""The commands from Python: `jmae.prepare(...)`, `jmae.train(...)` and `jmae.evaluate(...)` need no shell.

`jmae.train` and `jmae.evaluate` are the modules of these commands. The classes `Train` and `Evaluate` make the modules
callable.
"""

import csv
import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from jmae.errors import InputError, shortly
from jmae.tables import counted, plain

SHOWN = 10  # cases of an evaluation in a notebook


class Evaluation:
    """What an evaluation found, read from its folder. A notebook shows it as tables.

    Attributes:
        folder: the folder, which has report.html.
        metrics: the content of metrics.json.
        cases: the lines of scores.csv, the highest score first.
    """

    @shortly
    def __init__(self, folder: str | os.PathLike):
        """Raises InputError where the folder holds no evaluation."""
        self.folder = Path(folder)
        try:
            self.metrics: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            with open(self.folder / "scores.csv", newline="", encoding="utf-8") as file:
                lines = [{name: plain(cell) for name, cell in line.items()} for line in csv.DictReader(file)]
        except FileNotFoundError as error:
            remedy = "name the folder of an evaluation, such as runs/mine/evaluation"
            raise InputError(f"{self.folder}: no {Path(error.filename).name}: {remedy}") from None
        self.cases: list[dict[str, str]] = sorted(lines, key=lambda line: -float(line["score"]))

    def figures(self) -> dict[str, dict[str, Any]]:
        """{name: {"auroc", "auroc_ci", "ap"}} of each score and baseline; empty where the cases have no labels."""
        found = {**self.metrics.get("scores", {}), **self.metrics.get("baselines", {})}
        return {name: one["image"] for name, one in found.items() if one.get("image")}

    def _repr_html_(self) -> str:
        """The figures and the highest cases in a notebook."""
        rows = [["score or baseline", "AUROC", "95 % interval", "AP"]]
        for name, one in self.figures().items():
            low, high = one["auroc_ci"]  # None where no draw of patients has both classes
            ends = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            rows.append([name, f"{one['auroc']:.3f}", ends, f"{one['ap']:.3f}"])
        cases = [["case", "label", "score", "p-value"]]
        for line in self.cases[:SHOWN]:
            p_value = line["p_value"] and f"{float(line['p_value']):.3g}"
            cases.append([line["id"], line["label"], f"{float(line['score']):.4g}", p_value])
        tables = [table(rows)] * (len(rows) > 1) + [table(cases)]
        return f"<p>{escape(str(self.folder / 'report.html'))}</p>{''.join(tables)}"

    def __repr__(self) -> str:
        found = ", ".join(f"{name} AUROC {one['auroc']:.3f}" for name, one in self.figures().items())
        return f"<{counted(len(self.cases), 'cases')} in {self.folder}{f': {found}' if found else ''}>"


def table(rows: list[list[str]]) -> str:
    """An HTML table; its first row is the heading."""
    cells = lambda row, tag: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
    lines = [f"<tr>{cells(row, 'td' if i else 'th')}</tr>" for i, row in enumerate(rows)]
    return f"<table>{''.join(lines)}</table>"


def flags(changes: Mapping[str, Any] | None = None, **values: Any) -> list[str]:
    """The words of a command line: a flag for each value that is not empty, and `--config.KEY` for each change."""
    given = {name: value for name, value in values.items() if value != ""}
    given |= {f"config.{key}": value for key, value in (changes or {}).items()}
    return [f"--{name}={value}" for name, value in given.items()]


class Train(ModuleType):
    """The module `jmae.train`, which can be called."""

    @shortly
    def __call__(
        self,
        recipe: str,
        workdir: str | os.PathLike,
        *,
        manifest: str | os.PathLike = "",
        changes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Trains a system, and evaluates the split `test` where it has labels: the command `jmae train`.

        Args:
          recipe: NAME[:PRESET] of the library, such as "ppii:small", or a FILE.py.
          workdir: the run folder. A run that was interrupted there goes on.
          manifest: the manifest of the data; "" for the built-in phantoms of a preset.
          changes: values of the recipe's keys, such as {"budget": 0.1, "data.calibration": 0.1}.

        Returns: the run folder, for `jmae.evaluate` and `jmae.load`.

        Raises:
          InputError: the input is wrong; one line says what, where and the remedy.
        """
        more = {"data.manifest": os.fspath(manifest)} if os.fspath(manifest) else {}
        self.main(flags(more | dict(changes or {}), config=recipe, workdir=workdir))
        return Path(workdir)


class Evaluate(ModuleType):
    """The module `jmae.evaluate`, which can be called."""

    @shortly
    def __call__(
        self,
        workdir: str | os.PathLike,
        *,
        manifest: str | os.PathLike = "",
        split: str = "test",
        out: str | os.PathLike = "",
        changes: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """Scores a split with a trained run: the command `jmae evaluate`.

        Args:
          workdir: the run folder.
          manifest: another manifest than that of the run; it needs `out`.
          split: the rows to score.
          out: where to write; "" is `evaluation` in the run folder, or `evaluation-SPLIT`.
          changes: values of the recipe's keys `evaluation.*`; they need `out`.

        Returns: figures and scores. `Evaluation(folder)` reads them again later.

        Raises:
          InputError: the input is wrong; one line says what, where and the remedy.
        """
        self.main(flags(changes, workdir=workdir, manifest=manifest, split=split, out=out))
        own = "evaluation" if split == "test" else f"evaluation-{split}"
        return Evaluation(os.fspath(out) or Path(workdir) / own)


@shortly
def prepare(layout: str, out: str | os.PathLike, **values: Any) -> Path:
    """Writes the manifest of a folder of scans or of a public data set: the command `jmae prepare`.

    Args:
      layout: "folders", "nnunet", "bids", or a data set's name.
      out: the folder to write into.
      values: the flags of the command, such as normal="normals", test="new", or root="data".

    Returns: the manifest.
    """
    from jmae.data import prepare as command  # it imports the library, which takes seconds

    command.main([layout, *flags(out=out, **values)])
    return Path(out) / "manifest.csv"
