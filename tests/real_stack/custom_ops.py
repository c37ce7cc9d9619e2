# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators that vllm-ascend brings, on CPU.

Its own as the emulated ones that they extend, with the schemas of its
`csrc/torch_binding.cpp`, release 0.23.0. And vLLM's, which get its platform's device.
"""

from functools import cache
from typing import Any

import torch

LIBRARY = torch.library.Library("_C_ascend", "FRAGMENT")
VLLM = torch.library.Library("vllm", "FRAGMENT")

SCHEMAS = {
    "npu_moe_init_routing_custom": """(Tensor x, Tensor expert_idx, *,
        Tensor? scale=None, Tensor? offset=None, int active_num=-1,
        int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0,
        int expert_tokens_num_type=0, bool expert_tokens_num_flag=False,
        int quant_mode=0, int[2] active_expert_range=[], int row_idx_type=0)
        -> (Tensor, Tensor, Tensor, Tensor)""",
    "grouped_matmul_swiglu_quant_weight_nz": """(Tensor x, Tensor weight,
        Tensor weight_scale, Tensor x_scale, Tensor group_list, *,
        Tensor? bias=None, Tensor? offset=None, float swiglu_limit=0.0)
        -> (Tensor output, Tensor output_scale, Tensor output_offset)""",
    "grouped_matmul_swiglu_quant_v2": """(Tensor x, Tensor[] weight,
        Tensor[] weight_scale, Tensor x_scale, Tensor group_list,
        Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None,
        Tensor? bias=None, int? dequant_mode=0, int? dequant_dtype=0,
        int? quant_mode=0, int? quant_dtype=0, bool transpose_weight=False,
        int group_list_type=0, int[2] tuning_config=[], float swiglu_limit=0.0)
        -> (Tensor output, Tensor output_scale)""",
}


def npu_moe_init_routing_custom(
    x: torch.Tensor, expert_idx: torch.Tensor, **options: Any
) -> Any:
    return torch.ops.npu.npu_moe_init_routing_v2(x, expert_idx, **options)


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
    return output, scale, torch.empty(0)


def grouped_matmul_swiglu_quant_v2(*arguments: Any) -> Any:
    # Not by keyword, from a schema without a "*".
    parts = SCHEMAS["grouped_matmul_swiglu_quant_v2"].split("->")[0].split(",")
    names = [part.split()[-1].partition("=")[0] for part in parts]
    options = dict(zip(names, arguments))
    assert not options.pop("swiglu_limit", 0)
    assert not options.pop("transpose_weight", False)
    # As this operator has it, 0.
    del options["quant_dtype"]
    options.pop("tuning_config", None)
    options["dequant_dtype"] = torch.float32
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(**options)


@cache
def install() -> None:
    from vllm.distributed import parallel_state
    from vllm_ascend.ops import linear, register_custom_ops

    VLLM.impl("all_reduce", parallel_state.all_reduce, "CPU")
    VLLM.impl("unquantized_gemm", linear.unquantized_gemm, "CPU")
    reduce = register_custom_ops._maybe_pad_and_reduce_impl
    VLLM.impl("maybe_pad_and_reduce", reduce, "CPU")
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + " ".join(schema.split()))
        LIBRARY.impl(name, globals()[name], "CPU")
