# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int4 weights as the operators read them: two's complement, lowest nibble first.

The packed axis is the one that is contiguous in memory: K or N for the weight-only
operators, N for those that quantize activations. Weights come some rows at a time,
packed along K, and are packed along N without being widened.
"""

from collections.abc import Iterable, Iterator

import torch

ROWS_AT_ONCE = 128
# The top bit of every value in an int32 word, as a signed number.
TOP_BITS = 0x88888888 - (1 << 32)
_PER_INT32 = 8
_LOW_NIBBLE_OFFSET = 8
_LOW_NIBBLES = 0x0F0F0F0F


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[R, C]` along C: int32 `[R, ceil(C / 8)]`, what is left 0."""
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % _PER_INT32))
    low, high = values[:, ::2], values[:, 1::2]
    return (low.bitwise_and(15) | (high << 4)).view(torch.int32)


def pack_inputs(
    words: Iterable[torch.Tensor], n: int, k: int, device: torch.device
) -> torch.Tensor:
    """Put rows that are packed along K together.

    Args:
        words: int32 `[R, K / 8]`, in order.
        n: Rows in all.
        k: Their length, a multiple of 8.
        device: Of the result.

    Returns:
        int32 `[N, K / 8]`.

    """
    packed = torch.empty((n, k // _PER_INT32), dtype=torch.int32, device=device)
    if packed.is_meta:
        return packed
    start = 0
    for part in words:
        packed[start : start + len(part)] = part
        start += len(part)
    return packed


def pack_outputs(
    words: Iterable[torch.Tensor], n: int, k: int, device: torch.device
) -> torch.Tensor:
    """Pack along N.

    Args:
        words: int32 `[R, ceil(K / 8)]`, packed along K, in order, R a multiple of 8;
            they are overwritten.
        n: Rows in all.
        k: Their length.
        device: Of the result.

    Returns:
        int32 `[K, N / 8]`.

    """
    packed = torch.empty((k, n // _PER_INT32), dtype=torch.int32, device=device)
    if packed.is_meta:
        return packed
    whole, rest = divmod(k, _PER_INT32)
    by_word = packed[: k - rest].view(whole, _PER_INT32, n // _PER_INT32)
    start = 0
    for part in words:
        stop = start + len(part)
        columns = slice(start // _PER_INT32, stop // _PER_INT32)
        along_n = part.view(-1, _PER_INT32, part.shape[1])
        transpose_nibbles_(along_n)
        by_word[:, :, columns] = along_n[..., :whole].permute(2, 1, 0)
        if rest:
            packed[k - rest :, columns] = along_n[:, :rest, whole].t()
        start = stop
    return packed


def transpose_nibbles_(words: torch.Tensor) -> None:
    """Exchange nibble i of word j with nibble j of word i, of int32 `[R, 8, C]`."""
    for bits, distance, mask in (
        (4, 1, _LOW_NIBBLES),
        (8, 2, 0x00FF00FF),
        (16, 4, 0x0000FFFF),
    ):
        pairs = words.unflatten(1, (-1, 2, distance))
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        differing = (low >> bits).bitwise_xor_(high).bitwise_and_(mask)
        high.bitwise_xor_(differing)
        low.bitwise_xor_(differing << bits)


def pack_outputs_with_assist(
    words: Iterable[torch.Tensor], scale: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack along N, with what the operator has to add for halving activations.

    It computes with `x = 16 * high + low + 8` and multiplies by `high` and `low` only.
    Source: `aclnnQuantMatmulV5.md`, yOffset.

    Args:
        words: As of `pack_outputs`; what is left of the last ones 0.
        scale: `[N, G]`, one for each of G equal parts of K.
        k: Length of a row.

    Returns:
        int32 `[K, N / 8]`, and fp32 `[N]`: 8 times the sum over K of weight * scale.

    """
    n, groups = scale.shape
    sums = scale.new_empty((n, groups), dtype=torch.float32)

    def summed() -> Iterator[torch.Tensor]:
        start = 0
        for part in words:
            stop = start + len(part)
            sums[start:stop] = _sums(part, groups)
            yield part
            start = stop

    packed = pack_outputs(summed(), n, k, scale.device)
    return packed, (sums * scale).sum(dim=1) * _LOW_NIBBLE_OFFSET


def _sums(words: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum the values of int32 `[R, W]` in equal parts: int32 `[R, groups]`."""
    unsigned = words.bitwise_xor(TOP_BITS)
    pairs = (unsigned >> 4).bitwise_and_(_LOW_NIBBLES)
    pairs += unsigned.bitwise_and_(_LOW_NIBBLES)
    of_bytes = pairs.view(torch.int8).unflatten(1, (groups, -1))
    zero = 8 * _PER_INT32 * words.shape[1] // groups
    return of_bytes.sum(dim=-1, dtype=torch.int32) - zero
