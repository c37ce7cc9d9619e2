# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Every scheme through upstream's layers and loaders, against float64."""

import pytest
import torch
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)

from tests.formula import relative_error
from tests.layers.quantized_layers import (
    Case,
    activations,
    gate_up_case,
    load,
    qkv_case,
    replicated_case,
    row_case,
    tolerance,
)
from tools.make_checkpoint import SCHEMES
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)

CASES = {
    "replicated": replicated_case(512, 96),
    "replicated-one-group-of-128": replicated_case(128, 256),
    "qkv": qkv_case(256, heads=4, kv_heads=2),
    "gate-up": gate_up_case(384, 320),
    "row": row_case(640, 192),
}
BATCHES = (1, 5, 64)

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_is_the_formula(
    scheme: str, case: Case, dtype: torch.dtype, bias: bool
) -> None:
    layer, formulas = load(case, scheme, dtype, bias)
    upstream, kernel = (
        (CompressedTensorsWNA16, AscendWNA16LinearKernel)
        if "a16" in scheme
        else (CompressedTensorsW8A8Int8, AscendInt8ScaledMMLinearKernel)
    )
    assert type(layer.scheme) is upstream
    assert type(layer.scheme.kernel) is kernel
    for batch in BATCHES:
        x = formulas[0].without_ties(activations(batch, case.k, dtype))
        y, unadded_bias = layer(x)
        assert unadded_bias is None
        assert y.dtype == dtype
        expected = torch.cat([formula(x) for formula in formulas], dim=-1)
        assert relative_error(y, expected) < tolerance(scheme, dtype)


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
