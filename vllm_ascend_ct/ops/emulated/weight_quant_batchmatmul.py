# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The weight-only matmul operator."""

from functools import cache

import torch
from torch.nn.functional import linear

from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.float_matmul import float_matmul
from vllm_ascend_ct.ops.emulated.registry import (
    check_layout,
    describe,
    emulates,
    is_transposed,
    refuse,
)
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_weight_quant_batchmatmul"
_INT4_PER_INT32 = 8
_WEIGHT_BITS = {torch.int32: 4, torch.int8: 8}
_ROWS_AT_ONCE = 1024
# Up to this many rows, the matmul is bound by reading the weight: multiply in 16 bits.
_FEW_ROWS = 3


def weight_size(weight: torch.Tensor) -> tuple[int, int]:
    """Logical `[K, N]` of an int8 or int32-packed int4 weight."""
    k, n = weight.shape
    if weight.dtype == torch.int32:
        if is_transposed(weight):
            return k * _INT4_PER_INT32, n
        return k, n * _INT4_PER_INT32
    return k, n


def _check_antiquant(
    argument: str,
    tensor: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
) -> None:
    k, n = weight_size(weight)
    shapes: list[tuple[int, ...]] = [(n,), (1, n), (1,), (1, 1)]
    if group_size:
        shapes = [(-(-k // group_size), n)]
    if tensor.dtype != x.dtype or tuple(tensor.shape) not in shapes:
        refuse(
            _NAME,
            f"{argument} is {describe(tensor)}; emulated: {x.dtype} (dtype of x), with "
            f"one of the shapes {shapes}",
        )
    if not group_size:
        return
    # The kernel assumes that a per-group scale has the weight's memory order.
    transposed = is_transposed(weight)
    if not (is_transposed(tensor) if transposed else tensor.is_contiguous()):
        refuse(
            _NAME,
            f"{argument} is {describe(tensor)}, weight is {describe(weight)}; "
            "supported: both contiguous, or both transposed views",
        )


def _weight_quant_batchmatmul_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    limits = current_limits().weight_quant_batchmatmul
    if any(argument is not None for argument in (quant_scale, quant_offset)) or (
        weight_dtype is not None
    ):
        refuse(_NAME, "quant_scale, quant_offset and weight_dtype are not emulated")
    if inner_precise not in (0, 1):
        refuse(_NAME, f"inner_precise={inner_precise}; supported: 0, 1")
    if (x.dim(), weight.dim()) != (2, 2) or weight.dtype not in _WEIGHT_BITS:
        refuse(
            _NAME,
            f"x is {describe(x)}, weight is {describe(weight)}; supported: 2-D x, 2-D "
            "int8 or int32 (packed int4) weight",
        )
    check_layout(_NAME, "weight", weight)
    check_layout(_NAME, "x", x)
    k, n = weight_size(weight)
    if x.shape[1] != k:
        refuse(_NAME, f"K of x is {x.shape[1]}, of the weight {k}")
    if reason := limits.refusal(
        x.dtype, _WEIGHT_BITS[weight.dtype], k, n, antiquant_group_size
    ):
        refuse(_NAME, reason)
    _check_antiquant(
        "antiquant_scale", antiquant_scale, x, weight, antiquant_group_size
    )
    if antiquant_offset is not None:
        _check_antiquant(
            "antiquant_offset", antiquant_offset, x, weight, antiquant_group_size
        )
        if antiquant_offset.shape != antiquant_scale.shape:
            refuse(
                _NAME,
                f"antiquant_offset is {describe(antiquant_offset)}, antiquant_scale is "
                f"{describe(antiquant_scale)}; supported: the same shape",
            )
    if bias is not None and (
        bias.dtype != limits.bias_dtype(x.dtype)
        or tuple(bias.shape) not in ((n,), (1, n))
        or not bias.is_contiguous()
    ):
        refuse(
            _NAME,
            f"bias is {describe(bias)} for x of {x.dtype}; supported: contiguous "
            f"{limits.bias_dtype(x.dtype)} ({n},) or (1, {n})",
        )
    return x.new_empty((x.shape[0], n))


def _dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """The dequantized weight that the NPU kernel multiplies by, contiguous `[N, K]`.

    fp16 rounds after adding the offset and after scaling; bf16 rounds once, after both.

    Args:
        weight: As in `npu_weight_quant_batchmatmul`.
        scale: As in `npu_weight_quant_batchmatmul`.
        offset: As in `npu_weight_quant_batchmatmul`.
        group_size: Elements of K that share a scale; 0 for per-channel scales.

    """
    k, n = weight_size(weight)

    def rows_of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, tensor.shape[-1]).t().expand(n, -1).unsqueeze(-1)

    def integers() -> torch.Tensor:
        if weight.dtype == torch.int32:
            if is_transposed(weight):
                return unpack_int4(weight.t())
            return unpack_int4(weight).t()
        return weight.t()

    step = scale.dtype if scale.dtype == torch.float16 else torch.float32
    result = torch.empty((n, k), dtype=scale.dtype)
    parts = [integers(), rows_of(scale)]
    if offset is not None:
        parts.append(rows_of(offset))
    for out, *rows in zip(
        result.split(_ROWS_AT_ONCE), *(part.split(_ROWS_AT_ONCE) for part in parts)
    ):
        values = rows[0].to(step).unflatten(1, (-1, group_size or k))
        if offset is not None:
            values = values + rows[2].to(step)
        out.copy_((values * rows[1].to(step)).flatten(1))
    return result


@emulates(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
    "Tensor? antiquant_offset=None, Tensor? quant_scale=None, "
    "Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, int? weight_dtype=None) -> Tensor",
    fake=_weight_quant_batchmatmul_fake,
)
def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    """Multiply by a dequantized weight: `x @ ((weight + offset) * scale) + bias`.

    The dequantized weight (2 bytes per value) is cached while the weight lives, if
    `derived` has room: a CPU has no kernel for the NPU's layout. Products are summed in
    fp32.

    Source: op-plugin `torch_npu-npu_weight_quant_batchmatmul.md`,
    `WeightQuantBatchMatmulV2KernelNpuOpApi.cpp`; ops-nn
    `matmul/weight_quant_batch_matmul_v2`.

    Args:
        x: `[M, K]` fp16 or bf16.
        weight: int8 `[K, N]`, int32 `[K, N / 8]`, or the transposed view of int8
            `[N, K]` or int32 `[N, K / 8]`.
        antiquant_scale: Dtype of x; `(N,)` or `(1, N)`; or `(ceil(K / group), N)`,
            contiguous or transposed like the weight.
        antiquant_offset: Like the scale; added to the integers before scaling.
        quant_scale: Not emulated.
        quant_offset: Not emulated.
        bias: `(N,)`, fp32 for bf16 x and fp16 for fp16 x.
        antiquant_group_size: 0, or a multiple of 32 below K.
        inner_precise: 0 or 1; has no effect.
        weight_dtype: Not emulated.

    Returns:
        `[M, N]`, dtype of x.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _weight_quant_batchmatmul_fake(
        x,
        weight,
        antiquant_scale,
        antiquant_offset,
        quant_scale,
        quant_offset,
        bias,
        antiquant_group_size,
        inner_precise,
        weight_dtype,
    )
    product = weight_only_product(
        x, weight, antiquant_scale, antiquant_offset, antiquant_group_size, bias
    )
    return product if product.dtype == x.dtype else result.copy_(product)


def weight_only_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply by a quantized weight whose dequantized form is cached.

    Args:
        x: `[M, K]`.
        weight: As in `npu_weight_quant_batchmatmul`.
        scale: As in `npu_weight_quant_batchmatmul`.
        offset: As in `npu_weight_quant_batchmatmul`.
        group_size: Elements of K that share a scale; 0 for per-channel scales.
        bias: `(N,)` or `(1, N)`.

    Returns:
        `[M, N]`, rounded to the dtype of x, or fp32.

    """
    k, n = weight_size(weight)
    matrix = derived.get(
        ("16 bits", group_size),
        [weight, scale] if offset is None else [weight, scale, offset],
        k * n * scale.itemsize,
        lambda: dequantized(weight, scale, offset, group_size),
    )
    if matrix is None:
        matrix = dequantized(weight, scale, offset, group_size)
    return multiply_dequantized(x, matrix, bias)


def dequantized(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Dequantize a weight to the form that `multiply_dequantized` takes."""
    matrix = _dequantize(weight, scale, offset, group_size)
    if _multiplies_16_bits(matrix.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(matrix)
    return matrix


def multiply_dequantized(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by a weight from `dequantized`.

    Args:
        x: `[M, K]`.
        matrix: The weight `[N, K]`, possibly in oneDNN's layout.
        bias: `(N,)` or `(1, N)`.

    Returns:
        `[M, N]`, rounded to the dtype of x, or fp32.

    """
    if bias is not None:
        bias = bias.reshape(-1)
    if matrix.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    if len(x) <= _FEW_ROWS:
        if bias is None:
            return linear(x, matrix)
        narrow_bias = bias.to(matrix.dtype)
        if torch.equal(narrow_bias.to(bias.dtype), bias):
            return linear(x, matrix, narrow_bias)
    product = float_matmul(x, matrix.t())
    return product if bias is None else product.add_(bias)


@cache
def _multiplies_16_bits(dtype: torch.dtype) -> bool:
    """Whether this CPU has matmul instructions for a 16-bit dtype, which oneDNN uses.

    If so, oneDNN is fast with a weight in its own layout; otherwise float32 is faster.
    The choice depends on the CPU's features and not on measurements: the two round
    differently, and all processes must compute the same.
    """
    if dtype == torch.bfloat16:
        return (
            torch.cpu._is_avx512_bf16_supported()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return (
        torch.cpu._is_amx_fp16_supported()
        and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
