"""Times MAEMI on whole volumes and its training steps, against PyTorch on the same device in the same run.

    python -m benchmarks.volume infer                # the paper's size, which needs a GPU
    python -m benchmarks.volume infer --windows 4    # 4 of its windows; the time of the whole volume is extrapolated
    python -m benchmarks.volume infer --small        # a small volume, for a CPU
    python -m benchmarks.volume train [--small] [--batch 6 0]   # 0: the largest batch that fits into a GPU's memory
    python -m benchmarks.volume check                # checks a device's arithmetic: official vectors, attention

infer: jmae's sweep, as `jmae.evaluate` runs it, against the paper's loop in plain PyTorch. The loop takes one window a
call with a new mask. Its attention is the official code's, step by step. SciPy applies the minimum filter to the error,
and NumPy sums on the host. The loop runs without gradients and without the loss, which the released loop computes. It
is in float32, with TF32 products on a GPU, the default of PyTorch at that time. A second loop differs only in its fused
attention and, on a GPU, in bfloat16. Before the timing, the maps of both are compared in float32, with the same weights
and masks.

train: jmae's step, as `jmae.train` runs it with flips, clipping and the gradients' norm, against two steps of PyTorch.
The official step has attention step by step and AdamW; on a GPU it has float16 with loss scaling, as published. The
tuned step has fused attention and fused AdamW; on a GPU it has bfloat16 and torch.compile. A step is forward, backward
and update, with the batch already on the device.

FLOPs of a sample: the encoder has L blocks of width d over t tokens (the visible ones and the class token). The decoder
has L' blocks of width d' over n + 1 tokens. A token has v values. A forward pass takes 2 n v d +
L (24 t d^2 + 4 t^2 d) + 2 t d d' + L' (24 (n + 1) d'^2 + 4 (n + 1)^2 d') + 2 n d' v. A step takes three times as much.
Recomputation, norms, softmax, GELU and the update do not count. "share" is the share of the rate of a large matrix
product (PyTorch; bfloat16 on a GPU), which is timed in the same run.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steps import ROOT, jmae_facts, jmae_stage, largest, same_device, torch_facts
from benchmarks.timing import Prepared, interleaved, ratio, table, use_cores, write

VOLUMES = {"paper": (273, 406, 105), "small": (48, 80, 24)}  # voxels
SMALL = {  # differences from the preset `paper`
    "data.size": (32, 32, 8),
    "model.patch": (4, 4, 2),
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 4,
    "model.decoder_width": 48,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "evaluation.stride": (16, 8, 4),
    "evaluation.repeats": 2,
    "evaluation.batch": 16,
}
CHECKED = 16  # windows of the comparison of maps at the paper's size
OWN = "benchmarks.volume:"


# --- sizes ------------------------------------------------------------------------------------------------------------


def settings(size: str, windows: int = 0) -> tuple[Any, dict[str, Any]]:
    """(the recipe, its values for the PyTorch side). With `windows` the volume has this many windows, in one sweep."""
    from jmae import recipe

    volume = VOLUMES[size]
    c = recipe.load(f"{ROOT / 'configs' / 'maemi.py'}:paper")
    c.update_from_flattened_dict(SMALL if size == "small" else {})
    c.evaluation.masks_of = "case"  # every window of every sweep has a mask of its own, as in the released code
    middle = volume[1] // 2
    if windows:
        *plane, depth = c.data.size
        volume, middle = (*plane, depth + (windows - 1) * c.evaluation.stride[-1]), None
        c.evaluation.repeats, c.evaluation.batch = 1, min(windows, c.evaluation.batch)
    network = {
        "size": c.data.size,
        "patch": c.model.patch,
        "channels": c.data.channels,
        "width": c.model.width,
        "depth": c.model.depth,
        "heads": c.model.heads,
        "decoder": (c.model.decoder_width, c.model.decoder_depth, c.model.decoder_heads),
        "ratio": c.evaluation.mask_ratio,
    }
    return c, {
        "network": network,
        "places": {"volume": volume, "window": c.data.size, "stride": c.evaluation.stride, "middle": middle},
        "repeats": c.evaluation.repeats,
        "filtered": c.evaluation.filter,
        "clip": c.data.clip,
    }


def places(volume: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], middle: int | None) -> list:
    """The paper's windows as slices, left half first: one every `stride` voxels, and the last ends with the volume."""
    found = []
    for low, high in ((0, middle), (middle, volume[1])) if middle else ((0, volume[1]),):
        axes = []
        for axis, (w, s) in enumerate(zip(window, stride, strict=True)):
            start, n = (low, high - low) if axis == 1 else (0, volume[axis])
            axes.append([slice(start + end - w, start + end) for end in (*range(w, n, s), n)])
        found += list(product(*axes))
    return found


def image_of(volume: tuple[int, ...], channels: int) -> np.ndarray:
    """A random volume (*size, c) with the moments of a normalised volume."""
    return (0.5 + 0.25 * np.random.default_rng(0).standard_normal((*volume, channels))).astype(np.float32)


def flops(*, size: Any, patch: Any, channels: int, width: int, depth: int, decoder: Any, ratio: float, **_: Any) -> int:
    """FLOPs of a forward pass of one sample (the formula in the module's docstring)."""
    n, v = math.prod(size) // math.prod(patch), math.prod(patch) * channels
    t, m, (narrow, shallow, _) = int(n * (1 - ratio)) + 1, n + 1, decoder
    encoder = 2 * n * v * width + depth * (24 * t * width**2 + 4 * t**2 * width)
    return encoder + 2 * t * width * narrow + shallow * (24 * m * narrow**2 + 4 * m**2 * narrow) + 2 * n * narrow * v


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def attend(q: Any, k: Any, v: Any, fused: bool) -> Any:
    """Attention of arrays (b, heads, tokens, width), step by step or fused."""
    from torch.nn.functional import scaled_dot_product_attention

    if fused:
        return scaled_dot_product_attention(q, k, v)
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def official(
    *,
    size: tuple[int, ...],
    patch: tuple[int, ...],
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
    ratio: float,
    fused: bool = False,
) -> Any:
    """The official network for two or three axes, with its names and arithmetic and with PyTorch's initial weights.

    It is facebookresearch/mae on the blocks of timm 0.3.2, and its 3D form LangDaniel/MAEMI. `fused`:
    scaled_dot_product_attention.
    """
    import torch
    from torch import nn

    from jmae.patches import sincos_positions

    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    n, values, rank = math.prod(grid), math.prod(patch) * channels, len(size)
    axes = range(2, 2 * rank + 2, 2)
    norm = lambda d: nn.LayerNorm(d, eps=1e-6)

    class Attention(nn.Module):
        def __init__(self, d: int, heads: int):
            super().__init__()
            self.heads = heads
            self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

        def forward(self, x: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            return self.proj(attend(q, k, v, fused).transpose(1, 2).reshape(b, n, d))

    class Block(nn.Module):
        def __init__(self, d: int, heads: int):
            super().__init__()
            self.norm1, self.attn, self.norm2 = norm(d), Attention(d, heads), norm(d)
            self.mlp = nn.Sequential()
            for name, layer in (("fc1", nn.Linear(d, 4 * d)), ("act", nn.GELU()), ("fc2", nn.Linear(4 * d, d))):
                self.mlp.add_module(name, layer)

        def forward(self, x: Any) -> Any:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def codes(d: int) -> Any:
        code = np.concatenate([np.zeros((1, d), np.float32), sincos_positions(grid, d)])
        return nn.Parameter(torch.from_numpy(code)[None], requires_grad=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.proj = (nn.Conv2d if rank == 2 else nn.Conv3d)(channels, width, patch, stride=patch)
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.pos_embed = codes(width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
            self.norm = norm(width)
            self.decoder_embed = nn.Linear(width, decoder[0])
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder[0]))
            self.decoder_pos_embed = codes(decoder[0])
            self.decoder_blocks = nn.ModuleList(Block(decoder[0], decoder[2]) for _ in range(decoder[1]))
            self.decoder_norm = norm(decoder[0])
            self.decoder_pred = nn.Linear(decoder[0], values)

        def patchify(self, image: Any) -> Any:
            parts = [x for g, p in zip(grid, patch, strict=True) for x in (g, p)]
            x = image.reshape(len(image), channels, *parts).permute(0, *axes, *(axis + 1 for axis in axes), 1)
            return x.reshape(len(image), n, values)

        def unpatchify(self, tokens: Any) -> Any:
            x = tokens.reshape(len(tokens), *grid, *patch, channels)
            x = x.permute(0, 2 * rank + 1, *(axis for k in range(1, rank + 1) for axis in (k, k + rank)))
            return x.reshape(len(tokens), channels, *size)

        def encoded(self, x: Any) -> tuple[Any, Any]:
            """(latent, further inputs of the decoder's blocks)."""
            for block in self.blocks:
                x = block(x)
            return self.norm(x), None

        def decoded(self, x: Any, seen: Any) -> Any:
            for block in self.decoder_blocks:
                x = block(x)
            return self.decoder_norm(x)

        def predict(self, image: Any, noise: Any = None) -> tuple[Any, Any]:
            """(prediction of every token, 1 where the token was hidden)."""
            x = self.patch_embed.proj(image).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
            b, kept = len(x), int(n * (1 - ratio))
            order = torch.argsort(torch.rand(b, n, device=x.device) if noise is None else noise, dim=1)
            restore = torch.argsort(order, dim=1)
            x = torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, width))
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1), x], dim=1)
            x, seen = self.encoded(x)
            x = self.decoder_embed(x)
            rest = torch.cat([x[:, 1:], self.mask_token.expand(b, n - kept, -1).to(x.dtype)], dim=1)
            rest = torch.gather(rest, 1, restore[..., None].expand(-1, -1, decoder[0]))
            x = torch.cat([x[:, :1], rest], dim=1) + self.decoder_pos_embed
            return self.decoder_pred(self.decoded(x, seen))[:, 1:], (restore >= kept).float()

        def forward(self, image: Any) -> Any:
            """The mean squared error over hidden tokens."""
            prediction, absent = self.predict(image)
            error = ((prediction - self.patchify(image)) ** 2).mean(dim=-1)
            return (error * absent).sum() / absent.sum()

    return Model()


def random_weights(path: Path, network: dict[str, Any]) -> None:
    """Saves a random state dict with the official names. No bias is 0 and no norm is 1, so that an error would show."""
    rng = np.random.default_rng(0)
    tensors = {name: value.numpy() for name, value in official(**network).state_dict().items()}
    for name in tensors:
        if "pos_embed" not in name:
            fan_in = math.prod(tensors[name].shape[1:]) if tensors[name].ndim > 1 else 100
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[name] = (centre + rng.standard_normal(tensors[name].shape) * fan_in**-0.5).astype(np.float32)
    arguments = {"num_heads": network["heads"], "decoder_num_heads": network["decoder"][2], "norm_pix_loss": False}
    np.savez(path, **{f"state/{name}": value for name, value in tensors.items()}, **arguments)


def loop(
    told: dict[str, Any],
    weights: str,
    device: str,
    *,
    sweeps: int,
    fused: bool = False,
    noise: np.ndarray | None = None,
) -> Callable[[int | None], np.ndarray]:
    """The paper's loop over the volume, as a function (number of windows after which it stops) -> map.

    `noise` (windows * sweeps, tokens) determines the masks.
    """
    import torch
    from scipy.ndimage import minimum_filter

    model, filtered, half = official(**told["network"], fused=fused), told["filtered"], fused and device == "cuda"
    with np.load(weights) as file:
        names = [name for name in file.files if name.startswith("state/")]
        model.load_state_dict({name.removeprefix("state/"): torch.from_numpy(file[name]) for name in names})
    model.to(device).eval()
    image = np.clip(image_of(told["places"]["volume"], told["network"]["channels"]), *told["clip"])
    volume, windows = np.ascontiguousarray(np.moveaxis(image, -1, 0)), places(**told["places"])

    def score(limit: int | None = None) -> np.ndarray:
        error, count = np.zeros(volume.shape), np.zeros(volume.shape)
        for number, place in enumerate((windows * sweeps)[:limit]):
            inside = (slice(None), *place)
            of_window = None if noise is None else torch.from_numpy(noise[None, number]).to(device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
                x = torch.tensor(volume[inside])[None].to(device)
                y = model.unpatchify(model.predict(x, of_window)[0]).float().cpu().numpy()[0]
            difference = (volume[inside] - y) ** 2
            for sequence in range(len(difference)):
                difference[sequence] = minimum_filter(difference[sequence], size=filtered)
            error[inside] += difference
            count[inside] += 1
        return minimum_filter((error / np.maximum(count, 1)).mean(axis=0), size=filtered)

    return score


def torch_volume(*, told: dict[str, Any], weights: str, sweeps: int, device: str, fused: bool) -> Prepared:
    """The loop with `sweeps` sweeps. Its first call, which is not timed, stops after 3 windows."""
    import torch

    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    score, first = loop(told, weights, device, sweeps=sweeps, fused=fused), [3]
    score(3)
    facts = {"windows": len(places(**told["places"])) * sweeps}
    return lambda: score(first.pop() if first else None), facts | torch_facts(device)


def torch_map(told: dict[str, Any], weights: str, device: str, noise: np.ndarray) -> np.ndarray:
    """The loop's map with the masks of `noise`, in float32 throughout."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # its default is True, that of other products False
    return loop(told, weights, device, sweeps=told["repeats"], noise=noise)(None)


# --- jmae -------------------------------------------------------------------------------------------------------------


def jmae_sweep(size: str, windows: int, weights: str, dtype: str) -> tuple[Callable[[], np.ndarray], Any, np.ndarray]:
    """(the recipe's sweep over the volume, the recipe, the words of the case)."""
    import jax

    from jmae.data.files.grids import Geometry
    from jmae.data.manifest import Row
    from jmae.data.preparation import Prepared, case_words
    from jmae.data.volumes import Volume
    from jmae.passes import SweepPass
    from jmae.system import load_system
    from jmae.weights import load_weights

    config, told = settings(size, windows)
    config.model.dtype = dtype
    system, words = load_system(config), case_words("volume")
    assert system.sweep
    target = jax.eval_shape(lambda key: system.stages[0].init(key, {}, 1), jax.random.key(0)).params
    params, _ = load_weights(
        weights, target, size=config.data.size, patch=config.model.patch, channels=config.data.channels
    )
    sweep = SweepPass(config, system.sweep, {"train": {"params": jax.device_put(params)}})
    image, middle = image_of(told["places"]["volume"], config.data.channels), told["places"]["middle"]
    side, none = None if middle is None else 1, np.zeros(0, np.float32)
    volume = Volume(image, None, None, side, middle, none, none, None, None)  # type: ignore[arg-type]
    row = Row("volume", "", "test", None, ("volume",))
    case = Prepared(row=row, array=image, geometry=Geometry(image.shape[:-1]), digest="", volume=volume)
    return lambda: sweep.fetch(sweep.dispatch([case]))[0]["maps"]["maemi"][0], config, words


def jmae_volume(*, size: str, windows: int, weights: str, number: int) -> Prepared:
    """The recipe's sweep, as users run it. JAX reports the time of compilation."""
    import jax

    spent: list[float] = []
    parts = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")
    note = lambda name, seconds, **_: spent.append(seconds) if name.endswith(parts) else None
    score, config, _ = jmae_sweep(size, windows, weights, "auto")
    jax.monitoring.register_event_duration_secs_listener(note)
    score()
    facts = {"windows": number, "at_once": config.evaluation.batch, "compile_s": sum(spent)}
    return score, facts | jmae_facts()


def jmae_map(size: str, windows: int, weights: str, dtype: str, masks: int) -> tuple[np.ndarray, np.ndarray]:
    """(map of the sweep, noise (masks, tokens) of its masks, sweep by sweep)."""
    import jax

    from jmae.masking import case_keys
    from jmae.passes import seeds_of
    from jmae.patches import grid_of

    jax.config.update("jax_default_matmul_precision", "highest")
    score, config, words = jmae_sweep(size, windows, weights, dtype)
    case, number = case_keys(seeds_of(config)[0], words[None])[0], masks // config.evaluation.repeats

    def noise(i: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(case, i // number), i % number)
        return jax.random.uniform(key, (math.prod(grid_of(config.data.size, config.model.patch)),))

    return score(), np.array(jax.vmap(noise)(np.arange(masks)))


def jmae_train(*, size: str, batch: int) -> Prepared:
    """The recipe's training step, compiled as `jmae.train` compiles it."""
    changes = SMALL if size == "small" else {}
    return largest(lambda batch, trial=False: jmae_stage(recipe="maemi.py:paper", batch=batch, changes=changes), batch)


# --- checks -----------------------------------------------------------------------------------------------------------


def official_vectors(dtype: str) -> dict[str, float]:
    """Largest differences from the official code's predictions (tests/golden), as shares of their largest value."""
    import jax
    from flax import nnx

    from jmae.masking import order_of, visible_tokens
    from jmae.nn.mae import MAE
    from jmae.patches import patchify
    from jmae.weights import load_weights, read_weights

    jax.config.update("jax_default_matmul_precision", "highest")
    found = {}
    for name in ("mae2d", "mae3d"):
        file = ROOT / "tests" / "golden" / f"{name}.npz"
        gold, weights = np.load(file), read_weights(file)._replace(norm_pix_loss=False)
        config = weights.config() | {"dtype": jax.numpy.dtype(dtype)}
        graph, state = nnx.split(nnx.eval_shape(lambda config=config: MAE(**config, rngs=nnx.Rngs(0))))
        params, _ = load_weights(weights, nnx.to_pure_dict(state), positions=config["positions"])

        kept = visible_tokens(gold["noise"].shape[1], float(gold["mask_ratio"]))
        patches, masks = patchify(np.moveaxis(gold["image"], 1, -1), config["patch"]), order_of(gold["noise"], kept)
        predict = jax.jit(lambda params, *given, graph=graph: nnx.merge(graph, params)(*given))
        difference = predict(params, patches, *masks) - gold["pred"]
        found[name] = float(np.abs(difference).max() / np.abs(gold["pred"]).max())
    return found


def attention_forms() -> dict[str, float]:
    """Largest differences of the decoder's attention and its gradients in bfloat16 from the formula in float32.

    They are shares of the largest value. "flash" is 1 where the compiled program calls a fused kernel.
    """
    import jax
    import jax.numpy as jnp

    from jmae.nn.attention import attention

    jax.config.update("jax_default_matmul_precision", "highest")
    keys = jax.random.split(jax.random.key(0), 4)
    given = [jax.random.normal(key, (1, 2521, 16, 24)).astype(jnp.bfloat16) for key in keys]

    def plain(q: Any, k: Any, v: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v)

    def everything(form: Callable, q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, backward = jax.vjp(form, q, k, v)
        return out, *backward(d_out)

    compiled = jax.jit(lambda *x: everything(attention, *x)).lower(*given).compile()
    expected = jax.jit(lambda *x: everything(plain, *x))(*(x.astype(jnp.float32) for x in given))
    share = lambda a, b: float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
    shares = map(share, compiled(*given), expected)
    found = dict(zip(("out", "d_q", "d_k", "d_v"), shares, strict=True))
    return found | {"flash": float("fmha" in compiled.as_text().lower())}


def check(device: str) -> dict[str, Any]:
    """The differences, and whether all are within their bounds. On a GPU the fused kernel must be called too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that this process holds no device
        float32, half = (pool.apply(official_vectors, (dtype,)) for dtype in ("float32", "bfloat16"))
        attended = pool.apply(attention_forms)
    flash = attended.pop("flash")
    parts = [("official vectors, float32", float32, 1e-5), ("official vectors, bfloat16", half, 2**-5)]
    parts += [("attention, bfloat16", attended, 2**-6)]
    rows = [(what, name, value, bound) for what, of, bound in parts for name, value in of.items()]
    print(table(("what", "of", "difference", "bound"), rows))
    print(f"fused attention kernel: {'yes' if flash else 'no'}")
    sound = all(value <= bound for *_, value, bound in rows) and (device == "cpu" or bool(flash))
    print("all within their bounds" if sound else "FAILED")
    return {"differences": rows, "flash": bool(flash), "sound": sound}


# --- times ------------------------------------------------------------------------------------------------------------


def rates(results: dict[str, dict[str, Any]], unit: str) -> dict[str, dict[str, float]]:
    """The ratios of the others' seconds for each window or sample to those of jmae."""
    each = {
        name: {"seconds": [s / r[unit] for s in r["seconds"]], "cpu_median_s": r["cpu_median_s"] / r[unit]}
        for name, r in results.items()
    }
    return {f"{name} / jmae": ratio(part, each["jmae"]) for name, part in each.items() if name != "jmae"}


def show(case: str, result: dict[str, Any], unit: str, *more: tuple[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Prints a row for each contestant, with further columns (name, function of its result), and then the ratios."""
    columns = [
        ("median s", lambda r: r["median_s"]),
        ("least s", lambda r: r["least_s"]),
        ("cpu s", lambda r: r["cpu_median_s"]),
        (f"{'windows' if unit == 'windows' else 'samples'}/s", lambda r: r[unit] / r["median_s"]),
        *more,
        ("compile s", lambda r: r.get("compile_s", "")),
        ("host MiB", lambda r: int(r["peak_mib"])),
        ("device MiB", lambda r: int(r["device_mib"]) if "device_mib" in r else ""),
    ]
    rows = [(case, who, r[unit], *(value(r) for _, value in columns)) for who, r in result["contestants"].items()]
    print(table(("case", "who", unit, *(name for name, _ in columns)), rows))
    for pair, each in result[f"ratio, {unit}"].items():
        print(f"{pair}: {each['median']:.2f} ({each['least']:.2f} to {each['greatest']:.2f} over the rounds)")


def agreement(size: str, windows: int, weights: str, device: str) -> dict[str, Any]:
    """The largest differences of jmae's map from PyTorch's, with the same weights and masks.

    jmae runs in float32 and, on a GPU, also in its usual type.
    """
    windows = windows or (CHECKED if size == "paper" else 0)
    _, told = settings(size, windows)
    number, maps = len(places(**told["places"])) * told["repeats"], {}
    apart: Callable[..., Any] = multiprocessing.get_context("spawn").Pool  # so that this process holds no device
    for dtype in ("float32", "auto") if device == "cuda" else ("float32",):
        with apart(1) as pool:
            maps[dtype], noise = pool.apply(jmae_map, (size, windows, weights, dtype, number))
    with apart(1) as pool:
        expected = pool.apply(torch_map, (told, weights, device, noise))
    differences = {dtype: float(np.abs(found - expected).max()) for dtype, found in maps.items()}
    return {"windows": number, "largest_difference": differences, "largest_value": float(expected.max())}


def infer(case: str, size: str, windows: int, rounds: int, sweeps: int, device: str) -> dict[str, Any]:
    """The seconds of a volume, and the agreement of the maps."""
    told, whole = settings(size, windows)[1], settings(size)[1]
    number, everything = (len(places(**t["places"])) * t["repeats"] for t in (told, whole))
    sweeps = min(sweeps or told["repeats"], told["repeats"])
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.npz"
        random_weights(Path(weights), told["network"])
        agreed = agreement(size, windows, weights, device)
        ours = {"size": size, "windows": windows, "weights": weights, "number": number}
        theirs = {"told": told, "weights": weights, "sweeps": sweeps, "device": device}
        contestants = {
            "jmae": (OWN + "jmae_volume", ours),
            "paper's loop": (OWN + "torch_volume", theirs | {"fused": False}),
            "loop, fused attention": (OWN + "torch_volume", theirs | {"fused": True}),
        }
        results = interleaved(contestants, rounds=rounds, before=int(size == "small"))
    for r in results.values():
        r["whole_volume_s"] = r["median_s"] * everything / r["windows"]
        r["whole_volume"] = "measured" if r["windows"] == everything else "extrapolated"
    result = {"size": told, "device": same_device(results), "windows of the whole volume": everything}
    result |= {"contestants": results, "ratio, windows": rates(results, "windows"), "same masks": agreed}
    show(case, result, "windows", ("whole volume s", lambda r: f"{r['whole_volume_s']:.3g} {r['whole_volume']}"))
    for dtype, value in agreed["largest_difference"].items():
        print(
            f"largest difference of the maps: {value:.2g} of {agreed['largest_value']:.3g} (same masks, jmae {dtype})"
        )
    return result


def train(case: str, size: str, batch: int, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    """Times training steps. With batch 0 each contestant runs alone on the device, with its own largest batch."""
    network = settings(size)[1]["network"]
    theirs = {"network": network, "batch": batch, "device": device, "compiled": compiled}
    theirs["build"] = OWN + "official"
    contestants: dict[str, tuple[str, dict[str, Any]]] = {
        "jmae": (OWN + "jmae_train", {"size": size, "batch": batch}),
        "official": ("benchmarks.steps:torch_train", theirs | {"tuned": False}),
        "tuned": ("benchmarks.steps:torch_train", theirs | {"tuned": True}),
        "matrix product": ("benchmarks.steps:matrix_product", {"device": device}),
    }
    if batch:
        results = interleaved(contestants, rounds=rounds)
    else:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"  # by default three quarters; PyTorch takes all
        results = {name: interleaved({name: one}, rounds=rounds)[name] for name, one in contestants.items()}
    found, rate = same_device(results), results.pop("matrix product")
    rate["flops_per_s"] = rate["flops"] / rate["median_s"]
    for r in results.values():
        r["flops_a_step"] = 3 * flops(**network) * r["batch"]
        r["share"] = r["flops_a_step"] / r["median_s"] / rate["flops_per_s"]
    parameters = {r["parameters"] for r in results.values()}
    assert len(parameters) == 1, f"not the same network: {parameters} parameters"
    result = {"size": network, "device": found, "contestants": results, "ratio, batch": rates(results, "batch")}
    columns = ("TFLOP a step", lambda r: r["flops_a_step"] / 1e12), ("share", lambda r: f"{r['share']:.1%}")
    show(case, result, "batch", *columns)
    print(f"matrix product {rate['size']}, {rate['dtype']}: {rate['flops_per_s'] / 1e12:.3g} TFLOP/s")
    return result | {"matrix product": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("infer", "train", "check"))
    parser.add_argument("--small", action="store_true", help="a size for a CPU")
    parser.add_argument("--windows", type=int, default=0, help="infer: number of windows; default the whole volume")
    parser.add_argument("--sweeps", type=int, default=0, help="infer: sweeps of PyTorch's loops; default all")
    parser.add_argument("--batch", type=int, nargs="+", help="train: default 6 0 on a GPU, 1 on a CPU, 16 if small")
    parser.add_argument("--compile", action="store_true", help="train: torch.compile also on a CPU")
    parser.add_argument("--rounds", type=int, help="timed rounds; default 1 for the paper's whole volume, else 5")
    parser.add_argument("--cores", type=int, help="number of cores to use; default all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "volume.json")
    options = parser.parse_args()
    cores = use_cores(options.cores)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contestants share the device
    import torch

    device = "cuda" if torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu" else "cpu"
    size, cpu = "small" if options.small else "paper", device == "cpu"
    end = f"{cores}, {device}"
    if options.what == "check":
        result = check(device)
        write(options.out, f"check{end}", result)
        sys.exit(not result["sound"])
    elif options.what == "infer":
        if cpu and size == "paper" and not options.windows:
            parser.exit(2, "not run: the paper's whole volume needs a GPU: add --windows or --small\n")
        rounds = options.rounds or (1 if size == "paper" and not options.windows else 5)
        case = f"infer, {size}" + (f", {options.windows} windows" if options.windows else "")
        write(options.out, case + end, infer(case, size, options.windows, rounds, options.sweeps, device))
    else:
        for batch in options.batch or ((16 if size == "small" else 1,) if cpu else (6, 0)):
            if not batch and cpu:
                parser.error("--batch 0, the largest that fits, is for a GPU")
            case = f"train, {size}, batch {batch or 'largest'}"
            compiled = options.compile or not cpu
            write(options.out, case + end, train(case, size, batch, options.rounds or 5, device, compiled))


if __name__ == "__main__":
    main()
