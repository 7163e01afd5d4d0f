"""Times the test masks in one fused pass against one call for each mask, for 1, 4, 10 and 100 masks.

    python -m benchmarks.masks            # the small CPU recipe and ViT-S/16 with a 512 x 2 decoder
    python -m benchmarks.masks --small    # only the small recipe

Both contestants are compiled and use the same network, masks and precision. "one a mask" runs a compiled pass with a
single mask in a Python loop, as published loops do: it embeds the patches again for each mask, and adds the moments on
the device. The table has the time of a batch, the peak memory of the process, and the largest difference of mean and
variance.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Prepared, interleaved, ratio, table, write

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(batch=8, image=96, patch=8, channels=1, width=192, depth=6, heads=6, decoder=(128, 2, 4)),
    "vit_s": dict(batch=2, image=224, patch=16, channels=3, width=384, depth=12, heads=6, decoder=(512, 2, 16)),
}
RATIO = 0.75


def scoring(
    *,
    fused: bool,
    masks: int,
    batch: int,
    image: int,
    patch: int,
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
) -> Prepared:
    """Scores one batch. "sample" has some values of mean and variance, as lists of floats."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jmae.masking import fold_in, hidden, random_mask, take, visible_tokens
    from jmae.nn.mae import MAE
    from jmae.patches import patchify, unpatchify
    from jmae.reconstruct import reconstruct

    size, cut = (image, image), (patch, patch)
    sizes = dict(zip(("decoder_width", "decoder_depth", "decoder_heads"), decoder, strict=True))
    make = lambda: MAE(
        size=size, patch=cut, channels=channels, width=width, depth=depth, heads=heads, **sizes, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(make())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *size, channels)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), batch)

    whole = jax.jit(
        lambda p, x, k: reconstruct(nnx.merge(graph, p).predictions, x, k, patch=cut, ratio=RATIO, masks=masks)[:2]
    )

    @jax.jit
    def single(p: Any, x: Any, keys: Any, j: Any) -> tuple[Any, Any]:
        mae, patches = nnx.merge(graph, p), patchify(x, cut)
        kept = visible_tokens(patches.shape[1], RATIO)
        keep, restore = random_mask(fold_in(keys, j), patches.shape[1], kept)
        prediction = mae.decode(mae.encode(take(mae.embed(patches), keep)), restore)
        difference = jnp.where(hidden(restore, kept)[..., None], prediction - patches, 0)
        return difference, difference**2

    @jax.jit
    def add(total: tuple[Any, Any], one: tuple[Any, Any]) -> tuple[Any, Any]:
        return total[0] + one[0], total[1] + one[1]

    @jax.jit
    def close(x: Any, first: Any, second: Any) -> tuple[Any, Any]:
        first, second = first / masks, second / masks
        whole = lambda tokens: unpatchify(tokens, size, cut)
        return whole(patchify(x, cut) + first), whole(jnp.maximum(second - first**2, 0))

    def loop(p: Any, x: Any, keys: Any) -> tuple[Any, Any]:
        total = None
        for j in range(masks):
            one = single(p, x, keys, j)
            total = one if total is None else add(total, one)
        return close(x, *total)  # type: ignore[misc]

    run = lambda: jax.block_until_ready((whole if fused else loop)(params, x, keys))
    result = [np.asarray(part).ravel()[::97].tolist() for part in run()]
    return run, {"sample": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name in ("small",) if arguments.small else SIZES:
        for masks in (1, 4, 10, 100):
            settings = SIZES[name] | {"masks": masks}
            out = interleaved(
                {
                    way: ("benchmarks.masks:scoring", settings | {"fused": way == "fused"})
                    for way in ("fused", "one a mask")
                },
                rounds=arguments.rounds,
            )
            samples = [np.array(out[way].pop("sample")) for way in out]
            difference = float(np.abs(samples[0] - samples[1]).max())
            speed = ratio(out["one a mask"], out["fused"])
            rows.append(
                (name, masks, out["fused"]["median_s"], out["one a mask"]["median_s"], speed["median"],
                 out["fused"]["peak_mib"], out["one a mask"]["peak_mib"], difference)
            )  # fmt: skip
            result = {**out, "one_a_mask_over_fused": speed, "largest_difference": difference}
            write(Path(__file__).parent / "results" / "masks.json", f"{name}, {masks} masks", result)
    head = ("network", "masks", "fused s", "one a mask s", "ratio", "fused MiB", "one a mask MiB", "difference")
    print(table(head, rows))


if __name__ == "__main__":
    main()
