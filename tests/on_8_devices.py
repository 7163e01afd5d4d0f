"""What tests/test_devices.py runs in a process with eight virtual devices. Prints one line of JSON."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from drawn import first_state
from patients import arguments

from jmae import plan, programs, recipe, sharding, train
from jmae.errors import exit_code
from jmae.gpus import without_cudnn
from jmae.hlo import Program
from jmae.passes import seeds_of
from jmae.system import load_system, stage_keys
from jmae.target import Target, tracing_for

STEPS = 3
H200 = Target("cuda", (9, 0), 91000)
EIGHT = ("train.batch=8", "evaluation.batch=8", "train.steps=3")  # of the volumes' recipe, divisible by the devices


def small_system(*changes: str, name: str = "amae"):
    """Recipe and system of 16 tokens and width 24; `changes` are KEY=VALUE."""
    config, _ = recipe.parse([f"--config=configs/{name}.py:smoke", *(f"--config.{change}" for change in changes)], "")
    tiny = {"model.width": 24, "model.heads": 2, "model.decoder_width": 16, "model.decoder_heads": 2}
    if name == "ppii":
        tiny = {"data.size": (16, 16), "model.widths": (3, 4), "model.base": 3, "variant": "paper"}
    elif name == "memmc_mae":
        tiny |= {"data.size": (16, 16), "model.memory": 3, "evaluation.scales": (1.0,), "evaluation.window": (3, 3)}
    elif name == "simsid":
        tiny = {"data.size": (16, 16), "model.patch": (4, 4), "model.widths": (3, 4), "model.discriminator": (3, 4)}
        tiny |= {"model.features": 8, "model.width": 8, "joint.widths": (4, 4, 4), "joint.critic": 1}
    elif name == "amae":
        tiny |= {"data.size": (32, 32), "model.patch": (8, 8), "proxy.head": (16, 8)}
    else:
        tiny |= {"data.size": (8, 8, 8), "model.patch": (4, 4, 2), "evaluation.stride": (8, 8, 8)}
    config.update_from_flattened_dict(tiny)
    return config, load_system(config)


def batch(n: int) -> dict:
    rng = np.random.default_rng(0)
    lungs = np.zeros((n, 32, 32), bool)
    lungs[:, 6:26, 4:28] = True
    image = rng.uniform(size=(n, 32, 32, 1)).astype(np.float32)
    return {"image": image, "index": np.arange(n, dtype=np.int32), "case": np.zeros((n, 2), np.uint32), "lungs": lungs}


def crops(n: int) -> dict:
    """A batch of two-channel crops of volumes."""
    own = {k: v for k, v in batch(n).items() if k != "lungs"}
    return own | {"image": np.random.default_rng(1).uniform(size=(n, 8, 8, 8, 2)).astype(np.float32)}


def small(n: int) -> dict:
    """A batch of 16 x 16 images."""
    own = {k: v for k, v in batch(n).items() if k != "lungs"}
    return own | {"image": np.random.default_rng(2).uniform(size=(n, 16, 16, 1)).astype(np.float32)}


def difference(a, b) -> float:
    """|a - b| / |b| over all leaves together: a leaf whose gradient is zero but for rounding says nothing."""
    flat = lambda tree: np.concatenate(
        [np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)] or [np.zeros(0)]
    )
    return float(np.linalg.norm(flat(a) - flat(b)) / max(np.linalg.norm(flat(b)), 1e-12))


def mapped_against_jitted(config, system, batch) -> dict:
    """A step of every stage under pmap on two devices beside the jitted step on the whole batch:
    {stage: [difference of metrics, of gradients (as Adam's moments) and statistics, equal shapes, all finite]}."""
    out, results, known = {}, {}, {}
    for number, stage in enumerate(system.stages):
        key = stage_keys(config, number)
        state = first_state(stage, results, 16).replace(step=jnp.int32(1))  # in the first the learning rate is zero
        if stage.step not in known:  # modules A and B share theirs
            phase = {} if stage.phases[0] is None else {"phase": stage.phases[0]}
            step = partial(stage.step, steps=STEPS, **phase)
            known[stage.step] = jax.jit(step), sharding.over_devices(step)
        jitted, mapped = known[stage.step]
        whole, metrics = jitted(state, batch(16), key, results)
        halves = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), batch(16))
        on_host = jax.device_get(mapped(state, halves, key, results))  # there an index compiles nothing
        compared = lambda s: (s.opt, s.stats)
        shapes = lambda s: [np.shape(leaf) for leaf in jax.tree.leaves((s.params, s.opt, s.stats))]
        for half in range(2):
            mine, own = jax.tree.map(lambda x, half=half: x[half], on_host)
            finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((mine.params, mine.stats, own)))
            differences = [difference(own, metrics), difference(compared(mine), compared(whole))]
            out[f"{stage.name} {half}"] = [*differences, shapes(mine) == shapes(whole), finite]
        results[stage.name] = {"params": whole.params, "stats": whole.stats}
    return out


def bytes_of_states() -> dict[str, list[int]]:
    """Bytes of parameters, optimiser state and statistics: on the first of eight devices, and in all, by `fsdp`."""
    config, system = small_system(name="maemi")
    key, first, out = stage_keys(config, 0), jax.devices()[0], {}
    for fsdp in (1, 4, 8):
        mesh = sharding.device_mesh(fsdp)
        state = jax.jit(lambda key, mesh=mesh: programs.placed(system.stages[0].init(key, {}, 16), mesh))(key)
        leaves = [leaf for leaf in jax.tree.leaves((state.params, state.opt)) if leaf.size >= sharding.SPLIT_FROM]
        shards = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == first]
        out[str(fsdp)] = [sum(shards), sum(leaf.nbytes for leaf in leaves)]
    return out


def exchanged() -> dict[str, list[float]]:
    """Of steps of 4096 samples on 8 devices with weights over 4: bytes of all collectives, and of all weights. So many
    samples that the CPU's attention loops over heads. P-PII's anomalies come from the image itself, as others' are
    exchanged by design. Traced for an H200, compiled for CPUs."""
    out, mesh = {}, sharding.device_mesh(4)
    for name, stage, *changes in (
        ("memmc_mae", "train"),
        ("amae", "proxy"),
        ("amae", "module_a", "adapt.masks=2"),
        ("ppii", "train", "anomaly.source=self"),
        ("simsid", "teacher", "variant=report"),
        ("simsid", "student", "variant=report"),
        ("simsid", "joint", "variant=official"),
    ):
        config, _ = small_system("fsdp=4", *changes, name=name)
        with tracing_for(H200), without_cudnn():
            results = {}
            for number, each in enumerate(load_system(config).stages):
                if each.name == stage:
                    state, inputs, step = plan.step_of(config, each, number, results, mesh, 4096)
                    program = Program(step.trace(state, *inputs).lower().compile().as_text(), 8)
                results = results | {each.name: plan.result_of(config, each, number, results)}
        assert not program.unknown
        weights = 4 * plan.chip_bytes((state.params, state.stats, inputs[2]))
        out[f"{name} {stage}"] = [sum(each.size for each in program.collectives()), weights]
    return out


def rows_of_kernels() -> dict[str, list[int]]:
    """Rows of the largest array that a kernel of LayerNorm takes on each of 1 and of 8 GPUs.

    The programs are MemMC-MAE's step and its scoring of 16 images. They are lowered for GPUs, not compiled."""
    out: dict[str, list[int]] = {"train": [], "score": []}
    config, _ = small_system(name="memmc_mae")
    for count in (1, 8):
        mesh = sharding.device_mesh(1, jax.devices()[:count])
        with tracing_for(H200), without_cudnn():
            system = load_system(config)
            state, inputs, step = plan.step_of(config, system.stages[0], 0, {}, mesh, 16)
            results = {"train": plan.result_of(config, system.stages[0], 0, {})}
            keys = jax.eval_shape(lambda: seeds_of(config))
            _, trace = plan.pass_of(config, system, mesh, results, keys)
            programs = {"train": step.trace(state, *inputs), "score": trace(system.masks)}
        for name, traced in programs.items():
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            calls = "".join(line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line)
            out[name].append(max(map(int, re.findall(r"tensor<(\d+)x\d+x(?:bf16|f32)>", calls))))
    return out


if __name__ == "__main__":
    assert jax.device_count() == 8
    sharding.SPLIT_FROM = 256  # numbers: the networks are small
    run, volumes, manifest, *given = sys.argv[1:]
    code = exit_code(train.main, given)
    wrong = exit_code(train.main, [*given, "--config.pretrain.batch=12", f"--workdir={run}-12"])
    code += exit_code(train.main, arguments(Path(manifest), Path(volumes), *EIGHT, "fsdp=4", "steps_per_dispatch=2"))
    uneven = exit_code(train.main, [*given, "--config.fsdp=3", f"--workdir={run}-3"])
    mapped = mapped_against_jitted(*small_system("pretrain.augment=false", "adapt.augment=false"), batch)
    mapped |= mapped_against_jitted(*small_system(name="maemi"), crops)
    for title, name, *changes in (
        ("anomalies", "ppii"),
        ("levels", "memmc_mae"),
        ("report", "simsid", "variant=report"),
        ("official", "simsid", "variant=official"),
    ):
        found = mapped_against_jitted(*small_system(*changes, name=name), small)
        mapped |= {f"{title} {stage}": both for stage, both in found.items()}
    said = {"code": code, "indivisible": wrong, "uneven": uneven, "mapped": mapped, "bytes": bytes_of_states()}
    print(json.dumps(said | {"exchanged": exchanged(), "kernels": rows_of_kernels()}))
