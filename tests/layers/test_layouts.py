# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The layouts of `VLLM_ASCEND_CT_LAYOUT`, compared with float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearLayerConfig,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import activations, load, row_case, tolerance
from tests.layers.test_linear import QUANTIZED_IN_FLOAT16
from tools.bench.launches import Launches
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)
from vllm_ascend_ct.kernels.parameters import set_parameter
from vllm_ascend_ct.ops import layouts

pytestmark = pytest.mark.usefixtures("single_rank")

ROWS = 40
CASE = row_case(512, 96)
BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
NAMES = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
WEIGHT_ONLY = "npu.npu_weight_quant_batchmatmul"


def error_of(
    scheme: str, dtype: torch.dtype
) -> tuple[float, list[str], torch.nn.Module]:
    """A layer's error compared with float64, its launches, and the layer."""
    layer, (formula,) = load(CASE, scheme, dtype, bias=True)
    x = formula.without_ties(activations(ROWS, CASE.k, dtype))
    with Launches() as launches:
        y, _ = layer(x)
    return relative_error(y, formula(x)), launches.names, layer


@DTYPES
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g128-asym", "w3a16-g64"])
def test_int4_in_groups_transposed(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w4a16-group=transposed")
    error, launches, layer = error_of(scheme, dtype)
    assert layer.weight.shape == (64, 96) and layer.weight.stride() == (1, 64)
    assert launches == [WEIGHT_ONLY] and error < tolerance(scheme, dtype)


@DTYPES
@pytest.mark.parametrize("scheme", ["w4a8-channel", "w3a8-channel-packed"])
def test_int8_by_int4_with_a_repeated_scale(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w4a8-channel=repeated")
    error, launches, layer = error_of(scheme, dtype)
    assert layer.weight_scale.shape == (2, 96) and layer.weight_scale.is_contiguous()
    assert torch.equal(layer.weight_scale[0], layer.weight_scale[1])
    assert launches == ["npu.npu_dynamic_quant", "npu.npu_quant_matmul", "aten.add"]
    assert error < tolerance(scheme, dtype)


def test_inputs_that_are_no_whole_groups_keep_one_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w4a8-channel=repeated")
    layer, _ = load(row_case(384, 96), "w4a8-channel", BF16, bias=False)
    assert layer.weight_scale.shape == (96,)


@DTYPES
@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w8a8-tensor-static-asym"])
def test_static_by_division(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the config's grid exactly, where reciprocals move some integers."""
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w8a8-static=divided")
    error, launches, layer = error_of(scheme, dtype)
    assert layer.input_scale.shape == (1,)
    assert layer.input_scale.dtype == torch.float32
    assert launches == ["npu.npu_quantize", "npu.npu_quant_matmul"]
    assert error < tolerance(scheme, dtype)


@DTYPES
@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w8a8-tensor-static-asym"])
def test_reciprocals_are_near_the_grid(scheme: str, dtype: torch.dtype) -> None:
    layer, (formula,) = load(CASE, scheme, dtype, bias=True)
    assert layer.input_scale.shape == (512,) and layer.input_scale.dtype == dtype
    exact = replace(formula, reciprocal_dtype=None)
    x = activations(ROWS, CASE.k, dtype)
    assert relative_error(layer(x)[0], exact(x)) < 1e-2


@pytest.mark.parametrize(
    "scheme", ["w8a8-channel-dynamic", "w8a8-tensor-dynamic", "w6a8-channel-packed"]
)
def test_quantized_and_multiplied_by_one_operator(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the tolerance of chips that quantize in fp32, unlike the default."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w8a8-dynamic=dequant")
    error, launches, layer = error_of(scheme, FP16)
    assert layer.weight.shape == (96, 512) and layer.weight.is_contiguous()
    assert launches == ["npu.npu_quant_matmul_dequant", "aten.add"]
    assert error < tolerance(scheme, FP16)
    monkeypatch.delenv("VLLM_ASCEND_CT_LAYOUT")
    error, launches, _ = error_of(scheme, FP16)
    assert "npu.npu_quant_matmul" in launches
    assert tolerance(scheme, FP16) < error < QUANTIZED_IN_FLOAT16


def test_what_one_operator_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """If N is not a multiple of 16, the default layout is used."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", "w8a8-dynamic=dequant")
    layer, _ = load(row_case(512, 100), "w8a8-channel-dynamic", FP16, bias=False)
    x = activations(ROWS, 512, FP16)
    with Launches() as launches:
        layer(x)
    assert launches.names == ["npu.npu_dynamic_quant", "npu.npu_quant_matmul"]


@pytest.mark.parametrize(
    ("soc", "value", "reason"),
    [
        ("A2", "w4a16-group=sideways", "A2 .*w4a16-group=sideways"),
        ("A2", "w4a16=transposed", "w4a16=transposed"),
        ("A2", "transposed", "transposed=[)]"),
        ("A2", "w8a8-static=divided,w8a8-dynamic=dequant", "w8a8-dynamic=dequant"),
        ("310P", "w4a16-group=transposed", "310P .*w4a16-group=transposed"),
    ],
)
def test_unknown_names_are_refused(
    soc: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", value)
    with pytest.raises(PlatformError, match=reason) as refusal:
        layouts.requested()
    assert "w8a8-static=reciprocal|divided" in str(refusal.value)
    assert str(refusal.value).endswith("Correct or unset VLLM_ASCEND_CT_LAYOUT.")


@DTYPES
def test_scales_without_a_reciprocal(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's remedy serves them."""
    tiny = torch.finfo(dtype).tiny / 8

    def static(scale: float) -> torch.nn.Module:
        config = Int8ScaledMMLinearLayerConfig(True, True, True)
        kernel = AscendInt8ScaledMMLinearKernel(config, NAMES)
        layer: Any = torch.nn.Module()
        layer.params_dtype, layer.prefix = dtype, "model.layers.3.mlp.up_proj"
        tensors = (torch.ones(8, 32, dtype=torch.int8), torch.ones(8, 1))
        for name, tensor in zip(NAMES, (*tensors, torch.tensor([scale]), None, None)):
            set_parameter(layer, name, tensor)
        kernel.process_weights_after_loading(layer)
        return layer

    with pytest.raises(PlatformError) as refusal:
        static(tiny)
    assert "model.layers.3.mlp.up_proj, input_scale=" in str(refusal.value)
    remedy = "VLLM_ASCEND_CT_LAYOUT=w8a8-static=divided"
    assert str(refusal.value).endswith(f"Set {remedy}.")
    variable, _, value = remedy.partition("=")
    monkeypatch.setenv(variable, value)
    assert static(tiny).input_scale.shape == (1,)
