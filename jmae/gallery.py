"""python -m jmae.gallery IMAGE [IMAGE ...] --out FILE.png [--seed 0] [--size 256,256] [--only ppii,nsa] [--draws 3]
                          [--debug]

Every synthetic anomaly on one image, or on several: a row a generator, with the clean image and then each draw beside
its target. What is pasted comes from the image itself; of several, for the generators that mix two images, from the
next one. Of a volume the slice of the last axis is shown where the target is largest. Images are resized to --size, by
default 256,256, and of volumes to at most 96 an axis.
Exit codes: 0 done; 2 the input or the environment is wrong.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jmae.anomalies.anatpaste import anatpaste, lung_field
from jmae.anomalies.cutpaste import cutpaste
from jmae.anomalies.interpolation import fpi, pii, ppii
from jmae.anomalies.nsa import nsa
from jmae.data.files import read_image
from jmae.data.transforms import grey, resize, to_unit
from jmae.errors import InputError, exit_code
from jmae.recipe import arguments, nearest, split, typed
from jmae.run_folder import log

SIDE, VOLUME_SIDE = 256, 96  # voxels of an axis: of an image; of a volume at most
MOST = 20  # draws, and images: a picture holds 65536 pixels an axis
VISIBLE = 0.5 / 255
INCHES = 1.7  # of a picture's side


class Row(NamedTuple):
    """A generator as the gallery shows it."""

    name: str  # of `--only`
    title: str
    make: Callable[..., Any]  # (image, source, key, lungs) -> image, target, extras
    own: bool = False  # the source is the image itself


def plain(generator: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Without the lung field."""
    return lambda image, source, key, lungs: generator(image, source, key, **options)


paper = plain(ppii, preset="paper")

ROWS = (
    Row("fpi", "FPI", plain(fpi)),
    Row("pii", "PII", plain(pii)),
    Row("ppii", "P-PII, paper", paper),
    Row("ppii", "P-PII, released", plain(ppii, preset="released")),
    Row("ppii", "P-PII, jmae", plain(ppii, preset="jmae")),
    Row("ppii", "P-PII, paper, of itself", paper, own=True),
    Row("cutpaste", "CutPaste", plain(cutpaste, style="normal"), own=True),
    Row("cutpaste", "CutPaste, scar", plain(cutpaste, style="scar"), own=True),
    Row("nsa", "NSA", plain(nsa)),
    Row(
        "anatpaste", "AnatPaste", lambda image, source, key, lungs: anatpaste(image, source, key, lungs=lungs), own=True
    ),
)


class Shown(NamedTuple):
    """A draw in two dimensions."""

    clean: np.ndarray
    image: np.ndarray
    target: np.ndarray
    slice: int | None
    changed: bool  # any voxel by half a grey level or more


def main(argv: list[str]) -> None:
    paths, flags = split(argv)
    given = arguments(flags, __doc__, ["out", "seed", "size", "only", "draws"])
    if not 1 <= len(paths) <= MOST or "out" not in given:
        raise InputError(f"name 1 to {MOST} images and the picture: python -m jmae.gallery IMAGE --out=FILE.png")
    out = Path(given["out"])
    if out.suffix.lower() != ".png":
        raise InputError(f"--out={out}: write a name that ends in .png")
    seed, draws = (typed(name, given.get(name, str(default)), default) for name, default in (("seed", 0), ("draws", 3)))
    if not 1 <= draws <= MOST:
        raise InputError(f"--draws={draws}: from 1 to {MOST}")
    size = typed("size", given["size"], (0,)) if "size" in given else None
    rows = chosen(given["only"]) if "only" in given else ROWS
    images = [prepared(path, size) for path in paths]
    if len({image.shape for image in images}) > 1:
        sizes = ", ".join(f"{path} {image.shape[:-1]}" for path, image in zip(paths, images, strict=True))
        raise InputError(f"the images differ in size after reading ({sizes}): set --size")
    if out.resolve() in [Path(path).resolve() for path in paths]:
        raise InputError(f"--out={out}: would replace the image: write another name")
    save(picture(images, [Path(path).name for path in paths], rows, seed=seed, draws=draws), out)
    log(f"gallery: {out}")


def chosen(names: str) -> tuple[Row, ...]:
    """The rows of generators named "a,b"."""
    known, wanted = list(dict.fromkeys(row.name for row in ROWS)), [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise InputError(f"--only={name}: did you mean {nearest(name, known)}? One of {', '.join(known)}")
    return tuple(row for row in ROWS if row.name in wanted)


def prepared(path: str, size: tuple[int, ...] | None) -> np.ndarray:
    """An image file as (*size, 1) in [0, 1]: grey, or the first of channels that are no colours."""
    stored = read_image(path)
    array = grey(stored.array) if stored.array.shape[-1] == 3 else stored.array[..., :1]
    own = array.shape[:-1]
    size = size or ((SIDE,) * 2 if len(own) == 2 else tuple(min(n, VOLUME_SIDE) for n in own))
    if len(size) != len(own):
        raise InputError(f"{path}: {len(own)} axes where --size has {len(size)}: name {len(own)} numbers")
    if min(size) < 16:
        raise InputError(f"--size={','.join(map(str, size))}: 16 or more an axis, or no anomaly has room")
    return np.clip(resize(to_unit(array, stored.bits or 0), size), 0, 1)


# --- draws ------------------------------------------------------------------------------------------------------------


@cache
def batched(make: Callable[..., Any]) -> Callable[..., Any]:
    """A generator over keys, compiled once for all images of a size."""
    return jax.jit(jax.vmap(make, (None, None, 0, None)))


def drawn(row: Row, image: np.ndarray, source: np.ndarray, lungs: Array | None, keys: Array) -> list[Shown]:
    """A generator's draws on an image, one a key."""
    results = batched(row.make)(jnp.asarray(image), jnp.asarray(image if row.own else source), keys, lungs)
    return [shown(image, np.asarray(out), np.asarray(target)) for out, target in zip(*results[:2], strict=True)]


def shown(clean: np.ndarray, out: np.ndarray, target: np.ndarray) -> Shown:
    """A draw's image and target; of a volume the slice of the last axis with the largest target, without one the middle
    one."""
    changed = bool(np.any(np.abs(out - clean) >= VISIBLE))
    clean, out = clean[..., 0], out[..., 0]
    if clean.ndim == 2:
        return Shown(clean, out, target, None, changed)
    sums = target.sum((0, 1))
    k = int(sums.argmax()) if sums.any() else clean.shape[-1] // 2
    return Shown(clean[..., k], out[..., k], target[..., k], k, changed)


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(
    images: Sequence[np.ndarray], names: Sequence[str], rows: Sequence[Row], *, seed: int, draws: int
) -> Figure:
    """The figure: for each image all rows; the clean image, then for each draw the image with the target's outline, and
    the target."""
    keys = jax.random.split(jax.random.key(seed), (len(images), len(ROWS), draws))
    lines, columns = len(images) * len(rows), 1 + 2 * draws
    high = INCHES * images[0].shape[0] / images[0].shape[1] + 0.35  # with two lines of title
    figure = Figure(figsize=(INCHES * columns, high * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(lines, columns, squeeze=False))
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        source = images[(i + 1) % len(images)]
        lungs = jnp.asarray(lung_field(image)) if image.ndim == 3 else None
        for row in rows:
            results = drawn(row, image, source, lungs, keys[i, ROWS.index(row)])
            line = next(axes)
            show(line[0], results[0].clean, name)
            for result, beside, below in zip(results, line[1::2], line[2::2], strict=True):
                words = [row.title, *([f"slice {result.slice}"] if result.slice is not None else [])]
                show(
                    beside,
                    result.image,
                    "\n".join([", ".join(words), *([] if result.changed else ["nothing changed"])]),
                )
                if 0 < result.target.max() and result.target.min() < result.target.max():
                    beside.contour(result.target, [result.target.max() / 2], colors="#ff8c2b", linewidths=0.8)
                show(below, result.target, f"target, at most {result.target.max():.2g}", "inferno")
            log(f"{name}: {row.title}")
    return figure


def show(axes: Axes, array: np.ndarray, title: str, colours: str = "gray") -> None:
    """One picture; the scale of all is 0 to 1."""
    axes.imshow(array, cmap=colours, vmin=0, vmax=1)
    axes.set_title(title.replace("$", r"\$"), fontsize=7)
    axes.set_axis_off()


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG in one piece: a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, format="png", dpi=120)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror or error}): free space or change the folder") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


if __name__ == "__main__":
    sys.exit(exit_code(main))
