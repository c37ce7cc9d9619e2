# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Weight-only linear kernel, as upstream's `kernels/linear/mixed_precision`."""

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.scalar_type import scalar_types

from vllm_ascend_ct.kernels.linear.functional import weight_quant_matmul
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.weights.pack_quantized import (
    to_npu_offset,
    to_npu_scale,
    to_npu_weight,
)

_WEIGHT_TYPES = (
    scalar_types.uint4b8,
    scalar_types.uint4,
    scalar_types.uint8b128,
    scalar_types.uint8,
)


class AscendWNA16LinearKernel(MPLinearKernel):
    """16-bit activations by packed 4-bit or 8-bit weights, in one launch."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in _WEIGHT_TYPES:
            supported = ", ".join(map(str, _WEIGHT_TYPES))
            return False, f"weight type {c.weight_type}; supported: {supported}"
        if getattr(c, "has_g_idx", False):
            return False, "activation ordering with g_idx; supported: without"
        k, n = c.partition_weight_shape
        per_word = 32 // c.weight_type.size_bits
        if k % per_word:
            return False, f"K={k}; supported: multiples of {per_word}"
        reason = current_limits().weight_quant_batchmatmul.refusal(
            c.act_type, c.weight_type.size_bits, k, n, _operator_group_size(c)
        )
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        bits = self.config.weight_type.size_bits
        weight = getattr(layer, self.w_q_name)
        scale = getattr(layer, self.w_s_name)
        if self.config.zero_points:
            assert self.w_zp_name is not None
            offset = to_npu_offset(getattr(layer, self.w_zp_name), scale, bits)
            replace_parameter(layer, self.w_zp_name, offset)
        replace_parameter(layer, self.w_q_name, to_npu_weight(weight.data, bits))
        replace_parameter(layer, self.w_s_name, to_npu_scale(scale.data))
        _convert_bias(layer, self.config.act_type)

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        offset = None
        if self.config.zero_points:
            assert self.w_zp_name is not None
            offset = getattr(layer, self.w_zp_name)
        return weight_quant_matmul(
            x,
            getattr(layer, self.w_q_name),
            getattr(layer, self.w_s_name),
            offset,
            bias,
            _operator_group_size(self.config),
        )


def _operator_group_size(c: MPLinearLayerConfig) -> int:
    """The operator's group size: 0 where one group spans the layer's whole K."""
    k = c.partition_weight_shape[0]
    return 0 if c.group_size in (-1, k) else c.group_size


def _convert_bias(layer: torch.nn.Module, act_type: torch.dtype) -> None:
    """Give the bias the operator's dtype, unless the layer's caller adds it."""
    bias = getattr(layer, "bias", None)
    if bias is not None and not getattr(layer, "skip_bias_add", False):
        dtype = current_limits().weight_quant_batchmatmul.bias_dtype(act_type)
        bias.data = bias.data.to(dtype)
