# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What vllm-ascend's expert parallelism asks of several NPUs, on CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

# What an NPU leaves unwritten behind the last expert's rows.
UNWRITTEN_ROWS = 3


@contextmanager
def emulated_communication() -> Iterator[None]:
    """Replace what needs HCCL; what only needs ranks runs over gloo."""
    import torch_npu

    functions = (
        npu_moe_token_permute,
        npu_moe_token_unpermute,
        npu_moe_distribute_dispatch_v2,
        npu_moe_distribute_combine_v2,
    )
    hccl = SimpleNamespace(get_hccl_comm_name=lambda rank: "mc2")
    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(patch.object(torch_npu, function.__name__, function))
        backend = patch.object(dist.ProcessGroup, "_get_backend", lambda *_: hccl)
        stack.enter_context(backend)
        stack.enter_context(patch("torch.histc", histc))
        yield


def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort `[T, H]` by the experts that `[T]` or `[T, top-k]` names."""
    order = indices.flatten().argsort(stable=True)
    top_k = indices.numel() // len(tokens)
    assert num_out_tokens in (None, len(order))
    return tokens[order // top_k], order.argsort().to(torch.int32)


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Sum rows by token; vllm-ascend names one twice whose weight is 0."""
    rows = permuted_tokens[sorted_indices]
    if probs is None:
        return rows
    rows = rows.float().view(*probs.shape, -1) * probs.float().unsqueeze(-1)
    return rows.sum(1).to(permuted_tokens.dtype)


def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    quant_mode: int,
    expert_token_nums_type: int,
    x_active_mask: torch.Tensor,
    scales: None,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    """Send each token `[T, H]` to the ranks of its experts, and int8 if mode 2.

    Returns:
        Rows sorted by local expert, their scales, whence each row is, and counts.

    """
    ids = torch.where(x_active_mask.unsqueeze(1), expert_ids, -1)
    all_x, all_ids = gather(x, ep_world_size), gather(ids, ep_world_size)
    experts = moe_expert_num // ep_world_size
    local = all_ids.flatten() - ep_rank_id * experts
    local[(local < 0) | (local >= experts) | (all_ids.flatten() < 0)] = experts
    order = local.argsort(stable=True)
    order = order[: int((local < experts).sum())]
    rows = all_x[order // ids.shape[1]]
    scale = torch.empty(0)
    if quant_mode == 2:
        rows, scale = torch.ops.npu.npu_dynamic_quant(rows)
        scale = torch.cat([scale, scale.new_full((UNWRITTEN_ROWS,), torch.nan)])
    unwritten = -128 if rows.dtype == torch.int8 else torch.nan
    rows = torch.cat([rows, rows.new_full((UNWRITTEN_ROWS, x.shape[1]), unwritten)])
    counts = local.bincount(minlength=experts + 1)[:experts]
    if expert_token_nums_type == 0:
        counts = counts.cumsum(0)
    nothing = torch.empty(0)
    return rows, scale, order, counts, nothing, nothing, nothing


def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    expert_scales: torch.Tensor,
    ep_world_size: int,
    ep_rank_id: int,
    **_: Any,
) -> torch.Tensor:
    """Send rows back to their ranks, and sum those of a token."""
    order = assist_info_for_combine
    choices = expert_ids.numel()
    rows = torch.zeros(ep_world_size * choices, expand_x.shape[1])
    rows[order] = expand_x[: len(order)].float()
    dist.all_reduce(rows)
    own = rows.view(ep_world_size, *expert_ids.shape, -1)[ep_rank_id]
    return (own * expert_scales.unsqueeze(-1)).sum(1).to(expand_x.dtype)


def histc(ids: torch.Tensor, bins: int, min: int, max: int) -> torch.Tensor:
    """Count ids, which on CPU has no kernel of integers."""
    assert (min, max) == (0, bins)
    return ids.flatten().bincount(minlength=bins)


def gather(tensor: torch.Tensor, world_size: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
