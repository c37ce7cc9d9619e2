# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in FP8, MXFP8 and MXFP4."""

from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 import (  # noqa: E501
    CompressedTensorsW4A4Mxfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_mxfp8 import (  # noqa: E501
    CompressedTensorsW8A8Mxfp8MoEMethod,
)

from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.base import (  # noqa: E501
    AscendCTMoEMixin,
)


class AscendCTFp8MoEMethod(AscendCTMoEMixin, CompressedTensorsW8A8Fp8MoEMethod):
    """Parameters of FP8 experts with a scale per channel, created by upstream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_block_size = None
        self.block_quant = self.static_input_scales = False


class AscendCTMxfp8MoEMethod(AscendCTMoEMixin, CompressedTensorsW8A8Mxfp8MoEMethod):
    """Parameters of MXFP8 experts, created by upstream."""


class AscendCTMxfp4MoEMethod(AscendCTMoEMixin, CompressedTensorsW4A4Mxfp4MoEMethod):
    """Parameters of MXFP4 experts, created by upstream."""
