# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Match recorded operator calls with the rows of `ops/precedents.py`."""

from typing import Any

import torch

from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DIVIDED,
    DYNAMIC_MX_QUANT,
    DYNAMIC_QUANT,
    DYNAMIC_QUANT_ASYMMETRIC,
    FUSED_GATE,
    GROUPED,
    GROUPED_DEQUANT,
    NZ,
    QUANT_MATMUL,
    QUANT_MATMUL_DEQUANT,
    QUANTIZE,
    RECIPROCAL,
    ROWS,
    TRANSPOSED,
    TRANSPOSED_NZ,
    WEIGHT_ONLY,
    Form,
)

_KINDS = {
    DYNAMIC_QUANT: "dynamic",
    DYNAMIC_QUANT_ASYMMETRIC: "dynamic",
    "npu_moe_init_routing_v2": "routing",
    "npu_moe_token_unpermute": "routing",
    "npu_moe_finalize_routing": "routing",
    "npu_swiglu": "activation",
    "npu_trans_quant_param": "loading",
}


def form_of(operator: str, args: list[Any], kwargs: dict[str, Any]) -> Form:
    """Determine the form of a call.

    Args:
        operator: Name of the operator.
        args: Its arguments, as `record_npu_calls` records them.
        kwargs: Its keyword arguments.

    """
    schema = getattr(torch.ops.npu, operator).default._schema
    # The dispatcher omits arguments that have their default values.
    named = {argument.name: argument.default_value for argument in schema.arguments}
    named |= dict(zip(named, args)) | kwargs
    if operator == DYNAMIC_QUANT and named["dst_type"] in _FP8:
        return Form(operator, "dynamic-fp8", ROWS)
    if operator == DYNAMIC_MX_QUANT:
        kind = "mxfp8" if named["dst_type"] in _FP8 else "mxfp4"
        return Form(operator, kind, ROWS)
    if operator in _KINDS:
        return Form(operator, _KINDS[operator], ROWS)
    if operator == "npu_format_cast":
        return Form(operator, "loading", _layout(args[0]))
    if operator == QUANTIZE:
        layout = DIVIDED if named["div_mode"] else RECIPROCAL
        return Form(operator, "static", layout)
    if operator not in _PRODUCTS:
        return Form(operator, "unknown", "unknown")
    kind, weight = _PRODUCTS[operator](named)
    return Form(operator, kind, _layout(weight))


def _weight_only(named: dict[str, Any]) -> tuple[str, Any]:
    weight = named["weight"]
    bits = 4 if _tensor(weight).dtype == torch.int32 else 8
    groups = "group" if named.get("antiquant_group_size") else "channel"
    return f"w{bits}a16-{groups}", weight


def _quant_matmul(named: dict[str, Any]) -> tuple[str, Any]:
    weight = named["x2"]
    if _tensor(weight).dtype == torch.int32:
        return f"w4a8-{'group' if named['group_sizes'][2] else 'channel'}", weight
    if kind := _float_kind(weight, named["scale_dtype"]):
        return kind, weight
    if named.get("pertoken_scale") is not None:
        return "w8a8", weight
    is_int32 = named["output_dtype"] in (torch.int32, _INT32)
    return f"w8a8-{'asymmetric' if is_int32 else 'static'}", weight


def _quant_matmul_dequant(named: dict[str, Any]) -> tuple[str, Any]:
    return "w8a8", named["quantized_weight"]


def _grouped(named: dict[str, Any]) -> tuple[str, Any]:
    (weight,) = named["weight"]
    if kind := _float_kind(weight, named["scale_dtype"]):
        return kind, weight
    bits = 4 if _tensor(weight).dtype == torch.int32 else 8
    if _tensor(named["x"][0]).dtype != torch.int8:
        groups = "group" if named["antiquant_scale"][0].dim() == 3 else "channel"
        return f"w{bits}a16-{groups}", weight
    return _int8_experts(weight, named["scale"][0])


def _fused_gate(named: dict[str, Any]) -> tuple[str, Any]:
    (weight,), (scale,) = named["weight"], named["weight_scale"]
    kind = _float_kind(weight, named["weight_scale_dtype"])
    return (kind, weight) if kind else _int8_experts(weight, scale)


def _float_kind(weight: Any, scale_dtype: Any) -> str | None:
    """The kind of an MX or FP8 weight; None for others."""
    if scale_dtype is not None:
        return f"mxfp{4 if _tensor(weight).dtype == torch.uint8 else 8}"
    return "fp8" if _tensor(weight).dtype == torch.float8_e4m3fn else None


def _int8_experts(weight: Any, scale: torch.Tensor) -> tuple[str, Any]:
    if _tensor(weight).dtype == torch.int8:
        return "w8a8", weight
    in_groups = scale.dim() == 3 and scale.shape[1] > 1
    return f"w4a8-{'group' if in_groups else 'channel'}", weight


_INT32 = 3
_FP8 = (torch.float8_e4m3fn, 24)
_PRODUCTS = {
    WEIGHT_ONLY: _weight_only,
    QUANT_MATMUL: _quant_matmul,
    QUANT_MATMUL_DEQUANT: _quant_matmul_dequant,
    GROUPED: _grouped,
    GROUPED_DEQUANT: _quant_matmul_dequant,
    FUSED_GATE: _fused_gate,
}


def _tensor(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value["nz"] if isinstance(value, dict) else value
    return tensor


def _layout(weight: Any) -> str:
    tensor, in_nz = _tensor(weight), isinstance(weight, dict)
    if tensor.is_contiguous():
        return NZ if in_nz else CONTIGUOUS
    return TRANSPOSED_NZ if in_nz else TRANSPOSED
