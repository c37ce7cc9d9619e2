# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Quantized layers served in 16 bits, because other code reads their weight."""

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
from vllm_ascend_ct.quantization.compressed_tensors.refusals import (
    enough_memory,
    refused,
)
from vllm_ascend_ct.weights import int4, pack_quantized

logger = init_logger("vllm.ascend_ct.quantization")

# In DeepSeek-V4. Attention passes this weight to an operator, in another shape.
_HANDED_TO_AN_OPERATOR = "wo_a"


def needs_dense_weight(prefix: str) -> bool:
    """Whether attention reads a layer's weight, which must then be in 16 bits.

    Decides by the layer's name, because `use_mla` in vLLM does not cover all models
    with latent attention. If a model only calls such a layer, 16 bits are correct too.

    Args:
        prefix: Name of the layer.

    """
    named = prefix.rpartition(".")[2] in ("kv_b_proj", _HANDED_TO_AN_OPERATOR)
    return named or linear.reads_weight(prefix)


@register_weight_loader_v2_supported_method
class AscendCTDequantizedLinearMethod(UnquantizedLinearMethod):
    """Loads a quantized layer, dequantizes it and serves it in 16 bits.

    vllm-ascend's latent attention asserts that the layer's method is the unquantized
    one. Upstream's latent attention would instead call the layer with an identity
    matrix, which static activation scales would round or clip.
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
                "A quantized weight that attention passes to an operator for 16-bit "
                "weights",
                layer.prefix,
                Remedy.LEAVE_UNQUANTIZED,
            )
        if self._has_grid:
            raise refused(
                "output_activations of a layer whose weight attention reads directly, "
                "so that no outputs are computed; supported: no output_activations",
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
        """Refuse a layer with missing tensors."""
        self._quantized.check_loaded(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check_loaded(layer)
        name = ".".join(layer.prefix.split(".")[-2:])
        logger.info_once(
            "Dequantizing %s to 16 bits, because attention reads its weight.", name
        )
        with enough_memory(layer.prefix):
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
    """Dequantize a loaded weight in blocks of rows.

    Args:
        layer: A layer with loaded, unprocessed parameters of an upstream scheme.
        shape: `(N, K)` of the weight.
        bits: Weight width.

    Returns:
        `[N, K]`, in the layer's `params_dtype`.

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
