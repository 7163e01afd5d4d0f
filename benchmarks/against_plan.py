"""Measured training steps on a GPU beside their plans, and how far the estimates were off.

    python -m benchmarks.against_plan        # after bash benchmarks/gpu.sh, whose last part it is
    python -m benchmarks.against_plan --tables VOLUME.json THROUGHPUT.json --plans SCALING.json

Plans: every paper recipe's stages on one H100 and one H200, as `python -m benchmarks.scaling --recipes` keeps them:
programs compiled for the GPU, their times estimated. "kernels": each as long as its arithmetic or its traffic takes at
the rates that the plan states, one after the other. "launches": 2 microseconds each. "planned": the longer of the two,
since launches run ahead. Measured: jmae's median in benchmarks.volume and benchmarks.throughput, each step a dispatch
of its own and the host's wait for it. The ratio is measured / planned: above 1 the GPU was slower than its plan.

A stage that nobody timed on the plan's GPU is "not run". A plan of another batch is shown and not compared.
Exit codes: 0; 3 no step was measured on a GPU: nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results"
TITLE = "papers' recipes on one GPU"  # of the plans in scaling.json
HEAD = (
    *("system", "stage", "GPU", "batch", "measured ms"),
    *("kernels ms", "launches ms", "planned ms", "measured / planned", "from"),
)
# Which plan (its recipe and stage) a case of the tables has; the recipes as they are without overrides.
CASES = {
    "amae": ("amae", "module_a"),
    "maemi": ("maemi", "train"),
    "memmc_mae": ("memmc_mae", "train"),
    "ppii": ("ppii, unet", "train"),
    "simsid teacher": ("simsid, report", "teacher"),
    "simsid student": ("simsid, report", "student"),
    "train": ("maemi", "train"),  # of benchmarks.volume
}


class Measured(NamedTuple):
    recipe: str
    stage: str
    device: str
    batch: int
    seconds: float
    source: str


def measured(tables: list[Path]) -> list[Measured]:
    """The steps at the papers' sizes that were timed on a GPU; a table that is not there has none."""
    found = []
    for file in tables:
        for name, case in (json.loads(file.read_text()) if file.exists() else {}).items():
            step, *words = name.split(", ")
            if step in CASES and "paper" in words and words[-1] == "cuda":
                jmae = case["contestants"]["jmae"]
                found.append(Measured(*CASES[step], jmae["device"], jmae["batch"], jmae["median_s"], name))
    return found


def is_on(step: Measured, target: str) -> bool:
    """Whether a device ("NVIDIA H200") is what a plan is for ("h200:1")."""
    return target.split(":")[0].upper() in step.device.upper().split()


def rows_of(plans: list[dict[str, Any]], steps: list[Measured]) -> list[tuple[Any, ...]]:
    """A row for each plan and each step of its stage on its GPU, then the steps that have no plan."""
    rows: list[tuple[Any, ...]] = []
    planned = set()
    for plan in plans:
        stage = f"{plan['stage']}, {plan['phase']}" if "phase" in plan else plan["stage"]
        head = (plan["recipe"], stage, plan["target"])
        times = tuple(1e3 * plan[key] for key in ("kernels_s", "launches_s", "step_s"))
        own = [s for s in steps if s[:2] == (plan["recipe"], plan["stage"]) and is_on(s, plan["target"])]
        planned |= set(own)
        if not own:
            rows.append((*head, plan["batch"], "not run", *times, "", ""))
        for step in own:
            same = step.batch == plan["batch"]
            ratio = step.seconds / plan["step_s"] if same else f"not compared: the plan's batch is {plan['batch']}"
            rows.append((*head, step.batch, 1e3 * step.seconds, *times, ratio, step.source))
    for step in steps:
        if step not in planned:
            none = f"no plan for {step.device}"
            rows.append(
                (step.recipe, step.stage, step.device, step.batch, 1e3 * step.seconds, *[""] * 3, none, step.source)
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = [RESULTS / f"{name}_gpu.json" for name in ("volume", "throughput")]
    parser.add_argument("--tables", type=Path, nargs="+", default=tables, metavar="FILE")
    parser.add_argument("--plans", type=Path, default=RESULTS / "scaling.json", metavar="FILE")
    parser.add_argument("--out", type=Path, default=RESULTS / "against_plan_gpu.json", metavar="FILE")
    options = parser.parse_args()
    kept = json.loads(options.plans.read_text()).get(TITLE, {}).get("plans", {})
    if not kept:
        parser.exit(2, f"{options.plans}: has no plans: python -m benchmarks.scaling --recipes\n")
    steps = measured(options.tables)
    rows = rows_of(list(kept.values()), steps)
    print(table(HEAD, rows))
    if not steps:
        print("not run: no table has a step on a GPU: bash benchmarks/gpu.sh", file=sys.stderr)
        return 3
    device = " / ".join(sorted({step.device for step in steps}))
    write(options.out, "steps, cuda", {"device": device, "table": [HEAD, rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
