# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operators that quantize activations."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import FP8, FP8_MAX, names
from vllm_ascend_ct.ops.emulated.registry import as_dtype, describe, emulates, refuse
from vllm_ascend_ct.ops.limits import LIMITS, ActivationQuantLimits, current_limits
from vllm_ascend_ct.ops.soc import Soc, current_soc

_DYNAMIC_ARGUMENTS = (
    "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    "int? dst_type=None, str quant_mode='pertoken', float dst_type_max=0.)"
)
# A Python number as dividend would be converted to a tensor in each call.
_INT8_MAX = torch.tensor(127.0, dtype=torch.float32, device="cpu")
# Values to quantize at once: in fp32 they fit into a core's cache.
AT_ONCE = 1 << 18


def int8_values(values: torch.Tensor) -> torch.Tensor:
    """Round half to even and saturate, in place."""
    return values.round_().clamp_(-128, 127)


def _check_dynamic(
    name: str,
    limits: ActivationQuantLimits | None,
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> torch.dtype:
    """Check a call of a dynamic quantization operator; return its output dtype."""
    if limits is None:
        refuse(name, "the chip does not have this operator")
    if reason := limits.refusal(x.dtype, x.shape[-1]):
        refuse(name, reason)
    if x.dim() < 2:
        refuse(name, f"input is {describe(x)}; supported: 2-D and more")
    if group_index is not None or quant_mode != "pertoken" or dst_type_max:
        refuse(name, "group_index, quant_mode and dst_type_max are not emulated")
    dtype = torch.int8 if dst_type is None else as_dtype(name, dst_type)
    if dtype not in limits.dst_dtypes:
        refuse(name, f"dst_type={dst_type}; emulated: {names(limits.dst_dtypes)}")
    if smooth_scales is not None and (
        smooth_scales.dtype != x.dtype or smooth_scales.shape != x.shape[-1:]
    ):
        refuse(
            name,
            f"smooth_scales is {describe(smooth_scales)}; emulated: 1-D, with the "
            f"dtype and the last size of the input, which is {describe(x)}",
        )
    return dtype


def _smoothed(x: torch.Tensor, smooth_scales: torch.Tensor | None) -> torch.Tensor:
    values = x.to(torch.float32)
    return values if smooth_scales is None else values * smooth_scales.float()


def _by_rows(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Quantize the rows of `x`, some at a time, and concatenate the results."""
    if x.numel() <= AT_ONCE:
        return quantize(x)
    rows = x.flatten(0, -2).split(max(1, AT_ONCE // x.shape[-1]))
    results = map(torch.cat, zip(*map(quantize, rows)))
    return tuple(y.view(*x.shape[:-1], *y.shape[1:]) for y in results)


def _dynamic_quant_fake(
    input: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    limits = current_limits().dynamic_quant
    dtype = _check_dynamic("npu_dynamic_quant", limits, input, *args, **options)
    return (
        input.new_empty(input.shape, dtype=dtype),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
    )


@emulates(
    f"npu_dynamic_quant{_DYNAMIC_ARGUMENTS} -> (Tensor, Tensor)",
    fake=_dynamic_quant_fake,
)
def npu_dynamic_quant(
    input: torch.Tensor, smooth_scales: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Quantize each row symmetrically to int8, or on A5 to FP8 (E4M3).

    `scale = amax / 127`, for FP8 `amax / 448`. A2 and A3 multiply by the rounded
    reciprocal, `q = rint(x * (127 / amax))`. A5 divides, `rint(x / scale)`. The 310P
    multiplies in fp16 and rounds half away from zero. FP8 rounds half to even and
    saturates. A row of zeros gives scale 0 and q 0; for FP8, no document states this.

    Source: op-plugin `torch_npu-npu_dynamic_quant.md`; ops-nn `quant/dynamic_quant`.

    Args:
        input: `[..., K]` fp16 or bf16.
        smooth_scales: `[K]`, dtype of the input; the rows are multiplied by it first.
        options: `dst_type`; for others only the defaults are emulated.

    Returns:
        int8 or FP8 `[..., K]` and fp32 scales `[...]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    soc = current_soc()
    limits = LIMITS[soc].dynamic_quant
    dtype = _check_dynamic("npu_dynamic_quant", limits, input, smooth_scales, **options)
    return _by_rows(lambda x: _dynamic_quant(x, smooth_scales, dtype, soc), input)


def _dynamic_quant(
    x: torch.Tensor, smooth_scales: torch.Tensor | None, dtype: torch.dtype, soc: Soc
) -> tuple[torch.Tensor, torch.Tensor]:
    values = _smoothed(x, smooth_scales)
    amax = values.abs().amax(dim=-1, keepdim=True)
    largest = FP8_MAX if dtype == FP8 else 127
    scale = amax * (1 / largest)
    if soc is Soc.A5:
        rows = torch.where(amax > 0, values / scale, 0).clamp_(-largest, largest)
    elif soc is Soc.ASCEND_310P:
        rows = (values.half() * torch.where(amax > 1e-12, 127 / amax, 0).half()).float()
        rows = rows.abs().add_(0.5).floor_().copysign_(rows).clamp_(-128, 127)
    else:
        # In place: the input is never fp32, so `values` is a copy. No product exceeds
        # 127.5, whatever the factor's rounding.
        rows = values.mul_(_reciprocal(amax))
    if dtype == torch.int8:
        rows.round_()
    return rows.to(dtype), scale.squeeze(-1)


def _reciprocal(amax: torch.Tensor) -> torch.Tensor:
    """`127 / amax`; 0 where that overflows, as for a row of zeros."""
    return (_INT8_MAX / amax).nan_to_num_(float("nan"), posinf=0.0)


def _dynamic_quant_asymmetric_fake(
    input: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    limits = current_limits().dynamic_quant_asymmetric
    _check_dynamic("npu_dynamic_quant_asymmetric", limits, input, *args, **options)
    return (
        input.new_empty(input.shape, dtype=torch.int8),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
    )


@emulates(
    f"npu_dynamic_quant_asymmetric{_DYNAMIC_ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    fake=_dynamic_quant_asymmetric_fake,
)
def npu_dynamic_quant_asymmetric(
    input: torch.Tensor, smooth_scales: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Quantize each row asymmetrically to int8.

    `scale = max((max - min) / 255, 1e-12)`, `offset = 127 - max / scale` (not rounded),
    and `q = rint(x * (1 / scale) + offset)`, so that `x ~ (q - offset) * scale`.

    Source: op-plugin `torch_npu-npu_dynamic_quant_asymmetric.md`; ops-nn
    `quant/dynamic_quant_v2`.

    Args:
        input: `[..., K]` fp16 or bf16.
        smooth_scales: `[K]`, dtype of the input; the rows are multiplied by it first.
        options: Only their defaults are emulated.

    Returns:
        int8 `[..., K]`, fp32 scales `[...]` and fp32 offsets `[...]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    _dynamic_quant_asymmetric_fake(input, smooth_scales, **options)
    return _by_rows(lambda x: _dynamic_quant_asymmetric(x, smooth_scales), input)


def _dynamic_quant_asymmetric(
    x: torch.Tensor, smooth_scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = _smoothed(x, smooth_scales)
    low, high = values.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 255).clamp_(min=1e-12)
    offset = 127 - high / scale
    q = int8_values(values * (1 / scale) + offset).to(torch.int8)
    return q, scale.squeeze(-1), offset.squeeze(-1)


def _quantize_axis(axis: int, div_mode: bool) -> int:
    """The axis of the scales; without `div_mode`, only -2 or the last one."""
    if div_mode:
        return axis
    return -2 if axis == -2 else -1


def _quantize_fake(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    name = "npu_quantize"
    if reason := current_limits().quantize.refusal(input.dtype, input.shape[-1]):
        refuse(name, reason)
    if as_dtype(name, dtype) != torch.qint8:
        refuse(name, f"dtype={dtype}; emulated: qint8")
    axis = _quantize_axis(axis, div_mode)
    if not -input.dim() <= axis < input.dim():
        refuse(name, f"axis={axis} of an input that is {describe(input)}")
    sizes = (1, input.shape[axis])
    scale_dtypes = zero_point_dtypes = [input.dtype]
    if div_mode and scales.dtype != torch.bfloat16:
        scale_dtypes = [torch.float32]
        zero_point_dtypes = [torch.int8, torch.uint8, torch.int32]
    if zero_points is not None and zero_points.shape != scales.shape:
        refuse(
            name,
            f"zero_points is {describe(zero_points)}, scales is {describe(scales)}; "
            "supported: the same shape",
        )
    for argument, tensor, dtypes in (
        ("scales", scales, scale_dtypes),
        ("zero_points", zero_points, zero_point_dtypes),
    ):
        if tensor is None:
            continue
        if (
            tensor.dtype not in dtypes
            or tensor.dim() != 1
            or tensor.shape[0] not in sizes
        ):
            refuse(
                name,
                f"{argument} is {describe(tensor)}; emulated with div_mode={div_mode}: "
                f"1-D of a size in {sizes}, dtype in {dtypes}",
            )
    return torch.empty_like(input, dtype=torch.int8)


@emulates(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, "
    "int axis=1, bool div_mode=True) -> Tensor",
    fake=_quantize_fake,
)
def npu_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Quantize to int8 with static scales and zero points.

    `rint(x / scales + zero_points)` with `div_mode`, otherwise `rint(x * scales +
    zero_points)`, in fp32.

    Source: op-plugin `torch_npu-npu_quantize.md`, `QuantizeKernelNpuOpApi.cpp`;
    ops-nn `quant/quantize` (`aclnn_quantize.cpp`), `quant/ascend_quant_v2`.

    Args:
        input: fp16 or bf16.
        scales: `[1]`, or as long as `axis`. With `div_mode`, fp32, or bf16 for a bf16
            input; otherwise the input's dtype.
        zero_points: Shape of `scales`; integers for fp32 scales, otherwise the input's
            dtype.
        dtype: `torch.qint8`.
        axis: The axis of `scales`. Without `div_mode` it is the last one, or the second
            last for -2.
        div_mode: Whether to divide by `scales`, or to multiply.

    Returns:
        int8, shape of the input.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    q = _quantize_fake(input, scales, zero_points, dtype, axis, div_mode)
    shape = [1] * input.dim()
    shape[_quantize_axis(axis, div_mode)] = -1
    factor = scales.float().view(shape)
    values = input.float() / factor if div_mode else input.float() * factor
    if zero_points is not None:
        values = values + zero_points.float().view(shape)
    return q.copy_(int8_values(values))
