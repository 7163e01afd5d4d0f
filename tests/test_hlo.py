"""What a compiled program of a GPU consists of, by hand from small texts as XLA writes them."""

from collections import Counter

import pytest

from jmae.hlo import Program, Work

# A loop of 3: cuDNN's attention forward of (2, 16, 4, 8) queries and (2, 24, 4, 8) keys, and a product that Triton runs
# in 4 parts. Then its backward pass, a product of cuBLAS in float32 with a workspace, a pad to another type, a copy.
SCORES = '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "16", "24"], "x": []}'
TEXT = (
    """HloModule jit_one, is_scheduled=true

%gemm (p0: bf16[64,4,8], p1: bf16[4,8,32]) -> f32[4,64,32] {
  %p0 = bf16[64,4,8]{2,1,0} parameter(0)
  %p1 = bf16[4,8,32]{2,1,0} parameter(1)
  ROOT %dot = f32[4,64,32]{2,1,0} dot(%p0, %p1), lhs_batch_dims={1}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}, backend_config={"sizes":["16"]}
}

%padded (a: bf16[5,8]) -> f32[8,8] {
  %a = bf16[5,8]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[8,8]{1,0} pad(%a, %zero), padding=0_3x0_0
  ROOT %wide = f32[8,8]{1,0} convert(%pad)
}

%cond (s: (s32[], bf16[2,16,4,8])) -> pred[] {
  %s = (s32[], bf16[2,16,4,8]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (s.1: (s32[], bf16[2,16,4,8])) -> (s32[], bf16[2,16,4,8]) {
  %s.1 = (s32[], bf16[2,16,4,8]{3,2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %q = bf16[2,16,4,8]{3,2,1,0} get-tuple-element(%s.1), index=1
  %k = bf16[2,24,4,8]{3,2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %fwd = (bf16[2,4,16,8]{3,1,2,0}, f32[2,4,16]{2,1,0}, u8[100]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={SCORES}
  %flat = bf16[64,4,8]{2,1,0} bitcast(%q)
  %w = bf16[4,8,32]{2,1,0} bitcast(%k)
  %product = f32[4,64,32]{2,1,0} fusion(%flat, %w), kind=kCustom, calls=%gemm
  ROOT %next = (s32[], bf16[2,16,4,8]{3,2,1,0}) tuple(%i.1, %q)
}

ENTRY %main (q0: bf16[2,16,4,8], k0: bf16[2,24,4,8], x: f32[6,10], y: f32[10,7], z: bf16[5,8]) -> f32[8,8] {
  %q0 = bf16[2,16,4,8]{3,2,1,0} parameter(0)
  %k0 = bf16[2,24,4,8]{3,2,1,0} parameter(1)
  %x = f32[6,10]{1,0} parameter(2)
  %y = f32[10,7]{1,0} parameter(3)
  %z = bf16[5,8]{1,0} parameter(4)
  %zero.1 = s32[] constant(0)
  %state = (s32[], bf16[2,16,4,8]{3,2,1,0}) tuple(%zero.1, %q0)
  %loop = (s32[], bf16[2,16,4,8]{3,2,1,0}) while(%state), condition=%cond, body=%body
  %bwd = (bf16[2,4,16,8]{3,1,2,0}, bf16[2,4,24,8]{3,1,2,0}, bf16[2,4,24,8]{3,1,2,0}, u8[0]{0}) \
custom-call(%q0, %k0, %k0, %q0), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={SCORES}
  %blas = (f32[6,7]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %pad.1 = f32[8,8]{1,0} fusion(%z), kind=kLoop, calls=%padded
  ROOT %copy = f32[8,8]{0,1} copy(%pad.1)
}
"""
).replace("SCORES", SCORES)
FORWARD, BACKWARD = 4 * 2 * 4 * 16 * 24 * 8, 10 * 2 * 4 * 16 * 24 * 8
TRITON, BLAS = 2 * 64 * 32 * 4 * 8, 2 * 6 * 7 * 10
QUERIES, KEYS = 2 * 2 * 16 * 4 * 8, 2 * 2 * 24 * 4 * 8  # bytes


def test_kernels_are_what_a_device_launches_a_loop_s_as_often_as_it_runs():
    program = Program(TEXT, 1)
    assert program.unknown == 0
    assert {kernel.name: kernel.times for kernel in program.kernels()} == {
        "fwd": 3,
        "product": 3,
        "bwd": 1,
        "blas": 1,
        "pad.1": 1,
        "copy": 1,
    }
    assert program.launches() == 2 * 3 + 4
    calls = {"__cudnn$fmhaSoftmax": 3, "__cudnn$fmhaSoftmaxBackward": 1, "__cublas$lt$matmul": 1}
    assert program.custom_calls() == Counter(calls)


def test_flops_are_those_of_fused_products_of_cublas_and_of_cudnn_s_attention():
    assert Program(TEXT, 1).work() == Work(3 * (FORWARD + TRITON) + BACKWARD, BLAS)
    each = {kernel.name: kernel.work for kernel in Program(TEXT, 1).kernels()}
    assert each["fwd"] == Work(FORWARD, 0) and each["bwd"] == Work(BACKWARD, 0)
    assert each["product"] == Work(TRITON, 0) and each["blas"] == Work(0, BLAS)
    assert each["pad.1"] == each["copy"] == Work()


def test_bytes_of_a_library_s_call_are_without_its_workspace():
    each = {kernel.name: kernel.bytes for kernel in Program(TEXT, 1).kernels()}
    assert each["fwd"] == QUERIES + 2 * KEYS + QUERIES + 4 * 2 * 4 * 16
    assert each["bwd"] == 2 * QUERIES + 2 * KEYS + QUERIES + 2 * KEYS
    assert each["blas"] == 4 * (60 + 70 + 42)


def test_padding_is_what_kernels_move_whose_result_is_a_pad():
    assert Program(TEXT, 1).padding() == 2 * 40 + 4 * 64
    assert [kernel.name for kernel in Program(TEXT, 1).kernels() if kernel.padding] == ["pad.1"]


def test_time_is_the_sum_over_kernels_of_the_longer_of_flops_and_bytes():
    program = Program(TEXT, 1)
    traffic = sum(kernel.times * kernel.bytes for kernel in program.kernels())
    assert traffic == program.traffic()
    assert program.seconds(1e30, 1e30, 2.0) == pytest.approx(traffic / 2)
    flops = 3 * (FORWARD + TRITON) + BACKWARD
    assert program.seconds(8.0, 5.0, 1e30) == pytest.approx(flops / 8 + BLAS / 5)
    # At one FLOP a byte the products are the longer half, the copy and the pad the other one.
    slow = 2 * 40 + 4 * 64 + 2 * 4 * 64
    assert BLAS > 4 * (60 + 70 + 42) and program.seconds(1.0, 1.0, 1.0) == pytest.approx(flops + BLAS + slow)


def convolution(name: str, out: str, given: str, rest: str, kind: str = "custom-call") -> Program:
    x, kernel = given.split(" ")
    return Program(
        f"""HloModule m

ENTRY %main (x: {x}, k: {kernel}) -> {out} {{
  %x = {x} parameter(0)
  %k = {kernel} parameter(1)
  ROOT %{name} = {out} {kind}(%x, %k), {rest}
}}
""",
        1,
    )


# 4 images of 32 x 32 with 8 channels to 16 x 16 with 16: each of the results is 3 x 3 x 8 products.
IMAGE, GRADIENT, FILTER = "bf16[4,33,33,8]", "bf16[4,16,16,16]", "bf16[16,3,3,8]"
WINDOW = 'window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv'
EACH = 2 * (4 * 16 * 16 * 16) * (3 * 3 * 8)


@pytest.mark.parametrize(
    "target, out, given",
    [
        ("Forward", GRADIENT, f"{IMAGE} {FILTER}"),
        ("BiasActivationForward", GRADIENT, f"{IMAGE} {FILTER}"),
        ("BackwardInput", IMAGE, f"{GRADIENT} {FILTER}"),
        ("BackwardFilter", FILTER, f"{IMAGE} {GRADIENT}"),
    ],
)
def test_a_convolution_of_cudnn_and_its_two_gradients_have_equal_flops(target, out, given):
    program = convolution("conv", f"({out}, u8[0])", given, f'{WINDOW}{target}"')
    assert program.work() == Work(EACH, 0)


def test_convolutions_of_xla_itself_count_groups_and_no_zeros_between_inputs():
    labels = "dim_labels=b01f_01io->b01f"
    plain = convolution(
        "c", "f32[1,6,6,10]", "f32[1,8,8,4] f32[3,3,4,10]", f"window={{size=3x3}}, {labels}", "convolution"
    )
    assert plain.work() == Work(0, 2 * 360 * 36)
    grouped = f"window={{size=3x3}}, {labels}, feature_group_count=2"
    assert convolution("c", "f32[1,6,6,10]", "f32[1,8,8,4] f32[3,3,2,10]", grouped, "convolution").work() == Work(
        0, 2 * 360 * 18
    )
    dilated = f"window={{size=3x3 lhs_dilate=2x2}}, {labels}"
    assert convolution("c", "f32[1,6,6,10]", "f32[1,4,4,4] f32[3,3,4,10]", dilated, "convolution").work() == Work(
        0, 2 * 360 * 36 / 4
    )


@pytest.mark.parametrize(
    "before, after, said",
    [
        ('"intermediate_tensor_shape"', '"shape"', "an attention has an unknown form"),
        ('"lhs_contracting_dimensions"', '"lhs"', "a product has an unknown form"),
    ],
)
def test_a_form_that_is_not_known_is_an_error_and_no_zero(before, after, said):
    with pytest.raises(ValueError, match=said):
        Program(TEXT.replace(before, after), 1).work()
