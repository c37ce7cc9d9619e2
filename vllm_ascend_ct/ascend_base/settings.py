# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Settings of vllm-ascend 0.23 that it serves its own weights with, and no others."""

from typing import Any

from vllm_ascend_ct.ascend_base import serves
from vllm_ascend_ct.errors import UnsupportedCheckpointError


def check_linear(prefix: str) -> None:
    """Refuse settings that a quantized linear layer cannot be served with.

    Args:
        prefix: Name of the layer.

    Raises:
        UnsupportedCheckpointError: One is set.

    """
    if not serves():
        return
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.utils import enable_dsa_cp_with_o_proj_tp

    config = get_ascend_config()
    name = prefix.rpartition(".")[2]
    if config.xlite_graph_config.enabled:
        raise _refused(prefix, "xlite_graph_config.enabled", True, "False")
    if config.enable_matmul_allreduce:
        raise _refused(prefix, "enable_matmul_allreduce", True, "False")
    if name in (config.layer_sharding or ()):
        sharded = config.layer_sharding
        raise _refused(prefix, "layer_sharding", sharded, "layers of 16 bits")
    if name in ("o_proj", "wo_b") and enable_dsa_cp_with_o_proj_tp():
        # It puts together the ranks' weights, and not what else belongs to them.
        raise _refused(prefix, "enable_dsa_cp", True, "False")


def check_experts(layer_name: str) -> None:
    """Refuse settings that quantized experts cannot be served with.

    Args:
        layer_name: Of the experts.

    Raises:
        UnsupportedCheckpointError: One is set.

    """
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    if config.enable_fused_mc2 == 1:
        raise _refused(layer_name, "enable_fused_mc2", 1, "0 and 2")
    if config.eplb_config.dynamic_eplb:
        raise _refused(layer_name, "eplb_config.dynamic_eplb", True, "False")


def _refused(
    layer_name: str, setting: str, value: Any, supported: str
) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "vllm-ascend does something with weights, under a setting, that it can do with "
        "its own only",
        where=f"layer {layer_name}, {setting}={value}",
        supported=f"{setting}: {supported}",
        remedy=f"Change {setting} in --additional-config",
    )
