"""python -m jmae.plan --config configs/NAME.py[:PRESET] --target TARGET [--config.KEY=VALUE ...] [--stage NAME]
                    [--batch N] [--largest] [--scoring] [--volume 273x406x105] [--json FILE] [--debug]

Says whether a system trains, and scores, on accelerators that this machine may lack, how fast it can be at most, and
what limits it. The accelerator's own compiler compiles each stage's step from the shapes of arrays alone. TARGET:

    h200:1, h100:8, a100:16, b200:8   NVIDIA GPUs, more than 8 of them in hosts of 8 (pip install 'jmae[plan-gpu]')
    h100:1x32x8                       32 hosts of 8
    v5e:4x4, v6e:16x16, v5p:2x2x4     TPUs and their torus (pip install 'jmae[plan]')

The global batch is the recipe's batch times the number of chips, or --batch; both mesh axes split it. The recipe's
`fsdp` is the number of chips that share a parameter. Memory counts the images of one batch. Volumes that a recipe keeps
on the device (data.crops_on) need 4 bytes a voxel and channel more.

--largest also searches for the largest batch that fits: a line through two batches estimates it, and one more
compilation confirms it. --scoring plans the scoring on one host instead. For images this is one pass with all masks of
a batch, for volumes the sweep over one volume of --volume voxels. At a paper's size a compilation takes one to three
minutes.

Numbers marked [compiled] are read from the compiler's program, numbers marked [traced] from JAX's program. Numbers
marked [estimated] follow from the stated rates, which no program reaches. On GPUs kernels run one after the other, and
each takes the time of its products or of its memory traffic, whichever is longer. On TPUs a step takes the time of all
products or of all memory traffic, whichever is longer. The time of the network is added. Two things are missing for
GPUs, since they happen on the card alone: the choice among kernels by trial, and the memory of cuDNN's workspaces.
Exit codes: 0 all stages fit; 1 a stage does not fit; 2 the input or the environment is wrong.
"""

import importlib.util
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jmae import recipe
from jmae.chips import CHIPS, Machine, devices_of, first_line, target_of
from jmae.errors import InputError, exit_code
from jmae.fitting import shapes
from jmae.gpus import without_cudnn
from jmae.hlo import Program, Work
from jmae.passes import padded_origins, scoring_batch, scoring_program, seeds_of, sweep_program
from jmae.programs import compiled_step, places, steps_of_dispatch
from jmae.reconstruct import fitting
from jmae.run_folder import log, write_text
from jmae.sharding import device_mesh, replicated, sharded, split
from jmae.system import Stage, State, Sweep, System, load_system, stage_keys, trained_shape
from jmae.target import tracing_for
from jmae.waiting import at_work

ROWS = 1000  # of an assumed manifest; they size what a stage stores for each row (AMAE's margins), and the schedule
USABLE = 0.75  # share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
LAUNCH = 2e-6  # least time between the launches of two kernels on a GPU, in seconds
PASS = 0.8  # share of what JAX takes that scoring gives the temporary arrays of a pass (`reconstruct.device_bytes`)
PACKAGES = ("jmae", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@at_work("planning")
def main(argv: list[str]) -> int:
    wishes = {word for word in argv if word in ("--largest", "--scoring")}
    rest = [word for word in argv if word not in wishes]
    if valued := [word for word in rest if word.startswith(("--largest=", "--scoring="))]:
        raise InputError(f"{valued[0]}: this flag has no value: write {valued[0].partition('=')[0]}")
    config, flags = recipe.parse(rest, __doc__, ["target", "stage", "batch", "largest", "scoring", "volume", "json"])
    if "target" not in flags:
        raise InputError(f"no target: write --target=h200:1, or another of {', '.join(CHIPS)}")
    machine = target_of(flags["target"])
    batch = recipe.typed("batch", flags["batch"], 1) if "batch" in flags else None
    if batch is not None and batch < 1:
        raise InputError(f"--batch={batch}: write 1 or more")
    if "json" in flags and Path(flags["json"]).is_dir():
        raise InputError(f"--json={flags['json']} is a folder: name a file")
    if "--scoring" in wishes:
        if others := [name for name in ("stage", "batch") if name in flags] + ["largest"] * ("--largest" in wishes):
            raise InputError(f"--{others[0]} is for training: leave it out, or leave out --scoring")
        found = [scoring(config, machine, volume=volume_of(flags.get("volume", "")))]
    else:
        if "volume" in flags:
            raise InputError("--volume is for scoring: leave it out, or add --scoring")
        found = plan(config, machine, stage=flags.get("stage", ""), batch=batch, largest="--largest" in wishes)
    print("\n".join(line for each in found for line in report(machine, each)))
    if "json" in flags:
        content = {"command": command(argv), "versions": versions(), "target": flags["target"], "stages": found}
        write_text(Path(flags["json"]), json.dumps(content, indent=1) + "\n")
    return 0 if all(each["fits"] for each in found) else 1


def command(argv: Sequence[str]) -> str:
    """The command line that makes a plan."""
    return " ".join(["python -m jmae.plan", *argv])


def versions() -> dict[str, str]:
    """Versions of the installed packages that a plan depends on."""
    return {name: version(name) for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))}


def volume_of(text: str) -> tuple[int, ...]:
    """(273, 406, 105) for "273x406x105"; () for an empty text."""
    if text and not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", text):
        raise InputError(f"--volume={text} is no size: write --volume=273x406x105 (voxels)")
    return tuple(int(n) for n in text.split("x")) if text else ()


# --- the plan of a system ---------------------------------------------------------------------------------------------


def plan(
    config: ConfigDict, machine: Machine, *, stage: str = "", batch: int | None = None, largest: bool = False
) -> list[dict[str, Any]]:
    """What each stage, or `stage` alone, needs on a machine, and how fast its step can be at most.

    `report` prints it. Raises InputError where the recipe or the machine is wrong (`load_system`, `devices_of`), where
    the chips do not divide the batch, and where the recipe's `fsdp` does not divide the chips.
    """
    devices = prepare(config, machine)
    fsdp = config.get("fsdp", 1)
    mesh = device_mesh(fsdp, devices)
    results: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    known: dict[Any, dict[str, Any]] = {}
    with tracing_for(machine.target), without_cudnn():
        system = load_system(config)
        names = [each.name for each in system.stages]
        if stage and stage not in names:
            raise InputError(f"stage {stage!r} is unknown: one of {', '.join(names)}")
        for number, each in enumerate(system.stages):
            before = dict(results)
            results[each.name] = result_of(config, each, number, results)
            if stage not in ("", each.name):
                continue
            size = batch or each.batch * mesh.size
            head = {"system": config.system, "stage": each.name, "chips": mesh.size, "fsdp": fsdp, "batch": size}
            head["steps_of_dispatch"] = steps_of_dispatch(config, each, size / mesh.size)
            for phase in dict.fromkeys(each.phases):
                at = partial(plan_of_batch, config, machine, mesh, each, number, before, phase)
                if (each.step, phase) not in known:  # AMAE's modules share one step
                    log(f"stage {each.name}: compiling for {machine.name}, a minute or more at a paper's size")
                    known[each.step, phase] = at(size)
                    if largest:
                        unit = mesh.size * each.parts
                        more = largest_batch(at, size, unit, known[each.step, phase])
                        known[each.step, phase] |= {"largest": more}
                share = each.phases.count(phase) / len(each.phases)
                own = {"phase": str(phase), "share": share} if share < 1 else {}
                found.append(head | {"batch_from": "--batch" if batch else "recipe"} | own | known[each.step, phase])
    return found


def prepare(config: ConfigDict, machine: Machine) -> Sequence[Any]:
    """The machine's devices. A recipe with dtype "auto" gets bfloat16. JAX uses no accelerator of this machine."""
    jax.config.update("jax_platforms", "cpu")
    if config.get("model", {}).get("dtype") == "auto":
        config.model.dtype = "bfloat16"
    return devices_of(machine)


def state_of(config: ConfigDict, stage: Stage, number: int, results: PyTree) -> State:
    """The shapes of a stage's state."""
    init = lambda key, results: stage.init(key, results, ROWS)
    keys = jax.eval_shape(partial(stage_keys, config, number))
    return jax.eval_shape(init if config.replicates == 1 else jax.vmap(init), keys, results)


def result_of(config: ConfigDict, stage: Stage, number: int, results: PyTree) -> PyTree:
    """The shapes of a stage's result, which later stages and the score use."""
    return jax.eval_shape(stage.result, state_of(config, stage, number, results))


def step_of(
    config: ConfigDict,
    stage: Stage,
    number: int,
    results: PyTree,
    mesh: Mesh,
    batch: int | None,
    phase: Any = None,
) -> tuple[State, tuple[PyTree, Any, PyTree], Any]:
    """(state, (batch, keys, results), jitted step) of a stage on a mesh, as shapes with shardings.

    The step is that of `phase`, one of the stage's phases; None is the first phase. Raises InputError where the chips
    do not divide the batch.
    """
    n, steps = config.replicates, stage.steps(ROWS)
    size = batch or stage.batch * mesh.size
    if size % (mesh.size * stage.parts):
        parts = f" times {stage.parts} parts (accumulate)" if stage.parts > 1 else ""
        raise InputError(f"a batch of {size} is not divisible by {mesh.size} chips{parts}: write a multiple as --batch")
    keys = jax.eval_shape(partial(stage_keys, config, number))
    state = state_of(config, stage, number, results)
    image = trained_shape(config, stage)
    arrays = {"image": (image, jnp.float32), "index": ((), jnp.int32), "case": ((2,), jnp.uint32)}
    for name, make in stage.host_arrays.items():
        array = np.asarray(make(np.linspace(0, 1, math.prod(image), dtype=np.float32).reshape(image)))
        arrays[name] = (array.shape, array.dtype)
    lead = (size,) if n == 1 else (n, size)
    shapes = {name: jax.ShapeDtypeStruct((*lead, *shape), dtype) for name, (shape, dtype) in arrays.items()}
    put = lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    over = split(mesh, len(lead) - 1)
    earlier = jax.tree.map(put, results, sharded(mesh, results))
    inputs = jax.tree.map(lambda s: put(s, over), shapes), put(keys, replicated(mesh)), earlier
    step = compiled_step(stage.step, steps, n, (), mesh, stage.phases[0] if phase is None else phase)
    return jax.tree.map(put, state, places(state, mesh)), inputs, step


def plan_of_batch(
    config: ConfigDict,
    machine: Machine,
    mesh: Mesh,
    stage: Stage,
    number: int,
    results: PyTree,
    phase: Any,
    batch: int,
) -> dict[str, Any]:
    """The plan of a stage's step for one batch size."""
    return plan_of_step(machine, mesh, *step_of(config, stage, number, results, mesh, batch, phase))


def plan_of_step(
    machine: Machine, mesh: Mesh, state: State, inputs: tuple[PyTree, Any, PyTree], jitted: Any
) -> dict[str, Any]:
    """Memory, work, network and time of a step."""
    traced = jitted.trace(state, *inputs, None)
    arguments = {
        "parameters": chip_bytes(state.params),
        "optimiser": chip_bytes(state.opt),
        "frozen weights and statistics": chip_bytes((inputs[2], state.stats)),
        "batch": chip_bytes(inputs[0]),
    }
    work = products(traced.jaxpr.jaxpr, machine.chip.platform)
    out: dict[str, Any] = {"flops": sum(work.values()), "flops_chip": sum(work.values()) / mesh.size}
    traced_s = seconds_of(machine, Work(sum(n for b, n in work.items() if b < 4), work[4] + work[8])) / mesh.size
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        need = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if not need:
            raise InputError(f"this step cannot be compiled for {machine.name}: {first_line(error)}") from error
        total, limit = (
            float(n) * 2.0 ** (10 * (1 + "KMGT".index(unit)))
            for n, unit in zip(need.groups()[::2], need.groups()[1::2], strict=True)
        )
        out |= {"memory": arguments, "fits": False, "total": total, "limit": limit, "compute_s": traced_s}
        return out
    return out | needs_of(machine, mesh, compiled, arguments, None if machine.gpus else traced_s)


def needs_of(
    machine: Machine, mesh: Mesh, compiled: Any, arguments: Mapping[str, int], compute_s: float | None
) -> dict[str, Any]:
    """The memory, work and network traffic of a compiled program, and its estimated time.

    Args:
        arguments: bytes of the program's inputs by name.
        compute_s: seconds of the products. None counts the products in the program. This is not possible for TPUs,
            because XLA writes their convolutions in many forms.
    """
    chip, sizes = machine.chip, compiled.memory_analysis()
    limit = memory_limit(machine)
    memory = dict(arguments)
    memory["temporary arrays"] = sizes.temp_size_in_bytes
    memory["program"] = sizes.generated_code_size_in_bytes
    memory["padding and metrics"] = max(0, sizes.argument_size_in_bytes - sum(arguments.values())) + max(
        0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )
    program = Program(compiled.as_text(), mesh.size)
    network, work, traffic = program.collectives(), program.work(), program.traffic()
    cost = compiled.cost_analysis() or {}
    out: dict[str, Any] = {
        "memory": memory,
        "limit": limit,
        "fits": not machine.gpus or sum(memory.values()) <= limit,  # libtpu compiles only what fits
        "total": sum(memory.values()),
        "flops_compiler": cost.get("flops"),
        "traffic_chip": traffic,
        "sent_chip": sum(c.sent for c in network),
        "collectives": [
            {"kind": c.kind, "chips": len(c.group), "count": c.times, "bytes": c.size, "sent": c.sent} for c in network
        ],
        "loops_unknown": program.unknown,
        "compute_s": seconds_of(machine, work) if compute_s is None else compute_s,
        "memory_s": traffic / chip.bandwidth,
        "network_s": sum(c.sent / machine.sending(c.group) for c in network),
    }
    if not machine.gpus:
        return out | step_times(out["compute_s"], out["memory_s"], out["network_s"])
    launches = program.launches()
    kernels_s = program.seconds(chip.usable, chip.usable * chip.float32, chip.bandwidth)
    out |= {
        "flops_compiled_chip": work._asdict(),
        "float32_most_chip": max((k.times * k.work.float32 for k in program.kernels()), default=0.0),  # of one kernel
        "kernels": launches,
        "custom_calls": dict(program.custom_calls()),
        "padding_chip": program.padding(),
        "kernels_s": kernels_s,
        "launches_s": launches * LAUNCH,
        "peak_share": out["compute_s"] / kernels_s,
        "rate": chip.usable,
    }
    return out | step_times(out["compute_s"], out["memory_s"], out["network_s"], kernels_s, out["launches_s"])


def seconds_of(machine: Machine, work: Work) -> float:
    """The seconds of the products alone."""
    chip = machine.chip
    return work.low / chip.usable + work.float32 / (chip.usable * chip.float32)


def memory_limit(machine: Machine) -> float:
    """The bytes of a chip's memory that JAX takes."""
    return machine.chip.memory * (USABLE if machine.gpus else 1)


def step_times(
    compute_s: float, memory_s: float, network_s: float, kernels_s: float = 0, launches_s: float = 0
) -> dict[str, Any]:
    """The time of a step, its efficiency against one chip alone, and the longest part.

    The local work of a chip takes as long as the longest of its products, its memory traffic, its kernels one after the
    other, and their launches, which run ahead of the kernels. In `step_s` the network follows the local work, in
    `step_least_s` it runs at the same time.
    """
    local = max(compute_s, memory_s, kernels_s, launches_s)
    parts = {"compute": compute_s, "memory": memory_s, "network": network_s}
    if launches_s > max(kernels_s, network_s):
        parts = {"launches": launches_s}
    return {
        "step_s": local + network_s,
        "step_least_s": max(local, network_s),
        "efficiency": local / (local + network_s),
        "limited_by": max(parts, key=lambda name: parts[name]),
    }


def largest_batch(at: Callable[[int], dict[str, Any]], base: int, unit: int, found: dict[str, Any]) -> dict[str, Any]:
    """The largest batch that fits. It is a multiple of `unit`, and of 8 units from 64 units on.

    `found` is the plan of the batch `base`. A line through the memory of two batches gives an estimate, and `at`
    compiles the estimate to confirm it. If it does not fit, a line through its memory gives the next one; there are at
    most three. Raises InputError where the memory does not grow with the batch.
    """
    limit = found["limit"]
    whole = lambda b: int(b // (unit * 8) * unit * 8 if b >= 64 * unit else b // unit * unit)
    other = 2 * base if found["fits"] else max(unit, whole(base / 2))
    if other == base:
        return {"batch": 0, "total": found["total"], "tried": [base]}
    points = [(base, found["total"]), (other, at(other)["total"])]
    tried = [base, other]
    for _ in range(3):
        (b0, m0), (b1, m1) = points[0], points[-1]
        slope = (m1 - m0) / (b1 - b0)
        if slope <= 0:
            raise InputError(
                f"memory does not grow from a batch of {b0} to one of {b1}: the largest batch cannot be estimated"
            )
        estimate = whole(b0 + (limit - m0) / slope)
        if estimate < unit:
            return {"batch": 0, "total": m0, "tried": tried}
        log(f"batch {estimate}: compiling to confirm it")
        result = at(estimate)
        tried.append(estimate)
        if result["fits"]:
            return {"batch": estimate, "total": result["total"], "tried": tried}
        points.append((estimate, result["total"]))
    return {"batch": None, "total": points[-1][1], "tried": tried}


# --- scoring ----------------------------------------------------------------------------------------------------------


def scoring(config: ConfigDict, machine: Machine, *, volume: tuple[int, ...] = ()) -> dict[str, Any]:
    """What scoring needs on one host of a machine.

    For images it is one pass with all masks of a batch, for volumes the sweep over one volume of `volume` voxels. As in
    an evaluation, the program processes as many masks or windows at a time as fit into the memory. Raises InputError
    where `volume` does not fit the recipe.
    """
    every = prepare(config, machine)
    devices = [device for device in every if device.process_index == every[0].process_index]
    mesh = device_mesh(1, devices)
    place = lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated(mesh))
    with tracing_for(machine.target), without_cudnn():
        system = load_system(config)
        if system.sweep and len(volume) != len(system.sweep.window):
            raise InputError(f"{config.system} scores volumes: name a size, such as --volume=273x406x105 (voxels)")
        if volume and not system.sweep:
            raise InputError(f"{config.system} with this recipe scores images: leave out --volume")
        every_result: dict[str, Any] = {}
        for number, stage in enumerate(system.stages):
            every_result[stage.name] = result_of(config, stage, number, every_result)
        used = {name: every_result[name] for name in system.uses}
        results = jax.tree.map(place, used | shapes(config, system, used))
        keys = place(jax.eval_shape(partial(seeds_of, config)))
        if system.sweep:
            most, what = config.evaluation.batch, "windows"
            batch, trace = sweep_of(config, system.sweep, mesh, volume, results, keys)
        else:
            most, what = config.evaluation.get("chunk") or system.masks, "masks"
            batch, trace = pass_of(config, system, mesh, results, keys)
        log(f"scoring: compiling for {machine.name}, a minute or more at a paper's size")
        arguments = {"weights": chip_bytes(results), "batch": chip_bytes(batch)}
        room = PASS * (memory_limit(machine) - arguments["weights"])
        compiled, chunk = fitting(lambda chunk: trace(chunk).lower(), most, limit=int(room))
        out = needs_of(machine, mesh, compiled, arguments, None)
    size = 1 if system.sweep else -(-config.evaluation.batch // mesh.size) * mesh.size
    head = {"system": config.system, "stage": "scoring", "chips": mesh.size, "fsdp": 1, "batch": size}
    case = {"volume": volume} if system.sweep else {}
    flops = (out["flops_compiled_chip"]["low"] + out["flops_compiled_chip"]["float32"]) if machine.gpus else 0.0
    work = {"flops": flops * mesh.size, "flops_chip": flops}
    return head | case | {"batch_from": "recipe", "at_once": chunk, "at_once_of": most, "what": what} | work | out


def pass_of(
    config: ConfigDict, system: System, mesh: Mesh, results: PyTree, keys: Any
) -> tuple[PyTree, Callable[[int], Any]]:
    """(shapes of a batch of images, function that traces the fused pass for a number of masks at a time)."""
    batch = scoring_batch(config, -(-config.evaluation.batch // mesh.size) * mesh.size, mesh)
    program = scoring_program(system, mesh)
    return batch, lambda chunk: program.trace(results, batch, keys, chunk)


def sweep_of(
    config: ConfigDict, sweep: Sweep, mesh: Mesh, volume: tuple[int, ...], results: PyTree, keys: Any
) -> tuple[PyTree, Callable[[int], Any]]:
    """(shapes of a volume with its windows, function that traces the sweep for a number of windows at a time).

    The number of windows is a constant of this program, so that its loop has a known length. In an evaluation this
    number is an argument.
    """
    tiling = sweep.tile(volume, sweep.window, sweep.stride)
    array = tuple(n + low + high for n, (low, high) in zip(volume, tiling.pad, strict=True))
    shapes = {
        "array": jax.ShapeDtypeStruct((*array, config.data.channels), jnp.float32),
        "origins": jax.eval_shape(lambda: jnp.asarray(padded_origins(tiling.origins))),
        "coverage": tuple(jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in tiling.coverage),
        "words": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    case = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated(mesh)), shapes)
    program = sweep_program(sweep, mesh)
    size, number, repeats = np.array(tiling.size, np.int32), np.int32(len(tiling.origins)), np.int32(sweep.repeats)

    def trace(batch: int) -> Any:
        def score(results, case, keys):
            windows = (case["origins"], number, case["coverage"], case["words"], repeats)
            return program(results, case["array"], size, *windows, keys, batch)

        return jax.jit(score).trace(results, case, keys)

    return case, trace


def chip_bytes(tree: PyTree) -> int:
    """The bytes on one chip of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Operations that do not change a number. (Gradients store the platform's index beside the results of the branches.)
SAME = "copy convert_element_type reshape squeeze broadcast_in_dim slice dynamic_slice reduce_precision name".split()
ATTENTION = {"dot_product_attention_fwd_wrapper": 4, "dot_product_attention_bwd_wrapper": 10}  # FLOPs: x b h n m d


def products(jaxpr: Any, platform: str) -> Counter[int]:
    """FLOPs of all matrix products, convolutions and cuDNN attentions of a traced program.

    They are sorted by the bytes of one number of the inputs. A multiply-add counts as two. A loop's body counts as
    often as it runs, but the body of `while` once. Of several branches the branch of the platform counts, else the
    longest.
    """
    return traced_work(jaxpr, platform, [None] * len(jaxpr.invars))[0]


def traced_work(jaxpr: Any, platform: str, inputs: Sequence[Any]) -> tuple[Counter[int], list[Any]]:
    """(FLOPs, platforms of each output) of a program; `inputs` has the platforms of each input.

    The platforms of a `platform_index` are the tuple from which it chooses. Any other array has None.
    """
    total: Counter[int] = Counter()
    chosen: dict[Any, tuple | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda var: None if hasattr(var, "val") else chosen.get(var)
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        outs: Sequence[Any] = ()
        if name == "platform_index":
            outs = [params["platforms"]]
        elif name in SAME:
            outs = [of(eqn.invars[0])]
        elif name == "optimization_barrier":
            outs = [of(var) for var in eqn.invars]
        elif name == "dot_general":
            shape, ((axes, _), _) = eqn.invars[0].aval.shape, params["dimension_numbers"]
            depth = math.prod(shape[axis] for axis in axes)
            total[eqn.invars[0].aval.dtype.itemsize] += 2 * depth * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            depth = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            dilation = math.prod(params["lhs_dilation"])  # zeros between the inputs cause no work
            total[kernel.dtype.itemsize] += round(2 * depth * eqn.outvars[0].aval.size / dilation)
        elif name in ATTENTION:
            queries, keys = eqn.invars[0].aval, eqn.invars[1].aval  # (b, n, h, d), or (b, h, n, d)
            total[queries.dtype.itemsize] += ATTENTION[name] * queries.size * keys.shape[2 if params["layout"] else 1]
        elif name == "cond":
            inputs = [of(var) for var in eqn.invars[1:]]
            parts = [traced_work(branch.jaxpr, platform, inputs) for branch in params["branches"]]
            if (platforms := of(eqn.invars[0])) is not None:
                parts = [parts[i] for i, names in enumerate(platforms) if names is None or platform in names][:1]
            flops, outs = max(parts, key=lambda part: part[0].total())
            total += flops
        else:
            times = params["length"] if name == "scan" else 1
            subs = list(inner(params))
            inputs = [of(var) for var in eqn.invars]
            for sub in subs:
                # The program of a loop or a call has all inputs of the equation; the two programs of `while` have some.
                same = len(sub.invars) == len(inputs)
                flops, outs = traced_work(sub, platform, inputs if same else [None] * len(sub.invars))
                for size, n in flops.items():
                    total[size] += times * n
            if len(subs) != 1:
                outs = ()
        if len(outs) == len(eqn.outvars):
            chosen |= dict(zip(eqn.outvars, outs, strict=True))
    return total, [of(var) for var in jaxpr.outvars]


def inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


# --- what is printed --------------------------------------------------------------------------------------------------


def report(machine: Machine, found: dict[str, Any]) -> list[str]:
    """The printed lines of the plan of a stage or of scoring."""
    # One function of 60 lines and more: it reads in the order of the printed lines.
    gpus, n, data = machine.gpus, found["chips"], found["chips"] // found["fsdp"]
    gb = lambda size: f"{size / 1e9:.3g}"
    ms = lambda seconds: f"{1e3 * seconds:.3g}"
    whose = "--batch" if found["batch_from"] == "--batch" else "the recipe's on each"
    memory = ", ".join(f"{name} {gb(size)}" for name, size in found["memory"].items() if size >= 1e6)
    many = found.get("steps_of_dispatch", 1)
    dispatch = f"; the host starts {many} steps at once" if many > 1 else ""
    what = f"stage {found['stage']}" if found["stage"] != "scoring" else "scoring"
    if "phase" in found:
        what += f" (phase {found['phase']}, {found['share']:.0%} of the steps)"
    batch = f"global batch {found['batch']} ({whose})"
    if found["stage"] == "scoring":
        batch = f"{found['at_once']} of {found['at_once_of']} {found['what']} at a time, "
        size = "x".join(map(str, found.get("volume", ())))
        batch += f"one volume of {size}" if size else f"{found['batch']} images"
    limit = f"{gb(found['limit'])} GB a chip [compiled]"
    if gpus:
        limit = f"{gb(found['limit'])} GB, {USABLE:.0%} of a chip's as JAX takes [compiled, without cuDNN's workspaces]"
    lines = [
        f"{found['system']}, {what}, on {n} {machine.name} ({machine.words}), data {data} x fsdp {found['fsdp']}, "
        f"{batch}",
        f"  fits         {'yes' if found['fits'] else 'NO'}: {gb(found['total'])} of {limit}",
        f"  memory       {memory} GB a chip [compiled]",
    ]
    if found["stage"] != "scoring":
        lines.append(
            f"  work         {found['flops'] / 1e12:.4g} TFLOP a step, {found['flops_chip'] / 1e12:.4g} a chip [traced]"
        )
    if "step_s" not in found:
        return [
            *lines,
            "  smaller      --config.model.remat=true, a smaller --batch, --config.fsdp, --config.accumulate (which "
            "sums gradients over the chips once a part)",
            peaks(machine),
        ]
    if found["flops_compiler"]:
        lines[-1] += f"; the compiler counts {found['flops_compiler'] / 1e12:.4g}, a loop's body once"
    lines += kernel_lines(found) if gpus else []
    parts = ", ".join(
        f"{c['count']} {c['kind']} of {gb(c['bytes'])} GB over {c['chips']}" for c in found["collectives"]
    )
    lines.append(f"  network      a chip sends {gb(found['sent_chip'])} GB a step: {parts or 'nothing'} [compiled]")
    alone = f"products {ms(found['compute_s'])} ms, memory {ms(found['memory_s'])} ({gb(found['traffic_chip'])} GB)"
    if gpus:
        lines += [
            f"  time         kernels one after the other {ms(found['kernels_s'])} ms; {alone}; network "
            f"{ms(found['network_s'])} ms [estimated]",
            f"  launches     {ms(found['launches_s'])} ms beside them, at {1e6 * LAUNCH:g} us each{dispatch} "
            "[estimated]",
            f"  peak         at most {found['peak_share']:.0%} of {found['rate'] / 1e12:.4g} TFLOP/s [estimated]",
        ]
    else:
        lines.append(f"  time         {alone}, network {ms(found['network_s'])} ms [estimated]")
    unit = "samples" if found["stage"] != "scoring" else "volumes" if "volume" in found else "images"
    lines += [
        f"  step         {ms(found['step_least_s'])} (network beside the rest) to {ms(found['step_s'])} ms (after it): "
        f"at most {found['batch'] / found['step_least_s']:.3g} {unit} a second [estimated]",
        f"  efficiency   {found['efficiency']:.0%} of one chip's speed, with the network after the rest; limited by "
        f"{found['limited_by']} [estimated]",
    ]
    if "largest" in found:
        lines.append(largest_line(found["largest"], gb(found["limit"])))
    if found["loops_unknown"]:
        lines.append(f"  note         {found['loops_unknown']} loops of unknown length are counted once")
    return [*lines, peaks(machine)]


def kernel_lines(found: dict[str, Any]) -> list[str]:
    """The lines on the compiled program of a GPU."""
    low, float32 = (found["flops_compiled_chip"][name] for name in ("low", "float32"))
    calls = ", ".join(f"{n} {name}" for name, n in found["custom_calls"].items())
    padding = found["padding_chip"] / max(1, found["traffic_chip"])
    return [
        f"  products     {(low + float32) / 1e12:.4g} TFLOP a chip, {float32 / max(1, low + float32):.1%} of them with "
        "float32 inputs [compiled]",
        f"  kernels      {found['kernels']} a chip, {padding:.1%} of the traffic is padding [compiled, the card may "
        "choose others by trial]",
        f"  calls        {calls or 'none'} [compiled]",
    ]


def largest_line(found: dict[str, Any], limit: str) -> str:
    """The line on the largest batch."""
    tried = ", ".join(map(str, found["tried"]))
    if found["batch"]:
        return f"  largest      batch {found['batch']}: {found['total'] / 1e9:.3g} of {limit} GB [compiled: {tried}]"
    if found["batch"] == 0:
        return f"  largest      none fits in {limit} GB [compiled: {tried}; the rest estimated]"
    return f"  largest      not found: the memory does not follow a line [compiled: {tried}]"


def peaks(machine: Machine) -> str:
    """The line on the rates that the estimates use."""
    chip = machine.chip
    links = f"{chip.ports} link{'s' * (chip.ports > 1)} of {chip.link / 1e9:.4g} GB/s each way"
    if machine.gpus and machine.shape[0] > 1:
        links += f", between hosts of {machine.shape[1]} {chip.between / 1e9:.4g}"
    rate = f"{chip.flops / 1e12:.4g} TFLOP/s in bfloat16"
    if chip.measured:
        rate += f" nominal, {chip.measured / 1e12:.4g} measured on an H200: times are estimated with it"
    return f"  rates        {rate}; {chip.bandwidth / 1e9:.4g} GB/s; {links} ({chip.source})"


if __name__ == "__main__":
    code = exit_code(main)
    sys.stdout.flush()
    os._exit(code)  # the threads of an interrupted compilation run on, and may crash when the interpreter ends
