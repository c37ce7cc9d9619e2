# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Weight-only linear kernel; see upstream's `kernels/linear/mixed_precision`."""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.scalar_type import ScalarType, scalar_types

from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import weight_quant_matmul
from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.parameters import convert_bias, set_parameter
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.dtypes import INT4_PER_INT32
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import CONTIGUOUS, TRANSPOSED, WEIGHT_ONLY, Form
from vllm_ascend_ct.weights import int4, int_quantized, pack_quantized

# Name of the weight in the layouts of GPTQ and AWQ, which are `[K, N]`.
_FOREIGN = "qweight"


def packed_type(bits: int, symmetric: bool) -> ScalarType:
    """The `ScalarType` of packed weights.

    Args:
        bits: Weight width, 2 to 8. vLLM before 0.26 does not define all of the types.
        symmetric: Whether the weights have no zero points.

    """
    bias = 1 << (bits - 1) if symmetric else None
    name = f"uint{bits}b{bias}" if bias else f"uint{bits}"
    known: ScalarType | None = getattr(scalar_types, name, None)
    return ScalarType.uint(bits, bias) if known is None else known


# `int4` and `int8` mean one value per int8, `[N, K]`; the other types are packed.
WEIGHT_TYPES = (
    scalar_types.int4,
    scalar_types.int8,
    *(packed_type(bits, sym) for bits in range(2, 9) for sym in (True, False)),
)


class AscendMPLinearKernel(MPLinearKernel):
    """Base of kernels for weights in the layout of compressed-tensors."""

    def __init__(
        self, c: MPLinearLayerConfig, w_q_param_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Create the kernel of a layer.

        Args:
            c: The layer's sizes and types.
            w_q_param_name: Name of the layer's weight parameter.
            *args: See upstream's `MPLinearKernel`.
            **kwargs: See upstream's `MPLinearKernel`.

        Raises:
            ValueError: The parameter's name is that of GPTQ or AWQ.

        """
        if w_q_param_name == _FOREIGN:
            raise ValueError(
                f"{type(self).__name__} does not support `{w_q_param_name}`; "
                "supported: weights in the layout of compressed-tensors"
            )
        super().__init__(c, w_q_param_name, *args, **kwargs)
        # Computed here, and not in every forward.
        self.group_size = operator_group_size(c)

    @classmethod
    def get_min_capability(cls) -> int:
        return -1


class AscendWNA16LinearKernel(AscendMPLinearKernel):
    """16-bit activations multiplied by weights of 2 to 8 bits, in one launch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_n = current_limits().weight_quant_batchmatmul.max_size

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := foreign_layout():
            return False, reason
        if c.weight_type not in WEIGHT_TYPES:
            supported = ", ".join(map(str, WEIGHT_TYPES))
            return False, f"weight type {c.weight_type}; supported: {supported}"
        if getattr(c, "has_g_idx", False):
            return False, "activation ordering with g_idx; supported: no g_idx"
        k, n = c.partition_weight_shape
        limits = current_limits().weight_quant_batchmatmul
        reason = limits.refusal(
            c.act_type,
            pack_quantized.operator_bits(c.weight_type.size_bits),
            k,
            # A larger N is computed in parts.
            min(n, limits.max_size),
            operator_group_size(c),
        )
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        c = self.config
        weight = getattr(layer, self.w_q_name).data
        scale = getattr(layer, self.w_s_name).data
        bits = c.weight_type.size_bits
        along_outputs = _packs_outputs(c) and not _is_table(layer)
        if c.zero_points:
            assert self.w_zp_name is not None
            zero_point = getattr(layer, self.w_zp_name).data
            offset = pack_quantized.to_npu_offset(zero_point, scale, bits)
            offset = offset.contiguous() if along_outputs else offset
            set_parameter(layer, self.w_zp_name, offset)
        scale = pack_quantized.to_npu_scale(scale)
        scale = scale.contiguous() if along_outputs else scale
        weight = weight_only_layout(c, weight, along_outputs)
        replace_weight(layer, self.w_q_name, weight)
        set_parameter(layer, self.w_s_name, scale)
        limits = current_limits().weight_quant_batchmatmul
        convert_bias(layer, limits.bias_dtype(c.act_type))
        bits = 4 if weight.dtype == torch.int32 else 8
        kind = f"w{bits}a16-{'group' if self.group_size else 'channel'}"
        layout = CONTIGUOUS if along_outputs else TRANSPOSED
        announce(self, Form(WEIGHT_ONLY, kind, layout))

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        offset = None
        if self.config.zero_points:
            assert self.w_zp_name is not None
            offset = getattr(layer, self.w_zp_name)
        return weight_quant_matmul(
            x,
            layer.weight,
            getattr(layer, self.w_s_name),
            offset,
            bias,
            self.group_size,
            self.max_n,
        )


def _packs_outputs(c: MPLinearLayerConfig) -> bool:
    """Whether to pack an int4 weight along N, the fast layout for per-group scales.

    For a transposed weight the operator dequantizes the whole weight in each call.
    Source: `aclnnWeightQuantBatchMatmulV2.md`;
    `weight_quant_batch_matmul_v2_tiling_msd_group`.
    """
    _, n = c.partition_weight_shape
    return (
        pack_quantized.operator_bits(c.weight_type.size_bits) == 4
        and operator_group_size(c) != 0
        and layouts.chosen("w4a16-group") == CONTIGUOUS
        and n % INT4_PER_INT32 == 0
        and n <= current_limits().weight_quant_batchmatmul.max_size
    )


def _is_table(layer: torch.nn.Module) -> bool:
    """Whether a layer is an embedding, whose weight is also looked up by rows."""
    is_head = isinstance(layer, ParallelLMHead)
    return isinstance(layer, VocabParallelEmbedding) and not is_head


def weight_only_layout(
    c: MPLinearLayerConfig, weight: torch.Tensor, along_outputs: bool
) -> torch.Tensor:
    """Repack a weight for the weight-only operator.

    An int4 weight with more outputs than the operator supports becomes int8, because
    the operator would misread slices of an int4 weight: op-plugin (`op_api_common.cpp`)
    passes the offset of a slice in units of int32, and aclnn
    (`aclnn_weight_quant_batch_matmul_v2.cpp`) interprets it in units of int4.

    Args:
        c: The layer's sizes and types.
        weight: The loaded weight, in the layout of the checkpoint.
        along_outputs: Whether to pack int4 along N.

    Returns:
        int32 `[K, N / 8]` if packed along N; otherwise a transposed view, int32
        `[K / 8, N]` or int8 `[K, N]`.

    """
    k, n = c.partition_weight_shape
    if along_outputs:
        return int4.pack_outputs(int4_words(c, weight), n, k, weight.device)
    bits = c.weight_type.size_bits
    in_parts = n > current_limits().weight_quant_batchmatmul.max_size
    if c.weight_type == scalar_types.int8:
        return weight.t()
    if c.weight_type == scalar_types.int4:
        if in_parts:
            return torch.cat(list(int_quantized.int4_rows(weight))).t()
        return int4.pack_inputs(int4_words(c, weight), n, k, weight.device).t()
    if in_parts:
        return pack_quantized.to_int8(weight, bits, k).t()
    return pack_quantized.to_npu_weight(weight, bits, k)


def operator_group_size(c: MPLinearLayerConfig) -> int:
    """The group size to pass to the operator; 0 if one group spans this rank's K."""
    k = c.partition_weight_shape[0]
    return 0 if c.group_size in (-1, k) else c.group_size


def int4_words(c: MPLinearLayerConfig, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield blocks of rows of an int4 weight, packed along K.

    Args:
        c: The layer's sizes and types.
        weight: The loaded weight, in the layout of the checkpoint.

    Returns:
        int32 `[R, ceil(K / 8)]` each, two's complement.

    """
    if c.weight_type == scalar_types.int4:
        return map(int4.pack, int_quantized.int4_rows(weight))
    k = c.partition_weight_shape[0]
    return pack_quantized.int4_words(weight, c.weight_type.size_bits, k)


def replace_weight(layer: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Register a repacked weight as `weight`, the name by which vllm-ascend prefetches.

    Args:
        layer: The layer. Its loaded weight is removed.
        name: Name of the loaded weight. With int-quantized files the layer has it as
            `weight` too.
        weight: The repacked weight.

    """
    for loaded in {name, "weight"} & layer._parameters.keys():
        delattr(layer, loaded)
    set_parameter(layer, "weight", weight)
