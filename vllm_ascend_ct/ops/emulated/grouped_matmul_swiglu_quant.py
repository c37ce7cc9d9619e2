# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The first product of gated experts, fused with SwiGLU and quantization."""

from typing import Any

import torch

from vllm_ascend_ct.ops.emulated.grouped_matmul import (
    float_products,
    int8_products,
    is_float,
)
from vllm_ascend_ct.ops.emulated.grouped_matmul_swiglu_quant_float import (
    float_swiglu_quant_fake,
    swiglu_quant,
)
from vllm_ascend_ct.ops.emulated.quantize import int8_values
from vllm_ascend_ct.ops.emulated.registry import (
    describe,
    emulates,
    is_nz,
    only,
    poison,
    refuse,
)
from vllm_ascend_ct.ops.emulated.weight_quant_batchmatmul import weight_size
from vllm_ascend_ct.ops.limits import current_limits

_NAME = "npu_grouped_matmul_swiglu_quant_v2"
_INT8_MAX = 127
_DEFAULTS = {"dequant_dtype": 6, "quant_mode": 0, "quant_dtype": 1}


def _swiglu_quant_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    weight_assist_matrix: list[torch.Tensor] | None = None,
    dequant_mode: int = 0,
    group_list_type: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_float(x):
        if weight_assist_matrix is not None:
            refuse(_NAME, "weight_assist_matrix of floating-point weights")
        options |= {"dequant_mode": dequant_mode, "group_list_type": group_list_type}
        operands = x, weight, weight_scale, x_scale, group_list
        return float_swiglu_quant_fake(*operands, **options)
    for argument, value in options.items():
        if value is not None and value != _DEFAULTS.get(argument):
            refuse(_NAME, f"{argument}={value} is not emulated")
    limits = current_limits().grouped_matmul_swiglu_quant
    if limits is None:
        refuse(_NAME, "the chip does not have this operator")
    experts = only(_NAME, "weight", weight)
    scale = only(_NAME, "weight_scale", weight_scale)
    assist = only(_NAME, "weight_assist_matrix", weight_assist_matrix)
    assert experts is not None and scale is not None
    if (x.dim(), experts.dim()) != (2, 3) or not (
        x.is_contiguous() and experts.is_contiguous()
    ):
        refuse(
            _NAME,
            f"x is {describe(x)}, weight is {describe(experts)}; supported: contiguous "
            "[M, K] and [E, K, N]",
        )
    (m, k), (k_of_weight, n) = x.shape, weight_size(experts[0])
    if (x.dtype, k) != (torch.int8, k_of_weight):
        refuse(_NAME, f"x is {describe(x)}; supported: int8, K={k_of_weight}")
    packed = experts.dtype == torch.int32
    groups = scale.shape[1] if dequant_mode == 1 and scale.dim() == 3 else 1
    if reason := limits.refusal(experts.dtype, k, n, k // groups if groups > 1 else 0):
        refuse(_NAME, reason)
    in_groups = (len(experts), groups, n)
    per_channel = (len(experts), n)
    for argument, tensor, dtypes, shape in (
        ("x_scale", x_scale, (torch.float32,), (m,)),
        ("group_list", group_list, (torch.int64,), (len(experts),)),
        (
            "weight_scale",
            scale,
            limits.scale_dtypes[experts.dtype],
            in_groups if dequant_mode == 1 else per_channel,
        ),
        (
            "weight_assist_matrix",
            assist,
            (torch.float32,) if packed else (None,),
            per_channel,
        ),
    ):
        got = None if tensor is None else tensor.dtype
        if got not in dtypes or (tensor is not None and tuple(tensor.shape) != shape):
            text = "missing" if tensor is None else describe(tensor)
            refuse(_NAME, f"{argument} is {text}; supported: {dtypes} {shape}")
    if group_list_type not in (0, 1) or (dequant_mode == 1) > packed:
        refuse(
            _NAME,
            f"group_list_type={group_list_type}, dequant_mode={dequant_mode} of "
            f"{experts.dtype}; supported: 0 or 1, and 1 for int4 in groups only",
        )
    return (
        x.new_empty((m, n // 2)),
        x.new_empty((m,), dtype=torch.float32),
    )


@emulates(
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, "
    "Tensor[] weight_scale, Tensor x_scale, Tensor group_list, *, "
    "Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, "
    "Tensor? bias=None, int? dequant_mode=0, int? dequant_dtype=6, int? quant_mode=0, "
    "int? quant_dtype=1, int? group_list_type=0, int[]? tuning_config=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, "
    "int? x_scale_dtype=None) -> (Tensor, Tensor)",
    fake=_swiglu_quant_fake,
)
def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    weight_assist_matrix: list[torch.Tensor] | None = None,
    group_list_type: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply each expert's rows, apply SwiGLU, and quantize the result per row.

    `c = product * x_scale`, `s = silu(c[:, :N / 2]) * c[:, N / 2:]`, per row
    `scale = amax|s| / 127` and `q = rint(s * (1 / scale))`, all in fp32. FP8 and MX
    formats on A5: see `grouped_matmul_swiglu_quant_float.py`. Rows that belong to no
    expert are not written.

    Source: op-plugin `torch_npu-npu_grouped_matmul_swiglu_quant_v2.md`; ops-transformer
    `gmm/grouped_matmul_swiglu_quant_v2`.

    Args:
        x: int8 `[M, K]`, rows sorted by expert; or FP8, or an MX format.
        weight: One tensor, int8 `[E, K, N]` in FRACTAL_NZ, or int4 as int32
            `[E, K, N / 8]`.
        weight_scale: One tensor `[E, N]`. For int4, int64 that holds fp32 bits, `[E,
            N]`, or `[E, K / 256, N]` with dequant_mode 1.
        x_scale: fp32 `[M]`.
        group_list: int64 `[E]`.
        weight_assist_matrix: For int4 weights, one tensor, fp32 `[E, N]`.
        group_list_type: 0 for cumulative counts, 1 for counts.
        options: dequant_mode; for others only the defaults are emulated.

    Returns:
        int8 `[M, N / 2]` and fp32 scales `[M]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    results = _swiglu_quant_fake(
        x,
        weight,
        weight_scale,
        x_scale,
        group_list,
        weight_assist_matrix,
        group_list_type=group_list_type,
        **options,
    )
    if is_float(x):
        q, scales = (poison(result) for result in results)
        operands = x, weight[0], weight_scale[0], x_scale, group_list
        for part, product in float_products(*operands, group_list_type):
            q[part], scales[part] = swiglu_quant(product, x.dtype, x_scale.dim() == 3)
        return q, scales
    if weight[0].dtype == torch.int8 and not is_nz(weight[0]):
        refuse(_NAME, "an int8 weight is in ND; supported: FRACTAL_NZ")
    q, scales = (poison(result) for result in results)
    assist = only(_NAME, "weight_assist_matrix", weight_assist_matrix)
    values = int8_products(
        x, weight[0], weight_scale[0], assist, group_list, group_list_type
    )
    rows = len(values)
    gate, up = values.mul_(x_scale[:rows].unsqueeze(1)).chunk(2, dim=1)
    gated = torch.nn.functional.silu(gate).mul_(up)
    row_scale = gated.abs().amax(dim=1, keepdim=True) / _INT8_MAX
    scales[:rows] = row_scale.squeeze(1)
    factor = torch.where(row_scale > 0, 1 / row_scale, 0)
    q[:rows] = int8_values(gated.mul_(factor))
    return q, scales
