# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operators that quantize activations and multiply in one call (310P)."""

from typing import Any

import torch

from vllm_ascend_ct.ops.emulated.grouped_matmul import parts
from vllm_ascend_ct.ops.emulated.int_matmul import scaled_int_matmul
from vllm_ascend_ct.ops.emulated.quantize import int8_values
from vllm_ascend_ct.ops.emulated.registry import (
    describe,
    emulates,
    is_nz,
    poison,
    refuse,
)
from vllm_ascend_ct.ops.limits import QuantMatmulDequantLimits, current_limits

_NAME = "npu_quant_matmul_dequant"
_GROUPED = "npu_quant_grouped_matmul_dequant"
_INT8_MAX = 127
_ENDS = 0


def _check(
    name: str,
    limits: QuantMatmulDequantLimits | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    quant_mode: str | None,
    options: dict[str, Any],
    axes: str,
) -> torch.Tensor:
    """Check a call, and allocate its result `[M, N]`.

    Args:
        name: Name of the operator.
        limits: Its limits; None if the chip lacks it.
        x: `[M, K]`.
        weight: int8, with the axes in `axes`.
        weight_scale: fp32, shape of the weight without K.
        quant_mode: Must be "pertoken".
        options: Arguments that must have their defaults.
        axes: Names of the weight's axes, for an error text.

    """
    if limits is None:
        refuse(name, "the chip does not have this operator")
    if quant_mode != "pertoken" or any(v is not None for v in options.values()):
        refuse(
            name,
            f"quant_mode={quant_mode}; emulated: pertoken, without bias, x_scale, "
            "x_offset and smooth_scale",
        )
    dims = len(axes.split(", "))
    if (weight.dtype, weight.dim()) != (torch.int8, dims) or not weight.is_contiguous():
        refuse(
            name,
            f"quantized_weight is {describe(weight)}; emulated: contiguous int8 "
            f"[{axes}]",
        )
    n, k = weight.shape[-2:]
    if x.dim() != 2 or x.shape[1] != k:
        refuse(name, f"x is {describe(x)}; supported: [M, {k}]")
    if reason := limits.refusal(x.dtype, k, n):
        refuse(name, reason)
    shape = tuple(weight.shape[:-1])
    if (weight_scale.dtype, tuple(weight_scale.shape)) != (torch.float32, shape):
        refuse(
            name, f"weight_scale is {describe(weight_scale)}; emulated: fp32 {shape}"
        )
    return x.new_empty((x.shape[0], n))


def _product(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Quantize rows `[M, K]` and multiply by int8 `[N, K]`: fp32 `[M, N]`."""
    values = x.float()
    scale = values.abs().amax(dim=1, keepdim=True) / _INT8_MAX
    q = int8_values(values * torch.where(scale > 0, 1 / scale, 0)).to(torch.int8)
    return scaled_int_matmul(q, weight.t(), weight_scale) * scale


def _fake(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    quant_mode: str | None = "pertoken",
    **options: Any,
) -> torch.Tensor:
    limits = current_limits().quant_matmul_dequant
    weight = quantized_weight
    return _check(_NAME, limits, x, weight, weight_scale, quant_mode, options, "N, K")


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
    scale`, computed in fp32 and rounded once.

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
    return result.copy_(_product(x, quantized_weight, weight_scale))


def _grouped_fake(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    quant_mode: str | None = "pertoken",
    **options: Any,
) -> torch.Tensor:
    limits = current_limits().quant_grouped_matmul_dequant
    weight = quantized_weight
    result = _check(
        _GROUPED, limits, x, weight, weight_scale, quant_mode, options, "E, N, K"
    )
    expected = torch.int64, tuple(weight.shape[:1])
    if (group_list.dtype, tuple(group_list.shape)) != expected:
        refuse(_GROUPED, f"group_list is {describe(group_list)}; supported: int64 [E]")
    return result


@emulates(
    "npu_quant_grouped_matmul_dequant(Tensor x, Tensor quantized_weight, "
    "Tensor weight_scale, Tensor group_list, *, Tensor? bias=None, "
    "Tensor? x_scale=None, Tensor? x_offset=None, Tensor? smooth_scale=None, "
    "str? quant_mode='pertoken') -> Tensor",
    fake=_grouped_fake,
)
def npu_quant_grouped_matmul_dequant(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Apply `npu_quant_matmul_dequant` to each expert's rows.

    Rows that belong to no expert are not written.

    Source: op-plugin `QuantGroupedMatmulDequantNpuOpApi.cpp`,
    `test_quant_grouped_matmul_dequant.py`; ops-nn `aclnnQuantGroupedMatmulDequant.md`.

    Args:
        x: fp16 `[M, K]`, rows sorted by expert.
        quantized_weight: int8 `[E, N, K]`, contiguous or in FRACTAL_NZ.
        weight_scale: fp32 `[E, N]`.
        group_list: int64 `[E]`, cumulative counts of the experts' rows.
        options: Only their defaults are emulated.

    Returns:
        fp16 `[M, N]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _grouped_fake(x, quantized_weight, weight_scale, group_list, **options)
    poison(result)
    ends = group_list.tolist()
    if ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= len(x):
        refuse(_GROUPED, f"group_list={ends}; supported: ascending, up to {len(x)}")
    for expert, rows in parts(group_list, _ENDS):
        values = _product(x[rows], quantized_weight[expert], weight_scale[expert])
        result[rows] = values.to(result.dtype)
    return result
