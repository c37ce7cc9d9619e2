# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts with integer weights and activations quantized to int8."""

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct import ascend_base
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import Operands, int8_gate, int8_product
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DYNAMIC_QUANT,
    FUSED_GATE,
    GROUPED,
    NZ,
    ROWS,
    TRANSPOSED,
    Form,
)
from vllm_ascend_ct.weights import experts, int_quantized
from vllm_ascend_ct.weights.pack_quantized import operator_bits


class AscendWNA8Experts(AscendExperts):
    """int8 activations (dynamic per token) multiplied by int4 or int8 weights.

    Five launches with SwiGLU, four if the weights are int4. To these `lay_out` adds
    parameters `w13_assist` and `w2_assist`.
    """

    quantizes_activations = True
    takes_int8 = True

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        if reason := cls._common_refusal(moe, current_limits().grouped_matmul):
            return reason
        if not symmetric:
            return "int8 activations with weights that have zero points"
        if moe.has_bias:
            return "int8 activations with biases of experts"
        limits = current_limits()
        is_int4 = operator_bits(bits) == 4
        weight_dtype = torch.int32 if is_int4 else torch.int8
        mode = limits.grouped_matmul.get((torch.int8, weight_dtype))
        if mode is None or moe.in_dtype not in mode.by_output:
            return f"int8 activations with {bits}-bit experts in a {moe.in_dtype} model"
        for k, n in cls.products(moe).values():
            if reason := mode.refusal(moe.num_local_experts, k, n, group_size):
                return (
                    f"int8 activations with {bits}-bit experts of K={k}, N={n}: "
                    f"{reason}"
                )
        width = moe.intermediate_size_per_partition
        return limits.dynamic_quant.refusal(moe.in_dtype, width)

    def _fuses_gate(self, weight_dtype: torch.dtype, group_size: int) -> bool:
        """Whether one operator multiplies, activates and quantizes in `gate`."""
        if self.fuses is not None:
            return self.fuses(weight_dtype)
        limits = current_limits().grouped_matmul_swiglu_quant
        k, n = self.products(self.moe)["w13"]
        return (
            limits is not None
            and self.activation is None
            and limits.refusal(weight_dtype, k, n, group_size) is None
        )

    def _lay_out(self, name: str, k: int, n: int) -> None:
        _, parameter = stored_weight(self.layer, name)
        bits = 8 if parameter.dtype == torch.int8 else parameter.shape[2] * 32 // k
        groups = getattr(self.layer, f"{name}_weight_scale").shape[2]
        is_int4 = operator_bits(bits) == 4
        if name == "w13":
            weight_dtype = torch.int32 if is_int4 else torch.int8
            group_size = k // groups if groups > 1 else 0
            self._fused = self._fuses_gate(weight_dtype, group_size)
        fused = self._fused and name == "w13"
        # So that the methods below free the loaded tensor as soon as they have copied
        # it.
        del parameter
        if is_int4:
            self._lay_out_int4(name, bits, k, fused)
        else:
            self._lay_out_int8(name, bits, k, fused)

    def _lay_out_int8(self, name: str, bits: int, k: int, fused: bool) -> None:
        layer = self.layer
        weight_name, parameter = stored_weight(layer, name)
        weight = parameter.data
        if weight.dtype != torch.int8:
            weight = experts.to_int8(weight, bits, k)
        weight = weight.transpose(1, 2)
        if fused or ascend_base.prefers_nz():
            weight = weight.contiguous()
            set_parameter(layer, weight_name, weight)
            del parameter
            weight = int_quantized.to_nz(weight)
        set_parameter(layer, weight_name, weight)
        scale_name = f"{name}_weight_scale"
        scale = getattr(layer, scale_name).data.squeeze(2)
        set_parameter(layer, scale_name, scale.to(self._scale_dtype(fused)))

    def _scale_dtype(self, fused: bool) -> torch.dtype:
        """Dtype that the operator requires for the scale of int8 weights."""
        if fused:
            return torch.float32
        mode = current_limits().grouped_matmul[torch.int8, torch.int8]
        (dtype,) = mode.by_output[self.moe.in_dtype].scale
        assert dtype is not None
        return dtype

    def _lay_out_int4(self, name: str, bits: int, k: int, fused: bool) -> None:
        layer = self.layer
        weight_name, parameter = stored_weight(layer, name)
        scale_name = f"{name}_weight_scale"
        raw_scale, rounded = experts.to_raw_scale(getattr(layer, scale_name).data)
        if fused and raw_scale.shape[1] == 1:
            raw_scale = raw_scale.squeeze(1)
        packed = parameter.data
        count, n, _ = packed.shape
        if ascend_base.prefers_nz() or bits < 4:
            pairs = packed.new_empty((count, k, n // 2), dtype=torch.int8)
        else:
            pairs = packed.view(torch.int8).view(count, k, n // 2)
        assist = experts.pack_outputs_with_assist(
            packed, rounded, bits, pairs.view(torch.int32)
        )
        if ascend_base.prefers_nz():
            set_parameter(layer, weight_name, pairs)
            del parameter, packed
            pairs = int_quantized.to_nz(pairs)
        set_parameter(layer, weight_name, pairs.view(torch.int32))
        set_parameter(layer, scale_name, raw_scale)
        set_parameter(layer, f"{name}_assist", assist)

    def forms(self) -> list[Form]:
        w13, w2 = self.operands("w13"), self.operands("w2")
        layout = CONTIGUOUS if w2.is_int4 else TRANSPOSED
        if ascend_base.prefers_nz():
            layout = NZ
        down = Form(GROUPED, _kind(w2), layout)
        if self._fused:
            gate_layout = layout if w13.is_int4 else NZ
            return [Form(FUSED_GATE, _kind(w13), gate_layout), down]
        gate = Form(GROUPED, _kind(w13), layout)
        return [gate, Form(DYNAMIC_QUANT, "dynamic", ROWS), down]

    def operands(self, name: str) -> Operands:
        layer = self.layer
        return Operands(
            stored_weight(layer, name)[1],
            getattr(layer, f"{name}_weight_scale"),
            bias=getattr(layer, f"{name}_assist", None),
        )

    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Check the dtype and not the scale: for unquantized rows vllm-ascend's MC2 may
        # pass a scale that it never wrote.
        if rows.dtype != torch.int8:
            rows, row_scale = torch.ops.npu.npu_dynamic_quant(rows)
        assert row_scale is not None
        return int8_gate(
            rows,
            row_scale,
            counts,
            self.operands("w13"),
            self.moe.in_dtype,
            self.activation,
            self._fused,
        )

    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        assert scale is not None
        dtype = self.moe.in_dtype
        return int8_product(hidden, scale, counts, self.operands("w2"), dtype)


def _kind(experts: Operands) -> str:
    if not experts.is_int4:
        return "w8a8"
    in_groups = experts.scale.dim() == 3 and experts.scale.shape[1] > 1
    return "w4a8-group" if in_groups else "w4a8-channel"
