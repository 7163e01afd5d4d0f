"""The kind of device that programs are compiled for, and the one function that tells it.

A program may be traced and compiled for a device that this machine lacks (`jmae.plan`, the tests). Code whose form
depends on the device therefore asks `target()`, never a live device.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import jax

CUDNN = 91000  # the oldest version that a CUDA build of JAX installs; a plan uses the version in `jmae.gpus`


class Target(NamedTuple):
    """A kind of device.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu", as `jax.lax.platform_dependent` names them.
        capability: compute capability of an NVIDIA GPU, (9, 0) for an H200.
        cudnn: version of cuDNN, 91000 for 9.10.0; 0 where there is none.
        portable: whether programs are stored in files. JAX stores none that calls cuDNN's attention or a Triton kernel.
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
    """The device that `tracing_for` or `portable` has chosen, or else the default device of this process."""
    return _chosen.get() or _of(jax.local_devices()[0])


def _of(device: Any) -> Target:
    if device.platform != "gpu":
        return Target(device.platform)
    if "rocm" in device.client.platform_version:
        return Target("rocm")
    major, minor = map(int, device.compute_capability.split("."))
    return Target("cuda", (major, minor), CUDNN)


@contextmanager
def portable() -> Iterator[None]:
    """Trace the programs inside for files: without kernels that JAX does not store."""
    token = _chosen.set(target()._replace(portable=True))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def tracing_for(chosen: Target) -> Iterator[None]:
    """Trace the programs inside for the given kind of device, whether this machine has one or not.

    JAX's cuDNN attention asks the live devices while it is traced, and has no argument for the answers. This
    function therefore answers its three questions about an NVIDIA GPU. Only plans and tests use it; training and
    scoring never do. Pallas asks for a live GPU as well and takes compute capability 9.0 without one, so the Triton
    kernels in a plan for an A100 or a B200 are lowered as an H100's.
    """
    with ExitStack() as stack:
        token = _chosen.set(chosen)
        stack.callback(_chosen.reset, token)
        if chosen.platform == "cuda":
            from jax._src.cudnn import fused_attention_stablehlo as asks

            at_least = lambda text: chosen.capability >= tuple(map(int, text.split(".")))
            equal = lambda text: chosen.capability == tuple(map(int, text.split(".")))
            stack.enter_context(mock.patch.object(asks, "check_cudnn_version", lambda: chosen.cudnn))
            stack.enter_context(mock.patch.object(asks, "check_compute_capability", at_least))
            stack.enter_context(mock.patch.object(asks, "is_cuda_compute_capability_equal", equal))
        yield
