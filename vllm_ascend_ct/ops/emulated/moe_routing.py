# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The operator that sorts tokens by expert."""

import torch

from vllm_ascend_ct.ops.emulated.quantize import int8_values
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    describe,
    emulates,
    poison,
    refuse,
)
from vllm_ascend_ct.ops.limits import MoeInitRoutingLimits, current_limits

_INIT = "npu_moe_init_routing_v2"
_COPY, _DYNAMIC = -1, 1
_CUMULATIVE, _COUNTS = 0, 1
_GATHER, _SCATTER = 0, 1
_INT8_MAX = 127


def _check_options(
    limits: MoeInitRoutingLimits,
    quant_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    row_idx_type: int,
    **options: int | None,
) -> None:
    num_types = (_CUMULATIVE, _COUNTS) if limits.counts else (_CUMULATIVE,)
    flags = (True,) if limits.counts else (True, False)
    for argument, value, supported in (
        ("quant_mode", quant_mode, limits.quant_modes),
        ("expert_tokens_num_type", expert_tokens_num_type, num_types),
        # If false, torch_npu's meta function and kernel disagree on the shape. The
        # 310P's operator has no such flag.
        ("expert_tokens_num_flag", expert_tokens_num_flag, flags),
        ("row_idx_type", row_idx_type, (_GATHER, _SCATTER)),
    ):
        if value not in supported:
            refuse(_INIT, f"{argument}={value}; emulated: {supported}")
    for argument, option in options.items():
        if option not in (None, -1, 0):
            refuse(_INIT, f"{argument}={option} is not emulated")


def _init_routing_fake(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    limits = current_limits().moe_init_routing
    _check_options(
        limits,
        quant_mode,
        expert_tokens_num_type,
        expert_tokens_num_flag,
        row_idx_type,
        drop_pad_mode=drop_pad_mode,
        expert_capacity=expert_capacity,
    )
    if x_dtype is not None and as_dtype(_INIT, x_dtype) != x.dtype:
        refuse(_INIT, f"x_dtype={x_dtype}; emulated: that of x, {x.dtype}")
    rows = expert_idx.numel()
    if active_num > 0 and active_num != rows:
        refuse(_INIT, f"active_num={active_num}; emulated: all {rows} rows")
    if offset is not None:
        refuse(_INIT, "offset is not emulated")
    active = tuple(active_expert_range)
    if row_idx_type == _SCATTER and active != (0, expert_num):
        # Documents call the other indices unwritten. A2's kernel for small batches
        # writes them, and op-plugin's test compares them; that for large ones does not
        # (ops-transformer `moe_v3_sort_one_core.h`, `moe_v3_sort_actual_expert.h`).
        refuse(_INIT, f"row_idx_type=1 of experts {active}; emulated: all {expert_num}")
    if reason := limits.refusal(x.dtype, quant_mode, expert_num, active):
        refuse(_INIT, reason)
    dims = (x.dim(), expert_idx.dim(), expert_idx.dtype)
    # Not len(), which would specialize a traced graph to the number of tokens.
    if dims != (2, 2, torch.int32) or x.shape[0] != expert_idx.shape[0]:
        refuse(
            _INIT,
            f"x is {describe(x)}, expert_idx is {describe(expert_idx)}; supported: "
            "[T, H] and int32 [T, top-k]",
        )
    start, end = active_expert_range
    shapes: tuple[tuple[int, ...], ...] = ((end - start, x.shape[1]), (1, x.shape[1]))
    if quant_mode == _COPY:
        shapes = (tuple(x.shape[:1]),)
    if scale is not None and (
        scale.dtype != torch.float32 or tuple(scale.shape) not in shapes
    ):
        refuse(_INIT, f"scale is {describe(scale)}; supported: fp32 {shapes}")
    dtype = torch.int8 if quant_mode == _DYNAMIC else x.dtype
    return (
        x.new_empty((rows, x.shape[1]), dtype=dtype),
        x.new_empty((rows,), dtype=torch.int32),
        x.new_empty(
            (end - start,), dtype=torch.int64 if limits.counts else torch.int32
        ),
        x.new_empty((rows,), dtype=torch.float32),
    )


@emulates(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, "
    "Tensor? offset=None, int active_num=-1, int expert_capacity=-1, "
    "int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=-1, "
    "int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_init_routing_fake,
)
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort tokens by expert, and optionally quantize them.

    With dynamic quantization a row is `q = rint(v / scale)`, where `v = x * smooth` and
    `scale = amax|v| / 127`, with a true division. (For wide rows the NPU's kernel
    rounds differently, which is not emulated.) Rows without an expert in the range are
    not written.

    Source: op-plugin `torch_npu-npu_moe_init_routing_v2.md`; ops-transformer
    `moe/moe_init_routing_v3`.

    Args:
        x: `[T, H]` fp16, bf16 or fp32; also int8 with quant_mode -1.
        expert_idx: int32 `[T, top-k]`.
        scale: With dynamic quantization, smoothing factors, fp32 `(end - start, H)` or
            `(1, H)`. Otherwise scales of the tokens, fp32 `(T,)`, which are copied
            along.
        offset: Not emulated.
        active_num: Number of all rows.
        expert_capacity: Not emulated.
        expert_num: Number of experts of all ranks.
        drop_pad_mode: 0.
        expert_tokens_num_type: 0 for cumulative counts, 1 for counts.
        expert_tokens_num_flag: True.
        quant_mode: -1 to copy, 1 to quantize dynamically.
        active_expert_range: `[start, end)`. Always required: torch_npu computes the
            default once per process and keeps it.
        row_idx_type: 0 for the position of each (token, choice), -1 outside the range;
            1 for the (token, choice) at each position.
        x_dtype: None or the dtype of x.

    Returns:
        Rows `[T * top-k, H]`, indices int32 `[T * top-k]`, counts int64 `[end - start]`
        (310P: int32), and scales fp32 `[T * top-k]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    results = _init_routing_fake(
        x,
        expert_idx,
        scale,
        offset,
        active_num,
        expert_capacity,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_type,
        expert_tokens_num_flag,
        quant_mode,
        active_expert_range,
        row_idx_type,
        x_dtype,
    )
    rows, indices, counts, scales = (poison(result) for result in results)
    start, end = active_expert_range
    experts = expert_idx.flatten().long()
    active = (experts >= start) & (experts < end)
    order = torch.where(active, experts, end).argsort(stable=True)[: active.sum()]
    positions = torch.arange(len(order), dtype=torch.int32)
    if row_idx_type == _GATHER:
        indices.fill_(-1)[order] = positions
    else:
        indices[: len(order)] = order.to(torch.int32)
    counts.copy_(torch.bincount(experts[order] - start, minlength=end - start))
    if expert_tokens_num_type == _CUMULATIVE:
        counts.copy_(counts.cumsum(0))
    tokens = order // expert_idx.shape[1]
    if quant_mode == _COPY:
        rows[: len(order)] = x[tokens]
        if scale is not None:
            scales[: len(order)] = scale[tokens]
        return rows, indices, counts, scales
    values = x[tokens].float()
    if scale is not None:
        values *= scale[0] if len(scale) == 1 else scale[experts[order] - start]
    row_scale = values.abs().amax(dim=1, keepdim=True) / _INT8_MAX
    scales[: len(order)] = row_scale.squeeze(1)
    rows[: len(order)] = int8_values(torch.where(row_scale > 0, values / row_scale, 0))
    return rows, indices, counts, scales
