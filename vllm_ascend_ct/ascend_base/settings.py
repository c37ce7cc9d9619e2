# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Settings under which vllm-ascend reads weights as its own methods lay them out."""

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
        UnsupportedCheckpointError: One is set.

    """
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    name = prefix.rpartition(".")[2]
    if config.xlite_graph_config.enabled:
        raise _refused(prefix, "xlite_graph_config.enabled", True, "False")
    # These two went in 0.25.1 and 0.24.
    if getattr(config, "enable_matmul_allreduce", False):
        raise _refused(prefix, "enable_matmul_allreduce", True, "False")
    sharded = getattr(config, "layer_sharding", None) or ()
    if name in sharded:
        raise _refused(prefix, "layer_sharding", sharded, "layers of 16 bits")
    if _gathers_weight(name):
        raise _refused(prefix, "enable_dsa_cp", True, "False")


def _gathers_weight(name: str) -> bool:
    """Whether vllm-ascend gathers the ranks' weights of a layer, and no scales."""
    from vllm_ascend import utils

    # Before 0.28 and since.
    if hasattr(utils, "enable_dsa_cp_with_o_proj_tp"):
        return name in ("o_proj", "wo_b") and utils.enable_dsa_cp_with_o_proj_tp()
    gathered = ("o_proj", "wo_b") if current_soc() is Soc.A5 else ("o_proj",)
    return name in gathered and utils.enable_dsa_cp_full_o_proj()


def check_latent_query(prefix: str, is_mixed: bool, is_packed: bool) -> None:
    """Refuse settings under which vllm-ascend 0.30 takes a query's weight for 16 bits.

    Args:
        prefix: Name of latent attention's `q_b_proj` or its indexer's `wq_b`, which is
            quantized.
        is_mixed: Whether `fused_qkv_a_proj`, by which vllm-ascend judges both, is not.
        is_packed: Whether the weight is packed.

    Raises:
        UnsupportedCheckpointError: One is set.

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
        layer_name: Of the experts.

    Raises:
        UnsupportedCheckpointError: One is set.

    """
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    # 0.30 turns 2, another operator that takes its own weights, into 1 as well.
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
