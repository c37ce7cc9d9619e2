# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The emulation refuses what the NPU refuses, and says why."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.ops.calls import (
    CALLS,
    Call,
    K,
    M,
    N,
    a8w4_call,
    changed,
    int8,
    packed_int4,
    quant_matmul_call,
    scales,
    weight_quant_call,
    x,
)
from vllm_ascend_ct.errors import OperatorLimitError

BF16 = torch.bfloat16


def weight_quant(args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(weight_quant_call(), args, **kwargs)


def quant(args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(quant_matmul_call(), args, **kwargs)


def of(name: str, args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(CALLS[name](), args, **kwargs)


def one_group() -> Call:
    call = weight_quant_call(group=0)
    call.kwargs["antiquant_group_size"] = K
    return call


def too_wide(k: int, n: int) -> Call:
    weight = torch.empty(n, k, dtype=torch.int8).t()
    scale = scales(1, n, dtype=BF16)
    activations = torch.empty(1, k, dtype=BF16)
    return Call("npu_weight_quant_batchmatmul", [activations, weight, scale])


# Pattern of the message -> the call.
REFUSED: dict[str, Callable[[], Call]] = {
    # npu_weight_quant_batchmatmul
    "group_size=128; supported: per channel": one_group,
    "group_size=16": lambda: weight_quant(antiquant_group_size=16),
    "K=65536; supported: 1 to 65535": lambda: too_wide(65536, 8),
    "N=65536; supported: 1 to 65535": lambda: too_wide(8, 65536),
    "antiquant_offset is .* supported: the same shape": lambda: weight_quant(
        {2: scales(1, N, dtype=BF16), 3: scales(N, dtype=BF16)}, antiquant_group_size=0
    ),
    "weight is int32 .0, 48.*not empty": lambda: weight_quant(
        {1: packed_int4(N, 0).t()}
    ),
    "x is bfloat16 .0, 128.*not empty": lambda: weight_quant({0: x()[:0]}),
    "N=1; supported for int4": lambda: weight_quant(
        {1: packed_int4(1, K // 8).t(), 2: scales(1, 4, dtype=BF16).t(), 3: None}
    ),
    "activation dtype torch.float32": lambda: weight_quant({0: torch.randn(M, K)}),
    "K of x is 64, of the weight 128": lambda: weight_quant(
        {0: torch.randn(M, 64).bfloat16()}
    ),
    "x is bfloat16 .1, 5, 128.": lambda: weight_quant({0: x().unsqueeze(0)}),
    "antiquant_scale is float16": lambda: weight_quant(
        {2: scales(N, 4).half().t(), 3: None}
    ),
    "antiquant_scale is .* both contiguous, or both transposed": lambda: weight_quant(
        {2: scales(4, N, dtype=BF16), 3: None}
    ),
    "antiquant_offset is .* both contiguous, or both transposed": lambda: weight_quant(
        {3: scales(4, N, dtype=BF16)}
    ),
    "antiquant_scale is bfloat16 .3, 48.": lambda: weight_quant(
        {2: scales(N, 3, dtype=BF16).t()}
    ),
    "bias is bfloat16 .* contiguous torch.float32": lambda: weight_quant(
        bias=torch.zeros(N).bfloat16()
    ),
    "weight is int32 .* transposed view of a contiguous": lambda: weight_quant(
        {1: packed_int4(N, K // 4)[:, ::2].t()}
    ),
    "weight is float32": lambda: weight_quant({1: torch.randn(K, N)}),
    "inner_precise=2": lambda: weight_quant(inner_precise=2),
    "quant_scale, quant_offset and weight_dtype": lambda: weight_quant(
        quant_scale=scales(N)
    ),
    # npu_quant_matmul
    "scale is int64": lambda: quant(
        {2: torch.ones(N, dtype=torch.int64)}, output_dtype=BF16
    ),
    "scale is bfloat16": lambda: quant(
        {2: scales(N, dtype=BF16)}, output_dtype=torch.float16
    ),
    r"scale is float32 \(48, 1\)": lambda: quant({2: scales(N, 1)}),
    r"pertoken_scale is float32 \(5, 1\)": lambda: quant(pertoken_scale=scales(M, 1)),
    "int8 output with a pertoken_scale": lambda: quant(output_dtype=None),
    "bias is float16": lambda: quant(
        output_dtype=torch.float16,
        pertoken_scale=None,
        bias=torch.zeros(N).half(),
    ),
    "output dtype torch.float32": lambda: quant(output_dtype=torch.float32),
    "offset is float32": lambda: quant(offset=torch.zeros(1)),
    "inner axis of size 65536": lambda: quant(
        {0: int8(1, 65536), 1: int8(8, 65536).t(), 2: scales(8)},
        pertoken_scale=scales(1),
    ),
    "K of x1 is 128, of x2 64": lambda: quant({1: int8(N, 64).t()}),
    "x1 is bfloat16": lambda: quant({0: x()}),
    "x1 is int8 .0, 128.*not empty": lambda: quant({0: int8(0, K)}),
    "group_sizes": lambda: quant(group_sizes=[1, 128, 128]),
    # activations
    "input is bfloat16 .128,.": lambda: of("npu_dynamic_quant", {0: x()[0]}),
    "x dtype torch.float32": lambda: of("npu_dynamic_quant", {0: torch.randn(M, K)}),
    "quant_mode": lambda: of("npu_dynamic_quant", quant_mode="pertensor"),
    "dst_type=16": lambda: of("npu_dynamic_quant", dst_type=torch.quint4x2),
    "smooth_scales is float32": lambda: of(
        "npu_dynamic_quant", smooth_scales=torch.ones(K)
    ),
    "scales is float32 .* div_mode=False": lambda: of("npu_quantize", {5: False}),
    "scales is float16 .* div_mode=True": lambda: of(
        "npu_quantize", {1: scales(1).half()}
    ),
    "zero_points is int32 .2,.*supported: the same shape": lambda: of(
        "npu_quantize", {2: torch.zeros(2, dtype=torch.int32)}
    ),
    "zero_points is int32 .1,.*torch.bfloat16": lambda: of(
        "npu_quantize", {1: scales(1, dtype=BF16)}
    ),
    "zero_points is int64": lambda: of("npu_quantize", {2: torch.tensor([3])}),
    "dtype=14; emulated: qint8": lambda: of("npu_quantize", {3: torch.qint32}),
    "axis=2": lambda: of("npu_quantize", {4: 2}),
    # weights
    "round_mode=2": lambda: of("npu_trans_quant_param", round_mode=2),
    r"got float32 \(4, 12\)": lambda: of("npu_trans_quant_param", {0: scales(4, 12)}),
    r"sizes \[48, 3\]": lambda: of("npu_trans_quant_param", offset=torch.zeros(3)),
    r"weight is int32 \(2, 8, 8\)": lambda: of(
        "npu_convert_weight_to_int4pack", {0: torch.zeros(2, 8, 8, dtype=torch.int32)}
    ),
    r"weight is int32 \(8, 12\)": lambda: of(
        "npu_convert_weight_to_int4pack", {0: torch.zeros(8, 12, dtype=torch.int32)}
    ),
    "acl_format=4": lambda: of("npu_format_cast", {1: 4}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """Also after a valid call, of which a check may remember that it passed."""
    call = REFUSED[message]()
    CALLS[call.operator]().run()
    with pytest.raises(OperatorLimitError, match=message) as refusal:
        call.run()
    assert str(refusal.value).startswith(f"{call.operator} on A2 (VLLM_ASCEND_CT_SOC)")


def to_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device="meta"
    )


@pytest.mark.skipif(
    find_spec("torch_npu") is not None, reason="torch_npu's meta functions check less"
)
@pytest.mark.parametrize("message", REFUSED)
def test_refused_on_fake_tensors(message: str) -> None:
    """Tracing refuses the same calls as running."""
    call = REFUSED[message]()
    call.args = [to_meta(value) for value in call.args]
    call.kwargs = {name: to_meta(value) for name, value in call.kwargs.items()}
    with pytest.raises(OperatorLimitError, match=message):
        call.run()


def test_int4_weights_on_310p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    with pytest.raises(OperatorLimitError, match="on 310P .* 4-bit weights"):
        weight_quant_call(torch.float16).run()
    with pytest.raises(OperatorLimitError, match="on 310P .* torch.bfloat16"):
        weight_quant_call(bits=8).run()
    with pytest.raises(OperatorLimitError, match="on 310P .* supported: per channel"):
        weight_quant_call(torch.float16, bits=8).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(N).half()}, "bias is float16"),
        ({"output_dtype": BF16}, "output dtype torch.bfloat16"),
        ({"output_dtype": torch.int32}, "output dtype torch.int32"),
    ],
)
def test_int8_matmul_on_310p(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    quant(output_dtype=torch.float16).run()
    with pytest.raises(OperatorLimitError, match=f"on 310P .* {message}"):
        quant(**{"output_dtype": torch.float16, **changes}).run()
    with pytest.raises(OperatorLimitError, match="supported: a transposed view"):
        quant({1: int8(K, N)}, output_dtype=torch.float16).run()


def a8w4(args: dict[int, Any] | None = None, **kwargs: Any) -> Call:
    return changed(a8w4_call(), args, **kwargs)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: a8w4(bias=torch.zeros(N)), "without bias"),
        (lambda: a8w4(offset=None), "offset is missing"),
        (lambda: a8w4(offset=torch.zeros(N).half()), "offset is float16"),
        (lambda: a8w4(group_sizes=None), "group_sizes=None"),
        (lambda: a8w4(group_sizes=[0, 0, 128]), "group_size=128; supported: per ch"),
        (lambda: a8w4(group_sizes=[0, 0, 0]), "scale is int64 .2, 48."),
        (lambda: a8w4(pertoken_scale=scales(M)), "pertoken_scale is float32 .5,."),
        (lambda: a8w4(output_dtype=torch.int8), "output dtype torch.int8"),
        (lambda: a8w4(x1_dtype=1), "x1_dtype"),
        (lambda: a8w4({1: packed_int4(N // 8, 512).t()}), "x2 is .* contiguous"),
        (lambda: a8w4({0: int8(M, 256)}), "K of x1 is 256, of x2 512"),
    ],
)
def test_int8_by_int4(call: Callable[[], Call], reason: str) -> None:
    with pytest.raises(OperatorLimitError, match=reason):
        call().run()


@pytest.mark.parametrize("soc", ["310P", "A5"])
def test_int8_by_int4_is_not_on_every_chip(
    monkeypatch: pytest.MonkeyPatch, soc: str
) -> None:
    call = a8w4_call()
    call.run()
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    with pytest.raises(OperatorLimitError, match="does not multiply int8 by int4"):
        call.run()
