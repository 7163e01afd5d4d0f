"""Annotations are true: every stage and score is traced with all types checked, shapes of arrays included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmae.recipe import SYSTEMS

NETWORKS = ("maemi", "ppii", "simsid")  # in a GPU's form: attention, norms, convolutions


@pytest.mark.parametrize(
    "traced",
    [
        pytest.param(["cpu:maemi"], id="one"),
        pytest.param([f"cpu:{name}" for name in SYSTEMS if name != "maemi"], id="cpu", marks=pytest.mark.long),
        pytest.param([f"h200:{name}" for name in NETWORKS], id="gpu", marks=pytest.mark.long),
    ],
)
def test_every_stage_and_score_keeps_to_its_annotations_and_promotes_no_rank(traced):
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "tests" / "traced_with_checks.py", *traced]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-len(traced) :] == traced
