"""Times contestants on a machine that others use too. Each has its own process, and their rounds are interleaved.

Interleaved rounds expose all contestants to the same load. A process for each contestant gives each its own thread pool
and its own peak memory. A turn has two runs, and only the last one counts (a turn of an hour-long contestant has one).
The reason is that runs of a loop follow each other, but the first run after another process's turn is slower: a virtual
machine may have returned free pages to its host, and the run allocates its workspace again. Results are medians,
minima, and the ratios of two contestants round by round.
"""

import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "pie-torch")
SETTINGS = ("XLA_FLAGS", "OMP_NUM_THREADS", "GLIBC_TUNABLES")


def _serve(pipe: Any, target: str, arguments: dict[str, Any], before: int) -> None:
    module, function = target.split(":")
    start = time.perf_counter()
    run, facts = getattr(importlib.import_module(module), function)(**arguments)
    run()
    pipe.send(facts | {"prepare_s": time.perf_counter() - start})
    while pipe.recv():
        for _ in range(before):
            run()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def interleaved(
    contestants: dict[str, tuple[str, dict[str, Any]]], *, rounds: int, before: int = 1
) -> dict[str, dict[str, Any]]:
    """Times the contestants in turn, `rounds` times each.

    One run of each comes first and is not timed. `before` untimed runs precede each timed run.

    Args:
      contestants: name -> ("module:function", keyword arguments). The function prepares and returns
        (run, facts): `run()` does one step and waits for its result, `facts` is copied to the result.

    Returns:
      For each name the wall seconds of all rounds, their median and minimum, the median of CPU seconds, the peak
      resident memory in MiB, `prepare_s` (imports, compilation, first step) and the facts.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    results: dict[str, dict[str, Any]] = {}
    for name, (target, arguments) in contestants.items():
        pipes[name], theirs = spawn.Pipe()
        processes[name] = spawn.Process(target=_serve, args=(theirs, target, arguments, before), daemon=True)
        processes[name].start()
        theirs.close()
        results[name] = pipes[name].recv() | {"seconds": [], "cpu_seconds": []}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            wall, cpu = pipe.recv()
            results[name]["seconds"].append(wall)
            results[name]["cpu_seconds"].append(cpu)
    for name, pipe in pipes.items():
        pipe.send(False)
        results[name]["peak_mib"] = pipe.recv()
        processes[name].join()
        results[name]["median_s"] = statistics.median(results[name]["seconds"])
        results[name]["least_s"] = min(results[name]["seconds"])
        results[name]["cpu_median_s"] = statistics.median(results[name].pop("cpu_seconds"))
    return results


def ratio(numerator: dict[str, Any], denominator: dict[str, Any]) -> dict[str, float]:
    """Median, least and greatest ratio of the rounds of two contestants; "cpu" is that of their median CPU seconds."""
    each = [a / b for a, b in zip(numerator["seconds"], denominator["seconds"], strict=True)]
    cpu = numerator["cpu_median_s"] / denominator["cpu_median_s"]
    return {"median": statistics.median(each), "least": min(each), "greatest": max(each), "cpu": cpu}


def use_cores(number: int | None) -> str:
    """Limits this process and its children to `number` cores (None: all). Returns words for the name of a case."""
    if not number:
        return ""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])  # inherited
    os.environ["OMP_NUM_THREADS"] = str(number)
    return f", cores {number}"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and load of this machine."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        name = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), name)
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": os.getloadavg()[0],
        "environment": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """The versions of the installed `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A text table with aligned columns; numbers have three significant digits."""
    show = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    cells = [head, *(tuple(map(show, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def write(path: Path, case: str, result: dict[str, Any]) -> None:
    """Writes one case into a JSON file of cases, with machine, versions and command. Other cases stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = json.loads(path.read_text()) if path.exists() else {}
    command = "python -m " + " ".join([Path(sys.argv[0]).parent.name + "." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    about = {"command": command, "date": datetime.now(UTC).date().isoformat()}
    cases[case] = {**about, "machine": machine(), "versions": versions(), **result}
    path.write_text(json.dumps(cases, indent=1) + "\n")


Prepared = tuple[Callable[[], Any], dict[str, Any]]
