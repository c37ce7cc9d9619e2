# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops.calls import (
    EXPERTS,
    TOKENS,
    TOP_K,
    Call,
    K,
    choices,
    finalize_call,
    init_routing_call,
    scales,
    unpermute_call,
)
from vllm_ascend_ct.errors import OperatorLimitError


def sorted_choices(call: Call, start: int, end: int) -> list[int]:
    """Flat (token, choice) of each row, by ascending expert, tokens in order."""
    experts = call.args[1].flatten().tolist()
    active = [flat for flat, expert in enumerate(experts) if start <= expert < end]
    return sorted(active, key=lambda flat: experts[flat])


@pytest.mark.parametrize("active", [(0, EXPERTS), (1, 3)])
@pytest.mark.parametrize("cumulative", [False, True])
def test_rows_are_sorted_by_expert(active: tuple[int, int], cumulative: bool) -> None:
    call = init_routing_call(-1, active_expert_range=list(active))
    call.kwargs["expert_tokens_num_type"] = 0 if cumulative else 1
    rows, index, counts, _ = call.run()
    order = sorted_choices(call, *active)
    assert torch.equal(
        rows[: len(order)], call.args[0][[flat // TOP_K for flat in order]]
    )
    # Unwritten rows are poisoned.
    assert rows[len(order) :].isnan().all()
    expected = [order.index(f) if f in order else -1 for f in range(TOKENS * TOP_K)]
    assert index.tolist() == expected
    of_expert = [call.args[1].eq(expert).sum().item() for expert in range(*active)]
    assert counts.dtype == torch.int64
    assert counts.tolist() == (
        [sum(of_expert[: n + 1]) for n in range(len(of_expert))]
        if cumulative
        else of_expert
    )


def test_quantized_rows_are_copied_with_their_scales() -> None:
    call = init_routing_call(-1, scale=scales(TOKENS), x_dtype=torch.int8)
    call.args[0] = torch.randint(-128, 128, (TOKENS, K), dtype=torch.int8)
    rows, _, _, row_scale = call.run()
    tokens = [flat // TOP_K for flat in sorted_choices(call, 0, EXPERTS)]
    assert rows.dtype == torch.int8 and torch.equal(rows, call.args[0][tokens])
    assert torch.equal(row_scale, call.kwargs["scale"][tokens])


def test_scattered_index() -> None:
    call = init_routing_call(-1, row_idx_type=1)
    assert call.run()[1].tolist() == sorted_choices(call, 0, EXPERTS)


@pytest.mark.parametrize("smooth", [None, 1, EXPERTS])
def test_rows_are_quantized(smooth: int | None) -> None:
    call = init_routing_call()
    call.args[0][0] = 0
    order = sorted_choices(call, 0, EXPERTS)
    values = call.args[0][[flat // TOP_K for flat in order]].double()
    if smooth is not None:
        call.kwargs["scale"] = scales(smooth, K)
        experts = call.args[1].flatten().long()[order]
        rows_of = experts if smooth > 1 else torch.zeros_like(experts)
        values = values * call.kwargs["scale"][rows_of].double()
    rows, _, _, row_scale = call.run()
    amax = values.abs().amax(1)
    torch.testing.assert_close(row_scale.double(), amax / 127)
    # Ties, or the last bit of fp32, may round either way.
    exact = torch.where(amax > 0, 127 / amax, 0).unsqueeze(1) * values
    assert (rows.double() - exact).abs().max() <= 0.5 + 1e-3
    assert rows.dtype == torch.int8 and rows.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_come_back_weighted(dtype: torch.dtype) -> None:
    call = unpermute_call(dtype)
    rows, index, probs = call.args
    expected = (
        rows[index.long()].double().view(TOKENS, TOP_K, K)
        * probs.double().unsqueeze(-1)
    ).sum(1)
    torch.testing.assert_close(
        call.run().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_missing_rows_come_back_as_zeros(dtype: torch.dtype) -> None:
    call = finalize_call(dtype)
    rows, weights, index = call.args[0].flatten(0, 1), call.args[4], call.args[5]
    # The NPU does not write rows that belong to no expert.
    unused = torch.ones(len(rows), dtype=torch.bool)
    unused[index[index >= 0].long()] = False
    rows[unused] = float("nan")
    values = torch.where(index.unsqueeze(1) >= 0, rows[index.long()].double(), 0)
    expected = (values.view(TOKENS, TOP_K, K) * weights.double().unsqueeze(-1)).sum(1)
    # fp16 rounds in each step.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        call.run().double(), expected, rtol=tolerance, atol=tolerance
    )


def test_missing_rows_unweighted() -> None:
    call = finalize_call()
    call.args[4], call.args[6] = None, call.args[6].view(-1, 1)
    rows, index = call.args[0][:, 0], call.args[5].long()
    result = call.run()
    assert torch.equal(result[index >= 0], rows[index[index >= 0]])
    assert result[index < 0].eq(0).all()


def test_there_and_back() -> None:
    call = init_routing_call(-1)
    rows, index, _, _ = call.run()
    probs = torch.full((TOKENS, TOP_K), 1 / TOP_K)
    back = torch.ops.npu.npu_moe_token_unpermute(rows, index, probs)
    assert torch.equal(back, call.args[0])


@pytest.mark.parametrize("index", [-1, 1, TOKENS * TOP_K])
def test_rows_of_weight_0_are_not_read(index: int) -> None:
    """As vllm-ascend has them for experts of other ranks, whose rows nobody wrote."""
    call = unpermute_call()
    rows, order, probs = call.args
    probs.view(-1)[::3] = 0
    unused = order[::3].long()
    expected = call.run()
    assert expected.isfinite().all()
    rows[unused] = float("nan")
    order[::3] = index
    assert torch.equal(call.run(), expected)


def test_rows_are_summed_in_float32_whatever_the_default() -> None:
    call = unpermute_call(torch.float32)
    expected = call.run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = call.run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result, expected)


def test_restore_shape_is_not_read() -> None:
    """vllm-ascend gives it for rows from other ranks."""
    call = unpermute_call()
    expected = call.run()
    call.kwargs["restore_shape"] = [TOKENS, K]
    assert torch.equal(call.run(), expected)


def test_padding_has_weights_of_nan() -> None:
    call = unpermute_call()
    _, order, probs = call.args
    expected = call.run()
    probs[-1] = float("nan")
    order[-TOP_K:] = order[0]
    result = call.run()
    assert torch.equal(result[:-1], expected[:-1]) and result[-1].isnan().all()


def unpermute(args: dict[int, Any]) -> Call:
    call = unpermute_call()
    for position, value in args.items():
        call.args[position] = value
    return call


def finalize(args: dict[int, Any], **kwargs: Any) -> Call:
    call = finalize_call()
    for position, value in args.items():
        call.args[position] = value
    call.kwargs.update(kwargs)
    return call


def routing_of_int8() -> Call:
    call = init_routing_call()
    call.args[0] = call.args[0].to(torch.int8)
    return call


REPEATED = torch.zeros(TOKENS * TOP_K, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: init_routing_call(0), "quant_mode=0"),
        (lambda: init_routing_call(active_expert_range=[]), "active_expert_range="),
        (lambda: init_routing_call(active_expert_range=[0, 5]), r"within \[0, 4\]"),
        (lambda: init_routing_call(expert_tokens_num_flag=False), "num_flag=False"),
        (lambda: init_routing_call(drop_pad_mode=1), "drop_pad_mode=1"),
        (lambda: init_routing_call(active_num=3), "active_num=3; emulated: all 12"),
        (lambda: init_routing_call(scale=scales(2, K)), "scale is float32"),
        (lambda: init_routing_call(-1, scale=scales(1, K)), "scale is float32"),
        (lambda: init_routing_call(-1, x_dtype=torch.int8), "x_dtype=1; emulated"),
        (
            lambda: init_routing_call(row_idx_type=1, active_expert_range=[0, 2]),
            r"row_idx_type=1 of experts \(0, 2\); emulated: all 4",
        ),
        (routing_of_int8, "x dtype torch.int8"),
        (lambda: unpermute({1: REPEATED}), "in range and unique"),
        (lambda: unpermute({1: REPEATED - 1}), "in range and unique"),
        (lambda: unpermute({1: REPEATED.long()}), "int32 1-D"),
        (lambda: unpermute({2: torch.rand(TOKENS, 3)}), "one per index"),
        (lambda: finalize({}, drop_pad_mode=2), "drop_pad_mode=2, k=1; emulated: 3"),
        (lambda: finalize({3: torch.zeros(EXPERTS, K)}), "bias are not emulated"),
        (lambda: finalize({4: torch.rand(TOKENS, TOP_K)}), "scales is float32"),
        (lambda: finalize({6: choices().long()}), "export_for_source_row is int64"),
        (lambda: finalize({6: choices()[1:]}), r"export_for_source_row is int32 \(5,"),
        (lambda: finalize({5: REPEATED - 2}), r"not in \[-1, 12\)"),
        (lambda: finalize({5: REPEATED.long()}), "int32 1-D"),
        (lambda: finalize({0: torch.zeros(1, 12, K)}), "1 experts, top-k=2"),
    ],
)
def test_refused(call: Callable[[], Call], reason: str) -> None:
    with pytest.raises(OperatorLimitError, match=reason):
        call().run()


def test_310p_does_not_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    with pytest.raises(OperatorLimitError, match="quant_mode=1"):
        init_routing_call().run()
