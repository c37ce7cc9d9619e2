# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.formula import relative_error
from tests.ops.calls import (
    EXPERTS,
    GROUPED_ROWS,
    Call,
    N,
    grouped_call,
    swiglu_quant_call,
)
from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.emulated.weights import unpack_int4

BF16, FP16 = torch.bfloat16, torch.float16
INT8, INT4 = torch.int8, torch.int32
TOLERANCES = {BF16: 3e-3, FP16: 5e-4}


def weights(call: Call) -> torch.Tensor:
    """Dequantized weights, float64 `[E, K, N]`."""
    weight = call.args[1][0]
    integers = unpack_int4(weight) if weight.dtype == INT4 else weight
    kwargs = call.kwargs
    if "antiquant_scale" in kwargs:
        scale, offset = kwargs["antiquant_scale"][0], kwargs["antiquant_offset"][0]
    else:
        scale, offset = kwargs["scale"][0], None
        if scale.dtype == torch.int64:
            scale = scale.int().view(torch.float32)
    scale = scale.double().view(EXPERTS, -1, 1, N)
    grouped = integers.double().view(EXPERTS, scale.shape[1], -1, N)
    if offset is not None:
        grouped = grouped + offset.double().view(EXPERTS, -1, 1, N)
    return (grouped * scale).view(EXPERTS, -1, N)


def expected(call: Call) -> torch.Tensor:
    x, dequantized = call.args[0][0].double(), weights(call)
    of_row = torch.arange(EXPERTS).repeat_interleave(torch.tensor(GROUPED_ROWS))
    rows = torch.stack([row @ dequantized[e] for row, e in zip(x, of_row)])
    if "per_token_scale" in call.kwargs:
        scale = call.kwargs["per_token_scale"][0].double()
        rows = rows * scale[: len(rows)].unsqueeze(1)
    return rows


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "group"),
    [(None, INT8, 0), (None, INT4, 0), (None, INT4, 64), (None, INT4, 48)]
    + [(INT8, INT8, 0), (INT8, INT4, 0), (INT8, INT4, 256)],
)
def test_rows_are_multiplied_by_their_expert(
    x_dtype: torch.dtype | None,
    weight_dtype: torch.dtype,
    group: int,
    dtype: torch.dtype,
) -> None:
    k = 480 if group == 48 else 512
    call = grouped_call(x_dtype or dtype, weight_dtype, dtype, group, k)
    (result,) = call.run()
    rows = sum(GROUPED_ROWS)
    assert relative_error(result[:rows], expected(call)) < TOLERANCES[dtype]
    # Rows of no expert are poisoned.
    assert result.dtype == dtype and result[rows:].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_weights_of_16_bits(
    dtype: torch.dtype, with_bias: bool, transposed: bool
) -> None:
    counts = torch.tensor(GROUPED_ROWS)
    x = torch.randn(int(counts.sum()), 96).to(dtype)
    weight = torch.randn(EXPERTS, 96, N).to(dtype)
    wide = torch.float32 if dtype == BF16 else dtype
    bias = torch.randn(EXPERTS, N).to(wide) if with_bias else None
    given = weight.mT.contiguous().mT if transposed else weight
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        [given],
        bias=None if bias is None else [bias],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    of_row = torch.arange(EXPERTS).repeat_interleave(counts)
    expected = (x.double().unsqueeze(1) @ weight.double()[of_row])[:, 0]
    if bias is not None:
        expected += bias.double()[of_row]
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCES[dtype]


def test_cumulative_counts() -> None:
    call = grouped_call(INT8, INT8, BF16)
    (counted,) = call.run()
    call.kwargs["group_list"] = call.kwargs["group_list"].cumsum(0)
    call.kwargs["group_list_type"] = 0
    assert torch.equal(call.run()[0].nan_to_num(), counted.nan_to_num())


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"), [(BF16, INT8), (BF16, INT4), (INT8, INT8)]
)
def test_transposed_view(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    call = grouped_call(x_dtype, weight_dtype, BF16)
    (before,) = call.run()
    weight = call.args[1][0]
    if weight_dtype == INT4:
        nibbles = unpack_int4(weight).transpose(1, 2).int().flatten(0, 1)
        packed = torch.ops.npu.npu_convert_weight_to_int4pack(nibbles.contiguous())
        view = packed.view(EXPERTS, N, -1).transpose(1, 2)
    else:
        view = weight.transpose(1, 2).contiguous().transpose(1, 2)
    call.args[1] = [view]
    torch.testing.assert_close(call.run()[0], before, equal_nan=True)


def test_int32_bias_is_added_to_the_accumulator() -> None:
    call = grouped_call(INT8, INT8, FP16)
    bias = torch.randint(-(10**4), 10**4, (EXPERTS, N), dtype=torch.int32)
    call.kwargs["bias"] = [bias]
    of_row = torch.arange(EXPERTS).repeat_interleave(torch.tensor(GROUPED_ROWS))
    added = bias[of_row].double() * call.kwargs["scale"][0][of_row].double()
    tokens = call.kwargs["per_token_scale"][0][: len(of_row)].double().unsqueeze(1)
    result = call.run()[0][: len(of_row)]
    assert relative_error(result, expected(call) + added * tokens) < TOLERANCES[FP16]


def changed(call: Call, **kwargs: Any) -> Call:
    call.kwargs.update(kwargs)
    return call


def a8w8(**kwargs: Any) -> Call:
    return changed(grouped_call(INT8, INT8, BF16), **kwargs)


def a8w4(group: int = 256, k: int = 512, **kwargs: Any) -> Call:
    return changed(grouped_call(INT8, INT4, BF16, group, k), **kwargs)


def a16w8(**kwargs: Any) -> Call:
    return changed(grouped_call(BF16, INT8, BF16), **kwargs)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: a8w8(group_type=None), "group_type=None"),
        (lambda: a8w8(split_item=0), "split_item=0"),
        (lambda: a8w8(act_type=5), "act_type=5"),
        (lambda: a8w8(output_dtype=None), "output dtype torch.int8"),
        (lambda: a8w8(output_dtype=FP16), "scale is bfloat16"),
        (lambda: a8w8(group_list=torch.tensor([1])), r"group_list is int64 \(1,\)"),
        (lambda: a8w8(bias=[torch.zeros(EXPERTS, N)]), "bias is float32"),
        (lambda: a8w8(tuning_config=[1]), "tuning_config"),
        (lambda: a16w8(antiquant_offset=None), "antiquant_offset is missing"),
        (lambda: a16w8(per_token_scale=[torch.ones(9)]), "per_token_scale is float32"),
        (
            lambda: grouped_call(BF16, INT8, BF16, 64),
            "group_size=64; supported: per",
        ),
        (lambda: grouped_call(BF16, INT4, BF16, 51, 510), "group_size=51; .* even"),
        (lambda: grouped_call(BF16, INT4, BF16, 100), "group_size=103 of .* whole"),
        (lambda: a8w4(group_list_type=0), r"group_list_type=0; supported: \(1,\)"),
        (lambda: a8w4(bias=None), "bias is missing"),
        (lambda: a8w4(group=128), "group_size=128; supported: per channel, 256"),
        (lambda: a8w4(group=0, k=480), "K=480; supported: multiples of 64 to 18432"),
        (lambda: a8w4(scale=[torch.ones(EXPERTS, N).long()]), "scale is int64"),
    ],
)
def test_refused(call: Callable[[], Call], reason: str) -> None:
    with pytest.raises(OperatorLimitError, match=reason):
        call().run()


@pytest.mark.parametrize(("soc", "served"), [("A5", 2), ("310P", 0)])
def test_modes_of_other_chips(
    monkeypatch: pytest.MonkeyPatch, soc: str, served: int
) -> None:
    calls = [a8w8(), a16w8(), a8w4()]
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    for call in calls[:served]:
        call.run()
    for call in calls[served:]:
        with pytest.raises(OperatorLimitError, match="emulated: "):
            call.run()


@pytest.mark.parametrize(("dtype", "group"), [(INT8, 0), (INT4, 0), (INT4, 256)])
@pytest.mark.parametrize("cumulative", [False, True])
def test_gated_rows_are_quantized(
    dtype: torch.dtype, group: int, cumulative: bool
) -> None:
    call = swiglu_quant_call(dtype, group)
    x, weight, scale, tokens, counts = call.args
    product = Call("", [[x], weight], {"scale": scale, "per_token_scale": [tokens]})
    gate, up = expected(product).chunk(2, dim=1)
    gated = gate * gate.sigmoid() * up
    if cumulative:
        call.args[4], call.kwargs["group_list_type"] = counts.cumsum(0), 0
    q, scales = call.run()
    rows = len(gated)
    amax = gated.abs().amax(1)
    # The int4 products sum in fp16.
    tolerance = 1e-5 if dtype == INT8 else 2e-3
    torch.testing.assert_close(
        scales[:rows].double(), amax / 127, rtol=tolerance, atol=0
    )
    steps = (q[:rows].double() - gated * (127 / amax).unsqueeze(1)).abs()
    assert steps.max() <= 0.5 + 127 * tolerance
    assert scales[rows:].isnan().all()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"smooth_scale": torch.ones(EXPERTS)}, "smooth_scale=.* is not emulated"),
        ({"quant_dtype": 0}, "quant_dtype=0"),
        ({"group_list_type": 2}, "group_list_type=2"),
        ({"dequant_mode": 0}, r"weight_scale is int64 \(4, 2, 48\)"),
        ({"weight_assist_matrix": None}, "weight_assist_matrix is missing"),
    ],
)
def test_gated_refused(call: dict[str, Any], reason: str) -> None:
    with pytest.raises(OperatorLimitError, match=reason):
        changed(swiglu_quant_call(INT4, 256), **call).run()


def test_gated_int8_has_to_be_in_nz() -> None:
    call = swiglu_quant_call(INT8)
    call.args[1] = [torch.ops.npu.npu_format_cast(call.args[1][0], 2)]
    with pytest.raises(OperatorLimitError, match="in ND; supported: FRACTAL_NZ"):
        call.run()


def test_gated_int8_has_no_assist_and_no_groups() -> None:
    assist = [torch.ones(EXPERTS, N)]
    with pytest.raises(OperatorLimitError, match="weight_assist_matrix is float32"):
        changed(swiglu_quant_call(INT8), weight_assist_matrix=assist).run()
    with pytest.raises(OperatorLimitError, match="weight_scale is float32"):
        changed(swiglu_quant_call(INT8), dequant_mode=1).run()
