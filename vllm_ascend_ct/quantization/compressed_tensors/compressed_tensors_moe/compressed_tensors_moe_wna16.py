# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Packed experts, with or without quantized activations."""

import math
from fractions import Fraction
from typing import Any

from vllm_ascend_ct.compat import CompressedTensorsWNA16MoEMethod
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.base import (  # noqa: E501
    AscendCTMoEMixin,
)


class AscendCTWNA16MoEMethod(AscendCTMoEMixin, CompressedTensorsWNA16MoEMethod):
    """Parameters of packed experts, created by upstream."""

    # Only vLLM 0.23's `create_weights` reads these two.
    actorder = None
    wna16_backend = None
    # Up to 0.30 upstream sets it for its kernels.
    is_transposed = False

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
    ) -> tuple[int, ...]:
        """Shape of a parameter, as upstream's, but `[E, N, K]` and rounded up to words.

        Args:
            weight_name: Name of the parameter without "weight": "w13_scale" or similar.
            num_experts: Number of experts on this rank.
            hidden_size: Hidden size of the model.
            intermediate_size_per_partition: Intermediate size on this rank.
            num_groups_w2: Scales per row of the down projection.
            num_groups_w13: Scales per row of the gate and up projections.

        """
        prefix, _, kind = weight_name.partition("_")
        k, n = hidden_size, 2 * intermediate_size_per_partition
        groups = num_groups_w13
        if prefix == "w2":
            k, n, groups = intermediate_size_per_partition, hidden_size, num_groups_w2
        shapes: dict[str, tuple[Any, ...]] = {
            "weight": (num_experts, n, self._words(k)),
            "scale": (num_experts, n, groups),
            "zp": (num_experts, self._words(n), groups),
        }
        return shapes[kind]

    def _words(self, values: int) -> int:
        return math.ceil(values / self.packed_factor)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        # Only needed for activation ordering, which is refused.
        super().create_weights(layer, *args, intermediate_size_full=None, **kwargs)
        for name, parameter in list(layer.named_parameters(recurse=False)):
            parameter.is_transposed = False
            if "g_idx" in name:
                delattr(layer, name)
