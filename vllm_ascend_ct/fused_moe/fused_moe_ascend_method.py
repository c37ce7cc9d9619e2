# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A method for vllm-ascend's runner, as upstream's `FusedMoEModularMethod`."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
)

from vllm_ascend_ct.ascend_base import fused_moe, serves, settings
from vllm_ascend_ct.fused_moe import lora
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.weights.pack_quantized import operator_bits

# Of `apply`'s arguments what says how to route.
_ROUTING = frozenset(
    (
        "top_k",
        "use_grouped_topk",
        "renormalize",
        "topk_group",
        "num_expert_group",
        "custom_routing_function",
        "scoring_func",
        "routed_scaling_factor",
        "e_score_correction_bias",
    )
)


def experts_classes() -> tuple[type[AscendExperts], type[AscendExperts]]:
    """The experts for activations of 8 bits and of 16, for this process's runner."""
    if not serves():
        return AscendWNA8Experts, AscendWNA16Experts
    from vllm_ascend_ct.fused_moe.experts import ascend_base_moe

    return (
        ascend_base_moe.AscendBaseWNA8Experts,
        ascend_base_moe.AscendBaseWNA16Experts,
    )


class FusedMoEAscendMethod(FusedMoEMethodBase):
    """Routes tokens and hands them to vllm-ascend, with another method's weights."""

    def __init__(self, method: Any, layer: Any, tid2eid: Any) -> None:
        """Wrap a method.

        Args:
            method: Creates and lays out the weights.
            layer: vllm-ascend's.
            tid2eid: Experts by token, of a layer that is routed by hash.

        Raises:
            UnsupportedCheckpointError: Its settings are for its own weights.

        """
        settings.check_experts(layer.layer_name)
        super().__init__(method.moe)
        self.method = method
        self.tid2eid = tid2eid
        self.experts: Any = None
        # vllm-ascend takes experts beside quantized ones to be quantized likewise.
        alone = getattr(layer, "_shared_experts", layer) is None
        quantized = self.method.experts_cls.quantizes_activations
        name = "NONE"
        if alone and quantized:
            name = f"W{operator_bits(method.num_bits)}A8"
        self.quant_method = fused_moe.QuantTypeHolder(name)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self.method.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.experts = self.method.lay_out_weights(layer)

    def get_fused_moe_quant_config(
        self, layer: torch.nn.Module
    ) -> FusedMoEQuantConfig | None:
        config: FusedMoEQuantConfig = self.method.get_fused_moe_quant_config(layer)
        return config

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """vllm-ascend's runner has its own."""

    @property
    def supports_eplb(self) -> bool:
        return False

    def apply(  # type: ignore[override]
        self,
        layer: Any,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        num_experts: int,
        enable_force_load_balance: bool = False,
        **call: Any,
    ) -> Any:
        """Compute experts.

        Args:
            layer: vllm-ascend's.
            x: `[T, H]` of the model's dtype, or int8 with `pertoken_scale`.
            router_logits: `[T, E]`.
            num_experts: With redundant and shared ones.
            enable_force_load_balance: Whether to route at random, for profiling.
            call: As of vllm-ascend's `AscendUnquantizedFusedMoEMethod.apply`.

        Returns:
            vllm-ascend's `FusedExpertsResult`.

        Raises:
            PlatformError: vllm-ascend gave the layer LoRA adapters.

        """
        if fused_moe.has_adapters(layer):
            raise lora.refused(f"layer {layer.layer_name}, a LoRA context")
        routing = {name: call.pop(name) for name in _ROUTING & call.keys()}
        logical = self.moe.num_logical_experts
        weights, ids, unchanged = fused_moe.select_experts(
            layer, x, router_logits, logical, self.tid2eid, **routing
        )
        if enable_force_load_balance:
            order = torch.rand(len(ids), logical, device=ids.device).argsort(dim=1)
            ids = order[:, : ids.shape[1]].to(ids.dtype)
        if call.pop("apply_router_weight_on_input", False):
            # vllm-ascend's dispatchers weigh the output, and some the input as well.
            if call.get("pertoken_scale") is None:
                x = x * weights.to(x.dtype)
            else:
                call["pertoken_scale"] = call["pertoken_scale"] * weights[:, 0]
            weights = torch.ones_like(weights)
        result = fused_moe.fused_experts(
            hidden_states=x,
            topk_weights=weights.to(self.moe.in_dtype),
            topk_ids=ids,
            dynamic_eplb=False,
            swiglu_limit=layer.swiglu_limit,
            **self.experts.arguments(),
            **call,
        )
        if unchanged is not None:
            result.routed_out += unchanged
        return result
