# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operators that the kernels call, with their arguments."""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture, MockType

from vllm_ascend_ct.kernels.linear import functional

M, K, N, G = 4, 128, 48, 4


@pytest.fixture
def npu(mocker: MockerFixture) -> MockType:
    """`torch.ops.npu` that records calls; its results have the right shapes."""

    def quant_results(count: int) -> Any:
        def results(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rows = [torch.rand(x.shape[0]) for _ in range(count)]
            return (torch.zeros(x.shape, dtype=torch.int8), *rows)

        return results

    def quant_matmul(x: torch.Tensor, weight: torch.Tensor, *_: Any, **kw: Any) -> Any:
        return torch.zeros(x.shape[0], weight.shape[1], dtype=kw["output_dtype"])

    npu = mocker.patch.object(torch.ops, "npu", mocker.MagicMock())
    npu.npu_dynamic_quant.side_effect = quant_results(1)
    npu.npu_dynamic_quant_asymmetric.side_effect = quant_results(2)
    npu.npu_quantize.side_effect = lambda x, *_: torch.zeros(x.shape, dtype=torch.int8)
    npu.npu_quant_matmul.side_effect = quant_matmul
    npu.npu_weight_quant_batchmatmul.side_effect = lambda x, *_, **__: x.new_zeros(
        x.shape[0], N
    )
    return npu


def called(npu: MockType) -> list[str]:
    return [call[0] for call in npu.method_calls]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(M, K).bfloat16()


@pytest.fixture
def int8_weight() -> torch.Tensor:
    return torch.randint(-128, 128, (N, K), dtype=torch.int8).t()


def test_weight_quant_matmul(npu: MockType, x: torch.Tensor) -> None:
    weight = torch.zeros(N, K // 8, dtype=torch.int32).t()
    scale, offset = torch.rand(N, G).t(), torch.rand(N, G).t()
    bias = torch.rand(N)
    functional.weight_quant_matmul(x, weight, scale, offset, bias, K // G)
    assert called(npu) == ["npu_weight_quant_batchmatmul"]
    args, kwargs = npu.npu_weight_quant_batchmatmul.call_args
    assert torch.equal(args[0], x)
    assert args[1] is weight and args[2] is scale
    assert kwargs == {
        "antiquant_offset": offset,
        "bias": bias,
        "antiquant_group_size": K // G,
    }


def test_weight_quant_matmul_defaults(npu: MockType, x: torch.Tensor) -> None:
    functional.weight_quant_matmul(x, torch.zeros(K, N).char(), torch.rand(1, N))
    kwargs = npu.npu_weight_quant_batchmatmul.call_args.kwargs
    assert kwargs == {"antiquant_offset": None, "bias": None, "antiquant_group_size": 0}


@pytest.mark.parametrize("bias", [None, torch.rand(N)], ids=["no-bias", "bias"])
def test_dynamic_quant_matmul(
    npu: MockType,
    x: torch.Tensor,
    int8_weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    scale = torch.rand(N)
    functional.dynamic_quant_matmul(x, int8_weight, scale, bias)
    assert called(npu) == ["npu_dynamic_quant", "npu_quant_matmul"]
    (quantized,), options = npu.npu_dynamic_quant.call_args
    assert torch.equal(quantized, x) and options == {}
    args, kwargs = npu.npu_quant_matmul.call_args
    assert args[0].dtype == torch.int8 and args[0].shape == (M, K)
    assert args[1] is int8_weight and args[2] is scale
    assert set(kwargs) == {"pertoken_scale", "bias", "output_dtype"}
    assert kwargs["pertoken_scale"].dtype == torch.float32
    assert kwargs["pertoken_scale"].shape == (M,)
    assert kwargs["bias"] is bias
    assert kwargs["output_dtype"] == torch.bfloat16


def test_dynamic_asymmetric_quant_matmul(
    npu: MockType, x: torch.Tensor, int8_weight: torch.Tensor
) -> None:
    scale, weight_sum = torch.rand(N), torch.rand(N)
    y = functional.dynamic_asymmetric_quant_matmul(x, int8_weight, scale, weight_sum)
    assert y.dtype == torch.bfloat16
    assert called(npu) == ["npu_dynamic_quant_asymmetric", "npu_quant_matmul"]
    args, kwargs = npu.npu_quant_matmul.call_args
    assert args[1] is int8_weight and args[2] is scale
    assert kwargs == {"output_dtype": torch.int32}


@pytest.mark.parametrize("zero_point", [None, torch.tensor([3], dtype=torch.int32)])
def test_static_quant_matmul(
    npu: MockType,
    x: torch.Tensor,
    int8_weight: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> None:
    dequant_scale, x_scale = torch.rand(N), torch.rand(1)
    bias = torch.zeros(N, dtype=torch.int32)
    functional.static_quant_matmul(
        x, int8_weight, dequant_scale, x_scale, zero_point, bias
    )
    assert called(npu) == ["npu_quantize", "npu_quant_matmul"]
    args, options = npu.npu_quantize.call_args
    assert torch.equal(args[0], x)
    assert args[1] is x_scale and args[2] is zero_point
    assert args[3:] == (torch.qint8, -1, True) and options == {}
    args, kwargs = npu.npu_quant_matmul.call_args
    assert args[1] is int8_weight and args[2] is dequant_scale
    assert kwargs == {"bias": bias, "output_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "function",
    [functional.weight_quant_matmul, functional.dynamic_quant_matmul],
)
def test_operators_see_matrices(
    npu: MockType, int8_weight: torch.Tensor, function: Any
) -> None:
    y = function(torch.randn(2, 3, K).bfloat16(), int8_weight, torch.rand(N))
    assert y.shape == (2, 3, N)
    assert npu.method_calls[0].args[0].shape == (6, K)


def test_more_outputs_than_the_operator_takes_at_once() -> None:
    """With the emulated operator, the parts equal the whole result."""
    x = torch.randn(3, K).bfloat16()
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8).t()
    scale = torch.rand(N, G).bfloat16().t()
    offset = torch.randn(N, G).bfloat16().t()
    bias = torch.randn(N)
    operands = x, weight, scale, offset, bias, K // G
    whole = functional.weight_quant_matmul(*operands, max_n=N)
    for max_n in (N - 1, 20, 7):
        parts = functional.weight_quant_matmul(*operands, max_n=max_n)
        torch.testing.assert_close(parts, whole)
