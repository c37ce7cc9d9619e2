# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from tools.bench.memory import TensorMemory
from tools.checkpoints.dequantize import unpack_dense
from tools.checkpoints.make_checkpoint import pack_dense
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.weights import int4
from vllm_ascend_ct.weights.pack_quantized import (
    to_npu_offset,
    to_npu_scale,
    to_npu_weight,
    unpack,
)

N, K, GROUPS = 48, 128, 4
BITS = pytest.mark.parametrize("bits", range(2, 9))
IN_PLACE = pytest.mark.parametrize("bits", [4, 8])


def random_integers(bits: int, *shape: int) -> torch.Tensor:
    """All values, followed by random ones."""
    bound = 1 << (bits - 1)
    values = torch.randint(-bound, bound, shape, dtype=torch.int8)
    every = torch.arange(-bound, bound, dtype=torch.int8)
    values.view(-1)[: len(every)] = every[: values.numel()]
    return values


@BITS
def test_weight_holds_the_integers_of_the_checkpoint(bits: int) -> None:
    integers = random_integers(bits, N, K)
    weight = to_npu_weight(pack_dense(integers, bits), bits, K)
    if bits > 4:
        assert weight.dtype == torch.int8 and weight.shape == (K, N)
        assert torch.equal(weight, integers.t())
    else:
        assert weight.dtype == torch.int32 and weight.shape == (K // 8, N)
        assert torch.equal(unpack_int4(weight.t()), integers)


def test_int4_weight_is_what_the_operator_packs() -> None:
    """Bit-identical to npu_convert_weight_to_int4pack of the unpacked weight."""
    integers = random_integers(4, N, K)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(integers.int())
    assert torch.equal(to_npu_weight(pack_to_int32(integers, 4), 4, K).t(), packed)


@IN_PLACE
def test_nothing_is_copied(bits: int) -> None:
    packed = pack_to_int32(random_integers(bits, N, K), bits)
    scale = torch.rand(N, GROUPS)
    with TensorMemory() as memory:
        weight = to_npu_weight(packed, bits, K)
        npu_scale = to_npu_scale(scale)
    assert memory.peak == 0
    assert weight.data_ptr() == packed.data_ptr()
    assert npu_scale.data_ptr() == scale.data_ptr()
    assert weight.stride(0) == 1 and npu_scale.stride() == (1, GROUPS)


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offset_is_the_negated_zero_point(bits: int, dtype: torch.dtype) -> None:
    zero_points = random_integers(bits, N, GROUPS)
    scale = torch.rand(N, GROUPS).to(dtype)
    packed = pack_dense(zero_points.t(), bits).t()
    offset = to_npu_offset(packed, scale, bits)
    assert offset.dtype == dtype
    assert offset.shape == (GROUPS, N) and offset.stride() == (1, GROUPS)
    assert torch.equal(offset, -zero_points.t().to(dtype))


def test_operator_computes_the_checkpoint_formula() -> None:
    """(q - zero_point) * scale, with q from the checkpoint."""
    integers, zero_points = random_integers(4, N, K), random_integers(4, N, GROUPS)
    scale = torch.rand(N, GROUPS).bfloat16()
    result = torch.ops.npu.npu_weight_quant_batchmatmul(
        torch.eye(K).bfloat16(),
        to_npu_weight(pack_to_int32(integers, 4), 4, K),
        to_npu_scale(scale),
        to_npu_offset(pack_to_int32(zero_points, 4, packed_dim=0), scale, 4),
        antiquant_group_size=K // GROUPS,
    )
    shifted = integers.view(N, GROUPS, -1).int() - zero_points.int().unsqueeze(-1)
    expected = (shifted * scale.float().unsqueeze(-1)).view(N, K).t()
    assert torch.equal(result, expected.bfloat16())


@BITS
@pytest.mark.parametrize("size", [32, 96, 100, 1])
def test_rows_of_any_length_are_unpacked(bits: int, size: int) -> None:
    integers = random_integers(bits, 5, size)
    packed = pack_dense(integers, bits)
    assert packed.shape == (5, math.ceil(size * bits / 32))
    assert torch.equal(unpack_dense(packed, bits, size), integers.long())
    assert torch.equal(unpack(packed, bits, size), integers)


@IN_PLACE
def test_no_gaps_is_what_the_library_packs(bits: int) -> None:
    integers = random_integers(bits, N, K)
    assert torch.equal(pack_dense(integers, bits), pack_to_int32(integers, bits))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_widening_keeps_some_rows_in_memory(bits: int) -> None:
    n, k = 4096, 512
    packed = torch.randint(-(2**31), 2**31, (n, k * bits // 32), dtype=torch.int32)
    with TensorMemory() as memory:
        weight = to_npu_weight(packed, bits, k)
    rows_at_once = 8 * int4.ROWS_AT_ONCE * k
    assert memory.peak <= weight.nbytes + rows_at_once
