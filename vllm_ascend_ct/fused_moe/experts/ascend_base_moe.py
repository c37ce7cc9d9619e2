# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in the layouts of vllm-ascend, whose runner multiplies itself."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.ascend_base import fused_moe
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_dequant_moe import (
    AscendWNA8DequantExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.ops.precedents import Form
from vllm_ascend_ct.weights.pack_quantized import operator_bits


class AscendBaseExpertsMixin(AscendExperts):
    """First base of experts that only lay weights out: vllm-ascend multiplies."""

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        quantized = cls.quantizes_activations
        reason = fused_moe.refusal(moe, operator_bits(bits), group_size, quantized)
        return reason or super().refusal(moe, bits, group_size, symmetric)

    def _forms(self) -> list[Form]:
        """None: vllm-ascend's own calls multiply."""
        return []

    def _prepare_forward(self, expert_map: torch.Tensor | None) -> None:
        """Nothing to prepare: vllm-ascend runs the forward."""

    def arguments(self) -> dict[str, Any]:
        """What of `build_fused_experts_input`'s arguments is known of the weights."""
        raise NotImplementedError


class AscendBaseWNA16Experts(AscendBaseExpertsMixin, AscendWNA16Experts):
    """vllm-ascend's "W4A16", which it tells by the offsets; of int8 weights too."""

    def arguments(self) -> dict[str, Any]:
        w13, w2 = self.operands("w13"), self.operands("w2")
        return {
            "quant_type": fused_moe.quant_type("W4A16"),
            "w1": w13.weight,
            "w2": w2.weight,
            "w1_scale": w13.scale,
            "w2_scale": w2.scale,
            "w1_offset": w13.offset,
            "w2_offset": w2.offset,
        }


class AscendBaseWNA8Experts(AscendBaseExpertsMixin, AscendWNA8Experts):
    """vllm-ascend's "W8A8" and "W4A8"."""

    def _is_fused(self, weight_dtype: torch.dtype, group_size: int) -> bool:
        if weight_dtype == torch.int8:
            return True
        return fused_moe.fuses_int4_swiglu(self.moe_config.activation)

    def arguments(self) -> dict[str, Any]:
        w13, w2 = self.operands("w13"), self.operands("w2")
        arguments = {
            "quant_type": fused_moe.quant_type("W4A8" if w13.is_int4 else "W8A8"),
            "w1": [w13.weight],
            "w2": [w2.weight],
            "w1_scale": [w13.scale],
            "w2_scale": [w2.scale],
        }
        if w13.bias is not None and w2.bias is not None:
            arguments["w1_scale_bias"] = [w13.bias]
            arguments["w2_scale_bias"] = [w2.bias]
            arguments["is_per_channel_weight"] = w13.scale.dim() == 2
        return arguments


class AscendBaseWNA8DequantExperts(AscendBaseExpertsMixin, AscendWNA8DequantExperts):
    """vllm-ascend's "W8A8" on 310P, which has no lists."""

    def arguments(self) -> dict[str, Any]:
        w13, w2 = self.operands("w13"), self.operands("w2")
        return {
            "quant_type": fused_moe.quant_type("W8A8"),
            "w1": w13.weight,
            "w2": w2.weight,
            "w1_scale": w13.scale,
            "w2_scale": w2.scale,
        }
