# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the kernels accept, before any weight is read."""

import pytest
import torch
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.scalar_type import ScalarType, scalar_types

from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
    AscendInt8ScaledMMLinearKernel,
)


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
        zero_points=not weight_type.has_bias(),
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
    ],
)
def test_accepted(config: MPLinearLayerConfig) -> None:
    assert choose_mp_linear_kernel(config) is AscendWNA16LinearKernel


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (mp_config(scalar_types.uint2b2), "weight type uint2b2; supported: uint4b8"),
        (mp_config(scalar_types.int4), "weight type int4"),
        (mp_config(group_size=16), "group_size=16; supported: per channel, or a mul"),
        (mp_config(group_size=48), "group_size=48"),
        (mp_config(shape=(65536, 8)), "K=65536; supported: 1 to 65535"),
        (mp_config(shape=(128, 65536)), "N=65536; supported: 1 to 65535"),
        (mp_config(group_size=-1, shape=(100, 8)), "K=100; supported: multiples of 8"),
        (
            mp_config(scalar_types.uint8, -1, shape=(102, 8)),
            "K=102; supported: multiples of 4",
        ),
        (mp_config(group_size=-1, shape=(64, 1)), "N=1; supported for int4: 2"),
        (mp_config(act_type=torch.float32), "activation dtype torch.float32"),
    ],
)
def test_refused_with_the_reason(config: MPLinearLayerConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"AscendWNA16LinearKernel .* {reason}"):
        choose_mp_linear_kernel(config)


@pytest.mark.parametrize("weight_type", [scalar_types.uint4b8, scalar_types.uint8b128])
def test_310p_has_no_int4(
    monkeypatch: pytest.MonkeyPatch, weight_type: ScalarType
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "310P")
    accepted, reason = AscendWNA16LinearKernel.can_implement(
        mp_config(weight_type, act_type=torch.float16)
    )
    assert accepted == (weight_type == scalar_types.uint8b128)
    assert accepted or reason == "4-bit weights; supported: 8"


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
    """Releases before 0.30 pass checkpoints with activation ordering on."""
    config = mp_config()
    config.has_g_idx = True
    accepted, reason = AscendWNA16LinearKernel.can_implement(config)
    assert not accepted and reason is not None and "g_idx" in reason
