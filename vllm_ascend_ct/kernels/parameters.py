# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Storing repacked tensors on layers."""

import torch


def set_parameter(
    layer: torch.nn.Module, name: str, tensor: torch.Tensor | None
) -> None:
    """Register a tensor as a parameter, as sleep mode and weight reload expect.

    Frees the layer's previous parameter of that name. Upstream's `replace_parameter`
    may instead copy into it (since vLLM 0.33), and so keep its memory format.

    Args:
        layer: The layer.
        name: Name of the parameter.
        tensor: Its new value; None to register no tensor under the name.

    """
    parameter = None
    if tensor is not None:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
    layer.register_parameter(name, parameter)


def convert_bias(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the bias to an operator's dtype, unless the layer's caller adds it."""
    bias = getattr(layer, "bias", None)
    if bias is not None and not getattr(layer, "skip_bias_add", False):
        bias.data = bias.data.to(dtype)
