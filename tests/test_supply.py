"""What is installed: the lock files, their bill of materials, and no network while jmae works."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOCKS = "requirements.lock", "requirements-dev.lock"
packages, bill = (runpy.run_path(str(ROOT / "launch" / "sbom.py"))[name] for name in ("packages", "bill"))


@pytest.mark.parametrize("file", LOCKS)
def test_every_package_of_the_lock_files_has_hashes(file):
    found = packages((ROOT / file).read_text())
    assert len(found) > 50 and all(hashes for _, _, hashes in found)
    assert not re.search(
        r"^(-e|--(extra-)?index-url|--trusted-host|[^#\s].*(://| @ ))", (ROOT / file).read_text(), re.M
    )


def test_the_lock_files_hold_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = lambda text: re.match(r"[\w.-]+", text)[0].lower().replace("_", "-")
    asked = {plain(text) for text in project["dependencies"]}
    locked, dev = ({name.lower() for name, _, _ in packages((ROOT / file).read_text())} for file in LOCKS)
    assert asked <= locked <= dev
    assert {plain(text) for text in project["optional-dependencies"]["dev"]} <= dev


def test_the_demo_and_the_tests_install_by_hashes():
    make = (ROOT / "Makefile").read_text()
    for file in LOCKS:
        assert f"--require-hashes --requirement {file}" in make
    assert "pip-audit" in make


def test_the_bill_of_materials_lists_each_package_with_its_hashes():
    done = subprocess.run([sys.executable, ROOT / "launch" / "sbom.py"], capture_output=True, text=True, check=True)
    made, text = json.loads(done.stdout), (ROOT / LOCKS[0]).read_text()
    assert made == bill(text) and made["bomFormat"] == "CycloneDX"
    assert [c["purl"] for c in made["components"]] == [f"pkg:pypi/{n}@{v}" for n, v, _ in packages(text)]
    assert bill("a==1 \\\n    --hash=sha256:" + "0" * 64)["components"][0]["hashes"][0]["content"] == "0" * 64


NO_NETWORK = """
import socket
def refuse(*_): raise SystemExit("a connection was opened")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
import jmae, jmae.train, jmae.evaluate, jmae.predict, jmae.export, jmae.plan, jmae.doctor, jmae.data.check
"""


def test_importing_jmae_opens_no_connection():
    subprocess.run([sys.executable, "-c", NO_NETWORK], cwd=ROOT, check=True, timeout=120)


def test_the_container_and_the_conda_environment_install_by_the_lock_file_a_python_and_extras_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    docker, conda = ((ROOT / name).read_text() for name in ("Dockerfile", "environment.yml"))
    python = project["project"]["requires-python"]
    listed = yaml.safe_load(conda)["dependencies"]
    assert listed[0] == f"python {python}" and listed[2]["pip"] == ["--require-hashes", f"--requirement {LOCKS[0]}"]
    assert f"--require-hashes --requirement {LOCKS[0]}" in docker
    low, high = (tuple(map(int, part.split("."))) for part in re.fullmatch(r">=([\d.]+),<([\d.]+)", python).groups())
    assert low <= tuple(map(int, re.search(r"^FROM python:([\d.]+)-slim AS cpu$", docker, re.M)[1].split("."))) < high
    extras = set(re.findall(r"\[(\w+)\]'", docker + conda))
    assert extras == {"cuda"} <= project["project"]["optional-dependencies"].keys()


def test_the_image_holds_what_the_wheel_is_built_from_and_no_scan():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    docker, ignored = ((ROOT / name).read_text().splitlines() for name in ("Dockerfile", ".dockerignore"))
    copied = {name for line in docker if line.startswith("COPY ") for name in line.split()[1:-1]}
    about = project["project"]
    needed = {"pyproject.toml", LOCKS[0], about["readme"], *about["license-files"]}
    assert copied == needed | {*project["tool"]["setuptools"]["package-dir"].values()}
    assert all((ROOT / name).exists() for name in copied)
    assert ignored[1] == "*" and {line[1:] for line in ignored if line.startswith("!")} == copied
