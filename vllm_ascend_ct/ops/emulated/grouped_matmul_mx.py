# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The MXFP8 (E4M3) and MXFP4 (E2M1) modes of `npu_grouped_matmul`.

Source: ops-transformer `aclnnGroupedMatmulV5.md`, MX quantization on Ascend 950.
"""

from typing import Any

import torch

from vllm_ascend_ct.ops.emulated.mx_values import scale_pairs
from vllm_ascend_ct.ops.emulated.quant_matmul_mx import check_formats, check_scale
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    describe,
    is_transposed,
    only,
    refuse,
)
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_grouped_matmul"


def mx_grouped_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: list[torch.Tensor] | None,
    per_token_scale: list[torch.Tensor] | None,
    group_list: torch.Tensor | None,
    output_dtype: int | torch.dtype | None,
    unused: tuple[Any, ...],
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> torch.Tensor:
    """Check a call whose scales are E8M0, and allocate its result.

    Args:
        x: FP8 `[M, K]`, or uint8 `[M, K / 2]` with two E2M1 values each.
        weight: FP8 `[E, K, N]`, contiguous or a transposed view; or the transposed view
            of uint8 `[E, N, K / 2]`.
        scale: One tensor, uint8 `[E, ceil(K / 64), N, 2]`; transposed if the weight is.
        per_token_scale: One tensor, uint8 `[M, ceil(K / 64), 2]`.
        group_list: int64 `[E]`.
        output_dtype: fp16 or bf16.
        unused: Arguments that must be None.
        x_dtype: None, or 296 for E2M1.
        weight_dtype: None, or 296 for E2M1.
        scale_dtype: 293.
        per_token_scale_dtype: 293.

    """
    limits = current_limits().mx_matmul
    if limits is None:
        refuse(_NAME, "the chip does not multiply MX formats")
    if any(argument is not None for argument in unused):
        refuse(_NAME, "bias and antiquant_* of MX formats are not emulated")
    if weight.dim() != 3:
        refuse(_NAME, f"weight is {describe(weight)}; emulated: 3-D")
    scales = scale_dtype, per_token_scale_dtype
    check_formats(_NAME, (x, weight[0]), (x_dtype, weight_dtype), scales)
    transposed = is_transposed(weight[0])
    stored = weight.transpose(1, 2) if transposed else weight
    if not stored.is_contiguous():
        refuse(_NAME, f"weight is {describe(weight)}; emulated: contiguous, or views")
    per_value = 2 if x.dtype == torch.uint8 else 1
    (m, k), (experts, rows, n) = (x.shape[0], x.shape[1] * per_value), weight.shape
    if rows * per_value != k:
        refuse(_NAME, f"K of x is {k}, of the weight {rows * per_value}")
    out_dtype = x.dtype if output_dtype is None else as_dtype(_NAME, output_dtype)
    if reason := limits.refusal(out_dtype, k, n, experts):
        refuse(_NAME, reason)
    if group_list is None or (group_list.dtype, tuple(group_list.shape)) != (
        torch.int64,
        (experts,),
    ):
        refuse(_NAME, f"group_list; supported: int64 ({experts},)")
    pairs = scale_pairs(k)
    of_weight = only(_NAME, "scale", scale)
    of_rows = only(_NAME, "per_token_scale", per_token_scale)
    check_scale(_NAME, "scale", of_weight, (experts, pairs, n, 2), transposed)
    check_scale(_NAME, "per_token_scale", of_rows, (m, pairs, 2))
    return x.new_empty((m, n), dtype=out_dtype)
