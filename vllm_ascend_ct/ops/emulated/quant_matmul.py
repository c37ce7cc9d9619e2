# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The quantized matmul operator, `npu_quant_matmul`."""

from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import FP8
from vllm_ascend_ct.ops.emulated.int_matmul import int_matmul, scaled_int_matmul
from vllm_ascend_ct.ops.emulated.quant_matmul_a8w4 import a8w4, a8w4_fake
from vllm_ascend_ct.ops.emulated.quant_matmul_fp8 import fp8_matmul, fp8_matmul_fake
from vllm_ascend_ct.ops.emulated.quant_matmul_mx import mx_matmul, mx_matmul_fake
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    check_layout,
    checker,
    describe,
    emulates,
    is_transposed,
    refuse,
)
from vllm_ascend_ct.ops.emulated.weights import truncate_to_fp19, unpack_quant_param
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_quant_matmul"


def _quant_matmul_fake(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    if scale_dtype is not None:
        return mx_matmul_fake(
            x1,
            x2,
            scale,
            pertoken_scale,
            bias,
            output_dtype,
            group_sizes,
            offset=offset,
            x1_dtype=x1_dtype,
            x2_dtype=x2_dtype,
            scale_dtype=scale_dtype,
            pertoken_scale_dtype=pertoken_scale_dtype,
            y_scale=y_scale,
        )
    unused = (x1_dtype, x2_dtype, pertoken_scale_dtype, y_scale)
    if any(argument is not None for argument in unused):
        refuse(
            _NAME,
            "x1_dtype, x2_dtype, pertoken_scale_dtype and y_scale without scale_dtype "
            "are not emulated",
        )
    if x2.dtype == torch.int32:
        return a8w4_fake(
            x1, x2, scale, offset, pertoken_scale, bias, output_dtype, group_sizes
        )
    if x2.dtype == FP8:
        return fp8_matmul_fake(
            x1, x2, scale, offset, pertoken_scale, bias, output_dtype, group_sizes
        )
    if group_sizes:
        refuse(_NAME, f"group_sizes={group_sizes} of int8 weights is not emulated")
    for argument, tensor in (("x1", x1), ("x2", x2)):
        if tensor.dtype != torch.int8 or tensor.dim() != 2:
            refuse(_NAME, f"{argument} is {describe(tensor)}; emulated: 2-D int8")
        check_layout(_NAME, argument, tensor)
    if x2.shape[0] != x1.shape[1]:
        refuse(_NAME, f"K of x1 is {x1.shape[1]}, of x2 {x2.shape[0]}")
    m, n = x1.shape[0], x2.shape[1]
    out_dtype = torch.int8 if output_dtype is None else as_dtype(_NAME, output_dtype)
    inner_sizes = [x.shape[-2 if is_transposed(x) else -1] for x in (x1, x2)]
    limits = current_limits().quant_matmul
    if reason := limits.refusal(out_dtype, inner_sizes):
        refuse(_NAME, reason)
    if limits.transposed_nz and not is_transposed(x2):
        refuse(_NAME, f"x2 is {describe(x2)}; supported: a transposed view")
    operands = limits.operands.get((out_dtype, pertoken_scale is not None))
    if operands is None:
        refuse(_NAME, f"{out_dtype} output with a pertoken_scale")
    for argument, vector, dtypes, sizes in (
        ("scale", scale, operands.scale, (1, n)),
        ("offset", offset, operands.offset, (1, n)),
        ("pertoken_scale", pertoken_scale, (torch.float32,), (m,)),
        ("bias", bias, operands.bias, (n,)),
    ):
        if vector is not None and (
            vector.dtype not in dtypes
            or vector.dim() != 1
            or vector.shape[0] not in sizes
            or not vector.is_contiguous()
        ):
            refuse(
                _NAME,
                f"{argument} is {describe(vector)}; supported for {out_dtype} output "
                f"and pertoken_scale={pertoken_scale is not None}: contiguous 1-D of a "
                f"size in {sizes}, dtype in {dtypes}",
            )
    return x1.new_empty((m, n), dtype=out_dtype)


_check = checker(_quant_matmul_fake)


@emulates(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, "
    "int? x1_dtype=None, int? x2_dtype=None, int? pertoken_scale_dtype=None, "
    "int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    fake=_quant_matmul_fake,
)
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Multiply int8 by int8 or int4, FP8 by FP8, or MX formats, and dequantize.

    `(x1 @ x2 + bias_int32) * scale * pertoken_scale + bias_float`, accumulated in
    int32; then each step rounds in fp32, and the result rounds to the output dtype. For
    fp16 and int8 outputs without `pertoken_scale`, the scale is truncated to 10
    mantissa bits. For an int32 output, the result is the accumulator: the scale is
    required but ignored.

    Source: op-plugin `torch_npu-npu_quant_matmul.md`, `QuantMatmulKernelNpuOpApi.cpp`;
    ops-nn `matmul/quant_batch_matmul_v3`, `aclnnQuantMatmulV5.md`.

    Args:
        x1: int8 `[M, K]`.
        x2: int8 `[K, N]`, contiguous or a transposed view. For int4, as int32
            `[K, N / 8]`, for FP8 `[K, N]` and for MX formats, see
            `quant_matmul_a8w4.py`, `quant_matmul_fp8.py` and `quant_matmul_mx.py` for
            the other operands.
        scale: `(1,)` or `(N,)`; dtype as in `ops/limits.py`.
        offset: fp32 `(1,)` or `(N,)`, int8 output only.
        pertoken_scale: fp32 `(M,)`.
        bias: `(N,)`; int32 is added to the accumulator, others after scaling.
        output_dtype: Defaults to int8.
        options: For MX formats; for others only the defaults are emulated.

    Returns:
        `[M, N]` of the output dtype.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result_dtype = _check(
        x1, x2, scale, offset, pertoken_scale, bias, output_dtype, **options
    )
    if x2.dtype == torch.int32:
        assert offset is not None and pertoken_scale is not None
        return a8w4(x1, x2, scale, offset, pertoken_scale).to(result_dtype)
    if options.get("scale_dtype") is not None:
        assert pertoken_scale is not None
        return mx_matmul(x1, x2, scale, pertoken_scale, bias).to(result_dtype)
    if x2.dtype == FP8:
        assert pertoken_scale is not None
        return fp8_matmul(x1, x2, scale, pertoken_scale).to(result_dtype)
    if result_dtype == torch.int32:
        return _accumulated(x1, x2, bias).to(result_dtype)
    if scale.dtype == torch.int64:
        scale, packed_offset = unpack_quant_param(scale)
        offset = packed_offset if offset is None else offset
    elif pertoken_scale is None and result_dtype != torch.bfloat16:
        scale = truncate_to_fp19(scale)
    if bias is not None and bias.dtype == torch.int32:
        values = _accumulated(x1, x2, bias) * scale.float()
        if pertoken_scale is not None:
            values *= pertoken_scale.unsqueeze(1)
    else:
        is_last_step = bias is None and result_dtype != torch.int8
        dtype = result_dtype if is_last_step else torch.float32
        values = scaled_int_matmul(x1, x2, scale.float(), pertoken_scale, dtype)
    if bias is not None and bias.dtype != torch.int32:
        values += bias.float()
    if result_dtype == torch.int8:
        if offset is not None:
            values += offset
        values.round_().clamp_(-128, 127)
    return values.to(result_dtype)


def _accumulated(
    x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The accumulator `[M, N]`: exact integers, plus the int32 bias if there is one."""
    accumulator = int_matmul(x1, x2)
    return accumulator if bias is None else accumulator.to(torch.int32) + bias
