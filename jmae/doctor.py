"""python -m jmae.doctor [--debug]

Shows the versions, devices and memory that jmae uses. If JAX uses the CPU although there is an accelerator, it says why
and names the command that corrects it. JAX is started in a separate process, which reserves no GPU memory in advance.

Exit codes: 0 no problem was found; 1 there are findings; 2 the command line is wrong.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jmae import recipe
from jmae.errors import exit_code
from jmae.tables import counted

PACKAGES = "jmae jax jaxlib flax optax orbax-checkpoint grain numpy scipy scikit-image nibabel pydicom".split()
PLUGINS = "jax-cuda12-plugin jax-cuda13-plugin libtpu".split()
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
ALLOCATORS = ("default", "bfc", "cuda_async", "platform", "vmm")
VARIABLES = (
    *"JAX_PLATFORMS JAX_PLATFORM_NAME JAX_COMPILATION_CACHE_DIR CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH XLA_FLAGS".split(),
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", *FRACTIONS),
)
TPUS = "0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076".split()  # PCI ids of Google's, v3 to v7, as JAX knows them
# The oldest driver and compute capability that JAX's wheels run on (JAX's installation guide), newest CUDA first.
CUDA = {"cuda13": ((580,), 7.5), "cuda12": ((525, 60, 13), 5.2)}
SECONDS = 120  # for JAX to find its devices, at most
NEXT = "next: jmae quickstart NORMALS NEW, with a folder of normal scans and one of new scans"
LEAST_GIB = 4.0  # GiB of free host memory, at least; the demo needs less

# Imports each package before JAX starts, as a damaged one may only fail there; numpy comes first, as others import it.
MODULES = "numpy scipy jaxlib jax flax optax orbax.checkpoint grain skimage nibabel pydicom ml_collections".split()
ASK = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(json.dumps({"broken": name, "why": f"{type(error).__name__}: {error}"}))
        sys.exit()
import jax
devices = jax.devices()
stats = [device.memory_stats() or {} for device in devices]
print(json.dumps({"backend": jax.default_backend(), "devices": [
    {"kind": d.device_kind, "limit": s.get("bytes_limit"), "used": s.get("bytes_in_use")}
    for d, s in zip(devices, stats)]}))
"""


class Gpu(NamedTuple):
    """An NVIDIA GPU, as its driver describes it."""

    name: str
    driver: str  # version; "" where not known
    gib: float | None  # memory
    capability: float | None  # compute capability


class Answer(NamedTuple):
    """What JAX reports."""

    backend: str  # "cpu", "gpu", "tpu"; "" where it did not start
    devices: list[dict[str, Any]]  # "kind"; "limit" and "used", bytes of memory or None
    stderr: str
    broken: str = ""  # the first of `MODULES` that cannot be imported, and why
    without_flags: bool = False  # whether JAX starts, though only without XLA_FLAGS


class Facts(NamedTuple):
    """Everything that `findings` looks at."""

    versions: Mapping[str, str]  # of `PACKAGES` and `PLUGINS`; "" where not installed
    variables: Mapping[str, str]  # those of `VARIABLES` that are set
    gpus: Sequence[Gpu]
    tpu: bool
    host_gib: tuple[float, float] | None  # all and free memory; None where not known
    answer: Answer


def main(argv: list[str]) -> int:
    recipe.arguments(argv, __doc__, ["debug"])
    facts = probe()
    problems = findings(facts)
    lines = fact_lines(facts)
    print("\n".join([*lines, "", *(f"finding: {problem}" for problem in problems)] if problems else lines))
    print(counted(len(problems), "findings") if problems else "no problem was found")
    print("next: correct the findings" if problems else NEXT)
    return int(bool(problems))


# --- probes -----------------------------------------------------------------------------------------------------------


def probe() -> Facts:
    """The facts of this machine."""
    return Facts(versions(), variables(os.environ), gpus(), has_tpu(), host_memory(), ask_jax())


def versions() -> dict[str, str]:
    """The installed versions of `PACKAGES` and `PLUGINS`; "" where not installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in (*PACKAGES, *PLUGINS)}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def gpus(root: Path = Path("/")) -> list[Gpu]:
    """The NVIDIA GPUs that nvidia-smi lists, or else those in the folder of the driver, or else those in /dev."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader,nounits"]
        out = run(query, 20)
        if out and not out.returncode:
            return [gpu for line in out.stdout.splitlines() if (gpu := read_gpu(line))]
    proc = root / "proc" / "driver" / "nvidia"
    try:
        driver = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", (proc / "version").read_text())
        cards = [(card / "information").read_text() for card in sorted((proc / "gpus").iterdir())]
    except OSError:
        nodes = sorted((root / "dev").glob("nvidia[0-9]*")) or list((root / "dev").glob("dxg"))  # dxg: Windows' WSL
        return [Gpu(f"the NVIDIA GPU at {node}", "", None, None) for node in nodes]
    names = [re.search(r"Model:\s*(.+)", text) for text in cards]
    return [Gpu(name[1].strip() if name else "NVIDIA GPU", driver[1] if driver else "", None, None) for name in names]


def read_gpu(line: str) -> Gpu | None:
    """The GPU of a line "NAME, DRIVER, MIB, CAPABILITY" of nvidia-smi; None for other lines. Values may be "[N/A]"."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 4:
        return None
    number = lambda text: float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
    mib = number(cells[2])
    return Gpu(cells[0], cells[1], mib / 1024 if mib is not None else None, number(cells[3]))


def has_tpu(bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a TPU is on the bus."""
    for device in bus.iterdir() if bus.is_dir() else ():
        try:
            if (device / "vendor").read_text().strip() == "0x1ae0" and (device / "device").read_text().strip() in TPUS:
                return True
        except OSError:
            continue
    return False


def host_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[float, float] | None:
    """(all, free) memory of the host in GiB; None where not known."""
    try:
        found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE))
        return int(found["MemTotal"]) / 2**20, int(found["MemAvailable"]) / 2**20
    except (OSError, KeyError):
        return None


def ask_jax() -> Answer:
    """Start JAX in a process with this environment, and return what it reports."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    answer = answer_of(run([sys.executable, "-c", ASK, *MODULES], SECONDS, environment))
    if not answer.backend and not answer.broken and environment.pop("XLA_FLAGS", ""):
        again = answer_of(run([sys.executable, "-c", ASK, *MODULES], SECONDS, environment))
        return answer._replace(without_flags=bool(again.backend))
    return answer


def answer_of(out: Any) -> Answer:
    """What the process of `ASK` said. `out` is None where it gave no answer in time."""
    if out is None:
        return Answer("", [], f"no answer within {SECONDS} s")
    try:
        found = json.loads(out.stdout.splitlines()[-1])
        if "broken" in found:
            return Answer("", [], out.stderr, f"{found['broken']} cannot be imported ({last_line(found['why'])})")
        return Answer(found["backend"], found["devices"], out.stderr)
    except (IndexError, ValueError, KeyError, TypeError):
        return Answer("", [], out.stderr or f"ended with exit code {out.returncode} and without a message")


def run(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command and return the process with its output as text; None where it does not start or takes too long."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


# --- findings ---------------------------------------------------------------------------------------------------------


def findings(facts: Facts) -> list[str]:
    """The problems, one line each: what is wrong, why, and the remedy."""
    problems = []
    backend, message = facts.answer.backend, last_line(facts.answer.stderr)
    platforms = facts.variables.get("JAX_PLATFORMS") or facts.variables.get("JAX_PLATFORM_NAME", "")
    allows_gpu = not platforms or any(name in platforms.split(",") for name in ("gpu", "cuda"))
    jax, jaxlib = (facts.versions[name] or "missing" for name in ("jax", "jaxlib"))
    if jax != jaxlib:
        problems.append(f"jax {jax} and jaxlib {jaxlib} do not fit each other: {pip('', 'jax', 'jaxlib')}")
    if missing := [name for name in PACKAGES[3:] if not facts.versions[name]]:
        problems.append(f"{', '.join(missing)} not installed: {pip('', *missing)}")
    if broken := facts.answer.broken:
        name = broken.split()[0]
        package = {"skimage": "scikit-image", "orbax.checkpoint": "orbax-checkpoint"}.get(name, name)
        if not (missing and package in missing):
            problems.append(f"{broken}: install it anew: {sys.executable} -m pip install --force-reinstall {package}")
    elif facts.answer.without_flags:
        flags = facts.variables.get("XLA_FLAGS", "")
        problems.append(f"JAX does not start with XLA_FLAGS={flags}: “{message}”: unset XLA_FLAGS, or correct it")
    elif facts.gpus and backend != "gpu":
        problems.append(f"{facts.gpus[0].name} is not used: {why_no_gpu(facts, allows_gpu, platforms, message)}")
    elif facts.tpu and backend != "tpu":
        if platforms and "tpu" not in platforms.split(","):
            reason = f"JAX_PLATFORMS={platforms} excludes it: unset JAX_PLATFORMS"
        elif not facts.versions["libtpu"]:
            reason = f"libtpu is not installed: {pip('tpu')}"
        else:
            reason = f"JAX reports “{message}”: end other processes that use it, or {pip('tpu')}"
        problems.append(f"a TPU is not used: {reason}")
    elif not backend:
        remedy = f"unset JAX_PLATFORMS={platforms}" if platforms else f"reinstall it: {pip('', 'jax', 'jaxlib')}"
        problems.append(f"JAX does not start: “{message}”: {remedy}")
    return [*problems, *memory_findings(facts)]


def why_no_gpu(facts: Facts, allows_gpu: bool, platforms: str, message: str) -> str:
    """Why JAX does not use the NVIDIA GPU of this machine, and the remedy.

    Args:
      allows_gpu: whether `platforms`, the value of JAX_PLATFORMS, allows a GPU.
      message: the last line of JAX on standard error.
    """
    installed = [f"cuda{n}" for n in (13, 12) if facts.versions[f"jax-cuda{n}-plugin"]]
    gpu = facts.gpus[0]
    fit = fitting(gpu)
    if not fit:
        old = gpu.capability is not None and gpu.capability < CUDA["cuda12"][1]
        if old:
            return f"its compute capability {gpu.capability:g} is below {CUDA['cuda12'][1]}, so JAX cannot use it"
        return f"its driver {gpu.driver} is older than {dotted(CUDA['cuda12'][0])}: install a newer NVIDIA driver"
    if not allows_gpu:
        more = "" if installed else f", and {pip(fit)}"
        return f"JAX_PLATFORMS={platforms} excludes it: unset JAX_PLATFORMS{more}"
    if not installed:
        return f"jaxlib {facts.versions['jaxlib']} has no CUDA plugin: {pip(fit)}"
    if len(installed) == 2:
        other = "12" if fit == "cuda13" else "13"
        line = f"{sys.executable} -m pip uninstall jax-cuda{other}-plugin jax-cuda{other}-pjrt"
        return f"the plugins of CUDA 12 and 13 are both installed: {line}"
    if installed[0] == "cuda13" and fit == "cuda12":
        return f"{too_old(gpu)} for the CUDA 13 that is installed: {pip('cuda12')}, or install a newer NVIDIA driver"
    plugin = facts.versions[f"jax-{installed[0]}-plugin"]
    if plugin != facts.versions["jaxlib"]:
        return f"its plugin {plugin} does not fit jaxlib {facts.versions['jaxlib']}: {pip(installed[0])}"
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden or hidden.startswith(("-1", "NoDevFiles"))):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset it, or set it to the number of the GPU"
    if "Unable to load CUDA" in facts.answer.stderr and not facts.variables.get("LD_LIBRARY_PATH"):
        return f"NVIDIA's libraries are not installed (the extra plan-gpu does not install them): {pip(installed[0])}"
    if facts.variables.get("LD_LIBRARY_PATH"):
        return (
            f"JAX reports “{message}”: unset LD_LIBRARY_PATH, because its CUDA is loaded before the CUDA of the plugin"
        )
    return f"JAX reports “{message}”: end other processes that use its memory (see nvidia-smi), or {pip(installed[0])}"


def memory_findings(facts: Facts) -> list[str]:
    """The problems of memory and of the settings of its allocator."""
    problems, flags = [], facts.variables
    shares = {name: flags[name] for name in FRACTIONS if flags.get(name)}
    for name, share in shares.items():
        if not re.fullmatch(r"\d*\.?\d+", share) or not float(share):
            problems.append(f"{name}={share!r} is not a share of the memory: set it to .9, or unset it")
    if len(shares) == 2:
        problems.append(f"{' and '.join(FRACTIONS)} are both set, so JAX does not start: unset {FRACTIONS[1]}")
    if (allocator := flags.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()) not in ALLOCATORS:
        problems.append(f"XLA_PYTHON_CLIENT_ALLOCATOR={allocator} is unknown: set one of {', '.join(ALLOCATORS)}")
    elif allocator == "platform":
        problems.append(
            "XLA_PYTHON_CLIENT_ALLOCATOR=platform returns memory at once and is slow: unset it after a diagnosis"
        )
    if facts.host_gib and facts.host_gib[1] < LEAST_GIB:
        free = facts.host_gib[1]
        problems.append(f"only {free:.1f} GiB of host memory are free, below {LEAST_GIB:g}: end other processes")
    return problems


def fitting(gpu: Gpu) -> str:
    """The newest extra, "cuda13" or "cuda12", that a GPU and its driver support; "" where neither is supported.

    An unknown driver or capability counts as one that supports "cuda12" alone.
    """
    for extra, (driver, capability) in CUDA.items():
        unknown = extra == "cuda12"
        new = tuple(map(int, gpu.driver.split("."))) >= driver if re.fullmatch(r"[\d.]*\d", gpu.driver) else unknown
        if new and (unknown if gpu.capability is None else gpu.capability >= capability):
            return extra
    return ""


def too_old(gpu: Gpu) -> str:
    """Whether the GPU or its driver is too old for CUDA 13, in words."""
    driver, capability = CUDA["cuda13"]
    if gpu.capability is not None and gpu.capability < capability:
        return f"its compute capability {gpu.capability:g} is too low"
    return f"its driver {gpu.driver} is older than {dotted(driver)}, too old"


def pip(extra: str, *packages: str) -> str:
    """The command that installs an extra of jmae, or upgrades packages, with the pip of this interpreter."""
    return f"{sys.executable} -m pip install " + (f"'jmae[{extra}]'" if extra else f"--upgrade {' '.join(packages)}")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def last_line(text: str) -> str:
    """The last line with text, of a traceback or a log."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def fact_lines(facts: Facts) -> list[str]:
    """The facts as lines of text."""
    gib = lambda n: "" if n is None else f"{n / 2**30:.1f} GiB"
    lines = [f"python     {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"]
    lines += ["packages   " + ", ".join(f"{name} {facts.versions[name] or 'MISSING'}" for name in PACKAGES)]
    plugins = [f"{name} {facts.versions[name]}" for name in PLUGINS if facts.versions[name]]
    without = any("cuda" in name for name in plugins) and not facts.gpus
    words = " (without an NVIDIA GPU: JAX warns at each start, then uses the CPU; jmae.plan needs the plugin for GPUs)"
    lines += ["plugins    " + (", ".join(plugins) or "none: JAX uses the CPU") + words * without]
    for gpu in facts.gpus:
        memory = "" if gpu.gib is None else f", {gpu.gib:.1f} GiB"
        capability = "" if gpu.capability is None else f", compute capability {gpu.capability:g}"
        lines.append(f"gpu        {gpu.name}, driver {gpu.driver or 'unknown'}{memory}{capability}")
    lines += ["tpu        on the bus"] if facts.tpu else []
    lines.append(f"jax uses   {facts.answer.backend or 'no device: it did not start'}")
    for device in facts.answer.devices:
        memory = f", {gib(device['limit'])} for JAX, {gib(device['used'])} in use" if device.get("limit") else ""
        lines.append(f"  device   {device['kind']}{memory}")
    if facts.host_gib:
        lines.append(f"memory     {facts.host_gib[0]:.1f} GiB, {facts.host_gib[1]:.1f} GiB free")
    lines += [f"set        {name}={value}" for name, value in facts.variables.items()]
    flags = [name for name in facts.variables if name.startswith(("XLA_PYTHON_CLIENT_", "XLA_CLIENT_"))]
    if facts.answer.backend == "gpu" and not flags:
        lines.append(
            "allocator  default: JAX reserves 75 % of the GPU at the start. To change it, set before the command "
            "XLA_CLIENT_MEM_FRACTION=.9 (more) or XLA_PYTHON_CLIENT_PREALLOCATE=false (to share the GPU)"
        )
    return lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
