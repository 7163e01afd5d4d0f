"""The kind of device that programs are compiled for.

A program may be traced and compiled for a device that this machine lacks (`jmae.plan`, the tests). Code whose form
depends on the device therefore asks `target()` and never a live device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

CUDNN = 91000  # the oldest version that a CUDA build of JAX installs


class Target(NamedTuple):
    """A kind of device.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu", as `jax.lax.platform_dependent` names them.
        capability: compute capability of an NVIDIA GPU, (9, 0) for an H200.
        cudnn: version of cuDNN, 91000 for 9.10.0; 0 where there is none.
        portable: whether programs are stored in files. JAX stores no program that calls cuDNN's attention or a Triton
            kernel.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    portable: bool = False

    @property
    def kernels(self) -> bool:
        """Whether programs may call kernels that are written for one GPU: cuDNN's attention, and Triton's. Both need an
        NVIDIA GPU of Ampere or later."""
        return self.platform == "cuda" and self.capability >= (8, 0) and not self.portable


_chosen: ContextVar[Target | None] = ContextVar("target", default=None)


def target() -> Target:
    """The device that `tracing_for` or `portable` has set, or else the default device of this process."""
    return _chosen.get() or target_of_device(jax.local_devices()[0])


def target_of_device(device: Any) -> Target:
    """The kind of a live device."""
    if device.platform != "gpu":
        return Target(device.platform)
    if "rocm" in device.client.platform_version:
        return Target("rocm")
    major, minor = map(int, device.compute_capability.split("."))
    return Target("cuda", (major, minor), CUDNN)


@contextmanager
def tracing_for(chosen: Target) -> Iterator[None]:
    """Traces the programs inside for the given kind of device, whether this machine has one or not.

    Pallas asks for a live GPU while it traces, and assumes compute capability 9.0 without one. The Triton kernels in a
    plan for an A100 or a B200 are therefore lowered as for an H100. Where cuDNN is not installed, cuDNN's attention can
    be traced inside `jmae.gpus.without_cudnn` only.
    """
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def portable() -> Iterator[None]:
    """Traces the programs inside for files: without kernels that JAX does not store."""
    with tracing_for(target()._replace(portable=True)):
        yield
