"""The claims of `make gpu-check`: each is a line where it does not hold."""

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import FLASH, Case

CASE = Case("maemi:paper", "train", True, 100, 2.0, "h200:8", sent={"all-reduce over 8": (2, 0.5)})
SOUND = {
    "fits": True,
    "total": 8e9,
    "limit": 9e9,
    "custom_calls": dict.fromkeys(FLASH, 12),
    "flops_compiled_chip": {"low": 990.0, "float32": 10.0},
    "float32_most_chip": 10.0,
    "padding_chip": 0.1e9,
    "traffic_chip": 2e9,
    "kernels": 100,
    "collectives": [
        {"kind": "all-reduce", "chips": 8, "count": 2, "bytes": 0.5e9},
        {"kind": "all-reduce", "chips": 8, "count": 3, "bytes": 12},  # of metrics
    ],
}


def test_a_program_at_all_its_bounds_violates_no_claim():
    assert gpu_check.violations("maemi", CASE, SOUND) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"fits": False}, "8 GB do not fit in 9"),
        ({"custom_calls": {FLASH[0]: 12}}, "cuDNN's attention is not called: __cudnn$fmhaSoftmaxBackward"),
        ({"float32_most_chip": 10.1}, "a kernel of float32 products does 1.0% of the FLOPs"),
        ({"padding_chip": 0.11e9}, "padding is 5.5% of the traffic"),
        ({"kernels": 101}, "101 kernels a step, more than 100"),
        ({"traffic_chip": 2.1e9}, "2.1 GB of traffic a step, more than 2"),
        ({"collectives": []}, "no all-reduce over 8 a step"),
    ],
)
def test_each_claim_that_does_not_hold_is_a_line(changes, said):
    assert gpu_check.violations("maemi", CASE, SOUND | changes) == [f"maemi, train: {said}"]


def test_collectives_that_are_not_listed_are_lines():
    more = [*SOUND["collectives"], {"kind": "all-gather", "chips": 8, "count": 1, "bytes": 1e6}]
    (line,) = gpu_check.violations("maemi", CASE, SOUND | {"collectives": more})
    assert line == "maemi, train: 1 all-gather over 8 of 0.001 GB a step, more than 0 of 0"
    more = [{"kind": "all-reduce", "chips": 8, "count": 3, "bytes": 0.5e9}]
    (line,) = gpu_check.violations("maemi", CASE, SOUND | {"collectives": more})
    assert line == "maemi, train: 3 all-reduce over 8 of 0.5 GB a step, more than 2 of 0.5"


def test_bounds_are_a_tenth_above_what_is_compiled_and_the_line_is_python():
    case = gpu_check.new_bounds(CASE, SOUND | {"kernels": 50, "traffic_chip": 1e9})
    assert (case.kernels, case.traffic, case.sent) == (55, 1.1, {"all-reduce over 8": (2, 0.55)})
    assert eval("{" + gpu_check.line("maemi on 8", case) + "}", {"Case": Case}) == {"maemi on 8": case}


def test_a_case_that_breaks_its_bound_ends_with_1_and_a_missing_compiler_with_2(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CASES", {"maemi": CASE})
    monkeypatch.setattr(gpu_check, "plan_of", lambda case: SOUND | {"peak_share": 0.5})
    assert gpu_check.main([]) == 0 and "all claims hold" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "plan_of", lambda case: SOUND | {"peak_share": 0.5, "kernels": 101})
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err == "maemi, train: 101 kernels a step, more than 100\n"
    monkeypatch.setattr(gpu_check, "plan_of", lambda case: "pip install 'jmae[plan-gpu]'")
    assert gpu_check.main([]) == 2
    monkeypatch.setattr(gpu_check, "plan_of", lambda case: "it crashed")
    assert gpu_check.main([]) == 1
