# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The interface between vllm-ascend 0.30's MoE runner and a quantization method.

The runner routes tokens, sends them to the ranks of their experts, calls the method to
multiply them there, and brings the results back.
"""

import inspect
from functools import cache
from typing import Any

import torch

from vllm_ascend_ct.ascend_base.fused_moe import quant_type
from vllm_ascend_ct.errors import PlatformError, Remedy

_CUMULATED = 0
# Fields of `MoEMlpComputeInput` that no supported release sets.
_UNUSED = ("topk_scales", "need_trans", "dynamic_eplb", "lora_context")


@cache
def asks_for_products() -> bool:
    """Whether vllm-ascend's runner calls the method to multiply (since 0.28)."""
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
    """Compute experts by the communication method that vllm-ascend chose for the batch.

    The activation's clamp limit, alpha and beta are not passed on: vllm-ascend reads
    them from the layer that was created last.

    Args:
        method: Implements `apply_gmm1_act_quant` and `apply_gmm2`.
        layer: vllm-ascend's MoE layer.
        x: `[T, H]`.
        topk_weights: `[T, top-k]`.
        topk_ids: `[T, top-k]`.
        sent_as: Name of the `QuantType` that tokens are quantized to before they are
            sent.

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
    """Refuse options that would change the result and are not implemented here.

    Args:
        call: vllm-ascend's `MoEMlpComputeInput`.

    Raises:
        PlatformError: vllm-ascend has set one of them.

    """
    for name in _UNUSED:
        if (value := getattr(call, name)) is not None and value is not False:
            raise PlatformError(
                "vllm-ascend uses an option of experts that vllm-ascend-ct does not "
                "implement",
                where=f"layer {call.layer.layer_name}, {name}={type(value).__name__}",
                supported=f"no {name}",
                remedy=Remedy.WITHOUT_PLUGIN,
            )


def counts(call: Any) -> torch.Tensor:
    """Number of rows of each expert, int64 `[E]`, from a `MoEMlpComputeInput`."""
    groups: torch.Tensor = call.group_list
    if call.group_list_type == _CUMULATED:
        groups = torch.diff(groups, prepend=groups.new_zeros(1))
    return groups.to(torch.int64)
