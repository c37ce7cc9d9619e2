# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in MXFP8 or MXFP4 on A5."""

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import Operands, mx_product
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    DYNAMIC_MX_QUANT,
    GROUPED,
    ROWS,
    TRANSPOSED,
    Form,
)
from vllm_ascend_ct.weights import microscaled
from vllm_ascend_ct.weights.float_quantized import has_nan


class AscendMxExperts(AscendExperts):
    """Activations quantized to the MX format of the weights.

    Seven launches with SwiGLU. Weights stay as they were loaded: the operator takes
    transposed views.
    """

    quantizes_activations = True

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        limits = current_limits().mx_matmul
        if limits is None:
            return "the chip does not multiply MX formats"
        if reason := cls._common_refusal(moe, limits):
            return reason
        if moe.has_bias:
            return "activations in an MX format with biases of experts"
        for k, n in cls.products(moe).values():
            if k % group_size:
                return f"K={k} per rank, group_size={group_size}"
            if reason := limits.refusal(moe.in_dtype, k, n, moe.num_local_experts):
                return reason
        return None

    def _lay_out(self, name: str, k: int, n: int) -> None:
        weight_name, parameter = stored_weight(self.layer, name)
        weight, scale_name = parameter.data, f"{name}_weight_scale"
        if weight.dtype != torch.uint8 and any(map(has_nan, weight)):
            raise broken_checkpoint(
                "A weight contains NaN",
                f"layer {self.layer.layer_name}, tensor {weight_name}",
                Remedy.CALIBRATE_AGAIN,
            )
        scale = microscaled.paired(getattr(self.layer, scale_name).data)
        set_parameter(self.layer, weight_name, weight.transpose(1, 2))
        set_parameter(self.layer, scale_name, scale.transpose(1, 2))

    def operands(self, name: str) -> Operands:
        layer = self.layer
        return Operands(
            stored_weight(layer, name)[1], getattr(layer, f"{name}_weight_scale")
        )

    def forms(self) -> list[Form]:
        packed = self.operands("w2").weight.dtype == torch.uint8
        kind = f"mxfp{4 if packed else 8}"
        return [Form(DYNAMIC_MX_QUANT, kind, ROWS), Form(GROUPED, kind, TRANSPOSED)]

    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = mx_product(rows, counts, self.operands("w13"))
        if self.activation is None:
            return torch.ops.npu.npu_swiglu(hidden), None
        return self.activation(hidden), None

    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        return mx_product(hidden, counts, self.operands("w2"))
