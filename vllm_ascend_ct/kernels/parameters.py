# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Tensors that layers hold after their weights are laid out."""

import torch


def set_parameter(
    layer: torch.nn.Module, name: str, tensor: torch.Tensor | None
) -> None:
    """Hold a tensor as a parameter, as sleep mode and reload expect.

    What the layer held under that name it lets go of. Upstream's `replace_parameter`
    may copy to it instead (since vLLM 0.33), in the old memory format.
    """
    parameter = None
    if tensor is not None:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
    layer.register_parameter(name, parameter)
