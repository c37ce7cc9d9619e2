# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int4 experts that the checkpoint stores with one value per int8."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    CompressedTensorsW4A8Int8MoEMethod,
)

from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.base import (  # noqa: E501
    AscendCTMoEMixin,
)
from vllm_ascend_ct.weights import pack_quantized


class AscendCTW4A8Int8MoEMethod(AscendCTMoEMixin, CompressedTensorsW4A8Int8MoEMethod):
    """Parameters of int4 experts, created by upstream.

    Weights are packed while they are loaded, so that the model never takes the memory
    of int8 weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_bias = self.moe.has_bias

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for name in ("w13", "w2"):
            # Upstream's parameter for its own packed weight.
            delattr(layer, f"{name}_weight_packed")
            weight = getattr(layer, f"{name}_weight")
            *shape, k = weight.shape
            weight.data = weight.data.new_empty((*shape, k // 8), dtype=torch.int32)
            # Upstream creates bfloat16 scales, to which float16 scales would be
            # rounded.
            scale = getattr(layer, f"{name}_weight_scale")
            scale.data = scale.data.float()

    def transform(self, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        """Pack a tensor if it is a weight.

        Args:
            kind: Kind of the tensor, like "weight" or "weight_scale".
            tensor: The tensor in the checkpoint; a weight is int8 `[N, K]`.

        """
        return pack_quantized.pack_int4(tensor) if kind == "weight" else tensor
