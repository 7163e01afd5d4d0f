"""python -m jmae.plan --config configs/NAME.py[:PRESET] --target TARGET [--config.KEY=VALUE ...]
                    [--stage NAME] [--batch N] [--json FILE] [--debug]

Whether the training of a system fits on accelerators that are not at hand, how fast it can be there at most, and what
limits it. Each stage's step is compiled ahead of time, with shapes alone. TARGET:

    v5e:4x4, v6e:16x16, v5p:2x2x4   TPUs: compiled for them by libtpu (pip install 'jmae[plan]'), no TPU is needed
    h100:8, h200:16, a100:8         so many GPUs. There is no compiler for them without one: the same sharded program is
                                    compiled for as many virtual CPU devices, and what depends on that is "estimated"

The global batch is the recipe's batch on every chip (batches are split over both mesh axes), or --batch. As many
chips as the recipe's `fsdp` hold a parameter's parts. Images are the batch's; a set of volumes that is kept on the
device (data.crops_on) comes on top: 4 bytes a voxel and channel.

Predicted time is that of the stated peak figures, which no program reaches: products at the peak rate, what the program
reads and writes at the memory's, what a chip sends at the network's.
Exit codes: 0 fits; 1 a stage does not; 2 the input or the environment is wrong.
"""

import importlib.util
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jmae import recipe
from jmae.errors import InputError, exit_code
from jmae.hlo import Program
from jmae.run_folder import log, write_text
from jmae.sharding import device_mesh, replicated, split
from jmae.system import Stage, State, load_system, stage_keys
from jmae.target import Target, tracing_for
from jmae.train import compiled_step, places

ROWS = 1000  # of a made-up manifest: sizes what a stage keeps of each row (AMAE's margins), and the schedule


class Chip(NamedTuple):
    """Peak figures of one chip, as its maker states them."""

    platform: str  # what programs for it are compiled for
    flops: float  # a second, dense, bfloat16
    float32: float  # share of it that float32 products reach as JAX does them (TPU: one bfloat16 pass; GPU: TF32)
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes a second
    ports: int  # TPU: links to neighbours in the torus; GPU: one link to all of a host
    link: float  # bytes a second of a port, one way
    whole: int  # TPU: an axis of a multiple of so many chips is closed to a ring; GPU: how many a host has
    between: float  # GPU: bytes a second of its port to other hosts, one way
    source: str
    most: int = 0  # TPU: chips of the largest slice
    example: str = ""  # TPU: a machine that has it, as libtpu calls it


TPU, NVIDIA = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
# Ports of TPUs: the stated bandwidth a chip, both ways, over ports and ways. Closed rings: v5e, v6e axes of 16 alone,
# v5p multiples of 4. GPUs: the SXM forms with NVLink, in hosts of 8 with a ConnectX port each (DGX).
CHIPS = {
    "v5e": Chip("tpu", 197e12, 1, 16 * 2**30, 819e9, 4, 50e9, 16, 0, TPU + "v5e", 256, "v5litepod-8"),
    "v5p": Chip("tpu", 459e12, 1, 95 * 2**30, 2765e9, 6, 100e9, 4, 0, TPU + "v5p", 6144, "v5p-8"),
    "v6e": Chip("tpu", 918e12, 1, 32 * 2**30, 1638e9, 4, 100e9, 16, 0, TPU + "v6e", 256, "v6e-8"),
    "a100": Chip("cpu", 312e12, 0.5, 80e9, 2039e9, 1, 300e9, 8, 25e9, NVIDIA + "a100 (80 GB), dgx-a100"),
    "h100": Chip("cpu", 989e12, 0.5, 80e9, 3350e9, 1, 450e9, 8, 50e9, NVIDIA + "h100, dgx-h100"),
    "h200": Chip("cpu", 989e12, 0.5, 141e9, 4800e9, 1, 450e9, 8, 50e9, NVIDIA + "h200, dgx-h200"),
}
USABLE = 0.75  # of a GPU's memory: what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


class Machine(NamedTuple):
    """Chips of one kind, (n,) GPUs or the axes of a torus of TPUs."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    def sending(self, group: Sequence[int]) -> float:
        """Bytes a second that a chip can send to the others of its group in a collective operation, all links busy.

        TPUs: all links of the torus where the group is the whole of it, else those of a ring (both ways), of a pair
        one. GPUs: NVLink, and over hosts the ports of all its GPUs in one host together, if that is less."""
        chip, n = self.chip, len(group)
        if chip.platform == "cpu":
            most = max(Counter(i // chip.whole for i in group).values())
            return chip.link if most == n else min(chip.link, most * chip.between)
        if n < math.prod(self.shape):
            return chip.link * min(n - 1, 2)
        degree = sum(2 if a % chip.whole == 0 else 2 * (a - 1) / a for a in self.shape)
        return chip.link * min(degree, chip.ports)


def main(argv: list[str]) -> int:
    config, flags = recipe.parse(argv, __doc__, ["target", "stage", "batch", "json"])
    if "target" not in flags:
        raise InputError(f"no target: write --target=v5e:4x4, or another of {', '.join(CHIPS)}")
    target = target_of(flags["target"])
    batch = recipe.typed("batch", flags["batch"], 1) if "batch" in flags else None
    if batch is not None and batch < 1:
        raise InputError("--batch is 1 or more")
    if "json" in flags and Path(flags["json"]).is_dir():
        raise InputError(f"--json={flags['json']} is a folder: name a file")
    found = plan(config, target, stage=flags.get("stage", ""), batch=batch)
    print("\n".join(line for each in found for line in report(target, each)))
    if "json" in flags:
        versions = {name: version(name) for name in ("jmae", "jax", "libtpu") if importlib.util.find_spec(name)}
        content = {"command": command(argv), "versions": versions, "target": flags["target"], "stages": found}
        write_text(Path(flags["json"]), json.dumps(content, indent=1) + "\n")
    return 0 if all(each["fits"] for each in found) else 1


def command(argv: Sequence[str]) -> str:
    """The command line that makes a plan."""
    return " ".join(["python -m jmae.plan", *argv])


def target_of(text: str) -> Machine:
    """The target that "v5e:4x4" or "h100:8" names; raises InputError where it names none."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise InputError(
            f"target {text!r} is unknown: did you mean {recipe.nearest(name, list(CHIPS))}? One of {', '.join(CHIPS)}"
        )
    chip = CHIPS[name]
    axes = 1 if chip.platform == "cpu" else chip.ports // 2
    if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * axes), shape):
        example = {1: "8 (GPUs)", 2: "4x4 (the torus)", 3: "2x2x1 (the torus)"}[axes]
        raise InputError(f"target {text!r} does not say how many chips: write {name}:{example}")
    target = Machine(name, tuple(int(n) for n in shape.split("x")))
    if chip.most and math.prod(target.shape) > chip.most:
        raise InputError(f"target {text!r}: there are no slices of more than {chip.most} {name}")
    return target


def devices_of(target: Machine) -> Sequence[Any]:
    """The devices of a target, for which programs can be compiled and on which none runs.

    Raises InputError where libtpu is not there or refuses the torus."""
    count = math.prod(target.shape)
    if target.chip.platform == "cpu":
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # the process has its devices already
            if len(jax.devices("cpu")) < count:
                raise InputError(f"a plan for {count} GPUs needs a process of its own: python -m jmae.plan") from None
        return jax.devices("cpu")[:count]
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"target {target.name} needs libtpu, the TPUs' compiler: pip install 'jmae[plan]'")
    # No TPU is looked for, others may compile or train beside this process, and only what is fatal is said.
    settings = f"""TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost
        TPU_ACCELERATOR_TYPE={target.chip.example} TPU_MIN_LOG_LEVEL=3 TPU_STDERR_LOG_LEVEL=3"""
    for setting in settings.split():
        os.environ.setdefault(*setting.split("="))
    own = {2: "4x4, 8x8, 16x16", 3: "2x2x1, 2x2x4, 4x4x4"}[len(target.shape)]
    name = f"{target.name}:{'x'.join(map(str, target.shape))}"
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise InputError(f"libtpu refuses {name} ({first_line(error)}): use a torus that is made, as {own}") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# --- the plan of a system ---------------------------------------------------------------------------------------------


def plan(config: ConfigDict, target: Machine, *, stage: str = "", batch: int | None = None) -> list[dict[str, Any]]:
    """What each stage (or the one named) needs on a target, and how fast its step can be at most: `report` shows it.

    Raises InputError as `load_system` and `devices_of` do, and where a batch or the recipe's `fsdp` does not divide."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is not taken
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16"
    fsdp = config.get("fsdp", 1)
    devices = devices_of(target)
    mesh = device_mesh(fsdp, devices)
    results: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    known: dict[Any, dict[str, Any]] = {}
    # Networks that have a form of their own for the CPU ask which platform they are traced for.
    with tracing_for(Target("tpu" if target.chip.platform == "tpu" else "cuda", (9, 0), 91000)):
        system = load_system(config)
        names = [each.name for each in system.stages]
        if stage and stage not in names:
            raise InputError(f"stage {stage!r} is unknown: one of {', '.join(names)}")
        for number, each in enumerate(system.stages):
            state, inputs, jitted = step_of(config, each, number, results, mesh, batch)
            results[each.name] = jax.eval_shape(each.result, state)
            if stage in ("", each.name):
                if each.step not in known:  # AMAE's modules share theirs
                    log(f"stage {each.name}: compiling for {target.name}, a minute or more at a paper's size")
                    known[each.step] = planned(target, mesh, jitted, state, *inputs)
                size = batch or each.batch * mesh.size
                head = {"system": config.system, "stage": each.name, "chips": mesh.size, "fsdp": fsdp, "batch": size}
                found.append(head | {"batch_from": "--batch" if batch else "recipe"} | known[each.step])
    return found


def step_of(
    config: ConfigDict, stage: Stage, number: int, results: PyTree, mesh: Mesh, batch: int | None
) -> tuple[State, tuple[PyTree, Any], Any]:
    """(state, (batch, keys), jitted step) of a stage on a mesh: shapes with their places, no numbers."""
    n, steps = config.replicates, stage.steps(ROWS)
    size = batch or stage.batch * mesh.size
    if size % (mesh.size * stage.parts):
        parts = f" times {stage.parts} parts (accumulate)" if stage.parts > 1 else ""
        raise InputError(f"a batch of {size} is not divisible by {mesh.size} chips{parts}: --batch is a multiple")
    init = lambda key, results: stage.init(key, results, ROWS)
    keys = jax.eval_shape(partial(stage_keys, config, number))
    state = jax.eval_shape(init if n == 1 else jax.vmap(init), keys, results)
    image = (*config.data.size, config.data.channels)
    arrays = {"image": (image, jnp.float32), "index": ((), jnp.int32), "case": ((2,), jnp.uint32)}
    for name, make in stage.host.items():
        made = np.asarray(make(np.linspace(0, 1, math.prod(image), dtype=np.float32).reshape(image)))
        arrays[name] = (made.shape, made.dtype)
    lead = (size,) if n == 1 else (n, size)
    shapes = {name: jax.ShapeDtypeStruct((*lead, *shape), dtype) for name, (shape, dtype) in arrays.items()}
    put = lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    over = split(mesh, len(lead) - 1)
    inputs = jax.tree.map(lambda s: put(s, over), shapes), put(keys, replicated(mesh))
    return jax.tree.map(put, state, places(state, mesh)), inputs, compiled_step(stage.step, steps, n, (), mesh)


def planned(target: Machine, mesh: Mesh, jitted: Any, state: State, batch: PyTree, keys: Any) -> dict[str, Any]:
    """Memory, work, network and time of a step."""
    chip, chips = target.chip, mesh.size
    traced = jitted.trace(state, batch, keys, None)
    work = products(traced.jaxpr.jaxpr, chip.platform)
    memory = {
        "parameters": held(state.params),
        "optimiser": held(state.opt),
        "frozen weights and statistics": held((state.frozen, state.stats)),
        "batch": held(batch),
    }
    compute = sum(n / (chip.flops * (1 if itemsize < 4 else chip.float32)) for itemsize, n in work.items()) / chips
    out: dict[str, Any] = {"memory": memory, "flops": sum(work.values()), "flops_chip": sum(work.values()) / chips}
    out["limit"] = chip.memory * (USABLE if chip.platform == "cpu" else 1)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        need = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if not need:
            raise InputError(f"this step cannot be compiled for {target.name}: {first_line(error)}") from error
        total, limit = (
            float(n) * 2.0 ** (10 * (1 + "KMGT".index(unit)))
            for n, unit in zip(need.groups()[::2], need.groups()[1::2], strict=True)
        )
        return out | {"fits": False, "total": total, "limit": limit, "compute_s": compute}
    sizes = compiled.memory_analysis()
    memory["gradients and activations"] = sizes.temp_size_in_bytes
    memory["program"] = sizes.generated_code_size_in_bytes
    arguments = sum(list(memory.values())[:4])
    memory["padding and metrics"] = max(0, sizes.argument_size_in_bytes - arguments) + max(
        0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )
    program = Program(compiled.as_text(), chips)
    network = program.collectives()
    bytes_moved = program.traffic()
    network_s = sum(c.sent / target.sending(c.group) for c in network)
    cost = compiled.cost_analysis() or {}
    out |= {
        "fits": chip.platform == "tpu" or sum(memory.values()) <= out["limit"],  # libtpu compiles what fits alone
        "total": sum(memory.values()),
        "flops_compiler": cost.get("flops"),
        "traffic_chip": bytes_moved,
        "sent_chip": sum(c.sent for c in network),
        "collectives": [
            {"kind": c.kind, "chips": len(c.group), "count": c.times, "bytes": c.size, "sent": c.sent} for c in network
        ],
        "loops_unknown": program.unknown,
        "compute_s": compute,
        "memory_s": bytes_moved / chip.bandwidth,
        "network_s": network_s,
    }
    return out | predicted(out["compute_s"], out["memory_s"], out["network_s"])


def predicted(compute_s: float, memory_s: float, network_s: float) -> dict[str, Any]:
    """A step's time where a chip computes while it moves data in its memory: `step_s` with the network after that,
    `step_least_s` with the network beside it; the share of one chip's speed that is left; and the longest part."""
    local = max(compute_s, memory_s)
    parts = {"compute": compute_s, "memory": memory_s, "network": network_s}
    return {
        "step_s": local + network_s,
        "step_least_s": max(local, network_s),
        "efficiency": local / (local + network_s),
        "limited_by": max(parts, key=lambda name: parts[name]),
    }


def held(tree: PyTree) -> int:
    """Bytes of a tree of placed shapes on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def products(jaxpr: Any, platform: str) -> Counter[int]:
    """FLOPs of all matrix products and convolutions of a traced program, two a multiplication, by the bytes of a number
    of their inputs; a loop's body as often as it runs, of branches the longest. (The compiler's own count has a loop's
    body once.)"""
    total: Counter[int] = Counter()
    chosen: dict[Any, tuple] = {}
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "platform_index":
            chosen[eqn.outvars[0]] = params["platforms"]
        elif name == "dot_general":
            shape, ((axes, _), _) = eqn.invars[0].aval.shape, params["dimension_numbers"]
            depth = math.prod(shape[axis] for axis in axes)
            total[eqn.invars[0].aval.dtype.itemsize] += 2 * depth * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            depth = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            apart = math.prod(params["lhs_dilation"])  # zeros between the inputs are no work
            total[kernel.dtype.itemsize] += round(2 * depth * eqn.outvars[0].aval.size / apart)
        elif name == "cond":
            parts = [products(branch.jaxpr, platform) for branch in params["branches"]]
            if (platforms := chosen.get(eqn.invars[0])) is not None:
                own = [i for i, names in enumerate(platforms) if names is None or platform in names]
                parts = [parts[own[0]]]
            longest = max(parts, key=lambda part: part.total())
            total += longest
        else:
            times = params["length"] if name == "scan" else 1
            for sub in inner(params):
                for size, n in products(sub, platform).items():
                    total[size] += times * n
    return total


def inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


# --- what is printed --------------------------------------------------------------------------------------------------


def report(target: Machine, found: dict[str, Any]) -> list[str]:
    """The lines that are printed of a stage's plan."""
    gpu = target.chip.platform == "cpu"
    n, data = found["chips"], found["chips"] // found["fsdp"]
    gb = lambda size: f"{size / 1e9:.3g}"
    ms = lambda seconds: f"{1e3 * seconds:.3g}"
    how = "estimated from the program for CPUs" if gpu else "compiled"
    whose = "--batch" if found["batch_from"] == "--batch" else "the recipe's on each"
    memory = ", ".join(f"{name} {gb(size)}" for name, size in found["memory"].items() if size >= 1e6)
    lines = [
        f"{found['system']}, stage {found['stage']}, on {n} {target.name} ({'x'.join(map(str, target.shape))}), "
        f"data {data} x fsdp {found['fsdp']}, global batch {found['batch']} ({whose})",
        f"  fits         {'yes' if found['fits'] else 'NO'}: {gb(found['total'])} of {gb(found['limit'])} GB a chip "
        f"[{how}]",
        f"  memory       {memory} GB a chip [{'arrays exact, the rest ' if gpu else ''}{how}]",
        f"  work         {found['flops'] / 1e12:.4g} TFLOP a step, {found['flops_chip'] / 1e12:.4g} a chip [traced]",
    ]
    if "step_s" not in found:
        return [
            *lines,
            "  smaller      --config.model.remat=true, a smaller --batch, --config.fsdp, --config.accumulate (which "
            "sums gradients over the chips once a part)",
            peaks(target),
        ]
    if found["flops_compiler"]:
        lines[-1] += f"; the compiler counts {found['flops_compiler'] / 1e12:.4g}, a loop's body once"
    parts = ", ".join(
        f"{c['count']} {c['kind']} of {gb(c['bytes'])} GB over {c['chips']}" for c in found["collectives"]
    )
    lines += [
        f"  network      a chip sends {gb(found['sent_chip'])} GB a step: {parts or 'nothing'} [{how}]",
        f"  time         compute {ms(found['compute_s'])} ms, memory {ms(found['memory_s'])} "
        f"({gb(found['traffic_chip'])} GB), network {ms(found['network_s'])} [estimated at peak figures]",
        f"  step         {ms(found['step_least_s'])} (network beside the rest) to {ms(found['step_s'])} ms (after it): "
        f"at most {found['batch'] / found['step_least_s']:.3g} samples a second",
        f"  efficiency   {found['efficiency']:.0%} of one chip's with the network after the rest; limited by "
        f"{found['limited_by']}",
    ]
    if found["loops_unknown"]:
        lines.append(f"  note         {found['loops_unknown']} loops of unknown length are counted once")
    return [*lines, peaks(target)]


def peaks(target: Machine) -> str:
    chip = target.chip
    links = f"{chip.ports} link{'s' * (chip.ports > 1)} of {chip.link / 1e9:.4g} GB/s each way"
    if chip.between:
        links += f", between hosts of {chip.whole} {chip.between / 1e9:.4g}"
    return (
        f"  peak         {chip.flops / 1e12:.4g} TFLOP/s in bfloat16, {chip.bandwidth / 1e9:.4g} GB/s, {links} "
        f"({chip.source})"
    )


if __name__ == "__main__":
    code = exit_code(main)
    sys.stdout.flush()
    os._exit(code)  # an interrupted compilation runs on in its threads, and ends badly with the interpreter
