# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest
import torch

from vllm_ascend_ct.errors import OperatorLimitError
from vllm_ascend_ct.ops.emulated.quantize import AT_ONCE

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@DTYPES
def test_dynamic_quant(dtype: torch.dtype) -> None:
    x = torch.randn(7, 3, 96).to(dtype)
    q, scale = torch.ops.npu.npu_dynamic_quant(x)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert scale.shape == (7, 3)
    amax = x.double().abs().amax(-1)
    torch.testing.assert_close(scale.double(), amax / 127, rtol=2**-22, atol=0)
    exact = x.double() * (127 / amax).unsqueeze(-1)
    assert (q - exact).abs().max() <= 0.5 + 1e-4
    assert (q.abs().amax(-1) == 127).all()


def test_dynamic_quant_rounds_half_to_even() -> None:
    # With amax 127, the quotients are the values themselves.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]).half()
    q, _ = torch.ops.npu.npu_dynamic_quant(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_dynamic_quant_of_zeros() -> None:
    q, scale = torch.ops.npu.npu_dynamic_quant(torch.zeros(2, 8).half())
    assert not q.any() and not scale.any()


def test_dynamic_quant_smooths_first() -> None:
    x, smooth = torch.randn(4, 32).half(), (torch.rand(32) + 0.5).half()
    smoothed = torch.ops.npu.npu_dynamic_quant(x, smooth_scales=smooth)
    # The product is not rounded to fp16, so the scales agree only to fp16.
    reference = torch.ops.npu.npu_dynamic_quant(x * smooth)
    torch.testing.assert_close(smoothed[1], reference[1], rtol=2**-10, atol=0)
    assert (smoothed[0].int() - reference[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("soc", "expected"), [("A2", [127, 0, 2, 2]), ("310P", [127, 1, 2, 3])]
)
def test_chips_round_differently(
    monkeypatch: pytest.MonkeyPatch, soc: str, expected: list[int]
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, 2.5])
    q, _ = torch.ops.npu.npu_dynamic_quant(x.half())
    assert q[0, :4].tolist() == expected


@DTYPES
def test_dynamic_quant_asymmetric(dtype: torch.dtype) -> None:
    x = (torch.randn(9, 96) * 2 + 1).to(dtype)
    q, scale, offset = torch.ops.npu.npu_dynamic_quant_asymmetric(x)
    low, high = x.double().aminmax(dim=-1)
    torch.testing.assert_close(scale.double(), (high - low) / 255, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        offset.double(), 127 - high * 255 / (high - low), rtol=1e-5, atol=1e-3
    )
    dequantized = (q - offset.unsqueeze(1)) * scale.unsqueeze(1)
    assert ((dequantized - x.float()).abs() / scale.unsqueeze(1)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"])
def test_rows_are_independent(name: str) -> None:
    """Also of an input that is quantized in parts, the last of them smaller."""
    x = torch.randn(3, 100, 2048).bfloat16()
    assert x[0].numel() <= AT_ONCE < x.numel()
    operator, smooth = getattr(torch.ops.npu, name), torch.rand(2048).bfloat16()
    together = operator(x, smooth_scales=smooth)
    alone = [operator(part, smooth_scales=smooth) for part in x]
    for result, parts in zip(together, zip(*alone), strict=True):
        assert torch.equal(result, torch.stack(parts))


@DTYPES
@pytest.mark.parametrize("zero_point", [None, -7])
def test_static_quantize(dtype: torch.dtype, zero_point: int | None) -> None:
    x, scale = (torch.randn(6, 64) * 3).to(dtype), torch.tensor([0.03])
    zero_points = None
    if zero_point is not None:
        zero_points = torch.tensor([zero_point], dtype=torch.int32)
    q = torch.ops.npu.npu_quantize(x, scale, zero_points, torch.qint8, -1, True)
    exact = (x.double() / scale.double() + (zero_point or 0)).clamp(-128, 127)
    assert q.dtype == torch.int8
    assert (q - exact).abs().max() <= 0.5 + 1e-4
    assert {q.min().item(), q.max().item()} == {-128, 127}


def test_static_quantize_multiplies_without_div_mode() -> None:
    x, scale = torch.randn(6, 64).half(), torch.rand(64).half() * 30
    q = torch.ops.npu.npu_quantize(x, scale, None, torch.qint8, -1, False)
    exact = (x.double() * scale.double()).clamp(-128, 127)
    assert (q - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("soc", "message"),
    [("310P", "does not have this operator"), ("A2", "float32")],
)
def test_asymmetric_limits(
    monkeypatch: pytest.MonkeyPatch, soc: str, message: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    with pytest.raises(OperatorLimitError, match=message):
        torch.ops.npu.npu_dynamic_quant_asymmetric(torch.ones(2, 32))
