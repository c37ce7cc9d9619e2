# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact products of integers on CPU, by what is fast with its instructions.

Those are asked for and not measured, so a process does what the others do.
"""

from collections.abc import Iterable
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.float_matmul import EXACT_INTEGERS, float_matmul
from vllm_ascend_ct.ops.emulated.packed_int8 import (
    EXTREMES,
    PackedInt8,
    is_exact,
    pack,
    packing_pays,
)
from vllm_ascend_ct.ops.emulated.weights import unpack_int4

_PACKED_K = 4096
# torch's int8 matmul packs a weight at each call, but for one row of a transposed one.
# That costs less than a call of oneDNN's if the weight is no larger than this.
_PACKED_AT_ONCE = 1 << 20


class Blocks(list[PackedInt8 | torch.Tensor]):
    """An integer weight in blocks of K, each packed or an int8 tensor."""

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self)


def int_matmul(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 `[M, K]` and a weight `[K, N]`.

    Where CPUs are slow with the weight as it is, a packed one is kept, of one byte a
    value and little more.

    Returns:
        int32, or float32 that holds the same integers.

    """
    blocks = _blocks(x1, x2)
    if len(blocks) == 1:
        return _product(x1, blocks[0], bits=8)
    return _sum(map(_product, x1.split(_PACKED_K, dim=1), blocks))


def scaled_int_matmul(
    x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Multiply the exact product, in fp32, by an fp32 scale `[N]` or `[1]`."""
    blocks = _blocks(x1, x2)
    if len(blocks) == 1 and len(scale) == x2.shape[1]:
        (block,) = blocks
        if isinstance(block, PackedInt8):
            return block.product(x1, scale)
        return _product(x1, block, bits=8) * scale
    return int_matmul(x1, x2) * scale


def int4_products(
    x1: torch.Tensor, x2: torch.Tensor, group_size: int
) -> Iterable[torch.Tensor]:
    """Exact products of int4 `[M, K]`, as int8, and a weight, in groups of K.

    Args:
        x1: Values in [-8, 7].
        x2: int32 `[K, N / 8]`; kept as int8.
        group_size: The K of each product.

    Yields:
        `[M, N]`, as `int_matmul`.

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
    """What to multiply parts of K by."""
    blocks = None
    if packing_pays() and not _takes_int_mm(len(x), weight):
        size = weight.numel()
        blocks = derived.get("int8", [weight], size, lambda: _packed_int8(weight))
    return blocks or Blocks([weight])


def _packed_int8(weight: torch.Tensor) -> Blocks:
    blocks = list(map(pack, weight.split(_PACKED_K)))
    # Of what cannot be packed nothing is kept: it would keep the weight alive.
    packed = [block for block in blocks if block is not None]
    return Blocks(packed if len(packed) == len(blocks) else ())


def _product(
    x: torch.Tensor, weight: PackedInt8 | torch.Tensor, bits: int = 8
) -> torch.Tensor:
    """Multiply by one block; `bits` is what all values fit into."""
    if isinstance(weight, PackedInt8):
        return weight.product(x)
    # Of one value a row, torch's leaves results unwritten.
    if weight.shape[0] > 1 and int_mm_is_fast():
        return torch._int_mm(x.contiguous(), weight)
    # So much of K at once that float32 rounds no sum.
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
    """Whether torch's int8 matmul is better than with a packed weight."""
    one_row = rows == 1 and weight.stride(0) == 1
    return (one_row or weight.numel() <= _PACKED_AT_ONCE) and int_mm_is_fast()


@cache
def int_mm_is_fast() -> bool:
    """Whether torch's int8 matmul has the instructions that it is fast with.

    And whether it is exact: without them it adds pairs of products in 16 bits.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    return is_exact(torch._int_mm, EXTREMES)
