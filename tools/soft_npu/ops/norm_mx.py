# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""RMS norms of A5 that quantize to MX formats: into them vllm-ascend's passes fuse."""

import torch

from tools.soft_npu.ops.norm import check, normalize
from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.dtypes import E2M1
from vllm_ascend_ct.ops.emulated.dynamic_mx_quant import npu_dynamic_mx_quant
from vllm_ascend_ct.ops.emulated.registry import describe, refuse


def _norm(
    name: str,
    x: torch.Tensor,
    wide: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    """Normalize the last axis in fp32, with one rounding to the dtype of `x`."""
    check(name, x, gamma)
    if gamma.dim() != 1 or x.dtype == torch.float32:
        refuse(name, f"gamma is {describe(gamma)}, x is {describe(x)}; 1-D, 16 bits")
    if beta is not None and (beta.shape, beta.dtype) != (gamma.shape, gamma.dtype):
        refuse(name, f"beta is {describe(beta)}, gamma is {describe(gamma)}")
    y = normalize(wide, gamma, epsilon)[0] * gamma.float()
    return (y if beta is None else y + beta.float()).to(x.dtype)


@implements("npu::npu_rms_norm_dynamic_mx_quant")
def npu_rms_norm_dynamic_mx_quant(
    x: torch.Tensor,
    gamma: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    scale_alg: int = 0,
    round_mode: str = "rint",
    dst_type: int = E2M1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize `[..., K]`, round to 16 bits, and quantize as `npu_dynamic_mx_quant`.

    Source: op-plugin `RmsNormDynamicMxQuantKernelNpuOpApi.cpp`; ops-nn
    `norm/rms_norm_dynamic_mx_quant`.

    Returns:
        Values, scales, and no elements of rstd.

    """
    y = _norm("npu_rms_norm_dynamic_mx_quant", x, x, gamma, beta, epsilon)
    q, scale = npu_dynamic_mx_quant(y, -1, round_mode, dst_type, scale_alg=scale_alg)
    return q, scale, torch.empty(0)


@implements("npu::npu_add_rms_norm_dynamic_mx_quant")
def npu_add_rms_norm_dynamic_mx_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    scale_alg: int = 0,
    round_mode: str = "rint",
    dst_type: int = E2M1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, and go on as `npu_rms_norm_dynamic_mx_quant` with the sum in fp32.

    Source: op-plugin `AddRmsNormDynamicMxQuantKernelNpuOpApi.cpp`; ops-nn
    `norm/add_rms_norm_dynamic_mx_quant`.

    Returns:
        Values, the rounded sum, scales, and no elements of rstd.

    """
    name = "npu_add_rms_norm_dynamic_mx_quant"
    if (x1.shape, x1.dtype) != (x2.shape, x2.dtype):
        refuse(name, f"x1 is {describe(x1)}, x2 is {describe(x2)}")
    total = x1.float() + x2.float()
    y = _norm(name, x1, total, gamma, beta, epsilon)
    q, scale = npu_dynamic_mx_quant(y, -1, round_mode, dst_type, scale_alg=scale_alg)
    return q, total.to(x1.dtype), scale, torch.empty(0)
