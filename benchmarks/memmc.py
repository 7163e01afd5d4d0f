"""MemMC-MAE: what its memory and its decoder cost, its ten-mask score, and its runs on real images.

    python -m benchmarks.memmc steps                     # a training step at ViT-B size beside the plain MAE's
    python -m benchmarks.memmc scoring                   # ten masks in one pass against ten single calls
    python -m benchmarks.memmc count                     # products, and hours on the paper's card, for either gate
    JMAE_DATA=FOLDER python -m benchmarks.memmc cxr_peds
    JMAE_DATA=FOLDER python -m benchmarks.memmc endoscopy
    JMAE_DATA=FOLDER python -m benchmarks.memmc ablation # the paper's Table 2
    JMAE_DATA=FOLDER python -m benchmarks.memmc options  # what it leaves open: gates, slots, skips of the plain MAE
    JMAE_DATA=FOLDER python -m benchmarks.memmc scores   # luminance, border and mean over masks of the runs above
    JMAE_DATA=FOLDER python -m benchmarks.memmc frames   # IoU of whole colonoscopy frames, by windows

`steps` compares every variant with the plain MAE in the same run and prints the ratio beside that of the multiply-adds
by formula. The others train the recipe `small` with seeds 0 to 2 (`--seeds`) and all of its steps (`--budget`); further
--config.KEY=VALUE are passed on, `--only NAME ...` runs some settings. benchmarks/results/memmc.json keeps every seed.
What has a result is not run again, and a run that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import add_options, key_of, over_seeds, pack, trained
from benchmarks.timing import Prepared, interleaved, ratio, table, write

RESULTS = Path(__file__).parent / "results" / "memmc.json"
PLAIN = {"model.memory": 0, "model.mc_decoder": False, "model.long_skips": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "MAE": PLAIN,
    "memory": PLAIN | {"model.memory": 40},
    "memory, decoder (token)": {"model.gate": "token"},
    "memory, decoder (channel)": {"model.gate": "channel"},
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
PARTS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {  # pack, preset, settings
    "cxr_peds": ("cxr_peds", "small", {"MemMC-MAE": {}}),
    "endoscopy": ("endoscopy", "small_colour", {"MemMC-MAE": {}}),
    "ablation": ("cxr_peds", "small", ABLATION),
    "options": ("cxr_peds", "small", OPTIONS),
}
SCORED = {  # settings of the evaluation
    f"{luminance}, {border}, {average}": [
        f"--config.evaluation.{key}={value}"
        for key, value in (("luminance", luminance), ("border", border), ("average", average))
    ]
    for average in ("hidden", "all")
    for luminance in ("standardised", "unit", "none")
    for border in ("stretch", "mirror")
}
FRAMES, WINDOW, STRIDE = "endoscopy/full", (128, 128), (32, 32)  # the crops that are trained on are such windows
IMAGES, EPOCHS, HOURS = 13_794, 2000, 22  # of the paper
CARD = {"float32": 35.6e12, "float16 on tensor cores": 71.2e12}  # RTX 3090: operations a second, by NVIDIA's table


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


def count() -> None:
    """Products of an image's training, and what the paper's 22 hours on an RTX 3090 would take of the card's rate."""
    rows, out = [], {}
    for name, changes in VARIANTS.items():
        encoder, decoder = multiply_adds(recipe(changes))
        operations = 2 * 3 * (encoder + decoder)  # a product is two operations; the backward pass takes two forwards
        total = operations * IMAGES * EPOCHS
        hours = {kind: total / rate / 3600 for kind, rate in CARD.items()}
        needed = total / (HOURS * 3600)
        out[name] = {"encoder": encoder, "decoder": decoder, "operations": total, "hours_at_peak": hours}
        out[name]["share_of_peak_in_22_hours"] = {kind: needed / rate for kind, rate in CARD.items()}
        rows.append((name, encoder / 1e9, decoder / 1e9, *hours.values(), needed / 1e12))
    write(RESULTS, "count, paper", {"settings": out})
    head = ("network", "encoder, 10^9", "decoder, 10^9", *(f"h, {kind}" for kind in CARD), "10^12/s in 22 h")
    print(table(head, rows))


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
            {
                "recipe": f"memmc_mae.py:{preset}",
                "batch": batch,
                "changes": changes | {"data.crop_scale": (), "data.crop_from": ()},
            },
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
        hours = EPOCHS * IMAGES / batch * out["memory, decoder (token)"]["median_s"] / 3600
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


FIGURES = {
    "image AUROC": ("image", "auroc"),
    "AP": ("image", "ap"),
    "pixel AUROC": ("pixel", "auroc"),
    "pixel AP": ("pixel", "ap"),
    "IoU": ("pixel", "localisation", "normals"),
    "calls": ("pixel", "localisation", "normals_called"),
    "IoU, oracle": ("pixel", "localisation", "oracle"),
    "IoU, all": ("pixel", "localisation", "everything"),
}


def show(name: str, results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Table rows of a setting: the figures of every score and of the baselines over the seeds."""
    titles = [(kind, title) for kind in ("scores", "baselines") for title in results[0][kind]]
    return [
        (name, title, *(over_seeds(results, kind, title, *path) for path in FIGURES.values())) for kind, title in titles
    ]


def runs_of(options: argparse.Namespace) -> list[tuple[str, str, Path]]:
    """(pack, result's name, run folder) of the trainings on children's X-rays and on colonoscopy that are there."""
    found = []
    for part in ("cxr_peds", "endoscopy"):
        for seed in options.seeds:
            key = key_of(part, "MemMC-MAE", options.budget, seed)
            folder = options.workdir / key.replace(", ", "-").replace(" ", "-")
            if (folder / "evaluation" / "metrics.json").is_file():
                found.append((part, key, folder))
            else:
                print(f"not run: {folder}: python -m benchmarks.memmc {part} --seeds {seed}")
    return found


def scores(options: argparse.Namespace) -> None:
    """Both sets under every reading of the score, on `val`, by which a preset may be chosen, and on `test`."""
    rows = []
    for part, key, folder in runs_of(options):
        for split in ("val", "test"):
            for name, changes in SCORED.items():
                title = f"scores, {key}, {split}, {name}"
                there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                if title not in there or options.again:
                    out = folder / "scores" / f"{split}-{name.replace(', ', '-')}"
                    command = [sys.executable, "-m", "jmae.evaluate", f"--workdir={folder}", f"--split={split}"]
                    more = ["--config.evaluation.maps=false", "--config.evaluation.draws=200"]
                    subprocess.run([*command, f"--out={out}", *changes, *more], check=True)
                    metrics = json.loads((out / "metrics.json").read_text())
                    keep = {k: (metrics["pixel"] or {}).get(k) for k in ("auroc", "ap")}
                    write(RESULTS, title, {"image": metrics["image"], "pixel": keep})
                    there = json.loads(RESULTS.read_text())
                image, pixel = there[title]["image"], there[title]["pixel"]
                rows.append((part, split, key.rpartition(" ")[2], name, image["auroc"], pixel["auroc"] or ""))
    print(table(("set", "split", "seed", "luminance, border, mean", "image AUROC", "pixel AUROC"), rows))


def frame_maps(scorer: Any, image: Any, name: str) -> np.ndarray:
    """The primary map of a whole frame: the mean over the windows that cover a pixel.

    A window of one value, such as a black corner, has no content and is left out. A pixel that such windows alone cover
    has the lowest value of the frame.
    """
    from jmae.data.manifest import Row
    from jmae.results import map_name
    from jmae.windows import ends

    size, (h, w) = image.array.shape[:2], WINDOW
    cut = lambda y, x: image._replace(array=image.array[y : y + h, x : x + w])
    corners = [(y - h, x - w) for y in ends(size[0], h, STRIDE[0]) for x in ends(size[1], w, STRIDE[1])]
    corners = [corner for corner in corners if np.ptp(cut(*corner).array, (0, 1)).any()]
    parts = [cut(*corner) for corner in corners]
    if not parts:
        return np.zeros(size, np.float32)
    cases = [scorer.prepare(Row(f"{name} {k}", "", "test", None, (name,)), part) for k, part in enumerate(parts)]
    total, count = np.zeros(size), np.zeros(size)
    for (y, x), result in zip(corners, scorer.score(cases), strict=True):
        total[y : y + h, x : x + w] += result.own_maps()[map_name(scorer.system)][0]
        count[y : y + h, x : x + w] += 1
    found = total / np.maximum(count, 1)
    return np.where(count > 0, found, found[count > 0].min()).astype(np.float32)


def frames(options: argparse.Namespace) -> None:
    """IoU of whole frames, as the paper's .419 is of whole frames: windows of the trained size, averaged."""
    from jmae import recipe as recipes
    from jmae.data.cases import load_rows
    from jmae.data.files import read_image, read_mask
    from jmae.fitting import restore_results
    from jmae.inference import Scorer, score_rows
    from jmae.lesions import Localisation
    from jmae.metrics import Pooled
    from jmae.results import map_name
    from jmae.system import load_system

    folder = pack("endoscopy")
    if folder is None:
        return
    images = sorted((folder / "full" / "images").iterdir())
    rows = []
    for _, key, run in (each for each in runs_of(options) if each[0] == "endoscopy"):
        title = f"frames, {key}"
        there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if title not in there or options.again:
            config = recipes.read(run)
            system = load_system(config)
            scorer = Scorer(config, system, restore_results(config, system, run))
            normals = [row for row in load_rows(config) if row.split == "val" and row.label == 0]
            pool, found, pixels = Pooled(), {name: Localisation() for name in ("map", "brightness")}, {}
            for result in score_rows(scorer, normals):
                one = result.own_maps()[map_name(system)][0]
                pool.add(np.zeros(one.shape, bool), one)
            for path in images:
                image = read_image(str(path))
                mask = read_mask(str(folder / "full" / "masks" / f"{path.stem}.png"), image)
                maps = {"map": frame_maps(scorer, image, str(path)), "brightness": image.array.mean(-1)}
                for name, values in maps.items():
                    found[name].add(mask, values.astype(np.float32))
                    pixels.setdefault(name, Pooled()).add(mask, values.astype(np.float32))
            thresholds = {"map": pool.percentile(config.evaluation.iou)}
            finite = lambda part: {k: None if v != v else v for k, v in part.items()}  # one group has no deviation
            result = {
                name: {"localisation": finite(found[name].result(thresholds.get(name))), "pixel": pixels[name].result()}
                for name in found
            }
            write(RESULTS, title, {"images": len(images), **result})
            there = json.loads(RESULTS.read_text())
        for name in ("map", "brightness"):
            l = there[title][name]["localisation"]  # noqa: E741
            calls = (l["normals"] or "", l["normals_called"] or "", l["oracle"], l["oracle_called"], l["everything"])
            rows.append((key.rpartition(" ")[2], name, there[title][name]["pixel"]["auroc"], *calls))
    head = ("seed", "map", "pixel AUROC", "IoU", "calls", "IoU, oracle", "calls", "IoU, all")
    print(table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "scoring", "count", *PARTS, "scores", "frames"))
    parser.add_argument("--preset", default="paper", help="of steps and scoring")
    parser.add_argument("--batch", type=int, default=4, help="of steps and scoring")
    parser.add_argument("--rounds", type=int, default=5, help="of steps and scoring")
    parser.add_argument("--workdir", type=Path, default=Path("runs/memmc-accuracy"))
    add_options(parser)
    options, overrides = parser.parse_known_args()
    if wrong := [override for override in overrides if not override.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown; recipe values are --config.KEY=VALUE")
    if options.what in ("steps", "scoring"):
        (steps if options.what == "steps" else scoring)(options.preset, options.batch, options.rounds)
    elif options.what in ("scores", "frames"):
        (scores if options.what == "scores" else frames)(options)
    elif options.what == "count":
        count()
    else:
        train(options, overrides)


def train(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains the settings of a part and prints their figures."""
    name, preset, settings = PARTS[options.what]
    folder = pack(name)
    if folder is None:
        return
    first = [f"--config=configs/memmc_mae.py:{preset}", f"--config.data.manifest={folder / 'manifest.csv'}"]
    own = {
        setting: [*first, *(f"--config.{key}={value}" for key, value in changes.items()), *overrides]
        for setting, changes in settings.items()
    }
    what = "-".join([options.what, *(override.removeprefix("--config.") for override in overrides)])
    found = trained(RESULTS, what, own, options, folder=options.workdir)
    rows = [row for setting, results in found.items() for row in show(setting, results)]
    print(table(("setting", "score", *FIGURES), rows))


if __name__ == "__main__":
    main()
