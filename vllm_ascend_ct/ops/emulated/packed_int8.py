# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact products by int8 weights with oneDNN, also where it saturates.

Without VNNI, oneDNN's int8 kernels add two products, of neighbours in K, in 16 bits
(its document "Nuances of int8 Computations"). There a weight is split into a part whose
neighbours cannot overflow, whatever they are multiplied by, and a sparse rest.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.float_matmul import EXACT_INTEGERS

# oneDNN gets activations as uint8, and 255 * 128 < 2**15.
_SHIFT = _LARGEST_PAIR = 128
EXTREMES = ((127, 127), (-128, -128), (127, -128))
_BOUNDED = ((127, 1), (-128, 0), (64, 64), (-64, -64))
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

    def product(
        self, x: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply int8 `[M, K]`: fp32 `[M, N]`, exact.

        Args:
            x: Activations.
            scale: fp32 `[N]` to multiply the exact product by.

        """
        x = x.contiguous()
        if self.rest is None:
            return _multiply(x, self.packed, self.size[1], scale)
        result = _multiply(x, self.packed, self.size[1])
        for part, rows in zip(result.split(_ROWS_AT_ONCE), x.split(_ROWS_AT_ONCE)):
            columns = rows.t().contiguous().float()
            part += torch.sparse.mm(self.rest, columns).t()
        return result if scale is None else result.mul_(scale)


def _multiply(
    x: torch.Tensor, packed: torch.Tensor, n: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    ones, zeros = _per_channel(n)
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x.view(torch.uint8) ^ _SHIFT,
        1.0,
        _SHIFT,
        packed,
        ones if scale is None else scale,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return result


@cache
def _per_channel(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that change nothing."""
    return torch.ones(n, device="cpu"), torch.zeros(n, dtype=torch.int64, device="cpu")


def pack(weight: torch.Tensor) -> PackedInt8 | None:
    """Pack an int8 weight `[K, N]`; None if float32 is at least as good for it."""
    k, n = weight.shape
    rows = weight.t()
    if rows.to(torch.int16).abs().sum(1).max() > EXACT_INTEGERS // _SHIFT:
        return None
    if not saturates():
        return PackedInt8(_prepack(rows), None, (k, n))
    if k % 2:
        return None
    bounded, rest = split_pairs(rows.to(torch.int16).reshape(n, -1, 2))
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
def packing_pays() -> bool:
    """Whether this CPU has the instructions that oneDNN's int8 kernels are fast with.

    And whether they are exact with neighbours that just do not overflow.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):
        return False
    return is_exact(_multiply_packed, _BOUNDED)


@cache
def saturates() -> bool:
    """Whether oneDNN is wrong with neighbours of any size, so that they are split."""
    return not is_exact(_multiply_packed, EXTREMES)


def is_exact(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    pairs: tuple[tuple[int, int], ...],
) -> bool:
    """Whether a product is, of few rows and of many, with these neighbours in K."""
    signs = ((127, 127), (-128, -128), (127, -128), (-128, 127))
    x = torch.tensor(signs, dtype=torch.int8).repeat(16, 256)
    rows = torch.tensor(pairs, dtype=torch.int8).repeat(128, 256)
    expected = x.double() @ rows.t().double()
    return all(
        torch.equal(multiply(x[part], weight).double(), expected[part])
        for weight in (rows.t(), rows.t().contiguous())
        for part in (slice(1), slice(1, 2), slice(8), slice(64))
    )


def _multiply_packed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _multiply(x, _prepack(weight.t()), weight.shape[1])
