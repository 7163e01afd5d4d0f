"""P-PII composites of 512 x 512 images, five anomalies of five raters: jmae against pie-torch's sine-transform path.

    python -m benchmarks.anomalies                 # images one at a time, and a batch of 8 (jmae)
    python -m benchmarks.anomalies --step          # share of a U-Net training step, at batch 16 and the paper's size
    python -m benchmarks.anomalies --solvers       # against PII with its sparse solve: "half the training time"

All contestants blend the same 25 discs into a composite; a disc has 26 to 101 pixels a side. The authors' file calls
pie-torch's `blend_dst_numpy`, which blends one image for each disc, and NumPy takes the mean of the images. jmae needs
one solve for each patch. With the deviation map (the authors' `np.std` over the images) it needs one for each disc.
"blends" times only the 25 blends.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Prepared, interleaved, ratio, table, write

SIDE, ANOMALIES, RATERS = 512, 5, 5
FIXED: dict[str, Any] = {"anomalies": (ANOMALIES,) * 2, "raters": (RATERS,) * 2}


def images(n: int) -> np.ndarray:
    """Smooth random images (n, 512, 512) with a little noise, in [0, 1]."""
    from scipy.ndimage import zoom

    rng = np.random.default_rng(0)
    coarse = np.stack([zoom(rng.uniform(size=(16, 16)), SIDE / 16, order=1) for _ in range(n)])
    return np.clip(coarse + rng.normal(0, 0.02, coarse.shape), 0, 1).astype(np.float32)


def ours(*, batch: int, deviation: bool) -> Prepared:
    """A batch of composites of the preset `released`, whose raters all start from the clean target; with the draws."""
    import jax
    import jax.numpy as jnp

    from jmae.anomalies.interpolation import ppii

    pool = jnp.asarray(images(max(batch, 2)))[..., None]
    make = partial(ppii, preset="released", deviation=deviation, **FIXED)
    run = jax.jit(jax.vmap(make, (0, None, 0, 0)))
    keys, place = jax.random.split(jax.random.key(0), batch), jnp.arange(batch)
    return lambda: jax.block_until_ready(run(pool[:batch], pool, keys, place)), {"composites": batch}


def first_draw() -> tuple[np.ndarray, np.ndarray, Any, np.ndarray]:
    """(the first image, all images, the patches that `ours` draws for a batch of one, their discs)."""
    import jax

    from jmae.anomalies.interpolation import discs, draw_patches
    from jmae.keys.ppii import PRESETS

    pool = images(2)
    preset = PRESETS["released"]._replace(**FIXED)
    key = jax.random.split(jax.random.key(0), 1)[0]
    p = draw_patches(key, (SIDE, SIDE), 2, 0, preset, patch=(0.05, 0.2), core=0.8)
    return pool[0], pool, jax.tree.map(np.asarray, p), np.asarray(discs(p, (101, 101), "circular"), float)


def pie_torch() -> Prepared:
    """One composite, made as in the authors' file; without the draws."""
    from pietorch import blend_dst_numpy

    image, pool, p, masks = first_draw()
    image = image.astype(float)

    def run() -> np.ndarray:
        blended = []
        for a in range(ANOMALIES):
            h, w = p.edges[a]
            y, x = p.cut[a]
            source = pool[p.which[a], y : y + h, x : x + w].astype(float)
            for r in range(RATERS):
                mask = masks[a, r, :h, :w].copy()
                blended.append(blend_dst_numpy(image, source * float(p.strength[a, r]), mask, p.corner[a], True))
        stack = np.array(blended)
        return np.stack([stack.mean(0), stack.std(0)])

    return run, {"composites": 1}


def blends(*, way: str) -> Prepared:
    """Only the 25 blends of one composite, from windows to windows."""
    image, pool, p, masks = first_draw()
    cut = lambda a, corner, edges: a[corner[0] : corner[0] + edges[0], corner[1] : corner[1] + edges[1]]
    pairs = [
        (
            cut(image, p.corner[a], p.edges[a]),
            cut(pool[p.which[a]], p.cut[a], p.edges[a]) * p.strength[a, r],
            masks[a, r],
        )
        for a in range(ANOMALIES)
        for r in range(RATERS)
    ]
    if way == "pie-torch":
        from pietorch import blend_dst_numpy

        wide = [(t.astype(float), s.astype(float), m[: t.shape[0], : t.shape[1]].copy()) for t, s, m in pairs]
        return lambda: [blend_dst_numpy(t, s, m, np.zeros(2, int), True) for t, s, m in wide], {}
    import jax
    import jax.numpy as jnp

    from jmae.anomalies.poisson import blend

    full = lambda x: np.pad(x, [(0, 101 - n) for n in x.shape]).astype(np.float32)
    target, source = (jnp.stack([full(pair[k]) for pair in pairs])[..., None] for k in range(2))
    mask, edges = jnp.stack([full(pair[2]) for pair in pairs]), jnp.array([pair[0].shape for pair in pairs])
    run = jax.jit(jax.vmap(blend))
    return lambda: jax.block_until_ready(run(target, source, mask, edges)), {}


def pii_images(*, way: str, batch: int = 8) -> Prepared:
    """Images with one square each by PII: "jmae", or "sparse", the direct solve of PII's code, draws not included."""
    import jax
    import jax.numpy as jnp

    from jmae.anomalies.interpolation import draw_square, pii

    pool, keys = images(batch + 1), jax.random.split(jax.random.key(0), batch)
    if way == "jmae":
        run = jax.jit(jax.vmap(pii))
        target, source = (jnp.asarray(pool[k : k + batch])[..., None] for k in range(2))
        return lambda: jax.block_until_ready(run(target, source, keys)), {"images": batch}
    squares = [jax.device_get(draw_square(key, (SIDE, SIDE), (0.05, 0.2), 0.8)) for key in keys]

    def run() -> list[np.ndarray]:
        made = []
        for k, p in enumerate(squares):
            place = tuple(slice(c, c + n) for c, n in zip(p.corner, p.edges, strict=True))
            made.append(pii_sparse(pool[k][place].astype(float), pool[k + 1][place].astype(float), float(p.alpha)))
        return made

    return run, {"images": batch}


def pii_sparse(target: np.ndarray, source: np.ndarray, alpha: float) -> np.ndarray:
    """PII's interpolation of a square by a sparse direct solve, with the target's ring as boundary."""
    from scipy.sparse import diags, identity, kron
    from scipy.sparse.linalg import spsolve

    fields = []
    for axis in range(2):
        t, s = (1 - alpha) * np.diff(target, axis=axis), alpha * np.diff(source, axis=axis)
        fields.append(np.where(np.abs(t) > np.abs(s), t, s))
    divergence = np.diff(fields[0], axis=0)[:, 1:-1] + np.diff(fields[1], axis=1)[1:-1]
    h, w = divergence.shape
    second = [diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)) for n in (h, w)]
    laplacian = kron(second[0], identity(w)) + kron(identity(h), second[1])
    edge = target.copy()
    edge[1:-1, 1:-1] = 0
    boundary = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:]
    out = target.copy()
    out[1:-1, 1:-1] = spsolve(laplacian.tocsc(), (divergence - boundary).ravel()).reshape(h, w)
    return out


def solvers(rounds: int) -> dict[str, Any]:
    """Seconds an image: P-PII's composite by jmae, and PII's square by jmae and by a sparse solve."""
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "P-PII, jmae": ("benchmarks.anomalies:ours", {"batch": 8, "deviation": False}),
        "PII, jmae": ("benchmarks.anomalies:pii_images", {"way": "jmae"}),
        "PII, sparse solve": ("benchmarks.anomalies:pii_images", {"way": "sparse"}),
    }
    out = interleaved(given, rounds=rounds)
    print(table(("contestant", "s an image"), [(name, one["median_s"] / 8) for name, one in out.items()]))
    return {**out, "sparse_over_ppii": ratio(out["PII, sparse solve"], out["P-PII, jmae"])}


def agreement() -> float:
    """The largest difference between both composites, in units of the image's range."""
    reference, _ = np.clip(pie_torch()[0](), 0, 1)
    return float(np.abs(np.asarray(ours(batch=1, deviation=True)[0]()[0])[0, ..., 0] - reference).max())


def only_composites(*, side: int, batch: int, variant: str = "paper") -> Prepared:
    """The composites of a training step of the recipe `paper`, with the draws."""
    import jax
    import jax.numpy as jnp

    from jmae.anomalies.interpolation import ppii

    image = jnp.asarray(np.resize(images(2)[:, :side, :side], (batch, side, side)))[..., None]
    make = jax.jit(jax.vmap(partial(ppii, preset=variant), (0, None, 0, 0)))
    keys = jax.random.split(jax.random.key(0), batch)
    return lambda: jax.block_until_ready(make(image, image, keys, jnp.arange(batch))), {"images": batch}


def unet(*, size: tuple[int, int], channels: int, widths: tuple[int, ...], head: int, fused: bool = False) -> Any:
    """The paper's U-Net (baumgach/PHiSeg-code, `det_unet2D`) in plain PyTorch.

    A call gives the loss of images against a random target. `fused`: channels last.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    def convs(i: int, o: int, k: int = 3) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a in (i, o, o):
            layers += [nn.Conv2d(a, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o, 1e-3, 0.01), nn.ReLU()]
        return nn.Sequential(*layers)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            below = (*widths[1:], widths[-1])
            self.down = nn.ModuleList(convs(a, b) for a, b in zip((channels, *widths), widths, strict=False))
            triples = zip(widths[:-1], below[1:], widths[1:], strict=True)
            self.up = nn.ModuleList(convs(a + b, c) for a, b, c in triples)
            self.head, self.out = convs(below[0], head, 1), nn.Conv2d(head, 2, 1)

        def forward(self, image: Any) -> Any:
            x, skips = image.to(memory_format=torch.channels_last) if fused else image, []
            for k, level in enumerate(self.down):
                x = level(F.avg_pool2d(x, 2) if k else x)
                skips.append(x)
            for level, skip in zip(reversed(self.up), skips[-2::-1], strict=True):
                x = level(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], 1))
            logits = self.out(self.head(x)).float()
            target = image[:, 0]
            return F.cross_entropy(logits, torch.stack([1 - target, target], 1))

    return Model().to(memory_format=torch.channels_last) if fused else Model()


def composites(rounds: int) -> dict[str, Any]:
    """Times all contestants and prints a table. "pie_torch_over" has pie-torch's time for a composite over theirs."""
    contestants = {
        "pie-torch": ("benchmarks.anomalies:pie_torch", {}),
        "jmae, deviation": ("benchmarks.anomalies:ours", {"batch": 1, "deviation": True}),
        "jmae": ("benchmarks.anomalies:ours", {"batch": 1, "deviation": False}),
        "jmae, batch of 8": ("benchmarks.anomalies:ours", {"batch": 8, "deviation": False}),
        "25 blends, pie-torch": ("benchmarks.anomalies:blends", {"way": "pie-torch"}),
        "25 blends, jmae": ("benchmarks.anomalies:blends", {"way": "jmae"}),
    }
    out = interleaved(contestants, rounds=rounds)
    speeds = {n: ratio(out["25 blends, pie-torch" if "blends" in n else "pie-torch"], out[n]) for n in contestants}
    times = {n: {key: x * out[n].get("composites", 1) for key, x in speeds[n].items()} for n in contestants}
    difference = agreement()
    rows = [
        (n, out[n]["median_s"], out[n].get("composites", 1) / out[n]["median_s"], times[n]["median"])
        for n in contestants
    ]
    print(table(("contestant", "median s", "a second", "x pie-torch"), rows))
    print(f"largest difference of the composites {difference:.1e}")
    return {**out, "pie_torch_over": times, "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--solvers", action="store_true")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    file = Path(__file__).parent / "results" / "anomalies.json"
    if arguments.step:
        changes, names = {"data.size": (arguments.side, arguments.side)}, ("step", "composites")
        step = {"recipe": "ppii.py:paper", "batch": arguments.batch, "changes": changes}
        alone = {"side": arguments.side, "batch": arguments.batch}
        pair = {
            "step": ("benchmarks.steps:jmae_stage", step),
            "composites": ("benchmarks.anomalies:only_composites", alone),
        }
        out = interleaved(pair, rounds=arguments.rounds)
        share = ratio(out["composites"], out["step"])
        write(file, f"step {arguments.side}, batch {arguments.batch}", {**out, "share_of_step": share})
        print(table(("part", "median s", "MiB"), [(n, out[n]["median_s"], out[n]["peak_mib"]) for n in names]))
        print(f"composites and their draws take {share['median']:.1%} of the step")
        return
    if arguments.solvers:
        write(file, "solvers", solvers(arguments.rounds))
        return
    write(file, "composites", composites(arguments.rounds))


if __name__ == "__main__":
    main()
