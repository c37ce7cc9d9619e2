# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Refusal of LoRA adapters for quantized experts, which no kernel supports."""

from vllm.config import LoRAConfig, get_current_vllm_config_or_none

from vllm_ascend_ct.errors import PlatformError, Remedy


def _config() -> LoRAConfig | None:
    vllm_config = get_current_vllm_config_or_none()
    return None if vllm_config is None else vllm_config.lora_config


def may_target(layer_name: str) -> bool:
    """Whether vLLM would wrap these experts for LoRA.

    vLLM wraps every module that adapters may target before it loads any adapter.

    Args:
        layer_name: vLLM's name of the experts, `<block>.experts`.

    """
    lora = _config()
    if lora is None:
        return False
    from vllm.lora.utils import is_in_target_modules

    targets = lora.target_modules
    # For vLLM a projection of one expert, `experts.0.up_proj`, targets all of them.
    last = layer_name.rpartition(".")[2]
    projections = [name for name in targets or [] if name.startswith(f"{last}.")]
    return bool(is_in_target_modules(layer_name, targets, {last: projections}))


def check_experts(layer_name: str) -> None:
    """Refuse experts that vLLM would wrap for LoRA.

    Args:
        layer_name: vLLM's name of the experts, `<block>.experts`.

    Raises:
        PlatformError: LoRA is enabled and may target these experts.

    """
    lora = _config()
    if lora is not None and may_target(layer_name):
        targets = lora.target_modules
        given = "unset" if targets is None else " ".join(sorted(targets))
        raise refused(f"layer {layer_name}, --lora-target-modules {given}")


def refused(where: str) -> PlatformError:
    """Make the error for LoRA adapters on experts.

    Args:
        where: The layer, and the setting or attribute that shows its adapters.

    """
    return PlatformError(
        "LoRA adapters are not supported on quantized experts",
        where=where,
        supported="adapters on other modules",
        remedy=Remedy.LORA_TARGETS,
    )
