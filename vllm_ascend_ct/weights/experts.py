# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Repacking of experts' weights, stacked as `[E, N, K]`.

A tensor that keeps its size is rewritten in place, one expert at a time, so that the
peak memory is that of a layer and one expert.
"""

import torch

from vllm_ascend_ct.weights import int4, pack_quantized

_RAW_BITS = 0xFFFFFFFF


def to_weight_only(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Repack weights of the `pack-quantized` format for the weight-only operators.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`; overwritten for 4 and 8 bits.
        bits: 2 to 8.
        k: Input features; a multiple of 8 for up to 4 bits.

    Returns:
        A transposed view: int32 `[E, K / 8, N]` for up to 4 bits, otherwise int8
        `[E, K, N]`.

    """
    rows = pack_quantized.to_npu_weight(packed.flatten(0, 1), bits, k).t()
    return rows.unflatten(0, packed.shape[:2]).transpose(1, 2)


def to_int8(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Unpack weights to int8 `[E, N, K]`, in place for 8 bits.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`.
        bits: 2 to 8.
        k: Input features.

    """
    rows = pack_quantized.to_int8(packed.flatten(0, 1), bits, k)
    return rows.unflatten(0, packed.shape[:2])


def pack_int4(stacked: torch.Tensor) -> torch.Tensor:
    """Pack int4 values, stored as int8 `[E, N, K]`, into int32 `[E, N, K / 8]`.

    Raises:
        ValueError: A value is out of int4's range.

    """
    experts, n, k = stacked.shape
    packed = stacked.new_empty((experts, n, k // 8), dtype=torch.int32)
    for values, words in zip(stacked, packed):
        words.copy_(pack_quantized.pack_int4(values))
    return packed


def transpose_(stacked: torch.Tensor) -> torch.Tensor:
    """Transpose contiguous `[E, R, C]` to contiguous `[E, C, R]` in place."""
    experts, rows, columns = stacked.shape
    transposed = stacked.view(experts, columns, rows)
    for old, new in zip(stacked, transposed):
        new.copy_(old.t().contiguous())
    return transposed


def pack_outputs_(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Repack weights that are packed along K into int4 packed along N.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`, N a multiple of 8; overwritten for
            4 bits.
        bits: 2 to 4.
        k: Input features.

    Returns:
        int32 `[E, K, N / 8]`.

    """
    count, n, _ = packed.shape
    shape = count, k, n // 8
    weight = packed.view(shape) if bits == 4 else packed.new_empty(shape)
    for old, new in zip(packed, weight):
        words = pack_quantized.int4_words(old, bits, k)
        new.copy_(int4.pack_outputs(words, n, k, packed.device))
    return weight


def pack_outputs_with_assist(
    packed: torch.Tensor, scale: torch.Tensor, bits: int, weight: torch.Tensor
) -> torch.Tensor:
    """Repack weights that are packed along K, and compute the operator's assist term.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`.
        scale: `[E, N, G]`, rounded as the operator uses it.
        bits: 2 to 4.
        weight: Output, int32 `[E, K, N / 8]`, K a multiple of 8. May share the memory
            of `packed` if that has 4 bits.

    Returns:
        The assist term, fp32 `[E, N]`; see `int4.pack_outputs_with_assist`.

    """
    k = weight.shape[1]
    assist = scale.new_empty(scale.shape[:2], dtype=torch.float32)
    for old, new, of_scale, of_assist in zip(packed, weight, scale, assist):
        words = pack_quantized.int4_words(old, bits, k)
        along_n, sums = int4.pack_outputs_with_assist(words, of_scale, k)
        new.copy_(along_n)
        of_assist.copy_(sums)
        # Free it before the next expert is packed.
        del along_n
    return assist


def to_raw_scale(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert scales to int64 that hold fp32 bits, the form of the grouped W4A8 matmul.

    Rounds to the 10 mantissa bits that the operator uses; it would itself truncate.

    Args:
        scale: `[E, N, G]`.

    Returns:
        int64 `[E, G, N]`, and the rounded scales, fp32 `[E, N, G]`.

    """
    flat = scale.transpose(1, 2).float().contiguous().flatten()
    raw = torch.ops.npu.npu_trans_quant_param(flat, None, 1)
    raw = raw.bitwise_and_(_RAW_BITS).view(scale.transpose(1, 2).shape)
    rounded = raw.to(torch.int32).view(torch.float32).transpose(1, 2)
    return raw, rounded


def to_npu_scale(scale: torch.Tensor) -> torch.Tensor:
    """Transpose scales `[E, N, G]` in place to `[E, G, N]`, or `[E, N]` if G is 1."""
    return scale.squeeze(2) if scale.shape[2] == 1 else transpose_(scale)


def to_npu_offset(
    packed_zero_point: torch.Tensor, bits: int, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """Convert packed zero points to the offsets that the operators add.

    Args:
        packed_zero_point: int32 `[E, ceil(N * bits / 32), G]`.
        bits: 2 to 8.
        n: Output features.
        dtype: dtype of the scales, in which the operators expect the offsets.

    Returns:
        Negated zero points `[E, G, N]`, or `[E, N]` if G is 1.

    """
    experts, _, groups = packed_zero_point.shape
    offset = packed_zero_point.new_empty((experts, groups, n), dtype=dtype)
    for old, new in zip(packed_zero_point, offset):
        new.copy_(pack_quantized.unpack(old.t(), bits, n)).neg_()
    return offset.squeeze(1) if groups == 1 else offset
