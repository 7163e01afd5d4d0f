"""The shortened scoreboard: a few faults of every class that is injected by a function (`make faults` injects all)."""

import re
from pathlib import Path

import pytest
from faults.injected import CLASSES, inject

SEED = 1


def test_there_are_thirty_classes_and_each_injects_something():
    assert list(CLASSES) == list(range(1, 31))
    assert all(one.inject or one.tests for one in CLASSES.values())


@pytest.mark.parametrize("number", [number for number, one in CLASSES.items() if one.inject])
def test_no_fault_is_silent_or_ends_in_a_traceback(number, tmp_path):
    tally = inject(number, SEED, 0.04, tmp_path)
    assert not tally.silent and not tally.tracebacks
    assert tally.caught == tally.injected > 0


def test_every_test_that_the_scoreboard_names_is_there():
    for one in CLASSES.values():
        for name in one.tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (Path(__file__).parents[1] / file).read_text(), name


def test_each_promise_of_the_security_page_names_a_test_that_is_there():
    root = Path(__file__).parents[1]
    rows = [
        line for line in (root / "SECURITY.md").read_text().splitlines() if line.startswith("| ") and "test" in line
    ]
    named = [re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", line) for line in rows if line != "| promise | test |"]
    assert len(named) > 20 and all(named)
    for file, test in (one for line in named for one in line):
        assert f"def {test}(" in (root / file).read_text() if test else (root / file).is_file(), (file, test)
