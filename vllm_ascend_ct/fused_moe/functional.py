# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts of mixture-of-experts layers as functions of tensors.

Sort tokens by expert, multiply twice, bring the rows back: nothing else, so that any
quantization tool's method can call them. No loop over experts, and nothing that waits
for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_ascend_ct.ops.traced import moe_init_routing

Activation = Callable[[torch.Tensor], torch.Tensor]
_CUMULATIVE, _COUNTS = 0, 1
_DYNAMIC = 1
# Row-major, and an index may be -1.
_DROP_PAD_BY_TOKEN = 3


class Operands(NamedTuple):
    """What all experts of a rank multiply by, in one of their two products.

    Attributes:
        weight: int8 `[E, K, N]`, or int4 packed eight to an int32 along the axis that
            is contiguous in memory.
        scale: `[E, N]`, or `[E, G, N]` for groups of K.
        offset: Like the scale; added to the integers before it.
        bias: `[E, N]`. Of int8 rows by int4 weights no bias but the assist term of
            `weights.int4.pack_outputs_with_assist`.

    """

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def is_int4(self) -> bool:
        return self.weight.dtype == torch.int32


class SortedTokens(NamedTuple):
    """Tokens by expert, each as often as experts chose it.

    Attributes:
        rows: `[T * top-k, H]`; those behind the last expert's are not written.
        row_index: int32 `[T * top-k]`, the row of each choice, -1 if it is not here.
        counts: int64 `[E]`, rows of each expert.
        scale: fp32 `[T * top-k]` of quantized rows.

    """

    rows: torch.Tensor
    row_index: torch.Tensor
    counts: torch.Tensor
    scale: torch.Tensor


def sort_tokens(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    experts: tuple[int, int],
    num_experts: int,
    quantize: bool,
    counted: bool = True,
) -> SortedTokens:
    """Sort tokens by expert, and quantize them to int8. One launch.

    Args:
        x: `[T, H]` fp16 or bf16.
        topk_ids: int32 `[T, top-k]`.
        experts: The first of this rank's experts, and the one behind the last.
        num_experts: Of all ranks.
        quantize: Whether to quantize rows, dynamically and symmetric.
        counted: Whether the chip counts rows; else it says where they end, which
            takes some launches more.

    """
    mode = _DYNAMIC if quantize else -1
    return SortedTokens(
        *moe_init_routing(x, topk_ids, list(experts), num_experts, mode, counted)
    )


def weight_only_gate(
    rows: torch.Tensor,
    counts: torch.Tensor,
    w13: Operands,
    activation: Activation | None,
) -> torch.Tensor:
    """Multiply 16-bit rows by gates and ups, and apply the activation.

    Args:
        rows: As of `weight_only_product`.
        counts: As of `weight_only_product`.
        w13: As of `weight_only_product`; gate and up in N.
        activation: From `[M, N]` to `[M, I]`; None for SwiGLU.

    Returns:
        `[M, I]`, dtype of the rows.

    """
    hidden = weight_only_product(rows, counts, w13)
    if activation is None:
        return torch.ops.npu.npu_swiglu(hidden)
    return activation(hidden)


def weight_only_product(
    rows: torch.Tensor, counts: torch.Tensor, experts: Operands
) -> torch.Tensor:
    """Multiply 16-bit rows by int8 or int4 experts. One launch.

    Args:
        rows: `[M, K]` fp16 or bf16, sorted by expert.
        counts: int64 `[E]`.
        experts: Scale and offset of the rows' dtype, bias fp32 for bf16 rows, fp16 for
            fp16 rows.

    Returns:
        `[M, N]`, dtype of the rows.

    """
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [experts.weight],
        bias=None if experts.bias is None else [experts.bias],
        antiquant_scale=[experts.scale],
        antiquant_offset=None if experts.offset is None else [experts.offset],
        group_list=counts,
        group_list_type=_COUNTS,
        group_type=0,
        split_item=2,
        output_dtype=rows.dtype,
    )
    return product


def int8_gate(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    counts: torch.Tensor,
    w13: Operands,
    dtype: torch.dtype,
    activation: Activation | None,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply int8 rows by gates and ups, apply the activation, and quantize.

    Two launches if fused.

    Args:
        rows: int8 `[M, H]`, sorted by expert.
        row_scale: fp32 `[M]`.
        counts: int64 `[E]`.
        w13: Gate and up in N. Not fused as of `int8_product`. Fused: int8 is in
            FRACTAL_NZ, its scale fp32; the scale of int4 per channel is `[E, N]`.
        dtype: Of what is not fused, bf16 or fp16.
        activation: From `[M, N]` to `[M, I]`; None for SwiGLU, as if fused.
        fused: Whether one operator does it all. Its numbers are known from a chip for
            a list that says where each expert's rows end.

    Returns:
        int8 `[M, I]` and its fp32 scale `[M]`.

    """
    if fused:
        return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            rows,
            [w13.weight],
            [w13.scale],
            row_scale,
            counts.cumsum(0),
            weight_assist_matrix=None if w13.bias is None else [w13.bias],
            dequant_mode=int(w13.scale.dim() == 3),
            # An earlier default is one that the operator itself refuses.
            dequant_dtype=torch.float32,
            group_list_type=_CUMULATIVE,
        )
    hidden = int8_product(rows, row_scale, counts, w13, dtype)
    if activation is None:
        hidden = torch.ops.npu.npu_swiglu(hidden)
    else:
        hidden = activation(hidden)
    return torch.ops.npu.npu_dynamic_quant(hidden)


def int8_product(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    counts: torch.Tensor,
    experts: Operands,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply int8 rows by int8 or int4 experts. One launch.

    Args:
        rows: int8 `[M, K]`, sorted by expert.
        row_scale: fp32 `[M]`.
        counts: int64 `[E]`.
        experts: int8 with a scale `[E, N]`, bf16 for bf16 results, fp32 for fp16. int4
            is packed along N and contiguous; its scale is fp32 bits in int64,
            `[E, G, N]`, G at least 1.
        dtype: Of the result, bf16 or fp16.

    Returns:
        `[M, N]`.

    """
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [experts.weight],
        bias=None if experts.bias is None else [experts.bias],
        scale=[experts.scale],
        per_token_scale=[row_scale],
        group_list=counts,
        group_list_type=_COUNTS,
        group_type=0,
        split_item=2,
        output_dtype=dtype,
    )
    return product


def quant_dequant_product(
    rows: torch.Tensor, counts: torch.Tensor, experts: Operands
) -> torch.Tensor:
    """Quantize rows per token, symmetric, and multiply them by int8 experts.

    One launch of the product, and one of where rows end. 310P has it.

    Args:
        rows: fp16 `[M, K]`, sorted by expert.
        counts: int64 `[E]`.
        experts: int8 `[E, N, K]`, contiguous or in FRACTAL_NZ, scale fp32 `[E, N]`.

    Returns:
        fp16 `[M, N]`.

    """
    product: torch.Tensor = torch.ops.npu.npu_quant_grouped_matmul_dequant(
        rows, experts.weight, experts.scale, counts.cumsum(0), quant_mode="pertoken"
    )
    return product


def combine(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    all_here: bool,
) -> torch.Tensor:
    """Sum the rows of each token. One launch, or with some not here two.

    Args:
        rows: `[T * top-k, H]` fp16 or bf16, sorted by expert.
        index: int32 `[T * top-k]`, token-major.
        weights: `[T, top-k]`; None for one row a token, unweighted.
        topk_ids: `[T, top-k]`.
        all_here: Whether no index is -1.

    Returns:
        `[T, H]`, dtype of the rows.

    """
    if all_here:
        return torch.ops.npu.npu_moe_token_unpermute(rows, index, weights)
    # Each row as an expert of one: those who ran this mode on a chip call it so, ids
    # included, which without a bias are not read.
    return torch.ops.npu.npu_moe_finalize_routing(
        rows.unsqueeze(1),
        None,
        None,
        None,
        None if weights is None else weights.to(rows.dtype),
        index,
        topk_ids.to(torch.int32),
        drop_pad_mode=_DROP_PAD_BY_TOKEN,
    )
