# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts with integer weights and 16-bit activations."""

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import (
    Operands,
    weight_only_gate,
    weight_only_product,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.dtypes import INT4_PER_INT32
from vllm_ascend_ct.ops.limits import GroupedMatmulMode, current_limits
from vllm_ascend_ct.ops.precedents import CONTIGUOUS, GROUPED, TRANSPOSED, Form
from vllm_ascend_ct.weights import experts
from vllm_ascend_ct.weights.pack_quantized import operator_bits


class AscendWNA16Experts(AscendExperts):
    """16-bit activations multiplied by weights of 2 to 8 bits, in five launches."""

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        if reason := cls._common_refusal(moe, current_limits().grouped_matmul):
            return reason
        is_int4 = operator_bits(bits) == 4
        mode = _mode(moe.in_dtype, torch.int32 if is_int4 else torch.int8)
        if mode is None:
            return f"{bits}-bit experts in a {moe.in_dtype} model"
        for k, n in cls.products(moe).values():
            if is_int4 and k % INT4_PER_INT32:
                return f"K={k}; supported for int4: multiples of {INT4_PER_INT32}"
            if reason := mode.refusal(moe.num_local_experts, k, n, group_size):
                return f"{bits}-bit experts of K={k}, N={n}: {reason}"
        return None

    def _lay_out(self, name: str, k: int, n: int) -> None:
        layer, dtype = self.layer, self.moe.in_dtype
        weight_name, parameter = stored_weight(layer, name)
        weight = parameter.data
        scale = getattr(layer, f"{name}_weight_scale").data.to(dtype)
        zero_point = getattr(layer, f"{name}_weight_zero_point", None)
        if weight.dtype == torch.int8:
            npu_weight = weight.transpose(1, 2)
        else:
            bits = weight.shape[2] * 32 // k
            if operator_bits(bits) == 4 and n % INT4_PER_INT32 == 0:
                # Older releases of aclnn reject transposed int4 weights
                # (`aclnn_grouped_matmul.cpp`, `UnpackInt32ToInt4`).
                npu_weight = experts.pack_outputs_(weight, bits, k)
            else:
                npu_weight = experts.to_weight_only(weight, bits, k)
            if zero_point is not None:
                offset = experts.to_npu_offset(zero_point.data, bits, n, dtype)
                set_parameter(layer, f"{name}_weight_zero_point", offset)
        set_parameter(layer, weight_name, npu_weight)
        npu_scale = experts.to_npu_scale(scale)
        set_parameter(layer, f"{name}_weight_scale", npu_scale)
        if zero_point is None:
            # The operator requires offsets.
            zeros = shared_zeros(npu_scale)
            layer.register_buffer(f"{name}_zero_offset", zeros, persistent=False)
        bias = getattr(layer, f"{name}_bias", None)
        if bias is not None:
            bias_dtype = current_limits().weight_quant_batchmatmul.bias_dtype(dtype)
            set_parameter(layer, f"{name}_bias", bias.data.to(bias_dtype))

    def forms(self) -> list[Form]:
        forms = []
        for name in self.products(self.moe):
            experts = self.operands(name)
            groups = "group" if experts.scale.dim() == 3 else "channel"
            kind = f"w{4 if experts.is_int4 else 8}a16-{groups}"
            layout = CONTIGUOUS if experts.weight.is_contiguous() else TRANSPOSED
            forms.append(Form(GROUPED, kind, layout))
        return forms

    def operands(self, name: str) -> Operands:
        layer = self.layer
        offset = getattr(layer, f"{name}_weight_zero_point", None)
        if offset is None:
            offset = getattr(layer, f"{name}_zero_offset", None)
        return Operands(
            stored_weight(layer, name)[1],
            getattr(layer, f"{name}_weight_scale"),
            offset,
            getattr(layer, f"{name}_bias", None),
        )

    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w13 = self.operands("w13")
        return weight_only_gate(rows, counts, w13, self.activation), None

    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        return weight_only_product(hidden, counts, self.operands("w2"))


def _mode(dtype: torch.dtype, weight_dtype: torch.dtype) -> GroupedMatmulMode | None:
    return current_limits().grouped_matmul.get((dtype, weight_dtype))


_zeros: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def shared_zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros with the shape and dtype of `like`, in memory that all layers share."""
    key = like.dtype, like.device
    known = _zeros.get(key)
    if known is None or known.numel() < like.numel():
        known = _zeros[key] = torch.empty_like(like).flatten()
    # Each time: a sleep of level 2 discards what no buffer of the model covers.
    with torch.inference_mode():
        known.zero_()
    return known[: like.numel()].view(like.shape)
