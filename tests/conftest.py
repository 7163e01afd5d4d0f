"""What all workers share: one folder of compiled programs, one small data set, one uninterrupted run on it."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

# Before JAX is imported, and for the processes that tests start: programs are compiled with less effort, in a tenth of
# the time, and equal ones once, as the workers inherit the folder, but for small ones, which cost more to keep.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jmae-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "XLA_FLAGS" not in os.environ:  # a process ends at a flag that its XLA does not know
    trial = os.environ | {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=trial, capture_output=True)
    os.environ["XLA_FLAGS"] = "" if done.returncode else trial["XLA_FLAGS"]

import csv
import fcntl
import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from jmae import checkpoint, train, waiting
from jmae.errors import exit_code
from jmae.gpus import without_cudnn
from jmae.run_folder import CLOCK

waiting.SILENCE = 10_000  # a busy machine adds no lines to those that the tests expect

# Tracing leaves many objects and little garbage: it is collected rarely.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# The smoke recipe on a small set, with its own steps and batches, so that all runs share their programs. log_every
# divides neither checkpoint_every nor the steps; this rule for the pseudo-labels always gives both modules images.
SMALL = """
pretrain.steps=20 pretrain.batch=32 proxy.steps=10 proxy.batch=32 adapt.steps=10 adapt.batch=16
adapt.equal=steps adapt.percentile_over=all checkpoint_every=8 log_every=3 evaluation.subsets=matched
""".split()


def arguments(manifest: Path | None, workdir: Path, *changes: str) -> list[str]:
    """The command line of a small training run; `changes` are KEY=VALUE."""
    data = [f"data.manifest={manifest}"] if manifest else []
    return [
        "--config=configs/amae.py:smoke",
        f"--workdir={workdir}",
        *(f"--config.{change}" for change in [*SMALL, *data, *changes]),
    ]


def draw(rng: np.random.Generator, size: tuple[int, ...], abnormal: bool) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image of the given size in 0..255, and its lesion mask: a bright block somewhere."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    image = 90 + 50 * sum(np.sin(rng.uniform(1, 3) * a + rng.uniform(0, 6)) for a in axes) + rng.normal(0, 4, size)
    mask = np.zeros(size, bool)
    if abnormal:
        start = [int(rng.integers(2, n // 2)) for n in size]
        mask[tuple(slice(s, s + n // 4) for s, n in zip(start, size, strict=True))] = True
    return np.clip(image + 70 * mask, 0, 255).astype(np.uint8), mask


def write_set(folder: Path, counts: dict[tuple[str, int | None], int], seed: int = 0) -> Path:
    """A manifest of 2D images, 40 x 36, as PNG of 8 and of 16 bits, .npy and NIfTI in turn; masks are PNG."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for (split, label), n in counts.items():
        for i in range(n):
            name = f"{split}-{'x' if label is None else label}-{i}"
            image, mask = draw(rng, (40, 36), bool(label) or (label is None and i % 2 == 1))
            kind = ("png", "png", "npy", "nii.gz")[i % 4]
            file = folder / f"{name}.{kind}"
            if kind == "npy":
                np.save(file, image)
            elif kind == "nii.gz":
                nib.save(nib.Nifti1Image(image.T, np.diag([0.7, 0.8, 1, 1])), file)
            else:
                Image.fromarray(image if i % 4 == 0 else image.astype(np.uint16) * 257).save(file)
            marked = label == 1 and i % 4 != 3  # the NIfTI's grid has positions, a PNG has none
            if marked:
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}-mask.png")
            rows.append(
                {
                    "id": name,
                    "patient": f"p-{split}-{label}-{i // 2}",
                    "split": split,
                    "label": "" if label is None else label,
                    "image": file.name,
                    "mask": f"{name}-mask.png" if marked else "",
                    "region": "",
                    "matched": int(i < 4),
                }
            )
    with open(folder / "manifest.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def without_clock(line: dict) -> dict:
    """A line of metrics.jsonl without what the clock tells."""
    return {name: value for name, value in line.items() if name not in CLOCK}


def content(workdir: Path) -> dict:
    """All that a run leaves, without the clock: metrics, scores, history, and the last state of each stage in bytes."""
    metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("seconds")},
        "scores": (workdir / "evaluation" / "scores.csv").read_text(),
        "history": sorted(
            (h["stage"], h["step"], json.dumps({k: v for k, v in h.items() if k not in CLOCK})) for h in history
        ),
        "labels": (workdir / "labels.csv").read_text(),
        "weights": last_states(workdir),
    }


def last_states(workdir: Path) -> dict[str, tuple[int, dict[str, bytes]]]:
    """(last step, its state in bytes) of each stage of a run."""
    states = {}
    for stage in sorted((workdir / "checkpoints").iterdir()):
        step = max(int(path.name) for path in stage.iterdir())
        leaves = json.loads((stage / str(step) / "step.json").read_text())["leaves"]
        empty = lambda dtype, shape: np.zeros(json.loads(f"[{shape}"), dtype)
        target = {name: empty(*text.split("[")) for name, text in leaves.items()}
        _, arrays, _ = checkpoint.restore(stage, target, config=None)
        states[stage.name] = step, {name: array.tobytes() for name, array in arrays.items()}
    return states


LONGEST = "devices simsid ppii train maemi memmc_mae amae evaluate phiseg checkpoint".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `long_but_first`, all parameters but the first are `long`. The files that take longest come
    first, so that no worker is left with one of them at the end."""
    begun = set[str]()
    for item in items:
        if item.get_closest_marker("long_but_first"):
            name = item.nodeid.split("[")[0]
            if name in begun:
                item.add_marker("long")
            begun.add(name)
    order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this session, which the first worker to come fills by `make`; others wait for it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            (base / name).mkdir(exist_ok=True)
            make(base / name)
            lock.write("made")
    return base / name


@pytest.fixture(scope="session", autouse=True)
def no_cudnn():
    """Programs for NVIDIA GPUs are traced on machines without cuDNN."""
    with without_cudnn():
        yield


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        arguments=arguments, draw=draw, write_set=write_set, content=content, last_states=last_states
    )


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    counts = {("train", 0): 16, ("unlabeled", None): 16, ("val", 0): 3, ("val", 1): 3, ("test", 0): 6, ("test", 1): 6}
    return once(tmp_path_factory, "set", lambda folder: write_set(folder, counts)) / "manifest.csv"


@pytest.fixture(scope="session")
def finished(small_set, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted; nobody writes into it."""

    def make(folder: Path) -> None:
        steps, real = [], train.compiled_step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "compiled_step", lambda *args: steps.append(real(*args)) or steps[-1])
            assert exit_code(train.main, arguments(small_set, folder / "run")) == 0
        told = [[steps.index(step), step._cache_size()] for step in steps]
        (folder / "programs.json").write_text(json.dumps(told))

    return once(tmp_path_factory, "finished", make) / "run"


@pytest.fixture(scope="session")
def programs(finished) -> list:
    """Of each stage of `finished`: the first stage with the same compiled step, and how often that was compiled."""
    return json.loads(finished.with_name("programs.json").read_text())
