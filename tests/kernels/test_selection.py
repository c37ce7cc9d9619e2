# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the kernels accept before weights are loaded."""

import dataclasses
from typing import Any

import pytest
import torch
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.scalar_type import ScalarType, scalar_types

from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    WEIGHT_TYPES,
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend_wna8 import (
    AscendWNA8LinearKernel,
    with_quantized_activations,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)

# vLLM before 0.30 has a field for activation ordering.
FIELDS = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
HAS_G_IDX: dict[str, Any] = {"has_g_idx": False} if "has_g_idx" in FIELDS else {}


def mp_config(
    weight_type: ScalarType = scalar_types.uint4b8,
    group_size: int = 128,
    shape: tuple[int, int] = (1024, 512),
    act_type: torch.dtype = torch.bfloat16,
) -> MPLinearLayerConfig:
    return MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=weight_type,
        act_type=act_type,
        group_size=group_size,
        zero_points=weight_type in (scalar_types.uint4, scalar_types.uint8),
        **HAS_G_IDX,
    )


@pytest.mark.parametrize(
    "config",
    [
        mp_config(),
        mp_config(scalar_types.uint4, 32),
        mp_config(scalar_types.uint8b128, -1),
        mp_config(scalar_types.uint8, 64, act_type=torch.float16),
        mp_config(group_size=1024),
        mp_config(group_size=96, shape=(960, 8)),
        mp_config(scalar_types.uint8, -1, shape=(102, 8)),
        # A larger N is computed in parts.
        mp_config(shape=(128, 65536)),
        *(mp_config(weight_type) for weight_type in WEIGHT_TYPES),
    ],
)
def test_accepted(config: MPLinearLayerConfig) -> None:
    assert choose_mp_linear_kernel(config) is AscendWNA16LinearKernel


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            mp_config(scalar_types.float8_e4m3fn),
            "weight type float8_e4m3fn; supported: int4",
        ),
        (mp_config(group_size=16), "group_size=16; supported: per channel, or a mul"),
        (mp_config(group_size=48), "group_size=48"),
        (mp_config(shape=(65536, 8)), "K=65536; supported: 1 to 65535"),
        (mp_config(group_size=-1, shape=(100, 8)), "K=100; supported for int4: mul"),
        (mp_config(group_size=-1, shape=(64, 1)), "N=1; supported for int4: 2"),
        (mp_config(act_type=torch.float32), "activation dtype torch.float32"),
    ],
)
def test_refused_with_the_reason(config: MPLinearLayerConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"AscendWNA16LinearKernel .* {reason}"):
        choose_mp_linear_kernel(config)


@pytest.mark.parametrize(
    ("weight_type", "group_size", "reason"),
    [
        (scalar_types.uint4b8, -1, "4-bit weights; supported: 8"),
        (scalar_types.uint8b128, 128, "group_size=128; supported: per channel"),
        (scalar_types.uint8b128, -1, None),
    ],
)
def test_310p(
    monkeypatch: pytest.MonkeyPatch,
    weight_type: ScalarType,
    group_size: int,
    reason: str | None,
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    config = mp_config(weight_type, group_size, act_type=torch.float16)
    result = AscendWNA16LinearKernel.can_implement(config)
    assert result == (reason is None, reason)


@pytest.mark.parametrize(("soc", "accepted"), [("A2", True), ("310P", False)])
def test_asymmetric_dynamic_activations(
    monkeypatch: pytest.MonkeyPatch, soc: str, accepted: bool
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False, is_channelwise=True, input_symmetric=False
    )
    result, reason = AscendInt8ScaledMMLinearKernel.can_implement(config)
    assert result is accepted
    assert accepted or reason is not None and "npu_dynamic_quant_asymmetric" in reason


def test_g_idx_is_refused() -> None:
    """Before 0.30, vLLM passes on activation ordering of checkpoints."""
    config = mp_config()
    config.has_g_idx = True
    accepted, reason = AscendWNA16LinearKernel.can_implement(config)
    assert not accepted and reason is not None and "g_idx" in reason


@pytest.mark.parametrize(
    ("config", "symmetric", "reason"),
    [
        (mp_config(scalar_types.int4, -1), True, None),
        (mp_config(scalar_types.uint4b8, 256, shape=(512, 64)), True, None),
        (mp_config(scalar_types.uint2b2, 128), True, "group_size=128"),
        (mp_config(scalar_types.uint8b128, -1), True, None),
        (mp_config(scalar_types.uint8b128, 128), True, "group_size=128 of 8-bit"),
        (mp_config(scalar_types.int4, -1), False, "asymmetric activations"),
        (mp_config(scalar_types.uint4, -1), True, "weight type uint4; supp"),
        (mp_config(scalar_types.int4, -1, shape=(128, 12)), True, "N=12; supp"),
        (mp_config(scalar_types.int4, -1, shape=(128, 65536)), True, "N=65536"),
        (mp_config(scalar_types.int4, -1, shape=(29576, 8)), True, "K=29576"),
    ],
)
def test_quantized_activations(
    config: MPLinearLayerConfig, symmetric: bool, reason: str | None
) -> None:
    weight_only = AscendWNA16LinearKernel(config, "q", "s", "z")
    kernel, given = with_quantized_activations(weight_only, symmetric)
    if reason is None:
        assert type(kernel) is AscendWNA8LinearKernel and given is None
    else:
        assert kernel is weight_only and given is not None and reason in given
