# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Floating-point layers that A5 multiplies as they are, compared with float64."""

from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_mxfp4 import (  # noqa: E501
    CompressedTensorsW4A4Mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_mxfp8 import (  # noqa: E501
    CompressedTensorsW8A8Mxfp8,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    MULTIPLIED,
    MULTIPLIED_FP8,
    MULTIPLIED_MX,
    activations,
    compressed_modules,
    config_of,
    gate_up_case,
    load,
    load_head,
    qkv_case,
    replicated_case,
    row_case,
    tolerance,
)
from tools.checkpoints.make_checkpoint import compress
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.mxfp4.ascend import AscendMxfp4LinearKernel
from vllm_ascend_ct.kernels.linear.mxfp8.ascend import AscendMxfp8LinearKernel
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend_fp8 import (
    AscendFP8ScaledMMLinearKernel,
)
from vllm_ascend_ct.quantization.compressed_tensors import resolving
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
    # Sizes that are not multiples of anything; for MX formats, an odd number of blocks.
    "odd": replicated_case(301, 37),
    "odd blocks": replicated_case(352, 37),
}
KERNELS: dict[str, tuple[type, type, torch.dtype]] = {
    **dict.fromkeys(
        MULTIPLIED_FP8,
        (AscendCTW8A8Fp8, AscendFP8ScaledMMLinearKernel, torch.float8_e4m3fn),
    ),
    "mxfp8": (
        CompressedTensorsW8A8Mxfp8,
        AscendMxfp8LinearKernel,
        torch.float8_e4m3fn,
    ),
    "mxfp4": (CompressedTensorsW4A4Mxfp4, AscendMxfp4LinearKernel, torch.uint8),
}

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture(autouse=True)
def on_a5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "case"),
    # compressed-tensors writes whole groups only.
    [
        (scheme, case)
        for scheme in MULTIPLIED
        for case in CASES
        if scheme in MULTIPLIED_FP8 or CASES[case].k % 32 == 0
    ],
)
def test_output_is_the_formula(
    scheme: str, case: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(CASES[case], scheme, dtype, bias)
    assert type(layer.quant_method) is AscendCTLinearMethod
    made = type(layer.scheme), type(layer.scheme.kernel), layer.weight.dtype
    assert made == KERNELS[scheme]
    for shape in ((20,), (1,), (2, 3)):
        x = activations(20, CASES[case].k, dtype)[: torch.Size(shape).numel()]
        x = formulas[0].without_ties(x).view(*shape, -1)
        expected = torch.cat([formula(x) for formula in formulas], dim=-1)
        y = layer(x)[0]
        assert y.dtype == dtype and y.shape == expected.shape
        assert relative_error(y, expected) < tolerance(scheme, dtype)


@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_activations_are_quantized(scheme: str) -> None:
    """8-bit inputs differ from 16-bit inputs by ten times the tolerance."""
    layer, (formula,) = load(CASES["row"], scheme, torch.float16, False)
    x = activations(20, CASES["row"].k, torch.float16)
    formula.input_args = None
    error = relative_error(layer(x)[0], formula(x))
    assert error > 10 * tolerance(scheme, torch.float16)


@pytest.mark.parametrize(
    "scheme",
    [
        *("fp8-tensor-static", "fp8-channel-a16", "fp8-block"),
        *("mxfp4-a16", "nvfp4"),
    ],
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


def layer_of(
    prefix: str, scheme: str = MULTIPLIED[0], **options: Any
) -> ReplicatedLinear:
    options = {"params_dtype": torch.bfloat16, **options}
    config = config_of("re:.*", scheme)
    k, n = options.pop("k", 256), options.pop("n", 64)
    return ReplicatedLinear(k, n, quant_config=config, prefix=prefix, **options)


@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_a_weight_that_attention_reads_is_resolved(scheme: str) -> None:
    layer = layer_of("model.layers.0.self_attn.kv_b_proj", scheme)
    assert isinstance(layer.quant_method, ResolvedMixin)


@pytest.mark.parametrize("soc", ["A2", "A3", "310P"])
@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_other_chips_resolve(
    monkeypatch: pytest.MonkeyPatch, scheme: str, soc: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    layer = layer_of("fc", scheme, params_dtype=torch.float16)
    assert isinstance(layer.quant_method, ResolvedMixin)


@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_resolving_may_be_forbidden(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_RESOLVE", "0")
    assert type(layer_of("fc", scheme).quant_method) is AscendCTLinearMethod


@pytest.mark.parametrize(
    "options",
    [{"k": 65536, "n": 8}, {"k": 64, "n": 65536}, {"params_dtype": torch.float32}],
    ids=str,
)
@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_what_the_operators_do_not_take_is_resolved(
    scheme: str, options: dict[str, Any], mocker: MockerFixture
) -> None:
    warning = mocker.patch.object(resolving.logger, "warning_once")
    layer = layer_of("fc", scheme, **options)
    assert isinstance(layer.quant_method, ResolvedMixin)
    assert warning.called


@pytest.mark.parametrize("scheme", MULTIPLIED_MX)
def test_a_shard_that_begins_within_a_block_is_resolved(scheme: str) -> None:
    """A rank's share of the inputs, which vLLM sets before it asks for a method."""
    config = config_of("re:.*", scheme)
    method = {}
    for share in (96, 48):
        layer = layer_of("fc", scheme, k=192)
        layer.input_size_per_partition = share
        method[share] = config.get_quant_method(layer, "fc")
    assert type(method[96]) is AscendCTLinearMethod
    assert isinstance(method[48], ResolvedMixin)


@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_nothing_is_warned_of(scheme: str, mocker: MockerFixture) -> None:
    warning = mocker.patch.object(resolving.logger, "warning_once")
    layer_of("fc", scheme)
    assert not warning.called


@pytest.mark.parametrize("scheme", MULTIPLIED_MX)
def test_exponents_may_have_their_own_dtype(scheme: str) -> None:
    """Some tools write E8M0 scales not as bytes."""
    case = replicated_case(128, 8)
    modules = compressed_modules(case, scheme, torch.bfloat16, False)
    compress(modules)
    scale = modules["out_proj"].weight_scale
    layer = layer_of("fc", scheme, k=128, n=8, bias=False)
    for kind in (torch.uint8, torch.float8_e8m0fnu):
        layer.weight_scale.weight_loader(layer.weight_scale, scale.data.view(kind))
        assert torch.equal(layer.weight_scale.data, scale.data)


@pytest.mark.parametrize("scheme", MULTIPLIED_MX)
def test_what_was_not_loaded_is_refused(scheme: str) -> None:
    layer = layer_of("fc", scheme, bias=False)
    with pytest.raises(UnsupportedCheckpointError, match="is missing"):
        layer.quant_method.process_weights_after_loading(layer)
