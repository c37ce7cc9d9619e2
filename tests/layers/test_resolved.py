# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Floating-point schemes with upstream's layers and loaders, compared with float64."""

import pytest
import torch
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    UnquantizedLinearMethod,
)

from tests.formula import relative_error
from tests.layers.quantized_experts import ROUNDINGS, Sizes, routing, run
from tests.layers.quantized_experts import load as load_experts
from tests.layers.quantized_layers import (
    MULTIPLIED,
    MULTIPLIED_EXPERTS,
    activations,
    config_of,
    gate_up_case,
    load,
    load_embedding,
    load_head,
    qkv_case,
    replicated_case,
    row_case,
    tolerance,
)
from tools.checkpoints.make_checkpoint import FLOAT_SCHEMES
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.resolved import ResolvedMixin

CASES = {
    "replicated": replicated_case(512, 96),
    "qkv": qkv_case(256, heads=4, kv_heads=2),
    "gate-up": gate_up_case(384, 320),
    "row": row_case(640, 192),
}
SIZES = Sizes(5, hidden=320, intermediate=192, top_k=3)
ROWS = 20
DTYPES = {"310P": torch.float16, "A5": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_output_is_the_formula(
    scheme: str, case: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(CASES[case], scheme, dtype, bias)
    method = layer.quant_method
    # Other code sees an unquantized layer, and vLLM serves it as one.
    assert isinstance(method, ResolvedMixin)
    assert isinstance(method, UnquantizedLinearMethod)
    assert type(method).__name__ in WEIGHT_LOADER_V2_SUPPORTED
    assert dict(layer.named_parameters()).keys() <= {"weight", "bias"}
    x = activations(ROWS, CASES[case].k, dtype)
    expected = torch.cat([formula(x) for formula in formulas], dim=-1)
    assert relative_error(layer(x)[0], expected) < tolerance(scheme, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_experts_are_the_formula(scheme: str, dtype: torch.dtype) -> None:
    runner, formula = load_experts(SIZES, scheme, dtype, weight_only=True)
    layer = runner.routed_experts
    method = layer.quant_method
    assert isinstance(method, ResolvedMixin)
    assert isinstance(method, UnquantizedFusedMoEMethod)
    assert dict(layer.named_parameters()).keys() <= {"w13_weight", "w2_weight"}
    x = activations(ROWS, SIZES.hidden, dtype)
    routed = routing(SIZES, ROWS)
    error = relative_error(run(runner, x, routed), formula(x, *routed))
    assert error < ROUNDINGS[dtype]


@pytest.mark.parametrize("soc", ["310P", "A5"])
@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_other_chips(scheme: str, soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    dtype = DTYPES[soc]
    layer, (formula,) = load(CASES["replicated"], scheme, dtype, bias=True)
    multiplied = soc == "A5" and scheme in MULTIPLIED
    assert isinstance(layer.quant_method, ResolvedMixin) is not multiplied
    x = formula.without_ties(activations(ROWS, CASES["replicated"].k, dtype))
    assert relative_error(layer(x)[0], formula(x)) < tolerance(scheme, dtype)


@pytest.mark.parametrize(
    ("soc", "scheme"),
    [
        *(("310P", scheme) for scheme in FLOAT_SCHEMES),
        *(
            ("A5", scheme)
            for scheme in FLOAT_SCHEMES
            if scheme not in MULTIPLIED_EXPERTS
        ),
    ],
)
def test_experts_on_other_chips(
    scheme: str, soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    test_experts_are_the_formula(scheme, DTYPES[soc])


@pytest.mark.parametrize("scheme", FLOAT_SCHEMES)
def test_vocabulary_is_the_formula(scheme: str) -> None:
    """The size is not a multiple of 64, so vLLM pads it."""
    layer, formula = load_embedding(1008, 256, scheme, torch.bfloat16)
    ids = torch.tensor([[0, 1, 5], [1007, 5, 77]])
    rounded = formula.weight[ids].float().bfloat16()
    torch.testing.assert_close(layer(ids), rounded, rtol=2**-8, atol=0)
    head, formula = load_head(1008, 256, scheme, torch.bfloat16)
    x = activations(ROWS, 256, torch.bfloat16)
    y = head.quant_method.apply(head, x)[:, :1008]
    assert relative_error(y, formula(x)) < tolerance(scheme, torch.bfloat16)


def test_head_tied_to_what_is_quantized_otherwise_is_refused() -> None:
    head, _ = load_head(1008, 256, "fp8-channel-a16", torch.bfloat16)
    same, _ = load_embedding(1008, 256, "fp8-channel-a16", torch.bfloat16)
    head.quant_method.tie_weights(head, same)
    for other in ("mxfp8", "w4a16-g32"):
        embedding, _ = load_embedding(1008, 256, other, torch.bfloat16)
        with pytest.raises(UnsupportedCheckpointError, match="is tied to an embedding"):
            head.quant_method.tie_weights(head, embedding)


def test_remedy_fits_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that overflow float16; the 310P has no bfloat16."""
    config = config_of("re:.*", "fp8-channel-a16")
    for soc, remedy in (("A2", "--dtype bfloat16"), ("310P", "Calibrate")):
        monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
        layer = CASES["replicated"].build(
            bias=False, params_dtype=torch.float16, quant_config=config, prefix="x"
        )
        scale = torch.full((96, 1), 1000.0)
        layer.weight_scale.weight_loader(layer.weight_scale, scale)
        weight = torch.full((96, 512), 448.0).to(torch.float8_e4m3fn)
        with pytest.raises(UnsupportedCheckpointError, match=remedy):
            layer.weight.weight_loader(layer.weight, weight)
