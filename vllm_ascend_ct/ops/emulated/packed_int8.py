# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact matmul by int8 weights with oneDNN, also on CPUs where it saturates.

Without VNNI, oneDNN's int8 kernels add the products of two neighbours in K in 16 bits
(see "Nuances of int8 Computations" in its documentation). On such CPUs a weight is
split into a dense part, whose neighbours cannot overflow for any activations, and a
sparse rest.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_ascend_ct.ops.emulated.float_matmul import EXACT_INTEGERS

# oneDNN takes activations as uint8, and 255 * 128 < 2**15.
_SHIFT = _LARGEST_PAIR = 128
_LARGEST_SHIFTED = 255
EXTREMES = ((127, 127), (-128, -128), (127, -128))
_BOUNDED = ((127, 1), (-128, 0), (64, 64), (-64, -64))
# Normally distributed weights leave 0.8 % of their values in the rest. From about 10 %,
# multiplying by the rest alone takes as long as the whole matmul in float32.
_DENSEST_REST = 0.03
# Small enough to transpose the rest's product within the CPU's cache.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PackedInt8:
    """An int8 weight `[K, N]` in oneDNN's layout.

    Attributes:
        packed: The dense part of the weight.
        rest: The sparse rest, fp32 `[N, K]` in CSR; None if it is empty.
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
        """Multiply activations by the weight, exactly.

        Args:
            x: int8 `[M, K]`.
            scale: fp32 `[N]` to multiply the exact product by.

        Returns:
            fp32 `[M, N]`.

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
    """Neutral scales and zero points."""
    return (
        torch.ones(n, dtype=torch.float32, device="cpu"),
        torch.zeros(n, dtype=torch.int64, device="cpu"),
    )


def pack(weight: torch.Tensor) -> PackedInt8 | None:
    """Pack an int8 weight `[K, N]`; None if multiplying in float32 is no slower."""
    k, n = weight.shape
    rows = weight.t()
    largest = _SHIFT if shifts_in_int32() else _LARGEST_SHIFTED
    if rows.to(torch.int16).abs().sum(1).max() > EXACT_INTEGERS // largest:
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
    """Split pairs of weights into a part that does not overflow and a rest.

    In the first part the positive values of a pair sum to at most 128, and so do the
    magnitudes of the negative values.

    Args:
        pairs: int16 `[..., 2]`, neighbours in K.

    Returns:
        The bounded part and the rest, which add up to `pairs`.

    """
    above = (pairs.clamp(min=0).sum(-1) - _LARGEST_PAIR).clamp_(min=0)
    below = (pairs.clamp(max=0).sum(-1) + _LARGEST_PAIR).clamp_(max=0)
    # Only two values of the same sign exceed the bound, and the first value is always
    # larger than the excess.
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
    """Whether oneDNN's int8 kernels are fast and exact on this CPU, which needs AVX2.

    Exactness is tested with neighbours that just do not overflow.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):
        return False
    return is_exact(_multiply_packed, _BOUNDED)


@cache
def saturates() -> bool:
    """Whether oneDNN saturates with large neighbours, so that weights must be split."""
    return not is_exact(_multiply_packed, EXTREMES)


@cache
def shifts_in_int32() -> bool:
    """Whether oneDNN takes the shift of the activations off before it rounds to fp32.

    For many rows its AMX kernels round first. Tested with a sum of shifted products
    that fp32 does not represent.
    """
    x = torch.full((4 * _ROWS_AT_ONCE, 2048), 127, dtype=torch.int8, device="cpu")
    x[:, 0] = 126
    rows = torch.tensor(_BOUNDED[:1], dtype=torch.int8, device="cpu").repeat(64, 1024)
    expected = x.double() @ rows.t().double()
    return torch.equal(_multiply_packed(x, rows.t()).double(), expected)


def block_size() -> int:
    """The largest K, a power of 2, for which weights of models can be packed."""
    return 4096 if shifts_in_int32() else 1024


def is_exact(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    pairs: tuple[tuple[int, int], ...],
) -> bool:
    """Test whether a matmul is exact, for few and for many rows.

    Args:
        multiply: Multiplies int8 `[M, K]` by int8 `[K, N]`.
        pairs: Neighbours in K to fill the weight with.

    """
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
