# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch

from vllm_ascend_ct.weights.int_quantized import int32_bias, weight_sum

N, K = 12, 256


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-128, 128, (N, K), dtype=torch.int8)


def test_weight_sum_is_exact() -> None:
    weight = torch.full((2, 70000), -128, dtype=torch.int8)
    assert weight_sum(weight).tolist() == [-128 * 70000] * 2
    assert weight_sum(weight).dtype == torch.int32


def test_zero_point_is_exact(weight: torch.Tensor) -> None:
    bias = int32_bias(weight, torch.tensor([-7]), None, torch.rand(N))
    assert bias is not None and bias.dtype == torch.int32
    assert torch.equal(bias, 7 * weight.sum(dim=1))


def test_bias_is_within_half_a_step(weight: torch.Tensor) -> None:
    scale, bias = torch.rand(N) * 1e-4 + 1e-5, torch.randn(N)
    folded = int32_bias(weight, torch.tensor([5]), bias, scale)
    assert folded is not None
    restored = (folded + 5 * weight.sum(dim=1)) * scale.double()
    assert ((restored - bias.double()).abs() <= 0.5 * scale).all()


def test_nothing_to_add(weight: torch.Tensor) -> None:
    assert int32_bias(weight, None, None, torch.rand(N)) is None


@pytest.mark.parametrize("bias", [2.0**31, float("inf"), float("nan")])
def test_bias_that_does_not_fit(weight: torch.Tensor, bias: float) -> None:
    with pytest.raises(ValueError, match="reaches .* supported up to 1073741824"):
        int32_bias(weight, None, torch.full((N,), bias), torch.ones(N))
