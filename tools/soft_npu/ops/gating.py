# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that route tokens to experts or sample tokens."""

import torch

from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.emulated.registry import describe, refuse

_SOFTMAX, _SIGMOID = 0, 1


def _choose(
    scores: torch.Tensor, k: int, k_group: int, group_count: int, by_two: bool
) -> torch.Tensor:
    """The top-k of the best groups; of equal values the first comes first."""
    if group_count > 1:
        groups = scores.unflatten(-1, (group_count, -1))
        best = groups.topk(2, -1)[0].sum(-1) if by_two else groups.amax(-1)
        kept = best.argsort(dim=-1, descending=True, stable=True)[:, :k_group]
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        scores = groups.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]


@implements("npu::npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and ids of the top-k experts of each token, computed in fp32.

    Source: op-plugin `torch_npu-npu_moe_gating_top_k.md`; CANN 9 takes `renorm` for
    softmax as well.

    Args:
        x: `[T, E]`.
        k: Number of experts per token.
        bias: `[E]`, added for the choice only.
        k_group: Number of groups to choose from.
        group_count: Number of all groups.
        group_select_mode: 0 to rank groups by their best expert, 1 by the sum of their
            best two.
        renorm: 1 to divide weights by their sum.
        norm_type: 0 for softmax, 1 for sigmoid, whose weights are always divided.
        out_flag: Whether to return all scores.
        routed_scaling_factor: Factor of the weights.
        eps: Added to sums.

    Returns:
        Weights `[T, k]` in the dtype of x, ids int32 `[T, k]`, and scores fp32 `[T,
        E]`, which are unwritten without `out_flag`.

    """
    name = "npu_moe_gating_top_k"
    if x.dim() != 2 or norm_type not in (_SOFTMAX, _SIGMOID) or renorm not in (0, 1):
        refuse(name, f"x is {describe(x)}, norm_type={norm_type}, renorm={renorm}")
    if x.shape[1] % group_count or group_select_mode not in (0, 1):
        refuse(
            name,
            f"{x.shape[1]} experts in group_count={group_count}, "
            f"group_select_mode={group_select_mode}",
        )
    wide = x.float()
    scores = wide.softmax(-1) if norm_type == _SOFTMAX else wide.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    ids = _choose(choice, k, k_group, group_count, group_select_mode == 1)
    weights = scores.gather(1, ids)
    if norm_type == _SIGMOID or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    if not out_flag:
        scores = torch.full_like(scores, torch.nan)
    return weights, ids.to(torch.int32), scores


@implements("_C_ascend::moe_gating_top_k")
def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `npu_moe_gating_top_k`.

    Source: vllm-ascend `csrc/moe/moe_gating_top_k`.
    """
    return npu_moe_gating_top_k(
        x,
        k,
        bias=bias_opt,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


@implements("npu::npu_moe_gating_top_k_softmax")
def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and ids of the top-k experts by softmax, and indices of rows.

    Source: op-plugin `torch_npu-npu_moe_gating_top_k_softmax.md`.

    Args:
        x: `[T, E]`.
        finished: Not emulated.
        k: Experts of a token.

    Returns:
        `[T, k]` each: dtype of x, int32, and int32 `column * T + row`.

    """
    if finished is not None or x.dim() != 2:
        refuse("npu_moe_gating_top_k_softmax", f"x is {describe(x)}, finished")
    scores = x.float().softmax(-1)
    ids = _choose(scores, k, 1, 1, False)
    rows = torch.arange(ids.numel(), dtype=torch.int32).view(k, -1).t().contiguous()
    return scores.gather(1, ids).to(x.dtype), ids.to(torch.int32), rows


@implements("npu::npu_top_k_top_p")
def npu_top_k_top_p(
    logits: torch.Tensor, p: torch.Tensor | None = None, k: torch.Tensor | None = None
) -> torch.Tensor:
    """Set logits outside of the top k, and then outside of the top p, to -inf.

    Source: op-plugin `torch_npu-npu_top_k_top_p.md`.

    Args:
        logits: `[B, V]`.
        p: `[B]`.
        k: int32 `[B]`.

    """
    if logits.dim() != 2 or (k is not None and k.dtype != torch.int32):
        refuse("npu_top_k_top_p", f"logits is {describe(logits)}; supported: 2-D")
    values, order = logits.float().sort(dim=-1, stable=True)
    if k is not None:
        least = values.gather(1, (values.shape[1] - k.long()).unsqueeze(1))
        values = values.masked_fill(values < least, -torch.inf)
    if p is not None:
        dropped = values.softmax(-1).cumsum(-1) <= 1 - p.float().unsqueeze(1)
        dropped[:, -1] = False
        values = values.masked_fill(dropped, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, values.to(logits.dtype))
