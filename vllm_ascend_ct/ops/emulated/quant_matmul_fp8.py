# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The FP8 (E4M3) mode of `npu_quant_matmul`.

Source: ops-nn `aclnnQuantMatmulV5.md`, quantization K-C and K-T on Ascend 950;
op-plugin `torch_npu-npu_quant_matmul.md` for sizes.
"""

import torch

from vllm_ascend_ct.ops.dtypes import FP8
from vllm_ascend_ct.ops.emulated.float_matmul import float_matmul
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    check_layout,
    describe,
    is_transposed,
    refuse,
)
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_quant_matmul"


def fp8_matmul_fake(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: int | None,
    group_sizes: list[int] | None,
) -> torch.Tensor:
    """Check a call whose x2 is FP8 `[K, N]`, and allocate its result."""
    limits = current_limits().fp8_matmul
    if limits is None:
        refuse(_NAME, "the chip does not multiply FP8")
    if offset is not None or bias is not None or group_sizes:
        refuse(_NAME, "offset, bias and group_sizes of FP8 weights are not emulated")
    for argument, tensor in (("x1", x1), ("x2", x2)):
        if tensor.dtype != FP8 or tensor.dim() != 2:
            refuse(_NAME, f"{argument} is {describe(tensor)}; emulated: 2-D FP8 (E4M3)")
        check_layout(_NAME, argument, tensor)
    (m, k), n = x1.shape, x2.shape[1]
    if x2.shape[0] != k:
        refuse(_NAME, f"K of x1 is {k}, of x2 {x2.shape[0]}")
    out_dtype = torch.int8 if output_dtype is None else as_dtype(_NAME, output_dtype)
    inner_sizes = [x.shape[-2 if is_transposed(x) else -1] for x in (x1, x2)]
    if reason := limits.refusal(out_dtype, inner_sizes):
        refuse(_NAME, reason)
    for argument, vector, sizes in (
        ("scale", scale, (1, n)),
        ("pertoken_scale", pertoken_scale, (m,)),
    ):
        if (
            vector is None
            or vector.dtype != torch.float32
            or vector.dim() != 1
            or vector.shape[0] not in sizes
            or not vector.is_contiguous()
        ):
            got = "missing" if vector is None else describe(vector)
            refuse(
                _NAME,
                f"{argument} is {got}; supported with FP8: contiguous 1-D float32 of a "
                f"size in {sizes}",
            )
    return x1.new_empty((m, n), dtype=out_dtype)


def fp8_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply and scale in fp32.

    Args:
        x1: FP8 `[M, K]`.
        x2: FP8 `[K, N]`.
        scale: fp32 `[1]` or `[N]`.
        pertoken_scale: fp32 `[M]`.

    Returns:
        fp32 `[M, N]`.

    """
    return float_matmul(x1, x2).mul_(scale).mul_(pertoken_scale.unsqueeze(1))
