# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts of mixture-of-experts layers as functions of tensors.

They sort tokens by expert, multiply twice and restore the token order, and depend on
torch only, so that the methods of any quantization tool can call them. There is no
loop over experts and no synchronization with the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_ascend_ct.ops.dtypes import E2M1, E8M0, FP8
from vllm_ascend_ct.ops.traced import moe_init_routing

Activation = Callable[[torch.Tensor], torch.Tensor]
_CUMULATIVE, _COUNTS = 0, 1
# Which elements of a row share a scale.
_PER_TOKEN, _BLOCKS = 0, 2
_DYNAMIC = 1
# Index is token-major, and may contain -1 for rows that are missing.
_DROP_PAD_BY_TOKEN = 3


class Operands(NamedTuple):
    """Weights of all experts of a rank, for one of the two products.

    Attributes:
        weight: int8 `[E, K, N]`, or int4 packed eight to an int32 along the axis that
            is contiguous in memory; for MX formats see `mx_product`.
        scale: `[E, N]`, or `[E, G, N]` for G groups of K.
        offset: Shape of the scale; added to the integers before scaling.
        bias: `[E, N]`. For int8 rows and int4 weights this is not the layer's bias but
            the assist term of `weights.int4.pack_outputs_with_assist`.

    """

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def is_int4(self) -> bool:
        return self.weight.dtype == torch.int32


class SortedTokens(NamedTuple):
    """Tokens sorted by expert, one row for each expert that a token is routed to.

    Attributes:
        rows: `[T * top-k, H]`; rows after those of the last expert are uninitialized.
        row_index: int32 `[T * top-k]`, token-major: the row of each (token, choice), -1
            if the expert is on another rank.
        counts: int64 `[E]`, number of rows of each expert.
        scale: fp32 `[T * top-k]`, scales of the rows if they are quantized.

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
    """Sort tokens by expert, and optionally quantize them to int8. One launch.

    Args:
        x: `[T, H]` fp16 or bf16.
        topk_ids: int32 `[T, top-k]`.
        experts: Range `(start, end)` of this rank's experts.
        num_experts: Number of experts of all ranks.
        quantize: Whether to quantize the rows to int8 (dynamic per token, symmetric).
        counted: Whether the chip's operator returns counts. Otherwise it returns
            cumulative counts, and converting them takes a few more launches.

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
    """Multiply 16-bit rows by the gate and up projections, and apply the activation.

    Args:
        rows: As in `weight_only_product`.
        counts: As in `weight_only_product`.
        w13: As in `weight_only_product`; gate and up are concatenated along N.
        activation: Function from `[M, N]` to `[M, I]`; None for SwiGLU.

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
        counts: int64 `[E]`, number of rows of each expert.
        experts: Scale and offset have the rows' dtype; the bias is fp32 for bf16 rows
            and fp16 for fp16 rows.

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
    """Multiply int8 rows by the gate and up projections, activate, and quantize again.

    One launch if fused with int4 weights, two with int8 weights.

    Args:
        rows: int8 `[M, H]`, sorted by expert.
        row_scale: fp32 `[M]`.
        counts: int64 `[E]`, number of rows of each expert.
        w13: Gate and up, concatenated along N. If not fused, as in `int8_product`. If
            fused, int8 weights are in FRACTAL_NZ with an fp32 scale, and the scale of
            per-channel int4 weights is `[E, N]`.
        dtype: bf16 or fp16, dtype of the intermediate result if not fused.
        activation: Function from `[M, N]` to `[M, I]`; None for SwiGLU. Must be None if
            fused.
        fused: Whether to use the fused operator. For int4 weights it is given counts,
            as vllm-ascend's own operator is on chips; for int8 weights cumulative
            counts, for which a test on a chip publishes expected values.

    Returns:
        int8 `[M, I]` and its fp32 scale `[M]`.

    """
    if fused:
        kind = _COUNTS if w13.is_int4 else _CUMULATIVE
        return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            rows,
            [w13.weight],
            [w13.scale],
            row_scale,
            counts if kind == _COUNTS else counts.cumsum(0),
            weight_assist_matrix=None if w13.bias is None else [w13.bias],
            dequant_mode=int(w13.scale.dim() == 3),
            # Earlier releases default to a value that the operator rejects.
            dequant_dtype=torch.float32,
            group_list_type=kind,
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
        counts: int64 `[E]`, number of rows of each expert.
        experts: int8 weights have a scale `[E, N]`, bf16 for bf16 results and fp32 for
            fp16 results. int4 weights are packed along N and contiguous; their scale
            `[E, G, N]`, G >= 1, is int64 and holds fp32 bits.
        dtype: bf16 or fp16, dtype of the result.

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


def float_quant(
    rows: torch.Tensor, experts: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows `[M, K]` to the format of floating-point weights. One launch. A5.

    Returns:
        Rows and scales as `float_product` takes them.

    """
    if not in_blocks(experts):
        return torch.ops.npu.npu_dynamic_quant(rows, dst_type=FP8)
    return torch.ops.npu.npu_dynamic_mx_quant(rows, dst_type=_packed(experts) or FP8)


def float_gate(
    rows: torch.Tensor, row_scale: torch.Tensor, counts: torch.Tensor, w13: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply rows, apply SwiGLU, and quantize to the format of the rows. A5.

    Two launches: one for cumulative counts, as vllm-ascend passes them.

    Args:
        rows: As in `float_product`.
        row_scale: As in `float_product`.
        counts: int64 `[E]`, number of rows of each expert.
        w13: As in `float_product`; gate and up side by side.

    Returns:
        Rows and scales as `float_product` takes them, with half of N as K.

    """
    packed = _packed(w13)
    mode, scale_dtype = (_BLOCKS, E8M0) if in_blocks(w13) else (_PER_TOKEN, None)
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        rows,
        [w13.weight],
        [w13.scale],
        row_scale,
        counts.cumsum(0),
        dequant_mode=mode,
        dequant_dtype=torch.float32,
        quant_mode=mode,
        quant_dtype=packed or FP8,
        x_dtype=packed,
        weight_dtype=packed,
        weight_scale_dtype=scale_dtype,
        x_scale_dtype=scale_dtype,
    )


def float_product(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    counts: torch.Tensor,
    experts: Operands,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply rows by experts in the same format: FP8, MXFP8 or MXFP4. One launch. A5.

    Args:
        rows: FP8 (E4M3) `[M, K]`, or two FP4 (E2M1) to a uint8 `[M, K / 2]`, sorted by
            expert.
        row_scale: fp32 `[M]`; of MX formats uint8 (E8M0) `[M, ceil(K / 64), 2]`.
        counts: int64 `[E]`, number of rows of each expert.
        experts: FP8 `[E, K, N]`, scale fp32 `[E, N]`. In MX formats transposed views of
            `[E, N, ...]`: FP8, or two FP4 to a uint8 along K `[E, K / 2, N]`; scale
            uint8 (E8M0) `[E, ceil(K / 64), N, 2]`.
        dtype: bf16 or fp16, dtype of the result.

    Returns:
        `[M, N]`.

    """
    packed, scale_dtype = _packed(experts), E8M0 if in_blocks(experts) else None
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [experts.weight],
        scale=[experts.scale],
        per_token_scale=[row_scale],
        group_list=counts,
        group_list_type=_COUNTS,
        group_type=0,
        split_item=2,
        output_dtype=dtype,
        x_dtype=packed,
        weight_dtype=packed,
        scale_dtype=scale_dtype,
        per_token_scale_dtype=scale_dtype,
    )
    return product


def in_blocks(experts: Operands) -> bool:
    """Whether floating-point weights have E8M0 scales of blocks."""
    return experts.scale.dtype == torch.uint8


def _packed(experts: Operands) -> int | None:
    """The number of E2M1, for tensors of bytes; None for FP8."""
    return E2M1 if experts.weight.dtype == torch.uint8 else None


def quant_dequant_product(
    rows: torch.Tensor, counts: torch.Tensor, experts: Operands
) -> torch.Tensor:
    """Quantize rows to int8 per token (symmetric), and multiply them by int8 experts.

    Two launches: one for cumulative counts and one to multiply. 310P only.

    Args:
        rows: fp16 `[M, K]`, sorted by expert.
        counts: int64 `[E]`, number of rows of each expert.
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
    """Top-k reduction: sum the weighted rows of each token.

    One launch, or two if some rows are missing.

    Args:
        rows: `[T * top-k, H]` fp16 or bf16, sorted by expert.
        index: int32 `[T * top-k]`, token-major: the row of each (token, choice).
        weights: `[T, top-k]`; None for one unweighted row per token.
        topk_ids: `[T, top-k]`.
        all_here: Whether all experts are on this rank, so that no index is -1.

    Returns:
        `[T, H]`, dtype of the rows.

    """
    if all_here:
        return torch.ops.npu.npu_moe_token_unpermute(rows, index, weights)
    # Pass each row as an expert with a capacity of 1, and the ids although they are not
    # read without a bias: code known to run this mode on a chip calls it like this.
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
