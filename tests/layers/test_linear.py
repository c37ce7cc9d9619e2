# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme through upstream's layers and loaders, against float64."""

import pytest
import torch
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A8Int,
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    activations,
    gate_up_case,
    is_weight_only,
    load,
    qkv_case,
    replicated_case,
    row_case,
    tolerance,
)
from tools.checkpoints.make_checkpoint import SCHEMES
from vllm_ascend_ct import compat
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa8o8 import (  # noqa: E501
    AscendCTWNA8O8Int,
)
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    AscendCTWNA16,
)

CASES = {
    "replicated": replicated_case(512, 96),
    "replicated-one-group-of-128": replicated_case(128, 256),
    "qkv": qkv_case(256, heads=4, kv_heads=2),
    "gate-up": gate_up_case(384, 320),
    "row": row_case(640, 192),
}
BATCHES = (1, 5, 64)
ROWS = 20
# The 310P multiplies by a float16 reciprocal, so some integers are off by 1.
QUANTIZED_IN_FLOAT16 = 5e-3

pytestmark = pytest.mark.usefixtures("single_rank")


def expected_classes(scheme: str, k: int) -> tuple[type, type]:
    """Upstream's scheme, and our kernel in it."""
    older = compat.CompressedTensorsWNA8Int is None
    if "a16" in scheme:
        odd = SCHEMES[scheme].weights.num_bits not in (4, 8)
        upstream = AscendCTWNA16 if older and odd else CompressedTensorsWNA16
        return upstream, AscendWNA16LinearKernel
    if "o8" in scheme:
        return AscendCTWNA8O8Int, AscendWNA16LinearKernel
    if scheme.startswith("w8a8") and not scheme.endswith("packed"):
        return CompressedTensorsW8A8Int8, AscendInt8ScaledMMLinearKernel
    upstream = CompressedTensorsW4A8Int
    if scheme.endswith("packed"):
        upstream = AscendCTWNA16 if older else compat.CompressedTensorsWNA8Int
    if is_weight_only(scheme, k):
        return upstream, AscendWNA16LinearKernel
    return upstream, AscendWNA8LinearKernel


def cases_of(scheme: str) -> list[str]:
    """The layers with whole groups of inputs."""
    layout = SCHEMES[scheme].weights
    group_size = layout.group_size or 1
    return [name for name, case in CASES.items() if case.k % group_size == 0]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "case"), [(s, case) for s in SCHEMES for case in cases_of(s)]
)
def test_output_is_the_formula(
    scheme: str, case: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(CASES[case], scheme, dtype, bias)
    upstream, kernel = expected_classes(scheme, CASES[case].k)
    assert type(layer.scheme) is upstream
    assert type(layer.scheme.kernel) is kernel
    # The only weight of the layer, under the name that other code reads.
    assert layer.weight.dim() == 2 and not hasattr(layer, "weight_packed")
    for batch in BATCHES:
        # Many rows, so that the error does not depend on a single row.
        x = activations(max(ROWS, batch), CASES[case].k, dtype)
        x = formulas[0].without_ties(x)
        outputs = [layer(part) for part in x.split(batch)]
        assert all(unadded_bias is None for _, unadded_bias in outputs)
        y = torch.cat([output for output, _ in outputs])
        assert y.dtype == dtype
        expected = torch.cat([formula(x) for formula in formulas], dim=-1)
        assert relative_error(y, expected) < tolerance(scheme, dtype)


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a8-g128"])
def test_outputs_that_words_do_not_hold(scheme: str) -> None:
    """N is not a multiple of 8, so int4 is packed along K."""
    for n, packed_along in ((96, 1), (100, 0)):
        layer, (formula,) = load(
            replicated_case(512, n), scheme, torch.bfloat16, bias=False
        )
        assert layer.weight.stride(packed_along) == 1
        x = activations(ROWS, 512, torch.bfloat16)
        error = relative_error(layer(x)[0], formula(x))
        assert error < tolerance(scheme, torch.bfloat16)


def is_served(scheme: str, dtype: torch.dtype, soc: str) -> bool:
    """The 310P supports float16 models with per-channel int8; other chips, all."""
    layout = SCHEMES[scheme].weights
    int8 = layout.num_bits > 4 and not layout.group_size
    symmetric = not scheme.endswith("dynamic-asym")
    return soc != "310P" or (dtype == torch.float16 and int8 and symmetric)


@pytest.mark.parametrize("soc", ["310P", "A5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_chips(
    scheme: str, dtype: torch.dtype, soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheme is computed correctly or refused; no operator's limit is exceeded."""
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    check_on_chip(scheme, dtype, soc)


def check_on_chip(scheme: str, dtype: torch.dtype, soc: str) -> None:
    if not is_served(scheme, dtype, soc):
        with pytest.raises(UnsupportedCheckpointError):
            load(CASES["replicated"], scheme, dtype, bias=True)
        return
    layer, (formula,) = load(CASES["replicated"], scheme, dtype, bias=True)
    x = formula.without_ties(activations(ROWS, CASES["replicated"].k, dtype))
    kernel = type(layer.scheme.kernel)
    if kernel is AscendWNA16LinearKernel and formula.output_scale is None:
        formula.input_args = None
    limit = tolerance(scheme, dtype)
    quantizes = kernel is not AscendWNA16LinearKernel and "static" not in scheme
    if soc == "310P" and quantizes:
        limit = max(limit, QUANTIZED_IN_FLOAT16)
    assert relative_error(layer(x)[0], formula(x)) < limit


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a8-channel-dynamic"])
def test_leading_axes_are_kept(scheme: str) -> None:
    layer, _ = load(CASES["row"], scheme, torch.bfloat16, bias=True)
    x = activations(6, 640, torch.bfloat16)
    assert torch.equal(layer(x.view(2, 3, 640))[0].view(6, -1), layer(x)[0])


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w8a8-channel-dynamic", "w8a8-channel-static-asym"]
)
def test_bias_that_the_caller_adds_is_left_alone(scheme: str) -> None:
    dtype = torch.bfloat16
    layer, (formula,) = load(CASES["row"], scheme, dtype, True, skip_bias_add=True)
    x = formula.without_ties(activations(5, 640, dtype))
    y, bias = layer(x)
    assert bias.dtype == dtype and torch.equal(bias, formula.bias)
    assert relative_error(y, formula(x) - formula.bias.double()) < 3e-3
