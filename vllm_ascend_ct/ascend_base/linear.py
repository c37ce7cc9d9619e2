# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What vllm-ascend 0.23 does with the weights of linear layers by itself."""

from typing import TYPE_CHECKING

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearMethodBase


def unquantized_class() -> "type[LinearMethodBase] | None":
    """vllm-ascend's method for layers that are not quantized; None off the NPU."""
    if not runs_on_vllm_ascend():
        return None
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    method_class: type[LinearMethodBase] = AscendUnquantizedLinearMethod
    return method_class


def reads_weight(prefix: str) -> bool:
    """Whether an operator of vllm-ascend's is handed a layer's 16-bit weight.

    That is so in the compressors of DeepSeek-V4's attention.
    """
    return runs_on_vllm_ascend() and ".compressor." in prefix
