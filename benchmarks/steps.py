"""Training steps and runs that several benchmarks time: jmae with any recipe, PyTorch with any network."""

import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import Prepared

ROOT = Path(__file__).parent.parent


# --- runs -------------------------------------------------------------------------------------------------------------


def train_run(arguments: list[str], workdir: Path) -> dict[str, Any]:
    """Runs one training as a process. Returns its metrics, its wall seconds and the changes to its recipe."""
    began = time.monotonic()
    command = [sys.executable, "-m", "jmae.train", *arguments, f"--workdir={workdir}"]
    subprocess.run(command, check=True)
    metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    changes = [a for a in arguments if "manifest" not in a]
    return {
        "pixel": metrics["pixel"],
        "image": metrics["image"],
        "per_patient": metrics["per_patient"],
        "patient_means": metrics["patient_means"],
        "baselines": {name: part["pixel"] for name, part in metrics["baselines"].items()},
        "wall_seconds": time.monotonic() - began,
        "evaluation_seconds": metrics["seconds"],
        "arguments": changes,
    }


def without_curves(value: Any) -> Any:
    """A result without the points of its FROC curves."""
    if not isinstance(value, dict):
        return value
    return {k: without_curves(v) for k, v in value.items() if k not in ("curve", "per_patient")}


# --- jmae -------------------------------------------------------------------------------------------------------------


def jmae_stage(*, recipe: str, stage: str = "train", batch: int = 0, changes: dict[str, Any] | None = None) -> Prepared:
    """A stage's training step of a recipe (FILE:PRESET), compiled as `jmae.train` compiles it.

    The batch is on the device before the step. Earlier stages have their initial parameters. One seed is trained.
    """
    import jax
    import numpy as np

    from jmae.programs import compiled_step
    from jmae.recipe import load
    from jmae.system import load_system, stage_keys, trained_shape

    config = load(f"{ROOT / 'configs' / recipe}")
    config.update_from_flattened_dict({"replicates": 1} | (changes or {}))
    results: dict[str, Any] = {}
    stages = {one.name: (number, one) for number, one in enumerate(load_system(config).stages)}
    for name, (number, one) in stages.items():
        n, key = batch or one.batch, stage_keys(config, number)
        state = jax.jit(lambda key, results, one=one, n=n: one.init(key, results, n))(key, results)
        if name == stage:
            break
        results[name] = {"params": state.params, "stats": state.stats}
    image = np.random.default_rng(0).uniform(size=(n, *trained_shape(config, one))).astype(np.float32)
    rows = {"image": image, "index": np.arange(n, dtype=np.int32), "case": np.zeros((n, 2), np.uint32)}
    rows |= {name: np.stack([make(one) for one in image]) for name, make in stages[stage][1].host_arrays.items()}
    rows = jax.device_put(rows)
    if results:  # the state is donated, and may share arrays with the results
        state = jax.tree.map(jax.numpy.copy, state)
    start = time.perf_counter()
    compiled = compiled_step(stages[stage][1].step, 1000, 1).lower(state, rows, key, results).compile()
    facts = {"batch": n, "compile_s": time.perf_counter() - start}
    facts |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, rows, key, results)
        jax.block_until_ready((state, metrics))

    run()
    memory, facts = compiled.memory_analysis(), facts | jmae_facts()
    if "device_mib" in facts:  # of this program only; the device's peak contains earlier programs
        facts["device_mib"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    return run, facts


def jmae_facts() -> dict[str, Any]:
    """The device of this process, and the peak of its memory in MiB."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return {"device": "cpu"}
    return {"device": device.device_kind, "device_mib": (device.memory_stats() or {})["peak_bytes_in_use"] / 2**20}


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_train(
    *,
    network: dict[str, Any],
    batch: int,
    tuned: bool,
    device: str,
    compiled: bool,
    build: str,
    published: str = "float16",
) -> Prepared:
    """The official training step, or a tuned one, of a PyTorch network whose call gives the loss of images.

    Args:
      build: "module:function" that makes the network.
      published: the type in which the official step computes on a GPU; float16 has loss scaling, as in MAE's loop.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    cuda, (module, function) = device == "cuda", build.split(":")
    half = torch.bfloat16 if tuned else getattr(torch, published)
    make, scaled = getattr(importlib.import_module(module), function), published == "float16" and not tuned

    def prepare(batch: int, trial: bool = False) -> Prepared:
        torch.manual_seed(0)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        model = make(**network, fused=tuned).to(device).train()
        params = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in params if p.ndim > 1]
        groups = [{"params": decayed, "weight_decay": 0.05}]
        groups += [{"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95), **({"fused": True} if tuned else {}))
        scaler = torch.amp.GradScaler(device, enabled=cuda and scaled)
        fast = tuned and compiled and not trial  # compilation takes a minute, and a compiled step needs less memory
        forward = torch.compile(model, dynamic=False) if fast else model
        images = torch.rand(batch, network["channels"], *network["size"], device=device)

        def step() -> None:
            with torch.autocast(device, half, enabled=cuda and half != torch.float32):
                loss = forward(images)
            if scaled:
                loss.item()  # the official loop reads each loss and computes the gradients' norm
            scaler.scale(loss).backward()
            if scaled:
                scaler.unscale_(optimizer)
                torch.norm(torch.stack([torch.norm(p.grad) for p in params]))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()

        start = time.perf_counter()
        step()
        facts = {"batch": batch, "parameters": sum(p.numel() for p in params)}
        facts |= {"compile_s": time.perf_counter() - start} if fast else {}
        if not (tuned or trial):
            with FlopCounterMode(display=False) as counter:
                step()
            facts["counted_flops"] = counter.get_total_flops()
        return step, facts | torch_facts(device)

    return largest(prepare, batch)


def matrix_product(*, device: str) -> Prepared:
    """8 products of two large matrices: 8192 in bfloat16 on a GPU, 2048 in float32 on a CPU."""
    import torch

    n, kind = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(8):
            torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return run, {"flops": 8 * 2 * n**3, "size": n, "dtype": str(kind)} | torch_facts(device)


def torch_facts(device: str) -> dict[str, Any]:
    """The device, and the peak of its memory in MiB."""
    import torch

    if device == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"device": torch.cuda.get_device_name(), "device_mib": peak}


# --- both -------------------------------------------------------------------------------------------------------------


def largest(prepare: Callable[..., Prepared], batch: int) -> Prepared:
    """A step with batch size `batch`. 0 means the largest that fits, found by doubling from 6."""
    if batch:
        return prepare(batch)
    fits = 6
    while runs(prepare, 2 * fits):
        fits *= 2
    return prepare(fits)


def runs(prepare: Callable[..., Prepared], batch: int) -> bool:
    """Whether a step with this batch size fits into the memory. Raises every other error."""
    try:
        prepare(batch, trial=True)
        return True
    except Exception as error:
        if "out of memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    finally:
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def same_device(results: dict[str, dict[str, Any]]) -> str:
    """The device of all contestants. Ends the process where some ran on a CPU and others did not."""
    found = " / ".join(sorted({result["device"] for result in results.values()}))
    if "cpu / " in found or " / cpu" in found:
        raise SystemExit(f"different devices: {found}: install jax and torch for one device, or set JAX_PLATFORMS=cpu")
    return found
