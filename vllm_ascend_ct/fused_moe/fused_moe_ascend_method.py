# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Methods for vllm-ascend's MoE runners, and the choice among all methods."""

from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig

from vllm_ascend_ct.ascend_base import (
    fused_moe,
    routed_experts,
    runs_on_vllm_ascend,
    settings,
)
from vllm_ascend_ct.fused_moe import lora
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.fused_moe_method_base import AscendMethod
from vllm_ascend_ct.fused_moe.modular_kernel import ModularAscendMethod
from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.ops.soc import Soc, current_soc
from vllm_ascend_ct.weights.pack_quantized import operator_bits

# The arguments of `apply` that control routing.
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


def runner_refusal(
    experts_cls: type[AscendExperts],
    moe: FusedMoEConfig,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> str | None:
    """Why this process cannot run a layer's experts, or None.

    Args:
        experts_cls: The experts to check, in addition to vllm-ascend's limits.
        moe: The layer's config.
        bits: Weight width in the checkpoint, 2 to 8.
        group_size: Elements of K that share a scale; 0 for per-channel scales.
        symmetric: Whether the weights have no zero points.

    """
    reason = None
    if runs_on_vllm_ascend() and not routed_experts.asks_for_products():
        quantized = experts_cls.quantizes_activations
        reason = fused_moe.refusal(moe, operator_bits(bits), group_size, quantized)
    return reason or experts_cls.refusal(moe, bits, group_size, symmetric)


def ascend_method(weights: Any, layer: Any, tid2eid: Any) -> "AscendMethod":
    """Make the method that this process's MoE runner calls.

    Args:
        weights: Method that creates the parameters, checks the loaded tensors and
            repacks them (`AscendCTMoEMixin`).
        layer: The MoE layer.
        tid2eid: Table from token ids to experts, if the layer is routed by hash.

    Raises:
        UnsupportedCheckpointError: A setting of vllm-ascend assumes its own layout of
            the weights.

    """
    if not runs_on_vllm_ascend():
        return ModularAscendMethod(weights)
    settings.check_experts(layer.layer_name)
    if routed_experts.asks_for_products():
        return RoutedExpertsAscendMethod(weights)
    return FusedMoEAscendMethod(weights, layer, tid2eid)


class FusedMoEAscendMethod(AscendMethod):
    """Routes tokens; vllm-ascend's communication methods multiply. Up to 0.26."""

    def __init__(self, weights: Any, layer: Any, tid2eid: Any) -> None:
        """Wrap the method that holds the weights; see `ascend_method`."""
        super().__init__(weights)
        self.tid2eid = tid2eid
        # vllm-ascend assumes that shared experts are quantized like the routed ones.
        alone = getattr(layer, "_shared_experts", layer) is None
        self.quant_method = fused_moe.QuantTypeHolder(
            _quant_type(weights) if alone else "NONE"
        )

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """Make none: vllm-ascend's runner prepares and finalizes by itself."""

    def process_weights_after_loading(self, layer: Any) -> None:
        fuses = partial(fused_moe.fuses_gate, activation=self.moe.activation)
        self.experts = self.weights.lay_out_weights(layer, fuses=fuses)

    def _operands(self) -> dict[str, Any]:
        """Arguments of `build_fused_experts_input` that describe the weights."""
        w13, w2 = self.experts.operands("w13"), self.experts.operands("w2")
        operands: dict[str, Any] = {
            "w1": w13.weight,
            "w2": w2.weight,
            "w1_scale": w13.scale,
            "w2_scale": w2.scale,
        }
        if not self.experts.quantizes_activations:
            # vllm-ascend recognizes weight-only experts, int8 ones too, by the offsets.
            operands |= {"w1_offset": w13.offset, "w2_offset": w2.offset}
            return operands | {"quant_type": fused_moe.quant_type("W4A16")}
        if self.experts.takes_int8:
            # vllm-ascend takes lists for int8 activations, except on 310P.
            operands = {name: [tensor] for name, tensor in operands.items()}
        if w13.is_int4:
            operands |= {
                "w1_scale_bias": [w13.bias],
                "w2_scale_bias": [w2.bias],
                "is_per_channel_weight": w13.scale.dim() == 2,
            }
        bits = 4 if w13.is_int4 else 8
        return operands | {"quant_type": fused_moe.quant_type(f"W{bits}A8")}

    def apply(  # type: ignore[override]
        self,
        layer: Any,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        num_experts: int,
        enable_force_load_balance: bool = False,
        **call: Any,
    ) -> Any:
        """Route tokens and compute their experts.

        Args:
            layer: vllm-ascend's MoE layer.
            x: `[T, H]` of the model's dtype, or int8 with `pertoken_scale`.
            router_logits: `[T, E]`.
            num_experts: Number of experts, including redundant and shared ones.
            enable_force_load_balance: Whether to route at random, for profiling.
            call: Other arguments of vllm-ascend's
                `AscendUnquantizedFusedMoEMethod.apply`.

        Returns:
            vllm-ascend's `FusedExpertsResult`.

        Raises:
            PlatformError: vllm-ascend attached LoRA adapters to the layer.

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
            # vllm-ascend's dispatchers weight the output; some weight the input too.
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
            **self._operands(),
            **call,
        )
        if unchanged is not None:
            result.routed_out += unchanged
        return result


class RoutedExpertsAscendMethod(AscendMethod):
    """Multiplies tokens that vllm-ascend has routed and dispatched. Since 0.28.

    The runner's own preparation is told "NONE" as the quantization: otherwise it would
    quantize tokens before it routes them, and assume that shared experts are quantized
    like the routed ones.
    """

    _counts: torch.Tensor

    def __init__(self, weights: Any) -> None:
        """Wrap the method that holds the weights; see `ascend_method`."""
        super().__init__(weights)
        self.quant_method = fused_moe.QuantTypeHolder("NONE")
        # The `QuantType` that vllm-ascend quantizes dispatched tokens to. Not used on
        # A5, whose int8 communication operators are unproven.
        sends_int8 = weights.experts_cls.takes_int8 and current_soc() is not Soc.A5
        self.sent_as = _quant_type(weights) if sends_int8 else "NONE"

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        announce(self.experts, *self.experts.forms())

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        """Compute experts of routed tokens.

        Args:
            layer: vllm-ascend's MoE layer.
            x: `[T, H]`.
            topk_weights: `[T, top-k]`.
            topk_ids: `[T, top-k]`.
            shared_experts: None; the runner computes them.
            shared_experts_input: None.

        Returns:
            vllm-ascend's `FusedExpertsResult`.

        Raises:
            PlatformError: vllm-ascend attached LoRA adapters to the layer.

        """
        _refuse_adapters(layer)
        if layer.apply_router_weight_on_input:
            # vllm-ascend's dispatchers weight the output; some weight the input too.
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return routed_experts.compute(
            self, layer, x, topk_weights, topk_ids, self.sent_as
        )

    def supports_fused_activation(self, activation: Any) -> bool:
        """Whether `apply_gmm1_act_quant` applies the activation: always."""
        return True

    def apply_gmm1_act_quant(
        self, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the first product and the activation; see `AscendExperts.gate`.

        Args:
            call: vllm-ascend's `MoEMlpComputeInput`.

        """
        routed_experts.check(call)
        self._counts = routed_experts.counts(call)
        return self.experts.gate(call.hidden_states, call.dynamic_scale, self._counts)

    def apply_gmm2(
        self, call: Any, hidden: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply the result of `apply_gmm1_act_quant` by the down projections.

        Args:
            call: vllm-ascend's `MoEMlpComputeInput`, the same as in the first call.
            hidden: Its result.
            scale: The result's scale, or None.

        """
        return self.experts.down(hidden, scale, self._counts)


def _refuse_adapters(layer: Any) -> None:
    """Refuse a layer that vllm-ascend attached LoRA adapters to."""
    if fused_moe.has_adapters(layer):
        raise lora.refused(f"layer {layer.layer_name}, a LoRA context")


def _quant_type(weights: Any) -> str:
    """Name of vllm-ascend's `QuantType` for int8 activations; "NONE" for 16 bits."""
    if not weights.experts_cls.quantizes_activations:
        return "NONE"
    return f"W{operator_bits(weights.num_bits)}A8"
