# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The hooks staged in `upstream_patches` suffice for the code that uses them."""

import os
from collections.abc import Iterator

import pytest
import torch
from pytest_mock import MockerFixture
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    CompressedTensorsW4A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.platforms import PlatformEnum

from tests.formula import relative_error
from tests.layers.quantized_experts import (
    INT8_TOLERANCE,
    ROUNDINGS,
    Sizes,
    is_weight_only,
    routing,
    run,
)
from tests.layers.quantized_experts import load as load_experts
from tests.layers.quantized_layers import activations, load, row_case
from vllm_ascend_ct.compat import CompressedTensorsWNA16MoEMethod
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import AscendWNA16LinearKernel
from vllm_ascend_ct.quantization.compressed_tensors import linear_method

if os.environ.get("VLLM_ASCEND_CT_TEST_HOOKS") != "1":
    reason = "this vLLM has no hooks; python -m tools.upstream.upstream_patches test"
    pytest.skip(reason, allow_module_level=True)

from upstream_patches.vllm import with_hooks

pytestmark = pytest.mark.usefixtures("single_rank", "hooked")

BF16 = torch.bfloat16
SIZES = Sizes(4, 256, 256, 2)


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the classes that use the hooks instead of the package's."""
    registry = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    monkeypatch.delitem(registry, "compressed-tensors")
    platform = with_hooks.HookedPlatform()
    monkeypatch.setattr(quantization, "current_platform", platform)
    monkeypatch.setitem(linear._POSSIBLE_KERNELS, PlatformEnum.OOT, [])
    with_hooks.register()
    yield


def test_the_platform_supplies_the_config() -> None:
    config = quantization.get_quantization_config("compressed-tensors")
    assert config is with_hooks.HookedConfig


@pytest.mark.parametrize(
    ("scheme", "method", "experts"),
    [
        (
            "w8a8-channel-dynamic",
            CompressedTensorsW8A8Int8MoEMethod,
            with_hooks.RegisteredW8A8Experts,
        ),
        (
            "w4a8-channel",
            CompressedTensorsW4A8Int8MoEMethod,
            with_hooks.RegisteredW4A8Experts,
        ),
        (
            "w4a8-g256",
            CompressedTensorsW4A8Int8MoEMethod,
            with_hooks.RegisteredW4A8Experts,
        ),
        *[
            (scheme, CompressedTensorsWNA16MoEMethod, with_hooks.RegisteredWNA16Experts)
            for scheme in (
                "w4a16-g32",
                "w4a16-g128-asym",
                "w4a16-channel",
                "w8a16-channel",
            )
        ],
    ],
)
def test_upstreams_methods_ask_for_experts(
    scheme: str, method: type, experts: type
) -> None:
    runner, formula = load_experts(SIZES, scheme, BF16, is_weight_only(scheme))
    made = runner.routed_experts.quant_method
    assert type(made) is method and type(made.moe_kernel.fused_experts) is experts
    x = formula.without_ties(activations(64, SIZES.hidden, BF16))
    routed = routing(SIZES, 64)
    tolerance = ROUNDINGS[BF16] if is_weight_only(scheme) else INT8_TOLERANCE
    assert relative_error(run(runner, x, routed), formula(x, *routed)) < tolerance


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("w4a8-channel", with_hooks.ToldWNA8LinearKernel),
        ("w4a8-g256-packed", with_hooks.ToldWNA8LinearKernel),
        ("w4a8-g128", AscendWNA16LinearKernel),
        ("w4a16-g128", AscendWNA16LinearKernel),
    ],
)
def test_upstream_chooses_kernels_by_activations(
    scheme: str, kernel: type, mocker: MockerFixture
) -> None:
    """The package would replace the kernel by itself."""
    mocker.patch.object(linear_method, "_quantize_activations")
    layer, _ = load(row_case(512, 96), scheme, BF16, bias=False)
    assert type(layer.scheme.kernel) is kernel
    key = layer.scheme.kernel.config.activation_quant_key
    assert (key is None) == ("a16" in scheme)
