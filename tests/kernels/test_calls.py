# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operator calls of the kernel classes, for each scheme.

The layers are upstream's, loaded with upstream's loaders. The calls are recorded before
they reach the emulated operators.
"""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture

from tests.layers.quantized_layers import activations, load, row_case
from vllm_ascend_ct import ascend_base

M, K, N = 3, 512, 96

pytestmark = pytest.mark.usefixtures("single_rank")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (dtype, shape, strides)
X = {dtype: (dtype, (M, K), (K, 1)) for dtype in (BF16, FP16)}
Q = (torch.int8, (M, K), (K, 1))
INT4 = (torch.int32, (K // 8, N), (1, K // 8))
INT4_OUTPUTS = (torch.int32, (K, N // 8), (N // 8, 1))
INT8 = (torch.int8, (K, N), (1, K))
ROWS = (FP32, (M,), (1,))
ONE = (FP32, (1,), (1,))


def grouped(dtype: torch.dtype, groups: int, weight: Any) -> Any:
    strides = (N, 1) if weight == INT4_OUTPUTS else (1, groups)
    return (dtype, (groups, N), strides)


def vector(dtype: torch.dtype) -> Any:
    return (dtype, (N,), (1,))


def weight_only(
    dtype: torch.dtype, weight: Any, groups: int, offset: bool, group_size: int
) -> list[Any]:
    return [
        (
            "npu_weight_quant_batchmatmul",
            [X[dtype], weight, grouped(dtype, groups, weight)],
            {
                "antiquant_offset": grouped(dtype, groups, weight) if offset else None,
                "bias": vector(FP32 if dtype == BF16 else FP16),
                "antiquant_group_size": group_size,
            },
        )
    ]


def dynamic(dtype: torch.dtype) -> list[Any]:
    matmul = {"pertoken_scale": ROWS, "bias": vector(dtype), "output_dtype": dtype}
    return [
        ("npu_dynamic_quant", [X[dtype]], {}),
        ("npu_quant_matmul", [Q, INT8, vector(FP32)], matmul),
    ]


def dynamic_asymmetric(dtype: torch.dtype) -> list[Any]:
    matmul = {"output_dtype": torch.int32}
    return [
        ("npu_dynamic_quant_asymmetric", [X[dtype]], {}),
        ("npu_quant_matmul", [Q, INT8, vector(FP32)], matmul),
    ]


def static(dtype: torch.dtype, asymmetric: bool) -> list[Any]:
    reciprocal = (dtype, (K,), (1,))
    zero_point = reciprocal if asymmetric else None
    scale = vector(FP32 if dtype == BF16 else torch.int64)
    return [
        (
            "npu_quantize",
            [X[dtype], reciprocal, zero_point, torch.qint8, -1, False],
            {},
        ),
        (
            "npu_quant_matmul",
            [Q, INT8, scale],
            {"bias": vector(torch.int32), "output_dtype": dtype},
        ),
    ]


def int4_by_int8(dtype: torch.dtype, group_size: int) -> list[Any]:
    groups = K // group_size if group_size else 0
    scale = (torch.int64, (groups, N), (N, 1)) if groups else vector(torch.int64)
    matmul = {
        "offset": vector(FP32),
        "pertoken_scale": (FP32, (M, 1), (1, 1)) if groups else ROWS,
        "output_dtype": dtype,
        "group_sizes": [0, 0, group_size],
    }
    return [
        ("npu_dynamic_quant", [X[dtype]], {}),
        ("npu_quant_matmul", [Q, INT4_OUTPUTS, scale], matmul),
    ]


def fake_quantized(dtype: torch.dtype, weight_call: list[Any]) -> list[Any]:
    y = (dtype, (M, N), (N, 1))
    return [
        ("npu_quantize", [X[dtype], ONE, None, torch.qint8, -1, True], {}),
        *weight_call,
        ("npu_quantize", [y, ONE, None, torch.qint8, -1, True], {}),
    ]


CASES: list[tuple[str, torch.dtype, list[Any]]] = [
    ("w4a16-g32", BF16, weight_only(BF16, INT4_OUTPUTS, 16, False, 32)),
    ("w4a16-g64", FP16, weight_only(FP16, INT4_OUTPUTS, 8, False, 64)),
    ("w4a16-g128-asym", BF16, weight_only(BF16, INT4_OUTPUTS, 4, True, 128)),
    ("w4a16-channel", BF16, weight_only(BF16, INT4, 1, False, 0)),
    ("w4a16-channel-asym", FP16, weight_only(FP16, INT4, 1, True, 0)),
    ("w8a16-g32-asym", BF16, weight_only(BF16, INT8, 16, True, 32)),
    ("w8a16-g128", FP16, weight_only(FP16, INT8, 4, False, 128)),
    ("w8a16-channel", BF16, weight_only(BF16, INT8, 1, False, 0)),
    ("w8a8-channel-dynamic", BF16, dynamic(BF16)),
    ("w8a8-tensor-dynamic", FP16, dynamic(FP16)),
    ("w8a8-channel-dynamic-asym", BF16, dynamic_asymmetric(BF16)),
    ("w8a8-tensor-dynamic-asym", FP16, dynamic_asymmetric(FP16)),
    ("w8a8-channel-static", BF16, static(BF16, asymmetric=False)),
    ("w8a8-channel-static-asym", FP16, static(FP16, asymmetric=True)),
    ("w8a8-tensor-static", FP16, static(FP16, asymmetric=False)),
    ("w8a8-tensor-static-asym", BF16, static(BF16, asymmetric=True)),
    ("w2a16-g64", BF16, weight_only(BF16, INT4_OUTPUTS, 8, False, 64)),
    ("w3a16-channel-asym", FP16, weight_only(FP16, INT4, 1, True, 0)),
    ("w5a16-g64-asym", BF16, weight_only(BF16, INT8, 8, True, 64)),
    ("w7a16-channel", FP16, weight_only(FP16, INT8, 1, False, 0)),
    ("w4a8-channel", BF16, int4_by_int8(BF16, 0)),
    ("w4a8-g256-packed", FP16, int4_by_int8(FP16, 256)),
    ("w2a8-g256-packed", BF16, int4_by_int8(BF16, 256)),
    ("w6a8-channel-packed", BF16, dynamic(BF16)),
    ("w8a8-channel-packed", FP16, dynamic(FP16)),
    ("w4a8-g128", BF16, weight_only(BF16, INT4_OUTPUTS, 4, False, 128)),
    (
        "w4a8o8-channel",
        BF16,
        fake_quantized(BF16, weight_only(BF16, INT4, 1, False, 0)),
    ),
    (
        "w8a8o8-channel-int",
        FP16,
        fake_quantized(FP16, weight_only(FP16, INT8, 1, False, 0)),
    ),
]


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return value


@pytest.mark.parametrize(
    ("scheme", "dtype", "expected"), CASES, ids=[f"{s}-{d}" for s, d, _ in CASES]
)
def test_calls(
    mocker: MockerFixture, scheme: str, dtype: torch.dtype, expected: list[Any]
) -> None:
    layer, _ = load(row_case(K, N), scheme, dtype, bias=True)
    calls: list[Any] = []
    for name in {name for name, *_ in expected}:
        operator = getattr(torch.ops.npu, name)

        def record(
            *args: Any, _name: str = name, _op: Any = operator, **kw: Any
        ) -> Any:
            described = {key: describe(value) for key, value in kw.items()}
            calls.append((_name, [describe(arg) for arg in args], described))
            return _op(*args, **kw)

        mocker.patch.object(torch.ops.npu, name, side_effect=record)
    layer(activations(M, K, dtype))
    if scheme.startswith("w8a8-") and ascend_base.fuses_norms(dtype):
        # vllm-ascend's operator `quantize` makes this call.
        expected = [call for call in expected if call[0] != "npu_quantize"]
    if ascend_base.prefers_nz():
        # vllm-ascend stores them in FRACTAL_NZ, and then they are contiguous.
        nz = {"npu_quant_matmul": (torch.int8, (K, N), (N, 1))}
        expected = [
            (name, [nz.get(name, arg) if arg == INT8 else arg for arg in args], kw)
            for name, args, kw in expected
        ]
    assert calls == expected


@pytest.mark.parametrize(
    ("scheme", "bias", "integers"),
    [
        ("w8a8-channel-static", False, False),
        ("w8a8-channel-static", True, True),
        ("w8a8-channel-static-asym", False, True),
    ],
)
def test_static_int32_bias_is_passed_only_if_there_is_one(
    mocker: MockerFixture, scheme: str, bias: bool, integers: bool
) -> None:
    layer, _ = load(row_case(K, N), scheme, BF16, bias)
    matmul = mocker.spy(torch.ops.npu, "npu_quant_matmul")
    layer(activations(M, K, BF16))
    passed = matmul.call_args.kwargs["bias"]
    assert (passed is not None) is integers
    assert passed is None or passed.dtype == torch.int32
