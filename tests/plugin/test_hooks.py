# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Where vLLM has the hooks, they are what is used."""

import pytest
import torch
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a8_int8 import (  # noqa: E501
    CompressedTensorsW4A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)

from tests import hooks
from tests.layers.quantized_experts import Sizes, build_with
from tests.layers.quantized_layers import config_of, load, row_case
from vllm_ascend_ct.compat import CompressedTensorsWNA16MoEMethod
from vllm_ascend_ct.fused_moe.experts.ascend_wna8_moe import (
    AscendW4A8Experts,
    AscendWNA8Experts,
)
from vllm_ascend_ct.fused_moe.experts.ascend_wna16_moe import AscendWNA16Experts
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import AscendWNA16LinearKernel
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)

pytestmark = [hooks.needed, pytest.mark.usefixtures("single_rank")]


def test_this_vllm_has_them() -> None:
    assert hooks.CONFIG and hooks.ACTIVATIONS and hooks.EXPERTS


def test_the_platform_supplies_the_config() -> None:
    """Nothing is in the registry."""
    registry = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    assert "compressed-tensors" not in registry
    config = quantization.get_quantization_config("compressed-tensors")
    assert config is AscendCTConfig


@pytest.mark.parametrize(
    ("scheme", "method", "experts"),
    [
        (
            "w8a8-channel-dynamic",
            CompressedTensorsW8A8Int8MoEMethod,
            AscendWNA8Experts,
        ),
        ("w4a8-channel", CompressedTensorsW4A8Int8MoEMethod, AscendW4A8Experts),
        ("w4a8-g256", CompressedTensorsW4A8Int8MoEMethod, AscendW4A8Experts),
        ("w4a16-g32", CompressedTensorsWNA16MoEMethod, AscendWNA16Experts),
        ("w4a16-g128-asym", CompressedTensorsWNA16MoEMethod, AscendWNA16Experts),
        ("w4a16-channel", CompressedTensorsWNA16MoEMethod, AscendWNA16Experts),
        ("w8a16-channel", CompressedTensorsWNA16MoEMethod, AscendWNA16Experts),
    ],
)
def test_upstreams_methods_ask_for_experts(
    scheme: str, method: type, experts: type
) -> None:
    runner = build_with(
        Sizes(4, 256, 256, 2), config_of("Linear", scheme), torch.bfloat16
    )
    made = runner.routed_experts.quant_method
    assert type(made) is method and made.experts_cls is experts


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("w4a8-channel", AscendWNA8LinearKernel),
        ("w4a8-g256-packed", AscendWNA8LinearKernel),
        ("w4a8-g128", AscendWNA16LinearKernel),
        ("w4a16-g128", AscendWNA16LinearKernel),
    ],
)
def test_upstream_chooses_kernels_by_activations(scheme: str, kernel: type) -> None:
    layer, _ = load(row_case(512, 96), scheme, torch.bfloat16, bias=False)
    assert type(layer.scheme.kernel) is kernel
    key = layer.scheme.kernel.config.activation_quant_key
    assert (key is None) == ("a16" in scheme)
