# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import itertools

import pytest
import torch

from tests.formula import relative_error
from tests.ops.calls import (
    Call,
    K,
    M,
    N,
    a8w4_call,
    int8,
    packed_int4,
    quant_matmul_call,
    scales,
    weight_quant_call,
    x,
)
from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.int_matmul import int_matmul
from vllm_ascend_ct.ops.emulated.weights import (
    truncate_to_fp19,
    unpack_int4,
    unpack_quant_param,
)

# Rounding of the dequantized weight and of the result.
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def integers(weight: torch.Tensor) -> torch.Tensor:
    """`[K, N]` in float64, from a weight in any of the operator's layouts."""
    if weight.dtype == torch.int8:
        return weight.double()
    if weight.is_contiguous():
        return unpack_int4(weight).double()
    return unpack_int4(weight.t()).t().double()


def weight_quant_formula(call: Call) -> torch.Tensor:
    activations, weight, scale, offset = call.args
    values = integers(weight)
    repeats = values.shape[0] // scale.shape[0]
    scale = scale.double().repeat_interleave(repeats, dim=0)
    offset = offset.double().repeat_interleave(repeats, dim=0)
    return activations.double() @ ((values + offset) * scale)


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32, 64])
def test_weight_quant_batchmatmul(dtype: torch.dtype, bits: int, group: int) -> None:
    call = weight_quant_call(dtype, bits, group)
    result = call.run()
    assert result.dtype == dtype and result.shape == (M, N)
    assert relative_error(result, weight_quant_formula(call)) < TOLERANCES[dtype]


@DTYPES
def test_weight_quant_batchmatmul_contiguous_weights(dtype: torch.dtype) -> None:
    for weight, group in itertools.product(
        (packed_int4(K, N // 8), int8(K, N)), (0, 32)
    ):
        shape = (K // group if group else 1, N)
        parameters = scales(*shape, dtype=dtype), torch.randn(shape).to(dtype)
        call = Call(
            "npu_weight_quant_batchmatmul",
            [x(dtype), weight, *parameters],
            {"antiquant_group_size": group},
        )
        expected = weight_quant_formula(call)
        assert relative_error(call.run(), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(N,), (1, N), (1,), (1, 1)], ids=str)
def test_weight_quant_batchmatmul_shapes_of_one_group(shape: tuple[int, ...]) -> None:
    call = weight_quant_call(group=0)
    call.args[2], call.args[3] = scales(*shape, dtype=torch.bfloat16), None
    weight = integers(call.args[1]) * call.args[2].double()
    expected = call.args[0].double() @ weight
    assert relative_error(call.run(), expected) < 3e-3


@DTYPES
def test_weight_quant_batchmatmul_bias(dtype: torch.dtype) -> None:
    call = weight_quant_call(dtype)
    bias_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    # A bias that bf16 represents exactly, and one that it does not.
    for bias in (torch.arange(N) * 8.0, torch.randn(N) * 100):
        call.kwargs["bias"] = bias.to(bias_dtype)
        expected = weight_quant_formula(call) + call.kwargs["bias"].double()
        assert relative_error(call.run(), expected) < TOLERANCES[dtype]


def test_weight_quant_batchmatmul_fp16_rounds_after_each_step() -> None:
    weight = torch.tensor([[100, 101]], dtype=torch.int8).repeat(1, 16)
    scale, offset = torch.tensor([[0.3333]]).half(), torch.tensor([[0.3]]).half()
    one_hot = torch.eye(32).half()
    result = torch.ops.npu.npu_weight_quant_batchmatmul(
        one_hot, weight.t(), scale, offset
    )
    assert torch.equal(result, ((weight.half() + offset) * scale).t())


def test_derived_weights_follow_changes_and_die_with_their_source() -> None:
    derived.clear()
    call = weight_quant_call()
    before = call.run()
    assert torch.equal(call.run(), before)
    assert len(derived) == 1
    call.args[1].bitwise_xor_(0x11111111)
    after = call.run()
    assert not torch.equal(after, before)
    assert relative_error(after, weight_quant_formula(call)) < 3e-3
    assert len(derived) == 1
    # vLLM writes weights in this way when it loads others into a running engine.
    call.args[1].data.bitwise_xor_(0x22222222)
    assert relative_error(call.run(), weight_quant_formula(call)) < 3e-3
    other = weight_quant_call()
    del call
    other.run()
    assert len(derived) == 1


def test_int_matmul_is_exact_at_the_extremes() -> None:
    x1 = torch.full((3, 4096), -128, dtype=torch.int8)
    x2 = torch.full((16, 4096), -128, dtype=torch.int8).t()
    assert int_matmul(x1, x2).eq(128 * 128 * 4096).all()


def accumulator(call: Call) -> torch.Tensor:
    return call.args[0].double() @ call.args[1].double()


def test_quant_matmul_int32_is_exact() -> None:
    call = quant_matmul_call(torch.int32, pertoken=False)
    bias = torch.randint(-1000, 1000, (N,), dtype=torch.int32)
    call.kwargs["bias"] = bias
    assert torch.equal(call.run().double(), accumulator(call) + bias)


@DTYPES
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_quant_matmul_pertoken(
    dtype: torch.dtype, bias_dtype: torch.dtype | None, transposed: bool
) -> None:
    call = quant_matmul_call(dtype)
    call.args[2] *= 1e-3
    if not transposed:
        call.args[1] = call.args[1].contiguous()
    product = accumulator(call)
    expected_bias: torch.Tensor | float = 0.0
    if bias_dtype is not None:
        bias = (torch.randn(N) * 100).to(bias_dtype)
        call.kwargs["bias"] = bias
        if bias_dtype == torch.int32:
            product += bias
        else:
            expected_bias = bias.double()
    scale = call.args[2].double() * call.kwargs["pertoken_scale"].double().unsqueeze(1)
    expected = product * scale + expected_bias
    # One rounding to the result; roundings in fp32 are negligible.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(
        call.run().double(), expected, rtol=0.5 * ulp * 1.01, atol=1e-6
    )


def test_quant_matmul_bfloat16_keeps_the_whole_scale() -> None:
    call = quant_matmul_call(torch.bfloat16, pertoken=False)
    expected = accumulator(call) * call.args[2].double()
    torch.testing.assert_close(call.run().double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_quant_matmul_float16_sees_ten_bits_of_the_scale(packed: bool) -> None:
    call = quant_matmul_call(torch.float16, pertoken=False)
    call.args[2] *= 1e-3
    expected = accumulator(call) * truncate_to_fp19(call.args[2]).double()
    if packed:
        call.args[2] = torch.ops.npu.npu_trans_quant_param(call.args[2])
    torch.testing.assert_close(
        call.run().double(), expected, rtol=2**-11 * 1.01, atol=1e-6
    )


def test_quant_matmul_int8_is_the_default() -> None:
    call = quant_matmul_call(pertoken=False)
    call.kwargs = {"offset": torch.tensor([2.5])}
    call.args[2] *= 3e-3
    scale = truncate_to_fp19(call.args[2]).double()
    expected = (accumulator(call) * scale + 2.5).round().clamp(-128, 127)
    result = call.run()
    assert result.dtype == torch.int8
    assert (result.double() - expected).abs().max() <= 1
    assert {result.min().item(), result.max().item()} == {-128, 127}


@DTYPES
@pytest.mark.parametrize("group", [0, 256])
def test_quant_matmul_int8_by_int4(dtype: torch.dtype, group: int) -> None:
    """The two halves and the assist term add up to the exact product."""
    call = a8w4_call(dtype, group, k=1024)
    scale, _ = unpack_quant_param(call.args[2].reshape(-1, N))
    weight = unpack_int4(call.args[1]).double().view(len(scale), -1, N)
    weight = (weight * scale.double().unsqueeze(1)).view(-1, N)
    product = call.args[0].double() @ weight
    expected = product * call.kwargs["pertoken_scale"].double().reshape(-1, 1)
    # Groups are summed in fp16; one rounding to the result.
    assert relative_error(call.run(), expected) < TOLERANCES[dtype]


def test_quant_matmul_int8_by_int4_needs_the_assist_term() -> None:
    call = a8w4_call()
    right = call.run()
    call.kwargs["offset"] = torch.zeros(N)
    assert relative_error(call.run(), right.double()) > 0.01
