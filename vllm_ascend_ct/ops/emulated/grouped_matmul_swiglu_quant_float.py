# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The FP8 (E4M3), MXFP8 and MXFP4 modes of `npu_grouped_matmul_swiglu_quant_v2`. A5.

Source: op-plugin `torch_npu-npu_grouped_matmul_swiglu_quant_v2.md`, Ascend 950, and
`GroupedMatmulSwigluQuantV2NpuOpapi.cpp`.
"""

from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, FP8, FP8_MAX
from vllm_ascend_ct.ops.emulated.dynamic_mx_quant import quantize_blocks
from vllm_ascend_ct.ops.emulated.grouped_matmul import grouped_matmul_fake
from vllm_ascend_ct.ops.emulated.mx_values import scale_pairs
from vllm_ascend_ct.ops.emulated.registry import as_dtype, refuse
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_grouped_matmul_swiglu_quant_v2"
_PER_TOKEN, _MX = 0, 2


def float_swiglu_quant_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    dequant_mode: int = _PER_TOKEN,
    dequant_dtype: int = 6,
    quant_mode: int = _PER_TOKEN,
    quant_dtype: int = 1,
    group_list_type: int = 0,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a call, and allocate its results.

    The product is checked as one of `npu_grouped_matmul`, which its refusals name.

    Args:
        x: FP8 `[M, K]`, or uint8 `[M, K / 2]` with two E2M1 values each.
        weight: One tensor `[E, K, N]` of the same format, as in `npu_grouped_matmul`.
        weight_scale: One tensor, fp32 `[E, N]`, or E8M0 `[E, ceil(K / 64), N, 2]`.
        x_scale: fp32 `[M]`, or E8M0 `[M, ceil(K / 64), 2]`.
        group_list: int64 `[E]`.
        dequant_mode: 0 for fp32 scales, 2 for E8M0.
        dequant_dtype: fp32.
        quant_mode: As `dequant_mode`.
        quant_dtype: The format of x.
        group_list_type: 0 for cumulative counts, 1 for counts.
        x_dtype: As in `npu_grouped_matmul`.
        weight_dtype: As in `npu_grouped_matmul`.
        weight_scale_dtype: As `scale_dtype` there.
        x_scale_dtype: As `per_token_scale_dtype` there.
        unused: Arguments that must be None.

    """
    limits = current_limits().float_swiglu_quant
    if limits is None:
        refuse(_NAME, f"x is {x.dtype}, which the chip does not multiply")
    if any(value is not None for value in unused.values()):
        refuse(_NAME, f"{', '.join(unused)} of floating-point weights")
    if as_dtype(_NAME, dequant_dtype) != torch.float32:
        refuse(_NAME, f"dequant_dtype={dequant_dtype}; emulated: float32")
    is_mx, is_packed = weight_scale_dtype is not None, x.dtype == torch.uint8
    mode = _MX if is_mx else _PER_TOKEN
    if (dequant_mode, quant_mode) != (mode, mode):
        refuse(
            _NAME,
            f"dequant_mode={dequant_mode}, quant_mode={quant_mode}, "
            f"weight_scale_dtype={weight_scale_dtype}; emulated: {mode} for both",
        )
    if quant_dtype != E2M1 if is_packed else as_dtype(_NAME, quant_dtype) != FP8:
        refuse(_NAME, f"quant_dtype={quant_dtype}; emulated: the format of x")
    (product,) = grouped_matmul_fake(
        [x],
        weight,
        scale=weight_scale,
        per_token_scale=[x_scale],
        group_list=group_list,
        group_list_type=group_list_type,
        group_type=0,
        split_item=2,
        output_dtype=torch.bfloat16,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        scale_dtype=weight_scale_dtype,
        per_token_scale_dtype=x_scale_dtype,
    )
    m, n = product.shape
    if reason := limits.refusal(n, is_mx):
        refuse(_NAME, reason)
    width = n // 4 if is_packed else n // 2
    if is_mx:
        scale = x.new_empty((m, scale_pairs(n // 2), 2), dtype=torch.uint8)
    else:
        scale = x.new_empty((m,), dtype=torch.float32)
    return x.new_empty((m, width)), scale


def swiglu_quant(
    product: torch.Tensor, dtype: torch.dtype, is_mx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply SwiGLU and quantize, in fp32.

    Per token, `scale = amax / 448` and `q = s / scale`, rounded half to even. In blocks
    of 32 as `npu_dynamic_mx_quant`.

    Args:
        product: fp32 `[M, N]`, gate and up side by side; overwritten.
        dtype: FP8, or uint8 for E2M1.
        is_mx: Whether to quantize in blocks.

    """
    gate, up = product.chunk(2, dim=1)
    values = torch.nn.functional.silu(gate).mul_(up)
    if is_mx:
        return quantize_blocks(values, is_packed=dtype == torch.uint8)
    scale = values.abs().amax(dim=1) / FP8_MAX
    quotients = torch.where(scale > 0, values.t() / scale, 0).t()
    return quotients.clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale
