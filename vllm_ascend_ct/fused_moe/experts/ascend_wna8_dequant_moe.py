# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int8 experts on 310P, by an operator that quantizes activations and multiplies."""

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import Operands, quant_dequant_product
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import GROUPED_DEQUANT, NZ, Form
from vllm_ascend_ct.weights import experts, int_quantized


class AscendWNA8DequantExperts(AscendExperts):
    """int8 activations (dynamic per token) multiplied by int8 weights.

    Five launches with SwiGLU, plus those that compute cumulative counts.
    """

    quantizes_activations = True

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        product = current_limits().quant_grouped_matmul_dequant
        if reason := cls._common_refusal(moe, product):
            return reason
        assert product is not None
        if bits <= 4 or group_size or not symmetric:
            return "the chip supports only symmetric int8 experts, per channel"
        if moe.has_bias:
            return "int8 activations with biases of experts"
        if moe.num_local_experts != moe.num_experts:
            return (
                "experts on other ranks: the chip's operator sorts tokens only if all "
                "experts are on one rank"
            )
        for k, n in cls.products(moe).values():
            if reason := product.refusal(moe.in_dtype, k, n):
                return (
                    f"int8 activations with {bits}-bit experts of K={k}, N={n}: "
                    f"{reason}"
                )
        return None

    def _lay_out(self, name: str, k: int, n: int) -> None:
        layer = self.layer
        weight_name, parameter = stored_weight(layer, name)
        weight = parameter.data
        if weight.dtype != torch.int8:
            bits = weight.shape[2] * 32 // k
            # `to_int8` may return a view of int32, which torch_npu cannot cast.
            weight = experts.to_int8(weight, bits, k).clone()
            set_parameter(layer, weight_name, weight)
        del parameter
        set_parameter(layer, weight_name, int_quantized.to_nz(weight))
        scale_name = f"{name}_weight_scale"
        scale = getattr(layer, scale_name).data.squeeze(2)
        set_parameter(layer, scale_name, scale.float())

    def forms(self) -> list[Form]:
        return [Form(GROUPED_DEQUANT, "w8a8", NZ)]

    def operands(self, name: str) -> Operands:
        layer = self.layer
        return Operands(
            stored_weight(layer, name)[1], getattr(layer, f"{name}_weight_scale")
        )

    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = quant_dequant_product(rows, counts, self.operands("w13"))
        if self.activation is None:
            return torch.ops.npu.npu_swiglu(hidden), None
        return self.activation(hidden), None

    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        return quant_dequant_product(hidden, counts, self.operands("w2"))
