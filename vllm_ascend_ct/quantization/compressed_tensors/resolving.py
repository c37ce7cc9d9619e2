# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks that floating-point weights may be resolved to 16 bits and fit in memory."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_ascend_ct import compat, envs
from vllm_ascend_ct.ascend_base import routed_experts, runs_on_vllm_ascend
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.soc import current_soc
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.dequantized_linear_method import (
    needs_dense_weight,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import FileLayer
from vllm_ascend_ct.quantization.compressed_tensors.refusals import refused
from vllm_ascend_ct.quantization.compressed_tensors.rules import (
    float_name,
    is_multiplied,
)
from vllm_ascend_ct.quantization.compressed_tensors.utils import is_float, text

logger = init_logger("vllm.ascend_ct.quantization")

_GIB = 2**30
_BLOCK = re.compile(r"\blayers\.(\d+)\.")


def is_resolved(scheme: dict[str, Any], prefix: str, layer: Any = None) -> bool:
    """Whether a linear layer's weights are resolved to 16 bits.

    Args:
        scheme: The layer's scheme from upstream's `get_scheme_dict`.
        prefix: Its name.
        layer: The layer, whose sizes and dtype may be outside the operators' limits;
            None if they are not known.

    """
    if not is_float(scheme):
        return False
    if needs_dense_weight(prefix) or not is_multiplied(scheme):
        return True
    return layer is not None and _size_refusal(scheme, layer) is not None


def are_experts_multiplied(scheme: dict[str, Any]) -> bool:
    """Whether experts with a floating-point scheme are multiplied as they are.

    Those in an MX format and in FP8 per channel are, if this package multiplies them;
    their sizes may still be outside the operators' limits.

    Args:
        scheme: A floating-point scheme from upstream's `get_scheme_dict`.

    """
    by_scale = text(scheme["weights"].strategy) in ("group", "channel")
    ours = not runs_on_vllm_ascend() or routed_experts.asks_for_products()
    return by_scale and ours and is_multiplied(scheme)


def _size_refusal(scheme: dict[str, Any], layer: Any) -> str | None:
    """Why the chip cannot multiply a layer whose scheme it multiplies, or None."""
    # Layers that are not split over ranks have no sizes per rank.
    k = getattr(layer, "input_size_per_partition", layer.input_size)
    n = getattr(layer, "output_size_per_partition", layer.output_size)
    limits, group_size = current_limits(), scheme["weights"].group_size
    if limits.mx_matmul is None or not group_size:
        return limits.fp8_refusal(layer.params_dtype, k, n)
    if k % group_size:
        return f"K={k} per rank, group_size={group_size}; supported: whole groups"
    return limits.mx_matmul.refusal(layer.params_dtype, k, n)


def check_resolving(
    scheme: dict[str, Any], layer_name: str, checkpoint: Checkpoint
) -> None:
    """Check that a layer may be resolved; warn about the memory once per model.

    Args:
        scheme: The layer's scheme from upstream's `get_scheme_dict`.
        layer_name: The layer's name in vLLM.
        checkpoint: The model's checkpoint.

    Raises:
        UnsupportedCheckpointError: `VLLM_ASCEND_CT_RESOLVE=0` forbids it, or the
            resolved weights do not fit in memory.

    """
    name = float_name(scheme)
    if not envs.resolve():
        raise refused(
            f"{name} weights would have to be resolved to 16 bits, which "
            f"{envs.RESOLVE}=0 forbids",
            layer_name,
            Remedy.RESOLVE.format(variable=envs.RESOLVE),
        )
    if checkpoint.is_resolved:
        return
    checkpoint.is_resolved = True
    headers = checkpoint.headers
    only_experts = is_multiplied(scheme)
    resolved = 0
    sizes = "two to four times their size in the checkpoint's files"
    if headers is not None and not are_experts_multiplied(scheme):
        layers = list(headers.layers.values())
        stored, resolved = _bytes(layers, only_experts)
        if not checkpoint.is_second:
            _check_fits(layers, layer_name, only_experts)
    if resolved:
        sizes = (
            f"{resolved / _GIB:.2f} GiB, compared with {stored / _GIB:.2f} GiB in the "
            "checkpoint's files"
        )
    logger.warning_once(
        "%s weights%s are resolved (dequantized) to 16 bits while they are loaded: "
        "vllm-ascend-ct has no kernel for them on Ascend %s. Over all ranks they take "
        "%s. Weights of integer schemes (W8A8, W4A16) keep their quantized size.",
        name,
        _exception(scheme),
        current_soc().value,
        sizes,
    )


def _exception(scheme: dict[str, Any]) -> str:
    """The part of the warning that says which layers are not resolved."""
    if not is_multiplied(scheme):
        return ""
    experts = " and experts" if are_experts_multiplied(scheme) else ""
    return f", except those of most linear layers{experts},"


def _bytes(layers: Iterable[FileLayer], only_experts: bool) -> tuple[int, int]:
    """Total size of floating-point weights, in the files and in 16 bits.

    Args:
        layers: Layers in the files.
        only_experts: Whether to count experts only, because the chip multiplies the
            weights of linear layers as they are.

    """
    stored = resolved = 0
    for layer in layers:
        if only_experts and ".experts." not in layer.name:
            continue
        for kind, values in (("weight", 1), ("weight_packed", 2)):
            if layer.is_quantized and layer.dtypes.get(kind) in ("F8_E4M3", "U8"):
                size = math.prod(layer.shapes[kind])
                stored += size
                resolved += size * values * 2
    return stored, resolved


def _check_fits(
    layers: Iterable[FileLayer], layer_name: str, only_experts: bool
) -> None:
    """Refuse a model whose resolved weights cannot fit in memory.

    This is a lower bound. It counts only the model's blocks, because the files may also
    contain a draft model or a vision tower that is not built, and it assumes that all
    ranks have equal shares.

    Args:
        layers: Layers in the files.
        layer_name: Name of a layer, for the error text.
        only_experts: Whether to count experts only.

    Raises:
        UnsupportedCheckpointError: The weights take more than the free memory.

    """
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or compat.offloads_weights(vllm_config):
        return
    if torch.get_default_device().type == "meta":
        # The model is only inspected, possibly on a different machine from the one that
        # will serve it.
        return
    text_config = vllm_config.model_config.hf_text_config
    count = getattr(text_config, "num_hidden_layers", 0)
    numbers = [(_BLOCK.search(layer.name), layer) for layer in layers]
    blocks = [layer for found, layer in numbers if found and int(found[1]) < count]
    _, resolved = _bytes(blocks, only_experts)
    parallel = vllm_config.parallel_config
    ranks = parallel.world_size * parallel.data_parallel_size
    free = compat.free_memory()
    if resolved / ranks > free:
        raise UnsupportedCheckpointError(
            f"Resolved to 16 bits, the weights take {resolved / ranks / _GIB:.2f} GiB "
            f"per rank, but only {free / _GIB:.2f} GiB are free",
            where=f"layer {layer_name} on Ascend {current_soc().value}, {ranks} ranks",
            supported="models whose weights fit in 16 bits, if the chip cannot "
            "multiply them as they are",
            remedy=Remedy.MORE_MEMORY,
        )
