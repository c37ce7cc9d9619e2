# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operators that experts call, with their arguments."""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture, MockType

from vllm_ascend_ct.fused_moe import functional
from vllm_ascend_ct.fused_moe.functional import Operands

T, TOP_K, E, H, INTERMEDIATE = 5, 2, 4, 128, 64
M = T * TOP_K
COUNTS = torch.tensor([4, 0, 3, 3])
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def npu(mocker: MockerFixture) -> MockType:
    """`torch.ops.npu` that records calls; its results have the right shapes."""

    def product(rows: list[Any], weight: list[Any], **kwargs: Any) -> list[Any]:
        n = (kwargs.get("antiquant_scale") or kwargs["scale"])[0].shape[-1]
        return [torch.zeros(len(rows[0]), n, dtype=kwargs["output_dtype"])]

    def fused(rows: Any, weight: Any, scale: list[Any], *_: Any, **__: Any) -> Any:
        n = scale[0].shape[-1] // 2
        return torch.zeros(len(rows), n, dtype=torch.int8), torch.zeros(len(rows))

    npu = mocker.patch.object(torch.ops, "npu", mocker.MagicMock())
    npu.npu_grouped_matmul.side_effect = product
    npu.npu_grouped_matmul_swiglu_quant_v2.side_effect = fused
    npu.npu_swiglu.side_effect = lambda x: x[:, : x.shape[1] // 2]
    npu.npu_dynamic_quant.side_effect = lambda x: (x.to(torch.int8), x[:, 0].float())
    npu.npu_moe_init_routing_v2.side_effect = lambda x, *_, **__: (
        x,
        torch.arange(M, dtype=torch.int32),
        COUNTS,
        torch.ones(M),
    )
    return npu


def called(npu: MockType) -> list[str]:
    return [call[0] for call in npu.method_calls]


def operands(weight: torch.dtype, scale: torch.dtype, groups: int = 0) -> Any:
    """Operands of both products; int4 is packed along N, as for int8 rows."""
    packing = 8 if weight == torch.int32 else 1

    def of(k: int, n: int) -> Operands:
        scales = (E, groups, n) if groups else (E, n)
        return Operands(
            torch.zeros(E, k, n // packing, dtype=weight),
            torch.zeros(scales, dtype=scale),
        )

    return of(H, 2 * INTERMEDIATE), of(INTERMEDIATE, H)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("experts", [(0, E), (2, 4)], ids=["all", "some"])
def test_sort_tokens(npu: MockType, quantize: bool, experts: tuple[int, int]) -> None:
    """The range is always passed: without it the operator leaves rows unwritten."""
    x = torch.zeros(T, H)
    topk_ids = torch.zeros(T, TOP_K, dtype=torch.int32)
    functional.sort_tokens(x, topk_ids, experts, E, quantize)
    assert called(npu) == ["npu_moe_init_routing_v2"]
    args, kwargs = npu.npu_moe_init_routing_v2.call_args
    assert args == (x, topk_ids)
    assert kwargs == {
        "active_num": M,
        "expert_num": E,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "quant_mode": 1 if quantize else -1,
        "active_expert_range": list(experts),
    }


def grouped(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Results of the other operators; calls of the grouped matmul are asserted."""
    common = {
        "group_list": COUNTS,
        "group_list_type": 1,
        "group_type": 0,
        "split_item": 2,
        "output_dtype": dtype,
    }
    for name, value in common.items():
        assert kwargs.pop(name) is value or value == 0, name
    return kwargs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only(npu: MockType, dtype: torch.dtype) -> None:
    w13, w2 = operands(torch.int8, dtype, 4)
    offset, bias = torch.zeros(E, 4, H), torch.zeros(E, H)
    w2 = w2._replace(offset=offset, bias=bias)
    rows = torch.zeros(M, H, dtype=dtype)
    hidden = functional.weight_only_gate(rows, COUNTS, w13, None)
    y = functional.weight_only_product(hidden, COUNTS, w2)
    assert y.shape == (M, H) and y.dtype == dtype
    product = "npu_grouped_matmul"
    assert called(npu) == [product, "npu_swiglu", product]
    first, second = npu.npu_grouped_matmul.call_args_list
    assert first.args == ([rows], [w13.weight])
    assert grouped(first.kwargs, dtype) == {
        "bias": None,
        "antiquant_scale": [w13.scale],
        "antiquant_offset": None,
    }
    assert second.args[1] == [w2.weight]
    assert grouped(second.kwargs, dtype) == {
        "bias": [bias],
        "antiquant_scale": [w2.scale],
        "antiquant_offset": [offset],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_other_than_swiglu(npu: MockType, dtype: torch.dtype) -> None:
    rows = torch.zeros(M, H, dtype=dtype)

    def activation(x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]

    w13, _ = operands(torch.int8, dtype)
    functional.weight_only_gate(rows, COUNTS, w13, activation)
    assert "npu_swiglu" not in called(npu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [0, 1, 4])
@pytest.mark.parametrize("weight", [torch.int8, torch.int32], ids=["int8", "int4"])
def test_int8_rows(
    npu: MockType, weight: torch.dtype, groups: int, dtype: torch.dtype
) -> None:
    scale = torch.int64 if weight == torch.int32 else torch.float32
    w13, w2 = operands(weight, scale, groups)
    assist = torch.zeros(E, 2 * INTERMEDIATE)
    if weight == torch.int32:
        w13, w2 = w13._replace(bias=assist), w2._replace(bias=assist)
    rows, row_scale = torch.zeros(M, H, dtype=torch.int8), torch.ones(M)
    gate = (rows, row_scale, COUNTS, w13, dtype, None)
    hidden = functional.int8_gate(*gate, fused=True)
    y = functional.int8_product(*hidden, COUNTS, w2, dtype)
    assert y.shape == (M, H) and y.dtype == dtype
    fused, product = "npu_grouped_matmul_swiglu_quant_v2", "npu_grouped_matmul"
    assert called(npu) == [fused, product]
    args, kwargs = npu.npu_grouped_matmul_swiglu_quant_v2.call_args
    assert args[:4] == (rows, [w13.weight], [w13.scale], row_scale)
    is_int4 = weight == torch.int32
    assert torch.equal(args[4], COUNTS if is_int4 else COUNTS.cumsum(0))
    assert args[4].dtype == torch.int64
    assert kwargs == {
        "weight_assist_matrix": [assist] if is_int4 else None,
        "dequant_mode": 1 if groups else 0,
        "dequant_dtype": torch.float32,
        "group_list_type": int(is_int4),
    }
    (call,) = npu.npu_grouped_matmul.call_args_list
    assert call.args[0][0].dtype == torch.int8 and call.args[1] == [w2.weight]
    rest = grouped(call.kwargs, dtype)
    assert rest.pop("per_token_scale")[0].shape == (M,)
    assert rest == {"bias": [assist] if is_int4 else None, "scale": [w2.scale]}


@pytest.mark.parametrize("swiglu", [True, False], ids=["swiglu", "other"])
def test_int8_rows_unfused(npu: MockType, swiglu: bool) -> None:
    w13, _ = operands(torch.int8, torch.bfloat16)
    rows, row_scale = torch.zeros(M, H, dtype=torch.int8), torch.ones(M)
    functional.int8_gate(
        rows,
        row_scale,
        COUNTS,
        w13,
        torch.bfloat16,
        None if swiglu else lambda x: x[:, ::2],
        fused=False,
    )
    assert called(npu) == [
        "npu_grouped_matmul",
        *(["npu_swiglu"] if swiglu else []),
        "npu_dynamic_quant",
    ]


def test_combine_where_all_experts_are_here(npu: MockType) -> None:
    rows, index = torch.zeros(M, H), torch.arange(M, dtype=torch.int32)
    weights = torch.ones(T, TOP_K)
    ids = torch.zeros(T, TOP_K, dtype=torch.int32)
    functional.combine(rows, index, weights, ids, all_here=True)
    assert called(npu) == ["npu_moe_token_unpermute"]
    npu.npu_moe_token_unpermute.assert_called_once_with(rows, index, weights)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_combine_where_some_are(npu: MockType, weighted: bool) -> None:
    """Drop-pad mode 3, in which an index of -1 adds nothing."""
    rows, index = torch.zeros(M, H).bfloat16(), torch.arange(M, dtype=torch.int32)
    weights = torch.ones(T, TOP_K) if weighted else None
    ids = torch.zeros(T, TOP_K, dtype=torch.int64)
    functional.combine(rows, index, weights, ids, all_here=False)
    assert called(npu) == ["npu_moe_finalize_routing"]
    args, kwargs = npu.npu_moe_finalize_routing.call_args
    assert kwargs == {"drop_pad_mode": 3}
    assert args[0].shape == (M, 1, H)
    assert args[1:4] == (None, None, None)
    assert torch.equal(args[6], ids) and args[6].dtype == torch.int32
    assert args[5] is index
    if weighted:
        assert args[4].dtype == rows.dtype and args[4].shape == (T, TOP_K)
    else:
        assert args[4] is None


def packed(values: torch.Tensor) -> torch.Tensor:
    """Random int4 `[E, K, N]`, packed along N."""
    words = torch.zeros(*values.shape[:2], values.shape[2] // 8, dtype=torch.int32)
    for position in range(8):
        words |= (values[..., position::8].int() & 15) << (4 * position)
    return words


def test_weights_packed_along_outputs() -> None:
    """With emulated operators, packing along N and along K gives the same results."""
    k, n = H, 2 * INTERMEDIATE
    values = torch.randint(-8, 8, (E, k, n), dtype=torch.int8)
    along_k = packed(values.transpose(1, 2)).transpose(1, 2)
    rows = torch.randn(M, H).bfloat16()
    scale = torch.rand(E, n).bfloat16()
    results = [
        functional.weight_only_product(
            rows, COUNTS, Operands(weight, scale, torch.zeros_like(scale))
        )
        for weight in (packed(values), along_k)
    ]
    weights = (values * scale.unsqueeze(1)).double()
    bounds = COUNTS.cumsum(0)
    expected = torch.cat(
        [
            rows[stop - count : stop].double() @ weight
            for weight, count, stop in zip(weights, COUNTS, bounds)
        ]
    )
    assert torch.equal(*results)
    error = (results[0].double() - expected).norm() / expected.norm()
    assert error < 3e-3
