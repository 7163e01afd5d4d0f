"""Accelerators that need not be here: peak figures, how many of them a target names, and devices to compile for.

TPUs are compiled for by libtpu, NVIDIA's GPUs by XLA's own compiler in JAX's CUDA plugin. Neither needs the device.
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
from jmae.gpus import CARDS, answers, description
from jmae.target import Target


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
    measured: float = 0  # FLOP/s of large bfloat16 products on a card, where somebody measured them

    @property
    def usable(self) -> float:
        """FLOP/s that estimates of time reckon with."""
        return self.measured or self.flops


TPU, NVIDIA = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
# Ports of TPUs: the stated bandwidth a chip, both ways, over ports and ways. Closed rings: v5e, v6e axes of 16 alone,
# v5p multiples of 4. GPUs: the SXM forms with NVLink, in hosts of 8 with a ConnectX port each (DGX). NVIDIA's figures
# with sparsity are halved. 789 TFLOP/s were measured on an H200; the H100 has the same processor.
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
    """Chips of one kind: the axes of a torus of TPUs, or (hosts, GPUs of each)."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def gpus(self) -> bool:
        return self.chip.platform == "cuda"

    @property
    def answers(self) -> Target:
        """What code that is traced for these chips asks of them."""
        return answers(self.name) if self.gpus else Target("tpu")

    @property
    def words(self) -> str:
        """Its shape, for a reader."""
        if not self.gpus:
            return "x".join(map(str, self.shape))
        hosts, each = self.shape
        return f"{hosts} hosts of {each}" if hosts > 1 else "one host"

    def sending(self, group: Sequence[int]) -> float:
        """Bytes a second that a chip can send to the others of its group in a collective operation, all links busy.

        TPUs: all links of the torus where the group is the whole of it, else those of a ring (both ways), of a pair
        one. GPUs: NVLink, and over hosts the ports of all its GPUs in one host together, if that is less."""
        chip, n = self.chip, len(group)
        if self.gpus:
            most = max(Counter(i // self.shape[1] for i in group).values())
            return chip.link if most == n else min(chip.link, most * chip.between)
        if n < math.prod(self.shape):
            return chip.link * min(n - 1, 2)
        degree = sum(2 if a % chip.whole == 0 else 2 * (a - 1) / a for a in self.shape)
        return chip.link * min(degree, chip.ports)


def target_of(text: str) -> Machine:
    """The machine that "v5e:4x4", "h100:8" or "h100:1x2x8" names; raises InputError where it names none."""
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
        raise InputError(f"target {text!r} does not say how many chips: write {name}:{example}")
    machine = Machine(name, tuple(int(n) for n in shape.split("x")))
    if math.prod(machine.shape) > chip.most:
        raise InputError(f"target {text!r}: there are no slices of more than {chip.most} {name}")
    return machine


def hosts_of(text: str, name: str, shape: str, most: int) -> tuple[int, int]:
    """(hosts, GPUs of each) of "16" or "1x2x8"."""
    if not (found := re.fullmatch(r"(?:1x([1-9]\d{0,3})x)?([1-9]\d{0,3})", shape)):
        raise InputError(f"target {text!r} does not say how many: write {name}:8 (GPUs) or {name}:1x2x{most} (2 hosts)")
    if found[1]:
        hosts, each = int(found[1]), int(found[2])
        if each > most:
            raise InputError(f"target {text!r}: a host has {most} {name} at most: write {name}:1x{hosts}x{most}")
        return hosts, each
    n = int(found[2])
    if n > most and n % most:
        raise InputError(f"target {text!r}: more than {most} {name} are hosts of {most}: write {name}:{n + -n % most}")
    return (1, n) if n <= most else (n // most, most)


def devices_of(machine: Machine) -> Sequence[Any]:
    """The devices of a machine, for which programs can be compiled and on which none runs.

    Raises InputError where their compiler is not installed, or refuses them."""
    return gpus(machine) if machine.gpus else tpus(machine)


def gpus(machine: Machine) -> Sequence[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise InputError(f"target {machine.name} needs XLA's GPU compiler (182 MB): pip install 'jmae[plan-gpu]'")
    shape = "x".join(map(str, (1, *machine.shape)))
    options = {"target_config": description(machine.name), "topology": shape}
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name=machine.name, **options)
    except Exception as error:
        raise InputError(f"XLA's GPU compiler refuses {machine.name}:{shape} ({first_line(error)})") from error
    devices: Sequence[Any] = found.devices
    # The compiler takes a description that it cannot read for that of a card without a name.
    if devices[0].device_kind != CARDS[machine.name].kind:
        raise InputError(f"XLA's GPU compiler took the {machine.name} for {devices[0].device_kind!r}: update jmae")
    return devices


def tpus(machine: Machine) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"target {machine.name} needs libtpu, the TPUs' compiler: pip install 'jmae[plan]'")
    # No TPU is looked for, others may compile or train beside this process, and only what is fatal is said.
    settings = f"""TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost
        TPU_ACCELERATOR_TYPE={machine.chip.example} TPU_MIN_LOG_LEVEL=3 TPU_STDERR_LOG_LEVEL=3"""
    for setting in settings.split():
        os.environ.setdefault(*setting.split("="))
    own = {2: "4x4, 8x8, 16x16", 3: "2x2x1, 2x2x4, 4x4x4"}[len(machine.shape)]
    name = f"{machine.name}:{'x'.join(map(str, machine.shape))}"
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(machine.shape) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise InputError(f"libtpu refuses {name} ({first_line(error)}): use a torus that is made, as {own}") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
