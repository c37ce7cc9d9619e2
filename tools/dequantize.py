# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Read a compressed-tensors checkpoint back, with nothing but the format to go by."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")


def unpack_dense(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Read a stream of bits, lowest first: int32 `[R, W]` to int64 `[R, size]`."""
    stream = (packed.long().unsqueeze(-1) >> torch.arange(32)) & 1
    values = stream.flatten(1)[:, : size * bits].unflatten(1, (size, bits))
    return (values << torch.arange(bits)).sum(-1) - (1 << (bits - 1))


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Make a layer's weight, float64 `[N, K]`, of its tensors.

    Args:
        tensors: `weight_packed` and `weight_shape`, or int8 `weight`; `weight_scale`;
            perhaps `weight_zero_point`.

    """
    scale = tensors["weight_scale"].double()
    bits = 8
    if "weight_packed" in tensors:
        n, k = tensors["weight_shape"].tolist()
        bits = tensors["weight_packed"].shape[1] * 32 // k
        integers = unpack_dense(tensors["weight_packed"], bits, k)
    else:
        integers = tensors["weight"]
        n, k = integers.shape
    zero_point = torch.zeros_like(scale)
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"].t()
        zero_point = unpack_dense(packed, bits, n).t().double()
    grouped = integers.double().unflatten(1, (scale.shape[-1], -1))
    grouped = (grouped - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)
    return grouped.flatten(1)


def dequantized_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's parameters in float32, as of a model that is not quantized."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        state.update(load_file(file))
    layers: dict[str, dict[str, torch.Tensor]] = {
        name.removesuffix(".weight_scale"): {}
        for name in state
        if name.endswith(".weight_scale")
    }
    for layer, tensors in layers.items():
        for name in [name for name in state if name.rpartition(".")[0] == layer]:
            tensors[name.rpartition(".")[2]] = state.pop(name)
        state[f"{layer}.weight"] = dequantize(tensors)
        for kind in ("bias", *_ACTIVATIONS):
            if kind in tensors:
                state[f"{layer}.{kind}"] = tensors[kind]
    return {name: tensor.float() for name, tensor in state.items()}
