# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""From the `int-quantized` format to what the int8 operators read.

On disk a weight is int8 `[N, K]`; the operators take its transposed view.
"""

import torch

# Leaves the int32 accumulator room for the product itself.
_MAX_INT32_BIAS = 2**30


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """Sum int8 `[N, K]` over K, exactly: int32 `[N]`."""
    return weight.sum(dim=1, dtype=torch.int32)


def int32_bias(
    weight: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    dequant_scale: torch.Tensor,
) -> torch.Tensor | None:
    """Fold a zero point and a bias into what is added to the int32 product.

    Args:
        weight: int8 `[N, K]`.
        zero_point: int32 `[1]` of the activations.
        bias: `[N]`.
        dequant_scale: fp32 `[N]`, scale of the activations times that of the weight.

    Returns:
        int32 `[N]`, None if there is nothing to add.

    Raises:
        ValueError: The bias does not fit next to the product.

    """
    if zero_point is None and bias is None:
        return None
    total = torch.zeros_like(dequant_scale, dtype=torch.float64)
    if zero_point is not None:
        total -= weight_sum(weight).double() * zero_point
    if bias is not None:
        total += (bias.double() / dequant_scale.double()).round()
    if not bool((total.abs() <= _MAX_INT32_BIAS).all()):
        raise ValueError(
            f"bias / (input_scale * weight_scale) reaches {total.abs().max():.3g}, "
            f"supported up to {_MAX_INT32_BIAS}"
        )
    return total.to(torch.int32)
