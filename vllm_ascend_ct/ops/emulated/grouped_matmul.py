# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The grouped matmul of experts: each expert multiplies its own rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_ascend_ct.ops.dtypes import FP8
from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.grouped_matmul_mx import mx_grouped_fake
from vllm_ascend_ct.ops.emulated.int_matmul import int_matmul, scaled_int_matmul
from vllm_ascend_ct.ops.emulated.quant_matmul_a8w4 import a8w4_product
from vllm_ascend_ct.ops.emulated.quant_matmul_fp8 import fp8_matmul
from vllm_ascend_ct.ops.emulated.quant_matmul_mx import mx_matmul
from vllm_ascend_ct.ops.emulated.registry import (
    as_dtype,
    describe,
    emulates,
    is_transposed,
    only,
    poison,
    refuse,
)
from vllm_ascend_ct.ops.emulated.weight_quant_batchmatmul import (
    dequantized,
    multiply_dequantized,
    weight_size,
)
from vllm_ascend_ct.ops.emulated.weights import unpack_raw_scale
from vllm_ascend_ct.ops.limits import GroupedMatmulMode, current_limits

_NAME = "npu_grouped_matmul"
_COUNTS = 1

_Tensors = list[torch.Tensor] | None


def _mode(
    x: torch.Tensor, weight: torch.Tensor, group_size: int
) -> tuple[GroupedMatmulMode, int, int]:
    """Find the mode of a call, and check its sizes and layouts.

    Args:
        x: `[M, K]`.
        weight: `[E, K, N]`, or packed along K or N.
        group_size: Elements of K that share a scale; 0 for per-channel scales.

    Returns:
        The mode, E and N.

    """
    if (x.dim(), weight.dim()) != (2, 3) or not x.is_contiguous():
        refuse(
            _NAME,
            f"x is {describe(x)}, weight is {describe(weight)}; emulated: contiguous "
            "[M, K] and [E, K, N]",
        )
    limits = current_limits()
    modes = limits.grouped_matmul | limits.unquantized_grouped_matmul
    mode = modes.get((x.dtype, weight.dtype))
    if mode is None:
        refuse(_NAME, f"x {x.dtype}, weight {weight.dtype}; emulated: {list(modes)}")
    transposed = mode.transposable and is_transposed(weight[0])
    if not (weight.is_contiguous() or transposed):
        refuse(_NAME, f"weight is {describe(weight)}; supported: contiguous, or views")
    k, n = weight_size(weight[0])
    if x.shape[1] != k:
        refuse(_NAME, f"K of x is {x.shape[1]}, of the weight {k}")
    if reason := mode.refusal(len(weight), k, n, group_size):
        refuse(_NAME, reason)
    return mode, len(weight), n


def _check(argument: str, tensor: torch.Tensor | None, dtypes: Any, shape: Any) -> None:
    if tensor is None:
        if None not in dtypes:
            refuse(_NAME, f"{argument} is missing; supported: {dtypes} {shape}")
    elif tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        refuse(_NAME, f"{argument} is {describe(tensor)}; supported: {dtypes} {shape}")


def _group_size(k: int, scale: torch.Tensor | None) -> int:
    """Elements of K that share one of the scales `[E, G, N]`; 0 if all do."""
    if scale is None or scale.dim() != 3 or scale.shape[1] == 1:
        return 0
    return -(-k // scale.shape[1])


def parts(
    group_list: torch.Tensor, group_list_type: int
) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with those rows.

    Args:
        group_list: int64 `[E]`.
        group_list_type: 0 for cumulative counts, 1 for counts.

    """
    start = 0
    for expert, value in enumerate(group_list.tolist()):
        stop = start + value if group_list_type == _COUNTS else value
        if stop > start:
            yield expert, slice(start, stop)
        start = stop


def grouped_matmul_fake(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: torch.Tensor | None = None,
    activation_input: _Tensors = None,
    activation_quant_scale: _Tensors = None,
    activation_quant_offset: _Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    **dtypes: int | None,
) -> list[torch.Tensor]:
    """Check a call of `npu_grouped_matmul`, and allocate its result."""
    unused = (offset, activation_input, activation_quant_scale, tuning_config)
    if any(argument is not None for argument in (*unused, activation_quant_offset)):
        refuse(_NAME, "offset, activation_* and tuning_config are not emulated")
    if (group_type, act_type) != (0, 0) or split_item not in (2, 3):
        refuse(
            _NAME,
            f"group_type={group_type}, act_type={act_type}, split_item={split_item}; "
            "emulated: 0, 0, and 2 or 3",
        )
    x_one, weight_one = only(_NAME, "x", x), only(_NAME, "weight", weight)
    scales, antiquant = (
        only(_NAME, "scale", scale),
        only(_NAME, "antiquant_scale", antiquant_scale),
    )
    assert x_one is not None and weight_one is not None
    if dtypes.get("scale_dtype") is not None:
        others = bias, antiquant_scale, antiquant_offset
        return [
            mx_grouped_fake(
                x_one,
                weight_one,
                scale,
                per_token_scale,
                group_list,
                output_dtype,
                others,
                **dtypes,
            )
        ]
    m, k = x_one.shape
    group_size = _group_size(k, scales if antiquant is None else antiquant)
    mode, experts, n = _mode(x_one, weight_one, group_size)
    if group_list_type not in mode.group_list_types:
        supported = mode.group_list_types
        refuse(_NAME, f"group_list_type={group_list_type}; supported: {supported}")
    default = x_one.dtype
    out = default if output_dtype is None else as_dtype(_NAME, output_dtype)
    operands = mode.by_output.get(out)
    if operands is None:
        refuse(_NAME, f"output dtype {out}; supported: {list(mode.by_output)}")
    groups = k // group_size if group_size else 1
    per_channel = (experts, n)
    in_groups = (experts, groups, n)
    grouped = antiquant is not None and antiquant.dim() == 3
    offsets = only(_NAME, "antiquant_offset", antiquant_offset)
    of_antiquant = in_groups if grouped else per_channel
    of_scale = in_groups if mode.raw_scale else per_channel
    _check("group_list", group_list, (torch.int64,), (experts,))
    _check("scale", scales, operands.scale, of_scale)
    _check("antiquant_scale", antiquant, operands.antiquant_scale, of_antiquant)
    _check("antiquant_offset", offsets, operands.antiquant_offset, of_antiquant)
    per_token = only(_NAME, "per_token_scale", per_token_scale)
    _check("per_token_scale", per_token, operands.per_token_scale, (m,))
    _check("bias", only(_NAME, "bias", bias), operands.bias, per_channel)
    return [x_one.new_empty((m, n), dtype=out)]


@emulates(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, "
    "Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, "
    "Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, "
    "Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, "
    "int? split_item=0, int? group_type=None, int? group_list_type=0, "
    "int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, "
    "int? per_token_scale_dtype=None) -> Tensor[]",
    fake=grouped_matmul_fake,
)
def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: torch.Tensor | None = None,
    group_list_type: int = 0,
    **options: Any,
) -> list[torch.Tensor]:
    """Multiply each expert's rows by its weight.

    int8 and FP8 rows, and MX formats: as `npu_quant_matmul`. (With int4 weights, the
    NPU overwrites x; this is not emulated.) 16-bit rows: as
    `npu_weight_quant_batchmatmul`, or by 16-bit weights. Rows that belong to no expert
    are not written.

    Source: op-plugin `torch_npu-npu_grouped_matmul.md`, `test_npu_grouped_matmul.py`;
    ops-transformer `gmm/grouped_matmul`.

    Args:
        x: One tensor `[M, K]`, rows sorted by expert.
        weight: One tensor `[E, K, N]`, or its transposed view; int4 packed as int32 as
            in those operators.
        bias: One tensor `[E, N]`; for int4 weights with int8 rows, the assist term.
        scale: One tensor `[E, N]`; for int4 weights with int8 rows `[E, G, N]`, int64
            that holds fp32 bits.
        offset: Not emulated.
        antiquant_scale: One tensor `[E, N]`, or `[E, G, N]` for int4.
        antiquant_offset: Like `antiquant_scale`.
        per_token_scale: One tensor, fp32 `[M]`.
        group_list: int64 `[E]`.
        group_list_type: 0 for cumulative counts, 1 for counts.
        options: group_type 0, split_item 2 or 3, output_dtype; the dtypes of MX
            formats, see `grouped_matmul_mx.py`; others are defaults.

    Returns:
        One tensor `[M, N]`.

    Raises:
        OperatorLimitError: The call is outside the operator's limits.

    """
    (result,) = grouped_matmul_fake(
        x,
        weight,
        bias,
        scale,
        offset,
        antiquant_scale,
        antiquant_offset,
        per_token_scale,
        group_list,
        group_list_type=group_list_type,
        **options,
    )
    poison(result)
    assert group_list is not None
    biases, scales, antiquant, offsets, per_token = (
        None if tensors is None else tensors[0]
        for tensors in (bias, scale, antiquant_scale, antiquant_offset, per_token_scale)
    )
    if is_float(x[0]):
        assert scales is not None and per_token is not None
        operands = x[0], weight[0], scales, per_token
        for rows, values in float_products(*operands, group_list, group_list_type):
            result[rows].copy_(values)
        return [result]
    if scales is not None:
        values = int8_products(
            x[0], weight[0], scales, biases, group_list, group_list_type
        )
        if per_token is not None:
            values *= per_token[: len(values)].unsqueeze(1)
        result[: len(values)].copy_(values)
        return [result]
    matrices = _experts(weight[0], antiquant, offsets)
    for expert, rows in parts(group_list, group_list_type):
        matrix = matrices(expert)
        expert_bias = None if biases is None else biases[expert]
        result[rows].copy_(multiply_dequantized(x[0][rows], matrix, expert_bias))
    return [result]


def is_float(x: torch.Tensor) -> bool:
    """Whether activations are FP8, or in an MX format."""
    return x.dtype in (FP8, torch.uint8)


def float_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    per_token_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Multiply FP8 or MX rows by their experts.

    Args:
        x: `[M, K]`, rows sorted by expert.
        weight: `[E, K, N]`.
        scale: fp32 `[E, N]`, or E8M0 `[E, ceil(K / 64), N, 2]`.
        per_token_scale: fp32 `[M]`, or E8M0 `[M, ceil(K / 64), 2]`.
        group_list: int64 `[E]`.
        group_list_type: 0 for cumulative counts, 1 for counts.

    Yields:
        The rows of an expert that has any, and their product in fp32.

    """
    multiply = fp8_matmul if scale.dim() == 2 else mx_matmul
    for expert, rows in parts(group_list, group_list_type):
        operands = x[rows], weight[expert], scale[expert], per_token_scale[rows]
        yield rows, multiply(*operands)


class _Experts(list[torch.Tensor]):
    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self)


def _experts(
    weight: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None
) -> Callable[[int], torch.Tensor]:
    """A function that returns the 16-bit weight `[N, K]` of an expert."""
    if scale is None:
        return lambda expert: weight[expert].t()
    kept = _kept_experts(weight, scale, offset)
    if kept is not None:
        return kept.__getitem__
    return lambda expert: _dequantized_expert(weight, scale, offset, expert)


def _kept_experts(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None
) -> _Experts | None:
    """All experts, dequantized and cached; None if the cache has no room for them."""
    k, n = weight_size(weight[0])
    return derived.get(
        "16-bit experts",
        [weight, scale] if offset is None else [weight, scale, offset],
        len(weight) * k * n * scale.itemsize,
        lambda: _Experts(
            _dequantized_expert(weight, scale, offset, expert)
            for expert in range(len(weight))
        ),
    )


def _dequantized_expert(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    expert: int,
) -> torch.Tensor:
    k, _ = weight_size(weight[expert])
    offset = None if offset is None else offset[expert]
    return dequantized(weight[expert], scale[expert], offset, _group_size(k, scale))


def int8_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_list: torch.Tensor,
    group_list_type: int,
) -> torch.Tensor:
    """Multiply int8 rows by their experts, without per-token scales.

    Args:
        x: int8 `[M, K]`, rows sorted by expert.
        weight: int8 `[E, K, N]`, or int4 as int32 `[E, K, N / 8]`.
        scale: `[E, N]`, or int64 `[E, G, N]` for int4.
        bias: int32 `[E, N]`; for int4 the assist term, fp32.
        group_list: int64 `[E]`.
        group_list_type: 0 for cumulative counts, 1 for counts.

    Returns:
        fp32, `[rows that belong to an expert, N]`.

    """
    n = weight_size(weight[0])[1]
    result = torch.empty((len(x), n), dtype=torch.float32)
    end = 0
    for expert, rows in parts(group_list, group_list_type):
        expert_bias = None if bias is None else bias[expert]
        result[rows] = _int8_product(
            x[rows], weight[expert], scale[expert], expert_bias
        )
        end = max(end, rows.stop)
    return result[:end]


def _int8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply int8 rows by one expert, in fp32."""
    if weight.dtype == torch.int32:
        assert bias is not None
        scale = unpack_raw_scale(scale).reshape(-1, scale.shape[-1])
        return a8w4_product(x, weight, scale, bias)
    if bias is None:
        return scaled_int_matmul(x, weight, scale.float())
    return (int_matmul(x, weight).to(torch.int32) + bias) * scale.float()
