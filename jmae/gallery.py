"""python -m jmae.gallery IMAGE [IMAGE ...] --out FILE.png [--seed 0] [--size 256,256] [--only ppii,nsa] [--draws 3]
                          [--config FILE[:PRESET] [--config.KEY=VALUE ...]] [--debug]

Draws every synthetic anomaly on one image or several. A generator has one line: the clean image, then each draw beside
its target. Generators that mix two images take the source from the next image; with a single image, and for the other
generators, the image is its own source. Of a volume the picture shows the slice of the last axis with the largest
target. Images are resized to --size (default 256,256; volumes at most 96 along each axis).

With --config the picture shows what a recipe trains on, in its size, window and equalisation. Each image and draw has a
line. It shows the prepared image, the image with anomalies and its target. Where anomalies have raters, the images of
three raters and the deviation over all raters follow.

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
from ml_collections import ConfigDict

from jmae.anomalies.anatpaste import anatpaste, lung_field
from jmae.anomalies.cutpaste import cutpaste
from jmae.anomalies.interpolation import fpi, pii, ppii
from jmae.anomalies.nsa import nsa
from jmae.data.files import read_image
from jmae.data.manifest import Row
from jmae.data.preparation import prepared_image, prepared_volume
from jmae.data.transforms import grey, resize, to_unit
from jmae.errors import InputError, exit_code
from jmae.recipe import arguments, check, is_volume, load, module_of, nearest, override, split, typed
from jmae.run_folder import log
from jmae.waiting import at_work

SIDE, VOLUME_SIDE = 256, 96  # voxels along each axis of an image, and at most of a volume
MOST = 20  # draws and images; a PNG of matplotlib has at most 65536 pixels along an axis
VISIBLE = 0.5 / 255  # half a grey level
INCHES = 1.7  # width of one panel


class Entry(NamedTuple):
    """A generator as the gallery shows it."""

    name: str  # its name for `--only`
    title: str
    make: Callable[..., Any]  # (image, source, key, lungs) -> image, target, extras
    self_source: bool = False  # the source is the image itself


def plain(generator: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The generator as a function that ignores the lung field."""
    return lambda image, source, key, lungs: generator(image, source, key, **options)


def with_lungs(image: Any, source: Any, key: Any, lungs: Any) -> Any:
    """AnatPaste inside the lung field."""
    return anatpaste(image, source, key, lungs=lungs)


paper = plain(ppii, preset="paper")

ENTRIES = (
    Entry("fpi", "FPI", plain(fpi)),
    Entry("pii", "PII", plain(pii)),
    Entry("ppii", "P-PII, paper", paper),
    Entry("ppii", "P-PII, released", plain(ppii, preset="released")),
    Entry("ppii", "P-PII, jmae", plain(ppii, preset="jmae")),
    Entry("ppii", "P-PII, paper, from itself", paper, self_source=True),
    Entry("cutpaste", "CutPaste", plain(cutpaste, style="normal"), self_source=True),
    Entry("cutpaste", "CutPaste, scar", plain(cutpaste, style="scar"), self_source=True),
    Entry("nsa", "NSA", plain(nsa)),
    Entry("anatpaste", "AnatPaste", with_lungs, self_source=True),
)


class Panel(NamedTuple):
    """A draw in two dimensions."""

    clean: np.ndarray
    image: np.ndarray
    target: np.ndarray
    slice: int | None  # index of the slice of a volume
    changed: bool  # whether any voxel changed by half a grey level or more


@at_work("drawing the anomalies")
def main(argv: list[str]) -> None:
    paths, words = split(argv)
    flags = arguments(words, __doc__, ["out", "seed", "size", "only", "draws", "config"])
    if not 1 <= len(paths) <= MOST or "out" not in flags:
        raise InputError(f"name 1 to {MOST} images and the picture: jmae gallery IMAGE --out FILE.png")
    out = Path(flags["out"])
    if out.suffix.lower() != ".png":
        raise InputError(f"--out={out}: write a name that ends in .png")
    seed, draws = (typed(name, flags.get(name, str(default)), default) for name, default in (("seed", 0), ("draws", 3)))
    if not 1 <= draws <= MOST:
        raise InputError(f"--draws={draws}: write 1 to {MOST}")
    if out.resolve() in [Path(path).resolve() for path in paths]:
        raise InputError(f"--out={out}: this would replace the image: write another name")
    if "config" in flags:
        if other := flags.keys() & {"size", "only"}:
            raise InputError(f"--{other.pop()}: a recipe names it: set --config.KEY=VALUE")
        config = load(flags.pop("config"))
        override(config, flags)
        save(recipe_picture(config, paths, seed=seed, draws=draws), out)
        log(f"gallery: {out}")
        return
    if any(flag.startswith("config.") for flag in flags):
        raise InputError("--config.KEY goes with --config=configs/NAME.py[:PRESET]")
    size = typed("size", flags["size"], (0,)) if "size" in flags else None
    entries = entries_of(flags["only"]) if "only" in flags else ENTRIES
    images = [read_shown(path, size) for path in paths]
    if len({image.shape for image in images}) > 1:
        sizes = ", ".join(f"{path} {image.shape[:-1]}" for path, image in zip(paths, images, strict=True))
        raise InputError(f"the images differ in size after reading ({sizes}): set --size")
    save(picture(images, [Path(path).name for path in paths], entries, seed=seed, draws=draws), out)
    log(f"gallery: {out}")
    log("next: what a recipe trains on: the same command with --config NAME:PRESET")


def entries_of(names: str) -> tuple[Entry, ...]:
    """The entries of the generators that "a,b" names."""
    known, wanted = list(dict.fromkeys(entry.name for entry in ENTRIES)), [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise InputError(f"--only={name}: did you mean {nearest(name, known)}? One of {', '.join(known)}")
    return tuple(entry for entry in ENTRIES if entry.name in wanted)


def read_shown(path: str, size: tuple[int, ...] | None) -> np.ndarray:
    """An image file as float32 (*size, 1) in [0, 1]: grey of a colour image, else the first channel.

    Raises InputError where the file cannot be read or `size` does not fit it.
    """
    stored = read_image(path)
    array = grey(stored.array) if stored.array.shape[-1] == 3 else stored.array[..., :1]
    axes = len(stored.size)
    size = size or ((SIDE,) * 2 if axes == 2 else tuple(min(n, VOLUME_SIDE) for n in stored.size))
    if len(size) != axes:
        raise InputError(f"{path}: has {axes} axes, but --size has {len(size)} numbers: write {axes}")
    if min(size) < 16:
        raise InputError(f"--size={','.join(map(str, size))}: too small for an anomaly: write 16 or more for each axis")
    return np.clip(resize(to_unit(array, stored.bits or 0), size), 0, 1)


# --- draws ------------------------------------------------------------------------------------------------------------


@cache
def batched(make: Callable[..., Any]) -> Callable[..., Any]:
    """The generator over many keys, compiled once for all images of a size."""
    return jax.jit(jax.vmap(make, (None, None, 0, None)))


def draw(entry: Entry, image: np.ndarray, source: np.ndarray, lungs: Array | None, keys: Array) -> list[Panel]:
    """A generator's draws on an image, one for each key."""
    results = batched(entry.make)(jnp.asarray(image), jnp.asarray(image if entry.self_source else source), keys, lungs)
    return [panel(image, np.asarray(out), np.asarray(target)) for out, target in zip(*results[:2], strict=True)]


def panel(clean: np.ndarray, out: np.ndarray, target: np.ndarray) -> Panel:
    """The panel of a draw.

    Of a volume it shows the slice of the last axis with the largest target, or the middle slice if the target is empty.
    """
    changed = bool(np.any(np.abs(out - clean) >= VISIBLE))
    clean, out = clean[..., 0], out[..., 0]
    if clean.ndim == 2:
        return Panel(clean, out, target, None, changed)
    sums = target.sum((0, 1))
    k = int(sums.argmax()) if sums.any() else clean.shape[-1] // 2
    return Panel(clean[..., k], out[..., k], target[..., k], k, changed)


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(
    images: Sequence[np.ndarray], names: Sequence[str], entries: Sequence[Entry], *, seed: int, draws: int
) -> Figure:
    """The figure, with a line for each image and entry.

    A line shows the clean image. Then, for each draw, it shows the image with the target's outline, and the target.
    """
    keys = jax.random.split(jax.random.key(seed), (len(images), len(ENTRIES), draws))
    lines, columns = len(images) * len(entries), 1 + 2 * draws
    high = INCHES * images[0].shape[0] / images[0].shape[1] + 0.35  # room for two lines of title
    figure = Figure(figsize=(INCHES * columns, high * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(lines, columns, squeeze=False))
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        source = images[(i + 1) % len(images)]
        lungs = jnp.asarray(lung_field(image)) if image.ndim == 3 else None
        for entry in entries:
            results = draw(entry, image, source, lungs, keys[i, ENTRIES.index(entry)])
            line = next(axes)
            show(line[0], results[0].clean, name)
            for result, beside, below in zip(results, line[1::2], line[2::2], strict=True):
                words = [entry.title, *([f"slice {result.slice}"] if result.slice is not None else [])]
                show(
                    beside,
                    result.image,
                    "\n".join([", ".join(words), *([] if result.changed else ["nothing changed"])]),
                )
                if 0 < result.target.max() and result.target.min() < result.target.max():
                    beside.contour(result.target, [result.target.max() / 2], colors="#ff8c2b", linewidths=0.8)
                show(below, result.target, f"target, maximum {result.target.max():.2g}", "inferno")
            log(f"{name}: {entry.title}")
    return figure


def recipe_picture(config: ConfigDict, paths: Sequence[str], *, seed: int, draws: int) -> Figure:
    """The figure of what a recipe trains on: a line for each image and draw, a column for each array that the system's
    `shown` gives.

    Raises InputError where the recipe is wrong, its system makes no anomalies, or a file cannot be prepared.
    """
    check(config)
    shown = getattr(module_of(config.system), "shown", None)
    if shown is None:
        raise InputError(f"--config: {config.system} trains on no synthetic anomalies: name another recipe")
    images = [prepared(config, path) for path in paths]
    keys = jax.random.split(jax.random.key(seed), (len(images), draws))
    titles, draw = shown(config)
    make = jax.jit(jax.vmap(draw, (None, None, 0)))
    results = [make(image, images[(i + 1) % len(images)], keys[i]) for i, image in enumerate(images)]
    high = INCHES * images[0].shape[0] / images[0].shape[1] + 0.35
    figure = Figure(figsize=(INCHES * (1 + len(titles)), high * len(images) * draws), layout="constrained")
    FigureCanvasAgg(figure)
    lines = iter(figure.subplots(len(images) * draws, 1 + len(titles), squeeze=False))
    for image, path, found in zip(images, paths, results, strict=True):
        for j in range(draws):
            line, arrays = next(lines), [np.asarray(array[j]) for array in found]
            k = int(arrays[titles.index("target")].sum((0, 1)).argmax()) if image.ndim == 4 else None
            flat = lambda array, k=k: array if k is None else array[:, :, k]
            show(line[0], flat(image[..., 0]), Path(path).name if k is None else f"{Path(path).name}, slice {k}")
            for place, title, array in zip(line[1:], titles, arrays, strict=True):
                values = array.ndim == image.ndim
                words = title if values else f"{title}, at most {array.max():.2g}"
                show(place, flat(array[..., 0] if values else array), words, "gray" if values else "inferno")
            log(f"{Path(path).name}: draw {j + 1}")
    return figure


def prepared(config: ConfigDict, path: str) -> np.ndarray:
    """A file as the recipe trains on it, float32 (*size, channels): an image, or the middle crop of a volume."""
    row = Row(Path(path).name, "", "train", 0, (path,))
    if not is_volume(config):
        return prepared_image(row, config.data)
    array, size = prepared_volume(row, config.data).array, tuple(config.data.size)
    room = [(max(0, n - have) // 2, -(-max(0, n - have) // 2)) for n, have in zip(size, array.shape, strict=False)]
    array = np.pad(array, [*room, (0, 0)])
    return array[tuple(slice((have - n) // 2, (have - n) // 2 + n) for n, have in zip(size, array.shape, strict=False))]


def show(axes: Axes, array: np.ndarray, title: str, colours: str = "gray") -> None:
    """Draws one panel on the scale 0 to 1."""
    axes.imshow(array, cmap=colours, vmin=0, vmax=1)
    axes.set_title(title.replace("$", r"\$"), fontsize=7)
    axes.set_axis_off()


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG as a whole: a reader sees the old file or the new one. Raises InputError where that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, format="png", dpi=120)
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}): free space or change the folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


if __name__ == "__main__":
    sys.exit(exit_code(main))
