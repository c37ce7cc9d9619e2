# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the kernels of MXFP8 and MXFP4 linear layers share."""

from typing import Any

import torch

from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import dynamic_mx_matmul
from vllm_ascend_ct.kernels.parameters import convert_bias, set_parameter
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.ops.precedents import (
    DYNAMIC_MX_QUANT,
    QUANT_MATMUL,
    ROWS,
    Form,
)
from vllm_ascend_ct.ops.soc import current_soc


class AscendMxMixin:
    """Mixin before upstream's kernel interface of an MX format.

    The interfaces say nothing about sizes or dtypes. The quantization config asks for a
    kernel only if `resolving.is_resolved` has compared them with the operators' limits.
    """

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        if current_limits().mx_matmul is None:
            return False, f"Ascend {current_soc().value} does not multiply MX formats"
        return True, None

    def replace_weight(
        self,
        layer: Any,
        weight: torch.Tensor,
        scale: torch.Tensor,
        kind: str,
        layout: str,
    ) -> None:
        """Store a weight that was laid out for the operator, and announce the calls.

        Args:
            layer: The layer.
            weight: Its weight.
            scale: The scales of the weight.
            kind: Kind of the calls; see `Form`.
            layout: Layout of the weight; see `Form`.

        """
        set_parameter(layer, "weight", weight)
        set_parameter(layer, "weight_scale", scale)
        convert_bias(layer, torch.float32)
        announce(
            self,
            Form(DYNAMIC_MX_QUANT, kind, ROWS),
            Form(QUANT_MATMUL, kind, layout),
        )

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return dynamic_mx_matmul(x, layer.weight, layer.weight_scale, bias)
