# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""LoRA adapters of quantized experts, which no kernel takes."""

from vllm.config import get_current_vllm_config_or_none

from vllm_ascend_ct.errors import PlatformError, Remedy


def check_experts(layer_name: str) -> None:
    """Refuse experts that vLLM would wrap for adapters.

    It wraps whatever adapters may be for, before it knows any.

    Args:
        layer_name: As vLLM calls the experts, `<block>.experts`.

    Raises:
        PlatformError: Adapters may be for these.

    """
    vllm_config = get_current_vllm_config_or_none()
    lora = None if vllm_config is None else vllm_config.lora_config
    if lora is None:
        return
    from vllm.lora.utils import is_in_target_modules

    targets = lora.target_modules
    # vLLM takes each projection of an expert, `experts.0.up_proj`, for all of them.
    last = layer_name.rpartition(".")[2]
    projections = [name for name in targets or [] if name.startswith(f"{last}.")]
    if is_in_target_modules(layer_name, targets, {last: projections}):
        given = "unset" if targets is None else " ".join(sorted(targets))
        raise refused(f"layer {layer_name}, --lora-target-modules {given}")


def refused(where: str) -> PlatformError:
    """Refuse adapters of experts.

    Args:
        where: The layer, and what says that it has adapters.

    """
    return PlatformError(
        "No kernel of quantized experts takes LoRA adapters",
        where=where,
        supported="adapters of other modules",
        remedy=Remedy.LORA_TARGETS,
    )
