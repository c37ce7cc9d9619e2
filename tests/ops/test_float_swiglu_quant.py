# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The fused gate of floating-point experts on A5, compared with its parts."""

from typing import Any

import pytest
import torch

from tests.ops.calls import (
    EXPERTS,
    GROUPED_ROWS,
    Call,
    changed,
    float_swiglu_quant_call,
    fp8,
)
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.dtypes import E2M1, FP8
from vllm_ascend_ct.ops.emulated.mx_values import decode

KINDS = ["fp8", "mxfp8", "mxfp4"]
ROWS = sum(GROUPED_ROWS)
# Half the distance of adjacent values, relative to a value, and to the largest for the
# smallest ones; and from which part of the largest on values may saturate: at 448 of up
# to 512, and 6 of up to 8.
ROUNDING = {
    "fp8": (2**-4, 2**-18, 1.0),
    "mxfp8": (2**-4, 2**-18, 448 / 512),
    "mxfp4": (2**-2, 2**-4, 6 / 8),
}


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


def gated(call: Call) -> torch.Tensor:
    """SwiGLU of the products in float64 `[M, I]`, of the rows that have experts."""
    x, (weight,), (scale,), of_rows, ends = call.args
    found, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        rows, factors = x[start:end], of_rows[start:end]
        if scale.dim() == 2:
            values = rows.double() * factors.double().unsqueeze(1)
            matrix = weight[expert].double() * scale[expert].double()
        else:
            values = decode(rows, factors).double()
            stored = weight[expert].t().contiguous(), scale[expert].transpose(0, 1)
            matrix = decode(*stored).double().t()
        gate, up = (values @ matrix).chunk(2, dim=1)
        found.append(gate * gate.sigmoid() * up)
        start = end
    return torch.cat(found)


@pytest.mark.parametrize("by_counts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_rows_are_quantized(kind: str, by_counts: bool) -> None:
    call = float_swiglu_quant_call(kind, spare=2)
    expected = gated(call)
    if by_counts:
        call.args[4] = torch.tensor(GROUPED_ROWS)
        call.kwargs["group_list_type"] = 1
    q, scale = call.run()
    if kind == "fp8":
        torch.testing.assert_close(
            scale[:ROWS].double(), expected.abs().amax(1) / 448, rtol=1e-5, atol=0
        )
        assert q.dtype == FP8 and scale[ROWS:].isnan().all()
        values = q[:ROWS].double() * scale[:ROWS].double().unsqueeze(1)
    else:
        values = decode(q[:ROWS], scale[:ROWS]).double()
    block = 32 if len(scale.shape) == 3 else expected.shape[1]
    largest = expected.unflatten(1, (-1, block)).abs().amax(2)
    largest = largest.repeat_interleave(block, 1)
    half_step, smallest, top = ROUNDING[kind]
    bound = expected.abs() * half_step + largest * smallest
    saturates = expected.abs() > top * largest
    bound = torch.where(saturates, largest * (1 - top), bound)
    assert ((values - expected).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_as_its_parts(kind: str) -> None:
    """But for the rounding to 16 bits between them, which here changes few values."""
    call = float_swiglu_quant_call(kind, spare=0)
    q, scale = call.run()
    x, weight, of_weight, of_rows, ends = call.args
    options = call.kwargs
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        weight,
        scale=of_weight,
        per_token_scale=[of_rows],
        group_list=ends,
        group_list_type=0,
        group_type=0,
        split_item=2,
        output_dtype=torch.float16 if kind == "fp8" else torch.bfloat16,
        x_dtype=options.get("x_dtype"),
        weight_dtype=options.get("weight_dtype"),
        scale_dtype=options.get("weight_scale_dtype"),
        per_token_scale_dtype=options.get("x_scale_dtype"),
    )
    hidden = torch.ops.npu.npu_swiglu(product)
    if kind == "fp8":
        parts, of_parts = torch.ops.npu.npu_dynamic_quant(hidden, dst_type=FP8)
        torch.testing.assert_close(scale, of_parts, rtol=2e-3, atol=0)
    else:
        parts, of_parts = torch.ops.npu.npu_dynamic_mx_quant(
            hidden, dst_type=options["quant_dtype"]
        )
        assert (scale == of_parts).double().mean() > 0.95
    assert q.dtype == parts.dtype and q.shape == parts.shape
    assert (q.view(torch.uint8) == parts.view(torch.uint8)).double().mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("fp8", {"quant_dtype": 1}, "quant_dtype=1; emulated: the format of x"),
        ("mxfp4", {"quant_dtype": FP8}, "quant_dtype=24; emulated: the format of x"),
        ("fp8", {"quant_dtype": E2M1}, "dtype number 296 is not emulated"),
        ("fp8", {"dequant_dtype": torch.bfloat16}, "dequant_dtype=15"),
        ("fp8", {"dequant_mode": 2}, "dequant_mode=2, quant_mode=0"),
        ("mxfp8", {"quant_mode": 0}, "dequant_mode=2, quant_mode=0"),
        ("mxfp8", {"x_scale_dtype": None}, "dtypes of scales"),
        ("fp8", {"smooth_scale": torch.ones(EXPERTS)}, "smooth_scale.* of floating"),
        ("fp8", {"weight_assist_matrix": []}, "weight_assist_matrix of floating"),
    ],
)
def test_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorLimitError, match=message):
        changed(float_swiglu_quant_call(kind), **changes).run()


def test_sizes_are_refused() -> None:
    call = float_swiglu_quant_call("fp8")
    call.args[1] = [fp8(EXPERTS, call.args[0].shape[1], 47)]
    call.args[2] = [call.args[2][0][:, :47].contiguous()]
    with pytest.raises(OperatorLimitError, match="N=47; supported: multiples of 2"):
        call.run()
    call = float_swiglu_quant_call("mxfp8")
    call.args[1] = [
        call.args[1][0].transpose(1, 2)[:, :64].contiguous().transpose(1, 2)
    ]
    scale = call.args[2][0].transpose(1, 2)[:, :64].contiguous()
    call.args[2] = [scale.transpose(1, 2)]
    with pytest.raises(OperatorLimitError, match="N=64; supported: multiples of 128"):
        call.run()
