# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Integer weights with static int8 inputs and outputs."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa8o8 import (  # noqa: E501
    CompressedTensorsWNA8O8Int,
)
from vllm.model_executor.parameter import PerTensorScaleParameter
from vllm.scalar_type import scalar_types

from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import static_fake_quant
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.precedents import DIVIDED, QUANTIZE, Form
from vllm_ascend_ct.weights.scales import per_channel

_SCALES = ("input_scale", "output_scale")


class AscendCTWNA8O8Int(CompressedTensorsWNA8O8Int):
    """Upstream's scheme with another handling of fused layers and int8 weights.

    Upstream has one input and one output scale per layer, so in a fused layer the
    scales of the last shard would apply to all shards. It also quantizes in the
    activations' dtype, and packs an int8 weight by way of one int32 per value.
    """

    def create_weights(
        self,
        layer: Any,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        if self.is_int_quantized:
            # The kernel takes weights with one value per int8 as they are.
            signed = scalar_types.int4 if self.num_bits <= 4 else scalar_types.int8
            self.quant_type = signed
        super().create_weights(
            layer,
            output_size,
            input_size,
            output_partition_sizes,
            input_size_per_partition,
            params_dtype,
            weight_loader,
            **kwargs,
        )
        for name in _SCALES:
            data = torch.zeros(len(output_partition_sizes), dtype=torch.float32)
            parameter = PerTensorScaleParameter(data=data, weight_loader=weight_loader)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        scales = {name: getattr(layer, name).data for name in _SCALES}
        if scales["input_scale"].is_meta:
            # Assume that the scales are calibrated.
            scales = {
                name: torch.ones(scale.shape, device="cpu")
                for name, scale in scales.items()
            }
        # An uncalibrated scale is 0, which means "not quantized", as it does upstream.
        self.has_input_act, self.has_output_act = (
            bool(scales[name].any()) for name in _SCALES
        )
        for name, scale in scales.items():
            if scale.any() and not scale.all():
                raise ValueError(f"{name} is 0 for some shards of the layer: {scale}")
        self.kernel.process_weights_after_loading(layer)
        if self.has_input_act or self.has_output_act:
            announce(self, Form(QUANTIZE, "static", DIVIDED))
        # The shards share one input, but each has its own output scale.
        input_scale, output_scale = scales.values()
        set_parameter(layer, "input_scale", input_scale.max().reshape(1))
        if len(output_scale) > 1:
            output_scale = per_channel(output_scale, layer.output_partition_sizes)
        set_parameter(layer, "output_scale", output_scale)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self.has_input_act:
            x = static_fake_quant(x, layer.input_scale)
        y = self.kernel.apply_weights(layer, x, bias)
        if self.has_output_act:
            y = static_fake_quant(y, layer.output_scale)
        return y
