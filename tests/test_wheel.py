"""The wheel: built from a copy of the project, installed outside of it, and used there. Needs no network."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jmae.recipe import SYSTEMS

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel."""
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("jmae", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={out}", str(copy)]
    subprocess.run([*PIP, *build], check=True)
    (file,) = out.glob("jmae-*.whl")
    return file


@pytest.mark.long
def test_the_wheel_holds_every_module_recipe_and_template(wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "jmae").rglob("*") if file.is_file()}
    expected = {file for file in files if "__pycache__" not in file}
    assert {"jmae/py.typed", "jmae/cli.py"} <= expected
    assert there == expected | {f"jmae/recipes/{system}.py" for system in SYSTEMS}


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    read = lambda end: archive.read(next(name for name in archive.namelist() if name.endswith(end))).decode()
    assert "jmae = jmae.cli:run" in read("entry_points.txt")
    about = email.message_from_string(read("METADATA"))
    assert {"cuda", "cuda12", "cuda13", "tpu", "plan", "dev"} <= {*about.get_all("Provides-Extra")}
    assert "Typing :: Typed" in about.get_all("Classifier") and about.get_all("Project-URL")


def test_the_command_and_the_recipes_work_outside_of_a_clone(wheel, tmp_path):
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", f"--target={place}", str(wheel)], check=True)
    env = os.environ | {"PYTHONPATH": str(place)}

    def run(*command: str) -> str:
        return subprocess.run(command, env=env, cwd=empty, check=True, capture_output=True, text=True).stdout

    assert "train" in run(str(place / "bin" / "jmae"), "--help")
    ask = "import jmae; from jmae import recipe; print(jmae.__file__, recipe.load('amae:smoke').pretrain.steps)"
    assert run(sys.executable, "-c", ask).split() == [str(place / "jmae" / "__init__.py"), "20"]
