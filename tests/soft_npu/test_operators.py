# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Operators of the software NPU beside PyTorch's on the CPU."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.soft_npu
SHARED = torch.ones(5, 7, dtype=torch.bool).tril(1)
OPTIONS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "causal": {"is_causal": True},
    "one mask": {"attn_mask": SHARED},
    "two masks": {"attn_mask": torch.stack((SHARED, ~SHARED.flip(0))).unsqueeze(1)},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_pytorch(name: str, dtype: torch.dtype) -> None:
    """torch_npu calls `npu_fusion_attention_v3` for it."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if name == "grouped heads" else 4
    sizes = ((2, 4, 5, 64), (2, heads, 7, 64), (2, heads, 7, 64))
    given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    options = OPTIONS[name]
    on_npu = {k: x.npu() if torch.is_tensor(x) else x for k, x in options.items()}
    expected = scaled_dot_product_attention(*(x.double() for x in given), **options)
    result = scaled_dot_product_attention(*(x.npu() for x in given), **on_npu).cpu()
    # fp32 arithmetic on values of order 1, then one rounding of the result.
    rtol = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=1e-6)
