# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The interface between vllm-ascend 0.23's MoE runner and a quantization method.

The runner does not route tokens and does not use upstream's modular kernel. The method
routes, and passes tokens and weights to the communication method of the current batch.
"""

from typing import Any

import torch

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend
from vllm_ascend_ct.ops.soc import Soc, current_soc

_ACTIVATIONS = ("silu", "swiglustep")


def unquantized_class(tid2eid: Any) -> tuple[Any, dict[str, Any]] | None:
    """vllm-ascend's method for unquantized experts; None without vllm-ascend.

    Args:
        tid2eid: Table from token ids to experts, if the layer is routed by hash.

    Returns:
        The class, and the arguments it takes besides the layer's `moe_config`.

    """
    if not runs_on_vllm_ascend():
        return None
    if current_soc() is Soc.ASCEND_310P:
        from vllm_ascend._310p.fused_moe import fused_moe as fused_moe_310p

        return fused_moe_310p.AscendUnquantizedFusedMoEMethod310, {}
    try:
        from vllm_ascend.ops.fused_moe import routed_experts as module
    except ImportError:
        # Until 0.26.
        from vllm_ascend.ops.fused_moe import fused_moe as module
    return module.AscendUnquantizedFusedMoEMethod, {"tid2eid": tid2eid}


def refusal(moe: Any, bits: int, group_size: int, quantized: bool) -> str | None:
    """Why vllm-ascend cannot compute a layer's experts, or None.

    Refuses whatever vllm-ascend would silently ignore.

    Args:
        moe: The layer's `FusedMoEConfig`.
        bits: Weight width that the operator reads, 4 or 8.
        group_size: Elements of K that share a scale; 0 for per-channel scales.
        quantized: Whether activations are quantized to int8.

    """
    from vllm_ascend.ascend_config import get_ascend_config

    if moe.has_bias:
        return "biases of experts, which vllm-ascend does not support"
    is_310p = current_soc() is Soc.ASCEND_310P
    activations = _ACTIVATIONS[:1] if is_310p else _ACTIVATIONS
    if moe.activation.value not in activations:
        return (
            f"activation {moe.activation.value}; "
            f"vllm-ascend supports {', '.join(activations)}"
        )
    if quantized and moe.in_dtype != torch.bfloat16 and not is_310p:
        return (
            f"int8 activations of a {moe.in_dtype} model; vllm-ascend supports bfloat16"
        )
    if quantized and bits == 8 and current_soc() is Soc.A5:
        return "int8 activations, for which vllm-ascend calls no operators on A5"
    fuses = get_ascend_config().ascend_fusion_config.fusion_ops_gmmswigluquant
    clamps = quantized and (fuses if bits == 8 else group_size == 0) and not is_310p
    if moe.swiglu_limit and moe.activation.value == "silu" and not clamps:
        return f"swiglu_limit={moe.swiglu_limit}, which vllm-ascend ignores"
    return None


def fuses_gate(weight_dtype: torch.dtype, activation: Any) -> bool:
    """Whether vllm-ascend fuses the first int8 matmul with the activation.

    Args:
        weight_dtype: int8, or int32 for packed int4, which vllm-ascend multiplies with
            a custom operator of its own.
        activation: The layer's `MoEActivation`.

    """
    from vllm_ascend.utils import enable_custom_op

    if weight_dtype == torch.int8:
        return True
    return bool(enable_custom_op()) and activation.value == "silu"


def quant_type(name: str) -> Any:
    """The member of vllm-ascend's `QuantType` with this name."""
    from vllm_ascend.quantization.quant_type import QuantType

    return QuantType[name]


class QuantTypeHolder:
    """Object that vllm-ascend's runner expects as a method's `quant_method`.

    Attributes:
        quant_type: Tells the runner how to prepare tokens.

    """

    def __init__(self, name: str) -> None:
        self.quant_type = quant_type(name)


def has_parameters(layer: Any) -> bool:
    """Whether vllm-ascend asks again for the method of experts with parameters.

    0.24 to 0.26 do, to pass `tid2eid`. 0.23 does too, but creates parameters again.
    """
    return hasattr(layer, "quant_method") and not hasattr(layer, "_shared_experts")


def has_adapters(layer: Any) -> bool:
    """Whether vllm-ascend wrapped a layer for LoRA.

    It stores the adapters on the layer and expects the method to apply them.
    """
    return getattr(layer, "_ascend_moe_lora_context", None) is not None


def select_experts(
    layer: Any,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    num_experts: int,
    tid2eid: Any,
    **routing: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Route tokens as vllm-ascend's own methods do.

    Args:
        layer: vllm-ascend's MoE layer.
        x: `[T, H]`.
        router_logits: `[T, E]`.
        num_experts: Number of experts, without redundant and shared ones.
        tid2eid: Table from token ids to experts, if the layer is routed by hash.
        routing: Arguments of vllm-ascend's `select_experts`.

    Returns:
        Top-k weights and ids, both `[T, top-k]`, and the output of zero-computation
        experts `[T, H]`, or None if there are none.

    """
    from vllm.forward_context import get_forward_context
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.ops.fused_moe import experts_selector

    # Removed in 0.24.
    if getattr(get_ascend_config(), "multistream_overlap_gate", False):
        # The runner has routed already, on another stream.
        from vllm_ascend import flash_common3_context

        context = flash_common3_context.get_flash_common3_context()
        assert context is not None
        weights, ids = context.topk_weights, context.topk_ids
    elif current_soc() is Soc.ASCEND_310P:
        # The 310P has different routing operators.
        from vllm_ascend._310p.fused_moe import experts_selector as selector_310p

        weights, ids = selector_310p.select_experts(
            hidden_states=x,
            router_logits=router_logits,
            global_num_experts=num_experts,
            **routing,
        )
    else:
        weights, ids = experts_selector.select_experts(
            hidden_states=x,
            router_logits=router_logits,
            num_experts=num_experts,
            num_logical_experts=router_logits.shape[1],
            num_shared_experts=getattr(layer, "n_shared_experts", 0) or 0,
            mix_placement=getattr(layer, "mix_placement", False),
            tid2eid=tid2eid,
            input_ids=getattr(get_forward_context(), "input_ids", None),
            **routing,
        )
    capturer = getattr(layer, "_ascend_routed_experts_capturer", None)
    if capturer is not None:
        # The engine runs with enable_return_routed_experts.
        capturer.capture(layer_id=layer.layer_id, topk_ids=ids)
    zero_expert_type = getattr(layer, "zero_expert_type", None)
    if getattr(layer, "zero_expert_num", 0) == 0 or zero_expert_type is None:
        return weights, ids, None
    ids, weights, unchanged = experts_selector.zero_experts_compute(
        expert_indices=ids,
        expert_scales=weights,
        num_experts=num_experts,
        zero_expert_type=zero_expert_type,
        hidden_states=x,
    )
    return weights, ids, unchanged


def fused_experts(**arguments: Any) -> Any:
    """Compute experts by the communication method that vllm-ascend chose for the batch.

    Args:
        arguments: Arguments of vllm-ascend's `build_fused_experts_input`.

    Returns:
        vllm-ascend's `FusedExpertsResult`.

    """
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX
    from vllm_ascend.ops.fused_moe import moe_runtime_args

    return _EXTRA_CTX.moe_comm_method.fused_experts(
        fused_experts_input=moe_runtime_args.build_fused_experts_input(**arguments)
    )
