# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int8 experts in the `int-quantized` format."""

from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)

from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.base import (  # noqa: E501
    AscendCTMoEMixin,
)


class AscendCTW8A8Int8MoEMethod(AscendCTMoEMixin, CompressedTensorsW8A8Int8MoEMethod):
    """Parameters of int8 experts, created by upstream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_input_scales = False
