# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What vllm-ascend 0.23 does with the weights of linear layers by itself."""

from typing import TYPE_CHECKING

from vllm_ascend_ct.ascend_base import serves

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearMethodBase


def unquantized_method() -> "LinearMethodBase | None":
    """vllm-ascend's method for layers that are not quantized; None off the NPU."""
    if not serves():
        return None
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    method: LinearMethodBase = AscendUnquantizedLinearMethod()
    return method


def reads_weight(prefix: str) -> bool:
    """Whether an operator of vllm-ascend's is handed a layer's 16-bit weight.

    That is so in the compressors of DeepSeek-V4's attention.
    """
    return serves() and ".compressor." in prefix


def refusal(prefix: str) -> str | None:
    """Why attention or vllm-ascend cannot run a quantized layer, or None.

    Args:
        prefix: Name of the layer.

    """
    name = prefix.rpartition(".")[2]
    if name == "wo_a":
        return "a weight that attention hands to an operator; supported: 16 bits"
    if not serves():
        return None
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.utils import enable_dsa_cp_with_o_proj_tp

    config = get_ascend_config()
    if config.xlite_graph_config.enabled:
        return "xlite_graph_config.enabled=True; vllm-ascend supports its own layouts"
    if config.enable_matmul_allreduce:
        return "enable_matmul_allreduce=True; vllm-ascend supports 16-bit weights"
    if name in (config.layer_sharding or ()):
        return f"layer_sharding={config.layer_sharding}; supported: other layers"
    if name in ("o_proj", "wo_b") and enable_dsa_cp_with_o_proj_tp():
        # It puts together the ranks' weights, and not what else belongs to them.
        return "enable_dsa_cp=True with tensor parallelism; supported: other layers"
    return None
