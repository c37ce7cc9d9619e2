# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's own methods, where vLLM asks platforms for experts.

Needs the hook `register_moe_experts` that `upstream_patches` stages. Schemes that
upstream's methods cannot express keep ours.
"""

from typing import Any

import torch
from compressed_tensors import CompressionFormat
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    CompressedTensorsW4A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)

from vllm_ascend_ct import ascend_base, compat
from vllm_ascend_ct.errors import broken_checkpoint
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_dequant_moe import (
    AscendWNA8DequantExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import (
    AscendW4A8Experts,
    AscendWNA8Experts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.quantization.compressed_tensors.agreement import places
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.loading import (  # noqa: E501
    expert_rows,
    expert_shapes,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.tensors import OPTIONAL

_DTYPES = {
    "I8": torch.int8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
# Oracle -> what is registered for it, and the method that asks it.
EXPERTS: dict[str, type[AscendExperts]] = {
    "int8": AscendWNA8Experts,
    "w4a8_int8": AscendW4A8Experts,
    "int_wna16": AscendWNA16Experts,
}
_METHODS: dict[str, Any] = {
    "int8": CompressedTensorsW8A8Int8MoEMethod,
    "w4a8_int8": CompressedTensorsW4A8Int8MoEMethod,
    "int_wna16": compat.CompressedTensorsWNA16MoEMethod,
}


def registered_method(
    scheme: dict[str, Any],
    experts_cls: type[AscendExperts],
    layer: Any,
    layer_name: str,
    files: LayerFiles,
) -> FusedMoEMethodBase | None:
    """Make upstream's method, if it serves a layer just as ours would.

    Args:
        scheme: As upstream's `get_scheme_dict` gives it.
        experts_cls: What was chosen to compute the layer.
        layer: The layer.
        layer_name: Its name.
        files: What the file has of the layer.

    Raises:
        UnsupportedCheckpointError: A tensor in the file is not as it has to be.

    """
    oracle = _oracle(scheme, experts_cls, layer)
    if oracle not in compat.MOE_EXPERTS_TYPES or ascend_base.runs_on_vllm_ascend():
        return None
    moe = layer.moe_config
    if getattr(moe, "moe_backend", "auto") != "auto" or moe.is_lora_enabled:
        # Upstream then asks no registered experts, or such as take adapters; ours
        # serve whatever is named, and beside adapters of other modules.
        return None
    _check_tensors(files, layer, scheme)
    method: FusedMoEMethodBase = _METHODS[oracle](
        scheme["weights"], scheme["input_activations"], layer.moe_config, layer_name
    )
    return method


def is_upstreams(method: FusedMoEMethodBase) -> bool:
    """Whether a method is one that `registered_method` made."""
    return type(method) in _METHODS.values()


def _check_tensors(files: LayerFiles, layer: Any, scheme: dict[str, Any]) -> None:
    """Check before loading what upstream's methods do not check while they load.

    Values are not known here.
    """
    moe = layer.moe_config
    shapes, rows = expert_shapes(scheme["weights"], moe), expert_rows(moe)
    kinds = sorted(places(scheme) - {"bias", *OPTIONAL})
    down = getattr(layer, "ckpt_down_proj_name", "down_proj")
    for name in files.shards:
        prefix = "w2" if name.endswith(f".{down}") else "w13"
        if (part := files.parts.get(name)) is None:
            continue
        for kind in kinds:
            where = f"tensor {part.name}.{kind}"
            if kind not in part.shapes:
                raise broken_checkpoint("A tensor of the layer is missing", where)
            dtype = _DTYPES.get(part.dtypes[kind], torch.bool)
            tensor = torch.empty(part.shapes[kind], dtype=dtype, device="meta")
            if fault := shapes[prefix].fault(kind, tensor, rows[prefix]):
                what = f"The checkpoint's tensor {fault.reason}"
                raise broken_checkpoint(what, where, fault.remedy)


def _oracle(
    scheme: dict[str, Any], experts_cls: type[AscendExperts], layer: Any
) -> str | None:
    weights, moe = scheme["weights"], layer.moe_config
    if scheme["format"] == CompressionFormat.pack_quantized.value:
        whole = all(
            size * weights.num_bits % 32 == 0
            for size in (moe.hidden_dim, moe.intermediate_size_per_partition)
        )
        weight_only = scheme["input_activations"] is None
        served = weight_only and weights.num_bits in (4, 8) and whole
        return "int_wna16" if served else None
    if not experts_cls.quantizes_activations:
        return None
    if experts_cls is AscendWNA8DequantExperts:
        # They are not among those that upstream asks.
        return None
    if weights.num_bits == 8:
        # It does not tell experts of the gate's limits.
        return None if getattr(layer, "swiglu_limit", None) else "int8"
    # Its scales of groups are bfloat16.
    exact = moe.in_dtype == torch.bfloat16 or weights.group_size is None
    return "w4a8_int8" if exact else None
