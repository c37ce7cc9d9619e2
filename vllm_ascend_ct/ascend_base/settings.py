# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Settings that make vllm-ascend read weights in the layout of its own methods."""

from typing import Any

from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend
from vllm_ascend_ct.ascend_base.routed_experts import asks_for_products
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops.soc import Soc, current_soc


def check_linear(prefix: str) -> None:
    """Refuse settings that assume vllm-ascend's own layout of a linear layer's weight.

    Args:
        prefix: Name of the layer.

    Raises:
        UnsupportedCheckpointError: One of these settings is enabled for the layer.

    """
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    name = prefix.rpartition(".")[2]
    if config.xlite_graph_config.enabled:
        raise _refused(prefix, "xlite_graph_config.enabled", True, "False")
    # vllm-ascend 0.25.1 and 0.24 removed the next two.
    if getattr(config, "enable_matmul_allreduce", False):
        raise _refused(prefix, "enable_matmul_allreduce", True, "False")
    sharded = getattr(config, "layer_sharding", None) or ()
    if name in sharded:
        raise _refused(prefix, "layer_sharding", sharded, "unquantized layers only")
    if _gathers_weight(name):
        raise _refused(prefix, "enable_dsa_cp", True, "False")


def _gathers_weight(name: str) -> bool:
    """Whether vllm-ascend all-gathers a layer's weight, without its scales."""
    from vllm_ascend import utils

    # Up to 0.27.
    if hasattr(utils, "enable_dsa_cp_with_o_proj_tp"):
        return name in ("o_proj", "wo_b") and utils.enable_dsa_cp_with_o_proj_tp()
    gathered = ("o_proj", "wo_b") if current_soc() is Soc.A5 else ("o_proj",)
    return name in gathered and utils.enable_dsa_cp_full_o_proj()


def check_latent_query(prefix: str, is_mixed: bool, is_packed: bool) -> None:
    """Refuse settings that make vllm-ascend 0.30 treat a query projection as 16-bit.

    Args:
        prefix: Name of a quantized `q_b_proj` of latent attention, or of its indexer's
            quantized `wq_b`.
        is_mixed: Whether `fused_qkv_a_proj` is not quantized. vllm-ascend looks only at
            that layer to decide whether the query projections are quantized.
        is_packed: Whether the weight is packed.

    Raises:
        UnsupportedCheckpointError: One of these settings is enabled for the layer.

    """
    if not runs_on_vllm_ascend() or not asks_for_products():
        return
    from vllm.config import get_current_vllm_config
    from vllm_ascend.attention.utils import enabling_mlapo
    from vllm_ascend.utils import model_uses_sfa_sparse

    config = get_current_vllm_config()
    transfer, ranks = config.kv_transfer_config, config.parallel_config
    is_query = prefix.endswith("q_b_proj")
    if not model_uses_sfa_sparse(config.model_config):
        fuses = current_soc() is Soc.A5 and enabling_mlapo(config)
        if is_mixed and is_query and fuses:
            raise _refused(prefix, "enable_mlapo", True, "False")
        return
    size = ranks.decode_context_parallel_size
    if is_mixed and size == 1 and transfer is not None and transfer.is_kv_consumer:
        role, option = transfer.kv_role, "--kv-transfer-config"
        raise _refused(prefix, "kv_role", role, "kv_producer", option)
    if is_packed and is_query and size > 1:
        option = "the command line"
        raise _refused(prefix, "decode_context_parallel_size", size, "1", option)


def check_experts(layer_name: str) -> None:
    """Refuse settings that assume vllm-ascend's own layout of experts' weights.

    Args:
        layer_name: Name of the layer of experts.

    Raises:
        UnsupportedCheckpointError: One of these settings is enabled.

    """
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    # 2 selects another operator with a weight layout of its own; 0.30 replaces it by 1.
    if config.enable_fused_mc2 == 1:
        raise _refused(layer_name, "enable_fused_mc2", 1, "0")
    if config.eplb_config.dynamic_eplb:
        raise _refused(layer_name, "eplb_config.dynamic_eplb", True, "False")


def _refused(
    layer_name: str,
    setting: str,
    value: Any,
    supported: str,
    option: str = "--additional-config",
) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "This setting makes vllm-ascend read weights in the layout of its own methods",
        where=f"layer {layer_name}, {setting}={value}",
        supported=f"{setting}: {supported}",
        remedy=f"Change {setting} in {option}",
    )
