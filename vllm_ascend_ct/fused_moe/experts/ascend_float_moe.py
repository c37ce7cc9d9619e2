# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts in FP8, MXFP8 or MXFP4 on A5."""

from abc import abstractmethod

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.fused_moe.experts.ascend_moe import AscendExperts, stored_weight
from vllm_ascend_ct.fused_moe.functional import (
    Operands,
    float_gate,
    float_product,
    float_quant,
    in_blocks,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.dtypes import FP8
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DYNAMIC_MX_QUANT,
    DYNAMIC_QUANT,
    FUSED_GATE,
    GROUPED,
    ROWS,
    TRANSPOSED,
    Form,
)
from vllm_ascend_ct.weights import microscaled
from vllm_ascend_ct.weights.float_quantized import has_nan


class AscendFloatExperts(AscendExperts):
    """Activations quantized to the format of the weights, and multiplied.

    Six launches with SwiGLU, seven if the operator that multiplies, activates and
    quantizes does not take the sizes.
    """

    quantizes_activations = True

    @classmethod
    def refusal(
        cls, moe: FusedMoEConfig, bits: int, group_size: int, symmetric: bool
    ) -> str | None:
        if reason := cls._common_refusal(moe, current_limits().grouped_matmul):
            return reason
        if moe.has_bias:
            return "floating-point activations with biases of experts"
        for k, n in cls.products(moe).values():
            if reason := cls._size_refusal(moe, k, n, group_size):
                return reason
        return None

    @classmethod
    @abstractmethod
    def _size_refusal(
        cls, moe: FusedMoEConfig, k: int, n: int, group_size: int
    ) -> str | None:
        """Why experts `[n, k]` cannot be multiplied, or None."""

    def _check(self, name: str) -> tuple[str, torch.Tensor, torch.Tensor]:
        """Refuse weights with NaN; return their parameter's name, and their scales."""
        weight_name, parameter = stored_weight(self.layer, name)
        weight = parameter.data
        if weight.dtype != torch.uint8 and any(map(has_nan, weight)):
            raise broken_checkpoint(
                "A weight contains NaN",
                f"layer {self.layer.layer_name}, tensor {weight_name}",
                Remedy.CALIBRATE_AGAIN,
            )
        return weight_name, weight, getattr(self.layer, f"{name}_weight_scale").data

    def operands(self, name: str) -> Operands:
        layer = self.layer
        return Operands(
            stored_weight(layer, name)[1], getattr(layer, f"{name}_weight_scale")
        )

    def lay_out(self) -> None:
        super().lay_out()
        limits = current_limits().float_swiglu_quant
        _, n = self.products(self.moe)["w13"]
        self._fused = (
            limits is not None
            and self.activation is None
            and limits.refusal(n, in_blocks(self.operands("w13"))) is None
        )

    def gate(
        self, rows: torch.Tensor, row_scale: torch.Tensor | None, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w13 = self.operands("w13")
        q, scale = float_quant(rows, w13)
        if self._fused:
            return float_gate(q, scale, counts, w13)
        hidden = float_product(q, scale, counts, w13, self.moe.in_dtype)
        if self.activation is None:
            return torch.ops.npu.npu_swiglu(hidden), None
        return self.activation(hidden), None

    def down(
        self, hidden: torch.Tensor, scale: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        w2 = self.operands("w2")
        if scale is None:
            hidden, scale = float_quant(hidden, w2)
        return float_product(hidden, scale, counts, w2, self.moe.in_dtype)

    def _forms(self, quantization: Form, kind: str, layout: str) -> list[Form]:
        fused = [Form(FUSED_GATE, kind, layout)] if self._fused else []
        return [quantization, *fused, Form(GROUPED, kind, layout)]


class AscendFp8Experts(AscendFloatExperts):
    """FP8 (E4M3) weights with a scale per channel, and activations per token."""

    @classmethod
    def _size_refusal(
        cls, moe: FusedMoEConfig, k: int, n: int, group_size: int
    ) -> str | None:
        limits = current_limits()
        mode = limits.grouped_matmul.get((FP8, FP8))
        if mode is None or moe.in_dtype not in mode.by_output:
            return f"FP8 experts in a {moe.in_dtype} model"
        reason = limits.dynamic_quant.refusal(moe.in_dtype, k)
        return reason or mode.refusal(moe.num_local_experts, k, n, group_size)

    def _lay_out(self, name: str, k: int, n: int) -> None:
        weight_name, weight, scale = self._check(name)
        set_parameter(self.layer, weight_name, weight.transpose(1, 2).contiguous())
        set_parameter(self.layer, f"{name}_weight_scale", scale.squeeze(2))

    def forms(self) -> list[Form]:
        quantization = Form(DYNAMIC_QUANT, "dynamic-fp8", ROWS)
        return self._forms(quantization, "fp8", CONTIGUOUS)


class AscendMxExperts(AscendFloatExperts):
    """MXFP8 or MXFP4 weights and activations.

    Weights stay as they were loaded: the operators take transposed views.
    """

    @classmethod
    def _size_refusal(
        cls, moe: FusedMoEConfig, k: int, n: int, group_size: int
    ) -> str | None:
        limits = current_limits().mx_matmul
        if limits is None:
            return "the chip does not multiply MX formats"
        if k % group_size:
            return f"K={k} per rank, group_size={group_size}"
        return limits.refusal(moe.in_dtype, k, n, moe.num_local_experts)

    def _lay_out(self, name: str, k: int, n: int) -> None:
        weight_name, weight, scale = self._check(name)
        scale = microscaled.paired(scale)
        set_parameter(self.layer, weight_name, weight.transpose(1, 2))
        set_parameter(self.layer, f"{name}_weight_scale", scale.transpose(1, 2))

    def forms(self) -> list[Form]:
        packed = self.operands("w2").weight.dtype == torch.uint8
        kind = f"mxfp{4 if packed else 8}"
        return self._forms(Form(DYNAMIC_MX_QUANT, kind, ROWS), kind, TRANSPOSED)
