"""Times the first training step of every stage of each system, without and with stored programs.

    python -m benchmarks.compile                        # the recipes `small`
    python -m benchmarks.compile --preset smoke --only amae --runs 1

Each run has its own process. "start" is the start of Python and the imports. "first steps" is the rest: for every
stage, weights are drawn, and the step is traced, compiled (or read from disk) and run once on a batch of noise. "cold"
starts with an empty folder for programs; "kept" uses the folder of the cold run. `jmae.train` stores programs in
~/.cache/jmae by default (`jmae.processes.keep_compiled`). JAX stores programs that take a second or more to compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import table, use_cores, write

RESULTS = Path(__file__).parent / "results" / "compile.json"


def first_steps(system: str, preset: str) -> dict[str, Any]:
    """The seconds of each stage, in this process."""
    import jax
    import numpy as np

    from benchmarks.steps import ROOT
    from jmae import recipe
    from jmae.processes import keep_compiled
    from jmae.programs import compiled_init, compiled_step
    from jmae.sharding import device_mesh
    from jmae.system import load_system, stage_keys

    keep_compiled()
    config = recipe.load(f"{ROOT / 'configs' / system}.py:{preset}")
    results: dict[str, Any] = {}
    seconds, imported = {}, time.time()
    for number, stage in enumerate(load_system(config).stages):
        start, n, key = time.perf_counter(), stage.batch, stage_keys(config, number)
        state = compiled_init(stage, n, 1, device_mesh())(key, results)
        image = np.random.default_rng(0).uniform(size=(n, *config.data.size, config.data.channels)).astype(np.float32)
        rows = {"image": image, "index": np.arange(n, dtype=np.int32), "case": np.zeros((n, 2), np.uint32)}
        rows |= {name: np.stack([make(one) for one in image]) for name, make in stage.host_arrays.items()}
        # The step donates its state, which may share arrays with the results of earlier stages. So it gets a copy.
        state, metrics = compiled_step(stage.step, 1000, 1, (), None, stage.phases[0])(
            jax.tree.map(jax.numpy.copy, state), rows, key, results
        )
        jax.block_until_ready((state, metrics))
        results[stage.name] = stage.result(state)
        seconds[stage.name] = time.perf_counter() - start
    return {"imported": imported, "seconds": seconds}


def run(system: str, preset: str, folder: str) -> dict[str, Any]:
    """Runs one process. Returns the seconds of its start and of each stage."""
    command = [sys.executable, "-m", "benchmarks.compile", "--preset", preset, "--in-process", system]
    began = time.time()
    done = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": folder}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    stages = found["seconds"]
    return {"start": found["imported"] - began, "first_steps": sum(stages.values()), "stages": stages}


def main() -> None:
    from jmae.recipe import SYSTEMS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, help="number of cores to use; default all")
    parser.add_argument("--in-process", metavar="SYSTEM", help="only this system, in this process; prints JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(first_steps(options.in_process, options.preset)))
        return
    cores, rows = use_cores(options.cores), list[list[Any]]()
    result: dict[str, Any] = {}
    for system in options.only:
        runs: dict[str, list[dict[str, Any]]] = {"cold": [], "kept": []}
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                for way in runs:
                    runs[way].append(run(system, options.preset, folder))
                kept = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**20
        middle = lambda way, name, runs=runs: statistics.median(r[name] for r in runs[way])
        cold, warm = (middle(way, "first_steps") for way in runs)
        stages = len(runs["cold"][0]["stages"])
        rows.append([system, stages, middle("cold", "start"), cold, warm, cold / warm, kept])
        result[system] = runs
        print(table(("system", "stages", "start s", "cold s", "kept s", "times", "kept MiB"), [tuple(rows[-1])]))
    head = ("system", "stages", "start s", "first steps cold s", "first steps kept s", "times", "kept MiB")
    print(table(head, [tuple(row) for row in rows]))
    write(options.out, f"{options.preset}{cores}", {"runs": result, "table": [head, rows]})


if __name__ == "__main__":
    main()
