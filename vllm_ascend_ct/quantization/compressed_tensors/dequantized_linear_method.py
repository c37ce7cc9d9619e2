# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layers whose weight something else reads, and so are served in 16 bits."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from vllm_ascend_ct.ascend_base import linear
from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.refusals import refused
from vllm_ascend_ct.weights import int4, pack_quantized

logger = init_logger("vllm.ascend_ct.quantization")

# Of DeepSeek-V4, and in a shape of its own.
_HANDED_TO_AN_OPERATOR = "wo_a"


def needs_dense_weight(prefix: str) -> bool:
    """Whether attention reads a layer's weight, which then has to be in 16 bits.

    Not all models with latent attention are among vLLM's `use_mla`, so it is the name
    that counts; where the layer is only called, it is right as well.
    """
    named = prefix.rpartition(".")[2] in ("kv_b_proj", _HANDED_TO_AN_OPERATOR)
    return named or linear.reads_weight(prefix)


@register_weight_loader_v2_supported_method
class AscendCTDequantizedLinearMethod(UnquantizedLinearMethod):
    """Loads a quantized layer, dequantizes it and serves it without quantization.

    vllm-ascend's latent attention asserts that the layer's method is an unquantized
    one. Upstream's would multiply the identity by the layer, which static scales of
    activations round or clip.
    """

    def __init__(self, quantization_config: Any, args: dict[str, Any]) -> None:
        super().__init__()
        self._has_grid = args.get("output_activations") is not None
        self._bits = args["weights"].num_bits
        self._quantized = AscendCTLinearMethod(
            quantization_config, {**args, "input_activations": None}
        )
        self._unquantized = (linear.unquantized_class() or UnquantizedLinearMethod)()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.prefix.rpartition(".")[2] == _HANDED_TO_AN_OPERATOR:
            raise refused(
                "A weight that attention hands to an operator, which takes 16 bits",
                layer.prefix,
                Remedy.LEAVE_UNQUANTIZED,
            )
        if self._has_grid:
            raise refused(
                "output_activations of a layer whose weight attention reads, so that "
                "it has no outputs; supported: none",
                layer.prefix,
            )
        self._shape = sum(output_partition_sizes), input_size_per_partition
        self._quantized.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )

    def check_loaded(self, layer: Any) -> None:
        """Refuse a layer that the checkpoint did not fill."""
        self._quantized.check_loaded(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check_loaded(layer)
        name = ".".join(layer.prefix.split(".")[-2:])
        logger.info_once("%s is dequantized: attention reads its weight.", name)
        weight = dequantized(layer, self._shape, self._bits)
        for name in [name for name in layer._parameters if name != "bias"]:
            delattr(layer, name)
        set_parameter(layer, "weight", weight)
        self._unquantized.process_weights_after_loading(layer)

    def apply(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = self._unquantized.apply(layer, x, bias)
        return y


def dequantized(layer: Any, shape: tuple[int, int], bits: int) -> torch.Tensor:
    """Dequantize the weight that a layer was loaded with, some rows at a time.

    Args:
        layer: With the parameters of upstream's schemes, not yet processed.
        shape: Of the weight, `[N, K]`.
        bits: Of a value of it.

    Returns:
        `[N, K]`, dtype of the layer's parameters.

    """
    n, k = shape
    scale = layer.weight_scale.data
    scale = scale.expand(n, 1) if scale.numel() == 1 else scale
    zero_point = torch.zeros_like(scale)
    if "weight_packed" in layer._parameters:
        values = pack_quantized.rows(layer.weight_packed.data, bits, k)
        if (packed := getattr(layer, "weight_zero_point", None)) is not None:
            zero_point = pack_quantized.unpack(packed.data.t(), bits, n).t()
    else:
        values = iter(layer.weight.data.split(int4.ROWS_AT_ONCE))
    dense = torch.empty(shape, dtype=layer.params_dtype, device=scale.device)
    parts = (t.split(int4.ROWS_AT_ONCE) for t in (zero_point, scale, dense))
    for value, zero, factor, out in zip(values, *parts):
        groups = value.float().unflatten(1, (factor.shape[1], -1))
        groups = (groups - zero.unsqueeze(-1)) * factor.float().unsqueeze(-1)
        out.copy_(groups.flatten(1))
    return dense
