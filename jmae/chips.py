"""Accelerators that this machine may lack: peak figures of chips, machines made of them, and devices to compile for.

libtpu compiles for TPUs. XLA's compiler in JAX's CUDA plugin compiles for NVIDIA GPUs. Neither compiler needs the
device.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies

from jmae import recipe
from jmae.errors import InputError
from jmae.gpus import CARDS, description, target_of_card
from jmae.target import Target


class Chip(NamedTuple):
    """Peak figures of one chip, as its maker states them."""

    platform: str  # platform that programs are compiled for, "tpu" or "cuda"
    flops: float  # FLOP/s of dense bfloat16 products
    float32: float  # rate of float32 products, as a share of `flops` (JAX's default. TPU: bfloat16; GPU: TF32)
    memory: float  # bytes
    bandwidth: float  # bytes a second of the memory
    ports: int  # TPU: links to neighbours in the torus; GPU: 1 link to all GPUs of its host
    link: float  # bytes a second through one port, one way
    whole: int  # TPU: an axis is a closed ring if its length is a multiple of this; GPU: GPUs in a host
    between: float  # GPU: bytes a second through its port to other hosts, one way
    source: str
    most: int = 0  # TPU: chips in the largest slice
    example: str = ""  # TPU: libtpu's name of a machine with this chip
    measured: float = 0  # measured FLOP/s of large bfloat16 products; 0 where not measured

    @property
    def usable(self) -> float:
        """FLOP/s for estimates of time: the measured rate, else the stated rate."""
        return self.measured or self.flops


TPU, NVIDIA = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
# A TPU's `link` is the chip's stated bandwidth (both ways) divided by its ports and by 2. Closed rings are axes of 16
# for v5e and v6e, and multiples of 4 for v5p. GPUs are the SXM forms with NVLink, in hosts of 8, and each GPU has a
# ConnectX port (DGX). Figures that NVIDIA states with sparsity are halved. 789 TFLOP/s were measured on an H200; the
# H100 has the same processor.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 1, 16 * 2**30, 819e9, 4, 50e9, 16, 0, TPU + "v5e", 256, "v5litepod-8"),
    "v5p": Chip("tpu", 459e12, 1, 95 * 2**30, 2765e9, 6, 100e9, 4, 0, TPU + "v5p", 6144, "v5p-8"),
    "v6e": Chip("tpu", 918e12, 1, 32 * 2**30, 1638e9, 4, 100e9, 16, 0, TPU + "v6e", 256, "v6e-8"),
    "a100": Chip("cuda", 312e12, 0.5, 80e9, 2039e9, 1, 300e9, 8, 25e9, NVIDIA + "a100 (80 GB), dgx-a100"),
    "h100": Chip("cuda", 989e12, 0.5, 80e9, 3350e9, 1, 450e9, 8, 50e9, NVIDIA + "h100, dgx-h100", measured=789e12),
    "h200": Chip("cuda", 989e12, 0.5, 141e9, 4800e9, 1, 450e9, 8, 50e9, NVIDIA + "h200, dgx-h200", measured=789e12),
    "b200": Chip("cuda", 2250e12, 0.5, 180e9, 8000e9, 1, 900e9, 8, 50e9, NVIDIA + "dgx-b200"),
}


class Machine(NamedTuple):
    """Chips of one kind. `shape` has the axes of a torus of TPUs, or (hosts, GPUs in each host)."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def gpus(self) -> bool:
        return self.chip.platform == "cuda"

    @property
    def target(self) -> Target:
        """The answer of `target()` to code that is traced for these chips."""
        return target_of_card(self.name) if self.gpus else Target("tpu")

    @property
    def words(self) -> str:
        """The shape as text."""
        if not self.gpus:
            return "x".join(map(str, self.shape))
        hosts, each = self.shape
        return f"{hosts} hosts of {each}" if hosts > 1 else "one host"

    def sending(self, group: Sequence[int]) -> float:
        """Bytes a second that a chip can send to the others of its group in a collective operation, with busy links.

        TPUs: a group of all chips uses all links of the torus, a smaller group the two links of a ring, a pair one.
        GPUs: a group within one host uses NVLink. A group over several hosts uses the ports of its GPUs in one host
        together, or NVLink where NVLink is slower.
        """
        chip, n = self.chip, len(group)
        if self.gpus:
            most = max(Counter(i // self.shape[1] for i in group).values())
            return chip.link if most == n else min(chip.link, most * chip.between)
        if n < math.prod(self.shape):
            return chip.link * min(n - 1, 2)
        degree = sum(2 if a % chip.whole == 0 else 2 * (a - 1) / a for a in self.shape)
        return chip.link * min(degree, chip.ports)


def target_of(text: str) -> Machine:
    """The machine with the name "v5e:4x4", "h100:8" or "h100:1x2x8". Raises InputError for other names."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise InputError(
            f"target {text!r} is unknown: did you mean {recipe.nearest(name, list(CHIPS))}? One of {', '.join(CHIPS)}"
        )
    chip = CHIPS[name]
    if chip.platform == "cuda":
        return Machine(name, hosts_of(text, name, shape, chip.whole))
    axes = chip.ports // 2
    if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * axes), shape):
        example = {2: "4x4 (the torus)", 3: "2x2x1 (the torus)"}[axes]
        raise InputError(f"target {text!r} does not tell the number of chips: write {name}:{example}")
    machine = Machine(name, tuple(int(n) for n in shape.split("x")))
    if math.prod(machine.shape) > chip.most:
        raise InputError(f"target {text!r}: the largest slice has {chip.most} {name}: name fewer")
    return machine


def hosts_of(text: str, name: str, shape: str, most: int) -> tuple[int, int]:
    """(hosts, GPUs in each host) from "16" or "1x2x8"; a host has at most `most`. Raises InputError."""
    if not (found := re.fullmatch(r"(?:1x([1-9]\d{0,3})x)?([1-9]\d{0,3})", shape)):
        raise InputError(
            f"target {text!r} does not tell the number of GPUs: write {name}:8 (GPUs) or {name}:1x2x{most} (2 hosts)"
        )
    if found[1]:
        hosts, each = int(found[1]), int(found[2])
        if each > most:
            raise InputError(f"target {text!r}: a host has {most} {name} at most: write {name}:1x{hosts}x{most}")
        return hosts, each
    n = int(found[2])
    if n > most and n % most:
        raise InputError(f"target {text!r}: more than {most} {name} fill hosts of {most}: write {name}:{n + -n % most}")
    return (1, n) if n <= most else (n // most, most)


def devices_of(machine: Machine) -> Sequence[Any]:
    """The devices of a machine. Programs can be compiled for them, but cannot run on them.

    Raises InputError where the compiler is not installed or refuses the machine.
    """
    return gpus(machine) if machine.gpus else tpus(machine)


def gpus(machine: Machine) -> Sequence[Any]:
    """`devices_of` for GPUs."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise InputError(f"target {machine.name} needs XLA's GPU compiler (182 MB): pip install 'jmae[plan-gpu]'")
    shape = "x".join(map(str, (1, *machine.shape)))
    options = {"target_config": description(machine.name), "topology": shape}
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name=machine.name, **options)
    except Exception as error:
        raise InputError(f"XLA's GPU compiler refuses {machine.name}:{shape} ({first_line(error)})") from error
    devices: Sequence[Any] = found.devices
    # A description that the compiler cannot read becomes a card without a name.
    if devices[0].device_kind != CARDS[machine.name].kind:
        raise InputError(f"XLA's GPU compiler reads the {machine.name} as {devices[0].device_kind!r}: update jmae")
    return devices


def tpus(machine: Machine) -> Sequence[Any]:
    """`devices_of` for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"target {machine.name} needs libtpu, the TPUs' compiler: pip install 'jmae[plan]'")
    # libtpu then looks for no TPU, lets other processes compile or train beside this one, and logs only fatal errors.
    settings = f"""TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost
        TPU_ACCELERATOR_TYPE={machine.chip.example} TPU_MIN_LOG_LEVEL=3 TPU_STDERR_LOG_LEVEL=3"""
    for setting in settings.split():
        os.environ.setdefault(*setting.split("="))
    examples = {2: "4x4, 8x8, 16x16", 3: "2x2x1, 2x2x4, 4x4x4"}[len(machine.shape)]
    name = f"{machine.name}:{'x'.join(map(str, machine.shape))}"
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(machine.shape) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise InputError(
            f"libtpu refuses {name} ({first_line(error)}): use a torus that exists, such as {examples}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; without a message, its class."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
