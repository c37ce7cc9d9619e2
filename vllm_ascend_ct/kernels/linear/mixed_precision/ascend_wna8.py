# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Linear kernel for packed weights and int8 activations."""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)

from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import (
    dynamic_quant_int4_matmul,
    quant_matmul_dequant,
)
from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    WEIGHT_TYPES,
    AscendMPLinearKernel,
    int4_words,
    operator_group_size,
    replace_weight,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    biased_quant_matmul,
    dynamic_forms,
    fuses_quant,
    replace_int8_weight,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DYNAMIC_QUANT,
    QUANT_MATMUL,
    ROWS,
    Form,
)
from vllm_ascend_ct.weights import int4, pack_quantized


class AscendWNA8LinearKernel(AscendMPLinearKernel):
    """int8 activations (dynamic per token) multiplied by int4 or int8 weights.

    Upstream cannot select this kernel, because its kernel config does not say how
    activations are quantized: `with_quantized_activations` does.

    If the weights are int4, processing adds the parameter `activation_assist` to the
    layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operands = current_limits().quant_matmul.operands
        self.fuses_quant = False
        if pack_quantized.operator_bits(self.config.weight_type.size_bits) == 4:
            self.group_size = _int4_group_size(self.config)

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := foreign_layout():
            return False, reason
        if c.weight_type not in WEIGHT_TYPES or c.zero_points:
            return False, f"weight type {c.weight_type}; supported: symmetric integers"
        k, n = c.partition_weight_shape
        limits = current_limits()
        reason = limits.dynamic_quant.refusal(c.act_type, k)
        if pack_quantized.operator_bits(c.weight_type.size_bits) == 4:
            if limits.a8w4 is None:
                return False, "the chip does not multiply int8 by int4"
            group_size = _int4_group_size(c)
            reason = reason or limits.a8w4.refusal(c.act_type, k, n, group_size)
        elif group_size := operator_group_size(c):
            reason = f"group_size={group_size} of 8-bit weights; supported: per channel"
        else:
            reason = reason or limits.quant_matmul.refusal(c.act_type, [k])
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        scale = getattr(layer, self.w_s_name).data
        if pack_quantized.operator_bits(self.config.weight_type.size_bits) == 4:
            self._process_int4(layer, scale)
        else:
            self._process_int8(layer, scale)
        announce(self, *self._forms())

    def _forms(self) -> list[Form]:
        if pack_quantized.operator_bits(self.config.weight_type.size_bits) == 8:
            _, n = self.config.partition_weight_shape
            return dynamic_forms(n, self.fuses_quant)
        groups = "group" if self.group_size else "channel"
        product = Form(QUANT_MATMUL, f"w4a8-{groups}", CONTIGUOUS)
        return [Form(DYNAMIC_QUANT, "dynamic", ROWS), product]

    def _process_int8(self, layer: torch.nn.Module, scale: torch.Tensor) -> None:
        k, _ = self.config.partition_weight_shape
        bits = self.config.weight_type.size_bits
        weight = pack_quantized.to_int8(getattr(layer, self.w_q_name).data, bits, k)
        self.fuses_quant = fuses_quant(self.config.act_type, weight)
        replace_weight(layer, self.w_q_name, weight)
        del weight
        if not self.fuses_quant:
            replace_int8_weight(layer, "weight")
        set_parameter(layer, self.w_s_name, scale.reshape(-1).float())

    def _process_int4(self, layer: torch.nn.Module, scale: torch.Tensor) -> None:
        k, n = self.config.partition_weight_shape
        weight = getattr(layer, self.w_q_name).data
        words = int4_words(self.config, weight)
        npu_weight, assist = int4.pack_outputs_with_assist(words, scale, k)
        # The operator reads scales `[G, N]`; `npu_trans_quant_param` takes one row.
        scale = scale.t().contiguous().float()
        packed = torch.ops.npu.npu_trans_quant_param(scale.reshape(-1), None, 1)
        if self.group_size:
            # Repeats a per-channel scale for each group if that layout is requested.
            packed = packed.view(-1, n).expand(k // self.group_size, n).contiguous()
        replace_weight(layer, self.w_q_name, npu_weight)
        set_parameter(layer, self.w_s_name, packed)
        set_parameter(layer, "activation_assist", assist)

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, scale = layer.weight, getattr(layer, self.w_s_name)
        if weight.dtype == torch.int32:
            assist = layer.activation_assist
            return dynamic_quant_int4_matmul(
                x, weight, scale, assist, bias, self.group_size
            )
        if self.fuses_quant:
            return quant_matmul_dequant(x, weight, scale, bias)
        return biased_quant_matmul(x, weight, scale, bias, self.operands)


def _int4_group_size(c: MPLinearLayerConfig) -> int:
    """The group size to pass to the operator; 0 for per-channel scales.

    With the layout `w4a8-channel=repeated`, per-channel scales are passed as groups.
    """
    group_size, limits = operator_group_size(c), current_limits().a8w4
    if group_size or limits is None:
        return group_size
    repeats = layouts.chosen("w4a8-channel") == layouts.REPEATED
    (repeated,) = limits.group_sizes
    fits = c.partition_weight_shape[0] % repeated == 0
    return repeated if repeats and fits else 0


def with_quantized_activations(
    kernel: MPLinearKernel, symmetric: bool
) -> tuple[MPLinearKernel, str | None]:
    """Replace a weight-only kernel by one that also quantizes activations.

    Args:
        kernel: The kernel that upstream selected without regard to activations.
        symmetric: Whether activations are quantized symmetrically.

    Returns:
        The new kernel and None; or the given kernel and the reason why
        `AscendWNA8LinearKernel` cannot replace it.

    """
    reason: str | None = "asymmetric activations; supported: symmetric"
    if symmetric:
        _, reason = AscendWNA8LinearKernel.can_implement(kernel.config)
    if reason is not None:
        return kernel, reason
    names = kernel.w_q_name, kernel.w_s_name, kernel.w_zp_name
    return AscendWNA8LinearKernel(kernel.config, *names), None
