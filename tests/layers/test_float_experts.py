# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Floating-point experts that A5 multiplies as they are, compared with float64."""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture

from tests.formula import relative_error
from tests.layers.quantized_experts import (
    INT8_TOLERANCE,
    PREFIX,
    WEIGHT_ONLY_TOLERANCE,
    Sizes,
    build,
    compressed_experts,
    factory_needed,
    load,
    routing,
    run,
    tensors_of,
)
from tests.layers.quantized_layers import (
    MULTIPLIED_EXPERTS,
    MULTIPLIED_MX,
    activations,
)
from tests.layers.test_experts import BACK, COPY, GATE, GATES, PRODUCT, SORT
from tools.bench.launches import Launches
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.fused_moe import lora
from vllm_ascend_ct.fused_moe.experts.ascend_float_moe import (
    AscendFp8Experts,
    AscendMxExperts,
)
from vllm_ascend_ct.fused_moe.modular_kernel import ModularAscendMethod
from vllm_ascend_ct.ops.precedents import FUSED_GATE
from vllm_ascend_ct.quantization.compressed_tensors import resolving
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe as methods,
)
from vllm_ascend_ct.quantization.compressed_tensors.resolved import ResolvedMixin

pytestmark = [pytest.mark.usefixtures("single_rank"), factory_needed]

BF16 = torch.bfloat16
SIZES = {
    "8 experts": Sizes(8, hidden=512, intermediate=256, top_k=2),
    # Odd numbers of blocks.
    "odd": Sizes(5, hidden=352, intermediate=160, top_k=3),
}
FEW = Sizes(4, hidden=64, intermediate=64, top_k=2)


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_output_is_the_formula(scheme: str, size: str, dtype: torch.dtype) -> None:
    """If not fused, products are rounded to 16 bits before they are quantized."""
    sizes = SIZES[size]
    runner, formula = load(sizes, scheme, dtype)
    method = runner.routed_experts.quant_method
    assert type(method) is ModularAscendMethod
    is_fp8 = scheme.startswith("fp8")
    assert type(method.experts) is (AscendFp8Experts if is_fp8 else AscendMxExperts)
    is_fused = is_fp8 or size != "odd"
    assert (
        FUSED_GATE in {form.operator for form in method.experts.forms()}
    ) == is_fused
    formula = formula if is_fused else formula.rounded(dtype)
    for batch in (1, 7, 256):
        x = formula.without_ties(activations(batch, sizes.hidden, dtype))
        routed = routing(sizes, batch, seed=batch)
        y = run(runner, x, routed)
        assert y.dtype == dtype and y.shape == x.shape
        assert relative_error(y, formula(x, *routed)) < tolerance(scheme)


def tolerance(scheme: str) -> float:
    """FP8 divides by scales that are no powers of two: ties may round either way."""
    return INT8_TOLERANCE if scheme.startswith("fp8") else WEIGHT_ONLY_TOLERANCE


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_activations_are_quantized(scheme: str) -> None:
    sizes = SIZES["8 experts"]
    runner, formula = load(sizes, scheme, BF16, weight_only=True)
    x, routed = activations(64, sizes.hidden, BF16), routing(sizes, 64)
    error = relative_error(run(runner, x, routed), formula.rounded(BF16)(x, *routed))
    assert error > 2 * tolerance(scheme)


def test_launches() -> None:
    quantize, unfused = "npu.npu_dynamic_mx_quant", "npu.npu_swiglu"
    for size, gate in (
        ("8 experts", [quantize, "aten.cumsum", GATE]),
        ("odd", [quantize, PRODUCT, unfused, quantize]),
    ):
        sizes = SIZES[size]
        runner, _ = load(sizes, "mxfp8", BF16)
        x, routed = activations(7, sizes.hidden, BF16), routing(sizes, 7)
        with Launches() as launches:
            run(runner, x, routed)
        assert launches.names == [SORT, *gate, PRODUCT, BACK, *COPY]


@pytest.mark.parametrize("activation", GATES)
def test_other_activations(activation: str) -> None:
    sizes = SIZES["8 experts"]
    runner, formula = load(sizes, "mxfp8", BF16, activation=activation)
    x, routed = activations(64, sizes.hidden, BF16), routing(sizes, 64)
    expected = formula.rounded(BF16)(x, *routed, activation=GATES[activation])
    assert relative_error(run(runner, x, routed), expected) < 0.02


def method_of(sizes: Sizes, scheme: str, **options: Any) -> Any:
    _, config, _ = compressed_experts(sizes, scheme, BF16)
    return build(sizes, config, BF16, **options).routed_experts.quant_method


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_biases_are_resolved(scheme: str, mocker: MockerFixture) -> None:
    warning = mocker.patch.object(resolving.logger, "warning_once")
    assert isinstance(method_of(FEW, scheme, has_bias=True), ResolvedMixin)
    assert warning.called


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_what_adapters_may_target_is_resolved(
    scheme: str, mocker: MockerFixture
) -> None:
    """Only to unquantized experts can vLLM add adapters."""
    mocker.patch.object(lora, "may_target", return_value=True)
    assert isinstance(method_of(FEW, scheme), ResolvedMixin)


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_what_vllm_ascend_multiplies_is_resolved(
    scheme: str, mocker: MockerFixture
) -> None:
    mocker.patch.object(methods, "are_experts_multiplied", return_value=False)
    assert isinstance(method_of(FEW, scheme), ResolvedMixin)


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
def test_nothing_is_warned_of(scheme: str, mocker: MockerFixture) -> None:
    warning = mocker.patch.object(resolving.logger, "warning_once")
    assert not isinstance(method_of(FEW, scheme), ResolvedMixin)
    assert not warning.called


@pytest.mark.parametrize("scheme", MULTIPLIED_MX)
def test_exponents_may_have_their_own_dtype(scheme: str) -> None:
    modules, config, _ = compressed_experts(FEW, scheme, BF16)
    runner = build(FEW, config, BF16)
    tensors = [
        (name, t.view(torch.float8_e8m0fnu) if name.endswith("_scale") else t)
        for name, t in tensors_of(modules)
    ]
    list(runner.load_weights(iter(tensors)))
    loaded = runner.routed_experts.w2_weight_scale[3]
    assert torch.equal(loaded, modules["3"]["down_proj"].weight_scale.data)


def broken(scheme: str, change: Any) -> None:
    """Load experts whose tensors were changed by name, and finish loading."""
    modules, config, _ = compressed_experts(FEW, scheme, BF16)
    runner = build(FEW, config, BF16)
    changed = ((name, change(name, tensor)) for name, tensor in tensors_of(modules))
    list(runner.load_weights((n, tensor) for n, tensor in changed if len(tensor)))
    layer = runner.routed_experts
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("scheme", ["fp8-channel-dynamic", "mxfp8"])
def test_nan_is_refused(scheme: str) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "2.up_proj.weight":
            tensor.view(torch.uint8)[5, 7] = 0x7F
        return tensor

    with pytest.raises(
        UnsupportedCheckpointError, match=f"NaN .layer {PREFIX}, tensor w13_weight"
    ):
        broken(scheme, change)


@pytest.mark.parametrize("scheme", MULTIPLIED_EXPERTS)
@pytest.mark.parametrize("kind", ["nan", "missing", "wide", "integer"])
def test_broken_scales_are_refused(scheme: str, kind: str) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != "2.down_proj.weight_scale":
            return tensor
        if kind == "nan":
            is_exponent = tensor.dtype == torch.uint8
            tensor[3, -1] = 255 if is_exponent else torch.nan
        if kind == "missing":
            return tensor[:0]
        if kind == "wide":
            return tensor.repeat(1, 2)
        return tensor.to(torch.int32) if kind == "integer" else tensor

    with pytest.raises(UnsupportedCheckpointError, match=r"2\.down_proj\.weight_scale"):
        broken(scheme, change)
