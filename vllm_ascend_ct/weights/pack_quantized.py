# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""From the `pack-quantized` format to what the weight-only operators read.

On disk a weight is int32 `[N, K * bits / 32]`: consecutive inputs, lowest bits first,
each value stored with 2 ** (bits - 1) added. The operators want two's complement in the
same order, so a layout is a flipped top bit and a transposed view: nothing is widened
and nothing copied. (The operator's document recommends this view for scales per
channel; how fast it is with groups is to be measured on a chip.)
"""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

# The top bit of every value in an int32 word, as a signed number.
_TOP_BITS = {4: 0x88888888 - (1 << 32), 8: 0x80808080 - (1 << 32)}


def to_npu_weight(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Turn a packed weight into an operator's, in its own memory.

    Args:
        packed: int32 `[N, K * bits / 32]`, contiguous; overwritten.
        bits: 4 or 8.

    Returns:
        A transposed view of `packed`: int32 `[K / 8, N]`, or int8 `[K, N]`.

    """
    packed.bitwise_xor_(_TOP_BITS[bits])
    return (packed.view(torch.int8) if bits == 8 else packed).t()


def to_npu_scale(scale: torch.Tensor) -> torch.Tensor:
    """Turn a scale `[N, G]` into the transposed view `[G, N]`."""
    return scale.t()


def to_npu_offset(
    packed_zero_point: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Turn packed zero points into the offsets that the operators add.

    Args:
        packed_zero_point: int32 `[N * bits / 32, G]`.
        scale: `[N, G]`; the operators want the offset in its dtype and layout.
        bits: 4 or 8.

    Returns:
        Transposed view `[G, N]` of the negated zero points.

    """
    zero_point = unpack_from_int32(packed_zero_point, bits, scale.shape, packed_dim=0)
    return zero_point.to(scale.dtype).neg_().contiguous().t()
