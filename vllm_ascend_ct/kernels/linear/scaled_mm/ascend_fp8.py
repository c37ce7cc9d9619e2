# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""FP8 linear kernel; see upstream's `kernels/linear/scaled_mm`."""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
)

from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import dynamic_fp8_matmul
from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DYNAMIC_QUANT,
    QUANT_MATMUL,
    ROWS,
    Form,
)
from vllm_ascend_ct.ops.soc import current_soc


class AscendFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """FP8 (E4M3) activations, dynamic per token, with per-channel FP8 weights."""

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        if current_limits().fp8_matmul is None:
            return False, f"Ascend {current_soc().value} does not multiply FP8"
        return True, None

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := foreign_layout():
            return False, reason
        if c.activation_quant_key != kFp8DynamicTokenSym:
            return False, "FP8 activations that are not dynamic per token"
        if c.weight_quant_key not in (kFp8StaticChannelSym, kFp8StaticTensorSym):
            return False, "FP8 weights without a scale per channel or tensor"
        n, k = c.weight_shape
        reason = current_limits().fp8_refusal(c.input_dtype, k, n)
        return reason is None, reason

    def process_weights_after_loading(self, layer: Any) -> None:
        weight_name, scale_name, *_ = self.layer_param_names
        weight, scale, *_ = self._get_layer_params(layer)
        # Upstream's schemes pass a transposed view. vllm-ascend uses contiguous `[K,
        # N]`.
        set_parameter(layer, weight_name, weight.data.contiguous())
        set_parameter(layer, scale_name, scale.data.reshape(-1))
        announce(
            self,
            Form(DYNAMIC_QUANT, "dynamic-fp8", ROWS),
            Form(QUANT_MATMUL, "fp8", CONTIGUOUS),
        )

    def apply_weights(
        self,
        layer: Any,
        x: Any,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Not `_get_layer_params`: it looks up two parameters more, which takes as long
        # as the rest of a call.
        weight_name, scale_name, *_ = self.layer_param_names
        weight, scale = getattr(layer, weight_name), getattr(layer, scale_name)
        return dynamic_fp8_matmul(x, weight, scale, bias)

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        raise NotImplementedError("apply_weights does not call it")
