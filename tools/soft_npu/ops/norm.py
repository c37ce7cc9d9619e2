# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""RMS norms, also fused with additions and quantization."""

from math import nan

import torch

from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.emulated.registry import describe, refuse

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(name: str, x: torch.Tensor, gamma: torch.Tensor) -> None:
    """Check dtypes, and that the sizes of gamma are the last of x."""
    if x.dtype not in _DTYPES or gamma.dtype not in (x.dtype, torch.float32):
        refuse(name, f"x is {describe(x)}, gamma is {describe(gamma)}; one dtype")
    if gamma.shape != x.shape[x.dim() - gamma.dim() :]:
        refuse(name, f"gamma is {describe(gamma)} of {describe(x)}; its last sizes")


def normalize(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x / rms(x)` in fp32, and 1 / rms."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return wide * rstd, rstd


@implements("npu::npu_rms_norm")
def npu_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize `[..., *gamma.shape]` in fp32, rounded once; also returns rstd.

    Source: ops-nn `norm/rms_norm`.
    """
    check("npu_rms_norm", input, gamma)
    normal, rstd = normalize(input, gamma, epsilon)
    return (normal * gamma.float()).to(input.dtype), rstd


@implements("npu::npu_gemma_rms_norm", "_C_ascend::npu_gemma_rms_norm")
def npu_gemma_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize with `1 + gamma` in fp32, rounded once; also returns rstd.

    Source: op-plugin `GemmaRmsNormKernelOpApi.cpp`; ops-nn `norm/gemma_rms_norm`.
    """
    check("npu_gemma_rms_norm", input, gamma)
    normal, rstd = normalize(input, gamma, epsilon)
    return (normal * (1 + gamma.float())).to(input.dtype), rstd


def _add(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Add in fp16, or in fp32 and round once."""
    if x1.dtype == torch.float16:
        return x1 + x2
    return (x1.float() + x2.float()).to(x1.dtype)


@implements("npu::npu_add_rms_norm")
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, then normalize; the product with gamma is rounded after the norm is.

    Follows the NPU's templates that normalize the rounded sum: for one row per core, or
    a small hidden size. Source: ops-nn `norm/add_rms_norm`.

    Returns:
        Norm, rstd, and sum.

    """
    check("npu_add_rms_norm", x1, gamma)
    if (x1.shape, x1.dtype) != (x2.shape, x2.dtype):
        refuse("npu_add_rms_norm", f"x1 is {describe(x1)}, x2 is {describe(x2)}")
    total = _add(x1, x2)
    normal, rstd = normalize(total, gamma, epsilon)
    normal = normal.to(x1.dtype)
    if x1.dtype == torch.float16:
        return normal * gamma.to(x1.dtype), rstd, total
    return (normal.float() * gamma.float()).to(x1.dtype), rstd, total


@implements("_C_ascend::npu_add_rms_norm_bias")
def npu_add_rms_norm_bias(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `npu_add_rms_norm`, then add beta.

    Source: vllm-ascend `csrc/moe/add_rms_norm_bias`.
    """
    normal, rstd, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
    if beta is not None:
        normal = (normal.float() + beta.float()).to(normal.dtype)
    return normal, rstd, total


def _quantize(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(-128, 127).to(torch.int8)


@implements("npu::npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    scales1: torch.Tensor,
    zero_points1: torch.Tensor | None,
    beta: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None,
    zero_points2: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, normalize and quantize by `y / scales1 + zero_points1`.

    Source: op-plugin `torch_npu-npu_add_rms_norm_quant.md`; ops-nn
    `norm/add_rms_norm_quant`.

    Returns:
        int8 of the first scale, an unwritten int8 tensor, and the sum.

    """
    name = "npu_add_rms_norm_quant"
    if scales2 is not None or zero_points2 is not None or axis != -1:
        refuse(name, "a second scale and axis are not emulated")
    if dst_type not in (None, 1):
        refuse(name, f"dst_type={dst_type}; emulated: int8")
    is_bfloat16 = x1.dtype == torch.bfloat16
    for operand, other in ((scales1, torch.float32), (zero_points1, torch.int32)):
        dtype = x1.dtype if is_bfloat16 else other
        if operand is None:
            continue
        if (operand.dtype, operand.shape) != (dtype, gamma.shape):
            refuse(name, f"{describe(operand)} for {x1.dtype}; {dtype}, as gamma")
    total = _add(x1, x2)
    normal, _ = normalize(total, gamma, epsilon)
    y = normal * gamma.float()
    if x1.dtype == torch.float16:
        y = (normal.half() * gamma).float()
    if beta is not None:
        y = y + beta.float()
    y = y / scales1.float() if div_mode else y * scales1.float()
    if zero_points1 is not None:
        y = y + zero_points1.float()
    quantized = _quantize(y)
    return quantized, torch.full_like(quantized, -128), total


@implements("npu::npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    *,
    smooth_scale1: torch.Tensor | None = None,
    smooth_scale2: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, normalize and quantize dynamically per row, all in fp32.

    The sum is not rounded before it is normalized. Source: op-plugin
    `torch_npu-npu_add_rms_norm_dynamic_quant.md`; ops-nn
    `norm/add_rms_norm_dynamic_quant`.

    Returns:
        int8 `[..., H]`, an unwritten scalar, the sum, the scale fp32 `[...]`, and an
        unwritten scalar.

    """
    name = "npu_add_rms_norm_dynamic_quant"
    if smooth_scale2 is not None or output_mask not in (None, [], [True, False]):
        refuse(name, "a second output is not emulated")
    if y_dtype not in (None, torch.int8):
        refuse(name, f"y_dtype={y_dtype}; emulated: int8")
    total = x1.float() + x2.float()
    normal, _ = normalize(total, gamma, epsilon)
    y = normal * gamma.float()
    if beta is not None:
        y = y + beta.float()
    if smooth_scale1 is not None:
        y = y * smooth_scale1.float()
    reciprocal = 127 / y.abs().amax(-1, keepdim=True)
    quantized = _quantize((y * reciprocal).nan_to_num(0))
    scale = (1 / reciprocal).squeeze(-1)
    # As the operator's host code allocates them; its meta function has no elements.
    second, its_scale = torch.full((), -128, dtype=torch.int8), torch.full((), nan)
    return quantized, second, total.to(x1.dtype), scale, its_scale
