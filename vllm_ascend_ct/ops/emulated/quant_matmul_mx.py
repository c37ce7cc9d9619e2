# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The MXFP8 (E4M3) and MXFP4 (E2M1) modes of `npu_quant_matmul`.

Source: ops-nn `aclnnQuantMatmulV5.md`, MX quantization of both operands on Ascend 950,
and `quant_matmul_checker.cpp`; op-plugin `torch_npu-npu_quant_matmul.md` for sizes.
"""

from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, E8M0, FP8, MX_BLOCK
from vllm_ascend_ct.ops.emulated.mx_values import decode, scale_pairs
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    check_layout,
    describe,
    is_transposed,
    refuse,
)
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_quant_matmul"
_GROUPS = [1, 1, MX_BLOCK]
# Values of x2 to decode at once; see `float_matmul.py`.
_VALUES = 1 << 20


def mx_matmul_fake(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: int | None,
    group_sizes: list[int] | None,
    **options: Any,
) -> torch.Tensor:
    """Check a call whose scales are E8M0, and allocate its result.

    Args:
        x1: FP8 `[M, K]`, or uint8 `[M, K / 2]` with two E2M1 values each.
        x2: FP8 `[K, N]`, or the transposed view of uint8 `[N, K / 2]`.
        scale: uint8 `[ceil(K / 64), N, 2]`, E8M0; transposed if x2 is.
        pertoken_scale: uint8 `[M, ceil(K / 64), 2]`, E8M0.
        bias: fp32 `[N]`.
        output_dtype: fp16 or bf16.
        group_sizes: `[1, 1, 32]`.
        options: The other arguments.

    """
    limits = current_limits().mx_matmul
    if limits is None:
        refuse(_NAME, "the chip does not multiply MX formats")
    if options["offset"] is not None or options["y_scale"] is not None:
        refuse(_NAME, "offset and y_scale of MX formats; supported: None")
    if group_sizes != _GROUPS:
        refuse(_NAME, f"group_sizes={group_sizes}; supported: {_GROUPS}")
    scales = options["scale_dtype"], options["pertoken_scale_dtype"]
    check_formats(_NAME, (x1, x2), (options["x1_dtype"], options["x2_dtype"]), scales)
    per_value = 2 if x1.dtype == torch.uint8 else 1
    (m, k), n = (x1.shape[0], x1.shape[1] * per_value), x2.shape[1]
    if x2.shape[0] * per_value != k:
        refuse(_NAME, f"K of x1 is {k}, of x2 {x2.shape[0] * per_value}")
    out_dtype = torch.int8 if output_dtype is None else as_dtype(_NAME, output_dtype)
    if reason := limits.refusal(out_dtype, k, n):
        refuse(_NAME, reason)
    if bias is not None and (
        bias.dtype != torch.float32 or bias.shape != (n,) or not bias.is_contiguous()
    ):
        refuse(_NAME, f"bias is {describe(bias)}; supported: float32 ({n},)")
    check_scale(_NAME, "pertoken_scale", pertoken_scale, (m, scale_pairs(k), 2))
    check_scale(_NAME, "scale", scale, (scale_pairs(k), n, 2), is_transposed(x2))
    return x1.new_empty((m, n), dtype=out_dtype)


def check_formats(
    name: str,
    operands: tuple[torch.Tensor, torch.Tensor],
    dtypes: tuple[int | None, int | None],
    scale_dtypes: tuple[int | None, int | None],
) -> None:
    """Refuse operands that are not both MXFP8 or both MXFP4.

    Args:
        name: Name of the operator.
        operands: Activations and one weight.
        dtypes: The arguments that name their dtypes.
        scale_dtypes: The arguments that name the dtypes of their scales.

    """
    if set(scale_dtypes) != {E8M0}:
        refuse(name, f"dtypes of scales {scale_dtypes}; emulated: {E8M0} for both")
    dtype = {(None, None): FP8, (E2M1, E2M1): torch.uint8}.get(dtypes)
    for argument, tensor in zip(("x", "weight"), operands):
        if dtype is None or tensor.dtype != dtype or tensor.dim() != 2:
            refuse(
                name,
                f"{argument} is {describe(tensor)}, given dtypes {dtypes}; emulated: "
                f"2-D FP8 (E4M3) and None, or uint8 and {E2M1}",
            )
        check_layout(name, argument, tensor)
    x, weight = operands
    if not x.is_contiguous():
        refuse(name, f"x is {describe(x)}; emulated: contiguous")
    if dtype == torch.uint8 and not is_transposed(weight):
        # Otherwise two outputs share a byte.
        refuse(name, f"weight is {describe(weight)}; emulated for E2M1: a view")


def check_scale(
    name: str,
    argument: str,
    scale: torch.Tensor | None,
    shape: tuple[int, ...],
    transposed: bool = False,
) -> None:
    """Refuse E8M0 scales of another dtype, shape or layout.

    Args:
        name: Name of the operator.
        argument: Name of the argument.
        scale: Its value.
        shape: Its required shape, pairs at the end.
        transposed: Whether the two axes before the pairs must be transposed, because
            those of the weight are.

    """
    if scale is None:
        refuse(name, f"{argument} is missing; supported: uint8 {shape}")
    is_laid_out = scale.is_contiguous()
    if transposed and scale.dim() == len(shape):
        one = 1 in shape[-3:-1]
        is_laid_out = scale.transpose(-3, -2).is_contiguous() or (one and is_laid_out)
    if scale.dtype != torch.uint8 or scale.shape != shape or not is_laid_out:
        layout = "transposed" if transposed else "contiguous"
        refuse(
            name, f"{argument} is {describe(scale)}; supported: uint8 {shape}, {layout}"
        )


def mx_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply in fp32. Each product is exact, like the operands times their scales.

    Returns:
        fp32 `[M, N]`.

    """
    x = decode(x1, pertoken_scale)
    step = max(1, _VALUES // x.shape[1])
    y = x.new_empty((len(x), x2.shape[1]))
    parts = x2.t().split(step), scale.transpose(0, 1).split(step), y.split(step, dim=1)
    for rows, factors, out in zip(*parts):
        torch.mm(x, decode(rows, factors).t(), out=out)
    return y if bias is None else y.add_(bias)
