# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch

from tools.bench.memory import TensorMemory
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.weights.int4 import (
    ROWS_AT_ONCE,
    pack,
    pack_inputs,
    pack_outputs_with_assist,
)
from vllm_ascend_ct.weights.int_quantized import int4_rows

# The last block has fewer rows than the others.
N, K = 2 * ROWS_AT_ONCE + 8, 64
CPU = torch.device("cpu")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-8, 8, (N, K), dtype=torch.int8)


def test_along_inputs(weight: torch.Tensor) -> None:
    """Bit-identical to npu_convert_weight_to_int4pack of the unpacked weight."""
    packed = pack_inputs(map(pack, int4_rows(weight)), N, K, CPU)
    expected = torch.ops.npu.npu_convert_weight_to_int4pack(weight.int())
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(("groups", "k"), [(1, K), (4, K), (1, K - 6)])
def test_along_outputs(weight: torch.Tensor, groups: int, k: int) -> None:
    weight, scale = weight[:, :k], torch.rand(N, groups).bfloat16()
    words = map(pack, int4_rows(weight))
    packed, assist = pack_outputs_with_assist(words, scale, k)
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed), weight.t())
    grouped = weight.double().view(N, groups, -1) * scale.double().unsqueeze(-1)
    assert assist.dtype == torch.float32
    torch.testing.assert_close(assist.double(), 8 * grouped.sum((1, 2)))


def test_some_rows_are_in_memory_at_once() -> None:
    weight = torch.zeros(64 * ROWS_AT_ONCE, 256, dtype=torch.int8)
    scale = torch.ones(len(weight), 1)
    with TensorMemory() as memory:
        words = map(pack, int4_rows(weight))
        packed, assist = pack_outputs_with_assist(words, scale, 256)
    rows_at_once = 6 * ROWS_AT_ONCE * 256
    assert memory.peak <= packed.nbytes + 3 * assist.nbytes + rows_at_once


@pytest.mark.parametrize("value", [-9, 8])
def test_what_is_no_int4_is_refused(weight: torch.Tensor, value: int) -> None:
    weight[N - 1, 3] = value
    with pytest.raises(ValueError, match=f"{value}.*supported for 4 bits: -8 to 7"):
        list(int4_rows(weight))
