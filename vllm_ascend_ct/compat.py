# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Differences between the supported vLLM releases, and uses of vLLM's internals."""

from inspect import signature
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import PretrainedConfig
from vllm.config import get_current_vllm_config_or_none
from vllm.config.utils import normalize_value
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload import layerwise
from vllm.platforms import current_platform

# vLLM's name of the quantization method that this package serves.
QUANTIZATION = "compressed-tensors"

# Result type of experts that leave the top-k reduction to the caller. None in releases
# whose modular kernel cannot return it.
UnfinalizedMoEOutput: Any = None
try:
    from vllm.model_executor.layers.fused_moe import moe_output
except ImportError:
    pass
else:
    UnfinalizedMoEOutput = moe_output.UnfinalizedMoEOutput

# Scheme for packed weights with quantized activations. Releases without it have one for
# 4-bit and 8-bit weights only.
CompressedTensorsWNA8Int: Any = getattr(schemes, "CompressedTensorsWNA8Int", None)

# Whether that scheme creates zero points. In vLLM 0.27 to 0.30 it does not.
ZERO_POINTS_BESIDE_INT8 = (
    CompressedTensorsWNA8Int is None
    or "symmetric" in signature(CompressedTensorsWNA8Int.__init__).parameters
)

# Whether an output head that is tied to an embedding calls its method's `tie_weights`.
# In older releases the head takes over the embedding's parameter `weight` instead.
METHODS_TIE_WEIGHTS = hasattr(UnquantizedEmbeddingMethod, "tie_weights")

# Whether the hash that keys vLLM's cache of compiled graphs includes fields added to
# the model's config at run time. vLLM 0.23 hashes only the fields that its class
# declares.
HASHES_ADDED_FIELDS = "added" in str(normalize_value(PretrainedConfig(added=1)))

# Creates the parameters of packed experts. vLLM 0.23 has two classes for them; the
# Marlin one supports per-channel scales and zero points.
CompressedTensorsWNA16MoEMethod: Any
try:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # type: ignore[attr-defined]  # noqa: E501
        compressed_tensors_moe_wna16_marlin as _marlin,
    )
except ImportError:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
        compressed_tensors_moe_wna16 as _wna16,
    )

    CompressedTensorsWNA16MoEMethod = _wna16.CompressedTensorsWNA16MoEMethod
else:
    CompressedTensorsWNA16MoEMethod = _marlin.CompressedTensorsWNA16MarlinMoEMethod


def is_ours(quant_config: Any) -> bool:
    """Whether a model's quantization config, if it has one, is compressed-tensors."""
    return quant_config is not None and quant_config.get_name() == QUANTIZATION


def load_format() -> str:
    """The current model's `--load-format`; "auto" outside of an engine."""
    vllm_config = get_current_vllm_config_or_none()
    return "auto" if vllm_config is None else str(vllm_config.load_config.load_format)


def free_memory() -> int:
    """Free bytes of the memory that weights are loaded into (NPU, or host)."""
    npu = getattr(torch, "npu", None)
    if npu is None or current_platform.is_cpu() or not npu.is_available():
        return int(psutil.virtual_memory().available)
    return int(npu.mem_get_info()[0])


def offloads_weights(vllm_config: Any) -> bool:
    """Whether the engine is configured to offload some of the weights."""
    offload = getattr(vllm_config, "offload_config", None)
    parts = (getattr(offload, name, None) for name in ("uva", "prefetch"))
    holders = (vllm_config.cache_config, offload, *parts)
    names = ("cpu_offload_gb", "offload_group_size")
    return any(getattr(holder, name, 0) for holder in holders for name in names)


def modules_around(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All modules of the model that contains `layer`, by their names in the model.

    Empty until the model is built, which is when vLLM records its modules for a reload.
    """
    known = list(getattr(layerwise, "LAYERWISE_INFO", ()))
    inner = {id(child) for module in known for child in module.children()}
    for module in known:
        if id(module) not in inner:
            modules = dict(module.named_modules())
            if any(other is layer for other in modules.values()):
                return modules
    return {}
