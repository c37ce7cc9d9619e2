# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A layer of random weights, and what it should compute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_ascend_ct.ops.precedents import Form

Product = Callable[[torch.Tensor], torch.Tensor]
BITS_PER_WORD = 32


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
