# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that this package wraps in operators of its own when torch traces a graph.

`npu_weight_quant_batchmatmul`: torch_npu's graph compiler `npugraph_ex` matches it by
name, for a workaround meant for torch_npu's other compiler, and sets an option that its
own config lacks (2.10.0.post4 to 2.13.0, `npu_fx_compiler.py`): "'CompilerConfig'
object has no attribute 'experimental_config'".

`npu_moe_init_routing_v2`: it takes the number of rows as a plain integer, so a graph
would be specialized to the number of tokens it was traced with.
"""

from typing import Any

import torch

_LIBRARY = torch.library.Library("ascend_ct", "FRAGMENT")
_LIBRARY.define(
    "weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
    "Tensor? antiquant_offset, Tensor? bias, int antiquant_group_size) -> Tensor"
)
_LIBRARY.define(
    "moe_init_routing(Tensor x, Tensor expert_idx, int[2] active_expert_range, "
    "int expert_num, int quant_mode, bool counted=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_ENDS, _COUNTS = 0, 1
_ALL_ROWS = -1


def weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
) -> torch.Tensor:
    """Call `npu_weight_quant_batchmatmul`; while tracing, through our own operator.

    See the emulated operator of that name for the arguments.
    """
    operator = _multiply
    if torch.compiler.is_compiling():
        operator = torch.ops.ascend_ct.weight_quant_batchmatmul
    y: torch.Tensor = operator(
        x, weight, antiquant_scale, antiquant_offset, bias, antiquant_group_size
    )
    return y


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
) -> torch.Tensor:
    return torch.ops.npu.npu_weight_quant_batchmatmul(
        x,
        weight,
        antiquant_scale,
        antiquant_offset=antiquant_offset,
        bias=bias,
        antiquant_group_size=antiquant_group_size,
    )


_LIBRARY.impl("weight_quant_batchmatmul", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ascend_ct::weight_quant_batchmatmul", _multiply, lib=_LIBRARY
)


_Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def moe_init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    active_expert_range: list[int],
    expert_num: int,
    quant_mode: int,
    counted: bool = True,
) -> _Routed:
    """Call `npu_moe_init_routing_v2`; while tracing, through our own operator.

    Args:
        x: `[T, H]`.
        expert_idx: int32 `[T, top-k]`.
        active_expert_range: `[start, end)` of this rank's experts.
        expert_num: Number of experts of all ranks.
        quant_mode: -1 to copy rows, 1 to quantize them dynamically to int8.
        counted: Whether the chip's operator returns counts. Otherwise it returns
            cumulative counts, which this function converts.

    Returns:
        Rows `[T * top-k, H]`, row of each choice int32 `[T * top-k]`, counts int64
        `[end - start]`, and scales fp32 `[T * top-k]`.

    """
    operator = _route
    if torch.compiler.is_compiling():
        operator = torch.ops.ascend_ct.moe_init_routing
    routed: _Routed = operator(
        x, expert_idx, active_expert_range, expert_num, quant_mode, counted
    )
    return routed


def _route(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    active_expert_range: list[int],
    expert_num: int,
    quant_mode: int,
    counted: bool = True,
    *,
    active_num: int | None = None,
) -> _Routed:
    rows, index, counts, scale = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        expert_idx,
        active_num=expert_idx.numel() if active_num is None else active_num,
        expert_num=expert_num,
        expert_tokens_num_type=_COUNTS if counted else _ENDS,
        expert_tokens_num_flag=True,
        quant_mode=quant_mode,
        active_expert_range=active_expert_range,
    )
    if not counted:
        counts = counts.diff(prepend=counts.new_zeros(1)).to(torch.int64)
    return rows, index, counts, scale


def _route_fake(*arguments: Any) -> _Routed:
    x, expert_idx, *options = arguments
    return _route(x, expert_idx, *options, active_num=_ALL_ROWS)


_LIBRARY.impl("moe_init_routing", _route, "CompositeExplicitAutograd")
torch.library.register_fake("ascend_ct::moe_init_routing", _route_fake, lib=_LIBRARY)
