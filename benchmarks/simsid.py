"""Times SimSID's training steps and score against plain PyTorch, and trains its settings on phantoms and chest X-rays.

    python -m benchmarks.simsid speed                    # the phantoms' sizes; --paper: 128 px and the report's widths
    python -m benchmarks.simsid phantoms                 # both variants
    python -m benchmarks.simsid volumes                  # 3D phantoms
    JMAE_DATA=FOLDER python -m benchmarks.simsid cxr_peds --seeds 0 1 2   # variants, and one change at a time

PyTorch has the report's networks, retrieval and transformer in two forms. One runs patches and positions in Python
loops, as the report's listings do; the other runs them as a batch. Settings train with `python -m jmae.train --config
configs/simsid.py`. Further --config.KEY=VALUE are passed on. `--only NAME ...` runs some of the settings. A setting
whose result of the same budget and seed is in benchmarks/results/simsid.json does not run again. An interrupted run
goes on where it stopped.

The tables have all scores beside the cheap baselines: means over the seeds, with the means of the ends of their
intervals. "inverted" marks a score whose interval lies below .5: abnormal cases have the lower scores. Then come the
share of the memory's slots that an image still overwrites at the end of the last pass, and training figures beside
the values that the report prints.
"""

import argparse
import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steps import train_run, without_curves
from benchmarks.timing import Prepared, interleaved, ratio, table, write

RESULTS = Path(__file__).parent / "results" / "simsid.json"
OFFICIAL: dict[str, Any] = {"variant": "official", "evaluation.score": "simsid"}
PARTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "phantoms": ("", {"report": {}, "official": {"variant": "official"}}),
    "volumes": (":phantom3d", {"report": {}}),
    "cxr_peds": (
        ":small",
        {
            "report": {},
            "adversarial": {"student.adversarial": 5e-4},
            "no inpainting": {"model.inpainting": False},
            "no memory": {"memory.levels": 0},
            "no distillation": {"student.distillation": 0.0},
            "random encoder": {"model.encoder": "frozen_random"},
            "one level": {"memory.levels": 1},
            "two levels": {"memory.levels": 2},
            "own place": {"memory.restrict": True},
            "official": OFFICIAL,
            "official, judged in eval mode": OFFICIAL | {"joint.judge": "running"},
            "official, not adversarial": OFFICIAL | {"joint.weights.adversarial": 0.0},
            "official, no inpainting": OFFICIAL | {"joint.inpainting": False},
            "official, no memory": OFFICIAL | {"joint.slots": 0},
            "official, no distillation": OFFICIAL | {"joint.weights.distillation": 0.0},
            "official, queue": OFFICIAL | {"joint.queue": True, "joint.kept": 1.0},
            "SQUID": OFFICIAL
            | {
                "joint.queue": True,
                "joint.activation": "sigmoid",
                "joint.kept": 0.95,
                "joint.decoder_kept": 0.95,
                "joint.tolerance": 0.005,
                "model.discriminator": "8,16,32,64,64",
            },
        },
    ),
}

# --- speed ------------------------------------------------------------------------------------------------------------


def settings(paper: bool) -> Any:
    """The recipe whose steps are timed."""
    from jmae import recipe

    return recipe.load("configs/simsid.py:paper" if paper else "configs/simsid.py")


def jmae_score(*, paper: bool) -> Prepared:
    """jmae's scores of a batch, with initial weights."""
    import jax

    from jmae.system import load_system

    config = settings(paper)
    system, results, key, n = load_system(config), {}, jax.random.key(0), config.teacher.batch
    image = np.random.default_rng(0).uniform(size=(n, *config.data.size, config.data.channels)).astype(np.float32)
    batch = jax.device_put({"image": image, "case": np.zeros((n, 2), np.uint32)})
    for stage in system.stages:
        state = jax.jit(lambda key, results, stage=stage: stage.init(key, results, n))(key, results)
        results[stage.name] = {"params": state.params, "stats": state.stats}
    start = time.perf_counter()
    asked = lambda out: {name: out[name] for name in ("maps", "scores", "reconstruction")}  # no report's pictures
    score = jax.jit(lambda results, batch: asked(system.score(results, batch, key)))
    compiled = score.lower(results, batch).compile()
    return lambda: jax.block_until_ready(compiled(results, batch)), {"compile_s": time.perf_counter() - start}


def torch_run(*, what: str, paper: bool, looped: bool, device: str = "cpu") -> Prepared:
    """A teacher step, a student step or a score in PyTorch, eagerly.

    `looped` runs patches and positions one by one. Otherwise they are a batch, on a GPU in bfloat16.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.steps import torch_facts

    torch.set_default_device(device)
    torch.manual_seed(0)
    config = settings(paper)
    model, memory, b = config.model, config.memory, config.teacher.batch
    (height, width), (p, q), d = config.data.size, model.patch, model.features
    rows, columns = height // p, width // q
    n, widths = rows * columns, list(model.widths)

    def encoder() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in zip([1, *widths], widths, strict=False):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        cells = (p // 2 ** len(widths)) * (q // 2 ** len(widths))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(cells * widths[-1], d))

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            back, scale = widths[::-1], 2 ** len(widths)
            self.start = (back[0], height // scale, width // scale)
            self.dense = nn.Linear(n * d, back[0] * self.start[1] * self.start[2])
            pairs = pairwise(back)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in pairs
            )
            self.out = nn.ConvTranspose2d(back[-1], 1, 4, 2, 1)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            x, xs = self.dense(x.flatten(1)).view(-1, *self.start), []
            for layer in self.layers:
                x = layer(x)
                xs.append(x)
            return [*xs, self.out(x)]

    def discriminator() -> nn.Module:
        chain, layers = list(model.discriminator), list[nn.Module]()
        for i, (a, o) in enumerate(zip([1, *chain], chain, strict=False)):
            layers += [nn.Conv2d(a, o, 5, 2, 2), *([nn.BatchNorm2d(o)] if i else []), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(1))

    class Inpainting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(memory.levels * d, model.width)
            self.positions = nn.Parameter(torch.randn(9, model.width) * 0.02)
            layer = nn.TransformerEncoderLayer(model.width, model.heads, model.mlp, model.dropout, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, model.depth, enable_nested_tensor=False)
            self.out = nn.Linear(model.width, d)

    places = torch.arange(n).view(rows, columns)
    padded = F.pad(places, (1, 1, 1, 1), value=n)  # row n is zeros
    around = [[padded[r + i, c + j] for i in range(3) for j in range(3)] for r in range(rows) for c in range(columns)]
    order = torch.tensor(around)[:, [0, 1, 2, 3, 5, 6, 7, 8, 4]]
    matrices = [torch.randn(m, d) for m in (n, -(-rows // 2) * -(-columns // 2), 1)][: memory.levels]

    def retrieve(f: torch.Tensor, matrix: torch.Tensor, noisy: bool) -> torch.Tensor:
        scores = f @ matrix.T
        scores = scores - torch.log(-torch.log(torch.rand_like(scores))) if noisy else scores
        soft = torch.softmax(scores / memory.temperature, -1)
        best, index = soft.topk(min(memory.top_k, len(matrix)), -1)
        hard = torch.zeros_like(soft).scatter(-1, index, best / best.sum(-1, keepdim=True))
        return ((hard - soft).detach() + soft) @ matrix

    def features(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
        patches = image.unfold(2, p, p).unfold(3, q, q).reshape(len(image), 1, n, p, q).transpose(1, 2)
        if looped:
            return torch.stack([net(patches[:, i]) for i in range(n)], 1)
        return net(patches.reshape(-1, 1, p, q)).view(len(image), n, d)

    def inpainted(net: Inpainting, f: torch.Tensor, noisy: bool) -> torch.Tensor:
        if looped:
            each = [torch.cat([retrieve(f[:, i], m, noisy) for m in matrices], -1) for i in range(n)]
            x = torch.stack([net.project(one) for one in each], 1)
        else:
            x = net.project(torch.cat([retrieve(f, m, noisy) for m in matrices], -1))
        x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        if looped:
            tokens = [torch.stack([x[:, k] for k in order[i]], 1) + net.positions for i in range(n)]
            return torch.stack([net.out(net.layers(one)[:, -1]) for one in tokens], 1)
        tokens = (x[:, order] + net.positions).flatten(0, 1)
        return net.out(net.layers(tokens)[:, -1]).view(len(f), n, d)

    enc, teacher, student, inpainting, judge = encoder(), Generator(), Generator(), Inpainting(), discriminator()
    image = torch.rand(b, 1, height, width)
    judge(image)
    trained = {"teacher": [enc, teacher], "student": [student, inpainting], "score": []}[what]
    for net in (enc, teacher, student, inpainting, judge):
        net.train(net in trained)
    parameters = [p for net in trained for p in net.parameters()]
    adam = torch.optim.Adam(parameters, 1e-4, (0.5, 0.999), fused=not looped) if parameters else None

    def loss() -> torch.Tensor:
        if what == "teacher":
            return F.mse_loss(teacher(features(enc, image))[-1], image)
        with torch.no_grad():
            f = features(enc, image)
            shown = teacher(f)
        xs = student(inpainted(inpainting, f, True))
        return F.mse_loss(xs[-1], image) + 0.1 * sum(F.mse_loss(x, z) for x, z in zip(xs, shown, strict=True))

    @torch.no_grad()
    def score() -> None:
        made = student(inpainted(inpainting, features(enc, image), False))[-1]
        judge(made), judge(image), (made - image).abs(), (made - image) ** 2

    def step() -> None:
        assert adam
        adam.zero_grad()
        loss().backward()
        adam.step()

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and not looped):
            (score if what == "score" else step)()
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    facts = {"batch": b, "parameters": sum(p.numel() for p in parameters)}
    if looped:
        with FlopCounterMode(display=False) as counter:
            run()
        facts["counted_flops"] = counter.get_total_flops()
    return run, facts | torch_facts(device)


def contestants(what: str, paper: bool, device: str = "cpu") -> dict[str, tuple[str, dict[str, Any]]]:
    """The contestants: jmae, PyTorch with loops, and PyTorch with a batch."""
    given = {"what": what, "paper": paper, "device": device}
    ours: dict[str, Any] = {"recipe": f"simsid.py:{'paper' if paper else 'phantom'}", "stage": what}
    score = ("benchmarks.simsid:jmae_score", {"paper": paper})
    return {
        "jmae": score if what == "score" else ("benchmarks.steps:jmae_stage", ours),
        "PyTorch, loops": ("benchmarks.simsid:torch_run", given | {"looped": True}),
        "PyTorch, batch": ("benchmarks.simsid:torch_run", given | {"looped": False}),
    }


def speed(paper: bool, rounds: int) -> None:
    """Prints and writes milliseconds and ratios.

    Every contestant uses huge pages, as `make` does. On a CPU, XLA allocates the memory of a step again at each call.
    For a call with 130 MiB on one core, the system's share was 106 ms with pages of 4 KiB and 25 ms with huge pages.
    """
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    for what in ("teacher", "student", "score"):
        results: dict[str, Any] = interleaved(contestants(what, paper), rounds=rounds)
        ratios = {name: ratio(results[name], results["jmae"]) for name in results if name != "jmae"}
        lines = [
            (
                what,
                name,
                1e3 * r["median_s"],
                1e3 * r["cpu_median_s"],
                r["peak_mib"],
                ratios.get(name, {}).get("median", 1.0),
            )
            for name, r in results.items()
        ]
        print(table(("batch of 16", "by", "ms", "CPU ms", "MiB", "times jmae"), lines))
        write(RESULTS, f"speed, {what}{', paper' * paper}", {"results": results, "ratios": ratios})


# --- settings ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", *PARTS))
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/simsid-accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    if options.what == "speed":
        return speed(options.paper, options.rounds)
    preset, changes = PARTS[options.what]
    pack = Path(os.environ.get("JMAE_DATA", "")) / options.what / "manifest.csv"
    real = options.what == "cxr_peds"
    if real and (not os.environ.get("JMAE_DATA") or not pack.is_file()):
        print(f"not run: {pack} not found; set JMAE_DATA to the folder of the packs")
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:  # the first seed of all settings comes first
        for name in options.only or changes:
            given = [f"--config.{key}={value}" for key, value in {**changes[name], "seed": seed}.items()]
            given += [f"--config.data.manifest={pack}"] if real else []
            key = ", ".join([options.what, name, *(o.removeprefix("--config.") for o in overrides), f"seed {seed}"])
            workdir = options.workdir / re.sub(r"[^\w.]+", "-", key)
            arguments = [f"--config=configs/simsid.py{preset}", *given, *overrides]
            found.setdefault(name, []).append(result_of(key, arguments, workdir))
    show(found)
    return None


def result_of(key: str, arguments: list[str], workdir: Path) -> dict[str, Any]:
    """The result of a training and its evaluation, from the file of results if it is there."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if key in known:
        return known[key]
    result = train_run(arguments, workdir)
    metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    result |= {name: metrics[name] for name in ("primary", "scores", "baselines", "decision")}
    result["printed"] = metrics.get("printed", [])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    written = [line for line in lines if line.get("stage") == "memory" and "overwritten_level_0" in line]
    last = written[-1] if written else {}
    result["overwritten"] = [last[name] for name in sorted(last) if name.startswith("overwritten_level_")]
    write(RESULTS, key, without_curves(result))
    return json.loads(RESULTS.read_text())[key]


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the tables of all settings, given the results of each setting's seeds."""
    rows, shares, epochs = list[tuple[Any, ...]](), list[tuple[Any, ...]](), list[tuple[Any, ...]]()
    for name, results in found.items():
        first = results[0]
        for kind in ("scores", "baselines"):
            for score in first[kind]:
                image = [result[kind][score]["image"] or {} for result in results]
                pixel = [result[kind][score]["pixel"] or {} for result in results]
                mean = lambda parts, key: (
                    float(np.mean([p[key] for p in parts])) if all(key in p for p in parts) else ""
                )
                ends = [part.get("auroc_ci") or (np.nan, np.nan) for part in image]
                low, high = (float(end) for end in np.mean(ends, 0))
                mark = "inverted" if high < 0.5 else "" if high >= 0.5 else "no interval"
                figures = (mean(image, "auroc"), low, high, mean(image, "ap"), mean(pixel, "auroc"))
                rows.append((name, score + " *" * (score == first["primary"]), len(results), *figures, mark))
        if first.get("overwritten"):
            share = np.mean([result["overwritten"] for result in results], 0).tolist()
            shares.append((name, *share, *[""] * (3 - len(share))))
        epochs += [
            (name, p["stage"], p["metric"], p["epoch"], p["ours"] or "", p["printed"], p.get("otherwise", ""))
            for p in first["printed"]
        ]
    print(table(("setting", "score", "seeds", "image AUROC", "from", "to", "AP", "pixel AUROC", ""), rows))
    print(table(("setting", "overwritten, level 0", "1", "2"), shares))
    print(table(("setting", "stage", "metric", "epoch", "here", "report's", "not as the report"), epochs))


if __name__ == "__main__":
    main()
