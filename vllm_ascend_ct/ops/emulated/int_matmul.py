# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Exact integer products on CPU."""

from functools import cache

import torch


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch's int8 matmul keeps all 32 bits on this CPU.

    Without VNNI the library may add pairs of products in 16 bits.
    """
    x1 = torch.full((2, 256), -128, dtype=torch.int8)
    x2 = torch.full((256, 16), 127, dtype=torch.int8)
    x2[1::2] = -128
    exact = x1.double() @ x2.double()
    return torch.equal(torch._int_mm(x1, x2).double(), exact)


def int_matmul(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Exact int32 product of int8 `[M, K]` and `[K, N]`."""
    if _int_mm_is_exact():
        return torch._int_mm(x1, x2)
    return (x1.double() @ x2.double()).to(torch.int32)
