# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""int4 weights in the operators' format: two's complement, lowest nibble first.

The packed axis is the one that is contiguous in memory: K or N for the weight-only
operators, N for the operators with int8 activations. These functions take blocks of
rows that are packed along K, and pack them along N without unpacking them to int8.
"""

from collections.abc import Iterable, Iterator

import torch

ROWS_AT_ONCE = 128
# The top bit of all eight values of an int32 word, as a signed number.
TOP_BITS = 0x88888888 - (1 << 32)
_PER_INT32 = 8
_LOW_NIBBLE_OFFSET = 8
_LOW_NIBBLES = 0x0F0F0F0F


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[R, C]` along C into int32 `[R, ceil(C / 8)]`, padded with zeros."""
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % _PER_INT32))
    low, high = values[:, ::2], values[:, 1::2]
    return (low.bitwise_and(15) | (high << 4)).view(torch.int32)


def pack_inputs(
    words: Iterable[torch.Tensor], n: int, k: int, device: torch.device
) -> torch.Tensor:
    """Concatenate blocks of rows that are packed along K.

    Args:
        words: Blocks of rows in order, int32 `[R, K / 8]`.
        n: Number of rows of all blocks.
        k: Values per row, a multiple of 8.
        device: Device of the result.

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
    """Repack blocks of rows from packed along K to packed along N.

    Args:
        words: Blocks of rows in order, int32 `[R, ceil(K / 8)]`, R a multiple of 8.
            They are overwritten.
        n: Number of rows of all blocks.
        k: Values per row.
        device: Device of the result.

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
    """Swap nibble i of word j with nibble j of word i, in place.

    Args:
        words: int32 `[R, 8, C]`; j is the index along the second axis.

    """
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
    """Repack to packed along N, and compute the W4A8 operator's assist term.

    The operator splits int8 activations into int4 halves, `x = 16 * high + low + 8`,
    and multiplies `high` and `low` by the weight. The assist term adds the product by
    8. Source: `aclnnQuantMatmulV5.md`, yOffset.

    Args:
        words: As in `pack_outputs`; padding in the last word of a row must be 0.
        scale: `[N, G]`, for G groups of K.
        k: Values per row.

    Returns:
        The weight, int32 `[K, N / 8]`, and the assist term, fp32 `[N]`: 8 times the sum
        over K of weight * scale.

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
    """Sum the int4 values of int32 `[R, W]` in each group: int32 `[R, groups]`."""
    unsigned = words.bitwise_xor(TOP_BITS)
    pairs = (unsigned >> 4).bitwise_and_(_LOW_NIBBLES)
    pairs += unsigned.bitwise_and_(_LOW_NIBBLES)
    of_bytes = pairs.view(torch.int8).unflatten(1, (groups, -1))
    zero = 8 * _PER_INT32 * words.shape[1] // groups
    return of_bytes.sum(dim=-1, dtype=torch.int32) - zero
