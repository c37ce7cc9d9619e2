# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch
from pytest_mock import MockerFixture

from vllm_ascend_ct.weights.int_quantized import (
    int32_bias,
    to_npu_weight,
    weight_sum,
)

N, K = 12, 256


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-128, 128, (N, K), dtype=torch.int8)


@pytest.mark.parametrize(
    ("nz", "transposed_nz", "strides"),
    [(False, False, (1, K)), (True, False, (N, 1)), (True, True, (1, K))],
)
def test_layouts(
    mocker: MockerFixture,
    weight: torch.Tensor,
    nz: bool,
    transposed_nz: bool,
    strides: tuple[int, int],
) -> None:
    cast = mocker.spy(torch.ops.npu, "npu_format_cast")
    npu_weight = to_npu_weight(weight, nz, transposed_nz)
    assert torch.equal(npu_weight, weight.t())
    assert npu_weight.stride() == strides
    assert [call.args[1] for call in cast.call_args_list] == [29] * nz
    assert (npu_weight.data_ptr() == weight.data_ptr()) is not nz


def test_weight_sum_is_exact() -> None:
    weight = torch.full((2, 70000), -128, dtype=torch.int8)
    assert weight_sum(weight).tolist() == [-128 * 70000] * 2
    assert weight_sum(weight).dtype == torch.int32


def test_bias_is_within_half_a_step() -> None:
    scale, bias = torch.rand(N) * 1e-4 + 1e-5, torch.randn(N)
    share = torch.randint(-(2**24), 2**24, (N,), dtype=torch.int32)
    folded = int32_bias(share, bias, scale)
    assert folded is not None and folded.dtype == torch.int32
    restored = (folded - share) * scale.double()
    assert ((restored - bias.double()).abs() <= 0.5 * scale).all()


def test_nothing_to_fold() -> None:
    share = torch.ones(N, dtype=torch.int32)
    assert int32_bias(share, None, torch.rand(N)) is share
    assert int32_bias(None, None, torch.rand(N)) is None


@pytest.mark.parametrize("bias", [2.0**31, float("inf"), float("nan")])
def test_bias_that_does_not_fit(bias: float) -> None:
    with pytest.raises(ValueError, match="reaches .* supported up to 1073741824"):
        int32_bias(None, torch.full((N,), bias), torch.ones(N))
