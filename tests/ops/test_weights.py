# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch

from vllm_ascend_ct.ops.emulated.weights import (
    truncate_to_fp19,
    unpack_int4,
    unpack_quant_param,
)


def test_int4pack_puts_the_first_value_lowest() -> None:
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int32)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(weight)
    assert packed.dtype == torch.int32
    assert packed.item() & 0xFFFFFFFF == 0x87654321


def test_int4pack_round_trip() -> None:
    weight = torch.randint(-8, 8, (24, 64), dtype=torch.int32)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(weight)
    assert packed.shape == (24, 8)
    assert torch.equal(unpack_int4(packed), weight.to(torch.int8))


def test_trans_quant_param() -> None:
    scale = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-11 + 2**-20, 3e-5])
    offset = torch.tensor([0.0, -3.4, 300.0, -300.0])
    packed = torch.ops.npu.npu_trans_quant_param(scale)
    assert (packed >> 46 & 1).all()
    assert packed[0].item() == 0x3F800000 | 1 << 46
    assert torch.equal(unpack_quant_param(packed)[0], truncate_to_fp19(scale))
    assert unpack_quant_param(packed)[0][2].item() == 1.0
    with_offset = torch.ops.npu.npu_trans_quant_param(scale, offset)
    assert unpack_quant_param(with_offset)[1].tolist() == [0, -3, 255, -256]


def test_trans_quant_param_rounds_on_demand() -> None:
    ulp = 2.0**-10
    scale = torch.tensor([1 + 0.4 * ulp, 1 + 0.6 * ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp])
    packed = torch.ops.npu.npu_trans_quant_param(scale, None, 1)
    expected = [1, 1 + ulp, 1, 1 + 2 * ulp]
    assert unpack_quant_param(packed)[0].tolist() == expected


@pytest.mark.parametrize("acl_format", [2, 29])
def test_format_cast_keeps_values(acl_format: int) -> None:
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    cast = torch.ops.npu.npu_format_cast(weight.t(), acl_format)
    assert torch.equal(cast, weight.t())
    assert cast.data_ptr() != weight.data_ptr()
