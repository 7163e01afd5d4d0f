"""Checks claims about NVIDIA GPUs without one: compiles one stage of each system for an H200 and reads the program.

    make gpu-check                                  (in an environment of its own, under 15 minutes on two cores)
    python -m benchmarks.gpu_check [--only maemi] [--jobs 2] [--bounds]

Each case is a plan (`jmae.plan`), of the paper's size unless the table says otherwise. The claims are:

- cuDNN's flash attention runs forward and backward, where the system has attention;
- no kernel of products with float32 inputs does more than 1 % of the FLOPs;
- kernels that only pad move at most 5 % of the traffic, unless the table says otherwise;
- kernels and traffic of a step stay within the bounds of the table;
- a step on 8 GPUs sends no more than the table lists.

A violated claim is a line on standard error. --bounds prints the table with new bounds, 1.1 times what is compiled now.
Paste it here when a network has changed.
Exit codes: 0 all claims hold; 1 a claim does not hold; 2 the environment is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOM = 1.1  # factor of a new bound over the compiled number
FLOAT32 = 0.01  # largest share of the FLOPs in one kernel of float32 products
FLASH = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


class Case(NamedTuple):
    """A plan and its bounds."""

    recipe: str
    stage: str
    flash: bool  # whether the stage has attention that cuDNN supports
    kernels: int  # a step, at most
    traffic: float  # GB a step, at most
    target: str = "h200:1"
    more: tuple[str, ...] = ()  # further words of the command
    padding: float = 0.05  # share of the traffic, at most; small recipes pad more of their short sequences
    sent: dict[str, tuple[int, float]] | None = None  # collectives: {"KIND over CHIPS": (times, GB of arrays), at most}


CASES = {
    "maemi": Case("maemi:paper", "train", True, 801, 16.2),
    "memmc_mae": Case("memmc_mae:paper", "train", True, 1431, 402.0),
    "amae": Case("amae:paper", "pretrain", True, 788, 190.0, more=("--config.replicates=1",)),
    "ppii": Case("ppii:paper", "train", False, 845, 91.1),
    "simsid": Case("simsid:paper", "student", True, 344, 4.65),
    "maemi on 8": Case(
        *("maemi:small", "train", True, 560, 0.387, "h200:8"), padding=0.15, sent={"all-reduce over 8": (2, 0.00115)}
    ),
    "maemi on 8, fsdp": Case(
        *("maemi:small", "train", True, 552, 0.305, "h200:8", ("--config.fsdp=8",)),
        padding=0.15,
        sent={
            "all-gather over 8": (1, 0.00211),
            "reduce-scatter over 8": (1, 0.00105),
            "all-reduce over 8": (2, 9.1e-05),
        },
    ),
}


def plan_of(case: Case) -> dict[str, Any] | str:
    """The plan of a case, or a line about its failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = [f"--config=configs/{case.recipe.replace(':', '.py:')}", f"--stage={case.stage}", *case.more]
        command = [sys.executable, "-m", "jmae.plan", *words, f"--target={case.target}", f"--json={file}"]
        # JAX_PLATFORMS=cpu: the plugin need not report that there is no driver.
        done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not file.exists():
            return (
                f"{' '.join(command[1:])} ended with {done.returncode}: {(done.stderr.strip() or '-').splitlines()[-1]}"
            )
        (stage, *_) = json.loads(file.read_text())["stages"]
    return stage


def violations(name: str, case: Case, found: dict[str, Any]) -> list[str]:
    """One line for each claim that a plan violates."""
    wrong = []
    if not found["fits"]:
        wrong.append(f"{found['total'] / 1e9:.3g} GB do not fit in {found['limit'] / 1e9:.3g}")
    if case.flash and (missing := [call for call in FLASH if call not in found["custom_calls"]]):
        wrong.append(f"cuDNN's attention is not called: {', '.join(missing)}")
    work = sum(found["flops_compiled_chip"].values())
    if found["float32_most_chip"] > FLOAT32 * work:
        wrong.append(f"a kernel of float32 products does {found['float32_most_chip'] / work:.1%} of the FLOPs")
    if found["padding_chip"] > case.padding * found["traffic_chip"]:
        wrong.append(f"padding is {found['padding_chip'] / found['traffic_chip']:.1%} of the traffic")
    if found["kernels"] > case.kernels:
        wrong.append(f"{found['kernels']} kernels a step, more than {case.kernels}")
    if found["traffic_chip"] > case.traffic * 1e9:
        wrong.append(f"{found['traffic_chip'] / 1e9:.4g} GB of traffic a step, more than {case.traffic:g}")
    if case.sent is not None:
        for kind, (times, gb) in sent(found).items():
            most = case.sent.get(kind, (0, 0.0))
            if times > most[0] or gb > most[1]:
                wrong.append(f"{times} {kind} of {gb:.3g} GB a step, more than {most[0]} of {most[1]:g}")
        wrong += [f"no {kind} a step" for kind in case.sent.keys() - sent(found).keys()]
    return [f"{name}, {case.stage}: {line}" for line in wrong]


def sent(found: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """{"KIND over CHIPS": (times, GB)} of a plan; small arrays, such as metrics, do not count."""
    total: dict[str, tuple[int, float]] = {}
    for each in found["collectives"]:
        if each["bytes"] < 1024 * each["count"]:
            continue
        kind = f"{each['kind']} over {each['chips']}"
        times, gb = total.get(kind, (0, 0.0))
        total[kind] = (times + each["count"], gb + each["bytes"] / 1e9)
    return total


def new_bounds(case: Case, found: dict[str, Any]) -> Case:
    """The case with new bounds from a plan."""
    up = lambda number: float(f"{number * ROOM:.3g}")
    new = case._replace(kernels=round(found["kernels"] * ROOM), traffic=up(found["traffic_chip"] / 1e9))
    if case.sent is not None:
        new = new._replace(sent={kind: (n, up(gb)) for kind, (n, gb) in sent(found).items()})
    return new


def line(name: str, case: Case) -> str:
    """A case's line of the table."""
    defaults = Case._field_defaults
    positional = [repr(value) for value in case[:5]]
    named = [f"{key}={value!r}" for key, value in case._asdict().items() if key in defaults and value != defaults[key]]
    return f"    {name!r}: Case({', '.join([*positional, *named])}),".replace("'", '"')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES), action="append", help="check one case; repeat it for several")
    parser.add_argument("--jobs", type=int, default=2, help="number of compilations at a time, default 2")
    parser.add_argument("--bounds", action="store_true", help="print the table with new bounds")
    given = parser.parse_args(argv)
    chosen = {name: CASES[name] for name in given.only or CASES}
    wrong: list[str] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for name, found in zip(chosen, pool.map(plan_of, chosen.values()), strict=True):
            if isinstance(found, str):
                print(f"{name}: {found}", file=sys.stderr, flush=True)
                if "plan-gpu" in found:
                    return 2
                wrong.append(name)
                continue
            case = new_bounds(chosen[name], found) if given.bounds else chosen[name]
            lines = violations(name, case, found)
            told = (
                f"{found['kernels']} kernels, {found['traffic_chip'] / 1e9:.4g} GB, {found['peak_share']:.0%} of peak"
            )
            print(line(name, case) if given.bounds else f"{name}: {told}", flush=True)
            print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr, flush=True)
            wrong += lines
    print(f"{len(wrong)} claims do not hold" if wrong else "all claims hold")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
