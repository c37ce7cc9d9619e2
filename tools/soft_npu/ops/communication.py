# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that communicate with the ranks of experts."""

from typing import Any

import torch

from tools.soft_npu.ops.registry import implements, only_defaults
from vllm_ascend_ct.ops.emulated.registry import describe, poison, refuse

# int32 values that describe the origin of a row: rank, token and choice come first.
_ASSIST = 128
_NO_SCALES, _DYNAMIC = 0, 2
_UNUSED = ("group_tp", "comm_alg", "expert_shard_type", "tp_rank_id")


def _check(name: str, x: torch.Tensor, ids: torch.Tensor, o: dict[str, Any]) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 2:
        refuse(name, f"x is {describe(x)}; supported: fp16 or bf16 [T, H]")
    if ids.dtype != torch.int32 or ids.dim() != 2:
        refuse(name, f"expert_ids is {describe(ids)}; supported: int32 [T, K]")
    if o["tp_world_size"] > 1:
        refuse(name, f"tp_world_size={o['tp_world_size']}; emulated: 1")
    if o["moe_expert_num"] % o["ep_world_size"]:
        refuse(name, f"{o['moe_expert_num']} experts on {o['ep_world_size']} ranks")


def _active(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Expert ids, with -1 for padding tokens, which come last."""
    if mask is None:
        return ids
    count = int(mask.sum())
    if (
        mask.dtype != torch.bool
        or mask.shape != ids.shape[:1]
        or not mask[:count].all()
    ):
        refuse("x_active_mask", f"{describe(mask)}; supported: bool [T], true first")
    return torch.where(mask.unsqueeze(1), ids, -1)


def _gather(group: str, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Gather rows of all ranks `[ranks, length, ...]`, padded with -1."""
    padded = rows.new_full((length, *rows.shape[1:]), -1)
    padded[: len(rows)] = rows
    gathered: torch.Tensor = torch.ops.soft_npu.all_gather(group, padded)
    return gathered


def _longest(group: str, length: int) -> int:
    lengths = torch.ops.soft_npu.all_gather(group, torch.tensor([length]))
    return int(lengths.max())


@implements("npu::npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: torch.Tensor | None = None,
    quant_mode: int = 0,
    tp_world_size: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    shared_expert_num: int = 1,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Send each token `[T, H]` to the ranks of its experts.

    Source: op-plugin `torch_npu-npu_moe_distribute_dispatch_v2.md`. Refused: experts
    that are shared, copied or constant, scales, a group for tensor parallelism.

    Args:
        x: fp16 or bf16.
        expert_ids: int32 `[T, K]`.
        group_ep: HCCL's name of the group of ranks.
        ep_world_size: Number of ranks.
        ep_rank_id: Number of this rank.
        moe_expert_num: Number of experts of all ranks.
        x_active_mask: bool `[T]`; None if all tokens are active.
        quant_mode: 0, or 2 for int8 with a scale per row.
        tp_world_size: 0 or 1.
        global_bs: 0 if all ranks have the same number of tokens; otherwise their
            maximum times the number of ranks.
        expert_token_nums_type: 0 for cumulative counts, 1 for counts.
        shared_expert_num: Has no effect without ranks for shared experts.
        options: Not emulated, except for names of groups.

    Returns:
        Rows by local expert, then rank and token, followed by unwritten rows; their
        scales; the origin of each row; int64 counts of each expert's rows; int32
        cumulative counts of the rows that each rank sent to each expert; and two
        tensors that are not read.

    """
    name = "npu_moe_distribute_dispatch_v2"
    given = {k: v for k, v in options.items() if k not in _UNUSED}
    only_defaults(name, given)
    sizes = {"moe_expert_num": moe_expert_num, "ep_world_size": ep_world_size}
    _check(name, x, expert_ids, {**sizes, "tp_world_size": tp_world_size})
    if quant_mode not in (_NO_SCALES, _DYNAMIC) or expert_token_nums_type not in (0, 1):
        refuse(name, f"{quant_mode=}, {expert_token_nums_type=}")
    ids = _active(expert_ids, x_active_mask)
    tokens = len(x) if global_bs == 0 else global_bs // ep_world_size
    length = _longest(group_ep, len(x))
    if length > tokens:
        refuse(name, f"a rank has {length} tokens, {global_bs=}")
    local = moe_expert_num // ep_world_size
    all_x, all_ids = _gather(group_ep, x, length), _gather(group_ep, ids, length)
    found = ((all_ids // local == ep_rank_id) & (all_ids >= 0)).nonzero()
    experts = all_ids[tuple(found.T)] - ep_rank_id * local
    order = experts.argsort(stable=True)
    whence, experts = found[order], experts[order]
    room = tokens * ep_world_size * min(local, expert_ids.shape[1])
    rows = poison(x.new_empty((room, x.shape[1])))
    rows[: len(whence)] = all_x[whence[:, 0], whence[:, 1]]
    scales = poison(torch.empty(room if quant_mode else 1))
    if quant_mode == _DYNAMIC:
        values, of_rows = torch.ops.npu.npu_dynamic_quant(rows[: len(whence)])
        rows = poison(rows.new_empty(rows.shape, dtype=torch.int8))
        rows[: len(whence)], scales[: len(whence)] = values, of_rows
    assist = poison(torch.empty(room, _ASSIST, dtype=torch.int32))
    assist[: len(whence), :3] = whence.to(torch.int32)
    by_rank = (experts * ep_world_size + whence[:, 0]).bincount(
        minlength=local * ep_world_size
    )
    counts = by_rank.view(local, ep_world_size).sum(1)
    if expert_token_nums_type == 0:
        counts = counts.cumsum(0)
    ends = by_rank.cumsum(0).to(torch.int32)
    nothing = poison(torch.empty(1))
    return rows, scales, assist.flatten(), counts, ends, nothing.int(), nothing


@implements("npu::npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: torch.Tensor | None = None,
    tp_world_size: int = 0,
    tp_send_counts: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    global_bs: int = 0,
    shared_expert_num: int = 1,
    **options: Any,
) -> torch.Tensor:
    """Send rows back to their tokens, and sum the rows of each token in fp32.

    Source: op-plugin `torch_npu-npu_moe_distribute_combine_v2.md`.

    Args:
        expand_x: Rows in the order that the dispatch returned.
        expert_ids: As passed to the dispatch.
        assist_info_for_combine: As returned by the dispatch.
        ep_send_counts: As returned by the dispatch.
        expert_scales: fp32 `[T, K]`, weights of the rows.
        group_ep: As passed to the dispatch.
        ep_world_size: As passed to the dispatch.
        ep_rank_id: As passed to the dispatch.
        moe_expert_num: As passed to the dispatch.
        x_active_mask: As passed to the dispatch; inactive tokens are not written.
        tp_world_size: 0 or 1.
        tp_send_counts: Not read.
        expand_scales: Not read.
        global_bs: As passed to the dispatch.
        shared_expert_num: Has no effect.
        options: Not emulated, except for names of groups.

    """
    name = "npu_moe_distribute_combine_v2"
    only_defaults(name, {k: v for k, v in options.items() if k not in _UNUSED})
    sizes = {"moe_expert_num": moe_expert_num, "ep_world_size": ep_world_size}
    _check(name, expand_x, expert_ids, {**sizes, "tp_world_size": tp_world_size})
    if expert_scales.dtype != torch.float32:
        refuse(name, f"expert_scales is {describe(expert_scales)}; supported: fp32")
    count = int(ep_send_counts[-1])
    length = _longest(group_ep, count)
    whence = assist_info_for_combine.view(-1, _ASSIST)[:count, :3]
    all_rows = _gather(group_ep, expand_x[:count], length).flatten(0, 1)
    all_whence = _gather(group_ep, whence, length).flatten(0, 1).long()
    own = all_whence[:, 0] == ep_rank_id
    tokens, choices = all_whence[own, 1], all_whence[own, 2]
    result = torch.zeros(len(expert_ids), expert_ids.shape[1], expand_x.shape[1])
    result[tokens, choices] = all_rows[own].float()
    total = (result * expert_scales.unsqueeze(-1)).sum(1).to(expand_x.dtype)
    if x_active_mask is not None:
        poison(total[int(x_active_mask.sum()) :])
    return total
