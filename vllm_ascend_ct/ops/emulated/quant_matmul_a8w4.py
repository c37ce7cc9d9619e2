# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The W4A8 mode of `npu_quant_matmul`: int8 activations and int4 weights.

Source: op-plugin `torch_npu-npu_quant_matmul.md` and `test_npu_quant_matmul.py`; ops-nn
`aclnnQuantMatmulV5.md`.
"""

import torch

from vllm_ascend_ct.ops.emulated.int_matmul import int4_products
from vllm_ascend_ct.ops.emulated.registry import as_dtype, describe, refuse
from vllm_ascend_ct.ops.emulated.weights import unpack_quant_param
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_quant_matmul"
_INT4_PER_INT32 = 8


def a8w4_fake(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: int | None,
    group_sizes: list[int] | None,
) -> torch.Tensor:
    """Check a call whose x2 is int32 `[K, N / 8]`, and allocate its result."""
    limits = current_limits().a8w4
    if limits is None:
        refuse(_NAME, "the chip does not multiply int8 by int4")
    if x1.dtype != torch.int8 or (x1.dim(), x2.dim()) != (2, 2) or bias is not None:
        refuse(_NAME, f"x1 is {describe(x1)}; supported: 2-D int8, without bias")
    for argument, tensor in (("x1", x1), ("x2", x2)):
        if not tensor.is_contiguous() or tensor.numel() == 0:
            refuse(_NAME, f"{argument} is {describe(tensor)}; supported: contiguous")
    (m, k), n = x1.shape, x2.shape[1] * _INT4_PER_INT32
    if x2.shape[0] != k:
        refuse(_NAME, f"K of x1 is {k}, of x2 {x2.shape[0]}")
    if group_sizes is None or len(group_sizes) != 3 or any(group_sizes[:2]):
        # Without it, torch_npu's meta function mistakes the scale for a per-group one.
        refuse(_NAME, f"group_sizes={group_sizes}; supported: [0, 0, group size]")
    group_size = group_sizes[2]
    out_dtype = torch.int8 if output_dtype is None else as_dtype(_NAME, output_dtype)
    if reason := limits.refusal(out_dtype, k, n, group_size):
        refuse(_NAME, reason)
    scale_shape = (k // group_size, n) if group_size else (n,)
    for argument, operand, dtype, shape in (
        ("scale", scale, torch.int64, scale_shape),
        ("offset", offset, torch.float32, (n,)),
        (
            "pertoken_scale",
            pertoken_scale,
            torch.float32,
            (m, 1) if group_size else (m,),
        ),
    ):
        if operand is None or (operand.dtype, operand.shape) != (dtype, shape):
            got = "missing" if operand is None else describe(operand)
            refuse(_NAME, f"{argument} is {got}; supported: {dtype} {shape}")
    return x1.new_empty((m, n), dtype=out_dtype)


def a8w4(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    pertoken_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply as the NPU does: two int4 products, groups summed in fp16.

    `x = 16 * high + low + 8`, so `offset` must be `8 * sum over k of x2 * scale`.

    Args:
        x1: int8 `[M, K]`.
        x2: int4 as int32 `[K, N / 8]`.
        scale: int64 from `npu_trans_quant_param`, `[N]` or `[G, N]`.
        offset: The assist term, fp32 `[N]`.
        pertoken_scale: fp32 `[M]` or `[M, 1]`.

    Returns:
        fp32 `[M, N]`.

    """
    scales, _ = unpack_quant_param(scale.reshape(-1, scale.shape[-1]))
    return a8w4_product(x1, x2, scales, offset) * pertoken_scale.reshape(-1, 1)


def a8w4_product(
    x1: torch.Tensor, x2: torch.Tensor, scales: torch.Tensor, assist: torch.Tensor
) -> torch.Tensor:
    """Multiply int8 activations by an int4 weight, without per-token scales.

    Args:
        x1: int8 `[M, K]`.
        x2: int4 as int32 `[K, N / 8]`.
        scales: fp32 `[G, N]` with 10 mantissa bits.
        assist: The assist term, fp32 `[N]`.

    Returns:
        fp32 `[M, N]`.

    """
    group_size = x1.shape[1] // len(scales)
    halves = torch.cat((x1 >> 4, (x1 & 15) - 8))
    total = None
    for product, scale in zip(int4_products(halves, x2, group_size), scales):
        group = (product * scale).to(torch.float16)
        total = group if total is None else total.add_(group)
    assert total is not None
    high_total, low_total = total.float().chunk(2)
    return 16 * high_total + low_total + assist
