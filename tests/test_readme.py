"""The README: one screen, whose links, commands and figures are those of the repository."""

import json
import re
from pathlib import Path

import pytest

from jmae import cli, recipe
from jmae.data.manifest import Row
from jmae.data.prepare.overview import calibration_share

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").rglob("*.md"))]
RESULTS = TOP / "benchmarks" / "results"


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 80
    assert "For research, not for clinical use." in README


def test_the_training_command_is_the_one_that_prepare_prints_for_as_many_scans():
    n = int(re.search(r" fits (\d+) normal images", README)[1])
    proposed = calibration_share([Row(f"{i}", f"{i}", "train", 0, (f"{i}",)) for i in range(n)])
    assert f"--config.data.calibration={proposed:g} " in README
    assert "# prints your training command: take that one" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not [link for link in links if link and ":" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_commands_have_known_flags_and_recipes(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S) for line in block.splitlines()]
    for line in lines:
        command = re.match(r"\s*(?:jmae|python -m jmae\.(?:data\.)?)\s?(\w+)([^#;&|>]*)", line)
        if command and command[1] in cli.COMMANDS:
            arguments = re.sub(r"--config[= ]\S+\.py\S*", "", command[2])  # a recipe of the page
            cli.check_flags(command[1], arguments.split())


def shown(figure: dict) -> str:
    """An AUROC as the README writes it."""
    short = lambda value: f"{value:.3f}".removeprefix("0")
    ends = figure.get("auroc_ci")
    return short(figure["auroc"]) + (f" [{short(ends[0])}, {short(ends[1])}]" if ends else "")


@pytest.mark.parametrize("system", [name for name in recipe.SYSTEMS if name not in recipe.RIVALS])
def test_the_figures_of_the_five_systems_are_those_of_the_result_files(system):
    if system == "maemi":
        case = json.loads((RESULTS / "maemi.json").read_text())["mri3d, FLAIR and T1c"]
        own, baselines = case["pixel"], {name: one for name, one in case["baselines"].items() if one}
    else:
        methods = json.loads((RESULTS / "packs.json").read_text())["cxr_peds"]["methods"]
        own = methods[{"memmc_mae": "memmc", "amae": "amae, tokens_ridge"}.get(system, system)]
        baselines = {name: one for name, one in methods.items() if not one["trained"]}
        if system != "amae":  # this one learns from unlabelled images, as AMAE alone does
            del baselines["ridge, unlabelled"]
    best = max(baselines, key=lambda name: baselines[name]["auroc"])
    (line,) = [line for line in README.splitlines() if f"docs/explanation/{system}.md" in line and line.startswith("|")]
    cells = [cell.strip().replace("**", "") for cell in line.split("|")]
    assert cells[3] == shown(own)
    assert cells[4] == f"{shown({'auroc': baselines[best]['auroc']})} {best}"
    assert ("**" in line.split("|")[3]) == (own["auroc"] > baselines[best]["auroc"])
