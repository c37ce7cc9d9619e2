# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Dequantization of the floating-point formats to 16-bit weights.

Values are looked up in tables by their codes: chips that cannot multiply FP8 cannot
convert it either, and a conversion might flush subnormal values to zero.
"""

from functools import cache

import torch

from vllm_ascend_ct.ops.dtypes import E2M1_VALUES

# Values to dequantize at once; their indices, values and scales take 1 MB each.
_VALUES_AT_ONCE = 1 << 18
# Values to look for NaN in; two copies of them take 256 KB.
_CHECKED_AT_ONCE = 1 << 17
# Without the sign bit.
_E4M3_NAN = 0x7F
_E8M0_BIAS, _E8M0_NAN = 127, 255
# Checkpoints store E8M0 exponents as bytes or in their own dtype.
E8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)


@cache
def _e4m3_values() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


@cache
def _e2m1_values() -> torch.Tensor:
    values = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
    return torch.tensor(values, dtype=torch.float32)


def _indices(codes: torch.Tensor, packed: bool) -> torch.Tensor:
    """Flat int32 indices of the values in their table.

    Args:
        codes: uint8, one FP8 code each, or two FP4 codes if packed.
        packed: Whether they are packed.

    """
    indices = codes.flatten().int()
    if not packed:
        return indices
    # The low half of a byte holds the first of its two values.
    return torch.stack((indices & 15, indices >> 4), dim=1).flatten()


def decoded_scale(scale: torch.Tensor) -> torch.Tensor:
    """Decode a scale on the host.

    Args:
        scale: Floats, FP8 (E4M3), or exponents (E8M0), also as uint8.

    Returns:
        fp32 of the same shape, on the CPU.

    """
    if scale.dtype not in E8M0_DTYPES:
        return scale.cpu().float()
    exponents = scale.cpu().view(torch.uint8)
    powers = torch.exp2(exponents.float() - _E8M0_BIAS)
    return powers.masked_fill_(exponents == _E8M0_NAN, torch.nan)


def has_nan(weight: torch.Tensor) -> bool:
    """Whether an FP8 (E4M3) weight `[N, K]` contains NaN."""
    if weight.is_meta:
        return False
    codes = weight.view(torch.uint8)
    found = torch.zeros((), dtype=torch.bool, device=weight.device)
    for part in codes.split(max(1, _CHECKED_AT_ONCE // codes.shape[1])):
        found |= ((part & _E4M3_NAN) == _E4M3_NAN).any()
    # Waits for the device once.
    return bool(found)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    global_scale: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Dequantize a weight: multiply by the scale in fp32, then round to the result.

    Args:
        weight: FP8 (E4M3) `[N, K]`, or uint8 `[N, K / 2]` with two FP4 (E2M1) each.
        scale: Dtypes as in `decoded_scale`; one value per block, `[ceil(N / rows),
            ceil(K / columns)]`, or a single value.
        block: Number of rows and columns that share a scale.
        global_scale: Divides the scales; None for 1.
        dtype: dtype of the result.
        device: Device to compute on.

    Returns:
        `[N, K]`.

    """
    packed = weight.dtype == torch.uint8
    table = (_e2m1_values() if packed else _e4m3_values()).to(device)
    codes = weight.view(torch.uint8)
    n, k = len(codes), codes.shape[1] * (1 + packed)
    factors = decoded_scale(scale)
    if global_scale is not None:
        factors = factors / global_scale.cpu().float()
    rows, columns = block
    factors = factors.reshape(-(-n // rows), -1).to(device)
    dense = torch.empty((n, k), dtype=dtype, device=device)
    step = max(1, _VALUES_AT_ONCE // k)
    for start in range(0, n, step):
        # The device never holds more of the stored weight than this part.
        part = codes[start : start + step].to(device)
        blocks = torch.arange(start, start + len(part), device=device) // rows
        factor = factors.index_select(0, blocks)
        if factor.shape[1] > 1:
            factor = factor.unsqueeze(-1).expand(-1, -1, columns).flatten(1)[:, :k]
        values = table.index_select(0, _indices(part, packed)).view(len(part), k)
        dense[start : start + step] = values.mul_(factor)
    return dense
