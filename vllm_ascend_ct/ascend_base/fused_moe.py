# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What vllm-ascend 0.23's runner of experts asks of a method, and offers it.

It neither routes tokens nor uses upstream's modular kernel: a method routes, and hands
tokens and weights to the communication method of the current batch.
"""

from typing import Any

import torch

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend
from vllm_ascend_ct.ops.soc import Soc, current_soc

_ACTIVATIONS = ("silu", "swiglustep")


def unquantized_class(tid2eid: Any) -> tuple[Any, dict[str, Any]] | None:
    """vllm-ascend's method for experts that are not quantized; None off the NPU.

    Args:
        tid2eid: Experts by token, of a layer that is routed by hash.

    Returns:
        The class and what it takes beside a layer's `moe_config`.

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
    """Why vllm-ascend cannot compute experts, or None.

    Refuses whatever vllm-ascend would ignore in silence.

    Args:
        moe: The layer.
        bits: Of the operator's weights, 4 or 8.
        group_size: Elements that share a scale; 0 for one per channel.
        quantized: Whether activations are.

    """
    from vllm_ascend.ascend_config import get_ascend_config

    if moe.has_bias:
        return "biases of experts; vllm-ascend supports none"
    is_310p = current_soc() is Soc.ASCEND_310P
    activations = _ACTIVATIONS[:1] if is_310p else _ACTIVATIONS
    if moe.activation.value not in activations:
        return (
            f"activation {moe.activation.value}; "
            f"vllm-ascend supports {', '.join(activations)}"
        )
    if quantized and moe.in_dtype != torch.bfloat16 and not is_310p:
        return f"int8 activations of a {moe.in_dtype} model; vllm-ascend's are bfloat16"
    if quantized and bits == 8 and current_soc() is Soc.A5:
        return "int8 activations, whose operators vllm-ascend does not call on A5"
    fuses = get_ascend_config().ascend_fusion_config.fusion_ops_gmmswigluquant
    clamps = quantized and (fuses if bits == 8 else group_size == 0) and not is_310p
    if moe.swiglu_limit and moe.activation.value == "silu" and not clamps:
        return f"swiglu_limit={moe.swiglu_limit}; vllm-ascend ignores it"
    return None


def fuses_gate(weight_dtype: torch.dtype, activation: Any) -> bool:
    """Whether vllm-ascend fuses the first product of int8 activations and the gate.

    int4 per channel goes to its own operator.
    """
    from vllm_ascend.utils import enable_custom_op

    if weight_dtype == torch.int8:
        return True
    return bool(enable_custom_op()) and activation.value == "silu"


def quant_type(name: str) -> Any:
    """A member of vllm-ascend's `QuantType`."""
    from vllm_ascend.quantization.quant_type import QuantType

    return QuantType[name]


class QuantTypeHolder:
    """What vllm-ascend looks for in a method, as its `quant_method`.

    Attributes:
        quant_type: Tells the runner how to prepare tokens.

    """

    def __init__(self, name: str) -> None:
        self.quant_type = quant_type(name)


def has_adapters(layer: Any) -> bool:
    """Whether vllm-ascend wrapped a layer for LoRA.

    It leaves the adapters on the layer, for the method to hand to the operators.
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
    """Route tokens as vllm-ascend does.

    Args:
        layer: vllm-ascend's.
        x: `[T, H]`.
        router_logits: `[T, E]`.
        num_experts: Without redundant and shared ones.
        tid2eid: Experts by token, of a layer that is routed by hash.
        routing: As of vllm-ascend's `select_experts`.

    Returns:
        Weights and ids, `[T, top-k]`, and what experts add that compute nothing.

    """
    from vllm.forward_context import get_forward_context
    from vllm_ascend import flash_common3_context
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.ops.fused_moe import experts_selector

    if get_ascend_config().multistream_overlap_gate:
        # The runner did, on another stream.
        context = flash_common3_context.get_flash_common3_context()
        assert context is not None
        weights, ids = context.topk_weights, context.topk_ids
    elif current_soc() is Soc.ASCEND_310P:
        # Which has other operators for it.
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
        # enable_return_routed_experts.
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
    """Compute experts where vllm-ascend sends the tokens of this batch.

    Args:
        arguments: As of vllm-ascend's `build_fused_experts_input`.

    Returns:
        vllm-ascend's `FusedExpertsResult`.

    """
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX
    from vllm_ascend.ops.fused_moe import moe_runtime_args

    return _EXTRA_CTX.moe_comm_method.fused_experts(
        fused_experts_input=moe_runtime_args.build_fused_experts_input(**arguments)
    )
