# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""FP8 weights with dynamic per-token FP8 activations."""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8,
    weight_quant_key_mapping,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
)

from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.quantization.compressed_tensors.utils import text
from vllm_ascend_ct.weights.float_quantized import has_nan
from vllm_ascend_ct.weights.scales import per_channel


class AscendCTW8A8Fp8(CompressedTensorsW8A8Fp8):
    """Upstream's scheme with another handling of dtypes and per-tensor scales.

    Upstream uses the model's dtype instead of the layer's. If the shards of a fused
    layer have one scale each, it requantizes their weights to the largest scale with a
    CUDA operator; this class keeps the scales as per-channel ones.
    """

    def __init__(self, weights: QuantizationArgs) -> None:
        """Set up without upstream's constructor, which reads the model's config.

        Args:
            weights: How the weights are quantized, per channel or per tensor.

        """
        self.weight_quant = weights
        self.strategy = weights.strategy
        self.is_static_input_scheme = False
        self.weight_block_size = None
        self.activation_quant_key = kFp8DynamicTokenSym
        self.weight_quant_key = weight_quant_key_mapping[self.strategy]

    @property
    def kernel(self) -> Any:
        """The kernel, under the name that upstream's other schemes use."""
        return self.fp8_linear

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        self.input_dtype = self.out_dtype = params_dtype
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader,
            **kwargs,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = layer.weight.data, layer.weight_scale.data
        if has_nan(weight):
            raise ValueError("weight contains NaN")
        if text(self.strategy) == "tensor":
            scale = per_channel(scale, layer.logical_widths).unsqueeze(1)
        set_parameter(layer, "weight", weight.t())
        set_parameter(layer, "weight_scale", scale)
        self.kernel.process_weights_after_loading(layer)
