# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that sum the experts' rows of each token."""

import torch

from vllm_ascend_ct.ops.emulated.registry import describe, emulates, refuse
from vllm_ascend_ct.ops.limits import current_limits

_UNPERMUTE = "npu_moe_token_unpermute"
_FINALIZE = "npu_moe_finalize_routing"
_DROP_PAD_BY_TOKEN = 3


def _unpermute_fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    if padded_mode:
        refuse(_UNPERMUTE, "padded_mode is not emulated")
    if permuted_tokens.dim() != 2 or (sorted_indices.dim(), sorted_indices.dtype) != (
        1,
        torch.int32,
    ):
        refuse(
            _UNPERMUTE,
            f"permuted_tokens is {describe(permuted_tokens)}, sorted_indices is "
            f"{describe(sorted_indices)}; supported: 2-D, and int32 1-D",
        )
    top_k = 1 if probs is None else probs.shape[1]
    if reason := current_limits().moe_token_unpermute.refusal(
        permuted_tokens.dtype, top_k
    ):
        refuse(_UNPERMUTE, reason)
    tokens = sorted_indices.shape[0] // top_k
    if probs is not None and probs.numel() != sorted_indices.shape[0]:
        refuse(_UNPERMUTE, f"probs is {describe(probs)}; supported: one per index")
    return permuted_tokens.new_empty((tokens, permuted_tokens.shape[1]))


@emulates(
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, "
    "Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
    fake=_unpermute_fake,
)
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """Sum the rows of each token: `sum over j of probs[t, j] * row[index[t, j]]`.

    Accumulates in fp32 in the order of j, and rounds once. Rows of weight 0 are not
    read, whatever their index: vllm-ascend has them for experts of other ranks.

    Source: op-plugin `MoeTokenUnpermuteKernelNpuOpApi.cpp`; ops-transformer
    `moe/moe_token_unpermute/op_kernel/moe_token_unpermute.h`.

    Args:
        permuted_tokens: `[R, H]` fp16, bf16 or fp32.
        sorted_indices: int32 `[T * top-k]`, token-major. Those of the rows that are
            read are in `[0, R)`, without duplicates.
        probs: `[T, top-k]`; None for one unweighted row per token.
        padded_mode: False.
        restore_shape: Only read in padded mode.

    Returns:
        `[T, H]`, dtype of `permuted_tokens`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _unpermute_fake(
        permuted_tokens, sorted_indices, probs, padded_mode, restore_shape
    )
    if probs is None:
        probs = torch.ones(len(result), 1)
    weights = probs.float()
    is_read = weights.flatten() != 0
    # A batch's padding may have weights of NaN. Nobody uses its result.
    indices = sorted_indices[weights.flatten().abs() > 0].tolist()
    if indices and not (
        min(indices) >= 0
        and max(indices) < len(permuted_tokens)
        and len(set(indices)) == len(indices)
    ):
        refuse(_UNPERMUTE, "sorted_indices must be in range and unique")
    # Not in the default dtype, which an engine sets while it loads.
    rows = torch.zeros(len(sorted_indices), result.shape[1], dtype=torch.float32)
    rows[is_read] = permuted_tokens[sorted_indices[is_read]].float()
    rows = rows.view(*weights.shape, -1) * weights.unsqueeze(2)
    total = torch.zeros(result.shape, dtype=torch.float32)
    for choice in rows.unbind(1):
        total += choice
    return result.copy_(total)


def _finalize_fake(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    if any(argument is not None for argument in (skip1, skip2, bias)):
        refuse(_FINALIZE, "skip1, skip2 and bias are not emulated")
    if drop_pad_mode != _DROP_PAD_BY_TOKEN or k != 1:
        # Only this mode (an expert capacity) allows an index of -1.
        refuse(_FINALIZE, f"drop_pad_mode={drop_pad_mode}, k={k}; emulated: 3, 1")
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    top_k = 1 if scales is None else scales.shape[-1]
    if rows.dim() != 3 or (index.dim(), index.dtype) != (1, torch.int32):
        refuse(
            _FINALIZE,
            f"expanded_permuted_rows is {describe(rows)}, expanded_src_to_dst_row is "
            f"{describe(index)}; supported: [E, C, H], and int32 1-D",
        )
    if reason := current_limits().moe_finalize_routing.refusal(
        rows.dtype, rows.shape[0], top_k
    ):
        refuse(_FINALIZE, reason)
    tokens = index.shape[0] // top_k
    if export_for_source_row is not None and (
        export_for_source_row.dtype,
        export_for_source_row.shape,
    ) != (torch.int32, (tokens, top_k)):
        refuse(
            _FINALIZE,
            f"export_for_source_row is {describe(export_for_source_row)}; supported: "
            "int32, one per index",
        )
    if scales is not None and (scales.dtype, scales.shape) != (
        rows.dtype,
        (tokens, top_k),
    ):
        refuse(
            _FINALIZE,
            f"scales is {describe(scales)}; supported: {rows.dtype}, one per index",
        )
    return rows.new_empty((tokens, rows.shape[2]))


@emulates(
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, "
    "Tensor? skip2, Tensor? bias, Tensor? scales, Tensor expanded_src_to_dst_row, "
    "Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor",
    fake=_finalize_fake,
)
def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    """Sum the rows of each token, some of which may be missing.

    Accumulates in the order of the choices: bf16 in fp32, rounded once; fp16 in fp16.

    Source: op-plugin `torch_npu-npu_moe_finalize_routing.md`; ops-transformer
    `moe/moe_finalize_routing_v2`.

    Args:
        expanded_permuted_rows: `[E, C, H]` fp16, bf16 or fp32; E at least top-k.
        skip1: Not emulated.
        skip2: Not emulated.
        bias: Not emulated.
        scales: `[T, top-k]`, dtype of the rows; None for one unweighted row per token.
        expanded_src_to_dst_row: int32 `[T * top-k]`, token-major: a row of the
            flattened `[E * C, H]`, or -1 if it is missing.
        export_for_source_row: int32 `[T, top-k]`; not read without a bias.
        drop_pad_mode: 3.
        k: 1.

    Returns:
        `[T, H]`, dtype of the rows.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    result = _finalize_fake(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )
    rows = expanded_permuted_rows.flatten(0, 1)
    indices = expanded_src_to_dst_row.long().view(len(result), -1)
    if indices.numel() and not -1 <= indices.min() <= indices.max() < len(rows):
        refuse(_FINALIZE, f"an index is not in [-1, {len(rows)})")
    step = torch.float16 if rows.dtype == torch.float16 else torch.float32
    total = torch.zeros(result.shape, dtype=step)
    for choice in range(indices.shape[1]):
        index = indices[:, choice : choice + 1]
        values = torch.where(index >= 0, rows[index[:, 0]], 0).to(step)
        if scales is not None:
            values = values * scales[:, choice : choice + 1].to(step)
        total += values
    return result.copy_(total)
