# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""MXFP8 linear kernel; see upstream's `kernels/linear/mxfp8`."""

from typing import Any

from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import (
    Mxfp8LinearKernel,
    Mxfp8LinearLayerConfig,
)

from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.linear.microscaled import AscendMxMixin
from vllm_ascend_ct.ops.precedents import CONTIGUOUS
from vllm_ascend_ct.weights import microscaled
from vllm_ascend_ct.weights.float_quantized import has_nan


class AscendMxfp8LinearKernel(AscendMxMixin, Mxfp8LinearKernel):
    """MXFP8 (E4M3) weights and dynamic activations."""

    @classmethod
    def can_implement(cls, c: Mxfp8LinearLayerConfig) -> tuple[bool, str | None]:
        reason = foreign_layout()
        return reason is None, reason

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = layer.weight.data, layer.weight_scale.data
        if has_nan(weight):
            raise ValueError("weight contains NaN")
        self.replace_weight(layer, *microscaled.fp8(weight, scale), "mxfp8", CONTIGUOUS)
