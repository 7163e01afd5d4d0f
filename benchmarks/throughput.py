"""The training step of a masked autoencoder: jmae against `transformers`' ViTMAEForPreTraining in PyTorch.

Same sizes, batch, mask ratio, float32, AdamW, on the same processor in the same run:

    python -m benchmarks.throughput            # ViT-S/16, the small CPU recipe, four seeds at once, attention
    python -m benchmarks.throughput --small    # the small ones only
    python -m benchmarks.throughput --cores 1  # compares CPU seconds where others use the machine, too

Each contestant has a process of its own and all of them take turns (benchmarks/timing.py). A step is forward,
backward and update on a batch that is there already, with fresh random masks; compile time stands apart. PyTorch
runs eagerly, with its default scaled-dot-product attention and the faster of its fused and foreach AdamW.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import Prepared, interleaved, ratio, table, write

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
    """One step of jmae; with `seeds`, that many models at once under vmap, each with its own batch."""
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
    optimizer = adamw(LR, betas=BETAS, decay=DECAY)

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
) -> Prepared:
    """One eager step of `transformers`' masked autoencoder."""
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

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(pixel_values=images).loss.backward()
        optimizer.step()

    seconds = {}
    for form in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=DECAY, **{form: True})
        step(optimizer)
        times = []
        for _ in range(3):  # the update alone, with the gradients of the step
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        seconds[form] = min(times)
    form = min(seconds, key=lambda form: seconds[form])
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=DECAY, **{form: True})
    facts = {
        "attention": model.config._attn_implementation,
        "adamw": form,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return lambda: step(optimizer), facts


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


def steps(name: str, rounds: int) -> dict[str, Any]:
    """jmae's step against PyTorch's."""
    own = "benchmarks.throughput:"
    size = SIZES[name]
    result = interleaved({"jmae": (own + "jmae_step", size), "torch": (own + "torch_step", size)}, rounds=rounds)
    parameters = [r["parameters"] for r in result.values()]
    assert parameters[0] == parameters[1], f"not the same network: {parameters} parameters"
    return {"size": size, "contestants": result, "jmae/torch": ratio(result["jmae"], result["torch"])}


def seeds(name: str, rounds: int, number: int = 4) -> dict[str, Any]:
    """`number` models in one vmapped step against as many single steps."""
    own, size = "benchmarks.throughput:jmae_step", SIZES[name]
    result = interleaved({"single": (own, size), "vmapped": (own, size | {"seeds": number})}, rounds=rounds)
    each = ratio(result["vmapped"], result["single"])
    return {
        "size": size,
        "contestants": result,
        "vmapped/singles": {key: value / number for key, value in each.items()},
    }


def attentions(rounds: int) -> dict[str, Any]:
    """Attention alone, forward and with gradients, inputs as a network hands them over."""
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
                "jmae/torch": ratio(result["jmae"], result["torch"]),
            }
    return {"cases": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the small CPU recipe only")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds each, at least 5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    parser.add_argument("--only", help="one case: small; small, 4 seeds; vit_s; attention")
    parser.add_argument("--cores", type=int, help="use only so many; default all")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # contestants inherit it
        os.environ["OMP_NUM_THREADS"] = str(arguments.cores)
    rounds, rows = max(arguments.rounds, 5), []
    cases = {
        "small": lambda: steps("small", rounds),
        "small, 4 seeds": lambda: seeds("small", rounds),
    }
    if not arguments.small:
        cases |= {"vit_s": lambda: steps("vit_s", rounds), "attention": lambda: attentions(rounds)}
    for case, measure in cases.items():
        if arguments.only and case != arguments.only:
            continue
        result = measure()
        write(arguments.out, f"{case}, cores {arguments.cores}" if arguments.cores else case, result)
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


if __name__ == "__main__":
    main()
