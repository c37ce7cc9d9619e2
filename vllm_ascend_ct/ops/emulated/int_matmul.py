# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact products of integers on CPU, by what is fast on this one.

That is measured once a process, and changes no number.
"""

from collections.abc import Iterable
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.derived import derived
from vllm_ascend_ct.ops.emulated.float_matmul import (
    EXACT_INTEGERS,
    float_matmul,
    is_faster,
)
from vllm_ascend_ct.ops.emulated.packed_int8 import PackedInt8, pack, packing_pays
from vllm_ascend_ct.ops.emulated.weights import unpack_int4

# What is fast with one row, which is bound by reading the weight, and with more.
_ONE_ROW, _MORE_ROWS = 1, 64
_PACKED_K = 4096


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
    blocks = None
    if not _prefers_int_mm(_rows(x1)) and packing_pays(_rows(x1)):
        blocks = derived.get("int8", [x2], x2.numel(), lambda: _packed_int8(x2))
    if not blocks:
        return _product(x1, x2, bits=8)
    if len(blocks) == 1:
        return _product(x1, blocks[0], bits=8)
    products = map(_product, x1.split(_PACKED_K, dim=1), blocks)
    return _sum(products)


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
        if _prefers_int_mm(_MORE_ROWS) or not packing_pays(_MORE_ROWS):
            return Blocks(groups)
        return Blocks(pack(group) or group for group in groups)

    size = x2.numel() * 8
    kept = derived.get(("int4", group_size), [x2], size, blocks)
    for x, block in zip(x1.split(group_size, dim=1), kept or blocks()):
        yield _product(x, block, bits=4)


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
    if _prefers_int_mm(_rows(x)):
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


def _rows(x: torch.Tensor) -> int:
    return _ONE_ROW if len(x) == 1 else _MORE_ROWS


@cache
def _prefers_int_mm(rows: int) -> bool:
    """Whether torch's int8 matmul is exact here, and faster than float32.

    Without VNNI it has no fast kernel, or one that adds pairs of products in 16 bits.
    """
    x1 = torch.full((rows, 512), -128, dtype=torch.int8)
    x2 = torch.full((512, 512), 127, dtype=torch.int8).t()
    x2[1::2] = -128
    if not torch.equal(torch._int_mm(x1, x2).double(), x1.double() @ x2.double()):
        return False
    return is_faster(lambda: torch._int_mm(x1, x2), lambda: float_matmul(x1, x2))
