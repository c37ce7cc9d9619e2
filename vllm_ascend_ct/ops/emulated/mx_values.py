# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Values of the MX formats on CPU: E4M3 or E2M1 with a power of two for each block."""

import math
from functools import cache

import torch

from vllm_ascend_ct.ops.dtypes import E2M1_VALUES, MX_BLOCK

_E8M0_BIAS, E8M0_NAN = 127, 255


def scale_pairs(k: int) -> int:
    """Number of pairs of scales of a row of `k` elements."""
    return math.ceil(k / (2 * MX_BLOCK))


@cache
def _powers() -> torch.Tensor:
    powers = [math.ldexp(1.0, code - _E8M0_BIAS) for code in range(E8M0_NAN)]
    return torch.tensor([*powers, math.nan], dtype=torch.float32, device="cpu")


@cache
def _e2m1() -> torch.Tensor:
    values = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def decode(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply values by the scales of their blocks.

    Args:
        rows: FP8 (E4M3) `[R, K]`, or uint8 `[R, K / 2]` with two E2M1 values each.
        scale: uint8 `[R, ceil(K / 64), 2]`, E8M0.

    Returns:
        fp32 `[R, K]`, exact.

    """
    if rows.dtype == torch.uint8:
        halves = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1)
        values = _e2m1()[halves.int()]
    else:
        values = rows.float()
    factors = _powers()[scale.flatten(1).int()].repeat_interleave(MX_BLOCK, dim=1)
    return values * factors[:, : values.shape[1]]


def encode_e2m1(values: torch.Tensor, half_to_even: bool) -> torch.Tensor:
    """Round to E2M1 and pack, saturating at 6.

    Args:
        values: fp32 `[..., K]`. NaN becomes 6; its block's scale is NaN.
        half_to_even: Whether ties go to the even mantissa, or away from zero.

    Returns:
        uint8 `[..., K / 2]`.

    """
    sizes = values.abs().nan_to_num_(E2M1_VALUES[-1]).clamp_(max=E2M1_VALUES[-1])
    # Distance of adjacent values: 0.5 below 2, 1 below 4, then 2.
    steps = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    sizes.div_(steps)
    rounded = sizes.round_() if half_to_even else sizes.add_(0.5).floor_()
    codes = torch.searchsorted(_e2m1()[: len(E2M1_VALUES)], rounded.mul_(steps))
    codes += values.signbit() * len(E2M1_VALUES)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
