# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Repacking of the `pack-quantized` format for the weight-only operators.

On disk a weight is int32 `[N, K * bits / 32]`: a stream of bits along K, lowest bits
first, each value stored with 2 ** (bits - 1) added. The operators read int4 or int8 in
two's complement, in the same order. For 8 bits, and for 4 bits with per-channel scales,
it is therefore enough to flip the top bit of each value in place and transpose the
view. For per-group int4 the operator's document recommends the layout that
`int4.pack_outputs` creates. Other widths are widened to int4 or int8.
"""

from collections.abc import Iterator

import torch

from vllm_ascend_ct.weights import int4, int_quantized

# The top bit of all values of an int32 word, as a signed number, by width.
_TOP_BITS = {4: int4.TOP_BITS, 8: 0x80808080 - (1 << 32)}
_WORD = 32


def operator_bits(bits: int) -> int:
    """Width that the operators read weights of `bits` bits in: 4 or 8."""
    return 4 if bits <= 4 else 8


def unpack(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Unpack the dense bit stream of each row.

    A value may span two words: compressed-tensors 0.18 and later write 3, 5, 6 and 7
    bits that way.

    Args:
        packed: int32 `[R, ceil(size * bits / 32)]`.
        bits: 2 to 8.
        size: Number of values per row.

    Returns:
        int8 `[R, size]`, signed values.

    """
    if bits == 4:
        pairs = packed.contiguous().view(torch.int8)
        nibbles = torch.stack((pairs & 15, (pairs >> 4) & 15), dim=-1)
        return nibbles.sub_(8).flatten(1)[:, :size]
    # 32 values fill `bits` words exactly.
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    words = words.unflatten(1, (-1, bits))
    values = packed.new_empty((*words.shape[:2], _WORD), dtype=torch.int8)
    mask, middle = (1 << bits) - 1, 1 << (bits - 1)
    for position in range(_WORD):
        word, shift = divmod(position * bits, _WORD)
        value = words[..., word] >> shift
        if shift + bits > _WORD:
            rest = _WORD - shift
            value = (value & ((1 << rest) - 1)) | (words[..., word + 1] << rest)
        values[..., position] = (value & mask) - middle
    return values.flatten(1)[:, :size]


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int4 values, stored as int8, into the `pack-quantized` format.

    Args:
        values: int8 `[N, K]`, K a multiple of 8.

    Returns:
        int32 `[N, K / 8]`.

    Raises:
        ValueError: A value is out of int4's range.

    """
    parts = [int4.pack(part) for part in int_quantized.int4_rows(values)]
    return torch.cat(parts).bitwise_xor_(_TOP_BITS[4])


def rows(packed: torch.Tensor, bits: int, k: int) -> Iterator[torch.Tensor]:
    """Yield blocks of unpacked rows, int8 `[R, K]`.

    Args:
        packed: int32 `[N, ceil(K * bits / 32)]`.
        bits: 2 to 8.
        k: Input features.

    """
    for part in packed.split(int4.ROWS_AT_ONCE):
        yield unpack(part, bits, k)


def int4_words(packed: torch.Tensor, bits: int, k: int) -> Iterator[torch.Tensor]:
    """Yield blocks of rows as int4 in two's complement, packed along K.

    Args:
        packed: int32 `[N, ceil(K * bits / 32)]`.
        bits: 2 to 4.
        k: Input features.

    """
    for part in packed.split(int4.ROWS_AT_ONCE):
        if bits < 4:
            yield int4.pack(unpack(part, bits, k))
            continue
        words = part.bitwise_xor(_TOP_BITS[bits])
        if rest := k * bits % _WORD:
            words[:, -1] &= (1 << rest) - 1
        yield words


def to_int8(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Unpack a weight to int8 `[N, K]`; for 8 bits in place if K is a multiple of 4.

    Args:
        packed: int32 `[N, ceil(K * bits / 32)]`.
        bits: 2 to 8.
        k: Input features.

    """
    if bits == 8 and k % 4 == 0:
        return packed.bitwise_xor_(_TOP_BITS[bits]).view(torch.int8)
    values = packed.new_empty((len(packed), k), dtype=torch.int8)
    for out, part in zip(values.split(int4.ROWS_AT_ONCE), rows(packed, bits, k)):
        out.copy_(part)
    return values


def to_npu_weight(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Repack a weight for the weight-only operator.

    Args:
        packed: int32 `[N, ceil(K * bits / 32)]`, contiguous; overwritten for 4 and 8
            bits.
        bits: 2 to 8.
        k: Input features; a multiple of 8 for up to 4 bits.

    Returns:
        A transposed view: int32 `[K / 8, N]` for up to 4 bits, otherwise int8 `[K, N]`.

    """
    if operator_bits(bits) == 8:
        return to_int8(packed, bits, k).t()
    if bits == 4:
        return packed.bitwise_xor_(_TOP_BITS[bits]).t()
    parts = int4_words(packed, bits, k)
    return int4.pack_inputs(parts, len(packed), k, packed.device).t()


def to_npu_scale(scale: torch.Tensor) -> torch.Tensor:
    """Transpose a scale `[N, G]` to the view `[G, N]`."""
    return scale.t()


def to_npu_offset(
    packed_zero_point: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Convert packed zero points to the offsets that the operators add.

    Args:
        packed_zero_point: int32 `[ceil(N * bits / 32), G]`.
        scale: `[N, G]`; the operators require its dtype and layout for offsets too.
        bits: 2 to 8.

    Returns:
        Transposed view `[G, N]` of the negated zero points.

    """
    zero_point = unpack(packed_zero_point.t(), bits, len(scale))
    return scale.new_empty(scale.shape).copy_(zero_point.t()).neg_().t()
