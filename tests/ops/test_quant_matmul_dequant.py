# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The 310P's operators that quantize activations and multiply."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.ops.calls import (
    EXPERTS,
    GROUPED_ROWS,
    Call,
    K,
    M,
    N,
    changed,
    int8,
    quant_grouped_matmul_dequant_call,
    quant_matmul_dequant_call,
    scales,
)
from vllm_ascend_ct.errors import OperatorLimitError


@pytest.fixture(autouse=True)
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")


def test_product_is_the_formula() -> None:
    call = quant_matmul_dequant_call()
    x, weight, weight_scale = (arg.double() for arg in call.args)
    x[0] = call.args[0][0] = 0
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    q = torch.where(scale > 0, x / scale, 0).round()
    expected = q @ weight.t() * weight_scale * scale
    y = call.run()
    assert y.dtype == torch.float16
    # One rounding to fp16; no quantized x is close to a tie.
    torch.testing.assert_close(y.double(), expected, rtol=2**-10, atol=1e-6)


def _grouped_whole() -> Call:
    return quant_grouped_matmul_dequant_call(spare=0)


def test_grouped_product_is_the_formula() -> None:
    """Includes an expert without rows. Rows without an expert are unspecified."""
    call = quant_grouped_matmul_dequant_call()
    x, weight, weight_scale, ends = call.args
    y = call.run()
    *of_experts, spare = y.split([*GROUPED_ROWS, 1])
    assert spare.isnan().all() and y.dtype == torch.float16
    assert ends.tolist() == [3, 3, 7, 8] and len(of_experts) == EXPERTS
    rows = x.double().split([*GROUPED_ROWS, 1])
    for found, values, w, s in zip(of_experts, rows, weight, weight_scale):
        scale = values.abs().amax(1, keepdim=True) / 127
        q = (values / scale).round()
        expected = q @ w.double().t() * s.double() * scale
        torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-6)


@pytest.mark.skipif(
    find_spec("torch_npu") is not None, reason="torch_npu has its own meta functions"
)
@pytest.mark.parametrize("make", [quant_matmul_dequant_call, _grouped_whole])
def test_schema_and_fake(make: Callable[[], Call]) -> None:
    call = make()
    operator = getattr(torch.ops.npu, call.operator).default
    torch.library.opcheck(operator, tuple(call.args), call.kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ({0: torch.randn(M, K)}, {}, "x dtype torch.float32"),
        ({0: torch.randn(M, K // 2).half()}, {}, r"x is float16 .*\[M, 128\]"),
        ({1: int8(K, N).t()}, {}, "quantized_weight is .* contiguous"),
        ({1: int8(40, K), 2: scales(40)}, {}, "N=40; supported: multiples of 16"),
        ({2: scales(N).half()}, {}, "weight_scale is float16"),
        ({}, {"quant_mode": "pertensor"}, "quant_mode=pertensor"),
        ({}, {"bias": torch.zeros(N).int()}, "without bias"),
    ],
)
def test_refused(args: dict[int, Any], kwargs: dict[str, Any], reason: str) -> None:
    call = changed(quant_matmul_dequant_call(), args, **kwargs)
    with pytest.raises(OperatorLimitError, match=f"on 310P .*{reason}"):
        call.run()


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ({0: torch.randn(9, K)}, {}, "x dtype torch.float32"),
        ({1: int8(EXPERTS, K, N).transpose(1, 2)}, {}, "quantized_weight is .* contig"),
        ({1: int8(N, K)}, {}, r"quantized_weight is .* \[E, N, K\]"),
        ({1: int8(EXPERTS, 40, K), 2: scales(EXPERTS, 40)}, {}, "N=40; supported: mul"),
        ({2: scales(N)}, {}, "weight_scale is float32"),
        ({3: torch.tensor([3, 3, 7, 8]).int()}, {}, "group_list is int32"),
        ({3: torch.tensor([3, 0, 4, 1])}, {}, "group_list=.*; supported: ascending"),
        ({3: torch.tensor([3, 3, 7, 10])}, {}, "group_list=.*; .* up to 9"),
        ({}, {"smooth_scale": torch.zeros(K).half()}, "without bias"),
    ],
)
def test_grouped_refused(
    args: dict[int, Any], kwargs: dict[str, Any], reason: str
) -> None:
    call = changed(quant_grouped_matmul_dequant_call(), args, **kwargs)
    with pytest.raises(OperatorLimitError, match=f"on 310P .*{reason}"):
        call.run()


@pytest.mark.parametrize(
    "make", [quant_matmul_dequant_call, quant_grouped_matmul_dequant_call]
)
@pytest.mark.parametrize("soc", ["A2", "A5"])
def test_other_chips_lack_it(
    monkeypatch: pytest.MonkeyPatch, soc: str, make: Callable[[], Call]
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    with pytest.raises(OperatorLimitError, match="does not have this operator"):
        make().run()
