"""Checks that weights of `transformers`' ViTMAEForPreTraining give the same latent, prediction and loss here.

    python -m benchmarks.parity            # ViT-S/16 with the 512 x 8 decoder, and a small network
    python -m benchmarks.parity --small    # the small network only

PyTorch's network has random weights and the official position codes. It is saved twice as safetensors: its state dict,
and by `save_pretrained`, which uses other names. `jmae.weights` reads both. Both networks then get the same images and
the same noise, in float32 on the CPU. The norms of ViTMAE add 1e-12 to the variance by default; ours add 1e-6, as the
official code does. "eps" is the value in PyTorch's network. The table has the largest absolute differences.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import table, write

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(batch=4, image=48, patch=8, channels=1, width=96, depth=3, heads=6, decoder=(64, 2, 4)),
    "vit_s": dict(batch=2, image=224, patch=16, channels=3, width=384, depth=12, heads=6, decoder=(512, 8, 16)),
}
RATIO = 0.75


def compared(
    eps: float,
    *,
    batch: int,
    image: int,
    patch: int,
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
) -> dict[str, float]:
    """The largest absolute differences by name; "saved_parameters" is that between the two saved files."""
    import jax
    import torch
    from flax import nnx
    from safetensors.torch import save_file
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from jmae.losses import masked_mse
    from jmae.masking import hidden, order_of, take, visible_tokens
    from jmae.nn.mae import MAE
    from jmae.patches import patchify, sincos_positions
    from jmae.weights import load_weights, read_weights

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            layer_norm_eps=eps,
            image_size=image,
            patch_size=patch,
            num_channels=channels,
            decoder_hidden_size=decoder[0],
            decoder_num_hidden_layers=decoder[1],
            decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[0],
            mask_ratio=RATIO,
        )
    ).eval()
    grid = (image // patch, image // patch)
    for name, value in theirs.named_parameters():
        if "pos_embed" in name or "position_embeddings" in name:  # transformers 5.23 leaves them at zero
            value.data[0, 1:] = torch.from_numpy(sincos_positions(grid, value.shape[-1]))
        else:
            spread = rng.standard_normal(value.shape, np.float32) * value.shape[-1] ** -0.5
            value.data.copy_(torch.from_numpy(spread + ("norm" in name and "weight" in name)))

    with tempfile.TemporaryDirectory() as folder:
        save_file(theirs.state_dict(), f"{folder}/state.safetensors")
        theirs.save_pretrained(folder)
        weights, saved = (
            read_weights(Path(folder) / name, heads=heads, decoder_heads=decoder[2])
            for name in ("state.safetensors", "model.safetensors")
        )
        config = weights.config()
        graph, state = nnx.split(nnx.eval_shape(lambda: MAE(**config, rngs=nnx.Rngs(0))))
        params, _ = load_weights(weights, nnx.to_pure_dict(state))

    images = rng.standard_normal((batch, image, image, channels), np.float32)
    noise = rng.random((batch, grid[0] * grid[1]), np.float32)

    @jax.jit
    def ours(params: Any, images: Any) -> tuple[Any, Any, Any]:
        mae, target = nnx.merge(graph, params), patchify(images, (patch, patch))
        kept = visible_tokens(target.shape[1], RATIO)
        keep, restore = order_of(noise, kept)
        latent = mae.encode(take(mae.embed(target), keep))
        prediction = mae.decode(latent, restore)
        return latent, prediction, masked_mse(prediction, target, hidden(restore, kept)).mean()

    found = dict(zip(("latent", "prediction", "loss"), map(np.asarray, ours(params, images)), strict=True))
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    with torch.no_grad():
        out = theirs(pixels, noise=torch.from_numpy(noise))
        latent = theirs.vit(pixels, noise=torch.from_numpy(noise)).last_hidden_state
    expected = {"latent": latent.numpy(), "prediction": out.logits.numpy(), "loss": out.loss.numpy()}
    largest = {name: float(np.abs(found[name] - expected[name]).max()) for name in found}
    spread = float(np.abs(expected["prediction"]).max())
    other = max(float(np.abs(saved.leaves[name] - array).max()) for name, array in weights.leaves.items())
    return largest | {"largest_prediction": spread, "saved_parameters": other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for name in ("small",) if arguments.small else SIZES:
        for eps in (1e-6, 1e-12):
            result = compared(eps, **SIZES[name])
            rows.append((name, eps, *result.values()))
            write(Path(__file__).parent / "results" / "parity.json", f"{name}, eps {eps}", result)
    print(table(("network", "eps", "latent", "prediction", "loss", "largest prediction", "saved parameters"), rows))


if __name__ == "__main__":
    main()
