"""Annotations are true: every stage and score is traced with all types checked, shapes of arrays included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmae.system import SYSTEMS


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_every_stage_and_score_keeps_to_its_annotations_and_promotes_no_rank(target):
    command = [sys.executable, Path(__file__).with_name("traced_with_checks.py"), target, *SYSTEMS]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-len(SYSTEMS) :] == list(SYSTEMS)
