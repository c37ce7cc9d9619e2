# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own operators for experts, based on those that the package emulates."""

from typing import Any

import torch

from tools.soft_npu.ops.registry import implements
from vllm_ascend_ct.ops.emulated.registry import refuse


@implements("_C_ascend::npu_moe_init_routing_custom")
def npu_moe_init_routing_custom(
    x: torch.Tensor, expert_idx: torch.Tensor, **options: Any
) -> Any:
    """As `npu_moe_init_routing_v2`, but also for rows that are already quantized.

    Source: vllm-ascend `csrc/moe/moe_init_routing_custom`.
    """
    scale = options.pop("scale", None)
    if scale is None:
        return torch.ops.npu.npu_moe_init_routing_v2(x, expert_idx, **options)
    if x.dtype != torch.int8 or options["quant_mode"] != -1:
        refuse("npu_moe_init_routing_custom", "a scale of rows that are not int8")
    if options.get("row_idx_type", 0) != 0:
        refuse("npu_moe_init_routing_custom", "row_idx_type with a scale")
    rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x.to(torch.bfloat16), expert_idx, **options
    )
    scales = rows.new_full((len(rows),), torch.nan, dtype=torch.float32)
    here = index >= 0
    scales[index[here].long()] = scale.repeat_interleave(expert_idx.shape[1])[here]
    rows = rows.nan_to_num(-128).to(torch.int8)
    return rows, index, counts, scales


@implements("_C_ascend::grouped_matmul_swiglu_quant_weight_nz")
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
    """As `npu_grouped_matmul_swiglu_quant_v2` of one tensor, with an unwritten output.

    Source: vllm-ascend `csrc/gmm/grouped_matmul_swiglu_quant`.
    """
    if bias is not None or offset is not None or swiglu_limit:
        refuse("grouped_matmul_swiglu_quant_weight_nz", "bias, offset or a limit")
    output, scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [weight_scale], x_scale, group_list, dequant_dtype=torch.float32
    )
    return output, scale, torch.full((), torch.nan)


@implements("_C_ascend::grouped_matmul_swiglu_quant_v2")
def grouped_matmul_swiglu_quant_v2(*arguments: Any) -> Any:
    """As `npu_grouped_matmul_swiglu_quant_v2`.

    Source: vllm-ascend `csrc/gmm/grouped_matmul_swiglu_quant_v2`.
    """
    # Not by keyword, from a schema without a "*".
    schema = torch._C._get_schema("_C_ascend::grouped_matmul_swiglu_quant_v2", "")
    names = [argument.name for argument in schema.arguments]
    options = dict(zip(names, arguments))
    if options.pop("swiglu_limit", 0) or options.pop("transpose_weight", False):
        refuse("grouped_matmul_swiglu_quant_v2", "a limit or transposed weights")
    # As this operator has it, 0.
    del options["quant_dtype"]
    options.pop("tuning_config", None)
    options["dequant_dtype"] = torch.float32
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(**options)


@implements("npu::npu_moe_token_permute")
def npu_moe_token_permute(
    tokens: torch.Tensor,
    indices: torch.Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort tokens `[T, H]` by their experts `[T]` or `[T, top-k]`.

    Source: op-plugin `MoeTokenPermuteKernelNpuOpApi.cpp`; ops-transformer
    `moe/moe_token_permute`.

    Returns:
        Rows `[T * top-k, H]`, and the row of each (token, choice), int32.

    """
    order = indices.flatten().argsort(stable=True)
    if padded_mode or num_out_tokens not in (None, 0, len(order)):
        refuse("npu_moe_token_permute", f"num_out_tokens={num_out_tokens}, padded_mode")
    top_k = indices.numel() // max(len(tokens), 1)
    return tokens[order // max(top_k, 1)], order.argsort().to(torch.int32)


@implements("aten::histc")
def histc(
    self: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0
) -> torch.Tensor:
    """Count values in bins of equal width, also of integers, unlike torch's CPU kernel.

    Source: op-plugin `HistcKernelNpuOpApi.cpp`; ops-math `histogram`.
    """
    if min >= max:
        refuse("histc", f"{min=}, {max=}: of the values themselves")
    inside = self[(self >= min) & (self <= max)].double()
    places = ((inside - min) * bins / (max - min)).long().clamp(max=bins - 1)
    return places.bincount(minlength=bins).to(self.dtype)
