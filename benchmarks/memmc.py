"""Times MemMC-MAE's memory, decoder and ten-mask score, and trains its settings on real images.

    python -m benchmarks.memmc steps                     # a training step at the size of ViT-B, beside that of a plain
    MAE python -m benchmarks.memmc scoring                   # ten masks in one pass against ten single calls
    JMAE_DATA=FOLDER python -m benchmarks.memmc cxr_peds
    JMAE_DATA=FOLDER python -m benchmarks.memmc endoscopy
    JMAE_DATA=FOLDER python -m benchmarks.memmc ablation # the paper's Table 2, with three seeds and half the steps
    JMAE_DATA=FOLDER python -m benchmarks.memmc options  # choices that the paper leaves open: gates, slots, skips

`steps` compares every variant with the plain MAE in the same run. It prints the ratio of times beside the ratio of
multiply-adds by formula. The last four train with `python -m jmae.train --config configs/memmc_mae.py:small`. Further
--config.KEY=VALUE are passed on. `--only NAME ...` runs some of the settings. benchmarks/results/memmc.json keeps all.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steps import train_run
from benchmarks.timing import Prepared, interleaved, ratio, table, write

RESULTS = Path(__file__).parent / "results" / "memmc.json"
PLAIN = {"model.memory": 0, "model.mc_decoder": False, "model.long_skips": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "MAE": PLAIN,
    "memory": PLAIN | {"model.memory": 40},
    "memory, decoder (token)": {"model.gate": "token"},
    "memory, decoder (channel)": {},
}
ABLATION = {name: VARIANTS[name] for name in ("MAE", "memory")} | {
    "memory, decoder": {"model.long_skips": False},
    "memory, decoder, long skips": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gate token": {"model.gate": "token"},
    "MAE, long skips": PLAIN | {"model.long_skips": True},
    **{f"{slots} slots": {"model.memory": slots} for slots in (10, 100, 200)},
}
THREE = {"replicates": 3, "budget": 0.5}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "cxr_peds": {"MemMC-MAE": {}},
    "endoscopy": {"MemMC-MAE": {"data.channels": 3, "model.channels": 3}},
    "ablation": {name: changes | THREE for name, changes in ABLATION.items()},
    "options": {name: changes | THREE for name, changes in OPTIONS.items()},
}


def multiply_adds(c: Any) -> tuple[float, float]:
    """Multiply-adds (encoder, decoder) of an image's forward pass: dense products and attention, without embeddings."""
    n = int(np.prod([s // p for s, p in zip(c.data.size, c.model.patch, strict=True)]))
    k = int(n * (1 - c.train.mask_ratio)) + 1
    w, d, levels = c.model.width, c.model.decoder_width, c.model.depth
    block = lambda tokens, width, keys: 12 * tokens * width**2 + 2 * tokens * keys * width
    encoder = c.model.depth * block(k, w, k + c.model.memory)
    decoder = c.model.decoder_depth * block(n + 1, d, n + 1)
    if c.model.mc_decoder:
        q = n + 1
        each = k * w * 2 * d + 2 * q * k * d  # keys and values, attention, for each level
        each += q * d**2 + 2 * q * d * d if c.model.gate == "channel" else 2 * q * d  # projection and gate
        once = q * d**2 + (q * d**2 if c.model.gate == "token" else 0)
        decoder += c.model.decoder_depth * (levels * each + once)
    return encoder, decoder


def recipe(changes: dict[str, Any], preset: str = "paper") -> Any:
    """The recipe with changed values."""
    from jmae.recipe import parse

    return parse([f"--config=configs/memmc_mae.py:{preset}", *(f"--config.{k}={v}" for k, v in changes.items())], "")[0]


def official(*, memory: int, fused: bool = False, **network: Any) -> Any:
    """MemMC-MAE in plain PyTorch on the blocks of the official MAE. A call gives the loss of images.

    Its choices are those of the preset `paper`: a gate for each channel, division by the root of the number of levels,
    long skips.
    """
    import torch
    from torch import nn

    from benchmarks.volume import attend
    from benchmarks.volume import official as plain

    base = plain(**network, fused=fused)
    width, depth, (d, _, heads) = network["width"], network["depth"], network["decoder"]
    split = lambda x, h: x.reshape(len(x), x.shape[1], h, -1).transpose(1, 2)
    norm = lambda d: nn.LayerNorm(d, eps=1e-6)

    class Memory(nn.Module):
        def __init__(self, attention: nn.Module):
            super().__init__()
            self.qkv, self.proj, self.heads = attention.qkv, attention.proj, attention.heads
            self.k, self.v = (nn.Parameter(torch.randn(1, memory, width) / memory) for _ in range(2))

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(x).chunk(3, -1)
            k, v = (torch.cat([a, s.expand(len(x), -1, -1)], 1) for a, s in ((k, self.k), (v, self.v)))
            out = attend(*(split(a, self.heads) for a in (q, k, v)), fused)
            return self.proj(out.transpose(1, 2).flatten(2))

    class MultiLevel(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block, self.norm, self.level_norm = block, norm(d), norm(width)
            self.query, self.key_value, self.out = nn.Linear(d, d), nn.Linear(width, 2 * d), nn.Linear(d, d)
            self.gates = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(depth))

        def forward(self, y: Any, levels: list[Any]) -> Any:
            s = y + self.block.attn(self.block.norm1(y))
            q, mixed = split(self.query(self.norm(s)), heads), torch.zeros_like(s)
            for gate, level in zip(self.gates, levels, strict=True):
                k, v = (split(a, heads) for a in self.key_value(self.level_norm(level)).chunk(2, -1))
                c = self.out(attend(q, k, v, fused).transpose(1, 2).flatten(2))
                mixed = mixed + torch.sigmoid(gate(torch.cat([s, c], -1))) * c
            s = s + mixed * depth**-0.5
            return s + self.block.mlp(self.block.norm2(s))

    def through(blocks: nn.ModuleList, x: Any, *seen: Any) -> list[Any]:
        """The outputs of all blocks, with long skips."""
        outputs: list[Any] = []
        for k, block in enumerate(blocks):
            x = x + outputs[len(blocks) - 1 - k] if k >= len(blocks) - (len(blocks) - 1) // 2 else x
            x = block(x, *seen)
            outputs.append(x)
        return outputs

    class Model(type(base)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.attn = Memory(block.attn)
            self.decoder_blocks = nn.ModuleList(MultiLevel(block) for block in self.decoder_blocks)

        def encoded(self, x: Any) -> tuple[Any, Any]:
            levels = through(self.blocks, x)
            return self.norm(levels[-1]), levels

        def decoded(self, x: Any, seen: Any) -> Any:
            return self.decoder_norm(through(self.decoder_blocks, x, seen)[-1])

    return Model()


def score(*, fused: bool, batch: int, preset: str) -> Prepared:
    """Ten masks of a batch, in one pass, or in ten passes of one mask whose results are added on the device."""
    import jax
    import jax.numpy as jnp

    from jmae.system import load_system

    config = recipe({} if fused else {"evaluation.masks": 1}, preset)
    system = load_system(config)
    state = jax.jit(lambda key: system.stages[0].init(key, {}, batch))(jax.random.key(0))
    results = {"train": {"params": state.params, "stats": {}}}
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(batch, *config.data.size, config.data.channels)).astype(np.float32)
    some = jax.device_put({"image": image, "case": np.arange(2 * batch, dtype=np.uint32).reshape(batch, 2)})
    assert system.score
    program = jax.jit(system.score)
    keys = [jax.random.key(j) for j in range(1 if fused else 10)]
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def run() -> None:
        total = None
        for key in keys:
            out = program(results, some, key)
            total = out if total is None else add(total, out)
        jax.block_until_ready(total)

    return run, {"batch": batch}


def steps(preset: str, batch: int, rounds: int) -> None:
    """Times the training step of every variant."""
    contestants = {
        name: (
            "benchmarks.steps:jmae_stage",
            {"recipe": f"memmc_mae.py:{preset}", "batch": batch, "changes": changes | {"data.crop_scale": ()}},
        )
        for name, changes in VARIANTS.items()
    }
    counts = {name: multiply_adds(recipe(changes, preset)) for name, changes in VARIANTS.items()}
    out, rows = interleaved(contestants, rounds=rounds), []
    plain = out["MAE"]
    for name, one in out.items():
        counted = sum(counts[name]) / sum(counts["MAE"])
        measured = ratio(one, plain)["median"]
        rows.append((name, one["median_s"], measured, counted, measured / counted, one["peak_mib"]))
        one |= {"over_plain": measured, "counted": counted, "multiply_adds": counts[name]}
    write(RESULTS, f"steps, {preset}, batch {batch}", out)
    if preset == "paper":
        hours = 2000 * 13_794 / batch * out["memory, decoder (channel)"]["median_s"] / 3600
        print(f"2000 epochs of 13,794 images at this batch: {hours:.0f} h (the paper: 22 h on an RTX 3090)")
    print(table(("network", "step s", "of plain", "counted", "measured / counted", "MiB"), rows))


def scoring(preset: str, batch: int, rounds: int) -> None:
    """Times both ways to score ten masks."""
    contestants = {
        name: ("benchmarks.memmc:score", {"fused": name == "fused", "batch": batch, "preset": preset})
        for name in ("fused", "ten calls")
    }
    out = interleaved(contestants, rounds=rounds)
    gain = ratio(out["ten calls"], out["fused"])
    write(RESULTS, f"scoring, {preset}, batch {batch}", out | {"ten_calls_over_fused": gain})
    rows = [(name, 1000 * one["median_s"] / batch, one["peak_mib"]) for name, one in out.items()]
    print(table(("ten masks", "ms an image", "MiB"), rows), f"\nratio {gain['median']:.2f}")


def show(name: str, result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a setting in the table: the figures of every score and of the baselines."""
    rows = []
    for kind in ("scores", "baselines"):
        for title, part in result[kind].items():
            image, pixel = part["image"] or {}, part["pixel"] or {}
            found = pixel.get("localisation") or {}
            interval = "[{:.3f}, {:.3f}]".format(*image["auroc_ci"]) if image else ""
            figures = (
                image.get("auroc", ""),
                interval,
                image.get("ap", ""),
                pixel.get("auroc", ""),
                pixel.get("ap", ""),
            )
            rows.append((name, title, *figures, found.get("normals", ""), found.get("oracle", "")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "scoring", *PARTS))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--preset", default="paper", help="of steps and scoring")
    parser.add_argument("--batch", type=int, default=4, help="of steps and scoring")
    parser.add_argument("--rounds", type=int, default=5, help="of steps and scoring")
    parser.add_argument("--workdir", type=Path, default=Path("runs/memmc-accuracy"))
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    if options.what in ("steps", "scoring"):
        (steps if options.what == "steps" else scoring)(options.preset, options.batch, options.rounds)
        return
    pack = Path(os.environ.get("JMAE_DATA", "")) / (
        "cxr_peds" if options.what in ("ablation", "options") else options.what
    )
    manifest = pack / "manifest.csv"
    if not os.environ.get("JMAE_DATA") or not manifest.is_file():
        print(f"not run: {manifest} not found; set JMAE_DATA to the folder of the packs")
        return
    rows = []
    for name, changes in PARTS[options.what].items():
        if options.only and name not in options.only:
            continue
        given = [f"--config.{key}={value}" for key, value in changes.items()]
        setting = "-".join([options.what, name, *(override.removeprefix("--config.") for override in overrides)])
        folder = options.workdir / setting.replace(", ", "-").replace(" ", "-").replace("/", "-")
        own = ["--config=configs/memmc_mae.py:small", f"--config.data.manifest={manifest}", *given, *overrides]
        seconds = train_run(own, folder)["wall_seconds"]
        result = json.loads((folder / "evaluation" / "metrics.json").read_text()) | {"wall_seconds": seconds}
        kept = ("image", "pixel", "scores", "baselines", "replicates", "decision", "seconds_per_case", "wall_seconds")
        write(RESULTS, f"{options.what}, {name}", {k: result.get(k) for k in kept})
        rows += show(name, result)
    head = ("setting", "score", "image AUROC", "95 %", "AP", "pixel AUROC", "AP", "IoU", "IoU, oracle")
    print(table(head, rows))


if __name__ == "__main__":
    main()
