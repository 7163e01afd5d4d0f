"""The benchmarks' page and tables; no figure of theirs."""

import json

import pytest

from benchmarks import cpu
from benchmarks.__main__ import GPU, PAGE, PARTS, RESULTS, SCRIPTS, page, summary
from benchmarks.timing import ratio

MACHINE = {"processor": "P", "cores": 2, "memory_gib": 8.0, "load": 3.14, "environment": {}}
ABOUT = {"date": "2026-01-02", "machine": MACHINE, "versions": {"jax": "0.10.2"}}


def contestant(*seconds, cpu=1.0):
    return {"seconds": list(seconds), "median_s": sorted(seconds)[len(seconds) // 2], "cpu_median_s": cpu}


def test_the_page_of_no_results_says_of_every_part_that_it_was_not_run(tmp_path):
    text = page(tmp_path)
    assert all(f"not run: `{part.command}`" in text for part in PARTS)
    assert text.count("`bash benchmarks/gpu.sh` takes an NVIDIA GPU") == 2 * len(GPU)  # at the top and in their section


def test_a_case_stands_on_the_page_with_command_date_machine_and_load(tmp_path):
    fast, slow = contestant(1.0, 2.0, 3.0), contestant(2.0, 4.0, 9.0, cpu=5.0)
    case = {"command": "python -m benchmarks.masks --small", **ABOUT, "jmae": fast, "other": slow}
    case["other/jmae"] = ratio(slow, fast)
    (tmp_path / "masks.json").write_text(json.dumps({"a case": case}))
    text = page(tmp_path)
    assert "`python -m benchmarks.masks --small`, 2026-01-02, [1], load 3.1" in text
    assert "1. 2 x P, 8.0 GiB; jax 0.10.2" in text
    assert "| other | 4 | 5 |" in text
    assert "| other/jmae | 2 | 2 | 3 | 5 |" in text
    assert "not run: `python -m benchmarks.masks`" not in text
    assert "not run: `python -m benchmarks.parity`" in text


def test_a_run_with_more_options_counts_as_that_part_alone(tmp_path):
    case = {"command": "python -m benchmarks.throughput --systems small --cores 1", **ABOUT, "value": 1.5}
    (tmp_path / "throughput.json").write_text(json.dumps({"amae": case}))
    text = page(tmp_path)
    assert "not run: `python -m benchmarks.throughput --systems small`" not in text
    assert "not run: `python -m benchmarks.throughput`" in text


def test_another_part_of_the_same_script_is_not_run(tmp_path):
    case = {"command": "python -m benchmarks.memmc steps --batch 8", **ABOUT, "value": 1.5}
    (tmp_path / "memmc.json").write_text(json.dumps({"steps": case}))
    text = page(tmp_path)
    assert "not run: `python -m benchmarks.memmc steps`" not in text
    assert "not run: `python -m benchmarks.memmc scoring`" in text


def test_results_of_a_gpu_stand_in_a_section_of_their_own(tmp_path):
    case = {"command": "python -m benchmarks.volume check", **ABOUT, "device": "H", "table": [["a", "b"], [["x", 0.5]]]}
    (tmp_path / "volume_gpu.json").write_text(json.dumps({"check, cuda": case}))
    text = page(tmp_path)
    own = text.split("## volume on a GPU")[1].split("\n## ")[0]
    assert "| x | 0.5 |" in own and "not run" not in own
    assert ", H; jax 0.10.2" in text


def test_the_page_is_that_of_the_results_beside_it():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), "python -m benchmarks --render"


def test_a_torn_result_file_is_one_line(tmp_path):
    (tmp_path / "masks.json").write_text('{"a": ')
    with pytest.raises(SystemExit, match=r"masks\.json: is no JSON .*: restore it, or delete it"):
        page(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_part_has_a_script_that_says_what_it_measures(script):
    assert len(summary(script)) > 20


@pytest.mark.parametrize(("times", "met"), [(4.9, "no"), (5.0, "at least 5"), (9.9, "at least 5"), (10.0, "yes")])
def test_a_goal_is_met_from_its_figure_on(times, met):
    theirs, ours = contestant(times, times, times), contestant(1.0, 1.0, 1.0)
    line = cpu.row("composites", "pie-torch", theirs, ours, ratio(theirs, ours))
    assert line[-2:] == ["10, at least 5", met]


def test_what_stands_between_adds_up_to_the_difference_of_the_steps():
    named = {"jmae": 5.0, "tuned": 4.0, "jmae attention": 1.0, "torch attention": 0.75}
    named |= {"jmae products": 3.0, "torch products": 2.75}
    rows = cpu.between("vit_s", {name: contestant(s, s, s) for name, s in named.items()}, "tuned", "median_s")
    assert [row[1:4] for row in rows] == [
        ["attention", 0.75, 1.0],
        ["products", 2.75, 3.0],
        ["rest", 0.5, 1.0],
        ["step", 4.0, 5.0],
    ]
    assert [row[4:] for row in rows] == [["20%", "25%"], ["60%", "25%"], ["20%", "50%"], ["100%", ""]]
