# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A layer of random weights, and what it should compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops.dtypes import E2M1_VALUES, FP8, FP8_MAX, MX_BLOCK
from vllm_ascend_ct.ops.precedents import Form

Product = Callable[[torch.Tensor], torch.Tensor]
BITS_PER_WORD = 32
# By its code; the other codes are the same numbers with the sign.
_FP4 = torch.tensor(E2M1_VALUES, dtype=torch.float64, device="cpu")
# Largest value, by width; and the bias of scales in E8M0.
_MX_LARGEST = {8: FP8_MAX, 4: E2M1_VALUES[-1]}
_BIAS = 127


class NotServed(Exception):
    """The chip does not serve such a layer; the text says why."""


@dataclass(frozen=True)
class Sizes:
    """What layers to make.

    Attributes:
        k: Input features; the hidden size of experts.
        n: Output features; the intermediate size of experts.
        dtype: Dtype of the model.
        device: The device to compute on.

    """

    k: int
    n: int
    dtype: torch.dtype
    device: str


class Layer(NamedTuple):
    """A layer whose weights are laid out.

    Attributes:
        product: Computes `[tokens, K]` on the device.
        formula: Computes the same on the host in float64.
        forms: The operator calls of `product` that multiply and quantize.

    """

    product: Product
    formula: Product
    forms: tuple[Form, ...]


def with_parameters(device: str, **tensors: torch.Tensor | None) -> Any:
    """A module with these parameters on a device."""
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        set_parameter(layer, name, None if tensor is None else tensor.to(device))
    return layer


def random_integers(bits: int, *shape: int) -> torch.Tensor:
    """Random signed integers of a width, int64."""
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers like the compressed-tensors format.

    Args:
        values: Signed, `[..., K]`.
        bits: Their width, a divisor of 32.

    Returns:
        int32 `[..., K * bits / 32]`.

    """
    shifts = torch.arange(0, BITS_PER_WORD, bits)
    words = (values + (1 << bits - 1)).unflatten(-1, (-1, len(shifts)))
    return (words << shifts).sum(-1).to(torch.int32)


def on_int8_grid(x: torch.Tensor) -> torch.Tensor:
    """Round activations `[M, K]` to their dynamic symmetric int8 grid, in float64."""
    values = x.double()
    step = values.abs().amax(1, keepdim=True) / 127
    return (values / step).round() * step


def random_fp8(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights in FP8 (E4M3) `[..., K]`, and fp32 scales `[..., 1]`."""
    weight = (torch.randn(shape) * 50).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return weight, torch.rand(*shape[:-1], 1) / 1000 + 0.001


def on_fp8_grid(x: torch.Tensor) -> torch.Tensor:
    """Round activations `[M, K]` to their dynamic FP8 grid, in float64."""
    step = x.double().abs().amax(1, keepdim=True) / FP8_MAX
    return (x.double() / step).float().to(FP8).double() * step


def random_mx(
    bits: int, *shape: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random weights in MXFP8 (E4M3) or MXFP4 (E2M1).

    Args:
        bits: 8 or 4.
        shape: `[..., K]`.

    Returns:
        The weights as a checkpoint has them, FP8 `[..., K]` or two values to a uint8
        `[..., K / 2]`; their scales uint8 `[..., K / 32]`; and their values `[..., K]`
        in float64.

    """
    exponents = torch.randint(-8, -4, (*shape[:-1], shape[-1] // MX_BLOCK))
    scale = torch.exp2(exponents.double()).repeat_interleave(MX_BLOCK, -1)
    scales = (exponents + _BIAS).to(torch.uint8)
    if bits == 8:
        weight, _ = random_fp8(*shape)
        return weight, scales, weight.double() * scale
    codes = torch.randint(0, 16, shape)
    signs = 1 - 2 * (codes >> 3)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8), scales, _FP4[codes & 7] * signs * scale


def on_mx_grid(bits: int, x: torch.Tensor) -> torch.Tensor:
    """Round activations `[M, K]` to their dynamic MX grid, in float64."""
    largest = _MX_LARGEST[bits]
    blocks = x.double().unflatten(1, (-1, MX_BLOCK))
    amax = blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(amax.log2().floor() - math.floor(math.log2(largest)))
    values = blocks / scale
    # E4M3 has three mantissa bits and exponents from -6, E2M1 one and from 0.
    mantissa, least = (3, 2**-6) if bits == 8 else (1, 1)
    step = torch.exp2(values.abs().clamp(min=least).log2().floor() - mantissa)
    rounded = ((values / step).round() * step).clamp(-largest, largest)
    return (rounded * scale).flatten(1)
