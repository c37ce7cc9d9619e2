# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Float64 formulas of quantized linear layers.

Written independently from the description of the compressed-tensors format: they use
the checkpoint's integers, scales and zero points, and quantize activations as the
config says.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from tools.checkpoints.dequantize import dequantize


@dataclass
class FormulaLinear:
    """One linear layer of a checkpoint."""

    weight: torch.Tensor  # float64 [N, K], dequantized
    input_args: QuantizationArgs | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    output_scale: torch.Tensor | None = None
    # If given, x is multiplied by the reciprocal of a static scale, in this dtype.
    reciprocal_dtype: torch.dtype | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        if self.input_args is not None:
            q, scale, zero_point = self._quantize(x)
            step = self._step(q)
            x = ((q / step).round() * step).clamp(*self._range)
            x = (x - zero_point) * scale
        y = x @ self.weight.t()
        if self.bias is not None:
            y = y + self.bias.double()
        if self.output_scale is not None:
            scale = self.output_scale.double()
            y = (y / scale).round().clamp(-128, 127) * scale
        return y

    def narrow(self, start: int, length: int) -> "FormulaLinear":
        """The layer restricted to a part of its inputs, without the bias."""
        return replace(self, weight=self.weight.narrow(1, start, length), bias=None)

    def without_ties(self, x: torch.Tensor) -> torch.Tensor:
        """Zero inputs that are so near a middle of grid values that either is right."""
        if self.input_args is None or self._is_mx:
            # Scales of MX formats are powers of two, so that no rounding is in doubt.
            return x
        q, *_ = self._quantize(x.double())
        q = q / self._step(q)
        return torch.where((q - q.floor() - 0.5).abs() < 1e-3, 0, x)

    @property
    def _is_float(self) -> bool:
        return self.input_args is not None and self.input_args.type == "float"

    @property
    def _is_mx(self) -> bool:
        return self.input_args is not None and self.input_args.strategy == "group"

    @property
    def _range(self) -> tuple[float, float]:
        assert self.input_args is not None
        if not self._is_float:
            return -128, 127
        largest = 448 if self.input_args.num_bits == 8 else 6
        return -largest, largest

    def _step(self, q: torch.Tensor) -> torch.Tensor:
        """Distance of adjacent grid values.

        E4M3 has three mantissa bits and exponents from -6, E2M1 one and from 0.
        """
        assert self.input_args is not None
        if not self._is_float:
            return torch.ones_like(q)
        bits, least = (3, 2**-6) if self.input_args.num_bits == 8 else (1, 1)
        return torch.exp2(q.abs().clamp(min=least).log2().floor() - bits)

    def _quantize(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Divide x by its scale without rounding; return also scale and zero point."""
        assert self.input_args is not None
        if self._is_mx:
            amax = x.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
            largest = torch.tensor(self._range[1]).log2().floor()
            scale = torch.exp2(amax.log2().floor() - largest)
            zero_point = torch.zeros_like(scale)
        elif self.input_args.dynamic:
            low = x.amin(-1, keepdim=True).clamp(max=0)
            high = x.amax(-1, keepdim=True).clamp(min=0)
            if self.input_args.symmetric:
                scale = torch.maximum(-low, high) / (448 if self._is_float else 127)
                zero_point = torch.zeros_like(scale)
            else:
                scale = (high - low) / 255
                zero_point = (-128 - low / scale).round()
        else:
            assert self.input_scale is not None
            scale = self.input_scale.double()
            zero_point = torch.zeros_like(scale)
            if not self.input_args.symmetric:
                assert self.input_zero_point is not None
                zero_point = self.input_zero_point.double()
            if self.reciprocal_dtype is not None:
                reciprocal = self.input_scale.float().reciprocal()
                factor = reciprocal.to(self.reciprocal_dtype).double()
                return x * factor + zero_point, scale, zero_point
        return x / scale + zero_point, scale, zero_point


def formula_linear(module: Any, scheme: Any) -> FormulaLinear:
    """Make the formula of a compressed `torch.nn.Linear`."""
    tensors = dict(module.named_parameters())
    return FormulaLinear(
        dequantize(tensors, scheme.weights.block_structure),
        scheme.input_activations,
        tensors.get("input_scale"),
        tensors.get("input_zero_point"),
        tensors.get("bias"),
        tensors.get("output_scale"),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference divided by the norm of the expected result."""
    return float((actual.double() - expected).norm() / expected.norm())
