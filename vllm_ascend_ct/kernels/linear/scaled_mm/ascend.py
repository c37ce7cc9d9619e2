# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int8 linear kernel; see upstream's `kernels/linear/scaled_mm`."""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)

from vllm_ascend_ct import ascend_base, envs
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.kernels.announce import announce
from vllm_ascend_ct.kernels.linear.functional import (
    dynamic_asymmetric_quant_matmul,
    dynamic_quant_matmul,
    quant_matmul_dequant,
    static_quant_matmul,
)
from vllm_ascend_ct.kernels.linear.layout import foreign_layout
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.limits import OperandTable, current_limits
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DIVIDED,
    DYNAMIC_QUANT,
    DYNAMIC_QUANT_ASYMMETRIC,
    NZ,
    QUANT_MATMUL,
    QUANT_MATMUL_DEQUANT,
    QUANTIZE,
    RECIPROCAL,
    ROWS,
    TRANSPOSED,
    TRANSPOSED_NZ,
    Form,
)
from vllm_ascend_ct.weights.int_quantized import (
    int32_bias,
    to_npu_weight,
    weight_sum,
)
from vllm_ascend_ct.weights.scales import per_channel


class AscendInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """W8A8 with dynamic per-token or static per-tensor activations.

    Processing adds these parameters to the layer:

    - `azp_adj`: correction for the activations' zero point, fp32 `[N]` weight sums if
      dynamic, int32 `[N]` bias if static.
    - `dequant_scale`, static only: `[N]`, the activations' scale times the weight's.
    - `quant_bias`, static only: int32 `[N]`, `azp_adj` plus the quantized layer bias.
    - `input_divisor`, static only: `[K]`, the activations' scale, for vllm-ascend's
      fused norm and quantization.
    """

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := foreign_layout():
            return False, reason
        if (
            not c.is_static_input_scheme
            and not c.input_symmetric
            and current_limits().dynamic_quant_asymmetric is None
        ):
            return False, (
                "dynamic asymmetric activations on a chip without "
                "npu_dynamic_quant_asymmetric; supported: symmetric, or static"
            )
        return True, None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Computed here, and not in every forward.
        self.operands = current_limits().quant_matmul.operands
        self.divides = layouts.chosen("w8a8-static") == DIVIDED
        self.fuses_quant = self.fuses_norms = False

    def process_weights_after_loading(self, layer: Any) -> None:
        weight_name, scale_name, *_, azp_adj_name = self.layer_param_names
        weight, scale, *_ = self._get_layer_params(layer)
        scale = scale.data.reshape(-1)
        if not self.config.is_channelwise:
            scale = per_channel(scale, layer.logical_widths)
        if self.config.is_static_input_scheme:
            self._process_static(layer, weight.data, scale)
        elif not self.config.input_symmetric:
            set_parameter(layer, azp_adj_name, weight_sum(weight.data).float())
        set_parameter(layer, scale_name, scale)
        if not self.config.is_static_input_scheme and self.config.input_symmetric:
            self.fuses_quant = fuses_quant(_dtype(layer), weight.data)
        del weight
        if not self.fuses_quant:
            replace_int8_weight(layer, weight_name)
        announce(self, *self._forms(len(scale)))

    def _forms(self, n: int) -> list[Form]:
        if not self.config.is_static_input_scheme and self.config.input_symmetric:
            return dynamic_forms(n, self.fuses_quant)
        quantization = Form(DYNAMIC_QUANT_ASYMMETRIC, "dynamic", ROWS)
        kind = "w8a8-asymmetric"
        if self.config.is_static_input_scheme:
            name = DIVIDED if self.divides else RECIPROCAL
            quantization, kind = Form(QUANTIZE, "static", name), "w8a8-static"
        return [quantization, Form(QUANT_MATMUL, kind, int8_layout(n))]

    def _process_static(
        self, layer: Any, weight: torch.Tensor, scale: torch.Tensor
    ) -> None:
        *_, x_scale_name, x_zero_point_name, azp_adj_name = self.layer_param_names
        x_scale = getattr(layer, x_scale_name).data.reshape(1)
        set_parameter(layer, x_scale_name, x_scale)
        zero_point_share = None
        if not self.config.input_symmetric:
            zero_point = getattr(layer, x_zero_point_name).data.reshape(1).int()
            set_parameter(layer, x_zero_point_name, zero_point)
            zero_point_share = weight_sum(weight) * -zero_point
        if not self.divides:
            self._multiply_by_reciprocal(layer, weight.shape[1])
        dequant_scale = x_scale * scale
        bias = getattr(layer, "bias", None)
        set_parameter(layer, azp_adj_name, zero_point_share)
        set_parameter(
            layer, "quant_bias", int32_bias(zero_point_share, bias, dequant_scale)
        )
        if _dtype(layer) == torch.float16:
            # For a float16 output the operator uses 10 mantissa bits of the scale.
            # Round here, because the operator itself would truncate.
            dequant_scale = torch.ops.npu.npu_trans_quant_param(dequant_scale, None, 1)
        set_parameter(layer, "dequant_scale", dequant_scale)

    def _multiply_by_reciprocal(self, layer: Any, k: int) -> None:
        """Replace the activations' scale by its reciprocal, as vllm-ascend does.

        Args:
            layer: The layer.
            k: Input features on this rank.

        Raises:
            PlatformError: The reciprocal overflows the model's dtype.

        """
        *_, x_scale_name, x_zero_point_name, _ = self.layer_param_names
        dtype = _dtype(layer)
        x_scale = getattr(layer, x_scale_name).data
        reciprocal = x_scale.reciprocal().to(dtype)
        if not reciprocal.is_meta and not bool(reciprocal.isfinite().all()):
            raise PlatformError(
                f"The reciprocal of the activations' scale overflows {dtype}",
                where=f"layer {getattr(layer, 'prefix', '')}, "
                f"{x_scale_name}={x_scale.item():.3g}",
                supported=f"scales of at least {1 / torch.finfo(dtype).max:.1e}, or "
                f"{envs.LAYOUT}=w8a8-static={DIVIDED}",
                remedy=f"Set {envs.LAYOUT}=w8a8-static={DIVIDED}",
            )
        set_parameter(layer, x_scale_name, reciprocal.repeat(k))
        zero_point = None
        if not self.config.input_symmetric:
            zero_point = getattr(layer, x_zero_point_name).data.to(dtype).repeat(k)
        self.fuses_norms = ascend_base.fuses_norms(dtype)
        if self.fuses_norms:
            set_parameter(layer, "input_divisor", x_scale.to(dtype).repeat(k))
            if zero_point is None:
                zero_point = torch.zeros_like(layer.input_divisor.data)
        set_parameter(layer, x_zero_point_name, zero_point)

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Each parameter of a module takes as long to look up as the rest of a call.
        weight_name, scale_name, x_scale_name, x_zero_point_name, azp_adj_name = (
            self.layer_param_names
        )
        weight = getattr(layer, weight_name)
        if self.config.is_static_input_scheme:
            return static_quant_matmul(
                x,
                weight,
                layer.dequant_scale,
                getattr(layer, x_scale_name),
                getattr(layer, x_zero_point_name),
                getattr(layer, azp_adj_name) if bias is None else layer.quant_bias,
                self.divides,
                layer.input_divisor if self.fuses_norms else None,
            )
        scale = getattr(layer, scale_name)
        if not self.config.input_symmetric:
            azp_adj = getattr(layer, azp_adj_name)
            return dynamic_asymmetric_quant_matmul(x, weight, scale, azp_adj, bias)
        if self.fuses_quant:
            return quant_matmul_dequant(x, weight, scale, bias)
        return biased_quant_matmul(x, weight, scale, bias, self.operands)


def _dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(layer, "params_dtype", torch.get_default_dtype())
    return dtype


def fuses_quant(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    """Whether to quantize activations and multiply in one operator (310P only).

    Args:
        dtype: dtype of the activations.
        weight: int8 `[N, K]`.

    """
    if layouts.chosen("w8a8-dynamic") != layouts.DEQUANT:
        return False
    limits = current_limits().quant_matmul_dequant
    n, k = weight.shape
    return limits is not None and limits.refusal(dtype, k, n) is None


def dynamic_forms(n: int, fused: bool) -> list[Form]:
    """Operator calls of a W8A8 layer with dynamic activations.

    Args:
        n: Output features on this rank.
        fused: Whether one operator quantizes and multiplies.

    """
    if fused:
        return [Form(QUANT_MATMUL_DEQUANT, "w8a8", CONTIGUOUS)]
    product = Form(QUANT_MATMUL, "w8a8", int8_layout(n))
    return [Form(DYNAMIC_QUANT, "dynamic", ROWS), product]


def biased_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    operands: OperandTable,
) -> torch.Tensor:
    """Call `dynamic_quant_matmul`, and add the bias after it if the chip requires it.

    Args:
        x: `[..., K]` fp16 or bf16.
        weight: int8 `[K, N]`, contiguous or a transposed view.
        scale: fp32 `[N]`.
        bias: `[N]`.
        operands: Dtypes that the chip's operator accepts.

    """
    if bias is None or bias.dtype in operands[x.dtype, True].bias:
        return dynamic_quant_matmul(x, weight, scale, bias)
    return dynamic_quant_matmul(x, weight, scale) + bias


def int8_layout(n: int) -> str:
    """Layout in which the current chip reads int8 weights with `n` outputs."""
    limits = current_limits().quant_matmul
    if limits.transposed_nz:
        return TRANSPOSED_NZ
    # In FRACTAL_NZ, N is the inner axis, whose size is limited.
    return NZ if ascend_base.prefers_nz() and n <= limits.max_size else TRANSPOSED


def replace_int8_weight(layer: Any, name: str) -> None:
    """Repack a layer's int8 weight `[N, K]` to `[K, N]` in the current chip's layout.

    At most two copies exist at a time.
    """
    weight = getattr(layer, name).data
    layout = int8_layout(len(weight))
    if layout == NZ:
        # Free the rows before the cast.
        set_parameter(layer, name, weight.t().contiguous())
        weight = getattr(layer, name).data.t()
    npu_weight = to_npu_weight(
        weight, nz=layout == NZ, transposed_nz=layout == TRANSPOSED_NZ
    )
    set_parameter(layer, name, npu_weight)
