"""How MAEMI's training scales from one chip to 256: what fits, how fast a step is at most, and what limits it.

Each row is a plan (`jmae.plan`) beside the command that makes it again, some two minutes each on two cores; no chip is
needed, but libtpu (pip install 'jmae[plan]'). The batch is the recipe's on every chip. Rows that the JSON has already,
made with the same versions, are kept; --again makes them anew.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only h

GB are 1e9 bytes; ms a step at peak figures: arithmetic, memory, the network, whose traffic comes after both. The
efficiency is against one chip's own plan, in brackets, where that does not fit, against the same program without its
network.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.timing import table, write
from jmae import plan, recipe

# Vision transformers of the three common sizes (Dosovitskiy et al. 2021, table 1); the decoder is the paper's.
SIZES = {
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "h": {"width": 1280, "depth": 32, "heads": 16},
}
SHAPES = ("1x1", "2x4", "8x8", "16x16")  # of v5e: 1 to 256 chips
RESULTS = Path(__file__).parent / "results" / "scaling.json"
HEAD = ("network", "target", "data", "fsdp", "batch", "GB a chip", "compute ms", "memory ms", "network ms", "step ms")
HEAD += ("samples/s", "efficiency", "limit", "plan")


def cases(sizes: list[str], chip: str) -> list[dict[str, Any]]:
    """The plans of the table: data parallel, and parameters over the chips of a host."""
    return [
        {"size": size, "target": f"{chip}:{shape}", "fsdp": fsdp}
        for shape in SHAPES
        for size in sizes
        for fsdp in ((1,) if shape == "1x1" else (1, 8))
    ]


def arguments(case: dict[str, Any]) -> list[str]:
    """The command line of a plan."""
    model = [f"--config.model.{key}={value}" for key, value in SIZES[case["size"]].items()]
    fsdp = [f"--config.fsdp={case['fsdp']}"] if case["fsdp"] > 1 else []
    return ["--config=configs/maemi.py:paper", *model, f"--target={case['target']}", *fsdp]


def row(case: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """One plan."""
    start = time.perf_counter()
    config, _ = recipe.parse([a for a in own if a.startswith("--config")], "")
    (found,) = plan.plan(config, plan.target_of(case["target"]))
    return case | {"plan": plan.command(own), "plan_s": time.perf_counter() - start} | found


def shown(each: dict[str, Any], alone: dict[str, float]) -> tuple[Any, ...]:
    """A row of the table; efficiency is against one chip's own plan, where that fits."""
    gb, ms = (lambda key, unit=unit: f"{each[key] * unit:.3g}" for unit in (1e-9, 1e3))
    head = (f"ViT-{each['size'].upper()}", each["target"], each["chips"] // each["fsdp"], each["fsdp"], each["batch"])
    memory = f"{'' if each['fits'] else 'NO: '}{gb('total')}"
    if "step_s" not in each:
        return (*head, memory, *[""] * 6, "memory size")
    one = alone.get(each["size"])
    efficiency = f"{one / each['step_s']:.0%}" if one else f"({each['efficiency']:.0%})"
    times = (ms("compute_s"), ms("memory_s"), ms("network_s"), ms("step_s"))
    return (*head, memory, *times, f"{each['batch'] / each['step_s']:.0f}", efficiency, each["limited_by"])


def rows_of(plans: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The table of all plans, by network, chips and fsdp."""
    order = list(SIZES).index
    kept = sorted(plans.values(), key=lambda each: (order(each["size"]), each["chips"], each["fsdp"]))
    alone = {each["size"]: each["step_s"] for each in kept if each["chips"] == 1 and "step_s" in each}
    return [[*shown(each, alone), each["plan"]] for each in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SIZES), help="one size of the network")
    parser.add_argument("--chip", default="v5e", choices=("v5e", "v6e"), help="default v5e")
    parser.add_argument("--again", action="store_true", help="make rows anew that the JSON has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    made_with = {name: version(name) for name in ("jax", "libtpu")}
    title = f"MAEMI on {given.chip}"
    done = json.loads(given.out.read_text()) if given.out.exists() else {}
    plans = done.get(title, {}).get("plans", {})
    for case in cases([given.only] if given.only else list(SIZES), given.chip):
        name = f"ViT-{case['size'].upper()}, {case['target']}, fsdp {case['fsdp']}"
        if given.again or plans.get(name, {}).get("made_with") != made_with:
            plans[name] = row(case, arguments(case)) | {"made_with": made_with}
            write(given.out, title, {"table": [HEAD, rows_of(plans)], "plans": plans})
    rows = [tuple(cells[:-1]) for cells in rows_of(plans)]
    print(table(HEAD[:-1], rows))


if __name__ == "__main__":
    main()
