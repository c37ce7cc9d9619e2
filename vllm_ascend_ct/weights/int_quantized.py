# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Repacking of the `int-quantized` format for the int8 operators.

On disk a weight is int8 `[N, K]`. The operators take its transposed view, or `[K, N]`
in FRACTAL_NZ, the tile layout of the NPU's matrix unit.
"""

from collections.abc import Iterator

import torch

from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.weights import int4

_ROWS_AT_ONCE = 256
# Leaves room for the product itself in the int32 accumulator.
_MAX_INT32_BIAS = 2**30


def to_npu_weight(weight: torch.Tensor, nz: bool, transposed_nz: bool) -> torch.Tensor:
    """Repack a weight for the int8 operators.

    Args:
        weight: int8 `[N, K]`, contiguous.
        nz: Whether to transpose it and cast it to FRACTAL_NZ, which copies it.
        transposed_nz: Whether to cast it to FRACTAL_NZ untransposed, and transpose the
            view.

    Returns:
        int8 `[K, N]`.

    """
    if transposed_nz:
        # Unpacked weights are views, which torch_npu cannot cast.
        return to_nz(weight.clone()).t()
    return to_nz(weight.t().contiguous()) if nz else weight.t()


def to_nz(weight: torch.Tensor) -> torch.Tensor:
    """Copy weights to FRACTAL_NZ, the tile layout of the NPU's matrix unit.

    Args:
        weight: int8 `[K, N]` or `[E, K, N]`, or int4 with two values per int8. Not a
            view: torch_npu (2.10.0, `FormatCastKernelNpu.cpp`) casts with the sizes
            that the memory was allocated with.

    """
    if weight.is_meta:
        # torch_npu has no meta kernel for the cast.
        return weight
    cast: torch.Tensor = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)
    return cast


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """Sum int8 `[N, K]` over K, exactly: int32 `[N]`."""
    # torch widens the whole input to int32 first, so sum blocks of rows.
    parts = [rows.sum(dim=1, dtype=torch.int32) for rows in weight.split(_ROWS_AT_ONCE)]
    return torch.cat(parts)


def int4_rows(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield blocks of rows of an int8 weight `[N, K]` that holds int4 values.

    Raises:
        ValueError: A value is out of int4's range.

    """
    for part in weight.split(int4.ROWS_AT_ONCE):
        low, high = part.aminmax()
        if not part.is_meta and (low < -8 or high > 7):
            raise ValueError(
                f"weight has values from {low} to {high}; supported for 4 bits: -8 to 7"
            )
        yield part


def int32_bias(
    zero_point_share: torch.Tensor | None,
    bias: torch.Tensor | None,
    dequant_scale: torch.Tensor,
) -> torch.Tensor | None:
    """Fold the zero-point correction and the layer's bias into one int32 bias.

    Args:
        zero_point_share: int32 `[N]`, the correction for the activations' zero point.
        bias: `[N]`, the layer's bias.
        dequant_scale: fp32 `[N]`, the activations' scale times the weight's.

    Returns:
        int32 `[N]` to add to the int32 product; None if there is nothing to add.

    Raises:
        ValueError: The sum is too large for the int32 accumulator.

    """
    if bias is None:
        return zero_point_share
    if bias.is_meta:
        return torch.empty_like(dequant_scale, dtype=torch.int32)
    # On the host, because NPUs have no float64.
    total = (bias.cpu().double() / dequant_scale.cpu().double()).round()
    if zero_point_share is not None:
        total += zero_point_share.cpu()
    if not bool((total.abs() <= _MAX_INT32_BIAS).all()):
        raise ValueError(
            f"bias / (input_scale * weight_scale) reaches {total.abs().max():.3g}, "
            f"supported up to {_MAX_INT32_BIAS}"
        )
    return total.to(dequant_scale.device, torch.int32)
