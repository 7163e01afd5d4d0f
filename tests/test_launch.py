"""The files of launch/: each command's recipe divides among its own devices; wrong use is one line."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jmae import recipe
from jmae.errors import InputError
from jmae.system import load_system
from jmae.train import check_batches

LAUNCH = Path(__file__).parents[1] / "launch"


def command(name: str) -> tuple[list[str], int]:
    """(arguments of the training command that a file names, the number of its devices)."""
    text = (LAUNCH / name).read_text()
    number = lambda pattern: int(re.search(pattern, text)[1])
    if name == "jobset.yaml":
        return re.findall(r"- (--\S+)", text), number(r"parallelism: (\d+)") * number(r"nvidia.com/gpu: (\d+)")
    line = next(line for line in text.replace("\\\n#", "").splitlines() if "--config " in line and "launch/" in line)
    words = shlex.split(line, comments=False)
    devices = {
        "local.sh": lambda: number(r"launch/local.sh (\d+)"),
        "slurm.sbatch": lambda: number(r"--nodes=(\d+)") * number(r"--gpus-per-node=(\d+)"),
        "tpu.sh": lambda: number(r"of (\d+) chips"),
    }
    return words[words.index("--config") :], devices[name]()


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".py"))
def test_the_batches_of_a_launch_file_divide_among_its_devices(name):
    arguments, devices = command(name)
    config, flags = recipe.parse(arguments, "", ["workdir"])
    config.model.depth = config.model.decoder_depth = 1  # which batches do not depend on
    assert devices > 1 and config.data.manifest and "workdir" in flags
    system = load_system(config)
    check_batches(system, devices)
    system = replace(system, stages=(replace(system.stages[0], batch=6),))  # the paper's
    with pytest.raises(InputError, match=f"stage train: a batch of 6 is not divisible by {devices} devices: use a mul"):
        check_batches(system, devices)


@pytest.mark.parametrize("given", [[], ["0", "--config=x"], ["--config", "x"], ["2"]])
def test_local_sh_without_a_number_of_processes_is_one_line(given):
    done = subprocess.run(["bash", str(LAUNCH / "local.sh"), *given], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["local.sh", "tpu.sh"])
def test_help_shows_how_to_start(name):
    done = subprocess.run(["bash", str(LAUNCH / name), "--help"], capture_output=True, text=True, check=True)
    assert f"launch/{name}" in done.stdout and "set -" not in done.stdout and not done.stderr


def test_slurm_hands_its_cores_to_srun(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK $*"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "8"}
    words = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "x"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["8", "--kill-on-bad-exit=1", "python", "-m", "jmae.train", "--config", "x"]
