# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What of vLLM differs between supported releases, or is none of its interfaces."""

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

# What this package serves, as vLLM calls it.
QUANTIZATION = "compressed-tensors"

# Result type of experts that leave the top-k reduction to the caller. None in releases
# whose modular kernel does not pass it on.
UnfinalizedMoEOutput: Any = None
try:
    from vllm.model_executor.layers.fused_moe import moe_output
except ImportError:
    pass
else:
    UnfinalizedMoEOutput = moe_output.UnfinalizedMoEOutput

# Packed weights with quantized activations. The releases that lack it have a scheme for
# weights of 4 and 8 bits only.
CompressedTensorsWNA8Int: Any = getattr(schemes, "CompressedTensorsWNA8Int", None)

# Whether upstream's scheme for them creates zero points; that of 0.27 to 0.30 does not.
ZERO_POINTS_BESIDE_INT8 = (
    CompressedTensorsWNA8Int is None
    or "symmetric" in signature(CompressedTensorsWNA8Int.__init__).parameters
)

# Whether a head asks its method what it becomes when tied to an embedding. If not,
# it takes over the embedding's parameter `weight`.
METHODS_TIE_WEIGHTS = hasattr(UnquantizedEmbeddingMethod, "tie_weights")

# Whether vLLM's hash of a model, by which it names its cache of compiled graphs, takes
# what is added to the model's config. vLLM 0.23 takes the fields its class declares.
HASHES_ADDED_FIELDS = "added" in str(normalize_value(PretrainedConfig(added=1)))

# The parameters of packed experts: of vLLM 0.23's two classes for them the one that has
# scales per channel and zero points.
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
    """Whether a quantization config, if any, is of what this package serves."""
    return quant_config is not None and quant_config.get_name() == QUANTIZATION


def load_format() -> str:
    """Name of the format that the current model is loaded in."""
    vllm_config = get_current_vllm_config_or_none()
    return "auto" if vllm_config is None else str(vllm_config.load_config.load_format)


def free_memory() -> int:
    """Bytes that are free where weights go."""
    npu = getattr(torch, "npu", None)
    if npu is None or current_platform.is_cpu() or not npu.is_available():
        return int(psutil.virtual_memory().available)
    return int(npu.mem_get_info()[0])


def offloads_weights(vllm_config: Any) -> bool:
    """Whether some of the weights go elsewhere."""
    offload = getattr(vllm_config, "offload_config", None)
    parts = (getattr(offload, name, None) for name in ("uva", "prefetch"))
    holders = (vllm_config.cache_config, offload, *parts)
    names = ("cpu_offload_gb", "offload_group_size")
    return any(getattr(holder, name, 0) for holder in holders for name in names)


def modules_around(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of the model that has a layer, by their names in it.

    Empty until the model is built: vLLM then notes its modules for reloading.
    """
    known = list(getattr(layerwise, "LAYERWISE_INFO", ()))
    inner = {id(child) for module in known for child in module.children()}
    for module in known:
        if id(module) not in inner:
            modules = dict(module.named_modules())
            if any(other is layer for other in modules.values()):
                return modules
    return {}
