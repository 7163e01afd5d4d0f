"""How MAEMI's training scales from one chip to 256: what fits, how fast a step is at most, and what limits it.

It also plans each paper's recipe on one GPU. Each row is a plan (`jmae.plan`) beside the command that makes it again,
which takes one to five minutes on two cores. No chip is needed, only its compiler (pip install 'jmae[plan]' for TPUs,
'jmae[plan-gpu]' for GPUs). Every chip has the recipe's batch. Rows of the JSON that the same versions made are kept, so
that a table can be made in pieces. --again makes them again; use it when a network has changed.

    python -m benchmarks.scaling                             MAEMI on 1 to 256 v5e
    python -m benchmarks.scaling --chip h100 [--only h]      MAEMI on 1 to 256 H100
    python -m benchmarks.scaling --recipes [--only simsid]   every paper's recipe on one H100 and one H200

Compiled numbers are GB a chip (for GPUs without cuDNN's workspaces), kernels, traffic, and what a chip sends. Estimated
numbers use the rates that the plan states: the share of peak, ms a step, and its parts. The parts are arithmetic,
memory, kernels one after the other, their launches (2 microseconds each), and the network, which follows the rest. GB
are 1e9 bytes. The efficiency is against one chip's own plan. Where that plan does not fit, the efficiency is in
brackets, and is against the same program without its network.
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
# 1 to 256 chips: a torus of TPUs, or hosts of 8 GPUs. More than one chip has two plans: data parallel, and fsdp=8.
SHAPES = {chip: ("1x1", "2x4", "8x8", "16x16") for chip in ("v5e", "v6e")} | {"h100": ("1", "8", "1x8x8", "1x32x8")}
COMPILERS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax-cuda12-plugin", "h200": "jax-cuda12-plugin"}
# The recipes as the papers have them: (name in the table, overrides).
RECIPES = {
    "amae": [("amae", ("replicates=1",))],
    "maemi": [("maemi", ())],
    "memmc_mae": [("memmc_mae", ())],
    "ppii": [(f"ppii, {name}", (f"model.backbone={name}",)) for name in ("unet", "mc_unet", "phiseg")],
    "simsid": [(f"simsid, {name}", (f"variant={name}",)) for name in ("report", "official")],
}
# (kernels, traffic GB, kernels ms) of the same stages on an H200, compiled and counted alike, of revision 6bcf958. Each
# call of the attention was padded to a multiple of 8 there: without padding JAX refused to trace.
BEFORE = {
    "amae": {
        "pretrain": (1504, 272.5, 71.26),
        "proxy": (356, 3.0, 0.76),
        "labels": (280, 1.5, 0.39),
        "module_a": (1362, 8.9, 2.05),
        "module_b": (1362, 8.9, 2.05),
    },
    "maemi": {"train": (1547, 23.06, 6.57)},
    "memmc_mae": {"train": (3200, 583.3, 151.94)},
    "ppii, unet": {"train": (853, 91.4, 29.13)},
    "ppii, mc_unet": {"train": (877, 95.7, 30.02)},
    "ppii, phiseg": {"train": (2793, 145.9, 45.43)},
    "simsid, report": {
        "teacher": (225, 3.7, 0.78),
        "memory": (117, 0.1, 0.02),
        "student": (339, 4.2, 0.89),
        "discriminator": (253, 1.1, 0.23),
        "calibration": (138, 0.9, 0.19),
    },
    "simsid, official": {"joint": (2376, 13.2, 3.26), "calibration": (254, 1.9, 0.50)},
}
RESULTS = Path(__file__).parent / "results" / "scaling.json"
HEAD = ("network", "target", "data", "fsdp", "batch", "GB a chip", "compute ms", "memory ms", "network ms", "step ms")
HEAD += ("samples/s", "efficiency", "limit", "plan")
GPU_HEAD = ("network", "target", "data", "fsdp", "batch", "GB a chip", "kernels", "traffic GB", "sent GB", "compute ms")
GPU_HEAD += ("memory ms", "kernels ms", "launches ms", "network ms", "step ms", "samples/s", "of peak", "efficiency")
GPU_HEAD += ("limit", "plan")
RECIPE_HEAD = ("recipe", "stage", "target", "batch", "GB", "TFLOP", "kernels", "traffic GB", "compute ms", "memory ms")
RECIPE_HEAD += ("kernels ms", "launches ms", "samples/s", "of peak", "limit")
RECIPE_HEAD += ("kernels before", "traffic GB before", "kernels ms before", "plan")


def cases(sizes: list[str], chip: str) -> list[dict[str, Any]]:
    """The plans of the table: data parallel, and with parameters split over 8 chips."""
    return [
        {"size": size, "target": f"{chip}:{shape}", "fsdp": fsdp}
        for shape in SHAPES[chip]
        for size in sizes
        for fsdp in ((1,) if shape == SHAPES[chip][0] else (1, 8))
    ]


def arguments(case: dict[str, Any]) -> list[str]:
    """The command line of a plan."""
    model = [f"--config.model.{key}={value}" for key, value in SIZES[case["size"]].items()]
    fsdp = [f"--config.fsdp={case['fsdp']}"] if case["fsdp"] > 1 else []
    return ["--config=configs/maemi.py:paper", *model, f"--target={case['target']}", *fsdp]


def plans_of(own: list[str], target: str) -> list[dict[str, Any]]:
    """The plan of each stage, with its command."""
    start = time.perf_counter()
    config, _ = recipe.parse([a for a in own if a.startswith("--config")], "")
    found = plan.plan(config, plan.target_of(target))
    seconds = (time.perf_counter() - start) / len(found)
    return [{"plan": plan.command(own), "plan_s": seconds} | each for each in found]


def numbers(each: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Cells of a plan: times in ms, bytes in GB, FLOPs in TFLOP, kernels as they are; empty where the plan has none."""
    units = {"_s": 1e3, "kernels": 1, "flops_chip": 1e-12}
    unit = lambda key: next((n for end, n in units.items() if key.endswith(end)), 1e-9)
    show = lambda key: str(each[key]) if key == "kernels" else f"{each[key] * unit(key):.3g}"
    return tuple(show(key) if key in each else "" for key in keys)


def shown(each: dict[str, Any], alone: dict[str, float]) -> tuple[Any, ...]:
    """A row of the table; efficiency is against one chip's own plan, where that fits."""
    gpu = "kernels" in each
    head = (f"ViT-{each['size'].upper()}", each["target"], each["chips"] // each["fsdp"], each["fsdp"], each["batch"])
    memory = f"{'' if each['fits'] else 'NO: '}{each['total'] * 1e-9:.3g}"
    if "step_s" not in each:
        return (*head, memory, *[""] * 6, "memory size")
    one = alone.get(each["size"])
    efficiency = f"{one / each['step_s']:.0%}" if one else f"({each['efficiency']:.0%})"
    rate = f"{each['batch'] / each['step_s']:.0f}"
    if not gpu:
        times = numbers(each, "compute_s", "memory_s", "network_s", "step_s")
        return (*head, memory, *times, rate, efficiency, each["limited_by"])
    program = numbers(each, "kernels", "traffic_chip", "sent_chip")
    times = numbers(each, "compute_s", "memory_s", "kernels_s", "launches_s", "network_s", "step_s")
    return (*head, memory, *program, *times, rate, f"{each['peak_share']:.0%}", efficiency, each["limited_by"])


def rows_of(plans: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The table of all plans, by network, chips and fsdp."""
    order = list(SIZES).index
    kept = sorted(plans.values(), key=lambda each: (order(each["size"]), each["chips"], each["fsdp"]))
    alone = {each["size"]: each["step_s"] for each in kept if each["chips"] == 1 and each["fits"] and "step_s" in each}
    return [[*shown(each, alone), each["plan"]] for each in kept]


def recipe_rows(plans: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The table of the papers' recipes, in the order of `RECIPES`."""
    names = [name for each in RECIPES.values() for name, _ in each]
    kept = sorted(plans.values(), key=lambda each: (names.index(each["recipe"]), each["number"], each["target"]))
    rows = []
    for each in kept:
        stage = f"{each['stage']}, {each['phase']} ({each['share']:.0%})" if "phase" in each else each["stage"]
        memory = f"{'' if each['fits'] else 'NO: '}{each['total'] * 1e-9:.3g}"
        work = f"{sum(each['flops_compiled_chip'].values()) * 1e-12:.3g}"
        times = numbers(each, "compute_s", "memory_s", "kernels_s", "launches_s")
        rate = f"{each['batch'] / each['step_s']:.0f}"
        head = (each["recipe"], stage, each["target"], each["batch"], memory, work)
        before = BEFORE[each["recipe"]][each["stage"]] if each["target"] == "h200:1" else ("", "", "")
        end = (rate, f"{each['peak_share']:.0%}", each["limited_by"], *before, each["plan"])
        rows.append([*head, *numbers(each, "kernels", "traffic_chip"), *times, *end])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*SIZES, *RECIPES], help="one size of the network, or one system")
    parser.add_argument("--chip", default="v5e", choices=list(SHAPES), help="chip to plan for, default v5e")
    parser.add_argument(
        "--recipes", action="store_true", help="the papers' recipes on one GPU, not MAEMI on many chips"
    )
    parser.add_argument("--again", action="store_true", help="make rows again that the JSON has already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.only and (given.only in RECIPES) != given.recipes:
        parser.error(f"--only {given.only}: one of {', '.join(RECIPES if given.recipes else SIZES)}")
    title = "papers' recipes on one GPU" if given.recipes else f"MAEMI on {given.chip}"
    done = json.loads(given.out.read_text()) if given.out.exists() else {}
    plans = done.get(title, {}).get("plans", {})
    made_with = lambda chip: {name: version(name) for name in ("jax", COMPILERS[chip])}
    known = lambda name, chip: not given.again and plans.get(name, {}).get("made_with") == made_with(chip)
    if given.recipes:
        head, rows = RECIPE_HEAD, recipe_rows
        todo = [
            (
                f"{name}, {chip}:1",
                chip,
                name,
                [f"--config=configs/{system}.py:paper", *(f"--config.{c}" for c in changes)],
            )
            for chip in ("h100", "h200")
            for system in ([given.only] if given.only else RECIPES)
            for name, changes in RECIPES[system]
        ]
        for first, chip, name, own in todo:
            if known(f"{first}, stage 0", chip):
                continue
            for number, each in enumerate(plans_of([*own, f"--target={chip}:1"], f"{chip}:1")):
                row = {"recipe": name, "number": number, "target": f"{chip}:1", "made_with": made_with(chip)}
                plans[f"{first}, stage {number}"] = each | row
            write(given.out, title, {"table": [head, rows(plans)], "plans": plans})
    else:
        head, rows = GPU_HEAD if given.chip == "h100" else HEAD, rows_of
        for case in cases([given.only] if given.only else list(SIZES), given.chip):
            name = f"ViT-{case['size'].upper()}, {case['target']}, fsdp {case['fsdp']}"
            if not known(name, given.chip):
                (found,) = plans_of(arguments(case), case["target"])
                plans[name] = case | found | {"made_with": made_with(given.chip)}
                write(given.out, title, {"table": [head, rows(plans)], "plans": plans})
    # A table that was made in pieces may be complete now.
    if not given.only and "--only" in done.get(title, {}).get("command", ""):
        write(given.out, title, {"table": [head, rows(plans)], "plans": plans})
    print(table(head[:-1], [tuple(cells[:-1]) for cells in rows(plans)]))


if __name__ == "__main__":
    main()
