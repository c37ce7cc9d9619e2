# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Dequantize a compressed-tensors checkpoint, independently of the package's code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")


def block_of(checkpoint: Path) -> Sequence[int] | None:
    """Block sizes of the first group of a config that has block scales."""
    config = json.loads((checkpoint / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    blocks = (group["weights"].get("block_structure") for group in groups)
    return next(filter(None, blocks), None)


def unpack_dense(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Unpack a stream of bits, lowest first: int32 `[R, W]` to int64 `[R, size]`."""
    stream = (packed.long().unsqueeze(-1) >> torch.arange(32)) & 1
    values = stream.flatten(1)[:, : size * bits].unflatten(1, (size, bits))
    return (values << torch.arange(bits)).sum(-1) - (1 << (bits - 1))


def is_float(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer has a floating-point weight."""
    stored = tensors.get("weight", tensors.get("weight_packed"))
    assert stored is not None
    return stored.dtype in (torch.float8_e4m3fn, torch.uint8)


def float_values(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Values of FP8 (E4M3) or packed FP4 (E2M1), float64 `[N, K]`."""
    if "weight" in tensors:
        return tensors["weight"].float().double()
    halves = tensors["weight_packed"].unsqueeze(-1).long()
    codes = torch.cat((halves % 16, halves // 16), dim=-1).flatten(1)
    exponent, mantissa = codes // 2 % 4, codes % 2
    normal = (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    size = torch.where(exponent > 0, normal, mantissa / 2)
    return torch.where(codes < 8, size, -size).double()


def float_weight(
    tensors: Mapping[str, torch.Tensor], block: Sequence[int] | None
) -> torch.Tensor:
    """Dequantize a floating-point layer's weight to float64 `[N, K]`."""
    values, scale = float_values(tensors), tensors["weight_scale"]
    exponents = scale.dtype == torch.uint8
    factor = 2.0 ** (scale.double() - 127) if exponents else scale.float().double()
    if "weight_global_scale" in tensors:
        factor = factor / tensors["weight_global_scale"].double()
    factor = factor.reshape(-1, factor.shape[-1] if factor.dim() else 1)
    counts = [-(-size // length) for size, length in zip(values.shape, block or ())]
    is_blocks = counts == list(factor.shape)
    for axis, size in enumerate(values.shape):
        # The last block may be incomplete.
        length = block[axis] if block and is_blocks else size // factor.shape[axis]
        factor = factor.repeat_interleave(length, axis).narrow(axis, 0, size)
    return values * factor


def dequantize(
    tensors: Mapping[str, torch.Tensor], block: Sequence[int] | None = None
) -> torch.Tensor:
    """Dequantize a layer's weight to float64 `[N, K]`.

    Args:
        tensors: `weight_packed` and `weight_shape`, or `weight`; `weight_scale`;
            optionally `weight_zero_point` or `weight_global_scale`.
        block: Number of rows and columns that share a scale, for block scales.

    """
    if is_float(tensors):
        return float_weight(tensors, block)
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
    """The parameters of the unquantized model in float32."""
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
        state[f"{layer}.weight"] = dequantize(tensors, block_of(checkpoint))
        # Floating-point activations stay in 16 bits.
        kinds = ("bias",) if is_float(tensors) else ("bias", *_ACTIVATIONS)
        for kind in kinds:
            if kind in tensors:
                state[f"{layer}.{kind}"] = tensors[kind]
    return {name: tensor.float() for name, tensor in state.items()}
