# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operator that quantizes activations and multiplies them."""

from typing import Any

import torch

from vllm_ascend_ct.ops.emulated.int_matmul import int_matmul
from vllm_ascend_ct.ops.emulated.quantize import int8_values
from vllm_ascend_ct.ops.emulated.registry import describe, emulates, is_nz, refuse
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_quant_matmul_dequant"
_INT8_MAX = 127


def _fake(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    quant_mode: str | None = "pertoken",
    **options: Any,
) -> torch.Tensor:
    limits = current_limits().quant_matmul_dequant
    if limits is None:
        refuse(_NAME, "the chip does not have this operator")
    if quant_mode != "pertoken" or any(v is not None for v in options.values()):
        refuse(
            _NAME,
            f"quant_mode={quant_mode}; emulated: pertoken, without bias, x_scale, "
            "x_offset and smooth_scale",
        )
    weight = quantized_weight
    if (weight.dtype, weight.dim()) != (torch.int8, 2) or not weight.is_contiguous():
        refuse(
            _NAME,
            f"quantized_weight is {describe(weight)}; emulated: contiguous int8 [N, K]",
        )
    n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        refuse(_NAME, f"x is {describe(x)}; supported: [M, {k}]")
    if reason := limits.refusal(x.dtype, k, n):
        refuse(_NAME, reason)
    if (weight_scale.dtype, tuple(weight_scale.shape)) != (torch.float32, (n,)):
        refuse(
            _NAME, f"weight_scale is {describe(weight_scale)}; emulated: fp32 ({n},)"
        )
    return x.new_empty((x.shape[0], n))


@emulates(
    "npu_quant_matmul_dequant(Tensor x, Tensor quantized_weight, Tensor weight_scale, "
    "*, Tensor? bias=None, Tensor? x_scale=None, Tensor? x_offset=None, "
    "Tensor? smooth_scale=None, str? quant_mode='pertoken') -> Tensor",
    fake=_fake,
)
def npu_quant_matmul_dequant(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Quantize each row to int8, multiply, and dequantize.

    `scale = amax / 127`, `q = rint(x * (1 / scale))`, `q @ weight.t() * weight_scale *
    scale`, in fp32, rounded once.

    Source: op-plugin `test_npu_quant_matmul_dequant.py`; ops-nn
    `aclnnQuantMatmulDequant.md`.

    Args:
        x: fp16 `[M, K]`.
        quantized_weight: int8 `[N, K]`, contiguous.
        weight_scale: fp32 `[N]`.
        options: Only their defaults are emulated.

    Returns:
        fp16 `[M, N]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _fake(x, quantized_weight, weight_scale, **options)
    if is_nz(quantized_weight):
        refuse(_NAME, "quantized_weight is in FRACTAL_NZ; emulated: ND")
    values = x.float()
    scale = values.abs().amax(dim=1, keepdim=True) / _INT8_MAX
    q = int8_values(values * torch.where(scale > 0, 1 / scale, 0)).to(torch.int8)
    product = int_matmul(q, quantized_weight.t()).float()
    return result.copy_(product * weight_scale * scale)
