# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Choice of the method and the kernels for routed experts."""

from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    UnquantizedFusedMoEMethod,
)

from vllm_ascend_ct.ascend_base import fused_moe
from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.fused_moe import lora
from vllm_ascend_ct.fused_moe.experts.ascend_float_moe import (
    AscendFp8Experts,
    AscendMxExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_dequant_moe import (
    AscendWNA8DequantExperts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import AscendWNA8Experts
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.fused_moe.fused_moe_ascend_method import (
    ascend_method,
    runner_refusal,
)
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors import load_formats
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_float import (  # noqa: E501
    AscendCTFp8MoEMethod,
    AscendCTMxfp4MoEMethod,
    AscendCTMxfp8MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    AscendCTW4A8Int8MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    AscendCTW8A8Int8MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    AscendCTWNA16MoEMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.refusals import refused
from vllm_ascend_ct.quantization.compressed_tensors.resolved import (
    ResolvedExpertsMixin,
)
from vllm_ascend_ct.quantization.compressed_tensors.resolving import (
    are_experts_multiplied,
    check_resolving,
)
from vllm_ascend_ct.quantization.compressed_tensors.rules import EXPERT_RULES, refusal
from vllm_ascend_ct.quantization.compressed_tensors.unquantized import (
    WatchedMixin,
    watched,
)
from vllm_ascend_ct.quantization.compressed_tensors.utils import (
    is_float,
    is_packed,
    text,
)

logger = init_logger("vllm.ascend_ct.quantization")

_WORD = 32


def get_moe_method(
    quant_config: Any, layer: Any, layer_name: str, tid2eid: Any
) -> FusedMoEMethodBase:
    """Choose the method of routed experts.

    Args:
        quant_config: The model's `AscendCTConfig`.
        layer: The MoE layer.
        layer_name: Its name.
        tid2eid: Table from token ids to experts, if the layer is routed by hash.

    Raises:
        UnsupportedCheckpointError: The scheme is not supported, or does not match the
            experts' tensors in the files.

    """
    shards = [
        getattr(layer, f"ckpt_{kind}_name", kind)
        for kind in ("gate_proj", "up_proj", "down_proj")
    ]
    schemes = {
        name: quant_config.get_scheme_dict(layer, f"{layer_name}.0.{name}")
        for name in shards
        if name is not None
    }
    checkpoint: Checkpoint = quant_config.checkpoint
    files = checkpoint.check_experts(layer, layer_name, schemes)
    scheme = schemes[shards[-1]]
    if scheme is not None and not _is_resolved(scheme, layer, layer_name):
        return _quantized_method(scheme, layer, layer_name, tid2eid, checkpoint, files)
    method_class, options = fused_moe.unquantized_class(tid2eid) or (
        UnquantizedFusedMoEMethod,
        {},
    )
    mixin = WatchedMixin
    if scheme is not None:
        if reason := refusal(scheme, EXPERT_RULES):
            raise refused(f"Experts with {reason}", layer_name)
        check_resolving(scheme, layer_name, checkpoint)
        mixin = ResolvedExpertsMixin
    unquantized = watched(method_class, mixin)(layer.moe_config, **options)
    method: FusedMoEMethodBase = unquantized.watch(checkpoint, layer_name, files)
    return method if scheme is None else unquantized.resolve(scheme)


def _is_resolved(scheme: dict[str, Any], layer: Any, layer_name: str) -> bool:
    """Whether the experts' weights are resolved to 16 bits."""
    if not is_float(scheme):
        return False
    weights = scheme["weights"]
    if not are_experts_multiplied(scheme) or lora.may_target(layer_name):
        return True
    _, experts_cls = _float_classes(weights)
    group_size = max(weights.group_size or 0, 0)
    reason = experts_cls.refusal(
        layer.moe_config, weights.num_bits, group_size, weights.symmetric
    )
    if reason is None:
        return False
    logger.info_once("Experts are not multiplied as they are: %s.", reason)
    return True


def _float_classes(weights: QuantizationArgs) -> tuple[Any, type[AscendExperts]]:
    """The method that creates floating-point experts, and the class that multiplies."""
    if text(weights.strategy) != "group":
        return AscendCTFp8MoEMethod, AscendFp8Experts
    if weights.num_bits == 4:
        return AscendCTMxfp4MoEMethod, AscendMxExperts
    return AscendCTMxfp8MoEMethod, AscendMxExperts


def _quantized_method(
    scheme: dict[str, Any],
    layer: Any,
    layer_name: str,
    tid2eid: Any,
    checkpoint: Checkpoint,
    files: LayerFiles,
) -> FusedMoEMethodBase:
    if reason := refusal(scheme, EXPERT_RULES):
        raise refused(f"Experts with {reason}", layer_name)
    load_formats.check_load_format(layer_name)
    lora.check_experts(layer_name)
    weights = scheme["weights"]
    method_cls: Any = AscendCTWNA16MoEMethod
    if not is_packed(scheme):
        is_int4 = weights.num_bits == 4
        method_cls = AscendCTW4A8Int8MoEMethod if is_int4 else AscendCTW8A8Int8MoEMethod
    moe, inputs = layer.moe_config, scheme["input_activations"]
    if is_float(scheme):
        method_cls, experts_cls = _float_classes(weights)
    else:
        experts_cls = choose_experts(weights, inputs, moe, layer_name)
    method = method_cls(weights, inputs, moe, experts_cls, checkpoint, files)
    return ascend_method(method, layer, tid2eid)


def choose_experts(
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None,
    moe: FusedMoEConfig,
    layer_name: str | None,
) -> type[AscendExperts]:
    """Choose the class that repacks and multiplies the experts of a layer.

    Args:
        weights: How the weights are quantized.
        inputs: How the activations are quantized; None if they are not.
        moe: The layer's config.
        layer_name: Its name.

    Raises:
        UnsupportedCheckpointError: No class supports the layer.

    """
    name = f"W{weights.num_bits}A{8 if inputs else 16}"
    if size_refusal := _size_refusal(weights, moe):
        what, remedy = size_refusal
        raise refused(f"{name} experts: {what}", layer_name, remedy)
    group_size = max(weights.group_size or 0, 0)
    scheme = moe, weights.num_bits, group_size, weights.symmetric
    reason: str | None = "asymmetric activations"
    if inputs is not None:
        wna8: type[AscendExperts] = AscendWNA8Experts
        if current_limits().quant_grouped_matmul_dequant is not None:
            wna8 = AscendWNA8DequantExperts
        if inputs.symmetric:
            reason = runner_refusal(wna8, *scheme)
        if reason is None:
            logger.info_once("Using %s for %s experts.", wna8.__name__, name)
            return wna8
    if weight_reason := runner_refusal(AscendWNA16Experts, *scheme):
        is_split = moe.tp_size > 1
        remedy = Remedy.CHANGE_RANKS if is_split else Remedy.QUANTIZE_AGAIN
        if inputs is not None:
            weight_reason = f"{reason}; as weight-only: {weight_reason}"
        raise refused(f"{name} experts: {weight_reason}", layer_name, remedy)
    logger.info_once("Using AscendWNA16Experts for %s experts.", name)
    if inputs is not None:
        logger.info_once(
            "%s experts are served as W%dA16, with unquantized activations: %s.",
            name,
            weights.num_bits,
            reason,
        )
    return AscendWNA16Experts


def _size_refusal(
    weights: QuantizationArgs, moe: FusedMoEConfig
) -> tuple[str, Remedy] | None:
    """Why a rank's shard of the weights has an unsupported size, with the remedy."""
    bits, group_size = weights.num_bits, weights.group_size or -1
    shards = {
        "K of the first": (moe.hidden_dim, moe.hidden_dim),
        "K of the second": (
            moe.intermediate_size_per_partition * moe.tp_size,
            moe.intermediate_size_per_partition,
        ),
    }
    for name, (size, part) in shards.items():
        remedy = Remedy.CHANGE_RANKS if part != size else Remedy.QUANTIZE_AGAIN
        if part < _WORD:
            reason = f"{name} product is {part} per rank; supported: at least {_WORD}"
            return reason, remedy
        if group_size > 0 and part % group_size:
            return (
                f"{name} product is {part} per rank, group_size={group_size}; "
                "supported: whole groups"
            ), remedy
        if part != size and part * bits % _WORD:
            return (
                f"{name} product is {part} of {size} per rank, "
                f"weights.num_bits={bits}; "
                "supported: shards that begin on an int32 boundary"
            ), remedy
        if not weights.symmetric and part * bits % _WORD:
            return (
                f"N={part}, weights.num_bits={bits}, symmetric=False; "
                "supported: shards whose zero points fill whole int32 words"
            ), remedy
    return None
