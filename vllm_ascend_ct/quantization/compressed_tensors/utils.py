# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a config says of one layer, and of its parts."""

from enum import Enum
from typing import Any

from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

# How the integers were found, and in which order, does not change what they mean.
_NOT_ESSENTIAL = {"observer", "observer_kwargs", "actorder"}


def is_packed(scheme: dict[str, Any]) -> bool:
    """Whether several weights share a word in the file."""
    packed: bool = scheme["format"] == CompressionFormat.pack_quantized.value
    return packed


def is_float(scheme: dict[str, Any]) -> bool:
    """Whether weights are floating-point numbers."""
    float_weights: bool = scheme["weights"].type != QuantizationType.INT
    return float_weights


def text(value: Any) -> Any:
    """The text of an enum's member, which pydantic has turned into it or not."""
    return value.value if isinstance(value, Enum) else value


def difference(
    part: str, scheme: dict[str, Any] | None, other: dict[str, Any] | None
) -> str:
    """What of a shard's scheme is not like the other's."""
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
    """What of a scheme has to be the same for shards of one layer."""
    return scheme and {
        key: value.model_dump(exclude=_NOT_ESSENTIAL)
        if isinstance(value, QuantizationArgs)
        else value
        for key, value in scheme.items()
    }
