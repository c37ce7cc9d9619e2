# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""From the floating-point formats to 16-bit weights.

Values are looked up by their bytes: chips that do not multiply FP8 do not convert it
either, and a table holds subnormal values, which conversions may flush to zero.
"""

from functools import cache

import torch

# Their indices, values and scales take 4 MB each.
_VALUES_AT_ONCE = 1 << 20
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# But for the sign.
_E4M3_NAN = 0x7F
_E8M0_BIAS, _E8M0_NAN = 127, 255
# Files have exponents as bytes or as what they are.
E8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)


@cache
def _e4m3_values() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


@cache
def _e2m1_values() -> torch.Tensor:
    values = (*_E2M1, *(-value for value in _E2M1))
    return torch.tensor(values, dtype=torch.float32)


def _indices(codes: torch.Tensor, packed: bool) -> torch.Tensor:
    """The int32 indices of values in their table, flat."""
    indices = codes.flatten().int()
    if not packed:
        return indices
    # The first of two values is in the low half.
    return torch.stack((indices & 15, indices >> 4), dim=1).flatten()


def decoded_scale(scale: torch.Tensor) -> torch.Tensor:
    """Decode a scale on the host.

    Args:
        scale: Floats, FP8 (E4M3), or exponents (E8M0) in bytes.

    Returns:
        fp32, of the same shape.

    """
    if scale.dtype not in E8M0_DTYPES:
        return scale.cpu().float()
    exponents = scale.cpu().view(torch.uint8)
    powers = torch.exp2(exponents.float() - _E8M0_BIAS)
    return powers.masked_fill_(exponents == _E8M0_NAN, torch.nan)


def has_nan(weight: torch.Tensor) -> bool:
    """Whether an FP8 (E4M3) weight `[N, K]` has a value that is no number."""
    if weight.is_meta:
        return False
    codes = weight.view(torch.uint8)
    parts = codes.split(max(1, _VALUES_AT_ONCE // codes.shape[1]))
    return any(bool(((part & _E4M3_NAN) == _E4M3_NAN).any()) for part in parts)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    global_scale: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Dequantize a weight; one rounding in fp32 for the scale, and one to the result.

    Args:
        weight: FP8 (E4M3) `[N, K]`, or uint8 `[N, K / 2]`, two FP4 (E2M1) in each.
        scale: As of `decoded_scale`, one value for each block: `[ceil(N / rows),
            ceil(K / columns)]`, or a single one.
        block: Rows and columns that share a scale.
        global_scale: What scales are divided by; None is 1.
        dtype: Of the result.
        device: Where it is computed.

    Returns:
        `[N, K]`.

    """
    packed = weight.dtype == torch.uint8
    table = (_e2m1_values() if packed else _e4m3_values()).to(device)
    codes = weight.view(torch.uint8).to(device)
    n, k = len(codes), codes.shape[1] * (1 + packed)
    factors = decoded_scale(scale)
    if global_scale is not None:
        factors = factors / global_scale.cpu().float()
    rows, columns = block
    factors = factors.reshape(-(-n // rows), -1).to(device)
    dense = torch.empty((n, k), dtype=dtype, device=device)
    step = max(1, _VALUES_AT_ONCE // k)
    for start in range(0, n, step):
        part = codes[start : start + step]
        blocks = torch.arange(start, start + len(part), device=device) // rows
        factor = factors.index_select(0, blocks)
        if factor.shape[1] > 1:
            factor = factor.unsqueeze(-1).expand(-1, -1, columns).flatten(1)[:, :k]
        values = table.index_select(0, _indices(part, packed)).view(len(part), k)
        dense[start : start + step] = values.mul_(factor)
    return dense
