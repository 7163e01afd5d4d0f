"""Descriptions of NVIDIA's cards for XLA's compiler, so that it compiles for a card that this machine lacks.

A description is a `stream_executor.GpuTargetConfigProto` in text form. The numbers are facts of the cards, as OpenXLA
lists them (github.com/openxla/xla, xla/backends/gpu/target_config/specs). `COMMON` holds what all four cards have in
common. The compiler accepts an empty description without an error. Code that makes devices from a description therefore
compares their `device_kind` with `Card.kind`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jmae.target import Target

CUDNN, CUDA, DRIVER = (9, 10, 0), "12.8.0", "13.0.0"  # versions of the libraries that programs are compiled for


class Card(NamedTuple):
    """What the compiler must know of one card."""

    kind: str  # the driver's name of the card, `device_kind` in JAX
    capability: tuple[int, int]  # compute capability
    accelerated: bool  # whether the capability has instructions that later cards lack (sm_90a, sm_100a)
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of a core
    clock_ghz: float
    memory: int  # bytes
    bandwidth: int  # bytes a second
    cache: int  # bytes of the level-2 cache
    shared: int  # bytes of a core's shared memory
    links: int  # of NVLink; 0 where OpenXLA lists none


CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 1.41, 85100068864, 2039040000000, 40 * 2**20, 164 * 2**10, 0
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 1.98, 84942979072, 3352320000000, 50 * 2**20, 228 * 2**10, 18
    ),
    "h200": Card(
        "NVIDIA H200 141GB HBM3e",
        *((9, 0), True, 132, 128, 1.98, 151397597184, 4800000000000, 50 * 2**20, 228 * 2**10, 18),
    ),
    "b200": Card(
        "NVIDIA B200", (10, 0), True, 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 228 * 2**10, 18
    ),
}
COMMON = {
    "shared_memory_per_block": 48 * 2**10,
    "registers_per_block_limit": 2**16,
    "registers_per_core_limit": 2**16,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "device_address_bits": 64,
}


def description(name: str) -> str:
    """The card's description for `jax.experimental.topologies.get_topology_desc(target_config=...)`."""
    card = CARDS[name]
    numbers = COMMON | {
        "core_count": card.cores,
        "fpus_per_core": card.lanes,
        "clock_rate_ghz": card.clock_ghz,
        "memory_bandwidth": card.bandwidth,
        "device_memory_size": card.memory,
        "l2_cache_size": card.cache,
        "shared_memory_per_core": card.shared,
        "shared_memory_per_block_optin": card.shared - 1024,  # the system reserves 1 KiB for each block
    }
    major, minor = card.capability
    extension = "ACCELERATED_FEATURES" if card.accelerated else "NONE"
    cudnn = ".".join(map(str, CUDNN))
    return "\n".join(
        [
            "gpu_device_info {",
            f'name: "{card.kind}" device_vendor: "NVIDIA Corporation"',
            *(f"{key}: {value}" for key, value in numbers.items()),
            f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}",
            f'dnn_version: "{cudnn}" runtime_version: "{CUDA}" compile_time_toolkit_version: "{CUDA}"',
            f'driver_version: "{DRIVER}"',
            f"device_interconnect_info {{ active_links: {card.links} }}" if card.links else "",
            "}",
            f'platform_name: "CUDA" device_description_str: "{card.kind}"',
            f"dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}",
        ]
    )


def target_of_card(name: str) -> Target:
    """The answer of `target()` to code that is traced for the card."""
    return Target("cuda", CARDS[name].capability, cudnn_number())


def cudnn_number() -> int:
    """The version of cuDNN that programs are compiled for, as cuDNN writes it: 91000 for 9.10.0."""
    major, minor, patch = CUDNN
    return 10000 * major + 100 * minor + patch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Lets JAX trace cuDNN's attention for a plan or a test on a machine where cuDNN is not installed.

    `jax.nn.dot_product_attention(implementation="cudnn")` asks the installed cuDNN for its version while it is traced,
    and has no argument for it. XLA's compiler itself needs no cuDNN (650 MB). This function gives the answer; it is the
    only place where jmae replaces a function of JAX. Training and scoring never call it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    check = attention.check_cudnn_version
    attention.check_cudnn_version = cudnn_number
    try:
        yield
    finally:
        attention.check_cudnn_version = check
