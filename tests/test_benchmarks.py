"""The benchmarks' page and tables; no figure of theirs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import nibabel as nib
import numpy as np
import pytest

from benchmarks import against_plan, border, cpu, maemi
from benchmarks.__main__ import GPU, PAGE, PARTS, RESULTS, SCRIPTS, page, summary
from benchmarks.timing import ratio
from jmae import recipe
from jmae.systems.amae import networks_of

ROWS_OF_SPLIT = {"train": range(10), "unlabeled": range(10, 20), "test": range(20, 24)}
MACHINE = {"processor": "P", "cores": 2, "memory_gib": 8.0, "load": 3.14, "environment": {}}
ABOUT = {"date": "2026-01-02", "machine": MACHINE, "versions": {"jax": "0.10.2"}}


def contestant(*seconds, cpu=1.0):
    return {"seconds": list(seconds), "median_s": sorted(seconds)[len(seconds) // 2], "cpu_median_s": cpu}


def test_the_page_of_no_results_says_of_every_part_that_it_was_not_run(tmp_path):
    text = page(tmp_path)
    assert all(f"not run: `{part.command}`" in text for part in PARTS)
    assert text.count("`bash benchmarks/gpu.sh` needs an NVIDIA GPU") == 2 * len(GPU)  # at the top and in their section


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
    with pytest.raises(SystemExit, match=r"masks\.json: not JSON .*: restore it, or delete it"):
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


def plan_of(recipe, stage, batch, kernels_s, launches_s):
    step_s = max(kernels_s, launches_s)
    times = {"kernels_s": kernels_s, "launches_s": launches_s, "step_s": step_s}
    return {"recipe": recipe, "stage": stage, "target": "h200:1", "batch": batch, **times}


def step_on(device, batch, seconds):
    return {"contestants": {"jmae": {"device": device, "batch": batch, "median_s": seconds}}}


def test_a_measured_step_stands_beside_its_plan(tmp_path, monkeypatch, capsys):
    plans = [
        plan_of("maemi", "train", 6, 0.005, 0.001),
        plan_of("amae", "module_a", 16, 0.002, 0.004),  # its launches take longer than its kernels
        plan_of("amae", "module_b", 16, 0.002, 0.004),
        plan_of("ppii, unet", "train", 16, 0.02, 0.001),
    ]
    kept = {"papers' recipes on one GPU": {"plans": {str(k): plan for k, plan in enumerate(plans)}}}
    steps = {
        "train, paper, batch 6, cuda": step_on("NVIDIA H200", 6, 0.006),
        "train, paper, batch largest, cuda": step_on("NVIDIA H200", 96, 0.08),
        "amae, paper, cuda": step_on("NVIDIA H200", 16, 0.01),
        "ppii, paper, cuda": step_on("NVIDIA A100-SXM4-80GB", 16, 0.05),
        "ppii, paper, cpu": step_on("cpu", 2, 9.0),
        "amae, small, cuda": step_on("NVIDIA H200", 16, 9.0),
    }
    files = {"plans": kept, "volume": steps}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = ["against_plan", f"--plans={tmp_path}/plans.json", f"--out={tmp_path}/out.json"]
    monkeypatch.setattr(sys, "argv", [*command, "--tables", f"{tmp_path}/volume.json", f"{tmp_path}/absent.json"])
    assert against_plan.main() == 0
    out = json.loads((tmp_path / "out.json").read_text())["steps, cuda"]
    head, rows = out["table"]
    found = [[row[0], row[1], *row[3:5], *row[7:9]] for row in rows]
    assert head[7:9] == ["planned ms", "measured / planned"]
    assert found == [
        ["maemi", "train", 6, 6.0, 5.0, pytest.approx(1.2)],
        ["maemi", "train", 96, 80.0, 5.0, "not compared: the plan's batch is 6"],
        ["amae", "module_a", 16, 10.0, 4.0, pytest.approx(2.5)],
        ["amae", "module_b", 16, "not run", 4.0, ""],
        ["ppii, unet", "train", 16, "not run", 20.0, ""],
        ["ppii, unet", "train", 16, 50.0, "", "no plan for NVIDIA A100-SXM4-80GB"],
    ]
    assert "not compared" in capsys.readouterr().out


def test_without_a_step_on_a_gpu_no_table_is_written(tmp_path, monkeypatch, capsys):
    plans = {"papers' recipes on one GPU": {"plans": {"0": plan_of("maemi", "train", 6, 0.005, 0.001)}}}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    command = ["against_plan", f"--plans={tmp_path}/plans.json", f"--out={tmp_path}/out.json"]
    monkeypatch.setattr(sys, "argv", [*command, "--tables", f"{tmp_path}/absent.json"])
    assert against_plan.main() == 3
    assert "not run" in capsys.readouterr().out and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("limit", "some"), [("590", False), ("590", True), ("15", False)])
def test_the_script_for_a_gpu_runs_its_parts_in_order(tmp_path, limit, some):
    """With an nvidia-smi and a Python that only say how they were called; infer fails."""
    python = tmp_path / "python"
    python.write_text(f'[ "$1" = -c ] && exit\necho "$*" >> {tmp_path}/log\ncase $* in *infer*) exit 1 ;; esac\n')
    (tmp_path / "nvidia-smi").write_text("echo H200\n")
    for name in ("python", "nvidia-smi"):
        (tmp_path / name).write_text("#!/bin/sh\n" + (tmp_path / name).read_text())
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    script = ["bash", str(Path(against_plan.__file__).parent / "gpu.sh"), *(["demo", "plans"] if some else [])]
    ran = subprocess.run(script, env=os.environ | settings | {"LIMIT": limit}, capture_output=True, text=True)
    log = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    log = [name.removeprefix("benchmarks.") for name in log]
    if some:
        assert log == ["demo", "against_plan"] and ran.returncode == 0
    elif limit == "15":  # less than a part takes; the plans take seconds
        assert log == ["against_plan"] and ran.stdout.count("not run, no time left") == 13 and ran.returncode == 1
    else:
        steps = ["throughput"] * 4
        order = ["volume", "demo", "volume", "volume", *steps, "volume", "masks", "anomalies", "memmc", "memmc"]
        assert log == [*order, "against_plan"]
        assert "infer: FAILED, exit code 1" in ran.stdout and "plans: done" in ran.stdout and ran.returncode == 1


@pytest.mark.long
def test_the_paper_s_table_and_figure_say_their_hours_and_stop_without_a_gpu(tmp_path, monkeypatch, capsys):
    manifest = tmp_path / "m.csv"
    rows = ["id,patient,split,label,image,mask,region", *(f"t{i},p{i},train,0,t{i}.nii.gz,," for i in range(744))]
    manifest.write_text("\n".join([*rows, *(f"e{i},q{i},test,1,e{i}.nii.gz,," for i in range(100))]))
    for what, names in (("table2", ("8x8x2", "6x6x4", "24x24x4")), ("figure3", ("0.75", "0.95"))):
        argv = ["maemi", what, f"--manifest={manifest}", "--seeds=3", f"--workdir={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", argv)
        maemi.main()
        said = capsys.readouterr().out
        assert "744 training and 100 test rows, 3 seed(s)" in said and all(f"\n{name} " in said for name in names)
        assert said.endswith("not run: no GPU on this machine\n")
        hours = [float(line.split()[2]) + float(line.split()[3]) for line in said.splitlines()[2:-2]]
        assert float(said.split("at least ")[1].split()[0]) == pytest.approx(3 * sum(hours), rel=0.1)
    assert not (tmp_path / "runs").exists()


def test_the_estimate_counts_the_operations_of_the_compiled_step():
    """2.33 TFLOP: what the GPU compiler counts in the step of six crops (results/scaling.json)."""
    config = maemi.recipe.load("configs/maemi.py:paper")
    assert 6 * 3 * maemi.forward_flops(config) == pytest.approx(2.33e12, rel=0.1)
    training, scoring = maemi.estimate(config, 744, 100)
    assert training == pytest.approx(124_000 * 4.84e-3 / 3600, rel=0.1)
    assert scoring == pytest.approx(100 * 2400 * maemi.forward_flops(config) / maemi.RATE / 3600)  # 2400 windows each


def test_planted_lesions_are_found_from_any_folder(tmp_path, monkeypatch):
    """Paths of the written manifest hold where the folders were given as relative paths."""
    monkeypatch.chdir(tmp_path)
    Path("pack").mkdir()
    volume = np.random.default_rng(0).normal(100, 10, (20, 20, 12)).astype(np.float32)
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), f"pack/{name}.nii.gz")
    lines = ["id,image,mask,split,label", "a,a.nii.gz,,test,0", "b,b.nii.gz,,test,0"]
    Path("pack/manifest.csv").write_text("\n".join(lines) + "\n")
    written = maemi.plant_lesions(Path("pack/manifest.csv"), Path("runs"))
    planted, normal = csv.DictReader(written.read_text().splitlines())
    assert (planted["label"], normal["label"]) == ("1", "0")
    assert Path(planted["image"]) == tmp_path / "runs" / "a.nii.gz"
    changed = nib.load(planted["image"]).get_fdata() != volume
    assert changed.any() and nib.load(planted["mask"]).get_fdata().any()
    np.testing.assert_array_equal(nib.load(normal["image"]).get_fdata(), volume)


def test_the_score_without_the_border_does_not_depend_on_the_border():
    """Neither by the tokens nor by the numbers that standardise an image."""
    config = recipe.load("configs/amae.py:smoke")
    networks, size = networks_of(config), tuple(config.data.size)
    rng, ring = np.random.default_rng(0), config.model.patch[0]
    images = rng.uniform(size=(24, *size, config.data.channels)).astype(np.float32)
    changed = images.copy()
    for edge in (slice(None, ring), slice(-ring, None)):
        changed[:, edge], changed[:, :, edge] = rng.uniform(size=2)
    rows = {name: [SimpleNamespace(id=f"{name}{i}", at=i) for i in r] for name, r in ROWS_OF_SPLIT.items()}

    def scores(array, rings):
        of = lambda rows: SimpleNamespace(rows=rows, image=lambda numbers: array[[rows[i].at for i in numbers]])
        params = {"module_b": networks.mae_init(jax.random.key(0))[0]}
        run = SimpleNamespace(config=config, networks=networks, rows=rows, params=params)
        run.cases = SimpleNamespace(images=of)
        return np.array(list(border.scores_of(run, "module_b", rings).values()))

    np.testing.assert_allclose(scores(images, 1), scores(changed, 1), atol=1e-5)
    assert not np.allclose(scores(images, 0), scores(changed, 0), atol=1e-2)
