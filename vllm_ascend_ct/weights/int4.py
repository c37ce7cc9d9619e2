# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int4 weights as the operators read them: two's complement, lowest nibble first.

The packed axis is the one that is contiguous in memory: K or N for the weight-only
operators, N for those that quantize activations. Weights come some rows at a time, as
int8, so that a whole layer is never widened.
"""

from collections.abc import Iterable, Iterator

import torch

ROWS_AT_ONCE = 128
_PER_INT32 = 8
_LOW_NIBBLE_OFFSET = 8


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[R, C]` along C, a multiple of 8: int32 `[R, C / 8]`."""
    low, high = values[:, ::2], values[:, 1::2]
    return (low.bitwise_and(15) | (high << 4)).view(torch.int32)


def pack_inputs(
    rows: Iterable[torch.Tensor], n: int, k: int, device: torch.device
) -> torch.Tensor:
    """Pack along K.

    Args:
        rows: int8 `[R, K]`, in order.
        n: Rows in all.
        k: Their length, a multiple of 8.
        device: Of the result.

    Returns:
        int32 `[N, K / 8]`.

    """
    packed = torch.empty((n, k // _PER_INT32), dtype=torch.int32, device=device)
    start = 0
    for part in rows:
        packed[start : start + len(part)] = pack(part)
        start += len(part)
    return packed


def pack_outputs(
    rows: Iterable[torch.Tensor], n: int, k: int, device: torch.device
) -> torch.Tensor:
    """Pack along N.

    Args:
        rows: int8 `[R, K]`, in order, R a multiple of 8.
        n: Rows in all.
        k: Their length.
        device: Of the result.

    Returns:
        int32 `[K, N / 8]`.

    """
    packed = torch.empty((k, n // _PER_INT32), dtype=torch.int32, device=device)
    start = 0
    for part in rows:
        stop = start + len(part)
        words = packed[:, start // _PER_INT32 : stop // _PER_INT32]
        words.copy_(pack(part.t().contiguous()))
        start = stop
    return packed


def pack_outputs_with_assist(
    rows: Iterable[torch.Tensor], scale: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack along N, with what the operator has to add for halving activations.

    It computes with `x = 16 * high + low + 8` and multiplies by `high` and `low` only.
    Source: `aclnnQuantMatmulV5.md`, yOffset.

    Args:
        rows: As of `pack_outputs`.
        scale: `[N, G]`, one for each of G equal parts of K.
        k: Length of a row.

    Returns:
        int32 `[K, N / 8]`, and fp32 `[N]`: 8 times the sum over K of weight * scale.

    """
    n, groups = scale.shape
    sums = scale.new_empty((n, groups), dtype=torch.float32)

    def summed() -> Iterator[torch.Tensor]:
        start = 0
        for part in rows:
            stop = start + len(part)
            grouped = part.unflatten(1, (groups, -1))
            sums[start:stop] = grouped.sum(dim=-1, dtype=torch.int32)
            yield part
            start = stop

    packed = pack_outputs(summed(), n, k, scale.device)
    return packed, (sums * scale).sum(dim=1) * _LOW_NIBBLE_OFFSET
