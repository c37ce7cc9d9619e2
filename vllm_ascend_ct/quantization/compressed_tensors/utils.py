# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Helpers to read and compare the schemes of layers and of their shards."""

from enum import Enum
from typing import Any

from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

# How the weights were calibrated, and in which order, does not affect how they are
# used.
_NOT_ESSENTIAL = {"observer", "observer_kwargs", "actorder"}


def is_packed(scheme: dict[str, Any]) -> bool:
    """Whether the format stores several weights in one int32 (`pack-quantized`)."""
    packed: bool = scheme["format"] == CompressionFormat.pack_quantized.value
    return packed


def is_float(scheme: dict[str, Any]) -> bool:
    """Whether the quantized weights are floating-point numbers."""
    float_weights: bool = scheme["weights"].type != QuantizationType.INT
    return float_weights


def text(value: Any) -> Any:
    """The value of an enum member; pydantic may have converted it already."""
    return value.value if isinstance(value, Enum) else value


def difference(
    part: str, scheme: dict[str, Any] | None, other: dict[str, Any] | None
) -> str:
    """Describe how a shard's scheme differs from another's.

    Args:
        part: Name of the shard.
        scheme: Its scheme; None if it is not quantized.
        other: Scheme of the other shard.

    """
    if scheme is None:
        return f"{part} not at all"
    if other is None:
        return f"{part} as {scheme['format']}"
    for kind, args in scheme.items():
        if args != other.get(kind):
            others = other.get(kind)
            if isinstance(args, dict) and isinstance(others, dict):
                args = {key: args[key] for key in args if args[key] != others[key]}
            return f"{part} {kind}={args}"
    return part


def comparable_args(scheme: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a scheme that must be the same for all shards of a layer."""
    return scheme and {
        key: value.model_dump(exclude=_NOT_ESSENTIAL)
        if isinstance(value, QuantizationArgs)
        else value
        for key, value in scheme.items()
    }
