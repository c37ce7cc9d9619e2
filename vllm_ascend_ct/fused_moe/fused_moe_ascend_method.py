# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Methods for vllm-ascend's runners, as upstream's `FusedMoEModularMethod`."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
)

from vllm_ascend_ct.ascend_base import (
    fused_moe,
    routed_experts,
    runs_on_vllm_ascend,
    settings,
)
from vllm_ascend_ct.fused_moe import lora
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_dequant_moe import (
    AscendWNA8DequantExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.soc import Soc, current_soc
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
    dequantizes = current_limits().quant_grouped_matmul_dequant is not None
    if not runs_on_vllm_ascend() or routed_experts.asks_for_products():
        wna8 = AscendWNA8DequantExperts if dequantizes else AscendWNA8Experts
        return wna8, AscendWNA16Experts
    from vllm_ascend_ct.fused_moe.experts import ascend_base_moe as base

    base_wna8: type[AscendExperts] = base.AscendBaseWNA8Experts
    if dequantizes:
        base_wna8 = base.AscendBaseWNA8DequantExperts
    return base_wna8, base.AscendBaseWNA16Experts


def ascend_method(method: Any, layer: Any, tid2eid: Any) -> "AscendMethod":
    """Make what vllm-ascend's runner calls, of a method that has the weights.

    Args:
        method: Creates and lays out the weights.
        layer: vllm-ascend's.
        tid2eid: Experts by token, of a layer that is routed by hash.

    Raises:
        UnsupportedCheckpointError: Its settings are for its own weights.

    """
    settings.check_experts(layer.layer_name)
    if routed_experts.asks_for_products():
        return RoutedExpertsAscendMethod(method)
    return FusedMoEAscendMethod(method, layer, tid2eid)


class AscendMethod(FusedMoEMethodBase):
    """Hands tokens to vllm-ascend, with another method's weights."""

    def __init__(self, method: Any) -> None:
        """Wrap a method that creates and lays out the weights."""
        super().__init__(method.moe)
        self.method = method
        self.experts: Any = None
        # What the runner prepares tokens for.
        self.quant_method = fused_moe.QuantTypeHolder("NONE")

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

    def _quant_type(self) -> str:
        """The `QuantType` of int8 activations, or "NONE"."""
        if not self.method.experts_cls.quantizes_activations:
            return "NONE"
        return f"W{operator_bits(self.method.num_bits)}A8"


class FusedMoEAscendMethod(AscendMethod):
    """Routes tokens; vllm-ascend's communication methods multiply. Until 0.26."""

    def __init__(self, method: Any, layer: Any, tid2eid: Any) -> None:
        """Wrap a method; see `ascend_method`."""
        super().__init__(method)
        self.tid2eid = tid2eid
        # vllm-ascend takes experts beside quantized ones to be quantized likewise.
        if getattr(layer, "_shared_experts", layer) is None:
            self.quant_method = fused_moe.QuantTypeHolder(self._quant_type())

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
        _refuse_adapters(layer)
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
            swiglu_limit=layer.swiglu_limit or 0.0,
            **self.experts.arguments(),
            **call,
        )
        if unchanged is not None:
            result.routed_out += unchanged
        return result


class RoutedExpertsAscendMethod(AscendMethod):
    """Multiplies tokens that vllm-ascend routed and sent. Since 0.28.

    Its runner prepares them for no quantization: it would quantize tokens before it
    knows whose they are, and take shared experts to be quantized likewise.
    """

    _counts: torch.Tensor

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        # The `QuantType` by which vllm-ascend quantizes what it sends. Of A5's int8
        # operators of communication nothing is known.
        self.sent_as = "NONE" if current_soc() is Soc.A5 else self._quant_type()

    @property
    def is_monolithic(self) -> bool:
        return False

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        """Compute experts.

        Args:
            layer: vllm-ascend's.
            x: `[T, H]`.
            topk_weights: `[T, top-k]`.
            topk_ids: `[T, top-k]`.
            shared_experts: None; the runner computes them.
            shared_experts_input: None.

        Returns:
            vllm-ascend's `FusedExpertsResult`.

        Raises:
            PlatformError: vllm-ascend gave the layer LoRA adapters.

        """
        _refuse_adapters(layer)
        if layer.apply_router_weight_on_input:
            # vllm-ascend's dispatchers weigh the output, and some the input as well.
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return routed_experts.compute(
            self, layer, x, topk_weights, topk_ids, self.sent_as
        )

    def supports_fused_activation(self, activation: Any) -> bool:
        """Whether `apply_gmm1_act_quant` has the activation, as always."""
        return True

    def apply_gmm1_act_quant(
        self, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply rows by gates and ups; see `AscendExperts.gate`.

        Args:
            call: vllm-ascend's `MoEMlpComputeInput`.

        """
        routed_experts.check(call)
        self._counts = routed_experts.counts(call)
        result: tuple[torch.Tensor, torch.Tensor | None]
        result = self.experts.gate(call.hidden_states, call.dynamic_scale, self._counts)
        return result

    def apply_gmm2(
        self, call: Any, hidden: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply by downs what `apply_gmm1_act_quant` returned for the same call."""
        rows: torch.Tensor = self.experts.down(hidden, scale, self._counts)
        return rows


def _refuse_adapters(layer: Any) -> None:
    """Refuse LoRA adapters that vllm-ascend gave a layer."""
    if fused_moe.has_adapters(layer):
        raise lora.refused(f"layer {layer.layer_name}, a LoRA context")
