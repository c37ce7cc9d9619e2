# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layouts of experts' weights, which lie one behind the other: `[E, N, K]`.

What keeps its size is rewritten in its own memory, one expert at a time, so that beside
a layer there is never more than one expert.
"""

import torch

from vllm_ascend_ct.weights import int4, pack_quantized

_RAW_BITS = 0xFFFFFFFF


def to_weight_only(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Turn packed weights into the weight-only operator's.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`; of 4 and 8 bits it is overwritten.
        bits: 2 to 8.
        k: Input features; for up to 4 bits a multiple of 8.

    Returns:
        A transposed view: int32 `[E, K / 8, N]` for up to 4 bits, else int8
        `[E, K, N]`.

    """
    rows = pack_quantized.to_npu_weight(packed.flatten(0, 1), bits, k).t()
    return rows.unflatten(0, packed.shape[:2]).transpose(1, 2)


def to_int8(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Turn packed weights into int8 `[E, N, K]`, in their own memory for 8 bits."""
    rows = pack_quantized.to_int8(packed.flatten(0, 1), bits, k)
    return rows.unflatten(0, packed.shape[:2])


def pack_int4(stacked: torch.Tensor) -> torch.Tensor:
    """Pack int4 values, each in an int8 of `[E, N, K]`: int32 `[E, N, K / 8]`.

    Raises:
        ValueError: A value is no int4.

    """
    experts, n, k = stacked.shape
    packed = stacked.new_empty((experts, n, k // 8), dtype=torch.int32)
    for values, words in zip(stacked, packed):
        words.copy_(pack_quantized.pack_int4(values))
    return packed


def transpose_(stacked: torch.Tensor) -> torch.Tensor:
    """Turn contiguous `[E, R, C]` into contiguous `[E, C, R]` in the same memory."""
    experts, rows, columns = stacked.shape
    transposed = stacked.view(experts, columns, rows)
    for old, new in zip(stacked, transposed):
        new.copy_(old.t().contiguous())
    return transposed


def pack_outputs_(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Pack along N what is packed along K: int32 `[E, K, N / 8]`.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`, N a multiple of 8; of 4 bits it is
            overwritten.
        bits: 2 to 4.
        k: Input features.

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
    """Pack along N what is packed along K, with what halving activations needs.

    Args:
        packed: int32 `[E, N, ceil(K * bits / 32)]`.
        scale: `[E, N, G]`, as the operator uses it.
        bits: 2 to 4.
        weight: int32 `[E, K, N / 8]`, K a multiple of 8: what to write to. It may be in
            the memory of packed 4-bit weights.

    Returns:
        fp32 `[E, N]` as of `int4.pack_outputs_with_assist`.

    """
    k = weight.shape[1]
    assist = scale.new_empty(scale.shape[:2], dtype=torch.float32)
    for old, new, of_scale, of_assist in zip(packed, weight, scale, assist):
        words = pack_quantized.int4_words(old, bits, k)
        along_n, sums = int4.pack_outputs_with_assist(words, of_scale, k)
        new.copy_(along_n)
        of_assist.copy_(sums)
        # Or there would be two of them while the next is packed.
        del along_n
    return assist


def to_raw_scale(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn scales into fp32 bits in int64, as grouped int4 products read them.

    Rounded to the 10 mantissa bits that the operator keeps; it would truncate.

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
    """Turn scales `[E, N, G]` into `[E, G, N]`, or `[E, N]` for one group.

    In their own memory.
    """
    return scale.squeeze(2) if scale.shape[2] == 1 else transpose_(scale)


def to_npu_offset(
    packed_zero_point: torch.Tensor, bits: int, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """Turn packed zero points into the offsets that the operators add.

    Args:
        packed_zero_point: int32 `[E, ceil(N * bits / 32), G]`.
        bits: 2 to 8.
        n: Output features.
        dtype: Of the scales.

    Returns:
        Negated zero points `[E, G, N]`, or `[E, N]` for one group.

    """
    experts, _, groups = packed_zero_point.shape
    offset = packed_zero_point.new_empty((experts, groups, n), dtype=dtype)
    for old, new in zip(packed_zero_point, offset):
        new.copy_(pack_quantized.unpack(old.t(), bits, n)).neg_()
    return offset.squeeze(1) if groups == 1 else offset
