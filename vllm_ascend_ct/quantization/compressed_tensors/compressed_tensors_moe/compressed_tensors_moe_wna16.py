# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Packed experts, with or without quantized activations."""

import math
from fractions import Fraction
from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)

from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (  # noqa: E501
    AscendCTMoEMixin,
)


class AscendCTWNA16MoEMethod(AscendCTMoEMixin, CompressedTensorsWNA16MoEMethod):
    """Upstream's parameters, with Ascend's experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packed_factor = Fraction(32, self.num_bits)

    def get_weight_shape(
        self,
        weight_name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        num_groups_w2: int | None = None,
        num_groups_w13: int | None = None,
    ) -> tuple[int, int, int]:
        """As upstream's, with room for a last word that is not full."""
        experts, n, words = super().get_weight_shape(
            weight_name,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            num_groups_w2,
            num_groups_w13,
        )
        k = {"w13_weight": hidden_size, "w2_weight": intermediate_size_per_partition}
        if weight_name in k:
            words = math.ceil(k[weight_name] / self.packed_factor)
        return experts, n, words
