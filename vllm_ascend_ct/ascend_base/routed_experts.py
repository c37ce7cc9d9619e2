# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What vllm-ascend 0.30's runner of experts asks of a method, and offers it.

It routes tokens and sends them to where their experts are; there it has the method
multiply them, and brings the results back.
"""

import inspect
from functools import cache
from typing import Any

import torch

from vllm_ascend_ct.ascend_base.fused_moe import quant_type
from vllm_ascend_ct.errors import PlatformError, Remedy

_CUMULATED = 0
# Fields of a call that no served release sets.
_UNUSED = ("topk_scales", "need_trans", "dynamic_eplb", "lora_context")


@cache
def asks_for_products() -> bool:
    """Whether the runner has a method multiply; else it multiplies itself."""
    from vllm_ascend.ops.fused_moe.moe_comm_method import MoECommMethod

    arguments = inspect.signature(MoECommMethod.fused_experts).parameters
    return "quant_method" in arguments


def compute(
    method: Any,
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    sent_as: str,
) -> Any:
    """Compute experts where vllm-ascend sends the tokens of this batch.

    Limits and factors of activations are not passed on: vllm-ascend takes them from
    the layer that was made last.

    Args:
        method: Has `apply_gmm1_act_quant` and `apply_gmm2`.
        layer: vllm-ascend's.
        x: `[T, H]`.
        topk_weights: `[T, top-k]`.
        topk_ids: `[T, top-k]`.
        sent_as: The `QuantType` by which what is sent is quantized.

    Returns:
        vllm-ascend's `FusedExpertsResult`.

    """
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX
    from vllm_ascend.ops.fused_moe.dataclass import fused_experts

    return _EXTRA_CTX.moe_comm_method.fused_experts(
        fused_experts_input=fused_experts.build_fused_experts_input(
            hidden_states=x,
            topk_weights=topk_weights,
            topk_ids=topk_ids.to(torch.int32),
            layer=layer,
            quant_type=quant_type(sent_as),
            dynamic_eplb=False,
            expert_map=layer.ascend_expert_map,
            global_redundant_expert_num=layer.global_redundant_expert_num,
            mc2_mask=layer.ascend_mc2_mask,
            pertoken_scale=layer.ascend_pertoken_scale,
            activation=layer.activation,
        ),
        quant_method=method,
    )


def check(call: Any) -> None:
    """Refuse what would change the result and is not computed.

    Args:
        call: vllm-ascend's `MoEMlpComputeInput`.

    Raises:
        PlatformError: vllm-ascend asks for it.

    """
    for name in _UNUSED:
        if (value := getattr(call, name)) is not None and value is not False:
            raise PlatformError(
                "vllm-ascend asks of experts what this package does not compute",
                where=f"layer {call.layer.layer_name}, {name}={type(value).__name__}",
                supported=f"no {name}",
                remedy=Remedy.WITHOUT_PLUGIN,
            )


def counts(call: Any) -> torch.Tensor:
    """int64 rows of each expert, of vllm-ascend's `MoEMlpComputeInput`."""
    groups: torch.Tensor = call.group_list
    if call.group_list_type == _CUMULATED:
        groups = torch.diff(groups, prepend=groups.new_zeros(1))
    return groups.to(torch.int64)
