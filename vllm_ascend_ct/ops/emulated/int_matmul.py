# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact integer matmul on CPU, by the method that is fast with its instruction set.

The choice depends on the CPU's features and not on measurements, so that all processes
on a machine choose the same.
"""

from collections.abc import Iterable
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.float_matmul import EXACT_INTEGERS, float_matmul
from vllm_ascend_ct.ops.emulated.packed_int8 import (
    EXTREMES,
    PackedInt8,
    block_size,
    is_exact,
    pack,
    packing_pays,
)
from vllm_ascend_ct.ops.emulated.scaled_int8 import ScaledInt8, packs_scaled
from vllm_ascend_ct.ops.emulated.weights import unpack_int4

# torch's int8 matmul packs the weight in each call, except for one row by a transposed
# weight. Up to this many values, packing is cheaper than a call of oneDNN's matmul.
_PACKED_AT_ONCE = 1 << 20


class Blocks(list[PackedInt8 | torch.Tensor]):
    """An integer weight split along K into blocks, each packed or an int8 tensor."""

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self)


def int_matmul(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 matrices.

    If the CPU is slow with an unpacked weight, a packed copy is cached, which takes
    little more than one byte per value.

    Args:
        x1: int8 `[M, K]`.
        x2: The weight, int8 `[K, N]`.

    Returns:
        `[M, N]`, int32, or float32 that holds the same integers.

    """
    blocks = _blocks(x1, x2)
    if len(blocks) == 1:
        return _product(x1, blocks[0], bits=8)
    return _sum(map(_product, x1.split(block_size(), dim=1), blocks))


def scaled_int_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply the exact product by scales in fp32, each step rounded.

    If the CPU has one call for all of it, a packed copy of the weight is cached, of one
    byte per value.

    Args:
        x1: int8 `[M, K]`.
        x2: The weight, int8 `[K, N]`.
        scale: fp32 `[N]` or `[1]`.
        row_scale: fp32 `[M]`, to multiply by after `scale`.
        dtype: Output dtype.

    Returns:
        `[M, N]` of `dtype`.

    """
    if len(scale) == x2.shape[1] and (packed := _scaled(x1, x2, dtype)):
        return packed.product(x1, scale, row_scale)
    blocks = _blocks(x1, x2)
    if len(blocks) == 1 and len(scale) == x2.shape[1]:
        (block,) = blocks
        if isinstance(block, PackedInt8):
            values = block.product(x1, scale)
        else:
            values = _product(x1, block, bits=8) * scale
    else:
        values = int_matmul(x1, x2) * scale
    if row_scale is not None:
        values *= row_scale.unsqueeze(1)
    return values.to(dtype)


def _scaled(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> ScaledInt8 | None:
    """The weight packed for `ScaledInt8`; None if that is not faster or impossible."""
    if not packs_scaled(dtype):
        return None
    size = weight.numel()
    return derived.get(dtype, [weight], size, lambda: ScaledInt8(weight, dtype))


def int4_products(
    x1: torch.Tensor, x2: torch.Tensor, group_size: int
) -> Iterable[torch.Tensor]:
    """Exact products of int4 matrices, one for each group of K.

    Args:
        x1: int8 `[M, K]`, values in [-8, 7].
        x2: The weight, int4 as int32 `[K, N / 8]`; an int8 copy is cached.
        group_size: Elements of K in each product.

    Yields:
        `[M, N]` for each group, dtypes as in `int_matmul`.

    """

    def blocks() -> Blocks:
        groups = unpack_int4(x2).split(group_size)
        if not packing_pays() or _takes_int_mm(2, groups[0]):
            return Blocks(groups)
        return Blocks(pack(group) or group for group in groups)

    size = x2.numel() * 8
    kept = derived.get(("int4", group_size), [x2], size, blocks)
    for x, block in zip(x1.split(group_size, dim=1), kept or blocks()):
        yield _product(x, block, bits=4)


def _blocks(x: torch.Tensor, weight: torch.Tensor) -> Blocks:
    """The weight, packed in blocks of K if that is faster; otherwise as one block."""
    blocks = None
    if packing_pays() and not _takes_int_mm(len(x), weight):
        size = weight.numel()
        blocks = derived.get("int8", [weight], size, lambda: _packed_int8(weight))
    return blocks or Blocks([weight])


def _packed_int8(weight: torch.Tensor) -> Blocks:
    blocks = list(map(pack, weight.split(block_size())))
    # If a block cannot be packed, cache nothing: the block would keep the weight alive.
    packed = [block for block in blocks if block is not None]
    return Blocks(packed if len(packed) == len(blocks) else ())


def _product(
    x: torch.Tensor, weight: PackedInt8 | torch.Tensor, bits: int = 8
) -> torch.Tensor:
    """Multiply by one block of K.

    Args:
        x: int8 `[M, K]`.
        weight: The block, `[K, N]`.
        bits: Width that all values of both fit into.

    """
    if isinstance(weight, PackedInt8):
        return weight.product(x)
    # With K=1, torch's int8 matmul leaves results unwritten.
    if weight.shape[0] > 1 and int_mm_is_fast():
        return torch._int_mm(x.contiguous(), weight)
    # The largest K for which float32 represents every sum exactly.
    size = EXACT_INTEGERS >> 2 * (bits - 1)
    if x.shape[1] <= size:
        return float_matmul(x, weight)
    return _sum(map(float_matmul, x.split(size, dim=1), weight.split(size)))


def _sum(products: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = (product.to(torch.int32) for product in products)
    for other in others:
        first += other
    return first


def _takes_int_mm(rows: int, weight: torch.Tensor) -> bool:
    """Whether torch's int8 matmul is faster than oneDNN's with a packed weight."""
    small = weight.numel() <= _PACKED_AT_ONCE
    packs = rows > 1 or weight.stride(0) != 1
    return (small or not packs) and int_mm_is_fast()


@cache
def int_mm_is_fast() -> bool:
    """Whether torch's int8 matmul is fast and exact on this CPU, which needs VNNI.

    Without VNNI it adds pairs of products in 16 bits, which may saturate.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    return is_exact(torch._int_mm, EXTREMES)
