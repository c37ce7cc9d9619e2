# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The table of compressed-tensors schemes that are supported.

It does not cover sizes and what a chip supports: see `ops/limits.py` for the limits of
the operators.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors.utils import is_float, text

_PACK = CompressionFormat.pack_quantized.value
_INT = CompressionFormat.int_quantized.value
_NAIVE = CompressionFormat.naive_quantized.value
_FLOAT = CompressionFormat.float_quantized.value
_SCALE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)


class Activations(Enum):
    """How a layer's inputs and outputs are quantized."""

    NONE = "16-bit activations"
    TOKEN = "int8 inputs, dynamic per token"
    TENSOR = "int8 inputs, static per tensor"
    TENSOR_IN_OUT = "int8 inputs and outputs, static per tensor, symmetric"
    FLOAT = "floating-point or unquantized inputs, unquantized outputs"
    FLOAT8_TOKEN = "FP8 inputs, dynamic per token"
    MX = "inputs in the MX format of the weights, dynamic"


@dataclass(frozen=True)
class SchemeRule:
    """One row of the table: supported combinations of a scheme's fields.

    Attributes:
        name: Name of the scheme in the documentation.
        activations: How activations are quantized.
        formats: Supported formats of the checkpoint.
        bits: Supported weight widths.
        strategies: Supported strategies of the weights' scales.
        asymmetric_weights: Whether weights may have zero points.
        asymmetric_inputs: Whether inputs may have zero points.
        group_size: The only supported group size; None for any.
        scale_dtypes: Supported values of the weights' `scale_dtype`.

    """

    name: str
    activations: Activations
    formats: tuple[str, ...]
    bits: tuple[int, ...]
    strategies: tuple[str, ...]
    asymmetric_weights: bool = False
    asymmetric_inputs: bool = False
    group_size: int | None = None
    scale_dtypes: tuple[torch.dtype | None, ...] = _SCALE_DTYPES

    def mismatches(self, scheme: dict[str, Any]) -> list[str]:
        """List the fields of a scheme that this row does not support.

        Args:
            scheme: See `refusal`.

        Returns:
            For each field `field=value; supported: ...`.

        """
        weights, inputs = scheme["weights"], scheme.get("input_activations")
        fields = [
            ("format", scheme.get("format"), self.formats),
            ("weights.num_bits", weights.num_bits, self.bits),
            ("weights.strategy", text(weights.strategy), self.strategies),
            (
                "weights.symmetric",
                weights.symmetric,
                (True, not self.asymmetric_weights),
            ),
            ("weights.dynamic", weights.dynamic, (False,)),
            ("weights.scale_dtype", weights.scale_dtype, self.scale_dtypes),
        ]
        if self.group_size is not None:
            fields.append(
                ("weights.group_size", weights.group_size, (self.group_size,))
            )
        if inputs is not None:
            symmetric = (True, not self.asymmetric_inputs)
            fields.append(("input_activations.symmetric", inputs.symmetric, symmetric))
        return [
            f"{field}={value}; supported for {self.activations.value}: "
            + ", ".join(dict.fromkeys(map(str, supported)))
            for field, value, supported in fields
            if value not in supported
        ]


SCHEME_RULES = (
    SchemeRule(
        "W2A16 to W8A16",
        Activations.NONE,
        (_PACK,),
        (2, 3, 4, 5, 6, 7, 8),
        ("channel", "group"),
        asymmetric_weights=True,
    ),
    SchemeRule(
        "W8A8, activations dynamic",
        Activations.TOKEN,
        (_INT, _NAIVE),
        (8,),
        ("channel", "tensor"),
        asymmetric_inputs=True,
    ),
    SchemeRule(
        "W8A8, activations static",
        Activations.TENSOR,
        (_INT, _NAIVE),
        (8,),
        ("channel", "tensor"),
        asymmetric_inputs=True,
    ),
    SchemeRule(
        "W4A8",
        Activations.TOKEN,
        (_INT, _NAIVE),
        (4,),
        ("channel", "group"),
        asymmetric_inputs=True,
    ),
    SchemeRule(
        "W2A8 to W8A8, packed",
        Activations.TOKEN,
        (_PACK,),
        (2, 3, 4, 5, 6, 7, 8),
        ("channel", "group"),
        asymmetric_weights=True,
    ),
    SchemeRule(
        "W2A8O8, W4A8O8, W8A8O8",
        Activations.TENSOR_IN_OUT,
        (_PACK, _INT),
        (2, 4, 8),
        ("channel", "group"),
    ),
)

# For routed experts. int8 weights need per-channel scales: see the operators' limits.
EXPERT_RULES = (
    *(
        replace(rule, name=f"{rule.name} experts")
        for rule in SCHEME_RULES
        if rule.activations in (Activations.NONE, Activations.TOKEN)
        and rule.strategies == ("channel", "group")
    ),
    SchemeRule(
        "W8A8 experts",
        Activations.TOKEN,
        (_INT, _NAIVE),
        (8,),
        ("channel",),
        asymmetric_inputs=True,
    ),
)

# Floating-point weights of linear layers and of experts. Except for `MULTIPLIED_RULES`,
# they are resolved to 16 bits, and activations stay in 16 bits.
FLOAT_RULES = (
    SchemeRule(
        "FP8", Activations.FLOAT, (_FLOAT, _NAIVE), (8,), ("tensor", "channel", "block")
    ),
    SchemeRule(
        "MXFP8",
        Activations.FLOAT,
        (CompressionFormat.mxfp8_quantized.value,),
        (8,),
        ("group",),
        group_size=32,
        scale_dtypes=(torch.uint8,),
    ),
    SchemeRule(
        "MXFP4",
        Activations.FLOAT,
        (CompressionFormat.mxfp4_pack_quantized.value,),
        (4,),
        ("group",),
        group_size=32,
        scale_dtypes=(None, torch.uint8),
    ),
    SchemeRule(
        "NVFP4",
        Activations.FLOAT,
        (CompressionFormat.nvfp4_pack_quantized.value,),
        (4,),
        ("tensor_group",),
        group_size=16,
        scale_dtypes=(None, torch.float8_e4m3fn),
    ),
)


# Linear layers that chips with `Limits.fp8_matmul` and `Limits.mx_matmul` multiply as
# they are.
MULTIPLIED_RULES = (
    SchemeRule(
        "FP8, activations dynamic",
        Activations.FLOAT8_TOKEN,
        (_FLOAT, _NAIVE),
        (8,),
        ("tensor", "channel"),
    ),
    *(
        replace(
            rule, name=f"{rule.name}, activations dynamic", activations=Activations.MX
        )
        for rule in FLOAT_RULES
        if rule.strategies == ("group",)
    ),
)


def refusal(
    scheme: dict[str, Any], rules: tuple[SchemeRule, ...] = SCHEME_RULES
) -> str | None:
    """Why a scheme is not supported, or None.

    Args:
        scheme: `weights`, `input_activations`, `output_activations` and `format` of a
            config group, from upstream's `get_scheme_dict`.
        rules: The rules for integer weights.

    """
    inputs, outputs = scheme.get("input_activations"), scheme.get("output_activations")
    if is_float(scheme):
        rules, activations = FLOAT_RULES, _float_activations(inputs, outputs)
    else:
        activations = _activations(inputs, outputs)
    if activations is None:
        kinds = "; ".join(dict.fromkeys(rule.activations.value for rule in rules))
        return (
            f"input_activations={_describe(inputs)}, "
            f"output_activations={_describe(outputs)}; supported: {kinds}"
        )
    reasons = [
        rule.mismatches(scheme) for rule in rules if rule.activations == activations
    ]
    if not reasons:
        served = "; ".join(dict.fromkeys(rule.activations.value for rule in rules))
        return f"{activations.value}; supported: {served}"
    # The rule with the fewest mismatches gives the most useful reason.
    return min(reasons, key=len)[0] if all(reasons) else None


def _activations(
    inputs: QuantizationArgs | None, outputs: QuantizationArgs | None
) -> Activations | None:
    """How activations of integer weights are quantized; None if not supported."""
    if inputs is None and outputs is None:
        return Activations.NONE
    if outputs is not None:
        static = _is_static_tensor(inputs) and _is_static_tensor(outputs)
        symmetric = inputs is not None and inputs.symmetric and outputs.symmetric
        return Activations.TENSOR_IN_OUT if static and symmetric else None
    if _is_static_tensor(inputs):
        return Activations.TENSOR
    return Activations.TOKEN if _is_int8(inputs, "token", True) else None


def _is_int8(args: QuantizationArgs | None, strategy: str, dynamic: bool) -> bool:
    return _is_8_bits(args, QuantizationType.INT, strategy, dynamic)


def _is_8_bits(
    args: QuantizationArgs | None, kind: QuantizationType, strategy: str, dynamic: bool
) -> bool:
    return args is not None and (
        args.type == kind
        and args.num_bits == 8
        and text(args.strategy) == strategy
        and args.dynamic is dynamic
    )


def _is_static_tensor(args: QuantizationArgs | None) -> bool:
    return _is_int8(args, "tensor", False)


def _float_activations(
    inputs: QuantizationArgs | None, outputs: QuantizationArgs | None
) -> Activations | None:
    is_known = inputs is None or inputs.type == QuantizationType.FLOAT
    return Activations.FLOAT if is_known and outputs is None else None


def is_multiplied(scheme: dict[str, Any]) -> bool:
    """Whether the current chip multiplies floating-point weights as they are.

    True only says that linear layers with this scheme are multiplied, if their sizes
    fit: embeddings and heads are always resolved; see `resolving.py` for experts.

    Args:
        scheme: A floating-point scheme; see `refusal`.

    """
    if scheme.get("output_activations") is not None:
        return False
    activations = _multiplied_activations(scheme)
    return any(
        rule.activations == activations and not rule.mismatches(scheme)
        for rule in MULTIPLIED_RULES
    )


def _multiplied_activations(scheme: dict[str, Any]) -> Activations | None:
    """How inputs are quantized, if the chip multiplies them; otherwise None."""
    inputs, weights, limits = (
        scheme.get("input_activations"),
        scheme["weights"],
        current_limits(),
    )
    if limits.fp8_matmul is not None and _is_8_bits(
        inputs, QuantizationType.FLOAT, "token", True
    ):
        return Activations.FLOAT8_TOKEN
    fields = ("type", "num_bits", "strategy", "group_size")
    if limits.mx_matmul is None or inputs is None or inputs.dynamic is not True:
        return None
    alike = all(getattr(inputs, name) == getattr(weights, name) for name in fields)
    return Activations.MX if alike else None


def float_name(scheme: dict[str, Any]) -> str | None:
    """Name of a floating-point scheme; None if it is not supported."""
    names = (rule.name for rule in FLOAT_RULES if not rule.mismatches(scheme))
    return next(names, None)


def _describe(args: QuantizationArgs | None) -> str:
    if args is None:
        return "none"
    return (
        f"{text(args.type)}{args.num_bits} strategy={text(args.strategy)} "
        f"dynamic={args.dynamic} symmetric={args.symmetric}"
    )
