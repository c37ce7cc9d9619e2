# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""MXFP4 linear kernel; see upstream's `kernels/linear/mxfp4`."""

from typing import Any

from vllm.model_executor.kernels.linear.mxfp4.base import (
    MxFp4LinearKernel,
    MxFp4LinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic

from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.linear.microscaled import AscendMxMixin
from vllm_ascend_ct.ops.precedents import TRANSPOSED
from vllm_ascend_ct.weights import microscaled


class AscendMxfp4LinearKernel(AscendMxMixin, MxFp4LinearKernel):
    """MXFP4 (E2M1) weights and dynamic activations."""

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        if reason := foreign_layout():
            return False, reason
        # Before vLLM 0.27 the config does not describe activations.
        key = getattr(config, "activation_quant_key", kMxfp4Dynamic)
        if key != kMxfp4Dynamic:
            return False, f"activations {key}; supported: dynamic MXFP4"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        made = microscaled.fp4(layer.weight.data, layer.weight_scale.data)
        self.replace_weight(layer, *made, "mxfp4", TRANSPOSED)
