"""Times the training step of a masked autoencoder: jmae against `transformers`' ViTMAEForPreTraining in PyTorch.

Both have the same sizes, batch, mask ratio, float32 and AdamW, and run on the same processor in the same run.

    python -m benchmarks.throughput            # ViT-S/16, the small CPU recipe, four seeds at once, attention
    python -m benchmarks.throughput --small    # the small ones only
    python -m benchmarks.throughput --cores 1  # on a machine that others use: compare the CPU seconds
    python -m benchmarks.throughput --systems small    # steps of all five systems, at the sizes of their small recipes
    python -m benchmarks.throughput --systems paper    # the same at the papers' sizes, with a batch that fits

Each contestant has its own process, and all of them take turns (benchmarks/timing.py). A step is forward, backward and
update with new random masks, and with the batch already on the device. Compilation is timed separately. PyTorch runs
eagerly, with its default scaled-dot-product attention and the faster of its fused and foreach AdamW.

--systems compares jmae's step, as `jmae.train` runs it, with networks of the same size in PyTorch on the same device.
Only jmae's step contains augmentation and synthetic anomalies. "official" is plain: attention step by step, and
SimSID's patches in loops. On a GPU the masked autoencoders have float16 with loss scaling, as published; the others
have float32.
"tuned" has fused attention and AdamW, channels last for the U-Net, and SimSID's patches as a batch. On a GPU it has
bfloat16 and torch.compile (but not for SimSID; on a CPU --compile adds it). For AMAE it is the step of modules A and B.
The FLOPs of a step are those of the official form, forward and backward, by PyTorch's formula for each operation
(torch.utils.flop_counter). "share" is the share of the rate of a large matrix product in the same rounds.
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.steps import ROOT, same_device
from benchmarks.timing import Prepared, interleaved, ratio, table, use_cores, write

SIZES: dict[str, dict[str, Any]] = {
    "vit_s": dict(batch=16, image=224, patch=16, channels=3, width=384, depth=12, heads=6, decoder=(512, 8, 16)),
    "small": dict(batch=32, image=96, patch=8, channels=1, width=192, depth=6, heads=6, decoder=(128, 2, 4)),
}
ATTENTION = {  # batch, queries, keys, heads, head width
    "vit_s encoder": (16, 50, 50, 6, 64),
    "vit_s decoder": (16, 197, 197, 16, 32),
    "small decoder": (32, 145, 145, 4, 32),
    "maemi decoder": (1, 2520, 2520, 16, 24),
}
LR, BETAS, DECAY, RATIO = 1.5e-4, (0.9, 0.95), 0.05, 0.75


def jmae_step(
    *,
    batch: int,
    image: int,
    patch: int,
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
    seeds: int = 0,
) -> Prepared:
    """One step of jmae. With `seeds`, this many models run at once under vmap, each with its own batch."""
    import jax
    import optax
    from flax import nnx

    from jmae.losses import masked_mse
    from jmae.masking import hidden, random_mask, visible_tokens
    from jmae.nn.mae import MAE
    from jmae.optim import adamw
    from jmae.patches import patchify

    patches = (patch, patch)
    tokens = (image // patch) ** 2
    kept = visible_tokens(tokens, RATIO)
    optimizer = optax.chain(adamw(betas=BETAS, decay=DECAY), optax.scale(-LR))

    def build(key: jax.Array) -> tuple[Any, Any]:
        model = MAE(
            size=(image, image),
            patch=patches,
            channels=channels,
            width=width,
            depth=depth,
            heads=heads,
            decoder_width=decoder[0],
            decoder_depth=decoder[1],
            decoder_heads=decoder[2],
            rngs=nnx.Rngs(key),
        )
        graph, state = nnx.split(model)
        return graph, nnx.to_pure_dict(state)

    graph, params = build(jax.random.key(0))

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        target = patchify(images, patches)
        keep, restore = random_mask(jax.random.split(key, batch), tokens, kept)
        prediction = nnx.merge(graph, params)(target, keep, restore)
        return masked_mse(prediction, target, hidden(restore, kept)).mean()

    def step(state: Any, images: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, images, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state, key = (params, optimizer.init(params)), jax.random.key(1)
    images = jax.random.normal(jax.random.key(2), (batch, image, image, channels))
    if seeds:
        step = jax.vmap(step)
        params = jax.vmap(lambda key: build(key)[1])(jax.random.split(key, seeds))
        state = params, jax.vmap(optimizer.init)(params)
        images, key = jax.numpy.stack([images] * seeds), jax.random.split(key, seeds)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, images, key).compile()
    compile_s = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        state, value = compiled(state, images, key)
        jax.block_until_ready((state, value))

    return run, {"compile_s": compile_s, "parameters": sum(map(jax.numpy.size, jax.tree.leaves(params)))}


def torch_step(
    *,
    batch: int,
    image: int,
    patch: int,
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
    compiled: bool = False,
) -> Prepared:
    """One step of `transformers`' masked autoencoder, eager or with torch.compile."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=image,
            patch_size=patch,
            num_channels=channels,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder[0],
            decoder_num_hidden_layers=decoder[1],
            decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[0],
            mask_ratio=RATIO,
        )
    ).train()
    images = torch.randn(batch, channels, image, image)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(pixel_values=images).loss.backward()
        optimizer.step()

    seconds, start = {}, time.perf_counter()
    for form in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=DECAY, **{form: True})
        step(optimizer)
        times = []
        for _ in range(3):  # only the update, with the gradients of the step
            began = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - began)
        seconds[form] = min(times)
    form = min(seconds, key=lambda form: seconds[form])
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=DECAY, **{form: True})
    facts = {
        "attention": model.config._attn_implementation,
        "adamw": form,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return lambda: step(optimizer), facts | ({"compile_s": time.perf_counter() - start} if compiled else {})


def jmae_attention(*, shape: tuple[int, ...], gradient: bool) -> Prepared:
    """jmae's attention on (b, n, h, d) arrays, or its gradient too."""
    import jax

    from jmae.nn.attention import attention

    b, n, m, h, d = shape
    q, k, v, d_out = (jax.random.normal(jax.random.key(i), (b, x, h, d)) for i, x in enumerate((n, m, m, n)))
    forward = attention if not gradient else lambda q, k, v: jax.vjp(attention, q, k, v)[1](d_out)
    compiled = jax.jit(forward).lower(q, k, v).compile()
    return lambda: jax.block_until_ready(compiled(q, k, v)), {}


def torch_attention(*, shape: tuple[int, ...], gradient: bool) -> Prepared:
    """PyTorch's scaled-dot-product attention on the same arrays."""
    import torch

    b, n, m, h, d = shape
    q, k, v, d_out = (torch.randn(b, x, h, d) for x in (n, m, m, n))
    for x in (q, k, v):
        x.requires_grad_(gradient)

    def run() -> None:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2)
        if gradient:
            torch.autograd.grad(out, (q, k, v), d_out)

    return run, {}


# --- parts of a step: only its attention, or only its dense products --------------------------------------------------

Layers = list[tuple[int, int, int, int, int]]  # blocks, samples, tokens, heads, head width


def layers_of(network: dict[str, Any], batch: int) -> Layers:
    """The blocks of the encoder and the decoder of a masked autoencoder, whose sizes are those of `volume.official`."""
    n = math.prod(network["size"]) // math.prod(network["patch"])
    width, heads, decoder = network["width"], network["heads"], network["decoder"]
    return [
        (network["depth"], batch, int(n * (1 - network["ratio"])) + 1, heads, width // heads),
        (decoder[1], batch, n + 1, decoder[2], decoder[0] // decoder[2]),
    ]


def jmae_part(*, layers: Layers, what: str) -> Prepared:
    """The attention ("attention") or the dense products ("products") of all blocks, forward and with gradients."""
    import jax

    from jmae.nn.attention import attention

    programs = []
    for blocks, b, n, h, d in layers:
        normal = lambda *shape: jax.random.normal(jax.random.key(0), shape)
        if what == "attention":
            given = [normal(b, n, h, d)] * 4
            run = jax.jit(lambda q, k, v, d_out: (attention(q, k, v), jax.vjp(attention, q, k, v)[1](d_out)))
            programs.append((blocks, run.lower(*given).compile(), given))
            continue
        for i, o in products_of(h * d):
            given = [normal(b * n, i), normal(i, o), normal(b * n, o)]
            run = jax.jit(lambda x, w, d_out: (x @ w, d_out @ w.T, x.T @ d_out))
            programs.append((blocks, run.lower(*given).compile(), given))

    def once() -> None:
        for blocks, program, given in programs:
            for _ in range(blocks):
                jax.block_until_ready(program(*given))

    return once, {}


def torch_part(*, layers: Layers, what: str) -> Prepared:
    """`jmae_part` in PyTorch."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention

    def once() -> None:
        for blocks, given in programs:
            for _ in range(blocks):
                if what == "attention":
                    torch.autograd.grad(attend(*given[:3]), given[:3], given[3])
                else:
                    x, w, d_out = given
                    x @ w, d_out @ w.T, x.T @ d_out

    programs: list[tuple[int, list[torch.Tensor]]] = []
    for blocks, b, n, h, d in layers:
        if what == "attention":
            programs.append((blocks, [torch.randn(b, h, n, d, requires_grad=k < 3) for k in range(4)]))
        else:
            shapes = [((b * n, i), (i, o), (b * n, o)) for i, o in products_of(h * d)]
            programs += [(blocks, [torch.randn(shape) for shape in three]) for three in shapes]
    return once, {}


def products_of(width: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of the dense layers of a block."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


def parts(network: dict[str, Any], batch: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The contestants of a network's attention and products."""
    layers, own = layers_of(network, batch), "benchmarks.throughput:"
    names = ((who, what) for what in ("attention", "products") for who in ("jmae", "torch"))
    return {f"{who} {what}": (f"{own}{who}_part", {"layers": layers, "what": what}) for who, what in names}


# --- the cases ------------------------------------------------------------------------------------------------------


def steps(name: str, rounds: int) -> dict[str, Any]:
    """jmae's step against PyTorch's."""
    own = "benchmarks.throughput:"
    size = SIZES[name]
    result = interleaved({"jmae": (own + "jmae_step", size), "torch": (own + "torch_step", size)}, rounds=rounds)
    parameters = [r["parameters"] for r in result.values()]
    assert parameters[0] == parameters[1], f"not the same network: {parameters} parameters"
    return {"size": size, "contestants": result, "torch/jmae": ratio(result["torch"], result["jmae"])}


def seeds(name: str, rounds: int, number: int = 4) -> dict[str, Any]:
    """`number` models in one vmapped step against as many single steps."""
    own, size = "benchmarks.throughput:jmae_step", SIZES[name]
    result = interleaved({"single": (own, size), "vmapped": (own, size | {"seeds": number})}, rounds=rounds)
    each = ratio(result["single"], result["vmapped"])
    return {
        "size": size,
        "contestants": result,
        "singles/vmapped": {key: value * number for key, value in each.items()},
    }


def attentions(rounds: int) -> dict[str, Any]:
    """Only the attention, forward and with gradients, with inputs in the layout of a network."""
    own, results = "benchmarks.throughput:", {}
    for name, shape in ATTENTION.items():
        for gradient in (False, True):
            arguments = {"shape": shape, "gradient": gradient}
            result = interleaved(
                {"jmae": (own + "jmae_attention", arguments), "torch": (own + "torch_attention", arguments)},
                rounds=4 * rounds,
            )
            results[f"{name}, {'with gradients' if gradient else 'forward'}"] = {
                "shape": shape,
                "contestants": result,
                "torch/jmae": ratio(result["torch"], result["jmae"]),
            }
    return {"cases": results}


# --- all systems ------------------------------------------------------------------------------------------------------

STEPS = ("amae", "maemi", "memmc_mae", "ppii", "simsid teacher", "simsid student")
BATCHES = {"amae": (4, 16), "maemi": (1, 6), "memmc_mae": (2, 64), "ppii": (2, 16)}  # paper's sizes: on a CPU, on a GPU


def contestants_of(step: str, size: str, device: str, compiled: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """The contestants of a system's step: jmae and two forms in PyTorch."""
    from benchmarks import simsid, volume
    from jmae import recipe

    if step.startswith("simsid"):
        jmae, looped, tuned = simsid.contestants(step.split()[1], size == "paper", device).values()
        return {"jmae": jmae, "official": looped, "tuned": tuned}
    c = recipe.load(f"{ROOT / 'configs' / step}.py:{size}")
    batch = BATCHES[step][device == "cuda"] if size == "paper" else 0
    if step == "maemi":
        network, batch = volume.settings(size)[1]["network"], batch or 16
        jmae: tuple[str, dict[str, Any]] = ("benchmarks.volume:jmae_train", {"size": size, "batch": batch})
        build = {"build": "benchmarks.volume:official"}
    else:
        stage = {"stage": "module_a"} if step == "amae" else {}
        jmae = ("benchmarks.steps:jmae_stage", {"recipe": f"{step}.py:{size}", "batch": batch, **stage})
        network = {"size": tuple(c.data.size), "channels": c.model.get("channels", c.data.channels)}
        if step == "ppii":
            build = {"build": "benchmarks.anomalies:unet", "published": "float32"}
            network |= {"widths": tuple(c.model.widths), "head": c.model.base}
        else:
            section, m = (c.adapt if step == "amae" else c.train), c.model
            network |= {"patch": tuple(m.patch), "width": m.width, "depth": m.depth, "heads": m.heads}
            network |= {"decoder": (m.decoder_width, m.decoder_depth, m.decoder_heads), "ratio": section.mask_ratio}
            build = (
                {"build": "benchmarks.memmc:official"}
                if step == "memmc_mae"
                else {"build": "benchmarks.volume:official"}
            )
            network |= {"memory": m.memory} if step == "memmc_mae" else {}
            batch = batch or section.batch
            batch *= section.get("masks", 1)
        batch = batch or c.train.batch
    theirs = {"network": network, "batch": batch, "device": device, "compiled": compiled, **build}
    names = {"official": False, "tuned": True}
    return {"jmae": jmae} | {n: ("benchmarks.steps:torch_train", theirs | {"tuned": t}) for n, t in names.items()}


def system_steps(step: str, size: str, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """The results of the contestants, and their table."""
    contestants = contestants_of(step, size, device, compiled)
    contestants["matrix product"] = ("benchmarks.steps:matrix_product", {"device": device})
    out = interleaved(contestants, rounds=rounds)
    found, rate = same_device(out), out.pop("matrix product")
    parameters = {r["parameters"] for r in out.values()}
    assert len(parameters) == 1, f"{step}: not the same network: {parameters} parameters"
    flops, images = out["official"]["counted_flops"], out["jmae"]["batch"]
    rows = []
    for who, r in out.items():
        r["share"] = flops / r["median_s"] / (rate["flops"] / rate["median_s"])
        each = ratio(r, out["jmae"])
        times = (
            [each["median"], f"{each['least']:.2f} to {each['greatest']:.2f}", each["cpu"]]
            if who != "jmae"
            else [""] * 3
        )
        of_device = [int(r["device_mib"])] if "device_mib" in r else [""]
        rows.append(
            [step, who, images, r["median_s"], r["cpu_median_s"], *times, flops / 1e9, f"{r['share']:.0%}",
             r.get("compile_s", ""), int(r["peak_mib"]), *of_device]
        )  # fmt: skip
    head = ("step", "who", "batch", "median s", "CPU s", "x jmae", "range", "of CPU s", "GFLOP", "share", "compile s",
            "host MiB", "device MiB")  # fmt: skip
    print(table(head, [tuple(row) for row in rows]), flush=True)
    return {"device": found, "contestants": out, "matrix product": rate, "table": [head, rows]}


def all_systems(arguments: argparse.Namespace, cores: str) -> None:
    """Runs the cases of --systems."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contestants share the device
    import torch

    device = "cuda" if torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu" else "cpu"
    for step in arguments.only or STEPS:
        compiled = arguments.compile or device == "cuda"
        result = system_steps(step, arguments.systems, device, arguments.rounds, compiled)
        write(arguments.out, f"{step}, {arguments.systems}{cores}, {device}", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only the small CPU recipe")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds each, at least 5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    parser.add_argument("--systems", choices=("small", "paper"), help="steps of all five systems")
    parser.add_argument("--only", nargs="+", help=f"cases: small; small, 4 seeds; vit_s; attention; {'; '.join(STEPS)}")
    parser.add_argument("--compile", action="store_true", help="--systems: torch.compile also on a CPU")
    parser.add_argument("--cores", type=int, help="number of cores to use; default all")
    arguments = parser.parse_args()
    cores = use_cores(arguments.cores)
    known = STEPS if arguments.systems else ("small", "small, 4 seeds", "vit_s", "attention")
    if unknown := [case for case in arguments.only or () if case not in known]:
        parser.error(f"--only {unknown[0]}: one of {'; '.join(known)}")
    if arguments.systems:
        return all_systems(arguments, cores)
    rounds, rows = max(arguments.rounds, 5), []
    cases = {
        "small": lambda: steps("small", rounds),
        "small, 4 seeds": lambda: seeds("small", rounds),
    }
    if not arguments.small:
        cases |= {"vit_s": lambda: steps("vit_s", rounds), "attention": lambda: attentions(rounds)}
    for case, measure in cases.items():
        if arguments.only and case not in arguments.only:
            continue
        result = measure()
        write(arguments.out, case + cores, result)
        for name, part in result.get("cases", {case: result}).items():
            (pair, each) = next((k, v) for k, v in part.items() if "/" in k)
            for who, r in part["contestants"].items():
                rows.append(
                    (
                        name,
                        who,
                        r["median_s"],
                        r["least_s"],
                        r["cpu_median_s"],
                        r.get("compile_s", ""),
                        int(r["peak_mib"]),
                    )
                )
            rows.append((name, pair, *(f"{each[k]:.2f}" for k in ("median", "least", "greatest")), "", ""))
    print(table(("case", "who", "median s", "least s", "cpu s", "compile s", "peak MiB"), rows))
    print("ratio rows: median, least and greatest of the rounds' ratios")
    return None


if __name__ == "__main__":
    main()
