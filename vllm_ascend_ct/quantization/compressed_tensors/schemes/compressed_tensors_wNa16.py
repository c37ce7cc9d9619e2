# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Packed weights for vLLM releases whose own schemes do not support them."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from vllm_ascend_ct import compat
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import packed_type
from vllm_ascend_ct.quantization.compressed_tensors.utils import is_packed

_WORD = 32


class AscendCTWNA16(CompressedTensorsWNA16):
    """Upstream's scheme of vLLM before 0.26, extended from 4 and 8 bits to 2 to 8 bits.

    As in later releases, activations may be quantized: the linear method then replaces
    the kernel.
    """

    def __init__(self, num_bits: int, symmetric: bool, **kwargs: Any) -> None:
        # Any width that upstream accepts; the real one is set below.
        super().__init__(num_bits=4, symmetric=symmetric, **kwargs)
        self.quant_type = packed_type(num_bits, symmetric)
        self.pack_factor = Fraction(_WORD, num_bits)

    @classmethod
    def is_needed(cls, args: dict[str, Any]) -> bool:
        """Whether this vLLM release has no scheme for a supported config group.

        Args:
            args: The scheme from upstream's `get_scheme_dict`.

        """
        return (
            compat.CompressedTensorsWNA8Int is None
            and is_packed(args)
            and (
                args["weights"].num_bits not in (4, 8)
                or args["input_activations"] is not None
            )
        )

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
        bits = self.quant_type.size_bits
        if input_size_per_partition * bits % _WORD:
            raise ValueError(
                f"K={input_size_per_partition}, weights.num_bits={bits}; supported on "
                "vLLM before 0.26: rows that fill whole int32 words"
            )
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
