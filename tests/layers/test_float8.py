# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""FP8 layers that A5 multiplies in FP8, compared with float64."""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.layers.linear import ReplicatedLinear

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    MULTIPLIED,
    activations,
    config_of,
    gate_up_case,
    load,
    load_head,
    qkv_case,
    replicated_case,
    row_case,
    tolerance,
)
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend_fp8 import (
    AscendFP8ScaledMMLinearKernel,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)
from vllm_ascend_ct.quantization.compressed_tensors.resolved import ResolvedMixin
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (  # noqa: E501
    AscendCTW8A8Fp8,
)

CASES = {
    "replicated": replicated_case(512, 96),
    "qkv": qkv_case(256, heads=4, kv_heads=2),
    "gate-up": gate_up_case(384, 320),
    "row": row_case(640, 192),
    # Sizes that are not multiples of anything.
    "odd": replicated_case(301, 37),
}

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_output_is_the_formula(
    scheme: str, case: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(CASES[case], scheme, dtype, bias)
    assert type(layer.quant_method) is AscendCTLinearMethod
    assert type(layer.scheme) is AscendCTW8A8Fp8
    assert type(layer.scheme.kernel) is AscendFP8ScaledMMLinearKernel
    assert layer.weight.dtype == torch.float8_e4m3fn
    for shape in ((20,), (1,), (2, 3)):
        x = activations(20, CASES[case].k, dtype)[: torch.Size(shape).numel()]
        x = formulas[0].without_ties(x).view(*shape, -1)
        expected = torch.cat([formula(x) for formula in formulas], dim=-1)
        y = layer(x)[0]
        assert y.dtype == dtype and y.shape == expected.shape
        assert relative_error(y, expected) < tolerance(scheme, dtype)


def test_activations_are_quantized() -> None:
    """FP8 inputs differ from 16-bit inputs by ten times the tolerance."""
    layer, (formula,) = load(CASES["row"], MULTIPLIED[0], torch.float16, False)
    x = activations(20, CASES["row"].k, torch.float16)
    formula.input_args = None
    error = relative_error(layer(x)[0], formula(x))
    assert error > 10 * tolerance(MULTIPLIED[0], torch.float16)


@pytest.mark.parametrize(
    "scheme", ["fp8-tensor-static", "fp8-channel-a16", "fp8-block", "mxfp8", "nvfp4"]
)
def test_others_are_resolved(scheme: str) -> None:
    layer, _ = load(CASES["row"], scheme, torch.bfloat16, False)
    assert isinstance(layer.quant_method, ResolvedMixin)


@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_what_is_no_linear_layer_is_resolved(scheme: str) -> None:
    head, formula = load_head(1008, 256, scheme, torch.bfloat16)
    assert isinstance(head.quant_method, ResolvedMixin)
    x = activations(7, 256, torch.bfloat16)
    y = head.quant_method.apply(head, x)[:, :1008]
    assert relative_error(y, formula(x)) < tolerance(scheme, torch.bfloat16)


def layer_of(prefix: str, **options: Any) -> ReplicatedLinear:
    options = {"params_dtype": torch.bfloat16, **options}
    config = config_of("re:.*", MULTIPLIED[0])
    k, n = options.pop("k", 256), options.pop("n", 64)
    return ReplicatedLinear(k, n, quant_config=config, prefix=prefix, **options)


def test_a_weight_that_attention_reads_is_resolved() -> None:
    layer = layer_of("model.layers.0.self_attn.kv_b_proj")
    assert isinstance(layer.quant_method, ResolvedMixin)


@pytest.mark.parametrize("soc", ["A2", "A3", "310P"])
def test_other_chips_resolve(monkeypatch: pytest.MonkeyPatch, soc: str) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    layer = layer_of("fc", params_dtype=torch.float16)
    assert isinstance(layer.quant_method, ResolvedMixin)


def test_resolving_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_RESOLVE", "0")
    assert type(layer_of("fc").quant_method) is AscendCTLinearMethod


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"k": 65536, "n": 8}, "inner axis of size 65536; supported: 1 to 65535"),
        ({"k": 8, "n": 65536}, "inner axis of size 65536; supported: 1 to 65535"),
        ({"params_dtype": torch.float32}, "x dtype torch.float32"),
    ],
)
def test_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        layer_of("fc", **options)


def test_nothing_is_warned_of(mocker: MockerFixture) -> None:
    from vllm_ascend_ct.quantization.compressed_tensors import resolving

    warning = mocker.patch.object(resolving.logger, "warning_once")
    layer_of("fc")
    assert not warning.called
