# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact products by int8 weights with oneDNN, also where it saturates.

Without VNNI, oneDNN's int8 kernels add two products, of neighbours in K, in 16 bits
(its document "Nuances of int8 Computations"). So a weight is split into a part whose
neighbours cannot overflow, whatever they are multiplied by, and a sparse rest.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.float_matmul import (
    EXACT_INTEGERS,
    float_matmul,
    is_faster,
)

# oneDNN gets activations as uint8, and 255 * 128 < 2**15.
_SHIFT = _LARGEST_PAIR = 128
# Normally distributed weights leave 0.8 % in the rest. From some 10 % on, it alone
# takes as long as all of the product in float32.
_DENSEST_REST = 0.03
# Its product is transposed, which has to happen within the cache.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PackedInt8:
    """An int8 weight `[K, N]` in oneDNN's layout.

    Attributes:
        packed: All of the weight but the rest.
        rest: fp32 `[N, K]` in CSR; None if there is none.
        size: `(K, N)`.

    """

    packed: torch.Tensor
    rest: torch.Tensor | None
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        k, n = self.size
        if self.rest is None:
            return k * n
        parts = (self.rest.crow_indices(), self.rest.col_indices(), self.rest.values())
        return k * n + sum(part.nbytes for part in parts)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply int8 `[M, K]`: fp32 `[M, N]`, exact."""
        n = self.size[1]
        x = x.contiguous()
        result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            x.view(torch.uint8) ^ _SHIFT,
            1.0,
            _SHIFT,
            self.packed,
            torch.ones(n),
            torch.zeros(n, dtype=torch.int64),
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if self.rest is not None:
            for part, rows in zip(result.split(_ROWS_AT_ONCE), x.split(_ROWS_AT_ONCE)):
                columns = rows.t().contiguous().float()
                part += torch.sparse.mm(self.rest, columns).t()
        return result


def pack(weight: torch.Tensor) -> PackedInt8 | None:
    """Pack an int8 weight `[K, N]`; None if float32 is at least as good for it."""
    k, n = weight.shape
    if k % 2:
        return None
    pairs = weight.t().to(torch.int16).reshape(n, -1, 2)
    if pairs.abs().sum((1, 2)).max() > EXACT_INTEGERS // _SHIFT:
        return None
    bounded, rest = split_pairs(pairs)
    density = rest.count_nonzero().item() / weight.numel()
    if density > _DENSEST_REST:
        return None
    packed = _prepack(bounded.flatten(1))
    return PackedInt8(packed, _csr(rest.flatten(1)) if density else None, (k, n))


def split_pairs(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split int16 `[..., 2]`, so that the first part does not overflow; the sum stays.

    Of that, the positive values of a pair add up to 128 at most, so do the negative.
    """
    above = (pairs.clamp(min=0).sum(-1) - _LARGEST_PAIR).clamp_(min=0)
    below = (pairs.clamp(max=0).sum(-1) + _LARGEST_PAIR).clamp_(max=0)
    # Only values of one sign have an excess, and the first alone is more than that.
    excess = (above + below).to(torch.int16)
    rest = torch.stack((excess, torch.zeros_like(excess)), dim=-1)
    return pairs - rest, rest


def _csr(dense: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        wide = dense.float().to_sparse_csr()
        rows, columns = wide.crow_indices().int(), wide.col_indices().int()
        return torch.sparse_csr_tensor(
            rows, columns, wide.values(), wide.shape, check_invariants=False
        )


def _prepack(rows: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor
    packed = torch.ops.onednn.qlinear_prepack(rows.to(torch.int8).contiguous(), None)
    return packed


@cache
def packing_pays(rows: int) -> bool:
    """Whether oneDNN is exact on this CPU, and faster than float32 with so many rows.

    Args:
        rows: At most 64.

    """
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.tensor([-128, 127], dtype=torch.int8).repeat(64, 256)
    x[::2] = x[::2].flip(1)
    x[::4] = 127
    # Neighbours that just do not overflow.
    values = torch.tensor([[127, 1], [-128, 0], [64, 64], [-64, -64]]).repeat(128, 256)
    packed = PackedInt8(_prepack(values), None, (512, 512))
    weight = values.to(torch.int8).t()
    if not torch.equal(packed.product(x).double(), x.double() @ weight.double()):
        return False
    x = x[:rows]
    return is_faster(lambda: packed.product(x), lambda: float_matmul(x, weight))
