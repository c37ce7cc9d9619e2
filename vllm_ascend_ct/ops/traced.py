# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""An operator that has another name in the graphs that torch traces.

torch_npu's compiler of graphs, `npugraph_ex`, looks for
`npu_weight_quant_batchmatmul` by its name, to work around a fault of its other
compiler, and sets an option that its own config has not (2.10.0.post4 to 2.13.0,
`npu_fx_compiler.py`): "'CompilerConfig' object has no attribute 'experimental_config'".
"""

import torch

_LIBRARY = torch.library.Library("ascend_ct", "FRAGMENT")
_LIBRARY.define(
    "weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
    "Tensor? antiquant_offset, Tensor? bias, int antiquant_group_size) -> Tensor"
)


def weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
) -> torch.Tensor:
    """Call `npu_weight_quant_batchmatmul`, in a graph by another name."""
    operator = _multiply
    if torch.compiler.is_compiling():
        operator = torch.ops.ascend_ct.weight_quant_batchmatmul
    y: torch.Tensor = operator(
        x, weight, antiquant_scale, antiquant_offset, bias, antiquant_group_size
    )
    return y


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
) -> torch.Tensor:
    return torch.ops.npu.npu_weight_quant_batchmatmul(
        x,
        weight,
        antiquant_scale,
        antiquant_offset=antiquant_offset,
        bias=bias,
        antiquant_group_size=antiquant_group_size,
    )


_LIBRARY.impl("weight_quant_batchmatmul", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ascend_ct::weight_quant_batchmatmul", _multiply, lib=_LIBRARY
)
