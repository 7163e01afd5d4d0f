"""Compares jmae with tuned PyTorch in float32 on this CPU. Each ratio stands beside its goal.

    python -m benchmarks.cpu                 # 15 minutes on two idle cores
    python -m benchmarks.cpu --cores 1       # on a machine that others use: compare the CPU seconds
    python -m benchmarks.cpu --only composites
    python -m benchmarks.cpu --small         # a trial with the small recipes for the first three cases, without goals

- vit_s: a training step of ViT-S/16 with the 512 x 8 decoder, batch 16, against `transformers`' masked autoencoder
  (throughput.py) with scaled_dot_product_attention and the faster AdamW, eager or with torch.compile.
- maemi: a training step of MAEMI's ViT-B, batch 1, against the official form and a tuned one (volume.py).
- windows: windows of the paper's size with the minimum filter, through the code for volumes, against the official loop.
- composites: P-PII composites of 25 blends against pie-torch's sine transforms (anomalies.py). For comparison, also the
  blends alone, each solved separately.

"between" shows where the difference of a step comes from. It times the attention and the dense products of all blocks,
forward and with gradients, in both libraries and in the same rounds. "rest" is the remaining time of a step: norms,
GELU, loss, patches and the update.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import interleaved, ratio, table, use_cores, write

RESULTS = Path(__file__).parent / "results" / "cpu.json"
GOALS = {  # PyTorch's time over that of jmae: (least goal, full goal)
    "vit_s": (1.0, 1.0),
    "maemi": (1.0, 1.0),
    "windows": (2.5, 2.5),
    "composites": (5.0, 10.0),
}
HEAD = ("case", "against", "theirs s", "jmae s", "times as fast", "least", "greatest", "of CPU s", "goal", "met")


def row(case: str, against: str, theirs: dict[str, Any], ours: dict[str, Any], each: dict[str, float]) -> list[Any]:
    """A line of the table of ratios. `each` has PyTorch's time over that of jmae."""
    least, full = GOALS[case]
    goal = f"{full:g}" if least == full else f"{full:g}, at least {least:g}"
    met = "yes" if each["median"] >= full else f"at least {least:g}" if each["median"] >= least else "no"
    figures = [each[key] for key in ("median", "least", "greatest", "cpu")]
    return [case, against, theirs["median_s"], ours["median_s"], *figures, goal, met]


def without_goal(row: list[Any]) -> list[Any]:
    """A line for comparison, without a goal."""
    return [*row[:-2], "", ""]


def between(case: str, out: dict[str, Any], against: str, key: str) -> list[list[Any]]:
    """Rows (case, part, theirs s, jmae s, share of jmae's step, share of the difference)."""
    parts = {}
    for what in ("attention", "products"):
        parts[what] = tuple(out[f"{who} {what}"][key] for who in ("torch", "jmae"))
    whole = (out[against][key], out["jmae"][key])
    parts["rest"] = tuple(w - a - b for w, a, b in zip(whole, *parts.values(), strict=True))
    gap = whole[1] - whole[0]
    share = lambda a, b: f"{(b - a) / gap:.0%}" if abs(gap) > 0.02 * whole[0] else "no difference"
    rows = [[case, what, *both, f"{both[1] / whole[1]:.0%}", share(*both)] for what, both in parts.items()]
    return [*rows, [case, "step", *whole, "100%", ""]]


def time_steps(case: str, rounds: int, compiled: bool, small: bool) -> tuple[dict[str, Any], str, list[list[Any]]]:
    """(contestants, the fastest form of PyTorch, rows of ratios) of a training step and its parts."""
    from benchmarks import throughput, volume

    if case == "vit_s":
        size = throughput.SIZES["small" if small else "vit_s"]
        own, batch = "benchmarks.throughput:", size["batch"]
        contestants = {"jmae": (own + "jmae_step", size), "tuned": (own + "torch_step", size)}
        if compiled:
            contestants["tuned, torch.compile"] = (own + "torch_step", size | {"compiled": True})
        network = {k: size[k] for k in ("width", "depth", "heads", "decoder")}
        network |= {"size": (size["image"],) * 2, "patch": (size["patch"],) * 2, "ratio": throughput.RATIO}
    else:
        preset, batch = ("small", 16) if small else ("paper", 1)
        network = volume.settings(preset)[1]["network"]
        theirs = {
            "network": network,
            "batch": batch,
            "device": "cpu",
            "compiled": False,
            "build": "benchmarks.volume:official",
        }
        contestants = {
            "jmae": ("benchmarks.volume:jmae_train", {"size": preset, "batch": batch}),
            "official": ("benchmarks.steps:torch_train", theirs | {"tuned": False}),
            "tuned": ("benchmarks.steps:torch_train", theirs | {"tuned": True}),
        }
        if compiled:
            contestants["tuned, torch.compile"] = (contestants["tuned"][0], theirs | {"tuned": True, "compiled": True})
    out = interleaved(contestants | throughput.parts(network, batch), rounds=rounds)
    forms = [name for name in contestants if name != "jmae"]
    best = min((name for name in forms if "tuned" in name), key=lambda name: out[name]["median_s"])
    rows = [row(case, name, out[name], out["jmae"], ratio(out[name], out["jmae"])) for name in forms]
    return out, best, [without_goal(r) if r[1] == "official" else r for r in rows]


def windows(size: str, number: int, rounds: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """(contestants, rows of ratios) of `number` windows, each with one mask."""
    from benchmarks import volume

    _, told = volume.settings(size, number)
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.npz"
        volume.random_weights(Path(weights), told["network"])
        agreed = volume.agreement(size, number, weights, "cpu")
        theirs = {"told": told, "weights": weights, "sweeps": 1, "device": "cpu"}
        ours = {"size": size, "windows": number, "weights": weights, "number": number}
        contestants = {
            "jmae": ("benchmarks.volume:jmae_volume", ours),
            "official": ("benchmarks.volume:torch_volume", theirs | {"fused": False}),
            "official, fused attention": ("benchmarks.volume:torch_volume", theirs | {"fused": True}),
        }
        out = interleaved(contestants, rounds=rounds)
    names = [name for name in contestants if name != "jmae"]
    each = {name: dict(out[name], median_s=out[name]["median_s"] / number) for name in out}
    rows = [row("windows", name, each[name], each["jmae"], ratio(out[name], out["jmae"])) for name in names]
    return out | {"same masks": agreed}, [without_goal(r) if "fused" in r[1] else r for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(GOALS), default=tuple(GOALS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also PyTorch with torch.compile, which takes minutes")
    parser.add_argument("--cores", type=int, help="number of cores to use; default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    cores = use_cores(options.cores) + ", small" * options.small
    os.environ["JAX_PLATFORMS"] = "cpu"
    key = "cpu_median_s" if options.cores == 1 else "median_s"  # for "between"; wall seconds contain other processes
    gaps: list[list[Any]] = []
    for case in options.only:
        if case == "windows":
            out, rows = windows("small" if options.small else "paper", options.windows, options.rounds)
        elif case == "composites":
            from benchmarks import anomalies

            out = anomalies.composites(max(7, options.rounds))
            rows = []
            for name, each in out["pie_torch_over"].items():
                if "jmae" in name:
                    peer = "25 blends, pie-torch" if "blends" in name else "pie-torch"
                    one = {"median_s": out[name]["median_s"] / out[name].get("composites", 1)}
                    line = row(case, f"{peer}; {name}", out[peer], one, each)
                    rows.append(without_goal(line) if "blends" in name else line)
        else:
            out, best, rows = time_steps(case, options.rounds, options.compile, options.small)
            gaps += between(case, out, best, key)
        rows = [without_goal(r) for r in rows] if options.small and case != "composites" else rows
        print(table(HEAD, [tuple(r) for r in rows]), flush=True)
        write(options.out, case + cores, {"contestants": out, "table": [HEAD, rows]})
    if gaps:
        head = ("step", "part", "PyTorch s", "jmae s", "share of jmae's step", "share of the difference")
        print(table(head, [tuple(r) for r in gaps]))
        write(options.out, "between" + cores, {"table": [head, gaps]})


if __name__ == "__main__":
    main()
