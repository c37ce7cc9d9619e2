# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in MXFP8 and MXFP4."""

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 import (  # noqa: E501
    CompressedTensorsW4A4Mxfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_mxfp8 import (  # noqa: E501
    CompressedTensorsW8A8Mxfp8MoEMethod,
)

from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.base import (  # noqa: E501
    AscendCTMoEMixin,
)


class AscendCTMxfp8MoEMethod(AscendCTMoEMixin, CompressedTensorsW8A8Mxfp8MoEMethod):
    """Parameters of MXFP8 experts, created by upstream."""


class AscendCTMxfp4MoEMethod(AscendCTMoEMixin, CompressedTensorsW4A4Mxfp4MoEMethod):
    """Parameters of MXFP4 experts, created by upstream."""
