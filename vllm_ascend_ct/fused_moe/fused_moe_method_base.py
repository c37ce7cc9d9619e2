# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Base of the methods that run experts, as upstream's `fused_moe_method_base.py`."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
)

from vllm_ascend_ct.fused_moe.activation import activation_function
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts


class AscendMethod(FusedMoEMethodBase):
    """Runs experts whose weights another method creates and repacks.

    Attributes:
        weights: Method that creates the parameters, checks the loaded tensors and
            repacks them (`AscendCTMoEMixin`).
        experts: The repacked experts, after loading.

    """

    experts: AscendExperts

    def __init__(self, weights: Any) -> None:
        """Wrap the method that holds the weights."""
        super().__init__(weights.moe)
        self.weights = weights

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self.weights.create_weights(layer, *args, **kwargs)

    def check_loaded(self, layer: Any) -> None:
        """Refuse experts with missing tensors."""
        self.weights.check_loaded(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        activation = activation_function(self.moe, self.moe_quant_config)
        self.experts = self.weights.lay_out_weights(layer, activation=activation)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        # The experts read their scales from the layer and quantize activations
        # themselves.
        return FusedMoEQuantConfig.make(
            gemm1_alpha=getattr(layer, "swiglu_alpha", None),
            gemm1_beta=getattr(layer, "swiglu_beta", None),
            gemm1_clamp_limit=getattr(layer, "swiglu_limit", None),
        )
