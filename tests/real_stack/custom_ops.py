# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that vllm-ascend brings, on CPU.

Its own as the emulated ones that they extend. And vLLM's, which get its platform's
device.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

LIBRARY = torch.library.Library("_C_ascend", "FRAGMENT")
VLLM = torch.library.Library("vllm", "FRAGMENT")


def npu_moe_init_routing_custom(
    x: torch.Tensor, expert_idx: torch.Tensor, **options: Any
) -> Any:
    scale = options.pop("scale", None)
    if scale is None:
        return torch.ops.npu.npu_moe_init_routing_v2(x, expert_idx, **options)
    # Rows that were quantized before, and their scales.
    assert x.dtype == torch.int8 and options["quant_mode"] == -1
    assert options.get("row_idx_type", 0) == 0
    rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x.to(torch.bfloat16), expert_idx, **options
    )
    scales = rows.new_full((len(rows),), torch.nan, dtype=torch.float32)
    here = index >= 0
    scales[index[here]] = scale.repeat_interleave(expert_idx.shape[1])[here]
    rows = rows.nan_to_num(-128).to(torch.int8)
    return rows, index, counts, scales


def grouped_matmul_swiglu_quant_weight_nz(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> Any:
    assert bias is offset is None and swiglu_limit == 0
    output, scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [weight_scale], x_scale, group_list, dequant_dtype=torch.float32
    )
    # Not written.
    return output, scale, torch.full((), torch.nan)


def grouped_matmul_swiglu_quant_v2(*arguments: Any) -> Any:
    # Not by keyword, from a schema without a "*".
    schema = torch._C._get_schema("_C_ascend::grouped_matmul_swiglu_quant_v2", "")
    names = [argument.name for argument in schema.arguments]
    options = dict(zip(names, arguments))
    assert not options.pop("swiglu_limit", 0)
    assert not options.pop("transpose_weight", False)
    # As this operator has it, 0.
    del options["quant_dtype"]
    options.pop("tuning_config", None)
    options["dequant_dtype"] = torch.float32
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(**options)


OWN = (
    npu_moe_init_routing_custom,
    grouped_matmul_swiglu_quant_weight_nz,
    grouped_matmul_swiglu_quant_v2,
)


def find_schema(name: str, libraries: bytes) -> str:
    """The schema of an operator that libraries define, which is a string in them."""
    pattern = rb"(?<![\w:.])" + name.encode() + rb"\([^\0]*?\)\s*->\s*[^\0]+"
    (schema,) = {" ".join(s.decode().split()) for s in re.findall(pattern, libraries)}
    return schema


@cache
def install_own() -> None:
    """Implement vllm-ascend's operators, and define those that it has not.

    Its library that does it needs the torch that it was built for.
    """
    package = find_spec("vllm_ascend")
    assert package is not None and package.origin is not None
    paths = Path(package.origin).parent.glob("vllm_ascend_C*.so")
    libraries = b"".join(path.read_bytes() for path in paths)
    for function in OWN:
        name = function.__name__
        if not hasattr(torch.ops._C_ascend, name):
            LIBRARY.define(find_schema(name, libraries))
        LIBRARY.impl(name, function, "CPU")


@cache
def install() -> None:
    """Implement what vllm-ascend's layers call."""
    from vllm.distributed import parallel_state
    from vllm_ascend.ops import linear, register_custom_ops

    install_own()
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        VLLM.impl(name, getattr(parallel_state, name), "CPU")
    VLLM.impl("unquantized_gemm", linear.unquantized_gemm, "CPU")
    for name in ("maybe_pad_and_reduce", "maybe_all_gather_and_maybe_unpad"):
        VLLM.impl(name, getattr(register_custom_ops, f"_{name}_impl"), "CPU")
