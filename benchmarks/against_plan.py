"""Compares measured training steps on a GPU with their plans.

    python -m benchmarks.against_plan        # the last part of bash benchmarks/gpu.sh
    python -m benchmarks.against_plan --tables VOLUME.json THROUGHPUT.json --plans SCALING.json

The plans are those of `python -m benchmarks.scaling --recipes`: the stages of every paper's recipe on one H100 and one
H200. Their programs are compiled for the GPU, and their times are estimated. "kernels" is the sum over kernels, each of
which takes the time of its arithmetic or of its traffic at the plan's rates. "launches" is 2 microseconds for each
kernel. "planned" is the longer of the two, because launches run ahead of kernels. "measured" is jmae's median in
benchmarks.volume and benchmarks.throughput; there each step is one dispatch, and the host waits for it. The ratio is
measured / planned: above 1 the GPU was slower than its plan.

A stage without a measurement on the plan's GPU is "not run". A plan of another batch is shown and not compared.
Exit codes: 0 done; 3 no step was measured on a GPU, and nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import table, write

RESULTS = Path(__file__).parent / "results"
TITLE = "papers' recipes on one GPU"  # title of the plans in scaling.json
HEAD = (
    *("system", "stage", "GPU", "batch", "measured ms"),
    *("kernels ms", "launches ms", "planned ms", "measured / planned", "from"),
)
# (recipe, stage) of the plan of each case in the tables; the recipes have no overrides.
CASES = {
    "amae": ("amae", "module_a"),
    "maemi": ("maemi", "train"),
    "memmc_mae": ("memmc_mae", "train"),
    "ppii": ("ppii, unet", "train"),
    "simsid teacher": ("simsid, report", "teacher"),
    "simsid student": ("simsid, report", "student"),
    "train": ("maemi", "train"),  # a case of benchmarks.volume
}


class Step(NamedTuple):
    """A measured training step."""

    recipe: str
    stage: str
    device: str
    batch: int
    seconds: float
    source: str


def read_steps(tables: list[Path]) -> list[Step]:
    """The steps at the papers' sizes that were timed on a GPU. A missing table has no steps."""
    found = []
    for file in tables:
        for name, case in (json.loads(file.read_text()) if file.exists() else {}).items():
            step, *words = name.split(", ")
            if step in CASES and "paper" in words and words[-1] == "cuda":
                jmae = case["contestants"]["jmae"]
                found.append(Step(*CASES[step], jmae["device"], jmae["batch"], jmae["median_s"], name))
    return found


def is_on(step: Step, target: str) -> bool:
    """Whether a step ran on the device of a plan: "NVIDIA H200" is the device of "h200:1"."""
    return target.split(":")[0].upper() in step.device.upper().split()


def rows_of(plans: list[dict[str, Any]], steps: list[Step]) -> list[tuple[Any, ...]]:
    """A row for each plan and each step of its stage on its GPU, then the steps that have no plan."""
    rows: list[tuple[Any, ...]] = []
    with_plan = set()
    for plan in plans:
        stage = f"{plan['stage']}, {plan['phase']}" if "phase" in plan else plan["stage"]
        head = (plan["recipe"], stage, plan["target"])
        times = tuple(1e3 * plan[key] for key in ("kernels_s", "launches_s", "step_s"))
        matching = [s for s in steps if s[:2] == (plan["recipe"], plan["stage"]) and is_on(s, plan["target"])]
        with_plan |= set(matching)
        if not matching:
            rows.append((*head, plan["batch"], "not run", *times, "", ""))
        for step in matching:
            same = step.batch == plan["batch"]
            ratio = step.seconds / plan["step_s"] if same else f"not compared: the plan's batch is {plan['batch']}"
            rows.append((*head, step.batch, 1e3 * step.seconds, *times, ratio, step.source))
    for step in steps:
        if step not in with_plan:
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
    plans = json.loads(options.plans.read_text()).get(TITLE, {}).get("plans", {})
    if not plans:
        parser.exit(2, f"{options.plans}: has no plans: run python -m benchmarks.scaling --recipes\n")
    steps = read_steps(options.tables)
    rows = rows_of(list(plans.values()), steps)
    print(table(HEAD, rows))
    if not steps:
        print("not run: no table has a step on a GPU: run bash benchmarks/gpu.sh", file=sys.stderr)
        return 3
    device = " / ".join(sorted({step.device for step in steps}))
    write(options.out, "steps, cuda", {"device": device, "table": [HEAD, rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
