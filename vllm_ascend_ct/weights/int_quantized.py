# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""From the `int-quantized` format to what the int8 operators read.

On disk a weight is int8 `[N, K]`; the operators take its transposed view, or `[K, N]`
in the memory format that the NPU's matrix unit reads fastest.
"""

from collections.abc import Iterator

import torch

from vllm_ascend_ct.ops.dtypes import FRACTAL_NZ
from vllm_ascend_ct.weights import int4

_ROWS_AT_ONCE = 256
# Leaves the int32 accumulator room for the product itself.
_MAX_INT32_BIAS = 2**30


def to_npu_weight(weight: torch.Tensor, nz: bool, transposed_nz: bool) -> torch.Tensor:
    """Turn a weight into an operator's.

    Args:
        weight: int8 `[N, K]`, contiguous.
        nz: Whether to hold it in FRACTAL_NZ, which copies it.
        transposed_nz: Whether to cast it as it is and transpose the view.

    Returns:
        int8 `[K, N]`.

    """
    if transposed_nz:
        # Unpacked weights are views, which torch_npu does not cast.
        return to_nz(weight.clone()).t()
    return to_nz(weight.t().contiguous()) if nz else weight.t()


def to_nz(weight: torch.Tensor) -> torch.Tensor:
    """Copy a weight to the memory format that the matrix unit reads fastest.

    Args:
        weight: int8, or int4 as bytes of two, of two or three axes. Not a view:
            torch_npu (2.10.0, `FormatCastKernelNpu.cpp`) casts one by the sizes that
            its memory was allocated with.

    """
    if weight.is_meta:
        # For which torch_npu does not register the operator.
        return weight
    cast: torch.Tensor = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)
    return cast


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """Sum int8 `[N, K]` over K, exactly: int32 `[N]`."""
    # torch widens what it sums to a tensor of its own: some rows at a time.
    parts = [rows.sum(dim=1, dtype=torch.int32) for rows in weight.split(_ROWS_AT_ONCE)]
    return torch.cat(parts)


def int4_rows(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Take int8 `[N, K]` some rows at a time, as int4 values.

    Raises:
        ValueError: A value is no int4.

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
    """Fold a zero point and a bias into what is added to the int32 product.

    Args:
        zero_point_share: int32 `[N]`, what the activations' zero point adds.
        bias: `[N]`.
        dequant_scale: fp32 `[N]`, scale of the activations times that of the weight.

    Returns:
        int32 `[N]`, None if there is nothing to add.

    Raises:
        ValueError: The sum does not fit next to the product.

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
