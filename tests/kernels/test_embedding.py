# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch

from vllm_ascend_ct.kernels.embedding import dequantized_rows
from vllm_ascend_ct.weights import int4

N, K, G = 40, 64, 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("groups", [1, G])
def test_rows_are_the_formula(bits: int, asymmetric: bool, groups: int) -> None:
    bound = 1 << (bits - 1)
    integers = torch.randint(-bound, bound, (N, K), dtype=torch.int8)
    scale = torch.rand(N, groups).bfloat16()
    offset = torch.randint(-bound, bound, (N, groups)).bfloat16()
    ids = torch.tensor([[0, N - 1, 3], [7, 7, 12]])
    rows = dequantized_rows(
        ids,
        (int4.pack(integers) if bits == 4 else integers).t(),
        scale.t(),
        offset.t() if asymmetric else None,
    )
    grouped = integers.double().view(N, groups, -1)
    if asymmetric:
        grouped = grouped + offset.double().unsqueeze(-1)
    expected = (grouped * scale.double().unsqueeze(-1)).view(N, K)[ids]
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, expected.bfloat16())
