# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the package would do with the hooks of these patches, which no vLLM has yet.

`tests/plugin/test_hooks.py` does it, over a patched vLLM. A part moves to the package
with the first release that has its hook, and the way around it goes.
"""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle.registry import register_moe_experts
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import PlatformEnum

from vllm_ascend_ct.fused_moe.activation import activation_function
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.fused_moe.modular_kernel import (
    AscendModularExperts,
    ModularAscendMethod,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import AscendWNA16LinearKernel
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.platforms.emulated import EmulatedAscendCTPlatform
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    AscendCTWNA16MoEMethod,
)
from vllm_ascend_ct.weights import experts


class RegisteredExperts(AscendModularExperts):
    """Experts that upstream's methods make, and give what they loaded."""

    experts_cls: type[AscendExperts]

    def __init__(
        self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig
    ) -> None:
        mk.FusedMoEExpertsModular.__init__(self, moe_config, quant_config)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        activation = activation_function(self.moe_config, self.quant_config)
        made = self.experts_cls(layer, self.moe_config, activation)
        made.lay_out()
        super().__init__(made, self.quant_config)


class RegisteredWNA16Experts(RegisteredExperts):
    experts_cls = AscendWNA16Experts


class RegisteredW8A8Experts(RegisteredExperts):
    experts_cls = AscendWNA8Experts


class RegisteredW4A8Experts(RegisteredExperts):
    """Get one int4 in each int8."""

    experts_cls = AscendWNA8Experts

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for product in ("w13", "w2"):
            name, weight = stored_weight(layer, product)
            set_parameter(layer, name, experts.pack_int4(weight.data))
        super().process_weights_after_loading(layer)


# By the oracle that asks.
EXPERTS = {
    "int8": RegisteredW8A8Experts,
    "w4a8_int8": RegisteredW4A8Experts,
    "int_wna16": RegisteredWNA16Experts,
}


class ToldWNA8LinearKernel(AscendWNA8LinearKernel):
    """Quantizes activations that the config says are quantized."""

    @classmethod
    def quantizes_activations(cls, c: MPLinearLayerConfig) -> bool:
        return True

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        key: Any = c.activation_quant_key
        if key is None or key.dtype != torch.int8:
            return False, f"activations {key}; supported: int8, dynamic per token"
        if not key.symmetric:
            return False, "asymmetric activations; supported: symmetric"
        return super().can_implement(c)


class HookedConfig(AscendCTConfig):
    """Has upstream's own methods serve experts, where they can express the scheme."""

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, tid2eid: Any = None
    ) -> QuantizeMethodBase | None:
        method = super().get_quant_method(layer, prefix, tid2eid)
        if not isinstance(method, ModularAscendMethod):
            return method
        weights = method.weights
        if not _is_expressed(weights, layer):
            return method
        # Ours is a subclass of it.
        upstreams = type(weights).__bases__[1]
        made: QuantizeMethodBase = upstreams(
            weights.weight_quant, weights.input_quant, weights.moe, prefix
        )
        return made


def _is_expressed(weights: Any, layer: Any) -> bool:
    bits, moe = weights.num_bits, weights.moe
    if isinstance(weights, AscendCTWNA16MoEMethod):
        return weights.input_quant is None and bits in (4, 8)
    if not weights.experts_cls.takes_int8:
        return False
    if bits == 8:
        # It does not tell experts of the gate's limits.
        return not getattr(layer, "swiglu_limit", None)
    # Its scales of groups are bfloat16.
    return moe.in_dtype == torch.bfloat16 or weights.weight_quant.group_size is None


class HookedPlatform(EmulatedAscendCTPlatform):
    """Names the config, which nothing then has to register."""

    @classmethod
    def get_quant_config(
        cls, quantization: str, quant_config_cls: type[QuantizationConfig]
    ) -> type[QuantizationConfig]:
        if quantization == "compressed-tensors":
            return HookedConfig
        return quant_config_cls


def register() -> None:
    """Register what is registered by the hooks; kernels in the order of preference."""
    for kernel in (ToldWNA8LinearKernel, AscendWNA16LinearKernel):
        register_linear_kernel(kernel, PlatformEnum.OOT, "mp")
    for experts_type, experts_cls in EXPERTS.items():
        register_moe_experts(experts_cls, PlatformEnum.OOT, experts_type)
