# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Experts are repacked like single weights, and in place."""

import pytest
import torch

from tools.bench.memory import TensorMemory
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.weights import experts, int4, pack_quantized

E, N, K, G = 3, 48, 64, 4


def packed_weight(bits: int) -> torch.Tensor:
    words = (E, N, -(-K * bits // 32))
    return torch.randint(-(2**31), 2**31, words, dtype=torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_only(bits: int) -> None:
    packed = packed_weight(bits)
    each = [pack_quantized.to_npu_weight(one.clone(), bits, K) for one in packed]
    weight = experts.to_weight_only(packed, bits, K)
    assert torch.equal(weight, torch.stack(each))
    assert weight.shape == ((E, K // 8, N) if bits <= 4 else (E, K, N))
    assert weight.stride(1) == 1, "the operator wants a transposed view"
    if bits in (4, 8):
        assert weight.data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("bits", range(5, 9))
def test_int8(bits: int) -> None:
    packed = packed_weight(bits)
    each = [pack_quantized.to_int8(one.clone(), bits, K) for one in packed]
    weight = experts.to_int8(packed, bits, K)
    assert weight.dtype == torch.int8 and weight.shape == (E, N, K)
    assert torch.equal(weight, torch.stack(each))


def test_transposed_in_place() -> None:
    stacked = torch.arange(E * N * K).view(E, N, K)
    expected = stacked.transpose(1, 2).clone()
    with TensorMemory() as memory:
        transposed = experts.transpose_(stacked)
    assert torch.equal(transposed, expected) and transposed.is_contiguous()
    assert transposed.data_ptr() == stacked.data_ptr()
    assert memory.peak <= stacked[0].nbytes


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_along_outputs(bits: int, groups: int) -> None:
    packed, scale = packed_weight(bits), torch.rand(E, N, groups)
    values = torch.stack([pack_quantized.unpack(one, bits, K) for one in packed])
    each = [
        int4.pack_outputs_with_assist(
            pack_quantized.int4_words(one, bits, K), of_scale, K
        )
        for one, of_scale in zip(packed, scale)
    ]
    shape = E, K, N // 8
    in_place = bits == 4
    weight = packed.view(shape) if in_place else packed.new_empty(shape)
    assist = experts.pack_outputs_with_assist(packed, scale, bits, weight)
    for expert, (words, sums) in enumerate(each):
        assert torch.equal(weight[expert], words)
        assert torch.equal(assist[expert], sums)
        assert torch.equal(unpack_int4(words), values[expert].t())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_only_along_outputs(bits: int) -> None:
    packed = packed_weight(bits)
    values = torch.stack([pack_quantized.unpack(one, bits, K) for one in packed])
    with TensorMemory() as memory:
        weight = experts.pack_outputs_(packed, bits, K)
    assert weight.is_contiguous()
    for expert, words in enumerate(weight):
        assert torch.equal(unpack_int4(words), values[expert].t())
    in_place = weight.data_ptr() == packed.data_ptr()
    assert in_place is (bits == 4)
    # One packed expert, and one as int8 with what unpacking needs.
    beyond = memory.peak - (0 if in_place else weight.nbytes)
    assert beyond <= weight[0].nbytes + 6 * N * K


def test_raw_scales() -> None:
    """int64 that holds fp32 bits, rounded to the operator's 10 mantissa bits."""
    scale = torch.rand(E, N, G) + 0.5
    raw, rounded = experts.to_raw_scale(scale)
    assert raw.dtype == torch.int64 and raw.shape == (E, G, N) and raw.is_contiguous()
    bits = raw.to(torch.int32)
    assert torch.equal(raw, bits.long()) and not (bits & 0x1FFF).any()
    assert torch.equal(bits.view(torch.float32).transpose(1, 2), rounded)
    error = ((rounded - scale) / scale).abs().max()
    assert 0 < error <= 2**-11, "half a unit in the last of 11 significant bits"


@pytest.mark.parametrize("groups", [1, G])
def test_scales(groups: int) -> None:
    scale = torch.rand(E, N, groups)
    expected = scale.transpose(1, 2).clone()
    npu_scale = experts.to_npu_scale(scale)
    assert torch.equal(npu_scale, expected[:, 0] if groups == 1 else expected)
    assert npu_scale.is_contiguous() and npu_scale.data_ptr() == scale.data_ptr()


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_offsets(bits: int, groups: int) -> None:
    words = (E, -(-N * bits // 32), groups)
    packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int32)
    zero_point = torch.stack(
        [pack_quantized.unpack(one.t(), bits, N) for one in packed]
    )
    offset = experts.to_npu_offset(packed, bits, N, torch.bfloat16)
    assert offset.dtype == torch.bfloat16
    expected = -zero_point.bfloat16()
    assert torch.equal(offset, expected[:, 0] if groups == 1 else expected)
