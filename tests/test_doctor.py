"""The doctor on machines that are not there: facts made up, and probes of folders and processes made up."""

import json
import subprocess
import sys

import pytest

from jmae import doctor
from jmae.doctor import Answer, Facts, Gpu
from jmae.errors import exit_code

H100 = Gpu("NVIDIA H100", "580.65.06", 80.0, 9.0)
ON_CPU = Answer("cpu", [{"kind": "cpu", "limit": None, "used": None}], "")
ON_GPU = Answer("gpu", [{"kind": "NVIDIA H100", "limit": 64 * 2**30, "used": 2**29}], "")
PIP = f"{sys.executable} -m pip install"


def facts(answer=ON_CPU, gpus=(), tpu=False, gib=(32.0, 20.0), variables=None, **packages):
    """A sound machine, but for what is given; packages by their names with _ for -."""
    versions = dict.fromkeys(doctor.PACKAGES, "1.0") | dict.fromkeys(doctor.PLUGINS, "")
    versions |= {"jax": "0.10.2", "jaxlib": "0.10.2"} | {k.replace("_", "-"): v for k, v in packages.items()}
    return Facts(versions, variables or {}, gpus, tpu, gib, answer)


def one(*args, **kwargs):
    (line,) = doctor.findings(facts(*args, **kwargs))
    return line


def test_a_machine_without_an_accelerator_and_one_with_all_it_needs_have_no_findings():
    assert doctor.findings(facts()) == []
    assert doctor.findings(facts(ON_GPU, [H100], jax_cuda13_plugin="0.10.2")) == []
    assert doctor.findings(facts(Answer("tpu", [], ""), tpu=True, libtpu="0.0.42")) == []
    assert doctor.findings(facts(variables={"JAX_PLATFORMS": "cpu", "XLA_CLIENT_MEM_FRACTION": ".9"})) == []


@pytest.mark.parametrize(
    "gpu, extra",
    [
        (H100, "cuda13"),
        (H100._replace(driver="570.86.15"), "cuda12"),
        (H100._replace(driver="525.60.13"), "cuda12"),
        (Gpu("Tesla V100", "580.65.06", 32.0, 7.0), "cuda12"),
        (Gpu("NVIDIA GPU", "", None, None), "cuda12"),
        (Gpu("NVIDIA GPU", "590.10", None, None), "cuda12"),
    ],
)
def test_without_a_plugin_the_line_names_the_extra_that_driver_and_card_allow(gpu, extra):
    line = one(gpus=[gpu])
    assert f"{gpu.name} is not used: jaxlib 0.10.2 has no CUDA plugin: {PIP} 'jmae[{extra}]'" == line


@pytest.mark.parametrize(
    "gpu, words",
    [
        (
            H100._replace(driver="525.60.12"),
            "its driver 525.60.12 is older than 525.60.13: install a newer NVIDIA driver",
        ),
        (H100._replace(driver="470.82"), "its driver 470.82 is older than 525.60.13"),
        (Gpu("Tesla K80", "470.82", 12.0, 3.7), "its compute capability 3.7 is below 5.2, so JAX cannot use it"),
    ],
)
def test_a_driver_or_a_card_that_is_too_old_is_said(gpu, words):
    assert words in one(gpus=[gpu]) and words in one(gpus=[gpu], jax_cuda12_plugin="0.10.2")


def test_what_keeps_an_installed_plugin_from_the_gpu_is_said():
    gpu = lambda answer=ON_CPU, card=H100, **more: one(answer, [card], **more)
    cuda13 = {"jax_cuda13_plugin": "0.10.2"}
    assert "JAX_PLATFORMS=cpu excludes it: unset JAX_PLATFORMS" in gpu(variables={"JAX_PLATFORMS": "cpu"}, **cuda13)
    both = gpu(variables={"JAX_PLATFORMS": "cpu"})
    assert "unset JAX_PLATFORMS, and" in both and "'jmae[cuda13]'" in both
    old = gpu(card=H100._replace(driver="550.54"), **cuda13)
    assert "its driver 550.54 is older than 580, too old for the CUDA 13 that is installed" in old and "[cuda12]" in old
    assert "compute capability 7 is too low for the CUDA 13" in gpu(card=H100._replace(capability=7.0), **cuda13)
    assert f"its plugin 0.9.0 does not fit jaxlib 0.10.2: {PIP} 'jmae[cuda13]'" in gpu(jax_cuda13_plugin="0.9.0")
    assert "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt" in gpu(jax_cuda12_plugin="0.10.2", **cuda13)
    assert "CUDA_VISIBLE_DEVICES='' hides it" in gpu(variables={"CUDA_VISIBLE_DEVICES": ""}, **cuda13)
    failed = Answer("", [], "Traceback\n  in line\nRuntimeError: cuDNN of version 8\n\n")
    path = gpu(failed, variables={"LD_LIBRARY_PATH": "/usr/local/cuda-11"}, **cuda13)
    assert "JAX reports “RuntimeError: cuDNN of version 8”: unset LD_LIBRARY_PATH" in path
    assert "“RuntimeError: cuDNN of version 8”: end other processes" in gpu(failed, **cuda13)


def test_the_compiler_for_gpus_alone_is_no_finding_without_a_gpu_and_lacks_libraries_with_one():
    plugin = {"jax_cuda12_plugin": "0.10.2"}
    said = (
        "RuntimeError: cudaRuntimeGetVersion failed\n\nTraceback\nRuntimeError: Unable to load CUDA. Is it installed?"
    )
    here = facts(ON_CPU._replace(stderr=said), **plugin)
    assert doctor.findings(here) == []
    (line,) = [line for line in doctor.fact_lines(here) if line.startswith("plugins")]
    assert line.startswith("plugins    jax-cuda12-plugin 0.10.2 (without an NVIDIA GPU:") and "jmae.plan" in line
    line = one(ON_CPU._replace(stderr=said), [H100._replace(driver="570.86.15")], **plugin)
    assert line.endswith(
        f"NVIDIA's libraries are not installed (the extra plan-gpu does not install them): {PIP} 'jmae[cuda12]'"
    )
    assert "without an NVIDIA GPU" not in "".join(doctor.fact_lines(facts(ON_GPU, [H100], **plugin)))
    assert "none: JAX uses the CPU" in "".join(doctor.fact_lines(facts()))


def test_a_tpu_that_is_not_used_is_said():
    assert one(tpu=True) == f"a TPU is not used: libtpu is not installed: {PIP} 'jmae[tpu]'"
    assert "JAX_PLATFORMS=cpu excludes it" in one(tpu=True, variables={"JAX_PLATFORMS": "cpu"})
    assert "end other processes that use it" in one(Answer("cpu", [], "in use"), tpu=True, libtpu="0.0.42")


def test_packages_and_platforms_that_do_not_start_are_said():
    assert f"jax 0.10.2 and jaxlib 0.9.0 do not fit each other: {PIP} --upgrade jax jaxlib" == one(jaxlib="0.9.0")
    broken = Answer("", [], "RuntimeError: Unknown backend cuda")
    line = one(broken, variables={"JAX_PLATFORMS": "cuda"})
    assert line == "JAX does not start: “RuntimeError: Unknown backend cuda”: unset JAX_PLATFORMS=cuda"
    assert "--upgrade jax jaxlib" in one(broken)
    assert one(nibabel="", flax="") == f"flax, nibabel not installed: {PIP} --upgrade flax nibabel"


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "90%"}, "XLA_PYTHON_CLIENT_MEM_FRACTION='90%' is not a share"),
        ({"XLA_CLIENT_MEM_FRACTION": "0"}, "XLA_CLIENT_MEM_FRACTION='0' is not a share"),
        ({"XLA_CLIENT_MEM_FRACTION": ".5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "are both set"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "fast"}, "XLA_PYTHON_CLIENT_ALLOCATOR=fast is unknown"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "is slow: unset it"),
    ],
)
def test_flags_of_the_allocator_that_are_wrong_or_slow_are_said(variables, words):
    assert words in one(ON_GPU, [H100], variables=variables, jax_cuda13_plugin="0.10.2")


def test_little_free_memory_is_said():
    assert "1.5 GiB of host memory are free, below 4" in one(gib=(8.0, 1.5))
    assert doctor.findings(facts(gib=None)) == []


# Probes


def finished(out="", err="", code=0):
    return subprocess.CompletedProcess([], code, out, err)


def test_gpus_are_read_of_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    told = "NVIDIA H100, 580.65.06, 81920, 9.0\nGrid, 535.1, [N/A], [N/A]\n"
    monkeypatch.setattr(doctor, "run", lambda *_: finished(told))
    assert doctor.gpus(tmp_path) == [H100, Gpu("Grid", "535.1", None, None)]
    monkeypatch.setattr(doctor, "run", lambda *_: finished("Failed to initialize NVML", code=9))
    assert doctor.gpus(tmp_path) == []


def test_without_nvidia_smi_gpus_are_those_of_the_driver_or_of_dev(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.gpus(tmp_path) == []
    (tmp_path / "dev").mkdir()
    for node in ("nvidia0", "nvidiactl"):
        (tmp_path / "dev" / node).touch()
    assert doctor.gpus(tmp_path) == [Gpu(f"the NVIDIA GPU at {tmp_path}/dev/nvidia0", "", None, None)]
    proc = tmp_path / "proc" / "driver" / "nvidia"
    (proc / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (proc / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    (proc / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA A100\nIRQ: 12\n")
    assert doctor.gpus(tmp_path) == [Gpu("NVIDIA A100", "535.104.05", None, None)]


def test_a_tpu_is_told_from_googles_other_devices_on_the_bus(tmp_path):
    assert not doctor.has_tpu(tmp_path / "none")
    for name, vendor, device in (("a", "0x8086", "0x0063"), ("b", "0x1ae0", "0x0042"), ("c", "0x1ae0", "0x0063")):
        assert not doctor.has_tpu(tmp_path)
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n"), (tmp_path / name / "device").write_text(f"{device}\n")
    assert doctor.has_tpu(tmp_path)


def test_host_memory_is_read_in_gib(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   2097152 kB\n")
    assert doctor.host_memory(tmp_path / "meminfo") == (32.0, 2.0)
    assert doctor.host_memory(tmp_path / "none") is None


def test_jax_is_asked_without_taking_the_gpu_and_its_failure_is_an_answer(monkeypatch):
    asked = {}

    def run(command, seconds, environment):
        asked.update(environment)
        return finished("a log line\n" + json.dumps({"backend": "cpu", "devices": []}), "warning")

    monkeypatch.setattr(doctor, "run", run)
    assert doctor.ask_jax() == Answer("cpu", [], "warning") and asked["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setattr(doctor, "run", lambda *_: finished(err="no jax", code=1))
    assert doctor.ask_jax() == Answer("", [], "no jax")
    monkeypatch.setattr(doctor, "run", lambda *_: finished(code=-11))
    assert doctor.ask_jax() == Answer("", [], "ended with exit code -11 and without a message")
    monkeypatch.setattr(doctor, "run", lambda *_: None)
    assert doctor.ask_jax().stderr == "no answer within 120 s"


def test_a_package_that_cannot_be_imported_is_named_with_its_cause_and_not_jax(tmp_path, monkeypatch):
    """A real process, with packages before the installed ones that fail as damaged ones do."""
    folder = tmp_path / "broken"
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name, text, why in (
        ("numpy", "raise ImportError('numpy.core: wrong ELF class')", "ImportError: numpy.core: wrong ELF class"),
        ("scipy", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("jaxlib", "import os; raise OSError('libjax.so: file too short')", "OSError: libjax.so: file too short"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
        answer = doctor.ask_jax()
        assert answer.broken == f"{name} cannot be imported ({why})" and not answer.backend
        assert one(answer) == f"{answer.broken}: install it anew: {PIP} --force-reinstall {name}"
        (folder / name / "__init__.py").unlink()
        (folder / name).rmdir()
    assert doctor.findings(facts(Answer("", [], "", "flax cannot be imported (x)"), flax="")) == [
        f"flax not installed: {PIP} --upgrade flax"
    ]


def test_flags_with_which_jax_does_not_start_are_named(monkeypatch):
    asked = []

    def run(command, seconds, environment):
        asked.append("XLA_FLAGS" in environment)
        flags = "F0000 parse_flags_from_env.cc: Unknown flag in XLA_FLAGS: --xla_x=1"
        return (
            finished(json.dumps({"backend": "cpu", "devices": []})) if not asked[-1] else finished(err=flags, code=-6)
        )

    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    monkeypatch.setattr(doctor, "run", run)
    answer = doctor.ask_jax()
    assert asked == [True, False] and answer.without_flags
    line = one(answer, variables={"XLA_FLAGS": "--xla_x=1"})
    assert line.startswith("JAX does not start with XLA_FLAGS=--xla_x=1: “F0000") and line.endswith("or correct it")


def test_a_process_that_hangs_or_is_not_there_is_none():
    assert doctor.run([sys.executable, "-c", "import time; time.sleep(9)"], 0.2) is None
    assert doctor.run(["/no/such/program"], 1) is None


def test_the_command_says_what_it_found_and_ends_with_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "probe", lambda: facts(gpus=[H100], variables={"XLA_FLAGS": "--xla_x=1"}))
    assert exit_code(doctor.main, []) == 1
    said = capsys.readouterr().out
    assert "gpu        NVIDIA H100, driver 580.65.06, 80.0 GiB, compute capability 9" in said
    assert "set        XLA_FLAGS=--xla_x=1" in said and "\n1 finding\n" in said
    assert "finding: NVIDIA H100 is not used: jaxlib 0.10.2 has no CUDA plugin" in said
    monkeypatch.setattr(doctor, "probe", lambda: facts(ON_GPU, [H100], jax_cuda13_plugin="0.10.2", jmae=""))
    assert exit_code(doctor.main, []) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("next: jmae quickstart NORMALS NEW")
    assert "device   NVIDIA H100, 64.0 GiB for JAX, 0.5 GiB in use" in said and "jmae MISSING" in said
    assert "XLA_CLIENT_MEM_FRACTION=.9" in said and "no problem was found" in said
    assert exit_code(doctor.main, ["--fix"]) == 2


def test_this_machines_own_packages_are_found():
    versions = doctor.versions()
    assert all(versions[name] for name in doctor.PACKAGES) and set(versions) == {*doctor.PACKAGES, *doctor.PLUGINS}
    assert doctor.variables({"JAX_PLATFORMS": "cpu", "HOME": "/root"}) == {"JAX_PLATFORMS": "cpu"}
