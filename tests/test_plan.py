"""Plans for accelerators that are not here: what a program sends, moves and computes, and the lines for wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jmae import chips, gpus, plan, recipe
from jmae.errors import InputError, exit_code
from jmae.hlo import Program, size
from jmae.nn.attention import attention
from jmae.sharding import device_mesh
from jmae.system import load_system
from jmae.target import Target, tracing_for

# Eight devices, groups of four a stride of two apart. A loop of 12: each time gathers 4 x [16,32] and slices weights
# [12,64,64] in a fusion. Then an all-reduce of 4096 numbers with a pair of operations, a fused reduce-scatter over all.
TEXT = """HloModule jit_one, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (param_0: f32[12,64,64], param_1: s32[], param_2: bf16[64,64]) -> f32[64,64] {
  %param_0 = f32[12,64,64]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %param_2 = bf16[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %flat = f32[64,64]{1,0} bitcast(%slice)
  %wide = f32[64,64]{1,0} convert(%param_2)
  ROOT %product = f32[64,64]{1,0} multiply(%flat, %wide)
}

%all-reduce-scatter.1 (param_0.1: f32[8192]) -> f32[1024] {
  %param_0.1 = f32[8192]{0} parameter(0)
  %all-reduce.7 = f32[8192]{0} all-reduce(%param_0.1), replica_groups={}, to_apply=%add
  %start = s32[] constant(0)
  ROOT %mine = f32[1024]{0} dynamic-slice(%all-reduce.7, %start), dynamic_slice_sizes={1024}
}

%cond (state: (s32[], f32[12,64,64], bf16[16,32])) -> pred[] {
  %state = (s32[], f32[12,64,64]{2,1,0}, /*index=2*/bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (state.1: (s32[], f32[12,64,64], bf16[16,32])) -> (s32[], f32[12,64,64], bf16[16,32]) {
  %state.1 = (s32[], f32[12,64,64]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %w = f32[12,64,64]{2,1,0} get-tuple-element(%state.1), index=1
  %x = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=2
  %gathered = bf16[64,32]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %near = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} pad(%gathered)
  %used = f32[64,64]{1,0} fusion(%w, %i.1, %near), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[12,64,64]{2,1,0}, bf16[16,32]{1,0}) tuple(%i.1, %w, %x)
}

ENTRY %main (p: f32[4096], q: f32[8192], s: (s32[], f32[12,64,64], bf16[16,32])) -> f32[1024] {
  %p = f32[4096]{0} parameter(0)
  %q = f32[8192]{0} parameter(1)
  %s = (s32[], f32[12,64,64]{2,1,0}, bf16[16,32]{1,0}) parameter(2)
  %loop = (s32[], f32[12,64,64]{2,1,0}, bf16[16,32]{1,0}) while(%s), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %ar = f32[4096]{0} all-reduce-start(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %ar.done = f32[4096]{0} all-reduce-done(%ar)
  %alone = f32[4096]{0} all-reduce(%ar.done), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %rs = f32[1024]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_are_those_of_the_text_a_loop_s_as_often_as_it_runs():
    found = {c.kind: c for c in Program(TEXT, 8).collectives()}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    gather, reduce, scatter = (found[kind] for kind in ("all-gather", "all-reduce", "reduce-scatter"))
    assert gather.group == (0, 2, 4, 6) and gather.times == 12
    assert gather.size == 12 * 4 * 16 * 32 * 2 and gather.sent == 12 * 3 * 16 * 32 * 2
    assert reduce.group == (0, 2, 4, 6) and (reduce.times, reduce.size, reduce.sent) == (1, 16384, 1.5 * 16384)
    assert scatter.group == tuple(range(8)) and (scatter.size, scatter.sent) == (32768, 7 / 8 * 32768)


@pytest.mark.parametrize(
    "groups, first",
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("{}", (0, 1, 2, 3)),
        ("[2,2]<=[4]", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("mesh['x'=2,'y'=2] {'y'}", (0, 1)),
        ("mesh['x'=2,'y'=2] {'x'}", (0, 2)),
        ("mesh['x'=4,'y'=1] {'x','y'}", (0, 1, 2, 3)),
        ("mesh['x'=4] {'x':(1)2}", (0, 2)),
        ("mesh['x'=4] {'x':(2)2}", (0, 1)),
        ("mesh['z'=1,'x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", (0, 2)),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", (0, 2)),
    ],
)
def test_groups_in_all_their_forms(groups, first):
    text = TEXT.replace("replica_groups={{0,2,4,6},{1,3,5,7}}", f"replica_groups={groups}")
    found = [c.group for c in Program(text, 4).collectives() if c.size == 16384]
    assert found == [first]


def test_traffic_is_what_operations_read_and_write_of_slices_the_slice_and_nothing_of_near_memory():
    array = 64 * 64 * 4
    gather, pad, fusion = 16 * 32 * 2 + 64 * 32 * 2, 64 * 32 * 2, array + 4 + array
    entry = 2 * 16384 + 2 * 16384 + 32768 + 4096  # the start of one all-reduce, another, the fused one
    assert Program(TEXT, 8).traffic() == 12 * (gather + pad + fusion) + entry


def test_a_loop_of_unknown_length_is_counted_once_and_told():
    program = Program(TEXT.replace("known_trip_count", "something"), 8)
    assert program.unknown == 1 and {c.kind: c.times for c in program.collectives()}["all-gather"] == 1


def test_a_part_that_is_written_in_place_is_its_slice():
    text = """HloModule m

%fused (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}

ENTRY %main (x: f32[100,8], y: f32[1,8], j: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = f32[100,8]{1,0} fusion(%x, %y, %j), kind=kLoop, calls=%fused
}
"""
    assert Program(text, 1).traffic() == 32 + 4 + 32


def test_sizes_of_types():
    assert size("(f32[2,3]{1,0}, bf16[4]{0:T(256)}, pred[5]{0}, s4[8]{0}, u32[])") == 24 + 8 + 5 + 4 + 4
    assert size("(f32[2,3]{1,0:T(8,128)S(1)}, bf16[4])", main=True) == 8


def test_products_count_loops_by_their_length_and_the_target_s_own_branch():
    def step(x, w):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        twice = lambda x: x @ w[0] @ w[1]
        return jax.lax.platform_dependent(x, cpu=lambda x: x, default=twice).astype(jnp.bfloat16)

    def convolved(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    traced = jax.jit(step).trace(jnp.zeros((5, 8)), jnp.zeros((3, 8, 8))).jaxpr.jaxpr
    assert plan.products(traced, "cpu") == {4: 3 * 2 * 5 * 8 * 8}
    assert plan.products(traced, "tpu") == {4: 5 * 2 * 5 * 8 * 8}
    half = jnp.bfloat16
    traced = jax.jit(convolved).trace(jnp.zeros((2, 6, 6, 3), half), jnp.zeros((3, 3, 3, 4), half)).jaxpr.jaxpr
    assert plan.products(traced, "tpu") == {2: 2 * (2 * 6 * 6 * 4) * 27}


def test_products_of_a_step_are_those_of_the_formula():
    config = recipe.load("configs/maemi.py:smoke")
    (stage,) = load_system(config).stages
    state, inputs, jitted = plan.step_of(config, stage, 0, {}, device_mesh(1, jax.devices()[:1]), 2)
    found = sum(plan.products(jitted.trace(state, *inputs).jaxpr.jaxpr, "tpu").values())
    model, values = config.model, 8 * 8 * 2 * 2
    tokens = 4 * 3 * 2
    visible = int(tokens * (1 - config.train.mask_ratio))

    def block(n, width):  # (dense products, attention's) of one block, forward
        return 2 * n * 12 * width**2, 4 * n**2 * width

    blocks = [block(visible + 1, model.width)] * model.depth
    blocks += [block(tokens + 1, model.decoder_width)] * model.decoder_depth
    ends = 2 * (visible + 1) * model.width * model.decoder_width + 2 * tokens * model.decoder_width * values
    dense, attention = sum(d for d, _ in blocks) + ends, sum(a for _, a in blocks)
    first = 2 * (2 * tokens * values * model.width)  # the patch embedding: no gradient of the image
    # Attention: two products forward and four backward, and up to two again where its scores are not kept.
    assert 2 * (3 * dense + first + 3 * attention) <= found <= 2 * (3 * dense + first + 4 * attention)


def test_products_count_cudnn_s_attention_and_the_gpu_s_branch_in_a_backward_pass_too():
    b, n, m, h, d, layers = 2, 16, 24, 2, 8, 3

    def loss(q, k):
        again = lambda q, _: (attention(q, k, k), None)
        return jax.lax.scan(again, q, None, layers)[0].astype(jnp.float32).sum()

    half = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    with tracing_for(Target("cuda", (9, 0), 91000)):
        forward = jax.jit(loss).trace(half(b, n, h, d), half(b, m, h, d)).jaxpr.jaxpr
        both = jax.jit(jax.grad(loss)).trace(half(b, n, h, d), half(b, m, h, d)).jaxpr.jaxpr
        shared = jax.jit(jax.grad(jax.checkpoint(loss))).trace(half(b, n, h, d), half(b, m, h, d)).jaxpr.jaxpr
    one = b * h * n * m * d
    assert plan.products(forward, "cuda") == {2: layers * 4 * one}
    assert plan.products(both, "cuda") == {2: layers * (4 + 10) * one}
    assert plan.products(shared, "cuda") == {2: layers * (4 + 4 + 10) * one}
    assert plan.products(forward, "tpu").total() == layers * 4 * one  # the two products of the plain form


def test_predicted_time_is_the_longer_of_work_and_memory_and_then_the_network():
    found = plan.step_times(0.003, 0.004, 0.001)
    assert (found["step_s"], found["step_least_s"]) == (0.005, 0.004)
    assert found["efficiency"] == pytest.approx(0.8) and found["limited_by"] == "memory"
    assert plan.step_times(0.001, 0.001, 0.1)["limited_by"] == "network"
    # Of a GPU, kernels one after the other, and their launches beside them.
    found = plan.step_times(0.003, 0.004, 0.001, 0.006, 0.002)
    assert (found["step_s"], found["limited_by"]) == (pytest.approx(0.007), "memory")
    found = plan.step_times(0.003, 0.004, 0.001, 0.006, 0.008)
    assert (found["step_s"], found["limited_by"]) == (pytest.approx(0.009), "launches")


@pytest.mark.parametrize(
    "target, group, expected",
    [
        ("v5e:16x16", range(256), 200e9),  # both axes are closed: all four links
        ("v5e:4x4", range(16), 150e9),  # 2 x 3/4 links an axis
        ("v5e:4x4", (0, 4, 8, 12), 100e9),  # a ring
        ("v5e:4x4", (0, 1), 50e9),
        ("v5p:4x4x4", range(64), 600e9),
        ("h100:16", range(8), 450e9),
        ("h100:16", range(16), 400e9),  # eight ports together
        ("h100:16", (0, 8), 50e9),
        ("h100:1x2x4", range(8), 200e9),  # four ports together
        ("b200:8", range(8), 900e9),
    ],
)
def test_what_a_chip_can_send_depends_on_the_group(target, group, expected):
    assert plan.target_of(target).sending(tuple(group)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, shape, words",
    [
        ("h200:1", (1, 1), "one host"),
        ("a100:8", (1, 8), "one host"),
        ("b200:24", (3, 8), "3 hosts of 8"),
        ("h100:1x32x8", (32, 8), "32 hosts of 8"),
        ("h100:1x2x4", (2, 4), "2 hosts of 4"),
        ("v5p:2x2x4", (2, 2, 4), "2x2x4"),
    ],
)
def test_a_target_names_hosts_of_gpus_or_a_torus(text, shape, words):
    machine = plan.target_of(text)
    assert (machine.shape, machine.words) == (shape, words)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "no target: write --target=h200:1"),
        (["--target=v5f:4x4"], "target 'v5f:4x4' is unknown: did you mean v5"),
        (["--target=h10:4"], "did you mean h100?"),
        (["--target=v5e"], "target 'v5e' does not tell the number of chips: write v5e:4x4 (the torus)"),
        (["--target=v5p:4x4"], "write v5p:2x2x1 (the torus)"),
        (["--target=v5e:32x32"], "the largest slice has 256 v5e"),
        (["--target=h100:4x4"], "write h100:8 (GPUs) or h100:1x2x8 (2 hosts)"),
        (["--target=h100"], "write h100:8 (GPUs)"),
        (["--target=h100:12"], "more than 8 h100 fill hosts of 8: write h100:16"),
        (["--target=h100:1x2x16"], "a host has 8 h100 at most: write h100:1x2x8"),
        (["--target=h100:1", "--scoring", "--volume=9x9"], "--volume=9x9 is no size: write --volume=273x406x105"),
        (["--target=h100:1", "--volume=9x9x9"], "--volume is for scoring: leave it out, or add --scoring"),
        (
            ["--target=h100:1", "--scoring", "--largest"],
            "--largest is for training: leave it out, or leave out --scoring",
        ),
        (["--target=h100:1", "--scoring=true"], "--scoring=true: this flag has no value: write --scoring"),
        (["--target=h100:1", "--scoring"], "maemi scores volumes: name a size, such as --volume=273x406x105"),
        (["--target=h100:1", "--batch=0"], "--batch=0: write 1 or more"),
        (["--target=h100:1", "--config.fsdp=2"], "fsdp=2 does not divide 1 devices"),
        (["--target=h100:1", "--stage=trian"], "stage 'trian' is unknown: one of train"),
    ],
)
def test_wrong_input_is_one_line(given, said, capsys, monkeypatch):
    monkeypatch.setattr(plan, "devices_of", lambda machine: jax.devices()[:1])
    assert exit_code(plan.main, ["--config=configs/maemi.py:smoke", *given]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_without_libtpu_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"target v5e needs libtpu, the TPUs' compiler: pip install 'jmae\[plan\]'"):
        plan.devices_of(plan.target_of("v5e:2x2"))


def test_without_the_gpu_compiler_the_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert exit_code(plan.main, ["--config=configs/maemi.py:smoke", "--target=h200:1"]) == 2
    said = "target h200 needs XLA's GPU compiler (182 MB): pip install 'jmae[plan-gpu]'\n"
    assert capsys.readouterr().err == said


def test_a_description_that_the_compiler_does_not_read_is_one_line(monkeypatch):
    nameless = SimpleNamespace(devices=[SimpleNamespace(device_kind="")])
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", lambda **_: nameless)
    with pytest.raises(InputError, match="reads the h200 as '': update jmae"):
        plan.devices_of(plan.target_of("h200:1"))


@pytest.mark.parametrize("name", gpus.CARDS)
def test_each_card_s_description_gives_devices_of_its_name_and_capability(name):
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's GPU compiler is not installed: pip install 'jmae[plan-gpu]'")
    devices = plan.devices_of(plan.target_of(f"{name}:1x2x4"))
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    assert {device.device_kind for device in devices} == {gpus.CARDS[name].kind}
    (capability,) = {device.compute_capability for device in devices}
    assert gpus.target_of_card(name) == Target("cuda", tuple(int(n) for n in capability.split(".")), 91000)


def test_a_card_s_description_is_balanced_and_has_the_card_s_own_numbers():
    for name, card in gpus.CARDS.items():
        text = gpus.description(name)
        assert text.count("{") == text.count("}") == (4 if card.links else 3)
        numbers = dict(line.split(": ") for line in text.splitlines() if line.count(":") == 1 and "{" not in line)
        assert int(numbers["device_memory_size"]) == card.memory and int(numbers["core_count"]) == card.cores
        # The compiler's figures and those of the plan are of the same card: the makers' are round.
        assert card.memory == pytest.approx(chips.CHIPS[name].memory, rel=0.08)
        assert card.bandwidth == pytest.approx(chips.CHIPS[name].bandwidth, rel=0.05)


def test_a_torus_that_libtpu_refuses_is_one_line(monkeypatch):
    def refuse(**_):
        raise RuntimeError("INVALID_ARGUMENT: not divisible by 2x2x1\nand more")

    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", refuse)
    with pytest.raises(
        InputError,
        match=r"libtpu refuses v5e:3x5 \(INVALID_ARGUMENT: not divisible by 2x2x1\): use a torus that exists, such as",
    ):
        plan.devices_of(plan.target_of("v5e:3x5"))


def planned(tmp_path: Path, *given: str, code: int = 0) -> tuple[dict, str]:
    """(the JSON, what was printed) of a plan of the smallest volumes' recipe in a process of its own."""
    file = tmp_path / "plan.json"
    tiny = ("data.size=16,16,4", "model.width=128", "model.depth=3", "model.heads=2")
    command = [sys.executable, "-m", "jmae.plan", "--config=configs/maemi.py:smoke", f"--json={file}", *given]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("XLA_FLAGS", None)  # a compiler ends the process at a flag of the CPU's that it does not know
    done = subprocess.run(
        [*command, *(f"--config.{each}" for each in tiny)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return json.loads(file.read_text()), done.stdout


# A product of (1024, 1024) numbers in bfloat16 on each of two GPUs, an exchange of its gradient, and a pad.
GPU = """HloModule m

%gemm (a: bf16[1024,1024], b: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  ROOT %dot = bf16[1024,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1032] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %product = bf16[1024,1024]{1,0} fusion(%x, %x), kind=kCustom, calls=%gemm
  %sum = bf16[1024,1024]{1,0} all-reduce(%product), replica_groups={{0,1}}, to_apply=%add
  ROOT %pad = bf16[1024,1032]{1,0} pad(%sum, %zero), padding=0_0x0_8
}
"""


def compiled(text: str, temporary: int = 10**9) -> SimpleNamespace:
    """What JAX gives of a compiled program."""
    sizes = {"argument": 5 * 10**6, "output": 10**6, "alias": 10**6, "temp": temporary, "generated_code": 0}
    sizes = SimpleNamespace(**{f"{name}_size_in_bytes": n for name, n in sizes.items()})
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: sizes, cost_analysis=lambda: None)


def on_gpus(target: str = "h200:2", **changes) -> tuple[dict, list[str]]:
    """(a plan's figures of the program above, the lines that are printed)."""
    machine = plan.target_of(target)
    mesh = SimpleNamespace(size=2)
    found = plan.needs_of(machine, mesh, compiled(GPU, **changes), {"parameters": 4 * 10**6, "batch": 10**6}, None)
    head = {"system": "maemi", "stage": "train", "chips": 2, "fsdp": 1, "batch": 12, "batch_from": "recipe"}
    found = head | {"flops": 2e9, "flops_chip": 1e9} | found
    return found, plan.report(machine, found)


def test_a_gpu_s_plan_is_the_program_s_kernels_one_after_the_other():
    found, lines = on_gpus()
    array = 2 * 2**20
    pad = 2 * array + 2 * 8 * 1024 + 2
    assert found["flops_compiled_chip"] == {"low": 2 * 2**30, "float32": 0}
    assert (found["kernels"], found["padding_chip"], found["traffic_chip"]) == (3, pad, 3 * array + 2 * array + pad)
    product_s = 2 * 2**30 / 789e12  # longer than what it reads and writes
    assert found["kernels_s"] == pytest.approx(product_s + (2 * array + pad) / 4.8e12)
    assert found["peak_share"] == pytest.approx(product_s / found["kernels_s"])
    assert found["network_s"] == pytest.approx(array / 450e9) and found["launches_s"] == pytest.approx(3 * 2e-6)
    assert found["step_s"] == pytest.approx(6e-6 + array / 450e9) and found["limited_by"] == "launches"
    assert found["total"] == 5 * 10**6 + 10**9 and found["limit"] == 0.75 * 141e9 and found["fits"]
    said = "\n".join(lines)
    assert "on 2 h200 (one host), data 2 x fsdp 1, global batch 12 (the recipe's on each)" in said
    assert "1 of 106 GB, 75% of a chip's as JAX takes [compiled, without cuDNN's workspaces]" in said
    assert "0.002147 TFLOP a chip, 0.0% of them with float32 inputs [compiled]" in said
    assert (
        f"3 a chip, {pad / (5 * array + pad):.1%} of the traffic is padding" in said
        and "1 all-reduce of 0.0021 GB over 2" in said
    )
    assert f"at most {found['peak_share']:.0%} of 789 TFLOP/s [estimated]" in said
    # Each figure says where it comes from.
    assert all(any(word in line for word in ("compiled", "traced", "estimated")) for line in lines[1:])


def test_a_gpu_s_program_that_is_larger_than_its_memory_does_not_fit():
    found, lines = on_gpus(temporary=106 * 10**9)
    assert not found["fits"] and "fits         NO: 106 of 106 GB" in lines[1]
    assert on_gpus("b200:2", temporary=106 * 10**9)[0]["fits"]


@pytest.mark.parametrize("base, unit, limit, expected", [(6, 1, 100, 180), (6, 1, 20, 20), (64, 8, 100, 176)])
def test_the_largest_batch_is_estimated_by_a_line_and_compiled(base, unit, limit, expected):
    asked = []

    def at(batch: int) -> dict:  # 10 and half a sample; of 64 units on multiples of 8 units are tried
        asked.append(batch)
        return {"total": 10 + batch / 2, "limit": limit, "fits": 10 + batch / 2 <= limit}

    found = plan.largest_batch(at, base, unit, at(base))
    exact = int((limit - 10) / 0.5)
    step = 8 * unit if exact >= 64 * unit else unit
    assert found["batch"] == exact // step * step and found["tried"] == asked
    assert found["batch"] <= expected and found["batch"] > expected - 8 * unit


def test_a_batch_that_turns_out_not_to_fit_is_not_the_largest():
    at = lambda batch: {"total": batch**2, "limit": 2500, "fits": batch**2 <= 2500}  # no line
    found = plan.largest_batch(at, 10, 1, at(10))
    assert found["tried"][:2] == [10, 20] and (found["batch"] or 0) <= 50
    assert all(batch**2 > 2500 for batch in found["tried"][2:-1])
    none = plan.largest_batch(lambda batch: {"total": 9, "limit": 5, "fits": False}, 1, 1, at(1) | {"fits": False})
    assert none["batch"] == 0


@pytest.mark.long
def test_the_sweep_over_a_volume_is_planned_with_all_its_windows(monkeypatch):
    monkeypatch.setattr(plan, "devices_of", lambda machine: jax.devices()[:1])
    config = recipe.load("configs/maemi.py:smoke")
    config.model.dtype, config.model.depth, config.model.decoder_depth = "float32", 1, 1
    config.evaluation.repeats = 2
    # Compiled for the CPU: the figures are those of its program.
    found = plan.scoring(config, plan.target_of("v5e:1x1"), volume=(48, 40, 8))
    assert (found["stage"], found["volume"], found["at_once"]) == ("scoring", (48, 40, 8), config.evaluation.batch)
    assert found["loops_unknown"] == 0
    config.evaluation.repeats = 4
    twice = plan.scoring(config, plan.target_of("v5e:1x1"), volume=(48, 40, 8))
    config.evaluation.repeats = 6
    thrice = plan.scoring(config, plan.target_of("v5e:1x1"), volume=(48, 40, 8))
    # Beside what is done once, every two sweeps more are as much again.
    more = twice["traffic_chip"] - found["traffic_chip"]
    assert more > 0 and thrice["traffic_chip"] - twice["traffic_chip"] == pytest.approx(more, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("batch", [3])
def test_the_fused_pass_of_images_is_planned_with_all_masks(monkeypatch, batch):
    monkeypatch.setattr(plan, "devices_of", lambda machine: jax.devices()[:1])
    config = recipe.load("configs/amae.py:smoke")
    config.evaluation.batch = batch
    found = plan.scoring(config, plan.target_of("v5e:1x1"))
    assert (found["at_once"], found["what"], found["batch"]) == (config.evaluation.masks, "masks", batch)
    assert found["memory"]["weights"] > 0 and found["traffic_chip"] > found["memory"]["weights"]


def test_a_plan_for_gpus_is_compiled_by_xla_s_own_compiler(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's GPU compiler is not installed: pip install 'jmae[plan-gpu]'")
    found, said = planned(tmp_path, "--target=h100:4", "--config.fsdp=2", "--batch=8")
    (stage,) = found["stages"]
    assert (stage["stage"], stage["chips"], stage["fsdp"], stage["batch"]) == ("train", 4, 2, 8)
    # Adam has two numbers for each parameter, and one count of 4 bytes.
    assert stage["memory"]["optimiser"] == 2 * stage["memory"]["parameters"] + 4
    assert any(c["kind"] == "all-gather" and c["chips"] == 2 for c in stage["collectives"])
    # Attention of 128 / 2 channels a head runs in cuDNN's kernel, once forward and once backward a block at least.
    assert all(stage["custom_calls"][call] >= 3 for call in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"))
    assert stage["fits"] and stage["sent_chip"] > 0 and stage["traffic_chip"] > 0
    assert stage["step_s"] == pytest.approx(max(stage["kernels_s"], stage["launches_s"]) + stage["network_s"])
    assert stage["flops_chip"] == stage["flops"] / 4 and stage["loops_unknown"] == 0
    # Padding of sequences and what the compiler splits add a little to the traced products.
    assert stage["flops_chip"] <= sum(stage["flops_compiled_chip"].values()) <= 1.3 * stage["flops_chip"]
    assert "on 4 h100 (one host), data 2 x fsdp 2, global batch 8 (--batch)" in said


@pytest.mark.long
def test_a_plan_for_tpus_is_compiled_by_libtpu(tmp_path):
    pytest.importorskip("libtpu")
    found, said = planned(tmp_path, "--target=v5e:2x2")
    (stage,) = found["stages"]
    assert stage["chips"] == 4 and stage["batch"] == 4 * 8 and stage["fits"]
    assert {c["chips"] for c in stage["collectives"]} == {4}
    reduced = sum(c["bytes"] for c in stage["collectives"] if c["kind"] in ("all-reduce", "reduce-scatter"))
    # Gradients of all parameters are summed, as they come, in bfloat16 or float32; a few scalars come along.
    assert stage["memory"]["parameters"] / 2 <= reduced <= 1.01 * stage["memory"]["parameters"] + 1024
    assert "[compiled]" in said and "kernels" not in said
