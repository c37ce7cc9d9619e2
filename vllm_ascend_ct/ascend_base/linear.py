# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""How vllm-ascend uses the weights of linear layers outside of their methods."""

from typing import TYPE_CHECKING

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearMethodBase


def unquantized_class() -> "type[LinearMethodBase] | None":
    """vllm-ascend's method for unquantized layers; None without vllm-ascend."""
    if not runs_on_vllm_ascend():
        return None
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    method_class: type[LinearMethodBase] = AscendUnquantizedLinearMethod
    return method_class


def reads_weight(prefix: str) -> bool:
    """Whether vllm-ascend passes a layer's 16-bit weight directly to an operator.

    It does so in the compressors of DeepSeek-V4's attention.

    Args:
        prefix: Name of the layer.

    """
    return runs_on_vllm_ascend() and ".compressor." in prefix
